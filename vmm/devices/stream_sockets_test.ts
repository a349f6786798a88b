import assert from "node:assert/strict";
import { PortableSockets, type StreamListener, type StreamSocket } from "./stream_sockets.ts";

/** A listener, and waiting for what happens to sockets. */
class Bench implements Disposable {
  readonly directory = Deno.makeTempDirSync();
  readonly path = `${this.directory}/a.sock`;
  readonly sockets = new PortableSockets();

  listen(): Promise<StreamListener> {
    return this.sockets.listen(this.path);
  }

  connect(): Promise<Deno.UnixConn> {
    return Deno.connect({ transport: "unix", path: this.path });
  }

  /** Both ends of a connection. */
  async pair(listener: StreamListener): Promise<[StreamSocket, Deno.UnixConn]> {
    const peer = await this.connect();
    let socket = listener.accept();
    while (!socket) {
      await changed(listener);
      socket = listener.accept();
    }
    return [socket, peer];
  }

  [Symbol.dispose](): void {
    this.sockets[Symbol.dispose]();
    Deno.removeSync(this.directory, { recursive: true });
  }
}

/** Waits until something has changed; tells whether the peer has left. */
function changed(subject: StreamSocket | StreamListener): Promise<boolean> {
  return new Promise((resolve) => {
    subject.onChange = resolve;
  });
}

async function left(socket: StreamSocket): Promise<void> {
  while (!(await changed(socket)));
}

/** Sends until nothing more is taken, not even after a while, and tells how much was. */
async function fill(socket: StreamSocket): Promise<number> {
  const bytes = new Uint8Array(10_000);
  let total = 0;
  for (let idle = 0; idle < 20; idle++) {
    const count = socket.send(bytes);
    total += count;
    if (count > 0) idle = 0;
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  return total;
}

Deno.test("PortableSockets carries bytes both ways, and tells of room", async () => {
  using bench = new Bench();
  const [socket, peer] = await bench.pair(await bench.listen());
  const target = new Uint8Array(3);
  assert.equal(socket.receive(target), 0);
  let change = changed(socket);
  await peer.write(new Uint8Array([1, 2, 3, 4]));
  assert.equal(await change, false);
  assert.deepEqual([socket.receive(target), ...target], [3, 1, 2, 3]);
  assert.deepEqual([socket.receive(target), target[0]], [1, 4]);
  assert.equal(socket.receive(target), 0);
  // More than there is room for.
  const bytes = new Uint8Array(300_000).map((_, index) => index % 251);
  const received: number[] = [];
  const buffer = new Uint8Array(100_000);
  let sent = 0;
  const send = () => {
    while (sent < bytes.length) {
      const count = socket.send(bytes.subarray(sent));
      assert.ok(count >= 0);
      if (count === 0) return;
      sent += count;
    }
  };
  socket.onChange = send;
  send();
  assert.ok(sent > 0 && sent < bytes.length);
  while (received.length < bytes.length) received.push(...buffer.subarray(0, (await peer.read(buffer))!));
  assert.deepEqual(new Uint8Array(received), bytes);
  change = changed(socket);
  socket[Symbol.dispose]();
  assert.deepEqual([socket.receive(target), socket.send(target)], [-1, -1]);
  assert.equal(await peer.read(buffer), null);
  peer.close();
});

Deno.test("PortableSockets keeps no more than it says of what nobody takes", async () => {
  using bench = new Bench();
  const [socket, peer] = await bench.pair(await bench.listen());
  // What the kernel has room for is known only by what comes out again.
  const total = await fill(socket);
  const buffer = new Uint8Array(65_536);
  // Nobody reads what the peer sends: it has to wait.
  let taken = 0;
  let isWaiting = true;
  const writing = (async () => {
    const bytes = new Uint8Array(10_000);
    while (isWaiting) taken += await peer.write(bytes);
  })();
  let before = -1;
  while (taken > before) {
    before = taken;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.ok(total > 2 * 65_536 && total < 2_000_000, String(total));
  assert.ok(taken >= 65_536 && taken < 2_000_000, String(taken));
  isWaiting = false;
  // No more than one buffer is there at once.
  const all = new Uint8Array(1_000_000);
  assert.equal(socket.receive(all), 65_536);
  assert.equal(socket.receive(all), 0);
  socket.onChange = () => void socket.receive(all);
  await writing;
  let read = 0;
  while (read < total) read += (await peer.read(buffer))!;
  assert.equal(read, total);
  peer.close();
});

Deno.test("PortableSockets tells that a peer has left, though there is no room for what it sent", async () => {
  using bench = new Bench();
  const [socket, peer] = await bench.pair(await bench.listen());
  const gone = left(socket);
  // The kernel takes what the socket has no room for.
  for (let at = 0; at < 100_000;) at += await peer.write(new Uint8Array(100_000 - at));
  peer.close();
  await gone;
  assert.equal(socket.send(new Uint8Array(1)), -1);
  // What it sent is still there.
  const target = new Uint8Array(100_000);
  let total = 0;
  for (let count = 0; count >= 0; count = socket.receive(target)) {
    total += count;
    if (count === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  assert.equal(total, 100_000);
});

Deno.test("PortableSockets goes on sending to a peer that sends no more, until that leaves", async () => {
  using bench = new Bench();
  const [socket, peer] = await bench.pair(await bench.listen());
  const target = new Uint8Array(10);
  const change = changed(socket);
  await peer.closeWrite();
  assert.equal(await change, false);
  assert.equal(socket.receive(target), -1);
  assert.equal(socket.send(new Uint8Array([7])), 1);
  assert.deepEqual([await peer.read(target), target[0]], [1, 7]);
  const gone = left(socket);
  peer.close();
  await gone;
  assert.equal(socket.send(target), -1);
});

Deno.test("PortableSockets brings what was sent to the peer of a closed socket, and to no more than one of them", async () => {
  using bench = new Bench();
  const listener = await bench.listen();
  const peers: [Deno.UnixConn, number][] = [];
  for (let count = 0; count < 3; count++) {
    const [socket, peer] = await bench.pair(listener);
    peers.push([peer, await fill(socket)]);
    socket[Symbol.dispose]();
  }
  const read: boolean[] = [];
  for (const [peer, sent] of peers) {
    const buffer = new Uint8Array(65_536);
    let total = 0;
    for (let count: number | null = 0; count !== null; count = await peer.read(buffer)) total += count;
    read.push(total === sent);
    peer.close();
  }
  assert.deepEqual(read, [false, false, true]);
});

Deno.test("PortableSockets lets clients wait, removes its files, and makes them anew at once", async () => {
  using bench = new Bench();
  for (let round = 0; round < 3; round++) {
    const listener = await bench.listen();
    const [first, one] = await bench.pair(listener);
    const two = await bench.connect();
    const three = await bench.connect();
    const [target, bytes] = [new Uint8Array(1), new Uint8Array([round])];
    await three.write(bytes);
    first[Symbol.dispose]();
    for (const peer of [two, three]) {
      let socket = listener.accept();
      while (!socket) {
        await changed(listener);
        socket = listener.accept();
      }
      if (peer === two) continue;
      while (socket.receive(target) === 0) await changed(socket);
      assert.equal(target[0], round);
    }
    listener[Symbol.dispose]();
    listener[Symbol.dispose]();
    assert.deepEqual([...Deno.readDirSync(bench.directory)], []);
    for (const each of [one, two, three]) each.close();
  }
  await bench.listen();
  assert.equal(Deno.statSync(bench.path).mode! & 0o777, 0o600);
});
