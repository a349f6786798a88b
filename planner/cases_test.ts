/**
 * Cases that once went wrong.
 */

import assert from "node:assert/strict";
import { array, check, optional, resource, secret, size, stack, text } from "../dsl/mod.ts";
import {
  apply,
  configurationDigest,
  hasChanges,
  jsonPlan,
  kind,
  makePlan,
  memoryKind,
  State,
  writePlanFile,
} from "./mod.ts";
import { actions, Bench } from "./_bench.ts";
import { string } from "../dsl/mod.ts";

const S = (f: () => unknown) => stack("test", f);
const order = (calls: string[], ...want: string[]) => {
  const at = want.map((w) => calls.indexOf(w));
  assert.ok(
    at.every((x, i) => x >= 0 && (i === 0 || x > at[i - 1]!)),
    `want ${want.join(" < ")}, got ${calls.join(", ")}`,
  );
};
const refKind = (bench: Bench, log: (s: string) => void = () => {}, to: "live" | "recreate" = "live") => {
  const k = kind({
    name: "ref",
    props: { to: resource("memory"), note: optional(string()) },
    outputs: {},
    disruption: { note: "live", to },
    observe: (is) =>
      Promise.resolve(
        new Map(is.map((i) => [i.address, {}]).filter(([a]) => made.has(a as string)) as [string, object][]),
      ),
    ensure: ({ address, props, dependencies }) => {
      made.add(address);
      log(`ensure ${address} deps=${[...dependencies.keys()]} to=${JSON.stringify(props.to)}`);
      return Promise.resolve({});
    },
    remove: ({ address, dependencies }) => {
      made.delete(address);
      log(`remove ${address} deps=${[...dependencies.keys()]}`);
      return Promise.resolve();
    },
  });
  const made = bench.made;
  bench.kinds.set("ref", k.kind);
  return k;
};

Deno.test("planner: cycle: middle man removed while end is replaced delete-first", async () => {
  await using b = new Bench();
  await b.apply(S(() => {
    const t = b.thing({ value: "t", base: "p" });
    const r = b.thing({ value: t.id });
    const q = b.thing({ value: r.id });
    return { t, r, q };
  }));
  b.calls.length = 0;
  const next = S(() => {
    const t = b.thing({ value: "t", base: "q" });
    const q = b.thing({ value: t.id });
    return { t, q };
  });
  const p = await b.apply(next);
  assert.ok(p.operations.length > 0);
  assert.ok(b.calls.length > 0, "apply returned success and did nothing");
});
Deno.test("planner: movedFrom: id collides with new resource at the old address", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "1" }) })));
  await b.apply(S(() => ({ z: b.thing({ value: "1" }, { movedFrom: "a" }) })));
  await b.apply(S(() => ({ z: b.thing({ value: "1" }, { movedFrom: "a" }), a: b.thing({ value: "2" }) })));
  assert.equal(b.world.size, 2);
});
Deno.test("planner: same with refresh=false overwrites", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "1" }) })));
  await b.apply(S(() => ({ z: b.thing({ value: "1" }, { movedFrom: "a" }) })));
  await b.apply(S(() => ({ z: b.thing({ value: "1" }), a: b.thing({ value: "2" }) })), { refresh: false });
  assert.equal(b.world.size, 2);
});
Deno.test("planner: replace bumps into moved id", async () => {
  await using b = new Bench();
  const A = (base: string) => S(() => ({ a: b.thing({ value: "1", base }) }));
  await b.apply(A("p"));
  await b.apply(A("q")); // a gen 1
  await b.apply(S(() => ({ z: b.thing({ value: "1", base: "q" }, { movedFrom: "a" }) })));
  await b.apply(S(() => ({ z: b.thing({ value: "1", base: "q" }), a: b.thing({ value: "2", base: "p" }) })));
  await b.apply(S(() => ({ z: b.thing({ value: "1", base: "q" }), a: b.thing({ value: "2", base: "q" }) })));
  assert.equal(b.world.size, 2);
});
Deno.test("planner: movedFrom: references in props are phantom replace", async () => {
  await using b = new Bench();
  const ref = refKind(b, undefined, "recreate");
  await b.apply(S(() => {
    const a = b.thing({ value: "1" });
    return { a, r: ref({ to: a }) };
  }));
  const p = await b.plan(S(() => {
    const z = b.thing({ value: "1" }, { movedFrom: "a" });
    return { z, r: ref({ to: z }) };
  }));
  assert.deepEqual(actions(p), {});
});
Deno.test("planner: outputs of an updated resource are taken as unchanged: not converged", async () => {
  await using b = new Bench();
  const d = (v: string) =>
    S(() => {
      const a = b.thing({ value: v });
      return { a, b: b.thing({ value: a.upper }), said: a.upper };
    });
  await b.apply(d("x"));
  await b.apply(d("y"));
  const p = await b.plan(d("y"));
  assert.deepEqual(actions(p), {});
  assert.deepEqual([...b.world.values()].map((e) => e.value), ["y", "Y"]);
});
Deno.test("planner: merge() drops normalisation: phantom diff", async () => {
  await using b = new Bench();
  const sized = kind({
    name: "sized",
    props: { size: size() },
    observe: (is) => Promise.resolve(new Map(is.map((i) => [i.address, {}]))),
    ensure: () => {
      b.calls.push("ensure s");
      return Promise.resolve({});
    },
    remove: () => Promise.resolve(),
  });
  const d = S(() => {
    const a = b.thing({ value: "1024" });
    return { a, s: sized({ size: text`${a.upper}MiB` as never }, { adopt: true }) };
  });
  await b.apply(d);
  assert.deepEqual(actions(await b.plan(d)), {});
});
Deno.test("planner: props from outputs without dependencies are not checked", async () => {
  await using b = new Bench();
  const d = S(() => ({ a: b.thing({ value: secret("x").map(() => 5) as never }) }));
  await assert.rejects(b.plan(d), /must be a string/);
});
Deno.test("planner: marking a value secret replaces", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "x", base: "p" }) })));
  const p = await b.plan(S(() => ({ a: b.thing({ value: "x", base: secret("p") }) })));
  assert.deepEqual(actions(p), {});
});
Deno.test("planner: ignoreChanges on arrays leaves holes", async () => {
  await using b = new Bench();
  let got: unknown;
  const lk = kind({
    name: "list",
    props: { list: array(string()), v: string() },
    disruption: { list: "live", v: "live" },
    observe: (is) => Promise.resolve(new Map(is.map((i) => [i.address, {}]))),
    ensure: ({ props }) => {
      got = props.list;
      return Promise.resolve({});
    },
    remove: () => Promise.resolve(),
  });
  await b.apply(S(() => ({ a: lk({ list: ["x"], v: "1" }, { adopt: true }) })));
  await b.apply(S(() => ({ a: lk({ list: ["x", "y"], v: "2" }, { adopt: true, ignoreChanges: ["list"] }) })));
  assert.deepEqual(got, ["x"]);
});
Deno.test("planner: createFirst pair: old dependency removed before old dependent", async () => {
  await using b = new Bench();
  const d = (base: string) =>
    S(() => {
      const a = b.thing({ value: "x", base }, { createBeforeDestroy: true });
      return { a, b: b.thing({ value: a.id, base }, { createBeforeDestroy: true }) };
    });
  await b.apply(d("p"));
  b.calls.length = 0;
  await b.apply(d("q"), { parallelism: 1 });
  order(b.calls, "ensure a", "ensure b", "remove b", "remove a");
});
Deno.test("planner: createFirst dependent replaced, dependency deleted: before the old dependent", async () => {
  await using b = new Bench();
  await b.apply(S(() => {
    const t = b.thing({ value: "t" });
    return { t, r: b.thing({ value: t.id, base: "p" }) };
  }));
  b.calls.length = 0;
  const p = await b.plan(S(() => ({ r: b.thing({ value: "n", base: "q" }, { createBeforeDestroy: true }) })));
  const t = p.operations.find((o) => o.type === "delete" && o.address === "t")!,
    r = p.operations.findIndex((o) => o.type === "delete" && o.address === "r");
  assert.ok(t.after.includes(r), "t goes before the old r that uses it");
});
Deno.test("planner: left-over deposed dependent, then all removed", async () => {
  await using b = new Bench();
  const d = (base: string) =>
    S(() => {
      const t = b.thing({ value: "t" });
      return { t, r: b.thing({ value: t.id, base }, { createBeforeDestroy: true }) };
    });
  await b.apply(d("p"));
  await b.killed(d("q"), "recorded create r");
  const p = await b.plan(S(() => ({})));
  const t = p.operations.find((o) => o.address === "t")!;
  assert.equal(t.after.length, 2, "t must wait for both r");
});
Deno.test("planner: resume after depose: old object removed before new one is made", async () => {
  await using b = new Bench();
  const d = (base: string) => S(() => ({ a: b.thing({ value: "x", base }, { createBeforeDestroy: true }) }));
  await b.apply(d("p"));
  await b.killed(d("q"), "depose a");
  const p = await b.plan(d("q"));
  const del = p.operations.find((o) => o.type === "delete")!,
    made = p.operations.findIndex((o) => o.type === "create");
  assert.ok(del.after.includes(made), "delete of the deposed object does not wait for the new one");
});
Deno.test("planner: --target removes deposed objects of others", async () => {
  await using b = new Bench();
  const d = (base: string) =>
    S(() => {
      const a = b.thing({ value: "x", base }, { createBeforeDestroy: true });
      return { a, b: b.thing({ value: a.id }), c: b.thing({ value: "c" }) };
    });
  await b.apply(d("p"));
  await b.killed(d("q"), "depose a");
  await b.apply(d("q"), { targets: ["c"] });
  assert.deepEqual(b.calls, [], "old object of a is gone, b still uses it, new one was not made");
});
Deno.test("planner: destroy --exclude keeps dependents but destroys what the kept one needs", async () => {
  await using b = new Bench();
  const d = S(() => {
    const a = b.thing({ value: "x" });
    return { a, b: b.thing({ value: a.id }) };
  });
  await b.apply(d);
  const p = await b.plan(d, { mode: "destroy", exclude: ["b"] });
  assert.deepEqual(actions(p), {});
});
Deno.test("planner: destroy --target=a wipes all stack outputs", async () => {
  await using b = new Bench();
  const d = S(() => {
    const a = b.thing({ value: "x" });
    return { a, c: b.thing({ value: "c" }), out: a.upper };
  });
  await b.apply(d);
  await b.apply(d, { mode: "destroy", targets: ["c"] });
  assert.equal((await b.outputs()).get("out"), "X");
});
Deno.test("planner: target of a deletion does not take along the user that lets go", async () => {
  await using b = new Bench();
  await b.apply(S(() => {
    const t = b.thing({ value: "t" });
    return { t, r: b.thing({ value: t.id }) };
  }));
  const p = await b.plan(S(() => ({ r: b.thing({ value: "n" }) })), { targets: ["t"] });
  assert.deepEqual(actions(p), { r: "update", t: "delete" });
});
Deno.test("planner: begin() forgets old dependencies: after a kill, t is removed before r lets go", async () => {
  await using b = new Bench();
  await b.apply(S(() => {
    const t = b.thing({ value: "t" });
    const u = b.thing({ value: "u" });
    return { t, u, r: b.thing({ value: t.id }) };
  }));
  const d = S(() => {
    const u = b.thing({ value: "u" });
    return { u, r: b.thing({ value: u.id }) };
  });
  await b.killed(d, "begin update r", { parallelism: 1 });
  const p = await b.plan(d);
  const del = p.operations.find((o) => o.type === "delete")!,
    upd = p.operations.findIndex((o) => o.type === "update");
  assert.ok(del.after.includes(upd), "delete t does not wait for update r");
});
Deno.test("planner: remove() receives the new dependencies, not those of the object", async () => {
  await using b = new Bench();
  const log: string[] = [];
  const ref = refKind(b, (s) => log.push(s), "recreate");
  await b.apply(S(() => {
    const t = b.thing({ value: "t" });
    const u = b.thing({ value: "u" });
    return { t, u, r: ref({ to: t }) };
  }));
  log.length = 0;
  await b.apply(S(() => {
    const t = b.thing({ value: "t" });
    const u = b.thing({ value: "u" });
    return { t, u, r: ref({ to: u }) };
  }));
  assert.equal(log[0], "remove r deps=t");
});
Deno.test("planner: record cycle after a kill: destroy does nothing and succeeds", async () => {
  await using b = new Bench();
  await b.apply(S(() => {
    const y = b.thing({ value: "b" });
    return { y, x: b.thing({ value: "a" }, { dependsOn: [y] }) };
  }));
  const xid = [...b.world].find(([, o]) => o.value === "a")![0];
  b.world.delete(xid);
  const d = S(() => {
    const x = b.thing({ value: "a" });
    return { x, y: b.thing({ value: "b" }, { dependsOn: [x] }) };
  });
  await b.killed(d, "before begin create x", { parallelism: 1 });
  await b.apply(d, { mode: "destroy", refresh: false });
  assert.deepEqual(await b.records(), []);
});
Deno.test("planner: replace delete-first, kill after delete: dependents miss the replacement", async () => {
  await using b = new Bench();
  const log: string[] = [];
  const ref = refKind(b, (s) => log.push(s));
  const d = (base: string) =>
    S(() => {
      const a = b.thing({ value: "x", base });
      return { a, r: ref({ to: a }) };
    });
  await b.apply(d("p"));
  const expected = actions(await b.plan(d("q")));
  assert.deepEqual(expected, { a: "replace", r: "update" });
  await b.killed(d("q"), "end delete a");
  log.length = 0;
  const p = await b.apply(d("q"));
  assert.deepEqual(actions(p), { a: "create", r: "update" });
});
Deno.test("planner: object gone, made again: dependents are not told", async () => {
  await using b = new Bench();
  const ref = refKind(b);
  const d = S(() => {
    const a = b.thing({ value: "x" });
    return { a, r: ref({ to: a }) };
  });
  await b.apply(d);
  b.world.clear();
  assert.deepEqual(actions(await b.plan(d)), { a: "create", r: "update" });
});
Deno.test("planner: replaceOn lost when the run is cut after the trigger", async () => {
  await using b = new Bench();
  const d = (v: string) =>
    S(() => {
      const z = b.thing({ value: v });
      return { z, t: b.thing({ value: "t" }, { replaceOn: [z] }) };
    });
  await b.apply(d("1"));
  await b.killed(d("2"), "recorded update z", { parallelism: 1 });
  assert.deepEqual(actions(await b.plan(d("2"))), { t: "replace" });
});
Deno.test("planner: text literals are not in the configuration digest", () => {
  const b = memoryKind(new Map());
  const d = (s: string) =>
    configurationDigest(
      S(() => {
        const a = b({ value: "x" });
        return { a, c: b({ value: s === "1" ? text`one ${a.id}` : text`two ${a.id}` }) };
      }).evaluate(),
    );
  assert.notEqual(d("1"), d("2"));
});
Deno.test("planner: onEvent that throws", async () => {
  await using b = new Bench();
  const d = S(() => ({ a: b.thing({ value: "x" }) }));
  let unhandled = false;
  const h = (e: PromiseRejectionEvent) => {
    unhandled = true;
    e.preventDefault();
  };
  globalThis.addEventListener("unhandledrejection", h);
  const r = await Promise.race([
    b.apply(d, {
      onEvent: () => {
        throw new Error("Broken pipe");
      },
    }).then(() => "ok", (e) => "rejected " + e.message),
    new Promise((r) => setTimeout(() => r("never settles"), 500)),
  ]);
  globalThis.removeEventListener("unhandledrejection", h);
  assert.notEqual(r, "never settles", `unhandled=${unhandled}`);
});
Deno.test("planner: $encrypted as key bricks the state", async () => {
  await using b = new Bench();
  const d = S(() => ({ a: b.thing({ value: "x", more: { "$encrypted": "y" } }) }));
  try {
    await b.apply(d);
  } catch (e) {
    assert.match((e as Error).message, /\$encrypted/);
    return;
  }
  await b.plan(d);
});
Deno.test("planner: $secret / $unknown as key", async () => {
  await using b = new Bench();
  await assert.rejects(
    b.apply(S(() => ({ a: b.thing({ value: "x", more: { "$unknown": "y" } }) }))),
    /name|key/i,
  );
});
Deno.test("planner: secret variables in plan file and JSON", async () => {
  await using b = new Bench();
  const d = stack(
    "test",
    { password: String },
    ({ password }) => ({ a: b.thing({ value: secret(password) }) }),
  );
  using state = await State.open(b.path, { stack: "test", create: false });
  const plan = await makePlan({ graph: d.evaluate({ password: "hunter2" }), state, kinds: b.kinds });
  writePlanFile(`${b.folder}/p`, plan, state.secrets);
  assert.ok(!Deno.readTextFileSync(`${b.folder}/p`).includes("hunter2"), "file");
  assert.ok(!JSON.stringify(jsonPlan(plan, [])).includes("hunter2"), "json");
});
Deno.test("planner: driver error with a secret is journaled in clear", async () => {
  await using b = new Bench();
  const bad = kind({
    name: "bad",
    props: { value: string() },
    observe: () => Promise.resolve(new Map()),
    ensure: ({ props }) => Promise.reject(new Error(`command failed: login -p ${props.value}`)),
    remove: () => Promise.resolve(),
  });
  await assert.rejects(b.apply(S(() => ({ a: bad({ value: secret("hunter2") }) }))), (e: Error) => {
    assert.ok(!e.message.includes("hunter2"), "message: " + e.message);
    return true;
  });
});
Deno.test("planner: observed outputs are never recorded: output change forever", async () => {
  await using b = new Bench();
  let ip = "1";
  const dh = kind({
    name: "dh",
    props: { v: string() },
    outputs: { ip: string() },
    observe: (is) =>
      Promise.resolve(new Map(is.filter((i) => i.outputs).map((i) => [i.address, { outputs: { ip } }]))),
    ensure: () => Promise.resolve({ ip }),
    remove: () => Promise.resolve(),
  });
  const d = S(() => {
    const a = dh({ v: "x" });
    return { a, out: a.ip };
  });
  await b.apply(d);
  ip = "2";
  await b.apply(d);
  assert.equal((await b.outputs()).get("out"), "2");
  assert.equal(hasChanges(await b.plan(d)), false);
});
Deno.test("planner: no-op apply bumps the serial when outputs are not in alphabetical order", async () => {
  await using b = new Bench();
  const d = S(() => {
    const a = b.thing({ value: "x" });
    return { a, z: a.id, b: a.upper };
  });
  await b.apply(d);
  const s = await b.serial();
  await b.apply(d);
  assert.equal(await b.serial(), s);
});
Deno.test("planner: failed update wipes outputs from state", async () => {
  await using b = new Bench();
  let broken = false;
  const fl = kind({
    name: "fl",
    props: { v: string() },
    outputs: { o: string() },
    disruption: { v: "live" },
    observe: (is) => Promise.resolve(new Map(is.filter((i) => i.outputs).map((i) => [i.address, {}]))),
    ensure: () => broken ? Promise.reject(new Error("no")) : Promise.resolve({ o: "1" }),
    remove: () => Promise.resolve(),
  });
  const d = (v: string) =>
    S(() => {
      const a = fl({ v });
      return { a, out: a.o };
    });
  await b.apply(d("1"));
  broken = true;
  await b.apply(d("2")).catch(() => {});
  assert.equal((await b.outputs()).get("out"), "1");
});
Deno.test("planner: a check that throws blocks", async () => {
  await using b = new Bench();
  await b.apply(S(() => {
    const a = b.thing({ value: "x" });
    return { a, c: check(a.upper.map((x) => JSON.parse(x).y === 1), "m") };
  }));
});
Deno.test("planner: an output whose function throws is explained when it is planned", async () => {
  await using b = new Bench();
  const fl = kind({
    name: "fl",
    props: {},
    observe: () => Promise.resolve(new Map()),
    ensure: () => Promise.reject(new Error("wire cut")),
    remove: () => Promise.resolve(),
  });
  await assert.rejects(
    b.apply(S(() => {
      const a = b.thing({ value: "x" });
      return { a, f: fl({}), o: a.upper.map((x) => JSON.parse(x)) };
    })),
    /Cannot compute the output "o"/,
  );
});
Deno.test("planner: refresh-only with targets and with a pending move", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "x" }), c: b.thing({ value: "y" }) })));
  for (const o of b.world.values()) o.value += "!";
  const p = await b.plan(S(() => ({ a: b.thing({ value: "x" }), c: b.thing({ value: "y" }) })), {
    mode: "refresh-only",
    targets: ["a"],
  });
  assert.deepEqual(actions(p), { a: "update" });
});
Deno.test("planner: refresh-only with a pending move", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "x" }) })));
  b.world.clear();
  await b.apply(S(() => ({ z: b.thing({ value: "x" }, { movedFrom: "a" }) })), { mode: "refresh-only" });
  assert.deepEqual(await b.records(), []);
});
Deno.test("planner: state.delete() while another process waits for the lock", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({})));
  using other = await State.open(b.path, { stack: "test", create: false });
  Deno.writeTextFileSync(`${b.folder}/s/other-stack.db`, ""); // the folder holds another stack too
  {
    const state = await State.open(b.path, { stack: "test", create: false });
    const l = await state.lock("destroy");
    state.delete();
    l[Symbol.dispose]();
  }
  const graph = S(() => ({ a: b.thing({ value: "x" }) })).evaluate();
  const h = other.lockHolder();
  if (h) other.forceUnlock(h.id); // the CLI process that destroyed has ended
  try {
    using _l = await other.lock("apply");
    const plan = await makePlan({ graph, state: other, kinds: b.kinds });
    await apply(plan, { graph, state: other, kinds: b.kinds });
  } catch {
    assert.equal(b.world.size, 0);
    return;
  }
  assert.equal((await b.records()).length, 1, "object made, record lost");
});
Deno.test("planner: creating, then a recreate-class field is changed", async () => {
  await using b = new Bench();
  const disks = new Map<string, string>();
  let cut = true;
  const dk = kind({
    name: "dk",
    props: { base: string() },
    observe: (is) => Promise.resolve(new Map(is.filter((i) => disks.has(i.id)).map((i) => [i.address, {}]))),
    ensure: ({ id, props }) => {
      if (!disks.has(id)) disks.set(id, props.base);
      if (cut) throw new Error("cut");
      return Promise.resolve({});
    },
    remove: ({ id }) => {
      disks.delete(id);
      return Promise.resolve();
    },
  });
  await b.apply(S(() => ({ d: dk({ base: "debian" }) }))).catch(() => {});
  cut = false;
  await b.apply(S(() => ({ d: dk({ base: "alpine" }) })));
  assert.deepEqual([...disks.values()], ["alpine"]);
});
Deno.test("planner: movedFrom chain a->b, b->c at once", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "A", base: "A" }), b: b.thing({ value: "B", base: "B" }) })));
  const p = await b.plan(
    S(() => ({
      b: b.thing({ value: "A", base: "A" }, { movedFrom: "a" }),
      c: b.thing({ value: "B", base: "B" }, { movedFrom: "b" }),
    })),
  );
  assert.deepEqual(actions(p), {});
});
Deno.test("planner: movedFrom swap", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "A", base: "A" }), b: b.thing({ value: "B", base: "B" }) })));
  await assert.rejects(
    b.plan(
      S(() => ({
        a: b.thing({ value: "B", base: "B" }, { movedFrom: "b" }),
        b: b.thing({ value: "A", base: "A" }, { movedFrom: "a" }),
      })),
    ),
    /to take each other's place: use state mv/,
  );
});
Deno.test("planner: kill after move: dependents of the moved one lose the edge", async () => {
  await using b = new Bench();
  await b.apply(S(() => {
    const a = b.thing({ value: "A" });
    return { a, r: b.thing({ value: a.id }) };
  }));
  const d = S(() => ({ z: b.thing({ value: "A" }, { movedFrom: "a" }) }));
  await b.killed(d, "moved");
  const p = await b.plan(S(() => ({})));
  assert.equal(p.operations.find((o) => o.address === "z")!.after.length, 1);
});
Deno.test("planner: an inline disk in a prop of that name has an address of its own", () => {
  const dk = kind({
    name: "disk",
    props: { v: string() },
    observe: () => Promise.resolve(new Map()),
    ensure: () => Promise.resolve({}),
    remove: () => Promise.resolve(),
  });
  const bk = kind({
    name: "bk",
    props: { disk: resource("disk") },
    observe: () => Promise.resolve(new Map()),
    ensure: () => Promise.resolve({}),
    remove: () => Promise.resolve(),
  });
  const g = S(() => ({ r: bk({ disk: dk({ v: "x" }) }) })).evaluate();
  assert.deepEqual([...g.byAddress.keys()].length, 2);
});
Deno.test("planner: moved object destroyed with plan of other target; protect carried", async () => {
  await using b = new Bench();
  await b.apply(S(() => ({ a: b.thing({ value: "A" }, { retain: true }) })));
  const p = await b.plan(S(() => ({ a: b.thing({ value: "A" }, { retain: true }) })), { mode: "destroy" });
  assert.deepEqual(actions(p), { a: "forget" });
});
Deno.test("planner: odd keys", async () => {
  await using b = new Bench();
  const more = Object.fromEntries([
    ["a.b", "1"],
    ["x[0]", "2"],
    ['q"\\', "3"],
    ["", "4"],
    ["0", "5"],
    ["constructor", "6"],
    ["__proto__", "7"],
    ["a\nb", "8"],
    ["]", "9"],
  ]);
  const d = (m: Record<string, string>) => S(() => ({ "o d.d": b.thing({ value: "x", more: m }) }));
  await b.apply(d(more));
  const [rec] = await b.records();
  assert.deepEqual(Object.keys((rec!.props as { more: object }).more).sort(), Object.keys(more).sort());
  assert.deepEqual(actions(await b.plan(d(more))), {});
  const ign = S(() => ({ "o d.d": b.thing({ value: "y", more: {} }, { ignoreChanges: ["more"] }) }));
  const p = await b.plan(ign);
  assert.deepEqual((p.changes[0]!.after as { more: object }).more, (rec!.props as { more: object }).more);
});
