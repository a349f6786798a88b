import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createSocket, type Socket } from "node:dgram";
import { once } from "node:events";
import { type AddressInfo, createServer } from "node:net";
import { setTimeout as wait } from "node:timers/promises";
import { formatIpv4, parseIpv4 } from "../../dsl/mod.ts";
import { libc, Tap } from "../../ffi/mod.ts";
import { testInNetworkNamespace } from "../../ffi/network_namespace.ts";
import { NET_HEADER_SIZE, NetworkInterfaces } from "../../ffi/tap.ts";
import { MachineError } from "../errors.ts";
import { openUdp, type PortForward } from "./forward.ts";
import {
  ARP_OPERATION,
  type ArpPacket,
  BROADCAST_MAC,
  buildArp,
  buildIcmp,
  buildTcp,
  buildUdp,
  checksum,
  ETHER_TYPE,
  ICMP_TYPE,
  ICMP_UNREACHABLE,
  type IcmpMessage,
  IP_PROTOCOL,
  type Ipv4Packet,
  MTU,
  type PacketAddresses,
  parseArp,
  parseEthernet,
  parseIcmp,
  parseIpv4Packet,
  parseMac,
  parseTcp,
  parseUdp,
  TCP_FLAG,
  type TcpSegment,
  type UdpDatagram,
} from "./frame.ts";
import { UserNat, type UserNatOptions } from "./user_nat.ts";
import { type Clock, systemClock } from "./user_tcp.ts";

const HOST = "127.0.0.1";
const GATEWAY = "10.20.0.1";
const DNS = "10.20.0.2";
const CIDR = "10.20.0.0/24";
/** An address of the outside: the NAT under test is told that the host reaches it by its loopback. */
const OUTSIDE = "198.51.100.7";
const SYN_ACK = TCP_FLAG.SYN | TCP_FLAG.ACK;
const EMPTY = new Uint8Array(0);

/** A clock that runs faster, so that what waits does not take long. */
const fastClock: Clock = {
  now: () => systemClock.now() * 20,
  after: (delay, call) => systemClock.after(delay / 20, call),
};

function randomizer(seed: number): (end: number) => number {
  return (end) => {
    seed = (seed + 0x6d2b_79f5) | 0;
    let mixed = Math.imul(seed ^ seed >>> 15, 1 | seed);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) % end;
  };
}

/** How a cable is; counts are of each hundred frames. */
interface Losses {
  readonly lost?: number;
  readonly doubled?: number;
  readonly late?: number;
  /** How many frames it takes in a turn; any number unless told. */
  readonly room?: number;
}

/** One way of a cable. Frames arrive in a later turn; some never, twice, or behind others. */
class Cable {
  readonly #random: (end: number) => number;
  readonly #losses: Losses;
  readonly #deliver: (frame: Uint8Array) => void;
  #queue: Uint8Array[] = [];
  #late: Uint8Array[] = [];
  #isBusy = false;

  constructor(deliver: (frame: Uint8Array) => void, losses: Losses, seed: number) {
    this.#deliver = deliver;
    this.#losses = losses;
    this.#random = randomizer(seed);
  }

  send(frame: Uint8Array): boolean {
    const { lost = 0, doubled = 0, late = 0, room = Infinity } = this.#losses;
    if (this.#queue.length >= room) return false;
    if (this.#random(100) < lost) return true;
    if (this.#random(100) < doubled) this.#queue.push(frame.slice());
    (this.#random(100) < late ? this.#late : this.#queue).push(frame.slice());
    if (this.#isBusy) return true;
    this.#isBusy = true;
    setTimeout(() => {
      this.#isBusy = false;
      const frames = [...this.#queue, ...this.#late];
      this.#queue = [];
      this.#late = [];
      for (const each of frames) {
        this.#deliver(each);
        // What was lent is used for something else.
        each.fill(0xee);
      }
    }, 0);
    return true;
  }
}

interface Answer extends Ipv4Packet {
  readonly icmp: IcmpMessage | undefined;
  readonly udp: UdpDatagram | undefined;
  readonly tcp: TcpSegment | undefined;
}

/** A guest, as far as its cable tells. */
class Guest {
  readonly mac = parseMac("02:00:00:00:00:10");
  readonly ip = parseIpv4("10.20.0.10");
  readonly nat: UserNat;
  readonly #up: Cable;
  readonly #connections = new Map<string, GuestTcp>();
  readonly #listeners = new Map<number, (connection: GuestTcp) => void>();
  #waiting: { readonly fits: (answer: Answer) => boolean; readonly resolve: (answer: Answer) => void }[] = [];
  #arps: ((packet: ArpPacket) => void)[] = [];
  #nextPort = 40_000;
  isDeaf = false;

  constructor(options: Partial<UserNatOptions> = {}, losses: Losses = {}, seed = 1) {
    const down = new Cable((frame) => this.#receive(frame), losses, seed);
    this.nat = new UserNat({
      gateway: GATEWAY,
      dns: DNS,
      cidr: CIDR,
      isNatOpen: true,
      reach: (address) => address === OUTSIDE ? HOST : undefined,
      clock: fastClock,
      send: (frame) => down.send(frame),
      ...options,
    });
    this.#up = new Cable((frame) => this.nat.receive(frame), losses, seed + 1);
  }

  addresses(destination: string): PacketAddresses {
    return {
      sourceMac: this.mac,
      destinationMac: parseMac(this.nat.mac),
      source: this.ip,
      destination: parseIpv4(destination),
    };
  }

  send(frame: Uint8Array): void {
    this.#up.send(frame);
  }

  /** Begins a connection that goes no further. */
  sendSyn(to: string, sourcePort: number, destinationPort: number): void {
    this.send(buildTcp(this.addresses(to), {
      sourcePort,
      destinationPort,
      sequence: 0,
      acknowledgment: 0,
      flags: TCP_FLAG.SYN,
      window: 1000,
      payload: EMPTY,
    }));
  }

  /** Waits for a packet that no connection takes. */
  hear(fits: (answer: Answer) => boolean): Promise<Answer> {
    return new Promise((resolve) => this.#waiting.push({ fits, resolve }));
  }

  async arp(targetIp: string, senderIp = this.ip): Promise<ArpPacket> {
    const heard = new Promise<ArpPacket>((resolve) => this.#arps.push(resolve));
    this.send(buildArp(BROADCAST_MAC, {
      operation: ARP_OPERATION.REQUEST,
      senderMac: this.mac,
      senderIp,
      targetMac: 0,
      targetIp: parseIpv4(targetIp),
    }));
    return await heard;
  }

  async udp(to: string, sourcePort: number, destinationPort: number, payload: Uint8Array): Promise<Answer> {
    const heard = this.hear(({ udp, icmp }) =>
      udp?.destinationPort === sourcePort || icmp?.type === ICMP_TYPE.UNREACHABLE
    );
    this.send(buildUdp(this.addresses(to), { sourcePort, destinationPort, payload }));
    return await heard;
  }

  connect(to: string, port: number, options: GuestTcpOptions = {}): GuestTcp {
    const connection = new GuestTcp(this, to, this.#nextPort++, port, options);
    this.#connections.set(connection.key, connection);
    connection.begin();
    return connection;
  }

  listen(port: number, onConnection: (connection: GuestTcp) => void): void {
    this.#listeners.set(port, onConnection);
  }

  #receive(bytes: Uint8Array): void {
    if (this.isDeaf) return;
    const frame = parseEthernet(bytes)!;
    if (frame.type === ETHER_TYPE.ARP) return this.#receiveArp(parseArp(frame.payload)!);
    assert.equal(frame.destination, this.mac);
    const packet = parseIpv4Packet(frame.payload);
    assert.ok(packet, "a packet that the NAT sent is in order");
    assert.equal(packet.destination, this.ip);
    const icmp = packet.protocol === IP_PROTOCOL.ICMP ? parseIcmp(packet) : undefined;
    const udp = packet.protocol === IP_PROTOCOL.UDP ? parseUdp(packet) : undefined;
    const tcp = packet.protocol === IP_PROTOCOL.TCP ? parseTcp(packet) : undefined;
    assert.ok(icmp ?? udp ?? tcp, "what a packet of the NAT carries is in order");
    if (tcp) {
      const key = `${packet.source} ${tcp.sourcePort} ${tcp.destinationPort}`;
      const listener = this.#listeners.get(tcp.destinationPort);
      if (!this.#connections.has(key) && tcp.flags === TCP_FLAG.SYN && listener) {
        const from = formatIpv4(packet.source);
        const connection = new GuestTcp(this, from, tcp.destinationPort, tcp.sourcePort, {});
        this.#connections.set(key, connection);
        listener(connection);
      }
      const connection = this.#connections.get(key);
      if (connection) return connection.receive(tcp);
    }
    // The bytes are used for something else soon.
    const answer = structuredClone({ ...packet, icmp, udp, tcp });
    const found = this.#waiting.find(({ fits }) => fits(answer));
    this.#waiting = this.#waiting.filter((each) => each !== found);
    found?.resolve(answer);
  }

  #receiveArp(packet: ArpPacket): void {
    if (packet.operation === ARP_OPERATION.REPLY) return this.#arps.shift()?.(packet);
    if (packet.targetIp !== this.ip) return;
    this.send(buildArp(packet.senderMac, {
      operation: ARP_OPERATION.REPLY,
      senderMac: this.mac,
      senderIp: this.ip,
      targetMac: packet.senderMac,
      targetIp: packet.senderIp,
    }));
  }
}

interface GuestTcpOptions {
  /** Room for what is received, in bytes. */
  readonly room?: number;
  readonly mss?: number;
  /** Takes nothing out of the room until this resolves. */
  readonly pause?: Promise<unknown>;
}

/** The guest's end of a connection: it sends all again when nothing is acknowledged, and drops what comes out of order. */
class GuestTcp {
  readonly key: string;
  /** All that was heard, once the other end has ended. */
  readonly heard: Promise<Uint8Array>;
  readonly opened: Promise<void>;
  readonly #guest: Guest;
  readonly #addresses: PacketAddresses;
  readonly #ports: { readonly sourcePort: number; readonly destinationPort: number };
  readonly #options: GuestTcpOptions;
  readonly #sequence = 0xffff_fff0;
  readonly #end = Promise.withResolvers<Uint8Array>();
  readonly #open = Promise.withResolvers<void>();
  #state: "closed" | "opening" | "open" = "closed";
  #data: Uint8Array = EMPTY;
  #isEnding = false;
  #acknowledged = 0;
  #next = 0;
  #window = 0;
  #expected = 0;
  #taken: Uint8Array[] = [];
  #held = 0;
  #isPaused: boolean;
  #isOver = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #last = -1;

  constructor(
    guest: Guest,
    to: string,
    sourcePort: number,
    destinationPort: number,
    options: GuestTcpOptions,
  ) {
    this.#guest = guest;
    this.#addresses = guest.addresses(to);
    this.#ports = { sourcePort, destinationPort };
    this.#options = options;
    this.key = `${this.#addresses.destination} ${destinationPort} ${sourcePort}`;
    this.heard = this.#end.promise;
    this.opened = this.#open.promise;
    this.heard.catch(() => {});
    this.opened.catch(() => {});
    this.#isPaused = options.pause !== undefined;
    options.pause?.then(() => {
      this.#isPaused = false;
      this.#held = 0;
      this.#acknowledge();
    });
  }

  get #room(): number {
    return (this.#options.room ?? 65_535) - this.#held;
  }

  begin(): void {
    this.#state = "opening";
    this.#send(TCP_FLAG.SYN, -1);
    this.#tick();
  }

  /** Sends, and with that the end if told so. */
  write(data: Uint8Array, isEnd = true): this {
    this.#data = data;
    this.#isEnding = isEnd;
    if (this.#state === "open") this.#push();
    return this;
  }

  reset(): void {
    this.#send(TCP_FLAG.RST | TCP_FLAG.ACK, this.#next);
    this.#fail("reset by the guest");
  }

  receive(segment: TcpSegment): void {
    if (this.#isOver) {
      // It is remembered, in case that the last acknowledgment was lost.
      if (segment.payload.length > 0 || segment.flags & TCP_FLAG.FIN) this.#acknowledge();
      return;
    }
    if (segment.flags & TCP_FLAG.RST) return this.#fail("reset");
    if (segment.flags & TCP_FLAG.SYN) {
      assert.equal(segment.mss, 1460);
      this.#expected = segment.sequence + 1 >>> 0;
      this.#window = segment.window;
      if (segment.flags === SYN_ACK) this.#established();
      else {
        this.#state = "opening";
        this.#send(SYN_ACK, -1);
      }
      this.#tick();
      return;
    }
    if (this.#state === "opening") this.#established();
    const sent = segment.acknowledgment - this.#sequence - 1 | 0;
    if (sent >= this.#acknowledged) {
      this.#acknowledged = sent;
      this.#next = Math.max(this.#next, sent);
      this.#window = segment.window;
    }
    const offset = segment.sequence - this.#expected | 0;
    assert.ok(segment.payload.length <= (this.#options.mss ?? 1460));
    if (segment.payload.length > 0 || segment.flags & TCP_FLAG.FIN) {
      if (offset === 0 && segment.payload.length <= this.#room) this.#take(segment);
      else assert.ok(offset <= 65_535, "within the window");
      this.#acknowledge();
    }
    this.#push();
  }

  #take({ payload, flags }: TcpSegment): void {
    this.#taken.push(payload.slice());
    if (this.#isPaused) this.#held += payload.length;
    this.#expected = this.#expected + payload.length >>> 0;
    if (!(flags & TCP_FLAG.FIN)) return;
    this.#expected = this.#expected + 1 >>> 0;
    this.#end.resolve(new Uint8Array(Buffer.concat(this.#taken)));
  }

  #established(): void {
    this.#state = "open";
    this.#acknowledge();
    this.#open.resolve();
    this.#push();
  }

  #push(): void {
    const all = this.#data.length + (this.#isEnding ? 1 : 0);
    while (this.#next < all) {
      const allowed = this.#acknowledged + this.#window - this.#next;
      const payload = this.#data.subarray(this.#next, this.#next + Math.min(1460, allowed));
      const isEnd = this.#next + payload.length === this.#data.length && this.#isEnding;
      if (payload.length === 0 && !isEnd || allowed <= 0) break;
      this.#send(isEnd ? TCP_FLAG.ACK | TCP_FLAG.FIN : TCP_FLAG.ACK, this.#next, payload);
      this.#next += payload.length + (isEnd ? 1 : 0);
    }
    if (this.#isEnding && this.#acknowledged === all) {
      this.heard.then(() => this.#finish(), () => {});
    }
  }

  #tick(): void {
    clearTimeout(this.#timer);
    if (this.#isOver) return;
    this.#timer = setTimeout(() => {
      if (this.#state === "opening") {
        this.#send(this.#expected ? SYN_ACK : TCP_FLAG.SYN, -1);
      } else if (this.#last === this.#acknowledged && this.#next > this.#acknowledged) {
        this.#next = this.#acknowledged;
        this.#push();
      } else if (this.#window === 0 && this.#next < this.#data.length) {
        this.#send(TCP_FLAG.ACK, this.#next, this.#data.subarray(this.#next, this.#next + 1));
      }
      this.#last = this.#acknowledged;
      this.#tick();
    }, 20);
  }

  #acknowledge(): void {
    this.#send(TCP_FLAG.ACK, this.#next);
  }

  #send(flags: number, at: number, payload: Uint8Array = EMPTY): void {
    const isSyn = (flags & TCP_FLAG.SYN) !== 0;
    this.#guest.send(buildTcp(this.#addresses, {
      ...this.#ports,
      sequence: this.#sequence + 1 + at >>> 0,
      acknowledgment: this.#expected,
      flags,
      window: this.#room,
      mss: isSyn ? this.#options.mss ?? 1460 : undefined,
      payload,
    }));
  }

  #finish(): void {
    this.#isOver = true;
    clearTimeout(this.#timer);
  }

  #fail(reason: string): void {
    this.#finish();
    this.#open.reject(new Error(reason));
    this.#end.reject(new Error(reason));
  }
}

function bytes(size: number, seed = 7): Uint8Array {
  return Uint8Array.from({ length: size }, (_, index) => index * seed + (index >> 8) + (index >> 16));
}

const text = (words: string) => new TextEncoder().encode(words);

function assertSame(found: Uint8Array, wanted: Uint8Array): void {
  assert.equal(found.length, wanted.length);
  const at = found.findIndex((byte, index) => byte !== wanted[index]);
  assert.equal(at, -1, `byte ${at} differs`);
}

/** A server of the host. */
function serve(answer: (connection: Deno.TcpConn) => Promise<void>): Deno.TcpListener {
  const listener = Deno.listen({ hostname: HOST, port: 0 });
  (async () => {
    for await (const connection of listener) {
      answer(connection).catch(() => {}).finally(() => {
        try {
          connection.close();
        } catch {
          // It has closed it.
        }
      });
    }
  })();
  return listener;
}

async function readAll(connection: Deno.TcpConn): Promise<Uint8Array> {
  const heard: Uint8Array[] = [];
  const buffer = new Uint8Array(65_536);
  for (let count; (count = await connection.read(buffer)) !== null;) heard.push(buffer.slice(0, count));
  return new Uint8Array(Buffer.concat(heard));
}

async function writeAll(connection: Deno.TcpConn, data: Uint8Array): Promise<void> {
  for (let at = 0; at < data.length;) at += await connection.write(data.subarray(at));
}

/** Answers with what it heard, once it has heard all. */
async function echo(connection: Deno.TcpConn): Promise<void> {
  await writeAll(connection, await readAll(connection));
}

async function udpServer(answer: (data: Uint8Array, port: number, socket: Socket) => void): Promise<Socket> {
  const socket = createSocket("udp4");
  socket.on("message", (data, { port }) => answer(data, port, socket));
  socket.bind(0, HOST);
  await once(socket, "listening");
  return socket;
}

async function until(isDone: () => boolean): Promise<void> {
  while (!isDone()) await wait(1);
}

function freePort(): number {
  using listener = Deno.listen({ hostname: HOST, port: 0 });
  return listener.addr.port;
}

function forward(host: number, guest: number, more: Partial<PortForward> = {}): PortForward {
  return { protocol: "tcp", address: HOST, host, guest, guestIp: "10.20.0.10", ...more };
}

function userTests(): void {
  Deno.test("the gateway answers for its two addresses, and only for them", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    for (const address of [GATEWAY, DNS]) {
      const { senderMac, senderIp } = await guest.arp(address);
      assert.deepEqual([senderMac, senderIp], [parseMac(nat.mac), parseIpv4(address)]);
    }
    // Who is not there yet asks as nobody.
    assert.equal((await guest.arp(GATEWAY, 0)).targetIp, 0);
    const payload = bytes(56);
    const ping = (to: string) => {
      const heard = guest.hear(({ icmp }) => icmp !== undefined);
      guest.send(
        buildIcmp(guest.addresses(to), { type: ICMP_TYPE.ECHO_REQUEST, code: 0, rest: 0x1234_0001, payload }),
      );
      return heard;
    };
    const { icmp, source } = await ping(GATEWAY);
    assert.deepEqual([icmp!.type, icmp!.rest, source], [
      ICMP_TYPE.ECHO_REPLY,
      0x1234_0001,
      parseIpv4(GATEWAY),
    ]);
    assertSame(icmp!.payload, payload);
    assert.equal((await ping(OUTSIDE)).icmp!.code, ICMP_UNREACHABLE.PROHIBITED);
    assert.deepEqual(nat.status, { connections: 0, flows: 0, neighbors: 1 });
  });

  for (
    const [name, losses] of [
      ["a good", {}],
      ["a late", { late: 20, doubled: 5 }],
      ["a narrow", { room: 7, lost: 1 }],
      ["a bad", { lost: 4, late: 10, doubled: 3 }],
    ] as const
  ) {
    Deno.test(`a million bytes pass both ways on ${name} cable`, async () => {
      const guest = new Guest({}, losses, 5);
      await using nat = guest.nat;
      const data = bytes(1_000_000);
      using server = serve(async (connection) => {
        const [heard] = await Promise.all([readAll(connection), writeAll(connection, data.toReversed())]);
        await writeAll(connection, text(`heard ${heard.length} `));
        assertSame(heard, data);
        await writeAll(connection, text("rightly"));
      });
      const heard = await guest.connect(OUTSIDE, server.addr.port).write(data).heard;
      assertSame(heard.subarray(0, data.length), data.toReversed());
      assert.equal(new TextDecoder().decode(heard.subarray(data.length)), "heard 1000000 rightly");
      await until(() => nat.status.connections === 0);
    });
  }

  Deno.test("many connections of a guest keep apart", async () => {
    const guest = new Guest({}, { lost: 1, late: 5 }, 9);
    await using nat = guest.nat;
    using server = serve(echo);
    const all = Array.from({ length: 50 }, (_, index) => bytes(20_000, index));
    const heard = await Promise.all(
      all.map((data) => guest.connect(OUTSIDE, server.addr.port).write(data).heard),
    );
    for (const [index, data] of all.entries()) assertSame(heard[index]!, data);
    assert.ok(nat.status.connections <= 50);
  });

  Deno.test("a guest that takes nothing stops the server, and goes on when it does", async () => {
    const guest = new Guest();
    await using _nat = guest.nat;
    const data = bytes(8_000_000);
    let written = 0;
    using server = serve(async (connection) => {
      while (written < data.length) written += await connection.write(data.subarray(written));
    });
    const pause = Promise.withResolvers<void>();
    const connection = guest.connect(OUTSIDE, server.addr.port, {
      room: 30_000,
      mss: 900,
      pause: pause.promise,
    });
    await connection.opened;
    // Until it stands still: sockets of the host hold some.
    for (let last = -1; last !== written; await wait(100)) last = written;
    assert.ok(written < data.length, String(written));
    pause.resolve();
    assertSame(await connection.heard, data);
  });

  Deno.test("a server that takes nothing stops the guest, and goes on when it does", async () => {
    const guest = new Guest();
    await using _nat = guest.nat;
    const data = bytes(8_000_000);
    const pause = Promise.withResolvers<void>();
    using server = serve(async (connection) => {
      await pause.promise;
      await echo(connection);
    });
    const connection = guest.connect(OUTSIDE, server.addr.port).write(data);
    await connection.opened;
    await wait(200);
    pause.resolve();
    assertSame(await connection.heard, data);
  });

  Deno.test("each end may end first, and the other one go on", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    using server = serve(async (connection) => {
      await writeAll(connection, text("first"));
      await connection.closeWrite();
      assertSame(await readAll(connection), text("then"));
      ended.resolve();
    });
    const ended = Promise.withResolvers<void>();
    const connection = guest.connect(OUTSIDE, server.addr.port);
    assertSame(await connection.heard, text("first"));
    connection.write(text("then"));
    await ended.promise;
    // It is remembered for a while, and the same ports can be used at once.
    assert.equal(nat.status.connections, 1);
    using other = serve(echo);
    assertSame(await guest.connect(OUTSIDE, other.addr.port).write(text("next")).heard, text("next"));
  });

  Deno.test("a reset passes both ways", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    const ended = Promise.withResolvers<unknown>();
    using server = serve(async (connection) => {
      ended.resolve(await readAll(connection).catch((error) => error));
    });
    const one = guest.connect(OUTSIDE, server.addr.port).write(text("unfinished"), false);
    await one.opened;
    one.reset();
    await ended.promise;
    await until(() => nat.status.connections === 0);
    const rude = createServer((socket) => {
      socket.once("data", () => socket.resetAndDestroy()).on("error", () => {});
    });
    rude.listen(0, HOST);
    await once(rude, "listening");
    const { port } = rude.address() as AddressInfo;
    const two = guest.connect(OUTSIDE, port).write(text("more"), false);
    await assert.rejects(two.heard, /reset/);
    assert.equal(nat.status.connections, 0);
    rude.close();
  });

  Deno.test("a refused port resets, and what is no connection does", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    await assert.rejects(guest.connect(OUTSIDE, freePort()).opened, /reset/);
    await assert.rejects(guest.connect(GATEWAY, 22).opened, /reset/);
    await assert.rejects(guest.connect(DNS, 80).opened, /reset/);
    await assert.rejects(guest.connect(OUTSIDE, 0).opened, /reset/);
    const stray = {
      sourcePort: 1,
      destinationPort: 2,
      sequence: 3,
      acknowledgment: 77,
      flags: TCP_FLAG.ACK,
      window: 0,
      payload: EMPTY,
    };
    const heard = guest.hear(({ tcp }) => tcp !== undefined);
    guest.send(buildTcp(guest.addresses(OUTSIDE), stray));
    const { tcp } = await heard;
    assert.deepEqual([tcp!.flags, tcp!.sequence], [TCP_FLAG.RST, 77]);
    assert.deepEqual([nat.status.connections, nat.status.flows], [0, 0]);
  });

  Deno.test("no guest reaches the host's loopback, links, groups or its own network through the NAT", async () => {
    let asked = 0;
    const guest = new Guest({ reach: () => (asked++, HOST) });
    await using nat = guest.nat;
    using server = serve(echo);
    const { port } = server.addr;
    const targets = [
      "127.0.0.1",
      "127.9.9.9",
      "0.0.0.0",
      "0.0.0.1",
      "169.254.169.254",
      "10.20.0.99",
      "10.20.0.255",
    ];
    for (const address of [...targets, "224.0.0.1", "255.255.255.255"]) {
      const heard = guest.hear(() => true);
      guest.sendSyn(address, 5000, port);
      const { icmp, source } = await heard;
      assert.deepEqual(
        [icmp?.type, icmp?.code],
        [ICMP_TYPE.UNREACHABLE, ICMP_UNREACHABLE.PROHIBITED],
        address,
      );
      assert.equal(source, parseIpv4(GATEWAY));
      // It tells which packet it is about.
      assert.equal(
        parseIpv4(address),
        new DataView(icmp!.payload.buffer).getUint32(icmp!.payload.byteOffset + 16),
      );
    }
    for (const address of targets) {
      assert.equal(
        (await guest.udp(address, 5000, port, EMPTY)).icmp?.code,
        ICMP_UNREACHABLE.PROHIBITED,
        address,
      );
    }
    assert.equal((await guest.udp(GATEWAY, 5000, 53, EMPTY)).icmp?.code, ICMP_UNREACHABLE.PORT);
    assert.equal((await guest.udp(OUTSIDE, 5000, 0, EMPTY)).icmp?.code, ICMP_UNREACHABLE.PORT);
    assert.deepEqual([asked, nat.status.connections, nat.status.flows], [0, 0, 0]);
  });

  Deno.test("a closed network has names and forwards, and nothing else", async () => {
    const names = await udpServer((data, port, socket) => socket.send(`${data} is known`, port, HOST));
    const guest = new Guest({
      isNatOpen: false,
      resolver: () => ({ hostname: HOST, port: names.address().port }),
    });
    await using nat = guest.nat;
    const heard = guest.hear(({ icmp }) => icmp !== undefined);
    guest.sendSyn(OUTSIDE, 5000, 80);
    assert.equal((await heard).icmp!.code, ICMP_UNREACHABLE.PROHIBITED);
    assert.equal((await guest.udp(OUTSIDE, 5000, 53, EMPTY)).icmp?.code, ICMP_UNREACHABLE.PROHIBITED);
    assertSame((await guest.udp(DNS, 5000, 53, text("a"))).udp!.payload, text("a is known"));
    const port = freePort();
    await nat.setForwards("one", [forward(port, 80)]);
    guest.listen(80, (connection) => connection.write(text("served")));
    const client = await Deno.connect({ hostname: HOST, port });
    assertSame(await readAll(client), text("served"));
    client.close();
    names.close();
  });

  Deno.test("names are asked by UDP and TCP, and large answers come in fragments", async () => {
    const large = bytes(4000);
    const names = await udpServer((data, port, socket) => {
      socket.send(String(data) === "large" ? large : `${data} by udp`, port, HOST);
    });
    using tcp = serve(echo);
    let resolver = names.address().port;
    const guest = new Guest({ resolver: () => ({ hostname: HOST, port: resolver }) });
    await using nat = guest.nat;
    const answer = await guest.udp(DNS, 6000, 53, text("a"));
    assertSame(answer.udp!.payload, text("a by udp"));
    assert.deepEqual([answer.source, answer.udp!.sourcePort], [parseIpv4(DNS), 53]);
    const frames: Uint8Array[] = [];
    const sending = new UserNat({
      gateway: GATEWAY,
      dns: DNS,
      cidr: CIDR,
      isNatOpen: false,
      send: (frame) => void frames.push(frame),
      resolver: () => ({ hostname: HOST, port: resolver }),
    });
    sending.receive(
      buildUdp(guest.addresses(DNS), { sourcePort: 9, destinationPort: 53, payload: text("large") }),
    );
    await until(() => frames.length === 3);
    assertSame(Buffer.concat(frames.map((frame) => frame.subarray(34))).subarray(8), large);
    await sending[Symbol.asyncDispose]();
    resolver = tcp.addr.port;
    assertSame(await guest.connect(DNS, 53).write(text("by tcp")).heard, text("by tcp"));
    names.close();
    // A port that only asked for a name is soon given back.
    await until(() => nat.status.flows === 0);
  });

  Deno.test("a name server answers by whichever way its address is written", async () => {
    const names = openUdp("::1");
    names.on("message", (data, { port, address }) => names.send(`${data} is known`, port, address));
    names.bind(0, "::1");
    await once(names, "listening");
    let hostname = "";
    const guest = new Guest({ resolver: () => ({ hostname, port: names.address().port }) });
    await using _nat = guest.nat;
    for (hostname of ["0:0:0:0:0:0:0:1", "::0001", "::1%1"]) {
      assertSame((await guest.udp(DNS, 6000, 53, text("a"))).udp!.payload, text("a is known"));
    }
    names.close();
  });

  Deno.test("a guest that opens more UDP ports at once than it may still has names", async () => {
    const names = await udpServer((data, port, socket) => socket.send(data, port, HOST));
    const guest = new Guest({ resolver: () => ({ hostname: HOST, port: names.address().port }) });
    await using nat = guest.nat;
    for (let sourcePort = 10_000; sourcePort < 10_800; sourcePort++) {
      nat.receive(
        buildUdp(guest.addresses(OUTSIDE), { sourcePort, destinationPort: 9, payload: text("x") }),
      );
    }
    // Sockets that made way are closed by then.
    await wait(0);
    nat.release("10.20.0.10");
    await until(() => nat.status.flows === 0);
    assertSame((await guest.udp(DNS, 6000, 53, text("a"))).udp!.payload, text("a"));
    names.close();
  });

  Deno.test("a guest's UDP port is one port of the host, and hears only whom it spoke to", async () => {
    const seen: number[] = [];
    const answer = (data: Uint8Array, port: number, socket: Socket) => {
      seen.push(port);
      socket.send(`${data} answered`, port, HOST);
    };
    const [one, two] = await Promise.all([udpServer(answer), udpServer(answer)]);
    const guest = new Guest();
    await using nat = guest.nat;
    const packets: Answer[] = [];
    for (const server of [one, two]) {
      packets.push(await guest.udp(OUTSIDE, 7000, server.address().port, text("hello")));
      assertSame(packets.at(-1)!.udp!.payload, text("hello answered"));
    }
    assert.equal(seen[0], seen[1]);
    assert.deepEqual(packets.map(({ udp }) => udp!.sourcePort), [one.address().port, two.address().port]);
    const stranger = createSocket("udp4");
    stranger.send("forged", seen[0]!, HOST);
    await wait(20);
    assertSame(
      (await guest.udp(OUTSIDE, 7000, one.address().port, text("again"))).udp!.payload,
      text("again answered"),
    );
    assert.equal(nat.status.flows, 1);
    const other = await guest.udp(OUTSIDE, 7001, one.address().port, text("other"));
    assertSame(other.udp!.payload, text("other answered"));
    assert.notEqual(seen.at(-1), seen[0]);
    nat.release("10.20.0.10");
    assert.equal(nat.status.flows, 0);
    for (const socket of [one, two, stranger]) socket.close();
  });

  Deno.test("a guest has as many UDP ports as it may, and the oldest make way", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    const server = await udpServer((data, port, socket) => socket.send(data, port, HOST));
    const { port } = server.address();
    for (let index = 0; index < 600; index++) {
      const data = text(String(index));
      assertSame((await guest.udp(OUTSIDE, 10_000 + index, port, data)).udp!.payload, data);
    }
    assertSame((await guest.udp(OUTSIDE, 10_599, port, text("last"))).udp!.payload, text("last"));
    assert.equal(nat.status.flows, 512);
    server.close();
  });

  Deno.test("TCP forwards lead to the guest, both ways, whatever the cable", async () => {
    const guest = new Guest({}, { lost: 3, late: 10 }, 3);
    await using nat = guest.nat;
    const port = freePort();
    await nat.setForwards("one", [forward(port, 80)]);
    const data = bytes(300_000);
    guest.listen(80, (connection) => {
      assert.ok(connection.key.startsWith(`${parseIpv4(GATEWAY)} `));
      connection.heard.then((heard) => connection.write(heard.toReversed()));
    });
    const talk = async () => {
      const client = await Deno.connect({ hostname: HOST, port });
      await writeAll(client, data);
      await client.closeWrite();
      assertSame(await readAll(client), data.toReversed());
      client.close();
    };
    await Promise.all([talk(), talk(), talk()]);
    // A guest that does not listen, and a forward that ends.
    const other = freePort();
    await nat.setForwards("one", [forward(other, 81)]);
    await assert.rejects(Deno.connect({ hostname: HOST, port }), Deno.errors.ConnectionRefused);
    const client = await Deno.connect({ hostname: HOST, port: other });
    const end = readAll(client).catch(() => EMPTY);
    const heard = await guest.hear(({ tcp }) => tcp?.flags === TCP_FLAG.SYN);
    guest.send(buildTcp(guest.addresses(GATEWAY), {
      sourcePort: 81,
      destinationPort: heard.tcp!.sourcePort,
      sequence: 0,
      acknowledgment: heard.tcp!.sequence + 1 >>> 0,
      flags: TCP_FLAG.RST | TCP_FLAG.ACK,
      window: 0,
      payload: EMPTY,
    }));
    await Promise.race([end, nat.setForwards("one", [])]);
    assert.equal((await end).length, 0);
    client.close();
  });

  Deno.test("a client of a guest that never answers hears the end", async () => {
    const guest = new Guest();
    guest.isDeaf = true;
    await using nat = guest.nat;
    const port = freePort();
    await nat.setForwards("one", [forward(port, 80)]);
    const client = await Deno.connect({ hostname: HOST, port });
    assert.equal((await readAll(client).catch(() => EMPTY)).length, 0);
    client.close();
    assert.equal(nat.status.connections, 0);
  });

  Deno.test("UDP forwards keep their clients apart, and take answers of the guest only", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    await guest.arp(GATEWAY);
    const port = freePort();
    await nat.setForwards("one", [forward(port, 500, { protocol: "udp" })]);
    const clients = [createSocket("udp4"), createSocket("udp4")] as const;
    const calls: Answer[] = [];
    for (const [index, client] of clients.entries()) {
      const heard = guest.hear(({ udp }) => udp !== undefined);
      client.send(`call ${index}`, port, HOST);
      calls.push(await heard);
    }
    assert.deepEqual(calls.map(({ udp }) => new TextDecoder().decode(udp!.payload)), ["call 0", "call 1"]);
    assert.ok(
      calls.every(({ source, udp }) => source === parseIpv4(GATEWAY) && udp!.destinationPort === 500),
    );
    assert.notEqual(calls[0]!.udp!.sourcePort, calls[1]!.udp!.sourcePort);
    const heard = clients.map((client) => once(client, "message"));
    for (const index of [1, 0]) {
      const { sourcePort } = calls[index]!.udp!;
      // Another port of the guest is not who was called.
      for (const [from, words] of [[501, "forged"], [500, `answer ${index}`]] as const) {
        guest.send(buildUdp(guest.addresses(GATEWAY), {
          sourcePort: from,
          destinationPort: sourcePort,
          payload: text(words),
        }));
      }
    }
    for (const [index, each] of heard.entries()) {
      const [data, from] = await each;
      assert.deepEqual([String(data), from.port], [`answer ${index}`, port]);
    }
    for (const client of clients) client.close();
  });

  Deno.test("a host port in use is named, for each protocol", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    using taken = Deno.listen({ hostname: HOST, port: 0 });
    const { port } = taken.addr;
    await assert.rejects(nat.setForwards("one", [forward(port, 80)]), (error) => {
      assert.ok(error instanceof MachineError);
      assert.match(
        error.message,
        new RegExp(
          `^Cannot forward port ${port} of 127.0.0.1 to port 80 .* is in use: choose another host port`,
        ),
      );
      return true;
    });
    const socket = await udpServer(() => {});
    await assert.rejects(
      nat.setForwards("two", [forward(socket.address().port, 80, { protocol: "udp" })]),
      /is in use: choose another host port/,
    );
    await assert.rejects(
      nat.setForwards("three", [forward(1024, 1, { address: "192.0.2.77" })]),
      /has no address 192.0.2.77/,
    );
    socket.close();
  });

  Deno.test("handshakes and connections of a guest are limited", async () => {
    const guest = new Guest();
    await using nat = guest.nat;
    using server = serve(echo);
    guest.isDeaf = true;
    for (let index = 0; index < 5000; index++) guest.sendSyn(OUTSIDE, 1 + index, server.addr.port);
    await until(() => nat.status.connections > 0);
    assert.equal(nat.status.connections, 128);
    nat.release("10.20.0.10");
    assert.equal(nat.status.connections, 0);
    guest.isDeaf = false;
    const open: GuestTcp[] = [];
    while (open.length < 1024) {
      const some = Array.from({ length: 64 }, () => guest.connect(OUTSIDE, server.addr.port));
      await Promise.all(some.map(({ opened }) => opened));
      open.push(...some);
    }
    assert.equal(nat.status.connections, 1024);
    await assert.rejects(guest.connect(OUTSIDE, server.addr.port).opened, /reset/);
    // One that is over makes way.
    assertSame(await open[0]!.write(text("one")).heard, text("one"));
    assertSame(await guest.connect(OUTSIDE, server.addr.port).write(text("more")).heard, text("more"));
  });

  Deno.test("hostile frames make it neither throw nor grow", async () => {
    const frames: Uint8Array[] = [];
    let sent = 0;
    using server = serve(echo);
    await using nat = new UserNat({
      gateway: GATEWAY,
      dns: DNS,
      cidr: "10.20.0.0/16",
      isNatOpen: true,
      send(frame) {
        sent++;
        assert.ok(frame.length <= MTU + 14);
        // Some of what it says is said back, changed.
        if (frames.length < 64) frames.push(frame);
        else frames[random(64)] = frame;
        return random(50) > 0;
      },
      reach: () => HOST,
      clock: fastClock,
      resolver: () => ({ hostname: HOST, port: server.addr.port }),
    });
    const random = randomizer(20);
    const { mac, ip } = new Guest();
    const ports = [server.addr.port, 53, 0, 1, 65_535];
    const pick = <T>(from: readonly T[]): T => from[random(from.length)]!;
    let round = 0;
    const make = (): Uint8Array => {
      const addresses = {
        sourceMac: pick([mac, mac, mac + 1, BROADCAST_MAC]),
        destinationMac: pick([parseMac(nat.mac), parseMac(nat.mac), parseMac(nat.mac), BROADCAST_MAC]),
        source: pick([ip, ip, ip, ip + random(65_536), 0]),
        destination: parseIpv4(pick([OUTSIDE, OUTSIDE, GATEWAY, DNS, "127.0.0.1", "224.0.0.1"])),
      };
      const payload = new Uint8Array(pick([0, 1, 8, 100, 1400]));
      const sourcePort = 1 + random(pick([4, 60_000]));
      switch (random(6)) {
        case 0:
          return buildArp(addresses.destinationMac, {
            operation: random(3),
            senderMac: addresses.sourceMac,
            senderIp: addresses.source,
            targetMac: 0,
            targetIp: addresses.destination,
          });
        case 1:
          return buildIcmp(addresses, { type: pick([0, 3, 8]), code: 0, rest: 0, payload });
        case 2:
          return buildUdp(addresses, { sourcePort, destinationPort: pick(ports), payload });
        default:
          return buildTcp(addresses, {
            sourcePort,
            destinationPort: pick(ports),
            sequence: random(100_000),
            acknowledgment: random(100_000),
            flags: pick([2, 2, 16, 17, 4, 20, 24, 18, 63, 0]),
            window: pick([0, 1, 65_535]),
            mss: pick([undefined, 0, 1, 1460, 65_535]),
            payload,
          });
      }
    };
    /** Says something that fits to what was heard. */
    const reply = (): Uint8Array | undefined => {
      const heard = frames.length > 0 ? parseEthernet(pick(frames)) : undefined;
      const packet = heard && parseIpv4Packet(heard.payload);
      const segment = packet && parseTcp(packet);
      if (!segment) return undefined;
      const size = segment.payload.length + (segment.flags & 3 ? 1 : 0);
      return buildTcp({
        sourceMac: heard.destination,
        destinationMac: heard.source,
        source: packet.destination,
        destination: packet.source,
      }, {
        sourcePort: segment.destinationPort,
        destinationPort: segment.sourcePort,
        sequence: segment.acknowledgment + pick([0, 0, 0, 1, -1, 5000, 65_535]) >>> 0,
        acknowledgment: segment.sequence + pick([size, size, size, 0, 1, -1]) >>> 0,
        flags: pick([16, 16, 16, 24, 17, 18, 2, 20]),
        window: pick([0, 1, 100, 65_535]),
        payload: new Uint8Array(pick([0, 0, 1, 1460])),
      });
    };
    for (; round < 240_000; round++) {
      const frame = (random(3) === 0 ? reply() : undefined) ?? make();
      if (random(4) === 0) {
        for (let count = 1 + random(3); count > 0; count--) frame[random(frame.length)] = random(256);
        // Only with sums that are right the rest is looked at.
        if (frame.length >= 34 && random(2)) {
          frame.fill(0, 24, 26);
          const sum = checksum(frame, 14, 20);
          frame.set([sum >> 8, sum & 255], 24);
        }
      }
      nat.receive(random(20) === 0 ? frame.subarray(0, random(frame.length)) : frame);
      if (round % 500 === 0) {
        await wait(0);
        const { connections, flows, neighbors } = nat.status;
        assert.ok(connections <= 4096 && flows <= 2048 && neighbors <= 4096);
      }
    }
    assert.ok(sent > 50_000, String(sent));
    // It still works.
    const guest = new Guest({ reach: () => HOST });
    await using _other = guest.nat;
    assertSame(await guest.connect(OUTSIDE, server.addr.port).write(text("alive")).heard, text("alive"));
  });
}

/** Linux's own TCP, on a tap, as the guest. */
function linuxTests(): void {
  Deno.test("Linux as a guest moves data both ways, with losses and without", async () => {
    using tap = Tap.open("guest0");
    using interfaces = new NetworkInterfaces();
    interfaces.setAddress(tap.name, "10.20.0.10", "255.255.255.0");
    interfaces.setUp(tap.name, true);
    // Linux has checksums left out that are not its business.
    tap.setOffload(0);
    const { success } = await new Deno.Command("ip", {
      args: ["route", "add", `${OUTSIDE}/32`, "via", GATEWAY],
    })
      .output();
    assert.ok(success);
    const random = randomizer(4);
    let lossRate = 0;
    const buffer = new Uint8Array(65_536);
    const pointer = Deno.UnsafePointer.of(buffer);
    await using nat = new UserNat({
      gateway: GATEWAY,
      dns: DNS,
      cidr: CIDR,
      isNatOpen: true,
      reach: () => HOST,
      send(frame) {
        if (random(100) < lossRate) return;
        const whole = Buffer.concat([new Uint8Array(NET_HEADER_SIZE), frame]);
        libc().write(tap.fd.number, Deno.UnsafePointer.of(whole), BigInt(whole.length));
      },
    });
    let isDone = false;
    const reading = (async () => {
      while (!isDone) {
        const count = Number(libc().read(tap.fd.number, pointer, 65_536n));
        if (count <= 0) await wait(0);
        else if (random(100) >= lossRate) nat.receive(buffer.subarray(NET_HEADER_SIZE, count));
      }
    })();
    const data = bytes(3_000_000);
    using server = serve(async (connection) => {
      const [heard] = await Promise.all([readAll(connection), writeAll(connection, data.toReversed())]);
      assertSame(heard, data);
      await writeAll(connection, text("rightly"));
    });
    for (lossRate of [0, 1]) {
      const connection = await Deno.connect({ hostname: OUTSIDE, port: server.addr.port });
      const sending = writeAll(connection, data).then(() => connection.closeWrite());
      const heard = await readAll(connection);
      await sending;
      connection.close();
      assertSame(heard, Buffer.concat([data.toReversed(), text("rightly")]));
    }
    lossRate = 0;
    await assert.rejects(
      Deno.connect({ hostname: OUTSIDE, port: freePort() }),
      Deno.errors.ConnectionRefused,
    );
    // Into the guest, which is this process as well.
    using service = Deno.listen({ hostname: "10.20.0.10", port: 0 });
    const port = freePort();
    await nat.setForwards("one", [forward(port, service.addr.port)]);
    const client = await Deno.connect({ hostname: HOST, port });
    const accepted = await service.accept();
    assert.equal(accepted.remoteAddr.hostname, GATEWAY);
    await Promise.all(
      [writeAll(client, data).then(() => client.closeWrite()), echo(accepted).then(() => accepted.close())]
        .concat(readAll(client).then((heard) => assertSame(heard, data))),
    );
    client.close();
    isDone = true;
    await reading;
  });
}

const isInside = testInNetworkNamespace(import.meta.url, "the NAT with Linux as a guest", linuxTests);
if (!isInside) userTests();
