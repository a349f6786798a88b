import assert from "node:assert/strict";
import type { Draft } from "../../planner/mod.ts";
import type { Engine, MachineNeeds, MachineSpec } from "../engine.ts";
import type { ImageBuilder } from "../images/builder.ts";
import { vmKind, type VmKindOptions, type VmNormalProps, type VmOutputs } from "./vm_kind.ts";

/** Images that bring no kernel unless told. */
const appliance: ImageBuilder = {
  type: "image",
  needsFirmware: (recipe) => recipe.kernel === undefined,
  build: () => Promise.reject(new Error("nothing is built here")),
};
const kind = vmKind({
  paths: { data: "/data", cache: "/cache" },
  engines: [],
  images: [appliance],
  kernels: [],
});

/** Prepares one machine, and tells what is wrong with it. */
async function prepare(
  props: Partial<VmNormalProps>,
  recorded?: Partial<VmOutputs>,
  references: Record<string, unknown> = {},
): Promise<{ problems: string[]; props: VmNormalProps }> {
  const problems: string[] = [];
  const draft: Draft<VmNormalProps, VmOutputs> = {
    address: "a",
    stack: "s",
    props: {
      ...{ cpus: 1, memory: "64MiB", image: { type: "debian" }, engine: { type: "auto" } },
      ...props,
    } as VmNormalProps,
    recorded: recorded as VmOutputs | undefined,
    references: new Map(Object.entries(references)) as Draft<VmNormalProps, VmOutputs>["references"],
    report: (field, reason, value) => void problems.push(`${field}: ${reason} (${value})`),
  };
  await kind.prepare!([draft]);
  return { problems, props: draft.props };
}

const EMULATED = { type: "emulated" };
const TOO_MUCH: Partial<VmNormalProps> = {
  cpus: 2,
  image: { type: "debian", arch: "amd64" },
  kernel: { type: "host" },
};

Deno.test("what the engine of a machine cannot do is refused where it is chosen", async () => {
  const { problems } = await prepare({ ...TOO_MUCH, engine: EMULATED });
  assert.deepEqual(problems.map((each) => each.split(":")[0]), ["cpus", "image.arch", "kernel"]);
  for (const type of ["auto", "qemu", "kvm"]) {
    assert.deepEqual((await prepare({ ...TOO_MUCH, engine: { type } })).problems, [], type);
  }
  // What is not known yet is checked when it is.
  const unknown = { $unknown: true } as never;
  assert.deepEqual((await prepare({ cpus: unknown, memory: unknown, engine: EMULATED })).problems, []);
});

Deno.test("a machine that auto() has made an emulated one stays so, and only its image may be for another", async () => {
  const { problems } = await prepare(TOO_MUCH, { engine: "emulated" });
  assert.deepEqual(problems, [
    'cpus: Engine "emulated" gives a machine one vCPU: leave cpus out, or choose another engine (2)',
    'kernel: Engine "emulated" gives a machine a 32-bit processor, which cannot run the host\'s kernel: ' +
    "leave kernel out, or choose another engine (undefined)",
  ]);
  assert.deepEqual((await prepare(TOO_MUCH, { engine: "qemu" })).problems, []);
  assert.deepEqual(
    (await prepare({ ...TOO_MUCH, engine: { type: "qemu" } }, { engine: "emulated" })).problems,
    [],
  );
});

Deno.test("a machine under a hypervisor keeps its memory, and needs a kernel", async () => {
  const engine = { type: "qemu", hypervisor: { path: "/xen", commandLine: "" } };
  assert.deepEqual(
    await prepare({ memory: "1GiB", maxMemory: "2GiB", engine }).then((each) => each.problems),
    [
      "maxMemory: Memory under a hypervisor is fixed: leave maxMemory out (2GiB)",
    ],
  );
  const { props, problems } = await prepare({ memory: "1GiB", engine }, { maxMemory: "2GiB" });
  assert.deepEqual([props.maxMemory, problems], ["1GiB", []]);
  const change = { field: "memory", before: "1GiB", after: "512MiB" };
  const recorded = { props } as Parameters<NonNullable<typeof kind.disruption>>[1];
  assert.equal(kind.disruption!(change, recorded, props).class, "reboot");
  assert.equal(kind.disruption!(change, recorded, { ...props, engine: { type: "qemu" } }).class, "live");
});

Deno.test("an emulated machine grows no further than it can", async () => {
  const wanted = { memory: "1200MiB", engine: EMULATED } as const;
  assert.equal((await prepare(wanted)).props.maxMemory, "2047MiB");
  assert.equal((await prepare({ ...wanted, memory: "64MiB" })).props.maxMemory, "128MiB");
  assert.deepEqual((await prepare({ ...wanted, maxMemory: "2GiB" })).problems, [
    'maxMemory: Engine "emulated" gives a machine less than 2GiB of memory: ask for less, or choose another engine (2GiB)',
  ]);
});

const XEN = { type: "xen", domain: "pvh", weight: 256, cap: 0, crash: "destroy" };

Deno.test("what a domain cannot be is refused where it is declared, all of it at once", async () => {
  const disk = { $resource: "d", kind: "disk", generation: 0 };
  const fine: Partial<VmNormalProps> = {
    cpus: 2,
    // More than a control domain has itself.
    memory: "1024GiB",
    image: { type: "debian", arch: "amd64" },
    disks: { data: { disk, readOnly: false } },
    engine: { ...XEN, cap: 200, pin: [[0], [1, 2]] },
  };
  const { problems, props } = await prepare(fine, {}, { d: { size: "1GiB", format: "raw" } });
  assert.deepEqual([problems, props.maxMemory], [[], "2TiB"]);
  const wrong: Partial<VmNormalProps> = {
    ...fine,
    cpus: 129,
    image: { type: "debian", arch: "i386" },
    kernel: { type: "debian", arch: "i386" },
    engine: { ...XEN, cap: 12_901, pin: [[0], [1, 2]] },
  };
  assert.deepEqual((await prepare(wrong, {}, { d: { size: "1GiB", format: "qcow2" } })).problems, [
    'cpus: Engine "xen" gives a machine at most 128 vCPUs: ask for less, or choose another engine (129)',
    "engine.cap: A cap must be at most 100 for each vCPU, which is 12900 (12901)",
    "engine.pin: There must be one list of processors for each vCPU, which is 129 (0,1,2)",
    'disks.data: Engine "xen" gives a machine disks of the format raw only: leave format out, or choose another engine (qcow2)',
    'image.arch: Engine "xen" gives a machine no way to boot Debian\'s 32-bit kernels: leave arch out, or choose another engine (i386)',
    'kernel.arch: Engine "xen" gives a machine no way to boot Debian\'s 32-bit kernels: leave arch out, or choose another engine (i386)',
  ]);
  const disks = async (image: object) =>
    (await prepare({ image: { type: "image", disk: {}, ...image }, engine: XEN })).problems;
  assert.deepEqual(await disks({ format: "raw" }), [
    'image: Engine "xen" gives a machine no firmware to boot a disk by: give it a kernel, or choose another engine (undefined)',
  ]);
  assert.deepEqual(await disks({ format: "qcow2", kernel: {} }), [
    'image.format: Engine "xen" gives a machine disks of the format raw only: convert the image, or choose another engine (qcow2)',
  ]);
  assert.deepEqual(await disks({ format: "raw", kernel: {} }), []);
});

Deno.test("a machine that auto() has made a domain stays so, and only its image may be for another", async () => {
  const change = { image: { type: "debian", arch: "i386" }, cpus: 129 };
  assert.deepEqual((await prepare(change, { engine: "xen" })).problems.map((each) => each.split(":")[0]), [
    "cpus",
  ]);
  assert.deepEqual((await prepare(change, { engine: "qemu" })).problems, []);
});

Deno.test("what the scheduler of Xen is told is changed live, and another kind of domain by a restart", () => {
  const recorded = { props: { engine: XEN, power: "running" } } as unknown as Parameters<
    NonNullable<typeof kind.disruption>
  >[1];
  const classOf = (field: string) =>
    kind.disruption!({ field, before: 1, after: 2 }, recorded, recorded.props).class;
  assert.deepEqual(
    ["engine.weight", "engine.cap", "engine.pin", "engine.pin[0]", "engine.crash"].map(classOf),
    [
      ...["live", "live", "live", "live", "live"],
    ],
  );
  assert.deepEqual(["engine.domain", "cpus"].map(classOf), ["reboot", "reboot"]);
  const roomy = {
    ...recorded,
    props: { ...recorded.props, engine: { ...XEN, maxCpus: 2 } },
  } as typeof recorded;
  const cpus = (after: number) =>
    kind.disruption!({ field: "cpus", before: 1, after }, roomy, roomy.props).class;
  assert.deepEqual([2, 3].map(cpus), ["live", "reboot"]);
});

Deno.test("a host is asked before anything is changed, with all that is known, and of the engine on record alone", async () => {
  const asked: string[] = [];
  const engine = (name: "xen" | "qemu", refusal: (needs: MachineNeeds) => string | undefined) => ({
    name,
    probe: ({ needs }: { needs: MachineNeeds }) => {
      const detail = refusal(needs);
      asked.push(`${name}: ${detail ?? "yes"}`);
      return Promise.resolve({ engine: name, isUsable: detail === undefined, detail, findings: [] });
    },
  } as unknown as Engine);
  const { preflight } = vmKind({
    paths: { data: "/data", cache: "/cache" },
    engines: [
      engine("xen", (needs) => needs.hasQcow2 ? "no qcow2" : needs.hasNat ? "no NAT" : undefined),
      engine("qemu", ({ cpus }) => cpus > 1 ? "one vCPU" : undefined),
    ],
    images: [appliance],
    kernels: [],
  });
  const [disk, network] = ["d", "n"].map((address) => ({ $resource: address, kind: "any", generation: 0 }));
  const run = async (recorded: string | undefined, references: Record<string, object>, cpus = 1) => {
    asked.length = 0;
    const props = {
      ...{ cpus, memory: "64MiB", maxMemory: typeof cpus === "number" ? "64MiB" : cpus },
      ...{ image: { type: "debian" }, engine: { type: "auto" } },
      ...{ disks: { data: { disk } }, nics: { eth0: { network } } },
    } as unknown as VmNormalProps;
    const instance = {
      ...{ address: "a", stack: "s", props },
      recorded: recorded === undefined ? undefined : { engine: recorded } as VmOutputs,
      references: new Map(Object.entries(references)) as unknown as Draft["references"],
    };
    const error = await preflight!([instance, instance], new AbortController().signal).catch((error) =>
      error
    );
    return [...asked, error?.message].filter((each) => each !== undefined);
  };
  const plain = { d: { format: "raw" }, n: { nat: false } };
  assert.deepEqual(await run(undefined, plain), ["xen: yes"]);
  assert.deepEqual(await run(undefined, { ...plain, d: { format: "qcow2" } }), [
    "xen: no qcow2",
    "qemu: yes",
  ]);
  assert.deepEqual(await run(undefined, { ...plain, n: { nat: true } }), ["xen: no NAT", "qemu: yes"]);
  assert.deepEqual(await run("qemu", plain, 2), [
    "qemu: one vCPU",
    'Cannot run "a" as no engine can run it here: qemu: one vCPU',
  ]);
  assert.deepEqual(await run("xen", plain, 2), ["xen: yes"]);
  // What is not known yet is asked again when it is.
  assert.deepEqual(await run(undefined, {}, { $unknown: true } as never), ["xen: no NAT", "qemu: yes"]);
});

Deno.test("an image of 64-bit programs is refused for an emulated machine, and auto() takes another engine", async () => {
  const emulated = {
    name: "emulated",
    probe: ({ needs }: { needs: MachineNeeds }) =>
      Promise.resolve({ engine: "emulated", isUsable: !needs.is64Bit, detail: "32 bits", findings: [] }),
  } as unknown as Engine;
  const { prepare, preflight } = vmKind({
    paths: { data: "/data", cache: "/cache" },
    engines: [emulated],
    images: [{ ...appliance, is64Bit: (recipe) => Promise.resolve(recipe.path === "/64") }],
    kernels: [],
  });
  const run = async (path: string, type: string) => {
    const problems: string[] = [];
    const draft: Draft<VmNormalProps, VmOutputs> = {
      ...{ address: "a", stack: "s", recorded: undefined, references: new Map() },
      props: {
        ...{ cpus: 1, memory: "64MiB", maxMemory: "64MiB", image: { type: "image", path, kernel: {} } },
        engine: { type },
      } as unknown as VmNormalProps,
      report: (field, reason) => void problems.push(`${field}: ${reason}`),
    };
    await prepare!([draft]);
    await preflight!([draft], new AbortController().signal).catch((error) => problems.push(error.message));
    return problems;
  };
  const reason = 'Cannot run "a" as no engine can run it here: emulated: 32 bits';
  assert.deepEqual(await run("/64", "emulated"), [
    'image: Engine "emulated" gives a machine a 32-bit processor, and its programs take a 64-bit one: ' +
    "take another, or choose another engine",
    reason,
  ]);
  assert.deepEqual(await run("/64", "auto"), [reason]);
  for (const type of ["emulated", "auto"]) assert.deepEqual(await run("/32", type), []);
});

Deno.test("an image is looked at before a machine is made of it, and not again", async () => {
  const { prepare } = vmKind({
    paths: { data: "/data", cache: "/cache" },
    engines: [],
    images: [{ ...appliance, check: () => Promise.reject(new Error("it is not there")) }],
    kernels: [],
  });
  const run = async (recorded?: VmOutputs) => {
    const problems: string[] = [];
    await prepare!([{
      ...{ address: "a", stack: "s", recorded, references: new Map() },
      props: {
        ...{ cpus: 1, memory: "64MiB", image: { type: "image" }, engine: { type: "qemu" } },
      } as unknown as VmNormalProps,
      report: (field, reason) => void problems.push(`${field}: ${reason}`),
    }]);
    return problems;
  };
  assert.deepEqual(await run(), ["image: it is not there"]);
  assert.deepEqual(await run({ engine: "qemu" } as VmOutputs), []);
});

Deno.test("what takes an agent of ours is refused for images that have none", async () => {
  const foreign = vmKind({
    paths: { data: "/data", cache: "/cache" },
    engines: [],
    images: [{ ...appliance, isForeign: true }],
    kernels: [],
  });
  const problems: string[] = [];
  const disk = { $resource: "d", kind: "disk", generation: 0 };
  await foreign.prepare!([{
    ...{ address: "a", stack: "s", recorded: undefined, references: new Map() },
    props: {
      ...{ cpus: 1, memory: "64MiB", image: { type: "image" }, engine: { type: "qemu" }, command: "true" },
      ...{
        disks: { data: { disk, mount: "/data", readOnly: false } },
        ready: { type: "exec", command: ["true"] },
      },
    } as unknown as VmNormalProps,
    report: (field, reason) => void problems.push(`${field}: ${reason}`),
  }]);
  const reason = 'An image of type "image" has no agent of ours to carry this out';
  assert.deepEqual(problems, ["command", "disks.data.mount", "ready"].map((field) => `${field}: ${reason}`));
});

/** An engine of some name that can run everything, and puts specs on record instead. */
function recorder(name: "xen" | "qemu", specs: MachineSpec[]): Engine {
  return {
    name,
    probe: () => Promise.resolve({ engine: name, isUsable: true, detail: "", findings: [] }),
    list: () => Promise.resolve([]),
    attach: () => ({
      spec: () => Promise.resolve(specs.at(-1)),
      update: (spec: MachineSpec) => {
        specs.push(spec);
        return Promise.resolve({ isRestarted: true });
      },
    }),
  } as unknown as Engine;
}

Deno.test("the root disk of a domain is a copy of its own that grows, and no image for 32 bits makes one", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const image = `${folder}/image`;
    await Deno.writeFile(image, new Uint8Array(8192).fill(7));
    const specs: MachineSpec[] = [];
    let format: "raw" | "qcow2" = "raw";
    const build: ImageBuilder["build"] = () =>
      Promise.resolve({
        ...{ key: "k", kernel: undefined, initramfs: "", modules: [], cmdline: "" },
        root: { path: image, format, size: 8192 },
      });
    const options: VmKindOptions = {
      paths: { data: folder, cache: folder },
      engines: [recorder("xen", specs), recorder("qemu", specs)],
      images: [{ type: "debian", build }],
      kernels: [],
    };
    const ensure = async (more: Partial<VmNormalProps>) =>
      await vmKind(options).ensure(
        {
          ...{ id: "0123456789abcdef", address: "a", stack: "s", dependencies: new Map() },
          props: {
            ...{ cpus: 1, memory: "64MiB", maxMemory: "64MiB", hostname: "a", power: "running" },
            ...{ image: { type: "debian" }, engine: { type: "auto" }, shutdownTimeout: "1s", ...more },
          },
          signal: new AbortController().signal,
          report() {},
        } as unknown as Parameters<ReturnType<typeof vmKind>["ensure"]>[0],
      );
    assert.equal((await ensure({})).engine, "xen");
    const [disk] = specs.at(-1)!.disks;
    assert.deepEqual([disk?.format, disk?.size], ["raw", 8192]);
    await Deno.writeFile(disk!.path, new Uint8Array([1, 2, 3]), { append: true });
    await ensure({ rootSize: "1MiB" });
    const bytes = await Deno.readFile(disk!.path);
    assert.deepEqual([bytes.length, bytes[8191], bytes[8192], specs.at(-1)!.disks[0]!.path], [
      2 ** 20,
      7,
      1,
      disk!.path,
    ]);
    assert.equal((await Deno.stat(image)).size, 8192);
    format = "qcow2";
    await assert.rejects(ensure({}), /Cannot use the image of "a" as it has the format qcow2.*convert it/);
    format = "raw";
    // Another engine takes over what this one cannot, where it may.
    assert.equal((await ensure({ image: { type: "debian", arch: "i386" } })).engine, "qemu");
    await assert.rejects(
      ensure({ image: { type: "debian", arch: "i386" }, engine: XEN }),
      /no 32-bit kernels/,
    );
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
