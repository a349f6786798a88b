/**
 * Resources: frozen declarations of things that should exist.
 *
 * @module
 */

import { type Inputs, type Output, reference } from "./output.ts";
import type { Duration } from "./units.ts";
import type { Schema } from "./schema.ts";
import { captureSite, type Site } from "./site.ts";

const BRAND: unique symbol = Symbol.for("hypertopia.Resource") as never;

/** What a declaration must know of its kind. The planner's kind contract extends it with a driver. */
export interface KindDefinition<Props = unknown> {
  /** Name of the kind, such as `vm`. */
  readonly name: string;
  /** Shape of the props; it validates and normalises them. */
  readonly schema: Schema<Props>;
}

/** What should happen to a resource over its life, with OpenTofu's meanings. The last argument of every resource. */
export interface LifecycleOptions {
  /** Refuse any plan that would destroy it. Kept in state, so that deleting the line does not unprotect. */
  readonly protect?: boolean;
  /** Fields whose changes are ignored, such as `"memory"` or `"nics.eth0"`; `"all"` ignores every field. */
  readonly ignoreChanges?: readonly string[] | "all";
  /** Replace this resource whenever one of these is changed or replaced. */
  readonly replaceOn?: readonly Resource[];
  /** When it must be replaced, make the new one before the old one is destroyed. */
  readonly createBeforeDestroy?: boolean;
  /** Order without a reference. A function may name resources that are declared later. */
  readonly dependsOn?: readonly Resource[] | (() => readonly Resource[]);
  /** The address that it had before. */
  readonly movedFrom?: string;
  /** Take over an object that exists already. */
  readonly adopt?: boolean;
  /** Limits on how long an operation may take. */
  readonly timeouts?: { readonly create?: Duration; readonly update?: Duration; readonly delete?: Duration };
  /** Forget it, and leave it running, when it is no longer declared. */
  readonly retain?: boolean;
}

/** A declared thing: a kind with props. Its address comes from its place in the stack. */
export class Resource {
  /** Marks declarations for {@linkcode Inputs}, which leaves them as they are. */
  readonly isDeclaration = true;
  /** The kind. */
  readonly kind: KindDefinition;
  /** Props as the user wrote them. */
  readonly props: unknown;
  /** Lifecycle options. */
  readonly options: LifecycleOptions;
  /** Finds the user's line. */
  readonly site: () => Site | undefined;

  /**
   * Declares a resource.
   *
   * @param kind The kind
   * @param props Props as the user wrote them
   * @param options Lifecycle options
   */
  constructor(kind: KindDefinition, props: unknown, options: LifecycleOptions = {}) {
    this.kind = kind;
    this.props = freeze(props);
    this.options = { ...options };
    this.site = captureSite();
    Object.defineProperty(this, BRAND, { value: true });
  }
}

/**
 * Tells whether a value is a {@linkcode Resource}, also one made by another copy of this module.
 *
 * @param value Any value
 * @returns Whether it is a resource
 */
export function isResource(value: unknown): value is Resource {
  return typeof value === "object" && value !== null && BRAND in value;
}

/** A resource whose outputs are fields of the handle. */
export type ResourceWith<Outputs> = Resource & { readonly [K in keyof Outputs]: Output<Outputs[K]> };

/**
 * Declares a resource and puts its output fields on the handle.
 *
 * @typeParam Props Props after normalisation
 * @typeParam Outputs What is known after apply
 * @param kind The kind
 * @param props Props as the user wrote them
 * @param options Lifecycle options
 * @param outputs Names of the output fields
 * @returns The frozen handle
 */
export function declare<Props, Outputs extends object>(
  kind: KindDefinition<Props>,
  props: Inputs<Props>,
  options: LifecycleOptions | undefined,
  outputs: readonly (keyof Outputs & string)[],
): ResourceWith<Outputs> {
  const resource = new Resource(kind, props, options);
  for (const name of outputs) {
    Object.defineProperty(resource, name, { value: reference(resource, [name]), enumerable: true });
  }
  return Object.freeze(resource) as ResourceWith<Outputs>;
}

/** Copies plain objects and arrays and freezes the copies, so that later changes by the caller have no effect. */
function freeze(value: unknown, seen: readonly unknown[] = []): unknown {
  if (typeof value !== "object" || value === null) return value;
  if (seen.includes(value)) throw new TypeError("Cannot declare a resource whose props contain themselves");
  if (Array.isArray(value)) return Object.freeze(value.map((each) => freeze(each, [...seen, value])));
  if (Object.getPrototypeOf(value) !== Object.prototype) return value;
  return Object.freeze(
    Object.fromEntries(Object.entries(value).map(([key, each]) => [key, freeze(each, [...seen, value])])),
  );
}
