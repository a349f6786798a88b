/**
 * Driver of networks.
 *
 * @module
 */

import { networkDefinition, type NetworkProps } from "../../dsl/mod.ts";
import type { Kind } from "../../planner/mod.ts";

/**
 * Makes the kind of networks. A user-mode network is part of each machine on it: it has no object of its own on the
 * host, and so it cannot drift.
 *
 * @returns The kind
 */
export function networkKind(): Kind<NetworkProps, Record<never, never>> {
  return {
    ...networkDefinition,
    replace: "create-first",
    // Networks had an option of this name once.
    disruption: ({ field }) =>
      field === "dhcp" ? { class: "none" } : { class: "recreate", mechanism: "new network" },
    observe: (instances) =>
      Promise.resolve(new Map(instances.filter((each) => each.outputs).map((each) => [each.address, {}]))),
    ensure: () => Promise.resolve({}),
    remove: () => Promise.resolve(),
  };
}
