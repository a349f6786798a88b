/**
 * The memory balloon (virtio 1.2, section 5.5): the guest hands pages back to the host, for as long as it is asked to, and
 * tells which ones it does not use.
 *
 * @module
 */

import type { GuestMemory } from "./guest_memory.ts";
import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice } from "./virtio_device.ts";
import { type DescriptorChain, totalLength, type Virtqueue, VirtqueueError } from "./virtqueue.ts";

const F_STATS_VQ = 1n << 1n;
const F_DEFLATE_ON_OOM = 1n << 2n;
const F_REPORTING = 1n << 5n;

const INFLATE_QUEUE = 0;
const DEFLATE_QUEUE = 1;
const STATS_QUEUE = 2;
const NUM_PAGES = 0;
const ACTUAL = 4;
const CONFIG_SIZE = 8;

/** Size of the balloon's pages, whatever the guest's are. */
const PAGE = 4096;
/** Most page numbers of one request. Drivers send 256 to 1024. */
const MAX_PAGES = 4096;
/** Work that is done before everything else has its turn: pages of requests, and as many for each reported range. */
const MAX_TURN = 4096;
const RANGE_COST = 64;
const STATISTIC_SIZE = 10;
const MAX_STATISTICS = 256;

/** Names of statistics by their tag (virtio 1.2, section 5.5.6.3; from `oomKills` on, Linux 6.12 `virtio_balloon.h`). */
export const BALLOON_STATISTICS = [
  "swapIn",
  "swapOut",
  "majorFaults",
  "minorFaults",
  "freeMemory",
  "totalMemory",
  "availableMemory",
  "diskCaches",
  "hugetlbAllocations",
  "hugetlbFailures",
  "oomKills",
  "allocationStalls",
  "asyncScans",
  "directScans",
  "asyncReclaims",
  "directReclaims",
] as const;

/** What the guest says of its memory: bytes, but for faults, failures and the like, which are counts since its boot. */
export type BalloonStatistics = { readonly [K in typeof BALLOON_STATISTICS[number]]?: number };

/** What a {@linkcode BalloonDevice} can be given. */
export interface BalloonOptions {
  /** How many bytes the guest is asked to hand back at first; none unless told. */
  readonly target?: number;
  /** Whether the guest may take pages back when it runs out of memory; so unless told. */
  readonly deflateOnOom?: boolean;
  /** Whether the guest is to tell which pages it does not use, which are taken from it until it does; so unless told. */
  readonly freePageReporting?: boolean;
  /** How often to ask for statistics, in seconds; 0, and unless told, only when {@linkcode BalloonDevice.statistics} is called. */
  readonly statisticsInterval?: number;
  /** Called when the balloon has another size, with its bytes. */
  readonly onActual?: (bytes: number) => void;
}

/** Takes memory from the guest. */
export class BalloonDevice implements VirtioDevice {
  /** See {@linkcode VirtioDevice.type}. */
  readonly type: number = VIRTIO_DEVICE.balloon;
  /** See {@linkcode VirtioDevice.features}. */
  readonly features: bigint;
  /** See {@linkcode VirtioDevice.queueSizes}. */
  readonly queueSizes: readonly number[] = [128, 128, 16, 32, 32];
  /** See {@linkcode VirtioDevice.config}. */
  readonly config: Uint8Array<ArrayBuffer> = new Uint8Array(CONFIG_SIZE);
  readonly #view = new DataView(this.config.buffer);
  readonly #onActual: BalloonOptions["onActual"];
  #interval: number;
  #context: DeviceContext | undefined;
  /** Queues that were not served to their end. */
  readonly #unfinished = new Set<Virtqueue>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #poller: ReturnType<typeof setInterval> | undefined;
  /** The buffer with which the guest is asked for statistics, while it is here. */
  #statisticsBuffer: DescriptorChain | undefined;
  #latest: BalloonStatistics | undefined;
  #waiting: PromiseWithResolvers<BalloonStatistics> | undefined;

  /**
   * Makes a device.
   *
   * @param options What it does
   */
  constructor(options: BalloonOptions = {}) {
    this.features = F_STATS_VQ |
      (options.deflateOnOom ?? true ? F_DEFLATE_ON_OOM : 0n) |
      (options.freePageReporting ?? true ? F_REPORTING : 0n);
    this.#onActual = options.onActual;
    this.#interval = options.statisticsInterval ?? 0;
    this.target = options.target ?? 0;
  }

  /** How many bytes the guest is asked to hand back. */
  get target(): number {
    return this.#view.getUint32(NUM_PAGES, true) * PAGE;
  }

  set target(bytes: number) {
    const pages = Math.floor(bytes / PAGE);
    if (!(pages >= 0 && pages <= 0xffff_ffff)) {
      throw new RangeError(`Cannot ask the guest for ${bytes} bytes of memory: ask for at least 0`);
    }
    this.#view.setUint32(NUM_PAGES, pages, true);
    this.#context?.configChanged();
  }

  /** How many bytes the guest has handed back, as it says. */
  get actual(): number {
    return this.#view.getUint32(ACTUAL, true) * PAGE;
  }

  /** The newest statistics, if there are any. */
  get latestStatistics(): BalloonStatistics | undefined {
    return this.#latest;
  }

  /** How often the guest is asked for statistics, in seconds; 0 if only on demand. */
  get statisticsInterval(): number {
    return this.#interval;
  }

  set statisticsInterval(seconds: number) {
    this.#interval = seconds;
    this.#poll();
  }

  /**
   * Asks the guest for statistics. It may take its time; rejects when it is reset.
   *
   * @returns What it answers
   */
  statistics(): Promise<BalloonStatistics> {
    if (!this.#context?.queues[STATS_QUEUE]?.isReady || !this.#hasFeature(F_STATS_VQ)) {
      return Promise.reject(
        new Error(
          "Cannot ask the guest for statistics as it has no driver that gives them: wait until it has booted",
        ),
      );
    }
    this.#waiting ??= Promise.withResolvers();
    this.#ask();
    return this.#waiting.promise;
  }

  /**
   * See {@linkcode VirtioDevice.writeConfig}: only the balloon's size is the guest's to write.
   *
   * @param offset Where
   * @param bytes What
   */
  writeConfig(offset: number, bytes: Uint8Array): void {
    const before = this.actual;
    bytes.forEach((byte, index) => {
      if (offset + index >= ACTUAL && offset + index < CONFIG_SIZE) this.config[offset + index] = byte;
    });
    if (this.actual !== before) this.#onActual?.(this.actual);
  }

  /**
   * See {@linkcode VirtioDevice.activate}.
   *
   * @param context What to work with
   */
  activate(context: DeviceContext): void {
    this.#context = context;
    this.#poll();
  }

  /**
   * See {@linkcode VirtioDevice.notify}.
   *
   * @param queue The queue
   */
  notify(queue: Virtqueue): void {
    const context = this.#context;
    if (!context || this.#unfinished.has(queue)) return;
    try {
      if (this.#serve(context, queue)) return;
      this.#unfinished.add(queue);
      this.#timer ??= setTimeout(() => {
        this.#timer = undefined;
        const queues = [...this.#unfinished];
        this.#unfinished.clear();
        for (const each of queues) this.notify(each);
      }, 0);
    } catch (error) {
      this.#context = undefined;
      context.fail(error);
    }
  }

  /**
   * See {@linkcode VirtioDevice.save}: the guest tells its size when it changes only.
   *
   * @returns The size in pages
   */
  save(): number {
    return this.actual / PAGE;
  }

  /**
   * See {@linkcode VirtioDevice.restore}.
   *
   * @param state What {@linkcode BalloonDevice.save} gave
   */
  restore(state: unknown): void {
    const size = new DataView(new ArrayBuffer(4));
    size.setUint32(0, Number(state), true);
    this.writeConfig(ACTUAL, new Uint8Array(size.buffer));
  }

  /** See {@linkcode VirtioDevice.reset}: the guest has all of its memory again. */
  reset(): void {
    this.#context = undefined;
    this.#unfinished.clear();
    clearTimeout(this.#timer);
    clearInterval(this.#poller);
    this.#timer =
      this.#poller =
      this.#statisticsBuffer =
      this.#latest =
        undefined;
    this.#waiting?.promise.catch(() => {});
    this.#waiting?.reject(
      new Error("The guest gave no statistics as it was reset: ask again once it has booted"),
    );
    this.#waiting = undefined;
    this.writeConfig(ACTUAL, new Uint8Array(4));
  }

  /** Ends it. */
  [Symbol.dispose](): void {
    this.reset();
  }

  #hasFeature(feature: bigint): boolean {
    return ((this.#context?.features ?? 0n) & feature) !== 0n;
  }

  /** Serves a queue for a while, and tells whether it came to the end. */
  #serve(context: DeviceContext, queue: Virtqueue): boolean {
    let work = 0;
    let hasUsed = false;
    while (work < MAX_TURN) {
      const chain = queue.pop();
      if (!chain) {
        queue.setNotification(true);
        if (queue.hasPending) continue;
        break;
      }
      if (queue.index === STATS_QUEUE && this.#hasFeature(F_STATS_VQ)) {
        work += RANGE_COST;
        // There should be one buffer only.
        if (this.#statisticsBuffer) {
          queue.push(this.#statisticsBuffer.head, 0);
          hasUsed = true;
        }
        this.#statisticsBuffer = chain;
        this.#latest = readStatistics(context.memory, chain);
        this.#waiting?.resolve(this.#latest);
        this.#waiting = undefined;
        continue;
      }
      if (queue.index === INFLATE_QUEUE || queue.index === DEFLATE_QUEUE) {
        const pages = readPages(context.memory, chain);
        // A deflated page is there again once the guest touches it.
        if (queue.index === INFLATE_QUEUE) releasePages(context.memory, pages);
        work += 1 + pages.length;
      } else {
        // Linux counts only the queues that it uses, and so has this one where the standard has the one of hints.
        releaseRanges(context.memory, chain);
        work += RANGE_COST * (1 + chain.writable.length);
      }
      queue.push(chain.head, 0);
      hasUsed = true;
    }
    if (hasUsed) context.interrupt(queue);
    return work < MAX_TURN;
  }

  #poll(): void {
    clearInterval(this.#poller);
    this.#poller = undefined;
    if (!this.#context || this.#interval <= 0) return;
    this.#poller = setInterval(() => this.#ask(), this.#interval * 1000);
  }

  /** Gives the buffer back, which asks the guest for another one with new statistics. */
  #ask(): void {
    const queue = this.#context?.queues[STATS_QUEUE];
    if (!queue || !this.#statisticsBuffer) return;
    queue.push(this.#statisticsBuffer.head, 0);
    this.#statisticsBuffer = undefined;
    this.#context?.interrupt(queue);
  }
}

/** Takes a copy of what a chain of limited size has to read. */
function readAll(
  memory: GuestMemory,
  chain: DescriptorChain,
  unit: number,
  most: number,
): DataView<ArrayBuffer> {
  const length = totalLength(chain.readable);
  if (chain.writable.length > 0 || length % unit !== 0 || length > unit * most) {
    throw new VirtqueueError(`a balloon request has ${length} bytes to read, in units of ${unit}`);
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const segment of chain.readable) {
    bytes.set(memory.bytes.subarray(segment.offset, segment.offset + segment.length), at);
    at += segment.length;
  }
  return new DataView(bytes.buffer);
}

function readStatistics(memory: GuestMemory, chain: DescriptorChain): BalloonStatistics {
  const view = readAll(memory, chain, STATISTIC_SIZE, MAX_STATISTICS);
  const statistics: { -readonly [K in keyof BalloonStatistics]: number } = {};
  for (let at = 0; at < view.byteLength; at += STATISTIC_SIZE) {
    const name = BALLOON_STATISTICS[view.getUint16(at, true)];
    if (name) statistics[name] = Number(view.getBigUint64(at + 2, true));
  }
  return statistics;
}

/** Reads page numbers of the guest, and finds the pages in the file of its memory. */
function readPages(memory: GuestMemory, chain: DescriptorChain): Uint32Array {
  const view = readAll(memory, chain, 4, MAX_PAGES);
  const pages = new Uint32Array(view.byteLength / 4);
  for (let index = 0; index < pages.length; index++) {
    pages[index] = memory.offset(view.getUint32(4 * index, true) * PAGE, PAGE) / PAGE;
  }
  return pages;
}

/** Gives pages back to the host, neighbours at once. */
function releasePages(memory: GuestMemory, pages: Uint32Array): void {
  pages.sort();
  for (let first = 0; first < pages.length;) {
    let next = first + 1;
    while (next < pages.length && pages[next]! <= pages[next - 1]! + 1) next++;
    const offset = pages[first]! * PAGE;
    memory.discard(offset, (pages[next - 1]! + 1) * PAGE - offset);
    first = next;
  }
}

/** Gives the whole pages of ranges back to the host. */
function releaseRanges(memory: GuestMemory, chain: DescriptorChain): void {
  if (chain.readable.length > 0) throw new VirtqueueError("a report of free pages has a part to read");
  for (const { offset, length } of chain.writable) {
    const first = Math.ceil(offset / PAGE) * PAGE;
    const end = Math.floor((offset + length) / PAGE) * PAGE;
    if (end > first) memory.discard(first, end - first);
  }
}
