/**
 * The network device (virtio 1.2, section 5.1) where frames go to and come from code of ours, such as a network in user
 * space. It leaves nothing of a frame to the other side, neither checksums nor segmentation.
 *
 * @module
 */

import { type InterfaceCounters, NET_HEADER_SIZE } from "../../ffi/mod.ts";
import { MAX_FRAME } from "../net/switch.ts";
import {
  ETHERNET_HEADER_SIZE,
  type Limiter,
  NET_FEATURE,
  NET_QUEUE,
  netConfiguration,
  popOrWait,
  roomOf,
} from "./net.ts";
import { copySegments, fillSegments, sliceSegments } from "./segments.ts";
import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice } from "./virtio_device.ts";
import { totalLength, type Virtqueue } from "./virtqueue.ts";

/** Most frames that wait for buffers of the guest. */
const MAX_WAITING = 256;
/** Frames of one turn: other devices want theirs too. */
const BATCH = 64;
/** Offsets in the header of a frame, and a flag (virtio 1.2, section 5.1.6). */
const HEADER = { flags: 0, gsoType: 1, numBuffers: 10 } as const;
const F_NEEDS_CSUM = 1;
/** Before each frame to the guest: it is whole, and takes one buffer. */
const RECEIVE_HEADER = new Uint8Array(NET_HEADER_SIZE);
RECEIVE_HEADER[HEADER.numBuffers] = 1;

/** The other end of the cable. */
export interface FrameBackend {
  /**
   * Takes a frame from the guest. It is lent until this returns.
   *
   * @param frame The frame, without checksum
   * @returns Whether it was taken; otherwise it is lost
   */
  send(frame: Uint8Array): boolean;
  /** Called with each frame for the guest, which is lent until it returns; the device sets it. */
  onFrame: (frame: Uint8Array) => void;
}

/** How a {@linkcode FrameNetDevice} is made. */
export interface FrameNetDeviceOptions {
  /** Where frames go, which stays the caller's. */
  readonly backend: FrameBackend;
  /** Ethernet address of the guest's NIC, such as `02:00:00:00:00:01`. */
  readonly mac: string;
  /** Largest frame without its Ethernet header, for the guest to know; 1500 for the guest if not told. */
  readonly mtu?: number;
  /** Limits what the guest receives. */
  readonly receiveLimiter?: Limiter;
  /** Limits what the guest sends. */
  readonly transmitLimiter?: Limiter;
}

/** A network device on a cable of frames. */
export class FrameNetDevice implements VirtioDevice {
  /** See {@linkcode VirtioDevice.type}. */
  readonly type: number = VIRTIO_DEVICE.net;
  /** See {@linkcode VirtioDevice.features}. */
  readonly features: bigint;
  /** See {@linkcode VirtioDevice.queueSizes}. */
  readonly queueSizes: readonly number[] = [256, 256];
  /** Ethernet address, state of the link, MTU. */
  readonly config: Uint8Array<ArrayBuffer>;
  readonly #backend: FrameBackend;
  readonly #limiters: { receive?: Limiter; transmit?: Limiter };
  readonly #counters = { rxPackets: 0, rxBytes: 0, rxDropped: 0, txPackets: 0, txBytes: 0, txDropped: 0 };
  #context: DeviceContext | undefined;
  /** Copies of frames that the guest had no buffer for yet. */
  #waiting: Uint8Array[] = [];
  #receiveTimer: ReturnType<typeof setTimeout> | undefined;
  #transmitTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a device whose link is up.
   *
   * @param options What it is made of
   */
  constructor(options: FrameNetDeviceOptions) {
    this.#backend = options.backend;
    this.#limiters = {
      ...(options.receiveLimiter ? { receive: options.receiveLimiter } : {}),
      ...(options.transmitLimiter ? { transmit: options.transmitLimiter } : {}),
    };
    this.features = NET_FEATURE.MAC | NET_FEATURE.STATUS |
      (options.mtu === undefined ? 0n : NET_FEATURE.MTU);
    this.config = netConfiguration(options);
    this.#backend.onFrame = (frame) => this.#onFrame(frame);
  }

  /** What was received and sent so far, as the guest sees it; bytes without headers of virtio. */
  get counters(): InterfaceCounters {
    return { ...this.#counters };
  }

  /**
   * Changes limits, which hold from the next frame on.
   *
   * @param limiters The limits that change
   */
  updateLimiters(limiters: { readonly receive?: Limiter; readonly transmit?: Limiter }): void {
    Object.assign(this.#limiters, limiters);
  }

  /**
   * See {@linkcode VirtioDevice.activate}.
   *
   * @param context What to work with
   */
  activate(context: DeviceContext): void {
    this.#context = context;
    for (const queue of context.queues) if (queue.isReady) this.notify(queue);
  }

  /**
   * See {@linkcode VirtioDevice.notify}.
   *
   * @param queue The queue
   */
  notify(queue: Virtqueue): void {
    if (queue.index === NET_QUEUE.receive) this.#receiveAll();
    else this.#transmitAll();
  }

  /** See {@linkcode VirtioDevice.reset}. */
  reset(): void {
    this.#context = undefined;
    clearTimeout(this.#receiveTimer);
    clearTimeout(this.#transmitTimer);
    this.#receiveTimer = this.#transmitTimer = undefined;
    this.#waiting = [];
  }

  /** Ends it and leaves the backend. */
  [Symbol.dispose](): void {
    this.reset();
    this.#backend.onFrame = () => {};
  }

  /** Sends what the guest offers, up to a batch. */
  #transmitAll(): void {
    const context = this.#context;
    const queue = context?.queues[NET_QUEUE.transmit];
    if (!context || !queue?.isReady || this.#transmitTimer !== undefined) return;
    let count = 0;
    let wait: number | undefined;
    try {
      queue.setNotification(false);
      for (;; count++) {
        const chain = popOrWait(queue);
        if (!chain) break;
        const length = totalLength(chain.readable);
        wait = count === BATCH ? 0 : this.#limiters.transmit?.consume(length) || undefined;
        if (wait !== undefined) {
          queue.unpop();
          break;
        }
        // Only what has a bounded size is copied.
        const isSent = isPossible(length - NET_HEADER_SIZE) &&
          this.#transmit(copySegments(context.memory.bytes, chain.readable));
        if (isSent) {
          this.#counters.txPackets++;
          this.#counters.txBytes += length - NET_HEADER_SIZE;
        } else this.#counters.txDropped++;
        queue.push(chain.head, 0);
      }
      if (count > 0) context.interrupt(queue);
    } catch (error) {
      return this.#fail(context, error);
    }
    if (wait === undefined) return;
    this.#transmitTimer = setTimeout(() => {
      this.#transmitTimer = undefined;
      this.#transmitAll();
    }, wait);
  }

  /** Sends what is a whole frame behind its header: nobody would finish one that is left to the device. */
  #transmit(packet: DataView<ArrayBuffer>): boolean {
    return (packet.getUint8(HEADER.flags) & F_NEEDS_CSUM) === 0 && packet.getUint8(HEADER.gsoType) === 0 &&
      this.#backend.send(new Uint8Array(packet.buffer, NET_HEADER_SIZE));
  }

  #onFrame(frame: Uint8Array): void {
    if (!this.#context || !isPossible(frame.length) || this.#waiting.length === MAX_WAITING) {
      this.#counters.rxDropped++;
      return;
    }
    this.#waiting.push(frame);
    this.#receiveAll();
    // It is lent: what waits is a copy.
    if (this.#waiting.at(-1) === frame) this.#waiting[this.#waiting.length - 1] = frame.slice();
  }

  /** Gives the guest what waits, as far as it has buffers. */
  #receiveAll(): void {
    const context = this.#context;
    const queue = context?.queues[NET_QUEUE.receive];
    if (!context || !queue?.isReady || this.#receiveTimer !== undefined) return;
    const before = this.#counters.rxPackets;
    try {
      queue.setNotification(false);
      let count = 0;
      while (count < this.#waiting.length && this.#receive(context, queue, this.#waiting[count]!)) count++;
      this.#waiting.splice(0, count);
      if (this.#counters.rxPackets !== before) context.interrupt(queue);
    } catch (error) {
      this.#fail(context, error);
    }
  }

  /** Gives the guest a frame, or drops one that its buffer cannot take; tells whether it is done with it. */
  #receive(context: DeviceContext, queue: Virtqueue, frame: Uint8Array): boolean {
    const chain = popOrWait(queue);
    if (!chain) return false;
    const length = NET_HEADER_SIZE + frame.length;
    if (roomOf(queue, chain) < length) {
      queue.unpop();
      this.#counters.rxDropped++;
      return true;
    }
    const wait = this.#limiters.receive?.consume(length) ?? 0;
    if (wait > 0) {
      queue.unpop();
      this.#receiveTimer = setTimeout(() => {
        this.#receiveTimer = undefined;
        this.#receiveAll();
      }, wait);
      return false;
    }
    const { bytes } = context.memory;
    fillSegments(bytes, chain.writable, RECEIVE_HEADER);
    fillSegments(bytes, sliceSegments(chain.writable, NET_HEADER_SIZE), frame);
    queue.push(chain.head, length);
    this.#counters.rxPackets++;
    this.#counters.rxBytes += frame.length;
    return true;
  }

  #fail(context: DeviceContext, error: unknown): void {
    this.reset();
    context.fail(error);
  }
}

/** Whether a frame can be so long. */
function isPossible(length: number): boolean {
  return length >= ETHERNET_HEADER_SIZE && length <= MAX_FRAME;
}
