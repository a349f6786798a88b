import assert from "node:assert/strict";
import { SysError } from "../errno.ts";
import { Fd } from "../fd.ts";
import { errno, libc } from "../libc.ts";
import { Arena, explainOpen, openPrivcmd, PRIVCMD, XenError } from "./privcmd.ts";

const isLinux = Deno.build.os === "linux" && Deno.build.arch === "x86_64";

/** Whether there is no such file, or one that cannot be looked at. */
function isAbsent(path: string): boolean {
  try {
    Deno.statSync(path);
    return false;
  } catch {
    return true;
  }
}

Deno.test({
  name: "Without Xen, it is said what is absent and what to do",
  ignore: !isLinux || !isAbsent("/dev/xen/privcmd"),
  fn() {
    assert.throws(
      () => openPrivcmd(),
      /^Error: Cannot reach the hypervisor by "\/dev\/xen\/privcmd" as .*: (boot Xen with|load the kernel's module)/,
    );
  },
});

Deno.test("Who may not use Xen's devices is told to be root", () => {
  const error = explainOpen("/dev/xen/evtchn", "xen-evtchn", new SysError("open()", 13, "Permission denied"));
  assert.match(String(error), /by "\/dev\/xen\/evtchn" as this user may not: run as root$/);
  const other = new Error("other");
  assert.equal(explainOpen("/dev/xen/evtchn", "xen-evtchn", other), other);
});

Deno.test("Errors of Xen say what was called, for which domain, and what they mean", () => {
  const error = new XenError("domctl createdomain", 5, 12);
  assert.equal(
    error.message,
    "domctl createdomain for domain 5 failed with ENOMEM (Xen has no memory for it)",
  );
  assert.deepEqual([error.hypercall, error.domid, error.code, error.errno], [
    "domctl createdomain",
    5,
    "ENOMEM",
    12,
  ]);
  assert.ok(error instanceof SysError);
  const other = new XenError("sysctl physinfo", undefined, 4095);
  assert.equal(other.message, "sysctl physinfo failed with 4095");
  assert.equal(other.domid, undefined);
});

Deno.test({
  name: "Memory for arguments is apart, zero, and used again when nobody needs it",
  ignore: !isLinux,
  fn() {
    using arena = new Arena(undefined);
    const first = arena.allocate(100);
    const second = arena.allocate(144);
    assert.equal(second.address - first.address, 128n);
    first.bytes.fill(1);
    second.bytes.fill(2);
    assert.equal(first.bytes[99], 1);
    const view = Deno.UnsafePointerView.getArrayBuffer(Deno.UnsafePointer.create(second.address)!, 144);
    assert.equal(new Uint8Array(view)[143], 2);
    first[Symbol.dispose]();
    first[Symbol.dispose]();
    // The place of the first is not given away while the second one is behind it.
    const third = arena.allocate(8);
    assert.equal(third.address - first.address, 128n + 192n);
    third[Symbol.dispose]();
    second[Symbol.dispose]();
    const again = arena.allocate(300);
    assert.equal(again.address, first.address);
    assert.ok(again.bytes.every((byte) => byte === 0));
    again[Symbol.dispose]();
  },
});

Deno.test({
  name: "Large memory for arguments has its own mapping",
  ignore: !isLinux,
  fn() {
    using arena = new Arena(undefined);
    using small = arena.allocate(8);
    const large = arena.allocate(300_000);
    assert.equal(large.bytes.length, 300_000);
    assert.ok(large.bytes.every((byte) => byte === 0));
    large.bytes.fill(1);
    large[Symbol.dispose]();
    assert.equal(small.bytes[0], 0);
  },
});

Deno.test({
  name: "What is no device of Xen refuses a hypercall with an error number",
  ignore: !isLinux,
  fn() {
    using device = Fd.open("/dev/null");
    assert.equal(libc().ioctl_long(16n, device.number, BigInt(PRIVCMD.HYPERCALL), new Uint8Array(48)), -1n);
    assert.equal(errno(), 25);
  },
});
