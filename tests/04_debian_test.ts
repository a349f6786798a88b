import assert from "node:assert/strict";
import { Place, realTest, ROOT } from "./support.ts";

realTest("a full Debian guest becomes ready by HTTP through a port forward", [
  "qemu-system-x86_64",
  "apt-get",
  "mmdebstrap",
  "mke2fs",
], async () => {
  await using place = new Place();
  await Deno.copyFile(`${ROOT}/examples/nginx/infra.ts`, `${place.folder}/infra.ts`);
  await place.run(["apply", "--yes"]);
  const port = (await place.run(["output", "port"])).stdout.trim();
  assert.match(await (await fetch(`http://127.0.0.1:${port}/`)).text(), /nginx/);
  const system = await place.run([
    "exec",
    "web",
    "--",
    "sh",
    "-c",
    "ps -p 1 -o comm= 2>/dev/null || cat /proc/1/comm; hostname; dpkg -l nginx-light | tail -1",
  ]);
  assert.match(system.stdout, /systemd\nweb\nii +nginx-light/);
  // Its disk survives a restart.
  await place.run(["exec", "web", "--", "sh", "-c", "echo kept >/root/file && sync"]);
  const text = await Deno.readTextFile(`${place.folder}/infra.ts`);
  await Deno.writeTextFile(
    `${place.folder}/infra.ts`,
    text.replace("cpus: 2", 'cpus: 1,\n    rootSize: "3GiB"'),
  );
  await place.run(["apply", "--yes"]);
  assert.equal((await place.run(["exec", "web", "--", "cat", "/root/file"])).stdout, "kept\n");
  await place.run(["plan", "--detailed-exitcode"]);
  const size = await place.run(["exec", "web", "--", "sh", "-c", "df -k / | tail -1 | awk '{ print $2 }'"]);
  assert.ok(Number(size.stdout) > 2.7 * 2 ** 20, size.stdout);
  await place.run(["destroy", "--yes"]);
  assert.deepEqual(await place.leftovers(), []);
});
