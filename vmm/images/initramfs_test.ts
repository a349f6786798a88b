import assert from "node:assert/strict";
import { modulesInOrder } from "./initramfs.ts";

async function withModules(
  modules: Record<string, string>,
  builtin: string,
  run: (folder: string) => Promise<void>,
): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await Deno.mkdir(`${folder}/kernel/drivers`, { recursive: true });
    await Deno.writeTextFile(`${folder}/modules.builtin`, builtin);
    for (const [name, depends] of Object.entries(modules)) {
      await Deno.writeTextFile(
        `${folder}/kernel/drivers/${name}.ko`,
        `\x7fELF\0license=GPL\0depends=${depends}\0name=${name}\0`,
      );
    }
    await run(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("modulesInOrder() puts each module after those that it needs", () =>
  withModules({ a: "b-b,c", "b-b": "c", c: "", d: "" }, "kernel/x/builtin-one.ko\n", async (folder) => {
    const order = (await modulesInOrder(folder, ["a", "builtin_one", "gone"], new Set(["gone"]))).map((
      path,
    ) => path.split("/").pop());
    assert.deepEqual(order, ["c.ko", "b-b.ko", "a.ko"]);
  }));

Deno.test("modulesInOrder() names a module that is missing, and who needs it", () =>
  withModules({ a: "lost" }, "", async (folder) => {
    await assert.rejects(modulesInOrder(folder, ["a"]), /Cannot find kernel module "lost", which "a" needs/);
    await assert.rejects(modulesInOrder(folder, ["nope"]), /Cannot find kernel module "nope" in/);
  }));
