/**
 * Driver of machines: it turns a declaration into a spec and lets an engine carry it out.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { join } from "node:path";
import {
  type Chosen,
  type DiskProps,
  formatIpv4,
  formatSize,
  isSecret,
  isUnknown,
  joinField,
  type NetworkProps,
  parseCidr,
  parseDuration,
  parseIpv4,
  parseSize,
  type Probe,
  type ResourceReference,
  type Size,
  vmDefinition,
  XEN_MAX_CPUS,
  type XenOptions,
} from "../../dsl/mod.ts";
import {
  covers,
  type Disruption,
  type Draft,
  type FieldDifference,
  type Instance,
  type Kind,
  type Request,
} from "../../planner/mod.ts";
import {
  BALLOON_RATIO,
  type Engine,
  type Machine,
  type MachineDisk,
  type MachineForward,
  type MachineNeeds,
  type MachineNic,
  type MachineSpec,
  type OperationOptions,
} from "../engine.ts";
import { MachineError, writeError } from "../errors.ts";
import { exists, removeIfThere, writeWhole } from "../files.ts";
import { guestConfigFiles } from "../guest/config.ts";
import type { BuildContext, BuiltImage, ImageBuilder, KernelBuilder } from "../images/builder.ts";
import { cpioArchive } from "../images/cpio.ts";
import { buildInitramfs } from "../images/initramfs.ts";
import { unpackKernel } from "../images/kernel_image.ts";
import { emptyQcow2 } from "../images/qcow2.ts";
import { runTool, storeKey } from "../images/store.ts";
import { machineFolder, type Paths } from "../paths.ts";
import { waitUntilReady } from "../readiness.ts";
import { diskSerial } from "./disk_kind.ts";

/** What the driver of machines is made of. */
export interface VmKindOptions {
  /** Folders of this host. */
  readonly paths: Paths;
  /** Engines, most preferred first. */
  readonly engines: readonly Engine[];
  /** Builders of images. */
  readonly images: readonly ImageBuilder[];
  /** Builders of kernels. */
  readonly kernels: readonly KernelBuilder[];
}

/** A NIC in normal form, completed. */
export interface VmNic {
  /** The network. */
  readonly network: ResourceReference;
  /** Address in it. */
  readonly ip?: string;
  /** Ethernet address. */
  readonly mac?: string;
  /** Port forwards. */
  readonly forwards?: Readonly<
    Record<string, { guest: number; host?: number; address: string; protocol: "tcp" | "udp" }>
  >;
}

/** Props of a machine in normal form, completed. */
export interface VmNormalProps {
  /** vCPUs. */
  readonly cpus: number;
  /** Memory. */
  readonly memory: Size;
  /** Memory that it can grow to. */
  readonly maxMemory: Size;
  /** Image. */
  readonly image: Chosen;
  /** Kernel in place of the image's own. */
  readonly kernel?: Chosen;
  /** More words for the kernel's command line. */
  readonly cmdline?: string;
  /** Size of the root disk. */
  readonly rootSize?: Size;
  /** Disks. */
  readonly disks?: Readonly<
    Record<string, { disk: ResourceReference; mount?: string; readOnly: boolean; size?: Size }>
  >;
  /** NICs. */
  readonly nics?: Readonly<Record<string, VmNic>>;
  /** Environment. */
  readonly env?: Readonly<Record<string, string>>;
  /** Files. */
  readonly files?: Readonly<Record<string, { content: string; mode: number }>>;
  /** Script to run at boot. */
  readonly command?: string;
  /** Probes. */
  readonly ready?: Probe | readonly Probe[];
  /** Engine. */
  readonly engine: Chosen;
  /** Host name. */
  readonly hostname: string;
  /** Whether it should run. */
  readonly power: "running" | "stopped" | "paused" | "crashed";
  /** How long a shutdown may take. */
  readonly shutdownTimeout: `${number}s`;
}

/** What is known of a machine after apply. */
export interface VmOutputs {
  /** Engine that runs it. */
  readonly engine: string;
  /** Host name. */
  readonly hostname: string;
  /** NICs. */
  readonly nics: Readonly<
    Record<string, { ip: string; mac: string; forwards: Readonly<Record<string, number>> }>
  >;
  /** Identity of the image's content. */
  readonly image: string;
  /** Memory that it can grow to without a restart. */
  readonly maxMemory: Size;
}

/** Capacities are whole sectors. */
const SECTOR = 512;
/** Most disks and NICs that one machine may have together. */
const MAX_DEVICES = 20;
/** Emulated machines have less memory than this, in bytes. */
const EMULATED_MEMORY = 2 ** 31;
/** What only the control domain of a Xen host has. */
const XEN_DEVICE = "/dev/xen/privcmd";

/** Which change of a field is carried out how; a field covers those inside it. */
const DISRUPTIONS: readonly (readonly [field: string, disruption: Disruption])[] = [
  ["cpus", { class: "reboot", mechanism: "restart with other vCPUs" }],
  ["maxMemory", { class: "none", mechanism: "from the next start" }],
  ["image", { class: "recreate", mechanism: "new root disk" }],
  ["kernel", { class: "reboot", mechanism: "restart with another kernel" }],
  ["cmdline", { class: "reboot", mechanism: "restart with another command line" }],
  ["env", { class: "reboot", mechanism: "read at boot" }],
  ["files", { class: "reboot", mechanism: "written at boot" }],
  ["command", { class: "reboot", mechanism: "run at boot" }],
  ["hostname", { class: "reboot", mechanism: "set at boot" }],
  ["ready", { class: "none", mechanism: "probed again" }],
  ["shutdownTimeout", { class: "none" }],
  ["engine", { class: "reboot", mechanism: "restart with other options" }],
  ["engine.type", { class: "recreate", mechanism: "another engine" }],
  ["engine.weight", { class: "live", mechanism: "scheduler" }],
  ["engine.cap", { class: "live", mechanism: "scheduler" }],
  ["engine.pin", { class: "live", mechanism: "scheduler" }],
  ["engine.crash", { class: "live", mechanism: "from the next crash" }],
];

/**
 * Makes the kind of machines.
 *
 * @param options Folders, engines and builders
 * @returns The kind
 */
export function vmKind(options: VmKindOptions): Kind<VmNormalProps, VmOutputs> {
  const driver = new Driver(options);
  return {
    name: vmDefinition.name,
    schema: vmDefinition.schema as unknown as Kind<VmNormalProps, VmOutputs>["schema"],
    replace: "delete-first",
    disruption,
    prepare: (drafts) => driver.prepare(drafts),
    predict,
    observe: (instances) => driver.observe(instances),
    preflight: (instances, signal) => driver.preflight(instances, signal),
    ensure: (request) => driver.ensure(request),
    ready: (request) => driver.ready(request),
    remove: (request) => driver.remove(request),
  };
}

function disruption(
  { field, before, after }: FieldDifference,
  recorded: Instance<VmNormalProps, VmOutputs>,
  desired: VmNormalProps,
): Disruption {
  const isStopped = recorded.props.power !== "running" && recorded.props.power !== "paused";
  if (field === "memory" && typeof after === "string") {
    const limit = recorded.outputs?.maxMemory ?? recorded.props.maxMemory;
    if (parseSize(after) > parseSize(limit)) {
      return { class: "reboot", mechanism: `restart: it can grow to ${limit}` };
    }
    if (parseSize(after) * BALLOON_RATIO < parseSize(limit)) {
      return { class: "reboot", mechanism: `restart: it can shrink to a quarter of ${limit}` };
    }
    if (desired.engine.hypervisor !== undefined) {
      return { class: "reboot", mechanism: "restart: a hypervisor's memory is fixed" };
    }
    return { class: "live", mechanism: "balloon" };
  }
  // Nobody can tell whether the image is another one.
  if (field === "image.fingerprint" && before === undefined) return { class: "none", mechanism: "noted" };
  const { type, maxCpus } = recorded.props.engine;
  if (field === "cpus" && type === "xen" && typeof maxCpus === "number" && Number(after) <= maxCpus) {
    return { class: "live", mechanism: "vCPU hotplug" };
  }
  if (field === "power") {
    if (after === "stopped") return { class: "reboot", mechanism: "shut down" };
    if (before === "paused") return { class: "live", mechanism: "resume" };
    return { class: "none", mechanism: before === "crashed" ? "power off and start" : "start" };
  }
  if (field === "rootSize") {
    if (after === undefined) return { class: "none", mechanism: "stays as large as it is" };
    const isGrowth = typeof after === "string" &&
      (typeof before !== "string" || parseSize(after) > parseSize(before));
    return isGrowth
      ? { class: "live", mechanism: "grow" }
      : { class: "recreate", mechanism: "a disk cannot shrink" };
  }
  const device = /^(disks|nics)\.([^.[]+)/.exec(field);
  if (device) {
    const [, group, name] = device;
    const had = recorded.props[group as "disks" | "nics"]?.[name!] !== undefined;
    const isWhole = !had || desired[group as "disks" | "nics"]?.[name!] === undefined;
    if (!isWhole && /^disks\..*\.size$/.test(field)) return { class: "live", mechanism: "grow" };
    if (!isWhole && /\.forwards\b/.test(field)) return { class: "live", mechanism: "port forward" };
    if (isStopped) return { class: "none", mechanism: "from the next start" };
    if (isWhole && recorded.outputs?.engine !== "qemu") {
      return { class: "reboot", mechanism: `restart with${had ? "out the" : " another"} device` };
    }
    if (isWhole) return { class: "hotplug", mechanism: had ? "PCIe unplug" : "PCIe plug" };
    return { class: "reboot", mechanism: "restart with another device" };
  }
  let best: (typeof DISRUPTIONS)[number] | undefined;
  for (const entry of DISRUPTIONS) {
    if (covers(entry[0], field) && entry[0].length > (best?.[0].length ?? 0)) best = entry;
  }
  if (best?.[1].class === "reboot" && isStopped) return { class: "none", mechanism: "from the next start" };
  return best?.[1] ?? { class: "reboot", mechanism: "restart" };
}

/** Derives what is not said, and checks what only all machines together and this host can tell. */
function prepare(
  drafts: readonly Draft<VmNormalProps, VmOutputs>[],
  builders: ReadonlyMap<string, ImageBuilder>,
  isControlDomain: boolean,
): void {
  const macs = new Map<string, string>();
  const ips = new Map<string, string>();
  const ports = new Map<string, string>();
  const writers = new Map<string, string>();
  const readers: { draft: Draft<VmNormalProps, VmOutputs>; disk: string; field: string }[] = [];
  const claim = (
    taken: Map<string, string>,
    key: string,
    draft: Draft<VmNormalProps, VmOutputs>,
    field: string,
    what: string,
    value: unknown,
  ) => {
    const other = taken.get(key);
    if (other !== undefined) {
      draft.report(field, `${what} is used by "${other}" too: give each its own`, value);
    } else taken.set(key, `${draft.address}.${field}`);
  };
  for (const draft of drafts) {
    const { props, address, report } = draft;
    const chosen = props.engine?.type;
    const isXen = chosen === "xen" || chosen === "auto" && draft.recorded?.engine === "xen";
    // A control domain sees its own memory only, not the host's.
    const hostMemory = isXen || chosen === "auto" && isControlDomain
      ? Number.MAX_SAFE_INTEGER
      : Deno.systemMemoryInfo().total;
    const memory = knownSize(props.memory);
    if (memory !== undefined && memory > hostMemory) {
      report("memory", `Memory is more than this host has (${readable(hostMemory)})`, props.memory);
    }
    const maxMemory = knownSize(props.maxMemory);
    if (memory !== undefined && maxMemory !== undefined && maxMemory > memory * BALLOON_RATIO) {
      report(
        "maxMemory",
        `Size must be at most ${BALLOON_RATIO} times that of memory (${props.memory})`,
        props.maxMemory,
      );
    }
    if (isSecret(props.cmdline)) {
      report(
        "cmdline",
        "A secret cannot be here, as the guest and the host show the command line to everybody: use env",
      );
    }
    const builder = builders.get(props.image?.type);
    if (builder?.isForeign) {
      const fields: string[] = (["files", "env", "command", "hostname"] as const).filter((field) =>
        props[field] !== undefined
      );
      for (const [name, { mount }] of Object.entries(props.disks ?? {})) {
        if (mount !== undefined) fields.push(`${joinField("disks", name)}.mount`);
      }
      const probes = (Array.isArray(props.ready) ? props.ready : [props.ready]) as (Probe | undefined)[];
      if (probes.some((probe) => probe?.type === "exec")) fields.push("ready");
      for (const field of fields) {
        report(field, `An image of type "${props.image.type}" has no agent of ours to carry this out`);
      }
    }
    if (memory !== undefined && maxMemory !== undefined && maxMemory < memory) {
      report("maxMemory", `Size must be at least that of memory (${props.memory})`, props.maxMemory);
    }
    const devices = Object.keys(props.disks ?? {}).length + Object.keys(props.nics ?? {}).length;
    if (devices > MAX_DEVICES) {
      report("", `A machine may have at most ${MAX_DEVICES} disks and NICs`, devices);
    }
    for (const [name, { disk, readOnly }] of Object.entries(props.disks ?? {})) {
      if (isUnknown(disk)) continue;
      if (readOnly === true) {
        readers.push({ draft, disk: disk.$resource, field: joinField("disks", name) });
        continue;
      }
      claim(
        writers,
        disk.$resource,
        draft,
        joinField("disks", name),
        `Disk "${disk.$resource}"`,
        disk.$resource,
      );
    }
    if (isEmulated(draft)) checkEmulated(draft, chosen, builder);
    if (isXen) checkXen(draft, chosen, builder);
    const hasHypervisor = props.engine?.hypervisor !== undefined;
    if (hasHypervisor) checkHypervisor(draft, builder);
    // A machine that runs must be told when one of its disks grows.
    const disks = Object.entries(props.disks ?? {}).map(([name, each]) => {
      const size = isUnknown(each.disk)
        ? undefined
        : draft.references.get(each.disk.$resource)?.size as Size | undefined;
      return [name, { ...each, ...(size === undefined ? {} : { size }) }] as const;
    });
    draft.props = {
      ...props,
      ...(disks.length > 0 ? { disks: Object.fromEntries(disks) } : {}),
      // A machine that is renamed keeps its identity.
      hostname: props.hostname ?? draft.recorded?.hostname ?? hostnameOf(address),
      ...(memory === undefined ? {} : {
        maxMemory: props.maxMemory ?? (hasHypervisor ? props.memory : derivedMaxMemory(
          memory,
          draft.recorded?.maxMemory,
          isEmulated(draft) ? Math.min(hostMemory, EMULATED_MEMORY - 2 ** 20) : hostMemory,
        )),
      }),
      ...(props.nics
        ? { nics: Object.fromEntries(Object.entries(props.nics).map(([name, nic]) => [name, { ...nic }])) }
        : {}),
    };
  }
  for (const { draft, disk, field } of readers) {
    const writer = writers.get(disk);
    if (writer !== undefined) {
      draft.report(field, `Disk "${disk}" is written to by "${writer}": one writer or several readers`);
    }
  }
  // Addresses that are written down come first, then those on record, then derived ones.
  const nics = drafts.flatMap((draft) =>
    Object.entries(draft.props.nics ?? {}).map(([name, nic]) => ({
      draft,
      name,
      nic,
      field: joinField("nics", name),
    }))
  );
  const networkOf = (entry: (typeof nics)[number]) => {
    const network = entry.nic.network;
    const props = isUnknown(network)
      ? undefined
      : entry.draft.references.get(network.$resource) as NetworkProps | undefined;
    if (!props || isUnknown(props.cidr)) return undefined;
    return { key: network.$resource, ...parseCidr(props.cidr), cidr: props.cidr };
  };
  for (const entry of nics) {
    const { draft, nic, field } = entry;
    if (typeof nic.mac === "string") claim(macs, nic.mac, draft, `${field}.mac`, "MAC address", nic.mac);
    for (const [name, forward] of Object.entries(nic.forwards ?? {})) {
      if (typeof forward.host !== "number") continue;
      const key = `${forward.protocol} ${forward.address} ${forward.host}`;
      claim(ports, key, draft, joinField(`${field}.forwards`, name), "Host port", forward.host);
    }
    const network = networkOf(entry);
    if (typeof nic.ip !== "string" || !network) continue;
    const offset = parseIpv4(nic.ip) - network.base;
    if (offset < 0 || offset >= network.size) {
      draft.report(`${field}.ip`, `Address must be in its network ${network.cidr}`, nic.ip);
    } else if (offset < FIRST_HOST || offset === network.size - 1) {
      draft.report(
        `${field}.ip`,
        `Address is taken by the network itself: use ${formatIpv4(network.base + FIRST_HOST)} or above`,
        nic.ip,
      );
    } else {
      claim(ips, `${network.key} ${nic.ip}`, draft, `${field}.ip`, "Address", nic.ip);
    }
  }
  for (const pass of ["recorded", "derived"] as const) {
    for (const entry of nics) {
      const { draft, name, nic, field } = entry;
      const mine = nic as { ip?: string; mac?: string };
      const seed = digest(`nic\n${draft.stack}\n${draft.address}\n${name}`);
      if (pass === "derived" && mine.mac === undefined) {
        mine.mac = draft.recorded?.nics?.[name]?.mac ?? macFrom(seed);
      }
      const network = networkOf(entry);
      if (mine.ip !== undefined || !network) continue;
      if (pass === "recorded") {
        const ip = draft.recorded?.nics?.[name]?.ip;
        if (ip === undefined) continue;
        const offset = parseIpv4(ip) - network.base;
        if (offset < FIRST_HOST || offset >= network.size - 1 || ips.has(`${network.key} ${ip}`)) continue;
        mine.ip = ip;
        ips.set(`${network.key} ${ip}`, `${draft.address}.${field}.ip`);
        continue;
      }
      const room = network.size - FIRST_HOST - 1;
      const start = room > 0 ? seed.readUInt32BE(8) % room : 0;
      for (let step = 0; step < room && mine.ip === undefined; step++) {
        const ip = formatIpv4(network.base + FIRST_HOST + (start + step) % room);
        if (ips.has(`${network.key} ${ip}`)) continue;
        mine.ip = ip;
        ips.set(`${network.key} ${ip}`, `${draft.address}.${field}.ip`);
      }
      if (mine.ip === undefined) {
        draft.report(`${field}.ip`, `Network ${network.cidr} has no free address: make it larger`);
      }
    }
  }
}

/** Tells whether a machine is to be an emulated one, or is and stays one. */
function isEmulated({ props, recorded }: Draft<VmNormalProps, VmOutputs>): boolean {
  const chosen = props.engine?.type;
  return chosen === "emulated" || chosen === "auto" && recorded?.engine === "emulated";
}

function refuseEmulated(
  { report }: Draft<VmNormalProps, VmOutputs>,
  field: string,
  given: string,
  advice: string,
  value?: unknown,
): void {
  report(field, `Engine "emulated" gives a machine ${given}: ${advice}, or choose another engine`, value);
}

/** Reports what an emulated machine cannot be. Its engine would refuse it too, but only when it is started. */
function checkEmulated(
  draft: Draft<VmNormalProps, VmOutputs>,
  chosen: string,
  builder: ImageBuilder | undefined,
): void {
  const { props } = draft;
  const refuse = (field: string, given: string, advice: string, value?: unknown) =>
    refuseEmulated(draft, field, given, advice, value);
  if (typeof props.cpus === "number" && props.cpus !== 1) {
    refuse("cpus", "one vCPU", "leave cpus out", props.cpus);
  }
  for (const field of ["memory", "maxMemory"] as const) {
    if ((knownSize(props[field]) ?? 0) >= EMULATED_MEMORY) {
      refuse(field, "less than 2GiB of memory", "ask for less", props[field]);
    }
  }
  // Another image is another machine, for which auto() chooses anew.
  const sources = chosen === "emulated" ? ["image", "kernel"] as const : ["kernel"] as const;
  for (const field of sources) {
    if (props[field]?.arch !== "amd64") continue;
    refuse(`${field}.arch`, "a 32-bit processor", "leave arch out", props[field].arch);
  }
  if (props.kernel?.type === "host") {
    refuse("kernel", "a 32-bit processor, which cannot run the host's kernel", "leave kernel out");
  }
  if (chosen === "emulated" && !props.kernel && builder?.needsFirmware?.(props.image)) {
    refuse("image", "no firmware to boot a disk by", "give it a kernel");
  }
}

/** Reports what a domain cannot be. Its engine would refuse it too, but only when it is started. */
function checkXen(
  { props, references, report }: Draft<VmNormalProps, VmOutputs>,
  chosen: string,
  builder: ImageBuilder | undefined,
): void {
  const refuse = (field: string, given: string, advice: string, value?: unknown) =>
    report(field, `Engine "xen" gives a machine ${given}: ${advice}, or choose another engine`, value);
  const { cpus, image, kernel, engine } = props;
  if (typeof cpus === "number") {
    if (cpus > XEN_MAX_CPUS) refuse("cpus", `at most ${XEN_MAX_CPUS} vCPUs`, "ask for less", cpus);
    const { cap, pin, maxCpus } = engine as XenOptions;
    if (maxCpus !== undefined && maxCpus < cpus) {
      report("engine.maxCpus", `It must be at least the number of vCPUs, which is ${cpus}`, maxCpus);
    }
    const most = Math.max(cpus, maxCpus ?? 0) * 100;
    if (cap !== undefined && cap > most) {
      report("engine.cap", `A cap must be at most 100 for each vCPU, which is ${most}`, cap);
    }
    if (Array.isArray(pin?.[0]) && pin.length !== cpus) {
      report("engine.pin", `There must be one list of processors for each vCPU, which is ${cpus}`, pin);
    }
  }
  for (const [name, { disk }] of Object.entries(props.disks ?? {})) {
    const target = isUnknown(disk)
      ? undefined
      : references.get(disk.$resource) as Partial<DiskProps> | undefined;
    if (target?.format !== "qcow2") continue;
    refuse(joinField("disks", name), "disks of the format raw only", "leave format out", "qcow2");
  }
  // Another image is another machine, for which auto() chooses anew.
  for (const field of chosen === "xen" ? ["image", "kernel"] as const : ["kernel"] as const) {
    if (props[field]?.arch !== "i386") continue;
    refuse(`${field}.arch`, "no way to boot Debian's 32-bit kernels", "leave arch out", "i386");
  }
  if (chosen !== "xen") return;
  if (!kernel && builder?.needsFirmware?.(image)) {
    refuse("image", "no firmware to boot a disk by", "give it a kernel");
  } else if (image?.format === "qcow2" && image.disk !== undefined) {
    refuse("image.format", "disks of the format raw only", "convert the image", "qcow2");
  }
}

/** Refuses what a machine under a hypervisor of its own cannot have. */
function checkHypervisor(
  { props, report }: Draft<VmNormalProps, VmOutputs>,
  builder: ImageBuilder | undefined,
): void {
  const [memory, maxMemory] = [knownSize(props.memory), knownSize(props.maxMemory)];
  if (memory !== undefined && maxMemory !== undefined && maxMemory !== memory) {
    report("maxMemory", "Memory under a hypervisor is fixed: leave maxMemory out", props.maxMemory);
  }
  if (!props.kernel && builder?.needsFirmware?.(props.image)) {
    report("kernel", "A hypervisor boots no disk: give it a kernel");
  }
}

/** Room to grow stays as it is while it suffices: another maximum takes a restart. */
function derivedMaxMemory(memory: number, recorded: Size | undefined, most: number): Size {
  if (
    recorded !== undefined && memory <= parseSize(recorded) && memory * BALLOON_RATIO >= parseSize(recorded)
  ) {
    return recorded;
  }
  return formatSize(Math.max(memory, Math.min(memory * 2, roundDown(most))));
}

/** First address for guests: the two before it are the gateway and the name server. */
const FIRST_HOST = 3;

function predict({ props, recorded }: Draft<VmNormalProps, VmOutputs>): Partial<VmOutputs> {
  const nics: Record<string, unknown> = {};
  for (const [name, nic] of Object.entries(props.nics ?? {})) {
    const forwards: Record<string, number> = {};
    for (const [key, forward] of Object.entries(nic.forwards ?? {})) {
      const port = forward.host ?? recorded?.nics?.[name]?.forwards?.[key];
      if (port !== undefined) forwards[key] = port;
    }
    nics[name] = { ip: nic.ip, mac: nic.mac, forwards };
  }
  return { hostname: props.hostname, nics: nics as VmOutputs["nics"] };
}

class Driver {
  readonly #options: VmKindOptions;

  constructor(options: VmKindOptions) {
    this.#options = options;
  }

  /** Completes and checks props, and asks images that change by themselves what they are now. */
  async prepare(drafts: readonly Draft<VmNormalProps, VmOutputs>[]): Promise<void> {
    const builders = new Map(this.#options.images.map((each) => [each.type, each]));
    prepare(drafts, builders, await exists(XEN_DEVICE));
    const context: BuildContext = {
      cache: this.#options.paths.cache,
      signal: new AbortController().signal,
      report() {},
    };
    for (const draft of drafts) {
      const { image } = draft.props;
      const builder = builders.get(image?.type);
      try {
        // What a machine on record was made of it has for itself.
        if (!draft.recorded) await builder?.check?.(image);
        const fingerprint = await builder?.fingerprint?.(image, context);
        if (fingerprint !== undefined) draft.props = { ...draft.props, image: { ...image, fingerprint } };
        // Another image is another machine, for which auto() chooses anew.
        if (draft.props.engine?.type === "emulated" && await builder?.is64Bit?.(image)) {
          refuseEmulated(
            draft,
            "image",
            "a 32-bit processor, and its programs take a 64-bit one",
            "take another",
          );
        }
      } catch (error) {
        draft.report("image", error instanceof Error ? error.message : String(error));
      }
    }
  }

  async observe(
    instances: readonly Instance<VmNormalProps, VmOutputs>[],
  ): Promise<Map<string, { props: { power: string } }>> {
    const found = new Map<string, { props: { power: string } }>();
    const wanted = new Map(instances.map((each) => [each.id, each.address]));
    for (const engine of this.#options.engines) {
      for (const status of await engine.list(new Set(wanted.keys()))) {
        const address = wanted.get(status.id);
        if (address !== undefined) found.set(address, { props: { power: status.state } });
      }
    }
    return found;
  }

  /** Refuses before anything is changed what no engine of this host can run. */
  async preflight(
    instances: readonly Omit<Draft<VmNormalProps, VmOutputs>, "report">[],
    signal: AbortSignal,
  ): Promise<void> {
    const seen = new Set<string>();
    for (const { address, props, references, recorded } of instances) {
      if (props.power === "stopped" || isUnknown(props.engine)) continue;
      const needs = await this.#needs(props, references);
      const current = this.#current(props.engine, recorded?.engine);
      const key = JSON.stringify([props.engine, needs, props.image.arch, props.kernel?.arch, current?.name]);
      if (seen.has(key)) continue;
      seen.add(key);
      try {
        await this.#chooseEngine(props, needs, { signal }, current);
      } catch (error) {
        if (!(error instanceof MachineError)) throw error;
        throw new MachineError(`Cannot run "${address}" as ${error.message}`, { cause: error });
      }
    }
  }

  async ensure(request: Request<VmNormalProps, VmOutputs>): Promise<VmOutputs> {
    const { props, id, address, stack } = request;
    const engine = await this.#engine(props.engine, request);
    const machine = engine.attach(id);
    const context: BuildContext = {
      cache: this.#options.paths.cache,
      signal: request.signal,
      report: request.report,
      ...(engine.name === "emulated" ? { arch: "i386" } : {}),
    };
    const built = await this.#image(props, context);
    request.signal.throwIfAborted();
    const folder = machineFolder(this.#options.paths, id);
    await Deno.mkdir(folder, { recursive: true, mode: 0o700 });
    const before = await machine.spec();
    const nics = this.#nics(request, before);
    const disks = await this.#disks(request, built, folder, before, engine);
    const hasAgent = built.initramfs === undefined;
    const config = join(folder, "config.cpio");
    const initramfs: string[] = [];
    if (hasAgent && built.kernel && built.busybox !== undefined) {
      initramfs.push(await buildInitramfs(built.kernel, built.busybox, built.modules, context), config);
      await writeConfig(config, request, built, nics, disks);
    } else if (built.initramfs) {
      initramfs.push(built.initramfs);
    }
    const spec: MachineSpec = {
      id,
      stack,
      address,
      hostname: props.hostname,
      cpus: props.cpus,
      memory: parseSize(props.memory),
      maxMemory: parseSize(props.maxMemory),
      ...(built.kernel ? { kernel: await bootableKernel(engine, built.kernel.kernel, context) } : {}),
      initramfs,
      cmdline: [built.cmdline, hasAgent ? "quiet net.ifnames=0" : "", props.cmdline ?? ""].filter((each) =>
        each
      ).join(" "),
      disks,
      nics,
      hasAgent,
      bootKey: storeKey([props.hostname, props.env ?? {}, props.files ?? {}, props.command ?? ""]),
      engine: { ...props.engine },
    };
    if (props.power === "stopped") {
      await machine.shutdown(parseDuration(props.shutdownTimeout), request);
      await writeStopped(machine, spec);
    } else {
      if (request.before?.power === "paused") await machine.resume().catch(() => {});
      if (before) await releaseDisks(machine, before, spec, request);
      const { isRestarted } = await machine.update(spec, {
        signal: request.signal,
        report: request.report,
        shutdownTimeout: parseDuration(props.shutdownTimeout),
      });
      if (!isRestarted) await configureLive(machine, spec, request);
    }
    return {
      engine: engine.name,
      hostname: props.hostname,
      image: built.key,
      // Another maximum holds from the next start.
      maxMemory: formatSize((await machine.spec())?.maxMemory ?? spec.maxMemory),
      nics: Object.fromEntries(nics.map((nic) => [nic.name, {
        ip: nic.ip,
        mac: nic.mac,
        forwards: Object.fromEntries(nic.forwards.map((forward) => [forward.name, forward.host])),
      }])),
    };
  }

  async ready(request: Request<VmNormalProps, VmOutputs>): Promise<void> {
    const { props } = request;
    if (props.power === "stopped") return;
    const engine = this.#options.engines.find((each) => each.name === request.outputs?.engine);
    const machine = engine?.attach(request.id);
    if (!machine) return;
    const spec = await machine.spec();
    const probes: Probe[] = props.ready === undefined
      ? []
      : Array.isArray(props.ready)
      ? [...props.ready]
      : [props.ready as Probe];
    if (spec?.hasAgent && probes.every((probe) => probe.type !== "agent")) {
      probes.unshift({ type: "agent", timeout: probes[0]?.timeout ?? "5m" });
    }
    await waitUntilReady(machine, probes, request);
    for (const [name, { mount }] of Object.entries(props.disks ?? {})) {
      if (mount === undefined || !spec?.hasAgent) continue;
      const { status } = await machine.guest.output(["grep", "-q", ` ${mount} `, "/proc/mounts"], {
        signal: request.signal,
      });
      if (status !== 0) {
        throw new MachineError(
          `its disk "${name}" is not mounted on "${mount}": see logs; a new disk needs { filesystem: "ext4" }`,
        );
      }
    }
    if (props.rootSize !== undefined && spec?.hasAgent && spec.disks[0]?.name === "root") {
      request.report("growing the root file system");
      const { status, stderr } = await machine.guest.output(
        ["sh", "-c", RESIZE_SCRIPT, "sh", spec.disks[0].serial],
        { signal: request.signal },
      );
      if (status !== 0) throw new MachineError(`the root file system cannot grow: ${stderr.trim()}`);
    }
  }

  async remove(request: Request<VmNormalProps, VmOutputs>): Promise<void> {
    for (const engine of this.#options.engines) {
      const machine = engine.attach(request.id);
      const { state } = await machine.status();
      if (state !== "absent" && state !== "stopped") {
        await machine.shutdown(parseDuration(request.props.shutdownTimeout), request);
      }
      await machine.destroy();
    }
    await removeIfThere(machineFolder(this.#options.paths, request.id));
  }

  /** A machine stays with its engine. */
  #current(choice: Chosen, name: string | undefined): Engine | undefined {
    return this.#options.engines.find((each) =>
      each.name === name && (choice.type === "auto" || choice.type === name)
    );
  }

  async #engine(choice: Chosen, request: Request<VmNormalProps, VmOutputs>): Promise<Engine> {
    const current = this.#current(choice, request.outputs?.engine);
    if (current) return current;
    const references = new Map([...request.dependencies].map(([address, { props }]) => [address, props]));
    return await this.#chooseEngine(request.props, await this.#needs(request.props, references), request);
  }

  /** Tells what a machine asks of its engine; what is not known yet is left out. */
  async #needs(props: VmNormalProps, references: Draft["references"]): Promise<MachineNeeds> {
    const of = <Props>(reference: ResourceReference) =>
      (isUnknown(reference) ? undefined : references.get(reference.$resource)) as Partial<Props> | undefined;
    const nics = Object.values(props.nics ?? {});
    const builder = this.#options.images.find((each) => each.type === props.image.type);
    return {
      cpus: props.cpus,
      hasNics: nics.length > 0,
      hasNat: nics.some(({ network }) => of<NetworkProps>(network)?.nat ?? true),
      hasFirmware: !props.kernel && (builder?.needsFirmware?.(props.image) ?? false),
      memory: knownSize(props.maxMemory) ?? 0,
      is64Bit: props.image.arch === "amd64" || props.kernel?.arch === "amd64" ||
        props.kernel?.type === "host" || (await builder?.is64Bit?.(props.image) ?? false),
      hasQcow2: props.image.disk !== undefined && props.image.format === "qcow2" ||
        Object.values(props.disks ?? {}).some(({ disk }) => of<DiskProps>(disk)?.format === "qcow2"),
    };
  }

  async #chooseEngine(
    props: VmNormalProps,
    needs: MachineNeeds,
    options: OperationOptions,
    current?: Engine,
  ): Promise<Engine> {
    const choice = props.engine;
    const candidates = current
      ? [current]
      : this.#options.engines.filter((each) => choice.type === "auto" || each.name === choice.type);
    if (candidates.length === 0) {
      const known = this.#options.engines.map((each) => each.name).join(", ");
      throw new MachineError(`its engine "${choice.type}" is not there: known are ${known}`);
    }
    const reasons: string[] = [];
    for (const engine of candidates) {
      if (engine.name === "xen" && (props.image.arch === "i386" || props.kernel?.arch === "i386")) {
        reasons.push("xen: it boots no 32-bit kernels of Debian's");
        continue;
      }
      const { isUsable, detail } = await engine.probe({ ...options, engine: choice, needs });
      if (isUsable) return engine;
      reasons.push(`${engine.name}: ${detail}`);
    }
    throw new MachineError(`no engine can run it here: ${reasons.join("; ")}`);
  }

  async #image(props: VmNormalProps, context: BuildContext): Promise<BuiltImage> {
    const builder = this.#options.images.find((each) => each.type === props.image.type);
    if (!builder) {
      throw new MachineError(
        `its image type "${props.image.type}" is not known: pass its builder in the images of cli()`,
      );
    }
    const image = await builder.build(props.image, context);
    if (!props.kernel) return image;
    const kernels = this.#options.kernels.find((each) => each.type === props.kernel!.type);
    if (!kernels) {
      throw new MachineError(
        `its kernel type "${props.kernel.type}" is not known: pass its builder in the kernels of cli()`,
      );
    }
    return { ...image, kernel: await kernels.build(props.kernel, context) };
  }

  #nics(request: Request<VmNormalProps, VmOutputs>, before: MachineSpec | undefined): MachineNic[] {
    const { props, dependencies } = request;
    return Object.entries(props.nics ?? {}).map(([name, nic]) => {
      const network = dependencies.get(nic.network.$resource)?.props as NetworkProps | undefined;
      if (!network) throw new MachineError(`its network "${nic.network.$resource}" is not on record`);
      const { base, prefix } = parseCidr(network.cidr);
      const kept = before?.nics.find((each) => each.name === name)?.forwards ?? [];
      const forwards = Object.entries(nic.forwards ?? {}).map(([key, forward]): MachineForward => ({
        name: key,
        protocol: forward.protocol,
        address: forward.address,
        host: forward.host ?? kept.find((each) => each.name === key)?.host ??
          request.outputs?.nics?.[name]?.forwards?.[key] ?? freePort(forward.address, forward.protocol),
        guest: forward.guest,
      }));
      return {
        name,
        mac: nic.mac!,
        ip: nic.ip!,
        network: nic.network.$resource,
        cidr: `${formatIpv4(base)}/${prefix}`,
        gateway: formatIpv4(base + 1),
        dns: formatIpv4(base + 2),
        nat: network.nat ?? true,
        forwards,
      };
    });
  }

  async #disks(
    request: Request<VmNormalProps, VmOutputs>,
    built: BuiltImage,
    folder: string,
    before: MachineSpec | undefined,
    engine: Engine,
  ): Promise<MachineDisk[]> {
    const { props, dependencies, stack, address } = request;
    const disks: MachineDisk[] = [];
    // The kernel serves the disks of domains, and can do no more than give out the bytes of a file.
    const isRawOnly = engine.name === "xen";
    const refuse = (what: string): never => {
      throw new MachineError(
        `Cannot use ${what} of "${address}" as it has the format qcow2 and the engine "xen" serves raw files only: ` +
          `convert it, or choose another engine`,
      );
    };
    if (built.root) {
      if (isRawOnly && built.root.format !== "raw") refuse("the image");
      const format = isRawOnly ? "raw" : "qcow2";
      const path = join(folder, `root.${format}`);
      const least = Math.ceil(built.root.size / SECTOR) * SECTOR;
      const size = Math.max(least, props.rootSize === undefined ? 0 : parseSize(props.rootSize));
      // The cache may be emptied: the machine keeps a name of its own for what its disk is based on.
      const base = join(folder, `base.${built.root.format}`);
      try {
        if (isRawOnly) await makeRawRoot(built.root.path, path, size, request);
        else if (!(await exists(path))) {
          await removeIfThere(base);
          await linkOrCopy(built.root.path, base, request);
          await writeWhole(path, emptyQcow2(size, { path: base, format: built.root.format }));
        }
      } catch (error) {
        throw writeError(`make the root disk of "${address}"`, error);
      }
      const serial = before?.disks.find((each) => each.name === "root")?.serial ??
        diskSerial(stack, `${address}.root`);
      disks.push({ name: "root", path, format, serial, readOnly: false, size });
    }
    for (const [name, { disk, readOnly }] of Object.entries(props.disks ?? {})) {
      const target = dependencies.get(disk.$resource);
      if (!target) throw new MachineError(`its disk "${disk.$resource}" is not on record`);
      const { path, serial } = target.outputs as { path: string; serial: string };
      const { format = "raw", size } = target.props as unknown as DiskProps;
      if (isRawOnly && format !== "raw") refuse(`the disk "${name}"`);
      disks.push({ name, path, format, serial, readOnly, size: parseSize(size) });
    }
    return disks;
  }
}

/** The emulator gets its kernel unpacked: unpacking takes seconds there. */
async function bootableKernel(engine: Engine, kernel: string, context: BuildContext): Promise<string> {
  return engine.name === "emulated" ? await unpackKernel(kernel, context) : kernel;
}

/** A machine that was never started is on record all the same. */
async function writeStopped(machine: Machine, spec: MachineSpec): Promise<void> {
  if (await machine.spec() === undefined) await machine.define(spec);
}

/** Writes the part of the initramfs that tells this machine from others. */
async function writeConfig(
  path: string,
  request: Request<VmNormalProps, VmOutputs>,
  built: BuiltImage,
  nics: readonly MachineNic[],
  disks: readonly MachineDisk[],
): Promise<void> {
  const { props } = request;
  const encoder = new TextEncoder();
  const files = guestConfigFiles({
    hostname: props.hostname,
    environment: { ...props.env },
    nics: nics.map((nic) => ({
      mac: nic.mac,
      name: nic.name,
      address: `${nic.ip}/${nic.cidr.split("/")[1]}`,
      gateway: nic.gateway,
      dns: nic.dns,
    })),
    ...(built.root?.filesystem !== undefined && built.root.init !== undefined
      ? {
        root: {
          device: `serial=${disks[0]!.serial}`,
          fstype: built.root.filesystem,
          init: built.root.init,
        },
      }
      : {}),
    mounts: Object.entries(props.disks ?? {}).filter(([, each]) => each.mount !== undefined).map(
      ([name, each]) => {
        const disk = disks.find((candidate) => candidate.name === name)!;
        return { serial: disk.serial, mountpoint: each.mount!, fstype: "ext4" };
      },
    ),
    files: Object.entries(props.files ?? {}).map(([file, { content, mode }]) => ({
      path: file,
      content: encoder.encode(content),
      mode,
    })),
    ...(props.command === undefined ? {} : { command: props.command }),
  });
  try {
    await writeWhole(path, cpioArchive(files));
  } catch (error) {
    throw writeError(`configure "${request.address}"`, error);
  }
}

/** Lets the guest unmount disks before they are taken away, so that nothing is lost. */
async function releaseDisks(
  machine: Machine,
  before: MachineSpec,
  spec: MachineSpec,
  request: Request<VmNormalProps, VmOutputs>,
): Promise<void> {
  const serials = before.disks.filter((disk) => !spec.disks.some((each) => each.name === disk.name))
    .map((disk) => disk.serial);
  if (serials.length === 0 || !before.hasAgent || (await machine.status()).state !== "running") return;
  request.report("unmounting disks");
  await inGuest(machine, request, UNMOUNT_SCRIPT, serials);
}

/** Finds a disk in the guest: by its serial number, or where disks have none, by the kernel's command line. */
const FIND_DISK_SCRIPT = `
find_disk() {
  for each in /sys/block/vd*; do
    [ "$(cat "$each/serial" 2>/dev/null)" = "$1" ] || continue
    device=/dev/\${each##*/}
    return 0
  done
  for each in $(cat /proc/cmdline); do
    case $each in "hypertopia.disk=$1":*) device=/dev/\${each##*:} && [ -b "$device" ] && return 0 ;; esac
  done
  return 1
}
`;

const UNMOUNT_SCRIPT = `${FIND_DISK_SCRIPT}
for serial in "$@"; do
  find_disk "$serial" || continue
  while grep -q "^$device " /proc/mounts; do
    umount "$device" || { echo "$device is in use: end what uses it" >&2; exit 1; }
  done
done
sync
`;

const RESIZE_SCRIPT = `${FIND_DISK_SCRIPT}
command -v resize2fs >/dev/null || exit 0
find_disk "$1" || { echo "the disk $1 is not there" >&2; exit 1; }
resize2fs "$device"
`;

/** Configures in the running guest what was plugged while it ran; what is there already stays as it is. */
async function configureLive(
  machine: Machine,
  spec: MachineSpec,
  request: Request<VmNormalProps, VmOutputs>,
): Promise<void> {
  if (!spec.hasAgent) return;
  const nics = spec.nics.flatMap((nic) => [nic.mac, nic.name, `${nic.ip}/${nic.cidr.split("/")[1]}`]);
  if (nics.length > 0) await inGuest(machine, request, NIC_SCRIPT, nics);
  const mounts = Object.entries(request.props.disks ?? {}).flatMap(([name, each]) =>
    each.mount === undefined ? [] : [spec.disks.find((disk) => disk.name === name)!.serial, each.mount]
  );
  if (mounts.length > 0) await inGuest(machine, request, MOUNT_SCRIPT, mounts);
}

const NIC_SCRIPT = `
one() {
  for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    for each in /sys/class/net/*; do
      [ "$(cat "$each/address")" = "$1" ] || continue
      old=$(basename "$each")
      [ "$old" = "$2" ] && ip -o addr show dev "$2" | grep -q " $3 " && return 0
      ip link set dev "$old" down
      [ "$old" = "$2" ] || ip link set dev "$old" name "$2"
      ip link set dev "$2" up && ip addr add "$3" dev "$2"
      return
    done
    sleep 0.5
  done
  echo "the NIC $1 does not appear" >&2
  return 1
}
while [ $# -gt 0 ]; do
  one "$1" "$2" "$3" || exit 1
  shift 3
done
`;

const MOUNT_SCRIPT = `${FIND_DISK_SCRIPT}
one() {
  for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    if find_disk "$1"; then
      grep -q "^$device $2 " /proc/mounts && return 0
      mkdir -p "$2" && mount -t ext4 "$device" "$2"
      return
    fi
    sleep 0.5
  done
  echo "the disk $1 does not appear" >&2
  return 1
}
while [ $# -gt 0 ]; do
  one "$1" "$2" || exit 1
  shift 2
done
`;

async function inGuest(
  machine: Machine,
  request: Request<VmNormalProps, VmOutputs>,
  script: string,
  args: readonly string[],
): Promise<void> {
  const { status, stderr } = await machine.guest.output(["sh", "-c", script, "sh", ...args], {
    signal: request.signal,
  });
  if (status !== 0) throw new MachineError(`the guest cannot do its part: ${stderr.trim()}`);
}

/** Gives a file another name, or copies it where the two are on different file systems. */
async function linkOrCopy(
  from: string,
  to: string,
  request: Request<VmNormalProps, VmOutputs>,
): Promise<void> {
  try {
    await Deno.link(from, to);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) throw error;
    await copyImage(from, to, request);
  }
}

/** Copies a file; on file systems that can, the two share what neither has changed. */
async function copyImage(
  from: string,
  to: string,
  request: Request<VmNormalProps, VmOutputs>,
): Promise<void> {
  request.report("copying the image");
  await runTool("cp", ["--sparse=always", "--reflink=auto", "--", from, to], { cache: "", ...request }, {
    package: "coreutils",
  });
}

/** Makes the root disk of a machine whose disks are raw, or makes it larger. */
async function makeRawRoot(
  image: string,
  path: string,
  size: number,
  request: Request<VmNormalProps, VmOutputs>,
): Promise<void> {
  if (!(await exists(path))) {
    const part = `${path}.part`;
    await removeIfThere(part);
    await copyImage(image, part, request);
    await Deno.chmod(part, 0o600);
    await Deno.rename(part, path);
  }
  if ((await Deno.stat(path)).size < size) await Deno.truncate(path, size);
}

function digest(text: string): Uint8Array & { readUInt32BE(offset: number): number } {
  return createHash("sha256").update(text).digest();
}

function macFrom(seed: Uint8Array): string {
  // A locally administered unicast address.
  const bytes = [0x02, ...seed.subarray(0, 5)];
  return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":");
}

/**
 * Derives a host name from an address.
 *
 * @param address Address of the machine, such as `web[0]`
 * @returns The name, such as `web-0`
 */
export function hostnameOf(address: string): string {
  const name = address.toLowerCase().replaceAll(/[^a-z0-9]+/g, "-").replaceAll(/^-+|-+$/g, "");
  return name.slice(-63).replace(/^-+/, "") || "guest";
}

function knownSize(value: unknown): number | undefined {
  return typeof value === "string" ? parseSize(value) : undefined;
}

function roundDown(bytes: number): number {
  return bytes - bytes % 2 ** 20;
}

function readable(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)}GiB`;
}

/** Finds a free port by taking it for a moment. */
function freePort(address: string, protocol: "tcp" | "udp"): number {
  if (protocol === "udp") {
    const socket = Deno.listenDatagram({ transport: "udp", hostname: address, port: 0 });
    const { port } = socket.addr as Deno.NetAddr;
    socket.close();
    return port;
  }
  using listener = Deno.listen({ hostname: address, port: 0 });
  return (listener.addr as Deno.NetAddr).port;
}
