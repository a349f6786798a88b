import assert from "node:assert/strict";
import { findWrongClaims, hasHeader } from "./c_compiler.ts";
import { LANDLOCK_FS, landlockRights, landlockVersion } from "./landlock.ts";

const isSupported = Deno.build.os === "linux" && Deno.build.arch === "x86_64";
const version = isSupported ? landlockVersion() : 0;
const hasHeaders = await hasHeader("linux/landlock.h");

Deno.test({
  name: `numbers are those of the C headers${
    hasHeaders ? "" : " (skipped: no C compiler with linux/landlock.h)"
  }`,
  ignore: !hasHeaders,
  async fn() {
    // The headers of Linux 6.1 end with version 2.
    const known = Object.entries(LANDLOCK_FS).filter(([name]) => name !== "TRUNCATE" && name !== "IOCTL_DEV");
    assert.deepEqual(
      await findWrongClaims(["linux/landlock.h"], [
        ...known.map(([name, bit]) => [`LANDLOCK_ACCESS_FS_${name}`, Number(bit)] as const),
        ["sizeof(struct landlock_path_beneath_attr)", 12],
        ["offsetof(struct landlock_path_beneath_attr, parent_fd)", 8],
        ["LANDLOCK_RULE_PATH_BENEATH", 1],
        ["LANDLOCK_CREATE_RULESET_VERSION", 1],
      ]),
      [],
    );
  },
});

Deno.test("each version knows the rights of those before it and its own", () => {
  assert.deepEqual(
    [0, 1, 2, 3, 4, 5, 6, 7, 99].map(landlockRights),
    [0n, 0x1fffn, 0x3fffn, 0x7fffn, 0x7fffn, 0xffffn, 0xffffn, 0xffffn, 0xffffn],
  );
});

function landlockTest(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: version > 0 ? name : `${name} (skipped: no Landlock)`, ignore: version === 0, fn });
}

/** Runs a program in a process of its own, which is restricted for good. */
async function runChild(code: string): Promise<string[]> {
  const root = await Deno.makeTempDir();
  try {
    return await runChildIn(root, code);
  } finally {
    await Deno.remove(root, { recursive: true });
  }
}

async function runChildIn(root: string, code: string): Promise<string[]> {
  const output = await new Deno.Command(Deno.execPath(), {
    args: [
      "eval",
      "--ext=ts",
      `import { restrictFiles, setNoNewPrivileges } from ${JSON.stringify(import.meta.resolve("./mod.ts"))};
      const attempt = async (name, action) => {
        try { await action(); console.log(name, "done"); } catch (error) { console.log(name, error.name, error.code ?? ""); }
      };
      const root = ${JSON.stringify(root)};
      for (const name of ["in", "out", "seen"]) Deno.mkdirSync(root + "/" + name);
      Deno.writeTextFileSync(root + "/out/file", "x");
      Deno.writeTextFileSync(root + "/out/single", "x");
      Deno.writeTextFileSync(root + "/seen/file", "x");
      setNoNewPrivileges();
      ${code}
      Deno.exit(0);`,
    ],
    stdin: "null",
    env: { NO_COLOR: "1" },
  }).output();
  assert.ok(output.success, new TextDecoder().decode(output.stderr));
  return new TextDecoder().decode(output.stdout).trim().split("\n").map((line) => line.trim());
}

landlockTest("files are reached as the rules say, on every thread", async () => {
  assert.deepEqual(
    await runChild(`
      const worker = new Worker("data:text/javascript," + encodeURIComponent(
        "onmessage = ({ data }) => { let text = 'read'; try { Deno.readTextFileSync(data); } catch (error) { text = error.name; } postMessage(text); }"
      ), { type: "module" });
      const ask = (path) => new Promise((resolve) => {
        worker.onmessage = ({ data }) => resolve(data);
        worker.postMessage(path);
      });
      console.log(await ask(root + "/out/file"));
      const result = restrictFiles({
        readWrite: [root + "/in", root + "/out/single"],
        readOnly: [root + "/seen", "/no/such/file", "/proc/self"],
      });
      console.log(result.applied, result.version);
      await attempt("write in", () => Deno.writeTextFileSync(root + "/in/a", "x"));
      await attempt("make in", () => Deno.mkdirSync(root + "/in/b"));
      await attempt("rename in", () => Deno.renameSync(root + "/in/a", root + "/in/b/a"));
      await attempt("remove in", () => Deno.removeSync(root + "/in/b", { recursive: true }));
      await attempt("write single", () => Deno.writeTextFileSync(root + "/out/single", "x"));
      await attempt("remove single", () => Deno.removeSync(root + "/out/single"));
      await attempt("read seen", () => Deno.readTextFileSync(root + "/seen/file"));
      await attempt("write seen", () => Deno.writeTextFileSync(root + "/seen/file", "x"));
      await attempt("read out", () => Deno.readTextFileSync(root + "/out/file"));
      await attempt("read out on the pool", () => Deno.readTextFile(root + "/out/file"));
      await attempt("read self", () => Deno.readTextFileSync("/proc/self/status"));
      await attempt("execute", () => new Deno.Command("/bin/true").outputSync());
      console.log("worker", await ask(root + "/out/file"));
    `),
    [
      "read",
      `true ${version}`,
      "write in done",
      "make in done",
      "rename in done",
      "remove in done",
      "write single done",
      "remove single PermissionDenied EACCES",
      "read seen done",
      "write seen PermissionDenied EACCES",
      "read out PermissionDenied EACCES",
      "read out on the pool PermissionDenied EACCES",
      "read self done",
      "execute PermissionDenied EACCES",
      "worker PermissionDenied",
    ],
  );
});

landlockTest(
  "places in /proc are held, as the kernel forgets unused ones and their rules when memory is short",
  async () => {
    const lines = await runChild(`
    restrictFiles({ readOnly: ["/proc/self", "/proc/meminfo", root] });
    const held = [...Deno.readDirSync("/proc/self/fd")].map(({ name }) => {
      try { return Deno.readLinkSync("/proc/self/fd/" + name); } catch { return ""; }
    });
    console.log(held.includes("/proc/meminfo"), held.includes("/proc/" + Deno.pid), held.includes(root));
  `);
    assert.deepEqual(lines, ["true true false"]);
  },
);

landlockTest("TCP ports are reached as the rules say, or reported as open", async () => {
  const lines = await runChild(`
    const { port } = Deno.listen({ hostname: "127.0.0.1", port: 0 }).addr;
    const result = restrictFiles({ readOnly: ["/proc/self"], readWrite: [root], ports: { bind: [0], connect: [port] } });
    console.log(result.open.includes("TCP ports"));
    await attempt("connect", () => Deno.connect({ hostname: "127.0.0.1", port }));
    await attempt("connect elsewhere", () => Deno.connect({ hostname: "127.0.0.1", port: port === 9 ? 10 : 9 }));
  `);
  assert.deepEqual(
    lines,
    version >= 4
      ? ["false", "connect done", "connect elsewhere PermissionDenied EACCES"]
      : ["true", "connect done", "connect elsewhere ConnectionRefused ECONNREFUSED"],
  );
});

landlockTest("a place to write that is not there is an error that names it", async () => {
  assert.deepEqual(
    await runChild(
      `try { restrictFiles({ readWrite: ["/no/such"] }); } catch (error) { console.log(error.message); }`,
    ),
    [`open("/no/such") failed with ENOENT (No such file or directory)`],
  );
});
