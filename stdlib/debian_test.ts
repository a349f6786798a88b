import assert from "node:assert/strict";
import type { Chosen, ImageSource, KernelSource } from "../dsl/mod.ts";
import type { BuildContext } from "../vmm/images/builder.ts";
import { debian, debianBuilder, debianBusybox, debianKernel, debianKernelBuilder } from "./debian.ts";
import { deb, makeKey, TestMirror } from "./test_archive.ts";

const RECIPE: Chosen = { type: "debian", suite: "bookworm", flavour: "cloud" };

/** A cache that has entries already. */
async function withCache(
  entries: readonly string[],
  work: (context: BuildContext) => Promise<void>,
): Promise<void> {
  const cache = await Deno.makeTempDir();
  try {
    for (const entry of entries) {
      await Deno.mkdir(`${cache}/${entry}`, { recursive: true });
      await Deno.writeTextFile(
        `${cache}/${entry}/manifest.json`,
        JSON.stringify({ version: 1, files: {}, about: { release: "6.1" } }),
      );
    }
    await work({ cache, signal: new AbortController().signal, report() {} });
  } finally {
    await Deno.remove(cache, { recursive: true });
  }
}

Deno.test("debian() takes an architecture, and adds none by itself", () => {
  const problems: string[] = [];
  const normal = ({ schema, options }: ImageSource | KernelSource) =>
    schema.check(options, "image", (field, problem) => problems.push(`${field}: ${problem}`));
  assert.deepEqual(normal(debian()), { suite: "bookworm", flavour: "cloud" });
  assert.deepEqual(normal(debian({ arch: "i386" })), { suite: "bookworm", flavour: "cloud", arch: "i386" });
  assert.deepEqual(normal(debianKernel({ arch: "amd64", flavour: "generic" })), {
    suite: "bookworm",
    flavour: "generic",
    arch: "amd64",
  });
  assert.deepEqual(problems, []);
  normal(debian({ arch: "arm64" as "i386" }));
  assert.match(problems.join(), /^image\.arch: /);
});

Deno.test("debianBuilder finds what was cached for amd64 before there were other architectures", async () => {
  const entries = [
    "kernels/da6768603b7753b4d241",
    "kernels/072ea156635966d43d18",
    "busybox/b1f823013fcc07a3c823",
  ];
  await withCache(entries, async (context) => {
    for (const each of [RECIPE, { ...RECIPE, arch: "amd64" }]) {
      const image = await debianBuilder.build(each, context);
      assert.equal(image.kernel?.kernel, `${context.cache}/kernels/da6768603b7753b4d241/vmlinuz`);
      assert.equal(image.busybox, `${context.cache}/busybox/b1f823013fcc07a3c823/busybox`);
    }
    const generic = await debianKernelBuilder.build({ ...RECIPE, flavour: "generic" }, context);
    assert.equal(generic.key, "072ea156635966d43d18-6.1");
    // The recipe's word counts more than the engine's.
    const told = await debianKernelBuilder.build({ ...RECIPE, arch: "amd64" }, { ...context, arch: "i386" });
    assert.equal(told.key, "da6768603b7753b4d241-6.1");
  });
});

Deno.test("debianBuilder builds for i386 where the recipe or the engine says so, without apt", async () => {
  const folder = await Deno.makeTempDir();
  try {
    await using mirror = new TestMirror();
    const key = await makeKey();
    await Deno.writeFile(`${folder}/keyring`, key.publicKey.write());
    const release = "6.1.0-9-686";
    await mirror.publish([
      { name: "linux-image-686", depends: `linux-image-${release} (= 6.1)` },
      {
        name: `linux-image-${release}`,
        file: deb([
          { name: `./boot/vmlinuz-${release}`, content: "kernel" },
          { name: `./lib/modules/${release}/kernel/fs/ext4.ko`, content: "module" },
        ]),
      },
      {
        name: "busybox-static",
        file: deb([{ name: "./bin/busybox", content: "busybox", mode: 0o755 }], "zst"),
      },
      {
        name: "seabios",
        file: deb([
          { name: "./usr/share/seabios/bios.bin", content: "bios" },
          { name: "./usr/share/seabios/vgabios-stdvga.bin", content: "vga" },
        ], "gz"),
      },
    ], key);
    const run = async (
      recipe: Chosen,
      arch: string | undefined,
    ): Promise<{ code: number; stdout: string; said: string }> => {
      const code = `
        import { debianBuilder, debianSeabios } from ${JSON.stringify(import.meta.resolve("./debian.ts"))};
        const context = {
          cache: ${JSON.stringify(`${folder}/cache`)},
          signal: new AbortController().signal,
          report() {},
          arch: ${JSON.stringify(arch)},
        };
        const recipe = ${JSON.stringify(recipe)};
        const image = await debianBuilder.build(recipe, context);
        console.log(JSON.stringify({ image, firmware: await debianSeabios(context, recipe) }));`;
      // A PATH of its own: this host may have apt.
      const output = await new Deno.Command(Deno.execPath(), {
        args: ["eval", "--no-check", code],
        env: { PATH: folder, NO_COLOR: "1" },
      }).output();
      const decoder = new TextDecoder();
      const stdout = decoder.decode(output.stdout);
      return { code: output.code, stdout, said: stdout + decoder.decode(output.stderr) };
    };
    const recipe = {
      type: "debian",
      suite: "test",
      flavour: "cloud",
      mirror: mirror.url,
      keyring: `${folder}/keyring`,
    };
    const { code, stdout, said } = await run(recipe, "i386");
    assert.equal(code, 0, said);
    const { image, firmware } = JSON.parse(stdout);
    assert.equal(await Deno.readTextFile(image.kernel.kernel), "kernel");
    assert.equal(await Deno.readTextFile(`${image.kernel.modules}/kernel/fs/ext4.ko`), "module");
    assert.equal(await Deno.readTextFile(image.busybox), "busybox");
    assert.equal(await Deno.readTextFile(firmware.bios), "bios");
    assert.equal(await Deno.readTextFile(firmware.vgaBios), "vga");
    // Another run finds all of it.
    mirror.requests.length = 0;
    assert.equal((await run({ ...recipe, arch: "i386" }, undefined)).stdout, stdout);
    assert.deepEqual(mirror.requests, []);

    assert.match((await run(recipe, undefined)).said, /InRelease" as it has no packages for amd64/);
    assert.match(
      (await run({ ...recipe, packages: ["nginx"] }, "i386")).said,
      /Cannot build a full Debian as this host has no apt-get: use a Debian host with apt-get and mmdebstrap/,
    );
    await using without = new TestMirror();
    await without.publish([{ name: "other" }], key);
    assert.match(
      (await run({ ...recipe, mirror: without.url }, "i386")).said,
      /what the package "linux-image-686" stands for in "test": check the suite; the last with kernels for i386/,
    );
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("debianBusybox keeps architectures apart", async () => {
  await withCache(["busybox/b1f823013fcc07a3c823"], async (context) => {
    assert.match(await debianBusybox(RECIPE, context), /b1f823013fcc07a3c823\/busybox$/);
    const aborted = { ...context, arch: "i386" as const, signal: AbortSignal.abort(new Error("not there")) };
    await assert.rejects(debianBusybox(RECIPE, aborted), /not there/);
  });
});
