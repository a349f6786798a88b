import assert from "node:assert/strict";
import type { Chosen } from "../dsl/mod.ts";
import type { BuildContext } from "../vmm/images/builder.ts";
import { emptyQcow2 } from "../vmm/images/qcow2.ts";
import { sha256 } from "../vmm/images/store.ts";
import { imageBuilder } from "./image.ts";

const URL = "http://127.0.0.1:1/disk";
const ZEROS = "0".repeat(64);
const CAPACITY = 2 ** 20;

/** A folder with one file of each sort. */
async function withFiles(work: (folder: string, context: BuildContext) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await Deno.writeFile(`${folder}/disk.raw`, new Uint8Array(8192));
    await Deno.writeFile(`${folder}/disk.qcow2`, emptyQcow2(CAPACITY));
    await Deno.writeFile(`${folder}/cut.qcow2`, emptyQcow2(CAPACITY).subarray(0, 20));
    await Deno.writeFile(`${folder}/empty`, new Uint8Array());
    await Deno.writeTextFile(`${folder}/kernel`, "a kernel");
    await Deno.mkdir(`${folder}/folder`);
    await work(folder, { cache: `${folder}/cache`, signal: new AbortController().signal, report() {} });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** A recipe as the schema completes it. */
function recipe(options: object): Chosen {
  return { type: "image", format: "qcow2", ...options };
}

Deno.test("what is plainly wrong with an image is refused before its build as by it, in the same words", () =>
  withFiles(async (folder, context) => {
    const kernel = { path: `${folder}/kernel` };
    const cases: readonly [options: object, message: string | RegExp][] = [
      [{}, "Cannot build an image without a disk and without a kernel: give one"],
      [{ initramfs: kernel }, "Cannot build an image without a disk and without a kernel: give one"],
      [{ disk: {} }, 'Cannot find a file of an image: give "path", or "url" and "sha256"'],
      [{ disk: { url: URL } }, `Cannot download "${URL}" without its checksum: give sha256`],
      ...["disk", "kernel", "initramfs"].map((name): [object, string] => [
        // A checksum does not bring a file back.
        { kernel, [name]: { path: `${folder}/none`, sha256: ZEROS } },
        `Cannot use the image file "${folder}/none" as it does not exist: correct its path`,
      ]),
      [
        { kernel: { path: `${folder}/folder` } },
        `Cannot use the image file "${folder}/folder" as it is not a regular file: correct its path`,
      ],
      [{ kernel: { path: `${folder}/kernel/none` } }, /^Cannot use the image file .* as Not a directory/],
      [
        { disk: { path: `${folder}/disk.raw` } },
        `Cannot use "${folder}/disk.raw" as a qcow2 image as it is not one: set format to "raw"`,
      ],
      ...["cut.qcow2", "empty"].map((name): [object, string] => [
        { disk: { path: `${folder}/${name}` }, format: name === "empty" ? "raw" : "qcow2" },
        `Cannot use "${folder}/${name}" as a disk as its capacity is 0 bytes: give the image of a disk`,
      ]),
    ];
    for (const [options, message] of cases) {
      await assert.rejects(imageBuilder.check!(recipe(options)), { name: "MachineError", message });
      await assert.rejects(imageBuilder.build(recipe(options), context), { name: "MachineError", message });
    }
  }));

Deno.test("the fingerprint of an image follows its local files, and only those without a checksum", () =>
  withFiles(async (folder, context) => {
    const path = `${folder}/disk.raw`;
    const fingerprint = (options: object) => imageBuilder.fingerprint!(recipe(options), context);
    const local = { disk: { path }, format: "raw" };
    const download = { url: URL, sha256: ZEROS };
    const first = await fingerprint(local);
    assert.match(first ?? "", /^[0-9a-f]{20}$/);
    assert.equal(await fingerprint(local), first);
    // Reading is no change.
    await Deno.readFile(path);
    assert.equal(await fingerprint({ ...local, kernel: download }), first);

    await Deno.utime(path, new Date(0), new Date(1000));
    const touched = await fingerprint(local);
    assert.notEqual(touched, first);
    await Deno.truncate(path, 4096);
    await Deno.utime(path, new Date(0), new Date(1000));
    const shorter = await fingerprint(local);
    assert.notEqual(shorter, touched);
    assert.notEqual(await fingerprint({ ...local, initramfs: { path: `${folder}/kernel` } }), shorter);

    // Their recipe tells their content, and nothing is read to compare it.
    assert.equal(await fingerprint({ kernel: download }), undefined);
    const known = { disk: { path, sha256: ZEROS }, format: "raw", kernel: download };
    assert.equal(await fingerprint(known), undefined);
    await Deno.remove(path);
    assert.equal(await fingerprint(known), undefined);
    await assert.rejects(fingerprint(local), /it does not exist/);
  }));

Deno.test("an image of local files is built where they are", () =>
  withFiles(async (folder, context) => {
    const [disk, kernel] = [`${folder}/disk.qcow2`, `${folder}/kernel`];
    const options = {
      disk: { path: disk, sha256: await sha256(disk) },
      kernel: { path: kernel },
      cmdline: "quiet",
    };
    const built = await imageBuilder.build(recipe(options), context);
    assert.deepEqual(built.root, { path: disk, format: "qcow2", size: CAPACITY });
    assert.deepEqual([built.kernel?.kernel, built.initramfs, built.cmdline], [kernel, "", "quiet"]);
    const raw = await imageBuilder.build(
      recipe({ disk: { path: `${folder}/disk.raw` }, format: "raw" }),
      context,
    );
    assert.deepEqual([raw.root?.size, raw.kernel], [8192, undefined]);
    assert.notEqual(raw.key, built.key);
    await assert.rejects(
      imageBuilder.build(recipe({ ...options, disk: { path: disk, sha256: ZEROS } }), context),
      /its checksum is wrong: 0+ is wanted and [0-9a-f]{64} was found/,
    );
  }));
