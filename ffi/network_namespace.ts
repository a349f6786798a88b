/**
 * A network namespace for tests: what they make of interfaces, addresses and rules is not the host's, and goes with them.
 *
 * @module
 */

import { fileURLToPath } from "node:url";
import { NetworkInterfaces } from "./tap.ts";

const VARIABLE = "HYPERTOPIA_TEST_NETWORK";

/**
 * Registers the tests of a file that need a network of their own. The file is run once more, in a new namespace, where the
 * tests are registered for real; here one test stands for them all.
 *
 * @param url `import.meta.url` of the file
 * @param name Name of the one test
 * @param register Registers the tests
 * @returns Whether the file runs in the namespace: then it should register no others
 */
export function testInNetworkNamespace(url: string, name: string, register: () => void): boolean {
  if (Deno.env.get(VARIABLE) !== undefined) {
    using interfaces = new NetworkInterfaces();
    interfaces.setUp("lo", true);
    register();
    return true;
  }
  const reason = whyNot();
  Deno.test({
    name: `${name}${reason === undefined ? "" : ` (skipped: ${reason})`}`,
    ignore: reason !== undefined,
    async fn() {
      const { success, stdout, stderr } = await new Deno.Command("unshare", {
        // The mounted /sys shows the interfaces of the namespace that it was mounted in.
        args: ["--net", "--mount", "sh", "-c", `mount -t sysfs sysfs /sys && exec "$@"`, "sh"].concat(
          [Deno.execPath(), "test", "-A", "--no-check", "-q", fileURLToPath(url)],
        ),
        env: { [VARIABLE]: "1", NO_COLOR: "1" },
        stdin: "null",
      }).output();
      if (!success) throw new Error(`${new TextDecoder().decode(stdout)}${new TextDecoder().decode(stderr)}`);
    },
  });
  return false;
}

function whyNot(): string | undefined {
  if (Deno.build.os !== "linux") return "not Linux";
  if (Deno.uid() !== 0) return "not root";
  try {
    Deno.openSync("/dev/net/tun", { read: true, write: true }).close();
    const { success } = new Deno.Command("unshare", {
      args: ["--net", "--mount", "true"],
      stdout: "null",
      stderr: "null",
    }).outputSync();
    return success ? undefined : "no rights to make a network namespace";
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}
