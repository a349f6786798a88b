/**
 * The QEMU engine: one detached QEMU per machine, driven through its monitor.
 *
 * @module
 */

import { join } from "node:path";
import { equal, identifyProcess } from "../../planner/mod.ts";
import { formatSize } from "../../dsl/mod.ts";
import type {
  Capabilities,
  Engine,
  Machine,
  MachineDisk,
  MachineForward,
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
import { kvmKey, probeOncePerKey } from "../probe_cache.ts";
import { hostPaths, machineFolder, type Paths } from "../paths.ts";
import {
  type AcceleratorName,
  type AcceleratorReport,
  probeAccelerators,
  QemuMissingError,
} from "./accelerator.ts";
import {
  blockNode,
  DATA_CHANNELS,
  diskDevice,
  forwardRule,
  type MachineFiles,
  machineFiles,
  networkBackend,
  nicDevice,
  qemuArguments,
} from "./arguments.ts";
import { Qmp } from "./qmp.ts";

const DEFAULT_BINARY = "qemu-system-x86_64";
/** What is known of a machine whose QEMU left its pid file behind. */
const ABNORMAL_END = "QEMU ended abnormally: it crashed or was killed, or the host was restarted";
/** How long a guest may take to follow its balloon, in milliseconds. */
const BALLOON_TIMEOUT = 120_000;
/** How long a guest may take to let go of a device, in milliseconds. */
const UNPLUG_TIMEOUT = 60_000;

interface MachineRecord {
  readonly version: 1;
  readonly engine: "qemu";
  readonly spec: MachineSpec;
}

/** Runs machines in QEMU. */
export class QemuEngine implements Engine {
  /** The engine's name. */
  readonly name = "qemu";
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
   * Finds out which accelerators work, by running code in each.
   *
   * @param options Signal, and the binary and accelerator of a machine
   * @returns What was found
   */
  async probe(options: OperationOptions & { engine?: MachineSpec["engine"] } = {}): Promise<Capabilities> {
    const { binary = DEFAULT_BINARY, accelerator } = (options.engine ?? {}) as {
      binary?: string;
      accelerator?: string;
    };
    try {
      const all = await probeOnce(this.#paths, binary, options.signal);
      const reports = all.filter((each) => accelerator === undefined || each.name === accelerator);
      const best = reports.find((each) => each.usable);
      return {
        engine: "qemu",
        isUsable: best !== undefined,
        detail: best
          ? `accelerator ${best.name}: ${best.detail}`
          : reports.map(({ name, detail }) => `accelerator ${name} is not usable: ${detail}`).join("; "),
        findings: reports.map(({ name, usable, detail }) => ({ name, isUsable: usable, detail })),
      };
    } catch (error) {
      if (!(error instanceof QemuMissingError)) throw error;
      return { engine: "qemu", isUsable: false, detail: error.message, findings: [] };
    }
  }

  /**
   * Gives the machine of an identity.
   *
   * @param id Identity
   * @returns The machine, which may not exist yet
   */
  attach(id: string): QemuMachine {
    return new QemuMachine(id, this.#paths);
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

/** Probes once per boot and QEMU binary: a probe takes half a second and its result does not change. */
async function probeOnce(paths: Paths, binary: string, signal?: AbortSignal): Promise<AcceleratorReport[]> {
  const program = await which(binary);
  if (program === undefined) throw new QemuMissingError(binary);
  const { mtime, size } = await Deno.stat(program);
  const key = [await kvmKey(), program, mtime?.getTime(), size].join(" ");
  return await probeOncePerKey(
    join(paths.cache, "accelerators.json"),
    key,
    () => probeAccelerators({ binary: program, ...(signal ? { signal } : {}) }),
  );
}

async function which(binary: string): Promise<string | undefined> {
  const candidates = binary.includes("/")
    ? [binary]
    : (Deno.env.get("PATH") ?? "").split(":").filter((each) => each !== "").map((folder) =>
      join(folder, binary)
    );
  for (const path of candidates) {
    const info = await Deno.stat(path).catch(() => undefined);
    if (info?.isFile && ((info.mode ?? 0o111) & 0o111) !== 0) return path;
  }
  return undefined;
}

/** A machine that QEMU runs. */
export class QemuMachine implements Machine {
  /** Identity. */
  readonly id: string;
  /** The engine. */
  readonly engine = "qemu";
  /** The guest's agent. */
  readonly guest: GuestChannel;
  readonly #files: MachineFiles;
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
    this.#files = machineFiles(machineFolder(paths, id));
    this.guest = new GuestChannel(guestEndpoints(this.#files.folder, DATA_CHANNELS));
  }

  /** Path of the file that holds what the console printed since the last start. */
  get consoleLog(): string {
    return this.#files.consoleLog;
  }

  /** Path of the file that holds what QEMU printed. */
  get engineLog(): string {
    return this.#files.engineLog;
  }

  /**
   * Reads what it was started from last.
   *
   * @returns The spec, or undefined where it never was
   */
  async spec(): Promise<MachineSpec | undefined> {
    try {
      const record = JSON.parse(await Deno.readTextFile(this.#files.record)) as MachineRecord;
      return record.version === 1 && record.engine === "qemu" ? record.spec : undefined;
    } catch (error) {
      if (error instanceof Deno.errors.NotFound || error instanceof SyntaxError) return undefined;
      throw error;
    }
  }

  /**
   * Looks how it is.
   *
   * @returns Its status
   */
  async status(): Promise<MachineStatus> {
    const spec = await this.spec();
    const known = { id: this.id, stack: spec?.stack ?? "", address: spec?.address ?? "" };
    const pid = await this.#pid();
    if (pid === undefined) {
      // QEMU removes its pid file when it ends in order.
      const isAbnormal = spec !== undefined && await exists(this.#files.pid);
      return {
        ...known,
        state: spec ? "stopped" : "absent",
        ...(isAbnormal ? { detail: ABNORMAL_END } : {}),
      };
    }
    const panic = await this.#panic();
    if (panic !== undefined) return { ...known, pid, state: "crashed", detail: panic };
    try {
      await using qmp = await Qmp.connect(this.#files.monitor, { timeout: 3000 });
      const { status } = await qmp.execute("query-status") as { status: string };
      if (status === "paused" || status === "suspended") return { ...known, pid, state: "paused" };
      if (["internal-error", "io-error", "guest-panicked", "watchdog"].includes(status)) {
        return { ...known, pid, state: "crashed", detail: `QEMU reports "${status}"` };
      }
      if (status === "shutdown") return { ...known, pid, state: "stopped" };
    } catch {
      // The monitor is busy, or QEMU is about to end: it runs for now.
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
    const status = await this.status();
    if (!current || status.state === "stopped" || status.state === "absent" || status.state === "crashed") {
      if (status.state === "crashed" || status.pid !== undefined) await this.#kill();
      await this.#start(spec, options);
      return { isRestarted: true };
    }
    if (needsRestart(current, spec) || !(await this.#hasRoom(current, spec, options))) {
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
    await using qmp = await this.#monitor();
    await qmp.execute("stop");
  }

  /** Lets its vCPUs go on. */
  async resume(): Promise<void> {
    await using qmp = await this.#monitor();
    await qmp.execute("cont");
  }

  /** Powers it off and removes everything that belongs to it. */
  async destroy(): Promise<void> {
    if (!(await exists(this.#files.folder))) return;
    using _lock = await this.#lock({});
    await this.#kill();
    await removeIfThere(this.#files.folder);
  }

  /**
   * Connects to the serial console.
   *
   * @returns The connection: bytes both ways
   */
  async console(): Promise<Deno.UnixConn> {
    try {
      return await Deno.connect({ transport: "unix", path: this.#files.console });
    } catch (cause) {
      throw await this.#notRunning("connect to the console", cause);
    }
  }

  async #lock(options: OperationOptions): Promise<Disposable> {
    await Deno.mkdir(this.#files.folder, { recursive: true, mode: 0o700 });
    return await lockFile(this.#files.lock, {
      ...(options.signal ? { signal: options.signal } : {}),
      onWait: () => options.report?.("waiting for another command to finish with this machine"),
    });
  }

  /** The process that runs it: its number is reused after a reboot, so its command line must name this folder. */
  async #pid(): Promise<number | undefined> {
    try {
      const pid = Number(await Deno.readTextFile(this.#files.pid));
      if (!Number.isInteger(pid) || pid <= 1) return undefined;
      return (await Deno.readTextFile(`/proc/${pid}/cmdline`)).split("\0").includes(this.#files.pid)
        ? pid
        : undefined;
    } catch {
      return undefined;
    }
  }

  async #monitor(signal?: AbortSignal): Promise<Qmp> {
    try {
      return await Qmp.connect(this.#files.monitor, signal ? { signal } : {});
    } catch (cause) {
      if (cause instanceof MachineError || signal?.aborted) throw cause;
      throw await this.#notRunning("reach the monitor", cause);
    }
  }

  async #notRunning(action: string, cause: unknown): Promise<MachineError> {
    const { state, address } = await this.status();
    return new MachineError(
      state === "running"
        ? `Cannot ${action} of "${address}" as ${cause instanceof Error ? cause.message : cause}`
        : `Cannot ${action} of "${address}" as the machine is ${state}: start it with apply`,
      { cause },
    );
  }

  async #panic(): Promise<string | undefined> {
    return await findPanic(this.#files.consoleLog);
  }

  async #start(spec: MachineSpec, options: OperationOptions): Promise<void> {
    if (await this.#pid() !== undefined) return;
    const files = this.#files;
    const wanted = (spec.engine.binary as string | undefined) ?? DEFAULT_BINARY;
    const binary = await which(wanted);
    if (binary === undefined) throw new QemuMissingError(wanted);
    if (new TextEncoder().encode(join(files.folder, "data.0.err.sock")).length > 107) {
      throw new MachineError(
        `Cannot start "${spec.address}" as the folder "${files.folder}" makes socket paths longer than 107 bytes: ` +
          `set HYPERTOPIA_HOME to a shorter path`,
      );
    }
    const accelerator = (spec.engine.accelerator as AcceleratorName | undefined) ??
      await this.#bestAccelerator(binary, options.signal);
    options.signal?.throwIfAborted();
    options.report?.(`starting QEMU (${accelerator})`);
    try {
      await this.#record(spec);
      await joinFiles(spec.initramfs, files.initramfs);
    } catch (error) {
      throw writeError(`start "${spec.address}"`, error);
    }
    for (const log of [files.consoleLog, files.engineLog]) {
      if (await exists(log)) await Deno.rename(log, `${log}.1`);
    }
    await removeIfThere(files.pid);
    const { success, code, signal, stderr } = await new Deno.Command(binary, {
      args: qemuArguments(spec, files, accelerator),
      cwd: files.folder,
      stdin: "null",
      stdout: "null",
      stderr: "piped",
    }).output();
    if (!success) {
      // A daemon's last words are in its log.
      const words = `${new TextDecoder().decode(stderr)}${await tailOf(files.engineLog, 4096)}`.trim();
      const said = words.replaceAll(/^\S*qemu-system-\w+: /gm, "") ||
        `it ended with ${signal ?? `status ${code}`}`;
      throw new MachineError(`Cannot start "${spec.address}" as ${explainStart(said, spec)}`);
    }
    await using qmp = await this.#monitor(options.signal);
    await growDisks(qmp, spec, options);
    if (spec.memory < spec.maxMemory) await qmp.execute("balloon", { value: spec.memory });
  }

  async #record(spec: MachineSpec): Promise<void> {
    const record: MachineRecord = { version: 1, engine: "qemu", spec };
    await writeWhole(this.#files.record, JSON.stringify(record));
  }

  async #bestAccelerator(binary: string, signal: AbortSignal | undefined): Promise<AcceleratorName> {
    const reports = await probeOnce(this.#paths, binary, signal);
    const best = reports.find((each) => each.usable);
    if (!best) {
      throw new MachineError(
        `Cannot start "${this.id}" as no accelerator of "${binary}" runs code: ` +
          reports.map((each) => `${each.name}: ${each.detail}`).join("; "),
      );
    }
    return best.name;
  }

  async #shutdown(timeout: number, options: OperationOptions): Promise<void> {
    const pid = await this.#pid();
    if (pid === undefined) return;
    const spec = await this.spec();
    const { state } = await this.status();
    if (state === "crashed") return await this.#kill();
    options.report?.("shutting down");
    const deadline = Date.now() + timeout;
    try {
      if (state === "paused") await this.resume();
      if (spec?.hasAgent) {
        const limit = AbortSignal.timeout(Math.max(1, timeout));
        await this.guest.poweroff({
          signal: options.signal ? AbortSignal.any([limit, options.signal]) : limit,
        });
      } else {
        await using qmp = await this.#monitor(options.signal);
        await qmp.execute("system_powerdown");
      }
      while (Date.now() < deadline && await this.#pid() !== undefined) {
        options.signal?.throwIfAborted();
        await delay(50);
      }
    } catch (error) {
      if (options.signal?.aborted) throw error;
      options.report?.("the guest does not answer: powering off");
    }
    await this.#kill();
  }

  async #kill(): Promise<void> {
    // Killed between QEMU's start and its pid file, an apply leaves a QEMU that is about to write one.
    const pid = await this.#pid() ?? await findByCommandLine(this.#files.pid);
    if (pid === undefined) return;
    try {
      Deno.kill(pid, "SIGKILL");
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
    while (identifyProcess(pid) !== undefined && await findByCommandLine(this.#files.pid) !== undefined) {
      await delay(10);
    }
    await removeIfThere(this.#files.pid);
  }

  /** Whether the devices to be plugged fit into the free ports; a restart makes new ones. */
  async #hasRoom(current: MachineSpec, spec: MachineSpec, options: OperationOptions): Promise<boolean> {
    const added = (
      before: readonly { readonly name: string }[],
      after: readonly { readonly name: string }[],
    ) => after.filter((each) => !before.some((other) => other.name === each.name)).length;
    const count = added(current.disks, spec.disks) + added(current.nics, spec.nics);
    if (count === 0) return true;
    await using qmp = await this.#monitor(options.signal);
    return (await freePorts(qmp)).length >= count;
  }

  async #updateLive(current: MachineSpec, spec: MachineSpec, options: OperationOptions): Promise<void> {
    await using qmp = await this.#monitor(options.signal);
    const devices = await qmp.execute("qom-list", { path: "/machine/peripheral" }) as { name: string }[];
    const isPlugged = (id: string) => devices.some((each) => each.name === id);
    // Also what an interrupted update has plugged, and nobody has on record.
    for (const { name: id } of devices) {
      const [, sort, name] = /^dev-(disk|nic)-(.*)$/.exec(id) ?? [];
      if (sort === undefined) continue;
      const wanted: readonly { readonly name: string }[] = sort === "disk" ? spec.disks : spec.nics;
      if (wanted.some((each) => each.name === name)) continue;
      await unplug(qmp, id, isPlugged, options);
      await (sort === "disk"
        ? attempt(() => qmp.execute("blockdev-del", { "node-name": `disk-${name}` }), /find|not found/i)
        : attempt(() => qmp.execute("netdev_del", { id: `net-${name}` }), /not found/i));
    }
    for (const disk of spec.disks) {
      const before = current.disks.find((each) => each.name === disk.name);
      if (!before && !isPlugged(`dev-disk-${disk.name}`)) {
        options.report?.(`plugging disk ${disk.name}`);
        await attempt(() => qmp.execute("blockdev-add", blockNode(disk)), /duplicate/i);
        await qmp.execute("device_add", diskDevice(disk, await freePort(qmp, spec)));
      }
    }
    await growDisks(qmp, spec, options);
    for (const nic of spec.nics) {
      const before = current.nics.find((each) => each.name === nic.name);
      if (!before && !isPlugged(`dev-nic-${nic.name}`)) {
        options.report?.(`plugging NIC ${nic.name}`);
        await attempt(() => qmp.execute("netdev_add", networkObject(nic)), /duplicate/i);
        await qmp.execute("device_add", nicDevice(nic, await freePort(qmp, spec)));
      } else if (before && !equal(before.forwards, nic.forwards)) {
        await updateForwards(qmp, before, nic);
      }
    }
    if (spec.memory !== current.memory) await balloon(qmp, spec.memory, options, () => this.#panic());
    // The maximum is fixed until the next start.
    await this.#record({ ...spec, maxMemory: current.maxMemory });
    await joinFiles(spec.initramfs, this.#files.initramfs);
  }
}

async function balloon(
  qmp: Qmp,
  target: number,
  options: OperationOptions,
  panic: () => Promise<string | undefined>,
): Promise<void> {
  await qmp.execute("balloon", { value: target });
  const deadline = Date.now() + BALLOON_TIMEOUT;
  while (true) {
    const { actual } = await qmp.execute("query-balloon") as { actual: number };
    if (actual === target) return;
    const crash = await panic();
    if (crash !== undefined) throw new MachineError(`the guest crashed while its memory changed (${crash})`);
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

/** Grows disks that are smaller than they should be: the file of a root disk, or what a running QEMU takes a disk for. */
async function growDisks(qmp: Qmp, spec: MachineSpec, options: OperationOptions): Promise<void> {
  if (spec.disks.length === 0) return;
  const nodes = await qmp.execute("query-named-block-nodes", { flat: true }) as BlockNode[];
  for (const disk of spec.disks) {
    const node = nodes.find((each) => each["node-name"] === `disk-${disk.name}`);
    if (!node || node.image["virtual-size"] >= disk.size || disk.readOnly) continue;
    options.report?.(`growing disk ${disk.name}`);
    await qmp.execute("block_resize", { "node-name": `disk-${disk.name}`, size: disk.size });
  }
}

interface BlockNode {
  readonly "node-name": string;
  readonly image: { readonly "virtual-size": number };
}

async function unplug(
  qmp: Qmp,
  id: string,
  isPlugged: (id: string) => boolean,
  options: OperationOptions,
): Promise<void> {
  if (!isPlugged(id)) return;
  options.report?.(`unplugging ${id.replace(/^dev-/, "")}`);
  const deadline = Date.now() + UNPLUG_TIMEOUT;
  while (Date.now() < deadline) {
    const gone = qmp.waitFor((event) => event.event === "DEVICE_DELETED" && event.data?.device === id, 6000);
    // A guest that is still booting ignores the first request.
    await attempt(() => qmp.execute("device_del", { id }), /not found|unplug/i);
    if (await gone) return;
    const left = await qmp.execute("qom-list", { path: "/machine/peripheral" }) as { name: string }[];
    if (!left.some((each) => each.name === id)) return;
    options.signal?.throwIfAborted();
  }
  throw new MachineError(
    `the guest does not let go of "${id.replace(/^dev-/, "")}": unmount it in the guest first`,
  );
}

async function freePorts(qmp: Qmp): Promise<string[]> {
  const buses = await qmp.execute("query-pci") as { devices: PciDevice[] }[];
  return buses.flatMap((bus) => bus.devices)
    .filter((device) => /^port\d+$/.test(device.qdev_id) && !device.pci_bridge?.devices?.length)
    .map((device) => device.qdev_id);
}

async function freePort(qmp: Qmp, spec: MachineSpec): Promise<string> {
  const [port] = await freePorts(qmp);
  if (port !== undefined) return port;
  throw new MachineError(`no PCIe port of "${spec.address}" is free: run apply again`);
}

interface PciDevice {
  readonly qdev_id: string;
  readonly pci_bridge?: { readonly devices?: readonly unknown[] };
}

async function updateForwards(qmp: Qmp, before: MachineNic, nic: MachineNic): Promise<void> {
  for (const old of before.forwards) {
    if (nic.forwards.some((each) => equal(each, old))) continue;
    await qmp.human(`hostfwd_remove net-${nic.name} ${old.protocol}:${old.address}:${old.host}`);
  }
  const added: MachineForward[] = [];
  const remove = (forward: MachineForward) =>
    qmp.human(`hostfwd_remove net-${nic.name} ${forward.protocol}:${forward.address}:${forward.host}`);
  for (const forward of nic.forwards) {
    if (before.forwards.some((each) => equal(each, forward))) continue;
    // An interrupted update may have added it already.
    await remove(forward);
    const said = (await qmp.human(`hostfwd_add net-${nic.name} ${forwardRule(nic, forward)}`)).trim();
    if (said === "") {
      added.push(forward);
      continue;
    }
    for (const each of added) await remove(each);
    throw new MachineError(
      `port ${forward.host} of ${forward.address} cannot be forwarded (${said}): choose another host port, or end what uses it`,
    );
  }
}

/** The same as the option string, for `netdev_add`. */
function networkObject(nic: MachineNic): Record<string, unknown> {
  const [type, ...options] = networkBackend({ ...nic, forwards: [] }).split(",");
  const object: Record<string, unknown> = { type };
  for (const option of options) {
    const [key = "", value = ""] = option.split("=");
    object[key] = value === "on" ? true : value === "off" ? false : value;
  }
  object.hostfwd = nic.forwards.map((forward) => ({ str: forwardRule(nic, forward) }));
  return object;
}

/** Runs a command whose failure of one sort means that it was done already. */
async function attempt(run: () => Promise<unknown>, done: RegExp): Promise<void> {
  try {
    await run();
  } catch (error) {
    if (!(error instanceof Error) || !done.test(error.message)) throw error;
  }
}

async function findByCommandLine(word: string): Promise<number | undefined> {
  for await (const { name } of Deno.readDir("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      const words = (await Deno.readTextFile(`/proc/${name}/cmdline`)).split("\0");
      if (words.includes(word) && words.includes("-pidfile")) return Number(name);
    } catch {
      // Ended meanwhile, or of another user.
    }
  }
  return undefined;
}

function explainStart(said: string, spec: MachineSpec): string {
  const forward = /Could not set up host forwarding rule '(\w+):([\d.]+):(\d+)/.exec(said);
  if (forward) {
    return `port ${forward[3]} of ${forward[2]} is in use: choose another host port, or end what uses it`;
  }
  if (/Failed to get .*lock|Is another process using/i.test(said)) {
    const path = spec.disks.find((disk: MachineDisk) => said.includes(disk.path))?.path;
    return `another process uses ${path ? `the disk "${path}"` : "one of its disks"}: ${said}`;
  }
  if (/cannot set up guest memory|Cannot allocate memory/i.test(said)) {
    return `the host has not enough memory for ${formatSize(spec.maxMemory)}: lower memory or maxMemory`;
  }
  return `QEMU failed: ${said}`;
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
