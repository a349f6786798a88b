import assert from "node:assert/strict";
import { Fd } from "../../ffi/mod.ts";
import { RealTimeClock } from "./real_time_clock.ts";
import { SerialPort } from "./serial.ts";

Deno.test("SerialPort sends, receives, interrupts and loops back", () => {
  using interrupt = Fd.event();
  const output: number[] = [];
  const port = new SerialPort(interrupt, (byte) => output.push(byte));
  // What a driver does to find out that it is a 16550A.
  port.write(7, 0x5a);
  assert.equal(port.read(7), 0x5a);
  port.write(2, 1);
  assert.equal(port.read(2) & 0xc0, 0xc0);
  port.write(3, 0x80);
  port.write(0, 1);
  port.write(1, 2);
  assert.deepEqual([port.read(0), port.read(1)], [1, 2]);
  port.write(3, 3);
  assert.equal(port.read(5), 0x60);
  port.write(0, 0x41);
  assert.deepEqual(output, [0x41]);
  assert.equal(interrupt.drain(), 0n);
  port.write(1, 2);
  assert.equal(interrupt.drain(), 1n);
  assert.equal(port.read(2) & 0xf, 2);
  assert.equal(port.read(2) & 0xf, 1);
  port.write(1, 1);
  port.send(new Uint8Array([1, 2]));
  assert.equal(interrupt.drain(), 1n);
  assert.equal(port.read(2) & 0xf, 4);
  assert.equal(port.read(5) & 1, 1);
  assert.deepEqual([port.read(0), port.read(0), port.read(0)], [1, 2, 0]);
  assert.equal(port.read(5) & 1, 0);
  port.write(4, 0x1a);
  assert.equal(port.read(6), 0x90);
  port.write(0, 7);
  assert.deepEqual([port.read(0), output.length], [7, 1]);
  // A guest that is sent more than it reads.
  port.send(new Uint8Array(100_000));
  let count = 0;
  while ((port.read(5) & 1) !== 0) count += 1 + port.read(0);
  assert.equal(count, 65_536);
});

Deno.test("RealTimeClock tells the time in BCD, in UTC", () => {
  const clock = new RealTimeClock(() => new Date("2026-11-24T13:45:59Z"));
  const get = (register: number) => {
    clock.write(0, register);
    return clock.read(1);
  };
  assert.deepEqual([0, 2, 4, 6, 7, 8, 9, 0x32].map(get), [0x59, 0x45, 0x13, 3, 0x24, 0x11, 0x26, 0x20]);
  assert.equal(get(0x0a) & 0x80, 0);
  assert.equal(get(0x0d), 0x80);
  clock.write(0, 0x40);
  clock.write(1, 9);
  assert.equal(get(0x40), 9);
  clock.write(0, 4);
  clock.write(1, 1);
  assert.equal(get(4), 0x13);
});
