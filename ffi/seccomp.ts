/**
 * Filters of system calls: policies as data, assembled to classic BPF programs for x86-64 (Linux 6.1
 * `include/uapi/linux/seccomp.h`, `include/uapi/linux/filter.h`, `Documentation/userspace-api/seccomp_filter.rst`).
 *
 * @module
 */

import { Mapping } from "./fd.ts";
import { KVM } from "./kvm.ts";
import { check, libc } from "./libc.ts";

/** Numbers of x86-64 system calls by name (Linux 6.1 `arch/x86/entry/syscalls/syscall_64.tbl`). */
export const SYSCALL = {
  read: 0,
  write: 1,
  open: 2,
  close: 3,
  stat: 4,
  fstat: 5,
  lstat: 6,
  poll: 7,
  lseek: 8,
  mmap: 9,
  mprotect: 10,
  munmap: 11,
  brk: 12,
  rt_sigaction: 13,
  rt_sigprocmask: 14,
  rt_sigreturn: 15,
  ioctl: 16,
  pread64: 17,
  pwrite64: 18,
  readv: 19,
  writev: 20,
  access: 21,
  pipe: 22,
  select: 23,
  sched_yield: 24,
  mremap: 25,
  msync: 26,
  mincore: 27,
  madvise: 28,
  dup: 32,
  dup2: 33,
  nanosleep: 35,
  getitimer: 36,
  getpid: 39,
  sendfile: 40,
  socket: 41,
  connect: 42,
  accept: 43,
  sendto: 44,
  recvfrom: 45,
  sendmsg: 46,
  recvmsg: 47,
  shutdown: 48,
  bind: 49,
  listen: 50,
  getsockname: 51,
  getpeername: 52,
  socketpair: 53,
  setsockopt: 54,
  getsockopt: 55,
  clone: 56,
  fork: 57,
  vfork: 58,
  execve: 59,
  exit: 60,
  wait4: 61,
  kill: 62,
  uname: 63,
  fcntl: 72,
  flock: 73,
  fsync: 74,
  fdatasync: 75,
  truncate: 76,
  ftruncate: 77,
  getcwd: 79,
  rename: 82,
  mkdir: 83,
  rmdir: 84,
  link: 86,
  unlink: 87,
  symlink: 88,
  readlink: 89,
  chmod: 90,
  fchmod: 91,
  chown: 92,
  fchown: 93,
  lchown: 94,
  umask: 95,
  gettimeofday: 96,
  getrlimit: 97,
  getrusage: 98,
  sysinfo: 99,
  ptrace: 101,
  getuid: 102,
  getgid: 104,
  geteuid: 107,
  getegid: 108,
  getppid: 110,
  capget: 125,
  capset: 126,
  sigaltstack: 131,
  utime: 132,
  statfs: 137,
  fstatfs: 138,
  sched_getparam: 143,
  sched_getscheduler: 145,
  prctl: 157,
  arch_prctl: 158,
  mount: 165,
  umount2: 166,
  reboot: 169,
  init_module: 175,
  gettid: 186,
  fgetxattr: 193,
  futex: 202,
  sched_setaffinity: 203,
  sched_getaffinity: 204,
  io_setup: 206,
  getdents64: 217,
  restart_syscall: 219,
  fadvise64: 221,
  clock_gettime: 228,
  clock_getres: 229,
  clock_nanosleep: 230,
  exit_group: 231,
  epoll_wait: 232,
  epoll_ctl: 233,
  tgkill: 234,
  add_key: 248,
  keyctl: 250,
  inotify_add_watch: 254,
  inotify_rm_watch: 255,
  openat: 257,
  mkdirat: 258,
  fchownat: 260,
  newfstatat: 262,
  unlinkat: 263,
  renameat: 264,
  linkat: 265,
  symlinkat: 266,
  readlinkat: 267,
  fchmodat: 268,
  faccessat: 269,
  pselect6: 270,
  ppoll: 271,
  unshare: 272,
  set_robust_list: 273,
  get_robust_list: 274,
  splice: 275,
  sync_file_range: 277,
  utimensat: 280,
  epoll_pwait: 281,
  timerfd_create: 283,
  fallocate: 285,
  timerfd_settime: 286,
  timerfd_gettime: 287,
  accept4: 288,
  signalfd4: 289,
  eventfd2: 290,
  epoll_create1: 291,
  dup3: 292,
  pipe2: 293,
  inotify_init1: 294,
  preadv: 295,
  pwritev: 296,
  perf_event_open: 298,
  recvmmsg: 299,
  prlimit64: 302,
  sendmmsg: 307,
  setns: 308,
  getcpu: 309,
  process_vm_readv: 310,
  finit_module: 313,
  sched_setattr: 314,
  sched_getattr: 315,
  renameat2: 316,
  seccomp: 317,
  getrandom: 318,
  memfd_create: 319,
  bpf: 321,
  execveat: 322,
  userfaultfd: 323,
  membarrier: 324,
  copy_file_range: 326,
  preadv2: 327,
  pwritev2: 328,
  pkey_mprotect: 329,
  pkey_alloc: 330,
  pkey_free: 331,
  statx: 332,
  rseq: 334,
  pidfd_send_signal: 424,
  io_uring_setup: 425,
  io_uring_enter: 426,
  io_uring_register: 427,
  pidfd_open: 434,
  clone3: 435,
  close_range: 436,
  openat2: 437,
  pidfd_getfd: 438,
  faccessat2: 439,
  epoll_pwait2: 441,
  landlock_create_ruleset: 444,
  landlock_add_rule: 445,
  landlock_restrict_self: 446,
} as const;

/** Name of a system call. */
export type SyscallName = keyof typeof SYSCALL;

/**
 * What becomes of a call: it is made; the whole process is killed by SIGSYS; it is made and written to the kernel's log; or
 * it fails with an error number.
 */
export type FilterAction = "allow" | "kill" | "log" | { readonly errno: number };

/** What an argument must be. */
export interface ArgumentCondition {
  /** Which argument, from 0 to 5. */
  readonly argument: number;
  /** Its value, after the mask. */
  readonly equal: number | bigint;
  /** The bits that are compared; all unless told. */
  readonly mask?: number | bigint;
  /** Width of the argument's type in C; 64 unless told. The kernel ignores what is above an `int`, and so must a filter. */
  readonly bits?: 32 | 64;
}

/** What becomes of some calls. */
export interface SyscallRule {
  /** The calls. */
  readonly calls: readonly SyscallName[];
  /** Alternatives, each of conditions that must all hold; always unless told. */
  readonly when?: readonly (readonly ArgumentCondition[])[];
  /** What then becomes of them; they are allowed unless told. */
  readonly action?: FilterAction;
}

/** What becomes of every call: the first rule that matches decides. */
export interface SeccompPolicy {
  /** What becomes of a call that no rule matches. */
  readonly otherwise: FilterAction;
  /** What becomes of calls that are newer than Linux 6.1, which no rule can name; what `otherwise` says unless told. */
  readonly newer?: FilterAction;
  /** The rules. */
  readonly rules: readonly SyscallRule[];
}

/** Size of `struct sock_filter`, one instruction, in bytes: code, jump if true, jump if false, constant. */
const INSTRUCTION_SIZE = 8;
/** `BPF_MAXINSNS` (Linux 6.1 `include/uapi/linux/bpf_common.h`). */
const MAX_INSTRUCTIONS = 4096;
/** Codes of instructions (Linux 6.1 `include/uapi/linux/bpf_common.h`). */
const BPF = { LOAD: 0x20, AND: 0x54, JUMP: 0x05, IF_EQUAL: 0x15, IF_AT_LEAST: 0x35, RETURN: 0x06 } as const;
/** `struct seccomp_data`: number, architecture, instruction pointer, six arguments. */
const DATA = { number: 0, arch: 4, arguments: 16 } as const;
/** `AUDIT_ARCH_X86_64` (Linux 6.1 `include/uapi/linux/audit.h`). */
const ARCH_X86_64 = 0xc000_003e;
/** `__X32_SYSCALL_BIT` (Linux 6.1 `arch/x86/include/uapi/asm/unistd.h`). */
const X32_BIT = 0x4000_0000;
/** The first number after those of Linux 6.1. */
const FIRST_NEWER = 451;
const SECCOMP_SET_MODE_FILTER = 1;
const SECCOMP_FILTER_FLAG_TSYNC = 1;
/** Size of `struct sock_fprog`: count of instructions (u16), their address at 8. */
const PROGRAM_SIZE = 16;

/** `SECCOMP_RET_*`; that of an error number is 0x50000 with the number. */
const RETURNS = { allow: 0x7fff_0000, kill: 0x8000_0000, log: 0x7ffc_0000 } as const;

type Instruction = readonly [code: number, ifTrue: number, ifFalse: number, constant: number];

function returnOf(action: FilterAction): Instruction {
  return [BPF.RETURN, 0, 0, typeof action === "string" ? RETURNS[action] : 0x0005_0000 | action.errno];
}

/** Loads and compares one half of an argument. Where to go if it differs is not known yet. */
function compareHalf(offset: number, equal: number, mask: number): Instruction[] {
  if (mask === 0) return [];
  const load: Instruction[] = [[BPF.LOAD, 0, 0, offset]];
  if (mask !== 0xffff_ffff) load.push([BPF.AND, 0, 0, mask]);
  return [...load, [BPF.IF_EQUAL, 0, 0, equal]];
}

function compareArgument(condition: ArgumentCondition): Instruction[] {
  const { argument, bits = 64 } = condition;
  const all = (1n << BigInt(bits)) - 1n;
  const equal = BigInt(condition.equal);
  const mask = BigInt(condition.mask ?? all);
  if (
    !(argument >= 0 && argument < 6 && Number.isInteger(argument)) || mask < 0n || mask > all ||
    (equal & ~mask) !== 0n
  ) {
    throw new RangeError(
      `Cannot compare argument ${argument} of ${bits} bits with ${equal} under the mask ${mask}: the value must fit`,
    );
  }
  const offset = DATA.arguments + 8 * argument;
  const half = (value: bigint, index: bigint) => Number(value >> (32n * index) & 0xffff_ffffn);
  return [0n, 1n].flatMap((index) =>
    compareHalf(offset + 4 * Number(index), half(equal, index), half(mask, index))
  );
}

/** Decides one call: falls off the end where no alternative matches. */
function ruleCode({ when = [[]], action = "allow" }: SyscallRule): Instruction[] {
  return when.flatMap((conditions) => {
    const code = [...conditions.flatMap(compareArgument), returnOf(action)];
    if (code.length > 255) throw new RangeError("Cannot assemble an alternative of so many conditions");
    return code.map((instruction, index): Instruction =>
      instruction[0] === BPF.IF_EQUAL
        ? [BPF.IF_EQUAL, 0, code.length - 1 - index, instruction[3]]
        : instruction
    );
  });
}

/**
 * Assembles a policy: a binary search for the number of the call, then its rules. Calls that are allowed whatever their
 * arguments cost no run of the filter at all since Linux 5.11, which finds them when it is installed.
 *
 * @param policy The policy
 * @returns The program, an array of `struct sock_filter`
 * @throws {RangeError} If it is too long, or a condition cannot hold
 */
export function compileFilter(policy: SeccompPolicy): Uint8Array<ArrayBuffer> {
  const otherwise = returnOf(policy.otherwise);
  const blocks = new Map<number, Instruction[]>();
  for (const rule of policy.rules) {
    const code = ruleCode(rule);
    for (const name of rule.calls) {
      const block = blocks.get(SYSCALL[name]) ?? [];
      block.push(...code);
      blocks.set(SYSCALL[name], block);
    }
  }
  const sorted = [...blocks].sort(([a], [b]) => a - b);
  const search = (from: number, to: number): Instruction[] => {
    if (from === to) return [otherwise];
    if (to - from === 1) {
      const [number, block] = sorted[from]!;
      return [[BPF.IF_EQUAL, 1, 0, number], otherwise, ...block, otherwise];
    }
    const middle = (from + to) >> 1;
    const low = search(from, middle);
    const pivot = sorted[middle]![0];
    // Conditional jumps reach 255 instructions; the other kind reaches any.
    const jump: Instruction[] = low.length <= 255
      ? [[BPF.IF_AT_LEAST, low.length, 0, pivot]]
      : [[BPF.IF_AT_LEAST, 0, 1, pivot], [BPF.JUMP, 0, 0, low.length]];
    return [...jump, ...low, ...search(middle, to)];
  };
  const program: Instruction[] = [
    [BPF.LOAD, 0, 0, DATA.arch],
    [BPF.IF_EQUAL, 1, 0, ARCH_X86_64],
    returnOf("kill"),
    [BPF.LOAD, 0, 0, DATA.number],
    [BPF.IF_AT_LEAST, 0, 1, X32_BIT],
    returnOf("kill"),
    [BPF.IF_AT_LEAST, 0, 1, FIRST_NEWER],
    returnOf(policy.newer ?? policy.otherwise),
    ...search(0, sorted.length),
  ];
  if (program.length > MAX_INSTRUCTIONS) {
    throw new RangeError(
      `Cannot assemble a filter of ${program.length} instructions: ${MAX_INSTRUCTIONS} are the most`,
    );
  }
  const bytes = new Uint8Array(program.length * INSTRUCTION_SIZE);
  const view = new DataView(bytes.buffer);
  for (const [index, [code, ifTrue, ifFalse, constant]] of program.entries()) {
    const at = index * INSTRUCTION_SIZE;
    view.setUint16(at, code, true);
    view.setUint8(at + 2, ifTrue);
    view.setUint8(at + 3, ifFalse);
    view.setUint32(at + 4, constant, true);
  }
  return bytes;
}

/**
 * Counts the bytes that {@linkcode writeFilter} needs.
 *
 * @param program The program
 * @returns The count
 */
export function filterSize(program: Uint8Array): number {
  return PROGRAM_SIZE + program.length;
}

/**
 * Writes a program into memory as `seccomp(SECCOMP_SET_MODE_FILTER)` wants it: `struct sock_fprog`, then the instructions.
 *
 * @param memory The memory, which must stay mapped until the filter is installed
 * @param offset Where it begins, a multiple of 8
 * @param program The program
 * @returns Address of the `struct sock_fprog`
 */
export function writeFilter(memory: Mapping, offset: number, program: Uint8Array): bigint {
  if (offset % 8 !== 0 || offset < 0 || offset + filterSize(program) > memory.length) {
    throw new RangeError(
      `Cannot write a filter of ${filterSize(program)} bytes at byte ${offset} of ${memory.length}`,
    );
  }
  const view = new DataView(memory.buffer, offset);
  view.setBigUint64(0, BigInt(program.length / INSTRUCTION_SIZE), true);
  view.setBigUint64(8, memory.address + BigInt(offset + PROGRAM_SIZE), true);
  new Uint8Array(memory.buffer).set(program, offset + PROGRAM_SIZE);
  return memory.address + BigInt(offset);
}

/**
 * Installs a filter, for good, on this thread and those that it starts. `no_new_privs` must be set, or the process be
 * privileged.
 *
 * @param program The program
 * @param options Whether all threads of the process get it, which all must have the filters that this one has
 * @throws {SysError} If the kernel refuses
 */
export function installFilter(program: Uint8Array, options: { readonly allThreads: boolean }): void {
  using memory = new Mapping(Math.ceil(filterSize(program) / 4096) * 4096);
  const address = writeFilter(memory, 0, program);
  const flags = options.allThreads ? SECCOMP_FILTER_FLAG_TSYNC : 0;
  const result = check(
    libc().seccomp(BigInt(SYSCALL.seccomp), SECCOMP_SET_MODE_FILTER, flags, address),
    "seccomp(SECCOMP_SET_MODE_FILTER)",
  );
  // With TSYNC the kernel names a thread that could not be brought in line.
  if (result > 0) {
    throw new Error(`Cannot install a filter on all threads as thread ${result} has filters of its own`);
  }
}

/**
 * What a vCPU thread may do: run its vCPU, signal an eventfd, wait for the word to go on, take a kick, and end. The rest of
 * its end is glibc's (seen with 2.36). Anything else kills the process.
 */
export const VCPU_THREAD_POLICY: SeccompPolicy = {
  otherwise: "kill",
  rules: [
    { calls: ["ioctl"], when: [[{ argument: 1, equal: KVM.RUN, bits: 32 }]] },
    // The eight bytes of an eventfd's count.
    { calls: ["write"], when: [[{ argument: 2, equal: 8 }]] },
    { calls: ["futex", "gettid", "restart_syscall", "rt_sigreturn"] },
    // MADV_DONTNEED, on the stack of a thread that ends.
    { calls: ["madvise"], when: [[{ argument: 2, equal: 4, bits: 32 }]] },
    { calls: ["rt_sigprocmask", "exit"] },
  ],
};
