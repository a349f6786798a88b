/**
 * A guest whose root file system is a directory of the host.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { join, relative } from "node:path";
import {
  Choice,
  type Chosen,
  type ImageSource,
  object,
  optional,
  parseSize,
  type Size,
  size,
  string,
} from "../dsl/mod.ts";
import { MachineError } from "../vmm/errors.ts";
import type { BuildContext, BuiltImage, ImageBuilder } from "../vmm/images/builder.ts";
import { runTool, storeEntry, storeKey } from "../vmm/images/store.ts";
import { debianBusybox, debianKernelBuilder, DEFAULT_KERNEL } from "./debian.ts";

/** Options of {@linkcode directory}. */
export interface DirectoryOptions {
  /** Program to run as init, inside the directory; `"/sbin/init"` unless told. */
  readonly init?: string;
  /** Capacity of the root file system; what the directory needs and a half more unless told. */
  readonly size?: Size;
}

/**
 * Makes a root disk of a directory. The directory itself is only read. When a file in it has changed,
 * the next plan recreates the machine.
 *
 * @param path Path of the directory
 * @param options Init and capacity
 * @returns The image, for a machine's `image`
 *
 * @example
 * ```ts
 * import { directory } from "hypertopia/stdlib";
 *
 * const image = directory("/srv/rootfs", { init: "/bin/sh" });
 * ```
 */
export function directory(path: string, options: DirectoryOptions = {}): ImageSource {
  const schema = object({
    path: string({ pattern: /^\//, description: "an absolute path" }),
    init: optional(string({ pattern: /^\/\S+$/, description: "an absolute path" }), "/sbin/init"),
    size: optional(size({ min: "16MiB" })),
  });
  return new Choice("image", "directory", schema, { path, ...options });
}

/** Builds {@linkcode directory}. */
export const directoryBuilder: ImageBuilder = {
  type: "directory",
  fingerprint: async (recipe, context) =>
    (await digestTree(recipe.path as string, context)).digest.slice(0, 16),
  async build(recipe, context): Promise<BuiltImage> {
    const folder = recipe.path as string;
    const init = recipe.init as string;
    const tree = await digestTree(folder, context);
    try {
      await Deno.lstat(join(folder, init));
    } catch (cause) {
      throw new MachineError(
        `Cannot boot the directory "${folder}" as it has no "${init}": name its init with directory(path, { init })`,
        { cause },
      );
    }
    const least = Math.ceil(tree.bytes * 1.5 / 2 ** 20 + 32) * 2 ** 20;
    const bytes = recipe.size === undefined ? least : parseSize(recipe.size as string);
    const key = storeKey("directory", tree.digest, bytes);
    const entry = await storeEntry(context, `roots/${key}`, `the image of "${folder}"`, async (part) => {
      context.report(`making a file system of "${folder}"`);
      await runTool(
        "mke2fs",
        [
          "-q",
          "-t",
          "ext4",
          "-L",
          "root",
          "-m",
          "0",
          "-N",
          String(tree.entries + 4096),
          "-d",
          folder,
          join(part, "root.ext4"),
          `${bytes / 1024}k`,
        ],
        context,
        { package: "e2fsprogs", env: { PATH: `${Deno.env.get("PATH") ?? ""}:/usr/sbin:/sbin` } },
      );
      return { folder };
    });
    const kernel: Chosen = DEFAULT_KERNEL;
    return {
      key,
      kernel: await debianKernelBuilder.build(kernel, context),
      busybox: await debianBusybox(kernel, context),
      modules: [],
      root: { path: join(entry.folder, "root.ext4"), format: "raw", size: bytes, filesystem: "ext4", init },
      cmdline: "",
    };
  },
};

/** Digests names, kinds, rights and times of everything below a directory; content is covered by size and time. */
async function digestTree(
  root: string,
  context: BuildContext,
): Promise<{ digest: string; bytes: number; entries: number }> {
  const hash = createHash("sha256");
  let bytes = 0;
  let count = 0;
  const walk = async (folder: string): Promise<void> => {
    context.signal.throwIfAborted();
    const entries = [];
    for await (const entry of Deno.readDir(folder)) entries.push(entry);
    entries.sort((a, b) => a.name < b.name ? -1 : 1);
    for (const entry of entries) {
      const path = join(folder, entry.name);
      const info = await Deno.lstat(path);
      const target = entry.isSymlink ? await Deno.readLink(path) : "";
      hash.update(`${relative(root, path)}\0${info.mode}\0${info.uid}\0${info.gid}\0${target}\0`);
      if (entry.isFile) hash.update(`${info.size}\0${info.mtime?.getTime()}\0`);
      count++;
      bytes += 4096 + (entry.isFile ? info.size : 0);
      if (entry.isDirectory) await walk(path);
    }
  };
  try {
    await walk(root);
  } catch (cause) {
    if (context.signal.aborted) throw cause;
    throw new MachineError(
      `Cannot read the directory "${root}" as ${cause instanceof Error ? cause.message : cause}`,
      { cause },
    );
  }
  return { digest: hash.digest("hex"), bytes, entries: count };
}
