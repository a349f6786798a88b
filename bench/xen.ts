/**
 * Xen: from the wish for a domain until it runs, with a disk and a NIC, against `xl create` of the same guest; and the
 * twentieth domain against the first. Run in the control domain of a Xen host: `deno task lab:xen -- deno task bench xen`.
 *
 * @module
 */

import { join } from "node:path";
import { attachLoop, detachLoop } from "../ffi/mod.ts";
import { Xen, Xenstore } from "../ffi/xen/mod.ts";
import { debianBuilder } from "../stdlib/mod.ts";
import { unpackKernel } from "../vmm/images/kernel_image.ts";
import { joinFiles } from "../vmm/machine_files.ts";
import {
  buildInitramfs,
  cpioArchive,
  guestConfigFiles,
  hostPaths,
  type MachineSpec,
  XenEngine,
} from "../vmm/mod.ts";
import { buildDomain, destroyDomain } from "../vmm/xen/domain.ts";
import { bridgeOf, hostNetwork } from "../vmm/net/machine_bridges.ts";
import { launchDomain, sweepDomains, xenFiles } from "../vmm/xen/launch.ts";
import { compared, type Figure, rounded } from "./figure.ts";

const ROUNDS = 5;
const MEBIBYTE = 2 ** 20;
const MEMORY = 128 * MEBIBYTE;
const MANY = 20;
const SMALL = 64 * MEBIBYTE;
const PEER = "xl create";
const NAME = "bench-web";
const ID = "be0c4be0c4be0c4b";

interface Counts {
  readonly hypercalls: number;
  readonly requests: number;
}

/** The figures. */
export default async function* xen(): AsyncIterable<Figure> {
  const { isUsable, detail } = await new XenEngine().probe();
  if (!isUsable) {
    const text = `Cannot measure "xen" as no domain runs here: ${detail}\n`;
    Deno.stderr.writeSync(new TextEncoder().encode(text));
    return;
  }
  const folder = await Deno.makeTempDir({ prefix: "ht-" });
  await using cleanUp = new AsyncDisposableStack();
  cleanUp.defer(() => Deno.remove(folder, { recursive: true }));
  using hypervisor = Xen.open();
  using xenstore = await Xenstore.connect();
  const paths = { ...hostPaths(), data: folder };
  const host = { xen: hypervisor, xenstore, paths };
  const files = xenFiles(paths, ID);
  await Deno.mkdir(files.folder, { recursive: true });
  const spec = await prepare(folder, files.initramfs, paths.cache);
  const bridge = bridgeOf(spec, spec.nics[0]!);
  await hostNetwork(paths).ensureBridge(bridge);
  cleanUp.defer(async () => void await hostNetwork(paths).releaseBridge(bridge.name));

  await using _daemon = await startConsoled(hypervisor);
  const ours: number[] = [];
  const theirs: number[] = [];
  let counts: Counts = { hypercalls: 0, requests: 0 };
  for (let round = 0; round < ROUNDS; round++) {
    const before = { hypercalls: hypervisor.hypercalls, requests: xenstore.requests };
    const started = performance.now();
    await launchDomain(host, spec, files, {});
    ours.push(performance.now() - started);
    counts = {
      hypercalls: hypervisor.hypercalls - before.hypercalls,
      requests: xenstore.requests - before.requests,
    };
    await sweepDomains(host, spec.id);
    const disk = attachLoop(spec.disks[0]!.path, { readOnly: false });
    try {
      const config = join(folder, "xl.cfg");
      await Deno.writeTextFile(config, xlConfiguration(spec, files.initramfs, disk.path, bridge.name));
      const began = performance.now();
      await run("xl", ["create", config]);
      theirs.push(performance.now() - began);
      await run("xl", ["destroy", NAME]);
    } finally {
      detachLoop(disk.path);
    }
  }
  yield compared("from the wish for a domain until it runs", "ms", ours, PEER, theirs);
  yield { name: "hypercalls for a domain", value: counts.hypercalls, unit: "calls" };
  yield { name: "requests to xenstore for a domain", value: counts.requests, unit: "requests" };
  yield await compareMany(hypervisor, xenstore, spec, paths.cache);
}

/** Makes what both kinds of domain are made of. */
async function prepare(folder: string, initramfs: string, cache: string): Promise<MachineSpec> {
  const context = { cache, signal: new AbortController().signal, report() {} };
  const image = await debianBuilder.build({ type: "debian", suite: "bookworm" }, context);
  const common = await buildInitramfs(image.kernel!, image.busybox!, image.modules, context);
  const config = join(folder, "config.cpio");
  const guest = { hostname: "bench", environment: {}, nics: [], mounts: [], files: [] };
  await Deno.writeFile(config, cpioArchive(guestConfigFiles(guest)));
  await joinFiles([common, config], initramfs);
  const path = join(folder, "disk");
  await Deno.writeFile(path, new Uint8Array(16 * MEBIBYTE));
  return {
    id: ID,
    stack: "bench",
    address: "web",
    cpus: 1,
    memory: MEMORY,
    maxMemory: MEMORY,
    kernel: image.kernel!.kernel,
    initramfs: [common, config],
    cmdline: "quiet",
    disks: [{ name: "data", path, format: "raw", serial: "data", readOnly: false, size: 16 * MEBIBYTE }],
    nics: [{
      name: "eth0",
      mac: "02:00:00:00:00:0a",
      ip: "10.63.0.10",
      network: "lan",
      cidr: "10.63.0.0/24",
      gateway: "10.63.0.1",
      dns: "10.63.0.2",
      nat: false,
      forwards: [],
    }],
    hasAgent: false,
    bootKey: "",
    engine: { type: "xen" },
  };
}

function xlConfiguration(spec: MachineSpec, initramfs: string, disk: string, bridge: string): string {
  return Object.entries({
    name: NAME,
    type: "pvh",
    memory: spec.memory / MEBIBYTE,
    vcpus: spec.cpus,
    kernel: spec.kernel,
    ramdisk: initramfs,
    cmdline: "console=hvc0 quiet",
    disk: [`format=raw,vdev=xvda,access=rw,backendtype=phy,target=${disk}`],
    vif: [`bridge=${bridge},mac=${spec.nics[0]!.mac}`],
  }).map(([key, value]) => `${key} = ${JSON.stringify(value)}\n`).join("");
}

/** xl waits for the daemon that serves consoles, where none runs yet. */
async function startConsoled(hypervisor: Xen): Promise<AsyncDisposable> {
  const { success } = await new Deno.Command("pidof", { args: ["xenconsoled"], stdout: "null" }).output();
  if (success) return { [Symbol.asyncDispose]: () => Promise.resolve() };
  const { major, minor } = hypervisor.version();
  const daemon = new Deno.Command(`/usr/lib/xen-${major}.${minor}/bin/xenconsoled`, {
    args: ["-i"],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
  return {
    async [Symbol.asyncDispose]() {
      daemon.kill();
      await daemon.status;
    },
  };
}

async function run(program: string, args: readonly string[]): Promise<void> {
  const { success, stderr } = await new Deno.Command(program, { args: [...args], stdin: "null" }).output();
  if (!success) {
    throw new Error(`"${program} ${args.join(" ")}" failed: ${new TextDecoder().decode(stderr).trim()}`);
  }
}

/** The first domain and the last of many, all of which stay. */
async function compareMany(
  hypervisor: Xen,
  xenstore: Xenstore,
  spec: MachineSpec,
  cache: string,
): Promise<Figure> {
  const context = { cache, signal: new AbortController().signal, report() {} };
  const kernel = await unpackKernel(spec.kernel!, context);
  const free = hypervisor.physicalInfo().freePages;
  const times: number[] = [];
  const domains: { domid: number; handle: Uint8Array<ArrayBuffer> }[] = [];
  try {
    for (let index = 0; index < MANY; index++) {
      const id = `be0c4be0c4be00${index.toString(16).padStart(2, "0")}`;
      const started = performance.now();
      const { domid } = await buildDomain(hypervisor, xenstore, {
        id,
        name: `bench-${index}`,
        cpus: 1,
        maxCpus: 1,
        memory: SMALL,
        maxMemory: SMALL,
        kernel,
        kernelName: spec.kernel!,
        initramfs: [],
        commandLine: "quiet",
        disks: [],
        networks: [],
        furtherConsoles: 0,
      });
      times.push(performance.now() - started);
      domains.push(hypervisor.domain(domid)!);
    }
  } finally {
    for (const domain of domains) await destroyDomain(hypervisor, xenstore, domain);
  }
  const left = free - hypervisor.physicalInfo().freePages;
  if (left !== 0) throw new Error(`${left} pages were not given back`);
  const [first, last] = [times[1]!, times.at(-1)!];
  return {
    name: `domain ${MANY} of ${MANY}`,
    value: rounded(last),
    unit: "ms",
    peer: "domain 2",
    peer_value: rounded(first),
    ratio: rounded(last / first),
  };
}
