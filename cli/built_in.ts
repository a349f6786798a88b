/**
 * What the CLI brings along: engines, image builders and kinds.
 *
 * @module
 */

import type { AnyKind } from "../planner/mod.ts";
import {
  debianBuilder,
  debianKernelBuilder,
  directoryBuilder,
  hostKernelBuilder,
  imageBuilder,
} from "../stdlib/mod.ts";
import { type Engine, hostPaths, KvmEngine, machineKinds, type Paths, QemuEngine } from "../vmm/mod.ts";
import type { CliOptions } from "./run.ts";

/**
 * The engines of this release, most preferred first.
 *
 * @param paths Folders of this host
 * @returns The engines
 */
export function builtInEngines(paths: Paths = hostPaths()): Engine[] {
  return [new KvmEngine(paths), new QemuEngine(paths)];
}

/**
 * The kinds of this release, with what the user adds.
 *
 * @param options The user's engines and builders
 * @param paths Folders of this host
 * @returns Kinds by name
 */
export function builtInKinds(options: CliOptions = {}, paths: Paths = hostPaths()): Map<string, AnyKind> {
  return machineKinds({
    paths,
    engines: options.engines ?? builtInEngines(paths),
    images: [debianBuilder, directoryBuilder, imageBuilder, ...(options.images ?? [])],
    kernels: [debianKernelBuilder, hostKernelBuilder, ...(options.kernels ?? [])],
  });
}
