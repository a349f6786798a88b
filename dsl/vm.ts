/**
 * Virtual machines.
 *
 * @module
 */

import {
  type ArchitectureMark,
  Choice,
  choice,
  type EngineChoice,
  type ImageSource,
  type KernelSource,
} from "./image.ts";
import type { Disk, FormatMark } from "./disk.ts";
import { type Nic, nicSchema } from "./network.ts";
import { type Input, type Output, reference } from "./output.ts";
import { type Probe, probeSchema } from "./probe.ts";
import { isResource, type KindDefinition, type LifecycleOptions, Resource } from "./resource.ts";
import {
  array,
  boolean,
  custom,
  duration,
  either,
  type Infer,
  number,
  object,
  oneOf,
  optional,
  record,
  resource,
  type Schema,
  size,
  string,
} from "./schema.ts";
import type { Duration, Size } from "./units.ts";

/** A disk with how the guest uses it. A bare {@linkcode Disk} is attached and not mounted. */
export interface DiskAttachment {
  /** The disk. */
  readonly disk: Disk;
  /** Directory of the guest to mount it on at boot; not mounted unless told. */
  readonly mount?: Input<string>;
  /** Whether the guest may not write. */
  readonly readOnly?: Input<boolean>;
}

/** A file to put into the guest at boot. A bare text has mode 0644. */
export interface GuestFile {
  /** The content. */
  readonly content: Input<string>;
  /** Permission bits, such as `0o755`. */
  readonly mode?: Input<number>;
}

/** Props of a {@linkcode vm}. */
export interface VmProps<N extends Readonly<Record<string, Nic>> = Readonly<Record<string, Nic>>> {
  /** How many vCPUs; 1 unless told. */
  readonly cpus?: Input<number>;
  /** Memory of the guest. */
  readonly memory: Input<Size>;
  /**
   * How far memory can grow without a reboot, at most four times `memory`; twice `memory` unless told. A domain of Xen takes
   * all of it when it starts, and gives back what is beyond `memory` once its kernel runs.
   */
  readonly maxMemory?: Input<Size>;
  /** Where root file system and kernel come from. */
  readonly image: ImageSource;
  /** Kernel to boot in place of the image's own. */
  readonly kernel?: KernelSource;
  /** More words for the kernel's command line. */
  readonly cmdline?: Input<string>;
  /** Size of the root disk; the image's own size unless told. */
  readonly rootSize?: Input<Size>;
  /** Disks, by a name of your choice. */
  readonly disks?: Readonly<Record<string, Disk | DiskAttachment>>;
  /** NICs, by the name of the interface in the guest. */
  readonly nics?: N;
  /** Environment of `command` and of `exec`. */
  readonly env?: Readonly<Record<string, Input<string>>>;
  /** Files to put into the guest at boot, by path. */
  readonly files?: Readonly<Record<string, Input<string> | GuestFile>>;
  /** Shell script to run in the guest at each boot, in the background. */
  readonly command?: Input<string>;
  /** What must hold before the machine counts as ready; that the guest answers, unless told. */
  readonly ready?: Probe | readonly Probe[];
  /** Which hypervisor runs it; `auto()` unless told. */
  readonly engine?: EngineChoice;
  /** Host name; derived from the address unless told. */
  readonly hostname?: Input<string>;
  /** Whether it should run; `"running"` unless told. */
  readonly power?: Input<"running" | "stopped">;
  /** How long the guest may take to shut down before it is powered off; `"30s"` unless told. */
  readonly shutdownTimeout?: Input<Duration>;
}

/** What is known of a NIC. */
export interface NicOutputs<F extends string> {
  /** Address in its network. */
  readonly ip: Output<string>;
  /** Ethernet address. */
  readonly mac: Output<string>;
  /** Ports of the host that lead here, by name. */
  readonly forwards: { readonly [K in F]: Output<number> };
}

/** The names of a NIC's forwards. */
export type ForwardNames<N> = N extends Nic<infer F> ? F : never;

/** A declared machine, with what will be known of it. */
export type Vm<N extends Readonly<Record<string, Nic>> = Readonly<Record<string, Nic>>> = Resource & {
  /** NICs, by name. */
  readonly nics: { readonly [K in keyof N]: NicOutputs<ForwardNames<N[K]>> };
  /** Host name of the guest. */
  readonly hostname: Output<string>;
  /** The engine that runs it. */
  readonly engine: Output<string>;
};

const diskSchema = resource<Disk>("disk");
const attachmentSchema: Schema<Disk | DiskAttachment> = custom("a disk", (value, field, report) =>
  object({
    disk: diskSchema,
    mount: optional(string({ pattern: /^\/[^\s]*$/, description: 'an absolute path such as "/srv"' })),
    readOnly: optional(boolean(), false),
  }).check(isResource(value) ? { disk: value } : value, field, report));

const fileSchema = custom<Input<string> | GuestFile>("a text or a file", (value, field, report) =>
  object({
    content: string(),
    mode: optional(number({ min: 0, max: 0o7777, integer: true }), 0o644),
  }).check(typeof value === "string" ? { content: value } : value, field, report));

/** Largest number of vCPUs of one machine. */
export const MAX_CPUS = 255;

/** Kind of {@linkcode vm}. */
export const vmDefinition: KindDefinition<VmProps> = {
  name: "vm",
  schema: object({
    cpus: optional(number({ min: 1, max: MAX_CPUS, integer: true }), 1),
    memory: size({ min: "16MiB", multiple: "1MiB" }),
    maxMemory: optional(size({ min: "16MiB", multiple: "1MiB" })),
    image: choice("image", "debian()"),
    kernel: optional(choice("kernel", "hostKernel()")),
    cmdline: optional(string({ pattern: /^[^\n\0]*$/, description: "one line" })),
    rootSize: optional(size({ min: "16MiB", multiple: "1MiB" })),
    disks: optional(
      record(attachmentSchema, {
        key: /^(?!root$)[a-z][\w-]{0,25}$/i,
        keyDescription: 'a letter, then at most 25 letters, digits, _ or -, and not "root"',
      }),
    ),
    nics: optional(record(nicSchema, {
      key: /^[a-z][a-z0-9_.-]{0,14}$/i,
      keyDescription: "an interface name of at most 15 letters, digits, _, . or -",
    })),
    env: optional(record(string(), { key: /^[A-Za-z_]\w*$/, keyDescription: "letters, digits and _" })),
    files: optional(record(fileSchema, { key: /^\/[^\0]*[^/\0]$/, keyDescription: "an absolute path" })),
    command: optional(string()),
    ready: optional(either(array(probeSchema), probeSchema, Array.isArray)),
    engine: optional(choice("engine", "auto()"), auto()),
    hostname: optional(string({
      pattern: /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/,
      description: "at most 63 lower-case letters, digits and hyphens",
    })),
    power: optional(oneOf("running", "stopped"), "running"),
    shutdownTimeout: optional(duration(), "30s"),
  }) as unknown as Schema<VmProps>,
};

/**
 * Declares a virtual machine.
 *
 * @param props What the machine is made of
 * @param options Lifecycle options
 * @returns The machine, whose outputs other props may use
 *
 * @example
 * ```ts
 * import { http, network, vm } from "hypertopia";
 * import { debian } from "hypertopia/stdlib";
 *
 * const lan = network({ cidr: "10.20.0.0/24" });
 * const web = vm({
 *   memory: "128MiB",
 *   image: debian(),
 *   nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
 *   command: "httpd -f -h /srv",
 *   ready: http(80),
 * });
 * const port = web.nics.eth0.forwards.http;
 * ```
 */
export function vm<
  const N extends Readonly<Record<string, Nic>> = Record<never, never>,
  const E extends EngineChoice = EngineChoice,
>(
  props: VmProps<N> & { readonly engine?: E } & LimitsOf<E>,
  options?: LifecycleOptions,
): Vm<N> {
  const machine = new Resource(vmDefinition, props, options);
  const nics: Record<string, NicOutputs<string>> = {};
  for (const [name, nic] of Object.entries(props.nics ?? {})) {
    const forwards: Record<string, Output<number>> = {};
    for (const forward of nic?.forwardNames ?? []) {
      forwards[forward] = reference(machine, ["nics", name, "forwards", forward]);
    }
    nics[name] = {
      ip: reference(machine, ["nics", name, "ip"]),
      mac: reference(machine, ["nics", name, "mac"]),
      forwards: Object.freeze(forwards),
    };
  }
  Object.assign(machine, {
    nics: Object.freeze(nics),
    hostname: reference(machine, ["hostname"]),
    engine: reference(machine, ["engine"]),
  });
  return Object.freeze(machine) as Vm<N>;
}

/** What a machine may be by the type of its engine; no limits where the engine is known at run time only. */
export type LimitsOf<E extends EngineChoice> = [E] extends [EmulatedChoice] ? EmulatedLimits
  : [E] extends [XenChoice] ? XenLimits
  : unknown;

/**
 * Chooses the first engine that can run the machine on this host.
 *
 * @returns The engine choice
 */
export function auto(): EngineChoice {
  return new Choice("engine", "auto", object({}), {});
}

/** A hypervisor that is booted in place of the kernel, and boots that itself. */
export interface Hypervisor {
  /** Path of its image: a 32-bit ELF file with a Multiboot header, not compressed, such as Debian's Xen after `gunzip`. */
  readonly path: string;
  /** Its command line, beside that of the kernel; empty unless told. Its console should be the first serial port. */
  readonly commandLine?: string;
}

/** Options of {@linkcode qemu}. */
export interface QemuOptions {
  /** Accelerator; the best one that a probe finds usable unless told. */
  readonly accelerator?: "kvm" | "tcg";
  /** Program to run; `"qemu-system-x86_64"` unless told. */
  readonly binary?: string;
  /** More arguments for the program, after all others. */
  readonly extraArguments?: readonly string[];
  /**
   * A hypervisor, Xen, that runs the machine's kernel as its first domain. The machine's memory is then the hypervisor's,
   * and changes by a restart only.
   */
  readonly hypervisor?: Hypervisor;
}

const qemuSchema = object({
  accelerator: optional(oneOf("kvm", "tcg")),
  binary: optional(string()),
  extraArguments: optional(array(string())),
  hypervisor: optional(object({
    path: string({ pattern: /^\/[^\0]*$/, description: "an absolute path" }),
    commandLine: optional(string({ pattern: /^[^\n\0]*$/, description: "one line" }), ""),
  })),
});

/**
 * Runs the machine in QEMU.
 *
 * @param options Accelerator and program
 * @returns The engine choice
 */
export function qemu(options: QemuOptions = {}): EngineChoice {
  return new Choice("engine", "qemu", qemuSchema, options);
}

/** Options of {@linkcode kvm}. */
export interface KvmOptions {
  /**
   * Whether the machine has a process of its own, or shares one with all machines of its stack that say so: `"own"` unless
   * told. A shared process takes far less memory; what breaks it ends them all, and a guest that breaks out of its machine
   * reaches the others.
   */
  readonly isolation?: "own" | "shared";
  /** Whether the process that runs the machine gives up all rights that it does not need; so unless told. */
  readonly sandbox?: boolean;
}

/** Options of {@linkcode emulated}. */
export interface EmulatedOptions {
  /** Whether the process that runs the machine gives up all rights that it does not need; so unless told. */
  readonly sandbox?: boolean;
}

/** What a machine may be where its engine is {@linkcode emulated}. The rest is checked when it is planned. */
export interface EmulatedLimits {
  /** An emulated machine has one vCPU. */
  readonly cpus?: 1 | Output<number>;
  /** An emulated machine has a 32-bit processor. */
  readonly image?: ImageSource & ArchitectureMark<"i386">;
  /** An emulated machine has a 32-bit processor, which cannot run the host's kernel either. */
  readonly kernel?: KernelSource & ArchitectureMark<"i386">;
}

/** The engine that {@linkcode emulated} chooses: its machines are 32-bit and have one vCPU. */
export type EmulatedChoice = EngineChoice & {
  /** Tells it apart from other engines at edit time. */
  readonly type: "emulated";
};

/**
 * Runs the machine in an emulator of 32-bit PCs that needs nothing but Deno: neither rights nor devices nor programs. It is
 * slow; the first boot of a kind of machine takes seconds, and others go on from there in a fraction of that.
 *
 * @param options Whether it is confined
 * @returns The engine choice
 *
 * @example
 * ```ts
 * import { emulated, vm } from "hypertopia";
 * import { debian } from "hypertopia/stdlib";
 *
 * const small = vm({ memory: "64MiB", image: debian(), engine: emulated() });
 * ```
 */
export function emulated(options: EmulatedOptions = {}): EmulatedChoice {
  return new Choice("engine", "emulated", emulatedSchema, options) as EmulatedChoice;
}

const emulatedSchema = object({ sandbox: optional(boolean()) });
const kvmSchema = object({ isolation: optional(oneOf("own", "shared")), sandbox: optional(boolean()) });

/**
 * Runs the machine on `/dev/kvm`, in a process of its own, with nothing else installed. It takes a kernel, as all images
 * of ours have; NICs take the right to make taps.
 *
 * @param options Whether it is confined
 * @returns The engine choice
 */
export function kvm(options: KvmOptions = {}): EngineChoice {
  return new Choice("engine", "kvm", kvmSchema, options);
}

/** Most vCPUs of a domain: so many interrupt controllers Xen makes for one (Xen 4.17 `HVM_MAX_VCPUS`). */
export const XEN_MAX_CPUS = 128;

/** Options of {@linkcode xen}. */
export interface XenOptions {
  /** How the domain is made: `"pvh"`, without emulated devices, which is the only way that is there yet. */
  readonly type?: "pvh";
  /**
   * vCPUs that it can have without a restart, at most {@linkcode XEN_MAX_CPUS}: up to so many, `cpus` changes live, with
   * the guest's help. As many as `cpus` at its start unless told.
   */
  readonly maxCpus?: number;
  /** Share of the processors that it gets when they are contended, relative to that of other domains, from 1 to 65535: 256 unless told. */
  readonly weight?: number;
  /**
   * Most processor time that it gets, in percent of one processor, even if others are idle, at most 100 for each vCPU: 0 is
   * no limit, which is the default.
   */
  readonly cap?: number;
  /**
   * Numbers of the host's processors that it runs on: `[2, 3]` for all of its vCPUs, or one list for each of them, as in
   * `[[2], [3]]`. Any unless told.
   */
  readonly pin?: readonly number[] | readonly (readonly number[])[];
  /**
   * What becomes of it when its kernel has crashed: its domain is destroyed, it is started anew, or its domain is preserved
   * to be looked at; `"destroy"` unless told.
   */
  readonly crash?: "destroy" | "restart" | "preserve";
}

/** What a machine may be where its engine is {@linkcode xen}. The rest is checked when it is planned. */
export interface XenLimits {
  /** A domain boots 64-bit kernels only. */
  readonly image?: ImageSource & ArchitectureMark<"amd64">;
  /** A domain boots 64-bit kernels only. */
  readonly kernel?: KernelSource & ArchitectureMark<"amd64">;
  /** A domain has disks of the format `raw` only. */
  readonly disks?: Readonly<Record<string, RawDisk>>;
}

/** What a disk, bare or with how the guest uses it, may be in {@linkcode XenLimits}. */
export interface RawDisk extends FormatMark<"raw"> {
  /** The disk of an attachment. */
  readonly disk?: Disk & FormatMark<"raw">;
}

/** The engine that {@linkcode xen} chooses: its machines boot 64-bit kernels and have disks of the format `raw`. */
export type XenChoice = EngineChoice & {
  /** Tells it apart from other engines at edit time. */
  readonly type: "xen";
};

const cpuNumbers = array(number({ min: 0, max: 4095, integer: true }));
const cpuList = custom<readonly number[]>("a list of processors such as [2, 3]", (value, field, report) => {
  if (Array.isArray(value) && value.length > 0) {
    // The order says nothing.
    return [...new Set(cpuNumbers.check(value, field, report) as number[])].sort((a, b) => a - b);
  }
  report(field, "Value must be a list of processors such as [2, 3]", value);
  return value;
});

const domainType = custom<"pvh">('"pvh"', (value, field, report) => {
  if (value === "pv" || value === "hvm") {
    report(field, 'Domains of this type cannot be made yet: use "pvh", or choose qemu()', value);
  } else if (value !== "pvh") report(field, 'Value must be "pvh"', value);
  return value;
});

const xenShape = object({
  type: optional(domainType, "pvh"),
  maxCpus: optional(number({ min: 1, max: XEN_MAX_CPUS, integer: true })),
  weight: optional(number({ min: 1, max: 65535, integer: true }), 256),
  cap: optional(number({ min: 0, max: 65535, integer: true }), 0),
  pin: optional(
    either(
      array(cpuList),
      cpuList,
      (value) => Array.isArray(value) && value.some((each) => Array.isArray(each)),
    ),
  ),
  crash: optional(oneOf("destroy", "restart", "preserve"), "destroy"),
});

const xenSchema = custom<unknown>(xenShape.description, (value, field, report) => {
  const { type, ...options } = (xenShape.check(value, field, report) ?? {}) as Infer<typeof xenShape>;
  // In normal form the engine's own name is the type.
  return { domain: type, ...options };
});

/**
 * Runs the machine as a domain of Xen, on a host whose control domain (dom0) this is, with no other toolstack. It takes a
 * 64-bit kernel, as all images of ours have unless told, and disks of the format `raw`.
 *
 * @param options Scheduling, and what happens when it crashes
 * @returns The engine choice
 *
 * @example
 * ```ts
 * import { vm, xen } from "hypertopia";
 * import { debian } from "hypertopia/stdlib";
 *
 * const guest = vm({ memory: "512MiB", image: debian(), engine: xen({ weight: 512, cap: 150, pin: [2, 3] }), cpus: 2 });
 * ```
 */
export function xen(options: XenOptions = {}): XenChoice {
  return new Choice("engine", "xen", xenSchema, options) as XenChoice;
}
