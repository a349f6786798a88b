import assert from "node:assert/strict";
import {
  check,
  type Diagnostic,
  disk,
  formatDiagnostic,
  network,
  Output,
  range,
  secret,
  type Stack,
  stack,
  text,
  ValidationError,
  vm,
} from "./mod.ts";
import { Choice } from "./image.ts";
import { object } from "./schema.ts";
import { declare, type KindDefinition } from "./resource.ts";
import { optional, string } from "./schema.ts";

const image = new Choice("image", "none", object({}), {});
const note: KindDefinition<{ text?: string }> = {
  name: "note",
  schema: object({ text: optional(string()) }),
};
const makeNote = (text?: string | Output<string>, options = {}) =>
  declare<{ text?: string }, { id: string }>(note, text === undefined ? {} : { text }, options, ["id"]);

function problems(declared: Stack, variables = {}): readonly Diagnostic[] {
  try {
    declared.evaluate(variables);
  } catch (error) {
    assert.ok(error instanceof ValidationError, String(error));
    return error.diagnostics;
  }
  assert.fail("the stack is valid");
}

Deno.test("evaluate() makes addresses of the names in the tree", () => {
  const graph = stack("test", () => {
    const lan = network({ cidr: "10.0.0.0/24" });
    const db = vm({
      memory: "1GiB",
      image,
      disks: { data: disk({ size: "1GiB" }), logs: { disk: disk({ size: "2GiB" }), mount: "/var/log" } },
      nics: { eth0: lan.nic() },
    });
    return {
      lan,
      site: { db, "odd name": disk({ size: "1MiB" }) },
      web: range(2).map(() => makeNote("x")),
      shown: 7,
    };
  }).evaluate();
  assert.deepEqual([...graph.byAddress.keys()].sort(), [
    "lan",
    "site.db",
    "site.db.disks.data",
    "site.db.disks.logs",
    'site["odd name"]',
    "web[0]",
    "web[1]",
  ]);
  assert.deepEqual(graph.byAddress.get("site.db")!.dependencies, [
    "lan",
    "site.db.disks.data",
    "site.db.disks.logs",
  ]);
  assert.deepEqual([...graph.outputs], [["shown", 7]]);
  const order = graph.resources.map((each) => each.address);
  assert.ok(order.indexOf("lan") < order.indexOf("site.db"));
});

Deno.test("evaluate() reports all problems at once, each with its place", () => {
  const found = problems(stack("test", () => ({
    a: vm({ memory: "1GB" as "1GiB", image, memroy: 1 } as never),
    b: disk({ size: "1KiB", format: "vmdk" as "raw" }),
    c: network({ cidr: "10.0.0.1/24" }),
    d: vm({
      memory: "1GiB",
      image,
      cpus: 1.5,
      nics: { "bad name": 3 as never },
      ready: { type: "tcp", port: 0 },
    }),
  })));
  const lines = found.map((each) => [each.address, each.field]);
  assert.deepEqual(lines, [
    ["a", "memroy"],
    ["a", "memory"],
    ["b", "size"],
    ["b", "format"],
    ["c", "cidr"],
    ["d", "cpus"],
    ["d", 'nics["bad name"]'],
    ["d", 'nics["bad name"]'],
    ["d", "ready.port"],
  ]);
  assert.match(found[0]!.reason, /did you mean "memory"/);
  assert.match(
    formatDiagnostic(found[1]!),
    /^a\.memory: Cannot read "1GB" as a size: .*current value is "1GB" \(.*stack_test\.ts:\d+\)$/,
  );
  assert.match(found[4]!.reason, /its first address is "10\.0\.0\.0\/24"/);
});

Deno.test("evaluate() refuses a resource in several places without a name, and under two names", () => {
  const shared = disk({ size: "1MiB" });
  const twice = problems(stack("test", () => ({
    a: vm({ memory: "1GiB", image, disks: { x: shared } }),
    b: vm({ memory: "1GiB", image, disks: { y: shared } }),
  })));
  assert.match(
    twice[0]!.reason,
    /used in several places \(a\.disks\.x, b\.disks\.y\): return it in the stack's tree/,
  );
  const named = problems(stack("test", () => ({ a: shared, b: shared })));
  assert.match(named[0]!.reason, /several names: a, b/);
  const lost = problems(stack("test", () => ({ a: makeNote(makeNote().id) })));
  assert.match(lost[0]!.reason, /referred to and not declared/);
});

Deno.test("evaluate() refuses a cycle and names it", () => {
  const found = problems(stack("test", () => {
    const a: ReturnType<typeof makeNote> = makeNote("a", { dependsOn: () => [c] });
    const b = makeNote("b", { dependsOn: [a] });
    const c = makeNote(b.id);
    return { a, b, c };
  }));
  assert.match(found[0]!.reason, /in a cycle: (\w) -> \w -> \w -> \1/);
});

Deno.test("evaluate() reads variables by the types of their defaults", () => {
  const declared = stack(
    "test",
    { count: 2, name: "x", big: false, token: String },
    ({ count, name, big, token }) => ({ n: range(count).map(() => makeNote(`${name}${big}${token}`)) }),
  );
  const graph = declared.evaluate({ count: "3", big: "true", token: "t" });
  assert.equal(graph.resources.length, 3);
  assert.deepEqual(graph.resources[0]!.props, { text: "xtruet" });
  assert.match(problems(declared)[0]!.reason, /"token" has no value: give one with --var token=VALUE/);
  assert.match(problems(declared, { token: "t", count: "many" })[0]!.reason, /must be a number/);
  assert.match(problems(declared, { token: "t", cuont: 1 })[0]!.reason, /"cuont" is not declared/);
});

Deno.test("evaluate() refuses a bad stack name, bad options, and a tree that is one resource", () => {
  assert.match(problems(stack("no good", () => ({})))[0]!.reason, /Stack name must be/);
  assert.match(
    problems(stack("t", () => ({ a: makeNote("x", { protcet: true } as never) })))[0]!.reason,
    /did you mean "protect"/,
  );
  assert.throws(() => stack("t", () => makeNote("x")).evaluate(), /return an object, as in/);
});

Deno.test("declarations are frozen, and later changes by the caller have no effect", () => {
  const props = { memory: "1GiB" as const, image, env: { A: "1" } };
  const machine = vm(props);
  props.env.A = "2";
  const graph = stack("t", () => ({ machine })).evaluate();
  assert.deepEqual(graph.resources[0]!.props.env, { A: "1" });
  assert.ok(Object.isFrozen(machine));
});

Deno.test("an output refuses to become a string", () => {
  const { id } = makeNote();
  assert.throws(() => `${id}`, /use the text tag/);
  assert.throws(() => JSON.stringify({ id }), /use map/);
  assert.ok(text`${id} and ${secret("x")}` instanceof Output);
});

Deno.test("check() and nested outputs are kept by name", () => {
  const graph = stack("t", () => ({ a: { ok: check(true, "never"), n: [1, 2] } })).evaluate();
  assert.deepEqual([...graph.checks.keys()], ["a.ok"]);
  assert.deepEqual([...graph.outputs.keys()], ["a.n[0]", "a.n[1]"]);
});

Deno.test("evaluate() leaves what the stack's own function throws as it is", () => {
  assert.throws(
    () => stack("t", () => ({ a: (undefined as never as { b: number }).b })).evaluate(),
    TypeError,
  );
});
