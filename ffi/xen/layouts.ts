/**
 * Xen's interface on x86-64: numbers and structures, as data (Xen 4.14 to 4.22 `xen/include/public`). Only `domctl` and
 * `sysctl` change from version to version; all else has stayed as it is here.
 *
 * @module
 */

import type { Field, Layout } from "../layout.ts";

/** Numbers of hypercalls. */
export const HYPERCALL = {
  mmu_update: 1,
  memory_op: 12,
  xen_version: 17,
  mmuext_op: 26,
  sched_op: 29,
  event_channel_op: 32,
  hvm_op: 34,
  sysctl: 35,
  domctl: 36,
} as const;

/** Operations on a domain. */
export const DOMCTL = {
  createdomain: 1,
  destroydomain: 2,
  pausedomain: 3,
  unpausedomain: 4,
  getdomaininfo: 5,
  setvcpuaffinity: 9,
  shadow_op: 10,
  max_mem: 11,
  setvcpucontext: 12,
  getvcpucontext: 13,
  max_vcpus: 15,
  scheduler_op: 16,
  hypercall_init: 22,
  resumedomain: 27,
  gethvmcontext: 33,
  sethvmcontext: 34,
  set_address_size: 35,
  gettscinfo: 59,
  settscinfo: 60,
  set_paging_mempool_size: 86,
} as const;

/** Operations on the whole system. */
export const SYSCTL = { readconsole: 1, physinfo: 3, sched_id: 4, getdomaininfolist: 6 } as const;

/** Questions to `xen_version`. */
export const XENVER = { version: 0, extraversion: 1, capabilities: 3 } as const;

/** Operations on a domain's memory. */
export const XENMEM = { populate_physmap: 6, set_memory_map: 13, claim_pages: 24 } as const;

/** Resources of a domain that the control domain can map. */
export const XENMEM_RESOURCE = { ioreq_server: 0, grant_table: 1, vmtrace_buf: 2 } as const;

/** Operations of `hvm_op`. */
export const HVMOP = { set_param: 0, get_param: 1 } as const;

/** Operations of `event_channel_op`. */
export const EVTCHNOP = { alloc_unbound: 6 } as const;

/** Operations of `sched_op`. */
export const SCHEDOP = { remote_shutdown: 4 } as const;

/** Operations of `mmuext_op`. */
export const MMUEXT = { PIN_L4_TABLE: 3 } as const;

/** Why a domain has shut down. */
export const SHUTDOWN = { poweroff: 0, reboot: 1, suspend: 2, crash: 3, watchdog: 4, soft_reset: 5 } as const;

/** Parameters of a domain that is no PV domain. */
export const HVM_PARAM = {
  CALLBACK_IRQ: 0,
  STORE_PFN: 1,
  STORE_EVTCHN: 2,
  IOREQ_PFN: 5,
  BUFIOREQ_PFN: 6,
  VIRIDIAN: 9,
  TIMER_MODE: 10,
  HPET_ENABLED: 11,
  IDENT_PT: 12,
  ACPI_S_STATE: 14,
  VM86_TSS: 15,
  VPT_ALIGN: 16,
  CONSOLE_PFN: 17,
  CONSOLE_EVTCHN: 18,
  ACPI_IOPORTS_LOCATION: 19,
  PAGING_RING_PFN: 27,
  MONITOR_RING_PFN: 28,
  SHARING_RING_PFN: 29,
  TRIPLE_FAULT_REASON: 31,
  IOREQ_SERVER_PFN: 32,
  NR_IOREQ_SERVER_PAGES: 33,
  VM_GENERATION_ID_ADDR: 34,
  ALTP2M: 35,
  X87_FIP_WIDTH: 36,
  VM86_TSS_SIZED: 37,
  MCA_CAP: 38,
} as const;

/** Domain id that stands for none: a new domain gets a free one (0x7ff5 is `DOMID_ANY` of 4.22, and does so before). */
export const DOMID_ANY = 0x7ff5;

/** Flags of a new domain (`XEN_DOMCTL_CDF_*`). */
export const CDF = { hvm: 1, hap: 2, iommu: 0x20 } as const;

/** Flags of a domain (`XEN_DOMINF_*`). */
export const DOMINF = {
  dying: 1,
  hvm_guest: 2,
  shutdown: 4,
  paused: 8,
  blocked: 0x10,
  running: 0x20,
  debugged: 0x40,
  xs_domain: 0x80,
  hap: 0x100,
  shutdownshift: 16,
  shutdownmask: 255,
} as const;

/** What the machine can do (`XEN_SYSCTL_PHYSCAP_*`). */
export const PHYSCAP = { hvm: 1, pv: 2, directio: 4, hap: 8, shadow: 0x10 } as const;

/** Devices that Xen emulates for a domain (`XEN_X86_EMU_*`): of a PVH domain, and of one with a device model. */
export const EMULATION = { pvh: 0x1, hvm: 0x3ff } as const;

/** `XEN_SCHEDULER_*`. */
export const SCHEDULER = { CREDIT: 5, CREDIT2: 6, ARINC653: 7, RTDS: 8, NULL: 9 } as const;

/** `XEN_DOMCTL_SCHEDOP_*`. */
export const SCHEDULER_OP = { putinfo: 0, getinfo: 1 } as const;

/** `XEN_VCPUAFFINITY_HARD`. */
export const VCPUAFFINITY_HARD = 1;

/** `XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION`. */
export const SHADOW_OP_SET_ALLOCATION = 31;

/** Size of `struct xen_domctl`, and where what is of the operation begins. */
export const domctlEnvelope = {
  name: "struct xen_domctl",
  size: 144,
  fields: { cmd: [0, "u32"], interface_version: [4, "u32"], domain: [8, "u16"], u: [16, "u8", 128] },
} as const satisfies Layout;

/** The same of `struct xen_sysctl`. */
export const sysctlEnvelope = {
  name: "struct xen_sysctl",
  size: 136,
  fields: { cmd: [0, "u32"], interface_version: [4, "u32"], u: [8, "u8", 128] },
} as const satisfies Layout;

/** `struct xen_domctl_max_mem`. */
export const maxMemory = {
  name: "struct xen_domctl_max_mem",
  size: 8,
  fields: { max_memkb: [0, "u64"] },
} as const satisfies Layout;

/** `struct xen_domctl_max_vcpus`. */
export const maxVcpus = {
  name: "struct xen_domctl_max_vcpus",
  size: 4,
  fields: { max: [0, "u32"] },
} as const satisfies Layout;

/** `struct xen_domctl_paging_mempool` (4.17 and later). */
export const pagingPool = {
  name: "struct xen_domctl_paging_mempool",
  size: 8,
  fields: { size: [0, "u64"] },
} as const satisfies Layout;

/** `struct xen_domctl_shadow_op`. */
export const shadowOp = {
  name: "struct xen_domctl_shadow_op",
  size: 40,
  fields: {
    op: [0, "u32"],
    mode: [4, "u32"],
    mb: [8, "u32"],
    dirty_bitmap: [16, "u64"],
    pages: [24, "u64"],
    "stats.fault_count": [32, "u32"],
    "stats.dirty_count": [36, "u32"],
  },
} as const satisfies Layout;

/** `struct xen_domctl_hvmcontext`. */
export const hvmContext = {
  name: "struct xen_domctl_hvmcontext",
  size: 16,
  fields: { size: [0, "u32"], buffer: [8, "u64"] },
} as const satisfies Layout;

/** `struct xen_domctl_vcpucontext`. */
export const vcpuContext = {
  name: "struct xen_domctl_vcpucontext",
  size: 16,
  fields: { vcpu: [0, "u32"], ctxt: [8, "u64"] },
} as const satisfies Layout;

/** `struct xen_domctl_address_size`. */
export const addressSize = {
  name: "struct xen_domctl_address_size",
  size: 4,
  fields: { size: [0, "u32"] },
} as const satisfies Layout;

/** `struct xen_domctl_hypercall_init`. */
export const hypercallInit = {
  name: "struct xen_domctl_hypercall_init",
  size: 8,
  fields: { gmfn: [0, "u64"] },
} as const satisfies Layout;

/** `struct xen_domctl_tsc_info`. */
export const tscInfo = {
  name: "struct xen_domctl_tsc_info",
  size: 24,
  fields: {
    tsc_mode: [0, "u32"],
    gtsc_khz: [4, "u32"],
    incarnation: [8, "u32"],
    elapsed_nsec: [16, "u64"],
  },
} as const satisfies Layout;

/** `struct xen_domctl_vcpuaffinity`. */
export const vcpuAffinity = {
  name: "struct xen_domctl_vcpuaffinity",
  size: 40,
  fields: {
    vcpu: [0, "u32"],
    flags: [4, "u32"],
    "cpumap_hard.bitmap": [8, "u64"],
    "cpumap_hard.nr_bits": [16, "u32"],
    "cpumap_soft.bitmap": [24, "u64"],
    "cpumap_soft.nr_bits": [32, "u32"],
  },
} as const satisfies Layout;

/** `struct xen_domctl_scheduler_op`, as the credit schedulers use it. */
export const schedulerOp = {
  name: "struct xen_domctl_scheduler_op",
  size: 24,
  fields: {
    sched_id: [0, "u32"],
    cmd: [4, "u32"],
    "u.credit2.weight": [8, "u16"],
    "u.credit2.cap": [10, "u16"],
  },
} as const satisfies Layout;

/** `struct xen_sysctl_getdomaininfolist`. */
export const domainList = {
  name: "struct xen_sysctl_getdomaininfolist",
  size: 24,
  fields: {
    first_domain: [0, "u16"],
    max_domains: [4, "u32"],
    buffer: [8, "u64"],
    num_domains: [16, "u32"],
  },
} as const satisfies Layout;

/** `struct xen_sysctl_readconsole`. */
export const readConsole = {
  name: "struct xen_sysctl_readconsole",
  size: 24,
  fields: {
    clear: [0, "u8"],
    incremental: [1, "u8"],
    index: [4, "u32"],
    buffer: [8, "u64"],
    count: [16, "u32"],
  },
} as const satisfies Layout;

/** `struct xen_sysctl_sched_id`. */
export const schedulerId = {
  name: "struct xen_sysctl_sched_id",
  size: 4,
  fields: { sched_id: [0, "u32"] },
} as const satisfies Layout;

/** `struct xen_memory_reservation`. */
export const memoryReservation = {
  name: "struct xen_memory_reservation",
  size: 32,
  fields: {
    extent_start: [0, "u64"],
    nr_extents: [8, "u64"],
    extent_order: [16, "u32"],
    mem_flags: [20, "u32"],
    domid: [24, "u16"],
  },
} as const satisfies Layout;

/** `struct xen_foreign_memory_map`. */
export const foreignMemoryMap = {
  name: "struct xen_foreign_memory_map",
  size: 24,
  fields: { domid: [0, "u16"], "map.nr_entries": [8, "u32"], "map.buffer": [16, "u64"] },
} as const satisfies Layout;

/** Size of an entry of a memory map, which is packed: address u64, size u64, type u32. */
export const E820_ENTRY_SIZE = 20;

/** `struct xen_hvm_param`. */
export const hvmParameter = {
  name: "struct xen_hvm_param",
  size: 16,
  fields: { domid: [0, "u16"], index: [4, "u32"], value: [8, "u64"] },
} as const satisfies Layout;

/** `struct evtchn_alloc_unbound`. */
export const allocUnbound = {
  name: "struct evtchn_alloc_unbound",
  size: 8,
  fields: { dom: [0, "u16"], remote_dom: [2, "u16"], port: [4, "u32"] },
} as const satisfies Layout;

/** `struct sched_remote_shutdown`. */
export const remoteShutdown = {
  name: "struct sched_remote_shutdown",
  size: 8,
  fields: { domain_id: [0, "u16"], reason: [4, "u32"] },
} as const satisfies Layout;

/** `struct mmuext_op`. */
export const mmuExtOp = {
  name: "struct mmuext_op",
  size: 24,
  fields: { cmd: [0, "u32"], "arg1.mfn": [8, "u64"], "arg2.nr_ents": [16, "u32"] },
} as const satisfies Layout;

/** `struct grant_entry_v1`: one of the 512 of a grant table's frame. */
export const grantEntry = {
  name: "struct grant_entry_v1",
  size: 8,
  fields: { flags: [0, "u16"], domid: [2, "u16"], frame: [4, "u32"] },
} as const satisfies Layout;

/** `struct hvm_save_descriptor`: what each record of an HVM context begins with. */
export const saveDescriptor = {
  name: "struct hvm_save_descriptor",
  size: 8,
  fields: { typecode: [0, "u16"], instance: [2, "u16"], length: [4, "u32"] },
} as const satisfies Layout;

/** Types of records of an HVM context. */
export const HVM_SAVE = { END: 0, HEADER: 1, CPU: 2, MTRR: 14 } as const;

/** `struct hvm_save_header`. */
export const saveHeader = {
  name: "struct hvm_save_header",
  size: 24,
  fields: {
    magic: [0, "u32"],
    version: [4, "u32"],
    changeset: [8, "u64"],
    cpuid: [16, "u32"],
    gtsc_khz: [20, "u32"],
  },
} as const satisfies Layout;

/** `struct hvm_hw_cpu`: the fields that a vCPU's start needs. */
export const hvmCpu = {
  name: "struct hvm_hw_cpu",
  size: 1032,
  fields: {
    rax: [512, "u64"],
    rbx: [520, "u64"],
    rsp: [568, "u64"],
    rip: [640, "u64"],
    rflags: [648, "u64"],
    cr0: [656, "u64"],
    cr3: [672, "u64"],
    cr4: [680, "u64"],
    dr6: [720, "u64"],
    dr7: [728, "u64"],
    cs_limit: [768, "u32"],
    ds_limit: [772, "u32"],
    es_limit: [776, "u32"],
    ss_limit: [788, "u32"],
    tr_limit: [792, "u32"],
    cs_arbytes: [888, "u32"],
    ds_arbytes: [892, "u32"],
    es_arbytes: [896, "u32"],
    ss_arbytes: [908, "u32"],
    tr_arbytes: [912, "u32"],
  },
} as const satisfies Layout;

/** `struct hvm_hw_mtrr`: the fields that a vCPU's start needs. */
export const hvmMtrr = {
  name: "struct hvm_hw_mtrr",
  size: 240,
  fields: { msr_pat_cr: [0, "u64"], msr_mtrr_cap: [224, "u64"], msr_mtrr_def_type: [232, "u64"] },
} as const satisfies Layout;

/** Layouts that are the same in all versions. */
export const XEN_LAYOUTS: readonly Layout[] = [
  domctlEnvelope,
  sysctlEnvelope,
  maxMemory,
  maxVcpus,
  shadowOp,
  hvmContext,
  vcpuContext,
  addressSize,
  hypercallInit,
  tscInfo,
  vcpuAffinity,
  schedulerOp,
  domainList,
  readConsole,
  schedulerId,
  memoryReservation,
  foreignMemoryMap,
  hvmParameter,
  allocUnbound,
  remoteShutdown,
  mmuExtOp,
  grantEntry,
  saveDescriptor,
  saveHeader,
  hvmCpu,
  hvmMtrr,
];

/** Fields of `struct xen_domctl_getdomaininfo`. */
export type DomainInfoFields = Readonly<
  Record<
    | "domain"
    | "flags"
    | "tot_pages"
    | "max_pages"
    | "outstanding_pages"
    | "shr_pages"
    | "paged_pages"
    | "shared_info_frame"
    | "cpu_time"
    | "nr_online_vcpus"
    | "max_vcpu_id"
    | "ssidref"
    | "handle"
    | "cpupool"
    | "arch_config.emulation_flags",
    Field
  >
>;

/** Fields of `struct xen_sysctl_physinfo`. */
export type PhysicalInfoFields = Readonly<
  Record<
    | "threads_per_core"
    | "cores_per_socket"
    | "nr_cpus"
    | "max_cpu_id"
    | "nr_nodes"
    | "max_node_id"
    | "cpu_khz"
    | "capabilities"
    | "total_pages"
    | "free_pages"
    | "scrub_pages"
    | "outstanding_pages"
    | "max_mfn",
    Field
  >
>;

/** What `domctl` and `sysctl` are like in a version of Xen. */
export interface XenInterface {
  /** The version, such as `4.17`. */
  readonly version: string;
  /** `XEN_DOMCTL_INTERFACE_VERSION`. */
  readonly domctl: number;
  /** `XEN_SYSCTL_INTERFACE_VERSION`. */
  readonly sysctl: number;
  /** Whether it has `XEN_DOMCTL_set_paging_mempool_size`; what was before counts in MiB. */
  readonly hasPagingPool: boolean;
  /** `struct xen_domctl_createdomain`; `grant_opts` is there from 4.16 on. */
  readonly createDomain: Layout;
  /** `struct xen_domctl_getdomaininfo`. */
  readonly domainInfo: Layout<DomainInfoFields>;
  /** `struct xen_sysctl_physinfo`. */
  readonly physicalInfo: Layout<PhysicalInfoFields>;
}

/** Lays out what each version has added to the end of `struct xen_domctl_createdomain`, without padding. */
function createDomain(...added: readonly (readonly [string, ...("u16" | "u32")[]])[]): Layout {
  const fields: Record<string, Field> = {
    ssidref: [0, "u32"],
    handle: [4, "u8", 16],
    flags: [20, "u32"],
    iommu_opts: [24, "u32"],
    max_vcpus: [28, "u32"],
    max_evtchn_port: [32, "u32"],
    max_grant_frames: [36, "i32"],
    max_maptrack_frames: [40, "i32"],
  };
  let size = 44;
  for (const [name, type = "u32"] of added) {
    fields[name] = [size, type];
    size += type === "u32" ? 4 : 2;
  }
  return { name: "struct xen_domctl_createdomain", size, fields };
}

function domainInfo(archOffset: 96 | 104): Layout<DomainInfoFields> {
  return {
    name: "struct xen_domctl_getdomaininfo",
    // In 4.14, the end is padding.
    size: archOffset + 8,
    fields: {
      domain: [0, "u16"],
      flags: [4, "u32"],
      tot_pages: [8, "u64"],
      max_pages: [16, "u64"],
      outstanding_pages: [24, "u64"],
      shr_pages: [32, "u64"],
      paged_pages: [40, "u64"],
      shared_info_frame: [48, "u64"],
      cpu_time: [56, "u64"],
      nr_online_vcpus: [64, "u32"],
      max_vcpu_id: [68, "u32"],
      ssidref: [72, "u32"],
      handle: [76, "u8", 16],
      cpupool: [92, "u32"],
      "arch_config.emulation_flags": [archOffset, "u32"],
    },
  };
}

function physicalInfo(pagesOffset: 32 | 40): Layout<PhysicalInfoFields> {
  return {
    name: "struct xen_sysctl_physinfo",
    size: pagesOffset + 72,
    fields: {
      threads_per_core: [0, "u32"],
      cores_per_socket: [4, "u32"],
      nr_cpus: [8, "u32"],
      max_cpu_id: [12, "u32"],
      nr_nodes: [16, "u32"],
      max_node_id: [20, "u32"],
      cpu_khz: [24, "u32"],
      capabilities: [28, "u32"],
      total_pages: [pagesOffset, "u64"],
      free_pages: [pagesOffset + 8, "u64"],
      scrub_pages: [pagesOffset + 16, "u64"],
      outstanding_pages: [pagesOffset + 24, "u64"],
      max_mfn: [pagesOffset + 32, "u64"],
    },
  };
}

const EMULATION_FLAGS = ["arch.emulation_flags"] as const;
const ARCH = [EMULATION_FLAGS, ["arch.misc_flags"]] as const;
const create4_17 = createDomain(["grant_opts"], ["vmtrace_size"], ["cpupool_id"], ...ARCH);
const create4_19 = createDomain(["grant_opts"], ["altp2m_opts"], ["vmtrace_size"], ["cpupool_id"], ...ARCH);
const create4_21 = createDomain(
  ["grant_opts"],
  ["altp2m.opts", "u16"],
  ["altp2m.nr", "u16"],
  ["vmtrace_size"],
  ["cpupool_id"],
  ...ARCH,
);
const later = { hasPagingPool: true, domainInfo: domainInfo(104), physicalInfo: physicalInfo(40) } as const;
const earlier = { hasPagingPool: false, physicalInfo: physicalInfo(32) } as const;

/** The versions that are known. */
export const XEN_INTERFACES: readonly XenInterface[] = [
  {
    version: "4.14",
    domctl: 0x12,
    sysctl: 0x13,
    ...earlier,
    createDomain: createDomain(EMULATION_FLAGS),
    domainInfo: domainInfo(96),
  },
  {
    version: "4.15",
    domctl: 0x13,
    sysctl: 0x13,
    ...earlier,
    createDomain: createDomain(["vmtrace_size"], ...ARCH),
    domainInfo: domainInfo(96),
  },
  {
    version: "4.16",
    domctl: 0x14,
    sysctl: 0x14,
    ...earlier,
    createDomain: createDomain(["grant_opts"], ["vmtrace_size"], ...ARCH),
    domainInfo: domainInfo(104),
  },
  { version: "4.17", domctl: 0x15, sysctl: 0x15, ...later, createDomain: create4_17 },
  { version: "4.18", domctl: 0x16, sysctl: 0x15, ...later, createDomain: create4_17 },
  { version: "4.19", domctl: 0x17, sysctl: 0x15, ...later, createDomain: create4_19 },
  { version: "4.20", domctl: 0x17, sysctl: 0x15, ...later, createDomain: create4_19 },
  { version: "4.21", domctl: 0x17, sysctl: 0x16, ...later, createDomain: create4_21 },
  { version: "4.22", domctl: 0x18, sysctl: 0x16, ...later, createDomain: create4_21 },
];
