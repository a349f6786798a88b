import assert from "node:assert/strict";
import { hostPaths } from "../vmm/mod.ts";
import { Place, realTest, ROOT } from "./support.ts";

realTest("the example of emulated machines works", ["apt-get"], async () => {
  await using place = new Place();
  await Deno.copyFile(`${ROOT}/examples/emulated/infra.ts`, `${place.folder}/infra.ts`);
  await place.run(["apply", "--yes"]);
  const hello = "Hello from a machine that needs nothing of its host\n";
  assert.equal((await place.run(["exec", "reader", "--", "cat", "/page"])).stdout, hello);
  const port = (await place.run(["output", "port"])).stdout.trim();
  assert.equal(await (await fetch(`http://127.0.0.1:${port}/`)).text(), hello);
  assert.equal((await place.run(["exec", "reader", "--", "hostname"])).stdout, "reader\n");
  await place.run(["plan", "--detailed-exitcode"]);
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.leftovers(), []);
  assert.deepEqual(await place.processes(), []);
});

realTest("apply --cold boots from the beginning and leaves no saved state", ["apt-get"], async () => {
  await using place = new Place();
  await place.declare('{ a: vm({ memory: "64MiB", image: debian(), engine: ht.emulated() }) }');
  // All of the host's cache but its saved states: what is built there takes minutes.
  const { cache } = hostPaths();
  const own = `${place.folder}/cache`;
  await Deno.mkdir(`${own}/states`, { recursive: true });
  await Deno.mkdir(cache, { recursive: true });
  for await (const { name } of Deno.readDir(cache)) {
    if (name !== "states") await Deno.symlink(`${cache}/${name}`, `${own}/${name}`);
  }
  const env = { HYPERTOPIA_CACHE: own };
  await place.run(["apply", "--yes", "--cold"], { env });
  assert.equal((await place.run(["exec", "a", "--", "echo", "up"], { env })).stdout, "up\n");
  assert.deepEqual([...Deno.readDirSync(`${own}/states`)], []);
  await place.run(["destroy", "--yes"], { env });
});
