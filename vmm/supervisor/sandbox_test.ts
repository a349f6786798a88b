import assert from "node:assert/strict";
import { join } from "node:path";
import { landlockVersion } from "../../ffi/mod.ts";
import { limitCgroup } from "./sandbox.ts";

const isSupported = Deno.build.os === "linux" && Deno.build.arch === "x86_64";
const hasLandlock = isSupported && landlockVersion() > 0;

/** Runs a program in a process of its own, which does not leave its sandbox. `folder` is its machine's folder. */
async function runChild(
  code: string,
  options = "",
): Promise<{ signal: string | null; lines: string[]; stderr: string }> {
  const folder = await Deno.makeTempDir();
  try {
    const output = await new Deno.Command(Deno.execPath(), {
      args: [
        "eval",
        "--ext=ts",
        `import { enterSandbox } from ${JSON.stringify(import.meta.resolve("./sandbox.ts"))};
        import { compileFilter, errno, Fd, KVM_EXIT, libc, Mapping, VCPU_THREAD_POLICY, writeFilter } from ${
          JSON.stringify(import.meta.resolve("../../ffi/mod.ts"))
        };
        import { Kvm } from ${JSON.stringify(import.meta.resolve("../kvm/vm.ts"))};
        const folder = ${JSON.stringify(folder)};
        const raw = Deno.dlopen("libc.so.6", {
          syscall: { parameters: ["i64", "i64", "i64", "i64", "i64"], result: "i64" },
          fork: { parameters: [], result: "i32" },
          later: { name: "syscall", parameters: ["i64", "i64", "i64", "i64"], result: "i64", nonblocking: true },
        }).symbols;
        const say = (text) => Deno.stdout.writeSync(new TextEncoder().encode(text + "\\n"));
        const attempt = async (name, action) => {
          try { await action(); say(name + " done"); } catch (error) { say(name + " " + (error.code ?? error)); }
        };
        const report = enterSandbox({ folder, ${options} });
        ${code}`,
      ],
      stdin: "null",
      env: { NO_COLOR: "1" },
    }).output();
    const decoder = new TextDecoder();
    return {
      signal: output.signal,
      lines: decoder.decode(output.stdout).trim().split("\n"),
      stderr: decoder.decode(output.stderr),
    };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

function sandboxTest(name: string, fn: () => Promise<void>): void {
  Deno.test({ name, ignore: !isSupported, fn });
}

sandboxTest("every layer is in place on every thread, and the report says so", async () => {
  const { signal, lines, stderr } = await runChild(`
    say(JSON.stringify(report));
    try { enterSandbox({ folder }); } catch (error) { say(error.message); }
    for (const { name } of Deno.readDirSync("/proc/self/task")) {
      const text = Deno.readTextFileSync("/proc/self/task/" + name + "/status");
      const field = (name) => new RegExp("^" + name + ":\\\\s*(\\\\w+)", "m").exec(text)[1];
      say(["NoNewPrivs", "CapEff", "CapPrm", "Seccomp"].map(field).join(" "));
    }
  `);
  assert.equal(signal, null, stderr);
  const report = JSON.parse(lines[0]!);
  assert.ok(report.noNewPrivileges.applied && report.capabilities.applied && report.seccomp.applied);
  assert.equal(report.landlock.applied, hasLandlock);
  assert.equal(report.cgroup.applied, false);
  for (const layer of Object.values(report) as { detail: string }[]) assert.notEqual(layer.detail, "");
  assert.match(lines[1]!, /^Cannot enter the sandbox twice/);
  assert.ok(lines.length > 3);
  assert.deepEqual([...new Set(lines.slice(2))], ["1 0000000000000000 0000000000000000 2"]);
});

sandboxTest("a supervisor goes on with its work", async () => {
  const { signal, lines, stderr } = await runChild(`
    await attempt("http", async () => {
      const path = folder + "/control.sock";
      const server = Deno.serve({ path, onListen() {} }, async (request) => new Response("got " + await request.text()));
      const client = Deno.createHttpClient({ proxy: { transport: "unix", path } });
      for (let round = 0; round < 20; round++) {
        const response = await fetch("http://localhost/", { client, method: "PUT", body: "it" });
        if (await response.text() !== "got it") throw new Error("wrong");
      }
      client.close();
      await server.shutdown();
    });
    await attempt("tcp", async () => {
      const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      const accepted = listener.accept().then((connection) => connection.readable.pipeTo(connection.writable));
      const connection = await Deno.connect({ hostname: "127.0.0.1", port: listener.addr.port });
      connection.setNoDelay();
      await connection.write(new TextEncoder().encode("echo"));
      const buffer = new Uint8Array(10);
      if (await connection.read(buffer) !== 4) throw new Error("wrong");
      connection.close();
      await accepted;
      listener.close();
    });
    await attempt("files", async () => {
      using log = await Deno.open(folder + "/log", { create: true, append: true });
      await log.write(new Uint8Array(100));
      await log.sync();
      await Deno.writeTextFile(folder + "/config.new", "{}", { mode: 0o600 });
      await Deno.rename(folder + "/config.new", folder + "/config");
      if (await Deno.readTextFile(folder + "/config") !== "{}") throw new Error("wrong");
      await Deno.truncate(folder + "/log", 10);
      await Deno.remove(folder + "/config");
      using disk = Fd.open(folder + "/log");
      using memory = new Mapping(4096, { fd: disk });
      new Uint8Array(memory.buffer)[0] = 1;
    });
    await attempt("memory", () => {
      using fd = Fd.memory("ram", 1 << 20);
      using ram = new Mapping(1 << 20, { fd });
      new Uint8Array(ram.buffer).fill(1);
      for (let round = 0; round < 12; round++) new Array(200_000).fill(0).map((_, index) => ({ index }));
      Deno.memoryUsage();
      Deno.systemMemoryInfo();
    });
    await attempt("compiler", () => {
      for (let round = 0; round < 20; round++) {
        new Function("let sum = 0; for (let n = 0; n < 3e5; n++) sum = (sum * 31 + n * " + round + ") | 0; return sum;")();
      }
    });
    await attempt("threads", async () => {
      const worker = new Worker("data:text/javascript,postMessage(1)", { type: "module" });
      await new Promise((resolve, reject) => { worker.onmessage = resolve; worker.onerror = reject; });
      worker.terminate();
      await Promise.all(Array.from({ length: 30 }, () => Deno.stat(folder)));
    });
    await attempt("signal", () => new Promise((resolve) => {
      const listener = () => { Deno.removeSignalListener("SIGTERM", listener); resolve(); };
      Deno.addSignalListener("SIGTERM", listener);
      Deno.kill(Deno.pid, "SIGTERM");
    }));
    await attempt("interfaces", () => void Deno.networkInterfaces());
    await attempt("crypto", () => crypto.subtle.digest("SHA-256", new Uint8Array(1000)));
    await attempt("timer", () => new Promise((resolve) => setTimeout(resolve, 5)));
    say("end");
    Deno.exit(0);
  `);
  const steps = [
    "http",
    "tcp",
    "files",
    "memory",
    "compiler",
    "threads",
    "signal",
    "interfaces",
    "crypto",
    "timer",
  ];
  assert.deepEqual(lines, [...steps.map((step) => `${step} done`), "end"], stderr);
  assert.equal(signal, null);
});

Deno.test({
  name: hasLandlock
    ? "files elsewhere are out of reach, their modes and owners too"
    : "files elsewhere are out of reach (skipped: no Landlock)",
  ignore: !hasLandlock,
  async fn() {
    const elsewhere = await Deno.makeTempFile();
    try {
      const { lines, stderr } = await runChild(
        `
        const file = ${JSON.stringify(elsewhere)};
        await attempt("read", () => Deno.readTextFileSync(file));
        await attempt("read on the pool", () => Deno.readTextFile(file));
        await attempt("write", () => Deno.writeTextFileSync(file, "x"));
        await attempt("mode", () => Deno.chmodSync(file, 0o777));
        await attempt("owner", () => Deno.chownSync(file, 0, 0));
        await attempt("execute", () => import(new URL(file, "file:").href));
        await attempt("memory", () => Deno.openSync("/proc/self/mem", { write: true }));
        await attempt("other process", () => Deno.readTextFileSync("/proc/1/environ"));
        await attempt("granted", () => Deno.readTextFileSync("/etc/passwd"));
        `,
        `readOnly: ["/etc/passwd"]`,
      );
      assert.deepEqual(lines, [
        "read EACCES",
        "read on the pool EACCES",
        "write EACCES",
        "mode EPERM",
        "owner EPERM",
        lines[5],
        "memory EACCES",
        "other process EACCES",
        "granted done",
      ], stderr);
      assert.notEqual(lines[5], "execute done");
    } finally {
      await Deno.remove(elsewhere);
    }
  },
});

/** Calls that end the process, in words that make them. */
const FORBIDDEN: Readonly<Record<string, string>> = {
  "programs by Deno": `await new Deno.Command("/bin/true").output()`,
  "programs by execve": `raw.syscall(59n, 0n, 0n, 0n, 0n)`,
  "programs on another thread": `await raw.later(59n, 0n, 0n, 0n)`,
  "processes by fork": `raw.fork()`,
  ptrace: `raw.syscall(101n, 0n, 0n, 0n, 0n)`,
  "other processes' memory": `raw.syscall(310n, 1n, 0n, 0n, 0n)`,
  mount: `raw.syscall(165n, 0n, 0n, 0n, 0n)`,
  "kernel modules": `raw.syscall(313n, -1n, 0n, 0n, 0n)`,
  keyctl: `raw.syscall(250n, 0n, 0n, 0n, 0n)`,
  bpf: `raw.syscall(321n, 0n, 0n, 0n, 0n)`,
  perf_event_open: `raw.syscall(298n, 0n, 0n, 0n, 0n)`,
  userfaultfd: `raw.syscall(323n, 0n, 0n, 0n, 0n)`,
  setns: `raw.syscall(308n, -1n, 0n, 0n, 0n)`,
  unshare: `raw.syscall(272n, 0x10000000n, 0n, 0n, 0n)`,
  "new rings of io_uring": `raw.syscall(425n, 1n, 0n, 0n, 0n)`,
  "packet sockets": `raw.syscall(41n, 17n, 3n, 0n, 0n)`,
  "signals to others": `raw.syscall(62n, 1n, 0n, 0n, 0n)`,
  "signals by descriptors": `raw.syscall(72n, 0n, 8n, 1n, 0n)`,
  "truncation by a descriptor to read": `raw.syscall(257n, -100n, 0n, 512n, 0n)`,
  "a filter that another process serves": `raw.syscall(317n, 1n, 8n, 0n, 0n)`,
};

sandboxTest("what a supervisor never does ends it", async () => {
  const ends: string[] = [];
  for (const [name, code] of Object.entries(FORBIDDEN)) {
    const { signal, lines } = await runChild(`say("before"); ${code}; say("after");`);
    ends.push(`${name}: ${lines.join()} ${signal}`);
  }
  assert.deepEqual(ends, Object.keys(FORBIDDEN).map((name) => `${name}: before SIGSYS`));
});

sandboxTest(
  "what the kernel may be newer than is absent, not deadly; requests unknown to a device likewise",
  async () => {
    const { lines, stderr } = await runChild(`
    raw.syscall(1000n, 0n, 0n, 0n, 0n);
    say(errno());
    raw.syscall(435n, 0n, 0n, 0n, 0n);
    say(errno());
    raw.syscall(16n, 1n, 0x5450n, 0n, 0n); // FIONCLEX, which any descriptor knows
    say(errno());
  `);
    assert.deepEqual(lines, ["38", "38", "25"], stderr);
  },
);

sandboxTest(
  "more calls are allowed on demand, and forbidden ones only logged while looking for them",
  async () => {
    const allowed = await runChild(
      `say(raw.syscall(323n, 0xffffn, 0n, 0n, 0n)); raw.syscall(165n, 0n, 0n, 0n, 0n);`,
      `allow: [{ calls: ["userfaultfd"] }]`,
    );
    assert.deepEqual([allowed.lines, allowed.signal], [["-1"], "SIGSYS"], allowed.stderr);
    const logged = await runChild(
      `say(raw.syscall(323n, 0xffffn, 0n, 0n, 0n)); say(report.seccomp.applied);`,
      "logOnly: true",
    );
    assert.deepEqual([logged.lines, logged.signal], [["-1", "false"], null], logged.stderr);
  },
);

function whyNoKvm(): string | undefined {
  if (!isSupported) return "not Linux on x86-64";
  try {
    Deno.openSync("/dev/kvm", { read: true, write: true }).close();
    return undefined;
  } catch (error) {
    return `/dev/kvm: ${error instanceof Error ? error.message.split(":")[0] : error}`;
  }
}

const whyNot = whyNoKvm();

Deno.test({
  name: `vCPUs run in the sandbox, their threads with a filter more${
    whyNot === undefined ? "" : ` (skipped: ${whyNot})`
  }`,
  ignore: whyNot !== undefined,
  async fn() {
    const { lines, signal, stderr } = await runChild(
      `
      using kvm = new Kvm();
      using memory = new Mapping(0x10000);
      using epoll = Fd.epoll();
      using events = new Mapping(4096);
      const program = compileFilter(VCPU_THREAD_POLICY);
      using filter = new Mapping(4096);
      for (let round = 0; round < 3; round++) {
        using vm = kvm.createVm({ irqchip: round === 1 });
        // mov dx, 0x3f8; out dx, al; jmp self
        new Uint8Array(memory.buffer).set([0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfe], 0x1000);
        vm.setMemory(0, 0, memory);
        using event = Fd.event();
        vm.setIoEvent(event, { address: 0x500, length: 1, isPort: true });
        if (round === 1) vm.setIrqEvent(event, 5);
        const vcpu = vm.createVcpu(writeFilter(filter, 0, program));
        epoll.watch(vcpu.event);
        vcpu.changeSystemRegisters((registers) => {
          for (let byte = 0; byte < 8; byte++) registers.set("cs", 0, byte);
          registers.set("cs", 0, 12);
          registers.set("cs", 0, 13);
        });
        vcpu.setRegisters({ rip: 0x1000, rflags: 2 });
        vcpu.resume();
        await libc().epoll_wait_async(epoll.number, events.pointer, 1, 20_000);
        const filters = [...Deno.readDirSync("/proc/self/task")].map(({ name }) =>
          Number(/Seccomp_filters:\\s*(\\d+)/.exec(Deno.readTextFileSync("/proc/self/task/" + name + "/status"))[1]));
        say(Math.max(...filters) + " filters");
        say(vcpu.take() + " " + (Number(vcpu.run.get("exit_reason")) === KVM_EXIT.IO));
        vcpu.resume();
        vcpu.kick();
        epoll.poll(events.pointer, 20_000);
        say(vcpu.take());
        epoll.unwatch(vcpu.event);
      }
      say("end");
      `,
      `readWrite: ["/dev/kvm"]`,
    );
    assert.deepEqual(
      lines,
      [...new Array<string[]>(3).fill(["2 filters", "0 true", "-4"]).flat(), "end"],
      stderr,
    );
    assert.equal(signal, null);
  },
});

Deno.test("limits are written to a cgroup of its own; those that the system lacks are named", async () => {
  // The files of the kernel, without their behaviour.
  const parent = await Deno.makeTempDir();
  try {
    const folder = join(parent, "machine");
    await Deno.mkdir(folder);
    for (const file of ["cgroup.procs", "memory.max", "cpu.max"]) {
      await Deno.writeTextFile(join(folder, file), "");
    }
    await Deno.writeTextFile(join(folder, "cgroup.controllers"), "memory\n");
    const layer = limitCgroup({ name: "machine", memoryMax: 1 << 30, pidsMax: 100, cpuMax: 1.5 }, parent);
    const read = (file: string) => Deno.readTextFileSync(join(folder, file));
    assert.equal(read("cgroup.procs"), String(Deno.pid));
    assert.equal(read("memory.max"), "1073741824");
    assert.equal(read("cpu.max"), "150000 100000");
    assert.match(Deno.readTextFileSync(join(parent, "cgroup.subtree_control")), /^\+(pids|cpu)$/);
    assert.equal(layer.applied, true);
    assert.match(
      layer.detail,
      /: memory\.max 1073741824, cpu\.max 150000 100000; not limited: pids \(.*NotFound|os error 2/,
    );
    assert.deepEqual(limitCgroup({ name: "machine", memoryMax: 1 }, join(parent, "none")).applied, false);
  } finally {
    await Deno.remove(parent, { recursive: true });
  }
});

sandboxTest(
  "where cgroups cannot limit, the sandbox says so and stands; where they can, the process is in its own",
  async () => {
    const name = `hypertopia-test-${Deno.pid}`;
    const { lines, stderr } = await runChild(
      `say(report.cgroup.applied); say(report.cgroup.detail); say(Deno.readTextFileSync("/proc/self/cgroup").includes("${name}"));`,
      `cgroup: { name: "${name}", pidsMax: 500 }`,
    );
    const [applied, detail, isInside] = lines;
    assert.equal(isInside, applied, stderr);
    if (applied === "true") await Deno.remove(detail!.slice(0, detail!.indexOf(":")));
    else assert.match(detail!, /^no (limit could be set|cgroup)/);
  },
);
