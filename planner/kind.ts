/**
 * The kind contract: what the planner needs to know of a sort of resource. It is public; an `infra.ts` may define
 * kinds of its own.
 *
 * @module
 */

import {
  type Inputs,
  type KindDefinition,
  type LifecycleOptions,
  object,
  type ObjectOf,
  reference,
  Resource,
  type ResourceWith,
  type Schema,
  type Shape,
} from "../dsl/mod.ts";

/** How much a change disturbs, from nothing to losing the object. */
export type DisruptionClass = "none" | "live" | "hotplug" | "reboot" | "recreate";

/** The classes of {@linkcode DisruptionClass}, mildest first. */
export const DISRUPTION_CLASSES: readonly DisruptionClass[] = [
  "none",
  "live",
  "hotplug",
  "reboot",
  "recreate",
];

/** How a change of one field is carried out. */
export interface Disruption {
  /** How much it disturbs. */
  readonly class: DisruptionClass;
  /** By what means, in a few words, such as `balloon`. */
  readonly mechanism?: string;
}

/** One field that differs. */
export interface FieldDifference {
  /** Path of the field, such as `nics.eth0.ip`. */
  readonly field: string;
  /** Value before; undefined where it was absent. */
  readonly before: unknown;
  /** Value after; undefined where it becomes absent. */
  readonly after: unknown;
}

/** A JSON value by name. */
export type Json = Readonly<Record<string, unknown>>;

/** An object that the planner has on record. */
export interface Instance<Props = Json, Outputs = Json> {
  /** Address in the stack. */
  readonly address: string;
  /** Identity of the object: 16 hexadecimal digits, unique to state, address and generation. */
  readonly id: string;
  /** Name of the stack. */
  readonly stack: string;
  /** Props that were applied last, secrets in clear. */
  readonly props: Props;
  /** Outputs of the last apply; undefined where it never finished. */
  readonly outputs: Outputs | undefined;
}

/** What the world shows of an instance. */
export interface Observation<Props = Json, Outputs = Json> {
  /** Props whose live values are known; they are laid over the recorded ones, object by object. */
  readonly props?: { readonly [K in keyof Props]?: unknown };
  /** Outputs whose live values are known. */
  readonly outputs?: { readonly [K in keyof Outputs]?: unknown };
}

/** A declared instance on its way into a plan. */
export interface Draft<Props = Json, Outputs = Json> {
  /** Address in the stack. */
  readonly address: string;
  /** Name of the stack. */
  readonly stack: string;
  /** Resolved props: `{ $unknown: true }` stands where a value is not known yet. {@linkcode Kind.prepare} may set them. */
  props: Props;
  /** Recorded outputs, where the instance exists. */
  readonly recorded: Outputs | undefined;
  /** Props of the resources that this one refers to, by address. */
  readonly references: ReadonlyMap<string, Json>;
  /** Reports a problem with a field. */
  report(field: string, reason: string, value?: unknown): void;
}

/** A resource that another one refers to. */
export interface Dependency {
  /** Its address. */
  readonly address: string;
  /** Its kind. */
  readonly kind: string;
  /** Its identity. */
  readonly id: string;
  /** Its props. */
  readonly props: Json;
  /** Its outputs. */
  readonly outputs: Json;
}

/** What every driver call receives. */
export interface Request<Props = Json, Outputs = Json> extends Instance<Props, Outputs> {
  /** Props before, where the object was applied before. */
  readonly before: Props | undefined;
  /** The resources that the props refer to, by address. */
  readonly dependencies: ReadonlyMap<string, Dependency>;
  /** Aborted by Ctrl-C and time limits. Stop at the next safe point and throw its reason. */
  readonly signal: AbortSignal;
  /** Shows progress, such as `"downloading 42%"`. */
  report(progress: string): void;
}

/** A kind with its driver. Drivers reconcile: every call may follow one that was cut off at any instant. */
export interface Kind<Props = Json, Outputs = Json> extends KindDefinition<Props> {
  /** Whether a replacement is made before the old object is removed, unless a resource says otherwise. */
  readonly replace?: "create-first" | "delete-first";
  /**
   * Tells how a change of a field is carried out. Fields that it does not cover are `recreate`.
   *
   * @param difference The field
   * @param recorded Recorded instance with its live values
   * @param desired Props that are wanted
   */
  disruption?(difference: FieldDifference, recorded: Instance<Props, Outputs>, desired: Props): Disruption;
  /**
   * Completes and checks the props of all instances together before a plan: derived addresses, limits of the host.
   *
   * @param drafts All declared instances of the kind
   */
  prepare?(drafts: readonly Draft<Props, Outputs>[]): void | Promise<void>;
  /**
   * Foretells outputs before apply, as far as props decide them. An output that is left out is taken to stay as it is
   * when the object is updated; `{ $unknown: true }` says that it may change.
   *
   * @param draft The declared instance
   */
  predict?(draft: Draft<Props, Outputs>): Partial<Outputs>;
  /**
   * Looks at the world, once for all instances.
   *
   * @param instances The recorded instances, and declared ones that are not on record
   * @param signal Aborted by Ctrl-C
   * @returns Observations by address; an absent address means that the object does not exist
   */
  observe(
    instances: readonly Instance<Props, Outputs>[],
    signal: AbortSignal,
  ): Promise<ReadonlyMap<string, Observation<Props, Outputs>>>;
  /**
   * Makes sure that this host can carry a plan out, before anything is changed.
   *
   * @param instances The instances that are to be created or updated; props may hold `{ $unknown: true }`
   * @param signal Aborted by Ctrl-C
   */
  preflight?(
    instances: readonly Omit<Draft<Props, Outputs>, "report">[],
    signal: AbortSignal,
  ): Promise<void>;
  /**
   * Makes the object be as the props say, whether it exists or not. Idempotent.
   *
   * @param request The wanted instance
   * @returns The outputs
   */
  ensure(request: Request<Props, Outputs>): Promise<Outputs>;
  /**
   * Waits until the object is of use. It is on record by then, so that a failure loses nothing.
   *
   * @param request The instance
   */
  ready?(request: Request<Props, Outputs>): Promise<void>;
  /**
   * Removes the object and all that belongs to it. Idempotent.
   *
   * @param request The instance
   */
  remove(request: Request<Props, Outputs>): Promise<void>;
}

/** A {@linkcode Kind} of any props, as the planner holds them. */
// deno-lint-ignore no-explicit-any
export type AnyKind = Kind<any, any>;

/** What {@linkcode kind} takes: shapes and a driver. */
export interface KindOptions<P extends Shape, O extends Shape> {
  /** Name of the kind, in snake_case. */
  readonly name: string;
  /** Shapes of the props. */
  readonly props: P;
  /** Shapes of the outputs; each becomes a field of the handle. */
  readonly outputs?: O;
  /** Disruption by field; a field covers those inside it. Other fields are `recreate`. */
  readonly disruption?: Readonly<Record<string, DisruptionClass>>;
  /** See {@linkcode Kind.observe}. */
  readonly observe: Kind<ObjectOf<P>, ObjectOf<O>>["observe"];
  /** See {@linkcode Kind.ensure}. */
  readonly ensure: Kind<ObjectOf<P>, ObjectOf<O>>["ensure"];
  /** See {@linkcode Kind.predict}. */
  readonly predict?: (
    draft: Draft<ObjectOf<P>, ObjectOf<O>>,
  ) => { readonly [K in keyof ObjectOf<O>]?: unknown };
  /** See {@linkcode Kind.ready}. */
  readonly ready?: Kind<ObjectOf<P>, ObjectOf<O>>["ready"];
  /** See {@linkcode Kind.remove}. */
  readonly remove: Kind<ObjectOf<P>, ObjectOf<O>>["remove"];
}

/** A function that declares resources of a kind. */
export interface Declare<P extends Shape, O extends Shape> {
  /**
   * Declares a resource.
   *
   * @param props Its props
   * @param options Lifecycle options
   */
  (props: Inputs<ObjectOf<P>>, options?: LifecycleOptions): ResourceWith<ObjectOf<O>>;
  /** The kind itself, for the `kinds` of `cli()`. */
  readonly kind: AnyKind;
}

/**
 * Defines a kind of resource.
 *
 * @param options Shapes and driver
 * @returns The function that declares such resources
 *
 * @example A kind for text files
 * ```ts
 * import { kind, number, string } from "hypertopia";
 *
 * const textFile = kind({
 *   name: "text_file",
 *   props: { path: string(), content: string() },
 *   outputs: { bytes: number() },
 *   disruption: { content: "live" },
 *   async observe(files) {
 *     const found = new Map();
 *     for (const { address, props } of files) {
 *       const content = await Deno.readTextFile(props.path).catch(() => undefined);
 *       if (content !== undefined) found.set(address, { props: { content } });
 *     }
 *     return found;
 *   },
 *   async ensure({ props }) {
 *     await Deno.writeTextFile(props.path, props.content);
 *     return { bytes: new TextEncoder().encode(props.content).length };
 *   },
 *   async remove({ props }) {
 *     await Deno.remove(props.path).catch(() => {});
 *   },
 * });
 * ```
 */
export function kind<const P extends Shape, const O extends Shape = Record<never, never>>(
  options: KindOptions<P, O>,
): Declare<P, O> {
  const { name, props, outputs, disruption = {}, observe, ensure, predict, ready, remove } = options;
  const definition: Kind<ObjectOf<P>, ObjectOf<O>> = {
    name,
    schema: object(props) as Schema<ObjectOf<P>>,
    disruption: ({ field }) => ({ class: longestPrefix(field, disruption) ?? "recreate" }),
    observe,
    ensure,
    ...(predict ? { predict: predict as Kind<ObjectOf<P>, ObjectOf<O>>["predict"] & object } : {}),
    ...(ready ? { ready } : {}),
    remove,
  };
  const make = (input: Inputs<ObjectOf<P>>, lifecycle?: LifecycleOptions): ResourceWith<ObjectOf<O>> => {
    const resource = new Resource(definition, input, lifecycle);
    for (const field of Object.keys(outputs ?? {})) {
      Object.defineProperty(resource, field, { value: reference(resource, [field]), enumerable: true });
    }
    return Object.freeze(resource) as ResourceWith<ObjectOf<O>>;
  };
  return Object.assign(make, { kind: definition as AnyKind });
}

/**
 * Finds the entry of the longest path that covers a field.
 *
 * @param field Path of the field
 * @param entries Values by path
 * @returns The value, or undefined where none covers the field
 */
export function longestPrefix<T>(field: string, entries: Readonly<Record<string, T>>): T | undefined {
  let best: string | undefined;
  for (const key of Object.keys(entries)) {
    if (covers(key, field) && key.length > (best?.length ?? -1)) best = key;
  }
  return best === undefined ? undefined : entries[best];
}

/**
 * Tells whether a path is a field or contains it.
 *
 * @param path The path, such as `nics.eth0`
 * @param field The field, such as `nics.eth0.ip`
 * @returns Whether the path covers the field
 */
export function covers(path: string, field: string): boolean {
  return field === path ||
    (field.startsWith(path) && (field[path.length] === "." || field[path.length] === "["));
}
