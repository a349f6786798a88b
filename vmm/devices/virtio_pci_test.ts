import assert from "node:assert/strict";
import type { Fd } from "../../ffi/mod.ts";
import { EventLoop } from "../event_loop.ts";
import { SharedMemory } from "./shared_memory.ts";
import { ECAM, FUNCTION_MEMORY, HostBridge, PCI_WINDOW, PciBus } from "./pci_bus.ts";
import type { DeviceContext, VirtioDevice } from "./virtio_device.ts";
import { STATUS, VirtioPciFunction } from "./virtio_pci.ts";
import type { Virtqueue } from "./virtqueue.ts";

const VERSION_1 = 1n << 32n;

class FakeDevice implements VirtioDevice {
  readonly type = 4;
  readonly features = 1n | 1n << 33n;
  readonly queueSizes = [64, 8];
  readonly config = new Uint8Array([1, 2, 3, 4, 5, 6, 7, 8]);
  readonly written: number[][] = [];
  readonly notified: number[] = [];
  context: DeviceContext | undefined;
  resets = 0;
  isBusy = false;
  writeConfig(offset: number, bytes: Uint8Array): void {
    this.written.push([offset, ...bytes]);
  }
  activate(context: DeviceContext): void {
    this.context = context;
  }
  notify(queue: Virtqueue): void {
    this.notified.push(queue.index);
    while (true) {
      const chain = queue.pop();
      if (!chain) break;
      queue.push(chain.head, 0);
    }
    this.context!.interrupt(queue);
  }
  reset(): void {
    this.resets++;
    this.context = undefined;
  }
  [Symbol.dispose](): void {}
}

/** A bus with one device, and the guest's side of it. */
class Bench implements Disposable {
  readonly memory = new SharedMemory(1 << 20);
  readonly loop = new EventLoop();
  readonly device = new FakeDevice();
  readonly slots = new Map<number, { address: number; length: number }>();
  readonly messages = new Map<number, { event: Fd; data: number }>();
  readonly ioEvents = new Map<number, Fd>();
  readonly faults: string[] = [];
  readonly function: VirtioPciFunction;
  readonly bus: PciBus;

  constructor() {
    this.function = new VirtioPciFunction(this.device, {
      memory: this.memory,
      signals: {
        watcher: this.loop,
        allocateInterrupts: () => 24,
        setMessage: (gsi, event, message) => {
          assert.equal(this.messages.has(gsi), message === undefined, "live and not live take turns");
          if (message) this.messages.set(gsi, { event, data: message.data });
          else this.messages.delete(gsi);
        },
        setIoEvent: (event, { address, isRemoved }) => {
          assert.equal(this.ioEvents.has(address), isRemoved === true);
          if (isRemoved) this.ioEvents.delete(address);
          else this.ioEvents.set(address, event);
        },
      },
      onFault: (message) => this.faults.push(message),
    }, { name: "fake" });
    this.bus = new PciBus(
      {
        hasReadOnlyMemory: true,
        setMemorySlot: ({ slot, address, length }) => {
          if (length === 0) this.slots.delete(slot);
          else this.slots.set(slot, { address, length });
        },
      },
      [new HostBridge(), this.function],
      8,
    );
  }

  /** Configuration space of the device. */
  config(offset: number, length: 1 | 2 | 4): number {
    return this.read(ECAM.address + 0x1000 + offset, length);
  }

  setConfig(offset: number, value: number, length: 1 | 2 | 4): void {
    this.write(ECAM.address + 0x1000 + offset, value, length);
  }

  /** Memory of the device. */
  get(offset: number, length: 1 | 2 | 4): number {
    return this.read(this.base + offset, length);
  }

  set(offset: number, value: number, length: 1 | 2 | 4): void {
    this.write(this.base + offset, value, length);
  }

  get base(): number {
    return (this.config(0x10, 4) & ~0xf) >>> 0;
  }

  read(address: number, length: 1 | 2 | 4): number {
    const data = new Uint8Array(length).fill(0xff);
    this.bus.read(address, data);
    return data.reduceRight((sum, byte) => sum * 256 + byte, 0);
  }

  write(address: number, value: number, length: 1 | 2 | 4): void {
    this.bus.write(
      address,
      Uint8Array.from({ length }, (_, index) => Math.floor(value / 256 ** index) & 0xff),
    );
  }

  /** Where capabilities are, by number and, for virtio's, by type. */
  capabilities(): Map<string, number> {
    const found = new Map<string, number>();
    for (let at = this.config(0x34, 1); at !== 0; at = this.config(at + 1, 1)) {
      const id = this.config(at, 1);
      found.set(id === 9 ? `virtio ${this.config(at + 3, 1)}` : String(id), at);
    }
    return found;
  }

  /** As a driver does it, up to the status that is wanted. */
  negotiate(features = VERSION_1): void {
    this.setConfig(4, 6, 2);
    this.set(20, STATUS.acknowledge, 1);
    this.set(20, STATUS.acknowledge | STATUS.driver, 1);
    for (const select of [0, 1]) {
      this.set(8, select, 4);
      this.set(12, Number(features >> BigInt(32 * select) & 0xffff_ffffn), 4);
    }
    this.set(20, STATUS.acknowledge | STATUS.driver | STATUS.featuresOk, 1);
  }

  enableQueue(index: number, size: number, base: number): void {
    this.set(22, index, 2);
    this.set(24, size, 2);
    this.set(26, index + 1, 2);
    this.set(32, base, 4);
    this.set(36, 0, 4);
    this.set(40, base + 0x400, 4);
    this.set(44, 0, 4);
    this.set(48, base + 0x800, 4);
    this.set(52, 0, 4);
    this.set(28, 1, 2);
  }

  start(): void {
    this.negotiate();
    this.enableQueue(0, 16, 0x1000);
    this.set(20, 15, 1);
  }

  [Symbol.dispose](): void {
    this.function[Symbol.dispose]();
    this.bus[Symbol.dispose]();
    this.loop[Symbol.dispose]();
    this.memory[Symbol.dispose]();
  }
}

Deno.test("configuration space tells what a device is, and where its parts are", () => {
  using bench = new Bench();
  assert.deepEqual([bench.config(0, 2), bench.config(2, 2)], [0x1af4, 0x1044]);
  assert.equal(bench.read(ECAM.address, 4), 0x0008_1b36);
  assert.equal(bench.read(ECAM.address + 0x0e, 1), 0x80);
  assert.equal(bench.read(ECAM.address + 0x2000, 4), 0xffff_ffff);
  assert.equal(bench.read(ECAM.address + 0x8_0000, 4), 0xffff_ffff);
  assert.deepEqual(
    [...bench.capabilities().keys()],
    ["17", "virtio 1", "virtio 2", "virtio 3", "virtio 5", "virtio 4"],
  );
  assert.equal(bench.config(bench.capabilities().get("17")! + 2, 2), 2);
  // Its size is read back after ones were written.
  const address = bench.config(0x10, 4);
  assert.equal(address, PCI_WINDOW.address + FUNCTION_MEMORY + 4);
  bench.setConfig(0x10, 0xffff_ffff, 4);
  assert.equal(bench.config(0x10, 4), 0xffff_c004);
  bench.setConfig(0x10, address, 4);
  // What is not for the guest to write stays.
  bench.setConfig(0, 0, 4);
  bench.setConfig(0x34, 0, 1);
  assert.equal(bench.config(0, 2), 0x1af4);
  assert.equal(bench.config(0x34, 1), 0x40);
});

Deno.test("memory is there while it is enabled, where the guest puts it, and never over other memory", () => {
  using bench = new Bench();
  assert.equal(bench.slots.size, 2);
  bench.setConfig(4, 2, 2);
  assert.deepEqual(bench.slots.get(11), { address: PCI_WINDOW.address + FUNCTION_MEMORY, length: 0x3000 });
  bench.setConfig(0x10, PCI_WINDOW.address + 0x10_0000, 4);
  assert.deepEqual(bench.slots.get(11), { address: PCI_WINDOW.address + 0x10_0000, length: 0x3000 });
  assert.equal(bench.get(18, 2), 2);
  for (
    const elsewhere of [
      0,
      ECAM.address,
      PCI_WINDOW.address + PCI_WINDOW.length - 0x1000 + 0x4000,
      0xfee0_0000,
    ]
  ) {
    bench.setConfig(0x10, elsewhere, 4);
    assert.equal(bench.slots.get(11), undefined);
  }
  bench.setConfig(0x10, PCI_WINDOW.address, 4);
  bench.setConfig(0x14, 1, 4);
  assert.equal(bench.slots.get(11), undefined);
  bench.setConfig(0x14, 0, 4);
  assert.ok(bench.slots.get(11));
  bench.setConfig(4, 0, 2);
  assert.equal(bench.slots.get(11), undefined);
});

Deno.test("a driver negotiates, enables a queue, is interrupted, and resets", () => {
  using bench = new Bench();
  bench.setConfig(4, 6, 2);
  const msix = bench.capabilities().get("17")!;
  bench.setConfig(msix + 2, 0x8000, 2);
  for (const vector of [0, 1, 2]) {
    const at = 0x2000 + 16 * vector;
    bench.set(at, 0xfee0_0000, 4);
    bench.set(at + 4, 0, 4);
    bench.set(at + 8, 0x40 + vector, 4);
    bench.set(at + 12, 0, 4);
  }
  assert.deepEqual([...bench.messages].map(([gsi, { data }]) => [gsi, data]), [[24, 0x40], [25, 0x41], [
    26,
    0x42,
  ]]);
  bench.set(16, 0, 2);
  bench.start();
  assert.equal(bench.get(20, 1), 15);
  assert.ok(bench.device.context);
  assert.equal(bench.ioEvents.size, 1);
  // The ring: one descriptor, made available.
  const { view } = bench.memory;
  view.setBigUint64(0x1000, 0x5000n, true);
  view.setUint32(0x1008, 16, true);
  view.setUint16(0x1402, 1, true);
  bench.ioEvents.get(bench.base + 0x3800)!.signal();
  bench.loop.poll(0);
  assert.deepEqual(bench.device.notified, [0]);
  assert.equal(view.getUint16(0x1802, true), 1);
  assert.equal(bench.messages.get(25)!.event.drain(), 1n);
  // A masked vector keeps its interrupt until it is unmasked.
  bench.set(0x2010 + 12, 1, 4);
  assert.equal(bench.messages.has(25), false);
  bench.device.context!.interrupt(bench.device.context!.queues[0]!);
  assert.equal(bench.get(0x3400, 4), 2);
  bench.set(0x2010 + 12, 0, 4);
  assert.equal(bench.messages.get(25)!.event.drain(), 1n);
  assert.equal(bench.get(0x3000, 1), 1);
  assert.equal(bench.get(0x3000, 1), 0);
  // A change of the configuration.
  bench.device.config[0] = 99;
  bench.device.context!.configChanged();
  assert.equal(bench.get(0x1000, 1), 99);
  assert.equal(bench.get(21, 1), 1);
  assert.equal(bench.messages.get(24)!.event.drain(), 1n);
  bench.set(0x1002, 7, 2);
  assert.deepEqual(bench.device.written, [[2, 7, 0]]);
  // A reset, which takes as long as the device is busy.
  bench.set(20, 0, 1);
  assert.equal(bench.get(20, 1), 0);
  assert.equal(bench.device.resets, 1);
  assert.equal(bench.ioEvents.size, 0);
  assert.equal(bench.get(26, 2), 0xffff);
});

Deno.test("a reset is over when nothing writes to the guest's memory any more", async () => {
  using bench = new Bench();
  bench.start();
  bench.device.isBusy = true;
  bench.set(20, 0, 1);
  assert.equal(bench.get(20, 1), 15);
  assert.equal(bench.device.context, undefined);
  bench.device.isBusy = false;
  while (bench.get(20, 1) !== 0) await new Promise((resolve) => setTimeout(resolve, 1));
});

Deno.test("a driver that resets twice is not reset once more after it has begun anew", async () => {
  using bench = new Bench();
  const nextTurn = () => new Promise((resolve) => setTimeout(resolve, 1));
  bench.start();
  bench.device.isBusy = true;
  bench.set(20, 0, 1);
  // A second wait would end later than the first.
  await nextTurn();
  bench.set(20, 0, 1);
  bench.set(20, STATUS.failed, 1);
  assert.equal(bench.get(20, 1), 15, "no state but that of before");
  bench.device.isBusy = false;
  while (bench.get(20, 1) !== 0) await nextTurn();
  bench.start();
  for (let count = 0; count < 5; count++) await nextTurn();
  assert.equal(bench.get(20, 1), 15);
  assert.equal(bench.device.context!.queues[0]!.isReady, true);
});

Deno.test("a driver begins at once with a device that is busy for the host only", () => {
  using bench = new Bench();
  bench.device.isBusy = true;
  bench.start();
  assert.equal(bench.get(20, 1), 15);
  bench.device.isBusy = false;
  bench.set(20, 0, 1);
  bench.device.isBusy = true;
  bench.set(20, 0, 1);
  bench.start();
  assert.equal(bench.get(20, 1), 15);
});

Deno.test("the states of a device come in their order only", () => {
  using bench = new Bench();
  bench.setConfig(4, 6, 2);
  bench.set(20, STATUS.driver, 1);
  assert.equal(bench.get(20, 1), 0);
  bench.set(20, 15, 1);
  assert.equal(bench.get(20, 1), STATUS.acknowledge | STATUS.driver);
  assert.equal(bench.device.context, undefined);
  // Features that were not offered, or without those of version 1.
  for (const features of [VERSION_1 | 2n, 1n]) {
    bench.set(20, 0, 1);
    bench.negotiate(features);
    assert.equal(bench.get(20, 1) & STATUS.featuresOk, 0);
  }
  bench.set(20, 0, 1);
  bench.set(22, 0, 2);
  bench.set(28, 1, 2);
  assert.equal(bench.get(28, 2), 0, "no queue before features");
  bench.negotiate();
  bench.set(8, 0, 4);
  bench.set(12, 1, 4);
  assert.equal(bench.get(12, 4), 0, "no feature afterwards");
  bench.enableQueue(0, 3, 0x1000);
  assert.equal(bench.get(20, 1) & STATUS.needsReset, STATUS.needsReset, "3 is no power of two");
  bench.set(20, 0, 1);
  bench.negotiate();
  bench.enableQueue(0, 16, 0xffff_f000);
  assert.match(bench.faults.at(-1)!, /fake: Cannot use .* as they are not all memory/);
  bench.set(20, 0, 1);
  bench.start();
  bench.set(22, 1, 2);
  bench.set(28, 1, 2);
  assert.equal(bench.get(28, 2), 0, "no queue once it works");
});

Deno.test("configuration space is a window to the device's memory", () => {
  using bench = new Bench();
  const at = bench.capabilities().get("virtio 5")!;
  bench.setConfig(4, 6, 2);
  bench.setConfig(at + 12, 2, 4);
  bench.setConfig(at + 8, 18, 4);
  assert.equal(bench.config(at + 16, 2), 2);
  bench.setConfig(at + 12, 1, 4);
  bench.setConfig(at + 8, 20, 4);
  bench.setConfig(at + 16, 1, 1);
  assert.equal(bench.get(20, 1), 1);
  for (const [offset, length] of [[0xffff_fffc, 4], [0x4000, 4], [1, 4], [0, 3]] as const) {
    bench.setConfig(at + 12, length, 4);
    bench.setConfig(at + 8, offset, 4);
    bench.setConfig(at + 16, 0x1234_5678, 4);
  }
});

Deno.test("whatever is written to a device, it stays within its bounds", () => {
  let seed = 4711;
  const random = (limit: number) => {
    seed = Math.imul(seed ^ seed >>> 15, 0x2c1b_3c6d) + 0x9e37_79b9 | 0;
    return (seed >>> 0) % limit;
  };
  for (let round = 0; round < 60; round++) {
    using bench = new Bench();
    if (round % 2 === 0) bench.start();
    for (let count = 0; count < 400; count++) {
      const length = ([1, 2, 4] as const)[random(3)]!;
      const value = random(4) === 0 ? random(2 ** 32) : random(64);
      const place = random(10);
      if (place === 0) bench.setConfig(random(256), value, length);
      else if (place < 6) bench.set(random(64), value, length);
      else if (place === 6) bench.set(0x2000 + random(64), value, length);
      else if (place === 7) bench.set(random(FUNCTION_MEMORY + 16), value, length);
      else if (place === 8) bench.get(random(FUNCTION_MEMORY + 16), length);
      else {
        bench.memory.view.setUint8(0x1000 + random(0x1000), value & 0xff);
        bench.loop.poll(0);
      }
    }
  }
});
