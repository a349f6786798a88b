/**
 * What the contract of engines leaves out: domains beside those of other toolstacks, and what faults leave behind. Run in
 * the control domain of a Xen host on which nothing else runs: in the lab, or on such a host.
 */

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { Xen, Xenstore } from "../../ffi/xen/mod.ts";
import { debianBuilder } from "../../stdlib/mod.ts";
import { unpackKernel } from "../../vmm/images/kernel_image.ts";
import { DiskLock } from "../../vmm/devices/block_file.ts";
import { cpioArchive, hostPaths } from "../../vmm/mod.ts";
import { buildDomain, destroyDomain } from "../../vmm/xen/domain.ts";
import { launchDomain, sweepDomains, xenFiles } from "../../vmm/xen/launch.ts";
import { delay, findMachine, inGuest, waitForEnd } from "../contract.ts";
import { Place } from "../support.ts";

const MEBIBYTE = 2 ** 20;
/** How long a guest may take for a restart of its own, in milliseconds: longer, and it hangs. */
const RESTART_TIMEOUT = 300_000;
/** How domains of ours begin below `/vm`: "hypertop" in hexadecimal digits. */
const OURS = "68797065-7274-6f70-";
/** At how many moments `apply` is killed. */
const KILLS = 4;

/** A place that leaves no domain either, whatever went wrong in it. A symbolic link leads to it, as to many a home. */
class XenPlace extends Place {
  constructor() {
    super();
    Deno.mkdirSync(`${this.folder}/real`);
    Deno.symlinkSync(`${this.folder}/real`, this.home);
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    if ((await this.leftovers()).some((path) => path !== "network.lock")) {
      await this.run(["destroy", "--yes"], { code: null });
    }
    await super[Symbol.asyncDispose]();
  }

  /** Expects that `plan` finds this. */
  async hasDrift(pattern: RegExp): Promise<void> {
    assert.match((await this.run(["plan", "--detailed-exitcode"], { code: 2 })).stdout, pattern);
  }
}

/** Runs a program of the host, which must end well, and gives what it printed. */
async function host(program: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await new Deno.Command(program, { args, stdin: "null" }).output();
  const complaints = new TextDecoder().decode(stderr);
  assert.equal(code, 0, `"${program} ${args.join(" ")}": ${complaints}`);
  if (args[0] === "list") assert.equal(complaints, "");
  return new TextDecoder().decode(stdout);
}

interface Listed {
  readonly name: string;
  readonly domid: string;
  readonly memory: string;
  readonly cpus: string;
  readonly state: string;
}

/** All domains but the control domain, as another toolstack sees them. */
async function domains(): Promise<Listed[]> {
  return (await host("xl", "list")).trim().split("\n").slice(2).map((line) => {
    const [name, domid, memory, cpus, state] = line.split(/\s+/) as [string, string, string, string, string];
    return { name, domid, memory, cpus, state };
  });
}

async function children(path: string): Promise<string[]> {
  const { stdout } = await new Deno.Command("xenstore-list", { args: [path], stderr: "null" }).output();
  return new TextDecoder().decode(stdout).split("\n").filter((name) => name !== "").sort();
}

/** Everything on the host that is there for domains, sorted. */
async function inventory(): Promise<Readonly<Record<string, readonly string[]>>> {
  const backends = await children("/local/domain/0/backend");
  const served = backends.map(async (kind) =>
    (await children(`/local/domain/0/backend/${kind}`)).map((domid) => `${kind} of ${domid}`)
  );
  return {
    domains: (await domains()).map(({ name }) => name).sort(),
    numbers: (await children("/local/domain")).filter((domid) => domid !== "0"),
    kinds: (await children("/libxl")).filter((domid) => domid !== "0"),
    identities: (await children("/vm")).filter((uuid) => uuid.startsWith(OURS)),
    served: (await Promise.all(served)).flat().sort(),
    loops: (await host("losetup", "-a")).split("\n").filter((line) => line !== "")
      .map((line) => /\((.*)\)/.exec(line)![1]!).sort(),
    links: [...Deno.readDirSync("/sys/class/net")].map(({ name }) => name)
      .filter((name) => /^(ht-|vif)/.test(name)).sort(),
  };
}

const NOTHING = { domains: [], numbers: [], kinds: [], identities: [], served: [], loops: [], links: [] };

/** Expects that a place has left nothing on the host. */
async function assertGone(place: Place): Promise<void> {
  assert.deepEqual(await inventory(), NOTHING);
  assert.deepEqual(await place.processes(), []);
  // A lock cannot be removed without a race between those who wait for it.
  assert.deepEqual((await place.leftovers()).filter((path) => path !== "network.lock"), []);
}

/** Expects that there is exactly what one machine with a disk and a NIC needs. */
async function assertOne(place: Place): Promise<void> {
  const [domain, ...others] = await domains();
  assert.deepEqual(others, []);
  assert.match(`${domain?.name} ${domain?.state}`, /^test-web [r-][b-]-{4}$/);
  const domid = domain!.domid;
  const { identities, links, loops, served, ...rest } = await inventory();
  assert.deepEqual(rest, { domains: ["test-web"], numbers: [domid], kinds: [domid] });
  assert.equal(identities!.length, 1);
  assert.deepEqual(links!.map((name) => name.replace(/^ht-.*/, "a bridge")), ["a bridge", `vif${domid}.0`]);
  const files = await place.leftovers();
  const disks = files.filter((path) => path.endsWith(".raw")).map((path) => `${place.folder}/real/${path}`);
  assert.deepEqual(loops, disks);
  // Machines of other engines, and QEMU, see that it is in use.
  assert.throws(() => new DiskLock(disks[0]!, true), /another process writes to it/);
  assert.deepEqual([...new Set(served!.map((each) => each.split(" ").at(-1)))], [domid]);
  assert.equal((await place.processes()).length, 1);
}

const context = { cache: hostPaths().cache, signal: new AbortController().signal, report() {} };

/** A guest that says that it is there, and powers off when it is told to: its kernel, and its initramfs in a folder. */
async function smallGuest(folder: string): Promise<{ kernel: string; initramfs: string }> {
  const { kernel, busybox } = await debianBuilder.build({ type: "debian", suite: "bookworm" }, context);
  const script = "#!/busybox sh\necho the small guest is up\nwhile :; do /busybox sleep 1000; done\n";
  const poweroff = "#!/busybox sh\nexec /busybox poweroff -f\n";
  const initramfs = `${folder}/small.cpio`;
  await Deno.writeFile(
    initramfs,
    cpioArchive([
      { path: "/init", mode: 0o755, content: new TextEncoder().encode(script) },
      { path: "/busybox", mode: 0o755, content: await Deno.readFile(busybox!) },
      // The kernel runs it.
      { path: "/sbin/poweroff", mode: 0o755, content: new TextEncoder().encode(poweroff) },
      { path: "/dev/console", mode: 0o600, device: { type: "character", major: 5, minor: 1 } },
    ]),
  );
  return { kernel: kernel!.kernel, initramfs };
}

/** Declares a machine of {@linkcode smallGuest} with a disk and a NIC. */
async function declareSmall(place: Place, power = "running"): Promise<{ kernel: string; initramfs: string }> {
  const guest = await smallGuest(place.folder);
  await place.declare(`
    const lan = network({ cidr: "10.43.0.0/24", nat: false });
    const data = disk({ size: "16MiB" });
    const web = vm({
      memory: "96MiB",
      maxMemory: "96MiB",
      image: image({
        kernel: { path: "${guest.kernel}" }, initramfs: { path: "${guest.initramfs}" }, cmdline: "quiet",
      }),
      engine: ht.xen(),
      disks: { data: { disk: data } },
      nics: { eth0: lan.nic() },
      power: "${power}",
      ready: onConsole(/the small guest is up/),
    });
    return { lan, data, web };
  `);
  return guest;
}

const declaration = (options: { cpus?: number; engine?: string; port?: number; power?: string } = {}) => `
  const lan = network({ cidr: "10.42.0.0/24", nat: false });
  const data = disk({ size: "64MiB", filesystem: "ext4" });
  const web = vm({
    cpus: ${options.cpus ?? 1}, memory: "96MiB", image: debian(),
    engine: ht.xen(${options.engine ?? ""}),
    disks: { data: { disk: data, mount: "/data" } },
    nics: {
      eth0: lan.nic({
        ip: "10.42.0.10",
        forwards: { http: { guest: 80${options.port === undefined ? "" : `, host: ${options.port}`} } },
      }),
    },
    power: "${options.power ?? "running"}",
    command: "httpd -f -h /data",
    ready: tcp(80),
  });
  return { lan, data, web, url: text\`http://127.0.0.1:\${web.nics.eth0.forwards.http}/\` };
`;

function digest(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

Deno.test("a stock Debian guest lives its life, beside xl", async (test) => {
  await using place = new XenPlace();
  const step = async (name: string, fn: () => Promise<void>) => assert.ok(await test.step(name, fn), name);
  const web = () => findMachine(place, "xen", "web");
  const inWeb = async (script: string) => await inGuest(await web(), script);
  const bootId = async () => (await (await web()).guest.ping({ timeout: RESTART_TIMEOUT })).bootId;
  const domid = async () => Number((await domains())[0]!.domid);
  /** A guest that crashes or powers off does not answer. */
  const tell = async (script: string) => void await inWeb(`(sleep 1; ${script}) >/dev/null 2>&1 &`);
  const bytes = new Uint8Array(randomBytes(200_000));

  await step("xl sees it as healthy: its name, memory and vCPU, and devices that are connected", async () => {
    await place.declare(declaration({ engine: "{ maxCpus: 2 }" }));
    await place.run(["apply", "--yes"]);
    assert.match(await inWeb("uname -r; nproc; hostname"), /^6\.1\..*cloud-amd64\n1\nweb\n$/);
    await assertOne(place);
    assert.equal((await domains())[0]!.cpus, "1");
    const device = `/local/domain/${await domid()}/device`;
    const states = await host("xenstore-read", `${device}/vbd/51712/state`, `${device}/vif/0/state`);
    assert.equal(states, "4\n4\n");
  });

  await step("whole files pass by TCP over netback, both ways", async () => {
    const server = Deno.serve({ hostname: "10.42.0.1", port: 0, onListen() {} }, () => new Response(bytes));
    const address = `http://10.42.0.1:${server.addr.port}/`;
    const seen = await inWeb(`wget -qO /data/file ${address} && sync && sha256sum /data/file`);
    assert.equal(seen.slice(0, 64), digest(bytes));
    await server.shutdown();
    const url = (await place.run(["output", "url"])).stdout.trim();
    for (const base of [url, "http://10.42.0.10/"]) {
      const response = await fetch(`${base}file`);
      assert.equal(digest(new Uint8Array(await response.arrayBuffer())), digest(bytes));
    }
  });

  await step("weight, cap, pinning and vCPUs change live", async () => {
    const before = await bootId();
    assert.match(await host("xl", "sched-credit2", "-d", "test-web"), /test-web +\d+ +256 +0\n/);
    await place.declare(declaration({ engine: "{ maxCpus: 2, pin: [4000] }" }));
    const { stderr } = await place.run(["plan"], { code: 1 });
    assert.match(
      stderr,
      /Cannot run "web" as .*xen: its pin names the processor 4000, and the last one of this/,
    );
    const engine = "{ maxCpus: 2, weight: 512, cap: 80, pin: [0] }";
    await place.declare(declaration({ engine, cpus: 2 }));
    assert.match((await place.run(["plan"])).stdout, /~ web +live /);
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    assert.match(await host("xl", "sched-credit2", "-d", "test-web"), /test-web +\d+ +512 +80\n/);
    // Of one processor, the first is all.
    const pinned = /^nr_cpus +: 1$/m.test(await host("xl", "info")) ? "all" : "0";
    assert.match(
      await host("xl", "vcpu-list", "test-web"),
      new RegExp(`^test-web .* ${pinned} / all *$`, "m"),
    );
    assert.equal(await inWeb("nproc"), "2\n");
    assert.equal(await bootId(), before);
  });

  await step("how many vCPUs it can have takes a restart, and the disk is what it was", async () => {
    await place.declare(declaration({ cpus: 2 }));
    assert.match((await place.run(["plan"])).stdout, /~ web +reboot /);
    await place.run(["apply", "--yes"]);
    assert.equal(await inWeb("nproc; sha256sum /data/file"), `2\n${digest(bytes)}  /data/file\n`);
    await assertOne(place);
    assert.equal((await domains())[0]!.cpus, "2");
  });

  await step("xl shuts it down, which is drift, and apply starts it again", async () => {
    await inWeb("echo unwritten >/data/last");
    await host("timeout", "300", "xl", "shutdown", "-w", "test-web");
    await stopped(await web());
    await place.hasDrift(/~ web +vm +power running → stopped/);
    await place.declare(declaration({ engine: '{ crash: "restart" }' }));
    await place.run(["apply", "--yes"]);
    // What a guest had not flushed itself, its shutdown has.
    assert.equal(
      await inWeb("cat /data/last; sha256sum /data/file"),
      `unwritten\n${digest(bytes)}  /data/file\n`,
    );
    await assertOne(place);
  });

  await step("a guest that crashes comes back by itself where that is declared", async () => {
    const [before, number] = [await bootId(), await domid()];
    await tell("echo c >/proc/sysrq-trigger");
    const limit = AbortSignal.timeout(RESTART_TIMEOUT);
    while (await bootId() === before) {
      limit.throwIfAborted();
      await delay(200);
    }
    assert.notEqual(await domid(), number);
    await assertOne(place);
    await place.run(["plan", "--detailed-exitcode"]);
  });

  await step("else it is seen as crashed, and apply repairs it", async () => {
    const before = await bootId();
    await place.declare(declaration());
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    assert.equal(await bootId(), before);
    await tell("echo c >/proc/sysrq-trigger");
    await stopped(await web());
    await place.hasDrift(/~ web +vm +power running → crashed/);
    await place.run(["apply", "--yes"]);
    assert.equal(await inWeb("sha256sum /data/file"), `${digest(bytes)}  /data/file\n`);
    await assertOne(place);
  });

  await step(
    "without its keeper it goes on, and another one gets another port",
    async () => {
      const [before, url] = [await bootId(), (await place.run(["output", "url"])).stdout.trim()];
      await killKeeper(place);
      await place.hasDrift(/~ web +vm +power running → crashed/);
      using _other = Deno.listen({ hostname: "127.0.0.1", port: Number(new URL(url).port) });
      const free = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      const { port } = free.addr;
      free.close();
      await place.declare(declaration({ port }));
      await place.run(["apply", "--yes", "--max-disruption=live"]);
      assert.equal(await bootId(), before);
      const response = await fetch(`http://127.0.0.1:${port}/file`);
      assert.equal(digest(new Uint8Array(await response.arrayBuffer())), digest(bytes));
      await assertOne(place);
    },
  );

  await step("nor is its power cut when it is to be stopped without one", async () => {
    await inWeb("echo stopped >/data/last");
    await killKeeper(place);
    // Another one cannot have its port any more, and needs none.
    const url = (await place.run(["output", "url"])).stdout.trim();
    {
      using _other = Deno.listen({ hostname: "127.0.0.1", port: Number(new URL(url).port) });
      await place.declare(declaration({ power: "stopped" }));
      await place.run(["apply", "--yes"]);
    }
    assert.deepEqual({ ...await inventory(), links: [] }, NOTHING);
    await place.declare(declaration());
    await place.run(["apply", "--yes"]);
    assert.equal(await inWeb("cat /data/last"), "stopped\n");
  });

  await step("a guest that powers off is seen as stopped, and nothing of it is left but files", async () => {
    await tell("poweroff");
    await stopped(await web());
    await place.hasDrift(/~ web +vm +power running → stopped/);
    assert.deepEqual({ ...await inventory(), links: [] }, NOTHING);
    assert.deepEqual(await place.processes(), []);
  });

  await step("destroy leaves nothing", async () => {
    await place.run(["destroy", "--yes"]);
    await assertGone(place);
  });
});

/** The process of xenstored, and its program, beside which are Xen's others. */
async function xenstored(): Promise<{ readonly pid: number; readonly program: string }> {
  const pid = Number(await Deno.readTextFile("/run/xen/xenstored.pid"));
  return { pid, program: await Deno.readLink(`/proc/${pid}/exe`) };
}

/** Ends the process that keeps a machine's consoles, as a fault of its own would. */
async function killKeeper(place: Place): Promise<void> {
  const [keeper, ...others] = await place.processes(/keeper_main/);
  assert.deepEqual(others, []);
  Deno.kill(keeper!, "SIGKILL");
  await waitForEnd([keeper!]);
}

/** Waits until nothing runs a machine any more. */
async function stopped(machine: { status(): Promise<{ state: string }> }): Promise<void> {
  const limit = AbortSignal.timeout(RESTART_TIMEOUT);
  while ((await machine.status()).state === "running" || (await domains()).length > 0) {
    limit.throwIfAborted();
    await delay(200);
  }
}

Deno.test("a domain that others have made is told of, keeps its name, and is never touched", async () => {
  await using place = new XenPlace();
  const { kernel, initramfs } = await declareSmall(place);
  const configuration = `${place.folder}/xl.cfg`;
  const entries = { name: "test-web", type: "pvh", memory: 96, kernel, ramdisk: initramfs };
  await Deno.writeTextFile(
    configuration,
    Object.entries(entries).map(([key, value]) => `${key} = ${JSON.stringify(value)}\n`).join(""),
  );
  // xl waits for whom it leaves consoles to.
  const { program } = await xenstored();
  const daemon = new Deno.Command(program.replace(/[^/]*$/, "xenconsoled"), {
    args: ["-i"],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
  try {
    await host("xl", "create", "-p", configuration);
    const before = [await domains(), await host("xenstore-ls", "/local/domain"), await inventory()];
    assert.equal(before[0]!.length, 1);
    const { stdout } = await place.run(["doctor"], { code: null });
    assert.match(stdout, /works +xen .*, 1 domains? of others/);
    const { stderr } = await place.run(["apply", "--yes"], { code: 1 });
    const { domid } = (before[0] as Listed[])[0]!;
    assert.match(
      stderr,
      new RegExp(`Cannot build the domain "test-web" as domain ${domid}, .* has that name: `),
    );
    assert.deepEqual(await place.processes(), []);
    assert.deepEqual(
      [await domains(), await host("xenstore-ls", "/local/domain"), await inventory()],
      before,
    );
    await place.run(["destroy", "--yes"]);
    assert.deepEqual(
      [await domains(), await host("xenstore-ls", "/local/domain"), await inventory()],
      before,
    );
    await host("xl", "destroy", "test-web");
  } finally {
    daemon.kill("SIGKILL");
    await daemon.status;
  }
  await assertGone(place);
});

Deno.test("apply is killed at many moments, and another one repairs what it left", async (test) => {
  await using place = new XenPlace();
  await declareSmall(place);
  /** Starts `apply`, which says what it does. */
  const apply = (): {
    child: Deno.ChildProcess;
    says: (words: string) => Promise<void>;
    end: Promise<void>;
  } => {
    const child = place.spawn(["apply", "--yes"]);
    let seen = "";
    let isOver = false;
    const drain = async (stream: ReadableStream<Uint8Array<ArrayBuffer>>) => {
      for await (const chunk of stream.pipeThrough(new TextDecoderStream())) seen += chunk;
    };
    const end = Promise.all([drain(child.stdout), drain(child.stderr)]).then(() => void (isOver = true));
    const says = async (words: string) => {
      while (!seen.includes(words)) {
        assert.ok(!isOver, `it never says "${words}": ${seen}`);
        await delay(10);
      }
    };
    return { child, says, end };
  };

  // Undisturbed, so that the moments are spread over what there is to be disturbed.
  const undisturbed = apply();
  await undisturbed.says("building the domain");
  const started = performance.now();
  await undisturbed.says("waiting for");
  const whole = performance.now() - started;
  await undisturbed.says("Apply is complete");
  await undisturbed.end;
  await assertOne(place);
  await place.run(["destroy", "--yes"]);
  await assertGone(place);

  for (let kill = 0; kill < KILLS; kill++) {
    // Most happens at the beginning.
    const after = Math.round(whole * (kill / (KILLS - 1)) ** 2);
    const passed = await test.step(`${after} ms after it began to build the domain`, async () => {
      const { child, says, end } = apply();
      await says("building the domain");
      await delay(after);
      try {
        child.kill("SIGKILL");
      } catch (error) {
        // This one was faster, and has ended.
        if (!(error instanceof TypeError)) throw error;
      }
      await child.status;
      await end;
      // What a killed command has left is removed without being repaired first, too.
      if (kill % 3 === 0) {
        await place.run(["apply", "--yes"]);
        await assertOne(place);
      }
      await place.run(["destroy", "--yes"]);
      await assertGone(place);
    });
    assert.ok(passed);
  }
});

Deno.test("a domain that was built and never let run is made anew", async () => {
  await using place = new XenPlace();
  await declareSmall(place);
  await place.run(["apply", "--yes"]);
  const machine = await findMachine(place, "xen", "web");
  const spec = (await machine.spec())!;
  await machine.kill();
  {
    using xen = Xen.open();
    using xenstore = await Xenstore.connect();
    // Whoever builds it dies just before.
    const dying = new Proxy(xen, {
      get(target, name) {
        const value = Reflect.get(target, name, target);
        return name === "unpause" ? () => {} : typeof value === "function" ? value.bind(target) : value;
      },
    });
    const paths = { ...hostPaths(), data: place.home };
    await launchDomain({ xen: dying, xenstore, paths }, spec, xenFiles(paths, spec.id), {});
  }
  assert.match((await domains())[0]!.state, /p/);
  await place.hasDrift(/~ web +vm +power running → stopped/);
  await place.run(["apply", "--yes"]);
  await assertOne(place);
  await place.run(["destroy", "--yes"]);
  await assertGone(place);
});

Deno.test("domains that come and go leave all memory as it was", comeAndGo);

async function comeAndGo(): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "ht-" });
  try {
    using xen = Xen.open();
    using xenstore = await Xenstore.connect();
    const guest = await smallGuest(folder);
    const kernel = await unpackKernel(guest.kernel, context);
    const idOf = (index: number) => `c0ffee00000000${index.toString(16).padStart(2, "0")}`;
    const build = async (index: number) => {
      const { domid } = await buildDomain(xen, xenstore, {
        id: idOf(index),
        name: `many-${index}`,
        cpus: 1,
        maxCpus: 1,
        memory: 64 * MEBIBYTE,
        maxMemory: 64 * MEBIBYTE,
        kernel,
        kernelName: guest.kernel,
        initramfs: [guest.initramfs],
        commandLine: "console=hvc0 quiet",
        disks: [],
        networks: [],
        furtherConsoles: 1,
      });
      return xen.domain(domid)!;
    };
    const free = xen.physicalInfo().freePages;
    for (let index = 0; index < 20; index++) await destroyDomain(xen, xenstore, await build(index));
    assert.equal(xen.physicalInfo().freePages, free);
    const all = [];
    for (let index = 0; index < 10; index++) all.push(await build(index));
    const names = (await domains()).map(({ name }) => name).sort();
    assert.deepEqual(names, all.map((_, index) => `many-${index}`));
    await Promise.all(all.map((domain) => destroyDomain(xen, xenstore, domain)));
    assert.equal(xen.physicalInfo().freePages, free);
    assert.deepEqual(await inventory(), NOTHING);

    // Whoever destroys a domain may die before its entries are gone.
    const { domid } = await build(0);
    xen.destroy(domid);
    while (xen.domain(domid)) await delay(10);
    assert.deepEqual((await inventory()).numbers, [`${domid}`]);
    await sweepDomains({ xen, xenstore, paths: { ...hostPaths(), data: folder } }, idOf(0));
    assert.equal(xen.physicalInfo().freePages, free);
    assert.deepEqual(await inventory(), NOTHING);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("a disk that somebody else uses is refused, and stays theirs", async () => {
  await using place = new XenPlace();
  await declareSmall(place, "stopped");
  await place.run(["apply", "--yes"]);
  const file = `${place.home}/${(await place.leftovers()).find((path) => path.endsWith(".raw"))}`;
  const device = (await host("losetup", "-f", "--show", file)).trim();
  try {
    await declareSmall(place);
    const { stderr } = await place.run(["apply", "--yes"], { code: 1 });
    assert.match(
      stderr,
      new RegExp(`Cannot give the disk "data" to a domain as "${file}" is attached to ${device} already`),
    );
    assert.deepEqual(await inventory(), { ...NOTHING, loops: [Deno.realPathSync(file)] });
    assert.deepEqual(await place.processes(), []);
  } finally {
    await host("losetup", "-d", device);
  }
  {
    using _lock = new DiskLock(file, false);
    const { stderr } = await place.run(["apply", "--yes"], { code: 1 });
    assert.match(stderr, /Cannot give the disk "data" to a domain: .* as another process has it open/);
    assert.deepEqual(await inventory(), NOTHING);
  }
  await place.run(["destroy", "--yes"]);
  await assertGone(place);
});

// The last one: Linux does not tell a xenstored that was started anew what it waits for.
Deno.test("without xenstored nothing is begun, the error names it, and any other one will do", async () => {
  await using place = new XenPlace();
  await declareSmall(place);
  const { pid, program } = await xenstored();
  Deno.kill(pid, "SIGKILL");
  await waitForEnd([pid]);
  const folder = program.replace(/[^/]*$/, "");
  const other = `${folder}${program.endsWith("/oxenstored") ? "xenstored" : "oxenstored"}`;
  try {
    const { stderr } = await place.run(["apply", "--yes"], { code: 1 });
    assert.match(stderr, /Cannot run "web" as .*xenstored/);
    assert.match((await place.run(["doctor"], { code: null })).stdout, /missing +xen .*xenstored/);
    assert.deepEqual(await place.leftovers(), []);
  } finally {
    await Deno.remove("/run/xenstored/socket").catch(() => {});
    await host(other, "--pid-file", "/run/xen/xenstored.pid");
    const limit = AbortSignal.timeout(60_000);
    while (!(await Deno.stat("/run/xenstored/socket").then(() => true, () => false))) {
      limit.throwIfAborted();
      await delay(50);
    }
    await host(`${folder}xen-init-dom0`);
  }
  assert.equal((await xenstored()).program, other);
  // What takes no device works with it.
  await comeAndGo();
});
