import assert from "node:assert/strict";
import { emptyQcow2 } from "./qcow2.ts";

Deno.test("emptyQcow2() writes a version 3 header, a backing file and reference counts", () => {
  const bytes = emptyQcow2(3 * 2 ** 30, { path: "/base.raw", format: "raw" });
  const view = new DataView(bytes.buffer);
  assert.equal(view.getUint32(0), 0x514649fb);
  assert.equal(view.getUint32(4), 3);
  assert.equal(Number(view.getBigUint64(24)), 3 * 2 ** 30);
  const offset = Number(view.getBigUint64(8));
  assert.equal(new TextDecoder().decode(bytes.subarray(offset, offset + view.getUint32(16))), "/base.raw");
  assert.equal(view.getUint32(36), 6);
  for (let cluster = 0; cluster < bytes.length / 65536; cluster++) {
    assert.equal(view.getUint16(2 * 65536 + 2 * cluster), 1);
  }
  assert.throws(() => emptyQcow2(1000), RangeError);
  assert.throws(() => emptyQcow2(512, { path: "x".repeat(2000), format: "raw" }), RangeError);
});
