/**
 * The initramfs that every guest of ours boots from: busybox, init, agent and the kernel modules that they need.
 *
 * @module
 */

import { basename, join } from "node:path";
import { MachineError } from "../errors.ts";
import { writeWhole } from "../files.ts";
import { AGENT_SCRIPT } from "../guest/agent.ts";
import { INIT_SCRIPT } from "../guest/init.ts";
import type { BuildContext, BuiltKernel } from "./builder.ts";
import { cpioArchive, type CpioEntry } from "./cpio.ts";
import { runTool, sha256, storeEntry, storeKey } from "./store.ts";

/** Modules that every guest loads, where the kernel does not have them built in. */
export const GUEST_MODULES: readonly string[] = [
  "virtio_pci",
  "virtio_console",
  "virtio_blk",
  "virtio_net",
  "virtio_balloon",
  "virtio_rng",
  // ext4 asks the kernel for it by what it does, not by its name.
  "crc32c_generic",
  "ext4",
];

/**
 * Builds the initramfs of a kernel, or finds it in the cache.
 *
 * @param kernel The kernel
 * @param busybox Path of a static busybox
 * @param modules Modules to load beside {@linkcode GUEST_MODULES}
 * @param context Cache, signal and progress
 * @returns Path of the archive
 */
export async function buildInitramfs(
  kernel: BuiltKernel,
  busybox: string,
  modules: readonly string[],
  context: BuildContext,
): Promise<string> {
  const wanted = [...GUEST_MODULES, ...modules];
  const key = storeKey("initramfs", kernel.key, await sha256(busybox), wanted, INIT_SCRIPT, AGENT_SCRIPT);
  const { folder } = await storeEntry(context, `initramfs/${key}`, "the initramfs", async (part) => {
    context.report("building the initramfs");
    const encoder = new TextEncoder();
    const entries: CpioEntry[] = [
      { path: "/init", mode: 0o755, content: encoder.encode(INIT_SCRIPT) },
      { path: "/hypertopia/busybox", mode: 0o755, content: await Deno.readFile(busybox) },
      { path: "/hypertopia/agent", mode: 0o755, content: encoder.encode(AGENT_SCRIPT) },
      { path: "/dev/console", mode: 0o600, device: { type: "character", major: 5, minor: 1 } },
    ];
    const order: string[] = [];
    if (kernel.modules !== undefined) {
      const optional = new Set(GUEST_MODULES);
      for (const file of await modulesInOrder(kernel.modules, wanted, optional)) {
        const name = basename(file).replace(/\.(xz|zst|gz)$/, "");
        entries.push({
          path: `/hypertopia/modules/${name}`,
          mode: 0o644,
          content: await readModule(file, context),
        });
        order.push(name);
      }
    }
    entries.push({
      path: "/hypertopia/modules/order",
      mode: 0o644,
      content: encoder.encode(order.map((name) => `${name}\n`).join("")),
    });
    await writeWhole(join(part, "initramfs.cpio"), cpioArchive(entries), 0o644);
    return { modules: order };
  });
  return join(folder, "initramfs.cpio");
}

/** A module's name as the kernel spells it: with underscores. */
function moduleName(path: string): string {
  return basename(path).replace(/\.ko(\.(xz|zst|gz))?$/, "").replaceAll("-", "_");
}

/**
 * Orders modules so that each follows those that it needs.
 *
 * @param folder Folder of a kernel's modules
 * @param wanted Names of the modules
 * @param optional Names that may be missing, as they may be built in
 * @returns Paths of the module files
 * @throws {MachineError} If a module is neither there nor built in
 */
export async function modulesInOrder(
  folder: string,
  wanted: readonly string[],
  optional: ReadonlySet<string> = new Set(),
): Promise<string[]> {
  const files = new Map<string, string>();
  const walk = async (path: string) => {
    for await (const entry of Deno.readDir(path)) {
      const full = join(path, entry.name);
      if (entry.isDirectory) await walk(full);
      else if (/\.ko(\.(xz|zst|gz))?$/.test(entry.name)) files.set(moduleName(entry.name), full);
    }
  };
  await walk(folder);
  const builtin = new Set(
    (await Deno.readTextFile(join(folder, "modules.builtin")).catch(() => "")).split("\n").map(moduleName),
  );
  const result: string[] = [];
  const done = new Set<string>();
  const add = async (name: string, neededBy: string | undefined) => {
    const spelled = name.replaceAll("-", "_");
    if (done.has(spelled) || builtin.has(spelled)) return;
    const file = files.get(spelled);
    if (!file) {
      if (neededBy === undefined && optional.has(name)) return;
      throw new MachineError(
        `Cannot find kernel module "${name}"${
          neededBy ? `, which "${neededBy}" needs,` : ""
        } in "${folder}": ` +
          `take it out of modules, or choose a kernel flavour that has it`,
      );
    }
    done.add(spelled);
    for (const each of await moduleDependencies(file)) await add(each, name);
    result.push(file);
  };
  for (const name of wanted) await add(name, undefined);
  return result;
}

/** Reads what a module itself says that it needs, in its `.modinfo` section: depmod may not have run. */
async function moduleDependencies(file: string): Promise<string[]> {
  const bytes = await readModule(file);
  // Latin-1 keeps each byte a character.
  const match = /\0depends=([\w,-]*)\0/.exec(new TextDecoder("latin1").decode(bytes));
  return (match?.[1] ?? "").split(",").filter((name) => name !== "");
}

async function readModule(file: string, context?: BuildContext): Promise<Uint8Array> {
  if (file.endsWith(".ko")) return await Deno.readFile(file);
  const [program, name] = file.endsWith(".xz")
    ? ["xz", "xz-utils"]
    : file.endsWith(".zst")
    ? ["zstd", "zstd"]
    : ["gzip", "gzip"];
  const part = `${await Deno.makeTempFile()}`;
  try {
    const signal = context?.signal ?? new AbortController().signal;
    await runTool("sh", ["-c", `exec ${program} -dc -- "$0" >"$1"`, file, part], {
      cache: "",
      signal,
      report() {},
    }, { package: name });
    return await Deno.readFile(part);
  } finally {
    await Deno.remove(part);
  }
}
