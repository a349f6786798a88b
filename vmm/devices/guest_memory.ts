/**
 * Memory of a guest: one file in memory, seen by the guest below and above the hole under 4 GiB.
 *
 * @module
 */

import { Fd, Mapping } from "../../ffi/mod.ts";

/** Where the hole for devices begins: 3 GiB. */
export const MEMORY_HOLE_START = 0xc000_0000;
/** Where memory goes on after the hole: 4 GiB. */
export const MEMORY_HOLE_END = 0x1_0000_0000;

/** The guest named memory that it does not have. */
export class GuestMemoryError extends Error {
  /**
   * Explains an access.
   *
   * @param address Address that the guest gave
   * @param length How many bytes from there
   */
  constructor(address: number, length: number) {
    super(`Cannot use ${length} bytes at guest address 0x${address.toString(16)} as they are not all memory`);
    this.name = "GuestMemoryError";
  }
}

/** A part of memory that is in one piece for guest and host. */
export interface GuestMemoryRegion {
  /** Where the guest sees it. */
  readonly address: number;
  /** Offset in {@linkcode GuestMemory.mapping}. */
  readonly offset: number;
  /** Size in bytes. */
  readonly length: number;
}

/** Memory of a guest. All views alias it: what is read can change at any time, so read each value once. */
export class GuestMemory implements Disposable {
  /** The file, shared with whoever maps it too, such as vhost. */
  readonly fd: Fd;
  /** Where it is in this process, without the hole. */
  readonly mapping: Mapping;
  /** Its parts, by address. */
  readonly regions: readonly GuestMemoryRegion[];
  /** All bytes, by offset. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** All bytes, by offset. */
  readonly view: DataView<ArrayBuffer>;
  /** All 16-bit words, by offset divided by 2. */
  readonly words: Uint16Array<ArrayBuffer>;
  readonly #low: number;
  readonly #high: number;

  /**
   * Makes zeroed memory. Pages take room in the host when they are touched.
   *
   * @param length Size in bytes, a multiple of 4096
   */
  constructor(length: number) {
    this.fd = Fd.memory("guest-memory", length);
    try {
      this.mapping = new Mapping(length, { fd: this.fd });
    } catch (error) {
      this.fd[Symbol.dispose]();
      throw error;
    }
    this.#low = Math.min(length, MEMORY_HOLE_START);
    this.#high = length - this.#low;
    this.regions = [
      { address: 0, offset: 0, length: this.#low },
      ...(this.#high > 0 ? [{ address: MEMORY_HOLE_END, offset: this.#low, length: this.#high }] : []),
    ];
    this.bytes = new Uint8Array(this.mapping.buffer);
    this.view = new DataView(this.mapping.buffer);
    this.words = new Uint16Array(this.mapping.buffer);
  }

  /** Size in bytes. */
  get length(): number {
    return this.#low + this.#high;
  }

  /**
   * Finds where a range is in the views.
   *
   * @param address Address that the guest gave
   * @param length How many bytes, at least 0
   * @returns Offset of the first byte
   * @throws {GuestMemoryError} If not all of it is memory
   */
  offset(address: number, length: number): number {
    if (address >= 0 && length >= 0) {
      if (address + length <= this.#low) return address;
      if (address >= MEMORY_HOLE_END && address + length <= MEMORY_HOLE_END + this.#high) {
        return address - MEMORY_HOLE_END + this.#low;
      }
    }
    throw new GuestMemoryError(address, length);
  }

  /**
   * Finds where an offset is in this process, for system calls.
   *
   * @param offset Offset in the views
   * @returns The address
   */
  hostAddress(offset: number): bigint {
    return this.mapping.address + BigInt(offset);
  }

  /** Gives it back. No machine may use it any more. */
  [Symbol.dispose](): void {
    this.mapping[Symbol.dispose]();
    this.fd[Symbol.dispose]();
  }
}
