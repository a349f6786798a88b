/**
 * Values that may be known only after apply.
 *
 * @module
 */

import type { Resource } from "./resource.ts";

const BRAND: unique symbol = Symbol.for("hypertopia.Output") as never;

/** A plain value, or one that becomes known at apply. */
export type Input<T> = T | Output<T>;

/** {@linkcode Input} at every depth of a value: what a prop accepts. */
export type Inputs<T> = T extends Output<infer U> ? Input<U>
  : T extends string | number | boolean | null | undefined ? Input<T>
  : T extends (...args: never[]) => unknown ? T
  : T extends { readonly isDeclaration: true } ? T
  : T extends readonly (infer U)[] ? readonly Inputs<U>[]
  : { [K in keyof T]: Inputs<T[K]> };

/** What an {@linkcode Output} is made of; the planner reads it. */
export type Expression =
  | { readonly type: "value"; readonly value: unknown; readonly secret: boolean }
  | { readonly type: "reference"; readonly resource: Resource; readonly path: readonly string[] }
  | {
    readonly type: "derived";
    readonly inputs: readonly unknown[];
    readonly compute: (values: readonly unknown[]) => unknown;
  };

/**
 * A value that is known now or becomes known when the resource it comes from has been applied. Outputs are made by
 * resources (`db.nics.eth0.ip`), by {@linkcode text} and by {@linkcode secret}; they are never read directly.
 *
 * @typeParam T The type of the value
 */
export class Output<T> {
  /** How the value comes about. */
  readonly expression: Expression;

  /**
   * Wraps an expression; kinds use {@linkcode reference}.
   *
   * @param expression How the value comes about
   */
  constructor(expression: Expression) {
    this.expression = expression;
    Object.defineProperty(this, BRAND, { value: true });
    Object.freeze(this);
  }

  /**
   * Makes an output whose value is computed from this one. A saved plan is bound to the text of the function, and not to
   * variables that it uses from outside: pass those in with `text` or as props.
   *
   * @param compute A pure function of the value
   * @returns The output of the result
   *
   * @example
   * ```ts
   * import { secret } from "hypertopia/dsl";
   *
   * const url = secret("s3cr3t").map((password) => `postgres://app:${password}@db/app`);
   * ```
   */
  map<U>(compute: (value: T) => U): Output<U> {
    return new Output<U>({ type: "derived", inputs: [this], compute: ([value]) => compute(value as T) });
  }

  /** Refuses, since the value may not be known yet: `text` is there for this. */
  toString(): string {
    throw new TypeError(
      "Cannot turn an output into a string before apply: use the text tag, as in text`http://${ip}`",
    );
  }

  /** Refuses, as {@linkcode Output.toString} does. */
  toJSON(): never {
    throw new TypeError("Cannot turn an output into JSON before apply: use map()");
  }
}

/**
 * Tells whether a value is an {@linkcode Output}, also one made by another copy of this module.
 *
 * @param value Any value
 * @returns Whether it is an output
 */
export function isOutput(value: unknown): value is Output<unknown> {
  return typeof value === "object" && value !== null && BRAND in value;
}

/**
 * A template tag that builds a string from plain values and outputs.
 *
 * @param strings The literal parts
 * @param values The parts between them
 * @returns The output of the whole string
 *
 * @example
 * ```ts
 * import { secret, text } from "hypertopia/dsl";
 *
 * const password = secret("s3cr3t");
 * const url = text`postgres://app:${password}@db/app`;
 * ```
 */
export function text(
  strings: TemplateStringsArray,
  ...values: readonly Input<string | number | boolean>[]
): Output<string> {
  return new Output<string>({
    type: "derived",
    // The literal parts are inputs too, so that a saved plan is bound to them.
    inputs: [[...strings], ...values],
    compute: ([parts, ...known]) =>
      (parts as string[]).reduce((whole, part, index) => `${whole}${String(known[index - 1])}${part}`),
  });
}

/**
 * Marks a value as secret: it is never shown, and it is encrypted in state and in plan files.
 *
 * @param value The clear value
 * @returns An output that carries the mark to everything that is made from it
 *
 * @example
 * ```ts
 * import { secret } from "hypertopia/dsl";
 *
 * const token = secret(Deno.env.get("TOKEN") ?? "none");
 * ```
 */
export function secret<T extends string | number | boolean>(value: T): Output<T> {
  return new Output<T>({ type: "value", value, secret: true });
}

/**
 * An output that refers to one output field of a resource. Kinds use it to build their handles.
 *
 * @param resource The resource
 * @param path The names that lead to the field
 * @returns The output
 */
export function reference<T>(resource: Resource, path: readonly string[]): Output<T> {
  return new Output<T>({ type: "reference", resource, path: [...path] });
}
