/**
 * Shapes of props: they validate what the user wrote, report every problem, and bring values into one normal form.
 *
 * @module
 */

import { isOutput, type Output } from "./output.ts";
import { isResource, type Resource } from "./resource.ts";
import {
  type Cidr,
  type Duration,
  formatDuration,
  formatSize,
  type Ipv4,
  parseCidr,
  parseDuration,
  parseIpv4,
  parseSize,
  type Size,
} from "./units.ts";

/** Takes one problem: the field, why it is wrong, and the value if it should be shown. */
export type Report = (field: string, reason: string, value?: unknown) => void;

/** A shape. `T` is the normal form. */
export interface Schema<T> {
  /** Carries the type only; never set. */
  readonly _type?: T;
  /** What is wanted, in words, such as `a size`. */
  readonly description: string;
  /** Whether the field may be left out. */
  readonly optional?: boolean;
  /**
   * Checks a value.
   *
   * @param value What the user wrote; undefined where the field is absent
   * @param field Path of the field
   * @param report Takes each problem
   * @returns The normal form; meaningless after a report
   */
  check(value: unknown, field: string, report: Report): unknown;
}

/** The normal form that a schema describes. */
export type Infer<S> = S extends Schema<infer T> ? T : never;

/** A schema whose field may be left out. */
export type OptionalSchema<T> = Schema<T> & { readonly optional: true };

/** Schemas by field name. */
export type Shape = { readonly [field: string]: Schema<unknown> };

/** The object type that a {@linkcode Shape} describes. */
export type ObjectOf<S extends Shape> =
  & { [K in keyof S as S[K] extends { readonly optional: true } ? never : K]: Infer<S[K]> }
  & { [K in keyof S as S[K] extends { readonly optional: true } ? K : never]?: Infer<S[K]> };

/** Stands in resolved props for a value that is known only after apply. */
export interface Unknown {
  /** The mark. */
  readonly $unknown: true;
}

/** Stands in resolved props for a secret; the planner encrypts it wherever it is stored. */
export interface Secret {
  /** The clear value. */
  readonly $secret: unknown;
}

/**
 * Tells whether a resolved prop is not known yet.
 *
 * @param value Any value
 * @returns Whether it is an {@linkcode Unknown}
 */
export function isUnknown(value: unknown): value is Unknown {
  return typeof value === "object" && value !== null && "$unknown" in value;
}

/**
 * Tells whether a resolved prop is a secret.
 *
 * @param value Any value
 * @returns Whether it is a {@linkcode Secret}
 */
export function isSecret(value: unknown): value is Secret {
  return typeof value === "object" && value !== null && "$secret" in value;
}

/**
 * Appends a key to a field path, quoting where it is not a plain name.
 *
 * @param field Path so far, or empty
 * @param key The next key
 * @returns The longer path
 */
export function joinField(field: string, key: string): string {
  if (!/^[A-Za-z_][\w-]*$/.test(key)) return `${field}[${JSON.stringify(key)}]`;
  return field === "" ? key : `${field}.${key}`;
}

function make<T>(
  description: string,
  check: (value: unknown, field: string, report: Report) => unknown,
): Schema<T> {
  return {
    description,
    check(value, field, report) {
      if (isOutput(value) || isUnknown(value)) return value;
      if (isSecret(value)) {
        const inner = check(value.$secret, field, (at, reason) => report(at, reason));
        return { $secret: inner };
      }
      if (value === undefined) {
        report(field, `Required field is missing: write ${description}`);
        return undefined;
      }
      return check(value, field, report);
    },
  };
}

/** Limits on a {@linkcode string}. */
export interface StringOptions {
  /** What the text must match. */
  readonly pattern?: RegExp;
  /** What is wanted, in words. */
  readonly description?: string;
}

/**
 * A text.
 *
 * @param options Limits
 * @returns The schema
 */
export function string(options: StringOptions = {}): Schema<string> {
  const description = options.description ?? "a string";
  return make(description, (value, field, report) => {
    if (typeof value !== "string" || (options.pattern && !options.pattern.test(value))) {
      report(field, `Value must be ${description}`, value);
    }
    return value;
  });
}

/** Limits on a {@linkcode number}. */
export interface NumberOptions {
  /** Smallest value. */
  readonly min?: number;
  /** Largest value. */
  readonly max?: number;
  /** Whether fractions are refused. */
  readonly integer?: boolean;
}

/**
 * A finite number.
 *
 * @param options Limits
 * @returns The schema
 */
export function number(options: NumberOptions = {}): Schema<number> {
  const { min, max, integer } = options;
  const range = min !== undefined && max !== undefined
    ? ` from ${min} to ${max}`
    : min !== undefined
    ? ` of at least ${min}`
    : max !== undefined
    ? ` of at most ${max}`
    : "";
  const description = `${integer ? "a whole number" : "a number"}${range}`;
  return make(description, (value, field, report) => {
    const good = typeof value === "number" && Number.isFinite(value) &&
      (!integer || Number.isInteger(value)) &&
      (min === undefined || value >= min) && (max === undefined || value <= max);
    if (!good) report(field, `Value must be ${description}`, value);
    return value;
  });
}

/**
 * `true` or `false`.
 *
 * @returns The schema
 */
export function boolean(): Schema<boolean> {
  return make("true or false", (value, field, report) => {
    if (typeof value !== "boolean") report(field, "Value must be true or false", value);
    return value;
  });
}

/**
 * One of some texts.
 *
 * @param values The texts
 * @returns The schema
 */
export function oneOf<const T extends string>(...values: readonly T[]): Schema<T> {
  const description = `one of ${values.map((value) => `"${value}"`).join(", ")}`;
  return make(description, (value, field, report) => {
    if (!(values as readonly unknown[]).includes(value)) report(field, `Value must be ${description}`, value);
    return value;
  });
}

function parsed<T>(description: string, normalise: (text: string) => T): Schema<T> {
  return make(description, (value, field, report) => {
    if (typeof value !== "string") {
      report(field, `Value must be ${description}`, value);
      return value;
    }
    try {
      return normalise(value);
    } catch (error) {
      report(field, error instanceof Error ? error.message : String(error), value);
      return value;
    }
  });
}

/** Limits on a {@linkcode size}. */
export interface SizeOptions {
  /** Smallest size. */
  readonly min?: Size;
  /** Largest size. */
  readonly max?: Size;
  /** What it must be a multiple of. */
  readonly multiple?: Size;
}

/**
 * An amount of memory or storage. Its normal form uses the largest exact unit: `"1024MiB"` becomes `"1GiB"`.
 *
 * @param options Limits
 * @returns The schema
 */
export function size(options: SizeOptions = {}): Schema<Size> {
  return parsed('a size such as "512MiB"', (text) => {
    const bytes = parseSize(text);
    if (options.min && bytes < parseSize(options.min)) {
      throw new RangeError(`Size must be at least ${options.min}`);
    }
    if (options.max && bytes > parseSize(options.max)) {
      throw new RangeError(`Size must be at most ${options.max}`);
    }
    if (options.multiple && bytes % parseSize(options.multiple) !== 0) {
      throw new RangeError(`Size must be a multiple of ${options.multiple}`);
    }
    return formatSize(bytes);
  });
}

/**
 * A length of time, in the largest exact unit.
 *
 * @returns The schema
 */
export function duration(): Schema<Duration> {
  return parsed('a duration such as "30s"', (text) => formatDuration(parseDuration(text)));
}

/**
 * An IPv4 network.
 *
 * @returns The schema
 */
export function cidr(): Schema<Cidr> {
  return parsed('a network such as "10.20.0.0/24"', (text) => {
    parseCidr(text);
    return text as Cidr;
  });
}

/**
 * An IPv4 address.
 *
 * @returns The schema
 */
export function ipv4(): Schema<Ipv4> {
  return parsed('an IPv4 address such as "10.20.0.10"', (text) => {
    parseIpv4(text);
    return text as Ipv4;
  });
}

/**
 * A list.
 *
 * @param item Shape of each item
 * @returns The schema
 */
export function array<T>(item: Schema<T>): Schema<readonly T[]> {
  return make(`a list of ${item.description}`, (value, field, report) => {
    if (!Array.isArray(value)) {
      report(field, `Value must be a list of ${item.description}`, value);
      return value;
    }
    return value.map((each, index) => item.check(each, `${field}[${index}]`, report));
  });
}

/** Limits on a {@linkcode record}. */
export interface RecordOptions {
  /** What each key must match. */
  readonly key?: RegExp;
  /** What a key is, in words. */
  readonly keyDescription?: string;
}

/**
 * An object whose keys are the user's own names.
 *
 * @param item Shape of each value
 * @param options Limits on the keys
 * @returns The schema
 */
export function record<T>(item: Schema<T>, options: RecordOptions = {}): Schema<Readonly<Record<string, T>>> {
  return make(`an object of ${item.description} by name`, (value, field, report) => {
    if (!isPlainObject(value)) {
      report(field, `Value must be an object of ${item.description} by name`, value);
      return value;
    }
    const result: Record<string, unknown> = {};
    for (const [key, each] of Object.entries(value)) {
      if (each === undefined) continue;
      if (options.key && !options.key.test(key)) {
        report(
          joinField(field, key),
          `Name "${key}" must be ${options.keyDescription ?? `like ${options.key}`}`,
        );
      }
      result[key] = item.check(each, joinField(field, key), report);
    }
    return result;
  });
}

/**
 * An object with known fields; an unknown one is a problem, with the nearest known name as a hint.
 *
 * @param shape Schemas by field name
 * @returns The schema
 *
 * @example
 * ```ts
 * import { object, optional, size, string } from "hypertopia/dsl";
 *
 * const shape = object({ name: string(), quota: optional(size(), "1GiB") });
 * ```
 */
export function object<S extends Shape>(shape: S): Schema<ObjectOf<S>> {
  const names = Object.keys(shape);
  return make(`an object with ${names.join(", ")}`, (value, field, report) => {
    if (!isPlainObject(value)) {
      report(field, `Value must be an object with ${names.join(", ")}`, value);
      return value;
    }
    for (const key of Object.keys(value)) {
      if (Object.hasOwn(shape, key)) continue;
      const near = nearest(key, names);
      report(
        joinField(field, key),
        `Unknown field${near ? ` (did you mean "${near}"?)` : `: known fields are ${names.join(", ")}`}`,
      );
    }
    const result: Record<string, unknown> = {};
    for (const [key, schema] of Object.entries(shape)) {
      const each = schema.check(value[key], joinField(field, key), report);
      if (each !== undefined) result[key] = each;
    }
    return result;
  });
}

/**
 * A field that may be left out.
 *
 * @param schema Shape of the value
 * @param fallback What an absent field becomes; absent stays absent without it
 * @returns The schema
 */
export function optional<T>(schema: Schema<T>, fallback?: T): OptionalSchema<T> {
  return {
    description: schema.description,
    optional: true,
    check(value, field, report) {
      if (value !== undefined) return schema.check(value, field, report);
      return fallback === undefined ? undefined : schema.check(fallback, field, report);
    },
  };
}

/** How a resource appears in resolved props: its address, and a generation that a replacement raises. */
export interface ResourceReference {
  /** Address of the resource. */
  readonly $resource: string;
  /** Its kind. */
  readonly kind: string;
  /** How often it was replaced. */
  readonly generation: number;
}

/**
 * A reference to a resource of some kind.
 *
 * @param kind Name of the kind, such as `disk`
 * @returns The schema; its normal form in resolved props is a {@linkcode ResourceReference}
 */
export function resource<T extends Resource = Resource>(kind: string): Schema<T> {
  return make(`a resource of kind "${kind}"`, (value, field, report) => {
    const found = isResource(value)
      ? value.kind.name
      : isPlainObject(value) && "$resource" in value
      ? value.kind
      : undefined;
    if (found === undefined) report(field, `Value must be a resource of kind "${kind}"`, value);
    else if (found !== kind) {
      report(field, `Value must be a resource of kind "${kind}": current kind is "${found}"`);
    }
    return value;
  });
}

/**
 * Either of two shapes, told apart by a test.
 *
 * @param first Shape where the test holds
 * @param second Shape elsewhere
 * @param test Whether a value is of the first shape
 * @returns The schema
 */
export function either<A, B>(
  first: Schema<A>,
  second: Schema<B>,
  test: (value: unknown) => boolean,
): Schema<A | B> {
  return make(
    `${first.description} or ${second.description}`,
    (value, field, report) => (test(value) ? first : second).check(value, field, report),
  );
}

/**
 * A value that is checked by a function of the caller's.
 *
 * @param description What is wanted, in words
 * @param check Reports problems and returns the normal form
 * @returns The schema
 */
export function custom<T>(
  description: string,
  check: (value: unknown, field: string, report: Report) => unknown,
): Schema<T> {
  return make(description, check);
}

/**
 * Tells whether a value is an object literal.
 *
 * @param value Any value
 * @returns Whether it is a plain object
 */
export function isPlainObject(value: unknown): value is Record<string, unknown> {
  if (typeof value !== "object" || value === null) return false;
  const prototype = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

/** The known name that differs least, if it is near enough to be meant. */
function nearest(name: string, known: readonly string[]): string | undefined {
  let best: string | undefined;
  let bestDistance = Math.max(2, Math.floor(name.length / 3)) + 1;
  for (const each of known) {
    const distance = editDistance(name.toLowerCase(), each.toLowerCase());
    if (distance < bestDistance) [best, bestDistance] = [each, distance];
  }
  return best;
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length]!;
}

/** The type of an output, for kinds that declare outputs by schema. */
export type OutputsOf<S extends Shape> = { readonly [K in keyof S]: Output<Infer<S[K]>> };
