/**
 * `/dev/xen/privcmd`, by which the control domain calls the hypervisor and maps memory of other domains (Linux 6.1
 * `include/uapi/xen/privcmd.h`, `drivers/xen/privcmd.c`).
 *
 * @module
 */

import { ERRNO_NAMES, SysError } from "../errno.ts";
import { Fd, MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, Mapping } from "../fd.ts";
import { type Layout, Struct } from "../layout.ts";
import { check, errno, libc } from "../libc.ts";

/** Size of a page of memory, in bytes. */
export const PAGE_SIZE = 4096;

/** Requests to the device. */
export const PRIVCMD = { HYPERCALL: 0x305000, MMAPBATCH_V2: 0x205004, MMAP_RESOURCE: 0x205007 } as const;

/** `struct privcmd_hypercall`. */
export const privcmdHypercall = {
  name: "struct privcmd_hypercall",
  size: 48,
  fields: { op: [0, "u64"], arg: [8, "u64", 5] },
} as const satisfies Layout;

/** `struct privcmd_mmapbatch_v2`. */
export const privcmdMapBatch = {
  name: "struct privcmd_mmapbatch_v2",
  size: 32,
  fields: { num: [0, "u32"], dom: [4, "u16"], addr: [8, "u64"], arr: [16, "u64"], err: [24, "u64"] },
} as const satisfies Layout;

/** `struct privcmd_mmap_resource`. */
export const privcmdMapResource = {
  name: "struct privcmd_mmap_resource",
  size: 32,
  fields: {
    dom: [0, "u16"],
    type: [4, "u32"],
    id: [8, "u32"],
    idx: [12, "u32"],
    num: [16, "u64"],
    addr: [24, "u64"],
  },
} as const satisfies Layout;

/** What error numbers mean when Xen gives them. */
const MEANINGS: Readonly<Record<string, string>> = {
  EPERM: "this domain may not do that: only the control domain may",
  ENOENT: "there is no such thing",
  ESRCH: "there is no such domain",
  E2BIG: "that is more than Xen takes at once",
  EAGAIN: "Xen has to be asked again",
  ENOMEM: "Xen has no memory for it",
  EACCES: "Xen does not take this version of its interface",
  EFAULT: "Xen cannot reach the memory of an argument",
  EBUSY: "something else uses it",
  EEXIST: "the domain id is in use",
  EINVAL: "Xen does not take the arguments, or the domain is not in the state for it",
  ENOSPC: "there is no room for it",
  ENOSYS: "this Xen does not have it, or the machine cannot do it",
  EOPNOTSUPP: "this Xen cannot do it for a domain of this type",
};

/** The hypervisor has refused a call. */
export class XenError extends SysError {
  /** The hypercall and its operation, such as `domctl createdomain`. */
  readonly hypercall: string;
  /** The domain that it was about, where it was about one. */
  readonly domid: number | undefined;

  /**
   * Explains a refusal.
   *
   * @param hypercall The hypercall and its operation
   * @param domid The domain that it was about
   * @param errno The error number
   */
  constructor(hypercall: string, domid: number | undefined, errno: number) {
    const about = domid === undefined ? "" : ` for domain ${domid}`;
    super(`${hypercall}${about}`, errno, MEANINGS[ERRNO_NAMES[errno] ?? ""] ?? "");
    this.name = "XenError";
    this.hypercall = hypercall;
    this.domid = domid;
  }
}

/** Memory that the hypervisor can reach: all that arguments point to, and they themselves. Zero at first. */
export interface HypercallBuffer extends Disposable {
  /** Its address. */
  readonly address: bigint;
  /** Its bytes. */
  readonly bytes: Uint8Array<ArrayBuffer>;
}

/** Memory of another domain; not to be used once it is disposed. */
export interface ForeignMapping extends Disposable {
  /** Its bytes. */
  readonly bytes: Uint8Array<ArrayBuffer>;
}

/** The way to the hypervisor. */
export interface Privcmd extends Disposable {
  /**
   * Calls the hypervisor.
   *
   * @param op Number of the hypercall
   * @param args Up to five arguments; negative ones are 64-bit complements
   * @param name What is called, for messages
   * @param domid Which domain it is about, for messages
   * @returns What the hypervisor returns, which is not negative
   * @throws {XenError} If the hypervisor refuses
   */
  hypercall(op: number, args: readonly (number | bigint)[], name?: string, domid?: number): bigint;
  /**
   * Takes memory for arguments.
   *
   * @param size Its size in bytes
   * @returns The memory, for as short as possible
   */
  allocate(size: number): HypercallBuffer;
  /**
   * Maps memory of a domain.
   *
   * @param domid The domain
   * @param frames Numbers of the pages: guest frames, or machine frames of a PV domain
   * @returns The pages, one behind another
   * @throws {XenError} If one of them cannot be mapped
   */
  mapForeign(domid: number, frames: readonly bigint[] | BigUint64Array): ForeignMapping;
  /**
   * Maps what the hypervisor keeps for a domain.
   *
   * @param domid The domain
   * @param type Type of the resource (`XENMEM_resource_*`)
   * @param id Which one of that type
   * @param frame First page
   * @param count Number of pages
   * @returns The pages
   * @throws {XenError} If that is not possible
   */
  mapResource(domid: number, type: number, id: number, frame: number, count: number): ForeignMapping;
}

const DEVICE = "/dev/xen/privcmd";
const BUFFERS = "/dev/xen/hypercall";
/** `SYS_ioctl` of x86-64. */
const SYS_IOCTL = 16n;
/** Linux 6.1 `include/uapi/asm-generic/mman.h`. */
const MAP_LOCKED = 0x2000;
/** Linux 6.1 `include/uapi/asm-generic/mman-common.h`. */
const MADV_DONTFORK = 10;
const ENOENT = 2;
const ARENA_SIZE = 64 * PAGE_SIZE;
const ALIGNMENT = 64;
/** How long a page is waited for that is being brought back from the disk, in milliseconds. */
const PAGING_TIME = 10_000;

/**
 * Opens the way to the hypervisor.
 *
 * @returns It
 * @throws {Error} If this is not the control domain of a Xen host, or this user may not
 */
export function openPrivcmd(): Privcmd {
  let device: Fd;
  try {
    device = Fd.open(DEVICE);
  } catch (error) {
    throw explainOpen(DEVICE, "xen-privcmd", error);
  }
  try {
    return new DevicePrivcmd(device);
  } catch (error) {
    device[Symbol.dispose]();
    throw error;
  }
}

/**
 * Explains why one of Xen's devices cannot be opened.
 *
 * @param path The device
 * @param module The kernel's module that makes it
 * @param error What opening it has thrown
 * @returns The explanation, or the error itself where there is none
 */
export function explainOpen(path: string, module: string, error: unknown): unknown {
  if (!(error instanceof SysError)) return error;
  return new Error(`Cannot reach the hypervisor by "${path}" as ${reason(error)}`, { cause: error });

  function reason({ code, message }: SysError): string {
    switch (code) {
      case "ENOENT":
      case "ENODEV":
      case "ENXIO":
        return isXen()
          ? `the device is absent: load the kernel's module with "modprobe ${module}"`
          : "this system does not run on Xen: boot Xen with this system as its control domain (dom0)";
      case "EACCES":
      case "EPERM":
        return "this user may not: run as root";
      default:
        return message;
    }
  }
}

function isXen(): boolean {
  try {
    return Deno.readTextFileSync("/sys/hypervisor/type").trim() === "xen";
  } catch {
    return false;
  }
}

/** The real devices. */
class DevicePrivcmd implements Privcmd {
  readonly #device: Fd;
  readonly #arena: Arena;
  readonly #call = new Struct(privcmdHypercall);
  readonly #words = new BigUint64Array(this.#call.bytes.buffer);

  constructor(device: Fd) {
    this.#device = device;
    this.#arena = new Arena(openBuffers());
  }

  hypercall(op: number, args: readonly (number | bigint)[], name?: string, domid?: number): bigint {
    this.#words[0] = BigInt(op);
    for (let index = 0; index < 5; index++) {
      this.#words[1 + index] = BigInt.asUintN(64, BigInt(args[index] ?? 0));
    }
    // The wrapper `ioctl()` of the C library would cut the result to 32 bits.
    const result = libc().ioctl_long(
      SYS_IOCTL,
      this.#device.number,
      BigInt(PRIVCMD.HYPERCALL),
      this.#call.bytes,
    );
    if (result < 0n) throw new XenError(name ?? `hypercall ${op}`, domid, errno());
    return result;
  }

  allocate(size: number): HypercallBuffer {
    return this.#arena.allocate(size);
  }

  mapForeign(domid: number, frames: readonly bigint[] | BigUint64Array): ForeignMapping {
    const mapping = new Mapping(frames.length * PAGE_SIZE, { fd: this.#device, flags: MAP_SHARED });
    try {
      this.#mapFrames(
        mapping,
        domid,
        frames instanceof BigUint64Array ? frames : BigUint64Array.from(frames),
      );
      return new DeviceMapping(mapping);
    } catch (error) {
      mapping[Symbol.dispose]();
      throw error;
    }
  }

  mapResource(domid: number, type: number, id: number, frame: number, count: number): ForeignMapping {
    const mapping = new Mapping(count * PAGE_SIZE, { fd: this.#device, flags: MAP_SHARED });
    const request = new Struct(privcmdMapResource)
      .assign({ dom: domid, type, id, idx: frame, num: count, addr: mapping.address });
    if (libc().ioctl_buffer(this.#device.number, BigInt(PRIVCMD.MMAP_RESOURCE), request.bytes) < 0) {
      const number = errno();
      mapping[Symbol.dispose]();
      throw new XenError(`mapping resource ${type} (${count} from ${frame})`, domid, number);
    }
    return new DeviceMapping(mapping);
  }

  [Symbol.dispose](): void {
    this.#arena[Symbol.dispose]();
    this.#device[Symbol.dispose]();
  }

  #mapFrames(mapping: Mapping, domid: number, frames: BigUint64Array): void {
    // The kernel reads and writes these while the call runs; nothing moves them then.
    const numbers = new Uint8Array(frames.slice().buffer);
    const errors = new Int32Array(frames.length);
    const numbersAt = Deno.UnsafePointer.value(Deno.UnsafePointer.of(numbers));
    const errorsAt = Deno.UnsafePointer.value(Deno.UnsafePointer.of(errors));
    const request = new Struct(privcmdMapBatch);
    const map = (index: number, count: number): number => {
      errors.fill(0, index, index + count);
      request.assign({
        num: count,
        dom: domid,
        addr: mapping.address + BigInt(index * PAGE_SIZE),
        arr: numbersAt + BigInt(index * 8),
        err: errorsAt + BigInt(index * 4),
      });
      const result = libc().ioctl_buffer(this.#device.number, BigInt(PRIVCMD.MMAPBATCH_V2), request.bytes);
      return result < 0 ? errno() : 0;
    };
    const refuse = (number: number, index?: number): never => {
      const which = index === undefined
        ? `${frames.length} frames from ${hex(frames[0])}`
        : `frame ${hex(frames[index])}`;
      throw new XenError(`mapping ${which}`, domid, number);
    };

    const result = map(0, frames.length);
    if (result !== 0 && result !== ENOENT) refuse(result);
    const deadline = performance.now() + PAGING_TIME;
    for (let index = 0; index < frames.length; index++) {
      // Xen brings a page back from the disk meanwhile. Only pages that are not mapped may be tried again.
      while (errors[index] === -ENOENT && performance.now() < deadline) {
        sleep(1);
        const again = map(index, 1);
        if (again !== 0 && again !== ENOENT) refuse(again, index);
      }
      const number = -errors[index]!;
      if (number !== 0) refuse(number, index);
    }
  }
}

class DeviceMapping implements ForeignMapping {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #mapping: Mapping;

  constructor(mapping: Mapping) {
    this.#mapping = mapping;
    this.bytes = new Uint8Array(mapping.buffer);
  }

  [Symbol.dispose](): void {
    this.#mapping[Symbol.dispose]();
  }
}

/** Opens the device whose memory stays where it is; older kernels have none. */
function openBuffers(): Fd | undefined {
  try {
    return Fd.open(BUFFERS);
  } catch (error) {
    if (error instanceof SysError && ["ENOENT", "ENODEV", "ENXIO"].includes(error.code)) return undefined;
    throw explainOpen(BUFFERS, "xen-privcmd", error);
  }
}

/**
 * Memory for arguments of hypercalls. What is asked for at once is taken from one mapping, the rest gets one of its own. Xen
 * reads by the page table of this process and cannot bring in a page: so the kernel must never take one away, even shortly.
 *
 * @internal
 */
export class Arena implements Disposable {
  readonly #device: Fd | undefined;
  readonly #mapping: Mapping;
  readonly #live = new Set<HypercallBuffer>();
  #used = 0;

  /**
   * Maps the memory.
   *
   * @param device `/dev/xen/hypercall`, which it takes over; locked memory is next best
   */
  constructor(device: Fd | undefined) {
    this.#device = device;
    try {
      this.#mapping = this.#map(ARENA_SIZE);
    } catch (error) {
      device?.[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * Takes memory.
   *
   * @param size Its size in bytes
   * @returns The memory
   */
  allocate(size: number): HypercallBuffer {
    const start = this.#used;
    if (start + size > ARENA_SIZE) {
      const mapping = this.#map(Math.ceil(size / PAGE_SIZE) * PAGE_SIZE);
      return {
        address: mapping.address,
        bytes: new Uint8Array(mapping.buffer, 0, size),
        [Symbol.dispose]: () => mapping[Symbol.dispose](),
      };
    }
    const bytes = new Uint8Array(this.#mapping.buffer, start, size);
    bytes.fill(0);
    this.#used = Math.ceil((start + size) / ALIGNMENT) * ALIGNMENT;
    const end = this.#used;
    const buffer: HypercallBuffer = {
      address: this.#mapping.address + BigInt(start),
      bytes,
      [Symbol.dispose]: () => {
        if (!this.#live.delete(buffer)) return;
        if (this.#live.size === 0) this.#used = 0;
        else if (this.#used === end) this.#used = start;
      },
    };
    this.#live.add(buffer);
    return buffer;
  }

  /** Gives the memory back. */
  [Symbol.dispose](): void {
    this.#mapping[Symbol.dispose]();
    this.#device?.[Symbol.dispose]();
  }

  #map(size: number): Mapping {
    if (this.#device) return new Mapping(size, { fd: this.#device, flags: MAP_SHARED });
    const mapping = new Mapping(size, { flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED });
    try {
      // While this process forks, its pages cannot be written.
      check(libc().madvise(mapping.pointer, BigInt(size), MADV_DONTFORK), "madvise(MADV_DONTFORK)");
      new Uint8Array(mapping.buffer).fill(0);
      return mapping;
    } catch (error) {
      mapping[Symbol.dispose]();
      throw error;
    }
  }
}

function hex(frame: bigint | undefined): string {
  return `0x${(frame ?? 0n).toString(16)}`;
}

/** Waits on this thread. */
function sleep(milliseconds: number): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);
}
