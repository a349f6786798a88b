import assert from "node:assert/strict";
import { Fd, KVM_EXIT, KVM_MEM, Mapping } from "../../ffi/mod.ts";
import { enterLongMode, writeLongModeTables } from "../boot/long_mode.ts";
import { EventLoop } from "../event_loop.ts";
import { ENTRY_LAYOUT } from "./thread.ts";
import { Kvm, type Vcpu, type Vm } from "./vm.ts";

function whyNot(): string | undefined {
  if (Deno.build.os !== "linux" || Deno.build.arch !== "x86_64") return "not Linux on x86-64";
  try {
    Deno.openSync("/dev/kvm", { read: true, write: true }).close();
    return undefined;
  } catch (error) {
    return `/dev/kvm: ${error instanceof Error ? error.message.split(":")[0] : error}`;
  }
}

const reason = whyNot();

function kvmTest(name: string, run: () => void | Promise<void>): void {
  Deno.test({
    name: reason === undefined ? name : `${name} (skipped: ${reason})`,
    ignore: reason !== undefined,
    fn: run,
  });
}

const MEMORY = 0x10000;
const BASE = 0x1000;

/** A machine with one vCPU in real mode at the start of a payload. */
class Guest implements Disposable {
  readonly kvm = new Kvm();
  readonly memory = new Mapping(MEMORY);
  readonly loop = new EventLoop();
  #result: number | undefined;
  readonly vm: Vm;
  readonly vcpu: Vcpu;

  constructor(payload: readonly number[], options: { irqchip?: boolean; flags?: number } = {}) {
    this.vm = this.kvm.createVm(options);
    new Uint8Array(this.memory.buffer).set(payload, BASE);
    this.vm.setMemory(0, 0, this.memory, options.flags ?? 0);
    this.vcpu = this.vm.createVcpu();
    this.loop.watch(this.vcpu.event, () => this.#result = this.vcpu.take());
    this.vcpu.changeSystemRegisters((registers) => {
      // Code segment 0: base and selector.
      for (let byte = 0; byte < 8; byte++) registers.set("cs", 0, byte);
      registers.set("cs", 0, 12);
      registers.set("cs", 0, 13);
    });
    this.vcpu.setRegisters({ rip: BASE, rflags: 2, rax: 0x41 });
  }

  /** Goes on until the next exit and gives its reason. */
  next(): number {
    this.vcpu.resume();
    const result = this.wait(20_000);
    assert.equal(result, 0, `KVM_RUN returned ${result}`);
    return Number(this.vcpu.run.get("exit_reason"));
  }

  /** What `KVM_RUN` returned; undefined after the timeout. */
  wait(timeout: number): number | undefined {
    this.#result = undefined;
    this.loop.poll(timeout);
    return this.#result;
  }

  [Symbol.dispose](): void {
    this.loop.unwatch(this.vcpu.event);
    this.loop[Symbol.dispose]();
    this.vm[Symbol.dispose]();
    this.memory[Symbol.dispose]();
    this.kvm[Symbol.dispose]();
  }
}

Deno.test("the threads' code jumps to where it waits", () => {
  assert.deepEqual(ENTRY_LAYOUT.jumps, [ENTRY_LAYOUT.wait, ENTRY_LAYOUT.wait]);
});

kvmTest("a payload writes to a port and halts", () => {
  // mov dx, 0x3f8; out dx, al; inc al; out dx, al; hlt
  using guest = new Guest([0xba, 0xf8, 0x03, 0xee, 0xfe, 0xc0, 0xee, 0xf4]);
  const written: number[] = [];
  for (let round = 0; round < 2; round++) {
    assert.equal(guest.next(), KVM_EXIT.IO);
    assert.equal(guest.vcpu.run.get("io.port"), 0x3f8n);
    written.push(guest.vcpu.runPage[Number(guest.vcpu.run.get("io.data_offset"))]!);
  }
  assert.deepEqual(written, [0x41, 0x42]);
  assert.equal(guest.next(), KVM_EXIT.HLT);
  assert.equal(guest.vcpu.registers().get("rax") & 0xffn, 0x42n);
});

kvmTest("a payload reads what a port gives", () => {
  // mov dx, 0x71; in al, dx; mov [0x2000], al; hlt
  using guest = new Guest([0xba, 0x71, 0x00, 0xec, 0xa2, 0x00, 0x20, 0xf4]);
  assert.equal(guest.next(), KVM_EXIT.IO);
  guest.vcpu.runPage[Number(guest.vcpu.run.get("io.data_offset"))] = 0x99;
  assert.equal(guest.next(), KVM_EXIT.HLT);
  assert.equal(new Uint8Array(guest.memory.buffer)[0x2000], 0x99);
});

kvmTest("an access outside of memory exits with its address", () => {
  // mov ax, 0x2000; mov ds, ax; mov byte [0x10], 0x5a; hlt: address 0x20010 is beyond the memory
  using guest = new Guest([0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xc6, 0x06, 0x10, 0x00, 0x5a, 0xf4]);
  assert.equal(guest.next(), KVM_EXIT.MMIO);
  assert.equal(guest.vcpu.run.get("mmio.phys_addr"), 0x20010n);
  assert.equal(guest.vcpu.run.get("mmio.is_write"), 1n);
  assert.equal(guest.vcpu.run.get("mmio.data"), 0x5an);
  assert.equal(guest.next(), KVM_EXIT.HLT);
});

kvmTest("an ioeventfd takes a write without an exit", () => {
  // mov dx, 0x500; out dx, al; hlt
  using guest = new Guest([0xba, 0x00, 0x05, 0xee, 0xf4]);
  using event = Fd.event();
  using epoll = Fd.epoll();
  using memory = new Mapping(4096);
  epoll.watch(event);
  guest.vm.setIoEvent(event, { address: 0x500, length: 1, isPort: true });
  assert.equal(epoll.poll(memory.pointer, 0), 0);
  assert.equal(guest.next(), KVM_EXIT.HLT);
  assert.equal(epoll.poll(memory.pointer, 0), 1);
  assert.equal(event.drain(), 1n);
});

kvmTest("an irqfd interrupts a guest that halts", () => {
  const payload = new Array<number>(0x1000).fill(0xf4);
  const put = (at: number, ...bytes: number[]) => bytes.forEach((byte, index) => payload[at + index] = byte);
  // cli; the 8259: edge, vectors from 0x20, no cascade to speak of, 8086 mode, nothing masked
  put(
    0,
    0xfa,
    0xb0,
    0x11,
    0xe6,
    0x20,
    0xb0,
    0x20,
    0xe6,
    0x21,
    0xb0,
    4,
    0xe6,
    0x21,
    0xb0,
    1,
    0xe6,
    0x21,
    0xb0,
    0,
    0xe6,
    0x21,
  );
  // mov word [0x90], 0x1800; mov word [0x92], 0: the handler of vector 0x24. sti; hlt; jmp -3
  put(21, 0xc7, 0x06, 0x90, 0, 0, 0x18, 0xc7, 0x06, 0x92, 0, 0, 0, 0xfb, 0xf4, 0xeb, 0xfd);
  // mov dx, 0x3f8; out dx, al; mov al, 0x20; out 0x20, al; iret
  put(0x800, 0xba, 0xf8, 0x03, 0xee, 0xb0, 0x20, 0xe6, 0x20, 0xcf);
  using guest = new Guest(payload, { irqchip: true });
  using event = Fd.event();
  guest.vm.setIrqEvent(event, 4);
  for (let round = 0; round < 3; round++) {
    guest.vcpu.resume();
    if (round === 0) assert.equal(guest.wait(50), undefined);
    event.signal();
    assert.equal(guest.wait(20_000), 0);
    assert.equal(guest.vcpu.run.get("exit_reason"), BigInt(KVM_EXIT.IO));
    assert.equal(guest.vcpu.run.get("io.port"), 0x3f8n);
  }
  // Ended, it keeps what it counts.
  guest.vm.setIrqEvent(event, 4, true);
  event.signal();
  assert.equal(event.drain(), 1n);
});

kvmTest("the log of dirty pages tells what a guest wrote to, once", () => {
  // loop: mov [0x5000], al; mov [0x7fff], al; out dx, al; jmp loop
  using guest = new Guest([0xa2, 0x00, 0x50, 0xa2, 0xff, 0x7f, 0xee, 0xeb, 0xf7], {
    flags: KVM_MEM.LOG_DIRTY_PAGES,
  });
  using bitmap = new Mapping(4096);
  const pages = () => {
    guest.vm.takeDirtyLog(0, bitmap);
    const bits = new DataView(bitmap.buffer).getUint32(0, true);
    return Array.from({ length: 16 }, (_, page) => page).filter((page) => (bits >> page & 1) === 1);
  };
  pages();
  for (let round = 0; round < 3; round++) {
    assert.equal(guest.next(), KVM_EXIT.IO);
    // A page that was only read may count as written where KVM maps it writable at once: the code's.
    assert.deepEqual(pages().filter((page) => page !== BASE >> 12), [5, 7]);
    assert.deepEqual(pages(), []);
  }
});

kvmTest("a kick takes a vCPU out of an endless loop, and it goes on afterwards", () => {
  // loop: inc word [0x2000]; jmp loop
  using guest = new Guest([0xff, 0x06, 0x00, 0x20, 0xeb, 0xfa]);
  const count = new Uint16Array(guest.memory.buffer, 0x2000, 1);
  for (let round = 0; round < 20; round++) {
    const before = Atomics.load(count, 0);
    guest.vcpu.resume();
    while (Atomics.load(count, 0) === before);
    assert.equal(guest.wait(1), undefined);
    guest.vcpu.kick();
    assert.equal(guest.wait(20_000), -4);
    guest.vcpu.run.set("immediate_exit", 0);
  }
});

kvmTest("immediate_exit keeps a vCPU from entering the guest", () => {
  using guest = new Guest([0xf4]);
  guest.vcpu.run.set("immediate_exit", 1);
  guest.vcpu.resume();
  assert.equal(guest.wait(20_000), -4);
  guest.vcpu.run.set("immediate_exit", 0);
  assert.equal(guest.next(), KVM_EXIT.HLT);
});

kvmTest("many machines in turn leave no descriptor and no memory", () => {
  const run = () => {
    using guest = new Guest([0xba, 0xf8, 0x03, 0xee, 0xf4]);
    assert.equal(guest.next(), KVM_EXIT.IO);
  };
  run();
  const descriptors = () => [...Deno.readDirSync("/proc/self/fd")].length;
  const maps = () => Deno.readTextFileSync("/proc/self/maps").split("\n").length;
  const threads = () => [...Deno.readDirSync("/proc/self/task")].length;
  const opened = descriptors();
  // KVM ends kernel threads of its own a moment later: this may count one of the first run's.
  const started = threads();
  const mapped = maps();
  for (let round = 0; round < 50; round++) run();
  for (let attempt = 0; attempt < 200 && threads() > started; attempt++) {
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10);
  }
  assert.equal(descriptors(), opened);
  assert.ok(threads() <= started, `${threads()} threads after 50 machines, ${started} before`);
  assert.ok(maps() - mapped < 25, `${maps() - mapped} more mappings after 50 machines`);
});

kvmTest("a running machine can be given up", () => {
  // jmp self
  const guest = new Guest([0xeb, 0xfe]);
  guest.vcpu.resume();
  guest[Symbol.dispose]();
});

kvmTest("one loop serves the vCPUs of many machines, and waits without holding up the thread", async () => {
  const guests = Array.from({ length: 10 }, () => new Guest([0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd]));
  const loop = new EventLoop();
  const exits = new Map<unknown, number>();
  for (const { vcpu } of guests) {
    loop.watch(vcpu.event, () => {
      assert.equal(vcpu.take(), 0);
      const count = (exits.get(vcpu) ?? 0) + 1;
      exits.set(vcpu, count);
      if (count < 20) vcpu.resume();
    });
  }
  for (const { vcpu } of guests) vcpu.resume();
  let ticks = 0;
  const timer = setInterval(() => ticks++, 1);
  while ([...exits.values()].filter((count) => count >= 20).length < guests.length) {
    await loop.wait();
  }
  const idle = loop.wait();
  await new Promise((resolve) => setTimeout(resolve, 20));
  loop.wake();
  assert.equal(await idle, 1);
  clearInterval(timer);
  assert.ok(ticks > 0);
  for (const guest of guests) {
    loop.unwatch(guest.vcpu.event);
    guest[Symbol.dispose]();
  }
  loop[Symbol.dispose]();
});

kvmTest("a payload goes to protected mode and writes to memory above its segment", () => {
  // lgdt [cs:0x1040]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 8:0x1020
  const payload = new Array<number>(0x80).fill(0xf4);
  const put = (at: number, ...bytes: number[]) => bytes.forEach((byte, index) => payload[at + index] = byte);
  put(
    0,
    0xfa,
    0x2e,
    0x0f,
    0x01,
    0x16,
    0x40,
    0x10,
    0x0f,
    0x20,
    0xc0,
    0x0c,
    0x01,
    0x0f,
    0x22,
    0xc0,
    0xea,
    0x20,
    0x10,
    8,
    0,
  );
  // mov ax, 16; mov ds, ax; mov dword [0x8000], 0x12345678; mov dx, 0x3f8; out dx, eax; hlt
  put(0x20, 0x66, 0xb8, 16, 0, 0x8e, 0xd8, 0xc7, 0x05, 0x00, 0x80, 0, 0, 0x78, 0x56, 0x34, 0x12);
  put(0x30, 0x66, 0xba, 0xf8, 0x03, 0xef, 0xf4);
  put(0x40, 23, 0, 0x50, 0x10, 0, 0);
  put(0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0, 0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0);
  using guest = new Guest(payload);
  assert.equal(guest.next(), KVM_EXIT.IO);
  assert.equal(guest.vcpu.run.get("io.size"), 4n);
  assert.equal(new DataView(guest.memory.buffer).getUint32(0x8000, true), 0x12345678);
  assert.equal(guest.next(), KVM_EXIT.HLT);
});

kvmTest("a payload runs in long mode from its first instruction", () => {
  // mov rax, 0x1122334455667788; mov [0x8000], rax; mov dx, 0x3f8; out dx, al; hlt
  using guest = new Guest([
    ...[0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11],
    ...[0x48, 0x89, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00],
    ...[0x66, 0xba, 0xf8, 0x03, 0xee, 0xf4],
  ]);
  writeLongModeTables(guest.memory.buffer);
  guest.vcpu.changeSystemRegisters(enterLongMode);
  assert.equal(guest.next(), KVM_EXIT.IO);
  assert.equal(new DataView(guest.memory.buffer).getBigUint64(0x8000, true), 0x1122_3344_5566_7788n);
  assert.equal(guest.next(), KVM_EXIT.HLT);
});
