import assert from "node:assert/strict";
import { INIT_SCRIPT } from "./init.ts";

Deno.test("INIT_SCRIPT is a shell script of the initramfs's busybox", async () => {
  if (!INIT_SCRIPT.startsWith("#!/hypertopia/busybox sh\n")) throw new Error("it starts with another line");
  const process = new Deno.Command("sh", { args: ["-n"], stdin: "piped", stdout: "null", stderr: "piped" })
    .spawn();
  const writer = process.stdin.getWriter();
  await writer.write(new TextEncoder().encode(INIT_SCRIPT));
  await writer.close();
  const { success, stderr } = await process.output();
  if (!success) throw new Error(new TextDecoder().decode(stderr));
});

/** Runs functions of the script's in a world of files in a folder; what would load a module prints its name. */
async function runFunctions(names: string[], folder: string, script: string): Promise<string> {
  const functions = names.map((name) => {
    const start = INIT_SCRIPT.indexOf(`\n${name}() {\n`);
    assert(start >= 0, `there is no ${name}()`);
    return INIT_SCRIPT.slice(start, INIT_SCRIPT.indexOf("\n}\n", start) + 3);
  }).join("").replace(/\/(proc|sys|dev|hypertopia)\//g, `${folder}/$1/`).replaceAll("[ -b ", "[ -e ");
  const { stdout, success } = await new Deno.Command("sh", {
    args: ["-c", `insmod() { echo "\${1##*/}"; }\nsleep() { :; }\n${functions}\n${script}`],
  }).output();
  assert(success);
  return new TextDecoder().decode(stdout);
}

async function withFiles(
  files: Record<string, string>,
  run: (folder: string) => Promise<void>,
): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    for (const [path, content] of Object.entries(files)) {
      await Deno.mkdir(`${folder}/${path}`.replace(/[^/]*$/, ""), { recursive: true });
      await Deno.writeTextFile(`${folder}/${path}`, content);
    }
    await run(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("INIT_SCRIPT finds disks by their serial numbers, and those that have none by the command line", () =>
  withFiles({
    "sys/block/vda/serial": "one",
    "proc/cmdline": "quiet hypertopia.disk=one:xvda hypertopia.disk=two:xvdb hypertopia.disk=three:xvdc\n",
    "dev/xvdb": "",
  }, async (folder) => {
    const script =
      'for serial in one two three four; do device= && find_device "serial=$serial" && echo "$device"; done; :';
    assert.equal(
      await runFunctions(["find_disk", "find_device"], folder, script),
      `${folder}/dev/vda\n${folder}/dev/xvdb\n`,
    );
  }));

Deno.test("INIT_SCRIPT loads no modules for devices of another hypervisor", async () => {
  for (const [bus, name] of [["virtio", "virtio.ko"], ["xen", "xen-blkfront.ko"]]) {
    const order = "virtio.ko virtio\nxen-blkfront.ko xen\next4.ko\n";
    await withFiles({ "hypertopia/modules/order": order }, async (folder) => {
      assert.equal(
        await runFunctions(["load_modules"], folder, `bus=${bus}\nload_modules`),
        `${name}\next4.ko\n`,
      );
    });
  }
});
