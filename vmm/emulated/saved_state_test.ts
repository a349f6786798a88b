import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import type { VirtioPciState } from "../devices/virtio_pci.ts";
import { MachineError } from "../errors.ts";
import { EMULATOR_VERSION } from "./emulator.ts";
import { readState, writeState } from "./saved_state.ts";

const KEY = "0123456789abcdef";

const FUNCTION: VirtioPciState = {
  status: 15,
  accepted: String(1n << 32n | 1n << 29n),
  isr: 1,
  configuration: [1, 2, 3],
  common: Array.from({ length: 56 }, (_, index) => index),
  queues: [{ isReady: true, size: 64, descriptorTable: 4096, availableRing: 8192, usedRing: 12288 }],
  device: [{ isReady: true, name: 'Füße, "quoted"\n' }],
};

/** A file in a folder of its own. */
class Place implements AsyncDisposable {
  readonly folder = Deno.makeTempDirSync();
  readonly path = `${this.folder}/x.state`;

  /** Writes the file with another first line, or another rest. */
  async rewrite(change: (header: Record<string, unknown>, body: Uint8Array) => Uint8Array | void) {
    const whole = await Deno.readFile(this.path);
    const end = whole.indexOf(10);
    const header = JSON.parse(new TextDecoder().decode(whole.subarray(0, end)));
    const body = change(header, whole.slice(end + 1)) ?? whole.subarray(end + 1);
    await Deno.writeFile(this.path, join(new TextEncoder().encode(`${JSON.stringify(header)}\n`), body));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

function join(...parts: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

async function refuses(place: Place, reason: RegExp, key = KEY): Promise<void> {
  await assert.rejects(readState(place.path, key), (error) => {
    assert.ok(error instanceof MachineError, String(error));
    assert.ok(error.message.startsWith(`Cannot go on from the saved state "${place.path}" as `));
    assert.match(error.message, reason);
    return true;
  });
}

Deno.test("a saved state is read as it was written, for its owner only, and packed", async () => {
  await using place = new Place();
  assert.equal(await readState(place.path, KEY), undefined);
  // Most of a guest's memory is empty.
  const emulator = new Uint8Array(3 << 20);
  crypto.getRandomValues(emulator.subarray(0, 60_000));
  const state = { emulator, functions: [FUNCTION, { ...FUNCTION, queues: [], device: undefined }] };
  await writeState(place.path, KEY, state);
  const found = await readState(place.path, KEY);
  assert.deepEqual(found!.emulator, emulator);
  assert.deepEqual(found!.functions, JSON.parse(JSON.stringify(state.functions)));
  const info = await Deno.stat(place.path);
  assert.ok(info.size < 100_000, `${info.size} bytes`);
  assert.equal(info.mode! & 0o077, 0, "it holds the memory of a guest");
  assert.deepEqual([...Deno.readDirSync(place.folder)].map(({ name }) => name), ["x.state"]);
  // Another one takes its place.
  await writeState(place.path, KEY, { emulator: new Uint8Array([7]), functions: [] });
  assert.deepEqual(await readState(place.path, KEY), { emulator: new Uint8Array([7]), functions: [] });
});

Deno.test("a saved state that is not what it should be is refused", async () => {
  await using place = new Place();
  const state = { emulator: crypto.getRandomValues(new Uint8Array(10_000)), functions: [FUNCTION] };
  const write = () => writeState(place.path, KEY, state);
  await write();
  const whole = await Deno.readFile(place.path);
  const end = whole.indexOf(10);
  await refuses(place, /it is of a machine that is made of something else/, "another");

  // Cut anywhere.
  for (const length of [0, 1, end, end + 1, end + 2, whole.length >> 1, whole.length - 1]) {
    await Deno.writeFile(place.path, whole.subarray(0, length));
    await refuses(place, length <= end ? /it is no saved state/ : /it is cut: \d+ of \d+ bytes are there/);
  }
  await Deno.writeFile(place.path, join(whole, new Uint8Array(1)));
  await refuses(place, /it is cut/);

  // A flipped bit anywhere in what is packed.
  for (const at of [end + 1, end + 5, (end + whole.length) >> 1, whole.length - 1]) {
    const damaged = whole.slice();
    damaged[at]! ^= 1 << at % 8;
    await Deno.writeFile(place.path, damaged);
    await refuses(place, /it is damaged: its checksum is another/);
  }
  // Or in the line before it: whatever that says then, it is not taken for the state.
  for (let at = 0; at < end; at++) {
    const damaged = whole.slice();
    damaged[at]! ^= 4;
    await Deno.writeFile(place.path, damaged);
    await refuses(place, /as it (is|cannot be unpacked)/);
  }

  await write();
  await place.rewrite((header) => void (header.emulator = "0.0.1"));
  await refuses(place, new RegExp(`version 0\\.0\\.1 of the emulator, and this is ${EMULATOR_VERSION}`));
  await write();
  await place.rewrite((header) => void (header.format = "hypertopia-state-0"));
  await refuses(place, /no saved state, or one of another version/);
  await write();
  await place.rewrite((header) => void (header.padding = "x".repeat(5000)));
  await refuses(place, /it is no saved state/);
  for (const text of ["null\n", "[]\n", "7\n", "{}\n", "\n", "{\n"]) {
    await Deno.writeTextFile(place.path, text);
    await refuses(place, /it is no saved state/);
  }
  await Deno.writeFile(place.path, new Uint8Array(100_000));
  await refuses(place, /it is no saved state/);

  // Something else with a checksum that is right.
  await write();
  await place.rewrite((header) => {
    const body = new Uint8Array(100);
    header.length = body.length;
    header.sha256 = createHash("sha256").update(body).digest("hex");
    return body;
  });
  await refuses(place, /it cannot be unpacked/);
  // What is no file is not taken for one that is not there.
  await Deno.remove(place.path);
  await Deno.mkdir(place.path);
  await assert.rejects(readState(place.path, KEY));
});
