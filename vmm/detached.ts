/**
 * Processes of ours that outlive the command that starts them.
 *
 * @module
 */

import { isKnownSystem, libc } from "../ffi/mod.ts";

/** Of this process's environment, what such a process needs: it outlives the command, and must not keep its secrets. */
const ENVIRONMENT: readonly string[] = [
  "PATH",
  "HOME",
  "LANG",
  "XDG_CACHE_HOME",
  "DENO_DIR",
  "DENO_TLS_CA_STORE",
  "DENO_CERT",
  "NPM_CONFIG_REGISTRY",
  "HYPERTOPIA_LIBC",
  "HYPERTOPIA_HOME",
];

/**
 * Starts a program of ours in a session of its own.
 *
 * @param program URL of its module
 * @param log Path of the file that takes what it prints, before it has a log and where it dies of more than an error;
 *   for its owner only
 * @param args Its arguments, after `--detach`
 * @param flags More flags for Deno
 * @returns The process, which this one does not wait for
 */
export function spawnDetached(
  program: string,
  log: string,
  args: readonly string[],
  flags: readonly string[] = [],
): Deno.ChildProcess {
  const child = new Deno.Command("/bin/sh", {
    args: [
      ...["-c", 'umask 077; exec "$@" >>"$0" 2>&1', log],
      ...[Deno.execPath(), "run", "-A", "--no-config", "--no-lock", ...flags, program, "--detach", ...args],
    ],
    clearEnv: true,
    env: Object.fromEntries(ENVIRONMENT.flatMap((name) => {
      const value = Deno.env.get(name);
      return value === undefined ? [] : [[name, value]];
    })),
    stdin: "null",
    stdout: "null",
    stderr: "null",
    detached: true,
  }).spawn();
  child.unref();
  return child;
}

/**
 * Finds a module beside another one, whatever form they were installed in.
 *
 * @param path Path from that module, without its ending, such as `./main`
 * @param from URL of that module: `import.meta.url`
 * @returns URL of the module
 */
export function moduleBeside(path: string, from: string): string {
  return new URL(`${path}.${from.endsWith(".ts") ? "ts" : "js"}`, from).href;
}

/** Begins a session of its own, unless this process has one: what {@linkcode spawnDetached} starts does. */
export function leaveTerminal(): void {
  if (!isKnownSystem()) return;
  const stat = Deno.readTextFileSync("/proc/self/stat");
  // The name in parentheses may hold blanks: fields are counted from its end.
  const session = stat.slice(stat.lastIndexOf(")") + 2).split(" ")[3];
  if (session !== String(Deno.pid)) libc().setsid();
}
