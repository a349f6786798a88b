/**
 * Debian packages, fetched and checked by the system's own apt in a private place: neither the rights of root nor the
 * system's package state are needed.
 *
 * @module
 */

import { join } from "node:path";
import { MachineError } from "../vmm/errors.ts";
import { exists, lockFile, writeWhole } from "../vmm/files.ts";
import type { BuildContext } from "../vmm/images/builder.ts";
import { runTool, storeKey } from "../vmm/images/store.ts";
import {
  type ArchiveOptions,
  debianKeyring,
  missingDependency,
  missingPackages,
  type PackageArchive,
} from "./package_archive.ts";

/** How long package lists count as fresh, in milliseconds. */
const FRESH = 24 * 3600 * 1000;

/** Apt with a state of its own. */
export class Apt implements PackageArchive {
  readonly #context: BuildContext;
  readonly #folder: string;
  readonly #options: ArchiveOptions;
  readonly #sources: string;

  private constructor(context: BuildContext, folder: string, options: ArchiveOptions, sources: string) {
    this.#context = context;
    this.#folder = folder;
    this.#options = options;
    this.#sources = sources;
  }

  /** Path of the list of sources in use, for tools that want one. */
  get sourcesFile(): string {
    return join(this.#folder, "sources.list");
  }

  /**
   * Prepares apt: finds the archive and brings the package lists up to date where they are older than a day.
   *
   * @param context Cache, signal and progress
   * @param options Which archive
   * @returns Apt for that archive
   */
  static async open(context: BuildContext, options: ArchiveOptions): Promise<Apt> {
    const sources = await findSources(context, options);
    const folder = join(context.cache, "apt", storeKey(options.arch, sources));
    const apt = new Apt(context, folder, options, sources);
    using _lock = await lockFile(join(folder, "lock"), {
      signal: context.signal,
      onWait: () => context.report("waiting for another process that reads package lists"),
    });
    await apt.#update();
    return apt;
  }

  async #update(): Promise<void> {
    for (const each of ["state/lists/partial", "cache/archives/partial"]) {
      await Deno.mkdir(join(this.#folder, each), { recursive: true });
    }
    await writeWhole(join(this.#folder, "status"), "", 0o644);
    await writeWhole(this.sourcesFile, this.#sources, 0o644);
    const stamp = join(this.#folder, "updated");
    const age = await Deno.stat(stamp).then(
      (info) => Date.now() - (info.mtime?.getTime() ?? 0),
      () => Infinity,
    );
    if (age < FRESH) return;
    this.#context.report(`reading the package lists of ${this.#options.suite}`);
    try {
      await this.#run("apt-get", ["update", "-qq", "-o", "APT::Update::Error-Mode=any"]);
    } catch (error) {
      if (this.#options.arch === "amd64" || !(error instanceof MachineError) || !(await this.#hasSuite())) {
        throw error;
      }
      // Mirrors of updates lag behind for architectures that few use: the suite itself is enough to build a guest.
      this.#context.report(`going on without the updates of ${this.#options.suite}: ${error.message}`);
      return;
    }
    await writeWhole(stamp, "", 0o644);
  }

  /** Tells whether the list of the suite itself is there. */
  async #hasSuite(): Promise<boolean> {
    const name = `_dists_${this.#options.suite}_main_binary-${this.#options.arch}_Packages`;
    for await (const each of Deno.readDir(join(this.#folder, "state/lists"))) {
      if (each.name.includes(name)) return true;
    }
    return false;
  }

  /**
   * Finds the newest versions of packages.
   *
   * @param names Names of packages
   * @returns Versions by name
   * @throws {MachineError} If the archive lacks one
   */
  async versions(names: readonly string[]): Promise<Map<string, string>> {
    const found = new Map<string, string>();
    const output = await this.#run("apt-cache", ["policy", ...names]);
    for (const [, name, candidate] of output.matchAll(/^(\S+):\n {2}Installed: .*\n {2}Candidate: (\S+)/gm)) {
      if (candidate !== "(none)") found.set(name!.replace(/:\w+$/, ""), candidate!);
    }
    const missing = names.filter((name) => !found.has(name));
    if (missing.length > 0) {
      throw new MachineError(missingPackages(missing, this.#options.suite));
    }
    return found;
  }

  /**
   * Finds the package that a meta package stands for.
   *
   * @param name The meta package, such as `linux-image-amd64`
   * @param pattern What the wanted dependency looks like
   * @returns Name of the dependency
   */
  async dependency(name: string, pattern: RegExp): Promise<string> {
    const output = await this.#run("apt-cache", ["depends", name]);
    const found = [...output.matchAll(/Depends: (\S+)/g)].map((match) => match[1]!).find((each) =>
      pattern.test(each)
    );
    if (found === undefined) {
      throw new MachineError(missingDependency(name, this.#options.suite));
    }
    return found;
  }

  /**
   * Downloads a package. What was downloaded before an interruption is kept and continued.
   *
   * @param name Name of the package
   * @returns Path of the checked `.deb` file; remove it when it is unpacked
   */
  async download(name: string): Promise<string> {
    const folder = join(this.#folder, "downloads", name);
    await Deno.mkdir(folder, { recursive: true });
    const planned = await this.#run("apt-get", ["download", "--print-uris", name], folder);
    const [, file, size] = /'[^']*' (\S+) (\d+) /.exec(planned) ?? [];
    if (file === undefined) {
      throw new MachineError(`Cannot find where to download the package "${name}" from`);
    }
    const path = join(folder, file);
    const megabytes = (bytes: number) => Math.round(bytes / 1e6);
    const watch = setInterval(() => {
      Deno.stat(path).then(
        (info) =>
          this.#context.report(
            `downloading ${name}: ${megabytes(info.size)} of ${megabytes(Number(size))} MB`,
          ),
        () => {},
      );
    }, 500);
    try {
      this.#context.report(`downloading ${name}`);
      await this.#run("apt-get", ["download", "-qq", name], folder);
    } finally {
      clearInterval(watch);
    }
    if (!(await exists(path))) {
      throw new MachineError(`Cannot find the package file "${path}" that apt-get has downloaded`);
    }
    return path;
  }

  /**
   * Downloads and unpacks a package.
   *
   * @param name Name of the package
   * @param folder Folder to unpack into
   */
  async unpack(name: string, folder: string): Promise<void> {
    using _lock = await lockFile(join(this.#folder, "locks", name), { signal: this.#context.signal });
    const file = await this.download(name);
    this.#context.report(`unpacking ${name}`);
    await runTool("dpkg-deb", ["--extract", file, folder], this.#context, { package: "dpkg" });
    await Deno.remove(file);
  }

  async #run(program: string, args: readonly string[], cwd?: string): Promise<string> {
    return await runTool(
      program,
      [
        "-o",
        `Dir::State=${join(this.#folder, "state")}`,
        "-o",
        `Dir::State::status=${join(this.#folder, "status")}`,
        "-o",
        `Dir::Cache=${join(this.#folder, "cache")}`,
        "-o",
        `Dir::Etc::sourcelist=${this.sourcesFile}`,
        "-o",
        "Dir::Etc::sourceparts=/dev/null",
        "-o",
        `APT::Architecture=${this.#options.arch}`,
        "-o",
        `APT::Architectures=${this.#options.arch}`,
        "-o",
        "APT::Sandbox::User=",
        "-o",
        "Acquire::Languages=none",
        ...args,
      ],
      this.#context,
      { package: "apt", ...(cwd === undefined ? {} : { cwd }) },
    );
  }
}

/** Mirrors and suites that the system's apt would read. */
async function configuredSources(
  context: BuildContext,
): Promise<{ readonly uri: string; readonly release: string }[]> {
  const output = await runTool("apt-get", ["update", "--print-uris"], context, { package: "apt" });
  return [...output.matchAll(/^'(\S+?)\/dists\/(\S+)\/InRelease'/gm)].map(([, uri = "", release = ""]) => ({
    uri,
    release,
  }));
}

/** Writes the sources of a suite: from the given mirror, or from the entries of the system's own configuration. */
async function findSources(context: BuildContext, options: ArchiveOptions): Promise<string> {
  const { suite, mirror, keyring } = options;
  const key = keyring ?? await debianKeyring();
  const signed = `[${key === undefined ? "" : `signed-by=${key}`}]`.replace("[]", "");
  const line = (uri: string, release: string, component: string) =>
    `deb ${signed} ${uri} ${release} ${component}`.replace("  ", " ");
  if (mirror !== undefined) return `${line(mirror, suite, "main")}\n`;
  let output: string;
  try {
    output = await runTool(
      "apt-get",
      ["indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(LABEL)", "Created-By: Packages"],
      context,
      { package: "apt" },
    );
  } catch (cause) {
    throw new MachineError(
      `Cannot build a Debian image as this host has no working apt (${
        cause instanceof Error ? cause.message : cause
      }): ` +
        `use image() or directory(), or a Debian host`,
      { cause },
    );
  }
  const listed = output.trim().split("\n").map((each) => each.split("|"))
    .filter(([, , component]) => component === "main")
    .map(([uri = "", release = ""]) => ({ uri, release }));
  // What has never been updated, as the apt of a new container, tells no indexes.
  const entries = (listed.length > 0 ? listed : await configuredSources(context))
    .map((each) => ({ ...each, base: each.release.replace(/[-/].*$/, "") }));
  const own = entries.filter((each) => each.base === suite && !/backports|proposed/.test(each.release));
  if (own.length > 0) return own.map((each) => `${line(each.uri, each.release, "main")}\n`).join("");
  // Another suite lives on the same mirrors.
  const main = entries.find((each) => each.release === each.base);
  if (!main) {
    throw new MachineError(
      `Cannot find a Debian mirror for "${suite}" in this host's apt configuration: give one with debian({ mirror: "..." })`,
    );
  }
  const security = entries.find((each) => /security/.test(each.release) && each.base === main.base);
  return `${line(main.uri, suite, "main")}\n` +
    (security ? `${line(security.uri, security.release.replace(main.base, suite), "main")}\n` : "");
}
