/**
 * One PCI bus behind a root of our own. What the guest reads most is memory that it may only read: configuration space,
 * virtio's common configuration and the tables of MSI-X. So only writes leave the guest.
 *
 * @module
 */

import { KVM_MEM, Mapping } from "../../ffi/mod.ts";

/** Where the configuration space of the bus is: 4 KiB a function, 8 functions a device, 32 devices. */
export const ECAM = { address: 0xe000_0000, length: 0x10_0000 } as const;
/** Where the functions' memory is. */
export const PCI_WINDOW = { address: 0xd000_0000, length: 0x1000_0000 } as const;
/** Memory of each function: three pages that the guest reads without an exit, and one that it does not. */
export const FUNCTION_MEMORY = 0x4000;
/** How much of {@linkcode FUNCTION_MEMORY}, from its start, is memory that the guest may only read. */
export const READABLE_MEMORY = 0x3000;

const PAGE = 4096;
const FUNCTIONS_PER_DEVICE = 8;
const MAX_FUNCTIONS = 256;
/** Size of the configuration space that all functions have, in bytes. */
export const CONFIG_SIZE = 256;

/** Registers of configuration space (PCI Local Bus 3.0, section 6.1). */
const REGISTER = {
  vendor: 0x00,
  device: 0x02,
  command: 0x04,
  status: 0x06,
  revision: 0x08,
  programming: 0x09,
  classCode: 0x0a,
  headerType: 0x0e,
  bar0: 0x10,
  subsystemVendor: 0x2c,
  subsystem: 0x2e,
  capabilities: 0x34,
} as const;
const COMMAND_MEMORY = 2;
/** Memory, bus master, and interrupt disable. */
const COMMAND_MASK = 0x0406;
const STATUS_CAPABILITIES = 0x10;
const MULTI_FUNCTION = 0x80;
const BAR_64_BIT = 4;
const CAPABILITY_START = 0x40;

/** What the bus does to the machine. */
export interface PciHost {
  /** Whether memory that the guest may only read can be given to it. */
  readonly hasReadOnlyMemory: boolean;
  /** Gives the guest memory that it may only read, or takes it away with a length of 0. */
  setMemorySlot(
    options: {
      readonly slot: number;
      readonly address: number;
      readonly hostAddress: bigint;
      readonly length: number;
      readonly flags: number;
    },
  ): void;
}

/** A function's own part: what its memory does. */
export interface PciFunction {
  /** Vendor and device number, class code and its programming interface, subsystem number. */
  readonly identity: {
    readonly vendor: number;
    readonly device: number;
    readonly classCode: number;
    readonly subsystem: number;
  };
  /** Capabilities without their links: each begins with its number and a byte for the link. */
  readonly capabilities: readonly Uint8Array[];
  /** Whether it has memory. */
  readonly hasMemory: boolean;
  /**
   * Is told where its parts are.
   *
   * @param slot Its configuration space and memory
   */
  attach(slot: PciSlot): void;
  /**
   * Takes a write to its memory.
   *
   * @param offset Offset in its memory
   * @param data What was written
   */
  writeMemory(offset: number, data: Uint8Array): void;
  /**
   * Answers a read of its memory, where that is not {@linkcode READABLE_MEMORY}.
   *
   * @param offset Offset in its memory
   * @param data To be filled
   */
  readMemory(offset: number, data: Uint8Array): void;
  /**
   * Is told of a write to one of its capabilities; only bits of {@linkcode PciFunction.capabilityMasks} have changed.
   *
   * @param index Which capability
   * @param offset Where in it the write began
   */
  capabilityWritten(index: number, offset: number): void;
  /** Which bits of each capability the guest may write; none unless told. */
  readonly capabilityMasks: readonly (Uint8Array | undefined)[];
  /**
   * Is told that its memory moved, came or went.
   *
   * @param address Where it is now; undefined where the guest sees it nowhere
   */
  moved(address: number | undefined): void;
}

/** Where a function is, and what the guest reads of it. */
export interface PciSlot {
  /** Its configuration space. */
  readonly config: DataView<ArrayBuffer>;
  /** Where each capability begins in it. */
  readonly capabilities: readonly number[];
  /** What the guest reads of its memory without an exit. */
  readonly memory: DataView<ArrayBuffer>;
}

/**
 * Writes what a function is into its configuration space: its numbers, and its capabilities with their links.
 *
 * @param config Configuration space, of zeroes
 * @param each The function
 * @returns Where each capability begins
 * @throws {RangeError} If the capabilities do not fit
 */
export function writeConfigSpace(
  config: DataView,
  each: Pick<PciFunction, "identity" | "capabilities">,
): number[] {
  const { vendor, device, classCode, subsystem } = each.identity;
  config.setUint16(REGISTER.vendor, vendor, true);
  config.setUint16(REGISTER.device, device, true);
  config.setUint8(REGISTER.revision, 1);
  config.setUint8(REGISTER.programming, classCode & 0xff);
  config.setUint16(REGISTER.classCode, classCode >> 8, true);
  config.setUint16(REGISTER.subsystemVendor, vendor, true);
  config.setUint16(REGISTER.subsystem, subsystem, true);
  const capabilities: number[] = [];
  let at = CAPABILITY_START;
  let link: number = REGISTER.capabilities;
  for (const bytes of each.capabilities) {
    if (at + bytes.length > CONFIG_SIZE) {
      throw new RangeError("Cannot fit the capabilities of a function in its configuration space");
    }
    config.setUint8(link, at);
    link = at + 1;
    bytes.forEach((byte, offset) => config.setUint8(at + offset, byte));
    config.setUint8(link, 0);
    capabilities.push(at);
    at += (bytes.length + 3) & ~3;
  }
  if (capabilities.length > 0) config.setUint16(REGISTER.status, STATUS_CAPABILITIES, true);
  return capabilities;
}

/** Configuration space without a function answers with ones; all machines of the process share it. */
let absent: Mapping | undefined;

function absentSpace(): Mapping {
  if (!absent) {
    absent = new Mapping(ECAM.length);
    new Uint8Array(absent.buffer).fill(0xff);
  }
  return absent;
}

interface Entry {
  readonly function: PciFunction;
  readonly config: DataView<ArrayBuffer>;
  readonly masks: Uint8Array;
  readonly capabilities: readonly number[];
  readonly number: number;
  address: number;
  isMapped: boolean;
}

/** A PCI bus. Functions are added before the machine starts. */
export class PciBus implements Disposable {
  readonly #host: PciHost;
  readonly #firstSlot: number;
  readonly #entries: Entry[] = [];
  readonly #config: Mapping;
  readonly #memory: Mapping;

  /**
   * Makes a bus.
   *
   * @param host The machine
   * @param functions Its functions, in order: the first is 00.0, the ninth 01.0
   * @param firstSlot First of the memory slots that it may use
   */
  constructor(host: PciHost, functions: readonly PciFunction[], firstSlot: number) {
    if (functions.length > MAX_FUNCTIONS) {
      throw new RangeError(
        `Cannot put ${functions.length} functions on a bus: it has room for ${MAX_FUNCTIONS}`,
      );
    }
    this.#host = host;
    this.#firstSlot = firstSlot;
    const count = Math.ceil(functions.length / FUNCTIONS_PER_DEVICE) * FUNCTIONS_PER_DEVICE;
    this.#config = new Mapping(count * PAGE);
    new Uint8Array(this.#config.buffer).fill(0xff);
    this.#memory = new Mapping(Math.max(1, functions.length) * READABLE_MEMORY);
    functions.forEach((each, number) => this.#entries.push(this.#add(each, number)));
    if (!host.hasReadOnlyMemory) return;
    const flags = KVM_MEM.READONLY;
    host.setMemorySlot({
      slot: firstSlot,
      address: ECAM.address,
      hostAddress: this.#config.address,
      length: count * PAGE,
      flags,
    });
    if (count < MAX_FUNCTIONS) {
      host.setMemorySlot({
        slot: firstSlot + 1,
        address: ECAM.address + count * PAGE,
        hostAddress: absentSpace().address,
        length: (MAX_FUNCTIONS - count) * PAGE,
        flags,
      });
    }
  }

  /**
   * Takes a write to memory of the bus.
   *
   * @param address Where
   * @param data What
   * @returns Whether it belongs to the bus
   */
  write(address: number, data: Uint8Array): boolean {
    if (address >= ECAM.address && address < ECAM.address + ECAM.length) {
      const entry = this.#entries[Math.floor((address - ECAM.address) / PAGE)];
      if (entry) this.#writeConfig(entry, (address - ECAM.address) % PAGE, data);
      return true;
    }
    const entry = this.#find(address);
    if (!entry) return false;
    const offset = address - entry.address;
    if (offset + data.length <= FUNCTION_MEMORY) entry.function.writeMemory(offset, data);
    return true;
  }

  /**
   * Answers a read from memory of the bus.
   *
   * @param address Where
   * @param data To be filled; it comes filled with ones
   * @returns Whether it belongs to the bus
   */
  read(address: number, data: Uint8Array): boolean {
    if (address >= ECAM.address && address < ECAM.address + ECAM.length) {
      const offset = address - ECAM.address;
      if (offset + data.length <= this.#config.length) {
        data.set(new Uint8Array(this.#config.buffer, offset, data.length));
      }
      return true;
    }
    const entry = this.#find(address);
    if (!entry) return false;
    const offset = address - entry.address;
    if (offset + data.length <= READABLE_MEMORY) {
      data.set(new Uint8Array(this.#memory.buffer, entry.number * READABLE_MEMORY + offset, data.length));
    } else if (offset >= READABLE_MEMORY && offset + data.length <= FUNCTION_MEMORY) {
      entry.function.readMemory(offset, data);
    }
    return true;
  }

  /**
   * Says in words whose memory an address is.
   *
   * @param address The address
   * @returns The words, for counts of exits
   */
  name(address: number): string {
    const isConfig = address >= ECAM.address && address < ECAM.address + ECAM.length;
    const number = isConfig ? Math.floor((address - ECAM.address) / PAGE) : this.#find(address)?.number;
    return `${isConfig ? "configuration" : "memory"} of function ${number}`;
  }

  /** Gives its memory back; the machine must be gone. */
  [Symbol.dispose](): void {
    this.#config[Symbol.dispose]();
    this.#memory[Symbol.dispose]();
  }

  #find(address: number): Entry | undefined {
    return this.#entries.find((each) =>
      each.isMapped && address >= each.address && address < each.address + FUNCTION_MEMORY
    );
  }

  #add(each: PciFunction, number: number): Entry {
    const config = new DataView(this.#config.buffer, number * PAGE, PAGE);
    new Uint8Array(this.#config.buffer, number * PAGE, PAGE).fill(0);
    const capabilities = writeConfigSpace(config, each);
    config.setUint8(REGISTER.headerType, number % FUNCTIONS_PER_DEVICE === 0 ? MULTI_FUNCTION : 0);
    const masks = new Uint8Array(CONFIG_SIZE);
    masks[REGISTER.command] = COMMAND_MASK & 0xff;
    masks[REGISTER.command + 1] = COMMAND_MASK >> 8;
    if (each.hasMemory) {
      const mask = ~(FUNCTION_MEMORY - 1);
      for (let byte = 0; byte < 4; byte++) masks[REGISTER.bar0 + byte] = mask >> 8 * byte & 0xff;
      masks.fill(0xff, REGISTER.bar0 + 4, REGISTER.bar0 + 8);
    }
    capabilities.forEach((at, index) => masks.set(each.capabilityMasks[index] ?? [], at));
    const memory = new DataView(this.#memory.buffer, number * READABLE_MEMORY, READABLE_MEMORY);
    each.attach({ config, capabilities, memory });
    const entry: Entry = { function: each, config, masks, capabilities, number, address: 0, isMapped: false };
    if (each.hasMemory) this.#setAddress(entry, homeOf(number));
    return entry;
  }

  #setAddress(entry: Entry, address: number): void {
    entry.config.setUint32(REGISTER.bar0, (address & 0xffff_fff0 | BAR_64_BIT) >>> 0, true);
    entry.config.setUint32(REGISTER.bar0 + 4, 0, true);
  }

  #writeConfig(entry: Entry, offset: number, data: Uint8Array): void {
    let first = -1;
    for (let index = 0; index < data.length; index++) {
      const at = offset + index;
      const mask = entry.masks[at] ?? 0;
      if (mask === 0) continue;
      if (first < 0) first = at;
      entry.config.setUint8(at, entry.config.getUint8(at) & ~mask | data[index]! & mask);
    }
    if (first < 0) return;
    if (first < REGISTER.bar0 + 8) this.#place(entry);
    else {
      const index = entry.capabilities.findLastIndex((start) => start <= first);
      if (index >= 0) entry.function.capabilityWritten(index, first - entry.capabilities[index]!);
    }
  }

  /** Puts the memory of a function where its registers say. */
  #place(entry: Entry): void {
    if (!entry.function.hasMemory) return;
    const isEnabled = (entry.config.getUint16(REGISTER.command, true) & COMMAND_MEMORY) !== 0;
    const low = (entry.config.getUint32(REGISTER.bar0, true) & ~(FUNCTION_MEMORY - 1)) >>> 0;
    const isInWindow = entry.config.getUint32(REGISTER.bar0 + 4, true) === 0 &&
      low >= PCI_WINDOW.address && low + FUNCTION_MEMORY <= PCI_WINDOW.address + PCI_WINDOW.length;
    const isMapped = isEnabled && isInWindow;
    if (isMapped === entry.isMapped && (!isMapped || low === entry.address)) return;
    // Two functions at one place: the guest gets what it asked for, as on real hardware, but not from the host's kernel.
    const isTaken = isMapped &&
      this.#entries.some((other) =>
        other !== entry && other.isMapped && other.address < low + FUNCTION_MEMORY &&
        low < other.address + FUNCTION_MEMORY
      );
    if (entry.isMapped) {
      entry.function.moved(undefined);
      this.#setMemory(entry, 0);
    }
    entry.isMapped = isMapped && !isTaken;
    entry.address = low;
    if (!entry.isMapped) return;
    this.#setMemory(entry, READABLE_MEMORY);
    entry.function.moved(low);
  }

  #setMemory(entry: Entry, length: number): void {
    if (!this.#host.hasReadOnlyMemory) return;
    this.#host.setMemorySlot({
      slot: this.#firstSlot + 2 + entry.number,
      address: entry.address,
      hostAddress: this.#memory.address + BigInt(entry.number * READABLE_MEMORY),
      length,
      flags: KVM_MEM.READONLY,
    });
  }
}

function homeOf(number: number): number {
  return PCI_WINDOW.address + number * FUNCTION_MEMORY;
}

/** The host bridge: it is there because a bus has one, and does nothing. */
export class HostBridge implements PciFunction {
  /** As QEMU's generic bridge, whose number every PCI database knows. */
  readonly identity = { vendor: 0x1b36, device: 0x0008, classCode: 0x06_0000, subsystem: 0x1100 };
  /** None. */
  readonly capabilities: readonly Uint8Array[] = [];
  /** None. */
  readonly capabilityMasks: readonly undefined[] = [];
  /** It has none. */
  readonly hasMemory = false;
  /** Needs nothing. */
  attach(): void {}
  /** Never called. */
  writeMemory(): void {}
  /** Never called. */
  readMemory(): void {}
  /** Never called. */
  capabilityWritten(): void {}
  /** Never called. */
  moved(): void {}
}
