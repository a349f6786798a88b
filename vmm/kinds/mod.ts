/**
 * The resource kinds that bind machines to the planner.
 *
 * @module
 */

import type { AnyKind } from "../../planner/mod.ts";
import { diskKind } from "./disk_kind.ts";
import { networkKind } from "./network_kind.ts";
import { vmKind, type VmKindOptions } from "./vm_kind.ts";

export * from "./disk_kind.ts";
export * from "./network_kind.ts";
export * from "./vm_kind.ts";

/**
 * Makes all kinds of machines and what belongs to them.
 *
 * @param options Folders, engines and builders
 * @returns Kinds by name
 */
export function machineKinds(options: VmKindOptions): Map<string, AnyKind> {
  const kinds: AnyKind[] = [vmKind(options), diskKind(options.paths), networkKind()];
  return new Map(kinds.map((kind) => [kind.name, kind]));
}
