import assert from "node:assert/strict";
import { FakeHypervisor, SimulatedDeath, XEN_ERRNO } from "./fake_hypervisor.ts";
import { XEN_INTERFACES } from "./layouts.ts";
import { XenError } from "./privcmd.ts";
import { Xen } from "./xen.ts";

const HANDLE = new TextEncoder().encode("hypertop\x01\x02\x03\x04\x05\x06\x07\x08");
const VERSIONS = XEN_INTERFACES.map(({ version }) => version);

function isCode(code: string): (error: unknown) => boolean {
  return (error) => error instanceof XenError && error.code === code;
}

/** Makes a PVH domain with 4 MiB, as far as it can be unpaused. */
function build(xen: Xen): number {
  const domid = xen.createDomain({ handle: HANDLE, type: "pvh", vcpus: 2 });
  xen.setMaxVcpus(domid, 2);
  xen.setMaxMemory(domid, 8192);
  xen.setPagingPool(domid, 2 * 2 ** 20);
  assert.equal(xen.populate(domid, [0n, 512n], 9), 2);
  return domid;
}

for (const version of VERSIONS) {
  Deno.test(`A domain is made and listed by Xen ${version}`, () => {
    const fake = new FakeHypervisor({ version });
    using xen = Xen.open(fake);
    const { major, minor, extra } = xen.version();
    assert.equal(`${major}.${minor}${extra}`, `${version}.7-fake`);
    const domid = build(xen);
    const { type, handle, maxVcpus, pagingPool } = fake.get(domid);
    assert.deepEqual({ type, handle, maxVcpus, pagingPool }, {
      type: "pvh",
      handle: HANDLE,
      maxVcpus: 2,
      pagingPool: 2 ** 21,
    });
    const [control, domain, ...others] = xen.listDomains();
    assert.equal(others.length, 0);
    assert.deepEqual([control?.domid, control?.type, control?.isRunning], [0, "pv", true]);
    assert.deepEqual(domain, xen.domain(domid));
    assert.deepEqual(domain, {
      domid,
      handle: HANDLE,
      type: "pvh",
      isDying: false,
      isPaused: true,
      isBlocked: false,
      isRunning: false,
      pages: 1024,
      maxPages: 2048,
      outstandingPages: 0,
      cpuTime: 2_000_000n,
      onlineVcpus: 2,
      maxVcpuId: 1,
      cpuPool: 0,
    });
    assert.deepEqual(xen.listDomains(domid), [domain]);
    const info = xen.physicalInfo();
    assert.equal(info.totalPages, 262144 + 131072);
    assert.equal(info.freePages, 262144 - 1024);
    assert.deepEqual([info.cpus, info.nodes, info.cpuKhz], [2, 1, 2_000_000]);
    assert.deepEqual([info.hasHvm, info.hasPv, info.hasHap, info.hasShadow, info.hasDirectIo], [
      true,
      true,
      true,
      false,
      false,
    ]);
    xen.destroy(domid);
    assert.equal(xen.domain(domid), undefined);
    assert.equal(fake.freePages, 262144);
    assert.equal(fake.buffers, 0);
  });
}

Deno.test("A version of Xen that is not known is refused, and which ones are is said", () => {
  assert.throws(
    () => Xen.open(new FakeHypervisor({ version: "4.13" })),
    /^Error: Cannot use Xen 4\.13 as its interface is not known: run Xen 4\.14 to 4\.22$/,
  );
});

Deno.test("What is not the control domain is told so, and a Xen that lies about its version is found", () => {
  assert.throws(
    () => Xen.open(new FakeHypervisor({ isControlDomain: false })),
    /this is not its control domain/,
  );
  const fake = new FakeHypervisor();
  fake.failAt((operation) => operation === "domctl getdomaininfo", XEN_ERRNO.EACCES);
  assert.throws(() => Xen.open(fake), /not the one of the release 4\.17/);
  fake.revive();
  fake.failAt(1, XEN_ERRNO.ENOMEM);
  assert.throws(
    () => Xen.open(fake),
    /^XenError: domctl getdomaininfo for domain 0 failed with ENOMEM \(Xen has no memory for it\)$/,
  );
});

Deno.test("All domains are listed, however many there are, by one hypercall from then on", () => {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  for (let index = 0; index < 300; index++) xen.createDomain({ handle: HANDLE, type: "pv", vcpus: 1 });
  assert.deepEqual(
    xen.listDomains().map(({ domid }) => domid),
    Array.from({ length: 301 }, (_, domid) => domid),
  );
  const before = xen.hypercalls;
  assert.equal(xen.listDomains().length, 301);
  assert.equal(xen.hypercalls - before, 1);
});

Deno.test("What Xen does not take of a new domain, it refuses", () => {
  using xen = Xen.open(new FakeHypervisor({ hasHap: false }));
  assert.equal(xen.physicalInfo().hasHap, false);
  assert.throws(() => xen.createDomain({ handle: HANDLE, type: "pvh", vcpus: 1 }), isCode("EINVAL"));
  assert.throws(() => xen.createDomain({ handle: HANDLE, type: "pv", vcpus: 0 }), isCode("EINVAL"));
  assert.throws(
    () => xen.createDomain({ handle: new Uint8Array(8), type: "pv", vcpus: 1 }),
    /8 bytes: give 16/,
  );
  const domid = xen.createDomain({ handle: HANDLE, type: "pv", vcpus: 1, domid: 77 });
  assert.equal(domid, 77);
  assert.throws(
    () => xen.createDomain({ handle: HANDLE, type: "pv", vcpus: 1, domid: 77 }),
    /domctl createdomain for domain 77 failed with EEXIST \(the domain id is in use\)/,
  );
  assert.equal(xen.domain(77)?.maxVcpuId, undefined);
  assert.throws(() => xen.setMaxVcpus(domid, 2), isCode("EINVAL"));
  assert.throws(() => xen.pause(78), isCode("ESRCH"));
  assert.equal(xen.domain(78), undefined);
});

Deno.test("A domain gets no more memory than its limit, its paging pool and the machine allow", () => {
  const fake = new FakeHypervisor({ freePages: 4096 });
  using xen = Xen.open(fake);
  const domid = xen.createDomain({ handle: HANDLE, type: "pvh", vcpus: 1 });
  const frames = BigUint64Array.from({ length: 8 }, (_, index) => BigInt(index * 512));
  assert.equal(xen.populate(domid, frames, 9), 0);
  xen.setMaxMemory(domid, 3 * 2048);
  assert.equal(xen.populate(domid, frames, 9), 0);
  xen.setPagingPool(domid, 2 * 4096);
  assert.equal(xen.populate(domid, frames, 9), 2);
  xen.setPagingPool(domid, 2 ** 20);
  assert.equal(xen.populate(domid, frames.subarray(2), 9), 1);
  xen.setMaxMemory(domid, 2 ** 20);
  // 8 of 2 MiB are all, and the pool has taken a half of one.
  assert.equal(xen.populate(domid, frames.subarray(3), 9), 4);
  assert.equal(xen.domain(domid)?.pages, 7 * 512);
  assert.equal(fake.freePages, 512);
  assert.throws(() => xen.claimPages(domid, 8 * 512), isCode("ENOMEM"));
});

Deno.test("Memory that is promised to a domain, no other one gets", () => {
  using xen = Xen.open(new FakeHypervisor({ freePages: 2048 }));
  const [first, second] = [build(xen), xen.createDomain({ handle: HANDLE, type: "pv", vcpus: 1 })];
  xen.setMaxMemory(second, 2 ** 20);
  xen.claimPages(first, 1024 + 256);
  assert.equal(xen.domain(first)?.outstandingPages, 256);
  assert.equal(xen.physicalInfo().outstandingPages, 256);
  assert.equal(xen.populate(second, [0n], 9), 0);
  assert.equal(xen.populate(first, Array.from({ length: 256 }, (_, index) => 1024n + BigInt(index)), 0), 256);
  assert.equal(xen.domain(first)?.outstandingPages, 0);
  xen.claimPages(second, 100);
  assert.throws(() => xen.claimPages(second, 101), isCode("EINVAL"));
  xen.claimPages(second, 0);
});

Deno.test("Memory of a domain is written and read back, page by page and many at once", () => {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  const domid = build(xen);
  {
    using memory = xen.mapGuest(domid, 510, 4);
    assert.equal(memory.bytes.length, 4 * 4096);
    memory.bytes.fill(7, 4096, 3 * 4096);
    // What the guest writes meanwhile stays where the mapping has not changed anything.
    fake.page(domid, 513)[0] = 9;
  }
  assert.deepEqual([510, 511, 512, 513].map((frame) => fake.page(domid, frame)[0]), [0, 7, 7, 9]);
  using page = xen.mapFrames(domid, [512n]);
  fake.page(domid, 512n)[1] = 3;
  assert.deepEqual([...page.bytes.subarray(0, 2)], [7, 3]);
  assert.throws(() => xen.mapGuest(domid, 1022, 4), /mapping frame 0x400 for domain 1 failed with EINVAL/);
  using grants = xen.grantTable(domid);
  assert.equal(grants.bytes.length, 4096);
  grants.bytes[8] = 1;
  assert.equal(fake.get(domid).grants[8], 1);
});

Deno.test("A domain whose memory is mapped is dying until it is not", () => {
  const fake = new FakeHypervisor({ isSlow: true });
  using xen = Xen.open(fake);
  const domid = build(xen);
  {
    using _page = xen.mapGuest(domid, 0, 1);
    xen.destroy(domid);
    assert.equal(xen.domain(domid)?.isDying, true);
    assert.throws(() => xen.mapGuest(domid, 0, 1), isCode("ESRCH"));
  }
  assert.equal(xen.domain(domid), undefined);
});

Deno.test("What a domain starts from is set", () => {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  const domid = build(xen);
  const domain = fake.get(domid);
  const [store, console] = [xen.allocateUnbound(domid, 0), xen.allocateUnbound(domid, 0)];
  assert.deepEqual([...domain.ports].map(([port, { remote }]) => [port, remote]), [[store, 0], [console, 0]]);
  xen.setParameter(domid, "STORE_PFN", 0xfeffcn);
  xen.setParameter(domid, "CONSOLE_EVTCHN", console);
  assert.deepEqual([...domain.params], [[1, 0xfeffcn], [18, 2n]]);
  assert.equal(xen.getParameter(domid, "STORE_PFN"), 0xfeffcn);
  const map = [
    { address: 0n, size: 0x40_0000n, type: 1 },
    { address: 0xfeff8000n, size: 0x8000n, type: 2 },
    { address: 0x1_0000_0000n, size: 0x2_0000_0001n, type: 1 },
  ];
  xen.setMemoryMap(domid, map);
  assert.deepEqual(domain.memoryMap, map);
  xen.setTsc(domid, { mode: 2, khz: 1000, incarnation: 3, elapsed: 5n });
  assert.deepEqual(xen.getTsc(domid), { mode: 2, khz: 1000, incarnation: 3, elapsed: 5n });
  assert.equal(xen.hypercalls, fake.operations);
});

Deno.test("The state of vCPUs is read and set by records", () => {
  using xen = Xen.open(new FakeHypervisor());
  const domid = build(xen);
  const before = xen.getContext(domid);
  // A header of 24 bytes, then the end.
  assert.equal(before.length, 8 + 24 + 8);
  const record = new Uint8Array(8 + 1032);
  new DataView(record.buffer).setUint16(0, 2, true);
  new DataView(record.buffer).setUint32(4, 1032, true);
  record.fill(5, 8);
  const context = new Uint8Array([...before.subarray(0, 32), ...record, ...before.subarray(32)]);
  xen.setContext(domid, context);
  assert.deepEqual(xen.getContext(domid), context);
  assert.throws(() => xen.setContext(domid, record), isCode("EINVAL"));
});

Deno.test("Pauses are counted, and a domain shuts down for a reason", () => {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  const domid = build(xen);
  xen.pause(domid);
  xen.unpause(domid);
  assert.equal(xen.domain(domid)?.isPaused, true);
  assert.equal(fake.get(domid).hasRun, false);
  xen.unpause(domid);
  assert.deepEqual([xen.domain(domid)?.isPaused, xen.domain(domid)?.isRunning], [false, true]);
  assert.equal(fake.get(domid).hasRun, true);
  assert.throws(() => xen.unpause(domid), isCode("EINVAL"));
  assert.equal("shutdownReason" in xen.domain(domid)!, false);
  xen.remoteShutdown(domid, "suspend");
  assert.equal(xen.domain(domid)?.shutdownReason, "suspend");
  xen.resume(domid);
  assert.equal(xen.domain(domid)?.isRunning, true);
  fake.shutDown(domid, 0);
  assert.equal(xen.domain(domid)?.shutdownReason, "poweroff");
  fake.shutDown(domid, 200);
  assert.equal(xen.domain(domid)?.shutdownReason, 200);
});

Deno.test("vCPUs are bound to CPUs", () => {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  const domid = build(xen);
  xen.setVcpuAffinity(domid, 1, [0, 3, 65]);
  assert.deepEqual([...fake.get(domid).affinity], [[1, [0, 3, 65]]]);
  assert.throws(() => xen.setVcpuAffinity(domid, 2, [0]), isCode("EINVAL"));
  assert.throws(() => xen.setVcpuAffinity(domid, 0, []), isCode("EINVAL"));
});

for (const [scheduler, name] of [[6, "credit2"], [5, "credit"]] as const) {
  Deno.test(`Weights and caps are set with the scheduler ${name}`, () => {
    using xen = Xen.open(new FakeHypervisor({ scheduler }));
    assert.equal(xen.schedulerName(), name);
    const domid = build(xen);
    assert.deepEqual(xen.getSchedule(domid), { weight: 256, cap: 0 });
    xen.setSchedule(domid, { cap: 150 });
    xen.setSchedule(domid, { weight: 512 });
    assert.deepEqual(xen.getSchedule(domid), { weight: 512, cap: 150 });
    xen.setSchedule(domid, { cap: 0 });
    assert.deepEqual(xen.getSchedule(domid), { weight: 512, cap: 0 });
  });
}

Deno.test("Weights are refused where the scheduler knows none", () => {
  using xen = Xen.open(new FakeHypervisor({ scheduler: 9 }));
  assert.throws(() => xen.getSchedule(0), /scheduler "null": start Xen with sched=credit2/);
});

Deno.test("Xen's log and capabilities are read", () => {
  const log = "(XEN) line é\n".repeat(3000);
  using xen = Xen.open(new FakeHypervisor({ log }));
  assert.equal(xen.readLog(), log);
  assert.equal(xen.capabilities(), "xen-3.0-x86_64 hvm-3.0-x86_64");
});

Deno.test("A PV domain is made from machine frames", () => {
  const fake = new FakeHypervisor();
  using xen = Xen.open(fake);
  const domid = xen.createDomain({ handle: HANDLE, type: "pv", vcpus: 1 });
  const domain = fake.get(domid);
  xen.setMaxVcpus(domid, 1);
  xen.setMaxMemory(domid, 8192);
  xen.setAddressSize64(domid);
  const frames = xen.populateMachine(domid, [0n, 1n, 2n], 0);
  assert.equal(frames.length, 3);
  assert.notEqual(frames[0], 0n);
  {
    using page = xen.mapFrames(domid, frames.subarray(1, 2));
    page.bytes[0] = 1;
    assert.throws(() => xen.pinPageTable(domid, frames[1]!), isCode("EBUSY"));
  }
  assert.equal(fake.page(domid, 1)[0], 1);
  xen.setMachineToPhysical(domid, frames, 0);
  assert.deepEqual(
    [...domain.machineToPhysical],
    Array.from(frames, (frame, index) => [frame, BigInt(index)]),
  );
  xen.pinPageTable(domid, frames[1]!);
  assert.deepEqual([...domain.pinned], [frames[1]]);
  xen.initHypercallPage(domid, frames[2]!);
  assert.equal(fake.page(domid, 2)[0], 0xcc);
  const context = new Uint8Array(5168).fill(1);
  xen.setVcpuContext(domid, 0, context);
  assert.deepEqual(domain.vcpuContexts.get(0), context);
  assert.throws(() => xen.setVcpuContext(domid, 0, context.subarray(1)), /by 5167 bytes: give 5168/);
  assert.throws(() => xen.setPagingPool(domid, 4096), isCode("EOPNOTSUPP"));
  assert.throws(() => xen.setParameter(domid, "STORE_PFN", 1), isCode("EINVAL"));
});

Deno.test("Each operation can be the last of a process, and the next one finds what it has left", () => {
  const count = (() => {
    const fake = new FakeHypervisor();
    using xen = Xen.open(fake);
    build(xen);
    return fake.operations;
  })();
  const left = new Set<string>();
  for (let index = 0; index < count; index++) {
    const fake = new FakeHypervisor();
    fake.dieAt(index);
    assert.throws(() => build(Xen.open(fake)), SimulatedDeath);
    assert.throws(() => Xen.open(fake), SimulatedDeath);
    fake.revive();
    using xen = Xen.open(fake);
    const found = xen.listDomains().filter(({ domid }) => domid !== 0);
    left.add(found.map(({ pages, maxPages, onlineVcpus }) => `${pages}/${maxPages}/${onlineVcpus}`).join());
    for (const { domid } of found) xen.destroy(domid);
    assert.equal(fake.freePages, 262144);
  }
  assert.deepEqual([...left], ["", "0/0/0", "0/0/2", "0/2048/2"]);
});
