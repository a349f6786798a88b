/**
 * ACPI tables of our machines: the hardware-reduced kind, which tells a guest that there is no legacy to look for
 * (ACPI 6.4, chapters 5, 19 and 20).
 *
 * @module
 */

import { ECAM, PCI_WINDOW } from "../devices/pci_bus.ts";

/** Where the tables are in guest memory: below 1 MiB, where guests look for the first of them. */
export const ACPI_ADDRESS = 0xe_0000;
/** Room for the tables, in bytes. */
export const ACPI_LENGTH = 0x1_0000;

/** Ports by which a guest sleeps and resets, and the interrupt of the power button. */
export const POWER = {
  /** Sleep control register: type of the sleep in bits 2 to 4, and bit 5 to enter it. */
  sleepPort: 0x600,
  /** Sleep status register. */
  sleepStatusPort: 0x601,
  /** Type of S5, soft off. */
  sleepTypeOff: 5,
  /** Reset register: the keyboard controller's. */
  resetPort: 0x64,
  /** What is written to reset. */
  resetValue: 0xfe,
  /** Interrupt of the button. */
  buttonGsi: 9,
} as const;

/** Interrupt controllers of the kernel (Linux 6.1 `arch/x86/include/asm/apicdef.h`). */
const LOCAL_APIC = 0xfee0_0000;
const IO_APIC = 0xfec0_0000;
const RSDP_LENGTH = 36;
const HEADER_LENGTH = 36;
const FADT_LENGTH = 276;
const SERIAL_PORT = 0x3f8;
const SERIAL_GSI = 4;

/** Flags of the FADT (ACPI 6.4, table 5.10): HW_REDUCED_ACPI, RESET_REG_SUP, and that the power button is in the DSDT. */
const HARDWARE_REDUCED = 1 << 20;
const FADT_FLAGS = HARDWARE_REDUCED | 1 << 10 | 1 << 4;
/** Boot architecture flags (table 5.11): no VGA, no real-time clock that needs waiting for; and no keyboard controller. */
const BOOT_FLAGS = 1 << 2 | 1 << 5;

/** What the tables tell. */
export interface AcpiOptions {
  /** Number of vCPUs; their APIC numbers are 0 and so on. */
  readonly cpus: number;
  /** Whether there is a serial port. */
  readonly hasSerial: boolean;
  /** Whether there is nothing but vCPUs, as in a PVH domain of Xen, whose APIC numbers are 0, 2 and so on. */
  readonly isXen?: boolean;
}

/**
 * Makes the tables.
 *
 * @param options What they tell
 * @returns Bytes for {@linkcode ACPI_ADDRESS}; the root pointer is first
 */
export function acpiTables(options: AcpiOptions): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(ACPI_LENGTH);
  let end = align(RSDP_LENGTH);
  const place = (table: Uint8Array): number => {
    const at = end;
    if (at + table.length > bytes.length) throw new RangeError("Cannot fit the ACPI tables in their room");
    bytes.set(table, at);
    end = align(at + table.length);
    return ACPI_ADDRESS + at;
  };
  const dsdt = place(table("DSDT", 2, dsdtBody(options)));
  const tables = [
    place(table("FACP", 6, fadtBody(dsdt, options))),
    place(table("APIC", 5, madtBody(options))),
    ...(options.isXen ? [] : [place(table("MCFG", 1, mcfgBody()))]),
  ];
  const pointers = new Uint8Array(8 * tables.length);
  tables.forEach((address, index) => writeWide(pointers, 8 * index, address));
  const xsdt = place(table("XSDT", 1, pointers));
  const rsdp = bytes.subarray(0, RSDP_LENGTH);
  rsdp.set(ascii("RSD PTR "), 0);
  rsdp.set(ascii(OEM), 9);
  rsdp[15] = 2;
  new DataView(rsdp.buffer).setUint32(20, RSDP_LENGTH, true);
  writeWide(rsdp, 24, xsdt);
  rsdp[8] = checksum(rsdp.subarray(0, 20));
  rsdp[32] = checksum(rsdp);
  return bytes.slice(0, end);
}

const OEM = "HYPTOP";

function align(offset: number): number {
  return (offset + 63) & ~63;
}

function ascii(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}

/** The byte that makes all bytes sum up to zero. */
function checksum(bytes: Uint8Array): number {
  return -bytes.reduce((sum, byte) => sum + byte, 0) & 0xff;
}

function writeWide(bytes: Uint8Array, offset: number, value: number): void {
  new DataView(bytes.buffer, bytes.byteOffset).setBigUint64(offset, BigInt(value), true);
}

function table(signature: string, revision: number, body: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(HEADER_LENGTH + body.length);
  const view = new DataView(bytes.buffer);
  bytes.set(ascii(signature), 0);
  view.setUint32(4, bytes.length, true);
  bytes[8] = revision;
  bytes.set(ascii(OEM), 10);
  bytes.set(ascii("HYPERTOP"), 16);
  view.setUint32(24, 1, true);
  bytes.set(ascii("HYPT"), 28);
  view.setUint32(32, 1, true);
  bytes.set(body, HEADER_LENGTH);
  bytes[9] = checksum(bytes);
  return bytes;
}

/** Offsets are those of ACPI 6.4, table 5.9, less the header. */
function fadtBody(dsdt: number, { isXen }: AcpiOptions): Uint8Array {
  const bytes = new Uint8Array(FADT_LENGTH - HEADER_LENGTH);
  const view = new DataView(bytes.buffer);
  const at = (offset: number) => offset - HEADER_LENGTH;
  view.setUint32(at(40), dsdt, true);
  view.setUint16(at(109), BOOT_FLAGS, true);
  view.setUint32(at(112), isXen ? HARDWARE_REDUCED : FADT_FLAGS, true);
  const port = (offset: number, number: number) => {
    // Generic address: system I/O, 8 bits, byte access.
    bytes.set([1, 8, 0, 1], at(offset));
    writeWide(bytes, at(offset) + 4, number);
  };
  bytes[at(131)] = 4;
  writeWide(bytes, at(140), dsdt);
  if (!isXen) {
    port(116, POWER.resetPort);
    bytes[at(128)] = POWER.resetValue;
    port(244, POWER.sleepPort);
    port(256, POWER.sleepStatusPort);
  }
  bytes.set(ascii("HYPERTOP"), at(268));
  return bytes;
}

/** Multiple APIC description (section 5.2.12). */
function madtBody({ cpus, isXen }: AcpiOptions): Uint8Array {
  const entries: number[] = [];
  const wide = (value: number) => [value & 0xff, value >> 8 & 0xff, value >> 16 & 0xff, value >>> 24];
  // No dual 8259.
  entries.push(...wide(LOCAL_APIC), ...wide(0));
  for (let cpu = 0; cpu < cpus; cpu++) entries.push(0, 8, cpu, isXen ? 2 * cpu : cpu, ...wide(1));
  if (isXen) return new Uint8Array(entries);
  entries.push(1, 12, 0, 0, ...wide(IO_APIC), ...wide(0));
  // LINT1 of every local APIC is the NMI.
  entries.push(4, 6, 0xff, 0, 0, 1);
  return new Uint8Array(entries);
}

/** Memory-mapped configuration space (PCI Firmware 3.3, section 4.1.2). */
function mcfgBody(): Uint8Array {
  const bytes = new Uint8Array(8 + 16);
  writeWide(bytes, 8, ECAM.address);
  bytes[8 + 11] = ECAM.length / 0x10_0000 - 1;
  return bytes;
}

// AML (ACPI 6.4, section 20.2): each function gives the bytes of one term.

const bytesOf = (value: number, length: number): number[] =>
  Array.from({ length }, (_, index) => Math.floor(value / 2 ** (8 * index)) & 0xff);

/** A length that counts itself. */
function withLength(body: readonly number[]): number[] {
  if (body.length + 1 < 0x40) return [body.length + 1, ...body];
  const length = body.length + 3;
  return [0x80 | length & 0xf, length >> 4 & 0xff, length >> 12 & 0xff, ...body];
}

const segment = (text: string): number[] => [...ascii(text.padEnd(4, "_"))];
/** A name from the root, such as `\_SB_`. */
const rooted = (text: string): number[] => [0x5c, ...segment(text)];

function integer(value: number): number[] {
  if (value <= 1) return [value];
  if (value <= 0xff) return [0x0a, value];
  if (value <= 0xffff) return [0x0b, ...bytesOf(value, 2)];
  return [0x0c, ...bytesOf(value, 4)];
}

const text = (value: string): number[] => [0x0d, ...ascii(value), 0];
const name = (path: readonly number[], value: readonly number[]): number[] => [0x08, ...path, ...value];
const named = (path: string, value: readonly number[]): number[] => name(segment(path), value);
const pack = (items: readonly (readonly number[])[]): number[] => [
  0x12,
  ...withLength([items.length, ...items.flat()]),
];
const buffer = (content: readonly number[]): number[] => [
  0x11,
  ...withLength([...integer(content.length), ...content]),
];
const device = (path: string, ...terms: readonly number[][]): number[] => [
  0x5b,
  0x82,
  ...withLength([...segment(path), ...terms.flat()]),
];
const scope = (path: readonly number[], ...terms: readonly number[][]): number[] => [
  0x10,
  ...withLength([...path, ...terms.flat()]),
];
const method = (path: string, args: number, ...terms: readonly number[][]): number[] => [
  0x14,
  ...withLength([...segment(path), args, ...terms.flat()]),
];

/** A compressed EISA number: three letters of 5 bits, and four hexadecimal digits. */
function eisa(id: string): number[] {
  const letter = (index: number) => id.charCodeAt(index) - 0x40;
  const high = letter(0) << 10 | letter(1) << 5 | letter(2);
  const low = Number.parseInt(id.slice(3), 16);
  return [0x0c, high >> 8, high & 0xff, low >> 8, low & 0xff];
}

/** A resource template: descriptors and the end tag, whose checksum of zero means that there is none. */
const resources = (...descriptors: readonly number[][]): number[] => buffer([...descriptors.flat(), 0x79, 0]);
/** Word address space for bus numbers (section 6.4.3.5.3). */
const busNumbers = (first: number, last: number): number[] => [
  ...[0x88, 13, 0, 2, 0x0c, 0],
  ...[0, first, last, 0, last - first + 1].flatMap((value) => bytesOf(value, 2)),
];
/** Doubleword address space for memory, not cached, writable (section 6.4.3.5.2). */
const memoryWindow = (address: number, length: number): number[] => [
  ...[0x87, 23, 0, 0, 0x0c, 1],
  ...[0, address, address + length - 1, 0, length].flatMap((value) => bytesOf(value, 4)),
];
/** Fixed memory (section 6.4.3.4). */
const fixedMemory = (address: number, length: number): number[] => [
  ...[0x86, 9, 0, 1],
  ...bytesOf(address, 4),
  ...bytesOf(length, 4),
];
/** Ports (section 6.4.2.5). */
const ports = (first: number, length: number): number[] => [
  ...[0x47, 1],
  ...bytesOf(first, 2),
  ...bytesOf(first, 2),
  1,
  length,
];
/** An extended interrupt: consumer, edge, active high, exclusive (section 6.4.3.6). */
const interrupt = (gsi: number): number[] => [0x89, 6, 0, 3, 1, ...bytesOf(gsi, 4)];

function dsdtBody(options: AcpiOptions): Uint8Array {
  const SB = rooted("_SB");
  const cpus = Array.from(
    { length: options.cpus },
    (_, cpu) =>
      device(
        `C${cpu.toString(16).toUpperCase().padStart(3, "0")}`,
        named("_HID", text("ACPI0007")),
        named("_UID", integer(cpu)),
      ),
  );
  if (options.isXen) return new Uint8Array(scope(SB, ...cpus));
  const sleepOff = name(rooted("_S5"), pack([integer(POWER.sleepTypeOff), [0], [0], [0]]));
  const bus = device(
    "PCI0",
    named("_HID", eisa("PNP0A08")),
    named("_CID", eisa("PNP0A03")),
    named("_SEG", [0]),
    named("_BBN", [0]),
    named("_UID", [0]),
    named(
      "_CRS",
      resources(
        busNumbers(0, ECAM.length / 0x10_0000 - 1),
        memoryWindow(PCI_WINDOW.address, PCI_WINDOW.length),
      ),
    ),
  );
  // Tells that configuration space is taken, which guests want to be told before they use it.
  const board = device(
    "MBRD",
    named("_HID", eisa("PNP0C02")),
    named("_CRS", resources(fixedMemory(ECAM.address, ECAM.length))),
  );
  const button = device("PWRB", named("_HID", eisa("PNP0C0C")), named("_UID", [0]));
  const events = device(
    "GED_",
    named("_HID", text("ACPI0013")),
    named("_UID", [0]),
    named("_CRS", resources(interrupt(POWER.buttonGsi))),
    // Notify (\_SB.PWRB, 0x80): the button was pressed.
    method("_EVT", 1, [0x86, 0x5c, 0x2e, ...segment("_SB"), ...segment("PWRB"), ...integer(0x80)]),
  );
  const serial = options.hasSerial
    ? [device(
      "COM1",
      named("_HID", eisa("PNP0501")),
      named("_UID", [0]),
      named("_CRS", resources(ports(SERIAL_PORT, 8), interrupt(SERIAL_GSI))),
    )]
    : [];
  return new Uint8Array([...sleepOff, ...scope(SB, bus, board, button, events, ...serial, ...cpus)]);
}
