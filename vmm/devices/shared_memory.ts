/**
 * Memory of a guest that is a file in memory, for KVM and for whoever else maps it.
 *
 * @module
 */

import { Fd, libc, Mapping } from "../../ffi/mod.ts";
import { GuestMemory } from "./guest_memory.ts";

/** `FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE` (Linux 6.1 `include/uapi/linux/falloc.h`). */
const PUNCH_HOLE = 3;

/** Memory of a guest in a file. Pages take room in the host when they are touched. */
export class SharedMemory extends GuestMemory {
  /** The file, shared with whoever maps it too, such as vhost. */
  readonly fd: Fd;
  /** Where it is in this process, without the hole. */
  readonly mapping: Mapping;
  /** See {@linkcode GuestMemory.bytes}. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** See {@linkcode GuestMemory.view}. */
  readonly view: DataView<ArrayBuffer>;
  /** See {@linkcode GuestMemory.words}. */
  readonly words: Uint16Array<ArrayBuffer>;
  /** See {@linkcode GuestMemory.address}. */
  readonly address: number;

  /**
   * Makes zeroed memory.
   *
   * @param length Size in bytes, a multiple of 4096
   */
  constructor(length: number) {
    super(length);
    this.fd = Fd.memory("guest-memory", length);
    try {
      this.mapping = new Mapping(length, { fd: this.fd });
    } catch (error) {
      this.fd[Symbol.dispose]();
      throw error;
    }
    this.address = Number(this.mapping.address);
    this.bytes = new Uint8Array(this.mapping.buffer);
    this.view = new DataView(this.mapping.buffer);
    this.words = new Uint16Array(this.mapping.buffer);
  }

  /**
   * See {@linkcode GuestMemory.discard}.
   *
   * @param offset Where
   * @param length How many bytes
   */
  discard(offset: number, length: number): void {
    const { number } = this.fd;
    if (libc().fallocate(number, PUNCH_HOLE, BigInt(offset), BigInt(length)) !== 0) {
      this.bytes.fill(0, offset, offset + length);
    }
  }

  /** Gives it back. */
  [Symbol.dispose](): void {
    this.mapping[Symbol.dispose]();
    this.fd[Symbol.dispose]();
  }
}
