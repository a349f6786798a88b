import assert from "node:assert/strict";
import { deflateRawSync } from "node:zlib";
import { emptyQcow2 } from "../images/qcow2.ts";
import { type BlockFile, RawFile } from "./block_file.ts";
import { SharedMemory } from "./shared_memory.ts";
import { openBlockFile, type OpenBlockFileOptions, parseQcow2Header } from "./qcow2_file.ts";
import { seededRandom } from "./test_driver.ts";
import type { Segment } from "./virtqueue.ts";

type Random = (below: number) => number;

async function run(command: string, ...args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(command, { args, stdout: "piped" }).output();
  const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  if (!success) throw new Error(`${command} ${args.join(" ")}: ${text}`);
  return text;
}

const hasQemuImg = await run("qemu-img", "--version").then(() => true, () => false);
// Deno names a test that is ignored, but not why.
const needsQemuImg = hasQemuImg ? "" : " (ignored as qemu-img is not installed)";

interface Folder extends Disposable {
  path(name: string): string;
  memory: SharedMemory;
}

function folder(): Folder {
  const path = Deno.makeTempDirSync({ prefix: "hypertopia-qcow2-" });
  const memory = new SharedMemory(8 * 2 ** 20);
  return {
    path: (name) => `${path}/${name}`,
    memory,
    [Symbol.dispose]() {
      memory[Symbol.dispose]();
      Deno.removeSync(path, { recursive: true });
    },
  };
}

interface ImageOptions {
  version: number;
  clusterBits: number;
  refcountOrder: number;
  size: number;
  backing?: { path: string; format: string };
}

/** An empty image, also of kinds that `emptyQcow2` does not make. */
function makeImage({ version, clusterBits, refcountOrder, size, backing }: ImageOptions): Uint8Array {
  const cluster = 2 ** clusterBits;
  const l1Entries = Math.ceil(size / (cluster * cluster / 8));
  const l1Clusters = Math.ceil(l1Entries * 8 / cluster);
  const clusters = 3 + l1Clusters;
  const bytes = new Uint8Array(clusters * cluster);
  const view = new DataView(bytes.buffer);
  const text = (value: string, at: number): number => {
    bytes.set(new TextEncoder().encode(value), at);
    return value.length;
  };
  view.setUint32(0, 0x514649fb);
  view.setUint32(4, version);
  view.setUint32(20, clusterBits);
  view.setBigUint64(24, BigInt(size));
  view.setUint32(36, l1Entries);
  view.setBigUint64(40, BigInt(3 * cluster));
  view.setBigUint64(48, BigInt(cluster));
  view.setUint32(56, 1);
  const header = version === 3 ? 104 : 72;
  if (version === 3) {
    view.setUint32(96, refcountOrder);
    view.setUint32(100, header);
  }
  if (backing) {
    view.setUint32(header, 0xe2792aca);
    view.setUint32(header + 4, text(backing.format, header + 8));
    view.setBigUint64(8, BigInt(header + 24));
    view.setUint32(16, text(backing.path, header + 24));
  }
  view.setBigUint64(cluster, BigInt(2 * cluster));
  const bits = 2 ** refcountOrder;
  for (let index = 0; index < clusters; index++) {
    // The lowest bit of a count of 8 bits and more is in its last byte.
    if (bits >= 8) bytes[2 * cluster + (index + 1) * bits / 8 - 1] = 1;
    else bytes[2 * cluster + Math.floor(index * bits / 8)]! |= 1 << (index * bits % 8);
  }
  return bytes;
}

/** Counts what an image uses and compares it with its reference counts, as `qemu-img check` does. */
function checkImage(bytes: Uint8Array<ArrayBuffer>): { errors: string[]; leaks: number } {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const header = parseQcow2Header(bytes.subarray(0, 65536));
  const cluster = 2 ** header.clusterBits;
  const errors: string[] = [];
  const uses = new Map<number, number>();
  const use = (offset: number, length: number): void => {
    if (offset + length > Math.ceil(bytes.length / cluster) * cluster) errors.push(`${offset} is outside`);
    for (let index = Math.floor(offset / cluster); index * cluster < offset + length; index++) {
      uses.set(index, (uses.get(index) ?? 0) + 1);
    }
  };
  const entry = (at: number): [offset: number, flags: bigint] => {
    const value = at + 8 <= bytes.length ? view.getBigUint64(at) : 0n;
    return [Number(value & 0x00ff_ffff_ffff_fe00n), value];
  };
  const bits = 2 ** header.refcountOrder;
  const perBlock = cluster * 8 / bits;
  const tableEntries = header.refcountTableClusters * cluster / 8;
  const count = (index: number): number => {
    const block = Math.floor(index / perBlock);
    const [offset] = block < tableEntries ? entry(header.refcountTableOffset + block * 8) : [0];
    if (offset === 0) return 0;
    const bit = index % perBlock * bits;
    const at = offset + Math.floor(bit / 8);
    if (at >= bytes.length) return 0;
    return bits < 8
      ? bytes[at]! >> bit % 8 & 2 ** bits - 1
      : bytes.subarray(at, at + bits / 8).reduce((sum, byte) => sum * 256 + byte, 0);
  };
  use(0, 1);
  use(header.refcountTableOffset, header.refcountTableClusters * cluster);
  for (let block = 0; block < tableEntries; block++) {
    const [offset] = entry(header.refcountTableOffset + block * 8);
    if (offset !== 0) use(offset, cluster);
  }
  if (header.l1Entries > 0) use(header.l1Offset, header.l1Entries * 8);
  const copied: number[] = [];
  for (let index = 0; index < header.l1Entries; index++) {
    const [table, flags] = entry(header.l1Offset + index * 8);
    if (table === 0) continue;
    use(table, cluster);
    if (flags >> 63n === 1n) copied.push(table / cluster);
    for (let at = table; at < table + cluster; at += 8) {
      const [offset, flags] = entry(at);
      if ((flags & 1n << 62n) !== 0n) {
        const highBits = BigInt(62 - (header.clusterBits - 8));
        const start = Number(flags & (1n << highBits) - 1n);
        const sectors = Number((flags & (1n << 62n) - 1n) >> highBits) + 1;
        use(start, sectors * 512 - start % 512);
      } else if (offset !== 0) {
        use(offset, cluster);
        if (flags >> 63n === 1n) copied.push(offset / cluster);
      }
    }
  }
  let leaks = 0;
  for (let index = 0; index < tableEntries * perBlock && index * cluster < bytes.length; index++) {
    const [used, counted] = [uses.get(index) ?? 0, count(index)];
    if (used > counted) errors.push(`cluster ${index} is used ${used} times and counted ${counted} times`);
    if (used < counted) leaks++;
  }
  for (const index of copied) if (count(index) !== 1) errors.push(`cluster ${index} is not a copy`);
  return { errors, leaks };
}

function assertSound(path: string, mayLeak = false): void {
  const { errors, leaks } = checkImage(Deno.readFileSync(path));
  assert.deepEqual(errors, []);
  if (!mayLeak) assert.equal(leaks, 0);
}

/** Segments of so many bytes, in any order and of any size, that do not overlap. */
function scatter(random: Random, length: number): Segment[] {
  const segments: Segment[] = [];
  let at = random(1000);
  while (length > 0) {
    const size = Math.min(length, random(3) === 0 ? 1 + random(700) : 512 * (1 + random(64)));
    segments.push({ offset: at, length: size });
    at += size + (random(2) === 0 ? 0 : random(600));
    length -= size;
  }
  return segments.sort(() => random(3) - 1);
}

/** A disk, and what its content should be. */
class Model {
  readonly memory: SharedMemory;
  readonly random: Random;
  bytes: Uint8Array;

  constructor(memory: SharedMemory, random: Random, bytes: Uint8Array) {
    this.memory = memory;
    this.random = random;
    this.bytes = bytes;
  }

  range(): [offset: number, length: number] {
    const sectors = this.bytes.length / 512;
    const offset = this.random(sectors);
    const most = this.random(4) === 0 ? 400 : 20;
    return [offset * 512, Math.min(sectors - offset, 1 + this.random(most)) * 512];
  }

  async read(file: BlockFile, offset: number, length: number): Promise<Uint8Array> {
    const segments = scatter(this.random, length);
    this.memory.bytes.fill(0xee, 0, 2 ** 20);
    await file.read(offset, segments);
    const result = new Uint8Array(length);
    let at = 0;
    for (const { offset, length } of segments) {
      result.set(this.memory.bytes.subarray(offset, offset + length), at);
      at += length;
    }
    return result;
  }

  async write(file: BlockFile, offset: number, length: number): Promise<void> {
    const segments = scatter(this.random, length);
    const value = 1 + this.random(255);
    let at = offset;
    for (const segment of segments) {
      for (let index = 0; index < segment.length; index++) {
        this.memory.bytes[segment.offset + index] = this.bytes[at++] = (value + (at >> 9)) & 0xff;
      }
    }
    await file.write(offset, segments);
  }

  async compare(file: BlockFile, offset = 0, length: number = this.bytes.length): Promise<void> {
    assert.equal(file.size, this.bytes.length);
    const end = offset + length;
    for (; offset < end; offset += 2 ** 19) {
      const size = Math.min(2 ** 19, end - offset);
      const found = await this.read(file, offset, size);
      const wrong = found.findIndex((byte, index) => byte !== this.bytes[offset + index]);
      if (wrong >= 0) {
        assert.fail(`byte ${offset + wrong} is ${found[wrong]} and not ${this.bytes[offset + wrong]}`);
      }
    }
  }

  /** Does something to the disk at random. */
  async step(file: BlockFile): Promise<void> {
    const { random } = this;
    const [offset, length] = this.range();
    switch (random(8)) {
      case 0:
        return await file.flush();
      case 1: {
        await file.discard(offset, length);
        // Each sector is what it was, or zero.
        const found = await this.read(file, offset, length);
        for (let at = 0; at < length; at += 512) {
          const sector = found.subarray(at, at + 512);
          if (sector.every((byte) => byte === 0)) this.bytes.fill(0, offset + at, offset + at + 512);
        }
        return await this.compare(file, offset, length);
      }
      case 2:
        this.bytes.fill(0, offset, offset + length);
        return await file.writeZeroes(offset, length, random(2) === 0);
      case 3:
      case 4:
        return await this.compare(file, offset, length);
      case 5:
        if (random(20) === 0) {
          const size = this.bytes.length + 512 * random(200);
          await file.resize(size);
          const grown = new Uint8Array(size);
          grown.set(this.bytes);
          this.bytes = grown;
        }
        return;
      default:
        return await this.write(file, offset, length);
    }
  }
}

function noise(random: Random, length: number): Uint8Array {
  return new Uint8Array(length).map((_, index) => (index & 511) === 0 ? random(256) : index & 0xff);
}

interface Case {
  name: string;
  /** Makes the image; returns its content. */
  make(f: Folder, random: Random): Uint8Array;
  format: "raw" | "qcow2";
}

const SIZE = 700 * 512;

function image(options: Partial<ImageOptions>, backing?: number): Case {
  const { version = 3, clusterBits = 12, refcountOrder = 4 } = options;
  return {
    name:
      `qcow2 version ${version} with clusters of 2^${clusterBits} bytes, counts of 2^${refcountOrder} bits` +
      (backing === undefined ? "" : ` and a backing file of ${backing} bytes`),
    format: "qcow2",
    make(f, random) {
      const content = new Uint8Array(SIZE);
      if (backing !== undefined) {
        const base = noise(random, backing);
        Deno.writeFileSync(f.path("base.raw"), base);
        content.set(base.subarray(0, SIZE));
      }
      const path = { path: "base.raw", format: "raw" };
      Deno.writeFileSync(
        f.path("disk"),
        makeImage({
          version,
          clusterBits,
          refcountOrder,
          size: SIZE,
          ...(backing === undefined ? {} : { backing: path }),
        }),
      );
      return content;
    },
  };
}

const CASES: Case[] = [
  {
    name: "raw",
    format: "raw",
    make(f) {
      Deno.writeFileSync(f.path("disk"), new Uint8Array(SIZE));
      return new Uint8Array(SIZE);
    },
  },
  image({ clusterBits: 9, refcountOrder: 6 }),
  image({ clusterBits: 9, refcountOrder: 6 }, SIZE),
  image({ clusterBits: 10, refcountOrder: 0 }),
  image({ clusterBits: 12, refcountOrder: 2 }, 300 * 512),
  image({ clusterBits: 12, refcountOrder: 5 }, 1000 * 512),
  image({ clusterBits: 16 }, SIZE),
  image({ clusterBits: 21 }, SIZE),
  image({ version: 2, clusterBits: 12 }),
  image({ version: 2, clusterBits: 12 }, 500 * 512),
];

for (const { name, make, format } of CASES) {
  Deno.test(`Any requests to a disk that is ${name} do what they should`, async () => {
    for (let seed = 1; seed <= 4; seed++) {
      using f = folder();
      const random = seededRandom(seed * 7919);
      const model = new Model(f.memory, random, make(f, random));
      let file = openBlockFile(f.path("disk"), { memory: f.memory, format });
      try {
        for (let step = 0; step < 150; step++) {
          await model.step(file);
          if (random(40) === 0) {
            await model.compare(file);
            await file.close();
            if (format === "qcow2") assertSound(f.path("disk"));
            file = openBlockFile(f.path("disk"), { memory: f.memory, format });
          }
        }
        await model.compare(file);
      } finally {
        await file.close();
      }
      assert.equal(file.isBusy, false);
      if (format === "raw") continue;
      assertSound(f.path("disk"));
      if (hasQemuImg && seed === 1) {
        await run("qemu-img", "check", "-f", "qcow2", f.path("disk"));
        Deno.writeFileSync(f.path("model"), model.bytes);
        await run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", f.path("disk"), f.path("model"));
      }
    }
  });
}

Deno.test("Requests that overlap in time do not disturb one another", async () => {
  for (let seed = 1; seed <= 5; seed++) {
    using f = folder();
    const random = seededRandom(seed);
    const base = noise(random, SIZE);
    Deno.writeFileSync(f.path("base.raw"), base);
    Deno.writeFileSync(f.path("disk"), emptyQcow2(SIZE, { path: "base.raw", format: "raw" }));
    const file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
    // Each writes its own sectors of all clusters.
    await Promise.all(Array.from({ length: 7 }, async (_, writer) => {
      const segment = { offset: writer * 512, length: 512 };
      f.memory.bytes.fill(100 + writer, segment.offset, segment.offset + 512);
      for (let sector = writer; sector < SIZE / 512; sector += 7) {
        if (sector % 3 === 0) continue;
        base.fill(100 + writer, sector * 512, sector * 512 + 512);
        await file.write(sector * 512, [segment]);
        if (sector % 50 === 0) await file.flush();
      }
    }));
    await new Model(f.memory, random, base).compare(file);
    await file.close();
    assertSound(f.path("disk"));
  }
});

Deno.test("A chain of images reads as its newest parts, and is opened read-only below the first", async () => {
  using f = folder();
  const random = seededRandom(3);
  const content = noise(random, SIZE);
  Deno.writeFileSync(f.path("base.raw"), content);
  const model = new Model(f.memory, random, content);
  let [below, format]: [string, "raw" | "qcow2"] = ["base.raw", "raw"];
  for (let depth = 0; depth < 4; depth++) {
    Deno.writeFileSync(f.path(`${depth}.qcow2`), emptyQcow2(SIZE, { path: below, format }));
    [below, format] = [`${depth}.qcow2`, "qcow2"];
    const file = openBlockFile(f.path(below), { memory: f.memory, format });
    for (let count = 0; count < 10; count++) await model.write(file, ...model.range());
    await model.compare(file);
    await file.close();
    if (hasQemuImg) await run("qemu-img", "check", f.path(below));
  }
  const options = { memory: f.memory, format: "qcow2", isReadOnly: true } as const;
  assert.throws(() => openBlockFile(f.path(below), { ...options, backingDepth: 2 }), /is one too many/);
  using file = openBlockFile(f.path(below), options);
  await model.compare(file);
});

// What a crash leaves: all writes until the last flush that ended before it, and any of those after that.
Deno.test("A crash at any time loses at most what was not flushed, and never corrupts an image", async () => {
  type Event =
    | { offset: number; bytes: Uint8Array }
    | { hole: [number, number] }
    | { length: number }
    | "flush";
  const methods = ["write", "writeSync", "flush", "punch", "extend"] as const;
  const originals = Object.fromEntries(
    methods.map((name) => [name, RawFile.prototype[name]]),
  ) as unknown as Pick<
    RawFile,
    typeof methods[number]
  >;
  let events: Event[] = [];
  const record = (offset: number, segments: readonly Segment[], memory: { address: number }): void => {
    const parts = segments.map(({ offset, length }) => {
      const pointer = Deno.UnsafePointer.create(BigInt(memory.address + offset))!;
      return length === 0
        ? new Uint8Array()
        : new Uint8Array(Deno.UnsafePointerView.getArrayBuffer(pointer, length).slice(0));
    });
    events.push({ offset, bytes: new Uint8Array(parts.flatMap((part) => [...part])) });
  };
  RawFile.prototype.write = async function (offset, segments, memory) {
    record(offset, segments, memory!);
    await originals.write.call(this, offset, segments, memory);
  };
  RawFile.prototype.writeSync = function (offset, segments, memory) {
    record(offset, segments, memory);
    originals.writeSync.call(this, offset, segments, memory);
  };
  RawFile.prototype.flush = async function () {
    await originals.flush.call(this);
    events.push("flush");
  };
  RawFile.prototype.punch = function (offset, length) {
    events.push({ hole: [offset, length] });
    return originals.punch.call(this, offset, length);
  };
  RawFile.prototype.extend = function (length) {
    events.push({ length });
    originals.extend.call(this, length);
  };
  try {
    for (let seed = 1; seed <= 9; seed++) {
      using f = folder();
      const random = seededRandom(seed * 104729);
      const clusterBits = [9, 10, 12][seed % 3]!;
      const base = noise(random, 60 * 512);
      Deno.writeFileSync(f.path("base.raw"), base);
      const size = 150 * 512;
      const image = makeImage({
        version: 3,
        clusterBits,
        refcountOrder: clusterBits === 9 ? 6 : 4,
        size,
        backing: { path: "base.raw", format: "raw" },
      });
      // With the smallest clusters, the table of reference counts is full soon.
      const before = new Uint8Array(clusterBits === 9 ? 2 ** 21 - 50 * 512 : image.length);
      before.set(image);
      Deno.writeFileSync(f.path("disk"), before);
      const content = new Uint8Array(size);
      content.set(base);
      const model = new Model(f.memory, random, content);
      const file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
      events = [];
      /** Contents that a sector may have, by the number of events at which it got them. */
      const history: { at: number; content: Uint8Array; isFlushed: boolean }[] = [
        { at: 0, content: model.bytes.slice(), isFlushed: true },
      ];
      for (let step = 0; step < 60; step++) {
        const isFlush = random(6) === 0;
        if (isFlush) await file.flush();
        else if (random(4) === 0) {
          const [offset, length] = model.range();
          model.bytes.fill(0, offset, offset + length);
          await file.writeZeroes(offset, length, true);
        } else if (random(15) === 0) {
          const grown = new Uint8Array(model.bytes.length + 512 * random(100));
          grown.set(model.bytes);
          model.bytes = grown;
          await file.resize(grown.length);
        } else await model.write(file, ...model.range());
        history.push({ at: events.length, content: model.bytes.slice(), isFlushed: isFlush });
      }
      await file.close();
      const all = events;
      // At random, and wherever the header has just been changed.
      const ends = all.flatMap((event, index) =>
        typeof event === "object" && "offset" in event && event.offset < 104 ? [index + 1, index + 1] : []
      );
      for (let count = 0; count < 25; count++) ends.push(random(all.length + 1));
      for (const end of ends) {
        const flushed = all.lastIndexOf("flush", end - 1);
        let bytes = before.slice();
        const grow = (length: number): void => {
          if (length <= bytes.length) return;
          const grown = new Uint8Array(length);
          grown.set(bytes);
          bytes = grown;
        };
        all.slice(0, end).forEach((event, index) => {
          const isSure = index < flushed;
          if (event === "flush" || !isSure && random(3) === 0) return;
          if ("hole" in event) bytes.fill(0, event.hole[0], event.hole[0] + event.hole[1]);
          else if ("length" in event) grow(event.length);
          else {
            grow(event.offset + event.bytes.length);
            // Storage keeps sectors whole, and nothing more.
            for (let at = 0; at < event.bytes.length;) {
              const next = Math.min(event.bytes.length, at + 512 - (event.offset + at) % 512);
              if (isSure || random(3) > 0) bytes.set(event.bytes.subarray(at, next), event.offset + at);
              at = next;
            }
          }
        });
        Deno.writeFileSync(f.path("crashed"), bytes);
        assertSound(f.path("crashed"), true);
        if (hasQemuImg && end === ends[0]) {
          // It ends with 3 if there are leaks only.
          const { code } = await new Deno.Command("qemu-img", { args: ["check", f.path("crashed")] })
            .output();
          assert.ok(code === 0 || code === 3, `qemu-img check ends with ${code}`);
        }
        // Each sector is as at the last flush that the guest saw end, or as at some time since.
        const last = history.findLastIndex(({ at, isFlushed }) => isFlushed && at <= end);
        const options = { memory: f.memory, format: "qcow2", isReadOnly: true } as const;
        using crashed = openBlockFile(f.path("crashed"), options);
        const found = await model.read(crashed, 0, crashed.size);
        const next = history.findIndex(({ at }) => at > end);
        const candidates = history.slice(last, next < 0 ? undefined : next + 1);
        for (let at = 0; at < found.length; at += 512) {
          const sector = found.subarray(at, at + 512);
          const isKnown = candidates.some(({ content }) =>
            sector.every((byte, index) => byte === content[at + index])
          );
          assert.ok(
            isKnown,
            `seed ${seed}: sector ${at / 512} has content that it had not since the last flush`,
          );
        }
      }
    }
  } finally {
    Object.assign(RawFile.prototype, originals);
  }
});

Deno.test("Images grow beyond their tables", async () => {
  using f = folder();
  const random = seededRandom(11);
  // One block counts 64 clusters and one cluster holds 64 entries: 2 MiB fill the table of reference counts, and 8 MiB
  // need more of the second level than is kept in memory.
  Deno.writeFileSync(
    f.path("disk"),
    makeImage({ version: 3, clusterBits: 9, refcountOrder: 6, size: 65536 }),
  );
  const file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
  await file.resize(10 * 2 ** 20);
  const model = new Model(f.memory, random, new Uint8Array(10 * 2 ** 20));
  for (let offset = 0; offset < model.bytes.length; offset += 300 * 512) {
    await model.write(file, offset, Math.min(300 * 512, model.bytes.length - offset));
  }
  await model.compare(file);
  await file.close();
  assertSound(f.path("disk"));
  if (hasQemuImg) await run("qemu-img", "check", f.path("disk"));
  const { refcountTableClusters, l1Entries } = parseQcow2Header(Deno.readFileSync(f.path("disk")));
  assert.ok(refcountTableClusters > 1);
  assert.equal(l1Entries, 320);
});

Deno.test("Discarded clusters are used again, once a flush has made sure that nothing leads to them", async () => {
  using f = folder();
  Deno.writeFileSync(f.path("disk"), emptyQcow2(4 * 2 ** 20));
  const file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
  const segments = [{ offset: 0, length: 2 ** 20 }];
  f.memory.bytes.fill(5, 0, 2 ** 20);
  await file.write(0, segments);
  await file.flush();
  const length = Deno.statSync(f.path("disk")).size;
  for (let round = 0; round < 5; round++) {
    await file.discard(0, 2 ** 20);
    await file.flush();
    for (let offset = 0; offset < 2 ** 20; offset += 65536) {
      await file.write(2 ** 20 + offset, [{ offset, length: 512 }]);
    }
    await file.discard(2 ** 20, 2 ** 20);
    await file.flush();
    for (let offset = 0; offset < 2 ** 20; offset += 65536) {
      await file.write(offset, [{ offset, length: 512 }]);
    }
  }
  f.memory.bytes.fill(9);
  await file.read(0, segments);
  assert.equal(f.memory.bytes.subarray(0, 2 ** 20).filter((byte) => byte === 5).length, 16 * 512);
  assert.equal(f.memory.bytes.subarray(0, 2 ** 20).filter((byte) => byte === 0).length, 2 ** 20 - 16 * 512);
  await file.close();
  assert.equal(Deno.statSync(f.path("disk")).size, length);
  assertSound(f.path("disk"));
});

Deno.test("An image that is disposed of keeps what was written, also by what was under way", async () => {
  using f = folder();
  const random = seededRandom(8);
  const base = noise(random, SIZE);
  Deno.writeFileSync(f.path("base.raw"), base);
  Deno.writeFileSync(f.path("disk"), emptyQcow2(SIZE, { path: "base.raw", format: "raw" }));
  const model = new Model(f.memory, random, base.slice());
  for (let round = 0; round < 10; round++) {
    const file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
    for (let count = 0; count < 5; count++) await model.write(file, ...model.range());
    const last = model.write(file, ...model.range());
    file[Symbol.dispose]();
    assert.throws(() => file.read(0, [{ offset: 0, length: 512 }]), /as it is closed/);
    await last;
    assertSound(f.path("disk"), true);
    using again = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2", isReadOnly: true });
    await model.compare(again);
  }
});

Deno.test("Growing hides what the backing file has behind the old end", async () => {
  using f = folder();
  const random = seededRandom(2);
  const base = noise(random, 400 * 512);
  Deno.writeFileSync(f.path("base.raw"), base);
  Deno.writeFileSync(f.path("disk"), emptyQcow2(100 * 512, { path: "base.raw", format: "raw" }));
  const file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
  await file.resize(600 * 512);
  const content = new Uint8Array(600 * 512);
  content.set(base.subarray(0, 100 * 512));
  await new Model(f.memory, random, content).compare(file);
  await assert.rejects(Promise.resolve(file.resize(512)), /give a multiple of 512 that is not smaller/);
  await file.close();
  assertSound(f.path("disk"));
});

/** An image whose first clusters are compressed, one behind the other. */
function makeCompressed(contents: Uint8Array[], clusterBits: number, size: number): Uint8Array<ArrayBuffer> {
  const cluster = 2 ** clusterBits;
  const empty = makeImage({ version: 3, clusterBits, refcountOrder: 4, size });
  const table = empty.length;
  let at = table + cluster;
  const bytes = new Uint8Array(at + contents.length * (cluster + 512));
  bytes.set(empty);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(3 * cluster, BigInt(table) | 1n << 63n);
  view.setUint16(2 * cluster + 2 * table / cluster, 1);
  contents.forEach((content, index) => {
    const packed = deflateRawSync(content);
    bytes.set(packed, at);
    const sectors = Math.floor((at + packed.length - 1) / 512) - Math.floor(at / 512);
    view.setBigUint64(
      table + 8 * index,
      1n << 62n | BigInt(sectors) << BigInt(62 - (clusterBits - 8)) | BigInt(at),
    );
    const last = Math.floor((at - at % 512 + (sectors + 1) * 512 - 1) / cluster);
    for (let used = Math.floor(at / cluster); used <= last; used++) {
      const count = 2 * cluster + 2 * used;
      view.setUint16(count, view.getUint16(count) + 1);
    }
    at += packed.length;
  });
  return bytes.slice(0, Math.ceil(at / cluster) * cluster);
}

Deno.test("Compressed clusters are read, and written as others", async () => {
  using f = folder();
  const random = seededRandom(5);
  for (const clusterBits of [12, 16]) {
    const cluster = 2 ** clusterBits;
    const contents = Array.from({ length: 9 }, () => noise(random, cluster));
    const model = new Model(f.memory, random, new Uint8Array(10 * cluster));
    contents.forEach((content, index) => model.bytes.set(content, index * cluster));
    Deno.writeFileSync(f.path("disk"), makeCompressed(contents, clusterBits, 10 * cluster));
    assertSound(f.path("disk"));
    const file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
    await model.compare(file);
    for (let step = 0; step < 40; step++) await model.step(file);
    await model.compare(file);
    await file.close();
    assertSound(f.path("disk"));
    if (hasQemuImg) await run("qemu-img", "check", f.path("disk"));
  }
});

Deno.test("Compressed clusters that are not what they should be are refused", async () => {
  using f = folder();
  for (
    const [content, reason] of [
      [new Uint8Array(100), /has 100 bytes/],
      [new Uint8Array(2 ** 26), /cannot be read: Cannot create a Buffer larger than/],
    ] as const
  ) {
    Deno.writeFileSync(f.path("disk"), makeCompressed([content], 16, 2 ** 20));
    using file = openBlockFile(f.path("disk"), { memory: f.memory, format: "qcow2" });
    await assert.rejects(Promise.resolve(file.read(0, [{ offset: 0, length: 512 }])), reason);
    assert.equal(file.isBusy, false);
  }
});

Deno.test({
  name: `Images of qemu-img are read and written${needsQemuImg}`,
  ignore: !hasQemuImg,
  async fn() {
    using f = folder();
    const random = seededRandom(4);
    const base = noise(random, 3 * 2 ** 20);
    Deno.writeFileSync(f.path("base.raw"), base);
    const convert = ["convert", "-f", "raw", "-O", "qcow2"];
    const create = ["create", "-f", "qcow2"];
    const images: [name: string, args: string[], content: Uint8Array][] = [
      ["compressed", [...convert, "-c", f.path("base.raw")], base],
      ["compressed2", [...convert, "-c", "-o", "compat=0.10,cluster_size=4k", f.path("base.raw")], base],
      ["plain", [...convert, "-o", "cluster_size=2M,refcount_bits=1", f.path("base.raw")], base],
      ["metadata", [...create, "-o", "preallocation=metadata"], new Uint8Array(base.length)],
      ["falloc", [...create, "-o", "preallocation=falloc,refcount_bits=64"], new Uint8Array(base.length)],
      ["lazy", [...create, "-o", "lazy_refcounts=on"], new Uint8Array(base.length)],
      ["child", [...create, "-b", "compressed", "-F", "qcow2"], base],
    ];
    for (const [name, args, content] of images) {
      await run("qemu-img", ...args, f.path(name), ...(args[0] === "create" ? [String(base.length)] : []));
      const model = new Model(f.memory, random, content.slice());
      if (name === "compressed") {
        // The child below reads it.
        using file = openBlockFile(f.path(name), { memory: f.memory, format: "qcow2", isReadOnly: true });
        await model.compare(file);
        continue;
      }
      const file = openBlockFile(f.path(name), { memory: f.memory, format: "qcow2" });
      await model.compare(file);
      for (let step = 0; step < 60; step++) await model.step(file);
      await model.compare(file);
      await file.close();
      await run("qemu-img", "check", f.path(name));
      Deno.writeFileSync(f.path("model"), model.bytes);
      await run("qemu-img", "compare", "-F", "raw", f.path(name), f.path("model"));
    }
    await run("qemu-img", "snapshot", "-c", "one", f.path("falloc"));
    const options = { memory: f.memory, format: "qcow2" } as const;
    assert.throws(() => openBlockFile(f.path("falloc"), options), /it has 1 snapshots inside: delete them/);
    openBlockFile(f.path("falloc"), { ...options, isReadOnly: true })[Symbol.dispose]();
  },
});

Deno.test("Headers that cannot be, and features that are not supported, are refused", () => {
  using f = folder();
  const good = makeImage({ version: 3, clusterBits: 16, refcountOrder: 4, size: 2 ** 30 });
  const backed = makeImage({
    version: 3,
    clusterBits: 16,
    refcountOrder: 4,
    size: 2 ** 30,
    backing: { path: "base.raw", format: "raw" },
  });
  const cases: [change: (view: DataView) => void, reason: RegExp, from?: Uint8Array][] = [
    [(view) => view.setUint32(0, 1), /it is no qcow2 image/],
    [(view) => view.setUint32(4, 1), /version 1 is not supported/],
    [(view) => view.setUint32(20, 8), /clusters of 2\^8 bytes are impossible/],
    [(view) => view.setUint32(20, 22), /clusters of 2\^22 bytes are impossible/],
    [(view) => view.setUint32(24, 0xffff_ffff), /its size is impossibly large/],
    [(view) => view.setUint32(24, 0xffff), /entries of the first level are too few/],
    [(view) => view.setUint32(32, 2), /encryption is not supported/],
    [(view) => view.setUint32(36, 0x1000_0000), /entries of the first level are too many/],
    [(view) => view.setUint32(36, 1), /1 entries of the first level are too few/],
    [(view) => view.setUint32(44, 0x1234), /a table begins inside of a cluster/],
    [(view) => view.setUint32(44, 0x7fff_0000), /its first level is outside of the file/],
    [(view) => view.setUint32(52, 0x7fff_0000), /its table of reference counts is outside of the file/],
    [(view) => view.setUint32(56, 0x0fff_ffff), /clusters of reference counts are too many/],
    [(view) => view.setUint32(56, 0), /it has no reference counts/],
    [(view) => view.setUint32(60, 3), /it has 3 snapshots inside/],
    [(view) => view.setUint32(76, 1), /it was not closed: repair it with qemu-img check -r all/],
    [(view) => view.setUint32(76, 2), /it is marked as corrupt/],
    [(view) => view.setUint32(76, 4), /an external data file is not supported/],
    [(view) => view.setUint32(76, 8), /only deflate is supported/],
    [(view) => view.setUint32(76, 16), /extended L2 entries are not supported/],
    [(view) => view.setUint32(76, 64), /it has unknown features/],
    [(view) => view.setUint32(72, 1), /it has unknown features/],
    [(view) => view.setUint32(96, 7), /reference counts of 2\^7 bits are impossible/],
    [(view) => view.setUint32(100, 50), /a header of 50 bytes is impossible/],
    [(view) => view.setUint32(100, 0xffff_ffff), /a header of 4294967295 bytes is impossible/],
    [
      (view) => view.setBigUint64(3 * 65536, 0x20_0000n),
      /a table of its second level is outside of the file/,
    ],
    [(view) => view.setBigUint64(3 * 65536, 0x200n), /a table begins inside of a cluster/],
    [(view) => view.setBigUint64(3 * 65536, 0x10000n), /it shares tables with a snapshot/],
    [(view) => view.setUint32(16, 0), /the name of its backing file is out of bounds/, backed],
    [(view) => view.setUint32(16, 5000), /the name of its backing file is out of bounds/, backed],
    [(view) => view.setUint32(12, 65530), /the name of its backing file is out of bounds/, backed],
    [(view) => view.setUint32(108, 0xffff_fff0), /an extension of its header is out of bounds/, backed],
    [(view) => view.setUint32(112, 0x766d646b), /has the format "vmd": only raw and qcow2 will do/, backed],
    [(view) => view.setUint32(104, 1), /has the format "": only raw and qcow2 will do/, backed],
    [(view) => view.setUint8(130, 58), /is not a path/, backed],
    [() => {}, /base.raw" as a disk as open\(.*ENOENT/, backed],
  ];
  const options: OpenBlockFileOptions = { memory: f.memory, format: "qcow2" };
  for (const [change, reason, from = good] of cases) {
    const bytes = from.slice();
    change(new DataView(bytes.buffer));
    Deno.writeFileSync(f.path("disk"), bytes);
    assert.throws(() => openBlockFile(f.path("disk"), options), (error: Error) => {
      assert.match(error.message, /^Cannot open the qcow2 image ".*disk" as /);
      assert.match(error.message, reason);
      return true;
    });
  }
  Deno.writeFileSync(f.path("disk"), good);
  openBlockFile(f.path("disk"), options)[Symbol.dispose]();
  Deno.writeFileSync(f.path("disk"), good.subarray(0, 60));
  assert.throws(() => openBlockFile(f.path("disk"), options), /it is no qcow2 image/);
  Deno.writeFileSync(f.path("disk"), good.subarray(0, 80));
  assert.throws(() => openBlockFile(f.path("disk"), options), /its header is cut off/);
});

Deno.test("Images of garbage are refused or fail, and nothing worse", async () => {
  const random = seededRandom(99);
  let [opened, failed] = [0, 0];
  const images = new Map<string, Uint8Array>();
  for (let round = 0; round < 400; round++) {
    using f = folder();
    const options = { memory: f.memory, format: "qcow2", backingDepth: 0 } as const;
    const [version, clusterBits] = [2 + random(2), 9 + random(4)];
    let image = images.get(`${version} ${clusterBits}`);
    if (!image) {
      Deno.writeFileSync(f.path("disk"), makeImage({ version, clusterBits, refcountOrder: 4, size: SIZE }));
      const file = openBlockFile(f.path("disk"), options);
      for (let count = 0; count < 10; count++) {
        await file.write(random(SIZE / 512 - 20) * 512, [{ offset: 0, length: 512 * 20 }]);
      }
      await file.close();
      images.set(`${version} ${clusterBits}`, image = Deno.readFileSync(f.path("disk")));
    }
    const bytes = image.slice();
    const cluster = 2 ** clusterBits;
    // The header, or anything; tables lead into the image as a rule.
    for (let count = random(12); count > 0; count--) {
      const at = random(3) === 0 ? random(104) : random(bytes.length);
      bytes[at] = random(256);
    }
    const view = new DataView(bytes.buffer);
    for (let count = random(20); count > 0; count--) {
      // The first table of the second level, or anything.
      const table = new DataView(image.buffer).getUint32(3 * cluster + 4);
      const at = random(2) === 0
        ? table + random(Math.min(cluster / 8, SIZE / cluster)) * 8
        : cluster + random((bytes.length - cluster) / 8) * 8;
      const flags = [0n, 1n, 1n << 62n, 1n << 63n, 1n << 63n][random(5)]!;
      view.setBigUint64(
        at,
        BigInt(random(bytes.length / cluster + 1) * cluster + (random(6) === 0 ? 512 * random(9) : 0)) |
          flags,
      );
    }
    Deno.writeFileSync(f.path("disk"), bytes);
    let file: BlockFile;
    try {
      file = openBlockFile(f.path("disk"), options);
    } catch (error) {
      assert.match(String(error), /Cannot open the qcow2 image/);
      continue;
    }
    opened++;
    for (let step = 0; step < 20; step++) {
      if (file.size < 512) break;
      const offset = random(Math.min(file.size, SIZE) / 512) * 512;
      const length = Math.min(file.size - offset, 512 * (1 + random(100)));
      const segments = [{ offset: 0, length }];
      try {
        const kind = random(5);
        if (kind === 0) await file.read(offset, segments);
        else if (kind === 1) await file.discard(offset, length);
        else if (kind === 2) await file.writeZeroes(offset, length, true);
        else if (kind === 3) await file.flush();
        else await file.write(offset, segments);
      } catch (error) {
        assert.match(String(error), /is corrupt|as many clusters as it can have|EFBIG|EINVAL/);
        failed++;
      }
    }
    await file.close().catch((error) => assert.match(String(error), /is corrupt|EFBIG|EINVAL/));
    assert.ok(Deno.statSync(f.path("disk")).blocks! * 512 < 64 * 2 ** 20);
  }
  assert.ok(opened > 100 && failed > 30, `${opened} were opened and ${failed} requests failed`);
});
