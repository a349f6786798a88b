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
  MachineDisk,
  MachineForward,
  MachineNic,
  MachineSpec,
  MachineStatus,
  OperationOptions,
} from "../engine.ts";
import { MachineError } from "../errors.ts";
import { delay, FileMachine, killProcess, listMachines } from "../file_machine.ts";
import { exists, removeIfThere } from "../files.ts";
import { findPanic, tailOf } from "../machine_files.ts";
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
  diskDevice,
  forwardRule,
  networkBackend,
  nicDevice,
  qemuArguments,
  type QemuFiles,
  qemuFiles,
} from "./arguments.ts";
import { Qmp } from "./qmp.ts";

const DEFAULT_BINARY = "qemu-system-x86_64";
/** What is known of a machine whose QEMU left its pid file behind. */
const ABNORMAL_END = "QEMU ended abnormally: it crashed or was killed, or the host was restarted";
/** How long a guest may take to let go of a device, in milliseconds. */
const UNPLUG_TIMEOUT = 60_000;

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
    return await listMachines(this.#paths, (id) => this.attach(id), wanted);
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
export class QemuMachine extends FileMachine<QemuFiles> {
  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param paths Folders of this host
   */
  constructor(id: string, paths: Paths) {
    super(id, "qemu", paths, qemuFiles(machineFolder(paths, id)));
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
      const isAbnormal = spec !== undefined && await exists(this.files.pid);
      return {
        ...known,
        state: spec ? "stopped" : "absent",
        ...(isAbnormal ? { detail: ABNORMAL_END } : {}),
      };
    }
    const panic = await findPanic(this.files.consoleLog);
    if (panic !== undefined) return { ...known, pid, state: "crashed", detail: panic };
    try {
      await using qmp = await Qmp.connect(this.files.monitor, { timeout: 3000 });
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

  /** Stops its vCPUs. */
  async pause(): Promise<void> {
    await using qmp = await this.#monitor("pause");
    await qmp.execute("stop");
  }

  /** Lets its vCPUs go on. */
  async resume(): Promise<void> {
    await using qmp = await this.#monitor("resume");
    await qmp.execute("cont");
  }

  /** Tells whether QEMU runs. */
  protected async isAlive(): Promise<boolean> {
    return await this.#pid() !== undefined;
  }

  /** The process that runs it: its number is reused after a reboot, so its command line must name this folder. */
  async #pid(): Promise<number | undefined> {
    try {
      const pid = Number(await Deno.readTextFile(this.files.pid));
      if (!Number.isInteger(pid) || pid <= 1) return undefined;
      return (await Deno.readTextFile(`/proc/${pid}/cmdline`)).split("\0").includes(this.files.pid)
        ? pid
        : undefined;
    } catch {
      return undefined;
    }
  }

  async #monitor(action: string, signal?: AbortSignal): Promise<Qmp> {
    return await this.ask(action, () => Qmp.connect(this.files.monitor, signal ? { signal } : {}), signal);
  }

  /** Starts QEMU. */
  protected async startNow(spec: MachineSpec, options: OperationOptions): Promise<void> {
    if (await this.isAlive()) return;
    const { files } = this;
    const wanted = (spec.engine.binary as string | undefined) ?? DEFAULT_BINARY;
    const binary = await which(wanted);
    if (binary === undefined) throw new QemuMissingError(wanted);
    const accelerator = (spec.engine.accelerator as AcceleratorName | undefined) ??
      await this.#bestAccelerator(binary, options.signal);
    options.report?.(`starting QEMU (${accelerator})`);
    await this.prepare(spec, options);
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
    await using qmp = await this.#monitor("start", options.signal);
    await growDisks(qmp, spec, options);
    if (spec.memory < spec.maxMemory) await qmp.execute("balloon", { value: spec.memory });
  }

  async #bestAccelerator(binary: string, signal: AbortSignal | undefined): Promise<AcceleratorName> {
    const reports = await probeOnce(this.paths, binary, signal);
    const best = reports.find((each) => each.usable);
    if (!best) {
      throw new MachineError(
        `Cannot start "${this.id}" as no accelerator of "${binary}" runs code: ` +
          reports.map((each) => `${each.name}: ${each.detail}`).join("; "),
      );
    }
    return best.name;
  }

  /** Presses the power button. */
  protected async pressPower({ signal }: OperationOptions): Promise<void> {
    await using qmp = await this.#monitor("shut down", signal);
    await qmp.execute("system_powerdown");
  }

  /** Kills QEMU. */
  protected async killNow(): Promise<void> {
    // Killed between QEMU's start and its pid file, an apply leaves a QEMU that is about to write one.
    const pid = await this.#pid() ?? await findByCommandLine(this.files.pid);
    if (pid === undefined) return;
    killProcess(pid);
    while (identifyProcess(pid) !== undefined && await findByCommandLine(this.files.pid) !== undefined) {
      await delay(10);
    }
    await removeIfThere(this.files.pid);
  }

  /** Tells whether the devices to be plugged fit into the free ports, and memory can change; a restart makes it so. */
  protected override async canPlug(
    current: MachineSpec,
    spec: MachineSpec,
    options: OperationOptions,
  ): Promise<boolean> {
    // It has no balloon.
    if (spec.engine.hypervisor !== undefined && current.memory !== spec.memory) return false;
    const added = (
      before: readonly { readonly name: string }[],
      after: readonly { readonly name: string }[],
    ) => after.filter((each) => !before.some((other) => other.name === each.name)).length;
    const count = added(current.disks, spec.disks) + added(current.nics, spec.nics);
    if (count === 0) return true;
    await using qmp = await this.#monitor("change", options.signal);
    return (await freePorts(qmp)).length >= count;
  }

  /** Plugs, unplugs and changes devices. */
  protected async updateNow(
    current: MachineSpec,
    spec: MachineSpec,
    options: OperationOptions,
  ): Promise<void> {
    await using qmp = await this.#monitor("change", options.signal);
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
    if (spec.memory === current.memory) return;
    await qmp.execute("balloon", { value: spec.memory });
    const read = async () => (await qmp.execute("query-balloon") as { actual: number }).actual;
    await this.waitForBalloon(read, spec.memory, options);
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
