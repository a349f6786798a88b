/**
 * What a supervisor's API drives: one machine, from its configuration to its end.
 *
 * @module
 */

import { BalloonDevice } from "../devices/balloon.ts";
import { BlockDevice } from "../devices/block.ts";
import type { BlockFile } from "../devices/block_file.ts";
import { ConsoleLog } from "../devices/console_log.ts";
import { ConsoleDevice, type ConsolePortOptions } from "../devices/console.ts";
import type { GuestMemory } from "../devices/guest_memory.ts";
import { RateLimiter } from "../devices/rate_limiter.ts";
import { EntropyDevice } from "../devices/rng.ts";
import type { StreamSockets } from "../devices/stream_sockets.ts";
import type { VirtioDevice } from "../devices/virtio_device.ts";
import { MachineError } from "../errors.ts";
import type { EndReason, MachineParts, MachineVmm, VmmDevice } from "../machine_host.ts";
import type { Controller } from "./api.ts";
import {
  type BalloonStatistics,
  type BootableConfiguration,
  bootMemoryMib,
  type DriveUpdate,
  type InstanceState,
  kernelCommandLine,
  type MachineEnd,
  type NicUpdate,
  type PortForward,
  type RunReport,
} from "./config.ts";
import type { Log } from "./log.ts";

const MEBIBYTE = 2 ** 20;
const PAGE = 4096;
/** Longest serial number of a disk. */
const MAX_SERIAL = 20;

/** A NIC's device, whatever it leads to. */
export interface NicDevice extends VirtioDevice {
  /** What it has done. */
  readonly counters: unknown;
  /**
   * Sets other limits.
   *
   * @param limiters Those that change
   */
  updateLimiters(limiters: { readonly receive?: RateLimiter; readonly transmit?: RateLimiter }): void;
}

/** The NICs of a machine, and what leads to them. */
export interface MachineNics {
  /** Their devices, by id; the controller disposes them. */
  readonly devices: ReadonlyMap<string, NicDevice>;
  /** More files that are opened while the machine runs. */
  readonly files: readonly string[];
  /**
   * Makes these the port forwards.
   *
   * @param forwards All of them
   */
  setForwards(forwards: readonly PortForward[]): Promise<void>;
}

/** How to open the file of a disk. */
export interface DriveOptions {
  /** Memory of the guest. */
  readonly memory: GuestMemory;
  /** How the disk is kept in the file. */
  readonly format: "raw" | "qcow2";
  /** Whether not to write. */
  readonly isReadOnly: boolean;
  /** Whether to go past the page cache. */
  readonly isDirect: boolean;
}

/** What executes the code of guests, and connects them. */
export interface Platform<Vmm extends MachineVmm> {
  /**
   * Begins without sockets.
   *
   * @returns Makes the sockets of a machine's console
   */
  openSockets(): StreamSockets;
  /**
   * Opens the file of a disk.
   *
   * @param path Path of the file
   * @param options How
   * @returns The file
   * @throws {Error} If it cannot be opened, or others use it in a way that does not go together with this
   */
  openDrive(path: string, options: DriveOptions): BlockFile | Promise<BlockFile>;
  /**
   * Makes the device of a vsock.
   *
   * @param guestCid Address of the guest
   * @param path Path of the socket that leads to it
   * @param resources Disposes what it needs
   * @returns The device
   */
  openVsock(
    guestCid: number,
    path: string,
    resources: DisposableStack,
  ): VirtioDevice | Promise<VirtioDevice>;
  /**
   * Makes memory for a guest.
   *
   * @param length Size in bytes
   * @param resources Disposes it
   * @returns The memory
   */
  createMemory(length: number, resources: DisposableStack): Promise<GuestMemory>;
  /**
   * Makes the devices of NICs.
   *
   * @param configuration The machine
   * @param resources Disposes what they lead to
   * @returns The NICs
   */
  openNics(configuration: BootableConfiguration, resources: DisposableStack): Promise<MachineNics>;
  /**
   * Builds a machine.
   *
   * @param parts What it is made of
   * @param isConfined Whether the process is in its sandbox
   * @param resources Disposes what it needs
   * @returns The machine, stopped
   */
  build(parts: MachineParts, isConfined: boolean, resources: DisposableStack): Vmm | Promise<Vmm>;
}

/** What a controller is made of. */
export interface ControllerOptions<Vmm extends MachineVmm = MachineVmm> {
  /** Identity of the machine. */
  readonly id: string;
  /** What executes it. */
  readonly platform: Platform<Vmm>;
  /** Takes what happens. */
  readonly log: Pick<Log, "configure" | "error" | "warn">;
  /**
   * Called once everything is open and before the guest runs: the time to give up what is not needed any more.
   *
   * @param files Files that are opened again when the guest restarts, and folders of sockets
   * @param memory Most memory of the guest, in bytes
   * @returns Whether the process is in its sandbox then
   */
  readonly enterSandbox: (files: SandboxFiles, memory: number) => boolean | Promise<boolean>;
  /** Called once when the machine has ended. */
  readonly onEnd: (end: MachineEnd) => void;
}

/** What a machine opens while it runs. */
export interface SandboxFiles {
  /** Files to read. */
  readonly readOnly: readonly string[];
  /** Files and folders to read and write. */
  readonly readWrite: readonly string[];
}

interface Drive {
  readonly device: BlockDevice;
  readonly path: string;
}

/** Everything that a started machine owns. */
interface Run<Vmm extends MachineVmm> {
  readonly configuration: BootableConfiguration;
  readonly vmm: Vmm;
  readonly drives: ReadonlyMap<string, Drive>;
  readonly nics: MachineNics;
  readonly balloon: BalloonDevice | undefined;
  readonly started: number;
  readonly resources: DisposableStack;
}

/** Runs one machine. */
export class MachineController<Vmm extends MachineVmm = MachineVmm> implements Controller {
  /** Identity of the machine. */
  readonly id: string;
  readonly #options: ControllerOptions<Vmm>;
  #run: Run<Vmm> | undefined;
  #state: InstanceState = "Not started";
  #end: MachineEnd | undefined;
  #uptime = 0;
  #exits: RunReport["exits"] = {};

  /**
   * Starts nothing yet.
   *
   * @param options What it is made of
   */
  constructor(options: ControllerOptions<Vmm>) {
    this.id = options.id;
    this.#options = options;
  }

  /** The machine, while it runs. */
  get vmm(): Vmm | undefined {
    return this.#run?.vmm;
  }

  /** How it is, in Firecracker's words. */
  get state(): InstanceState {
    return this.#state;
  }

  /**
   * Tells how its run goes.
   *
   * @returns Uptime in milliseconds, exits by kind, and how it ended
   */
  report(): RunReport {
    const run = this.#run;
    return {
      uptime: run ? performance.now() - run.started : this.#uptime,
      exits: run?.vmm.exits ?? this.#exits,
      ...(this.#end ? { end: this.#end } : {}),
    };
  }

  /**
   * Builds the machine and runs it.
   *
   * @param configuration What it is made of
   */
  async start(configuration: BootableConfiguration): Promise<void> {
    const resources = new DisposableStack();
    try {
      if (configuration.logger) this.#options.log.configure(configuration.logger);
      const { platform } = this.#options;
      const length = bootMemoryMib(configuration.machine) * MEBIBYTE;
      const memory = await platform.createMemory(length, resources);
      const drives = await this.#openDrives(configuration, memory, resources);
      const nics = await platform.openNics(configuration, resources);
      this.#run = await this.#build(configuration, { memory, drives, nics }, resources);
    } catch (error) {
      resources[Symbol.dispose]();
      throw error;
    }
    this.#run.vmm.resume();
    this.#state = "Running";
  }

  /** Stops the vCPUs. */
  async pause(): Promise<void> {
    await this.#running.vmm.pause();
    this.#state = "Paused";
  }

  /** Lets the vCPUs go on. */
  resume(): Promise<void> {
    this.#running.vmm.resume();
    this.#state = "Running";
    return Promise.resolve();
  }

  /** Presses the power button. */
  sendCtrlAltDel(): Promise<void> {
    this.#running.vmm.pressPowerButton();
    return Promise.resolve();
  }

  /** Powers off at once. */
  async stop(): Promise<void> {
    for (const { device } of this.#run?.drives.values() ?? []) await device.close();
    await this.kill();
  }

  /** Ends everything at once. */
  kill(): Promise<void> {
    if (this.#run) this.#run.vmm.kill();
    else this.#finish({ reason: "stopped", detail: "it was stopped before it ran" });
    return Promise.resolve();
  }

  /** Restarts the guest at once. */
  reboot(): Promise<void> {
    this.#running.vmm.restart();
    return Promise.resolve();
  }

  /**
   * Changes the balloon.
   *
   * @param target Memory that it is to hold, in bytes
   */
  setBalloon(target: number): Promise<void> {
    this.#balloon.target = target;
    return Promise.resolve();
  }

  /**
   * Tells what is known of the balloon.
   *
   * @returns Its size, and the guest's figures
   */
  balloonStatistics(): Promise<BalloonStatistics> {
    const balloon = this.#balloon;
    return Promise.resolve({
      targetPages: balloon.target / PAGE,
      actualPages: balloon.actual / PAGE,
      ...balloon.latestStatistics,
    });
  }

  /**
   * Changes how often the guest's statistics are asked for.
   *
   * @param seconds How often
   */
  setStatisticsInterval(seconds: number): Promise<void> {
    this.#balloon.statisticsInterval = seconds;
    return Promise.resolve();
  }

  /**
   * Changes a disk.
   *
   * @param id Its name
   * @param update What changes; the same path again makes the guest see that the file has grown
   */
  async updateDrive(id: string, update: DriveUpdate): Promise<void> {
    const drive = this.#running.drives.get(id);
    if (!drive) throw new MachineError(`Cannot change drive "${id}" as the machine has none of that name`);
    if (update.rateLimiter) drive.device.updateRateLimiter(new RateLimiter(update.rateLimiter));
    if (update.size !== undefined) await drive.device.grow(Math.max(update.size, drive.device.size));
    if (update.pathOnHost === undefined) return;
    if (update.pathOnHost !== drive.path) {
      throw new MachineError(
        `Cannot put "${update.pathOnHost}" into drive "${id}" as it is not open to this process: start the machine anew`,
      );
    }
    await drive.device.grow();
  }

  /**
   * Changes a NIC.
   *
   * @param id Its name
   * @param update What changes
   */
  updateNic(id: string, update: NicUpdate): Promise<void> {
    const nic = this.#running.nics.devices.get(id);
    if (!nic) throw new MachineError(`Cannot change NIC "${id}" as the machine has none of that name`);
    nic.updateLimiters({
      ...(update.rxRateLimiter ? { receive: new RateLimiter(update.rxRateLimiter) } : {}),
      ...(update.txRateLimiter ? { transmit: new RateLimiter(update.txRateLimiter) } : {}),
    });
    return Promise.resolve();
  }

  /**
   * Makes these the port forwards.
   *
   * @param forwards All of them
   */
  async setForwards(forwards: readonly PortForward[]): Promise<void> {
    await this.#running.nics.setForwards(forwards);
  }

  /** Writes the metrics where the configuration says. */
  async flushMetrics(): Promise<void> {
    const metrics = this.#run?.configuration.metrics;
    if (!metrics) return;
    const line = {
      ...(metrics.emitId ? { id: this.id } : {}),
      ...metrics.properties,
      utc_timestamp_ms: Date.now(),
      ...this.metrics(),
    };
    await Deno.writeTextFile(metrics.path, `${JSON.stringify(line)}\n`, { append: true });
  }

  /**
   * Tells all counts.
   *
   * @returns Exits by kind, and what each device did
   */
  metrics(): Readonly<Record<string, unknown>> {
    const run = this.#run;
    return {
      exits: this.report().exits,
      drives: Object.fromEntries([...run?.drives ?? []].map(([id, { device }]) => [id, device.statistics])),
      network_interfaces: Object.fromEntries(
        [...run?.nics.devices ?? []].map(([id, device]) => [id, device.counters]),
      ),
    };
  }

  get #running(): Run<Vmm> {
    if (this.#run) return this.#run;
    throw new MachineError("Cannot do this as the machine does not run: start it first");
  }

  get #balloon(): BalloonDevice {
    const { balloon } = this.#running;
    if (balloon) return balloon;
    throw new MachineError("Cannot use the balloon as the machine has none: configure one before it starts");
  }

  async #build(
    configuration: BootableConfiguration,
    parts: Pick<Run<Vmm>, "drives" | "nics"> & { readonly memory: GuestMemory },
    resources: DisposableStack,
  ): Promise<Run<Vmm>> {
    const { platform, log } = this.#options;
    const { machine, bootSource, hypertopia } = configuration;
    const { memory, drives, nics } = parts;
    const devices: VmmDevice[] = [];
    const add = <T extends VmmDevice["device"]>(name: string, device: T, vectors?: number): T => {
      resources.use(device);
      devices.push({ name, device, ...(vectors === undefined ? {} : { vectors }) });
      return device;
    };
    for (const [id, { device }] of drives) devices.push({ name: `drive ${id}`, device });
    for (const [id, device] of nics.devices) add(`NIC ${id}`, device);
    const output = this.#openConsole(configuration, resources);
    if (hypertopia.console || hypertopia.channels) {
      const { channels } = hypertopia;
      const sockets = resources.use(platform.openSockets());
      const listen = async (path: string) => ({ listener: await sockets.listen(path) });
      const ports: ConsolePortOptions[] = [{
        isConsole: true,
        ...(hypertopia.console ? await listen(hypertopia.console.socket) : {}),
        onOutput: output,
      }];
      if (channels) {
        ports.push({ isConsole: true, ...await listen(channels.control) });
        for (const [index, path] of channels.data.entries()) {
          const name = `hypertopia.${index}`;
          ports.push({ name, isConsole: false, ...await listen(path) });
          ports.push({ name: `${name}.err`, isConsole: false, ...await listen(channels.errors[index]!) });
        }
      }
      // One vector for all queues: each more costs the guest exits at boot, and this is no device for speed.
      add("console", new ConsoleDevice({ ports }), 2);
    }
    if (configuration.entropy) {
      const { rateLimiter } = configuration.entropy;
      add("entropy", new EntropyDevice(rateLimiter ? { rateLimiter: new RateLimiter(rateLimiter) } : {}), 2);
    }
    const balloon = configuration.balloon &&
      add(
        "balloon",
        new BalloonDevice({
          target: configuration.balloon.amountMib * MEBIBYTE,
          deflateOnOom: configuration.balloon.deflateOnOom,
          freePageReporting: configuration.balloon.freePageReporting,
          statisticsInterval: configuration.balloon.statsPollingInterval,
        }),
        2,
      );
    if (configuration.vsock) {
      const { guestCid, udsPath: path } = configuration.vsock;
      add("vsock", await platform.openVsock(guestCid, path, resources));
    }
    const initramfs = bootSource.initrdPath === undefined ? [] : [bootSource.initrdPath];
    const { warmStart } = hypertopia;
    const isConfined = await this.#options.enterSandbox({
      readOnly: [
        bootSource.kernelImagePath,
        ...initramfs,
        ...nics.files,
        // A saved state is being read already.
        ...(warmStart ? [warmStart.initramfs, warmStart.config] : []),
      ],
      readWrite: configuration.drives.map(({ pathOnHost }) => pathOnHost),
    }, bootMemoryMib(configuration.machine) * MEBIBYTE);
    const vmm = resources.use(
      await platform.build(
        {
          cpus: machine.vcpuCount,
          memory,
          kernel: bootSource.kernelImagePath,
          initramfs,
          commandLine: kernelCommandLine(configuration),
          devices,
          ...(hypertopia.console ? {} : { onSerial: (byte) => output(new Uint8Array([byte])) }),
          onReset: hypertopia.restartOnReset ? "restart" : "end",
          onEnd: (reason) => this.#ended(reason),
          onFault: (message) => log.warn(message),
        },
        isConfined,
        resources,
      ),
    );
    return { configuration, vmm, drives, nics, balloon, started: performance.now(), resources };
  }

  async #openDrives(
    configuration: BootableConfiguration,
    memory: GuestMemory,
    resources: DisposableStack,
  ): Promise<Map<string, Drive>> {
    const drives = new Map<string, Drive>();
    for (const { id, pathOnHost: path, format, isReadOnly, ...drive } of configuration.drives) {
      const device = resources.use(
        new BlockDevice({
          file: await this.#openDrive(path, {
            memory,
            format,
            isReadOnly,
            isDirect: drive.isDirect ?? false,
          }),
          serial: drive.serial ?? id.slice(0, MAX_SERIAL),
          cache: drive.cacheType === "Unsafe" ? "unsafe" : "writeback",
          onError: (reason) => this.#options.log.warn(`drive ${id}: ${reason}`),
          ...(drive.rateLimiter ? { rateLimiter: new RateLimiter(drive.rateLimiter) } : {}),
        }),
      );
      if (!isReadOnly && drive.size !== undefined && drive.size > device.size) await device.grow(drive.size);
      drives.set(id, { device, path });
    }
    return drives;
  }

  /** What is wrong with a file is for whoever configured it to know. */
  async #openDrive(path: string, options: DriveOptions): Promise<BlockFile> {
    try {
      return await this.#options.platform.openDrive(path, options);
    } catch (cause) {
      throw new MachineError(cause instanceof Error ? cause.message : String(cause), { cause });
    }
  }

  /** Where the guest's console goes: its log, the file that the configuration names, or standard output. */
  #openConsole(
    configuration: BootableConfiguration,
    resources: DisposableStack,
  ): (bytes: Uint8Array<ArrayBuffer>) => void {
    const path = configuration.hypertopia.console?.log ?? configuration.serial?.outPath;
    if (path === undefined) return (bytes) => void Deno.stdout.writeSync(bytes);
    const log = resources.use(new ConsoleLog(path, (message) => this.#options.log.warn(message)));
    return (bytes) => log.write(bytes);
  }

  #ended(reason: EndReason): void {
    switch (reason.kind) {
      case "off":
        return this.#finish({ reason: "poweroff", detail: "the guest powered off" });
      case "reset":
        return this.#finish({ reason: "reset", detail: "the guest asked for a restart" });
      case "killed":
        return this.#finish({ reason: "stopped", detail: "it was powered off" });
      case "crashed":
        return this.#finish({ reason: "crash", detail: reason.detail });
    }
  }

  #finish(end: MachineEnd): void {
    if (this.#end) return;
    this.#end = end;
    const run = this.#run;
    if (!run) return this.#options.onEnd(end);
    this.#uptime = performance.now() - run.started;
    this.#exits = run.vmm.exits;
    this.#run = undefined;
    // What the guest wrote is on its disks before anybody hears that it has ended.
    void Promise.allSettled([...run.drives.values()].map(({ device }) => device.close())).then((results) => {
      for (const result of results) if (result.status === "rejected") this.#options.log.error(result.reason);
      try {
        run.resources[Symbol.dispose]();
      } catch (error) {
        this.#options.log.error(error);
      }
      this.#options.onEnd(end);
    });
  }
}
