import assert from "node:assert/strict";
import { CONSOLE_INPUT_SIZE, CONSOLE_OUTPUT_SIZE, CONSOLE_RING_SIZE, ConsoleRing } from "./console_ring.ts";

/** Offsets of the page (Xen 4.17 `xen/include/public/io/console.h`). */
const [OUT, IN_CONS, IN_PROD, OUT_CONS, OUT_PROD] = [1024, 3072, 3076, 3080, 3084];

/** The guest's side, as its driver does it: a byte at a time. */
class Frontend {
  readonly view: DataView;

  constructor(readonly page: ArrayBufferLike, start = 0) {
    this.view = new DataView(page);
    for (const index of [IN_CONS, IN_PROD, OUT_CONS, OUT_PROD]) this.view.setUint32(index, start, true);
  }

  index(offset: number): number {
    return this.view.getUint32(offset, true);
  }

  /** Writes what there is room for. */
  write(bytes: Uint8Array): number {
    let prod = this.index(OUT_PROD);
    let sent = 0;
    while (sent < bytes.length && ((prod - this.index(OUT_CONS)) >>> 0) < 2048) {
      this.view.setUint8(OUT + (prod & 2047), bytes[sent++]!);
      prod = (prod + 1) >>> 0;
    }
    this.view.setUint32(OUT_PROD, prod, true);
    return sent;
  }

  read(most: number): number[] {
    const bytes: number[] = [];
    let cons = this.index(IN_CONS);
    const prod = this.index(IN_PROD);
    assert.ok(((prod - cons) >>> 0) <= 1024, "the backend's index is wrong");
    while (cons !== prod && bytes.length < most) {
      bytes.push(this.view.getUint8(cons & 1023));
      cons = (cons + 1) >>> 0;
    }
    this.view.setUint32(IN_CONS, cons, true);
    return bytes;
  }
}

/** Numbers that look random and are the same for the same seed (xorshift32). */
function seeded(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return Math.floor((state >>> 0) / 0x1_0000_0000 * below);
  };
}

function unexpected(message: string): void {
  assert.fail(message);
}

Deno.test("ConsoleRing has the layout of Xen's header", () => {
  const page = new ArrayBuffer(4096);
  const guest = new Frontend(page);
  const ring = new ConsoleRing(page, unexpected);
  assert.equal(ring.write(new Uint8Array([1, 2, 3])), 3);
  assert.deepEqual([...new Uint8Array(page, 0, 4)], [1, 2, 3, 0]);
  assert.equal(guest.index(IN_PROD), 3);
  new Uint8Array(page).set([7, 8], OUT);
  guest.view.setUint32(OUT_PROD, 2, true);
  const target = new Uint8Array(10);
  assert.equal(ring.peek(target), 2);
  assert.deepEqual([...target.subarray(0, 3)], [7, 8, 0]);
  assert.equal(guest.index(OUT_CONS), 0, "a look takes nothing");
  ring.consume(1);
  assert.equal(guest.index(OUT_CONS), 1);
  assert.deepEqual([ring.peek(target), target[0]], [1, 8]);
  assert.throws(() => new ConsoleRing(new ArrayBuffer(CONSOLE_RING_SIZE - 4), unexpected), RangeError);
});

Deno.test("ConsoleRing takes no more than there is room for", () => {
  const page = new SharedArrayBuffer(4096);
  const guest = new Frontend(page);
  const ring = new ConsoleRing(page, unexpected);
  assert.equal(ring.write(new Uint8Array(5000).fill(1)), CONSOLE_INPUT_SIZE);
  assert.deepEqual([ring.write(new Uint8Array(1)), ring.room, ring.unread], [0, 0, CONSOLE_INPUT_SIZE]);
  assert.equal(guest.read(10).length, 10);
  assert.deepEqual([ring.write(new Uint8Array(20)), ring.room], [10, 0]);
  assert.equal(guest.write(new Uint8Array(5000)), CONSOLE_OUTPUT_SIZE);
  assert.equal(ring.peek(new Uint8Array(5000)), CONSOLE_OUTPUT_SIZE);
  assert.equal(ring.peek(new Uint8Array(5)), 5);
});

for (const start of [0, 0xffff_ff00, 0x7fff_fff0]) {
  Deno.test(`ConsoleRing carries every byte in order both ways, from index ${start} on`, () => {
    const random = seeded(start | 1);
    const guest = new Frontend(new SharedArrayBuffer(4096), start);
    let ring = new ConsoleRing(guest.page, unexpected);
    let [written, taken, sent, read] = [0, 0, 0, 0];
    const chunk = (from: number, length: number): Uint8Array =>
      Uint8Array.from({ length }, (_, at) => (from + at) * 7 % 251);
    const target = new Uint8Array(3000);
    for (let turn = 0; turn < 20_000; turn++) {
      switch (random(5)) {
        case 0:
          written += guest.write(chunk(written, random(3000)));
          break;
        case 1: {
          const length = ring.peek(target.subarray(0, random(3000)));
          const used = random(length + 1);
          assert.deepEqual(target.subarray(0, used), chunk(taken, used));
          ring.consume(used);
          taken += used;
          break;
        }
        case 2:
          sent += ring.write(chunk(sent, random(1500)));
          break;
        case 3: {
          const bytes = guest.read(random(1500));
          assert.deepEqual(Uint8Array.from(bytes), chunk(read, bytes.length));
          read += bytes.length;
          break;
        }
        case 4:
          // Another backend goes on where this one ended.
          ring = new ConsoleRing(guest.page, unexpected);
      }
      assert.ok(written - taken <= 2048 && sent - read <= 1024);
      assert.equal(ring.unread, sent - read);
    }
    assert.ok(taken > 1_000_000 && read > 1_000_000, `${taken} and ${read} bytes went`);
  });
}

Deno.test("ConsoleRing can stand anywhere in memory", () => {
  const memory = new SharedArrayBuffer(8192);
  const ring = new ConsoleRing(memory, unexpected, 4096);
  ring.write(new Uint8Array([9]));
  assert.deepEqual([...new Uint8Array(memory, 4096, 2)], [9, 0]);
  assert.equal(new DataView(memory).getUint32(4096 + IN_PROD, true), 1);
});

Deno.test("ConsoleRing bears any index, tells of it once and goes on from there", () => {
  const random = seeded(5);
  for (let round = 0; round < 200; round++) {
    const page = new ArrayBuffer(4096);
    const guest = new Frontend(page, random(2 ** 32));
    const reports: string[] = [];
    const ring = new ConsoleRing(page, (message) => reports.push(message));
    const target = new Uint8Array(4096);
    for (let turn = 0; turn < 50; turn++) {
      // Its own indices and the backend's.
      guest.view.setUint32([IN_CONS, IN_PROD, OUT_CONS, OUT_PROD][random(4)]!, random(2 ** 32), true);
      const length = ring.peek(target);
      assert.ok(length <= CONSOLE_OUTPUT_SIZE);
      ring.consume(random(length + 1));
      assert.ok(ring.write(target.subarray(0, random(2000))) <= CONSOLE_INPUT_SIZE);
      assert.ok(ring.unread <= CONSOLE_INPUT_SIZE && ring.room >= 0);
    }
    assert.equal(reports.length, 1);
    assert.match(reports[0]!, /^Cannot follow the indices of the guest's console ring as it has /);
    // The guest sees to its indices: from now on all is well again.
    ring.peek(target);
    ring.consume(ring.peek(target));
    guest.view.setUint32(OUT_CONS, guest.index(OUT_PROD), true);
    guest.view.setUint32(IN_CONS, (guest.index(IN_PROD) - ring.unread) >>> 0, true);
    ring.write(new Uint8Array(1));
    guest.view.setUint32(IN_CONS, guest.index(IN_PROD), true);
    assert.equal(ring.unread, 0);
    assert.equal(guest.write(new Uint8Array([4, 5])), 2);
    assert.deepEqual([ring.peek(target), target[0], target[1]], [2, 4, 5]);
    assert.equal(ring.write(new Uint8Array([6, 7])), 2);
    assert.deepEqual(guest.read(9), [6, 7]);
    assert.equal(reports.length, 1);
  }
});
