/**
 * Building and destroying domains. Whatever step fails, and wherever this process dies, nothing stays but what the next
 * {@linkcode destroyDomain} finds by the machine's identity.
 *
 * @module
 */

import { Struct } from "../../ffi/mod.ts";
import {
  type DomainInfo,
  type ForeignMapping,
  grantEntry,
  type Xen,
  type Xenstore,
} from "../../ffi/xen/mod.ts";
import { formatSize } from "../../dsl/mod.ts";
import type { BootMemory } from "../boot/linux.ts";
import { GuestMemoryError } from "../devices/guest_memory.ts";
import { MachineError } from "../errors.ts";
import { delay } from "../file_machine.ts";
import {
  domainEntries,
  HOST_ENTRIES,
  removeDomainTree,
  writeEntries,
  type XenDisk,
  type XenNetwork,
} from "./devices.ts";
import {
  identityPage,
  loadPvh,
  memoryExtents,
  memoryRegions,
  pvhContexts,
  pvhMemoryMap,
  SPECIAL_FRAMES,
} from "./pvh.ts";

const PAGE = 4096;
const KIBIBYTE = 2 ** 10;
const MEBIBYTE = 2 ** 20;
/** What a domain may have beyond its memory, in bytes: special pages, and room to move some. */
const MEMORY_SLACK = MEBIBYTE;
/** Most extents of one request, which nothing can interrupt. */
const MAX_EXTENTS = 512;
/** How long a destroyed domain may take to be gone, in milliseconds: until backends have let go of its memory. */
const GONE_TIMEOUT = 20_000;
/** How often it is looked whether it is, in milliseconds. */
const GONE_INTERVAL = 10;
/** Timers tick at once for each that was missed no more. */
const NO_DELAY_FOR_MISSED_TICKS = 1;
/** Entries of the grant table by which consoles and xenstored are let in (Xen 4.17 `xen/include/public/grant_table.h`). */
const GRANT = { console: 0, store: 1, permitAccess: 1 } as const;
/** What handles of our domains begin with, in ASCII. */
const HANDLE_PREFIX = "hypertop";

/** What a domain is made of. */
export interface DomainSpec {
  /** Identity of the machine: 16 hexadecimal digits. */
  readonly id: string;
  /** Its name for other programs. */
  readonly name: string;
  /** vCPUs that are on. */
  readonly cpus: number;
  /** vCPUs that can be on. */
  readonly maxCpus: number;
  /** Memory that it has once it has started, in bytes. */
  readonly memory: number;
  /** Memory that it can have, in bytes. */
  readonly maxMemory: number;
  /** Path of an ELF kernel. */
  readonly kernel: string;
  /** What the kernel is called in messages. */
  readonly kernelName: string;
  /** Paths of the parts of the initramfs. */
  readonly initramfs: readonly string[];
  /** Command line. */
  readonly commandLine: string;
  /** Disks; block devices of the host serve them. */
  readonly disks: readonly XenDisk[];
  /** Network interfaces. */
  readonly networks: readonly XenNetwork[];
  /** Consoles beside the kernel's. */
  readonly furtherConsoles: number;
}

/** A domain that is built, and paused. */
export interface BuiltDomain {
  /** Its number. */
  readonly domid: number;
  /** Pages that it has. */
  readonly pages: number;
  /** Its end of the event channel of the first console. */
  readonly consolePort: number;
}

/**
 * Makes the handle of a machine's domain.
 *
 * @param id Identity of the machine: 16 hexadecimal digits
 * @returns 16 bytes
 */
export function domainHandle(id: string): Uint8Array<ArrayBuffer> {
  const handle = new Uint8Array(16);
  handle.set(new TextEncoder().encode(HANDLE_PREFIX));
  handle.set(Uint8Array.fromHex(id), 8);
  return handle;
}

/**
 * Tells whose domain one is.
 *
 * @param handle The domain's handle
 * @returns Identity of the machine; undefined for domains that others have made
 */
export function machineOfHandle(handle: Uint8Array): string | undefined {
  return new TextDecoder("latin1").decode(handle.subarray(0, 8)) === HANDLE_PREFIX
    ? new Uint8Array(handle.subarray(8, 16)).toHex()
    : undefined;
}

/**
 * Prints a handle as the UUID that other programs know the domain by.
 *
 * @param handle 16 bytes
 * @returns The UUID
 */
export function handleUuid(handle: Uint8Array): string {
  return new Uint8Array(handle).toHex().replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

/**
 * Finds the domains of a machine: one, none, or several where a restart was cut short.
 *
 * @param xen The hypervisor
 * @param id Identity of the machine
 * @returns The domains
 */
export function domainsOf(xen: Xen, id: string): DomainInfo[] {
  return xen.listDomains().filter(({ handle }) => machineOfHandle(handle) === id);
}

/**
 * Builds a domain, with its entries in xenstore, and leaves it paused.
 *
 * @param xen The hypervisor
 * @param xenstore The connection
 * @param spec What it is made of
 * @param options Signal
 * @returns The domain
 * @throws {MachineError} If it cannot be built; nothing of it stays
 */
export async function buildDomain(
  xen: Xen,
  xenstore: Xenstore,
  spec: DomainSpec,
  options: { readonly signal?: AbortSignal } = {},
): Promise<BuiltDomain> {
  refuseLackOfMemory(xen, spec);
  await refuseTakenName(xen, xenstore, spec);
  const handle = domainHandle(spec.id);
  const domid = xen.createDomain({ handle, vcpus: spec.maxCpus, type: "pvh" });
  try {
    return await build(xen, xenstore, spec, domid, options.signal);
  } catch (error) {
    return await undo(error, () => destroyDomain(xen, xenstore, { domid, handle }));
  }
}

/**
 * Ends what has failed by undoing what there is of it. Where that fails as well, the first reason is still the one to tell.
 *
 * @param error Why it failed
 * @param steps Undo it; each runs, whatever becomes of those before
 * @throws {unknown} The error, with what could not be undone where it is one of words
 */
export async function undo(
  error: unknown,
  ...steps: readonly (() => void | Promise<void>)[]
): Promise<never> {
  const reasons: string[] = [];
  for (const step of steps) {
    try {
      await step();
    } catch (reason) {
      reasons.push(reason instanceof Error ? reason.message : String(reason));
    }
  }
  if (reasons.length === 0 || !(error instanceof Error)) throw error;
  throw new MachineError(`${error.message}. Nor could all of it be undone: ${reasons.join("; ")}`, {
    cause: error,
  });
}

/**
 * Destroys a domain and removes its entries; the host's drivers let go of its devices then. Nothing happens where it is gone.
 *
 * @param xen The hypervisor
 * @param xenstore The connection
 * @param domain The domain
 * @throws {MachineError} If something keeps its memory
 */
export async function destroyDomain(
  xen: Xen,
  xenstore: Xenstore,
  domain: Pick<DomainInfo, "domid" | "handle">,
): Promise<void> {
  const { domid, handle } = domain;
  if (find(xen, domain)) xen.destroy(domid);
  await xenstore.release(domid);
  await removeDomainTree(xenstore, domid, handleUuid(handle));
  const deadline = Date.now() + GONE_TIMEOUT;
  while (find(xen, domain)) {
    if (Date.now() > deadline) {
      throw new MachineError(
        `Cannot destroy the domain ${domid} whole as something still maps its memory: look for a process that does, ` +
          `and for devices below /sys/bus/xen-backend/devices, then try again`,
      );
    }
    await delay(GONE_INTERVAL);
  }
}

/**
 * Destroys all domains of a machine, whole ones and what is left of others: of one that is gone already, its entries.
 *
 * @param xen The hypervisor
 * @param xenstore The connection
 * @param id Identity of the machine
 * @throws {MachineError} If something keeps the memory of one
 */
export async function destroyDomainsOf(xen: Xen, xenstore: Xenstore, id: string): Promise<void> {
  for (const domain of domainsOf(xen, id)) await destroyDomain(xen, xenstore, domain);
  const uuid = handleUuid(domainHandle(id));
  const domid = await xenstore.read(`/vm/${uuid}/domid`);
  if (domid === undefined) return;
  // Whoever destroyed it may have died before the rest. Its number may be another domain's by now.
  const isItsOwn = await xenstore.read(`/local/domain/${domid}/vm`) === `/vm/${uuid}`;
  if (!isItsOwn) return await xenstore.remove(`/vm/${uuid}`);
  await xenstore.release(Number(domid));
  await removeDomainTree(xenstore, Number(domid), uuid);
}

/** Numbers are given anew: the same one may be another domain by now. */
function find(xen: Xen, { domid, handle }: Pick<DomainInfo, "domid" | "handle">): DomainInfo | undefined {
  const found = xen.domain(domid);
  return found && handleUuid(found.handle) === handleUuid(handle) ? found : undefined;
}

function refuseLackOfMemory(xen: Xen, { name, maxMemory, maxCpus }: DomainSpec): void {
  const free = xen.physicalInfo().freePages * PAGE;
  const needed = maxMemory + MEMORY_SLACK + pagingPool(maxMemory, maxCpus);
  if (free >= needed) return;
  throw new MachineError(
    `Cannot build the domain "${name}" as it takes ${
      formatSize(ceilMebibyte(needed))
    }, as much as its maxMemory, ` +
      `and Xen has ${
        formatSize(ceilMebibyte(free) - MEBIBYTE)
      } free: give it less memory or maxMemory, stop others, ` +
      `or lower dom0_mem on Xen's command line`,
  );
}

function ceilMebibyte(size: number): number {
  return Math.ceil(size / MEBIBYTE) * MEBIBYTE;
}

async function refuseTakenName(xen: Xen, xenstore: Xenstore, { id, name }: DomainSpec): Promise<void> {
  const others = xen.listDomains().filter(({ handle }) => machineOfHandle(handle) !== id);
  const names = await Promise.all(others.map(({ domid }) => xenstore.read(`/local/domain/${domid}/name`)));
  const taken = names.indexOf(name);
  if (taken < 0) return;
  throw new MachineError(
    `Cannot build the domain "${name}" as domain ${
      others[taken]!.domid
    }, which is not of this stack, has that name: ` +
      `rename one of them`,
  );
}

/** What Xen keeps of a domain's page tables, in bytes. */
function pagingPool(memory: number, cpus: number): number {
  return PAGE * (256 * cpus + Math.ceil(memory / MEBIBYTE));
}

async function build(
  xen: Xen,
  xenstore: Xenstore,
  spec: DomainSpec,
  domid: number,
  signal: AbortSignal | undefined,
): Promise<BuiltDomain> {
  const { cpus, maxCpus, memory, maxMemory } = spec;
  xen.setMaxVcpus(domid, maxCpus);
  xen.setMaxMemory(domid, (maxMemory + MEMORY_SLACK) / KIBIBYTE);
  const storePort = xen.allocateUnbound(domid, 0);
  const consolePort = xen.allocateUnbound(domid, 0);
  xen.setParameter(domid, "TIMER_MODE", NO_DELAY_FOR_MISSED_TICKS);
  xen.setPagingPool(domid, pagingPool(maxMemory, maxCpus));
  await populate(xen, spec, domid, signal);
  xen.setMemoryMap(
    domid,
    pvhMemoryMap(maxMemory).map(({ address, length, type }) => ({
      address: BigInt(address),
      size: BigInt(length),
      type,
    })),
  );
  const entry = load(xen, spec, domid);
  setUpSpecialPages(xen, domid);
  for (
    const [parameter, value] of [
      ["STORE_PFN", SPECIAL_FRAMES.store],
      ["STORE_EVTCHN", BigInt(storePort)],
      ["CONSOLE_PFN", SPECIAL_FRAMES.console],
      ["CONSOLE_EVTCHN", BigInt(consolePort)],
      // An address, where the others are frames.
      ["IDENT_PT", SPECIAL_FRAMES.identity * BigInt(PAGE)],
    ] as const
  ) xen.setParameter(domid, parameter, value);
  for (const context of pvhContexts(xen.getContext(domid), entry, maxCpus)) xen.setContext(domid, context);
  signal?.throwIfAborted();
  const entries = domainEntries({
    domid,
    uuid: handleUuid(domainHandle(spec.id)),
    name: spec.name,
    memory: memory / KIBIBYTE,
    maxMemory: maxMemory / KIBIBYTE,
    cpus,
    maxCpus,
    store: { gfn: SPECIAL_FRAMES.store, port: storePort },
    console: { gfn: SPECIAL_FRAMES.console, port: consolePort },
    disks: spec.disks,
    networks: spec.networks,
    furtherConsoles: spec.furtherConsoles,
  });
  await xenstore.transaction(async (view) => {
    // Without a toolstack of Xen's own nobody has written these.
    if (await view.read("/local/domain/0/domid") === undefined) await writeEntries(view, HOST_ENTRIES);
    await writeEntries(view, entries);
  });
  await xenstore.introduce(domid, SPECIAL_FRAMES.store, storePort);
  return { domid, pages: xen.domain(domid)!.pages, consolePort };
}

async function populate(
  xen: Xen,
  spec: DomainSpec,
  domid: number,
  signal: AbortSignal | undefined,
): Promise<void> {
  const special = Array.from(
    { length: SPECIAL_FRAMES.count },
    (_, index) => SPECIAL_FRAMES.first + BigInt(index),
  );
  const extents = memoryExtents(memoryRegions(spec.maxMemory));
  const orders = [...extents.keys()];
  for (const [index, order] of orders.entries()) {
    const frames = extents.get(order)!;
    for (let at = 0; at < frames.length;) {
      const part = frames.slice(at, at + MAX_EXTENTS);
      const done = xen.populate(domid, part, order);
      at += done;
      if (done < part.length) {
        // Memory in pieces is memory as well.
        const smaller = orders[index + 1];
        if (smaller === undefined) throw lackOfMemory(spec);
        const step = 1n << BigInt(smaller);
        const rest = frames.slice(at).flatMap((frame) =>
          Array.from({ length: 2 ** (order - smaller) }, (_, piece) => frame + BigInt(piece) * step)
        );
        extents.set(smaller, rest.concat(extents.get(smaller)!));
        break;
      }
      // Each takes a while; whoever wants to stop it can.
      await delay(0);
      signal?.throwIfAborted();
    }
  }
  if (xen.populate(domid, special, 0) < special.length) throw lackOfMemory(spec);
}

function lackOfMemory({ name }: DomainSpec): MachineError {
  return new MachineError(
    `Cannot build the domain "${name}" as Xen has no memory left for it: give it less, or stop others`,
  );
}

/** Memory of a domain, mapped as far as it is used. */
class DomainMemory implements BootMemory, Disposable {
  readonly regions: BootMemory["regions"];
  readonly #xen: Xen;
  readonly #domid: number;
  readonly #mappings: ForeignMapping[] = [];

  constructor(xen: Xen, domid: number, size: number) {
    this.#xen = xen;
    this.#domid = domid;
    let offset = 0;
    this.regions = memoryRegions(size).map(({ address, length }) => {
      const region = { address, length, offset };
      offset += length;
      return region;
    });
  }

  range(address: number, length: number): Uint8Array<ArrayBuffer> {
    const isThere = this.regions.some((region) =>
      address >= region.address && address + length <= region.address + region.length
    );
    if (!isThere) throw new GuestMemoryError(address, length);
    const first = Math.floor(address / PAGE);
    const count = Math.ceil((address + length) / PAGE) - first;
    const mapping = this.#xen.mapGuest(this.#domid, BigInt(first), count);
    this.#mappings.push(mapping);
    const offset = address - first * PAGE;
    return mapping.bytes.subarray(offset, offset + length);
  }

  [Symbol.dispose](): void {
    for (const mapping of this.#mappings) mapping[Symbol.dispose]();
  }
}

function load(xen: Xen, spec: DomainSpec, domid: number): ReturnType<typeof loadPvh> {
  using memory = new DomainMemory(xen, domid, spec.maxMemory);
  return loadPvh(memory, { ...spec, cpus: spec.maxCpus, memory: spec.maxMemory });
}

function setUpSpecialPages(xen: Xen, domid: number): void {
  {
    using pages = xen.mapGuest(domid, SPECIAL_FRAMES.first, SPECIAL_FRAMES.count);
    pages.bytes.fill(0);
    pages.bytes.set(identityPage(), Number(SPECIAL_FRAMES.identity - SPECIAL_FRAMES.first) * PAGE);
  }
  using table = xen.grantTable(domid);
  const { buffer, byteOffset } = table.bytes;
  for (
    const [index, frame] of [[GRANT.console, SPECIAL_FRAMES.console], [
      GRANT.store,
      SPECIAL_FRAMES.store,
    ]] as const
  ) {
    new Struct(grantEntry, buffer, byteOffset + index * grantEntry.size)
      .assign({ domid: 0, frame }).assign({ flags: GRANT.permitAccess });
  }
}
