/**
 * The program of the process that keeps a domain.
 *
 * ```text
 * deno run -A vmm/xen/keeper_main.ts --id ID --log-path FILE [--detach]
 * ```
 *
 * @module
 */

import { parseArgs } from "node:util";
import { leaveTerminal } from "../detached.ts";
import { MachineError } from "../errors.ts";
import { hostPaths } from "../paths.ts";
import { Log } from "../supervisor/log.ts";
import { XenMachine } from "./engine.ts";
import { keepDomain } from "./keeper.ts";
import { xenFiles } from "./launch.ts";

/**
 * Keeps the domain of a machine that is on record until it has ended, or until SIGTERM.
 *
 * @param args Arguments of the command line
 * @throws {MachineError} If it cannot
 */
export async function main(args: readonly string[]): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      id: { type: "string" },
      "log-path": { type: "string" },
      detach: { type: "boolean", default: false },
    },
  });
  const { id, "log-path": path } = values;
  if (id === undefined || !/^[0-9a-f]{16}$/.test(id)) {
    throw new MachineError("Cannot keep a domain without the identity of its machine: give --id ID");
  }
  if (values.detach) leaveTerminal();
  // Sockets and logs are their owner's only.
  Deno.umask(0o077);
  using log = new Log(id, path === undefined ? {} : { path });
  const end = new AbortController();
  const stop = () => end.abort();
  for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.addSignalListener(signal, stop);
  try {
    const paths = hostPaths();
    const machine = new XenMachine(id, paths);
    const readSpec = async () => {
      const spec = await machine.spec();
      if (spec) return spec;
      throw new MachineError(`Cannot keep the machine ${id} as it is not on record`);
    };
    await keepDomain({ readSpec, files: xenFiles(paths, id), paths, log, signal: end.signal });
  } catch (error) {
    log.error(error);
    throw error;
  }
}

if (import.meta.main) {
  try {
    await main(Deno.args);
    Deno.exit(0);
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    Deno.stderr.writeSync(new TextEncoder().encode(`Error: ${message}\n`));
    Deno.exit(1);
  }
}
