/**
 * Frames of a network of guests: Ethernet II, ARP, IPv4, ICMP, UDP and TCP, read and written.
 *
 * What is read comes from guests: each `parse` function gives nothing for bytes that are not in order, and never throws.
 * What it gives shares the bytes that it was given. Layouts are those of RFC 894 (Ethernet), 826 (ARP), 791 (IPv4),
 * 792 (ICMP), 768 (UDP) and 9293 (TCP).
 *
 * @module
 */

/** Size of an Ethernet header, in bytes. */
export const ETHERNET_SIZE = 14;
/** Size of an IPv4 header without options, in bytes. */
export const IPV4_SIZE = 20;
/** Size of a UDP header, in bytes. */
export const UDP_SIZE = 8;
/** Size of a TCP header without options, in bytes. */
export const TCP_SIZE = 20;
/** Largest IPv4 packet that a frame carries, in bytes. */
export const MTU = 1500;
/** Largest frame, in bytes. */
export const MAX_FRAME_SIZE: number = ETHERNET_SIZE + MTU;
/** The Ethernet address of all stations. */
export const BROADCAST_MAC = 0xffff_ffff_ffff;

/** What an Ethernet frame carries. */
export const ETHER_TYPE = { IPV4: 0x0800, ARP: 0x0806 } as const;
/** What an ARP packet says. */
export const ARP_OPERATION = { REQUEST: 1, REPLY: 2 } as const;
/** What an IPv4 packet carries. */
export const IP_PROTOCOL = { ICMP: 1, TCP: 6, UDP: 17 } as const;
/** Types of ICMP messages. */
export const ICMP_TYPE = { ECHO_REPLY: 0, UNREACHABLE: 3, ECHO_REQUEST: 8 } as const;
/** Why something is unreachable: codes of {@linkcode ICMP_TYPE}`.UNREACHABLE`. */
export const ICMP_UNREACHABLE = { NETWORK: 0, HOST: 1, PORT: 3, PROHIBITED: 13 } as const;
/** Flags of a TCP segment. */
export const TCP_FLAG = { FIN: 1, SYN: 2, RST: 4, PSH: 8, ACK: 16 } as const;

const ARP_SIZE = 28;
const ICMP_SIZE = 8;
const IPV4_OFFSET = ETHERNET_SIZE;
const TRANSPORT_OFFSET = ETHERNET_SIZE + IPV4_SIZE;
const TIME_TO_LIVE = 64;
const MORE_FRAGMENTS = 0x2000;
const DONT_FRAGMENT = 0x4000;
const MSS_OPTION = { kind: 2, size: 4 } as const;

/** An Ethernet frame. */
export interface EthernetFrame {
  /** Ethernet address that it goes to. */
  readonly destination: number;
  /** Ethernet address that it comes from. */
  readonly source: number;
  /** What it carries: one of {@linkcode ETHER_TYPE}. */
  readonly type: number;
  /** What follows the header, padding included. */
  readonly payload: Uint8Array;
}

/** An ARP packet. */
export interface ArpPacket {
  /** One of {@linkcode ARP_OPERATION}. */
  readonly operation: number;
  /** Ethernet address of its sender. */
  readonly senderMac: number;
  /** IPv4 address of its sender. */
  readonly senderIp: number;
  /** Ethernet address asked of; 0 in a request. */
  readonly targetMac: number;
  /** IPv4 address asked for. */
  readonly targetIp: number;
}

/** An IPv4 packet that is no fragment. */
export interface Ipv4Packet {
  /** IPv4 address that it comes from. */
  readonly source: number;
  /** IPv4 address that it goes to. */
  readonly destination: number;
  /** What it carries: one of {@linkcode IP_PROTOCOL}. */
  readonly protocol: number;
  /** How many routers it may pass. */
  readonly timeToLive: number;
  /** What follows the header. */
  readonly payload: Uint8Array;
  /** The whole packet without padding. */
  readonly bytes: Uint8Array;
}

/** An ICMP message. */
export interface IcmpMessage {
  /** One of {@linkcode ICMP_TYPE}. */
  readonly type: number;
  /** What it says within its type. */
  readonly code: number;
  /** Bytes 4 to 7, such as identifier and sequence number of an echo. */
  readonly rest: number;
  /** What follows. */
  readonly payload: Uint8Array;
}

/** A UDP datagram. */
export interface UdpDatagram {
  /** Port that it comes from. */
  readonly sourcePort: number;
  /** Port that it goes to. */
  readonly destinationPort: number;
  /** What it carries. */
  readonly payload: Uint8Array;
}

/** A TCP segment. */
export interface TcpSegment {
  /** Port that it comes from. */
  readonly sourcePort: number;
  /** Port that it goes to. */
  readonly destinationPort: number;
  /** Sequence number of its first byte. */
  readonly sequence: number;
  /** Sequence number that its sender expects next; counts with the flag ACK. */
  readonly acknowledgment: number;
  /** Bits of {@linkcode TCP_FLAG}. */
  readonly flags: number;
  /** How many bytes its sender takes, unscaled. */
  readonly window: number;
  /** The option maximum segment size, in bytes. */
  readonly mss?: number | undefined;
  /** What it carries. */
  readonly payload: Uint8Array;
}

/** Where a packet comes from and goes to, on both layers. */
export interface PacketAddresses {
  /** Ethernet address that it comes from. */
  readonly sourceMac: number;
  /** Ethernet address that it goes to. */
  readonly destinationMac: number;
  /** IPv4 address that it comes from. */
  readonly source: number;
  /** IPv4 address that it goes to. */
  readonly destination: number;
}

/**
 * Reads an Ethernet address.
 *
 * @param text Six pairs of hexadecimal digits, such as `"02:00:00:00:00:01"`
 * @returns The address as a number
 * @throws {RangeError} If the text is none
 */
export function parseMac(text: string): number {
  if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(text)) {
    throw new RangeError(
      `Cannot read "${text}" as an Ethernet address: write six pairs of hexadecimal digits`,
    );
  }
  return Number.parseInt(text.replaceAll(":", ""), 16);
}

/**
 * Writes an Ethernet address.
 *
 * @param mac The address as a number
 * @returns Six pairs of hexadecimal digits
 */
export function formatMac(mac: number): string {
  return mac.toString(16).padStart(12, "0").replaceAll(/..(?=.)/g, "$&:");
}

/**
 * Tells whether an Ethernet address is one of many stations.
 *
 * @param mac The address
 * @returns Whether it is a multicast address or that of all
 */
export function isMulticast(mac: number): boolean {
  return (mac / 2 ** 40 & 1) === 1;
}

/**
 * Reads an Ethernet frame.
 *
 * @param frame Its bytes, without a checksum at the end
 * @returns The frame, or nothing if it has no whole header
 */
export function parseEthernet(frame: Uint8Array): EthernetFrame | undefined {
  if (frame.length < ETHERNET_SIZE) return undefined;
  return {
    destination: readMac(frame, 0),
    source: readMac(frame, 6),
    type: read16(frame, 12),
    payload: frame.subarray(ETHERNET_SIZE),
  };
}

/**
 * Reads an ARP packet for IPv4 on Ethernet.
 *
 * @param payload What follows the Ethernet header
 * @returns The packet, or nothing if it is malformed or of another kind of network
 */
export function parseArp(payload: Uint8Array): ArpPacket | undefined {
  if (payload.length < ARP_SIZE) return undefined;
  if (read32(payload, 0) !== 0x0001_0800 || read16(payload, 4) !== 0x0604) return undefined;
  return {
    operation: read16(payload, 6),
    senderMac: readMac(payload, 8),
    senderIp: read32(payload, 14),
    targetMac: readMac(payload, 18),
    targetIp: read32(payload, 24),
  };
}

/**
 * Reads an IPv4 packet.
 *
 * @param payload What follows the Ethernet header
 * @returns The packet, or nothing if it is malformed, a fragment, or its header does not have the checksum that it says
 */
export function parseIpv4Packet(payload: Uint8Array): Ipv4Packet | undefined {
  if (payload.length < IPV4_SIZE || payload[0]! >> 4 !== 4) return undefined;
  const headerSize = (payload[0]! & 15) * 4;
  const size = read16(payload, 2);
  if (headerSize < IPV4_SIZE || size < headerSize || size > payload.length) return undefined;
  // All but the flag that forbids fragments.
  if ((read16(payload, 6) & ~DONT_FRAGMENT) !== 0) return undefined;
  if (checksum(payload, 0, headerSize) !== 0) return undefined;
  return {
    source: read32(payload, 12),
    destination: read32(payload, 16),
    protocol: payload[9]!,
    timeToLive: payload[8]!,
    payload: payload.subarray(headerSize, size),
    bytes: payload.subarray(0, size),
  };
}

/**
 * Reads an ICMP message.
 *
 * @param packet The packet that carries it
 * @returns The message, or nothing if it is malformed or its checksum is wrong
 */
export function parseIcmp({ payload }: Ipv4Packet): IcmpMessage | undefined {
  if (payload.length < ICMP_SIZE || checksum(payload, 0, payload.length) !== 0) return undefined;
  return {
    type: payload[0]!,
    code: payload[1]!,
    rest: read32(payload, 4),
    payload: payload.subarray(ICMP_SIZE),
  };
}

/**
 * Reads a UDP datagram.
 *
 * @param packet The packet that carries it
 * @returns The datagram, or nothing if it is malformed or has a checksum that is wrong
 */
export function parseUdp(packet: Ipv4Packet): UdpDatagram | undefined {
  const { payload } = packet;
  if (payload.length < UDP_SIZE) return undefined;
  const size = read16(payload, 4);
  if (size < UDP_SIZE || size > payload.length) return undefined;
  // Without a checksum it is 0 (RFC 768).
  if (
    read16(payload, 6) !== 0 && checksum(payload, 0, size, pseudoHeader(packet, IP_PROTOCOL.UDP, size)) !== 0
  ) {
    return undefined;
  }
  return {
    sourcePort: read16(payload, 0),
    destinationPort: read16(payload, 2),
    payload: payload.subarray(UDP_SIZE, size),
  };
}

/**
 * Reads a TCP segment.
 *
 * @param packet The packet that carries it
 * @returns The segment, or nothing if it is malformed or its checksum is wrong
 */
export function parseTcp(packet: Ipv4Packet): TcpSegment | undefined {
  const { payload } = packet;
  if (payload.length < TCP_SIZE) return undefined;
  const headerSize = (payload[12]! >> 4) * 4;
  if (headerSize < TCP_SIZE || headerSize > payload.length) return undefined;
  if (checksum(payload, 0, payload.length, pseudoHeader(packet, IP_PROTOCOL.TCP, payload.length)) !== 0) {
    return undefined;
  }
  return {
    sourcePort: read16(payload, 0),
    destinationPort: read16(payload, 2),
    sequence: read32(payload, 4),
    acknowledgment: read32(payload, 8),
    flags: payload[13]!,
    window: read16(payload, 14),
    mss: findMss(payload, headerSize),
    payload: payload.subarray(headerSize),
  };
}

function findMss(header: Uint8Array, end: number): number | undefined {
  for (let at = TCP_SIZE; at < end;) {
    const kind = header[at]!;
    if (kind === 0) return undefined;
    // Padding has no size.
    if (kind === 1) {
      at++;
      continue;
    }
    const size = at + 1 < end ? header[at + 1]! : 0;
    if (size < 2 || at + size > end) return undefined;
    if (kind === MSS_OPTION.kind && size === MSS_OPTION.size) return read16(header, at + 2);
    at += size;
  }
  return undefined;
}

/**
 * Writes a frame with any payload.
 *
 * @param frame What it says
 * @returns Its bytes
 */
export function buildEthernet({ destination, source, type, payload }: EthernetFrame): Uint8Array {
  const frame = new Uint8Array(ETHERNET_SIZE + payload.length);
  writeEthernet(frame, destination, source, type);
  frame.set(payload, ETHERNET_SIZE);
  return frame;
}

/**
 * Writes a frame with an ARP packet, from the packet's sender.
 *
 * @param destination Ethernet address that the frame goes to
 * @param packet What it says
 * @returns The bytes of the frame
 */
export function buildArp(destination: number, packet: ArpPacket): Uint8Array {
  const frame = new Uint8Array(ETHERNET_SIZE + ARP_SIZE);
  writeEthernet(frame, destination, packet.senderMac, ETHER_TYPE.ARP);
  write32(frame, 14, 0x0001_0800);
  write16(frame, 18, 0x0604);
  write16(frame, 20, packet.operation);
  writeMac(frame, 22, packet.senderMac);
  write32(frame, 28, packet.senderIp);
  writeMac(frame, 32, packet.targetMac);
  write32(frame, 38, packet.targetIp);
  return frame;
}

/**
 * Writes a frame with an ICMP message.
 *
 * @param addresses Where it comes from and goes to
 * @param message What it says
 * @returns The bytes of the frame
 */
export function buildIcmp(addresses: PacketAddresses, message: IcmpMessage): Uint8Array {
  const size = ICMP_SIZE + message.payload.length;
  const frame = buildIpv4(addresses, IP_PROTOCOL.ICMP, size);
  frame[TRANSPORT_OFFSET] = message.type;
  frame[TRANSPORT_OFFSET + 1] = message.code;
  write32(frame, TRANSPORT_OFFSET + 4, message.rest);
  frame.set(message.payload, TRANSPORT_OFFSET + ICMP_SIZE);
  write16(frame, TRANSPORT_OFFSET + 2, checksum(frame, TRANSPORT_OFFSET, size));
  return frame;
}

/**
 * Writes a frame with a UDP datagram. One that is larger than {@linkcode MAX_FRAME_SIZE} has to be taken apart by
 * {@linkcode fragment}.
 *
 * @param addresses Where it comes from and goes to
 * @param datagram What it says; at most 65,507 bytes
 * @returns The bytes of the frame
 */
export function buildUdp(addresses: PacketAddresses, datagram: UdpDatagram): Uint8Array {
  const size = UDP_SIZE + datagram.payload.length;
  const frame = buildIpv4(addresses, IP_PROTOCOL.UDP, size);
  write16(frame, TRANSPORT_OFFSET, datagram.sourcePort);
  write16(frame, TRANSPORT_OFFSET + 2, datagram.destinationPort);
  write16(frame, TRANSPORT_OFFSET + 4, size);
  frame.set(datagram.payload, TRANSPORT_OFFSET + UDP_SIZE);
  const sum = checksum(frame, TRANSPORT_OFFSET, size, pseudoHeader(addresses, IP_PROTOCOL.UDP, size));
  // 0 would say that there is none.
  write16(frame, TRANSPORT_OFFSET + 6, sum || 0xffff);
  return frame;
}

/**
 * Writes a frame with a TCP segment.
 *
 * @param addresses Where it comes from and goes to
 * @param segment What it says
 * @returns The bytes of the frame
 */
export function buildTcp(addresses: PacketAddresses, segment: TcpSegment): Uint8Array {
  const headerSize = TCP_SIZE + (segment.mss === undefined ? 0 : MSS_OPTION.size);
  const size = headerSize + segment.payload.length;
  const frame = buildIpv4(addresses, IP_PROTOCOL.TCP, size);
  write16(frame, TRANSPORT_OFFSET, segment.sourcePort);
  write16(frame, TRANSPORT_OFFSET + 2, segment.destinationPort);
  write32(frame, TRANSPORT_OFFSET + 4, segment.sequence);
  write32(frame, TRANSPORT_OFFSET + 8, segment.acknowledgment);
  frame[TRANSPORT_OFFSET + 12] = headerSize / 4 << 4;
  frame[TRANSPORT_OFFSET + 13] = segment.flags;
  write16(frame, TRANSPORT_OFFSET + 14, segment.window);
  if (segment.mss !== undefined) {
    frame[TRANSPORT_OFFSET + TCP_SIZE] = MSS_OPTION.kind;
    frame[TRANSPORT_OFFSET + TCP_SIZE + 1] = MSS_OPTION.size;
    write16(frame, TRANSPORT_OFFSET + TCP_SIZE + 2, segment.mss);
  }
  frame.set(segment.payload, TRANSPORT_OFFSET + headerSize);
  const sum = checksum(frame, TRANSPORT_OFFSET, size, pseudoHeader(addresses, IP_PROTOCOL.TCP, size));
  write16(frame, TRANSPORT_OFFSET + 16, sum);
  return frame;
}

/**
 * Takes a frame apart that is too large.
 *
 * @param frame A frame with an IPv4 packet, as made by a function of this module
 * @param identification Tells the fragments of one packet from those of others: 16 bits
 * @returns Frames of at most {@linkcode MAX_FRAME_SIZE}; the same one if it is small enough
 */
export function fragment(frame: Uint8Array, identification: number): Uint8Array[] {
  if (frame.length <= MAX_FRAME_SIZE) return [frame];
  const frames: Uint8Array[] = [];
  // Offsets count in units of 8 bytes.
  const step = (MTU - IPV4_SIZE) & ~7;
  for (let at = TRANSPORT_OFFSET; at < frame.length; at += step) {
    const part = frame.subarray(at, at + step);
    const piece = new Uint8Array(TRANSPORT_OFFSET + part.length);
    piece.set(frame.subarray(0, TRANSPORT_OFFSET));
    piece.set(part, TRANSPORT_OFFSET);
    const more = at + step < frame.length ? MORE_FRAGMENTS : 0;
    write16(piece, IPV4_OFFSET + 4, identification);
    write16(piece, IPV4_OFFSET + 6, more | (at - TRANSPORT_OFFSET) / 8);
    finishIpv4(piece);
    frames.push(piece);
  }
  return frames;
}

/**
 * Sums bytes up as the Internet's protocols do (RFC 1071).
 *
 * @param bytes Where they are
 * @param start Index of the first one
 * @param size How many
 * @param initial A sum to begin with
 * @returns The checksum; 0 over bytes that contain their own
 */
export function checksum(bytes: Uint8Array, start: number, size: number, initial = 0): number {
  let sum = initial;
  const end = start + size;
  let at = start;
  for (; at + 1 < end; at += 2) sum += bytes[at]! << 8 | bytes[at + 1]!;
  if (at < end) sum += bytes[at]! << 8;
  while (sum > 0xffff) sum = (sum & 0xffff) + Math.floor(sum / 0x1_0000);
  return ~sum & 0xffff;
}

function pseudoHeader(
  { source, destination }: Pick<PacketAddresses, "source" | "destination">,
  protocol: number,
  size: number,
): number {
  return (source >>> 16) + (source & 0xffff) + (destination >>> 16) + (destination & 0xffff) + protocol +
    size;
}

/** Makes a frame for a packet, with all but the payload. */
function buildIpv4(addresses: PacketAddresses, protocol: number, payloadSize: number): Uint8Array {
  const frame = new Uint8Array(TRANSPORT_OFFSET + payloadSize);
  writeEthernet(frame, addresses.destinationMac, addresses.sourceMac, ETHER_TYPE.IPV4);
  frame[IPV4_OFFSET] = 4 << 4 | IPV4_SIZE / 4;
  // A packet with this flag needs no identification (RFC 6864).
  if (frame.length <= MAX_FRAME_SIZE) write16(frame, IPV4_OFFSET + 6, DONT_FRAGMENT);
  frame[IPV4_OFFSET + 8] = TIME_TO_LIVE;
  frame[IPV4_OFFSET + 9] = protocol;
  write32(frame, IPV4_OFFSET + 12, addresses.source);
  write32(frame, IPV4_OFFSET + 16, addresses.destination);
  finishIpv4(frame);
  return frame;
}

function finishIpv4(frame: Uint8Array): void {
  write16(frame, IPV4_OFFSET + 2, frame.length - IPV4_OFFSET);
  write16(frame, IPV4_OFFSET + 10, 0);
  write16(frame, IPV4_OFFSET + 10, checksum(frame, IPV4_OFFSET, IPV4_SIZE));
}

function writeEthernet(frame: Uint8Array, destination: number, source: number, type: number): void {
  writeMac(frame, 0, destination);
  writeMac(frame, 6, source);
  write16(frame, 12, type);
}

function read16(bytes: Uint8Array, at: number): number {
  return bytes[at]! << 8 | bytes[at + 1]!;
}

function read32(bytes: Uint8Array, at: number): number {
  return (bytes[at]! << 24 | bytes[at + 1]! << 16 | bytes[at + 2]! << 8 | bytes[at + 3]!) >>> 0;
}

function readMac(bytes: Uint8Array, at: number): number {
  return read16(bytes, at) * 2 ** 32 + read32(bytes, at + 2);
}

function write16(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value >>> 8;
  bytes[at + 1] = value;
}

function write32(bytes: Uint8Array, at: number, value: number): void {
  write16(bytes, at, value >>> 16);
  write16(bytes, at + 2, value);
}

function writeMac(bytes: Uint8Array, at: number, mac: number): void {
  write16(bytes, at, Math.floor(mac / 2 ** 32));
  write32(bytes, at + 2, mac);
}
