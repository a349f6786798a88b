/**
 * The emulated engine: from `apply` to a guest that answers, from the beginning and from a saved state; what an idle machine
 * costs; and how long its supervisor keeps a client waiting while the guest is busy.
 *
 * @module
 */

import { fileURLToPath } from "node:url";
import { SupervisorClient } from "../vmm/supervisor/client.ts";
import { compared, type Figure, median, rounded } from "./figure.ts";

const ROUNDS = 3;
/** How long an idle machine is watched, in milliseconds. */
const IDLE_TIME = 10_000;
/** How often a supervisor is asked while its guest is busy. */
const ASKED = 100;

const CONFIG = fileURLToPath(new URL("../deno.json", import.meta.url));
const INFRA = `
import { cli, emulated, stack, vm } from "hypertopia";
import { debian } from "hypertopia/stdlib";
const infra = stack("bench", () => ({
  one: vm({ memory: "128MiB", maxMemory: "128MiB", image: debian(), engine: emulated() }),
}));
if (import.meta.main) await cli(infra);
`;

/** A folder with a stack of one machine, whose cache is the user's but for saved states. */
class Bench implements AsyncDisposable {
  readonly folder: string;

  constructor(folder: string) {
    this.folder = folder;
    Deno.writeTextFileSync(`${folder}/infra.ts`, INFRA);
  }

  /** Runs a command; its time in milliseconds. */
  async run(...args: string[]): Promise<number> {
    const start = performance.now();
    const { success, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-check", `--config=${CONFIG}`, `${this.folder}/infra.ts`, ...args],
      cwd: this.folder,
      env: { HYPERTOPIA_HOME: `${this.folder}/home` },
      stdin: "null",
      stdout: "null",
      stderr: "piped",
    }).output();
    if (!success) throw new Error(`"${args.join(" ")}" failed: ${new TextDecoder().decode(stderr)}`);
    return performance.now() - start;
  }

  /** The machine's folder, and the number of the process that runs it. */
  machine(): { readonly folder: string; readonly pid: number } {
    const [{ name }] = [...Deno.readDirSync(`${this.folder}/home/machines`)] as [Deno.DirEntry];
    const folder = `${this.folder}/home/machines/${name}`;
    const { process } = JSON.parse(Deno.readTextFileSync(`${folder}/run.json`)) as {
      process: { pid: number };
    };
    return { folder, pid: process.pid };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.run("destroy", "--yes").catch(() => {});
    await Deno.remove(this.folder, { recursive: true });
  }
}

/** Processor time of a process, in milliseconds (proc(5): ticks of 10 ms). */
function processorTime(pid: number): number {
  const stat = Deno.readTextFileSync(`/proc/${pid}/stat`);
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return 10 * (Number(fields[11]) + Number(fields[12]));
}

/** The figures. */
export default async function* emulated(): AsyncIterable<Figure> {
  await using bench = new Bench(await Deno.makeTempDir({ prefix: "ht-" }));
  const cold: number[] = [];
  const warm: number[] = [];
  for (let round = 0; round <= ROUNDS; round++) {
    const a = await bench.run("apply", "--yes", "--cold");
    await bench.run("destroy", "--yes");
    // The first of a kind leaves the state that later ones go on from; the first round is it, and builds the image.
    const b = await bench.run("apply", "--yes");
    if (round < ROUNDS) await bench.run("destroy", "--yes");
    if (round > 0) [cold.push(a), warm.push(b)];
  }
  yield compared("apply until the guest answers, from a saved state", "ms", warm, "from the beginning", cold);

  const { folder, pid } = bench.machine();
  const before = processorTime(pid);
  await new Promise((resolve) => setTimeout(resolve, IDLE_TIME));
  const idle = (processorTime(pid) - before) / IDLE_TIME;
  yield { name: "processors that an idle machine takes", value: rounded(idle), unit: "1" };
  const status = Deno.readTextFileSync(`/proc/${pid}/status`);
  const resident = Number(/^VmRSS:\s+(\d+)/m.exec(status)![1]) / 1024;
  yield { name: "resident memory with a guest of 128 MiB", value: rounded(resident), unit: "MiB" };

  using client = new SupervisorClient(`${folder}/api.sock`);
  const busy = bench.run("exec", "one", "--", "sh", "-c", "dd if=/dev/zero bs=1M count=200 | md5sum");
  const waits: number[] = [];
  for (let count = 0; count < ASKED; count++) {
    const start = performance.now();
    await client.status();
    waits.push(performance.now() - start);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  await busy;
  yield {
    name: "answer of the supervisor while its guest is busy, median",
    value: rounded(median(waits)),
    unit: "ms",
  };
  yield { name: "the same, longest", value: rounded(Math.max(...waits)), unit: "ms" };
}
