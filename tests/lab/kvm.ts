/** What the contract of engines leaves out: machines on our own VMM, with stock kernels. Run where `/dev/kvm` runs them: in the lab, or on such a host. */

import assert from "node:assert/strict";
import { delay } from "../contract.ts";
import { Place } from "../support.ts";

const declare = (
  options: {
    cpus?: number;
    memory?: string;
    image?: string;
    size?: string;
    more?: string;
    engine?: string;
  } = {},
) => `
  const lan = network({ cidr: "10.40.0.0/24", nat: false });
  const data = disk({ size: "${options.size ?? "64MiB"}", filesystem: "ext4" });
  const web = vm({
    cpus: ${options.cpus ?? 1}, memory: "${options.memory ?? "256MiB"}", image: debian(${
  options.image ?? ""
}),
    engine: ${options.engine ?? "kvm()"},
    disks: { data: { disk: data, mount: "/data" } },
    nics: { eth0: lan.nic({ ip: "10.40.0.10", forwards: { http: { guest: 80 } } }) },
    env: { GREETING: "it's $HOME" },
    files: { "/srv/index.html": "hello" },
    command: "httpd -f -h /srv",
    ready: http(80),
    ${options.more ?? ""}
  });
  return { lan, data, web, url: text\`http://127.0.0.1:\${web.nics.eth0.forwards.http}/\` };
`;

async function inGuest(place: Place, script: string, code = 0): Promise<string> {
  return (await place.run(["exec", "web", "--", "sh", "-c", script], { code })).stdout;
}

async function uptime(place: Place): Promise<number> {
  return Number((await inGuest(place, "cat /proc/uptime")).split(" ")[0]);
}

/** What `/proc` tells of all threads of a process. */
function threads(pid: number, field: string): Set<string> {
  const values = new Set<string>();
  for (const { name } of Deno.readDirSync(`/proc/${pid}/task`)) {
    const status = Deno.readTextFileSync(`/proc/${pid}/task/${name}/status`);
    values.add(new RegExp(`^${field}:\\s*(.*)$`, "m").exec(status)?.[1] ?? "");
  }
  return values;
}

Deno.test("a machine is confined, and its disk, network, memory and vCPUs change", async () => {
  await using place = new Place();
  await place.declare(declare());
  await place.run(["apply", "--yes"]);
  assert.match(await inGuest(place, "uname -r; nproc; hostname"), /^6\.1\..*cloud-amd64\n1\nweb\n$/);
  await place.run(["plan", "--detailed-exitcode"]);

  // The sandbox is there: on every thread of the process that runs the guest.
  const [pid] = await place.processes();
  assert.deepEqual(threads(pid!, "Seccomp"), new Set(["2"]));
  assert.deepEqual(threads(pid!, "NoNewPrivs"), new Set(["1"]));
  assert.deepEqual(threads(pid!, "CapEff"), new Set(["0000000000000000"]));
  const cgroup = `/sys/fs/cgroup${/^0::(.*)$/m.exec(await Deno.readTextFile(`/proc/${pid}/cgroup`))![1]}`;
  assert.match(cgroup, /\/hypertopia-/);
  assert.equal(Number(await Deno.readTextFile(`${cgroup}/memory.max`)), (512 + 512) * 2 ** 20);
  assert.equal(Number(await Deno.readTextFile(`${cgroup}/pids.max`)), 256);

  // The network, both ways: TCP by a port forward, ping from the host, and TCP from the guest to the host.
  const url = (await place.run(["output", "url"])).stdout.trim();
  assert.equal(await (await fetch(url)).text(), "hello");
  assert.match(await inGuest(place, "ping -c 2 -W 5 10.40.0.1"), /2 packets received/);
  const bytes = crypto.getRandomValues(new Uint8Array(60_000));
  const server = Deno.serve({ hostname: "10.40.0.1", port: 0, onListen() {} }, () => new Response(bytes));
  const address = `http://10.40.0.1:${server.addr.port}/`;
  const digest = [...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))]
    .map((byte) => byte.toString(16).padStart(2, "0")).join("");
  assert.equal((await inGuest(place, `wget -qO- ${address} | sha256sum`)).slice(0, 64), digest);
  await server.shutdown();

  // What is written and flushed survives a restart.
  const written = await inGuest(
    place,
    "head -c 20000000 /dev/urandom >/data/file; sync; sha256sum /data/file",
  );

  // Memory and disk change live.
  const before = await uptime(place);
  const total = async () => Number(await inGuest(place, "awk '/MemTotal/ { print $2 }' /proc/meminfo"));
  // The balloon of a guest that has just booted may still be growing.
  let whole = await total();
  for (let last = 0; last !== whole; whole = await total()) {
    last = whole;
    await delay(2000);
  }
  await place.declare(declare({ memory: "192MiB", size: "96MiB" }));
  assert.match((await place.run(["plan"])).stdout, /~ web +live .*memory 256MiB → 192MiB +\(live: balloon\)/);
  await place.run(["apply", "--yes", "--max-disruption=live"]);
  assert.equal(whole - await total(), 64 * 1024);
  assert.equal(await inGuest(place, "cat /sys/block/vda/size"), `${96 * 2048}\n`);
  await place.declare(declare({ size: "96MiB" }));
  await place.run(["apply", "--yes", "--max-disruption=live"]);
  assert.equal(await total(), whole);
  assert.ok(await uptime(place) > before);

  // Another device takes a restart, and the plan says so.
  await place.declare(declare({ cpus: 2, size: "96MiB" }));
  assert.match((await place.run(["plan"])).stdout, /~ web +reboot .*cpus 1 → 2/);
  await place.run(["apply", "--yes"]);
  assert.equal(await inGuest(place, "nproc; sha256sum /data/file"), `2\n${written}`);

  // An orderly end leaves nothing: no process, file, bridge or tap.
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.processes(), []);
  assert.deepEqual((await place.leftovers()).filter((path) => path !== "network.lock"), []);
  await assert.rejects(Deno.stat(cgroup), Deno.errors.NotFound);
  assert.deepEqual(
    [...Deno.readDirSync("/sys/class/net")].map(({ name }) => name).filter((name) => /^ht/.test(name)),
    [],
  );
});

for (const [flavour, cpus] of [["generic", 1], ["generic", 4], ["cloud", 4]] as const) {
  Deno.test(`Debian's ${flavour} kernel boots with ${cpus} vCPUs, shuts down and is powered off`, async () => {
    await using place = new Place();
    await place.declare(declare({ cpus, image: `{ flavour: "${flavour}" }` }));
    await place.run(["apply", "--yes"]);
    const seen = await inGuest(place, "uname -r; nproc");
    assert.match(
      seen,
      new RegExp(`^6\\.1\\.[^\\n]*${flavour === "cloud" ? "cloud-" : "-"}amd64\\n${cpus}\\n`),
    );
    await place.declare(declare({ cpus, image: `{ flavour: "${flavour}" }`, more: 'power: "stopped",' }));
    await place.run(["apply", "--yes"]);
    assert.deepEqual(await place.processes(), []);
    await place.run(["plan", "--detailed-exitcode"]);
    await place.run(["destroy", "--yes"]);
  });
}

Deno.test("auto() takes KVM where it runs code, and doctor shows how fast", async () => {
  await using place = new Place();
  await place.declare(declare({ engine: "ht.auto()" }));
  const { stdout } = await place.run(["doctor"], { code: null });
  assert.match(stdout, /works +kvm +a loop takes [\d.]+ ns a turn/);
  assert.match(stdout, /auto\(\) takes kvm/);
});

Deno.test("machines of a stack share a process, and one ends without the other", async () => {
  await using place = new Place();
  const pair = (power: string) => `
    const lan = network({ cidr: "10.41.0.0/24", nat: false });
    const machine = (power) => vm({
      memory: "96MiB", maxMemory: "96MiB", image: debian(), engine: kvm({ isolation: "shared" }),
      nics: { eth0: lan.nic() }, power,
    });
    const one = machine("${power}");
    const two = machine("running");
    return { lan, one, two, ip: one.nics.eth0.ip };
  `;
  await place.declare(pair("running"));
  await place.run(["apply", "--yes"]);
  const [pid, ...others] = await place.processes();
  assert.deepEqual(others, []);
  const ip = (await place.run(["output", "ip"])).stdout.trim();
  const ping = await place.run(["exec", "two", "--", "ping", "-c", "2", "-W", "5", ip]);
  assert.match(ping.stdout, /2 packets received/);
  await place.declare(pair("stopped"));
  await place.run(["apply", "--yes"]);
  assert.deepEqual(await place.processes(), [pid]);
  assert.equal((await place.run(["exec", "two", "--", "hostname"])).stdout, "two\n");
  await place.declare(pair("running"));
  await place.run(["apply", "--yes"]);
  assert.equal((await place.run(["exec", "one", "--", "hostname"])).stdout, "one\n");
  assert.deepEqual(threads(pid!, "Seccomp"), new Set(["2"]));
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.processes(), []);
  assert.deepEqual((await place.leftovers()).filter((path) => path !== "network.lock"), []);
});
