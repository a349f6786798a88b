/**
 * The hypervisor's operations, as methods: domains, their memory, their vCPUs, and the machine that they share.
 *
 * @module
 */

import { type Field, type Layout, Struct } from "../layout.ts";
import {
  addressSize,
  allocUnbound,
  CDF,
  domainList,
  DOMCTL,
  domctlEnvelope,
  DOMID_ANY,
  DOMINF,
  E820_ENTRY_SIZE,
  EMULATION,
  EVTCHNOP,
  foreignMemoryMap,
  HVM_PARAM,
  hvmContext,
  HVMOP,
  hvmParameter,
  HYPERCALL,
  hypercallInit,
  maxMemory,
  maxVcpus,
  memoryReservation,
  MMUEXT,
  mmuExtOp,
  pagingPool,
  PHYSCAP,
  readConsole,
  remoteShutdown,
  SCHEDOP,
  SCHEDULER,
  SCHEDULER_OP,
  schedulerId,
  schedulerOp,
  SHADOW_OP_SET_ALLOCATION,
  shadowOp,
  SHUTDOWN,
  SYSCTL,
  sysctlEnvelope,
  tscInfo,
  vcpuAffinity,
  VCPUAFFINITY_HARD,
  vcpuContext,
  XEN_INTERFACES,
  type XenInterface,
  XENMEM,
  XENMEM_RESOURCE,
  XENVER,
} from "./layouts.ts";
import {
  type ForeignMapping,
  type HypercallBuffer,
  openPrivcmd,
  PAGE_SIZE,
  type Privcmd,
  XenError,
} from "./privcmd.ts";

/** Types of domains: with page tables of their own, with hardware's help and no device model, and with one. */
export type DomainType = "pv" | "pvh" | "hvm";

/** Why a domain has shut down; a number where Xen gives a reason that is not known. */
export type ShutdownReason = keyof typeof SHUTDOWN | number;

/** Name of a parameter of a PVH or HVM domain. */
export type HvmParameter = keyof typeof HVM_PARAM;

/** A version of Xen. */
export interface XenVersion {
  /** The first number. */
  readonly major: number;
  /** The second number. */
  readonly minor: number;
  /** What follows, such as `.7` or `.1-pre`. */
  readonly extra: string;
}

/** The machine. Pages have 4096 bytes. */
export interface PhysicalInfo {
  /** All pages. */
  readonly totalPages: number;
  /** Pages that no domain has. */
  readonly freePages: number;
  /** Pages of those that are still to be cleared. */
  readonly scrubPages: number;
  /** Pages of those that are promised to domains. */
  readonly outstandingPages: number;
  /** CPUs that are online. */
  readonly cpus: number;
  /** Highest number that a CPU may have. */
  readonly maxCpuId: number;
  /** Nodes that are online. */
  readonly nodes: number;
  /** Speed of the CPUs in kHz. */
  readonly cpuKhz: number;
  /** Whether HVM and PVH domains are possible. */
  readonly hasHvm: boolean;
  /** Whether PV domains are possible. */
  readonly hasPv: boolean;
  /** Whether hardware helps with page tables; without it and `hasShadow`, there are neither HVM nor PVH domains. */
  readonly hasHap: boolean;
  /** Whether Xen can keep page tables without such help. */
  readonly hasShadow: boolean;
  /** Whether an IOMMU lets domains have devices. */
  readonly hasDirectIo: boolean;
}

/** A domain. Pages have 4096 bytes. */
export interface DomainInfo {
  /** Its number. */
  readonly domid: number;
  /** Its 16 bytes of identity, which whoever made it has chosen. */
  readonly handle: Uint8Array<ArrayBuffer>;
  /** Its type. The control domain may be `hvm` with another set of devices. */
  readonly type: DomainType;
  /** Whether it is being destroyed. What remains of it then, others still use. */
  readonly isDying: boolean;
  /** Why it has shut down; left out while it has not. */
  readonly shutdownReason?: ShutdownReason;
  /** Whether it is paused. */
  readonly isPaused: boolean;
  /** Whether all of its vCPUs wait. */
  readonly isBlocked: boolean;
  /** Whether one of its vCPUs is on a CPU. */
  readonly isRunning: boolean;
  /** Pages that it has. */
  readonly pages: number;
  /** Most pages that it may have. */
  readonly maxPages: number;
  /** Pages that are promised to it. */
  readonly outstandingPages: number;
  /** CPU time that it has used, in nanoseconds. */
  readonly cpuTime: bigint;
  /** vCPUs that are online. */
  readonly onlineVcpus: number;
  /** Number of its last vCPU; left out where it has none yet. */
  readonly maxVcpuId?: number;
  /** Pool of CPUs that it runs in. */
  readonly cpuPool: number;
}

/** What a new domain is like for good. */
export interface CreateDomainOptions {
  /** Its 16 bytes of identity. */
  readonly handle: Uint8Array;
  /** Its type. */
  readonly type: DomainType;
  /** Number of its vCPUs; {@linkcode Xen.setMaxVcpus} must be given the same. */
  readonly vcpus: number;
  /** Highest port of its event channels; 1023 unless told. */
  readonly maxEventChannel?: number;
  /** Most pages of its grant table; what Xen was started with unless told. */
  readonly maxGrantFrames?: number;
  /** Most pages that keep count of the grants that it maps; what Xen was started with unless told. */
  readonly maxMaptrackFrames?: number;
  /** Highest version of its grant table, from 4.16 on; 1 unless told. */
  readonly grantVersion?: 1 | 2;
  /** Whether it may be given devices of the machine; not unless told. */
  readonly hasIommu?: boolean;
  /** Its number; a free one unless told. */
  readonly domid?: number;
}

/** A part of a domain's memory map. */
export interface MemoryMapEntry {
  /** Where it begins, in bytes. */
  readonly address: bigint;
  /** Its size in bytes. */
  readonly size: bigint;
  /** What is there: 1 for memory, 2 for what is reserved, 3 for ACPI's tables. */
  readonly type: number;
}

/** What a domain sees as the CPU's time-stamp counter. */
export interface TscInfo {
  /** 0: emulated where needed, 1: always, 2: never. */
  readonly mode: number;
  /** Its speed in kHz; 0 for the machine's. */
  readonly khz: number;
  /** How often the domain has been moved. */
  readonly incarnation: number;
  /** Nanoseconds that it has counted. */
  readonly elapsed: bigint;
}

/** A domain's part of the CPUs' time. */
export interface Schedule {
  /** Its part, where others want time, too: 256 is the usual one. */
  readonly weight: number;
  /** Most of it, in percent of one CPU; 0 for no limit. */
  readonly cap: number;
}

/** So many domains fit at first; the memory grows where there are more. */
const DOMAINS_AT_FIRST = 128;
/** Size of the memory for {@linkcode Xen.readLog}, in bytes, and how often it is filled at most. */
const LOG_CHUNK = 16384;
const MAX_LOG_CHUNKS = 4096;
const EAGAIN = 11;
const ERESTART = 85;
/** Size of `struct vcpu_guest_context`: the registers of a PV domain's vCPU. */
const PV_CONTEXT_SIZE = 5168;

/**
 * The hypervisor. All methods that call it throw {@linkcode XenError} where it refuses, and wait for it on this thread.
 *
 * @example
 * ```ts ignore
 * using xen = Xen.open();
 * for (const { domid, pages } of xen.listDomains()) console.log(domid, pages);
 * ```
 */
export class Xen implements Disposable {
  readonly #privcmd: Privcmd;
  readonly #interface: XenInterface;
  readonly #version: Pick<XenVersion, "major" | "minor">;
  #domainCapacity = DOMAINS_AT_FIRST;
  #scheduler: number | undefined;
  #hypercalls = 0;

  private constructor(privcmd: Privcmd) {
    this.#privcmd = privcmd;
    const number = Number(this.#call(HYPERCALL.xen_version, [XENVER.version, 0], "xen_version"));
    this.#version = { major: number >> 16, minor: number & 0xffff };
    const version = `${this.#version.major}.${this.#version.minor}`;
    const known = XEN_INTERFACES.find((candidate) => candidate.version === version);
    if (!known) {
      throw new Error(
        `Cannot use Xen ${version} as its interface is not known: run Xen ${
          XEN_INTERFACES.at(0)!.version
        } to ` +
          `${XEN_INTERFACES.at(-1)!.version}`,
      );
    }
    this.#interface = known;
    try {
      this.domain(0);
    } catch (error) {
      throw explainRefusal(version, error);
    }
  }

  /**
   * Begins to use the hypervisor: asks for its version, and tries whether its interface is as known.
   *
   * @param privcmd The way to it, which is taken over
   * @returns The hypervisor
   * @throws {Error} If the version is not known, or this is not the control domain
   */
  static open(privcmd: Privcmd = openPrivcmd()): Xen {
    try {
      return new Xen(privcmd);
    } catch (error) {
      privcmd[Symbol.dispose]();
      throw error;
    }
  }

  /** How many hypercalls were issued. */
  get hypercalls(): number {
    return this.#hypercalls;
  }

  /**
   * Tells the version.
   *
   * @returns The version
   */
  version(): XenVersion {
    return { ...this.#version, extra: this.#text(XENVER.extraversion, 16) };
  }

  /**
   * Tells which kinds of guests can run, in Xen's words.
   *
   * @returns Words such as `xen-3.0-x86_64 hvm-3.0-x86_64`
   */
  capabilities(): string {
    return this.#text(XENVER.capabilities, 1024).trim();
  }

  /**
   * Tells what the machine has.
   *
   * @returns Memory, CPUs, and what is possible
   */
  physicalInfo(): PhysicalInfo {
    return this.#sysctl("physinfo", this.#interface.physicalInfo, {}, (info) => {
      const capabilities = Number(info.get("capabilities"));
      return {
        totalPages: Number(info.get("total_pages")),
        freePages: Number(info.get("free_pages")),
        scrubPages: Number(info.get("scrub_pages")),
        outstandingPages: Number(info.get("outstanding_pages")),
        cpus: Number(info.get("nr_cpus")),
        maxCpuId: Number(info.get("max_cpu_id")),
        nodes: Number(info.get("nr_nodes")),
        cpuKhz: Number(info.get("cpu_khz")),
        hasHvm: (capabilities & PHYSCAP.hvm) !== 0,
        hasPv: (capabilities & PHYSCAP.pv) !== 0,
        hasHap: (capabilities & PHYSCAP.hap) !== 0,
        hasShadow: (capabilities & PHYSCAP.shadow) !== 0,
        hasDirectIo: (capabilities & PHYSCAP.directio) !== 0,
      };
    });
  }

  /**
   * Lists domains, by one hypercall as long as there are not many more than before.
   *
   * @param firstDomid The first one to list
   * @returns The domains by number, those that are being destroyed among them
   */
  listDomains(firstDomid = 0): DomainInfo[] {
    const layout = this.#interface.domainInfo;
    for (;;) {
      const capacity = this.#domainCapacity;
      using buffer = this.#privcmd.allocate(capacity * layout.size);
      const count = this.#sysctl(
        "getdomaininfolist",
        domainList,
        { first_domain: firstDomid, max_domains: capacity, buffer: buffer.address },
        (list) => Number(list.get("num_domains")),
      );
      if (count < capacity) {
        return Array.from(
          { length: count },
          (_, index) => toDomainInfo(structIn(layout, buffer, index * layout.size)),
        );
      }
      this.#domainCapacity *= 2;
    }
  }

  /**
   * Tells of a domain.
   *
   * @param domid Its number
   * @returns The domain; `undefined` where there is none
   */
  domain(domid: number): DomainInfo | undefined {
    try {
      // Up to 4.17, Xen tells of the next one where there is none of that number.
      const info = this.#domctl("getdomaininfo", domid, this.#interface.domainInfo, {}, toDomainInfo);
      return info.domid === domid ? info : undefined;
    } catch (error) {
      if (error instanceof XenError && error.code === "ESRCH") return undefined;
      throw error;
    }
  }

  /**
   * Makes a domain, paused and without memory.
   *
   * @param options What it is like
   * @returns Its number
   */
  createDomain(options: CreateDomainOptions): number {
    const { handle, type, vcpus, domid = DOMID_ANY } = options;
    if (handle.length !== 16) {
      throw new RangeError(`Cannot make a domain with a handle of ${handle.length} bytes: give 16`);
    }
    const { createDomain } = this.#interface;
    using buffer = this.#domctlBuffer("createdomain", domid);
    const payload = structIn(createDomain, buffer, domctlEnvelope.fields.u[0]);
    payload.assign({
      flags: (type === "pv" ? 0 : CDF.hvm | CDF.hap) | (options.hasIommu ? CDF.iommu : 0),
      max_vcpus: vcpus,
      max_evtchn_port: options.maxEventChannel ?? 1023,
      // Negative: what Xen was started with.
      max_grant_frames: options.maxGrantFrames ?? -1,
      max_maptrack_frames: options.maxMaptrackFrames ?? -1,
      "arch.emulation_flags": type === "pv" ? 0 : EMULATION[type],
    });
    for (const [index, byte] of handle.entries()) payload.set("handle", byte, index);
    if ("grant_opts" in createDomain.fields) payload.set("grant_opts", options.grantVersion ?? 1);
    this.#call(
      HYPERCALL.domctl,
      [buffer.address],
      "domctl createdomain",
      domid === DOMID_ANY ? undefined : domid,
    );
    return Number(structIn(domctlEnvelope, buffer).get("domain"));
  }

  /**
   * Makes the vCPUs of a domain.
   *
   * @param domid The domain
   * @param count Their number, as {@linkcode Xen.createDomain} was told
   */
  setMaxVcpus(domid: number, count: number): void {
    this.#domctl("max_vcpus", domid, maxVcpus, { max: count });
  }

  /**
   * Limits the memory of a domain.
   *
   * @param domid The domain
   * @param kibibytes The limit in KiB; less than it has only keeps it from getting more
   */
  setMaxMemory(domid: number, kibibytes: number): void {
    this.#domctl("max_mem", domid, maxMemory, { max_memkb: kibibytes });
  }

  /**
   * Sets the memory that Xen keeps for a domain's page tables. Without enough of it, a PVH or HVM domain gets no memory.
   *
   * @param domid The domain
   * @param bytes How much; rounded up to pages, and up to 4.16 to MiB
   */
  setPagingPool(domid: number, bytes: number): void {
    restart(() => {
      if (this.#interface.hasPagingPool) {
        this.#domctl("set_paging_mempool_size", domid, pagingPool, {
          size: Math.ceil(bytes / PAGE_SIZE) * PAGE_SIZE,
        });
      } else {
        this.#domctl("shadow_op", domid, shadowOp, {
          op: SHADOW_OP_SET_ALLOCATION,
          mb: Math.ceil(bytes / 2 ** 20),
        });
      }
    });
  }

  /**
   * Makes a port of a domain that another domain may connect to.
   *
   * @param domid The domain
   * @param remote The other domain
   * @returns The port
   */
  allocateUnbound(domid: number, remote: number): number {
    using buffer = this.#privcmd.allocate(allocUnbound.size);
    const request = structIn(allocUnbound, buffer).assign({ dom: domid, remote_dom: remote });
    this.#call(
      HYPERCALL.event_channel_op,
      [EVTCHNOP.alloc_unbound, buffer.address],
      "event_channel_op alloc_unbound",
      domid,
    );
    return Number(request.get("port"));
  }

  /**
   * Reads a parameter of a PVH or HVM domain.
   *
   * @param domid The domain
   * @param name The parameter
   * @returns Its value
   */
  getParameter(domid: number, name: HvmParameter): bigint {
    return this.#parameter("get_param", domid, name, 0n);
  }

  /**
   * Sets a parameter of a PVH or HVM domain.
   *
   * @param domid The domain
   * @param name The parameter
   * @param value Its value
   */
  setParameter(domid: number, name: HvmParameter, value: number | bigint): void {
    this.#parameter("set_param", domid, name, value);
  }

  /**
   * Gives a domain memory.
   *
   * @param domid The domain
   * @param frames First guest frame of each extent, a multiple of its size
   * @param order Size of each extent: two to that power of pages
   * @returns How many extents it has got. Fewer than asked for: Xen has no memory, the domain may not have more, its paging
   * pool is too small, or something is there already; Xen does not say which
   */
  populate(domid: number, frames: BigUint64Array | readonly bigint[], order: number): number {
    return this.#populate(domid, frames, order, (done) => done);
  }

  /**
   * Gives a PV domain memory.
   *
   * @param domid The domain
   * @param frames First frame of each extent, in the domain's own count
   * @param order Size of each extent: two to that power of pages
   * @returns First machine frame of each extent that it has got
   */
  populateMachine(domid: number, frames: BigUint64Array | readonly bigint[], order: number): BigUint64Array {
    return this.#populate(domid, frames, order, (done, extents) => extents.slice(0, done));
  }

  /**
   * Promises a domain memory, so that it cannot be given to another one meanwhile. What the domain is given is taken from
   * the promise.
   *
   * @param domid The domain
   * @param count Number of pages that it has and will have, not more than its limit; 0 ends the promise
   * @throws {XenError} With `ENOMEM` if there are not so many, and with `EINVAL` if it has a promise already
   */
  claimPages(domid: number, count: number): void {
    using buffer = this.#privcmd.allocate(memoryReservation.size);
    structIn(memoryReservation, buffer).assign({ nr_extents: count, domid });
    this.#call(
      HYPERCALL.memory_op,
      [XENMEM.claim_pages, buffer.address],
      "memory_op claim_pages",
      domid,
    );
  }

  /**
   * Sets the memory map that a domain can ask for.
   *
   * @param domid The domain
   * @param entries Its parts, by address
   */
  setMemoryMap(domid: number, entries: readonly MemoryMapEntry[]): void {
    using list = this.#privcmd.allocate(entries.length * E820_ENTRY_SIZE);
    const view = new DataView(list.bytes.buffer, list.bytes.byteOffset, list.bytes.length);
    for (const [index, { address, size, type }] of entries.entries()) {
      view.setBigUint64(index * E820_ENTRY_SIZE, address, true);
      view.setBigUint64(index * E820_ENTRY_SIZE + 8, size, true);
      view.setUint32(index * E820_ENTRY_SIZE + 16, type, true);
    }
    using buffer = this.#privcmd.allocate(foreignMemoryMap.size);
    structIn(foreignMemoryMap, buffer)
      .assign({ domid, "map.nr_entries": entries.length, "map.buffer": list.address });
    this.#call(
      HYPERCALL.memory_op,
      [XENMEM.set_memory_map, buffer.address],
      "memory_op set_memory_map",
      domid,
    );
  }

  /**
   * Reads the state of a PVH or HVM domain's vCPUs and emulated devices.
   *
   * @param domid The domain
   * @returns Its records
   */
  getContext(domid: number): Uint8Array<ArrayBuffer> {
    const size = this.#domctl(
      "gethvmcontext",
      domid,
      hvmContext,
      {},
      (context) => Number(context.get("size")),
    );
    using buffer = this.#privcmd.allocate(size);
    const written = this.#domctl(
      "gethvmcontext",
      domid,
      hvmContext,
      { size, buffer: buffer.address },
      (context) => Number(context.get("size")),
    );
    return buffer.bytes.slice(0, written);
  }

  /**
   * Sets the state of a PVH or HVM domain's vCPUs and emulated devices.
   *
   * @param domid The domain
   * @param context Records: a header, those to be set, an end
   */
  setContext(domid: number, context: Uint8Array): void {
    using buffer = this.#privcmd.allocate(context.length);
    buffer.bytes.set(context);
    this.#domctl("sethvmcontext", domid, hvmContext, { size: context.length, buffer: buffer.address });
  }

  /**
   * Maps memory of a domain that follows one another.
   *
   * @param domid The domain
   * @param firstFrame The first guest frame
   * @param count Number of pages
   * @returns The memory
   */
  mapGuest(domid: number, firstFrame: number | bigint, count: number): ForeignMapping {
    const frames = new BigUint64Array(count);
    for (let index = 0, frame = BigInt(firstFrame); index < count; index++, frame++) frames[index] = frame;
    return this.#privcmd.mapForeign(domid, frames);
  }

  /**
   * Maps any memory of a domain.
   *
   * @param domid The domain
   * @param frames Guest frames; machine frames of a PV domain
   * @returns The memory, one page behind another
   */
  mapFrames(domid: number, frames: BigUint64Array | readonly bigint[]): ForeignMapping {
    return this.#privcmd.mapForeign(domid, frames);
  }

  /**
   * Maps the first page of a domain's grant table, of version 1: 512 entries of 8 bytes.
   *
   * @param domid The domain
   * @returns The memory
   */
  grantTable(domid: number): ForeignMapping {
    return this.#privcmd.mapResource(domid, XENMEM_RESOURCE.grant_table, 0, 0, 1);
  }

  /**
   * Tells what a domain sees as the time-stamp counter.
   *
   * @param domid The domain
   * @returns It
   */
  getTsc(domid: number): TscInfo {
    return this.#domctl("gettscinfo", domid, tscInfo, {}, (info) => ({
      mode: Number(info.get("tsc_mode")),
      khz: Number(info.get("gtsc_khz")),
      incarnation: Number(info.get("incarnation")),
      elapsed: info.get("elapsed_nsec"),
    }));
  }

  /**
   * Sets what a domain sees as the time-stamp counter, while it is paused.
   *
   * @param domid The domain
   * @param tsc What it shall see; the machine's own counter for what is left out
   */
  setTsc(domid: number, { mode = 0, khz = 0, incarnation = 0, elapsed = 0n }: Partial<TscInfo> = {}): void {
    this.#domctl("settscinfo", domid, tscInfo, {
      tsc_mode: mode,
      gtsc_khz: khz,
      incarnation,
      elapsed_nsec: elapsed,
    });
  }

  /**
   * Pauses a domain. Pauses are counted.
   *
   * @param domid The domain
   */
  pause(domid: number): void {
    this.#domctl("pausedomain", domid);
  }

  /**
   * Takes back a pause; the first one starts a new domain.
   *
   * @param domid The domain
   */
  unpause(domid: number): void {
    this.#domctl("unpausedomain", domid);
  }

  /**
   * Lets a domain go on that has shut down to be suspended.
   *
   * @param domid The domain
   */
  resume(domid: number): void {
    this.#domctl("resumedomain", domid);
  }

  /**
   * Destroys a domain. It stays in the list, dying, for as long as others use its memory.
   *
   * @param domid The domain
   */
  destroy(domid: number): void {
    restart(() => this.#domctl("destroydomain", domid));
  }

  /**
   * Shuts a domain down, at once and without its help.
   *
   * @param domid The domain
   * @param reason Why
   */
  remoteShutdown(domid: number, reason: keyof typeof SHUTDOWN): void {
    using buffer = this.#privcmd.allocate(remoteShutdown.size);
    structIn(remoteShutdown, buffer).assign({ domain_id: domid, reason: SHUTDOWN[reason] });
    this.#call(
      HYPERCALL.sched_op,
      [SCHEDOP.remote_shutdown, buffer.address],
      "sched_op remote_shutdown",
      domid,
    );
  }

  /**
   * Binds a vCPU to CPUs.
   *
   * @param domid The domain
   * @param vcpu The vCPU
   * @param cpus The CPUs that it may run on
   */
  setVcpuAffinity(domid: number, vcpu: number, cpus: readonly number[]): void {
    const bits = Math.ceil((Math.max(-1, ...cpus) + 1) / 64) * 64;
    using map = this.#privcmd.allocate(bits / 8);
    for (const cpu of cpus) map.bytes[cpu >> 3]! |= 1 << (cpu & 7);
    this.#domctl("setvcpuaffinity", domid, vcpuAffinity, {
      vcpu,
      flags: VCPUAFFINITY_HARD,
      "cpumap_hard.bitmap": map.address,
      "cpumap_hard.nr_bits": bits,
    });
  }

  /**
   * Tells which scheduler shares out the CPUs.
   *
   * @returns Its name in Xen's options, such as `credit2`; its number where it is not known
   */
  schedulerName(): string {
    const id = this.#schedulerId();
    const name = Object.entries(SCHEDULER).find(([, number]) => number === id)?.[0];
    return name?.toLowerCase() ?? String(id);
  }

  /**
   * Tells a domain's part of the CPUs' time.
   *
   * @param domid The domain
   * @returns It
   * @throws {Error} If the scheduler is neither `credit` nor `credit2`
   */
  getSchedule(domid: number): Schedule {
    return this.#schedule(domid, { cmd: SCHEDULER_OP.getinfo });
  }

  /**
   * Sets a domain's part of the CPUs' time. What is left out stays as it is.
   *
   * @param domid The domain
   * @param schedule The part
   * @throws {Error} If the scheduler is neither `credit` nor `credit2`
   */
  setSchedule(domid: number, schedule: Partial<Schedule>): void {
    // The two schedulers have other values for "as it is".
    const { weight, cap } = { ...this.getSchedule(domid), ...schedule };
    this.#schedule(domid, { cmd: SCHEDULER_OP.putinfo, "u.credit2.weight": weight, "u.credit2.cap": cap });
  }

  /**
   * Reads what Xen has logged.
   *
   * @returns The text that is still there
   */
  readLog(): string {
    using buffer = this.#privcmd.allocate(LOG_CHUNK);
    const decoder = new TextDecoder();
    let text = "";
    let index = 0;
    for (let chunk = 0; chunk < MAX_LOG_CHUNKS; chunk++) {
      const count = this.#sysctl(
        "readconsole",
        readConsole,
        // From the start, and then from where the last one has ended.
        { incremental: chunk > 0 ? 1 : 0, index, buffer: buffer.address, count: LOG_CHUNK },
        (result) => {
          index = Number(result.get("index"));
          return Number(result.get("count"));
        },
      );
      // The decoder takes no memory that is mapped from a device on its word: a copy is its own.
      text += decoder.decode(buffer.bytes.slice(0, count), { stream: true });
      if (count < LOG_CHUNK) break;
    }
    return text + decoder.decode();
  }

  /**
   * Makes a PV domain a 64-bit one, before it has memory.
   *
   * @param domid The domain
   */
  setAddressSize64(domid: number): void {
    this.#domctl("set_address_size", domid, addressSize, { size: 64 });
  }

  /**
   * Writes a PV domain's page by which it calls Xen.
   *
   * @param domid The domain
   * @param frame Machine frame of the page
   */
  initHypercallPage(domid: number, frame: bigint): void {
    this.#domctl("hypercall_init", domid, hypercallInit, { gmfn: frame });
  }

  /**
   * Tells Xen which frame of a PV domain's own count its machine frames are.
   *
   * @param domid The domain
   * @param machineFrames The machine frames
   * @param firstFrame What the first one is in the domain's own count; the others follow it
   */
  setMachineToPhysical(
    domid: number,
    machineFrames: BigUint64Array | readonly bigint[],
    firstFrame = 0,
  ): void {
    const count = machineFrames.length;
    if (count === 0) return;
    using buffer = this.#privcmd.allocate(count * 16);
    const words = new BigUint64Array(buffer.bytes.buffer, buffer.bytes.byteOffset, count * 2);
    for (let index = 0; index < count; index++) {
      // The low bits of the address tell what to do: 1 is MMU_MACHPHYS_UPDATE.
      words[2 * index] = (machineFrames[index]! * BigInt(PAGE_SIZE)) | 1n;
      words[2 * index + 1] = BigInt(firstFrame + index);
    }
    this.#call(HYPERCALL.mmu_update, [buffer.address, count, 0, domid], "mmu_update", domid);
  }

  /**
   * Lets a PV domain's page be the top of a 4-level page table. No part of the table may be mapped to be written.
   *
   * @param domid The domain
   * @param frame Machine frame of the page
   */
  pinPageTable(domid: number, frame: bigint): void {
    using buffer = this.#privcmd.allocate(mmuExtOp.size);
    structIn(mmuExtOp, buffer).assign({ cmd: MMUEXT.PIN_L4_TABLE, "arg1.mfn": frame });
    this.#call(HYPERCALL.mmuext_op, [buffer.address, 1, 0, domid], "mmuext_op pin_l4_table", domid);
  }

  /**
   * Sets the registers of a PV domain's vCPU.
   *
   * @param domid The domain
   * @param vcpu The vCPU
   * @param context `struct vcpu_guest_context`, of 5168 bytes
   */
  setVcpuContext(domid: number, vcpu: number, context: Uint8Array): void {
    if (context.length !== PV_CONTEXT_SIZE) {
      throw new RangeError(
        `Cannot set the registers of vCPU ${vcpu} of domain ${domid} by ${context.length} bytes: give ${PV_CONTEXT_SIZE}`,
      );
    }
    using buffer = this.#privcmd.allocate(context.length);
    buffer.bytes.set(context);
    restart(() => this.#domctl("setvcpucontext", domid, vcpuContext, { vcpu, ctxt: buffer.address }));
  }

  /** Gives the way to the hypervisor back. Domains stay as they are. */
  [Symbol.dispose](): void {
    this.#privcmd[Symbol.dispose]();
  }

  #call(op: number, args: readonly (number | bigint)[], name: string, domid?: number): bigint {
    this.#hypercalls++;
    return this.#privcmd.hypercall(op, args, name, domid);
  }

  #domctlBuffer(command: keyof typeof DOMCTL, domid: number): HypercallBuffer {
    const buffer = this.#privcmd.allocate(domctlEnvelope.size);
    structIn(domctlEnvelope, buffer).assign({
      cmd: DOMCTL[command],
      interface_version: this.#interface.domctl,
      domain: domid,
    });
    return buffer;
  }

  #domctl(command: keyof typeof DOMCTL, domid: number): void;
  #domctl<F extends Readonly<Record<string, Field>>, T = void>(
    command: keyof typeof DOMCTL,
    domid: number,
    layout: Layout<F>,
    values: { readonly [K in keyof F & string]?: number | bigint },
    take?: (result: Struct<F>) => T,
  ): T;
  #domctl<F extends Readonly<Record<string, Field>>, T>(
    command: keyof typeof DOMCTL,
    domid: number,
    layout?: Layout<F>,
    values: { readonly [K in keyof F & string]?: number | bigint } = {},
    take?: (result: Struct<F>) => T,
  ): T | void {
    using buffer = this.#domctlBuffer(command, domid);
    const payload = layout && structIn(layout, buffer, domctlEnvelope.fields.u[0]).assign(values);
    this.#call(HYPERCALL.domctl, [buffer.address], `domctl ${command}`, domid);
    if (payload) return take?.(payload);
  }

  #sysctl<F extends Readonly<Record<string, Field>>, T>(
    command: keyof typeof SYSCTL,
    layout: Layout<F>,
    values: { readonly [K in keyof F & string]?: number | bigint },
    take: (result: Struct<F>) => T,
  ): T {
    using buffer = this.#privcmd.allocate(sysctlEnvelope.size);
    structIn(sysctlEnvelope, buffer).assign({
      cmd: SYSCTL[command],
      interface_version: this.#interface.sysctl,
    });
    const payload = structIn(layout, buffer, sysctlEnvelope.fields.u[0]).assign(values);
    this.#call(HYPERCALL.sysctl, [buffer.address], `sysctl ${command}`);
    return take(payload);
  }

  #text(question: number, size: number): string {
    using buffer = this.#privcmd.allocate(size);
    this.#call(HYPERCALL.xen_version, [question, buffer.address], "xen_version");
    const end = buffer.bytes.indexOf(0);
    return new TextDecoder().decode(buffer.bytes.slice(0, end < 0 ? size : end));
  }

  #parameter(
    operation: keyof typeof HVMOP,
    domid: number,
    name: HvmParameter,
    value: number | bigint,
  ): bigint {
    using buffer = this.#privcmd.allocate(hvmParameter.size);
    const request = structIn(hvmParameter, buffer).assign({ domid, index: HVM_PARAM[name], value });
    this.#call(
      HYPERCALL.hvm_op,
      [HVMOP[operation], buffer.address],
      `hvm_op ${operation} ${name}`,
      domid,
    );
    return request.get("value");
  }

  #populate<T>(
    domid: number,
    frames: BigUint64Array | readonly bigint[],
    order: number,
    take: (done: number, extents: BigUint64Array) => T,
  ): T {
    using list = this.#privcmd.allocate(frames.length * 8);
    const extents = new BigUint64Array(list.bytes.buffer, list.bytes.byteOffset, frames.length);
    extents.set(frames as readonly bigint[]);
    using buffer = this.#privcmd.allocate(memoryReservation.size);
    structIn(memoryReservation, buffer).assign({
      extent_start: list.address,
      nr_extents: frames.length,
      extent_order: order,
      domid,
    });
    const done = this.#call(
      HYPERCALL.memory_op,
      [XENMEM.populate_physmap, buffer.address],
      "memory_op populate_physmap",
      domid,
    );
    return take(Number(done), extents);
  }

  #schedulerId(): number {
    return this.#scheduler ??= this.#sysctl(
      "sched_id",
      schedulerId,
      {},
      (result) => Number(result.get("sched_id")),
    );
  }

  #schedule(
    domid: number,
    values: { readonly [K in keyof typeof schedulerOp.fields]?: number },
  ): Schedule {
    const id = this.#schedulerId();
    if (id !== SCHEDULER.CREDIT && id !== SCHEDULER.CREDIT2) {
      throw new Error(
        `Cannot use weights and caps of domain ${domid} as Xen runs the scheduler "${this.schedulerName()}": ` +
          `start Xen with sched=credit2`,
      );
    }
    return this.#domctl("scheduler_op", domid, schedulerOp, { sched_id: id, ...values }, (result) => ({
      weight: Number(result.get("u.credit2.weight")),
      cap: Number(result.get("u.credit2.cap")),
    }));
  }
}

/** Lays a structure over memory for arguments. */
function structIn<F extends Readonly<Record<string, Field>>>(
  layout: Layout<F>,
  { bytes }: HypercallBuffer,
  offset = 0,
): Struct<F> {
  return new Struct(layout, bytes.buffer, bytes.byteOffset + offset);
}

function toDomainInfo(info: Struct<XenInterface["domainInfo"]["fields"]>): DomainInfo {
  const flags = Number(info.get("flags"));
  const maxVcpuId = Number(info.get("max_vcpu_id"));
  return {
    domid: Number(info.get("domain")),
    handle: Uint8Array.from({ length: 16 }, (_, index) => Number(info.get("handle", index))),
    type: (flags & DOMINF.hvm_guest) === 0
      ? "pv"
      : Number(info.get("arch_config.emulation_flags")) === EMULATION.pvh
      ? "pvh"
      : "hvm",
    isDying: (flags & DOMINF.dying) !== 0,
    ...((flags & DOMINF.shutdown) !== 0
      ? { shutdownReason: shutdownReason(flags >>> DOMINF.shutdownshift & DOMINF.shutdownmask) }
      : {}),
    isPaused: (flags & DOMINF.paused) !== 0,
    isBlocked: (flags & DOMINF.blocked) !== 0,
    isRunning: (flags & DOMINF.running) !== 0,
    pages: Number(info.get("tot_pages")),
    maxPages: Number(info.get("max_pages")),
    outstandingPages: Number(info.get("outstanding_pages")),
    cpuTime: info.get("cpu_time"),
    onlineVcpus: Number(info.get("nr_online_vcpus")),
    ...(maxVcpuId === 0xffff_ffff ? {} : { maxVcpuId }),
    cpuPool: Number(info.get("cpupool")),
  };
}

function shutdownReason(code: number): ShutdownReason {
  const name = Object.entries(SHUTDOWN).find(([, number]) => number === code)?.[0];
  return name as keyof typeof SHUTDOWN | undefined ?? code;
}

/** Calls again for as long as Xen has only done a part of what takes long. */
function restart(call: () => void): void {
  for (;;) {
    try {
      return call();
    } catch (error) {
      if (!(error instanceof XenError) || (error.errno !== EAGAIN && error.errno !== ERESTART)) throw error;
    }
  }
}

function explainRefusal(version: string, error: unknown): unknown {
  if (!(error instanceof XenError)) return error;
  switch (error.code) {
    case "EPERM":
      return new Error(
        "Cannot use Xen as this is not its control domain: run this in the domain that Xen has started (dom0)",
        { cause: error },
      );
    case "EACCES":
      return new Error(
        `Cannot use Xen ${version} as its interface is not the one of the release ${version}: run a release of Xen`,
        { cause: error },
      );
    default:
      return error;
  }
}
