import assert from "node:assert/strict";
import { labTest, ROOT } from "./support.ts";

labTest("machines on our own VMM, in the lab", async (lab, { step }) => {
  for (const file of ["kvm.ts", "firecracker.ts"]) {
    await step(file, async () => {
      let output = "";
      const decoder = new TextDecoder();
      const collect = (chunk: Uint8Array) => void (output += decoder.decode(chunk, { stream: true }));
      const { status } = await lab.exec(
        [Deno.execPath(), "test", "-A", "--no-check", `tests/lab/${file}`],
        { cwd: ROOT, env: { NO_COLOR: "1" }, stdout: collect, stderr: collect },
      );
      assert.equal(status, 0, output);
      assert.match(output, /^ok \| [1-9]\d* passed[^|]*\| 0 failed/m);
    });
  }
});
