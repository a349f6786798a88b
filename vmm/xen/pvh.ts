/**
 * What a PVH domain is made of before it runs: where its memory and its special pages are, what is in them, and the state of
 * its first vCPU (Xen 4.17 `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`).
 *
 * @module
 */

import { Struct } from "../../ffi/mod.ts";
import { HVM_SAVE, hvmCpu, hvmMtrr, saveDescriptor } from "../../ffi/xen/mod.ts";
import { ACPI_ADDRESS, acpiTables } from "../boot/acpi.ts";
import {
  type BootMemory,
  LINUX_LAYOUT,
  loadLinux,
  type MemoryMapEntry,
  openBootFile,
} from "../boot/linux.ts";
import { MEMORY_HOLE_END, MEMORY_HOLE_START } from "../devices/guest_memory.ts";
import { MachineError } from "../errors.ts";

const PAGE = 4096;
/** Pages of the largest extents that memory is populated by, 1 GiB, 2 MiB and 4 KiB, as powers of two. */
const ORDERS = [18, 9, 0] as const;
const E820_RAM = 1;
const E820_RESERVED = 2;
/** Below it is the extended BIOS data area, and nothing of use from there to 1 MiB. */
const LOW_MEMORY_END = 0x9_fc00;
const HIGH_MEMORY = 0x10_0000;

/** Frames that the domain shares with Xen and the host (Xen 4.17 `tools/libs/guest/xg_dom_x86.c`, `special_pages`). */
export const SPECIAL_FRAMES = {
  /** The first of them. */
  first: 0xf_eff8n,
  /** How many there are. */
  count: 8,
  /** Ring of xenstore. */
  store: 0xf_effcn,
  /** Page tables that map the first 4 GiB to themselves, for processors that cannot do without. */
  identity: 0xf_effen,
  /** Ring of the console. */
  console: 0xf_efffn,
} as const;

/** Memory that begins at an aligned frame. */
export interface Extent {
  /** Its first frame. */
  readonly frame: bigint;
  /** Power of two of its pages. */
  readonly order: number;
}

/**
 * Tells where a domain's memory is.
 *
 * @param size Size in bytes
 * @returns Its parts, by address
 */
export function memoryRegions(size: number): { readonly address: number; readonly length: number }[] {
  const low = Math.min(size, MEMORY_HOLE_START);
  return [
    { address: 0, length: low },
    ...(size > low ? [{ address: MEMORY_HOLE_END, length: size - low }] : []),
  ];
}

/**
 * Cuts memory into the largest aligned extents.
 *
 * @param regions The memory
 * @returns The extents, grouped by order, the largest first
 */
export function memoryExtents(
  regions: readonly { readonly address: number; readonly length: number }[],
): Map<number, bigint[]> {
  const extents = new Map<number, bigint[]>(ORDERS.map((order) => [order, []]));
  for (const { address, length } of regions) {
    const end = (address + length) / PAGE;
    for (let frame = address / PAGE; frame < end;) {
      const order = ORDERS.find((each) => frame % 2 ** each === 0 && frame + 2 ** each <= end)!;
      extents.get(order)!.push(BigInt(frame));
      frame += 2 ** order;
    }
  }
  return extents;
}

/**
 * Tells what is where in a domain's address space.
 *
 * @param size Size of its memory in bytes
 * @returns The map, by address
 */
export function pvhMemoryMap(size: number): MemoryMapEntry[] {
  const [low, high] = memoryRegions(size);
  return [
    { address: 0, length: LOW_MEMORY_END, type: E820_RAM },
    { address: LOW_MEMORY_END, length: HIGH_MEMORY - LOW_MEMORY_END, type: E820_RESERVED },
    { address: HIGH_MEMORY, length: low!.length - HIGH_MEMORY, type: E820_RAM },
    {
      address: Number(SPECIAL_FRAMES.first) * PAGE,
      length: SPECIAL_FRAMES.count * PAGE,
      type: E820_RESERVED,
    },
    ...(high ? [{ address: high.address, length: high.length, type: E820_RAM }] : []),
  ];
}

/** What a domain boots. */
export interface PvhBoot {
  /** Path of an ELF kernel. */
  readonly kernel: string;
  /** What the kernel is called in messages. */
  readonly kernelName: string;
  /** Paths of the parts of the initramfs. */
  readonly initramfs: readonly string[];
  /** Command line. */
  readonly commandLine: string;
  /** vCPUs. */
  readonly cpus: number;
  /** Size of its memory in bytes. */
  readonly memory: number;
}

/** Where the first vCPU begins. */
export interface PvhEntry {
  /** Address of the first instruction. */
  readonly address: number;
  /** Address of the start info. */
  readonly startInfo: number;
}

/**
 * Puts a kernel, its initramfs and what it is told into a domain's memory.
 *
 * @param memory The memory, populated
 * @param boot What it boots
 * @returns Where it begins
 * @throws {MachineError} If the kernel has no entry for PVH, is damaged, or needs more memory
 */
export function loadPvh(memory: BootMemory, boot: PvhBoot): PvhEntry {
  using files = new DisposableStack();
  const entry = loadLinux(memory, {
    kernel: files.use(openBootFile("kernel", boot.kernel)),
    kernelName: boot.kernelName,
    initramfs: boot.initramfs.map((path) => files.use(openBootFile("initramfs", path))),
    commandLine: boot.commandLine,
    memoryMap: pvhMemoryMap(boot.memory),
  });
  if (entry.protocol !== "pvh") {
    throw new MachineError(
      `Cannot boot the kernel "${boot.kernelName}" in a PVH domain as it has no entry for PVH (the ELF note ` +
        `XEN_ELFNOTE_PHYS32_ENTRY): give a kernel that was built with CONFIG_PVH`,
    );
  }
  const tables = acpiTables({ cpus: boot.cpus, hasSerial: false, isXen: true });
  memory.range(ACPI_ADDRESS, tables.length).set(tables);
  return { address: entry.address, startInfo: LINUX_LAYOUT.startInfo };
}

/**
 * Makes the page tables that map the first 4 GiB to themselves, by pages of 4 MiB.
 *
 * @returns The page: 1024 entries that are present, writable, of the user, accessed, dirty and large
 */
export function identityPage(): Uint8Array<ArrayBuffer> {
  const page = new DataView(new ArrayBuffer(PAGE));
  for (let index = 0; index < 1024; index++) page.setUint32(4 * index, (index << 22 | 0xe7) >>> 0, true);
  return new Uint8Array(page.buffer);
}

/** MTRRs are on, and memory is written back unless they say else. */
const MTRR_WRITE_BACK = 0x806;
/** Registers of the first vCPU, beside where it begins: protected mode without paging, and flat 32-bit segments. */
const REGISTERS = {
  cr0: 0x11,
  dr6: 0xffff_0ff0,
  dr7: 0x400,
  cs_limit: 0xffff_ffff,
  ds_limit: 0xffff_ffff,
  es_limit: 0xffff_ffff,
  ss_limit: 0xffff_ffff,
  tr_limit: 0x67,
  cs_arbytes: 0xc9b,
  ds_arbytes: 0xc93,
  es_arbytes: 0xc93,
  ss_arbytes: 0xc93,
  tr_arbytes: 0x8b,
} as const;

/**
 * Makes the contexts to set, one after the other: memory types of every vCPU, then the registers of the first, which a guest
 * starts the others from.
 *
 * @param saved The domain's context, as Xen gives it
 * @param entry Where the first vCPU begins
 * @param cpus vCPUs
 * @returns The contexts
 * @throws {MachineError} If Xen's has no header
 */
export function pvhContexts(saved: Uint8Array, entry: PvhEntry, cpus: number): Uint8Array<ArrayBuffer>[] {
  const header = findRecord(saved, HVM_SAVE.HEADER);
  if (!header) {
    throw new MachineError("Cannot set up the domain's vCPU as Xen gives no header with its context");
  }
  const mtrr = new Struct(hvmMtrr).assign({ msr_mtrr_def_type: MTRR_WRITE_BACK });
  const cpu = new Struct(hvmCpu).assign({ ...REGISTERS, rbx: entry.startInfo, rip: entry.address });
  const context = (type: number, instance: number, body: Uint8Array) =>
    joinRecords(record(HVM_SAVE.HEADER, 0, header), record(type, instance, body), record(HVM_SAVE.END, 0));
  return [
    ...Array.from({ length: cpus }, (_, index) => context(HVM_SAVE.MTRR, index, mtrr.bytes)),
    context(HVM_SAVE.CPU, 0, cpu.bytes),
  ];
}

function findRecord(context: Uint8Array, type: number): Uint8Array | undefined {
  const bytes = context.slice();
  for (let at = 0; at + saveDescriptor.size <= bytes.length;) {
    const descriptor = new Struct(saveDescriptor, bytes.buffer, at);
    const found = Number(descriptor.get("typecode"));
    const start = at + saveDescriptor.size;
    const next = start + Number(descriptor.get("length"));
    if (next > bytes.length || found === HVM_SAVE.END && type !== found) return undefined;
    if (found === type) return bytes.subarray(start, next);
    at = next;
  }
  return undefined;
}

function record(typecode: number, instance: number, body: Uint8Array = new Uint8Array()): Uint8Array[] {
  return [new Struct(saveDescriptor).assign({ typecode, instance, length: body.length }).bytes, body];
}

function joinRecords(...records: readonly Uint8Array[][]): Uint8Array<ArrayBuffer> {
  return new Uint8Array(records.flat().flatMap((bytes) => [...bytes]));
}
