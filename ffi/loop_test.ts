import assert from "node:assert/strict";
import { type Claim, findWrongClaims, hasHeader, layoutClaims } from "./c_compiler.ts";
import { SysError } from "./errno.ts";
import { Fd } from "./fd.ts";
import { Struct } from "./layout.ts";
import {
  attachLoop,
  detachLoop,
  deviceNumber,
  listLoops,
  LO_FLAGS,
  LOOP,
  loopConfig,
  loopInfo,
  loopLabel,
  resizeLoop,
} from "./loop.ts";

const hasHeaders = await hasHeader("linux/loop.h");
const hasLoops = canUseLoops();

Deno.test({
  name: `tables of loop devices are those of the C headers${
    hasHeaders ? "" : " (skipped: no C compiler with linux/loop.h)"
  }`,
  ignore: !hasHeaders,
  async fn() {
    const named = (prefix: string, values: Readonly<Record<string, number>>): Claim[] =>
      Object.entries(values).map(([name, value]) => [`${prefix}${name}`, value]);
    assert.deepEqual(
      await findWrongClaims(["linux/loop.h"], [
        ...layoutClaims(loopInfo),
        ...layoutClaims(loopConfig),
        ...named("LOOP_", LOOP),
        ...named("LO_FLAGS_", LO_FLAGS),
      ]),
      [],
    );
  },
});

function test(name: string, fn: (folder: string) => void): void {
  Deno.test({
    name: `${name}${hasLoops ? "" : " (skipped: loop devices cannot be used here)"}`,
    ignore: !hasLoops,
    fn() {
      const folder = Deno.makeTempDirSync();
      try {
        fn(folder);
      } finally {
        for (const [path, file] of listLoops()) if (file.startsWith(`${folder}/`)) detachLoop(path);
        Deno.removeSync(folder, { recursive: true });
      }
    },
  });
}

test("a file becomes a block device and is found by its path until it is detached", (folder) => {
  const file = `${folder}/disk with a name that is longer than the kernel's 64 bytes for it, by far.img`;
  Deno.writeFileSync(file, new Uint8Array(1 << 20).fill(7));
  const loop = attachLoop(file, { readOnly: false, label: "of a test" });
  assert.equal(loopLabel(loop.path), "of a test");
  assert.match(loop.path, /^\/dev\/loop\d+$/);
  assert.equal(loop.major, 7);
  assert.equal(`${loop.major}:${loop.minor}`, readSys(loop.path, "dev"));
  assert.equal(listLoops().get(loop.path), file);
  assert.equal(readSys(loop.path, "ro"), "0");
  assert.equal(readSys(loop.path, "loop/autoclear"), "0");
  const device = Deno.openSync(loop.path, { read: true, write: true });
  device.writeSync(new Uint8Array(512).fill(8));
  device.syncSync();
  device.close();
  assert.deepEqual(Deno.readFileSync(file).subarray(511, 513), Uint8Array.of(8, 7));

  Deno.truncateSync(file, 2 << 20);
  assert.equal(readSys(loop.path, "size"), "2048");
  resizeLoop(loop.path);
  assert.equal(readSys(loop.path, "size"), "4096");

  detachLoop(loop.path);
  assert.ok(!listLoops().has(loop.path));
  detachLoop(loop.path);
  detachLoop("/dev/loop-that-never-was");
  assert.throws(() => resizeLoop(loop.path), {
    message: `Cannot resize the loop device "${loop.path}" as no file is attached to it`,
  });
});

test("a device is read-only where it should be", (folder) => {
  const file = `${folder}/disk`;
  Deno.writeFileSync(file, new Uint8Array(4096));
  const loop = attachLoop(file, { readOnly: true, directIo: true });
  assert.equal(readSys(loop.path, "ro"), "1");
  using device = Fd.open(loop.path, 0);
  const info = new Struct(loopInfo);
  device.ioctlBuffer(LOOP.GET_STATUS64, info.bytes, "LOOP_GET_STATUS64");
  assert.equal(Number(info.get("lo_flags")) & ~LO_FLAGS.DIRECT_IO, LO_FLAGS.READ_ONLY);
  assert.equal(info.get("lo_inode"), BigInt(Deno.statSync(file).ino!));
});

test("a device in use is detached when it is closed", (folder) => {
  const file = `${folder}/disk`;
  Deno.writeFileSync(file, new Uint8Array(4096));
  const loop = attachLoop(file, { readOnly: false });
  {
    using _device = Fd.open(loop.path);
    detachLoop(loop.path);
    assert.equal(listLoops().get(loop.path), file);
  }
  assert.ok(!listLoops().has(loop.path));
});

test("each file gets a device of its own, and removed files are told", (folder) => {
  const loops = Array.from({ length: 3 }, (_, index) => {
    Deno.writeFileSync(`${folder}/${index}`, new Uint8Array(4096));
    return attachLoop(`${folder}/${index}`, { readOnly: false });
  });
  assert.equal(new Set(loops.map(({ path }) => path)).size, 3);
  Deno.removeSync(`${folder}/1`);
  assert.equal(listLoops().get(loops[1]!.path), `${folder}/1 (deleted)`);
});

test("errors say in words what is wrong", (folder) => {
  assert.throws(() => attachLoop(`${folder}/absent`, { readOnly: true }), (error: Error) => {
    assert.equal(
      error.message,
      `Cannot attach "${folder}/absent" to a loop device as there is no such file`,
    );
    assert.ok(error.cause instanceof SysError);
    return true;
  });
  Deno.writeTextFileSync(`${folder}/file`, "");
  assert.throws(() => deviceNumber(`${folder}/file`), /as it is no block device/);
});

function readSys(path: string, attribute: string): string {
  return Deno.readTextFileSync(path.replace("/dev/", "/sys/block/") + `/${attribute}`).trim();
}

function canUseLoops(): boolean {
  try {
    using control = Fd.open("/dev/loop-control");
    using _device = Fd.open(`/dev/loop${control.ioctl(LOOP.CTL_GET_FREE, 0, "LOOP_CTL_GET_FREE")}`);
    return true;
  } catch {
    return false;
  }
}
