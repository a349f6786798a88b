import assert from "node:assert/strict";
import { type Claim, findWrongClaims, hasHeader, layoutClaims } from "./c_compiler.ts";
import { SysError } from "./errno.ts";
import { Mapping } from "./fd.ts";
import { errno, libc } from "./libc.ts";
import { testInNetworkNamespace } from "./network_namespace.ts";
import {
  IFF,
  ifreq,
  MAX_INTERFACE_NAME,
  NET_HEADER_SIZE,
  NetworkInterfaces,
  SIOC,
  Tap,
  TUN,
  TUN_F,
} from "./tap.ts";

const hasHeaders = await hasHeader("linux/if_tun.h");

const isInside = testInNetworkNamespace(import.meta.url, "taps and bridges of the kernel", () => {
  Deno.test("a tap is made, attached once, and gone when it is closed", () => {
    using interfaces = new NetworkInterfaces();
    {
      using tap = Tap.open("tap0");
      assert.ok(interfaces.has("tap0"));
      assert.throws(() => Tap.open("tap0"), {
        message: 'Cannot open the tap "tap0" as another process uses it: end that process first',
      });
      tap.setOffload(TUN_F.CSUM | TUN_F.TSO4 | TUN_F.TSO6 | TUN_F.TSO_ECN);
      assert.throws(() => tap.setOffload(1 << 30), SysError);
      assert.equal(tap.readCounters().rxPackets, 0);
      // Nothing is there yet, and a read does not wait.
      using memory = new Mapping(4096);
      assert.equal(libc().read(tap.fd.number, memory.pointer, 4096n), -1n);
      assert.equal(errno(), 11);
    }
    assert.ok(!interfaces.has("tap0"));
  });

  Deno.test("a persistent tap stays, and is found again by name", () => {
    using interfaces = new NetworkInterfaces();
    Tap.open("tap1", { isPersistent: true })[Symbol.dispose]();
    assert.ok(interfaces.has("tap1"));
    Tap.open("tap1")[Symbol.dispose]();
    assert.ok(interfaces.has("tap1"));
    Tap.open("tap1", { isPersistent: false })[Symbol.dispose]();
    assert.ok(!interfaces.has("tap1"));
  });

  Deno.test("a bridge gets addresses and ports, and is removed", () => {
    using interfaces = new NetworkInterfaces();
    interfaces.addBridge("br-0123456789");
    interfaces.addBridge("br-0123456789");
    interfaces.setMac("br-0123456789", "02:00:00:00:00:07");
    assert.equal(interfaces.address("br-0123456789"), undefined);
    interfaces.setAddress("br-0123456789", "10.20.0.1", "255.255.255.0");
    interfaces.setAddress("br-0123456789:2", "10.20.0.2", "255.255.255.0");
    interfaces.setMtu("br-0123456789", 1400);
    interfaces.setUp("br-0123456789", true);
    assert.ok(interfaces.isUp("br-0123456789"));
    assert.deepEqual(interfaces.address("br-0123456789"), { address: "10.20.0.1", mask: "255.255.255.0" });
    assert.deepEqual(interfaces.address("br-0123456789:2"), { address: "10.20.0.2", mask: "255.255.255.0" });
    using tap = Tap.open("tap2");
    interfaces.addToBridge("br-0123456789", tap.name);
    interfaces.addToBridge("br-0123456789", tap.name);
    const ports = [...Deno.readDirSync("/sys/class/net/br-0123456789/brif")].map(({ name }) => name);
    assert.deepEqual(ports, ["tap2"]);
    assert.throws(() => interfaces.removeBridge("br-0123456789"), /another process uses it/);
    interfaces.setUp("br-0123456789", false);
    interfaces.removeBridge("br-0123456789");
    interfaces.removeBridge("br-0123456789");
    assert.ok(!interfaces.has("br-0123456789"));
  });

  Deno.test("errors say in words what is wrong", () => {
    using interfaces = new NetworkInterfaces();
    assert.throws(() => Tap.open("a-name-that-is-too-long"), /names have 1 to 15 bytes/);
    assert.throws(() => Tap.open("lo"), /another interface of this name is there/);
    assert.throws(() => interfaces.setUp("absent", true), /as there is no such interface/);
  });
});

if (!isInside) {
  Deno.test({
    name: `tables of interfaces are those of the C headers${
      hasHeaders ? "" : " (skipped: no C compiler with linux/if_tun.h)"
    }`,
    ignore: !hasHeaders,
    async fn() {
      const named = (prefix: string, values: Readonly<Record<string, number>>): Claim[] =>
        Object.entries(values).map(([name, value]) => [`${prefix}${name}`, value]);
      assert.deepEqual(
        await findWrongClaims(
          [
            "sys/socket.h",
            "sys/ioctl.h",
            "linux/if.h",
            "linux/if_tun.h",
            "linux/sockios.h",
            "linux/virtio_net.h",
          ],
          [
            ...layoutClaims(ifreq),
            ...named("(unsigned)TUN", TUN),
            ...named("TUN_F_", TUN_F),
            ...named("IFF_", IFF),
            ...named("SIOC", SIOC),
            ["IFNAMSIZ - 1", MAX_INTERFACE_NAME],
            ["sizeof(struct virtio_net_hdr_v1)", NET_HEADER_SIZE],
          ],
        ),
        [],
      );
    },
  });
}
