/**
 * Disks: storage that outlives the machines that use it.
 *
 * @module
 */

import type { Inputs } from "./output.ts";
import { declare, type KindDefinition, type LifecycleOptions, type ResourceWith } from "./resource.ts";
import { object, oneOf, optional, size } from "./schema.ts";
import type { Size } from "./units.ts";

/** Props of a {@linkcode disk}. */
export interface DiskProps {
  /** Capacity. It can grow while a machine uses it; to shrink is to recreate. */
  readonly size: Size;
  /** How it is stored: a sparse `raw` file, or `qcow2`. */
  readonly format?: "raw" | "qcow2";
  /** File system to make on it when it is created; none unless told. Needs the format `raw`. */
  readonly filesystem?: "ext4";
}

/** What is known of a disk after apply. */
export interface DiskOutputs {
  /** Path of the file on the host. */
  readonly path: string;
  /** Serial number that the guest sees, in `/dev/disk/by-id` too. */
  readonly serial: string;
}

/** A declared disk. */
export type Disk = ResourceWith<DiskOutputs>;

/** Marks disks of one format. The mark is for the compiler only: at run time nothing has it. */
export interface FormatMark<F extends string> {
  /** The format, for the compiler only: never there at run time. */
  readonly format?: F;
}

/** The mark of a disk whose prop `format` has the type `F`; none where it is `raw`, or known at run time only. */
export type OfFormat<F> = [F] extends ["qcow2"] ? FormatMark<"qcow2"> : unknown;

/** Kind of {@linkcode disk}. */
export const diskDefinition: KindDefinition<DiskProps> = {
  name: "disk",
  schema: object({
    size: size({ min: "1MiB", max: "64TiB" }),
    format: optional(oneOf("raw", "qcow2"), "raw"),
    filesystem: optional(oneOf("ext4")),
  }),
};

/**
 * Declares a disk.
 *
 * @typeParam F The format, where it is known at edit time
 * @param props Size and format
 * @param options Lifecycle options; `{ protect: true }` suits data
 * @returns The disk
 *
 * @example
 * ```ts
 * import { disk } from "hypertopia";
 *
 * const data = disk({ size: "8GiB", filesystem: "ext4" }, { protect: true });
 * ```
 */
export function disk<F extends Inputs<DiskProps>["format"] = "raw">(
  props: Inputs<DiskProps> & { readonly format?: F },
  options?: LifecycleOptions,
): Disk & OfFormat<F> {
  const declared = declare<DiskProps, DiskOutputs>(diskDefinition, props, options, ["path", "serial"]);
  return declared as Disk & OfFormat<F>;
}
