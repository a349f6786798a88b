/**
 * Diff: desired, recorded and observed in, one change per resource out.
 *
 * @module
 */

import {
  type Declaration,
  type Diagnostic,
  type Graph,
  isOutput,
  isResource,
  isSecret,
  isUnknown,
  problem,
  type Resource,
  type ResourceReference,
  ValidationError,
} from "../dsl/mod.ts";
import { asError, PlannerError } from "./errors.ts";
import {
  covers,
  type Disruption,
  DISRUPTION_CLASSES,
  type DisruptionClass,
  type Draft,
  type Json,
} from "./kind.ts";
import { instanceOf, type Kinds, type Observations, requireKind } from "./observe.ts";
import type { Action, ActionReason, Change, Drift, FieldChange } from "./plan.ts";
import type { ResourceRecord } from "./state.ts";
import {
  equal,
  fieldPath,
  flatten,
  type Lookup,
  overlay,
  pick,
  resolve,
  reveal,
  UNKNOWN,
  withField,
} from "./values.ts";

/** What {@linkcode diff} needs. */
export interface DiffInput {
  /** The declarations. */
  readonly graph: Graph;
  /** Current records by address, after moves. */
  readonly records: ReadonlyMap<string, ResourceRecord>;
  /** The generation of the next object of an address. */
  readonly next: (address: string) => number;
  /** What was seen; undefined where nobody looked. */
  readonly observations: Observations | undefined;
  /** The known kinds. */
  readonly kinds: Kinds;
  /** Addresses to replace in any case. */
  readonly replace: ReadonlySet<string>;
  /** Whether everything is to be destroyed. */
  readonly destroy: boolean;
  /** Old addresses by new ones. */
  readonly moved: ReadonlyMap<string, string>;
}

/** What {@linkcode diff} finds. */
export interface DiffResult {
  /** One change per resource, dependencies first; deletions after them. */
  readonly changes: readonly Change[];
  /** Drift. */
  readonly drift: readonly Drift[];
  /** The stack's own outputs, as far as they are known. */
  readonly outputs: ReadonlyMap<string, unknown>;
  /** Records with live values laid over. */
  readonly live: ReadonlyMap<string, ResourceRecord>;
}

/**
 * Finds the worst of some classes.
 *
 * @param classes The classes
 * @returns The worst one, `none` where there is none
 */
export function worst(classes: Iterable<DisruptionClass>): DisruptionClass {
  let index = 0;
  for (const each of classes) index = Math.max(index, DISRUPTION_CLASSES.indexOf(each));
  return DISRUPTION_CLASSES[index]!;
}

/**
 * Lays live values over records, and lists what differs.
 *
 * @param records The records
 * @param observations What was seen
 * @returns Records with live values, and the drift
 */
export function findDrift(
  records: ReadonlyMap<string, ResourceRecord>,
  observations: Observations | undefined,
): { live: Map<string, ResourceRecord>; drift: Drift[] } {
  const live = new Map<string, ResourceRecord>();
  const drift: Drift[] = [];
  for (const [address, record] of records) {
    const seen = observations?.get(address);
    if (!observations || record.status === "creating" || record.status === "deleting") {
      live.set(address, record);
    } else if (!seen) {
      drift.push({ address, kind: record.kind, isGone: true, fields: [] });
    } else {
      const props = overlay(record.props, seen.props) as Json;
      const outputs = record.outputs && overlay(record.outputs, seen.outputs) as Json;
      const fields = seen.props ? compare(record.props, props) : [];
      if (fields.length > 0) drift.push({ address, kind: record.kind, isGone: false, fields });
      live.set(address, { ...record, props, outputs });
    }
  }
  return { live, drift };
}

/** The fields in which two trees differ. */
function compare(before: unknown, after: unknown): { field: string; before: unknown; after: unknown }[] {
  if (equal(before, after)) return [];
  const a = flatten(before);
  const b = flatten(after);
  const fields: { field: string; before: unknown; after: unknown }[] = [];
  for (const field of new Set([...a.keys(), ...b.keys()])) {
    const from = a.get(field);
    const to = b.get(field);
    if (equal(from, to)) continue;
    // What an empty object or list gains or loses is told by the fields inside.
    const other = isEmpty(from) ? b : isEmpty(to) ? a : undefined;
    if (other && !other.has(field) && [...other.keys()].some((each) => covers(field, each))) continue;
    if (isEmpty(from) && to === undefined || isEmpty(to) && from === undefined) continue;
    fields.push({ field, before: from, after: to });
  }
  return fields;
}

function isEmpty(value: unknown): boolean {
  return typeof value === "object" && value !== null && Object.keys(value).length === 0;
}

/**
 * Compares declarations, records and the world.
 *
 * @param input All three
 * @returns Changes and drift
 * @throws {ValidationError} If a kind refuses a declaration
 */
export async function diff(input: DiffInput): Promise<DiffResult> {
  const { graph, records, kinds, moved } = input;
  const { live, drift } = findDrift(records, input.observations);
  const declared = input.destroy ? [] : graph.resources;
  const changes: Change[] = [];
  const generations = new Map<string, number>();
  for (const { address } of declared) {
    if (!records.has(address)) generations.set(address, input.next(address));
  }
  const known = new Map<string, { outputs: Json; isComplete: boolean }>();
  for (const [address, record] of records) {
    generations.set(address, record.generation);
    if (record.outputs) known.set(address, { outputs: record.outputs, isComplete: true });
  }
  const lookup = lookupOf(graph, generations, known);

  const drafts = await prepare(input, declared, lookup);
  const byAddress = new Map<string, Change>();
  for (const declaration of declared) {
    const draft = drafts.get(declaration.address)!;
    // What it refers to may have been replaced since the draft was made.
    if (declaration.dependencies.length > 0) {
      draft.props = merge(draft.props, declaration, lookup, draft.base, graph.stack);
    }
    const change = compareOne(input, declaration, draft.props, live, byAddress);
    byAddress.set(declaration.address, change);
    changes.push(change);
    const kind = requireKind(kinds, declaration.kind.name, declaration.address);
    const prediction = kind.predict?.(draft) ?? {};
    const isNew = change.action === "create" || change.action === "replace";
    if (change.action === "replace" || change.reason === "missing") {
      generations.set(declaration.address, input.next(declaration.address));
    }
    const recorded = live.get(declaration.address)?.outputs;
    known.set(declaration.address, {
      outputs: isNew ? prediction : overlay(recorded ?? {}, prediction) as Json,
      isComplete: !isNew && recorded !== undefined,
    });
  }

  for (const [address, record] of records) {
    if (!input.destroy && graph.byAddress.has(address)) continue;
    if (!live.has(address) && input.observations) {
      // It is gone already: only the record is left to remove.
      changes.push(deletion(record, "forget", "missing"));
    } else {
      changes.push(
        deletion(
          record,
          record.retain ? "forget" : "delete",
          "delete_because_no_resource_config",
        ),
      );
    }
  }
  const withCascade = cascade(changes, records);
  const outputs = new Map<string, unknown>();
  if (!input.destroy) {
    for (const [name, value] of graph.outputs) {
      try {
        outputs.set(name, resolve(value, lookup));
      } catch (thrown) {
        throw new PlannerError(
          `Cannot compute the output "${name}" as its function threw: ${asError(thrown).message}`,
        );
      }
    }
  }
  return {
    changes: withCascade.map((change) =>
      moved.has(change.address) ? { ...change, movedFrom: moved.get(change.address)! } : change
    ),
    drift,
    outputs,
    live,
  };
}

function lookupOf(
  graph: Graph,
  generations: ReadonlyMap<string, number>,
  known: ReadonlyMap<string, { outputs: Json; isComplete: boolean }>,
): Lookup {
  const addressOf = (resource: Resource): string => {
    const address = graph.addresses.get(resource);
    if (address === undefined) {
      throw new PlannerError(`Cannot resolve an output of a ${resource.kind.name} that is not declared`);
    }
    return address;
  };
  return {
    output(resource, path) {
      const entry = known.get(addressOf(resource));
      const value = pick(entry?.outputs, path);
      return value === undefined ? UNKNOWN : value;
    },
    reference(resource): ResourceReference {
      const address = addressOf(resource);
      return { $resource: address, kind: resource.kind.name, generation: generations.get(address) ?? 0 };
    },
  };
}

interface OwnDraft extends Draft {
  base: Json;
}

/** Resolves all props and lets each kind complete and check its instances together. */
async function prepare(
  input: DiffInput,
  declared: readonly Declaration[],
  lookup: Lookup,
): Promise<Map<string, OwnDraft>> {
  const diagnostics: Diagnostic[] = [];
  const drafts = new Map<string, OwnDraft>();
  const groups = new Map<string, OwnDraft[]>();
  const resolved = new Map<string, Json>();
  for (const declaration of declared) {
    const { address } = declaration;
    const report = (field: string, reason: string, value?: unknown) => {
      diagnostics.push(problem(address, field, reason, declaration.site, value));
    };
    const props = resolveChecked(declaration, lookup, report);
    resolved.set(address, props);
    const recorded = input.records.get(address)?.outputs;
    const references = new Map<string, Json>();
    for (const target of declaration.dependencies) references.set(target, resolved.get(target) ?? {});
    const draft: OwnDraft = {
      address,
      stack: input.graph.stack,
      props,
      base: props,
      recorded: recorded && reveal(recorded) as Json,
      references,
      report,
    };
    drafts.set(address, draft);
    const group = groups.get(declaration.kind.name);
    if (group) group.push(draft);
    else groups.set(declaration.kind.name, [draft]);
  }
  for (const [name, group] of groups) {
    await requireKind(input.kinds, name, group[0]!.address).prepare?.(group);
  }
  if (diagnostics.length > 0) throw new ValidationError(input.graph.stack, diagnostics);
  return drafts;
}

/** Resolves a declaration's props; values that came from elsewhere are checked against the schema again. */
export function resolveChecked(
  declaration: Declaration,
  lookup: Lookup,
  report: (field: string, reason: string, value?: unknown) => void,
): Json {
  try {
    const value = resolve(declaration.props, lookup);
    return (hasOutput(declaration.props) ? declaration.kind.schema.check(value, "", report) : value) as Json;
  } catch (thrown) {
    if (thrown instanceof PlannerError) throw thrown;
    report("", `Cannot compute a value from outputs as a function in it threw: ${asError(thrown).message}`);
    return declaration.props as Json;
  }
}

function hasOutput(value: unknown): boolean {
  if (isOutput(value)) return true;
  if (isResource(value) || typeof value !== "object" || value === null) return false;
  return Object.values(value).some(hasOutput);
}

/** Resolves again and keeps what {@linkcode Kind.prepare} added. */
function merge(prepared: Json, declaration: Declaration, lookup: Lookup, base: Json, stack: string): Json {
  const diagnostics: Diagnostic[] = [];
  let result: unknown = resolveChecked(declaration, lookup, (field, reason, value) => {
    diagnostics.push(problem(declaration.address, field, reason, declaration.site, value));
  });
  if (diagnostics.length > 0) throw new ValidationError(stack, diagnostics);
  for (const { field, before, after } of compare(base, prepared)) {
    if (!isUnknown(before) || !isUnknown(after)) result = withField(result, field, after);
  }
  return result as Json;
}

function compareOne(
  input: DiffInput,
  declaration: Declaration,
  desired: Json,
  live: ReadonlyMap<string, ResourceRecord>,
  changes: ReadonlyMap<string, Change>,
): Change {
  const { address } = declaration;
  const kind = requireKind(input.kinds, declaration.kind.name, address);
  const record = input.records.get(address);
  const current = live.get(address);
  const common = { address, deposed: "", kind: kind.name, affects: [] };
  const create = (reason?: ActionReason): Change => ({
    ...common,
    action: "create",
    ...(reason ? { reason } : {}),
    disruption: "none",
    fields: [],
    before: undefined,
    after: desired,
  });
  if (!record) return create(input.observations?.has(address) ? "adopt" : undefined);
  if (record.kind !== kind.name) {
    return {
      ...common,
      action: "replace",
      reason: "replace_because_cannot_update",
      disruption: "recreate",
      fields: [{
        field: "",
        before: record.kind,
        after: kind.name,
        disruption: "recreate",
        mechanism: "another kind",
      }],
      before: record.props,
      after: desired,
    };
  }
  if (record.status === "creating") {
    // What is half made may hold what cannot be changed any more.
    const isOther = declaration.options.adopt !== true &&
      compare(record.props, desired).some((each) =>
        (kind.disruption?.(
          { field: each.field, before: plain(each.before), after: plain(each.after) },
          instanceOf(record, input.graph.stack),
          desired,
        ) ?? { class: "recreate" }).class === "recreate"
      );
    if (!isOther) return create("resume_interrupted");
    return {
      ...common,
      action: "replace",
      reason: "resume_interrupted",
      disruption: "recreate",
      fields: [],
      before: record.props,
      after: desired,
    };
  }
  if (!current) return create("missing");

  const after = ignore(declaration, current.props, desired);
  const instance = instanceOf(current, input.graph.stack);
  const differences = compare(current.props, after).filter((each) =>
    // A mark alone changes nothing in the world; the record takes it over.
    each.before === undefined || each.after === undefined || !equal(reveal(each.before), reveal(each.after))
  );
  const fields: FieldChange[] = differences.map((each) => {
    const how: Disruption = kind.disruption?.(
      { field: each.field, before: plain(each.before), after: plain(each.after) },
      instance,
      after,
    ) ?? { class: "recreate" };
    return { ...each, disruption: how.class, ...(how.mechanism ? { mechanism: how.mechanism } : {}) };
  });
  const disruption = worst(fields.map((each) => each.disruption));
  const triggered = declaration.options.replaceOn.some((target) => {
    const action = changes.get(target)?.action;
    return action !== undefined && action !== "no-op";
  });
  let action: Action = fields.length === 0 ? "no-op" : disruption === "recreate" ? "replace" : "update";
  let reason: ActionReason | undefined = action === "replace" ? "replace_because_cannot_update" : undefined;
  if (input.replace.has(address)) [action, reason] = ["replace", "replace_by_request"];
  else if (triggered) [action, reason] = ["replace", "replace_by_triggers"];
  else if (record.status === "deleting" || record.status === "tainted") {
    [action, reason] = ["replace", "resume_interrupted"];
  } else if (action === "no-op" && record.status === "updating") {
    [action, reason] = ["update", "resume_interrupted"];
  } else if (action === "no-op" && record.status === "waiting") {
    [action, reason] = ["update", "wait_until_ready"];
  }
  return {
    ...common,
    action,
    ...(reason ? { reason } : {}),
    disruption: action === "replace" ? "recreate" : disruption,
    fields,
    before: current.props,
    after,
    ...(equal(current.outputs, record.outputs) || !current.outputs ? {} : { outputs: current.outputs }),
  };
}

function plain(value: unknown): unknown {
  return isSecret(value) ? value.$secret : value;
}

/** Puts the live values of ignored fields in place of the desired ones. */
function ignore(declaration: Declaration, live: Json, desired: Json): Json {
  const { ignoreChanges } = declaration.options;
  if (!ignoreChanges) return desired;
  if (ignoreChanges === "all") return live;
  let result: unknown = desired;
  for (const path of ignoreChanges) {
    const value = pick(live, fieldPath(path).map(String));
    // A field that neither side has must not make the objects around it.
    if (value === undefined && pick(desired, fieldPath(path).map(String)) === undefined) continue;
    result = withField(result, path, value);
  }
  return result as Json;
}

function deletion(record: ResourceRecord, action: "delete" | "forget", reason: ActionReason): Change {
  return {
    address: record.address,
    deposed: record.deposed,
    kind: record.kind,
    action,
    reason,
    disruption: action === "delete" ? "recreate" : "none",
    fields: [],
    before: record.props,
    after: undefined,
    affects: [],
  };
}

/** Lists for each disturbing change who else is hit: everything that depends on it and stays. */
function cascade(changes: readonly Change[], records: ReadonlyMap<string, ResourceRecord>): Change[] {
  const leaving = new Set(changes.filter((each) => each.action === "delete").map((each) => each.address));
  const dependents = new Map<string, string[]>();
  for (const record of records.values()) {
    for (const target of record.dependencies) {
      const list = dependents.get(target);
      if (list) list.push(record.address);
      else dependents.set(target, [record.address]);
    }
  }
  return changes.map((change) => {
    const isDisturbing = change.disruption === "reboot" || change.disruption === "recreate";
    if (!isDisturbing || !dependents.has(change.address)) return change;
    const seen = new Set<string>();
    const queue = [...dependents.get(change.address)!];
    for (let next = queue.pop(); next !== undefined; next = queue.pop()) {
      if (seen.has(next) || next === change.address) continue;
      seen.add(next);
      queue.push(...(dependents.get(next) ?? []));
    }
    return { ...change, affects: [...seen].filter((address) => !leaving.has(address)).sort() };
  });
}
