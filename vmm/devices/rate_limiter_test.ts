import assert from "node:assert/strict";
import { RateLimiter } from "./rate_limiter.ts";

Deno.test("RateLimiter lets a burst pass and then as much as refills", () => {
  let now = 0;
  const limiter = new RateLimiter({ ops: { size: 10, refillTime: 10 } }, () => now);
  for (let count = 0; count < 10; count++) assert.equal(limiter.consume(4096), 0);
  assert.equal(limiter.consume(4096), 1);
  // 10 operations in 10 ms are 1000 a second, however they are spread.
  let passed = 0;
  for (let step = 0; step < 2000; step++) {
    now += 0.5;
    while (limiter.consume(4096) === 0) passed++;
  }
  assert.equal(passed, 1000);
});

Deno.test("RateLimiter uses the one-time burst once, before the bucket", () => {
  let now = 0;
  const limiter = new RateLimiter({ bandwidth: { size: 100, oneTimeBurst: 50, refillTime: 100 } }, () => now);
  assert.equal(limiter.consume(50), 0);
  assert.equal(limiter.consume(100), 0);
  assert.equal(limiter.consume(30), 30);
  now += 1000;
  assert.equal(limiter.consume(100), 0);
  assert.equal(limiter.consume(1), 1);
});

Deno.test("RateLimiter lets an operation larger than the bucket pass when it is full, at its price", () => {
  let now = 0;
  const limiter = new RateLimiter({ bandwidth: { size: 100, refillTime: 100 } }, () => now);
  assert.equal(limiter.consume(1), 0);
  assert.equal(limiter.consume(250), 1);
  now += 1;
  assert.equal(limiter.consume(250), 0);
  assert.equal(limiter.consume(50), 200);
  now += 199;
  assert.equal(limiter.consume(50), 1);
  now += 1;
  assert.equal(limiter.consume(50), 0);
});

Deno.test("RateLimiter takes nothing from one bucket while the other makes it wait", () => {
  let now = 0;
  const limiter = new RateLimiter({
    bandwidth: { size: 100, refillTime: 100 },
    ops: { size: 2, refillTime: 1000 },
  }, () => now);
  assert.equal(limiter.consume(80), 0);
  assert.equal(limiter.consume(40), 20);
  assert.equal(limiter.consume(20), 0);
  assert.equal(limiter.consume(0), 500);
  now += 500;
  assert.equal(limiter.consume(100), 0);
});

Deno.test("RateLimiter without limits never waits, and refuses limits without sense", () => {
  const limiter = new RateLimiter({});
  for (let count = 0; count < 100; count++) assert.equal(limiter.consume(2 ** 30), 0);
  assert.throws(() => new RateLimiter({ ops: { size: 0, refillTime: 1 } }), RangeError);
  assert.throws(() => new RateLimiter({ bandwidth: { size: 1, refillTime: NaN } }), RangeError);
  assert.throws(
    () => new RateLimiter({ bandwidth: { size: 1, refillTime: 1, oneTimeBurst: -1 } }),
    /Cannot limit bandwidth as oneTimeBurst must be an integer of at least 0: current value is -1/,
  );
});
