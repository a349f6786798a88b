/**
 * qcow2 images as virtual disks (QEMU 7.2 `docs/interop/qcow2.txt`, versions 2 and 3), also as copy-on-write children of
 * other images.
 *
 * Tables are kept in memory and written by a flush, in an order that a crash at any time leaves at worst clusters that
 * nobody uses: data and reference counts first, then, once these are on storage, the tables that lead to the data. What is
 * replaced is given back only after that.
 *
 * @module
 */

import { dirname, resolve } from "node:path";
import { Mapping } from "../../ffi/mod.ts";
import {
  Activity,
  type BlockFile,
  fillZeroes,
  type HostMemory,
  hostMemory,
  RawFile,
  SECTOR_SIZE,
  sliceSegments,
  zeroSource,
} from "./block_file.ts";
import type { GuestMemory } from "./guest_memory.ts";
import { type Segment, totalLength } from "./virtqueue.ts";

const MAGIC = 0x514649fb;
const MIN_HEADER = 72;
const HEADER_LENGTH = 104;
/** What of a file is read for its header at most; names of backing files are near its beginning. */
const MAX_HEADER = 65536;
const MIN_CLUSTER_BITS = 9;
const MAX_CLUSTER_BITS = 21;
/** Most bytes of the first level, and of the table of reference counts, as in QEMU. */
const MAX_L1_BYTES = 32 * 2 ** 20;
const MAX_REFCOUNT_TABLE_BYTES = 8 * 2 ** 20;
const MAX_BACKING_NAME = 1023;
const MAX_BACKING_DEPTH = 8;

const INCOMPATIBLE_DIRTY = 1;
const INCOMPATIBLE_CORRUPT = 2;
const INCOMPATIBLE_EXTERNAL_DATA = 4;
const INCOMPATIBLE_COMPRESSION = 8;
const INCOMPATIBLE_EXTENDED_L2 = 16;
const EXTENSION_END = 0;
const EXTENSION_BACKING_FORMAT = 0xe2792aca;

/** High halves of table entries. */
const ENTRY_COPIED = 0x8000_0000;
const ENTRY_COMPRESSED = 0x4000_0000;
const ENTRY_OFFSET_HIGH = 0x00ff_ffff;
/** Low halves of table entries. */
const ENTRY_ZERO = 1;
const ENTRY_OFFSET_LOW = 0xffff_fe00;
const TWO_32 = 0x1_0000_0000;

/** What a header says, checked. */
export interface Qcow2Header {
  /** 2 or 3. */
  readonly version: number;
  /** Size of a cluster as a power of two. */
  readonly clusterBits: number;
  /** Size of the disk in bytes. */
  readonly size: number;
  /** Entries of the first level. */
  readonly l1Entries: number;
  /** Where the first level is in the file. */
  readonly l1Offset: number;
  /** Where the table of reference counts is in the file. */
  readonly refcountTableOffset: number;
  /** Its size in clusters. */
  readonly refcountTableClusters: number;
  /** Bits of a reference count as a power of two. */
  readonly refcountOrder: number;
  /** How many snapshots are inside. */
  readonly snapshots: number;
  /** Whether reference counts may be wrong. */
  readonly isDirty: boolean;
  /** Whether QEMU has found the image corrupt. */
  readonly isCorrupt: boolean;
  /** Whether there are features that a writer must clear if it does not know them. */
  readonly hasAutoclearFeatures: boolean;
  /** The image that is read where this one holds nothing, as the header names it. */
  readonly backingPath?: string;
  /** Its format, as the header names it. */
  readonly backingFormat?: string;
}

/**
 * Reads a header.
 *
 * @param bytes The beginning of the file, 64 KiB where it has as much
 * @returns What it says
 * @throws {Error} If it is none, cannot be, or wants what is not supported; the message is the reason only
 */
export function parseQcow2Header(bytes: Uint8Array<ArrayBuffer>): Qcow2Header {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const refuse = (reason: string): never => {
    throw new Error(reason);
  };
  const offset64 = (at: number, name: string): number => {
    const value = view.getUint32(at) * TWO_32 + view.getUint32(at + 4);
    return value <= Number.MAX_SAFE_INTEGER ? value : refuse(`${name} is impossibly large`);
  };
  if (bytes.length < MIN_HEADER || view.getUint32(0) !== MAGIC) refuse("it is no qcow2 image");
  const version = view.getUint32(4);
  if (version !== 2 && version !== 3) refuse(`version ${version} is not supported: use version 3`);
  if (version === 3 && bytes.length < HEADER_LENGTH) refuse("its header is cut off");
  const clusterBits = view.getUint32(20);
  if (clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    refuse(`clusters of 2^${clusterBits} bytes are impossible`);
  }
  const clusterSize = 2 ** clusterBits;
  if (view.getUint32(32) !== 0) refuse("encryption is not supported: convert it with qemu-img");

  const incompatible = version === 3 ? view.getUint32(76) : 0;
  if ((incompatible & INCOMPATIBLE_EXTERNAL_DATA) !== 0) refuse("an external data file is not supported");
  if ((incompatible & INCOMPATIBLE_COMPRESSION) !== 0) refuse("only deflate is supported for compression");
  if ((incompatible & INCOMPATIBLE_EXTENDED_L2) !== 0) refuse("extended L2 entries are not supported");
  if (version === 3 && (incompatible > 31 || view.getUint32(72) !== 0)) refuse("it has unknown features");
  const headerLength = version === 3 ? view.getUint32(100) : MIN_HEADER;
  const end = Math.min(clusterSize, bytes.length);
  if (headerLength < (version === 3 ? HEADER_LENGTH : MIN_HEADER) || headerLength > end) {
    refuse(`a header of ${headerLength} bytes is impossible`);
  }
  const refcountOrder = version === 3 ? view.getUint32(96) : 4;
  if (refcountOrder > 6) refuse(`reference counts of 2^${refcountOrder} bits are impossible`);

  const size = offset64(24, "its size");
  const l1Entries = view.getUint32(36);
  const l1Offset = offset64(40, "the offset of its first level");
  const refcountTableOffset = offset64(48, "the offset of its reference counts");
  const refcountTableClusters = view.getUint32(56);
  if (l1Entries * 8 > MAX_L1_BYTES) refuse(`${l1Entries} entries of the first level are too many`);
  if (l1Entries < Math.ceil(size / (clusterSize * (clusterSize / 8)))) {
    refuse(`${l1Entries} entries of the first level are too few for ${size} bytes`);
  }
  if (refcountTableClusters * clusterSize > MAX_REFCOUNT_TABLE_BYTES) {
    refuse(`${refcountTableClusters} clusters of reference counts are too many`);
  }
  for (const table of [l1Offset, refcountTableOffset]) {
    if (table % clusterSize !== 0) refuse("a table begins inside of a cluster");
  }

  let backing: { backingPath?: string; backingFormat?: string } = {};
  const backingOffset = offset64(8, "the offset of its backing file's name");
  if (backingOffset !== 0) {
    const length = view.getUint32(16);
    if (length === 0 || length > MAX_BACKING_NAME || backingOffset + length > end) {
      refuse("the name of its backing file is out of bounds");
    }
    backing = { backingPath: decode(bytes.subarray(backingOffset, backingOffset + length)) };
    // Extensions are between the header and the name.
    for (let at = headerLength; at + 8 <= backingOffset;) {
      const type = view.getUint32(at);
      const length = view.getUint32(at + 4);
      if (type === EXTENSION_END) break;
      if (length > backingOffset - at - 8) refuse("an extension of its header is out of bounds");
      if (type === EXTENSION_BACKING_FORMAT) {
        backing = { ...backing, backingFormat: decode(bytes.subarray(at + 8, at + 8 + length)) };
      }
      at += 8 + Math.ceil(length / 8) * 8;
    }
  }
  return {
    version,
    clusterBits,
    size: size - size % SECTOR_SIZE,
    l1Entries,
    l1Offset,
    refcountTableOffset,
    refcountTableClusters,
    refcountOrder,
    snapshots: view.getUint32(60),
    isDirty: (incompatible & INCOMPATIBLE_DIRTY) !== 0,
    isCorrupt: (incompatible & INCOMPATIBLE_CORRUPT) !== 0,
    hasAutoclearFeatures: version === 3 && (view.getUint32(88) !== 0 || view.getUint32(92) !== 0),
    ...backing,
  };
}

function decode(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes);
}

/** Lets one after the other. */
class Mutex {
  #last: Promise<unknown> = Promise.resolve();

  run<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#last.then(work);
    this.#last = result.catch(() => {});
    return result;
  }
}

/** Lets everything else have its turn. */
function turn(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 0));
}

/** A part of a table in memory. */
interface Slice {
  /** Where in the file. */
  readonly offset: number;
  /** Where in the cache's memory. */
  readonly at: number;
  isDirty: boolean;
  lastUse: number;
  loading: Promise<void> | undefined;
}

/** Parts of tables in memory, those that were used last. */
class SliceCache implements Disposable {
  readonly memory: HostMemory;
  readonly view: DataView<ArrayBuffer>;
  readonly sliceSize: number;
  readonly #file: RawFile;
  readonly #mapping: Mapping;
  readonly #count: number;
  readonly #slices = new Map<number, Slice>();
  readonly #free: number[] = [];
  #clock = 0;
  #dirtyCount = 0;

  constructor(file: RawFile, sliceSize: number, count: number) {
    this.#file = file;
    this.sliceSize = sliceSize;
    this.#count = count;
    this.#mapping = new Mapping(Math.ceil(sliceSize * count / 4096) * 4096);
    this.memory = hostMemory(this.#mapping);
    this.view = new DataView(this.#mapping.buffer);
    for (let index = count - 1; index >= 0; index--) this.#free.push(index * sliceSize);
  }

  /** Whether it should be written soon: slices to be loaded need room. */
  get isCrowded(): boolean {
    return this.#dirtyCount * 2 >= this.#count;
  }

  get isDirty(): boolean {
    return this.#dirtyCount > 0;
  }

  find(offset: number): Slice | undefined {
    const slice = this.#slices.get(offset);
    if (!slice || slice.loading) return undefined;
    slice.lastUse = ++this.#clock;
    return slice;
  }

  /** Loads a slice, unless it is there; look for it afterwards, as it may have had to make room already. */
  load(offset: number): void | Promise<void> {
    const found = this.#slices.get(offset);
    if (found) return found.loading;
    const at = this.#free.pop() ?? this.#evict();
    if (at === undefined) {
      const loading = [...this.#slices.values()].flatMap(({ loading }) => loading ?? []);
      // Who changes slices writes them before they are crowded.
      if (loading.length === 0) throw new Error("Cannot load a table as all that is in memory has changed");
      return Promise.race(loading);
    }
    const slice: Slice = { offset, at, isDirty: false, lastUse: ++this.#clock, loading: undefined };
    const drop = (error: unknown): never => {
      this.#slices.delete(offset);
      this.#free.push(at);
      throw error;
    };
    this.#slices.set(offset, slice);
    try {
      const pending = this.#file.read(offset, [{ offset: at, length: this.sliceSize }], this.memory);
      slice.loading = pending?.then(() => {
        slice.loading = undefined;
      }, drop);
      return slice.loading;
    } catch (error) {
      drop(error);
    }
  }

  /** Finds a slice, loading it first if need be: for a cache that one at a time uses, so that nobody evicts it. */
  async get(offset: number): Promise<Slice> {
    while (true) {
      const slice = this.find(offset);
      if (slice) return slice;
      await this.load(offset);
    }
  }

  touch(slice: Slice): void {
    if (!slice.isDirty) this.#dirtyCount++;
    slice.isDirty = true;
  }

  writeSync(): void {
    if (this.#dirtyCount === 0) return;
    for (const slice of this.#slices.values()) {
      if (!slice.isDirty) continue;
      this.#file.writeSync(slice.offset, [{ offset: slice.at, length: this.sliceSize }], this.memory);
      slice.isDirty = false;
      this.#dirtyCount--;
    }
  }

  [Symbol.dispose](): void {
    this.#mapping[Symbol.dispose]();
  }

  #evict(): number | undefined {
    let oldest: Slice | undefined;
    for (const slice of this.#slices.values()) {
      if (!slice.isDirty && !slice.loading && !(oldest && oldest.lastUse < slice.lastUse)) oldest = slice;
    }
    if (oldest) this.#slices.delete(oldest.offset);
    return oldest?.at;
  }
}

/** What the guest's bytes are, from the table. */
const UNALLOCATED = 0;
const ZERO = 1;
const DATA = 2;
/** Data that is not this image's alone. */
const SHARED_DATA = 3;
const COMPRESSED = 4;

/** Largest part of a table in memory. */
const MAX_SLICE = 4096;
/** Slices of the second level in memory: with usual clusters they map 8 GiB. */
const L2_SLICES = 256;
const REFCOUNT_SLICES = 64;
/** Bytes that one step allocates at most. */
const MAX_ALLOCATION = 16 * 2 ** 20;
/** Clusters at the end that are in use already: more of them are no accident. */
const MAX_SKIPPED = 65536;
const MAX_FREE_CLUSTERS = 65536;
/** Parts of one request that are under way at most. */
const MAX_PARTS = 16;
/** Steps until everything else has its turn. */
const MAX_STEPS = 256;

/** Memory for what is copied around a write: room for one cluster before it and one behind it. */
interface Copies extends Disposable {
  readonly memory: HostMemory;
}

/** The first level. */
interface L1 extends Disposable {
  readonly memory: HostMemory;
  readonly view: DataView<ArrayBuffer>;
  readonly entries: number;
}

/** How to open a qcow2 image. */
export interface Qcow2FileOptions {
  /** Memory of the guest. */
  readonly memory: HostMemory;
  /** Whether not to write; false unless told. */
  readonly isReadOnly?: boolean;
  /** Whether to go past the page cache; false unless told. */
  readonly isDirect?: boolean;
  /** Whether to lock it, against QEMU too; true unless told. */
  readonly isLocked?: boolean;
  /** Opens the image that is read where this one holds nothing. */
  readonly openBacking: (header: Qcow2Header) => BlockFile | undefined;
}

/** A disk in a qcow2 image. */
export class Qcow2File implements BlockFile {
  /** Whether it cannot be written. */
  readonly isReadOnly: boolean;
  /** Unit of reads and writes in bytes. */
  readonly blockSize: number;
  /** Unit of what can be given back. */
  readonly clusterSize: number;
  readonly #path: string;
  readonly #memory: HostMemory;
  readonly #file: RawFile;
  readonly #backing: BlockFile | undefined;
  readonly #version: number;
  readonly #clusterBits: number;
  readonly #l2Entries: number;
  readonly #l2: SliceCache;
  readonly #refcounts: SliceCache;
  readonly #refcountBits: number;
  readonly #refcountsPerBlock: number;
  readonly #activity: Activity;
  readonly #tables = new Mutex();
  readonly #inflation = new Mutex();
  #size: number;
  #l1: L1;
  #l1Offset: number;
  readonly #changedL1 = new Set<number>();
  #refcountTable: DataView<ArrayBuffer>;
  #refcountTableOffset: number;
  /** First cluster behind all that are in use. */
  #end: number;
  /** Clusters of this image that are free and zero. */
  readonly #free: number[] = [];
  /** Clusters to be given back once the tables that led to them have gone. */
  readonly #released: number[] = [];
  #copies: Copies | undefined;
  #inflated: { readonly high: number; readonly low: number; readonly bytes: Uint8Array } | undefined;
  // What #locate has found.
  #kind = UNALLOCATED;
  #host = 0;
  #run = 0;
  #high = 0;
  #low = 0;
  // What #kindOf has found.
  #hostOffset = 0;

  /**
   * Opens an image.
   *
   * @param path Path of the file
   * @param options How
   * @throws {Error} If it cannot be opened, is no image that can be used, or is in use
   */
  constructor(path: string, options: Qcow2FileOptions) {
    const { isReadOnly = false } = options;
    using undo = new DisposableStack();
    this.#path = path;
    this.#memory = options.memory;
    this.isReadOnly = isReadOnly;
    this.#activity = new Activity(path);
    this.#file = undo.use(new RawFile(path, options));
    try {
      const length = this.#file.length;
      const header = parseQcow2Header(this.#load(0, Math.min(MAX_HEADER, length)));
      const { clusterBits } = header;
      const clusterSize = this.clusterSize = 2 ** clusterBits;
      this.#version = header.version;
      this.#clusterBits = clusterBits;
      this.#l2Entries = clusterSize / 8;
      this.#size = header.size;
      this.#end = Math.ceil(length / clusterSize);
      if (!isReadOnly) this.#assertWritable(header);
      this.#l1Offset = header.l1Offset;
      this.#l1 = undo.use(this.#loadL1(header));
      this.#refcountTableOffset = header.refcountTableOffset;
      const tableBytes = isReadOnly ? 0 : header.refcountTableClusters * clusterSize;
      if (!isReadOnly) {
        this.#assertInside("its table of reference counts", header.refcountTableOffset, tableBytes);
      }
      this.#refcountTable = new DataView(this.#load(header.refcountTableOffset, tableBytes).buffer);
      this.#refcountBits = 2 ** header.refcountOrder;
      this.#refcountsPerBlock = clusterSize * 8 / this.#refcountBits;
      const sliceSize = Math.min(MAX_SLICE, clusterSize);
      this.#l2 = undo.use(new SliceCache(this.#file, sliceSize, L2_SLICES));
      this.#refcounts = undo.use(new SliceCache(this.#file, sliceSize, REFCOUNT_SLICES));
      this.#backing = options.openBacking(header);
      if (this.#backing) undo.use(this.#backing);
      this.blockSize = Math.max(this.#file.blockSize, this.#backing?.blockSize ?? 0);
      if (!isReadOnly && header.hasAutoclearFeatures) this.#file.writeSync(88, ...zeroSource(8));
    } catch (cause) {
      throw new Error(
        `Cannot open the qcow2 image "${path}" as ${cause instanceof Error ? cause.message : cause}`,
        { cause },
      );
    }
    undo.move();
  }

  /** Size of the disk in bytes. */
  get size(): number {
    return this.#size;
  }

  /** Whether something is under way. */
  get isBusy(): boolean {
    return this.#activity.isBusy || this.#file.isBusy || (this.#backing?.isBusy ?? false);
  }

  /** See {@linkcode BlockFile.read}. */
  read(
    offset: number,
    segments: readonly Segment[],
    memory: HostMemory = this.#memory,
  ): void | Promise<void> {
    const length = totalLength(segments);
    this.#assertRange(offset, length);
    if (length > 0) return this.#read(offset, segments, memory);
  }

  /** See {@linkcode BlockFile.write}. */
  write(
    offset: number,
    segments: readonly Segment[],
    memory: HostMemory = this.#memory,
  ): void | Promise<void> {
    const length = totalLength(segments);
    this.#assertRange(offset, length);
    if (length === 0) return;
    if (this.#locate(offset, length) === 0 && this.#run === length && this.#kind === DATA) {
      return this.#file.write(this.#host, segments, memory);
    }
    return this.#activity.run(() =>
      this.#inRuns(offset, length, (at, done, run) => {
        const part = sliceSegments(segments, done, run);
        if (this.#kind === DATA) return this.#file.write(this.#host, part, memory);
        return this.#tables.run(() => this.#writeNew(at, part, memory));
      })
    );
  }

  /** See {@linkcode BlockFile.flush}. */
  flush(): void | Promise<void> {
    this.#activity.assertOpen();
    if (!this.#isDirty) return this.#file.flush();
    return this.#activity.run(() => this.#tables.run(() => this.#flushTables()));
  }

  /** See {@linkcode BlockFile.discard}. Only whole clusters are given back; they read as zeros then. */
  discard(offset: number, length: number): Promise<void> {
    return this.#clear(offset, length, true);
  }

  /** See {@linkcode BlockFile.writeZeroes}. Room of whole clusters is always given back. */
  writeZeroes(offset: number, length: number): Promise<void> {
    return this.#clear(offset, length, false);
  }

  /** See {@linkcode BlockFile.resize}. */
  resize(size: number = this.#size): Promise<void> {
    this.#activity.assertOpen();
    return this.#activity.run(async () => {
      const old = this.#size;
      if (!Number.isSafeInteger(size) || size % SECTOR_SIZE !== 0 || size < old) {
        throw new RangeError(
          `Cannot resize the disk "${this.#path}" from ${old} to ${size} bytes: ` +
            `give a multiple of 512 that is not smaller`,
        );
      }
      if (size === old) return;
      await this.#tables.run(() => this.#growL1(Math.ceil(size / (this.clusterSize * this.#l2Entries))));
      this.#size = size;
      try {
        // What the backing file has behind the old end was never part of this disk.
        const covered = Math.min(size, this.#backing?.size ?? 0);
        if (covered > old) await this.#clear(old, covered - old, false);
        await this.#tables.run(async () => {
          await this.#flushTables();
          const bytes = new Uint8Array(8);
          new DataView(bytes.buffer).setBigUint64(0, BigInt(size));
          this.#writeBytes(24, bytes);
          await this.#file.flush();
        });
      } catch (error) {
        this.#size = old;
        throw error;
      }
    });
  }

  /** See {@linkcode BlockFile.close}. */
  async close(): Promise<void> {
    if (this.#activity.hasEnded) return;
    await new Promise<void>((resolve) => this.#activity.end(resolve));
    try {
      // Once more for the counts of what the first has given back.
      for (let round = 0; round < 2 && this.#isDirty; round++) await this.#flushTables();
      await Promise.all([this.#file.close(), this.#backing?.close()]);
    } finally {
      this.#closeFiles();
    }
  }

  /** Writes the tables and closes the files as soon as nothing is under way. */
  [Symbol.dispose](): void {
    this.#activity.end(() => {
      try {
        if (!this.#isDirty) return;
        this.#writeCounts();
        this.#file.flushSync();
        this.#writeTables();
        this.#file.flushSync();
      } finally {
        this.#closeFiles();
      }
    });
  }

  #closeFiles(): void {
    this.#file[Symbol.dispose]();
    this.#backing?.[Symbol.dispose]();
    this.#l1[Symbol.dispose]();
    this.#l2[Symbol.dispose]();
    this.#refcounts[Symbol.dispose]();
    this.#copies?.[Symbol.dispose]();
  }

  #corrupt(reason: string): Error {
    return new Error(
      `Cannot use the qcow2 image "${this.#path}" as it is corrupt: ${reason}: check it with qemu-img check`,
    );
  }

  #assertRange(offset: number, length: number): void {
    this.#activity.assertOpen();
    if (offset < 0 || offset + length > this.#size) {
      throw new RangeError(`Cannot use ${length} bytes at ${offset} of a disk of ${this.#size} bytes`);
    }
  }

  #assertWritable(header: Qcow2Header): void {
    if (header.isCorrupt) throw new Error("it is marked as corrupt: repair it with qemu-img check -r all");
    if (header.isDirty) throw new Error("it was not closed: repair it with qemu-img check -r all");
    if (header.snapshots > 0) {
      throw new Error(`it has ${header.snapshots} snapshots inside: delete them with qemu-img snapshot -d`);
    }
    if (header.refcountTableClusters === 0) throw new Error("it has no reference counts");
  }

  #assertInside(name: string, offset: number, length: number): void {
    if (offset === 0 || offset + length > this.#end * this.clusterSize) {
      throw new Error(`${name} is outside of the file`);
    }
  }

  /** Reads bytes of the file on this thread. */
  #load(offset: number, length: number): Uint8Array<ArrayBuffer> {
    using mapping = new Mapping(Math.max(1, length));
    const memory = hostMemory(mapping);
    this.#file.readSync(offset, [{ offset: 0, length }], memory);
    return memory.bytes.slice(0, length);
  }

  /** Writes bytes of the file on this thread. */
  #writeBytes(offset: number, bytes: Uint8Array): void {
    using mapping = new Mapping(bytes.length);
    const memory = hostMemory(mapping);
    memory.bytes.set(bytes);
    this.#file.writeSync(offset, [{ offset: 0, length: bytes.length }], memory);
  }

  /** Makes room for a first level, and views of it. */
  #makeL1(entries: number): L1 {
    const mapping = new Mapping(Math.max(1, entries) * 8);
    return {
      memory: hostMemory(mapping),
      view: new DataView(mapping.buffer),
      entries,
      [Symbol.dispose]: () => mapping[Symbol.dispose](),
    };
  }

  /** Reads the first level and checks all of it. */
  #loadL1(header: Qcow2Header): L1 {
    const { l1Entries: entries, l1Offset } = header;
    if (entries > 0) this.#assertInside("its first level", l1Offset, entries * 8);
    const l1 = this.#makeL1(entries);
    try {
      if (entries > 0) this.#file.readSync(l1Offset, [{ offset: 0, length: entries * 8 }], l1.memory);
      for (let at = 0; at < entries * 8; at += 8) {
        const high = l1.view.getUint32(at);
        const offset = (high & ENTRY_OFFSET_HIGH) * TWO_32 +
          ((l1.view.getUint32(at + 4) & ENTRY_OFFSET_LOW) >>> 0);
        if (offset === 0) continue;
        this.#assertInside("a table of its second level", offset, this.clusterSize);
        if (offset % this.clusterSize !== 0) throw new Error("a table begins inside of a cluster");
        if (!this.isReadOnly && (high & ENTRY_COPIED) === 0) {
          throw new Error("it shares tables with a snapshot: repair it with qemu-img check -r all");
        }
      }
    } catch (error) {
      l1[Symbol.dispose]();
      throw error;
    }
    return l1;
  }

  /** Where the table of the second level is in the file; 0 where there is none. */
  #l2Offset(index: number): number {
    const { view } = this.#l1;
    const at = index * 8;
    return (view.getUint32(at) & ENTRY_OFFSET_HIGH) * TWO_32 +
      ((view.getUint32(at + 4) & ENTRY_OFFSET_LOW) >>> 0);
  }

  /**
   * Looks a byte of the disk up. Sets #kind of it, #host as its place in the file, and #run as how many bytes from there
   * are alike and in one piece.
   *
   * @returns 0, or where the part of a table is that must be loaded first
   */
  #locate(offset: number, length: number): number {
    const { clusterSize } = this;
    const cluster = Math.floor(offset / clusterSize);
    const within = offset - cluster * clusterSize;
    const index = Math.floor(cluster / this.#l2Entries);
    const entry = cluster - index * this.#l2Entries;
    const table = this.#l2Offset(index);
    if (table === 0) {
      this.#kind = UNALLOCATED;
      this.#run = Math.min(length, (this.#l2Entries - entry) * clusterSize - within);
      return 0;
    }
    const { sliceSize, view } = this.#l2;
    const inSlice = entry * 8 % sliceSize;
    const slice = this.#l2.find(table + entry * 8 - inSlice);
    if (!slice) return table + entry * 8 - inSlice;
    const end = slice.at + sliceSize;
    let at = slice.at + inSlice;
    const kind = this.#kindOf(view, at);
    const host = this.#hostOffset;
    let run = clusterSize - within;
    if (kind === COMPRESSED) {
      this.#high = view.getUint32(at);
      this.#low = view.getUint32(at + 4);
    } else {
      while (run < length && (at += 8) < end && this.#kindOf(view, at) === kind) {
        if (kind >= DATA && this.#hostOffset !== host + within + run) break;
        run += clusterSize;
      }
    }
    this.#kind = kind;
    this.#host = host + within;
    this.#run = Math.min(run, length);
    return 0;
  }

  /** Reads an entry of the second level. Sets #hostOffset. */
  #kindOf(view: DataView, at: number): number {
    const high = view.getUint32(at);
    const low = view.getUint32(at + 4);
    if ((high & ENTRY_COMPRESSED) !== 0) return COMPRESSED;
    if ((low & ENTRY_ZERO) !== 0 && this.#version >= 3) return ZERO;
    const host = this.#hostOffset = (high & ENTRY_OFFSET_HIGH) * TWO_32 + ((low & ENTRY_OFFSET_LOW) >>> 0);
    if (host === 0) return UNALLOCATED;
    if (host % this.clusterSize !== 0 || host >= this.#end * this.clusterSize) {
      throw this.#corrupt(`a cluster is at ${host}`);
    }
    return (high & ENTRY_COPIED) === 0 ? SHARED_DATA : DATA;
  }

  /** Whether there may be something in the backing file. */
  #isCovered(offset: number): boolean {
    return this.#backing !== undefined && offset < this.#backing.size;
  }

  /** Whether what was located is zero. */
  #isZero(offset: number): boolean {
    return this.#kind === ZERO || this.#kind === UNALLOCATED && !this.#isCovered(offset);
  }

  /** Does something for each run of a range. */
  async #inRuns(
    offset: number,
    length: number,
    work: (at: number, done: number, run: number) => void | Promise<void>,
  ): Promise<void> {
    let parts: Promise<void>[] = [];
    try {
      for (let done = 0, steps = 1; done < length; steps++) {
        const missing = this.#locate(offset + done, length - done);
        if (missing !== 0) {
          await this.#l2.load(missing);
          continue;
        }
        const run = this.#run;
        const part = work(offset + done, done, run);
        if (part) {
          // It is looked at below; until then it must not count as unhandled.
          part.catch(() => {});
          parts.push(part);
        }
        done += run;
        if (parts.length >= MAX_PARTS) {
          await Promise.all(parts);
          parts = [];
        }
        if (steps % MAX_STEPS === 0) await turn();
      }
    } finally {
      await Promise.allSettled(parts);
    }
    await Promise.all(parts);
  }

  #read(offset: number, segments: readonly Segment[], memory: HostMemory): void | Promise<void> {
    const length = totalLength(segments);
    if (this.#locate(offset, length) === 0 && this.#run === length) {
      return this.#readRun(offset, length, segments, memory);
    }
    return this.#activity.run(() =>
      this.#inRuns(offset, length, (at, done, run) => {
        const part = run === length ? segments : sliceSegments(segments, done, run);
        return this.#readRun(at, run, part, memory);
      })
    );
  }

  /** Reads what was located. */
  #readRun(
    offset: number,
    length: number,
    segments: readonly Segment[],
    memory: HostMemory,
  ): void | Promise<void> {
    switch (this.#kind) {
      case ZERO:
        return fillZeroes(memory, segments);
      case COMPRESSED: {
        const [high, low] = [this.#high, this.#low];
        return this.#activity.run(() =>
          this.#inflation.run(() =>
            this.#readCompressed(high, low, offset % this.clusterSize, segments, memory)
          )
        );
      }
      case UNALLOCATED: {
        const covered = Math.min(length, Math.max(0, (this.#backing?.size ?? 0) - offset));
        if (covered < length) fillZeroes(memory, segments, covered);
        if (covered === 0) return;
        return this.#backing!.read(
          offset,
          covered === length ? segments : sliceSegments(segments, 0, covered),
          memory,
        );
      }
      default:
        return this.#file.read(this.#host, segments, memory);
    }
  }

  /** Finds the bytes of a compressed cluster in the file. */
  #compressedRange(high: number, low: number): [offset: number, length: number] {
    // Behind the offset there is the number of further sectors.
    const highBits = 62 - (this.#clusterBits - 8) - 32;
    const offset = (high & (2 ** highBits - 1)) * TWO_32 + low;
    const sectors = ((high & 0x3fff_ffff) >>> highBits) + 1;
    return [offset, sectors * SECTOR_SIZE - offset % SECTOR_SIZE];
  }

  async #readCompressed(
    high: number,
    low: number,
    within: number,
    segments: readonly Segment[],
    memory: HostMemory,
  ): Promise<void> {
    if (this.#inflated?.high !== high || this.#inflated.low !== low) {
      const [offset, length] = this.#compressedRange(high, low);
      if (offset >= this.#end * this.clusterSize) throw this.#corrupt(`a compressed cluster is at ${offset}`);
      using mapping = new Mapping(length);
      const source = hostMemory(mapping);
      await this.#file.read(offset, [{ offset: 0, length }], source);
      // Few images need it, so that the others start faster.
      const { constants, inflateRawSync } = await import("node:zlib");
      let bytes: Uint8Array;
      try {
        bytes = inflateRawSync(source.bytes, {
          maxOutputLength: this.clusterSize,
          finishFlush: constants.Z_SYNC_FLUSH,
        });
      } catch (error) {
        throw this.#corrupt(
          `a compressed cluster cannot be read: ${error instanceof Error ? error.message : error}`,
        );
      }
      if (bytes.length !== this.clusterSize) {
        throw this.#corrupt(`a compressed cluster has ${bytes.length} bytes`);
      }
      this.#inflated = { high, low, bytes };
    }
    let at = within;
    for (const { offset, length } of segments) {
      memory.bytes.set(this.#inflated.bytes.subarray(at, at + length), offset);
      at += length;
    }
  }

  // All from here on happens under the lock of the tables.

  get #isDirty(): boolean {
    return this.#refcounts.isDirty || this.#l2.isDirty || this.#changedL1.size > 0 ||
      this.#released.length > 0;
  }

  #writeCounts(): void {
    this.#file.extend(this.#end * this.clusterSize);
    this.#refcounts.writeSync();
  }

  #writeTables(): void {
    this.#l2.writeSync();
    for (const index of this.#changedL1) {
      this.#file.writeSync(this.#l1Offset + index * 8, [{ offset: index * 8, length: 8 }], this.#l1.memory);
    }
    this.#changedL1.clear();
  }

  async #flushTables(): Promise<void> {
    this.#writeCounts();
    await this.#file.flush();
    this.#writeTables();
    await this.#file.flush();
    await this.#recycle();
  }

  /** Gives back what no table leads to any more. */
  async #recycle(): Promise<void> {
    // A write that is under way may still go there.
    if (this.#file.isBusy) return;
    const freed: number[] = [];
    let steps = 0;
    for (const cluster of this.#released.splice(0)) {
      const old = await this.#changeRefcount(cluster, (count) => Math.max(0, count - 1));
      if (old === 1) freed.push(cluster);
      if (++steps % (16 * MAX_STEPS) === 0) await turn();
    }
    freed.sort((a, b) => a - b);
    for (let start = 0, end = 0; start < freed.length; start = end) {
      while (++end < freed.length && freed[end] === freed[end - 1]! + 1);
      const { clusterSize } = this;
      const isPunched = await this.#file.punch(freed[start]! * clusterSize, (end - start) * clusterSize);
      if (isPunched && this.#free.length < MAX_FREE_CLUSTERS) this.#free.push(...freed.slice(start, end));
    }
  }

  /** Notes that an entry of the second level leads nowhere any more. */
  #release(high: number, low: number): void {
    if ((high & ENTRY_COMPRESSED) !== 0) {
      const [offset, length] = this.#compressedRange(high, low);
      const last = Math.floor((offset + length - 1) / this.clusterSize);
      for (let cluster = Math.floor(offset / this.clusterSize); cluster <= last; cluster++) {
        this.#released.push(cluster);
      }
      return;
    }
    const host = (high & ENTRY_OFFSET_HIGH) * TWO_32 + ((low & ENTRY_OFFSET_LOW) >>> 0);
    if (host !== 0) this.#released.push(Math.floor(host / this.clusterSize));
  }

  /** Writes to what may have no cluster of its own yet. */
  async #writeNew(offset: number, segments: readonly Segment[], memory: HostMemory): Promise<void> {
    const length = totalLength(segments);
    for (let done = 0, steps = 1; done < length; steps++) {
      if (steps % MAX_STEPS === 0) await turn();
      const at = offset + done;
      if (this.#l2.isCrowded) await this.#flushTables();
      await this.#assureL2(at);
      let missing;
      while ((missing = this.#locate(at, length - done)) !== 0) await this.#l2.load(missing);
      let run = this.#run;
      if (this.#kind === DATA) {
        await this.#file.write(this.#host, sliceSegments(segments, done, run), memory);
      } else {
        const within = at % this.clusterSize;
        const isZero = this.#isZero(at - within);
        run = Math.min(run, MAX_ALLOCATION - within);
        const wanted = Math.ceil((within + run) / this.clusterSize);
        const [first, count] = await this.#allocate(wanted);
        run = Math.min(run, count * this.clusterSize - within);
        const host = first * this.clusterSize;
        try {
          const part = sliceSegments(segments, done, run);
          if (isZero) await this.#file.write(host + within, part, memory);
          else await this.#writeAround(host, at, count, part, memory);
        } catch (error) {
          for (let index = 0; index < count; index++) this.#released.push(first + index);
          throw error;
        }
        await this.#link(at, count, host);
      }
      done += run;
    }
  }

  /** Writes to new clusters, and what was there before around it. */
  async #writeAround(
    host: number,
    offset: number,
    count: number,
    segments: Segment[],
    memory: HostMemory,
  ): Promise<void> {
    const { clusterSize } = this;
    const head = offset % clusterSize;
    const end = offset + totalLength(segments);
    const tail = Math.max(0, Math.min(offset - head + count * clusterSize, this.#size) - end);
    if (head > 0 || tail > 0) {
      const copies = this.#copies ??= this.#makeCopies();
      if (head > 0) await this.#read(offset - head, [{ offset: 0, length: head }], copies.memory);
      if (tail > 0) await this.#read(end, [{ offset: clusterSize, length: tail }], copies.memory);
      // All of it is written at once: an offset that leads from one memory into the other is as good as any.
      const start = copies.memory.address - memory.address;
      segments = [
        { offset: start, length: head },
        ...segments,
        { offset: start + clusterSize, length: tail },
      ];
    }
    await this.#file.write(host, segments, memory);
  }

  #makeCopies(): Copies {
    const mapping = new Mapping(2 * this.clusterSize);
    return { memory: hostMemory(mapping), [Symbol.dispose]: () => mapping[Symbol.dispose]() };
  }

  /** Makes a table of the second level where there is none. */
  async #assureL2(offset: number): Promise<void> {
    const index = Math.floor(offset / (this.clusterSize * this.#l2Entries));
    if (this.#l2Offset(index) !== 0) return;
    const [cluster] = await this.#allocate(1);
    this.#setEntry(this.#l1.view, index * 8, cluster * this.clusterSize);
    this.#changedL1.add(index);
  }

  #setEntry(view: DataView, at: number, host: number): void {
    view.setUint32(at, (ENTRY_COPIED | Math.floor(host / TWO_32)) >>> 0);
    view.setUint32(at + 4, host >>> 0);
  }

  /** Lets entries of one slice of the second level lead to new clusters. */
  async #link(offset: number, count: number, host: number): Promise<void> {
    const cluster = Math.floor(offset / this.clusterSize);
    const entry = this.#l2Offset(Math.floor(cluster / this.#l2Entries)) + cluster % this.#l2Entries * 8;
    const inSlice = entry % this.#l2.sliceSize;
    let slice;
    while (!(slice = this.#l2.find(entry - inSlice))) await this.#l2.load(entry - inSlice);
    const { view } = this.#l2;
    for (let index = 0; index < count; index++) {
      const at = slice.at + inSlice + index * 8;
      this.#release(view.getUint32(at), view.getUint32(at + 4));
      this.#setEntry(view, at, host + index * this.clusterSize);
    }
    this.#l2.touch(slice);
  }

  #clear(offset: number, length: number, isDiscard: boolean): Promise<void> {
    this.#assertRange(offset, length);
    return this.#activity.run(async () => {
      const end = offset + length;
      for (let at = offset, steps = 1; at < end; steps++) {
        const within = at % this.clusterSize;
        const clusterEnd = Math.min(at - within + this.clusterSize, this.#size);
        if (within > 0 || end < clusterEnd) {
          const part = Math.min(end, clusterEnd) - at;
          if (!isDiscard) await this.#zeroPart(at, part);
          at += part;
        } else {
          at = Math.min(end, await this.#tables.run(() => this.#clearClusters(at, end, isDiscard)));
        }
        if (steps % MAX_STEPS === 0) await turn();
      }
    });
  }

  /** Makes a part of a cluster zero. */
  async #zeroPart(offset: number, length: number): Promise<void> {
    let missing;
    while ((missing = this.#locate(offset, length)) !== 0) await this.#l2.load(missing);
    if (this.#isZero(offset)) return;
    await this.#tables.run(() => this.#writeNew(offset, ...zeroSource(length)));
  }

  /** Makes some clusters zero, or gives them back; returns where to go on. */
  async #clearClusters(offset: number, end: number, isDiscard: boolean): Promise<number> {
    const { clusterSize } = this;
    if (this.#l2.isCrowded) await this.#flushTables();
    const tableSize = clusterSize * this.#l2Entries;
    const index = Math.floor(offset / tableSize);
    if (this.#version < 3 && this.#isCovered(offset)) {
      // Without a flag for zeros nothing but data hides the backing file.
      const next = Math.min(offset + clusterSize, end);
      if (!isDiscard) await this.#writeNew(offset, ...zeroSource(next - offset));
      return next;
    }
    if (this.#l2Offset(index) === 0 && (isDiscard || !this.#isCovered(offset))) {
      return (index + 1) * tableSize;
    }
    await this.#assureL2(offset);
    const entry = this.#l2Offset(index) + offset % tableSize / clusterSize * 8;
    const inSlice = entry % this.#l2.sliceSize;
    let slice;
    while (!(slice = this.#l2.find(entry - inSlice))) await this.#l2.load(entry - inSlice);
    const { view, sliceSize } = this.#l2;
    for (let at = slice.at + inSlice; at < slice.at + sliceSize; at += 8, offset += clusterSize) {
      // The last cluster of the disk may be less than one.
      if (offset >= end || Math.min(offset + clusterSize, this.#size) > end) break;
      const kind = this.#kindOf(view, at);
      const isCovered = this.#isCovered(offset);
      if (kind === ZERO || kind === UNALLOCATED && (isDiscard || !isCovered)) continue;
      if (isCovered && this.#version < 3) break;
      this.#release(view.getUint32(at), view.getUint32(at + 4));
      view.setUint32(at, 0);
      view.setUint32(at + 4, isCovered ? ENTRY_ZERO : 0);
      this.#l2.touch(slice);
    }
    return offset;
  }

  /** Takes clusters that follow one another, as many as wanted or fewer; they read as zeros. */
  async #allocate(wanted: number): Promise<[first: number, count: number]> {
    const free = wanted === 1 ? this.#free.pop() : undefined;
    if (free !== undefined) {
      await this.#changeRefcount(free, () => 1);
      return [free, 1];
    }
    for (let skipped = 0; skipped < MAX_SKIPPED; skipped++) {
      await this.#assureBlocks(wanted);
      const first = this.#end;
      let count = 0;
      while (count < wanted && await this.#changeRefcount(first + count, (old) => old || 1) === 0) count++;
      this.#end = first + Math.max(1, count);
      if (count > 0) return [first, count];
    }
    throw this.#corrupt("clusters behind its end are in use");
  }

  /** Makes the blocks of reference counts for clusters at the end. */
  async #assureBlocks(count: number): Promise<void> {
    while (true) {
      const last = Math.floor((this.#end + count - 1) / this.#refcountsPerBlock);
      if (last * 8 >= this.#refcountTable.byteLength) {
        await this.#growRefcountTable(last + 1);
        continue;
      }
      let block = Math.floor(this.#end / this.#refcountsPerBlock);
      while (block <= last && this.#blockOffset(block) !== 0) block++;
      if (block > last) return;
      await this.#makeBlock(block);
    }
  }

  /** Makes a block of reference counts at the end, in a place that an earlier block counts, or itself. */
  async #makeBlock(block: number): Promise<void> {
    const cluster = this.#end++;
    const offset = cluster * this.clusterSize;
    const setEntry = (value: number) => this.#refcountTable.setBigUint64(block * 8, BigInt(value));
    setEntry(offset);
    try {
      await this.#changeRefcount(cluster, () => 1);
      this.#writeCounts();
      await this.#file.flush();
      const entry = new Uint8Array(this.#refcountTable.buffer, block * 8, 8);
      this.#writeBytes(this.#refcountTableOffset + block * 8, entry);
    } catch (error) {
      setEntry(0);
      throw error;
    }
  }

  /** Moves the table of reference counts to the end, with the blocks that count it there. */
  async #growRefcountTable(wanted: number): Promise<void> {
    const { clusterSize } = this;
    const perBlock = this.#refcountsPerBlock;
    const [oldTable, oldOffset] = [this.#refcountTable, this.#refcountTableOffset];
    const oldEntries = oldTable.byteLength / 8;
    // No old block counts what is there.
    const first = Math.max(this.#end, oldEntries * perBlock);
    const firstBlock = Math.floor(first / perBlock);
    let [blocks, clusters] = [0, 0];
    for (let needed = 1; blocks < needed;) {
      blocks = needed;
      const entries = Math.max(wanted, firstBlock + blocks, Math.ceil(oldEntries * 1.5));
      clusters = Math.ceil(entries * 8 / clusterSize);
      needed = Math.floor((first + blocks + clusters - 1) / perBlock) - firstBlock + 1;
    }
    if (clusters * clusterSize > MAX_REFCOUNT_TABLE_BYTES) {
      throw new Error(
        `Cannot grow the qcow2 image "${this.#path}" as it has as many clusters as it can have`,
      );
    }
    const bytes = new Uint8Array(clusters * clusterSize);
    bytes.set(new Uint8Array(oldTable.buffer));
    const table = new DataView(bytes.buffer);
    for (let block = 0; block < blocks; block++) {
      table.setBigUint64((firstBlock + block) * 8, BigInt((first + block) * clusterSize));
    }
    const oldEnd = this.#end;
    this.#end = first + blocks + clusters;
    this.#refcountTable = table;
    try {
      for (let cluster = first; cluster < this.#end; cluster++) await this.#changeRefcount(cluster, () => 1);
      this.#writeCounts();
      const offset = this.#refcountTableOffset = (first + blocks) * clusterSize;
      this.#writeBytes(offset, bytes);
      await this.#file.flush();
      const pointer = new Uint8Array(12);
      const view = new DataView(pointer.buffer);
      view.setBigUint64(0, BigInt(offset));
      view.setUint32(8, clusters);
      this.#writeBytes(48, pointer);
      await this.#file.flush();
    } catch (error) {
      [this.#refcountTable, this.#refcountTableOffset, this.#end] = [oldTable, oldOffset, oldEnd];
      throw error;
    }
    for (let index = 0; index < oldEntries * 8 / clusterSize; index++) {
      this.#released.push(oldOffset / clusterSize + index);
    }
  }

  /** Moves the first level to the end, with room for more. */
  async #growL1(entries: number): Promise<void> {
    const { clusterSize } = this;
    if (entries <= this.#l1.entries) return;
    if (entries * 8 > MAX_L1_BYTES) {
      throw new RangeError(
        `Cannot grow the qcow2 image "${this.#path}" as clusters of ${clusterSize} bytes are too small for that`,
      );
    }
    await this.#flushTables();
    const clusters = Math.ceil(entries * 8 / clusterSize);
    let [first, count] = await this.#allocate(clusters);
    while (count < clusters) {
      for (let index = 0; index < count; index++) this.#released.push(first + index);
      [first, count] = await this.#allocate(clusters);
    }
    const l1 = this.#makeL1(entries);
    const offset = first * clusterSize;
    try {
      l1.memory.bytes.set(this.#l1.memory.bytes.subarray(0, this.#l1.entries * 8));
      this.#writeCounts();
      this.#file.writeSync(offset, [{ offset: 0, length: entries * 8 }], l1.memory);
      await this.#file.flush();
      const pointer = new Uint8Array(12);
      const view = new DataView(pointer.buffer);
      view.setUint32(0, entries);
      view.setBigUint64(4, BigInt(offset));
      this.#writeBytes(36, pointer);
      await this.#file.flush();
    } catch (error) {
      l1[Symbol.dispose]();
      throw error;
    }
    for (let index = 0; index < Math.ceil(this.#l1.entries * 8 / clusterSize); index++) {
      this.#released.push(this.#l1Offset / clusterSize + index);
    }
    this.#l1[Symbol.dispose]();
    this.#l1 = l1;
    this.#l1Offset = offset;
  }

  /** Where a block of reference counts is in the file; 0 where there is none. */
  #blockOffset(block: number): number {
    if (block * 8 >= this.#refcountTable.byteLength) return 0;
    const offset = this.#refcountTable.getUint32(block * 8) * TWO_32 +
      this.#refcountTable.getUint32(block * 8 + 4);
    if (offset % this.clusterSize !== 0 || offset >= this.#end * this.clusterSize) {
      throw this.#corrupt(`a block of reference counts is at ${offset}`);
    }
    return offset;
  }

  /** Changes a reference count where there is one; returns what it was. */
  async #changeRefcount(cluster: number, change: (old: number) => number): Promise<number> {
    const block = this.#blockOffset(Math.floor(cluster / this.#refcountsPerBlock));
    if (block === 0) return 0;
    if (this.#refcounts.isCrowded) this.#refcounts.writeSync();
    const bits = this.#refcountBits;
    const bit = cluster % this.#refcountsPerBlock * bits;
    const byte = Math.floor(bit / 8);
    const { sliceSize, view } = this.#refcounts;
    const slice = await this.#refcounts.get(block + byte - byte % sliceSize);
    const at = slice.at + byte % sliceSize;
    const shift = bit % 8;
    const mask = 2 ** Math.min(bits, 8) - 1;
    const old = bits === 64
      ? Number(view.getBigUint64(at))
      : bits === 32
      ? view.getUint32(at)
      : bits === 16
      ? view.getUint16(at)
      : view.getUint8(at) >> shift & mask;
    const value = change(old);
    if (value === old) return old;
    if (bits === 64) view.setBigUint64(at, BigInt(value));
    else if (bits === 32) view.setUint32(at, value);
    else if (bits === 16) view.setUint16(at, value);
    else view.setUint8(at, view.getUint8(at) & ~(mask << shift) | value << shift);
    this.#refcounts.touch(slice);
    return old;
  }
}

/** How to open the file of a disk. */
export interface OpenBlockFileOptions {
  /** Memory of the guest. */
  readonly memory: GuestMemory;
  /** Format of the file. It is never guessed, as a guest could write what looks like another format. */
  readonly format: "raw" | "qcow2";
  /** Whether not to write; false unless told. */
  readonly isReadOnly?: boolean;
  /** Whether to go past the page cache; false unless told. */
  readonly isDirect?: boolean;
  /** Whether to lock the file, against QEMU too; true unless told. */
  readonly isLocked?: boolean;
  /** Format of the backing file, instead of what the header says. */
  readonly backingFormat?: "raw" | "qcow2";
  /**
   * How many backing files may follow one another; 8 unless told. Images of strangers are to be opened with 0: their header
   * could name any file of this host.
   */
  readonly backingDepth?: number;
}

/**
 * Opens the file of a disk.
 *
 * @param path Path of the file
 * @param options Its format, and how to open it
 * @returns The file
 * @throws {Error} If it cannot be opened, is not what it should be, or others use it in a way that does not go together
 */
export function openBlockFile(path: string, options: OpenBlockFileOptions): BlockFile {
  const {
    memory,
    format,
    isReadOnly = false,
    isDirect = false,
    isLocked = true,
    backingDepth = MAX_BACKING_DEPTH,
  } = options;
  const common = {
    memory: memory,
    isReadOnly,
    isDirect,
    isLocked,
  };
  if (format === "raw") return new RawFile(path, common);
  return new Qcow2File(path, {
    ...common,
    openBacking: ({ backingPath, backingFormat }) => {
      if (backingPath === undefined) return undefined;
      if (backingDepth === 0) throw new Error(`its backing file "${backingPath}" is one too many`);
      const format = options.backingFormat ?? backingFormat;
      if (format !== "raw" && format !== "qcow2") {
        throw new Error(
          `its backing file "${backingPath}" has the format "${format ?? ""}": only raw and qcow2 will do`,
        );
      }
      if (/^[^/]*:/.test(backingPath)) throw new Error(`its backing file "${backingPath}" is not a path`);
      return openBlockFile(resolve(dirname(path), backingPath), {
        memory,
        format,
        isReadOnly: true,
        isDirect,
        isLocked,
        backingDepth: backingDepth - 1,
      });
    },
  });
}
