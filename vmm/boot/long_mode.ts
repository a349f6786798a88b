/**
 * The state that a 64-bit Linux entry wants: long mode, flat segments, and the first gibibyte mapped to itself (Linux 6.1
 * `Documentation/x86/boot.rst`, "64-bit Boot Protocol"; Intel SDM volume 3, chapters 3 and 4).
 *
 * @module
 */

import { kvmSegment, type kvmSregs, Struct } from "../../ffi/mod.ts";

/** Where the tables are in guest memory, in bytes. */
export const LONG_MODE_LAYOUT = {
  /** Global descriptor table. */
  gdt: 0x500,
  /** Interrupt descriptor table: empty, since interrupts are off. */
  idt: 0x520,
  /** Level 4 page table. */
  pml4: 0x9000,
  /** Level 3 page table. */
  pdpt: 0xa000,
  /** Level 2 page table, with 512 pages of 2 MiB. */
  pd: 0xb000,
} as const;

/** A segment descriptor: its selector, and its access and flag bits as in bits 40 to 55 of the descriptor. */
const SEGMENTS = {
  code: { selector: 0x08, bits: 0xa09b },
  data: { selector: 0x10, bits: 0xc093 },
  task: { selector: 0x18, bits: 0x808b },
} as const;
/** The same for 32-bit code. */
const CODE_32 = { selector: 0x08, bits: 0xc09b } as const;

const CR0_PE = 1n;
const CR0_ET = 1n << 4n;
const CR0_PG = 1n << 31n;
const CR4_PAE = 1n << 5n;
const EFER_LME = 1n << 8n;
const EFER_LMA = 1n << 10n;
const PAGE_PRESENT_WRITABLE = 3n;
const PAGE_LARGE = 1n << 7n;

/**
 * Makes a descriptor of base 0 and the largest limit.
 *
 * @param bits Access and flag bits
 * @returns The descriptor
 */
function descriptor(bits: number): bigint {
  const wide = BigInt(bits);
  return 0xffffn | (wide & 0xffn) << 40n | 0xfn << 48n | (wide >> 12n & 0xfn) << 52n;
}

/**
 * Writes descriptor and page tables.
 *
 * @param memory Guest memory from address 0, at least 0xC000 bytes
 */
export function writeLongModeTables(memory: ArrayBuffer): void {
  const view = new DataView(memory);
  const { gdt, idt, pml4, pdpt, pd } = LONG_MODE_LAYOUT;
  view.setBigUint64(gdt, 0n, true);
  for (const { selector, bits } of Object.values(SEGMENTS)) {
    view.setBigUint64(gdt + selector, descriptor(bits), true);
  }
  view.setBigUint64(idt, 0n, true);
  view.setBigUint64(pml4, BigInt(pdpt) | PAGE_PRESENT_WRITABLE, true);
  view.setBigUint64(pdpt, BigInt(pd) | PAGE_PRESENT_WRITABLE, true);
  for (let page = 0; page < 512; page++) {
    view.setBigUint64(pd + 8 * page, BigInt(page) << 21n | PAGE_PRESENT_WRITABLE | PAGE_LARGE, true);
  }
}

type SystemRegisters = Struct<typeof kvmSregs.fields>;
type Descriptor = { readonly selector: number; readonly bits: number };

function setSegments(registers: SystemRegisters, code: Descriptor): void {
  const segment = (name: "cs" | "ds" | "es" | "fs" | "gs" | "ss" | "tr", { selector, bits }: Descriptor) => {
    const struct = new Struct(kvmSegment).assign({
      base: 0,
      limit: 0xffff_ffff,
      selector,
      type: bits & 0xf,
      s: bits >> 4 & 1,
      dpl: bits >> 5 & 3,
      present: bits >> 7 & 1,
      avl: bits >> 12 & 1,
      l: bits >> 13 & 1,
      db: bits >> 14 & 1,
      g: bits >> 15 & 1,
    });
    struct.bytes.forEach((byte, index) => registers.set(name, byte, index));
  };
  segment("cs", code);
  for (const name of ["ds", "es", "fs", "gs", "ss"] as const) segment(name, SEGMENTS.data);
  segment("tr", SEGMENTS.task);
}

/**
 * Puts a vCPU into long mode with these tables.
 *
 * @param registers Its system registers
 */
export function enterLongMode(registers: SystemRegisters): void {
  const { gdt, idt, pml4 } = LONG_MODE_LAYOUT;
  setSegments(registers, SEGMENTS.code);
  registers.assign({
    "gdt.base": gdt,
    "gdt.limit": 4 * 8 - 1,
    "idt.base": idt,
    "idt.limit": 7,
    cr3: pml4,
    cr4: registers.get("cr4") | CR4_PAE,
    cr0: registers.get("cr0") | CR0_PE | CR0_PG,
    efer: registers.get("efer") | EFER_LME | EFER_LMA,
  });
}

/**
 * Puts a vCPU into 32-bit protected mode without paging, as a PVH entry wants it. Segments are only in the registers: the
 * kernel loads its own table before it loads a segment.
 *
 * @param registers Its system registers
 */
export function enterProtectedMode(registers: SystemRegisters): void {
  setSegments(registers, CODE_32);
  registers.assign({ cr0: CR0_PE | CR0_ET, cr4: 0, efer: 0 });
}
