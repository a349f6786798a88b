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
import {
  EmulatedEngine,
  type EmulatedEngineOptions,
  type Engine,
  hostPaths,
  KvmEngine,
  machineKinds,
  type Paths,
  QemuEngine,
  XenEngine,
} from "../vmm/mod.ts";
import type { CliOptions } from "./run.ts";

/**
 * The engines of this release, most preferred first.
 *
 * @param paths Folders of this host
 * @param options Whether emulated machines use saved states
 * @returns The engines
 */
export function builtInEngines(paths: Paths = hostPaths(), options: EmulatedEngineOptions = {}): Engine[] {
  return [
    new KvmEngine(paths),
    new XenEngine(paths),
    new QemuEngine(paths),
    new EmulatedEngine(paths, options),
  ];
}

/**
 * The kinds of this release, with what the user adds.
 *
 * @param options The user's engines and builders
 * @param paths Folders of this host
 * @param emulated Whether emulated machines use saved states, where the engines are the built-in ones
 * @returns Kinds by name
 */
export function builtInKinds(
  options: CliOptions = {},
  paths: Paths = hostPaths(),
  emulated: EmulatedEngineOptions = {},
): Map<string, AnyKind> {
  return machineKinds({
    paths,
    engines: options.engines ?? builtInEngines(paths, emulated),
    images: [debianBuilder, directoryBuilder, imageBuilder, ...(options.images ?? [])],
    kernels: [debianKernelBuilder, hostKernelBuilder, ...(options.kernels ?? [])],
  });
}
