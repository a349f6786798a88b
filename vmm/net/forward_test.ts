import assert from "node:assert/strict";
import type { Socket } from "node:dgram";
import { once } from "node:events";
import { MachineError } from "../errors.ts";
import { dnsForwards, limitedSender, openUdp, type PortForward, PortForwards } from "./forward.ts";

const HOST = "127.0.0.1";
/** Loopback addresses stand for guests. */
const GUEST = "127.0.0.2";

function freePort(): number {
  using listener = Deno.listen({ hostname: HOST, port: 0 });
  return listener.addr.port;
}

function forward(port: number, guest: number, more: Partial<PortForward> = {}): PortForward {
  return { protocol: "tcp", address: HOST, host: port, guest, guestIp: GUEST, ...more };
}

/** A guest that answers each connection with what it heard, once it has heard all. */
function tcpGuest(prefix = "", hostname = GUEST): Deno.TcpListener {
  const listener = Deno.listen({ hostname, port: 0 });
  (async () => {
    for await (const connection of listener) answer(connection, prefix).catch(() => connection.close());
  })();
  return listener;
}

async function answer(connection: Deno.TcpConn, prefix: string): Promise<void> {
  const heard: Uint8Array[] = [text(prefix)];
  const buffer = new Uint8Array(65_536);
  for (let count; (count = await connection.read(buffer)) !== null;) heard.push(buffer.slice(0, count));
  for (const part of heard) {
    for (let at = 0; at < part.length;) at += await connection.write(part.subarray(at));
  }
  connection.close();
}

/** Sends all, says that this was all, and hears the answer to its end. */
async function ask(port: number, data: Uint8Array): Promise<Uint8Array> {
  const connection = await Deno.connect({ hostname: HOST, port });
  for (let at = 0; at < data.length;) at += await connection.write(data.subarray(at));
  await connection.closeWrite();
  return await new Response(connection.readable).bytes();
}

async function udp(address: string, port = 0): Promise<Socket> {
  const socket = openUdp(address);
  socket.bind(port, address);
  await once(socket, "listening");
  return socket;
}

async function hear(socket: Socket): Promise<{ text: string; port: number; address: string }> {
  const [data, { port, address }] = await once(socket, "message");
  return { text: String(data), port, address };
}

const text = (words: string) => new TextEncoder().encode(words);

Deno.test("a TCP forward carries all bytes both ways, and each end's end", async () => {
  using guest = tcpGuest();
  using forwards = new PortForwards();
  const port = freePort();
  await forwards.set([forward(port, guest.addr.port)]);
  const data = Uint8Array.from({ length: 3_000_000 }, (_, index) => index * 7 + (index >> 8));
  const answers = await Promise.all([
    ask(port, data),
    ask(port, text("hello")),
    ask(port, new Uint8Array(0)),
  ]);
  assert.ok(answers[0]!.length === data.length && answers[0]!.every((byte, index) => byte === data[index]));
  assert.deepEqual(answers.slice(1), [text("hello"), new Uint8Array(0)]);
});

Deno.test("a client of a guest that does not listen hears the end", async () => {
  using forwards = new PortForwards();
  const port = freePort();
  await forwards.set([forward(port, freePort())]);
  using connection = await Deno.connect({ hostname: HOST, port });
  const found = await connection.read(new Uint8Array(1)).catch((error) => error);
  assert.ok(found === null || found instanceof Deno.errors.ConnectionReset, String(found));
});

Deno.test("forwards come, change and go while others work", async () => {
  using one = tcpGuest("one ");
  using two = tcpGuest("two ");
  using forwards = new PortForwards();
  const [first, second] = [freePort(), freePort()];
  await forwards.set([forward(first, one.addr.port)]);
  const held = await Deno.connect({ hostname: HOST, port: first });
  await forwards.set([forward(first, two.addr.port), forward(second, one.addr.port)]);
  assert.deepEqual(await ask(first, text("a")), text("two a"));
  assert.deepEqual(await ask(second, text("b")), text("one b"));
  // The connection from before goes on where it was.
  await held.write(text("c"));
  await held.closeWrite();
  assert.deepEqual(await new Response(held.readable).bytes(), text("one c"));
  await forwards.set([forward(second, one.addr.port)]);
  await assert.rejects(Deno.connect({ hostname: HOST, port: first }), Deno.errors.ConnectionRefused);
  assert.deepEqual(await ask(second, text("d")), text("one d"));
});

Deno.test("removing a forward ends its connections", async () => {
  using guest = tcpGuest();
  using forwards = new PortForwards();
  const port = freePort();
  await forwards.set([forward(port, guest.addr.port)]);
  const connection = await Deno.connect({ hostname: HOST, port });
  await connection.write(text("unfinished"));
  await forwards.set([]);
  assert.ok((await new Response(connection.readable).bytes().catch(() => new Uint8Array(0))).length === 0);
});

Deno.test("a port in use is named, for each protocol", async () => {
  using forwards = new PortForwards();
  using taken = Deno.listen({ hostname: HOST, port: 0 });
  const { port } = taken.addr;
  await assert.rejects(forwards.set([forward(port, 80)]), (error) => {
    assert.ok(error instanceof MachineError);
    assert.equal(
      error.message,
      `Cannot forward port ${port} of 127.0.0.1 to port 80 of the guest as port ${port} of 127.0.0.1 is in use: ` +
        "choose another host port, or end what uses it",
    );
    return true;
  });
  const socket = await udp(HOST);
  const udpPort = socket.address().port;
  await assert.rejects(
    forwards.set([forward(udpPort, 53, { protocol: "udp" })]),
    new RegExp(`port ${udpPort} of 127.0.0.1 is in use`),
  );
  socket.close();
  await once(socket, "close");
  // What failed is tried again.
  await forwards.set([forward(udpPort, 53, { protocol: "udp" })]);
  await assert.rejects(
    forwards.set([forward(1024, 1, { address: "192.0.2.77" })]),
    /has no address 192.0.2.77/,
  );
});

Deno.test("a UDP forward keeps its clients apart, and takes answers of the guest only", async () => {
  const [guest, one, two, stranger] = await Promise.all([udp(GUEST), udp(HOST), udp(HOST), udp(HOST)]);
  using forwards = new PortForwards();
  const port = freePort();
  await forwards.set([forward(port, guest.address().port, { protocol: "udp" })]);
  let heard = hear(guest);
  one.send("one", port, HOST);
  const first = await heard;
  assert.equal(first.text, "one");
  heard = hear(guest);
  const large = "x".repeat(60_000);
  two.send(large, port, HOST);
  const second = await heard;
  assert.equal(second.text, large);
  assert.notEqual(first.port, second.port);
  const answers = [hear(one), hear(two)];
  stranger.send("forged", first.port, HOST);
  guest.send("for two", second.port, HOST);
  assert.equal((await answers[1]!).text, "for two");
  guest.send("for one", first.port, HOST);
  const answer = await answers[0]!;
  assert.deepEqual([answer.text, answer.port], ["for one", port]);
  for (const socket of [guest, one, two, stranger]) socket.close();
});

Deno.test("a UDP forward forgets the peer that was silent longest when there are too many", async () => {
  const guest = await udp(GUEST);
  using forwards = new PortForwards();
  const port = freePort();
  await forwards.set([forward(port, guest.address().port, { protocol: "udp" })]);
  const clients = await Promise.all(Array.from({ length: 513 }, () => udp(HOST)));
  const ports: number[] = [];
  for (const client of clients) {
    const heard = hear(guest);
    client.send("hello", port, HOST);
    ports.push((await heard).port);
  }
  for (const [index, isSame] of [[512, true], [0, false]] as const) {
    const heard = hear(guest);
    clients[index]!.send("again", port, HOST);
    assert.equal((await heard).port === ports[index], isSame);
  }
  for (const socket of [guest, ...clients]) socket.close();
});

Deno.test("a UDP forward that gets another guest takes its peers along", async () => {
  const [one, two, client] = await Promise.all([udp(GUEST), udp(GUEST), udp(HOST)]);
  using forwards = new PortForwards();
  const port = freePort();
  const heard: string[] = [];
  const ports: number[] = [];
  const call = async (guest: Socket) => {
    await forwards.set([forward(port, guest.address().port, { protocol: "udp" })]);
    const answer = hear(client);
    client.send("call", port, HOST);
    heard.push((await answer).text);
  };
  for (const [name, guest] of [["one", one], ["two", two]] as const) {
    guest.on("message", (_, from) => {
      ports.push(from.port);
      guest.send(name, from.port, from.address);
    });
  }
  await call(one);
  await call(one);
  await call(two);
  assert.deepEqual(heard, ["one", "one", "two"]);
  // One that stays the same goes on.
  assert.equal(ports[0], ports[1]);
  for (const socket of [one, two, client]) socket.close();
});

Deno.test("an IPv6 guest answers by whichever way its address is written", async () => {
  const [guest, client] = await Promise.all([udp("::1"), udp(HOST)]);
  guest.on("message", (data, { port, address }) => guest.send(data, port, address));
  using forwards = new PortForwards();
  const port = freePort();
  for (const guestIp of ["0:0:0:0:0:0:0:1", "::0001", "::1%1"]) {
    await forwards.set([forward(port, guest.address().port, { protocol: "udp", guestIp })]);
    const answer = hear(client);
    client.send(guestIp, port, HOST);
    assert.equal((await answer).text, guestIp);
  }
  for (const socket of [guest, client]) socket.close();
});

Deno.test("datagrams that a closed socket still had do not count for ever", async () => {
  const send = limitedSender();
  for (let round = 0; round < 3; round++) {
    const sockets = Array.from({ length: 100 }, () => openUdp(HOST));
    const closed = Promise.all(sockets.map((socket) => once(socket, "close")));
    for (const socket of sockets) {
      send(socket, text("lost"), 9, HOST);
      send(socket, text("lost"), 9, HOST);
      socket.close();
    }
    await closed;
  }
  // All are free again, and no more than there were.
  let sent = 0;
  const socket = Object.assign(openUdp(HOST), { send: () => void sent++ });
  for (let count = 0; count < 300; count++) send(socket, text("more"), 9, HOST);
  assert.equal(sent, 256);
  socket.close();
});

Deno.test("name servers of the host answer for both protocols, and others take over", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const path = `${folder}/resolv.conf`;
    assert.equal(dnsForwards(HOST, path)[0]!.guestIp, "127.0.0.1");
    await Deno.writeTextFile(
      path,
      `# comment\nsearch example.org\nnameserver ${GUEST}\nnameserver 127.0.0.9\n`,
    );
    const found = dnsForwards(HOST, path);
    assert.deepEqual(
      found.map(({ protocol, address, host, guest, guestIp }) => [protocol, address, host, guest, guestIp]),
      [["udp", HOST, 53, 53, GUEST], ["tcp", HOST, 53, 53, GUEST]],
    );
    // Two processes serve the same address: here both are this one.
    const server = await udp(GUEST);
    using tcpServer = tcpGuest("by tcp ");
    const port = freePort();
    const at = (ports: readonly number[]) =>
      found.map((each, index): PortForward => ({ ...each, host: port, guest: ports[index]! }));
    const ports = [server.address().port, tcpServer.addr.port];
    const former = new PortForwards();
    using latter = new PortForwards();
    await former.set(at(ports));
    await latter.set(at(ports));
    for (const step of ["both", "latter"]) {
      if (step === "latter") former[Symbol.dispose]();
      const client = await udp(HOST);
      const [query, answer] = [hear(server), hear(client)];
      client.send(step, port, HOST);
      const { text: name, port: from } = await query;
      server.send(`${name} by udp`, from, HOST);
      assert.equal((await answer).text, `${step} by udp`);
      assert.deepEqual(await ask(port, text(step)), text(`by tcp ${step}`));
      client.close();
    }
    server.close();
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
