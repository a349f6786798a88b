import assert from "node:assert/strict";
import { SysError } from "../errno.ts";
import { type EventChannelDevice, EventChannels, EVTCHN } from "./evtchn.ts";
import { FakeHypervisor } from "./fake_hypervisor.ts";
import { Xen } from "./xen.ts";

const isLinux = Deno.build.os === "linux" && Deno.build.arch === "x86_64";

/** A domain with two ports that are open for this one. */
function domain(): { readonly fake: FakeHypervisor; readonly domid: number } {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  const domid = xen.createDomain({ handle: new Uint8Array(16), type: "pv", vcpus: 1 });
  xen.allocateUnbound(domid, 0);
  fake.openPort(domid);
  return { fake, domid };
}

Deno.test({
  name: "Events come by the local port and are told of again, and go to the guest",
  ignore: !isLinux,
  fn() {
    const { fake, domid } = domain();
    using channels = new EventChannels(fake.eventChannels());
    assert.deepEqual(channels.take(), []);
    const [first, second] = [channels.bindInterdomain(domid, 1), channels.bindInterdomain(domid, 2)];
    assert.deepEqual([...channels.bound], [first, second]);
    // Whoever connects looks once.
    assert.deepEqual(channels.take(), [first, second]);
    fake.raise(domid, 2);
    fake.raise(domid, 2);
    assert.deepEqual(channels.take(), [second]);
    // The second event came while the port was closed.
    assert.deepEqual(channels.take(), [second]);
    assert.deepEqual(channels.take(), []);
    fake.raise(domid, 2);
    assert.deepEqual(channels.take(), [second]);
    channels.notify(first);
    assert.equal(fake.get(domid).ports.get(1)?.events, 1);
    assert.throws(
      () => channels.bindInterdomain(domid, 1),
      /EVTCHN_BIND_INTERDOMAIN failed with EINVAL/,
    );
    channels.unbind(first);
    assert.deepEqual([...channels.bound], [second]);
    assert.throws(() => channels.notify(first), SysError);
    assert.equal(channels.bindInterdomain(domid, 1), second + 1);
  },
});

Deno.test({
  name: "After more events than are kept, all ports count as told of",
  ignore: !isLinux,
  fn() {
    const { fake, domid } = domain();
    using channels = new EventChannels(fake.eventChannels(1));
    const ports = [channels.bindInterdomain(domid, 1), channels.bindInterdomain(domid, 2)];
    assert.deepEqual(channels.take(), ports);
    fake.raise(domid, 2);
    assert.deepEqual(channels.take(), [ports[1]]);
  },
});

Deno.test({
  name: "Ports are free again when the process has died",
  ignore: !isLinux,
  fn() {
    const { fake, domid } = domain();
    {
      using channels = new EventChannels(fake.eventChannels());
      channels.bindInterdomain(domid, 1);
    }
    using channels = new EventChannels(fake.eventChannels());
    channels.bindInterdomain(domid, 1);
  },
});

Deno.test("Ports are opened again once they were taken, and those that were unbound are let be", () => {
  const calls: string[] = [];
  const device: EventChannelDevice = {
    fd: 7,
    request: (request, words) => {
      calls.push(`${request.toString(16)} ${words}`);
      return request === EVTCHN.BIND_VIRQ ? 3 : request === EVTCHN.BIND_UNBOUND_PORT ? 4 : 0;
    },
    read: (ports) => {
      ports.set([4, 9, 3, 4]);
      return 4;
    },
    write: (ports) => void calls.push(`write ${ports}`),
    [Symbol.dispose]: () => void calls.push("close"),
  };
  {
    using channels = new EventChannels(device);
    assert.equal(channels.fd, 7);
    channels.bindVirq(5);
    channels.bindUnbound(6);
    assert.deepEqual(channels.take(), [4, 3]);
  }
  assert.deepEqual(calls, ["44500 5", "44502 6", "write 4,9,3,4", "close"]);
});
