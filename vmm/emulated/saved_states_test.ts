import assert from "node:assert/strict";
import { SavedStates } from "./saved_states.ts";

Deno.test("SavedStates keep what was of use last, and nothing that was cut off", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const states = new SavedStates(`${folder}/states`);
    const path = (name: string) => `${folder}/states/${name}`;
    await states.use(path("0.state"));
    const old = (name: string, seconds: number) => Deno.utime(path(name), seconds, seconds);
    for (let index = 0; index < 25; index++) {
      await Deno.writeTextFile(path(`${index}.state`), "old");
      await old(`${index}.state`, 1000 + index);
    }
    for (const name of ["a.state.1.part", "b.state.2.part", "other"]) {
      await Deno.writeTextFile(path(name), "");
    }
    await old("a.state.1.part", 1000);
    await states.use(path("0.state"));
    // Nothing was left: nothing is done.
    await states.adopt(`${folder}/saved.state`, path("new.state"));
    assert.equal([...Deno.readDirSync(`${folder}/states`)].length, 28);
    await Deno.writeTextFile(`${folder}/saved.state`, "new");
    await states.adopt(`${folder}/saved.state`, path("new.state"));
    assert.equal(await Deno.readTextFile(path("new.state")), "new");
    assert.equal((await Deno.stat(path("new.state"))).mode! & 0o777, 0o600);
    assert.deepEqual([...Deno.readDirSync(folder)].map(({ name }) => name), ["states"]);
    const names = [...Deno.readDirSync(`${folder}/states`)].map(({ name }) => name).sort();
    const kept = ["0", "new", ...Array.from({ length: 22 }, (_, index) => `${index + 3}`)].map((name) =>
      `${name}.state`
    );
    assert.deepEqual(names, [...kept, "b.state.2.part", "other"].sort());
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
