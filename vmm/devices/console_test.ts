import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { setImmediate } from "node:timers";
import { EventLoop } from "../event_loop.ts";
import { ConsoleDevice, type ConsolePortOptions } from "./console.ts";
import { GuestMemoryError } from "./guest_memory.ts";
import { SharedMemory } from "./shared_memory.ts";
import { PortableSockets, type StreamSockets } from "./stream_sockets.ts";
import { DESC_F, type DriverSegment, seededRandom, TestGuest } from "./test_driver.ts";
import { SocketSet } from "./unix_socket.ts";
import { VirtqueueError } from "./virtqueue.ts";

const [CONTROL_INPUT, CONTROL_OUTPUT] = [2, 3];
const EVENT = { deviceReady: 0, portAdd: 1, portReady: 3, consolePort: 4, portOpen: 6, portName: 7 } as const;
const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** Sockets, and what lets devices see all that has happened to them. */
interface Sockets extends Disposable {
  readonly set: StreamSockets;
  settle(): Promise<void>;
}

/** The kinds of sockets: a console is the same with all of them. */
const KINDS: Readonly<Record<string, () => Sockets>> = {
  "sockets of Linux": () => {
    const loop = new EventLoop();
    const set = new SocketSet(loop);
    return {
      set,
      settle() {
        while (loop.poll(0) > 0);
        return Promise.resolve();
      },
      [Symbol.dispose]() {
        set[Symbol.dispose]();
        loop[Symbol.dispose]();
      },
    };
  },
  "sockets of Deno": () => {
    const set = new PortableSockets();
    return {
      set,
      // One event follows another: a client, what it sent, its end, its leaving, the next client. Deno looks for them once
      // in 61 turns where it has not to wait for any.
      async settle() {
        for (let turn = 0; turn < 400; turn++) await new Promise<void>((resolve) => setImmediate(resolve));
      },
      [Symbol.dispose]: () => set[Symbol.dispose](),
    };
  },
};

type Open = (
  ports: readonly (Omit<ConsolePortOptions, "listener"> & { hasSocket?: boolean })[],
  features?: bigint,
) => Promise<Bench>;

/** Tests with each kind of sockets. */
function test(name: string, run: (open: Open, make: () => Sockets) => Promise<void>): void {
  for (const [kind, make] of Object.entries(KINDS)) {
    Deno.test(`${name} (${kind})`, () => run((...args) => Bench.open(make(), ...args), make));
  }
}

/** A guest with Linux's ways, and the host's end of its ports. */
class Bench implements Disposable {
  readonly directory = Deno.makeTempDirSync();
  readonly output = new Map<number, string>();
  device!: ConsoleDevice;
  guest!: TestGuest;
  readonly #sockets: Sockets;
  readonly #memory = new SharedMemory(32 << 20);
  readonly #input = new Map<number, Map<number, DriverSegment>>();
  #scratch!: DriverSegment;

  private constructor(sockets: Sockets) {
    this.#sockets = sockets;
  }

  static async open(sockets: Sockets, ...[ports, features]: Parameters<Open>): Promise<Bench> {
    const bench = new Bench(sockets);
    bench.device = await bench.makeDevice(ports);
    bench.guest = new TestGuest(bench.device, {
      memory: bench.#memory,
      ...(features === undefined ? {} : { features }),
    });
    bench.#scratch = { address: bench.guest.arena.take(1 << 20), length: 1 << 20 };
    bench.fillInput(CONTROL_INPUT, 16, 64);
    return bench;
  }

  async makeDevice(ports: Parameters<Open>[0]): Promise<ConsoleDevice> {
    const made: ConsolePortOptions[] = [];
    for (const [index, { hasSocket = true, ...options }] of ports.entries()) {
      made.push({
        onOutput: (bytes) =>
          void this.output.set(index, (this.output.get(index) ?? "") + decoder.decode(bytes)),
        ...options,
        ...(hasSocket ? { listener: await this.#sockets.set.listen(this.path(index)) } : {}),
      });
    }
    return new ConsoleDevice({ ports: made });
  }

  path(port: number): string {
    return `${this.directory}/${port}.sock`;
  }

  connect(port: number): Promise<Deno.UnixConn> {
    return Deno.connect({ transport: "unix", path: this.path(port) });
  }

  /** Lets the device see all that has happened to sockets. */
  async settle(): Promise<void> {
    await this.#sockets.settle();
  }

  /** Adds buffers for input, as the driver does when it makes a port. */
  fillInput(queue: number, count: number, length: number): void {
    const buffers = this.#input.get(queue) ?? new Map<number, DriverSegment>();
    this.#input.set(queue, buffers);
    for (let index = 0; index < count; index++) {
      const part = { address: this.guest.arena.take(length), length };
      buffers.set(this.guest.drivers[queue]!.add([], [part]), part);
    }
    this.guest.notify(queue);
  }

  /** Takes what came, and gives its buffers back to the device. */
  takeInput(queue: number): Uint8Array[] {
    const buffers = this.#input.get(queue)!;
    const driver = this.guest.drivers[queue]!;
    const parts = driver.takeUsed().map(({ head, written }) => {
      const part = buffers.get(head)!;
      buffers.delete(head);
      return { part, bytes: this.guest.arena.bytes(part).slice(0, written) };
    });
    for (const { part } of parts) buffers.set(driver.add([], [part]), part);
    this.guest.notify(queue);
    return parts.map(({ bytes }) => bytes);
  }

  inputText(queue: number): string {
    return this.takeInput(queue).map((bytes) => decoder.decode(bytes)).join("");
  }

  /** Writes to a queue, and tells whether the device took it at once. */
  write(queue: number, bytes: Uint8Array): boolean {
    const driver = this.guest.drivers[queue]!;
    const part = { ...this.#scratch, length: bytes.length };
    this.guest.arena.bytes(part).set(bytes);
    driver.add([part]);
    this.guest.notify(queue);
    return driver.takeUsed().length > 0;
  }

  control(port: number, event: number, value: number): void {
    const bytes = new Uint8Array(8);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, port, true);
    view.setUint16(4, event, true);
    view.setUint16(6, value, true);
    // Linux spins until it is taken.
    assert.ok(this.write(CONTROL_OUTPUT, bytes));
  }

  /** Takes control messages, as `port event value` and the name. */
  messages(): string[] {
    return this.takeInput(CONTROL_INPUT).map((bytes) => {
      const view = new DataView(bytes.buffer);
      const text = [view.getUint32(0, true), view.getUint16(4, true), view.getUint16(6, true)].join(" ");
      return bytes.length === 8 ? text : `${text} ${decoder.decode(bytes.subarray(8))}`;
    });
  }

  /** Brings ports up as the driver does, and opens them. */
  open(...ports: number[]): void {
    this.control(0xffff_ffff, EVENT.deviceReady, 1);
    this.messages();
    for (const port of ports) {
      this.fillInput(queueOf(port), 32, 64);
      this.control(port, EVENT.portReady, 1);
      this.control(port, EVENT.portOpen, 1);
    }
    this.messages();
  }

  [Symbol.dispose](): void {
    this.guest[Symbol.dispose]();
    this.#sockets[Symbol.dispose]();
    this.#memory[Symbol.dispose]();
    Deno.removeSync(this.directory, { recursive: true });
  }
}

function queueOf(port: number): number {
  return port === 0 ? 0 : 4 + 2 * (port - 1);
}

async function readText(conn: Deno.UnixConn, length: number): Promise<string> {
  const buffer = new Uint8Array(length);
  let at = 0;
  while (at < length) {
    const count = await conn.read(buffer.subarray(at));
    if (count === null) break;
    at += count;
  }
  return decoder.decode(buffer.subarray(0, at));
}

const PORTS = [{ isConsole: true }, { name: "one", isConsole: false }, { name: "two", isConsole: false }];

test("ConsoleDevice introduces its ports as Linux expects", async (open) => {
  using bench = await open(PORTS);
  assert.equal(new DataView(bench.device.config.buffer).getUint32(4, true), 3);
  assert.equal(bench.device.queueSizes.length, 8);
  using _client = await bench.connect(2);
  await bench.settle();
  assert.deepEqual(bench.messages(), []);
  bench.control(0xffff_ffff, EVENT.deviceReady, 1);
  assert.deepEqual(bench.messages(), ["0 1 1", "1 1 1", "2 1 1"]);
  for (const port of [0, 1, 2]) bench.control(port, EVENT.portReady, 1);
  assert.deepEqual(bench.messages(), ["0 4 1", "0 6 1", "1 7 1 one", "2 7 1 two", "2 6 1"]);
  // What is of no port, or of no meaning, is ignored.
  bench.control(3, EVENT.portReady, 1);
  bench.control(1, EVENT.portReady, 0);
  bench.control(0, 99, 1);
  bench.control(0xffff_ffff, EVENT.deviceReady, 0);
  assert.deepEqual(bench.messages(), []);
  assert.equal(bench.guest.failure, undefined);
});

test("ConsoleDevice tells the guest of clients that come and go, one at a time", async (open) => {
  using bench = await open(PORTS);
  bench.open(0, 1);
  const first = await bench.connect(1);
  await bench.settle();
  assert.deepEqual(bench.messages(), ["1 6 1"]);
  const second = await bench.connect(1);
  await second.write(encoder.encode("second"));
  await bench.settle();
  assert.deepEqual(bench.messages(), []);
  assert.equal(bench.inputText(4), "");
  await first.write(encoder.encode("first"));
  first.close();
  await bench.settle();
  assert.deepEqual(bench.messages(), ["1 6 0", "1 6 1"]);
  assert.equal(bench.inputText(4), "firstsecond");
  second.close();
  await bench.settle();
  assert.deepEqual(bench.messages(), ["1 6 0"]);
  // A console is always there.
  (await bench.connect(0)).close();
  await bench.settle();
  assert.deepEqual(bench.messages(), []);
});

test("ConsoleDevice tells no more of clients than the guest can know", async (open) => {
  using bench = await open(PORTS);
  bench.open(1);
  // The driver has taken all buffers for control messages.
  const queue = bench.guest.drivers[CONTROL_INPUT]!;
  bench.control(0xffff_ffff, EVENT.deviceReady, 1);
  bench.control(1, EVENT.portReady, 1);
  bench.messages();
  for (let count = 0; count < 50; count++) {
    (await bench.connect(1)).close();
    await bench.settle();
    queue.takeUsed();
  }
  bench.guest.reset();
  bench.guest.start();
  bench.fillInput(CONTROL_INPUT, 1, 64);
  bench.control(1, EVENT.portReady, 1);
  assert.deepEqual(bench.messages(), ["1 7 1 one"]);
  for (let count = 0; count < 5; count++) {
    (await bench.connect(1)).close();
    await bench.settle();
  }
  const last = await bench.connect(1);
  await bench.settle();
  // One buffer, given back again and again: it goes up, then what matters of the rest.
  const told = Array.from({ length: 8 }, () => bench.messages()).flat();
  assert.equal(told.at(-1), "1 6 1");
  assert.ok(told.length <= 4, told.join());
  told.forEach((message, index) => assert.equal(message, `1 6 ${(told.length - index) % 2}`));
  last.close();
  await bench.settle();
});

test("ConsoleDevice carries bytes both ways", async (open) => {
  using bench = await open(PORTS);
  bench.open(0, 1);
  using client = await bench.connect(1);
  await bench.settle();
  const text = "x".repeat(5000) + "end";
  await client.write(encoder.encode(text));
  await bench.settle();
  let received = "";
  while (received.length < text.length) received += bench.inputText(4);
  assert.equal(received, text);
  assert.ok(bench.write(5, encoder.encode("hello")));
  assert.equal(await readText(client, 5), "hello");
  assert.equal(bench.output.get(1), "hello");
});

test("ConsoleDevice gives input only to who has opened the port", async (open) => {
  using bench = await open(PORTS);
  bench.open(0);
  bench.fillInput(4, 4, 64);
  bench.control(1, EVENT.portReady, 1);
  using client = await bench.connect(1);
  await client.write(encoder.encode("early"));
  await bench.settle();
  assert.equal(bench.inputText(4), "");
  bench.control(1, EVENT.portOpen, 1);
  assert.equal(bench.inputText(4), "early");
  bench.control(1, EVENT.portOpen, 0);
  await client.write(encoder.encode("between"));
  await bench.settle();
  assert.equal(bench.inputText(4), "");
  bench.control(1, EVENT.portOpen, 1);
  assert.equal(bench.inputText(4), "between");
});

test("ConsoleDevice forgets a client that left before the port was opened, and all that it sent", async (open) => {
  using bench = await open(PORTS);
  bench.open(0);
  bench.fillInput(4, 4, 64);
  bench.control(1, EVENT.portReady, 1);
  bench.messages();
  const first = await bench.connect(1);
  await first.write(encoder.encode("first"));
  await bench.settle();
  using second = await bench.connect(1);
  await second.write(encoder.encode("second"));
  first.close();
  await bench.settle();
  assert.deepEqual(bench.messages(), ["1 6 1", "1 6 0", "1 6 1"]);
  bench.control(1, EVENT.portOpen, 1);
  assert.equal(bench.inputText(4), "second");
});

test("ConsoleDevice forgets what a killed client sent when the guest closes the port", async (open) => {
  using bench = await open(PORTS);
  bench.open(1);
  // Nobody reads in the guest: its 32 buffers of 64 bytes fill up, and stay.
  const first = await bench.connect(1);
  await first.write(encoder.encode("f".repeat(10_000)));
  await bench.settle();
  first.close();
  using second = await bench.connect(1);
  await second.write(encoder.encode("second"));
  await bench.settle();
  // In order: the guest is not told that the client left before it has all of its input.
  assert.deepEqual(bench.messages(), ["1 6 1"]);
  bench.control(1, EVENT.portOpen, 0);
  assert.deepEqual(bench.messages(), ["1 6 0", "1 6 1"]);
  // Linux throws away what is in its buffers.
  assert.equal(bench.inputText(4).length, 32 * 64);
  bench.control(1, EVENT.portOpen, 1);
  await bench.settle();
  assert.equal(bench.inputText(4), "second");
});

test("ConsoleDevice lets a port wait for its client, and drops what nobody is there for", async (open) => {
  using bench = await open(PORTS);
  bench.open(1);
  const block = new Uint8Array(32_768);
  assert.ok(bench.write(5, encoder.encode("nobody is there")));
  const client = await bench.connect(1);
  await bench.settle();
  let count = 0;
  while (bench.write(5, block.fill(count))) count++;
  assert.ok(count > 0);
  // All that waits is in the guest's queue.
  while (bench.guest.drivers[5]!.freeCount > 0) bench.write(5, block);
  assert.equal(bench.guest.drivers[5]!.takeUsed().length, 0);
  const buffer = new Uint8Array(65_536);
  let total = 0;
  while (total < (count + 64) * block.length) {
    total += (await client.read(buffer))!;
    await bench.settle();
    bench.guest.drivers[5]!.takeUsed();
  }
  assert.equal(total, (count + 64) * block.length);
  assert.equal(bench.guest.drivers[5]!.outstanding, 0);
  // A client that leaves takes what waits for it along.
  while (bench.write(5, block));
  const next = await bench.connect(1);
  client.close();
  await bench.settle();
  bench.guest.drivers[5]!.takeUsed();
  assert.equal(bench.guest.drivers[5]!.outstanding, 0);
  assert.ok(bench.write(5, encoder.encode("next")));
  assert.equal(await readText(next, 4), "next");
  // So does one that only says that it has no more to send, as QEMU has it.
  while (bench.write(5, block));
  using last = await bench.connect(1);
  await next.closeWrite();
  await bench.settle();
  bench.guest.drivers[5]!.takeUsed();
  assert.ok(bench.write(5, encoder.encode("last")));
  assert.equal(await readText(last, 4), "last");
  next.close();
});

test("ConsoleDevice never lets a console wait", async (open) => {
  using bench = await open(PORTS);
  bench.open(0);
  assert.ok(bench.write(1, encoder.encode("early ")));
  using client = await bench.connect(0);
  await bench.settle();
  const line = encoder.encode("0123456789abcdef\n".repeat(200));
  for (let count = 0; count < 1000; count++) assert.ok(bench.write(1, line));
  assert.equal(bench.output.get(0)!.length, 6 + 1000 * line.length);
  assert.equal(await readText(client, 16), "0123456789abcdef");
});

test("ConsoleDevice serves a driver that knows one port", async (open) => {
  using bench = await open(PORTS, 0n);
  using client = await bench.connect(0);
  await bench.settle();
  await client.write(encoder.encode("in"));
  await bench.settle();
  bench.fillInput(0, 4, 64);
  assert.equal(bench.inputText(0), "in");
  assert.ok(bench.write(1, encoder.encode("out")));
  assert.equal(await readText(client, 3), "out");
});

test("ConsoleDevice keeps its sockets and clients when the guest reboots", async (open) => {
  using bench = await open(PORTS);
  bench.open(0, 1);
  using client = await bench.connect(1);
  await bench.settle();
  // Half of it waits when the guest goes.
  assert.equal(bench.write(5, new Uint8Array(1 << 20)), false);
  bench.guest.reset();
  await client.write(encoder.encode("while away"));
  await bench.settle();
  bench.guest.start();
  bench.fillInput(CONTROL_INPUT, 16, 64);
  bench.control(0xffff_ffff, EVENT.deviceReady, 1);
  assert.deepEqual(bench.messages(), ["0 1 1", "1 1 1", "2 1 1"]);
  bench.fillInput(4, 4, 64);
  bench.control(1, EVENT.portReady, 1);
  assert.deepEqual(bench.messages(), ["1 7 1 one", "1 6 1"]);
  assert.equal(bench.inputText(4), "");
  bench.control(1, EVENT.portOpen, 1);
  assert.equal(bench.inputText(4), "while away");
  bench.write(5, encoder.encode("after"));
  const buffer = new Uint8Array(65_536);
  let output = "";
  while (!output.endsWith("after")) {
    output += decoder.decode(buffer.subarray(0, (await client.read(buffer))!));
    await bench.settle();
  }
  assert.ok(output.length < 1 << 20);
});

test("ConsoleDevice goes on where a saved one was, with clients of its own", async (open) => {
  using bench = await open(PORTS);
  const { guest } = bench;
  bench.open(0, 1);
  bench.write(1, encoder.encode("before "));
  const state = JSON.parse(JSON.stringify(bench.device.save()));
  bench.device[Symbol.dispose]();
  bench.output.clear();
  const device = await bench.makeDevice(PORTS);
  Object.assign(guest, { device });
  for (const queue of guest.queues) queue.resume(guest.features);
  // Somebody is there already.
  using screen = await bench.connect(0);
  using client = await bench.connect(1);
  using other = await bench.connect(2);
  await screen.write(encoder.encode("typed"));
  await client.write(encoder.encode("asked"));
  await bench.settle();
  device.activate(guest);
  device.restore(state);
  await bench.settle();
  assert.deepEqual(bench.messages(), ["1 6 1"], "a console has always been open");
  assert.deepEqual([bench.inputText(0), bench.inputText(4)], ["typed", "asked"]);
  const buffer = new Uint8Array(100);
  for (const [queue, connection, text] of [[1, screen, "shown"], [5, client, "answered"]] as const) {
    assert.equal(bench.write(queue, encoder.encode(text)), true);
    assert.equal(decoder.decode(buffer.subarray(0, (await connection.read(buffer))!)), text);
  }
  assert.deepEqual([...bench.output], [[0, "shown"], [1, "answered"]]);
  // A port that the guest had not made yet.
  await other.write(encoder.encode("later"));
  await bench.settle();
  assert.deepEqual(bench.messages(), []);
  bench.fillInput(6, 4, 64);
  bench.control(2, EVENT.portReady, 1);
  assert.deepEqual(bench.messages(), ["2 7 1 two", "2 6 1"]);
  bench.control(2, EVENT.portOpen, 1);
  assert.equal(bench.inputText(6), "later");
  // Whoever leaves is told of.
  client.close();
  await bench.settle();
  assert.deepEqual(bench.messages(), ["1 6 0"]);
  assert.equal(guest.failure, undefined);
});

test("ConsoleDevice touches no queue after a reset", async (open) => {
  using bench = await open(PORTS);
  bench.open(1);
  using client = await bench.connect(1);
  await bench.settle();
  bench.guest.reset();
  const before = bench.guest.memory.bytes.slice();
  await client.write(encoder.encode("x".repeat(1000)));
  (await bench.connect(2)).close();
  await bench.settle();
  assert.ok(Buffer.from(before.buffer).equals(bench.guest.memory.bytes));
});

test("sockets replace dead ones, but take none that lives", async (_, make) => {
  const directory = await Deno.makeTempDir();
  using sockets = make();
  const socket = `${directory}/a.sock`;
  const listen = async (path = socket) => await sockets.set.listen(path);
  try {
    {
      using _listener = await listen(`${directory}/b.sock`);
      // The second name stays when the listener goes.
      await Deno.link(`${directory}/b.sock`, socket);
    }
    {
      using _listener = await listen();
      assert.equal((await Deno.stat(socket)).mode! & 0o777, 0o600);
      await assert.rejects(listen(), /another process does/);
      (await Deno.connect({ transport: "unix", path: socket })).close();
    }
    await assert.rejects(Deno.lstat(socket), Deno.errors.NotFound);
    await Deno.writeTextFile(socket, "precious");
    await assert.rejects(listen(), /another kind of file/);
    assert.equal(await Deno.readTextFile(socket), "precious");
    await assert.rejects(listen("/tmp/" + "x".repeat(103)), /more than 10[37] bytes/);
    await assert.rejects(listen(`${directory}/no/socket`), /ENOENT|No such file/);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("SocketSet calls back only for sockets that are open", async () => {
  const directory = await Deno.makeTempDir();
  using loop = new EventLoop();
  {
    using sockets = new SocketSet(loop);
    const listener = sockets.listen(`${directory}/a`);
    const events: string[] = [];
    const connections = Array.from({ length: 10 }, (_, index) => {
      const one = sockets.connect(`${directory}/a`)!;
      const two = listener.accept()!;
      two.onChange = (hasLeft) => {
        events.push(`${index} ${hasLeft}`);
        // The next one is closed while its event is already here, and another one gets its number.
        if (connections[index + 1]?.two.fd.isClosed !== false) return;
        connections[index + 1]!.two[Symbol.dispose]();
        sockets.connect(`${directory}/a`)!.onChange = () => events.push("stale");
      };
      return { one, two };
    });
    assert.equal(listener.accept(), undefined);
    loop.poll(0);
    assert.deepEqual(events, [0, 2, 4, 6, 8].map((index) => `${index} false`));
    for (const { two } of connections) two.onChange = (hasLeft) => events.push(`${hasLeft}`);
    loop.poll(0);
    events.length = 0;
    connections[0]!.one[Symbol.dispose]();
    loop.poll(0);
    assert.deepEqual(events, ["true"]);
    assert.equal(connections[0]!.two.receive(new Uint8Array(1)), -1);
    assert.equal(connections[0]!.two.send(new Uint8Array(1)), -1);
    assert.equal(connections[2]!.two.receive(new Uint8Array(1)), 0);
    assert.equal(sockets.connect(`${directory}/b`), undefined);
  }
  assert.deepEqual([...Deno.readDirSync(directory)], []);
  await Deno.remove(directory);
});

for (
  const [what, error, act] of [
    ["a short control message", VirtqueueError, (bench) => {
      bench.guest.drivers[CONTROL_OUTPUT]!.add([{ address: 4096, length: 7 }]);
      bench.guest.notify(CONTROL_OUTPUT);
    }],
    ["output to write", VirtqueueError, (bench) => {
      bench.guest.drivers[1]!.add([], [{ address: 4096, length: 8 }]);
      bench.guest.notify(1);
    }],
    ["more output than there can be", VirtqueueError, (bench) => {
      bench.guest.drivers[1]!.add([{ address: 0, length: 16 << 20 }]);
      bench.guest.notify(1);
    }],
    ["output that is no memory", GuestMemoryError, (bench) => {
      bench.guest.drivers[1]!.setDescriptor(0, 0x1_2345_0000, 8, 0);
      bench.guest.drivers[1]!.offer(0);
      bench.guest.notify(1);
    }],
  ] satisfies [string, new (...args: never[]) => Error, (bench: Bench) => void][]
) {
  test(`ConsoleDevice fails on ${what}, until it is reset`, async (open) => {
    using bench = await open(PORTS);
    act(bench);
    assert.ok(bench.guest.failure instanceof error, String(bench.guest.failure));
    assert.equal(bench.write(1, encoder.encode("x")), false);
    bench.guest.reset();
    bench.guest.start();
    assert.ok(bench.write(1, encoder.encode("x")));
  });
}

test("ConsoleDevice fails on input buffers that it cannot use", async (open) => {
  using bench = await open(PORTS);
  bench.open();
  bench.guest.drivers[4]!.add([{ address: 4096, length: 8 }]);
  bench.guest.notify(4);
  bench.control(1, EVENT.portReady, 1);
  bench.control(1, EVENT.portOpen, 1);
  assert.deepEqual(bench.guest.drivers[4]!.takeUsed(), []);
  using client = await bench.connect(1);
  await bench.settle();
  await client.write(encoder.encode("x"));
  await bench.settle();
  assert.ok(bench.guest.failure instanceof VirtqueueError);
});

// Whatever comes in what order, each byte arrives once and in order, and nothing waits for ever.
test("ConsoleDevice loses no byte between a guest and a client of random habits", async (open) => {
  for (let seed = 1; seed <= 15; seed++) {
    using bench = await open(PORTS);
    const random = seededRandom(seed);
    bench.open(1);
    using client = await bench.connect(1);
    await bench.settle();
    const start = bench.guest.arena.next;
    const output = bench.guest.drivers[5]!;
    const total = { input: 40_000, output: 600_000 };
    let [sentIn, gotIn, sentOut, gotOut] = [0, 0, 0, 0];
    const byteAt = (position: number) => (position * 31 + (position >> 8)) & 0xff;
    const fill = (bytes: Uint8Array, position: number) => {
      for (let index = 0; index < bytes.length; index++) bytes[index] = byteAt(position + index);
    };
    const check = (bytes: Uint8Array, position: number) => {
      const wrong = bytes.findIndex((byte, index) => byte !== byteAt(position + index));
      assert.equal(wrong, -1, `seed ${seed}: byte ${position + wrong}`);
    };
    const buffer = new Uint8Array(100_000);
    while (gotIn < total.input || gotOut < total.output) {
      switch (random(4)) {
        case 0: {
          const bytes = new Uint8Array(Math.min(1 + random(500), total.input - sentIn));
          if (bytes.length === 0) break;
          fill(bytes, sentIn);
          await client.write(bytes);
          sentIn += bytes.length;
          break;
        }
        case 1:
          for (const bytes of bench.takeInput(4)) {
            check(bytes, gotIn);
            gotIn += bytes.length;
          }
          break;
        case 2: {
          if (output.outstanding === 0) bench.guest.arena.next = start;
          const parts: DriverSegment[] = [];
          for (let count = 1 + random(3); count > 0; count--) {
            const length = Math.min(random(20_000), total.output - sentOut);
            const part = { address: bench.guest.arena.take(length + 1), length };
            fill(bench.guest.arena.bytes(part), sentOut);
            parts.push(part);
            sentOut += length;
          }
          if (output.freeCount < 8) assert.fail("the queue should have room");
          output.add(parts, [], random(2) === 0);
          bench.guest.notify(5);
          break;
        }
        case 3:
          if (gotOut < total.output) {
            // The device has sent something unless it has all of it.
            if (sentOut === gotOut) break;
            const count = (await client.read(buffer.subarray(0, 1 + random(buffer.length))))!;
            check(buffer.subarray(0, count), gotOut);
            gotOut += count;
          }
          break;
      }
      if (random(2) === 0) await bench.settle();
      output.takeUsed();
      if (output.freeCount < 8) {
        const count = (await client.read(buffer))!;
        check(buffer.subarray(0, count), gotOut);
        gotOut += count;
        await bench.settle();
        output.takeUsed();
      }
    }
    assert.deepEqual([sentIn, sentOut], [total.input, total.output]);
    assert.equal(bench.guest.failure, undefined);
  }
});

// The guest offers what it likes: the device fails as it should, or goes on.
test("ConsoleDevice survives random descriptors", async (open) => {
  let failures = 0;
  for (let seed = 1; seed <= 60; seed++) {
    using bench = await open(PORTS);
    const random = seededRandom(seed);
    bench.open(0, 1);
    using client = await bench.connect(1);
    await client.write(encoder.encode("input"));
    const fence = bench.guest.arena.take(1 << 16);
    for (let count = 0; count < 40 && bench.guest.failure === undefined; count++) {
      const queue = random(bench.guest.queues.length);
      const driver = bench.guest.drivers[queue]!;
      const rarely = () => random(60) === 0;
      const length = rarely() ? random(0xffff_ffff) : 8 + random(56);
      const address = rarely() ? random(0xffff_ffff) : fence + random(4096);
      const flags = rarely() ? random(8) : queue % 2 === 0 ? DESC_F.WRITE : 0;
      driver.setDescriptor(count, address, length, flags, random(80));
      driver.offer(rarely() ? random(0xffff) : count);
      bench.guest.notify(queue);
      await bench.settle();
    }
    if (bench.guest.failure !== undefined) {
      failures++;
      const { failure } = bench.guest;
      assert.ok(failure instanceof VirtqueueError || failure instanceof GuestMemoryError, String(failure));
    }
    bench.guest.reset();
    await bench.settle();
  }
  assert.ok(failures > 0 && failures < 60, `${failures} of 60 failed`);
});
