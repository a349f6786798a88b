/**
 * The sandbox of a supervisor: once its machine is built, the process gives up what it does not need any more, for good.
 * The guest is hostile, and whoever takes over the process through it gets no further.
 *
 * @module
 */

import { join } from "node:path";
import {
  type ArgumentCondition,
  type CapabilityName,
  compileFilter,
  dropCapabilities,
  installFilter,
  isKnownSystem,
  KVM,
  restrictFiles,
  type SeccompPolicy,
  setNoNewPrivileges,
  type SyscallRule,
  TUN,
  VHOST,
} from "../../ffi/mod.ts";
import type { Log } from "./log.ts";
import { isBusy } from "../files.ts";

/** One layer of a sandbox. */
export interface SandboxLayer {
  /** Whether it is in place. */
  readonly applied: boolean;
  /** What it does, or why it is not there, in words. */
  readonly detail: string;
  /** Folder of the cgroup that holds the process now, to be removed when it has ended. */
  readonly folder?: string;
}

/** Limits of a cgroup. */
export interface CgroupLimits {
  /** Name of the cgroup to make; it stays when the process ends. */
  readonly name: string;
  /** Memory in bytes. */
  readonly memoryMax?: number;
  /** Processes and threads. */
  readonly pidsMax?: number;
  /** Processors, such as 1.5. */
  readonly cpuMax?: number;
}

/** What a supervisor keeps. */
export interface SandboxOptions {
  /** The machine's folder, to read and write, with all below. */
  readonly folder: string;
  /** More files, devices and folders to read and write, such as disks and `/dev/kvm`, where they are opened later. */
  readonly readWrite?: readonly string[];
  /** More files and folders to read. One that is not there is left out. */
  readonly readOnly?: readonly string[];
  /** Capabilities to keep; none unless told. */
  readonly keepCapabilities?: readonly CapabilityName[];
  /** Limits on resources; none unless told. */
  readonly cgroup?: CgroupLimits;
  /** System calls to allow beyond the usual, such as `io_uring_setup`. */
  readonly allow?: readonly SyscallRule[];
  /** Whether forbidden system calls are only written to the kernel's log, to find what is missing. */
  readonly logOnly?: boolean;
}

/** What a sandbox consists of. */
export interface SandboxReport {
  /** Limits on resources. */
  readonly cgroup: SandboxLayer;
  /** No gain of privileges by executing programs. */
  readonly noNewPrivileges: SandboxLayer;
  /** Files. */
  readonly landlock: SandboxLayer;
  /** Capabilities. */
  readonly capabilities: SandboxLayer;
  /** System calls. */
  readonly seccomp: SandboxLayer;
}

/** What Deno and the C library read while they run; the last lines are for names of hosts and for local time. */
const READ_ONLY: readonly string[] = [
  ...["/proc/self", "/proc/meminfo", "/proc/loadavg", "/proc/sys/vm/overcommit_memory"],
  ...["/proc/sys/kernel/osrelease", "/sys/fs/cgroup", "/dev/urandom"],
  ...["/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"],
  ...["/etc/localtime", "/usr/share/zoneinfo"],
];

const EPERM = 1;
const ENOTTY = 25;
const ENOSYS = 38;

/** One alternative for each value that an `int` argument may have. */
function isOneOf(argument: number, values: readonly number[]): ArgumentCondition[][] {
  return values.map((equal) => [{ argument, equal, bits: 32 }]);
}

/** One argument with only these bits of a mask set. */
function hasBits(argument: number, mask: number, equal: number): ArgumentCondition {
  return { argument, mask, equal, bits: 32 };
}

/**
 * What the threads of a supervisor's isolate may do, seen with Deno 2.9 and glibc 2.36. Anything else kills the process:
 * to execute programs, trace, mount, load modules, make other namespaces, and so on.
 *
 * @param pid Number of the process
 * @returns The policy
 */
export function isolatePolicy(pid: number): SeccompPolicy {
  // Linux 6.1 include/uapi/linux/sched.h: CLONE_THREAD, and CLONE_NEW* of namespaces.
  const [thread, namespaces] = [0x0001_0000, 0x7e02_0080];
  // Linux 6.1 include/uapi/asm-generic/fcntl.h.
  const [writeOnly, readWrite, truncate] = [0o1, 0o2, 0o1000];
  return {
    otherwise: "kill",
    // What Linux 6.1 says to them, so that libraries do without.
    newer: { errno: ENOSYS },
    rules: [
      // Memory. The compiler of JavaScript makes executable pages all the time.
      {
        calls: [
          "mmap",
          "munmap",
          "mprotect",
          "pkey_mprotect",
          "mremap",
          "madvise",
          "mincore",
          "msync",
          "brk",
        ],
      },
      // Threads, but no processes. The flags of clone3 are out of sight, and the C library does without it.
      { calls: ["clone"], when: [[hasBits(0, thread | namespaces, thread)]] },
      { calls: ["clone3"], action: { errno: ENOSYS } },
      { calls: ["futex", "set_robust_list", "rseq", "sched_yield", "sched_getaffinity", "membarrier"] },
      { calls: ["getcpu", "sched_getparam", "sched_getscheduler", "gettid", "exit", "exit_group"] },
      // PR_SET_NAME, PR_GET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_VMA; filters on top of this one (SECCOMP_SET_MODE_FILTER).
      { calls: ["prctl"], when: isOneOf(0, [15, 16, 38, 0x5356_4d41]) },
      { calls: ["seccomp"], when: [[hasBits(0, 0xffff_ffff, 1), hasBits(1, 0xffff_ffff, 0)]] },
      // Signals, to this process.
      { calls: ["kill", "tgkill"], when: isOneOf(0, [pid]) },
      { calls: ["rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall"] },
      // Time.
      { calls: ["clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday"] },
      { calls: ["timerfd_create", "timerfd_settime", "timerfd_gettime"] },
      // Waiting.
      { calls: ["epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll"] },
      { calls: ["eventfd2", "pipe2"] },
      // Files. Truncation by a descriptor to read, which Landlock overlooks before its version 3, is not to be had.
      {
        calls: ["openat"],
        when: [[hasBits(2, truncate, 0)], [hasBits(2, writeOnly, writeOnly)], [
          hasBits(2, readWrite, readWrite),
        ]],
      },
      { calls: ["close", "read", "write", "readv", "writev", "pread64", "pwrite64", "lseek"] },
      { calls: ["preadv", "pwritev", "preadv2", "pwritev2", "sendfile", "splice", "copy_file_range"] },
      { calls: ["fsync", "fdatasync", "sync_file_range", "fallocate", "fadvise64", "ftruncate", "flock"] },
      {
        calls: ["stat", "lstat", "fstat", "newfstatat", "statx", "statfs", "fstatfs", "utimensat", "fchmod"],
      },
      { calls: ["access", "faccessat", "faccessat2", "getcwd", "umask", "getdents64"] },
      { calls: ["readlink", "readlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir"] },
      { calls: ["unlink", "unlinkat", "link", "linkat", "symlink", "symlinkat", "dup", "dup2", "dup3"] },
      { calls: ["memfd_create", "io_uring_enter"] },
      // Landlock has no say in these.
      { calls: ["chmod", "fchmodat", "chown", "lchown", "fchown", "fchownat"], action: { errno: EPERM } },
      // All but those that let the kernel send signals to others: duplicates, flags, locks, sizes of pipes, seals.
      {
        calls: ["fcntl"],
        when: isOneOf(1, [0, 1030, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1031, 1032, 1033, 1034]),
      },
      // KVM, vhost, taps; TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX; BLKGETSIZE64, BLKSSZGET, BLKDISCARD, BLKZEROOUT.
      {
        calls: ["ioctl"],
        when: isOneOf(1, [
          ...new Set<number>([...Object.values(KVM), ...Object.values(VHOST)]),
          ...[TUN.SETIFF, TUN.SETOFFLOAD, TUN.SETVNETHDRSZ],
          ...[0x5401, 0x5413, 0x541b, 0x5421, 0x5451, 0x8008_1272, 0x1268, 0x1277, 0x127f],
        ]),
      },
      { calls: ["ioctl"], action: { errno: ENOTTY } },
      // AF_UNIX, AF_INET, AF_INET6; AF_NETLINK with NETLINK_ROUTE, for the addresses of interfaces.
      {
        calls: ["socket"],
        when: [...isOneOf(0, [1, 2, 10]), [hasBits(0, 0xffff_ffff, 16), hasBits(2, 0xffff_ffff, 0)]],
      },
      { calls: ["socketpair"], when: isOneOf(0, [1]) },
      { calls: ["bind", "listen", "accept", "accept4", "connect", "shutdown", "getsockname", "getpeername"] },
      {
        calls: [
          "getsockopt",
          "setsockopt",
          "sendto",
          "recvfrom",
          "sendmsg",
          "recvmsg",
          "sendmmsg",
          "recvmmsg",
        ],
      },
      // Facts. Limits are read, not set.
      { calls: ["getpid", "getppid", "getuid", "geteuid", "getgid", "getegid", "uname", "sysinfo"] },
      { calls: ["getrusage", "getrlimit", "getrandom"] },
      { calls: ["prlimit64"], when: [[hasBits(0, 0xffff_ffff, 0), { argument: 2, equal: 0 }]] },
    ],
  };
}

/** Says in words what was thrown. */
function reasonOf(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown);
}

/**
 * Finds the folder of the cgroup of version 2 to make cgroups in: the first of all for root, as a session's own cgroup holds
 * processes and so can hand no controllers down; this process's own for others.
 */
function parentCgroup(): string | undefined {
  const path = /^0::(.*)$/m.exec(Deno.readTextFileSync("/proc/self/cgroup"))?.[1];
  // proc(5): the fourth field is the root of the mount, the fifth its place, the type comes after " - ".
  for (const line of Deno.readTextFileSync("/proc/self/mountinfo").split("\n")) {
    const [, , , root, place] = line.split(" ");
    if (path === undefined || !/ - cgroup2 /.test(line) || root === undefined || place === undefined) {
      continue;
    }
    if (Deno.uid() === 0) return place;
    if (root === "/" || path === root || path.startsWith(`${root}/`)) {
      return join(place, root === "/" ? path : path.slice(root.length));
    }
  }
  return undefined;
}

/**
 * Moves this process into a new cgroup of version 2 with limits, which outlives it.
 *
 * @param limits The limits
 * @param parent Folder of the cgroup to make it in; unless told the first of all for root, and that of this process for
 * others
 * @returns Which limits are in place, and why others are not
 */
export function limitCgroup(limits: CgroupLimits, parent: string | undefined = parentCgroup()): SandboxLayer {
  if (parent === undefined) return { applied: false, detail: "no cgroup of version 2 is mounted" };
  const folder = join(parent, limits.name);
  try {
    Deno.mkdirSync(folder);
  } catch (error) {
    if (!(error instanceof Deno.errors.AlreadyExists)) {
      return { applied: false, detail: `no cgroup can be made in ${parent}: ${reasonOf(error)}` };
    }
  }
  const { memoryMax, pidsMax, cpuMax } = limits;
  const wanted: [controller: string, value: string][] = [];
  if (memoryMax !== undefined) wanted.push(["memory", String(memoryMax)]);
  if (pidsMax !== undefined) wanted.push(["pids", String(pidsMax)]);
  // Microseconds of each tenth of a second (Linux 6.1 Documentation/admin-guide/cgroup-v2.rst).
  if (cpuMax !== undefined) wanted.push(["cpu", `${Math.round(cpuMax * 100_000)} 100000`]);
  const done: string[] = [];
  const failed: string[] = [];
  try {
    // Before controllers are enabled: a cgroup that hands them down must have no processes of its own.
    Deno.writeTextFileSync(join(folder, "cgroup.procs"), String(Deno.pid));
    for (const [controller, value] of wanted) {
      try {
        const enabled = Deno.readTextFileSync(join(folder, "cgroup.controllers")).trim().split(" ");
        if (!enabled.includes(controller)) {
          Deno.writeTextFileSync(join(parent, "cgroup.subtree_control"), `+${controller}`);
        }
        Deno.writeTextFileSync(join(folder, `${controller}.max`), value, { create: false });
        done.push(`${controller}.max ${value}`);
      } catch (error) {
        const reason = isBusy(error)
          ? "other processes are in that cgroup, too: start this one in a cgroup of its own"
          : reasonOf(error);
        failed.push(`${controller} (${reason})`);
      }
    }
  } catch (error) {
    failed.push(reasonOf(error));
  }
  if (done.length > 0) {
    const but = failed.length > 0 ? `; not limited: ${failed.join(", ")}` : "";
    return { applied: true, detail: `${folder}: ${done.join(", ")}${but}`, folder };
  }
  try {
    Deno.writeTextFileSync(join(parent, "cgroup.procs"), String(Deno.pid));
    Deno.removeSync(folder);
  } catch {
    // An empty cgroup limits nothing and costs nothing.
  }
  return { applied: false, detail: `no limit could be set in ${parent}: ${failed.join(", ")}` };
}

let isEntered = false;

/**
 * Enters the sandbox, with all threads, for good. Call it before the first vCPU thread is started, when every module is
 * loaded: those that come later cannot be read. Files, devices and rings of io_uring that are open stay usable. To set
 * modes and owners of files afterwards is refused: use `Deno.umask` before.
 *
 * @param options What to keep
 * @returns What is in place; what the kernel does not have is told, not thrown
 * @throws {SysError} If the kernel refuses what it has
 * @throws {Error} If the process is in it already
 */
export function enterSandbox(options: SandboxOptions): SandboxReport {
  if (isEntered) throw new Error("Cannot enter the sandbox twice: it stays as it is until the process ends");
  const cgroup = options.cgroup
    ? limitCgroup(options.cgroup)
    : { applied: false, detail: "no limits were asked for" };
  setNoNewPrivileges();
  // Before capabilities go: places may need them to be found.
  const files = restrictFiles({
    readOnly: [...READ_ONLY, ...options.readOnly ?? []],
    readWrite: [options.folder, "/dev/null", ...options.readWrite ?? []],
  });
  isEntered = true;
  const kept = options.keepCapabilities ?? [];
  const threads = dropCapabilities(kept);
  const policy = isolatePolicy(Deno.pid);
  const program = compileFilter({
    ...policy,
    otherwise: options.logOnly ? "log" : policy.otherwise,
    rules: [...options.allow ?? [], ...policy.rules],
  });
  installFilter(program, { allThreads: true });
  return {
    cgroup,
    noNewPrivileges: { applied: true, detail: "no program that is executed gains privileges" },
    landlock: {
      applied: files.applied,
      detail: files.applied
        ? `only files below ${options.folder} and ${
          (options.readWrite ?? []).length
        } more places can be written ` +
          `(version ${files.version}${
            files.open.length > 0 ? `, which by itself leaves open: ${files.open.join(", ")}` : ""
          })`
        : "the kernel has no Landlock, or was started without it (see lsm= on its command line)",
    },
    capabilities: {
      applied: true,
      detail: `${kept.length === 0 ? "none" : kept.join(", ")} on ${threads.length} threads`,
    },
    seccomp: {
      applied: !options.logOnly,
      detail: options.logOnly
        ? "forbidden system calls are only written to the kernel's log"
        : `other system calls kill the process (${program.length / 8} instructions)`,
    },
  };
}

/**
 * Enters the sandbox on systems that it is made for, and tells what became of it.
 *
 * @param options What is kept
 * @param log Takes what is in place, and what is not
 * @returns What it consists of; undefined where there is none
 */
export function enterSandboxIfKnown(
  options: SandboxOptions,
  log: Pick<Log, "info" | "warn">,
): SandboxReport | undefined {
  if (!isKnownSystem()) {
    log.warn("there is no sandbox, as it is made for Linux on x86-64: the process keeps the user's rights");
    return undefined;
  }
  const report = enterSandbox(options);
  for (const [name, { applied, detail }] of Object.entries(report) as [string, SandboxLayer][]) {
    if (applied) log.info(`sandbox, ${name}: ${detail}`);
    else if (name !== "cgroup" || options.cgroup) log.warn(`sandbox without ${name}: ${detail}`);
  }
  return report;
}
