/**
 * A double of the hypervisor for tests. It decodes hypercalls itself, by offsets written down a second time from Xen's
 * public headers (4.14 to 4.22), so that the tables of `layouts.ts` are compared with another reading of them.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { SysError } from "../errno.ts";
import { Fd } from "../fd.ts";
import { type EventChannelDevice, EVTCHN } from "./evtchn.ts";
import { GNTDEV, type GrantDevice } from "./gntdev.ts";
import { type ForeignMapping, type HypercallBuffer, PAGE_SIZE, type Privcmd, XenError } from "./privcmd.ts";

/** Numbers of errors by name, also to be injected. */
export const XEN_ERRNO = {
  EPERM: 1,
  ESRCH: 3,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EFAULT: 14,
  EBUSY: 16,
  EEXIST: 17,
  EINVAL: 22,
  ENOSPC: 28,
  ENOSYS: 38,
  EOPNOTSUPP: 95,
} as const;

/** Offsets that differ, by minor version: `createdomain` has its own in the envelope's payload. */
interface Offsets {
  readonly domctl: number;
  readonly sysctl: number;
  readonly grantOptions?: number;
  readonly emulation: number;
  readonly infoSize: number;
  readonly infoEmulation: number;
  readonly totalPages: number;
}

/** What versions have in common, by the first of each kind. */
const sixteen = { grantOptions: 44, infoSize: 112, infoEmulation: 104 } as const;
const fourteen = { infoSize: 104, infoEmulation: 96, totalPages: 32 } as const;
const seventeen = { ...sixteen, emulation: 56, totalPages: 40 } as const;
const nineteen = { ...sixteen, emulation: 60, totalPages: 40 } as const;
const OFFSETS: Readonly<Record<number, Offsets>> = {
  14: { domctl: 0x12, sysctl: 0x13, emulation: 44, ...fourteen },
  15: { domctl: 0x13, sysctl: 0x13, emulation: 48, ...fourteen },
  16: { domctl: 0x14, sysctl: 0x14, emulation: 52, totalPages: 32, ...sixteen },
  17: { domctl: 0x15, sysctl: 0x15, ...seventeen },
  18: { domctl: 0x16, sysctl: 0x15, ...seventeen },
  19: { domctl: 0x17, sysctl: 0x15, ...nineteen },
  20: { domctl: 0x17, sysctl: 0x15, ...nineteen },
  21: { domctl: 0x17, sysctl: 0x16, ...nineteen },
  22: { domctl: 0x18, sysctl: 0x16, ...nineteen },
};

/** What kills the process of a test between two operations: nothing that follows in it has any effect. */
export class SimulatedDeath extends Error {
  /** Its name. */
  override readonly name = "SimulatedDeath";
}

/** What the machine of a fake hypervisor is like. */
export interface FakeHypervisorOptions {
  /** Version of Xen; `4.17` unless told. */
  readonly version?: string;
  /** Pages that no domain has at first; 262144 (1 GiB) unless told. */
  readonly freePages?: number;
  /** Pages of the control domain; 131072 unless told. */
  readonly controlPages?: number;
  /** Whether hardware helps with page tables; it does unless told. */
  readonly hasHap?: boolean;
  /** Whether it is the control domain that asks; it is unless told. */
  readonly isControlDomain?: boolean;
  /** Whether long operations are done in parts, with `EAGAIN` between them; not unless told. */
  readonly isSlow?: boolean;
  /** Scheduler's number; 6 (credit2) unless told. */
  readonly scheduler?: number;
  /** What Xen has logged. */
  readonly log?: string;
}

/** An event channel of a domain. */
export interface FakePort {
  /** The domain that may connect to it. */
  readonly remote: number;
  /** How many events the guest was sent. */
  events: number;
  /** Tells the one that is connected of the guest's events. */
  peer: (() => void) | undefined;
}

/** A domain of a fake hypervisor. */
export interface FakeDomain {
  /** Its number. */
  readonly domid: number;
  /** Its 16 bytes of identity. */
  readonly handle: Uint8Array<ArrayBuffer>;
  /** Its type. */
  readonly type: "pv" | "pvh" | "hvm";
  /** What it was made for. */
  readonly maxVcpus: number;
  /** How many were made. */
  vcpus: number;
  /** Most pages. */
  maxPages: number;
  /** Pages that it has. */
  pages: number;
  /** Pages that are promised to it beyond. */
  claimed: number;
  /** Bytes of its paging pool. */
  pagingPool: number;
  /** How often it is paused. */
  pauses: number;
  /** Whether it has ever run. */
  hasRun: boolean;
  /** Why it has shut down. */
  shutdown: number | undefined;
  /** Whether it is dying: something maps its memory yet. */
  isDying: boolean;
  /** Parameters by number. */
  readonly params: Map<number, bigint>;
  /** Ports by number, from 1 on. */
  readonly ports: Map<number, FakePort>;
  /** Extents that it was given: number of pages by first guest frame. */
  readonly extents: Map<bigint, number>;
  /** Pages that were touched, by guest frame: all others are zero. */
  readonly memory: Map<bigint, Uint8Array<ArrayBuffer>>;
  /** Its grant table. */
  readonly grants: Uint8Array<ArrayBuffer>;
  /** Its memory map. */
  memoryMap: readonly { readonly address: bigint; readonly size: bigint; readonly type: number }[];
  /** State of vCPUs and devices. */
  context: Uint8Array<ArrayBuffer>;
  /** What has been set by `settscinfo`: mode, kHz, incarnation. */
  tsc: readonly [mode: number, khz: number, incarnation: number, elapsed: bigint];
  /** CPUs of each vCPU; all where there is none. */
  readonly affinity: Map<number, readonly number[]>;
  /** Weight and cap. */
  schedule: { weight: number; cap: number };
  /** Of a PV domain: its own frame by machine frame, as it was told. */
  readonly machineToPhysical: Map<bigint, bigint>;
  /** Of a PV domain: page tables that are pinned, by machine frame. */
  readonly pinned: Set<bigint>;
  /** Of a PV domain: registers by vCPU. */
  readonly vcpuContexts: Map<number, Uint8Array<ArrayBuffer>>;
  /** How often its memory is mapped. */
  mappings: number;
}

/** A hypervisor in memory. It outlives what is made of it: a test asks it what a process that has died left behind. */
export class FakeHypervisor implements Privcmd {
  /** What was done, in words, such as `populate 1 order 9: 64 of 64`. What has failed is not there. */
  readonly log: string[] = [];
  /** Domains by number. */
  readonly domains: Map<number, FakeDomain> = new Map();
  /** Pages that no domain has. */
  freePages: number;
  readonly #options: FakeHypervisorOptions;
  readonly #minor: number;
  readonly #offsets: Offsets;
  readonly #buffers = new Map<bigint, Uint8Array<ArrayBuffer>>();
  readonly #failures: {
    readonly when: (operation: string, index: number) => boolean;
    readonly errno: number;
  }[] = [];
  #nextAddress = 0x7f00_0000_0000n;
  #nextDomid = 1;
  #operations = 0;
  #deathAt = Infinity;
  #isDead = false;
  #owesRestart = new Set<string>();

  /**
   * Makes a machine with a control domain.
   *
   * @param options What it is like
   */
  constructor(options: FakeHypervisorOptions = {}) {
    this.#options = options;
    this.freePages = options.freePages ?? 262144;
    this.#minor = Number((options.version ?? "4.17").split(".")[1]);
    // A version that is not known still tells its number.
    this.#offsets = OFFSETS[this.#minor] ?? OFFSETS[17]!;
    const control = newDomain(0, new Uint8Array(16), "pv", 2);
    control.vcpus = 2;
    control.pauses = 0;
    control.hasRun = true;
    control.pages = control.maxPages = options.controlPages ?? 131072;
    this.domains.set(0, control);
  }

  /** How many operations were asked for: hypercalls and mappings, also those that failed. */
  get operations(): number {
    return this.#operations;
  }

  /** Buffers for arguments that were not given back. */
  get buffers(): number {
    return this.#buffers.size;
  }

  /**
   * Lets operations fail, which then have no effect.
   *
   * @param which Number of the one that fails, counted from 0 from now on; or what says whether one does, by its name (such as
   * `domctl max_mem` or `map 1`) and number
   * @param errno The error number
   */
  failAt(which: number | ((operation: string, index: number) => boolean), errno: number): void {
    const start = this.#operations;
    this.#failures.push({
      when: typeof which === "number" ? (_, index) => index === start + which : which,
      errno,
    });
  }

  /**
   * Lets the process die before an operation: it and all that follow throw a {@linkcode SimulatedDeath}, until
   * {@linkcode FakeHypervisor.revive}.
   *
   * @param index Number of the operation, counted from 0 from now on
   */
  dieAt(index: number): void {
    this.#deathAt = this.#operations + index;
  }

  /** Is there for the next process: what the one that died has mapped, and its buffers, are gone. */
  revive(): void {
    this.#isDead = false;
    this.#deathAt = Infinity;
    this.#failures.length = 0;
    this.#buffers.clear();
    for (const domain of this.domains.values()) {
      domain.mappings = 0;
      this.#reap(domain);
    }
  }

  /**
   * Finds a domain.
   *
   * @param domid Its number
   * @returns The domain
   */
  get(domid: number): FakeDomain {
    const domain = this.domains.get(domid);
    if (!domain) throw new Error(`Cannot find domain ${domid}`);
    return domain;
  }

  /**
   * Finds a page of a domain's memory, to be read and written as the guest does.
   *
   * @param domid The domain
   * @param frame Guest frame
   * @returns The page itself
   */
  page(domid: number, frame: bigint | number): Uint8Array<ArrayBuffer> {
    const page = this.#page(this.get(domid), BigInt(frame));
    if (!page) throw new Error(`Cannot find frame ${frame} of domain ${domid}`);
    return page;
  }

  /**
   * Lets a guest shut down.
   *
   * @param domid The domain
   * @param reason Why (`SHUTDOWN_*`)
   */
  shutDown(domid: number, reason: number): void {
    this.get(domid).shutdown = reason;
  }

  /**
   * Lets a guest open a port for the control domain, as a frontend does.
   *
   * @param domid The domain
   * @returns The port
   */
  openPort(domid: number): number {
    const { ports } = this.get(domid);
    ports.set(ports.size + 1, { remote: 0, events: 0, peer: undefined });
    return ports.size;
  }

  /**
   * Lets a guest send an event.
   *
   * @param domid The domain
   * @param port Its port
   */
  raise(domid: number, port: number): void {
    this.get(domid).ports.get(port)?.peer?.();
  }

  /**
   * Lets a guest grant a page to the control domain.
   *
   * @param domid The domain
   * @param ref Number of the grant
   * @param frame The page
   */
  grant(domid: number, ref: number, frame: bigint | number): void {
    const { grants } = this.get(domid);
    const view = new DataView(grants.buffer);
    view.setUint16(8 * ref, 1, true);
    view.setUint16(8 * ref + 2, 0, true);
    view.setUint32(8 * ref + 4, Number(frame), true);
  }

  /**
   * Makes a device for event channels of the control domain, with a descriptor that can be waited for.
   *
   * @param capacity How many events it keeps
   * @returns The device
   */
  eventChannels(capacity = 1024): EventChannelDevice {
    return new FakeEventChannelDevice((domid) => this.domains.get(domid), capacity);
  }

  /**
   * Makes a device for pages that guests have granted. A single page is the guest's page itself.
   *
   * @returns The device
   */
  grantDevice(): GrantDevice {
    const prepared = new Map<number, { readonly domid: number; readonly refs: readonly number[] }>();
    let next = 0;
    return {
      request: (request, argument, name) => {
        const view = new DataView(argument.buffer);
        if (request === GNTDEV.MAP_GRANT_REF) {
          const count = view.getUint32(0, true);
          const refs = Array.from({ length: count }, (_, index) => view.getUint32(20 + 8 * index, true));
          prepared.set(next, { domid: view.getUint32(16, true), refs });
          view.setBigUint64(8, BigInt(next), true);
          next += count * PAGE_SIZE;
        } else if (!prepared.delete(Number(view.getBigUint64(0, true)))) throw new SysError(name, 2, "");
      },
      map: (index) => {
        const { domid, refs } = prepared.get(index)!;
        const table = new DataView(this.get(domid).grants.buffer);
        const frames = refs.map((ref) => {
          if (table.getUint16(8 * ref, true) !== 1 || table.getUint16(8 * ref + 2, true) !== 0) {
            throw new SysError("mmap", XEN_ERRNO.EINVAL, "");
          }
          return BigInt(table.getUint32(8 * ref + 4, true));
        });
        const mapping = this.mapForeign(domid, frames);
        return { buffer: mapping.bytes.buffer, [Symbol.dispose]: () => mapping[Symbol.dispose]() };
      },
      [Symbol.dispose]: () => {},
    };
  }

  /** Takes memory for arguments; nothing else can be pointed at. */
  allocate(size: number): HypercallBuffer {
    this.#checkAlive();
    const address = this.#nextAddress;
    this.#nextAddress += BigInt(Math.ceil((size + 1) / PAGE_SIZE) * PAGE_SIZE);
    // Not at the beginning of its memory, as it is with the real one.
    const bytes = new Uint8Array(new ArrayBuffer(size + 64), 64, size);
    this.#buffers.set(address, bytes);
    return { address, bytes, [Symbol.dispose]: () => void this.#buffers.delete(address) };
  }

  /** See {@linkcode Privcmd.hypercall}. */
  hypercall(
    op: number,
    args: readonly (number | bigint)[],
    name = `hypercall ${op}`,
    domid?: number,
  ): bigint {
    this.#begin(name, name, domid);
    try {
      return BigInt(this.#dispatch(op, args.map((arg) => BigInt(arg))));
    } catch (error) {
      if (error instanceof Refusal) throw new XenError(name, domid, error.errno);
      throw error;
    }
  }

  /**
   * Maps pages of a domain. A single page is the guest's page itself; of several, what was changed is written back when the
   * mapping is disposed.
   */
  mapForeign(domid: number, numbers: readonly bigint[] | BigUint64Array): ForeignMapping {
    const what = `mapping ${numbers.length} frames`;
    this.#begin(`map ${domid}`, what, domid);
    const domain = this.domains.get(domid);
    if (!domain || domain.isDying) throw new XenError(what, domid, XEN_ERRNO.ESRCH);
    const frames = Array.from(numbers, (frame) => toGuestFrame(domain, frame));
    for (const frame of frames) {
      if (!hasFrame(domain, frame)) {
        throw new XenError(`mapping frame 0x${frame.toString(16)}`, domid, XEN_ERRNO.EINVAL);
      }
    }
    this.log.push(`map ${domid} 0x${frames[0]!.toString(16)} x${frames.length}`);
    if (frames.length === 1) return this.#mapping(domain, this.#page(domain, frames[0]!)!);
    const bytes = new Uint8Array(frames.length * PAGE_SIZE);
    for (const [index, frame] of frames.entries()) {
      const page = domain.memory.get(frame);
      if (page) bytes.set(page, index * PAGE_SIZE);
    }
    const before = bytes.slice();
    return this.#mapping(domain, bytes, () => {
      for (const [index, frame] of frames.entries()) {
        const start = index * PAGE_SIZE;
        const page = bytes.subarray(start, start + PAGE_SIZE);
        if (Buffer.compare(page, before.subarray(start, start + PAGE_SIZE)) !== 0) {
          this.#page(domain, frame)!.set(page);
        }
      }
    });
  }

  /** Maps the grant table of a domain: its one page itself. */
  mapResource(domid: number, type: number, id: number, frame: number, count: number): ForeignMapping {
    const what = `mapping resource ${type}`;
    this.#begin(`map resource ${domid}`, what, domid);
    const domain = this.domains.get(domid);
    if (!domain || domain.isDying) throw new XenError(what, domid, XEN_ERRNO.ESRCH);
    if (type !== 1 || id !== 0 || frame !== 0 || count !== 1) {
      throw new XenError(what, domid, XEN_ERRNO.EINVAL);
    }
    this.log.push(`map grant table ${domid}`);
    return this.#mapping(domain, domain.grants);
  }

  /** Does nothing: the machine goes on. */
  [Symbol.dispose](): void {}

  #checkAlive(): void {
    if (this.#isDead) throw new SimulatedDeath("This process is dead");
  }

  #begin(operation: string, name: string, domid?: number): void {
    this.#checkAlive();
    const index = this.#operations++;
    if (index >= this.#deathAt) {
      this.#isDead = true;
      throw new SimulatedDeath(`Killed before operation ${index} (${operation})`);
    }
    const failure = this.#failures.find(({ when }) => when(operation, index));
    if (failure) throw new XenError(name, domid, failure.errno);
  }

  #mapping(domain: FakeDomain, bytes: Uint8Array<ArrayBuffer>, writeBack?: () => void): ForeignMapping {
    domain.mappings++;
    let isMapped = true;
    return {
      bytes,
      [Symbol.dispose]: () => {
        if (!isMapped || this.#isDead) return;
        isMapped = false;
        writeBack?.();
        domain.mappings--;
        this.#reap(domain);
      },
    };
  }

  /** Ends a domain that is dying and that nothing maps any more. */
  #reap(domain: FakeDomain): void {
    if (!domain.isDying || domain.mappings > 0 || this.domains.get(domain.domid) !== domain) return;
    this.freePages += domain.pages;
    this.domains.delete(domain.domid);
  }

  #page(domain: FakeDomain, frame: bigint): Uint8Array<ArrayBuffer> | undefined {
    let page = domain.memory.get(frame);
    if (!page && hasFrame(domain, frame)) {
      page = new Uint8Array(PAGE_SIZE);
      domain.memory.set(frame, page);
    }
    return page;
  }

  /** Memory that an argument points to. */
  #memory(address: bigint, size: number): DataView<ArrayBuffer> {
    for (const [start, bytes] of this.#buffers) {
      const offset = Number(address - start);
      if (offset >= 0 && offset + size <= bytes.length) {
        return new DataView(bytes.buffer, bytes.byteOffset + offset, size);
      }
    }
    throw new Refusal(XEN_ERRNO.EFAULT);
  }

  #domain(domid: number): FakeDomain {
    const domain = this.domains.get(domid);
    if (!domain) throw new Refusal(XEN_ERRNO.ESRCH);
    return domain;
  }

  #dispatch(op: number, args: readonly bigint[]): number | bigint {
    const [first = 0n, second = 0n] = args;
    switch (op) {
      case 17:
        return this.#xenVersion(Number(first), second);
      case 36:
        this.#checkControl();
        return this.#domctl(this.#memory(first, 144));
      case 35:
        this.#checkControl();
        return this.#sysctl(this.#memory(first, 136));
      case 12:
        this.#checkControl();
        return this.#memoryOp(Number(first), second);
      case 34:
        this.#checkControl();
        return this.#hvmOp(Number(first), this.#memory(second, 16));
      case 32:
        this.#checkControl();
        return this.#eventChannelOp(Number(first), this.#memory(second, 8));
      case 1:
        this.#checkControl();
        return this.#mmuUpdate(first, Number(second), Number(args[3] ?? 0n));
      case 26:
        this.#checkControl();
        return this.#mmuExtOp(this.#memory(first, 24), Number(second), Number(args[3] ?? 0n));
      case 29:
        this.#checkControl();
        return this.#schedulerCall(Number(first), this.#memory(second, 8));
      default:
        throw new Refusal(XEN_ERRNO.ENOSYS);
    }
  }

  #checkControl(): void {
    if (this.#options.isControlDomain === false) throw new Refusal(XEN_ERRNO.EPERM);
  }

  #xenVersion(question: number, address: bigint): number {
    switch (question) {
      case 0:
        return 4 << 16 | this.#minor;
      case 1:
        return this.#writeText(address, ".7-fake", 16);
      case 3:
        return this.#writeText(address, "xen-3.0-x86_64 hvm-3.0-x86_64 ", 1024);
      default:
        throw new Refusal(XEN_ERRNO.ENOSYS);
    }
  }

  #writeText(address: bigint, text: string, size: number): number {
    const view = this.#memory(address, size);
    new Uint8Array(view.buffer, view.byteOffset, size).set(new TextEncoder().encode(text));
    return 0;
  }

  #domctl(view: DataView<ArrayBuffer>): number {
    if (view.getUint32(4, true) !== this.#offsets.domctl) throw new Refusal(XEN_ERRNO.EACCES);
    const command = view.getUint32(0, true);
    const domid = view.getUint16(8, true);
    if (command === 1) return this.#create(view, domid);
    if (command === 5) return this.#info(view, domid);
    const domain = this.#domain(domid);
    const say = (words: string): number => {
      this.log.push(words);
      return 0;
    };
    switch (command) {
      case 2:
        this.#restartOnce(`destroy ${domid}`);
        if (domid === 0) throw new Refusal(XEN_ERRNO.EINVAL);
        domain.isDying = true;
        domain.claimed = 0;
        say(`destroy ${domid}`);
        this.#reap(domain);
        return 0;
      case 3:
        domain.pauses++;
        return say(`pause ${domid}`);
      case 4:
        if (domain.pauses === 0) throw new Refusal(XEN_ERRNO.EINVAL);
        domain.pauses--;
        domain.hasRun ||= domain.pauses === 0;
        return say(`unpause ${domid}`);
      case 9: {
        const bits = view.getUint32(32, true);
        // Only the hard affinity is known here.
        if (view.getUint32(20, true) !== 1) throw new Refusal(XEN_ERRNO.EINVAL);
        const map = this.#memory(view.getBigUint64(24, true), Math.ceil(bits / 8));
        const cpus = Array.from({ length: bits }, (_, cpu) => cpu)
          .filter((cpu) => (map.getUint8(cpu >> 3) >> (cpu & 7) & 1) !== 0);
        if (cpus.length === 0 || view.getUint32(16, true) >= domain.vcpus) {
          throw new Refusal(XEN_ERRNO.EINVAL);
        }
        domain.affinity.set(view.getUint32(16, true), cpus);
        return say(`affinity ${domid} vcpu ${view.getUint32(16, true)}: ${cpus.join(",")}`);
      }
      case 10: {
        if (view.getUint32(16, true) !== 31) throw new Refusal(XEN_ERRNO.EINVAL);
        this.#restartOnce(`pool ${domid}`);
        domain.pagingPool = view.getUint32(24, true) * 2 ** 20;
        return say(`paging pool ${domid} ${domain.pagingPool}`);
      }
      case 11:
        domain.maxPages = Math.floor(Number(view.getBigUint64(16, true)) / 4);
        return say(`max_mem ${domid} ${view.getBigUint64(16, true)} KiB`);
      case 12: {
        const vcpu = view.getUint32(16, true);
        if (domain.type !== "pv" || vcpu >= domain.vcpus) throw new Refusal(XEN_ERRNO.EINVAL);
        const memory = this.#memory(view.getBigUint64(24, true), 5168);
        domain.vcpuContexts.set(vcpu, new Uint8Array(memory.buffer, memory.byteOffset, 5168).slice());
        return say(`set registers ${domid} vcpu ${vcpu}`);
      }
      case 22: {
        const frame = toGuestFrame(domain, view.getBigUint64(16, true));
        if (!hasFrame(domain, frame)) throw new Refusal(XEN_ERRNO.EACCES);
        this.#page(domain, frame)!.fill(0xcc);
        return say(`hypercall page ${domid}`);
      }
      case 35:
        if (domain.type !== "pv" || view.getUint32(16, true) !== 64) throw new Refusal(XEN_ERRNO.EINVAL);
        return say(`address size ${domid} 64`);
      case 15:
        if (view.getUint32(16, true) !== domain.maxVcpus) throw new Refusal(XEN_ERRNO.EINVAL);
        domain.vcpus = domain.maxVcpus;
        return say(`max_vcpus ${domid} ${domain.vcpus}`);
      case 16:
        return this.#schedule(view, domain);
      case 27:
        domain.shutdown = undefined;
        return say(`resume ${domid}`);
      case 33:
        if (domain.type === "pv") throw new Refusal(XEN_ERRNO.EINVAL);
        if (view.getBigUint64(24, true) !== 0n) {
          if (view.getUint32(16, true) < domain.context.length) throw new Refusal(XEN_ERRNO.ENOSPC);
          const memory = this.#memory(view.getBigUint64(24, true), domain.context.length);
          new Uint8Array(memory.buffer, memory.byteOffset).set(domain.context);
        }
        view.setUint32(16, domain.context.length, true);
        return say(`get context ${domid}`);
      case 34: {
        if (domain.type === "pv" || domain.vcpus === 0) throw new Refusal(XEN_ERRNO.EINVAL);
        const size = view.getUint32(16, true);
        const memory = this.#memory(view.getBigUint64(24, true), size);
        domain.context = mergeContext(
          domain.context,
          new Uint8Array(memory.buffer, memory.byteOffset, size).slice(),
        );
        return say(`set context ${domid}`);
      }
      case 59:
        view.setUint32(16, domain.tsc[0], true);
        view.setUint32(20, domain.tsc[1], true);
        view.setUint32(24, domain.tsc[2], true);
        view.setBigUint64(32, domain.tsc[3], true);
        return say(`get tsc ${domid}`);
      case 60:
        domain.tsc = [
          view.getUint32(16, true),
          view.getUint32(20, true),
          view.getUint32(24, true),
          view.getBigUint64(32, true),
        ];
        return say(`set tsc ${domid} mode ${domain.tsc[0]}`);
      case 86: {
        if (this.#minor < 17) throw new Refusal(XEN_ERRNO.ENOSYS);
        if (domain.type === "pv") throw new Refusal(XEN_ERRNO.EOPNOTSUPP);
        const size = Number(view.getBigUint64(16, true));
        if (size % PAGE_SIZE !== 0) throw new Refusal(XEN_ERRNO.EINVAL);
        this.#restartOnce(`pool ${domid}`);
        const more = (size - domain.pagingPool) / PAGE_SIZE;
        if (more > this.#available()) throw new Refusal(XEN_ERRNO.ENOMEM);
        domain.pagingPool = size;
        return say(`paging pool ${domid} ${size}`);
      }
      default:
        throw new Refusal(XEN_ERRNO.ENOSYS);
    }
  }

  #create(view: DataView<ArrayBuffer>, wanted: number): number {
    const at = 16;
    const flags = view.getUint32(at + 20, true);
    const emulation = view.getUint32(at + this.#offsets.emulation, true);
    const vcpus = view.getUint32(at + 28, true);
    const isHvm = (flags & 1) !== 0;
    const grant = this.#offsets.grantOptions;
    // Up to 4.21 also 0 and all that are reserved stand for none.
    const isAny = wanted === 0x7ff5 || (this.#minor < 22 && (wanted === 0 || wanted >= 0x7ff0));
    if (!isAny && (wanted >= 0x7ff0 || this.domains.has(wanted))) throw new Refusal(XEN_ERRNO.EEXIST);
    if (isHvm !== ((flags & 2) !== 0) || (isHvm && this.#options.hasHap === false)) {
      throw new Refusal(XEN_ERRNO.EINVAL);
    }
    if (isHvm ? ![0x1, 0x3ff].includes(emulation) : emulation !== 0) throw new Refusal(XEN_ERRNO.EINVAL);
    if (grant !== undefined && ![1, 2].includes(view.getUint32(at + grant, true))) {
      throw new Refusal(XEN_ERRNO.EINVAL);
    }
    if (vcpus < 1 || vcpus > (isHvm ? 128 : 8192) || view.getUint32(at + 32, true) < 3) {
      throw new Refusal(XEN_ERRNO.EINVAL);
    }
    const domid = isAny ? this.#nextDomid++ : wanted;
    const handle = new Uint8Array(view.buffer, view.byteOffset + at + 4, 16).slice();
    const type = !isHvm ? "pv" : emulation === 1 ? "pvh" : "hvm";
    this.domains.set(domid, newDomain(domid, handle, type, vcpus));
    view.setUint16(8, domid, true);
    this.log.push(`create ${domid} ${type} vcpus ${vcpus}`);
    return 0;
  }

  #info(view: DataView<ArrayBuffer>, domid: number): number {
    let domain = this.domains.get(domid);
    if (!domain && this.#minor < 18) {
      domain = [...this.domains.values()].sort((a, b) => a.domid - b.domid).find((next) =>
        next.domid >= domid
      );
    }
    if (!domain) throw new Refusal(XEN_ERRNO.ESRCH);
    view.setUint16(8, domain.domid, true);
    this.#writeInfo(new DataView(view.buffer, view.byteOffset + 16, this.#offsets.infoSize), domain);
    this.log.push(`info ${domid}`);
    return 0;
  }

  #writeInfo(view: DataView<ArrayBuffer>, domain: FakeDomain): void {
    const isPaused = domain.pauses > 0;
    const isRunning = !isPaused && domain.shutdown === undefined && !domain.isDying;
    view.setUint16(0, domain.domid, true);
    view.setUint32(
      4,
      (domain.isDying ? 1 : 0) | (domain.type === "pv" ? 0 : 2 | 0x100) |
        (domain.shutdown === undefined ? 0 : 4 | domain.shutdown << 16) | (isPaused ? 8 : 0) |
        (isRunning ? 0x20 : 0),
      true,
    );
    view.setBigUint64(8, BigInt(domain.pages), true);
    view.setBigUint64(16, BigInt(domain.maxPages), true);
    view.setBigUint64(24, BigInt(domain.claimed), true);
    view.setBigUint64(56, 1_000_000n * BigInt(domain.domid + 1), true);
    view.setUint32(64, domain.vcpus, true);
    view.setUint32(68, domain.vcpus === 0 ? 0xffff_ffff : domain.vcpus - 1, true);
    new Uint8Array(view.buffer, view.byteOffset + 76, 16).set(domain.handle);
    view.setUint32(92, 0, true);
    const emulation = { pv: 0, pvh: 0x1, hvm: 0x3ff }[domain.type];
    view.setUint32(this.#offsets.infoEmulation, emulation, true);
  }

  #schedule(view: DataView<ArrayBuffer>, domain: FakeDomain): number {
    const scheduler = this.#options.scheduler ?? 6;
    if (view.getUint32(16, true) !== scheduler) throw new Refusal(XEN_ERRNO.EINVAL);
    if (view.getUint32(20, true) === 1) {
      view.setUint16(24, domain.schedule.weight, true);
      view.setUint16(26, domain.schedule.cap, true);
      return 0;
    }
    const [weight, cap] = [view.getUint16(24, true), view.getUint16(26, true)];
    if (scheduler === 6 && cap > 100 * domain.maxVcpus) throw new Refusal(XEN_ERRNO.EINVAL);
    if (weight !== 0) domain.schedule.weight = weight;
    if (scheduler === 6 || cap !== 0xffff) domain.schedule.cap = cap;
    this.log.push(`schedule ${domain.domid} weight ${domain.schedule.weight} cap ${domain.schedule.cap}`);
    return 0;
  }

  #sysctl(view: DataView<ArrayBuffer>): number {
    if (view.getUint32(4, true) !== this.#offsets.sysctl) throw new Refusal(XEN_ERRNO.EACCES);
    const at = 8;
    switch (view.getUint32(0, true)) {
      case 1: {
        const log = new TextEncoder().encode(this.#options.log ?? "");
        const start = view.getUint8(at + 1) === 0 ? 0 : view.getUint32(at + 4, true);
        const chunk = log.subarray(start, start + view.getUint32(at + 16, true));
        const memory = this.#memory(view.getBigUint64(at + 8, true), chunk.length);
        new Uint8Array(memory.buffer, memory.byteOffset).set(chunk);
        view.setUint32(at + 4, start + chunk.length, true);
        view.setUint32(at + 16, chunk.length, true);
        return 0;
      }
      case 3: {
        const pages = at + this.#offsets.totalPages;
        const used = [...this.domains.values()].reduce((sum, domain) => sum + domain.pages, 0);
        view.setUint32(at + 8, 2, true);
        view.setUint32(at + 12, 1, true);
        view.setUint32(at + 16, 1, true);
        view.setUint32(at + 24, 2_000_000, true);
        view.setUint32(at + 28, this.#options.hasHap === false ? 2 : 1 | 2 | 8, true);
        view.setBigUint64(pages, BigInt(this.freePages + used), true);
        view.setBigUint64(pages + 8, BigInt(this.freePages), true);
        view.setBigUint64(pages + 24, BigInt(this.#claimed()), true);
        this.log.push("physinfo");
        return 0;
      }
      case 4:
        view.setUint32(at, this.#options.scheduler ?? 6, true);
        return 0;
      case 6: {
        const found = [...this.domains.values()]
          .filter(({ domid }) => domid >= view.getUint16(at, true))
          .sort((a, b) => a.domid - b.domid)
          .slice(0, view.getUint32(at + 4, true));
        const { infoSize } = this.#offsets;
        const memory = this.#memory(view.getBigUint64(at + 8, true), found.length * infoSize);
        for (const [index, domain] of found.entries()) {
          this.#writeInfo(
            new DataView(memory.buffer, memory.byteOffset + index * infoSize, infoSize),
            domain,
          );
        }
        view.setUint32(at + 16, found.length, true);
        this.log.push("list");
        return 0;
      }
      default:
        throw new Refusal(XEN_ERRNO.ENOSYS);
    }
  }

  #claimed(): number {
    return [...this.domains.values()].reduce((sum, domain) => sum + domain.claimed, 0);
  }

  #available(): number {
    const pools = [...this.domains.values()].reduce((sum, { pagingPool }) => sum + pagingPool / PAGE_SIZE, 0);
    return this.freePages - this.#claimed() - pools;
  }

  #memoryOp(operation: number, address: bigint): number {
    switch (operation) {
      case 6: {
        const view = this.#memory(address, 32);
        const domain = this.domains.get(view.getUint16(24, true));
        // Xen gives no errors here, it only counts.
        return domain && !domain.isDying ? this.#populate(view, domain) : 0;
      }
      case 13: {
        const view = this.#memory(address, 24);
        const domain = this.#domain(view.getUint16(0, true));
        const count = view.getUint32(8, true);
        const list = this.#memory(view.getBigUint64(16, true), count * 20);
        domain.memoryMap = Array.from({ length: count }, (_, index) => ({
          address: list.getBigUint64(index * 20, true),
          size: list.getBigUint64(index * 20 + 8, true),
          type: list.getUint32(index * 20 + 16, true),
        }));
        this.log.push(`memory map ${domain.domid} ${count} entries`);
        return 0;
      }
      case 24: {
        const view = this.#memory(address, 32);
        const domain = this.domains.get(view.getUint16(24, true));
        const pages = Number(view.getBigUint64(8, true));
        if (!domain || view.getBigUint64(0, true) !== 0n || view.getBigUint64(16, true) !== 0n) {
          throw new Refusal(XEN_ERRNO.EINVAL);
        }
        if (pages !== 0) {
          if (domain.claimed > 0 || pages <= domain.pages || pages > domain.maxPages) {
            throw new Refusal(XEN_ERRNO.EINVAL);
          }
          if (pages - domain.pages > this.#available()) throw new Refusal(XEN_ERRNO.ENOMEM);
        }
        domain.claimed = pages === 0 ? 0 : pages - domain.pages;
        this.log.push(`claim ${domain.domid} ${pages}`);
        return 0;
      }
      default:
        throw new Refusal(XEN_ERRNO.ENOSYS);
    }
  }

  #populate(view: DataView<ArrayBuffer>, domain: FakeDomain): number {
    const count = Number(view.getBigUint64(8, true));
    const order = view.getUint32(16, true);
    if (![0, 9, 18].includes(order) && domain.type !== "pv") return 0;
    const pages = 2 ** order;
    let list: DataView<ArrayBuffer>;
    try {
      list = this.#memory(view.getBigUint64(0, true), count * 8);
    } catch {
      return 0;
    }
    let done = 0;
    for (; done < count; done++) {
      const frame = list.getBigUint64(done * 8, true);
      const after = domain.pages + pages;
      // A page of a page table for each 2 MiB, roughly, is what must fit into the pool.
      const isPoolEnough = domain.type === "pv" || after / 512 <= domain.pagingPool / PAGE_SIZE;
      const fromClaim = Math.min(pages, domain.claimed);
      if (after > domain.maxPages || !isPoolEnough || pages - fromClaim > this.#available()) break;
      if (
        frame % BigInt(pages) !== 0n || hasFrame(domain, frame) || hasFrame(domain, frame + BigInt(pages - 1))
      ) {
        break;
      }
      domain.extents.set(frame, pages);
      if (domain.type === "pv") list.setBigUint64(done * 8, toMachineFrame(domain, frame), true);
      domain.pages = after;
      domain.claimed -= fromClaim;
      this.freePages -= pages;
    }
    this.log.push(`populate ${domain.domid} order ${order}: ${done} of ${count}`);
    return done;
  }

  #hvmOp(operation: number, view: DataView<ArrayBuffer>): number {
    const domain = this.#domain(view.getUint16(0, true));
    const index = view.getUint32(4, true);
    if (domain.type === "pv" || index > 38) throw new Refusal(XEN_ERRNO.EINVAL);
    switch (operation) {
      case 0:
        domain.params.set(index, view.getBigUint64(8, true));
        this.log.push(`set param ${domain.domid} ${index} = 0x${view.getBigUint64(8, true).toString(16)}`);
        return 0;
      case 1:
        view.setBigUint64(8, domain.params.get(index) ?? 0n, true);
        return 0;
      default:
        throw new Refusal(XEN_ERRNO.ENOSYS);
    }
  }

  #eventChannelOp(operation: number, view: DataView<ArrayBuffer>): number {
    if (operation !== 6) throw new Refusal(XEN_ERRNO.ENOSYS);
    const domain = this.#domain(view.getUint16(0, true));
    const port = domain.ports.size + 1;
    domain.ports.set(port, { remote: view.getUint16(2, true), events: 0, peer: undefined });
    view.setUint32(4, port, true);
    this.log.push(`port ${domain.domid} ${port} for ${view.getUint16(2, true)}`);
    return 0;
  }

  #pvDomain(domid: number): FakeDomain {
    const domain = this.#domain(domid);
    if (domain.type !== "pv") throw new Refusal(XEN_ERRNO.EINVAL);
    return domain;
  }

  #mmuUpdate(address: bigint, count: number, domid: number): number {
    const domain = this.#pvDomain(domid);
    const view = this.#memory(address, count * 16);
    for (let at = 0; at < count * 16; at += 16) {
      const request = view.getBigUint64(at, true);
      const frame = toGuestFrame(domain, request >> 12n);
      // Only the table from machine frames to the domain's own is known here.
      if ((request & 3n) !== 1n || !hasFrame(domain, frame)) throw new Refusal(XEN_ERRNO.EINVAL);
      domain.machineToPhysical.set(request >> 12n, view.getBigUint64(at + 8, true));
    }
    this.log.push(`machine to physical ${domid} x${count}`);
    return 0;
  }

  #mmuExtOp(view: DataView<ArrayBuffer>, count: number, domid: number): number {
    const domain = this.#pvDomain(domid);
    const frame = view.getBigUint64(8, true);
    if (count !== 1 || view.getUint32(0, true) !== 3 || !hasFrame(domain, toGuestFrame(domain, frame))) {
      throw new Refusal(XEN_ERRNO.EINVAL);
    }
    // A page table must not be mapped to be written.
    if (domain.mappings > 0) throw new Refusal(XEN_ERRNO.EBUSY);
    domain.pinned.add(frame);
    this.log.push(`pin ${domid} 0x${frame.toString(16)}`);
    return 0;
  }

  #schedulerCall(operation: number, view: DataView<ArrayBuffer>): number {
    if (operation !== 4) throw new Refusal(XEN_ERRNO.ENOSYS);
    const domain = this.#domain(view.getUint16(0, true));
    domain.shutdown = view.getUint32(4, true);
    this.log.push(`shut down ${domain.domid} reason ${domain.shutdown}`);
    return 0;
  }

  /** The first half of what takes long. */
  #restartOnce(what: string): void {
    if (!this.#options.isSlow || this.#owesRestart.delete(what)) return;
    this.#owesRestart.add(what);
    throw new Refusal(XEN_ERRNO.EAGAIN);
  }
}

/** Ports of a process in the control domain. As with the real device, a port is closed from its event to when it is written. */
class FakeEventChannelDevice implements EventChannelDevice {
  readonly #find: (domid: number) => FakeDomain | undefined;
  readonly #capacity: number;
  readonly #event = Fd.event();
  readonly #ports = new Map<number, FakePort | undefined>();
  readonly #pending: number[] = [];
  readonly #masked = new Set<number>();
  /** Ports that got an event while they were closed. */
  readonly #again = new Set<number>();
  #hasOverflown = false;
  #next = 1;

  constructor(find: (domid: number) => FakeDomain | undefined, capacity: number) {
    this.#find = find;
    this.#capacity = capacity;
  }

  get fd(): number {
    return this.#event.number;
  }

  request(request: number, words: readonly number[], name: string): number {
    const [first = 0, second = 0] = words;
    switch (request) {
      case EVTCHN.BIND_INTERDOMAIN: {
        const remote = this.#find(first)?.ports.get(second);
        if (!remote || remote.remote !== 0 || remote.peer) throw new SysError(name, XEN_ERRNO.EINVAL, "");
        const port = this.#next++;
        remote.peer = () => this.#raise(port);
        this.#ports.set(port, remote);
        // Whoever connects is told once, in case that something was missed.
        this.#raise(port);
        return port;
      }
      case EVTCHN.BIND_UNBOUND_PORT:
      case EVTCHN.BIND_VIRQ:
        this.#ports.set(this.#next, undefined);
        return this.#next++;
      case EVTCHN.UNBIND: {
        const remote = this.#ports.get(first);
        if (!this.#ports.delete(first)) throw new SysError(name, XEN_ERRNO.EINVAL, "");
        if (remote) remote.peer = undefined;
        return 0;
      }
      case EVTCHN.NOTIFY: {
        if (!this.#ports.has(first)) throw new SysError(name, XEN_ERRNO.EINVAL, "");
        const remote = this.#ports.get(first);
        if (remote) remote.events++;
        return 0;
      }
      case EVTCHN.RESET:
        this.#hasOverflown = false;
        this.#pending.length = 0;
        this.#update();
        return 0;
      default:
        throw new SysError(name, 25, "");
    }
  }

  read(ports: Uint32Array<ArrayBuffer>): number {
    if (this.#hasOverflown) throw new SysError("read", 27, "");
    if (this.#pending.length === 0) throw new SysError("read", XEN_ERRNO.EAGAIN, "");
    const taken = this.#pending.splice(0, ports.length);
    ports.set(taken);
    this.#update();
    return taken.length;
  }

  write(ports: Uint32Array<ArrayBuffer>): void {
    for (const port of ports) {
      this.#masked.delete(port);
      if (this.#again.delete(port)) this.#raise(port);
    }
  }

  [Symbol.dispose](): void {
    for (const remote of this.#ports.values()) if (remote) remote.peer = undefined;
    this.#ports.clear();
    this.#event[Symbol.dispose]();
  }

  #raise(port: number): void {
    if (this.#masked.has(port)) {
      this.#again.add(port);
      return;
    }
    this.#masked.add(port);
    if (this.#pending.length >= this.#capacity) this.#hasOverflown = true;
    else this.#pending.push(port);
    this.#update();
  }

  #update(): void {
    this.#event.drain();
    if (this.#pending.length > 0 || this.#hasOverflown) this.#event.signal();
  }
}

/** A refusal, by its number. */
class Refusal extends Error {
  readonly errno: number;

  constructor(errno: number) {
    super(`errno ${errno}`);
    this.errno = errno;
  }
}

function newDomain(
  domid: number,
  handle: Uint8Array<ArrayBuffer>,
  type: FakeDomain["type"],
  maxVcpus: number,
): FakeDomain {
  return {
    domid,
    handle,
    type,
    maxVcpus,
    vcpus: 0,
    maxPages: 0,
    pages: 0,
    claimed: 0,
    pagingPool: 0,
    pauses: 1,
    hasRun: false,
    shutdown: undefined,
    isDying: false,
    params: new Map(),
    ports: new Map(),
    extents: new Map(),
    memory: new Map(),
    grants: new Uint8Array(PAGE_SIZE),
    memoryMap: [],
    context: emptyContext(),
    tsc: [0, 2_000_000, 0, 0n],
    affinity: new Map(),
    schedule: { weight: 256, cap: 0 },
    machineToPhysical: new Map(),
    pinned: new Set(),
    vcpuContexts: new Map(),
    mappings: 0,
  };
}

/** Whether a domain has a frame: extents are aligned to their size of 1, 512 or 262144 pages, or any power of two. */
function hasFrame(domain: FakeDomain, frame: bigint): boolean {
  for (let order = 0n; order <= 18n; order++) {
    const pages = domain.extents.get(frame >> order << order);
    if (pages !== undefined && frame < (frame >> order << order) + BigInt(pages)) return true;
  }
  return false;
}

/** Machine frames of a PV domain are far from its own, and in the same order. */
function toMachineFrame({ domid }: FakeDomain, frame: bigint): bigint {
  return (BigInt(domid) << 28n) + frame;
}

/** The guest frame that a frame stands for that the domain is mapped by. */
function toGuestFrame(domain: FakeDomain, frame: bigint): bigint {
  return domain.type === "pv" ? frame - (BigInt(domain.domid) << 28n) : frame;
}

/** Records: a header of type 1 with 24 bytes, and the end. */
function emptyContext(): Uint8Array<ArrayBuffer> {
  const header = record(1, 0, Uint8Array.from({ length: 24 }, (_, index) => index + 1));
  return join([header, record(0, 0, new Uint8Array())]);
}

/** Puts new records in the place of those of the same type and vCPU; there must be a header first and an end last. */
function mergeContext(
  before: Uint8Array<ArrayBuffer>,
  after: Uint8Array<ArrayBuffer>,
): Uint8Array<ArrayBuffer> {
  const records = new Map(split(before).map((found) => [key(found), found]));
  const added = split(after);
  const types = added.map((found) => new DataView(found.buffer).getUint16(0, true));
  if (types[0] !== 1 || types.at(-1) !== 0) throw new Refusal(XEN_ERRNO.EINVAL);
  records.delete("0/0");
  for (const found of added) records.set(key(found), found);
  return join([...records.values()]);
}

function key(found: Uint8Array<ArrayBuffer>): string {
  const view = new DataView(found.buffer);
  return `${view.getUint16(0, true)}/${view.getUint16(2, true)}`;
}

function split(context: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer>[] {
  const records: Uint8Array<ArrayBuffer>[] = [];
  const view = new DataView(context.buffer, context.byteOffset, context.length);
  for (let at = 0; at < context.length;) {
    if (at + 8 > context.length) throw new Refusal(XEN_ERRNO.EINVAL);
    const end = at + 8 + view.getUint32(at + 4, true);
    if (end > context.length) throw new Refusal(XEN_ERRNO.EINVAL);
    records.push(context.slice(at, end));
    at = end;
  }
  return records;
}

function record(type: number, instance: number, body: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(8 + body.length);
  const view = new DataView(bytes.buffer);
  view.setUint16(0, type, true);
  view.setUint16(2, instance, true);
  view.setUint32(4, body.length, true);
  bytes.set(body, 8);
  return bytes;
}

function join(parts: readonly Uint8Array<ArrayBuffer>[]): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}
