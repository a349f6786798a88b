import assert from "node:assert/strict";
import { FakeXenstore } from "../../ffi/xen/fake_xenstore.ts";
import { Xenstore } from "../../ffi/xen/xenstore.ts";
import {
  backendPath,
  consoleEntries,
  diskEntries,
  diskName,
  domainEntries,
  frontendPath,
  HOST_ENTRIES,
  networkEntries,
  removeDomainTree,
  unplug,
  waitForState,
  writeEntries,
  XENBUS_STATE,
  type XenDomain,
  type XenstoreEntry,
} from "./devices.ts";

const DOMAIN: XenDomain = {
  domid: 5,
  uuid: "68797065-7274-6f70-0123-456789abcdef",
  name: "web",
  memory: 131072,
  maxMemory: 262144,
  cpus: 1,
  maxCpus: 2,
  store: { gfn: 0xfeffcn, port: 1 },
  console: { gfn: 0xfefffn, port: 2 },
  disks: [],
  networks: [],
  furtherConsoles: 0,
};

/** Lines `path = value [permissions]`. */
function lines(entries: readonly XenstoreEntry[]): string[] {
  return entries.map(({ path, value, permissions }) =>
    `${path} = ${value}${permissions ? ` [${permissions}]` : ""}`
  );
}

Deno.test("entries of a disk are what blkback and blkfront read", () => {
  const disk = { index: 1, major: 7, minor: 26, readOnly: true, discard: false, file: "/var/disk b" };
  assert.deepEqual(lines(diskEntries(5, disk)), [
    "/local/domain/5/device/vbd/51728 =  [n5,r0]",
    "/local/domain/5/device/vbd/51728/backend = /local/domain/0/backend/vbd/5/51728",
    "/local/domain/5/device/vbd/51728/backend-id = 0",
    "/local/domain/5/device/vbd/51728/state = 1",
    "/local/domain/5/device/vbd/51728/virtual-device = 51728",
    "/local/domain/5/device/vbd/51728/device-type = disk",
    "/local/domain/0/backend/vbd/5/51728 =  [n0,r5]",
    "/local/domain/0/backend/vbd/5/51728/frontend = /local/domain/5/device/vbd/51728",
    "/local/domain/0/backend/vbd/5/51728/frontend-id = 5",
    "/local/domain/0/backend/vbd/5/51728/online = 1",
    "/local/domain/0/backend/vbd/5/51728/state = 1",
    "/local/domain/0/backend/vbd/5/51728/dev = xvdb",
    "/local/domain/0/backend/vbd/5/51728/params = /var/disk b",
    "/local/domain/0/backend/vbd/5/51728/mode = r",
    "/local/domain/0/backend/vbd/5/51728/discard-enable = 0",
    "/local/domain/0/backend/vbd/5/51728/physical-device = 7:1a",
  ]);
  const other = lines(diskEntries(5, { index: 16, major: 259, minor: 3, readOnly: false, discard: true }));
  assert.deepEqual(other.slice(-4), [
    "/local/domain/0/backend/vbd/5/268439552/dev = xvdq",
    "/local/domain/0/backend/vbd/5/268439552/mode = w",
    "/local/domain/0/backend/vbd/5/268439552/discard-enable = 1",
    "/local/domain/0/backend/vbd/5/268439552/physical-device = 103:3",
  ]);
  assert.deepEqual([0, 25, 26, 701, 702].map(diskName), ["xvda", "xvdz", "xvdaa", "xvdzz", "xvdaaa"]);
});

Deno.test("entries of a network interface are what netback and netfront read", () => {
  assert.deepEqual(lines(networkEntries(5, { index: 0, mac: "02:00:00:00:00:01", mtu: 1500 })), [
    "/local/domain/5/device/vif/0 =  [n5,r0]",
    "/local/domain/5/device/vif/0/backend = /local/domain/0/backend/vif/5/0",
    "/local/domain/5/device/vif/0/backend-id = 0",
    "/local/domain/5/device/vif/0/state = 1",
    "/local/domain/5/device/vif/0/handle = 0",
    "/local/domain/5/device/vif/0/mac = 02:00:00:00:00:01",
    "/local/domain/5/device/vif/0/mtu = 1500",
    "/local/domain/0/backend/vif/5/0 =  [n0,r5]",
    "/local/domain/0/backend/vif/5/0/frontend = /local/domain/5/device/vif/0",
    "/local/domain/0/backend/vif/5/0/frontend-id = 5",
    "/local/domain/0/backend/vif/5/0/online = 1",
    "/local/domain/0/backend/vif/5/0/state = 1",
    "/local/domain/0/backend/vif/5/0/handle = 0",
    "/local/domain/0/backend/vif/5/0/mac = 02:00:00:00:00:01",
    "/local/domain/0/backend/vif/5/0/mtu = 1500",
    "/local/domain/0/backend/vif/5/0/script = ",
    "/local/domain/0/backend/vif/5/0/hotplug-status = connected",
  ]);
});

Deno.test("entries of a further console are what hvc_xen reads", () => {
  assert.deepEqual(lines(consoleEntries(5, 1)), [
    "/local/domain/5/device/console/1 =  [n5,r0]",
    "/local/domain/5/device/console/1/backend = /local/domain/0/backend/console/5/1",
    "/local/domain/5/device/console/1/backend-id = 0",
    "/local/domain/5/device/console/1/state = 1",
    "/local/domain/0/backend/console/5/1 =  [n0,r5]",
    "/local/domain/0/backend/console/5/1/frontend = /local/domain/5/device/console/1",
    "/local/domain/0/backend/console/5/1/frontend-id = 5",
    "/local/domain/0/backend/console/5/1/online = 1",
    "/local/domain/0/backend/console/5/1/state = 1",
    "/local/domain/0/backend/console/5/1/protocol = vt100",
  ]);
});

Deno.test("entries of a domain are what its kernel reads and writes", () => {
  assert.deepEqual(lines(domainEntries(DOMAIN)), [
    "/vm/68797065-7274-6f70-0123-456789abcdef =  [n0,r5]",
    "/vm/68797065-7274-6f70-0123-456789abcdef/uuid = 68797065-7274-6f70-0123-456789abcdef",
    "/vm/68797065-7274-6f70-0123-456789abcdef/name = web",
    "/vm/68797065-7274-6f70-0123-456789abcdef/domid = 5",
    "/libxl/5/type = pvh",
    "/local/domain/5 =  [n0,r5]",
    "/local/domain/5/vm = /vm/68797065-7274-6f70-0123-456789abcdef",
    "/local/domain/5/name = web",
    "/local/domain/5/domid = 5",
    "/local/domain/5/memory/static-max = 262144",
    "/local/domain/5/memory/target = 131072",
    "/local/domain/5/store/port = 1",
    "/local/domain/5/store/ring-ref = 1044476",
    "/local/domain/5/control/platform-feature-multiprocessor-suspend = 1",
    "/local/domain/5/control/platform-feature-xs_reset_watches = 1",
    "/local/domain/5/cpu/0/availability = online",
    "/local/domain/5/cpu/1/availability = offline",
    "/local/domain/5/control/shutdown =  [n5]",
    "/local/domain/5/control/feature-poweroff =  [n5]",
    "/local/domain/5/control/feature-reboot =  [n5]",
    "/local/domain/5/control/feature-suspend =  [n5]",
    "/local/domain/5/control/sysrq =  [n5]",
    "/local/domain/5/device/suspend/event-channel =  [n5]",
    "/local/domain/5/data =  [n5]",
    "/local/domain/5/drivers =  [n5]",
    "/local/domain/5/feature =  [n5]",
    "/local/domain/5/attr =  [n5]",
    "/local/domain/5/error =  [n5]",
    "/local/domain/5/console/backend = /local/domain/0/backend/console/5/0",
    "/local/domain/5/console/backend-id = 0",
    "/local/domain/5/console/ring-ref = 1044479",
    "/local/domain/5/console/port = 2",
    "/local/domain/5/console/type = ioemu",
    "/local/domain/5/console/limit = 1048576",
    "/local/domain/5/console/output = pty",
    "/local/domain/5/console/tty = ",
    "/local/domain/0/backend/console/5/0 =  [n0,r5]",
    "/local/domain/0/backend/console/5/0/frontend = /local/domain/5/console",
    "/local/domain/0/backend/console/5/0/frontend-id = 5",
    "/local/domain/0/backend/console/5/0/online = 1",
    "/local/domain/0/backend/console/5/0/state = 1",
    "/local/domain/0/backend/console/5/0/protocol = vt100",
  ]);
  const disk = { index: 0, major: 7, minor: 0, readOnly: false, discard: true };
  const network = { index: 0, mac: "02:00:00:00:00:01", mtu: 1500 };
  const more = domainEntries({ ...DOMAIN, disks: [disk], networks: [network], furtherConsoles: 2 });
  assert.deepEqual(more.slice(domainEntries(DOMAIN).length), [
    ...consoleEntries(5, 1),
    ...consoleEntries(5, 2),
    ...diskEntries(5, disk),
    ...networkEntries(5, network),
  ]);
  assert.throws(() => domainEntries({ ...DOMAIN, furtherConsoles: 8 }), {
    message: "Cannot give a domain 8 further consoles as Linux has at most 7",
  });
});

Deno.test("a domain with its devices takes one transaction, and a guest owns only what it should", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  await writeEntries(xenstore, HOST_ENTRIES);
  const before = fake.tree;
  const entries = domainEntries({
    ...DOMAIN,
    disks: [{ index: 0, major: 7, minor: 0, readOnly: false, discard: true }],
    networks: [{ index: 0, mac: "02:00:00:00:00:01", mtu: 1500 }],
    furtherConsoles: 1,
  });
  const requests = fake.requests;
  await xenstore.transaction((view) => writeEntries(view, entries));
  const permissions = entries.filter(({ permissions }) => permissions !== undefined).length;
  assert.equal(fake.requests - requests, 2 + entries.length + permissions);
  for (const { path, value } of entries) assert.equal(fake.tree[path], value);

  const owned = Object.entries(fake.permissions).filter(([, owner]) => !owner.startsWith("n0"));
  const roots = [
    "attr",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/shutdown",
    "control/sysrq",
    "data",
    "device/console/1",
    "device/suspend/event-channel",
    "device/vbd/51712",
    "device/vif/0",
    "drivers",
    "error",
    "feature",
  ].map((name) => `/local/domain/5/${name}`);
  for (const [path] of owned) {
    assert.ok(roots.some((root) => path === root || path.startsWith(`${root}/`)), path);
  }
  for (const root of roots) assert.ok(owned.some(([path]) => path === root), root);

  await removeDomainTree(xenstore, 5, DOMAIN.uuid);
  // What is left are the folders that all domains share.
  assert.deepEqual(fake.tree, {
    ...before,
    "/local/domain/0/backend": "",
    "/local/domain/0/backend/console": "",
    "/local/domain/0/backend/vbd": "",
    "/local/domain/0/backend/vif": "",
    "/libxl": "",
    "/vm": "",
  });
});

Deno.test("the entries of a domain go, those of others and of its successor stay", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const disks = [{ index: 0, major: 7, minor: 0, readOnly: false, discard: true }];
  for (const domid of [5, 51, 6]) {
    const uuid = domid === 51 ? "00000000-0000-0000-0000-000000000051" : DOMAIN.uuid;
    await writeEntries(xenstore, domainEntries({ ...DOMAIN, domid, uuid, disks }));
  }
  const paths = () =>
    ["/local/domain", "/local/domain/0/backend/vbd", "/libxl", "/vm"].map((path) => xenstore.list(path));
  await removeDomainTree(xenstore, 5, DOMAIN.uuid);
  const uuids = [DOMAIN.uuid, "00000000-0000-0000-0000-000000000051"];
  assert.deepEqual(await Promise.all(paths()), [["0", "51", "6"], ["51", "6"], ["51", "6"], uuids]);
  await removeDomainTree(xenstore, 6, DOMAIN.uuid);
  await removeDomainTree(xenstore, 6, DOMAIN.uuid);
  assert.deepEqual(await Promise.all(paths()), [["0", "51"], ["51"], ["51"], uuids.slice(1)]);
});

/** A host's driver: closes its end once it is asked to. */
async function serve(fake: FakeXenstore, path: string): Promise<Disposable> {
  const xenstore = await Xenstore.connect(fake.path);
  await xenstore.watch(`${path}/state`, async () => {
    if (await xenstore.read(`${path}/state`) === "5") await xenstore.write(`${path}/state`, "6");
  });
  return xenstore;
}

Deno.test("a device is unplugged once both ends closed it", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const entries = diskEntries(5, { index: 0, major: 7, minor: 0, readOnly: false, discard: true });
  await writeEntries(xenstore, entries);
  const back = backendPath(5, "vbd", 0);
  fake.write(`${back}/state`, "4");
  using _driver = await serve(fake, back);
  fake.log.length = 0;
  assert.ok(await unplug(xenstore, 5, "vbd", 0));
  assert.deepEqual(await xenstore.list("/local/domain/5/device/vbd"), []);
  assert.deepEqual(await xenstore.list("/local/domain/0/backend/vbd/5"), []);
  const writes = fake.log.filter((line) => /^(WRITE|RM) /.test(line));
  assert.deepEqual(writes, [
    `WRITE ${back}/online`,
    `WRITE ${back}/state`,
    `WRITE ${back}/state`,
    `RM ${frontendPath(5, "vbd", 0)}`,
    `RM ${back}`,
  ]);
  // It is gone, or has never been.
  assert.ok(await unplug(xenstore, 5, "vbd", 0));
  assert.ok(await unplug(xenstore, 5, "vif", 3));
  assert.equal(fake.tree["/local/domain/0/backend/vif/5"], undefined);
});

Deno.test("a device whose end never closes is removed all the same, later", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  await writeEntries(xenstore, networkEntries(5, { index: 0, mac: "02:00:00:00:00:01", mtu: 1500 }));
  const back = backendPath(5, "vif", 0);

  const stop = new AbortController();
  const stopped = unplug(xenstore, 5, "vif", 0, { signal: stop.signal });
  while (fake.tree[`${back}/state`] !== "5") await xenstore.read(`${back}/state`);
  stop.abort(new Error("interrupted"));
  await assert.rejects(stopped, /^Error: interrupted$/);
  assert.equal(fake.tree[`${back}/online`], "0");

  assert.equal(await unplug(xenstore, 5, "vif", 0, { timeout: 1 }), false);
  assert.deepEqual(await xenstore.list("/local/domain/5/device/vif"), []);
  assert.equal(fake.tree[back], undefined);
});

Deno.test("a device that closed by itself is only removed", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  await writeEntries(xenstore, consoleEntries(5, 1));
  const back = backendPath(5, "console", 1);
  fake.write(`${back}/state`, "6");
  fake.log.length = 0;
  assert.ok(await unplug(xenstore, 5, "console", 1));
  assert.ok(!fake.log.includes(`WRITE ${back}/state`));
  assert.equal(fake.tree[back], undefined);
});

Deno.test("a state is waited for, whatever a guest writes", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const { signal } = new AbortController();
  const { Initialised, Connected, Unknown } = XENBUS_STATE;
  fake.write("/device/state", "1");
  const waiting = waitForState(xenstore, "/device", [Initialised, Connected], signal);
  for (const state of ["7", "33", "", "-3", "0x3", "x".repeat(4000), "3"]) {
    fake.write("/device/state", state);
    await xenstore.read("/device");
  }
  assert.equal(await waiting, Initialised);
  const removal = waitForState(xenstore, "/device", [Unknown], signal);
  fake.remove("/device");
  assert.equal(await removal, Unknown);
  // No watch is left behind.
  assert.equal(fake.log.filter((line) => line.startsWith("WATCH")).length, 2);
  assert.equal(fake.log.filter((line) => line.startsWith("UNWATCH")).length, 2);
  await assert.rejects(
    waitForState(xenstore, "/device", [Connected], AbortSignal.abort(new Error("no"))),
    /no/,
  );
});

Deno.test("a lost connection ends a wait", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const waiting = waitForState(xenstore, "/device", [XENBUS_STATE.Connected], new AbortController().signal);
  const failing = assert.rejects(waiting, { name: "XenstoreError", code: "ECONNRESET" });
  while (!fake.log.includes("READ /device/state")) await xenstore.read("/");
  fake.die();
  await failing;
});

Deno.test("a domain whose entries cannot be written leaves nothing behind, wherever it fails", async () => {
  const entries = domainEntries(DOMAIN);
  for (const request of [1, 2, 30, entries.length + 10]) {
    await using fake = await FakeXenstore.listen();
    using xenstore = await Xenstore.connect(fake.path);
    fake.dieAt(request);
    const writing = xenstore.transaction((view) => writeEntries(view, entries));
    await assert.rejects(writing, { code: "ECONNRESET" });
    assert.deepEqual(fake.tree, {});
  }
});
