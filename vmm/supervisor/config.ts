/**
 * What a supervisor is told about its machine: types, and the JSON that Firecracker's clients and configuration files
 * write them in (Firecracker 1.16.1, `firecracker.yaml`), with our own additions under names that Firecracker lacks.
 *
 * JSON has Firecracker's names; the types have ours. Both directions come from one table per object, a
 * {@linkcode Codec}. `null` stands for an absent field everywhere.
 *
 * @module
 */

import { dirname } from "node:path";
import { parseCidr, parseIpv4 } from "../../dsl/mod.ts";
import type { BalloonStatistics as GuestStatistics } from "../devices/balloon.ts";
import type { RateLimiterOptions, TokenBucketOptions } from "../devices/rate_limiter.ts";
import { MachineError } from "../errors.ts";
import type { BridgeSpec } from "../net/host_network.ts";

/** Memory that the largest memory slot of KVM holds, 2³¹ − 1 pages, in MiB (Linux 6.1 `KVM_MEM_MAX_NR_PAGES`). */
const MAX_MEM_SIZE_MIB = 2 ** 23 - 1;
/** Bytes of the longest path of a Unix socket, less its final zero (`sun_path` of `linux/un.h`). */
const MAX_SOCKET_PATH = 107;
/** Bytes of the longest path, less its final zero (`PATH_MAX` of `linux/limits.h`). */
const MAX_PATH = 4095;
/** Characters of the longest kernel command line, less its final zero (x86 `COMMAND_LINE_SIZE`, Linux 6.1). */
const MAX_COMMAND_LINE = 2047;
/** Bytes of a virtio disk's serial number (`VIRTIO_BLK_ID_BYTES`, `linux/virtio_blk.h`). */
const MAX_SERIAL = 20;

/** Boot arguments of a machine that gives none: a guest that panics or restarts ends its machine. */
export const DEFAULT_BOOT_ARGS = "reboot=t panic=1";

/** vCPUs and memory. */
export interface MachineConfig {
  /** vCPUs, 1 to 32. */
  readonly vcpuCount: number;
  /** Memory of the guest, in MiB. */
  readonly memSizeMib: number;
  /** Memory that it can grow to by its balloon, in MiB; `memSizeMib` unless told. Ours, not Firecracker's. */
  readonly maxMemSizeMib?: number;
  /** Whether two vCPUs share a core. */
  readonly smt: boolean;
  /** Whether to track the pages that are written. It has no effect without snapshots. */
  readonly trackDirtyPages: boolean;
  /** Pages that hold the memory. */
  readonly hugePages: "None";
}

/** What to boot. */
export interface BootSource {
  /** Path of the kernel. */
  readonly kernelImagePath: string;
  /** Path of the initramfs. */
  readonly initrdPath?: string;
  /** Kernel command line, printable ASCII; see {@linkcode kernelCommandLine}. */
  readonly bootArgs?: string;
}

/** A disk. */
export interface DriveConfiguration {
  /** Its name, not empty. */
  readonly id: string;
  /** Identity of the partition that holds the root file system; it counts on the root device only. */
  readonly partuuid?: string;
  /** Whether the kernel is to use it as root file system. */
  readonly isRootDevice: boolean;
  /** Whether the guest's flush requests reach the storage. */
  readonly cacheType: "Unsafe" | "Writeback";
  /** Whether the guest may not write. */
  readonly isReadOnly: boolean;
  /** Path of the file or block device on the host. */
  readonly pathOnHost: string;
  /** Limits. */
  readonly rateLimiter?: RateLimiterOptions;
  /** How the file is read and written. */
  readonly ioEngine: "Sync" | "Async";
  /** Format of the file; raw unless told. Ours, not Firecracker's. */
  readonly format: "raw" | "qcow2";
  /** Serial number that the guest sees, at most 20 characters. Ours, not Firecracker's. */
  readonly serial?: string;
  /** Whether reads and writes go past the host's page cache; false unless told. Ours, not Firecracker's. */
  readonly isDirect?: boolean;
  /** Least capacity in bytes: a file that is smaller is grown. Ours, not Firecracker's. */
  readonly size?: number;
}

/** A NIC. */
export interface NetworkInterfaceConfiguration {
  /** Its name, not empty. */
  readonly id: string;
  /** Name of the tap device on the host, at most 15 bytes. */
  readonly hostDevName: string;
  /** Ethernet address in lower case; the guest makes one up unless told. */
  readonly guestMac?: string;
  /** Largest packet in bytes, 68 to 65535, that the guest is told of. */
  readonly mtu?: number;
  /** Limits of what the guest receives. */
  readonly rxRateLimiter?: RateLimiterOptions;
  /** Limits of what the guest sends. */
  readonly txRateLimiter?: RateLimiterOptions;
  /** The network that its tap is made for and plugged into; the tap must be there already unless told. Ours. */
  readonly network?: BridgeSpec;
  /** The network in user space that it joins instead of a tap. Ours, and for emulated machines. */
  readonly userNetwork?: UserNetworkConfiguration;
}

/** How a NIC joins a network in user space. */
export interface UserNetworkConfiguration {
  /** Folder of the network's process. */
  readonly folder: string;
  /** IPv4 address of the guest. */
  readonly ip: string;
  /** Name of the guest. */
  readonly hostname: string;
}

/** The vsock device. */
export interface VsockConfiguration {
  /** Address of the guest, 3 to 2³² − 2. */
  readonly guestCid: number;
  /** Path of the Unix socket for connections to the guest; those of the guest go to this path, `_` and the port. */
  readonly udsPath: string;
}

/** The entropy device. */
export interface EntropyConfiguration {
  /** Limits. */
  readonly rateLimiter?: RateLimiterOptions;
}

/** The balloon. */
export interface BalloonConfiguration {
  /** Memory that it is to hold, in MiB. */
  readonly amountMib: number;
  /** Whether it gives memory back when the guest runs out of it. */
  readonly deflateOnOom: boolean;
  /** How often the guest's statistics are asked for, in seconds; 0 is never. */
  readonly statsPollingInterval: number;
  /** Whether the guest tells which pages it does not use, which are taken from it until it does. */
  readonly freePageReporting: boolean;
}

/** The serial console. */
export interface SerialConfiguration {
  /** Path of the file or named pipe that gets what the guest prints; standard output unless told. */
  readonly outPath?: string;
}

/** The supervisor's log. */
export interface LoggerConfiguration {
  /** Path of the file or named pipe; standard output unless told. */
  readonly path?: string;
  /** What is logged; `Info` unless told. */
  readonly level?: "Off" | "Error" | "Warn" | "Info" | "Debug" | "Trace";
  /** Whether lines name their level. */
  readonly showLevel?: boolean;
  /** Whether lines name the place in our code that wrote them. */
  readonly showLogOrigin?: boolean;
  /** Only what this module writes. */
  readonly module?: string;
}

/** Where metrics are written, one JSON object a line. */
export interface MetricsConfiguration {
  /** Path of the file or named pipe. */
  readonly path: string;
  /** Whether lines name the machine. */
  readonly emitId: boolean;
  /** What else each line says. */
  readonly properties?: Readonly<Record<string, string>>;
}

/** A port of the host that leads to the guest. */
export interface PortForward {
  /** Protocol. */
  readonly protocol: "tcp" | "udp";
  /** IPv4 address of the host. */
  readonly address: string;
  /** Port on the host. */
  readonly host: number;
  /** IPv4 address of the guest. */
  readonly guestIp: string;
  /** Port in the guest. */
  readonly guest: number;
}

/** The console: a socket for one client at a time, and a log of everything. */
export interface ConsoleConfiguration {
  /** Path of the Unix socket. */
  readonly socket: string;
  /** Path of the log. */
  readonly log: string;
}

/** Paths of the Unix sockets that lead to the guest's agent. */
export interface ChannelsConfiguration {
  /** The control line. */
  readonly control: string;
  /** The data channels. */
  readonly data: readonly string[];
  /** Where each data channel's errors come out. */
  readonly errors: readonly string[];
}

/** How an emulated machine boots to where all of its kind are the same. */
export interface WarmStart {
  /** Path of the file with what one of its kind had booted to, where there is one. */
  readonly state?: string;
  /** Path of the file that gets what it has booted to itself, in its own folder; it is not saved unless told. */
  readonly save?: string;
  /** Digest of all that machines of its kind are made of. */
  readonly key: string;
  /** Path of the initramfs, without what tells one machine from another. */
  readonly initramfs: string;
  /** Path of the archive with what does. */
  readonly config: string;
  /** Addresses of NICs by their place, where they need not be configured by the guest's own means. */
  readonly nics: readonly WarmNic[];
}

/** A NIC that is given its address from without. */
export interface WarmNic {
  /** IPv4 address. */
  readonly ip: string;
  /** Length of the network's prefix. */
  readonly prefix: number;
  /** Gateway of the default route. */
  readonly gateway: string;
}

/** What Firecracker has no words for. */
export interface HypertopiaConfiguration {
  /** Name of the machine, for people. */
  readonly name?: string;
  /** The console. */
  readonly console?: ConsoleConfiguration;
  /** How it boots to where all of its kind are the same; emulated machines only. */
  readonly warmStart?: WarmStart;
  /** The channels to the guest's agent. */
  readonly channels?: ChannelsConfiguration;
  /** Port forwards. */
  readonly forwards: readonly PortForward[];
  /** Whether a guest that asks for a restart gets one; it ends the machine unless told, as in Firecracker. */
  readonly restartOnReset: boolean;
}

/** A machine. */
export interface MachineConfiguration {
  /** vCPUs and memory. */
  readonly machine: MachineConfig;
  /** What to boot. */
  readonly bootSource?: BootSource;
  /** Disks in the order of the guest; the root device is first. */
  readonly drives: readonly DriveConfiguration[];
  /** NICs in the order of the guest. */
  readonly networkInterfaces: readonly NetworkInterfaceConfiguration[];
  /** The vsock device. */
  readonly vsock?: VsockConfiguration;
  /** The entropy device. */
  readonly entropy?: EntropyConfiguration;
  /** The balloon. */
  readonly balloon?: BalloonConfiguration;
  /** The serial console. */
  readonly serial?: SerialConfiguration;
  /** The supervisor's log. */
  readonly logger?: LoggerConfiguration;
  /** Where metrics are written. */
  readonly metrics?: MetricsConfiguration;
  /** What Firecracker has no words for. */
  readonly hypertopia: HypertopiaConfiguration;
}

/** A machine that can be started. */
export interface BootableConfiguration extends MachineConfiguration {
  /** What to boot. */
  readonly bootSource: BootSource;
}

/** States of a machine, in Firecracker's words. */
export type InstanceState = "Not started" | "Running" | "Paused";

/** Who somebody talks to. */
export interface InstanceInfo {
  /** Identity of the machine. */
  readonly id: string;
  /** How it is. */
  readonly state: InstanceState;
  /** Version of Firecracker that the API is compatible with. */
  readonly vmmVersion: string;
  /** Name of the program. */
  readonly appName: string;
}

/** How a run ended. */
export interface MachineEnd {
  /**
   * `poweroff`: the guest powered off; `reset`: it asked for a restart; `crash`: it cannot go on; `stopped`: somebody
   * powered it off; `failure`: the supervisor cannot go on.
   */
  readonly reason: "poweroff" | "reset" | "crash" | "stopped" | "failure";
  /** The same in words, with what is known. */
  readonly detail: string;
}

/** How a run goes. */
export interface RunReport {
  /** How long it has run, in milliseconds; 0 before it starts. */
  readonly uptime: number;
  /** Exits of all vCPUs to user space, by kind. */
  readonly exits: Readonly<Record<string, number>>;
  /** How it ended; absent while it has not. */
  readonly end?: MachineEnd;
}

/** The answer of `GET /hypertopia/status`. */
export interface SupervisorStatus extends RunReport {
  /** Identity of the machine. */
  readonly id: string;
  /** How it is. */
  readonly state: InstanceState;
  /** The supervisor's process. */
  readonly pid: number;
}

/** What `PUT /hypertopia/actions` does. */
export type SupervisorAction = "Stop" | "Kill" | "Reboot";

/** What is known of the balloon and, as far as the guest told, of its memory. The guest may lie. */
export interface BalloonStatistics extends GuestStatistics {
  /** Pages of 4 KiB that it is to hold. */
  readonly targetPages: number;
  /** Pages of 4 KiB that it holds. */
  readonly actualPages: number;
}

/** Where a value stands, for messages. */
export interface Place {
  /** What it is part of, such as `the body of PUT /vsock`. */
  readonly subject: string;
  /** Its path in there; empty for the whole. */
  readonly path: string;
  /** Gets the paths of fields that are ignored. */
  readonly ignored: string[];
}

/**
 * The place of a whole JSON text.
 *
 * @param subject What it is, such as `the body of PUT /vsock`
 * @returns The place
 */
export function placeOf(subject: string): Place {
  return { subject, path: "", ignored: [] };
}

/** Turns JSON into values of a type and back. */
export interface Codec<T> {
  /**
   * Reads a value.
   *
   * @param value The JSON value
   * @param at Where it stands
   * @returns The value
   * @throws {MachineError} If it is none
   */
  parse(value: unknown, at: Place): T;
  /**
   * Writes a value.
   *
   * @param value The value
   * @returns The JSON value
   */
  print(value: T): unknown;
}

function within(at: Place, name: string): Place {
  return { ...at, path: at.path === "" || name.startsWith("[") ? at.path + name : `${at.path}.${name}` };
}

function refuse(at: Place, reason: string): never {
  throw new MachineError(`Cannot use ${at.subject} as ${reason}`);
}

function nameOf(at: Place): string {
  return at.path === "" ? "it" : `\`${at.path}\``;
}

/** Names the type of a JSON value. */
function typeOf(value: unknown): string {
  return value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
}

function refuseType(at: Place, value: unknown, expected: string): never {
  refuse(at, `${nameOf(at)} has an invalid type: ${typeOf(value)}, expected ${expected}`);
}

function refuseValue(at: Place, value: unknown, expected: string): never {
  const text = JSON.stringify(value) ?? "";
  refuse(
    at,
    `${nameOf(at)} has an invalid value: ${
      text.length > 100 ? `${text.slice(0, 100)}…` : text
    }, expected ${expected}`,
  );
}

/** Lists names as serde does, which clients may look for. */
function anyOf(names: readonly string[]): string {
  const quoted = names.map((name) => `\`${name}\``);
  return quoted.length > 2 ? `one of ${quoted.join(", ")}` : quoted.join(" or ");
}

/** Values that are in JSON what they are here. */
function plain<T>(parse: (value: unknown, at: Place) => T): Codec<T> {
  return { parse, print: (value) => value };
}

const flag: Codec<boolean> = plain((value, at) =>
  typeof value === "boolean" ? value : refuseType(at, value, "a boolean")
);

function integer(min: number, max: number): Codec<number> {
  const expected = `an integer from ${min} to ${max}`;
  return plain((value, at) => {
    if (typeof value !== "number") refuseType(at, value, expected);
    return Number.isInteger(value) && value >= min && value <= max ? value : refuseValue(at, value, expected);
  });
}

/** Numbers of 64 bits. Those that a double cannot hold are cut to the largest that it can, either way. */
const tokens: Codec<number> = {
  parse: (value, at) => Math.min(integer(0, 2 ** 64).parse(value, at), Number.MAX_SAFE_INTEGER),
  print: (value) => Math.min(value, Number.MAX_SAFE_INTEGER),
};

function text(expected: string, test: (value: string) => boolean): Codec<string> {
  return plain((value, at) => {
    if (typeof value !== "string") refuseType(at, value, "a string");
    return test(value) ? value : refuseValue(at, value, expected);
  });
}

/** A string that the system can be given: it ends at its first zero. */
function bounded(max: number, what: string): Codec<string> {
  return text(
    `${what} of 1 to ${max} bytes without zeros`,
    (value) => value !== "" && !value.includes("\0") && new TextEncoder().encode(value).length <= max,
  );
}

const anyText = text("a string", () => true);
const name = bounded(255, "a name");
const filePath = bounded(MAX_PATH, "a path");
const socketPath = bounded(MAX_SOCKET_PATH, "a path of a Unix socket");
const bootArgs = text(
  `at most ${MAX_COMMAND_LINE} printable ASCII characters`,
  (value) => value.length <= MAX_COMMAND_LINE && /^[ -~]*$/.test(value),
);
const serialNumber = text(
  `at most ${MAX_SERIAL} printable ASCII characters`,
  (value) => value.length <= MAX_SERIAL && /^[ -~]*$/.test(value),
);
const deviceName = text(
  "a name of a network device, 1 to 15 bytes without spaces and slashes",
  (value) =>
    /^[^\s/:\0]+$/.test(value) && value !== "." && value !== ".." &&
    new TextEncoder().encode(value).length <= 15,
);
const ipv4 = text("an IPv4 address", (value) => {
  try {
    parseIpv4(value);
    return true;
  } catch {
    return false;
  }
});
const cidr = text("a network such as 10.20.0.0/24", (value) => {
  try {
    parseCidr(value);
    return true;
  } catch {
    return false;
  }
});
const mac: Codec<string> = plain((value, at) =>
  text("an Ethernet address such as 06:00:ac:10:00:02", (each) => /^[\da-f]{2}(:[\da-f]{2}){5}$/i.test(each))
    .parse(value, at).toLowerCase()
);

function oneOf<const V extends string>(...values: readonly V[]): Codec<V> {
  return plain((value, at) => {
    if (typeof value !== "string") refuseType(at, value, anyOf(values));
    return values.find((each) => each === value) ??
      refuse(
        at,
        `${nameOf(at)} has no such value: unknown variant \`${value.slice(0, 100)}\`, expected ${
          anyOf(values)
        }`,
      );
  });
}

/** Firecracker takes the levels in any case, and `Warning` for `Warn`. */
const level: Codec<NonNullable<LoggerConfiguration["level"]>> = plain((value, at) => {
  const word = typeof value === "string" ? value.toLowerCase().replace(/^warning$/, "warn") : value;
  return oneOf("Off", "Error", "Warn", "Info", "Debug", "Trace").parse(
    typeof word === "string" ? word.charAt(0).toUpperCase() + word.slice(1) : word,
    at,
  );
});

function list<T>(item: Codec<T>): Codec<readonly T[]> {
  return {
    parse: (value, at) =>
      Array.isArray(value)
        ? value.map((each, index) => item.parse(each, within(at, `[${index}]`)))
        : refuseType(at, value, "an array"),
    print: (value) => value.map((each) => item.print(each)),
  };
}

function record<T>(item: Codec<T>): Codec<Readonly<Record<string, T>>> {
  return plain((value, at) =>
    Object.fromEntries(entriesOf(value, at).map(([key, each]) => [key, item.parse(each, within(at, key))]))
  );
}

function entriesOf(value: unknown, at: Place): [string, unknown][] {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? Object.entries(value)
    : refuseType(at, value, "an object");
}

/** A field of an object. */
interface Field<T> {
  /** Its name in JSON. */
  readonly name: string;
  /** Its values. */
  readonly codec: Codec<T>;
  /** Whether it must be there. */
  readonly isRequired: boolean;
  /** Its value where it is absent. */
  readonly fallback?: T;
  /** Whether an absent or usual value is left out of the JSON, as Firecracker's clients do not know the field. */
  readonly isQuiet: boolean;
}

function required<T>(name: string, codec: Codec<T>): Field<T> {
  return { name, codec, isRequired: true, isQuiet: false };
}

function optional<T>(name: string, codec: Codec<T>): Field<T> {
  return { name, codec, isRequired: false, isQuiet: false };
}

function usually<T>(fallback: T, field: Field<T>): Field<T> {
  return { ...field, isRequired: false, fallback };
}

function quiet<T>(field: Field<T>): Field<T> {
  return { ...field, isQuiet: true };
}

/** A field of Firecracker's that we have no use for but in its neutral value. */
interface Unsupported {
  /** The value that asks for nothing, beside `null`. */
  readonly neutral: unknown;
  /** What cannot be had, and what to do. */
  readonly reason: string;
  /** Whether it is left out of the JSON. */
  readonly isQuiet?: boolean;
}

type Fields<T> = { readonly [K in keyof T]-?: Field<Exclude<T[K], undefined>> };

interface ObjectOptions {
  /** Whether unknown fields are ignored: in the objects where Firecracker ignores them. */
  readonly isOpen?: boolean;
  /** Names of fields that Firecracker takes but has no use for any more. */
  readonly unused?: readonly string[];
  /** Fields that only take their neutral value, by name. */
  readonly unsupported?: Readonly<Record<string, Unsupported>>;
}

function object<T extends object>(fields: Fields<T>, options: ObjectOptions = {}): Codec<T> {
  const all = Object.entries(fields) as [string, Field<unknown>][];
  const unsupported = Object.entries(options.unsupported ?? {});
  const names = [
    ...all.map(([, field]) => field.name),
    ...unsupported.map(([name]) => name),
    ...options.unused ?? [],
  ];
  return {
    parse: (value, at) => {
      const given = new Map(entriesOf(value, at));
      for (const name of given.keys()) {
        if (names.includes(name)) continue;
        const { path } = within(at, name);
        if (!options.isOpen) {
          refuse(
            at,
            `it has a field too many: unknown field \`${path.slice(0, 200)}\`, expected ${anyOf(names)}`,
          );
        }
        at.ignored.push(path);
      }
      for (const [name, { neutral, reason }] of unsupported) {
        const each = given.get(name) ?? null;
        if (each !== null && JSON.stringify(each) !== JSON.stringify(neutral)) {
          refuse(at, `${nameOf(within(at, name))} asks for what this machine monitor lacks: ${reason}`);
        }
      }
      return Object.fromEntries(all.flatMap(([key, field]) => {
        const each = given.get(field.name) ?? null;
        const place = within(at, field.name);
        if (each !== null) return [[key, field.codec.parse(each, place)]];
        if (field.isRequired) refuse(at, `it is incomplete: missing field \`${place.path}\``);
        return field.fallback === undefined ? [] : [[key, field.fallback]];
      })) as T;
    },
    print: (value) => {
      const given = value as Readonly<Record<string, unknown>>;
      return Object.fromEntries([
        ...all.flatMap(([key, field]) => {
          const each = given[key];
          const json = each === undefined ? null : field.codec.print(each);
          const usual = field.fallback === undefined ? null : field.codec.print(field.fallback);
          return field.isQuiet && JSON.stringify(json) === JSON.stringify(usual) ? [] : [[field.name, json]];
        }),
        ...unsupported.flatMap(([name, { neutral, isQuiet }]) => isQuiet ? [] : [[name, neutral]]),
      ]);
    },
  };
}

/** The same fields, none of them required or filled in. */
function partial<T extends object>(fields: Fields<T>): Fields<Partial<T>> {
  return Object.fromEntries(
    (Object.entries(fields) as [string, Field<unknown>][]).map(([key, { name, codec, isQuiet }]) => [
      key,
      { name, codec, isQuiet, isRequired: false },
    ]),
  ) as unknown as Fields<Partial<T>>;
}

const machineFields: Fields<MachineConfig> = {
  vcpuCount: required("vcpu_count", integer(1, 32)),
  memSizeMib: required("mem_size_mib", integer(1, MAX_MEM_SIZE_MIB)),
  maxMemSizeMib: quiet(optional("max_mem_size_mib", integer(1, MAX_MEM_SIZE_MIB))),
  smt: usually(false, required("smt", flag)),
  trackDirtyPages: usually(false, required("track_dirty_pages", flag)),
  hugePages: usually(
    "None",
    required(
      "huge_pages",
      plain((value, at) =>
        oneOf("None", "Transparent", "2M").parse(value, at) === "None" ? "None" : refuse(
          at,
          `${nameOf(at)} asks for what this machine monitor lacks: huge pages, leave the field out`,
        )
      ),
    ),
  ),
};
const machineOptions: ObjectOptions = {
  unsupported: {
    cpu_template: {
      neutral: "None",
      reason: "CPU templates, leave the field out: the guest sees the CPU that KVM offers",
      isQuiet: true,
    },
  },
};

/** The body of `PUT /machine-config`. */
export const machineJson: Codec<MachineConfig> = object(machineFields, machineOptions);
/** The body of `PATCH /machine-config`. */
export const machineUpdateJson: Codec<Partial<MachineConfig>> = object(
  partial(machineFields),
  machineOptions,
);

/** The body of `PUT /boot-source`. */
export const bootSourceJson: Codec<BootSource> = object<BootSource>({
  kernelImagePath: required("kernel_image_path", filePath),
  initrdPath: optional("initrd_path", filePath),
  bootArgs: optional("boot_args", bootArgs),
});

const tokenBucketJson = object<TokenBucketOptions>({
  size: required("size", tokens),
  oneTimeBurst: optional("one_time_burst", tokens),
  refillTime: required("refill_time", tokens),
}, { isOpen: true });

/** Limits that change: a bucket of size or refill time 0 lifts its limit. */
const rateLimiterUpdateJson = object<RateLimiterOptions>({
  bandwidth: optional("bandwidth", tokenBucketJson),
  ops: optional("ops", tokenBucketJson),
});

/** Limits, without those that are lifted. */
const rateLimiterJson: Codec<RateLimiterOptions> = {
  parse: (value, at) => updateRateLimiter({}, rateLimiterUpdateJson.parse(value, at)),
  print: rateLimiterUpdateJson.print,
};

/** Bytes in whole sectors. */
const diskSize = plain((value, at) => {
  const bytes = integer(0, Number.MAX_SAFE_INTEGER).parse(value, at);
  return bytes % 512 === 0 ? bytes : refuseValue(at, value, "a multiple of 512");
});

/** The body of `PUT /drives/{id}`. */
export const driveJson: Codec<DriveConfiguration> = object<DriveConfiguration>({
  id: required("drive_id", name),
  partuuid: optional("partuuid", text("a partition's identity", (value) => /^[\w-]{1,64}$/.test(value))),
  isRootDevice: required("is_root_device", flag),
  cacheType: usually("Unsafe", required("cache_type", oneOf("Unsafe", "Writeback"))),
  isReadOnly: usually(false, required("is_read_only", flag)),
  pathOnHost: required("path_on_host", filePath),
  rateLimiter: optional("rate_limiter", rateLimiterJson),
  ioEngine: usually("Sync", required("io_engine", oneOf("Sync", "Async"))),
  format: quiet(usually("raw", required("format", oneOf("raw", "qcow2")))),
  serial: quiet(optional("serial", serialNumber)),
  isDirect: quiet(optional("direct", flag)),
  size: quiet(optional("size", diskSize)),
}, {
  unsupported: {
    socket: { neutral: null, reason: "vhost-user disks, leave the field out and give `path_on_host`" },
  },
});

/** A change of a disk. */
export interface DriveUpdate {
  /** Path of the file that is to take the place of the present one; the same path says that the file has changed. */
  readonly pathOnHost?: string;
  /** Limits that change: an absent bucket stays, one of size or refill time 0 is lifted. */
  readonly rateLimiter?: RateLimiterOptions;
  /** Capacity in bytes that it is to grow to. Ours, not Firecracker's. */
  readonly size?: number;
}

/** The body of `PATCH /drives/{id}`. */
export const driveUpdateJson: Codec<DriveUpdate & { readonly id: string }> = object<
  DriveUpdate & { readonly id: string }
>({
  id: required("drive_id", name),
  pathOnHost: optional("path_on_host", filePath),
  rateLimiter: optional("rate_limiter", rateLimiterUpdateJson),
  size: quiet(optional("size", diskSize)),
});

/** The body of `PUT /network-interfaces/{id}`. */
export const networkInterfaceJson: Codec<NetworkInterfaceConfiguration> = object<
  NetworkInterfaceConfiguration
>({
  id: required("iface_id", name),
  hostDevName: required("host_dev_name", deviceName),
  guestMac: optional("guest_mac", mac),
  mtu: optional("mtu", integer(68, 65535)),
  rxRateLimiter: optional("rx_rate_limiter", rateLimiterJson),
  txRateLimiter: optional("tx_rate_limiter", rateLimiterJson),
  network: quiet(optional(
    "network",
    object<BridgeSpec>({
      name: required("bridge", deviceName),
      cidr: required("cidr", cidr),
      gateway: required("gateway", ipv4),
      dns: required("dns", ipv4),
      nat: required("nat", flag),
    }),
  )),
  userNetwork: quiet(optional(
    "user_network",
    object<UserNetworkConfiguration>({
      folder: required("folder", filePath),
      ip: required("ip", ipv4),
      hostname: required("hostname", name),
    }),
  )),
});

/** A change of a NIC. In each limiter an absent bucket stays, and one of size or refill time 0 is lifted. */
export interface NicUpdate {
  /** Limits of what the guest receives. */
  readonly rxRateLimiter?: RateLimiterOptions;
  /** Limits of what the guest sends. */
  readonly txRateLimiter?: RateLimiterOptions;
}

/** The body of `PATCH /network-interfaces/{id}`. */
export const nicUpdateJson: Codec<NicUpdate & { readonly id: string }> = object<
  NicUpdate & { readonly id: string }
>({
  id: required("iface_id", name),
  rxRateLimiter: optional("rx_rate_limiter", rateLimiterUpdateJson),
  txRateLimiter: optional("tx_rate_limiter", rateLimiterUpdateJson),
});

/** The body of `PUT /vsock`. */
export const vsockJson: Codec<VsockConfiguration> = object<VsockConfiguration>({
  // 0 to 2 are the hypervisor's, the local and the host's, 2³² − 1 is any (`linux/vm_sockets.h`).
  guestCid: required("guest_cid", integer(3, 2 ** 32 - 2)),
  udsPath: required("uds_path", socketPath),
}, { unused: ["vsock_id"] });

/** The body of `PUT /entropy`. */
export const entropyJson: Codec<EntropyConfiguration> = object<EntropyConfiguration>({
  rateLimiter: optional("rate_limiter", rateLimiterJson),
});

const amount = required("amount_mib", integer(0, MAX_MEM_SIZE_MIB));
const interval = required("stats_polling_interval_s", integer(0, 65535));

/** The body of `PUT /balloon`. */
export const balloonJson: Codec<BalloonConfiguration> = object<BalloonConfiguration>({
  amountMib: amount,
  deflateOnOom: required("deflate_on_oom", flag),
  statsPollingInterval: usually(0, interval),
  freePageReporting: usually(false, required("free_page_reporting", flag)),
}, {
  unsupported: {
    free_page_hinting: { neutral: false, reason: "free page hinting, use `free_page_reporting`" },
  },
});
/** The body of `PATCH /balloon`. */
export const balloonUpdateJson: Codec<Pick<BalloonConfiguration, "amountMib">> = object<
  Pick<BalloonConfiguration, "amountMib">
>({ amountMib: amount });
/** The body of `PATCH /balloon/statistics`. */
export const statisticsUpdateJson: Codec<Pick<BalloonConfiguration, "statsPollingInterval">> = object<
  Pick<BalloonConfiguration, "statsPollingInterval">
>({ statsPollingInterval: interval });

/** The body of `PUT /serial`. */
export const serialJson: Codec<SerialConfiguration> = object<SerialConfiguration>({
  outPath: optional("serial_out_path", filePath),
}, {
  unsupported: {
    rate_limiter: {
      neutral: null,
      reason: "limits of the serial console, leave the field out",
      isQuiet: true,
    },
  },
});

/** The body of `PUT /logger`. */
export const loggerJson: Codec<LoggerConfiguration> = object<LoggerConfiguration>({
  path: optional("log_path", filePath),
  level: optional("level", level),
  showLevel: optional("show_level", flag),
  showLogOrigin: optional("show_log_origin", flag),
  module: optional("module", name),
});

/** The body of `PUT /metrics`. */
export const metricsJson: Codec<MetricsConfiguration> = object<MetricsConfiguration>({
  path: required("metrics_path", filePath),
  emitId: usually(false, required("emit_id", flag)),
  properties: quiet(optional("properties", record(anyText))),
}, { isOpen: true });

/** The body of `PUT /hypertopia/forwards`. */
export const forwardsJson: Codec<readonly PortForward[]> = list(object<PortForward>({
  protocol: required("protocol", oneOf("tcp", "udp")),
  address: required("address", ipv4),
  host: required("host", integer(1, 65535)),
  guestIp: required("guest_ip", ipv4),
  guest: required("guest", integer(1, 65535)),
}));

const hypertopiaJson = object<HypertopiaConfiguration>({
  name: quiet(optional("name", name)),
  console: quiet(optional(
    "console",
    object<ConsoleConfiguration>({
      socket: required("socket", socketPath),
      log: required("log", filePath),
    }),
  )),
  warmStart: quiet(optional(
    "warm_start",
    object<WarmStart>({
      state: optional("state", filePath),
      save: optional("save", filePath),
      key: required("key", name),
      initramfs: required("initramfs", filePath),
      config: required("config", filePath),
      nics: usually(
        [],
        required(
          "nics",
          list(object<WarmNic>({
            ip: required("ip", ipv4),
            prefix: required("prefix", integer(0, 32)),
            gateway: required("gateway", ipv4),
          })),
        ),
      ),
    }),
  )),
  channels: quiet(optional(
    "channels",
    object<ChannelsConfiguration>({
      control: required("control", socketPath),
      data: required("data", list(socketPath)),
      errors: required("errors", list(socketPath)),
    }),
  )),
  forwards: quiet(usually([], required("forwards", forwardsJson))),
  restartOnReset: quiet(usually(false, required("restart_on_reset", flag))),
});

/** The body of `PUT /actions`. */
export const instanceActionJson: Codec<
  { readonly actionType: "FlushMetrics" | "InstanceStart" | "SendCtrlAltDel" }
> = object({
  actionType: required("action_type", oneOf("FlushMetrics", "InstanceStart", "SendCtrlAltDel")),
});
/** The body of `PATCH /vm`. */
export const vmStateJson: Codec<{ readonly state: "Paused" | "Resumed" }> = object({
  state: required("state", oneOf("Paused", "Resumed")),
});
/** The body of `PUT /hypertopia/actions`. */
export const supervisorActionJson: Codec<{ readonly action: SupervisorAction }> = object({
  action: required("action", oneOf("Stop", "Kill", "Reboot")),
});

const count = integer(0, Number.MAX_SAFE_INTEGER);
const state = required("state", oneOf("Not started", "Running", "Paused"));

/** The answer of `GET /`. */
export const instanceInfoJson: Codec<InstanceInfo> = object<InstanceInfo>({
  id: required("id", anyText),
  state,
  vmmVersion: required("vmm_version", anyText),
  appName: required("app_name", anyText),
});

/** The answer of `GET /hypertopia/status`. */
export const statusJson: Codec<SupervisorStatus> = object<SupervisorStatus>({
  id: required("id", anyText),
  state,
  pid: required("pid", count),
  uptime: required("uptime_ms", { parse: count.parse, print: Math.round }),
  exits: required("exits", record(count)),
  end: optional(
    "end",
    object<MachineEnd>({
      reason: required("reason", oneOf("poweroff", "reset", "crash", "stopped", "failure")),
      detail: required("detail", anyText),
    }),
  ),
});

const statisticsFields = object<BalloonStatistics>({
  targetPages: required("target_pages", count),
  actualPages: required("actual_pages", count),
  swapIn: quiet(optional("swap_in", tokens)),
  swapOut: quiet(optional("swap_out", tokens)),
  majorFaults: quiet(optional("major_faults", tokens)),
  minorFaults: quiet(optional("minor_faults", tokens)),
  freeMemory: quiet(optional("free_memory", tokens)),
  totalMemory: quiet(optional("total_memory", tokens)),
  availableMemory: quiet(optional("available_memory", tokens)),
  diskCaches: quiet(optional("disk_caches", tokens)),
  hugetlbAllocations: quiet(optional("hugetlb_allocations", tokens)),
  hugetlbFailures: quiet(optional("hugetlb_failures", tokens)),
  oomKills: quiet(optional("oom_kill", tokens)),
  allocationStalls: quiet(optional("alloc_stall", tokens)),
  asyncScans: quiet(optional("async_scan", tokens)),
  directScans: quiet(optional("direct_scan", tokens)),
  asyncReclaims: quiet(optional("async_reclaim", tokens)),
  directReclaims: quiet(optional("direct_reclaim", tokens)),
}, { unused: ["target_mib", "actual_mib"] });

/** The answer of `GET /balloon/statistics`. */
export const statisticsJson: Codec<BalloonStatistics> = {
  parse: statisticsFields.parse,
  print: (value) => ({
    ...statisticsFields.print(value) as Record<string, unknown>,
    // 256 pages of 4 KiB are one MiB.
    target_mib: Math.floor(value.targetPages / 256),
    actual_mib: Math.floor(value.actualPages / 256),
  }),
};

/** The machine of a supervisor that nobody told anything, as Firecracker's. */
export const DEFAULT_CONFIGURATION: MachineConfiguration = {
  machine: { vcpuCount: 1, memSizeMib: 128, smt: false, trackDirtyPages: false, hugePages: "None" },
  drives: [],
  networkInterfaces: [],
  hypertopia: { forwards: [], restartOnReset: false },
};

/** The configuration file and the answer of `GET /vm/config`. It checks no field against another. */
export const configurationJson: Codec<MachineConfiguration> = object<MachineConfiguration>({
  machine: usually(DEFAULT_CONFIGURATION.machine, required("machine-config", machineJson)),
  bootSource: optional("boot-source", bootSourceJson),
  drives: usually([], required("drives", list(driveJson))),
  networkInterfaces: usually([], required("network-interfaces", list(networkInterfaceJson))),
  vsock: optional("vsock", vsockJson),
  entropy: optional("entropy", entropyJson),
  balloon: optional("balloon", balloonJson),
  serial: quiet(optional("serial-config", serialJson)),
  logger: optional("logger", loggerJson),
  metrics: optional("metrics", metricsJson),
  hypertopia: quiet(usually(DEFAULT_CONFIGURATION.hypertopia, required("hypertopia", hypertopiaJson))),
}, {
  isOpen: true,
  unsupported: {
    "cpu-config": { neutral: null, reason: "CPU templates, leave the field out" },
    "mmds-config": { neutral: null, reason: "a metadata service (MMDS), leave the field out" },
    "memory-hotplug": { neutral: null, reason: "memory hotplug, leave the field out and use a balloon" },
    pmem: { neutral: [], reason: "pmem devices, leave the field out and use a drive" },
  },
});

/**
 * Memory that the guest is given at boot, the balloon's share included.
 *
 * @param machine vCPUs and memory
 * @returns The memory, in MiB
 */
export function bootMemoryMib(machine: MachineConfig): number {
  return machine.maxMemSizeMib ?? machine.memSizeMib;
}

/**
 * Gives a configuration other vCPUs and memory.
 *
 * @param configuration The configuration
 * @param machine vCPUs and memory
 * @param at Where they stand
 * @returns The new configuration
 * @throws {MachineError} If they contradict themselves or the balloon
 */
export function withMachine(
  configuration: MachineConfiguration,
  machine: MachineConfig,
  at: Place,
): MachineConfiguration {
  const { vcpuCount, memSizeMib, maxMemSizeMib, smt } = machine;
  if (smt && vcpuCount > 1 && vcpuCount % 2 !== 0) {
    refuse(
      at,
      `${nameOf(within(at, "vcpu_count"))} is ${vcpuCount}: with \`smt\` it must be 1 or an even number`,
    );
  }
  if (maxMemSizeMib !== undefined && maxMemSizeMib < memSizeMib) {
    refuse(
      at,
      `${nameOf(within(at, "max_mem_size_mib"))} is ${maxMemSizeMib}: ` +
        `it must be at least \`mem_size_mib\`, ${memSizeMib}`,
    );
  }
  const held = configuration.balloon?.amountMib ?? 0;
  if (held > bootMemoryMib(machine)) {
    refuse(
      at,
      `the memory of ${
        bootMemoryMib(machine)
      } MiB is smaller than the balloon, which is to hold ${held} MiB: ` +
        "give more memory or make the balloon smaller",
    );
  }
  return { ...configuration, machine };
}

/**
 * Adds a disk, or replaces the one of the same name.
 *
 * @param configuration The configuration
 * @param drive The disk
 * @param at Where it stands
 * @returns The new configuration
 * @throws {MachineError} If there is another root device
 */
export function withDrive(
  configuration: MachineConfiguration,
  drive: DriveConfiguration,
  at: Place,
): MachineConfiguration {
  const drives = [...configuration.drives];
  const index = drives.findIndex(({ id }) => id === drive.id);
  const first = drives[0];
  if (drive.isRootDevice && first?.isRootDevice && index !== 0) {
    refuse(
      at,
      `${nameOf(within(at, "is_root_device"))} is true, and a root device already exists, "${first.id}": ` +
        "make it false for one of them",
    );
  }
  if (index < 0) {
    if (drive.isRootDevice) drives.unshift(drive);
    else drives.push(drive);
  } else {
    drives[index] = drive;
    // The kernel finds the root file system on the first disk.
    if (drive.isRootDevice && index > 0) [drives[0], drives[index]] = [drive, first!];
  }
  return { ...configuration, drives };
}

/**
 * Adds a NIC, or replaces the one of the same name.
 *
 * @param configuration The configuration
 * @param nic The NIC
 * @param at Where it stands
 * @returns The new configuration
 * @throws {MachineError} If another NIC has its Ethernet address or its tap device
 */
export function withNetworkInterface(
  configuration: MachineConfiguration,
  nic: NetworkInterfaceConfiguration,
  at: Place,
): MachineConfiguration {
  const nics = [...configuration.networkInterfaces];
  for (const other of nics) {
    if (other.id === nic.id) continue;
    if (nic.guestMac !== undefined && other.guestMac === nic.guestMac) {
      refuse(
        at,
        `${nameOf(within(at, "guest_mac"))} ${nic.guestMac} is in use by "${other.id}": give another one`,
      );
    }
    if (other.hostDevName === nic.hostDevName) {
      refuse(
        at,
        `${nameOf(within(at, "host_dev_name"))} "${nic.hostDevName}" is in use by "${other.id}": ` +
          "give each NIC its own tap device",
      );
    }
  }
  const index = nics.findIndex(({ id }) => id === nic.id);
  if (index < 0) nics.push(nic);
  else nics[index] = nic;
  return { ...configuration, networkInterfaces: nics };
}

/**
 * Gives a configuration another balloon.
 *
 * @param configuration The configuration
 * @param balloon The balloon
 * @param at Where it stands
 * @returns The new configuration
 * @throws {MachineError} If it is to hold more than the guest has
 */
export function withBalloon(
  configuration: MachineConfiguration,
  balloon: BalloonConfiguration,
  at: Place,
): MachineConfiguration {
  const memory = bootMemoryMib(configuration.machine);
  if (balloon.amountMib > memory) {
    refuse(
      at,
      `${nameOf(within(at, "amount_mib"))} is ${balloon.amountMib}: ` +
        `it can be at most the memory of the guest, ${memory}`,
    );
  }
  return { ...configuration, balloon };
}

/**
 * Gives a configuration other port forwards.
 *
 * @param configuration The configuration
 * @param forwards The forwards, all of them
 * @param at Where they stand
 * @returns The new configuration
 * @throws {MachineError} If two use the same port of the host
 */
export function withForwards(
  configuration: MachineConfiguration,
  forwards: readonly PortForward[],
  at: Place,
): MachineConfiguration {
  const seen = new Set<string>();
  for (const [index, { protocol, address, host }] of forwards.entries()) {
    const key = `${protocol} ${address}:${host}`;
    if (seen.has(key)) {
      refuse(at, `${nameOf(within(at, `[${index}]`))} forwards ${key} a second time: give each its own port`);
    }
    seen.add(key);
  }
  return { ...configuration, hypertopia: { ...configuration.hypertopia, forwards } };
}

/**
 * Changes limits: an absent bucket stays, and one of size or refill time 0 is lifted.
 *
 * @param current The limits so far
 * @param update What changes
 * @returns The new limits
 */
export function updateRateLimiter(
  current: RateLimiterOptions,
  update: RateLimiterOptions,
): RateLimiterOptions {
  return Object.fromEntries((["bandwidth", "ops"] as const).flatMap((key) => {
    const bucket = update[key] ?? current[key];
    return bucket && bucket.size > 0 && bucket.refillTime > 0 ? [[key, bucket]] : [];
  }));
}

/**
 * Makes a configuration one that can be started: a machine that can grow gets the balloon that holds the difference,
 * unless it has one.
 *
 * @param configuration The configuration
 * @returns What to start
 * @throws {MachineError} If there is nothing to boot, or the kernel's command line is too long
 */
export function bootable(configuration: MachineConfiguration): BootableConfiguration {
  const { machine, bootSource, balloon } = configuration;
  if (!bootSource) {
    throw new MachineError("Cannot start the machine as it has no kernel: PUT /boot-source first");
  }
  const spare = bootMemoryMib(machine) - machine.memSizeMib;
  const result: BootableConfiguration = {
    ...configuration,
    bootSource,
    ...(balloon || spare === 0 ? {} : {
      balloon: { amountMib: spare, deflateOnOom: false, statsPollingInterval: 0, freePageReporting: true },
    }),
  };
  const { length } = kernelCommandLine(result);
  if (length > MAX_COMMAND_LINE) {
    throw new MachineError(
      `Cannot start the machine as its kernel command line has ${length} characters: ` +
        `shorten \`boot_args\`, at most ${MAX_COMMAND_LINE} fit`,
    );
  }
  return result;
}

/**
 * The kernel command line: the boot arguments, and the root file system where a drive is the root device. What
 * follows `--` is for init and stays last. `pci=off`, which many clients of Firecracker send, is left out: our devices
 * are on PCI.
 *
 * @param configuration What is started
 * @returns The command line
 */
export function kernelCommandLine(configuration: BootableConfiguration): string {
  const words = (configuration.bootSource.bootArgs ?? DEFAULT_BOOT_ARGS).split(" ");
  const end = words.indexOf("--");
  const [kernel, init] = end < 0 ? [words, []] : [words.slice(0, end), words.slice(end)];
  const root = configuration.drives.find(({ isRootDevice }) => isRootDevice);
  return [
    ...kernel.filter((word) => word !== "pci=off"),
    ...(root
      ? [
        root.partuuid === undefined ? "root=/dev/vda" : `root=PARTUUID=${root.partuuid}`,
        root.isReadOnly ? "ro" : "rw",
      ]
      : []),
    ...init,
  ].join(" ").trim();
}

/** What {@linkcode parseConfigFile} read. */
export interface ParsedConfigFile {
  /** The machine. */
  readonly configuration: BootableConfiguration;
  /** Paths of fields that are unknown and that Firecracker ignores too: worth a warning, as they may be typing errors. */
  readonly ignored: readonly string[];
}

/**
 * Reads a configuration file: Firecracker's, or one with our additions.
 *
 * @param content Its content
 * @returns The machine, ready to start
 * @throws {MachineError} If it is no JSON, a field is wrong or fields contradict one another. Files that it names are
 * left to {@linkcode checkFiles}
 */
export function parseConfigFile(content: string): ParsedConfigFile {
  const at = placeOf("the configuration file");
  const given = configurationJson.parse(parseJson(content, at), at);
  if (!given.bootSource) refuse(at, "it is incomplete: missing field `boot-source`");
  return { configuration: bootable(checkWhole(given, at)), ignored: at.ignored };
}

/** Checks fields against one another by adding the parts one by one, as a client of the API does. */
function checkWhole(given: MachineConfiguration, at: Place): MachineConfiguration {
  const { channels, forwards } = given.hypertopia;
  if (channels && channels.data.length !== channels.errors.length) {
    refuse(
      at,
      "`hypertopia.channels` has " +
        `${channels.data.length} data sockets and ${channels.errors.length} error sockets: give as many of each`,
    );
  }
  const { balloon, ...rest } = given;
  let result = withMachine(
    { ...rest, drives: [], networkInterfaces: [] },
    given.machine,
    within(at, "machine-config"),
  );
  for (const [index, drive] of given.drives.entries()) {
    result = withDrive(result, drive, within(at, `drives[${index}]`));
  }
  for (const [index, nic] of given.networkInterfaces.entries()) {
    result = withNetworkInterface(result, nic, within(at, `network-interfaces[${index}]`));
  }
  if (balloon) result = withBalloon(result, balloon, within(at, "balloon"));
  return withForwards(result, forwards, within(at, "hypertopia.forwards"));
}

/**
 * Parses JSON.
 *
 * @param content The text
 * @param at Where it stands
 * @returns The value
 * @throws {MachineError} If it is none
 */
export function parseJson(content: string, at: Place): unknown {
  try {
    return JSON.parse(content);
  } catch (cause) {
    throw new MachineError(`Cannot use ${at.subject} as it is not JSON: ${(cause as Error).message}`, {
      cause,
    });
  }
}

/**
 * Reads a text of bounded length.
 *
 * @param stream Its bytes; null for none
 * @param limit How many there may be
 * @param subject What it is, such as `the body of PUT /vsock`
 * @returns The text
 * @throws {MachineError} If it is longer, or not UTF-8
 */
export async function readBounded(
  stream: ReadableStream<Uint8Array> | null,
  limit: number,
  subject: string,
): Promise<string> {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let length = 0;
  let content = "";
  try {
    for await (const chunk of stream ?? []) {
      length += chunk.length;
      // Leaving the loop cancels the stream.
      if (length > limit) throw new MachineError(`Cannot use ${subject} as it has more than ${limit} bytes`);
      content += decoder.decode(chunk, { stream: true });
    }
    return content + decoder.decode();
  } catch (cause) {
    if (cause instanceof MachineError) throw cause;
    throw new MachineError(`Cannot use ${subject} as ${(cause as Error).message}`, { cause });
  }
}

/**
 * Checks that the files of a machine, or of a part of it, can be used: kernel, initramfs and disks are there and may be
 * opened, and everything that will be made has a folder. Nothing is made.
 *
 * @param configuration The machine, or a part of it
 * @param subject What it is, such as `the body of PUT /vsock`
 * @throws {MachineError} If one cannot be used
 */
export async function checkFiles(
  configuration: Partial<MachineConfiguration>,
  subject: string,
): Promise<void> {
  const { bootSource, drives = [], vsock, serial, logger, metrics, hypertopia } = configuration;
  if (bootSource) await checkInput(subject, "the kernel", bootSource.kernelImagePath, false);
  if (bootSource?.initrdPath !== undefined) {
    await checkInput(subject, "the initramfs", bootSource.initrdPath, false);
  }
  for (const drive of drives) {
    await checkInput(subject, `the file of drive "${drive.id}"`, drive.pathOnHost, !drive.isReadOnly);
  }
  for (const path of [serial?.outPath, logger?.path, metrics?.path, hypertopia?.console?.log]) {
    if (path !== undefined) await checkOutput(subject, path);
  }
  const { channels } = hypertopia ?? {};
  for (
    const path of [
      vsock?.udsPath,
      hypertopia?.console?.socket,
      channels?.control,
      ...channels?.data ?? [],
      ...channels?.errors ?? [],
    ]
  ) {
    if (path !== undefined) await checkFolder(subject, "the socket", path);
  }
}

async function checkInput(subject: string, what: string, path: string, isWritten: boolean): Promise<void> {
  try {
    const info = await Deno.stat(path);
    // A named pipe would block whoever opens it.
    if (!info.isFile && !info.isBlockDevice) throw new Error("it is neither a file nor a block device");
    (await Deno.open(path, { read: true, write: isWritten })).close();
  } catch (cause) {
    throw new MachineError(
      `Cannot use ${subject} as ${what} "${path}" cannot be opened for ${
        isWritten ? "reading and writing" : "reading"
      }: ${(cause as Error).message}`,
      { cause },
    );
  }
}

async function checkOutput(subject: string, path: string): Promise<void> {
  const info = await Deno.stat(path).catch((error: unknown) => {
    if (!(error instanceof Deno.errors.NotFound)) throw unusable(subject, "the file", path, error);
  });
  if (!info) return await checkFolder(subject, "the file", path);
  if (!info.isFile && !info.isFifo && !info.isCharDevice) {
    throw unusable(subject, "the file", path, new Error("it is neither a file nor a named pipe"));
  }
}

async function checkFolder(subject: string, what: string, path: string): Promise<void> {
  try {
    if (!(await Deno.stat(dirname(path))).isDirectory) throw new Error("its folder is none");
  } catch (cause) {
    throw unusable(subject, what, path, cause);
  }
}

function unusable(subject: string, what: string, path: string, cause: unknown): MachineError {
  return new MachineError(
    `Cannot use ${subject} as ${what} "${path}" cannot be made: ${(cause as Error).message}`,
    { cause },
  );
}
