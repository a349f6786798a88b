import assert from "node:assert/strict";
import { SharedMemory } from "../devices/shared_memory.ts";
import { MachineError } from "../errors.ts";
import { type BootFile, LINUX_LAYOUT, loadLinux, memoryMap } from "./linux.ts";
import { bzImage, elf } from "./test_kernels.ts";

const MEBIBYTE = 2 ** 20;

/** A file that minds its bounds. */
function file(bytes: Uint8Array): BootFile {
  return {
    length: bytes.length,
    read(offset, target) {
      assert.ok(offset >= 0 && offset + target.length <= bytes.length);
      target.set(bytes.subarray(offset, offset + target.length));
    },
  };
}

function load(kernel: Uint8Array, memory: SharedMemory, commandLine = "quiet") {
  const initramfs = [file(new Uint8Array(5).fill(1)), file(new Uint8Array(3).fill(2))];
  return loadLinux(memory, { kernel: file(kernel), kernelName: "k", initramfs, commandLine });
}

Deno.test("loadLinux() puts a bzImage, its initramfs and its command line into memory", () => {
  using memory = new SharedMemory(64 * MEBIBYTE);
  assert.deepEqual(load(bzImage(), memory), { protocol: "linux64", address: 0x10_0200 });
  const page = new DataView(memory.mapping.buffer, LINUX_LAYOUT.zeroPage, 4096);
  assert.equal(memory.bytes[0x10_0000], 0x90);
  assert.equal(page.getUint8(0x210), 0xff);
  assert.equal(page.getUint32(0x228, true), 0x2_0000);
  assert.equal(page.getBigUint64(0x70, true), 0xe_0000n);
  assert.equal(page.getUint16(0x206, true), 0x020f);
  const start = page.getUint32(0x218, true);
  assert.equal(page.getUint32(0x21c, true), 12);
  assert.equal(start % 4096, 0);
  assert.deepEqual([...memory.bytes.subarray(start, start + 12)], [1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 0]);
  assert.deepEqual([...memory.bytes.subarray(0xf_fff0, 0xf_fff4)], [0xb0, 0xfe, 0xe6, 0x64]);
  assert.equal(new TextDecoder().decode(memory.bytes.subarray(0x2_0000, 0x2_0006)), "quiet\0");
  const entries = page.getUint8(0x1e8);
  assert.equal(entries, 4);
  assert.deepEqual(
    Array.from({ length: entries }, (_, index) => [
      page.getBigUint64(0x2d0 + 20 * index, true),
      page.getBigUint64(0x2d8 + 20 * index, true),
      page.getUint32(0x2e0 + 20 * index, true),
    ]),
    [[0n, 0x9_fc00n, 1], [0x9_fc00n, 0x6_0400n, 2], [0x10_0000n, 63n * 0x10_0000n, 1], [
      0xe000_0000n,
      0x10_0000n,
      2,
    ]],
  );
});

Deno.test("memoryMap() goes on behind the hole", () => {
  using memory = new SharedMemory(4096 * MEBIBYTE);
  assert.deepEqual(memoryMap(memory).at(-1), { address: 0x1_0000_0000, length: 2 ** 30, type: 1 });
  assert.deepEqual(memoryMap(memory)[2], { address: 0x10_0000, length: 0xbff0_0000, type: 1 });
  assert.equal(memory.offset(0x1_0000_0000, 16), 0xc000_0000);
  assert.throws(() => memory.offset(0xc000_0000 - 8, 16), /not all memory/);
  assert.throws(() => memory.offset(0xffff_fff8, 16), /not all memory/);
  assert.throws(() => memory.offset(NaN, 1), /not all memory/);
});

Deno.test("loadLinux() enters an ELF kernel by its note for PVH, and without one as Linux", () => {
  using memory = new SharedMemory(64 * MEBIBYTE);
  assert.deepEqual(load(elf(true), memory), { protocol: "pvh", address: 0x100_0040 });
  const info = new DataView(memory.mapping.buffer, LINUX_LAYOUT.startInfo, 4096);
  assert.equal(info.getUint32(0, true), 0x336e_c578);
  assert.equal(info.getUint32(12, true), 1);
  assert.equal(info.getBigUint64(24, true), 0x2_0000n);
  assert.equal(info.getUint32(48, true), 4);
  assert.equal(memory.bytes[0x100_0000], 0xcc);
  assert.deepEqual(load(elf(false), memory), { protocol: "linux64", address: 0x100_0000 });
});

Deno.test("loadLinux() says what is wrong with a kernel, and never reads or writes elsewhere", () => {
  using memory = new SharedMemory(32 * MEBIBYTE);
  const refuse = (kernel: Uint8Array<ArrayBuffer>, pattern: RegExp, commandLine?: string) =>
    assert.throws(() => load(kernel, memory, commandLine), (error: unknown) => {
      assert.ok(error instanceof MachineError);
      assert.match(error.message, pattern);
      return true;
    });
  refuse(new Uint8Array(10), /neither a bzImage nor an ELF file/);
  const old = bzImage();
  new DataView(old.buffer).setUint16(0x206, 0x0204, true);
  refuse(old, /no 64-bit entry/);
  refuse(bzImage(), /command line has 3000 bytes and it takes 2047/, "x".repeat(3000));
  const large = bzImage();
  new DataView(large.buffer).setUint32(0x260, 128 * MEBIBYTE, true);
  refuse(large, /needs 144 MiB of memory/);
  // Headers of anything: an error of ours or a load, and nothing else.
  let seed = 1;
  const random = () => (seed = Math.imul(seed, 1103515245) + 12345 & 0x7fff_ffff) / 0x8000_0000;
  for (let round = 0; round < 3000; round++) {
    const kernel = round % 2 === 0 ? bzImage() : elf(round % 4 === 1);
    for (let count = 0; count < 6; count++) {
      const at = Math.floor(random() * (round % 2 === 0 ? 0x270 : 0x440));
      kernel[at] = Math.floor(random() * 256);
    }
    const cut = random() < 0.2 ? kernel.slice(0, Math.floor(random() * kernel.length)) : kernel;
    try {
      load(cut, memory);
    } catch (error) {
      assert.ok(error instanceof MachineError, `${error}`);
    }
  }
});
