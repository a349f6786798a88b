/**
 * Empty qcow2 files, also as copy-on-write children of another image (QEMU 7.2 `docs/interop/qcow2.txt`, version 3).
 *
 * @module
 */

/** The image that a qcow2 file reads from where it holds nothing itself. */
export interface BackingFile {
  /** Path of the image. */
  readonly path: string;
  /** Its format. */
  readonly format: "raw" | "qcow2";
}

const CLUSTER_BITS = 16;
const CLUSTER = 1 << CLUSTER_BITS;
const HEADER_LENGTH = 104;
const BACKING_FORMAT_EXTENSION = 0xe2792aca;

/**
 * Makes the content of an empty qcow2 file.
 *
 * @param size Capacity in bytes, a multiple of 512
 * @param backing The image to read from; zeros without one
 * @returns The bytes of the file
 * @throws {RangeError} If the size is not positive or not a multiple of 512, or the path is longer than 1023 bytes
 */
export function emptyQcow2(size: number, backing?: BackingFile): Uint8Array {
  if (!Number.isSafeInteger(size) || size <= 0 || size % 512 !== 0) {
    throw new RangeError(
      `Cannot make a qcow2 file as its size must be a positive multiple of 512: current value is ${size}`,
    );
  }
  const name = new TextEncoder().encode(backing?.path ?? "");
  if (name.length > 1023) {
    throw new RangeError(`Cannot make a qcow2 file as the path "${backing?.path}" is longer than 1023 bytes`);
  }
  const format = new TextEncoder().encode(backing?.format ?? "");
  // One L2 table of one cluster maps as many clusters as it has 8-byte entries.
  const l1Size = Math.ceil(size / (CLUSTER * (CLUSTER / 8)));
  const l1Clusters = Math.max(1, Math.ceil(l1Size * 8 / CLUSTER));
  const clusters = 3 + l1Clusters;
  const bytes = new Uint8Array(clusters * CLUSTER);
  const view = new DataView(bytes.buffer);
  const extension = backing ? 8 + Math.ceil(format.length / 8) * 8 : 0;
  const nameOffset = HEADER_LENGTH + extension + 8;
  view.setUint32(0, 0x514649fb);
  view.setUint32(4, 3);
  view.setBigUint64(8, backing ? BigInt(nameOffset) : 0n);
  view.setUint32(16, name.length);
  view.setUint32(20, CLUSTER_BITS);
  view.setBigUint64(24, BigInt(size));
  view.setUint32(36, l1Size);
  view.setBigUint64(40, BigInt(3 * CLUSTER));
  view.setBigUint64(48, BigInt(CLUSTER));
  view.setUint32(56, 1);
  view.setUint32(96, 4); // reference counts of 16 bits
  view.setUint32(100, HEADER_LENGTH);
  if (backing) {
    view.setUint32(HEADER_LENGTH, BACKING_FORMAT_EXTENSION);
    view.setUint32(HEADER_LENGTH + 4, format.length);
    bytes.set(format, HEADER_LENGTH + 8);
    bytes.set(name, nameOffset);
  }
  view.setBigUint64(CLUSTER, BigInt(2 * CLUSTER));
  for (let cluster = 0; cluster < clusters; cluster++) view.setUint16(2 * CLUSTER + 2 * cluster, 1);
  return bytes;
}
