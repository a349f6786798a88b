import assert from "node:assert/strict";
import { compareVersions, parseFields, parseFiles } from "./debian_control.ts";

Deno.test("compareVersions() orders as deb-version(7) says", () => {
  const ordered = [
    ["1.0~beta1", "1.0"],
    ["1.0~~", "1.0~"],
    ["1.0", "1.0a"],
    ["1.0a", "1.0+b1"],
    ["1.0-1", "1.0-2"],
    ["1.0-9", "1.0-10"],
    ["6.1.99-1", "6.1.176-1"],
    ["9.9", "1:0.1"],
    ["1.35.0-4", "1.35.0-4+deb12u1"],
    ["1.0", "1.0-1"],
    ["1-2-3", "1-2-4"],
    ["a", "a1"],
    ["1", "1.a"],
  ];
  for (const [older, newer] of ordered) {
    assert.ok(compareVersions(older!, newer!) < 0, `${older} < ${newer}`);
    assert.ok(compareVersions(newer!, older!) > 0, `${newer} > ${older}`);
  }
  assert.equal(compareVersions("1.0-0", "0:1.00-0"), 0);
});

Deno.test("parseFields() keeps the first of equal fields and joins continued lines", () => {
  const fields = parseFields("A: 1\nB:\n x\n y: z\nno field\n lost\na: 2\n ignored\nC: 3");
  assert.deepEqual([...fields], [["a", "1"], ["b", "\nx\ny: z"], ["c", "3"]]);
});

Deno.test("parseFiles() reads digests, sizes and paths, and skips other lines", () => {
  const sha256 = "a".repeat(64);
  assert.deepEqual([...parseFiles(`\n${sha256}   12 main/x.gz\nshort 1 y\n${sha256} -1 z`)], [
    ["main/x.gz", { sha256, size: 12 }],
  ]);
});
