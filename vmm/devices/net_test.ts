import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { Fd, libc, Mapping, NET_HEADER_SIZE, NetworkInterfaces, Tap } from "../../ffi/mod.ts";
import { testInNetworkNamespace } from "../../ffi/network_namespace.ts";
import { EventLoop } from "../event_loop.ts";
import { NET_FEATURE, NET_QUEUE, type NetBackend, NetDevice, type NetDeviceOptions } from "./net.ts";
import {
  DESC_F,
  type DriverSegment,
  TestGuest,
  type TestGuestOptions,
  type UsedBuffer,
} from "./test_driver.ts";
import type { Watcher } from "./virtio_device.ts";
import { VirtqueueError } from "./virtqueue.ts";

const MAC = "02:00:00:00:00:99";
const { receive, transmit } = NET_QUEUE;
const AF_UNIX = 1;
const SOCK_SEQPACKET_NONBLOCK = 5 | 0o4000;

/** A cable with both ends here: sockets that keep packets whole. */
class Cable implements NetBackend {
  readonly fd: Fd;
  readonly offloads: number[] = [];
  readonly #end: Fd;
  readonly #buffer = new Mapping(131_072);

  constructor() {
    const library = Deno.dlopen("libc.so.6", {
      socketpair: { parameters: ["i32", "i32", "i32", "buffer"], result: "i32" },
      setsockopt: { parameters: ["i32", "i32", "i32", "buffer", "u32"], result: "i32" },
    });
    const pair = new Int32Array(2);
    const bytes = new Uint8Array(pair.buffer);
    assert.equal(library.symbols.socketpair(AF_UNIX, SOCK_SEQPACKET_NONBLOCK, 0, bytes), 0);
    // SOL_SOCKET, SO_SNDBUF: room for a hundred packets.
    const room = new Uint8Array(Int32Array.of(2 ** 22).buffer);
    for (const fd of pair) assert.equal(library.symbols.setsockopt(fd, 1, 7, room, 4), 0);
    library.close();
    this.fd = new Fd(pair[0]!, "device's end");
    this.#end = new Fd(pair[1]!, "host's end");
  }

  setOffload(flags: number): void {
    this.offloads.push(flags);
  }

  readCounters(): never {
    throw new Error("no interface");
  }

  /** Sends to the device, which must have room. */
  send(packet: Uint8Array): void {
    assert.ok(this.trySend(packet));
  }

  /** Sends to the device, if there is room. */
  trySend(packet: Uint8Array): boolean {
    new Uint8Array(this.#buffer.buffer).set(packet);
    const sent = libc().write(this.#end.number, this.#buffer.pointer, BigInt(packet.length));
    return Number(sent) === packet.length;
  }

  /** Takes what the device sent. */
  take(): Uint8Array[] {
    const packets: Uint8Array[] = [];
    while (true) {
      const length = Number(libc().read(this.#end.number, this.#buffer.pointer, 131_072n));
      if (length < 0) return packets;
      packets.push(new Uint8Array(this.#buffer.buffer).slice(0, length));
    }
  }

  /** Takes the host's end away. */
  cut(): void {
    this.#end[Symbol.dispose]();
  }

  [Symbol.dispose](): void {
    this.fd[Symbol.dispose]();
    this.cut();
    this.#buffer[Symbol.dispose]();
  }
}

/** A guest with a NIC on a cable. */
class Rig implements Disposable {
  readonly cable = new Cable();
  readonly loop = new EventLoop();
  readonly device: NetDevice;
  readonly guest: TestGuest;
  /** How many descriptors are watched for the device. */
  watched = 0;

  constructor(options: Partial<NetDeviceOptions> = {}, guestOptions: TestGuestOptions = {}) {
    const watcher: Watcher = {
      watch: (fd, onInput) => {
        this.watched++;
        this.loop.watch(fd, onInput);
      },
      unwatch: (fd) => {
        this.watched--;
        this.loop.unwatch(fd);
      },
    };
    this.device = new NetDevice({ backend: this.cable, mac: MAC, watcher, vhost: false, ...options });
    this.guest = new TestGuest(this.device, guestOptions);
  }

  /** Takes memory of the guest and fills it. */
  memory(bytes: Uint8Array): DriverSegment {
    const segment = { address: this.guest.arena.take(bytes.length, 1), length: bytes.length };
    this.guest.arena.bytes(segment).set(bytes);
    return segment;
  }

  /** Offers room for packets. */
  offer(...lengths: number[]): DriverSegment[] {
    const segments = lengths.map((length) => ({ address: this.guest.arena.take(length), length }));
    for (const segment of segments) this.guest.drivers[receive]!.add([], [segment]);
    this.guest.notify(receive);
    return segments;
  }

  /** Serves until there is nothing to do. */
  settle(): void {
    while (this.loop.poll(0) > 0);
  }

  [Symbol.dispose](): void {
    this.guest[Symbol.dispose]();
    this.loop[Symbol.dispose]();
  }
}

function packet(length: number, seed = 1): Uint8Array<ArrayBuffer> {
  // The header's last two bytes are the device's to write.
  return Uint8Array.from(
    { length },
    (_, index) => index < NET_HEADER_SIZE ? 0 : (index * 7 + seed * 31 + (index >> 8)) & 0xff,
  );
}

const isInside = testInNetworkNamespace(import.meta.url, "NICs on taps of the kernel", realTaps);

function test(name: string, fn: () => void | Promise<void>): void {
  if (!isInside) Deno.test({ name, ignore: Deno.build.os !== "linux", fn });
}

test("NetDevice offers what the options say", () => {
  using rig = new Rig({ mtu: 9000 });
  assert.deepEqual([...rig.device.config], [2, 0, 0, 0, 0, 0x99, 1, 0, 0, 0, 9000 & 0xff, 9000 >> 8]);
  assert.ok((rig.device.features & NET_FEATURE.MTU) !== 0n);
  assert.equal(rig.device.isVhost, false);
  // CSUM, TSO4, TSO6 and ECN were negotiated.
  assert.deepEqual(rig.cable.offloads, [15]);
  using plain = new Rig({}, { features: NET_FEATURE.GUEST_TSO4 | NET_FEATURE.MAC });
  assert.equal(plain.device.features & NET_FEATURE.MTU, 0n);
  assert.deepEqual(plain.cable.offloads, [0]);
});

test("NetDevice does not use vhost with limits, and says so if it must", () => {
  using cable = new Cable();
  using loop = new EventLoop();
  const options = { backend: cable, mac: MAC, watcher: loop, receiveLimiter: { consume: () => 0 } };
  assert.throws(() => new NetDevice({ ...options, vhost: true }), /kernel knows none/);
  using device = new NetDevice({ ...options, vhost: "auto" });
  assert.equal(device.isVhost, false);
});

test("NetDevice sends packets whole, whatever their parts", () => {
  using rig = new Rig();
  const sent = [packet(60), packet(1514 + 12, 2), packet(65_562, 3)];
  const driver = rig.guest.drivers[transmit]!;
  driver.add([rig.memory(sent[0]!)]);
  driver.add([rig.memory(sent[1]!.subarray(0, 5)), rig.memory(sent[1]!.subarray(5))]);
  driver.add(
    [0, 12, 20_000, 20_000].map((start, index, starts) =>
      rig.memory(sent[2]!.subarray(start, starts[index + 1]))
    ),
    [],
    true,
  );
  rig.guest.notify(transmit);
  assert.deepEqual(rig.cable.take(), sent);
  assert.deepEqual(driver.takeUsed().map(({ written }) => written), [0, 0, 0]);
  assert.equal(rig.guest.interrupts[transmit], 1);
  assert.equal(rig.device.counters.txPackets, 3);
  assert.equal(rig.device.counters.txBytes, 60 + 1526 + 65_562 - 36);
});

test("NetDevice drops packets of impossible sizes and those that the host refuses, and goes on", () => {
  using rig = new Rig();
  const driver = rig.guest.drivers[transmit]!;
  for (const length of [1, 12, 25, 65_570]) driver.add([rig.memory(packet(length))]);
  driver.add([], [rig.memory(packet(100))]);
  driver.add([rig.memory(packet(26))]);
  rig.guest.notify(transmit);
  assert.deepEqual(rig.cable.take().map(({ length }) => length), [26]);
  assert.equal(driver.takeUsed().length, 6);
  assert.equal(rig.device.counters.txDropped, 5);
  rig.cable.cut();
  driver.add([rig.memory(packet(100))]);
  rig.guest.notify(transmit);
  assert.equal(driver.takeUsed().length, 1);
  assert.equal(rig.device.counters.txDropped, 6);
  assert.equal(rig.guest.failure, undefined);
});

test("NetDevice sends in turns, so that others have theirs", () => {
  using rig = new Rig();
  const driver = rig.guest.drivers[transmit]!;
  const part = rig.memory(packet(100));
  for (let count = 0; count < 200; count++) driver.add([part]);
  rig.guest.notify(transmit);
  assert.equal(rig.cable.take().length, 64);
  rig.loop.poll(0);
  assert.equal(rig.cable.take().length, 64);
  rig.settle();
  assert.equal(rig.cable.take().length, 72);
  assert.equal(driver.takeUsed().length, 200);
});

test("NetDevice receives into buffers, and looks for packets only while there are some", () => {
  using rig = new Rig();
  const driver = rig.guest.drivers[receive]!;
  const idle = rig.watched;
  rig.cable.send(packet(100));
  rig.settle();
  assert.equal(rig.device.counters.rxPackets, 0);
  const [first, second] = rig.offer(1526, 1526) as [DriverSegment, DriverSegment];
  assert.equal(rig.watched, idle + 1);
  assert.deepEqual(driver.takeUsed().map(({ written }) => written), [100]);
  const expected = packet(100);
  expected[10] = 1;
  assert.deepEqual(rig.guest.arena.bytes(first).slice(0, 100), expected);
  assert.equal(rig.guest.interrupts[receive], 1);
  driver.setInterrupt(true);
  rig.cable.send(packet(1526, 2));
  rig.settle();
  assert.deepEqual(driver.takeUsed().map(({ written }) => written), [1526]);
  assert.deepEqual(rig.guest.arena.bytes(second).slice(12), packet(1526, 2).slice(12));
  assert.equal(rig.guest.interrupts[receive], 2);
  // The last buffer is used: nobody looks.
  rig.cable.send(packet(100));
  rig.settle();
  assert.equal(rig.watched, idle);
  assert.equal(rig.device.counters.rxBytes, 88 + 1514);
});

test("NetDevice receives in turns, so that others have theirs", () => {
  using rig = new Rig();
  for (let count = 0; count < 100; count++) rig.cable.send(packet(100));
  rig.offer(...Array<number>(100).fill(200));
  assert.equal(rig.device.counters.rxPackets, 64);
  rig.settle();
  assert.equal(rig.device.counters.rxPackets, 100);
});

test("NetDevice spreads a packet over buffers, and keeps it until there are enough", () => {
  using rig = new Rig();
  const driver = rig.guest.drivers[receive]!;
  rig.cable.send(packet(4000));
  rig.cable.send(packet(50, 2));
  const buffers = rig.offer(1000, 1000);
  assert.deepEqual(driver.takeUsed(), []);
  buffers.push(...rig.offer(1000));
  assert.deepEqual(driver.takeUsed(), []);
  assert.equal(rig.device.counters.rxPackets, 0);
  buffers.push(...rig.offer(1500, 1500));
  assert.deepEqual(driver.takeUsed().map(({ written }) => written), [1000, 1000, 1000, 1000, 50]);
  const expected = packet(4000);
  expected[10] = 4;
  const found = buffers.slice(0, 4).flatMap((each) => [...rig.guest.arena.bytes(each)]).slice(0, 4000);
  assert.deepEqual(Uint8Array.from(found), expected);
  assert.equal(rig.device.counters.rxPackets, 2);
});

test("NetDevice drops a packet that no buffer can take, without the feature to spread it", () => {
  using rig = new Rig({}, { features: NET_FEATURE.MAC });
  const driver = rig.guest.drivers[receive]!;
  rig.cable.send(packet(2000));
  rig.cable.send(packet(60, 2));
  rig.offer(1526);
  assert.deepEqual(driver.takeUsed().map(({ written }) => written), [60]);
  assert.equal(rig.device.counters.rxDropped, 1);
});

test("NetDevice drops a packet that the whole ring could not take", () => {
  using rig = new Rig();
  rig.cable.send(packet(65_562));
  rig.cable.send(packet(60));
  rig.offer(...Array<number>(256).fill(100));
  rig.settle();
  assert.equal(rig.device.counters.rxDropped, 1);
  assert.equal(rig.device.counters.rxPackets, 1);
  assert.equal(rig.guest.failure, undefined);
});

test("NetDevice gives up on buffers that break the rules", () => {
  for (const length of [0, 11]) {
    using rig = new Rig();
    rig.cable.send(packet(100));
    const driver = rig.guest.drivers[receive]!;
    if (length > 0) driver.add([], [{ address: 0, length }]);
    else driver.add([{ address: 0, length: 1000 }]);
    rig.guest.notify(receive);
    assert.ok(rig.guest.failure instanceof VirtqueueError);
    const { watched } = rig;
    rig.guest.reset();
    assert.equal(rig.watched, watched - 1);
  }
  for (const queue of [receive, transmit]) {
    using rig = new Rig();
    rig.cable.send(packet(100));
    const driver = rig.guest.drivers[queue]!;
    driver.setDescriptor(0, 2 ** 40, 1000, queue === receive ? DESC_F.WRITE : 0);
    driver.offer(0);
    rig.guest.notify(queue);
    assert.equal((rig.guest.failure as Error).name, "GuestMemoryError");
  }
});

test("NetDevice touches no queue after a reset, and works again", () => {
  using rig = new Rig();
  rig.cable.send(packet(4000));
  const [buffer] = rig.offer(1000) as [DriverSegment];
  rig.guest.arena.bytes(buffer).fill(0xee);
  rig.guest.reset();
  assert.equal(rig.watched, 0);
  rig.cable.send(packet(500));
  rig.settle();
  assert.ok(rig.guest.arena.bytes(buffer).every((byte) => byte === 0xee));
  rig.guest.start();
  rig.offer(1000);
  // What was kept for the former driver is gone.
  assert.deepEqual(rig.guest.drivers[receive]!.takeUsed().map(({ written }) => written), [500]);
});

test("NetDevice says that the link is down when the cable is gone", () => {
  using rig = new Rig();
  rig.offer(1000);
  rig.cable.cut();
  rig.settle();
  assert.equal(rig.device.config[6], 0);
  assert.equal(rig.guest.configChanges, 1);
  rig.offer(1000);
  rig.settle();
  assert.equal(rig.guest.configChanges, 1);
});

test("NetDevice waits as long as limiters say", async () => {
  const asked: number[] = [];
  const limiter = () => {
    let isRefused = true;
    return {
      consume: (bytes: number) => {
        asked.push(bytes);
        isRefused = !isRefused;
        return isRefused ? 0 : 1;
      },
    };
  };
  using rig = new Rig({ transmitLimiter: limiter(), receiveLimiter: limiter() });
  const driver = rig.guest.drivers[transmit]!;
  for (const length of [100, 200, 300]) driver.add([rig.memory(packet(length))]);
  rig.guest.notify(transmit);
  assert.equal(rig.cable.take().length, 0);
  await rig.guest.takeAllUsed(transmit);
  assert.equal(rig.cable.take().length, 3);
  assert.deepEqual(asked.splice(0), [100, 100, 200, 200, 300, 300]);
  for (const length of [101, 201, 301]) rig.cable.send(packet(length));
  rig.offer(1000, 1000, 1000);
  // What a packet owes is paid before the next one.
  assert.equal(rig.device.counters.rxPackets, 1);
  await rig.guest.takeAllUsed(receive);
  // The last one is not paid yet, and its timer is set: a reset ends it.
  assert.deepEqual(asked, [101, 101, 201, 201, 301]);
  rig.guest.reset();
});

test("NetDevice carries any packets through any buffers (property)", () => {
  let state = 0x1234_5678;
  const random = (limit: number) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor(state / 2 ** 32 * limit);
  };
  const size = () => random(3) === 0 ? 26 + random(65_536) : 26 + random(2000);
  const split = (length: number, least: number): number[] => {
    const parts: number[] = [];
    while (length > 0) {
      const part = Math.min(length, least + random(random(2) === 0 ? 20 : 3000));
      parts.push(part);
      length -= part;
    }
    return parts;
  };
  for (let round = 0; round < 40; round++) {
    using rig = new Rig({}, {
      ringFeatures: [0n, 1n << 28n, 1n << 29n, 3n << 28n][round % 4]!,
    });
    const { guest, cable } = rig;
    // From the guest.
    const sender = guest.drivers[transmit]!;
    const sent = Array.from({ length: 8 }, (_, index) => packet(size(), index));
    const arrived: Uint8Array[] = [];
    for (const each of sent) {
      let at = 0;
      const parts = split(each.length, 1).slice(0, 20);
      parts[parts.length - 1]! += each.length - parts.reduce((sum, part) => sum + part, 0);
      sender.add(parts.map((part) => rig.memory(each.subarray(at, at += part))), [], (round & 1) === 1);
      if (random(2) === 0) guest.notify(transmit);
      arrived.push(...cable.take());
    }
    guest.notify(transmit);
    rig.settle();
    assert.deepEqual([...arrived, ...cable.take()], sent);
    assert.equal(sender.takeUsed().length, sent.length);
    // To the guest, while buffers come now and then.
    const receiver = guest.drivers[receive]!;
    const buffers = new Map<number, DriverSegment[]>();
    const expected = Array.from({ length: 8 }, (_, index) => packet(size(), index));
    const received: Uint8Array[] = [];
    let pending: { bytes: number[]; left: number } | undefined;
    let next = 0;
    while (received.length < expected.length) {
      if (next < expected.length && random(2) === 0 && cable.trySend(expected[next]!)) next++;
      const room = 12 + random(5000);
      const parts = split(room, 1).slice(0, 4);
      if (parts.reduce((sum, part) => sum + part, 0) >= 12 && receiver.freeCount >= parts.length) {
        const segments = parts.map((length) => ({ address: guest.arena.take(length, 1), length }));
        buffers.set(receiver.add([], segments, (round & 1) === 1), segments);
        guest.notify(receive);
      }
      rig.settle();
      for (const { head, written } of receiver.takeUsed()) {
        const bytes = buffers.get(head)!.flatMap((each) => [...guest.arena.bytes(each)]).slice(0, written);
        if (!pending) pending = { bytes: [], left: bytes[10]! + 256 * bytes[11]! };
        pending.bytes.push(...bytes);
        if (--pending.left > 0) continue;
        received.push(Uint8Array.from(pending.bytes).fill(0, 10, 12));
        pending = undefined;
      }
      // The arena gives nothing back.
      if (guest.arena.next > 3.5 * 2 ** 20) break;
    }
    assert.deepEqual(received, expected.slice(0, received.length));
    assert.equal(rig.device.counters.rxDropped, 0);
    assert.equal(guest.failure, undefined);
  }
});

/** A NIC on a tap, and the host as its peer. */
class TapRig implements Disposable {
  readonly loop = new EventLoop();
  readonly interfaces = new NetworkInterfaces();
  readonly device: NetDevice;
  readonly guest: TestGuest;
  readonly #buffers = new Map<number, DriverSegment>();
  readonly #used: UsedBuffer[] = [];
  readonly #ready: Uint8Array[] = [];

  constructor(readonly vhost: boolean) {
    const backend = Tap.open("tap0");
    this.interfaces.setAddress("tap0", "10.77.0.1", "255.255.255.0");
    this.interfaces.setMtu("tap0", 65_000);
    this.interfaces.setUp("tap0", true);
    this.device = new NetDevice({ backend, mac: MAC, watcher: this.loop, vhost });
    this.guest = new TestGuest(this.device);
    for (const queue of vhost ? this.guest.queues : []) {
      const event = this.guest.interruptEvent(queue);
      this.loop.watch(event, () => void event.drain());
    }
    for (let count = 0; count < 64; count++) {
      const segment = { address: this.guest.arena.take(2048), length: 2048 };
      this.#buffers.set(this.guest.drivers[receive]!.add([], [segment]), segment);
    }
    this.guest.notify(receive);
  }

  /** Sends a frame as the guest. */
  send(frame: Uint8Array, header = new Uint8Array(NET_HEADER_SIZE)): void {
    const segments = [header, ...frame.length > 100 ? [frame.subarray(0, 99), frame.subarray(99)] : [frame]]
      .map(
        (bytes) => {
          const segment = { address: this.guest.arena.take(bytes.length, 1), length: bytes.length };
          this.guest.arena.bytes(segment).set(bytes);
          return segment;
        },
      );
    this.guest.drivers[transmit]!.add(segments);
    this.guest.notify(transmit);
  }

  /** Waits for a frame to the guest. */
  async frame(isWanted: (frame: Uint8Array) => boolean): Promise<Uint8Array> {
    while (true) {
      this.guest.drivers[receive]!.setInterrupt(true);
      this.#used.push(...this.guest.drivers[receive]!.takeUsed());
      while (this.#used.length > 0) {
        const part = ({ head, written }: UsedBuffer) =>
          this.guest.arena.bytes(this.#buffers.get(head)!).slice(0, written);
        const first = part(this.#used[0]!);
        const count = first[10]! + 256 * first[11]!;
        if (this.#used.length < count) break;
        const bytes = this.#used.splice(0, count).flatMap((each) => [...part(each)]);
        this.#ready.push(Uint8Array.from(bytes).subarray(NET_HEADER_SIZE));
      }
      const found = this.#ready.findIndex(isWanted);
      if (found >= 0) return this.#ready.splice(found, 1)[0]!;
      this.loop.poll(10);
      await new Promise((resolve) => setTimeout(resolve, 0));
    }
  }

  /** Waits until all was sent. */
  flush(): void {
    while (this.guest.drivers[transmit]!.outstanding > 0) {
      this.guest.drivers[transmit]!.setInterrupt(true);
      if (this.guest.drivers[transmit]!.takeUsed().length === 0) this.loop.poll(10);
    }
  }

  [Symbol.dispose](): void {
    this.guest[Symbol.dispose]();
    this.interfaces[Symbol.dispose]();
    this.loop[Symbol.dispose]();
  }
}

const GUEST_MAC = MAC.split(":").map((byte) => parseInt(byte, 16));

/** Answers a request for the guest's address. */
function arpReply(request: Uint8Array): Uint8Array {
  const reply = request.slice();
  reply.set(request.subarray(6, 12), 0);
  reply.set(GUEST_MAC, 6);
  reply[21] = 2;
  reply.set([...GUEST_MAC, 10, 77, 0, 2], 22);
  reply.set(request.subarray(22, 32), 32);
  return reply;
}

/** Makes a UDP datagram from 10.77.0.2 to 10.77.0.1; its own checksum is left out, as it may be. */
function udpFrame(hostMac: Uint8Array, source: number, target: number, text: string): Uint8Array {
  const data = new TextEncoder().encode(text);
  const frame = new Uint8Array(42 + data.length);
  const view = new DataView(frame.buffer);
  frame.set(hostMac, 0);
  frame.set(GUEST_MAC, 6);
  frame.set([8, 0, 0x45], 12);
  view.setUint16(16, 28 + data.length);
  frame.set([64, 17], 22);
  frame.set([10, 77, 0, 2, 10, 77, 0, 1], 26);
  let sum = 0;
  for (let at = 14; at < 34; at += 2) sum += view.getUint16(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >> 16);
  view.setUint16(24, ~sum & 0xffff);
  view.setUint16(34, source);
  view.setUint16(36, target);
  view.setUint16(38, 8 + data.length);
  frame.set(data, 42);
  return frame;
}

function realTaps(): void {
  let whyNoVhost: string | undefined;
  try {
    Fd.open("/dev/vhost-net")[Symbol.dispose]();
  } catch (error) {
    whyNoVhost = (error as Error).message;
  }
  for (const vhost of [false, true]) {
    const reason = vhost ? whyNoVhost : undefined;
    const isSkipped = reason !== undefined;
    const suffix = `${vhost ? " through vhost" : ""}${isSkipped ? ` (skipped: ${reason})` : ""}`;
    Deno.test({
      name: `host and guest find and hear each other${suffix}`,
      ignore: isSkipped,
      async fn() {
        using rig = new TapRig(vhost);
        assert.equal(rig.device.isVhost, vhost);
        const socket = createSocket("udp4");
        socket.bind(0, "10.77.0.1");
        await once(socket, "listening");
        socket.send("to the guest", 4242, "10.77.0.2");
        const request = await rig.frame((frame) => frame[12] === 8 && frame[13] === 6);
        assert.deepEqual([...request.subarray(38, 42)], [10, 77, 0, 2]);
        rig.send(arpReply(request));
        const datagram = await rig.frame((frame) => frame[12] === 8 && frame[13] === 0 && frame[23] === 17);
        assert.deepEqual([...datagram.subarray(0, 6)], GUEST_MAC);
        assert.equal(new TextDecoder().decode(datagram.subarray(42)), "to the guest");
        // A header that cannot be true loses its packet only.
        const bad = Uint8Array.of(1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0);
        const port = socket.address().port;
        rig.send(udpFrame(datagram.subarray(6, 12), 4242, port, "lost"), bad);
        const heard = once(socket, "message");
        rig.send(udpFrame(datagram.subarray(6, 12), 4242, port, "to the host"));
        rig.flush();
        assert.equal(String((await heard)[0]), "to the host");
        // One datagram that takes many buffers, each way.
        const large = "large ".repeat(10_000);
        socket.send(large, 4242, "10.77.0.2");
        const found = await rig.frame((frame) => frame.length > 42 + large.length - 1);
        assert.equal(new TextDecoder().decode(found.subarray(42)), large);
        const heardLarge = once(socket, "message");
        rig.send(udpFrame(datagram.subarray(6, 12), 4242, port, large));
        rig.flush();
        assert.equal(String((await heardLarge)[0]), large);
        socket.close();
        const { rxPackets, txPackets, txDropped } = rig.device.counters;
        assert.ok(rxPackets >= 2 && txPackets >= 2);
        if (!vhost) assert.equal(txDropped, 1);
        assert.equal(rig.guest.failure, undefined);
        rig.guest.reset();
        rig.guest.start();
      },
    });

    Deno.test({
      name: `a guest goes on while its tap is down${suffix}`,
      ignore: isSkipped,
      fn() {
        using rig = new TapRig(vhost);
        rig.interfaces.setUp("tap0", false);
        rig.send(udpFrame(new Uint8Array(6), 1, 2, "lost"));
        rig.flush();
        if (!vhost) assert.equal(rig.device.counters.txDropped, 1);
        assert.equal(rig.guest.failure, undefined);
      },
    });
  }
}
