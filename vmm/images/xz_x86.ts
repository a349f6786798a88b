/**
 * Unpacks XZ files whose content went through the filter for x86 code, as that of Linux kernels does. The library that
 * unpacks XZ does not know the filter, so it gets the file without, and the filter is undone here (The .xz File Format
 * 1.2.1; the filter is that of 7-Zip, called BCJ).
 *
 * @module
 */

import { crc32 } from "node:zlib";
import { decompress } from "./compression.ts";

const STREAM_HEADER = 12;
const CHECK = { none: 0, crc32: 1 } as const;
const FILTER = { x86: 0x04, lzma2: 0x21 } as const;
/** Sizes at the beginning of a block, of which its flags tell. */
const HAS_PACKED_SIZE = 0x40;
const HAS_SIZE = 0x80;

/**
 * Unpacks a file of one block.
 *
 * @param packed The file
 * @param size Size of the content, in bytes
 * @returns The content, in pieces
 * @throws {Error} If it is damaged or cut, or has another size
 */
export async function* unpackXz(packed: Uint8Array<ArrayBuffer>, size: number): AsyncGenerator<Uint8Array> {
  const block = readBlock(packed);
  if (!block) return yield* decompress(streamOf([packed]), "xz");
  const { dictionary, start, end, check } = block;
  if (block.size !== size) throw damaged();
  const content = new Uint8Array(size);
  let at = 0;
  for await (const bytes of decompress(streamOf(wrap(packed.subarray(start, end), dictionary, size)), "xz")) {
    content.set(bytes, at);
    at += bytes.length;
  }
  undoX86Filter(content);
  if (at !== size || (check !== undefined && crc32(content) !== check)) throw damaged();
  yield content;
}

interface Block {
  /** Code of the size of the dictionary. */
  readonly dictionary: number;
  /** Where its LZMA2 data is. */
  readonly start: number;
  readonly end: number;
  /** Size of what that unpacks to. */
  readonly size: number;
  /** CRC-32 of the content. */
  readonly check: number | undefined;
}

/** Finds what is in a file of one block with the filter; undefined where there is no filter. */
function readBlock(packed: Uint8Array<ArrayBuffer>): Block | undefined {
  const view = new DataView(packed.buffer, packed.byteOffset, packed.length);
  let at = STREAM_HEADER;
  const byte = (): number => {
    if (at >= packed.length) throw damaged();
    return packed[at++]!;
  };
  const start = at + 4 * (byte() + 1);
  const flags = byte();
  for (const flag of [HAS_PACKED_SIZE, HAS_SIZE]) if (flags & flag) { while (byte() & 0x80); }
  // Two filters, the first one without an offset of its own.
  if ((flags & 3) !== 1 || byte() !== FILTER.x86 || byte() !== 0) return undefined;
  if (byte() !== FILTER.lzma2 || byte() !== 1) return undefined;
  const dictionary = byte();
  at = start;
  let size = 0;
  for (let control = byte(); control !== 0; control = byte()) {
    const isPacked = control >= 0x80;
    if (!isPacked && control > 2) throw damaged();
    const word = (): number => (byte() << 8 | byte()) + 1;
    const unpacked = word() + (isPacked ? (control & 0x1f) << 16 : 0);
    // Properties come before the data where they change.
    const length = isPacked ? word() + (control >= 0xc0 ? 1 : 0) : unpacked;
    at += length;
    size += unpacked;
  }
  const end = at;
  at += -at & 3;
  const type = packed[7];
  if (type !== CHECK.none && type !== CHECK.crc32) {
    throw new Error("it has a checksum that no kernel can check");
  }
  if (at + 8 > packed.length) throw damaged();
  const check = type === CHECK.crc32 ? view.getUint32(at, true) : undefined;
  // The index follows, and no other block.
  if (packed[at + (check === undefined ? 0 : 4)] !== 0) throw new Error("it has more than one block");
  return { dictionary, start, end, size, check };
}

/** Makes a file of LZMA2 data. */
function wrap(data: Uint8Array<ArrayBuffer>, dictionary: number, size: number): Uint8Array<ArrayBuffer>[] {
  const flags = [0, CHECK.none];
  const header = withCrc([2, 0, FILTER.lzma2, 1, dictionary, 0, 0, 0]);
  const index = [0, 1, ...variableLength(header.length + data.length), ...variableLength(size)];
  while (index.length % 4 !== 0) index.push(0);
  const end = [...fourBytes(index.length / 4), ...flags];
  return [
    Uint8Array.of(0xfd, 0x37, 0x7a, 0x58, 0x5a, 0, ...withCrc(flags), ...header),
    data,
    Uint8Array.of(
      ...Array<number>(-data.length & 3).fill(0),
      ...withCrc(index),
      ...fourBytes(crc32(Uint8Array.from(end))),
      ...end,
      0x59,
      0x5a,
    ),
  ];
}

function withCrc(bytes: readonly number[]): number[] {
  return [...bytes, ...fourBytes(crc32(Uint8Array.from(bytes)))];
}

function fourBytes(value: number): number[] {
  return [0, 8, 16, 24].map((shift) => value >>> shift & 255);
}

function variableLength(value: number): number[] {
  const bytes: number[] = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push(value & 127 | 128);
  return [...bytes, value];
}

function streamOf(parts: readonly Uint8Array<ArrayBuffer>[]): ReadableStream<Uint8Array<ArrayBuffer>> {
  return ReadableStream.from(parts);
}

/**
 * Makes the targets of calls and jumps relative again. The filter made them absolute, which packs better, where they were
 * near: their highest byte is 0 or 255, and is so still.
 */
function undoX86Filter(code: Uint8Array<ArrayBuffer>): void {
  const view = new DataView(code.buffer);
  // What looks like an instruction but was left alone: bit 0 is the byte before, bit 1 the one before that, and so on.
  let skipped = 0;
  for (let at = 0; at + 5 <= code.length;) {
    if ((code[at]! & 0xfe) !== 0xe8) {
      skipped = skipped << 1 & 7;
      at++;
      continue;
    }
    // Two of them in the three bytes before, or one that ends near: what is here is taken for a part of those.
    const distance = [0, 1, 2, -1, 3, -1, -1, -1][skipped]!;
    const isPart = distance < 0 || (distance > 0 && isSign(code[at + 4 - distance]!));
    if (isPart || !isSign(code[at + 4]!)) {
      skipped = (skipped << 1 | 1) & 7;
      at++;
      continue;
    }
    const next = at + 5;
    let target = view.getUint32(at + 1, true) - next | 0;
    // Where the one before would seem to end near now, the filter had turned the bits that they share.
    if (distance > 0 && isSign(target >>> 24 - 8 * distance & 255)) {
      target = (target ^ (1 << 32 - 8 * distance) - 1) - next | 0;
    }
    view.setInt32(at + 1, target << 7 >> 7, true);
    skipped = 0;
    at = next;
  }
}

function isSign(byte: number): boolean {
  return byte === 0 || byte === 255;
}

function damaged(): Error {
  return new Error("its content is damaged or cut");
}
