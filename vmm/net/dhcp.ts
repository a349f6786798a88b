/**
 * Answers guests that ask for their address by DHCP (RFC 2131, options of RFC 2132): each one is told what is planned for
 * its Ethernet address, and nobody else is answered. Nothing is handed out, so nothing has to be remembered.
 *
 * @module
 */

import { parseCidr, parseIpv4 } from "../../dsl/mod.ts";
import {
  BROADCAST_MAC,
  buildUdp,
  ETHER_TYPE,
  IP_PROTOCOL,
  parseEthernet,
  parseIpv4Packet,
  parseMac,
  parseUdp,
} from "./frame.ts";

const SERVER_PORT = 67;
const CLIENT_PORT = 68;
const LIMITED_BROADCAST = 0xffff_ffff;
/** How long an address is good, in seconds: clients ask again after half of it. */
const LEASE_TIME = 86_400;
/** Fields of a message: their offsets, and where options begin, behind a cookie that says that they are options. */
const FIELD = {
  op: 0,
  hardware: 1,
  xid: 4,
  flags: 10,
  ciaddr: 12,
  yiaddr: 16,
  giaddr: 24,
  chaddr: 28,
  cookie: 236,
  options: 240,
} as const;
const REQUEST = 1;
const REPLY = 2;
/** Ethernet, with addresses of 6 bytes. */
const ETHERNET = 0x0106;
const COOKIE = 0x6382_5363;
const BROADCAST_FLAG = 0x8000;
/** Shortest message that each client takes, as BOOTP had it (RFC 951). */
const MIN_SIZE = 300;
const OPTION = {
  pad: 0,
  mask: 1,
  router: 3,
  dns: 6,
  hostname: 12,
  broadcast: 28,
  requested: 50,
  leaseTime: 51,
  type: 53,
  server: 54,
  clientId: 61,
  end: 255,
} as const;
const TYPE = { discover: 1, offer: 2, request: 3, ack: 5, nak: 6, inform: 8 } as const;

/** What is planned for an Ethernet address. */
export interface DhcpLease {
  /** IPv4 address. */
  readonly ip: string;
  /** Name of the guest. */
  readonly hostname: string;
}

/** What all guests of a network are told. */
export interface DhcpOptions {
  /** Ethernet address of the gateway, which answers. */
  readonly mac: string;
  /** Network with prefix length. */
  readonly cidr: string;
  /** Address of the gateway. */
  readonly gateway: string;
  /** Address where guests ask for names. */
  readonly dns: string;
}

type DhcpOption = readonly [option: number, value: Uint8Array];

interface Message {
  readonly view: DataView;
  readonly chaddr: Uint8Array;
  readonly options: ReadonlyMap<number, Uint8Array>;
}

/** Answers from a table. */
export class DhcpServer {
  readonly #mac: number;
  readonly #gateway: number;
  readonly #common: readonly DhcpOption[];
  readonly #leases = new Map<number, { readonly ip: number; readonly hostname: Uint8Array }>();

  /**
   * Begins with an empty table.
   *
   * @param options What all guests are told
   */
  constructor({ mac, cidr, gateway, dns }: DhcpOptions) {
    const { base, size } = parseCidr(cidr);
    this.#mac = parseMac(mac);
    this.#gateway = parseIpv4(gateway);
    this.#common = [
      [OPTION.mask, bytesOf(2 ** 32 - size)],
      [OPTION.router, bytesOf(this.#gateway)],
      [OPTION.dns, bytesOf(parseIpv4(dns))],
      [OPTION.broadcast, bytesOf(base + size - 1)],
    ];
  }

  /**
   * Plans an address.
   *
   * @param mac Ethernet address of the guest
   * @param lease What it is told; of the name, at most 255 bytes
   */
  set(mac: string, { ip, hostname }: DhcpLease): void {
    this.#leases.set(parseMac(mac), {
      ip: parseIpv4(ip),
      hostname: new TextEncoder().encode(hostname).subarray(0, 255),
    });
  }

  /**
   * Forgets an Ethernet address.
   *
   * @param mac The address
   */
  delete(mac: string): void {
    this.#leases.delete(parseMac(mac));
  }

  /**
   * Answers a frame.
   *
   * @param frame A frame from a guest; it may be hostile
   * @returns The frame to send back; undefined where there is nothing to say
   */
  answer(frame: Uint8Array): Uint8Array | undefined {
    const ethernet = parseEthernet(frame);
    const lease = ethernet && this.#leases.get(ethernet.source);
    if (!lease || ethernet.type !== ETHER_TYPE.IPV4) return undefined;
    const packet = parseIpv4Packet(ethernet.payload);
    if (packet?.protocol !== IP_PROTOCOL.UDP) return undefined;
    const datagram = parseUdp(packet);
    if (datagram?.destinationPort !== SERVER_PORT || datagram.sourcePort !== CLIENT_PORT) return undefined;
    const message = parseMessage(datagram.payload);
    // Nobody asks for somebody else.
    if (!message || macOf(message.chaddr) !== ethernet.source) return undefined;
    const type = this.#answerType(message, lease.ip);
    if (type === undefined) return undefined;
    const isNak = type === TYPE.nak;
    const isInform = message.options.get(OPTION.type)![0] === TYPE.inform;
    const options: DhcpOption[] = [[OPTION.type, Uint8Array.of(type)], [
      OPTION.server,
      bytesOf(this.#gateway),
    ]];
    const clientId = message.options.get(OPTION.clientId);
    // RFC 6842.
    if (clientId) options.push([OPTION.clientId, clientId]);
    if (!isNak && !isInform) options.push([OPTION.leaseTime, bytesOf(LEASE_TIME)]);
    if (!isNak) options.push(...this.#common);
    if (!isNak && lease.hostname.length > 0) options.push([OPTION.hostname, lease.hostname]);
    const hasAddress = message.view.getUint32(FIELD.ciaddr) !== 0;
    const isForAll = isNak || !hasAddress && (message.view.getUint16(FIELD.flags) & BROADCAST_FLAG) !== 0;
    return buildUdp({
      sourceMac: this.#mac,
      destinationMac: isForAll ? BROADCAST_MAC : ethernet.source,
      source: this.#gateway,
      destination: isForAll ? LIMITED_BROADCAST : lease.ip,
    }, {
      sourcePort: SERVER_PORT,
      destinationPort: CLIENT_PORT,
      payload: buildReply(message, isNak || isInform ? 0 : lease.ip, isNak, options),
    });
  }

  /** RFC 2131, section 4.3. */
  #answerType({ view, options }: Message, ip: number): number | undefined {
    const ciaddr = view.getUint32(FIELD.ciaddr);
    const server = addressOf(options.get(OPTION.server));
    switch (options.get(OPTION.type)?.[0]) {
      case TYPE.discover:
        return TYPE.offer;
      case TYPE.request:
        if (server !== undefined && server !== this.#gateway) return undefined;
        // Who renews has the address; others name it.
        return (addressOf(options.get(OPTION.requested)) ?? ciaddr) === ip && [0, ip].includes(ciaddr)
          ? TYPE.ack
          : TYPE.nak;
      case TYPE.inform:
        return ciaddr === ip ? TYPE.ack : undefined;
      default:
        return undefined;
    }
  }
}

function parseMessage(bytes: Uint8Array): Message | undefined {
  if (bytes.length < FIELD.options) return undefined;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  if (view.getUint8(FIELD.op) !== REQUEST || view.getUint16(FIELD.hardware) !== ETHERNET) return undefined;
  // There are no relays in a network of one switch.
  if (view.getUint32(FIELD.cookie) !== COOKIE || view.getUint32(FIELD.giaddr) !== 0) return undefined;
  const options = new Map<number, Uint8Array>();
  for (let at: number = FIELD.options; at < bytes.length;) {
    const option = bytes[at]!;
    if (option === OPTION.end) break;
    at++;
    if (option === OPTION.pad) continue;
    const end = at + 1 + (bytes[at] ?? Infinity);
    if (end > bytes.length) return undefined;
    options.set(option, bytes.subarray(at + 1, end));
    at = end;
  }
  return { view, chaddr: bytes.subarray(FIELD.chaddr, FIELD.chaddr + 6), options };
}

function buildReply(
  { view, chaddr }: Message,
  yiaddr: number,
  isNak: boolean,
  options: readonly DhcpOption[],
): Uint8Array {
  const size = options.reduce((sum, [, value]) => sum + 2 + value.length, FIELD.options + 1);
  const bytes = new Uint8Array(Math.max(size, MIN_SIZE));
  const reply = new DataView(bytes.buffer);
  reply.setUint8(FIELD.op, REPLY);
  reply.setUint16(FIELD.hardware, ETHERNET);
  reply.setUint32(FIELD.xid, view.getUint32(FIELD.xid));
  reply.setUint16(FIELD.flags, view.getUint16(FIELD.flags));
  // A refusal names no address (RFC 2131, table 3).
  if (!isNak) reply.setUint32(FIELD.ciaddr, view.getUint32(FIELD.ciaddr));
  reply.setUint32(FIELD.yiaddr, yiaddr);
  bytes.set(chaddr, FIELD.chaddr);
  reply.setUint32(FIELD.cookie, COOKIE);
  let at: number = FIELD.options;
  for (const [option, value] of options) {
    bytes.set([option, value.length], at);
    bytes.set(value, at + 2);
    at += 2 + value.length;
  }
  bytes[at] = OPTION.end;
  return bytes;
}

function bytesOf(value: number): Uint8Array {
  const bytes = new Uint8Array(4);
  new DataView(bytes.buffer).setUint32(0, value);
  return bytes;
}

function addressOf(value: Uint8Array | undefined): number | undefined {
  return value?.length === 4 ? value.reduce((sum, byte) => sum * 256 + byte, 0) : undefined;
}

function macOf(bytes: Uint8Array): number {
  return bytes.reduce((sum, byte) => sum * 256 + byte, 0);
}
