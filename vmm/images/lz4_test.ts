import assert from "node:assert/strict";
import { seededRandom } from "../devices/test_driver.ts";
import { unpackBlock, unpackLegacyLz4 } from "./lz4.ts";

// Made by lz4 1.9.4 with -l -9.
const PACKED = Uint8Array.fromBase64(
  "AiFMGCoAAACnYSBrZXJuZWwsIAoADwEAJV8gYW5kIFIA//8t0HRoZSBlbmQgb2YgaXQ=",
);
const TEXT = `${`a kernel, a kernel, ${"a".repeat(57)} and `.repeat(8)}the end of it`;

function unpack(packed: Uint8Array): string {
  let text = "";
  for (const bytes of unpackLegacyLz4(packed)) text += new TextDecoder().decode(bytes);
  return text;
}

Deno.test("unpackLegacyLz4() unpacks what lz4 packs, also several blocks and files behind each other", () => {
  assert.equal(unpack(PACKED), TEXT);
  const twice = Uint8Array.of(...PACKED, ...PACKED.subarray(4));
  assert.equal(unpack(twice), TEXT + TEXT);
  assert.equal(unpack(Uint8Array.of(...twice, ...PACKED)), TEXT + TEXT + TEXT);
});

Deno.test("unpackLegacyLz4() refuses what is cut, anywhere but between blocks", () => {
  for (let length = 0; length < PACKED.length; length++) {
    if (length === 4) continue;
    assert.throws(() => unpack(PACKED.subarray(0, length)), /damaged or cut/, `${length} bytes`);
  }
});

Deno.test("unpackBlock() refuses matches and lengths that lead out of the block", () => {
  const target = new Uint8Array(64);
  // Four literals, then a match at a distance.
  const block = (token: number, ...rest: number[]) => Uint8Array.of(token, 1, 2, 3, 4, ...rest);
  assert.equal(unpackBlock(block(0x40, 4, 0, 0x10, 9), target), 9);
  assert.deepEqual([...target.subarray(0, 9)], [1, 2, 3, 4, 1, 2, 3, 4, 9]);
  assert.equal(unpackBlock(block(0x41, 2, 0, 0x10, 9), target), 10);
  assert.deepEqual([...target.subarray(0, 10)], [1, 2, 3, 4, 3, 4, 3, 4, 3, 9]);
  for (
    const bad of [
      block(0x40, 0, 0, 0x10, 9),
      block(0x40, 5, 0, 0x10, 9),
      block(0x40, 4),
      block(0x4f, 4, 0, 255),
      block(0x4f, 4, 0, 255, 255, 0, 0x10, 9),
      block(0x50),
      Uint8Array.of(0xf0, 255, 255, 255),
      new Uint8Array(0),
    ]
  ) {
    assert.throws(() => unpackBlock(bad, target), /damaged or cut/);
  }
  assert.throws(() => unpackBlock(Uint8Array.of(0x40, 1, 2, 3, 4), target.subarray(0, 3)), /damaged or cut/);
});

Deno.test("unpackBlock() ends for any bytes, inside of its target (property)", () => {
  const random = seededRandom(0x1234_5678);
  const whole = new Uint8Array(1100);
  const target = whole.subarray(50, 1050);
  let unpacked = 0;
  for (let round = 0; round < 20_000; round++) {
    const packed = round % 2 === 0
      ? PACKED.slice(8)
      : Uint8Array.from({ length: 1 + random(60) }, () => random(8) === 0 ? random(256) : random(40));
    for (let count = random(3); count >= 0; count--) packed[random(packed.length)] = random(256);
    try {
      const length = unpackBlock(packed, target);
      assert.ok(length >= 0 && length <= target.length);
      unpacked++;
    } catch (error) {
      assert.match((error as Error).message, /damaged or cut/);
    }
  }
  assert.ok(unpacked > 100);
  assert.ok(whole.every((byte, index) => byte === 0 || (index >= 50 && index < 1050)));
});
