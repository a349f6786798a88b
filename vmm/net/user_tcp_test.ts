import assert from "node:assert/strict";
import { TCP_FLAG, type TcpSegment } from "./frame.ts";
import { type Clock, TcpEndpoint } from "./user_tcp.ts";

const { FIN, SYN, RST, PSH, ACK } = TCP_FLAG;
const ISS = 0xffff_ff00;
const PEER = 5000;

/** A clock that goes on when told. */
class TestClock implements Clock {
  #now = 0;
  #timers = new Set<{ readonly at: number; readonly call: () => void }>();

  get timers(): number {
    return this.#timers.size;
  }

  now(): number {
    return this.#now;
  }

  after(delay: number, call: () => void): () => void {
    const timer = { at: this.#now + delay, call };
    this.#timers.add(timer);
    return () => this.#timers.delete(timer);
  }

  pass(duration: number): void {
    const end = this.#now + duration;
    for (;;) {
      const [next] = [...this.#timers].filter(({ at }) => at <= end).sort((one, two) => one.at - two.at);
      if (!next) break;
      this.#timers.delete(next);
      this.#now = next.at;
      next.call();
    }
    this.#now = end;
  }
}

/** An endpoint, and what it sent since the last look. */
class Bench {
  readonly clock = new TestClock();
  readonly endpoint: TcpEndpoint;
  isLinkFull = false;
  closed = 0;
  #sent: TcpSegment[] = [];

  constructor() {
    this.endpoint = new TcpEndpoint({
      localPort: 80,
      remotePort: 4000,
      initialSequence: ISS,
      clock: this.clock,
      onClose: () => this.closed++,
      send: (segment) => {
        if (this.isLinkFull) return false;
        this.#sent.push({ ...segment, payload: segment.payload.slice() });
        return true;
      },
    });
  }

  /** What was sent: flags, sequence number and acknowledgment from the first ones on, and size. */
  sent(): [number, number, number, number][] {
    const found = this.#sent.map((
      { flags, sequence, acknowledgment, payload },
    ): [number, number, number, number] => [
      flags,
      sequence - ISS | 0,
      flags & ACK ? acknowledgment - PEER | 0 : 0,
      payload.length,
    ]);
    this.#sent = [];
    return found;
  }

  get lastWindow(): number {
    return this.#sent.at(-1)!.window;
  }

  /** The peer sends; numbers are from the first ones on. */
  hear(flags: number, at: number, acknowledged: number, more: Partial<TcpSegment> | number = {}): void {
    const payload = new Uint8Array(typeof more === "number" ? more : 0).map((_, index) => at + index);
    this.endpoint.receive({
      sourcePort: 4000,
      destinationPort: 80,
      sequence: PEER + at >>> 0,
      acknowledgment: ISS + acknowledged >>> 0,
      flags,
      window: 65_535,
      payload,
      ...(typeof more === "number" ? {} : more),
    });
  }

  /** Is past the handshake. */
  static open(mss = 1000, window = 65_535): Bench {
    const bench = new Bench();
    const syn = { sourcePort: 4000, destinationPort: 80, sequence: PEER, acknowledgment: 0, flags: SYN };
    bench.endpoint.accept({ ...syn, window, mss, payload: new Uint8Array(0) });
    bench.hear(ACK, 1, 1, { window });
    bench.sent();
    return bench;
  }

  async write(size: number): Promise<void> {
    while (size > 0) {
      const room = await this.endpoint.room();
      const count = Math.min(room!.length, size);
      this.endpoint.commit(count);
      size -= count;
    }
  }
}

Deno.test("a handshake that is not answered is tried again, ever less often, and given up", () => {
  const bench = new Bench();
  bench.endpoint.connect();
  assert.deepEqual(bench.sent(), [[SYN, 0, 0, 0]]);
  bench.clock.pass(999);
  assert.deepEqual(bench.sent(), []);
  bench.clock.pass(1);
  assert.deepEqual(bench.sent(), [[SYN, 0, 0, 0]]);
  bench.clock.pass(6000);
  assert.equal(bench.sent().length, 2);
  bench.clock.pass(60_000);
  assert.equal(bench.closed, 1);
  assert.ok(bench.endpoint.isAborted);
  assert.equal(bench.clock.timers, 0);
});

Deno.test("a connection opens from either end, and answers to others are refused", () => {
  const active = new Bench();
  active.endpoint.connect();
  active.sent();
  active.hear(SYN | ACK, 0, 2);
  assert.deepEqual(active.sent(), [[RST, 2, 0, 0]]);
  active.hear(RST | ACK, 0, 2);
  assert.ok(active.endpoint.isOpening);
  active.hear(SYN | ACK, 0, 1);
  assert.deepEqual(active.sent(), [[ACK, 1, 1, 0]]);
  assert.ok(!active.endpoint.isOpening);
  const refused = new Bench();
  refused.endpoint.connect();
  refused.hear(RST | ACK, 0, 1);
  assert.equal(refused.closed, 1);

  const passive = new Bench();
  const syn = { sourcePort: 4000, destinationPort: 80, acknowledgment: 0, flags: SYN, window: 1 };
  passive.endpoint.accept({ ...syn, sequence: PEER, payload: new Uint8Array(0) });
  assert.deepEqual(passive.sent(), [[SYN | ACK, 0, 1, 0]]);
  passive.hear(SYN, 0, 0);
  passive.clock.pass(1000);
  assert.deepEqual(passive.sent(), [[SYN | ACK, 0, 1, 0], [SYN | ACK, 0, 1, 0]]);
  passive.hear(ACK, 1, 5);
  assert.deepEqual(passive.sent(), [[RST, 5, 0, 0]]);
  passive.hear(ACK, 1, 1);
  assert.ok(!passive.endpoint.isOpening);
});

Deno.test("data is sent as windows allow, and again when it is not acknowledged", async () => {
  const bench = Bench.open(1000, 2500);
  await bench.write(4000);
  // The half segment that the window leaves room for waits.
  assert.deepEqual(bench.sent(), [[ACK, 1, 1, 1000], [ACK, 1001, 1, 1000]]);
  bench.clock.pass(1000);
  assert.deepEqual(bench.sent(), [[ACK, 1, 1, 1000]]);
  bench.clock.pass(1999);
  assert.deepEqual(bench.sent(), []);
  bench.clock.pass(1);
  assert.deepEqual(bench.sent(), [[ACK, 1, 1, 1000]]);
  // It had all: nothing comes a third time.
  bench.hear(ACK, 1, 2001, { window: 65_535 });
  assert.deepEqual(bench.sent(), [[ACK, 2001, 1, 1000], [ACK | PSH, 3001, 1, 1000]]);
  bench.hear(ACK, 1, 4001);
  bench.clock.pass(100_000);
  assert.deepEqual(bench.sent(), []);
});

Deno.test("three repeated acknowledgments bring a lost segment at once, and the next one that was lost too", async () => {
  const bench = Bench.open();
  await bench.write(8000);
  assert.equal(bench.sent().length, 8);
  for (let count = 0; count < 3; count++) bench.hear(ACK, 1, 1001);
  assert.deepEqual(bench.sent(), []);
  bench.hear(ACK, 1, 1001);
  assert.deepEqual(bench.sent(), [[ACK, 1001, 1, 1000]]);
  bench.hear(ACK, 1, 1001);
  assert.deepEqual(bench.sent(), []);
  bench.hear(ACK, 1, 4001);
  assert.deepEqual(bench.sent(), [[ACK, 4001, 1, 1000]]);
  bench.hear(ACK, 1, 8001);
  assert.deepEqual(bench.sent(), []);
});

Deno.test("a closed window is asked for as long as it takes, by one byte", async () => {
  const bench = Bench.open(1000, 0);
  await bench.write(3000);
  assert.deepEqual(bench.sent(), []);
  for (let round = 0; round < 40; round++) {
    bench.clock.pass(60_000);
    const found = bench.sent();
    assert.ok(found.length >= 1 && found.every(([, at, , size]) => at === 1 && size === 1));
    bench.hear(ACK, 1, 1, { window: 0 });
  }
  bench.hear(ACK, 1, 2, { window: 5000 });
  assert.deepEqual(bench.sent()[0], [ACK, 2, 1, 1000]);
});

Deno.test("what is said while the window is closed lies within it", async () => {
  const bench = Bench.open(1000, 0);
  await bench.write(3000);
  bench.clock.pass(1000);
  assert.deepEqual(bench.sent(), [[ACK, 1, 1, 1]]);
  bench.hear(ACK, 1, 1, { window: 0, payload: new Uint8Array(100) });
  await Promise.resolve();
  assert.deepEqual(bench.sent(), [[ACK, 1, 101, 0]]);
  bench.endpoint.abort();
  assert.deepEqual(bench.sent(), [[RST | ACK, 1, 101, 0]]);
  const opening = new Bench();
  const syn = { sourcePort: 4000, destinationPort: 80, acknowledgment: 0, flags: SYN, window: 0 };
  opening.endpoint.accept({ ...syn, sequence: PEER, payload: new Uint8Array(0) });
  opening.endpoint.abort();
  assert.deepEqual(opening.sent(), [[SYN | ACK, 0, 1, 0], [RST | ACK, 1, 1, 0]]);
});

Deno.test("a peer that is silent for long is given up, with data and without", async () => {
  const idle = Bench.open();
  idle.clock.pass(299_000);
  assert.deepEqual(idle.sent(), []);
  idle.clock.pass(1000);
  assert.deepEqual(idle.sent(), [[ACK, 0, 1, 0]]);
  idle.hear(ACK, 1, 1);
  idle.clock.pass(299_000);
  assert.equal(idle.closed, 0);
  assert.deepEqual(idle.sent(), []);
  idle.clock.pass(3_600_000);
  assert.equal(idle.closed, 1);
  const busy = Bench.open();
  await busy.write(1);
  busy.clock.pass(3_600_000);
  assert.equal(busy.closed, 1);
  assert.equal(await busy.endpoint.room(), undefined);
  assert.equal(await busy.endpoint.read(), undefined);
  assert.equal(busy.sent().at(-1)![0], RST | ACK);
});

Deno.test("data comes in order, whatever order it came in", async () => {
  const bench = Bench.open();
  bench.hear(ACK, 301, 1, 100);
  bench.hear(ACK, 101, 1, 100);
  bench.hear(ACK, 151, 1, 100);
  // Each tells again what is missing.
  assert.deepEqual(bench.sent(), [[ACK, 1, 1, 0], [ACK, 1, 1, 0], [ACK, 1, 1, 0]]);
  bench.hear(ACK, 1, 1, 120);
  bench.hear(ACK | FIN, 401, 1, 0);
  bench.hear(ACK, 251, 1, 50);
  const data = await bench.endpoint.read();
  assert.deepEqual(data, Uint8Array.from({ length: 400 }, (_, index) => index + 1));
  assert.deepEqual(bench.sent().at(-1), [ACK, 1, 402, 0]);
  bench.endpoint.consume(400);
  assert.equal(await bench.endpoint.read(), undefined);
  assert.ok(!bench.endpoint.isAborted);
  // What it has is acknowledged again.
  bench.hear(ACK | FIN, 301, 1, 100);
  assert.deepEqual(bench.sent(), [[ACK, 1, 402, 0]]);
});

Deno.test("only so many pieces beyond gaps are kept track of", () => {
  const bench = Bench.open();
  for (let index = 0; index < 17; index++) bench.hear(ACK, 11 + index * 20, 1, 10);
  for (let index = 0; index < 17; index++) bench.hear(ACK, 1 + index * 20, 1, 10);
  bench.sent();
  // The last one was dropped, and is missing.
  bench.hear(ACK, 1000, 1, 10);
  assert.deepEqual(bench.sent(), [[ACK, 1, 331, 0]]);
});

Deno.test("segments that come at once are acknowledged at once", async () => {
  const bench = Bench.open();
  for (let count = 0; count < 5; count++) bench.hear(ACK, 1 + count * 100, 1, 100);
  assert.deepEqual(bench.sent(), []);
  await Promise.resolve();
  assert.deepEqual(bench.sent(), [[ACK, 1, 501, 0]]);
});

Deno.test("no more is taken than there is room for, and the peer hears when there is", async () => {
  const bench = Bench.open();
  let at = 1;
  for (; at + 1460 <= 65_537; at += 1460) bench.hear(ACK, at, 1, 1460);
  bench.hear(ACK, at, 1, 1460);
  assert.equal(bench.lastWindow, 0);
  assert.deepEqual(bench.sent().at(-1), [ACK, 1, 65_537, 0]);
  // A question by one byte is answered.
  bench.hear(ACK, 65_537, 1, 1);
  assert.deepEqual(bench.sent(), [[ACK, 1, 65_537, 0]]);
  const data = await bench.endpoint.read();
  assert.equal(data!.length, 65_536);
  bench.endpoint.consume(1000);
  assert.deepEqual(bench.sent(), []);
  bench.endpoint.consume(1000);
  assert.equal(bench.lastWindow, 2000);
  bench.sent();
  bench.hear(ACK, 65_537, 1, 1460);
  bench.endpoint.consume(63_536);
  assert.equal((await bench.endpoint.read())!.length, 1460);
});

Deno.test("a reset counts only with the exact number; others are asked about", () => {
  const bench = Bench.open();
  bench.hear(RST, 2, 0);
  bench.hear(SYN, 0, 0);
  bench.hear(ACK, 1, 100);
  assert.deepEqual(bench.sent(), [[ACK, 1, 1, 0], [ACK, 1, 1, 0], [ACK, 1, 1, 0]]);
  bench.hear(RST, 0, 0);
  bench.hear(RST, 70_000, 0);
  assert.deepEqual(bench.sent(), []);
  assert.equal(bench.closed, 0);
  bench.hear(RST, 1, 0);
  assert.equal(bench.closed, 1);
  assert.equal(bench.clock.timers, 0);
});

Deno.test("an end is sent behind all data, again if need be, and remembered for a while", async () => {
  const bench = Bench.open();
  await bench.write(10);
  bench.endpoint.end();
  assert.deepEqual(bench.sent(), [[ACK | PSH, 1, 1, 10], [ACK | FIN, 11, 1, 0]]);
  bench.hear(ACK, 1, 11);
  // The least timeout, as the round took no time.
  bench.clock.pass(200);
  assert.deepEqual(bench.sent(), [[ACK | FIN, 11, 1, 0]]);
  bench.hear(ACK, 1, 12);
  assert.ok(!bench.endpoint.isOver);
  bench.hear(ACK | FIN, 1, 12);
  assert.ok(bench.endpoint.isOver);
  assert.deepEqual(bench.sent(), [[ACK, 12, 2, 0]]);
  bench.hear(ACK | FIN, 1, 12);
  assert.deepEqual(bench.sent(), [[ACK, 12, 2, 0]]);
  bench.clock.pass(10_000);
  assert.equal(bench.closed, 1);
  assert.ok(!bench.endpoint.isAborted);
  assert.equal(bench.clock.timers, 0);
});

Deno.test("a connection is not over before all that came was taken", async () => {
  const [taken, left] = [Bench.open(), Bench.open()];
  for (const bench of [taken, left]) {
    bench.hear(ACK | FIN, 1, 1, 10);
    bench.endpoint.end();
    bench.hear(ACK, 12, 2);
    bench.clock.pass(10_000);
    assert.deepEqual([bench.closed, bench.endpoint.isOver], [0, false]);
  }
  assert.equal((await taken.endpoint.read())!.length, 10);
  taken.endpoint.consume(4);
  assert.ok(!taken.endpoint.isOver);
  taken.endpoint.consume(6);
  assert.ok(taken.endpoint.isOver);
  assert.equal(await taken.endpoint.read(), undefined);
  taken.clock.pass(10_000);
  assert.deepEqual([taken.closed, taken.endpoint.isAborted, taken.clock.timers], [1, false, 0]);
  // Who still holds bytes of it hears that they count no more.
  left.endpoint.abort();
  assert.deepEqual([left.closed, left.endpoint.isAborted], [1, true]);
  assert.equal(await left.endpoint.read(), undefined);
});

Deno.test("a link that takes nothing is tried again soon, and nothing is lost by it", async () => {
  const bench = Bench.open();
  bench.isLinkFull = true;
  await bench.write(2000);
  bench.endpoint.end();
  bench.clock.pass(100);
  bench.isLinkFull = false;
  bench.clock.pass(500);
  assert.deepEqual(bench.sent(), [[ACK, 1, 1, 1000], [ACK | PSH, 1001, 1, 1000], [ACK | FIN, 2001, 1, 0]]);
});

Deno.test("a peer that asks for tiny segments does not get them", async () => {
  const bench = Bench.open(1);
  await bench.write(640);
  assert.deepEqual(bench.sent().map(([, , , size]) => size), Array(10).fill(64));
});
