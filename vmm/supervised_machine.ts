/**
 * Machines that a supervisor of ours runs, whatever executes their guests: a detached process for each, driven through its
 * API.
 *
 * @module
 */

import { join } from "node:path";
import { equal, isRunning } from "../planner/mod.ts";
import { moduleBeside, spawnDetached } from "./detached.ts";
import type { EngineName, MachineSpec, MachineStatus, OperationOptions } from "./engine.ts";
import { MachineError } from "./errors.ts";
import {
  DATA_CHANNELS,
  delay,
  FileMachine,
  killProcess,
  type MachineFiles,
  machineFiles,
  readJson,
} from "./file_machine.ts";
import { isBusy, removeIfThere, writeWhole } from "./files.ts";
import { guestEndpoints } from "./guest/channel.ts";
import { findPanic, tailOf } from "./machine_files.ts";
import { machineFolder, type Paths } from "./paths.ts";
import { consoleTail } from "./readiness.ts";
import { SupervisorClient } from "./supervisor/client.ts";
import {
  configurationJson,
  type HypertopiaConfiguration,
  type MachineConfiguration,
  type NetworkInterfaceConfiguration,
  type PortForward,
} from "./supervisor/config.ts";
import type { RunFile } from "./supervisor/supervisor.ts";

const MEBIBYTE = 2 ** 20;
const PAGE = 4096;
/** How often the removal of a cgroup is tried, every 10 milliseconds: the process in it has to end before. */
const CGROUP_TRIES = 1000;
/** How long a supervisor may take until it answers, in milliseconds. */
export const START_TIMEOUT = 120_000;
/** How long a machine may take to start that boots before it is said to run, in milliseconds. */
const BOOT_TIMEOUT = 360_000;
/** Words for the kernel of every guest: consoles; and what it need not look for, since each look takes time. */
export const COMMAND_LINE = "console=hvc0 hypertopia.control=hvc1 8250.nr_uarts=0";

/** Paths of a machine's files. */
export interface SupervisedFiles extends MachineFiles {
  /** Tells who runs it, and how it ended. */
  readonly run: string;
  /** Socket of the supervisor's API. */
  readonly api: string;
  /** What the supervisor starts it from. */
  readonly configuration: string;
}

/** A machine that a supervisor of ours runs. */
export abstract class SupervisedMachine extends FileMachine<SupervisedFiles> {
  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param engine Name of the engine
   * @param paths Folders of this host
   */
  constructor(id: string, engine: EngineName, paths: Paths) {
    const files = machineFiles(machineFolder(paths, id));
    super(id, engine, paths, {
      ...files,
      run: join(files.folder, "run.json"),
      api: join(files.folder, "api.sock"),
      configuration: join(files.folder, "config.json"),
    });
  }

  /** Path of the socket of the supervisor's API. */
  get api(): string {
    return this.files.api;
  }

  /** Makes what the supervisor starts it from, ready for JSON. */
  protected abstract configure(spec: MachineSpec): unknown;
  /** Starts what runs it, and waits until it runs. */
  protected abstract launch(spec: MachineSpec, options: OperationOptions): Promise<void>;

  /**
   * Looks how it is.
   *
   * @returns Its status
   */
  async status(): Promise<MachineStatus> {
    const spec = await this.spec();
    const known = { id: this.id, stack: spec?.stack ?? "", address: spec?.address ?? "" };
    if (!spec) return { ...known, state: "absent" };
    const run = await readJson<RunFile>(this.files.run);
    if (!run?.process || !isRunning(run.process)) {
      const detail = run?.process
        ? "its supervisor ended abnormally: it crashed or was killed, or the host was restarted"
        : run?.end && run.end.reason !== "poweroff" && run.end.reason !== "stopped"
        ? run.end.detail
        : undefined;
      return { ...known, state: "stopped", ...(detail === undefined ? {} : { detail }) };
    }
    const { pid } = run.process;
    const panic = await findPanic(this.files.consoleLog);
    if (panic !== undefined) return { ...known, pid, state: "crashed", detail: panic };
    try {
      using client = new SupervisorClient(this.files.api);
      const status = await client.status({ signal: AbortSignal.timeout(3000) });
      if (status?.state === "Paused") return { ...known, pid, state: "paused" };
    } catch {
      // It is busy, or about to end: it runs for now.
    }
    return { ...known, pid, state: "running" };
  }

  /** Stops its vCPUs. */
  async pause(): Promise<void> {
    using client = new SupervisorClient(this.files.api);
    await this.ask("pause", () => client.pause());
  }

  /** Lets its vCPUs go on. */
  async resume(): Promise<void> {
    using client = new SupervisorClient(this.files.api);
    await this.ask("resume", () => client.resume());
  }

  /** Tells whether its supervisor runs. */
  protected async isAlive(): Promise<boolean> {
    const run = await readJson<RunFile>(this.files.run);
    return run?.process !== undefined && isRunning(run.process);
  }

  /** Starts it in a supervisor. */
  protected async startNow(spec: MachineSpec, options: OperationOptions): Promise<void> {
    if (await this.isAlive()) return;
    const { files } = this;
    if (spec.kernel === undefined) {
      throw new MachineError(
        `Cannot start "${spec.address}" on the engine "${this.engine}" as it has no firmware to boot a disk by: ` +
          `give it a kernel, or choose qemu()`,
      );
    }
    options.report?.(`starting its supervisor (${this.engine})`);
    await this.prepare(spec, options, async () => {
      await writeWhole(files.configuration, JSON.stringify(this.configure(spec)));
    });
    await this.#removeCgroup();
    await removeIfThere(files.run);
    await this.launch(spec, options);
  }

  /** Starts a supervisor of its own, and waits until the machine runs. */
  protected async launchAlone(
    spec: MachineSpec,
    options: OperationOptions,
    flags: readonly string[] = [],
  ): Promise<void> {
    const { engineLog, api, configuration, run } = this.files;
    const child = spawnSupervisor(engineLog, spec, [
      ...["--engine", this.engine, "--id", this.id, "--api-sock", api, "--config-file", configuration],
      ...["--run-file", run, "--log-path", engineLog],
    ], flags);
    await this.#waitForStart(spec, child, options);
  }

  /** A command that was killed leaves a machine that is still about to start. */
  protected override async mend(
    current: MachineSpec,
    spec: MachineSpec | undefined,
    options: OperationOptions,
  ): Promise<void> {
    using client = new SupervisorClient(this.files.api);
    const status = await client.status({ signal: AbortSignal.timeout(3000) }).catch(() => undefined);
    if (status?.state !== "Not started") return;
    if (!spec) return await this.killNow();
    options.report?.("waiting until it has started");
    await this.#waitForStart(current, undefined, options);
  }

  async #waitForStart(
    spec: MachineSpec,
    child: Deno.ChildProcess | undefined,
    options: OperationOptions,
  ): Promise<void> {
    const started = Date.now();
    let isGone = false;
    void child?.status.then(() => isGone = true);
    let deadline = Date.now() + START_TIMEOUT;
    using client = new SupervisorClient(this.files.api);
    while (true) {
      const status = await client.status({ signal: AbortSignal.timeout(3000) }).catch(() => undefined);
      if (status?.state === "Running" || status?.state === "Paused") return;
      // It answers, and is at it.
      if (status && deadline < started + BOOT_TIMEOUT) deadline = started + BOOT_TIMEOUT;
      if (!child) isGone = !(await this.isAlive());
      const panic = status && await findPanic(this.files.consoleLog);
      if (panic !== undefined) {
        await this.killNow();
        throw startError(spec, `its guest crashed (${panic})${await consoleTail(this)}`);
      }
      if (isGone || Date.now() > deadline) {
        const { end } = await readJson<RunFile>(this.files.run) ?? {};
        // A guest can be faster than we look.
        if (end && end.reason !== "failure") return;
        if (!isGone) await this.killNow();
        const words = (await tailOf(this.files.engineLog, 2000)).trim().split("\n").at(-1) ?? "";
        const reason = end?.detail ??
          (isGone ? `its supervisor ended: ${words}` : "its supervisor does not answer");
        throw startError(spec, reason);
      }
      if (options.signal?.aborted) {
        await this.killNow();
        throw options.signal.reason;
      }
      await delay(20);
    }
  }

  /** Presses the keys that a guest without agent shuts down by. */
  protected async pressPower(): Promise<void> {
    using client = new SupervisorClient(this.files.api);
    await client.sendCtrlAltDel();
  }

  /** Kills its supervisor, or it within a shared one. */
  protected async killNow(): Promise<void> {
    const run = await readJson<RunFile>(this.files.run);
    if (!run?.process || !isRunning(run.process)) return await this.#removeCgroup();
    if (run.isShared) {
      using client = new SupervisorClient(this.files.api);
      await client.act("Kill");
      while (await this.isAlive()) await delay(10);
      return;
    }
    killProcess(run.process.pid);
    while (await this.isAlive()) await delay(10);
    await this.#removeCgroup();
    await writeWhole(
      this.files.run,
      JSON.stringify({ end: { reason: "stopped", detail: "it was powered off" } }),
    );
    await removeIfThere(this.files.api);
  }

  /** The process cannot remove the cgroup that it is in. */
  async #removeCgroup(): Promise<void> {
    const { cgroup } = await readJson<RunFile>(this.files.run) ?? {};
    if (cgroup === undefined) return;
    for (let tries = 0;; tries++) {
      try {
        return await Deno.remove(cgroup);
      } catch (error) {
        if (error instanceof Deno.errors.NotFound) return;
        if (!isBusy(error) || tries === CGROUP_TRIES) throw error;
        await delay(10);
      }
    }
  }

  /** Grows disks, moves forwards and the balloon. */
  protected async updateNow(
    current: MachineSpec,
    spec: MachineSpec,
    options: OperationOptions,
  ): Promise<void> {
    using client = new SupervisorClient(this.files.api);
    const call = options.signal ? { signal: options.signal } : {};
    for (const disk of spec.disks) {
      const before = current.disks.find((each) => each.name === disk.name);
      if (disk.readOnly || before?.size === disk.size) continue;
      options.report?.(`growing disk ${disk.name}`);
      await client.updateDrive(driveId(disk.name), { size: disk.size }, call);
    }
    if (!equal(current.nics, spec.nics)) await client.setForwards(forwardsOf(spec), call);
    if (spec.memory === current.memory) return;
    await client.setBalloon((current.maxMemory - spec.memory) / MEBIBYTE);
    const read = async () => current.maxMemory - (await client.balloonStatistics()).actualPages * PAGE;
    await this.waitForBalloon(read, spec.memory, options);
  }
}

/**
 * Says why a machine did not start.
 *
 * @param spec The machine
 * @param reason Why, or a whole message
 * @returns The error
 */
export function startError(spec: MachineSpec, reason: string): MachineError {
  return new MachineError(
    /^Cannot /.test(reason)
      ? `Cannot start "${spec.address}": ${reason}`
      : `Cannot start "${spec.address}" as ${reason}`,
  );
}

/**
 * Starts a supervisor that outlives this process.
 *
 * @param log Path of the file that takes what it prints
 * @param spec The machine, which says whether it is confined
 * @param args Its arguments
 * @param flags More flags for Deno
 * @returns The process
 */
export function spawnSupervisor(
  log: string,
  spec: MachineSpec,
  args: readonly string[],
  flags: readonly string[] = [],
): Deno.ChildProcess {
  const { sandbox = true } = spec.engine as { readonly sandbox?: boolean };
  return spawnDetached(moduleBeside("./supervisor/main", import.meta.url), log, [
    ...args,
    ...(sandbox ? [] : ["--no-sandbox"]),
  ], flags);
}

/** Ids of the API have letters, digits and `_` only, and names of disks a hyphen too. */
function driveId(name: string): string {
  return name.replaceAll("_", "__").replaceAll("-", "_d");
}

/** The same for NICs, whose names may have dots. */
function nicId(name: string): string {
  return driveId(name).replaceAll(".", "_p");
}

function forwardsOf(spec: MachineSpec): PortForward[] {
  return spec.nics.flatMap((nic) =>
    nic.forwards.map(({ protocol, address, host, guest }) => ({
      protocol,
      address,
      host,
      guest,
      guestIp: nic.ip,
    }))
  );
}

/**
 * Makes what a supervisor starts a machine from, ready for JSON.
 *
 * @param spec The machine
 * @param files Its files
 * @param parts What its engine says: NICs, more words for the kernel, and more of what Firecracker has no words for
 * @returns The configuration
 */
export function machineConfiguration(
  spec: MachineSpec,
  files: SupervisedFiles,
  parts: {
    readonly nic: (nic: MachineSpec["nics"][number]) => Partial<NetworkInterfaceConfiguration>;
    readonly words?: string;
    readonly hypertopia?: Partial<HypertopiaConfiguration>;
  },
): unknown {
  const endpoints = guestEndpoints(files.folder, DATA_CHANNELS);
  const configuration: MachineConfiguration = {
    machine: {
      vcpuCount: spec.cpus,
      memSizeMib: spec.memory / MEBIBYTE,
      maxMemSizeMib: spec.maxMemory / MEBIBYTE,
      smt: false,
      trackDirtyPages: false,
      hugePages: "None",
    },
    bootSource: {
      kernelImagePath: spec.kernel!,
      ...(spec.initramfs.length > 0 ? { initrdPath: files.initramfs } : {}),
      bootArgs: [COMMAND_LINE, parts.words ?? "", spec.cmdline].filter((each) => each !== "").join(" "),
    },
    drives: spec.disks.map((disk) => ({
      id: driveId(disk.name),
      isRootDevice: false,
      cacheType: "Writeback",
      isReadOnly: disk.readOnly,
      pathOnHost: disk.path,
      ioEngine: "Sync",
      format: disk.format,
      serial: disk.serial,
      size: disk.size,
    })),
    networkInterfaces: spec.nics.map((nic) => ({
      id: nicId(nic.name),
      hostDevName: nicId(nic.name).slice(0, 15),
      guestMac: nic.mac,
      ...parts.nic(nic),
    })),
    entropy: {},
    balloon: {
      amountMib: (spec.maxMemory - spec.memory) / MEBIBYTE,
      deflateOnOom: false,
      statsPollingInterval: 1,
      freePageReporting: true,
    },
    hypertopia: {
      name: `${spec.stack}/${spec.address}`,
      console: { socket: files.console, log: files.consoleLog },
      ...(spec.hasAgent ? { channels: endpoints } : {}),
      forwards: forwardsOf(spec),
      restartOnReset: true,
      ...parts.hypertopia,
    },
  };
  return configurationJson.print(configuration);
}
