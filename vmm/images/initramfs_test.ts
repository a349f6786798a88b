import assert from "node:assert/strict";
import { basename } from "node:path";
import { guestModules, modulesInOrder } from "./initramfs.ts";

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

Deno.test("guestModules() tells which modules are for the devices of one hypervisor only", () =>
  withModules(
    {
      ...{ virtio_blk: "virtio", virtio_net: "virtio,shared", virtio: "" },
      ...{ "xen-blkfront": "", "xen-netfront": "shared", shared: "" },
      ...{ ext4: "jbd2", jbd2: "", "9pnet_virtio": "virtio_ring", virtio_ring: "" },
    },
    "",
    async (folder) => {
      const found = async (...more: string[]) =>
        (await guestModules(folder, more)).map(({ file, bus }) => `${basename(file)} ${bus ?? ""}`.trim());
      const onBoth = [
        "shared.ko",
        "virtio_net.ko virtio",
        "xen-blkfront.ko xen",
        "xen-netfront.ko xen",
        "jbd2.ko",
        "ext4.ko",
      ];
      assert.deepEqual(await found(), ["virtio.ko virtio", "virtio_blk.ko virtio", ...onBoth]);
      // What the user names is loaded wherever the guest runs, with all that it needs.
      assert.deepEqual(await found("9pnet_virtio", "virtio_blk"), [
        ...["virtio.ko", "virtio_blk.ko", ...onBoth],
        ...["virtio_ring.ko", "9pnet_virtio.ko"],
      ]);
    },
  ));
