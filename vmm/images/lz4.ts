/**
 * Unpacks LZ4's legacy format, which Linux kernels are packed in (LZ4 1.9 `doc/lz4_Frame_format.md` and
 * `doc/lz4_Block_format.md`).
 *
 * @module
 */

const MAGIC = 0x184c_2102;
/** Most bytes that a block unpacks to. */
const MAX_BLOCK = 8 << 20;
const MIN_MATCH = 4;
/** Half a byte of a length that says there is more. */
const LONG = 15;

/**
 * Unpacks a file.
 *
 * @param packed The file
 * @returns The content, block by block; each is lent until the next one
 * @throws {Error} If it is damaged or cut
 */
export function* unpackLegacyLz4(packed: Uint8Array): Generator<Uint8Array> {
  const view = new DataView(packed.buffer, packed.byteOffset, packed.length);
  const block = new Uint8Array(MAX_BLOCK);
  let at = 0;
  const readLength = (): number => {
    if (at + 4 > packed.length) throw damaged();
    at += 4;
    return view.getUint32(at - 4, true);
  };
  if (readLength() !== MAGIC) throw damaged();
  while (at < packed.length) {
    const length = readLength();
    // Another file follows.
    if (length === MAGIC) continue;
    if (length > packed.length - at) throw damaged();
    yield block.subarray(0, unpackBlock(packed.subarray(at, at + length), block));
    at += length;
  }
}

/**
 * Unpacks a block.
 *
 * @param packed The block
 * @param target What to fill
 * @returns How many bytes were filled
 * @throws {Error} If it is damaged, or the target is too small
 */
export function unpackBlock(packed: Uint8Array, target: Uint8Array): number {
  let from = 0;
  let to = 0;
  const next = (): number => {
    if (from >= packed.length) throw damaged();
    return packed[from++]!;
  };
  const restOf = (length: number): number => {
    if (length < LONG) return length;
    let byte: number;
    do length += byte = next(); while (byte === 255);
    return length;
  };
  while (true) {
    const token = next();
    const literals = restOf(token >> 4);
    if (literals > packed.length - from || literals > target.length - to) throw damaged();
    target.set(packed.subarray(from, from + literals), to);
    from += literals;
    to += literals;
    // The last sequence has no match.
    if (from === packed.length) return to;
    const distance = next() + 256 * next();
    const length = restOf(token & LONG) + MIN_MATCH;
    if (distance === 0 || distance > to || length > target.length - to) throw damaged();
    if (distance >= length) target.copyWithin(to, to - distance, to - distance + length);
    // It goes on in what it makes itself: bytes repeat.
    else for (let index = to; index < to + length; index++) target[index] = target[index - distance]!;
    to += length;
  }
}

function damaged(): Error {
  return new Error("its content is damaged or cut");
}
