/**
 * Waiting for many descriptors on one thread: exits of vCPUs, notifications of queues, packets.
 *
 * @module
 */

import { setImmediate } from "node:timers";
import { Fd, libc, Mapping } from "../ffi/mod.ts";
import type { Watcher } from "./devices/virtio_device.ts";

/** Size of `struct epoll_event` on x86-64, in bytes. */
const EVENT_SIZE = 12;
const MAX_EVENTS = 256;
/** How long {@linkcode EventLoop.run} serves without a look at anything else that the isolate does, in milliseconds. */
const LONGEST_TURN = 2;

/** Calls back for descriptors that have input. */
export class EventLoop implements Watcher, Disposable {
  readonly #epoll = Fd.epoll();
  readonly #wake = Fd.event();
  readonly #memory = new Mapping(4096);
  readonly #view = new DataView(this.#memory.buffer);
  readonly #watched = new Map<number, () => void>();
  #isWaiting = false;
  #isExpecting = false;

  /** Watches nothing yet. */
  constructor() {
    this.watch(this.#wake, () => void this.#wake.drain());
  }

  /**
   * Calls back whenever a descriptor has input.
   *
   * @param fd What to watch
   * @param onInput Takes the input; must not throw
   */
  watch(fd: Fd, onInput: () => void): void {
    this.#epoll.watch(fd);
    this.#watched.set(fd.number, onInput);
  }

  /**
   * Watches something no more; do so before it is closed.
   *
   * @param fd What was watched
   */
  unwatch(fd: Fd): void {
    if (this.#watched.delete(fd.number)) this.#epoll.unwatch(fd);
  }

  /**
   * Waits on this thread, and calls back.
   *
   * @param timeout Milliseconds; 0 only looks
   * @returns How many descriptors had input
   */
  poll(timeout: number): number {
    return this.#dispatch(this.#epoll.poll(this.#memory.pointer, timeout, MAX_EVENTS));
  }

  /**
   * Waits without holding up this thread, unless something is there already: a thread of the pool costs more than a look.
   *
   * @returns How many descriptors had input; one after {@linkcode EventLoop.wake}
   */
  async wait(): Promise<number> {
    const found = this.poll(0);
    if (found > 0) return found;
    if (this.#isWaiting) throw new Error("Cannot wait twice at once");
    this.#isWaiting = true;
    try {
      return this.#dispatch(
        await libc().epoll_wait_async(this.#epoll.number, this.#memory.pointer, MAX_EVENTS, -1),
      );
    } finally {
      this.#isWaiting = false;
    }
  }

  /**
   * Says that what was just served is likely to be followed by the like at once, as exits of a vCPU are.
   * {@linkcode EventLoop.run} then waits for it on this thread: to wake it from there takes a third of what it takes
   * through the pool.
   */
  expectMore(): void {
    this.#isExpecting = true;
  }

  /**
   * Serves until told to end.
   *
   * @param isDone Asked between turns
   */
  async run(isDone: () => boolean): Promise<void> {
    while (!isDone()) {
      const end = performance.now() + LONGEST_TURN;
      let found = await this.wait();
      while (found > 0 && !isDone() && performance.now() < end) {
        const timeout = this.#isExpecting ? 1 : 0;
        this.#isExpecting = false;
        found = this.poll(timeout);
      }
      // A busy guest must not keep timers and sockets of the isolate from their turn.
      if (found > 0) await new Promise<void>((resolve) => setImmediate(resolve));
    }
  }

  /** Ends a wait. */
  wake(): void {
    this.#wake.signal();
  }

  /** Gives everything back. No wait may be under way. */
  [Symbol.dispose](): void {
    if (this.#isWaiting) throw new Error("Cannot end a loop that waits: wake it first");
    this.#memory[Symbol.dispose]();
    this.#wake[Symbol.dispose]();
    this.#epoll[Symbol.dispose]();
  }

  #dispatch(count: number): number {
    // Copied first: a callback may look once more and so overwrite the events.
    const ready: number[] = [];
    for (let index = 0; index < count; index++) {
      ready.push(this.#view.getUint32(index * EVENT_SIZE + 4, true));
    }
    for (const number of ready) this.#watched.get(number)?.();
    return ready.length;
  }
}
