/**
 * Whether `/dev/kvm` runs code. That it opens says little: some hosts' devices emulate a guest's instructions one by one,
 * and stop at those that they do not know.
 *
 * @module
 */

import { KVM_EXIT, Mapping } from "../../ffi/mod.ts";
import { enterLongMode, writeLongModeTables } from "../boot/long_mode.ts";
import { MachineError } from "../errors.ts";
import { EventLoop } from "../event_loop.ts";
import { guestCpuid } from "./cpuid.ts";
import { Kvm } from "./vm.ts";

/** What a probe of KVM found. */
export interface KvmProbe {
  /** Whether stock kernels can be expected to run. */
  readonly isUsable: boolean;
  /** What was found, in words. */
  readonly detail: string;
  /** Time of one turn of a loop of two instructions, in nanoseconds; undefined where it did not run. */
  readonly turn?: number;
}

const BASE = 0xc000;
const MEMORY = 0x1_0000;
const TURNS = 4_000_000;
/** What one turn may take, in nanoseconds: a CPU takes less than one, an emulated CPU ten, an emulated instruction hundreds. */
const LONGEST_TURN = 60;
const CR4_OSXSAVE = 1n << 18n;
/** Bit 26 of ECX of CPUID 1. */
const CPUID_XSAVE = 1 << 26;

/** A kernel reads which state its CPU has by xgetbv, early, and long loops follow. */
const PAYLOAD = (hasXsave: boolean): number[] => [
  ...(hasXsave ? [0x31, 0xc9, 0x0f, 0x01, 0xd0] : []), //  xor ecx, ecx; xgetbv
  ...[0xb9, TURNS & 0xff, TURNS >> 8 & 0xff, TURNS >> 16 & 0xff, TURNS >> 24], // mov ecx, TURNS
  ...[0xff, 0xc9, 0x75, 0xfc], //                          loop: dec ecx; jnz loop
  ...[0xe6, 0x80, 0xf4], //                                out 0x80, al; hlt
];

/**
 * Runs a payload in long mode and looks how fast it is.
 *
 * @returns What was found
 */
export function probeKvm(): KvmProbe {
  try {
    using stack = new DisposableStack();
    const kvm = stack.use(new Kvm());
    const missing = (["IRQFD", "IOEVENTFD", "IMMEDIATE_EXIT", "READONLY_MEM"] as const).filter((name) =>
      kvm.capability(name) === 0
    );
    if (missing.length > 0) {
      return { isUsable: false, detail: `/dev/kvm lacks what our machines need: ${missing.join(", ")}` };
    }
    const memory = stack.use(new Mapping(MEMORY));
    const loop = stack.use(new EventLoop());
    const vm = stack.use(kvm.createVm({ irqchip: true }));
    vm.setMemory(0, 0, memory);
    const vcpu = vm.createVcpu();
    const supported = kvm.supportedCpuid();
    vcpu.setCpuid(guestCpuid(supported, { cpu: 0, cpus: 1, hasDeadlineTimer: false }));
    const hasXsave = supported.some((entry) => entry.function === 1 && (entry.ecx & CPUID_XSAVE) !== 0);
    new Uint8Array(memory.buffer).set(PAYLOAD(hasXsave), BASE);
    writeLongModeTables(memory.buffer);
    vcpu.changeSystemRegisters((registers) => {
      enterLongMode(registers);
      if (hasXsave) registers.set("cr4", registers.get("cr4") | CR4_OSXSAVE);
    });
    vcpu.setRegisters({ rip: BASE, rflags: 2 });
    let result: number | undefined;
    loop.watch(vcpu.event, () => result = vcpu.take());
    const start = performance.now();
    vcpu.resume();
    loop.poll(Math.ceil(TURNS * LONGEST_TURN * 4 / 1e6));
    const turn = (performance.now() - start) * 1e6 / TURNS;
    loop.unwatch(vcpu.event);
    const reason = Number(vcpu.run.get("exit_reason"));
    if (result === undefined) {
      return {
        isUsable: false,
        detail: `/dev/kvm opens but runs code too slowly: it emulates each instruction`,
      };
    }
    if (result !== 0 || reason !== KVM_EXIT.IO) {
      const name = Object.entries(KVM_EXIT).find(([, number]) => number === reason)?.[0] ?? reason;
      return {
        isUsable: false,
        detail: `/dev/kvm opens but does not run 64-bit code: KVM_RUN returned ${result} with exit ${name}`,
      };
    }
    const speed = `a loop takes ${turn.toFixed(2)} ns a turn`;
    return turn <= LONGEST_TURN
      ? { isUsable: true, detail: speed, turn }
      : { isUsable: false, detail: `/dev/kvm opens but emulates each instruction: ${speed}`, turn };
  } catch (error) {
    if (Deno.build.os !== "linux" || Deno.build.arch !== "x86_64") {
      return { isUsable: false, detail: "KVM is only on Linux, and our engine for it only for x86-64" };
    }
    const detail = error instanceof Error ? error.message : String(error);
    return {
      isUsable: false,
      detail: error instanceof MachineError ? detail : `/dev/kvm cannot be used: ${detail}`,
    };
  }
}
