import assert from "node:assert/strict";
import { join } from "node:path";
import { libc } from "../../ffi/mod.ts";
import { GuestMemory } from "../devices/guest_memory.ts";
import type { MachineSpec } from "../engine.ts";
import type { MachineParts } from "../machine_host.ts";
import { UserNetwork } from "../net/user_network.ts";
import { type BootableConfiguration, type MachineEnd, parseConfigFile } from "../supervisor/config.ts";
import { MachineController } from "../supervisor/controller.ts";
import { EmulatedEngine, EmulatedMachine } from "./engine.ts";
import { EmulatedPlatform } from "./platform.ts";
import { VirtioPortFunction } from "./virtio_function.ts";
import type { EmulatedVmm } from "./vmm.ts";

const ID = "0123456789abcdef";
const MIB = 2 ** 20;
const LOG = { info: () => {}, warn: () => {}, error: () => {}, configure: () => {} };

/** Memory that is nowhere but in JavaScript. */
class PlainMemory extends GuestMemory {
  readonly bytes = new Uint8Array(this.length);
  readonly view = new DataView(this.bytes.buffer);
  readonly words = new Uint16Array(this.bytes.buffer);

  get address(): number {
    throw new Error("nobody needs to know");
  }

  discard(offset: number, length: number): void {
    this.bytes.fill(0, offset, offset + length);
  }

  [Symbol.dispose](): void {}
}

/** A machine of which all is real but the emulator. */
class Platform extends EmulatedPlatform {
  parts: MachineParts | undefined;
  readonly functions: VirtioPortFunction[] = [];

  override createMemory(length: number): Promise<GuestMemory> {
    return Promise.resolve(new PlainMemory(length));
  }

  override build(parts: MachineParts): Promise<EmulatedVmm> {
    this.parts = parts;
    for (const { device, name } of parts.devices) {
      this.functions.push(new VirtioPortFunction(device, name, { memory: parts.memory, setLine: () => {} }));
    }
    const vmm = {
      exits: {},
      resume: () => {},
      kill: () => parts.onEnd({ kind: "killed" }),
      [Symbol.dispose]: () => this.functions.forEach((each) => each[Symbol.dispose]()),
    };
    return Promise.resolve(vmm as unknown as EmulatedVmm);
  }
}

class Machine extends EmulatedMachine {
  configuration(spec: MachineSpec): unknown {
    return this.configure(spec);
  }
}

/** A folder with a disk, and the configuration of a machine that uses it. */
class Bench implements Disposable {
  readonly folder = Deno.makeTempDirSync();
  readonly disk = join(this.folder, "disk");
  readonly configuration: BootableConfiguration;

  constructor() {
    const paths = { data: this.folder, cache: join(this.folder, "cache") };
    Deno.writeFileSync(this.disk, new Uint8Array(MIB));
    Deno.mkdirSync(join(this.folder, "machines", ID), { recursive: true });
    const disk = {
      name: "d",
      path: this.disk,
      format: "raw",
      serial: "1",
      readOnly: false,
      size: MIB,
    } as const;
    const json = new Machine(ID, paths).configuration({
      id: ID,
      stack: "s",
      address: "a",
      cpus: 1,
      memory: 64 * MIB,
      maxMemory: 64 * MIB,
      kernel: this.disk,
      initramfs: [],
      cmdline: "",
      disks: [disk],
      nics: [{
        ...{ name: "eth0", mac: "02:00:00:00:00:01", ip: "10.0.0.3", network: "lan", cidr: "10.0.0.0/24" },
        ...{ gateway: "10.0.0.1", dns: "10.0.0.2", nat: false, forwards: [] },
      }],
      hasAgent: true,
      bootKey: "b",
      engine: {},
    });
    this.configuration = parseConfigFile(JSON.stringify(json)).configuration;
  }

  start(changes: Partial<BootableConfiguration> = {}) {
    const platform = new Platform({ id: ID, log: LOG });
    const ended = Promise.withResolvers<MachineEnd>();
    const controller = new MachineController<EmulatedVmm>({
      id: ID,
      platform,
      log: LOG,
      enterSandbox: () => false,
      onEnd: ended.resolve,
    });
    const started = controller.start({ ...this.configuration, ...changes });
    return { platform, controller, started, ended: ended.promise };
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.folder, { recursive: true });
  }
}

/** Runs something as if this were another system. */
async function on(os: string, arch: string, run: () => Promise<void>): Promise<void> {
  const build = Object.getOwnPropertyDescriptor(Deno, "build")!;
  Object.defineProperty(Deno, "build", { ...build, value: { ...Deno.build, os, arch } });
  try {
    await run();
  } finally {
    Object.defineProperty(Deno, "build", build);
  }
}

const REST = { read: "inherit", write: "inherit", net: "inherit", env: "inherit", sys: "inherit" } as const;
const ignore = Deno.build.os === "windows";

for (const [os, arch] of [["linux", "x86_64"], ["linux", "aarch64"], ["darwin", "aarch64"]] as const) {
  Deno.test({
    name: `an emulated machine needs no FFI on ${os} on ${arch}`,
    permissions: { ...REST, ffi: false },
    ignore,
    fn: () =>
      on(os, arch, async () => {
        assert.throws(libc);
        using bench = new Bench();
        const { networkInterfaces: [nic], hypertopia } = bench.configuration;
        const { folder } = nic!.userNetwork!;
        Deno.mkdirSync(folder, { recursive: true });
        const spec = { cidr: "10.0.0.0/24", gateway: "10.0.0.1", dns: "10.0.0.2", nat: false };
        using _network = new UserNetwork({ spec, folder, log: LOG });
        const { platform, controller, started, ended } = bench.start();
        await started;
        assert.deepEqual(
          platform.parts!.devices.map(({ name }) => name.split(" ")[0]),
          ["drive", "NIC", "console", "entropy", "balloon"],
        );
        const { control, data, errors } = hypertopia.channels!;
        for (const path of [hypertopia.console!.socket, control, ...data, ...errors]) {
          (await Deno.connect({ transport: "unix", path })).close();
        }
        await controller.updateDrive("d", { size: 2 * MIB });
        assert.equal(Deno.statSync(bench.disk).size, 2 * MIB);
        for (const each of platform.functions) each.reset();
        await controller.stop();
        assert.equal((await ended).reason, "stopped");
        assert.throws(() => Deno.lstatSync(control), Deno.errors.NotFound);
        const { isUsable, detail } = await new EmulatedEngine().probe();
        assert.ok(isUsable, detail);
      }),
  });
}

Deno.test({ name: "an emulated machine says what it can have on Linux on x86_64 only", ignore }, async () => {
  using bench = new Bench();
  await on("darwin", "aarch64", async () => {
    const [drive] = bench.configuration.drives;
    const vsock = { guestCid: 3, udsPath: join(bench.folder, "vsock") };
    for (
      const [changes, words] of [
        [
          { drives: [{ ...drive!, format: "qcow2" }] },
          /in the format qcow2 .* on darwin on aarch64 as it takes Linux/,
        ],
        [{ drives: [{ ...drive!, isDirect: true }] }, /past the page cache for/],
        [{ vsock }, /Cannot make a vsock for an emulated machine/],
      ] as const
    ) {
      const { started } = bench.start({ networkInterfaces: [], ...changes });
      await assert.rejects(started, { name: "MachineError", message: words });
    }
    // All that was open is closed.
    const { started, controller } = bench.start({ networkInterfaces: [] });
    await started;
    await controller.stop();
  });
});
