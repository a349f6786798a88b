/**
 * The bridges that NICs of machines are plugged into.
 *
 * @module
 */

import { join } from "node:path";
import type { MachineNic, MachineSpec } from "../engine.ts";
import type { Paths } from "../paths.ts";
import { bridgeName, type BridgeSpec, HostNetwork } from "./host_network.ts";

/**
 * Names the bridge of a NIC's network.
 *
 * @param spec The machine
 * @param nic The NIC
 * @returns The bridge
 */
export function bridgeOf(spec: MachineSpec, nic: MachineNic): BridgeSpec {
  return {
    name: bridgeName(`${spec.stack}\n${nic.network}`),
    cidr: nic.cidr,
    gateway: nic.gateway,
    dns: nic.dns,
    nat: nic.nat,
  };
}

/**
 * Gives what changes the networks of this host.
 *
 * @param paths Folders of this host
 * @returns It
 */
export function hostNetwork(paths: Paths): HostNetwork {
  return new HostNetwork({ lock: join(paths.data, "network.lock") });
}

/**
 * Removes the bridges of a machine that no other one uses any more: they leave nothing on the host.
 *
 * @param paths Folders of this host
 * @param spec The machine
 */
export async function releaseBridges(paths: Paths, spec: MachineSpec | undefined): Promise<void> {
  if (!spec || spec.nics.length === 0) return;
  const network = hostNetwork(paths);
  for (const name of new Set(spec.nics.map((nic) => bridgeOf(spec, nic).name))) {
    await network.releaseBridge(name);
  }
}
