/**
 * System calls on every thread of this process. Privileges, Landlock domains and `no_new_privs` belong to threads on
 * Linux, and Deno has several of them before the first line of a program runs.
 *
 * @module
 */

import { Mapping, PROT_EXEC, PROT_READ } from "./fd.ts";
import { check, errno, libc, sysError } from "./libc.ts";

/** Signal whose handler makes the calls: a real-time one, next to that of the vCPU threads. */
export const ALL_THREADS_SIGNAL = 41;

/** `ESRCH` (Linux 6.1 `include/uapi/asm-generic/errno-base.h`). */
const ESRCH = 3;
/** Numbers of x86-64 system calls (Linux 6.1 `arch/x86/entry/syscalls/syscall_64.tbl`). */
const SYS_GETTID = 186;
const SYS_TGKILL = 234n;
/** `SA_RESTART` (Linux 6.1 `include/uapi/asm-generic/signal-defs.h`). */
const SA_RESTART = 0x1000_0000;
/**
 * `PF_KTHREAD`, `PF_USER_WORKER`, `PF_IO_WORKER` (Linux 6.4 `include/linux/sched.h`): threads of the kernel among those of
 * the process, such as workers of io_uring and vhost. They run no code of ours and take no signals.
 */
const KERNEL_THREAD = 0x0020_0000 | 0x4000 | 0x10;
/** How long threads may take to answer, in milliseconds; one that sleeps in the kernel for longer is stuck. */
const TIMEOUT = 10_000;

/** The table that handlers and this module share: counters, calls, and one slot of results for each thread. */
const CALLS = 64;
const CALL_SIZE = 64;
const MAX_CALLS = 63;
const SLOTS = 4096;
const SLOT_SIZE = 512;
const MAX_THREADS = 512;
const TABLE = { next: 0, count: 8 } as const;

/** One system call to make on every thread. */
export interface ThreadCall {
  /** What it is, for messages, such as `prctl(PR_SET_NO_NEW_PRIVS)`. */
  readonly name: string;
  /** Its number. */
  readonly number: number;
  /** Its arguments, six at most. Addresses must stay valid until it returns. */
  readonly arguments?: readonly (number | bigint)[];
  /** Error numbers that count as success. */
  readonly tolerated?: readonly number[];
}

/** What the calls returned on one thread. */
export interface ThreadResult {
  /** Number of the thread. */
  readonly thread: number;
  /** What each call returned: a negative error number where it failed. */
  readonly results: readonly number[];
}

/** Signal handler in System V AMD64 code. The kernel saves and restores what the interrupted code had in registers. */
function handlerCode(table: bigint): Uint8Array {
  const address = new Uint8Array(new BigUint64Array([table]).buffer);
  const immediate = (value: number) => new Uint8Array(new Uint32Array([value]).buffer);
  const call = [
    ...[0x49, 0x8b, 0x45, 0x00], //       mov rax, [r13]
    ...[0x49, 0x8b, 0x7d, 0x08], //       mov rdi, [r13+8]
    ...[0x49, 0x8b, 0x75, 0x10], //       mov rsi, [r13+16]
    ...[0x49, 0x8b, 0x55, 0x18], //       mov rdx, [r13+24]
    ...[0x4d, 0x8b, 0x55, 0x20], //       mov r10, [r13+32]
    ...[0x4d, 0x8b, 0x45, 0x28], //       mov r8, [r13+40]
    ...[0x4d, 0x8b, 0x4d, 0x30], //       mov r9, [r13+48]
    ...[0x0f, 0x05], //                   syscall
    ...[0x49, 0x89, 0x04, 0x24], //       mov [r12], rax
    ...[0x49, 0x83, 0xc4, 0x08], //       add r12, 8
    ...[0x49, 0x83, 0xc5, CALL_SIZE], //  add r13, CALL_SIZE
    ...[0x41, 0xff, 0xce], //             dec r14d
  ];
  const loop = [
    ...[0x45, 0x85, 0xf6], //                         test r14d, r14d
    ...[0x74, call.length + 2], //                    jz end
    ...call,
    ...[0xeb, 256 - (3 + 2 + call.length + 2)], //    jmp loop
  ];
  const served = [
    ...[0xc1, 0xe0, 9], //                            shl eax, 9 (SLOT_SIZE)
    ...[0x4c, 0x8d, 0xbc, 0x03, ...immediate(SLOTS)], // lea r15, [rbx+rax+SLOTS]
    ...[0x4d, 0x8d, 0x67, 0x08], //                   lea r12, [r15+8]
    ...[0x4c, 0x8d, 0x6b, CALLS], //                  lea r13, [rbx+CALLS]
    ...[0x44, 0x8b, 0x73, TABLE.count], //            mov r14d, [rbx+count]
    ...loop,
    // end: the number of the thread comes last, as the word that its results are there
    ...[0xb8, SYS_GETTID, 0, 0, 0, 0x0f, 0x05], //    mov eax, SYS_gettid; syscall
    ...[0x49, 0x89, 0x07], //                         mov [r15], rax
  ];
  return new Uint8Array([
    ...[0x53, 0x41, 0x54, 0x41, 0x55], //             push rbx; push r12; push r13
    ...[0x41, 0x56, 0x41, 0x57], //                   push r14; push r15
    ...[0x48, 0xbb, ...address], //                   mov rbx, table
    ...[0xb8, 1, 0, 0, 0], //                         mov eax, 1
    ...[0xf0, 0x0f, 0xc1, 0x03], //                   lock xadd [rbx+next], eax
    ...[0x3d, ...immediate(MAX_THREADS)], //          cmp eax, MAX_THREADS
    ...[0x73, served.length], //                      jae out
    ...served,
    // out:
    ...[0x41, 0x5f, 0x41, 0x5e], //                   pop r15; pop r14
    ...[0x41, 0x5d, 0x41, 0x5c, 0x5b, 0xc3], //       pop r13; pop r12; pop rbx; ret
  ]);
}

let shared: { readonly table: Mapping; readonly code: Mapping } | undefined;

/** The table, with the handler in place. Neither is given back, as a handler may still be at its last instruction. */
function sharedTable(): Mapping {
  if (shared) return shared.table;
  if (Deno.build.os !== "linux" || Deno.build.arch !== "x86_64") {
    throw new Error(
      `Cannot make system calls on every thread of ${Deno.build.os} on ${Deno.build.arch}: ` +
        `only Linux on x86_64 is supported`,
    );
  }
  const table = new Mapping(SLOTS + SLOT_SIZE * MAX_THREADS);
  const code = new Mapping(4096);
  new Uint8Array(code.buffer).set(handlerCode(table.address));
  code.protect(PROT_READ | PROT_EXEC);
  // struct sigaction of glibc 2.36 on x86-64: handler, mask (all signals), flags, restorer (which glibc sets).
  const action = new Uint8Array(152);
  const view = new DataView(action.buffer);
  view.setBigUint64(0, code.address, true);
  action.fill(0xff, 8, 136);
  view.setUint32(136, SA_RESTART, true);
  check(libc().sigaction(ALL_THREADS_SIGNAL, action, null), "sigaction()");
  shared = { table, code };
  return table;
}

/**
 * Lists the threads of this process that run code of its own: those of the kernel among them, such as workers of io_uring,
 * are left out.
 *
 * @returns Their numbers by a name that no later thread has
 */
export function listThreads(): Map<string, number> {
  const threads = new Map<string, number>();
  for (const { name } of Deno.readDirSync("/proc/self/task")) {
    let text: string;
    try {
      text = Deno.readTextFileSync(`/proc/self/task/${name}/stat`);
    } catch (error) {
      // It ended meanwhile.
      if (error instanceof Deno.errors.NotFound || /os error 3\b/.test(String(error))) continue;
      throw error;
    }
    // proc(5): the third field on comes after the name in parentheses, which may hold anything.
    const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
    const isGone = fields[0] === "Z" || fields[0] === "X";
    if (!isGone && (Number(fields[6]) & KERNEL_THREAD) === 0) {
      threads.set(`${name}:${fields[19]}`, Number(name));
    }
  }
  return threads;
}

/**
 * Makes system calls on every thread of this process, by a signal whose handler makes them. Threads that are started
 * meanwhile are served too, and may then make calls that took effect on the thread that started them already. It holds up
 * this thread until all have answered; only one isolate of a process may use it at a time.
 *
 * @param calls The calls, 63 at most, in order; a failed one does not keep the next from being made
 * @param timeout How long to wait for the threads' answers, in milliseconds
 * @returns Their results on each thread
 * @throws {SysError} If a call failed on a thread
 * @throws {Error} If a thread does not answer
 */
export function runOnAllThreads(calls: readonly ThreadCall[], timeout: number = TIMEOUT): ThreadResult[] {
  if (calls.length > MAX_CALLS || calls.some((call) => (call.arguments?.length ?? 0) > 6)) {
    throw new RangeError(
      `Cannot make ${calls.length} calls on every thread: ${MAX_CALLS} calls of 6 arguments are the most`,
    );
  }
  const table = sharedTable();
  const words = new Int32Array(table.buffer);
  const longs = new BigInt64Array(table.buffer);
  longs.fill(0n);
  longs[TABLE.count / 8] = BigInt(calls.length);
  for (const [index, call] of calls.entries()) {
    const at = (CALLS + index * CALL_SIZE) / 8;
    longs[at] = BigInt(call.number);
    for (const [position, value] of (call.arguments ?? []).entries()) {
      longs[at + 1 + position] = BigInt.asIntN(64, BigInt(value));
    }
  }
  const served = new Set<string>();
  for (;;) {
    const waiting = [...listThreads()].filter(([key]) => !served.has(key));
    if (waiting.length === 0) break;
    if (served.size + waiting.length > MAX_THREADS) {
      throw new RangeError(`Cannot make calls on more than ${MAX_THREADS} threads`);
    }
    for (const [key, thread] of waiting) {
      served.add(key);
      const sent = libc().tgkill(SYS_TGKILL, Deno.pid, thread, ALL_THREADS_SIGNAL);
      if (sent < 0 && errno() !== ESRCH) check(sent, `tgkill(${thread})`);
    }
    waitFor(waiting, words, performance.now() + timeout);
  }
  return collect(calls, words, longs);
}

/** Number of the slots that handlers have taken. */
function takenSlots(words: Int32Array): number {
  return Math.min(Atomics.load(words, TABLE.next / 4), MAX_THREADS);
}

/** Number of the thread whose results are complete in a slot; 0 while they are not. */
function threadOf(words: Int32Array, slot: number): number {
  return Atomics.load(words, (SLOTS + slot * SLOT_SIZE) / 4);
}

/** Sleeps until threads have answered or ended. */
function waitFor(
  threads: readonly (readonly [key: string, thread: number])[],
  words: Int32Array,
  deadline: number,
): void {
  const never = new Int32Array(new SharedArrayBuffer(4));
  for (;;) {
    const answered = new Set<number>();
    for (let slot = 0; slot < takenSlots(words); slot++) answered.add(threadOf(words, slot));
    let missing = threads.filter(([, thread]) => !answered.has(thread));
    if (missing.length === 0) return;
    const alive = listThreads();
    missing = missing.filter(([key]) => alive.has(key));
    if (missing.length === 0) return;
    if (performance.now() > deadline) {
      const numbers = missing.map(([, thread]) => thread).join(", ");
      throw new Error(
        `Cannot make system calls on the threads ${numbers} as they do not answer signal ${ALL_THREADS_SIGNAL}: ` +
          `see whether they block it (SigBlk in /proc/${Deno.pid}/task/*/status)`,
      );
    }
    Atomics.wait(never, 0, 0, 1);
  }
}

/** Reads the results of all threads. */
function collect(calls: readonly ThreadCall[], words: Int32Array, longs: BigInt64Array): ThreadResult[] {
  const found: ThreadResult[] = [];
  for (let slot = 0; slot < takenSlots(words); slot++) {
    const thread = threadOf(words, slot);
    // A late answer to calls that were given up.
    if (thread === 0) continue;
    const first = (SLOTS + slot * SLOT_SIZE) / 8 + 1;
    const results = calls.map((_, index) => Number(longs[first + index]));
    for (const [index, { name, tolerated = [] }] of calls.entries()) {
      const result = results[index]!;
      if (result < 0 && !tolerated.includes(-result)) throw sysError(`${name} on thread ${thread}`, -result);
    }
    found.push({ thread, results });
  }
  return found;
}
