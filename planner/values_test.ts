import assert from "node:assert/strict";
import { canonical, equal, flatten, overlay, redact, reveal, withField } from "./values.ts";

Deno.test("flatten() and withField() agree on paths", () => {
  const value = { a: { "x.y": [1, { z: 2 }], e: {} }, s: { $secret: 1 }, l: [] };
  const leaves = flatten(value);
  assert.deepEqual([...leaves.keys()], ['a["x.y"][0]', 'a["x.y"][1].z', "a.e", "s", "l"]);
  let built: unknown = {};
  for (const [field, leaf] of leaves) built = withField(built, field, leaf);
  assert.equal(canonical(built), canonical(value));
  assert.deepEqual(withField({ a: 1, b: 2 }, "a", undefined), { b: 2 });
});

Deno.test("equal() ignores the order of keys, and an unknown equals nothing", () => {
  assert.ok(equal({ a: 1, b: [2] }, { b: [2], a: 1 }));
  assert.ok(!equal({ a: 1 }, { a: "1" }));
  assert.ok(!equal({ $unknown: true }, { $unknown: true }));
});

Deno.test("overlay() keeps secrets marked", () => {
  assert.deepEqual(overlay({ a: { $secret: "x" }, b: 1 }, { a: "y" }), { a: { $secret: "y" }, b: 1 });
});

Deno.test("reveal() and redact() reach every secret", () => {
  const value = { a: [{ $secret: "x" }], b: 1 };
  assert.deepEqual(reveal(value), { a: ["x"], b: 1 });
  assert.deepEqual(redact(value), { a: ["(sensitive)"], b: 1 });
});
