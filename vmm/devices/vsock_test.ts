import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { Fd, libc } from "../../ffi/mod.ts";
import { EventLoop } from "../event_loop.ts";
import { GuestMemoryError } from "./guest_memory.ts";
import { SharedMemory } from "./shared_memory.ts";
import { DESC_F, type DriverSegment, seededRandom, TestGuest } from "./test_driver.ts";
import type { VirtioDevice } from "./virtio_device.ts";
import { VirtqueueError } from "./virtqueue.ts";
import { VhostVsockDevice, VsockDevice } from "./vsock.ts";

const [RX, TX, EVENTS] = [0, 1, 2];
const OP = {
  request: 1,
  response: 2,
  reset: 3,
  shutdown: 4,
  data: 5,
  creditUpdate: 6,
  creditRequest: 7,
} as const;
const OP_NAMES = [
  "invalid",
  "request",
  "response",
  "reset",
  "shutdown",
  "data",
  "creditUpdate",
  "creditRequest",
];
const GUEST_CID = 42;
const HEADER = 44;
/** What the device has room for, for each stream. */
const WINDOW = 128 << 10;
const encoder = new TextEncoder();
const decoder = new TextDecoder();

interface Packet {
  op: number;
  guestPort: number;
  hostPort: number;
  flags?: number;
  data?: Uint8Array;
  length?: number;
  type?: number;
  sourceCid?: number;
  destinationCid?: number;
  bufferSize?: number;
  forwarded?: number;
}

/** The driver's part: packets in and out, without any state of streams. */
class Driver {
  readonly guest: TestGuest;
  readonly #buffers = new Map<number, DriverSegment[]>();
  readonly #scratch: DriverSegment;

  constructor(device: VirtioDevice, memory: SharedMemory) {
    this.guest = new TestGuest(device, { memory });
    this.#scratch = { address: this.guest.arena.take(1 << 20), length: 1 << 20 };
  }

  /** Adds buffers for packets: one part, or one for the header and another one, as drivers differ in this. */
  fill(count: number, length = 4096, isSplit = false): void {
    for (let index = 0; index < count; index++) {
      const address = this.guest.arena.take(HEADER + length);
      const parts = isSplit
        ? [{ address, length: HEADER }, { address: address + HEADER, length }]
        : [{ address, length: HEADER + length }];
      this.#buffers.set(this.guest.drivers[RX]!.add([], parts), parts);
    }
    this.guest.notify(RX);
  }

  /** Takes packets, and gives their buffers back to the device unless told. */
  receive(isRefilling = true): Required<Packet>[] {
    const driver = this.guest.drivers[RX]!;
    const taken = driver.takeUsed().map(({ head, written }) => {
      const parts = this.#buffers.get(head)!;
      this.#buffers.delete(head);
      const bytes = Buffer.concat(parts.map((part) => this.guest.arena.bytes(part))).subarray(0, written);
      return { parts, bytes };
    });
    if (isRefilling) { for (const { parts } of taken) this.#buffers.set(driver.add([], parts), parts); }
    this.guest.notify(RX);
    return taken.map(({ bytes }) => ({
      sourceCid: Number(bytes.readBigUInt64LE(0)),
      destinationCid: Number(bytes.readBigUInt64LE(8)),
      hostPort: bytes.readUInt32LE(16),
      guestPort: bytes.readUInt32LE(20),
      length: bytes.readUInt32LE(24),
      type: bytes.readUInt16LE(28),
      op: bytes.readUInt16LE(30),
      flags: bytes.readUInt32LE(32),
      bufferSize: bytes.readUInt32LE(36),
      forwarded: bytes.readUInt32LE(40),
      data: new Uint8Array(bytes.subarray(HEADER)),
    }));
  }

  /** Sends a packet, and tells whether the device took it at once. */
  send(packet: Packet): boolean {
    const data = packet.data ?? new Uint8Array(0);
    const bytes = Buffer.alloc(HEADER + data.length);
    bytes.writeBigUInt64LE(BigInt(packet.sourceCid ?? GUEST_CID), 0);
    bytes.writeBigUInt64LE(BigInt(packet.destinationCid ?? 2), 8);
    bytes.writeUInt32LE(packet.guestPort, 16);
    bytes.writeUInt32LE(packet.hostPort, 20);
    bytes.writeUInt32LE(packet.length ?? data.length, 24);
    bytes.writeUInt16LE(packet.type ?? 1, 28);
    bytes.writeUInt16LE(packet.op, 30);
    bytes.writeUInt32LE(packet.flags ?? 0, 32);
    bytes.writeUInt32LE(packet.bufferSize ?? 1 << 20, 36);
    bytes.writeUInt32LE(packet.forwarded ?? 0, 40);
    bytes.set(data, HEADER);
    const driver = this.guest.drivers[TX]!;
    const { address } = this.#scratch;
    this.guest.arena.bytes({ address, length: bytes.length }).set(bytes);
    // Parts do not end where the header does.
    driver.add([{ address, length: 10 }, { address: address + 10, length: bytes.length - 10 }]);
    this.guest.notify(TX);
    return driver.takeUsed().length > 0;
  }
}

/** A guest, and the host's end of its streams. */
class Bench implements Disposable {
  readonly directory = Deno.makeTempDirSync();
  readonly path = `${this.directory}/v.sock`;
  readonly loop = new EventLoop();
  readonly device = new VsockDevice({ guestCid: GUEST_CID, path: this.path, watcher: this.loop });
  readonly #memory = new SharedMemory(16 << 20);
  readonly driver = new Driver(this.device, this.#memory);
  readonly guest = this.driver.guest;

  constructor(buffers = 64) {
    this.driver.fill(buffers / 2, 4096, true);
    this.driver.fill(buffers / 2);
  }

  settle(): void {
    while (this.loop.poll(0) > 0);
  }

  /** What came for the guest: names of operations, and what they carry. */
  receive(): string[] {
    this.settle();
    return this.driver.receive().map((packet) => {
      assert.deepEqual([packet.sourceCid, packet.destinationCid, packet.type], [2, GUEST_CID, 1]);
      assert.equal(packet.length, packet.data.length);
      const name = OP_NAMES[packet.op]!;
      if (packet.op === OP.data) return `${name} ${decoder.decode(packet.data)}`;
      return packet.op === OP.shutdown ? `${name} ${packet.flags}` : name;
    });
  }

  async connect(text: string): Promise<Deno.UnixConn> {
    const client = await Deno.connect({ transport: "unix", path: this.path });
    await client.write(encoder.encode(text));
    this.settle();
    return client;
  }

  /** A stream that a client of the host began. */
  async fromHost(guestPort = 52): Promise<Stream> {
    const client = await this.connect(`CONNECT ${guestPort}\n`);
    const packet = this.driver.receive().at(-1)!;
    assert.equal(packet.op, OP.request);
    assert.equal(packet.guestPort, guestPort);
    const stream = new Stream(this, client, guestPort, packet.hostPort);
    stream.send(OP.response);
    assert.equal(await readText(client, `OK ${packet.hostPort}\n`.length), `OK ${packet.hostPort}\n`);
    return stream;
  }

  /** A stream that the guest began. */
  async fromGuest(guestPort = 9000, hostPort = 1234): Promise<Stream> {
    using listener = Deno.listen({ transport: "unix", path: `${this.path}_${hostPort}` });
    this.driver.send({ op: OP.request, guestPort, hostPort });
    assert.deepEqual(this.receive(), ["response"]);
    return new Stream(this, await listener.accept(), guestPort, hostPort);
  }

  [Symbol.dispose](): void {
    this.guest[Symbol.dispose]();
    this.loop[Symbol.dispose]();
    this.#memory[Symbol.dispose]();
    assert.deepEqual([...Deno.readDirSync(this.directory)], []);
    Deno.removeSync(this.directory);
  }
}

/** A stream, with its host's end. */
class Stream implements Disposable {
  readonly bench: Bench;
  readonly host: Deno.UnixConn;
  readonly ports: { guestPort: number; hostPort: number };
  /** What the guest's packets say of its room. */
  credit: { bufferSize: number; forwarded: number } = { bufferSize: 1 << 20, forwarded: 0 };
  #isClosed = false;

  constructor(bench: Bench, host: Deno.UnixConn, guestPort: number, hostPort: number) {
    this.bench = bench;
    this.host = host;
    this.ports = { guestPort, hostPort };
  }

  send(op: number, more: Partial<Packet> = {}): boolean {
    return this.bench.driver.send({ ...this.ports, ...this.credit, op, ...more });
  }

  write(data: Uint8Array | string): void {
    this.send(OP.data, { data: typeof data === "string" ? encoder.encode(data) : data });
  }

  close(): void {
    if (!this.#isClosed) this.host.close();
    this.#isClosed = true;
    this.bench.settle();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

async function readText(conn: Deno.UnixConn, length: number): Promise<string> {
  const buffer = new Uint8Array(length);
  let at = 0;
  while (at < length) {
    const count = await conn.read(buffer.subarray(at));
    if (count === null) break;
    at += count;
  }
  return decoder.decode(buffer.subarray(0, at));
}

for (const begin of ["fromHost", "fromGuest"] as const) {
  Deno.test(`VsockDevice carries a stream ${begin === "fromHost" ? "from a host" : "from a guest"}`, async () => {
    using bench = new Bench();
    using stream = await bench[begin]();
    assert.equal(bench.device.connectionCount, 1);
    stream.write("hello host");
    assert.equal(await readText(stream.host, 10), "hello host");
    await stream.host.write(encoder.encode("hello guest"));
    assert.deepEqual(bench.receive(), ["data hello guest"]);
    // The host ends its half, then the guest ends the stream.
    await stream.host.closeWrite();
    assert.deepEqual(bench.receive(), ["shutdown 2"]);
    stream.write("more");
    stream.send(OP.shutdown, { flags: 3 });
    assert.deepEqual(bench.receive(), ["reset"]);
    assert.equal(await readText(stream.host, 10), "more");
    assert.equal(bench.device.connectionCount, 0);
    assert.equal(bench.guest.failure, undefined);
  });
}

Deno.test("VsockDevice leaves to the guest what a client sends behind its greeting", async () => {
  using bench = new Bench();
  using client = await bench.connect("CONN");
  assert.deepEqual(bench.receive(), []);
  await client.write(encoder.encode("ECT 7\nfirst\nsecond"));
  bench.settle();
  const [{ hostPort }] = bench.driver.receive() as [Required<Packet>];
  assert.deepEqual(bench.receive(), []);
  bench.driver.send({ op: OP.response, guestPort: 7, hostPort });
  assert.deepEqual(bench.receive(), ["data first\nsecond"]);
});

Deno.test("VsockDevice turns away clients with bad manners", async () => {
  using bench = new Bench();
  for (
    const text of [
      "HELLO 5\n",
      "CONNECT\n",
      "CONNECT 4294967296\n",
      "CONNECT -1\n",
      "CONNECT 5 6\n",
      "\n",
      "C".repeat(32),
    ]
  ) {
    using client = await bench.connect(text);
    // What it did not read may be a reason to reset the connection.
    assert.equal(await client.read(new Uint8Array(9)).catch(() => null), null, text);
  }
  const impatient = await bench.connect("CONNE");
  impatient.close();
  bench.settle();
  const gone = await Deno.connect({ transport: "unix", path: bench.path });
  await gone.write(encoder.encode("CONNECT 5\n"));
  gone.close();
  assert.deepEqual(bench.receive(), []);
  assert.equal(bench.device.connectionCount, 0);
});

Deno.test("VsockDevice resets where nobody listens", async () => {
  using bench = new Bench();
  bench.driver.send({ op: OP.request, guestPort: 1, hostPort: 99 });
  assert.deepEqual(bench.receive(), ["reset"]);
  // The guest has nobody either.
  using client = await bench.connect("CONNECT 5\n");
  const [{ hostPort, guestPort }] = bench.driver.receive() as [Required<Packet>];
  bench.driver.send({ op: OP.reset, guestPort, hostPort });
  assert.equal(await client.read(new Uint8Array(1)), null);
  assert.deepEqual(bench.receive(), []);
  assert.equal(bench.device.connectionCount, 0);
});

Deno.test("VsockDevice forgets a request whose client has left", async () => {
  using bench = new Bench();
  const client = await bench.connect("CONNECT 5\n");
  const [{ hostPort, guestPort }] = bench.driver.receive() as [Required<Packet>];
  client.close();
  assert.deepEqual(bench.receive(), ["reset"]);
  bench.driver.send({ op: OP.response, guestPort, hostPort });
  assert.deepEqual(bench.receive(), ["reset"]);
  assert.equal(bench.device.connectionCount, 0);
});

Deno.test("VsockDevice holds nothing for clients that leave a guest that hangs", async () => {
  using bench = new Bench(0);
  for (let count = 0; count < 20; count++) {
    (await bench.connect("CONNECT 5\n")).close();
    bench.settle();
  }
  assert.equal(bench.device.connectionCount, 0);
  bench.driver.fill(8);
  assert.deepEqual(bench.receive(), []);
});

Deno.test("VsockDevice takes back what waits for a stream that the guest has reset", async () => {
  using bench = new Bench(0);
  bench.driver.fill(1);
  using stream = await bench.fromHost();
  // The first answer takes the only buffer.
  stream.send(OP.creditRequest);
  stream.send(OP.creditRequest);
  stream.send(OP.reset);
  bench.driver.fill(8);
  assert.deepEqual(bench.receive(), ["creditUpdate"]);
});

Deno.test("VsockDevice waits for clients' guest", async () => {
  using bench = new Bench();
  bench.guest.reset();
  using _client = await bench.connect("CONNECT 5\n");
  bench.guest.start();
  bench.driver.fill(4);
  assert.deepEqual(bench.receive(), ["request"]);
});

Deno.test("VsockDevice gives the guest what it has room for", async () => {
  using bench = new Bench();
  using stream = await bench.fromHost();
  stream.credit = { bufferSize: 100, forwarded: 0xffff_fff0 };
  // A count that wraps: 16 bytes are on their way, so to speak.
  stream.send(OP.creditUpdate);
  await stream.host.write(encoder.encode("a".repeat(84) + "b".repeat(50) + "c".repeat(30)));
  assert.deepEqual(bench.receive(), [`data ${"a".repeat(84)}`, "creditRequest"]);
  await stream.host.write(encoder.encode("d"));
  assert.deepEqual(bench.receive(), []);
  stream.credit.forwarded = 34;
  stream.send(OP.creditUpdate);
  assert.deepEqual(bench.receive(), [`data ${"b".repeat(50)}`, "creditRequest"]);
  // Less than no room: a lie.
  stream.credit.forwarded = 1000;
  stream.send(OP.creditUpdate);
  assert.deepEqual(bench.receive(), []);
  stream.credit = { bufferSize: 0xffff_ffff, forwarded: 134 };
  stream.send(OP.creditUpdate);
  assert.deepEqual(bench.receive(), [`data ${"c".repeat(30)}d`]);
});

Deno.test("VsockDevice takes what it said it has room for, and tells when there is more", async () => {
  using bench = new Bench();
  using stream = await bench.fromGuest();
  const block = new Uint8Array(32_768);
  let [sent, told] = [0, 0];
  // Until the host's socket is full, there is always new credit.
  while (sent - told < WINDOW) {
    stream.write(block.fill(sent / block.length));
    sent += block.length;
    bench.settle();
    for (const packet of bench.driver.receive()) {
      assert.equal(packet.op, OP.creditUpdate);
      assert.equal(packet.bufferSize, WINDOW);
      told = packet.forwarded;
    }
  }
  stream.send(OP.creditRequest);
  const [answer] = bench.driver.receive() as [Required<Packet>];
  assert.equal(answer.op, OP.creditUpdate);
  assert.ok(answer.forwarded < sent);
  const buffer = new Uint8Array(65_536);
  for (let total = 0; total < sent;) {
    const count = (await stream.host.read(buffer))!;
    for (let index = 0; index < count; index += 4096) {
      assert.equal(buffer[index], Math.floor((total + index) / block.length) & 0xff);
    }
    total += count;
    bench.settle();
    for (const packet of bench.driver.receive()) told = packet.forwarded;
  }
  assert.ok(sent - told < WINDOW / 2);
  // Now beyond the credit.
  bench.driver.receive();
  while (stream.send(OP.data, { data: block })) {
    const [packet] = bench.driver.receive().filter(({ op }) => op === OP.reset);
    if (packet) break;
  }
  assert.equal(bench.device.connectionCount, 0);
  assert.equal(bench.guest.failure, undefined);
});

Deno.test("VsockDevice gives the host all that the guest sent before it closed", async () => {
  using bench = new Bench();
  using stream = await bench.fromHost();
  const block = new Uint8Array(65_536).fill(7);
  let sent = 0;
  let free = WINDOW;
  while (free >= block.length) {
    stream.write(block);
    sent += block.length;
    stream.send(OP.creditRequest);
    free = WINDOW - (sent - bench.driver.receive().at(-1)!.forwarded);
  }
  stream.send(OP.shutdown, { flags: 3 });
  assert.deepEqual(bench.receive(), ["reset"]);
  assert.equal(bench.device.connectionCount, 0);
  const buffer = new Uint8Array(65_536);
  let total = 0;
  for (let count = await stream.host.read(buffer); count !== null; count = await stream.host.read(buffer)) {
    total += count;
    bench.settle();
  }
  assert.equal(total, sent);
});

Deno.test("VsockDevice closes halves", async () => {
  using bench = new Bench();
  {
    // The guest sends no more, and is sent something yet.
    using stream = await bench.fromHost();
    stream.write("last");
    stream.send(OP.shutdown, { flags: 2 });
    assert.equal(await readText(stream.host, 9), "last");
    await stream.host.write(encoder.encode("answer"));
    assert.deepEqual(bench.receive(), ["data answer"]);
    stream.close();
    assert.deepEqual(bench.receive(), ["shutdown 3"]);
    stream.send(OP.reset);
  }
  {
    // The guest receives no more, and sends something yet.
    using stream = await bench.fromHost();
    stream.send(OP.shutdown, { flags: 1 });
    await assert.rejects(stream.host.write(encoder.encode("x")));
    stream.write("yet");
    assert.equal(await readText(stream.host, 3), "yet");
    stream.close();
    assert.deepEqual(bench.receive(), ["shutdown 3"]);
    // It has not heard of that yet.
    stream.write("lost");
    stream.send(OP.shutdown, { flags: 2 });
    assert.deepEqual(bench.receive(), ["reset"]);
  }
  {
    // The host closes, and the guest gets all before it knows.
    using stream = await bench.fromGuest();
    await stream.host.write(encoder.encode("x".repeat(5000)));
    stream.close();
    const received = bench.receive();
    assert.equal(received.pop(), "shutdown 3");
    assert.equal(received.join("").replaceAll("data ", ""), "x".repeat(5000));
    stream.send(OP.reset);
  }
  {
    // A half each.
    using stream = await bench.fromGuest();
    await stream.host.closeWrite();
    assert.deepEqual(bench.receive(), ["shutdown 2"]);
    stream.send(OP.shutdown, { flags: 2 });
    assert.equal(await stream.host.read(new Uint8Array(1)), null);
    assert.deepEqual(bench.receive(), ["shutdown 3"]);
    stream.send(OP.reset);
  }
  assert.equal(bench.device.connectionCount, 0);
  assert.equal(bench.guest.failure, undefined);
});

Deno.test("VsockDevice tells the guest when what it sends is lost", async () => {
  using bench = new Bench();
  using stream = await bench.fromHost();
  stream.credit.bufferSize = 3;
  stream.send(OP.creditUpdate);
  await stream.host.write(encoder.encode("reply"));
  stream.close();
  // Two bytes wait for room; the end comes behind them.
  assert.deepEqual(bench.receive(), ["data rep", "creditRequest"]);
  stream.write("lost");
  assert.deepEqual(bench.receive(), ["shutdown 1"]);
  stream.credit.forwarded = 3;
  stream.send(OP.creditUpdate);
  assert.deepEqual(bench.receive(), ["data ly", "shutdown 3"]);
});

Deno.test("VsockDevice resets what is out of order", async () => {
  using bench = new Bench();
  for (const op of [OP.response, OP.shutdown, OP.data, OP.creditUpdate, OP.creditRequest, 0, 99]) {
    bench.driver.send({ op, guestPort: 1, hostPort: 2 });
    assert.deepEqual(bench.receive(), ["reset"], `operation ${op} of no stream`);
  }
  bench.driver.send({ op: OP.reset, guestPort: 1, hostPort: 2 });
  assert.deepEqual(bench.receive(), []);
  for (
    const [op, more] of [
      [OP.response, {}],
      [OP.request, {}],
      [0, {}],
      [99, {}],
      [OP.data, { data: new Uint8Array(WINDOW + 1) }],
    ] as const
  ) {
    using stream = await bench.fromHost();
    stream.send(op, more);
    assert.deepEqual(bench.receive(), ["reset"], `operation ${op} of a stream`);
    assert.equal(await stream.host.read(new Uint8Array(1)), null);
  }
  {
    using stream = await bench.fromHost();
    stream.send(OP.shutdown, { flags: 2 });
    stream.write("after the end");
    assert.deepEqual(bench.receive(), ["reset"]);
  }
  for (const op of [OP.data, OP.shutdown, OP.creditRequest, OP.request]) {
    using _client = await bench.connect("CONNECT 5\n");
    const [{ hostPort, guestPort }] = bench.driver.receive() as [Required<Packet>];
    bench.driver.send({ op, guestPort, hostPort });
    assert.deepEqual(bench.receive(), ["reset"], `operation ${op} of a stream that was asked for`);
  }
  // Addresses of others.
  bench.driver.send({ op: OP.request, guestPort: 1, hostPort: 2, sourceCid: GUEST_CID + 1 });
  bench.driver.send({ op: OP.request, guestPort: 1, hostPort: 2, destinationCid: 3 });
  assert.deepEqual(bench.receive(), []);
  // Another type.
  bench.driver.send({ op: OP.request, guestPort: 1, hostPort: 2, type: 2 });
  const [packet] = bench.driver.receive() as [Required<Packet>];
  assert.deepEqual([packet.op, packet.type], [OP.reset, 2]);
  assert.equal(bench.device.connectionCount, 0);
  assert.equal(bench.guest.failure, undefined);
});

Deno.test("VsockDevice has a limit of streams", async () => {
  using bench = new Bench(160);
  using listener = Deno.listen({ transport: "unix", path: `${bench.path}_1` });
  const hosts: Deno.Conn[] = [];
  for (let guestPort = 0; guestPort < 1023; guestPort++) {
    bench.driver.send({ op: OP.request, guestPort, hostPort: 1 });
    hosts.push(await listener.accept());
    assert.equal(bench.driver.receive()[0]!.op, OP.response);
  }
  bench.driver.send({ op: OP.request, guestPort: 2000, hostPort: 1 });
  assert.deepEqual(bench.receive(), ["reset"]);
  using client = await Deno.connect({ transport: "unix", path: bench.path });
  bench.settle();
  assert.equal(await client.read(new Uint8Array(1)), null);
  bench.driver.send({ op: OP.reset, guestPort: 0, hostPort: 1 });
  using _client = await bench.connect("CONNECT 5\n");
  assert.deepEqual(bench.receive(), ["request"]);
  for (const host of hosts) host.close();
});

Deno.test("VsockDevice takes no more packets than it can answer", async () => {
  using bench = new Bench(0);
  let taken = 0;
  while (bench.driver.send({ op: OP.data, guestPort: 1, hostPort: taken })) taken++;
  assert.ok(taken > 100 && taken < 10_000, `${taken} were taken`);
  bench.driver.fill(64);
  for (let hostPort = 0; hostPort <= taken;) {
    const packets = bench.driver.receive();
    for (const packet of packets) assert.deepEqual([packet.op, packet.hostPort], [OP.reset, hostPort++]);
    // The device comes back for the rest by a timer.
    if (packets.length === 0) await new Promise((resolve) => setTimeout(resolve, 0));
  }
  assert.equal(bench.guest.drivers[TX]!.takeUsed().length, 1);
});

Deno.test("VsockDevice ends all streams with the guest's reset, and goes on with the next guest", async () => {
  using bench = new Bench();
  using stream = await bench.fromHost();
  using greeting = await bench.connect("CONN");
  bench.guest.reset();
  const before = bench.guest.memory.bytes.slice();
  assert.equal(bench.device.connectionCount, 0);
  assert.equal(await stream.host.read(new Uint8Array(1)), null);
  assert.equal(await greeting.read(new Uint8Array(1)).catch(() => null), null);
  using _waiting = await bench.connect("CONNECT 3\n");
  bench.device.resetTransport();
  assert.ok(Buffer.from(before.buffer).equals(bench.guest.memory.bytes));
  bench.guest.start();
  bench.driver.fill(8);
  assert.deepEqual(bench.receive(), ["request"]);
});

Deno.test("VsockDevice tells of a transport's reset when there is a buffer for that", () => {
  using bench = new Bench();
  const part = { address: bench.guest.arena.take(4), length: 4 };
  bench.guest.arena.bytes(part).fill(0xff);
  bench.device.resetTransport();
  const driver = bench.guest.drivers[EVENTS]!;
  driver.add([], [part]);
  driver.add([], [part]);
  bench.guest.notify(EVENTS);
  assert.deepEqual(driver.takeUsed().map(({ written }) => written), [4]);
  assert.deepEqual([...bench.guest.arena.bytes(part)], [0, 0, 0, 0]);
  bench.device.resetTransport();
  assert.equal(driver.takeUsed().length, 1);
});

Deno.test("VsockDevice checks what it is made of", () => {
  using loop = new EventLoop();
  for (const guestCid of [2, 0xffff_ffff, 3.5, NaN]) {
    assert.throws(() => new VsockDevice({ guestCid, path: "/tmp/x", watcher: loop }), RangeError);
  }
  const path = `/tmp/${"x".repeat(95)}`;
  assert.throws(() => new VsockDevice({ guestCid: 3, path, watcher: loop }), /more than 107 bytes/);
});

for (
  const [what, error, act] of [
    ["a packet without a whole header", VirtqueueError, (bench) => {
      bench.guest.drivers[TX]!.add([{ address: 4096, length: HEADER - 1 }]);
      bench.guest.notify(TX);
    }],
    ["a packet that is shorter than it says", VirtqueueError, (bench) => {
      bench.driver.send({ op: OP.data, guestPort: 1, hostPort: 1, length: 1 });
    }],
    ["a packet to write", VirtqueueError, (bench) => {
      bench.guest.drivers[TX]!.add([], [{ address: 4096, length: 100 }]);
      bench.guest.notify(TX);
    }],
    ["a buffer that is too small", VirtqueueError, (bench) => {
      bench.guest.drivers[RX]!.add([], [{ address: 4096, length: HEADER - 1 }]);
      bench.driver.send({ op: OP.data, guestPort: 1, hostPort: 1 });
      bench.guest.notify(RX);
    }],
    ["an event's buffer that is too small", VirtqueueError, (bench) => {
      bench.guest.drivers[EVENTS]!.add([], [{ address: 4096, length: 3 }]);
      bench.guest.notify(EVENTS);
      bench.device.resetTransport();
    }],
    ["a packet that is no memory", GuestMemoryError, (bench) => {
      bench.guest.drivers[TX]!.setDescriptor(0, 0xffff_f000, 100, 0);
      bench.guest.drivers[TX]!.offer(0);
      bench.guest.notify(TX);
    }],
  ] satisfies [string, new (...args: never[]) => Error, (bench: Bench) => void][]
) {
  Deno.test(`VsockDevice fails on ${what}, until it is reset`, () => {
    using bench = new Bench(0);
    act(bench);
    assert.ok(bench.guest.failure instanceof error, String(bench.guest.failure));
    assert.equal(bench.driver.send({ op: OP.data, guestPort: 1, hostPort: 1 }), false);
    bench.guest.reset();
    bench.guest.start();
    bench.driver.fill(4);
    bench.driver.send({ op: OP.data, guestPort: 1, hostPort: 1 });
    assert.deepEqual(bench.receive(), ["reset"]);
  });
}

Deno.test("VsockDevice fails on a buffer without room for data", async () => {
  using bench = new Bench(0);
  bench.driver.fill(3, 0);
  using stream = await bench.fromHost();
  await stream.host.write(encoder.encode("x"));
  bench.settle();
  assert.ok(bench.guest.failure instanceof VirtqueueError);
});

// Whatever comes in what order, the bytes of each stream arrive once and in order, and so do their ends.
Deno.test("VsockDevice loses no byte of many streams between a guest and hosts of random habits", async () => {
  for (let seed = 1; seed <= 8; seed++) {
    using bench = new Bench();
    const random = seededRandom(seed);
    const byteAt = (index: number, position: number) => (index * 77 + position * 31 + (position >> 8)) & 0xff;
    const pattern = (index: number, position: number, length: number) =>
      Uint8Array.from({ length }, (_, at) => byteAt(index, position + at));
    const check = (bytes: Uint8Array, index: number, position: number) => {
      const wrong = bytes.findIndex((byte, at) => byte !== byteAt(index, position + at));
      assert.equal(wrong, -1, `seed ${seed}, stream ${index}: byte ${position + wrong}`);
    };
    const streams: {
      stream: Stream;
      total: number;
      /** To the host: sent, known to be taken, read. */
      out: number;
      told: number;
      read: number;
      /** To the guest: written, received. */
      written: number;
      received: number;
      isAtEnd: boolean;
      isOver: boolean;
    }[] = [];
    for (let index = 0; index < 6; index++) {
      const stream = index % 2 === 0
        ? await bench.fromHost(index)
        : await bench.fromGuest(index, 100 + index);
      stream.credit = { bufferSize: 10_000 + random(50_000), forwarded: 0 };
      stream.send(OP.creditUpdate);
      const total = 100_000 + random(200_000);
      streams.push({
        stream,
        total,
        out: 0,
        told: 0,
        read: 0,
        written: 0,
        received: 0,
        isAtEnd: false,
        isOver: false,
      });
    }
    const buffer = new Uint8Array(100_000);
    const take = () => {
      for (const packet of bench.driver.receive()) {
        const index = streams.findIndex(({ stream: { ports } }) =>
          ports.guestPort === packet.guestPort && ports.hostPort === packet.hostPort
        );
        const each = streams[index]!;
        if (packet.op === OP.reset) {
          assert.ok(each.isAtEnd && each.out === each.total, `seed ${seed}, stream ${index} was reset`);
          each.isOver = true;
          continue;
        }
        each.told = packet.forwarded;
        if (packet.op === OP.data) {
          assert.ok(
            packet.length <= each.stream.credit.forwarded + each.stream.credit.bufferSize - each.received,
          );
          check(packet.data, index, each.received);
          each.received += packet.length;
        } else if (packet.op === OP.shutdown) {
          assert.equal(packet.flags, 2);
          assert.equal(each.received, each.total);
          each.isAtEnd = true;
        } else if (packet.op === OP.creditRequest) each.stream.send(OP.creditUpdate);
        else assert.equal(packet.op, OP.creditUpdate);
      }
    };
    while (streams.some(({ isOver, read, total }) => !isOver || read < total)) {
      const index = random(streams.length);
      const each = streams[index]!;
      const { stream, total } = each;
      switch (random(5)) {
        case 0: {
          const length = Math.min(random(40_000), total - each.out, WINDOW - (each.out - each.told));
          if (each.out < total) stream.write(pattern(index, each.out, length));
          each.out += length;
          break;
        }
        case 1:
          // What the device knows is taken is with the host, or on its way.
          if (each.read < each.told) {
            const count = (await stream.host.read(buffer.subarray(0, 1 + random(buffer.length))))!;
            check(buffer.subarray(0, count), index, each.read);
            each.read += count;
          } else if (!each.isOver) stream.send(OP.creditRequest);
          break;
        case 2: {
          // No more than its socket takes at once.
          const length = Math.min(
            random(20_000),
            total - each.written,
            60_000 - (each.written - each.received),
          );
          if (length > 0) await stream.host.write(pattern(index, each.written, length));
          each.written += length;
          break;
        }
        case 3:
          if (each.isOver) break;
          stream.credit.forwarded = each.received;
          stream.send(OP.creditUpdate);
          break;
        case 4:
          if (each.written === total && !each.isAtEnd) await stream.host.closeWrite();
          if (each.isAtEnd && each.out === total && !each.isOver) stream.send(OP.shutdown, { flags: 3 });
          if (each.isOver && each.read < total) {
            const count = (await stream.host.read(buffer))!;
            check(buffer.subarray(0, count), index, each.read);
            each.read += count;
          }
          break;
      }
      if (random(3) > 0) bench.settle();
      if (random(3) > 0) take();
    }
    for (const { stream } of streams) {
      assert.equal(await stream.host.read(buffer), null);
      stream.close();
    }
    assert.equal(bench.device.connectionCount, 0);
    assert.equal(bench.guest.failure, undefined);
  }
});

// The guest sends what it likes: the device answers by the rules, holds no more than its limits, and never fails.
Deno.test("VsockDevice survives random packets", async () => {
  for (let seed = 1; seed <= 20; seed++) {
    using bench = new Bench(160);
    const random = seededRandom(seed);
    using listener = Deno.listen({ transport: "unix", path: `${bench.path}_1` });
    const hosts: Deno.Conn[] = [];
    const ports = [1, 1, 2];
    for (let count = 0; count < 400; count++) {
      if (random(10) === 0) hosts.push(await bench.connect(`CONNECT ${random(3)}\n`));
      for (const { hostPort } of bench.driver.receive()) if (hostPort >= 1 << 30) ports.push(hostPort);
      const data = new Uint8Array(random(2) * random(1000));
      const op = random(9);
      const before = bench.device.connectionCount;
      bench.driver.send({
        op,
        guestPort: random(3),
        hostPort: ports[random(ports.length)]!,
        flags: random(5),
        data,
        length: data.length - (random(10) === 0 ? random(data.length + 1) : 0),
        type: random(20) === 0 ? random(4) : 1,
        bufferSize: random(4) === 0 ? random(0xffff_ffff) : 1000,
        forwarded: random(4) === 0 ? random(0xffff_ffff) : 0,
      });
      if (op === OP.request && bench.device.connectionCount > before) hosts.push(await listener.accept());
      const host = hosts[random(hosts.length)];
      try {
        if (host && random(4) === 0) await host.write(new Uint8Array(1 + random(500)));
      } catch {
        // The device has closed it.
      }
      if (host && random(10) === 0) hosts.splice(hosts.indexOf(host), 1)[0]!.close();
      bench.settle();
    }
    assert.equal(bench.guest.failure, undefined);
    // Every stream can be ended.
    bench.driver.receive();
    for (const hostPort of new Set(ports)) {
      for (let guestPort = 0; guestPort < 3; guestPort++) {
        bench.driver.send({ op: OP.reset, guestPort, hostPort });
      }
    }
    assert.equal(bench.device.connectionCount, 0);
    for (const host of hosts) host.close();
    bench.settle();
  }
});

Deno.test("VsockDevice survives random descriptors", () => {
  let failures = 0;
  for (let seed = 1; seed <= 60; seed++) {
    using bench = new Bench(20);
    const random = seededRandom(seed);
    const fence = bench.guest.arena.take(1 << 16);
    const rarely = () => random(60) === 0;
    for (let count = 0; count < 60 && bench.guest.failure === undefined; count++) {
      const queue = random(3);
      const address = rarely() ? random(0xffff_ffff) : fence + random(4096);
      const length = rarely() ? random(0xffff_ffff) : HEADER + random(64);
      const flags = rarely() ? random(8) : queue === TX ? 0 : DESC_F.WRITE;
      const slot = queue === EVENTS ? count % 16 : count;
      bench.guest.drivers[queue]!.setDescriptor(slot, address, length, flags, random(300));
      bench.guest.drivers[queue]!.offer(rarely() ? random(0xffff) : slot);
      bench.guest.notify(queue);
      if (random(10) === 0) bench.device.resetTransport();
    }
    const { failure } = bench.guest;
    if (failure !== undefined) {
      failures++;
      assert.ok(failure instanceof VirtqueueError || failure instanceof GuestMemoryError, String(failure));
    }
    bench.guest.reset();
  }
  assert.ok(failures > 0 && failures < 60, `${failures} of 60 failed`);
});

function hasVhost(): boolean {
  try {
    using _fd = Fd.open("/dev/vhost-vsock");
    return true;
  } catch {
    return false;
  }
}

const isThere = hasVhost();

Deno.test({
  name: `VhostVsockDevice lets the kernel serve the guest${isThere ? "" : " (skipped: no /dev/vhost-vsock)"}`,
  ignore: !isThere,
  async fn() {
    using loop = new EventLoop();
    using memory = new SharedMemory(4 << 20);
    const device = new VhostVsockDevice({ guestCid: GUEST_CID, watcher: loop });
    const driver = new Driver(device, memory);
    using guest = driver.guest;
    assert.throws(() => new VhostVsockDevice({ guestCid: GUEST_CID, watcher: loop }), /EADDRINUSE/);
    driver.fill(8);
    const receive = async () => {
      for (let packets = driver.receive();; packets = driver.receive()) {
        if (packets[0]) return packets[0];
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    };
    // Nobody listens.
    driver.send({ op: OP.request, guestPort: 7, hostPort: 12345 });
    const answer = await receive();
    assert.deepEqual([answer.op, answer.hostPort, answer.guestPort], [OP.reset, 12345, 7]);
    // A client of the host: AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK; struct sockaddr_vm.
    using client = new Fd(libc().socket(40, 1 | 0o4000, 0), "vsock");
    const address = new Uint8Array(16);
    const view = new DataView(address.buffer);
    view.setUint16(0, 40, true);
    view.setUint32(4, 52, true);
    view.setUint32(8, GUEST_CID, true);
    libc().connect(client.number, address, address.length);
    const request = await receive();
    assert.deepEqual([request.op, request.guestPort], [OP.request, 52]);
    device.resetTransport();
    const part = { address: guest.arena.take(4), length: 4 };
    guest.drivers[EVENTS]!.add([], [part]);
    guest.notify(EVENTS);
    assert.equal(guest.drivers[EVENTS]!.takeUsed().length, 1);
    guest.reset();
    guest.start();
    driver.fill(8);
    driver.send({ op: OP.request, guestPort: 8, hostPort: 12345 });
    assert.equal((await receive()).guestPort, 8);
    // vhost has no way to go on from this.
    guest.drivers[TX]!.setDescriptor(5, 0xffff_f000, 100, 0);
    guest.drivers[TX]!.offer(5);
    guest.notify(TX);
    while (guest.failure === undefined) {
      loop.poll(0);
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    assert.ok(guest.failure instanceof VirtqueueError);
  },
});
