/**
 * A learning Ethernet switch in user space (IEEE 802.1D in its simplest form: no spanning tree, no VLANs). All tables are
 * bounded, and it queues nothing: a port that cannot take a frame now loses it.
 *
 * @module
 */

import { parseIpv4 } from "../../dsl/mod.ts";
import type { InterfaceCounters } from "../../ffi/mod.ts";
import { MachineError } from "../errors.ts";
import {
  ETHER_TYPE,
  type EthernetFrame,
  formatMac,
  IP_PROTOCOL,
  IPV4_SIZE,
  isMulticast,
  parseArp,
  parseEthernet,
  parseMac,
} from "./frame.ts";

/** Longest frame, in bytes: the largest IP packet behind its header. */
export const MAX_FRAME = 65_550;
/** Most ports of a switch. */
const MAX_PORTS = 1024;
/** Most stations that are known at once, in all and on one port. */
const MAX_STATIONS = 8192;
const MAX_STATIONS_OF_PORT = 256;
/** How long a silent station is known, in milliseconds (IEEE 802.1D-2004, table 7-5). */
const AGEING_TIME = 300_000;
const DHCP_SERVER_PORT = 67;
const LIMITED_BROADCAST = 0xffff_ffff;

/** Who may send from a port. */
export interface PortLock {
  /** Ethernet addresses, such as `02:00:00:00:00:01`. No other port can have them. */
  readonly macs: readonly string[];
  /**
   * IPv4 addresses. Where they are given, only IPv4 and ARP pass, so that nothing else can be spoofed either, and nobody
   * plays DHCP server.
   */
  readonly addresses?: readonly string[];
}

/** How a port is made. */
export interface PortOptions {
  /**
   * Takes a frame for whoever is at the port. The bytes are lent until it returns, and not to be changed.
   *
   * @param frame The frame
   * @returns Whether it was taken; otherwise it is lost
   */
  send(frame: Uint8Array): boolean;
  /** Who may send from it; anybody unless told. */
  readonly lock?: PortLock;
}

/** Counters of a port, as the switch sees it. */
export interface PortCounters extends InterfaceCounters {
  /** Frames that were dropped as their sender is not who may send from the port; not part of the other counters. */
  readonly rxSpoofed: number;
}

/** A port of a {@linkcode Switch}. Disposed, it is no more. */
export interface SwitchPort extends Disposable {
  /** What went through it so far. */
  readonly counters: PortCounters;
  /**
   * Takes a frame from whoever is at the port.
   *
   * @param frame The frame, without its check sequence; it may be hostile
   * @returns False if the port that it is for could not take it now, so that it may be sent again later
   */
  receive(frame: Uint8Array): boolean;
}

interface Lock {
  readonly macs: ReadonlySet<number>;
  readonly addresses: ReadonlySet<number> | undefined;
}

interface Port extends SwitchPort {
  readonly counters: { -readonly [K in keyof PortCounters]: number };
  readonly lock: Lock | undefined;
  /** Stations behind it, the first to be known first. */
  readonly stations: Set<number>;
  send(frame: Uint8Array): boolean;
}

interface Station {
  readonly port: Port;
  seen: number;
}

/** Carries frames between its ports. */
export class Switch {
  readonly #ports = new Set<Port>();
  readonly #stations = new Map<number, Station>();
  readonly #now: () => number;

  /**
   * Makes a switch without ports.
   *
   * @param now Tells the time in milliseconds, to let silent stations age
   */
  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
  }

  /** How many stations are known. */
  get stationCount(): number {
    return this.#stations.size;
  }

  /**
   * Adds a port.
   *
   * @param options Where its frames go, and who may send from it
   * @returns The port
   * @throws {RangeError} If an address is none
   * @throws {MachineError} If there are too many ports, or another one is locked to the same Ethernet address
   */
  connect(options: PortOptions): SwitchPort {
    if (this.#ports.size >= MAX_PORTS) {
      throw new MachineError(
        `Cannot connect another port to the switch as it has ${MAX_PORTS}: use a further network`,
      );
    }
    const lock = options.lock && {
      macs: new Set(options.lock.macs.map(readMac)),
      addresses: options.lock.addresses && new Set(options.lock.addresses.map(parseIpv4)),
    };
    for (const mac of lock?.macs ?? []) {
      if (this.#stations.get(mac)?.port.lock) {
        throw new MachineError(
          `Cannot connect ${
            formatMac(mac)
          } to the switch as another port has that Ethernet address: give each NIC its own`,
        );
      }
    }
    const port: Port = {
      counters: {
        rxPackets: 0,
        rxBytes: 0,
        rxDropped: 0,
        rxSpoofed: 0,
        txPackets: 0,
        txBytes: 0,
        txDropped: 0,
      },
      lock,
      stations: new Set(),
      send: (frame) => options.send(frame),
      receive: (frame) => this.#receive(port, frame),
      [Symbol.dispose]: () => this.#disconnect(port),
    };
    this.#ports.add(port);
    for (const mac of lock?.macs ?? []) {
      this.#forget(mac);
      this.#know(port, mac);
    }
    return port;
  }

  #disconnect(port: Port): void {
    this.#ports.delete(port);
    for (const mac of port.stations) this.#forget(mac);
  }

  #receive(port: Port, bytes: Uint8Array): boolean {
    if (!this.#ports.has(port)) return true;
    const { counters } = port;
    const frame = bytes.length > MAX_FRAME ? undefined : parseEthernet(bytes);
    // A group sends nothing.
    if (!frame || isMulticast(frame.source)) {
      counters.rxDropped++;
      return true;
    }
    if (!this.#admit(port, frame)) {
      counters.rxSpoofed++;
      return true;
    }
    counters.rxPackets++;
    counters.rxBytes += bytes.length;
    const { destination } = frame;
    const isForAll = isMulticast(destination);
    const station = isForAll ? undefined : this.#find(destination);
    // Those at one port hear each other.
    if (station) return station.port === port || deliver(station.port, bytes);
    for (const other of this.#ports) {
      // All stations of a locked port are known: what goes to an unknown one is not for it.
      if (other !== port && (isForAll || !other.lock)) deliver(other, bytes);
    }
    return true;
  }

  #find(mac: number): Station | undefined {
    const station = this.#stations.get(mac);
    if (!station || station.port.lock || this.#now() - station.seen <= AGEING_TIME) return station;
    this.#forget(mac);
    return undefined;
  }

  /** Tells whether the sender may send from the port, and learns where it is. */
  #admit(port: Port, frame: EthernetFrame): boolean {
    const mac = frame.source;
    if (port.lock) return port.lock.macs.has(mac) && hasOwnAddress(frame, port.lock.addresses);
    const station = this.#stations.get(mac);
    if (station?.port.lock) return false;
    if (station?.port === port) station.seen = this.#now();
    else {
      if (station) this.#forget(mac);
      this.#learn(port, mac);
    }
    return true;
  }

  #learn(port: Port, mac: number): void {
    if (this.#stations.size >= MAX_STATIONS || port.stations.size >= MAX_STATIONS_OF_PORT) {
      // A port makes room by what is its own, so that it cannot make the switch forget others.
      const [oldest] = port.stations;
      if (oldest === undefined) return;
      this.#forget(oldest);
    }
    this.#know(port, mac);
  }

  #know(port: Port, mac: number): void {
    port.stations.add(mac);
    this.#stations.set(mac, { port, seen: this.#now() });
  }

  #forget(mac: number): void {
    this.#stations.get(mac)?.port.stations.delete(mac);
    this.#stations.delete(mac);
  }
}

function deliver(port: Port, frame: Uint8Array): boolean {
  const { counters } = port;
  const isTaken = port.send(frame);
  if (isTaken) {
    counters.txPackets++;
    counters.txBytes += frame.length;
  } else counters.txDropped++;
  return isTaken;
}

/** Whether the sender's IPv4 address is one of these, or it has none yet. */
function hasOwnAddress(
  { source, type, payload }: EthernetFrame,
  addresses: ReadonlySet<number> | undefined,
): boolean {
  if (!addresses) return true;
  if (type === ETHER_TYPE.ARP) {
    const packet = parseArp(payload);
    // Who looks whether an address is free has none yet (RFC 5227).
    return packet?.senderMac === source && (packet.senderIp === 0 || addresses.has(packet.senderIp));
  }
  if (type !== ETHER_TYPE.IPV4 || payload.length < IPV4_SIZE) return false;
  // Fragments pass, too: each has a header of its own (RFC 791).
  const view = new DataView(payload.buffer, payload.byteOffset, payload.length);
  const headerSize = (view.getUint8(0) & 15) * 4;
  if (view.getUint8(0) >> 4 !== 4 || headerSize < IPV4_SIZE || payload.length < headerSize + 2) return false;
  const isUdp = view.getUint8(9) === IP_PROTOCOL.UDP;
  const isFirst = (view.getUint16(6) & 0x1fff) === 0;
  if (isUdp && isFirst && view.getUint16(headerSize) === DHCP_SERVER_PORT) return false;
  const sender = view.getUint32(12);
  return sender === 0 ? isUdp && view.getUint32(16) === LIMITED_BROADCAST : addresses.has(sender);
}

function readMac(text: string): number {
  const mac = parseMac(text);
  if (!isMulticast(mac)) return mac;
  throw new RangeError(
    `Cannot use "${text}" as the Ethernet address of a port as it is that of a group: give an address of one station`,
  );
}
