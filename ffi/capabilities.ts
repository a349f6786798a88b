/**
 * Capabilities of this process (Linux 6.1 `include/uapi/linux/capability.h`; capabilities(7)).
 *
 * @module
 */

import { listThreads, runOnAllThreads, type ThreadCall } from "./all_threads.ts";
import { Mapping } from "./fd.ts";
import { SYSCALL } from "./seccomp.ts";

/** Numbers of capabilities by name. */
export const CAPABILITY = {
  CHOWN: 0,
  DAC_OVERRIDE: 1,
  DAC_READ_SEARCH: 2,
  FOWNER: 3,
  FSETID: 4,
  KILL: 5,
  SETGID: 6,
  SETUID: 7,
  SETPCAP: 8,
  LINUX_IMMUTABLE: 9,
  NET_BIND_SERVICE: 10,
  NET_BROADCAST: 11,
  NET_ADMIN: 12,
  NET_RAW: 13,
  IPC_LOCK: 14,
  IPC_OWNER: 15,
  SYS_MODULE: 16,
  SYS_RAWIO: 17,
  SYS_CHROOT: 18,
  SYS_PTRACE: 19,
  SYS_PACCT: 20,
  SYS_ADMIN: 21,
  SYS_BOOT: 22,
  SYS_NICE: 23,
  SYS_RESOURCE: 24,
  SYS_TIME: 25,
  SYS_TTY_CONFIG: 26,
  MKNOD: 27,
  LEASE: 28,
  AUDIT_WRITE: 29,
  AUDIT_CONTROL: 30,
  SETFCAP: 31,
  MAC_OVERRIDE: 32,
  MAC_ADMIN: 33,
  SYSLOG: 34,
  WAKE_ALARM: 35,
  BLOCK_SUSPEND: 36,
  AUDIT_READ: 37,
  PERFMON: 38,
  BPF: 39,
  CHECKPOINT_RESTORE: 40,
} as const;

/** Name of a capability, without `CAP_`. */
export type CapabilityName = keyof typeof CAPABILITY;

/** `PR_SET_NO_NEW_PRIVS`, `PR_CAPBSET_DROP`, `PR_CAP_AMBIENT` (Linux 6.1 `include/uapi/linux/prctl.h`). */
const PR_SET_NO_NEW_PRIVS = 38;
const PR_CAPBSET_DROP = 24;
const PR_CAP_AMBIENT = 47;
const PR_CAP_AMBIENT_CLEAR_ALL = 4;
/** `_LINUX_CAPABILITY_VERSION_3`. */
const VERSION_3 = 0x2008_0522;
const EPERM = 1;
const EINVAL = 22;

/** Sets of capabilities of a thread, as bits. */
export interface CapabilitySets {
  /** Number of the thread. */
  readonly thread: number;
  /** What it may do now. */
  readonly effective: bigint;
  /** What it may enable. */
  readonly permitted: bigint;
  /** What programs that it executes may gain. */
  readonly bounding: bigint;
}

/**
 * Reads the capabilities of each thread of this process from `/proc`.
 *
 * @returns Their sets
 */
export function threadCapabilities(): CapabilitySets[] {
  const found: CapabilitySets[] = [];
  for (const thread of listThreads().values()) {
    let text: string;
    try {
      text = Deno.readTextFileSync(`/proc/self/task/${thread}/status`);
    } catch {
      continue; // It ended meanwhile.
    }
    const bits = (field: string) => BigInt(`0x${new RegExp(`^${field}:\\s*(\\w+)`, "m").exec(text)![1]}`);
    found.push({
      thread,
      effective: bits("CapEff"),
      permitted: bits("CapPrm"),
      bounding: bits("CapBnd"),
    });
  }
  return found;
}

/**
 * Keeps this process, all its threads, from gaining privileges by executing programs, for good. Filters of system calls
 * and Landlock want it from those who are not privileged.
 *
 * @throws {SysError} If the kernel refuses
 */
export function setNoNewPrivileges(): void {
  runOnAllThreads([{
    name: "prctl(PR_SET_NO_NEW_PRIVS)",
    number: SYSCALL.prctl,
    arguments: [PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0],
  }]);
}

/**
 * Gives up capabilities on all threads, for good: the effective, permitted, inheritable, ambient and bounding sets. Where
 * this process may not change its bounding set, that one stays; `no_new_privs` makes it meaningless.
 *
 * @param keep Those to keep, where this process has them
 * @returns What the threads have now
 * @throws {Error} If a thread has others still
 */
export function dropCapabilities(keep: readonly CapabilityName[] = []): CapabilitySets[] {
  const unknown = keep.find((name) => !Object.hasOwn(CAPABILITY, name));
  if (unknown !== undefined) {
    throw new RangeError(
      `Cannot keep the capability "${unknown}" as Linux has none of that name: see capabilities(7), without "CAP_"`,
    );
  }
  const kept = keep.reduce((bits, name) => bits | 1n << BigInt(CAPABILITY[name]), 0n);
  const own = threadCapabilities().find(({ thread }) => thread === Deno.pid)!;
  const left = own.permitted & kept;
  // struct __user_cap_header_struct, then two of struct __user_cap_data_struct: effective, permitted, inheritable.
  using memory = new Mapping(4096);
  const words = new Uint32Array(memory.buffer);
  words[0] = VERSION_3;
  for (const half of [0, 1]) {
    const bits = Number(left >> BigInt(32 * half) & 0xffff_ffffn);
    words.set([bits, bits, 0], 4 + 3 * half);
  }
  const calls: ThreadCall[] = [];
  for (let capability = 0; capability < 64 && own.bounding >> BigInt(capability) > 0n; capability++) {
    const bit = 1n << BigInt(capability);
    if ((own.bounding & bit & ~kept) === 0n) continue;
    calls.push({
      name: `prctl(PR_CAPBSET_DROP, ${capability})`,
      number: SYSCALL.prctl,
      arguments: [PR_CAPBSET_DROP, capability, 0, 0, 0],
      tolerated: [EPERM],
    });
  }
  calls.push({
    name: "prctl(PR_CAP_AMBIENT_CLEAR_ALL)",
    number: SYSCALL.prctl,
    arguments: [PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0],
    tolerated: [EINVAL],
  }, { name: "capset()", number: SYSCALL.capset, arguments: [memory.address, memory.address + 16n] });
  runOnAllThreads(calls);
  const now = threadCapabilities();
  for (const { thread, effective, permitted } of now) {
    if ((effective | permitted) & ~kept) {
      throw new Error(
        `Cannot give up the capabilities of thread ${thread}: it has 0x${permitted.toString(16)} still`,
      );
    }
  }
  return now;
}
