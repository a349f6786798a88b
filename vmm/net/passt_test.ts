import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { join } from "node:path";
import { formatIpv4, parseIpv4 } from "../../dsl/mod.ts";
import {
  ARP_OPERATION,
  BROADCAST_MAC,
  buildArp,
  buildEthernet,
  buildIcmp,
  buildTcp,
  buildUdp,
  ETHER_TYPE,
  ICMP_TYPE,
  IP_PROTOCOL,
  parseArp,
  parseEthernet,
  parseIpv4Packet,
  parseMac,
  parseTcp,
  parseUdp,
  TCP_FLAG,
  type TcpSegment,
} from "./frame.ts";
import { FrameStream } from "./frame_stream.ts";
import { endAllPasst, endPasst, startPasst } from "./passt.ts";
import { UserNat } from "./user_nat.ts";
import { UserNetwork } from "./user_network.ts";
import { UserNetworkPort } from "./user_network_client.ts";
import type { NicForward } from "./user_network_protocol.ts";

const SPEC = { cidr: "10.20.0.0/24", gateway: "10.20.0.1", dns: "10.20.0.2", nat: true };
const IP = "10.20.0.10";
const MAC = parseMac("02:00:00:00:00:10");
const OUTSIDE = "198.51.100.7";
const EMPTY = new Uint8Array(0);
using nat = new UserNat({ ...SPEC, isNatOpen: true, send: () => {} });
const GATEWAY_MAC = parseMac(nat.mac);

/** Why passt cannot be tried here; it needs user namespaces, which not every root has. */
async function whyNot(): Promise<string | undefined> {
  const folder = await Deno.makeTempDir({ prefix: "ht-" });
  let reason = "passt is not installed";
  try {
    const report = (message: string) => void (reason = message);
    if (!(await startPasst(folder, { ...SPEC, ip: IP, forwards: [] }, { report }))) return reason;
    await endAllPasst(folder);
    return undefined;
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

const reason = await whyNot();

/** From the guest to an address. */
const outward = (destination: string) => ({
  sourceMac: MAC,
  destinationMac: GATEWAY_MAC,
  source: parseIpv4(IP),
  destination: parseIpv4(destination),
});
/** From an address to the guest, as passt has it, which may not know the guest yet. */
const inward = (source: string) => ({
  sourceMac: parseMac("52:00:00:00:00:01"),
  destinationMac: BROADCAST_MAC,
  source: parseIpv4(source),
  destination: parseIpv4(IP),
});
const datagram = (sourcePort: number, destinationPort: number, payload: Uint8Array = EMPTY) => ({
  ...{ sourcePort, destinationPort, payload },
});
const segment = (flags: number, more: Partial<TcpSegment> = {}): TcpSegment => ({
  ...{ sourcePort: 4000, destinationPort: 80, sequence: 1, acknowledgment: 0, flags, window: 65_535 },
  ...{ payload: EMPTY, ...more },
});

function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

const forward = (host: number, protocol: "tcp" | "udp" = "tcp", guest = 80): NicForward => ({
  ...{ protocol, address: "127.0.0.1", host, guest },
});

/** What comes in turn: it is kept until it is asked for. */
class Inbox {
  readonly #frames: Uint8Array[] = [];
  #wake = () => {};

  readonly put = (frame: Uint8Array): void => {
    this.#frames.push(frame.slice());
    this.#wake();
  };

  async next(): Promise<Uint8Array> {
    while (this.#frames.length === 0) await new Promise<void>((resolve) => this.#wake = resolve);
    return this.#frames.shift()!;
  }

  /** The next TCP or UDP that comes by IPv4, and its addresses. */
  async packet() {
    while (true) {
      const frame = parseEthernet(await this.next())!;
      const packet = frame.type === ETHER_TYPE.IPV4 ? parseIpv4Packet(frame.payload) : undefined;
      if (!packet) continue;
      const tcp = packet.protocol === IP_PROTOCOL.TCP ? parseTcp(packet) : undefined;
      const udp = packet.protocol === IP_PROTOCOL.UDP ? parseUdp(packet) : undefined;
      return { frame, source: formatIpv4(packet.source), tcp, udp };
    }
  }
}

/** Stands for passt: hears what goes outside. */
class FakePasst implements Disposable {
  readonly inbox: Inbox = new Inbox();
  readonly #listener: Deno.UnixListener;
  readonly #streams: FrameStream[] = [];

  constructor(folder: string) {
    Deno.mkdirSync(join(folder, "passt"), { recursive: true });
    this.#listener = Deno.listen({ transport: "unix", path: join(folder, "passt", "0a14000a") });
    void this.#serve();
  }

  send(frame: Uint8Array): void {
    this.#streams[0]!.send(frame);
  }

  [Symbol.dispose](): void {
    for (const stream of this.#streams) stream[Symbol.dispose]();
    try {
      this.#listener.close();
    } catch {
      // It was one-off.
    }
  }

  async #serve(): Promise<void> {
    const stream = new FrameStream(await this.#listener.accept());
    this.#streams.push(stream);
    await stream.receive(this.inbox.put);
    this[Symbol.dispose]();
  }
}

class Fixture implements AsyncDisposable {
  readonly folder: string = Deno.makeTempDirSync();
  readonly messages: string[] = [];
  #network: UserNetwork | undefined;

  get network(): UserNetwork {
    const note = (message: string) => void this.messages.push(message);
    return this.#network ??= new UserNetwork({
      folder: this.folder,
      spec: SPEC,
      log: { info: note, warn: note },
    });
  }

  async connect(number: number, forwards: readonly NicForward[] = []) {
    void this.network;
    const inbox = new Inbox();
    const port = await UserNetworkPort.connect(this.folder, {
      ...{ machine: `machine-${number}`, nic: "eth0", mac: `02:00:00:00:00:${number}` },
      ...{ ip: `10.20.0.${number}`, hostname: `host-${number}`, forwards },
    });
    port.onFrame = inbox.put;
    return {
      port,
      inbox,
      /** Asks for the gateway's Ethernet address, so that it knows the guest's too. */
      async findGateway() {
        port.send(buildArp(BROADCAST_MAC, {
          ...{ operation: ARP_OPERATION.REQUEST, senderMac: MAC, senderIp: parseIpv4(IP) },
          ...{ targetMac: 0, targetIp: parseIpv4(SPEC.gateway) },
        }));
        while (true) {
          const frame = parseEthernet(await inbox.next())!;
          const arp = frame.type === ETHER_TYPE.ARP ? parseArp(frame.payload) : undefined;
          if (arp?.operation === ARP_OPERATION.REPLY) return assert.equal(arp.senderMac, GATEWAY_MAC);
        }
      },
      [Symbol.dispose]: () => port[Symbol.dispose](),
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#network?.[Symbol.dispose]();
    await endAllPasst(this.folder);
    await Deno.remove(this.folder, { recursive: true });
  }
}

Deno.test("what a guest says to the outside goes to passt, and nothing else does", async () => {
  await using fixture = new Fixture();
  using passt = new FakePasst(fixture.folder);
  using guest = await fixture.connect(10);
  const kept = [
    // What the gateway answers, what nobody may reach, and what says to be another's.
    buildIcmp(outward(SPEC.gateway), { type: ICMP_TYPE.ECHO_REQUEST, code: 0, rest: 1, payload: EMPTY }),
    buildUdp(outward(SPEC.dns), datagram(1000, 53)),
    buildTcp(outward(SPEC.dns), segment(TCP_FLAG.SYN)),
    ...["127.0.0.1", "169.254.169.254", "0.0.0.1", "10.20.0.11", "224.0.0.1", "255.255.255.255"].map((each) =>
      buildTcp(outward(each), segment(TCP_FLAG.SYN))
    ),
    buildTcp(outward(SPEC.gateway), segment(TCP_FLAG.SYN)),
    buildTcp(outward(SPEC.gateway), segment(TCP_FLAG.ACK)),
    buildTcp(outward(SPEC.gateway), segment(TCP_FLAG.SYN | TCP_FLAG.ACK)),
    buildUdp(outward(SPEC.gateway), datagram(80, 5000)),
    ...[{ source: parseIpv4("10.20.0.11") }, { sourceMac: MAC + 1 }, { destinationMac: BROADCAST_MAC }].map((
      each,
    ) => buildTcp({ ...outward(OUTSIDE), ...each }, segment(TCP_FLAG.SYN))),
    buildEthernet({ destination: GATEWAY_MAC, source: MAC, type: 0x86dd, payload: new Uint8Array(60) }),
    buildEthernet({
      destination: GATEWAY_MAC,
      source: MAC,
      type: ETHER_TYPE.IPV4,
      payload: new Uint8Array(60),
    }),
    new Uint8Array(13),
  ];
  const sent = [
    buildTcp(outward(OUTSIDE), segment(TCP_FLAG.SYN)),
    buildIcmp(outward(OUTSIDE), { type: ICMP_TYPE.ECHO_REQUEST, code: 0, rest: 1, payload: EMPTY }),
  ];
  // Frames keep their order: what is heard is all that was passed on.
  for (const frame of [...kept, ...sent]) assert.ok(guest.port.send(frame));
  for (const frame of sent) assert.deepEqual(await passt.inbox.next(), frame);
  await guest.findGateway();
});

Deno.test("what comes from passt reaches its guest only, and callers get their answers", async () => {
  await using fixture = new Fixture();
  using passt = new FakePasst(fixture.folder);
  using other = await fixture.connect(11);
  using guest = await fixture.connect(10);
  // Neither ARP nor what is for others gets through.
  passt.send(buildArp(BROADCAST_MAC, {
    ...{ operation: ARP_OPERATION.REQUEST, senderMac: 1, senderIp: parseIpv4(SPEC.gateway) },
    ...{ targetMac: 0, targetIp: parseIpv4(IP) },
  }));
  passt.send(
    buildTcp({ ...inward(OUTSIDE), destination: parseIpv4("10.20.0.11") }, segment(TCP_FLAG.SYN)),
  );
  passt.send(buildTcp(inward(SPEC.gateway), segment(TCP_FLAG.SYN)));
  const { frame, source } = await guest.inbox.packet();
  assert.deepEqual([frame.destination, frame.source, source], [MAC, GATEWAY_MAC, SPEC.gateway]);
  const answer = { sourcePort: 80, destinationPort: 4000 };
  // Another port of the gateway, or of the guest, is not the caller's.
  for (const other of [{ ...answer, destinationPort: 4001 }, { ...answer, sourcePort: 81 }, answer]) {
    guest.port.send(buildTcp(outward(SPEC.gateway), segment(TCP_FLAG.SYN | TCP_FLAG.ACK, other)));
  }
  assert.deepEqual(
    await passt.inbox.next(),
    buildTcp(outward(SPEC.gateway), segment(TCP_FLAG.SYN | TCP_FLAG.ACK, answer)),
  );
  // The other one heard nothing of all that.
  guest.port.send(buildUdp({ ...outward("10.20.0.11"), destinationMac: MAC + 1 }, datagram(1, 2)));
  assert.equal((await other.inbox.packet()).udp?.destinationPort, 2);
});

Deno.test("forwards are passt's until they change: the built-in NAT has them then", async () => {
  await using fixture = new Fixture();
  using passt = new FakePasst(fixture.folder);
  const [one, two] = [forward(freePort()), forward(freePort())];
  using guest = await fixture.connect(10, [one]);
  const isListening = (port: number) =>
    Deno.connect({ hostname: "127.0.0.1", port }).then(
      (connection) => (connection.close(), true),
      () => false,
    );
  assert.equal(await isListening(one.host), false);
  await guest.port.setForwards([one]);
  // Those of UDP are never passt's.
  await guest.port.setForwards([one, forward(two.host, "udp")]);
  guest.port.send(buildTcp(outward(OUTSIDE), segment(TCP_FLAG.SYN)));
  await passt.inbox.next();
  await guest.port.setForwards([one, two]);
  assert.deepEqual([await isListening(one.host), await isListening(two.host)], [true, true]);
  assert.match(fixture.messages.join("\n"), /leaves passt, which cannot change its forwards/);
});

Deno.test("where passt is lost, the built-in NAT goes on", async () => {
  await using fixture = new Fixture();
  const one = forward(freePort());
  using passt = new FakePasst(fixture.folder);
  using guest = await fixture.connect(10, [one]);
  passt.send(buildTcp(inward(OUTSIDE), segment(TCP_FLAG.ACK)));
  await guest.inbox.packet();
  passt[Symbol.dispose]();
  while (true) {
    try {
      (await Deno.connect({ hostname: "127.0.0.1", port: one.host })).close();
      break;
    } catch (error) {
      assert.ok(error instanceof Deno.errors.ConnectionRefused);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
  assert.match(fixture.messages.join("\n"), /passt of machine-10\/eth0 is lost/);
});

Deno.test("without passt nothing is started, and nothing is in the way", async () => {
  await using fixture = new Fixture();
  const path = Deno.env.get("PATH")!;
  Deno.env.set("PATH", fixture.folder);
  try {
    assert.equal(await startPasst(fixture.folder, { ...SPEC, ip: IP, forwards: [] }), false);
  } finally {
    Deno.env.set("PATH", path);
  }
  using guest = await fixture.connect(10);
  assert.ok(guest.port.isUp);
});

Deno.test({
  name: `passt carries what guests say, both ways${reason === undefined ? "" : ` (skipped: ${reason})`}`,
  ignore: reason !== undefined,
  async fn() {
    await using fixture = new Fixture();
    const [tcp, udp] = [forward(freePort()), forward(freePort(), "udp", 5353)];
    const reports: string[] = [];
    const started = await startPasst(fixture.folder, { ...SPEC, ip: IP, forwards: [tcp, udp] }, {
      report: (message) => void reports.push(message),
    });
    assert.ok(started, reports.join("\n"));
    using guest = await fixture.connect(10, [tcp, udp]);

    // Somebody calls the guest by TCP, before it has said anything.
    const connection = await Deno.connect({ hostname: "127.0.0.1", port: tcp.host });
    const asked = await guest.inbox.packet();
    assert.deepEqual([asked.frame.destination, asked.source], [MAC, SPEC.gateway]);
    assert.equal(asked.tcp?.destinationPort, 80);
    const { sourcePort, sequence } = asked.tcp!;
    const answer = (flags: number, ours: number, payload: Uint8Array = EMPTY) =>
      guest.port.send(buildTcp(
        outward(SPEC.gateway),
        segment(flags, {
          ...{ sourcePort: 80, destinationPort: sourcePort, sequence: ours, payload },
          ...{ acknowledgment: sequence + 1 >>> 0, ...(flags & TCP_FLAG.SYN ? { mss: 1460 } : {}) },
        }),
      ));
    answer(TCP_FLAG.SYN | TCP_FLAG.ACK, 1000);
    // What comes with the answer may be lost, and guests say it again.
    const again = setInterval(() => answer(TCP_FLAG.ACK | TCP_FLAG.PSH, 1001, Uint8Array.of(1, 2, 3)), 10);
    const heard = new Uint8Array(3);
    assert.equal(await connection.read(heard), 3);
    clearInterval(again);
    assert.deepEqual([...heard], [1, 2, 3]);
    connection.close();

    // And by UDP, which the built-in NAT carries.
    await guest.findGateway();
    const caller = createSocket("udp4");
    caller.send(Uint8Array.of(4), udp.host, "127.0.0.1");
    let called = await guest.inbox.packet();
    while (!called.udp) called = await guest.inbox.packet();
    assert.deepEqual([called.source, called.udp.destinationPort], [SPEC.gateway, 5353]);
    const closed = once(caller, "close");
    caller.close();
    await closed;

    // The guest calls the host by an address that is no loopback.
    const own = Deno.networkInterfaces().find((each) => each.family === "IPv4" && each.name !== "lo");
    assert.ok(own, "passt started, so that there is a network");
    using server = Deno.listen({ hostname: own.address, port: 0 });
    const { port } = server.addr;
    const call = segment(TCP_FLAG.SYN, { sourcePort: 6000, destinationPort: port, mss: 1460 });
    guest.port.send(buildTcp(outward(own.address), call));
    let accepted = await guest.inbox.packet();
    while (accepted.tcp?.destinationPort !== 6000) accepted = await guest.inbox.packet();
    assert.deepEqual([accepted.source, accepted.tcp.flags], [own.address, TCP_FLAG.SYN | TCP_FLAG.ACK]);
    (await server.accept()).close();

    // Ports are free when it is ended; a second one is refused as long as it is not.
    assert.equal(await startPasst(fixture.folder, { ...SPEC, ip: "10.20.0.12", forwards: [tcp] }), false);
    await guest.port.setForwards([tcp]);
    (await Deno.connect({ hostname: "127.0.0.1", port: tcp.host })).close();
  },
});

Deno.test({
  name: `a passt that nobody came to is ended${reason === undefined ? "" : ` (skipped: ${reason})`}`,
  ignore: reason !== undefined,
  async fn() {
    await using fixture = new Fixture();
    const nic = { ...SPEC, ip: IP, forwards: [forward(freePort())] };
    // The second one takes the place of the first one, and its port.
    for (let round = 0; round < 2; round++) assert.ok(await startPasst(fixture.folder, nic));
    const port = nic.forwards[0]!.host;
    assert.throws(() => Deno.listen({ hostname: "127.0.0.1", port }), Deno.errors.AddrInUse);
    await endPasst(fixture.folder, IP);
    Deno.listen({ hostname: "127.0.0.1", port }).close();
    const log = await Deno.readTextFile(join(fixture.folder, "passt", "0a14000a.log"));
    assert.match(log, /passt/);
  },
});
