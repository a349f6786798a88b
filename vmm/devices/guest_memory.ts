/**
 * Memory of a guest, which sees it below and above the hole under 4 GiB.
 *
 * @module
 */

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
  /** Offset in the views. */
  readonly offset: number;
  /** Size in bytes. */
  readonly length: number;
}

/**
 * Memory of a guest. All views alias it: what is read can change at any time, so read each value once. Take a view anew
 * after each wait, as it may have moved.
 */
export abstract class GuestMemory implements Disposable {
  /** Size in bytes. */
  readonly length: number;
  /** Its parts, by address. */
  readonly regions: readonly GuestMemoryRegion[];
  /** All bytes, by offset. */
  abstract readonly bytes: Uint8Array<ArrayBuffer>;
  /** All bytes, by offset. */
  abstract readonly view: DataView<ArrayBuffer>;
  /** All 16-bit words, by offset divided by 2. */
  abstract readonly words: Uint16Array<ArrayBuffer>;
  /** Where its first byte is in this process, for system calls. */
  abstract readonly address: number;
  readonly #low: number;
  readonly #high: number;

  /**
   * Lays it out around the hole under 4 GiB.
   *
   * @param length Size in bytes, a multiple of 4096
   */
  constructor(length: number) {
    this.length = length;
    this.#low = Math.min(length, MEMORY_HOLE_START);
    this.#high = length - this.#low;
    this.regions = [
      { address: 0, offset: 0, length: this.#low },
      ...(this.#high > 0 ? [{ address: MEMORY_HOLE_END, offset: this.#low, length: this.#high }] : []),
    ];
  }

  /**
   * Is told of what a device wrote to a buffer of the guest, where that must be known.
   *
   * @param offset Where
   * @param length How many bytes
   */
  noteWrite?(offset: number, length: number): void;

  /**
   * Gives whole pages back to the host: they read as zeroes afterwards.
   *
   * @param offset Where
   * @param length How many bytes
   */
  abstract discard(offset: number, length: number): void;

  /** Gives it back. No machine may use it any more. */
  abstract [Symbol.dispose](): void;

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
   * Gives a range, to read or write until the next wait.
   *
   * @param address Address in the guest
   * @param length How many bytes
   * @returns The bytes
   * @throws {GuestMemoryError} If not all of it is memory
   */
  range(address: number, length: number): Uint8Array<ArrayBuffer> {
    const start = this.offset(address, length);
    return this.bytes.subarray(start, start + length);
  }
}
