import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { PlainFile, type PlainMemory } from "./plain_file.ts";
import { seededRandom } from "./test_driver.ts";

const MIB = 2 ** 20;

interface Bench extends Disposable {
  readonly path: string;
  readonly memory: PlainMemory;
}

function bench(content: Uint8Array | number): Bench {
  const folder = Deno.makeTempDirSync({ prefix: "hypertopia-plain-" });
  const path = `${folder}/disk`;
  Deno.writeFileSync(path, typeof content === "number" ? new Uint8Array(content) : content);
  return {
    path,
    memory: { bytes: new Uint8Array(8 * MIB) },
    [Symbol.dispose]: () => Deno.removeSync(folder, { recursive: true }),
  };
}

function pattern(length: number): Uint8Array {
  return new Uint8Array(length).map((_, index) => (index * 7 + (index >> 9)) & 0xff);
}

Deno.test("PlainFile moves requests in any number of segments", async () => {
  const content = pattern(3 * MIB);
  using b = bench(content);
  using file = new PlainFile(b.path, b);
  assert.deepEqual([file.size, file.isReadOnly, file.blockSize, file.isBusy], [3 * MIB, false, 512, false]);
  file.read(1024, [{ offset: 100, length: 700 }, { offset: 0, length: 0 }, {
    offset: 5000,
    length: 2 * MIB,
  }]);
  assert.deepEqual(b.memory.bytes.subarray(100, 800), content.subarray(1024, 1724));
  assert.deepEqual(b.memory.bytes.subarray(5000, 5000 + 2 * MIB), content.subarray(1724, 1724 + 2 * MIB));
  // Whatever came before, all is where it should be.
  const random = seededRandom(1);
  for (let count = 0; count < 300; count++) {
    const offset = 512 * random(4096);
    const segments = Array.from(
      { length: 1 + random(5) },
      () => ({ offset: random(MIB), length: 512 * random(20) }),
    );
    if (random(2) === 0) {
      for (const { offset: from, length } of segments) {
        crypto.getRandomValues(b.memory.bytes.subarray(from, from + length));
      }
      let at = offset;
      for (const { offset: from, length } of segments) {
        content.set(b.memory.bytes.subarray(from, from + length), at);
        at += length;
      }
      file.write(offset, segments);
    } else {
      let at = offset;
      for (const segment of segments) {
        file.read(at, [segment]);
        const bytes = b.memory.bytes.subarray(segment.offset, segment.offset + segment.length);
        assert.deepEqual(bytes, content.subarray(at, at + segment.length));
        at += segment.length;
      }
    }
  }
  await file.flush();
  assert.deepEqual(Deno.readFileSync(b.path), content);
});

Deno.test("PlainFile takes memory as it is then, and other memory that it is given", () => {
  using b = bench(pattern(4096));
  let bytes = new Uint8Array(4096);
  using file = new PlainFile(b.path, {
    memory: {
      get bytes() {
        return bytes;
      },
    },
  });
  file.read(0, [{ offset: 0, length: 4096 }]);
  assert.deepEqual(bytes, pattern(4096));
  const old = bytes;
  bytes = new Uint8Array(8192);
  old.fill(9);
  file.read(0, [{ offset: 4096, length: 4096 }]);
  assert.deepEqual(bytes.subarray(4096), pattern(4096));
  const other = { bytes: new Uint8Array(512).fill(5) };
  file.write(512, [{ offset: 0, length: 512 }], other);
  file.read(0, [{ offset: 0, length: 512 }], other);
  assert.deepEqual(other.bytes, pattern(4096).subarray(0, 512));
  assert.ok(Deno.readFileSync(b.path).subarray(512, 1024).every((byte) => byte === 5));
});

Deno.test("PlainFile reads zeros behind the end of a file that has become shorter", () => {
  const content = pattern(MIB + 700);
  using b = bench(content);
  using file = new PlainFile(b.path, b);
  assert.equal(file.size, MIB + 512);
  Deno.truncateSync(b.path, 100_000);
  b.memory.bytes.fill(1);
  file.read(512, [{ offset: 0, length: 4096 }, { offset: 4096, length: 507_904 }, {
    offset: MIB,
    length: 512,
  }]);
  assert.deepEqual(b.memory.bytes.subarray(0, 99_488), content.subarray(512, 100_000));
  assert.ok(b.memory.bytes.subarray(99_488, 512_000).every((byte) => byte === 0));
  assert.ok(b.memory.bytes.subarray(MIB, MIB + 512).every((byte) => byte === 0));
  assert.equal(b.memory.bytes[512_000], 1);
});

Deno.test("PlainFile writes zeros, and leaves what is discarded", async () => {
  const content = pattern(4 * MIB);
  using b = bench(content);
  using file = new PlainFile(b.path, b);
  const zeroing = file.writeZeroes(512, 3 * MIB, true);
  assert.equal(file.isBusy, true);
  // Something else goes on meanwhile.
  b.memory.bytes.fill(3, 0, 512);
  file.write(0, [{ offset: 0, length: 512 }]);
  await zeroing;
  assert.equal(file.isBusy, false);
  file.discard(0, MIB);
  await file.close();
  content.fill(3, 0, 512).fill(0, 512, 512 + 3 * MIB);
  assert.deepEqual(Deno.readFileSync(b.path), content);
});

Deno.test("PlainFile grows, and never shrinks", () => {
  using b = bench(4096);
  using file = new PlainFile(b.path, b);
  file.resize(8192);
  assert.deepEqual([file.size, Deno.statSync(b.path).size], [8192, 8192]);
  for (const size of [4096, 8193, NaN, 2 ** 60]) assert.throws(() => file.resize(size), RangeError);
  // The file of its own accord.
  Deno.truncateSync(b.path, 12_300);
  file.resize();
  assert.deepEqual([file.size, Deno.statSync(b.path).size], [12_288, 12_300]);
  file.resize(12_288);
  assert.equal(Deno.statSync(b.path).size, 12_300);
});

Deno.test("PlainFile flushes what was written before, also while another flush is under way", async () => {
  using b = bench(MIB);
  using file = new PlainFile(b.path, b);
  assert.equal(file.flush(), undefined);
  const segments = [{ offset: 0, length: 4096 }];
  file.write(0, segments);
  const first = file.flush();
  assert.ok(first);
  assert.equal(file.flush(), first);
  // Reads and writes go on meanwhile.
  for (let count = 0; count < 100; count++) {
    file.write(4096 * count, segments);
    file.read(0, segments);
  }
  const second = file.flush();
  assert.ok(second);
  assert.notEqual(second, first);
  await second;
  assert.equal(file.isBusy, false);
  assert.equal(file.flush(), undefined);
});

Deno.test("PlainFile ends once nothing is under way", async () => {
  using b = bench(4 * MIB);
  const file = new PlainFile(b.path, b);
  const zeroing = file.writeZeroes(0, 4 * MIB, false);
  const closed = file.close();
  assert.throws(() => file.read(0, [{ offset: 0, length: 512 }]), /closed/);
  assert.throws(() => file.flush(), /closed/);
  await assert.rejects(file.writeZeroes(0, 512, false), /closed/);
  await Promise.all([zeroing, closed, file.close()]);
  file[Symbol.dispose]();
  // It is to be had again.
  using _again = new PlainFile(b.path, b);
});

Deno.test("PlainFile shares a disk with readers, and with nobody who writes", async () => {
  using b = bench(4096);
  const readOnly = { ...b, isReadOnly: true };
  {
    using file = new PlainFile(b.path, b);
    file.write(0, [{ offset: 0, length: 512 }]);
    assert.throws(
      () => new PlainFile(b.path, b),
      /to write to as another process has it open: stop that machine/,
    );
    assert.throws(() => new PlainFile(b.path, readOnly), /as a disk as another process writes to it/);
    const program = fileURLToPath(new URL("./plain_file.ts", import.meta.url));
    const other = await new Deno.Command(Deno.execPath(), {
      args: [
        ...["eval", "--no-check", `--ext=ts`],
        `import { PlainFile } from ${JSON.stringify(program)};
        try { new PlainFile(${JSON.stringify(b.path)}, { memory: { bytes: new Uint8Array() } }); }
        catch (error) { console.log(error.message); }`,
      ],
    }).output();
    assert.match(new TextDecoder().decode(other.stdout), /another process has it open/);
  }
  using one = new PlainFile(b.path, readOnly);
  using two = new PlainFile(b.path, readOnly);
  assert.deepEqual([one.isReadOnly, two.size], [true, 4096]);
  assert.throws(() => one.write(0, [{ offset: 0, length: 512 }]));
  assert.throws(() => new PlainFile(b.path, b), /another process has it open/);
});

Deno.test("PlainFile opens nothing but files", async () => {
  using b = bench(4096);
  assert.throws(() => new PlainFile(`${b.path}/x`, b), /Cannot open ".*" as a disk to write to as /);
  assert.throws(() => new PlainFile(`${b.path}no`, b), /as No such file/);
  assert.throws(() => new PlainFile(`${b.path}/..`, b), /not a (file|directory)/i);
  if (Deno.build.os !== "linux") return;
  // It would wait for a writer.
  await new Deno.Command("mkfifo", { args: [`${b.path}.pipe`] }).output();
  assert.throws(() => new PlainFile(`${b.path}.pipe`, { ...b, isReadOnly: true }), /it is not a file/);
});
