import assert from "node:assert/strict";
import { check, secret, type Stack, stack } from "../dsl/mod.ts";
import { type AnyKind, memoryKind, type MemoryWorld } from "../planner/mod.ts";
import type { Io } from "./io.ts";
import { PlannerError } from "../planner/errors.ts";
import { parseInvocation, UsageError } from "./options.ts";
import { run } from "./run.ts";

interface Ended {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

/** A CLI on a temporary folder, with a kind in memory. */
class Bench implements AsyncDisposable {
  readonly world: MemoryWorld = new Map();
  readonly thing = memoryKind(this.world);
  readonly folder = Deno.makeTempDirSync();

  async run(
    declared: Stack | undefined,
    args: readonly string[],
    answer?: string,
    kind: AnyKind = this.thing.kind,
  ): Promise<Ended> {
    let out = "";
    let err = "";
    const io: Io = {
      out: (text) => void (out += text),
      err: (text) => void (err += text),
      isTerminal: false,
      isColoured: false,
      columns: () => 80,
      ask: () => Promise.resolve(answer),
    };
    const code = await run(args, {
      stack: declared,
      program: "infra",
      folder: this.folder,
      io,
      signal: new AbortController().signal,
      options: { kinds: [kind] },
    });
    return { code, out, err };
  }

  async [Symbol.asyncDispose]() {
    await Deno.remove(this.folder, { recursive: true });
  }
}

Deno.test("run() plans, applies, shows and destroys", async () => {
  await using bench = new Bench();
  const declared = stack("t", () => {
    const a = bench.thing({ value: "x" });
    return {
      a,
      b: [bench.thing({ value: a.upper })],
      said: a.upper,
      hidden: secret("s3cr3t"),
      ok: check(false, "never mind"),
    };
  });
  assert.equal((await bench.run(declared, ["plan", "--detailed-exitcode"])).code, 2);
  const applied = await bench.run(declared, ["apply", "-auto-approve"]);
  assert.equal(applied.code, 0, applied.err);
  assert.match(applied.out, /a: Creating\.\.\.\n/);
  assert.match(applied.out, /Apply is complete after .*: 2 created\.\nhidden = \(sensitive\)\nsaid = X\n$/);
  assert.match(applied.err, /Check "ok" does not hold: never mind/);
  assert.equal((await bench.run(declared, ["plan", "--detailed-exitcode"])).code, 0);
  assert.equal((await bench.run(declared, ["state", "list"])).out, "a\nb[0]\n");
  assert.equal((await bench.run(declared, ["output", "said"])).out, "X\n");
  assert.equal((await bench.run(declared, ["output", "hidden"])).out, "s3cr3t\n");
  assert.match((await bench.run(declared, ["output"])).out, /hidden = "\(sensitive\)"/);
  assert.deepEqual(JSON.parse((await bench.run(declared, ["output", "--json"])).out).said, { value: "X" });
  assert.match((await bench.run(declared, ["show", "a"])).out, /# a: memory, ok, id [0-9a-f]{16}\n/);
  assert.equal(
    JSON.parse((await bench.run(declared, ["show", "--json"])).out).values.root_module.resources.length,
    2,
  );
  assert.match((await bench.run(declared, ["graph"])).out, /"b\[0\]" -> "a"/);
  assert.match((await bench.run(declared, ["graph", "--format=mermaid"])).out, /n1 --> n0/);
  assert.match((await bench.run(declared, ["validate"])).out, /is valid: 2 resources/);
  const destroyed = await bench.run(declared, ["destroy", "--yes"]);
  assert.match(destroyed.out, /Destroy is complete after .*: 2 destroyed\.\n$/);
  assert.deepEqual([...Deno.readDirSync(bench.folder)], []);
});

Deno.test("run() asks before it changes anything, and takes only yes", async () => {
  await using bench = new Bench();
  const declared = stack("t", () => ({ a: bench.thing({ value: "x" }) }));
  const refused = await bench.run(declared, ["apply"], "y");
  assert.equal(refused.code, 1);
  assert.match(refused.out, /Nothing was changed/);
  assert.deepEqual([...Deno.readDirSync(bench.folder)], []);
  const nobody = await bench.run(declared, ["apply"]);
  assert.match(nobody.err, /standard input is not a terminal: add --auto-approve/);
  assert.equal((await bench.run(declared, ["apply"], "yes")).code, 0);
  assert.equal(bench.world.size, 1);
});

Deno.test("run() refuses what this host cannot do when it plans, before anybody is asked", async () => {
  await using bench = new Bench();
  const declare = (value: string) =>
    stack("t", () => {
      const base = bench.thing({ value: "base" });
      return { base, a: bench.thing({ value, base: base.id }) };
    });
  const told: string[] = [];
  const kind: AnyKind = {
    ...bench.thing.kind,
    preflight: (instances) => {
      for (const { address, props, references, recorded } of instances) {
        const known = [...references].map(([target, { value }]) => `${target} ${value}`);
        told.push(`${address} ${props.value} (${known}) ${recorded?.upper}`);
      }
      return Promise.reject(new PlannerError("this host has none of it"));
    },
  };
  const file = `${bench.folder}/plan.json`;
  for (const args of [["plan", `--out=${file}`], ["apply"]]) {
    const { code, out, err } = await bench.run(declare("x"), args, undefined, kind);
    assert.deepEqual([code, out, err], [1, "", "Error: this host has none of it\n"]);
  }
  assert.deepEqual([...Deno.readDirSync(bench.folder)], []);
  await bench.run(declare("x"), ["apply", "--yes"]);
  told.length = 0;
  assert.equal((await bench.run(declare("x"), ["plan"], undefined, kind)).code, 0);
  assert.equal((await bench.run(declare("y"), ["plan"], undefined, kind)).code, 1);
  assert.deepEqual(told, ["a y (base base) X"]);
  assert.equal((await bench.run(declare("y"), ["destroy", "--yes"], undefined, kind)).code, 0);
});

Deno.test("run() moves and forgets records", async () => {
  await using bench = new Bench();
  const declare = (name: string) => stack("t", () => ({ [name]: bench.thing({ value: "x" }) }));
  await bench.run(declare("a"), ["apply", "--yes"]);
  assert.equal((await bench.run(declare("a"), ["state", "mv", "a", "z"])).code, 0);
  assert.equal((await bench.run(declare("z"), ["plan", "--detailed-exitcode"])).code, 0);
  assert.match((await bench.run(declare("z"), ["state", "mv", "a", "b"])).err, /Cannot find "a" on record/);
  assert.equal((await bench.run(declare("z"), ["state", "rm", "z"])).code, 0);
  assert.equal(bench.world.size, 1);
});

Deno.test("run() prints OpenTofu's JSON, one object a line", async () => {
  await using bench = new Bench();
  const declared = stack("t", () => ({ a: bench.thing({ value: secret("hidden") }) }));
  const plan = await bench.run(declared, ["plan", "--json"]);
  const types = plan.out.trim().split("\n").map((line) => JSON.parse(line).type);
  assert.deepEqual(types, ["version", "planned_change", "change_summary"]);
  const applied = await bench.run(declared, ["apply", "--json", "--yes"]);
  const lines = applied.out.trim().split("\n").map((line) => JSON.parse(line));
  assert.ok(lines.some((line) => line.type === "apply_complete" && line.hook.resource.addr === "a"));
  assert.ok(!applied.out.includes("hidden"));
  const bad = await bench.run(stack("t", () => ({ a: bench.thing({ value: 1 } as never) })), [
    "plan",
    "--json",
  ]);
  assert.equal(bad.code, 1);
  assert.equal(JSON.parse(bad.out).diagnostic.address, "a");
});

Deno.test("run() reads variables from flags and the environment", async () => {
  await using bench = new Bench();
  const declared = stack("t", { name: "x" }, ({ name }) => ({ a: bench.thing({ value: name }) }));
  assert.match((await bench.run(declared, ["plan", "--var", "name=from-flag"])).out, /from-flag/);
  Deno.env.set("HYPERTOPIA_VAR_name", "from-env");
  try {
    assert.match((await bench.run(declared, ["plan"])).out, /from-env/);
  } finally {
    Deno.env.delete("HYPERTOPIA_VAR_name");
  }
  assert.match(
    (await bench.run(declared, ["plan", "--var", "nope=1"])).err,
    /Variable "nope" is not declared: declared are name/,
  );
});

Deno.test("run() explains what it cannot do", async () => {
  await using bench = new Bench();
  const declared = stack("t", () => ({ a: bench.thing({ value: "x" }) }));
  const cases: [readonly string[], RegExp][] = [
    [["nope"], /Unknown command "nope": commands are plan, apply/],
    [["plan", "--out"], /Option '--out <value>' argument missing|--out/],
    [["plan", "--parallelism=3"], /Flag "--parallelism" does not go with "plan"/],
    [["plan", "--cold"], /Flag "--cold" does not go with "plan"/],
    [["destroy", "--yes", "--cold"], /Flag "--cold" does not go with "destroy"/],
    [["apply", "--yes", "--parallelism=0"], /must be a whole number of at least 1/],
    [["plan", "--max-disruption=total"], /must be one of none, live, hotplug, reboot, recreate/],
    [["plan", "--target=zz"], /has no such resource/],
    [["plan", "--target=a", "--exclude=a"], /exclude each other/],
    [["exec"], /Usage: exec ADDRESS -- COMMAND/],
    [["exec", "a", "--", "true"], /Cannot find the machine "a" on record/],
    [["output", "zz"], /it has no outputs/],
    [["force-unlock", "zz"], /no lock is held/],
    [["show", "zz"], /neither on record nor a plan file/],
    [["cp", "a", "b"], /write ADDRESS:PATH/],
  ];
  for (const [args, pattern] of cases) {
    const { code, err } = await bench.run(declared, args);
    assert.equal(code, 1, args.join(" "));
    assert.match(err, pattern, args.join(" "));
  }
  assert.match((await bench.run(undefined, ["plan"])).err, /needs a stack/);
  const thrown = await bench.run(stack("t", () => ({ a: (null as never as { b: 1 }).b })), ["plan"]);
  assert.match(thrown.err, /^Error: TypeError: .*\(.*run_test\.ts:\d+\)\n$/);
});

Deno.test("parseInvocation() takes flags with one dash or two, and leaves what follows -- alone", () => {
  const { command, words, rest, flags } = parseInvocation([
    "exec",
    "-env=A=1",
    "web",
    "--",
    "ls",
    "-l",
    "--json",
  ]);
  assert.deepEqual([command, words, rest, flags.env], ["exec", ["web"], ["ls", "-l", "--json"], ["A=1"]]);
  assert.throws(() => parseInvocation(["plan", "x"]), UsageError);
});
