import assert from "node:assert/strict";
import { probeKvm } from "../vmm/kvm/probe.ts";
import { finish, Place, realTest } from "./support.ts";

const QEMU = ["qemu-system-x86_64", "apt-get"];

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

realTest(
  "mistakes in a declaration are all reported, with their lines, before anything changes",
  [],
  async () => {
    await using place = new Place();
    await place.declare(`
    const lan = network({ cidr: "10.20.0.0/24" });
    const shared = disk({ size: "1GiB" });
    const a = vm({ memory: "9000GiB", image: debian({ sweet: "bookworm" }), nics: { eth0: lan.nic({ ip: "10.20.0.9" }) }, disks: { x: shared } });
    const b = vm({ memory: "1GB", image: debian(), memroy: 1, nics: { eth0: lan.nic({ ip: "10.20.0.9" }) } });
    return { lan, shared, a, b };
  `);
    const bad = await place.run(["apply", "--yes"], { code: 1 });
    assert.match(
      bad.stderr,
      /a\.image\.sweet: Unknown field \\(did you mean "suite"\\?\\)|a\.image\.sweet: Unknown field/,
    );
    assert.match(bad.stderr, /b\.memory: Cannot read "1GB" as a size: .*\(.*infra\.ts:\d+\)/);
    assert.match(bad.stderr, /b\.memroy: Unknown field \(did you mean "memory"\?\)/);
    assert.doesNotMatch(bad.stderr, /\n\s+at /);
    await place.declare(`
    const lan = network({ cidr: "10.20.0.0/24" });
    const shared = disk({ size: "1GiB" });
    const a = vm({ memory: "9000GiB", image: debian(), nics: { eth0: lan.nic({ ip: "10.20.0.9" }) }, disks: { x: shared } });
    const b = vm({ memory: "1GiB", image: debian(), nics: { eth0: lan.nic({ ip: "10.20.0.9" }), eth1: lan.nic({ ip: "10.20.1.9" }) }, disks: { y: shared } });
    return { lan, shared, a, b };
  `);
    const world = await place.run(["apply", "--yes"], { code: 1 });
    assert.match(world.stderr, /a\.memory: Memory is more than this host has/);
    assert.match(world.stderr, /b\.nics\.eth0\.ip: Address is used by "a\.nics\.eth0\.ip" too/);
    assert.match(
      world.stderr,
      /b\.nics\.eth1\.ip: Address must be in its network 10\.20\.0\.0\/24: current value is "10\.20\.1\.9"/,
    );
    assert.match(world.stderr, /b\.disks\.y: Disk "shared" is used by "a\.disks\.x" too/);
    assert.deepEqual(await place.leftovers(), []);

    await place.declare("return { a: (undefined as unknown as { b: { c: number } }).b.c };");
    const thrown = await place.run(["plan"], { code: 1 });
    assert.match(thrown.stderr, /Error: TypeError: Cannot read properties of undefined .*infra\.ts:\d+\)/);
    assert.doesNotMatch(thrown.stderr, /\n\s+at /);
    const unknown = await place.run(["plan", "--nope"], { code: 1 });
    assert.match(unknown.stderr, /Unknown flag "--nope"/);
  },
);

realTest(
  "what an emulated machine cannot be is refused by validate and plan, all of it at once",
  [],
  async () => {
    await using place = new Place();
    const declare = (cpus: string, engine: string) =>
      place.declare(`
    const a = vm({ ${cpus} memory: "2GiB", image: debian({ arch: "amd64" }), kernel: hostKernel(), engine: ${engine} });
    const b = vm({ memory: "1536MiB", maxMemory: "3GiB", image: image({ disk: { url: "http://127.0.0.1:1/disk", sha256: "${
        "0".repeat(64)
      }" } }), engine: ${engine} });
    const c = vm({ memory: "1GiB", image: debian(), kernel: debianKernel({ arch: "amd64" }), engine: ${engine} });
    const d = vm({ memory: "1GiB", image: debian(), engine: ${engine} });
    return { a, b, c, d };
  `);
    const problems = [
      /^Error: a\.cpus: Engine "emulated" gives a machine one vCPU: leave cpus out, .*value is 2 /m,
      /^Error: a\.memory: Engine "emulated" gives a machine less than 2GiB .*value is "2GiB" /m,
      /^Error: a\.image\.arch: Engine "emulated" gives a machine a 32-bit processor: .*"amd64" /m,
      /^Error: a\.kernel: Engine "emulated" .* cannot run the host's kernel: leave kernel out/m,
      /^Error: b\.maxMemory: Engine "emulated" .*value is "3GiB" /m,
      /^Error: b\.image: Engine "emulated" gives a machine no firmware .*: give it a kernel, or /m,
      /^Error: c\.kernel\.arch: Engine "emulated" .* \(\S*infra\.ts:\d+\)$/m,
    ];
    await declare("cpus: 2,", "ht.emulated()");
    for (const command of [["validate"], ["plan"], ["apply", "--yes"]]) {
      const { stderr } = await place.run(command, { code: 1 });
      for (const problem of problems) assert.match(stderr, problem);
      assert.equal(stderr.match(/^Error: /gm)?.length, problems.length, stderr);
    }
    assert.equal(JSON.parse((await place.run(["validate", "--json"], { code: 1 })).stdout).error_count, 7);
    assert.deepEqual(await place.leftovers(), []);
    // Other engines can, and what is derived fits.
    await declare("cpus: 2,", "ht.auto()");
    await place.run(["validate"]);
    await place.declare('{ a: vm({ memory: "1536MiB", image: debian(), engine: ht.emulated() }) }');
    await place.run(["plan", "--out=p"]);
    assert.match((await place.run(["show", "--json", "p"])).stdout, /"maxMemory":"2047MiB"/);
  },
);

realTest("a missing QEMU is said before anything is made, and how to install it", ["apt-get"], async () => {
  await using place = new Place();
  await place.declare(
    '{ a: vm({ memory: "96MiB", image: debian(), engine: qemu({ binary: "/no/such/qemu" }) }) }',
  );
  for (const command of [["plan"], ["apply", "--yes"]]) {
    const missing = await place.run(command, { code: 1 });
    assert.match(missing.stderr, /Cannot run "\/no\/such\/qemu".*apt-get install qemu-system-x86/);
  }
  assert.deepEqual(await place.leftovers(), []);
});

const hasKvm = probeKvm().isUsable;

Deno.test({
  name: `auto() says why no engine will do${hasKvm ? " (skipped: /dev/kvm runs code here)" : ""}`,
  ignore: hasKvm,
  async fn() {
    await using place = new Place();
    await place.declare('{ a: vm({ memory: "96MiB", cpus: 2, image: debian() }) }');
    const env = { PATH: await withoutQemu(place), DENO_DIR: `${place.folder}/deno` };
    const automatic = await place.run(["apply", "--yes"], { code: 1, env });
    assert.match(
      automatic.stderr,
      /no engine can run it here: kvm: .*; qemu: .*apt-get install qemu-system-x86.*; emulated: .* one vCPU/,
    );
    assert.deepEqual(await place.leftovers(), []);
    assert.equal(await Deno.stat(`${place.folder}/.hypertopia`).then(() => true, () => false), false);
    const doctor = await place.run(["doctor"], { env });
    assert.match(
      doctor.stdout,
      /missing +qemu[^]*works +emulated[^]*auto\(\) takes emulated, .*\n.*is slow.*apt-get install qemu-system-x86/,
    );
    const json = JSON.parse((await place.run(["doctor", "--json"], { env })).stdout);
    assert.equal(json.auto, "emulated");
    // Nobody pays for an emulator that does not run.
    assert.deepEqual([...Deno.readDirSync(`${env.DENO_DIR}/npm`)], []);
  },
});

/** A folder with the host's programs, but QEMU's. */
async function withoutQemu(place: Place): Promise<string> {
  const tools = `${place.folder}/bin`;
  await Deno.mkdir(tools);
  for (const folder of ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]) {
    for await (const entry of Deno.readDir(folder)) {
      if (entry.name.startsWith("qemu")) continue;
      await Deno.symlink(`${folder}/${entry.name}`, `${tools}/${entry.name}`).catch(() => {});
    }
  }
  return tools;
}

realTest("a QEMU that dies at start is explained, and so is a port in use", QEMU, async () => {
  await using place = new Place();
  await place.declare(
    '{ a: vm({ memory: "96MiB", image: debian(), engine: qemu({ extraArguments: ["-device", "nonsense"] }) }) }',
  );
  const bad = await place.run(["apply", "--yes"], { code: 1 });
  assert.match(bad.stderr, /Cannot create "a" as Cannot start "a" as QEMU failed: .*nonsense/);
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr as Deno.NetAddr;
  await place.declare(`
    const lan = network({ cidr: "10.20.0.0/24" });
    return { lan, a: vm({ memory: "96MiB", image: debian(), nics: { eth0: lan.nic({ forwards: { x: { guest: 80, host: ${port} } } }) } }) };
  `);
  const used = await place.run(["apply", "--yes"], { code: 1 });
  assert.match(
    used.stderr,
    new RegExp(`port ${port} of 127\\.0\\.0\\.1 is in use: choose another host port`),
  );
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.leftovers(), []);
});

realTest(
  "a kernel that panics and a probe that never succeeds leave the machine on record, with the console's end shown",
  QEMU,
  async () => {
    await using place = new Place();
    await place.declare(
      '{ a: vm({ memory: "96MiB", image: debian(), cmdline: "rdinit=/nope loglevel=7 root=/dev/none" }) }',
    );
    const panic = await place.run(["apply", "--yes"], { code: 1 });
    assert.match(
      panic.stderr,
      /the machine crashed \(Kernel panic - not syncing: .*its console ends with:\n[^]*\| .*panic/,
    );
    assert.equal((await place.run(["state", "list"])).stdout, "a\n");
    const drift = await place.run(["plan"]);
    assert.match(drift.stdout, /power running → crashed/);

    await place.declare(
      '{ a: vm({ memory: "96MiB", image: debian(), command: "echo last-words >/dev/console", ready: tcp(81, { timeout: "6s" }) }) }',
    );
    const never = await place.run(["apply", "--yes"], { code: 1 });
    assert.match(
      never.stderr,
      /it is not ready after 6s: TCP port 81 failed last as nothing listens on it; its console ends with:\n[^]*last-words/,
    );
    assert.equal((await place.processes()).length, 1);
    assert.match((await place.run(["plan"])).stdout, /was not ready yet/);
    // What it waits for appears: the next apply only waits again.
    await place.run(["exec", "a", "--", "sh", "-c", "httpd -p 81 -h /"]);
    const again = await place.run(["apply", "--yes"]);
    assert.match(again.stdout, /a: Updated/);
    await place.run(["plan", "--detailed-exitcode"]);
    await place.run(["destroy", "--yes"]);
  },
);

realTest("a QEMU that dies while its machine boots ends the wait at once", QEMU, async () => {
  await using place = new Place();
  await place.declare('{ a: vm({ memory: "96MiB", image: debian(), ready: onConsole("never printed") }) }');
  const child = place.spawn(["apply", "--yes"]);
  const result = finish(child, ["apply"], 1);
  while ((await place.processes()).length === 0) await delay(50);
  await delay(1000);
  for (const pid of await place.processes()) Deno.kill(pid, "SIGKILL");
  assert.match(
    (await result).stderr,
    /the machine ended \(QEMU ended abnormally: it crashed or was killed.*\) before it was ready/,
  );
  await place.run(["destroy", "--yes"]);
});

realTest("Ctrl-C during an apply stops at a safe point, and the next one continues", QEMU, async () => {
  for (const wait of [150, 400, 1500, 2500]) {
    await using place = new Place();
    await place.declare('{ a: vm({ memory: "96MiB", image: debian() }), b: disk({ size: "1MiB" }) }');
    const child = place.spawn(["apply", "--yes"]);
    const result = finish(child, ["apply"], null);
    await delay(wait);
    try {
      // Twice at once, as from npx, is one Ctrl-C.
      child.kill("SIGINT");
      child.kill("SIGINT");
    } catch {
      // It was faster.
    }
    const { code, stderr } = await result;
    assert.ok([0, 1, 130].includes(code), `status ${code}: ${stderr}`);
    assert.doesNotMatch(stderr, /\n\s+at /);
    await place.run(["apply", "--yes"]);
    await place.run(["exec", "a", "--", "true"]);
    await place.run(["plan", "--detailed-exitcode"]);
    await place.run(["destroy", "--yes"]);
    assert.deepEqual(await place.leftovers(), []);
  }
});

realTest("two applies at once: the second is told who holds the lock, or waits for it", QEMU, async () => {
  await using place = new Place();
  await place.declare('{ a: vm({ memory: "96MiB", image: debian() }) }');
  const first = finish(place.spawn(["apply", "--yes"]), ["apply"], 0);
  while ((await place.processes()).length === 0) await delay(20);
  const second = await place.run(["apply", "--yes"], { code: 1 });
  assert.match(
    second.stderr,
    /Cannot lock state .* has held it for "apply" since .*--lock-timeout=DURATION.*force-unlock/,
  );
  const third = await place.run(["apply", "--yes", "--lock-timeout=60s"]);
  assert.match(third.stdout, /No changes/);
  await first;
  await place.run(["destroy", "--yes"]);
});

realTest(
  "a saved plan is applied as it is, and refused when it is stale, edited, truncated or of another stack",
  QEMU,
  async () => {
    await using place = new Place();
    await place.declare('{ a: disk({ size: "1MiB" }), b: disk({ size: "1MiB" }) }');
    await place.run(["plan", "--out=p"]);
    assert.match((await place.run(["show", "p"])).stdout, /Plan: 2 to add/);
    const json = JSON.parse((await place.run(["show", "--json", "p"])).stdout);
    assert.deepEqual(
      json.resource_changes.map((each: { change: { actions: string[] } }) => each.change.actions),
      [["create"], ["create"]],
    );
    await place.run(["apply", "p"]);
    assert.equal((await place.leftovers()).length, 2);
    assert.match((await place.run(["apply", "p"], { code: 1 })).stderr, /stale: state was changed since/);

    await place.declare('{ a: disk({ size: "2MiB" }), b: disk({ size: "1MiB" }) }');
    await place.run(["plan", "--out=p"]);
    await place.declare('{ a: disk({ size: "3MiB" }), b: disk({ size: "1MiB" }) }');
    assert.match(
      (await place.run(["apply", "p"], { code: 1 })).stderr,
      /stale: the declarations were changed since/,
    );
    const text = await Deno.readTextFile(`${place.folder}/p`);
    await Deno.writeTextFile(`${place.folder}/p`, text.replace("2MiB", "9MiB"));
    assert.match((await place.run(["apply", "p"], { code: 1 })).stderr, /it was edited/);
    await Deno.writeTextFile(`${place.folder}/p`, text.slice(0, 100));
    assert.match((await place.run(["apply", "p"], { code: 1 })).stderr, /it is truncated/);
    await Deno.writeTextFile(
      `${place.folder}/other.ts`,
      (await Deno.readTextFile(`${place.folder}/infra.ts`)).replace('stack("test"', 'stack("other"'),
    );
    await Deno.writeTextFile(`${place.folder}/p`, text);
    assert.match(
      (await place.run(["apply", "p"], { code: 1, file: "other.ts" })).stderr,
      /it is a plan for stack "test": current stack is "other"/,
    );
    assert.match(
      (await place.run(["apply", "p", "--target=a"], { code: 1 })).stderr,
      /"--target" goes with making a plan/,
    );
    await place.run(["destroy", "--yes"]);
  },
);

realTest("a wrong checksum is refused, and an interrupted download is continued", QEMU, async () => {
  await using place = new Place();
  const content = crypto.getRandomValues(new Uint8Array(50_000));
  const digest = Array.from(
    new Uint8Array(await crypto.subtle.digest("SHA-256", content)),
    (byte) => byte.toString(16).padStart(2, "0"),
  ).join("");
  const ranges: (string | null)[] = [];
  let cut = true;
  await using server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, (request) => {
    const range = request.headers.get("range");
    ranges.push(range);
    const start = Number(/bytes=(\d+)-/.exec(range ?? "")?.[1] ?? 0);
    const rest = content.subarray(start);
    if (!cut) return new Response(rest, { status: start > 0 ? 206 : 200 });
    cut = false;
    const body = new ReadableStream({
      async start(controller) {
        controller.enqueue(rest.subarray(0, 20_000));
        await delay(200);
        controller.error(new Error("cut"));
      },
    });
    return new Response(body, { headers: { "content-length": String(rest.length) } });
  });
  const url = `http://127.0.0.1:${server.addr.port}/disk.raw`;
  const cache = { HYPERTOPIA_CACHE: `${place.folder}/cache` };
  const body = (sha256: string) =>
    `{ a: vm({ memory: "96MiB", image: image({ disk: { url: "${url}", sha256: "${sha256}" }, format: "raw" }), ready: [], shutdownTimeout: "1s" }) }`;
  await place.declare(body("0".repeat(64)));
  cut = false;
  const wrong = await place.run(["apply", "--yes"], { code: 1, env: cache });
  assert.match(wrong.stderr, /its checksum is wrong: 0+ is wanted and [0-9a-f]{64} was found/);
  assert.deepEqual(await place.processes(), []);
  cut = true;
  ranges.length = 0;
  await place.declare(body(digest));
  await place.run(["apply", "--yes"], { env: cache });
  assert.equal(ranges.length, 2);
  assert.match(ranges[1] ?? "", /^bytes=\d+-$/);
  assert.deepEqual(await Deno.readFile(`${place.folder}/cache/downloads/${digest}`), content);
  await place.run(["destroy", "--yes"], { env: cache });
});

/** A file system that is soon full; needs the rights of root. */
async function withSmallDisk(size: string, run: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "ht-" });
  const mount = await new Deno.Command("mount", {
    args: ["-t", "tmpfs", "-o", `size=${size}`, "tmpfs", folder],
  }).output();
  assert.ok(mount.success, new TextDecoder().decode(mount.stderr));
  try {
    await run(folder);
  } finally {
    await new Deno.Command("umount", { args: [folder] }).output();
    await Deno.remove(folder);
  }
}

const isRoot = Deno.uid() === 0;

Deno.test({
  name: `a full disk is said while building an image and while writing state${
    isRoot ? "" : " (skipped: mounting needs root)"
  }`,
  ignore: !isRoot,
  async fn() {
    await withSmallDisk("40m", async (folder) => {
      await using place = new Place();
      await place.declare('{ a: vm({ memory: "96MiB", image: debian() }) }');
      const env = { HYPERTOPIA_CACHE: `${folder}/cache` };
      const full = await place.run(["apply", "--yes"], { code: 1, env });
      assert.match(full.stderr, /space|disk is full/i);
      assert.doesNotMatch(full.stderr, /\n\s+at /);
      const partial = [...Deno.readDirSync(`${folder}/cache`)].map((entry) => entry.name);
      assert.ok(
        !partial.includes("kernels") ||
          ![...Deno.readDirSync(`${folder}/cache/kernels`)].some((entry) => entry.name.endsWith(".part")),
      );
      await place.run(["apply", "--yes"]);
      await place.run(["destroy", "--yes"]);
    });
    await withSmallDisk("300k", async (folder) => {
      await using place = new Place();
      const many = (count: number) => `{ all: range(${count}).map(() => disk({ size: "1MiB" })) }`;
      await place.declare(many(2));
      const state = `--state=${folder}/s.db`;
      await place.run(["apply", "--yes", state]);
      await place.declare(many(400));
      const full = await place.run(["apply", "--yes", state], { code: 1 });
      assert.match(
        full.stderr,
        /Cannot (write|back up|lock|open) state ".*" as the disk is full: free some space/,
      );
      assert.doesNotMatch(full.stderr, /\n\s+at /);
      const bigger = await new Deno.Command("mount", { args: ["-o", "remount,size=20m", folder] }).output();
      assert.ok(bigger.success);
      await place.run(["apply", "--yes", state]);
      assert.equal((await place.leftovers()).length, 400);
      await place.run(["destroy", "--yes", state]);
      assert.deepEqual(await place.leftovers(), []);
    });
  },
});
