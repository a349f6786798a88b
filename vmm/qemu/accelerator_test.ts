import assert from "node:assert/strict";
import {
  type AcceleratorReport,
  probeAccelerator,
  probeAccelerators,
  probePayload,
  QemuMissingError,
} from "./accelerator.ts";

const ABSENT_PROGRAM = "hypertopia-there-is-no-such-qemu";
/** For machines far busier than the one the default is meant for. */
const PATIENT = { deadline: 30_000 };

const hasQemu = await canRun("qemu-system-x86_64");
const isRoot = Deno.uid() === 0;

Deno.test("probePayload() fills 64 KiB, anew each time", () => {
  const image = probePayload();
  assert.ok(image instanceof Uint8Array);
  assert.equal(image.length, 65536);
  const again = probePayload();
  assert.notEqual(image.buffer, again.buffer);
  assert.deepEqual(image, again);
});

Deno.test("probePayload() has a reset vector that jumps to the real mode code", () => {
  const image = probePayload();
  const view = new DataView(image.buffer);
  assert.equal(view.getUint8(0xfff0), 0xe9);
  const target = (0xfff3 + view.getUint16(0xfff1, true)) & 0xffff;
  assert.equal(target, 0xf000);
  assert.equal(view.getUint8(target), 0xfa);
});

Deno.test("probePayload() has a descriptor table with accessed segments where lgdt looks for it", () => {
  const view = new DataView(probePayload().buffer);
  assert.equal(view.getUint16(0xf0f8, true), 4 * 8 - 1);
  assert.equal(view.getUint32(0xf0fa, true), 0xff100);
  assert.equal(view.getBigUint64(0xf100, true), 0n);
  assert.equal(view.getBigUint64(0xf108, true), 0x00cf9b000000ffffn);
  assert.equal(view.getBigUint64(0xf110, true), 0x00cf93000000ffffn);
  assert.equal(view.getBigUint64(0xf118, true), 0x00af9b000000ffffn);
});

Deno.test("probePayload() has 64-bit code that fits the 512 bytes copied to memory", () => {
  const image = probePayload();
  const code = image.subarray(0xf200, 0xf400);
  const end = code.lastIndexOf(0xf4);
  assert.ok(end > 0);
  assert.ok(image.subarray(0xf200 + end + 1, 0xfff0).every((byte) => byte === 0xcc));
});

Deno.test(named("probeAccelerator() finds tcg usable", hasQemu), { ignore: !hasQemu }, async () => {
  const report = await probeAccelerator("tcg", PATIENT);
  assert.equal(report.usable, true, report.detail);
  assert.ok(report.milliseconds !== undefined && report.milliseconds > 0);
  assert.match(report.detail, /^long mode loop of 50,000,000 rounds in [\d,]+ ms$/);
});

Deno.test(
  named("probeAccelerators() reports on kvm either way, then on tcg", hasQemu),
  { ignore: !hasQemu },
  async () => {
    const reports = await probeAccelerators();
    assert.deepEqual(reports.map(({ name }) => name), ["kvm", "tcg"]);
    for (const report of reports) {
      assert.notEqual(report.detail, "");
      assert.equal(report.milliseconds !== undefined, report.usable);
    }
  },
);

Deno.test(
  named("probeAccelerator() says how far guest code got when time is up", hasQemu),
  { ignore: !hasQemu },
  async () => {
    const report = await probeAccelerator("tcg", { deadline: 1 });
    assert.equal(report.usable, false);
    assert.match(report.detail, /^(QEMU had run no guest code|guest code) .* ms/);
  },
);

Deno.test("probeAccelerator() throws QemuMissingError when there is no such program", async () => {
  const error = await rejection(probeAccelerator("tcg", { binary: ABSENT_PROGRAM }));
  assert.ok(error instanceof QemuMissingError);
  assert.equal(error.binary, ABSENT_PROGRAM);
  assert.equal(error.name, "QemuMissingError");
  assert.match(error.message, /"hypertopia-there-is-no-such-qemu".*apt-get install qemu-system-x86$/);
  assert.ok(error.cause instanceof Deno.errors.NotFound);
});

Deno.test("probeAccelerators() throws QemuMissingError even where kvm needs no program", async () => {
  const error = await rejection(probeAccelerators({ binary: "/nowhere/qemu", kvmDevice: "/nowhere/kvm" }));
  assert.ok(error instanceof QemuMissingError);
  assert.match(error.message, /there is no such file/);
});

Deno.test("probeAccelerator() rejects a deadline that leaves no time", async () => {
  for (const deadline of [0, -1, NaN]) {
    assert.ok(await rejection(probeAccelerator("tcg", { deadline })) instanceof RangeError);
  }
});

Deno.test("probeAccelerator() says that the kvm device is absent", async () => {
  const report = await probeAccelerator("kvm", { binary: ABSENT_PROGRAM, kvmDevice: "/nowhere/kvm" });
  assert.equal(report.usable, false);
  assert.match(report.detail, /^\/nowhere\/kvm is absent/);
});

Deno.test("probeAccelerator() says that the kvm device cannot be opened", async () => {
  const report = await probeAccelerator("kvm", { binary: ABSENT_PROGRAM, kvmDevice: "/" });
  assert.equal(report.usable, false);
  assert.match(report.detail, /^\/ cannot be opened: ./);
});

Deno.test(
  `probeAccelerator() says which group may open the kvm device${
    isRoot ? " (skipped: root may open any)" : ""
  }`,
  { ignore: isRoot },
  async () => {
    const kvmDevice = await Deno.makeTempFile();
    try {
      await Deno.chmod(kvmDevice, 0o060);
      const report = await probeAccelerator("kvm", { binary: ABSENT_PROGRAM, kvmDevice });
      assert.match(report.detail, /cannot be opened: permission denied; its group is \S+ and its mode 0060/);
    } finally {
      await Deno.remove(kvmDevice);
    }
  },
);

Deno.test("probeAccelerator() passes on the last line of a QEMU that fails", async () => {
  const report = await probeScript("echo first >&2; echo 'no such machine' >&2; exit 1", "kvm");
  assert.equal(report.usable, false);
  assert.match(report.detail, / opens, but QEMU failed with status 1: no such machine$/);
});

Deno.test("probeAccelerator() tells apart the ways in which guest code can fail", async () => {
  const outcomes: [script: string, detail: RegExp][] = [
    ["exit 3", /^QEMU failed with status 3 and no message$/],
    ["printf PL; exit 0", /^guest code crashed at cpuid and rdtsc in long mode$/],
    ["exit 0", /^guest code crashed at the first instructions$/],
    ["printf P; exit 35", /^the virtual processor has no long mode$/],
    ["printf PL.E; exit 37", /^guest code computed wrong sums$/],
    ["printf PL; exit 85", /^QEMU ended with status 85 before the guest did$/],
    ["printf PLXR; kill -SEGV $$", /^QEMU was ended by SIGSEGV at rdrand$/],
  ];
  for (const [script, detail] of outcomes) {
    const report = await probeScript(script, "tcg");
    assert.equal(report.usable, false);
    assert.match(report.detail, detail);
  }
});

Deno.test("probeAccelerator() accepts a guest that ran to its end", async () => {
  const report = await probeScript("printf PL...E; exit 85", "kvm");
  assert.equal(report.usable, true, report.detail);
  assert.ok(report.milliseconds !== undefined);
});

Deno.test("probeAccelerator() ends a QEMU whose guest kvm cannot emulate", async () => {
  const script = "printf PLX; echo 'KVM internal error. Suberror: 1' >&2; exec sleep 60";
  const report = await probeScript(script, "kvm");
  assert.equal(report.usable, false);
  assert.match(report.detail, /emulates guest code instruction by instruction and failed at xgetbv/);
  assert.match(report.detail, /a stock kernel would not boot/);
});

Deno.test("probeAccelerator() recognizes a guest that is too slow", async () => {
  const script = "printf PLXR...; exec sleep 60";
  const kvm = await probeScript(script, "kvm", { deadline: 500 });
  assert.equal(kvm.usable, false);
  assert.match(kvm.detail, /too slowly \(1,000,000 of 50,000,000 loop rounds in .* ms\): it is emulated/);
  const tcg = await probeScript(script, "tcg", { deadline: 500 });
  assert.match(tcg.detail, /this machine is too slow or too busy for it$/);
});

Deno.test("probeAccelerator() recognizes a guest that hangs", async () => {
  const stuck = await probeScript("printf PLXR; exec sleep 60", "tcg", { deadline: 500 });
  assert.match(stuck.detail, /^guest code had got no further than rdrand after [\d,]+ ms$/);
  const silent = await probeScript("exec sleep 60", "tcg", { deadline: 200 });
  assert.match(silent.detail, /^QEMU had run no guest code after [\d,]+ ms$/);
});

Deno.test("probeAccelerator() gives QEMU a private image and removes it", async () => {
  const script = 'for last; do :; done; stat -c "%a %s %n" "$last" >&2; exit 1';
  const { detail } = await probeScript(script, "tcg");
  const match = /: 600 65536 (\/.*)$/.exec(detail);
  assert.ok(match?.[1], detail);
  await assertAbsent(match[1]);
});

Deno.test("probeAccelerator() does nothing once aborted", async () => {
  const reason = new Error("no longer wanted");
  const options = { binary: ABSENT_PROGRAM, signal: AbortSignal.abort(reason) };
  assert.equal(await rejection(probeAccelerator("tcg", options)), reason);
});

Deno.test("probeAccelerator() leaves nothing behind when aborted", async () => {
  await withScript(recordingScript, async (binary, directory) => {
    const controller = new AbortController();
    const reason = new Error("no longer wanted");
    const probe = rejection(probeAccelerator("tcg", { binary, signal: controller.signal, ...PATIENT }));
    const [process, image] = await recorded(directory);
    controller.abort(reason);
    assert.equal(await probe, reason);
    await assertEnded(process);
    await assertAbsent(image);
  });
});

Deno.test("probeAccelerator() leaves nothing behind when the program exits meanwhile", async () => {
  await withScript(recordingScript, async (binary, directory) => {
    const program = `
      import { probeAccelerator } from "${import.meta.resolve("./accelerator.ts")}";
      probeAccelerator("tcg", { binary: "${binary}", deadline: 30000 });
      for await (const _ of Deno.stdin.readable);
      Deno.exit(7);
    `;
    const args = [
      "run",
      "--no-config",
      "--no-lock",
      "--no-check",
      "-A",
      `data:text/javascript,${encodeURIComponent(program)}`,
    ];
    const child = new Deno.Command(Deno.execPath(), { args, stdin: "piped" }).spawn();
    const [process, image] = await recorded(directory);
    await child.stdin.close();
    assert.equal((await child.status).code, 7);
    await assertEnded(process);
    await assertAbsent(image);
  });
});

/** A program that writes down its process and its last argument, and then takes its time. */
const recordingScript =
  'for last; do :; done; echo "$$ $last" > "$0.tmp"; mv "$0.tmp" "$0.record"; exec sleep 60';

/** Waits for what {@linkcode recordingScript} writes down. */
async function recorded(directory: string): Promise<[process: string, image: string]> {
  for (let attempt = 0; attempt < 1000; attempt++) {
    try {
      const [process, image] = (await Deno.readTextFile(`${directory}/qemu.record`)).trim().split(" ");
      assert.ok(process && image);
      return [process, image];
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
  throw new Error("Cannot find the record of a program that should have started");
}

/** Probes with a shell script in QEMU's place, and with a plain file in that of the kvm device. */
async function probeScript(
  script: string,
  name: "kvm" | "tcg",
  options: { deadline: number } = PATIENT,
): Promise<AcceleratorReport> {
  let report: AcceleratorReport | undefined;
  await withScript(script, async (binary) => {
    report = await probeAccelerator(name, { binary, kvmDevice: binary, ...options });
  });
  assert.ok(report);
  return report;
}

/** Makes a shell script in a directory of its own, for as long as it is used. */
async function withScript(
  script: string,
  use: (binary: string, directory: string) => Promise<void>,
): Promise<void> {
  const directory = await Deno.makeTempDir();
  try {
    const binary = `${directory}/qemu`;
    await Deno.writeTextFile(binary, `#!/bin/sh\n${script}\n`, { mode: 0o700 });
    await use(binary, directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

/** What a promise rejects with. */
async function rejection(promise: Promise<unknown>): Promise<unknown> {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new assert.AssertionError({ message: "Expected a rejection" });
}

/** Asserts that a process has ended; one whose new parent is slow to notice counts as ended. */
async function assertEnded(process: string): Promise<void> {
  let stat = "";
  // A kill takes effect a moment after it was sent.
  for (let attempt = 0; attempt < 500; attempt++) {
    try {
      stat = await Deno.readTextFile(`/proc/${process}/stat`);
    } catch {
      return;
    }
    if (/\) [ZX] /.test(stat)) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  assert.fail(`process ${process} still runs: ${stat}`);
}

/** Asserts that a path leads nowhere. */
async function assertAbsent(path: string): Promise<void> {
  assert.ok(await rejection(Deno.lstat(path)) instanceof Deno.errors.NotFound, `${path} is still there`);
}

async function canRun(program: string): Promise<boolean> {
  try {
    return (await new Deno.Command(program, { args: ["--version"], stdout: "null" }).output()).success;
  } catch {
    return false;
  }
}

function named(name: string, runs: boolean): string {
  return runs ? name : `${name} (skipped: qemu-system-x86_64 is not installed)`;
}
