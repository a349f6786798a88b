/**
 * Observe: look at the world, once per kind.
 *
 * @module
 */

import { asError, PlannerError } from "./errors.ts";
import type { AnyKind, Instance, Json, Observation } from "./kind.ts";
import type { ResourceRecord } from "./state.ts";
import { reveal } from "./values.ts";

/** Kinds by name. */
export type Kinds = ReadonlyMap<string, AnyKind>;

/** What was seen, by address; an absent address means that the object does not exist. */
export type Observations = ReadonlyMap<string, Observation>;

/**
 * Finds a kind.
 *
 * @param kinds The known kinds
 * @param name Name of the kind
 * @param address The resource that needs it, for the message
 * @returns The kind
 * @throws {PlannerError} If it is not known
 */
export function requireKind(kinds: Kinds, name: string, address: string): AnyKind {
  const found = kinds.get(name);
  if (found) return found;
  throw new PlannerError(
    `Cannot handle "${address}" as its kind "${name}" is not known: import it and pass it in the kinds of cli(), ` +
      `or forget the resource with: state rm ${address}`,
  );
}

/**
 * Makes the instance of a record.
 *
 * @param record The record
 * @param stack Name of the stack
 * @returns The instance, secrets in clear
 */
export function instanceOf(record: ResourceRecord, stack: string): Instance {
  return {
    address: record.address,
    id: record.id,
    stack,
    props: reveal(record.props) as Json,
    outputs: record.outputs === undefined ? undefined : reveal(record.outputs) as Json,
  };
}

/**
 * Observes objects.
 *
 * @param instances The objects, with the names of their kinds
 * @param kinds The known kinds
 * @param signal Aborted by Ctrl-C
 * @returns What was seen
 */
export async function observe(
  instances: readonly (readonly [kind: string, instance: Instance])[],
  kinds: Kinds,
  signal: AbortSignal,
): Promise<Observations> {
  const groups = new Map<string, Instance[]>();
  for (const [name, instance] of instances) {
    const group = groups.get(name);
    if (group) group.push(instance);
    else groups.set(name, [instance]);
  }
  const results = new Map<string, Observation>();
  await Promise.all([...groups].map(async ([name, group]) => {
    const kind = requireKind(kinds, name, group[0]!.address);
    try {
      for (const [address, seen] of await kind.observe(group, signal)) results.set(address, seen);
    } catch (thrown) {
      if (signal.aborted) throw signal.reason;
      const cause = asError(thrown);
      throw new PlannerError(
        `Cannot observe ${group.length} ${name} resource${group.length === 1 ? "" : "s"} as ${cause.message}`,
        { cause },
      );
    }
  }));
  return results;
}
