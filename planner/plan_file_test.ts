import assert from "node:assert/strict";
import { secret, stack } from "../dsl/mod.ts";
import { makePlan, memoryKind, openPlan, readPlanFile, State, writePlanFile } from "./mod.ts";

Deno.test("readPlanFile() gives back what was written, and refuses anything else", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const thing = memoryKind(new Map());
    const graph = stack("t", () => ({ a: thing({ value: secret("hunter2") }) })).evaluate();
    using state = await State.open(`${folder}/t.db`, { stack: "t", create: false });
    const plan = await makePlan({ graph, state, kinds: new Map() });
    const file = `${folder}/plan`;
    writePlanFile(file, plan, state.secrets);
    const text = await Deno.readTextFile(file);
    assert.ok(!text.includes("hunter2"));
    assert.deepEqual(openPlan(readPlanFile(file), graph, state.secrets), JSON.parse(JSON.stringify(plan)));

    const changed = stack("t", () => ({ a: thing({ value: secret("other") }) })).evaluate();
    assert.throws(
      () => openPlan(readPlanFile(file), changed, state.secrets),
      /stale: the declarations were changed/,
    );
    const other = stack("u", () => ({})).evaluate();
    assert.throws(
      () => openPlan(readPlanFile(file), other, state.secrets),
      /it is for stack "t": current stack is "u"/,
    );
    await Deno.writeTextFile(file, text.slice(0, -20));
    assert.throws(() => readPlanFile(file), /truncated/);
    await Deno.writeTextFile(file, text.replace('"create"', '"delete"'));
    assert.throws(() => readPlanFile(file), /edited/);
    await Deno.writeTextFile(file, text.replace('"format_version":"1.0"', '"format_version":"9.0"'));
    assert.throws(() => readPlanFile(file), /its version is "9.0" and this release reads "1.0"/);
    await Deno.writeTextFile(file, "{}");
    assert.throws(() => readPlanFile(file), /it is not a plan/);
    assert.throws(() => readPlanFile(`${file}.none`), /cannot be read/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
