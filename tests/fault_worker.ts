/**
 * Plans and applies a stack of five resources, and kills itself at a given boundary:
 * `fault_worker.ts FOLDER first|second|destroy BOUNDARY`. With -1 it runs to its end.
 *
 * @module
 */

import { builtInKinds } from "../cli/built_in.ts";
import { disk, network, stack, vm } from "../dsl/mod.ts";
import { textFile } from "../examples/kind/infra.ts";
import { apply, makePlan, State } from "../planner/mod.ts";
import { debian } from "../stdlib/mod.ts";

const [folder, phase, boundary] = Deno.args as [string, "first" | "second" | "destroy", string];
const isSecond = phase === "second";
const declared = stack("faults", () => {
  const lan = network({ cidr: "10.20.0.0/24" });
  const data = disk({ size: isSecond ? "4MiB" : "8MiB" });
  const runs = vm({
    memory: "96MiB",
    env: { PHASE: isSecond ? "second" : "first" },
    image: debian(),
    nics: { eth0: lan.nic() },
    disks: { data },
  });
  const stands = vm({ memory: "96MiB", image: debian(), power: "stopped", env: { IP: runs.nics.eth0.ip } });
  // It is on nobody's record until it is applied, so what was cut off must be taken over.
  const note = textFile({ path: `${folder}/note`, content: `${phase === "second" ? "new" : "old"}` }, {
    adopt: true,
  });
  return { lan, data, runs, stands, note };
});

let count = 0;
function step(name: string): void {
  if (count++ !== Number(boundary)) return;
  Deno.stdout.writeSync(new TextEncoder().encode(`killed at ${name}\n`));
  Deno.kill(Deno.pid, "SIGKILL");
}

const graph = declared.evaluate();
const kinds = builtInKinds();
kinds.set("text_file", textFile.kind);
using state = await State.open(`${folder}/faults.db`, { stack: "faults", create: true });
using _lock = await state.lock(phase, { timeout: 5000 });
const plan = await makePlan({ graph, state, kinds, mode: phase === "destroy" ? "destroy" : "normal" });
await apply(plan, {
  graph,
  state,
  kinds,
  onBoundary: step,
  onEvent: (event) => event.type === "progress" && step(`${event.address}: ${event.text}`),
});
Deno.stdout.writeSync(new TextEncoder().encode(`${JSON.stringify({ boundaries: count })}\n`));
Deno.exit(0);
