/**
 * Plans and state, for people.
 *
 * @module
 */

import { type Action, type Change, type Plan, type ResourceRecord, summarise } from "../planner/mod.ts";
import { formatDiagnostic } from "../dsl/mod.ts";
import { shortValue, type Style } from "./style.ts";

const SIGNS: Record<Action, string> = {
  "no-op": " ",
  create: "+",
  update: "~",
  replace: "±",
  delete: "-",
  forget: "×",
};

const REASONS: Partial<Record<string, string>> = {
  replace_because_cannot_update: "",
  replace_by_request: "asked for with --replace",
  replace_by_triggers: "replaceOn",
  resume_interrupted: "continues what was interrupted",
  wait_until_ready: "was not ready yet",
  adopt: "takes over what exists",
  missing: "is gone",
  deposed: "left over from a replacement",
};

/**
 * Writes a plan.
 *
 * @param plan The plan
 * @param style Colours
 * @returns Lines of text
 */
export function renderPlan(plan: Plan, style: Style): string {
  const lines: string[] = [];
  if (plan.drift.length > 0) {
    lines.push("Changed outside of this stack since the last apply:");
    for (const drift of plan.drift) {
      if (drift.isGone) lines.push(`  ${style.red("-")} ${drift.address}  ${style.dim(drift.kind)}  is gone`);
      for (const { field, before, after } of drift.fields) {
        lines.push(
          `  ${style.yellow("~")} ${drift.address}  ${style.dim(drift.kind)}  ${field} ${
            shortValue(before)
          } → ${shortValue(after)}`,
        );
      }
    }
    lines.push("");
  }
  const shown = plan.changes.filter((change) => change.action !== "no-op" || change.movedFrom !== undefined);
  const widths = {
    address: Math.max(4, ...shown.map((change) => change.address.length)),
    kind: Math.max(4, ...shown.map((change) => change.kind.length)),
  };
  for (const change of shown) lines.push(...renderChange(change, widths, style));
  for (const [name, { before, after }] of Object.entries(plan.outputs)) {
    const sign = before === undefined
      ? style.green("+")
      : after === undefined
      ? style.red("-")
      : style.yellow("~");
    const value = before === undefined || after === undefined
      ? shortValue(after ?? before)
      : `${shortValue(before)} → ${shortValue(after)}`;
    lines.push(`  ${sign} output ${name} = ${value}`);
  }
  for (const warning of plan.warnings) lines.push(style.yellow(`Warning: ${formatDiagnostic(warning)}`));
  if (shown.length === 0 && Object.keys(plan.outputs).length === 0) {
    lines.push(
      plan.mode === "refresh-only"
        ? "No drift. What is on record is what exists."
        : plan.mode === "destroy"
        ? "Nothing to destroy."
        : "No changes. What exists is what is declared.",
    );
    return lines.join("\n");
  }
  const { add, change, destroy, forget, disruption } = summarise(plan);
  lines.push(
    `Plan: ${add} to add, ${change} to change, ${destroy} to destroy${
      forget > 0 ? `, ${forget} to forget` : ""
    }.` +
      (disruption === "none" ? "" : ` Worst disruption: ${disruption}.`),
  );
  return lines.join("\n");
}

function renderChange(change: Change, widths: { address: number; kind: number }, style: Style): string[] {
  const { address, action, kind, fields, affects } = change;
  const paint = action === "create"
    ? style.green
    : action === "delete" || action === "replace"
    ? style.red
    : action === "update"
    ? style.yellow
    : style.dim;
  const disruption = action === "update" || action === "replace" ? change.disruption : "";
  const notes: string[] = [];
  if (change.movedFrom !== undefined) notes.push(`moved from ${change.movedFrom}`);
  const reason = change.reason === undefined ? "" : REASONS[change.reason] ?? "";
  if (reason !== "") notes.push(reason);
  const head =
    `  ${paint(SIGNS[action])} ${address.padEnd(widths.address)}  ${paint(disruption.padEnd(8))}  ` +
    `${style.dim(kind.padEnd(widths.kind))}`;
  const details = fields.map(({ field, before, after, mechanism, disruption: each }) =>
    `${field === "" ? "kind" : field} ${shortValue(before)} → ${shortValue(after)}` +
    (mechanism || fields.length > 1
      ? style.dim(`  (${[fields.length > 1 ? each : "", mechanism ?? ""].filter((part) => part).join(": ")})`)
      : "")
  );
  if (action === "create") details.push(summaryOf(change));
  if (affects.length > 0) details.push(`also cuts: ${affects.join(", ")}`);
  if (notes.length > 0) details.unshift(notes.join("; "));
  const indent = " ".repeat(4 + widths.address + 2 + 8 + 2 + widths.kind + 2);
  return [
    `${head}  ${details[0] ?? ""}`.trimEnd(),
    ...details.slice(1).map((detail) => `${indent}${detail}`),
  ];
}

/** The plain values of a new resource's own fields. */
function summaryOf(change: Change): string {
  const parts: string[] = [];
  for (const [name, value] of Object.entries(change.after ?? {})) {
    if (value === null || typeof value === "boolean") continue;
    if (typeof value !== "object") parts.push(`${name} ${shortValue(value, 40)}`);
    else if ("type" in value && typeof value.type === "string") parts.push(`${name} ${value.type}`);
  }
  const text = parts.join(", ");
  return text.length > 60 ? `${text.slice(0, 59)}…` : text;
}

/**
 * Writes one record in full.
 *
 * @param record The record
 * @param showSensitive Whether to show secrets
 * @returns Lines of text
 */
export function renderRecord(record: ResourceRecord, showSensitive: boolean): string {
  const value = (each: unknown) =>
    JSON.stringify(
      each,
      (_, inner) =>
        typeof inner === "object" && inner !== null && "$secret" in inner
          ? showSensitive ? inner.$secret : "(sensitive)"
          : inner,
      2,
    );
  return [
    `# ${record.address}${
      record.deposed === "" ? "" : ` (deposed ${record.deposed})`
    }: ${record.kind}, ${record.status}, id ${record.id}`,
    `props = ${value(record.props)}`,
    `outputs = ${value(record.outputs ?? {})}`,
    ...(record.dependencies.length > 0 ? [`depends on ${record.dependencies.join(", ")}`] : []),
  ].join("\n");
}
