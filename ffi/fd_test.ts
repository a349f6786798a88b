import assert from "node:assert/strict";
import { SysError } from "./errno.ts";
import { Fd, Mapping, PROT_READ } from "./fd.ts";
import { libc } from "./libc.ts";

const isLinux = Deno.build.os === "linux";

Deno.test({
  name: "a failed call names itself, the error and its text",
  ignore: !isLinux,
  fn() {
    assert.throws(() => Fd.open("/no/such/file"), (error: unknown) => {
      assert.ok(error instanceof SysError);
      assert.equal(error.code, "ENOENT");
      assert.match(error.message, /^open\("\/no\/such\/file"\) failed with ENOENT \(No such file/);
      return true;
    });
  },
});

Deno.test({
  name: "Fd and Mapping give back what they took",
  ignore: !isLinux,
  fn() {
    const count = () => [...Deno.readDirSync("/proc/self/fd")].length;
    libc();
    const before = count();
    for (let round = 0; round < 100; round++) {
      using fd = Fd.memory("test", 8192);
      using one = new Mapping(8192, { fd });
      using two = new Mapping(4096, { fd, offset: 4096 });
      new Uint8Array(one.buffer)[4096] = 7;
      assert.equal(new Uint8Array(two.buffer)[0], 7);
      two.protect(PROT_READ);
      using event = Fd.event();
      assert.ok(event.number > 2);
    }
    assert.equal(count(), before);
    const fd = Fd.event();
    fd[Symbol.dispose]();
    fd[Symbol.dispose]();
    assert.throws(() => fd.number, /it is closed/);
    assert.ok(fd.isClosed);
    const mapping = new Mapping(4096);
    assert.throws(() => mapping.at(4096), RangeError);
    mapping[Symbol.dispose]();
    assert.throws(() => mapping.pointer, /unmapped/);
  },
});
