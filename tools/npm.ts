/**
 * Builds the npm package, and checks that Node can declare and plan with it, and that Deno runs its CLI.
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

/** A program for Deno: it runs the CLI. */
const INFRA = `
import { cli, stack } from "@hypertopia/hypertopia";
await cli(stack("check", () => ({})));
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

/** Libraries that are loaded on demand, with the versions that the lock file pins. */
async function libraries(): Promise<Record<string, string>> {
  const { specifiers } = JSON.parse(await Deno.readTextFile("deno.lock")) as {
    readonly specifiers: Readonly<Record<string, string>>;
  };
  return Object.fromEntries(
    Object.entries(specifiers).flatMap(([specifier, version]) => {
      const [, name] = /^npm:(.+)@/.exec(specifier) ?? [];
      return name === undefined ? [] : [[name, version]];
    }),
  );
}

/** Modules that no other module imports, as they are started as programs and threads. */
const STARTED = [
  "vmm/supervisor/main.js",
  "vmm/emulated/worker.js",
  "vmm/net/user_network_main.js",
  "vmm/xen/keeper_main.js",
];

if (import.meta.main) {
  await Deno.mkdir(OUTPUT, { recursive: true });
  const archive = `${Deno.cwd()}/${OUTPUT}/hypertopia.tgz`;
  await deno(["pack", "--allow-dirty", "--no-source-maps", "--output", archive]);
  const folder = await Deno.makeTempDir();
  try {
    await run("tar", ["-xzf", archive], folder);
    const content = `${folder}/package`;
    // What the modules do not import by name, Deno does not know that the package needs.
    const about = JSON.parse(await Deno.readTextFile(`${content}/package.json`));
    about.optionalDependencies = await libraries();
    await Deno.writeTextFile(`${content}/package.json`, `${JSON.stringify(about, undefined, 2)}\n`);
    // The CLI reads its version there.
    await Deno.writeTextFile(`${content}/deno.json`, `${JSON.stringify({ version: about.version })}\n`);
    for (const module of STARTED) await Deno.stat(`${content}/${module}`);
    await run("tar", ["-czf", archive, "package"], folder);
    await Deno.writeTextFile(`${folder}/package.json`, JSON.stringify({ type: "module", private: true }));
    await Deno.writeTextFile(`${folder}/check.mjs`, CHECK);
    await Deno.mkdir(`${folder}/node_modules/@hypertopia`, { recursive: true });
    await Deno.rename(content, `${folder}/node_modules/@hypertopia/hypertopia`);
    say((await run("node", ["check.mjs"], folder)).trim());
    await Deno.writeTextFile(`${folder}/infra.mjs`, INFRA);
    const version = (await run(Deno.execPath(), ["run", "-A", "infra.mjs", "--version"], folder)).trim();
    say(`"infra.mjs --version" with Deno ${Deno.version.deno}: ${version}`);
    say(`Built ${OUTPUT}/hypertopia.tgz`);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
