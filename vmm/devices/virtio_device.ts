/**
 * What a virtio device is to its transport, and the other way round (virtio 1.2, chapter 2).
 *
 * @module
 */

import type { Fd } from "../../ffi/mod.ts";
import type { GuestMemory } from "./guest_memory.ts";
import type { Virtqueue } from "./virtqueue.ts";

/** Numbers of device types (virtio 1.2, chapter 5). */
export const VIRTIO_DEVICE = {
  net: 1,
  block: 2,
  console: 3,
  entropy: 4,
  balloon: 5,
  vsock: 19,
} as const;

/** Watches descriptors for input, beside everything else that the isolate does. */
export interface Watcher {
  /**
   * Calls back whenever a descriptor has input. The callback takes the input; it must not block.
   *
   * @param fd What to watch
   * @param onInput Called as long as there is input
   */
  watch(fd: Fd, onInput: () => void): void;
  /**
   * Watches something no more.
   *
   * @param fd What was watched
   */
  unwatch(fd: Fd): void;
}

/** What an active device works with. */
export interface DeviceContext {
  /** Memory of the guest. */
  readonly memory: GuestMemory;
  /** Negotiated features. */
  readonly features: bigint;
  /** All queues of the device; those that the driver did not enable are not ready. */
  readonly queues: readonly Virtqueue[];
  /**
   * Interrupts the guest for buffers that were given back, unless it does not want that.
   *
   * @param queue The queue
   */
  interrupt(queue: Virtqueue): void;
  /** Tells the guest that the device's configuration has changed. */
  configChanged(): void;
  /**
   * Gives up after the guest broke the rules: it must reset the device.
   *
   * @param error What it did
   */
  fail(error: unknown): void;
  /**
   * The eventfd that the guest's notification of a queue signals, for those who serve the queue elsewhere. Take it once:
   * from then on the device's {@linkcode VirtioDevice.notify} is not called for it.
   *
   * @param queue The queue
   */
  takeNotifyEvent(queue: Virtqueue): Fd;
  /**
   * The eventfd that interrupts the guest for a queue, for those who serve the queue elsewhere.
   *
   * @param queue The queue
   * @returns Undefined where the driver wants no interrupt
   */
  interruptEvent(queue: Virtqueue): Fd | undefined;
}

/** A virtio device, without its transport. */
export interface VirtioDevice extends Disposable {
  /** Its type, of {@linkcode VIRTIO_DEVICE}. */
  readonly type: number;
  /** Features that it offers, without those of rings and transport. */
  readonly features: bigint;
  /** Largest size of each queue. */
  readonly queueSizes: readonly number[];
  /** Its configuration as the guest reads it; the device changes it in place and then says so. */
  readonly config: Uint8Array<ArrayBuffer>;
  /**
   * Takes what the guest writes to the configuration; without it, writes are ignored.
   *
   * @param offset Where in {@linkcode VirtioDevice.config}; the bytes are all inside
   * @param bytes What was written
   */
  writeConfig?(offset: number, bytes: Uint8Array): void;
  /**
   * Begins to work: the driver is ready.
   *
   * @param context What to work with, until the reset
   */
  activate(context: DeviceContext): void;
  /**
   * Looks at a queue: the guest has made buffers available. Never called before `activate` or after `reset`.
   *
   * @param queue The queue
   */
  notify(queue: Virtqueue): void;
  /** Forgets the guest. No queue may be touched afterwards, also not by work that is under way. */
  reset(): void;
  /**
   * Saves what the guest has made of it beyond what its queues and configuration hold, as JSON; nothing unless told. Nothing
   * is under way.
   */
  save?(): unknown;
  /**
   * Takes back what was saved, after it was activated again.
   *
   * @param state What {@linkcode VirtioDevice.save} gave
   */
  restore?(state: unknown): void;
  /** Whether work is under way that must end before the guest's memory is a consistent whole. */
  readonly isBusy?: boolean;
}
