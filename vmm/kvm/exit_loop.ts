/**
 * Waiting for the exits of many vCPUs on one thread.
 *
 * @module
 */

import { Fd, libc, Mapping } from "../../ffi/mod.ts";
import type { Vcpu } from "./vm.ts";

/** Size of `struct epoll_event` on x86-64, in bytes. */
const EVENT_SIZE = 12;
const MAX_EVENTS = 256;

/** Tells which vCPUs have exited. */
export class ExitLoop implements Disposable {
  readonly #epoll = Fd.epoll();
  readonly #wake = Fd.event();
  readonly #memory = new Mapping(4096);
  readonly #view = new DataView(this.#memory.buffer);
  readonly #vcpus = new Map<number, Vcpu>();
  #isWaiting = false;

  /** Watches nothing yet. */
  constructor() {
    this.#epoll.watch(this.#wake);
  }

  /**
   * Watches a vCPU.
   *
   * @param vcpu The vCPU
   */
  add(vcpu: Vcpu): void {
    this.#vcpus.set(vcpu.event.number, vcpu);
    this.#epoll.watch(vcpu.event);
  }

  /**
   * Stops watching a vCPU; do so before it is disposed.
   *
   * @param vcpu The vCPU
   */
  remove(vcpu: Vcpu): void {
    this.#vcpus.delete(vcpu.event.number);
    this.#epoll.unwatch(vcpu.event);
  }

  /**
   * Waits on this thread.
   *
   * @param timeout Milliseconds; 0 only looks
   * @returns The vCPUs that have exited and were not taken yet
   */
  poll(timeout: number): Vcpu[] {
    return this.#collect(this.#epoll.poll(this.#memory.pointer, timeout, MAX_EVENTS));
  }

  /**
   * Waits without holding up this thread, unless something is there already: a thread of the pool costs more than a look.
   *
   * @returns The vCPUs that have exited; none after {@linkcode ExitLoop.wake}
   */
  async wait(): Promise<Vcpu[]> {
    const found = this.poll(0);
    if (found.length > 0) return found;
    if (this.#isWaiting) throw new Error("Cannot wait for exits twice at once");
    this.#isWaiting = true;
    try {
      return this.#collect(
        await libc().epoll_wait_async(this.#epoll.number, this.#memory.pointer, MAX_EVENTS, -1),
      );
    } finally {
      this.#isWaiting = false;
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

  #collect(count: number): Vcpu[] {
    const found: Vcpu[] = [];
    for (let index = 0; index < count; index++) {
      const number = this.#view.getUint32(index * EVENT_SIZE + 4, true);
      const vcpu = this.#vcpus.get(number);
      if (vcpu) found.push(vcpu);
      else this.#wake.drain();
    }
    return found;
  }
}
