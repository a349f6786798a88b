/**
 * Plans and state in OpenTofu's JSON shapes, so that policy and review tools read them unchanged.
 *
 * @module
 */

import { isSecret, isUnknown } from "../dsl/mod.ts";
import type { Json } from "./kind.ts";
import type { Action, Change, Plan } from "./plan.ts";
import type { ResourceRecord } from "./state.ts";
import { transform } from "./values.ts";

/** Version of the JSON plan, as OpenTofu counts it. */
export const JSON_FORMAT_VERSION = "1.2";

const ACTIONS: Record<Action, readonly string[]> = {
  "no-op": ["no-op"],
  create: ["create"],
  update: ["update"],
  replace: ["delete", "create"],
  delete: ["delete"],
  forget: ["forget"],
};

const REASONS: ReadonlySet<string> = new Set([
  "replace_because_cannot_update",
  "replace_by_request",
  "replace_by_triggers",
  "delete_because_no_resource_config",
]);

/**
 * Writes a plan in OpenTofu's JSON shape. Secrets are left out.
 *
 * @param plan The plan
 * @param records The records that it was made from
 * @returns The JSON value
 */
export function jsonPlan(plan: Plan, records: readonly ResourceRecord[]): Json {
  const hidden = secretTexts([plan.changes, plan.outputs]);
  return {
    format_version: JSON_FORMAT_VERSION,
    hypertopia: { stack: plan.stack, lineage: plan.lineage, serial: plan.serial, mode: plan.mode },
    variables: Object.fromEntries(
      Object.entries(plan.variables).map((
        [name, value],
      ) => [name, hidden.has(String(value)) ? {} : { value }]),
    ),
    planned_values: {
      root_module: {
        resources: plan.changes.filter((each) => each.after !== undefined).map((each) => ({
          ...identity(each.address, each.kind),
          values: clean(each.after),
          sensitive_values: marks(each.after, isSecret),
        })),
      },
    },
    resource_changes: plan.changes.map(jsonChange),
    resource_drift: plan.drift.map((drift) => ({
      ...identity(drift.address, drift.kind),
      change: {
        actions: drift.isGone ? ["delete"] : ["update"],
        before: Object.fromEntries(drift.fields.map(({ field, before }) => [field, clean(before)])),
        after: drift.isGone
          ? null
          : Object.fromEntries(drift.fields.map(({ field, after }) => [field, clean(after)])),
      },
    })),
    output_changes: Object.fromEntries(
      Object.entries(plan.outputs).map(([name, { before, after }]) => [name, {
        actions: before === undefined ? ["create"] : after === undefined ? ["delete"] : ["update"],
        before: clean(before) ?? null,
        after: clean(after) ?? null,
        after_unknown: marks(after, isUnknown),
        before_sensitive: marks(before, isSecret),
        after_sensitive: marks(after, isSecret),
      }]),
    ),
    prior_state: jsonState(records),
    timestamp: plan.created,
    errored: false,
  };
}

/**
 * Writes one change in OpenTofu's JSON shape.
 *
 * @param change The change
 * @returns The JSON value
 */
export function jsonChange(change: Change): Json {
  return {
    ...identity(change.address, change.kind),
    ...(change.deposed === "" ? {} : { deposed: change.deposed }),
    ...(change.movedFrom === undefined ? {} : { previous_address: change.movedFrom }),
    ...(change.reason !== undefined && REASONS.has(change.reason) ? { action_reason: change.reason } : {}),
    change: {
      actions: ACTIONS[change.action],
      before: change.before === undefined ? null : clean(change.before),
      after: change.after === undefined ? null : clean(change.after),
      after_unknown: marks(change.after, isUnknown),
      before_sensitive: marks(change.before, isSecret),
      after_sensitive: marks(change.after, isSecret),
    },
    disruption: {
      class: change.disruption,
      fields: change.fields.map(({ field, disruption, mechanism }) => ({
        field,
        class: disruption,
        mechanism,
      })),
      affects: change.affects,
    },
  };
}

/**
 * Writes records in OpenTofu's JSON shape. Secrets are left out.
 *
 * @param records The records
 * @returns The JSON value
 */
export function jsonState(records: readonly ResourceRecord[]): Json {
  return {
    format_version: "1.0",
    values: {
      root_module: {
        resources: records.map((record) => ({
          ...identity(record.address, record.kind),
          ...(record.deposed === "" ? {} : { deposed_key: record.deposed }),
          values: { ...clean(record.props) as Json, ...clean(record.outputs ?? {}) as Json },
          sensitive_values: marks(record.props, isSecret),
          depends_on: record.dependencies,
          status: record.status,
          id: record.id,
        })),
      },
    },
  };
}

function identity(address: string, kind: string): Json {
  const index = /\[(\d+)\]$/.exec(address);
  const name = index ? address.slice(0, index.index) : address;
  return { address, mode: "managed", type: kind, name, ...(index ? { index: Number(index[1]) } : {}) };
}

/** The clear texts of all secrets inside. */
function secretTexts(value: unknown, found: Set<string> = new Set()): Set<string> {
  if (isSecret(value)) found.add(String(value.$secret));
  else if (typeof value === "object" && value !== null) {
    for (const each of Object.values(value)) secretTexts(each, found);
  }
  return found;
}

/** Without unknowns and secrets: null stands in their place. */
function clean(value: unknown): unknown {
  return transform(value, (object) => isSecret(object) || isUnknown(object) ? { value: null } : undefined);
}

/** A tree of `true` where a mark stands. */
function marks(value: unknown, test: (value: unknown) => boolean): unknown {
  if (test(value)) return true;
  if (typeof value !== "object" || value === null) return false;
  const found = Object.entries(value).map(([key, each]) => [key, marks(each, test)] as const)
    .filter(([, each]) =>
      each === true || (typeof each === "object" && Object.keys(each as object).length > 0)
    );
  return Object.fromEntries(found);
}
