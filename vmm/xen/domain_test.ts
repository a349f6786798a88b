import assert from "node:assert/strict";
import { FakeHypervisor, SimulatedDeath, XEN_ERRNO } from "../../ffi/xen/fake_hypervisor.ts";
import { FakeXenstore } from "../../ffi/xen/fake_xenstore.ts";
import { Xen, Xenstore } from "../../ffi/xen/mod.ts";
import { elf } from "../boot/test_kernels.ts";
import { MachineError } from "../errors.ts";
import {
  buildDomain,
  destroyDomainsOf,
  domainHandle,
  type DomainSpec,
  handleUuid,
  machineOfHandle,
} from "./domain.ts";
import { SPECIAL_FRAMES } from "./pvh.ts";

const MEBIBYTE = 2 ** 20;
const ID = "0123456789abcdef";

/** A host with one domain that others have made. */
class Host implements AsyncDisposable {
  readonly spec: DomainSpec;
  readonly hypervisor: FakeHypervisor;
  readonly store: FakeXenstore;
  xen: Xen;
  xenstore: Xenstore;
  /** What must be as it was in the end. */
  readonly before: unknown;
  readonly #folder: string;

  private constructor(
    folder: string,
    hypervisor: FakeHypervisor,
    store: FakeXenstore,
    xen: Xen,
    xenstore: Xenstore,
  ) {
    this.#folder = folder;
    this.hypervisor = hypervisor;
    this.store = store;
    this.xen = xen;
    this.xenstore = xenstore;
    this.spec = {
      id: ID,
      name: "stack-web",
      cpus: 1,
      maxCpus: 2,
      memory: 40 * MEBIBYTE,
      maxMemory: 64 * MEBIBYTE,
      kernel: `${folder}/vmlinux`,
      kernelName: "vmlinuz",
      initramfs: [`${folder}/initramfs`],
      commandLine: "console=hvc0 quiet",
      disks: [{ index: 0, major: 7, minor: 3, readOnly: false, discard: true, file: "/disk" }],
      networks: [{ index: 0, mac: "02:00:00:00:00:01", mtu: 1500 }],
      furtherConsoles: 7,
    };
    const foreign = xen.createDomain({
      handle: crypto.getRandomValues(new Uint8Array(16)),
      vcpus: 1,
      type: "pvh",
    });
    store.write(`/local/domain/${foreign}/name`, "others");
    // The control domain's own entries are written with the first domain, and stay.
    for (const [name, value] of [["name", "Domain-0"], ["domid", "0"]] as const) {
      store.write(`/local/domain/0/${name}`, value);
    }
    this.before = this.state();
  }

  static async start(options: { readonly freePages?: number } = {}): Promise<Host> {
    const folder = await Deno.makeTempDir();
    await Deno.writeFile(`${folder}/vmlinux`, elf(true));
    await Deno.writeFile(`${folder}/initramfs`, new Uint8Array(5000).fill(7));
    const hypervisor = new FakeHypervisor(options);
    const store = await FakeXenstore.listen();
    return new Host(folder, hypervisor, store, Xen.open(hypervisor), await Xenstore.connect(store.path));
  }

  state(): unknown {
    const entries = Object.entries(this.store.tree).filter(([path]) =>
      !/^\/local\/domain\/0\/backend|^\/(vm|libxl)$/.test(path)
    );
    return {
      free: this.xen.physicalInfo().freePages,
      domains: this.xen.listDomains().map(({ domid }) => domid),
      entries,
      introduced: [...this.store.introduced.keys()],
      buffers: this.hypervisor.buffers,
    };
  }

  build(): ReturnType<typeof buildDomain> {
    return buildDomain(this.xen, this.xenstore, this.spec);
  }

  /** What the next command does first. */
  async sweep(): Promise<void> {
    await destroyDomainsOf(this.xen, this.xenstore, ID);
  }

  async reconnect(): Promise<void> {
    this.xenstore[Symbol.dispose]();
    this.xenstore = await Xenstore.connect(this.store.path);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.xenstore[Symbol.dispose]();
    await this.store[Symbol.asyncDispose]();
    await Deno.remove(this.#folder, { recursive: true });
  }
}

Deno.test("a handle tells which machine a domain is, and whether it is ours", () => {
  const handle = domainHandle(ID);
  assert.equal(handleUuid(handle), "68797065-7274-6f70-0123-456789abcdef");
  assert.equal(machineOfHandle(handle), ID);
  assert.equal(machineOfHandle(crypto.getRandomValues(new Uint8Array(16))), undefined);
  assert.equal(machineOfHandle(new Uint8Array(16)), undefined);
});

Deno.test("a domain is built with memory, kernel, special pages, vCPUs and entries, and stays paused", async () => {
  await using host = await Host.start();
  const { hypervisor, spec } = host;
  const built = await host.build();
  const domain = hypervisor.get(built.domid);
  assert.equal(machineOfHandle(domain.handle), ID);
  assert.deepEqual([domain.type, domain.maxVcpus, domain.pauses], ["pvh", 2, 1]);
  assert.equal(built.pages, spec.maxMemory / 4096 + SPECIAL_FRAMES.count);
  // The segment of the kernel, the command line, and the root pointer of ACPI.
  assert.equal(hypervisor.page(built.domid, 0x1000)[0], 0xcc);
  const commandLine = new TextDecoder().decode(hypervisor.page(built.domid, 0x20).subarray(0, 18));
  assert.equal(commandLine, spec.commandLine);
  assert.equal(new TextDecoder().decode(hypervisor.page(built.domid, 0xe0).subarray(0, 8)), "RSD PTR ");
  assert.equal(
    new DataView(hypervisor.page(built.domid, SPECIAL_FRAMES.identity).buffer).getUint32(4, true),
    0x40_00e7,
  );
  // Parameters by their numbers in Xen's header.
  const parameters = Object.fromEntries(domain.params);
  assert.equal(parameters[1], SPECIAL_FRAMES.store);
  assert.equal(parameters[17], SPECIAL_FRAMES.console);
  assert.equal(parameters[12], SPECIAL_FRAMES.identity << 12n);
  assert.equal(parameters[18], BigInt(built.consolePort));
  // The first two grants are those of console and xenstore, for the control domain.
  const grants = new DataView(domain.grants.buffer, domain.grants.byteOffset);
  assert.deepEqual(
    [0, 8].map((
      at,
    ) => [
      grants.getUint16(at, true),
      grants.getUint16(at + 2, true),
      BigInt(grants.getUint32(at + 4, true)),
    ]),
    [
      [1, 0, SPECIAL_FRAMES.console],
      [1, 0, SPECIAL_FRAMES.store],
    ],
  );
  const root = `/local/domain/${built.domid}`;
  assert.equal(host.store.tree[`${root}/name`], "stack-web");
  assert.deepEqual([0, 1].map((cpu) => host.store.tree[`${root}/cpu/${cpu}/availability`]), [
    "online",
    "offline",
  ]);
  assert.equal(host.store.tree[`${root}/memory/target`], `${40 * 1024}`);
  assert.equal(host.store.tree[`/local/domain/0/backend/vbd/${built.domid}/51712/physical-device`], "7:3");
  assert.equal(host.store.introduced.get(built.domid)?.gfn, SPECIAL_FRAMES.store);

  await host.sweep();
  assert.deepEqual(host.state(), host.before);
});

Deno.test("a build that fails at any hypercall or request leaves nothing", async () => {
  await using host = await Host.start();
  const first = host.hypervisor.operations;
  await host.build();
  const hypercalls = host.hypervisor.operations - first;
  await host.sweep();
  assert.ok(hypercalls > 20, `${hypercalls} hypercalls`);
  for (let index = 0; index < hypercalls; index++) {
    host.hypervisor.failAt(index, XEN_ERRNO.ENOMEM);
    await assert.rejects(host.build(), /ENOMEM|memory/, `hypercall ${index}`);
    assert.deepEqual(host.state(), host.before, `hypercall ${index}`);
  }
  const requests = host.store.requests;
  await host.build();
  const needed = host.store.requests - requests;
  await host.sweep();
  for (let index = 1; index <= needed; index++) {
    host.store.failAt(index);
    await assert.rejects(host.build(), /ENOSPC/, `request ${index}`);
    assert.deepEqual(host.state(), host.before, `request ${index}`);
  }
});

/** Whoever is dead cannot tidy up either, which is told beside. */
function isDeath(error: Error): boolean {
  return error instanceof SimulatedDeath || error.cause instanceof SimulatedDeath;
}

Deno.test("whatever a command that dies leaves of a domain, the next one finds it", async () => {
  await using host = await Host.start();
  const { hypervisor } = host;
  const first = hypervisor.operations;
  await host.build();
  const hypercalls = hypervisor.operations - first;
  await host.sweep();
  for (let index = 0; index < hypercalls; index++) {
    hypervisor.dieAt(index);
    await assert.rejects(host.build(), isDeath, `hypercall ${index}`);
    hypervisor.revive();
    // Connections and mappings of the dead are gone.
    await host.reconnect();
    await host.sweep();
    assert.deepEqual(host.state(), host.before, `hypercall ${index}`);
  }
});

Deno.test("an end that is cut short anywhere is finished by the next command", async () => {
  await using host = await Host.start();
  await host.build();
  const first = host.store.requests;
  await host.sweep();
  const requests = host.store.requests - first;
  assert.ok(requests > 5, `${requests} requests`);
  // The last one only looks whether anything is left.
  for (let index = 1; index < requests; index++) {
    await host.build();
    host.store.failAt(index);
    await assert.rejects(host.sweep(), /ENOSPC/, `request ${index}`);
    await host.sweep();
    assert.deepEqual(host.state(), host.before, `request ${index}`);
  }
  // Where the number is another domain's by then, only what names ours goes.
  await host.build();
  const tree = Object.keys(host.store.tree).find((each) => /^\/local\/domain\/[1-9]\d*\/vm$/.test(each))!;
  const domid = Number(tree.split("/")[3]);
  host.hypervisor.domains.delete(domid);
  host.store.write(tree, "/vm/others");
  await host.sweep();
  assert.equal(host.store.tree[tree], "/vm/others");
  assert.ok(!Object.keys(host.store.tree).some((each) => each.startsWith("/vm/68797065")));
});

Deno.test("what cannot be built is refused in words, before anything is made", async () => {
  {
    await using host = await Host.start({ freePages: 10_000 });
    await assert.rejects(host.build(), (error) => {
      assert.ok(error instanceof MachineError);
      assert.match(
        error.message,
        /"stack-web" as it takes 68MiB, as much as its maxMemory, and Xen has 39MiB free: give it less memory/,
      );
      return true;
    });
    assert.deepEqual(host.state(), host.before);
  }
  await using host = await Host.start();
  const taken = { ...host.spec, name: "others" };
  await assert.rejects(
    buildDomain(host.xen, host.xenstore, taken),
    /domain 1, which is not of this stack, has that name/,
  );
  await Deno.writeFile(host.spec.kernel, elf(false));
  await assert.rejects(host.build(), /"vmlinuz" in a PVH domain as it has no entry for PVH .* CONFIG_PVH/);
  assert.deepEqual(host.state(), host.before);
});

Deno.test("memory in pieces is memory, too", async () => {
  await using host = await Host.start();
  const { xen } = host;
  const populate = xen.populate.bind(xen);
  const orders: number[] = [];
  xen.populate = (domid, frames, order) => {
    orders.push(order);
    // Only one extent of 2 MiB is to be had.
    return populate(domid, order === 9 ? frames.slice(0, 1) : frames, order);
  };
  const { domid, pages } = await host.build();
  assert.equal(pages, host.spec.maxMemory / 4096 + SPECIAL_FRAMES.count);
  assert.deepEqual([...host.hypervisor.get(domid).extents.values()].filter((pages) => pages > 1), [512]);
  assert.deepEqual([...new Set(orders)], [9, 0]);
  await host.sweep();
  assert.deepEqual(host.state(), host.before);
});
