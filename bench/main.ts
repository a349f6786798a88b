/**
 * Benchmarks: `deno task bench NAME...` prints one JSON object a line. Where there is a peer, both run in turn, and the
 * ratio is ours over the peer's, of medians.
 *
 * @module
 */

import type { Figure } from "./figure.ts";

const BENCHES: Readonly<Record<string, () => Promise<{ default: () => AsyncIterable<Figure> }>>> = {
  plan: () => import("./plan.ts"),
  start: () => import("./start.ts"),
  overhead: () => import("./overhead.ts"),
  exit: () => import("./exit.ts"),
  boot: () => import("./boot.ts"),
  memory: () => import("./memory.ts"),
  block: () => import("./block.ts"),
  emulated: () => import("./emulated.ts"),
  xen: () => import("./xen.ts"),
};

if (import.meta.main) {
  const names = Deno.args.length > 0 ? Deno.args : Object.keys(BENCHES);
  const encoder = new TextEncoder();
  for (const name of names) {
    const load = BENCHES[name];
    if (!load) {
      Deno.stderr.writeSync(
        encoder.encode(`Unknown benchmark "${name}": there are ${Object.keys(BENCHES).join(", ")}\n`),
      );
      Deno.exit(1);
    }
    for await (const figure of (await load()).default()) {
      Deno.stdout.writeSync(encoder.encode(`${JSON.stringify(figure)}\n`));
    }
  }
}
