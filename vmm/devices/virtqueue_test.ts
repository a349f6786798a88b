import assert from "node:assert/strict";
import { GuestMemoryError } from "./guest_memory.ts";
import { SharedMemory } from "./shared_memory.ts";
import { Arena, DESC_F, seededRandom, TestDriver } from "./test_driver.ts";
import {
  MAX_CHAIN,
  totalLength,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  Virtqueue,
  VirtqueueError,
} from "./virtqueue.ts";

const MEMORY = 1 << 20;

interface Bench extends Disposable {
  memory: SharedMemory;
  arena: Arena;
  queue: Virtqueue;
  driver: TestDriver;
}

function bench(size = 8, features = 0n): Bench {
  const memory = new SharedMemory(MEMORY);
  const arena = new Arena(memory, 4096);
  const queue = new Virtqueue(memory, 0, size);
  const driver = new TestDriver(arena, queue, { features });
  return { memory, arena, queue, driver, [Symbol.dispose]: () => memory[Symbol.dispose]() };
}

Deno.test("Virtqueue takes buffers in order and gives them back in any", () => {
  using b = bench();
  const input = { address: b.arena.take(10), length: 10 };
  const output = { address: b.arena.take(20), length: 20 };
  const first = b.driver.add([input], [output]);
  const second = b.driver.add([], [output]);
  assert.equal(b.queue.pop(), undefined);
  b.driver.publish();
  assert.equal(b.queue.hasPending, true);
  const one = b.queue.pop()!;
  const two = b.queue.pop()!;
  assert.equal(b.queue.pop(), undefined);
  assert.deepEqual(one, {
    head: first,
    readable: [{ offset: input.address, length: 10 }],
    writable: [{ offset: output.address, length: 20 }],
  });
  assert.equal(totalLength(two.writable), 20);
  b.queue.push(two.head, 20);
  b.queue.push(one.head, 3);
  assert.deepEqual(b.driver.takeUsed(), [{ head: second, written: 20 }, { head: first, written: 3 }]);
  assert.equal(b.driver.freeCount, 8);
});

Deno.test("Virtqueue has its rings anywhere in memory of more than 2 GiB", () => {
  const start = 2 ** 31;
  for (const features of [0n, VIRTIO_F_EVENT_IDX]) {
    using memory = new SharedMemory(start + MEMORY);
    const queue = new Virtqueue(memory, 0, 8);
    queue.descriptorTable = start;
    queue.availableRing = start + 0x1000;
    queue.usedRing = start + 0x2000;
    queue.start(features);
    memory.view.setUint32(start, start + 0x3000, true);
    memory.view.setUint32(start + 8, 10, true);
    queue.setNotification(false);
    assert.equal(queue.hasPending, false);
    memory.view.setUint16(start + 0x1002, 1, true);
    assert.deepEqual(queue.pop(), {
      head: 0,
      readable: [{ offset: start + 0x3000, length: 10 }],
      writable: [],
    });
    queue.push(0, 0);
    assert.equal(queue.needsInterrupt(), true);
    assert.equal(memory.view.getUint16(start + 0x2002, true), 1);
    assert.equal(memory.view.getUint16(start + 0x2000, true), features === 0n ? 1 : 0);
    assert.equal(memory.view.getUint16(start + 0x2004 + 8 * 8, true), features === 0n ? 0 : 0xffff);
  }
});

Deno.test("Virtqueue takes again what was put back", () => {
  using b = bench();
  const part = { address: b.arena.take(10), length: 10 };
  const head = b.driver.add([part]);
  b.driver.publish();
  assert.equal(b.queue.pop()!.head, head);
  b.queue.unpop();
  assert.equal(b.queue.hasPending, true);
  assert.equal(b.queue.pop()!.head, head);
});

Deno.test("Virtqueue reads indirect tables, also behind direct descriptors", () => {
  using b = bench(8, VIRTIO_F_INDIRECT_DESC);
  const parts = Array.from({ length: 20 }, (_, index) => ({ address: b.arena.take(16), length: index + 1 }));
  b.driver.add(parts.slice(0, 15), parts.slice(15), true);
  b.driver.publish();
  const chain = b.queue.pop()!;
  assert.equal(chain.readable.length, 15);
  assert.equal(totalLength(chain.writable), 16 + 17 + 18 + 19 + 20);

  const table = b.arena.take(32);
  b.driver.setDescriptor(0, table + 16, 7, 0, 0, table);
  b.driver.setDescriptor(1, table + 16, 9, DESC_F.WRITE, 0, table);
  b.driver.setDescriptor(0, table, 5, DESC_F.NEXT, 0, table);
  b.driver.setDescriptor(0, table, 5, DESC_F.NEXT, 1);
  b.driver.setDescriptor(1, table + 16, 16, DESC_F.INDIRECT);
  b.driver.offer(0);
  b.driver.publish();
  const mixed = b.queue.pop()!;
  assert.deepEqual(mixed.readable, [{ offset: table, length: 5 }]);
  assert.deepEqual(mixed.writable, [{ offset: table + 16, length: 9 }]);
});

Deno.test("Virtqueue refuses what no driver may offer", () => {
  const cases: [name: string, offer: (b: Bench) => void, error: RegExp][] = [
    ["head", ({ driver }) => driver.offer(8), /offers descriptor 8/],
    ["link", ({ driver }) => driver.setDescriptor(0, 0, 1, DESC_F.NEXT, 8), /links to descriptor 8/],
    ["loop", ({ driver }) => driver.setDescriptor(0, 0, 1, DESC_F.NEXT, 0), /chain without end/],
    ["order", ({ driver }) => {
      driver.setDescriptor(0, 0, 1, DESC_F.NEXT | DESC_F.WRITE, 1);
      driver.setDescriptor(1, 0, 1, 0);
    }, /a part to read behind one to write/],
    ["memory", ({ driver }) => driver.setDescriptor(0, MEMORY - 1, 2, 0), /are not all memory/],
    ["wrap", ({ driver }) => driver.setDescriptor(0, 2 ** 52, 0xffff_ffff, 0), /are not all memory/],
    [
      "indirect and next",
      ({ driver }) => driver.setDescriptor(0, 0, 16, DESC_F.INDIRECT | DESC_F.NEXT, 1),
      /an indirect table where none may be/,
    ],
    ["indirect length", ({ driver }) => driver.setDescriptor(0, 0, 17, DESC_F.INDIRECT), /table of 17 bytes/],
    ["indirect empty", ({ driver }) => driver.setDescriptor(0, 0, 0, DESC_F.INDIRECT), /table of 0 bytes/],
    ["nested", ({ driver, arena }) => {
      const table = arena.take(16);
      driver.setDescriptor(0, table, 16, DESC_F.INDIRECT, 0, table);
      driver.setDescriptor(0, table, 16, DESC_F.INDIRECT);
    }, /an indirect table where none may be/],
    ["long", ({ driver, arena }) => {
      const count = MAX_CHAIN + 1;
      const table = arena.take(16 * count);
      for (let index = 0; index < count; index++) {
        driver.setDescriptor(index, table, 1, index === count - 1 ? 0 : DESC_F.NEXT, index + 1, table);
      }
      driver.setDescriptor(0, table, 16 * count, DESC_F.INDIRECT);
    }, /chain without end/],
    ["long, with what is before the table", ({ driver, arena }) => {
      const table = arena.take(16 * MAX_CHAIN);
      for (let index = 0; index < MAX_CHAIN; index++) {
        driver.setDescriptor(index, table, 1, index === MAX_CHAIN - 1 ? 0 : DESC_F.NEXT, index + 1, table);
      }
      driver.setDescriptor(0, table, 1, DESC_F.NEXT, 1);
      driver.setDescriptor(1, table, 16 * MAX_CHAIN, DESC_F.INDIRECT);
    }, /chain without end/],
  ];
  for (const [name, offer, error] of cases) {
    using b = bench(8, VIRTIO_F_INDIRECT_DESC);
    offer(b);
    if (name !== "head") b.driver.offer(0);
    b.driver.publish();
    assert.throws(() => b.queue.pop(), error, name);
  }
  using b = bench();
  b.driver.setDescriptor(0, 0, 16, DESC_F.INDIRECT);
  for (let count = 0; count < 9; count++) b.driver.offer(0);
  b.driver.publish();
  assert.throws(() => b.queue.pop(), /of 8 offers 9 buffers at once/);
  assert.throws(() => b.queue.hasPending, VirtqueueError);
});

Deno.test("Virtqueue refuses indirect tables that were not negotiated", () => {
  using b = bench();
  b.driver.setDescriptor(0, 0, 16, DESC_F.INDIRECT);
  b.driver.offer(0);
  b.driver.publish();
  assert.throws(() => b.queue.pop(), /an indirect table where none may be/);
});

Deno.test("Virtqueue refuses rings that cannot be", () => {
  using memory = new SharedMemory(MEMORY);
  const start = (changes: Partial<Virtqueue>) => {
    const queue = new Virtqueue(memory, 0, 256);
    queue.usedRing = 8192;
    Object.assign(queue, changes);
    queue.start(0n);
  };
  start({});
  assert.throws(() => start({ size: 0 }), /impossible size 0/);
  assert.throws(() => start({ size: 24 }), /impossible size 24/);
  assert.throws(() => start({ size: 512 }), /impossible size 512/);
  assert.throws(() => start({ descriptorTable: 8 }), /not aligned/);
  assert.throws(() => start({ availableRing: 1 }), /not aligned/);
  assert.throws(() => start({ usedRing: 2 }), /not aligned/);
  assert.throws(() => start({ usedRing: MEMORY - 2048 }), GuestMemoryError);
  assert.throws(() => start({ availableRing: 2 ** 60 }), GuestMemoryError);
});

Deno.test("Virtqueue interrupts and asks for notifications as the flags say", () => {
  using b = bench();
  const part = { address: b.arena.take(10), length: 10 };
  b.driver.add([part]);
  assert.equal(b.driver.publish(), true);
  b.queue.setNotification(false);
  b.driver.add([part]);
  assert.equal(b.driver.publish(), false);
  b.queue.setNotification(true);
  b.driver.add([part]);
  assert.equal(b.driver.publish(), true);
  b.queue.push(b.queue.pop()!.head, 0);
  assert.equal(b.queue.needsInterrupt(), true);
  b.driver.setInterrupt(false);
  b.queue.push(b.queue.pop()!.head, 0);
  assert.equal(b.queue.needsInterrupt(), false);
});

Deno.test("Virtqueue interrupts at the index that the driver names", () => {
  using b = bench(8, VIRTIO_F_EVENT_IDX);
  const part = { address: b.arena.take(10), length: 10 };
  const use = (): boolean => {
    b.driver.add([part]);
    b.driver.publish();
    b.queue.push(b.queue.pop()!.head, 0);
    return b.queue.needsInterrupt();
  };
  assert.equal(use(), true);
  b.driver.takeUsed();
  b.driver.setInterrupt(true, 2);
  assert.deepEqual([use(), use(), use(), use()], [false, false, true, false]);
  assert.equal(b.queue.needsInterrupt(), false);
  b.driver.takeUsed();
  b.driver.setInterrupt(false);
  assert.deepEqual([use(), use()], [false, false]);
});

// Whatever the order of steps, each buffer arrives once with its content, and nobody sleeps while there is work for it:
// the device looks only when notified, the driver only when interrupted.
for (const features of [0n, VIRTIO_F_EVENT_IDX, VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC]) {
  Deno.test(`Virtqueue loses no buffer and no event, with features 0x${features.toString(16)}`, () => {
    for (let seed = 1; seed <= 20; seed++) {
      using b = bench(16, features);
      const random = seededRandom(seed);
      const { memory, arena, driver, queue } = b;
      const start = arena.next;
      const sent = new Map<number, { value: number; reply: number; length: number }>();
      const held: { head: number; value: number; reply: number; length: number }[] = [];
      let isNotified = false;
      let isInterrupted = false;
      let isDeviceAwake = false;
      let [value, replies] = [0, 0];
      const isIndirect = (features & VIRTIO_F_INDIRECT_DESC) !== 0n;

      const send = (): void => {
        const count = 1 + random(4);
        if (driver.freeCount < count + 1 || arena.next > MEMORY - 8192) {
          if (driver.publish()) isNotified = true;
          return;
        }
        const parts = Array.from({ length: count }, () => ({ address: arena.take(4, 4), length: 4 }));
        for (const { address } of parts) memory.view.setUint32(address, value, true);
        const reply = { address: arena.take(8, 8), length: 1 + random(8) };
        const head = driver.add(parts, [reply], isIndirect && random(2) === 0);
        sent.set(head, { value: value++, reply: reply.address, length: reply.length });
        if (random(2) === 0 && driver.publish()) isNotified = true;
      };
      const look = (): void => {
        queue.setNotification(false);
        for (let budget = random(6); budget >= 0; budget--) {
          const chain = queue.pop();
          if (!chain) {
            queue.setNotification(true);
            if (!queue.hasPending) isDeviceAwake = false;
            return;
          }
          if (random(8) === 0) {
            queue.unpop();
            continue;
          }
          const values = chain.readable.map(({ offset }) => memory.view.getUint32(offset, true));
          assert.equal(new Set(values).size, 1);
          held.push({
            head: chain.head,
            value: values[0]!,
            reply: chain.writable[0]!.offset,
            length: chain.writable[0]!.length,
          });
        }
      };
      const complete = (): void => {
        if (held.length === 0) return;
        for (let count = random(held.length) + 1; count > 0; count--) {
          const [{ head, value, reply, length }] = held.splice(random(held.length), 1) as [
            typeof held[number],
          ];
          memory.bytes[reply] = value & 0xff;
          queue.push(head, length);
        }
        if (queue.needsInterrupt()) isInterrupted = true;
      };
      const receive = (): void => {
        for (const { head, written } of driver.takeUsed()) {
          const expected = sent.get(head)!;
          sent.delete(head);
          assert.equal(written, expected.length);
          assert.equal(memory.bytes[expected.reply], expected.value & 0xff);
          replies++;
        }
        driver.setInterrupt(true);
      };
      const step = (isSending: boolean): void => {
        if (isSending) send();
        else if (driver.publish()) isNotified = true;
        if (isNotified) isDeviceAwake = true;
        isNotified = false;
        if (isDeviceAwake && random(3) > 0) look();
        if (random(2) === 0) complete();
        if (isInterrupted) {
          isInterrupted = false;
          receive();
        } else if (random(4) === 0) driver.setInterrupt(true, 0);
      };
      for (let count = 0; count < 2000; count++) {
        step(true);
        // Buffers are small and the arena only grows: begin again while nothing is under way.
        if (sent.size === 0) arena.next = start;
      }
      for (let count = 0; count < 500; count++) step(false);
      assert.ok(value > 100, `only ${value} buffers were sent`);
      assert.equal(replies, value);
      assert.equal(sent.size + held.length, 0);
    }
  });
}

Deno.test("Virtqueue goes on when its indices wrap", () => {
  using b = bench(4, VIRTIO_F_EVENT_IDX);
  const part = { address: b.arena.take(10), length: 10 };
  for (let count = 0; count < 70_000; count++) {
    const head = b.driver.add([part]);
    assert.equal(b.driver.publish(), true);
    assert.equal(b.queue.pop()!.head, head);
    b.queue.setNotification(true);
    b.queue.push(head, 0);
    assert.equal(b.queue.needsInterrupt(), true);
    assert.equal(b.driver.takeUsed().length, 1);
    b.driver.setInterrupt(true);
  }
});

for (const features of [0n, VIRTIO_F_EVENT_IDX]) {
  Deno.test(`Virtqueue goes on with saved rings, with features 0x${features.toString(16)}`, () => {
    using b = bench(4, features);
    const part = { address: b.arena.take(10), length: 10 };
    const use = (queue: Virtqueue) => {
      const { head } = queue.pop()!;
      queue.push(head, 0);
      return head;
    };
    // As many rounds as it takes for the indices to wrap afterwards.
    for (let count = 0; count < 65_530; count++) {
      b.driver.add([part]);
      b.driver.publish();
      use(b.queue);
      b.driver.takeUsed();
    }
    const given = [b.driver.add([part]), b.driver.add([part]), b.driver.add([part])];
    b.driver.publish();
    assert.equal(use(b.queue), given[0]);
    // What was taken and put back counts as not taken.
    b.queue.pop();
    b.queue.unpop();
    const { size, descriptorTable, availableRing, usedRing } = b.queue;
    const queue = Object.assign(new Virtqueue(b.memory, 0, 8), {
      ...{ size, descriptorTable, availableRing, usedRing },
      isReady: true,
    });
    queue.resume(features);
    assert.equal(queue.hasPending, true);
    assert.deepEqual([use(queue), use(queue)], given.slice(1));
    assert.equal(queue.hasPending, false);
    b.driver.setInterrupt(true);
    assert.equal(queue.needsInterrupt(), true, "whatever the saved one has told of");
    assert.deepEqual(b.driver.takeUsed().map(({ head }) => head), given);
    for (let count = 0; count < 20; count++) {
      queue.setNotification(true);
      b.driver.setInterrupt(true);
      const head = b.driver.add([part]);
      assert.equal(b.driver.publish(), true);
      assert.equal(use(queue), head);
      assert.equal(queue.needsInterrupt(), true);
      assert.deepEqual(b.driver.takeUsed(), [{ head, written: 0 }]);
      assert.equal(queue.needsInterrupt(), features === 0n, "for nothing new, only where no index says so");
    }
    // Rings that cannot be are refused as at a start.
    queue.usedRing = MEMORY;
    assert.throws(() => queue.resume(features), GuestMemoryError);
    queue.size = 3;
    assert.throws(() => queue.resume(features), VirtqueueError);
  });
}

Deno.test("Virtqueue survives rings of garbage", () => {
  const random = seededRandom(7);
  let taken = 0;
  for (let round = 0; round < 300; round++) {
    using b = bench(1 << random(6), random(2) === 0 ? VIRTIO_F_INDIRECT_DESC : 0n);
    const { memory, queue } = b;
    for (let count = 0; count < 60; count++) {
      const at = 4096 + random(b.arena.next - 4096);
      memory.bytes[at] = random(3) === 0 ? random(256) : random(3);
    }
    memory.view.setUint16(queue.availableRing + 2, random(queue.size + 2), true);
    try {
      for (let chain; (chain = queue.pop());) {
        for (const { offset, length } of [...chain.readable, ...chain.writable]) {
          assert.ok(offset + length <= memory.length);
        }
        taken++;
        queue.push(chain.head, 0);
      }
    } catch (error) {
      assert.ok(error instanceof VirtqueueError || error instanceof GuestMemoryError, String(error));
    }
  }
  assert.ok(taken > 0);
});
