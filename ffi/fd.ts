/**
 * File descriptors and memory mappings with an owner.
 *
 * @module
 */

import { check, cString, errno, libc } from "./libc.ts";

/** `O_RDWR`, `O_CLOEXEC` (Linux 6.1 `include/uapi/asm-generic/fcntl.h`). */
export const O_RDWR = 0o2;
/** See {@linkcode O_RDWR}. */
export const O_CLOEXEC = 0o2000000;
/** `EFD_CLOEXEC`, `EFD_NONBLOCK` (Linux 6.1 `include/uapi/linux/eventfd.h`). */
export const EFD_CLOEXEC = 0o2000000;
/** See {@linkcode EFD_CLOEXEC}. */
export const EFD_NONBLOCK = 0o4000;
/** `MFD_CLOEXEC` (Linux 6.1 `include/uapi/linux/memfd.h`). */
export const MFD_CLOEXEC = 1;
/** `PROT_READ`, `PROT_WRITE`, `PROT_EXEC` (Linux 6.1 `include/uapi/asm-generic/mman-common.h`). */
export const PROT_READ = 1;
/** See {@linkcode PROT_READ}. */
export const PROT_WRITE = 2;
/** See {@linkcode PROT_READ}. */
export const PROT_EXEC = 4;
/** `MAP_SHARED` (Linux 6.1 `include/uapi/linux/mman.h`). */
export const MAP_SHARED = 0x01;
/** `MAP_PRIVATE`. */
export const MAP_PRIVATE = 0x02;
/** `MAP_ANONYMOUS` (Linux 6.1 `include/uapi/asm-generic/mman-common.h`). */
export const MAP_ANONYMOUS = 0x20;
/** `MAP_NORESERVE` (Linux 6.1 `include/uapi/asm-generic/mman.h`). */
export const MAP_NORESERVE = 0x4000;

const EPOLLIN = 1;
const EPOLL_CTL_ADD = 1;
const EPOLL_CTL_DEL = 2;
const EINTR = 4;
const EAGAIN = 11;

/** A file descriptor that is closed when disposed. */
export class Fd implements Disposable {
  readonly #name: string;
  #number: number;

  /**
   * Takes over an open descriptor.
   *
   * @param number The descriptor
   * @param name What it is, for messages
   */
  constructor(number: number, name: string) {
    this.#number = number;
    this.#name = name;
  }

  /**
   * Opens a file for reading and writing.
   *
   * @param path Path of the file
   * @param flags `O_*` flags; read and write unless told
   * @returns The descriptor
   */
  static open(path: string, flags: number = O_RDWR): Fd {
    return new Fd(check(libc().open(cString(path), flags | O_CLOEXEC, 0), `open("${path}")`), path);
  }

  /**
   * Makes an eventfd.
   *
   * @param flags `EFD_*` flags
   * @returns The descriptor
   */
  static event(flags: number = EFD_NONBLOCK): Fd {
    return new Fd(check(libc().eventfd(0, flags | EFD_CLOEXEC), "eventfd()"), "eventfd");
  }

  /**
   * Makes an epoll instance.
   *
   * @returns The descriptor
   */
  static epoll(): Fd {
    return new Fd(check(libc().epoll_create1(O_CLOEXEC), "epoll_create1()"), "epoll");
  }

  /**
   * Makes a file that lives in memory.
   *
   * @param name A name for it, as `/proc/PID/fd` shows it
   * @param bytes Its size
   * @returns The descriptor
   */
  static memory(name: string, bytes: number): Fd {
    const fd = new Fd(
      check(libc().memfd_create(cString(name), MFD_CLOEXEC), `memfd_create("${name}")`),
      name,
    );
    try {
      check(libc().ftruncate(fd.number, BigInt(bytes)), `ftruncate("${name}", ${bytes})`);
    } catch (error) {
      fd[Symbol.dispose]();
      throw error;
    }
    return fd;
  }

  /** The number; throws once disposed. */
  get number(): number {
    if (this.#number < 0) {
      throw new ReferenceError(`Cannot use the descriptor of "${this.#name}" as it is closed`);
    }
    return this.#number;
  }

  /** Whether it is closed. */
  get isClosed(): boolean {
    return this.#number < 0;
  }

  /**
   * Calls `ioctl` with a number.
   *
   * @param request The request
   * @param argument The argument
   * @param name Name of the request, for messages
   * @returns What it returns
   */
  ioctl(request: number, argument: number | bigint, name: string): number {
    return check(libc().ioctl(this.number, BigInt(request), BigInt(argument)), `ioctl(${name})`);
  }

  /**
   * Calls `ioctl` with a structure.
   *
   * @param request The request
   * @param argument The structure
   * @param name Name of the request, for messages
   * @returns What it returns
   */
  ioctlBuffer(request: number, argument: Uint8Array<ArrayBuffer>, name: string): number {
    return check(libc().ioctl_buffer(this.number, BigInt(request), argument), `ioctl(${name})`);
  }

  /**
   * Lets this epoll instance watch for input.
   *
   * @param fd What to watch
   */
  watch(fd: Fd): void {
    // struct epoll_event of x86-64 is packed: events, then the user's data (Linux 6.1 `include/uapi/linux/eventpoll.h`).
    const event = new Uint8Array(12);
    const view = new DataView(event.buffer);
    view.setUint32(0, EPOLLIN, true);
    view.setUint32(4, fd.number, true);
    check(libc().epoll_ctl(this.number, EPOLL_CTL_ADD, fd.number, event), "epoll_ctl(EPOLL_CTL_ADD)");
  }

  /**
   * Lets this epoll instance watch something no more.
   *
   * @param fd What it watched
   */
  unwatch(fd: Fd): void {
    check(libc().epoll_ctl(this.number, EPOLL_CTL_DEL, fd.number, null), "epoll_ctl(EPOLL_CTL_DEL)");
  }

  /**
   * Waits, on this thread, until something that this epoll instance watches has input.
   *
   * @param events Memory for as many `struct epoll_event`
   * @param timeout Milliseconds; -1 for ever
   * @param count How many events to take at most
   * @returns How many there are; 0 after the timeout, and after a signal
   */
  poll(events: Deno.PointerObject, timeout: number, count = 1): number {
    const found = libc().epoll_wait(this.number, events, count, timeout);
    return found < 0 && errno() === EINTR ? 0 : check(found, "epoll_wait()");
  }

  /** Adds one to this eventfd. */
  signal(): void {
    check(libc().eventfd_write(this.number, 1n), "eventfd_write()");
  }

  /**
   * Takes what this eventfd has counted.
   *
   * @returns The count; 0 where there is none
   */
  drain(): bigint {
    const count = new BigUint64Array(1);
    const result = libc().eventfd_read(this.number, new Uint8Array(count.buffer));
    if (result < 0 && errno() !== EAGAIN) check(result, "eventfd_read()");
    return count[0]!;
  }

  /** Closes it. */
  [Symbol.dispose](): void {
    if (this.#number < 0) return;
    libc().close(this.#number);
    this.#number = -1;
  }
}

/** How to map memory. */
export interface MappingOptions {
  /** `PROT_*`; read and write unless told. */
  readonly protection?: number;
  /** `MAP_*`; shared unless told, and anonymous where there is no file. */
  readonly flags?: number;
  /** The file; memory without one. */
  readonly fd?: Fd;
  /** Where in the file to begin. */
  readonly offset?: number;
}

/** Mapped memory that is unmapped when disposed. Its views must not be used afterwards. */
export class Mapping implements Disposable {
  /** Its size in bytes. */
  readonly length: number;
  #pointer: Deno.PointerObject | null;
  #buffer: ArrayBuffer | undefined;

  /**
   * Maps memory.
   *
   * @param length Its size in bytes, a multiple of the page size
   * @param options Protection and file
   */
  constructor(length: number, options: MappingOptions = {}) {
    const { protection = PROT_READ | PROT_WRITE, fd, offset = 0 } = options;
    const flags = (options.flags ?? MAP_SHARED) | (fd ? 0 : MAP_ANONYMOUS);
    const pointer = libc().mmap(0n, BigInt(length), protection, flags, fd?.number ?? -1, BigInt(offset));
    // MAP_FAILED is -1.
    if (pointer === null || Deno.UnsafePointer.value(pointer) === 0xffff_ffff_ffff_ffffn) {
      check(-1, `mmap(${length})`);
    }
    this.#pointer = pointer;
    this.length = length;
  }

  /** Its address in this process. */
  get pointer(): Deno.PointerObject {
    if (!this.#pointer) throw new ReferenceError("Cannot use a mapping as it is unmapped");
    return this.#pointer;
  }

  /** Its address as a number. */
  get address(): bigint {
    return Deno.UnsafePointer.value(this.pointer);
  }

  /** Its bytes: an alias, made once. Never post it to another isolate, which would copy it. */
  get buffer(): ArrayBuffer {
    this.#buffer ??= Deno.UnsafePointerView.getArrayBuffer(this.pointer, this.length);
    return this.#buffer;
  }

  /**
   * Finds the address of a byte.
   *
   * @param offset Offset of the byte
   * @returns Its pointer
   */
  at(offset: number): Deno.PointerObject {
    if (offset < 0 || offset >= this.length) {
      throw new RangeError(`Cannot point at byte ${offset} of ${this.length}`);
    }
    return Deno.UnsafePointer.create(this.address + BigInt(offset))!;
  }

  /**
   * Changes what may be done with it.
   *
   * @param protection `PROT_*`
   */
  protect(protection: number): void {
    check(libc().mprotect(this.pointer, BigInt(this.length), protection), `mprotect(${this.length})`);
  }

  /** Unmaps it. */
  [Symbol.dispose](): void {
    if (!this.#pointer) return;
    libc().munmap(this.#pointer, BigInt(this.length));
    this.#pointer = null;
    this.#buffer = undefined;
  }
}
