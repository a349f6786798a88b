import assert from "node:assert/strict";
import { Place, realTest } from "./support.ts";

const QEMU = ["qemu-system-x86_64", "apt-get"];

realTest("a change that is read at boot only is not forgotten by an apply that is killed", QEMU, async () => {
  await using place = new Place();
  const declare = (value: string) =>
    place.declare(`{ a: vm({ memory: "96MiB", image: debian(), files: { "/etc/v": "${value}" } }) }`);
  await declare("1");
  await place.run(["apply", "--yes"]);
  await declare("2");
  const child = place.spawn(["apply", "--yes"]);
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of child.stdout) {
    text += decoder.decode(chunk);
    if (text.includes("shutting down")) break;
  }
  child.kill("SIGKILL");
  await child.stderr.cancel();
  await child.status;
  await place.run(["apply", "--yes"]);
  assert.equal((await place.run(["exec", "a", "--", "cat", "/etc/v"])).stdout, "2");
  await place.run(["plan", "--detailed-exitcode"]);
  await place.run(["destroy", "--yes"]);
});

realTest("a disk whose file vanished is made again, and its machine takes the new one", QEMU, async () => {
  await using place = new Place();
  await place.declare(`
    const data = disk({ size: "1MiB" });
    return { data, a: vm({ memory: "96MiB", image: debian(), disks: { data } }) };
  `);
  await place.run(["apply", "--yes"]);
  const file = (await place.leftovers()).find((path) => path.startsWith("disks/"))!;
  await Deno.remove(`${place.home}/${file}`);
  const plan = await place.run(["plan"]);
  assert.match(plan.stdout, /- data +disk +is gone[^]*\+ data[^]*~ a +reboot/);
  await place.run(["apply", "--yes"]);
  await place.run(["exec", "a", "--", "sh", "-c", "echo here >/dev/vda; sync"]);
  const made = (await place.leftovers()).find((path) => path.startsWith("disks/"))!;
  assert.match(await Deno.readTextFile(`${place.home}/${made}`), /^here/);
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.leftovers(), []);
});

realTest(
  "an emptied cache loses nothing, and a changed directory is another image",
  [...QEMU, "mke2fs"],
  async () => {
    await using place = new Place();
    const env = { HYPERTOPIA_CACHE: `${place.folder}/cache` };
    const root = `${place.folder}/root`;
    await Deno.mkdir(`${root}/sbin`, { recursive: true });
    await place.declare('{ a: vm({ memory: "96MiB", image: debian(), power: "stopped" }) }');
    await place.run(["apply", "--yes"], { env });
    const [entry] = [...Deno.readDirSync(`${env.HYPERTOPIA_CACHE}/busybox`)].map((each) => each.name);
    await Deno.mkdir(`${root}/bin`);
    await Deno.copyFile(`${env.HYPERTOPIA_CACHE}/busybox/${entry}/busybox`, `${root}/bin/sh`);
    await Deno.writeTextFile(
      `${root}/sbin/init`,
      "#!/bin/sh\nwhile :; do /bin/sh -c 'read x </dev/zero'; done\n",
      { mode: 0o755 },
    );
    const declare = (power: string) =>
      place.declare(
        `{ a: vm({ memory: "96MiB", image: directory("${root}"), power: "${power}", shutdownTimeout: "1s" }) }`,
      );
    await declare("running");
    await place.run(["apply", "--yes"], { env });
    await place.run(["exec", "a", "--", "/bin/sh", "-c", "echo kept >/kept; sync"], { env });
    await declare("stopped");
    await place.run(["apply", "--yes"], { env });
    await Deno.remove(`${env.HYPERTOPIA_CACHE}/roots`, { recursive: true });
    await declare("running");
    await place.run(["apply", "--yes"], { env });
    assert.equal(
      (await place.run(["exec", "a", "--", "/bin/sh", "-c", "read x </kept; echo $x"], { env })).stdout,
      "kept\n",
    );
    await Deno.writeTextFile(`${root}/new`, "new");
    assert.match((await place.run(["plan"], { env })).stdout, /± a +recreate[^]*image\.fingerprint/);
    await place.run(["destroy", "--yes"], { env });
  },
);

realTest(
  "a plan says reboot where memory cannot follow the balloon, and the balloon follows where it says live",
  QEMU,
  async () => {
    await using place = new Place();
    const declare = (memory: string, more = "") =>
      place.declare(`{ a: vm({ memory: "${memory}", ${more} image: debian() }) }`);
    await declare("512MiB", 'maxMemory: "512MiB",');
    await place.run(["apply", "--yes"]);
    await declare("128MiB", 'maxMemory: "512MiB",');
    assert.match((await place.run(["plan"])).stdout, /~ a +live/);
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    await place.run(["exec", "a", "--", "true"]);
    await declare("64MiB", 'maxMemory: "512MiB",');
    assert.match(
      (await place.run(["plan"], { code: 1 })).stderr,
      /maxMemory: Size must be at most 4 times that of memory/,
    );
    // Another maximum holds from the next start only: what needs it is a restart, and is said to be one.
    await declare("256MiB", 'maxMemory: "1GiB",');
    await place.run(["apply", "--yes", "--max-disruption=live"]);
    await declare("768MiB", 'maxMemory: "1GiB",');
    assert.match((await place.run(["plan"])).stdout, /~ a +reboot.*restart: it can grow to 512MiB/);
    await place.run(["apply", "--yes", "--max-disruption=live"], { code: 1 });
    await place.run(["destroy", "--yes"]);
  },
);

realTest("port forwards change live, and a failure among them is not for good", QEMU, async () => {
  await using place = new Place();
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using free = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const ports = [taken, free].map((listener) => (listener.addr as Deno.NetAddr).port);
  free.close();
  const declare = (forwards: string) =>
    place.declare(`
      const lan = network({ cidr: "10.20.0.0/24" });
      return { lan, a: vm({ memory: "96MiB", image: debian(), command: "httpd -f -h /etc", nics: { eth0: lan.nic({ forwards: { ${forwards} } }) } }) };
    `);
  await declare("");
  await place.run(["apply", "--yes"]);
  await declare(`x: { guest: 80, host: ${ports[1]} }, y: { guest: 81, host: ${ports[0]} }`);
  const refused = await place.run(["apply", "--yes", "--max-disruption=live"], { code: 1 });
  assert.match(refused.stderr, new RegExp(`port ${ports[0]} of 127.0.0.1 cannot be forwarded`));
  taken.close();
  await place.run(["apply", "--yes", "--max-disruption=live"]);
  assert.equal((await (await fetch(`http://127.0.0.1:${ports[1]}/hostname`)).text()).trim(), "a");
  await declare("");
  await place.run(["apply", "--yes", "--max-disruption=live"]);
  await assert.rejects(fetch(`http://127.0.0.1:${ports[1]}/`));
  await place.run(["destroy", "--yes"]);
});

realTest("more NICs than free ports take a restart, and three images are built at once", QEMU, async () => {
  await using place = new Place();
  const nics = (count: number) =>
    Array.from({ length: count }, (_, index) => `eth${index}: lan.nic()`).join(", ");
  const declare = (count: number) =>
    place.declare(`
      const lan = network({ cidr: "10.20.0.0/24" });
      const more = range(3).map((index) => vm({ memory: "96MiB", image: debian({ revision: "${crypto.randomUUID()}" + index }), power: "stopped" }));
      return { lan, a: vm({ memory: "96MiB", image: debian(), nics: { ${nics(count)} } })${
      count === 1 ? ", more" : ""
    } };
    `);
  await declare(1);
  await place.run(["apply", "--yes"], { env: { HYPERTOPIA_CACHE: `${place.folder}/cache` } });
  await declare(7);
  await place.run(["apply", "--yes"], { env: { HYPERTOPIA_CACHE: `${place.folder}/cache` } });
  assert.equal(
    (await place.run(["exec", "a", "--", "sh", "-c", "ls -d /sys/class/net/eth* | wc -l"])).stdout.trim(),
    "7",
  );
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.leftovers(), []);
});
