/**
 * vCPU threads: native threads whose entry is machine code that is written here. A thread runs its vCPU until it exits
 * to user space, says so through an eventfd, and waits for the word to go on; one isolate serves the exits of them all.
 *
 * @module
 */

import { check, type Fd, libc, Mapping, PROT_EXEC, PROT_READ, sysError } from "../../ffi/mod.ts";

/** Signal that takes a vCPU out of the guest: a real-time one, since Deno has uses for the ordinary ones. */
export const KICK_SIGNAL = 40;

const SYS_FUTEX = 202n;
const SYS_TGKILL = 234n;
const SYS_SECCOMP = 317;
const FUTEX_WAKE = 1;

/** Offsets in a thread's context page. */
const CONTEXT = {
  vcpu: 0, // i32: descriptor of the vCPU
  event: 8, // i32: descriptor of the eventfd
  go: 16, // i32: futex; 0 wait, 1 run, 2 end
  result: 24, // i64: what KVM_RUN returned
  one: 32, // u64: 1, what is written to the eventfd
  tid: 40, // i32: number of the thread
  filter: 48, // u64: address of a struct sock_fprog, or 0
} as const;

/** System V AMD64 code: `void *entry(void *context)`, with the context in rdi. Numbers are those of x86-64 system calls. */
const ENTRY: readonly number[] = [
  ...[0x53], //                               push rbx
  ...[0x48, 0x89, 0xfb], //                   mov rbx, rdi
  ...[0xb8, 186, 0, 0, 0, 0x0f, 0x05], //     mov eax, SYS_gettid; syscall
  ...[0x89, 0x43, CONTEXT.tid], //            mov [rbx+tid], eax
  ...[0x48, 0x8b, 0x53, CONTEXT.filter], //   mov rdx, [rbx+filter]
  ...[0x48, 0x85, 0xd2, 0x74, 21], //         test rdx, rdx; jz wait
  ...[0xbf, 1, 0, 0, 0, 0x31, 0xf6], //       mov edi, SECCOMP_SET_MODE_FILTER; xor esi, esi
  ...[0xb8, SYS_SECCOMP & 0xff, SYS_SECCOMP >> 8, 0, 0, 0x0f, 0x05], // mov eax, SYS_seccomp; syscall
  ...[0x48, 0x85, 0xc0, 0x74, 2, 0x0f, 0x0b], // test rax, rax; jz wait; ud2: no guest runs without its filter
  // wait:
  ...[0x8b, 0x43, CONTEXT.go], //             mov eax, [rbx+go]
  ...[0x85, 0xc0, 0x75, 20], //               test eax, eax; jnz told
  ...[0x48, 0x8d, 0x7b, CONTEXT.go], //       lea rdi, [rbx+go]
  ...[0x31, 0xf6, 0x31, 0xd2], //             xor esi, esi (FUTEX_WAIT); xor edx, edx (while 0)
  ...[0x4d, 0x31, 0xd2], //                   xor r10, r10 (no timeout)
  ...[0xb8, Number(SYS_FUTEX), 0, 0, 0, 0x0f, 0x05], // mov eax, SYS_futex; syscall
  ...[0xeb, 0xe5], //                         jmp wait
  // told:
  ...[0x83, 0xf8, 2, 0x74, 49], //            cmp eax, 2; je out
  ...[0xc7, 0x43, CONTEXT.go, 0, 0, 0, 0], // mov dword [rbx+go], 0
  ...[0x8b, 0x7b, CONTEXT.vcpu], //           mov edi, [rbx+vcpu]
  ...[0xbe, 0x80, 0xae, 0, 0], //             mov esi, KVM_RUN
  ...[0x31, 0xd2], //                         xor edx, edx
  ...[0xb8, 16, 0, 0, 0, 0x0f, 0x05], //      mov eax, SYS_ioctl; syscall
  ...[0x48, 0x89, 0x43, CONTEXT.result], //   mov [rbx+result], rax
  ...[0x8b, 0x7b, CONTEXT.event], //          mov edi, [rbx+event]
  ...[0x48, 0x8d, 0x73, CONTEXT.one], //      lea rsi, [rbx+one]
  ...[0xba, 8, 0, 0, 0], //                   mov edx, 8
  ...[0xb8, 1, 0, 0, 0, 0x0f, 0x05], //       mov eax, SYS_write; syscall
  ...[0xeb, 0xaf], //                         jmp wait
  // out:
  ...[0x31, 0xc0, 0x5b, 0xc3], //             xor eax, eax; pop rbx; ret
];
const WAIT = 44;
const HANDLER = ENTRY.length;

/** Finds a jump's target, to check the table above. */
function jumpTarget(at: number): number {
  return at + 2 + (ENTRY[at + 1]! << 24 >> 24);
}

let code: Mapping | undefined;

/** The page of code, shared by all threads of the process: written, then made executable and unwritable. */
function entryPage(): Mapping {
  if (code) return code;
  if (Deno.build.arch !== "x86_64") {
    throw new Error(`Cannot run vCPUs on ${Deno.build.arch}: only x86_64 is supported`);
  }
  const page = new Mapping(4096);
  const bytes = new Uint8Array(page.buffer);
  bytes.set(ENTRY);
  // A signal handler that does nothing: it is there so that the signal interrupts the system call.
  bytes[HANDLER] = 0xc3;
  page.protect(PROT_READ | PROT_EXEC);
  const action = new Uint8Array(152); // struct sigaction of glibc 2.36 on x86-64: handler, mask, flags, restorer
  new DataView(action.buffer).setBigUint64(0, page.address + BigInt(HANDLER), true);
  check(libc().sigaction(KICK_SIGNAL, action, null), "sigaction()");
  code = page;
  return page;
}

/** A native thread that runs one vCPU. It begins stopped. */
export class VcpuThread implements Disposable {
  readonly #context: Mapping;
  readonly #words: Int32Array;
  readonly #result: BigInt64Array;
  readonly #go: Deno.PointerObject;
  readonly #handle: bigint;
  #isEnded = false;

  /**
   * Starts a thread.
   *
   * @param vcpu Descriptor of the vCPU
   * @param event Eventfd that counts its exits
   * @param filter Address of a `struct sock_fprog` that the thread lays on itself first; 0 for none
   */
  constructor(vcpu: Fd, event: Fd, filter = 0n) {
    const entry = entryPage();
    this.#context = new Mapping(4096);
    this.#words = new Int32Array(this.#context.buffer);
    this.#result = new BigInt64Array(this.#context.buffer);
    this.#go = this.#context.at(CONTEXT.go);
    this.#words[CONTEXT.vcpu / 4] = vcpu.number;
    this.#words[CONTEXT.event / 4] = event.number;
    this.#words[CONTEXT.one / 4] = 1;
    new BigUint64Array(this.#context.buffer)[CONTEXT.filter / 8] = filter;
    const handle = new BigUint64Array(1);
    const error = libc().pthread_create(
      new Uint8Array(handle.buffer),
      null,
      entry.pointer,
      this.#context.pointer,
    );
    if (error !== 0) {
      this.#context[Symbol.dispose]();
      throw sysError("pthread_create()", error);
    }
    this.#handle = handle[0]!;
  }

  /** What `KVM_RUN` returned last: 0, or a negative error number. */
  get result(): number {
    return Number(this.#result[CONTEXT.result / 8]);
  }

  /** Lets the vCPU go on until its next exit. */
  resume(): void {
    this.#tell(1);
  }

  /**
   * Takes the vCPU out of the guest. Set `immediate_exit` of its `kvm_run` before, so that a kick just ahead of the entry
   * is not lost.
   */
  kick(): void {
    const tid = Atomics.load(this.#words, CONTEXT.tid / 4);
    if (tid !== 0 && !this.#isEnded) libc().tgkill(SYS_TGKILL, Deno.pid, tid, KICK_SIGNAL);
  }

  /** Ends the thread and waits for it. The vCPU must be stopped. */
  [Symbol.dispose](): void {
    if (this.#isEnded) return;
    this.#tell(2);
    libc().pthread_join(this.#handle, null);
    this.#isEnded = true;
    this.#context[Symbol.dispose]();
  }

  #tell(word: number): void {
    Atomics.store(this.#words, CONTEXT.go / 4, word);
    libc().futex(SYS_FUTEX, this.#go, FUTEX_WAKE, 1, null, null, 0);
  }
}

/** Offsets of the code, for its test. */
export const ENTRY_LAYOUT: {
  readonly bytes: readonly number[];
  readonly wait: number;
  readonly jumps: readonly number[];
} = {
  bytes: ENTRY,
  wait: WAIT,
  jumps: ENTRY.flatMap((byte, at) => byte === 0xeb && ENTRY[at - 1] === 0x05 ? [jumpTarget(at)] : []),
};
