import assert from "node:assert/strict";
import { Log } from "./log.ts";

Deno.test("Log writes to its file what its level lets through, and not all that a guest causes", async () => {
  const path = await Deno.makeTempFile();
  {
    using log = new Log("m", { path, level: "Warn" });
    log.info("no");
    log.error(new Error("yes"));
    for (let count = 0; count < 1000; count++) log.warn("again");
  }
  const lines = (await Deno.readTextFile(path)).trimEnd().split("\n");
  assert.match(lines[0]!, /^\d{4}-\S+Z \[m\] Error: yes$/);
  assert.equal(lines.filter((line) => line.endsWith("Warn: again")).length, 60);
  assert.equal(lines.length, 61);
  await Deno.remove(path);
});
