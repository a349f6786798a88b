/**
 * The part of a guest's initramfs that tells one machine from another.
 *
 * @module
 */

/** A network device of a guest. */
export interface GuestNic {
  /** Its hardware address, as six pairs of hexadecimal digits. */
  mac: string;
  /** The name it gets in the guest. */
  name: string;
  /** Its address with the length of the prefix, such as `10.0.0.2/24`; without one it is only brought up. */
  address?: string;
  /** The address the default route goes by. */
  gateway?: string;
  /** The address of a name server. */
  dns?: string;
}

/** A disk of a guest, other than its root, and where it is mounted. */
export interface GuestMount {
  /** The serial number of the virtio block device. */
  serial: string;
  /** The absolute path of the directory it is mounted on. */
  mountpoint: string;
  /** The file system on it. */
  fstype: string;
}

/** A file written into a guest's root at every boot. */
export interface GuestFile {
  /** Its absolute path. */
  path: string;
  /** What it holds. */
  content: Uint8Array;
  /** Its permission bits. */
  mode: number;
}

/** The root file system a guest hands over to. */
export interface GuestRoot {
  /** The path of its block device, or `serial=` and the serial number of a virtio disk. */
  device: string;
  /** The file system on it. */
  fstype: string;
  /** The absolute path of its init. */
  init: string;
}

/** All that the initramfs of one machine is told. */
export interface GuestConfig {
  /** The host name. */
  hostname: string;
  /** The environment of everything run in the guest. */
  environment: Record<string, string>;
  /** Its network devices. */
  nics: readonly GuestNic[];
  /** Its root file system; without one the guest stays in the initramfs. */
  root?: GuestRoot;
  /** Its other disks. */
  mounts: readonly GuestMount[];
  /** Files put into the root. */
  files: readonly GuestFile[];
  /** A shell script started in the background at boot. */
  command?: string;
}

/** A file of the machine's own part of the initramfs. */
export interface GuestConfigFile {
  /** Its absolute path in the initramfs. */
  path: string;
  /** Its permission bits. */
  mode: number;
  /** What it holds. */
  content: Uint8Array;
}

const DIRECTORY = "/hypertopia/config";

const encoder = new TextEncoder();

function check(ok: boolean, what: string, value: string, needed: string): void {
  if (!ok) {
    throw new TypeError(
      `Could not configure the guest: its ${what} is ${JSON.stringify(value)}, use ${needed}`,
    );
  }
}

/** Whether a text can be one word of a configuration line and a path or name in the guest. */
function isWord(value: string): boolean {
  // deno-lint-ignore no-control-regex
  return value !== "" && !/[\s\x00-\x1f\x7f]/.test(value);
}

function isPath(value: string): boolean {
  // deno-lint-ignore no-control-regex
  return value.startsWith("/") && !/[\x00-\x1f\x7f]/.test(value) &&
    !value.split("/").some((part) => part === "." || part === "..");
}

function isIpv4(value: string): boolean {
  const parts = value.split(".");
  return parts.length === 4 && parts.every((part) => /^\d{1,3}$/.test(part) && Number(part) <= 255);
}

function isAddress(value: string): boolean {
  return isIpv4(value) || (value.includes(":") && URL.canParse(`http://[${value}]/`));
}

function isAddressWithPrefix(value: string): boolean {
  const [address = "", prefix = "", more] = value.split("/");
  return more === undefined && isAddress(address) && /^\d{1,3}$/.test(prefix) &&
    Number(prefix) <= (address.includes(":") ? 128 : 32);
}

/**
 * Quotes a text as one word of the shell's.
 *
 * @param text Any text without a NUL character, which no shell can hold
 * @returns The word
 */
export function shellQuote(text: string): string {
  if (text.includes("\0")) {
    throw new TypeError(
      `Could not quote ${JSON.stringify(text)} for the guest's shell: it has a NUL character`,
    );
  }
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** Whether a text can be the name of an environment variable in the guest. */
export function isEnvironmentName(name: string): boolean {
  return /^[A-Za-z_][A-Za-z0-9_]*$/.test(name);
}

function environmentLines(
  environment: Readonly<Record<string, string>>,
  quote: (value: string) => string,
): string {
  let lines = "";
  for (const [name, value] of Object.entries(environment)) {
    check(isEnvironmentName(name), "environment variable's name", name, "letters, digits and underscores");
    check(!value.includes("\0"), `environment variable ${name}`, value, "a text without NUL characters");
    lines += `${name}=${quote(value)}\n`;
  }
  return lines;
}

/** In double quotes both systemd's older and newer parsers take these four escapes and no others. */
function systemdQuote(value: string): string {
  return `"${value.replaceAll(/["\\`$]/g, "\\$&")}"`;
}

function nicLine(nic: GuestNic): string {
  check(
    /^([0-9a-f]{2}:){5}[0-9a-f]{2}$/i.test(nic.mac),
    "network device's address",
    nic.mac,
    "six hex pairs",
  );
  check(
    // The kernel's limit, less the characters of the name it has on the way.
    /^[A-Za-z0-9][A-Za-z0-9_.-]*$/.test(nic.name) && nic.name.length <= 12,
    "network device's name",
    nic.name,
    "at most 12 letters, digits, underscores, points and hyphens",
  );
  if (nic.address !== undefined) {
    check(isAddressWithPrefix(nic.address), `address on ${nic.name}`, nic.address, "one such as 10.0.0.2/24");
  }
  for (const [what, value] of [["gateway", nic.gateway], ["name server", nic.dns]] as const) {
    if (value !== undefined) check(isAddress(value), `${what} on ${nic.name}`, value, "an IP address");
  }
  return `${nic.mac.toLowerCase()} ${nic.name} ${nic.address ?? "-"} ${nic.gateway ?? "-"} ${
    nic.dns ?? "-"
  }\n`;
}

function rootLine(root: GuestRoot): string {
  check(
    isWord(root.device) && (root.device.startsWith("/dev/") || /^serial=./.test(root.device)),
    "root device",
    root.device,
    "a path in /dev or serial= and a disk's serial number",
  );
  check(/^[a-z0-9_.-]+$/.test(root.fstype), "root file system", root.fstype, "a name such as ext4");
  check(isPath(root.init), "init", root.init, "an absolute path without . and ..");
  return `${root.device} ${root.fstype} ${root.init}\n`;
}

function mountLine(mount: GuestMount): string {
  check(
    // More would be cut off by QEMU.
    isWord(mount.serial) && mount.serial.length <= 20,
    "disk's serial number",
    mount.serial,
    "a word of at most 20 characters",
  );
  check(
    isWord(mount.mountpoint) && isPath(mount.mountpoint),
    `mount point of the disk ${mount.serial}`,
    mount.mountpoint,
    "an absolute path without spaces",
  );
  check(
    /^[a-z0-9_.-]+$/.test(mount.fstype),
    `file system on the disk ${mount.serial}`,
    mount.fstype,
    "a name such as ext4",
  );
  return `${mount.serial} ${mount.mountpoint} ${mount.fstype}\n`;
}

function isHostname(name: string): boolean {
  return name.length <= 64 &&
    name.split(".").every((label) => /^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$/.test(label));
}

/**
 * Lays out a machine's configuration as the files its /init reads.
 *
 * @param config What the machine is to be
 * @returns The files, in the same order for the same configuration
 */
export function guestConfigFiles(config: GuestConfig): GuestConfigFile[] {
  const files: GuestConfigFile[] = [];
  function add(name: string, content: string | Uint8Array, mode = 0o644): void {
    files.push({
      path: `${DIRECTORY}/${name}`,
      mode,
      content: typeof content === "string" ? encoder.encode(content) : content,
    });
  }
  check(isHostname(config.hostname), "host name", config.hostname, "letters, digits, hyphens and points");
  add("hostname", `${config.hostname}\n`);
  // Not for everyone in the guest to read: it may hold secrets.
  add("environment", environmentLines(config.environment, shellQuote), 0o600);
  add("environment.systemd", environmentLines(config.environment, systemdQuote), 0o600);
  if (config.nics.length > 0) add("network", config.nics.map(nicLine).join(""));
  const servers = new Set(config.nics.flatMap((nic) => nic.dns === undefined ? [] : [nic.dns]));
  if (servers.size > 0) {
    add("resolv.conf", Array.from(servers, (server) => `nameserver ${server}\n`).join(""));
  }
  if (config.root !== undefined) add("root", rootLine(config.root));
  if (config.mounts.length > 0) add("mounts", config.mounts.map(mountLine).join(""));
  if (config.files.length > 0) {
    let list = "";
    for (const [number, file] of config.files.entries()) {
      check(
        isPath(file.path) && !/[ /]$/.test(file.path),
        "file's path",
        file.path,
        "an absolute path of a file without . and ..",
      );
      check(
        Number.isInteger(file.mode) && file.mode >= 0 && file.mode <= 0o7777,
        `mode of the file ${file.path}`,
        String(file.mode),
        "permission bits such as 0o644",
      );
      list += `${number} ${file.mode.toString(8)} ${file.path}\n`;
      add(`files/${number}`, file.content, file.mode & 0o777);
    }
    add("files/list", list, 0o600);
  }
  if (config.command !== undefined) {
    check(!config.command.includes("\0"), "command", config.command, "a script without NUL characters");
    add("command", config.command.endsWith("\n") ? config.command : `${config.command}\n`, 0o700);
  }
  return files;
}
