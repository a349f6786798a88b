/**
 * Debian packages, read from a mirror over HTTP on hosts without apt. The chain of trust is apt's: a keyring vouches for
 * the suite's `InRelease`, that one for the list of packages, and the list for each package.
 *
 * @module
 */

import { join } from "node:path";
import { MachineError } from "../vmm/errors.ts";
import { lockFile, removeIfThere, writeWhole } from "../vmm/files.ts";
import type { BuildContext } from "../vmm/images/builder.ts";
import { type Compression, decompress, readPart } from "../vmm/images/compression.ts";
import { sha256, storeKey } from "../vmm/images/store.ts";
import { unpackDeb } from "./deb.ts";
import { compareVersions, parseFields, parseFiles, type ReleaseFile } from "./debian_control.ts";
import { download } from "./download.ts";
import { verifyClearsigned } from "./openpgp.ts";
import {
  type ArchiveOptions,
  debianKeyring,
  missingDependency,
  missingPackages,
  type PackageArchive,
} from "./package_archive.ts";

/** How long a release counts as fresh, in milliseconds. */
const FRESH = 24 * 3600 * 1000;
/** How far a release's date may lie ahead of this host's clock, in milliseconds. */
const CLOCK_TOLERANCE = 10_000;
/** Most bytes of a release. */
const MAX_RELEASE = 16 * 2 ** 20;
/** Most bytes of a list of packages, unpacked. */
const MAX_INDEX = 512 * 2 ** 20;

/** A suite of a Debian mirror. */
export class DebianArchive implements PackageArchive {
  readonly #context: BuildContext;
  readonly #options: ArchiveOptions;
  readonly #mirror: string;
  readonly #folder: string;
  /** The list of packages, with a line break before it. */
  readonly #index: string;

  private constructor(
    context: BuildContext,
    options: ArchiveOptions,
    place: { readonly mirror: string; readonly folder: string },
    index: string,
  ) {
    this.#context = context;
    this.#options = options;
    this.#mirror = place.mirror;
    this.#folder = place.folder;
    this.#index = index;
  }

  /**
   * Reads the list of packages of a suite, from the cache where that is younger than a day. It is checked each time.
   *
   * @param context Cache, signal and progress
   * @param options Which archive; a mirror must be among them
   * @returns The archive
   * @throws {MachineError} If there is no mirror or no keyring, or anything cannot be trusted
   */
  static async open(context: BuildContext, options: ArchiveOptions): Promise<DebianArchive> {
    const keyring = options.keyring ?? await debianKeyring();
    const mirror = options.mirror?.replace(/\/+$/, "");
    if (mirror === undefined || keyring === undefined) throw notEnough(mirror, keyring);
    if (!/^https?:/.test(mirror)) {
      throw new MachineError(
        `Cannot read the mirror "${mirror}" as this host has no apt-get: give one that begins with http:// or https://`,
      );
    }
    const folder = join(context.cache, "archives", storeKey(options.arch, mirror, options.suite));
    using _lock = await lockFile(join(folder, "lock"), {
      signal: context.signal,
      onWait: () => context.report("waiting for another process that reads package lists"),
    });
    const release = await readRelease(context, options, { mirror, keyring, folder });
    const index = await forgetIfStale(folder, () => readIndex(context, options, { mirror, folder }, release));
    return new DebianArchive(context, options, { mirror, folder }, `\n${index}`);
  }

  /** {@inheritDoc PackageArchive.versions} */
  versions(names: readonly string[]): Promise<Map<string, string>> {
    const found = new Map<string, string>();
    for (const name of names) {
      const version = this.#find(name)?.get("version");
      if (version !== undefined) found.set(name, version);
    }
    const missing = names.filter((name) => !found.has(name));
    return missing.length > 0
      ? Promise.reject(new MachineError(missingPackages(missing, this.#options.suite)))
      : Promise.resolve(found);
  }

  /** {@inheritDoc PackageArchive.dependency} */
  dependency(name: string, pattern: RegExp): Promise<string> {
    const found = (this.#find(name)?.get("depends") ?? "").split(/[,|]/)
      .map((each) => each.trim().replace(/[\s(:\[].*$/s, ""))
      .find((each) => pattern.test(each));
    return found === undefined
      ? Promise.reject(new MachineError(missingDependency(name, this.#options.suite)))
      : Promise.resolve(found);
  }

  /** {@inheritDoc PackageArchive.unpack} */
  async unpack(name: string, folder: string): Promise<void> {
    const { signal } = this.#context;
    const fields = this.#find(name);
    if (!fields) throw new MachineError(missingPackages([name], this.#options.suite));
    const file = fields.get("filename") ?? "";
    const digest = fields.get("sha256") ?? "";
    const size = Number(fields.get("size"));
    if (!/^[0-9a-f]{64}$/.test(digest) || !Number.isSafeInteger(size) || !/^\w[^\s?#\\]*\.deb$/.test(file)) {
      throw new MachineError(
        `Cannot download the package "${name}" as the list of "${this.#options.suite}" has no file, size and SHA256 of ` +
          `it: use another mirror`,
      );
    }
    using _lock = await lockFile(join(this.#folder, "locks", name), { signal });
    const path = await forgetIfStale(
      this.#folder,
      () => download(`${this.#mirror}/${file}`, { sha256: digest, size, name }, this.#context),
    );
    this.#context.report(`unpacking ${name}`);
    try {
      await unpackDeb(path, folder, { signal });
    } finally {
      await removeIfThere(path);
    }
  }

  /** Finds the fields of the newest version of a package. */
  #find(name: string): Map<string, string> | undefined {
    let best: Map<string, string> | undefined;
    const line = `\nPackage: ${name}\n`;
    for (let at = this.#index.indexOf(line); at >= 0; at = this.#index.indexOf(line, at + 1)) {
      const start = Math.max(this.#index.lastIndexOf("\n\n", at), 0);
      const end = this.#index.indexOf("\n\n", at + 1);
      const fields = parseFields(this.#index.slice(start, end < 0 ? undefined : end));
      const version = fields.get("version") ?? "";
      if (!best || compareVersions(version, best.get("version") ?? "") > 0) best = fields;
    }
    return best;
  }
}

/** The mirror may have replaced what a kept release leads to: after a failure it is read anew the next time. */
async function forgetIfStale<T>(folder: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof MachineError) await removeIfThere(join(folder, "InRelease"));
    throw error;
  }
}

function notEnough(mirror: string | undefined, keyring: string | undefined): MachineError {
  const missing = [
    ...(mirror === undefined ? ['mirror: "http://..."'] : []),
    ...(keyring === undefined ? ['keyring: "/path/to/debian-archive-keyring.gpg"'] : []),
  ];
  return new MachineError(
    `Cannot get Debian packages as this host has no apt-get${
      keyring === undefined ? " and no keyring of Debian's" : ""
    }: give debian({ ${missing.join(", ")} })${
      keyring === undefined ? ", the file that the package debian-archive-keyring has" : ""
    }`,
  );
}

/** Gets the files that a suite's release vouches for. */
async function readRelease(
  context: BuildContext,
  options: ArchiveOptions,
  place: { readonly mirror: string; readonly keyring: string; readonly folder: string },
): Promise<{ readonly fields: Map<string, string>; readonly files: Map<string, ReleaseFile> }> {
  const name = `${place.mirror}/dists/${options.suite}/InRelease`;
  const path = join(place.folder, "InRelease");
  const check = async (message: string) =>
    checkRelease(await verifyClearsigned(message, { name, keyring: place.keyring }), name, options);
  const age = await Deno.stat(path).then((info) => Date.now() - (info.mtime?.getTime() ?? 0), () => Infinity);
  if (age >= 0 && age < FRESH) {
    // What does not hold any more, by its date or another keyring, is read again.
    const kept = await check(await Deno.readTextFile(path)).catch((error) => {
      if (!(error instanceof MachineError)) throw error;
      return undefined;
    });
    if (kept) return kept;
  }
  context.report(`reading the release of ${options.suite}`);
  const message = await fetchText(name, MAX_RELEASE, context.signal);
  const release = await check(message);
  await writeWhole(path, message, 0o644);
  return release;
}

/** Checks that a release is of the suite and of today, and has the architecture. */
function checkRelease(
  text: string,
  name: string,
  { suite, arch }: ArchiveOptions,
): { fields: Map<string, string>; files: Map<string, ReleaseFile> } {
  const fields = parseFields(text);
  const refuse = (reason: string) => new MachineError(`Cannot use "${name}" as ${reason}`);
  const names = [fields.get("suite"), fields.get("codename")];
  if (!names.includes(suite)) {
    throw refuse(
      `it is the release of ${names.map((each) => `"${each}"`).join(" alias ")}: check the mirror`,
    );
  }
  const date = Date.parse(fields.get("date") ?? "");
  if (!(date <= Date.now() + CLOCK_TOLERANCE)) {
    throw refuse(`its date "${fields.get("date")}" is in the future or no date: check this host's clock`);
  }
  const until = fields.get("valid-until");
  if (until !== undefined && !(Date.parse(until) >= Date.now())) {
    throw refuse(
      `it was valid until ${until} only: use a mirror that is up to date, or check this host's clock`,
    );
  }
  if (!(fields.get("architectures") ?? "").split(/\s+/).includes(arch)) {
    throw refuse(`it has no packages for ${arch}: use another suite or mirror`);
  }
  return { fields, files: parseFiles(fields.get("sha256") ?? "") };
}

/** Gets the list of packages that a release vouches for. */
async function readIndex(
  context: BuildContext,
  { suite, arch }: ArchiveOptions,
  { mirror, folder }: { readonly mirror: string; readonly folder: string },
  { fields, files }: { readonly fields: Map<string, string>; readonly files: Map<string, ReleaseFile> },
): Promise<string> {
  const plain = `main/binary-${arch}/Packages`;
  const compression = (["xz", "gz"] as const).find((each) => files.has(`${plain}.${each}`));
  const file = files.get(`${plain}.${compression}`);
  if (!compression || !file) {
    throw new MachineError(
      `Cannot use the mirror "${mirror}" as the release of "${suite}" has no "${plain}.xz" and no "${plain}.gz": ` +
        `use another mirror`,
    );
  }
  const path = join(folder, "Packages");
  if (await sha256(path).catch(() => undefined) !== file.sha256) {
    context.report(`reading the package lists of ${suite}`);
    const expected = { ...file, name: `the package lists of ${suite}` };
    const base = `${mirror}/dists/${suite}`;
    let found: string | undefined;
    if (fields.get("acquire-by-hash") === "yes") {
      // This one does not change under the reader, but not every mirror of a part has it.
      const url = `${base}/main/binary-${arch}/by-hash/SHA256/${file.sha256}`;
      found = await download(url, expected, context).catch((error) => {
        if (!(error instanceof MachineError)) throw error;
        return undefined;
      });
    }
    found ??= await download(`${base}/${plain}.${compression}`, expected, context);
    await Deno.rename(found, path);
  }
  return await readCompressed(path, compression, files.get(plain)?.size ?? MAX_INDEX);
}

async function readCompressed(path: string, compression: Compression, limit: number): Promise<string> {
  using file = await Deno.open(path);
  const content = decompress(readPart(file, (await file.stat()).size), compression);
  // One byte a character: what is looked for is ASCII, and names of people take no more memory than that.
  const decoder = new TextDecoder("latin1");
  let text = "";
  for await (const chunk of content) {
    text += decoder.decode(chunk, { stream: true });
    if (text.length > limit) {
      throw new MachineError(
        `Cannot read "${path}" as it unpacks to more than ${limit} bytes: use another mirror`,
      );
    }
  }
  return text;
}

async function fetchText(url: string, limit: number, signal: AbortSignal): Promise<string> {
  try {
    const response = await fetch(url, { signal });
    if (!response.ok || !response.body) {
      await response.body?.cancel();
      throw new MachineError(
        `Cannot read "${url}" as the server answered ${response.status} ${response.statusText}: ` +
          `check the mirror's address and the suite`,
      );
    }
    const decoder = new TextDecoder();
    let text = "";
    for await (const chunk of response.body) {
      text += decoder.decode(chunk, { stream: true });
      if (text.length > limit) throw new Error(`it has more than ${limit} bytes`);
    }
    return text;
  } catch (cause) {
    signal.throwIfAborted();
    if (cause instanceof MachineError) throw cause;
    throw new MachineError(
      `Cannot read "${url}" as ${cause instanceof Error ? cause.message : cause}: check the mirror's address`,
      { cause },
    );
  }
}
