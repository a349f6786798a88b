/**
 * Planning: time and memory for stacks of many resources in memory.
 *
 * @module
 */

import { range, stack } from "../dsl/mod.ts";
import { apply, hasChanges, makePlan, memoryKind, State } from "../planner/mod.ts";
import { type Figure, median, rounded } from "./figure.ts";

/** OpenTofu's own benchmark has two kinds of 2,500 correlated instances. */
const CORRELATED = 2500;

function flat(count: number, thing: ReturnType<typeof memoryKind>) {
  return stack(
    "bench",
    () => ({ all: range(count).map((index) => thing({ value: `value ${index}`, size: index })) }),
  );
}

function correlated(thing: ReturnType<typeof memoryKind>) {
  return stack("bench", () => {
    const a = range(CORRELATED).map((index) => thing({ value: `a ${index}` }));
    return { a, b: a.map((each) => thing({ value: each.upper })) };
  });
}

async function round(
  declared: ReturnType<typeof flat>,
  path: string,
  isApplied: boolean,
): Promise<{ milliseconds: number; changes: boolean }> {
  const start = performance.now();
  const graph = declared.evaluate();
  using state = await State.open(path, { stack: "bench", create: true });
  using _lock = await state.lock("bench");
  const plan = await makePlan({ graph, state, kinds: new Map() });
  if (isApplied) await apply(plan, { graph, state, kinds: new Map(), parallelism: 1000 });
  return { milliseconds: performance.now() - start, changes: hasChanges(plan) };
}

/** Measures in a process of its own, so that its peak memory is its own. */
async function* measure(): AsyncIterable<Figure> {
  const count = Number(Deno.args[1]);
  const folder = await Deno.makeTempDir();
  try {
    const thing = memoryKind(new Map());
    const name = Deno.args[2]!;
    const declared = name === "flat" ? flat(count, thing) : correlated(thing);
    const label = name === "flat" ? `${count} resources` : `2 x ${CORRELATED} correlated resources`;
    const first = await round(declared, `${folder}/bench.db`, true);
    yield { name: `plan and apply ${label}`, value: rounded(first.milliseconds), unit: "ms" };
    const times: number[] = [];
    for (let index = 0; index < 5; index++) {
      const { milliseconds, changes } = await round(declared, `${folder}/bench.db`, false);
      if (changes) throw new Error("The plan of an unchanged stack is not empty");
      times.push(milliseconds);
    }
    yield { name: `plan unchanged ${label}`, value: rounded(median(times)), unit: "ms" };
    const peak = /VmHWM:\s+(\d+)/.exec(await Deno.readTextFile("/proc/self/status"))?.[1];
    yield { name: `peak memory for ${label}`, value: rounded(Number(peak) / 1024), unit: "MiB" };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** The figures. */
export default async function* plan(): AsyncIterable<Figure> {
  for (const [count, name] of [[1000, "flat"], [2 * CORRELATED, "correlated"], [50_000, "flat"]] as const) {
    const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-check", import.meta.filename!, "measure", String(count), name],
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).output();
    if (!success) throw new Error(new TextDecoder().decode(stderr));
    for (const line of new TextDecoder().decode(stdout).trim().split("\n")) yield JSON.parse(line) as Figure;
  }
}

if (import.meta.main && Deno.args[0] === "measure") {
  for await (const figure of measure()) {
    Deno.stdout.writeSync(new TextEncoder().encode(`${JSON.stringify(figure)}\n`));
  }
}
