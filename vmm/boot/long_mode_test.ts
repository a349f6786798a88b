import assert from "node:assert/strict";
import { kvmSregs, Struct } from "../../ffi/mod.ts";
import { enterLongMode, LONG_MODE_LAYOUT, writeLongModeTables } from "./long_mode.ts";

Deno.test("writeLongModeTables() writes flat segments and maps the first gibibyte to itself", () => {
  const memory = new ArrayBuffer(0x10000);
  writeLongModeTables(memory);
  const view = new DataView(memory);
  const at = (address: number) => view.getBigUint64(address, true);
  assert.deepEqual([0, 8, 16, 24].map((offset) => at(LONG_MODE_LAYOUT.gdt + offset)), [
    0n,
    0x00af_9b00_0000_ffffn,
    0x00cf_9300_0000_ffffn,
    0x008f_8b00_0000_ffffn,
  ]);
  assert.equal(at(0x9000), 0xa003n);
  assert.equal(at(0xa000), 0xb003n);
  assert.equal(at(0xb000), 0x83n);
  assert.equal(at(0xb000 + 511 * 8), 0x3fe0_0083n);
  assert.equal(at(0xc000), 0n);
});

Deno.test("enterLongMode() sets control registers and 64-bit code", () => {
  const registers = new Struct(kvmSregs);
  enterLongMode(registers);
  assert.equal(registers.get("cr0"), 0x8000_0001n);
  assert.equal(registers.get("cr4"), 0x20n);
  assert.equal(registers.get("efer"), 0x500n);
  assert.equal(registers.get("cr3"), 0x9000n);
  // struct kvm_segment: selector, type, present, dpl, db, s, l, g
  const bytes = Array.from({ length: 24 }, (_, index) => Number(registers.get("cs", index)));
  assert.deepEqual(bytes.slice(8, 21), [0xff, 0xff, 0xff, 0xff, 8, 0, 0xb, 1, 0, 0, 1, 1, 1]);
});
