import assert from "node:assert/strict";
import { dirname } from "node:path";
import type { Chosen } from "../dsl/mod.ts";
import type { BuildContext } from "../vmm/images/builder.ts";
import { directoryBuilder } from "./directory.ts";

const CONTEXT: BuildContext = { cache: "/nowhere", signal: new AbortController().signal, report() {} };
/** What programs for processors of 32 and of 64 bits begin with. */
const [NARROW, WIDE] = [1, 2].map((elfClass) => new Uint8Array([0x7f, 0x45, 0x4c, 0x46, elfClass, 1, 1, 0]));

type Content = Uint8Array | string | { readonly link: string };

/** Makes a directory of programs and links, and gives its recipe. */
async function withRoot(
  files: Readonly<Record<string, Content | undefined>>,
  work: (recipe: Chosen, root: string) => Promise<void>,
  init = "/sbin/init",
): Promise<void> {
  const root = await Deno.makeTempDir();
  try {
    for (const [name, content] of Object.entries(files)) {
      const path = `${root}${name}`;
      await Deno.mkdir(dirname(path), { recursive: true });
      if (content instanceof Uint8Array) await Deno.writeFile(path, content, { mode: 0o755 });
      else if (typeof content === "string") await Deno.writeTextFile(path, content, { mode: 0o755 });
      else if (content) await Deno.symlink(content.link, path);
    }
    await work({ type: "directory", path: root, init }, root);
  } finally {
    await Deno.remove(root, { recursive: true });
  }
}

Deno.test("a directory without a program to boot is refused by its fingerprint as by its build", async () => {
  const cases: readonly [files: Record<string, Content | undefined>, reason: string][] = [
    [{ "/bin/sh": NARROW }, 'it has no "/sbin/init"'],
    [{ "/sbin/init/file": NARROW }, 'it has no "/sbin/init"'],
    [{ "/sbin": NARROW }, 'it has no "/sbin/init"'],
    // The host has what these would lead to outside of the directory.
    [{ "/sbin/init": { link: Deno.execPath() } }, 'it has no "/sbin/init"'],
    [{ "/sbin/init": { link: `../../../../../../../..${Deno.execPath()}` } }, 'it has no "/sbin/init"'],
    [{ "/sbin/init": { link: "init" } }, 'it has no "/sbin/init"'],
    [{ "/sbin/init": "#!/bin/sh\n" }, 'it has no "/bin/sh", which its init "/sbin/init" is run by'],
    [
      { "/sbin/init": "#!/sbin/init\n" },
      'its init "/sbin/init" is run by a script that is run by a script, and so on',
    ],
  ];
  for (const [files, reason] of cases) {
    await withRoot(files, async (recipe, root) => {
      const expected = {
        name: "MachineError",
        message:
          `Cannot boot the directory "${root}" as ${reason}: name its init with directory(path, { init })`,
      };
      await assert.rejects(directoryBuilder.fingerprint!(recipe, CONTEXT), expected);
      await assert.rejects(directoryBuilder.is64Bit!(recipe), expected);
      await assert.rejects(directoryBuilder.build(recipe, CONTEXT), expected);
    });
  }
  await withRoot({ "/sbin/init": NARROW }, async (recipe, root) => {
    await Deno.chmod(`${root}/sbin/init`, 0o644);
    await assert.rejects(directoryBuilder.fingerprint!(recipe, CONTEXT), /nobody may execute "\/sbin\/init"/);
    await assert.rejects(
      directoryBuilder.fingerprint!({ ...recipe, path: `${root}/none` }, CONTEXT),
      /^MachineError: Cannot read the directory /,
    );
  });
});

Deno.test("whether a directory takes a 64-bit processor is told by the program that runs as its init", async () => {
  const cases: readonly [files: Record<string, Content | undefined>, is64Bit: boolean][] = [
    [{ "/sbin/init": WIDE }, true],
    [{ "/sbin/init": NARROW }, false],
    // As systemd has it, on a system whose folders are merged.
    [{
      "/usr/lib/systemd/systemd": WIDE,
      "/usr/sbin/init": { link: "/lib/systemd/systemd" },
      "/sbin": { link: "usr/sbin" },
      "/lib": { link: "/usr/lib" },
    }, true],
    // The root has nothing above it.
    [{ "/sbin/init": { link: "../../../bin/./busybox" }, "/bin/busybox": NARROW }, false],
    [{ "/sbin/init": "#! /bin/sh -e\n", "/bin/sh": { link: "busybox" }, "/bin/busybox": WIDE }, true],
    [{ "/sbin/init": "#!/bin/run\n", "/bin/run": "#!bin/sh", "/bin/sh": WIDE }, true],
    [{ "/sbin/init": "#!/bin/sh\n", "/bin/sh": NARROW, "/bin/other": WIDE }, false],
    [{ "/sbin/init": "" }, false],
  ];
  for (const [index, [files, is64Bit]] of cases.entries()) {
    await withRoot(files, async (recipe) => {
      assert.equal(await directoryBuilder.is64Bit!(recipe), is64Bit, `case ${index}`);
      await directoryBuilder.fingerprint!(recipe, CONTEXT);
    });
  }
  await withRoot({ "/sbin/init": NARROW, "/bin/sh": WIDE }, async (recipe) => {
    assert.equal(await directoryBuilder.is64Bit!(recipe), true);
  }, "/bin/sh");
});

Deno.test("the fingerprint of a directory follows the files in it", () =>
  withRoot({ "/sbin/init": NARROW }, async (recipe, root) => {
    const fingerprint = () => directoryBuilder.fingerprint!(recipe, CONTEXT);
    const first = await fingerprint();
    assert.equal(await fingerprint(), first);
    await Deno.writeTextFile(`${root}/new`, "new");
    assert.notEqual(await fingerprint(), first);
    await Deno.remove(`${root}/new`);
    assert.equal(await fingerprint(), first);
  }));
