import assert from "node:assert/strict";
import { join } from "node:path";
import { formatIpv4, parseIpv4 } from "../../dsl/mod.ts";
import { MachineError } from "../errors.ts";
import {
  ARP_OPERATION,
  BROADCAST_MAC,
  buildArp,
  buildEthernet,
  buildUdp,
  parseArp,
  parseEthernet,
  parseIpv4Packet,
  parseMac,
  parseUdp,
} from "./frame.ts";
import { UserNetwork } from "./user_network.ts";
import { UserNetworkPort } from "./user_network_client.ts";
import { JsonLines, type NicAttachment, userNetworkFiles } from "./user_network_protocol.ts";

const SPEC = { cidr: "10.20.0.0/24", gateway: "10.20.0.1", dns: "10.20.0.2", nat: false };

function nic(number: number, more: Partial<NicAttachment> = {}): NicAttachment {
  return {
    machine: `machine-${number}`,
    nic: "eth0",
    mac: `02:00:00:00:00:${number}`,
    ip: `10.20.0.${number}`,
    hostname: `host-${number}`,
    forwards: [],
    ...more,
  };
}

/** A frame from one NIC to another. */
function hello(from: number, to: number, source = from, sourceMac = `02:00:00:00:00:${from}`): Uint8Array {
  return buildUdp({
    sourceMac: parseMac(sourceMac),
    destinationMac: parseMac(`02:00:00:00:00:${to}`),
    source: parseIpv4(`10.20.0.${source}`),
    destination: parseIpv4(`10.20.0.${to}`),
  }, { sourcePort: 7, destinationPort: 7, payload: Uint8Array.of(from, to) });
}

class Fixture implements AsyncDisposable {
  readonly folder: string = Deno.makeTempDirSync();
  readonly warnings: string[] = [];
  readonly network: UserNetwork = new UserNetwork({
    folder: this.folder,
    spec: SPEC,
    log: { info: () => {}, warn: (message) => this.warnings.push(message) },
  });

  async connect(attachment: NicAttachment): Promise<Guest> {
    return new Guest(await UserNetworkPort.connect(this.folder, attachment));
  }

  async control(): Promise<JsonLines> {
    const path = userNetworkFiles(this.folder).control;
    return new JsonLines(await Deno.connect({ transport: "unix", path }));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.network[Symbol.dispose]();
    await Deno.remove(this.folder, { recursive: true });
  }
}

/** The guest at a port: what it hears, it keeps. */
class Guest implements Disposable {
  readonly port: UserNetworkPort;
  readonly #heard: Uint8Array[] = [];
  #wake = () => {};

  constructor(port: UserNetworkPort) {
    this.port = port;
    port.onFrame = (frame) => {
      this.#heard.push(frame.slice());
      this.#wake();
    };
  }

  async hear(): Promise<Uint8Array> {
    while (this.#heard.length === 0) await new Promise<void>((resolve) => this.#wake = resolve);
    return this.#heard.shift()!;
  }

  [Symbol.dispose](): void {
    this.port[Symbol.dispose]();
  }
}

async function ask(client: JsonLines, request: unknown): Promise<unknown> {
  await client.write(request);
  return await client.read();
}

async function refusal(client: JsonLines, request: unknown): Promise<string> {
  return (await ask(client, request) as { error: string }).error;
}

Deno.test("NICs of a network reach each other, and nobody sends as another", async () => {
  await using fixture = new Fixture();
  using one = await fixture.connect(nic(10));
  using two = await fixture.connect(nic(11));
  const bad = [
    hello(10, 11, 12),
    hello(10, 11, 1),
    hello(10, 11, 10, "02:00:00:00:00:12"),
    buildArp(BROADCAST_MAC, {
      operation: ARP_OPERATION.REPLY,
      senderMac: parseMac("02:00:00:00:00:10"),
      senderIp: parseIpv4(SPEC.gateway),
      targetMac: 0,
      targetIp: 0,
    }),
  ];
  for (const frame of [...bad, hello(10, 11)]) assert.ok(one.port.send(frame));
  // Frames keep their order: the first one that is heard is the good one.
  assert.deepEqual(await two.hear(), hello(10, 11));
  assert.ok(two.port.send(hello(11, 10)));
  assert.deepEqual(await one.hear(), hello(11, 10));
});

Deno.test("the gateway answers for its addresses, and DHCP tells what is planned", async () => {
  await using fixture = new Fixture();
  using guest = await fixture.connect(nic(10));
  const mac = parseMac("02:00:00:00:00:10");
  guest.port.send(buildArp(BROADCAST_MAC, {
    operation: ARP_OPERATION.REQUEST,
    senderMac: mac,
    senderIp: parseIpv4("10.20.0.10"),
    targetMac: 0,
    targetIp: parseIpv4(SPEC.gateway),
  }));
  const answer = parseArp(parseEthernet(await guest.hear())!.payload)!;
  assert.deepEqual([answer.operation, answer.senderIp], [ARP_OPERATION.REPLY, parseIpv4(SPEC.gateway)]);
  const discover = new Uint8Array(300);
  discover.set([1, 1, 6, 0]);
  discover.set([2, 0, 0, 0, 0, 0x10], 28);
  discover.set([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255], 236);
  guest.port.send(buildUdp({
    sourceMac: mac,
    destinationMac: BROADCAST_MAC,
    source: 0,
    destination: 0xffff_ffff,
  }, { sourcePort: 68, destinationPort: 67, payload: discover }));
  const offer = parseUdp(parseIpv4Packet(parseEthernet(await guest.hear())!.payload)!)!.payload;
  assert.equal(formatIpv4(new DataView(offer.buffer, offer.byteOffset).getUint32(16)), "10.20.0.10");
});

Deno.test("what no frame is cuts off its sender only, who may come again", async () => {
  await using fixture = new Fixture();
  using one = await fixture.connect(nic(10));
  using two = await fixture.connect(nic(11));
  using hostile = await fixture.control();
  const { frames } = await ask(hostile, { attach: nic(12) }) as { frames: string };
  using connection = await Deno.connect({ transport: "unix", path: frames });
  await connection.write(Uint8Array.of(255, 255, 255, 255, 1, 2, 3));
  assert.equal(await connection.read(new Uint8Array(1)).catch(() => null), null);
  assert.match(
    fixture.warnings.join("\n"),
    /machine-12\/eth0 is cut off: Cannot take a frame of 4294967295 bytes/,
  );
  one.port.send(hello(10, 11));
  assert.deepEqual(await two.hear(), hello(10, 11));
  using again = await Deno.connect({ transport: "unix", path: frames });
  const frame = hello(12, 11);
  await again.write(Uint8Array.from([0, 0, 0, frame.length, ...frame]));
  assert.deepEqual(await two.hear(), frame);
});

Deno.test("the last one to connect for frames is served", async () => {
  await using fixture = new Fixture();
  using two = await fixture.connect(nic(11));
  using control = await fixture.control();
  const { frames } = await ask(control, { attach: nic(10) }) as { frames: string };
  using first = await Deno.connect({ transport: "unix", path: frames });
  using second = await Deno.connect({ transport: "unix", path: frames });
  assert.equal(await first.read(new Uint8Array(1)).catch(() => null), null);
  two.port.send(hello(11, 10));
  const heard = new Uint8Array(100);
  assert.equal(await second.read(heard), 4 + hello(11, 10).length);
});

Deno.test("a NIC leaves with its connection, and its place is free at once", async () => {
  await using fixture = new Fixture();
  for (let round = 0; round < 20; round++) {
    using _guest = await fixture.connect(nic(10));
  }
  using other = await fixture.connect(nic(11, { mac: "02:00:00:00:00:10", ip: "10.20.0.10" }));
  assert.ok(other.port.isUp);
  // Of those that have left nothing stays.
  const sockets = [...Deno.readDirSync(fixture.folder)].filter(({ name }) => name.endsWith(".sock"));
  assert.equal(sockets.length, 2);
});

Deno.test("forwards lead to the guest, change while it runs, and end with it", async () => {
  await using fixture = new Fixture();
  const ports = [0, 0].map(() => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    return listener.addr.port;
  });
  const forward = (host: number) => ({ protocol: "tcp" as const, address: "127.0.0.1", host, guest: 80 });
  {
    using guest = await fixture.connect(nic(10, { forwards: [forward(ports[0]!)] }));
    {
      using _client = await Deno.connect({ hostname: "127.0.0.1", port: ports[0]! });
      // The gateway looks for the guest before it connects.
      const asked = parseArp(parseEthernet(await guest.hear())!.payload);
      assert.equal(asked?.targetIp, parseIpv4("10.20.0.10"));
    }
    await assert.rejects(
      fixture.connect(nic(11, { forwards: [forward(ports[0]!)] })),
      (error) => error instanceof MachineError && /is in use|already/.test(error.message),
    );
    await guest.port.setForwards([forward(ports[1]!)]);
    await assert.rejects(
      Deno.connect({ hostname: "127.0.0.1", port: ports[0]! }),
      Deno.errors.ConnectionRefused,
    );
    (await Deno.connect({ hostname: "127.0.0.1", port: ports[1]! })).close();
  }
  // Whoever comes next gets the port, as soon as the guest has left.
  using next = await fixture.connect(nic(10, { forwards: [forward(ports[1]!)] }));
  assert.ok(next.port.isUp);
});

Deno.test("requests that are wrong are refused with a reason", async () => {
  await using fixture = new Fixture();
  using control = await fixture.control();
  const attachments: [Record<string, unknown>, RegExp][] = [
    [{ mac: "03:00:00:00:00:01" }, /mac: Value must be a unicast Ethernet address/],
    [{ ip: "10.20.0.1" }, /give it an address of a host, other than 10\.20\.0\.1 and 10\.20\.0\.2$/],
    [{ ip: "10.20.0.2" }, /other than/],
    [{ ip: "10.20.0.0" }, /other than/],
    [{ ip: "10.20.0.255" }, /other than/],
    [{ ip: "10.21.0.5" }, /in the network 10\.20\.0\.0\/24/],
    [{ machine: "a/b" }, /machine: Value must be/],
    [{ hostname: "a b" }, /hostname: Value must be a host name/],
    [
      { forwards: [{ protocol: "sctp", address: "127.0.0.1", host: 1, guest: 1 }] },
      /forwards\[0\]\.protocol/,
    ],
    [
      { forwards: [{ protocol: "tcp", address: "127.0.0.1", host: 70_000, guest: 1 }] },
      /forwards\[0\]\.host/,
    ],
    [{ more: 1 }, /more: Unknown field/],
  ];
  for (const [change, reason] of attachments) {
    assert.match(await refusal(control, { attach: { ...nic(10), ...change } }), reason);
  }
  assert.match(await refusal(control, { forwards: [] }), /attach it first/);
  assert.match(await refusal(control, { dance: 1 }), /Cannot do "dance"/);
  assert.match(await refusal(control, { status: {}, forwards: [] }), /one request a line/);
  for (const request of [null, 1, [], "attach"]) assert.match(await refusal(control, request), /^Cannot /);
  assert.deepEqual(await ask(control, { status: {} }), { ...SPEC, clients: 1 });
  assert.ok(
    (await ask(control, { attach: nic(10) }) as { frames: string }).frames.startsWith(fixture.folder),
  );
  assert.match(await refusal(control, { attach: nic(11) }), /open one for each/);
  // A line without an end: it may be cut off before all is written.
  await control.write("{}".repeat(600_000)).catch(() => {});
  assert.equal(await control.read(), undefined);
});

Deno.test("what a killed process left is no hindrance", async () => {
  const folder = await Deno.makeTempDir();
  const log = { info: () => {}, warn: () => {} };
  try {
    for (const name of ["control.sock", "0.sock", "7.sock"]) {
      Deno.listen({ transport: "unix", path: join(folder, name) }).close();
    }
    using _network = new UserNetwork({ folder, spec: SPEC, log });
    assert.deepEqual([...Deno.readDirSync(folder)].map(({ name }) => name), ["control.sock"]);
    using port = await UserNetworkPort.connect(folder, nic(10));
    assert.ok(port.isUp);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("a frame of another kind of network does not pass a NIC of this one", async () => {
  await using fixture = new Fixture();
  using one = await fixture.connect(nic(10));
  using two = await fixture.connect(nic(11));
  one.port.send(buildEthernet({
    destination: BROADCAST_MAC,
    source: parseMac("02:00:00:00:00:10"),
    type: 0x86dd,
    payload: new Uint8Array(64),
  }));
  one.port.send(hello(10, 11));
  assert.deepEqual(await two.hear(), hello(10, 11));
});
