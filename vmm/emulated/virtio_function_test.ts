import assert from "node:assert/strict";
import { SharedMemory } from "../devices/shared_memory.ts";
import { Arena, seededRandom, TestDriver } from "../devices/test_driver.ts";
import type { DeviceContext, VirtioDevice } from "../devices/virtio_device.ts";
import { PORT_PART, STATUS, type VirtioPciState } from "../devices/virtio_pci.ts";
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1, Virtqueue } from "../devices/virtqueue.ts";
import { VirtioPortFunction } from "./virtio_function.ts";

const READY = STATUS.acknowledge | STATUS.driver | STATUS.featuresOk;

/** Gives every buffer back, filled with what it was told. */
class FakeDevice implements VirtioDevice {
  readonly type = 4;
  readonly features = 1n | 1n << 33n;
  readonly queueSizes = [64, 8];
  readonly config = new Uint8Array([1, 2, 3, 4, 5, 6]);
  readonly written: number[][] = [];
  readonly restored: unknown[] = [];
  readonly memory: SharedMemory;
  fill = 0xaa;
  /** Whether it takes buffers. */
  isTaking = true;
  isBusy = false;
  resets = 0;
  context: DeviceContext | undefined;

  constructor(memory: SharedMemory) {
    this.memory = memory;
  }

  writeConfig(offset: number, bytes: Uint8Array): void {
    assert.ok(offset >= 0 && offset + bytes.length <= this.config.length);
    this.config.set(bytes, offset);
    this.written.push([offset, ...bytes]);
  }

  activate(context: DeviceContext): void {
    this.context = context;
  }

  notify(queue: Virtqueue): void {
    while (this.isTaking) {
      const chain = queue.pop();
      if (!chain) break;
      let written = 0;
      for (const { offset, length } of chain.writable) {
        this.memory.bytes.fill(this.fill, offset, offset + length);
        written += length;
      }
      queue.push(chain.head, written);
    }
    this.context!.interrupt(queue);
  }

  reset(): void {
    this.resets++;
    this.context = undefined;
  }

  save(): unknown {
    return { fill: this.fill };
  }

  restore(state: unknown): void {
    this.restored.push(state);
    this.fill = (state as { fill: number }).fill;
  }

  [Symbol.dispose](): void {}
}

/** A function with a fake device, and the guest's end of its ports. */
class Bench implements Disposable {
  readonly memory: SharedMemory;
  readonly device: FakeDevice;
  readonly function: VirtioPortFunction;
  readonly faults: string[] = [];
  readonly lines: boolean[] = [];
  readonly #ownsMemory: boolean;

  constructor(memory?: SharedMemory) {
    this.#ownsMemory = memory === undefined;
    this.memory = memory ?? new SharedMemory(1 << 20);
    this.device = new FakeDevice(this.memory);
    this.function = new VirtioPortFunction(this.device, "fake", {
      memory: this.memory,
      setLine: (isHigh) => void this.lines.push(isHigh),
      onFault: (message) => void this.faults.push(message),
    });
  }

  get line(): boolean {
    return this.lines.at(-1) ?? false;
  }

  get(offset: number, length: 1 | 2 | 4): number {
    const value = this.function.readPort(offset, length);
    return length === 4 ? value >>> 0 : value;
  }

  set(offset: number, value: number, length: 1 | 2 | 4): void {
    this.function.writePort(offset, value, length);
  }

  get isr(): number {
    return this.get(PORT_PART.isr, 1);
  }

  notify(queue: number): void {
    this.set(PORT_PART.notify + 4 * queue, queue, 2);
  }

  negotiate(features: bigint): void {
    this.set(20, 0, 1);
    this.set(20, STATUS.acknowledge, 1);
    this.set(20, STATUS.acknowledge | STATUS.driver, 1);
    for (const select of [0, 1]) {
      this.set(8, select, 4);
      this.set(12, Number(features >> BigInt(32 * select) & 0xffff_ffffn), 4);
    }
    this.set(20, READY, 1);
  }

  /** Lays out the rings of a queue, and tells the function where they are. */
  addQueue(arena: Arena, index: number, features: bigint, size = this.device.queueSizes[index]!): TestDriver {
    const layout = new Virtqueue(this.memory, index, size);
    const driver = new TestDriver(arena, layout, { features });
    this.set(22, index, 2);
    this.set(24, size, 2);
    const rings = [[32, layout.descriptorTable], [40, layout.availableRing], [48, layout.usedRing]] as const;
    for (const [register, address] of rings) {
      this.set(register, address, 4);
      this.set(register + 4, 0, 4);
    }
    this.set(28, 1, 2);
    return driver;
  }

  [Symbol.dispose](): void {
    this.function[Symbol.dispose]();
    if (this.#ownsMemory) this.memory[Symbol.dispose]();
  }
}

Deno.test("configuration space tells what a device is, and among which ports its parts are", () => {
  using bench = new Bench();
  const { space } = bench.function;
  const view = new DataView(space.buffer);
  assert.deepEqual([0x00, 0x02, 0x2c, 0x2e].map((at) => view.getUint16(at, true)), [
    ...[0x1af4, 0x1044, 0x1af4, 0x1044],
  ]);
  assert.equal(view.getUint16(0x04, true) & 1, 1, "it answers to ports");
  assert.equal(view.getUint16(0x06, true) & 0x10, 0x10, "it has capabilities");
  assert.equal(space[0x0e], 0);
  const found: [type: number, bar: number, offset: number, length: number][] = [];
  for (let at = space[0x34]!; at !== 0; at = space[at + 1]!) {
    assert.equal(space[at], 9, "no messages: there is a line");
    assert.equal(at % 4, 0);
    found.push([space[at + 3]!, space[at + 4]!, view.getUint32(at + 8, true), view.getUint32(at + 12, true)]);
    if (space[at + 3] === 2) assert.equal(view.getUint32(at + 16, true), 4);
  }
  assert.deepEqual(found, [
    [1, 0, PORT_PART.common, 56],
    [2, 0, PORT_PART.notify, 8],
    [3, 0, PORT_PART.isr, 1],
    [4, 0, PORT_PART.device, 6],
  ]);
});

Deno.test("a driver negotiates, uses queues, is interrupted by the line, and resets, all by ports", () => {
  using bench = new Bench();
  const { device } = bench;
  const arena = new Arena(bench.memory, 4096);
  assert.equal(bench.get(18, 2), 2);
  // Features come by halves.
  bench.set(0, 1, 4);
  assert.equal(bench.get(4, 4), 3);
  bench.set(0, 0, 4);
  assert.equal(bench.get(4, 4), Number(1n | 1n << 28n | VIRTIO_F_EVENT_IDX));
  bench.set(20, STATUS.driver, 1);
  assert.equal(bench.get(20, 1), 0, "states come in their order only");
  bench.negotiate(VIRTIO_F_VERSION_1 | 1n << 33n);
  assert.equal(bench.get(20, 1), READY);
  const driver = bench.addQueue(arena, 0, VIRTIO_F_VERSION_1, 16);
  bench.addQueue(arena, 1, VIRTIO_F_VERSION_1);
  assert.deepEqual([bench.get(24, 2), bench.get(28, 2), bench.get(30, 2)], [8, 1, 1]);
  bench.notify(0);
  assert.equal(device.context, undefined, "nothing works before the driver is ready");
  bench.set(20, READY | STATUS.driverOk, 1);
  assert.equal(device.context!.features, VIRTIO_F_VERSION_1 | 1n << 33n);
  assert.equal(bench.line, false);

  const part = { address: arena.take(100), length: 100 };
  const head = driver.add([], [part]);
  driver.publish();
  bench.notify(0);
  assert.deepEqual(driver.takeUsed(), [{ head, written: 100 }]);
  assert.deepEqual(arena.bytes(part), new Uint8Array(100).fill(0xaa));
  assert.equal(bench.line, true);
  assert.equal(bench.isr, 1);
  assert.equal(bench.line, false, "what it was for was read");
  assert.equal(bench.isr, 0);
  // A driver that wants none is not interrupted.
  driver.setInterrupt(false);
  driver.add([], [part]);
  driver.publish();
  bench.notify(0);
  assert.equal(driver.takeUsed().length, 1);
  assert.equal(bench.line, false);

  // The device's own registers.
  assert.deepEqual([bench.get(0x80, 4), bench.get(0x84, 2)], [0x0403_0201, 0x0605]);
  bench.set(0x82, 0x1234, 2);
  assert.deepEqual(device.written, [[2, 0x34, 0x12]]);
  assert.equal(bench.get(0x80, 4), 0x1234_0201);
  bench.set(0x84, 1, 4);
  assert.equal(device.written.length, 1, "not all of it is a register");
  const generation = bench.get(21, 1);
  device.config[0] = 0x80;
  device.context!.configChanged();
  assert.equal(bench.line, true);
  assert.equal(bench.get(0x80, 1), 0x80);
  assert.equal(bench.get(21, 1), generation + 1);
  assert.equal(bench.isr, 2);

  device.context!.configChanged();
  bench.set(20, 0, 1);
  assert.deepEqual([bench.get(20, 1), bench.line, bench.isr, device.resets], [0, false, 0, 1]);
  bench.set(22, 0, 2);
  assert.deepEqual([bench.get(24, 2), bench.get(28, 2), bench.get(32, 4)], [64, 0, 0]);
  bench.notify(0);
  assert.equal(device.context, undefined);
  assert.deepEqual(bench.faults, []);
});

Deno.test("a guest that breaks a queue is told to reset the device, and the host is told why", () => {
  using bench = new Bench();
  const arena = new Arena(bench.memory, 4096);
  bench.negotiate(VIRTIO_F_VERSION_1);
  const driver = bench.addQueue(arena, 0, VIRTIO_F_VERSION_1);
  bench.set(20, READY | STATUS.driverOk, 1);
  driver.setDescriptor(0, 0xffff_0000, 16, 0);
  driver.offer(0);
  driver.publish();
  bench.notify(0);
  assert.match(bench.faults.join(), /^fake: Cannot use 16 bytes at guest address 0xffff0000/);
  assert.equal(bench.get(20, 1), READY | STATUS.driverOk | STATUS.needsReset);
  assert.deepEqual([bench.line, bench.isr], [true, 2]);
  bench.notify(0);
  assert.equal(bench.faults.length, 1);
  // Rings that are no memory.
  bench.negotiate(VIRTIO_F_VERSION_1);
  bench.set(22, 0, 2);
  bench.set(48, 0xffff_fffc, 4);
  bench.set(28, 1, 2);
  assert.equal(bench.get(28, 2), 0);
  assert.equal(bench.get(20, 1) & STATUS.needsReset, STATUS.needsReset);
});

for (const features of [VIRTIO_F_VERSION_1, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | 1n]) {
  Deno.test(`a function goes on where a saved one was, with features 0x${features.toString(16)}`, () => {
    using memory = new SharedMemory(1 << 20);
    const arena = new Arena(memory, 4096);
    const part = { address: arena.take(10), length: 10 };
    let driver: TestDriver;
    let state: VirtioPciState;
    {
      using before = new Bench(memory);
      before.negotiate(features);
      driver = before.addQueue(arena, 0, features, 8);
      before.set(20, READY | STATUS.driverOk, 1);
      // Its indices are past its size.
      for (let count = 0; count < 21; count++) {
        driver.add([], [part]);
        driver.publish();
        before.notify(0);
        assert.equal(driver.takeUsed().length, 1);
        driver.setInterrupt(true);
      }
      assert.equal(before.isr, 1);
      // Buffers that it has not taken yet, and an interrupt that the guest has not seen.
      before.device.isTaking = false;
      for (let count = 0; count < 3; count++) driver.add([], [part]);
      driver.publish();
      before.notify(0);
      before.device.context!.configChanged();
      before.device.fill = 0x55;
      assert.equal(before.function.isBusy, false);
      state = JSON.parse(JSON.stringify(before.function.save()));
    }
    using after = new Bench(memory);
    assert.ok(after.function.fits(state));
    for (
      const other of [
        { queues: state.queues.slice(1) },
        { configuration: [...state.configuration, 0] },
        { accepted: String(BigInt(state.accepted) | 1n << 60n) },
      ]
    ) assert.ok(!after.function.fits({ ...state, ...other }));
    after.function.restore(state);
    assert.deepEqual(after.device.restored, [{ fill: 0x55 }]);
    assert.equal(after.device.context!.features, features);
    assert.deepEqual([after.get(20, 1), after.get(22, 2), after.get(24, 2), after.get(28, 2)], [15, 0, 8, 1]);
    assert.equal(after.get(32, 4), driver.queue.descriptorTable);
    assert.equal(after.line, true);
    assert.equal(after.isr & 2, 2);
    assert.equal(after.line, false);
    // What waited was taken at once.
    assert.equal(driver.takeUsed().length, 3);
    assert.deepEqual(arena.bytes(part), new Uint8Array(10).fill(0x55));
    driver.setInterrupt(true);
    for (let count = 0; count < 70_000; count += 7) {
      for (let each = 0; each < 7; each++) driver.add([], [part]);
      driver.publish();
      after.notify(0);
      assert.equal(driver.takeUsed().length, 7);
      driver.setInterrupt(true);
      assert.equal(after.isr, 1);
    }
    after.set(20, 0, 1);
    assert.equal(after.get(20, 1), 0);
    assert.deepEqual(after.faults, []);
  });
}

Deno.test("a function that no driver had finished with is restored as it was", () => {
  using memory = new SharedMemory(1 << 20);
  const arena = new Arena(memory, 4096);
  using before = new Bench(memory);
  using untouched = new Bench(memory);
  untouched.function.restore(JSON.parse(JSON.stringify(before.function.save())));
  assert.deepEqual([untouched.get(20, 1), untouched.device.context, untouched.line], [0, undefined, false]);
  before.negotiate(VIRTIO_F_VERSION_1);
  before.addQueue(arena, 1, VIRTIO_F_VERSION_1);
  const state = JSON.parse(JSON.stringify(before.function.save()));
  using after = new Bench(memory);
  after.function.restore(state);
  for (let at = 0; at < 56; at++) assert.equal(after.get(at, 1), before.get(at, 1), `register ${at}`);
  assert.equal(after.device.context, undefined);
  // The driver goes on.
  const driver = after.addQueue(arena, 0, VIRTIO_F_VERSION_1);
  after.set(20, READY | STATUS.driverOk, 1);
  driver.add([], [{ address: arena.take(10), length: 10 }]);
  driver.publish();
  after.notify(0);
  assert.equal(driver.takeUsed().length, 1);
  // One that has failed stays so.
  driver.offer(99);
  driver.publish();
  after.notify(0);
  using failed = new Bench(memory);
  failed.function.restore(JSON.parse(JSON.stringify(after.function.save())));
  assert.equal(failed.get(20, 1), 15 | STATUS.needsReset);
  failed.notify(0);
  assert.deepEqual(failed.faults, []);
});

Deno.test("a reset is over when nothing writes to the guest's memory any more", async () => {
  using bench = new Bench();
  bench.negotiate(VIRTIO_F_VERSION_1);
  bench.set(20, READY | STATUS.driverOk, 1);
  bench.device.isBusy = true;
  assert.equal(bench.function.isBusy, true);
  bench.function.reset();
  assert.equal(bench.get(20, 1), 15);
  bench.device.isBusy = false;
  while (bench.get(20, 1) !== 0) await new Promise((resolve) => setTimeout(resolve, 1));
});

Deno.test("whatever a guest does to ports and rings, a function stays within its bounds", () => {
  for (let seed = 1; seed <= 60; seed++) {
    const random = seededRandom(seed);
    using bench = new Bench();
    const arena = new Arena(bench.memory, 4096);
    if (seed % 2 === 0) {
      bench.negotiate(VIRTIO_F_VERSION_1 | (seed % 4 === 0 ? VIRTIO_F_EVENT_IDX : 0n));
      for (const index of [0, 1]) bench.addQueue(arena, index, VIRTIO_F_VERSION_1);
      bench.set(20, READY | STATUS.driverOk, 1);
    }
    for (let count = 0; count < 2000; count++) {
      const length = ([1, 2, 4] as const)[random(3)]!;
      const value = random(3) === 0 ? random(2 ** 32) : random(64);
      const masked = length === 4 ? value : value % 256 ** length;
      const action = random(8);
      const words = `seed ${seed}, step ${count}`;
      if (action < 3) bench.set(random(56), masked, length);
      else if (action === 3) bench.set(PORT_PART.notify + random(32), masked, length);
      else if (action === 4) bench.set(random(PORT_PART.size), masked, length);
      else if (action === 5) {
        const read = bench.get(random(PORT_PART.size), length);
        assert.ok(read >= 0 && read < 256 ** length && Number.isInteger(read), words);
      } else if (action === 6) bench.memory.view.setUint8(4096 + random(4096), value & 0xff);
      else if (random(20) === 0) {
        using other = new Bench(bench.memory);
        other.function.restore(JSON.parse(JSON.stringify(bench.function.save())));
        // It looks at queues at once, which may be broken by now.
        assert.equal(other.get(20, 1) & READY, bench.get(20, 1) & READY, words);
      }
    }
    assert.ok(bench.faults.every((fault) => /^fake: \w/.test(fault)), bench.faults.join("\n"));
  }
});
