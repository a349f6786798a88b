/**
 * A virtual machine of KVM: memory, vCPUs, and the eventfds that keep exits out of user space (Linux 6.1
 * `Documentation/virt/kvm/api.rst`).
 *
 * @module
 */

import {
  Fd,
  KVM,
  KVM_CAP,
  KVM_IOEVENTFD_FLAG,
  KVM_IRQFD_FLAG,
  kvmClockData,
  kvmCpuidEntry2,
  kvmDirtyLog,
  kvmFpu,
  kvmIoeventfd,
  kvmIrqfd,
  kvmIrqLevel,
  kvmIrqRoutingEntry,
  kvmMsrEntry,
  kvmPitConfig,
  kvmRegs,
  kvmRun,
  kvmSregs,
  kvmUserspaceMemoryRegion,
  Mapping,
  Struct,
  SysError,
} from "../../ffi/mod.ts";
import { MachineError } from "../errors.ts";
import { EventLoop } from "../event_loop.ts";
import { VcpuThread } from "./thread.ts";

/** The one version of the interface that ever was since Linux 2.6.22. */
const API_VERSION = 12;
/** Three pages below 4 GiB that Intel's real mode needs; no guest sees them as memory. */
const TSS_ADDRESS = 0xfffb_d000;

/** Largest table of CPUID entries that is asked for (Linux 6.1 `KVM_MAX_CPUID_ENTRIES`). */
const MAX_CPUID_ENTRIES = 256;
/** What stands before the entries of `struct kvm_cpuid2`, `kvm_msrs` and `kvm_irq_routing`: their number, and 4 bytes. */
const TABLE_HEADER = 8;
/** Interrupt controllers of the kernel in `struct kvm_irq_routing_irqchip`. */
const KVM_IRQCHIP_IOAPIC = 2;
const KVM_IRQ_ROUTING_IRQCHIP = 1;
const KVM_IRQ_ROUTING_MSI = 2;

/** One entry of CPUID: a function and what it answers. */
export interface CpuidEntry {
  /** EAX on entry. */
  readonly function: number;
  /** ECX on entry, where {@linkcode CpuidEntry.flags} has bit 0. */
  readonly index: number;
  /** `KVM_CPUID_FLAG_*`. */
  readonly flags: number;
  /** What EAX gets. */
  readonly eax: number;
  /** What EBX gets. */
  readonly ebx: number;
  /** What ECX gets. */
  readonly ecx: number;
  /** What EDX gets. */
  readonly edx: number;
}

/** Where an interrupt goes: a pin of the IOAPIC, or a message to a local APIC. */
export type IrqRoute =
  & {
    /** Number of the interrupt. */
    readonly gsi: number;
  }
  & ({
    /** Pin of the IOAPIC. */
    readonly pin: number;
  } | {
    /** Address of the message. */
    readonly address: number;
    /** Upper half of the address. */
    readonly addressHigh: number;
    /** The message. */
    readonly data: number;
  });

/** General registers by name. */
export type Registers = { readonly [K in keyof typeof kvmRegs.fields]?: number | bigint };

/** `/dev/kvm`. */
export class Kvm implements Disposable {
  readonly #fd: Fd;
  /** Size of a vCPU's `kvm_run` page, in bytes. */
  readonly runSize: number;

  /** Opens the device. */
  constructor() {
    try {
      this.#fd = Fd.open("/dev/kvm");
    } catch (cause) {
      throw new MachineError(
        `Cannot use KVM as ${cause instanceof Error ? cause.message : cause}: ` +
          `load its module, and join the group that owns /dev/kvm`,
        { cause },
      );
    }
    const version = this.#fd.ioctl(KVM.GET_API_VERSION, 0, "KVM_GET_API_VERSION");
    if (version !== API_VERSION) {
      this.#fd[Symbol.dispose]();
      throw new MachineError(
        `Cannot use KVM as its interface has version ${version}: ${API_VERSION} is wanted`,
      );
    }
    this.runSize = this.#fd.ioctl(KVM.GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE");
  }

  /**
   * Asks for a capability.
   *
   * @param capability Its name
   * @returns 0 where it is absent
   */
  capability(capability: keyof typeof KVM_CAP): number {
    return this.#fd.ioctl(KVM.CHECK_EXTENSION, KVM_CAP[capability], `KVM_CHECK_EXTENSION ${capability}`);
  }

  /**
   * Reads which CPUID entries the host can give to a guest.
   *
   * @returns The entries
   */
  supportedCpuid(): CpuidEntry[] {
    const table = new Uint8Array(TABLE_HEADER + MAX_CPUID_ENTRIES * kvmCpuidEntry2.size);
    const view = new DataView(table.buffer);
    view.setUint32(0, MAX_CPUID_ENTRIES, true);
    this.#fd.ioctlBuffer(KVM.GET_SUPPORTED_CPUID, table, "KVM_GET_SUPPORTED_CPUID");
    return Array.from({ length: view.getUint32(0, true) }, (_, index) => {
      const entry = new Struct(kvmCpuidEntry2, table.buffer, TABLE_HEADER + index * kvmCpuidEntry2.size);
      const get = (name: keyof typeof kvmCpuidEntry2.fields) => Number(entry.get(name));
      return {
        function: get("function"),
        index: get("index"),
        flags: get("flags"),
        eax: get("eax"),
        ebx: get("ebx"),
        ecx: get("ecx"),
        edx: get("edx"),
      };
    });
  }

  /**
   * Makes a virtual machine.
   *
   * @param options Whether interrupt controllers and timer are in the kernel
   * @returns The machine
   */
  createVm(options: { readonly irqchip?: boolean } = {}): Vm {
    const fd = new Fd(this.#fd.ioctl(KVM.CREATE_VM, 0, "KVM_CREATE_VM"), "vm");
    try {
      if (options.irqchip) {
        fd.ioctl(KVM.SET_TSS_ADDR, TSS_ADDRESS, "KVM_SET_TSS_ADDR");
        fd.ioctl(KVM.CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP");
        // KVM_PIT_SPEAKER_DUMMY: reads of port 0x61 stay in the kernel.
        fd.ioctlBuffer(
          KVM.CREATE_PIT2,
          new Struct(kvmPitConfig).assign({ flags: 1 }).bytes,
          "KVM_CREATE_PIT2",
        );
      }
      return new Vm(fd, this.runSize);
    } catch (error) {
      fd[Symbol.dispose]();
      throw error;
    }
  }

  /** Closes the device. Machines live on. */
  [Symbol.dispose](): void {
    this.#fd[Symbol.dispose]();
  }
}

/** A virtual machine. Disposing it stops its vCPUs and gives everything back but the memory, which is its maker's. */
export class Vm implements Disposable {
  readonly #fd: Fd;
  readonly #runSize: number;
  readonly #vcpus: Vcpu[] = [];

  /**
   * Takes over a machine's descriptor; {@linkcode Kvm.createVm} makes one.
   *
   * @param fd The descriptor
   * @param runSize Size of a vCPU's `kvm_run`
   */
  constructor(fd: Fd, runSize: number) {
    this.#fd = fd;
    this.#runSize = runSize;
  }

  /**
   * Gives the guest memory.
   *
   * @param slot Number of the slot
   * @param address Where the guest sees it
   * @param memory The memory
   * @param flags `KVM_MEM_*`
   */
  setMemory(slot: number, address: number, memory: Mapping, flags = 0): void {
    this.setMemorySlot({ slot, address, hostAddress: memory.address, length: memory.length, flags });
  }

  /**
   * Gives the guest memory, or takes it away.
   *
   * @param options Number of the slot, where the guest sees it, where it is in this process, its size in bytes (0 takes the
   * slot away), and `KVM_MEM_*` flags
   */
  setMemorySlot(options: {
    readonly slot: number;
    readonly address: number;
    readonly hostAddress: bigint;
    readonly length: number;
    readonly flags?: number;
  }): void {
    const region = new Struct(kvmUserspaceMemoryRegion).assign({
      slot: options.slot,
      flags: options.flags ?? 0,
      guest_phys_addr: options.address,
      memory_size: options.length,
      userspace_addr: options.hostAddress,
    });
    this.#fd.ioctlBuffer(KVM.SET_USER_MEMORY_REGION, region.bytes, "KVM_SET_USER_MEMORY_REGION");
  }

  /**
   * Takes which pages of a slot were written since this was asked last. The slot needs `KVM_MEM_LOG_DIRTY_PAGES`.
   *
   * @param slot Number of the slot
   * @param bitmap One bit for each page of 4 KiB, rounded up to 64 bits
   */
  takeDirtyLog(slot: number, bitmap: Mapping): void {
    const log = new Struct(kvmDirtyLog).assign({ slot, dirty_bitmap: bitmap.address });
    this.#fd.ioctlBuffer(KVM.GET_DIRTY_LOG, log.bytes, "KVM_GET_DIRTY_LOG");
  }

  /**
   * Says where all interrupts go; those that are not named go nowhere.
   *
   * @param routes The routes
   */
  setRoutes(routes: readonly IrqRoute[]): void {
    const table = new Uint8Array(TABLE_HEADER + routes.length * kvmIrqRoutingEntry.size);
    new DataView(table.buffer).setUint32(0, routes.length, true);
    routes.forEach((route, index) => {
      const entry = new Struct(
        kvmIrqRoutingEntry,
        table.buffer,
        TABLE_HEADER + index * kvmIrqRoutingEntry.size,
      );
      // The first two words of the union are the controller and its pin, or the halves of the message's address.
      entry.assign(
        "pin" in route
          ? {
            gsi: route.gsi,
            type: KVM_IRQ_ROUTING_IRQCHIP,
            "u.msi.address_lo": KVM_IRQCHIP_IOAPIC,
            "u.msi.address_hi": route.pin,
          }
          : {
            gsi: route.gsi,
            type: KVM_IRQ_ROUTING_MSI,
            "u.msi.address_lo": route.address,
            "u.msi.address_hi": route.addressHigh,
            "u.msi.data": route.data,
          },
      );
    });
    this.#fd.ioctlBuffer(KVM.SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING");
  }

  /**
   * Sets the level of an interrupt line.
   *
   * @param gsi Number of the interrupt
   * @param level Whether it is asserted
   */
  setIrqLine(gsi: number, level: boolean): void {
    const struct = new Struct(kvmIrqLevel).assign({ irq: gsi, level: level ? 1 : 0 });
    this.#fd.ioctlBuffer(KVM.IRQ_LINE, struct.bytes, "KVM_IRQ_LINE");
  }

  /**
   * Reads the guest's clock, which goes on while the machine is paused unless it is set back.
   *
   * @returns Nanoseconds
   */
  get clock(): bigint {
    const struct = new Struct(kvmClockData);
    this.#fd.ioctlBuffer(KVM.GET_CLOCK, struct.bytes, "KVM_GET_CLOCK");
    return struct.get("clock");
  }

  /** Sets the guest's clock, in nanoseconds. */
  set clock(nanoseconds: bigint) {
    const struct = new Struct(kvmClockData).assign({ clock: nanoseconds });
    this.#fd.ioctlBuffer(KVM.SET_CLOCK, struct.bytes, "KVM_SET_CLOCK");
  }

  /**
   * Makes a vCPU with its thread, which begins stopped.
   *
   * @param threadFilter Address of a `struct sock_fprog` for the thread; no filter unless told
   * @returns The vCPU
   */
  createVcpu(threadFilter = 0n): Vcpu {
    const number = this.#vcpus.length;
    const fd = new Fd(this.#fd.ioctl(KVM.CREATE_VCPU, number, "KVM_CREATE_VCPU"), `vcpu ${number}`);
    const vcpu = new Vcpu(fd, this.#runSize, threadFilter);
    this.#vcpus.push(vcpu);
    return vcpu;
  }

  /**
   * Lets writes to an address signal an eventfd in place of an exit.
   *
   * @param event The eventfd
   * @param target Address or port, width in bytes (0 for any), the value that counts, and whether to end it
   */
  setIoEvent(
    event: Fd,
    target: {
      readonly address: number;
      readonly length: number;
      readonly isPort?: boolean;
      readonly value?: number;
      readonly isRemoved?: boolean;
    },
  ): void {
    const flags = (target.isPort ? KVM_IOEVENTFD_FLAG.PIO : 0) |
      (target.value === undefined ? 0 : KVM_IOEVENTFD_FLAG.DATAMATCH) |
      (target.isRemoved ? KVM_IOEVENTFD_FLAG.DEASSIGN : 0);
    const struct = new Struct(kvmIoeventfd).assign({
      addr: target.address,
      len: target.length,
      fd: event.number,
      flags,
      datamatch: target.value ?? 0,
    });
    this.#fd.ioctlBuffer(KVM.IOEVENTFD, struct.bytes, "KVM_IOEVENTFD");
  }

  /**
   * Lets an eventfd raise an interrupt of the guest.
   *
   * @param event The eventfd
   * @param gsi Number of the interrupt
   * @param isRemoved Whether to end it: the eventfd then keeps what it counts
   */
  setIrqEvent(event: Fd, gsi: number, isRemoved = false): void {
    const flags = isRemoved ? KVM_IRQFD_FLAG.DEASSIGN : 0;
    const struct = new Struct(kvmIrqfd).assign({ fd: event.number, gsi, flags });
    this.#fd.ioctlBuffer(KVM.IRQFD, struct.bytes, "KVM_IRQFD");
  }

  /** Stops it. */
  [Symbol.dispose](): void {
    for (const vcpu of this.#vcpus) vcpu[Symbol.dispose]();
    this.#fd[Symbol.dispose]();
  }
}

/** A vCPU with its thread. */
export class Vcpu implements Disposable {
  /** Its page that it shares with KVM. */
  readonly run: Struct<typeof kvmRun.fields>;
  /** The bytes of that page, for data of port accesses. */
  readonly runPage: Uint8Array<ArrayBuffer>;
  /** The same, for what is read at each exit. */
  readonly runView: DataView<ArrayBuffer>;
  /** Counts its exits, for an {@linkcode EventLoop}. */
  readonly event: Fd;
  readonly #fd: Fd;
  readonly #mapping: Mapping;
  readonly #thread: VcpuThread;
  #isRunning = false;

  /**
   * Takes over a vCPU's descriptor and starts its thread.
   *
   * @param fd The descriptor
   * @param runSize Size of its `kvm_run`
   * @param threadFilter Address of a `struct sock_fprog` for the thread; 0 for none
   */
  constructor(fd: Fd, runSize: number, threadFilter: bigint) {
    this.#fd = fd;
    this.#mapping = new Mapping(runSize, { fd });
    this.run = new Struct(kvmRun, this.#mapping.buffer);
    this.runPage = new Uint8Array(this.#mapping.buffer);
    this.runView = new DataView(this.#mapping.buffer);
    this.event = Fd.event();
    this.#thread = new VcpuThread(fd, this.event, threadFilter);
  }

  /**
   * Sets general registers; those that are not named become zero. The vCPU must be stopped.
   *
   * @param values Values by name
   */
  setRegisters(values: Registers): void {
    this.#fd.ioctlBuffer(KVM.SET_REGS, new Struct(kvmRegs).assign(values).bytes, "KVM_SET_REGS");
  }

  /**
   * Reads general registers. The vCPU must be stopped.
   *
   * @returns The registers
   */
  registers(): Struct<typeof kvmRegs.fields> {
    const struct = new Struct(kvmRegs);
    this.#fd.ioctlBuffer(KVM.GET_REGS, struct.bytes, "KVM_GET_REGS");
    return struct;
  }

  /**
   * Changes system registers. The vCPU must be stopped.
   *
   * @param change Edits them
   */
  changeSystemRegisters(change: (registers: Struct<typeof kvmSregs.fields>) => void): void {
    const struct = new Struct(kvmSregs);
    this.#fd.ioctlBuffer(KVM.GET_SREGS, struct.bytes, "KVM_GET_SREGS");
    change(struct);
    this.#fd.ioctlBuffer(KVM.SET_SREGS, struct.bytes, "KVM_SET_SREGS");
  }

  /**
   * Says what CPUID answers; before anything else of it is set. The vCPU must be stopped.
   *
   * @param entries The entries
   */
  setCpuid(entries: readonly CpuidEntry[]): void {
    const table = new Uint8Array(TABLE_HEADER + entries.length * kvmCpuidEntry2.size);
    new DataView(table.buffer).setUint32(0, entries.length, true);
    entries.forEach((entry, index) => {
      new Struct(kvmCpuidEntry2, table.buffer, TABLE_HEADER + index * kvmCpuidEntry2.size).assign({
        ...entry,
      });
    });
    this.#fd.ioctlBuffer(KVM.SET_CPUID2, table, "KVM_SET_CPUID2");
  }

  /**
   * Sets model-specific registers. The vCPU must be stopped.
   *
   * @param values Values by number
   * @throws {MachineError} If KVM refuses one of them
   */
  setMsrs(values: readonly (readonly [number: number, value: bigint])[]): void {
    const table = new Uint8Array(TABLE_HEADER + values.length * kvmMsrEntry.size);
    new DataView(table.buffer).setUint32(0, values.length, true);
    values.forEach(([index, data], at) => {
      new Struct(kvmMsrEntry, table.buffer, TABLE_HEADER + at * kvmMsrEntry.size).assign({ index, data });
    });
    // KVM stops at the first one that it refuses, and returns how many it took.
    const count = this.#fd.ioctlBuffer(KVM.SET_MSRS, table, "KVM_SET_MSRS");
    if (count < values.length) {
      const [number, value] = values[count]!;
      throw new MachineError(
        `Cannot set MSR 0x${number.toString(16)} to 0x${value.toString(16)} as KVM refuses it`,
      );
    }
  }

  /** Sets the floating-point unit as a reset leaves it. The vCPU must be stopped. */
  resetFpu(): void {
    const struct = new Struct(kvmFpu).assign({ fcw: 0x37f, mxcsr: 0x1f80 });
    this.#fd.ioctlBuffer(KVM.SET_FPU, struct.bytes, "KVM_SET_FPU");
  }

  /**
   * Changes registers of its local APIC. The vCPU must be stopped.
   *
   * @param change Edits them: 1 KiB, as the guest sees them
   */
  changeLocalApic(change: (registers: DataView<ArrayBuffer>) => void): void {
    const registers = new Uint8Array(1024);
    this.#fd.ioctlBuffer(KVM.GET_LAPIC, registers, "KVM_GET_LAPIC");
    change(new DataView(registers.buffer));
    this.#fd.ioctlBuffer(KVM.SET_LAPIC, registers, "KVM_SET_LAPIC");
  }

  /** Tells the guest that it was stopped, so that its watchdogs do not bark. The vCPU must be stopped. */
  noteStop(): void {
    // Guests without the paravirtual clock have nothing to be told: EINVAL.
    try {
      this.#fd.ioctl(KVM.KVMCLOCK_CTRL, 0, "KVM_KVMCLOCK_CTRL");
    } catch (error) {
      if (!(error instanceof SysError && error.code === "EINVAL")) throw error;
    }
  }

  /** Whether it runs, or has an exit that was not taken. */
  get isRunning(): boolean {
    return this.#isRunning;
  }

  /** Lets it go on until its next exit. */
  resume(): void {
    this.#isRunning = true;
    this.#thread.resume();
  }

  /**
   * Takes an exit that an {@linkcode EventLoop} has told of. The vCPU is stopped from then on.
   *
   * @returns What `KVM_RUN` returned, 0 or a negative error number; undefined where it still runs
   */
  take(): number | undefined {
    if (this.event.drain() === 0n) return undefined;
    this.#isRunning = false;
    return this.#thread.result;
  }

  /** Takes it out of the guest; it exits with EINTR. */
  kick(): void {
    this.run.set("immediate_exit", 1);
    this.#thread.kick();
  }

  /** Stops it and gives everything back. */
  [Symbol.dispose](): void {
    if (this.#fd.isClosed) return;
    if (this.#isRunning) {
      using loop = new EventLoop();
      loop.watch(this.event, () => void this.take());
      // The first kick may come before the thread has said its number.
      while (this.#isRunning) {
        this.kick();
        loop.poll(100);
      }
    }
    this.#thread[Symbol.dispose]();
    this.#mapping[Symbol.dispose]();
    this.event[Symbol.dispose]();
    this.#fd[Symbol.dispose]();
  }
}
