import assert from "node:assert/strict";
import type { MachineSpec } from "../engine.ts";
import type { WarmStart } from "../supervisor/config.ts";
import { EmulatedEngine, type EmulatedEngineOptions, EmulatedMachine } from "./engine.ts";

const PATHS = { data: "/data", cache: "/cache" };

const SPEC: MachineSpec = {
  id: "0123456789abcdef",
  stack: "s",
  address: "a",
  cpus: 1,
  memory: 64 << 20,
  maxMemory: 128 << 20,
  kernel: "/cache/kernels/k",
  initramfs: ["/cache/initramfs/i", "/data/machines/0123456789abcdef/config.cpio"],
  cmdline: "quiet",
  disks: [],
  nics: [],
  hasAgent: true,
  bootKey: "b",
  engine: {},
};

/** Shows what a supervisor would be given. */
class Shown extends EmulatedMachine {
  warmStart(spec: MachineSpec): WarmStart | undefined {
    const { hypertopia } = this.configure(spec) as { hypertopia: { warm_start?: WarmStart } };
    return hypertopia.warm_start;
  }
}

function warmStart(changes: Partial<MachineSpec> = {}, options: EmulatedEngineOptions = {}) {
  return new Shown(SPEC.id, PATHS, options).warmStart({ ...SPEC, ...changes });
}

Deno.test("machines of a kind go on from the same saved state, and others from another", () => {
  const first = warmStart()!;
  assert.equal(first.state, `/cache/states/${first.key}.state`);
  const disk = {
    name: "d",
    path: "/data/d",
    format: "raw",
    serial: "1",
    readOnly: false,
    size: 512,
  } as const;
  const nic = {
    ...{ name: "eth0", mac: "02:00:00:00:00:01", ip: "10.0.0.3", network: "lan", cidr: "10.0.0.0/24" },
    ...{ gateway: "10.0.0.1", dns: "10.0.0.2", nat: true, forwards: [] },
  };
  // What tells it from others of its kind.
  const same: Partial<MachineSpec>[] = [
    { id: "fedcba9876543210", stack: "t", address: "b", bootKey: "c", hostname: "h" },
    { initramfs: [SPEC.initramfs[0]!, "/data/machines/fedcba9876543210/config.cpio"] },
    { engine: { sandbox: false } },
  ];
  for (const changes of same) assert.equal(warmStart(changes)!.key, first.key, JSON.stringify(changes));
  const kinds: Partial<MachineSpec>[] = [
    { kernel: "/cache/kernels/l" },
    { initramfs: ["/cache/initramfs/j", SPEC.initramfs[1]!] },
    { cmdline: "" },
    { memory: 65 << 20 },
    { maxMemory: 129 << 20 },
    { disks: [disk] },
    { disks: [{ ...disk, size: 1024 }] },
    { disks: [{ ...disk, readOnly: true }] },
    { nics: [nic] },
  ];
  const keys = new Set([first.key, ...kinds.map((changes) => warmStart(changes)!.key)]);
  assert.equal(keys.size, 1 + kinds.length);
  const other = { ...disk, name: "e", path: "/data/e", serial: "2" };
  assert.equal(warmStart({ disks: [other] })!.key, warmStart({ disks: [disk] })!.key);
  const neighbour = { ...nic, mac: "02:00:00:00:00:02", ip: "10.0.0.4" };
  assert.equal(warmStart({ nics: [neighbour] })!.key, warmStart({ nics: [nic] })!.key);
});

Deno.test("a cold machine has no saved state, nor has one without our agent", () => {
  const warm = warmStart()!;
  assert.ok(warm.state);
  assert.deepEqual(warmStart({}, { isCold: true }), { ...warm, state: null, save: null });
  assert.equal(warmStart({ hasAgent: false, initramfs: [] }), undefined);
});

Deno.test("the engine says what it cannot run", async () => {
  const engine = new EmulatedEngine(PATHS);
  const needs = {
    cpus: 1,
    hasNics: true,
    hasNat: true,
    hasFirmware: false,
    memory: 2 ** 31 - 2 ** 20,
    is64Bit: false,
    hasQcow2: false,
  };
  const isHere = Deno.build.os !== "windows";
  assert.equal((await engine.probe()).isUsable, isHere);
  assert.equal((await engine.probe({ needs })).isUsable, isHere);
  if (!isHere) return;
  const cases = [
    [{ cpus: 2 }, /one vCPU: set cpus to 1/],
    [{ memory: 2 ** 31 }, /less than 2 GiB of memory/],
    [{ hasFirmware: true }, /no firmware/],
    [{ is64Bit: true }, /32-bit processor/],
  ] as const;
  for (const [more, detail] of cases) {
    const found = await engine.probe({ needs: { ...needs, ...more } });
    assert.equal(found.isUsable, false);
    assert.match(found.detail, detail);
  }
});
