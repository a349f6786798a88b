import assert from "node:assert/strict";
import { join } from "node:path";
import { MachineError } from "../errors.ts";
import { FrameStream } from "./frame_stream.ts";
import { MAX_FRAME } from "./switch.ts";

async function connect(): Promise<[Deno.UnixConn, Deno.UnixConn]> {
  const folder = await Deno.makeTempDir();
  const path = join(folder, "s");
  using listener = Deno.listen({ transport: "unix", path });
  const pair = await Promise.all([listener.accept(), Deno.connect({ transport: "unix", path })]);
  await Deno.remove(folder, { recursive: true });
  return pair;
}

function frame(length: number, seed: number): Uint8Array {
  return Uint8Array.from({ length }, (_, index) => index * 7 + seed);
}

function prefix(length: number): Uint8Array {
  const bytes = new Uint8Array(4);
  new DataView(bytes.buffer).setUint32(0, length);
  return bytes;
}

Deno.test("frames of all lengths arrive whole and in order, however the stream is cut", async () => {
  const [one, two] = await connect();
  using target = new FrameStream(two);
  const frames = [frame(14, 1), frame(0, 2), frame(MAX_FRAME, 3), frame(1514, 4), frame(60, 5)];
  const bytes = new Uint8Array(
    await new Blob(frames.flatMap((each) => [prefix(each.length), each] as BlobPart[])).arrayBuffer(),
  );
  const heard: Uint8Array[] = [];
  const ended = target.receive((each) => heard.push(each.slice()));
  for (let at = 0, step = 1; at < bytes.length; at += step, step = step % 9973 + 1) {
    const part = bytes.subarray(at, at + step);
    for (let sent = 0; sent < part.length;) sent += await one.write(part.subarray(sent));
  }
  one.close();
  await ended;
  assert.equal(heard.length, frames.length);
  heard.forEach((each, index) => assert.deepEqual(each, frames[index]));
});

Deno.test("two streams carry frames both ways", async () => {
  const [one, two] = (await connect()).map((each) => new FrameStream(each)) as [FrameStream, FrameStream];
  const heard: number[] = [];
  const echo = two.receive((each) => void two.send(each));
  const done = Promise.withResolvers<void>();
  const back = one.receive((each) => {
    assert.deepEqual(each, frame(each.length, heard.length));
    heard.push(each.length);
    if (heard.length === 200) done.resolve();
  });
  for (let index = 0; index < 200; index++) assert.ok(one.send(frame(20 + index * 5, index)));
  await done.promise;
  one[Symbol.dispose]();
  await Promise.all([echo, back]);
  assert.equal(one.send(frame(20, 0)), false);
  two[Symbol.dispose]();
});

Deno.test("what a reader is too slow for is refused, and nothing is kept beyond the queue", async () => {
  const [one, two] = await connect();
  using source = new FrameStream(one);
  const sent: number[] = [];
  for (let index = 0; index < 5000; index++) {
    if (source.send(frame(1514, index))) sent.push(index);
    // Lets the kernel take what it has room for.
    if (index % 100 === 0) await new Promise((resolve) => setTimeout(resolve));
  }
  assert.ok(sent.length < 2500, `${sent.length} of 5000 frames were taken`);
  assert.equal(source.send(new Uint8Array(MAX_FRAME + 1)), false);
  // What was taken is there, whole.
  using target = new FrameStream(two);
  const heard: number[] = [];
  const done = Promise.withResolvers<void>();
  void target.receive((each) => {
    assert.deepEqual(each, frame(1514, sent[heard.length]!));
    heard.push(each.length);
    if (heard.length === sent.length) done.resolve();
  });
  await done.promise;
  assert.ok(source.send(frame(60, 1)));
});

Deno.test("a length that no frame has ends the stream", async () => {
  for (const length of [MAX_FRAME + 1, 2 ** 31, 2 ** 32 - 1]) {
    const [one, two] = await connect();
    using target = new FrameStream(two);
    await one.write(prefix(14));
    await one.write(frame(14, 0));
    await one.write(prefix(length));
    let count = 0;
    await assert.rejects(target.receive(() => count++), MachineError);
    assert.equal(count, 1);
    one.close();
  }
});
