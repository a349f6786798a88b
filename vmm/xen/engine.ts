/**
 * The Xen engine: domains by hypercalls and xenstore, with a detached process for the consoles of each.
 *
 * @module
 */

import { XEN_MAX_CPUS } from "../../dsl/mod.ts";
import { resizeLoop } from "../../ffi/mod.ts";
import { type DomainInfo, Xen, Xenstore } from "../../ffi/xen/mod.ts";
import { equal, identifyProcess, isRunning } from "../../planner/mod.ts";
import { moduleBeside, spawnDetached } from "../detached.ts";
import type {
  Capabilities,
  Engine,
  MachineNeeds,
  MachineSpec,
  MachineStatus,
  OperationOptions,
} from "../engine.ts";
import { MachineError } from "../errors.ts";
import { delay, FileMachine, killProcess, machineIds, readJson } from "../file_machine.ts";
import { exists, removeIfThere, writeWhole } from "../files.ts";
import { findPanic, tailOf } from "../machine_files.ts";
import { lackOfNft } from "../net/host_network.ts";
import { releaseBridges } from "../net/machine_bridges.ts";
import { hostPaths, type Paths } from "../paths.ts";
import { startError } from "../supervised_machine.ts";
import { domainPath } from "./devices.ts";
import { domainsOf, machineOfHandle, undo } from "./domain.ts";
import {
  type KeeperFile,
  launchDomain,
  loopOf,
  maxCpusOf,
  sweepDomains,
  tune,
  XEN_CHANNELS,
  type XenFiles,
  xenFiles,
  type XenHost,
  type XenMachineOptions,
  type XenRunFile,
} from "./launch.ts";

const PAGE = 4096;
const KIBIBYTE = 2 ** 10;
/** How long a guest may take to change its vCPUs, in milliseconds. */
const CPU_TIMEOUT = 60_000;
/** Switches all vCPUs on that the guest has, and counts them. */
const SWITCH_CPUS_ON = `
for each in /sys/devices/system/cpu/cpu[1-9]*/online; do
  [ ! -e "$each" ] || [ "$(cat "$each")" = 1 ] || echo 1 >"$each" 2>/dev/null
done
grep -c ^processor /proc/cpuinfo`;
/** Pages that a guest gives back for itself: Linux maps what it shares with Xen in their place. */
const OWN_PAGES = 8;
/** How long a keeper may take to serve consoles, in milliseconds. */
const KEEPER_TIMEOUT = 120_000;

/** Runs machines as domains of Xen. */
export class XenEngine implements Engine {
  /** The engine's name. */
  readonly name = "xen";
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
   * Finds out by asking the hypervisor whether Xen works here, and whether it can run what is asked for.
   *
   * @param options What the machine needs
   * @returns What was found
   */
  async probe(
    options: OperationOptions & { engine?: MachineSpec["engine"]; needs?: MachineNeeds } = {},
  ): Promise<Capabilities> {
    const { processors = 0, ...hypervisor } = await probeXen();
    const findings = isXenHost() ? [{ name: "hypervisor", ...hypervisor }] : [];
    const { needs, engine = {} } = options;
    const absent = (engine as XenMachineOptions).pin?.flat().find((processor) => processor >= processors);
    const reason = !hypervisor.isUsable
      ? hypervisor.detail
      : needs?.hasFirmware
      ? "a PVH domain has no firmware to boot a disk by: give the machine a kernel"
      : needs?.hasQcow2
      ? "the kernel serves its domains raw disks only: give the disk no format, or convert the image"
      : (needs?.cpus ?? 1) > XEN_MAX_CPUS
      ? `it runs at most ${XEN_MAX_CPUS} vCPUs`
      : absent !== undefined
      ? `its pin names the processor ${absent}, and the last one of this host is ${processors - 1}`
      : needs?.hasNics
      ? await lackOfNft(needs.hasNat)
      : undefined;
    return { engine: "xen", isUsable: reason === undefined, detail: reason ?? hypervisor.detail, findings };
  }

  /**
   * Gives the machine of an identity.
   *
   * @param id Identity
   * @returns The machine, which may not exist yet
   */
  attach(id: string): XenMachine {
    return new XenMachine(id, this.#paths);
  }

  /**
   * Lists the machines of this host: one hypercall tells of all domains.
   *
   * @param wanted Only these; all unless told
   * @returns How each one is
   */
  async list(wanted?: ReadonlySet<string>): Promise<MachineStatus[]> {
    const specs = new Map<string, MachineSpec>();
    for (const id of await machineIds(this.#paths)) {
      const spec = wanted?.has(id) ?? true ? await this.attach(id).spec() : undefined;
      if (spec) specs.set(id, spec);
    }
    if (specs.size === 0) return [];
    const domains = listDomains();
    return await Promise.all(
      [...specs].map(([id, spec]) => statusOf(id, xenFiles(this.#paths, id), spec, domains)),
    );
  }
}

/** A machine that is a domain of Xen. */
export class XenMachine extends FileMachine<XenFiles> {
  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param paths Folders of this host
   */
  constructor(id: string, paths: Paths) {
    super(id, "xen", paths, xenFiles(paths, id), XEN_CHANNELS);
  }

  /**
   * Looks how it is.
   *
   * @returns Its status
   */
  async status(): Promise<MachineStatus> {
    const spec = await this.spec();
    return await statusOf(this.id, this.files, spec, spec ? listDomains() : []);
  }

  /** Where only the process is gone that keeps its consoles, the guest does not notice. */
  protected override async mend(
    current: MachineSpec,
    spec: MachineSpec | undefined,
    options: OperationOptions,
  ): Promise<void> {
    if (await this.#isUnstarted()) return await this.killNow();
    if (await keeperOf(this.files)) return;
    options.report?.("starting the process that keeps its consoles");
    // Ports that it had may be others' by now, and whoever is to end needs none.
    const wanted = new Map(spec?.nics.map(({ name, forwards }) => [name, forwards]));
    const nics = current.nics.map((nic) => ({ ...nic, forwards: wanted.get(nic.name) ?? [] }));
    await this.record({ ...current, nics });
    await this.#startKeeper(current, options);
  }

  /** Stops its vCPUs. */
  async pause(): Promise<void> {
    await this.ask("pause", async () => {
      using xen = Xen.open();
      const domain = await this.#domain(xen);
      if (!domain.isPaused) xen.pause(domain.domid);
    });
  }

  /** Lets its vCPUs go on. */
  async resume(): Promise<void> {
    await this.ask("resume", async () => {
      using xen = Xen.open();
      const domain = await this.#domain(xen);
      if (domain.isPaused) xen.unpause(domain.domid);
    });
  }

  /** Tells whether it has a domain that has not ended. */
  protected async isAlive(): Promise<boolean> {
    const run = await readJson<XenRunFile>(this.files.run);
    if (run?.domid === undefined || !isXenHost()) return false;
    using xen = Xen.open();
    const domain = xen.domain(run.domid);
    return domain !== undefined && machineOfHandle(domain.handle) === this.id && !domain.isDying &&
      domain.shutdownReason === undefined;
  }

  /** Builds its domain, while the process starts that keeps it. */
  protected async startNow(spec: MachineSpec, options: OperationOptions): Promise<void> {
    if (await this.isAlive()) return;
    if (spec.kernel === undefined) {
      throw new MachineError(
        `Cannot start "${spec.address}" on the engine "xen" as a PVH domain has no firmware to boot a disk by: ` +
          `give it a kernel, or choose qemu()`,
      );
    }
    await using host = await openHost(this.paths);
    await this.#endKeeper();
    await sweepDomains(host, this.id);
    await this.prepare(spec, options);
    await removeIfThere(this.files.run);
    const keeper = await this.#spawnKeeper();
    try {
      await launchDomain(host, spec, this.files, options);
      await this.#waitForKeeper(spec, keeper, options);
    } catch (error) {
      const reason = options.signal?.aborted
        ? options.signal.reason
        : error instanceof Error
        ? startError(spec, error.message)
        : error;
      await undo(reason, () => this.killNow(), () => this.release(spec));
    }
  }

  /** Tells whether it is built but was never let run: whoever was about to has died. */
  async #isUnstarted(): Promise<boolean> {
    using xen = Xen.open();
    return isUnstarted(await this.#domain(xen));
  }

  /** Asks the guest to power off, as `xl shutdown` does. */
  protected async pressPower(): Promise<void> {
    using xen = Xen.open();
    const { domid } = await this.#domain(xen);
    using xenstore = await Xenstore.connect();
    await xenstore.write(`${domainPath(domid)}/control/shutdown`, "poweroff");
  }

  /** Destroys its domain. */
  protected async killNow(): Promise<void> {
    await this.#endKeeper();
    // Without Xen, as after another boot of the host, there are no domains either.
    if (!isXenHost()) return;
    await using host = await openHost(this.paths);
    const had = domainsOf(host.xen, this.id).length > 0;
    await sweepDomains(host, this.id);
    if (had) {
      const end = { reason: "stopped", detail: "it was powered off" } as const;
      await writeWhole(this.files.run, JSON.stringify({ end }));
    }
  }

  /** Grows disks, moves forwards, the balloon, and what the scheduler does. */
  protected async updateNow(
    current: MachineSpec,
    spec: MachineSpec,
    options: OperationOptions,
  ): Promise<void> {
    using xen = Xen.open();
    const { domid } = await this.#domain(xen);
    for (const disk of spec.disks) {
      const before = current.disks.find((each) => each.name === disk.name);
      if (disk.readOnly || before?.size === disk.size) continue;
      const loop = loopOf(disk.path);
      if (loop === undefined) {
        throw new MachineError(
          `its disk "${disk.name}" has no loop device any more: shut it down, then run apply`,
        );
      }
      options.report?.(`growing disk ${disk.name}`);
      await Deno.truncate(disk.path, disk.size);
      resizeLoop(loop);
    }
    if (!equal(current.engine, spec.engine)) tune(xen, domid, spec, current.engine);
    // The keeper reads these when it starts.
    if (!equal([current.nics, current.engine], [spec.nics, spec.engine])) {
      await this.record({ ...current, nics: spec.nics, engine: spec.engine });
      await this.#endKeeper();
      await this.#startKeeper(spec, options);
    }
    if (spec.memory === current.memory && spec.cpus === current.cpus) return;
    using xenstore = await Xenstore.connect();
    if (spec.cpus !== current.cpus) await this.#setCpus(xenstore, domid, spec, options);
    if (spec.memory === current.memory) return;
    await xenstore.write(`${domainPath(domid)}/memory/target`, `${spec.memory / KIBIBYTE}`);
    const { pages = 0 } = await readJson<XenRunFile>(this.files.run) ?? {};
    const read = () => {
      const now = xen.domain(domid)?.pages ?? 0;
      const actual = current.maxMemory - (pages - now) * PAGE;
      return Promise.resolve(Math.abs(actual - spec.memory) <= OWN_PAGES * PAGE ? spec.memory : actual);
    };
    await this.waitForBalloon(read, spec.memory, options);
  }

  /** A network that no machine uses any more leaves nothing on the host. */
  protected override async release(spec: MachineSpec | undefined): Promise<void> {
    await releaseBridges(this.paths, spec);
  }

  async #domain(xen: Xen): Promise<DomainInfo> {
    const run = await readJson<XenRunFile>(this.files.run);
    const domain = run?.domid === undefined ? undefined : xen.domain(run.domid);
    if (domain && machineOfHandle(domain.handle) === this.id) return domain;
    throw new MachineError("it has no domain");
  }

  /** Tells the guest which vCPUs it has. It takes those off that it has not, but those that are new it leaves off. */
  async #setCpus(
    xenstore: Xenstore,
    domid: number,
    spec: MachineSpec,
    { signal, report }: OperationOptions,
  ): Promise<void> {
    report?.(`changing to ${spec.cpus} vCPUs`);
    for (let cpu = 1; cpu < maxCpusOf(spec); cpu++) {
      await xenstore.write(
        `${domainPath(domid)}/cpu/${cpu}/availability`,
        cpu < spec.cpus ? "online" : "offline",
      );
    }
    if (!spec.hasAgent) return;
    const options = { timeout: CPU_TIMEOUT, ...(signal ? { signal } : {}) };
    const deadline = Date.now() + CPU_TIMEOUT;
    while (true) {
      const { stdout } = await this.guest.output(["sh", "-c", SWITCH_CPUS_ON], options);
      if (Number(stdout) === spec.cpus) return;
      if (Date.now() > deadline) {
        throw new MachineError(
          `the guest stays at ${stdout.trim()} vCPUs and ${spec.cpus} are wanted: look at its kernel's log`,
        );
      }
      await delay(200);
    }
  }

  /** It is on record before it does anything: whoever comes next finds it, whatever happens to this process. */
  async #spawnKeeper(): Promise<Deno.ChildProcess> {
    const { engineLog, keeper } = this.files;
    const child = spawnDetached(moduleBeside("./keeper_main", import.meta.url), engineLog, [
      ...["--id", this.id, "--log-path", engineLog],
    ]);
    const process = identifyProcess(child.pid);
    if (process) await writeWhole(keeper, JSON.stringify({ process }));
    return child;
  }

  async #startKeeper(spec: MachineSpec, options: OperationOptions): Promise<void> {
    await this.#waitForKeeper(spec, await this.#spawnKeeper(), options);
  }

  async #waitForKeeper(
    spec: MachineSpec,
    child: Deno.ChildProcess,
    options: OperationOptions,
  ): Promise<void> {
    let isGone = false;
    void child.status.then(() => isGone = true);
    const deadline = Date.now() + KEEPER_TIMEOUT;
    while (true) {
      if ((await keeperOf(this.files))?.domid !== undefined) return;
      // A guest can be faster than we look.
      if (isGone && (await readJson<XenRunFile>(this.files.run))?.end) return;
      if (isGone || Date.now() > deadline) {
        const words = (await tailOf(this.files.engineLog, 2000)).trim().split("\n").at(-1) ?? "";
        throw startError(
          spec,
          `the process that keeps its consoles ${isGone ? `ended: ${words}` : "does not answer"}`,
        );
      }
      options.signal?.throwIfAborted();
      await delay(20);
    }
  }

  async #endKeeper(): Promise<void> {
    const keeper = await readJson<KeeperFile>(this.files.keeper);
    if (keeper && isRunning(keeper.process)) {
      killProcess(keeper.process.pid);
      while (isRunning(keeper.process)) await delay(10);
    }
    await removeIfThere(this.files.keeper);
  }
}

/** Tells whether a domain was never let run. */
function isUnstarted({ isPaused, cpuTime }: DomainInfo): boolean {
  return isPaused && cpuTime === 0n;
}

/** Finds out how a machine is, of which all domains of the host are known. */
async function statusOf(
  id: string,
  files: XenFiles,
  spec: MachineSpec | undefined,
  domains: readonly DomainInfo[],
): Promise<MachineStatus> {
  const known = { id, stack: spec?.stack ?? "", address: spec?.address ?? "" };
  if (!spec) return { ...known, state: "absent" };
  const run = await readJson<XenRunFile>(files.run);
  const domain = domains.find(({ domid, handle }) => domid === run?.domid && machineOfHandle(handle) === id);
  if (run?.end?.reason === "crash" || domain?.shutdownReason === "crash") {
    return { ...known, state: "crashed", detail: run?.end?.detail ?? "the guest crashed" };
  }
  if (!domain || domain.isDying) {
    const isLost = run?.domid !== undefined && !run.end;
    const detail = isLost
      ? "its domain is gone: it was destroyed, or the host was restarted"
      : run?.end?.reason === "failure"
      ? run.end.detail
      : undefined;
    return { ...known, state: "stopped", ...(detail === undefined ? {} : { detail }) };
  }
  const keeper = await keeperOf(files);
  const pid = keeper?.process.pid;
  const panic = await findPanic(files.consoleLog);
  if (panic !== undefined) return { ...known, state: "crashed", detail: panic };
  if (domain.shutdownReason !== undefined && pid === undefined) return { ...known, state: "stopped" };
  if (isUnstarted(domain)) return { ...known, state: "stopped", detail: "its domain was never let run" };
  if (pid === undefined) {
    return { ...known, state: "crashed", detail: "the process that keeps its consoles is gone" };
  }
  return { ...known, pid, state: domain.isPaused ? "paused" : "running" };
}

/** Who keeps a machine's consoles; undefined where nobody does. */
async function keeperOf(files: XenFiles): Promise<KeeperFile | undefined> {
  const keeper = await readJson<KeeperFile>(files.keeper);
  return keeper && isRunning(keeper.process) ? keeper : undefined;
}

/** Opens what domains are made with. */
async function openHost(paths: Paths): Promise<XenHost & AsyncDisposable> {
  const resources = new DisposableStack();
  try {
    const xen = resources.use(Xen.open());
    const xenstore = resources.use(await Xenstore.connect());
    return {
      xen,
      xenstore,
      paths,
      [Symbol.asyncDispose]: () => Promise.resolve(resources.dispose()),
    };
  } catch (error) {
    resources.dispose();
    throw error;
  }
}

function isXenHost(): boolean {
  try {
    return Deno.statSync("/dev/xen/privcmd").isCharDevice ?? false;
  } catch {
    return false;
  }
}

/** All domains; none where there is no hypervisor. */
function listDomains(): DomainInfo[] {
  if (!isXenHost()) return [];
  using xen = Xen.open();
  return xen.listDomains();
}

async function probeXen(): Promise<{
  readonly isUsable: boolean;
  readonly detail: string;
  /** How many numbers processors have. */
  readonly processors?: number;
}> {
  if (!isXenHost()) {
    return {
      isUsable: false,
      detail: "there is no /dev/xen/privcmd: this system is not the control domain (dom0) of a Xen host",
    };
  }
  try {
    using xen = Xen.open();
    const { major, minor } = xen.version();
    const name = `Xen ${major}.${minor}`;
    const { hasHvm, hasHap, freePages, maxCpuId } = xen.physicalInfo();
    if (!hasHvm || !hasHap) {
      return {
        isUsable: false,
        detail:
          `${name} has no hardware paging here, which PVH domains need: switch on AMD-V with NPT or VT-x with EPT ` +
          `in the firmware's setup`,
      };
    }
    try {
      using _xenstore = await Xenstore.connect();
    } catch (error) {
      return { isUsable: false, detail: error instanceof Error ? error.message : String(error) };
    }
    for (const module of ["xen_blkback", "xen_netback"]) {
      if (await exists(`/sys/module/${module}`)) continue;
      return {
        isUsable: false,
        detail:
          `the kernel's module ${module} is not loaded, without which domains have no devices: modprobe ${module}`,
      };
    }
    const foreign = xen.listDomains().filter(({ domid, handle }) => domid !== 0 && !machineOfHandle(handle));
    const others = foreign.length === 0
      ? ""
      : `, ${foreign.length} ${foreign.length === 1 ? "domain" : "domains"} of others`;
    return {
      isUsable: true,
      processors: maxCpuId + 1,
      detail: `${name}, PVH, ${Math.floor(freePages * PAGE / 2 ** 20)} MiB free${others}`,
    };
  } catch (error) {
    return { isUsable: false, detail: error instanceof Error ? error.message : String(error) };
  }
}
