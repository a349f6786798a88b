/**
 * Start: from the start of the process to its first output.
 *
 * @module
 */

import { compared, type Figure } from "./figure.ts";

const ROUNDS = 15;

async function firstOutput(args: readonly string[], home: string): Promise<number> {
  const start = performance.now();
  const child = new Deno.Command(Deno.execPath(), {
    args: [...args],
    stdin: "null",
    stdout: "piped",
    stderr: "null",
    env: { HYPERTOPIA_HOME: home },
  }).spawn();
  const reader = child.stdout.getReader();
  await reader.read();
  const elapsed = performance.now() - start;
  while (!(await reader.read()).done);
  await child.status;
  return elapsed;
}

/** The figures. */
export default async function* start(): AsyncIterable<Figure> {
  const folder = await Deno.makeTempDir();
  try {
    const infra = new URL("../examples/quickstart/infra.ts", import.meta.url).pathname;
    await Deno.writeTextFile(`${folder}/hello.ts`, 'console.log("hello");');
    const peer = ["run", "-A", `${folder}/hello.ts`];
    const commands = {
      help: ["--help"],
      validate: ["validate"],
      plan: ["plan", `--state=${folder}/none.db`],
    };
    for (const [name, args] of Object.entries(commands)) {
      const ours: number[] = [];
      const theirs: number[] = [];
      for (let round = 0; round <= ROUNDS; round++) {
        const a = await firstOutput(["run", "-A", infra, ...args], folder);
        const b = await firstOutput(peer, folder);
        // The first round fills caches.
        if (round > 0) [ours.push(a), theirs.push(b)];
      }
      yield compared(`first output of ${name}`, "ms", ours, "a Deno program that prints one line", theirs);
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
