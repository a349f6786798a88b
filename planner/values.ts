/**
 * Resolved props: plain JSON in which marks stand for secrets and for values that are not known yet.
 *
 * @module
 */

import {
  type Expression,
  isOutput,
  isPlainObject,
  isResource,
  isSecret,
  isUnknown,
  joinField,
  type Resource,
  type ResourceReference,
} from "../dsl/mod.ts";
import type { Json } from "./kind.ts";

/** Answers what is known of other resources. */
export interface Lookup {
  /**
   * Finds an output.
   *
   * @param resource The resource
   * @param path Names that lead to the field
   * @returns The value, `{ $unknown: true }`, or `{ $secret: value }`
   */
  output(resource: Resource, path: readonly string[]): unknown;
  /**
   * Writes a reference to a resource.
   *
   * @param resource The resource
   */
  reference(resource: Resource): ResourceReference;
}

/** Stands for a value that is not known yet. */
export const UNKNOWN: { readonly $unknown: true } = Object.freeze({ $unknown: true as const });

/**
 * Replaces outputs and resources in a value by what is known of them.
 *
 * @param value Normalised props or a part of them
 * @param lookup Answers what is known
 * @returns Plain JSON with marks
 */
export function resolve(value: unknown, lookup: Lookup): unknown {
  if (isOutput(value)) return resolveExpression(value.expression, lookup);
  if (isResource(value)) return lookup.reference(value);
  if (Array.isArray(value)) return value.map((each) => resolve(each, lookup));
  if (!isPlainObject(value)) return value;
  const result: Record<string, unknown> = {};
  for (const key of Object.keys(value)) {
    const each = resolve(value[key], lookup);
    if (each !== undefined) result[key] = each;
  }
  return result;
}

function resolveExpression(expression: Expression, lookup: Lookup): unknown {
  switch (expression.type) {
    case "value":
      return expression.secret ? { $secret: expression.value } : expression.value;
    case "reference":
      return lookup.output(expression.resource, expression.path);
    case "derived": {
      const inputs = expression.inputs.map((each) => resolve(each, lookup));
      if (inputs.some(hasUnknown)) return UNKNOWN;
      const isTainted = inputs.some(hasSecret);
      const value = expression.compute(inputs.map(reveal));
      return isTainted ? { $secret: value } : value;
    }
  }
}

/**
 * Tells whether a part of a value is not known yet.
 *
 * @param value Resolved props
 * @returns Whether an unknown is inside
 */
export function hasUnknown(value: unknown): boolean {
  return some(value, isUnknown);
}

/**
 * Tells whether a part of a value is secret.
 *
 * @param value Resolved props
 * @returns Whether a secret is inside
 */
export function hasSecret(value: unknown): boolean {
  return some(value, isSecret);
}

function some(value: unknown, test: (value: unknown) => boolean): boolean {
  if (typeof value !== "object" || value === null) return false;
  if (test(value)) return true;
  return Object.values(value).some((each) => some(each, test));
}

/**
 * Rebuilds a value with each marked or plain leaf mapped.
 *
 * @param value Resolved props
 * @param map Gives a replacement for an object, or undefined to go inside
 * @returns The copy
 */
export function transform(
  value: unknown,
  map: (object: Json) => { readonly value: unknown } | undefined,
): unknown {
  if (typeof value !== "object" || value === null) return value;
  if (Array.isArray(value)) return value.map((each) => transform(each, map));
  const mapped = map(value as Json);
  if (mapped) return mapped.value;
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, transform(each, map)]));
}

/**
 * Puts secrets in clear, for drivers. The result must not be stored or shown.
 *
 * @param value Resolved props
 * @returns The same without marks for secrets
 */
export function reveal(value: unknown): unknown {
  return transform(value, (object) => isSecret(object) ? { value: object.$secret } : undefined);
}

/**
 * Replaces secrets by a text, for people and logs.
 *
 * @param value Resolved props
 * @returns The same with `(sensitive)` for secrets
 */
export function redact(value: unknown): unknown {
  return transform(value, (object) => isSecret(object) ? { value: "(sensitive)" } : undefined);
}

/**
 * Takes props apart into their leaves.
 *
 * @param value Resolved props
 * @returns Leaves by field path; marks, empty objects and resource references are leaves
 */
export function flatten(value: unknown): Map<string, unknown> {
  const leaves = new Map<string, unknown>();
  flattenInto(value, "", leaves);
  return leaves;
}

function flattenInto(value: unknown, field: string, leaves: Map<string, unknown>): void {
  if (Array.isArray(value)) {
    if (value.length === 0) leaves.set(field, value);
    value.forEach((each, index) => flattenInto(each, `${field}[${index}]`, leaves));
  } else if (isPlainObject(value) && !isLeaf(value)) {
    const keys = Object.keys(value);
    if (keys.length === 0 && field !== "") leaves.set(field, value);
    for (const key of keys) flattenInto(value[key], joinField(field, key), leaves);
  } else if (value !== undefined) {
    leaves.set(field, value);
  }
}

function isLeaf(value: object): boolean {
  return "$unknown" in value || "$secret" in value || "$resource" in value;
}

/**
 * Compares two resolved values by content, whatever the order of their keys.
 *
 * @param a One value
 * @param b The other
 * @returns Whether they are equal; an unknown equals nothing
 */
export function equal(a: unknown, b: unknown): boolean {
  if (isUnknown(a) || isUnknown(b)) return false;
  return a === b || canonical(a) === canonical(b);
}

/**
 * Writes JSON with sorted keys, for comparison and digests.
 *
 * @param value Any JSON value
 * @returns The text
 */
export function canonical(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (typeof value !== "object" || value === null) return JSON.stringify(value) ?? "null";
  const entries = Object.entries(value).filter(([, each]) => each !== undefined).sort(([a], [b]) =>
    a < b ? -1 : 1
  );
  return `{${entries.map(([key, each]) => `${JSON.stringify(key)}:${canonical(each)}`).join(",")}}`;
}

/**
 * Lays live values over recorded ones, object by object.
 *
 * @param base Recorded value
 * @param over Live value; undefined keeps the recorded one
 * @returns The merged value
 */
export function overlay(base: unknown, over: unknown): unknown {
  if (over === undefined) return base;
  if (!isPlainObject(base) || !isPlainObject(over) || isLeaf(over)) {
    // A live secret arrives in clear: it stays marked.
    return isSecret(base) && !isSecret(over) ? { $secret: over } : over;
  }
  if (isLeaf(base)) return isSecret(base) ? { $secret: over } : over;
  const result: Record<string, unknown> = { ...base };
  for (const key of Object.keys(over)) result[key] = overlay(base[key], over[key]);
  return result;
}

/**
 * Copies a value with one field set.
 *
 * @param value Resolved props
 * @param field Path of the field
 * @param leaf The new value; undefined removes the field
 * @returns The copy
 */
export function withField(value: unknown, field: string, leaf: unknown): unknown {
  const keys = fieldPath(field);
  const set = (target: unknown, [key, ...rest]: (string | number)[]): unknown => {
    if (key === undefined) return leaf;
    if (typeof key === "number") {
      const copy = Array.isArray(target) ? [...target] : [];
      const next = set(copy[key], rest);
      if (next === undefined) copy.splice(key, 1);
      else copy[key] = next;
      return copy;
    }
    const copy: Record<string, unknown> = isPlainObject(target) ? { ...target } : {};
    const next = set(copy[key], rest);
    if (next === undefined) delete copy[key];
    else copy[key] = next;
    return copy;
  };
  return set(value, keys);
}

/**
 * Takes a field path apart.
 *
 * @param field Path of the field
 * @returns Its keys; numbers are positions in lists
 */
export function fieldPath(field: string): (string | number)[] {
  return [...field.matchAll(/\["((?:[^"\\]|\\.)*)"\]|\[(\d+)\]|([^.[\]]+)/g)].map((match) =>
    match[1] !== undefined
      ? JSON.parse(`"${match[1]}"`) as string
      : match[2] !== undefined
      ? Number(match[2])
      : match[3]!
  );
}

/**
 * Reads a field by the names that lead to it.
 *
 * @param value Any value
 * @param path The names
 * @returns The field, or undefined where a name is missing
 */
export function pick(value: unknown, path: readonly string[]): unknown {
  let current = value;
  for (const name of path) {
    if (typeof current !== "object" || current === null) return undefined;
    current = (current as Record<string, unknown>)[name];
  }
  return current;
}
