/**
 * A running machine whose processor is emulated: kernel and devices put together.
 *
 * @module
 */

import { setImmediate } from "node:timers";
import { LINUX_LAYOUT, loadLinux, openBootFile } from "../boot/linux.ts";
import type { VirtioPciState } from "../devices/virtio_pci.ts";
import { MachineError } from "../errors.ts";
import type { EndReason, MachineParts, MachineVmm } from "../machine_host.ts";
import { Emulator, KERNEL_WORDS } from "./emulator.ts";
import { VirtioPortFunction } from "./virtio_function.ts";

/** How long devices may take to end what is under way, in milliseconds. */
const QUIET_TIMEOUT = 10_000;

/** A machine with everything that was in it, to go on from. */
export interface MachineState {
  /** The PC. */
  readonly emulator: Uint8Array<ArrayBuffer>;
  /** What the guest has made of its devices, in the order of their places. */
  readonly functions: readonly VirtioPciState[];
}

/** A PC that has its memory, and waits for a machine to be built on it. */
export class EmulatedPc implements AsyncDisposable {
  /** The emulator. */
  readonly emulator: Emulator;
  /** The machine. */
  vmm: EmulatedVmm | undefined;

  private constructor(emulator: Emulator) {
    this.emulator = emulator;
  }

  /**
   * Makes one.
   *
   * @param length Size of its memory in bytes
   * @returns The PC
   * @throws {MachineError} If the emulator cannot be had
   */
  static async create(length: number): Promise<EmulatedPc> {
    // Not from within the guest's code, which goes on until it is left.
    const later = (run: (vmm: EmulatedVmm) => void) =>
      void setImmediate(() => {
        if (pc.vmm) run(pc.vmm);
      });
    const pc: EmulatedPc = new EmulatedPc(
      await Emulator.create(length, {
        onHalt: () => later((vmm) => vmm.halted()),
        onReset: () => later((vmm) => vmm.wasReset()),
        onCrash: (detail) => later((vmm) => vmm.crashed(detail)),
      }),
    );
    return pc;
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.emulator.destroy();
  }
}

/** A machine that is built and may run. */
export class EmulatedVmm implements MachineVmm {
  /** Nothing leaves the guest for this process: it never was elsewhere. */
  readonly exits: Readonly<Record<string, number>> = {};
  /** Whether it boots to where all of its kind are the same: from a restart it would not get there. */
  isTemplate = false;
  readonly #parts: MachineParts;
  readonly #emulator: Emulator;
  readonly #functions: VirtioPortFunction[];
  #state: "running" | "paused" | "ended" = "paused";
  #isRestarting = false;

  /**
   * Builds a machine, which is stopped, and has nothing in its memory.
   *
   * @param pc The PC, which has the memory
   * @param parts What it is made of
   */
  constructor(pc: EmulatedPc, parts: MachineParts) {
    this.#parts = parts;
    this.#emulator = pc.emulator;
    if (parts.cpus !== 1) {
      throw new MachineError(
        `Cannot give an emulated machine ${parts.cpus} vCPUs as it has one: set cpus to 1, or choose another engine`,
      );
    }
    this.#functions = parts.devices.map(({ name, device }, number) =>
      new VirtioPortFunction(device, name, {
        memory: parts.memory,
        setLine: (isHigh) => this.#emulator.setLine(number, isHigh),
        ...(parts.onFault ? { onFault: parts.onFault } : {}),
      })
    );
    this.#emulator.plug(this.#functions);
    pc.vmm = this;
  }

  /**
   * Makes it boot from the beginning.
   *
   * @param first Initramfs and command line, where they are not those of all other boots
   * @throws {MachineError} If the kernel cannot be booted
   */
  load(first: Pick<MachineParts, "initramfs" | "commandLine"> = this.#parts): void {
    const { initramfs, commandLine } = first;
    const { memory, kernel } = this.#parts;
    using files = new DisposableStack();
    const entry = loadLinux(memory, {
      kernel: files.use(openBootFile("kernel", kernel)),
      kernelName: kernel,
      initramfs: initramfs.map((path) => files.use(openBootFile("initramfs", path))),
      commandLine: `${KERNEL_WORDS} ${commandLine}`,
    });
    if (entry.protocol !== "linux32") {
      throw new MachineError(
        `Cannot boot the kernel "${kernel}" as an emulated machine has a 32-bit processor: ` +
          `give an ELF kernel for i386, or choose another engine`,
      );
    }
    this.#emulator.enter(entry.address, LINUX_LAYOUT.zeroPage, LINUX_LAYOUT.stack);
  }

  /** Lets the guest go on. */
  resume(): void {
    if (this.#state !== "paused") return;
    this.#state = "running";
    this.#emulator.run();
  }

  /** Stops the guest. */
  async pause(): Promise<void> {
    if (this.#state !== "running") return;
    this.#state = "paused";
    await this.#emulator.stop();
  }

  /** There is no button: PCs without firmware have none that a guest finds. */
  pressPowerButton(): void {
    throw new MachineError(
      "Cannot ask a guest without agent to power off as an emulated machine has no power button: " +
        "power it off in the guest, or kill the machine",
    );
  }

  /** Restarts the guest at once. */
  restart(): void {
    if (this.#state === "ended" || this.#isRestarting) return;
    this.#isRestarting = true;
    void this.#restart();
  }

  /** Ends the machine at once. */
  kill(): void {
    this.#end({ kind: "killed" });
  }

  /** The guest halted for good: it has powered off. */
  halted(): void {
    // A guest that has reset its machine halts, since that takes a moment.
    if (!this.#isRestarting) this.#end({ kind: "off" });
  }

  /**
   * The guest's processor cannot go on.
   *
   * @param detail What the emulator says
   */
  crashed(detail: string): void {
    if (this.#isRestarting) return;
    this.#end({ kind: "crashed", detail: `its processor cannot go on: ${detail}` });
  }

  /** The guest reset the machine. */
  wasReset(): void {
    if (this.isTemplate) {
      this.#end({ kind: "crashed", detail: "the guest restarted before it was ready: see logs" });
    } else if (this.#parts.onReset === "end") this.#end({ kind: "reset" });
    else this.restart();
  }

  /**
   * Saves the machine, which must be paused.
   *
   * @returns What {@linkcode EmulatedVmm.restore} takes
   * @throws {MachineError} If its devices do not come to rest
   */
  async save(): Promise<MachineState> {
    const deadline = performance.now() + QUIET_TIMEOUT;
    while (this.#functions.some(({ isBusy }) => isBusy)) {
      if (performance.now() > deadline) {
        throw new MachineError("Cannot save the machine as its devices do not come to rest: try it again");
      }
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    return { emulator: await this.#emulator.save(), functions: this.#functions.map((each) => each.save()) };
  }

  /**
   * Tells why this machine cannot go on from a state.
   *
   * @param state What was saved
   * @returns The reason; undefined where it can
   */
  lacks(state: MachineState): string | undefined {
    const [had, has] = [state.functions.length, this.#functions.length];
    if (had !== has) return `it has ${had} devices, and this machine has ${has}`;
    const index = state.functions.findIndex((each, index) => !this.#functions[index]!.fits(each));
    return index < 0 ? undefined : `its device "${this.#functions[index]!.name}" is another one`;
  }

  /**
   * Makes the machine, into which nothing was loaded, be what another one was, with the same memory and devices.
   *
   * @param state What was saved, as far as {@linkcode EmulatedVmm.lacks} finds nothing
   */
  async restore(state: MachineState): Promise<void> {
    await this.#emulator.restore(state.emulator);
    state.functions.forEach((each, index) => this.#functions[index]!.restore(each));
  }

  /** Ends the machine; its devices are its maker's to dispose. */
  [Symbol.dispose](): void {
    if (this.#state === "running") void this.#emulator.stop();
    this.#state = "ended";
    for (const each of this.#functions) each[Symbol.dispose]();
  }

  async #restart(): Promise<void> {
    const wasRunning = this.#state === "running";
    if (wasRunning) await this.#emulator.stop();
    if (this.#state === "ended") return;
    this.#state = "paused";
    try {
      for (const each of this.#functions) each.reset();
      while (this.#functions.some(({ isBusy }) => isBusy)) {
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
      const { memory } = this.#parts;
      memory.discard(0, memory.length);
      this.load();
    } catch (error) {
      const detail = `it could not restart: ${error instanceof Error ? error.message : error}`;
      return this.#end({ kind: "crashed", detail });
    }
    this.#isRestarting = false;
    if (wasRunning) this.resume();
  }

  #end(reason: EndReason): void {
    if (this.#state === "ended") return;
    this[Symbol.dispose]();
    this.#parts.onEnd(reason);
  }
}
