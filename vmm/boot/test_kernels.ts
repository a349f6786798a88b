/**
 * Kernels for tests: headers, and nothing to run.
 *
 * @module
 */

/** Makes a bzImage with a 64-bit entry. */
export function bzImage(): Uint8Array<ArrayBuffer> {
  const file = new Uint8Array(0x3000);
  const view = new DataView(file.buffer);
  file[0x1f1] = 4;
  view.setUint16(0x1fe, 0xaa55, true);
  file[0x201] = 0x6c;
  view.setUint32(0x202, 0x5372_6448, true);
  view.setUint16(0x206, 0x020f, true);
  view.setUint32(0x22c, 0x7fff_ffff, true);
  view.setUint16(0x236, 1, true);
  view.setUint32(0x238, 2047, true);
  view.setBigUint64(0x258, 0x100_0000n, true);
  view.setUint32(0x260, 4 * 2 ** 20, true);
  file.fill(0x90, 5 * 512);
  return file;
}

/**
 * Makes an ELF kernel for x86-64 at 16 MiB.
 *
 * @param note Whether it has an entry for PVH
 * @returns The file
 */
export function elf(note: boolean): Uint8Array<ArrayBuffer> {
  const file = new Uint8Array(0x1000);
  const view = new DataView(file.buffer);
  file.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]);
  view.setUint16(18, 62, true);
  view.setBigUint64(24, 0x100_0000n, true);
  view.setBigUint64(32, 64n, true);
  view.setUint16(54, 56, true);
  view.setUint16(56, note ? 2 : 1, true);
  const header = (
    at: number,
    type: number,
    offset: number,
    address: number,
    size: number,
    memory: number,
  ) => {
    view.setUint32(at, type, true);
    view.setBigUint64(at + 8, BigInt(offset), true);
    view.setBigUint64(at + 24, BigInt(address), true);
    view.setBigUint64(at + 32, BigInt(size), true);
    view.setBigUint64(at + 40, BigInt(memory), true);
  };
  header(64, 1, 0x200, 0x100_0000, 0x100, 0x2000);
  file.fill(0xcc, 0x200, 0x300);
  if (note) {
    header(120, 4, 0x400, 0, 20, 20);
    view.setUint32(0x400, 4, true);
    view.setUint32(0x404, 4, true);
    view.setUint32(0x408, 18, true);
    file.set(new TextEncoder().encode("Xen\0"), 0x40c);
    view.setUint32(0x410, 0x100_0040, true);
  }
  return file;
}
