import assert from "node:assert/strict";
import { NET_HEADER_SIZE } from "../../ffi/mod.ts";
import { MAX_FRAME } from "../net/switch.ts";
import { type FrameBackend, FrameNetDevice, type FrameNetDeviceOptions } from "./frame_net.ts";
import { NET_FEATURE, NET_QUEUE } from "./net.ts";
import { DESC_F, type DriverSegment, seededRandom, TestGuest, type TestGuestOptions } from "./test_driver.ts";
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VirtqueueError } from "./virtqueue.ts";

const MAC = "02:00:00:00:00:99";
const { receive, transmit } = NET_QUEUE;
const ignore = Deno.build.os !== "linux";

/** A guest with a NIC, and the other end of its cable. */
class Rig implements FrameBackend, Disposable {
  readonly device: FrameNetDevice;
  readonly guest: TestGuest;
  readonly #sent: Uint8Array[] = [];
  /** Whether frames are taken. */
  isOpen = true;
  onFrame: (frame: Uint8Array) => void = () => assert.fail("nobody hears");

  constructor(options: Partial<FrameNetDeviceOptions> = {}, guestOptions: TestGuestOptions = {}) {
    this.device = new FrameNetDevice({ backend: this, mac: MAC, ...options });
    this.guest = new TestGuest(this.device, guestOptions);
  }

  send(frame: Uint8Array): boolean {
    if (this.isOpen) this.#sent.push(frame.slice());
    return this.isOpen;
  }

  /** Takes what the guest sent. */
  take(): Uint8Array[] {
    return this.#sent.splice(0);
  }

  /** Takes memory of the guest and fills it. */
  memory(bytes: Uint8Array): DriverSegment {
    const segment = { address: this.guest.arena.take(bytes.length, 1), length: bytes.length };
    this.guest.arena.bytes(segment).set(bytes);
    return segment;
  }

  /** Offers frames, each in one part. */
  transmit(...frames: Uint8Array[]): void {
    for (const each of frames) this.guest.drivers[transmit]!.add([this.memory(packetOf(each))]);
    this.guest.notify(transmit);
  }

  /** Offers room for frames. */
  offer(...lengths: number[]): DriverSegment[] {
    const segments = lengths.map((length) => ({ address: this.guest.arena.take(length), length }));
    for (const segment of segments) this.guest.drivers[receive]!.add([], [segment]);
    this.guest.notify(receive);
    return segments;
  }

  /** What the guest received, as the sizes that it was told. */
  received(): number[] {
    return this.guest.drivers[receive]!.takeUsed().map(({ written }) => written);
  }

  [Symbol.dispose](): void {
    this.guest[Symbol.dispose]();
  }
}

function frame(length: number, seed = 1): Uint8Array<ArrayBuffer> {
  return Uint8Array.from({ length }, (_, index) => (index * 7 + seed * 31 + (index >> 8)) & 0xff);
}

function packetOf(frame: Uint8Array, header: readonly number[] = []): Uint8Array<ArrayBuffer> {
  const packet = new Uint8Array(NET_HEADER_SIZE + frame.length);
  packet.set(header);
  packet.set(frame, NET_HEADER_SIZE);
  return packet;
}

function test(name: string, fn: () => void | Promise<void>): void {
  Deno.test({ name, ignore, fn });
}

test("FrameNetDevice offers what the options say, and nothing that needs more than whole frames", () => {
  using rig = new Rig({ mtu: 9000 });
  assert.deepEqual([...rig.device.config], [2, 0, 0, 0, 0, 0x99, 1, 0, 0, 0, 9000 & 0xff, 9000 >> 8]);
  assert.equal(rig.device.features, NET_FEATURE.MAC | NET_FEATURE.STATUS | NET_FEATURE.MTU);
  using plain = new Rig();
  assert.equal(plain.device.features, NET_FEATURE.MAC | NET_FEATURE.STATUS);
});

test("FrameNetDevice sends frames whole, whatever their parts", () => {
  using rig = new Rig();
  const sent = [frame(14), frame(1514, 2), frame(MAX_FRAME, 3)];
  const driver = rig.guest.drivers[transmit]!;
  const [first, second, third] = sent.map((each) => packetOf(each)) as [Uint8Array, Uint8Array, Uint8Array];
  driver.add([rig.memory(first)]);
  driver.add([rig.memory(second.subarray(0, 5)), rig.memory(second.subarray(5))]);
  driver.add(
    [0, 12, 20_000, 20_000].map((start, index, starts) =>
      rig.memory(third.subarray(start, starts[index + 1]))
    ),
    [],
    true,
  );
  rig.guest.notify(transmit);
  assert.deepEqual(rig.take(), sent);
  assert.deepEqual(driver.takeUsed().map(({ written }) => written), [0, 0, 0]);
  assert.equal(rig.guest.interrupts[transmit], 1);
  assert.equal(rig.device.counters.txPackets, 3);
  assert.equal(rig.device.counters.txBytes, 14 + 1514 + MAX_FRAME);
});

test("FrameNetDevice drops frames that are impossible, unfinished or not taken, and goes on", () => {
  using rig = new Rig();
  const driver = rig.guest.drivers[transmit]!;
  for (const length of [1, 12, 25, 12 + MAX_FRAME + 1]) driver.add([rig.memory(new Uint8Array(length))]);
  driver.add([], [rig.memory(frame(100))]);
  // A checksum or segments are left to the device.
  driver.add([rig.memory(packetOf(frame(100), [1]))]);
  driver.add([rig.memory(packetOf(frame(100), [0, 1]))]);
  // A flag that nobody knows.
  driver.add([rig.memory(packetOf(frame(100, 2), [0x80]))]);
  rig.guest.notify(transmit);
  assert.deepEqual(rig.take(), [frame(100, 2)]);
  assert.equal(driver.takeUsed().length, 8);
  assert.equal(rig.device.counters.txDropped, 7);
  rig.isOpen = false;
  rig.transmit(frame(60));
  assert.equal(driver.takeUsed().length, 1);
  assert.equal(rig.device.counters.txDropped, 8);
  rig.isOpen = true;
  rig.transmit(frame(61));
  assert.deepEqual(rig.take(), [frame(61)]);
  assert.equal(rig.guest.failure, undefined);
});

test("FrameNetDevice sends in turns, so that others have theirs", async () => {
  using rig = new Rig();
  const driver = rig.guest.drivers[transmit]!;
  const part = rig.memory(packetOf(frame(100)));
  for (let count = 0; count < 200; count++) driver.add([part]);
  rig.guest.notify(transmit);
  assert.equal(rig.take().length, 64);
  const used = await rig.guest.takeAllUsed(transmit);
  assert.equal(used.length, 200);
  assert.equal(rig.take().length, 136);
});

test("FrameNetDevice receives into buffers, each frame behind a header", () => {
  using rig = new Rig();
  const [first, second] = rig.offer(1526, 1526) as [DriverSegment, DriverSegment];
  rig.guest.arena.bytes(first).fill(0xee);
  rig.onFrame(frame(100));
  assert.deepEqual(rig.received(), [112]);
  const expected = packetOf(frame(100), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
  assert.deepEqual(rig.guest.arena.bytes(first).slice(0, 112), expected);
  assert.equal(rig.guest.arena.bytes(first)[112], 0xee);
  assert.equal(rig.guest.interrupts[receive], 1);
  rig.guest.drivers[receive]!.setInterrupt(true);
  rig.onFrame(frame(1514, 2));
  assert.deepEqual(rig.received(), [1526]);
  assert.deepEqual(rig.guest.arena.bytes(second).slice(12), frame(1514, 2));
  assert.equal(rig.guest.interrupts[receive], 2);
  assert.deepEqual({ ...rig.device.counters, txPackets: 0 }, {
    rxPackets: 2,
    rxBytes: 1614,
    rxDropped: 0,
    txPackets: 0,
    txBytes: 0,
    txDropped: 0,
  });
});

test("FrameNetDevice keeps a copy of what finds no buffer, for a bounded number of frames", () => {
  using rig = new Rig();
  const lent = frame(60);
  for (let count = 0; count < 300; count++) {
    lent[59] = count;
    rig.onFrame(lent);
  }
  lent.fill(0);
  assert.equal(rig.device.counters.rxDropped, 44);
  const buffers = rig.offer(...Array<number>(256).fill(100));
  assert.deepEqual(rig.received(), Array<number>(256).fill(72));
  assert.deepEqual(
    buffers.map((each) => rig.guest.arena.bytes(each)[71]),
    Array.from({ length: 256 }, (_, index) => index),
  );
  rig.onFrame(frame(70));
  rig.offer(100);
  assert.deepEqual(rig.received(), [82]);
  assert.equal(rig.device.counters.rxDropped, 44);
});

test("FrameNetDevice drops a frame that is impossible or larger than its buffer, and keeps the buffer", () => {
  using rig = new Rig();
  rig.offer(100);
  for (const length of [0, 13, 89, MAX_FRAME + 1]) rig.onFrame(frame(length));
  assert.deepEqual(rig.received(), []);
  assert.equal(rig.device.counters.rxDropped, 4);
  rig.onFrame(frame(88));
  assert.deepEqual(rig.received(), [100]);
});

test("FrameNetDevice gives up on buffers that break the rules", () => {
  for (const length of [0, 11]) {
    using rig = new Rig();
    const driver = rig.guest.drivers[receive]!;
    if (length > 0) driver.add([], [{ address: 0, length }]);
    else driver.add([{ address: 0, length: 1000 }]);
    rig.guest.notify(receive);
    rig.onFrame(frame(100));
    assert.ok(rig.guest.failure instanceof VirtqueueError);
    // It waits for the reset.
    rig.onFrame(frame(100));
    rig.transmit(frame(100));
    assert.deepEqual(rig.take(), []);
  }
  for (const queue of [receive, transmit]) {
    using rig = new Rig();
    const driver = rig.guest.drivers[queue]!;
    driver.setDescriptor(0, 2 ** 40, 1000, queue === receive ? DESC_F.WRITE : 0);
    driver.offer(0);
    rig.guest.notify(queue);
    rig.onFrame(frame(100));
    assert.equal((rig.guest.failure as Error).name, "GuestMemoryError");
    rig.guest.reset();
    rig.guest.start();
    rig.offer(100);
    rig.onFrame(frame(60));
    assert.deepEqual(rig.received(), [72]);
  }
});

test("FrameNetDevice touches no queue after a reset, and works again", () => {
  using rig = new Rig();
  const [buffer] = rig.offer(1000) as [DriverSegment];
  rig.guest.arena.bytes(buffer).fill(0xee);
  rig.guest.reset();
  rig.onFrame(frame(500));
  assert.equal(rig.device.counters.rxDropped, 1);
  assert.ok(rig.guest.arena.bytes(buffer).every((byte) => byte === 0xee));
  rig.guest.start();
  rig.onFrame(frame(60));
  rig.guest.reset();
  rig.guest.start();
  rig.onFrame(frame(61));
  rig.offer(1000, 1000);
  // What was kept for the former driver is gone.
  assert.deepEqual(rig.received(), [73]);
});

test("FrameNetDevice leaves its backend in the end", () => {
  const rig = new Rig();
  const { counters } = rig.device;
  rig[Symbol.dispose]();
  rig.onFrame(frame(100));
  assert.deepEqual(rig.device.counters, counters);
});

test("FrameNetDevice waits as long as limiters say, old and new ones", async () => {
  const asked: number[] = [];
  const limiter = (isRefused: boolean) => ({
    consume: (bytes: number) => {
      asked.push(bytes);
      isRefused = !isRefused;
      return isRefused ? 0 : 1;
    },
  });
  using rig = new Rig({ transmitLimiter: limiter(true), receiveLimiter: limiter(true) });
  rig.transmit(frame(100), frame(200), frame(300));
  assert.equal(rig.take().length, 0);
  await rig.guest.takeAllUsed(transmit);
  assert.deepEqual(rig.take().map(({ length }) => length), [100, 200, 300]);
  assert.deepEqual(asked.splice(0), [112, 112, 212, 212, 312, 312]);
  rig.offer(1000, 1000);
  for (const length of [101, 201]) rig.onFrame(frame(length));
  assert.deepEqual(rig.received(), []);
  await rig.guest.takeAllUsed(receive);
  assert.deepEqual(asked.splice(0), [113, 113, 213, 213]);
  rig.device.updateLimiters({ receive: { consume: () => 0 } });
  rig.offer(1000);
  rig.onFrame(frame(301));
  assert.deepEqual(rig.received(), [313]);
  rig.device.updateLimiters({ transmit: limiter(true) });
  rig.transmit(frame(100));
  assert.deepEqual(rig.take(), []);
  // A reset ends the wait: no timer is left.
  rig.guest.reset();
});

test("FrameNetDevice carries any frames through any buffers (property)", async () => {
  const random = seededRandom(0x1234_5678);
  const size = () => 14 + (random(6) === 0 ? random(MAX_FRAME - 13) : random(2000));
  const split = (length: number): number[] => {
    const parts: number[] = [];
    for (let left = length; left > 0;) {
      const part = parts.length === 12 ? left : Math.min(left, 1 + random(random(2) === 0 ? 20 : 9000));
      parts.push(part);
      left -= part;
    }
    return parts;
  };
  const rings = [0n, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX];
  for (let round = 0; round < 40; round++) {
    using rig = new Rig({}, { ringFeatures: rings[round % 4]! });
    const { guest } = rig;
    const isIndirect = (round & 1) === 1;
    const sender = guest.drivers[transmit]!;
    const sent = Array.from({ length: 100 }, (_, index) => frame(index % 10 === 0 ? size() : 60, index));
    for (const each of sent) {
      let at = 0;
      const packet = packetOf(each);
      const parts = split(packet.length);
      if (!isIndirect && sender.freeCount < parts.length) await guest.takeAllUsed(transmit);
      sender.add(parts.map((part) => rig.memory(packet.subarray(at, at += part))), [], isIndirect);
      if (random(4) === 0) guest.notify(transmit);
    }
    guest.notify(transmit);
    await guest.takeAllUsed(transmit);
    assert.deepEqual(rig.take(), sent);
    // To the guest, while buffers come now and then.
    const receiver = guest.drivers[receive]!;
    const buffers = new Map<number, DriverSegment[]>();
    const received: Uint8Array[] = [];
    const given: Uint8Array[] = [];
    const queued: number[] = [];
    const rooms: number[] = [];
    let dropped = 0;
    for (let step = 0; step < 60; step++) {
      if (random(2) === 0) {
        const length = size();
        given.push(frame(length, step));
        queued.push(given.length - 1);
        rig.onFrame(given.at(-1)!);
      } else {
        const room = 12 + random(4000);
        const segments = split(room).map((length) => ({ address: guest.arena.take(length, 1), length }));
        if (isIndirect || receiver.freeCount >= segments.length) {
          buffers.set(receiver.add([], segments, isIndirect), segments);
          rooms.push(room);
          guest.notify(receive);
        }
      }
      // The model: each frame in order takes the next buffer, or is dropped where it does not fit.
      const expected: Uint8Array[] = [];
      while (queued.length > 0 && rooms.length > 0) {
        const next = given[queued.shift()!]!;
        if (next.length + NET_HEADER_SIZE > rooms[0]!) dropped++;
        else {
          rooms.shift();
          expected.push(next);
        }
      }
      for (const { head, written } of receiver.takeUsed()) {
        const bytes = buffers.get(head)!.flatMap((each) => [...guest.arena.bytes(each)]).slice(0, written);
        received.push(Uint8Array.from(bytes.slice(NET_HEADER_SIZE)));
      }
      assert.deepEqual(received.splice(0), expected);
      assert.equal(rig.device.counters.rxDropped, dropped);
    }
    assert.equal(guest.failure, undefined);
  }
});

test("FrameNetDevice stands any descriptors, and touches nothing beside buffers (property)", () => {
  const random = seededRandom(0x0bad_cafe);
  let failures = 0;
  let carried = 0;
  for (let round = 0; round < 300; round++) {
    using rig = new Rig({}, { ringFeatures: random(2) === 0 ? 0n : VIRTIO_F_INDIRECT_DESC });
    const { guest } = rig;
    const { memory } = guest;
    // Nobody may read or write behind it.
    const room = guest.arena.take(70_000);
    const guard = memory.length - 4096;
    memory.bytes.fill(0xa5, guard);
    const wild = round % 3 === 0;
    for (const index of [receive, transmit]) {
      const driver = guest.drivers[index]!;
      for (let slot = 0; slot < 32; slot++) {
        const address = wild && random(6) === 0 ? random(2 ** 31) * random(2 ** 20) : room + random(4000);
        const length = wild && random(6) === 0 ? random(2 ** 32) : random(3000);
        const flags = (index === receive ? DESC_F.WRITE : 0) ^
          (wild && random(8) === 0 ? random(8) : random(3) === 0 ? DESC_F.NEXT : 0);
        driver.setDescriptor(
          slot,
          address,
          length,
          flags,
          wild && random(20) === 0 ? random(2 ** 16) : slot + 1,
        );
      }
      driver.setDescriptor(31, room, 2000, index === receive ? DESC_F.WRITE : 0);
      for (let count = random(20); count >= 0; count--) driver.offer(random(wild ? 33 : 32));
      guest.notify(index);
    }
    for (let count = 0; count < 10; count++) rig.onFrame(frame(14 + random(2500), count));
    for (const each of rig.take()) assert.ok(each.length >= 14 && each.length <= MAX_FRAME);
    const { rxPackets, txPackets } = rig.device.counters;
    carried += rxPackets + txPackets;
    if (guest.failure !== undefined) {
      failures++;
      assert.ok(/VirtqueueError|GuestMemoryError/.test((guest.failure as Error).name), String(guest.failure));
    }
    assert.ok(memory.bytes.subarray(guard).every((byte) => byte === 0xa5));
  }
  assert.ok(failures > 50 && failures < 300, String(failures));
  assert.ok(carried > 500, String(carried));
});
