/**
 * Kernels as ELF files, for machines that nothing can unpack a bzImage in (Linux 6.1 `Documentation/x86/boot.rst` and
 * `scripts/Makefile.lib`).
 *
 * @module
 */

import { join } from "node:path";
import { MachineError } from "../errors.ts";
import type { BuildContext } from "./builder.ts";
import { type Compression, decompress, readPart } from "./compression.ts";
import { unpackLegacyLz4 } from "./lz4.ts";
import { storeEntry, storeKey } from "./store.ts";
import { unpackXz } from "./xz_x86.ts";

/** Largest kernel, in bytes, packed or not. */
const MAX_KERNEL = 512 * 2 ** 20;
/** Fields of the setup header. */
const FIELD = {
  setupSectors: 0x1f1,
  bootFlag: 0x1fe,
  magic: 0x202,
  version: 0x206,
  payloadOffset: 0x248,
  payloadLength: 0x24c,
  end: 0x250,
} as const;
const BOOT_FLAG = 0xaa55;
const HEADER_MAGIC = 0x5372_6448;
/** The first protocol that tells where the payload is. */
const OLDEST_PROTOCOL = 0x0208;
const SECTOR = 512;
/** Size of the unpacked file, in the payload's last bytes. For gzip alone they are a part of its own format. */
const SIZE_FIELD = 4;

/** What a payload begins with, and how it is packed then. */
const METHODS: readonly (readonly [magic: readonly number[], method: Compression | "lz4"])[] = [
  [[0x1f, 0x8b], "gz"],
  [[0xfd, 0x37, 0x7a, 0x58, 0x5a], "xz"],
  [[0x28, 0xb5, 0x2f, 0xfd], "zst"],
  [[0x02, 0x21, 0x4c, 0x18], "lz4"],
];
const ELF_MAGIC = 0x464c_457f;
const ELF_HEADER = 64;
const PT_LOAD = 1;
const EM_386 = 3;
const EM_X86_64 = 62;

type Fail = (reason: string) => never;

interface Payload {
  readonly offset: number;
  readonly length: number;
  readonly method: Compression | "lz4";
  /** Size of what it unpacks to. */
  readonly size: number;
}

/**
 * Finds the ELF file of a kernel in the cache, or unpacks it.
 *
 * @param path Path of a bzImage, or of an ELF file
 * @param context Cache, signal and progress
 * @returns Path of the ELF file, which ends with data for relocation in some kernels; the same path where that is one
 * @throws {MachineError} If it is no kernel for x86, damaged, or packed by a method that is not known
 */
export async function unpackKernel(path: string, context: BuildContext): Promise<string> {
  const fail: Fail = (reason) => {
    throw new MachineError(`Cannot unpack the kernel "${path}" as ${reason}`);
  };
  using file = await open(path, fail);
  const { size, mtime } = await file.stat();
  if (size > MAX_KERNEL) fail("it is larger than 512 MiB: give a Linux kernel for x86");
  const start = await readAt(file, 0, Math.min(size, FIELD.end));
  if (start.byteLength >= 4 && start.getUint32(0, true) === ELF_MAGIC) {
    await checkElf(file, size, fail);
    return path;
  }
  const payload = await findPayload(file, start, size, fail);
  const { folder } = await storeEntry(
    context,
    // To read it all for a digest takes longer than to start a machine.
    `vmlinux/${storeKey("vmlinux", [await Deno.realPath(path), size, mtime?.getTime()])}`,
    `the unpacked kernel of "${path}"`,
    async (part) => {
      context.report("unpacking the kernel");
      using target = await Deno.open(join(part, "vmlinux"), { createNew: true, read: true, write: true });
      let written = 0;
      for await (const bytes of unpack(file, payload)) {
        context.signal.throwIfAborted();
        written += bytes.length;
        if (written > payload.size) break;
        await writeAll(target, bytes);
      }
      if (written !== payload.size) fail("its content has another size than it says: fetch it anew");
      await checkElf(target, written, fail);
      return {};
    },
  );
  return join(folder, "vmlinux");
}

async function open(path: string, fail: Fail): Promise<Deno.FsFile> {
  try {
    return await Deno.open(path);
  } catch (error) {
    return fail(`${(error as Error).message}: give a file that can be read`);
  }
}

async function findPayload(file: Deno.FsFile, start: DataView, size: number, fail: Fail): Promise<Payload> {
  if (
    start.byteLength < FIELD.end || start.getUint16(FIELD.bootFlag, true) !== BOOT_FLAG ||
    start.getUint32(FIELD.magic, true) !== HEADER_MAGIC
  ) {
    return fail("it is neither a bzImage nor an ELF file: give a Linux kernel for x86");
  }
  const inside = start.getUint32(FIELD.payloadOffset, true);
  if (start.getUint16(FIELD.version, true) < OLDEST_PROTOCOL || inside === 0) {
    return fail("it does not tell where its packed content is: give a kernel of Linux 2.6.26 or later");
  }
  const offset = ((start.getUint8(FIELD.setupSectors) || 4) + 1) * SECTOR + inside;
  const length = start.getUint32(FIELD.payloadLength, true);
  if (length < 2 * SIZE_FIELD || offset + length > size) return fail("it is cut short: fetch it anew");
  const magic = await readAt(file, offset, 2 * SIZE_FIELD);
  const method = METHODS.find(([bytes]) => bytes.every((byte, at) => magic.getUint8(at) === byte))?.[1];
  if (method === undefined) {
    const bytes = magic.getUint32(0).toString(16).padStart(8, "0");
    return fail(
      `its content, which begins with ${bytes}, is packed by a method that is not known: ` +
        `give a kernel that is packed by gzip, XZ, Zstandard or LZ4`,
    );
  }
  const unpacked = (await readAt(file, offset + length - SIZE_FIELD, SIZE_FIELD)).getUint32(0, true);
  if (unpacked > MAX_KERNEL) return fail("it is larger than 512 MiB unpacked: give a Linux kernel for x86");
  return { offset, length: method === "gz" ? length : length - SIZE_FIELD, method, size: unpacked };
}

async function* unpack(
  file: Deno.FsFile,
  { offset, length, method, size }: Payload,
): AsyncGenerator<Uint8Array, void, undefined> {
  if (method === "lz4" || method === "xz") {
    const { buffer } = await readAt(file, offset, length);
    yield* method === "xz" ? unpackXz(new Uint8Array(buffer), size) : unpackLegacyLz4(new Uint8Array(buffer));
    return;
  }
  await file.seek(offset, Deno.SeekMode.Start);
  yield* decompress(readPart(file, length), method);
}

/** Checks that a file is a program for x86 that is there as a whole. Whoever loads it checks what it makes of it. */
async function checkElf(file: Deno.FsFile, size: number, fail: Fail): Promise<void> {
  const broken = (): never => fail("its ELF file is not that of a kernel for x86, or damaged: fetch it anew");
  if (size < ELF_HEADER) broken();
  const header = await readAt(file, 0, ELF_HEADER);
  const [elfClass, order, machine] = [header.getUint8(4), header.getUint8(5), header.getUint16(18, true)];
  const isWide = elfClass === 2 && machine === EM_X86_64;
  if (header.getUint32(0, true) !== ELF_MAGIC || order !== 1) broken();
  if (!isWide && !(elfClass === 1 && machine === EM_386)) broken();
  const wordOf = (view: DataView, wide: number, narrow: number): number =>
    isWide ? Number(view.getBigUint64(wide, true)) : view.getUint32(narrow, true);
  const start = wordOf(header, 32, 28);
  const entrySize = header.getUint16(isWide ? 54 : 42, true);
  const count = header.getUint16(isWide ? 56 : 44, true);
  if (entrySize < (isWide ? 56 : 32) || start + entrySize * count > size) broken();
  const table = await readAt(file, start, entrySize * count);
  let segments = 0;
  for (let at = 0; at < table.byteLength; at += entrySize) {
    if (table.getUint32(at, true) !== PT_LOAD) continue;
    segments++;
    const segment = new DataView(table.buffer, at, entrySize);
    if (wordOf(segment, 8, 4) + wordOf(segment, 32, 16) > size) broken();
  }
  if (segments === 0) broken();
}

/** Reads what is known to be there. */
async function readAt(file: Deno.FsFile, offset: number, length: number): Promise<DataView<ArrayBuffer>> {
  const bytes = new Uint8Array(length);
  await file.seek(offset, Deno.SeekMode.Start);
  for (let at = 0; at < length;) {
    const count = await file.read(bytes.subarray(at));
    if (count === null) {
      throw new MachineError("Cannot read the kernel as it was cut short meanwhile: try again");
    }
    at += count;
  }
  return new DataView(bytes.buffer);
}

async function writeAll(file: Deno.FsFile, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
}
