import assert from "node:assert/strict";
import { labTest, ROOT } from "./support.ts";

/** What needs devices or rights that hosts often lack, such as `/dev/vhost-net`. */
const UNITS = [
  "ffi/vhost_test.ts",
  "vmm/devices/net_test.ts",
  "vmm/devices/vsock_test.ts",
  "vmm/net/host_network_test.ts",
  "vmm/supervisor/sandbox_test.ts",
];

labTest("our own VMM, in the lab", async (lab, { step }) => {
  const runTests = async (files: readonly string[]): Promise<string> => {
    let output = "";
    const decoder = new TextDecoder();
    const collect = (chunk: Uint8Array) => void (output += decoder.decode(chunk, { stream: true }));
    const { status } = await lab.exec([Deno.execPath(), "test", "-A", "--no-check", ...files], {
      cwd: ROOT,
      env: { NO_COLOR: "1" },
      stdout: collect,
      stderr: collect,
    });
    assert.equal(status, 0, output);
    assert.match(output, /^ok \| [1-9]\d* passed[^|]*\| 0 failed/m);
    return output;
  };
  await step("its parts work with vhost, taps, nft and the sandbox of an older kernel", async () => {
    const output = await runTests(UNITS);
    assert.doesNotMatch(output, /skipped: (?!no C compiler)/);
  });
  await step("a client of Firecracker's drives a machine", async () => {
    await runTests(["tests/lab/firecracker.ts"]);
  });
  await step("an ELF kernel is entered by PVH, and by its 64-bit entry", async () => {
    await runTests(["tests/lab/kernels.ts"]);
  });
  await step("machines live whole lives", async () => {
    await runTests(["tests/lab/kvm.ts"]);
  });
  await step("the contract of engines holds", async () => {
    await runTests(["tests/lab/contract.ts"]);
  });
});
