/**
 * A client of xenstored, the daemon that keeps what domains and their devices tell each other, over its Unix socket
 * (Xen 4.17 `xen/include/public/io/xs_wire.h`, `docs/misc/xenstore.txt`).
 *
 * @module
 */

/** Where xenstored listens. */
export const XENSTORE_SOCKET = "/run/xenstored/socket";

/** Types of messages, as far as they are used here: `enum xsd_sockmsg_type`. */
export const XS = {
  DIRECTORY: 1,
  READ: 2,
  GET_PERMS: 3,
  WATCH: 4,
  UNWATCH: 5,
  TRANSACTION_START: 6,
  TRANSACTION_END: 7,
  INTRODUCE: 8,
  RELEASE: 9,
  WRITE: 11,
  MKDIR: 12,
  RM: 13,
  SET_PERMS: 14,
  WATCH_EVENT: 15,
  ERROR: 16,
  IS_DOMAIN_INTRODUCED: 17,
  DIRECTORY_PART: 22,
} as const;

/** A name of {@linkcode XS}. */
export type XenstoreRequest = keyof typeof XS;

const NAMES: ReadonlyMap<number, XenstoreRequest> = new Map(
  (Object.entries(XS) as [XenstoreRequest, number][]).map(([name, type]) => [type, name]),
);
const HEADER_SIZE = 16;
/** `XENSTORE_PAYLOAD_MAX`: xenstored ends the connection of whoever sends more. */
const MAX_PAYLOAD = 4096;
/** `XENSTORE_ABS_PATH_MAX`. */
const MAX_PATH = 3072;
const PATH = /^(\/|(\/[\w@-]+)+)$/;
const SPECIAL_WATCH = /^@(introduce|release)Domain$/;
/** How often a transaction is tried. Each time means that others changed the same entries meanwhile. */
const MAX_TRIES = 50;
/** Longest list of children, in bytes: many times the domains that a host can have. */
const MAX_LIST = 1 << 20;
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const encoder = new TextEncoder();

/** A request failed: xenstored refused it, or the connection to it is lost. */
export class XenstoreError extends Error {
  /** The request, such as `WRITE`. */
  readonly request: XenstoreRequest;
  /** What it was about: a path; empty where it was about none. */
  readonly path: string;
  /** Name of the error, such as `ENOENT`; `ECONNRESET` where the connection is lost or closed. */
  readonly code: string;

  /**
   * Explains a failed request.
   *
   * @param request The request
   * @param path What it was about
   * @param code Name of the error
   * @param message What was attempted, on what, why it failed, what to do next
   * @param options The cause
   */
  constructor(request: XenstoreRequest, path: string, code: string, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "XenstoreError";
    this.request = request;
    this.path = path;
    this.code = code;
  }
}

/** Reads and changes entries, at once or as part of a transaction. Requests reach xenstored in the order of the calls. */
export interface XenstoreView {
  /**
   * Reads the value of an entry.
   *
   * @param path Its path
   * @returns The value; undefined where there is no such entry
   */
  read(path: string): Promise<string | undefined>;
  /**
   * Writes the value of an entry. It is made where it is absent, as are those above it.
   *
   * @param path Its path
   * @param value The value
   */
  write(path: string, value: string): Promise<void>;
  /**
   * Makes an entry, empty, unless it is there.
   *
   * @param path Its path
   */
  make(path: string): Promise<void>;
  /**
   * Removes an entry and all below it, if it is there.
   *
   * @param path Its path
   */
  remove(path: string): Promise<void>;
  /**
   * Lists what is below an entry.
   *
   * @param path Its path
   * @returns Names of its children; none where there is no such entry
   */
  list(path: string): Promise<string[]>;
  /**
   * Reads who may do what with an entry.
   *
   * @param path Its path
   * @returns The owner and what all others may do, such as `n0`, then exceptions, such as `r5`
   */
  permissions(path: string): Promise<string[]>;
  /**
   * Sets who may do what with an entry. Entries made below it later begin with the same.
   *
   * @param path Its path
   * @param permissions As {@linkcode XenstoreView.permissions} tells them
   */
  setPermissions(path: string, permissions: readonly string[]): Promise<void>;
}

/** A message from xenstored. */
export interface XenstoreMessage {
  /** What it is. */
  readonly type: XenstoreRequest;
  /** Which request it answers; 0 where it is an event. */
  readonly requestId: number;
  /** Its content. */
  readonly payload: Uint8Array;
}

/** Cuts what comes from xenstored into messages. */
export class XenstoreReader {
  #rest = new Uint8Array();

  /**
   * Takes what came.
   *
   * @param bytes Some bytes, as many or few as there are
   * @returns The messages that are whole now
   * @throws {Error} If it is no message, after which nothing else can be understood either
   */
  push(bytes: Uint8Array): XenstoreMessage[] {
    const all = concat([this.#rest, bytes]);
    const view = new DataView(all.buffer);
    const messages: XenstoreMessage[] = [];
    let at = 0;
    while (all.length - at >= HEADER_SIZE) {
      const number = view.getUint32(at, true);
      const length = view.getUint32(at + 12, true);
      const type = NAMES.get(number);
      if (type === undefined || length > MAX_PAYLOAD) {
        throw new Error(`a message has the type ${number} and ${length} bytes`);
      }
      const end = at + HEADER_SIZE + length;
      if (all.length < end) break;
      const requestId = view.getUint32(at + 4, true);
      messages.push({ type, requestId, payload: all.subarray(at + HEADER_SIZE, end) });
      at = end;
    }
    this.#rest = all.slice(at);
    return messages;
  }
}

/** A request that has no answer yet. */
interface Pending {
  readonly type: XenstoreRequest;
  readonly path: string;
  readonly action: string;
  readonly answer: PromiseWithResolvers<Uint8Array>;
}

type Call = (type: XenstoreRequest, path: string, action: string, payload: string) => Promise<Uint8Array>;

/** A connection to xenstored. */
export class Xenstore implements XenstoreView, Disposable {
  readonly #connection: Deno.UnixConn;
  readonly #view: XenstoreView;
  readonly #pending = new Map<number, Pending>();
  readonly #watches = new Map<string, (path: string) => void>();
  readonly #closed = Promise.withResolvers<void>();
  readonly #outgoing: Uint8Array<ArrayBuffer>[] = [];
  #isWriting = false;
  #requests = 0;
  #tokens = 0;
  /** Why nothing can be sent any more. */
  #end: { readonly reason: string; readonly cause?: unknown } | undefined;

  private constructor(connection: Deno.UnixConn) {
    this.#connection = connection;
    this.#view = makeView((...call) => this.#call(0, ...call));
    this.#receive();
  }

  /**
   * Connects to xenstored.
   *
   * @param path Path of its socket
   * @returns The connection
   * @throws {Error} If it does not listen there, and what to start
   */
  static async connect(path: string = XENSTORE_SOCKET): Promise<Xenstore> {
    try {
      return new Xenstore(await Deno.connect({ transport: "unix", path }));
    } catch (cause) {
      const attempt = `Cannot connect to xenstored at "${path}"`;
      const { NotFound, ConnectionRefused, ConnectionReset } = Deno.errors;
      if ([NotFound, ConnectionRefused, ConnectionReset].some((kind) => cause instanceof kind)) {
        throw new Error(
          `${attempt} as it does not run: start it in Xen's control domain with "systemctl start xen", or run ` +
            `"xenstored" there`,
          { cause },
        );
      }
      if (cause instanceof Deno.errors.PermissionDenied) {
        throw new Error(`${attempt} as this user may not: run as root`, { cause });
      }
      throw new Error(`${attempt} as ${messageOf(cause)}`, { cause });
    }
  }

  /** How many requests were made. */
  get requests(): number {
    return this.#requests;
  }

  /** Fulfilled when the connection is lost or closed; no watch tells anything then. */
  get closed(): Promise<void> {
    return this.#closed.promise;
  }

  /**
   * Reads the value of an entry.
   *
   * @param path Its path
   * @returns The value; undefined where there is no such entry
   */
  read(path: string): Promise<string | undefined> {
    return this.#view.read(path);
  }

  /**
   * Writes the value of an entry. It is made where it is absent, as are those above it.
   *
   * @param path Its path
   * @param value The value
   */
  write(path: string, value: string): Promise<void> {
    return this.#view.write(path, value);
  }

  /**
   * Makes an entry, empty, unless it is there.
   *
   * @param path Its path
   */
  make(path: string): Promise<void> {
    return this.#view.make(path);
  }

  /**
   * Removes an entry and all below it, if it is there.
   *
   * @param path Its path
   */
  remove(path: string): Promise<void> {
    return this.#view.remove(path);
  }

  /**
   * Lists what is below an entry.
   *
   * @param path Its path
   * @returns Names of its children; none where there is no such entry
   */
  list(path: string): Promise<string[]> {
    return this.#view.list(path);
  }

  /**
   * Reads who may do what with an entry.
   *
   * @param path Its path
   * @returns The owner and what all others may do, such as `n0`, then exceptions, such as `r5`
   */
  permissions(path: string): Promise<string[]> {
    return this.#view.permissions(path);
  }

  /**
   * Sets who may do what with an entry. Entries made below it later begin with the same.
   *
   * @param path Its path
   * @param permissions As {@linkcode Xenstore.permissions} tells them
   */
  setPermissions(path: string, permissions: readonly string[]): Promise<void> {
    return this.#view.setPermissions(path, permissions);
  }

  /**
   * Does several things at once, or none of them. Where others changed the same entries meanwhile, all of it is done
   * again.
   *
   * @param body Does them, on the entries as they were when it began. It is called once or several times
   * @returns What the body returned last
   * @throws {XenstoreError} If others changed the same entries each time
   */
  async transaction<T>(body: (view: XenstoreView) => Promise<T>): Promise<T> {
    for (let attempt = 1;; attempt++) {
      const started = text(
        await this.#call(0, "TRANSACTION_START", "", "begin a transaction of xenstore", "\0"),
      );
      const id = /^\d{1,10}\0$/.test(started) ? parseInt(started) : 0;
      if (id === 0 || id > 0xffff_ffff) throw this.#malformed("a transaction has no number");
      let isOpen = true;
      const view = makeView((...call) => {
        if (!isOpen) throw new ReferenceError("Cannot use a transaction of xenstore as it is over");
        return this.#call(id, ...call);
      });
      const end = (payload: string, action: string) => {
        isOpen = false;
        return this.#call(id, "TRANSACTION_END", "", action, payload);
      };
      let result: T;
      try {
        result = await body(view);
      } catch (error) {
        // What went wrong matters more than whether it could be undone: a lost connection undoes it too.
        await end("F\0", "undo a transaction of xenstore").catch(() => {});
        throw error;
      }
      try {
        await end("T\0", "finish a transaction of xenstore");
        return result;
      } catch (error) {
        if (!(error instanceof XenstoreError) || error.code !== "EAGAIN") throw error;
        if (attempt === MAX_TRIES) {
          throw new XenstoreError(
            error.request,
            "",
            error.code,
            `Cannot finish a transaction of xenstore as others changed the same entries in each of ${attempt} tries: ` +
              `see which programs keep writing to xenstore, end them, and run the command again`,
            { cause: error },
          );
        }
      }
    }
  }

  /**
   * Watches an entry and all below it.
   *
   * @param path Its path, `@introduceDomain` or `@releaseDomain`
   * @param onEvent Called with the path of what changed, once right away, and sometimes when nothing has changed
   * @returns The watch, which ends when it is disposed
   */
  async watch(path: string, onEvent: (path: string) => void): Promise<AsyncDisposable> {
    if (!SPECIAL_WATCH.test(path)) checkPath(path);
    const token = String(++this.#tokens);
    this.#watches.set(token, onEvent);
    try {
      await this.#call(0, "WATCH", path, `watch "${path}" in xenstore`, `${path}\0${token}\0`);
    } catch (error) {
      this.#watches.delete(token);
      throw error;
    }
    return {
      [Symbol.asyncDispose]: async () => {
        if (!this.#watches.delete(token) || this.#end) return;
        await this.#call(0, "UNWATCH", path, `end a watch of "${path}" in xenstore`, `${path}\0${token}\0`);
      },
    };
  }

  /**
   * Lets xenstored serve a domain.
   *
   * @param domid The domain
   * @param gfn Frame of the page that they share; of the machine where the domain is a PV one
   * @param port Event channel in the domain
   */
  async introduce(domid: number, gfn: bigint, port: number): Promise<void> {
    await this.#call(
      0,
      "INTRODUCE",
      "",
      `introduce the domain ${domid} to xenstored`,
      `${domid}\0${gfn}\0${port}\0`,
    );
  }

  /**
   * Lets xenstored serve a domain no more. Unless it does, nothing happens.
   *
   * @param domid The domain
   */
  async release(domid: number): Promise<void> {
    try {
      await this.#call(0, "RELEASE", "", `release the domain ${domid} from xenstored`, `${domid}\0`);
    } catch (error) {
      // oxenstored has another word for a domain that it does not know.
      if (!isAbsent(error) && !(error instanceof XenstoreError && error.code === "EINVAL")) throw error;
    }
  }

  /**
   * Tells whether xenstored serves a domain.
   *
   * @param domid The domain
   * @returns Whether it does
   */
  async isIntroduced(domid: number): Promise<boolean> {
    const action = `ask xenstored for the domain ${domid}`;
    return text(await this.#call(0, "IS_DOMAIN_INTRODUCED", "", action, `${domid}\0`)) === "T\0";
  }

  /** Closes the connection. Requests without answer fail; transactions that are not finished are undone. */
  [Symbol.dispose](): void {
    this.#stop("the connection to xenstored is closed");
  }

  /** Sends a request at once, so that those of one caller stay in order; answers come later. */
  #call(
    transaction: number,
    type: XenstoreRequest,
    path: string,
    action: string,
    payload: string,
  ): Promise<Uint8Array> {
    const bytes = encoder.encode(payload);
    if (bytes.length > MAX_PAYLOAD) {
      const reason = `it takes ${bytes.length} of at most ${MAX_PAYLOAD} bytes: write less`;
      return Promise.reject(new XenstoreError(type, path, "E2BIG", `Cannot ${action} as ${reason}`));
    }
    const pending: Pending = { type, path, action, answer: Promise.withResolvers() };
    if (this.#end) return Promise.reject(this.#lost(pending));
    // Identifiers wrap long after their requests were answered; 0 is that of events.
    const id = this.#requests++ % 0xffff_ffff + 1;
    this.#pending.set(id, pending);
    const message = new Uint8Array(HEADER_SIZE + bytes.length);
    const view = new DataView(message.buffer);
    [XS[type], id, transaction, bytes.length].forEach((value, index) =>
      view.setUint32(index * 4, value, true)
    );
    message.set(bytes, HEADER_SIZE);
    this.#outgoing.push(message);
    if (!this.#isWriting) {
      this.#isWriting = true;
      // Whoever makes several requests at once has made them all when this runs: they leave in one write.
      queueMicrotask(() => this.#send());
    }
    return pending.answer.promise;
  }

  async #send(): Promise<void> {
    try {
      while (this.#outgoing.length > 0 && !this.#end) {
        const bytes = concat(this.#outgoing.splice(0));
        for (let at = 0; at < bytes.length;) at += await this.#connection.write(bytes.subarray(at));
      }
    } catch (cause) {
      this.#stop(`the connection to xenstored is lost (${messageOf(cause)})`, cause);
    }
    this.#isWriting = false;
  }

  async #receive(): Promise<void> {
    const reader = new XenstoreReader();
    const buffer = new Uint8Array(64 * 1024);
    try {
      for (;;) {
        const count = await this.#connection.read(buffer);
        if (count === null) return this.#stop("the connection to xenstored is lost");
        let messages;
        try {
          messages = reader.push(buffer.subarray(0, count));
        } catch (error) {
          this.#malformed(messageOf(error));
          return;
        }
        for (const message of messages) {
          if (this.#end) return;
          this.#take(message);
        }
      }
    } catch (cause) {
      this.#stop(`the connection to xenstored is lost (${messageOf(cause)})`, cause);
    }
  }

  #take({ type, requestId, payload }: XenstoreMessage): void {
    if (type === "WATCH_EVENT") {
      const [path, token, rest] = text(payload).split("\0");
      if (path === undefined || token === undefined || rest !== "") {
        this.#malformed("an event has no path and token");
        return;
      }
      const onEvent = this.#watches.get(token);
      // An error of the watcher is none of the connection.
      if (onEvent) queueMicrotask(() => this.#watches.has(token) && onEvent(path));
      return;
    }
    const pending = this.#pending.get(requestId);
    const code = type === "ERROR" ? /^(E[A-Z0-9]+)\0$/.exec(text(payload))?.[1] : undefined;
    if (!pending || (type !== pending.type && code === undefined)) {
      this.#malformed("an answer fits no request");
      return;
    }
    this.#pending.delete(requestId);
    if (code === undefined) pending.answer.resolve(payload);
    else pending.answer.reject(refusal(pending, code));
  }

  /** Ends the connection, as nobody knows what the rest of it means. */
  #malformed(what: string): Error {
    this.#stop(`xenstored broke its protocol (${what})`);
    return new Error(`Cannot go on with xenstored as it broke its protocol (${what}): run the command again`);
  }

  #stop(reason: string, cause?: unknown): void {
    if (this.#end) return;
    this.#end = { reason, cause };
    this.#watches.clear();
    this.#outgoing.length = 0;
    for (const pending of this.#pending.values()) pending.answer.reject(this.#lost(pending));
    this.#pending.clear();
    this.#connection.close();
    this.#closed.resolve();
  }

  #lost({ type, path, action }: Pending): XenstoreError {
    const { reason, cause } = this.#end!;
    return new XenstoreError(
      type,
      path,
      "ECONNRESET",
      `Cannot ${action} as ${reason}: see whether xenstored still runs, and run the command again`,
      { cause },
    );
  }
}

function makeView(call: Call): XenstoreView {
  /** A request on an entry, whose payload begins with its path. */
  const on = (type: XenstoreRequest, verb: string, path: string, rest = "") => {
    checkPath(path);
    return call(type, path, `${verb} "${path}" in xenstore`, `${path}\0${rest}`);
  };
  return {
    async read(path) {
      try {
        return text(await on("READ", "read", path));
      } catch (error) {
        if (isAbsent(error)) return undefined;
        throw error;
      }
    },
    async write(path, value) {
      await on("WRITE", "write", path, value);
    },
    async make(path) {
      await on("MKDIR", "make", path);
    },
    async remove(path) {
      try {
        await on("RM", "remove", path);
      } catch (error) {
        if (!isAbsent(error)) throw error;
      }
    },
    async list(path) {
      try {
        return strings(await on("DIRECTORY", "list", path));
      } catch (error) {
        if (isAbsent(error)) return [];
        if (!(error instanceof XenstoreError) || error.code !== "E2BIG") throw error;
      }
      return await listParts((offset) => on("DIRECTORY_PART", "list", path, `${offset}\0`), path);
    },
    async permissions(path) {
      return strings(await on("GET_PERMS", "read the permissions of", path));
    },
    async setPermissions(path, permissions) {
      const rest = permissions.map((permission) => {
        if (/^[nrwb]\d{1,5}$/.test(permission)) return `${permission}\0`;
        throw new TypeError(
          `Cannot permit "${permission}" in xenstore as it is not one of n, r, w, b with a domain's number`,
        );
      });
      await on("SET_PERMS", "set the permissions of", path, rest.join(""));
    },
  };
}

/** Lists in parts. Each tells which generation of the list it belongs to. */
async function listParts(part: (offset: number) => Promise<Uint8Array>, path: string): Promise<string[]> {
  let names: string[] = [];
  let generation: string | undefined;
  for (let offset = 0, taken = 0; taken < MAX_LIST;) {
    const payload = await part(offset);
    taken += payload.length;
    const [found, ...more] = strings(payload);
    // The last part ends with an empty name. A part without names ends it too, as nothing would ever follow.
    const isLast = more.at(-1) === "" || more.length === 0;
    if (generation !== undefined && found !== generation) {
      [names, generation, offset] = [[], undefined, 0];
      continue;
    }
    generation = found;
    for (const name of isLast ? more.slice(0, -1) : more) {
      names.push(name);
      offset += name.length + 1;
    }
    if (isLast) return names;
  }
  throw new XenstoreError(
    "DIRECTORY_PART",
    path,
    "EAGAIN",
    `Cannot list "${path}" in xenstore as it has too many entries or changes all the time: run the command again`,
  );
}

function checkPath(path: string): void {
  if (path.length <= MAX_PATH && PATH.test(path)) return;
  throw new TypeError(
    `Cannot use the path "${path}" in xenstore as paths begin with a slash, have names of letters, digits, "-", "_" ` +
      `and "@", and at most ${MAX_PATH} characters`,
  );
}

function refusal({ type, path, action }: Pending, code: string): XenstoreError {
  return new XenstoreError(type, path, code, `Cannot ${action} as ${reason()}`);

  function reason(): string {
    switch (code) {
      case "EACCES":
      case "EPERM":
        return `xenstored does not permit it (${code}): run as root in Xen's control domain`;
      case "ENOENT":
        return "there is no such entry (ENOENT)";
      case "ENOSPC":
        return "a quota of xenstored is used up (ENOSPC): destroy domains that are not needed";
      default:
        return `xenstored answered ${code}`;
    }
  }
}

function isAbsent(error: unknown): boolean {
  return error instanceof XenstoreError && error.code === "ENOENT";
}

/** Strings that each have a NUL at their end. */
function strings(payload: Uint8Array): string[] {
  return text(payload).split("\0").slice(0, -1);
}

function text(bytes: Uint8Array): string {
  return decoder.decode(bytes);
}

function concat(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const all = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

function messageOf(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown);
}
