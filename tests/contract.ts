/**
 * What every engine must do, as one suite of tests.
 *
 * @module
 */

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { builtInEngines } from "../cli/built_in.ts";
import { type EngineName, hostPaths, type Machine } from "../vmm/mod.ts";
import { Place } from "./support.ts";

/** Options of {@linkcode contractTests}. */
export interface ContractOptions {
  /** Why the engine does not run here; the suite is skipped then. */
  readonly skipped?: string;
  /** Why two machines of one network do not reach each other, where they do not. */
  readonly noNeighbours?: string;
  /** Whether a guest goes on when the process that serves it is killed. */
  readonly goesOn?: boolean;
}

/** How long a guest may take for a restart of its own, in milliseconds: longer, and it hangs. */
const RESTART_TIMEOUT = 300_000;
/** What is fetched to see that whole files pass, in bytes. */
const FILE_SIZE = 200_000;

interface Declaration {
  readonly memory?: string;
  readonly greeting?: string;
  readonly power?: "running" | "stopped";
  readonly forwards?: string;
  readonly hasNeighbour?: boolean;
}

function declaration(engine: string, options: Declaration): string {
  const { memory = "96MiB", greeting = "it's $HOME", power = "running", forwards = "" } = options;
  return `
    const lan = network({ cidr: "10.50.0.0/24" });
    const data = disk({ size: "64MiB", filesystem: "ext4" });
    const machine = (disk, nic, content, more) => vm({
      image: debian(),
      engine: ht.${engine}(),
      disks: { data: { disk, mount: "/data" } },
      nics: { eth0: nic },
      files: { "/srv/index.html": content, "/etc/tool": { content: "#!/bin/sh\\necho tool", mode: 0o755 } },
      command: "httpd -f -h /srv",
      ready: http(80),
      ...more,
    });
    const web = machine(
      data,
      lan.nic({ ip: "10.50.0.10", forwards: { http: { guest: 80 }, ${forwards} } }),
      "hello",
      { memory: "${memory}", env: { GREETING: ${JSON.stringify(greeting)} }, power: "${power}" },
    );
    const more = ${options.hasNeighbour ?? false} ? disk({ size: "64MiB", filesystem: "ext4" }) : undefined;
    const two = more && machine(more, lan.nic({ ip: "10.50.0.20" }), "from two", { memory: "96MiB" });
    return {
      lan, data, web, ...(two ? { more, two } : {}),
      url: text\`http://127.0.0.1:\${web.nics.eth0.forwards.http}/\`,
      ${forwards === "" ? "" : "other: text`http://127.0.0.1:${web.nics.eth0.forwards.other}/`,"}
    };
  `;
}

/** A machine that a test talks to without the CLI. */
export async function findMachine(place: Place, engine: EngineName, address: string): Promise<Machine> {
  const paths = { data: place.home, cache: hostPaths().cache };
  const found = builtInEngines(paths).find(({ name }) => name === engine)!;
  const status = (await found.list()).find((each) => each.address === address);
  assert.ok(status, `there is no machine "${address}"`);
  return found.attach(status.id);
}

/** Runs a script in a guest, which must end well, and gives what it printed. */
export async function inGuest({ guest }: Machine, script: string): Promise<string> {
  const { status, stdout, stderr } = await guest.output(["sh", "-c", script]);
  assert.equal(status, 0, `${script}\n${stdout}\n${stderr}`);
  return stdout;
}

/**
 * Numbers of all processes that serve the machines of a place, those of their networks too.
 *
 * @param place The place
 * @param program Only those of this program; all unless told
 * @returns The numbers
 */
export async function servers(place: Place, program = ""): Promise<number[]> {
  const found: number[] = [];
  for await (const { name } of Deno.readDir("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    const line = await Deno.readTextFile(`/proc/${name}/cmdline`).catch(() => "");
    if (line.includes(place.home) && line.includes(program)) found.push(Number(name));
  }
  return found;
}

/** Waits until nothing is left of processes that were killed. */
export async function waitForEnd(pids: readonly number[]): Promise<void> {
  const isThere = (pid: number) => Deno.stat(`/proc/${pid}/exe`).then(() => true, () => false);
  for (const pid of pids) while (await isThere(pid)) await delay(50);
}

/** Waits. */
export function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/**
 * Declares the tests of the contract that all engines keep.
 *
 * @param engine The engine
 * @param options What does not hold for it, and why
 */
export function contractTests(engine: EngineName, options: ContractOptions = {}): void {
  const { skipped } = options;
  Deno.test({
    name: `the contract of engines holds for ${engine}${
      skipped === undefined ? "" : ` (skipped: ${skipped})`
    }`,
    ignore: skipped !== undefined,
    fn: (context) => runContract(engine, options, context),
  });
}

async function runContract(
  engine: EngineName,
  options: ContractOptions,
  context: Deno.TestContext,
): Promise<void> {
  await using place = new Place();
  /** What comes after a step needs that it went well; `missing` is what the step lacks here. */
  const step = async (name: string, fn: () => Promise<void>, missing?: string) => {
    const passed = await context.step({
      name: missing === undefined ? name : `${name} (skipped: ${missing})`,
      ignore: missing !== undefined,
      fn,
    });
    assert.ok(passed || missing !== undefined, `"${name}" failed`);
  };
  const declare = (changes: Declaration = {}) => place.declare(declaration(engine, changes));
  const web = () => findMachine(place, engine, "web");
  const inWeb = async (script: string) => await inGuest(await web(), script);
  const bootId = async () => (await (await web()).guest.ping({ timeout: RESTART_TIMEOUT })).bootId;
  const hasDrift = async (pattern: RegExp) =>
    assert.match((await place.run(["plan", "--detailed-exitcode"], { code: 2 })).stdout, pattern);
  const hasNoChanges = async () => void await place.run(["plan", "--detailed-exitcode"]);
  const links = hostLinks();
  let url = "";
  let written = "";

  await step("it is declared, planned and applied, and is ready by HTTP through a port forward", async () => {
    await declare();
    await hasDrift(/Plan: 3 to add, 0 to change, 0 to destroy\./);
    assert.deepEqual(await place.leftovers(), []);
    await place.run(["apply", "--yes"]);
    await hasNoChanges();
    url = (await place.run(["output", "url"])).stdout.trim();
    assert.equal(await (await fetch(url)).text(), "hello");
  });

  await step("exec passes words, both streams, standard input and the status through", async () => {
    const both = await place.run(
      [
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        'printf "%s|" "$@"; echo problem >&2; exit 7',
        "sh",
        "a b",
        "'",
        "$x",
        "",
      ],
      { code: 7 },
    );
    assert.deepEqual([both.stdout, both.stderr], ["a b|'|$x||", "problem\n"]);
    const piped = await place.run(["exec", "web", "--", "wc", "-c"], { stdin: new Uint8Array(300_000) });
    assert.equal(piped.stdout.trim(), "300000");
    await place.run(["exec", "web", "--", "no-such-program"], { code: 127 });
  });

  await step("cp copies both ways, byte for byte", async () => {
    const bytes = new Uint8Array(randomBytes(FILE_SIZE));
    await Deno.writeFile(`${place.folder}/in`, bytes);
    await place.run(["cp", "./in", "web:/tmp/there"]);
    await place.run(["cp", "web:/tmp/there", "./out"]);
    assert.deepEqual(await Deno.readFile(`${place.folder}/out`), bytes);
    const absent = await place.run(["cp", "web:/none", "./none"], { code: 1 });
    assert.match(absent.stderr, /Cannot copy "web:\/none"/);
  });

  await step("environment, files and host name are there", async () => {
    assert.equal(await inWeb('echo "$GREETING"; /etc/tool; hostname; nproc'), "it's $HOME\ntool\nweb\n1\n");
  });

  const address = hostAddress();
  await step("it reaches the outside by TCP", async () => {
    const bytes = new Uint8Array(randomBytes(FILE_SIZE));
    await using server = Deno.serve(
      { hostname: address!, port: 0, onListen() {} },
      () => new Response(bytes),
    );
    const seen = await inWeb(`wget -qO- http://${address}:${server.addr.port}/ | sha256sum`);
    assert.equal(seen.slice(0, 64), createHash("sha256").update(bytes).digest("hex"));
  }, address === undefined ? "the host has no address but its loopback" : undefined);

  const name = await knownName();
  await step("it resolves names", async () => {
    // The name server's own address comes first, and with a tabulator.
    assert.match(await inWeb(`nslookup -type=a ${name}`), /^Address: \d+\.\d+\.\d+\.\d+$/m);
  }, name === undefined ? "the host's apt has no mirror whose name it resolves" : undefined);

  await step("what is written to a disk and flushed is there after the guest has rebooted", async () => {
    // Random numbers are slow where the processor is emulated.
    await inWeb(
      "head -c 1000000 /dev/urandom >/tmp/part && cd /tmp && cat part part part part >/data/file && sync",
    );
    written = await inWeb("sha256sum /data/file");
    const before = await bootId();
    await inWeb("(sleep 1; reboot) >/dev/null 2>&1 &");
    const limit = AbortSignal.timeout(RESTART_TIMEOUT);
    while (await bootId() === before) {
      limit.throwIfAborted();
      await delay(200);
    }
    assert.equal(await inWeb("sha256sum /data/file"), written);
  });

  await step("it is paused, which is seen as drift, and apply resumes it", async () => {
    const before = await bootId();
    await (await web()).pause();
    assert.equal((await (await web()).status()).state, "paused");
    await hasDrift(/~ web +vm +power running → paused[^]*~ web +live .*\(resume\)/);
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    assert.equal((await (await web()).status()).state, "running");
    assert.equal(await bootId(), before);
  });

  await step("memory changes live, by its balloon", async () => {
    const before = await bootId();
    const total = async () => Number(await inWeb("awk '/MemTotal/ { print $2 }' /proc/meminfo"));
    // The balloon of a guest that has just booted may still be growing.
    let small = await total();
    for (let last = 0; last !== small; small = await total()) {
      last = small;
      await delay(2000);
    }
    await declare({ memory: "128MiB" });
    const plan = await place.run(["plan"]);
    assert.match(plan.stdout, /~ web +live .*memory 96MiB → 128MiB +\(.*balloon\)/);
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    assert.equal(await total() - small, 32 * 1024);
    await declare();
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    assert.equal(await total(), small);
    assert.equal(await bootId(), before);
  });

  await step("port forwards come and go live", async () => {
    const before = await bootId();
    await inWeb("httpd -p 81 -h /etc");
    await declare({ forwards: "other: { guest: 81 }" });
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    const other = (await place.run(["output", "other"])).stdout.trim();
    assert.equal(await (await fetch(`${other}hostname`)).text(), "web\n");
    await declare();
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    await assert.rejects(fetch(other));
    assert.equal(await (await fetch(url)).text(), "hello");
    assert.equal(await bootId(), before);
  });

  await step(
    "two machines of a network reach each other by TCP, and one ends without the other",
    async () => {
      await declare({ hasNeighbour: true });
      await place.run(["apply", "--yes"]);
      const two = await findMachine(place, engine, "two");
      assert.equal(await inGuest(two, "wget -qO- http://10.50.0.10/"), "hello");
      assert.equal(await inWeb("wget -qO- http://10.50.0.20/"), "from two");
      await declare();
      await place.run(["apply", "--yes"]);
      assert.equal((await place.processes()).length, 1);
      assert.equal(await (await fetch(url)).text(), "hello");
    },
    options.noNeighbours,
  );

  await step("its console is a root shell, and what that printed is in its log", async () => {
    const stdin = new TextEncoder().encode("\necho $((6 * 7))-on-console\n");
    assert.match((await place.run(["console", "web"], { stdin })).stdout, /42-on-console/);
    assert.match((await place.run(["logs", "web"])).stdout, /42-on-console/);
  });

  await step("a change that is read at boot restarts it, and its disk is what it was", async () => {
    const before = await bootId();
    await declare({ greeting: "another" });
    assert.match((await place.run(["plan"])).stdout, /~ web +reboot .*read at boot/);
    await place.run(["apply", "--yes"]);
    assert.equal(await inWeb('echo "$GREETING"; sha256sum /data/file'), `another\n${written}`);
    assert.notEqual(await bootId(), before);
    await hasNoChanges();
  });

  await step("a process that is killed is seen as drift, and apply repairs it", async () => {
    const before = await bootId();
    const pids = await place.processes();
    assert.equal(pids.length, 1);
    Deno.kill(pids[0]!, "SIGKILL");
    await waitForEnd(pids);
    const gone = await place.run(["exec", "web", "--", "true"], { code: 1 });
    if (options.goesOn) {
      assert.match(gone.stderr, /the machine is crashed \(.* is gone\): start it with apply/);
      await hasDrift(/~ web +vm +power running → crashed/);
      await place.run(["apply", "--yes", "--max-disruption=live"]);
      assert.equal(await bootId(), before);
    } else {
      assert.match(gone.stderr, /the machine is stopped \(.* ended abnormally.*\): start it with apply/);
      await hasDrift(/~ web +vm +power running → stopped/);
      await place.run(["apply", "--yes"]);
    }
    assert.equal(await inWeb("sha256sum /data/file"), written);
    assert.equal(await (await fetch(url)).text(), "hello");
  });

  await step("it shuts down when it is declared stopped, and starts again", async () => {
    await inWeb("echo unwritten >/data/last");
    await declare({ greeting: "another", power: "stopped" });
    const { stdout } = await place.run(["apply", "--yes"]);
    assert.doesNotMatch(stdout, /powering off/);
    assert.deepEqual(await servers(place), []);
    await hasNoChanges();
    await declare({ greeting: "another" });
    await place.run(["apply", "--yes"]);
    // What a guest had not flushed itself, its shutdown has.
    assert.equal(await inWeb("cat /data/last; sha256sum /data/file"), `unwritten\n${written}`);
    assert.equal(await (await fetch(url)).text(), "hello");
  });

  await step("destroy leaves no file, process or network device", async () => {
    await place.run(["destroy", "--yes"]);
    assert.deepEqual(await servers(place), []);
    // A lock cannot be removed without a race between those who wait for it.
    assert.deepEqual((await place.leftovers()).filter((path) => path !== "network.lock"), []);
    assert.deepEqual(hostLinks(), links);
  });
}

/** A name that this host resolves: that of the mirror in its apt's configuration. */
async function knownName(): Promise<string | undefined> {
  try {
    const { stdout } = await new Deno.Command("apt-get", { args: ["update", "--print-uris"] }).output();
    const name = /^'https?:\/\/([a-z0-9.-]+)/m.exec(new TextDecoder().decode(stdout))?.[1];
    return name !== undefined && (await Deno.resolveDns(name, "A")).length > 0 ? name : undefined;
  } catch {
    return undefined;
  }
}

/** Network devices that this host has by us. */
function hostLinks(): string[] {
  return [...Deno.readDirSync("/sys/class/net")].map(({ name }) => name)
    .filter((name) => name.startsWith("ht")).sort();
}

/** An IPv4 address of the host that is not its loopback, and none of a network of machines. */
function hostAddress(): string | undefined {
  return Deno.networkInterfaces().find(({ name, family, address }) =>
    family === "IPv4" && !address.startsWith("127.") && !name.startsWith("ht")
  )?.address;
}
