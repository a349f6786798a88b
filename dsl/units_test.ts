import assert from "node:assert/strict";
import {
  formatDuration,
  formatIpv4,
  formatSize,
  parseCidr,
  parseDuration,
  parseIpv4,
  parseSize,
} from "./units.ts";

Deno.test("parseSize() and formatSize() are inverse for whole bytes", () => {
  for (let round = 0; round < 1000; round++) {
    const bytes = Math.floor(Math.random() * 2 ** 50);
    assert.equal(parseSize(formatSize(bytes)), bytes);
  }
  for (const bad of ["", "1", "MiB", "1MB", "-1MiB", "1 MiB x", "1e3B", "0.3B", "9999999TiB"]) {
    assert.throws(() => parseSize(bad), RangeError, bad);
  }
});

Deno.test("parseDuration() and formatDuration() are inverse", () => {
  for (const text of ["0ms", "1ms", "1500ms", "2s", "90s", "2m", "3h"] as const) {
    assert.equal(formatDuration(parseDuration(text)), text);
  }
  assert.throws(() => parseDuration("5"), RangeError);
});

Deno.test("parseIpv4() and formatIpv4() are inverse", () => {
  for (let round = 0; round < 1000; round++) {
    const address = Math.floor(Math.random() * 2 ** 32);
    assert.equal(parseIpv4(formatIpv4(address)), address);
  }
  for (const bad of ["1.2.3", "1.2.3.256", "a.b.c.d", "1.2.3.4.5", "1.2.3.4 "]) {
    assert.throws(() => parseIpv4(bad), RangeError);
  }
});

Deno.test("parseCidr() refuses networks without prefix, with odd prefixes, and with host bits", () => {
  assert.deepEqual(parseCidr("10.0.0.0/30"), { base: 10 * 2 ** 24, prefix: 30, size: 4 });
  for (const bad of ["10.0.0.0", "10.0.0.0/31", "10.0.0.0/7", "10.0.0.1/24", "10.0.0.0/x", "/24"]) {
    assert.throws(() => parseCidr(bad), RangeError, bad);
  }
});
