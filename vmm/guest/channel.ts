/**
 * The host's side of the conversation with a guest's agent.
 *
 * Several processes may talk to one guest at once: each socket of the machine takes one client at a time,
 * and an advisory lock on a file beside it says whose turn it is.
 *
 * @module
 */

import { AGENT_GREETING, CONSOLE_BLOCK, END_MARK, GUEST_BUSYBOX, READY_MARK } from "./agent.ts";
import { isEnvironmentName, shellQuote } from "./config.ts";

/** The sockets by which a guest is reached, one client each at a time. */
export interface GuestEndpoints {
  /** Path of the control line's socket. */
  control: string;
  /** Paths of the data channels' sockets. */
  data: readonly string[];
  /** Paths of the sockets that carry the data channels' error output, as many and in the same order. */
  errors: readonly string[];
}

/** What the agent of a guest says of itself. */
export interface GuestPing {
  /** Version of the agent's protocol. */
  version: string;
  /** Identifier of the boot, another one after every reboot. */
  bootId: string;
  /** Seconds since the guest booted. */
  uptime: number;
}

/** What every request to a guest can be given. */
export interface GuestRequestOptions {
  /** Ends the wait, and whatever was started in the guest. */
  signal?: AbortSignal;
}

/** What {@linkcode GuestChannel.ping} can be given. */
export interface GuestPingOptions extends GuestRequestOptions {
  /** Milliseconds to wait for a guest that is still booting; 30 seconds if not given. */
  timeout?: number;
}

/** What {@linkcode GuestChannel.output} can be given. */
export interface GuestOutputOptions extends GuestRequestOptions {
  /** What the command reads; nothing if not given. */
  stdin?: ReadableStream<Uint8Array>;
  /** Variables added to the guest's environment. */
  env?: Readonly<Record<string, string>>;
  /** Directory the command starts in; the root if not given. */
  cwd?: string;
}

/** What {@linkcode GuestChannel.exec} can be given. */
export interface GuestExecOptions extends GuestOutputOptions {
  /** Takes the command's output; the command waits while it does not settle. */
  stdout?: (chunk: Uint8Array) => void | Promise<void>;
  /** Takes the command's error output, in the same way. */
  stderr?: (chunk: Uint8Array) => void | Promise<void>;
}

/** What {@linkcode GuestChannel.writeFile} can be given. */
export interface GuestWriteFileOptions extends GuestRequestOptions {
  /** Permission bits of the file; those of the file it replaces, or else 0o644, if not given. */
  mode?: number;
}

/** How a command in a guest ended. */
export interface GuestStatus {
  /** Its exit status: 128 and the number of the signal if one ended it, 127 if there is no such command. */
  status: number;
}

/** How a command in a guest ended, and what it wrote. */
export interface GuestOutput extends GuestStatus {
  /** Its output. */
  stdout: string;
  /** Its error output. */
  stderr: string;
}

/** Says why a guest could not do what it was asked. */
export class GuestError extends Error {
  /** Name of the class. */
  override name = "GuestError";
}

const LOCK_INTERVAL = 20;
const CONNECT_TIMEOUT = 5_000;
const REQUEST_TIMEOUT = 20_000;
const FIRST_PATIENCE = 1_000;
const LAST_PATIENCE = 2_000;
const SILENCE_INTERVAL = 5_000;
const BLOCK_SIZE = 65_536;
const BLOCKS_AT_ONCE = 16;

const encoder = new TextEncoder();
const decoder = new TextDecoder();

function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Waits; rejects with the signal's reason when it is aborted. */
function delay(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal.aborted) {
      reject(signal.reason);
      return;
    }
    function abort(): void {
      clearTimeout(timer);
      reject(signal.reason);
    }
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", abort);
      resolve();
    }, milliseconds);
    signal.addEventListener("abort", abort, { once: true });
  });
}

/** Runs a task with a signal that is aborted with another one, after a time, or by the task's end. */
async function within<T>(
  signal: AbortSignal | undefined,
  timeout: number | undefined,
  expired: () => unknown,
  task: (signal: AbortSignal, abort: (reason: unknown) => void) => Promise<T>,
): Promise<T> {
  signal?.throwIfAborted();
  const controller = new AbortController();
  function abort(): void {
    controller.abort(signal?.reason);
  }
  signal?.addEventListener("abort", abort, { once: true });
  const timer = timeout === undefined ? undefined : setTimeout(() => controller.abort(expired()), timeout);
  try {
    return await task(controller.signal, (reason) => controller.abort(reason));
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
    controller.abort();
  }
}

async function openLock(path: string): Promise<Deno.FsFile> {
  const name = `${path}.lock`;
  try {
    return await Deno.open(name, { write: true, create: true, mode: 0o600 });
  } catch (error) {
    throw new GuestError(
      `Could not reach the guest at ${path}: its lock file cannot be opened: ${message(error)}, ` +
        "check that the machine exists",
      { cause: error },
    );
  }
}

/** Takes the lock of the first path whose lock is free. Closing the file gives it back. */
async function acquire(
  paths: readonly string[],
  signal: AbortSignal,
): Promise<{ index: number; lock: Deno.FsFile }> {
  const locks: Deno.FsFile[] = [];
  let taken = -1;
  try {
    for (const path of paths) locks.push(await openLock(path));
    while (true) {
      signal.throwIfAborted();
      for (const [index, lock] of locks.entries()) {
        if (!await lock.tryLock(true)) continue;
        taken = index;
        return { index, lock };
      }
      await delay(LOCK_INTERVAL * (0.5 + Math.random()), signal);
    }
  } finally {
    for (const [index, lock] of locks.entries()) {
      if (index !== taken) lock.close();
    }
  }
}

/**
 * Keeps clients of a guest from its control line.
 *
 * @param control Path of the control line's socket
 * @returns Gives it back when it is disposed
 */
export async function reserveControlLine(control: string): Promise<Disposable> {
  const { lock } = await acquire([control], new AbortController().signal);
  return lock;
}

/** A socket of the machine, closed when a signal is aborted. */
class Line implements Disposable {
  readonly #connection: Deno.UnixConn;
  readonly #path: string;
  readonly #signal: AbortSignal;
  readonly #close = (): void => {
    try {
      this.#connection.close();
    } catch {
      // It is closed.
    }
  };

  private constructor(connection: Deno.UnixConn, path: string, signal: AbortSignal) {
    this.#connection = connection;
    this.#path = path;
    this.#signal = signal;
    signal.addEventListener("abort", this.#close, { once: true });
    if (signal.aborted) this.#close();
  }

  static async connect(path: string, signal: AbortSignal): Promise<Line> {
    const deadline = performance.now() + CONNECT_TIMEOUT;
    while (true) {
      signal.throwIfAborted();
      try {
        return new Line(await Deno.connect({ transport: "unix", path }), path, signal);
      } catch (error) {
        // The queue is full for as long as QEMU has not noticed that the last client left.
        if (error instanceof Deno.errors.WouldBlock && performance.now() < deadline) {
          await delay(LOCK_INTERVAL, signal);
          continue;
        }
        const why = error instanceof Deno.errors.NotFound
          ? "there is no such socket"
          : error instanceof Deno.errors.ConnectionRefused
          ? "the connection was refused, its QEMU process has ended"
          : message(error);
        throw new GuestError(`Could not reach the guest at ${path}: ${why}, start the machine first`, {
          cause: error,
        });
      }
    }
  }

  #fail(error: unknown): never {
    this.#signal.throwIfAborted();
    throw new GuestError(
      `Lost the connection to the guest at ${this.#path}: ${message(error)}, check whether the machine runs`,
      { cause: error },
    );
  }

  async read(buffer: Uint8Array): Promise<number> {
    try {
      const length = await this.#connection.read(buffer);
      if (length === null) throw new Error("its QEMU process closed it");
      return length;
    } catch (error) {
      return this.#fail(error);
    }
  }

  async write(bytes: Uint8Array): Promise<void> {
    try {
      for (let offset = 0; offset < bytes.length;) {
        offset += await this.#connection.write(bytes.subarray(offset));
      }
    } catch (error) {
      this.#fail(error);
    }
  }

  [Symbol.dispose](): void {
    this.#signal.removeEventListener("abort", this.#close);
    this.#close();
  }
}

function randomHex(bytes: number): string {
  return Array.from(
    crypto.getRandomValues(new Uint8Array(bytes)),
    (byte) => byte.toString(16).padStart(2, "0"),
  ).join("");
}

/** Asks once on a control line that is the caller's, and gives the words of the answer. */
async function ask(line: Line, request: string, signal: AbortSignal): Promise<string[]> {
  const id = randomHex(8);
  // A client that died may have left half a line, which the first newline ends.
  const bytes = encoder.encode(`\n${id} ${request}\n`);
  const buffer = new Uint8Array(4096);
  let text = "";
  await line.write(bytes);
  while (true) {
    signal.throwIfAborted();
    text += decoder.decode(buffer.subarray(0, await line.read(buffer)));
    const lines = text.split("\n");
    text = lines.pop() ?? "";
    for (const answer of lines) {
      const words = answer.trimEnd().split(" ");
      // What was asked before there was an agent may be lost, but it says by itself that it is there.
      const isGreeting = request === "ping" && words[0] === AGENT_GREETING;
      if (words[0] !== id && !isGreeting) continue;
      if (words[1] === "ok") return words.slice(2);
      // Anything else is the request itself, echoed by a terminal that is not set up yet.
      if (words[1] === "error") {
        throw new GuestError(`The guest refused the request "${request}": ${words.slice(2).join(" ")}`);
      }
    }
  }
}

/**
 * Separates what a command writes from the marks around it, in one of a session's two streams.
 *
 * The marks hold a token no command knows, so any bytes may stand between them.
 */
export class SessionStream {
  readonly #ready: Uint8Array;
  readonly #end: Uint8Array;
  #pending: Uint8Array<ArrayBufferLike> = new Uint8Array();
  #started = false;
  #length = 0;
  #status: number | undefined;

  /**
   * Begins at the start of a session.
   *
   * @param token What the session's marks hold
   */
  constructor(token: string) {
    this.#ready = encoder.encode(`${READY_MARK}${token}\n`);
    this.#end = encoder.encode(`${END_MARK}${token} `);
  }

  /** Whether the mark of the start has come. */
  get started(): boolean {
    return this.#started;
  }

  /** How many bytes have come after the mark of the start. */
  get length(): number {
    return this.#length;
  }

  /** The status, once the mark of the end has come. */
  get status(): number | undefined {
    return this.#status;
  }

  /**
   * Takes what the stream brought.
   *
   * @param chunk Bytes that follow those of the last call
   * @returns What the command wrote, as far as it is known to be that
   */
  push(chunk: Uint8Array): Uint8Array {
    if (this.#started) this.#length += chunk.length;
    if (this.#status !== undefined) return new Uint8Array();
    let bytes = chunk;
    if (this.#pending.length > 0) {
      bytes = new Uint8Array(this.#pending.length + chunk.length);
      bytes.set(this.#pending);
      bytes.set(chunk, this.#pending.length);
      this.#pending = new Uint8Array();
    }
    if (!this.#started) {
      const start = find(bytes, this.#ready);
      if (start + this.#ready.length > bytes.length) {
        this.#pending = bytes.slice(start);
        return new Uint8Array();
      }
      this.#started = true;
      bytes = bytes.subarray(start + this.#ready.length);
      this.#length = bytes.length;
    }
    const end = find(bytes, this.#end);
    if (end + this.#end.length <= bytes.length) {
      const newline = bytes.indexOf(0x0a, end + this.#end.length);
      if (newline !== -1) {
        this.#status = Number(decoder.decode(bytes.subarray(end + this.#end.length, newline)));
        return bytes.subarray(0, end);
      }
    }
    this.#pending = bytes.slice(end);
    return bytes.subarray(0, end);
  }
}

/** Where a pattern, or at the end of the bytes a part of it, starts; the bytes' length if nowhere. */
function find(bytes: Uint8Array, pattern: Uint8Array): number {
  const first = pattern[0] ?? 0;
  for (let start = bytes.indexOf(first); start !== -1; start = bytes.indexOf(first, start + 1)) {
    let length = 1;
    while (length < pattern.length && start + length < bytes.length) {
      if (bytes[start + length] !== pattern[length]) break;
      length++;
    }
    if (length === pattern.length || start + length === bytes.length) return start;
  }
  return bytes.length;
}

/**
 * Writes the shell script that a session of the agent's becomes a command with.
 *
 * @param argv The command and its arguments
 * @param options Its environment and directory
 * @returns The script
 */
export function sessionScript(
  argv: readonly string[],
  options: Pick<GuestOutputOptions, "env" | "cwd"> = {},
): string {
  const [name, ...rest] = argv;
  if (name === undefined) {
    throw new TypeError("Could not run a command in the guest: it has no words, give the program's name");
  }
  const assignments = Object.entries(options.env ?? {}).map(([variable, value]) => {
    if (!isEnvironmentName(variable)) {
      throw new TypeError(
        `Could not run ${name} in the guest: ${
          JSON.stringify(variable)
        } is no name of an environment variable, ` +
          "use letters, digits and underscores",
      );
    }
    return shellQuote(`${variable}=${value}`);
  });
  const path = options.env?.PATH;
  const command = [`"$ht_bb" sh -c "$ht_exec"`, shellQuote(name), `"$ht_program"`, ...rest.map(shellQuote)];
  if (assignments.length > 0) command.unshift(`"$ht_bb" env`, ...assignments);
  const lines = [
    `find_program ${shellQuote(name)} ${path === undefined ? `"$PATH"` : shellQuote(path)} || exit`,
    `exec "$ht_bb" setsid ${command.join(" ")}`,
  ];
  if (options.cwd !== undefined) lines.unshift(`enter ${shellQuote(options.cwd)}`);
  return lines.join("\n");
}

/** Sends a command's input in frames, many small chunks in one when they come faster than they go. */
async function sendInput(
  line: Line,
  input: ReadableStreamDefaultReader<Uint8Array>,
): Promise<void> {
  const limit = BLOCK_SIZE * BLOCKS_AT_ONCE;
  let chunks: Uint8Array[] = [];
  let size = 0;
  let ended = false;
  let failure: { error: unknown } | undefined;
  let wake = (): void => {};

  async function collect(): Promise<void> {
    try {
      while (true) {
        const { done, value } = await input.read();
        if (done) break;
        chunks.push(value);
        size += value.length;
        wake();
        while (size >= limit) await new Promise<void>((resolve) => room = resolve);
      }
    } catch (error) {
      failure = { error };
    }
    ended = true;
    wake();
  }
  let room = (): void => {};

  const collecting = collect();
  while (true) {
    while (size === 0 && !ended) await new Promise<void>((resolve) => wake = resolve);
    if (failure !== undefined) throw failure.error;
    if (size === 0) break;
    const bytes = chunks.length === 1 && chunks[0] !== undefined ? chunks[0] : new Uint8Array(size);
    if (chunks.length > 1) {
      let offset = 0;
      for (const chunk of chunks) {
        bytes.set(chunk, offset);
        offset += chunk.length;
      }
    }
    chunks = [];
    size = 0;
    room();
    await sendFrames(line, bytes);
  }
  await collecting;
  await line.write(encoder.encode("0 0\n"));
}

async function sendFrames(line: Line, bytes: Uint8Array): Promise<void> {
  for (let offset = 0; offset < bytes.length;) {
    const left = bytes.length - offset;
    const blocks = Math.min(BLOCKS_AT_ONCE, Math.floor(left / BLOCK_SIZE));
    const length = blocks === 0 ? left : blocks * BLOCK_SIZE;
    await line.write(encoder.encode(blocks === 0 ? `${left} 1\n` : `${BLOCK_SIZE} ${blocks}\n`));
    await line.write(bytes.subarray(offset, offset + length));
    offset += length;
  }
}

/**
 * Speaks with the agent of one guest.
 *
 * @example
 * ```ts ignore
 * const guest = new GuestChannel(guestEndpoints("/run/machine", 6));
 * await guest.ping({ timeout: 60_000 });
 * const { stdout } = await guest.output(["uname", "-a"]);
 * ```
 */
export class GuestChannel {
  readonly #endpoints: GuestEndpoints;

  /**
   * Connects to nothing yet.
   *
   * @param endpoints Where the guest is reached
   */
  constructor(endpoints: GuestEndpoints) {
    if (endpoints.data.length === 0 || endpoints.data.length !== endpoints.errors.length) {
      throw new TypeError(
        `Could not use the guest's endpoints: ${endpoints.data.length} data channels have ` +
          `${endpoints.errors.length} error sockets, give as many of each and at least one`,
      );
    }
    this.#endpoints = endpoints;
  }

  /** Asks for something on the control line, in turn with others. */
  async #request(request: string, signal: AbortSignal | undefined, timeout: number): Promise<string[]> {
    const { control } = this.#endpoints;
    return await within(
      signal,
      timeout,
      () =>
        new GuestError(
          `Could not ask the guest at ${control} to ${request.split(" ")[0]}: it did not answer within ` +
            `${timeout / 1000} seconds, look at its console`,
        ),
      async (signal) => {
        const { lock } = await acquire([control], signal);
        try {
          using line = await Line.connect(control, signal);
          return await ask(line, request, signal);
        } finally {
          lock.close();
        }
      },
    );
  }

  /**
   * Asks the guest whether it is there, and again until it answers, for it may still be booting.
   *
   * @param options How long to wait
   * @returns What it says of itself
   */
  async ping(options: GuestPingOptions = {}): Promise<GuestPing> {
    const timeout = options.timeout ?? 30_000;
    const { control } = this.#endpoints;
    let last: unknown;
    let patience = FIRST_PATIENCE;
    return await within(
      options.signal,
      timeout,
      () =>
        new GuestError(
          `Could not reach the guest at ${control}: it did not answer within ${timeout / 1000} seconds, ` +
            "look at its console",
          { cause: last },
        ),
      async (signal) => {
        while (true) {
          try {
            // Short turns: other clients wait for the line as well.
            const [version = "", bootId = "", uptime = ""] = await this.#request(
              "ping",
              signal,
              patience,
            );
            return { version, bootId, uptime: Number(uptime) };
          } catch (error) {
            signal.throwIfAborted();
            const cause = error instanceof GuestError ? error.cause : undefined;
            // A machine that is being started has no socket yet.
            if (cause !== undefined && !(cause instanceof Deno.errors.NotFound)) throw error;
            last = error;
            patience = Math.min(patience * 1.5, LAST_PATIENCE);
            await delay(LOCK_INTERVAL, signal);
          }
        }
      },
    );
  }

  /**
   * Runs a command in the guest.
   *
   * The command ends when it ends by itself or when its client does: its session is then asked to end, and
   * killed some two seconds later. What a command that ended by itself left running stays.
   *
   * @param argv The command and its arguments, as the program is to get them
   * @param options Its input, environment and directory, and where its output goes
   * @returns Its status
   */
  async exec(argv: readonly string[], options: GuestExecOptions = {}): Promise<GuestStatus> {
    const input = options.stdin?.getReader();
    try {
      const script = sessionScript(argv, options);
      return await within(options.signal, undefined, () => undefined, async (signal, abort) => {
        const { index, lock } = await acquire(this.#endpoints.data, signal);
        try {
          return await this.#session(index, script, { ...options, input }, signal, abort);
        } finally {
          lock.close();
        }
      });
    } finally {
      // What the command did not read is of no use to anyone.
      input?.cancel().catch(() => {});
    }
  }

  async #session(
    index: number,
    script: string,
    options: GuestExecOptions & { input: ReadableStreamDefaultReader<Uint8Array> | undefined },
    signal: AbortSignal,
    abort: (reason: unknown) => void,
  ): Promise<GuestStatus> {
    const { data = "", errors = "" } = {
      data: this.#endpoints.data[index],
      errors: this.#endpoints.errors[index],
    };
    using dataLine = await Line.connect(data, signal);
    using errorLine = await Line.connect(errors, signal);
    const token = randomHex(16);
    const [transport] = await this.#request(`open ${index} ${token}`, signal, REQUEST_TIMEOUT);
    const isConsole = transport === "tty";

    const started = Promise.withResolvers<void>();
    const streams: SessionStream[] = [];
    let heard = performance.now();
    async function receive(line: Line, take: GuestExecOptions["stdout"]): Promise<number> {
      const stream = new SessionStream(token);
      streams.push(stream);
      const buffer = new Uint8Array(BLOCK_SIZE);
      let blocks = 0;
      while (stream.status === undefined) {
        const length = await line.read(buffer);
        heard = performance.now();
        const bytes = stream.push(buffer.subarray(0, length));
        if (streams.length === 2 && streams.every((stream) => stream.started)) started.resolve();
        if (bytes.length > 0) await take?.(bytes.slice());
        heard = performance.now();
        if (!isConsole) continue;
        for (; blocks < Math.floor(stream.length / CONSOLE_BLOCK); blocks++) {
          await errorLine.write(encoder.encode("\n"));
        }
      }
      return stream.status;
    }

    async function send(): Promise<void> {
      await started.promise;
      const { input } = options;
      const bytes = encoder.encode(script);
      if (isConsole) {
        // What an earlier client has sent and nobody has read comes before.
        const mark = encoder.encode(`\n${token}\n`);
        await errorLine.write(mark);
        await dataLine.write(mark);
      }
      await dataLine.write(encoder.encode(`${bytes.length} ${input === undefined ? 0 : 1}\n`));
      await dataLine.write(bytes);
      if (input !== undefined) await sendInput(dataLine, input);
    }

    // A silent session is asked for now and then: a guest that reboots closes no socket.
    const watch = async (signal: AbortSignal): Promise<never> => {
      while (true) {
        await delay(SILENCE_INTERVAL, signal);
        if (performance.now() - heard < SILENCE_INTERVAL) continue;
        let state: string | undefined;
        try {
          [state] = await this.#request(`check ${index}`, signal, REQUEST_TIMEOUT);
        } catch (error) {
          signal.throwIfAborted();
          // A guest that is paused or busy answers later; one that has no process any more, never.
          if (error instanceof GuestError && error.cause === undefined) continue;
          throw error;
        }
        if (state !== "gone") continue;
        await delay(SILENCE_INTERVAL / 5, signal);
        throw new GuestError(
          "Lost the command in the guest: its session has ended without a status, " +
            "check whether the guest was restarted or ran out of memory",
        );
      }
    };

    return await within(signal, undefined, () => undefined, async (signal) => {
      let failed = false;
      function fail(error: unknown): void {
        if (failed) return;
        failed = true;
        abort(error);
      }
      const receiving = Promise.all([
        receive(dataLine, options.stdout),
        receive(errorLine, options.stderr),
      ]);
      // Input may never be taken: only the end of the output ends the session.
      const sending = send();
      const watching = watch(signal);
      let ended = false;
      const failure = new Promise<never>((_, reject) => {
        for (const part of [sending, watching]) {
          part.catch((error) => {
            if (ended) return;
            fail(error);
            reject(error);
          });
        }
      });
      try {
        const [status] = await Promise.race([receiving, failure]);
        return { status };
      } catch (error) {
        fail(error);
        // The reason if this is how the readers came to fail.
        signal.throwIfAborted();
        throw error;
      } finally {
        ended = true;
        receiving.catch(() => {});
        failure.catch(() => {});
      }
    });
  }

  /**
   * Runs a command in the guest and gathers what it writes.
   *
   * @param argv The command and its arguments
   * @param options Its input, environment and directory
   * @returns Its status and what it wrote, as UTF-8 text
   */
  async output(argv: readonly string[], options: GuestOutputOptions = {}): Promise<GuestOutput> {
    const stdout = new TextDecoder();
    const stderr = new TextDecoder();
    const result = { status: 0, stdout: "", stderr: "" };
    const { status } = await this.exec(argv, {
      ...options,
      stdout: (chunk) => {
        result.stdout += stdout.decode(chunk, { stream: true });
      },
      stderr: (chunk) => {
        result.stderr += stderr.decode(chunk, { stream: true });
      },
    });
    result.stdout += stdout.decode();
    result.stderr += stderr.decode();
    return { ...result, status };
  }

  /** Runs a script of busybox's that has to succeed; what it complains of is the error's text. */
  async #script(
    what: string,
    script: string,
    parameters: readonly string[],
    options: Pick<GuestExecOptions, "stdin" | "stdout" | "signal">,
  ): Promise<void> {
    const complaints = new TextDecoder();
    let text = "";
    const { status } = await this.exec([GUEST_BUSYBOX, "sh", "-c", script, "sh", ...parameters], {
      ...options,
      stderr: (chunk) => {
        if (text.length < 4096) text += complaints.decode(chunk, { stream: true });
      },
    });
    if (status !== 0) {
      throw new GuestError(`Could not ${what} in the guest: ${text.trim() || `status ${status}`}`);
    }
  }

  /**
   * Writes a file in the guest, whole or not at all.
   *
   * @param path Where; directories on the way are made
   * @param data What it is to hold
   * @param options Its permission bits
   */
  async writeFile(
    path: string,
    data: ReadableStream<Uint8Array> | Uint8Array,
    options: GuestWriteFileOptions = {},
  ): Promise<void> {
    const stdin = data instanceof ReadableStream ? data : ReadableStream.from([data]);
    await this.#script(`write the file ${path}`, WRITE_SCRIPT, [
      path,
      options.mode === undefined ? "" : options.mode.toString(8),
    ], { ...options, stdin });
  }

  /**
   * Reads a file in the guest.
   *
   * @param path Which
   * @param options A signal to stop it
   * @returns All it holds
   */
  async readFile(path: string, options: GuestRequestOptions = {}): Promise<Uint8Array> {
    const chunks: Uint8Array[] = [];
    await this.#read(path, options, (chunk) => {
      chunks.push(chunk);
    });
    const bytes = new Uint8Array(chunks.reduce((length, chunk) => length + chunk.length, 0));
    let offset = 0;
    for (const chunk of chunks) {
      bytes.set(chunk, offset);
      offset += chunk.length;
    }
    return bytes;
  }

  /**
   * Reads a file in the guest piece by piece.
   *
   * @param path Which
   * @param options A signal to stop it
   * @returns What it holds; the stream errs if that does not come in full
   */
  readFileStream(path: string, options: GuestRequestOptions = {}): ReadableStream<Uint8Array> {
    return streamOf(options.signal, (signal, take) => this.#read(path, { signal }, take));
  }

  async #read(
    path: string,
    options: GuestRequestOptions,
    take: (chunk: Uint8Array) => void | Promise<void>,
  ): Promise<void> {
    await this.#script(`read the file ${path}`, READ_SCRIPT, [path], { ...options, stdout: take });
  }

  /**
   * Copies what a directory of the host holds into one of the guest's.
   *
   * @param from The host's directory
   * @param to The guest's, made if it is not there; files get root as owner
   * @param options A signal to stop it
   */
  async putDirectory(from: string, to: string, options: GuestRequestOptions = {}): Promise<void> {
    const what = `copy the directory ${from} to ${to}`;
    using tar = new HostTar(what, ["-c", "-f", "-", "-C", from, "."], "null");
    try {
      await this.#script(what, PUT_SCRIPT, [to], { ...options, stdin: tar.output });
    } catch (error) {
      // What the guest complains of may be what the host's tar did not send.
      if (error instanceof GuestError) await tar.finish();
      throw error;
    }
    await tar.finish();
  }

  /**
   * Copies what a directory of the guest holds into one of the host's.
   *
   * @param from The guest's directory
   * @param to The host's, made if it is not there; files get the caller as owner
   * @param options A signal to stop it
   */
  async getDirectory(from: string, to: string, options: GuestRequestOptions = {}): Promise<void> {
    const what = `copy the directory ${from} to the host's ${to}`;
    await Deno.mkdir(to, { recursive: true });
    using tar = new HostTar(what, ["-x", "-f", "-", "-C", to, "--no-same-owner"], "piped");
    await this.#script(what, GET_SCRIPT, [from], { ...options, stdout: (chunk) => tar.write(chunk) });
    await tar.finish();
  }

  /**
   * Asks the guest to power off in good order, and does not wait for it.
   *
   * @param options A signal to stop asking
   */
  async poweroff(options: GuestRequestOptions = {}): Promise<void> {
    await this.#request("poweroff", options.signal, REQUEST_TIMEOUT);
  }

  /**
   * Asks the guest to restart in good order, and does not wait for it: {@linkcode GuestChannel.ping} gives
   * another boot identifier once it has.
   *
   * @param options A signal to stop asking
   */
  async reboot(options: GuestRequestOptions = {}): Promise<void> {
    await this.#request("reboot", options.signal, REQUEST_TIMEOUT);
  }
}

// $1 is the path, $2 the mode. Where no file can be made, as for a device or the kernel's files, it is
// written in place.
const WRITE_SCRIPT = `
case $1 in /*) path=$1 ;; *) path=/$1 ;; esac
mkdir -p "\${path%/*}/" || exit
real=$(readlink -f "$path") && path=$real
if [ -d "$path" ]; then
  echo "it is a directory" >&2
  exit 1
fi
part=$path.part.$$
if { [ -e "$path" ] && ! [ -f "$path" ]; } || ! (: >"$part") 2>/dev/null; then
  exec cat >"$path"
fi
trap 'rm -f "$part"' EXIT
trap 'exit 1' TERM HUP INT
mode=\${2:-644}
if [ -e "$path" ]; then
  [ -n "$2" ] || mode=$(stat -c %a "$path")
  chown "$(stat -c %u:%g "$path")" "$part"
fi
cat >"$part" && chmod "$mode" "$part" && mv -f "$part" "$path"
`;

const READ_SCRIPT = `exec cat -- "$1"`;
const PUT_SCRIPT = `mkdir -p "$1" && tar x -o -f - -C "$1" && cat >/dev/null`;
const GET_SCRIPT = `exec tar c -f - -C "$1" .`;

/** Makes a stream of what a task hands over, as fast as it is taken. */
function streamOf(
  signal: AbortSignal | undefined,
  task: (signal: AbortSignal, take: (chunk: Uint8Array) => Promise<void>) => Promise<void>,
): ReadableStream<Uint8Array> {
  const stop = new AbortController();
  let wanted = Promise.withResolvers<void>();
  return new ReadableStream<Uint8Array>({
    start(controller) {
      const signals = signal === undefined ? [stop.signal] : [stop.signal, signal];
      task(AbortSignal.any(signals), async (chunk) => {
        controller.enqueue(chunk);
        if ((controller.desiredSize ?? 1) > 0) return;
        wanted = Promise.withResolvers<void>();
        await wanted.promise;
      }).then(() => controller.close(), (error) => controller.error(error));
    },
    pull() {
      wanted.resolve();
    },
    cancel(reason) {
      stop.abort(reason);
      wanted.resolve();
    },
  });
}

/** The host's tar, at one end of a copy. */
class HostTar implements Disposable {
  readonly #what: string;
  readonly #process: Deno.ChildProcess;
  readonly #complaints: Promise<string>;
  readonly #writer: WritableStreamDefaultWriter<Uint8Array> | undefined;

  constructor(what: string, args: string[], stdin: "null" | "piped") {
    this.#what = what;
    this.#process = new Deno.Command("tar", {
      args,
      stdin,
      stdout: "piped",
      stderr: "piped",
      // Keeps macOS from adding files of its own.
      env: { COPYFILE_DISABLE: "1", LC_ALL: "C" },
    }).spawn();
    this.#complaints = new Response(this.#process.stderr).text().catch(() => "");
    this.#writer = stdin === "piped" ? this.#process.stdin.getWriter() : undefined;
  }

  get output(): ReadableStream<Uint8Array> {
    return this.#process.stdout;
  }

  async write(chunk: Uint8Array): Promise<void> {
    try {
      await this.#writer?.write(chunk);
    } catch {
      await this.finish();
    }
  }

  async finish(): Promise<void> {
    await this.#writer?.close().catch(() => {});
    if (this.#writer !== undefined) await this.#process.stdout.cancel();
    const { success, signal } = await this.#process.status;
    // One that was ended by a signal had nobody to write to.
    if (!success && signal === null) {
      throw new GuestError(
        `Could not ${this.#what}: the host's tar failed: ${(await this.#complaints).trim()}`,
      );
    }
  }

  [Symbol.dispose](): void {
    try {
      this.#process.kill("SIGKILL");
    } catch {
      // It has ended.
    }
    this.#writer?.abort().catch(() => {});
    if (!this.#process.stdout.locked) this.#process.stdout.cancel().catch(() => {});
    this.#process.status.catch(() => {});
  }
}

/**
 * Names the sockets of a machine whose run-time files are in one directory.
 *
 * @param directory The directory; its path has to be short, for a socket's has at most 107 bytes
 * @param channels How many commands can run in the guest at once
 * @returns The sockets
 */
export function guestEndpoints(directory: string, channels: number): GuestEndpoints {
  const numbers = Array.from({ length: channels }, (_, number) => number);
  return {
    control: `${directory}/control.sock`,
    data: numbers.map((number) => `${directory}/data.${number}.sock`),
    errors: numbers.map((number) => `${directory}/data.${number}.err.sock`),
  };
}

/**
 * Writes the arguments that give a QEMU machine the devices the agent speaks by. The kernel is to be told
 * `hypertopia.control=hvc0`.
 *
 * @param endpoints The sockets QEMU is to listen on
 * @returns The arguments
 */
export function guestDeviceArguments(endpoints: GuestEndpoints): string[] {
  const ports = endpoints.data.flatMap((path, number) => [
    { id: `hypertopia.${number}`, path },
    { id: `hypertopia.${number}.err`, path: endpoints.errors[number] ?? "" },
  ]);
  function chardev(id: string, path: string): string[] {
    if (encoder.encode(path).length > 107) {
      throw new GuestError(
        `Could not make the socket ${path} of the guest: its path has more than 107 bytes, ` +
          "use a directory with a shorter path",
      );
    }
    return ["-chardev", `socket,id=${id},path=${path.replaceAll(",", ",,")},server=on,wait=off`];
  }
  return [
    "-device",
    `virtio-serial-pci,id=hypertopia,max_ports=${ports.length + 1}`,
    ...chardev("hypertopia.control", endpoints.control),
    // The first port of the machine, and so the guest's hvc0.
    "-device",
    "virtconsole,bus=hypertopia.0,nr=0,chardev=hypertopia.control",
    ...ports.flatMap(({ id, path }, index) => [
      ...chardev(id, path),
      "-device",
      `virtserialport,bus=hypertopia.0,nr=${index + 1},name=${id},chardev=${id}`,
    ]),
  ];
}
