import assert from "node:assert/strict";
import { ALL_THREADS_SIGNAL, listThreads, runOnAllThreads } from "./all_threads.ts";
import { SysError } from "./errno.ts";
import { Fd, MAP_PRIVATE, Mapping, PROT_READ } from "./fd.ts";
import { libc } from "./libc.ts";
import { SYSCALL } from "./seccomp.ts";

const isSupported = Deno.build.os === "linux" && Deno.build.arch === "x86_64";

function threadsTest(name: string, fn: () => void | Promise<void>): void {
  Deno.test({ name, ignore: !isSupported, fn });
}

const byNumber = (a: number, b: number) => a - b;

threadsTest("every thread makes the calls, in order, and tells what they returned", () => {
  const found = runOnAllThreads([
    { name: "gettid()", number: SYSCALL.gettid },
    { name: "close(-1)", number: SYSCALL.close, arguments: [-1], tolerated: [9] },
    { name: "getpid()", number: SYSCALL.getpid },
  ]);
  assert.deepEqual(
    found.map(({ thread }) => thread).sort(byNumber),
    [...listThreads().values()].sort(byNumber),
  );
  assert.ok(found.length > 2);
  for (const { thread, results } of found) assert.deepEqual(results, [thread, -9, Deno.pid]);
});

threadsTest("all six arguments reach the kernel", () => {
  using fd = Fd.memory("test", 8192);
  using all = new Mapping(8192, { fd });
  new Uint8Array(all.buffer)[4096] = 77;
  const found = runOnAllThreads([
    { name: "mmap()", number: SYSCALL.mmap, arguments: [0, 4096, PROT_READ, MAP_PRIVATE, fd.number, 4096] },
  ]);
  for (const { results } of found) {
    const pointer = Deno.UnsafePointer.create(BigInt(results[0]!))!;
    assert.equal(new Deno.UnsafePointerView(pointer).getUint8(), 77);
    assert.equal(libc().munmap(pointer, 4096n), 0);
  }
});

threadsTest("a call that fails is thrown with the thread that it failed on, after all have made it", () => {
  assert.throws(
    () =>
      runOnAllThreads([
        { name: "close(-1)", number: SYSCALL.close, arguments: [-1] },
        { name: "gettid()", number: SYSCALL.gettid },
      ]),
    (error: unknown) => {
      assert.ok(error instanceof SysError);
      assert.equal(error.code, "EBADF");
      assert.match(error.message, /^close\(-1\) on thread \d+ failed with EBADF/);
      return true;
    },
  );
  assert.throws(
    () => runOnAllThreads(Array.from({ length: 64 }, () => ({ name: "getpid()", number: SYSCALL.getpid }))),
    RangeError,
  );
  const tooMany = [{ name: "getpid()", number: SYSCALL.getpid, arguments: [1, 2, 3, 4, 5, 6, 7] }];
  assert.throws(() => runOnAllThreads(tooMany), RangeError);
});

threadsTest("the longest list of calls comes back in full", () => {
  const calls = Array.from({ length: 63 }, (_, index) => ({
    name: `lseek(${index})`,
    number: index % 2 === 0 ? SYSCALL.getpid : SYSCALL.gettid,
  }));
  for (const { thread, results } of runOnAllThreads(calls)) {
    assert.deepEqual(results, calls.map((_, index) => index % 2 === 0 ? Deno.pid : thread));
  }
});

threadsTest("threads that sleep in the kernel and threads that compute are served many times", async () => {
  using epoll = Fd.epoll();
  using event = Fd.event();
  epoll.watch(event);
  using memory = new Mapping(4096);
  const waits = Array.from(
    { length: 3 },
    () => libc().epoll_wait_async(epoll.number, memory.pointer, 1, 60_000),
  );
  const source = `postMessage(0); let n = 0; for (;;) n = (n * 31 + 7) | 0;`;
  const worker = new Worker(`data:text/javascript,${encodeURIComponent(source)}`, { type: "module" });
  await new Promise((resolve) => worker.onmessage = resolve);
  for (let round = 0; round < 100; round++) {
    const found = runOnAllThreads([{ name: "gettid()", number: SYSCALL.gettid }]);
    for (const { thread, results } of found) assert.equal(results[0], thread);
    assert.equal(new Set(found.map(({ thread }) => thread)).size, found.length);
  }
  worker.terminate();
  event.signal();
  await Promise.all(waits);
});

threadsTest("threads that are started meanwhile are served too", async () => {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      "eval",
      "--ext=ts",
      `import { runOnAllThreads, SYSCALL } from ${JSON.stringify(import.meta.resolve("./mod.ts"))};
      const start = () => new Worker("data:text/javascript,postMessage(0)", { type: "module" });
      const workers = Array.from({ length: 12 }, start);
      const ready = workers.map((worker) => new Promise((resolve) => worker.onmessage = resolve));
      runOnAllThreads([{ name: "prctl()", number: SYSCALL.prctl, arguments: [38, 1, 0, 0, 0] }]);
      await Promise.all(ready);
      const states = [...Deno.readDirSync("/proc/self/task")].map(({ name }) =>
        Deno.readTextFileSync("/proc/self/task/" + name + "/status").match(/NoNewPrivs:\\s*(\\d)/)[1]);
      console.log(states.length > 12, states.every((state) => state === "1"));
      Deno.exit(0);`,
    ],
    stdin: "null",
    env: { NO_COLOR: "1" },
  }).output();
  assert.equal(new TextDecoder().decode(stdout), "true true\n", new TextDecoder().decode(stderr));
  assert.equal(code, 0);
});

threadsTest("a thread that blocks the signal is named", () => {
  const library = Deno.dlopen("libc.so.6", {
    pthread_sigmask: { parameters: ["i32", "buffer", "pointer"], result: "i32" },
    gettid: { parameters: [], result: "i32" },
  });
  const { pthread_sigmask, gettid } = library.symbols;
  const thread = gettid();
  const set = new BigUint64Array(16);
  set[0] = 1n << BigInt(ALL_THREADS_SIGNAL - 1);
  const calls = [{ name: "gettid()", number: SYSCALL.gettid }];
  // SIG_BLOCK, and SIG_UNBLOCK.
  assert.equal(pthread_sigmask(0, new Uint8Array(set.buffer), null), 0);
  try {
    assert.throws(
      () => runOnAllThreads(calls, 100),
      new RegExp(
        `threads ${thread} as they do not answer signal ${ALL_THREADS_SIGNAL}: see whether they block it`,
      ),
    );
  } finally {
    assert.equal(pthread_sigmask(1, new Uint8Array(set.buffer), null), 0);
  }
  library.close();
  assert.ok(runOnAllThreads(calls).some((found) => found.thread === thread));
});
