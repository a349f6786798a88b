import assert from "node:assert/strict";
import type { BuildContext } from "./builder.ts";
import { runTool, storeEntry, storeKey } from "./store.ts";

async function withCache(
  run: (context: BuildContext, controller: AbortController) => Promise<void>,
): Promise<void> {
  const cache = await Deno.makeTempDir();
  const controller = new AbortController();
  try {
    await run({ cache, signal: controller.signal, report() {} }, controller);
  } finally {
    await Deno.remove(cache, { recursive: true });
  }
}

Deno.test("storeEntry() builds once, also for two at once, and again when a file is damaged", () =>
  withCache(async (context) => {
    let built = 0;
    const get = () =>
      storeEntry(context, "things/a", "a thing", async (folder) => {
        built++;
        await Deno.writeTextFile(`${folder}/file`, "content");
        return { note: "x" };
      });
    const [one, two] = await Promise.all([get(), get()]);
    assert.equal(built, 1);
    assert.equal(one.folder, two.folder);
    assert.deepEqual((await get()).about, { note: "x" });
    await Deno.writeTextFile(`${one.folder}/file`, "CONTENT");
    await get();
    assert.equal(built, 2);
    assert.equal(await Deno.readTextFile(`${one.folder}/file`), "content");
    await Deno.writeTextFile(`${one.folder}/file`, "short");
    await get();
    assert.equal(built, 3);
  }));

Deno.test("storeEntry() leaves nothing of a build that fails or is aborted", () =>
  withCache(async (context, controller) => {
    const fail = storeEntry(context, "things/b", "a thing", async (folder) => {
      await Deno.writeTextFile(`${folder}/file`, "half");
      throw new Error("No space left on device (os error 28)");
    });
    await assert.rejects(fail, /Cannot build a thing as the disk is full/);
    const abort = storeEntry(context, "things/c", "a thing", async (folder) => {
      await Deno.writeTextFile(`${folder}/file`, "half");
      controller.abort(new Error("stopped"));
      return {};
    });
    await assert.rejects(abort, /stopped/);
    assert.deepEqual([...Deno.readDirSync(`${context.cache}/things`)], []);
  }));

Deno.test("runTool() explains a missing program and a failure", () =>
  withCache(async (context) => {
    await assert.rejects(
      runTool("no-such-tool", [], context, { package: "some-package" }),
      /not installed: apt-get install some-package/,
    );
    await assert.rejects(
      runTool("sh", ["-c", "echo 'E: broken' >&2; exit 3"], context, { package: "dash" }),
      /"sh -c" failed with status 3: E: broken/,
    );
    assert.equal(await runTool("echo", ["hi"], context, { package: "coreutils" }), "hi\n");
  }));

Deno.test("storeKey() tells contents apart", () => {
  assert.notEqual(storeKey("a", ["b"]), storeKey("a", "b"));
  assert.equal(storeKey({ a: 1, b: 2 }), storeKey({ b: 2, a: 1 }));
});
