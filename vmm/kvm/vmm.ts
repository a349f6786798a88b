/**
 * A running machine of KVM: kernel, vCPUs and devices put together, and its exits served.
 *
 * @module
 */

import { Fd, KVM_EXIT, SysError } from "../../ffi/mod.ts";
import { ACPI_ADDRESS, acpiTables, POWER } from "../boot/acpi.ts";
import { LINUX_LAYOUT, loadLinux, openBootFile } from "../boot/linux.ts";
import { enterLongMode, enterProtectedMode, writeLongModeTables } from "../boot/long_mode.ts";
import { HostBridge, PciBus } from "../devices/pci_bus.ts";
import { REAL_TIME_CLOCK, RealTimeClock } from "../devices/real_time_clock.ts";
import { SERIAL, SerialPort } from "../devices/serial.ts";
import { VirtioPciFunction } from "../devices/virtio_pci.ts";
import { MachineError } from "../errors.ts";
import type { EventLoop } from "../event_loop.ts";
import type { EndReason, MachineParts, MachineVmm } from "../machine_host.ts";
import { BOOT_MSRS, guestCpuid } from "./cpuid.ts";
import type { IrqRoute, Kvm, Vcpu, Vm } from "./vm.ts";

/** Pins of the kernel's IOAPIC; numbers of messages come after them. */
const IOAPIC_PINS = 24;
/** First memory slot of the bus; those before it are memory. */
const FIRST_BUS_SLOT = 8;
const EINTR = -4;
const EAGAIN = -11;
/** Registers of the local APIC (Intel SDM volume 3, table 11-1), and how an interrupt line is delivered. */
const LVT_LINT0 = 0x350;
const LVT_LINT1 = 0x360;
const DELIVERY_EXTERNAL = 7 << 8;
const DELIVERY_NMI = 4 << 8;
/** `KVM_SYSTEM_EVENT_*` (Linux 6.1 `include/uapi/linux/kvm.h`). */
const SYSTEM_EVENT = { shutdown: 1, reset: 2, crash: 3 } as const;
const SLEEP_ENABLE = 1 << 5;
const KEYBOARD = { data: 0x60, command: 0x64 } as const;
/** How long a vCPU may take to come out of the guest, in milliseconds. */
const STOP_TIMEOUT = 10_000;

/** What a machine is made of. Its vCPUs are 1 to 32. */
export interface VmmOptions extends MachineParts {
  /** The device to run it. */
  readonly kvm: Kvm;
  /** Serves its exits; its turn must be run by the caller. */
  readonly loop: EventLoop;
  /** A filter for system calls that each vCPU's thread lays on itself: address of a `struct sock_fprog`. */
  readonly threadFilter?: bigint;
}

/** How many exits there were, by kind. */
export type ExitCounts = Record<string, number>;

/** A machine that is built and may run. */
export class Vmm implements MachineVmm {
  readonly #options: VmmOptions;
  readonly #counts = new Map<string, number>();
  readonly #clock = new RealTimeClock();
  #hardware: Hardware | undefined;
  #state: "running" | "paused" | "ended" = "paused";
  #waiters: (() => void)[] = [];
  #pausedClock: bigint | undefined;

  /**
   * Builds a machine. Its vCPUs are stopped.
   *
   * @param options What it is made of
   * @throws {MachineError} If the kernel cannot be booted
   */
  constructor(options: VmmOptions) {
    this.#options = options;
    this.#hardware = this.#build();
  }

  /** How it is. */
  get state(): "running" | "paused" | "ended" {
    return this.#state;
  }

  /** How many exits to user space there were so far, by kind. */
  get exits(): ExitCounts {
    return Object.fromEntries([...this.#counts].sort(([a], [b]) => a < b ? -1 : 1));
  }

  /** Lets all vCPUs go on. */
  resume(): void {
    const hardware = this.#hardware;
    if (this.#state !== "paused" || !hardware) return;
    if (this.#pausedClock !== undefined) {
      hardware.vm.clock = this.#pausedClock;
      for (const vcpu of hardware.vcpus) vcpu.noteStop();
      this.#pausedClock = undefined;
    }
    this.#state = "running";
    for (const vcpu of hardware.vcpus) {
      vcpu.run.set("immediate_exit", 0);
      vcpu.resume();
    }
  }

  /** Stops all vCPUs; settles when they have come out of the guest. */
  async pause(): Promise<void> {
    if (this.#state !== "running" || !this.#hardware) return;
    this.#state = "paused";
    const stopped = new Promise<void>((resolve) => this.#waiters.push(resolve));
    const deadline = Date.now() + STOP_TIMEOUT;
    const kick = () => {
      if (!this.#hardware) return;
      for (const vcpu of this.#hardware.vcpus) if (vcpu.isRunning) vcpu.kick();
      this.#noteStopped();
    };
    kick();
    // A kick is lost on a thread that has not begun yet.
    const timer = setInterval(kick, 50);
    try {
      await Promise.race([
        stopped,
        new Promise<never>((_, reject) => {
          const check = setInterval(() => {
            if (Date.now() < deadline && this.#waiters.length > 0) return;
            clearInterval(check);
            reject(
              new MachineError("Cannot pause the machine as a vCPU does not come out of the guest: kill it"),
            );
          }, 100);
        }),
      ]);
    } finally {
      clearInterval(timer);
    }
    this.#pausedClock = this.#hardware?.vm.clock;
  }

  /** Presses the power button: a guest that listens shuts down. */
  pressPowerButton(): void {
    this.#hardware?.button.signal();
  }

  /**
   * Sends to the guest's serial port.
   *
   * @param bytes What to send
   */
  sendSerial(bytes: Uint8Array): void {
    this.#hardware?.serial?.send(bytes);
  }

  /** Restarts the guest at once, as its reset button does. */
  restart(): void {
    if (this.#state !== "ended") this.#boot();
  }

  /** Ends the machine at once. */
  kill(): void {
    this.#end({ kind: "killed" });
  }

  /** Ends the machine; its devices and memory are its maker's to dispose. */
  [Symbol.dispose](): void {
    this.#state = "ended";
    this.#teardown();
  }

  #build(): Hardware {
    return new Hardware(this.#options, (vcpu) => this.#onExit(vcpu));
  }

  #teardown(): void {
    this.#hardware?.[Symbol.dispose]();
    this.#hardware = undefined;
    this.#noteStopped();
  }

  #end(reason: EndReason): void {
    if (this.#state === "ended") return;
    this.#state = "ended";
    this.#teardown();
    this.#options.onEnd(reason);
  }

  /** The guest wants to be reset. */
  #restart(): void {
    if (this.#options.onReset === "end") this.#end({ kind: "reset" });
    else this.#boot();
  }

  #boot(): void {
    const isRunning = this.#state === "running";
    this.#teardown();
    try {
      const { memory } = this.#options;
      memory.discard(0, memory.length);
      this.#hardware = this.#build();
    } catch (error) {
      const detail = `it could not restart: ${error instanceof Error ? error.message : error}`;
      return this.#end({ kind: "crashed", detail });
    }
    this.#state = "paused";
    if (isRunning) this.resume();
  }

  #noteStopped(): void {
    if (this.#hardware?.vcpus.some((vcpu) => vcpu.isRunning)) return;
    for (const resolve of this.#waiters.splice(0)) resolve();
  }

  #count(kind: string): void {
    this.#counts.set(kind, (this.#counts.get(kind) ?? 0) + 1);
  }

  #onExit(vcpu: Vcpu): void {
    const hardware = this.#hardware;
    const result = vcpu.take();
    if (result === undefined || !hardware) return;
    const change = result === 0 ? this.#serve(hardware, vcpu) : this.#interrupted(vcpu, result);
    if (change) return change();
    if (this.#state === "running") {
      vcpu.resume();
      this.#options.loop.expectMore();
    } else this.#noteStopped();
  }

  #interrupted(vcpu: Vcpu, result: number): (() => void) | undefined {
    this.#count("interrupted");
    if (result === EINTR || result === EAGAIN) {
      if (this.#state === "running") vcpu.run.set("immediate_exit", 0);
      return undefined;
    }
    const detail = new SysError("KVM_RUN", -result, "").message;
    return () => this.#end({ kind: "crashed", detail });
  }

  /** Serves an exit. What it gives back ends or restarts the machine. */
  #serve(hardware: Hardware, vcpu: Vcpu): (() => void) | undefined {
    const { runView, runPage } = vcpu;
    const reason = runView.getUint32(8, true);
    switch (reason) {
      case KVM_EXIT.IO: {
        const isWrite = runView.getUint8(32) === 1;
        const size = runView.getUint8(33);
        const port = runView.getUint16(34, true);
        const count = runView.getUint32(36, true);
        let at = runView.getUint32(40, true);
        this.#count(`port 0x${port.toString(16).padStart(3, "0")}`);
        for (let index = 0; index < count; index++, at += size) {
          if (!isWrite) {
            for (let byte = 0; byte < size; byte++) {
              runPage[at + byte] = this.#readPort(hardware, port + byte);
            }
            continue;
          }
          for (let byte = 0; byte < size; byte++) {
            const change = this.#writePort(hardware, port + byte, runPage[at + byte]!);
            if (change) return change;
          }
        }
        return undefined;
      }
      case KVM_EXIT.MMIO: {
        const address = runView.getUint32(32, true) + runView.getUint32(36, true) * 0x1_0000_0000;
        const length = Math.min(8, runView.getUint32(48, true));
        const isWrite = runView.getUint8(52) !== 0;
        const data = runPage.subarray(40, 40 + length);
        if (isWrite) {
          const isOurs = hardware.bus.write(address, data);
          this.#count(isOurs ? hardware.bus.name(address) : "memory elsewhere");
        } else {
          data.fill(0xff);
          const isOurs = hardware.bus.read(address, data);
          this.#count(isOurs ? `${hardware.bus.name(address)}, read` : "memory elsewhere, read");
        }
        return undefined;
      }
      case KVM_EXIT.SHUTDOWN:
        this.#count("triple fault");
        return () => this.#restart();
      case KVM_EXIT.SYSTEM_EVENT: {
        this.#count("system event");
        const type = runView.getUint32(32, true);
        if (type === SYSTEM_EVENT.reset) return () => this.#restart();
        return () =>
          this.#end(
            type === SYSTEM_EVENT.shutdown
              ? { kind: "off" }
              : { kind: "crashed", detail: "the guest says so" },
          );
      }
      case KVM_EXIT.HLT:
        this.#count("halt");
        return undefined;
      default: {
        const words = Array.from(
          { length: 4 },
          (_, index) => runView.getUint32(32 + 4 * index, true).toString(16),
        );
        const name = Object.entries(KVM_EXIT).find(([, number]) => number === reason)?.[0] ?? String(reason);
        const detail = `KVM cannot go on: exit ${name} (${words.join(" ")}), ${describeRegisters(vcpu)}`;
        return () => this.#end({ kind: "crashed", detail });
      }
    }
  }

  #readPort(hardware: Hardware, port: number): number {
    if (hardware.serial && port >= SERIAL.port && port < SERIAL.port + SERIAL.length) {
      return hardware.serial.read(port - SERIAL.port);
    }
    if (port === REAL_TIME_CLOCK.port || port === REAL_TIME_CLOCK.port + 1) {
      return this.#clock.read(port - REAL_TIME_CLOCK.port);
    }
    // The keyboard controller has nothing to say and room for more.
    if (port === KEYBOARD.command || port === KEYBOARD.data) return 0;
    if (port === POWER.sleepPort || port === POWER.sleepStatusPort) return 0;
    return 0xff;
  }

  #writePort(hardware: Hardware, port: number, value: number): (() => void) | undefined {
    if (hardware.serial && port >= SERIAL.port && port < SERIAL.port + SERIAL.length) {
      hardware.serial.write(port - SERIAL.port, value);
    } else if (port === REAL_TIME_CLOCK.port || port === REAL_TIME_CLOCK.port + 1) {
      this.#clock.write(port - REAL_TIME_CLOCK.port, value);
    } else if (port === POWER.resetPort && value === POWER.resetValue) {
      return () => this.#restart();
    } else if (
      port === POWER.sleepPort && (value & SLEEP_ENABLE) !== 0 && (value >> 2 & 7) === POWER.sleepTypeOff
    ) return () => this.#end({ kind: "off" });
    return undefined;
  }
}

/** Everything that a reset makes anew. */
class Hardware implements Disposable {
  readonly vm: Vm;
  readonly vcpus: Vcpu[] = [];
  readonly bus: PciBus;
  readonly serial: SerialPort | undefined;
  readonly button: Fd;
  readonly #loop: EventLoop;
  readonly #stack = new DisposableStack();

  constructor(options: VmmOptions, onExit: (vcpu: Vcpu) => void) {
    const { kvm, loop, memory, cpus } = options;
    this.#loop = loop;
    try {
      this.vm = this.#stack.use(kvm.createVm({ irqchip: true }));
      memory.regions.forEach(({ address, offset, length }, slot) =>
        this.vm.setMemorySlot({ slot, address, length, hostAddress: BigInt(memory.address + offset) })
      );
      this.button = this.#stack.use(Fd.event());
      const routes = new Map<number, IrqRoute>();
      for (let pin = 0; pin < IOAPIC_PINS; pin++) routes.set(pin, { gsi: pin, pin });
      this.vm.setRoutes([...routes.values()]);
      this.vm.setIrqEvent(this.button, POWER.buttonGsi);
      if (options.onSerial) {
        const interrupt = this.#stack.use(Fd.event());
        this.vm.setIrqEvent(interrupt, SERIAL.gsi);
        this.serial = new SerialPort(interrupt, options.onSerial);
      }
      let nextGsi = IOAPIC_PINS;
      const functions = options.devices.map(({ name, device, vectors }) =>
        this.#stack.use(
          new VirtioPciFunction(device, {
            memory,
            signals: {
              watcher: loop,
              allocateInterrupts: (count) => (nextGsi += count) - count,
              setMessage: (gsi, event, message) => {
                if (!message) return this.vm.setIrqEvent(event, gsi, true);
                routes.set(gsi, { gsi, ...message });
                this.vm.setRoutes([...routes.values()]);
                this.vm.setIrqEvent(event, gsi);
              },
              setIoEvent: (event, target) => this.vm.setIoEvent(event, target),
            },
            ...(options.onFault ? { onFault: options.onFault } : {}),
          }, { name, ...(vectors === undefined ? {} : { vectors }) }),
        )
      );
      this.bus = this.#stack.use(
        new PciBus(
          {
            hasReadOnlyMemory: kvm.capability("READONLY_MEM") > 0,
            setMemorySlot: (slot) => this.vm.setMemorySlot(slot),
          },
          [new HostBridge(), ...functions],
          FIRST_BUS_SLOT,
        ),
      );
      using files = new DisposableStack();
      const entry = loadLinux(memory, {
        kernel: files.use(openBootFile("kernel", options.kernel)),
        kernelName: options.kernel,
        initramfs: options.initramfs.map((path) => files.use(openBootFile("initramfs", path))),
        commandLine: options.commandLine,
      });
      const tables = acpiTables({ cpus, hasSerial: this.serial !== undefined });
      memory.bytes.set(tables, memory.offset(ACPI_ADDRESS, tables.length));
      const supported = kvm.supportedCpuid();
      const hasDeadlineTimer = kvm.capability("TSC_DEADLINE_TIMER") > 0;
      for (let cpu = 0; cpu < cpus; cpu++) {
        const vcpu = this.vm.createVcpu(options.threadFilter);
        this.vcpus.push(vcpu);
        vcpu.setCpuid(guestCpuid(supported, { cpu, cpus, hasDeadlineTimer }));
        setBootMsrs(vcpu);
        vcpu.resetFpu();
        vcpu.changeLocalApic((registers) => {
          for (
            const [register, delivery] of [[LVT_LINT0, DELIVERY_EXTERNAL], [LVT_LINT1, DELIVERY_NMI]] as const
          ) {
            registers.setUint32(register, registers.getUint32(register, true) & ~0x700 | delivery, true);
          }
        });
        loop.watch(vcpu.event, () => onExit(vcpu));
      }
      const first = this.vcpus[0]!;
      if (entry.protocol === "linux64") {
        writeLongModeTables(memory.bytes.buffer);
        first.changeSystemRegisters(enterLongMode);
        first.setRegisters({
          rip: entry.address,
          rsi: LINUX_LAYOUT.zeroPage,
          rsp: LINUX_LAYOUT.stack,
          rbp: LINUX_LAYOUT.stack,
          rflags: 2,
        });
      } else {
        first.changeSystemRegisters(enterProtectedMode);
        first.setRegisters({
          rip: entry.address,
          ...(entry.protocol === "pvh"
            ? { rbx: LINUX_LAYOUT.startInfo }
            : { rsi: LINUX_LAYOUT.zeroPage, rsp: LINUX_LAYOUT.stack }),
          rflags: 2,
        });
      }
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  [Symbol.dispose](): void {
    for (const vcpu of this.vcpus.splice(0)) {
      this.#loop.unwatch(vcpu.event);
      vcpu[Symbol.dispose]();
    }
    this.#stack[Symbol.dispose]();
  }
}

/** Some hosts lack some of these registers, which then read as a reset leaves them. */
function setBootMsrs(vcpu: Vcpu): void {
  for (const entry of BOOT_MSRS) {
    try {
      vcpu.setMsrs([entry]);
    } catch (error) {
      if (!(error instanceof MachineError)) throw error;
    }
  }
}

function describeRegisters(vcpu: Vcpu): string {
  const registers = vcpu.registers();
  return (["rip", "rsp", "rflags", "rax", "rcx", "rdx"] as const).map((name) =>
    `${name} 0x${registers.get(name).toString(16)}`
  ).join(" ");
}
