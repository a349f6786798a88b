/**
 * Debian guests, built from packages that apt has checked, or on hosts without it our own reader of a mirror.
 *
 * @module
 */

import { basename, dirname, join } from "node:path";
import {
  array,
  Choice,
  type Chosen,
  custom,
  type ImageSource,
  type KernelSource,
  object,
  type OfArchitecture,
  oneOf,
  optional,
  parseSize,
  type Size,
  size,
  string,
} from "../dsl/mod.ts";
import { MachineError } from "../vmm/errors.ts";
import { exists } from "../vmm/files.ts";
import type {
  BuildContext,
  BuiltImage,
  BuiltKernel,
  GuestArchitecture,
  ImageBuilder,
  KernelBuilder,
} from "../vmm/images/builder.ts";
import { runTool, storeEntry, storeKey } from "../vmm/images/store.ts";
import { Apt } from "./apt.ts";
import { DebianArchive } from "./debian_archive.ts";
import type { ArchiveOptions, PackageArchive } from "./package_archive.ts";

/** Options that {@linkcode debian} and {@linkcode debianKernel} share. */
export interface DebianArchiveOptions {
  /** Suite; `"bookworm"` unless told. */
  readonly suite?: string;
  /** Architecture; what the machine's engine runs unless told, which is `"amd64"` for most. */
  readonly arch?: GuestArchitecture;
  /** Address of a mirror; that of the system's own apt configuration unless told. Hosts without apt need one. */
  readonly mirror?: string;
  /** Path of a keyring that the mirror is checked against; Debian's own unless told. */
  readonly keyring?: string;
  /** Any text: another one builds again, with the newest packages. */
  readonly revision?: string;
}

/** Options of {@linkcode debianKernel}. */
export interface DebianKernelOptions extends DebianArchiveOptions {
  /**
   * Flavour: `cloud` is small and boots fast, `generic` has every driver; `"cloud"` unless told. For i386 there is one
   * flavour only, which any 32-bit processor runs.
   */
  readonly flavour?: "cloud" | "generic";
}

/** Options of {@linkcode debian}. */
export interface DebianOptions extends DebianKernelOptions {
  /**
   * Packages of the root file system. With them the guest is a full Debian with systemd; without them it is a minimal
   * one that lives in memory: kernel, busybox and our agent.
   */
  readonly packages?: readonly string[];
  /** `minimal` or `full`; full where there are packages, unless told. */
  readonly form?: "minimal" | "full";
  /** Capacity of the root file system of a full guest; `"2GiB"` unless told. */
  readonly size?: Size;
  /** Kernel modules to load at boot. */
  readonly modules?: readonly string[];
}

const archiveShape = {
  arch: optional(oneOf("amd64", "i386")),
  suite: optional(
    string({ pattern: /^[a-z][a-z0-9-]*$/, description: 'a suite such as "bookworm"' }),
    "bookworm",
  ),
  mirror: optional(custom<string>("an address such as http://host/debian", (value, field, report) => {
    if (typeof value !== "string" || !/^(https?|file|copy):\S+$/.test(value)) {
      report(field, "Value must be the address of a mirror", value);
    }
    return value;
  })),
  keyring: optional(string({ pattern: /^\//, description: "an absolute path" })),
  revision: optional(string()),
};
const kernelShape = { ...archiveShape, flavour: optional(oneOf("cloud", "generic"), "cloud") };
const packageName = string({
  pattern: /^[a-z0-9][a-z0-9+.-]+$/,
  description: "the name of a Debian package",
});
const imageSchema = object({
  ...kernelShape,
  packages: optional(array(packageName)),
  form: optional(oneOf("minimal", "full")),
  size: optional(size({ min: "256MiB" })),
  modules: optional(array(string({ pattern: /^[\w-]+$/, description: "the name of a kernel module" }))),
});

/**
 * A Debian guest. Without packages it is minimal: it lives in memory, boots in seconds even under emulation, and has
 * busybox. With packages it is a full Debian with systemd on a root disk of its own.
 *
 * @typeParam A The architecture, where it is known at edit time
 * @param options Suite, packages and kernel
 * @returns The image, for a machine's `image`
 *
 * @example
 * ```ts
 * import { debian } from "hypertopia/stdlib";
 *
 * const small = debian();
 * const server = debian({ packages: ["nginx-light"] });
 * ```
 */
export function debian<A extends GuestArchitecture = GuestArchitecture>(
  options: DebianOptions & { readonly arch?: A } = {},
): ImageSource & OfArchitecture<A> {
  return new Choice("image", "debian", imageSchema, options) as ImageSource & OfArchitecture<A>;
}

/**
 * A Debian kernel, for a machine's `kernel`.
 *
 * @typeParam A The architecture, where it is known at edit time
 * @param options Suite and flavour
 * @returns The kernel
 */
export function debianKernel<A extends GuestArchitecture = GuestArchitecture>(
  options: DebianKernelOptions & { readonly arch?: A } = {},
): KernelSource & OfArchitecture<A> {
  return new Choice("kernel", "debian", object(kernelShape), options) as KernelSource & OfArchitecture<A>;
}

/** Packages of every full guest. */
const BASE_PACKAGES: readonly string[] = ["systemd-sysv", "udev", "kmod", "iproute2", "e2fsprogs"];
const DEFAULT_SIZE: Size = "2GiB";

/** The architecture of a recipe: its own, or else the engine's. */
function architectureOf(recipe: Chosen, context: BuildContext): GuestArchitecture {
  return (recipe.arch as GuestArchitecture | undefined) ?? context.arch ?? "amd64";
}

interface DebianArchiveChoice extends ArchiveOptions {
  readonly arch: GuestArchitecture;
}

function optionsOf(recipe: Chosen, context: BuildContext): DebianArchiveChoice {
  return {
    suite: recipe.suite as string,
    arch: architectureOf(recipe, context),
    mirror: recipe.mirror as string | undefined,
    keyring: recipe.keyring as string | undefined,
  };
}

async function openArchive(recipe: Chosen, context: BuildContext): Promise<PackageArchive> {
  const options = optionsOf(recipe, context);
  return await hasApt() ? await Apt.open(context, options) : await DebianArchive.open(context, options);
}

async function hasApt(): Promise<boolean> {
  for (const folder of (Deno.env.get("PATH") ?? "").split(":")) {
    if (folder !== "" && await exists(join(folder, "apt-get"))) return true;
  }
  return false;
}

/** What decides, in keys of the cache, which archive it was. */
function archiveOf(recipe: Chosen, arch: GuestArchitecture): readonly unknown[] {
  // Entries from before there were other architectures stay valid.
  return [recipe.suite, recipe.mirror ?? "", recipe.revision ?? "", ...(arch === "amd64" ? [] : [arch])];
}

/** Builds {@linkcode debianKernel}. */
export const debianKernelBuilder: KernelBuilder = {
  type: "debian",
  async build(recipe, context): Promise<BuiltKernel> {
    const arch = architectureOf(recipe, context);
    const flavour = arch === "i386" ? "686" : recipe.flavour === "generic" ? "amd64" : "cloud-amd64";
    const key = storeKey("debian-kernel", archiveOf(recipe, arch), flavour);
    const { folder, about } = await storeEntry(
      context,
      `kernels/${key}`,
      `the ${flavour} kernel`,
      async (part) => {
        const archive = await openArchive(recipe, context);
        const name = await kernelPackage(archive, flavour, arch);
        const version = (await archive.versions([name])).get(name);
        const tree = join(part, "tree");
        await archive.unpack(name, tree);
        const release = name.replace("linux-image-", "");
        await Deno.rename(join(tree, "boot", `vmlinuz-${release}`), join(part, "vmlinuz"));
        const modules = await firstThere([
          join(tree, "lib/modules", release),
          join(tree, "usr/lib/modules", release),
        ]);
        await Deno.mkdir(join(part, "modules"));
        await Deno.rename(modules, join(part, "modules", release));
        await Deno.remove(tree, { recursive: true });
        return { package: name, version, release };
      },
    );
    return {
      key: `${key}-${about.release}`,
      kernel: join(folder, "vmlinuz"),
      modules: join(folder, "modules", String(about.release)),
    };
  },
};

/** Finds the package of a kernel. */
async function kernelPackage(
  archive: PackageArchive,
  flavour: string,
  arch: GuestArchitecture,
): Promise<string> {
  try {
    return await archive.dependency(`linux-image-${flavour}`, /^linux-image-\d/);
  } catch (cause) {
    if (arch !== "i386" || !(cause instanceof MachineError)) throw cause;
    throw new MachineError(`${cause.message}; the last with kernels for i386 is "bookworm"`, { cause });
  }
}

/** Builds {@linkcode debian}. */
export const debianBuilder: ImageBuilder = {
  type: "debian",
  async build(recipe, context): Promise<BuiltImage> {
    const packages = recipe.packages as readonly string[] | undefined;
    const form = recipe.form ?? (packages?.length ? "full" : "minimal");
    if (form === "full" && !(await hasApt())) {
      throw new MachineError(
        `Cannot build a full Debian as this host has no apt-get: use a Debian host with apt-get and mmdebstrap, ` +
          `or leave packages and form out for the minimal one`,
      );
    }
    const kernel = await debianKernelBuilder.build(recipe, context);
    const busybox = await debianBusybox(recipe, context);
    const common = {
      kernel,
      busybox,
      modules: (recipe.modules as readonly string[] | undefined) ?? [],
      cmdline: "",
    };
    if (form === "minimal") {
      return { key: storeKey("debian-minimal", kernel.key), root: undefined, ...common };
    }
    const { key, path, bytes } = await buildRoot(recipe, packages ?? [], kernel, context);
    return {
      key,
      root: { path, format: "raw", size: bytes, filesystem: "ext4", init: "/sbin/init" },
      ...common,
    };
  },
};

/**
 * Finds Debian's static busybox in the cache, or fetches it.
 *
 * @param recipe Suite and mirror
 * @param context Cache, signal and progress
 * @returns Path of the program
 */
export async function debianBusybox(recipe: Chosen, context: BuildContext): Promise<string> {
  const key = storeKey("busybox", archiveOf(recipe, architectureOf(recipe, context)));
  const folder = await packageFiles(recipe, context, `busybox/${key}`, "busybox-static", {
    busybox: ["bin/busybox", "usr/bin/busybox"],
  });
  return join(folder, "busybox");
}

/**
 * Finds Debian's Xen hypervisor in the cache, or fetches it: an image for `qemu({ hypervisor })`.
 *
 * @param context Cache, signal and progress
 * @param recipe Suite, mirror and revision; those of {@linkcode DEFAULT_KERNEL} unless told
 * @returns Path of the hypervisor, which is not compressed
 */
export async function debianXen(context: BuildContext, recipe: Chosen = DEFAULT_KERNEL): Promise<string> {
  const key = storeKey("xen", archiveOf(recipe, "amd64"));
  const { folder } = await storeEntry(context, `xen/${key}`, "the Xen hypervisor", async (part) => {
    const archive = await openArchive({ ...recipe, arch: "amd64" }, context);
    const name = await archive.dependency("xen-system-amd64", /^xen-hypervisor-\d[\d.]*-amd64$/);
    const tree = join(part, "tree");
    await archive.unpack(name, tree);
    const path = join(tree, "boot", `${name.replace("xen-hypervisor-", "xen-")}.gz`);
    using file = await Deno.open(path);
    await Deno.writeFile(join(part, "xen"), file.readable.pipeThrough(new DecompressionStream("gzip")));
    await Deno.remove(tree, { recursive: true });
    return { package: name, version: (await archive.versions([name])).get(name) };
  });
  return join(folder, "xen");
}

/** Files of a PC's firmware. */
export interface PcFirmware {
  /** Path of the BIOS, of 128 KiB. */
  readonly bios: string;
  /** Path of the BIOS of a graphics adapter with VESA modes. */
  readonly vgaBios: string;
}

/**
 * Finds SeaBIOS, as Debian builds it, in the cache, or fetches it.
 *
 * @param context Cache, signal and progress
 * @param recipe Suite and mirror; those of {@linkcode DEFAULT_KERNEL} unless told
 * @returns Paths of its files
 */
export async function debianSeabios(
  context: BuildContext,
  recipe: Chosen = DEFAULT_KERNEL,
): Promise<PcFirmware> {
  // The package is the same for all architectures.
  const key = storeKey("seabios", archiveOf(recipe, "amd64"));
  const folder = await packageFiles(recipe, context, `seabios/${key}`, "seabios", {
    "bios.bin": ["usr/share/seabios/bios.bin"],
    "vgabios.bin": ["usr/share/seabios/vgabios-stdvga.bin"],
  });
  return { bios: join(folder, "bios.bin"), vgaBios: join(folder, "vgabios.bin") };
}

/**
 * Makes an entry of the cache of files of a package.
 *
 * @param files Where each file may be in the package, by its name in the entry
 * @returns Folder of the entry
 */
async function packageFiles(
  recipe: Chosen,
  context: BuildContext,
  entry: string,
  name: string,
  files: Readonly<Record<string, readonly string[]>>,
): Promise<string> {
  const { folder } = await storeEntry(context, entry, `the files of "${name}"`, async (part) => {
    const archive = await openArchive(recipe, context);
    const tree = join(part, "tree");
    await archive.unpack(name, tree);
    for (const [target, places] of Object.entries(files)) {
      await Deno.rename(await firstThere(places.map((place) => join(tree, place))), join(part, target));
    }
    await Deno.remove(tree, { recursive: true });
    return { version: (await archive.versions([name])).get(name) };
  });
  return folder;
}

/** The kernel of images that bring none, such as {@linkcode directory}. */
export const DEFAULT_KERNEL: Chosen = { type: "debian", suite: "bookworm", flavour: "cloud" };

async function buildRoot(
  recipe: Chosen,
  packages: readonly string[],
  kernel: BuiltKernel,
  context: BuildContext,
): Promise<{ key: string; path: string; bytes: number }> {
  const bytes = parseSize((recipe.size as string | undefined) ?? DEFAULT_SIZE);
  const wanted = [...new Set([...BASE_PACKAGES, ...packages])].sort();
  const options = optionsOf(recipe, context);
  const key = storeKey(
    "debian-root",
    archiveOf(recipe, options.arch),
    wanted,
    kernel.key,
    bytes,
  );
  const { folder } = await storeEntry(
    context,
    `roots/${key}`,
    `the Debian image with ${packages.join(", ") || "no packages"}`,
    async (part) => {
      const apt = await Apt.open(context, options);
      const versions = await apt.versions(wanted);
      const image = join(part, "root.ext4");
      await runMmdebstrap(options, apt, wanted, kernel, image, bytes, context);
      return { packages: Object.fromEntries(versions) };
    },
  );
  return { key, path: join(folder, "root.ext4"), bytes };
}

async function runMmdebstrap(
  options: DebianArchiveChoice,
  apt: Apt,
  packages: readonly string[],
  kernel: BuiltKernel,
  image: string,
  bytes: number,
  context: BuildContext,
): Promise<void> {
  const modules = kernel.modules!;
  const release = basename(modules);
  const isRoot = Deno.uid() === 0;
  const tree = join(dirname(image), "tree");
  const sizeOption = `${Math.floor(bytes / 1024)}k`;
  const makeFileSystem = ["-q", "-t", "ext4", "-L", "root", "-m", "0", "-E", "root_owner=0:0"];
  const hooks = [
    `mkdir -p "$1/lib/modules"`,
    `copy-in ${quote(modules)} /lib/modules`,
    `chroot "$1" depmod ${quote(release)}`,
    `rm -f "$1/etc/hostname" "$1/etc/machine-id"; : >"$1/etc/machine-id"`,
    `rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/*_*`,
    // Files of another user's namespace cannot be read from outside of it: the disk is made inside, from a bind mount
    // that shows the tree without its /proc and /sys, and comes out through a pipe.
    ...(isRoot ? [] : [
      `mkdir "$1.plain" && mount --bind "$1" "$1.plain"`,
      `mke2fs ${makeFileSystem.join(" ")} -d "$1.plain" "$1.ext4" ${sizeOption}`,
      `umount "$1.plain" && rmdir "$1.plain"`,
      `mv "$1.ext4" "$1/image.ext4"`,
      `download /image.ext4 ${quote(image)}`,
    ]),
  ];
  const env = { PATH: `${Deno.env.get("PATH") ?? ""}:/usr/sbin:/sbin` };
  await runTool(
    "mmdebstrap",
    [
      "--variant=minbase",
      ...(isRoot ? ["--mode=root", "--format=directory"] : ["--mode=unshare", "--format=null"]),
      `--architectures=${options.arch}`,
      // A kernel for amd64 runs programs for i386 without the emulator that mmdebstrap would look for.
      ...(options.arch === "i386" ? ["--skip=check/qemu"] : []),
      `--include=${packages.join(",")}`,
      "--dpkgopt=path-exclude=/usr/share/man/*",
      "--dpkgopt=path-exclude=/usr/share/locale/*",
      "--dpkgopt=path-exclude=/usr/share/doc/*",
      "--dpkgopt=path-include=/usr/share/doc/*/copyright",
      ...(await aptAcquireOptions(context)).map((option) => `--aptopt=${option}`),
      ...hooks.map((hook) => `--customize-hook=${hook}`),
      options.suite,
      isRoot ? tree : "/dev/null",
      apt.sourcesFile,
    ],
    context,
    {
      package: "mmdebstrap",
      env,
      onLine(line) {
        const next = /^I: ((downloading|extracting|installing) .*?)(\.\.\.)?$/.exec(line)?.[1];
        if (next !== undefined) context.report(`building the root file system: ${next}`);
      },
    },
  );
  context.report("building the root file system: making the disk");
  if (isRoot) {
    await runTool("mke2fs", [...makeFileSystem, "-d", tree, image, sizeOption], context, {
      package: "e2fsprogs",
      env,
    });
    await Deno.remove(tree, { recursive: true });
  } else {
    // The way out through the pipe has filled the holes of the file.
    await runTool("cp", ["--sparse=always", image, `${image}.sparse`], context, { package: "coreutils" });
    await Deno.rename(`${image}.sparse`, image);
  }
}

/** How the system's apt reaches its mirrors: proxies, certificates and the like hold for the new system's build too. */
async function aptAcquireOptions(context: BuildContext): Promise<string[]> {
  const dump = await runTool(
    "apt-config",
    ["dump", "--no-empty", "--format", '%F "%v";%n', "Acquire"],
    context,
    { package: "apt" },
  );
  return dump.split("\n").filter((line) =>
    /^Acquire::(http|https|ftp|Check-|Max-|Retries|ForceIPv|SOCKS)/i.test(line) &&
    !/::(Dl-Limit|User-Agent)/.test(line)
  ).map((line) => line.replace(/;$/, ""));
}

async function firstThere(paths: readonly string[]): Promise<string> {
  for (const path of paths) {
    try {
      await Deno.stat(path);
      return path;
    } catch {
      // The next one.
    }
  }
  throw new MachineError(`Cannot find "${paths[0]}" in the unpacked package: its layout is not known`);
}

function quote(path: string): string {
  return `'${path.replaceAll("'", "'\\''")}'`;
}
