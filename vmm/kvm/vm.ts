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
  kvmIoeventfd,
  kvmIrqfd,
  kvmPitConfig,
  kvmRegs,
  kvmRun,
  kvmSregs,
  kvmUserspaceMemoryRegion,
  Mapping,
  Struct,
} from "../../ffi/mod.ts";
import { MachineError } from "../errors.ts";
import { ExitLoop } from "./exit_loop.ts";
import { VcpuThread } from "./thread.ts";

/** The one version of the interface that ever was since Linux 2.6.22. */
const API_VERSION = 12;
/** Three pages below 4 GiB that Intel's real mode needs; no guest sees them as memory. */
const TSS_ADDRESS = 0xfffb_d000;

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
    const region = new Struct(kvmUserspaceMemoryRegion).assign({
      slot,
      flags,
      guest_phys_addr: address,
      memory_size: memory.length,
      userspace_addr: memory.address,
    });
    this.#fd.ioctlBuffer(KVM.SET_USER_MEMORY_REGION, region.bytes, "KVM_SET_USER_MEMORY_REGION");
  }

  /**
   * Makes a vCPU with its thread, which begins stopped.
   *
   * @returns The vCPU
   */
  createVcpu(): Vcpu {
    const number = this.#vcpus.length;
    const fd = new Fd(this.#fd.ioctl(KVM.CREATE_VCPU, number, "KVM_CREATE_VCPU"), `vcpu ${number}`);
    const vcpu = new Vcpu(fd, this.#runSize);
    this.#vcpus.push(vcpu);
    return vcpu;
  }

  /**
   * Lets writes to an address signal an eventfd in place of an exit.
   *
   * @param event The eventfd
   * @param target Address or port, width in bytes (0 for any), and the value that counts
   */
  setIoEvent(
    event: Fd,
    target: {
      readonly address: number;
      readonly length: number;
      readonly isPort?: boolean;
      readonly value?: number;
    },
  ): void {
    const flags = (target.isPort ? KVM_IOEVENTFD_FLAG.PIO : 0) |
      (target.value === undefined ? 0 : KVM_IOEVENTFD_FLAG.DATAMATCH);
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
   */
  setIrqEvent(event: Fd, gsi: number): void {
    const struct = new Struct(kvmIrqfd).assign({ fd: event.number, gsi });
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
  /** Counts its exits, for an {@linkcode ExitLoop}. */
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
   */
  constructor(fd: Fd, runSize: number) {
    this.#fd = fd;
    this.#mapping = new Mapping(runSize, { fd });
    this.run = new Struct(kvmRun, this.#mapping.buffer);
    this.runPage = new Uint8Array(this.#mapping.buffer);
    this.event = Fd.event();
    this.#thread = new VcpuThread(fd, this.event);
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

  /** Lets it go on until its next exit. */
  resume(): void {
    this.#isRunning = true;
    this.#thread.resume();
  }

  /**
   * Takes an exit that an {@linkcode ExitLoop} has told of. The vCPU is stopped from then on.
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
      using loop = new ExitLoop();
      loop.add(this);
      // The first kick may come before the thread has said its number.
      while (this.#isRunning) {
        this.kick();
        loop.poll(100);
        this.take();
      }
    }
    this.#thread[Symbol.dispose]();
    this.#mapping[Symbol.dispose]();
    this.event[Symbol.dispose]();
    this.#fd[Symbol.dispose]();
  }
}
