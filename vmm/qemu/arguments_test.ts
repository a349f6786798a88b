import assert from "node:assert/strict";
import type { MachineSpec } from "../engine.ts";
import { escapeOption, networkBackend, qemuArguments, qemuFiles, SPARE_PORTS } from "./arguments.ts";

const spec: MachineSpec = {
  id: "0".repeat(16),
  stack: "t",
  address: "web[0]",
  cpus: 2,
  memory: 128 * 2 ** 20,
  maxMemory: 256 * 2 ** 20,
  kernel: "/k",
  initramfs: ["/i"],
  cmdline: "quiet",
  disks: [{ name: "root", path: "/d,1", format: "qcow2", serial: "s", readOnly: false, size: 1 }],
  nics: [{
    name: "eth0",
    mac: "02:00:00:00:00:01",
    ip: "10.0.0.3",
    network: "lan",
    cidr: "10.0.0.0/24",
    gateway: "10.0.0.1",
    dns: "10.0.0.2",
    nat: false,
    forwards: [{ name: "x", protocol: "tcp", address: "127.0.0.1", host: 8080, guest: 80 }],
  }],
  hasAgent: true,
  bootKey: "",
  engine: { extraArguments: ["-extra"] },
};

Deno.test("qemuArguments() gives each device a port and keeps some free", () => {
  const args = qemuArguments(spec, qemuFiles("/m"), "tcg");
  assert.equal(args.filter((word) => word.startsWith("pcie-root-port")).length, 2 + SPARE_PORTS);
  assert.ok(args.includes("size=262144k"));
  assert.ok(args.includes("console=ttyS0 hypertopia.control=hvc0 quiet"));
  assert.equal(args.at(-1), "-extra");
  const device = JSON.parse(args.find((word) => word.includes("virtio-blk-pci"))!);
  assert.deepEqual([device.bus, device.serial, device.bootindex], ["port0", "s", undefined]);
  const { kernel: _kernel, ...firmware } = spec;
  const booted = qemuArguments({ ...firmware, hasAgent: false }, qemuFiles("/m"), "kvm");
  assert.equal(JSON.parse(booted.find((word) => word.includes("virtio-blk-pci"))!).bootindex, 0);
  assert.ok(!booted.includes("-kernel") && booted.includes("host"));
  assert.ok(!booted.some((word) => word.includes("virtconsole")));
});

Deno.test("qemuArguments() boots a hypervisor with kernel and initramfs as its modules, and gives it no balloon", () => {
  const under = {
    ...spec,
    cmdline: "quiet a=1,2",
    engine: { hypervisor: { path: "/xen", commandLine: "console=com1" } },
  };
  const args = qemuArguments(under, qemuFiles("/m,1"), "tcg");
  const after = (flag: string) => args[args.indexOf(flag) + 1];
  assert.deepEqual(["-kernel", "-append", "-initrd"].map(after), [
    "/xen",
    "console=com1",
    "/k console=hvc0 hypertopia.control=hvc1 quiet a=1,,2,/m,,1/initramfs",
  ]);
  assert.ok(!args.some((word) => word.includes("balloon")));
  assert.throws(
    () => qemuArguments(under, qemuFiles("/m 1"), "tcg"),
    /no spaces in the path "\/m 1\/initramfs"/,
  );
  const { kernel: _kernel, ...disk } = under;
  assert.throws(() => qemuArguments(disk, qemuFiles("/m"), "tcg"), /its image has no kernel: give it one/);
});

Deno.test("networkBackend() writes forwards and cuts the way out where it is not wanted", () => {
  const text = networkBackend(spec.nics[0]!);
  assert.match(text, /restrict=on/);
  assert.match(text, /hostfwd=tcp:127\.0\.0\.1:8080-10\.0\.0\.3:80$/);
  assert.equal(escapeOption("a,b"), "a,,b");
});
