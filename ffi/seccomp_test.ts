import assert from "node:assert/strict";
import { findWrongClaims, hasHeader } from "./c_compiler.ts";
import { Mapping } from "./fd.ts";
import {
  type ArgumentCondition,
  compileFilter,
  type FilterAction,
  filterSize,
  type SeccompPolicy,
  SYSCALL,
  type SyscallName,
  type SyscallRule,
  VCPU_THREAD_POLICY,
  writeFilter,
} from "./seccomp.ts";

const ARCH_X86_64 = 0xc000_003e;
const ALLOW = 0x7fff_0000;
const KILL = 0x8000_0000;

/** A call as the kernel shows it to a filter. */
interface Call {
  readonly number: number;
  readonly arch?: number;
  readonly arguments?: readonly bigint[];
}

/** Runs a filter as the kernel does, with its checks; gives the action and counts the steps. */
function interpret(program: Uint8Array<ArrayBuffer>, call: Call): { action: number; steps: number } {
  const data = new DataView(new ArrayBuffer(64));
  data.setUint32(0, call.number, true);
  data.setUint32(4, call.arch ?? ARCH_X86_64, true);
  (call.arguments ?? []).forEach((value, index) =>
    data.setBigUint64(16 + 8 * index, BigInt.asUintN(64, value), true)
  );
  const code = new DataView(program.buffer);
  let accumulator = 0;
  let at = 0;
  for (let steps = 1;; steps++) {
    assert.ok(8 * at < program.length, "the program runs off its end");
    const [ifTrue, ifFalse] = [code.getUint8(8 * at + 2), code.getUint8(8 * at + 3)];
    const constant = code.getUint32(8 * at + 4, true);
    switch (code.getUint16(8 * at, true)) {
      case 0x20:
        assert.equal(constant % 4, 0);
        accumulator = data.getUint32(constant, true);
        break;
      case 0x54:
        accumulator = (accumulator & constant) >>> 0;
        break;
      case 0x05:
        at += constant;
        break;
      case 0x15:
        at += accumulator === constant ? ifTrue : ifFalse;
        break;
      case 0x35:
        at += accumulator >= constant ? ifTrue : ifFalse;
        break;
      case 0x06:
        return { action: constant, steps };
      default:
        assert.fail("unknown instruction");
    }
    at++;
  }
}

/** What a policy says, from its words alone. */
function decide(policy: SeccompPolicy, call: Call): number {
  const valueOf = (action: FilterAction) =>
    typeof action === "object"
      ? 0x5_0000 | action.errno
      : { allow: ALLOW, kill: KILL, log: 0x7ffc_0000 }[action];
  if ((call.arch ?? ARCH_X86_64) !== ARCH_X86_64 || call.number >= 0x4000_0000) return KILL;
  if (call.number > 450) return valueOf(policy.newer ?? policy.otherwise);
  const holds = ({ argument, equal, mask, bits = 64 }: ArgumentCondition) => {
    const value = BigInt.asUintN(bits, call.arguments?.[argument] ?? 0n);
    return (mask === undefined ? value : value & BigInt(mask)) === BigInt(equal);
  };
  for (const { calls, when = [[]], action = "allow" } of policy.rules) {
    if (!calls.some((name) => SYSCALL[name] === call.number)) continue;
    if (when.some((conditions) => conditions.every(holds))) return valueOf(action);
  }
  return valueOf(policy.otherwise);
}

/** Random numbers that are the same every time (mulberry32). */
function randomNumbers(seed: number): (below: number) => number {
  return (below) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  };
}

Deno.test("a compiled filter decides what its policy says, for random policies and calls", () => {
  const random = randomNumbers(1);
  const names = Object.keys(SYSCALL) as SyscallName[];
  const pick = <T>(values: readonly T[]): T => values[random(values.length)]!;
  const actions: readonly FilterAction[] = ["allow", "kill", "log", { errno: 1 }, { errno: 38 }];
  // Few values, so that conditions hold often enough; halves that differ, so that both are seen to matter.
  const values = [0n, 1n, 7n, 0xae80n, 0xffff_ffffn, 0x1_0000_0000n, 0x1_0000_0001n, 0xffff_ffff_ffff_ffffn];
  const condition = (): ArgumentCondition => {
    const bits = pick([32, 64] as const);
    const mask = pick([undefined, 0n, 1n, 0xff00n, 0x8000_0000n, 0x1_0000_00ffn, 0xffff_ffff_0000_0000n]);
    const fitting = mask === undefined ? undefined : BigInt.asUintN(bits, mask);
    const equal = BigInt.asUintN(bits, pick(values)) & (fitting ?? 0xffff_ffff_ffff_ffffn);
    return { argument: random(6), equal, bits, ...fitting === undefined ? {} : { mask: fitting } };
  };
  const list = <T>(most: number, make: () => T): T[] => Array.from({ length: random(most + 1) }, make);
  const seen = new Set<number>();
  for (let round = 0; round < 150; round++) {
    const policy: SeccompPolicy = {
      otherwise: pick(actions),
      ...random(2) === 0 ? {} : { newer: pick(actions) },
      rules: list(round % 50 === 0 ? 150 : 12, (): SyscallRule => ({
        calls: list(4, () => pick(names)),
        ...random(3) === 0 ? {} : { when: list(round % 3 === 0 ? 12 : 2, () => list(3, condition)) },
        ...random(2) === 0 ? {} : { action: pick(actions) },
      })),
    };
    const program = compileFilter(policy);
    const named = policy.rules.flatMap(({ calls }) => calls);
    for (let each = 0; each < 150; each++) {
      const call: Call = {
        number: named.length > 0 && random(8) > 0
          ? SYSCALL[pick(named)]
          : pick([random(500), 450, 451, 0x4000_0000 + random(400), 0xffff_ffff]),
        arch: random(20) === 0 ? pick([0x4000_0003, 0xc000_00b7]) : ARCH_X86_64,
        arguments: Array.from({ length: 6 }, () => pick(values)),
      };
      const { action } = interpret(program, call);
      if (action !== decide(policy, call)) {
        assert.fail(`round ${round}: ${action} for ${Deno.inspect({ policy, call }, { depth: 6 })}`);
      }
      seen.add(action);
    }
  }
  assert.equal(seen.size, actions.length);
});

Deno.test("a search of many calls stays short, whatever their rules weigh", () => {
  const names = Object.keys(SYSCALL) as SyscallName[];
  const when = Array.from({ length: 2 }, (_, equal) => [{ argument: 1, equal }]);
  const policy: SeccompPolicy = { otherwise: "kill", rules: [{ calls: names, when }] };
  const program = compileFilter(policy);
  // Jumps that a conditional one cannot reach must be among them.
  assert.ok(program.length / 8 > 2 * 255);
  const allowed = compileFilter({ otherwise: "kill", rules: [{ calls: names }] });
  for (const name of names) {
    for (const equal of [0n, 1n, 2n]) {
      const call = { number: SYSCALL[name], arguments: [0n, equal] };
      assert.equal(interpret(program, call).action, decide(policy, call), name);
    }
    assert.ok(interpret(allowed, { number: SYSCALL[name] }).steps < 30, name);
  }
});

Deno.test("conditions that cannot hold, and programs that are too long, are refused", () => {
  const compile = (condition: ArgumentCondition) =>
    compileFilter({ otherwise: "kill", rules: [{ calls: ["ioctl"], when: [[condition]] }] });
  assert.throws(() => compile({ argument: 6, equal: 0 }), RangeError);
  assert.throws(() => compile({ argument: 0, equal: 2 ** 32, bits: 32 }), RangeError);
  assert.throws(() => compile({ argument: 0, equal: -1 }), RangeError);
  assert.throws(() => compile({ argument: 0, equal: 3, mask: 1 }), /the value must fit/);
  const when = Array.from({ length: 1400 }, (_, equal) => [{ argument: 0, equal, bits: 32 as const }]);
  assert.throws(
    () => compileFilter({ otherwise: "kill", rules: [{ calls: ["ioctl"], when }] }),
    /Cannot assemble a filter of \d+ instructions: 4096/,
  );
});

Deno.test("a vCPU thread may run its vCPU and little else", () => {
  const program = compileFilter(VCPU_THREAD_POLICY);
  const decideCall = (name: SyscallName, ...values: bigint[]) =>
    interpret(program, { number: SYSCALL[name], arguments: values }).action;
  assert.equal(decideCall("ioctl", 9n, 0xae80n), ALLOW);
  assert.equal(decideCall("ioctl", 9n, 0xae81n), KILL);
  assert.equal(decideCall("write", 9n, 0n, 8n), ALLOW);
  assert.equal(decideCall("write", 9n, 0n, 9n), KILL);
  for (const name of ["futex", "rt_sigreturn", "exit"] as const) assert.equal(decideCall(name), ALLOW);
  const never = [
    "read",
    "openat",
    "mmap",
    "mprotect",
    "execve",
    "clone",
    "clone3",
    "prctl",
    "seccomp",
  ] as const;
  for (const name of never) assert.equal(decideCall(name), KILL, name);
});

const hasHeaders = await hasHeader("linux/seccomp.h");

Deno.test({
  name: `numbers and structures are those of the C headers${
    hasHeaders ? "" : " (skipped: no C compiler with linux/seccomp.h)"
  }`,
  ignore: !hasHeaders || Deno.build.arch !== "x86_64",
  async fn() {
    const headers = ["asm/unistd.h", "linux/seccomp.h", "linux/filter.h", "linux/audit.h"];
    const program = compileFilter({ otherwise: "kill", rules: [] });
    assert.deepEqual(
      await findWrongClaims(headers, [
        ...Object.entries(SYSCALL).map(([name, number]) => [`__NR_${name}`, number] as const),
        ["offsetof(struct seccomp_data, arch)", 4],
        ["offsetof(struct seccomp_data, args)", 16],
        ["sizeof(struct sock_filter)", 8],
        ["offsetof(struct sock_fprog, filter)", 8],
        ["sizeof(struct sock_fprog)", filterSize(program) - program.length],
        ["AUDIT_ARCH_X86_64", ARCH_X86_64],
        ["SECCOMP_RET_KILL_PROCESS", KILL],
        ["SECCOMP_RET_ALLOW", ALLOW],
        ["SECCOMP_RET_LOG", 0x7ffc_0000],
        ["SECCOMP_RET_ERRNO", 0x5_0000],
        ["SECCOMP_SET_MODE_FILTER", 1],
        ["SECCOMP_FILTER_FLAG_TSYNC", 1],
        ["BPF_LD | BPF_W | BPF_ABS", 0x20],
        ["BPF_ALU | BPF_AND | BPF_K", 0x54],
        ["BPF_JMP | BPF_JA", 0x05],
        ["BPF_JMP | BPF_JEQ | BPF_K", 0x15],
        ["BPF_JMP | BPF_JGE | BPF_K", 0x35],
        ["BPF_RET | BPF_K", 0x06],
      ]),
      [],
    );
  },
});

const isSupported = Deno.build.os === "linux" && Deno.build.arch === "x86_64";

Deno.test({
  name: "a filter is written with the structure that tells of it, within its memory",
  ignore: !isSupported,
  fn() {
    using memory = new Mapping(4096);
    const program = compileFilter(VCPU_THREAD_POLICY);
    const address = writeFilter(memory, 64, program);
    assert.equal(address, memory.address + 64n);
    const view = new DataView(memory.buffer);
    assert.equal(view.getUint16(64, true), program.length / 8);
    assert.equal(view.getBigUint64(72, true), memory.address + 80n);
    assert.deepEqual(new Uint8Array(memory.buffer, 80, program.length), program);
    assert.throws(() => writeFilter(memory, 4, program), RangeError);
    assert.throws(() => writeFilter(memory, 4096 - program.length, program), RangeError);
  },
});

const MODULE = import.meta.resolve("./mod.ts");
const PRELUDE = `
import { check, compileFilter, errno, installFilter, libc, Mapping, setNoNewPrivileges, SYSCALL, VCPU_THREAD_POLICY,
  writeFilter } from ${JSON.stringify(MODULE)};
const raw = Deno.dlopen("libc.so.6", {
  syscall: { parameters: ["i64", "i64", "i64", "i64"], result: "i64" },
  later: { name: "syscall", parameters: ["i64", "i64", "i64", "i64"], result: "i64", nonblocking: true },
}).symbols;
const seccompOf = () => [...Deno.readDirSync("/proc/self/task")].map(({ name }) =>
  Deno.readTextFileSync("/proc/self/task/" + name + "/status").match(/Seccomp:\\s*(\\d)/)[1]);
const say = (text) => Deno.stdout.writeSync(new TextEncoder().encode(text + "\\n"));
`;

/** Runs a program in a process of its own: filters cannot be taken off again. */
async function runChild(code: string): Promise<{ signal: string | null; stdout: string; stderr: string }> {
  const { signal, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", "--ext=ts", PRELUDE + code],
    stdin: "null",
    env: { NO_COLOR: "1" },
  }).output();
  const decoder = new TextDecoder();
  return { signal, stdout: decoder.decode(stdout), stderr: decoder.decode(stderr) };
}

/** Installs a filter on all threads that forbids one call and lets two others fail. */
const INSTALL = `
setNoNewPrivileges();
installFilter(compileFilter({
  otherwise: "allow",
  rules: [
    { calls: ["ptrace"], action: "kill" },
    { calls: ["sysinfo"], action: { errno: 95 } },
    { calls: ["lseek"], when: [[{ argument: 1, equal: 0x1_0000_0001 }]], action: { errno: 42 } },
  ],
}), { allThreads: true });
say(seccompOf().every((mode) => mode === "2") + " " + (seccompOf().length > 1));
`;

Deno.test({
  name: "the kernel takes a filter on all threads, and lets calls fail as it says",
  ignore: !isSupported,
  async fn() {
    const { signal, stdout, stderr } = await runChild(`${INSTALL}
      const fail = (...call) => Number(raw.syscall(...call.map(BigInt))) === -1 ? errno() : 0;
      say([fail(SYSCALL.sysinfo, 0, 0, 0), fail(SYSCALL.lseek, -1, 0x1_0000_0001, 0), fail(SYSCALL.lseek, -1, 1, 0)].join());
      say("alive");
    `);
    assert.equal(stdout, "true true\n95,42,9\nalive\n", stderr);
    assert.equal(signal, null);
  },
});

Deno.test({
  name: "a forbidden call ends the process, on whichever thread",
  ignore: !isSupported,
  async fn() {
    for (
      const call of [
        "raw.syscall(BigInt(SYSCALL.ptrace), 0n, 0n, 0n)",
        "await raw.later(BigInt(SYSCALL.ptrace), 0n, 0n, 0n)",
      ]
    ) {
      const { signal, stdout, stderr } = await runChild(`${INSTALL} ${call}; say("alive");`);
      assert.equal(stdout, "true true\n", stderr);
      assert.equal(signal, "SIGSYS");
    }
  },
});

Deno.test({
  name:
    "a vCPU thread's filter, installed by its machine code, lets it live and end, and ends the process otherwise",
  ignore: !isSupported,
  async fn() {
    // The thread: sets no_new_privs, installs the filter that is written at rdi + 64, stores what that returned, makes one
    // call, stores what that returned, and ends.
    const run = (call: readonly number[]) =>
      runChild(`
        const context = new Mapping(4096);
        writeFilter(context, 64, compileFilter(VCPU_THREAD_POLICY));
        const code = new Mapping(4096);
        new Uint8Array(code.buffer).set([
          0x53, 0x48, 0x89, 0xfb, // push rbx; mov rbx, rdi
          0xbf, 38, 0, 0, 0, 0xbe, 1, 0, 0, 0, // mov edi, PR_SET_NO_NEW_PRIVS; mov esi, 1
          0x31, 0xd2, 0x45, 0x31, 0xd2, 0x45, 0x31, 0xc0, // xor edx, edx; xor r10d, r10d; xor r8d, r8d
          0xb8, 157, 0, 0, 0, 0x0f, 0x05, // mov eax, SYS_prctl; syscall
          0xbf, 1, 0, 0, 0, 0x31, 0xf6, // mov edi, SECCOMP_SET_MODE_FILTER; xor esi, esi
          0x48, 0x8d, 0x53, 64, // lea rdx, [rbx+64]
          0xb8, 0x3d, 1, 0, 0, 0x0f, 0x05, // mov eax, SYS_seccomp; syscall
          0x48, 0x89, 0x03, // mov [rbx], rax
          ${call.join()},
          0x48, 0x89, 0x43, 8, // mov [rbx+8], rax
          0x31, 0xc0, 0x5b, 0xc3, // xor eax, eax; pop rbx; ret
        ]);
        code.protect(5);
        const results = new BigInt64Array(context.buffer);
        for (let round = 0; round < 3; round++) {
          results.fill(-1n, 0, 2);
          const handle = new BigUint64Array(1);
          libc().pthread_create(new Uint8Array(handle.buffer), null, code.pointer, context.pointer);
          libc().pthread_join(handle[0], null);
          say("ended " + results[0] + " " + (results[1] > 0));
        }
        new Deno.Command("true").outputSync();
        say("the others are free");
      `);
    const gettid = await run([0xb8, 186, 0, 0, 0, 0x0f, 0x05]);
    assert.equal(gettid.stdout, `${"ended 0 true\n".repeat(3)}the others are free\n`, gettid.stderr);
    const getpid = await run([0xb8, 39, 0, 0, 0, 0x0f, 0x05]);
    assert.deepEqual([getpid.stdout, getpid.signal], ["", "SIGSYS"], getpid.stderr);
  },
});
