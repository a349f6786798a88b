/**
 * The entropy device (virtio 1.2, section 5.4).
 *
 * @module
 */

import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice } from "./virtio_device.ts";
import { totalLength, type Virtqueue, VirtqueueError } from "./virtqueue.ts";

/** Most bytes that one request gets: `crypto.getRandomValues` gives no more at once. */
const MAX_REQUEST = 65_536;
/** Most requests that are served before everything else has its turn. */
const MAX_TURN = 16;

/** What an {@linkcode EntropyDevice} can be given. */
export interface EntropyOptions {
  /** Says how long to wait, in milliseconds, before as many bytes may go; 0 allows them, and counts them. */
  readonly rateLimiter?: { consume(bytes: number): number };
}

/** Gives the guest random bytes. */
export class EntropyDevice implements VirtioDevice {
  /** See {@linkcode VirtioDevice.type}. */
  readonly type: number = VIRTIO_DEVICE.entropy;
  /** See {@linkcode VirtioDevice.features}. */
  readonly features = 0n;
  /** See {@linkcode VirtioDevice.queueSizes}. */
  readonly queueSizes: readonly number[] = [64];
  /** See {@linkcode VirtioDevice.config}. */
  readonly config: Uint8Array<ArrayBuffer> = new Uint8Array(0);
  readonly #rateLimiter: EntropyOptions["rateLimiter"];
  #context: DeviceContext | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a device.
   *
   * @param options How fast it may be
   */
  constructor(options: EntropyOptions = {}) {
    this.#rateLimiter = options.rateLimiter;
  }

  /**
   * See {@linkcode VirtioDevice.activate}.
   *
   * @param context What to work with
   */
  activate(context: DeviceContext): void {
    this.#context = context;
  }

  /**
   * See {@linkcode VirtioDevice.notify}.
   *
   * @param queue The queue
   */
  notify(queue: Virtqueue): void {
    const context = this.#context;
    if (!context || this.#timer !== undefined) return;
    try {
      const wait = this.#serve(context, queue);
      if (wait !== undefined) {
        this.#timer = setTimeout(() => {
          this.#timer = undefined;
          this.notify(queue);
        }, wait);
      }
    } catch (error) {
      this.#context = undefined;
      context.fail(error);
    }
  }

  /** See {@linkcode VirtioDevice.reset}. */
  reset(): void {
    this.#context = undefined;
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  /** Ends it. */
  [Symbol.dispose](): void {
    this.reset();
  }

  /** Serves requests; gives the milliseconds to wait before there may be more, or undefined where there are none. */
  #serve(context: DeviceContext, queue: Virtqueue): number | undefined {
    let count = 0;
    let wait: number | undefined;
    while (wait === undefined) {
      const chain = queue.pop();
      if (!chain) {
        queue.setNotification(true);
        if (queue.hasPending) continue;
        break;
      }
      if (chain.readable.length > 0) throw new VirtqueueError("an entropy request has a part to read");
      const length = Math.min(totalLength(chain.writable), MAX_REQUEST);
      const due = this.#rateLimiter?.consume(length) ?? 0;
      if (due > 0) {
        queue.unpop();
        wait = due;
        break;
      }
      let left = length;
      for (const segment of chain.writable) {
        const end = Math.min(segment.length, left);
        crypto.getRandomValues(context.memory.bytes.subarray(segment.offset, segment.offset + end));
        left -= end;
      }
      queue.push(chain.head, length);
      if (++count === MAX_TURN) wait = 0;
    }
    if (count > 0) context.interrupt(queue);
    return wait;
  }
}
