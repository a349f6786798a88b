import assert from "node:assert/strict";
import { type Claim, findWrongClaims, hasHeader, layoutClaims } from "./c_compiler.ts";
import { Fd, Mapping } from "./fd.ts";
import { VHOST, Vhost, VHOST_LAYOUTS, type VhostMemory } from "./vhost.ts";

const hasHeaders = await hasHeader("linux/vhost.h");
const whyNoDevice = await Deno.open("/dev/vhost-net", { read: true, write: true }).then(
  (file) => void file.close(),
  (error: Error) => error.message,
);

Deno.test({
  name: `vhost's tables are those of the C headers${
    hasHeaders ? "" : " (skipped: no C compiler with linux/vhost.h)"
  }`,
  ignore: !hasHeaders,
  async fn() {
    const requests = Object.entries(VHOST).map(([name, value]): Claim => [`(unsigned)VHOST_${name}`, value]);
    assert.deepEqual(
      await findWrongClaims(["sys/ioctl.h", "linux/vhost.h"], [
        ...VHOST_LAYOUTS.flatMap(layoutClaims),
        ...requests,
      ]),
      [],
    );
  },
});

Deno.test({
  name: `vhost-net takes memory and queues, and gives queues back where they were${
    whyNoDevice === undefined ? "" : ` (skipped: ${whyNoDevice})`
  }`,
  ignore: whyNoDevice !== undefined,
  fn() {
    using mapping = new Mapping(65536);
    const memory: VhostMemory = {
      regions: [{ address: 0, offset: 0, length: 65536 }],
      offset: (address) => address,
      address: Number(mapping.address),
    };
    using vhost = new Vhost("/dev/vhost-net");
    using kick = Fd.event();
    using call = Fd.event();
    vhost.setFeatures(vhost.features & (1n << 32n));
    vhost.setMemory(memory);
    const queue = { size: 256, descriptorTable: 0, availableRing: 4096, usedRing: 8192, nextAvailable: 7 };
    for (const index of [0, 1]) vhost.setQueue(memory, { index, ...queue }, { kick, call });
    for (const index of [0, 1]) assert.equal(vhost.clearQueue(index), 7);
    assert.throws(() => vhost.setNetBackend(0, kick), /VHOST_NET_SET_BACKEND\) failed with/);
  },
});
