import assert from "node:assert/strict";
import { Qmp, QmpError } from "./qmp.ts";

/** A monitor that answers as told. */
async function withMonitor(
  answer: (request: { execute: string; id: number }) => readonly unknown[],
  run: (path: string) => Promise<void>,
): Promise<void> {
  const folder = await Deno.makeTempDir();
  const path = `${folder}/qmp`;
  const listener = Deno.listen({ transport: "unix", path });
  const serve = (async () => {
    for await (const connection of listener) {
      const encoder = new TextEncoder();
      await connection.write(encoder.encode('{"QMP": {"version": {}, "capabilities": []}}\r\n'));
      const buffer = new Uint8Array(4096);
      let text = "";
      for (
        let count = await connection.read(buffer).catch(() => null);
        count !== null;
        count = await connection.read(buffer).catch(() => null)
      ) {
        text += new TextDecoder().decode(buffer.subarray(0, count));
        for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n")) {
          const request = JSON.parse(text.slice(0, end));
          text = text.slice(end + 1);
          const said = request.execute === "qmp_capabilities"
            ? [{ return: {}, id: request.id }]
            : answer(request);
          if (said.length === 0) {
            connection.close();
            break;
          }
          // In two halves, as a socket may deliver it.
          const bytes = encoder.encode(said.map((each) => JSON.stringify(each)).join("\r\n") + "\r\n");
          await connection.write(bytes.subarray(0, 5));
          await connection.write(bytes.subarray(5));
        }
      }
      try {
        connection.close();
      } catch {
        // Closed above.
      }
    }
  })();
  try {
    await run(path);
  } finally {
    listener.close();
    await serve.catch(() => {});
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("Qmp answers commands, passes events on, and explains refusals", () =>
  withMonitor(
    ({ execute, id }) =>
      execute === "bad"
        ? [{ error: { class: "GenericError", desc: "no such thing" }, id }]
        : [{ event: "STOP", data: { a: 1 } }, { return: { name: execute }, id }],
    async (path) => {
      await using qmp = await Qmp.connect(path);
      const event = qmp.waitFor((each) => each.event === "STOP", 1000);
      assert.deepEqual(await qmp.execute("stop"), { name: "stop" });
      assert.deepEqual((await event)?.data, { a: 1 });
      await assert.rejects(qmp.execute("bad"), (error: unknown) =>
        error instanceof QmpError && /QEMU refused "bad": no such thing/.test(error.message));
      assert.equal(
        await qmp.waitFor(() =>
          true, 10),
        undefined,
      );
    },
  ));

Deno.test("Qmp rejects what is pending when QEMU goes away", () =>
  withMonitor(() => [], async (path) => {
    await using qmp = await Qmp.connect(path);
    await assert.rejects(qmp.execute("quit"), /QEMU closed its monitor/);
    await assert.rejects(qmp.execute("again"), /closed/);
  }));
