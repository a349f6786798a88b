/**
 * A program for guests, which have nothing that reads at random places.
 *
 * @module
 */

const BASE = 0x40_0000;
const BUFFER = 0x50_0000;
const PAGE = 4096;
const HEADERS = 64 + 2 * 56;
/** Linux 6.1 `arch/x86/entry/syscalls/syscall_64.tbl`, `include/uapi/asm-generic/fcntl.h`. */
const SYSCALL = { open: 2, pread64: 17, exit: 60 } as const;
const O_DIRECT = 0x4000;

/**
 * Makes a static program for x86-64 that reads pages one at a time at places that a linear congruential generator names,
 * past the page cache, and fails where a read does.
 *
 * @param path Path of the disk in the guest
 * @param pages How many pages the disk has: a power of two up to 65536
 * @param count How many reads
 * @returns The ELF file
 */
export function randomReader(path: string, pages: number, count: number): Uint8Array<ArrayBuffer> {
  const name = new TextEncoder().encode(`${path}\0`);
  const entry = BASE + HEADERS + name.length;
  const start = [
    ...[0xb8, ...word(SYSCALL.open), 0xbf, ...word(BASE + HEADERS), 0xbe, ...word(O_DIRECT)],
    // xor edx, edx; syscall; mov r12d, eax; mov ebx, COUNT; mov r13d, SEED
    ...[0x31, 0xd2, 0x0f, 0x05, 0x41, 0x89, 0xc4, 0xbb, ...word(count), 0x41, 0xbd, ...word(1)],
  ];
  const read = [
    // imul r13d, r13d, 1103515245; add r13d, 12345
    ...[0x45, 0x69, 0xed, ...word(1103515245), 0x41, 0x81, 0xc5, ...word(12345)],
    // mov r10d, r13d; shr r10d, 16; and r10d, PAGES - 1; shl r10d, 12
    ...[0x45, 0x89, 0xea, 0x41, 0xc1, 0xea, 16, 0x41, 0x81, 0xe2, ...word(pages - 1), 0x41, 0xc1, 0xe2, 12],
    // pread64(r12d, BUFFER, PAGE, r10)
    ...[0xb8, ...word(SYSCALL.pread64), 0x44, 0x89, 0xe7, 0xbe, ...word(BUFFER), 0xba, ...word(PAGE)],
    // syscall; cmp eax, PAGE; jne past the end of the loop
    ...[0x0f, 0x05, 0x3d, ...word(PAGE), 0x75, 4],
  ];
  // dec ebx; jnz to the next read
  const next = [0xff, 0xcb, 0x75, -(read.length + 4) & 0xff];
  // mov edi, ebx: what is left to be read; exit
  const end = [0x89, 0xdf, 0xb8, ...word(SYSCALL.exit), 0x0f, 0x05];
  const code = [...start, ...read, ...next, ...end];
  const size = HEADERS + name.length + code.length;
  return new Uint8Array([
    ...[0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ...[2, 0, 62, 0, ...word(1), ...wide(entry), ...wide(64), ...wide(0), ...word(0)],
    ...[64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0],
    // To read and execute: the file. To read and write: the buffer.
    ...[...word(1), ...word(5), ...[0, BASE, BASE, size, size, PAGE].flatMap(wide)],
    ...[...word(1), ...word(6), ...[0, BUFFER, BUFFER, 0, PAGE, PAGE].flatMap(wide)],
    ...name,
    ...code,
  ]);
}

function word(value: number): number[] {
  return [value & 0xff, value >> 8 & 0xff, value >> 16 & 0xff, value >>> 24];
}

function wide(value: number): number[] {
  return [...word(value), 0, 0, 0, 0];
}
