/**
 * A guest that breaks every rule, for every device at once and without KVM: it writes rings and registers as it likes, while
 * sockets, packets and slow disks do their part from outside. All of it comes from a seed, but for what the kernel takes its
 * own time for.
 *
 * By hand: `deno run -A tests/hostile_guest.ts --seed N --cases N [--device NAME]`
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { join } from "node:path";
import { setImmediate } from "node:timers";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { deflateRawSync } from "node:zlib";
import { check, cString, Fd, libc, MAP_NORESERVE, MAP_PRIVATE, Mapping } from "../ffi/mod.ts";
import { fail, say } from "../tools/task.ts";
import { BalloonDevice } from "../vmm/devices/balloon.ts";
import { BlockDevice } from "../vmm/devices/block.ts";
import type { BlockFile, HostMemory } from "../vmm/devices/block_file.ts";
import { ConsoleDevice } from "../vmm/devices/console.ts";
import { GuestMemoryError, MEMORY_HOLE_END, MEMORY_HOLE_START } from "../vmm/devices/guest_memory.ts";
import { SharedMemory } from "../vmm/devices/shared_memory.ts";
import { type NetBackend, NetDevice } from "../vmm/devices/net.ts";
import { ECAM, FUNCTION_MEMORY, HostBridge, PCI_WINDOW, PciBus } from "../vmm/devices/pci_bus.ts";
import { openBlockFile, type OpenBlockFileOptions } from "../vmm/devices/qcow2_file.ts";
import { RateLimiter } from "../vmm/devices/rate_limiter.ts";
import { EntropyDevice } from "../vmm/devices/rng.ts";
import { copySegments, sliceSegments } from "../vmm/devices/segments.ts";
import { DESC_F, seededRandom } from "../vmm/devices/test_driver.ts";
import type { VirtioDevice } from "../vmm/devices/virtio_device.ts";
import { STATUS, VirtioPciFunction } from "../vmm/devices/virtio_pci.ts";
import {
  type DescriptorChain,
  MAX_CHAIN,
  type Segment,
  totalLength,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  Virtqueue,
  VirtqueueError,
} from "../vmm/devices/virtqueue.ts";
import { SocketSet } from "../vmm/devices/unix_socket.ts";
import { VsockDevice } from "../vmm/devices/vsock.ts";
import { EventLoop } from "../vmm/event_loop.ts";

type Random = (below: number) => number;

const KIBIBYTE = 1024;
const MEBIBYTE = 2 ** 20;
const PAGE = 4096;
/** Cases between two looks at everything that must hold. */
const EPISODE = 200;
/** How long something may take that has no reason to wait, in milliseconds. */
const PATIENCE = 20_000;
/** How long there may be no sign of life, in milliseconds. */
const HANG = 30_000;
const LOOK_INTERVAL = 500;
/** What the process may take beside what it takes at first, in bytes and descriptors. */
const MAX_GROWTH = 400 * MEBIBYTE;
const MAX_DESCRIPTORS = 3000;

// ---------------------------------------------------------------------------------------------------------------------
// What went wrong

let violation: string | undefined;

/** Notes what must not be. It is not thrown, as devices catch what is thrown in them. */
function violate(what: string): void {
  violation ??= `${what}\n${new Error().stack?.split("\n").slice(2, 12).join("\n") ?? ""}`;
}

/** Faults are the guest's only if they are told as such: everything else is a mistake of ours that was caught by luck. */
function checkFault(error: unknown): void {
  if (error instanceof VirtqueueError || error instanceof GuestMemoryError) return;
  violate(`it took its own error for a fault of the guest: ${error instanceof Error ? error.stack : error}`);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory, with fences around it and a part that nobody may touch

const LAYOUT = {
  /** Rings and buffers of each device. */
  areas: MEBIBYTE,
  area: MEBIBYTE,
  /** Where no buffer and no ring ever is. */
  canary: 24 * MEBIBYTE,
  canaryLength: 256 * KIBIBYTE,
  small: 32 * MEBIBYTE,
  large: MEMORY_HOLE_START + 16 * MEBIBYTE,
  fence: 256 * KIBIBYTE,
} as const;

/** What fences and canary are filled with: wherever else it is found, it has leaked. */
const SECRET = Buffer.from("\xa7gUaRd\x5e\x91", "latin1");

/** Guest addresses. */
interface Range {
  readonly start: number;
  readonly length: number;
}

class Memory {
  readonly guest: SharedMemory;
  readonly length: number;
  #isCanaryOffered = false;
  readonly #canary: Uint8Array;
  readonly #fences: readonly Uint8Array[];
  readonly #secret = Buffer.alloc(LAYOUT.canaryLength, SECRET);

  constructor(length: number) {
    this.length = length;
    [this.guest, this.#fences] = fenced(length, LAYOUT.fence);
    this.#canary = this.guest.bytes.subarray(LAYOUT.canary, LAYOUT.canary + LAYOUT.canaryLength);
    for (const part of [this.#canary, ...this.#fences]) part.set(this.#secret);
  }

  /** Finds where a range is, as the product must; -1 where it is not all memory. */
  find(address: number, length: number): number {
    const low = Math.min(this.length, MEMORY_HOLE_START);
    if (address <= MEMORY_HOLE_START) return address + length <= low ? address : -1;
    const offset = address - MEMORY_HOLE_END + low;
    return address >= MEMORY_HOLE_END && offset + length <= this.length ? offset : -1;
  }

  /** Whether a range of offsets touches the canary. */
  isCanary(offset: number, length: number): boolean {
    return offset < LAYOUT.canary + LAYOUT.canaryLength && LAYOUT.canary < offset + length;
  }

  /** Picks a guest address for so many bytes: in a range, or anywhere, but never in the canary. */
  pick(random: Random, range: Range, length: number, isTame: boolean): number {
    const { guest, length: size } = this;
    const last = guest.regions.at(-1)!;
    let address: number;
    switch (isTame ? 9 : random(12)) {
      case 0: // Across the end of a page.
        address = range.start + PAGE * (1 + random(range.length / PAGE - 1)) - 1 -
          random(Math.min(length, PAGE));
        break;
      case 1: // The very end of memory.
        address = last.address + last.length - length;
        break;
      case 2:
        address = random(Math.min(size, LAYOUT.small) - length);
        break;
      case 3:
        address = last.address + random(last.length - length);
        break;
      case 4: // The end of what is below the hole.
        address = guest.regions[0]!.length - length;
        break;
      default:
        address = range.start + random(Math.max(1, range.length - length));
    }
    const offset = this.find(address, length);
    return offset < 0 || this.isCanary(offset, length) ? range.start : address;
  }

  /** The guest named the canary after all, by chance. */
  offerCanary(): void {
    this.#isCanaryOffered = true;
    counts.accidents++;
  }

  /** Checks what nobody may touch. */
  verify(): void {
    if (!this.#isCanaryOffered && !this.#secret.equals(this.#canary)) {
      violate(`memory was changed that the guest did not offer, at ${this.#firstChange()}`);
    }
    if (this.#isCanaryOffered) this.#canary.set(this.#secret);
    this.#isCanaryOffered = false;
    for (const fence of this.#fences) {
      if (!this.#secret.equals(fence)) violate("memory beside that of the guest was changed");
    }
  }

  #firstChange(): string {
    const at = this.#canary.findIndex((byte, index) => byte !== this.#secret[index]);
    return `0x${(LAYOUT.canary + at).toString(16)}`;
  }
}

/** Makes memory of a guest with pages before and behind it that are not the guest's. */
function fenced(length: number, fence: number): [SharedMemory, Uint8Array[]] {
  using strays = new DisposableStack();
  const gaps: Mapping[] = [];
  for (let attempt = 0; attempt < 100; attempt++) {
    // The kernel takes the highest gap that fits: one of these, once others are taken.
    const gap = new Mapping(length + 2 * fence, { flags: MAP_PRIVATE | MAP_NORESERVE });
    check(libc().munmap(gap.at(fence), BigInt(length)), "munmap()");
    gaps.push(gap);
    const memory = new SharedMemory(length);
    const around = gaps.find(({ address }) => address + BigInt(fence) === memory.mapping.address);
    if (around) {
      const view = (offset: number) =>
        new Uint8Array(Deno.UnsafePointerView.getArrayBuffer(around.at(offset), fence));
      return [memory, [view(0), view(fence + length)]];
    }
    strays.use(memory);
  }
  throw new Error("Cannot put fences around memory as the kernel maps it elsewhere");
}

/** Checks what leaves the machine. */
function checkLeak(bytes: Uint8Array, where: string): void {
  if (Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).includes(SECRET)) {
    violate(`memory that the guest did not offer went to ${where}`);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Virtqueues, watched from inside

interface Taken {
  readonly chain: DescriptorChain;
  readonly writable: number;
  isUsed: boolean;
}

interface QueueRecord {
  readonly features: bigint;
  readonly table: number;
  readonly available: number;
  /** What the device has, by head. */
  readonly held: Map<number, Taken[]>;
  /** What was taken last is at the end. */
  readonly order: Taken[];
  /** Whether the device was reset and must not touch it. */
  isDead: boolean;
}

interface Part {
  readonly offset: number;
  readonly length: number;
  readonly isWritable: boolean;
}

const counts = { taken: 0, returned: 0, faults: 0, accidents: 0 };

/** Lets virtqueues tell whenever they do what the standard does not allow. */
class QueueWatch {
  readonly #memory: Memory;
  readonly #records = new WeakMap<Virtqueue, QueueRecord>();
  /** Who wants to see what devices take and give back. */
  readonly listeners = new Map<Virtqueue, Pick<Subject, "taken" | "returned">>();

  constructor(memory: Memory) {
    this.#memory = memory;
    const { start, pop, unpop, pushAll } = Virtqueue.prototype;
    // deno-lint-ignore no-this-alias
    const watch = this;
    Object.assign(Virtqueue.prototype, {
      start(this: Virtqueue, features: bigint) {
        start.call(this, features);
        watch.#started(this, features);
      },
      pop(this: Virtqueue) {
        return watch.#popped(this, () => pop.call(this));
      },
      unpop(this: Virtqueue) {
        watch.#unpopped(this);
        unpop.call(this);
      },
      pushAll(this: Virtqueue, used: Parameters<Virtqueue["pushAll"]>[0]) {
        for (const { head, written } of used) watch.#pushed(this, head, written);
        pushAll.call(this, used);
      },
    });
  }

  /** The device was reset: it must not touch its queues until they are started again. */
  end(queues: readonly Virtqueue[]): void {
    for (const queue of queues) {
      const record = this.#records.get(queue);
      if (record) record.isDead = true;
    }
  }

  /** Up to where there is something for the device to take, or to fail at; undefined where there is nothing. */
  waiting(queue: Virtqueue): number | undefined {
    const record = this.#records.get(queue);
    if (!queue.isReady || !record || record.isDead) return undefined;
    const available = this.#memory.guest.view.getUint16(record.available + 2, true);
    return available === queue.nextAvailable ? undefined : available;
  }

  #started(queue: Virtqueue, features: bigint): void {
    const { size } = queue;
    const table = this.#memory.find(queue.descriptorTable, 16 * size);
    const available = this.#memory.find(queue.availableRing, 6 + 2 * size);
    const used = this.#memory.find(queue.usedRing, 6 + 8 * size);
    if (table < 0 || available < 0 || used < 0) return violate("a queue was started that is not in memory");
    this.#records.set(queue, { features, table, available, held: new Map(), order: [], isDead: false });
  }

  #record(queue: Virtqueue): QueueRecord | undefined {
    const record = this.#records.get(queue);
    if (!record || record.isDead) violate(`queue ${queue.index} is used though it was not started`);
    return record;
  }

  #popped(queue: Virtqueue, pop: () => DescriptorChain | undefined): DescriptorChain | undefined {
    const record = this.#record(queue);
    if (!record) return pop();
    const next = queue.nextAvailable;
    const expected = this.#read(queue, record, next);
    let chain;
    try {
      chain = pop();
    } catch (error) {
      checkFault(error);
      if (Array.isArray(expected)) this.#differs(queue, record, next, expected, "illegal");
      throw error;
    }
    if (!chain) {
      if (expected !== "empty") this.#differs(queue, record, next, expected, "empty");
      return chain;
    }
    counts.taken++;
    if (!Array.isArray(expected) || !isSame(chain, expected)) {
      this.#differs(queue, record, next, expected, [...chain.readable, ...chain.writable]);
    }
    for (const { offset, length } of chain.writable) {
      if (length > 0 && this.#memory.isCanary(offset, length)) {
        this.#memory.offerCanary();
      }
    }
    this.listeners.get(queue)?.taken?.(chain, queue.index);
    const taken = { chain, writable: totalLength(chain.writable), isUsed: false };
    const held = record.held.get(chain.head);
    if (held) held.push(taken);
    else record.held.set(chain.head, [taken]);
    record.order.push(taken);
    if (record.order.length > 4 * MAX_CHAIN) record.order.splice(0, 2 * MAX_CHAIN);
    return chain;
  }

  #unpopped(queue: Virtqueue): void {
    const record = this.#record(queue);
    const taken = record?.order.pop();
    if (!record || !taken || taken.isUsed) {
      return violate(`queue ${queue.index} takes back what it does not have`);
    }
    const held = record.held.get(taken.chain.head)!;
    held.splice(held.lastIndexOf(taken), 1);
  }

  #pushed(queue: Virtqueue, head: number, written: number): void {
    const record = this.#record(queue);
    if (!record) return;
    const held = record.held.get(head) ?? [];
    // Where a head was offered twice, it is the smallest that could be it.
    let index = -1;
    held.forEach(({ writable }, each) => {
      if (written <= writable && (index < 0 || writable < held[index]!.writable)) index = each;
    });
    if (index < 0) {
      return violate(
        `queue ${queue.index} gives back descriptor ${head} with ${written} bytes, and has [${
          held.map(({ writable }) => writable)
        }]`,
      );
    }
    const [taken] = held.splice(index, 1);
    taken!.isUsed = true;
    counts.returned++;
    this.listeners.get(queue)?.returned?.(taken!.chain, queue.index);
  }

  /** Tells of a difference, unless memory has changed meanwhile: the kernel may be reading a file into it. */
  #differs(
    queue: Virtqueue,
    record: QueueRecord,
    next: number,
    expected: Part[] | "empty" | "illegal",
    actual: unknown,
  ): void {
    if (JSON.stringify(this.#read(queue, record, next)) !== JSON.stringify(expected)) return;
    const name = (chain: unknown) => Array.isArray(chain) ? `${chain.length} parts` : `${chain}`;
    violate(`queue ${queue.index} takes a chain for ${name(actual)}: it is ${name(expected)}`);
  }

  /** Reads the next chain by the standard (virtio 1.2, section 2.7). */
  #read(queue: Virtqueue, record: QueueRecord, next: number): Part[] | "empty" | "illegal" {
    const { view } = this.#memory.guest;
    const count = (view.getUint16(record.available + 2, true) - next) & 0xffff;
    if (count === 0) return "empty";
    let index = view.getUint16(record.available + 4 + 2 * (next % queue.size), true);
    if (count > queue.size) return "illegal";
    let [table, entries] = [record.table, queue.size];
    let isIndirect = false;
    const parts: Part[] = [];
    for (let steps = 0; steps < entries; steps++) {
      if (index >= entries) return "illegal";
      const at = table + 16 * index;
      const address = view.getUint32(at, true) + 2 ** 32 * view.getUint32(at + 4, true);
      const length = view.getUint32(at + 8, true);
      const flags = view.getUint16(at + 12, true);
      const offset = this.#memory.find(address, length);
      if (offset < 0) return "illegal";
      if ((flags & DESC_F.INDIRECT) !== 0) {
        const isAllowed = (record.features & VIRTIO_F_INDIRECT_DESC) !== 0n && !isIndirect;
        const isTable = length > 0 && length % 16 === 0 && length <= 16 * 65536;
        if (!isAllowed || !isTable || (flags & DESC_F.NEXT) !== 0) return "illegal";
        [table, entries, index, steps] = [offset, length / 16, 0, -1];
        isIndirect = true;
        continue;
      }
      const isWritable = (flags & DESC_F.WRITE) !== 0;
      if (!isWritable && parts.at(-1)?.isWritable) return "illegal";
      parts.push({ offset, length, isWritable });
      if (parts.length > MAX_CHAIN) return "illegal";
      if ((flags & DESC_F.NEXT) === 0) return parts;
      index = view.getUint16(at + 14, true);
    }
    return "illegal";
  }
}

function isSame({ readable, writable }: DescriptorChain, parts: readonly Part[]): boolean {
  return readable.length + writable.length === parts.length &&
    parts.every(({ offset, length, isWritable }, index) => {
      const segment = isWritable ? writable[index - readable.length] : readable[index];
      return segment?.offset === offset && segment.length === length;
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// The machine

/** What a driver asks a device for. */
interface Request {
  readonly readable: Uint8Array<ArrayBuffer>;
  /** Bytes that the device may write. */
  readonly writable: number;
}

/** A device, and what is known of it. */
interface Subject {
  readonly name: string;
  readonly device: VirtioDevice;
  /** Queues whose buffers come back without any help from outside. */
  readonly served: readonly number[];
  /**
   * Makes a request that means something, or nearly so; one that lets the device give up where `isBad` says so, which is once
   * in as many times at most.
   */
  request(random: Random, queue: number, isBad: (chance: number) => boolean): Request;
  /** Sees a buffer that the device has taken. */
  taken?(chain: DescriptorChain, queue: number): void;
  /** Sees a buffer that the device gives back. */
  returned?(chain: DescriptorChain, queue: number): void;
  /** Something happens outside. */
  disturb?(random: Random): void;
  /** Helps what is under way outside to its end. */
  release?(): void;
  /** Checks what is left after a reset. */
  wasReset?(): void;
  /** Checks what is outside. */
  verify?(): void;
  /** Has a well-behaved driver served. */
  probe(guest: Guest): Promise<void>;
  dispose?(): void;
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

class Machine {
  readonly memory: Memory;
  readonly watch: QueueWatch;
  readonly loop = new EventLoop();
  readonly folder: string;
  readonly guests: readonly Guest[];
  readonly bus: PciBus;
  readonly #ioEvents = new Map<number, Fd>();
  readonly #slots = new Map<number, { address: number; length: number }>();
  readonly #messages = new Set<number>();
  #interrupts = 24;
  /** Whether functions may be elsewhere than at home. */
  isBusDirty = true;

  constructor(seed: number, folder: string, wanted: string | undefined) {
    this.folder = folder;
    // Memory on both sides of the hole, or below it only.
    this.memory = new Memory(seed % 2 === 0 ? LAYOUT.large : LAYOUT.small);
    this.watch = new QueueWatch(this.memory);
    const subjects = SUBJECTS.filter(([name]) => !wanted || name === wanted)
      .map(([name, make]) => make({ name, machine: this, seed }));
    if (subjects.length === 0) {
      throw new Error(
        `Cannot find a device "${wanted}": there are ${SUBJECTS.map(([name]) => name).join(", ")}`,
      );
    }
    this.guests = subjects.map((subject, index) => new Guest(this, subject, index + 1));
    this.bus = new PciBus(
      {
        hasReadOnlyMemory: true,
        setMemorySlot: ({ slot, address, length }) => this.#setSlot(slot, address, length),
      },
      [new HostBridge(), ...this.guests.map((guest) => guest.function)],
      8,
    );
  }

  /** Where a write signals an eventfd. */
  ioEvent(address: number): Fd | undefined {
    return this.#ioEvents.get(address);
  }

  makeFunction(subject: Subject): VirtioPciFunction {
    return new VirtioPciFunction(subject.device, {
      memory: this.memory.guest,
      signals: {
        watcher: this.loop,
        allocateInterrupts: (count) => {
          const first = this.#interrupts;
          this.#interrupts += count;
          return first;
        },
        setMessage: (gsi, _event, message) => {
          if (this.#messages.has(gsi) === (message !== undefined)) {
            violate("KVM would refuse an interrupt's message");
          }
          if (message) this.#messages.add(gsi);
          else this.#messages.delete(gsi);
        },
        setIoEvent: (event, { address, isRemoved = false }) => {
          if (this.#ioEvents.has(address) !== isRemoved) {
            violate(`KVM would refuse the ioeventfd ${isRemoved ? "to be removed" : ""} at ${address}`);
          }
          if (isRemoved) this.#ioEvents.delete(address);
          else this.#ioEvents.set(address, event);
        },
      },
      onFault: () => counts.faults++,
    }, { name: subject.name, vectors: 1 + subject.device.queueSizes.length % 5 });
  }

  /** Waits until something is so. */
  async until(isDone: () => boolean, what: string): Promise<void> {
    const deadline = performance.now() + PATIENCE;
    for (let round = 0; !isDone() && !violation; round++) {
      if (round % 8 === 0) { for (const { subject } of this.guests) subject.release?.(); }
      this.loop.poll(0);
      if (round % 100 < 99) await turn();
      else await new Promise((resolve) => setTimeout(resolve, 1));
      if (performance.now() > deadline) violate(`${what} does not happen`);
    }
  }

  /** Waits until nothing happens by itself. */
  async settle(): Promise<void> {
    let quiet = 0;
    await this.until(() => {
      const isBusy = this.guests.some(({ subject }) => subject.device.isBusy);
      quiet = this.loop.poll(0) > 0 || isBusy ? 0 : quiet + 1;
      return quiet > 2;
    }, "rest");
  }

  /** Puts all functions where they were at first. */
  restoreBus(): void {
    if (!this.isBusDirty) return;
    for (const guest of this.guests) guest.setConfig(REGISTER.command, 0, 2);
    for (const guest of this.guests) guest.goHome();
    this.isBusDirty = false;
  }

  [Symbol.dispose](): void {
    for (const guest of this.guests) {
      guest.function[Symbol.dispose]();
      guest.subject.device[Symbol.dispose]();
      guest.subject.dispose?.();
    }
    this.bus[Symbol.dispose]();
  }

  #setSlot(slot: number, address: number, length: number): void {
    if (length === 0) {
      if (!this.#slots.delete(slot)) violate("KVM would refuse to take memory away that it does not have");
      return;
    }
    for (const other of this.#slots.values()) {
      if (address < other.address + other.length && other.address < address + length) {
        violate("KVM would refuse memory over other memory");
      }
    }
    if (this.memory.find(address, 1) >= 0) violate("memory of a function is over that of the guest");
    this.#slots.set(slot, { address, length });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The guest

/** Registers of configuration space and of a function's memory (see virtio_pci.ts). */
const REGISTER = { command: 0x04, bar: 0x10, capabilities: 0x34 } as const;
const COMMON = {
  deviceFeatureSelect: 0,
  deviceFeature: 4,
  driverFeatureSelect: 8,
  driverFeature: 12,
  status: 20,
  queueSelect: 22,
  queueSize: 24,
  queueVector: 26,
  queueEnable: 28,
  rings: 32,
} as const;
const PART = { device: 0x1000, msix: 0x2000, isr: 0x3000, pending: 0x3400, notify: 0x3800 } as const;
const CAPABILITY = { msix: 0x11, vendor: 9, window: 5 } as const;

/** Offsets within an area. */
const AREA = { rings: 16 * KIBIBYTE, tables: 160 * KIBIBYTE, data: 256 * KIBIBYTE } as const;

const WILD_LENGTHS = [
  ...[
    0,
    1,
    2,
    7,
    8,
    11,
    12,
    13,
    15,
    16,
    17,
    43,
    44,
    45,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    65535,
    65536,
    65537,
  ],
  ...[
    MEBIBYTE,
    MEBIBYTE + 1,
    16 * 65536 + 16,
    2 ** 24,
    2 ** 30,
    2 ** 31 - 1,
    2 ** 31,
    2 ** 32 - 16,
    2 ** 32 - 1,
  ],
];
const WILD_WORDS = [0, 1, 2, 3, 4, 7, 8, 0xff, 0x100, 0x7fff, 0x8000, 0xffff, 2 ** 31, 2 ** 32 - 1];

function pick<T>(random: Random, values: readonly T[]): T {
  return values[random(values.length)]!;
}

/** Any number of 32 bits, with a bias for those at bounds. */
function anyWord(random: Random): number {
  return random(3) === 0 ? random(2 ** 32) : pick(random, WILD_WORDS);
}

/** A size in bytes: most are small. */
function anySize(random: Random, most: number): number {
  return random(16) === 0 ? random(most + 1) : random(Math.min(most, 1 << random(13)) + 1);
}

/** The driver's side of a queue that is enabled. */
interface Ring {
  readonly index: number;
  readonly size: number;
  /** Offsets in memory. */
  readonly table: number;
  readonly available: number;
  readonly used: number;
  /** The next index to offer. */
  next: number;
  /** The next descriptor to write. */
  cursor: number;
  /** What was offered last. */
  head: number;
}

/** A hostile driver of one device. */
class Guest {
  readonly subject: Subject;
  readonly function: VirtioPciFunction;
  readonly area: number;
  /** Tables of descriptors, and buffers. */
  readonly tables: Range;
  readonly data: Range;
  /** How wild it is now: 0 breaks rules only by what it asks for, 1 seldom, 2 often. */
  wildness = 0;
  readonly cases = { ring: 0, register: 0 };
  /** How often the device gave up, and how often it was brought up. */
  readonly states = { failed: 0, up: 0 };
  readonly #machine: Machine;
  readonly #number: number;
  readonly #scratch = [1, 2, 4, 8].map((length) => new Uint8Array(length));
  #queues: readonly Virtqueue[] = [];
  #rings: Ring[] = [];
  #hasIndirect = false;

  constructor(machine: Machine, subject: Subject, number: number) {
    this.#machine = machine;
    this.#number = number;
    this.subject = subject;
    this.area = LAYOUT.areas + (number - 1) * LAYOUT.area;
    this.tables = { start: this.area + AREA.tables, length: AREA.data - AREA.tables };
    this.data = { start: this.area + AREA.data, length: LAYOUT.area - AREA.data };
    if (this.area + LAYOUT.area > LAYOUT.canary) {
      throw new Error("there are too many devices for this memory");
    }
    this.#observe();
    this.function = machine.makeFunction(subject);
  }

  /** Whether it needs a new start. */
  get isDown(): boolean {
    const { status } = this.function;
    return (status & STATUS.driverOk) === 0 || (status & (STATUS.needsReset | STATUS.failed)) !== 0;
  }

  /** Whether there is nothing to play with. */
  get isBoring(): boolean {
    return this.isDown || this.#rings.length === 0;
  }

  // Registers.

  setConfig(offset: number, value: number, length: number): void {
    // A write beyond the end is one to the next function.
    if (offset % PAGE < REGISTER.bar + 8) this.#machine.isBusDirty = true;
    this.#write(ECAM.address + PAGE * this.#number + offset, value, length);
  }

  set(offset: number, value: number, length: number): void {
    this.#write(this.#base + offset, value, length);
  }

  goHome(): void {
    this.setConfig(REGISTER.bar, PCI_WINDOW.address + FUNCTION_MEMORY * this.#number, 4);
    this.setConfig(REGISTER.bar + 4, 0, 4);
    this.setConfig(REGISTER.command, 6, 2);
  }

  get(address: number, length: number): number {
    const data = new Uint8Array(length).fill(0xff);
    this.#machine.bus.read(address, data);
    return data.reduceRight((sum, byte) => sum * 256 + byte, 0);
  }

  getConfig(offset: number, length: number): number {
    return this.get(ECAM.address + PAGE * this.#number + offset, length);
  }

  get #base(): number {
    return this.getConfig(REGISTER.bar, 4) - this.getConfig(REGISTER.bar, 1) % 16;
  }

  #write(address: number, value: number, length: number): void {
    const data = this.#scratch.find((each) => each.length === length) ?? new Uint8Array(length);
    for (let index = 0; index < length; index++) data[index] = value / 256 ** index;
    this.#machine.bus.write(address, data);
  }

  // Bringing the device up.

  /** Brings the device up, more or less as a driver should. */
  async bringUp(random: Random, isProper = false): Promise<void> {
    const isSound = (chance: number) => isProper || this.wildness === 0 || random(chance) > 0;
    this.#machine.isBusDirty ||= isProper;
    this.#machine.restoreBus();
    this.set(COMMON.status, 0, 1);
    if (!isSound(20)) this.set(COMMON.status, 0, 1);
    await this.#machine.until(() => this.function.status === 0, `a reset of "${this.subject.name}"`);
    this.set(COMMON.status, STATUS.acknowledge, 1);
    this.set(COMMON.status, STATUS.acknowledge | STATUS.driver, 1);
    const offered = this.subject.device.features | VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC |
      VIRTIO_F_EVENT_IDX;
    let features = offered;
    if (!isProper && random(2) === 0) features &= BigInt(random(2 ** 32)) | BigInt(random(2)) << 32n;
    if (isSound(30)) features |= VIRTIO_F_VERSION_1;
    if (!isSound(30)) features ^= 1n << BigInt(random(64));
    for (const select of [0, 1]) {
      this.set(COMMON.driverFeatureSelect, select, 4);
      this.set(COMMON.driverFeature, Number(features >> BigInt(32 * select) & 0xffff_ffffn), 4);
    }
    this.set(COMMON.status, STATUS.acknowledge | STATUS.driver | STATUS.featuresOk, 1);
    const isAccepted = (this.function.status & STATUS.featuresOk) !== 0;
    const isRight = (features & ~offered) === 0n && (features & VIRTIO_F_VERSION_1) !== 0n;
    if (isAccepted !== isRight) {
      violate(`features 0x${features.toString(16)} are ${isAccepted ? "" : "not "}accepted`);
    }
    this.#hasIndirect = (features & VIRTIO_F_INDIRECT_DESC) !== 0n;
    this.#setVectors(random);
    this.#rings = [];
    // Drivers may do without a queue.
    const missing = isProper || random(4) > 0 ? -1 : random(this.subject.device.queueSizes.length);
    for (let index = 0; index < this.subject.device.queueSizes.length; index++) {
      if (isSound(30) && index !== missing) this.#enableQueue(random, index, isProper);
    }
    this.set(COMMON.status, STATUS.acknowledge | STATUS.driver | STATUS.featuresOk | STATUS.driverOk, 1);
    this.states.up++;
  }

  #setVectors(random: Random): void {
    const at = this.#capability(CAPABILITY.msix);
    this.setConfig(at + 2, random(3) === 0 ? 0xc000 : 0x8000, 2);
    for (let vector = 0; vector < 4; vector++) {
      this.set(PART.msix + 16 * vector, 0xfee0_0000, 4);
      this.set(PART.msix + 16 * vector + 8, 0x40 + vector, 4);
      this.set(PART.msix + 16 * vector + 12, random(4) === 0 ? 1 : 0, 4);
    }
  }

  #enableQueue(random: Random, index: number, isProper: boolean): void {
    const { memory } = this.#machine;
    const most = this.subject.device.queueSizes[index]!;
    const isTame = isProper || this.wildness === 0;
    const size = isProper || random(2) === 0 ? most : isTame ? most >> 1 : 1 << random(Math.log2(most) + 1);
    const base = this.area + AREA.rings * index;
    const lengths = [16 * size, 6 + 2 * size, 6 + 8 * size];
    const addresses = [base, base + PAGE, base + 2 * PAGE];
    const which = random(3);
    if (!isTame && random(4) === 0) {
      // Elsewhere, aligned, and also where other things are.
      addresses[which] = Math.floor(memory.pick(random, this.data, lengths[which]! + 16, false) / 16) * 16;
    } else if (!isTame && random(8) === 0) {
      const last = memory.guest.regions.at(-1)!;
      addresses[which] = Math.floor((last.address + last.length - lengths[which]!) / 16) * 16;
    }
    if (!isTame && random(40) === 0) addresses[which] = this.#wildAddress(random);
    const offsets = addresses.map((address, ring) => memory.find(address, lengths[ring]!));
    if (offsets.some((offset, ring) => offset >= 0 && memory.isCanary(offset, lengths[ring]!))) return;
    this.set(COMMON.queueSelect, index, 2);
    this.set(COMMON.queueSize, isTame || random(60) > 0 ? size : random(65536), 2);
    this.set(COMMON.queueVector, random(6), 2);
    addresses.forEach((address, ring) => {
      this.set(COMMON.rings + 8 * ring, address % 2 ** 32, 4);
      this.set(COMMON.rings + 8 * ring + 4, Math.floor(address / 2 ** 32), 4);
    });
    const [table, available, used] = offsets;
    if (offsets.every((offset) => offset >= 0)) {
      if (isTame || random(10) > 0) {
        lengths.forEach((length, ring) =>
          memory.guest.bytes.fill(0, offsets[ring]!, offsets[ring]! + length)
        );
      }
      memory.guest.view.setUint16(available! + 2, 0, true);
    }
    this.set(COMMON.queueEnable, 1, 2);
    if (this.get(this.#base + COMMON.queueEnable, 2) !== 1 || offsets.some((offset) => offset < 0)) return;
    // What the device has, whatever was asked for.
    const actual = this.get(this.#base + COMMON.queueSize, 2);
    const ring = { index, size: actual, table: table!, available: available!, used: used! };
    this.#rings.push({ ...ring, next: 0, cursor: random(actual), head: 0 });
  }

  /** Finds a capability by its number, and virtio's window by its type. */
  #capability(wanted: number): number {
    for (let at = this.getConfig(REGISTER.capabilities, 1); at !== 0; at = this.getConfig(at + 1, 1)) {
      const id = this.getConfig(at, 1);
      if (id === wanted || id === CAPABILITY.vendor && this.getConfig(at + 3, 1) === wanted) return at;
    }
    throw new Error(`function ${this.#number} has no capability ${wanted}`);
  }

  // A case: something about a ring, or about a register.

  playCase(random: Random): void {
    const ring = this.#rings[random(this.#rings.length)];
    if (!ring || random(5) === 0) {
      this.cases.register++;
      this.#playRegister(random);
    } else {
      this.cases.ring++;
      this.#playRing(random, ring);
      this.#notify(random, ring.index);
    }
  }

  #playRing(random: Random, ring: Ring): void {
    const { view } = this.#machine.memory.guest;
    switch (this.wildness === 0 ? 9 : random(12 * (4 - this.wildness))) {
      case 0: // Any descriptor, while it may be in use.
        return this.#corrupt(random, ring.table, [random(ring.size)]);
      case 1: // Any entry of the available ring, its flags, or the event's index.
        return view.setUint16(
          ring.available + 2 * pick(random, [0, 2 + random(ring.size), 2 + ring.size]),
          random(65536),
          true,
        );
      case 2: // The index jumps.
        if (random(4) === 0) {
          ring.next += pick(random, [-1, 1, 2, ring.size, ring.size + 1, random(65536)]);
          this.#publish(ring);
          return;
        }
        break;
      case 3: // The same once more.
        for (let count = random(4); count >= 0; count--) this.#offer(ring, ring.head);
        return this.#publish(ring);
      case 4: // What devices write only.
        return view.setUint16(ring.used + 2 * random(3 + 4 * ring.size), random(65536), true);
      case 5: // Something is written over what may be in use.
        return this.#scribble(random, ring);
    }
    const waiting = (ring.next - view.getUint16(ring.used + 2, true)) & 0xffff;
    // Chains of tame guests have four parts at most where they share the ring's table.
    const room = (this.wildness === 0 ? Math.max(1, ring.size >> 2) : ring.size) - waiting;
    if (room <= 0 && (this.wildness === 0 || random(20) > 0)) return this.#scribble(random, ring);
    const count = random(60) === 0 ? room : random(6) === 0 ? 1 + random(Math.max(1, Math.min(8, room))) : 1;
    for (let index = 0; index < count; index++) {
      const head = this.#compose(random, ring, this.#request(random, ring.index), false);
      this.#offer(ring, this.wildness > 0 && random(100) === 0 ? random(65536) : head);
    }
    this.#publish(ring);
  }

  #request(random: Random, queue: number): Request {
    return this.subject.request(random, queue, (chance) => this.wildness > 0 && random(chance) === 0);
  }

  #scribble(random: Random, ring: Ring): void {
    const { memory } = this.#machine;
    const address = memory.pick(random, this.data, 64, this.wildness === 0);
    const { bytes } = memory.guest;
    const offset = memory.find(address, 64);
    // A part of another request, or of a ring.
    const source = random(2) === 0
      ? this.#request(random, ring.index).readable
      : bytes.slice(ring.table, ring.table + 16 * ring.size);
    bytes.set(source.subarray(0, 64), offset);
  }

  #offer(ring: Ring, head: number): void {
    this.#machine.memory.guest.view.setUint16(
      ring.available + 4 + 2 * (ring.next & (ring.size - 1)),
      head,
      true,
    );
    ring.next = (ring.next + 1) & 0xffff;
    ring.head = head;
  }

  #publish(ring: Ring): void {
    ring.next &= 0xffff;
    this.#machine.memory.guest.view.setUint16(ring.available + 2, ring.next, true);
  }

  /** Writes a chain of descriptors; returns its head. */
  #compose(random: Random, ring: Ring, request: Request, isProper: boolean): number {
    let parts = this.#layOut(random, request, isProper);
    const { memory } = this.#machine;
    let table = ring.table;
    let indices: number[];
    const canFit = parts.length <= ring.size;
    let head = ring.cursor;
    if (this.#hasIndirect && (!canFit || parts.length > 4 || random(3) === 0)) {
      const length = 16 * parts.length;
      const address = memory.pick(random, this.tables, length, isProper || this.wildness === 0);
      table = memory.find(address, length);
      indices = parts.map((_, index) => index);
      this.#setDescriptor(ring.table, head, { address, length, flags: DESC_F.INDIRECT }, 0);
      ring.cursor = (head + 1) % ring.size;
    } else {
      parts = parts.slice(0, ring.size);
      indices = parts.map((_, index) => (head + index) % ring.size);
      ring.cursor = (head + parts.length) % ring.size;
    }
    parts.forEach((part, index) => {
      const next = indices[index + 1];
      const flags = part.flags | (next === undefined ? 0 : DESC_F.NEXT);
      this.#setDescriptor(table, indices[index]!, { ...part, flags }, next ?? 0);
    });
    if (isProper || this.wildness === 0) return head;
    if (random(this.wildness === 1 ? 30 : 6) === 0) {
      for (let count = random(3); count >= 0; count--) this.#corrupt(random, table, indices);
      if (table !== ring.table && random(2) === 0) this.#corrupt(random, ring.table, [head]);
    }
    if (table !== ring.table && random(40) === 0 && ring.size > 1) {
      // Direct descriptors before the one that leads to a table.
      const first = { address: this.area, length: random(8), flags: DESC_F.NEXT };
      const next = head;
      head = ring.cursor;
      this.#setDescriptor(ring.table, head, first, next);
      ring.cursor = (head + 1) % ring.size;
    }
    return head;
  }

  /** Puts a request somewhere in memory, in pieces. */
  #layOut(random: Random, { readable, writable }: Request, isProper: boolean) {
    const { memory } = this.#machine;
    const isTame = isProper || this.wildness === 0;
    const parts: { address: number; length: number; flags: number }[] = [];
    const add = (length: number, flags: number, bytes?: Uint8Array) => {
      const address = isProper
        ? this.data.start + (flags === 0 ? 0 : 256 * KIBIBYTE)
        : memory.pick(random, this.data, length, isTame);
      if (bytes) memory.guest.bytes.set(bytes, memory.find(address, length));
      parts.push({ address, length, flags });
    };
    const split = (total: number, flags: number, bytes?: Uint8Array) => {
      const pieces = isProper ? 1 : isTame && !this.#hasIndirect ? 1 + random(2) : pick(
        random,
        [
          1,
          1,
          1,
          1,
          2,
          2,
          3,
          4,
          random(20) + 1,
          random(60) === 0 ? pick(random, [random(1200), MAX_CHAIN - 1, MAX_CHAIN, MAX_CHAIN + 1]) : 1,
        ],
      );
      let at = 0;
      for (let piece = 1; piece <= pieces; piece++) {
        const length = piece === pieces
          ? total - at
          : random(Math.min(total - at, Math.ceil(2 * total / pieces)) + 1);
        add(length, flags, bytes?.subarray(at, at + length));
        at += length;
      }
    };
    if (readable.length > 0) split(readable.length, 0, readable);
    if (writable > 0) split(writable, DESC_F.WRITE);
    if (parts.length === 0) add(0, (isTame ? readable !== NOTHING : random(2) === 0) ? 0 : DESC_F.WRITE);
    return parts;
  }

  #setDescriptor(
    table: number,
    index: number,
    { address, length, flags }: { address: number; length: number; flags: number },
    next: number,
  ): void {
    const { memory } = this.#machine;
    const { view } = memory.guest;
    const offset = memory.find(address, length);
    if (offset >= 0 && memory.isCanary(offset, length)) address = length = 0;
    const at = table + 16 * index;
    view.setUint32(at, address % 2 ** 32, true);
    view.setUint32(at + 4, Math.floor(address / 2 ** 32), true);
    view.setUint32(at + 8, length, true);
    view.setUint16(at + 12, flags, true);
    view.setUint16(at + 14, next, true);
  }

  #wildAddress(random: Random): number {
    const { length } = this.#machine.memory;
    const end = this.#machine.memory.guest.regions.at(-1)!;
    const near = pick(random, [
      ...[0, PAGE, length, end.address + end.length, MEMORY_HOLE_START, ECAM.address, PCI_WINDOW.address],
      ...[
        MEMORY_HOLE_END,
        2 ** 32 * 2,
        2 ** 53,
        2 ** 63,
        2 ** 64,
        random(2 ** 32),
        random(2 ** 32) * 2 ** 32,
      ],
    ]);
    return Math.min(
      Math.max(0, near + pick(random, [0, 0, -1, 1, -16, 16, -PAGE, random(65536)])),
      2 ** 64 - 2048,
    );
  }

  /** Spoils a descriptor. */
  #corrupt(random: Random, table: number, indices: readonly number[]): void {
    const { view } = this.#machine.memory.guest;
    const index = pick(random, indices);
    const at = table + 16 * index;
    let address = view.getUint32(at, true) + 2 ** 32 * view.getUint32(at + 4, true);
    let length = view.getUint32(at + 8, true);
    let flags = view.getUint16(at + 12, true);
    let next = view.getUint16(at + 14, true);
    switch (random(10)) {
      case 0:
        address = this.#wildAddress(random);
        break;
      case 1:
        length = pick(random, WILD_LENGTHS);
        break;
      case 2:
        [address, length] = [this.#wildAddress(random), pick(random, WILD_LENGTHS)];
        break;
      case 3:
        flags = random(8);
        break;
      case 4:
        flags = random(65536);
        break;
      case 5:
        flags ^= 1 << random(3);
        break;
      case 6:
        [flags, next] = [
          flags | DESC_F.NEXT,
          pick(random, [index, indices[0]!, random(65536), random(256), indices.length]),
        ];
        break;
      default: // A table: within another, of any length, or one that is a ring.
        flags = DESC_F.INDIRECT | (random(8) === 0 ? random(8) : 0);
        if (random(2) === 0) address = this.area + 16 * random(1024);
        length = pick(random, [
          0,
          15,
          16,
          17,
          32,
          4096,
          4104,
          16 * 65535,
          16 * 65536,
          16 * 65537,
          2 ** 32 - 16,
        ]);
    }
    this.#setDescriptor(table, index, { address, length, flags }, next);
  }

  #notify(random: Random, index: number): void {
    const at = PART.notify + 4 * index;
    switch (random(10)) {
      case 0: // Later, or never.
        return;
      case 1:
        return this.set(at, index, 4);
      case 2:
      case 3: {
        this.#machine.ioEvent(this.#base + at)?.signal();
        return;
      }
      case 4:
        return this.#useWindow(at, 2, index);
      default:
        this.set(at, index, 2);
    }
  }

  #useWindow(offset: number, length: number, value: number): void {
    const at = this.#capability(CAPABILITY.window);
    this.setConfig(at + 4, 0, 1);
    this.setConfig(at + 8, offset, 4);
    this.setConfig(at + 12, length, 4);
    this.setConfig(at + 16, value, 4);
  }

  #playRegister(random: Random): void {
    const length = pick(random, [1, 1, 2, 2, 4, 4, 8, 3]);
    const value = anyWord(random);
    // Those from 7 on can take the device away, or reset it.
    switch (this.wildness === 0 ? random(7) : random(16)) {
      case 0:
        return this.setConfig(this.#capability(CAPABILITY.msix) + 2, random(65536), 2);
      case 1:
      case 2:
        return this.set(PART.msix + 4 * random(24), pick(random, [0, 1, 0xfee0_0000, value]), 4);
      case 3: {
        const offset = pick(random, [PART.isr, PART.pending, random(FUNCTION_MEMORY + 16)]);
        this.get(this.#base + offset, pick(random, [1, 2, 4, 8]));
        return;
      }
      case 4:
        return this.set(PART.notify + 4 * random(12), value, length);
      case 5:
        return this.set(PART.device + random(80), value, length);
      case 6: // What drivers do in order, in none.
        this.set(COMMON.queueSelect, random(this.subject.device.queueSizes.length + 2), 2);
        return this.set(
          COMMON.rings + 4 * random(7),
          random(2) === 0 ? value : this.area + 16 * random(1024),
          4,
        );
      case 7: // Where memory is, and whether it is there.
        if (random(3) === 0) return this.setConfig(REGISTER.command, random(8), 2);
        return this.setConfig(
          REGISTER.bar,
          random(3) === 0 ? value : PCI_WINDOW.address + FUNCTION_MEMORY * random(20) + random(2) * PAGE,
          4,
        );
      case 8:
        return this.setConfig(random(256), value, length);
      case 9:
        return this.setConfig(random(PAGE + 8), value, length);
      case 10:
        return this.set(random(FUNCTION_MEMORY + 16), value, length);
      case 11:
        if (random(4) > 0) return this.set(PART.notify + 4 * random(12), value, length);
        return this.set(
          COMMON.status,
          random(3) === 0 ? 0 : pick(random, [1, 2, 4, 8, 11, 15, 64, 128, value]),
          1,
        );
      case 12:
        return this.#useWindow(
          pick(random, [random(FUNCTION_MEMORY), 4 * random(16), value]),
          random(9),
          value,
        );
      default: {
        const offset = pick(random, [2 * random(28), 4 * random(15), random(64)]);
        return this.set(random(3) === 0 ? offset : offset & ~3 | 2, value, length);
      }
    }
  }

  // A driver that behaves.

  /** Brings the device up as a driver should, and says whether that worked. */
  async start(random: Random): Promise<boolean> {
    await this.bringUp(random, true);
    const isUp = !this.isDown && this.#rings.length === this.subject.device.queueSizes.length;
    if (!isUp) violate(`"${this.subject.name}" does not come up any more`);
    return isUp;
  }

  /** Offers a buffer; returns where the device may write. */
  offer(index: number, request: Request): { readonly address: number; readonly bytes: Uint8Array } {
    const ring = this.#rings.find((each) => each.index === index)!;
    const address = this.data.start + 256 * KIBIBYTE;
    const offset = this.#machine.memory.find(address, request.writable);
    const bytes = this.#machine.memory.guest.bytes.subarray(offset, offset + request.writable);
    bytes.fill(0);
    this.#offer(ring, this.#compose(() => 1, ring, request, true));
    this.#publish(ring);
    this.set(PART.notify + 4 * index, index, 2);
    return { address, bytes };
  }

  /** Waits until a buffer is back; returns how many bytes were written. */
  async used(index: number, count = 1): Promise<number> {
    const { view } = this.#machine.memory.guest;
    const ring = this.#rings.find((each) => each.index === index)!;
    await this.#machine.until(
      () => view.getUint16(ring.used + 2, true) === (count & 0xffff),
      `an answer of "${this.subject.name}" to a driver that behaves`,
    );
    return view.getUint32(ring.used + 8 + 8 * ((count - 1) % ring.size), true);
  }

  // What must hold.

  /** Checks that what can be served was served, or that the device has given up. */
  async verify(): Promise<void> {
    if (this.function.status === 0 && this.function.isActive) violate("a device is reset and works");
    if (!this.isDown) {
      const { served, name } = this.subject;
      this.#machine.restoreBus();
      const told = new Map<number, number>();
      // Each queue is told of once, unless one device changes the ring of another.
      const hasWork = (index: number): boolean => {
        const queue = this.#queues[index];
        const available = queue && this.#machine.watch.waiting(queue);
        if (available === undefined) return false;
        if (told.get(index) !== available) this.set(PART.notify + 4 * index, index, 2);
        told.set(index, available);
        return true;
      };
      await this.#machine.until(
        () => this.isDown || served.filter(hasWork).length === 0,
        `the end of the requests of "${name}"`,
      );
    }
    this.subject.verify?.();
  }

  /** Watches what the device is told, and what it tells. */
  #observe(): void {
    const { device } = this.subject;
    const { activate, notify, reset } = device;
    const guarded = (work: () => void) => {
      try {
        work();
      } catch (error) {
        checkFault(error);
        throw error;
      }
    };
    Object.assign(
      device,
      {
        activate: (context: Parameters<VirtioDevice["activate"]>[0]) => {
          this.#queues = context.queues;
          for (const queue of context.queues) this.#machine.watch.listeners.set(queue, this.subject);
          const fail = (error: unknown) => {
            checkFault(error);
            this.states.failed++;
            context.fail(error);
            if (this.function.isActive && (this.function.status & STATUS.needsReset) === 0) {
              violate("a device has failed, and its status does not tell");
            }
          };
          guarded(() => activate.call(device, { ...context, fail }));
        },
        notify: (queue: Virtqueue) => guarded(() => notify.call(device, queue)),
        reset: () => {
          reset.call(device);
          this.#machine.watch.end(this.#queues);
          this.subject.wasReset?.();
        },
      } satisfies Partial<VirtioDevice>,
    );
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The outside

// Linux 6.1 `include/linux/socket.h`, `include/linux/net.h`.
const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_SEQPACKET = 5;
const SOCK_NONBLOCK = 0o4000;
const MSG_NOSIGNAL = 0x4000;

const inbox = new Uint8Array(256 * KIBIBYTE);

/** A socket of somebody outside, which never waits. */
class Peer {
  readonly fd: Fd;
  /** Whether it takes its time to read. */
  isLazy = false;
  /** Whether the device has left. */
  isAlone = false;

  constructor(fd: Fd) {
    this.fd = fd;
  }

  static #address(path: string): Uint8Array<ArrayBuffer> {
    const name = cString(path);
    const address = new Uint8Array(2 + name.length);
    address[0] = AF_UNIX;
    address.set(name, 2);
    return address;
  }

  static #open(path: string): Fd {
    return new Fd(check(libc().socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0), "socket()"), path);
  }

  static connect(path: string): Peer | undefined {
    const fd = Peer.#open(path);
    const address = Peer.#address(path);
    if (libc().connect(fd.number, address, address.length) === 0) return new Peer(fd);
    fd[Symbol.dispose]();
    return undefined;
  }

  static listen(path: string, backlog: number): Peer {
    const fd = Peer.#open(path);
    const address = Peer.#address(path);
    check(libc().bind(fd.number, address, address.length), `bind("${path}")`);
    check(libc().listen(fd.number, backlog), `listen("${path}")`);
    return new Peer(fd);
  }

  accept(): Peer | undefined {
    const number = libc().accept4(this.fd.number, null, null, SOCK_NONBLOCK);
    return number < 0 ? undefined : new Peer(new Fd(number, "accepted"));
  }

  send(bytes: Uint8Array<ArrayBuffer>): void {
    libc().send(this.fd.number, bytes, BigInt(bytes.length), MSG_NOSIGNAL);
  }

  /** Takes what has arrived. */
  receive(where: string): Uint8Array {
    const length = libc().recv(this.fd.number, inbox, BigInt(inbox.length), 0);
    this.isAlone = length === 0;
    const bytes = inbox.subarray(0, Math.max(0, length));
    checkLeak(bytes, where);
    return bytes;
  }

  shutdown(how: number): void {
    libc().shutdown(this.fd.number, how);
  }

  close(): void {
    this.fd[Symbol.dispose]();
  }
}

/** Does something to peers. */
function disturbPeers(random: Random, peers: Peer[], where: string, greeting?: () => string): void {
  const index = random(peers.length);
  const peer = peers[index];
  if (!peer) return;
  if (peer.isAlone && random(4) > 0) {
    peers.splice(index, 1);
    return peer.close();
  }
  switch (random(10)) {
    case 0:
      if (random(3) > 0) return;
      peers.splice(index, 1);
      return peer.close();
    case 1:
      if (random(3) > 0) return;
      return peer.shutdown(random(3));
    case 2:
      return peer.send(new TextEncoder().encode(greeting?.() ?? "hello"));
    case 3:
    case 4:
    case 5:
      return peer.send(anyBytes(random, random(50) === 0 ? 200 * KIBIBYTE : anySize(random, 8192)));
    default:
      if (!peer.isLazy) peer.receive(where);
  }
}

/** Lets peers read, so that nothing waits for them. */
function releasePeers(peers: readonly Peer[], where: string): void {
  for (const peer of peers) peer.receive(where);
}

/** Bytes that are not all alike. */
function anyBytes(random: Random, length: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(length);
  const step = random(256) | 1;
  let value = random(256);
  for (let index = 0; index < Math.min(length, 256); index++) bytes[index] = value += step;
  if (length > 256) bytes.fill(value & 0xff, 256);
  return bytes;
}

/** A cable whose other end is here: sockets that keep packets whole. */
class Cable implements NetBackend {
  readonly fd: Fd;
  readonly #end: Fd;

  constructor() {
    const library = Deno.dlopen("libc.so.6", {
      socketpair: { parameters: ["i32", "i32", "i32", "buffer"], result: "i32" },
    });
    const pair = new Int32Array(2);
    const bytes = new Uint8Array(pair.buffer);
    check(library.symbols.socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, bytes), "socketpair()");
    library.close();
    this.fd = new Fd(pair[0]!, "device's end");
    this.#end = new Fd(pair[1]!, "host's end");
  }

  setOffload(): void {}

  readCounters(): never {
    throw new Error("no interface");
  }

  send(packet: Uint8Array<ArrayBuffer>): void {
    libc().send(this.#end.number, packet, BigInt(packet.length), MSG_NOSIGNAL);
  }

  /** Takes a packet; empty where there is none. */
  take(): Uint8Array {
    const length = Math.max(0, libc().recv(this.#end.number, inbox, BigInt(inbox.length), 0));
    checkLeak(inbox.subarray(0, length), "the network");
    return inbox.subarray(0, length);
  }

  [Symbol.dispose](): void {
    this.fd[Symbol.dispose]();
    this.#end[Symbol.dispose]();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The devices

interface SubjectOptions {
  readonly name: string;
  readonly machine: Machine;
  readonly seed: number;
}

type Make = (options: SubjectOptions) => Subject;

const NOTHING = new Uint8Array(0);

function assertEqual(actual: unknown, expected: unknown, what: string): void {
  if (actual !== expected) violate(`${what}: ${actual} instead of ${expected}`);
}

const makeEntropy = (rateLimiter?: RateLimiter): Make => ({ name }) => ({
  name,
  device: new EntropyDevice(rateLimiter ? { rateLimiter } : {}),
  served: [0],
  request: (random, _queue, isBad) =>
    isBad(50)
      ? { readable: anyBytes(random, random(64)), writable: random(64) }
      : { readable: NOTHING, writable: anySize(random, 100_000) },
  async probe(guest) {
    const { bytes } = guest.offer(0, { readable: NOTHING, writable: 64 });
    assertEqual(await guest.used(0), 64, "bytes of entropy");
    if (bytes.every((byte) => byte === 0)) violate("entropy is all zeros");
  },
});

const makeBalloon: Make = ({ name, machine: { memory } }) => {
  const device = new BalloonDevice({ target: 8 * MEBIBYTE });
  const [firstCanary, endCanary] = [LAYOUT.canary / PAGE, (LAYOUT.canary + LAYOUT.canaryLength) / PAGE];
  /** Requests for what is not memory. */
  const impossible = new Set<DescriptorChain>();
  const anyPage = (random: Random): number => {
    const page = Math.floor(memory.pick(random, { start: 0, length: LAYOUT.canary }, PAGE, false) / PAGE);
    return page >= firstCanary && page < endCanary ? 0 : page;
  };
  return {
    name,
    device,
    served: [0, 1, 3, 4],
    taken(chain, queue) {
      const length = totalLength(chain.readable);
      if (queue > 1 || length % 4 !== 0 || length > 16_384) return;
      const pages = new Uint32Array(copySegments(memory.guest.bytes, chain.readable).buffer);
      if (pages.some((page) => memory.find(page * PAGE, PAGE) < 0)) impossible.add(chain);
      // What is read as page numbers is the guest's offer, too.
      if (pages.some((page) => page >= firstCanary && page < endCanary)) memory.offerCanary();
    },
    returned(chain) {
      if (impossible.has(chain)) violate("the balloon takes what is not memory");
    },
    wasReset: () => impossible.clear(),
    request(random, queue, isBad) {
      if (queue === 2) {
        const bytes = anyBytes(random, isBad(10) ? random(3000) : 10 * random(20));
        for (let at = 0; at < bytes.length; at += 10) bytes[at + 1] = 0;
        return { readable: bytes, writable: 0 };
      }
      if (queue > 2) return { readable: NOTHING, writable: random(4) * PAGE + random(2) * random(65536) };
      const count = random(40) === 0 ? 1024 * (isBad(2) ? 5 : random(5)) : anySize(random, 64);
      const pages = Uint32Array.from({ length: count }, () => anyPage(random));
      if (isBad(20) && count > 0) {
        const end = memory.length / PAGE;
        pages[random(count)] = pick(random, [0, end - 1, end, 0xc_0000, 0x10_0000, anyWord(random)]);
      }
      const bytes = new Uint8Array(pages.buffer);
      return {
        readable: isBad(40) ? bytes.subarray(0, random(bytes.length + 1)) : bytes,
        writable: 0,
      };
    },
    disturb(random) {
      if (random(4) === 0) device.target = PAGE * random(2 ** 20);
      if (random(8) === 0) device.statistics().catch(() => {});
      if (random(40) === 0) device.statisticsInterval = random(2) / 500;
    },
    async probe(guest) {
      const writable = guest.offer(3, { readable: NOTHING, writable: PAGE });
      await guest.used(3);
      writable.bytes.fill(1);
      const page = Uint32Array.of(Math.floor(writable.address / PAGE));
      guest.offer(0, { readable: new Uint8Array(page.buffer), writable: 0 });
      await guest.used(0);
      if (writable.bytes.some((byte) => byte !== 0)) violate("the balloon did not take a page");
    },
  };
};

const makeNet = (isLimited: boolean): Make => ({ name, machine }) => {
  const backend = new Cable();
  const limiter = () =>
    new RateLimiter({ bandwidth: { size: 200_000, refillTime: 5 }, ops: { size: 10, refillTime: 2 } });
  const device = new NetDevice({
    backend,
    mac: "02:00:00:00:00:01",
    watcher: machine.loop,
    mtu: 1500,
    vhost: false,
    ...(isLimited ? { receiveLimiter: limiter(), transmitLimiter: limiter() } : {}),
  });
  return {
    name,
    device,
    // Who sends a whole gigabyte has to wait for the limiter as long as that takes.
    served: isLimited ? [] : [1],
    request(random, queue, isBad) {
      if (queue === 0) {
        return {
          readable: NOTHING,
          writable: isBad(50) ? random(12) : 12 + anySize(random, random(10) === 0 ? 70_000 : 3000),
        };
      }
      const packet = anyBytes(
        random,
        random(10) === 0 ? anySize(random, 70_000) : 26 + anySize(random, 1600),
      );
      if (packet.length >= 12 && random(2) === 0) {
        // Flags, kind of segmentation, its sizes, and where the checksum is.
        packet.set([random(4), pick(random, [0, 1, 3, 4, 5, 0x81, random(256)])]);
        for (let at = 2; at < 12; at += 2) packet[at] = pick(random, [0, 1, 14, 34, 255]);
      }
      return { readable: packet, writable: 0 };
    },
    disturb(random) {
      if (random(2) === 0) backend.take();
      else backend.send(anyBytes(random, 1 + anySize(random, random(10) === 0 ? 66_000 : 3000)));
      if (isLimited && random(100) === 0) device.updateLimiters({ receive: limiter() });
    },
    release() {
      for (let count = 0; count < 64 && backend.take().length > 0; count++);
    },
    async probe(guest) {
      const packet = new Uint8Array(100).fill(7, 12);
      if (isLimited) device.updateLimiters({ receive: limiter(), transmit: limiter() });
      guest.offer(1, { readable: packet, writable: 0 });
      await guest.used(1);
      let sent = backend.take();
      while (sent.length > 0 && !packet.every((byte, index) => sent[index] === byte)) sent = backend.take();
      if (sent.length === 0) violate("a packet of a driver that behaves was lost");
      // What was on its way comes before the packet that is waited for.
      const room = guest.offer(0, { readable: NOTHING, writable: 65_600 });
      backend.send(packet);
      for (let count = 1;; count++) {
        const length = await guest.used(0, count);
        if (
          violation || length === packet.length && room.bytes.subarray(12, 100).every((byte) => byte === 7)
        ) return;
        guest.offer(0, { readable: NOTHING, writable: 65_600 });
        backend.send(packet);
      }
    },
  };
};

const makeConsole: Make = ({ name, machine: { folder, loop } }) => {
  const onOutput = (bytes: Uint8Array) => checkLeak(bytes, "a console");
  const sockets = [1, 2, 3].map((index) => join(folder, `${name}${index}`));
  const set = new SocketSet(loop);
  const [first, second, third] = sockets.map((path) => ({ listener: set.listen(path) }));
  const device = new ConsoleDevice({
    ports: [
      { isConsole: true, ...first, onOutput },
      { name: "data", isConsole: false, ...second },
      { isConsole: true, onOutput },
      { name: "errors", isConsole: false, ...third, onOutput },
    ],
  });
  const peers: Peer[] = [];
  const control = (port: number, event: number, value: number) => {
    const view = new DataView(new ArrayBuffer(8));
    view.setUint32(0, port, true);
    view.setUint16(4, event, true);
    view.setUint16(6, value, true);
    return new Uint8Array(view.buffer);
  };
  return {
    name,
    device,
    served: [3],
    request(random, queue, isBad) {
      if (queue === 3) {
        const port = random(10) === 0 ? anyWord(random) : random(5);
        const bytes = control(
          port,
          random(10) === 0 ? random(65536) : pick(random, [0, 1, 3, 3, 3, 4, 6, 6, 6, 7]),
          random(6) === 0 ? random(65536) : random(8) === 0 ? 0 : 1,
        );
        return { readable: isBad(50) ? bytes.subarray(0, random(8)) : bytes, writable: 0 };
      }
      if (queue === 2) return { readable: NOTHING, writable: isBad(50) ? random(16) : 16 + random(60) };
      if (queue % 2 === 0) return { readable: NOTHING, writable: 1 + anySize(random, 70_000) };
      return {
        readable: anyBytes(
          random,
          random(6) === 0 ? random(random(20) === 0 ? 600_000 : 60_000) : anySize(random, 10_000),
        ),
        writable: 0,
      };
    },
    disturb(random) {
      if (random(20) === 0 && peers.length < 8) {
        const peer = Peer.connect(pick(random, sockets));
        if (!peer) return;
        peer.isLazy = random(2) === 0;
        peers.push(peer);
      } else disturbPeers(random, peers, "a console's client");
    },
    release() {
      releasePeers(peers, "a console's client");
    },
    async probe(guest) {
      for (const peer of peers.splice(0)) peer.close();
      const { bytes } = guest.offer(2, { readable: NOTHING, writable: 16 });
      guest.offer(3, { readable: control(0, 0, 1), writable: 0 });
      await guest.used(3);
      assertEqual(await guest.used(2), 8, "bytes of a control message");
      assertEqual(bytes.subarray(0, 8).join(), "0,0,0,0,1,0,1,0", "the first control message");
    },
    dispose() {
      for (const peer of peers) peer.close();
      set[Symbol.dispose]();
    },
  };
};

const GUEST_CID = 42;
const GUEST_PORTS = [1000, 1001];
const HOST_PORTS = [52, 53, 54, 55];

const makeVsock: Make = ({ name, machine: { folder, loop, memory } }) => {
  const path = join(folder, name);
  const device = new VsockDevice({ guestCid: GUEST_CID, path, watcher: loop });
  // Nobody listens on the last port.
  const listeners = HOST_PORTS.slice(0, 3).map((port) =>
    Peer.listen(`${path}_${port}`, port === 52 ? 1 : 64)
  );
  const peers: Peer[] = [];
  /** The stream of its own that the guest is busy with. */
  let own = { guestPort: GUEST_PORTS[0]!, hostPort: HOST_PORTS[0]! };
  /** Streams that the host began last. */
  const requested: { guestPort: number; hostPort: number }[] = [];
  const packet = (
    to: { source?: bigint; guestPort: number; hostPort: number; op: number },
    data = NOTHING,
  ) => {
    const bytes = new Uint8Array(44 + data.length);
    const view = new DataView(bytes.buffer);
    view.setBigUint64(0, to.source ?? BigInt(GUEST_CID), true);
    view.setBigUint64(8, 2n, true);
    view.setUint32(16, to.guestPort, true);
    view.setUint32(20, to.hostPort, true);
    view.setUint32(24, data.length, true);
    view.setUint16(28, 1, true);
    view.setUint16(30, to.op, true);
    view.setUint32(36, 65536, true);
    bytes.set(data, 44);
    return { bytes, view };
  };
  return {
    name,
    device,
    served: [],
    request(random, queue, isBad) {
      if (queue !== 1) {
        return {
          readable: NOTHING,
          writable: isBad(60) ? random(64) : 44 + 1 + anySize(random, 70_000),
        };
      }
      // New streams, answers to those that the host began, and what goes on in them all.
      const begun = pick(random, requested) ?? { guestPort: 1, hostPort: 1 };
      if (random(100) === 0) {
        own = { guestPort: pick(random, GUEST_PORTS), hostPort: pick(random, HOST_PORTS) };
      }
      const kind = random(20);
      const to = kind === 0 || kind > 1 && random(2) === 0 ? own : begun;
      const op = random(100) === 0 ? random(65536) : pick(
        random,
        [[1, 1, 1, 1, 1, 3, 4], [2, 2, 2, 2, 2, 1, 3]][kind] ?? [5, 5, 5, 5, 5, 5, 5, 5, 5, 4, 6, 7],
      );
      const size = random(3) === 0 ? random(random(20) === 0 ? 200_000 : 60_000) : anySize(random, 8192);
      const { bytes, view } = packet({ ...to, op }, op === 5 ? anyBytes(random, size) : NOTHING);
      if (isBad(30)) {
        view.setUint32(pick(random, [0, 4, 8, 12, 16, 20, 24, 28]), anyWord(random), true);
      }
      if (op === 4) view.setUint32(32, random(5), true);
      // Room for what is sent: for all, or for less than was sent already.
      const room = [0, 1, 4096, 65536, 262_144, anyWord(random)];
      view.setUint32(36, random(3) > 0 ? 2 ** 32 - 1 : pick(random, room), true);
      if (random(4) === 0) view.setUint32(40, anyWord(random), true);
      return { readable: isBad(200) ? bytes.subarray(0, random(48)) : bytes, writable: 0 };
    },
    returned({ writable }, queue) {
      if (queue !== 0) return;
      const view = copySegments(memory.guest.bytes, sliceSegments(writable, 0, 44));
      if (view.getUint16(30, true) !== 1) return;
      requested.push({ guestPort: view.getUint32(20, true), hostPort: view.getUint32(16, true) });
      if (requested.length > 3) requested.shift();
    },
    disturb(random) {
      const listener = pick(random, listeners);
      switch (random(10)) {
        case 0:
        case 1: {
          const peer = listener.accept() ?? Peer.connect(path);
          if (!peer) return;
          peer.isLazy = random(2) === 0;
          peer.send(new TextEncoder().encode(`CONNECT ${pick(random, GUEST_PORTS)}\n`));
          if (peers.push(peer) > 30) peers.shift()!.close();
          return;
        }
        case 2:
          if (random(10) === 0) device.resetTransport();
          return;
        default:
          disturbPeers(
            random,
            peers,
            "a socket",
            () => pick(random, ["CONNECT ", "CONNECT 99999999999\n", "\n", "CONNECT 1003\n"]),
          );
      }
    },
    release() {
      releasePeers(peers, "a socket");
    },
    wasReset: () => assertEqual(device.connectionCount, 0, "connections after a reset"),
    verify() {
      if (device.connectionCount > 1023) violate(`there are ${device.connectionCount} connections`);
    },
    async probe(guest) {
      // A port on which nobody listens: the answer is a reset.
      const { bytes } = guest.offer(0, { readable: NOTHING, writable: 4096 });
      guest.offer(1, { readable: packet({ guestPort: 7, hostPort: 55, op: 1 }).bytes, writable: 0 });
      await guest.used(1);
      assertEqual(await guest.used(0), 44, "bytes of a packet");
      assertEqual(bytes.slice(16, 32).join(), "55,0,0,0,7,0,0,0,0,0,0,0,1,0,3,0", "an answer");
    },
    dispose() {
      for (const peer of [...peers, ...listeners]) peer.close();
    },
  };
};

/** An injected fault of the storage. */
class StorageError extends Error {}

/** A file that is watched: what it is asked for must be right, and what is slow is as slow as it is told to be. */
class WatchedFile implements BlockFile {
  readonly isReadOnly: boolean;
  readonly blockSize: number;
  readonly clusterSize: number;
  /** Whether what is asked for now fails. */
  isBroken = false;
  readonly #file: BlockFile;
  readonly #memory: Memory;
  readonly #isSlow: boolean;
  readonly #waiting: (() => void)[] = [];

  constructor(file: BlockFile, memory: Memory, isSlow: boolean) {
    this.#file = file;
    this.#memory = memory;
    this.#isSlow = isSlow;
    ({ isReadOnly: this.isReadOnly, blockSize: this.blockSize, clusterSize: this.clusterSize } = file);
  }

  get size(): number {
    return this.#file.size;
  }

  get isBusy(): boolean {
    return this.#waiting.length > 0 || this.#file.isBusy;
  }

  /** Lets one of those go on that wait, or all of them. */
  release(random?: Random): void {
    if (random) this.#waiting.splice(random(this.#waiting.length), 1)[0]?.();
    else for (const go of this.#waiting.splice(0)) go();
  }

  read(offset: number, segments: readonly Segment[], memory?: HostMemory): void | Promise<void> {
    if (memory) violate("a device reads to memory that is not the guest's");
    return this.#do(offset, totalLength(segments), segments, () => this.#file.read(offset, segments));
  }

  write(offset: number, segments: readonly Segment[], memory?: HostMemory): void | Promise<void> {
    if (memory) violate("a device writes from memory that is not the guest's");
    this.#assertWritable();
    return this.#do(offset, totalLength(segments), segments, () => this.#file.write(offset, segments));
  }

  flush(): void | Promise<void> {
    return this.#do(0, 0, [], () => this.#file.flush());
  }

  discard(offset: number, length: number): void | Promise<void> {
    this.#assertWritable();
    return this.#do(offset, length, [], () => this.#file.discard(offset, length));
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void | Promise<void> {
    this.#assertWritable();
    return this.#do(offset, length, [], () => this.#file.writeZeroes(offset, length, mayUnmap));
  }

  resize(size?: number): void | Promise<void> {
    return this.#file.resize(size);
  }

  close(): Promise<void> {
    return this.#file.close();
  }

  [Symbol.dispose](): void {
    this.#file[Symbol.dispose]();
  }

  #assertWritable(): void {
    if (this.isReadOnly) violate("a disk is written to that is read-only");
  }

  #do(
    offset: number,
    length: number,
    segments: readonly Segment[],
    work: () => void | Promise<void>,
  ): void | Promise<void> {
    if (offset < 0 || offset % 512 !== 0 || length % 512 !== 0 || offset + length > this.size) {
      violate(`a disk of ${this.size} bytes is asked for ${length} bytes at ${offset}`);
    }
    if (
      segments.some((segment) => segment.offset < 0 || segment.offset + segment.length > this.#memory.length)
    ) {
      violate("a disk is given memory that is not the guest's");
    }
    const { isBroken } = this;
    const checked = (): void | Promise<void> => {
      if (isBroken) throw new StorageError("storage is broken");
      const failed = (error: unknown): never => {
        violate(`a file failed: ${error instanceof Error ? error.stack : error}`);
        throw error;
      };
      try {
        const result = work();
        return result?.catch(failed);
      } catch (error) {
        failed(error);
      }
    };
    if (!this.#isSlow) return checked();
    return new Promise<void>((resolve) => this.#waiting.push(resolve)).then(checked);
  }
}

interface DiskOptions {
  readonly format: "raw" | "qcow2";
  /** Size in bytes. */
  readonly size: number;
  /** Size of a cluster as a power of two. */
  readonly clusterBits?: number;
  /** Size of the raw file below it, in bytes. */
  readonly backing?: number;
  /** How many compressed clusters it has. */
  readonly compressed?: number;
  readonly isDirect?: boolean;
  readonly isGrowing?: boolean;
  readonly isReadOnly?: boolean;
  readonly isSlow?: boolean;
  readonly isLimited?: boolean;
  readonly cache?: "unsafe";
}

/** A qcow2 image of version 3 (QEMU 7.2 `docs/interop/qcow2.txt`) with clusters of any size, empty or compressed. */
function makeImage(
  { size, clusterBits = 16, compressed = 0 }: DiskOptions,
  backing: string | undefined,
): Uint8Array<ArrayBuffer> {
  const cluster = 2 ** clusterBits;
  const l1Entries = Math.ceil(size / (cluster * cluster / 8));
  const l2 = 3 + Math.ceil(l1Entries * 8 / cluster);
  const clusters = l2 + (compressed > 0 ? 1 + compressed : 0);
  const bytes = new Uint8Array(clusters * cluster);
  const view = new DataView(bytes.buffer);
  const words = { 0: 0x514649fb, 4: 3, 20: clusterBits, 36: l1Entries, 56: 1, 96: 4, 100: 104 };
  for (const [at, word] of Object.entries(words)) view.setUint32(Number(at), word);
  view.setBigUint64(24, BigInt(size));
  view.setBigUint64(40, BigInt(3 * cluster));
  view.setBigUint64(48, BigInt(cluster));
  if (backing !== undefined) {
    const name = new TextEncoder().encode(backing);
    view.setUint32(104, 0xe279_2aca);
    view.setUint32(108, 3);
    bytes.set(new TextEncoder().encode("raw"), 112);
    view.setBigUint64(8, 128n);
    view.setUint32(16, name.length);
    bytes.set(name, 128);
  }
  view.setBigUint64(cluster, BigInt(2 * cluster));
  for (let index = 0; index < clusters; index++) view.setUint16(2 * cluster + 2 * index, 1);
  if (compressed > 0) view.setBigUint64(3 * cluster, 1n << 63n | BigInt(l2 * cluster));
  for (let index = 0; index < compressed; index++) {
    const at = (l2 + 1 + index) * cluster;
    const data = deflateRawSync(new Uint8Array(cluster).fill(1 + index));
    bytes.set(data, at);
    const sectors = BigInt(Math.ceil(data.length / 512) - 1);
    view.setBigUint64(
      l2 * cluster + 8 * index,
      1n << 62n | sectors << BigInt(62 - (clusterBits - 8)) | BigInt(at),
    );
  }
  return bytes;
}

const REQUEST = { in: 0, out: 1, flush: 4, id: 8, discard: 11, zeroes: 13 } as const;

const makeDisk = (options: DiskOptions): Make => ({ name, machine, seed }) => {
  const { format, clusterBits = 16, isReadOnly = false, isSlow = false } = options;
  const path = join(machine.folder, name);
  const backing = options.backing === undefined ? undefined : `${path}.backing`;
  const pattern = (length: number) => new Uint8Array(length).map((_, index) => index >> 9);
  if (backing !== undefined) Deno.writeFileSync(backing, pattern(options.backing!));
  Deno.writeFileSync(path, format === "raw" ? pattern(options.size) : makeImage(options, backing));
  // Files that must stay as they are.
  const fixed = isReadOnly ? path : backing;
  const open = (isDirect: boolean): BlockFile => {
    const how: OpenBlockFileOptions = { memory: machine.memory.guest, format, isReadOnly, isDirect };
    try {
      return openBlockFile(path, how);
    } catch (error) {
      // Not all file systems have direct I/O.
      if (isDirect) return open(false);
      throw error;
    }
  };
  const file = new WatchedFile(open(options.isDirect === true), machine.memory, isSlow);
  const limiter = () =>
    new RateLimiter({ bandwidth: { size: 2 ** 20, refillTime: 5 }, ops: { size: 100, refillTime: 5 } });
  const device = new BlockDevice({
    file,
    serial: name.slice(0, 20),
    ...(options.cache ? { cache: options.cache } : {}),
    ...(options.isLimited ? { rateLimiter: limiter() } : {}),
    onError: (error) => {
      const isExpected = error instanceof StorageError ||
        error instanceof Error && /^Cannot (move|use|clear|write) /.test(error.message);
      if (!isExpected) {
        violate(`a request failed for no reason: ${error instanceof Error ? error.stack : error}`);
      }
    },
  });
  const anySector = (random: Random): [low: number, high: number] => {
    if (random(20) === 0) return [anyWord(random), pick(random, [0, 0, 1, 2 ** 31, 2 ** 32 - 1])];
    const sectors = file.size / 512;
    return [
      random(12) === 0 ? Math.max(0, sectors - random(40)) : random(4) === 0 ? random(64) : random(sectors),
      0,
    ];
  };
  const header = (type: number, sector: readonly [number, number], more = NOTHING) => {
    const bytes = new Uint8Array(16 + more.length);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, type, true);
    view.setUint32(8, sector[0], true);
    view.setUint32(12, sector[1], true);
    bytes.set(more, 16);
    return bytes;
  };
  const pieces = (random: Random): Uint8Array<ArrayBuffer> => {
    const count = random(30) === 0 ? random(40) : 1 + random(3);
    const words = new Uint32Array(4 * count);
    for (let at = 0; at < words.length; at += 4) {
      words.set(anySector(random), at);
      words[at + 2] = random(20) === 0
        ? anyWord(random)
        : random(10) === 0
        ? random(file.size / 512)
        : random(300);
      words[at + 3] = random(20) === 0 ? anyWord(random) : random(2);
    }
    return new Uint8Array(words.buffer);
  };
  return {
    name,
    device,
    served: options.isLimited ? [] : [0],
    request(random, _queue, isBad) {
      const type = random(20) === 0
        ? anyWord(random)
        : pick(random, [0, 0, 0, 0, 1, 1, 1, 1, 1, 4, 8, REQUEST.discard, REQUEST.zeroes]);
      const length = random(20) === 0
        ? random(5000)
        : 512 * (random(50) === 0 ? random(1200) : random(10) === 0 ? random(300) : 1 + random(16));
      // Status bytes are where they should be, or elsewhere, or missing.
      const status = isBad(40) ? random(3) : 1;
      const isWrite = type === REQUEST.out;
      const isClear = type === REQUEST.discard || type === REQUEST.zeroes;
      const more = isWrite ? anyBytes(random, length) : isClear ? pieces(random) : NOTHING;
      const bytes = header(type, anySector(random), more);
      return {
        readable: isBad(60) ? bytes.subarray(0, random(bytes.length + 1)) : bytes,
        writable: status +
          (type === REQUEST.in ? length : random(20) === 0 ? random(600) : type === REQUEST.id ? 20 : 0),
      };
    },
    disturb(random) {
      if (isSlow && random(4) === 0) file.release(random);
      if (isSlow) file.isBroken = random(40) === 0;
      if (options.isLimited && random(100) === 0) device.updateRateLimiter(limiter());
      if (options.isGrowing && random(500) === 0 && file.size < 2 * options.size) {
        device.grow(file.size + 512 * random(200)).catch((error) =>
          violate(`a disk does not grow: ${error.stack}`)
        );
      }
    },
    release() {
      file.isBroken = false;
      file.release();
    },
    verify() {
      const { size: length, blocks } = Deno.statSync(path);
      if (format === "raw") assertEqual(length, file.size, "size of a raw disk");
      // Tables need at most an entry of ten bytes for each cluster, and their own clusters.
      const { size } = file;
      const most = size * (1 + 16 / 2 ** clusterBits) + 64 * 2 ** clusterBits + MEBIBYTE;
      if (blocks! * 512 > most) violate(`a disk of ${size} bytes takes ${blocks! * 512} bytes`);
    },
    async probe(guest) {
      if (options.isLimited) device.updateRateLimiter(limiter());
      const data = new Uint8Array(4096).fill(isReadOnly ? 0 : 1 + seed % 200);
      if (isReadOnly) data.set(pattern(4096));
      else {
        guest.offer(0, { readable: header(REQUEST.out, [8, 0], data), writable: 1 });
        await guest.used(0);
      }
      const sector = isReadOnly ? 0 : 8;
      const { bytes } = guest.offer(0, { readable: header(REQUEST.in, [sector, 0]), writable: 4097 });
      assertEqual(await guest.used(0, isReadOnly ? 1 : 2), 4097, "bytes of a read");
      if (!Buffer.from(data).equals(bytes.subarray(0, 4096))) {
        violate("a disk does not keep what is written to it");
      }
      assertEqual(bytes[4096], 0, "status of a read");
    },
    dispose() {
      // Not at once, as an image may have become long, though it has holes.
      using content = Deno.openSync(path);
      for (let length: number | null = 1; length;) {
        length = content.readSync(inbox);
        checkLeak(inbox.subarray(0, length ?? 0), "a disk");
      }
      if (
        fixed !== undefined &&
        !Buffer.from(pattern(isReadOnly ? options.size : options.backing!)).equals(Deno.readFileSync(fixed))
      ) {
        violate("a file was written to that is read-only");
      }
      if (format === "qcow2") checkImage(path);
    },
  };
};

/** Checks that an image can be trusted: by reading all of it, and by QEMU's own check where that is installed. */
function checkImage(path: string): void {
  try {
    const { code, stdout, stderr } = new Deno.Command("qemu-img", { args: ["check", "-f", "qcow2", path] })
      .outputSync();
    // 3: there are clusters that nobody uses.
    if (code !== 0 && code !== 3) {
      const decoder = new TextDecoder();
      violate(
        `an image is corrupt: ${decoder.decode(stdout).slice(0, 1000)} ${
          decoder.decode(stderr).slice(0, 1000)
        }`,
      );
    }
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

const SUBJECTS: readonly (readonly [name: string, make: Make])[] = [
  ["entropy", makeEntropy()],
  ["entropy-limited", makeEntropy(new RateLimiter({ bandwidth: { size: 50_000, refillTime: 2 } }))],
  ["balloon", makeBalloon],
  ["net", makeNet(false)],
  ["net-limited", makeNet(true)],
  ["console", makeConsole],
  ["vsock", makeVsock],
  ["disk", makeDisk({ format: "raw", size: 8 * MEBIBYTE, cache: "unsafe", isGrowing: true })],
  ["disk-slow", makeDisk({ format: "raw", size: 4 * MEBIBYTE, isSlow: true })],
  ["disk-limited", makeDisk({ format: "raw", size: 4 * MEBIBYTE, isLimited: true })],
  ["disk-direct", makeDisk({ format: "raw", size: 2 * MEBIBYTE, isDirect: true })],
  ["disk-read-only", makeDisk({ format: "raw", size: MEBIBYTE, isReadOnly: true })],
  [
    "disk-qcow2",
    makeDisk({ format: "qcow2", size: 16 * MEBIBYTE, backing: 5 * MEBIBYTE, compressed: 20, isDirect: true }),
  ],
  [
    "disk-qcow2-small",
    makeDisk({
      format: "qcow2",
      size: 64 * MEBIBYTE,
      clusterBits: 9,
      isSlow: true,
      isGrowing: true,
      cache: "unsafe",
    }),
  ],
];

// ---------------------------------------------------------------------------------------------------------------------
// The run

/** What a run did. */
export interface Report {
  /** Cases that were played. */
  readonly cases: number;
  /** The same by device. */
  readonly devices: Readonly<Record<string, { ring: number; register: number; failed: number; up: number }>>;
  /** Buffers that devices took and gave back, and faults that they told of. */
  readonly counts: { readonly taken: number; readonly returned: number; readonly faults: number };
  /** Most memory, in bytes, beside what the process took at first. */
  readonly growth: number;
}

/** A seed for each part of a run, so that one does not depend upon what came before. */
function partSeed(...parts: readonly number[]): number {
  let state = 0x9e37_79b9;
  for (const part of parts) {
    state = Math.imul(state ^ part, 0x85eb_ca6b);
    state ^= state >>> 13;
    state = Math.imul(state, 0xc2b2_ae35);
    state ^= state >>> 16;
  }
  return state || 1;
}

/** Plays in this process, and prints a line of JSON from time to time. */
async function play(
  { seed, cases: wanted, device }: HostileGuestOptions,
  folder: string,
): Promise<void> {
  const machine = new Machine(seed, folder, device);
  const { guests, memory, loop } = machine;
  let cases = 0;
  let current = "";
  let growth = 0;
  const resident = () => Deno.memoryUsage().rss;
  const atFirst = resident();
  let told = 0;
  const tell = (line: Record<string, unknown>) => say(JSON.stringify({ cases, device: current, ...line }));
  const lookAround = () => {
    if (violation) {
      tell({ violation });
      Deno.exit(1);
    }
    if (performance.now() - told < LOOK_INTERVAL) return;
    told = performance.now();
    growth = Math.max(growth, resident() - atFirst);
    if (growth > MAX_GROWTH) violate(`the process has grown by ${Math.round(growth / MEBIBYTE)} MiB`);
    const descriptors = [...Deno.readDirSync("/proc/self/fd")].length;
    if (descriptors > MAX_DESCRIPTORS) violate(`the process has ${descriptors} descriptors`);
  };
  const onError = (error: unknown) =>
    violate(`an exception escaped: ${error instanceof Error ? error.stack : String(error)}`);
  globalThis.addEventListener("unhandledrejection", (event) => {
    event.preventDefault();
    onError(event.reason);
  });
  globalThis.addEventListener("error", (event) => {
    event.preventDefault();
    onError(event.error);
  });
  for (let episode = 0; cases < wanted; episode++) {
    const index = episode % guests.length;
    const guest = guests[index]!;
    current = guest.subject.name;
    const random = seededRandom(
      partSeed(seed, SUBJECTS.findIndex(([name]) => name === current), Math.floor(episode / guests.length)),
    );
    guest.wildness = random(3);
    tell({});
    try {
      for (let count = EPISODE * (random(16) === 0 ? 10 : 1); count > 0; count--) {
        if (guest.isBoring && random(10) > 0) await guest.bringUp(random);
        guest.playCase(random);
        cases++;
        if (random(3) === 0) guest.subject.disturb?.(random);
        loop.poll(0);
        if (random(16) === 0) await turn();
        if (violation) break;
      }
      await machine.settle();
      await guest.verify();
      memory.verify();
      if (episode % (4 * guests.length) >= 3 * guests.length && await guest.start(random)) {
        await guest.subject.probe(guest);
      }
    } catch (error) {
      onError(error);
    }
    lookAround();
  }
  current = "";
  try {
    machine[Symbol.dispose]();
    memory.verify();
    await turn();
  } catch (error) {
    onError(error);
  }
  lookAround();
  const devices = Object.fromEntries(
    guests.map(({ subject, cases, states }) => [subject.name, { ...cases, ...states }]),
  );
  tell({ report: { cases, devices, counts, growth } satisfies Report });
  Deno.exit(0);
}

/** How to play. */
export interface HostileGuestOptions {
  /** Where all that is random comes from. */
  readonly seed: number;
  /** How many cases to play at least. */
  readonly cases: number;
  /** Play only with this device. */
  readonly device?: string | undefined;
}

/**
 * Plays a hostile guest in a process of its own.
 *
 * @param options Seed and length
 * @returns What was played
 * @throws {Error} If something happened that must not; the message says what, and how to see it again
 */
export async function playHostileGuest({ seed, cases, device }: HostileGuestOptions): Promise<Report> {
  const script = fileURLToPath(import.meta.url);
  const folder = await Deno.makeTempDir({ prefix: "hg-" });
  const only = device === undefined ? [] : ["--device", device];
  const args = ["run", "-A", "--no-check", script, "--seed", `${seed}`, "--cases", `${cases}`, ...only];
  const child = new Deno.Command(Deno.execPath(), {
    args: [...args, "--child", folder],
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
    env: { NO_COLOR: "1" },
  }).spawn();
  const stderr = new Response(child.stderr).text();
  let last: { cases?: number; device?: string; violation?: string; report?: Report } = {};
  let isHanging = false;
  const hang = () => {
    isHanging = true;
    child.kill("SIGKILL");
  };
  let watchdog = setTimeout(hang, HANG);
  let text = "";
  for await (const chunk of child.stdout.pipeThrough(new TextDecoderStream())) {
    clearTimeout(watchdog);
    watchdog = setTimeout(hang, HANG);
    const lines = (text + chunk).split("\n");
    text = lines.pop()!;
    for (const line of lines) last = JSON.parse(line);
  }
  clearTimeout(watchdog);
  const { code, signal } = await child.status;
  await Deno.remove(folder, { recursive: true });
  if (last.report && code === 0) return last.report;
  const what = last.violation ??
    (isHanging ? "it hangs" : `it ended with status ${code}, signal ${signal}: ${await stderr}`);
  throw new Error(
    `The hostile guest won with seed ${seed}, at or behind case ${last.cases ?? 0}, against "${
      last.device ?? ""
    }": ${what}\n` +
      `Play it again: deno run -A tests/hostile_guest.ts --seed ${seed} --cases ${cases}${
        only.map((each) => ` ${each}`).join("")
      }`,
  );
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: {
      seed: { type: "string", default: "1" },
      cases: { type: "string", default: "100000" },
      device: { type: "string" },
      child: { type: "string" },
    },
  });
  const [seed, cases] = [Number(values.seed), Number(values.cases)];
  if (!Number.isSafeInteger(seed) || !Number.isSafeInteger(cases)) {
    fail("Cannot play: give integers as seed and cases");
  }
  const options = { seed, cases, device: values.device };
  if (values.child !== undefined) await play(options, values.child);
  else {
    try {
      say(JSON.stringify(await playHostileGuest(options), undefined, 2));
    } catch (error) {
      fail(error instanceof Error ? error.message : String(error));
    }
  }
}
