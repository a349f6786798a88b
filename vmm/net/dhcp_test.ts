import assert from "node:assert/strict";
import { formatIpv4, parseIpv4 } from "../../dsl/mod.ts";
import { DhcpServer } from "./dhcp.ts";
import { BROADCAST_MAC, buildUdp, parseEthernet, parseIpv4Packet, parseMac, parseUdp } from "./frame.ts";

const MAC = "02:00:00:00:00:10";
const IP = "10.20.0.10";
const GATEWAY = "10.20.0.1";
const GATEWAY_MAC = "02:00:00:00:00:01";
const DISCOVER = 1;
const OFFER = 2;
const REQUEST = 3;
const ACK = 5;
const NAK = 6;
const INFORM = 8;

interface Ask {
  readonly type?: number;
  readonly mac?: string;
  readonly chaddr?: string;
  readonly ciaddr?: string;
  readonly giaddr?: string;
  readonly flags?: number;
  readonly op?: number;
  readonly cookie?: number;
  readonly ports?: readonly [source: number, target: number];
  readonly options?: readonly (readonly [option: number, value: readonly number[]])[];
  readonly tail?: readonly number[];
}

const four = (address: string) => address.split(".").map(Number);
const bytesOf = (mac: string) => mac.split(":").map((byte) => parseInt(byte, 16));

function ask(
  { type = DISCOVER, mac = MAC, chaddr = mac, ciaddr = "0.0.0.0", giaddr = "0.0.0.0", flags = 0, ...more }:
    Ask,
): Uint8Array {
  const options = [[53, [type]] as const, ...more.options ?? []];
  const payload = Uint8Array.from([
    ...[more.op ?? 1, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef, 0, 0, flags >> 8, flags & 255],
    ...[...four(ciaddr), ...four("0.0.0.0"), ...four("0.0.0.0"), ...four(giaddr)],
    ...[...bytesOf(chaddr), ...Array<number>(10 + 64 + 128).fill(0)],
    ...four(formatIpv4(more.cookie ?? 0x6382_5363)),
    ...options.flatMap(([option, value]) => [option, value.length, ...value]),
    ...more.tail ?? [255],
  ]);
  const [sourcePort, destinationPort] = more.ports ?? [68, 67];
  return buildUdp({
    sourceMac: parseMac(mac),
    destinationMac: BROADCAST_MAC,
    source: parseIpv4(ciaddr),
    destination: 0xffff_ffff,
  }, { sourcePort, destinationPort, payload });
}

function server(): DhcpServer {
  const dhcp = new DhcpServer({ mac: GATEWAY_MAC, cidr: "10.20.0.0/22", gateway: GATEWAY, dns: "10.20.0.2" });
  dhcp.set(MAC, { ip: IP, hostname: "web" });
  return dhcp;
}

interface Answer {
  readonly mac: number;
  readonly ip: string;
  readonly yiaddr: string;
  readonly ciaddr: string;
  readonly options: ReadonlyMap<number, readonly number[]>;
  readonly payload: Uint8Array;
}

/** Reads an answer and checks what all have in common. */
function read(frame: Uint8Array | undefined): Answer {
  assert.ok(frame, "there is no answer");
  const ethernet = parseEthernet(frame)!;
  assert.equal(ethernet.source, parseMac(GATEWAY_MAC));
  const packet = parseIpv4Packet(ethernet.payload)!;
  assert.equal(formatIpv4(packet.source), GATEWAY);
  const { sourcePort, destinationPort, payload } = parseUdp(packet)!;
  assert.deepEqual([sourcePort, destinationPort], [67, 68]);
  assert.ok(payload.length >= 300);
  assert.deepEqual([...payload.subarray(0, 8)], [2, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef]);
  assert.deepEqual([...payload.subarray(28, 34)], bytesOf(MAC));
  assert.deepEqual([...payload.subarray(236, 240)], [0x63, 0x82, 0x53, 0x63]);
  const options = new Map<number, number[]>();
  let at = 240;
  for (; payload[at] !== 255; at += 2 + payload[at + 1]!) {
    options.set(payload[at]!, [...payload.subarray(at + 2, at + 2 + payload[at + 1]!)]);
  }
  assert.ok(at < payload.length);
  assert.deepEqual(options.get(54), four(GATEWAY));
  const address = (offset: number) => payload.subarray(offset, offset + 4).join(".");
  return {
    mac: ethernet.destination,
    ip: formatIpv4(packet.destination),
    ciaddr: address(12),
    yiaddr: address(16),
    options,
    payload,
  };
}

Deno.test("a guest that asks is offered what is planned for it, and gets it", () => {
  const dhcp = server();
  const requests: Ask[] = [
    { type: DISCOVER },
    { type: REQUEST, options: [[54, four(GATEWAY)], [50, four(IP)]] },
    // After a reboot, it asks for what it had.
    { type: REQUEST, options: [[50, four(IP)]] },
  ];
  for (const request of requests) {
    const { mac, ip, yiaddr, ciaddr, options } = read(dhcp.answer(ask(request)));
    assert.deepEqual([mac, ip, yiaddr, ciaddr], [parseMac(MAC), IP, IP, "0.0.0.0"]);
    assert.deepEqual([...options], [
      [53, [request.type === DISCOVER ? OFFER : ACK]],
      [54, four(GATEWAY)],
      [51, [0, 1, 0x51, 0x80]],
      [1, four("255.255.252.0")],
      [3, four(GATEWAY)],
      [6, four("10.20.0.2")],
      [28, four("10.20.3.255")],
      [12, [..."web"].map((letter) => letter.charCodeAt(0))],
    ]);
  }
});

Deno.test("who renews its address keeps it, and hears so at that address", () => {
  const { ip, ciaddr, yiaddr, options } = read(
    server().answer(ask({ type: REQUEST, ciaddr: IP, flags: 0x8000 })),
  );
  assert.deepEqual([ip, ciaddr, yiaddr, options.get(53)], [IP, IP, IP, [ACK]]);
});

Deno.test("who cannot hear at its address yet is answered by broadcast", () => {
  const { mac, ip, payload } = read(server().answer(ask({ flags: 0x8000 })));
  assert.deepEqual([mac, ip, payload[10]], [BROADCAST_MAC, "255.255.255.255", 0x80]);
});

Deno.test("who asks for another address is refused and told to begin anew", () => {
  const requests: Ask[] = [
    { options: [[54, four(GATEWAY)], [50, four("10.20.0.11")]] },
    { options: [[50, four("192.168.1.5")]] },
    { ciaddr: "10.20.0.11" },
    { ciaddr: "10.20.0.11", options: [[50, four(IP)]] },
    {},
  ];
  for (const request of requests) {
    const { mac, ip, yiaddr, ciaddr, options } = read(server().answer(ask({ type: REQUEST, ...request })));
    assert.deepEqual([mac, ip], [BROADCAST_MAC, "255.255.255.255"]);
    assert.deepEqual([yiaddr, ciaddr], ["0.0.0.0", "0.0.0.0"]);
    assert.deepEqual([...options], [[53, [NAK]], [54, four(GATEWAY)]]);
  }
});

Deno.test("who only wants to know the rest gets no address", () => {
  const { yiaddr, ciaddr, options } = read(server().answer(ask({ type: INFORM, ciaddr: IP })));
  assert.deepEqual([yiaddr, ciaddr, options.get(53), options.get(51)], ["0.0.0.0", IP, [ACK], undefined]);
  assert.deepEqual(options.get(6), four("10.20.0.2"));
  assert.equal(server().answer(ask({ type: INFORM, ciaddr: "10.20.0.11" })), undefined);
});

Deno.test("who names itself is answered by that name", () => {
  const id = [255, 1, 2, 3];
  for (const type of [DISCOVER, REQUEST]) {
    assert.deepEqual(read(server().answer(ask({ type, options: [[61, id]] }))).options.get(61), id);
  }
});

Deno.test("nobody else is answered", () => {
  const dhcp = server();
  dhcp.set("02:00:00:00:00:11", { ip: "10.20.0.11", hostname: "" });
  const requests: Record<string, Ask> = {
    "an unknown guest": { mac: "02:00:00:00:00:12" },
    "one guest for another": { mac: "02:00:00:00:00:11", chaddr: MAC },
    "a request to another server": { type: REQUEST, options: [[54, four("10.20.0.9")], [50, four(IP)]] },
    "an address given back": { type: 7 },
    "an address declined": { type: 4 },
    "an answer": { op: 2 },
    "a relay": { giaddr: "10.20.0.9" },
    "a BOOTP message": { cookie: 0 },
    "another port": { ports: [68, 68] },
    "another source port": { ports: [1068, 67] },
    "an option beyond the end": { tail: [12, 5, 1] },
    "an option without its length": { tail: [12] },
  };
  for (const [name, request] of Object.entries(requests)) {
    assert.equal(dhcp.answer(ask(request)), undefined, name);
  }
  assert.ok(dhcp.answer(ask({ mac: "02:00:00:00:00:11" })));
  dhcp.delete("02:00:00:00:00:11");
  assert.equal(dhcp.answer(ask({ mac: "02:00:00:00:00:11" })), undefined);
});

Deno.test("options end where the message does, or where it says so", () => {
  const dhcp = server();
  assert.ok(dhcp.answer(ask({ tail: [] })));
  assert.ok(dhcp.answer(ask({ tail: [0, 0, 0] })));
  assert.ok(dhcp.answer(ask({ tail: [255, 12, 5] })));
});

/** A xorshift generator: each run is the same. */
function random(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}

Deno.test("whatever bytes arrive, an answer is one to this guest, with its address or none", () => {
  const dhcp = server();
  const next = random(20_260_101);
  const seeds = [
    ask({}),
    ask({ type: REQUEST, options: [[54, four(GATEWAY)], [50, four(IP)], [61, [1, 2, 3]]] }),
    ask({ type: INFORM, ciaddr: IP }),
  ].map((frame) => parseUdp(parseIpv4Packet(parseEthernet(frame)!.payload)!)!.payload);
  let answers = 0;
  for (let round = 0; round < 20_000; round++) {
    let payload = seeds[next(seeds.length)]!.slice(0, next(4) === 0 ? next(400) : undefined);
    // Mostly in the options, as the rest is soon checked.
    for (let count = next(6); count > 0 && payload.length > 0; count--) {
      const from = next(4) === 0 ? 0 : Math.min(236, payload.length - 1);
      payload[from + next(payload.length - from)] = next(256);
    }
    if (next(8) === 0) {
      payload = Uint8Array.from([
        ...payload,
        ...Array.from({ length: next(300) }, () => next(256)),
      ]);
    }
    // A right checksum lets the message through to the server.
    const frame = buildUdp({
      sourceMac: parseMac(MAC),
      destinationMac: BROADCAST_MAC,
      source: 0,
      destination: 0xffff_ffff,
    }, { sourcePort: 68, destinationPort: 67, payload });
    const answer = dhcp.answer(frame);
    if (!answer) continue;
    answers++;
    assert.ok(answer.length <= 1514);
    const back = parseUdp(parseIpv4Packet(parseEthernet(answer)!.payload)!)!.payload;
    assert.deepEqual([...back.subarray(28, 34)], bytesOf(MAC));
    assert.ok(["0.0.0.0", IP].includes(back.subarray(16, 20).join(".")));
  }
  assert.ok(answers > 2000, `${answers} of 20000 were answered`);
  // And frames that are nothing at all.
  for (let round = 0; round < 5000; round++) {
    const frame = ask({}).slice(0, next(500));
    for (let count = next(8); count > 0 && frame.length > 0; count--) frame[next(frame.length)] = next(256);
    dhcp.answer(frame);
  }
});
