import assert from "node:assert/strict";
import { InputTurn } from "./input_turn.ts";

Deno.test("InputTurn lets sockets have what is there, in one turn", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const path = `${folder}/s`;
    using listener = Deno.listen({ transport: "unix", path });
    using near = await Deno.connect({ transport: "unix", path });
    using far = await listener.accept();
    using turn = await InputTurn.create();
    for (let count = 0; count < 100; count++) {
      let isThere = false;
      const reading = far.read(new Uint8Array(1)).then(() => isThere = true);
      await turn.take();
      assert.equal(isThere, false);
      await near.write(new Uint8Array(1));
      // One to look, and one in which whoever waits is told.
      await turn.take();
      await turn.take();
      assert.equal(isThere, true, `round ${count}`);
      await reading;
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("InputTurn still gives turns when it is closed", async () => {
  const turn = await InputTurn.create();
  turn[Symbol.dispose]();
  let isLate = false;
  setTimeout(() => isLate = true, 0);
  while (!isLate) await turn.take();
});
