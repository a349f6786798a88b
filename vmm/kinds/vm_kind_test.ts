import assert from "node:assert/strict";
import type { Draft } from "../../planner/mod.ts";
import { vmKind, type VmNormalProps, type VmOutputs } from "./vm_kind.ts";

const kind = vmKind({ paths: { data: "/data", cache: "/cache" }, engines: [], images: [], kernels: [] });

/** Prepares one machine, and tells what is wrong with it. */
async function prepare(
  props: Partial<VmNormalProps>,
  recorded?: Partial<VmOutputs>,
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
    references: new Map(),
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
