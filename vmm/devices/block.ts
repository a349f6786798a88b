/**
 * The virtio block device (virtio 1.2, section 5.2).
 *
 * @module
 */

import { type BlockFile, SECTOR_SIZE, sliceSegments } from "./block_file.ts";
import type { RateLimiter } from "./rate_limiter.ts";
import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice } from "./virtio_device.ts";
import {
  type DescriptorChain,
  type Segment,
  totalLength,
  type Virtqueue,
  VirtqueueError,
} from "./virtqueue.ts";

/** Features by name. */
export const VIRTIO_BLK_F = {
  SIZE_MAX: 1n << 1n,
  SEG_MAX: 1n << 2n,
  RO: 1n << 5n,
  BLK_SIZE: 1n << 6n,
  FLUSH: 1n << 9n,
  TOPOLOGY: 1n << 10n,
  DISCARD: 1n << 13n,
  WRITE_ZEROES: 1n << 14n,
} as const;

/** Types of requests by name. */
export const VIRTIO_BLK_T = { IN: 0, OUT: 1, FLUSH: 4, GET_ID: 8, DISCARD: 11, WRITE_ZEROES: 13 } as const;

/** Results of requests by name. */
export const VIRTIO_BLK_S = { OK: 0, IOERR: 1, UNSUPP: 2 } as const;

const QUEUE_SIZE = 256;
const CONFIG_SIZE = 60;
const HEADER_SIZE = 16;
const SERIAL_SIZE = 20;
/** Room in the queue for data, beside header and status. */
const MAX_SEGMENTS = QUEUE_SIZE - 2;
const MAX_SEGMENT_SIZE = 256 * 1024;
/** What no driver asks for that respects the two above; more could hold up everybody else. */
const MAX_REQUEST_SIZE = MAX_SEGMENTS * MAX_SEGMENT_SIZE;
const CLEAR_SEGMENT_SIZE = 16;
const MAX_CLEAR_SEGMENTS = 32;
const MAX_CLEAR_SECTORS = 2 ** 22;
const CLEAR_FLAG_UNMAP = 1;
/** What file systems below us work with, in bytes. */
const PHYSICAL_BLOCK_SIZE = 4096;
const MAX_IN_FLIGHT = 64;
/** How long a queue is served until everything else has its turn, in milliseconds. */
const MAX_TURN = 4;

/** How to make a block device. */
export interface BlockDeviceOptions {
  /** The file behind it, which it closes in the end. */
  readonly file: BlockFile;
  /** Serial number that the guest sees, at most 20 bytes; none unless given. */
  readonly serial?: string;
  /** Whether the guest may not write; as the file unless told. */
  readonly isReadOnly?: boolean;
  /**
   * Whether the guest's flushes reach storage ("writeback", unless told), or are for nothing ("unsafe"). A guest that does
   * not know how to flush gets all that it writes to storage at once.
   */
  readonly cache?: "writeback" | "unsafe";
  /** Limits; none unless given. */
  readonly rateLimiter?: RateLimiter;
  /** Gets the reason of each request that the guest is told has failed. */
  readonly onError?: (error: unknown) => void;
}

/** What a block device has done since it was made. */
export interface BlockStatistics {
  /** Reads that ended well. */
  reads: number;
  /** Writes that ended well. */
  writes: number;
  /** Flushes that ended well. */
  flushes: number;
  /** Discards, and writes of zeros, that ended well. */
  clears: number;
  /** Bytes of reads. */
  readBytes: number;
  /** Bytes of writes. */
  writtenBytes: number;
  /** Requests that failed. */
  errors: number;
  /** How often a request had to wait for the rate limiter. */
  throttled: number;
}

/** A request that has begun. */
interface Request {
  readonly head: number;
  readonly type: number;
  readonly length: number;
  readonly isInput: boolean;
  readonly statusOffset: number;
}

/** A virtio block device with one queue. */
export class BlockDevice implements VirtioDevice {
  /** Its type. */
  readonly type: number = VIRTIO_DEVICE.block;
  /** Features that it offers. */
  readonly features: bigint;
  /** One queue. */
  readonly queueSizes: readonly number[] = [QUEUE_SIZE];
  /** `struct virtio_blk_config`. */
  readonly config: Uint8Array<ArrayBuffer> = new Uint8Array(CONFIG_SIZE);
  /** What it has done. */
  readonly statistics: BlockStatistics = {
    reads: 0,
    writes: 0,
    flushes: 0,
    clears: 0,
    readBytes: 0,
    writtenBytes: 0,
    errors: 0,
    throttled: 0,
  };
  readonly #configView = new DataView(this.config.buffer);
  readonly #serial = new Uint8Array(SERIAL_SIZE);
  readonly #isReadOnly: boolean;
  readonly #isSafe: boolean;
  readonly #onError: ((error: unknown) => void) | undefined;
  readonly #scratch = new DataView(new ArrayBuffer(CLEAR_SEGMENT_SIZE * MAX_CLEAR_SEGMENTS));
  #file: BlockFile;
  #rateLimiter: RateLimiter | undefined;
  #context: DeviceContext | undefined;
  /** Changes with each reset, so that what is under way then does not touch the queue any more. */
  #generation = 0;
  #isWriteThrough = false;
  #inFlight = 0;
  #hasUsed = false;
  #isEndScheduled = false;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a device.
   *
   * @param options File, serial number and limits
   * @throws {RangeError} If the serial number is too long
   */
  constructor(options: BlockDeviceOptions) {
    const { file, serial = "", isReadOnly = false, cache = "writeback", rateLimiter, onError } = options;
    const bytes = new TextEncoder().encode(serial);
    if (bytes.length > SERIAL_SIZE) {
      throw new RangeError(
        `Cannot give a disk the serial number "${serial}" as it is longer than ${SERIAL_SIZE} bytes`,
      );
    }
    this.#serial.set(bytes);
    this.#file = file;
    this.#isReadOnly = isReadOnly || file.isReadOnly;
    this.#isSafe = cache === "writeback";
    this.#rateLimiter = rateLimiter;
    this.#onError = onError;
    const { SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH, TOPOLOGY, DISCARD, WRITE_ZEROES } = VIRTIO_BLK_F;
    this.features = SIZE_MAX | SEG_MAX | BLK_SIZE | TOPOLOGY | (this.#isSafe ? FLUSH : 0n) |
      (this.#isReadOnly ? RO : DISCARD | WRITE_ZEROES);
    this.#describe();
  }

  /** Size of the disk in bytes. */
  get size(): number {
    return this.#file.size;
  }

  /** Whether requests, or what is left of them after a reset, are under way. */
  get isBusy(): boolean {
    return this.#inFlight > 0 || this.#file.isBusy;
  }

  /**
   * Begins to serve the guest.
   *
   * @param context What to work with, until the reset
   */
  activate(context: DeviceContext): void {
    this.#context = context;
    this.#isWriteThrough = this.#isSafe && (context.features & VIRTIO_BLK_F.FLUSH) === 0n;
    this.#hasUsed = false;
  }

  /** Serves the queue. */
  notify(): void {
    this.#serve();
  }

  /** Forgets the guest. Requests that are under way end without a trace but in the file, and in memory that they read to. */
  reset(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#context = undefined;
    this.#generation++;
  }

  /**
   * Sets other limits, with full buckets.
   *
   * @param rateLimiter The limits; none unless given
   */
  updateRateLimiter(rateLimiter?: RateLimiter): void {
    this.#rateLimiter = rateLimiter;
    if (this.#timer === undefined) return;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#serve();
  }

  /**
   * Grows the disk and tells the guest.
   *
   * @param size Its new size in bytes, a multiple of 512; that of the file unless given
   */
  async grow(size?: number): Promise<void> {
    await this.#file.resize(size);
    this.#changed();
  }

  /**
   * Takes another file instead of the one it has, which it closes, and tells the guest.
   *
   * @param file The file
   */
  replaceFile(file: BlockFile): void {
    const old = this.#file;
    this.#file = file;
    this.#changed();
    old[Symbol.dispose]();
  }

  /** Forgets the guest, waits for all that is under way, brings it to storage and closes the file. */
  async close(): Promise<void> {
    this.reset();
    await this.#file.close();
  }

  /** Forgets the guest and closes the file as soon as nothing is under way. */
  [Symbol.dispose](): void {
    this.reset();
    this.#file[Symbol.dispose]();
  }

  #changed(): void {
    this.#describe();
    this.#context?.configChanged();
  }

  #describe(): void {
    const view = this.#configView;
    const { size, blockSize, clusterSize } = this.#file;
    view.setBigUint64(0, BigInt(Math.floor(size / SECTOR_SIZE)), true);
    view.setUint32(8, MAX_SEGMENT_SIZE, true);
    view.setUint32(12, MAX_SEGMENTS, true);
    view.setUint32(20, blockSize, true);
    const blocks = Math.max(1, PHYSICAL_BLOCK_SIZE / blockSize);
    view.setUint8(24, Math.log2(blocks));
    view.setUint16(26, blocks, true);
    if (this.#isReadOnly) return;
    for (const at of [36, 48]) {
      view.setUint32(at, MAX_CLEAR_SECTORS, true);
      view.setUint32(at + 4, MAX_CLEAR_SEGMENTS, true);
    }
    view.setUint32(44, clusterSize / SECTOR_SIZE, true);
    view.setUint8(56, 1);
  }

  #serve(): void {
    const context = this.#context;
    const queue = context?.queues[0];
    if (!context || !queue?.isReady) return;
    try {
      if (this.#timer === undefined) this.#takeAll(context, queue);
    } catch (error) {
      this.reset();
      context.fail(error);
      return;
    }
    if (!this.#hasUsed) return;
    this.#hasUsed = false;
    context.interrupt(queue);
  }

  #serveLater(milliseconds: number): void {
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#serve();
    }, Math.ceil(milliseconds));
  }

  #takeAll(context: DeviceContext, queue: Virtqueue): void {
    const start = performance.now();
    while (true) {
      queue.setNotification(false);
      while (this.#inFlight < MAX_IN_FLIGHT) {
        const chain = queue.pop();
        if (!chain) break;
        const wait = this.#take(context, queue, chain);
        if (wait > 0) {
          this.statistics.throttled++;
          queue.unpop();
          return this.#serveLater(wait);
        }
        if (performance.now() - start > MAX_TURN) return this.#serveLater(0);
      }
      // The end of a request serves the queue again.
      if (this.#inFlight >= MAX_IN_FLIGHT) return;
      queue.setNotification(true);
      if (!queue.hasPending) return;
    }
  }

  /** Begins a request; returns 0, or how many milliseconds it has to wait, where nothing has happened yet. */
  #take(context: DeviceContext, queue: Virtqueue, { head, readable, writable }: DescriptorChain): number {
    let last = writable.length - 1;
    while (last >= 0 && writable[last]!.length === 0) last--;
    if (last < 0) throw new VirtqueueError("a request to a disk has no room for its status");
    const end = writable[last]!;
    const statusOffset = end.offset + end.length - 1;
    let header = context.memory.view;
    let at = readable[0]?.offset ?? 0;
    if (!readable[0] || readable[0].length < HEADER_SIZE) {
      if (this.#gather(context, readable, 0, HEADER_SIZE) < HEADER_SIZE) {
        throw new VirtqueueError("a request to a disk has no header");
      }
      header = this.#scratch;
      at = 0;
    }
    const type = header.getUint32(at, true);
    const sector = header.getUint32(at + 8, true) + header.getUint32(at + 12, true) * 0x1_0000_0000;
    const isInput = type === VIRTIO_BLK_T.IN || type === VIRTIO_BLK_T.GET_ID;
    let data: Segment[];
    if (isInput) {
      data = writable.slice(0, last);
      if (end.length > 1) data.push({ offset: end.offset, length: end.length - 1 });
    } else if (readable[0]!.length === HEADER_SIZE) data = readable.slice(1);
    else data = sliceSegments(readable, HEADER_SIZE, Infinity);
    if (type === VIRTIO_BLK_T.GET_ID) data = sliceSegments(data, 0, SERIAL_SIZE);
    const length = totalLength(data);

    const isTransfer = type === VIRTIO_BLK_T.IN || type === VIRTIO_BLK_T.OUT;
    const wait = this.#rateLimiter?.consume(isTransfer ? length : 0) ?? 0;
    if (wait > 0) return wait;

    const request = { head, type, length, isInput, statusOffset };
    let result: number | void | Promise<void>;
    try {
      result = this.#execute(context, type, sector, data, length);
    } catch (error) {
      result = this.#failed(error);
    }
    if (result instanceof Promise) this.#await(context, queue, request, result);
    else this.#finish(context, queue, request, result ?? VIRTIO_BLK_S.OK);
    return 0;
  }

  #await(context: DeviceContext, queue: Virtqueue, request: Request, pending: Promise<void>): void {
    const generation = this.#generation;
    this.#inFlight++;
    pending.then(() => VIRTIO_BLK_S.OK, (error) => this.#failed(error)).then((status) => {
      this.#inFlight--;
      if (this.#generation === generation) this.#finish(context, queue, request, status);
      // Others may end in the same turn: one interrupt will do.
      if (this.#isEndScheduled) return;
      this.#isEndScheduled = true;
      queueMicrotask(() => {
        this.#isEndScheduled = false;
        this.#serve();
      });
    });
  }

  #finish(context: DeviceContext, queue: Virtqueue, request: Request, status: number): void {
    const { head, type, length, isInput, statusOffset } = request;
    if (status === VIRTIO_BLK_S.OK) this.#count(type, length);
    else this.statistics.errors++;
    context.memory.bytes[statusOffset] = status;
    queue.push(head, isInput && status === VIRTIO_BLK_S.OK ? length + 1 : 1);
    this.#hasUsed = true;
  }

  #execute(
    context: DeviceContext,
    type: number,
    sector: number,
    data: readonly Segment[],
    length: number,
  ): number | void | Promise<void> {
    switch (type) {
      case VIRTIO_BLK_T.IN:
        this.#assertRange(sector, length);
        return this.#file.read(sector * SECTOR_SIZE, data);
      case VIRTIO_BLK_T.OUT:
        this.#assertRange(sector, length);
        this.#assertWritable();
        return this.#throughCache(this.#file.write(sector * SECTOR_SIZE, data));
      case VIRTIO_BLK_T.FLUSH:
        return this.#isSafe ? this.#file.flush() : undefined;
      case VIRTIO_BLK_T.GET_ID: {
        let at = 0;
        for (const { offset, length } of data) {
          context.memory.bytes.set(this.#serial.subarray(at, at + length), offset);
          at += length;
        }
        return;
      }
      case VIRTIO_BLK_T.DISCARD:
      case VIRTIO_BLK_T.WRITE_ZEROES:
        return this.#clear(context, type, data, length);
      default:
        return VIRTIO_BLK_S.UNSUPP;
    }
  }

  #clear(
    context: DeviceContext,
    type: number,
    data: readonly Segment[],
    length: number,
  ): number | void | Promise<void> {
    this.#assertWritable();
    const size = this.#scratch.byteLength;
    if (length === 0 || length > size || length % CLEAR_SEGMENT_SIZE !== 0) {
      throw new RangeError(`Cannot clear parts of a disk that ${length} bytes describe`);
    }
    this.#gather(context, data, 0, length);
    const isDiscard = type === VIRTIO_BLK_T.DISCARD;
    const parts: { offset: number; length: number; mayUnmap: boolean }[] = [];
    for (let at = 0; at < length; at += CLEAR_SEGMENT_SIZE) {
      const sector = this.#scratch.getUint32(at, true) +
        this.#scratch.getUint32(at + 4, true) * 0x1_0000_0000;
      const sectors = this.#scratch.getUint32(at + 8, true);
      const flags = this.#scratch.getUint32(at + 12, true);
      if (isDiscard ? flags !== 0 : (flags & ~CLEAR_FLAG_UNMAP) !== 0) return VIRTIO_BLK_S.UNSUPP;
      if (sectors > MAX_CLEAR_SECTORS) {
        throw new RangeError(`Cannot clear ${sectors} sectors of a disk at once`);
      }
      this.#assertInside(sector, sectors * SECTOR_SIZE);
      parts.push({
        offset: sector * SECTOR_SIZE,
        length: sectors * SECTOR_SIZE,
        mayUnmap: flags === CLEAR_FLAG_UNMAP,
      });
    }
    const file = this.#file;
    return this.#throughCache((async () => {
      for (const { offset, length, mayUnmap } of parts) {
        if (length === 0) continue;
        if (isDiscard) await file.discard(offset, length);
        else await file.writeZeroes(offset, length, mayUnmap);
      }
    })());
  }

  /** Flushes after a write where the guest takes it for lasting. */
  #throughCache(write: void | Promise<void>): void | Promise<void> {
    if (!this.#isWriteThrough) return write;
    const file = this.#file;
    return write ? write.then(() => file.flush()) : file.flush();
  }

  #assertRange(sector: number, length: number): void {
    const { blockSize } = this.#file;
    if (length > MAX_REQUEST_SIZE) {
      throw new RangeError(`Cannot move ${length} bytes in one request to a disk`);
    }
    if (length % blockSize !== 0 || sector * SECTOR_SIZE % blockSize !== 0) {
      throw new RangeError(
        `Cannot move ${length} bytes at sector ${sector} as the disk has blocks of ${blockSize} bytes`,
      );
    }
    this.#assertInside(sector, length);
  }

  #assertInside(sector: number, length: number): void {
    const { size } = this.#file;
    if (sector * SECTOR_SIZE + length > size) {
      throw new RangeError(`Cannot use ${length} bytes at sector ${sector} of a disk of ${size} bytes`);
    }
  }

  #assertWritable(): void {
    if (this.#isReadOnly) throw new Error("Cannot write to a disk that is read-only");
  }

  /** Copies bytes of segments to scratch memory; returns how many there were. */
  #gather({ memory }: DeviceContext, segments: readonly Segment[], start: number, length: number): number {
    const target = new Uint8Array(this.#scratch.buffer);
    let at = 0;
    for (const part of sliceSegments(segments, start, length)) {
      target.set(memory.bytes.subarray(part.offset, part.offset + part.length), at);
      at += part.length;
    }
    return at;
  }

  #failed(error: unknown): number {
    this.#onError?.(error);
    return VIRTIO_BLK_S.IOERR;
  }

  #count(type: number, length: number): void {
    const { statistics } = this;
    switch (type) {
      case VIRTIO_BLK_T.IN:
        statistics.reads++;
        statistics.readBytes += length;
        break;
      case VIRTIO_BLK_T.OUT:
        statistics.writes++;
        statistics.writtenBytes += length;
        break;
      case VIRTIO_BLK_T.FLUSH:
        statistics.flushes++;
        break;
      case VIRTIO_BLK_T.DISCARD:
      case VIRTIO_BLK_T.WRITE_ZEROES:
        statistics.clears++;
        break;
    }
  }
}
