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

/** Modules that guests load for their devices, by the bus these are on. Guests of Xen load none for the other, and vice versa. */
const BUS_MODULES = {
  virtio: ["virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_rng"],
  // The rest of what a guest of Xen takes is a part of the kernel.
  xen: ["xen_blkfront", "xen_netfront"],
} as const;
/** Modules that guests load wherever they run. */
const OTHER_MODULES = [
  // ext4 asks the kernel for it by what it does, not by its name.
  "crc32c_generic",
  "ext4",
] as const;

/** What the kernel runs when its host asks it to shut down or to restart, as Xen's toolstacks do. */
const KERNEL_PROGRAMS = ["/sbin/poweroff", "/sbin/reboot"];

/** Modules that guests load, where the kernel has them and does not have them built in. */
export const GUEST_MODULES: readonly string[] = [
  ...BUS_MODULES.virtio,
  ...BUS_MODULES.xen,
  ...OTHER_MODULES,
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
  const key = storeKey(
    "initramfs",
    kernel.key,
    await sha256(busybox),
    [...GUEST_MODULES, ...modules],
    INIT_SCRIPT,
    AGENT_SCRIPT,
    KERNEL_PROGRAMS,
  );
  const { folder } = await storeEntry(context, `initramfs/${key}`, "the initramfs", async (part) => {
    context.report("building the initramfs");
    const encoder = new TextEncoder();
    const entries: CpioEntry[] = [
      { path: "/init", mode: 0o755, content: encoder.encode(INIT_SCRIPT) },
      { path: "/hypertopia/busybox", mode: 0o755, content: await Deno.readFile(busybox) },
      { path: "/hypertopia/agent", mode: 0o755, content: encoder.encode(AGENT_SCRIPT) },
      { path: "/dev/console", mode: 0o600, device: { type: "character", major: 5, minor: 1 } },
      ...KERNEL_PROGRAMS.map((path) => ({ path, mode: 0o777, link: "/hypertopia/busybox" })),
    ];
    const all = kernel.modules === undefined ? [] : await guestModules(kernel.modules, modules);
    const names: string[] = [];
    let order = "";
    for (const { file, bus } of all) {
      const name = basename(file).replace(/\.(xz|zst|gz)$/, "");
      entries.push({
        path: `/hypertopia/modules/${name}`,
        mode: 0o644,
        content: await readModule(file, context),
      });
      names.push(name);
      order += bus === undefined ? `${name}\n` : `${name} ${bus}\n`;
    }
    entries.push({ path: "/hypertopia/modules/order", mode: 0o644, content: encoder.encode(order) });
    await writeWhole(join(part, "initramfs.cpio"), cpioArchive(entries), 0o644);
    return { modules: names };
  });
  return join(folder, "initramfs.cpio");
}

/** A module's name as the kernel spells it: with underscores. */
function moduleName(path: string): string {
  return basename(path).replace(/\.ko(\.(xz|zst|gz))?$/, "").replaceAll("-", "_");
}

/** A module for an initramfs. */
export interface GuestModule {
  /** Path of its file. */
  readonly file: string;
  /** The bus without which it is of no use; undefined where it is wanted in any case. */
  readonly bus?: "virtio" | "xen";
}

/**
 * Orders the modules of an initramfs so that each follows those that it needs, and tells which are for one bus only.
 *
 * @param folder Folder of a kernel's modules
 * @param more Names of modules beside {@linkcode GUEST_MODULES}, which unlike those must be there
 * @returns The modules
 * @throws {MachineError} If a module is neither there nor built in
 */
export async function guestModules(folder: string, more: readonly string[]): Promise<GuestModule[]> {
  const files = await ModuleFiles.open(folder);
  const optional = new Set(GUEST_MODULES);
  const all = await files.order([...GUEST_MODULES, ...more], optional);
  const [forVirtio, forXen, forAny] = await Promise.all(
    [BUS_MODULES.virtio, BUS_MODULES.xen, [...OTHER_MODULES, ...more]].map(async (wanted) =>
      new Set(await files.order(wanted, optional))
    ),
  );
  return all.map((file) => {
    if (forAny!.has(file) || forVirtio!.has(file) === forXen!.has(file)) return { file };
    return { file, bus: forXen!.has(file) ? "xen" : "virtio" };
  });
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
  return await (await ModuleFiles.open(folder)).order(wanted, optional);
}

/** The modules of one kernel. */
class ModuleFiles {
  readonly #folder: string;
  readonly #files = new Map<string, string>();
  readonly #builtin: ReadonlySet<string>;
  /** What each module needs, as far as that was asked for: it is in its file, which may be compressed. */
  readonly #dependencies = new Map<string, readonly string[]>();

  private constructor(folder: string, builtin: ReadonlySet<string>) {
    this.#folder = folder;
    this.#builtin = builtin;
  }

  static async open(folder: string): Promise<ModuleFiles> {
    const builtin = await Deno.readTextFile(join(folder, "modules.builtin")).catch(() => "");
    const modules = new ModuleFiles(folder, new Set(builtin.split("\n").map(moduleName)));
    await modules.#walk(folder);
    return modules;
  }

  async #walk(path: string): Promise<void> {
    for await (const entry of Deno.readDir(path)) {
      const full = join(path, entry.name);
      if (entry.isDirectory) await this.#walk(full);
      else if (/\.ko(\.(xz|zst|gz))?$/.test(entry.name)) this.#files.set(moduleName(entry.name), full);
    }
  }

  async order(wanted: readonly string[], optional: ReadonlySet<string>): Promise<string[]> {
    const result: string[] = [];
    const done = new Set<string>();
    const add = async (name: string, neededBy: string | undefined) => {
      const spelled = name.replaceAll("-", "_");
      if (done.has(spelled) || this.#builtin.has(spelled)) return;
      const file = this.#files.get(spelled);
      if (!file) {
        if (neededBy === undefined && optional.has(name)) return;
        throw new MachineError(
          `Cannot find kernel module "${name}"${
            neededBy ? `, which "${neededBy}" needs,` : ""
          } in "${this.#folder}": ` +
            `take it out of modules, or choose a kernel flavour that has it`,
        );
      }
      done.add(spelled);
      for (const each of await this.#dependenciesOf(file)) await add(each, name);
      result.push(file);
    };
    for (const name of wanted) await add(name, undefined);
    return result;
  }

  async #dependenciesOf(file: string): Promise<readonly string[]> {
    let found = this.#dependencies.get(file);
    if (!found) this.#dependencies.set(file, found = await moduleDependencies(file));
    return found;
  }
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
