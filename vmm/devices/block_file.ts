/**
 * Files behind virtual disks, and the raw ones. Data moves between file and guest memory without a copy in between: what the
 * page cache has is read on this thread, all else is waited for on threads of the blocking pool.
 *
 * @module
 */

import { check, cString, errno, Fd, libc, MAP_PRIVATE, Mapping, sysError } from "../../ffi/mod.ts";
import { type Segment, totalLength } from "./virtqueue.ts";

/** Size of a sector, in bytes: the unit of virtio-blk. */
export const SECTOR_SIZE = 512;

/** Memory of this process that system calls read and write. */
export interface HostMemory {
  /** Address of its first byte. */
  readonly address: number;
  /** Its bytes. */
  readonly bytes: Uint8Array<ArrayBuffer>;
}

/**
 * What a file does now or later. Reads and writes throw, or reject, with a `SysError` or an `Error` that says why.
 *
 * Segments are offsets in the guest's memory, or in the memory that is given. They must stay valid until the work is done.
 */
export interface BlockFile extends Disposable {
  /** Size of the disk in bytes, a multiple of 512. */
  readonly size: number;
  /** Whether it cannot be written. */
  readonly isReadOnly: boolean;
  /** Unit of reads and writes in bytes, at least 512. */
  readonly blockSize: number;
  /** Unit in bytes of what {@linkcode BlockFile.discard} gives back. */
  readonly clusterSize: number;
  /** Whether something is under way. */
  readonly isBusy: boolean;
  /**
   * Reads.
   *
   * @param offset Where in the disk
   * @param segments Where to
   * @param memory What the segments are parts of; the guest's memory unless given
   * @returns Nothing if it is done already
   */
  read(offset: number, segments: readonly Segment[], memory?: HostMemory): void | Promise<void>;
  /**
   * Writes. It is on storage after a {@linkcode BlockFile.flush}.
   *
   * @param offset Where in the disk
   * @param segments Where from
   * @param memory What the segments are parts of; the guest's memory unless given
   * @returns Nothing if it is done already
   */
  write(offset: number, segments: readonly Segment[], memory?: HostMemory): void | Promise<void>;
  /** Brings all that was written before to storage. */
  flush(): void | Promise<void>;
  /**
   * Gives room back. What was there has no defined content then.
   *
   * @param offset Where in the disk
   * @param length How many bytes
   */
  discard(offset: number, length: number): void | Promise<void>;
  /**
   * Writes zeros.
   *
   * @param offset Where in the disk
   * @param length How many bytes
   * @param mayUnmap Whether room may be given back
   */
  writeZeroes(offset: number, length: number, mayUnmap: boolean): void | Promise<void>;
  /**
   * Grows the disk.
   *
   * @param size Its new size in bytes, a multiple of 512; that of the file unless given
   */
  resize(size?: number): void | Promise<void>;
  /** Flushes, waits for all that is under way, and closes. */
  close(): Promise<void>;
}

/**
 * Takes a part of segments.
 *
 * @param segments All of them
 * @param start How many bytes to leave out
 * @param length How many bytes to take
 * @returns Segments of so many bytes, or of fewer where there are no more
 */
export function sliceSegments(segments: readonly Segment[], start: number, length: number): Segment[] {
  const slice: Segment[] = [];
  for (const segment of segments) {
    if (length <= 0) break;
    if (start >= segment.length) {
      start -= segment.length;
      continue;
    }
    const size = Math.min(segment.length - start, length);
    slice.push({ offset: segment.offset + start, length: size });
    length -= size;
    start = 0;
  }
  return slice;
}

/**
 * Fills segments with zeros.
 *
 * @param memory What they are parts of
 * @param segments The segments
 * @param start How many bytes to leave as they are
 */
export function fillZeroes(memory: HostMemory, segments: readonly Segment[], start = 0): void {
  for (const { offset, length } of segments) {
    if (start >= length) {
      start -= length;
      continue;
    }
    memory.bytes.fill(0, offset + start, offset + length);
    start = 0;
  }
}

/**
 * Makes memory for system calls known by its address.
 *
 * @param mapping Where it is
 * @returns The memory
 */
export function hostMemory(mapping: Mapping): HostMemory {
  return { address: Number(mapping.address), bytes: new Uint8Array(mapping.buffer) };
}

const ZERO_LENGTH = 65536;
let zeroes: HostMemory | undefined;

/**
 * Gives zeros to write.
 *
 * @param length How many bytes
 * @returns Segments, and what they are parts of
 */
export function zeroSource(length: number): [segments: Segment[], memory: HostMemory] {
  zeroes ??= hostMemory(new Mapping(ZERO_LENGTH, { flags: MAP_PRIVATE }));
  const segments: Segment[] = [];
  for (let done = 0; done < length; done += ZERO_LENGTH) {
    segments.push({ offset: 0, length: Math.min(ZERO_LENGTH, length - done) });
  }
  return [segments, zeroes];
}

/** Counts what is under way, so that the end of a file waits for it. */
export class Activity {
  readonly #name: string;
  #count = 0;
  #hasEnded = false;
  #finish: (() => void) | undefined;

  /**
   * Begins with nothing under way.
   *
   * @param name Of what, for messages
   */
  constructor(name: string) {
    this.#name = name;
  }

  /** Whether something is under way. */
  get isBusy(): boolean {
    return this.#count > 0;
  }

  /** Whether nothing may begin any more. */
  get hasEnded(): boolean {
    return this.#hasEnded;
  }

  /** Throws once it has ended. */
  assertOpen(): void {
    if (this.#hasEnded) throw new ReferenceError(`Cannot use "${this.#name}" as it is closed`);
  }

  /**
   * Does something. Whoever begins it asserts first that this is open; a part of what is under way needs not.
   *
   * @param work What to do
   * @returns What comes of it
   */
  async run<T>(work: () => Promise<T>): Promise<T> {
    this.#count++;
    try {
      return await work();
    } finally {
      if (--this.#count === 0) {
        const finish = this.#finish;
        this.#finish = undefined;
        finish?.();
      }
    }
  }

  /**
   * Ends it: nothing more begins.
   *
   * @param finish Called once nothing is under way, at once where nothing is
   */
  end(finish: () => void): void {
    if (this.#hasEnded) return;
    this.#hasEnded = true;
    if (this.#count === 0) finish();
    else this.#finish = finish;
  }
}

/** Most parts of one system call (Linux 6.1 `include/uapi/linux/uio.h`, `UIO_MAXIOV`). */
const IOV_MAX = 1024;

/** An array of `struct iovec` that the kernel reads. */
class Vectors {
  readonly #mapping = new Mapping(IOV_MAX * 16);
  readonly #words = new Uint32Array(this.#mapping.buffer);
  readonly pointer = this.#mapping.pointer;
  count = 0;

  /** Describes segments from a byte on; returns how many bytes, at most so many. */
  fill(memory: HostMemory, segments: readonly Segment[], start: number, limit: number): number {
    const words = this.#words;
    let bytes = 0;
    let count = 0;
    for (let index = 0; index < segments.length && count < IOV_MAX && bytes < limit; index++) {
      const { offset, length } = segments[index]!;
      if (start >= length) {
        start -= length;
        continue;
      }
      const address = memory.address + offset + start;
      const size = Math.min(length - start, limit - bytes);
      const at = count * 4;
      // Storing keeps the low 32 bits, so no bigint is needed.
      words[at] = address;
      words[at + 1] = address / 0x1_0000_0000;
      words[at + 2] = size;
      words[at + 3] = 0;
      bytes += size;
      count++;
      start = 0;
    }
    this.count = count;
    return bytes;
  }
}

// The pool has 32 threads, which also wait for events: leave some of them free, however slow the storage is.
const MAX_POOL_CALLS = 24;
const idleVectors: Vectors[] = [];
const waiting: ((vectors: Vectors) => void)[] = [];
let poolCalls = 0;
let syncVectors: Vectors | undefined;

/** Calls something on the pool as soon as not too much is there. */
async function onPool<T>(work: (vectors: Vectors) => Promise<T>): Promise<T> {
  let vectors: Vectors;
  if (poolCalls < MAX_POOL_CALLS) {
    poolCalls++;
    vectors = idleVectors.pop() ?? new Vectors();
  } else vectors = await new Promise((resolve) => waiting.push(resolve));
  try {
    return await work(vectors);
  } finally {
    const next = waiting.shift();
    if (next) next(vectors);
    else {
      poolCalls--;
      idleVectors.push(vectors);
    }
  }
}

/** `O_*` of x86-64 (Linux 6.1 `include/uapi/asm-generic/fcntl.h`). */
const O_RDONLY = 0;
const O_RDWR = 2;
const O_NONBLOCK = 0o4000;
const O_DIRECT = 0o40000;
/** `SEEK_END` (Linux 6.1 `include/uapi/linux/fs.h`). */
const SEEK_END = 2;
/** `RWF_NOWAIT` (Linux 6.1 `include/uapi/linux/fs.h`). */
const RWF_NOWAIT = 8;
/** `FALLOC_FL_*` (Linux 6.1 `include/uapi/linux/falloc.h`). */
const FALLOC_FL_KEEP_SIZE = 1;
const FALLOC_FL_PUNCH_HOLE = 2;
const FALLOC_FL_ZERO_RANGE = 16;
/** Numbers of errors (Linux 6.1 `include/uapi/asm-generic/errno-base.h` and `errno.h`). */
const EIO = 5;
const EINVAL = 22;
const EOPNOTSUPP = 95;
/** `struct statx` (Linux 6.1 `include/uapi/linux/stat.h`). */
const AT_EMPTY_PATH = 0x1000;
const STATX_TYPE = 1;
const STATX_DIOALIGN = 0x2000;
const S_IFMT = 0o170000;
const S_IFBLK = 0o060000;
const S_IFREG = 0o100000;
/** Locks of open file descriptions (Linux 6.1 `include/uapi/asm-generic/fcntl.h`). */
const F_OFD_GETLK = 36;
const F_OFD_SETLK = 37;
const F_RDLCK = 0;
const F_WRLCK = 1;
const F_UNLCK = 2;

// Bytes that QEMU locks (QEMU 7.2 `block/file-posix.c`, `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`): a lock on the first
// says what is done, a lock on the second what nobody else may do, with permissions numbered as in `BLK_PERM_*`.
const LOCK_DONE = 100;
const LOCK_REFUSED = 200;
const PERM_READ = 0;
const PERM_WRITE = 1;
const PERM_RESIZE = 3;

/** What is moved on this thread if the page cache has it: longer takes longer than a call to the pool. */
const SYNC_LIMIT = 256 * 1024;
/** What one call to the pool moves at most, so that others get their turn. */
const POOL_LIMIT = 4 * 1024 * 1024;
/** A call that takes longer has waited, in milliseconds: the pool takes over for so many times as long. */
const SLOW_CALL = 2;
const SLOW_FACTOR = 20;

function flock(type: number, start: number): Uint8Array<ArrayBuffer> {
  const lock = new Uint8Array(32);
  const view = new DataView(lock.buffer);
  view.setInt16(0, type, true);
  view.setBigInt64(8, BigInt(start), true);
  view.setBigInt64(16, 1n, true);
  return lock;
}

/** Locks a file as QEMU does, which also tells QEMU. */
function lock(fd: Fd, isReadOnly: boolean): void {
  const done = isReadOnly ? [PERM_READ] : [PERM_READ, PERM_WRITE, PERM_RESIZE];
  const refused = [PERM_WRITE, PERM_RESIZE];
  for (const byte of [...done.map((bit) => LOCK_DONE + bit), ...refused.map((bit) => LOCK_REFUSED + bit)]) {
    check(libc().fcntl_buffer(fd.number, F_OFD_SETLK, flock(F_RDLCK, byte)), "fcntl(F_OFD_SETLK)");
  }
  for (const byte of [...done.map((bit) => LOCK_REFUSED + bit), ...refused.map((bit) => LOCK_DONE + bit)]) {
    const found = flock(F_WRLCK, byte);
    check(libc().fcntl_buffer(fd.number, F_OFD_GETLK, found), "fcntl(F_OFD_GETLK)");
    if (new DataView(found.buffer).getInt16(0, true) === F_UNLCK) continue;
    throw new Error(
      `another process ${isReadOnly ? "writes to it" : "has it open"}: stop that machine or tool first`,
    );
  }
}

/** Holds the lock of a disk that something else reads and writes, until it is disposed. */
export class DiskLock implements Disposable {
  readonly #fd: Fd;

  /**
   * Locks a disk.
   *
   * @param path Path of the file, or block device
   * @param isReadOnly Whether it is not written to
   * @throws {Error} If it cannot be opened, or others use it in a way that does not go together with this
   */
  constructor(path: string, isReadOnly: boolean) {
    using undo = new DisposableStack();
    try {
      this.#fd = undo.use(Fd.open(path, O_RDONLY | O_NONBLOCK));
      lock(this.#fd, isReadOnly);
    } catch (cause) {
      throw new Error(`Cannot lock "${path}" as ${cause instanceof Error ? cause.message : cause}`, {
        cause,
      });
    }
    undo.move();
  }

  /** Lets others have it. */
  [Symbol.dispose](): void {
    this.#fd[Symbol.dispose]();
  }
}

/** How to open a raw file. */
export interface RawFileOptions {
  /** Memory of the guest. */
  readonly memory: HostMemory;
  /** Whether not to write; false unless told. */
  readonly isReadOnly?: boolean;
  /** Whether to go past the page cache; false unless told. */
  readonly isDirect?: boolean;
  /** Whether to lock it, against QEMU too; true unless told. */
  readonly isLocked?: boolean;
}

/** A file, or a block device, that holds a disk as it is. */
export class RawFile implements BlockFile {
  /** Path of the file. */
  readonly path: string;
  /** Whether it cannot be written. */
  readonly isReadOnly: boolean;
  /** Unit of reads and writes in bytes. */
  readonly blockSize: number;
  /** Unit of what can be given back: a block of usual file systems. */
  readonly clusterSize = 4096;
  readonly #memory: HostMemory;
  readonly #fd: Fd;
  readonly #direct: Fd | undefined;
  readonly #directAlignment: number;
  readonly #activity: Activity;
  #size: number;
  #isDirty = false;
  #flushing: Promise<void> | undefined;
  #flushError: Error | undefined;
  // Whether the file system can tell that a call would wait.
  #canReadNow = true;
  #canWriteNow = true;
  #isPunchable = true;
  #isZeroable = true;
  #slowUntil = 0;

  /**
   * Opens a file.
   *
   * @param path Path of the file
   * @param options How
   * @throws {Error} If it cannot be opened, or others use it in a way that does not go together with this
   */
  constructor(path: string, options: RawFileOptions) {
    const { isReadOnly = false, isDirect = false, isLocked = true } = options;
    const action = `Cannot open "${path}" as a disk${isReadOnly ? "" : " to write to"}`;
    const flags = (isReadOnly ? O_RDONLY : O_RDWR) | O_NONBLOCK;
    using undo = new DisposableStack();
    try {
      this.#fd = undo.use(Fd.open(path, flags));
      const status = new Uint8Array(256);
      check(
        libc().statx(this.#fd.number, cString(""), AT_EMPTY_PATH, STATX_TYPE | STATX_DIOALIGN, status),
        "statx()",
      );
      const view = new DataView(status.buffer);
      const type = view.getUint16(28, true) & S_IFMT;
      if (type !== S_IFREG && type !== S_IFBLK) throw new Error("it is neither a file nor a block device");
      const isKnown = (view.getUint32(0, true) & STATX_DIOALIGN) !== 0;
      const unit = isDirect && isKnown ? view.getUint32(156, true) : SECTOR_SIZE;
      if (unit === 0) throw new Error("its file system has no direct I/O: go without");
      this.blockSize = Math.max(SECTOR_SIZE, unit);
      this.#directAlignment = isKnown ? Math.max(1, view.getUint32(152, true)) : SECTOR_SIZE;
      this.#direct = isDirect ? undo.use(Fd.open(path, flags | O_DIRECT)) : undefined;
      if (isLocked) lock(this.#fd, isReadOnly);
    } catch (cause) {
      throw new Error(`${action} as ${cause instanceof Error ? cause.message : cause}`, { cause });
    }
    this.path = path;
    this.isReadOnly = isReadOnly;
    this.#memory = options.memory;
    this.#activity = new Activity(path);
    this.#size = this.length - this.length % SECTOR_SIZE;
    undo.move();
  }

  /** Size of the disk in bytes. */
  get size(): number {
    return this.#size;
  }

  /** Size of the file in bytes, as it is now. */
  get length(): number {
    return check(libc().lseek(this.#fd.number, 0n, SEEK_END), `lseek("${this.path}")`);
  }

  /** Whether something is under way. */
  get isBusy(): boolean {
    return this.#activity.isBusy;
  }

  /** See {@linkcode BlockFile.read}. Beyond the end of the file there are zeros. */
  read(
    offset: number,
    segments: readonly Segment[],
    memory: HostMemory = this.#memory,
  ): void | Promise<void> {
    this.#activity.assertOpen();
    const length = totalLength(segments);
    const done = this.#moveNow(false, offset, segments, memory, length);
    if (done < length) return this.#moveOnPool(false, offset, segments, memory, done, length);
  }

  /** See {@linkcode BlockFile.write}. Beyond the end of the file it grows. */
  write(
    offset: number,
    segments: readonly Segment[],
    memory: HostMemory = this.#memory,
  ): void | Promise<void> {
    this.#activity.assertOpen();
    const length = totalLength(segments);
    const done = this.#moveNow(true, offset, segments, memory, length);
    this.#isDirty = true;
    if (done < length) return this.#moveOnPool(true, offset, segments, memory, done, length);
  }

  /**
   * Reads on this thread, whatever it takes.
   *
   * @param offset Where in the file
   * @param segments Where to
   * @param memory What the segments are parts of
   */
  readSync(offset: number, segments: readonly Segment[], memory: HostMemory): void {
    this.#activity.assertOpen();
    if (this.#move(false, offset, segments, memory, 0) < totalLength(segments)) throw this.#error("preadv2");
  }

  /**
   * Writes on this thread, whatever it takes.
   *
   * @param offset Where in the file
   * @param segments Where from
   * @param memory What the segments are parts of
   */
  writeSync(offset: number, segments: readonly Segment[], memory: HostMemory): void {
    this.#isDirty = true;
    if (this.#move(true, offset, segments, memory, 0) < totalLength(segments)) throw this.#error("pwritev2");
  }

  /** See {@linkcode BlockFile.flush}. Once it has failed it fails for ever, as the kernel has dropped what it could not write. */
  flush(): void | Promise<void> {
    this.#activity.assertOpen();
    return this.#flush();
  }

  #flush(): void | Promise<void> {
    if (this.#flushError) throw this.#flushError;
    if (!this.#isDirty) return this.#flushing;
    this.#isDirty = false;
    const flushing = this.#activity.run(async () => {
      try {
        const result = await onPool(() => libc().fdatasync_async(this.#fd.number));
        if (result < 0) throw this.#flushFailure(EIO);
      } finally {
        if (this.#flushing === flushing) this.#flushing = undefined;
      }
    });
    return this.#flushing = flushing;
  }

  /** Brings all that was written to storage, on this thread. */
  flushSync(): void {
    if (this.#flushError) throw this.#flushError;
    if (!this.#isDirty && !this.#flushing) return;
    this.#isDirty = false;
    if (libc().fdatasync(this.#fd.number) < 0) throw this.#flushFailure(errno());
  }

  /** See {@linkcode BlockFile.discard}. Where the file system cannot, nothing happens. */
  async discard(offset: number, length: number): Promise<void> {
    await this.punch(offset, length);
  }

  /**
   * Makes a hole, which reads as zeros.
   *
   * @param offset Where in the file
   * @param length How many bytes
   * @returns Whether the file system can do that
   */
  async punch(offset: number, length: number): Promise<boolean> {
    this.#activity.assertOpen();
    this.#isPunchable &&= await this.#allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    return this.#isPunchable;
  }

  /** See {@linkcode BlockFile.writeZeroes}. */
  async writeZeroes(offset: number, length: number, mayUnmap: boolean): Promise<void> {
    this.#activity.assertOpen();
    if (mayUnmap && await this.punch(offset, length)) return;
    this.#isZeroable &&= await this.#allocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (!this.#isZeroable) await this.write(offset, ...zeroSource(length));
  }

  /** See {@linkcode BlockFile.resize}. */
  resize(size: number = this.length - this.length % SECTOR_SIZE): void {
    if (!Number.isSafeInteger(size) || size % SECTOR_SIZE !== 0 || size < this.#size) {
      throw new RangeError(
        `Cannot resize the disk "${this.path}" from ${this.#size} to ${size} bytes: ` +
          `give a multiple of 512 that is not smaller`,
      );
    }
    if (size > this.length) this.extend(size);
    this.#size = size;
  }

  /**
   * Makes the file longer.
   *
   * @param length Its new length in bytes; where it is as long already, nothing happens
   */
  extend(length: number): void {
    if (length <= this.length) return;
    check(libc().ftruncate(this.#fd.number, BigInt(length)), `ftruncate("${this.path}", ${length})`);
    this.#isDirty = true;
  }

  /** See {@linkcode BlockFile.close}. */
  async close(): Promise<void> {
    if (this.#activity.hasEnded) return;
    await new Promise<void>((resolve) => this.#activity.end(resolve));
    try {
      await this.#flush();
    } finally {
      this.#closeFiles();
    }
  }

  /** Closes the file as soon as nothing is under way. */
  [Symbol.dispose](): void {
    this.#activity.end(() => this.#closeFiles());
  }

  #closeFiles(): void {
    this.#direct?.[Symbol.dispose]();
    this.#fd[Symbol.dispose]();
  }

  #error(call: string, number = errno()): Error {
    return sysError(`${call}("${this.path}")`, number);
  }

  #flushFailure(number: number): Error {
    return this.#flushError = this.#error("fdatasync", number);
  }

  /** Moves on this thread what takes no waiting; returns how many bytes. */
  #moveNow(
    isWrite: boolean,
    offset: number,
    segments: readonly Segment[],
    memory: HostMemory,
    length: number,
  ): number {
    if (length === 0 || length > SYNC_LIMIT || this.#direct) return 0;
    if (isWrite ? this.#canWriteNow : this.#canReadNow) {
      const done = this.#move(isWrite, offset, segments, memory, RWF_NOWAIT);
      if (done > 0 || errno() !== EOPNOTSUPP) return done;
      if (isWrite) this.#canWriteNow = false;
      else this.#canReadNow = false;
    }
    // Waiting is seldom, so it is risked as long as all goes quickly.
    const start = performance.now();
    if (start < this.#slowUntil) return 0;
    const done = this.#move(isWrite, offset, segments, memory, 0);
    const end = performance.now();
    if (end - start > SLOW_CALL) this.#slowUntil = end + (end - start) * SLOW_FACTOR;
    return done;
  }

  /** Moves data on this thread until it is done or a call fails; returns how many bytes were moved. */
  #move(
    isWrite: boolean,
    offset: number,
    segments: readonly Segment[],
    memory: HostMemory,
    flags: number,
  ): number {
    const vectors = syncVectors ??= new Vectors();
    const fd = this.#fd.number;
    let done = 0;
    while (true) {
      const asked = vectors.fill(memory, segments, done, POOL_LIMIT);
      if (asked === 0) return done;
      const moved = isWrite
        ? libc().pwritev2(fd, vectors.pointer, vectors.count, BigInt(offset + done), flags)
        : libc().preadv2(fd, vectors.pointer, vectors.count, BigInt(offset + done), flags);
      if (moved < 0) return done;
      if (moved === 0) {
        if (isWrite) return done;
        fillZeroes(memory, segments, done);
        return totalLength(segments);
      }
      done += moved;
    }
  }

  #moveOnPool(
    isWrite: boolean,
    offset: number,
    segments: readonly Segment[],
    memory: HostMemory,
    done: number,
    length: number,
  ): Promise<void> {
    let isDirect = this.#direct !== undefined && this.#isAligned(offset, segments, memory);
    return this.#activity.run(async () => {
      while (done < length) {
        const moved = await onPool(async (vectors) => {
          vectors.fill(memory, segments, done, POOL_LIMIT);
          // The last bytes of a file may be less than a block.
          const isAligned = isDirect && done % this.blockSize === 0;
          const fd = (isAligned ? this.#direct! : this.#fd).number;
          const { pointer, count } = vectors;
          const at = BigInt(offset + done);
          const symbols = libc();
          const moved = isWrite
            ? await symbols.pwritev2_async(fd, pointer, count, at, 0)
            : await symbols.preadv2_async(fd, pointer, count, at, 0);
          if (moved >= 0) return moved;
          // The error number is lost on the pool: ask again here.
          const again = isWrite
            ? symbols.pwritev2(fd, pointer, count, at, 0)
            : symbols.preadv2(fd, pointer, count, at, 0);
          if (again >= 0) return again;
          if (!isAligned || errno() !== EINVAL) throw this.#error(isWrite ? "pwritev2" : "preadv2");
          isDirect = false;
          return undefined;
        });
        if (isWrite) this.#isDirty = true;
        if (moved === undefined) continue;
        if (moved === 0) {
          if (isWrite) throw this.#error("pwritev2", EIO);
          fillZeroes(memory, segments, done);
          return;
        }
        done += moved;
      }
    });
  }

  #isAligned(offset: number, segments: readonly Segment[], memory: HostMemory): boolean {
    const unit = Math.max(this.#directAlignment, 1);
    return offset % this.blockSize === 0 &&
      segments.every((segment) =>
        (memory.address + segment.offset) % unit === 0 && segment.length % this.blockSize === 0
      );
  }

  /** Calls `fallocate`; tells whether the file system can do that. */
  #allocate(mode: number, offset: number, length: number): Promise<boolean> {
    return this.#activity.run(async () => {
      const fd = this.#fd.number;
      const [start, size] = [BigInt(offset), BigInt(length)];
      const result = await onPool(() => libc().fallocate_async(fd, mode, start, size));
      if (result < 0 && libc().fallocate(fd, mode, start, size) < 0) {
        if (errno() === EOPNOTSUPP) return false;
        throw this.#error("fallocate");
      }
      this.#isDirty = true;
      return true;
    });
  }
}
