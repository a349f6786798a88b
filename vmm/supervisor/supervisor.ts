/**
 * What a supervisor's process has once: the device, the loop that serves all exits, and the sandbox; and the machines that
 * it runs, each with an API of its own.
 *
 * @module
 */

import { dirname } from "node:path";
import { SIOC } from "../../ffi/mod.ts";
import { identifyProcess, type ProcessIdentity } from "../../planner/mod.ts";
import { MachineError } from "../errors.ts";
import { removeIfThere, writeWhole } from "../files.ts";
import { Api, type Controller } from "./api.ts";
import { checkFiles, DEFAULT_CONFIGURATION, type MachineEnd, parseConfigFile } from "./config.ts";
import type { ControllerOptions, SandboxFiles } from "./controller.ts";
import type { Log } from "./log.ts";
import { enterSandboxIfKnown, type SandboxOptions } from "./sandbox.ts";

/** The file that tells who runs a machine, and how its last run ended. */
export interface RunFile {
  /** The process; absent once the run has ended in order. */
  readonly process?: ProcessIdentity;
  /** Whether that process runs other machines too. */
  readonly isShared?: boolean;
  /** How the run ended; absent while it has not. */
  readonly end?: MachineEnd;
  /** Folder of the cgroup that limits the process: it stays when that ends, and is to be removed then. */
  readonly cgroup?: string;
}

/** One machine for a supervisor to run. */
export interface MachineOptions {
  /** Identity. */
  readonly id: string;
  /** Path of the socket of its API. */
  readonly socket: string;
  /** Path of the configuration to start at once; without one it waits for its client. */
  readonly configFile?: string | undefined;
  /** Path of the {@linkcode RunFile}. */
  readonly runFile?: string | undefined;
}

/** What a supervisor is made of. */
export interface SupervisorOptions {
  /** Makes what runs its machines. */
  readonly host: ControllerHost;
  /** Takes what happens to the process. */
  readonly log: Log;
  /** Whether it gives up what it does not need. */
  readonly isSandboxed: boolean;
  /**
   * For several machines: what all those to come may read and write. Their networks must be there, as rights to make them
   * are gone when the first one has started.
   */
  readonly shared?: SandboxFiles;
}

/** What {@linkcode ControllerHost.create} is given. */
export interface HostedMachine extends Omit<ControllerOptions, "platform" | "log"> {
  /** Takes what happens. */
  readonly log: Log;
  /** Whether the process runs other machines too. */
  readonly isShared: boolean;
}

/** What the machines of a process have in common: how their code is executed. */
export interface ControllerHost extends Disposable {
  /**
   * Makes what controls a machine.
   *
   * @param machine The machine
   */
  create(machine: HostedMachine): Controller;
}

/** What machines that come later open. */
const DEVICES: readonly string[] = ["/dev/net/tun", "/dev/vhost-net"];

/** Memory that a supervisor may have beyond its guest's, in bytes, with the pages of its disks that the kernel keeps. */
const MEMORY_ROOM = 2 ** 29;
/** Threads that a supervisor may have: those of 32 vCPUs, of the isolate and of its pools. */
const MOST_THREADS = 256;

/** What it takes to plug a tap into a bridge. */
const PLUG_REQUESTS: readonly number[] = [SIOC.GIFFLAGS, SIOC.SIFFLAGS, SIOC.GIFINDEX, SIOC.BRADDIF];

/** Runs machines in this process. */
export class Supervisor implements Disposable {
  readonly #options: SupervisorOptions;
  /** Taken while `/proc` can still be read. */
  readonly #identity = identifyProcess()!;
  readonly #machines = new Set<Controller>();
  #isConfined = false;
  #cgroup: string | undefined;

  /**
   * Runs nothing yet.
   *
   * @param options Log and sandbox
   */
  constructor(options: SupervisorOptions) {
    this.#options = options;
    if (!options.isSandboxed) {
      options.log.warn("there is no sandbox: a guest that breaks out has all rights of this process");
    }
  }

  /** How many machines there are. */
  get count(): number {
    return this.#machines.size;
  }

  /** Stops all machines. */
  async stop(): Promise<void> {
    await Promise.all([...this.#machines].map((machine) => machine.stop()));
  }

  /**
   * Runs a machine.
   *
   * @param machine The machine
   * @param log Takes what happens to it
   * @returns Tells when it has started, or waits for its client; and how it ended
   */
  run(
    machine: MachineOptions,
    log: Log,
  ): { readonly started: Promise<void>; readonly ended: Promise<MachineEnd> } {
    const started = Promise.withResolvers<void>();
    // Whoever does not ask how it started is told how it ended.
    started.promise.catch(() => {});
    const ended = this.#run(machine, log, started.resolve);
    ended.catch(started.reject);
    return { started: started.promise, ended };
  }

  /** Ends what ran them. All machines must have ended. */
  [Symbol.dispose](): void {
    this.#options.host[Symbol.dispose]();
  }

  async #run(machine: MachineOptions, log: Log, onStarted: () => void): Promise<MachineEnd> {
    const { runFile } = machine;
    const note = async (run: RunFile) => {
      const cgroup = this.#cgroup === undefined ? {} : { cgroup: this.#cgroup };
      if (runFile !== undefined) await writeWhole(runFile, JSON.stringify({ ...run, ...cgroup }));
    };
    const alive: RunFile = {
      process: this.#identity,
      ...(this.#options.shared ? { isShared: true } : {}),
    };
    await note(alive);
    let end: MachineEnd | undefined;
    try {
      end = await this.#serve(machine, log, async () => {
        if (this.#cgroup !== undefined) await note(alive);
        onStarted();
      });
      log.info(end.detail);
      return end;
    } catch (error) {
      end = { reason: "failure", detail: error instanceof Error ? error.message : String(error) };
      log.error(error);
      throw error;
    } finally {
      await note(end ? { end } : {});
    }
  }

  async #serve(
    { id, socket, configFile, runFile }: MachineOptions,
    log: Log,
    onStarted: () => Promise<void>,
  ): Promise<MachineEnd> {
    const parsed = configFile === undefined
      ? undefined
      : parseConfigFile(await Deno.readTextFile(configFile));
    for (const name of parsed?.ignored ?? []) {
      log.warn(`the field "${name}" of ${configFile} is not known: it is ignored`);
    }
    if (parsed) await checkFiles(parsed.configuration, configFile!);
    await refuseTaken(socket);
    const ending = Promise.withResolvers<MachineEnd>();
    const controller = this.#options.host.create({
      id,
      log,
      isShared: this.#options.shared !== undefined,
      enterSandbox: (files, memory) =>
        this.#confine(socket, {
          ...files,
          // Whoever reads the run file removes the cgroup.
          ...(runFile === undefined ? {} : {
            cgroup: { name: `hypertopia-${id}`, memoryMax: memory + MEMORY_ROOM, pidsMax: MOST_THREADS },
          }),
        }),
      onEnd: ending.resolve,
    });
    this.#machines.add(controller);
    const api = new Api(controller, parsed?.configuration ?? DEFAULT_CONFIGURATION);
    const server = Deno.serve({
      path: socket,
      onListen: () => log.info(`the API listens on ${socket}`),
    }, (request) => api.handle(request));
    try {
      if (parsed) await api.start();
      await onStarted();
      return await ending.promise;
    } finally {
      this.#machines.delete(controller);
      await controller.kill();
      // Whoever asked for the end still gets an answer, but nobody is waited for.
      await Promise.race([server.shutdown(), new Promise((resolve) => setTimeout(resolve, 200))]);
      await removeIfThere(socket);
    }
  }

  /** Gives up what is not needed any more, once for all machines. */
  #confine(socket: string, files: SandboxFiles & Pick<SandboxOptions, "cgroup">): boolean {
    const { isSandboxed, shared, log } = this.#options;
    if (!isSandboxed) return false;
    if (this.#isConfined) return true;
    const folder = dirname(socket);
    const report = enterSandboxIfKnown(
      shared
        ? {
          folder,
          readOnly: [...shared.readOnly, ...files.readOnly],
          readWrite: [...shared.readWrite, ...files.readWrite, ...DEVICES],
          // Later machines need taps, which they plug into bridges, and serve names to guests.
          keepCapabilities: ["NET_ADMIN", "NET_BIND_SERVICE"],
          allow: [
            { calls: ["ioctl"], when: PLUG_REQUESTS.map((equal) => [{ argument: 1, equal, bits: 32 }]) },
            // Sockets are made for their owner only.
            { calls: ["chmod"], when: [[{ argument: 1, equal: 0o600, bits: 32 }]] },
          ],
        }
        : { folder, ...files },
      log,
    );
    if (!report) return false;
    this.#isConfined = true;
    this.#cgroup = report.cgroup.folder;
    return true;
  }
}

/**
 * A socket of a supervisor that is gone is in the way; one that answers is not ours to take.
 *
 * @param socket Path of the socket
 * @throws {MachineError} If somebody listens
 */
export async function refuseTaken(socket: string): Promise<void> {
  try {
    (await Deno.connect({ transport: "unix", path: socket })).close();
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) await removeIfThere(socket);
    return;
  }
  throw new MachineError(
    `Cannot listen on "${socket}" as another process does: choose another path, or end it`,
  );
}
