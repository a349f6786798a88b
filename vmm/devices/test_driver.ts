/**
 * The guest's part of virtio, for tests: a driver that lays out rings in memory and uses them, and a guest that brings a
 * device up without any transport.
 *
 * @module
 */

import { Fd } from "../../ffi/mod.ts";
import { SharedMemory } from "./shared_memory.ts";
import type { DeviceContext, VirtioDevice } from "./virtio_device.ts";
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, Virtqueue } from "./virtqueue.ts";

const DESCRIPTOR_SIZE = 16;

/** Flags of a descriptor (virtio 1.2, section 2.7.5). */
export const DESC_F = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;

/**
 * Makes numbers that look random and are the same for the same seed (xorshift32).
 *
 * @param seed An integer that is not 0
 * @returns Gives the next integer from 0 to below what it is told
 */
export function seededRandom(seed: number): (below: number) => number {
  let state = seed | 0;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return Math.floor((state >>> 0) / 0x1_0000_0000 * below);
  };
}

/** A part of a buffer, by guest address. */
export interface DriverSegment {
  /** Guest address. */
  readonly address: number;
  /** Size in bytes. */
  readonly length: number;
}

/** A buffer that the device gave back. */
export interface UsedBuffer {
  /** What {@linkcode TestDriver.add} returned. */
  readonly head: number;
  /** How many bytes the device says it wrote. */
  readonly written: number;
}

/** Hands out memory of a guest, in order; nothing is given back. */
export class Arena {
  /** Memory of the guest. */
  readonly memory: SharedMemory;
  /** Guest address of what is handed out next. */
  next: number;

  /**
   * Begins at an address.
   *
   * @param memory Memory of the guest
   * @param start The first guest address
   */
  constructor(memory: SharedMemory, start = 0) {
    this.memory = memory;
    this.next = start;
  }

  /**
   * Takes memory.
   *
   * @param length How many bytes
   * @param alignment What the address is a multiple of
   * @returns Guest address
   * @throws {GuestMemoryError} If memory is used up
   */
  take(length: number, alignment = 16): number {
    const address = Math.ceil(this.next / alignment) * alignment;
    this.memory.offset(address, length);
    this.next = address + length;
    return address;
  }

  /**
   * Views memory.
   *
   * @param segment Which part
   * @returns Its bytes, no copy
   */
  bytes({ address, length }: DriverSegment): Uint8Array<ArrayBuffer> {
    const offset = this.memory.offset(address, length);
    return this.memory.bytes.subarray(offset, offset + length);
  }
}

/** How a driver uses its queue. */
export interface TestDriverOptions {
  /** Number of descriptors; the queue's largest unless told. */
  readonly size?: number;
  /** Negotiated features. */
  readonly features?: bigint;
}

/** The driver of one virtqueue. */
export class TestDriver {
  /** Where buffers and tables come from. */
  readonly arena: Arena;
  /** The device's side. */
  readonly queue: Virtqueue;
  /** Number of descriptors. */
  readonly size: number;
  readonly #hasEventIndex: boolean;
  readonly #table: number;
  readonly #available: number;
  readonly #used: number;
  readonly #free: number[] = [];
  readonly #chains = new Map<number, number[]>();
  #nextAvailable = 0;
  #published = 0;
  #nextUsed = 0;

  /**
   * Lays out rings and starts the queue with them.
   *
   * @param arena Where the rings go
   * @param queue The queue
   * @param options Size and features
   */
  constructor(arena: Arena, queue: Virtqueue, options: TestDriverOptions = {}) {
    const { size = queue.maxSize, features = VIRTIO_F_VERSION_1 } = options;
    this.arena = arena;
    this.queue = queue;
    this.size = size;
    this.#hasEventIndex = (features & VIRTIO_F_EVENT_IDX) !== 0n;
    queue.size = size;
    queue.descriptorTable = arena.take(DESCRIPTOR_SIZE * size, 16);
    queue.availableRing = arena.take(6 + 2 * size, 2);
    queue.usedRing = arena.take(6 + 8 * size, 4);
    const { memory } = arena;
    this.#table = memory.offset(queue.descriptorTable, DESCRIPTOR_SIZE * size);
    this.#available = memory.offset(queue.availableRing, 6 + 2 * size);
    this.#used = memory.offset(queue.usedRing, 6 + 8 * size);
    memory.bytes.fill(0, this.#table, this.#used + 6 + 8 * size);
    for (let index = size - 1; index >= 0; index--) this.#free.push(index);
    queue.isReady = true;
    queue.start(features);
  }

  /** How many descriptors are free. */
  get freeCount(): number {
    return this.#free.length;
  }

  /** How many buffers the device has not given back. */
  get outstanding(): number {
    return this.#chains.size;
  }

  /**
   * Writes a descriptor of a table as it is told, right or wrong.
   *
   * @param index Which one
   * @param address Guest address of the part
   * @param length Its size in bytes
   * @param flags `DESC_F`
   * @param next The next descriptor
   * @param table Offset of the table in memory; the queue's unless told
   */
  setDescriptor(
    index: number,
    address: number,
    length: number,
    flags: number,
    next = 0,
    table: number = this.#table,
  ): void {
    const { view } = this.arena.memory;
    const at = table + DESCRIPTOR_SIZE * index;
    view.setBigUint64(at, BigInt(address), true);
    view.setUint32(at + 8, length, true);
    view.setUint16(at + 12, flags, true);
    view.setUint16(at + 14, next, true);
  }

  /**
   * Makes a descriptor available as it is told, right or wrong.
   *
   * @param head Which one
   */
  offer(head: number): void {
    const { view } = this.arena.memory;
    view.setUint16(this.#available + 4 + 2 * (this.#nextAvailable % this.size), head, true);
    this.#nextAvailable = (this.#nextAvailable + 1) & 0xffff;
  }

  /**
   * Adds a buffer. The device does not see it before {@linkcode TestDriver.publish}.
   *
   * @param readable Parts that the device reads
   * @param writable Parts that the device writes
   * @param isIndirect Whether to describe it in a table of its own
   * @returns Its head
   */
  add(
    readable: readonly DriverSegment[],
    writable: readonly DriverSegment[] = [],
    isIndirect = false,
  ): number {
    const parts = [
      ...readable.map((part) => ({ ...part, flags: 0 })),
      ...writable.map((part) => ({ ...part, flags: DESC_F.WRITE })),
    ];
    const needed = isIndirect ? 1 : parts.length;
    if (needed === 0 || needed > this.#free.length) {
      throw new RangeError(`Cannot add a buffer of ${needed} descriptors as ${this.#free.length} are free`);
    }
    const chain = Array.from({ length: needed }, () => this.#free.pop()!);
    const indices = isIndirect ? parts.map((_, index) => index) : chain;
    const length = DESCRIPTOR_SIZE * parts.length;
    const address = isIndirect ? this.arena.take(length) : 0;
    const table = isIndirect ? this.arena.memory.offset(address, length) : this.#table;
    parts.forEach((part, index) => {
      const next = indices[index + 1];
      const flags = part.flags | (next === undefined ? 0 : DESC_F.NEXT);
      this.setDescriptor(indices[index]!, part.address, part.length, flags, next, table);
    });
    const head = chain[0]!;
    if (isIndirect) this.setDescriptor(head, address, length, DESC_F.INDIRECT);
    this.#chains.set(head, chain);
    this.offer(head);
    return head;
  }

  /**
   * Lets the device see what was added.
   *
   * @returns Whether the device wants to be notified
   */
  publish(): boolean {
    const { words } = this.arena.memory;
    const old = this.#published;
    this.#published = this.#nextAvailable;
    Atomics.store(words, (this.#available + 2) >> 1, this.#published);
    if (!this.#hasEventIndex) return (Atomics.load(words, this.#used >> 1) & 1) === 0;
    const event = Atomics.load(words, (this.#used + 4 + 8 * this.size) >> 1);
    return ((this.#published - event - 1) & 0xffff) < ((this.#published - old) & 0xffff);
  }

  /**
   * Takes back the buffers that the device has used.
   *
   * @returns Those since it was asked last, in order
   * @throws {Error} If the device gave back what it does not have
   */
  takeUsed(): UsedBuffer[] {
    const { view, words } = this.arena.memory;
    const index = Atomics.load(words, (this.#used + 2) >> 1);
    const used: UsedBuffer[] = [];
    while (this.#nextUsed !== index) {
      const at = this.#used + 4 + 8 * (this.#nextUsed % this.size);
      const head = view.getUint32(at, true);
      const chain = this.#chains.get(head);
      if (!chain) throw new Error(`The device gave back descriptor ${head}, which it does not have`);
      this.#chains.delete(head);
      this.#free.push(...chain.reverse());
      used.push({ head, written: view.getUint32(at + 4, true) });
      this.#nextUsed = (this.#nextUsed + 1) & 0xffff;
    }
    return used;
  }

  /**
   * Asks for an interrupt, or for none. With event indices, it is for the buffer that is used next, or for one far ahead.
   *
   * @param isWanted Whether to interrupt
   * @param ahead With event indices: how many more buffers to wait for
   */
  setInterrupt(isWanted: boolean, ahead = 0): void {
    const { words } = this.arena.memory;
    if (this.#hasEventIndex) {
      const event = (this.#nextUsed + (isWanted ? ahead : -1)) & 0xffff;
      Atomics.store(words, (this.#available + 4 + 2 * this.size) >> 1, event);
    } else Atomics.store(words, this.#available >> 1, isWanted ? 0 : 1);
  }
}

/** How a guest is made. */
export interface TestGuestOptions {
  /** Its memory, which stays the caller's; 4 MiB of its own unless given. */
  readonly memory?: SharedMemory;
  /** Features of rings that the driver takes; all unless told. */
  readonly ringFeatures?: bigint;
  /** Features of the device that the driver takes; all that it offers unless told. */
  readonly features?: bigint;
}

/** A guest with one device: what the transport and the driver do, without either. */
export class TestGuest implements DeviceContext, Disposable {
  /** Memory of the guest. */
  readonly memory: SharedMemory;
  /** Where buffers come from. */
  readonly arena: Arena;
  /** The device. */
  readonly device: VirtioDevice;
  /** Negotiated features. */
  readonly features: bigint;
  /** Queues of the device. */
  readonly queues: readonly Virtqueue[];
  /** Their drivers. */
  readonly drivers: TestDriver[] = [];
  /** How many interrupts there were, by queue. */
  readonly interrupts: number[];
  /** How often the configuration has changed. */
  configChanges = 0;
  /** Why the device gave up, if it did. */
  failure: unknown;
  readonly #events = new Map<string, Fd>();
  readonly #taken = new Set<Virtqueue>();
  readonly #ownsMemory: boolean;
  readonly #waiting: (() => void)[] = [];

  /**
   * Makes a guest and brings the device up. It disposes of the device in the end.
   *
   * @param device The device
   * @param options Memory and features
   */
  constructor(device: VirtioDevice, options: TestGuestOptions = {}) {
    this.#ownsMemory = options.memory === undefined;
    this.memory = options.memory ?? new SharedMemory(4 * 2 ** 20);
    this.arena = new Arena(this.memory, 4096);
    this.device = device;
    const rings = options.ringFeatures ?? (VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX);
    this.features = (options.features ?? device.features) | rings | VIRTIO_F_VERSION_1;
    this.queues = device.queueSizes.map((size, index) => new Virtqueue(this.memory, index, size));
    this.interrupts = this.queues.map(() => 0);
    this.start();
  }

  /** Lays out fresh rings and activates the device, at first and after {@linkcode TestGuest.reset}. */
  start(): void {
    this.drivers.length = 0;
    for (const queue of this.queues) {
      this.drivers.push(new TestDriver(this.arena, queue, { features: this.features }));
    }
    this.failure = undefined;
    this.device.activate(this);
  }

  /** Resets the device, as a driver does. */
  reset(): void {
    this.device.reset();
    for (const queue of this.queues) queue.reset();
  }

  /**
   * Publishes what was added to a queue and notifies the device if it wants that.
   *
   * @param index Number of the queue
   * @returns Whether the device was notified
   */
  notify(index = 0): boolean {
    const driver = this.drivers[index]!;
    if (!driver.publish()) return false;
    if (this.#taken.has(driver.queue)) this.takeNotifyEvent(driver.queue).signal();
    else this.device.notify(driver.queue);
    return true;
  }

  /** Resolves at the next interrupt, change of configuration or failure. */
  event(): Promise<void> {
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  /**
   * Waits until the device has given back all buffers of a queue, or has failed.
   *
   * @param index Number of the queue
   * @returns The buffers, in the order they were used
   */
  async takeAllUsed(index = 0): Promise<UsedBuffer[]> {
    const driver = this.drivers[index]!;
    const used: UsedBuffer[] = [];
    while (true) {
      used.push(...driver.takeUsed());
      driver.setInterrupt(true);
      if (driver.outstanding === 0 || this.failure !== undefined) return used;
      await this.event();
    }
  }

  /**
   * Counts an interrupt, if the driver wants it.
   *
   * @param queue The queue
   */
  interrupt(queue: Virtqueue): void {
    if (!queue.needsInterrupt()) return;
    this.interrupts[queue.index]!++;
    this.#wake();
  }

  /** Counts a change of configuration. */
  configChanged(): void {
    this.configChanges++;
    this.#wake();
  }

  /**
   * Notes that the device gave up.
   *
   * @param error Why
   */
  fail(error: unknown): void {
    this.failure = error;
    this.#wake();
  }

  /**
   * Makes the eventfd of notifications.
   *
   * @param queue The queue
   * @returns The eventfd, which {@linkcode TestGuest.notify} signals from now on
   */
  takeNotifyEvent(queue: Virtqueue): Fd {
    this.#taken.add(queue);
    return this.#event(`notify ${queue.index}`);
  }

  /**
   * Makes the eventfd of interrupts.
   *
   * @param queue The queue
   * @returns The eventfd
   */
  interruptEvent(queue: Virtqueue): Fd {
    return this.#event(`interrupt ${queue.index}`);
  }

  /** Disposes of the device, of its events and of memory that was not given. */
  [Symbol.dispose](): void {
    this.device[Symbol.dispose]();
    for (const fd of this.#events.values()) fd[Symbol.dispose]();
    if (this.#ownsMemory) this.memory[Symbol.dispose]();
  }

  #event(name: string): Fd {
    let fd = this.#events.get(name);
    if (!fd) this.#events.set(name, fd = Fd.event());
    return fd;
  }

  #wake(): void {
    for (const resolve of this.#waiting.splice(0)) resolve();
  }
}
