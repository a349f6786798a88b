/**
 * A double of xenstored for tests. It decodes the protocol itself, so that the client's encoding is compared with a second
 * reading of `docs/misc/xenstore.txt` (Xen 4.17).
 *
 * @module
 */

interface Node {
  readonly value: string;
  readonly permissions: readonly string[];
}

type Tree = Map<string, Node>;

interface Transaction {
  /** What it began with. */
  readonly base: Tree;
  readonly tree: Tree;
  /** What it read or changed: where these changed outside meanwhile, it conflicts. */
  readonly touched: Set<string>;
  readonly events: Event[];
}

interface Event {
  readonly path: string;
  readonly removed: readonly string[];
}

interface Client {
  readonly connection: Deno.Conn;
  readonly watches: { readonly path: string; readonly token: string }[];
  readonly transactions: Map<number, Transaction>;
  output: Promise<unknown>;
}

/** A refusal, by its name. */
class Refusal extends Error {}

const NAMES: Readonly<Record<number, string>> = {
  1: "DIRECTORY",
  2: "READ",
  3: "GET_PERMS",
  4: "WATCH",
  5: "UNWATCH",
  6: "TRANSACTION_START",
  7: "TRANSACTION_END",
  8: "INTRODUCE",
  9: "RELEASE",
  11: "WRITE",
  12: "MKDIR",
  13: "RM",
  14: "SET_PERMS",
  17: "IS_DOMAIN_INTRODUCED",
  22: "DIRECTORY_PART",
};
const WATCH_EVENT = 15;
const ERROR = 16;
const LIMIT = 4096;

/** A xenstored that keeps everything in memory, and fails when it is told to. */
export class FakeXenstore implements AsyncDisposable {
  /** Path of its socket. */
  readonly path: string;
  /** What is answered where a domain to be released is not known: xenstored and oxenstored differ. */
  unknownDomain: "ENOENT" | "EINVAL" = "ENOENT";
  /** Domains that were introduced and not released. */
  readonly introduced: Map<number, { readonly gfn: bigint; readonly port: number }> = new Map();
  /** What was asked of it, such as `WRITE /a/b`. */
  readonly log: string[] = [];
  readonly #folder: string;
  readonly #listener: Deno.Listener;
  readonly #clients = new Set<Client>();
  readonly #failures = new Map<number, string>();
  readonly #tree: Tree = new Map([["/", { value: "", permissions: ["n0"] }]]);
  #deadline = Infinity;
  #transactions = 0;
  #rawAnswer: Uint8Array | undefined;

  private constructor(folder: string) {
    this.#folder = folder;
    this.path = `${folder}/socket`;
    this.#listener = Deno.listen({ transport: "unix", path: this.path });
    this.#accept();
  }

  /**
   * Starts one, on a socket in a folder of its own.
   *
   * @returns The double
   */
  static async listen(): Promise<FakeXenstore> {
    return new FakeXenstore(await Deno.makeTempDir({ prefix: "xenstore-" }));
  }

  /** How many requests came. */
  get requests(): number {
    return this.log.length;
  }

  /** Values by path, sorted by path. */
  get tree(): Readonly<Record<string, string>> {
    return this.#dump(({ value }) => value);
  }

  /** Permissions by path, such as `n0,r5`. */
  get permissions(): Readonly<Record<string, string>> {
    return this.#dump(({ permissions }) => permissions.join());
  }

  /**
   * Writes an entry as some domain would.
   *
   * @param path Its path
   * @param value The value
   */
  write(path: string, value: string): void {
    this.#fire(write(this.#tree, path, value));
  }

  /**
   * Removes an entry and all below it as some domain would.
   *
   * @param path Its path
   */
  remove(path: string): void {
    this.#fire(remove(this.#tree, path));
  }

  /**
   * Tells the watches of `@releaseDomain` that some domain ended or shut down.
   *
   * @param domid The domain, which is no longer introduced; if not told, it only shut down
   */
  releaseDomain(domid?: number): void {
    if (domid !== undefined) this.introduced.delete(domid);
    this.#fire({ path: "@releaseDomain", removed: [] });
  }

  /**
   * Refuses a request that is still to come.
   *
   * @param request Which one, counted from now, the next being 1
   * @param code The error
   */
  failAt(request: number, code = "ENOSPC"): void {
    this.#failures.set(this.requests + request, code);
  }

  /**
   * Ends with all connections instead of doing a request that is still to come.
   *
   * @param request Which one, counted from now, the next being 1
   */
  dieAt(request: number): void {
    this.#deadline = this.requests + request;
  }

  /** Ends with all connections. */
  die(): void {
    this.#deadline = 0;
    try {
      this.#listener.close();
    } catch {
      // It ended before.
    }
    for (const client of this.#clients) this.#drop(client);
  }

  /**
   * Answers the next request with bytes, whatever they mean.
   *
   * @param bytes The bytes
   */
  answerNext(bytes: Uint8Array): void {
    this.#rawAnswer = bytes;
  }

  /** Ends it and removes its socket. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.die();
    await Deno.remove(this.#folder, { recursive: true });
  }

  #dump(pick: (node: Node) => string): Readonly<Record<string, string>> {
    const paths = [...this.#tree.keys()].filter((path) => path !== "/").sort();
    return Object.fromEntries(paths.map((path) => [path, pick(this.#tree.get(path)!)]));
  }

  async #accept(): Promise<void> {
    try {
      for await (const connection of this.#listener) {
        const client: Client = {
          connection,
          watches: [],
          transactions: new Map(),
          output: Promise.resolve(),
        };
        this.#clients.add(client);
        this.#serve(client);
      }
    } catch {
      // The listener is closed.
    }
  }

  async #serve(client: Client): Promise<void> {
    let rest: number[] = [];
    const buffer = new Uint8Array(1000);
    try {
      for (let count; (count = await client.connection.read(buffer)) !== null;) {
        rest.push(...buffer.subarray(0, count));
        while (rest.length >= 16) {
          const [type, id, transaction, length] = [0, 4, 8, 12].map((at) =>
            rest[at]! + rest[at + 1]! * 2 ** 8 + rest[at + 2]! * 2 ** 16 + rest[at + 3]! * 2 ** 24
          ) as [number, number, number, number];
          if (length > LIMIT) return this.#drop(client);
          if (rest.length < 16 + length) break;
          const payload = new TextDecoder().decode(Uint8Array.from(rest.slice(16, 16 + length)));
          rest = rest.slice(16 + length);
          this.#answer(client, type, id, transaction, payload);
          if (!this.#clients.has(client)) return;
        }
      }
    } catch {
      // The connection is gone.
    }
    this.#drop(client);
  }

  #answer(client: Client, type: number, id: number, transactionId: number, payload: string): void {
    const subject = payload.split("\0")[0];
    this.log.push(`${NAMES[type] ?? type}${subject ? ` ${subject}` : ""}`);
    if (this.requests >= this.#deadline) return this.die();
    if (this.#rawAnswer) {
      this.#send(client, this.#rawAnswer);
      this.#rawAnswer = undefined;
      return;
    }
    const events: Event[] = [];
    let answer: string;
    try {
      const failure = this.#failures.get(this.requests);
      if (failure) throw new Refusal(failure);
      answer = this.#perform(client, NAMES[type] ?? "", transactionId, payload, events);
      if (answer.length > LIMIT) throw new Refusal("E2BIG");
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      [type, answer] = [ERROR, `${error.message}\0`];
    }
    this.#send(client, encode(type, id, transactionId, answer));
    for (const event of events) this.#fire(event);
  }

  #perform(client: Client, name: string, transactionId: number, payload: string, events: Event[]): string {
    const parts = payload.split("\0");
    /** Checks that the payload is that many strings with a NUL after each. */
    const fields = (count: number): string[] => {
      if (parts.length !== count + 1 || parts[count] !== "") throw new Refusal("EINVAL");
      return parts.slice(0, count);
    };
    const number = (field: string | undefined): number => {
      if (!/^\d{1,10}$/.test(field ?? "")) throw new Refusal("EINVAL");
      return Number(field);
    };
    const transaction = transactionId === 0 ? undefined : client.transactions.get(transactionId);
    if (transactionId !== 0 && !transaction) throw new Refusal("ENOENT");
    const tree = transaction?.tree ?? this.#tree;
    const find = (path: string): Node => {
      checkPath(path);
      transaction?.touched.add(path);
      const node = tree.get(path);
      if (!node) throw new Refusal("ENOENT");
      return node;
    };
    const change = (event: Event) => {
      (transaction?.events ?? events).push(event);
      for (const path of [event.path, ...event.removed]) {
        transaction?.touched.add(path);
        // A new or removed entry changes the one above it too, up to the first that was there.
        for (let at = path; transaction && transaction.base.has(at) !== tree.has(at); at = parentOf(at)) {
          transaction.touched.add(parentOf(at));
        }
      }
    };
    switch (name) {
      case "READ":
        return find(fields(1)[0]!).value;
      case "WRITE": {
        const path = parts[0]!;
        if (parts.length < 2) throw new Refusal("EINVAL");
        checkPath(path);
        change(write(tree, path, payload.slice(path.length + 1)));
        return "OK\0";
      }
      case "MKDIR": {
        const [path] = fields(1) as [string];
        checkPath(path);
        if (!tree.has(path)) change(write(tree, path, ""));
        else transaction?.touched.add(path);
        return "OK\0";
      }
      case "RM": {
        const [path] = fields(1) as [string];
        checkPath(path);
        if (path === "/") throw new Refusal("EINVAL");
        if (tree.has(path)) change(remove(tree, path));
        else find(parentOf(path));
        return "OK\0";
      }
      case "DIRECTORY": {
        const [path] = fields(1) as [string];
        find(path);
        return childrenOf(tree, path);
      }
      case "DIRECTORY_PART": {
        const [path, offset] = fields(2) as [string, string];
        find(path);
        const names = childrenOf(tree, path);
        const generation = `${hash(names)}\0`;
        const rest = names.slice(number(offset));
        const room = LIMIT - generation.length - 1;
        if (rest.length <= room) return `${generation}${rest}\0`;
        return generation + rest.slice(0, rest.lastIndexOf("\0", room - 1) + 1);
      }
      case "GET_PERMS":
        return find(fields(1)[0]!).permissions.map((permission) => `${permission}\0`).join("");
      case "SET_PERMS": {
        const [path, ...permissions] = fields(parts.length - 1) as [string, ...string[]];
        const node = find(path);
        if (permissions.length === 0 || !permissions.every((permission) => /^[nrwb]\d+$/.test(permission))) {
          throw new Refusal("EINVAL");
        }
        tree.set(path, { ...node, permissions });
        change({ path, removed: [] });
        return "OK\0";
      }
      case "WATCH": {
        const [path, token] = fields(2) as [string, string];
        if (!path.startsWith("@")) checkPath(path);
        if (client.watches.some((watch) => watch.path === path && watch.token === token)) {
          throw new Refusal("EEXIST");
        }
        client.watches.push({ path, token });
        queueMicrotask(() => this.#send(client, encode(WATCH_EVENT, 0, 0, `${path}\0${token}\0`)));
        return "OK\0";
      }
      case "UNWATCH": {
        const [path, token] = fields(2) as [string, string];
        const index = client.watches.findIndex((watch) => watch.path === path && watch.token === token);
        if (index < 0) throw new Refusal("ENOENT");
        client.watches.splice(index, 1);
        return "OK\0";
      }
      case "TRANSACTION_START": {
        fields(1);
        if (transaction) throw new Refusal("EBUSY");
        const id = ++this.#transactions;
        client.transactions.set(id, {
          base: new Map(this.#tree),
          tree: new Map(this.#tree),
          touched: new Set(),
          events: [],
        });
        return `${id}\0`;
      }
      case "TRANSACTION_END": {
        const [decision] = fields(1);
        if (!transaction) throw new Refusal("ENOENT");
        client.transactions.delete(transactionId);
        if (decision === "F") return "OK\0";
        if (decision !== "T") throw new Refusal("EINVAL");
        const { base, touched } = transaction;
        if ([...touched].some((path) => base.get(path) !== this.#tree.get(path))) throw new Refusal("EAGAIN");
        for (const [path, node] of transaction.tree) if (touched.has(path)) this.#tree.set(path, node);
        for (const path of touched) if (!transaction.tree.has(path)) this.#tree.delete(path);
        events.push(...transaction.events);
        return "OK\0";
      }
      case "INTRODUCE": {
        const [domid, gfn, port] = fields(3).map(number) as [number, number, number];
        if (domid === 0) throw new Refusal("EINVAL");
        this.introduced.set(domid, { gfn: BigInt(gfn), port });
        events.push({ path: "@introduceDomain", removed: [] });
        return "OK\0";
      }
      case "RELEASE": {
        const domid = number(fields(1)[0]);
        if (!this.introduced.delete(domid)) throw new Refusal(this.unknownDomain);
        events.push({ path: "@releaseDomain", removed: [] });
        return "OK\0";
      }
      case "IS_DOMAIN_INTRODUCED":
        return this.introduced.has(number(fields(1)[0])) ? "T\0" : "F\0";
      default:
        throw new Refusal("ENOSYS");
    }
  }

  #fire({ path, removed }: Event): void {
    for (const client of this.#clients) {
      for (const watch of client.watches) {
        if (watch.path === path || watch.path === "/" || path.startsWith(`${watch.path}/`)) {
          this.#send(client, encode(WATCH_EVENT, 0, 0, `${path}\0${watch.token}\0`));
        } else if (removed.includes(watch.path)) {
          this.#send(client, encode(WATCH_EVENT, 0, 0, `${watch.path}\0${watch.token}\0`));
        }
      }
    }
  }

  #send(client: Client, bytes: Uint8Array): void {
    client.output = client.output.then(async () => {
      for (let at = 0; at < bytes.length;) at += await client.connection.write(bytes.subarray(at));
    }).catch(() => {});
  }

  #drop(client: Client): void {
    // What was answered before arrives.
    if (this.#clients.delete(client)) client.output.then(() => client.connection.close());
  }
}

function encode(type: number, id: number, transaction: number, payload: string): Uint8Array {
  const bytes = new TextEncoder().encode(payload);
  return Uint8Array.from([
    ...new Uint8Array(Uint32Array.of(type, id, transaction, bytes.length).buffer),
    ...bytes,
  ]);
}

function checkPath(path: string): void {
  const isFine = /^\/[A-Za-z0-9\-_@/]*$/.test(path) && !path.includes("//") && path.length <= 3072 &&
    (path === "/" || !path.endsWith("/"));
  if (!isFine) throw new Refusal("EINVAL");
}

/** The entry above one; none above the root. */
function parentOf(path: string): string {
  return path === "/" ? "" : path.slice(0, path.lastIndexOf("/")) || "/";
}

/** Names below an entry, in the order they were made. */
function childrenOf(tree: Tree, path: string): string {
  return [...tree.keys()].filter((child) => parentOf(child) === path)
    .map((child) => `${child.slice(child.lastIndexOf("/") + 1)}\0`).join("");
}

function write(tree: Tree, path: string, value: string): Event {
  const node = tree.get(path);
  if (!node) grow(tree, path);
  tree.set(path, { ...tree.get(path)!, value });
  return { path, removed: [] };
}

/** Makes an entry and those above it, with the permissions of the first that is there. */
function grow(tree: Tree, path: string): Node {
  const parent = parentOf(path);
  const above = tree.get(parent) ?? grow(tree, parent);
  // Each change of an entry is another object: this is what transactions compare.
  tree.set(parent, { ...above });
  const node = { value: "", permissions: above.permissions };
  tree.set(path, node);
  return node;
}

function remove(tree: Tree, path: string): Event {
  const removed = [...tree.keys()].filter((other) => other.startsWith(`${path}/`));
  for (const gone of [path, ...removed]) tree.delete(gone);
  const parent = parentOf(path);
  tree.set(parent, { ...tree.get(parent)! });
  return { path, removed };
}

function hash(text: string): number {
  let sum = 0;
  for (const character of text) sum = (sum * 31 + character.charCodeAt(0)) >>> 0;
  return sum;
}
