/**
 * Exits: the round trip from a vCPU's native thread to the isolate and back, against a C loop on the same `/dev/kvm`.
 *
 * @module
 */

import { Mapping } from "../ffi/mod.ts";
import { EventLoop } from "../vmm/event_loop.ts";
import { Kvm, type Vcpu, type Vm } from "../vmm/kvm/vm.ts";
import { compared, type Figure, median, rounded } from "./figure.ts";

const ROUNDS = 9;
const EXITS = 5000;
/** mov dx, 0x3f8; out dx, al; jmp -3 */
const PAYLOAD = [0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd];
const BASE = 0x1000;

/** The same payload, run by the thread that made the vCPU, without anything between. */
const PEER = `
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
int main(void) {
  static const unsigned char payload[] = { ${PAYLOAD.join(", ")} };
  int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0);
  unsigned char *ram = mmap(0, 0x10000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  memcpy(ram + ${BASE}, payload, sizeof payload);
  struct kvm_userspace_memory_region region = { .memory_size = 0x10000, .userspace_addr = (unsigned long)ram };
  ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
  int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  struct kvm_run *run = mmap(0, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  struct kvm_sregs sregs;
  ioctl(vcpu, KVM_GET_SREGS, &sregs);
  sregs.cs.base = sregs.cs.selector = 0;
  ioctl(vcpu, KVM_SET_SREGS, &sregs);
  struct kvm_regs regs = { .rip = ${BASE}, .rflags = 2 };
  ioctl(vcpu, KVM_SET_REGS, &regs);
  struct timespec from, to;
  for (int i = 0; i < 1000; i++) ioctl(vcpu, KVM_RUN, 0);
  clock_gettime(CLOCK_MONOTONIC, &from);
  for (int i = 0; i < ${EXITS}; i++) if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO) return 1;
  clock_gettime(CLOCK_MONOTONIC, &to);
  printf("%f\\n", ((to.tv_sec - from.tv_sec) * 1e6 + (to.tv_nsec - from.tv_nsec) / 1e3) / ${EXITS});
  return 0;
}
`;

const LABELS = {
  blocking: "on a thread of its own",
  served: "as machines are served",
  waiting: "beside other work",
} as const;

interface Guest {
  readonly vm: Vm;
  readonly vcpu: Vcpu;
  readonly memory: Mapping;
}

function makeGuest(kvm: Kvm): Guest {
  const vm = kvm.createVm();
  const memory = new Mapping(0x10000);
  new Uint8Array(memory.buffer).set(PAYLOAD, BASE);
  vm.setMemory(0, 0, memory);
  const vcpu = vm.createVcpu();
  vcpu.changeSystemRegisters((registers) => {
    for (let byte = 0; byte < 8; byte++) registers.set("cs", 0, byte);
    registers.set("cs", 0, 12);
    registers.set("cs", 0, 13);
  });
  vcpu.setRegisters({ rip: BASE, rflags: 2 });
  return { vm, vcpu, memory };
}

/** Microseconds an exit, with a thread that does nothing else. */
function blocking(loop: EventLoop, vcpu: Vcpu): number {
  const start = performance.now();
  for (let count = 0; count < EXITS; count++) {
    vcpu.resume();
    loop.poll(1000);
  }
  return (performance.now() - start) / EXITS * 1000;
}

/** The same, with a thread that other work can use meanwhile. */
async function waiting(loop: EventLoop, vcpu: Vcpu): Promise<number> {
  const start = performance.now();
  for (let count = 0; count < EXITS; count++) {
    vcpu.resume();
    await loop.wait();
  }
  return (performance.now() - start) / EXITS * 1000;
}

/** As machines are served: beside other work, but what follows at once is waited for on the thread. */
async function served(loop: EventLoop, vcpu: Vcpu): Promise<number> {
  const start = performance.now();
  let count = 0;
  loop.unwatch(vcpu.event);
  loop.watch(vcpu.event, () => {
    vcpu.take();
    if (++count === EXITS) return;
    vcpu.resume();
    loop.expectMore();
  });
  vcpu.resume();
  await loop.run(() => count === EXITS);
  loop.unwatch(vcpu.event);
  loop.watch(vcpu.event, () => void vcpu.take());
  return (performance.now() - start) / EXITS * 1000;
}

async function compilePeer(folder: string): Promise<string | undefined> {
  await Deno.writeTextFile(`${folder}/peer.c`, PEER);
  try {
    const { success } = await new Deno.Command("cc", {
      args: ["-O2", "-o", `${folder}/peer`, `${folder}/peer.c`],
    }).output();
    return success ? `${folder}/peer` : undefined;
  } catch {
    return undefined;
  }
}

/** The figures. */
export default async function* exit(): AsyncIterable<Figure> {
  const folder = await Deno.makeTempDir();
  using kvm = new Kvm();
  try {
    const peer = await compilePeer(folder);
    const { vm, vcpu } = makeGuest(kvm);
    const loop = new EventLoop();
    loop.watch(vcpu.event, () => void vcpu.take());
    const series: Record<"blocking" | "served" | "waiting" | "peer", number[]> = {
      blocking: [],
      served: [],
      waiting: [],
      peer: [],
    };
    for (let round = 0; round <= ROUNDS; round++) {
      const a = blocking(loop, vcpu);
      const b = await waiting(loop, vcpu);
      const d = await served(loop, vcpu);
      const c = peer === undefined
        ? NaN
        : Number(new TextDecoder().decode((await new Deno.Command(peer).output()).stdout));
      if (round > 0) {
        [series.blocking.push(a), series.waiting.push(b), series.served.push(d), series.peer.push(c)];
      }
    }
    for (const name of ["blocking", "served", "waiting"] as const) {
      const label = `round trip of an exit, ${LABELS[name]}`;
      yield peer === undefined
        ? { name: label, value: rounded(median(series[name])), unit: "us" }
        : compared(label, "us", series[name], "a C loop that calls KVM_RUN", series.peer);
    }
    const rss = () => Deno.memoryUsage().rss / 2 ** 20;
    const before = rss();
    const guests = Array.from({ length: 100 }, () => makeGuest(kvm));
    yield {
      name: "resident memory of one of 100 more machines",
      value: rounded((rss() - before) / 100),
      unit: "MiB",
    };
    for (const guest of guests) {
      guest.vm[Symbol.dispose]();
      guest.memory[Symbol.dispose]();
    }
    loop.unwatch(vcpu.event);
    loop[Symbol.dispose]();
    vm[Symbol.dispose]();
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
