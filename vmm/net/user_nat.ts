/**
 * The gateway of a network of guests in user space: it answers for its addresses, and carries what guests say by TCP and
 * UDP through ordinary sockets of the host, so that it takes no rights. Ports of the host lead inward in the same way.
 *
 * Guests reach the host's name server, and where the network is open the outside as the host does: but neither the host's
 * loopback nor addresses that mean something on its own links only. The gateway itself offers nothing but names and echo.
 *
 * @module
 */

import { isIPv6 } from "node:net";
import { setTimeout as wait } from "node:timers/promises";
import { formatIpv4, type Ipv4Network, parseCidr, parseIpv4 } from "../../dsl/mod.ts";
import {
  canonicalAddress,
  type GuestDatagrams,
  hostResolver,
  limitedSender,
  type Listener,
  listenUdp,
  openUdp,
  type PortForward,
  PortForwards,
} from "./forward.ts";
import {
  ARP_OPERATION,
  type ArpPacket,
  BROADCAST_MAC,
  buildArp,
  buildIcmp,
  buildTcp,
  buildUdp,
  ETHER_TYPE,
  formatMac,
  fragment,
  ICMP_TYPE,
  ICMP_UNREACHABLE,
  IP_PROTOCOL,
  IPV4_SIZE,
  type Ipv4Packet,
  isMulticast,
  parseArp,
  parseEthernet,
  parseIcmp,
  parseIpv4Packet,
  parseTcp,
  parseUdp,
  TCP_FLAG,
  type TcpSegment,
  type UdpDatagram,
} from "./frame.ts";
import { type Clock, systemClock, TcpEndpoint } from "./user_tcp.ts";

/** Most TCP connections in all, of one guest, and of one guest whose handshake is not done. */
const MAX_CONNECTIONS = 4096;
const MAX_GUEST_CONNECTIONS = 1024;
const MAX_OPENING = 128;
/** Most UDP ports of guests in all and of one guest; the one that was silent longest makes way for a new one. */
const MAX_FLOWS = 2048;
const MAX_GUEST_FLOWS = 512;
/** Most peers of one UDP port of a guest; the one that was spoken to longest ago makes way for a new one. */
const MAX_PEERS = 64;
/** Most Ethernet addresses that are known. */
const MAX_NEIGHBORS = 4096;
/** How long a UDP port may be silent, and one that asked for a name, in milliseconds. */
const FLOW_TIMEOUT = 60_000;
const NAME_TIMEOUT = 10_000;
const SWEEP_INTERVAL = 5000;
/** How long the host may take to connect, in milliseconds. */
const CONNECT_TIMEOUT = 30_000;
/** How long nothing is accepted after that failed, as for lack of descriptors, in milliseconds. */
const ACCEPT_PAUSE = 100;
const DNS_PORT = 53;
/** Ports of the gateway that stand for those who connect from the host, as Linux has them. */
const FIRST_PORT = 32_768;
const LAST_PORT = 60_999;
const MAX_DATAGRAM = 65_507;
const EMPTY = new Uint8Array(0);
/** What no guest reaches: this host, its loopback, its links, and groups (RFC 6890). */
const UNREACHABLE_NETWORKS = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16"].map(parseCidr);
const FIRST_GROUP = parseIpv4("224.0.0.0");

/** A place that the host's sockets reach. */
export interface HostTarget {
  /** Address. */
  readonly hostname: string;
  /** Port. */
  readonly port: number;
}

/** What a {@linkcode UserNat} is made of. */
export interface UserNatOptions {
  /** Its address in the network. */
  readonly gateway: string;
  /** Its further address, where guests ask for names. */
  readonly dns: string;
  /** Network with prefix length, such as `10.20.0.0/24`. */
  readonly cidr: string;
  /** Whether guests reach the outside, as the host. */
  readonly isNatOpen: boolean;
  /** Takes a frame to the guests; false if it cannot now. The frame is the taker's. */
  readonly send: (frame: Uint8Array) => boolean | void;
  /** Finds the name server that answers guests; the host's unless told. */
  readonly resolver?: () => HostTarget;
  /** Finds by which address the host reaches one of the outside; nothing if guests may not. By itself unless told. */
  readonly reach?: (address: string) => string | undefined;
  /** The clock; that of the process unless told. */
  readonly clock?: Clock;
}

/** How much a {@linkcode UserNat} has to do. */
export interface UserNatStatus {
  /** TCP connections. */
  readonly connections: number;
  /** UDP ports of guests. */
  readonly flows: number;
  /** Ethernet addresses that are known. */
  readonly neighbors: number;
}

interface Guest {
  readonly connections: Map<string, Connection>;
  opening: number;
}

interface Connection {
  readonly endpoint: TcpEndpoint;
  /** The socket of the host, once it is there. */
  host?: Deno.TcpConn;
  /** Ends the wait for that. */
  readonly abort: AbortController;
}

/** A UDP port of a guest, which has a port of the host of its own. */
interface Flow {
  readonly guestIp: number;
  readonly socket: ReturnType<typeof openUdp>;
  readonly timeout: number;
  /** Whom the guest spoke to, by the place that the host sees, and as the guest sees them: nobody else may answer. */
  readonly peers: Map<string, { readonly ip: number; readonly port: number }>;
  used: number;
}

/** Somebody who sends datagrams to a guest through a forward: the guest sees a port of the gateway. */
interface Caller {
  readonly guestIp: number;
  readonly guestPort: number;
  onAnswer(data: Uint8Array): void;
}

/** The gateway of a network of guests. */
export class UserNat implements Disposable, AsyncDisposable {
  /** Its Ethernet address, which is always the same for its IPv4 address. */
  readonly mac: string;
  readonly #options: UserNatOptions;
  readonly #clock: Clock;
  readonly #resolver: () => HostTarget;
  readonly #mac: number;
  readonly #gateway: number;
  readonly #dns: number;
  readonly #network: Ipv4Network;
  readonly #forbidden: readonly Ipv4Network[];
  readonly #neighbors = new Map<number, number>();
  readonly #guests = new Map<number, Guest>();
  #connections = 0;
  /** The one that was silent longest first. */
  readonly #flows = new Map<string, Flow>();
  readonly #sendDatagram = limitedSender();
  readonly #callers = new Map<number, Caller>();
  readonly #forwards = new Map<string, PortForwards>();
  readonly #tasks = new Set<Promise<void>>();
  #nextPort = FIRST_PORT;
  #identification = 0;
  #cancelSweep: (() => void) | undefined;
  #isDisposed = false;

  /**
   * Makes a gateway.
   *
   * @param options Its addresses, and where frames go
   */
  constructor(options: UserNatOptions) {
    this.#options = options;
    this.#clock = options.clock ?? systemClock;
    const server = options.resolver ? undefined : hostResolver();
    this.#resolver = options.resolver ?? (() => ({ hostname: server!(), port: DNS_PORT }));
    this.#gateway = parseIpv4(options.gateway);
    this.#dns = parseIpv4(options.dns);
    this.#network = parseCidr(options.cidr);
    this.#forbidden = [this.#network, ...UNREACHABLE_NETWORKS];
    // Administered locally: no other vendor has it.
    this.#mac = 0x0a00_0000_0000 + this.#gateway;
    this.mac = formatMac(this.#mac);
  }

  /** How much it has to do. */
  get status(): UserNatStatus {
    return {
      connections: this.#connections,
      flows: this.#flows.size,
      neighbors: this.#neighbors.size,
    };
  }

  /**
   * Takes a frame of a guest.
   *
   * @param bytes The frame; nothing of it is kept, and it may be hostile
   */
  receive(bytes: Uint8Array): void {
    const frame = parseEthernet(bytes);
    if (!frame || this.#isDisposed || isMulticast(frame.source)) return;
    if (frame.type === ETHER_TYPE.ARP) {
      const arp = parseArp(frame.payload);
      if (arp && arp.senderMac === frame.source) this.#receiveArp(arp);
      return;
    }
    if (frame.type !== ETHER_TYPE.IPV4 || frame.destination !== this.#mac) return;
    const packet = parseIpv4Packet(frame.payload);
    if (!packet || !this.#isGuest(packet.source)) return;
    this.#learn(packet.source, frame.source);
    switch (packet.protocol) {
      case IP_PROTOCOL.TCP: {
        const segment = parseTcp(packet);
        if (segment) this.#receiveTcp(packet, segment);
        break;
      }
      case IP_PROTOCOL.UDP: {
        const datagram = parseUdp(packet);
        if (datagram) this.#receiveUdp(packet, datagram);
        break;
      }
      case IP_PROTOCOL.ICMP:
        this.#receiveIcmp(packet);
    }
  }

  /**
   * Makes these the port forwards of a machine: what is no more in the list ends with its connections.
   *
   * @param machine Any name of the machine
   * @param forwards All of its forwards
   * @throws {MachineError} If a port cannot be had; those before it in the list work then
   */
  async setForwards(machine: string, forwards: readonly PortForward[]): Promise<void> {
    let ports = this.#forwards.get(machine);
    if (!ports) {
      if (forwards.length === 0 || this.#isDisposed) return;
      ports = new PortForwards((forward) =>
        forward.protocol === "tcp" ? this.#listenTcp(forward) : this.#listenUdp(forward)
      );
      this.#forwards.set(machine, ports);
    }
    await ports.set(forwards).finally(() => this.#isDisposed && ports[Symbol.dispose]());
  }

  /**
   * Tells whether guests may reach an address of the outside.
   *
   * @param ip The address as a number
   * @returns Whether they may
   */
  isOutside(ip: number): boolean {
    return this.#options.isNatOpen && ip < FIRST_GROUP && ip !== this.#gateway && ip !== this.#dns &&
      !this.#forbidden.some(({ base, size }) => ip >= base && ip - base < size);
  }

  /**
   * Ends all that an address of the network has open, as its machine is gone. Its forwards stay.
   *
   * @param address The address
   */
  release(address: string): void {
    const ip = parseIpv4(address);
    for (const { endpoint } of [...this.#guests.get(ip)?.connections.values() ?? []]) endpoint.abort();
    for (const [key, flow] of [...this.#flows]) {
      if (flow.guestIp === ip) this.#endFlow(key, flow);
    }
    this.#neighbors.delete(ip);
  }

  /** Ends everything. */
  [Symbol.dispose](): void {
    for (const ports of this.#forwards.values()) ports[Symbol.dispose]();
    this.#forwards.clear();
    for (const guest of [...this.#guests.values()]) {
      for (const { endpoint } of [...guest.connections.values()]) endpoint.abort();
    }
    for (const [key, flow] of [...this.#flows]) this.#endFlow(key, flow);
    this.#cancelSweep?.();
    this.#cancelSweep = undefined;
    this.#isDisposed = true;
  }

  /** Ends everything, and waits until all sockets are closed. */
  async [Symbol.asyncDispose](): Promise<void> {
    this[Symbol.dispose]();
    while (this.#tasks.size > 0) await Promise.all(this.#tasks);
  }

  #isGuest(ip: number): boolean {
    const host = ip - this.#network.base;
    return host > 0 && host < this.#network.size - 1 && ip !== this.#gateway && ip !== this.#dns;
  }

  #learn(ip: number, mac: number): void {
    if (this.#neighbors.get(ip) === mac) return;
    for (const oldest of this.#neighbors.keys()) {
      if (this.#neighbors.size < MAX_NEIGHBORS) break;
      this.#neighbors.delete(oldest);
    }
    this.#neighbors.set(ip, mac);
  }

  #receiveArp({ operation, senderMac, senderIp, targetIp }: ArpPacket): void {
    if (this.#isGuest(senderIp)) this.#learn(senderIp, senderMac);
    // Whoever looks whether an address is free asks from 0.0.0.0 (RFC 5227).
    else if (senderIp !== 0) return;
    if (operation !== ARP_OPERATION.REQUEST || targetIp !== this.#gateway && targetIp !== this.#dns) return;
    this.#send(buildArp(senderMac, {
      operation: ARP_OPERATION.REPLY,
      senderMac: this.#mac,
      senderIp: targetIp,
      targetMac: senderMac,
      targetIp: senderIp,
    }));
  }

  #receiveIcmp(packet: Ipv4Packet): void {
    const message = parseIcmp(packet);
    // Errors are never answered.
    if (message?.type !== ICMP_TYPE.ECHO_REQUEST || message.code !== 0) return;
    const { destination, source } = packet;
    if (destination !== this.#gateway && destination !== this.#dns) {
      // Sockets that could carry it take rights.
      return this.#answerUnreachable(packet, ICMP_UNREACHABLE.PROHIBITED);
    }
    this.#transmit(
      destination,
      source,
      (addresses) => buildIcmp(addresses, { ...message, type: ICMP_TYPE.ECHO_REPLY }),
    );
  }

  /** Finds what a destination of guests means; the code of an ICMP message if it is out of reach. */
  #target(ip: number, port: number): HostTarget | number {
    if (ip === this.#dns && port === DNS_PORT) return this.#resolver();
    if (ip === this.#gateway || ip === this.#dns || port === 0) return ICMP_UNREACHABLE.PORT;
    if (!this.isOutside(ip)) return ICMP_UNREACHABLE.PROHIBITED;
    const address = formatIpv4(ip);
    const hostname = this.#options.reach ? this.#options.reach(address) : address;
    return hostname === undefined ? ICMP_UNREACHABLE.PROHIBITED : { hostname, port };
  }

  #answerUnreachable({ source, bytes }: Ipv4Packet, code: number): void {
    const headerSize = (bytes[0]! & 15) * 4;
    this.#transmit(this.#gateway, source, (addresses) =>
      buildIcmp(addresses, {
        type: ICMP_TYPE.UNREACHABLE,
        code,
        rest: 0,
        payload: bytes.subarray(0, headerSize + 8),
      }));
  }

  /** Sends a packet to a guest; false if that cannot be now. */
  #transmit(
    source: number,
    destination: number,
    build: (addresses: Parameters<typeof buildTcp>[0]) => Uint8Array,
  ): boolean {
    const destinationMac = this.#neighbors.get(destination);
    if (destinationMac === undefined) {
      this.#send(buildArp(BROADCAST_MAC, {
        operation: ARP_OPERATION.REQUEST,
        senderMac: this.#mac,
        senderIp: this.#gateway,
        targetMac: 0,
        targetIp: destination,
      }));
      return false;
    }
    return this.#send(build({ sourceMac: this.#mac, destinationMac, source, destination }));
  }

  #send(frame: Uint8Array): boolean {
    return !this.#isDisposed && this.#options.send(frame) !== false;
  }

  #track(task: Promise<void>): void {
    const tracked = task.finally(() => this.#tasks.delete(tracked));
    this.#tasks.add(tracked);
  }

  // TCP

  #receiveTcp(packet: Ipv4Packet, segment: TcpSegment): void {
    const { source, destination } = packet;
    const key = connectionKey(destination, segment.destinationPort, segment.sourcePort);
    const isSyn = (segment.flags & (TCP_FLAG.SYN | TCP_FLAG.ACK | TCP_FLAG.RST)) === TCP_FLAG.SYN;
    const connection = this.#guests.get(source)?.connections.get(key);
    if (connection && !(isSyn && connection.endpoint.isOver)) return connection.endpoint.receive(segment);
    // The guest uses its port again.
    connection?.endpoint.abort();
    if (!isSyn) return this.#answerReset(packet, segment);
    const target = this.#target(destination, segment.destinationPort);
    if (target === ICMP_UNREACHABLE.PORT) return this.#answerReset(packet, segment);
    if (typeof target === "number") return this.#answerUnreachable(packet, target);
    // It asks again when those before it are done.
    if ((this.#guests.get(source)?.opening ?? 0) >= MAX_OPENING) return;
    const made = this.#addConnection(source, segment.sourcePort, destination, segment.destinationPort);
    if (!made) return this.#answerReset(packet, segment);
    this.#track(this.#connect(made, target, {
      packet: { ...packet, bytes: packet.bytes.slice(0, IPV4_SIZE + 48), payload: EMPTY },
      segment: { ...segment, payload: EMPTY },
    }));
  }

  /** Makes a connection of a guest; nothing if there are too many. */
  #addConnection(
    guestIp: number,
    guestPort: number,
    peerIp: number,
    peerPort: number,
  ): Connection | undefined {
    const guest = this.#guests.get(guestIp) ?? { connections: new Map<string, Connection>(), opening: 0 };
    if (guest.connections.size >= MAX_GUEST_CONNECTIONS || this.#connections >= MAX_CONNECTIONS) {
      for (const { endpoint } of guest.connections.values()) {
        if (!endpoint.isOver) continue;
        endpoint.abort();
        return this.#addConnection(guestIp, guestPort, peerIp, peerPort);
      }
      return undefined;
    }
    const key = connectionKey(peerIp, peerPort, guestPort);
    let isOpening = true;
    const endOpening = () => {
      if (isOpening) guest.opening--;
      isOpening = false;
    };
    const connection: Connection = {
      abort: new AbortController(),
      endpoint: new TcpEndpoint({
        localPort: peerPort,
        remotePort: guestPort,
        clock: this.#clock,
        send: (segment) => this.#transmit(peerIp, guestIp, (addresses) => buildTcp(addresses, segment)),
        onOpen: endOpening,
        onClose: () => {
          endOpening();
          guest.connections.delete(key);
          this.#connections--;
          if (guest.connections.size === 0) this.#guests.delete(guestIp);
          connection.abort.abort();
          if (connection.endpoint.isAborted && connection.host) close(connection.host);
        },
      }),
    };
    guest.opening++;
    guest.connections.set(key, connection);
    this.#guests.set(guestIp, guest);
    this.#connections++;
    return connection;
  }

  async #connect(
    connection: Connection,
    target: HostTarget,
    { packet, segment }: { readonly packet: Ipv4Packet; readonly segment: TcpSegment },
  ): Promise<void> {
    const { endpoint, abort: { signal } } = connection;
    const timeout = new AbortController();
    const cancel = this.#clock.after(CONNECT_TIMEOUT, () => timeout.abort());
    let host: Deno.TcpConn;
    try {
      host = await Deno.connect({ ...target, signal: AbortSignal.any([signal, timeout.signal]) });
    } catch (error) {
      if (signal.aborted) return;
      const code = timeout.signal.aborted ? ICMP_UNREACHABLE.HOST : unreachableCode(error);
      if (code === undefined) this.#answerReset(packet, segment);
      else this.#answerUnreachable(packet, code);
      return endpoint.abort();
    } finally {
      cancel();
    }
    if (signal.aborted) return close(host);
    endpoint.accept(segment);
    await carry(connection, host);
  }

  #answerReset({ source, destination }: Ipv4Packet, segment: TcpSegment): void {
    const { flags, sequence, acknowledgment, payload, sourcePort, destinationPort } = segment;
    if (flags & TCP_FLAG.RST) return;
    const isAcknowledging = (flags & TCP_FLAG.ACK) !== 0;
    const size = payload.length + (flags & TCP_FLAG.SYN ? 1 : 0) + (flags & TCP_FLAG.FIN ? 1 : 0);
    this.#transmit(destination, source, (addresses) =>
      buildTcp(addresses, {
        sourcePort: destinationPort,
        destinationPort: sourcePort,
        sequence: isAcknowledging ? acknowledgment : 0,
        acknowledgment: isAcknowledging ? 0 : sequence + size >>> 0,
        flags: isAcknowledging ? TCP_FLAG.RST : TCP_FLAG.RST | TCP_FLAG.ACK,
        window: 0,
        payload: EMPTY,
      }));
  }

  // Not before the next turn, so that what it throws is a rejection.
  // deno-lint-ignore require-await
  async #listenTcp(forward: PortForward): Promise<Listener> {
    const server = Deno.listen({ hostname: forward.address, port: forward.host });
    const endpoints = new Set<TcpEndpoint>();
    const pause = new AbortController();
    const listener: Listener = {
      forward,
      close() {
        pause.abort();
        close(server);
        for (const endpoint of [...endpoints]) endpoint.abort();
        return accepting;
      },
    };
    const accepting = (async () => {
      while (!pause.signal.aborted) {
        try {
          const host = await server.accept();
          const connection = this.#call(parseIpv4(listener.forward.guestIp), listener.forward.guest);
          if (!connection) {
            close(host);
            continue;
          }
          const { endpoint } = connection;
          endpoints.add(endpoint);
          this.#track(carry(connection, host).finally(() => void endpoints.delete(endpoint)));
        } catch {
          // Without a free descriptor it would fail again at once.
          if (!pause.signal.aborted) {
            await wait(ACCEPT_PAUSE, undefined, { signal: pause.signal }).catch(() => {});
          }
        }
      }
    })();
    this.#track(accepting);
    return listener;
  }

  /** Connects to a guest, from a port of the gateway. */
  #call(guestIp: number, guestPort: number): Connection | undefined {
    const used = this.#guests.get(guestIp);
    if (!this.#isGuest(guestIp) || (used?.opening ?? 0) >= MAX_OPENING) return undefined;
    const port = this.#freePort((port) =>
      used?.connections.has(connectionKey(this.#gateway, port, guestPort)) ?? false
    );
    const connection = this.#addConnection(guestIp, guestPort, this.#gateway, port);
    connection?.endpoint.connect();
    return connection;
  }

  /** There are always more ports than connections or flows. */
  #freePort(isUsed: (port: number) => boolean): number {
    do {
      this.#nextPort = this.#nextPort === LAST_PORT ? FIRST_PORT : this.#nextPort + 1;
    } while (isUsed(this.#nextPort));
    return this.#nextPort;
  }

  // UDP

  #receiveUdp(packet: Ipv4Packet, { sourcePort, destinationPort, payload }: UdpDatagram): void {
    const { source, destination } = packet;
    if (destination === this.#gateway) {
      const caller = this.#callers.get(destinationPort);
      if (caller && caller.guestIp === source && caller.guestPort === sourcePort) {
        return caller.onAnswer(payload.slice());
      }
    }
    const target = this.#target(destination, destinationPort);
    if (typeof target === "number") {
      // Groups are none of its business.
      if (destination < FIRST_GROUP) this.#answerUnreachable(packet, target);
      return;
    }
    const isName = destination === this.#dns;
    const isV6 = isIPv6(target.hostname);
    const key = `${source} ${sourcePort} ${isName} ${isV6}`;
    const flow = this.#flows.get(key) ?? this.#beginFlow(key, source, sourcePort, target, isName);
    this.#flows.delete(key);
    this.#flows.set(key, flow);
    flow.used = this.#clock.now();
    const peer = `${canonicalAddress(target.hostname)} ${target.port}`;
    flow.peers.delete(peer);
    for (const oldest of flow.peers.keys()) {
      if (flow.peers.size < MAX_PEERS) break;
      flow.peers.delete(oldest);
    }
    flow.peers.set(peer, { ip: destination, port: destinationPort });
    this.#sendDatagram(flow.socket, payload.slice(), target.port, target.hostname);
  }

  #beginFlow(key: string, guestIp: number, guestPort: number, target: HostTarget, isName: boolean): Flow {
    let count = 0;
    let oldest: [string, Flow] | undefined;
    for (const entry of this.#flows) {
      if (entry[1].guestIp !== guestIp) continue;
      oldest ??= entry;
      count++;
    }
    if (count < MAX_GUEST_FLOWS) {
      oldest = this.#flows.size < MAX_FLOWS ? undefined : this.#flows.entries().next().value;
    }
    if (oldest) this.#endFlow(...oldest);
    const socket = openUdp(target.hostname);
    const flow: Flow = {
      guestIp,
      socket,
      timeout: isName ? NAME_TIMEOUT : FLOW_TIMEOUT,
      peers: new Map(),
      used: 0,
    };
    socket.on("error", () => this.#endFlow(key, flow));
    socket.on("message", (data, { address, port }) => {
      const peer = flow.peers.get(`${canonicalAddress(address)} ${port}`);
      if (!peer || this.#flows.get(key) !== flow) return;
      flow.used = this.#clock.now();
      this.#transmitDatagram({ ...peer, guestIp, guestPort }, data);
    });
    this.#flows.set(key, flow);
    this.#sweepLater();
    return flow;
  }

  #endFlow(key: string, flow: Flow): void {
    if (this.#flows.get(key) !== flow) return;
    this.#flows.delete(key);
    const closed = Promise.withResolvers<void>();
    flow.socket.close(closed.resolve);
    this.#track(closed.promise);
  }

  #sweepLater(): void {
    this.#cancelSweep ??= this.#clock.after(SWEEP_INTERVAL, () => {
      this.#cancelSweep = undefined;
      const now = this.#clock.now();
      for (const [key, flow] of [...this.#flows]) {
        if (now - flow.used >= flow.timeout) this.#endFlow(key, flow);
      }
      if (this.#flows.size > 0) this.#sweepLater();
    });
  }

  #transmitDatagram(
    { ip, port, guestIp, guestPort }: { ip: number; port: number; guestIp: number; guestPort: number },
    payload: Uint8Array,
  ): void {
    if (payload.length > MAX_DATAGRAM) return;
    let rest: Uint8Array[] = [];
    const isSent = this.#transmit(ip, guestIp, (addresses) => {
      const frame = buildUdp(addresses, { sourcePort: port, destinationPort: guestPort, payload });
      this.#identification = this.#identification + 1 & 0xffff;
      const [first, ...others] = fragment(frame, this.#identification);
      rest = others;
      return first!;
    });
    // One lost fragment is as bad as all.
    if (isSent) rest.every((frame) => this.#send(frame));
  }

  #listenUdp(forward: PortForward): Promise<Listener> {
    return listenUdp(
      forward,
      ({ guest: guestPort, guestIp: address }, onAnswer): GuestDatagrams | undefined => {
        const guestIp = parseIpv4(address);
        if (!this.#isGuest(guestIp) || this.#callers.size >= MAX_FLOWS) return undefined;
        const port = this.#freePort((port) => this.#callers.has(port));
        this.#callers.set(port, { guestIp, guestPort, onAnswer });
        return {
          send: (data) => this.#transmitDatagram({ ip: this.#gateway, port, guestIp, guestPort }, data),
          close: () => void this.#callers.delete(port),
        };
      },
    );
  }
}

function connectionKey(peerIp: number, peerPort: number, guestPort: number): string {
  return `${peerIp} ${peerPort * 65_536 + guestPort}`;
}

/** Carries bytes both ways until both have ended; each way waits for its slower end. */
async function carry(connection: Connection, host: Deno.TcpConn): Promise<void> {
  const { endpoint } = connection;
  connection.host = host;
  const outward = async () => {
    for (let data; (data = await endpoint.read());) endpoint.consume(await host.write(data));
    if (!endpoint.isAborted) await host.closeWrite();
  };
  const inward = async () => {
    for (let room; (room = await endpoint.room());) {
      const count = await host.read(room);
      if (count === null) break;
      endpoint.commit(count);
    }
    endpoint.end();
  };
  try {
    host.setNoDelay();
    host.setKeepAlive();
    await Promise.all([outward(), inward()]);
  } catch {
    endpoint.abort();
  } finally {
    close(host);
  }
}

/** Tells what keeps the host from connecting; nothing if the peer refused. */
function unreachableCode(error: unknown): number | undefined {
  switch ((error as { code?: string }).code) {
    case "ENETUNREACH":
      return ICMP_UNREACHABLE.NETWORK;
    case "EHOSTUNREACH":
    case "ETIMEDOUT":
      return ICMP_UNREACHABLE.HOST;
    case "EACCES":
    case "EPERM":
      return ICMP_UNREACHABLE.PROHIBITED;
    default:
      return undefined;
  }
}

function close(resource: { close(): void }): void {
  try {
    resource.close();
  } catch (error) {
    // Whoever came first has closed it.
    if (!(error instanceof Deno.errors.BadResource)) throw error;
  }
}
