/**
 * The KVM engine: one detached supervisor per machine, driven through its API.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { dirname, join } from "node:path";
import { equal, isRunning } from "../../planner/mod.ts";
import type {
  Capabilities,
  Engine,
  MachineNeeds,
  MachineNic,
  MachineSpec,
  MachineStatus,
  OperationOptions,
} from "../engine.ts";
import { MachineError } from "../errors.ts";
import {
  DATA_CHANNELS,
  delay,
  FileMachine,
  killProcess,
  listMachines,
  type MachineFiles,
  machineFiles,
  machineIds,
  readJson,
} from "../file_machine.ts";
import { lockFile, removeIfThere, writeWhole } from "../files.ts";
import { guestEndpoints } from "../guest/channel.ts";
import { findPanic, tailOf } from "../machine_files.ts";
import { bridgeName, type BridgeSpec, canUseTap, hasNft, HostNetwork, tapName } from "../net/host_network.ts";
import { kvmKey, probeOncePerKey } from "../probe_cache.ts";
import { hostPaths, machineFolder, type Paths } from "../paths.ts";
import { requestMachine, SupervisorClient } from "../supervisor/client.ts";
import { configurationJson, type MachineConfiguration, type PortForward } from "../supervisor/config.ts";
import type { RunFile } from "../supervisor/supervisor.ts";
import { probeKvm } from "./probe.ts";

/** Most vCPUs of a machine. */
const MAX_VCPUS = 32;
const MEBIBYTE = 2 ** 20;
const PAGE = 4096;
/** How often the removal of a cgroup is tried, every 10 milliseconds: the process in it has to end before. */
const CGROUP_TRIES = 1000;
/** How long a supervisor may take until it answers, in milliseconds. */
const START_TIMEOUT = 120_000;
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

/** Paths of a machine's files. */
export interface KvmFiles extends MachineFiles {
  /** Tells who runs it, and how it ended. */
  readonly run: string;
  /** Socket of the supervisor's API. */
  readonly api: string;
  /** What the supervisor starts it from. */
  readonly configuration: string;
}

function kvmFiles(folder: string): KvmFiles {
  return {
    ...machineFiles(folder),
    run: join(folder, "run.json"),
    api: join(folder, "api.sock"),
    configuration: join(folder, "config.json"),
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
    return await listMachines(this.#paths, (id) => this.attach(id), wanted);
  }
}

/** A machine that a supervisor of ours runs. */
export class KvmMachine extends FileMachine<KvmFiles> {
  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param paths Folders of this host
   */
  constructor(id: string, paths: Paths) {
    super(id, "kvm", paths, kvmFiles(machineFolder(paths, id)));
  }

  /** Path of the socket of the supervisor's API. */
  get api(): string {
    return this.files.api;
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
      using client = this.#client();
      const status = await client.status({ signal: AbortSignal.timeout(3000) });
      if (status?.state === "Paused") return { ...known, pid, state: "paused" };
    } catch {
      // It is busy, or about to end: it runs for now.
    }
    return { ...known, pid, state: "running" };
  }

  /** Stops its vCPUs. */
  async pause(): Promise<void> {
    using client = this.#client();
    await this.ask("pause", () => client.pause());
  }

  /** Lets its vCPUs go on. */
  async resume(): Promise<void> {
    using client = this.#client();
    await this.ask("resume", () => client.resume());
  }

  /** Tells whether its supervisor runs. */
  protected async isAlive(): Promise<boolean> {
    const run = await readJson<RunFile>(this.files.run);
    return run?.process !== undefined && isRunning(run.process);
  }

  /** Tells whether a live change is enough: what is plugged takes a restart. */
  protected canPlug(current: MachineSpec, spec: MachineSpec): Promise<boolean> {
    const names = (each: MachineSpec) => [...each.disks, ...each.nics].map(({ name }) => name);
    return Promise.resolve(equal(names(current), names(spec)));
  }

  /** Ends what its network and its process were for. */
  protected override async release(spec: MachineSpec | undefined): Promise<void> {
    await this.#releaseNetworks(spec);
    if (spec && isShared(spec)) await this.#releaseShared(spec.stack);
  }

  /** The process for all machines of a stack ends with the last of them. */
  async #releaseShared(stack: string): Promise<void> {
    const shared = sharedFiles(this.paths, stack);
    using _lock = await lockFile(shared.lock);
    for (const id of await machineIds(this.paths)) {
      const spec = await new KvmMachine(id, this.paths).spec();
      if (spec?.stack === stack && isShared(spec)) return;
    }
    const run = await readJson<RunFile>(shared.run);
    if (run?.process && isRunning(run.process)) {
      killProcess(run.process.pid);
      while (isRunning(run.process)) await delay(10);
    }
    for (const path of Object.values(shared)) await removeIfThere(path);
  }

  #network(): HostNetwork {
    return new HostNetwork({ lock: join(this.paths.data, "network.lock") });
  }

  #client(): SupervisorClient {
    return new SupervisorClient(this.files.api);
  }

  /** Starts it in a supervisor. */
  protected async startNow(spec: MachineSpec, options: OperationOptions): Promise<void> {
    if (await this.isAlive()) return;
    const { files } = this;
    if (spec.kernel === undefined) {
      throw new MachineError(
        `Cannot start "${spec.address}" on KVM as it has no firmware to boot a disk by: give it a kernel, or choose qemu()`,
      );
    }
    options.report?.("starting its supervisor (kvm)");
    await this.prepare(spec, options, async () => {
      const configuration = configurationJson.print(machineConfiguration(spec, files));
      await writeWhole(files.configuration, JSON.stringify(configuration));
    });
    await this.#removeCgroup();
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
    const { api, configuration, run, engineLog } = this.files;
    const shared = sharedFiles(this.paths, spec.stack);
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
          this.paths.data,
          "--readable",
          this.paths.cache,
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
    using client = this.#client();
    await client.sendCtrlAltDel();
  }

  /** Kills its supervisor, or it within a shared one. */
  protected async killNow(): Promise<void> {
    const run = await readJson<RunFile>(this.files.run);
    if (!run?.process || !isRunning(run.process)) return await this.#removeCgroup();
    if (run.isShared) {
      using client = this.#client();
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
        if (!(error instanceof Deno.errors.Busy) || tries === CGROUP_TRIES) throw error;
        await delay(10);
      }
    }
  }

  /** A network that no machine uses any more leaves nothing on the host. */
  async #releaseNetworks(spec: MachineSpec | undefined): Promise<void> {
    if (!spec || spec.nics.length === 0) return;
    const network = this.#network();
    for (const name of new Set(spec.nics.map((nic) => bridgeOf(spec, nic).name))) {
      await network.releaseBridge(name);
    }
  }

  /** Grows disks, moves forwards and the balloon. */
  protected async updateNow(
    current: MachineSpec,
    spec: MachineSpec,
    options: OperationOptions,
  ): Promise<void> {
    using client = this.#client();
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
