/**
 * Starting and ending the domain of a machine, with what it needs of the host: loop devices for its disks, and bridges that
 * its NICs are plugged into.
 *
 * @module
 */

import { join } from "node:path";
import {
  attachLoop,
  detachLoop,
  deviceNumber,
  listLoops,
  loopLabel,
  NetworkInterfaces,
} from "../../ffi/mod.ts";
import type { DomainInfo, Xen, Xenstore } from "../../ffi/xen/mod.ts";
import { DiskLock } from "../devices/block_file.ts";
import type { MachineNic, MachineSpec, OperationOptions } from "../engine.ts";
import { MachineError } from "../errors.ts";
import { delay, type MachineFiles, machineFiles } from "../file_machine.ts";
import { writeWhole } from "../files.ts";
import { unpackKernel } from "../images/kernel_image.ts";
import { bridgeOf, hostNetwork } from "../net/machine_bridges.ts";
import { machineFolder, type Paths } from "../paths.ts";
import { equal, type ProcessIdentity } from "../../planner/mod.ts";
import { diskName, type XenDisk } from "./devices.ts";
import { buildDomain, destroyDomain, destroyDomainsOf, undo } from "./domain.ts";

/** Data channels of a guest: Linux has 8 consoles in all, one for the kernel, one for control, and two for each channel. */
export const XEN_CHANNELS = 3;
/** Consoles of a guest beside the kernel's. */
export const FURTHER_CONSOLES: number = 1 + 2 * XEN_CHANNELS;
/** Words for the kernel of every guest: consoles, and which of them the agent has. */
const COMMAND_LINE = "console=hvc0 hypertopia.control=hvc1 hypertopia.channels=hvc2";
const MTU = 1500;
/** What Xen gives a new domain of the processors. */
const NEW_SCHEDULE = { weight: 256, cap: 0 } as const;
/** How long the host's driver may take to let go of the disk of a domain that is gone, in milliseconds. */
const LOOP_TIMEOUT = 10_000;
/** How long the host's driver may take to make its end of a NIC, in milliseconds. */
const INTERFACE_TIMEOUT = 30_000;

/** The file that tells which domain a machine has, and how its last one ended. */
export interface XenRunFile {
  /** The domain; absent once the run has ended. */
  readonly domid?: number;
  /** Pages that it had when it was built. */
  readonly pages?: number;
  /** Its end of the event channel of the kernel's console. */
  readonly consolePort?: number;
  /** How the run ended. */
  readonly end?: XenEnd;
}

/** How a run ended. */
export interface XenEnd {
  /** Why. */
  readonly reason: "poweroff" | "crash" | "stopped" | "failure";
  /** The same in words. */
  readonly detail: string;
}

/** The file that tells who keeps a domain's consoles. */
export interface KeeperFile {
  /** The process. */
  readonly process: ProcessIdentity;
  /** The domain whose consoles it serves. */
  readonly domid?: number;
}

/** Paths of a machine's files. */
export interface XenFiles extends MachineFiles {
  /** The {@linkcode XenRunFile}. */
  readonly run: string;
  /** The {@linkcode KeeperFile}. */
  readonly keeper: string;
}

/** Options of the engine as a machine has them. */
export interface XenMachineOptions {
  /** vCPUs that it can have; those that it has unless told. */
  readonly maxCpus?: number;
  /** Share of the processors, relative to other domains'. */
  readonly weight?: number;
  /** Most of a processor that it gets, in percent. */
  readonly cap?: number;
  /** Processors that its vCPUs run on: of all of them, or of each. */
  readonly pin?: readonly number[] | readonly (readonly number[])[];
  /** What happens to a domain that has crashed. */
  readonly crash?: "destroy" | "restart" | "preserve";
}

/** What the functions here work with. */
export interface XenHost {
  /** The hypervisor. */
  readonly xen: Xen;
  /** A connection to xenstored. */
  readonly xenstore: Xenstore;
  /** Folders of this host. */
  readonly paths: Paths;
}

/**
 * Names the files of a machine.
 *
 * @param paths Folders of this host
 * @param id Identity of the machine
 * @returns Their paths
 */
export function xenFiles(paths: Paths, id: string): XenFiles {
  const files = machineFiles(machineFolder(paths, id));
  return { ...files, run: join(files.folder, "run.json"), keeper: join(files.folder, "keeper.json") };
}

/**
 * Builds the domain of a machine, puts it on record, and lets it run.
 *
 * @param host What to work with
 * @param spec The machine
 * @param files Its files, with the initramfs joined
 * @param options Signal and progress
 * @returns What was put on record
 * @throws {MachineError} If it cannot be built; nothing stays then
 */
export async function launchDomain(
  host: XenHost,
  spec: MachineSpec,
  files: XenFiles,
  options: OperationOptions,
): Promise<XenRunFile> {
  const { xen, xenstore, paths } = host;
  const { signal, report = () => {} } = options;
  const kernel = await unpackKernel(spec.kernel!, {
    cache: paths.cache,
    signal: signal ?? new AbortController().signal,
    report,
  });
  for (const nic of uniqueNetworks(spec)) await hostNetwork(paths).ensureBridge(bridgeOf(spec, nic));
  let domain: DomainInfo | undefined;
  try {
    report("building the domain");
    const disks: XenDisk[] = [];
    for (const [index, disk] of spec.disks.entries()) disks.push(await attachDisk(spec, disk, index));
    const built = await buildDomain(xen, xenstore, {
      id: spec.id,
      name: domainName(spec),
      cpus: spec.cpus,
      maxCpus: maxCpusOf(spec),
      memory: spec.memory,
      maxMemory: spec.maxMemory,
      kernel,
      kernelName: spec.kernel!,
      initramfs: [files.initramfs],
      commandLine: commandLine(spec),
      disks,
      networks: spec.nics.map(({ mac }, index) => ({ index, mac, mtu: MTU })),
      furtherConsoles: spec.hasAgent ? FURTHER_CONSOLES : 0,
    }, signal ? { signal } : {});
    const { domid, pages, consolePort } = built;
    domain = xen.domain(domid);
    tune(xen, domid, spec);
    await plugInterfaces(paths, domid, spec, signal);
    const run: XenRunFile = { domid, pages, consolePort };
    await writeWhole(files.run, JSON.stringify(run));
    signal?.throwIfAborted();
    xen.unpause(domid);
    return run;
  } catch (error) {
    const built = domain;
    return await undo(
      error,
      async () => void (built && await destroyDomain(xen, xenstore, built)),
      () => releaseDisks(spec.id),
    );
  }
}

/**
 * Destroys all domains of a machine, whole ones and what is left of others, and gives their loop devices back.
 *
 * @param host What to work with
 * @param id Identity of the machine
 */
export async function sweepDomains({ xen, xenstore }: XenHost, id: string): Promise<void> {
  await destroyDomainsOf(xen, xenstore, id);
  releaseDisks(id);
}

/**
 * Changes what the scheduler does with a domain, while it runs too. Not all schedulers can: what is as it was is not asked
 * for.
 *
 * @param xen The hypervisor
 * @param domid The domain
 * @param spec The machine
 * @param before Its options before; those of a new domain unless told
 */
export function tune(
  xen: Xen,
  domid: number,
  spec: MachineSpec,
  before: XenMachineOptions = {},
): void {
  const { weight = NEW_SCHEDULE.weight, cap = NEW_SCHEDULE.cap, pin } = spec.engine as XenMachineOptions;
  const { weight: oldWeight, cap: oldCap } = { ...NEW_SCHEDULE, ...before };
  if (weight !== oldWeight || cap !== oldCap) xen.setSchedule(domid, { weight, cap });
  if (equal(pin, before.pin)) return;
  const all = Array.from({ length: xen.physicalInfo().maxCpuId + 1 }, (_, cpu) => cpu);
  for (let vcpu = 0; vcpu < maxCpusOf(spec); vcpu++) {
    const each = pin?.[vcpu];
    xen.setVcpuAffinity(domid, vcpu, typeof each === "object" ? each : pin?.flat() ?? all);
  }
}

/**
 * Tells how many vCPUs a machine can have until its next start.
 *
 * @param spec The machine
 * @returns How many
 */
export function maxCpusOf(spec: MachineSpec): number {
  return Math.max(spec.cpus, (spec.engine as XenMachineOptions).maxCpus ?? 0);
}

/**
 * Names a domain for other programs of the host.
 *
 * @param spec The machine
 * @returns Such as `shop-web_0`
 */
export function domainName(spec: Pick<MachineSpec, "stack" | "address">): string {
  return `${spec.stack}-${spec.address}`.replaceAll(/[^A-Za-z0-9_.-]/g, "_").replace(/_+$/, "");
}

function uniqueNetworks(spec: MachineSpec): MachineNic[] {
  return [...new Map(spec.nics.map((nic) => [nic.network, nic])).values()];
}

function commandLine(spec: MachineSpec): string {
  // Disks have no serial numbers here.
  const disks = spec.disks.map(({ serial }, index) => `hypertopia.disk=${serial}:${diskName(index)}`);
  return [COMMAND_LINE, ...disks, spec.cmdline].filter((word) => word !== "").join(" ");
}

/**
 * Finds the loop device of a file.
 *
 * @param path Path of the file
 * @returns Path of the device; undefined where there is none
 */
export function loopOf(path: string): string | undefined {
  // The kernel tells of files by paths without links.
  const file = Deno.realPathSync(path);
  return [...listLoops()].find(([, each]) => each === file)?.[0];
}

/** What others have attached too could be written by both. */
async function refuseBusy({ name, path }: MachineSpec["disks"][number], label: string): Promise<void> {
  const deadline = Date.now() + LOOP_TIMEOUT;
  while (true) {
    const busy = loopOf(path);
    if (busy === undefined) return;
    // The host's driver may still be about to let go of the domain before, or just have done so.
    const found = loopLabel(busy);
    if (found !== label && loopOf(path) === busy || Date.now() > deadline) {
      throw new MachineError(
        `Cannot give the disk "${name}" to a domain as "${path}" is attached to ${busy} already: end what uses it, ` +
          `then run "losetup -d ${busy}"`,
      );
    }
    await delay(10);
  }
}

async function attachDisk(
  { id }: MachineSpec,
  disk: MachineSpec["disks"][number],
  index: number,
): Promise<XenDisk> {
  if (disk.format !== "raw") {
    throw new MachineError(
      `Cannot give the disk "${disk.name}" to a domain as the kernel serves raw files only, and "${disk.path}" is ` +
        `${disk.format}: convert it`,
    );
  }
  if (!disk.readOnly) await refuseBusy(disk, loopLabelOf(id));
  // Others see that it is in use by the keeper's lock.
  lockDisk(disk)[Symbol.dispose]();
  const { isBlockDevice } = await Deno.stat(disk.path);
  const { major, minor } = isBlockDevice
    ? deviceNumber(disk.path)
    : attachLoop(disk.path, { readOnly: disk.readOnly, label: loopLabelOf(id) });
  return { index, major, minor, readOnly: disk.readOnly, discard: !disk.readOnly, file: disk.path };
}

/**
 * Locks a disk as the machines of other engines do, and QEMU.
 *
 * @param disk The disk
 * @returns The lock, held until it is disposed
 * @throws {MachineError} If others use the disk in a way that does not go together with this
 */
export function lockDisk({ name, path, readOnly }: MachineSpec["disks"][number]): DiskLock {
  try {
    return new DiskLock(path, readOnly);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : cause;
    throw new MachineError(`Cannot give the disk "${name}" to a domain: ${reason}`, { cause });
  }
}

function loopLabelOf(id: string): string {
  return `hypertopia ${id}`;
}

/** Gives back the loop devices of a machine's disks; the kernel waits until nobody uses them. */
function releaseDisks(id: string): void {
  const label = loopLabelOf(id);
  for (const device of listLoops().keys()) if (loopLabel(device) === label) detachLoop(device);
}

/** Plugs what netback makes, `vifDOMID.INDEX`, into bridges. */
async function plugInterfaces(
  paths: Paths,
  domid: number,
  spec: MachineSpec,
  signal: AbortSignal | undefined,
): Promise<void> {
  using interfaces = new NetworkInterfaces();
  const deadline = Date.now() + INTERFACE_TIMEOUT;
  for (const [index, nic] of spec.nics.entries()) {
    const name = `vif${domid}.${index}`;
    while (!interfaces.has(name)) {
      signal?.throwIfAborted();
      if (Date.now() > deadline) {
        throw new MachineError(
          `Cannot plug in the NIC "${nic.name}" as the kernel makes no interface for it: look at dmesg. Where xenstored ` +
            `was started anew, the kernel does not hear of devices until the host is restarted`,
        );
      }
      await delay(5);
    }
    await hostNetwork(paths).plugInterface(bridgeOf(spec, nic), name);
  }
}
