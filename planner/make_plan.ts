/**
 * Plan: from declarations, state and the world to an ordered graph of operations.
 *
 * @module
 */

import { createHash } from "node:crypto";
import {
  type Declaration,
  type Graph,
  isOutput,
  isPlainObject,
  isResource,
  type Resource,
} from "../dsl/mod.ts";
import { diff, findDrift, worst } from "./diff.ts";
import { PlannerError } from "./errors.ts";
import { DISRUPTION_CLASSES, type DisruptionClass, type Instance, type Json } from "./kind.ts";
import { instanceOf, type Kinds, type Observations, observe } from "./observe.ts";
import type { Change, Operation, OutputChange, Plan, PlanSummary } from "./plan.ts";
import { objectId, type ResourceRecord, type State } from "./state.ts";
import { canonical, equal, hasUnknown, resolve, reveal, transform, UNKNOWN } from "./values.ts";

/** How to plan. */
export interface PlanOptions {
  /** The declarations. */
  readonly graph: Graph;
  /** The state. */
  readonly state: State;
  /** The known kinds. */
  readonly kinds: Kinds;
  /** `normal` unless told. */
  readonly mode?: Plan["mode"];
  /** Whether to look at the world; yes unless told. */
  readonly refresh?: boolean;
  /** Addresses to plan for, with what they depend on; a path covers what is inside it. All unless told. */
  readonly targets?: readonly string[];
  /** Addresses to leave out, with what depends on them. */
  readonly exclude?: readonly string[];
  /** Addresses to replace in any case. */
  readonly replace?: readonly string[];
  /** Refuse a plan that disturbs more than this. */
  readonly maxDisruption?: DisruptionClass;
  /** Aborted by Ctrl-C. */
  readonly signal?: AbortSignal;
}

/**
 * Makes a plan. Nothing is changed.
 *
 * @param options Declarations, state and how to plan
 * @returns The plan
 * @throws {PlannerError} If the plan would destroy something protected, or disturb more than allowed
 */
export async function makePlan(options: PlanOptions): Promise<Plan> {
  const { graph, state, kinds, mode = "normal", signal = new AbortController().signal } = options;
  const all = state.records();
  const deposed = all.filter((record) => record.deposed !== "");
  const current = all.filter((record) => record.deposed === "");
  const { records, moved } = move(graph, current);
  checkAddresses(options, records);

  // The next object of an address follows those set aside, and never takes the identity of one that moved away.
  const used = new Set(all.map((record) => record.id));
  const past = new Map<string, number>();
  for (const { address, generation } of [...deposed, ...records.values()]) {
    past.set(address, Math.max(past.get(address) ?? 0, generation + 1));
  }
  const next = (address: string): number => {
    let generation = past.get(address) ?? 0;
    while (used.has(objectId(state.lineage, address, generation))) generation++;
    return generation;
  };

  let observations: Observations | undefined;
  if (options.refresh !== false) {
    const instances: (readonly [string, Instance])[] = [];
    for (const record of mode === "refresh-only" ? current : records.values()) {
      instances.push([record.kind, instanceOf(record, graph.stack)]);
    }
    if (mode === "normal") {
      for (const declaration of graph.resources) {
        if (!records.has(declaration.address)) {
          const id = objectId(state.lineage, declaration.address, next(declaration.address));
          const instance = unrecorded(declaration, graph.stack, id);
          if (instance) instances.push([declaration.kind.name, instance]);
        }
      }
    }
    observations = await observe(instances, knownKinds(graph, kinds), signal);
  }
  const base = {
    stack: graph.stack,
    lineage: state.lineage,
    serial: state.serial,
    created: new Date().toISOString(),
    configuration: configurationDigest(graph),
    variables: graph.variables,
    mode,
    warnings: [],
  };
  if (mode === "refresh-only") {
    return { ...base, ...refreshOnly(current, observations, options) };
  }

  const found = await diff({
    graph,
    records,
    next,
    observations,
    kinds: knownKinds(graph, kinds),
    replace: new Set(options.replace ?? []),
    destroy: mode === "destroy",
    moved,
  });
  const changes = select(found.changes, graph, records, options);
  refuse(changes, graph, records, observations, options.maxDisruption);
  const isLimited = (options.targets?.length ?? 0) > 0 || (options.exclude?.length ?? 0) > 0;
  const selected = new Set(changes.map((each) => each.address));
  for (const record of deposed) {
    if (isLimited && !selected.has(record.address)) continue;
    changes.push({
      address: record.address,
      deposed: record.deposed,
      kind: record.kind,
      action: "delete",
      reason: "deposed",
      disruption: "none",
      fields: [],
      before: record.props,
      after: undefined,
      affects: [],
    });
  }
  const operations = order(changes, graph, records, deposed, next, knownKinds(graph, kinds), state.lineage);
  const outputs: Record<string, OutputChange> = {};
  if (!options.targets?.length && !options.exclude?.length) {
    const before = state.outputs();
    for (const name of new Set([...before.keys(), ...found.outputs.keys()])) {
      const change = { before: before.get(name), after: found.outputs.get(name) };
      if (!equal(change.before, change.after)) outputs[name] = change;
    }
  }
  return { ...base, changes, drift: found.drift, outputs, operations };
}

/**
 * Counts what a plan does.
 *
 * @param plan The plan
 * @returns The counts and the worst disruption
 */
export function summarise(plan: Plan): PlanSummary {
  const count = (...actions: string[]) => plan.changes.filter((each) => actions.includes(each.action)).length;
  return {
    add: count("create", "replace"),
    change: count("update"),
    destroy: count("delete", "replace"),
    forget: count("forget"),
    disruption: worst(
      plan.changes.filter((each) => each.action === "update" || each.action === "replace").map((each) =>
        each.disruption
      ),
    ),
  };
}

/**
 * Adds the kinds that the declarations themselves bring along.
 *
 * @param graph The declarations
 * @param kinds Kinds by name
 * @returns All of them
 */
export function knownKinds(graph: Graph, kinds: Kinds): Kinds {
  const result = new Map(kinds);
  for (const { kind } of graph.resources) {
    if (!result.has(kind.name) && "ensure" in kind && "observe" in kind) {
      result.set(kind.name, kind as unknown as Parameters<typeof result.set>[1]);
    }
  }
  return result;
}

/**
 * A digest of declarations, functions in outputs included: a saved plan is bound to it.
 *
 * @param graph The declarations
 * @returns Hexadecimal SHA-256
 */
export function configurationDigest(graph: Graph): string {
  const describe = (value: unknown): unknown => {
    if (isResource(value)) return { $resource: graph.addresses.get(value) };
    if (isOutput(value)) {
      const { expression } = value;
      if (expression.type === "value") {
        return { $value: createHash("sha256").update(canonical(expression.value)).digest("hex") };
      }
      if (expression.type === "reference") {
        return { $output: [graph.addresses.get(expression.resource as Resource), ...expression.path] };
      }
      return { $compute: String(expression.compute), inputs: expression.inputs.map(describe) };
    }
    if (Array.isArray(value)) return value.map(describe);
    if (!isPlainObject(value)) return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, describe(each)]));
  };
  const hash = createHash("sha256");
  for (const { address, kind, props, options } of graph.resources) {
    hash.update(canonical([address, kind.name, describe(props), options]));
  }
  hash.update(canonical([...graph.outputs].map(([name, value]) => [name, describe(value)])));
  return hash.digest("hex");
}

/** Applies `movedFrom`: the record keeps its object and takes the new address. */
function move(
  graph: Graph,
  current: readonly ResourceRecord[],
): { records: Map<string, ResourceRecord>; moved: Map<string, string> } {
  const recorded = new Set(current.map((record) => record.address));
  const renamed = new Map<string, string>(); // new addresses by old ones
  const moved = new Map<string, string>();
  for (const { address, options: { movedFrom } } of graph.resources) {
    if (movedFrom === undefined || !recorded.has(movedFrom)) continue;
    if (renamed.has(movedFrom)) {
      throw new PlannerError(
        `Cannot move "${movedFrom}" to both "${
          renamed.get(movedFrom)
        }" and "${address}": take one movedFrom back`,
      );
    }
    renamed.set(movedFrom, address);
    moved.set(address, movedFrom);
  }
  // An address that is taken or still declared is free only where it moves on itself.
  for (let isDone = false; !isDone;) {
    isDone = true;
    for (const [to, from] of moved) {
      const isFree = !recorded.has(to) || renamed.has(to);
      const isLeft = !graph.byAddress.has(from) || moved.has(from);
      if (isFree && isLeft) continue;
      moved.delete(to);
      renamed.delete(from);
      isDone = false;
    }
  }
  for (const start of moved.keys()) {
    let from = moved.get(start);
    while (from !== undefined && from !== start) from = moved.get(from);
    if (from === start) {
      throw new PlannerError(
        `Cannot move "${start}" as it and "${moved.get(start)}" are to take each other's place: use state mv`,
      );
    }
  }
  const records = new Map(current.map((record) => {
    const next = renamed.size === 0 ? record : renameIn(record, renamed);
    return [next.address, next];
  }));
  return { records, moved };
}

/**
 * Renames addresses in a record: its own, and those that it depends on and refers to.
 *
 * @param record The record
 * @param renamed New addresses by old ones
 * @returns The record itself where nothing in it is renamed
 */
export function renameIn(record: ResourceRecord, renamed: ReadonlyMap<string, string>): ResourceRecord {
  const address = record.deposed === "" ? renamed.get(record.address) : undefined;
  if (address === undefined && !record.dependencies.some((each) => renamed.has(each))) return record;
  return {
    ...record,
    address: address ?? record.address,
    dependencies: record.dependencies.map((each) => renamed.get(each) ?? each),
    props: transform(record.props, (object) => {
      const to = typeof object.$resource === "string" ? renamed.get(object.$resource) : undefined;
      return to === undefined ? undefined : { value: { ...object, $resource: to } };
    }) as Json,
  };
}

function checkAddresses(options: PlanOptions, records: ReadonlyMap<string, ResourceRecord>): void {
  const known = [...new Set([...options.graph.byAddress.keys(), ...records.keys()])];
  for (
    const [flag, list] of [["target", options.targets], ["exclude", options.exclude], [
      "replace",
      options.replace,
    ]] as const
  ) {
    for (const address of list ?? []) {
      if (known.some((each) => isWithin(each, address))) continue;
      throw new PlannerError(
        `Cannot use --${flag}=${address} as stack "${options.graph.stack}" has no such resource: ` +
          `it has ${known.sort().join(", ") || "none"}`,
      );
    }
  }
}

/** Whether an address is a target or inside it. */
function isWithin(address: string, target: string): boolean {
  return address === target || (address.startsWith(target) && /^[.[]/.test(address.slice(target.length)));
}

/** A declared instance that is not on record, as far as it can be looked for: its props must be known. */
function unrecorded(declaration: Declaration, stack: string, id: string): Instance | undefined {
  const props = resolve(declaration.props, {
    output: () => UNKNOWN,
    reference: (resource) => ({ $resource: "", kind: resource.kind.name, generation: 0 }),
  });
  if (hasUnknown(props)) return undefined;
  return {
    address: declaration.address,
    id,
    stack,
    props: reveal(props) as Json,
    outputs: undefined,
  };
}

function refreshOnly(
  current: readonly ResourceRecord[],
  observations: Observations | undefined,
  { targets = [], exclude = [] }: PlanOptions,
): Pick<Plan, "changes" | "drift" | "outputs" | "operations"> {
  const records = new Map(
    current.filter(({ address }) =>
      (targets.length === 0 || targets.some((each) => isWithin(address, each))) &&
      !exclude.some((each) => isWithin(address, each))
    ).map((record) => [record.address, record]),
  );
  const { drift, live } = findDrift(records, observations);
  const changes: Change[] = drift.map(({ address, kind, isGone, fields }) => ({
    address,
    deposed: "",
    kind,
    action: isGone ? "forget" : "update",
    disruption: "none",
    fields: fields.map((field) => ({ ...field, disruption: "none" as const, mechanism: "recorded only" })),
    before: records.get(address)!.props,
    after: live.get(address)?.props,
    affects: [],
  }));
  const operations: Operation[] = changes.map((change, index) => {
    const record = records.get(change.address)!;
    return {
      type: change.action === "forget" ? "forget" : "refresh",
      address: change.address,
      deposed: "",
      id: record.id,
      generation: record.generation,
      change: index,
      after: [],
    };
  });
  return { changes, drift, outputs: {}, operations };
}

/** Turns changes outside of the targets into no-ops. */
function select(
  changes: readonly Change[],
  graph: Graph,
  records: ReadonlyMap<string, ResourceRecord>,
  options: PlanOptions,
): Change[] {
  const { targets = [], exclude = [] } = options;
  if (targets.length === 0 && exclude.length === 0) return [...changes];
  const dependenciesOf = (address: string): readonly string[] =>
    graph.byAddress.get(address)?.dependencies ?? records.get(address)?.dependencies ?? [];
  const selected = new Set<string>();
  if (targets.length > 0) {
    const deleted = new Set(changes.filter((each) => each.action === "delete").map((each) => each.address));
    const queue = changes.map((each) => each.address).filter((each) =>
      targets.some((target) => isWithin(each, target))
    );
    for (let next = queue.pop(); next !== undefined; next = queue.pop()) {
      if (selected.has(next)) continue;
      selected.add(next);
      // A deletion takes its dependents along, anything else what it depends on.
      if (!deleted.has(next)) queue.push(...dependenciesOf(next));
      else {for (const { address } of changes) {
          if (records.get(address)?.dependencies.includes(next)) queue.push(address);
        }}
    }
  } else {
    for (const change of changes) selected.add(change.address);
  }
  const leaving = new Set(
    changes.filter((each) => each.action === "delete" || each.action === "forget").map((each) =>
      each.address
    ),
  );
  const dropped = changes.map((each) => each.address).filter((each) =>
    exclude.some((path) => isWithin(each, path))
  );
  for (let next = dropped.pop(); next !== undefined; next = dropped.pop()) {
    if (!selected.delete(next)) continue;
    const isLeaving = leaving.has(next);
    for (const { address } of changes) {
      // What stays keeps what it depends on; what is not made is missing to its dependents.
      if (
        isLeaving
          ? records.get(next)?.dependencies.includes(address) && leaving.has(address)
          : dependenciesOf(address).includes(next)
      ) {
        dropped.push(address);
      }
    }
  }
  return changes.filter((each) => selected.has(each.address));
}

/** Refuses what is protected, what must not be adopted, and what disturbs too much. */
function refuse(
  changes: readonly Change[],
  graph: Graph,
  records: ReadonlyMap<string, ResourceRecord>,
  observations: Observations | undefined,
  maxDisruption: DisruptionClass | undefined,
): void {
  const problems: string[] = [];
  for (const change of changes) {
    const { address, action, fields } = change;
    const declaration = graph.byAddress.get(address);
    const isProtected = declaration
      ? declaration.options.protect === true
      : records.get(address)?.protect === true;
    const isHalfMade = action === "replace" && records.get(address)?.status === "creating";
    if (isProtected && !isHalfMade && (action === "delete" || action === "replace")) {
      const why = action === "replace" && fields.length > 0
        ? ` (${fields.map((each) => each.field).join(", ")} changes)`
        : "";
      problems.push(
        `Cannot ${action === "delete" ? "destroy" : "replace"} "${address}" as it is protected${why}: ` +
          (declaration
            ? "set protect to false first"
            : "declare it again with protect set to false, and apply that first"),
      );
    }
    if (change.reason === "adopt" && observations?.has(address) && declaration?.options.adopt !== true) {
      problems.push(
        `Cannot create "${address}" as its ${change.kind} exists already and is not on record: ` +
          `remove it by hand, or take it over with { adopt: true }`,
      );
    }
    if (
      maxDisruption !== undefined && action !== "no-op" &&
      DISRUPTION_CLASSES.indexOf(change.disruption) > DISRUPTION_CLASSES.indexOf(maxDisruption)
    ) {
      const which = fields.filter((each) => each.disruption === change.disruption).map((each) => each.field)
        .join(", ");
      problems.push(
        `Cannot ${action} "${address}" as its disruption is "${change.disruption}"${
          which ? ` (${which})` : ""
        } and ` +
          `--max-disruption=${maxDisruption} allows less: raise the limit or take the change back`,
      );
    }
  }
  if (problems.length > 0) throw new PlannerError(problems.join("\n"));
}

/** Makes the operations and the order between them. */
function order(
  changes: readonly Change[],
  graph: Graph,
  records: ReadonlyMap<string, ResourceRecord>,
  deposed: readonly ResourceRecord[],
  nextOf: (address: string) => number,
  kinds: Kinds,
  lineage: string,
): Operation[] {
  const operations: { -readonly [K in keyof Operation]: K extends "after" ? number[] : Operation[K] }[] = [];
  const add = (type: Operation["type"], change: number, id: string, generation: number, old = "") =>
    operations.push({
      type,
      address: changes[change]!.address,
      deposed: old,
      id,
      generation,
      change,
      after: [],
    }) - 1;
  const declaredDependencies = (address: string) => graph.byAddress.get(address)?.dependencies ?? [];

  // A replacement that is made first needs what it depends on to be made first too.
  const createFirst = new Set<string>();
  const byAddress = new Map(changes.map((change) => [change.address, change]));
  for (const declaration of [...graph.resources].reverse()) {
    const { address, options } = declaration;
    if (byAddress.get(address)?.action !== "replace") continue;
    const kindRule = kinds.get(declaration.kind.name)?.replace === "create-first";
    if (createFirst.has(address) || (options.createBeforeDestroy ?? kindRule)) {
      createFirst.add(address);
      for (const target of declaration.dependencies) createFirst.add(target);
    }
  }

  const up = new Map<string, number>(); // the operation that makes an address ready for its dependents
  const down = new Map<string, number>(); // the operation that removes the current object of an address
  const late = new Map<string, number>(); // the removal of an object that was set aside
  changes.forEach((change, index) => {
    const { address, action } = change;
    const record = records.get(address);
    // What is gone comes back as another object, so that what refers to it is told.
    const isSame = record !== undefined && change.reason !== "missing";
    const generation = isSame ? record.generation : nextOf(address);
    const id = isSame ? record.id : objectId(lineage, address, generation);
    if (change.deposed !== "") {
      const old = deposed.find((each) => each.address === address && each.deposed === change.deposed)!;
      late.set(`${address} ${change.deposed}`, add("delete", index, old.id, old.generation, change.deposed));
    } else if (action === "create") {
      up.set(address, add("create", index, id, generation));
    } else if (action === "update") {
      up.set(address, add("update", index, id, generation));
    } else if (action === "forget") {
      down.set(address, add("forget", index, id, generation));
    } else if (action === "delete") {
      down.set(address, add("delete", index, id, generation));
    } else if (action === "replace") {
      const next = nextOf(address);
      const nextId = objectId(lineage, address, next);
      if (createFirst.has(address) && record?.status !== "deleting") {
        const set = add("depose", index, id, generation);
        const made = add("create", index, nextId, next);
        operations[made]!.after.push(set);
        up.set(address, made);
        const removed = add("delete", index, id, generation, String(generation));
        operations[removed]!.after.push(made);
        late.set(`${address} ${generation}`, removed);
      } else {
        const removed = add("delete", index, id, generation);
        const made = add("create", index, nextId, next);
        operations[made]!.after.push(removed);
        up.set(address, made);
        down.set(address, removed);
      }
    }
  });

  for (const [address, made] of up) {
    for (const target of declaredDependencies(address)) {
      const before = up.get(target);
      if (before !== undefined) operations[made]!.after.push(before);
    }
  }
  // Removal runs against the direction of dependencies, once the users of the object have let go of it. Where a user
  // can let go only after this removal, it has to bear it: such an edge is soft.
  const soft: (readonly [operation: number, before: number])[] = [];
  const lateOf = new Map<string, number[]>();
  for (const [key, removal] of late) {
    const address = key.slice(0, key.lastIndexOf(" "));
    const list = lateOf.get(address);
    if (list) list.push(removal);
    else lateOf.set(address, [removal]);
  }
  const dependents = new Map<string, ResourceRecord[]>();
  for (const record of [...records.values(), ...deposed]) {
    for (const target of record.dependencies) {
      const list = dependents.get(target);
      if (list) list.push(record);
      else dependents.set(target, [record]);
    }
  }
  for (const [target, removal] of down) {
    for (const { address, deposed: old } of dependents.get(target) ?? []) {
      if (old === "") {
        const first = down.get(address);
        if (first !== undefined) soft.push([removal, first]);
        else if (!up.has(target) && up.has(address)) soft.push([removal, up.get(address)!]);
      }
      for (const each of lateOf.get(address) ?? []) soft.push([removal, each]);
    }
  }
  for (const [target, removals] of lateOf) {
    for (const removal of removals) {
      const own = up.get(target);
      if (own !== undefined) operations[removal]!.after.push(own);
      for (const { address } of dependents.get(target) ?? []) {
        const before = up.get(address) ?? down.get(address);
        if (before !== undefined) operations[removal]!.after.push(before);
        for (const each of lateOf.get(address) ?? []) if (each !== removal) soft.push([removal, each]);
      }
    }
  }
  addWhereFree(operations, soft);
  return operations.map((each) => ({ ...each, after: [...new Set(each.after)] }));
}

/** Adds edges that give way where operations would otherwise wait for each other. */
function addWhereFree(
  operations: readonly { readonly after: number[] }[],
  soft: readonly (readonly [operation: number, before: number])[],
): void {
  // First without an edge of the list, then in its order: each edge that closes a circle is left out.
  const before: Set<number>[] = operations.map((each) => new Set(each.after));
  const isSoft = (operation: number, each: number) =>
    before[operation]!.has(each) && !operations[operation]!.after.includes(each);
  for (const [operation, each] of soft) before[operation]!.add(each);
  const state = new Uint8Array(operations.length);
  for (let root = 0; root < operations.length; root++) {
    if (state[root] !== 0) continue;
    const path = [{ at: root, left: [...before[root]!] }];
    state[root] = 1;
    while (path.length > 0) {
      const top = path[path.length - 1]!;
      const next = top.left.pop();
      if (next === undefined) {
        state[top.at] = 2;
        path.pop();
      } else if (state[next] === 0) {
        state[next] = 1;
        path.push({ at: next, left: [...before[next]!] });
      } else if (state[next] === 1) {
        // A circle: the first soft edge on it goes.
        const circle = [
          ...path.slice(path.findIndex((each) => each.at === next)).map((each) => each.at),
          next,
        ];
        const cut = circle.findIndex((each, index) =>
          index + 1 < circle.length && isSoft(each, circle[index + 1]!)
        );
        if (cut < 0) continue;
        before[circle[cut]!]!.delete(circle[cut + 1]!);
        // Go back to where the edge went out, and look at the rest again later.
        while (path[path.length - 1]!.at !== circle[cut]) state[path.pop()!.at] = 0;
      }
    }
  }
  operations.forEach((each, index) => each.after.splice(0, each.after.length, ...before[index]!));
}
