import assert from "node:assert/strict";
import { seededRandom } from "../devices/test_driver.ts";
import { unpackXz } from "./xz_x86.ts";

// Made by xz 5.4.1 with --check=crc32 --x86 --lzma2=dict=32MiB, of what code() gives.
const PACKED = Uint8Array.fromBase64(
  "/Td6WFoAAAFpIt42AgEEACEBGgAByYCz4AGPARxdAHQ7S3Bwg/yr6kUjCqQxZG+5FEuUGv0tdELElFONEU+u0htnrbGAsoz7eK+e4W/0CG79fk+F5OSpe4WJ8Fx6TKwKYs8wif+RqDvC0gwRbr3ti3H7p0YwQMpU5Z8SJ9etGJpHNJE4WYusCd9tsTRohUbCcd37Cb+LWAD5Dz2frA+IBpc9N4x8ZAodx6IbxJcHtptr7W80HMHo/IiKTY1TBo61yjgxjDz2nkBjlIIFidQryGD40xry6TyndX5Jw26cXOr0qJ8UzonBxzR8vhXNX3cYjqZ/giFwbLv3aE6MFQFUwmKP3p/osIlOg9KyJ/9p/cV6nA3FghwW5b57gTx2Qfqqxe98CQVWhS+y4ucllwmFqEDXxWqizxY4U2qgALvePu8AAbQCkAMAACOJyIc+MA2LAgAAAAABWVo=",
);

/** Nothing but what the filter looks at. */
function code(): Uint8Array {
  const random = seededRandom(7);
  const bytes = [0xe8, 0xe9, 0xe8, 0, 255, 0, 255, 1, 0x7f];
  return Uint8Array.from({ length: 400 }, () => bytes[random(bytes.length)]!);
}

async function unpack(packed: Uint8Array<ArrayBuffer>, size = 400): Promise<Uint8Array> {
  const parts: number[] = [];
  for await (const bytes of unpackXz(packed, size)) parts.push(...bytes);
  return Uint8Array.from(parts);
}

Deno.test("unpackXz() undoes the filter for x86", async () => {
  assert.deepEqual(await unpack(PACKED), code());
});

Deno.test("unpackXz() refuses another size, and what is cut", async () => {
  await assert.rejects(unpack(PACKED, 399), /damaged or cut/);
  await assert.rejects(unpack(PACKED, 401), /damaged or cut/);
  for (const length of [0, 5, 12, 13, 20, 24, 30, 100, 300, 315, 317]) {
    await assert.rejects(unpack(PACKED.slice(0, length)), Error, `${length} bytes`);
  }
});

Deno.test("unpackXz() gives nothing wrong, whatever is damaged", async () => {
  const random = seededRandom(3);
  let refused = 0;
  for (let round = 0; round < 200; round++) {
    const packed = PACKED.slice();
    // From the block's header to the check of the content.
    packed[12 + random(308)]! ^= 1 + random(255);
    // There are bytes that decide nothing.
    const content = await unpack(packed).catch((error: Error) => void assert.ok(error instanceof Error));
    if (content) assert.deepEqual(content, code());
    else refused++;
  }
  assert.ok(refused > 150);
});

Deno.test("unpackXz() refuses checks that it cannot make, and several blocks", async () => {
  const other = PACKED.slice();
  other[7] = 4;
  await assert.rejects(unpack(other), /checksum/);
  const blocks = PACKED.slice();
  // Where the index begins.
  blocks[320] = 2;
  await assert.rejects(unpack(blocks), /more than one block/);
});
