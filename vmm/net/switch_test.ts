import assert from "node:assert/strict";
import { MachineError } from "../errors.ts";
import { MAX_FRAME, type PortLock, Switch, type SwitchPort } from "./switch.ts";

const BROADCAST = "ff:ff:ff:ff:ff:ff";
const MINUTE = 60_000;

function mac(number: number): string {
  const digits = number.toString(16).padStart(10, "0");
  return `02:${digits.replaceAll(/..(?=.)/g, "$&:")}`;
}

const bytesOf = (address: string) => address.split(":").map((byte) => parseInt(byte, 16));
const numbersOf = (address: string) => address.split(".").map(Number);

function frame(from: string, to: string, data: readonly number[] = [], type = 0x88b5): Uint8Array {
  return Uint8Array.from([...bytesOf(to), ...bytesOf(from), type >> 8, type & 255, ...data]);
}

function ipv4(
  from: string,
  source: string,
  target: string,
  { protocol = 6, ports = [1, 2], fragment = 0, to = BROADCAST } = {},
): Uint8Array {
  const header = [0x45, 0, 0, 28, 0, 0, fragment >> 8, fragment & 255, 64, protocol, 0, 0];
  const data = ports.flatMap((port) => [port >> 8, port & 255]);
  return frame(
    from,
    to,
    [...header, ...numbersOf(source), ...numbersOf(target), ...data, 0, 8, 0, 0],
    0x0800,
  );
}

function arp(
  from: string,
  sender: string,
  ip: string,
  kind: readonly number[] = [0, 1, 8, 0, 6, 4],
): Uint8Array {
  const data = [...kind, 0, 1, ...bytesOf(sender), ...numbersOf(ip), 0, 0, 0, 0, 0, 0, 10, 0, 0, 1];
  return frame(from, BROADCAST, data, 0x0806);
}

class Cable {
  readonly port: SwitchPort;
  readonly heard: Uint8Array[] = [];
  isFull = false;

  constructor(target: Switch, lock?: PortLock) {
    this.port = target.connect({
      send: (frame) => {
        if (this.isFull) return false;
        this.heard.push(frame.slice());
        return true;
      },
      ...(lock ? { lock } : {}),
    });
  }

  /** Takes what was heard. */
  take(): Uint8Array[] {
    return this.heard.splice(0);
  }
}

Deno.test("a frame goes to the port where its target was heard, and to all others before", () => {
  const target = new Switch();
  const [one, two, three] = [new Cable(target), new Cable(target), new Cable(target)];
  const first = frame(mac(1), mac(2), [1]);
  one.port.receive(first);
  assert.deepEqual([one.take(), two.take(), three.take()], [[], [first], [first]]);
  const answer = frame(mac(2), mac(1), [2]);
  two.port.receive(answer);
  assert.deepEqual([one.take(), two.take(), three.take()], [[answer], [], []]);
  one.port.receive(first);
  assert.deepEqual([one.take(), two.take(), three.take()], [[], [first], []]);
  const all = frame(mac(1), BROADCAST);
  one.port.receive(all);
  assert.deepEqual([one.take(), two.take(), three.take()], [[], [all], [all]]);
  // Both at the same port: they have heard each other.
  one.port.receive(frame(mac(3), mac(1)));
  assert.deepEqual([one.take(), two.take(), three.take()], [[], [], []]);
  assert.deepEqual(two.port.counters, {
    rxPackets: 1,
    rxBytes: 15,
    rxDropped: 0,
    rxSpoofed: 0,
    txPackets: 3,
    txBytes: 15 + 15 + 14,
    txDropped: 0,
  });
});

Deno.test("a station that moves is found at its new port, and one that is silent is forgotten", () => {
  let now = 0;
  const target = new Switch(() => now);
  const [one, two, three] = [new Cable(target), new Cable(target), new Cable(target)];
  one.port.receive(frame(mac(1), BROADCAST));
  two.port.receive(frame(mac(1), BROADCAST));
  for (const cable of [one, two, three]) cable.take();
  three.port.receive(frame(mac(3), mac(1)));
  assert.deepEqual([one.take().length, two.take().length], [0, 1]);
  now = 4 * MINUTE;
  two.port.receive(frame(mac(1), mac(3)));
  now = 8 * MINUTE;
  three.port.receive(frame(mac(3), mac(1)));
  assert.deepEqual([one.take().length, two.take().length], [0, 1]);
  now = 14 * MINUTE;
  three.port.receive(frame(mac(3), mac(1)));
  assert.deepEqual([one.take().length, two.take().length], [1, 1]);
  assert.equal(target.stationCount, 1);
});

Deno.test("a frame that is no frame, or comes from a group, is dropped", () => {
  const target = new Switch();
  const [one, two] = [new Cable(target), new Cable(target)];
  one.port.receive(new Uint8Array(0));
  one.port.receive(frame(mac(1), BROADCAST).subarray(0, 13));
  one.port.receive(new Uint8Array(MAX_FRAME + 1));
  one.port.receive(frame("03:00:00:00:00:01", BROADCAST));
  assert.deepEqual([two.take().length, one.port.counters.rxDropped, target.stationCount], [0, 4, 0]);
  one.port.receive(frame(mac(1), BROADCAST, Array<number>(MAX_FRAME - 14).fill(0)));
  assert.equal(two.take().length, 1);
});

Deno.test("a port whose queue is full loses frames, which are counted, and holds up nobody", () => {
  const target = new Switch();
  const [one, two, three] = [new Cable(target), new Cable(target), new Cable(target)];
  two.isFull = true;
  for (let count = 0; count < 5; count++) one.port.receive(frame(mac(1), BROADCAST));
  assert.equal(three.take().length, 5);
  assert.deepEqual([two.port.counters.txPackets, two.port.counters.txDropped], [0, 5]);
  three.port.receive(frame(mac(3), BROADCAST));
  // Who sends to it alone is told, and may try again.
  two.port.receive(frame(mac(2), BROADCAST));
  assert.equal(one.port.receive(frame(mac(1), mac(2))), false);
  assert.equal(one.port.receive(frame(mac(1), mac(3))), true);
  assert.equal(one.port.receive(frame(mac(1), BROADCAST)), true);
  two.isFull = false;
  assert.equal(one.port.receive(frame(mac(1), mac(2))), true);
  two.take();
  one.port.receive(frame(mac(1), BROADCAST));
  assert.equal(two.take().length, 1);
});

Deno.test("a port that makes up senders fills only its own share, and others stay known", () => {
  const target = new Switch();
  const [one, two, three] = [new Cable(target), new Cable(target), new Cable(target)];
  two.port.receive(frame(mac(2), BROADCAST));
  for (let count = 0; count < 20_000; count++) one.port.receive(frame(mac(1000 + count), BROADCAST));
  assert.equal(target.stationCount, 257);
  for (const cable of [one, two, three]) cable.take();
  one.port.receive(frame(mac(20_999), mac(2)));
  assert.deepEqual([two.take().length, three.take().length], [1, 0]);
  two.port.receive(frame(mac(2), mac(20_999)));
  assert.deepEqual([one.take().length, three.take().length], [1, 0]);
  // The first ones made way.
  two.port.receive(frame(mac(2), mac(1000)));
  assert.deepEqual([one.take().length, three.take().length], [1, 1]);
});

Deno.test("all ports together have bounded tables, and planned stations stay reachable", () => {
  const target = new Switch();
  const cables = Array.from({ length: 40 }, () => new Cable(target));
  cables.forEach(({ port }, index) => {
    for (let count = 0; count < 300; count++) {
      port.receive(frame(mac(index * 1000 + count), mac(index * 1000)));
    }
    for (const cable of cables) cable.take();
  });
  assert.equal(target.stationCount, 8192);
  const planned = new Cable(target, { macs: [mac(999_999)] });
  cables[0]!.port.receive(frame(mac(299), mac(999_999)));
  assert.deepEqual([planned.take().length, cables[1]!.take().length], [1, 0]);
});

Deno.test("a disposed port is out, and its stations are forgotten", () => {
  const target = new Switch();
  const [one, two, three] = [new Cable(target, { macs: [mac(1)] }), new Cable(target), new Cable(target)];
  two.port.receive(frame(mac(2), BROADCAST));
  one.port[Symbol.dispose]();
  two.port[Symbol.dispose]();
  for (const cable of [one, two, three]) cable.take();
  two.port.receive(frame(mac(2), BROADCAST));
  three.port.receive(frame(mac(3), BROADCAST));
  assert.deepEqual([one, two, three].map((cable) => cable.take().length), [0, 0, 0]);
  assert.equal(target.stationCount, 1);
  const again = new Cable(target, { macs: [mac(1)] });
  three.port.receive(frame(mac(3), mac(1)));
  assert.equal(again.take().length, 1);
});

Deno.test("a locked port sends as its planned addresses only", () => {
  const target = new Switch();
  const lock = { macs: [mac(1)], addresses: ["10.0.0.10"] };
  const [one, two] = [new Cable(target, lock), new Cable(target)];
  const good: Record<string, Uint8Array> = {
    ipv4: ipv4(mac(1), "10.0.0.10", "10.0.0.1"),
    arp: arp(mac(1), mac(1), "10.0.0.10"),
    probe: arp(mac(1), mac(1), "0.0.0.0"),
    dhcp: ipv4(mac(1), "0.0.0.0", "255.255.255.255", { protocol: 17, ports: [68, 67] }),
    "port 67 of TCP": ipv4(mac(1), "10.0.0.10", "10.0.0.1", { ports: [67, 68] }),
    "rest of a fragment": ipv4(mac(1), "10.0.0.10", "10.0.0.1", {
      protocol: 17,
      ports: [67, 68],
      fragment: 185,
    }),
  };
  for (const [name, each] of Object.entries(good)) {
    one.port.receive(each);
    assert.deepEqual(two.take(), [each], name);
  }
  const bad: Record<string, Uint8Array> = {
    "another MAC": ipv4(mac(9), "10.0.0.10", "10.0.0.1"),
    "another IP": ipv4(mac(1), "10.0.0.11", "10.0.0.1"),
    "no IP": ipv4(mac(1), "0.0.0.0", "255.255.255.255"),
    "no IP to one": ipv4(mac(1), "0.0.0.0", "10.0.0.1", { protocol: 17 }),
    "a DHCP server": ipv4(mac(1), "10.0.0.10", "255.255.255.255", { protocol: 17, ports: [67, 68] }),
    "ARP with another IP": arp(mac(1), mac(1), "10.0.0.1"),
    "ARP with another MAC inside": arp(mac(1), mac(2), "10.0.0.10"),
    "ARP for other hardware": arp(mac(1), mac(1), "10.0.0.10", [0, 6, 8, 0, 6, 4]),
    "ARP with other lengths": arp(mac(1), mac(1), "10.0.0.10", [0, 1, 8, 0, 4, 6]),
    "short ARP": arp(mac(1), mac(1), "10.0.0.10").subarray(0, 41),
    "short IPv4": ipv4(mac(1), "10.0.0.10", "10.0.0.1").subarray(0, 33),
    "IPv6 in disguise": ipv4(mac(1), "10.0.0.10", "10.0.0.1").map((byte, at) => at === 14 ? 0x65 : byte),
    "short header": ipv4(mac(1), "10.0.0.10", "10.0.0.1").map((byte, at) => at === 14 ? 0x44 : byte),
    IPv6: frame(mac(1), BROADCAST, Array<number>(40).fill(0), 0x86dd),
    VLAN: frame(mac(1), BROADCAST, [0, 1, 8, 0, ...ipv4(mac(1), "10.0.0.1", "10.0.0.1").slice(14)], 0x8100),
  };
  for (const [name, each] of Object.entries(bad)) {
    one.port.receive(each);
    assert.deepEqual(two.take(), [], name);
  }
  assert.equal(one.port.counters.rxSpoofed, Object.keys(bad).length);
  assert.equal(one.port.counters.rxPackets, Object.keys(good).length);
});

Deno.test("what is planned for one port is out of reach of all others", () => {
  const target = new Switch();
  const [one, two, three] = [new Cable(target, { macs: [mac(1)] }), new Cable(target), new Cable(target)];
  two.port.receive(frame(mac(1), BROADCAST));
  assert.equal(two.port.counters.rxSpoofed, 1);
  three.port.receive(frame(mac(3), mac(1)));
  assert.deepEqual([one.take().length, two.take().length], [1, 0]);
  // Nor does it get what is for stations that are not known.
  three.port.receive(frame(mac(3), mac(7)));
  assert.deepEqual([one.take().length, two.take().length], [0, 1]);
  assert.throws(
    () => new Cable(target, { macs: [mac(1).toUpperCase()] }),
    (error) => error instanceof MachineError && /another port has that Ethernet address/.test(error.message),
  );
  for (const wrong of ["", "02:00:00:00:00", "03:00:00:00:00:01", "02-00-00-00-00-01"]) {
    assert.throws(() => new Cable(target, { macs: [wrong] }), RangeError);
  }
});

Deno.test("a station that was heard elsewhere belongs to the port that it is planned for", () => {
  const target = new Switch();
  const [one, two] = [new Cable(target), new Cable(target)];
  one.port.receive(frame(mac(1), BROADCAST));
  const planned = new Cable(target, { macs: [mac(1)] });
  one.take();
  two.port.receive(frame(mac(2), mac(1)));
  assert.deepEqual([planned.take().length, one.take().length], [1, 0]);
});

Deno.test("a switch has no more ports than it can serve", () => {
  const target = new Switch();
  const cables = Array.from({ length: 1024 }, () => new Cable(target));
  assert.throws(() => new Cable(target), MachineError);
  cables[0]!.port[Symbol.dispose]();
  new Cable(target);
});
