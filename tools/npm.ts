/**
 * Builds the npm package, and checks that Node can declare and plan with it.
 *
 * @module
 */

import { deno, fail, say } from "./task.ts";

const OUTPUT = "npm";

/** A program for Node: it declares a stack and reads its graph and the planner's exports. */
const CHECK = `
import assert from "node:assert/strict";
import { disk, stack } from "@hypertopia/hypertopia/dsl";
import * as planner from "@hypertopia/hypertopia/planner";
const graph = stack("check", () => ({ data: disk({ size: "1GiB" }) })).evaluate();
assert.deepEqual(graph.resources.map((each) => each.address), ["data"]);
const thing = planner.memoryKind(new Map());
const things = stack("things", () => { const a = thing({ value: "x" }); return { a, b: thing({ value: a.upper }) }; }).evaluate();
const state = await planner.State.open("none.db", { stack: "things", create: false });
const plan = await planner.makePlan({ graph: things, state, kinds: new Map() });
assert.deepEqual(plan.changes.map((each) => [each.address, each.action]), [["a", "create"], ["b", "create"]]);
console.log("planned with Node " + process.version);
`;

async function run(program: string, args: readonly string[], cwd: string): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(program, {
    args: [...args],
    cwd,
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).output();
  const decoder = new TextDecoder();
  if (!success) {
    fail(`"${program} ${args.join(" ")}" failed: ${decoder.decode(stdout)}${decoder.decode(stderr)}`);
  }
  return decoder.decode(stdout);
}

if (import.meta.main) {
  await Deno.mkdir(OUTPUT, { recursive: true });
  const archive = `${Deno.cwd()}/${OUTPUT}/hypertopia.tgz`;
  await deno(["pack", "--allow-dirty", "--no-source-maps", "--output", archive]);
  const folder = await Deno.makeTempDir();
  try {
    await Deno.writeTextFile(`${folder}/package.json`, JSON.stringify({ type: "module", private: true }));
    await Deno.writeTextFile(`${folder}/check.mjs`, CHECK);
    await Deno.mkdir(`${folder}/node_modules/@hypertopia/hypertopia`, { recursive: true });
    await run("tar", [
      "-xzf",
      archive,
      "--strip-components=1",
      "-C",
      `${folder}/node_modules/@hypertopia/hypertopia`,
    ], folder);
    say((await run("node", ["check.mjs"], folder)).trim());
    say(`Built ${OUTPUT}/hypertopia.tgz`);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
