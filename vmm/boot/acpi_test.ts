import assert from "node:assert/strict";
import { ACPI_ADDRESS, ACPI_LENGTH, acpiTables } from "./acpi.ts";

const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
const sum = (bytes: Uint8Array) => bytes.reduce((total, byte) => total + byte, 0) & 0xff;

/** Follows the pointers as a guest does. */
function tables(cpus: number, hasSerial = false): Map<string, Uint8Array> {
  const bytes = acpiTables({ cpus, hasSerial });
  const view = new DataView(bytes.buffer);
  const at = (address: bigint) => {
    const offset = Number(address) - ACPI_ADDRESS;
    const table = bytes.subarray(offset, offset + view.getUint32(offset + 4, true));
    assert.equal(sum(table), 0, `checksum of ${text(table.subarray(0, 4))}`);
    return table;
  };
  assert.equal(text(bytes.subarray(0, 8)), "RSD PTR ");
  assert.equal(sum(bytes.subarray(0, 20)), 0);
  assert.equal(sum(bytes.subarray(0, 36)), 0);
  const xsdt = at(view.getBigUint64(24, true));
  const found = new Map([[text(xsdt.subarray(0, 4)), xsdt]]);
  for (let offset = 36; offset < xsdt.length; offset += 8) {
    const table = at(new DataView(xsdt.buffer, xsdt.byteOffset).getBigUint64(offset, true));
    found.set(text(table.subarray(0, 4)), table);
  }
  const fadt = found.get("FACP")!;
  const pointer = new DataView(fadt.buffer, fadt.byteOffset);
  assert.equal(BigInt(pointer.getUint32(40, true)), pointer.getBigUint64(140, true));
  found.set("DSDT", at(pointer.getBigUint64(140, true)));
  return found;
}

Deno.test("acpiTables() are found by pointers, and all checksums are right", () => {
  for (const cpus of [1, 2, 4, 31, 32, 255]) {
    const found = tables(cpus, cpus % 2 === 0);
    assert.deepEqual([...found.keys()], ["XSDT", "FACP", "APIC", "MCFG", "DSDT"]);
    const madt = found.get("APIC")!;
    let count = 0;
    for (let at = 44; at < madt.length; at += madt[at + 1]!) if (madt[at] === 0) count++;
    assert.equal(count, cpus);
    assert.ok(acpiTables({ cpus, hasSerial: true }).length <= ACPI_LENGTH);
  }
});

Deno.test("acpiTables() tell of hardware-reduced ACPI, of the reset register, and of no legacy", () => {
  const fadt = tables(1).get("FACP")!;
  const view = new DataView(fadt.buffer, fadt.byteOffset);
  assert.equal(fadt.length, 276);
  assert.equal(view.getUint32(112, true), 0x10_0410);
  assert.equal(view.getUint16(109, true), 0x24);
  assert.deepEqual([...fadt.subarray(116, 129)], [1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0, 0xfe]);
});

Deno.test("the DSDT has the bytes that the assembler of ASL gives for its terms", () => {
  const body = [...tables(1).get("DSDT")!.subarray(36)].map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
  // Name (\_S5, Package (0x04) { 0x05, Zero, Zero, Zero })
  assert.ok(body.startsWith("085c5f53355f1207040a05000000"), body.slice(0, 40));
  // Name (_HID, EisaId ("PNP0A08"))
  assert.ok(body.includes("085f4849440c41d00a08"));
  // Memory32Fixed (ReadWrite, 0xE0000000, 0x00100000)
  assert.ok(body.includes("86090001000000e000001000"));
  // Method (_EVT, 1) { Notify (\_SB.PWRB, 0x80) }
  assert.ok(body.includes("14135f45565401865c2e5f53425f505752420a80"));
});
