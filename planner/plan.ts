/**
 * The plan: plain, serialisable data. What is saved is what is applied.
 *
 * @module
 */

import type { Diagnostic } from "../dsl/mod.ts";
import type { DisruptionClass, Json } from "./kind.ts";

/** What happens to a resource. */
export type Action = "no-op" | "create" | "update" | "replace" | "delete" | "forget";

/** Why it happens, where that is not plain from the fields. Values are OpenTofu's where it has one. */
export type ActionReason =
  | "replace_because_cannot_update"
  | "replace_by_request"
  | "replace_by_triggers"
  | "delete_because_no_resource_config"
  | "resume_interrupted"
  | "wait_until_ready"
  | "adopt"
  | "missing"
  | "deposed";

/** One field that changes. */
export interface FieldChange {
  /** Path of the field. */
  readonly field: string;
  /** Value before, secrets marked. */
  readonly before: unknown;
  /** Value after, secrets and unknowns marked. */
  readonly after: unknown;
  /** How much it disturbs. */
  readonly disruption: DisruptionClass;
  /** By what means. */
  readonly mechanism?: string;
}

/** What happens to one resource. */
export interface Change {
  /** Address. */
  readonly address: string;
  /** Which object of the address; empty for the current one. */
  readonly deposed: string;
  /** Kind. */
  readonly kind: string;
  /** What happens. */
  readonly action: Action;
  /** Why. */
  readonly reason?: ActionReason;
  /** The address on record, where the resource moves. */
  readonly movedFrom?: string;
  /** Worst class of its fields; `recreate` for a replacement, a deletion too. */
  readonly disruption: DisruptionClass;
  /** The fields that change. */
  readonly fields: readonly FieldChange[];
  /** Props before. */
  readonly before: Json | undefined;
  /** Props after. */
  readonly after: Json | undefined;
  /** Live outputs, where they are not those on record. */
  readonly outputs?: Json;
  /** Addresses of others whose use of this resource is cut meanwhile. */
  readonly affects: readonly string[];
}

/** One field whose live value is not the recorded one. */
export interface Drift {
  /** Address. */
  readonly address: string;
  /** Kind. */
  readonly kind: string;
  /** Whether the object is gone altogether. */
  readonly isGone: boolean;
  /** The fields. */
  readonly fields: readonly { readonly field: string; readonly before: unknown; readonly after: unknown }[];
}

/** A change of one of the stack's own outputs. */
export interface OutputChange {
  /** Value before; undefined where there was none. */
  readonly before: unknown;
  /** Value after; undefined where it goes away. */
  readonly after: unknown;
}

/** One step of an apply. */
export interface Operation {
  /** What is done. `depose` sets the current object aside, for a replacement that is made first. */
  readonly type: "create" | "update" | "delete" | "forget" | "refresh" | "depose";
  /** Address. */
  readonly address: string;
  /** Which object of the address; empty for the current one. */
  readonly deposed: string;
  /** Identity of the object. */
  readonly id: string;
  /** Generation of the object. */
  readonly generation: number;
  /** Index of its change. */
  readonly change: number;
  /** Indexes of the operations that must be done before. */
  readonly after: readonly number[];
}

/** A plan. */
export interface Plan {
  /** Name of the stack. */
  readonly stack: string;
  /** Lineage of the state that it was made from. */
  readonly lineage: string;
  /** Serial of the state that it was made from. */
  readonly serial: number;
  /** When it was made, as ISO 8601. */
  readonly created: string;
  /** Digest of the declarations that it was made from. */
  readonly configuration: string;
  /** Variables that the declarations were evaluated with. */
  readonly variables: Readonly<Record<string, string | number | boolean>>;
  /** How it was asked for. */
  readonly mode: "normal" | "destroy" | "refresh-only";
  /** All resources, unchanged ones too. */
  readonly changes: readonly Change[];
  /** What the world shows that is not on record. */
  readonly drift: readonly Drift[];
  /** The stack's own outputs, those that change. */
  readonly outputs: Readonly<Record<string, OutputChange>>;
  /** The steps. */
  readonly operations: readonly Operation[];
  /** What is worth saying and stops nothing. */
  readonly warnings: readonly Diagnostic[];
}

/** How many resources each action takes. */
export interface PlanSummary {
  /** Created, replaced ones too. */
  readonly add: number;
  /** Updated. */
  readonly change: number;
  /** Destroyed, replaced ones too. */
  readonly destroy: number;
  /** Forgotten. */
  readonly forget: number;
  /** Worst disruption. */
  readonly disruption: DisruptionClass;
}

/**
 * Tells whether applying a plan does anything.
 *
 * @param plan The plan
 * @returns Whether there is a step to do, or an output that changes
 */
export function hasChanges(plan: Plan): boolean {
  return plan.operations.length > 0 || Object.keys(plan.outputs).length > 0 ||
    plan.changes.some((change) => change.movedFrom !== undefined);
}
