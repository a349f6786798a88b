/**
 * Networks of guests on a Linux host: a bridge for each network, a tap for each NIC, and nftables for the way outside.
 * Everything is found again by its name, so that nothing must be remembered.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { join } from "node:path";
import { formatIpv4, parseCidr, parseIpv4 } from "../../dsl/mod.ts";
import { Fd, NetworkInterfaces, Tap } from "../../ffi/mod.ts";
import { MachineError } from "../errors.ts";
import { lockFile } from "../files.ts";
import { hostPaths } from "../paths.ts";

/** A user's PATH may lack the folder that Debian has it in. */
const NFT_PROGRAMS: readonly string[] = ["nft", "/usr/sbin/nft"];
const FORWARDING = "/proc/sys/net/ipv4/ip_forward";

/** A network as the host has it. */
export interface BridgeSpec {
  /** Name of its bridge, as {@linkcode bridgeName} makes it. */
  readonly name: string;
  /** Network with prefix length, such as `10.20.0.0/24`. */
  readonly cidr: string;
  /** The host's address in it. */
  readonly gateway: string;
  /** The host's further address, where guests ask for names. */
  readonly dns: string;
  /** Whether guests reach the outside, as the host. */
  readonly nat: boolean;
}

/**
 * Names the bridge of a network.
 *
 * @param id Identity of the network
 * @returns 13 characters; two more are left for the label of a further address
 */
export function bridgeName(id: string): string {
  return `ht-${digest(id).slice(0, 10)}`;
}

/**
 * Names the tap of a NIC.
 *
 * @param machine Identity of the machine
 * @param nic Name of the NIC
 * @returns 15 characters
 */
export function tapName(machine: string, nic: string): string {
  return `ht${digest(`${machine}\n${nic}`).slice(0, 13)}`;
}

/**
 * Finds out by trying whether taps and bridges can be made here.
 *
 * @returns Whether they can, and in words what is there or why not
 */
export function canUseTap(): { isUsable: boolean; detail: string } {
  if (Deno.build.os !== "linux") return { isUsable: false, detail: "taps are Linux's" };
  const name = `ht${crypto.randomUUID().replaceAll("-", "").slice(0, 13)}`;
  try {
    using interfaces = new NetworkInterfaces();
    Tap.open(name)[Symbol.dispose]();
    interfaces.addBridge(name);
    interfaces.removeBridge(name);
  } catch (error) {
    return { isUsable: false, detail: error instanceof Error ? error.message : String(error) };
  }
  let server = "vhost-net serves them";
  try {
    Fd.open("/dev/vhost-net")[Symbol.dispose]();
  } catch {
    server =
      `packets go through the supervisor as /dev/vhost-net cannot be opened ("modprobe vhost_net" makes it)`;
  }
  return { isUsable: true, detail: `taps and bridges can be made; ${server}` };
}

/**
 * Tells why a machine with NICs cannot be here for want of the program that sets rules for them.
 *
 * @param hasNat Whether a NIC leads outside
 * @returns The reason; undefined where nothing is wanting
 */
export async function lackOfNft(hasNat: boolean): Promise<string | undefined> {
  if (!hasNat && !isForwarding() || await hasNft()) return undefined;
  return hasNat
    ? "its NICs need NAT, and nft is not installed: apt-get install nftables, or set nat: false"
    : "this host forwards packets, and nft, which keeps them from its NICs, is not installed: apt-get install nftables";
}

/** Whether the host passes packets on between its networks. */
function isForwarding(): boolean {
  return Deno.readTextFileSync(FORWARDING).trim() !== "0";
}

async function hasNft(): Promise<boolean> {
  for (const program of NFT_PROGRAMS) {
    try {
      const { success } = await new Deno.Command(program, {
        args: ["--version"],
        stdout: "null",
        stderr: "null",
      }).output();
      if (success) return true;
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  }
  return false;
}

/** What a {@linkcode HostNetwork} can be given. */
export interface HostNetworkOptions {
  /** Path of the file that processes lock; one in the data folder of this host unless told. */
  readonly lock?: string;
  /** Path or name of the program nft. */
  readonly nft?: string;
}

/** Makes and removes what networks of guests need on this host. Processes that do so at the same time wait for each other. */
export class HostNetwork {
  readonly #lock: string;
  readonly #nft: Nft;

  /**
   * Changes nothing yet.
   *
   * @param options The lock and the program nft
   */
  constructor(options: HostNetworkOptions = {}) {
    this.#lock = options.lock ?? join(hostPaths().data, "network.lock");
    this.#nft = new Nft(options.nft ? [options.nft] : NFT_PROGRAMS);
  }

  /**
   * Makes the bridge of a network, or makes it be as it should.
   *
   * @param spec The network
   * @throws {MachineError} If that is not possible, and why
   */
  async ensureBridge(spec: BridgeSpec): Promise<void> {
    await this.#change((interfaces) => ensureBridge(interfaces, this.#nft, spec));
  }

  /**
   * Makes a tap and plugs it into the bridge of its network, which is made if need be. The tap lives as long as it is open.
   *
   * @param spec The network
   * @param name Name of the tap, as {@linkcode tapName} makes it
   * @returns The tap
   * @throws {MachineError} If that is not possible, and why
   */
  async attachTap(spec: BridgeSpec, name: string): Promise<Tap> {
    return await this.#change(async (interfaces) => {
      await ensureBridge(interfaces, this.#nft, spec);
      return plugTap(interfaces, spec, name);
    });
  }

  /**
   * Plugs an interface into the bridge of its network, which is made if need be.
   *
   * @param spec The network
   * @param name Name of the interface
   * @throws {MachineError} If that is not possible, and why
   */
  async plugInterface(spec: BridgeSpec, name: string): Promise<void> {
    await this.#change(async (interfaces) => {
      if (!interfaces.has(spec.name)) await ensureBridge(interfaces, this.#nft, spec);
      plugInterface(interfaces, spec, name);
    });
  }

  /**
   * Makes a tap and plugs it into the bridge of its network, which must be there. It takes no other program.
   *
   * @param spec The network
   * @param name Name of the tap
   * @returns The tap, which lives as long as it is open
   * @throws {MachineError} If that is not possible, and why
   */
  async plugTap(spec: BridgeSpec, name: string): Promise<Tap> {
    return await this.#change((interfaces) => plugTap(interfaces, spec, name));
  }

  /**
   * Removes the bridge of a network with all that belongs to it, unless a NIC is plugged in.
   *
   * @param name Name of the bridge
   * @returns Whether it is gone
   */
  async releaseBridge(name: string): Promise<boolean> {
    return await this.#change(async (interfaces) => {
      if (interfaces.has(name)) {
        for (const _ of Deno.readDirSync(`/sys/class/net/${name}/brif`)) return false;
        interfaces.setUp(name, false);
        interfaces.removeBridge(name);
      }
      await this.#nft.run(withoutTable(name)).catch((error) => {
        // Where it never was installed there is no table.
        if (!(error instanceof NftMissingError)) throw error;
      });
      return true;
    });
  }

  async #change<T>(change: (interfaces: NetworkInterfaces) => T | Promise<T>): Promise<T> {
    using _lock = await lockFile(this.#lock);
    using interfaces = new NetworkInterfaces();
    try {
      return await change(interfaces);
    } catch (error) {
      if (error instanceof MachineError || !(error instanceof Error)) throw error;
      throw new MachineError(error.message, { cause: error });
    }
  }
}

function plugTap(interfaces: NetworkInterfaces, spec: BridgeSpec, name: string): Tap {
  const tap = Tap.open(name);
  try {
    plugInterface(interfaces, spec, name);
    return tap;
  } catch (error) {
    tap[Symbol.dispose]();
    throw error;
  }
}

function plugInterface(interfaces: NetworkInterfaces, spec: BridgeSpec, name: string): void {
  interfaces.addToBridge(spec.name, name);
  interfaces.setUp(name, true);
}

async function ensureBridge(interfaces: NetworkInterfaces, nft: Nft, spec: BridgeSpec): Promise<void> {
  const { name, cidr } = spec;
  refuseOverlap(spec);
  const isNew = !interfaces.has(name);
  try {
    if (isNew) {
      interfaces.addBridge(name);
      // Without one of its own it takes that of a tap, and changes it with each that comes or goes.
      interfaces.setMac(name, `02:${digest(name).slice(0, 10).replaceAll(/..(?=.)/g, "$&:")}`);
    }
    const mask = formatIpv4(2 ** 32 - parseCidr(cidr).size);
    for (const [label, address] of [[name, spec.gateway], [`${name}:2`, spec.dns]] as const) {
      const found = interfaces.address(label);
      if (found?.address === address && found.mask === mask) continue;
      interfaces.setUp(name, false);
      interfaces.setAddress(label, address, mask);
    }
    // Rules are there before the first packet.
    await applyRules(nft, spec);
    interfaces.setUp(name, true);
  } catch (error) {
    if (isNew) interfaces.removeBridge(name);
    throw error;
  }
}

/** The host would send packets for one of two equal networks to the other one. */
function refuseOverlap({ name, cidr }: BridgeSpec): void {
  const mine = parseCidr(cidr);
  for (const { name: label, family, cidr: found } of Deno.networkInterfaces()) {
    const other = label.split(":")[0];
    if (family !== "IPv4" || !found || other === name) continue;
    const [address = "", prefix] = found.split("/");
    const size = 2 ** (32 - Number(prefix));
    const base = parseIpv4(address) - parseIpv4(address) % size;
    if (base >= mine.base + mine.size || mine.base >= base + size) continue;
    throw new MachineError(
      `Cannot make the network ${cidr} as it overlaps with ${found} of the host's interface "${other}": ` +
        `choose another cidr`,
    );
  }
}

async function applyRules(nft: Nft, { name, nat, ...spec }: BridgeSpec): Promise<void> {
  const { base, prefix } = parseCidr(spec.cidr);
  const cidr = `${formatIpv4(base)}/${prefix}`;
  const outgoing = [
    `    iifname "${name}" ip saddr ${cidr} accept`,
    `    oifname "${name}" ct state established,related accept`,
  ];
  const translation = [
    "  chain postrouting {",
    "    type nat hook postrouting priority srcnat; policy accept;",
    `    ip saddr ${cidr} oifname != "${name}" masquerade`,
    "  }",
  ];
  const table = [
    `table inet ${name} {`,
    "  chain forward {",
    "    type filter hook forward priority filter; policy accept;",
    `    iifname "${name}" oifname "${name}" accept`,
    ...nat ? outgoing : [],
    `    iifname "${name}" drop`,
    `    oifname "${name}" drop`,
    "  }",
    ...nat ? translation : [],
    "}",
  ];
  try {
    await nft.run(`${withoutTable(name)}${table.join("\n")}\n`);
  } catch (error) {
    // A host that forwards nothing needs no rules to keep guests inside.
    if (!(error instanceof NftMissingError) || nat || isForwarding()) throw error;
  }
  if (!nat || isForwarding()) return;
  try {
    Deno.writeTextFileSync(FORWARDING, "1");
  } catch (cause) {
    throw new MachineError(
      `Cannot let guests of ${cidr} reach the outside as ${FORWARDING} cannot be written: ` +
        `run "sysctl net.ipv4.ip_forward=1", or set nat: false`,
      { cause },
    );
  }
}

/** Removes a table, whether it is there or not. */
function withoutTable(name: string): string {
  return `add table inet ${name}\ndelete table inet ${name}\n`;
}

class NftMissingError extends MachineError {}

/** The program that sets rules. */
class Nft {
  readonly #programs: readonly string[];

  constructor(programs: readonly string[]) {
    this.#programs = programs;
  }

  /** Runs a script as one transaction. */
  async run(script: string): Promise<void> {
    for (const program of this.#programs) {
      try {
        const child = new Deno.Command(program, {
          args: ["-f", "-"],
          stdin: "piped",
          stdout: "null",
          stderr: "piped",
        }).spawn();
        const writer = child.stdin.getWriter();
        await writer.write(new TextEncoder().encode(script));
        await writer.close();
        const { success, stderr } = await child.output();
        if (success) return;
        throw new MachineError(
          `Cannot set the rules of a network as nft refused them: ${new TextDecoder().decode(stderr).trim()}`,
        );
      } catch (error) {
        if (!(error instanceof Deno.errors.NotFound)) throw error;
      }
    }
    throw new NftMissingError(
      "Cannot set the rules of a network as nft is not installed: run apt-get install nftables, or set nat: false " +
        "on a host that forwards no packets",
    );
  }
}

function digest(text: string): string {
  return createHash("sha256").update(text).digest("hex");
}
