/**
 * Images made elsewhere: files of this host, or downloads that are checked.
 *
 * @module
 */

import { Choice, type Chosen, type ImageSource, object, oneOf, optional, string } from "../dsl/mod.ts";
import { MachineError } from "../vmm/errors.ts";
import type { BuildContext, BuiltImage, ImageBuilder } from "../vmm/images/builder.ts";
import { sha256, storeKey } from "../vmm/images/store.ts";
import { download, wrongChecksum } from "./download.ts";

/** A file: one of this host, or a download whose digest is known. */
export type FileSource =
  | {
    /** Absolute path. */ readonly path: string; /** Hexadecimal SHA-256, checked where given. */
    readonly sha256?: string;
  }
  | {
    /** Address. */ readonly url: string; /** Hexadecimal SHA-256 of the content. */
    readonly sha256: string;
  };

/** Options of {@linkcode image}. */
export interface ImageOptions {
  /** Root disk. */
  readonly disk?: FileSource;
  /** Format of the root disk; `"qcow2"` unless told. */
  readonly format?: "raw" | "qcow2";
  /** Kernel; without one, firmware boots the disk. */
  readonly kernel?: FileSource;
  /** Initramfs of that kernel. */
  readonly initramfs?: FileSource;
  /** Kernel command line. */
  readonly cmdline?: string;
}

const fileSchema = object({
  path: optional(string({ pattern: /^\//, description: "an absolute path" })),
  url: optional(
    string({ pattern: /^https?:\/\/\S+$/, description: "an address that begins with http:// or https://" }),
  ),
  sha256: optional(string({ pattern: /^[0-9a-f]{64}$/, description: "64 hexadecimal digits in lower case" })),
});

/**
 * An image made elsewhere. When a file of this host has changed whose checksum is not given, the next plan recreates
 * the machine. Such guests do not have our agent: give them a readiness probe of their own.
 *
 * @param options Disk, kernel and initramfs
 * @returns The image, for a machine's `image`
 *
 * @example
 * ```ts
 * import { image } from "hypertopia/stdlib";
 *
 * const appliance = image({ disk: { path: "/srv/images/appliance.qcow2" } });
 * ```
 */
export function image(options: ImageOptions): ImageSource {
  const schema = object({
    disk: optional(fileSchema),
    format: optional(oneOf("raw", "qcow2"), "qcow2"),
    kernel: optional(fileSchema),
    initramfs: optional(fileSchema),
    cmdline: optional(string()),
  });
  return new Choice("image", "image", schema, options);
}

/** Bytes to read of a file, and what those of a qcow2 image begin with (QEMU 7.2 `docs/interop/qcow2.txt`). */
const HEADER = 32;
const QCOW2_MAGIC = 0x514649fb;

type Format = "raw" | "qcow2";

interface Source {
  readonly path?: string;
  readonly url?: string;
  readonly sha256?: string;
}

/** Builds {@linkcode image}. */
export const imageBuilder: ImageBuilder = {
  type: "image",
  isForeign: true,
  needsFirmware: (recipe) => recipe.kernel === undefined,
  check,
  async fingerprint(recipe): Promise<string | undefined> {
    const keys: string[] = [];
    for (const { path, sha256 } of sources(recipe)) {
      if (path !== undefined && sha256 === undefined) keys.push((await look(path)).key);
    }
    return keys.length === 0 ? undefined : storeKey(...keys);
  },
  async build(recipe, context): Promise<BuiltImage> {
    await check(recipe);
    const { disk, kernel, initramfs } = recipe as Record<string, Source | undefined>;
    const diskFile = disk && await fetchFile(disk, context);
    const kernelFile = kernel && await fetchFile(kernel, context);
    const initramfsFile = initramfs && await fetchFile(initramfs, context);
    const format = recipe.format as Format;
    return {
      key: storeKey("image", diskFile?.key, kernelFile?.key, initramfsFile?.key),
      kernel: kernelFile && { key: kernelFile.key, kernel: kernelFile.path, modules: undefined },
      // A kernel of the user's gets the user's initramfs or none.
      initramfs: initramfsFile?.path ?? "",
      modules: [],
      root: diskFile && { path: diskFile.path, format, size: capacity(await look(diskFile.path), format) },
      cmdline: (recipe.cmdline as string | undefined) ?? "",
    };
  },
};

function sources(recipe: Chosen): Source[] {
  const { disk, kernel, initramfs } = recipe as Record<string, Source | undefined>;
  return [disk, kernel, initramfs].filter((source) => source !== undefined);
}

/** Refuses what is plainly wrong, without downloads and without reading whole files. */
async function check(recipe: Chosen): Promise<void> {
  const { disk, kernel } = recipe as Record<string, Source | undefined>;
  if (!disk && !kernel) {
    throw new MachineError("Cannot build an image without a disk and without a kernel: give one");
  }
  for (const source of sources(recipe)) {
    const { path, url, sha256 } = source;
    if (url !== undefined) {
      if (sha256 !== undefined) continue;
      throw new MachineError(`Cannot download "${url}" without its checksum: give sha256`);
    }
    if (path === undefined) {
      throw new MachineError('Cannot find a file of an image: give "path", or "url" and "sha256"');
    }
    const file = await look(path);
    if (source === disk) capacity(file, recipe.format as Format);
  }
}

async function fetchFile(source: Source, context: BuildContext): Promise<{ path: string; key: string }> {
  // One of the two is there, and the checksum of a download too.
  if (source.url !== undefined) {
    return { path: await download(source.url, { sha256: source.sha256! }, context), key: source.sha256! };
  }
  const path = source.path!;
  if (source.sha256 === undefined) return { path, key: (await look(path)).key };
  context.report(`checking ${path}`);
  const found = await sha256(path);
  if (found !== source.sha256) throw wrongChecksum(path, source.sha256, found);
  return { path, key: source.sha256 };
}

interface LocalFile {
  readonly path: string;
  readonly size: number;
  /** Tells it from what it may be later. */
  readonly key: string;
  /** Its first bytes; zeros where it is shorter. */
  readonly header: DataView;
}

/** Looks at a file, and reads its header only. */
async function look(path: string): Promise<LocalFile> {
  const refuse = (reason: string, cause?: unknown) =>
    new MachineError(`Cannot use the image file "${path}" as ${reason}: correct its path`, { cause });
  try {
    const { isFile, size, mtime } = await Deno.stat(path);
    // Opening a pipe would wait for its other end.
    if (!isFile) throw refuse("it is not a regular file");
    using file = await Deno.open(path);
    const header = new Uint8Array(HEADER);
    await file.read(header);
    return {
      path,
      size,
      key: storeKey(path, size, mtime?.getTime()),
      header: new DataView(header.buffer),
    };
  } catch (cause) {
    if (cause instanceof MachineError) throw cause;
    if (cause instanceof Deno.errors.NotFound) throw refuse("it does not exist", cause);
    throw refuse(cause instanceof Error ? cause.message : String(cause), cause);
  }
}

/** Capacity of a disk image: the file's own size for raw, the header's field for qcow2. */
function capacity({ path, size, header }: LocalFile, format: Format): number {
  if (format === "qcow2" && header.getUint32(0) !== QCOW2_MAGIC) {
    throw new MachineError(`Cannot use "${path}" as a qcow2 image as it is not one: set format to "raw"`);
  }
  const bytes = format === "raw" ? size : Number(header.getBigUint64(24));
  if (bytes === 0 || !Number.isSafeInteger(bytes)) {
    throw new MachineError(
      `Cannot use "${path}" as a disk as its capacity is ${bytes} bytes: give the image of a disk`,
    );
  }
  return bytes;
}
