/**
 * What the machines of all engines have in common that keep them in folders: their record, their lock, and the order in
 * which things happen.
 *
 * @module
 */

import { join } from "node:path";
import { formatSize } from "../dsl/mod.ts";
import { equal } from "../planner/mod.ts";
import type {
  EngineName,
  Machine,
  MachineSpec,
  MachineStatus,
  OperationOptions,
  UpdateResult,
} from "./engine.ts";
import { MachineError, writeError } from "./errors.ts";
import { exists, lockFile, removeIfThere, writeWhole } from "./files.ts";
import { GuestChannel, guestEndpoints } from "./guest/channel.ts";
import { findPanic, joinFiles, needsRestart, RESTART_GRACE } from "./machine_files.ts";
import type { Paths } from "./paths.ts";

/** How many data channels the agent gets: so many `exec` and `cp` may run at once. */
export const DATA_CHANNELS = 4;
/** How long a guest may take to follow its balloon, in milliseconds. */
const BALLOON_TIMEOUT = 120_000;

/** Paths of the files that each machine has, all in its folder. */
export interface MachineFiles {
  /** The folder. */
  readonly folder: string;
  /** What the machine was started from last. */
  readonly record: string;
  /** Lock of all operations on the machine. */
  readonly lock: string;
  /** Socket of the console. */
  readonly console: string;
  /** What the console printed since the last start. */
  readonly consoleLog: string;
  /** What the process that runs it printed. */
  readonly engineLog: string;
  /** The initramfs, joined from its parts. */
  readonly initramfs: string;
}

interface MachineRecord {
  readonly version: 1;
  readonly engine: EngineName;
  readonly spec: MachineSpec;
}

/** A machine that is kept in a folder. Engines tell how one is started, reached and ended. */
export abstract class FileMachine<Files extends MachineFiles> implements Machine {
  /** Identity. */
  readonly id: string;
  /** The engine. */
  readonly engine: EngineName;
  /** The guest's agent. */
  readonly guest: GuestChannel;
  /** Its files. */
  protected readonly files: Files;
  /** Folders of this host. */
  protected readonly paths: Paths;

  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param engine Name of the engine
   * @param paths Folders of this host
   * @param files Paths of its files, all in its folder
   * @param channels How many data channels the agent has
   */
  constructor(id: string, engine: EngineName, paths: Paths, files: Files, channels: number = DATA_CHANNELS) {
    this.id = id;
    this.engine = engine;
    this.paths = paths;
    this.files = files;
    this.guest = new GuestChannel(guestEndpoints(files.folder, channels));
  }

  /** Path of the file that holds what the console printed since the last start. */
  get consoleLog(): string {
    return this.files.consoleLog;
  }

  /** Path of the file that holds what the process that runs it printed. */
  get engineLog(): string {
    return this.files.engineLog;
  }

  /** Looks how it is. */
  abstract status(): Promise<MachineStatus>;
  /** Stops its vCPUs. */
  abstract pause(): Promise<void>;
  /** Lets its vCPUs go on. */
  abstract resume(): Promise<void>;
  /** Tells whether a process runs it. */
  protected abstract isAlive(): Promise<boolean>;
  /** Starts it, if it does not run; the lock is held. */
  protected abstract startNow(spec: MachineSpec, options: OperationOptions): Promise<void>;
  /** Changes it while it runs; the lock is held, and it takes no restart. */
  protected abstract updateNow(
    current: MachineSpec,
    spec: MachineSpec,
    options: OperationOptions,
  ): Promise<void>;
  /** Tells the guest, which has no agent, to shut down. */
  protected abstract pressPower(options: OperationOptions): Promise<void>;
  /** Powers it off; the lock is held. */
  protected abstract killNow(): Promise<void>;
  /** Tells whether disks and NICs that come or go can do so while it runs: they take a restart unless an engine says else. */
  protected canPlug(current: MachineSpec, spec: MachineSpec, _options: OperationOptions): Promise<boolean> {
    const names = (each: MachineSpec) => [...each.disks, ...each.nics].map(({ name }) => name);
    return Promise.resolve(equal(names(current), names(spec)));
  }

  /**
   * Mends what has gone wrong around a guest that runs, before anything else is done with it; the lock is held.
   *
   * @param current What it is made of
   * @param spec What it should be made of; undefined where it is to end
   * @param options Signal and progress
   */
  protected async mend(
    _current: MachineSpec,
    _spec: MachineSpec | undefined,
    _options: OperationOptions,
  ): Promise<void> {}

  /** Ends what it shared with others, as far as nobody needs that any more. */
  protected async release(_spec: MachineSpec | undefined): Promise<void> {}

  /**
   * Reads what it was started from last.
   *
   * @returns The spec, or undefined where it never was
   */
  async spec(): Promise<MachineSpec | undefined> {
    const record = await readJson<MachineRecord>(this.files.record);
    return record?.version === 1 && record.engine === this.engine ? record.spec : undefined;
  }

  /**
   * Puts it on record without starting it.
   *
   * @param spec What it is made of
   */
  async define(spec: MachineSpec): Promise<void> {
    using _lock = await this.#lock({});
    await this.record(spec);
  }

  /**
   * Starts it, if it does not run.
   *
   * @param spec What it is made of
   * @param options Signal and progress
   */
  async start(spec: MachineSpec, options: OperationOptions = {}): Promise<void> {
    using _lock = await this.#lock(options);
    await this.startNow(spec, options);
  }

  /**
   * Makes it be as a spec says.
   *
   * @param spec What it should be made of
   * @param options Signal and progress, and how long a shutdown may take, in milliseconds, where it takes a restart
   * @returns Whether it was restarted
   */
  async update(
    spec: MachineSpec,
    options: OperationOptions & { shutdownTimeout?: number } = {},
  ): Promise<UpdateResult> {
    using _lock = await this.#lock(options);
    const found = await this.spec();
    if (found && await this.isAlive()) await this.mend(found, spec, options);
    const current = await this.spec();
    const { state, pid } = await this.status();
    if (!current || state === "stopped" || state === "absent" || state === "crashed") {
      if (state === "crashed" || pid !== undefined) await this.killNow();
      await this.startNow(spec, options);
      return { isRestarted: true };
    }
    if (needsRestart(current, spec) || !(await this.canPlug(current, spec, options))) {
      await this.#shutdown(options.shutdownTimeout ?? RESTART_GRACE, options);
      await this.startNow(spec, options);
      await this.release(current);
      return { isRestarted: true };
    }
    await this.updateNow(current, spec, options);
    // The maximum is fixed until the next start.
    await this.record({ ...spec, maxMemory: current.maxMemory });
    await joinFiles(spec.initramfs, this.files.initramfs);
    return { isRestarted: false };
  }

  /**
   * Shuts it down, and powers it off if that takes longer than allowed.
   *
   * @param timeout Milliseconds that the guest may take
   * @param options Signal and progress
   */
  async shutdown(timeout: number, options: OperationOptions = {}): Promise<void> {
    using _lock = await this.#lock(options);
    await this.#shutdown(timeout, options);
    await this.release(await this.spec());
  }

  /** Powers it off at once. */
  async kill(): Promise<void> {
    using _lock = await this.#lock({});
    await this.killNow();
  }

  /** Powers it off and removes everything that belongs to it. */
  async destroy(): Promise<void> {
    const spec = await this.spec();
    // The folder may be that of another engine's machine.
    if (!spec) return;
    using _lock = await this.#lock({});
    await this.killNow();
    await removeIfThere(this.files.folder);
    await this.release(spec);
  }

  /**
   * Connects to the console.
   *
   * @returns The connection: bytes both ways
   */
  async console(): Promise<Deno.UnixConn> {
    return await this.ask(
      "connect to the console of",
      () => Deno.connect({ transport: "unix", path: this.files.console }),
    );
  }

  /**
   * Asks the process that runs it, and says in words why it does not answer.
   *
   * @param action What is asked for, such as "pause"
   * @param run Asks
   * @param signal Aborted by Ctrl-C
   * @returns The answer
   */
  protected async ask<T>(action: string, run: () => Promise<T>, signal?: AbortSignal): Promise<T> {
    try {
      return await run();
    } catch (cause) {
      // What says itself what was attempted needs no more words.
      if (signal?.aborted || cause instanceof MachineError && cause.message.startsWith("Cannot ")) {
        throw cause;
      }
      const { state, address } = await this.status();
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw new MachineError(
        state === "running" || state === "paused"
          ? `Cannot ${action} "${address}" as ${reason}`
          : `Cannot ${action} "${address}" as the machine is ${state}: start it with apply`,
        { cause },
      );
    }
  }

  /** Puts a spec on record. */
  protected async record(spec: MachineSpec): Promise<void> {
    const record: MachineRecord = { version: 1, engine: this.engine, spec };
    await writeWhole(this.files.record, JSON.stringify(record));
  }

  /**
   * Refuses what cannot be started, before anything is changed; then puts the spec on record, and makes files for a start.
   *
   * @param spec What it is made of
   * @param options Signal
   * @param write Writes more files
   */
  protected async prepare(
    spec: MachineSpec,
    options: OperationOptions,
    write?: () => Promise<void>,
  ): Promise<void> {
    const { folder, initramfs, consoleLog, engineLog } = this.files;
    if (new TextEncoder().encode(join(folder, "data.0.err.sock")).length > 107) {
      throw new MachineError(
        `Cannot start "${spec.address}" as the folder "${folder}" makes socket paths longer than 107 bytes: ` +
          `set HYPERTOPIA_HOME to a shorter path`,
      );
    }
    options.signal?.throwIfAborted();
    try {
      await this.record(spec);
      await joinFiles(spec.initramfs, initramfs);
      await write?.();
    } catch (error) {
      throw writeError(`start "${spec.address}"`, error);
    }
    for (const log of [consoleLog, engineLog]) {
      if (await exists(log)) await Deno.rename(log, `${log}.1`);
    }
  }

  /**
   * Waits until a guest has followed its balloon.
   *
   * @param read Reads how many bytes the guest has now
   * @param target How many it should have
   * @param options Signal and progress
   */
  protected async waitForBalloon(
    read: () => Promise<number>,
    target: number,
    options: OperationOptions,
  ): Promise<void> {
    const deadline = Date.now() + BALLOON_TIMEOUT;
    while (true) {
      const actual = await read();
      if (actual === target) return;
      const panic = await findPanic(this.files.consoleLog);
      if (panic !== undefined) {
        throw new MachineError(`the guest crashed while its memory changed (${panic})`);
      }
      options.report?.(`balloon at ${formatSize(actual)} of ${formatSize(target)}`);
      if (Date.now() > deadline) {
        throw new MachineError(
          `the guest's balloon stays at ${formatSize(actual)} and ${formatSize(target)} is wanted: ` +
            `load virtio_balloon in the guest, or free memory there`,
        );
      }
      options.signal?.throwIfAborted();
      await delay(100);
    }
  }

  async #lock(options: OperationOptions): Promise<Disposable> {
    await Deno.mkdir(this.files.folder, { recursive: true, mode: 0o700 });
    return await lockFile(this.files.lock, {
      ...(options.signal ? { signal: options.signal } : {}),
      onWait: () => options.report?.("waiting for another command to finish with this machine"),
    });
  }

  async #shutdown(timeout: number, options: OperationOptions): Promise<void> {
    const spec = await this.spec();
    if (spec && await this.isAlive()) {
      await this.mend(spec, undefined, options).catch((error) => {
        if (options.signal?.aborted) throw error;
        options.report?.(error instanceof Error ? error.message : String(error));
      });
    }
    const { state } = await this.status();
    if (state === "crashed") return await this.killNow();
    if (!(await this.isAlive())) return;
    options.report?.("shutting down");
    const deadline = Date.now() + timeout;
    try {
      if (state === "paused") await this.resume();
      if (spec?.hasAgent) {
        const limit = AbortSignal.timeout(Math.max(1, timeout));
        await this.guest.poweroff({
          signal: options.signal ? AbortSignal.any([limit, options.signal]) : limit,
        });
      } else await this.pressPower(options);
      while (Date.now() < deadline && await this.isAlive()) {
        options.signal?.throwIfAborted();
        await delay(50);
      }
    } catch (error) {
      if (options.signal?.aborted) throw error;
      options.report?.("the guest does not answer: powering off");
    }
    await this.killNow();
  }
}

/**
 * Looks how the machines of this host are.
 *
 * @param paths Folders of this host
 * @param attach Gives the machine of an identity
 * @param wanted Only these; all unless told
 * @returns The status of each that the engine has
 */
export async function listMachines(
  paths: Paths,
  attach: (id: string) => Machine,
  wanted?: ReadonlySet<string>,
): Promise<MachineStatus[]> {
  const ids = (await machineIds(paths)).filter((id) => wanted?.has(id) ?? true);
  const all = await Promise.all(ids.map((id) => attach(id).status()));
  return all.filter((status) => status.state !== "absent");
}

/**
 * Lists the identities of this host's machines, of whatever engine.
 *
 * @param paths Folders of this host
 * @returns The identities, sorted
 */
export async function machineIds(paths: Paths): Promise<string[]> {
  const ids: string[] = [];
  try {
    for await (const { name } of Deno.readDir(join(paths.data, "machines"))) ids.push(name);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  return ids.sort();
}

/**
 * Names the files that each machine has.
 *
 * @param folder The machine's folder
 * @returns Their paths
 */
export function machineFiles(folder: string): MachineFiles {
  return {
    folder,
    record: join(folder, "machine.json"),
    lock: join(folder, "lock"),
    console: join(folder, "console.sock"),
    consoleLog: join(folder, "console.log"),
    engineLog: join(folder, "engine.log"),
    initramfs: join(folder, "initramfs"),
  };
}

/**
 * Reads a file of JSON that we wrote.
 *
 * @param path Path of the file
 * @returns Its content; undefined where there is none that can be read
 */
export async function readJson<T>(path: string): Promise<T | undefined> {
  try {
    return JSON.parse(await Deno.readTextFile(path)) as T;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/**
 * Kills a process that may have ended.
 *
 * @param pid Its number
 */
export function killProcess(pid: number): void {
  try {
    Deno.kill(pid, "SIGKILL");
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/**
 * Waits.
 *
 * @param milliseconds How long
 */
export function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
