import assert from "node:assert/strict";
import { guestCpuid } from "./cpuid.ts";
import type { CpuidEntry } from "./vm.ts";

const entry = (leaf: number, values: Partial<CpuidEntry> = {}): CpuidEntry => ({
  function: leaf,
  index: 0,
  flags: 0,
  eax: 0,
  ebx: 0,
  ecx: 0,
  edx: 0,
  ...values,
});

const supported = [
  entry(0, { eax: 0x1f }),
  entry(1, { ebx: 0x1234_5678, ecx: 0xffff_ffff, edx: 0 }),
  entry(4, { eax: 0x21 }),
  entry(4, { index: 3, eax: 0x63 }),
  entry(6, { ecx: 9 }),
  entry(0xa, { eax: 7 }),
  entry(0xb, { ebx: 99 }),
  entry(0x8000_0008, { eax: 0x3028, ecx: 0xf0ff }),
  entry(0x8000_001e, { ebx: 0xffff }),
];

Deno.test("guestCpuid() tells each vCPU its number and how many there are", () => {
  for (const [cpus, bits] of [[1, 0], [2, 1], [3, 2], [4, 2], [32, 5]] as const) {
    for (let cpu = 0; cpu < cpus; cpu++) {
      const found = guestCpuid(supported, { cpu, cpus, hasDeadlineTimer: true });
      const get = (leaf: number, index = 0) =>
        found.find((each) => each.function === leaf && each.index === index)!;
      assert.equal(get(1).ebx >>> 24, cpu);
      assert.equal(get(1).ebx >> 16 & 0xff, cpus);
      assert.equal(get(1).edx >>> 28 & 1, cpus > 1 ? 1 : 0);
      assert.equal(get(1).ecx >>> 31, 1);
      assert.equal(get(1).ecx >>> 15 & 1, 0);
      assert.equal(get(4, 3).eax >>> 26, cpus - 1);
      assert.equal(get(4, 3).eax >> 14 & 0xfff, cpus - 1);
      assert.equal(get(4).eax >> 14 & 0xfff, 0);
      assert.equal(get(6).ecx, 1);
      assert.equal(get(0xa).eax, 0);
      for (const leaf of [0xb, 0x1f]) {
        assert.deepEqual([get(leaf).eax, get(leaf).ebx, get(leaf).ecx, get(leaf).edx], [0, 1, 0x100, cpu]);
        assert.deepEqual([get(leaf, 1).eax, get(leaf, 1).ebx, get(leaf, 1).ecx], [bits, cpus, 0x201]);
        assert.deepEqual([get(leaf, 2).ebx, get(leaf, 2).ecx], [0, 2]);
      }
      assert.equal(get(0x8000_0008).ecx, bits << 12 | cpus - 1);
      assert.deepEqual([get(0x8000_001e).eax, get(0x8000_001e).ebx], [cpu, cpu]);
      for (const each of found) {
        for (const value of Object.values(each)) {
          assert.ok(value >= 0 && value < 2 ** 32, JSON.stringify(each));
        }
      }
    }
  }
});

Deno.test("guestCpuid() leaves out the deadline timer where KVM lacks it", () => {
  const [, one] = guestCpuid(supported, { cpu: 0, cpus: 1, hasDeadlineTimer: false });
  assert.equal(one!.ecx >>> 24 & 1, 0);
});
