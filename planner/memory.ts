/**
 * A kind that lives in memory only: for tests of stacks and of the planner, and for benchmarks.
 *
 * @module
 */

import { number, optional, record, string } from "../dsl/mod.ts";
import { type Declare, kind } from "./kind.ts";
import type { OptionalSchema, Schema } from "../dsl/mod.ts";

/** Shape of the props of {@linkcode memoryKind}. */
export type MemoryProps = {
  /** Any text; changes are live. */
  readonly value: Schema<string>;
  /** Any number; changes are a reboot. */
  readonly size: OptionalSchema<number>;
  /** Any text; changes recreate. */
  readonly base: OptionalSchema<string>;
  /** More texts; changes are live. */
  readonly more: OptionalSchema<Readonly<Record<string, string>>>;
};

/** Shape of the outputs of {@linkcode memoryKind}. */
export type MemoryOutputs = {
  /** Identity of the object. */
  readonly id: Schema<string>;
  /** The value in upper case. */
  readonly upper: Schema<string>;
};

/** The objects of a {@linkcode memoryKind}, by identity. */
export type MemoryWorld = Map<string, { value: string; size?: number; base?: string }>;

/**
 * Makes a kind whose objects live in a map.
 *
 * @param world The map
 * @param calls Receives the name of each driver call
 * @returns The function that declares such resources
 *
 * @example
 * ```ts
 * import { memoryKind, stack } from "hypertopia";
 *
 * const thing = memoryKind(new Map());
 * const things = stack("things", () => ({ a: thing({ value: "hello" }) }));
 * ```
 */
export function memoryKind(
  world: MemoryWorld,
  calls: (name: string) => void = () => {},
): Declare<MemoryProps, MemoryOutputs> {
  const props: MemoryProps = {
    value: string(),
    size: optional(number()),
    base: optional(string()),
    more: optional(record(string())),
  };
  const outputs: MemoryOutputs = { id: string(), upper: string() };
  return kind({
    name: "memory",
    props,
    outputs,
    disruption: { value: "live", more: "live", size: "reboot" },
    predict: ({ props: { value } }) => ({
      upper: typeof value === "string" ? value.toUpperCase() : { $unknown: true },
    }),
    observe(instances) {
      calls("observe");
      const found = new Map();
      for (const { address, id } of instances) {
        const object = world.get(id);
        if (object) found.set(address, { props: object });
      }
      return Promise.resolve(found);
    },
    async ensure({ address, id, props: { value, size, base } }) {
      calls(`ensure ${address}`);
      await Promise.resolve();
      world.set(id, {
        value,
        ...(size === undefined ? {} : { size }),
        ...(base === undefined ? {} : { base }),
      });
      return { id, upper: value.toUpperCase() };
    },
    async remove({ address, id }) {
      calls(`remove ${address}`);
      await Promise.resolve();
      world.delete(id);
    },
  });
}
