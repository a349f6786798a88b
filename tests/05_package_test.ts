import assert from "node:assert/strict";
import { Place, realTest, ROOT } from "./support.ts";

realTest("the npm package builds, and Node declares and plans with it", ["node", "tar"], async () => {
  const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["task", "npm"],
    cwd: ROOT,
    stdout: "piped",
    stderr: "piped",
  }).output();
  const decoder = new TextDecoder();
  assert.ok(success, decoder.decode(stderr));
  assert.match(decoder.decode(stdout), /planned with Node v\d+/);
  assert.match(decoder.decode(stdout), /"infra\.mjs --version" with Deno .*: hypertopia \d/);
});

realTest("the example of a kind of one's own works, with drift and repair", [], async () => {
  await using place = new Place();
  await Deno.copyFile(`${ROOT}/examples/kind/infra.ts`, `${place.folder}/infra.ts`);
  const folder = `--var=folder=${place.folder}`;
  await place.run(["apply", "--yes", folder]);
  assert.equal(await Deno.readTextFile(`${place.folder}/about.txt`), "The greeting has 6 bytes\n");
  await Deno.writeTextFile(`${place.folder}/greeting.txt`, "changed");
  assert.match(
    (await place.run(["plan", folder])).stdout,
    /~ greeting +live +text_file +content changed → "Hello\\n"/,
  );
  await place.run(["apply", "--yes", folder]);
  assert.equal(await Deno.readTextFile(`${place.folder}/greeting.txt`), "Hello\n");
  await place.run(["destroy", "--yes", folder]);
  assert.equal(await Deno.stat(`${place.folder}/about.txt`).then(() => true, () => false), false);
});

realTest("hypertopia runs any file that exports a stack, and modules load by address", [], async () => {
  await using place = new Place();
  await place.declare('{ a: disk({ size: "1MiB" }), b: range(2).map(() => disk({ size: "1MiB" })) }');
  const run = async (args: readonly string[]) => {
    const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-check", `--config=${ROOT}/deno.json`, `${ROOT}/cli/main.ts`, ...args],
      cwd: place.folder,
      env: { HYPERTOPIA_HOME: place.home, NO_COLOR: "1" },
      stdout: "piped",
      stderr: "piped",
    }).output();
    const decoder = new TextDecoder();
    return { code, stdout: decoder.decode(stdout), stderr: decoder.decode(stderr) };
  };
  assert.match((await run(["plan"])).stdout, /Plan: 3 to add/);
  await Deno.rename(`${place.folder}/infra.ts`, `${place.folder}/lab.ts`);
  assert.equal((await run(["--file=lab.ts", "apply", "--yes"])).code, 0);
  assert.equal((await run(["state", "list", "--file", "lab.ts"])).stdout, "a\nb[0]\nb[1]\n");
  assert.match((await run(["plan"])).stderr, /needs a stack: run it in a folder with an infra\.ts/);
  assert.match((await run(["--file=none.ts", "plan"])).stderr, /^Error: Cannot load "none\.ts"/);
  assert.equal((await run(["--file=lab.ts", "destroy", "--yes"])).code, 0);

  // The same file with its modules from a server.
  await using server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, async (request) => {
    const path = new URL(request.url).pathname;
    const body = await Deno.readTextFile(`${ROOT}${path}`).catch(() => undefined);
    const type = path.endsWith(".json") ? "application/json" : "application/typescript";
    return body === undefined
      ? new Response("", { status: 404 })
      : new Response(body, { headers: { "content-type": type } });
  });
  const host = `127.0.0.1:${server.addr.port}`;
  await Deno.writeTextFile(
    `${place.folder}/far.ts`,
    `import { cli, disk, stack } from "http://${host}/mod.ts";
const far = stack("far", () => ({ a: disk({ size: "1MiB" }) }));
if (import.meta.main) await cli(far);
`,
  );
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "-A",
      "--no-check",
      "--no-config",
      `${place.folder}/far.ts`,
      "plan",
    ],
    cwd: place.folder,
    env: { HYPERTOPIA_HOME: place.home, NO_COLOR: "1", DENO_DIR: `${place.folder}/deno` },
    stdout: "piped",
    stderr: "piped",
  }).output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  assert.match(new TextDecoder().decode(stdout), /Plan: 1 to add/);
});
