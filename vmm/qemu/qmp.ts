/**
 * A client of QEMU's machine protocol (QMP), QEMU 7.2 `docs/interop/qmp-spec.txt`.
 *
 * @module
 */

import { MachineError } from "../errors.ts";

/** An event from QEMU. */
export interface QmpEvent {
  /** Name, such as `SHUTDOWN`. */
  readonly event: string;
  /** Details. */
  readonly data?: Readonly<Record<string, unknown>>;
}

/** A command was refused by QEMU. */
export class QmpError extends MachineError {
  /** Class of the error, such as `DeviceNotFound`. */
  readonly errorClass: string;

  /**
   * Carries QEMU's own words.
   *
   * @param command The command
   * @param errorClass Class of the error
   * @param description QEMU's own words
   */
  constructor(command: string, errorClass: string, description: string) {
    super(`QEMU refused "${command}": ${description}`);
    this.name = "QmpError";
    this.errorClass = errorClass;
  }
}

interface Message {
  readonly QMP?: unknown;
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
  readonly event?: string;
  readonly data?: Readonly<Record<string, unknown>>;
  readonly id?: number;
}

/** A connection to QEMU's monitor. QEMU serves one client at a time: keep it short. */
export class Qmp implements AsyncDisposable {
  readonly #connection: Deno.UnixConn;
  readonly #pending = new Map<
    number,
    { command: string; resolve: (value: unknown) => void; reject: (error: Error) => void }
  >();
  readonly #watchers = new Set<(event: QmpEvent) => void>();
  #greeted!: (error?: Error) => void;
  #nextId = 1;
  #closed: Error | undefined;
  #reading: Promise<void>;

  private constructor(connection: Deno.UnixConn) {
    this.#connection = connection;
    this.#reading = this.#read();
  }

  /**
   * Connects and waits until QEMU serves this client.
   *
   * @param path Path of the monitor's socket
   * @param options How long to wait for others to leave, in milliseconds
   * @returns The connection
   */
  static async connect(path: string, options: { timeout?: number; signal?: AbortSignal } = {}): Promise<Qmp> {
    const connection = await Deno.connect({ transport: "unix", path });
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const qmp = new Qmp(connection);
    qmp.#greeted = (error) => error ? reject(error) : resolve();
    const limit = AbortSignal.timeout(options.timeout ?? 10_000);
    const signal = options.signal ? AbortSignal.any([options.signal, limit]) : limit;
    const abort = () =>
      reject(
        options.signal?.aborted
          ? options.signal.reason
          : new MachineError(`Cannot use the monitor "${path}" as another client has held it for too long`),
      );
    signal.addEventListener("abort", abort);
    try {
      await promise;
      await qmp.execute("qmp_capabilities");
      return qmp;
    } catch (error) {
      await qmp[Symbol.asyncDispose]();
      throw error;
    } finally {
      signal.removeEventListener("abort", abort);
    }
  }

  /**
   * Runs a command.
   *
   * @param command Its name
   * @param args Its arguments
   * @returns What it returns
   * @throws {QmpError} If QEMU refuses it
   */
  async execute(command: string, args?: Readonly<Record<string, unknown>>): Promise<unknown> {
    if (this.#closed) throw this.#closed;
    const id = this.#nextId++;
    const result = new Promise((resolve, reject) => this.#pending.set(id, { command, resolve, reject }));
    const line = JSON.stringify({ execute: command, ...(args ? { arguments: args } : {}), id }) + "\n";
    try {
      const bytes = new TextEncoder().encode(line);
      for (let offset = 0; offset < bytes.length;) {
        offset += await this.#connection.write(bytes.subarray(offset));
      }
    } catch (cause) {
      this.#fail(new MachineError("QEMU closed its monitor", { cause }));
    }
    return await result;
  }

  /**
   * Runs a command of the human monitor, for what QMP lacks.
   *
   * @param line The command line
   * @returns What it printed
   */
  async human(line: string): Promise<string> {
    return String(await this.execute("human-monitor-command", { "command-line": line }));
  }

  /**
   * Waits for an event.
   *
   * @param test Picks the event
   * @param timeout Milliseconds
   * @returns The event, or undefined after the timeout
   */
  waitFor(test: (event: QmpEvent) => boolean, timeout: number): Promise<QmpEvent | undefined> {
    return new Promise((resolve) => {
      const done = (event?: QmpEvent) => {
        clearTimeout(timer);
        this.#watchers.delete(watch);
        resolve(event);
      };
      const watch = (event: QmpEvent) => test(event) && done(event);
      const timer = setTimeout(done, timeout);
      this.#watchers.add(watch);
    });
  }

  /** Waits until QEMU closes the connection, as it does when it ends. */
  async closed(): Promise<void> {
    await this.#reading;
  }

  /** Disconnects. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#fail(new MachineError("The connection to QEMU's monitor is closed"));
    try {
      this.#connection.close();
    } catch {
      // Closed by QEMU.
    }
    await this.#reading;
  }

  async #read(): Promise<void> {
    const decoder = new TextDecoder();
    const buffer = new Uint8Array(16384);
    let text = "";
    try {
      for (
        let count = await this.#connection.read(buffer);
        count !== null;
        count = await this.#connection.read(buffer)
      ) {
        text += decoder.decode(buffer.subarray(0, count), { stream: true });
        for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n")) {
          this.#handle(JSON.parse(text.slice(0, end)) as Message);
          text = text.slice(end + 1);
        }
      }
    } catch {
      // Closed on either side.
    }
    this.#fail(new MachineError("QEMU closed its monitor"));
  }

  #handle(message: Message): void {
    if (message.QMP) return this.#greeted();
    if (message.event !== undefined) {
      const event = { event: message.event, ...(message.data ? { data: message.data } : {}) };
      for (const watch of this.#watchers) watch(event);
      return;
    }
    const pending = this.#pending.get(message.id ?? -1);
    if (!pending) return;
    this.#pending.delete(message.id!);
    if (message.error) pending.reject(new QmpError(pending.command, message.error.class, message.error.desc));
    else pending.resolve(message.return);
  }

  #fail(error: Error): void {
    this.#closed ??= error;
    this.#greeted?.(error);
    for (const pending of this.#pending.values()) pending.reject(this.#closed);
    this.#pending.clear();
  }
}
