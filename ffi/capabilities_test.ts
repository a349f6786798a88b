import assert from "node:assert/strict";
import { findWrongClaims, hasHeader } from "./c_compiler.ts";
import { CAPABILITY, dropCapabilities, threadCapabilities } from "./capabilities.ts";

const isSupported = Deno.build.os === "linux" && Deno.build.arch === "x86_64";
const hasHeaders = await hasHeader("linux/capability.h");

Deno.test({
  name: `numbers are those of the C headers${
    hasHeaders ? "" : " (skipped: no C compiler with linux/capability.h)"
  }`,
  ignore: !hasHeaders,
  async fn() {
    const claims = Object.entries(CAPABILITY).map(([name, number]) => [`CAP_${name}`, number] as const);
    assert.deepEqual(
      await findWrongClaims(["linux/capability.h", "linux/prctl.h"], [
        ...claims,
        ["CAP_LAST_CAP", claims.length - 1],
        ["_LINUX_CAPABILITY_VERSION_3", 0x2008_0522],
        ["PR_SET_NO_NEW_PRIVS", 38],
        ["PR_CAPBSET_DROP", 24],
        ["PR_CAP_AMBIENT", 47],
        ["PR_CAP_AMBIENT_CLEAR_ALL", 4],
      ]),
      [],
    );
  },
});

/** Runs a program in a process of its own, as what is given up does not come back. */
async function runChild(code: string): Promise<string> {
  const output = await new Deno.Command(Deno.execPath(), {
    args: [
      "eval",
      "--ext=ts",
      `import { dropCapabilities, setNoNewPrivileges, threadCapabilities } from ${
        JSON.stringify(import.meta.resolve("./mod.ts"))
      };${code}`,
    ],
    stdin: "null",
    env: { NO_COLOR: "1" },
  }).output();
  assert.ok(output.success, new TextDecoder().decode(output.stderr));
  return new TextDecoder().decode(output.stdout).trim();
}

Deno.test({
  name: "all capabilities but those to keep are gone, on every thread, and with them what they allow",
  ignore: !isSupported,
  async fn() {
    const before = threadCapabilities().find(({ thread }) => thread === Deno.pid)!;
    const kept = 1n << BigInt(CAPABILITY.NET_BIND_SERVICE);
    const found = JSON.parse(
      await runChild(`
        const wake = new Worker("data:text/javascript,postMessage(0)", { type: "module" });
        await new Promise((resolve) => wake.onmessage = resolve);
        const file = Deno.makeTempFileSync();
        dropCapabilities(["NET_BIND_SERVICE"]);
        let owned = "changed";
        try { Deno.chownSync(file, 12345, 12345); } catch (error) { owned = error.name; }
        Deno.removeSync(file);
        const texts = threadCapabilities().map(({ effective, permitted, bounding }) => [effective, permitted, bounding].join());
        console.log(JSON.stringify({ owned, count: texts.length, kinds: [...new Set(texts)] }));
        Deno.exit(0);
      `),
    );
    const left = before.permitted & kept;
    // Where the bounding set may not be changed, it is as it was.
    const canDrop = (before.effective >> BigInt(CAPABILITY.SETPCAP) & 1n) === 1n;
    assert.deepEqual(found.kinds, [`${left},${left},${canDrop ? before.bounding & kept : before.bounding}`]);
    assert.ok(found.count > 2);
    assert.equal(found.owned, "PermissionDenied");
  },
});

Deno.test({
  name: "to give up what is gone already is no error",
  ignore: !isSupported,
  async fn() {
    assert.equal(
      await runChild(`dropCapabilities(); dropCapabilities(["NET_ADMIN"]);
        console.log(threadCapabilities().every(({ effective, permitted }) => (effective | permitted) === 0n));`),
      "true",
    );
  },
});

Deno.test({
  name: "no_new_privs is set on every thread",
  ignore: !isSupported,
  async fn() {
    assert.equal(
      await runChild(`
        setNoNewPrivileges();
        const states = [...Deno.readDirSync("/proc/self/task")].map(({ name }) =>
          Deno.readTextFileSync("/proc/self/task/" + name + "/status").match(/NoNewPrivs:\\s*(\\d)/)[1]);
        console.log(states.length > 1, states.every((state) => state === "1"));
      `),
      "true true",
    );
  },
});

Deno.test({
  name: "an unknown capability is refused before anything is given up",
  ignore: !isSupported,
  fn() {
    const before = threadCapabilities();
    assert.throws(() => dropCapabilities(["NO_SUCH" as "CHOWN"]), /Cannot keep the capability "NO_SUCH"/);
    assert.deepEqual(
      threadCapabilities().map(({ effective }) => effective),
      before.map((each) => each.effective),
    );
  },
});
