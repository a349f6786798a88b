/**
 * Landlock: a process gives up access to files and to TCP ports (Linux 6.15 `include/uapi/linux/landlock.h`,
 * `Documentation/userspace-api/landlock.rst`; interface versions 1 to 7).
 *
 * @module
 */

import { runOnAllThreads } from "./all_threads.ts";
import { SysError } from "./errno.ts";
import { Fd } from "./fd.ts";
import { check, errno, libc } from "./libc.ts";
import { SYSCALL } from "./seccomp.ts";

/** Rights on files and folders. Since which version of the interface each is there, tells {@linkcode landlockRights}. */
export const LANDLOCK_FS = {
  EXECUTE: 1n << 0n,
  WRITE_FILE: 1n << 1n,
  READ_FILE: 1n << 2n,
  READ_DIR: 1n << 3n,
  REMOVE_DIR: 1n << 4n,
  REMOVE_FILE: 1n << 5n,
  MAKE_CHAR: 1n << 6n,
  MAKE_DIR: 1n << 7n,
  MAKE_REG: 1n << 8n,
  MAKE_SOCK: 1n << 9n,
  MAKE_FIFO: 1n << 10n,
  MAKE_BLOCK: 1n << 11n,
  MAKE_SYM: 1n << 12n,
  REFER: 1n << 13n,
  TRUNCATE: 1n << 14n,
  IOCTL_DEV: 1n << 15n,
} as const;

/** Rights on TCP ports, from version 4 on. */
export const LANDLOCK_NET = { BIND_TCP: 1n << 0n, CONNECT_TCP: 1n << 1n } as const;

/** `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET`, from version 6 on. */
const SCOPE_ABSTRACT_UNIX_SOCKET = 1n;
const LANDLOCK_CREATE_RULESET_VERSION = 1;
const LANDLOCK_RULE_PATH_BENEATH = 1;
const LANDLOCK_RULE_NET_PORT = 2;
/** `O_PATH` (Linux 6.1 `include/uapi/asm-generic/fcntl.h`): a place, which needs no right to read it. */
const O_PATH = 0o10000000;
const ENOSYS = 38;
const EOPNOTSUPP = 95;

/** What may be done with a file; others than a folder's. */
const FILE_RIGHTS = LANDLOCK_FS.EXECUTE | LANDLOCK_FS.WRITE_FILE | LANDLOCK_FS.READ_FILE |
  LANDLOCK_FS.TRUNCATE |
  LANDLOCK_FS.IOCTL_DEV;
const READ_RIGHTS = LANDLOCK_FS.READ_FILE | LANDLOCK_FS.READ_DIR;
/** All but to execute and to make devices. */
const WRITE_RIGHTS = 0xffffn & ~(LANDLOCK_FS.EXECUTE | LANDLOCK_FS.MAKE_CHAR | LANDLOCK_FS.MAKE_BLOCK);

/** What a process keeps. Deno wants to read `/proc/self` while it runs: without, it may end for lack of its stack's size. */
export interface LandlockRules {
  /** Files and folders, with all below, to read. One that is not there is left out. */
  readonly readOnly?: readonly string[];
  /** Files, devices and folders, with all below, to read, write, make and remove. */
  readonly readWrite?: readonly string[];
  /** TCP ports; all of them unless told. */
  readonly ports?: { readonly bind: readonly number[]; readonly connect: readonly number[] };
}

/** What Landlock has done. */
export interface LandlockResult {
  /** Version of the kernel's interface; 0 where it has none. */
  readonly version: number;
  /** Whether the process is restricted. */
  readonly applied: boolean;
  /** What is as open as before although it was asked for, in words. */
  readonly open: readonly string[];
}

/**
 * Asks for the version of the kernel's Landlock.
 *
 * @returns The version; 0 where the kernel has none, or was started without it
 */
export function landlockVersion(): number {
  const result = libc().landlock_create_ruleset(
    BigInt(SYSCALL.landlock_create_ruleset),
    null,
    0n,
    LANDLOCK_CREATE_RULESET_VERSION,
  );
  if (result < 0 && [ENOSYS, EOPNOTSUPP].includes(errno())) return 0;
  return check(result, "landlock_create_ruleset()");
}

/**
 * Tells which rights on files a version knows, and so may be given up.
 *
 * @param version The version
 * @returns The rights, `LANDLOCK_FS` bits
 */
export function landlockRights(version: number): bigint {
  if (version <= 0) return 0n;
  const { MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV } = LANDLOCK_FS;
  const newest = version >= 5 ? IOCTL_DEV : version >= 3 ? TRUNCATE : version >= 2 ? REFER : MAKE_SYM;
  return (newest << 1n) - 1n;
}

/** Descriptors of places in `/proc`: the kernel may forget an unused one, and a rule with it. */
const places: Fd[] = [];

/** Lets a ruleset grant rights at a path and below. */
function addPath(ruleset: Fd, path: string, rights: bigint): void {
  const place = Fd.open(path, O_PATH);
  try {
    // struct landlock_path_beneath_attr is packed: rights (u64), descriptor (s32).
    const rule = new DataView(new ArrayBuffer(12));
    rule.setBigUint64(0, Deno.statSync(path).isDirectory ? rights : rights & FILE_RIGHTS, true);
    rule.setInt32(8, place.number, true);
    addRule(ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, path);
  } finally {
    if (path.startsWith("/proc/")) places.push(place);
    else place[Symbol.dispose]();
  }
}

function addRule(ruleset: Fd, type: number, rule: DataView<ArrayBuffer>, what: string): void {
  check(
    libc().landlock_add_rule(BigInt(SYSCALL.landlock_add_rule), ruleset.number, type, rule, 0),
    `landlock_add_rule("${what}")`,
  );
}

/**
 * Keeps all threads of this process from files other than the given, for good. What is open stays usable. Files are not
 * executed, devices not made; other processes' memory is out of reach. `no_new_privs` must be set, or the process be
 * privileged.
 *
 * @param rules What it keeps
 * @returns What was done; nothing where the kernel has no Landlock
 * @throws {SysError} If a file to write is not there, or the kernel refuses
 */
export function restrictFiles(rules: LandlockRules): LandlockResult {
  const version = landlockVersion();
  if (version === 0) return { version, applied: false, open: [] };
  const rights = landlockRights(version);
  const open: string[] = [];
  if (version < 3) open.push("truncating files by their path");
  if (version < 5) open.push("ioctl on devices that may be read");
  if (version < 6) open.push("abstract Unix sockets");
  const hasPorts = rules.ports !== undefined && version >= 4;
  if (rules.ports && !hasPorts) open.push("TCP ports");
  // struct landlock_ruleset_attr: rights on files, on ports since version 4, scopes since version 6.
  const attributes = new BigUint64Array([
    rights,
    hasPorts ? LANDLOCK_NET.BIND_TCP | LANDLOCK_NET.CONNECT_TCP : 0n,
    SCOPE_ABSTRACT_UNIX_SOCKET,
  ]);
  const size = version >= 6 ? 24n : version >= 4 ? 16n : 8n;
  const created = libc().landlock_create_ruleset(
    BigInt(SYSCALL.landlock_create_ruleset),
    attributes,
    size,
    0,
  );
  using ruleset = new Fd(check(created, "landlock_create_ruleset()"), "Landlock ruleset");
  for (const path of rules.readOnly ?? []) {
    try {
      addPath(ruleset, path, READ_RIGHTS);
    } catch (error) {
      if (!(error instanceof SysError && error.code === "ENOENT")) throw error;
    }
  }
  for (const path of rules.readWrite ?? []) addPath(ruleset, path, WRITE_RIGHTS & rights);
  if (hasPorts) {
    const { bind, connect } = rules.ports;
    for (const port of new Set([...bind, ...connect])) {
      // struct landlock_net_port_attr: rights (u64), port (u64).
      const rule = new DataView(new ArrayBuffer(16));
      const bits = (bind.includes(port) ? LANDLOCK_NET.BIND_TCP : 0n) |
        (connect.includes(port) ? LANDLOCK_NET.CONNECT_TCP : 0n);
      rule.setBigUint64(0, bits, true);
      rule.setBigUint64(8, BigInt(port), true);
      addRule(ruleset, LANDLOCK_RULE_NET_PORT, rule, `port ${port}`);
    }
  }
  runOnAllThreads([{
    name: "landlock_restrict_self()",
    number: SYSCALL.landlock_restrict_self,
    arguments: [ruleset.number, 0],
  }]);
  return { version, applied: true, open };
}
