/**
 * The content-addressed cache of images.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { basename, dirname, join } from "node:path";
import { canonical } from "../../planner/mod.ts";
import { MachineError, writeError } from "../errors.ts";
import { lockFile, removeIfThere, writeWhole } from "../files.ts";
import type { BuildContext } from "./builder.ts";

interface Manifest {
  readonly version: 1;
  readonly files: Readonly<
    Record<string, { readonly size: number; readonly modified: number; readonly sha256: string }>
  >;
  readonly about: Readonly<Record<string, unknown>>;
}

/** A finished entry of the cache. */
export interface StoreEntry {
  /** Its folder. */
  readonly folder: string;
  /** What the builder noted, such as package versions. */
  readonly about: Readonly<Record<string, unknown>>;
}

/**
 * Derives a key from all that decides an entry's content.
 *
 * @param parts Any JSON values
 * @returns 20 hexadecimal digits
 */
export function storeKey(...parts: readonly unknown[]): string {
  return createHash("sha256").update(canonical(parts)).digest("hex").slice(0, 20);
}

/**
 * Finds an entry of the cache, or builds it. It appears whole or not at all; two processes that want the same entry
 * build it once. An entry whose files were damaged is built again.
 *
 * @param context Cache, signal and progress
 * @param name Name of the entry, such as `kernels/0123abcd`
 * @param what What it is, for messages, such as `the image "debian"`
 * @param build Fills a folder; what it returns is kept with the entry
 * @returns The entry
 */
export async function storeEntry(
  context: BuildContext,
  name: string,
  what: string,
  build: (folder: string) => Promise<Readonly<Record<string, unknown>>>,
): Promise<StoreEntry> {
  const folder = join(context.cache, name);
  const found = await readEntry(folder);
  if (found) return found;
  using _lock = await lockFile(join(context.cache, "locks", name.replaceAll("/", "-")), {
    signal: context.signal,
    onWait: () => context.report(`waiting for another process that builds ${what}`),
  });
  const made = await readEntry(folder);
  if (made) return made;
  // Left behind by a build that was killed.
  await Deno.mkdir(dirname(folder), { recursive: true, mode: 0o700 });
  for await (const each of Deno.readDir(dirname(folder))) {
    if (each.name.startsWith(`${basename(folder)}.part`)) {
      await removeIfThere(join(dirname(folder), each.name));
    }
  }
  await removeIfThere(folder);
  const part = `${folder}.part`;
  try {
    await Deno.mkdir(part, { recursive: true, mode: 0o700 });
    const about = await build(part);
    context.signal.throwIfAborted();
    const files: Record<string, Manifest["files"][string]> = {};
    for await (const each of Deno.readDir(part)) {
      if (each.isFile) files[each.name] = await describe(join(part, each.name));
    }
    await writeWhole(
      join(part, "manifest.json"),
      JSON.stringify({ version: 1, files, about } satisfies Manifest),
      0o644,
    );
    await Deno.rename(part, folder);
    return { folder, about };
  } catch (error) {
    await removeIfThere(part);
    if (context.signal.aborted) throw context.signal.reason;
    throw writeError(`build ${what}`, error);
  }
}

async function readEntry(folder: string): Promise<StoreEntry | undefined> {
  try {
    const manifest = JSON.parse(await Deno.readTextFile(join(folder, "manifest.json"))) as Manifest;
    for (const [name, known] of Object.entries(manifest.files)) {
      const { size, mtime } = await Deno.stat(join(folder, name));
      if (size !== known.size) return undefined;
      // A touched file is read in full once; an untouched one is what was checked when it was made.
      if (mtime?.getTime() !== known.modified && await sha256(join(folder, name)) !== known.sha256) {
        return undefined;
      }
    }
    return { folder, about: manifest.about };
  } catch {
    return undefined;
  }
}

async function describe(path: string): Promise<Manifest["files"][string]> {
  const { size, mtime } = await Deno.stat(path);
  return { size, modified: mtime?.getTime() ?? 0, sha256: await sha256(path) };
}

/**
 * Digests a file.
 *
 * @param path Path of the file
 * @returns Hexadecimal SHA-256
 */
export async function sha256(path: string): Promise<string> {
  const hash = createHash("sha256");
  using file = await Deno.open(path);
  const buffer = new Uint8Array(1 << 20);
  for (let count = await file.read(buffer); count !== null; count = await file.read(buffer)) {
    hash.update(buffer.subarray(0, count));
  }
  return hash.digest("hex");
}

/** What {@linkcode runTool} can be given. */
export interface ToolOptions {
  /** Environment to add. */
  readonly env?: Readonly<Record<string, string>>;
  /** Folder to run in. */
  readonly cwd?: string;
  /** The Debian package that brings the program. */
  readonly package: string;
  /** Receives each line of the error output. */
  readonly onLine?: (line: string) => void;
}

/**
 * Runs a program of the host to its end.
 *
 * @param program Its name
 * @param args Its arguments
 * @param context Signal
 * @param options Environment, folder and the package to install where it is missing
 * @returns What it printed
 * @throws {MachineError} If it is missing or fails, with the end of what it said
 */
export async function runTool(
  program: string,
  args: readonly string[],
  context: BuildContext,
  options: ToolOptions,
): Promise<string> {
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(program, {
      args: [...args],
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
      signal: context.signal,
      env: { LC_ALL: "C.UTF-8", DEBIAN_FRONTEND: "noninteractive", ...options.env },
      ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    }).spawn();
  } catch (cause) {
    if (cause instanceof Deno.errors.NotFound) {
      throw new MachineError(
        `Cannot run "${program}" as it is not installed: apt-get install ${options.package}`,
        { cause },
      );
    }
    throw cause;
  }
  let said = "";
  const listen = async () => {
    for await (const chunk of child.stderr.pipeThrough(new TextDecoderStream())) {
      for (const line of chunk.split("\n")) if (line.trim() !== "") options.onLine?.(line.trim());
      said = (said + chunk).slice(-8000);
    }
  };
  const [{ success, code }, output] = await Promise.all([
    child.status,
    new Response(child.stdout).text(),
    listen(),
  ]);
  context.signal.throwIfAborted();
  if (!success) {
    const lines = (said.trim() === "" ? output : said).trim().split("\n");
    const reason = lines.filter((line) => /^(E|W|I?ERR|error|.*: )/i.test(line)).slice(-6).join("; ") ||
      lines.slice(-3).join("; ");
    throw new MachineError(`"${program} ${args[0] ?? ""}" failed with status ${code}: ${reason}`);
  }
  return output;
}
