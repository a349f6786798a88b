import assert from "node:assert/strict";
import { Mapping } from "../../ffi/mod.ts";
import { emptyQcow2 } from "../images/qcow2.ts";
import { DiskLock, fillZeroes, type HostMemory, hostMemory, RawFile, sliceSegments } from "./block_file.ts";

const MIB = 2 ** 20;

interface Bench extends Disposable {
  path: string;
  memory: HostMemory;
}

function bench(content: Uint8Array | number): Bench {
  const folder = Deno.makeTempDirSync({ prefix: "hypertopia-raw-" });
  const path = `${folder}/disk`;
  const mapping = new Mapping(16 * MIB);
  Deno.writeFileSync(path, typeof content === "number" ? new Uint8Array(content) : content);
  return {
    path,
    memory: hostMemory(mapping),
    [Symbol.dispose]() {
      mapping[Symbol.dispose]();
      Deno.removeSync(folder, { recursive: true });
    },
  };
}

function pattern(length: number): Uint8Array {
  return new Uint8Array(length).map((_, index) => (index * 7 + (index >> 9)) & 0xff);
}

const hasQemu = await new Deno.Command("qemu-io", { args: ["--version"] }).output().then(
  () => true,
  () => false,
);

/** Whether the file system of temporary files can go past the page cache; some in memory cannot. */
const hasDirect = ((): boolean => {
  using b = bench(MIB);
  try {
    new RawFile(b.path, { memory: b.memory, isDirect: true })[Symbol.dispose]();
    return true;
  } catch (error) {
    assert.match(String(error), /EINVAL|has no direct I\/O/);
    return false;
  }
})();

Deno.test("sliceSegments() and fillZeroes() take parts of segments", () => {
  const segments = [{ offset: 10, length: 5 }, { offset: 0, length: 0 }, { offset: 100, length: 5 }];
  assert.deepEqual(sliceSegments(segments, 0, 10), [segments[0], segments[2]]);
  assert.deepEqual(sliceSegments(segments, 3, 4), [{ offset: 13, length: 2 }, { offset: 100, length: 2 }]);
  assert.deepEqual(sliceSegments(segments, 5, 100), [{ offset: 100, length: 5 }]);
  assert.deepEqual(sliceSegments(segments, 10, 1), []);
  const bytes = new Uint8Array(200).fill(1);
  fillZeroes({ address: 0, bytes }, segments, 3);
  assert.deepEqual([...bytes.keys()].filter((index) => bytes[index] === 0), [
    13,
    14,
    100,
    101,
    102,
    103,
    104,
  ]);
});

Deno.test("RawFile moves small and large requests, in up to any number of segments", async () => {
  const content = pattern(12 * MIB);
  using b = bench(content);
  using file = new RawFile(b.path, { memory: b.memory });
  assert.equal(file.size, 12 * MIB);
  for (const length of [512, 4096, 300 * 1024, 9 * MIB]) {
    b.memory.bytes.fill(0);
    await file.read(1024, [{ offset: 100, length }]);
    assert.deepEqual(b.memory.bytes.subarray(100, 100 + length), content.subarray(1024, 1024 + length));
  }
  // More than one system call can take.
  const segments = Array.from(
    { length: 3000 },
    (_, index) => ({ offset: (2999 - index) * 512, length: 512 }),
  );
  await file.read(0, segments);
  assert.deepEqual(b.memory.bytes.subarray(2999 * 512, 3000 * 512), content.subarray(0, 512));
  assert.deepEqual(b.memory.bytes.subarray(0, 512), content.subarray(2999 * 512, 3000 * 512));
  b.memory.bytes.fill(0xab, 0, 6 * MIB);
  await file.write(MIB, [{ offset: 0, length: 5 * MIB }, { offset: 5 * MIB, length: 512 }]);
  await file.write(8 * MIB, segments);
  await file.flush();
  content.fill(0xab, MIB, 6 * MIB + 512);
  content.fill(0xab, 8 * MIB, 8 * MIB + 3000 * 512);
  assert.deepEqual(Deno.readFileSync(b.path), content);
});

Deno.test("RawFile serves more requests at once than the pool has threads", async () => {
  const content = pattern(8 * MIB);
  using b = bench(content);
  using file = new RawFile(b.path, { memory: b.memory });
  const length = 300 * 1024;
  const pending = Array.from({ length: 100 }, (_, index) => {
    const result = file.read(index * 512, [{ offset: index * 512, length }]);
    assert.ok(result);
    return result;
  });
  assert.equal(file.isBusy, true);
  await Promise.all(pending);
  assert.equal(file.isBusy, false);
  assert.deepEqual(b.memory.bytes.subarray(0, length), content.subarray(0, length));
});

Deno.test("RawFile reads zeros behind the end of a file that has become shorter", async () => {
  for (const isDirect of hasDirect ? [false, true] : [false]) {
    const content = pattern(MIB + 700);
    using b = bench(content);
    using file = new RawFile(b.path, { memory: b.memory, isDirect });
    assert.equal(file.size, MIB + 512);
    Deno.truncateSync(b.path, 100_000);
    b.memory.bytes.fill(1);
    await file.read(512, [{ offset: 0, length: 4096 }, { offset: 4096, length: 507_904 }]);
    assert.deepEqual(b.memory.bytes.subarray(0, 100_000 - 512), content.subarray(512, 100_000));
    assert.ok(b.memory.bytes.subarray(100_000 - 512, 512_000).every((byte) => byte === 0));
  }
});

Deno.test({
  name: `RawFile goes past the page cache, but for what is not aligned${
    hasDirect ? "" : " (ignored as the file system cannot)"
  }`,
  ignore: !hasDirect,
  async fn() {
    const content = pattern(2 * MIB);
    using b = bench(content);
    using file = new RawFile(b.path, { memory: b.memory, isDirect: true });
    for (
      const [offset, at, length] of [[0, 0, 8192], [4096, 4096, MIB], [512, 13, 1024], [
        8192,
        5,
        3072,
      ]] as const
    ) {
      await file.read(offset, [{ offset: at, length }]);
      assert.deepEqual(b.memory.bytes.subarray(at, at + length), content.subarray(offset, offset + length));
      b.memory.bytes.subarray(at, at + length).fill(offset & 0xff | 1);
      await file.write(offset, [{ offset: at, length }]);
      content.fill(offset & 0xff | 1, offset, offset + length);
      await file.read(offset, [{ offset: at, length }]);
      assert.deepEqual(b.memory.bytes.subarray(at, at + length), content.subarray(offset, offset + length));
    }
    await file.close();
    assert.deepEqual(Deno.readFileSync(b.path), content);
  },
});

Deno.test("RawFile gives room back and writes zeros", async () => {
  using b = bench(new Uint8Array(4 * MIB).fill(1));
  using file = new RawFile(b.path, { memory: b.memory });
  const blocks = (): number => Deno.statSync(b.path).blocks!;
  const full = blocks();
  await file.discard(0, MIB);
  await file.writeZeroes(MIB, MIB, true);
  const less = blocks();
  assert.ok(less <= full - 2 * MIB / 512 + 64, `${full} blocks and then ${less}`);
  await file.writeZeroes(2 * MIB + 512, 1024, false);
  assert.ok(blocks() >= less);
  const content = Deno.readFileSync(b.path);
  assert.equal(content.findIndex((byte) => byte !== 0), 2 * MIB);
  assert.equal(content.indexOf(0, 2 * MIB), 2 * MIB + 512);
  assert.equal(content.indexOf(1, 2 * MIB + 512), 2 * MIB + 1536);
  assert.equal(content.length, 4 * MIB);
});

Deno.test("RawFile grows, and takes a file that has grown as it is", () => {
  using b = bench(MIB);
  using file = new RawFile(b.path, { memory: b.memory });
  file.resize(2 * MIB);
  assert.equal(Deno.statSync(b.path).size, 2 * MIB);
  Deno.truncateSync(b.path, 3 * MIB + 100);
  assert.equal(file.size, 2 * MIB);
  file.resize();
  assert.equal(file.size, 3 * MIB);
  for (const size of [MIB, 3 * MIB + 1, NaN]) {
    assert.throws(() => file.resize(size), /give a multiple of 512 that is not smaller/);
  }
});

Deno.test("RawFile tells why a request failed", async () => {
  using b = bench(MIB);
  using file = new RawFile(b.path, { memory: b.memory, isReadOnly: true });
  await assert.rejects(Promise.resolve(file.write(0, [{ offset: 0, length: 512 }])), { code: "EBADF" });
  await assert.rejects(file.discard(0, 512), { code: "EBADF" });
  // Not memory of this process.
  const nowhere = { address: 4096, bytes: b.memory.bytes };
  await assert.rejects(Promise.resolve(file.read(0, [{ offset: 0, length: 512 }], nowhere)), {
    code: "EFAULT",
  });
  await assert.rejects(
    Promise.resolve(file.read(0, [{ offset: 0, length: 512 * 1024 }], nowhere)),
    /preadv2\(".*disk"\) failed with EFAULT/,
  );
  assert.equal(file.isBusy, false);
});

Deno.test("RawFile that is disposed of ends what is under way and begins nothing", async () => {
  const content = pattern(8 * MIB);
  using b = bench(content);
  const file = new RawFile(b.path, { memory: b.memory });
  const read = file.read(0, [{ offset: 0, length: 8 * MIB }]);
  file[Symbol.dispose]();
  file[Symbol.dispose]();
  assert.throws(() => file.read(0, [{ offset: 0, length: 512 }]), /Cannot use ".*disk" as it is closed/);
  assert.throws(() => file.flush(), ReferenceError);
  await assert.rejects(file.discard(0, 512), ReferenceError);
  await read;
  assert.deepEqual(b.memory.bytes.subarray(0, 8 * MIB), content);
  assert.throws(() => file.length, /is closed/);
});

Deno.test("RawFile is written by one and read by many, but not at once", () => {
  using b = bench(MIB);
  const memory = b.memory;
  const read = (): RawFile => new RawFile(b.path, { memory, isReadOnly: true });
  {
    using _ = new RawFile(b.path, { memory });
    assert.throws(() => new RawFile(b.path, { memory }), {
      message: `Cannot open "${b.path}" as a disk to write to as another process has it open: ` +
        `stop that machine or tool first`,
    });
    assert.throws(read, /as a disk as another process writes to it/);
    new RawFile(b.path, { memory, isLocked: false })[Symbol.dispose]();
  }
  using _one = read();
  using _two = read();
  assert.throws(() => new RawFile(b.path, { memory }), /another process has it open/);
});

Deno.test("DiskLock keeps others from a disk that something else reads and writes", () => {
  using b = bench(MIB);
  {
    using _ = new DiskLock(b.path, false);
    assert.throws(() => new RawFile(b.path, { memory: b.memory }), /another process has it open/);
    assert.throws(() => new DiskLock(b.path, true), {
      message: `Cannot lock "${b.path}" as another process writes to it: stop that machine or tool first`,
    });
  }
  using _file = new RawFile(b.path, { memory: b.memory, isReadOnly: true });
  using _lock = new DiskLock(b.path, true);
  assert.throws(() => new DiskLock(b.path, false), /another process has it open/);
  assert.throws(() => new DiskLock(`${b.path}.absent`, false), /^Error: Cannot lock ".*" as .*ENOENT/);
});

Deno.test({
  name: `RawFile and QEMU keep one another from a file${
    hasQemu ? "" : " (ignored as qemu-img is not installed)"
  }`,
  ignore: !hasQemu,
  async fn() {
    // QEMU's own tools allow more for raw files than its machines do.
    using b = bench(emptyQcow2(MIB));
    const run = async (name: string, ...args: string[]): Promise<string> => {
      const command = new Deno.Command(name, { args: [...args, b.path], stdin: "null" });
      const { stdout, stderr } = await command.output();
      return new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
    };
    const write = (): Promise<string> => run("qemu-io", "-f", "qcow2", "-c", "write 0 512");
    const info = (): Promise<string> => run("qemu-img", "info", "-f", "qcow2");
    {
      using _ = new RawFile(b.path, { memory: b.memory });
      assert.match(await write(), /Failed to get .* lock/);
      assert.match(await info(), /Failed to get .* lock/);
    }
    {
      using _ = new RawFile(b.path, { memory: b.memory, isReadOnly: true });
      assert.match(await write(), /Failed to get .* lock/);
      assert.match(await info(), /virtual size: 1 MiB/);
    }
    assert.match(await write(), /wrote 512\/512 bytes/);
    const holder = new Deno.Command("qemu-io", {
      args: ["-f", "qcow2", b.path],
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    const output = holder.stdout.getReader();
    // Its prompt says that it has opened the file.
    await output.read();
    assert.throws(() => new RawFile(b.path, { memory: b.memory }), /another process has it open/);
    assert.throws(() => new RawFile(b.path, { memory: b.memory, isReadOnly: true }), /writes to it/);
    await holder.stdin.close();
    await holder.status;
    await output.cancel();
    new RawFile(b.path, { memory: b.memory })[Symbol.dispose]();
  },
});

Deno.test("RawFile refuses what is no disk", async () => {
  using b = bench(MIB);
  const options = { memory: b.memory, isReadOnly: true };
  const folder = b.path.slice(0, b.path.lastIndexOf("/"));
  assert.throws(() => new RawFile(folder, options), /it is neither a file nor a block device/);
  assert.throws(() => new RawFile("/dev/null", options), /it is neither a file nor a block device/);
  assert.throws(
    () => new RawFile(`${folder}/none`, options),
    /Cannot open ".*none" as a disk as open\(.*ENOENT/,
  );
  // Nobody writes to it, so that opening it could wait for ever.
  assert.equal((await new Deno.Command("mkfifo", { args: [`${folder}/pipe`] }).output()).code, 0);
  assert.throws(() => new RawFile(`${folder}/pipe`, options), /it is neither a file nor a block device/);
});
