import assert from "node:assert/strict";
import { GuestMemoryError } from "./guest_memory.ts";
import { EntropyDevice } from "./rng.ts";
import { DESC_F, seededRandom, TestGuest } from "./test_driver.ts";
import { VirtqueueError } from "./virtqueue.ts";

Deno.test("EntropyDevice fills what it is given with random bytes, and nothing else", async () => {
  for (let seed = 1; seed <= 20; seed++) {
    using guest = new TestGuest(new EntropyDevice());
    const random = seededRandom(seed);
    const [driver] = guest.drivers;
    for (let round = 0; round < 10; round++) {
      const parts = Array.from({ length: 1 + random(4) }, () => {
        const length = random(100);
        return { address: guest.arena.take(length + 1), length };
      });
      const head = driver!.add([], parts, random(2) === 0);
      guest.notify();
      const total = parts.reduce((sum, { length }) => sum + length, 0);
      assert.deepEqual(await guest.takeAllUsed(), [{ head, written: total }]);
      const bytes = parts.flatMap((part) => [...guest.arena.bytes(part)]);
      // Sixty-four zero bytes in a row are not random.
      if (total >= 64) assert.ok(bytes.some((byte) => byte !== 0));
      for (const { address, length } of parts) {
        assert.equal(guest.arena.bytes({ address: address + length, length: 1 })[0], 0);
      }
    }
    assert.equal(guest.failure, undefined);
  }
});

Deno.test("EntropyDevice gives at most 64 KiB at once", async () => {
  using guest = new TestGuest(new EntropyDevice());
  const part = { address: guest.arena.take(100_000), length: 100_000 };
  guest.drivers[0]!.add([], [part]);
  guest.notify();
  assert.equal((await guest.takeAllUsed())[0]!.written, 65_536);
  assert.ok(guest.arena.bytes(part).subarray(65_536).every((byte) => byte === 0));
});

Deno.test("EntropyDevice goes on where it left the queue to others", async () => {
  using guest = new TestGuest(new EntropyDevice());
  const part = { address: guest.arena.take(16), length: 16 };
  for (let count = 0; count < 64; count++) guest.drivers[0]!.add([], [part]);
  guest.notify();
  assert.ok(guest.drivers[0]!.takeUsed().length < 64);
  await guest.takeAllUsed();
  assert.equal(guest.drivers[0]!.freeCount, 64);
});

Deno.test("EntropyDevice waits as its limiter tells, and no longer than until the reset", async () => {
  const asked: number[] = [];
  const waits = [0, 1, 0, 60_000];
  const rateLimiter = {
    consume(bytes: number): number {
      asked.push(bytes);
      return waits.shift()!;
    },
  };
  using guest = new TestGuest(new EntropyDevice({ rateLimiter }));
  const part = { address: guest.arena.take(16), length: 16 };
  guest.drivers[0]!.add([], [part]);
  guest.drivers[0]!.add([], [part]);
  guest.notify();
  await guest.takeAllUsed();
  guest.drivers[0]!.add([], [part]);
  guest.notify();
  // It does not ask again before its time.
  guest.drivers[0]!.add([], [part]);
  guest.drivers[0]!.publish();
  guest.device.notify(guest.queues[0]!);
  assert.deepEqual(asked, [16, 16, 16, 16]);
  assert.equal(guest.drivers[0]!.outstanding, 2);
  // The timer of a minute would outlast the test.
  guest.reset();
});

Deno.test("EntropyDevice fails on what is no request, and works again after a reset", async () => {
  using guest = new TestGuest(new EntropyDevice());
  const part = { address: guest.arena.take(16), length: 16 };
  guest.drivers[0]!.add([part], [part]);
  guest.notify();
  assert.ok(guest.failure instanceof VirtqueueError);
  guest.reset();
  guest.start();
  guest.drivers[0]!.setDescriptor(0, 0x1234_5678_0000, 16, DESC_F.WRITE);
  guest.drivers[0]!.offer(0);
  guest.notify();
  assert.ok(guest.failure instanceof GuestMemoryError);
  guest.reset();
  guest.start();
  guest.drivers[0]!.add([], [part]);
  guest.notify();
  assert.equal((await guest.takeAllUsed()).length, 1);
  assert.equal(guest.failure, undefined);
});
