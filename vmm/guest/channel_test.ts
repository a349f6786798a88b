import { END_MARK, READY_MARK } from "./agent.ts";
import {
  GuestChannel,
  guestDeviceArguments,
  type GuestEndpoints,
  guestEndpoints,
  GuestError,
  sessionScript,
  SessionStream,
} from "./channel.ts";

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** No test may leave a socket, a timer or a lock behind. */
const LEAVES_NOTHING = { sanitizeOps: true, sanitizeResources: true };

function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

function assertEquals(actual: unknown, expected: unknown): void {
  const [a, b] = [Deno.inspect(actual, { depth: 9 }), Deno.inspect(expected, { depth: 9 })];
  if (a !== b) throw new Error(`${a} is not ${b}`);
}

async function rejection(promise: Promise<unknown>): Promise<Error> {
  try {
    await promise;
  } catch (error) {
    assert(error instanceof Error, "it rejected with no error");
    return error;
  }
  throw new Error("it did not reject");
}

/** What a guest of the tests does in one session, with the script and the input it was sent. */
type Program = (
  script: string,
  input: Uint8Array,
  write: (stdout: Uint8Array, stderr: Uint8Array) => Promise<void>,
) => number | Promise<number>;

/** Speaks as an agent on a machine's sockets, without a machine. */
class FakeGuest implements AsyncDisposable {
  readonly endpoints: GuestEndpoints;
  readonly requests: string[] = [];
  readonly #listeners: Deno.Listener[] = [];
  readonly #connections = new Map<string, Deno.Conn>();
  readonly #tasks: Promise<void>[] = [];
  readonly #program: Program;
  sessions = 0;
  mostSessions = 0;

  constructor(directory: string, program: Program, channels = 1) {
    this.endpoints = guestEndpoints(directory, channels);
    this.#program = program;
    this.#listen(this.endpoints.control, (connection) => this.#control(connection));
    for (const path of [...this.endpoints.data, ...this.endpoints.errors]) {
      this.#listen(path, (connection) => {
        this.#connections.set(path, connection);
        return Promise.resolve();
      });
    }
  }

  #listen(path: string, serve: (connection: Deno.Conn) => Promise<void>): void {
    const listener = Deno.listen({ transport: "unix", path });
    this.#listeners.push(listener);
    this.#tasks.push((async () => {
      for await (const connection of listener) this.#tasks.push(serve(connection).catch(() => {}));
    })());
  }

  async #control(connection: Deno.Conn): Promise<void> {
    using _ = connection;
    const buffer = new Uint8Array(1000);
    let text = "";
    while (true) {
      const length = await connection.read(buffer);
      if (length === null) return;
      text += decoder.decode(buffer.subarray(0, length));
      const lines = text.split("\n");
      text = lines.pop() ?? "";
      for (const line of lines) {
        const [id, verb, channel = "", token = ""] = line.split(" ");
        if (verb === undefined) continue;
        this.requests.push(verb);
        let answer = "error unknown";
        if (verb === "ping") answer = "ok 1 boot 2.5";
        if (verb === "poweroff") answer = "ok";
        if (verb === "open") {
          answer = "ok";
          this.#tasks.push(this.#session(Number(channel), token).catch(() => {}));
        }
        // The echo of a terminal and the answer to somebody else come first.
        await connection.write(encoder.encode(`${line}\n0123 ok\n${id} ${answer}\n`));
      }
    }
  }

  async #session(channel: number, token: string): Promise<void> {
    const [data, errors] = await Promise.all(
      [this.endpoints.data[channel] ?? "", this.endpoints.errors[channel] ?? ""].map(async (path) => {
        while (!this.#connections.has(path)) await new Promise((resolve) => setTimeout(resolve, 1));
        const connection = this.#connections.get(path);
        this.#connections.delete(path);
        return connection;
      }),
    );
    assert(data !== undefined && errors !== undefined, "the session's sockets are missing");
    using _data = data;
    using _errors = errors;
    this.mostSessions = Math.max(this.mostSessions, ++this.sessions);
    try {
      const ready = encoder.encode(`rest of another session${READY_MARK}${token}\n`);
      await writeAll(data, ready);
      await writeAll(errors, ready);
      const reader = new Reader(data);
      const [size = "", input = ""] = (await reader.line()).split(" ");
      const script = decoder.decode(await reader.bytes(Number(size)));
      const parts: Uint8Array[] = [];
      while (input === "1") {
        const [block = "", count = ""] = (await reader.line()).split(" ");
        if (block === "0") break;
        parts.push(await reader.bytes(Number(block) * Number(count)));
      }
      const status = await this.#program(
        script,
        new Uint8Array(await new Blob(parts.map((part) => part.slice())).arrayBuffer()),
        async (stdout, stderr) => {
          await Promise.all([writeAll(data, stdout), writeAll(errors, stderr)]);
        },
      );
      const end = encoder.encode(`${END_MARK}${token} ${status}\nlate`);
      await Promise.all([writeAll(data, end), writeAll(errors, end)]);
      await errors.read(new Uint8Array(1));
    } finally {
      this.sessions--;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const listener of this.#listeners) listener.close();
    for (const connection of this.#connections.values()) connection.close();
    for (const task of this.#tasks) await task;
  }
}

async function writeAll(connection: Deno.Conn, bytes: Uint8Array): Promise<void> {
  for (let offset = 0; offset < bytes.length;) offset += await connection.write(bytes.subarray(offset));
}

class Reader {
  readonly #connection: Deno.Conn;
  #buffer: Uint8Array<ArrayBufferLike> = new Uint8Array();

  constructor(connection: Deno.Conn) {
    this.#connection = connection;
  }

  async bytes(length: number): Promise<Uint8Array> {
    while (this.#buffer.length < length) {
      const chunk = new Uint8Array(65_536);
      const got = await this.#connection.read(chunk);
      if (got === null) throw new Error("the host left");
      this.#buffer = new Uint8Array([...this.#buffer, ...chunk.subarray(0, got)]);
    }
    const bytes = this.#buffer.slice(0, length);
    this.#buffer = this.#buffer.slice(length);
    return bytes;
  }

  async line(): Promise<string> {
    let line = "";
    while (true) {
      const [byte = 0] = await this.bytes(1);
      if (byte === 0x0a) return line;
      line += String.fromCharCode(byte);
    }
  }
}

async function withDirectory(run: (directory: string) => Promise<void>): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "hyp-" });
  try {
    await run(directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

Deno.test("SessionStream gives exactly what stands between the marks, however it is cut", () => {
  const token = "00112233";
  for (let round = 0; round < 300; round++) {
    // Bytes like those of the marks, and beginnings of marks, are the interesting ones.
    const pieces = [[0x1e], [0x0a], [...encoder.encode(END_MARK)], [...encoder.encode(END_MARK + "0011")], [
      7,
      0,
    ]];
    const body = Array.from({ length: round % 12 }, () => pieces[Math.floor(Math.random() * 5)] ?? []).flat();
    const all = new Uint8Array([
      ...encoder.encode(`old${READY_MARK}ff\n${READY_MARK}${token}\n`),
      ...body,
      ...encoder.encode(`${END_MARK}${token} ${round}\nlate`),
    ]);
    const stream = new SessionStream(token);
    const got: number[] = [];
    for (let start = 0, end = 0; start < all.length; start = end) {
      assertEquals(stream.status === undefined || end >= all.length - 5, true);
      end = start + 1 + Math.floor(Math.random() * (round % 30));
      got.push(...stream.push(all.subarray(start, end)));
    }
    assertEquals(new Uint8Array(got), new Uint8Array(body));
    assertEquals(stream.status, round);
  }
});

Deno.test("sessionScript quotes all it is given", () => {
  assertEquals(
    sessionScript(["it's", "$a b"], { env: { A: "1 '2'", PATH: "/x" }, cwd: "/a b" }),
    `enter '/a b'\nfind_program 'it'\\''s' '/x' || exit\n` +
      `exec "$ht_bb" setsid "$ht_bb" env 'A=1 '\\''2'\\''' 'PATH=/x' ` +
      `"$ht_bb" sh -c "$ht_exec" 'it'\\''s' "$ht_program" '$a b'`,
  );
  for (
    const wrong of [
      () => sessionScript([]),
      () => sessionScript(["a\0"]),
      () => sessionScript(["a"], { env: { "A-": "" } }),
    ]
  ) {
    let error: unknown;
    try {
      wrong();
    } catch (caught) {
      error = caught;
    }
    assert(error instanceof TypeError, `${wrong} did not throw`);
  }
});

Deno.test("guestDeviceArguments puts every channel on ports of its own", () => {
  assertEquals(guestDeviceArguments(guestEndpoints("/m,1", 1)), [
    "-device",
    "virtio-serial-pci,id=hypertopia,max_ports=3",
    "-chardev",
    "socket,id=hypertopia.control,path=/m,,1/control.sock,server=on,wait=off",
    "-device",
    "virtconsole,bus=hypertopia.0,nr=0,chardev=hypertopia.control",
    "-chardev",
    "socket,id=hypertopia.0,path=/m,,1/data.0.sock,server=on,wait=off",
    "-device",
    "virtserialport,bus=hypertopia.0,nr=1,name=hypertopia.0,chardev=hypertopia.0",
    "-chardev",
    "socket,id=hypertopia.0.err,path=/m,,1/data.0.err.sock,server=on,wait=off",
    "-device",
    "virtserialport,bus=hypertopia.0,nr=2,name=hypertopia.0.err,chardev=hypertopia.0.err",
  ]);
});

Deno.test("GuestChannel pings, with others at once", LEAVES_NOTHING, async () => {
  await withDirectory(async (directory) => {
    await using guest = new FakeGuest(directory, () => 0);
    const pings = await Promise.all(
      Array.from({ length: 5 }, () => new GuestChannel(guest.endpoints).ping({ timeout: 5_000 })),
    );
    assertEquals(pings, Array(5).fill({ version: "1", bootId: "boot", uptime: 2.5 }));
    await new GuestChannel(guest.endpoints).poweroff();
    assertEquals(guest.requests.at(-1), "poweroff");
  });
});

Deno.test("GuestChannel waits for a socket with a ping and says what refuses", LEAVES_NOTHING, async () => {
  await withDirectory(async (directory) => {
    const endpoints = guestEndpoints(directory, 1);
    const channel = new GuestChannel(endpoints);
    const ping = channel.ping({ timeout: 5_000 });
    await new Promise((resolve) => setTimeout(resolve, 50));
    {
      await using _ = new FakeGuest(directory, () => 0);
      assertEquals((await ping).version, "1");
    }
    const late = await rejection(channel.ping({ timeout: 50 }));
    assert(late instanceof GuestError && late.message.includes("did not answer within 0.05"), late.message);
    const gone = await rejection(channel.exec(["true"]));
    assert(gone instanceof GuestError && gone.message.includes("no such socket"), gone.message);
    // A socket whose listener died stays in the directory.
    await new Deno.Command(Deno.execPath(), {
      args: [
        "eval",
        `Deno.listen({ transport: "unix", path: ${
          JSON.stringify(endpoints.control)
        } }); Deno.kill(Deno.pid, "SIGKILL")`,
      ],
      stderr: "null",
    }).output();
    const refused = await rejection(channel.ping({ timeout: 5_000 }));
    assert(refused instanceof GuestError && refused.message.includes("refused"), refused.message);
  });
});

Deno.test("GuestChannel runs a command with exact input and output", LEAVES_NOTHING, async () => {
  await withDirectory(async (directory) => {
    await using guest = new FakeGuest(directory, async (script, input, write) => {
      assert(script.includes("'cat'"), script);
      await write(input, encoder.encode("to the error output"));
      return 3;
    });
    const channel = new GuestChannel(guest.endpoints);
    for (const size of [0, 1, 65_536, 200_000]) {
      const bytes = new Uint8Array(size);
      for (let offset = 0; offset < size; offset += 65_536) {
        crypto.getRandomValues(bytes.subarray(offset, offset + 65_536));
      }
      const chunks: Uint8Array[] = [];
      const errors: Uint8Array[] = [];
      const { status } = await channel.exec(["cat"], {
        stdin: ReadableStream.from([bytes.subarray(0, size / 3), bytes.subarray(size / 3)]),
        stdout: (chunk) => {
          chunks.push(chunk);
        },
        stderr: (chunk) => {
          errors.push(chunk);
        },
      });
      assertEquals(status, 3);
      const got = new Uint8Array(await new Blob(chunks.map((chunk) => chunk.slice())).arrayBuffer());
      assert(
        got.length === size && got.every((byte, index) => byte === bytes[index]),
        `${size} bytes differ`,
      );
      assertEquals(decoder.decode(errors[0]), "to the error output");
    }
    assertEquals(await channel.output(["cat"]), { status: 3, stdout: "", stderr: "to the error output" });
  });
});

Deno.test("GuestChannel runs no more commands at once than there are channels", LEAVES_NOTHING, async () => {
  await withDirectory(async (directory) => {
    await using guest = new FakeGuest(directory, async () => {
      await new Promise((resolve) => setTimeout(resolve, 20));
      return 0;
    }, 2);
    const results = await Promise.all(
      Array.from({ length: 6 }, () => new GuestChannel(guest.endpoints).exec(["true"])),
    );
    assertEquals(results, Array(6).fill({ status: 0 }));
    assertEquals(guest.mostSessions, 2);
  });
});

Deno.test(
  "GuestChannel gives up a command with its signal, its input's or its output's error",
  LEAVES_NOTHING,
  async () => {
    await withDirectory(async (directory) => {
      await using guest = new FakeGuest(directory, async (_, __, write) => {
        await write(new Uint8Array(10), new Uint8Array());
        await new Promise((resolve) => setTimeout(resolve, 50));
        return 0;
      });
      const channel = new GuestChannel(guest.endpoints);
      const before = await rejection(channel.exec(["a"], { signal: AbortSignal.abort(new Error("before")) }));
      assertEquals(before.message, "before");
      const controller = new AbortController();
      const during = rejection(channel.exec(["a"], {
        signal: controller.signal,
        stdout: () => controller.abort(new Error("during")),
      }));
      assertEquals((await during).message, "during");
      const output = await rejection(channel.exec(["a"], {
        stdout: () => {
          throw new Error("output");
        },
      }));
      assertEquals(output.message, "output");
      const input = await rejection(channel.exec(["a"], {
        stdin: new ReadableStream({
          pull(stream) {
            stream.error(new Error("input"));
          },
        }),
      }));
      assertEquals(input.message, "input");
      let cancelled = false;
      assertEquals((await channel.exec(["a"])).status, 0);
      const unread = new ReadableStream<Uint8Array>({
        cancel() {
          cancelled = true;
        },
      });
      await rejection(channel.exec([], { stdin: unread }));
      assert(cancelled, "the input of a command that did not run was not cancelled");
    });
  },
);

Deno.test("GuestChannel says what a file operation failed of", LEAVES_NOTHING, async () => {
  await withDirectory(async (directory) => {
    await using guest = new FakeGuest(directory, async (script, input, write) => {
      if (script.includes("'/good'")) {
        await write(new Uint8Array(100_000).fill(7), new Uint8Array());
        return 0;
      }
      await write(new Uint8Array(), encoder.encode(`it broke after ${input.length} bytes\n`));
      return 1;
    });
    const channel = new GuestChannel(guest.endpoints);
    const written = await rejection(channel.writeFile("/bad", new Uint8Array(5)));
    assert(written instanceof GuestError, "no GuestError");
    assertEquals(written.message, "Could not write the file /bad in the guest: it broke after 5 bytes");
    const read = await rejection(channel.readFile("/bad"));
    assertEquals(read.message, "Could not read the file /bad in the guest: it broke after 0 bytes");
    assertEquals((await channel.readFile("/good")).length, 100_000);
    let length = 0;
    for await (const chunk of channel.readFileStream("/good")) length += chunk.length;
    assertEquals(length, 100_000);
    for await (const _ of channel.readFileStream("/good")) break;
    const stream = channel.readFileStream("/bad").getReader();
    assertEquals((await rejection(stream.read())).message, read.message);
  });
});
