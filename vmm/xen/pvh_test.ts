import assert from "node:assert/strict";
import {
  identityPage,
  memoryExtents,
  memoryRegions,
  pvhContexts,
  pvhMemoryMap,
  SPECIAL_FRAMES,
} from "./pvh.ts";

const MEBIBYTE = 2 ** 20;
const GIBIBYTE = 2 ** 30;
const PAGE = 4096;

Deno.test("memoryExtents() cover all memory once, each aligned to its size", () => {
  for (
    const size of [128 * MEBIBYTE, 3 * GIBIBYTE, 3 * GIBIBYTE + PAGE, 9 * GIBIBYTE - 3 * MEBIBYTE + 5 * PAGE]
  ) {
    const regions = memoryRegions(size);
    const all = [...memoryExtents(regions)].flatMap(([order, frames]) =>
      frames.map((frame) => ({ start: Number(frame), end: Number(frame) + 2 ** order, order }))
    ).sort((a, b) => a.start - b.start);
    for (const { start, order } of all) assert.equal(start % 2 ** order, 0);
    const joined: { start: number; end: number }[] = [];
    for (const { start, end } of all) {
      const last = joined.at(-1);
      if (last?.end === start) last.end = end;
      else joined.push({ start, end });
    }
    assert.deepEqual(
      joined,
      regions.map(({ address, length }) => ({ start: address / PAGE, end: (address + length) / PAGE })),
    );
  }
  // The largest pages first, so that they are still to be had.
  assert.deepEqual([...memoryExtents(memoryRegions(GIBIBYTE)).keys()], [18, 9, 0]);
  assert.deepEqual(memoryExtents(memoryRegions(GIBIBYTE)).get(18), [0n]);
});

Deno.test("pvhMemoryMap() keeps special pages and what is below 1 MiB from the guest", () => {
  const map = pvhMemoryMap(4 * GIBIBYTE);
  for (const [index, { address, length }] of map.entries()) {
    const next = map[index + 1];
    assert.ok(!next || address + length <= next.address, `${index} overlaps`);
  }
  const special = map.find(({ address }) => address === Number(SPECIAL_FRAMES.first) * PAGE)!;
  assert.deepEqual([special.length, special.type], [SPECIAL_FRAMES.count * PAGE, 2]);
  assert.ok(map.some(({ address, type }) => address < 0xe_0000 && address >= 0x9_0000 && type === 2));
  const memory = map.filter(({ type }) => type === 1).reduce((sum, { length }) => sum + length, 0);
  assert.equal(memory, 4 * GIBIBYTE - (0x10_0000 - 0x9_fc00));
  for (const frame of [SPECIAL_FRAMES.store, SPECIAL_FRAMES.console, SPECIAL_FRAMES.identity]) {
    assert.ok(frame >= SPECIAL_FRAMES.first && frame < SPECIAL_FRAMES.first + BigInt(SPECIAL_FRAMES.count));
  }
});

Deno.test("identityPage() maps each 4 MiB to themselves", () => {
  const page = new DataView(identityPage().buffer);
  assert.equal(page.getUint32(0, true), 0xe7);
  assert.equal(page.getUint32(4, true), 0x40_00e7);
  assert.equal(page.getUint32(4092, true), 0xffc0_00e7);
});

/** A context as Xen gives it: a header, a record that nobody wants, and the end. */
function savedContext(): Uint8Array {
  const bytes = new Uint8Array(8 + 24 + 8 + 4 + 8);
  const view = new DataView(bytes.buffer);
  view.setUint16(0, 1, true);
  view.setUint32(4, 24, true);
  view.setUint32(8, 0x5443_4e58, true);
  view.setUint16(32, 3, true);
  view.setUint32(36, 4, true);
  return bytes;
}

Deno.test("pvhContexts() keep Xen's header, set memory types of all vCPUs, and start the first", () => {
  const contexts = pvhContexts(savedContext(), { address: 0x100_0850, startInfo: 0x6000 }, 3);
  assert.equal(contexts.length, 4);
  for (const [index, context] of contexts.entries()) {
    const view = new DataView(context.buffer);
    assert.deepEqual([view.getUint16(0, true), view.getUint32(8, true)], [1, 0x5443_4e58]);
    const isLast = index === 3;
    assert.deepEqual(
      [view.getUint16(32, true), view.getUint16(34, true), view.getUint32(36, true)],
      isLast ? [2, 0, 1032] : [14, index, 240],
    );
    assert.equal(view.getUint16(context.length - 8, true), 0, "the last record is the end");
    if (!isLast) assert.equal(view.getBigUint64(40 + 232, true), 0x806n);
  }
  const cpu = new DataView(contexts[3]!.buffer, 40);
  assert.equal(cpu.getBigUint64(520, true), 0x6000n);
  assert.equal(cpu.getBigUint64(640, true), 0x100_0850n);
  assert.equal(cpu.getBigUint64(656, true), 0x11n);
  assert.equal(cpu.getUint32(888, true), 0xc9b);
});

Deno.test("pvhContexts() refuse a context without header, whatever its lengths say", () => {
  const entry = { address: 0, startInfo: 0 };
  for (const context of [new Uint8Array(), new Uint8Array(8), savedContext().subarray(0, 20)]) {
    assert.throws(() => pvhContexts(context, entry, 1), /Xen gives no header/);
  }
  const endless = savedContext();
  new DataView(endless.buffer).setUint32(4, 0xffff_ffff, true);
  assert.throws(() => pvhContexts(endless, entry, 1), /Xen gives no header/);
});
