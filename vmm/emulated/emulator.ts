/**
 * A 32-bit PC in WebAssembly (v86), as far as a machine of ours needs it: one processor, its memory, and the interrupt
 * controller, timer and clock that every PC has. Functions on its PCI bus are the machine's, and reached by ports: the
 * emulator can be interrupted at an access to a port, but not at one to memory.
 *
 * @module
 */

import { setTimeout } from "node:timers";
import { GuestMemory } from "../devices/guest_memory.ts";
import { MachineError } from "../errors.ts";
import { importNpm } from "../images/npm_library.ts";
import { InputTurn } from "./input_turn.ts";

/** Which emulator it is, and which of its saved states it can take. */
export const EMULATOR_VERSION = "0.5.462";
/**
 * Words for the kernel of every guest: what a machine without firmware lacks is not looked for, and what takes long and
 * nobody needs here is not done.
 */
export const KERNEL_WORDS: string = [
  "tsc=reliable",
  "noisapnp",
  "cryptomgr.notests",
  "initcall_blacklist=load_system_certificate_list,init_kprobe_trace,crypto_kdf108_init",
].join(" ");

/** Where control registers, flags and segments are left by a boot loader (Linux 6.1 `Documentation/x86/boot.rst`). */
const PROTECTED_MODE = 0x11;
const FLAT_LIMIT = 0xffff_ffff;
const CODE_SEGMENT = 1;
const SEGMENTS = 6;
const CODE = { selector: 0x10, access: 0x9b } as const;
const DATA = { selector: 0x18, access: 0x93 } as const;
const INTERRUPTS_ENABLED = 1 << 9;
/** How many ports each function has. */
export const FUNCTION_PORTS = 0x400;
const FIRST_PORT = 0x2000;
/** Places on the bus that the emulator's own functions leave free. */
const PLACES: readonly number[] = Array.from({ length: 30 }, (_, index) => index + 2)
  .filter((place) => ![0x12, 0x1e].includes(place));
/** Most functions of a machine. */
export const MAX_FUNCTIONS: number = PLACES.length;
/** Interrupt lines that no device of the emulator has to itself. */
const LINES: readonly number[] = [10, 11, 9, 5];
/** Offset of the byte in the state of an interrupt controller that tells which lines work by level. */
const LEVEL_TRIGGERED = 10;
/** Registers of configuration space (PCI Local Bus 3.0, section 6.1). */
const BAR_0 = 0x10;
const BAR_PORTS = 1;
const INTERRUPT_LINE = 0x3c;
const INTERRUPT_PIN = 0x3d;
/** Memory of a picture that nobody sees, in bytes: the least that there can be. */
const PICTURE_MEMORY = 1 << 16;

/** The part of the emulator's processor that is used here. */
interface Processor {
  readonly wasm_memory: WebAssembly.Memory;
  readonly mem8: Uint8Array;
  readonly cr: Int32Array;
  readonly flags: Int32Array;
  readonly protected_mode: Uint8Array;
  readonly is_32: Uint8Array;
  readonly stack_size_32: Uint8Array;
  readonly in_hlt: Uint8Array;
  readonly segment_is_null: Uint8Array;
  readonly segment_offsets: Int32Array;
  readonly segment_limits: Uint32Array;
  readonly segment_access_bytes: Uint8Array;
  readonly sreg: Uint16Array;
  readonly reg32: Int32Array;
  readonly instruction_pointer: Int32Array;
  readonly devices: {
    readonly pci: {
      register_device(
        device: { pci_id: number; pci_space: number[]; pci_bars: { size: number }[]; name: string },
      ): void;
    };
  };
  /** Called where the guest resets the machine. */
  reboot_internal(): void;
  get_pic_addr_master(): number;
  get_pic_addr_slave(): number;
  reset_cpu(): void;
  update_state_flags(): void;
  jit_clear_cache(): void;
  /** Called for pages that are empty in a saved state. */
  zero_memory(address: number, length: number): void;
  jit_dirty_cache(start: number, end: number): void;
  device_raise_irq(line: number): void;
  device_lower_irq(line: number): void;
}

/** The part of the emulator that is used here. */
interface V86 {
  readonly v86: {
    readonly cpu: Processor;
    yield(milliseconds: number, tick: number): void;
    yield_callback(tick: number): void;
  };
  add_listener(name: string, listener: (value: unknown) => void): void;
  run(): void;
  stop(): Promise<void>;
  destroy(): Promise<void>;
  save_state(): Promise<ArrayBuffer>;
  restore_state(state: ArrayBuffer): Promise<void>;
}

/** What is called by translated code. */
type Imports = Record<string, (...values: number[]) => number | void>;

/** A function on the PCI bus of a machine. */
export interface EmulatedFunction {
  /** Its configuration space, as it is at the start; where its ports are and its interrupt line are filled in. */
  readonly space: Uint8Array;
  /** Name for messages. */
  readonly name: string;
  /**
   * Answers a read of a port.
   *
   * @param offset Offset in its {@linkcode FUNCTION_PORTS}
   * @param length 1, 2 or 4 bytes
   */
  readPort(offset: number, length: number): number;
  /**
   * Takes a write to a port.
   *
   * @param offset Offset in its {@linkcode FUNCTION_PORTS}
   * @param value What was written
   * @param length 1, 2 or 4 bytes
   */
  writePort(offset: number, value: number, length: number): void;
}

/** Memory of an emulated machine: a part of the emulator's own, which moves when that grows. */
export class EmulatedMemory extends GuestMemory {
  readonly #processor: Processor;
  readonly #start: number;
  #bytes!: Uint8Array<ArrayBuffer>;
  #view!: DataView<ArrayBuffer>;
  #words!: Uint16Array<ArrayBuffer>;

  /**
   * Takes over an emulator's memory.
   *
   * @param processor The emulator's processor
   * @param length Size in bytes
   */
  constructor(processor: Processor, length: number) {
    super(length);
    this.#processor = processor;
    this.#start = processor.mem8.byteOffset;
    this.#look();
  }

  /** See {@linkcode GuestMemory.bytes}. */
  get bytes(): Uint8Array<ArrayBuffer> {
    if (this.#bytes.length === 0) this.#look();
    return this.#bytes;
  }

  /** See {@linkcode GuestMemory.view}. */
  get view(): DataView<ArrayBuffer> {
    if (this.#bytes.length === 0) this.#look();
    return this.#view;
  }

  /** See {@linkcode GuestMemory.words}. */
  get words(): Uint16Array<ArrayBuffer> {
    if (this.#bytes.length === 0) this.#look();
    return this.#words;
  }

  /** See {@linkcode GuestMemory.address}. */
  get address(): number {
    return Number(Deno.UnsafePointer.value(Deno.UnsafePointer.of(this.bytes)));
  }

  /**
   * What was translated from there is out of date.
   *
   * @param offset Where something was written
   * @param length How many bytes
   */
  override noteWrite(offset: number, length: number): void {
    if (length > 0) this.#processor.jit_dirty_cache(offset, offset + length);
  }

  /**
   * See {@linkcode GuestMemory.discard}.
   *
   * @param offset Where
   * @param length How many bytes
   */
  discard(offset: number, length: number): void {
    this.bytes.fill(0, offset, offset + length);
    this.noteWrite(offset, length);
  }

  /** The emulator's end is its own. */
  [Symbol.dispose](): void {}

  #look(): void {
    const buffer = this.#processor.wasm_memory.buffer as ArrayBuffer;
    this.#bytes = new Uint8Array(buffer, this.#start, this.length);
    this.#view = new DataView(buffer, this.#start, this.length);
    this.#words = new Uint16Array(buffer, this.#start, this.length >> 1);
  }
}

/** What a guest can do to its machine. */
export interface EmulatorEvents {
  /** The processor halted, and nothing will wake it. Called while the guest runs. */
  readonly onHalt: () => void;
  /** The guest reset the machine. Called while the guest runs. */
  readonly onReset: () => void;
  /** The processor cannot go on. */
  readonly onCrash: (detail: string) => void;
}

/** An emulated PC. It is stopped at first, without anything to run. */
export class Emulator {
  /** Its memory. */
  readonly memory: EmulatedMemory;
  readonly #emulator: V86;
  readonly #processor: Processor;
  readonly #functions: EmulatedFunction[];
  readonly #raised = LINES.map(() => new Set<number>());
  readonly #turn: InputTurn;

  private constructor(
    emulator: V86,
    length: number,
    functions: EmulatedFunction[],
    events: EmulatorEvents,
    turn: InputTurn,
  ) {
    this.#emulator = emulator;
    this.#turn = turn;
    this.#functions = functions;
    this.#processor = emulator.v86.cpu;
    this.#processor.reboot_internal = () => events.onReset();
    this.memory = new EmulatedMemory(this.#processor, length);
    const inner = emulator.v86;
    // The emulator's own waits by turning where less than a millisecond is left, which costs half a processor.
    inner.yield = (milliseconds, tick) => {
      const goOn = () => {
        try {
          inner.yield_callback(tick);
        } catch (error) {
          // A fault while the guest's processor handles a fault of a fault: it would reset itself.
          events.onCrash(error instanceof Error ? error.message : String(error));
        }
      };
      if (milliseconds <= 0) void turn.take().then(goOn);
      else setTimeout(goOn, Math.ceil(milliseconds));
    };
  }

  /**
   * Makes one. The program comes from the registry that Deno is set up for, and from Deno's cache ever after.
   *
   * @param length Size of its memory in bytes
   * @param events What its guest can do to the machine
   * @returns The PC
   * @throws {MachineError} If the program cannot be had
   */
  static async create(length: number, events: EmulatorEvents): Promise<Emulator> {
    const functions: EmulatedFunction[] = [];
    const { V86, program } = await load();
    const emulator: V86 = new V86({
      wasm_fn: async (imports: { env: Imports }) => {
        hook(imports.env, functions, events, () => emulator.v86.cpu);
        return (await WebAssembly.instantiate(program, imports as WebAssembly.Imports)).instance.exports;
      },
      memory_size: length,
      vga_memory_size: PICTURE_MEMORY,
      autostart: false,
      disable_keyboard: true,
      disable_mouse: true,
      disable_speaker: true,
      net_device: { type: "none" },
      acpi: false,
    });
    await new Promise<void>((resolve) => emulator.add_listener("emulator-loaded", () => resolve()));
    return new Emulator(emulator, length, functions, events, await InputTurn.create());
  }

  /**
   * Puts functions on its bus, once and before it runs.
   *
   * @param functions The functions, by number
   * @throws {MachineError} If there are too many
   */
  plug(functions: readonly EmulatedFunction[]): void {
    if (functions.length > MAX_FUNCTIONS) {
      throw new MachineError(
        `Cannot put ${functions.length} devices on the bus of an emulated machine: it has room for ${MAX_FUNCTIONS}`,
      );
    }
    this.#functions.push(...functions);
    functions.forEach(({ space, name }, number) => {
      const filled = [...space];
      const port = FIRST_PORT + FUNCTION_PORTS * number;
      filled[BAR_0] = port & 0xff | BAR_PORTS;
      filled[BAR_0 + 1] = port >> 8;
      filled[INTERRUPT_LINE] = LINES[number % LINES.length]!;
      filled[INTERRUPT_PIN] = 1;
      this.#processor.devices.pci.register_device({
        pci_id: PLACES[number]! << 3,
        pci_space: filled,
        pci_bars: [{ size: FUNCTION_PORTS }],
        name,
      });
    });
  }

  /**
   * Makes the processor be where a boot loader leaves it: in 32-bit protected mode with flat segments.
   *
   * @param address Address of the first instruction
   * @param zeroPage Address of the zero page
   * @param stack Top of the stack
   */
  enter(address: number, zeroPage: number, stack: number): void {
    const processor = this.#processor;
    processor.jit_clear_cache();
    processor.reset_cpu();
    const levels = LINES.reduce((bits, line) => bits | 1 << line, 0);
    const { buffer } = processor.wasm_memory;
    new Uint8Array(buffer)[processor.get_pic_addr_master() + LEVEL_TRIGGERED] = levels & 0xff;
    new Uint8Array(buffer)[processor.get_pic_addr_slave() + LEVEL_TRIGGERED] = levels >> 8;
    processor.cr[0] = PROTECTED_MODE;
    processor.protected_mode[0] = processor.is_32[0] = processor.stack_size_32[0] = 1;
    processor.flags[0] = 2;
    for (let segment = 0; segment < SEGMENTS; segment++) {
      const { selector, access } = segment === CODE_SEGMENT ? CODE : DATA;
      processor.segment_is_null[segment] = 0;
      processor.segment_offsets[segment] = 0;
      processor.segment_limits[segment] = FLAT_LIMIT;
      processor.segment_access_bytes[segment] = access;
      processor.sreg[segment] = selector;
    }
    for (let register = 0; register < 8; register++) processor.reg32[register] = 0;
    // ESP and ESI.
    processor.reg32[4] = stack;
    processor.reg32[6] = zeroPage;
    processor.instruction_pointer[0] = address;
    processor.in_hlt[0] = 0;
    processor.update_state_flags();
  }

  /**
   * Sets the interrupt line of a function, which others may share, and wakes the processor.
   *
   * @param number Number of the function
   * @param isHigh Whether it asks for service
   */
  setLine(number: number, isHigh: boolean): void {
    const line = LINES[number % LINES.length]!;
    const raised = this.#raised[number % LINES.length]!;
    if (!isHigh) {
      if (raised.delete(number) && raised.size === 0) this.#processor.device_lower_irq(line);
      return;
    }
    raised.add(number);
    this.#processor.device_raise_irq(line);
  }

  /** Lets it run. */
  run(): void {
    this.#emulator.run();
  }

  /** Stops it; settles when it has stopped. */
  async stop(): Promise<void> {
    await this.#emulator.stop();
  }

  /**
   * Saves all that it consists of. It must be stopped.
   *
   * @returns The state, without that of the machine's own devices
   */
  async save(): Promise<Uint8Array<ArrayBuffer>> {
    return new Uint8Array(await this.#emulator.save_state());
  }

  /**
   * Makes it be what it was. It must be stopped, and its memory untouched.
   *
   * @param state What was saved of a PC with as much memory
   */
  async restore(state: Uint8Array<ArrayBuffer>): Promise<void> {
    const { buffer, byteOffset, byteLength } = state;
    const isWhole = byteOffset === 0 && byteLength === buffer.byteLength;
    const processor = this.#processor;
    const zero = processor.zero_memory;
    // Memory that was never written is empty, and takes nothing of the host as long as it is not.
    processor.zero_memory = () => {};
    try {
      await this.#emulator.restore_state(
        isWhole ? buffer : buffer.slice(byteOffset, byteOffset + byteLength),
      );
    } finally {
      processor.zero_memory = zero;
    }
    this.#processor.jit_clear_cache();
  }

  /** Ends it. */
  async destroy(): Promise<void> {
    await this.#emulator.destroy();
    this.#turn[Symbol.dispose]();
  }
}

/** Leads accesses to the functions' ports to them. */
function hook(
  env: Imports,
  functions: readonly EmulatedFunction[],
  events: EmulatorEvents,
  processor: () => Processor,
): void {
  const find = (port: number) =>
    port < FIRST_PORT ? undefined : functions[Math.floor((port - FIRST_PORT) / FUNCTION_PORTS)];
  for (const length of [1, 2, 4]) {
    const [readName, writeName] = [`io_port_read${8 * length}`, `io_port_write${8 * length}`];
    const read = env[readName]!;
    env[readName] = (port) => {
      const found = find(port!);
      return found ? found.readPort(port! % FUNCTION_PORTS, length) : read(port!);
    };
    const write = env[writeName]!;
    const mask = length === 4 ? 0xffff_ffff : (1 << 8 * length) - 1;
    env[writeName] = (port, value) => {
      const found = find(port!);
      if (found) found.writePort(port! % FUNCTION_PORTS, (value! & mask) >>> 0, length);
      else write(port!, value!);
    };
  }
  const halt = env.cpu_event_halt!;
  env.cpu_event_halt = () => {
    halt();
    if ((processor().flags[0]! & INTERRUPTS_ENABLED) === 0) events.onHalt();
  };
}

interface Library {
  readonly V86: new (options: Record<string, unknown>) => V86;
  readonly program: Uint8Array<ArrayBuffer>;
}

let library: Promise<Library> | undefined;

/**
 * Sees to it that Deno's cache has the emulator, for a process that may reach no registry.
 *
 * @throws {MachineError} If the program cannot be had
 */
export async function fetchEmulator(): Promise<void> {
  await load();
}

/** Loads the emulator once in this process. */
function load(): Promise<Library> {
  return library ??= (async () => {
    try {
      const { V86 } = await importNpm<Pick<Library, "V86">>("v86", EMULATOR_VERSION);
      const path = new URL(import.meta.resolve(`npm:v86@${EMULATOR_VERSION}/build/v86.wasm`));
      return { V86, program: await Deno.readFile(path) };
    } catch (error) {
      library = undefined;
      throw error;
    }
  })();
}
