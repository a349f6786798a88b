import assert from "node:assert/strict";
import { emptyQcow2 } from "../images/qcow2.ts";
import { BlockDevice, type BlockDeviceOptions, VIRTIO_BLK_F, VIRTIO_BLK_S, VIRTIO_BLK_T } from "./block.ts";
import { type BlockFile, fillZeroes } from "./block_file.ts";
import { GuestMemoryError } from "./guest_memory.ts";
import { SharedMemory } from "./shared_memory.ts";
import { openBlockFile } from "./qcow2_file.ts";
import { RateLimiter } from "./rate_limiter.ts";
import { type DriverSegment, seededRandom, TestGuest, type TestGuestOptions } from "./test_driver.ts";
import { type Segment, VirtqueueError } from "./virtqueue.ts";

const { IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES } = VIRTIO_BLK_T;
const { OK, IOERR, UNSUPP } = VIRTIO_BLK_S;
const MIB = 2 ** 20;

/** A disk in memory that ends its requests when it is told to. */
class HeldFile implements BlockFile {
  readonly size = MIB;
  readonly isReadOnly = false;
  readonly blockSize = 512;
  readonly clusterSize = 4096;
  readonly calls: string[] = [];
  readonly held: { resolve: () => void; reject: (error: Error) => void }[] = [];
  isClosed = false;

  get isBusy(): boolean {
    return this.held.length > 0;
  }

  #hold(call: string): Promise<void> {
    this.calls.push(call);
    return new Promise((resolve, reject) => this.held.push({ resolve, reject }));
  }

  read(offset: number, segments: readonly Segment[]): Promise<void> {
    return this.#hold(`read ${offset} ${segments.map(({ length }) => length)}`);
  }

  write(offset: number, segments: readonly Segment[]): Promise<void> {
    return this.#hold(`write ${offset} ${segments.map(({ length }) => length)}`);
  }

  flush(): Promise<void> {
    return this.#hold("flush");
  }

  discard(offset: number, length: number): Promise<void> {
    return this.#hold(`discard ${offset} ${length}`);
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): Promise<void> {
    return this.#hold(`writeZeroes ${offset} ${length} ${mayUnmap}`);
  }

  resize(): void {}

  close(): Promise<void> {
    this.isClosed = true;
    return Promise.resolve();
  }

  [Symbol.dispose](): void {
    this.isClosed = true;
  }
}

interface Bench extends Disposable {
  guest: TestGuest;
  device: BlockDevice;
  errors: unknown[];
}

function bench(
  file: BlockFile,
  options: Partial<BlockDeviceOptions> = {},
  guest: TestGuestOptions = {},
): Bench {
  const errors: unknown[] = [];
  const device = new BlockDevice({ file, onError: (error) => errors.push(error), ...options });
  const made = new TestGuest(device, guest);
  return { guest: made, device, errors, [Symbol.dispose]: () => made[Symbol.dispose]() };
}

interface Disk extends Bench {
  path: string;
}

function disk(format: "raw" | "qcow2", options: Partial<BlockDeviceOptions> = {}, isReadOnly = false): Disk {
  const folder = Deno.makeTempDirSync({ prefix: "hypertopia-block-" });
  const path = `${folder}/disk`;
  Deno.writeFileSync(path, format === "raw" ? new Uint8Array(MIB) : emptyQcow2(MIB));
  const memory = new SharedMemory(16 * MIB);
  const made = bench(openBlockFile(path, { memory, format, isReadOnly }), options, { memory });
  return {
    ...made,
    path,
    [Symbol.dispose]() {
      made[Symbol.dispose]();
      memory[Symbol.dispose]();
      Deno.removeSync(folder, { recursive: true });
    },
  };
}

interface Sent {
  head: number;
  data: Uint8Array;
  status: () => number;
}

/** Cuts memory into parts. */
function cut(address: number, length: number, at: readonly number[]): DriverSegment[] {
  const ends = [...at.filter((end) => end > 0 && end < length), length];
  return ends.map((end, index) => {
    const start = ends[index - 1] ?? 0;
    return { address: address + start, length: end - start };
  });
}

/** Adds a request; what the device reads, and what it writes, may be cut anywhere. */
function send(
  { guest }: Bench,
  type: number,
  sector: number | bigint,
  data: Uint8Array | number,
  cuts: { readable?: number[]; writable?: number[]; isIndirect?: boolean } = {},
): Sent {
  const { arena, memory } = guest;
  const isInput = typeof data === "number";
  const length = isInput ? data : data.length;
  const readableLength = 16 + (isInput ? 0 : length);
  const writableLength = (isInput ? length : 0) + 1;
  const header = arena.take(readableLength);
  const writable = arena.take(writableLength);
  const view = new DataView(memory.bytes.buffer, header);
  view.setUint32(0, type, true);
  view.setUint32(4, 0, true);
  view.setBigUint64(8, BigInt(sector), true);
  if (!isInput) memory.bytes.set(data, header + 16);
  const status = writable + writableLength - 1;
  memory.bytes[status] = 0xff;
  const head = guest.drivers[0]!.add(
    cut(header, readableLength, cuts.readable ?? [16]),
    cut(writable, writableLength, cuts.writable ?? [writableLength - 1]),
    cuts.isIndirect,
  );
  return {
    head,
    data: memory.bytes.subarray(
      isInput ? writable : header + 16,
      (isInput ? writable : header + 16) + length,
    ),
    status: () => memory.bytes[status]!,
  };
}

async function status(
  b: Bench,
  type: number,
  sector: number | bigint,
  data: Uint8Array | number,
): Promise<number> {
  const sent = send(b, type, sector, data);
  b.guest.notify();
  await b.guest.takeAllUsed();
  return sent.status();
}

function clearing(...parts: [sector: number, sectors: number, flags: number][]): Uint8Array {
  const bytes = new Uint8Array(16 * parts.length);
  const view = new DataView(bytes.buffer);
  parts.forEach(([sector, sectors, flags], index) => {
    view.setBigUint64(16 * index, BigInt(sector), true);
    view.setUint32(16 * index + 8, sectors, true);
    view.setUint32(16 * index + 12, flags, true);
  });
  return bytes;
}

Deno.test("BlockDevice describes its file", () => {
  using b = bench(new HeldFile());
  const view = new DataView(b.device.config.buffer);
  assert.equal(view.getBigUint64(0, true), 2048n);
  assert.equal(view.getUint32(12, true), 254);
  assert.equal(view.getUint32(20, true), 512);
  assert.equal(view.getUint8(24), 3);
  assert.equal(view.getUint32(44, true), 8);
  const has = (name: keyof typeof VIRTIO_BLK_F, { features } = b.device): boolean =>
    (features & VIRTIO_BLK_F[name]) !== 0n;
  assert.deepEqual([has("FLUSH"), has("DISCARD"), has("WRITE_ZEROES"), has("RO")], [true, true, true, false]);
  using other = new BlockDevice({ file: new HeldFile(), isReadOnly: true, cache: "unsafe" });
  assert.deepEqual(
    [has("FLUSH", other), has("DISCARD", other), has("RO", other)],
    [false, false, true],
  );
  assert.throws(
    () => new BlockDevice({ file: new HeldFile(), serial: "x".repeat(21) }),
    /longer than 20 bytes/,
  );
});

for (const format of ["raw", "qcow2"] as const) {
  Deno.test(`BlockDevice reads and writes a ${format} file, however requests are cut`, async () => {
    using b = disk(format);
    const random = seededRandom(17);
    const model = new Uint8Array(MIB);
    const start = b.guest.arena.next;
    for (let round = 0; round < 150; round++) {
      b.guest.arena.next = start;
      // Requests of one round do not overlap.
      const area = 2048 / 8;
      const sent = Array.from({ length: 8 }, (_, index) => {
        const sectors = random(20) === 0 ? 0 : 1 + random(100);
        const sector = index * area + random(area - sectors);
        const cuts = {
          readable: Array.from({ length: random(6) }, () => random(40 + sectors * 512)).sort((a, b) => a - b),
          writable: Array.from({ length: random(6) }, () => random(sectors * 512 + 2)).sort((a, b) => a - b),
          isIndirect: random(2) === 0,
        };
        if (random(2) === 0) {
          const data = new Uint8Array(sectors * 512).map(() => random(256));
          const request = send(b, OUT, sector, data, cuts);
          model.set(data, sector * 512);
          return { ...request, written: 1 };
        }
        const expected = model.slice(sector * 512, (sector + sectors) * 512);
        return { ...send(b, IN, sector, sectors * 512, cuts), expected, written: sectors * 512 + 1 };
      });
      if (random(3) === 0) send(b, FLUSH, 0, new Uint8Array());
      b.guest.notify();
      const used = await b.guest.takeAllUsed();
      for (
        const { head, data, status, written, expected }
          of sent as (Sent & { written: number; expected?: Uint8Array })[]
      ) {
        assert.equal(status(), OK);
        assert.equal(used.find((buffer) => buffer.head === head)?.written, written);
        if (expected) assert.deepEqual(data, expected);
      }
    }
    assert.equal(b.guest.failure, undefined);
    assert.deepEqual(b.errors, []);
    const { reads, writes, flushes, errors } = b.device.statistics;
    assert.equal(reads + writes, 150 * 8);
    assert.ok(flushes > 0);
    assert.equal(errors, 0);
    await b.device.close();
    if (format === "raw") assert.deepEqual(Deno.readFileSync(b.path), model);
  });
}

Deno.test("BlockDevice refuses what is outside of the disk, or not whole sectors", async () => {
  using b = disk("raw");
  assert.equal(await status(b, IN, 2047, 512), OK);
  assert.equal(await status(b, IN, 2048, 0), OK);
  for (
    const [type, sector, data] of [
      [IN, 2048, 512],
      [IN, 2047, 1024],
      [IN, 0, 511],
      [IN, 2n ** 64n - 1n, 512],
      [OUT, 2n ** 55n, new Uint8Array(512)],
      [OUT, 2048, new Uint8Array(512)],
      [OUT, 0, new Uint8Array(100)],
    ] as const
  ) assert.equal(await status(b, type, sector, data), IOERR);
  assert.equal(b.errors.length, 7);
  assert.match(String(b.errors[1]), /Cannot use 1024 bytes at sector 2047 of a disk of 1048576 bytes/);
  assert.equal(b.device.statistics.errors, 7);
  for (const type of [2, 5, 10, 14, 0xffff_ffff]) assert.equal(await status(b, type, 0, 0), UNSUPP);
  assert.equal(b.guest.failure, undefined);
});

Deno.test("BlockDevice tells its serial number", () => {
  for (const serial of ["", "hello", "x".repeat(20)]) {
    using b = bench(new HeldFile(), { serial });
    const sent = send(b, GET_ID, 0, 20, { writable: [7, 9] });
    const short = send(b, GET_ID, 0, 3);
    const long = send(b, GET_ID, 0, 100);
    long.data.fill(0xee);
    b.guest.notify();
    const used = b.guest.drivers[0]!.takeUsed();
    const text = (bytes: Uint8Array): string => new TextDecoder().decode(bytes).replace(/\0+$/, "");
    assert.equal(text(sent.data), serial);
    assert.equal(text(short.data), serial.slice(0, 3));
    assert.equal(text(long.data.subarray(0, 20)), serial);
    assert.ok(long.data.subarray(20).every((byte) => byte === 0xee));
    assert.deepEqual(used.map(({ written }) => written), [21, 4, 21]);
    assert.equal(sent.status(), OK);
  }
});

Deno.test("BlockDevice gives up when a request has no header or no status", () => {
  const cases: [reason: RegExp, add: (b: Bench, address: number) => void][] = [
    [
      /no header/,
      ({ guest }, address) => guest.drivers[0]!.add([{ address, length: 15 }], [{ address, length: 1 }]),
    ],
    [/no header/, ({ guest }, address) => guest.drivers[0]!.add([], [{ address, length: 600 }])],
    [/no room for its status/, ({ guest }, address) => guest.drivers[0]!.add([{ address, length: 16 }])],
    [
      /no room for its status/,
      ({ guest }, address) => guest.drivers[0]!.add([{ address, length: 16 }], [{ address, length: 0 }]),
    ],
    [
      /are not all memory/,
      ({ guest }) => guest.drivers[0]!.add([{ address: 2 ** 40, length: 16 }], [{ address: 0, length: 1 }]),
    ],
  ];
  for (const [reason, add] of cases) {
    using b = bench(new HeldFile());
    add(b, b.guest.arena.take(1024));
    b.guest.notify();
    assert.match(String(b.guest.failure), reason);
    assert.equal(b.guest.drivers[0]!.takeUsed().length, 0);
    // Nothing happens until it is reset.
    b.device.notify();
    b.guest.reset();
    b.guest.start();
    send(b, GET_ID, 0, 20);
    b.guest.notify();
    assert.equal(b.guest.drivers[0]!.takeUsed().length, 1);
    assert.equal(b.guest.failure, undefined);
  }
});

Deno.test("BlockDevice does not write to what is read-only", async () => {
  for (const [options, isReadOnly] of [[{ isReadOnly: true }, false], [{}, true]] as const) {
    using b = disk("raw", options, isReadOnly);
    assert.equal(await status(b, OUT, 0, new Uint8Array(512).fill(1)), IOERR);
    assert.equal(await status(b, DISCARD, 0, clearing([0, 8, 0])), IOERR);
    assert.equal(await status(b, WRITE_ZEROES, 0, clearing([0, 8, 0])), IOERR);
    assert.equal(await status(b, IN, 0, 512), OK);
    assert.equal(await status(b, FLUSH, 0, new Uint8Array()), OK);
    assert.ok(Deno.readFileSync(b.path).every((byte) => byte === 0));
  }
});

Deno.test("BlockDevice clears parts of the disk", async () => {
  using b = disk("raw");
  assert.equal(await status(b, OUT, 0, new Uint8Array(64 * 512).fill(7)), OK);
  assert.equal(await status(b, DISCARD, 0, clearing([8, 8, 0], [24, 8, 0])), OK);
  assert.equal(await status(b, WRITE_ZEROES, 0, clearing([0, 1, 0], [63, 1, 1], [5, 0, 0])), OK);
  const zero = Array.from({ length: 64 }, (_, sector) => Deno.readFileSync(b.path)[sector * 512] === 0);
  const cleared = (sector: number): boolean =>
    sector === 0 || sector === 63 || sector >= 8 && sector < 16 || sector >= 24 && sector < 32;
  assert.deepEqual(zero, zero.map((_, sector) => cleared(sector)));
  for (
    const [type, data, result] of [
      [DISCARD, clearing([0, 1, 1]), UNSUPP],
      [DISCARD, clearing([0, 1, 2]), UNSUPP],
      [WRITE_ZEROES, clearing([0, 1, 3]), UNSUPP],
      [DISCARD, clearing([2048, 1, 0]), IOERR],
      [DISCARD, clearing([1, 1, 0], [2 ** 50, 1, 0]), IOERR],
      [WRITE_ZEROES, clearing([0, 2 ** 31, 0]), IOERR],
      [DISCARD, new Uint8Array(15), IOERR],
      [DISCARD, new Uint8Array(), IOERR],
      [DISCARD, clearing(...Array.from({ length: 33 }, () => [0, 1, 0] as [number, number, number])), IOERR],
    ] as const
  ) assert.equal(await status(b, type, 0, data), result);
  // Nothing of a request is done if a part of it is wrong.
  assert.equal(Deno.readFileSync(b.path)[512], 7);
  assert.equal(b.device.statistics.clears, 2);
});

Deno.test("BlockDevice has many requests under way, which end in any order, with one interrupt for a batch", async () => {
  const file = new HeldFile();
  using b = bench(file);
  const sent = Array.from({ length: 6 }, (_, index) => send(b, IN, index, 512));
  b.guest.notify();
  assert.equal(file.held.length, 6);
  assert.equal(b.device.isBusy, true);
  assert.equal(b.guest.interrupts[0], 0);
  const [one, two, three, four, five, six] = file.held;
  five!.resolve();
  two!.reject(new Error("broken"));
  six!.resolve();
  await b.guest.event();
  assert.equal(b.guest.interrupts[0], 1);
  const heads = b.guest.drivers[0]!.takeUsed().map(({ head }) =>
    sent.findIndex((request) => request.head === head)
  );
  assert.deepEqual(heads.sort(), [1, 4, 5]);
  assert.deepEqual(sent.map(({ status }) => status()), [255, IOERR, 255, 255, OK, OK]);
  assert.deepEqual(b.errors.map(String), ["Error: broken"]);
  for (const held of [one, three, four]) held!.resolve();
  await b.guest.takeAllUsed();
  assert.deepEqual(sent.map(({ status }) => status()), [OK, IOERR, OK, OK, OK, OK]);
  assert.equal(b.guest.interrupts[0], 2);
});

Deno.test("BlockDevice has 64 requests under way at most, and goes on when some have ended", async () => {
  const file = new HeldFile();
  using b = bench(file);
  const add = (): Sent[] =>
    Array.from({ length: 50 }, (_, index) => send(b, IN, index, 512, { isIndirect: true }));
  const sent = [...add(), ...add()];
  b.guest.notify();
  assert.equal(file.held.length, 64);
  // The device does not want to know of more.
  sent.push(...add());
  assert.equal(b.guest.notify(), false);
  let ended = 0;
  while (ended < 150) {
    for (; ended < file.held.length; ended++) file.held[ended]!.resolve();
    await b.guest.event();
    b.guest.drivers[0]!.setInterrupt(true);
    b.guest.drivers[0]!.takeUsed();
    b.guest.drivers[0]!.setInterrupt(true);
  }
  await b.guest.takeAllUsed();
  assert.ok(sent.every(({ status }) => status() === OK));
  send(b, FLUSH, 0, new Uint8Array());
  assert.equal(b.guest.notify(), true);
});

Deno.test("BlockDevice touches nothing of the guest's queue after a reset", async () => {
  const file = new HeldFile();
  using b = bench(file);
  const old = send(b, IN, 0, 512);
  b.guest.notify();
  b.guest.reset();
  b.guest.start();
  assert.equal(b.device.isBusy, true);
  const fresh = send(b, IN, 1, 512);
  b.guest.notify();
  const before = b.guest.memory.bytes.slice();
  file.held[0]!.resolve();
  await new Promise((resolve) => setTimeout(resolve, 0));
  assert.deepEqual(b.guest.drivers[0]!.takeUsed(), []);
  assert.deepEqual(b.guest.memory.bytes, before);
  assert.equal(old.status(), 255);
  file.held[1]!.resolve();
  assert.equal((await b.guest.takeAllUsed())[0]!.head, fresh.head);
  assert.equal(fresh.status(), OK);
});

Deno.test("BlockDevice writes through its cache for a driver that cannot flush, unless it need not", async () => {
  const file = new HeldFile();
  {
    using b = bench(file, {}, { features: 0n });
    const sent = send(b, OUT, 3, new Uint8Array(512));
    b.guest.notify();
    file.held[0]!.resolve();
    while (file.held.length < 2) await Promise.resolve();
    assert.deepEqual(file.calls, ["write 1536 512", "flush"]);
    assert.equal(sent.status(), 255);
    file.held[1]!.resolve();
    await b.guest.takeAllUsed();
    assert.equal(sent.status(), OK);
  }
  const other = new HeldFile();
  using b = bench(other, { cache: "unsafe" });
  send(b, OUT, 3, new Uint8Array(512));
  const flush = send(b, FLUSH, 0, new Uint8Array());
  b.guest.notify();
  assert.equal(flush.status(), OK);
  other.held[0]!.resolve();
  await b.guest.takeAllUsed();
  assert.deepEqual(other.calls, ["write 1536 512"]);
});

Deno.test("BlockDevice waits for its rate limiter and goes on by itself", async () => {
  let now = 0;
  // The clock goes on each time that it is looked at.
  const rateLimiter = new RateLimiter({ ops: { size: 2, refillTime: 2 } }, () => now += 0.25);
  using b = disk("raw", { rateLimiter });
  const sent = Array.from({ length: 20 }, (_, index) => send(b, IN, index, 512));
  b.guest.notify();
  await b.guest.takeAllUsed();
  assert.ok(sent.every(({ status }) => status() === OK));
  assert.ok(b.device.statistics.throttled > 0);
  assert.equal(b.device.statistics.reads, 20);
});

Deno.test("BlockDevice that waits for a rate limiter can be given another, and reset", async () => {
  const rateLimiter = new RateLimiter({ bandwidth: { size: 512, refillTime: 1000 } }, () => 0);
  using b = disk("raw", { rateLimiter });
  const first = send(b, IN, 0, 512);
  const second = send(b, IN, 1, 512);
  b.guest.notify();
  assert.deepEqual([first.status(), second.status()], [OK, 255]);
  // Neither more buffers nor the end of others lets it look again.
  send(b, IN, 2, 512);
  assert.equal(b.guest.notify(), false);
  b.device.updateRateLimiter();
  assert.equal(second.status(), OK);
  await b.guest.takeAllUsed();
  b.device.updateRateLimiter(new RateLimiter({ ops: { size: 1, refillTime: 1000 } }, () => 0));
  send(b, IN, 0, 512);
  send(b, IN, 1, 512);
  b.guest.notify();
  assert.equal(b.guest.drivers[0]!.takeUsed().length, 1);
  // The timer ends with the reset, or the test would complain of it.
  b.guest.reset();
});

Deno.test("BlockDevice grows, and takes another file", async () => {
  using b = disk("raw");
  await b.device.grow(2 * MIB);
  assert.equal(b.guest.configChanges, 1);
  assert.equal(new DataView(b.device.config.buffer).getBigUint64(0, true), 4096n);
  assert.equal(await status(b, IN, 4095, 512), OK);
  const file = new HeldFile();
  b.device.replaceFile(file);
  assert.equal(b.guest.configChanges, 2);
  assert.equal(b.device.size, MIB);
  send(b, IN, 1, 512);
  b.guest.notify();
  assert.deepEqual(file.calls, ["read 512 512"]);
  assert.equal(file.isClosed, false);
  await b.device.close();
  assert.equal(file.isClosed, true);
});

Deno.test("BlockDevice survives requests of garbage", async () => {
  const random = seededRandom(31);
  const memory = new SharedMemory(MIB);
  class Zeroes extends HeldFile {
    override read(_offset: number, segments: readonly Segment[]): Promise<void> {
      fillZeroes({ address: 0, bytes: memory.bytes }, segments);
      return Promise.resolve();
    }
    override write(): Promise<void> {
      return Promise.resolve();
    }
    override flush(): Promise<void> {
      return Promise.resolve();
    }
    override discard(): Promise<void> {
      return Promise.resolve();
    }
    override writeZeroes(): Promise<void> {
      return Promise.resolve();
    }
  }
  let [done, failed] = [0, 0];
  for (let round = 0; round < 300; round++) {
    using b = bench(new Zeroes(), {}, { memory });
    b.guest.arena.next = 65536;
    for (let count = random(10); count > 0; count--) {
      const address = random(8) * 1024 + 65536;
      memory.bytes.subarray(address, address + 64).forEach((_, index, bytes) =>
        bytes[index] = random(3) === 0 ? random(256) : 0
      );
      memory.view.setUint32(address, random(16), true);
      const part = (): DriverSegment => ({
        address: address + random(32),
        length: random(3) === 0 ? 16 : random(2000),
      });
      b.guest.drivers[0]!.add(
        [{ address, length: random(4) === 0 ? random(40) : 16 }, ...Array.from({ length: random(3) }, part)],
        Array.from({ length: random(4) }, part),
        random(2) === 0,
      );
    }
    b.guest.notify();
    const used = await b.guest.takeAllUsed();
    done += used.length;
    if (b.guest.failure !== undefined) {
      const { failure } = b.guest;
      assert.ok(failure instanceof VirtqueueError || failure instanceof GuestMemoryError, String(failure));
      failed++;
    }
  }
  assert.ok(done > 300 && failed > 50, `${done} requests were done, ${failed} guests failed`);
  memory[Symbol.dispose]();
});
