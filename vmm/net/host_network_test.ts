import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { libc, Mapping, NET_HEADER_SIZE, NetworkInterfaces, Tap } from "../../ffi/mod.ts";
import { testInNetworkNamespace } from "../../ffi/network_namespace.ts";
import { MachineError } from "../errors.ts";
import { bridgeName, type BridgeSpec, canUseTap, HostNetwork, tapName } from "./host_network.ts";

const FORWARDING = "/proc/sys/net/ipv4/ip_forward";

const hasNft = (await Promise.all(
  [...(Deno.env.get("PATH") ?? "").split(":"), "/usr/sbin"].map((folder) =>
    Deno.stat(`${folder}/nft`).then(() => true, () => false)
  ),
)).includes(true);

const lan: BridgeSpec = {
  name: bridgeName("lan"),
  cidr: "10.20.0.0/24",
  gateway: "10.20.0.1",
  dns: "10.20.0.2",
  nat: true,
};
const closed: BridgeSpec = {
  name: bridgeName("closed"),
  cidr: "10.30.0.0/16",
  gateway: "10.30.0.1",
  dns: "10.30.0.2",
  nat: false,
};

const isInside = testInNetworkNamespace(import.meta.url, "networks of the host", hostTests);

if (!isInside) {
  Deno.test("names are short, and the same each time", () => {
    assert.match(bridgeName("0123456789abcdef"), /^ht-[0-9a-f]{10}$/);
    assert.match(tapName("0123456789abcdef", "eth0"), /^ht[0-9a-f]{13}$/);
    assert.equal(bridgeName("a"), bridgeName("a"));
    assert.notEqual(tapName("a", "eth0"), tapName("a", "eth1"));
  });

  Deno.test("canUseTap says in words what it found", () => {
    const { isUsable, detail } = canUseTap();
    if (isUsable) assert.match(detail, /^taps and bridges can be made; .*vhost-net/);
    else assert.match(detail, /^(Cannot .* as .*|taps are Linux's)/);
  });
}

/** A machine on a tap, made of frames. */
class Station {
  readonly mac: readonly number[];
  readonly address: readonly number[];
  readonly #buffer = new Mapping(4096);
  readonly #bytes = new Uint8Array(this.#buffer.buffer);

  constructor(readonly tap: Tap, address: string) {
    this.address = address.split(".").map(Number);
    this.mac = [2, 0, ...this.address];
  }

  send(frame: readonly number[]): void {
    this.#bytes.fill(0, 0, NET_HEADER_SIZE).set(frame, NET_HEADER_SIZE);
    const length = NET_HEADER_SIZE + frame.length;
    assert.equal(Number(libc().write(this.tap.fd.number, this.#buffer.pointer, BigInt(length))), length);
  }

  /** Sends a datagram by a gateway. */
  sendUdp(gateway: readonly number[], target: string, data: string): void {
    const payload = [...new TextEncoder().encode(data)];
    const to = target.split(".").map(Number);
    const ip = [0x45, 0, 0, 28 + payload.length, 0, 0, 0, 0, 64, 17, 0, 0, ...this.address, ...to];
    let sum = 0;
    for (let at = 0; at < 20; at += 2) sum += ip[at]! * 256 + ip[at + 1]!;
    sum = ~((sum & 0xffff) + (sum >> 16)) & 0xffff;
    ip.splice(10, 2, sum >> 8, sum & 0xff);
    const udp = [0x10, 0x92, 0x10, 0x92, 0, 8 + payload.length, 0, 0];
    this.send([...gateway, ...this.mac, 8, 0, ...ip, ...udp, ...payload]);
  }

  /** Asks who has an address. */
  sendArp(target: string): void {
    const to = target.split(".").map(Number);
    this.send([
      ...Array<number>(6).fill(0xff),
      ...this.mac,
      ...[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
      ...[...this.mac, ...this.address, 0, 0, 0, 0, 0, 0, ...to],
    ]);
  }

  /** Takes the next IPv4 datagram or ARP packet, and answers the latter as the one who was asked for. */
  async next(): Promise<string> {
    while (true) {
      const length = Number(libc().read(this.tap.fd.number, this.#buffer.pointer, 4096n));
      if (length < 0) {
        await new Promise((resolve) => setTimeout(resolve, 1));
        continue;
      }
      const frame = [...this.#bytes.subarray(NET_HEADER_SIZE, length)];
      const kind = frame[12]! * 256 + frame[13]!;
      if (kind === 0x0806 && frame[21] === 2) return `arp reply ${frame.slice(22, 28).join(":")}`;
      if (kind === 0x0806) {
        const [mac, ip] = [frame.slice(22, 28), frame.slice(28, 32)];
        const asked = frame.slice(38, 42);
        const start = [...mac, ...this.mac, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
        this.send([...start, ...this.mac, ...asked, ...mac, ...ip]);
        return `arp ${asked.join(".")}`;
      }
      if (kind === 0x0800 && frame[23] === 17) {
        const text = new TextDecoder().decode(Uint8Array.from(frame.slice(42)));
        return `udp ${frame.slice(26, 30).join(".")} ${text}`;
      }
    }
  }
}

function macOf(interfaceName: string): number[] {
  const text = Deno.readTextFileSync(`/sys/class/net/${interfaceName}/address`);
  return text.trim().split(":").map((byte) => parseInt(byte, 16));
}

/** A host network whose lock is in a folder of its own. */
async function withHost(
  test: (host: HostNetwork, interfaces: NetworkInterfaces, lock: string) => Promise<void>,
): Promise<void> {
  const folder = await Deno.makeTempDir();
  const lock = `${folder}/network.lock`;
  using interfaces = new NetworkInterfaces();
  try {
    await test(new HostNetwork({ lock }), interfaces, lock);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function tables(): Promise<string> {
  const { stdout } = await new Deno.Command("nft", {
    args: ["list", "ruleset"],
    env: { PATH: `${Deno.env.get("PATH")}:/usr/sbin` },
  }).output();
  return new TextDecoder().decode(stdout);
}

function hostTests(): void {
  Deno.test("taps can be used here", () => {
    const { isUsable, detail } = canUseTap();
    assert.ok(isUsable, detail);
  });

  Deno.test("a bridge without a way outside comes, stays while a NIC is in it, and goes", () =>
    withHost(async (host, interfaces) => {
      Deno.writeTextFileSync(FORWARDING, "0");
      await host.ensureBridge(closed);
      await host.ensureBridge(closed);
      const { name } = closed;
      assert.deepEqual(interfaces.address(name), { address: "10.30.0.1", mask: "255.255.0.0" });
      assert.deepEqual(interfaces.address(`${name}:2`), { address: "10.30.0.2", mask: "255.255.0.0" });
      assert.ok(interfaces.isUp(name));
      const mac = macOf(name);
      {
        using tap = await host.attachTap(closed, "tap0");
        assert.deepEqual(macOf(name), mac);
        await assert.rejects(host.attachTap(closed, "tap0"), (error) => {
          assert.ok(error instanceof MachineError);
          assert.match(error.message, /^Cannot open the tap "tap0" as another process uses it/);
          return true;
        });
        assert.equal(await host.releaseBridge(name), false);
        assert.ok(!tap.fd.isClosed);
      }
      assert.equal(await host.releaseBridge(name), true);
      assert.ok(!interfaces.has(name));
      assert.equal(await host.releaseBridge(name), true);
      assert.equal(Deno.readTextFileSync(FORWARDING).trim(), "0");
    }));

  Deno.test("many at once, and one that died half-way, end up with the same bridge", () =>
    withHost(async (host, interfaces) => {
      interfaces.addBridge(closed.name);
      interfaces.setAddress(closed.name, "10.99.0.1", "255.255.255.0");
      interfaces.setUp(closed.name, true);
      const taps = await Promise.all(
        Array.from({ length: 8 }, (_, index) => host.attachTap(closed, `tap${index}`)),
      );
      assert.equal(interfaces.address(closed.name)?.address, "10.30.0.1");
      const ports = [...Deno.readDirSync(`/sys/class/net/${closed.name}/brif`)];
      assert.equal(ports.length, 8);
      for (const tap of taps) tap[Symbol.dispose]();
      assert.ok(await host.releaseBridge(closed.name));
    }));

  Deno.test("a network that overlaps with another one is refused", () =>
    withHost(async (host) => {
      await host.ensureBridge(closed);
      const other = { ...closed, name: bridgeName("other"), cidr: "10.30.7.0/24", gateway: "10.30.7.1" };
      await assert.rejects(host.ensureBridge(other), {
        name: "MachineError",
        message:
          "Cannot make the network 10.30.7.0/24 as it overlaps with 10.30.0.1/16 of the host's interface " +
          `"${closed.name}": choose another cidr`,
      });
      await host.releaseBridge(closed.name);
    }));

  Deno.test("what others have made is plugged in, and the bridge made anew where it has gone meanwhile", () =>
    withHost(async (host, interfaces) => {
      await host.ensureBridge(closed);
      using _tap = Tap.open("vif1.0");
      assert.ok(await host.releaseBridge(closed.name));
      await host.plugInterface(closed, "vif1.0");
      assert.ok(interfaces.isUp("vif1.0"));
      assert.ok(!(await host.releaseBridge(closed.name)));
      await assert.rejects(host.plugInterface(closed, "vif2.0"), /vif2\.0/);
    }));

  Deno.test("without nft, only a network that the host keeps inside anyway is made", () =>
    withHost(async (_, interfaces, lock) => {
      const host = new HostNetwork({ lock, nft: "/nonexistent/nft" });
      const refusal = /^MachineError: Cannot set .* as nft is not installed: run apt-get install nftables/;
      Deno.writeTextFileSync(FORWARDING, "0");
      await assert.rejects(host.ensureBridge(lan), refusal);
      assert.ok(!interfaces.has(lan.name));
      await host.ensureBridge(closed);
      Deno.writeTextFileSync(FORWARDING, "1");
      await assert.rejects(host.attachTap(closed, "tap0"), refusal);
      assert.ok(!interfaces.has("tap0"));
      assert.ok(await host.releaseBridge(closed.name));
    }));

  Deno.test({
    name: `guests reach the outside as the host, and nobody reaches them${
      hasNft ? "" : " (skipped: nft is not installed)"
    }`,
    ignore: !hasNft,
    fn: () =>
      withHost(async (host, interfaces) => {
        const uplink = Tap.open("uplink");
        interfaces.setAddress("uplink", "10.99.0.254", "255.255.255.0");
        interfaces.setUp("uplink", true);
        const outside = new Station(uplink, "10.99.0.1");
        const inside = new Station(await host.attachTap(lan, "tap0"), "10.20.0.10");
        const shut = new Station(await host.attachTap(closed, "tap1"), "10.30.0.10");
        assert.equal(Deno.readTextFileSync(FORWARDING).trim(), "1");
        assert.match(await tables(), /masquerade/);
        const gateway = macOf(lan.name);

        // The gateway and the name server answer.
        for (const address of [lan.gateway, lan.dns]) {
          inside.sendArp(address);
          assert.equal(await inside.next(), `arp reply ${gateway.join(":")}`);
        }
        // Out as the host, and the answer back in.
        inside.sendUdp(gateway, "10.99.0.1", "hello");
        assert.equal(await outside.next(), "arp 10.99.0.1");
        assert.equal(await outside.next(), "udp 10.99.0.254 hello");
        outside.sendUdp(macOf("uplink"), "10.99.0.254", "answer");
        assert.equal(await inside.next(), "udp 10.99.0.1 answer");
        // Nobody comes in unasked, neither from outside nor from another network; nor does the closed one get out, nor
        // one who lies about where he is. What the host sends itself afterwards comes first.
        outside.sendUdp(macOf("uplink"), "10.20.0.10", "intruder");
        shut.sendUdp(macOf(closed.name), "10.20.0.10", "neighbour");
        shut.sendUdp(macOf(closed.name), "10.99.0.1", "escape");
        inside.sendUdp(gateway, "10.30.0.10", "neighbour");
        new Station(inside.tap, "10.30.0.99").sendUdp(gateway, "10.99.0.1", "forged");
        const socket = createSocket("udp4");
        for (const [station, address] of [[inside, "10.20.0.10"], [outside, "10.99.0.1"]] as const) {
          socket.send("marker", 4242, address);
          assert.match(await station.next(), /^udp .* marker$/);
        }
        socket.send("marker", 4242, "10.30.0.10");
        assert.equal(await shut.next(), "arp 10.30.0.10");
        assert.match(await shut.next(), /^udp .* marker$/);
        socket.close();

        for (const { tap } of [inside, shut, outside]) tap[Symbol.dispose]();
        for (const { name } of [lan, closed]) assert.ok(await host.releaseBridge(name));
        assert.equal((await tables()).trim(), "");
      }),
  });
}
