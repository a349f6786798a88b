import assert from "node:assert/strict";
import { probeKvm } from "../vmm/kvm/probe.ts";
import { hostPaths } from "../vmm/mod.ts";
import { delay, findMachine, inGuest, servers, waitForEnd } from "./contract.ts";
import { finish, Place, realTest, ROOT } from "./support.ts";

const APT = ["apt-get"];
const NETWORK_PROGRAM = "user_network_main";
const hasKvm = probeKvm().isUsable;

/** A cache with all that this host has but saved states of machines: the first machine of each kind boots cold. */
async function cacheWithoutStates({ folder }: Place): Promise<Record<string, string>> {
  const { cache } = hostPaths();
  const own = `${folder}/cache`;
  await Deno.mkdir(`${own}/states`, { recursive: true });
  await Deno.mkdir(cache, { recursive: true });
  for await (const { name } of Deno.readDir(cache)) {
    if (name !== "states") await Deno.symlink(`${cache}/${name}`, `${own}/${name}`);
  }
  return { HYPERTOPIA_CACHE: own };
}

/** A `PATH` with all that this host's has but QEMU. */
async function pathWithoutQemu({ folder }: Place): Promise<Record<string, string>> {
  const tools = `${folder}/bin`;
  await Deno.mkdir(tools);
  for (const each of [...Deno.env.get("PATH")!.split(":"), "/usr/sbin", "/sbin"]) {
    // A folder of PATH need not be there, and the first of two programs with one name counts.
    try {
      for (const { name } of Deno.readDirSync(each)) {
        if (name.startsWith("qemu-")) continue;
        await Deno.symlink(`${each}/${name}`, `${tools}/${name}`).catch(() => {});
      }
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  }
  return { PATH: tools };
}

/** What the supervisor of the only machine of a place says. */
async function engineLog(place: Place): Promise<{ path: string | undefined; text: string }> {
  const found = (await place.leftovers()).find((each) => each.endsWith("engine.log"));
  const path = found === undefined ? undefined : `${place.home}/${found}`;
  return { path, text: path === undefined ? "" : await Deno.readTextFile(path).catch(() => "") };
}

/** Presses Ctrl-C during an apply as soon as the supervisor of its machine says something, and gives all that it said. */
async function interruptApply(place: Place, env: Record<string, string>, words: string): Promise<string> {
  const { path } = await engineLog(place);
  if (path !== undefined) await Deno.remove(path);
  const child = place.spawn(["apply", "--yes"], { env });
  let hasEnded = false;
  void child.status.then(() => hasEnded = true);
  const result = finish(child, ["apply"], null);
  while (!hasEnded && !(await engineLog(place)).text.includes(words)) await delay(50);
  if (!hasEnded) child.kill("SIGINT");
  const { code, stderr } = await result;
  assert.equal(code, 130, stderr);
  assert.match(stderr, /Interrupted: .*run apply again to continue/);
  assert.deepEqual(await place.processes(), []);
  return (await engineLog(place)).text;
}

const small = (more = "") =>
  `vm({ memory: "64MiB", maxMemory: "64MiB", image: debian(), engine: ht.emulated(), ${more} })`;

Deno.test({
  name: `the quickstart runs without QEMU, and others of its kind go on from what it has booted to${
    hasKvm ? " (skipped: /dev/kvm runs code here)" : ""
  }`,
  ignore: hasKvm,
  async fn() {
    await using place = new Place();
    const env = { ...await cacheWithoutStates(place), ...await pathWithoutQemu(place) };
    const text = await Deno.readTextFile(`${ROOT}/examples/quickstart/infra.ts`);
    await Deno.writeTextFile(`${place.folder}/infra.ts`, text);
    await place.run(["apply", "--yes"], { env });
    const seen = await place.run(["exec", "web", "--", "uname", "-a"], { env });
    assert.match(seen.stdout, /^Linux web 6\..*i686/);
    const port = (await place.run(["output", "port"], { env })).stdout.trim();
    assert.equal(
      await (await fetch(`http://127.0.0.1:${port}/`)).text(),
      "Hello from a machine of your own\n",
    );
    assert.match((await place.run(["logs", "--engine", "web"], { env })).stdout, /state .* was saved/);

    const declaration = /const web = (vm\(\{.*\n {2}\}\));\n {2}return \{/s.exec(text)![1]!;
    await Deno.writeTextFile(
      `${place.folder}/infra.ts`,
      text.replace("\n  return {", `\n  const twins = [0, 1].map(() => ${declaration});\n  return { twins,`),
    );
    await place.run(["apply", "--yes"], { env });
    const twins = ["web", "twins[0]", "twins[1]"];
    for (const twin of twins.slice(1)) {
      const log = (await place.run(["logs", "--engine", twin], { env })).stdout;
      assert.match(log, /it goes on from the saved state/);
    }
    // What tells a machine from others, one a line.
    const identities = await Promise.all(twins.map(async (twin) => {
      const machine = await findMachine(place, "emulated", twin);
      const lines = await inGuest(
        machine,
        `hostname; cat /sys/class/net/eth0/address; ip -4 -o address show eth0 | awk '{ print $4 }'
        cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1`,
      );
      return lines.trimEnd().split("\n");
    }));
    for (const line of [0, 1, 2, 3, 4]) {
      const values = identities.map((lines) => lines[line]);
      assert.equal(new Set(values).size, twins.length, `${values}`);
    }
    assert.deepEqual(identities.map(([hostname]) => hostname), ["web", "twins-0", "twins-1"]);
    await place.run(["plan", "--detailed-exitcode"], { env });
    await place.run(["destroy", "--yes"], { env });
    assert.deepEqual(await servers(place), []);
    assert.deepEqual(await place.leftovers(), []);
  },
});

realTest(
  "a saved state that cannot be used is refused with the reason, and the machine boots cold",
  APT,
  async () => {
    await using place = new Place();
    const env = await cacheWithoutStates(place);
    await place.declare(`{ a: ${small()} }`);
    await place.run(["apply", "--yes"], { env });
    const [name, ...others] = [...Deno.readDirSync(`${env.HYPERTOPIA_CACHE}/states`)].map(({ name }) => name);
    assert.deepEqual(others, []);
    const path = `${env.HYPERTOPIA_CACHE}/states/${name}`;
    const machine = await findMachine(place, "emulated", "a");
    const edit = (from: RegExp, to: string) => (bytes: Uint8Array) => {
      const end = bytes.indexOf(10);
      const header = new TextDecoder().decode(bytes.subarray(0, end));
      assert.match(header, from);
      return [new TextEncoder().encode(header.replace(from, to)), bytes.subarray(end)];
    };
    const damages: readonly (readonly [RegExp, (bytes: Uint8Array) => Uint8Array[]])[] = [
      [/it is cut: \d+ of \d+ bytes are there/, (bytes) => [bytes.subarray(0, bytes.length >> 1)]],
      [/it is damaged/, (bytes) => {
        bytes[bytes.length >> 1]! ^= 1;
        return [bytes];
      }],
      [/it is of version 0\.0\.0 of the emulator/, edit(/"emulator":"[^"]*"/, '"emulator":"0.0.0"')],
      [/it is of a machine that is made of something else/, edit(/"key":"[^"]*"/, '"key":"other"')],
      [/it is no saved state/, () => []],
    ];
    const good = await Deno.readFile(path);
    await machine.kill();
    for (const [reason, damage] of damages) {
      await Deno.writeFile(path, new Blob(damage(good.slice()) as Uint8Array<ArrayBuffer>[]).stream());
      const log = await interruptApply(place, env, "it boots cold");
      assert.match(log, reason);
      assert.ok(log.includes(`Warn: Cannot go on from the saved state "${path}" as `), log);
    }
    const log = async () => {
      await place.run(["apply", "--yes"], { env });
      assert.equal(await inGuest(machine, "hostname"), "a\n");
      return (await place.run(["logs", "--engine", "a"], { env })).stdout;
    };
    assert.match(await log(), /it boots cold[^]*state .* was saved/);
    // What the cold boot has left is good.
    await machine.kill();
    assert.match(await log(), /it goes on from the saved state/);
    await place.run(["destroy", "--yes"], { env });
  },
);

realTest("Ctrl-C during a cold boot ends the machine, and the next apply continues", APT, async () => {
  await using place = new Place();
  const env = await cacheWithoutStates(place);
  await place.declare(`
    const lan = network({ cidr: "10.20.0.0/24" });
    return { lan, a: ${small("nics: { eth0: lan.nic() }")} };
  `);
  // The sandbox is the last thing before the guest runs.
  await interruptApply(place, env, "sandbox");
  await place.run(["destroy", "--yes"], { env });
  assert.deepEqual(await servers(place), []);
  assert.deepEqual(await place.leftovers(), []);

  await interruptApply(place, env, "sandbox");
  assert.deepEqual([...Deno.readDirSync(`${env.HYPERTOPIA_CACHE}/states`)], []);
  await place.run(["apply", "--yes"], { env });
  assert.equal((await place.run(["exec", "a", "--", "hostname"], { env })).stdout, "a\n");
  await place.run(["plan", "--detailed-exitcode"], { env });
  await place.run(["destroy", "--yes"], { env });
  assert.deepEqual(await servers(place), []);
  assert.deepEqual(await place.leftovers(), []);
});

realTest(
  "a machine that goes on from a saved state sees the partitions that its disks have by now",
  APT,
  async () => {
    await using place = new Place();
    const env = await cacheWithoutStates(place);
    await place.declare(`
    const [data, other] = [disk({ size: "4MiB" }), disk({ size: "4MiB" })];
    return { data, other, a: ${small("disks: { data }")}, b: ${small("disks: { other }")} };
  `);
    await place.run(["apply", "--yes"], { env });
    const [a, b] = [await findMachine(place, "emulated", "a"), await findMachine(place, "emulated", "b")];
    // A table with one Linux partition of 2048 sectors.
    const partition = (first: number) =>
      `printf '\\0\\0\\0\\0\\203\\0\\0\\0\\${first.toString(8)}\\0\\0\\0\\0\\010\\0\\0' |
      dd of=/dev/vda bs=1 seek=446 2>&1 && printf '\\125\\252' | dd of=/dev/vda bs=1 seek=510 2>&1 && sync`;
    const show = "cat /sys/class/block/vda?/start /sys/class/block/vda?/size; ls /dev/vda?";
    await inGuest(a, partition(64));
    await inGuest(b, partition(200));
    for (const [machine, first] of [[a, 64], [b, 200]] as const) {
      await machine.kill();
      await place.run(["apply", "--yes"], { env });
      assert.match(
        (await place.run(["logs", "--engine", machine === a ? "a" : "b"], { env })).stdout,
        /it goes on from the saved state/,
      );
      assert.equal(await inGuest(machine, show), `${first}\n2048\n/dev/vda1\n`);
    }
    await place.run(["destroy", "--yes"], { env });
  },
);

realTest(
  "a machine whose files are more than its memory holds does not start, and says why",
  APT,
  async () => {
    await using place = new Place();
    const env = await cacheWithoutStates(place);
    const declare = (size: number) =>
      place.declare(`{ a: ${small(`files: { "/srv/big": "x".repeat(${size}) }`)} }`);
    await declare(40e6);
    const { stderr } = await place.run(["apply", "--yes"], { env, code: 1 });
    assert.match(stderr, /could not unpack its configuration and files \(.*No space left on device\)/);
    assert.deepEqual(await place.processes(), []);
    await declare(1e6);
    await place.run(["apply", "--yes"], { env });
    const machine = await findMachine(place, "emulated", "a");
    assert.equal(await inGuest(machine, "hostname; wc -c </srv/big"), "a\n1000000\n");
    await place.run(["destroy", "--yes"], { env });
  },
);

realTest("a network's process that is killed is seen as drift, and apply repairs it", APT, async () => {
  await using place = new Place();
  await place.declare(`
    const lan = network({ cidr: "10.20.0.0/24" });
    const a = ${
    small(`
      nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
      files: { "/srv/index.html": "hello" }, command: "httpd -f -h /srv", ready: http(80),
    `)
  };
    return { lan, a, url: text\`http://127.0.0.1:\${a.nics.eth0.forwards.http}/\` };
  `);
  await place.run(["apply", "--yes"]);
  const url = (await place.run(["output", "url"])).stdout.trim();
  const [network, ...others] = await servers(place, NETWORK_PROGRAM);
  assert.deepEqual(others, []);
  Deno.kill(network!, "SIGKILL");
  await waitForEnd([network!]);
  await assert.rejects(fetch(url));
  const { stdout } = await place.run(["plan", "--detailed-exitcode"], { code: 2 });
  assert.match(stdout, /Changed outside of this stack/);
  await place.run(["apply", "--yes"]);
  assert.equal(await (await fetch(url)).text(), "hello");
  await place.run(["plan", "--detailed-exitcode"]);
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await servers(place), []);
});

realTest("networks of two stacks are two, though they look the same", APT, async () => {
  await using place = new Place();
  const body = (ip: string) => `
    const lan = network({ cidr: "10.20.0.0/24" });
    return { lan, a: ${small(`nics: { eth0: lan.nic({ ip: "${ip}" }) }`)} };
  `;
  await place.declare(body("10.20.0.20"), "other.ts");
  const other = await Deno.readTextFile(`${place.folder}/other.ts`);
  await Deno.writeTextFile(`${place.folder}/other.ts`, other.replace('stack("test"', 'stack("other"'));
  await place.declare(body("10.20.0.10"));
  await place.run(["apply", "--yes"]);
  await place.run(["apply", "--yes"], { file: "other.ts" });
  assert.equal((await servers(place, NETWORK_PROGRAM)).length, 2);
  const ping = async (ip: string, code: number) =>
    void await place.run(["exec", "a", "--", "ping", "-c", "1", "-W", "3", ip], { code, file: "other.ts" });
  await ping("10.20.0.1", 0);
  await ping("10.20.0.20", 0);
  await ping("10.20.0.10", 1);
  await place.run(["destroy", "--yes"]);
  await ping("10.20.0.1", 0);
  await place.run(["destroy", "--yes"], { file: "other.ts" });
  assert.deepEqual(await servers(place), []);
  assert.deepEqual(await place.leftovers(), []);
});
