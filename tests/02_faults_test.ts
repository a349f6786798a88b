import assert from "node:assert/strict";
import { identifyProcess, State } from "../planner/mod.ts";
import { canonical } from "../planner/mod.ts";
import { Place, realTest, ROOT } from "./support.ts";

type Phase = "first" | "second" | "destroy";

async function work(place: Place, phase: Phase, boundary = -1): Promise<{ code: number; text: string }> {
  const output = await new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "-A",
      "--no-check",
      `--config=${ROOT}/deno.json`,
      `${ROOT}/tests/fault_worker.ts`,
      place.folder,
      phase,
      String(boundary),
    ],
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
    env: { HYPERTOPIA_HOME: place.home, NO_COLOR: "1" },
  }).output();
  const decoder = new TextDecoder();
  return { code: output.code, text: `${decoder.decode(output.stdout)}${decoder.decode(output.stderr)}` };
}

async function finish(place: Place, phase: Phase, why: string): Promise<number> {
  let { code, text } = await work(place, phase);
  // Nothing here kills QEMU: one that ended abnormally crashed by itself, which emulation does once in a thousand boots.
  for (let again = 0; again < 2 && code !== 0 && text.includes("QEMU ended abnormally"); again++) {
    ({ code, text } = await work(place, phase));
  }
  assert.equal(code, 0, `after "${why}": ${text}`);
  return Number(/"boundaries":(\d+)/.exec(text)?.[1]);
}

/** Everything that an apply leaves, without what differs by chance: identities, times and logs. */
async function world(place: Place): Promise<string> {
  using state = await State.open(`${place.folder}/faults.db`, { stack: "faults", create: false });
  const records = state.records();
  const names = new Map(records.map((record) => [record.id, record.address]));
  const rename = (text: string) =>
    [...names].reduce((whole, [id, address]) => whole.replaceAll(id, `<${address}>`), text);
  const files = (await place.leftovers()).map(rename).filter((path) =>
    !/\.log(\.1)?$|\.sock(\.lock)?$/.test(path)
  ).sort();
  const processes = await Promise.all((await place.processes()).map(async (pid) => {
    const line = await Deno.readTextFile(`/proc/${pid}/cmdline`);
    return rename(line.split("\0").find((word) => word.endsWith("qemu.pid")) ?? "").slice(place.home.length);
  }));
  return canonical({
    records: records.map(({ id: _id, generation: _generation, ...rest }) =>
      JSON.parse(
        rename(JSON.stringify(rest)).replaceAll(place.folder, "<folder>").replaceAll(
          /"generation":\d+/g,
          `"generation":0`,
        ),
      )
    ),
    files,
    processes: processes.sort(),
    note: await Deno.readTextFile(`${place.folder}/note`).catch(() => "absent"),
  });
}

async function requireNothing(place: Place, why: string): Promise<void> {
  assert.deepEqual(await place.processes(), [], `processes are left after "${why}"`);
  assert.deepEqual(await place.leftovers(), [], `files are left after "${why}"`);
  assert.equal(await Deno.stat(`${place.folder}/note`).then(() => true, () => false), false, why);
  using state = await State.open(`${place.folder}/faults.db`, { stack: "faults", create: false });
  assert.deepEqual(state.records(), [], `records are left after "${why}"`);
  assert.ok(identifyProcess() !== undefined);
}

/** Kills at each boundary of a phase in turn, then runs the phase again and compares with an undisturbed one. */
async function killEverywhere(phase: Phase): Promise<number> {
  await using place = new Place();
  const prepare = async () => {
    if (phase !== "first") await finish(place, "first", "preparation");
  };
  await prepare();
  const count = await finish(place, phase, "nothing");
  const wanted = phase === "destroy" ? "" : await world(place);
  if (phase === "destroy") await requireNothing(place, "an undisturbed destroy");
  let killed = 0;
  for (let boundary = 0; boundary < count; boundary++) {
    if (phase !== "destroy") await finish(place, "destroy", "reset");
    await requireNothing(place, "reset");
    await prepare();
    const { code, text } = await work(place, phase, boundary);
    // Timing decides how often progress is shown: a run may end before its last boundaries.
    if (code === 0) continue;
    assert.equal(code, 137, text);
    killed++;
    const why = `${phase}, ${text.trim()}`;
    await finish(place, phase, why);
    if (phase === "destroy") await requireNothing(place, why);
    else assert.equal(await world(place), wanted, why);
  }
  return killed;
}

const QEMU = ["qemu-system-x86_64", "apt-get"];

for (const phase of ["first", "second", "destroy"] as const) {
  realTest(
    `an apply (${phase}) that is killed at any boundary is finished by the next one`,
    QEMU,
    async () => {
      const killed = await killEverywhere(phase);
      assert.ok(killed >= 15, `only ${killed} kills`);
    },
  );
}
