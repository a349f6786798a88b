/**
 * State: what the planner made, on record. One SQLite file per stack, with a lock and a journal.
 *
 * @module
 */

import { createHash, randomUUID } from "node:crypto";
import { existsSync, mkdirSync, renameSync, rmdirSync, rmSync, statSync } from "node:fs";
import { hostname, userInfo } from "node:os";
import { dirname, resolve } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import type { DatabaseSync, SQLInputValue, StatementSync } from "node:sqlite";
import { asError, LockedError, PlannerError } from "./errors.ts";
import type { Json } from "./kind.ts";
import { identifyProcess, isRunning } from "./process.ts";
import { SecretBox } from "./secrets.ts";

/** How far an object is. Anything but `ok` is finished by the next apply. */
export type RecordStatus = "creating" | "waiting" | "ok" | "updating" | "tainted" | "deleting";

/** One object on record. */
export interface ResourceRecord {
  /** Address in the stack. */
  readonly address: string;
  /** Empty for the current object; the generation of an old one that a replacement has yet to remove. */
  readonly deposed: string;
  /** Name of the kind. */
  readonly kind: string;
  /** Identity: 16 hexadecimal digits. */
  readonly id: string;
  /** How often the address was replaced. */
  readonly generation: number;
  /** How far it is. */
  readonly status: RecordStatus;
  /** Resolved props of the last apply that finished, or of the create that did not. */
  readonly props: Json;
  /** Outputs of the last apply; undefined where none finished. */
  readonly outputs: Json | undefined;
  /** Addresses that it depends on. */
  readonly dependencies: readonly string[];
  /** Whether it must not be destroyed. */
  readonly protect: boolean;
  /** Whether to forget it rather than destroy it. */
  readonly retain: boolean;
}

/** Who holds a lock. */
export interface LockInfo {
  /** Identity of the lock. */
  readonly id: string;
  /** User and host. */
  readonly who: string;
  /** The command. */
  readonly operation: string;
  /** When it was taken, as ISO 8601. */
  readonly created: string;
}

/** One entry of the journal. */
export interface JournalEntry {
  /** Order in which entries were made durable. */
  readonly sequence: number;
  /** The apply that it belongs to. */
  readonly run: string;
  /** When, as ISO 8601. */
  readonly time: string;
  /** Address of the object. */
  readonly address: string;
  /** What is done to it. */
  readonly action: string;
  /** `begin` is durable before the operation starts, `end` or `error` before its dependents do. */
  readonly phase: "begin" | "end" | "error";
  /** Why it failed. */
  readonly detail: string;
}

/** How to open state. */
export interface StateOptions {
  /** Name of the stack. */
  readonly stack: string;
  /** Whether to make the file where there is none. A state that is not made is empty and cannot be written. */
  readonly create: boolean;
  /** Lineage for a new file; a random one unless told. */
  readonly lineage?: string | undefined;
  /** Passphrase for secrets. */
  readonly passphrase?: string | undefined;
}

/** Version of the tables. A newer file is refused, an older one is migrated. */
export const STATE_VERSION = 1;
const LEASE_MILLISECONDS = 60_000;
const RENEW_MILLISECONDS = 15_000;

const TABLES = `
  CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
  CREATE TABLE resources (
    address TEXT NOT NULL, deposed TEXT NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL, generation INTEGER NOT NULL,
    status TEXT NOT NULL, props TEXT NOT NULL, outputs TEXT, dependencies TEXT NOT NULL, protect INTEGER NOT NULL,
    retain INTEGER NOT NULL, updated TEXT NOT NULL, PRIMARY KEY (address, deposed)
  ) WITHOUT ROWID;
  CREATE TABLE outputs (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
  CREATE TABLE journal (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, time TEXT NOT NULL, address TEXT NOT NULL,
    action TEXT NOT NULL, phase TEXT NOT NULL, detail TEXT NOT NULL
  );
  CREATE TABLE lock (
    one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, who TEXT NOT NULL, operation TEXT NOT NULL,
    created TEXT NOT NULL, expires INTEGER NOT NULL, pid INTEGER NOT NULL, started INTEGER NOT NULL, boot TEXT NOT NULL
  );
`;

/** A stack's state. Dispose it to close the file. */
export class State implements Disposable {
  /** Path of the file. */
  readonly path: string;
  /** Whether the file exists; a state that is not stored is empty. */
  readonly isStored: boolean;
  /** Identity of the state over its life: a new file has a new one. */
  readonly lineage: string;
  /** Encrypts secrets. */
  readonly secrets: SecretBox;
  readonly #database: DatabaseSync | undefined;
  readonly #statements = new Map<string, StatementSync>();
  readonly #file: number | undefined;
  #lockId: string | undefined;
  #renewal: ReturnType<typeof setInterval> | undefined;

  private constructor(
    path: string,
    database: DatabaseSync | undefined,
    lineage: string,
    secrets: SecretBox,
  ) {
    this.path = path;
    this.#database = database;
    this.isStored = database !== undefined;
    this.lineage = lineage;
    this.secrets = secrets;
    this.#file = database && inodeOf(path);
  }

  /**
   * Opens a state file.
   *
   * @param path Path of the file
   * @param options Stack, and whether to make the file
   * @returns The state
   * @throws {PlannerError} If the file is corrupt, of a newer version, or of another stack
   */
  static async open(path: string, options: StateOptions): Promise<State> {
    const file = resolve(path);
    const secrets = new SecretBox({
      keyFile: file.replace(/\.db$/, "") + ".key",
      passphrase: options.passphrase,
    });
    if (!existsSync(file) && !options.create) {
      return new State(file, undefined, options.lineage ?? randomUUID(), secrets);
    }
    // SQLite is loaded only where state is opened: declaring and planning in memory work without it.
    const { DatabaseSync } = await import("node:sqlite");
    let database: DatabaseSync | undefined;
    try {
      mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
      database = new DatabaseSync(file);
      database.exec("PRAGMA busy_timeout = 10000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL");
      const version = Number(database.prepare("PRAGMA user_version").get()?.user_version ?? 0);
      if (version > STATE_VERSION) {
        throw new PlannerError(
          `Cannot open state "${file}" as its version ${version} is newer than ${STATE_VERSION}, the newest that this ` +
            `release knows: use the release that wrote it, or a newer one`,
        );
      }
      if (version === 0) {
        const tables = database.prepare("SELECT count(*) AS count FROM sqlite_master").get()?.count;
        if (tables !== 0) {
          throw new PlannerError(`Cannot open "${file}" as it is a database of something else`);
        }
        database.exec("BEGIN IMMEDIATE");
        // Another process may have made the tables while this one waited.
        if (Number(database.prepare("PRAGMA user_version").get()?.user_version) === 0) {
          database.exec(TABLES);
          const put = database.prepare("INSERT INTO meta VALUES (?, ?)");
          put.run("stack", options.stack);
          put.run("lineage", options.lineage ?? randomUUID());
          put.run("serial", "0");
          database.exec(`PRAGMA user_version = ${STATE_VERSION}`);
        }
        database.exec("COMMIT");
      }
      const check = database.prepare("PRAGMA quick_check(1)").get()?.quick_check;
      if (check !== "ok") throw new Error(String(check));
      const meta = new Map(
        database.prepare("SELECT key, value FROM meta").all().map((
          row,
        ) => [String(row.key), String(row.value)]),
      );
      if (meta.get("stack") !== options.stack) {
        throw new PlannerError(
          `Cannot use state "${file}" for stack "${options.stack}" as it belongs to stack "${
            meta.get("stack")
          }": ` +
            `name another file with --state`,
        );
      }
      return new State(file, database, meta.get("lineage")!, secrets);
    } catch (thrown) {
      database?.close();
      throw explain(thrown, "open", file);
    }
  }

  /** Counts the writes: a saved plan names the serial that it was made from. */
  get serial(): number {
    return this.#database
      ? Number(this.#database.prepare("SELECT value FROM meta WHERE key = 'serial'").get()?.value)
      : 0;
  }

  /**
   * Reads all objects.
   *
   * @returns The records, by address
   */
  records(): ResourceRecord[] {
    if (!this.#database) return [];
    return this.#read(() =>
      this.#database!.prepare("SELECT * FROM resources ORDER BY address, deposed").all().map((row) => ({
        address: String(row.address),
        deposed: String(row.deposed),
        kind: String(row.kind),
        id: String(row.id),
        generation: Number(row.generation),
        status: row.status as RecordStatus,
        props: this.#decode(row.props) as Json,
        outputs: row.outputs === null ? undefined : this.#decode(row.outputs) as Json,
        dependencies: JSON.parse(String(row.dependencies)) as string[],
        protect: row.protect === 1,
        retain: row.retain === 1,
      }))
    );
  }

  /**
   * Reads the stack's outputs as of the last apply.
   *
   * @returns Values by name, secrets marked
   */
  outputs(): Map<string, unknown> {
    if (!this.#database) return new Map();
    return this.#read(() =>
      new Map(
        this.#database!.prepare("SELECT name, value FROM outputs ORDER BY name").all()
          .map((row) => [String(row.name), this.#decode(row.value)]),
      )
    );
  }

  /**
   * Reads the journal.
   *
   * @returns All entries, oldest first
   */
  journal(): JournalEntry[] {
    if (!this.#database) return [];
    return this.#read(() =>
      this.#database!.prepare("SELECT * FROM journal ORDER BY sequence").all() as unknown as JournalEntry[]
    );
  }

  /**
   * Makes one durable step: writes to records, outputs and journal that belong together.
   *
   * @param write Makes the writes
   */
  transaction(write: (writer: StateWriter) => void): void {
    const database = this.#database;
    if (!database) throw new PlannerError(`Cannot write state "${this.path}" as it was opened for reading`);
    try {
      database.exec("BEGIN IMMEDIATE");
      try {
        this.#requireLock(database);
        const encode = (value: unknown) => JSON.stringify(this.secrets.seal(value));
        write(new StateWriter((sql) => this.#prepare(database, sql), encode));
        database.exec("UPDATE meta SET value = value + 1 WHERE key = 'serial'");
        database.exec("COMMIT");
      } catch (error) {
        if (database.isTransaction) database.exec("ROLLBACK");
        throw error;
      }
    } catch (thrown) {
      throw explain(thrown, "write", this.path);
    }
  }

  /**
   * Takes the lock, so that nobody else changes this state. It is renewed until released; a lock whose owner died on
   * this host, or whose lease ran out, is taken over.
   *
   * @param operation The command, for others to see
   * @param options How long to wait for it, in milliseconds
   * @returns Releases the lock when disposed
   * @throws {LockedError} If somebody else holds it
   */
  async lock(
    operation: string,
    options: { timeout?: number; signal?: AbortSignal } = {},
  ): Promise<Disposable> {
    const database = this.#database;
    if (!database) return { [Symbol.dispose]() {} };
    const deadline = Date.now() + (options.timeout ?? 0);
    const id = randomUUID();
    const self = identifyProcess() ?? { pid: process.pid, started: 0, boot: "" };
    while (true) {
      const holder = this.#tryLock(database, id, operation, self);
      if (!holder) break;
      if (Date.now() >= deadline) {
        throw new LockedError(
          `Cannot lock state "${this.path}" as ${holder.who} has held it for "${holder.operation}" since ${holder.created} ` +
            `(lock ${holder.id}): wait for it with --lock-timeout=DURATION, or, if it is certainly dead, run ` +
            `force-unlock ${holder.id}`,
          holder.id,
        );
      }
      await sleep(
        Math.min(200, Math.max(1, deadline - Date.now())),
        undefined,
        options.signal ? { signal: options.signal } : {},
      );
    }
    if (this.#file !== undefined && inodeOf(this.path) !== this.#file) {
      throw new PlannerError(
        `Cannot use state "${this.path}" as it was deleted or replaced while waiting for its lock: run the command again`,
      );
    }
    this.#lockId = id;
    this.#renewal = setInterval(() => {
      try {
        database.prepare("UPDATE lock SET expires = ? WHERE id = ?").run(Date.now() + LEASE_MILLISECONDS, id);
      } catch {
        // The next write finds out whether the lock is still held.
      }
    }, RENEW_MILLISECONDS);
    this.#renewal.unref?.();
    return {
      [Symbol.dispose]: () => {
        clearInterval(this.#renewal);
        this.#lockId = undefined;
        if (!database.isOpen) return;
        try {
          database.prepare("DELETE FROM lock WHERE id = ?").run(id);
        } catch {
          // A full disk: the lock of a process that ended is taken over by the next one.
        }
      },
    };
  }

  /**
   * Tells who holds the lock.
   *
   * @returns The holder, or undefined where it is free
   */
  lockHolder(): LockInfo | undefined {
    return this.#database?.prepare("SELECT id, who, operation, created FROM lock").get() as
      | LockInfo
      | undefined;
  }

  /**
   * Removes a lock whoever holds it.
   *
   * @param id Identity of the lock
   * @throws {PlannerError} If that lock is not held
   */
  forceUnlock(id: string): void {
    const holder = this.lockHolder();
    if (holder?.id !== id) {
      throw new PlannerError(
        `Cannot remove lock "${id}" from state "${this.path}" as ` +
          (holder ? `the lock that is held is "${holder.id}"` : "no lock is held"),
      );
    }
    this.#database?.prepare("DELETE FROM lock WHERE id = ?").run(id);
  }

  /** Copies the file to `PATH.backup`, so that a damaged one can be restored. */
  backup(): void {
    const copy = `${this.path}.backup`;
    try {
      rmSync(`${copy}.new`, { force: true });
      this.#database?.exec(`VACUUM INTO '${`${copy}.new`.replaceAll("'", "''")}'`);
      renameSync(`${copy}.new`, copy);
    } catch (thrown) {
      throw explain(thrown, "back up", this.path);
    }
  }

  /** Closes the file. */
  [Symbol.dispose](): void {
    clearInterval(this.#renewal);
    if (this.#database?.isOpen) this.#database.close();
  }

  /** Deletes the file and what belongs to it; the lock goes with it. Only for a state without records. */
  delete(): void {
    if (!this.#database) return;
    if (this.records().length > 0) {
      throw new PlannerError(`Cannot delete state "${this.path}" as it holds resources`);
    }
    this[Symbol.dispose]();
    const key = this.path.replace(/\.db$/, "") + ".key";
    for (const file of [`${this.path}-wal`, `${this.path}-shm`, `${this.path}.backup`, key, this.path]) {
      rmSync(file, { force: true });
    }
    try {
      // The folder goes too, unless other stacks use it.
      rmdirSync(dirname(this.path));
    } catch {
      // Not empty.
    }
  }

  /** Statements are kept: each costs native memory until it is collected. */
  #prepare(database: DatabaseSync, sql: string): StatementSync {
    let statement = this.#statements.get(sql);
    if (!statement) this.#statements.set(sql, statement = database.prepare(sql));
    return statement;
  }

  #decode(text: unknown): unknown {
    return this.secrets.open(JSON.parse(String(text)));
  }

  #read<T>(read: () => T): T {
    try {
      return read();
    } catch (thrown) {
      throw explain(thrown, "read", this.path);
    }
  }

  #requireLock(database: DatabaseSync): void {
    const holder = this.#prepare(database, "SELECT id, who FROM lock").get();
    if (this.#lockId === undefined || holder?.id !== this.#lockId) {
      throw new PlannerError(
        `Cannot write state "${this.path}" as its lock is ` +
          (holder ? `now held by ${holder.who}` : "not held any more") + ": run the command again",
      );
    }
  }

  #tryLock(
    database: DatabaseSync,
    id: string,
    operation: string,
    self: { pid: number; started: number; boot: string },
  ): LockInfo | undefined {
    try {
      database.exec("BEGIN IMMEDIATE");
      try {
        const row = database.prepare("SELECT * FROM lock").get();
        if (row) {
          const owner = { pid: Number(row.pid), started: Number(row.started), boot: String(row.boot) };
          const isHere = String(row.who).endsWith(`@${hostname()}`);
          // A process of this very boot is known to live or not; any other host's is judged by its lease.
          const isOurs = isHere && owner.boot === self.boot && self.boot !== "";
          const isHeld = isOurs ? isRunning(owner) : Number(row.expires) > Date.now();
          if (isHeld) {
            database.exec("ROLLBACK");
            return row as unknown as LockInfo;
          }
          database.exec("DELETE FROM lock");
        }
        database.prepare("INSERT INTO lock VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)").run(
          id,
          `${userName()}@${hostname()}`,
          operation,
          new Date().toISOString(),
          Date.now() + LEASE_MILLISECONDS,
          self.pid,
          self.started,
          self.boot,
        );
        database.exec("COMMIT");
        return undefined;
      } catch (error) {
        if (database.isTransaction) database.exec("ROLLBACK");
        throw error;
      }
    } catch (thrown) {
      throw explain(thrown, "lock", this.path);
    }
  }
}

/** Writes within one transaction of {@linkcode State}. */
export class StateWriter {
  readonly #prepare: (sql: string) => StatementSync;
  readonly #encode: (value: unknown) => string;

  /**
   * Writes into an open transaction.
   *
   * @param prepare Gives a statement
   * @param encode Writes JSON with secrets encrypted
   */
  constructor(prepare: (sql: string) => StatementSync, encode: (value: unknown) => string) {
    this.#prepare = prepare;
    this.#encode = encode;
  }

  /**
   * Writes a record.
   *
   * @param record The object
   */
  put(record: ResourceRecord): void {
    this.#run(
      "INSERT OR REPLACE INTO resources VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
      record.address,
      record.deposed,
      record.kind,
      record.id,
      record.generation,
      record.status,
      this.#encode(record.props),
      record.outputs === undefined ? null : this.#encode(record.outputs),
      JSON.stringify(record.dependencies),
      record.protect ? 1 : 0,
      record.retain ? 1 : 0,
      new Date().toISOString(),
    );
  }

  /**
   * Removes a record.
   *
   * @param address Address
   * @param deposed Which object of the address; empty for the current one
   */
  remove(address: string, deposed = ""): void {
    this.#run("DELETE FROM resources WHERE address = ? AND deposed = ?", address, deposed);
  }

  /**
   * Appends to the journal.
   *
   * @param run The apply
   * @param address Address
   * @param action What is done
   * @param phase How far it is
   * @param detail Why it failed
   */
  journal(run: string, address: string, action: string, phase: JournalEntry["phase"], detail = ""): void {
    this.#run(
      "INSERT INTO journal (run, time, address, action, phase, detail) VALUES (?, ?, ?, ?, ?, ?)",
      run,
      new Date().toISOString(),
      address,
      action,
      phase,
      detail,
    );
  }

  /**
   * Writes the stack's outputs in place of the former ones.
   *
   * @param outputs Values by name, secrets marked
   */
  outputs(outputs: ReadonlyMap<string, unknown>): void {
    this.#run("DELETE FROM outputs");
    for (const [name, value] of outputs) {
      this.#run("INSERT INTO outputs VALUES (?, ?)", name, this.#encode(value));
    }
  }

  /**
   * Keeps the newest entries of the journal.
   *
   * @param count How many
   */
  trimJournal(count: number): void {
    this.#run("DELETE FROM journal WHERE sequence <= (SELECT max(sequence) FROM journal) - ?", count);
  }

  #run(sql: string, ...values: SQLInputValue[]): void {
    this.#prepare(sql).run(...values);
  }
}

/**
 * Derives the identity of an object.
 *
 * @param lineage Lineage of the state
 * @param address Address in the stack
 * @param generation How often the address was replaced
 * @returns 16 hexadecimal digits
 */
export function objectId(lineage: string, address: string, generation: number): string {
  return createHash("sha256").update(`${lineage}\n${address}\n${generation}`).digest("hex").slice(0, 16);
}

function inodeOf(path: string): number | undefined {
  return statSync(path, { throwIfNoEntry: false })?.ino;
}

function userName(): string {
  try {
    return userInfo().username;
  } catch {
    return String(process.getuid?.() ?? "unknown");
  }
}

function explain(thrown: unknown, action: string, path: string): Error {
  if (thrown instanceof PlannerError) return thrown;
  const error = asError(thrown);
  const { message } = error;
  let why = message;
  if (/disk is full|ENOSPC|no space/i.test(message)) {
    why = "the disk is full: free some space and run the command again; nothing on record is lost";
  } else if (
    /not a database|malformed|corrupt|database disk image/i.test(message) ||
    action === "open" && /row \d|page/.test(message)
  ) {
    why =
      `it is corrupt (${message}): restore "${path}.backup" if it exists, or remove the file and adopt what still runs`;
  } else if (/readonly|EACCES|EROFS|unable to open/i.test(message)) {
    why = `it cannot be written (${message}): check the rights of its folder`;
  }
  return new PlannerError(`Cannot ${action} state "${path}" as ${why}`, { cause: error });
}
