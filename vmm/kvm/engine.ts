/**
 * The KVM engine: one detached supervisor per machine, driven through its API.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { dirname, join } from "node:path";
import { formatSize } from "../../dsl/mod.ts";
import { equal, isRunning } from "../../planner/mod.ts";
import type {
  Capabilities,
  Engine,
  Machine,
  MachineNeeds,
  MachineNic,
  MachineSpec,
  MachineStatus,
  OperationOptions,
  UpdateResult,
} from "../engine.ts";
import { MachineError, writeError } from "../errors.ts";
import { exists, lockFile, removeIfThere, writeWhole } from "../files.ts";
import { GuestChannel, guestEndpoints } from "../guest/channel.ts";
import { findPanic, joinFiles, needsRestart, RESTART_GRACE, tailOf } from "../machine_files.ts";
import { bridgeName, type BridgeSpec, canUseTap, hasNft, HostNetwork, tapName } from "../net/host_network.ts";
import { kvmKey, probeOncePerKey } from "../probe_cache.ts";
import { hostPaths, machineFolder, type Paths } from "../paths.ts";
import { requestMachine, SupervisorClient } from "../supervisor/client.ts";
import { configurationJson, type MachineConfiguration, type PortForward } from "../supervisor/config.ts";
import type { RunFile } from "../supervisor/supervisor.ts";
import { probeKvm } from "./probe.ts";

/** How many data channels the agent gets: so many `exec` and `cp` may run at once. */
const DATA_CHANNELS = 4;
/** Most vCPUs of a machine. */
const MAX_VCPUS = 32;
const MEBIBYTE = 2 ** 20;
const PAGE = 4096;
/** How long a supervisor may take until it answers, in milliseconds. */
const START_TIMEOUT = 120_000;
/** How long a guest may take to follow its balloon, in milliseconds. */
const BALLOON_TIMEOUT = 120_000;
/** Words for the kernel of every guest: consoles; and what it need not look for, since each look costs exits. */
const COMMAND_LINE = "console=hvc0 hypertopia.control=hvc1 8250.nr_uarts=0 pci=noearly";
/** Of this process's environment, what a supervisor needs: it outlives the command, and must not keep its secrets. */
const ENVIRONMENT: readonly string[] = [
  "PATH",
  "HOME",
  "LANG",
  "XDG_CACHE_HOME",
  "DENO_DIR",
  "DENO_TLS_CA_STORE",
  "DENO_CERT",
  "HYPERTOPIA_LIBC",
  "HYPERTOPIA_HOME",
];

interface MachineRecord {
  readonly version: 1;
  readonly engine: "kvm";
  readonly spec: MachineSpec;
}

/** Options of the engine as a machine has them. */
interface KvmMachineOptions {
  readonly sandbox?: boolean;
  readonly isolation?: "own" | "shared";
}

/** Paths of the process that runs the machines of a stack together. */
interface SharedFiles {
  readonly socket: string;
  readonly run: string;
  readonly lock: string;
  readonly log: string;
}

function sharedFiles(paths: Paths, stack: string): SharedFiles {
  const base = join(paths.data, "supervisors", createHash("sha256").update(stack).digest("hex").slice(0, 16));
  return { socket: `${base}.sock`, run: `${base}.json`, lock: `${base}.lock`, log: `${base}.log` };
}

/** Paths of a machine's files, all in its folder. */
interface KvmFiles {
  readonly folder: string;
  readonly record: string;
  readonly lock: string;
  readonly run: string;
  readonly api: string;
  readonly configuration: string;
  readonly console: string;
  readonly consoleLog: string;
  readonly engineLog: string;
  readonly initramfs: string;
}

function kvmFiles(folder: string): KvmFiles {
  return {
    folder,
    record: join(folder, "machine.json"),
    lock: join(folder, "lock"),
    run: join(folder, "run.json"),
    api: join(folder, "api.sock"),
    configuration: join(folder, "config.json"),
    console: join(folder, "console.sock"),
    consoleLog: join(folder, "console.log"),
    engineLog: join(folder, "supervisor.log"),
    initramfs: join(folder, "initramfs"),
  };
}

/** Runs machines on `/dev/kvm`. */
export class KvmEngine implements Engine {
  /** The engine's name. */
  readonly name = "kvm";
  readonly #paths: Paths;

  /**
   * Looks at nothing yet.
   *
   * @param paths Folders of this host
   */
  constructor(paths: Paths = hostPaths()) {
    this.#paths = paths;
  }

  /**
   * Finds out by running code whether KVM works here, and whether it can run what is asked for.
   *
   * @param options What the machine needs
   * @returns What was found
   */
  async probe(
    options: OperationOptions & { engine?: MachineSpec["engine"]; needs?: MachineNeeds } = {},
  ): Promise<Capabilities> {
    const device = await probeOncePerKey(join(this.#paths.cache, "kvm.json"), await kvmKey(), probeKvm);
    const network = device.isUsable ? canUseTap() : { isUsable: false, detail: "not looked at" };
    const findings = [
      { name: "device", isUsable: device.isUsable, detail: device.detail },
      { name: "network", isUsable: network.isUsable, detail: network.detail },
    ];
    const { needs } = options;
    const reason = !device.isUsable
      ? device.detail
      : needs?.hasNics && !network.isUsable
      ? `its NICs need taps: ${network.detail}`
      : needs?.hasNics && options.engine?.type === "auto" && !(await hasNft())
      ? "its NICs may need NAT, and nft is not installed (apt-get install nftables)"
      : needs?.hasFirmware
      ? "it has no firmware to boot a disk by: give the machine a kernel"
      : (needs?.cpus ?? 1) > MAX_VCPUS
      ? `it runs at most ${MAX_VCPUS} vCPUs`
      : undefined;
    return { engine: "kvm", isUsable: reason === undefined, detail: reason ?? device.detail, findings };
  }

  /**
   * Gives the machine of an identity.
   *
   * @param id Identity
   * @returns The machine, which may not exist yet
   */
  attach(id: string): KvmMachine {
    return new KvmMachine(id, this.#paths);
  }

  /**
   * Lists the machines of this host.
   *
   * @param wanted Only these; all unless told
   * @returns How each one is
   */
  async list(wanted?: ReadonlySet<string>): Promise<MachineStatus[]> {
    const ids: string[] = [];
    try {
      for await (const { name } of Deno.readDir(join(this.#paths.data, "machines"))) {
        if (wanted?.has(name) ?? true) ids.push(name);
      }
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
    const all = await Promise.all(ids.sort().map((id) => this.attach(id).status()));
    return all.filter((status) => status.state !== "absent");
  }
}

/** A machine that a supervisor of ours runs. */
export class KvmMachine implements Machine {
  /** Identity. */
  readonly id: string;
  /** The engine. */
  readonly engine = "kvm";
  /** The guest's agent. */
  readonly guest: GuestChannel;
  readonly #files: KvmFiles;
  readonly #paths: Paths;

  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param paths Folders of this host
   */
  constructor(id: string, paths: Paths) {
    this.id = id;
    this.#paths = paths;
    this.#files = kvmFiles(machineFolder(paths, id));
    this.guest = new GuestChannel(guestEndpoints(this.#files.folder, DATA_CHANNELS));
  }

  /** Path of the file that holds what the console printed since the last start. */
  get consoleLog(): string {
    return this.#files.consoleLog;
  }

  /** Path of the supervisor's log. */
  get engineLog(): string {
    return this.#files.engineLog;
  }

  /** Path of the socket of the supervisor's API. */
  get api(): string {
    return this.#files.api;
  }

  /**
   * Reads what it was started from last.
   *
   * @returns The spec, or undefined where it never was
   */
  async spec(): Promise<MachineSpec | undefined> {
    const record = await readJson<MachineRecord>(this.#files.record);
    return record?.version === 1 && record.engine === "kvm" ? record.spec : undefined;
  }

  /**
   * Looks how it is.
   *
   * @returns Its status
   */
  async status(): Promise<MachineStatus> {
    const spec = await this.spec();
    const known = { id: this.id, stack: spec?.stack ?? "", address: spec?.address ?? "" };
    if (!spec) return { ...known, state: "absent" };
    const run = await readJson<RunFile>(this.#files.run);
    if (!run?.process || !isRunning(run.process)) {
      const detail = run?.process
        ? "its supervisor ended abnormally: it crashed or was killed, or the host was restarted"
        : run?.end && run.end.reason !== "poweroff" && run.end.reason !== "stopped"
        ? run.end.detail
        : undefined;
      return { ...known, state: "stopped", ...(detail === undefined ? {} : { detail }) };
    }
    const { pid } = run.process;
    const panic = await findPanic(this.#files.consoleLog);
    if (panic !== undefined) return { ...known, pid, state: "crashed", detail: panic };
    try {
      using client = this.#client();
      const status = await client.status({ signal: AbortSignal.timeout(3000) });
      if (status?.state === "Paused") return { ...known, pid, state: "paused" };
    } catch {
      // It is busy, or about to end: it runs for now.
    }
    return { ...known, pid, state: "running" };
  }

  /**
   * Puts it on record without starting it.
   *
   * @param spec What it is made of
   */
  async define(spec: MachineSpec): Promise<void> {
    using _lock = await this.#lock({});
    await this.#record(spec);
  }

  /**
   * Starts it, if it does not run.
   *
   * @param spec What it is made of
   * @param options Signal and progress
   */
  async start(spec: MachineSpec, options: OperationOptions = {}): Promise<void> {
    using _lock = await this.#lock(options);
    await this.#start(spec, options);
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
    const current = await this.spec();
    const { state } = await this.status();
    if (!current || state === "stopped" || state === "absent" || state === "crashed") {
      if (state === "crashed") await this.#kill();
      await this.#start(spec, options);
      return { isRestarted: true };
    }
    const names = (each: MachineSpec) => [...each.disks, ...each.nics].map(({ name }) => name);
    if (needsRestart(current, spec) || !equal(names(current), names(spec))) {
      await this.#shutdown(options.shutdownTimeout ?? RESTART_GRACE, options);
      await this.#start(spec, options);
      return { isRestarted: true };
    }
    await this.#updateLive(current, spec, options);
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
  }

  /** Powers it off at once. */
  async kill(): Promise<void> {
    using _lock = await this.#lock({});
    await this.#kill();
  }

  /** Stops its vCPUs. */
  async pause(): Promise<void> {
    using client = this.#client();
    await this.#ask("pause", () => client.pause());
  }

  /** Lets its vCPUs go on. */
  async resume(): Promise<void> {
    using client = this.#client();
    await this.#ask("resume", () => client.resume());
  }

  /** Powers it off and removes everything that belongs to it. */
  async destroy(): Promise<void> {
    const spec = await this.spec();
    if (!spec && !(await exists(this.#files.run))) return;
    using _lock = await this.#lock({});
    await this.#kill();
    await removeIfThere(this.#files.folder);
    await this.#releaseNetworks(spec);
    if (spec && isShared(spec)) await this.#releaseShared(spec.stack);
  }

  /** The process for all machines of a stack ends with the last of them. */
  async #releaseShared(stack: string): Promise<void> {
    const shared = sharedFiles(this.#paths, stack);
    using _lock = await lockFile(shared.lock);
    for await (const { name } of Deno.readDir(join(this.#paths.data, "machines"))) {
      const spec = await new KvmMachine(name, this.#paths).spec();
      if (spec?.stack === stack && isShared(spec)) return;
    }
    const run = await readJson<RunFile>(shared.run);
    if (run?.process && isRunning(run.process)) {
      killProcess(run.process.pid);
      while (isRunning(run.process)) await delay(10);
    }
    for (const path of Object.values(shared)) await removeIfThere(path);
  }

  /**
   * Connects to the console.
   *
   * @returns The connection: bytes both ways
   */
  async console(): Promise<Deno.UnixConn> {
    return await this.#ask(
      "connect to the console of",
      () => Deno.connect({ transport: "unix", path: this.#files.console }),
    );
  }

  #network(): HostNetwork {
    return new HostNetwork({ lock: join(this.#paths.data, "network.lock") });
  }

  #client(): SupervisorClient {
    return new SupervisorClient(this.#files.api);
  }

  async #lock(options: OperationOptions): Promise<Disposable> {
    await Deno.mkdir(this.#files.folder, { recursive: true, mode: 0o700 });
    return await lockFile(this.#files.lock, {
      ...(options.signal ? { signal: options.signal } : {}),
      onWait: () => options.report?.("waiting for another command to finish with this machine"),
    });
  }

  async #ask<T>(action: string, run: () => Promise<T>): Promise<T> {
    try {
      return await run();
    } catch (cause) {
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

  async #process(): Promise<number | undefined> {
    const run = await readJson<RunFile>(this.#files.run);
    return run?.process && isRunning(run.process) ? run.process.pid : undefined;
  }

  async #record(spec: MachineSpec): Promise<void> {
    const record: MachineRecord = { version: 1, engine: "kvm", spec };
    await writeWhole(this.#files.record, JSON.stringify(record));
  }

  async #start(spec: MachineSpec, options: OperationOptions): Promise<void> {
    if (await this.#process() !== undefined) return;
    const files = this.#files;
    if (spec.kernel === undefined) {
      throw new MachineError(
        `Cannot start "${spec.address}" on KVM as it has no firmware to boot a disk by: give it a kernel, or choose qemu()`,
      );
    }
    if (new TextEncoder().encode(join(files.folder, "data.0.err.sock")).length > 107) {
      throw new MachineError(
        `Cannot start "${spec.address}" as the folder "${files.folder}" makes socket paths longer than 107 bytes: ` +
          `set HYPERTOPIA_HOME to a shorter path`,
      );
    }
    options.signal?.throwIfAborted();
    options.report?.("starting its supervisor (kvm)");
    try {
      await this.#record(spec);
      await joinFiles(spec.initramfs, files.initramfs);
      const configuration = configurationJson.print(machineConfiguration(spec, files));
      await writeWhole(files.configuration, JSON.stringify(configuration));
    } catch (error) {
      throw writeError(`start "${spec.address}"`, error);
    }
    for (const log of [files.consoleLog, files.engineLog]) {
      if (await exists(log)) await Deno.rename(log, `${log}.1`);
    }
    await removeIfThere(files.run);
    if (isShared(spec)) return await this.#startShared(spec, options);
    const child = spawnSupervisor(files.engineLog, spec, [
      ...["--id", this.id, "--api-sock", files.api, "--config-file", files.configuration],
      ...["--run-file", files.run, "--log-path", files.engineLog],
    ]);
    await this.#waitForStart(spec, child, options);
  }

  /** Starts it in the process that runs all machines of its stack, and that process where there is none. */
  async #startShared(spec: MachineSpec, options: OperationOptions): Promise<void> {
    const { api, configuration, run, engineLog } = this.#files;
    const shared = sharedFiles(this.#paths, spec.stack);
    const request = { api_sock: api, config_file: configuration, run_file: run, log_path: engineLog };
    const call = options.signal ? { signal: options.signal } : {};
    using _lock = await lockFile(shared.lock, call);
    const network = this.#network();
    for (const nic of spec.nics) await network.ensureBridge(bridgeOf(spec, nic));
    try {
      if (await requestMachine(shared.socket, this.id, request, call)) return;
      let isGone = false;
      void spawnSupervisor(shared.log, spec, [
        ...["--host-sock", shared.socket, "--run-file", shared.run, "--log-path", shared.log],
        ...[
          "--writable",
          this.#paths.data,
          "--readable",
          this.#paths.cache,
          "--readable",
          dirname(spec.kernel!),
        ],
      ]).status.then(() => isGone = true);
      const deadline = Date.now() + START_TIMEOUT;
      while (!(await requestMachine(shared.socket, this.id, request, call))) {
        if (isGone || Date.now() > deadline) {
          const words = (await tailOf(shared.log, 2000)).trim().split("\n").at(-1) ?? "";
          throw new MachineError(`its supervisor does not answer: ${words}`);
        }
        await delay(20);
      }
    } catch (error) {
      options.signal?.throwIfAborted();
      if (!(error instanceof MachineError)) throw error;
      throw startError(spec, error.message);
    }
  }

  async #waitForStart(spec: MachineSpec, child: Deno.ChildProcess, options: OperationOptions): Promise<void> {
    let isGone = false;
    void child.status.then(() => isGone = true);
    const deadline = Date.now() + START_TIMEOUT;
    using client = this.#client();
    while (true) {
      const status = await client.status({ signal: AbortSignal.timeout(3000) }).catch(() => undefined);
      if (status?.state === "Running" || status?.state === "Paused") return;
      if (isGone || Date.now() > deadline) {
        const { end } = await readJson<RunFile>(this.#files.run) ?? {};
        // A guest can be faster than we look.
        if (end && end.reason !== "failure") return;
        if (!isGone) await this.#kill();
        const words = (await tailOf(this.#files.engineLog, 2000)).trim().split("\n").at(-1) ?? "";
        const reason = end?.detail ??
          (isGone ? `its supervisor ended: ${words}` : "its supervisor does not answer");
        throw startError(spec, reason);
      }
      if (options.signal?.aborted) {
        await this.#kill();
        throw options.signal.reason;
      }
      await delay(20);
    }
  }

  async #shutdown(timeout: number, options: OperationOptions): Promise<void> {
    if (await this.#process() === undefined) return;
    const spec = await this.spec();
    const { state } = await this.status();
    if (state === "crashed") return await this.#kill();
    options.report?.("shutting down");
    const deadline = Date.now() + timeout;
    try {
      using client = this.#client();
      if (state === "paused") await client.resume();
      if (spec?.hasAgent) {
        const limit = AbortSignal.timeout(Math.max(1, timeout));
        await this.guest.poweroff({
          signal: options.signal ? AbortSignal.any([limit, options.signal]) : limit,
        });
      } else await client.sendCtrlAltDel();
      while (Date.now() < deadline && await this.#process() !== undefined) {
        options.signal?.throwIfAborted();
        await delay(50);
      }
    } catch (error) {
      if (options.signal?.aborted) throw error;
      options.report?.("the guest does not answer: powering off");
    }
    await this.#kill();
    await this.#releaseNetworks(spec);
  }

  async #kill(): Promise<void> {
    const run = await readJson<RunFile>(this.#files.run);
    if (!run?.process || !isRunning(run.process)) return;
    if (run.isShared) {
      using client = this.#client();
      await client.act("Kill");
      while (await this.#process() !== undefined) await delay(10);
      return;
    }
    killProcess(run.process.pid);
    while (await this.#process() !== undefined) await delay(10);
    await writeWhole(
      this.#files.run,
      JSON.stringify({ end: { reason: "stopped", detail: "it was powered off" } }),
    );
    await removeIfThere(this.#files.api);
  }

  /** A network that no machine uses any more leaves nothing on the host. */
  async #releaseNetworks(spec: MachineSpec | undefined): Promise<void> {
    if (!spec || spec.nics.length === 0) return;
    const network = this.#network();
    for (const name of new Set(spec.nics.map((nic) => bridgeOf(spec, nic).name))) {
      await network.releaseBridge(name);
    }
  }

  async #updateLive(current: MachineSpec, spec: MachineSpec, options: OperationOptions): Promise<void> {
    using client = this.#client();
    const call = options.signal ? { signal: options.signal } : {};
    for (const disk of spec.disks) {
      const before = current.disks.find((each) => each.name === disk.name);
      if (disk.readOnly || before?.size === disk.size) continue;
      options.report?.(`growing disk ${disk.name}`);
      await client.updateDrive(driveId(disk.name), { size: disk.size }, call);
    }
    if (!equal(current.nics, spec.nics)) await client.setForwards(forwardsOf(spec), call);
    if (spec.memory !== current.memory) await this.#balloon(client, current.maxMemory, spec.memory, options);
    // The maximum is fixed until the next start.
    await this.#record({ ...spec, maxMemory: current.maxMemory });
    await joinFiles(spec.initramfs, this.#files.initramfs);
  }

  async #balloon(
    client: SupervisorClient,
    maxMemory: number,
    memory: number,
    options: OperationOptions,
  ): Promise<void> {
    const target = (maxMemory - memory) / MEBIBYTE;
    await client.setBalloon(target);
    const deadline = Date.now() + BALLOON_TIMEOUT;
    while (true) {
      const actual = (await client.balloonStatistics()).actualPages * PAGE;
      if (actual === target * MEBIBYTE) return;
      const size = formatSize(maxMemory - actual);
      const panic = await findPanic(this.#files.consoleLog);
      if (panic !== undefined) {
        throw new MachineError(`the guest crashed while its memory changed (${panic})`);
      }
      options.report?.(`balloon at ${size} of ${formatSize(memory)}`);
      if (Date.now() > deadline) {
        throw new MachineError(
          `the guest's balloon stays at ${size} and ${formatSize(memory)} is wanted: ` +
            `load virtio_balloon in the guest, or free memory there`,
        );
      }
      options.signal?.throwIfAborted();
      await delay(100);
    }
  }
}

function isShared(spec: MachineSpec): boolean {
  return (spec.engine as KvmMachineOptions).isolation === "shared";
}

function startError(spec: MachineSpec, reason: string): MachineError {
  return new MachineError(
    /^Cannot /.test(reason)
      ? `Cannot start "${spec.address}": ${reason}`
      : `Cannot start "${spec.address}" as ${reason}`,
  );
}

function killProcess(pid: number): void {
  try {
    Deno.kill(pid, "SIGKILL");
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/** Starts a supervisor that outlives this process. */
function spawnSupervisor(log: string, spec: MachineSpec, args: readonly string[]): Deno.ChildProcess {
  const { sandbox = true } = spec.engine as KvmMachineOptions;
  const child = new Deno.Command("/bin/sh", {
    // What the process prints before it has a log, and where it dies of more than an error, goes to the log too.
    args: [
      ...["-c", 'exec "$@" >>"$0" 2>&1', log],
      ...[Deno.execPath(), "run", "-A", "--no-config", "--no-lock", supervisorProgram(), "--detach", ...args],
      ...(sandbox ? [] : ["--no-sandbox"]),
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

/** Ids of the API have letters, digits and `_` only, and names of disks a hyphen too. */
function driveId(name: string): string {
  return name.replaceAll("_", "__").replaceAll("-", "_d");
}

/** The same for NICs, whose names may have dots. */
function nicId(name: string): string {
  return driveId(name).replaceAll(".", "_p");
}

function bridgeOf(spec: MachineSpec, nic: MachineNic): BridgeSpec {
  return {
    name: bridgeName(`${spec.stack}\n${nic.network}`),
    cidr: nic.cidr,
    gateway: nic.gateway,
    dns: nic.dns,
    nat: nic.nat,
  };
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

function machineConfiguration(spec: MachineSpec, files: KvmFiles): MachineConfiguration {
  const endpoints = guestEndpoints(files.folder, DATA_CHANNELS);
  return {
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
      bootArgs: [COMMAND_LINE, spec.cmdline].filter((each) => each !== "").join(" "),
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
      hostDevName: tapName(spec.id, nic.name),
      guestMac: nic.mac,
      network: bridgeOf(spec, nic),
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
    },
  };
}

/** Where the supervisor's program is: beside this module, whatever form it was installed in. */
function supervisorProgram(): string {
  const url = new URL(`../supervisor/main.${import.meta.url.endsWith(".ts") ? "ts" : "js"}`, import.meta.url);
  return url.href;
}

async function readJson<T>(path: string): Promise<T | undefined> {
  try {
    return JSON.parse(await Deno.readTextFile(path)) as T;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
