/**
 * Apply: execute a plan's operations, in parallel, each between durable journal entries.
 *
 * @module
 */

import { randomUUID } from "node:crypto";
import { type Graph, isUnknown, parseDuration, type ResourceReference } from "../dsl/mod.ts";
import { resolveChecked } from "./diff.ts";
import { ApplyError, asError, PlannerError } from "./errors.ts";
import type { Dependency, Draft, Json, Request } from "./kind.ts";
import { knownKinds, renameIn } from "./make_plan.ts";
import { type Kinds, requireKind } from "./observe.ts";
import type { Change, Operation, Plan } from "./plan.ts";
import type { ResourceRecord, State } from "./state.ts";
import { equal, hasUnknown, type Lookup, pick, resolve, reveal, UNKNOWN } from "./values.ts";

/** What happens during an apply. */
export type ApplyEvent =
  | {
    readonly type: "start";
    readonly address: string;
    readonly operation: Operation["type"];
    readonly kind: string;
  }
  | { readonly type: "progress"; readonly address: string; readonly text: string }
  | {
    readonly type: "complete";
    readonly address: string;
    readonly operation: Operation["type"];
    readonly kind: string;
    readonly id: string;
    readonly milliseconds: number;
  }
  | {
    readonly type: "error";
    readonly address: string;
    readonly operation: Operation["type"];
    readonly kind: string;
    readonly error: Error;
    readonly milliseconds: number;
  };

/** How to apply. */
export interface ApplyOptions {
  /** The declarations that the plan was made from. */
  readonly graph: Graph;
  /** The locked state. */
  readonly state: State;
  /** The known kinds. */
  readonly kinds: Kinds;
  /** How many operations may run at once; 10 unless told. */
  readonly parallelism?: number;
  /** Aborted by Ctrl-C: running operations stop at their next safe point, no other one starts. */
  readonly signal?: AbortSignal;
  /** Receives what happens. */
  readonly onEvent?: (event: ApplyEvent) => void;
  /** Called at each point between two durable steps, for fault injection. */
  readonly onBoundary?: (name: string) => void;
}

/** What an apply did. */
export interface ApplyResult {
  /** Operations that were carried out. */
  readonly completed: readonly Operation[];
  /** The stack's outputs, secrets marked. */
  readonly outputs: ReadonlyMap<string, unknown>;
  /** Messages of the checks that do not hold, by name. */
  readonly failedChecks: ReadonlyMap<string, string>;
}

/** How many journal entries are kept. */
const JOURNAL_ENTRIES = 10_000;

/**
 * Applies a plan.
 *
 * @param plan The plan
 * @param options Declarations and state that it was made from
 * @returns What was done
 * @throws {PlannerError} If the plan is stale
 * @throws {ApplyError} If operations failed; whatever was done is on record
 */
export async function apply(plan: Plan, options: ApplyOptions): Promise<ApplyResult> {
  const { state, graph } = options;
  refuseStale(plan, options);
  const run = new Run(plan, options);
  if (plan.operations.length > 0) state.backup();
  run.begin();
  try {
    await run.execute();
  } finally {
    run.finish();
  }
  if (options.signal?.aborted && (run.remaining > 0 || run.failures.size > 0)) {
    throw new PlannerError(
      `Interrupted: ${run.completed.length} of ${plan.operations.length} operations are done and on record: run apply again to continue`,
    );
  }
  if (run.failures.size > 0) {
    const [first] = run.failures;
    const skipped = run.remaining > 0 ? `; ${run.remaining} that depend on them were not started` : "";
    throw new ApplyError(
      run.failures.size === 1
        ? `Cannot ${run.verb(first![0])} "${first![0]}" as ${first![1].message}${skipped}`
        : `Cannot apply ${run.failures.size} of ${plan.operations.length} operations${skipped}\n` +
          [...run.failures].map(([address, error]) => `  ${address}: ${error.message}`).join("\n"),
      run.failures,
    );
  }
  if (run.remaining > 0) {
    throw new PlannerError(
      `Cannot apply the plan as ${run.remaining} of its ${plan.operations.length} operations wait for each other: ` +
        `what was done is on record`,
    );
  }
  for (const [name, error] of run.faults) {
    throw new PlannerError(`Cannot compute the output "${name}" as its function threw: ${error.message}`);
  }
  const lookup = run.lookup();
  const failedChecks = new Map<string, string>();
  if (plan.mode === "normal") {
    for (const [name, check] of graph.checks) {
      try {
        const holds = resolve(check.condition, lookup);
        if (!isUnknown(holds) && reveal(holds) !== true) failedChecks.set(name, check.message);
      } catch (thrown) {
        failedChecks.set(name, `${check.message} (its function threw: ${asError(thrown).message})`);
      }
    }
  }
  return { completed: run.completed, outputs: state.outputs(), failedChecks };
}

/**
 * Lets each kind make sure that this host can carry a plan out. Nothing is changed.
 *
 * @param plan The plan
 * @param options Graph, state and kinds that the plan was made with, and a signal
 */
export async function preflight(
  plan: Plan,
  options: Pick<ApplyOptions, "graph" | "state" | "kinds" | "signal">,
): Promise<void> {
  const { graph, state } = options;
  const kinds = knownKinds(graph, options.kinds);
  if (!plan.operations.some(({ type }) => type === "create" || type === "update")) return;
  const wanted = new Map(
    plan.changes.filter(({ deposed }) => deposed === "").map(({ address, after }) => [address, after]),
  );
  const props = (address: string) => reveal(wanted.get(address) ?? {}) as Json;
  const recorded = new Map(
    state.records().filter(({ deposed }) => deposed === "").map(({ address, outputs }) => [address, outputs]),
  );
  const groups = new Map<string, Omit<Draft<Json, Json>, "report">[]>();
  for (const { type, change } of plan.operations) {
    const { kind, address, after, movedFrom } = plan.changes[change]!;
    if ((type !== "create" && type !== "update") || !after) continue;
    const dependencies = graph.byAddress.get(address)?.dependencies ?? [];
    const group = groups.get(kind);
    const instance = {
      address,
      stack: plan.stack,
      props: reveal(after) as Json,
      // What is made anew has nothing of the one before.
      recorded: type === "update" ? recorded.get(movedFrom ?? address) : undefined,
      references: new Map(dependencies.map((target) => [target, props(target)])),
    };
    if (group) group.push(instance);
    else groups.set(kind, [instance]);
  }
  for (const [name, instances] of groups) {
    const kind = requireKind(kinds, name, instances[0]!.address);
    await kind.preflight?.(instances, options.signal ?? new AbortController().signal);
  }
}

function refuseStale(plan: Plan, { state, graph }: ApplyOptions): void {
  const stale = (why: string) =>
    new PlannerError(
      `Cannot apply the plan for stack "${plan.stack}" as it is stale: ${why}: make a new plan`,
    );
  if (plan.stack !== graph.stack) {
    throw new PlannerError(
      `Cannot apply the plan as it is for stack "${plan.stack}": current stack is "${graph.stack}"`,
    );
  }
  if (plan.lineage !== state.lineage) throw stale("it was made from another state");
  if (plan.serial !== state.serial) {
    throw stale(`state was changed since (serial ${plan.serial} then, ${state.serial} now)`);
  }
}

class Run {
  readonly completed: Operation[] = [];
  readonly failures = new Map<string, Error>();
  /** What the stack's own outputs threw. */
  readonly faults = new Map<string, Error>();
  remaining: number;
  readonly #plan: Plan;
  readonly #options: ApplyOptions;
  readonly #kinds: Kinds;
  readonly #id = randomUUID();
  readonly #records = new Map<string, ResourceRecord>();
  readonly #verbs = new Map<string, string>();

  constructor(plan: Plan, options: ApplyOptions) {
    this.#plan = plan;
    this.#options = options;
    this.#kinds = knownKinds(options.graph, options.kinds);
    this.remaining = plan.operations.length;
    for (const record of options.state.records()) {
      this.#records.set(key(record.address, record.deposed), record);
    }
  }

  verb(address: string): string {
    return this.#verbs.get(address) ?? "apply";
  }

  /** Moves records, and brings the marks of unchanged ones up to date. */
  begin(): void {
    const { state, graph } = this.#options;
    const writes = new Map<string, ResourceRecord>();
    const removals: string[] = [];
    const renamed = new Map<string, string>();
    for (const change of this.#plan.changes) {
      if (change.movedFrom !== undefined) renamed.set(change.movedFrom, change.address);
    }
    if (renamed.size > 0) {
      const before = [...this.#records];
      for (const [at] of before) if (renamed.has(at)) this.#records.delete(at);
      for (const [at, record] of before) {
        const next = renameIn(record, renamed);
        if (next === record) continue;
        if (renamed.has(at)) removals.push(at);
        this.#records.set(key(next.address, next.deposed), next);
        writes.set(key(next.address, next.deposed), next);
      }
    }
    if (this.#plan.mode === "normal") {
      for (const change of this.#plan.changes) {
        const record = this.#records.get(change.address);
        const declaration = graph.byAddress.get(change.address);
        if (!record || !declaration || change.deposed !== "" || change.action === "create") continue;
        const next: ResourceRecord = {
          ...record,
          protect: declaration.options.protect ?? false,
          retain: declaration.options.retain ?? false,
          // What is not done yet still uses what it used: a run that is cut here must not forget that.
          ...(change.action === "no-op" ? { dependencies: declaration.dependencies } : {}),
          ...(change.action === "no-op" && change.after ? { props: change.after } : {}),
          ...(change.action === "no-op" && change.outputs ? { outputs: change.outputs } : {}),
          // The reason to replace it may be gone in the next run.
          ...(change.action === "replace" && record.status === "ok" &&
              (change.reason === "replace_by_triggers" || change.reason === "replace_by_request")
            ? { status: "tainted" as const }
            : {}),
        };
        if (JSON.stringify(next) !== JSON.stringify(record)) {
          writes.set(change.address, next);
          this.#records.set(change.address, next);
        }
      }
    }
    if (writes.size === 0 && removals.length === 0) return;
    state.transaction((writer) => {
      for (const address of removals) writer.remove(address);
      for (const record of writes.values()) writer.put(record);
    });
    this.#boundary("moved");
  }

  /** Runs operations as their predecessors end. */
  execute(): Promise<void> {
    const { operations } = this.#plan;
    const { parallelism = 10, signal } = this.#options;
    const waiting = operations.map((operation) => operation.after.length);
    const dependents: number[][] = operations.map(() => []);
    operations.forEach((operation, index) =>
      operation.after.forEach((each) => dependents[each]!.push(index))
    );
    const ready: number[] = [];
    waiting.forEach((count, index) => count === 0 && ready.push(index));
    let next = 0;
    let running = 0;
    let failed = 0;
    return new Promise((resolve) => {
      const start = () => {
        while (next < ready.length && running < parallelism && !signal?.aborted) {
          const index = ready[next++]!;
          running++;
          this.#perform(operations[index]!).then((isDone) => {
            running--;
            if (!isDone) failed++;
            else {
              this.remaining--;
              for (const each of dependents[index]!) if (--waiting[each]! === 0) ready.push(each);
            }
            start();
          });
        }
        if (running === 0) {
          this.remaining -= failed;
          resolve();
        }
      };
      start();
    });
  }

  /** Writes the stack's outputs, as far as they are known. */
  finish(): void {
    const { state, graph } = this.#options;
    if (this.#plan.mode === "refresh-only") return;
    const former = state.outputs();
    const outputs = new Map<string, unknown>();
    if (this.#plan.mode === "normal") {
      const lookup = this.lookup();
      for (const [name, value] of graph.outputs) {
        let known: unknown = UNKNOWN;
        try {
          known = resolve(value, lookup);
        } catch (thrown) {
          this.faults.set(name, asError(thrown));
        }
        if (!hasUnknown(known)) outputs.set(name, known);
        // What could not be made known keeps its last value.
        else if (former.has(name)) outputs.set(name, former.get(name));
      }
    } else if (this.#records.size > 0) { for (const [name, value] of former) outputs.set(name, value); }
    const isSame = outputs.size === former.size &&
      [...outputs].every(([name, value]) => former.has(name) && equal(value, former.get(name)));
    if (this.#plan.operations.length === 0 && isSame) return;
    try {
      state.transaction((writer) => {
        writer.outputs(outputs);
        writer.trimJournal(JOURNAL_ENTRIES);
      });
    } catch (error) {
      // The failure that led here says more than this one.
      if (this.failures.size === 0) throw error;
    }
    this.#boundary("finished");
  }

  lookup(): Lookup {
    const { graph } = this.#options;
    return {
      output: (resource, path) => {
        const record = this.#records.get(graph.addresses.get(resource) ?? "");
        const value = record?.status === "ok" ? pick(record.outputs, path) : undefined;
        return value === undefined ? UNKNOWN : value;
      },
      reference: (resource): ResourceReference => {
        const address = graph.addresses.get(resource)!;
        return {
          $resource: address,
          kind: resource.kind.name,
          generation: this.#records.get(address)?.generation ?? 0,
        };
      },
    };
  }

  async #perform(operation: Operation): Promise<boolean> {
    const { address, type } = operation;
    const change = this.#plan.changes[operation.change]!;
    const onEvent = (event: ApplyEvent) => this.#tell(event);
    const start = performance.now();
    const shared = { address, operation: type, kind: change.kind };
    const isShown = type !== "depose" && type !== "refresh";
    if (isShown) onEvent({ type: "start", ...shared });
    try {
      await this.#carryOut(operation, change);
      this.completed.push(operation);
      if (isShown) {
        onEvent({ type: "complete", ...shared, id: operation.id, milliseconds: performance.now() - start });
      }
      return true;
    } catch (thrown) {
      const error = asError(thrown);
      const record = this.#records.get(key(address, operation.deposed));
      error.message = scrub(error.message, change.before, change.after, record?.props, record?.outputs);
      this.failures.set(address, error);
      this.#verbs.set(address, type);
      try {
        this.#options.state.transaction((writer) =>
          writer.journal(this.#id, address, type, "error", error.message)
        );
      } catch {
        // The begin entry alone already tells the next run that this operation did not end.
      }
      onEvent({ type: "error", ...shared, error, milliseconds: performance.now() - start });
      return false;
    }
  }

  async #carryOut(operation: Operation, change: Change): Promise<void> {
    const { address, type } = operation;
    const record = this.#records.get(key(address, operation.deposed));
    switch (type) {
      case "create":
      case "update":
        return await this.#ensure(operation, change, type === "update" ? record : undefined);
      case "delete":
        return await this.#remove(operation, change, record);
      case "depose":
        if (!record) return;
        return this.#write(type, address, (put, remove) => {
          remove(address, "");
          put({ ...record, deposed: String(record.generation) });
        });
      case "forget":
        return this.#write(type, address, (_, remove) => remove(address, operation.deposed));
      case "refresh":
        return this.#write(type, address, (put) => {
          if (record && change.after) put({ ...record, props: change.after });
        });
    }
  }

  /** One durable step of an operation that touches only the record. */
  #write(
    action: string,
    address: string,
    write: (
      put: (record: ResourceRecord) => void,
      remove: (address: string, deposed: string) => void,
    ) => void,
  ): void {
    const edits: (() => void)[] = [];
    this.#options.state.transaction((writer) => {
      write(
        (record) => {
          writer.put(record);
          edits.push(() => this.#records.set(key(record.address, record.deposed), record));
        },
        (at, deposed) => {
          writer.remove(at, deposed);
          edits.push(() => this.#records.delete(key(at, deposed)));
        },
      );
      writer.journal(this.#id, address, action, "end");
    });
    for (const edit of edits) edit();
    this.#boundary(`${action} ${address}`);
  }

  async #ensure(operation: Operation, change: Change, record: ResourceRecord | undefined): Promise<void> {
    const { address, type, id, generation } = operation;
    const { graph, state } = this.#options;
    const declaration = graph.byAddress.get(address);
    if (!declaration) throw new PlannerError("it is not declared any more");
    const kind = requireKind(this.#kinds, change.kind, address);
    const props = this.#complete(change, address);
    const pending: ResourceRecord = {
      address,
      deposed: "",
      kind: change.kind,
      id,
      generation,
      status: type === "create" ? "creating" : "updating",
      props: record?.props ?? props,
      outputs: record?.outputs,
      dependencies: [...new Set([...declaration.dependencies, ...record?.dependencies ?? []])],
      protect: declaration.options.protect ?? false,
      retain: declaration.options.retain ?? false,
    };
    this.#boundary(`before begin ${type} ${address}`);
    state.transaction((writer) => {
      writer.put(pending);
      writer.journal(this.#id, address, type, "begin");
    });
    this.#records.set(address, pending);
    this.#boundary(`begin ${type} ${address}`);
    const request = this.#request(
      pending,
      props,
      change.before,
      this.#limit(address, type === "create" ? "create" : "update"),
    );
    const outputs = await kind.ensure(request) as Json;
    this.#boundary(`ensured ${type} ${address}`);
    const made: ResourceRecord = {
      ...pending,
      props,
      outputs,
      dependencies: declaration.dependencies,
      status: kind.ready ? "waiting" : "ok",
    };
    state.transaction((writer) => {
      writer.put(made);
      if (!kind.ready) writer.journal(this.#id, address, type, "end");
    });
    this.#records.set(address, made);
    this.#boundary(`recorded ${type} ${address}`);
    if (!kind.ready) return;
    await kind.ready({ ...request, outputs: reveal(outputs) as Json });
    this.#boundary(`ready ${type} ${address}`);
    const done: ResourceRecord = { ...made, status: "ok" };
    state.transaction((writer) => {
      writer.put(done);
      writer.journal(this.#id, address, type, "end");
    });
    this.#records.set(address, done);
    this.#boundary(`end ${type} ${address}`);
  }

  async #remove(operation: Operation, change: Change, record: ResourceRecord | undefined): Promise<void> {
    const { address, deposed, type } = operation;
    if (!record) return;
    const kind = requireKind(this.#kinds, record.kind, address);
    const pending: ResourceRecord = { ...record, status: "deleting" };
    this.#boundary(`before begin ${type} ${address}`);
    this.#options.state.transaction((writer) => {
      writer.put(pending);
      writer.journal(this.#id, address, type, "begin");
    });
    this.#records.set(key(address, deposed), pending);
    this.#boundary(`begin ${type} ${address}`);
    const props = change.action === "delete" ? change.before ?? record.props : record.props;
    await kind.remove(this.#request(record, props, props, this.#limit(address, "delete")));
    this.#boundary(`removed ${type} ${address}`);
    // A replacement that is cut here goes on with the next generation, so that what refers to it is told.
    const next = deposed === "" && change.action === "replace" && record.kind === change.kind
      ? this.#plan.operations.find((each) => each.type === "create" && each.change === operation.change)
      : undefined;
    const successor: ResourceRecord | undefined = next && {
      ...record,
      id: next.id,
      generation: next.generation,
      status: "creating",
      props: change.after && !hasUnknown(change.after) ? change.after : record.props,
      outputs: undefined,
    };
    this.#options.state.transaction((writer) => {
      if (successor) writer.put(successor);
      else writer.remove(address, deposed);
      writer.journal(this.#id, address, type, "end");
    });
    if (successor) this.#records.set(address, successor);
    else this.#records.delete(key(address, deposed));
    this.#boundary(`end ${type} ${address}`);
  }

  /** Fills what was unknown when the plan was made. */
  #complete(change: Change, address: string): Json {
    const declaration = this.#options.graph.byAddress.get(address)!;
    if (!change.after || !hasUnknown(change.after)) return change.after ?? {};
    const problems: string[] = [];
    const fresh = resolveChecked(
      declaration,
      this.lookup(),
      (field, reason) => problems.push(`${field}: ${reason}`),
    );
    const fill = (planned: unknown, now: unknown): unknown => {
      if (isUnknown(planned)) return now;
      if (typeof planned !== "object" || planned === null) return planned;
      if (Array.isArray(planned)) {
        return planned.map((each, index) => fill(each, (now as unknown[])?.[index]));
      }
      return Object.fromEntries(
        Object.entries(planned).map((
          [name, each],
        ) => [name, fill(each, (now as Record<string, unknown>)?.[name])]),
      );
    };
    const props = fill(change.after, fresh) as Json;
    if (hasUnknown(props)) problems.push("a value that it needs is still not known");
    if (problems.length > 0) throw new PlannerError(problems.join("; "));
    return props;
  }

  #request(record: ResourceRecord, props: Json, before: Json | undefined, signal: AbortSignal): Request {
    const dependencies = new Map<string, Dependency>();
    const generations = generationsIn(props);
    for (const address of record.dependencies) {
      // What is to be removed may use an object that was set aside meanwhile.
      const target = this.#records.get(key(address, String(generations.get(address) ?? ""))) ??
        this.#records.get(address);
      if (!target) continue;
      dependencies.set(address, {
        address,
        kind: target.kind,
        id: target.id,
        props: reveal(target.props) as Json,
        outputs: reveal(target.outputs ?? {}) as Json,
      });
    }
    return {
      address: record.address,
      id: record.id,
      stack: this.#plan.stack,
      props: reveal(props) as Json,
      outputs: record.outputs === undefined ? undefined : reveal(record.outputs) as Json,
      before: before && reveal(before) as Json,
      dependencies,
      signal,
      report: (text) => this.#tell({ type: "progress", address: record.address, text }),
    };
  }

  #limit(address: string, operation: "create" | "update" | "delete"): AbortSignal {
    const { signal = new AbortController().signal, graph } = this.#options;
    const limit = graph.byAddress.get(address)?.options.timeouts?.[operation];
    return limit === undefined
      ? signal
      : AbortSignal.any([signal, AbortSignal.timeout(parseDuration(limit))]);
  }

  /** A listener that throws must not stop what runs. */
  #tell(event: ApplyEvent): void {
    try {
      this.#options.onEvent?.(event);
    } catch {
      // Nobody is left to hear of it.
    }
  }

  #boundary(name: string): void {
    this.#options.onBoundary?.(name);
  }
}

/** Generations of the resources that props refer to, by address. */
function generationsIn(props: unknown, found: Map<string, number> = new Map()): Map<string, number> {
  if (typeof props !== "object" || props === null) return found;
  const { $resource, generation } = props as Partial<ResourceReference>;
  if (typeof $resource === "string" && typeof generation === "number") found.set($resource, generation);
  else for (const each of Object.values(props)) generationsIn(each, found);
  return found;
}

/** Puts marks in place of secrets that a driver wrote into a message. */
function scrub(message: string, ...values: unknown[]): string {
  const texts = new Set<string>();
  const collect = (value: unknown, isInside: boolean): void => {
    if (typeof value === "object" && value !== null) {
      for (const [name, each] of Object.entries(value)) collect(each, isInside || name === "$secret");
    } else if (isInside && String(value).length >= 4) texts.add(String(value));
  };
  for (const value of values) collect(value, false);
  return [...texts].sort((a, b) => b.length - a.length).reduce(
    (whole, each) => whole.replaceAll(each, "(sensitive)"),
    message,
  );
}

function key(address: string, deposed: string): string {
  return deposed === "" ? address : `${address} ${deposed}`;
}
