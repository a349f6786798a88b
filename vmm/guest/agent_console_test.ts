/** The agent where its channels are terminals: here pseudo-terminals in the place of a Xen guest's consoles. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { AGENT_SCRIPT, CONSOLE_BLOCK, GUEST_RUN_DIRECTORY, READY_MARK } from "./agent.ts";
import { GuestChannel, type GuestEndpoints, guestEndpoints } from "./channel.ts";

const CHANNELS = 2;
const TIMEOUT = 60_000;
const encoder = new TextEncoder();
const O_RDWR = 2;
const O_NOCTTY = 0o400;
const F_SETFL = 4;
const O_NONBLOCK = 0o4000;

const libc = Deno.build.os === "linux"
  ? Deno.dlopen("libc.so.6", {
    posix_openpt: { parameters: ["i32"], result: "i32" },
    unlockpt: { parameters: ["i32"], result: "i32" },
    ptsname_r: { parameters: ["i32", "buffer", "usize"], result: "i32" },
    fcntl: { parameters: ["i32", "i32", "i32"], result: "i32" },
    read: { parameters: ["i32", "buffer", "usize"], result: "isize" },
    write: { parameters: ["i32", "buffer", "usize"], result: "isize" },
    close: { parameters: ["i32"], result: "i32" },
  }).symbols
  : undefined;

/** The host's end of a pseudo-terminal. */
class Terminal implements Disposable {
  readonly #fd: number;
  readonly #guest: Deno.FsFile;
  readonly path: string;

  constructor() {
    this.#fd = libc!.posix_openpt(O_RDWR | O_NOCTTY);
    const name = new Uint8Array(64);
    assert(this.#fd >= 0 && libc!.unlockpt(this.#fd) === 0);
    assert.equal(libc!.ptsname_r(this.#fd, name, 64n), 0);
    assert.equal(libc!.fcntl(this.#fd, F_SETFL, O_NONBLOCK), 0);
    this.path = new TextDecoder().decode(name.subarray(0, name.indexOf(0)));
    // Reading fails for as long as nobody has the other end open.
    this.#guest = Deno.openSync(this.path, { read: true, write: true });
  }

  read(bytes: Uint8Array<ArrayBuffer>): number {
    return Math.max(0, Number(libc!.read(this.#fd, bytes, BigInt(bytes.length))));
  }

  /** Writes what there is room for. */
  write(bytes: Uint8Array<ArrayBuffer>): number {
    return Math.max(0, Number(libc!.write(this.#fd, bytes, BigInt(bytes.length))));
  }

  [Symbol.dispose](): void {
    this.#guest.close();
    libc!.close(this.#fd);
  }
}

interface Line {
  readonly terminal: Terminal;
  readonly listener: Deno.UnixListener;
  readonly channel?: Channel;
  client: Deno.UnixConn | undefined;
  /** Bytes that the guest has written. */
  written: number;
}

interface Channel {
  readonly errors: Terminal;
  hasSession: boolean;
}

/** A guest of terminals: its agent, and on the host's side what moves bytes between them and sockets. */
class TerminalGuest implements AsyncDisposable {
  readonly endpoints: GuestEndpoints;
  readonly folder: string;
  readonly lines: Line[] = [];
  readonly #terminals: Terminal[];
  readonly #tasks: Promise<void>[] = [];
  #agent: Deno.ChildProcess | undefined;
  #isOver = false;

  private constructor(folder: string) {
    this.folder = folder;
    this.endpoints = guestEndpoints(folder, CHANNELS);
    this.#terminals = Array.from({ length: 1 + 2 * CHANNELS }, () => new Terminal());
  }

  static async start(): Promise<TerminalGuest> {
    const guest = new TerminalGuest(await Deno.makeTempDir({ prefix: "hyp-" }));
    const { folder } = guest;
    const run = join(folder, "run");
    await Deno.mkdir(join(run, "bin"), { recursive: true });
    await Deno.symlink(BUSYBOX!, join(run, "bin/busybox"));
    for (const [index, { path }] of guest.#terminals.entries()) {
      await Deno.symlink(path, join(folder, `hvc${1 + index}`));
    }
    await Deno.writeTextFile(
      join(folder, "cmdline"),
      "quiet hypertopia.control=hvc1 hypertopia.channels=hvc2\n",
    );
    await Deno.writeTextFile(
      join(run, "agent"),
      AGENT_SCRIPT.replaceAll(GUEST_RUN_DIRECTORY, run).replaceAll("/dev/", `${folder}/`)
        .replaceAll(`${folder}/null`, "/dev/null").replaceAll("/proc/cmdline", `${folder}/cmdline`),
    );
    guest.#listen();
    // As the leader of a session, as in a guest.
    guest.#agent = new Deno.Command("setsid", {
      args: [join(run, "bin/busybox"), "sh", join(run, "agent"), "serve"],
      stdin: "null",
      stdout: "null",
      stderr: "null",
    }).spawn();
    return guest;
  }

  #listen(): void {
    const { control, data, errors } = this.endpoints;
    const paths = [control, ...data.flatMap((path, index) => [path, errors[index]!])];
    let channel: Channel | undefined;
    for (const [index, path] of paths.entries()) {
      if (index % 2 === 1) channel = { errors: this.#terminals[index + 1]!, hasSession: false };
      const line: Line = {
        terminal: this.#terminals[index]!,
        listener: Deno.listen({ transport: "unix", path }),
        client: undefined,
        written: 0,
        ...(channel ? { channel } : {}),
      };
      this.lines.push(line);
      this.#tasks.push(this.#toGuest(line), this.#toClients(line));
    }
  }

  async #toGuest(line: Line): Promise<void> {
    for await (const client of line.listener) {
      line.client = client;
      const chunks: Uint8Array<ArrayBuffer>[] = [];
      // It must be seen that a client has left though the guest takes none of what it has sent, which is for nobody then.
      const writing = this.#write(line, client, chunks);
      const buffer = new Uint8Array(65_536);
      while (true) {
        const length = await client.read(buffer).catch(() => null);
        if (length === null) break;
        chunks.push(buffer.slice(0, length));
      }
      line.client = undefined;
      await writing;
      client.close();
      if (!line.channel?.hasSession) continue;
      line.channel.hasSession = false;
      line.channel.errors.write(encoder.encode("leave\n"));
    }
  }

  async #write(line: Line, client: Deno.UnixConn, chunks: Uint8Array<ArrayBuffer>[]): Promise<void> {
    while (line.client === client) {
      const written = chunks[0] ? line.terminal.write(chunks[0]) : 0;
      if (written === 0) await pause();
      else if (written === chunks[0]!.length) chunks.shift();
      else chunks[0] = chunks[0]!.subarray(written);
    }
  }

  async #toClients(line: Line): Promise<void> {
    const buffer = new Uint8Array(2048);
    while (!this.#isOver) {
      const length = line.terminal.read(buffer);
      if (length === 0) {
        await pause();
        continue;
      }
      line.written += length;
      if (line.channel && line.client) line.channel.hasSession = true;
      for (let at = 0; at < length && line.client;) {
        at += await line.client.write(buffer.slice(at, length)).catch(() => length);
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#agent?.kill("SIGKILL");
    await this.#agent?.status;
    for (let channel = 0; channel < CHANNELS; channel++) {
      const text = await Deno.readTextFile(join(this.folder, `run/session.${channel}`)).catch(() => "");
      for (const group of text.trim().split(/\s+/).filter(Boolean)) {
        try {
          Deno.kill(-Number(group), "SIGKILL");
        } catch {
          // It has ended.
        }
      }
    }
    this.#isOver = true;
    for (const line of this.lines) {
      line.listener.close();
      line.client?.close();
      line.client = undefined;
    }
    await Promise.all(this.#tasks.map((task) => task.catch(() => {})));
    for (const terminal of this.#terminals) terminal[Symbol.dispose]();
    await Deno.remove(this.folder, { recursive: true });
  }
}

function pause(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 1));
}

async function until(what: string, holds: () => boolean | Promise<boolean>): Promise<void> {
  const end = Date.now() + TIMEOUT;
  while (!(await holds())) {
    assert(Date.now() < end, `${what} did not come true`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

const BUSYBOX = ["/usr/bin/busybox", "/bin/busybox"].find((path) => {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
});

function terminalTest(
  name: string,
  run: (guest: TerminalGuest, channel: GuestChannel) => Promise<void>,
): void {
  Deno.test({
    name,
    ignore: !libc || BUSYBOX === undefined,
    async fn() {
      await using guest = await TerminalGuest.start();
      const channel = new GuestChannel(guest.endpoints);
      await channel.ping({ timeout: TIMEOUT });
      await run(guest, channel);
    },
  });
}

terminalTest("the agent runs commands on terminals, byte for byte", async (_, channel) => {
  assert.deepEqual(await channel.output(["sh", "-c", "echo out; echo err >&2; exit 3"]), {
    status: 3,
    stdout: "out\n",
    stderr: "err\n",
  });
  const bytes = new Uint8Array(3 * CONSOLE_BLOCK + 100).map((_, index) => index * 31 + (index >> 8));
  const chunks: Uint8Array[] = [];
  const { status } = await channel.exec(["cat"], {
    stdin: ReadableStream.from([bytes]),
    stdout: (chunk) => void chunks.push(chunk.slice()),
  });
  assert.equal(status, 0);
  assert.deepEqual(new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer()), bytes);
  // One after the other: what says that a client has left may come late.
  for (let turn = 0; turn < 12; turn++) {
    assert.equal((await channel.output(["echo", String(turn)])).stdout, `${turn}\n`);
  }
});

terminalTest("nothing that a client has left behind confuses the next one", async (guest, channel) => {
  const killer = new AbortController();
  const file = join(guest.folder, "pid");
  // It reads none of its input, and nobody takes its output.
  const killed = channel.exec(["sh", "-c", `echo $$ >${file}; yes ${READY_MARK}; sleep 1000`], {
    stdin: ReadableStream.from(Array.from({ length: 20 }, () => encoder.encode("rubbish\n".repeat(8000)))),
    stdout: () => new Promise(() => {}),
    signal: killer.signal,
  });
  killed.catch(() => {});
  await until("the command", async () => (await Deno.readTextFile(file).catch(() => "")) !== "");
  const pid = (await Deno.readTextFile(file)).trim();
  // No process of the session has a terminal that could end it.
  const [group] = (await Deno.readTextFile(join(guest.folder, "run/session.0"))).split(" ");
  for (const each of [group, pid]) {
    const stat = await Deno.readTextFile(`/proc/${each}/stat`);
    assert.equal(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[4], "0");
  }
  killer.abort(new Error("enough"));
  await assert.rejects(killed, /enough/);
  const next = await channel.output(["cat"], { stdin: ReadableStream.from([encoder.encode("mine")]) });
  assert.deepEqual(next, { status: 0, stdout: "mine", stderr: "" });
  await until("the end of the killed command", () => Deno.stat(`/proc/${pid}`).then(() => false, () => true));
});

terminalTest("a command ends with its client, though nobody follows", async (guest, channel) => {
  const killer = new AbortController();
  const file = join(guest.folder, "pid");
  const killed = channel.exec(["sh", "-c", `echo $$ >${file}; exec sleep 1000`], { signal: killer.signal });
  killed.catch(() => {});
  await until("the command", async () => (await Deno.readTextFile(file).catch(() => "")) !== "");
  const pid = (await Deno.readTextFile(file)).trim();
  killer.abort();
  await until("its end", () => Deno.stat(`/proc/${pid}`).then(() => false, () => true));
});

terminalTest("no more output is on its way than the host has room for", async (guest, channel) => {
  const held = Promise.withResolvers<void>();
  const total = 10 * CONSOLE_BLOCK;
  let taken = 0;
  const command = channel.exec(["head", "-c", String(total), "/dev/zero"], {
    stdout: async (chunk) => {
      taken += chunk.length;
      await held.promise;
    },
  });
  const data = guest.lines[1]!;
  await until("a full console", () => data.written >= 2 * CONSOLE_BLOCK);
  await new Promise((resolve) => setTimeout(resolve, 200));
  assert(data.written < 2 * CONSOLE_BLOCK + 100, `${data.written} bytes are on their way`);
  held.resolve();
  assert.equal((await command).status, 0);
  assert.equal(taken, total);
});
