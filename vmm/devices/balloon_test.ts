import assert from "node:assert/strict";
import { BALLOON_STATISTICS, BalloonDevice } from "./balloon.ts";
import { GuestMemoryError } from "./guest_memory.ts";
import { SharedMemory } from "./shared_memory.ts";
import { seededRandom, TestGuest } from "./test_driver.ts";
import { VirtqueueError } from "./virtqueue.ts";

const [INFLATE, DEFLATE, STATS, HINTS, REPORTING] = [0, 1, 2, 3, 4];
const PAGE = 4096;
const MEMORY = 8 << 20;

/** How many bytes of the host the guest's memory takes. */
function hostBytes(memory: SharedMemory): number {
  return Deno.statSync(`/proc/self/fd/${memory.fd.number}`).blocks! * 512;
}

function addPages(guest: TestGuest, queue: number, pages: readonly number[]): void {
  const part = { address: guest.arena.take(4 * pages.length), length: 4 * pages.length };
  const offset = guest.memory.offset(part.address, part.length);
  pages.forEach((page, index) => guest.memory.view.setUint32(offset + 4 * index, page, true));
  // In two parts that divide a number.
  guest.drivers[queue]!.add([
    { address: part.address, length: Math.min(part.length, 6) },
    ...(part.length > 6 ? [{ address: part.address + 6, length: part.length - 6 }] : []),
  ]);
  guest.notify(queue);
}

function addStatistics(
  guest: TestGuest,
  statistics: readonly (readonly [tag: number, value: bigint])[],
): void {
  const part = { address: guest.arena.take(10 * statistics.length), length: 10 * statistics.length };
  const offset = guest.memory.offset(part.address, part.length);
  statistics.forEach(([tag, value], index) => {
    guest.memory.view.setUint16(offset + 10 * index, tag, true);
    guest.memory.view.setBigUint64(offset + 10 * index + 2, value, true);
  });
  guest.drivers[STATS]!.add([part]);
  guest.notify(STATS);
}

Deno.test("BalloonDevice gives exactly the inflated pages back to the host", async () => {
  for (let seed = 1; seed <= 10; seed++) {
    using memory = new SharedMemory(MEMORY);
    using guest = new TestGuest(new BalloonDevice(), { memory });
    const random = seededRandom(seed);
    // Rings and buffers are in the first MiB.
    const first = (1 << 20) / PAGE;
    const last = MEMORY / PAGE;
    memory.bytes.fill(0xaa, 1 << 20);
    const before = hostBytes(memory);
    const gone = new Set<number>();
    for (let request = 0; request < 5; request++) {
      const start = first + random(last - first - 300);
      const pages = Array.from({ length: 1 + random(256) }, () => start + random(300));
      for (const page of pages) gone.add(page);
      addPages(guest, INFLATE, pages);
      await guest.takeAllUsed(INFLATE);
    }
    // Deflating changes nothing by itself.
    addPages(guest, DEFLATE, [...gone].slice(0, 5));
    await guest.takeAllUsed(DEFLATE);
    assert.equal(guest.failure, undefined);
    const after = hostBytes(memory);
    // The requests themselves may have taken pages of the first MiB.
    assert.ok(before - after > gone.size * PAGE - (64 << 10), `${before - after} for ${gone.size} pages`);
    for (let page = first; page < last; page++) {
      assert.equal(memory.bytes[page * PAGE + random(PAGE)], gone.has(page) ? 0 : 0xaa);
    }
  }
});

Deno.test("BalloonDevice takes reported ranges, but only whole pages", async () => {
  using memory = new SharedMemory(MEMORY);
  using guest = new TestGuest(new BalloonDevice(), { memory });
  memory.bytes.fill(0xaa, 1 << 20);
  for (const queue of [HINTS, REPORTING]) {
    const at = (2 + queue) << 20;
    guest.drivers[queue]!.add([], [
      { address: at, length: 64 << 10 },
      { address: at + (128 << 10) + 1, length: 2 * PAGE },
      { address: at + (256 << 10) + 1, length: PAGE },
    ]);
    guest.notify(queue);
    await guest.takeAllUsed(queue);
    const isGone = (address: number) => memory.bytes[address] === 0;
    assert.deepEqual([at, at + (64 << 10) - 1].map(isGone), [true, true]);
    assert.deepEqual([at - 1, at + (64 << 10)].map(isGone), [false, false]);
    const middle = at + (128 << 10);
    assert.deepEqual(
      [middle, middle + PAGE - 1, middle + PAGE, middle + 2 * PAGE - 1, middle + 2 * PAGE].map(isGone),
      [false, false, true, true, false],
    );
    assert.deepEqual([at + (256 << 10), at + (256 << 10) + PAGE].map(isGone), [false, false]);
  }
  assert.equal(guest.failure, undefined);
});

Deno.test("BalloonDevice tells the guest its target, and others what the guest did", () => {
  const sizes: number[] = [];
  const device = new BalloonDevice({ target: 3 * PAGE + 1, onActual: (bytes) => sizes.push(bytes) });
  using guest = new TestGuest(device);
  const view = new DataView(device.config.buffer);
  assert.equal(view.getUint32(0, true), 3);
  device.target = 1 << 20;
  assert.equal(view.getUint32(0, true), 256);
  assert.equal(device.target, 1 << 20);
  assert.equal(guest.configChanges, 1);
  assert.throws(() => device.target = -1, RangeError);
  assert.throws(() => device.target = NaN, RangeError);
  device.writeConfig(4, Uint8Array.of(5, 1, 0, 0));
  device.writeConfig(4, Uint8Array.of(5, 1, 0, 0));
  assert.equal(device.actual, 261 * PAGE);
  // The target is not the guest's to set.
  device.writeConfig(0, Uint8Array.of(9, 9, 9, 9, 6));
  assert.equal(device.target, 1 << 20);
  assert.equal(device.actual, 262 * PAGE);
  // A guest that goes on elsewhere tells its size when it changes only.
  const next = new BalloonDevice({ target: 0 });
  next.restore(JSON.parse(JSON.stringify(device.save())));
  assert.equal(next.actual, 262 * PAGE);
  guest.reset();
  assert.equal(device.actual, 0);
  assert.equal(device.target, 1 << 20);
  assert.deepEqual(sizes, [261 * PAGE, 262 * PAGE, 0]);
});

Deno.test("BalloonDevice asks for statistics", async () => {
  const device = new BalloonDevice();
  await assert.rejects(device.statistics(), /has no driver/);
  using guest = new TestGuest(device);
  const driver = guest.drivers[STATS]!;
  // The first buffer stays until something is asked.
  addStatistics(guest, [[4, 1000n]]);
  assert.deepEqual(device.latestStatistics, { freeMemory: 1000 });
  assert.equal(driver.outstanding, 1);
  const [first, second] = [device.statistics(), device.statistics()];
  assert.equal((await guest.takeAllUsed(STATS)).length, 1);
  addStatistics(guest, [...BALLOON_STATISTICS.map((_, tag) => [tag, BigInt(tag) << 20n] as const), [
    999,
    1n,
  ]]);
  const expected = Object.fromEntries(BALLOON_STATISTICS.map((name, tag) => [name, tag << 20]));
  assert.deepEqual(await first, expected);
  assert.deepEqual(await second, expected);
  assert.deepEqual(device.latestStatistics, expected);
  const third = device.statistics();
  guest.reset();
  await assert.rejects(third, /it was reset/);
  assert.equal(device.latestStatistics, undefined);
});

Deno.test("BalloonDevice asks for statistics by itself, as often as it is told", async () => {
  const device = new BalloonDevice({ statisticsInterval: 0.001 });
  using guest = new TestGuest(device);
  for (let count = 0; count < 3; count++) {
    addStatistics(guest, [[0, BigInt(count)]]);
    assert.deepEqual(device.latestStatistics, { swapIn: count });
    await guest.takeAllUsed(STATS);
  }
});

Deno.test("BalloonDevice has no statistics where the driver wants none", async () => {
  const device = new BalloonDevice({ deflateOnOom: false });
  assert.equal(device.features, 0b100010n);
  assert.equal(new BalloonDevice({ freePageReporting: false }).features, 0b110n);
  using memory = new SharedMemory(MEMORY);
  using guest = new TestGuest(device, { features: 1n << 5n, memory });
  await assert.rejects(device.statistics(), /has no driver/);
  // Linux counts the queues that it uses: without the one of statistics, the third is that of reports.
  memory.bytes.fill(0xaa, 1 << 20);
  guest.drivers[STATS]!.add([], [{ address: 4 << 20, length: PAGE }]);
  guest.notify(STATS);
  await guest.takeAllUsed(STATS);
  assert.equal(memory.bytes[4 << 20], 0);
});

for (
  const [what, error, act] of [
    ["a page that is no memory", GuestMemoryError, (guest) => addPages(guest, INFLATE, [1, 0xffff_ffff])],
    ["half a page number", VirtqueueError, (guest) => {
      guest.drivers[INFLATE]!.add([{ address: 4096, length: 5 }]);
      guest.notify(INFLATE);
    }],
    ["too many pages", VirtqueueError, (guest) => {
      guest.drivers[DEFLATE]!.add([{ address: 4096, length: 1 << 20 }]);
      guest.notify(DEFLATE);
    }],
    ["pages to write", VirtqueueError, (guest) => {
      guest.drivers[INFLATE]!.add([], [{ address: 4096, length: 4 }]);
      guest.notify(INFLATE);
    }],
    ["half a statistic", VirtqueueError, (guest) => {
      guest.drivers[STATS]!.add([{ address: 4096, length: 19 }]);
      guest.notify(STATS);
    }],
    ["a report to read", VirtqueueError, (guest) => {
      guest.drivers[REPORTING]!.add([{ address: 4096, length: 4096 }]);
      guest.notify(REPORTING);
    }],
  ] satisfies [string, new (...args: never[]) => Error, (guest: TestGuest) => void][]
) {
  Deno.test(`BalloonDevice fails on ${what}, until it is reset`, async () => {
    using guest = new TestGuest(new BalloonDevice());
    act(guest);
    assert.ok(guest.failure instanceof error, String(guest.failure));
    // It is deaf now.
    addPages(guest, DEFLATE, [1]);
    assert.deepEqual(guest.drivers[DEFLATE]!.takeUsed(), []);
    guest.reset();
    guest.start();
    addPages(guest, DEFLATE, [1]);
    assert.equal((await guest.takeAllUsed(DEFLATE)).length, 1);
  });
}

Deno.test("BalloonDevice leaves the queue to others now and then", async () => {
  using guest = new TestGuest(new BalloonDevice());
  const pages = Array.from({ length: 1000 }, (_, index) => 600 + index % 400);
  const part = { address: guest.arena.take(4000), length: 4000 };
  const offset = guest.memory.offset(part.address, part.length);
  pages.forEach((page, index) => guest.memory.view.setUint32(offset + 4 * index, page, true));
  for (let count = 0; count < 20; count++) guest.drivers[INFLATE]!.add([part]);
  guest.notify(INFLATE);
  const atOnce = guest.drivers[INFLATE]!.takeUsed().length;
  assert.ok(atOnce > 0 && atOnce < 20, `${atOnce} at once`);
  await guest.takeAllUsed(INFLATE);
  assert.equal(guest.failure, undefined);
});
