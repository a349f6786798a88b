import assert from "node:assert/strict";
import { FakeHypervisor } from "./fake_hypervisor.ts";
import { Grants } from "./gntdev.ts";
import { Xen } from "./xen.ts";

function domain(): { readonly fake: FakeHypervisor; readonly domid: number } {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  const domid = xen.createDomain({ handle: new Uint8Array(16), type: "pvh", vcpus: 1 });
  xen.setMaxMemory(domid, 4096);
  xen.setPagingPool(domid, 2 ** 20);
  xen.populate(domid, [0n], 9);
  return { fake, domid };
}

Deno.test("A page that a guest has granted is the guest's page", () => {
  const { fake, domid } = domain();
  fake.grant(domid, 8, 5);
  fake.page(domid, 5)[1] = 2;
  using grants = new Grants(fake.grantDevice());
  const mapping = grants.map(domid, [8]);
  assert.equal(mapping.bytes.length, 4096);
  assert.equal(mapping.bytes[1], 2);
  mapping.bytes[0] = 1;
  assert.equal(fake.page(domid, 5)[0], 1);
  assert.equal(fake.get(domid).mappings, 1);
  mapping[Symbol.dispose]();
  mapping[Symbol.dispose]();
  assert.equal(fake.get(domid).mappings, 0);
});

Deno.test("Several pages follow one another, in the order of their grants", () => {
  const { fake, domid } = domain();
  fake.grant(domid, 8, 5);
  fake.grant(domid, 9, 3);
  fake.page(domid, 5)[0] = 50;
  fake.page(domid, 3)[0] = 30;
  using grants = new Grants(fake.grantDevice());
  {
    using mapping = grants.map(domid, [9, 8]);
    assert.deepEqual([mapping.bytes[0], mapping.bytes[4096]], [30, 50]);
    mapping.bytes[4097] = 51;
  }
  assert.deepEqual([...fake.page(domid, 5).subarray(0, 2)], [50, 51]);
});

Deno.test("A page that is not granted is refused, and nothing stays behind", () => {
  const { fake, domid } = domain();
  fake.grant(domid, 8, 5);
  const calls: string[] = [];
  const device = fake.grantDevice();
  using grants = new Grants({
    ...device,
    request: (request, argument, name) => {
      calls.push(name);
      device.request(request, argument, name);
    },
  });
  assert.throws(
    () => grants.map(domid, [8, 10]),
    /^Error: Cannot map 2 pages of domain 1 \(grants 8, 10\) as Xen refuses \(EINVAL\): the domain has to grant them first$/,
  );
  assert.deepEqual(calls, ["GNTDEV_MAP_GRANT_REF", "GNTDEV_UNMAP_GRANT_REF"]);
});

Deno.test("A mapping can be given back after the device", () => {
  const { fake, domid } = domain();
  fake.grant(domid, 8, 5);
  const device = fake.grantDevice();
  let isClosed = false;
  const grants = new Grants({
    ...device,
    request: (request, argument, name) => {
      assert.equal(isClosed, false);
      device.request(request, argument, name);
    },
    [Symbol.dispose]: () => {
      isClosed = true;
    },
  });
  const mapping = grants.map(domid, [8]);
  grants[Symbol.dispose]();
  mapping[Symbol.dispose]();
  assert.equal(fake.get(domid).mappings, 0);
});
