/**
 * Images made elsewhere: files of this host, or downloads that are checked.
 *
 * @module
 */

import { Choice, type ImageSource, object, oneOf, optional, string } from "../dsl/mod.ts";
import { MachineError } from "../vmm/errors.ts";
import { exists } from "../vmm/files.ts";
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
 * An image made elsewhere. Such guests do not have our agent: give them a readiness probe of their own.
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
  async build(recipe, context): Promise<BuiltImage> {
    const { disk, kernel, initramfs } = recipe as Record<string, Source | undefined>;
    if (!disk && !kernel) {
      throw new MachineError("Cannot build an image without a disk and without a kernel: give one");
    }
    const diskFile = disk && await fetchFile(disk, context);
    const kernelFile = kernel && await fetchFile(kernel, context);
    const initramfsFile = initramfs && await fetchFile(initramfs, context);
    const format = recipe.format as "raw" | "qcow2";
    return {
      key: storeKey("image", diskFile?.key, kernelFile?.key, initramfsFile?.key),
      kernel: kernelFile && { key: kernelFile.key, kernel: kernelFile.path, modules: undefined },
      // A kernel of the user's gets the user's initramfs or none.
      initramfs: initramfsFile?.path ?? "",
      modules: [],
      root: diskFile && { path: diskFile.path, format, size: await capacity(diskFile.path, format) },
      cmdline: (recipe.cmdline as string | undefined) ?? "",
    };
  },
};

async function fetchFile(source: Source, context: BuildContext): Promise<{ path: string; key: string }> {
  if (source.url !== undefined) {
    if (source.sha256 === undefined) {
      throw new MachineError(`Cannot download "${source.url}" without its checksum: give sha256`);
    }
    return { path: await download(source.url, { sha256: source.sha256 }, context), key: source.sha256 };
  }
  const path = source.path;
  if (path === undefined) {
    throw new MachineError('Cannot find a file of an image: give "path", or "url" and "sha256"');
  }
  if (!(await exists(path))) {
    throw new MachineError(`Cannot use the image file "${path}" as it does not exist`);
  }
  if (source.sha256 !== undefined) {
    context.report(`checking ${path}`);
    const found = await sha256(path);
    if (found !== source.sha256) throw wrongChecksum(path, source.sha256, found);
  }
  const { size, mtime } = await Deno.stat(path);
  return { path, key: source.sha256 ?? storeKey(path, size, mtime?.getTime()) };
}

/** Capacity of a disk image: the file's own size for raw, the header's field for qcow2. */
async function capacity(path: string, format: "raw" | "qcow2"): Promise<number> {
  using file = await Deno.open(path);
  if (format === "raw") return (await file.stat()).size;
  const header = new Uint8Array(32);
  await file.read(header);
  const view = new DataView(header.buffer);
  if (view.getUint32(0) !== 0x514649fb) {
    throw new MachineError(`Cannot use "${path}" as a qcow2 image as it is not one: set format to "raw"`);
  }
  return Number(view.getBigUint64(24));
}
