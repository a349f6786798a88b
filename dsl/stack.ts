/**
 * Stacks: a named tree of resources, evaluated into a graph of addressed, validated declarations.
 *
 * @module
 */

import { type Diagnostic, problem, ValidationError } from "./diagnostic.ts";
import { isOutput, type Output } from "./output.ts";
import { isResource, type KindDefinition, type LifecycleOptions, type Resource } from "./resource.ts";
import { array, boolean, duration, isPlainObject, joinField, object, optional, string } from "./schema.ts";
import { Choice } from "./image.ts";
import { type Site, userSite } from "./site.ts";

/** A variable's default, or `String`, `Number` or `Boolean` for one that must be given. */
export type VariableDefault =
  | string
  | number
  | boolean
  | StringConstructor
  | NumberConstructor
  | BooleanConstructor;

/** Variables of a stack, by name. */
export type Variables = { readonly [name: string]: VariableDefault };

/** The values that a stack's function receives. */
export type VariableValues<V extends Variables> = {
  readonly [K in keyof V]: V[K] extends string | StringConstructor ? string
    : V[K] extends number | NumberConstructor ? number
    : boolean;
};

/** One resource with its address, in normal form. */
export interface Declaration {
  /** Address, such as `web[0]`. */
  readonly address: string;
  /** The kind. */
  readonly kind: KindDefinition;
  /** Normalised props; outputs and resources stand where they were written. */
  readonly props: Readonly<Record<string, unknown>>;
  /** Lifecycle options, with `dependsOn` and `replaceOn` as addresses. */
  readonly options: Omit<LifecycleOptions, "dependsOn" | "replaceOn"> & {
    readonly replaceOn: readonly string[];
  };
  /** Addresses that it refers to or must follow, each once. */
  readonly dependencies: readonly string[];
  /** The user's line. */
  readonly site: Site | undefined;
}

/** A condition that is looked at after apply; it warns and never blocks. Made by {@linkcode check}. */
export class Check {
  /** Whether the world is as expected. */
  readonly condition: boolean | Output<boolean>;
  /** What to say where it is not. */
  readonly message: string;

  /**
   * Wraps a condition.
   *
   * @param condition Whether the world is as expected
   * @param message What to say where it is not
   */
  constructor(condition: boolean | Output<boolean>, message: string) {
    this.condition = condition;
    this.message = message;
    Object.freeze(this);
  }
}

/** What a stack evaluates to. */
export interface Graph {
  /** Name of the stack. */
  readonly stack: string;
  /** All resources; each comes after those that it depends on. */
  readonly resources: readonly Declaration[];
  /** The same, by address. */
  readonly byAddress: ReadonlyMap<string, Declaration>;
  /** Addresses by resource, to resolve outputs. */
  readonly addresses: ReadonlyMap<Resource, string>;
  /** Named values that the stack returns beside its resources. */
  readonly outputs: ReadonlyMap<string, unknown>;
  /** Named checks. */
  readonly checks: ReadonlyMap<string, Check>;
  /** The variables it was evaluated with. */
  readonly variables: Readonly<Record<string, string | number | boolean>>;
}

/** A declared stack. Nothing is evaluated until {@linkcode Stack.evaluate} is called. */
export class Stack {
  /** Name: it names the state file too. */
  readonly name: string;
  /** The variables and their defaults. */
  readonly variables: Variables;
  /** The user's line. */
  readonly site: Site | undefined;
  readonly #build: (variables: never) => unknown;

  /**
   * Names a tree of resources; {@linkcode stack} does the same.
   *
   * @param name Name of the stack
   * @param variables Variables and their defaults
   * @param build Returns the tree of resources
   */
  constructor(name: string, variables: Variables, build: (variables: never) => unknown) {
    this.name = name;
    this.variables = variables;
    this.#build = build;
    this.site = userSite(new Error());
  }

  /**
   * Evaluates the stack: declares everything, gives addresses, validates. It has no effect on the world.
   *
   * @param given Values of variables, as text where they come from a command line
   * @returns The graph
   * @throws {ValidationError} With every problem that was found
   */
  evaluate(given: Readonly<Record<string, string | number | boolean>> = {}): Graph {
    return evaluate(this, given, this.#build);
  }
}

/**
 * Names a tree of resources. The names in the returned tree are the addresses of the resources.
 *
 * @param name Name of the stack: letters, digits, `_` and `-`
 * @param build Returns the tree: resources in objects and arrays, and values to show as outputs
 * @returns The stack
 *
 * @example
 * ```ts
 * import { disk, stack } from "hypertopia";
 *
 * const storage = stack("storage", () => ({ data: disk({ size: "1GiB" }) }));
 * ```
 *
 * @example With variables, given by `--var replicas=5`
 * ```ts
 * import { disk, range, stack } from "hypertopia";
 *
 * const storage = stack("storage", { replicas: 3 }, ({ replicas }) => ({
 *   data: range(replicas).map(() => disk({ size: "1GiB" })),
 * }));
 * ```
 */
export function stack(name: string, build: () => unknown): Stack;
/**
 * Names a tree of resources that depends on variables.
 *
 * @param name Name of the stack
 * @param variables Defaults by name; `String`, `Number` or `Boolean` for a variable that must be given
 * @param build Returns the tree
 * @returns The stack
 */
export function stack<const V extends Variables>(
  name: string,
  variables: V,
  build: (variables: VariableValues<V>) => unknown,
): Stack;
export function stack(
  name: string,
  ...rest: [() => unknown] | [Variables, (variables: never) => unknown]
): Stack {
  return rest.length === 1 ? new Stack(name, {}, rest[0]) : new Stack(name, rest[0], rest[1]);
}

/**
 * The numbers from 0 to `count - 1`, to make several resources: their addresses are `name[0]`, `name[1]` and so on.
 *
 * @param count How many
 * @returns The numbers
 * @throws {RangeError} If the count is not a whole number of at least zero
 *
 * @example
 * ```ts
 * import { range } from "hypertopia/dsl";
 * import assert from "node:assert/strict";
 *
 * assert.deepEqual(range(3), [0, 1, 2]);
 * ```
 */
export function range(count: number): number[] {
  if (!Number.isInteger(count) || count < 0) {
    throw new RangeError(
      `Cannot make a range as the count must be a whole number >= 0: current value is ${count}`,
    );
  }
  return Array.from({ length: count }, (_, index) => index);
}

/**
 * A condition on the finished stack. Return it in the tree under a name; where it does not hold, a warning says so.
 *
 * @param condition Whether the world is as expected
 * @param message What to say where it is not
 * @returns The check
 */
export function check(condition: boolean | Output<boolean>, message: string): Check {
  return new Check(condition, message);
}

const optionsSchema = object({
  protect: optional(boolean()),
  createBeforeDestroy: optional(boolean()),
  movedFrom: optional(string()),
  adopt: optional(boolean()),
  retain: optional(boolean()),
  timeouts: optional(object({
    create: optional(duration()),
    update: optional(duration()),
    delete: optional(duration()),
  })),
  ignoreChanges: optional(array(string())),
});

type Path = readonly (string | number)[];

function addressOf(path: Path): string {
  return path.reduce<string>(
    (whole, part) => typeof part === "number" ? `${whole}[${part}]` : joinField(whole, part),
    "",
  );
}

function evaluate(
  stack: Stack,
  given: Readonly<Record<string, string | number | boolean>>,
  build: (variables: never) => unknown,
): Graph {
  const diagnostics: Diagnostic[] = [];
  if (!/^[A-Za-z][\w-]{0,62}$/.test(stack.name)) {
    const reason = "Stack name must be a letter, then at most 62 letters, digits, _ or -";
    diagnostics.push(problem("", "", reason, stack.site, stack.name));
  }
  const variables = readVariables(stack, given, diagnostics);
  if (diagnostics.length > 0) throw new ValidationError(stack.name, diagnostics);

  const named = new Map<Resource, string[]>();
  const outputs = new Map<string, unknown>();
  const checks = new Map<string, Check>();
  walkTree(build(variables as never), [], (value, address) => {
    if (isResource(value)) named.set(value, [...(named.get(value) ?? []), address]);
    else if (value instanceof Check) checks.set(address, value);
    else if (value !== undefined) outputs.set(address, value);
  });

  const fault = (resource: Resource, address: string, reason: string, field = "") => {
    diagnostics.push(problem(address, field, reason, resource.site()));
  };
  const addresses = new Map<Resource, string>();
  for (const [resource, places] of named) {
    if (places.length > 1) {
      fault(
        resource,
        places[0]!,
        `Resource is in the stack's tree under several names: ${places.join(", ")}: keep one`,
      );
    }
    addresses.set(resource, places[0]!);
  }

  // Resources used inline get the address of their one place of use.
  const uses = new Map<Resource, { owner: Resource; field: string }[]>();
  const queue = [...named.keys()];
  const inline = new Set<Resource>();
  const visit = (owner: Resource, value: unknown, field: string) => {
    walkValue(value, field, (found, at, direct) => {
      if (named.has(found)) return;
      if (direct) {
        const list = uses.get(found) ?? [];
        if (!list.some((use) => use.owner === owner && use.field === at)) list.push({ owner, field: at });
        uses.set(found, list);
      }
      if (!inline.has(found)) {
        inline.add(found);
        queue.push(found);
      }
    });
  };
  for (let next = queue.shift(); next; next = queue.shift()) {
    visit(next, next.props, "");
    for (const each of [...follow(next), ...(next.options.replaceOn ?? [])]) {
      if (isResource(each) && !named.has(each) && !inline.has(each)) {
        inline.add(each);
        queue.push(each);
      }
    }
  }
  for (const value of outputs.values()) {
    walkValue(value, "", (found) => !named.has(found) && inline.add(found));
  }
  for (const resource of inline) {
    const list = uses.get(resource) ?? [];
    if (list.length === 1) continue;
    const places = list.map((use) => addressIn(use.owner, use.field)).join(", ");
    fault(
      resource,
      "",
      list.length === 0
        ? `A ${resource.kind.name} is referred to and not declared in the stack: return it in the stack's tree`
        : `A ${resource.kind.name} is used in several places (${places}): return it in the stack's tree under a name`,
    );
  }
  function addressIn(owner: Resource, field: string): string {
    const known = addresses.get(owner);
    if (known !== undefined) return `${known}.${field}`;
    const use = uses.get(owner)?.[0];
    return use ? `${addressIn(use.owner, use.field)}.${field}` : `(${owner.kind.name}).${field}`;
  }
  for (const resource of inline) {
    const use = uses.get(resource)?.[0];
    if (use) {
      addresses.set(resource, addressIn(use.owner, use.field.replace(/(?<=.)\.disk$/, "")));
    }
  }
  const taken = new Map<string, Resource>();
  for (const [resource, address] of addresses) {
    if (taken.has(address) && taken.get(address) !== resource) {
      fault(
        resource,
        address,
        `Two resources have the address "${address}": return one of them under another name`,
      );
    }
    taken.set(address, resource);
  }

  const declarations: Declaration[] = [];
  for (const [resource, address] of addresses) {
    declarations.push(declaration(resource, address, addresses, diagnostics));
  }
  const ordered = order(declarations, diagnostics);
  if (diagnostics.length > 0) {
    diagnostics.sort((a, b) => a.address < b.address ? -1 : a.address > b.address ? 1 : 0);
    throw new ValidationError(stack.name, diagnostics);
  }
  return {
    stack: stack.name,
    resources: ordered,
    byAddress: new Map(ordered.map((each) => [each.address, each])),
    addresses,
    outputs,
    checks,
    variables,
  };
}

function follow(resource: Resource): readonly Resource[] {
  const { dependsOn } = resource.options;
  return typeof dependsOn === "function" ? dependsOn() : dependsOn ?? [];
}

function readVariables(
  stack: Stack,
  given: Readonly<Record<string, string | number | boolean>>,
  diagnostics: Diagnostic[],
): Record<string, string | number | boolean> {
  const result: Record<string, string | number | boolean> = {};
  const fault = (reason: string, value?: unknown) =>
    diagnostics.push(problem("", "", reason, stack.site, value));
  for (const name of Object.keys(given)) {
    if (Object.hasOwn(stack.variables, name)) continue;
    const known = Object.keys(stack.variables);
    fault(`Variable "${name}" is not declared: declared are ${known.length ? known.join(", ") : "none"}`);
  }
  for (const [name, fallback] of Object.entries(stack.variables)) {
    const value = Object.hasOwn(given, name) ? given[name] : undefined;
    const type = typeof fallback === "function"
      ? (fallback === Number ? "number" : fallback === Boolean ? "boolean" : "string")
      : typeof fallback;
    if (value === undefined) {
      if (typeof fallback === "function") {
        fault(`Variable "${name}" has no value: give one with --var ${name}=VALUE`);
      } else result[name] = fallback;
    } else if (type === "string") {
      result[name] = String(value);
    } else if (type === "number" && String(value).trim() !== "" && Number.isFinite(Number(value))) {
      result[name] = Number(value);
    } else if (type === "boolean" && /^(true|false)$/.test(String(value))) {
      result[name] = String(value) === "true";
    } else {
      fault(`Variable "${name}" must be a ${type}`, value);
    }
  }
  return result;
}

/** Visits the leaves of a stack's tree with their addresses. */
function walkTree(value: unknown, path: Path, leaf: (value: unknown, address: string) => void): void {
  if (Array.isArray(value)) value.forEach((each, index) => walkTree(each, [...path, index], leaf));
  else if (isPlainObject(value)) {
    for (const [key, each] of Object.entries(value)) walkTree(each, [...path, key], leaf);
  } else if (path.length > 0) leaf(value, addressOf(path));
  else if (isResource(value)) {
    throw new TypeError("Cannot name the resource: return an object, as in { name: resource }");
  }
}

/** Visits the resources inside a value: direct ones, and those that outputs refer to. */
function walkValue(
  value: unknown,
  field: string,
  found: (resource: Resource, field: string, direct: boolean) => void,
): void {
  if (isResource(value)) found(value, field, true);
  else if (isOutput(value)) {
    const { expression } = value;
    if (expression.type === "reference") found(expression.resource, field, false);
    else if (expression.type === "derived") {
      for (const each of expression.inputs) {
        walkValue(each, field, (resource, at) => found(resource, at, false));
      }
    }
  } else if (Array.isArray(value)) {
    value.forEach((each, index) => walkValue(each, `${field}[${index}]`, found));
  } else if (isPlainObject(value)) {
    for (const [key, each] of Object.entries(value)) walkValue(each, joinField(field, key), found);
  } else if (value instanceof Choice) {
    walkValue(value.options, field, found);
  }
}

function declaration(
  resource: Resource,
  address: string,
  addresses: ReadonlyMap<Resource, string>,
  diagnostics: Diagnostic[],
): Declaration {
  let site: Site | undefined;
  const report = (field: string, reason: string, value?: unknown) => {
    site ??= resource.site();
    diagnostics.push(problem(address, field, reason, site, value));
  };
  refuseMarks(resource.props, "", report);
  const props = resource.kind.schema.check(resource.props, "", report);
  const { dependsOn: _, replaceOn = [], ignoreChanges, ...rest } = resource.options;
  const options = optionsSchema.check(
    { ...rest, ...(Array.isArray(ignoreChanges) ? { ignoreChanges } : {}) },
    "options",
    report,
  ) as LifecycleOptions;
  const dependencies = new Set<string>();
  const depend = (found: Resource) => {
    const target = addresses.get(found);
    if (target !== undefined && target !== address) dependencies.add(target);
  };
  walkValue(props, "", depend);
  const followed = [...follow(resource), ...replaceOn];
  for (const each of followed) {
    if (isResource(each)) depend(each);
    else report("options.dependsOn", "Value must be a list of resources", each);
  }
  return {
    address,
    kind: resource.kind,
    props: isPlainObject(props) ? props : {},
    options: {
      ...options,
      ...(ignoreChanges === "all" ? { ignoreChanges } : {}),
      replaceOn: replaceOn.map((each) => addresses.get(each)).filter((each) => each !== undefined),
    },
    dependencies: [...dependencies].sort(),
    get site() {
      return site ??= resource.site();
    },
  };
}

/** Names that stand for something else in state. */
const MARKS: ReadonlySet<string> = new Set(["$secret", "$unknown", "$resource", "$encrypted"]);

function refuseMarks(value: unknown, field: string, report: (field: string, reason: string) => void): void {
  if (Array.isArray(value)) value.forEach((each, index) => refuseMarks(each, `${field}[${index}]`, report));
  else if (isPlainObject(value)) {
    for (const [key, each] of Object.entries(value)) {
      if (MARKS.has(key)) report(joinField(field, key), `Name "${key}" is reserved: use another one`);
      refuseMarks(each, joinField(field, key), report);
    }
  }
}

/** Orders declarations so that each follows its dependencies, in declared order where free; reports a cycle. */
function order(declarations: readonly Declaration[], diagnostics: Diagnostic[]): Declaration[] {
  const index = new Map(declarations.map((each, position) => [each.address, position]));
  const state = new Uint8Array(declarations.length);
  const result: Declaration[] = [];
  for (let root = 0; root < declarations.length; root++) {
    if (state[root] !== 0) continue;
    const path: { at: number; next: number }[] = [{ at: root, next: 0 }];
    state[root] = 1;
    while (path.length > 0) {
      const top = path[path.length - 1]!;
      const dependency = declarations[top.at]!.dependencies[top.next++];
      if (dependency === undefined) {
        state[top.at] = 2;
        result.push(declarations[top.at]!);
        path.pop();
        continue;
      }
      const target = index.get(dependency);
      if (target === undefined) continue;
      if (state[target] === 0) {
        state[target] = 1;
        path.push({ at: target, next: 0 });
      } else if (state[target] === 1) {
        const cycle = path.slice(path.findIndex((each) => each.at === target)).map((each) =>
          declarations[each.at]!
        );
        const names = [...cycle, cycle[0]!].map((each) => each.address).join(" -> ");
        const reason =
          `Resources depend on each other in a cycle: ${names}: remove one of these dependencies`;
        diagnostics.push(problem(cycle[0]!.address, "", reason, cycle[0]!.site));
      }
    }
  }
  return result;
}
