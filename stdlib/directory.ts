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

/** Most symbolic links on the way to one file (Linux 6.1 `MAXSYMLINKS`, include/linux/namei.h). */
const MAX_LINKS = 40;
/** Most interpreters of one program, each a script of the next (Linux 6.1 `exec_binprm`, fs/exec.c). */
const MAX_INTERPRETERS = 5;
/** What the kernel reads of a program to tell what it is (Linux 6.1 `BINPRM_BUF_SIZE`, include/uapi/linux/binfmts.h). */
const PROGRAM_HEADER = 256;
/** Byte 4 of 64-bit programs (Linux 6.1 `ELFCLASS64`, include/uapi/linux/elf.h). */
const ELF_CLASS_64 = 2;

/** Builds {@linkcode directory}. */
export const directoryBuilder: ImageBuilder = {
  type: "directory",
  async fingerprint(recipe, context): Promise<string> {
    return (await survey(recipe, context)).digest.slice(0, 16);
  },
  async is64Bit(recipe): Promise<boolean> {
    const [a, b, c, d, elfClass] = await readInit(recipe.path as string, recipe.init as string);
    return a === 0x7f && b === 0x45 && c === 0x4c && d === 0x46 && elfClass === ELF_CLASS_64;
  },
  async build(recipe, context): Promise<BuiltImage> {
    const folder = recipe.path as string;
    const init = recipe.init as string;
    const tree = await survey(recipe, context);
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

/** Digests a directory, and refuses one that has nothing to boot. */
async function survey(recipe: Chosen, context: BuildContext): ReturnType<typeof digestTree> {
  const folder = recipe.path as string;
  const tree = await digestTree(folder, context);
  await readInit(folder, recipe.init as string);
  return tree;
}

/** Reads the first bytes of the program that runs as init, which is the interpreter where init is a script. */
async function readInit(folder: string, init: string): Promise<Uint8Array> {
  const refuse = (reason: string, cause?: unknown) =>
    new MachineError(
      `Cannot boot the directory "${folder}" as ${reason}: name its init with directory(path, { init })`,
      { cause },
    );
  let program = init;
  for (let depth = 0; depth <= MAX_INTERPRETERS; depth++) {
    const user = depth === 0 ? "" : `, which its init "${init}" is run by`;
    let header: Uint8Array;
    try {
      const path = await resolveInside(folder, program);
      const info = path === undefined ? undefined : await Deno.stat(path);
      if (!info?.isFile) throw refuse(`it has no "${program}"${user}`);
      if (info.mode !== null && (info.mode & 0o111) === 0) {
        throw refuse(`nobody may execute "${program}"${user}`);
      }
      using file = await Deno.open(path!);
      const buffer = new Uint8Array(PROGRAM_HEADER);
      header = buffer.subarray(0, await file.read(buffer) ?? 0);
    } catch (cause) {
      if (cause instanceof MachineError) throw cause;
      throw refuse(`"${program}" cannot be read: ${cause instanceof Error ? cause.message : cause}`, cause);
    }
    const interpreter = /^#![ \t]*([^\s\0]+)/.exec(new TextDecoder().decode(header))?.[1];
    if (interpreter === undefined) return header;
    program = interpreter;
  }
  throw refuse(`its init "${init}" is run by a script that is run by a script, and so on`);
}

/**
 * Finds a file as a guest does whose root is the directory: links never lead out of it.
 *
 * @returns Path on the host, where no part is a link; undefined if there is no such file
 */
async function resolveInside(root: string, path: string): Promise<string | undefined> {
  const rest = path.split("/");
  let found: string[] = [];
  for (let links = 0; rest.length > 0;) {
    const name = rest.shift()!;
    if (name === "" || name === ".") continue;
    if (name === "..") {
      found.pop();
      continue;
    }
    const candidate = join(root, ...found, name);
    let isSymlink: boolean;
    try {
      ({ isSymlink } = await Deno.lstat(candidate));
    } catch (error) {
      if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) {
        return undefined;
      }
      throw error;
    }
    if (!isSymlink) {
      found.push(name);
      continue;
    }
    if (++links > MAX_LINKS) return undefined;
    const target = await Deno.readLink(candidate);
    if (target.startsWith("/")) found = [];
    rest.unshift(...target.split("/"));
  }
  return join(root, ...found);
}

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
