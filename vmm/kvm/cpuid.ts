/**
 * What a guest is told of its CPUs: what KVM supports, with the topology of the machine (Intel SDM volume 2, CPUID; AMD
 * APM volume 3, appendix E).
 *
 * @module
 */

import type { CpuidEntry } from "./vm.ts";

/** A machine's CPUs. */
export interface CpuidOptions {
  /** Number of the vCPU, which is its APIC number. */
  readonly cpu: number;
  /** How many vCPUs there are. */
  readonly cpus: number;
  /** Whether KVM has the timer that counts down to a time stamp. */
  readonly hasDeadlineTimer: boolean;
}

const HYPERVISOR = 1 << 31;
const DEADLINE_TIMER = 1 << 24;
/** Performance capabilities register, which KVM does not give. */
const PDCM = 1 << 15;
const HYPER_THREADING = 1 << 28;
/** Flush granularity in units of 8 bytes: 64 bytes. */
const FLUSH_SIZE = 8 << 8;
const SIGNIFICANT_INDEX = 1;
const ENERGY_BIAS = 1 << 3;
/** Levels of topology. */
const LEVEL_THREAD = 1;
const LEVEL_CORE = 2;

/**
 * Makes the entries of a vCPU.
 *
 * @param supported What KVM supports
 * @param options Which vCPU of how many
 * @returns The entries
 */
export function guestCpuid(supported: readonly CpuidEntry[], options: CpuidOptions): CpuidEntry[] {
  const { cpu, cpus } = options;
  const bits = Math.ceil(Math.log2(cpus));
  // Bit 31 makes a number negative: `>>> 0` takes it back.
  const edited = supported.filter((entry) => entry.function !== 0xb && entry.function !== 0x1f).map(
    (entry) => {
      const { eax, ebx, ecx, edx } = entry;
      switch (entry.function) {
        case 1:
          return {
            ...entry,
            ebx: (cpu << 24 | Math.min(cpus, 255) << 16 | FLUSH_SIZE | ebx & 0xff) >>> 0,
            ecx: ((ecx & ~PDCM & ~DEADLINE_TIMER) | HYPERVISOR |
              (options.hasDeadlineTimer ? DEADLINE_TIMER : 0)) >>> 0,
            edx: (cpus > 1 ? edx | HYPER_THREADING : edx & ~HYPER_THREADING) >>> 0,
          };
        case 4:
          // Caches above the second level are shared by all.
          if ((eax & 0x1f) === 0) return entry;
          return {
            ...entry,
            eax: ((cpus - 1) << 26 | ((eax >> 5 & 7) > 2 ? cpus - 1 : 0) << 14 | eax & 0x3fff) >>> 0,
          };
        case 6:
          return { ...entry, ecx: ecx & ~ENERGY_BIAS };
        case 0xa:
          return { ...entry, eax: 0, ebx: 0, ecx: 0, edx: 0 };
        case 0x8000_0008:
          return { ...entry, ecx: (ecx & ~0xf0ff | bits << 12 | cpus - 1) >>> 0 };
        case 0x8000_001d:
          return { ...entry, eax: (eax & ~(0xfff << 14) | ((eax >> 5 & 7) > 2 ? cpus - 1 : 0) << 14) >>> 0 };
        case 0x8000_001e:
          return { ...entry, eax: cpu, ebx: ebx & ~0xffff | cpu, ecx: 0 };
        default:
          return entry;
      }
    },
  );
  const highest = supported.find((entry) => entry.function === 0)?.eax ?? 0;
  for (const leaf of [0xb, 0x1f]) {
    if (leaf > highest) continue;
    // Threads of a core: one. Then cores of the package, and the level that ends the list.
    const levels = [[0, 1, LEVEL_THREAD], [bits, cpus, LEVEL_CORE], [0, 0, 0]] as const;
    levels.forEach(([eax, ebx, level], index) =>
      edited.push({
        function: leaf,
        index,
        flags: SIGNIFICANT_INDEX,
        eax,
        ebx,
        ecx: level << 8 | index,
        edx: cpu,
      })
    );
  }
  return edited;
}

/** Registers as a reset with firmware leaves them (Intel SDM volume 4; AMD APM volume 2, appendix A), by number. */
export const BOOT_MSRS: readonly (readonly [number: number, value: bigint])[] = [
  [0x174, 0n], // SYSENTER_CS
  [0x175, 0n], // SYSENTER_ESP
  [0x176, 0n], // SYSENTER_EIP
  [0xc000_0081, 0n], // STAR
  [0xc000_0082, 0n], // LSTAR
  [0xc000_0083, 0n], // CSTAR
  [0xc000_0084, 0n], // SYSCALL_MASK
  [0xc000_0102, 0n], // KERNEL_GS_BASE
  [0x10, 0n], // TSC
  [0x1a0, 1n], // MISC_ENABLE: fast strings
  [0x2ff, 0x806n], // MTRRdefType: enabled, and everything is written back
];
