import assert from "node:assert/strict";
import { type Layout, Struct } from "./layout.ts";

const sample = {
  name: "struct sample",
  size: 24,
  fields: { a: [0, "u8"], b: [2, "u16"], c: [4, "i32"], d: [8, "u64", 2] },
} as const satisfies Layout;

Deno.test("Struct reads and writes fields, little-endian, and refuses what does not fit", () => {
  const struct = new Struct(sample).assign({ a: 255, b: 0x1234, c: -1 });
  struct.set("d", 0xffff_ffff_ffff_ffffn, 1);
  assert.deepEqual([...struct.bytes.subarray(0, 8)], [255, 0, 0x34, 0x12, 255, 255, 255, 255]);
  assert.equal(struct.get("c"), -1n);
  assert.equal(struct.get("d", 1), 0xffff_ffff_ffff_ffffn);
  assert.equal(struct.get("d"), 0n);
  assert.throws(() => struct.set("a", 256), /does not fit in 8 bits/);
  assert.throws(() => struct.set("b", -1), RangeError);
  assert.throws(() => struct.get("d", 2), RangeError);
});
