/**
 * Split virtqueues, as the device sees them (virtio 1.2, section 2.7). Rings and descriptors are the guest's: each value is
 * read once and checked before it is used.
 *
 * @module
 */

import type { GuestMemory } from "./guest_memory.ts";

/** Features of rings (virtio 1.2, section 6). */
export const VIRTIO_F_INDIRECT_DESC: bigint = 1n << 28n;
/** See {@linkcode VIRTIO_F_INDIRECT_DESC}. */
export const VIRTIO_F_EVENT_IDX: bigint = 1n << 29n;
/** The device follows virtio 1.0 and later. */
export const VIRTIO_F_VERSION_1: bigint = 1n << 32n;

const DESCRIPTOR_SIZE = 16;
const DESC_F_NEXT = 1;
const DESC_F_WRITE = 2;
const DESC_F_INDIRECT = 4;
const AVAIL_F_NO_INTERRUPT = 1;
const USED_F_NO_NOTIFY = 1;
/** Most descriptors of one chain, whatever the tables say. */
export const MAX_CHAIN = 1024;

/** The guest broke the rules of a virtqueue. The device needs a reset. */
export class VirtqueueError extends Error {
  /**
   * Explains what the guest did.
   *
   * @param message What is wrong
   */
  constructor(message: string) {
    super(message);
    this.name = "VirtqueueError";
  }
}

/** A part of a buffer, checked: it is memory of the guest. */
export interface Segment {
  /** Offset in the views of {@linkcode GuestMemory}. */
  readonly offset: number;
  /** Size in bytes. */
  readonly length: number;
}

/** A buffer that the guest made available. */
export interface DescriptorChain {
  /** What {@linkcode Virtqueue.push} gives back. */
  readonly head: number;
  /** Parts that the device reads, in order. */
  readonly readable: readonly Segment[];
  /** Parts that the device writes, in order. */
  readonly writable: readonly Segment[];
}

/**
 * Sums up the sizes of parts.
 *
 * @param segments Parts of a buffer
 * @returns Bytes of them all
 */
export function totalLength(segments: readonly Segment[]): number {
  let sum = 0;
  for (const { length } of segments) sum += length;
  return sum;
}

/** A virtqueue. The transport configures it; the device takes buffers from it and gives them back. */
export class Virtqueue {
  /** Its number in the device. */
  readonly index: number;
  /** Largest size that the device allows. */
  readonly maxSize: number;
  /** Number of descriptors, a power of two. */
  size: number;
  /** Whether the driver has enabled it. */
  isReady = false;
  /** Guest address of the descriptor table. */
  descriptorTable = 0;
  /** Guest address of the available ring. */
  availableRing = 0;
  /** Guest address of the used ring. */
  usedRing = 0;
  readonly #memory: GuestMemory;
  /** What buffers that are not given back yet have to write, where the memory must know. */
  readonly #written = new Map<number, readonly Segment[]>();
  #hasEventIndex = false;
  #hasIndirect = false;
  // Offsets in memory: they may not fit in 32 bits with a sign, so nothing shifts them.
  #table = 0;
  #available = 0;
  #used = 0;
  #nextAvailable = 0;
  #nextUsed = 0;
  #signalledUsed = 0;
  #hasSignalled = false;
  #isNotificationWanted = true;

  /**
   * Makes a queue that is not enabled.
   *
   * @param memory Memory of the guest
   * @param index Its number in the device
   * @param maxSize Largest size, a power of two of at most 32768
   */
  constructor(memory: GuestMemory, index: number, maxSize: number) {
    this.#memory = memory;
    this.index = index;
    this.maxSize = maxSize;
    this.size = maxSize;
  }

  /** Where it is to go on in the available ring, for vhost. */
  get nextAvailable(): number {
    return this.#nextAvailable;
  }

  /**
   * Begins to use the rings.
   *
   * @param features Negotiated features
   * @throws {VirtqueueError} If a ring has an impossible size or alignment
   * @throws {GuestMemoryError} If a ring is not in memory
   */
  start(features: bigint): void {
    const { size } = this;
    if (size < 1 || size > this.maxSize || (size & (size - 1)) !== 0) {
      throw new VirtqueueError(`queue ${this.index} has the impossible size ${size}`);
    }
    if (this.descriptorTable % 16 !== 0 || this.availableRing % 2 !== 0 || this.usedRing % 4 !== 0) {
      throw new VirtqueueError(`queue ${this.index} has a ring that is not aligned`);
    }
    this.#table = this.#memory.offset(this.descriptorTable, DESCRIPTOR_SIZE * size);
    this.#available = this.#memory.offset(this.availableRing, 6 + 2 * size);
    this.#used = this.#memory.offset(this.usedRing, 6 + 8 * size);
    this.#hasEventIndex = (features & VIRTIO_F_EVENT_IDX) !== 0n;
    this.#hasIndirect = (features & VIRTIO_F_INDIRECT_DESC) !== 0n;
    this.#nextAvailable = 0;
    this.#nextUsed = 0;
    this.#signalledUsed = 0;
    this.#hasSignalled = false;
    this.#isNotificationWanted = true;
  }

  /**
   * Goes on with rings that were saved with the guest's memory when every buffer that was taken had been given back.
   *
   * @param features Negotiated features
   * @throws {VirtqueueError} If a ring has an impossible size or alignment
   * @throws {GuestMemoryError} If a ring is not in memory
   */
  resume(features: bigint): void {
    this.start(features);
    const index = Atomics.load(this.#memory.words, (this.#used + 2) / 2);
    this.#nextAvailable = this.#nextUsed = this.#signalledUsed = index;
  }

  /** Forgets all, as a reset of the device wants it. */
  reset(): void {
    this.#written.clear();
    this.isReady = false;
    this.size = this.maxSize;
    this.descriptorTable = this.availableRing = this.usedRing = 0;
    this.#nextAvailable = this.#nextUsed = 0;
  }

  /**
   * Takes the next buffer.
   *
   * @returns The buffer, or undefined where there is none
   * @throws {VirtqueueError} If the guest broke the rules
   * @throws {GuestMemoryError} If a buffer is not in memory
   */
  pop(): DescriptorChain | undefined {
    const count = this.#pendingCount();
    if (count === 0) return undefined;
    const slot = this.#nextAvailable & (this.size - 1);
    const head = this.#memory.view.getUint16(this.#available + 4 + 2 * slot, true);
    if (head >= this.size) throw new VirtqueueError(`queue ${this.index} offers descriptor ${head}`);
    const chain = this.#readChain(head);
    if (this.#memory.noteWrite && chain.writable.length > 0) this.#written.set(head, chain.writable);
    this.#nextAvailable = (this.#nextAvailable + 1) & 0xffff;
    return chain;
  }

  /** Puts back what {@linkcode Virtqueue.pop} took last, to be taken again later. */
  unpop(): void {
    this.#nextAvailable = (this.#nextAvailable - 1) & 0xffff;
  }

  /**
   * Gives a buffer back to the guest.
   *
   * @param head Which one
   * @param written How many bytes were written to its writable parts
   */
  push(head: number, written: number): void {
    this.pushAll([{ head, written }]);
  }

  /**
   * Gives buffers back to the guest at once: it sees all of them or none.
   *
   * @param used Which ones, and how many bytes were written to each one's writable parts
   */
  pushAll(used: readonly { readonly head: number; readonly written: number }[]): void {
    const { view, words } = this.#memory;
    for (const { head, written } of used) {
      for (const { offset, length } of this.#written.get(head) ?? []) {
        this.#memory.noteWrite?.(offset, length);
      }
      this.#written.delete(head);
      const slot = this.#nextUsed & (this.size - 1);
      view.setUint32(this.#used + 4 + 8 * slot, head, true);
      view.setUint32(this.#used + 8 + 8 * slot, written, true);
      this.#nextUsed = (this.#nextUsed + 1) & 0xffff;
    }
    // The guest must not see the index before the entries.
    Atomics.store(words, (this.#used + 2) / 2, this.#nextUsed);
  }

  /**
   * Tells whether the guest wants to be interrupted for what was given back since it was asked last.
   *
   * @returns Whether to interrupt
   */
  needsInterrupt(): boolean {
    const { words } = this.#memory;
    if (!this.#hasEventIndex) {
      return (Atomics.load(words, this.#available / 2) & AVAIL_F_NO_INTERRUPT) === 0;
    }
    const old = this.#signalledUsed;
    const isFirst = !this.#hasSignalled;
    this.#signalledUsed = this.#nextUsed;
    this.#hasSignalled = true;
    if (!isFirst && old === this.#nextUsed) return false;
    const event = Atomics.load(words, (this.#available + 4 + 2 * this.size) / 2);
    return isFirst || ((this.#nextUsed - event - 1) & 0xffff) < ((this.#nextUsed - old) & 0xffff);
  }

  /**
   * Says whether the guest should notify of new buffers. After it was turned on, look once more for buffers.
   *
   * @param isWanted Whether it should
   */
  setNotification(isWanted: boolean): void {
    if (this.#hasEventIndex) {
      // The index that was passed already is never reached: no notification until the ring has gone round.
      const event = isWanted ? this.#nextAvailable : (this.#nextAvailable - 1) & 0xffff;
      Atomics.store(this.#memory.words, (this.#used + 4 + 8 * this.size) / 2, event);
    } else if (isWanted !== this.#isNotificationWanted) {
      Atomics.store(this.#memory.words, this.#used / 2, isWanted ? 0 : USED_F_NO_NOTIFY);
    }
    this.#isNotificationWanted = isWanted;
  }

  /** Whether there are buffers to take. */
  get hasPending(): boolean {
    return this.#pendingCount() > 0;
  }

  #pendingCount(): number {
    const index = Atomics.load(this.#memory.words, (this.#available + 2) / 2);
    const count = (index - this.#nextAvailable) & 0xffff;
    if (count > this.size) {
      throw new VirtqueueError(`queue ${this.index} of ${this.size} offers ${count} buffers at once`);
    }
    return count;
  }

  #readChain(head: number): DescriptorChain {
    const readable: Segment[] = [];
    const writable: Segment[] = [];
    const { view } = this.#memory;
    let table = this.#table;
    let limit = this.size;
    let isIndirect = false;
    let next = head;
    for (let count = 0;; count++) {
      // A chain that is longer than its table has a loop.
      if (count >= limit || readable.length + writable.length >= MAX_CHAIN) {
        throw new VirtqueueError(`queue ${this.index} offers a chain without end`);
      }
      const at = table + DESCRIPTOR_SIZE * next;
      const low = view.getUint32(at, true);
      const high = view.getUint32(at + 4, true);
      const length = view.getUint32(at + 8, true);
      const flags = view.getUint16(at + 12, true);
      const link = view.getUint16(at + 14, true);
      const address = high * 0x1_0000_0000 + low;
      if ((flags & DESC_F_INDIRECT) !== 0) {
        if (!this.#hasIndirect || isIndirect || (flags & DESC_F_NEXT) !== 0) {
          throw new VirtqueueError(`queue ${this.index} offers an indirect table where none may be`);
        }
        if (length === 0 || length % DESCRIPTOR_SIZE !== 0 || length > DESCRIPTOR_SIZE * 0x1_0000) {
          throw new VirtqueueError(`queue ${this.index} offers an indirect table of ${length} bytes`);
        }
        table = this.#memory.offset(address, length);
        limit = length / DESCRIPTOR_SIZE;
        isIndirect = true;
        next = 0;
        count = -1;
        continue;
      }
      const segment = { offset: this.#memory.offset(address, length), length };
      if ((flags & DESC_F_WRITE) !== 0) writable.push(segment);
      else if (writable.length > 0) {
        throw new VirtqueueError(`queue ${this.index} offers a part to read behind one to write`);
      } else readable.push(segment);
      if ((flags & DESC_F_NEXT) === 0) return { head, readable, writable };
      if (link >= limit) throw new VirtqueueError(`queue ${this.index} links to descriptor ${link}`);
      next = link;
    }
  }
}
