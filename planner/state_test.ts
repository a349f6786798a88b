import assert from "node:assert/strict";
import { PlannerError, type ResourceRecord, State } from "./mod.ts";

const record: ResourceRecord = {
  address: "a",
  deposed: "",
  kind: "k",
  id: "0".repeat(16),
  generation: 0,
  status: "ok",
  props: { x: 1 },
  outputs: undefined,
  dependencies: ["b"],
  protect: true,
  retain: false,
};

async function withFolder(run: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await run(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("State keeps records, and counts writes", () =>
  withFolder(async (folder) => {
    const path = `${folder}/t.db`;
    {
      using state = await State.open(path, { stack: "t", create: true });
      using _lock = await state.lock("test");
      state.transaction((writer) => {
        writer.put(record);
        writer.journal("run", "a", "create", "begin");
      });
      assert.equal(state.serial, 1);
    }
    using state = await State.open(path, { stack: "t", create: false });
    assert.deepEqual(state.records(), [record]);
    assert.equal(state.journal()[0]!.phase, "begin");
  }));

Deno.test("State writes nothing of a transaction that throws", () =>
  withFolder(async (folder) => {
    using state = await State.open(`${folder}/t.db`, { stack: "t", create: true });
    using _lock = await state.lock("test");
    assert.throws(() =>
      state.transaction((writer) => {
        writer.put(record);
        throw new PlannerError("no");
      }), /no/);
    assert.deepEqual(state.records(), []);
  }));

Deno.test("State.open() leaves no file where none is to be made", () =>
  withFolder(async (folder) => {
    using state = await State.open(`${folder}/sub/t.db`, { stack: "t", create: false });
    assert.equal(state.isStored, false);
    assert.deepEqual(state.records(), []);
    assert.deepEqual([...Deno.readDirSync(folder)], []);
  }));

Deno.test("State.open() refuses a corrupt file, one of a newer version, one of another stack, and another database", () =>
  withFolder(async (folder) => {
    const path = `${folder}/t.db`;
    const open = () => State.open(path, { stack: "t", create: true });
    (await open())[Symbol.dispose]();
    await assert.rejects(State.open(path, { stack: "other", create: true }), /belongs to stack "t"/);
    const { DatabaseSync } = await import("node:sqlite");
    const database = new DatabaseSync(path);
    database.exec("PRAGMA user_version = 99");
    database.close();
    await assert.rejects(open(), /version 99 is newer than 1.*use the release that wrote it/);
    await Deno.writeTextFile(path, "x".repeat(5000));
    await assert.rejects(open(), /it is corrupt .*restore/);
    await Deno.remove(path);
    const foreign = new DatabaseSync(path);
    foreign.exec("CREATE TABLE t (x)");
    foreign.close();
    await assert.rejects(open(), /database of something else/);
  }));

Deno.test("State.open() notices damage inside the file", () =>
  withFolder(async (folder) => {
    const path = `${folder}/t.db`;
    {
      using state = await State.open(path, { stack: "t", create: true });
      using _lock = await state.lock("test");
      state.transaction((writer) => {
        for (let index = 0; index < 500; index++) {
          writer.put({ ...record, address: `a${index}`, props: { long: "x".repeat(200) } });
        }
      });
    }
    const bytes = await Deno.readFile(path);
    bytes.fill(0xa5, 4096 * 3, 4096 * 20);
    await Deno.writeFile(path, bytes);
    await assert.rejects(async () => {
      using state = await State.open(path, { stack: "t", create: false });
      state.records();
    }, (error: unknown) => error instanceof PlannerError && /corrupt/.test(error.message));
  }));

Deno.test("State.lock() keeps others out, names the holder, and can be forced", () =>
  withFolder(async (folder) => {
    const path = `${folder}/t.db`;
    using one = await State.open(path, { stack: "t", create: true });
    using two = await State.open(path, { stack: "t", create: true });
    using _lock = await one.lock("apply");
    await assert.rejects(two.lock("apply"), /has held it for "apply" since .*force-unlock/);
    assert.throws(() => two.transaction((writer) => writer.put(record)), /its lock is now held by/);
    assert.throws(() => two.forceUnlock("wrong"), /the lock that is held is/);
    two.forceUnlock(two.lockHolder()!.id);
    assert.throws(() => one.transaction((writer) => writer.put(record)), /not held any more/);
    using _next = await two.lock("apply", { timeout: 1000 });
    two.transaction((writer) => writer.put(record));
  }));

Deno.test("State.lock() takes over from an owner that died", () =>
  withFolder(async (folder) => {
    const path = `${folder}/t.db`;
    const script = `
      import { State } from ${JSON.stringify(import.meta.resolve("./state.ts"))};
      const state = await State.open(${JSON.stringify(path)}, { stack: "t", create: true });
      await state.lock("apply");
      Deno.kill(Deno.pid, "SIGKILL");
    `;
    await new Deno.Command(Deno.execPath(), { args: ["eval", script], stdout: "null", stderr: "null" })
      .output();
    using state = await State.open(path, { stack: "t", create: false });
    assert.ok(state.lockHolder());
    using _lock = await state.lock("apply");
    state.transaction((writer) => writer.put(record));
  }));

Deno.test("State says what to do when the disk is full", () =>
  withFolder(async (folder) => {
    using state = await State.open(`${folder}/t.db`, { stack: "t", create: true });
    using _lock = await state.lock("test");
    state.transaction((writer) => writer.put(record));
    assert.throws(
      () =>
        state.transaction(() => {
          // What SQLite throws where a write does not fit.
          throw new Error("database or disk is full");
        }),
      /Cannot write state ".*" as the disk is full: free some space and run the command again; nothing on record is lost/,
    );
    assert.equal(state.records().length, 1);
  }));

Deno.test("State.backup() makes a copy that opens", () =>
  withFolder(async (folder) => {
    const path = `${folder}/t.db`;
    using state = await State.open(path, { stack: "t", create: true });
    using _lock = await state.lock("test");
    state.transaction((writer) => writer.put(record));
    state.backup();
    using copy = await State.open(`${path}.backup`, { stack: "t", create: false });
    assert.deepEqual(copy.records(), [record]);
  }));
