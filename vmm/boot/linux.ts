/**
 * Linux's boot protocol on x86-64: bzImage by its 64-bit entry, and ELF kernels by that, by PVH or by the 32-bit entry (Linux 6.1
 * `Documentation/x86/boot.rst` and `zero-page.rst`; Xen 4.17 `xen/include/public/arch-x86/hvm/start_info.h`).
 *
 * @module
 */

import { type GuestMemory, MEMORY_HOLE_END } from "../devices/guest_memory.ts";
import { ECAM } from "../devices/pci_bus.ts";
import { MachineError } from "../errors.ts";
import { ACPI_ADDRESS, POWER } from "./acpi.ts";

/** Memory of a guest, to put things into. */
export type BootMemory = Pick<GuestMemory, "regions" | "range">;

/** Where things are in guest memory, in bytes. */
export const LINUX_LAYOUT = {
  /** `struct hvm_start_info` and its module list, for PVH. */
  startInfo: 0x6000,
  /** `struct boot_params`. */
  zeroPage: 0x7000,
  /** Top of a stack of one page. */
  stack: 0x8ff0,
  /** Command line. */
  commandLine: 0x2_0000,
  /** Where memory for kernels begins. */
  kernel: 0x10_0000,
} as const;

/** Longest command line, with its NUL. */
const COMMAND_LINE_ROOM = 0x8000;
/** Below it is the extended BIOS data area, and nothing of use from there to 1 MiB. */
const LOW_MEMORY_END = 0x9_fc00;
const HIGH_MEMORY = 0x10_0000;
/** What is told apart in the memory map (ACPI 6.4, table 15.4). */
const E820_RAM = 1;
const E820_RESERVED = 2;
const PAGE = 4096;
/** How much of a kernel's file is looked at before it is loaded. */
const HEADER_ROOM = 4096;
/** Longest segment of notes that is looked through. */
const NOTES_ROOM = 0x1_0000;

const SETUP_HEADER = 0x1f1;
const BOOT_FLAG = 0xaa55;
const HEADER_MAGIC = 0x5372_6448;
const XLF_KERNEL_64 = 1;
/** Protocol 2.12 is the first that tells of the 64-bit entry. */
const OLDEST_PROTOCOL = 0x020c;
const ENTRY_64 = 0x200;

const ELF_MAGIC = 0x464c_457f;
const PT_LOAD = 1;
const PT_NOTE = 4;
const EM_386 = 3;
const EM_X86_64 = 62;
const XEN_ELFNOTE_PHYS32_ENTRY = 18;
const START_INFO_MAGIC = 0x336e_c578;

/**
 * Where a guest jumps to in real mode when it knows no other way to reset: a kernel with hardware-reduced ACPI and without
 * EFI does. There is no firmware, but this.
 */
const RESET_VECTOR = 0xf_fff0;
/** mov al, 0xfe; out 0x64, al; hlt; jmp -3 */
const RESET_CODE: readonly number[] = [0xb0, POWER.resetValue, 0xe6, POWER.resetPort, 0xf4, 0xeb, 0xfd];

/** A part of the guest's address space, and whether it is memory. */
export interface MemoryMapEntry {
  /** Where it begins. */
  readonly address: number;
  /** Size in bytes. */
  readonly length: number;
  /** 1 for memory, 2 for what must be left alone. */
  readonly type: number;
}

/** How the first vCPU enters a kernel. */
export interface KernelEntry {
  /**
   * What it expects: long mode with the zero page in RSI, or 32-bit protected mode with the zero page in ESI (`linux32`) or
   * with the start info in EBX (`pvh`).
   */
  readonly protocol: "linux64" | "linux32" | "pvh";
  /** Address of the first instruction. */
  readonly address: number;
}

/** A file that is read straight into guest memory. */
export interface BootFile {
  /** Size in bytes. */
  readonly length: number;
  /**
   * Reads.
   *
   * @param offset Where in the file; all that is asked for is in it
   * @param target What to fill
   */
  read(offset: number, target: Uint8Array<ArrayBuffer>): void;
}

/**
 * Opens a file to boot from.
 *
 * @param what What it is, for messages, such as "kernel"
 * @param path Its path
 * @returns The file
 * @throws {MachineError} If it cannot be read
 */
export function openBootFile(what: string, path: string): BootFile & Disposable {
  const fail = (cause: unknown): never => {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new MachineError(`Cannot read the ${what} "${path}" as ${reason}: give a file that is there`, {
      cause,
    });
  };
  try {
    const file = Deno.openSync(path);
    return {
      length: file.statSync().size,
      read(offset, target) {
        file.seekSync(offset, Deno.SeekMode.Start);
        for (let at = 0; at < target.length;) {
          const count = file.readSync(target.subarray(at)) ?? fail("it was cut short meanwhile");
          at += count;
        }
      },
      [Symbol.dispose]: () => file.close(),
    };
  } catch (cause) {
    return fail(cause);
  }
}

/** What to boot. */
export interface LinuxBoot {
  /** The kernel's file. */
  readonly kernel: BootFile;
  /** What the kernel is called in messages. */
  readonly kernelName: string;
  /** Parts of the initramfs, in order; each begins at a multiple of four. */
  readonly initramfs: readonly BootFile[];
  /** Command line. */
  readonly commandLine: string;
  /** What is where, for machines that are not laid out as {@linkcode memoryMap} says. */
  readonly memoryMap?: readonly MemoryMapEntry[];
}

/**
 * Tells what is where in the guest's address space.
 *
 * @param memory Memory of the guest
 * @returns The map, by address
 */
export function memoryMap(memory: BootMemory): MemoryMapEntry[] {
  const [low, high] = memory.regions;
  return [
    { address: 0, length: LOW_MEMORY_END, type: E820_RAM },
    { address: LOW_MEMORY_END, length: HIGH_MEMORY - LOW_MEMORY_END, type: E820_RESERVED },
    { address: HIGH_MEMORY, length: low!.length - HIGH_MEMORY, type: E820_RAM },
    { address: ECAM.address, length: ECAM.length, type: E820_RESERVED },
    ...(high ? [{ address: MEMORY_HOLE_END, length: high.length, type: E820_RAM }] : []),
  ];
}

/**
 * Puts a kernel, its initramfs, its command line and what it is told into memory.
 *
 * @param memory Memory of the guest
 * @param boot What to boot
 * @returns How to enter the kernel
 * @throws {MachineError} If the file is no kernel that can be booted, or memory is too small
 */
export function loadLinux(memory: BootMemory, boot: LinuxBoot): KernelEntry {
  const { kernel, kernelName } = boot;
  memory.range(RESET_VECTOR, RESET_CODE.length).set(RESET_CODE);
  const fail = (reason: string): never => {
    throw new MachineError(`Cannot boot the kernel "${kernelName}" as ${reason}`);
  };
  const header = readPart(kernel, 0, Math.min(kernel.length, HEADER_ROOM));
  const view = new DataView(header.buffer);
  if (kernel.length >= 64 && view.getUint32(0, true) === ELF_MAGIC) {
    return loadElf(memory, boot, view, fail);
  }
  if (
    kernel.length < 0x270 || view.getUint16(0x1fe, true) !== BOOT_FLAG ||
    view.getUint32(0x202, true) !== HEADER_MAGIC
  ) {
    return fail("it is neither a bzImage nor an ELF file: give a Linux kernel for x86-64");
  }
  const version = view.getUint16(0x206, true);
  if (version < OLDEST_PROTOCOL || (view.getUint16(0x236, true) & XLF_KERNEL_64) === 0) {
    return fail("it has no 64-bit entry: give a 64-bit kernel of Linux 3.8 or later");
  }
  const setupSize = ((header[SETUP_HEADER] || 4) + 1) * 512;
  const initSize = view.getUint32(0x260, true);
  const end = LINUX_LAYOUT.kernel + Math.max(initSize, kernel.length - setupSize);
  // The kernel unpacks itself to its preferred address where it was put below that.
  const kernelEnd = Math.max(end, Number(view.getBigUint64(0x258, true)) + initSize);
  if (setupSize >= kernel.length) fail("it is cut short");
  if (kernelEnd > memory.regions[0]!.length) {
    fail(`it needs ${Math.ceil(kernelEnd / 2 ** 20)} MiB of memory: give the machine more`);
  }
  load(memory, LINUX_LAYOUT.kernel, kernel, setupSize, kernel.length - setupSize);
  const initramfs = placeInitramfs(memory, boot.initramfs, kernelEnd, view.getUint32(0x22c, true), fail);
  const limit = Math.min(view.getUint32(0x238, true) + 1 || 256, COMMAND_LINE_ROOM);
  writeCommandLine(memory, boot.commandLine, limit, fail);
  const page = newZeroPage(memory, boot);
  const setup = header.subarray(SETUP_HEADER, 0x202 + header[0x201]!);
  new Uint8Array(page.buffer, page.byteOffset + SETUP_HEADER).set(setup);
  finishZeroPage(page, initramfs);
  return { protocol: "linux64", address: LINUX_LAYOUT.kernel + ENTRY_64 };
}

function readPart(file: BootFile, offset: number, length: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(length);
  file.read(offset, bytes);
  return bytes;
}

function load(memory: BootMemory, address: number, file: BootFile, offset: number, length: number): void {
  file.read(offset, memory.range(address, length));
}

/** An empty page of the guest's. */
function emptyPage(memory: BootMemory, address: number): DataView<ArrayBuffer> {
  const { buffer, byteOffset, byteLength } = memory.range(address, PAGE).fill(0);
  return new DataView(buffer, byteOffset, byteLength);
}

function newZeroPage(memory: BootMemory, boot: LinuxBoot): DataView<ArrayBuffer> {
  const page = emptyPage(memory, LINUX_LAYOUT.zeroPage);
  const map = boot.memoryMap ?? memoryMap(memory);
  page.setUint8(0x1e8, map.length);
  map.forEach(({ address, length, type }, index) => {
    page.setBigUint64(0x2d0 + 20 * index, BigInt(address), true);
    page.setBigUint64(0x2d8 + 20 * index, BigInt(length), true);
    page.setUint32(0x2e0 + 20 * index, type, true);
  });
  page.setBigUint64(0x70, BigInt(ACPI_ADDRESS), true);
  return page;
}

function finishZeroPage(page: DataView, initramfs: { address: number; length: number } | undefined): void {
  // No registered loader.
  page.setUint8(0x210, 0xff);
  page.setUint32(0x228, LINUX_LAYOUT.commandLine, true);
  if (!initramfs) return;
  page.setUint32(0x218, initramfs.address, true);
  page.setUint32(0x21c, initramfs.length, true);
}

function placeInitramfs(
  memory: BootMemory,
  parts: readonly BootFile[],
  kernelEnd: number,
  highest: number,
  fail: (reason: string) => never,
): { address: number; length: number } | undefined {
  const length = parts.reduce((sum, part) => sum + (part.length + 3 & ~3), 0);
  if (length === 0) return undefined;
  const top = Math.min(memory.regions[0]!.length, highest + 1);
  const address = top - length - (top - length) % PAGE;
  if (address < kernelEnd) {
    const wanted = Math.ceil((kernelEnd + length) / 2 ** 20);
    fail(`it and its initramfs need ${wanted} MiB of memory: give the machine more`);
  }
  let at = address;
  for (const part of parts) {
    load(memory, at, part, 0, part.length);
    at += part.length + 3 & ~3;
  }
  return { address, length };
}

function writeCommandLine(
  memory: BootMemory,
  text: string,
  limit: number,
  fail: (reason: string) => never,
): void {
  const bytes = new TextEncoder().encode(`${text}\0`);
  if (bytes.length > limit) {
    fail(`its command line has ${bytes.length - 1} bytes and it takes ${limit - 1}: shorten cmdline`);
  }
  memory.range(LINUX_LAYOUT.commandLine, bytes.length).set(bytes);
}

function loadElf(
  memory: BootMemory,
  boot: LinuxBoot,
  view: DataView<ArrayBuffer>,
  fail: (reason: string) => never,
): KernelEntry {
  const [elfClass, order, machine] = [view.getUint8(4), view.getUint8(5), view.getUint16(18, true)];
  const isWide = elfClass === 2 && machine === EM_X86_64;
  if (order !== 1 || !isWide && !(elfClass === 1 && machine === EM_386)) {
    return fail("its ELF file is not for x86");
  }
  const { entry, headers, headerSize, headerCount } = isWide
    ? { entry: 24, headers: 32, headerSize: 54, headerCount: 56 }
    : { entry: 24, headers: 28, headerSize: 42, headerCount: 44 };
  const read = (from: DataView, offset: number) =>
    isWide ? Number(from.getBigUint64(offset, true)) : from.getUint32(offset, true);
  const size = view.getUint16(headerSize, true);
  const count = view.getUint16(headerCount, true);
  const start = read(view, headers);
  if (size < (isWide ? 56 : 32) || start + size * count > boot.kernel.length) {
    return fail("its ELF program headers are cut short");
  }
  const table = new DataView(readPart(boot.kernel, start, size * count).buffer);
  let kernelEnd: number = LINUX_LAYOUT.kernel;
  let pvhEntry: number | undefined;
  for (let index = 0; index < count; index++) {
    const at = size * index;
    const type = table.getUint32(at, true);
    const [offset, address, fileSize, memorySize] = (isWide ? [8, 24, 32, 40] : [4, 12, 16, 20]).map((
      field,
    ) => read(table, at + field)) as [number, number, number, number];
    if ((type === PT_LOAD || type === PT_NOTE) && offset + fileSize > boot.kernel.length) {
      return fail("a segment of its ELF file is cut short");
    }
    if (type === PT_LOAD) {
      if (address < LINUX_LAYOUT.kernel || memorySize < fileSize) {
        return fail("a segment of its ELF file is where the firmware's tables are");
      }
      if (address + memorySize > memory.regions[0]!.length) {
        const wanted = Math.ceil((address + memorySize) / 2 ** 20);
        return fail(`it needs ${wanted} MiB of memory: give the machine more`);
      }
      load(memory, address, boot.kernel, offset, fileSize);
      kernelEnd = Math.max(kernelEnd, address + memorySize);
    } else if (isWide && type === PT_NOTE && fileSize <= NOTES_ROOM) {
      pvhEntry ??= findPvhEntry(new DataView(readPart(boot.kernel, offset, fileSize).buffer));
    }
  }
  const initramfs = placeInitramfs(memory, boot.initramfs, kernelEnd, 0x7fff_ffff, fail);
  writeCommandLine(memory, boot.commandLine, COMMAND_LINE_ROOM, fail);
  if (pvhEntry !== undefined) {
    writeStartInfo(memory, boot, initramfs);
    return { protocol: "pvh", address: pvhEntry };
  }
  const page = newZeroPage(memory, boot);
  page.setUint16(0x1fe, BOOT_FLAG, true);
  page.setUint32(0x202, HEADER_MAGIC, true);
  page.setUint16(0x206, OLDEST_PROTOCOL, true);
  // Where the kernel may be put: multiples of 16 MiB.
  page.setUint32(0x230, 0x100_0000, true);
  finishZeroPage(page, initramfs);
  return { protocol: isWide ? "linux64" : "linux32", address: read(view, entry) };
}

function findPvhEntry(notes: DataView): number | undefined {
  const end = notes.byteLength;
  for (let at = 0; at + 12 <= end;) {
    const nameSize = notes.getUint32(at, true);
    const size = notes.getUint32(at + 4, true);
    const type = notes.getUint32(at + 8, true);
    if (nameSize > end || size > end) return undefined;
    const value = at + 12 + (nameSize + 3 & ~3);
    const next = value + (size + 3 & ~3);
    if (next > end) return undefined;
    const isXen = nameSize === 4 && notes.getUint32(at + 12, true) === 0x006e_6558;
    if (isXen && type === XEN_ELFNOTE_PHYS32_ENTRY && size >= 4) return notes.getUint32(value, true);
    at = next;
  }
  return undefined;
}

function writeStartInfo(
  memory: BootMemory,
  boot: LinuxBoot,
  initramfs: { address: number; length: number } | undefined,
): void {
  const info = emptyPage(memory, LINUX_LAYOUT.startInfo);
  const modules = 0x40;
  const mapAt = 0x80;
  const map = boot.memoryMap ?? memoryMap(memory);
  const put = (offset: number, value: number) => info.setBigUint64(offset, BigInt(value), true);
  info.setUint32(0, START_INFO_MAGIC, true);
  info.setUint32(4, 1, true);
  info.setUint32(12, initramfs ? 1 : 0, true);
  put(16, initramfs ? LINUX_LAYOUT.startInfo + modules : 0);
  put(24, LINUX_LAYOUT.commandLine);
  put(32, ACPI_ADDRESS);
  put(40, LINUX_LAYOUT.startInfo + mapAt);
  info.setUint32(48, map.length, true);
  if (initramfs) {
    put(modules, initramfs.address);
    put(modules + 8, initramfs.length);
  }
  map.forEach(({ address, length, type }, index) => {
    put(mapAt + 24 * index, address);
    put(mapAt + 24 * index + 8, length);
    info.setUint32(mapAt + 24 * index + 16, type, true);
  });
}
