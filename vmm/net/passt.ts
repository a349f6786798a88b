/**
 * The way of one guest's TCP and echo to the outside through passt, where that is installed: it has the host's TCP do what
 * our gateway does itself otherwise, and takes no rights either. One process for each NIC, which ends when the network's
 * process leaves it.
 *
 * The engine starts it with the NIC's port forwards, and the network's process finds its socket. Our gateway stays what
 * guests see: it answers ARP, DHCP and names, says who may be reached, and takes over where passt is lost. It keeps UDP too:
 * the passt of Debian 12 gives a guest each port of the host that it sends from, open to all and shared with other guests.
 * Options are those of passt(1) of Debian 12 (2023_03_09) and later.
 *
 * @module
 */

import { basename, join } from "node:path";
import { parseIpv4 } from "../../dsl/mod.ts";
import type { OperationOptions } from "../engine.ts";
import { removeIfThere } from "../files.ts";
import {
  ETHER_TYPE,
  IP_PROTOCOL,
  type Ipv4Packet,
  parseEthernet,
  parseIpv4Packet,
  parseMac,
} from "./frame.ts";
import { FrameStream } from "./frame_stream.ts";
import type { UserNat } from "./user_nat.ts";
import type { NicForward } from "./user_network_protocol.ts";

/** In the folder of a network, that of its sockets and logs. */
const FOLDER = "passt";
/** How long it may take to start, in milliseconds. */
const START_TIMEOUT = 10_000;
/** How long its end is waited for, and how often is looked, in milliseconds. */
const END_TIMEOUT = 5000;
const END_INTERVAL = 20;
/** Most who called one guest; the one that was silent longest makes way for a new one. */
const MAX_CALLERS = 4096;
/** Size of the two ports at the beginning of a segment. */
const PORTS_SIZE = 4;

/** What passt is started for. */
export interface PasstNic {
  /** IPv4 address in the network. */
  readonly ip: string;
  /** Network with prefix length. */
  readonly cidr: string;
  /** Address of the gateway. */
  readonly gateway: string;
  /** Ports of the host that lead to it; those of UDP are not for passt. */
  readonly forwards: readonly NicForward[];
}

/**
 * Starts passt for a NIC. Where it is not there, or cannot do what is asked for, our own gateway will do it.
 *
 * @param folder Folder of the network
 * @param nic The NIC
 * @param options Signal and progress
 * @returns Whether it waits for the network's process to connect
 */
export async function startPasst(
  folder: string,
  nic: PasstNic,
  options: OperationOptions = {},
): Promise<boolean> {
  const { signal, report } = options;
  const place = join(folder, FOLDER);
  const socket = socketOf(folder, nic.ip);
  const name = basename(socket);
  await end(socket, signal);
  await Deno.mkdir(place, { recursive: true, mode: 0o700 });
  // Started by root it becomes another user before it makes its socket; nobody else gets through the folder around.
  if (Deno.uid() === 0) await Deno.chmod(place, 0o777);
  await removeIfThere(socket);
  const timeout = AbortSignal.timeout(START_TIMEOUT);
  const { code, stderr } = await new Deno.Command("/bin/sh", {
    // By its name alone: root may not be let through the folders above any more.
    args: [
      "-c",
      'umask 0; exec passt "$@"',
      "passt",
      "--socket",
      name,
      "--log-file",
      `${name}.log`,
      ...argsOf(nic),
    ],
    cwd: place,
    clearEnv: true,
    env: { PATH: Deno.env.get("PATH") ?? "" },
    stdin: "null",
    stdout: "null",
    stderr: "piped",
    signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
  }).output();
  signal?.throwIfAborted();
  // It has left for the background.
  if (code === 0) return true;
  // It is not installed.
  if (code === 127) return false;
  const words = new TextDecoder().decode(stderr).trim().split("\n").at(-1) ?? "";
  report?.(`passt is not used for ${nic.ip}: ${timeout.aborted ? "it took too long to start" : words}`);
  return false;
}

/**
 * Ends the passt of a NIC that nobody uses, or waits for the end of the one that is left just now.
 *
 * @param folder Folder of the network
 * @param ip IPv4 address of the NIC
 * @param signal Ends the wait
 */
export async function endPasst(folder: string, ip: string, signal?: AbortSignal): Promise<void> {
  await end(socketOf(folder, ip), signal);
}

/**
 * Ends all of a network that nobody uses.
 *
 * @param folder Folder of the network
 */
export async function endAllPasst(folder: string): Promise<void> {
  try {
    for await (const { name } of Deno.readDir(join(folder, FOLDER))) {
      if (!name.endsWith(".log")) await end(join(folder, FOLDER, name));
    }
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/** A process whose socket refuses is gone, and its ports are free. */
async function end(socket: string, signal?: AbortSignal): Promise<void> {
  const deadline = performance.now() + END_TIMEOUT;
  while (performance.now() < deadline && !signal?.aborted) {
    const connection = await connect(socket);
    if (!connection) return;
    // It ends with the first one it serves; where that is somebody else, this one means nothing to it.
    connection.close();
    await new Promise((resolve) => setTimeout(resolve, END_INTERVAL));
  }
}

async function connect(socket: string): Promise<Deno.UnixConn | undefined> {
  try {
    return await Deno.connect({ transport: "unix", path: socket });
  } catch {
    return undefined;
  }
}

/** Short, as paths of sockets are. */
function socketOf(folder: string, ip: string): string {
  return join(folder, FOLDER, parseIpv4(ip).toString(16).padStart(8, "0"));
}

function argsOf({ ip, cidr, gateway, forwards }: PasstNic): string[] {
  const ports = forwards.filter(({ protocol }) => protocol === "tcp").flatMap(({ address, host, guest }) => [
    "--tcp-ports",
    `${address}/${host}:${guest}`,
  ]);
  return [
    ...["--quiet", "--one-off", "--ipv4-only", "--no-dhcp", "--no-udp", "--no-map-gw", "--dns", "none"],
    ...["--address", ip, "--netmask", cidr.slice(cidr.indexOf("/") + 1), "--gateway", gateway],
    ...(ports.length > 0 ? ports : ["--tcp-ports", "none"]),
  ];
}

/** What an {@linkcode Uplink} is made of. */
export interface UplinkOptions {
  /** Ethernet address of the NIC. */
  readonly mac: string;
  /** Its IPv4 address. */
  readonly ip: string;
  /** Address of the gateway. */
  readonly gateway: string;
  /** The gateway itself: its Ethernet address, and whom guests may reach. */
  readonly nat: Pick<UserNat, "mac" | "isOutside">;
  /** Takes a frame for the guest, which is lent until it returns. */
  readonly send: (frame: Uint8Array) => void;
}

/** What a NIC says to the outside by TCP or echo goes through here, and comes from here. */
export class Uplink implements Disposable {
  /** Tells when it is lost, or disposed. */
  readonly ended: Promise<void>;
  readonly #options: UplinkOptions;
  readonly #stream: FrameStream;
  readonly #guestMac: number;
  readonly #gatewayMac: number;
  readonly #ip: number;
  readonly #gateway: number;
  /** Ports of the gateway that stand for who called the guest, with the guest's: the one that was silent longest first. */
  readonly #callers = new Set<number>();

  private constructor(connection: Deno.Conn, options: UplinkOptions) {
    this.#options = options;
    this.#guestMac = parseMac(options.mac);
    this.#gatewayMac = parseMac(options.nat.mac);
    this.#ip = parseIpv4(options.ip);
    this.#gateway = parseIpv4(options.gateway);
    this.#stream = new FrameStream(connection);
    this.ended = this.#stream.receive((frame) => this.#deliver(frame)).catch(() => {}).then(() =>
      this[Symbol.dispose]()
    );
  }

  /**
   * Connects to the passt that was started for a NIC.
   *
   * @param folder Folder of the network
   * @param options The NIC and its gateway
   * @returns The uplink; nothing where no passt waits
   */
  static async connect(folder: string, options: UplinkOptions): Promise<Uplink | undefined> {
    const connection = await connect(socketOf(folder, options.ip));
    return connection && new Uplink(connection, options);
  }

  /**
   * Takes a frame of the guest where it goes outside, or answers somebody outside.
   *
   * @param bytes The frame, which is lent until this returns and may be hostile
   * @returns Whether it was for the outside; what there is no room for is lost
   */
  take(bytes: Uint8Array): boolean {
    const frame = parseEthernet(bytes);
    if (frame?.type !== ETHER_TYPE.IPV4 || frame.destination !== this.#gatewayMac) return false;
    const packet = frame.source === this.#guestMac ? parseIpv4Packet(frame.payload) : undefined;
    if (packet?.source !== this.#ip || !this.#isOutward(packet)) return false;
    this.#stream.send(bytes);
    return true;
  }

  /** Leaves passt, which ends by that. */
  [Symbol.dispose](): void {
    this.#stream[Symbol.dispose]();
  }

  #isOutward({ destination, protocol, payload }: Ipv4Packet): boolean {
    if (protocol !== IP_PROTOCOL.TCP && protocol !== IP_PROTOCOL.ICMP) return false;
    if (destination !== this.#gateway) return this.#options.nat.isOutside(destination);
    // There it is not the gateway: only whoever called is answered.
    if (protocol !== IP_PROTOCOL.TCP || payload.length < PORTS_SIZE) return false;
    const caller = read16(payload, 2) * 65_536 + read16(payload, 0);
    if (!this.#callers.has(caller)) return false;
    this.#remember(caller);
    return true;
  }

  #remember(caller: number): void {
    this.#callers.delete(caller);
    for (const oldest of this.#callers) {
      if (this.#callers.size < MAX_CALLERS) break;
      this.#callers.delete(oldest);
    }
    this.#callers.add(caller);
  }

  #deliver(bytes: Uint8Array): void {
    const frame = parseEthernet(bytes);
    const packet = frame?.type === ETHER_TYPE.IPV4 ? parseIpv4Packet(frame.payload) : undefined;
    if (packet?.destination !== this.#ip) return;
    const { source, protocol, payload } = packet;
    if (source === this.#gateway && protocol === IP_PROTOCOL.TCP && payload.length >= PORTS_SIZE) {
      this.#remember(read16(payload, 0) * 65_536 + read16(payload, 2));
    }
    // It knows the guest's address from its first frame only, and would call a guest that only listens in vain.
    writeMacs(bytes, this.#guestMac, this.#gatewayMac);
    this.#options.send(bytes);
  }
}

function read16(bytes: Uint8Array, at: number): number {
  return bytes[at]! << 8 | bytes[at + 1]!;
}

function writeMacs(frame: Uint8Array, destination: number, source: number): void {
  const view = new DataView(frame.buffer, frame.byteOffset, frame.byteLength);
  for (const [at, mac] of [[0, destination], [6, source]] as const) {
    view.setUint16(at, Math.floor(mac / 2 ** 32));
    view.setUint32(at + 2, mac % 2 ** 32);
  }
}
