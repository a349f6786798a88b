/**
 * The host's own kernel.
 *
 * @module
 */

import { join } from "node:path";
import { type ArchitectureMark, Choice, type KernelSource, object, optional, string } from "../dsl/mod.ts";
import { MachineError } from "../vmm/errors.ts";
import { exists } from "../vmm/files.ts";
import type { BuiltKernel, KernelBuilder } from "../vmm/images/builder.ts";
import { sha256, storeKey } from "../vmm/images/store.ts";

/** Options of {@linkcode hostKernel}. */
export interface HostKernelOptions {
  /** Release, such as `6.1.0-30-amd64`; that of the running kernel unless told. */
  readonly release?: string;
  /** Path of the bzImage; `/boot/vmlinuz-RELEASE` unless told. */
  readonly path?: string;
  /** Folder of its modules; `/lib/modules/RELEASE` unless told. */
  readonly modules?: string;
}

/**
 * The kernel that the host runs, for a machine's `kernel`.
 *
 * @param options Another release, or other paths
 * @returns The kernel
 *
 * @example
 * ```ts
 * import { vm } from "hypertopia";
 * import { debian, hostKernel } from "hypertopia/stdlib";
 *
 * const twin = vm({ memory: "256MiB", image: debian(), kernel: hostKernel() });
 * ```
 */
export function hostKernel(options: HostKernelOptions = {}): KernelSource & ArchitectureMark<"amd64"> {
  const absolute = string({ pattern: /^\//, description: "an absolute path" });
  const schema = object({
    release: optional(string({ pattern: /^[\w.+~-]+$/, description: "a kernel release" })),
    path: optional(absolute),
    modules: optional(absolute),
  });
  return new Choice("kernel", "host", schema, options);
}

/** Builds {@linkcode hostKernel}. */
export const hostKernelBuilder: KernelBuilder = {
  type: "host",
  async build(recipe, _context): Promise<BuiltKernel> {
    const release = (recipe.release as string | undefined) ?? Deno.osRelease();
    const kernel = (recipe.path as string | undefined) ?? `/boot/vmlinuz-${release}`;
    const modules = (recipe.modules as string | undefined) ?? join("/lib/modules", release);
    if (!(await exists(kernel))) {
      throw new MachineError(
        `Cannot use the host's kernel as "${kernel}" does not exist: name the file with hostKernel({ path }), ` +
          `or leave "kernel" out to use the image's own`,
      );
    }
    return {
      key: storeKey("host-kernel", await sha256(kernel)),
      kernel,
      modules: await exists(modules) ? modules : undefined,
    };
  },
};
