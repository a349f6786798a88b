/**
 * KVM's interface on x86-64: requests, capabilities, exits and structures (Linux 6.1 `include/uapi/linux/kvm.h` and
 * `arch/x86/include/uapi/asm/kvm.h`; `Documentation/virt/kvm/api.rst` tells what they do).
 *
 * @module
 */

import type { Layout } from "./layout.ts";

/** Requests by name. Those of the system, of a VM and of a vCPU go to descriptors of these. */
export const KVM = {
  GET_API_VERSION: 0xae00,
  CREATE_VM: 0xae01,
  GET_MSR_INDEX_LIST: 0xc004ae02,
  CHECK_EXTENSION: 0xae03,
  GET_VCPU_MMAP_SIZE: 0xae04,
  GET_SUPPORTED_CPUID: 0xc008ae05,
  CREATE_VCPU: 0xae41,
  GET_DIRTY_LOG: 0x4010ae42,
  SET_USER_MEMORY_REGION: 0x4020ae46,
  SET_TSS_ADDR: 0xae47,
  SET_IDENTITY_MAP_ADDR: 0x4008ae48,
  CREATE_IRQCHIP: 0xae60,
  IRQ_LINE: 0x4008ae61,
  GET_IRQCHIP: 0xc208ae62,
  SET_IRQCHIP: 0x8208ae63,
  SET_GSI_ROUTING: 0x4008ae6a,
  IRQFD: 0x4020ae76,
  CREATE_PIT2: 0x4040ae77,
  IOEVENTFD: 0x4040ae79,
  SET_CLOCK: 0x4030ae7b,
  GET_CLOCK: 0x8030ae7c,
  RUN: 0xae80,
  GET_REGS: 0x8090ae81,
  SET_REGS: 0x4090ae82,
  GET_SREGS: 0x8138ae83,
  SET_SREGS: 0x4138ae84,
  GET_MSRS: 0xc008ae88,
  SET_MSRS: 0x4008ae89,
  SET_SIGNAL_MASK: 0x4004ae8b,
  GET_FPU: 0x81a0ae8c,
  SET_FPU: 0x41a0ae8d,
  GET_LAPIC: 0x8400ae8e,
  SET_LAPIC: 0x4400ae8f,
  SET_CPUID2: 0x4008ae90,
  GET_MP_STATE: 0x8004ae98,
  SET_MP_STATE: 0x4004ae99,
  GET_PIT2: 0x8070ae9f,
  SET_PIT2: 0x4070aea0,
  GET_VCPU_EVENTS: 0x8040ae9f,
  SET_VCPU_EVENTS: 0x4040aea0,
  GET_DEBUGREGS: 0x8080aea1,
  SET_DEBUGREGS: 0x4080aea2,
  ENABLE_CAP: 0x4068aea3,
  GET_XSAVE: 0x9000aea4,
  SET_XSAVE: 0x5000aea5,
  SIGNAL_MSI: 0x4020aea5,
  GET_XCRS: 0x8188aea6,
  SET_XCRS: 0x4188aea7,
  KVMCLOCK_CTRL: 0xaead,
  GET_TSC_KHZ: 0xaea3,
  SET_TSC_KHZ: 0xaea2,
} as const;

/** Capabilities by name, for `CHECK_EXTENSION`. */
export const KVM_CAP = {
  IRQCHIP: 0,
  USER_MEMORY: 3,
  SET_TSS_ADDR: 4,
  EXT_CPUID: 7,
  NR_VCPUS: 9,
  NR_MEMSLOTS: 10,
  MP_STATE: 14,
  IRQFD: 32,
  PIT2: 33,
  PIT_STATE2: 35,
  IOEVENTFD: 36,
  SET_IDENTITY_MAP_ADDR: 37,
  ADJUST_CLOCK: 39,
  VCPU_EVENTS: 41,
  DEBUGREGS: 50,
  XSAVE: 55,
  XCRS: 56,
  MAX_VCPUS: 66,
  SIGNAL_MSI: 77,
  READONLY_MEM: 81,
  TSC_DEADLINE_TIMER: 72,
  MAX_VCPU_ID: 128,
  IMMEDIATE_EXIT: 136,
} as const;

/** Reasons of an exit, `kvm_run.exit_reason`. */
export const KVM_EXIT = {
  UNKNOWN: 0,
  EXCEPTION: 1,
  IO: 2,
  HYPERCALL: 3,
  DEBUG: 4,
  HLT: 5,
  MMIO: 6,
  IRQ_WINDOW_OPEN: 7,
  SHUTDOWN: 8,
  FAIL_ENTRY: 9,
  INTR: 10,
  INTERNAL_ERROR: 17,
  SYSTEM_EVENT: 24,
} as const;

/** Flags of `struct kvm_ioeventfd`. */
export const KVM_IOEVENTFD_FLAG = { DATAMATCH: 1, PIO: 2, DEASSIGN: 4 } as const;
/** Flags of `struct kvm_irqfd`. */
export const KVM_IRQFD_FLAG = { DEASSIGN: 1, RESAMPLE: 2 } as const;
/** Flags of `struct kvm_userspace_memory_region`. */
export const KVM_MEM = { LOG_DIRTY_PAGES: 1, READONLY: 2 } as const;

/** `struct kvm_userspace_memory_region`. */
export const kvmUserspaceMemoryRegion = {
  name: "struct kvm_userspace_memory_region",
  size: 32,
  fields: {
    slot: [0, "u32"],
    flags: [4, "u32"],
    guest_phys_addr: [8, "u64"],
    memory_size: [16, "u64"],
    userspace_addr: [24, "u64"],
  },
} as const satisfies Layout;

/** `struct kvm_regs`. */
export const kvmRegs = {
  name: "struct kvm_regs",
  size: 144,
  fields: {
    rax: [0, "u64"],
    rbx: [8, "u64"],
    rcx: [16, "u64"],
    rdx: [24, "u64"],
    rsi: [32, "u64"],
    rdi: [40, "u64"],
    rsp: [48, "u64"],
    rbp: [56, "u64"],
    r8: [64, "u64"],
    r9: [72, "u64"],
    r10: [80, "u64"],
    r11: [88, "u64"],
    r12: [96, "u64"],
    r13: [104, "u64"],
    r14: [112, "u64"],
    r15: [120, "u64"],
    rip: [128, "u64"],
    rflags: [136, "u64"],
  },
} as const satisfies Layout;

/** `struct kvm_segment`. */
export const kvmSegment = {
  name: "struct kvm_segment",
  size: 24,
  fields: {
    base: [0, "u64"],
    limit: [8, "u32"],
    selector: [12, "u16"],
    type: [14, "u8"],
    present: [15, "u8"],
    dpl: [16, "u8"],
    db: [17, "u8"],
    s: [18, "u8"],
    l: [19, "u8"],
    g: [20, "u8"],
    avl: [21, "u8"],
    unusable: [22, "u8"],
  },
} as const satisfies Layout;

/** `struct kvm_sregs`; segments are laid over with {@linkcode kvmSegment}. */
export const kvmSregs = {
  name: "struct kvm_sregs",
  size: 312,
  fields: {
    cs: [0, "u8", 24],
    ds: [24, "u8", 24],
    es: [48, "u8", 24],
    fs: [72, "u8", 24],
    gs: [96, "u8", 24],
    ss: [120, "u8", 24],
    tr: [144, "u8", 24],
    ldt: [168, "u8", 24],
    "gdt.base": [192, "u64"],
    "gdt.limit": [200, "u16"],
    "idt.base": [208, "u64"],
    "idt.limit": [216, "u16"],
    cr0: [224, "u64"],
    cr2: [232, "u64"],
    cr3: [240, "u64"],
    cr4: [248, "u64"],
    cr8: [256, "u64"],
    efer: [264, "u64"],
    apic_base: [272, "u64"],
    interrupt_bitmap: [280, "u64", 4],
  },
} as const satisfies Layout;

/** The part of `struct kvm_run` that is read and written here. */
export const kvmRun = {
  name: "struct kvm_run",
  size: 2352,
  fields: {
    request_interrupt_window: [0, "u8"],
    immediate_exit: [1, "u8"],
    exit_reason: [8, "u32"],
    ready_for_interrupt_injection: [12, "u8"],
    if_flag: [13, "u8"],
    cr8: [16, "u64"],
    apic_base: [24, "u64"],
    "io.direction": [32, "u8"],
    "io.size": [33, "u8"],
    "io.port": [34, "u16"],
    "io.count": [36, "u32"],
    "io.data_offset": [40, "u64"],
    "mmio.phys_addr": [32, "u64"],
    "mmio.data": [40, "u8", 8],
    "mmio.len": [48, "u32"],
    "mmio.is_write": [52, "u8"],
    "hw.hardware_exit_reason": [32, "u64"],
    "fail_entry.hardware_entry_failure_reason": [32, "u64"],
    "internal.suberror": [32, "u32"],
    "internal.ndata": [36, "u32"],
    "system_event.type": [32, "u32"],
  },
} as const satisfies Layout;

/** `struct kvm_irqfd`. */
export const kvmIrqfd = {
  name: "struct kvm_irqfd",
  size: 32,
  fields: {
    fd: [0, "u32"],
    gsi: [4, "u32"],
    flags: [8, "u32"],
    resamplefd: [12, "u32"],
  },
} as const satisfies Layout;

/** `struct kvm_ioeventfd`. */
export const kvmIoeventfd = {
  name: "struct kvm_ioeventfd",
  size: 64,
  fields: {
    datamatch: [0, "u64"],
    addr: [8, "u64"],
    len: [16, "u32"],
    fd: [20, "i32"],
    flags: [24, "u32"],
  },
} as const satisfies Layout;

/** `struct kvm_msi`. */
export const kvmMsi = {
  name: "struct kvm_msi",
  size: 32,
  fields: {
    address_lo: [0, "u32"],
    address_hi: [4, "u32"],
    data: [8, "u32"],
    flags: [12, "u32"],
  },
} as const satisfies Layout;

/** `struct kvm_pit_config`. */
export const kvmPitConfig = {
  name: "struct kvm_pit_config",
  size: 64,
  fields: { flags: [0, "u32"] },
} as const satisfies Layout;

/** `struct kvm_cpuid_entry2`. */
export const kvmCpuidEntry2 = {
  name: "struct kvm_cpuid_entry2",
  size: 40,
  fields: {
    function: [0, "u32"],
    index: [4, "u32"],
    flags: [8, "u32"],
    eax: [12, "u32"],
    ebx: [16, "u32"],
    ecx: [20, "u32"],
    edx: [24, "u32"],
  },
} as const satisfies Layout;

/** `struct kvm_msr_entry`. */
export const kvmMsrEntry = {
  name: "struct kvm_msr_entry",
  size: 16,
  fields: { index: [0, "u32"], data: [8, "u64"] },
} as const satisfies Layout;

/** `struct kvm_dirty_log`. */
export const kvmDirtyLog = {
  name: "struct kvm_dirty_log",
  size: 16,
  fields: { slot: [0, "u32"], dirty_bitmap: [8, "u64"] },
} as const satisfies Layout;

/** `struct kvm_irq_level`. */
export const kvmIrqLevel = {
  name: "struct kvm_irq_level",
  size: 8,
  fields: { irq: [0, "u32"], level: [4, "u32"] },
} as const satisfies Layout;

/** `struct kvm_irq_routing_entry`, for an MSI. */
export const kvmIrqRoutingEntry = {
  name: "struct kvm_irq_routing_entry",
  size: 48,
  fields: {
    gsi: [0, "u32"],
    type: [4, "u32"],
    flags: [8, "u32"],
    "u.msi.address_lo": [16, "u32"],
    "u.msi.address_hi": [20, "u32"],
    "u.msi.data": [24, "u32"],
  },
} as const satisfies Layout;

/** `struct kvm_fpu`. */
export const kvmFpu = {
  name: "struct kvm_fpu",
  size: 416,
  fields: { fcw: [128, "u16"], mxcsr: [408, "u32"] },
} as const satisfies Layout;

/** `struct kvm_enable_cap`. */
export const kvmEnableCap = {
  name: "struct kvm_enable_cap",
  size: 104,
  fields: {
    cap: [0, "u32"],
    flags: [4, "u32"],
    args: [8, "u64", 4],
  },
} as const satisfies Layout;

/** `struct kvm_mp_state`. */
export const kvmMpState = {
  name: "struct kvm_mp_state",
  size: 4,
  fields: { mp_state: [0, "u32"] },
} as const satisfies Layout;

/** `struct kvm_clock_data`. */
export const kvmClockData = {
  name: "struct kvm_clock_data",
  size: 48,
  fields: { clock: [0, "u64"], flags: [8, "u32"] },
} as const satisfies Layout;

/** All layouts, for the comparison with the C compiler. */
export const KVM_LAYOUTS: readonly Layout[] = [
  kvmUserspaceMemoryRegion,
  kvmRegs,
  kvmSegment,
  kvmSregs,
  kvmRun,
  kvmIrqfd,
  kvmIoeventfd,
  kvmMsi,
  kvmPitConfig,
  kvmCpuidEntry2,
  kvmMsrEntry,
  kvmDirtyLog,
  kvmIrqLevel,
  kvmIrqRoutingEntry,
  kvmFpu,
  kvmEnableCap,
  kvmMpState,
  kvmClockData,
];
