/**
 * Hypertopia: virtual machines and topologies, declared in TypeScript.
 *
 * @example
 * ```ts ignore
 * import { cli, http, network, stack, vm } from "hypertopia";
 * import { debian } from "hypertopia/stdlib";
 *
 * const hello = stack("hello", () => {
 *   const lan = network({ cidr: "10.20.0.0/24" });
 *   const web = vm({
 *     memory: "128MiB",
 *     image: debian(),
 *     nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
 *     files: { "/srv/index.html": "hello\n" },
 *     command: "httpd -f -h /srv",
 *     ready: http(80),
 *   });
 *   return { lan, web };
 * });
 *
 * export default hello;
 * if (import.meta.main) await cli(hello);
 * ```
 *
 * @module
 */

export { cli, type CliOptions } from "./cli/mod.ts";
export * from "./dsl/mod.ts";
export * from "./planner/mod.ts";
