import assert from "node:assert/strict";
import { Place, realTest, ROOT } from "./support.ts";

const QEMU = ["qemu-system-x86_64", "apt-get"];

const web = (memory: string, cpus: number, more = "") => `
  const lan = network({ cidr: "10.20.0.0/24" });
  const web = vm({
    cpus: ${cpus}, memory: "${memory}", image: debian(${more}),
    nics: { eth0: lan.nic({ ip: "10.20.0.10", forwards: { http: { guest: 80 } } }) },
    env: { GREETING: "it's $HOME" },
    files: { "/srv/index.html": "hello", "/etc/tool": { content: "#!/bin/sh\\necho tool", mode: 0o755 } },
    command: "httpd -f -h /srv",
    ready: http(80),
  });
  return { lan, web, url: text\`http://127.0.0.1:\${web.nics.eth0.forwards.http}/\`, ip: web.nics.eth0.ip };
`;

const uptime = async (place: Place) =>
  Number((await place.run(["exec", "web", "--", "cat", "/proc/uptime"])).stdout.split(" ")[0]);

realTest("a machine is declared, planned, applied, changed, repaired and destroyed", QEMU, async () => {
  await using place = new Place();
  await place.declare(web("128MiB", 1));
  const first = await place.run(["plan", "--detailed-exitcode"], { code: 2 });
  assert.match(first.stdout, /\+ web .*vm.*memory 128MiB/);
  assert.match(first.stdout, /Plan: 2 to add, 0 to change, 0 to destroy\./);
  assert.deepEqual(await place.leftovers(), []);

  const applied = await place.run(["apply", "--yes"]);
  assert.match(applied.stdout, /web: Created after/);
  const url = (await place.run(["output", "url"])).stdout.trim();
  assert.equal(await (await fetch(url)).text(), "hello");
  assert.equal((await place.run(["output", "ip"])).stdout, "10.20.0.10\n");
  assert.match((await place.run(["exec", "web", "--", "uname", "-a"])).stdout, /^Linux web 6\./);
  await place.run(["plan", "--detailed-exitcode"]);

  // Exit status and both streams pass through; arguments arrive as they are; so does standard input.
  const both = await place.run(["exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7"], {
    code: 7,
  });
  assert.deepEqual([both.stdout, both.stderr], ["out\n", "err\n"]);
  const words = await place.run(["exec", "web", "--", "printf", "%s|", "a b", "'", "$x", "", "*"]);
  assert.equal(words.stdout, "a b|'|$x||*|");
  const piped = await place.run(["exec", "web", "--", "wc", "-c"], { stdin: new Uint8Array(300_000) });
  assert.equal(piped.stdout.trim(), "300000");
  await place.run(["exec", "web", "--", "no-such-program"], { code: 127 });
  assert.equal(
    (await place.run(["exec", "web", "--", "sh", "-c", 'echo "$GREETING"; tool=$(/etc/tool); echo "$tool"']))
      .stdout,
    "it's $HOME\ntool\n",
  );

  // Files, both ways, bytes exact.
  const bytes = crypto.getRandomValues(new Uint8Array(60_000));
  await Deno.writeFile(`${place.folder}/in`, bytes);
  await place.run(["cp", "./in", "web:/tmp/there"]);
  await place.run(["cp", "web:/tmp/there", "./out"]);
  assert.deepEqual(await Deno.readFile(`${place.folder}/out`), bytes);
  const absent = await place.run(["cp", "web:/none", "./none"], { code: 1 });
  assert.match(absent.stderr, /Cannot copy "web:\/none"/);

  // Memory changes live.
  const before = await uptime(place);
  await place.declare(web("192MiB", 1));
  const live = await place.run(["plan"]);
  assert.match(live.stdout, /~ web +live +vm +memory 128MiB → 192MiB +\(balloon\)/);
  await place.run(["apply", "--yes", "--max-disruption=live"]);
  assert.ok(await uptime(place) > before);
  const grown = Number(
    (await place.run(["exec", "web", "--", "awk", "/MemTotal/ { print $2 }", "/proc/meminfo"])).stdout,
  );
  await place.declare(web("96MiB", 1));
  await place.run(["apply", "--yes"]);
  const shrunk = Number(
    (await place.run(["exec", "web", "--", "awk", "/MemTotal/ { print $2 }", "/proc/meminfo"])).stdout,
  );
  assert.equal(grown - shrunk, 96 * 1024);
  assert.ok(await uptime(place) > before);

  // vCPUs take a restart, another image a new machine.
  await place.declare(web("96MiB", 2));
  assert.match(
    (await place.run(["plan"])).stdout,
    /~ web +reboot +vm +cpus 1 → 2 .*\n.*Worst disruption: reboot/,
  );
  const refused = await place.run(["apply", "--yes", "--max-disruption=live"], { code: 1 });
  assert.match(refused.stderr, /disruption is "reboot" \(cpus\) and --max-disruption=live allows less/);
  await place.declare(web("96MiB", 2, '{ revision: "2" }'));
  assert.match((await place.run(["plan"])).stdout, /± web +recreate/);
  await place.run(["plan", "--max-disruption=live"], { code: 1 });
  await place.declare(web("96MiB", 2));
  await place.run(["apply", "--yes"]);
  assert.equal((await place.run(["exec", "web", "--", "nproc"])).stdout, "2\n");

  // A machine that was killed is drift, and is repaired; ports and addresses stay.
  const [pid] = await place.processes();
  Deno.kill(pid!, "SIGKILL");
  while ((await place.processes()).length > 0) await new Promise((resolve) => setTimeout(resolve, 50));
  const gone = await place.run(["exec", "web", "--", "true"], { code: 1 });
  assert.match(gone.stderr, /the machine is stopped \(QEMU ended abnormally.*\): start it with apply/);
  // After a reboot of the host, the number in its file may belong to any other process.
  const pidFile = (await place.leftovers()).find((path) => path.endsWith("qemu.pid"));
  await Deno.writeTextFile(`${place.home}/${pidFile}`, `${Deno.pid}\n`);
  const drift = await place.run(["plan", "--detailed-exitcode"], { code: 2 });
  assert.match(drift.stdout, /Changed outside of this stack[^]*~ web +vm +power running → stopped/);
  await place.run(["apply", "--yes"]);
  assert.equal(await (await fetch(url)).text(), "hello");

  // The console is a root shell.
  const typed = await place.run(["console", "web"], {
    stdin: new TextEncoder().encode("\necho $((6 * 7))-on-console\n"),
  });
  assert.match(typed.stdout, /42-on-console/);
  assert.match((await place.run(["logs", "web"])).stdout, /42-on-console/);

  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.processes(), []);
  assert.deepEqual(await place.leftovers(), []);
  const left = [...Deno.readDirSync(place.folder)].map((entry) => entry.name).filter((name) =>
    name.startsWith(".h")
  );
  assert.deepEqual(left, []);
});

realTest("disks and NICs are plugged and unplugged while the machine runs, and data survives", [
  ...QEMU,
  "mke2fs",
], async () => {
  await using place = new Place();
  const body = (disks: string, nics: string, size = "64MiB") => `
    const lan = network({ cidr: "10.20.0.0/24" });
    const data = disk({ size: "${size}", filesystem: "ext4" });
    const web = vm({ memory: "128MiB", image: debian(), disks: { ${disks} }, nics: { ${nics} } });
    return { lan, data, web };
  `;
  await place.declare(body("", "eth0: lan.nic()"));
  await place.run(["apply", "--yes"]);
  const before = await uptime(place);
  await place.declare(body('data: { disk: data, mount: "/data" }', "eth0: lan.nic(), eth1: lan.nic()"));
  assert.match((await place.run(["plan"])).stdout, /~ web +hotplug/);
  await place.run(["apply", "--yes", "--max-disruption=hotplug"]);
  assert.ok(await uptime(place) > before);
  const seen = await place.run([
    "exec",
    "web",
    "--",
    "sh",
    "-c",
    "ip -4 -o addr show eth1; grep ' /data ext4 ' /proc/mounts; echo kept >/data/file; sync",
  ]);
  assert.match(seen.stdout, /eth1 +inet 10\.20\.0\.\d+\/24[^]*\/data ext4/);
  await place.run(["plan", "--detailed-exitcode"]);

  // A restart keeps disk and data.
  await place.declare(
    body('data: { disk: data, mount: "/data" }', "eth0: lan.nic(), eth1: lan.nic()").replace(
      "memory:",
      "cpus: 2, memory:",
    ),
  );
  await place.run(["apply", "--yes"]);
  assert.equal((await place.run(["exec", "web", "--", "cat", "/data/file"])).stdout, "kept\n");

  // It grows while it is in use.
  await place.declare(
    body('data: { disk: data, mount: "/data" }', "eth0: lan.nic(), eth1: lan.nic()", "96MiB").replace(
      "memory:",
      "cpus: 2, memory:",
    ),
  );
  assert.match((await place.run(["plan"])).stdout, /~ data +live +disk +size 64MiB → 96MiB +\(grow\)/);
  await place.run(["apply", "--yes"]);
  assert.equal(
    (await place.run(["exec", "web", "--", "cat", "/sys/block/vda/size"])).stdout,
    `${96 * 2048}\n`,
  );

  // A disk that is in use is not taken away; one that is only mounted is unmounted first.
  await place.run(["exec", "web", "--", "sh", "-c", "cd /data && (sleep 1000 >/dev/null 2>&1 </dev/null &)"]);
  await place.declare(body("", "eth0: lan.nic()", "96MiB").replace("memory:", "cpus: 2, memory:"));
  assert.match((await place.run(["apply", "--yes"], { code: 1 })).stderr, /is in use: end what uses it/);
  await place.run(["exec", "web", "--", "killall", "sleep"]);
  await place.run(["apply", "--yes", "--max-disruption=hotplug"]);
  assert.equal(
    (await place.run(["exec", "web", "--", "sh", "-c", "ls /sys/block | grep -c vd; ls /sys/class/net"]))
      .stdout,
    "0\neth0\nlo\n",
  );
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.leftovers(), []);
});

realTest("a directory becomes a guest, with an init of its own and a kernel of the host's", [
  ...QEMU,
  "mke2fs",
], async () => {
  await using place = new Place();
  const root = `${place.folder}/root`;
  for (const folder of ["bin", "sbin", "etc"]) await Deno.mkdir(`${root}/${folder}`, { recursive: true });
  await place.declare("{ none: vm({ memory: '64MiB', image: debian(), power: 'stopped' }) }");
  await place.run(["apply", "--yes"]);
  const cache = JSON.parse((await place.run(["doctor", "--json"])).stdout).paths.cache as string;
  const [busybox] = [...Deno.readDirSync(`${cache}/busybox`)].map((entry) =>
    `${cache}/busybox/${entry.name}/busybox`
  );
  const [kernel] = [...Deno.readDirSync(`${cache}/kernels`)].map((entry) => `${cache}/kernels/${entry.name}`);
  const [release] = [...Deno.readDirSync(`${kernel}/modules`)].map((entry) => entry.name);
  await Deno.copyFile(busybox!, `${root}/bin/busybox`);
  await Deno.symlink("busybox", `${root}/bin/sh`);
  await Deno.writeTextFile(
    `${root}/sbin/init`,
    "#!/bin/sh\necho my-own-init\nwhile :; do /bin/busybox sleep 1; done\n",
    { mode: 0o755 },
  );
  await place.declare(`{
    own: vm({
      memory: "128MiB",
      image: directory("${root}"),
      kernel: hostKernel({ path: "${kernel}/vmlinuz", modules: "${kernel}/modules/${release}" }),
      ready: onConsole("my-own-init"),
      shutdownTimeout: "2s",
    }),
  }`);
  await place.run(["apply", "--yes"]);
  assert.equal(
    (await place.run(["exec", "own", "--", "/bin/busybox", "head", "-1", "/sbin/init"])).stdout,
    "#!/bin/sh\n",
  );
  await place.run(["exec", "own", "--", "/bin/sh", "-c", "echo written >/written; /bin/busybox sync"]);
  await place.run(["destroy", "--yes"]);
  assert.equal([...Deno.readDirSync(root)].some((entry) => entry.name === "written"), false);
});

realTest("the quickstart of the README works as it is written", QEMU, async () => {
  await using place = new Place();
  await Deno.copyFile(`${ROOT}/examples/quickstart/infra.ts`, `${place.folder}/infra.ts`);
  await place.run(["apply", "--yes"]);
  assert.match((await place.run(["exec", "web", "--", "uname", "-a"])).stdout, /^Linux web /);
  await place.run(["plan", "--detailed-exitcode"]);
  await place.run(["destroy", "--yes"]);
});

realTest("the example of the README runs", QEMU, async () => {
  await using place = new Place();
  const [, code] = /```ts\n([^]*?)```/.exec(await Deno.readTextFile(`${ROOT}/README.md`)) ?? [];
  await Deno.writeTextFile(`${place.folder}/infra.ts`, code!);
  await place.run(["apply", "--yes"]);
  const port = (await place.run(["output", "port"])).stdout.trim();
  assert.equal(await (await fetch(`http://127.0.0.1:${port}/`)).text(), "hello\n");
  await place.run(["destroy", "--yes"]);
});
