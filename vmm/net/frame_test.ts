import assert from "node:assert/strict";
import { parseIpv4 } from "../../dsl/mod.ts";
import {
  ARP_OPERATION,
  BROADCAST_MAC,
  buildArp,
  buildEthernet,
  buildIcmp,
  buildTcp,
  buildUdp,
  checksum,
  ETHER_TYPE,
  ETHERNET_SIZE,
  formatMac,
  fragment,
  ICMP_TYPE,
  IP_PROTOCOL,
  type Ipv4Packet,
  isMulticast,
  MAX_FRAME_SIZE,
  type PacketAddresses,
  parseArp,
  parseEthernet,
  parseIcmp,
  parseIpv4Packet,
  parseMac,
  parseTcp,
  parseUdp,
  TCP_FLAG,
} from "./frame.ts";

const ADDRESSES: PacketAddresses = {
  sourceMac: parseMac("02:00:00:00:00:01"),
  destinationMac: parseMac("fe:ff:ff:ff:ff:02"),
  source: parseIpv4("10.20.0.10"),
  destination: parseIpv4("203.0.113.255"),
};

function packetOf(frame: Uint8Array): Ipv4Packet | undefined {
  const ethernet = parseEthernet(frame);
  return ethernet && parseIpv4Packet(ethernet.payload);
}

function readAll(frame: Uint8Array): unknown {
  const ethernet = parseEthernet(frame);
  const packet = ethernet && parseIpv4Packet(ethernet.payload);
  return [
    ethernet && parseArp(ethernet.payload),
    packet && (parseIcmp(packet) ?? parseUdp(packet) ?? parseTcp(packet)),
  ];
}

function hex(bytes: Uint8Array): string {
  return bytes.toHex();
}

/** Makes the sums right again after bytes were changed, so that they are not the reason for a refusal. */
function withIpChecksum(frame: Uint8Array): Uint8Array {
  frame.fill(0, 24, 26);
  const sum = checksum(frame, 14, Math.max(20, (frame[14]! & 15) * 4));
  frame[24] = sum >> 8;
  frame[25] = sum;
  return frame;
}

Deno.test("Ethernet addresses are read and written", () => {
  assert.equal(parseMac("ff:ff:ff:ff:ff:ff"), BROADCAST_MAC);
  assert.equal(formatMac(parseMac("02:00:0A:00:00:01")), "02:00:0a:00:00:01");
  assert.throws(() => parseMac("02:00:0a:00:00"), /six pairs/);
  assert.deepEqual([0x0100_5e00_0001, BROADCAST_MAC, 0x0200_0000_0001].map(isMulticast), [true, true, false]);
});

Deno.test("the checksum is that of RFC 1071, for odd sizes and any sum to begin with", () => {
  const bytes = Uint8Array.fromHex("0001f203f4f5f6f7");
  assert.equal(checksum(bytes, 0, 8), ~0xddf2 & 0xffff);
  assert.equal(checksum(bytes, 0, 7), ~((0xddf2 - 0xf7 + 0xffff) % 0xffff) & 0xffff);
  assert.equal(checksum(new Uint8Array(65_536).fill(255), 0, 65_536, 0xffff * 1000), 0);
});

Deno.test("an ARP request has the bytes of RFC 826", () => {
  const frame = buildArp(BROADCAST_MAC, {
    operation: ARP_OPERATION.REQUEST,
    senderMac: ADDRESSES.sourceMac,
    senderIp: ADDRESSES.source,
    targetMac: 0,
    targetIp: parseIpv4("10.20.0.1"),
  });
  assert.equal(
    hex(frame),
    "ffffffffffff0200000000010806" + "0001080006040001" + "0200000000010a14000a" + "0000000000000a140001",
  );
  const ethernet = parseEthernet(buildEthernet(parseEthernet(frame)!))!;
  assert.deepEqual(
    [ethernet.destination, ethernet.source, ethernet.type],
    [BROADCAST_MAC, ADDRESSES.sourceMac, ETHER_TYPE.ARP],
  );
  assert.equal(parseArp(ethernet.payload)!.targetIp, parseIpv4("10.20.0.1"));
  assert.equal(parseArp(ethernet.payload.subarray(1)), undefined);
  ethernet.payload[5] = 6;
  assert.equal(parseArp(ethernet.payload), undefined);
});

Deno.test("the header of a packet that other software made is read", () => {
  const bytes = new Uint8Array(115);
  bytes.set(Uint8Array.fromHex("45000073000040004011b861c0a80001c0a800c7" + "0035e97c005f0000"));
  const packet = parseIpv4Packet(bytes)!;
  assert.deepEqual([packet.source, packet.destination], ["192.168.0.1", "192.168.0.199"].map(parseIpv4));
  const datagram = parseUdp(packet)!;
  assert.deepEqual([datagram.sourcePort, datagram.destinationPort, datagram.payload.length], [
    53,
    59_772,
    87,
  ]);
});

Deno.test("what is written is read again, with padding and without", () => {
  for (const size of [0, 1, 7, 1400]) {
    const payload = Uint8Array.from({ length: size }, (_, index) => index * 31 + size);
    const icmp = { type: ICMP_TYPE.ECHO_REQUEST, code: 0, rest: 0xdead_beef, payload };
    const udp = { sourcePort: 65_535, destinationPort: 53, payload };
    const tcp = {
      sourcePort: 40_000,
      destinationPort: 443,
      sequence: 0xffff_ffff,
      acknowledgment: 0x8000_0000,
      flags: TCP_FLAG.ACK | TCP_FLAG.PSH,
      window: 65_535,
      payload,
    };
    for (const padding of [0, 46]) {
      const pad = (frame: Uint8Array) => {
        const padded = new Uint8Array(frame.length + padding).fill(0xaa);
        padded.set(frame);
        return packetOf(padded)!;
      };
      const packet = pad(buildIcmp(ADDRESSES, icmp));
      assert.deepEqual([packet.source, packet.destination], [ADDRESSES.source, ADDRESSES.destination]);
      assert.deepEqual(parseIcmp(packet), icmp);
      assert.deepEqual(parseUdp(pad(buildUdp(ADDRESSES, udp))), udp);
      assert.deepEqual(parseTcp(pad(buildTcp(ADDRESSES, tcp))), { ...tcp, mss: undefined });
      assert.deepEqual(parseTcp(pad(buildTcp(ADDRESSES, { ...tcp, mss: 1460 }))), { ...tcp, mss: 1460 });
    }
  }
});

Deno.test("each changed bit of a TCP segment is noticed", () => {
  const frame = buildTcp(ADDRESSES, {
    sourcePort: 1,
    destinationPort: 2,
    sequence: 3,
    acknowledgment: 4,
    flags: TCP_FLAG.SYN,
    window: 5,
    mss: 1460,
    payload: new Uint8Array(3),
  });
  for (let bit = ETHERNET_SIZE * 8; bit < frame.length * 8; bit++) {
    frame[bit >> 3]! ^= 128 >> (bit & 7);
    const packet = packetOf(frame);
    assert.equal(packet && parseTcp(packet), undefined, `bit ${bit}`);
    frame[bit >> 3]! ^= 128 >> (bit & 7);
  }
  assert.ok(parseTcp(packetOf(frame)!));
});

Deno.test("a UDP checksum may be missing and is never written as 0", () => {
  const datagram = { sourcePort: 0, destinationPort: 0, payload: new Uint8Array(2) };
  const frame = buildUdp(ADDRESSES, datagram);
  // The payload that makes the sum 0.
  frame.copyWithin(42, 40, 42);
  const payload = frame.slice(42, 44);
  const zero = buildUdp(ADDRESSES, { ...datagram, payload });
  assert.equal(hex(zero.subarray(40, 42)), "ffff");
  assert.deepEqual(parseUdp(packetOf(zero)!)?.payload, payload);
  zero[40] = zero[41] = 0;
  assert.deepEqual(parseUdp(packetOf(zero)!)?.payload, payload);
  zero[41] = 1;
  assert.equal(parseUdp(packetOf(zero)!), undefined);
});

Deno.test("sizes that do not fit, fragments and other versions are refused", () => {
  const make = (at: number, ...bytes: number[]) => {
    const frame = buildUdp(ADDRESSES, { sourcePort: 1, destinationPort: 2, payload: new Uint8Array(20) });
    frame.set(bytes, at);
    return packetOf(withIpChecksum(frame));
  };
  assert.ok(make(14));
  const wrong: [number, ...number[]][] = [
    [14, 0x65],
    [14, 0x44],
    [14, 0x4f],
    [16, 0, 19],
    [16, 0, 49],
    [16, 255, 255],
    [20, 0x20, 0],
    [20, 0, 1],
  ];
  for (const each of wrong) assert.equal(make(...each), undefined, String(each));
  for (const size of [[0, 7], [0, 29], [255, 255]]) assert.equal(parseUdp(make(38, ...size)!), undefined);
});

Deno.test("options of a TCP header end where the header ends", () => {
  const find = (...options: number[]) => {
    const frame = buildTcp(ADDRESSES, {
      sourcePort: 1,
      destinationPort: 2,
      sequence: 0,
      acknowledgment: 0,
      flags: 2,
      window: 0,
      payload: new Uint8Array([...options, ...new Array(8 - options.length).fill(0)]),
    });
    // The payload becomes part of the header.
    frame[46] = 7 << 4;
    frame.fill(0, 50, 52);
    const packet = packetOf(frame)!;
    const { source, destination } = ADDRESSES;
    const sum = checksum(
      frame,
      34,
      28,
      (source >>> 16) + (source & 65535) + (destination >>> 16) + (destination & 65535) + 6 + 28,
    );
    frame[50] = sum >> 8;
    frame[51] = sum;
    return parseTcp(packet)!.mss;
  };
  assert.equal(find(1, 1, 2, 4, 5, 0xb4), 1460);
  assert.equal(find(3, 3, 7, 2, 4, 5, 0xb4), 1460);
  for (
    const options of [[0, 2, 4, 5, 0xb4], [2, 0], [2, 1], [8, 10, 1], [1, 1, 1, 1, 1, 2, 4, 5], [9, 255]]
  ) {
    assert.equal(find(...options), undefined, String(options));
  }
});

Deno.test("a datagram that is too large is taken apart, and its fragments are whole packets", () => {
  const payload = Uint8Array.from({ length: 4000 }, (_, index) => index * 7);
  const whole = buildUdp(ADDRESSES, { sourcePort: 1, destinationPort: 2, payload });
  const frames = fragment(whole, 0xabcd);
  assert.equal(frames.length, 3);
  let end = 0;
  const joined = new Uint8Array(8 + payload.length);
  for (const [index, frame] of frames.entries()) {
    assert.ok(frame.length <= MAX_FRAME_SIZE);
    assert.equal(packetOf(frame), undefined);
    const view = new DataView(frame.buffer);
    assert.equal(checksum(frame, 14, 20), 0);
    assert.equal(view.getUint16(16), frame.length - 14);
    assert.equal(view.getUint16(18), 0xabcd);
    assert.equal(view.getUint16(20) >> 13, index < 2 ? 1 : 0);
    assert.equal((view.getUint16(20) & 0x1fff) * 8, end);
    joined.set(frame.subarray(34), end);
    end += frame.length - 34;
  }
  assert.deepEqual(joined, whole.subarray(34));
  const small = buildUdp(ADDRESSES, {
    sourcePort: 1,
    destinationPort: 2,
    payload: payload.subarray(0, 1472),
  });
  assert.deepEqual(fragment(small, 1), [small]);
});

Deno.test("no bytes make a reader throw", () => {
  let seed = 1;
  const random = (end: number) => (seed = (Math.imul(seed, 1_103_515_245) + 12_345) >>> 0) % end;
  const base = buildTcp(ADDRESSES, {
    sourcePort: 1,
    destinationPort: 2,
    sequence: 3,
    acknowledgment: 4,
    flags: 2,
    window: 5,
    mss: 6,
    payload: new Uint8Array(10),
  });
  let known = 0;
  for (let round = 0; round < 50_000; round++) {
    const frame = base.slice(0, random(2) ? base.length : random(base.length + 1));
    for (let count = random(4); count > 0; count--) frame[random(frame.length || 1)] = random(65_536) >> 8;
    if (frame.length > 34 && random(2)) withIpChecksum(frame);
    frame[23] = [IP_PROTOCOL.ICMP, IP_PROTOCOL.TCP, IP_PROTOCOL.UDP][random(3)]!;
    if ((readAll(frame) as unknown[]).some(Boolean)) known++;
  }
  assert.ok(known > 1000, String(known));
});
