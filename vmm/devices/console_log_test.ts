import assert from "node:assert/strict";
import { ConsoleLog } from "./console_log.ts";

Deno.test("ConsoleLog goes on after what is there, and loses what cannot be written, with a word", () => {
  const path = Deno.makeTempFileSync();
  Deno.writeTextFileSync(path, "before\n");
  const warnings: string[] = [];
  const { writeSync } = Deno.FsFile.prototype;
  let room = 3;
  try {
    using log = new ConsoleLog(path, (message) => warnings.push(message));
    Deno.FsFile.prototype.writeSync = function (bytes) {
      const length = Math.min(bytes.length, room);
      if (length === 0) throw new Error("No space left on device");
      room -= length;
      return writeSync.call(this, bytes.subarray(0, length));
    };
    log.write(new TextEncoder().encode("lost"));
    room = 100;
    log.write(new TextEncoder().encode("\nkept\n"));
  } finally {
    Deno.FsFile.prototype.writeSync = writeSync;
  }
  assert.equal(Deno.readTextFileSync(path), "before\nlos\nkept\n");
  assert.deepEqual(warnings, [
    `Cannot write the console's log "${path}" as No space left on device: ` +
    `what the guest says is lost until that is mended`,
  ]);
  Deno.removeSync(path);
});
