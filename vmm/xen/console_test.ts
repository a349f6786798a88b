import assert from "node:assert/strict";
import { Fd } from "../../ffi/mod.ts";
import { ConsoleRing } from "../../ffi/xen/console_ring.ts";
import { seededRandom } from "../devices/test_driver.ts";
import { SocketSet } from "../devices/unix_socket.ts";
import { EventLoop } from "../event_loop.ts";
import { END_MARK, READY_MARK } from "../guest/agent.ts";
import { GuestChannel, type GuestEndpoints, guestEndpoints } from "../guest/channel.ts";
import {
  channelConsoles,
  CONTROL_CONSOLE,
  DomainConsoles,
  type EventChannels,
  KERNEL_CONSOLE,
  serveConsoles,
} from "./console.ts";

const encoder = new TextEncoder();
const decoder = new TextDecoder();
const { data: DATA, errors: ERRORS } = channelConsoles(0);
const [INPUT_SIZE, OUTPUT_SIZE] = [1024, 2048];

/** The guest's side of a console: its driver, on a page of its own. */
class Frontend {
  readonly page = new SharedArrayBuffer(4096);
  readonly #bytes = new Uint8Array(this.page);
  readonly #words = new Uint32Array(this.page, 3072, 4);
  readonly #notify: () => void;

  constructor(notify: () => void) {
    this.#notify = notify;
  }

  /** Bytes that the backend has not taken. */
  get pending(): number {
    return this.#words[3]! - this.#words[2]!;
  }

  /** Bytes that can be read. */
  get waiting(): number {
    return this.#words[1]! - this.#words[0]!;
  }

  /** Writes what there is room for. */
  write(text: string | Uint8Array): number {
    const bytes = typeof text === "string" ? encoder.encode(text) : text;
    const length = Math.min(bytes.length, OUTPUT_SIZE - this.pending);
    for (let at = 0; at < length; at++) {
      this.#bytes[1024 + (this.#words[3]! + at) % OUTPUT_SIZE] = bytes[at]!;
    }
    this.#words[3]! += length;
    if (length > 0) this.#notify();
    return length;
  }

  read(most = INPUT_SIZE): Uint8Array<ArrayBuffer> {
    const length = Math.min(most, this.waiting);
    const bytes = Uint8Array.from({ length }, (_, at) => this.#bytes[(this.#words[0]! + at) % INPUT_SIZE]!);
    this.#words[0]! += length;
    if (length > 0) this.#notify();
    return bytes;
  }

  text(): string {
    return decoder.decode(this.read());
  }

  /** Makes its index a wrong one. */
  corrupt(): void {
    this.#words[3]! += 100_000;
    this.#notify();
  }
}

/** Event channels without a hypervisor. */
class TestEventChannels implements EventChannels, Disposable {
  readonly #event = Fd.event();
  readonly #raised = new Set<number>();
  readonly notified: number[] = [];
  /** What the guest does when it is sent an event. */
  onNotify: (port: number) => void = () => {};

  get fd(): number {
    return this.#event.number;
  }

  raise(port: number): void {
    this.#raised.add(port);
    this.#event.signal();
  }

  take(): number[] {
    this.#event.drain();
    const ports = [...this.#raised];
    this.#raised.clear();
    return ports;
  }

  notify(port: number): void {
    this.notified.push(port);
    this.onNotify(port);
  }

  [Symbol.dispose](): void {
    this.#event[Symbol.dispose]();
  }
}

/** A guest with all its consoles, and the host's end of them. */
class Bench implements Disposable {
  readonly directory = Deno.makeTempDirSync();
  readonly loop = new EventLoop();
  readonly sockets = new SocketSet(this.loop);
  readonly events = new TestEventChannels();
  readonly endpoints: GuestEndpoints = guestEndpoints(this.directory, 2);
  readonly warnings: string[] = [];
  readonly guest: Frontend[] = [];
  consoles!: DomainConsoles;

  static async open(options: { log?: string; isConnected?: boolean } = {}): Promise<Bench> {
    const bench = new Bench();
    bench.consoles = await DomainConsoles.open({
      sockets: bench.sockets,
      eventChannels: bench.events,
      console: { socket: `${bench.directory}/console.sock`, log: options.log ?? bench.log },
      channels: bench.endpoints,
      warn: (message) => bench.warnings.push(message),
    });
    if (options.isConnected !== false) { for (let number = 0; number < 6; number++) bench.attach(number); }
    return bench;
  }

  get log(): string {
    return `${this.directory}/console.log`;
  }

  /** Connects the guest's side of a console, anew if it was before. */
  attach(number: number): void {
    const port = 20 + number;
    const frontend = new Frontend(() => this.events.raise(port));
    this.guest[number] = frontend;
    const ring = new ConsoleRing(frontend.page, (message) => this.warnings.push(message));
    this.consoles.add(number, { ring, port });
  }

  async connect(number: number): Promise<Deno.UnixConn> {
    const paths = [`${this.directory}/console.sock`, this.endpoints.control];
    for (const [index, data] of this.endpoints.data.entries()) {
      paths.push(data, this.endpoints.errors[index]!);
    }
    const connection = await Deno.connect({ transport: "unix", path: paths[number]! });
    this.settle();
    return connection;
  }

  /** Serves all that has happened. */
  settle(): void {
    let found: number;
    do {
      found = this.loop.poll(0);
      const ports = this.events.take();
      for (const port of ports) this.consoles.onEvent(port);
      found += ports.length;
    } while (found > 0);
  }

  close(connection: Deno.UnixConn): void {
    connection.close();
    this.settle();
  }

  [Symbol.dispose](): void {
    this.consoles[Symbol.dispose]();
    this.sockets[Symbol.dispose]();
    this.events[Symbol.dispose]();
    this.loop[Symbol.dispose]();
    Deno.removeSync(this.directory, { recursive: true });
  }
}

async function readText(connection: Deno.UnixConn): Promise<string> {
  const buffer = new Uint8Array(65_536);
  return decoder.decode(buffer.subarray(0, await connection.read(buffer) ?? 0));
}

/** A turn of everything else in this isolate. */
function turn(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 0));
}

function pattern(from: number, length: number): Uint8Array<ArrayBuffer> {
  return Uint8Array.from({ length }, (_, at) => (from + at) * 31 % 251);
}

Deno.test("channelConsoles numbers the consoles of channels after the kernel's and the control line's", () => {
  assert.deepEqual([KERNEL_CONSOLE, CONTROL_CONSOLE], [0, 1]);
  assert.deepEqual([channelConsoles(0), channelConsoles(3)], [{ data: 2, errors: 3 }, {
    data: 8,
    errors: 9,
  }]);
});

Deno.test("DomainConsoles logs the kernel's console, and shows it to one client at a time", async () => {
  using bench = await Bench.open();
  const [kernel] = bench.guest as [Frontend];
  kernel.write("early ");
  bench.settle();
  assert.deepEqual(bench.events.notified, [20]);
  using first = await bench.connect(KERNEL_CONSOLE);
  using second = await bench.connect(KERNEL_CONSOLE);
  kernel.write("shown ");
  bench.settle();
  assert.equal(await readText(first), "shown ");
  await first.write(encoder.encode("one"));
  await second.write(encoder.encode("two"));
  bench.settle();
  assert.equal(kernel.text(), "one");
  bench.close(first);
  assert.equal(kernel.text(), "two");
  kernel.write("after");
  bench.settle();
  assert.equal(await readText(second), "after");
  assert.equal(Deno.readTextFileSync(bench.log), "early shown after");
  assert.equal(Deno.statSync(bench.log).mode! & 0o777, 0o600);
  assert.deepEqual(bench.warnings, []);
});

for (
  const [name, number] of [["kernel's console", KERNEL_CONSOLE], ["control line", CONTROL_CONSOLE]] as const
) {
  Deno.test(`DomainConsoles never lets the guest wait on the ${name} for a client that does not read`, async () => {
    using bench = await Bench.open();
    using client = await bench.connect(number);
    for (let at = 0; at < 2_000_000; at += OUTPUT_SIZE) {
      assert.equal(bench.guest[number]!.write(pattern(at, OUTPUT_SIZE)), OUTPUT_SIZE);
      bench.settle();
    }
    const buffer = new Uint8Array(10_000);
    const length = await client.read(buffer) ?? 0;
    assert.deepEqual(buffer.subarray(0, length), pattern(0, length));
    assert.equal(Deno.statSync(bench.log).size >= 2_000_000, number === KERNEL_CONSOLE);
  });

  Deno.test(`DomainConsoles lets clients wait on the ${name} for a guest that does not read`, async () => {
    using bench = await Bench.open();
    const frontend = bench.guest[number]!;
    const [client, other] = [await bench.connect(number), await bench.connect(number)];
    await client.write(pattern(0, 5000));
    bench.settle();
    assert.equal(frontend.waiting, INPUT_SIZE);
    // What was sent still goes to the guest while nobody else waits, or else what the ring holds.
    bench.close(client);
    await other.write(pattern(0, 5000));
    bench.settle();
    assert.deepEqual(frontend.read(), pattern(0, INPUT_SIZE));
    bench.settle();
    bench.close(other);
    for (let at = 0; at < 5000;) {
      const bytes = frontend.read(300);
      bench.settle();
      assert.ok(bytes.length > 0);
      assert.deepEqual(bytes, pattern(at, bytes.length));
      at += bytes.length;
    }
    assert.equal(frontend.waiting, 0);
    using last = await bench.connect(number);
    await last.write(encoder.encode("next"));
    bench.settle();
    assert.equal(frontend.text(), "next");
  });
}

Deno.test("DomainConsoles carries every byte of a data channel, whoever is slow", async () => {
  using bench = await Bench.open();
  const frontend = bench.guest[DATA]!;
  using client = await bench.connect(DATA);
  using _errors = await bench.connect(ERRORS);
  const random = seededRandom(7);

  // Neither side reads at first: both have to wait.
  let written = 0;
  for (let length = -1; length !== 0; bench.settle()) {
    length = frontend.write(pattern(written, 1 + random(3000)));
    written += length;
  }
  assert.ok(written < 1_000_000, `${written} bytes are kept for a client that does not read`);
  const SENT = 1_000_000;
  let hasSent = false;
  const sending = (async () => {
    for (let at = 0; at < SENT;) at += await client.write(pattern(at, Math.min(50_000, SENT - at)));
    hasSent = true;
  })();
  for (let count = 0; count < 50; count++) {
    await turn();
    bench.settle();
  }
  assert.ok(!hasSent && frontend.waiting === INPUT_SIZE);

  const total = written + 300_000;
  const buffer = new Uint8Array(20_000);
  let [received, read] = [0, 0];
  while (received < total || read < SENT) {
    if (received < total && (random(2) === 0 || read === SENT)) {
      const length = await client.read(buffer.subarray(0, 1 + random(buffer.length))) ?? 0;
      assert.deepEqual(buffer.subarray(0, length), pattern(received, length));
      received += length;
      bench.settle();
    }
    if (written < total) written += frontend.write(pattern(written, Math.min(random(3000), total - written)));
    bench.settle();
    const bytes = frontend.read(random(1500));
    assert.deepEqual(bytes, pattern(read, bytes.length));
    read += bytes.length;
    bench.settle();
    if (received === written) await turn();
  }
  await sending;
  assert.deepEqual(bench.warnings, []);
});

Deno.test("DomainConsoles loses what is written to a channel without a client", async () => {
  using bench = await Bench.open();
  const frontend = bench.guest[DATA]!;
  assert.equal(frontend.write(pattern(0, OUTPUT_SIZE)), OUTPUT_SIZE);
  bench.settle();
  assert.equal(frontend.pending, 0);
  // Nor does the next client get what waited for the one before.
  for (const leave of ["close", "closeWrite"] as const) {
    const slow = await bench.connect(DATA);
    using next = await bench.connect(DATA);
    while (frontend.write(pattern(0, OUTPUT_SIZE)) > 0) bench.settle();
    await slow[leave]();
    bench.settle();
    assert.equal(frontend.pending, 0);
    frontend.write("fresh");
    bench.settle();
    assert.equal(await readText(next), "fresh");
    if (leave === "closeWrite") slow.close();
  }
});

Deno.test("DomainConsoles tells the guest once that a client has left, by whichever socket that is", async () => {
  using bench = await Bench.open();
  const [data, errors] = [bench.guest[DATA]!, bench.guest[ERRORS]!];
  for (const order of [[DATA, ERRORS], [ERRORS, DATA]]) {
    const clients = new Map([[DATA, await bench.connect(DATA)], [ERRORS, await bench.connect(ERRORS)]]);
    data.write("ready");
    errors.write("ready");
    bench.settle();
    assert.equal(errors.waiting, 0);
    bench.close(clients.get(order[0]!)!);
    assert.equal(errors.text(), "\nleave\n");
    bench.settle();
    // The next client is there before the last one has left by its other socket, as it is known to be by then.
    const next = await bench.connect(order[0]!);
    bench.close(clients.get(order[1]!)!);
    assert.equal(errors.waiting, 0);
    const rest = await bench.connect(order[1]!);
    data.write("ready");
    bench.settle();
    bench.close(next);
    assert.equal(errors.text(), "\nleave\n");
    bench.close(rest);
    assert.equal(errors.waiting, 0);
  }
  assert.equal(data.waiting, 0);
  assert.equal(bench.guest[channelConsoles(1).errors]!.waiting, 0);
});

Deno.test("DomainConsoles tells of a client that left before its session began when that begins", async () => {
  using bench = await Bench.open();
  const [data, errors] = [bench.guest[DATA]!, bench.guest[ERRORS]!];
  bench.close(await bench.connect(DATA));
  assert.equal(errors.waiting, 0);
  data.write("ready");
  bench.settle();
  assert.equal(errors.text(), "\nleave\n");
  errors.write("more");
  bench.settle();
  assert.equal(errors.waiting, 0);
  // The session of a later client would take it for its own.
  bench.close(await bench.connect(ERRORS));
  using _data = await bench.connect(DATA);
  data.write("ready");
  bench.settle();
  assert.equal(errors.waiting, 0);
});

Deno.test("DomainConsoles ends sessions of clients that were of another process", async () => {
  using bench = await Bench.open();
  bench.guest[ERRORS]!.write("still here");
  bench.settle();
  assert.equal(bench.guest[ERRORS]!.text(), "\nleave\n");
});

Deno.test("DomainConsoles gives the guest what clients send beside errors, and then that they left", async () => {
  using bench = await Bench.open();
  const errors = bench.guest[ERRORS]!;
  using client = await bench.connect(ERRORS);
  errors.write("ready");
  await client.write(new TextEncoder().encode("token\n\n"));
  do {
    await turn();
    bench.settle();
  } while (errors.waiting === 0);
  assert.equal(errors.text(), "token\n\n");
  // A guest that does not read is told when it does.
  await client.write(new Uint8Array(1024).fill(65));
  do {
    await turn();
    bench.settle();
  } while (errors.waiting < 1024);
  bench.close(client);
  assert.equal(errors.text(), "A".repeat(1024));
  bench.settle();
  assert.equal(errors.text(), "\nleave\n");
});

Deno.test("DomainConsoles keeps clients while the guest connects late, and anew", async () => {
  using bench = await Bench.open({ isConnected: false });
  using client = await bench.connect(CONTROL_CONSOLE);
  await client.write(encoder.encode("ping\n"));
  bench.settle();
  bench.attach(CONTROL_CONSOLE);
  const before = bench.guest[CONTROL_CONSOLE]!;
  assert.equal(before.text(), "ping\n");
  before.write("pong\n");
  bench.settle();
  assert.equal(await readText(client), "pong\n");
  bench.attach(CONTROL_CONSOLE);
  await client.write(encoder.encode("again\n"));
  bench.settle();
  before.write("lost");
  bench.settle();
  assert.deepEqual([before.waiting, before.pending], [0, 4]);
  assert.equal(bench.guest[CONTROL_CONSOLE]!.text(), "again\n");
  // The last words are taken.
  bench.guest[CONTROL_CONSOLE]!.write("bye\n");
  bench.consoles.remove(CONTROL_CONSOLE);
  assert.equal(await readText(client), "bye\n");
  bench.guest[CONTROL_CONSOLE]!.write("lost");
  bench.settle();
  assert.equal(bench.guest[CONTROL_CONSOLE]!.pending, 4);
  assert.throws(() => bench.attach(6), {
    name: "RangeError",
    message: "Cannot connect the console 6 as no socket leads to it",
  });
  bench.consoles.remove(6);
  bench.consoles.onEvent(4711);
});

Deno.test("DomainConsoles bears a guest that breaks its ring, and one that has gone", async () => {
  using bench = await Bench.open();
  const [kernel] = bench.guest as [Frontend];
  kernel.corrupt();
  bench.settle();
  assert.equal(bench.warnings.length, 1);
  assert.match(bench.warnings[0]!, /indices of the guest's console ring/);
  kernel.write("well again");
  bench.settle();
  assert.equal(Deno.readTextFileSync(bench.log), "well again");
  bench.events.onNotify = () => {
    throw new Error("there is no such port");
  };
  kernel.write(", gone");
  bench.settle();
  assert.equal(
    bench.warnings[1],
    "Cannot notify the guest of its console 0 as there is no such port: it is served again when it connects anew",
  );
  kernel.write("lost");
  bench.settle();
  assert.equal(kernel.pending, 4);
  assert.equal(Deno.readTextFileSync(bench.log), "well again, gone");
});

Deno.test("DomainConsoles leaves no sockets behind", async () => {
  using bench = await Bench.open();
  using client = await bench.connect(DATA);
  bench.consoles[Symbol.dispose]();
  assert.equal(await client.read(new Uint8Array(1)), null);
  assert.deepEqual([...Deno.readDirSync(bench.directory)].map(({ name }) => name), ["console.log"]);
  // What was made before one could not be goes as well.
  Deno.mkdirSync(bench.endpoints.errors[1]!);
  const opening = DomainConsoles.open({
    sockets: bench.sockets,
    eventChannels: bench.events,
    console: { socket: `${bench.directory}/console.sock`, log: bench.log },
    channels: bench.endpoints,
    warn: (message) => assert.fail(message),
  });
  await assert.rejects(opening, /Cannot listen on/);
  const names = [...Deno.readDirSync(bench.directory)].map(({ name }) => name).sort();
  assert.deepEqual(names, ["console.log", "data.1.err.sock"]);
});

/** An agent on the guest's side of the consoles, which answers as the real one does. */
class FakeAgent {
  readonly left: number[] = [];
  readonly requests: string[] = [];
  readonly #bench: Bench;
  readonly #changes = new Map<number, Set<() => void>>();

  constructor(bench: Bench) {
    this.#bench = bench;
    bench.events.onNotify = (port) => {
      for (const wake of this.#changes.get(port - 20) ?? []) wake();
    };
    void this.#serve();
  }

  #changed(number: number): Promise<void> {
    return new Promise((resolve) => {
      const waiting = this.#changes.get(number) ?? new Set();
      this.#changes.set(number, waiting);
      const wake = () => {
        waiting.delete(wake);
        resolve();
      };
      waiting.add(wake);
    });
  }

  async #write(number: number, text: string | Uint8Array): Promise<void> {
    let bytes = typeof text === "string" ? encoder.encode(text) : text;
    while (bytes.length > 0) {
      const written = this.#bench.guest[number]!.write(bytes);
      bytes = bytes.subarray(written);
      if (written === 0) await this.#changed(number);
    }
  }

  async #read(number: number, most: number): Promise<Uint8Array<ArrayBuffer>> {
    const frontend = this.#bench.guest[number]!;
    while (frontend.waiting === 0) await this.#changed(number);
    return frontend.read(most);
  }

  async #line(number: number): Promise<string> {
    let line = "";
    while (!line.endsWith("\n")) line += decoder.decode(await this.#read(number, 1));
    return line.slice(0, -1);
  }

  async #serve(): Promise<void> {
    while (true) {
      const [id = "", verb = "", channel = "", token = ""] = (await this.#line(CONTROL_CONSOLE)).split(" ");
      if (id === "") continue;
      this.requests.push(verb);
      if (verb === "open") void this.#session(Number(channel), token);
      await this.#write(CONTROL_CONSOLE, `${id} ok${verb === "ping" ? " 1 boot 2.5" : ""}\n`);
    }
  }

  /** Gives a command's input back on both streams; one named "endless" writes until it is ended. */
  async #session(channel: number, token: string): Promise<void> {
    const { data, errors } = channelConsoles(channel);
    let hasLeft = false;
    void (async () => {
      while (!hasLeft) hasLeft = await this.#line(errors) === "leave";
      this.left.push(channel);
    })();
    await this.#write(data, `${READY_MARK}${token}\n`);
    await this.#write(errors, `${READY_MARK}${token}\n`);
    const [size = "", input = ""] = (await this.#line(data)).split(" ");
    let script = "";
    while (script.length < Number(size)) {
      script += decoder.decode(await this.#read(data, Number(size) - script.length));
    }
    while (script.includes("'endless'") && !hasLeft) await this.#write(data, pattern(0, 1000));
    while (input === "1") {
      const [block = "", count = ""] = (await this.#line(data)).split(" ");
      if (block === "0") break;
      for (let left = Number(block) * Number(count); left > 0;) {
        const bytes = await this.#read(data, left);
        await this.#write(data, bytes);
        await this.#write(errors, bytes);
        left -= bytes.length;
      }
    }
    if (hasLeft) return;
    for (const number of [data, errors]) await this.#write(number, `${END_MARK}${token} 7\n`);
  }
}

Deno.test("serveConsoles lets the host speak with a guest's agent", async () => {
  using bench = await Bench.open();
  const stop = new AbortController();
  const serving = serveConsoles(bench.events, bench.consoles, bench.loop, stop.signal);
  try {
    const agent = new FakeAgent(bench);
    const guest = new GuestChannel(bench.endpoints);
    assert.deepEqual(await guest.ping(), { version: "1", bootId: "boot", uptime: 2.5 });

    const input = pattern(0, 400_000);
    const received: Uint8Array[] = [];
    const complaints: Uint8Array[] = [];
    const { status } = await guest.exec(["cat"], {
      stdin: ReadableStream.from([input]),
      stdout: (chunk) => void received.push(chunk),
      stderr: (chunk) => void complaints.push(chunk),
    });
    assert.equal(status, 7);
    for (const chunks of [received, complaints]) {
      assert.deepEqual(await new Blob(chunks.map((each) => each.slice())).bytes(), input);
    }
    while (agent.left.length < 1) await turn();

    const results = await Promise.all(
      [1, 2, 3, 4, 5].map((each) =>
        guest.output(["cat"], { stdin: ReadableStream.from([encoder.encode(`text ${each}`)]) })
      ),
    );
    results.forEach(({ stdout, stderr, status }, index) => {
      assert.deepEqual([stdout, stderr, status], [`text ${index + 1}`, `text ${index + 1}`, 7]);
    });
    while (agent.left.length < 6) await turn();

    // A command is ended with its client.
    const abort = new AbortController();
    const endless = guest.exec(["endless"], {
      signal: abort.signal,
      stdout: () => abort.abort(new Error("enough")),
    });
    await assert.rejects(endless, /enough/);
    while (agent.left.length < 7) await turn();
    assert.equal((await guest.output(["cat"])).status, 7);
    await guest.poweroff();
    assert.equal(agent.requests.at(-1), "poweroff");
    assert.deepEqual(bench.warnings, []);
  } finally {
    stop.abort();
    await serving;
  }
});
