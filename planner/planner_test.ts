import assert from "node:assert/strict";
import { secret, stack, text } from "../dsl/mod.ts";
import { apply, ApplyError } from "./mod.ts";
import { kind, State, summarise } from "./mod.ts";
import { actions, Bench } from "./_bench.ts";
import { PlannerError } from "./errors.ts";
import { string } from "../dsl/mod.ts";

Deno.test("apply() creates in order, then plan() is empty", async () => {
  await using bench = new Bench();
  const declared = stack("test", () => {
    const a = bench.thing({ value: "one" });
    const b = bench.thing({ value: text`${a.upper}!` });
    return { b, a, said: b.upper };
  });
  const plan = await bench.apply(declared);
  assert.deepEqual(actions(plan), { a: "create", b: "create" });
  assert.deepEqual(bench.calls.filter((call) => call !== "observe"), ["ensure a", "ensure b"]);
  assert.deepEqual([...bench.world.values()].map((each) => each.value), ["one", "ONE!"]);
  const again = await bench.plan(declared);
  assert.deepEqual(again.operations, []);
  assert.deepEqual(again.outputs, {});
  using state = await State.open(bench.path, { stack: "test", create: false });
  assert.equal(state.outputs().get("said"), "ONE!");
});

Deno.test("makePlan() classes changes by field and lists who else is hit", async () => {
  await using bench = new Bench();
  const declare = (value: string, size: number, base: string) =>
    stack("test", () => {
      const a = bench.thing({ value, size, base });
      return { a, b: bench.thing({ value: a.id }) };
    });
  await bench.apply(declare("x", 1, "p"));
  const live = await bench.plan(declare("y", 1, "p"));
  assert.equal(live.changes[0]!.disruption, "live");
  const reboot = await bench.plan(declare("x", 2, "p"));
  assert.equal(reboot.changes[0]!.action, "update");
  assert.equal(reboot.changes[0]!.disruption, "reboot");
  assert.deepEqual(reboot.changes[0]!.affects, ["b"]);
  const replace = await bench.plan(declare("x", 1, "q"));
  assert.deepEqual(actions(replace), { a: "replace", b: "update" });
  assert.deepEqual(summarise(replace), { add: 1, change: 1, destroy: 1, forget: 0, disruption: "recreate" });
  await assert.rejects(
    bench.plan(declare("x", 2, "p"), { maxDisruption: "live" }),
    /Cannot update "a" as its disruption is "reboot" \(size\) and --max-disruption=live allows less/,
  );
  await bench.apply(declare("x", 1, "q"));
  assert.equal(bench.world.size, 2);
  assert.equal((await bench.plan(declare("x", 1, "q"))).operations.length, 0);
});

Deno.test("makePlan() shows drift apart from changes and repairs it", async () => {
  await using bench = new Bench();
  const declared = stack("test", () => ({ a: bench.thing({ value: "x" }), b: bench.thing({ value: "y" }) }));
  await bench.apply(declared);
  const [first, second] = [...bench.world.keys()];
  bench.world.get(first!)!.value = "changed";
  bench.world.delete(second!);
  const plan = await bench.plan(declared);
  assert.deepEqual(plan.drift.map(({ address, isGone }) => [address, isGone]), [["a", false], ["b", true]]);
  assert.deepEqual(actions(plan), { a: "update", b: "create" });
  const blind = await bench.plan(declared, { refresh: false });
  assert.deepEqual(blind.operations, []);
  const only = await bench.plan(declared, { mode: "refresh-only" });
  assert.deepEqual(actions(only), { a: "update", b: "forget" });
  await bench.apply(declared);
  assert.deepEqual([...bench.world.values()].map((each) => each.value).sort(), ["x", "y"]);
});

Deno.test("apply() with refresh-only writes down what is seen and touches nothing", async () => {
  await using bench = new Bench();
  const declared = stack("test", () => ({ a: bench.thing({ value: "x" }) }));
  await bench.apply(declared);
  [...bench.world.values()][0]!.value = "changed";
  await bench.apply(declared, { mode: "refresh-only" });
  assert.equal([...bench.world.values()][0]!.value, "changed");
  const plan = await bench.plan(declared);
  assert.deepEqual(plan.drift, []);
  assert.deepEqual(plan.changes[0]!.fields.map((each) => [each.before, each.after]), [["changed", "x"]]);
});

Deno.test("apply() removes dependents first, and a create-first replacement last", async () => {
  await using bench = new Bench();
  const declare = (base: string, both: boolean) =>
    stack("test", () => {
      const a = bench.thing({ value: "x", base }, { createBeforeDestroy: true });
      const b = bench.thing({ value: a.id });
      return both ? { a, b } : {};
    });
  await bench.apply(declare("p", true));
  bench.calls.length = 0;
  await bench.apply(declare("q", true));
  assert.deepEqual(bench.calls.filter((call) => call !== "observe"), ["ensure a", "ensure b", "remove a"]);
  bench.calls.length = 0;
  await bench.apply(declare("q", false));
  assert.deepEqual(bench.calls.filter((call) => call !== "observe"), ["remove b", "remove a"]);
  assert.equal(bench.world.size, 0);
});

Deno.test("makePlan() honours protect, also after the line is gone", async () => {
  await using bench = new Bench();
  const declare = (keep: boolean, protect: boolean) =>
    stack("test", () => (keep ? { a: bench.thing({ value: "x" }, { protect }) } : {}));
  await bench.apply(declare(true, true));
  await assert.rejects(bench.plan(declare(false, true)), /Cannot destroy "a" as it is protected/);
  await assert.rejects(bench.plan(declare(true, true), { mode: "destroy" }), /protected/);
  await bench.apply(declare(true, false));
  await bench.apply(declare(false, false));
  assert.equal(bench.world.size, 0);
});

Deno.test("makePlan() honours ignoreChanges, replaceOn, retain and movedFrom", async () => {
  await using bench = new Bench();
  await bench.apply(
    stack(
      "test",
      () => ({
        a: bench.thing({ value: "x", size: 1 }),
        r: bench.thing({ value: "keep" }, { retain: true }),
      }),
    ),
  );
  const ignoring = stack("test", () => ({
    a: bench.thing({ value: "y", size: 1 }, { ignoreChanges: ["value"] }),
    r: bench.thing({ value: "keep" }, { retain: true }),
  }));
  assert.deepEqual((await bench.plan(ignoring)).operations, []);
  const moved = stack("test", () => ({ z: bench.thing({ value: "x", size: 1 }, { movedFrom: "a" }) }));
  const plan = await bench.apply(moved);
  assert.deepEqual(plan.changes.map(({ address, action, movedFrom }) => [address, action, movedFrom]), [
    ["z", "no-op", "a"],
    ["r", "forget", undefined],
  ]);
  assert.equal(bench.world.size, 2);
  const triggered = (size: number) =>
    stack("test", () => {
      const z = bench.thing({ value: "x", size });
      return { z, t: bench.thing({ value: "t" }, { replaceOn: [z] }) };
    });
  await bench.apply(triggered(1));
  assert.deepEqual(actions(await bench.plan(triggered(2))), { z: "update", t: "replace" });
});

Deno.test("makePlan() limits itself to targets and leaves out what is excluded", async () => {
  await using bench = new Bench();
  const declared = stack("test", () => {
    const a = bench.thing({ value: "a" });
    return { a, b: bench.thing({ value: a.id }), c: [bench.thing({ value: "c" })] };
  });
  assert.deepEqual(actions(await bench.plan(declared, { targets: ["b"] })), { a: "create", b: "create" });
  assert.deepEqual(actions(await bench.plan(declared, { targets: ["c"] })), { "c[0]": "create" });
  assert.deepEqual(actions(await bench.plan(declared, { exclude: ["a"] })), { "c[0]": "create" });
  await assert.rejects(bench.plan(declared, { targets: ["nope"] }), /has no such resource/);
});

Deno.test("makePlan() refuses to take over what exists, unless adopt is set", async () => {
  await using bench = new Bench();
  const file = `${bench.folder}/file`;
  await Deno.writeTextFile(file, "old");
  const textFile = kind({
    name: "text_file",
    props: { path: string(), content: string() },
    disruption: { content: "live" },
    async observe(files) {
      const found = new Map();
      for (const { address, props } of files) {
        const content = await Deno.readTextFile(props.path).catch(() => undefined);
        if (content !== undefined) found.set(address, { props: { content } });
      }
      return found;
    },
    async ensure({ props }) {
      await Deno.writeTextFile(props.path, props.content);
      return {};
    },
    remove: ({ props }) => Deno.remove(props.path),
  });
  const declare = (adopt: boolean) =>
    stack("test", () => ({ f: textFile({ path: file, content: "new" }, { adopt }) }));
  await assert.rejects(bench.apply(declare(false)), /exists already and is not on record/);
  await bench.apply(declare(true));
  assert.equal(await Deno.readTextFile(file), "new");
  assert.deepEqual((await bench.plan(declare(true))).operations, []);
});

Deno.test("apply() keeps secrets out of state and out of plans", async () => {
  await using bench = new Bench();
  const declared = stack(
    "test",
    () => ({ a: bench.thing({ value: secret("hunter2") }), shown: secret("hunter2") }),
  );
  await bench.apply(declared);
  assert.equal([...bench.world.values()][0]!.value, "hunter2");
  for await (const { name } of Deno.readDir(`${bench.folder}/s`)) {
    const body = await Deno.readTextFile(`${bench.folder}/s/${name}`).catch(() => "");
    assert.ok(!body.includes("hunter2"), name);
  }
  const plan = await bench.plan(declared);
  assert.deepEqual(plan.operations, []);
  await Deno.remove(`${bench.folder}/s/test.key`);
  await assert.rejects(bench.plan(declared), /key file .* cannot be read: restore it/);
});

Deno.test("apply() records what is done when something fails, and continues on the next run", async () => {
  await using bench = new Bench();
  let broken = true;
  const flaky = kind({
    name: "flaky",
    props: { value: string() },
    observe: () => Promise.resolve(new Map()),
    ensure: () => broken ? Promise.reject(new Error("the wire is cut")) : Promise.resolve({}),
    remove: () => Promise.resolve(),
  });
  const declared = stack("test", () => {
    const bad = flaky({ value: "x" });
    return {
      good: bench.thing({ value: "ok" }),
      bad,
      after: bench.thing({ value: "z" }, { dependsOn: [bad] }),
    };
  });
  await assert.rejects(bench.apply(declared), (error: unknown) => {
    assert.ok(error instanceof ApplyError);
    assert.match(
      error.message,
      /Cannot create "bad" as the wire is cut; 1 that depend on them were not started/,
    );
    return true;
  });
  assert.equal(bench.world.size, 1);
  broken = false;
  const plan = await bench.apply(declared);
  assert.deepEqual(actions(plan), { bad: "create", after: "create" });
  assert.equal(bench.world.size, 2);
});

Deno.test("apply() stops at an abort and continues on the next run", async () => {
  await using bench = new Bench();
  const controller = new AbortController();
  const declared = stack("test", () => {
    const a = bench.thing({ value: "a" });
    return { a, b: bench.thing({ value: a.id }) };
  });
  const onEvent = (event: { type: string }) => event.type === "complete" && controller.abort();
  await assert.rejects(bench.apply(declared, { signal: controller.signal, onEvent }), /Interrupted: 1 of 2/);
  assert.deepEqual(actions(await bench.plan(declared)), { b: "create" });
  await bench.apply(declared);
  assert.equal(bench.world.size, 2);
});

Deno.test("apply() refuses a stale plan", async () => {
  await using bench = new Bench();
  const declared = stack("test", () => ({ a: bench.thing({ value: "x" }) }));
  await bench.apply(declared);
  const next = stack("test", () => ({ a: bench.thing({ value: "y" }) }));
  const plan = await bench.plan(next);
  await bench.apply(next);
  using state = await State.open(bench.path, { stack: "test", create: false });
  using _lock = await state.lock("apply");
  await assert.rejects(
    apply(plan, { graph: next.evaluate(), state, kinds: bench.kinds }),
    (error: unknown) => error instanceof PlannerError && /stale: state was changed since/.test(error.message),
  );
});
