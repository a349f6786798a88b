/**
 * Files that hold disks as they are, by means of the runtime alone: for engines that work wherever it does. Reads and writes
 * are done at once, on this thread; `block_file.ts` has the ones that leave it to others where they take long.
 *
 * @module
 */

import { setImmediate } from "node:timers";
import { Activity, type BlockFile, SECTOR_SIZE } from "./block_file.ts";
import type { Segment } from "./virtqueue.ts";

/** How many zeros are written until everything else has its turn, in bytes. */
const ZEROES_LENGTH = 2 ** 20;

/** The part of a guest's memory that is used here. */
export interface PlainMemory {
  /** Its bytes, taken anew for each request. */
  readonly bytes: Uint8Array<ArrayBuffer>;
}

/** How to open a file. */
export interface PlainFileOptions {
  /** Memory of the guest. */
  readonly memory: PlainMemory;
  /** Whether not to write; false unless told. */
  readonly isReadOnly?: boolean;
}

/** A file that holds a disk as it is, locked for as long as it is open: against others of its kind, not against QEMU. */
export class PlainFile implements BlockFile {
  /** Path of the file. */
  readonly path: string;
  /** Whether it cannot be written. */
  readonly isReadOnly: boolean;
  /** Unit of reads and writes in bytes. */
  readonly blockSize: number = SECTOR_SIZE;
  /** Unit of what could be given back: a block of usual file systems. */
  readonly clusterSize = 4096;
  readonly #memory: PlainMemory;
  readonly #file: Deno.FsFile;
  /** The same file, as one that is brought to storage cannot be read or written at the same time. */
  readonly #flushed: Deno.FsFile;
  readonly #activity: Activity;
  #size: number;
  #isDirty = false;
  #flushing: Promise<void> | undefined;
  #flushError: Error | undefined;

  /**
   * Opens a file.
   *
   * @param path Path of the file
   * @param options How
   * @throws {Error} If it cannot be opened, or others use it in a way that does not go together with this
   */
  constructor(path: string, options: PlainFileOptions) {
    const { memory, isReadOnly = false } = options;
    using undo = new DisposableStack();
    try {
      // Asked before it is opened: a named pipe would block.
      const info = Deno.statSync(path);
      if (info.isBlockDevice) {
        throw new Error("it is a block device: copy it to a file, or choose another engine");
      }
      if (!info.isFile) throw new Error("it is not a file");
      this.#file = undo.use(Deno.openSync(path, { read: true, write: !isReadOnly }));
      this.#flushed = undo.use(Deno.openSync(path, { read: true, write: !isReadOnly }));
      if (!this.#file.tryLockSync(!isReadOnly)) {
        throw new Error(
          `another process ${isReadOnly ? "writes to it" : "has it open"}: stop that machine or tool first`,
        );
      }
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      const action = `Cannot open "${path}" as a disk${isReadOnly ? "" : " to write to"}`;
      throw new Error(`${action} as ${reason}`, { cause });
    }
    this.path = path;
    this.isReadOnly = isReadOnly;
    this.#memory = memory;
    this.#activity = new Activity(path);
    this.#size = this.#wholeSectors();
    undo.move();
  }

  /** Size of the disk in bytes. */
  get size(): number {
    return this.#size;
  }

  /** Whether something is under way. */
  get isBusy(): boolean {
    return this.#activity.isBusy;
  }

  /** See {@linkcode BlockFile.read}. Beyond the end of the file there are zeros. */
  read(offset: number, segments: readonly Segment[], memory: PlainMemory = this.#memory): void {
    this.#activity.assertOpen();
    const { bytes } = memory;
    this.#file.seekSync(offset, Deno.SeekMode.Start);
    for (const segment of segments) {
      const target = bytes.subarray(segment.offset, segment.offset + segment.length);
      for (let at = 0; at < target.length;) {
        const count = this.#file.readSync(target.subarray(at));
        if (count === null) {
          target.fill(0, at);
          break;
        }
        at += count;
      }
    }
  }

  /** See {@linkcode BlockFile.write}. Beyond the end of the file it grows. */
  write(offset: number, segments: readonly Segment[], memory: PlainMemory = this.#memory): void {
    this.#activity.assertOpen();
    const { bytes } = memory;
    this.#isDirty = true;
    this.#file.seekSync(offset, Deno.SeekMode.Start);
    for (const segment of segments) {
      this.#write(bytes.subarray(segment.offset, segment.offset + segment.length));
    }
  }

  /** See {@linkcode BlockFile.flush}. Once it has failed it fails for ever, as the kernel may have dropped what it could not write. */
  flush(): void | Promise<void> {
    this.#activity.assertOpen();
    return this.#flush();
  }

  /** See {@linkcode BlockFile.discard}. Nothing is given back, so nothing happens. */
  discard(_offset: number, _length: number): void {
    this.#activity.assertOpen();
  }

  /** See {@linkcode BlockFile.writeZeroes}. They are written, and take the room that they take: none is given back. */
  async writeZeroes(offset: number, length: number, _mayUnmap: boolean): Promise<void> {
    this.#activity.assertOpen();
    await this.#activity.run(async () => {
      const zeroes = new Uint8Array(Math.min(length, ZEROES_LENGTH));
      for (let done = 0; done < length; done += zeroes.length) {
        if (done > 0) await new Promise<void>((resolve) => setImmediate(resolve));
        this.#isDirty = true;
        this.#file.seekSync(offset + done, Deno.SeekMode.Start);
        this.#write(zeroes.subarray(0, length - done));
      }
    });
  }

  /** See {@linkcode BlockFile.resize}. */
  resize(size: number = this.#wholeSectors()): void {
    this.#activity.assertOpen();
    if (!Number.isSafeInteger(size) || size % SECTOR_SIZE !== 0 || size < this.#size) {
      throw new RangeError(
        `Cannot resize the disk "${this.path}" from ${this.#size} to ${size} bytes: ` +
          `give a multiple of 512 that is not smaller`,
      );
    }
    if (size > this.#file.statSync().size) {
      this.#file.truncateSync(size);
      this.#isDirty = true;
    }
    this.#size = size;
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

  #write(bytes: Uint8Array<ArrayBuffer>): void {
    for (let at = 0; at < bytes.length;) at += this.#file.writeSync(bytes.subarray(at));
  }

  #flush(): void | Promise<void> {
    if (this.#flushError) throw this.#flushError;
    if (!this.#isDirty) return this.#flushing;
    this.#isDirty = false;
    const before = this.#flushing;
    const flushing = this.#activity.run(async () => {
      try {
        await before;
        await this.#flushed.syncData();
      } catch (cause) {
        throw this.#flushError ??= new Error(
          `Cannot bring "${this.path}" to storage as ${cause instanceof Error ? cause.message : cause}`,
          { cause },
        );
      } finally {
        if (this.#flushing === flushing) this.#flushing = undefined;
      }
    });
    return this.#flushing = flushing;
  }

  #wholeSectors(): number {
    const { size } = this.#file.statSync();
    return size - size % SECTOR_SIZE;
  }

  #closeFiles(): void {
    this.#flushed.close();
    this.#file.close();
  }
}
