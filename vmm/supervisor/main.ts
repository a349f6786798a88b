/**
 * The supervisor's program: a process that runs one machine of KVM, or several, and serves an API for each on a Unix
 * socket, with Firecracker's flags.
 *
 * ```text
 * deno run -A vmm/supervisor/main.ts --api-sock PATH [--config-file FILE] [--id ID]
 * ```
 *
 * @module
 */

import { parseArgs } from "node:util";
import { leaveTerminal } from "../detached.ts";
import { MachineError } from "../errors.ts";
import { identifyProcess } from "../../planner/mod.ts";
import { removeIfThere, writeWhole } from "../files.ts";
import { FIRECRACKER_VERSION } from "./api.ts";
import { Log, LOG_LEVELS, type LogLevel } from "./log.ts";
import { refuseTaken, Supervisor } from "./supervisor.ts";

const USAGE = `Runs machines on /dev/kvm, or in an emulator.

Usage: deno run -A main.ts --api-sock PATH [--config-file FILE] [OPTION...]
       deno run -A main.ts --host-sock PATH [OPTION...]

  --api-sock PATH     Unix socket of the machine's API; it is made, for its owner only
  --config-file FILE  Configuration of a machine to start at once, as JSON
  --engine ENGINE     What executes machines: kvm or emulated (kvm)
  --id ID             Identity of the machine (anonymous-instance)
  --run-file FILE     Tells who runs the machine, while it runs, and how it ended
  --host-sock PATH    Unix socket to ask for machines by PUT /machines/ID, all in this process
  --readable PATH     What machines that are asked for may read; can be repeated
  --writable PATH     What machines that are asked for may read and write; can be repeated
  --log-path FILE     Log (standard output)
  --level LEVEL       How much is logged: ${LOG_LEVELS.join(", ")} (Info)
  --detach            Leaves the terminal and its signals
  --no-sandbox        Keeps all rights, for debugging
  --no-seccomp        The same
  --version           Prints versions
  --help              Prints this
`;

const FLAGS = {
  "api-sock": { type: "string" },
  "config-file": { type: "string" },
  engine: { type: "string", default: "kvm" },
  id: { type: "string", default: "anonymous-instance" },
  "run-file": { type: "string" },
  "host-sock": { type: "string" },
  readable: { type: "string", multiple: true, default: [] as string[] },
  writable: { type: "string", multiple: true, default: [] as string[] },
  "log-path": { type: "string" },
  level: { type: "string" },
  detach: { type: "boolean", default: false },
  "no-sandbox": { type: "boolean", default: false },
  "no-seccomp": { type: "boolean", default: false },
  version: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
} as const;

/** How long a process for several machines stays when it has none, in milliseconds. */
const IDLE_TIME = 5_000;

/** What `PUT /machines/ID` is given. */
export interface MachineRequest {
  /** Path of the socket of the machine's API. */
  readonly api_sock: string;
  /** Path of its configuration. */
  readonly config_file: string;
  /** Path of the file that tells who runs it. */
  readonly run_file: string;
  /** Path of its log. */
  readonly log_path: string;
}

function say(text: string): void {
  Deno.stdout.writeSync(new TextEncoder().encode(text));
}

/**
 * Runs a supervisor until its machines have ended.
 *
 * @param args Arguments of the command line
 * @returns The exit status: 0, and 1 where the machine crashed
 * @throws {MachineError} If the machine cannot be run
 */
export async function main(args: readonly string[]): Promise<number> {
  const { values } = parseArgs({ args: [...args], options: FLAGS, strict: true });
  if (values.help) return say(USAGE), 0;
  if (values.version) {
    return say(`Hypertopia supervisor, with the API of Firecracker ${FIRECRACKER_VERSION}\n`), 0;
  }
  const socket = values["api-sock"];
  const host = values["host-sock"];
  if ((socket === undefined) === (host === undefined)) {
    throw new MachineError(
      "Cannot run a machine without an API: give --api-sock PATH, or --host-sock PATH for several",
    );
  }
  if (!/^[A-Za-z0-9-]{1,64}$/.test(values.id)) {
    throw new MachineError(`Cannot use the id "${values.id}": give at most 64 letters, digits and hyphens`);
  }
  if (values.engine !== "kvm" && values.engine !== "emulated") {
    throw new MachineError(`Cannot use the engine "${values.engine}": give kvm or emulated`);
  }
  const level = values.level as LogLevel | undefined;
  if (level !== undefined && !LOG_LEVELS.includes(level)) {
    throw new MachineError(`Cannot log at level "${level}": give one of ${LOG_LEVELS.join(", ")}`);
  }
  if (values.detach) leaveTerminal();
  // Sockets and logs are their owner's only.
  Deno.umask(0o077);
  const path = values["log-path"];
  using log = new Log(values.id, {
    ...(path === undefined ? {} : { path }),
    ...(level === undefined ? {} : { level }),
  });
  const { readable: readOnly, writable: readWrite } = values;
  // What the one engine needs, the other one may lack.
  const controllers = values.engine === "emulated"
    ? new (await import("../emulated/controller.ts")).EmulatedHost()
    : new (await import("./kvm_platform.ts")).KvmHost();
  using supervisor = new Supervisor({
    host: controllers,
    log,
    isSandboxed: !values["no-sandbox"] && !values["no-seccomp"],
    ...(host === undefined ? {} : { shared: { readOnly, readWrite } }),
  });
  const stop = () => void supervisor.stop();
  for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.addSignalListener(signal, stop);
  try {
    if (host !== undefined) return await serveHost(host, supervisor, log, values["run-file"]), 0;
    const { ended } = supervisor.run({
      id: values.id,
      socket: socket!,
      configFile: values["config-file"],
      runFile: values["run-file"],
    }, log);
    return (await ended).reason === "crash" ? 1 : 0;
  } finally {
    for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.removeSignalListener(signal, stop);
  }
}

/** Runs machines that are asked for, until there has been none for a while. */
async function serveHost(
  socket: string,
  supervisor: Supervisor,
  log: Log,
  runFile: string | undefined,
): Promise<void> {
  await refuseTaken(socket);
  if (runFile !== undefined) await writeWhole(runFile, JSON.stringify({ process: identifyProcess()! }));
  const idle = Promise.withResolvers<void>();
  let timer = setTimeout(idle.resolve, IDLE_TIME);
  const server = Deno.serve(
    { path: socket, onListen: () => log.info(`machines are asked for on ${socket}`) },
    async (request) => {
      const id = /^\/machines\/([A-Za-z0-9-]{1,64})$/.exec(new URL(request.url).pathname)?.[1];
      if (request.method !== "PUT" || id === undefined) {
        return Response.json({ fault_message: "only PUT /machines/ID is known here" }, { status: 400 });
      }
      clearTimeout(timer);
      try {
        const asked = await request.json() as MachineRequest;
        const own = new Log(id, { path: asked.log_path });
        const { started, ended } = supervisor.run({
          id,
          socket: asked.api_sock,
          configFile: asked.config_file,
          runFile: asked.run_file,
        }, own);
        void ended.catch(() => {}).then(() => {
          own[Symbol.dispose]();
          clearTimeout(timer);
          if (supervisor.count === 0) timer = setTimeout(idle.resolve, IDLE_TIME);
        });
        await started;
        return new Response(null, { status: 204 });
      } catch (error) {
        const reason = error instanceof Error ? error.message : String(error);
        return Response.json({ fault_message: reason }, { status: 400 });
      }
    },
  );
  await idle.promise;
  await server.shutdown();
  await removeIfThere(socket);
}

if (import.meta.main) {
  try {
    Deno.exit(await main(Deno.args));
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    Deno.stderr.writeSync(new TextEncoder().encode(`Error: ${message}\n`));
    Deno.exit(1);
  }
}
