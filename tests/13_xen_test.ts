import assert from "node:assert/strict";
import { labTest, ROOT } from "./support.ts";

labTest("domains of Xen, in the lab", async (lab, { step }) => {
  const run = async (args: readonly string[]): Promise<string> => {
    let output = "";
    const decoder = new TextDecoder();
    const collect = (chunk: Uint8Array) => void (output += decoder.decode(chunk, { stream: true }));
    const { status } = await lab.exec([Deno.execPath(), ...args], {
      cwd: ROOT,
      env: { NO_COLOR: "1" },
      stdout: collect,
      stderr: collect,
    });
    assert.equal(status, 0, output);
    return output;
  };
  const runTests = async (files: readonly string[]): Promise<void> => {
    const output = await run(["test", "-A", "--no-check", ...files]);
    assert.match(output, /^ok \| [1-9]\d* passed[^|]*\| 0 failed/m);
  };
  await step("files become block devices of its control domain", async () => {
    await runTests(["ffi/loop_test.ts"]);
  });
  await step("the example ends ready, and leaves nothing", async () => {
    const infra = ["run", "-A", "--no-check", "examples/xen/infra.ts"];
    assert.match(await run([...infra, "apply", "--yes"]), /Apply is complete .*: 3 created/);
    assert.match(await run([...infra, "exec", "web", "--", "uname", "-a"]), /^Linux web 6\.1\..* x86_64/);
    assert.match(await run([...infra, "plan", "--detailed-exitcode"]), /No changes/);
    assert.match(await run([...infra, "destroy", "--yes"]), /3 destroyed/);
  });
  await step("the contract of engines holds", async () => {
    await runTests(["tests/lab/contract_xen.ts"]);
  });
  await step("domains live whole lives, beside those of others, whatever dies", async () => {
    await runTests(["tests/lab/xen.ts"]);
  });
}, { xen: true });
