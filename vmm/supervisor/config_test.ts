import assert from "node:assert/strict";
import { MachineError } from "../errors.ts";
import {
  balloonJson,
  bootable,
  type BootableConfiguration,
  bootSourceJson,
  checkFiles,
  type Codec,
  configurationJson,
  DEFAULT_BOOT_ARGS,
  DEFAULT_CONFIGURATION,
  type DriveConfiguration,
  driveJson,
  driveUpdateJson,
  entropyJson,
  forwardsJson,
  kernelCommandLine,
  loggerJson,
  type MachineConfiguration,
  machineJson,
  metricsJson,
  networkInterfaceJson,
  parseConfigFile,
  placeOf,
  readBounded,
  serialJson,
  statisticsJson,
  updateRateLimiter,
  vsockJson,
  withDrive,
} from "./config.ts";

const PLACE = placeOf("the test");

/** What Firecracker's own tools write: every field there is, null where it says nothing. */
const FIRECRACKER = {
  "boot-source": {
    kernel_image_path: "vmlinux",
    boot_args: "console=ttyS0 reboot=k panic=1 pci=off",
    initrd_path: null,
  },
  drives: [{
    drive_id: "rootfs",
    partuuid: null,
    is_root_device: true,
    cache_type: "Unsafe",
    is_read_only: false,
    path_on_host: "root.ext4",
    io_engine: "Sync",
    rate_limiter: null,
    socket: null,
  }],
  "machine-config": {
    vcpu_count: 2,
    mem_size_mib: 1024,
    smt: false,
    track_dirty_pages: false,
    huge_pages: "None",
  },
  "cpu-config": null,
  balloon: null,
  "network-interfaces": [],
  vsock: null,
  logger: null,
  metrics: null,
  "mmds-config": null,
  entropy: null,
  pmem: [],
  "memory-hotplug": null,
};

/** A machine with a value in every field. */
const FULL: BootableConfiguration = {
  machine: {
    vcpuCount: 4,
    memSizeMib: 512,
    maxMemSizeMib: 1024,
    smt: true,
    trackDirtyPages: true,
    hugePages: "None",
  },
  bootSource: { kernelImagePath: "/k", initrdPath: "/i", bootArgs: "console=hvc0" },
  drives: [
    {
      id: "root",
      partuuid: "0eaa91a0-01",
      isRootDevice: true,
      cacheType: "Writeback",
      isReadOnly: true,
      pathOnHost: "/root.qcow2",
      rateLimiter: {
        bandwidth: { size: 1000, oneTimeBurst: 5, refillTime: 100 },
        ops: { size: 1, refillTime: 2 },
      },
      ioEngine: "Async",
      format: "qcow2",
      serial: "serial",
    },
  ],
  networkInterfaces: [{
    id: "eth0",
    hostDevName: "tap0",
    guestMac: "06:00:ac:10:00:02",
    mtu: 1500,
    rxRateLimiter: { ops: { size: 1, refillTime: 2 } },
    txRateLimiter: { ops: { size: 3, refillTime: 4 } },
  }],
  vsock: { guestCid: 3, udsPath: "/v.sock" },
  entropy: { rateLimiter: { bandwidth: { size: 1, refillTime: 2 } } },
  balloon: { amountMib: 512, deflateOnOom: true, statsPollingInterval: 1, freePageReporting: true },
  serial: { outPath: "/serial" },
  logger: { path: "/log", level: "Warn", showLevel: true, showLogOrigin: false, module: "api" },
  metrics: { path: "/metrics", emitId: true, properties: JSON.parse('{"rack": "7", "__proto__": "y"}') },
  hypertopia: {
    name: "shop/web[0]",
    console: { socket: "/console.sock", log: "/console.log" },
    channels: { control: "/control.sock", data: ["/d0", "/d1"], errors: ["/e0", "/e1"] },
    forwards: [{ protocol: "tcp", address: "127.0.0.1", host: 8080, guestIp: "10.0.0.2", guest: 80 }],
    restartOnReset: true,
  },
};

function drive(id: string, isRootDevice: boolean): DriveConfiguration {
  return {
    id,
    isRootDevice,
    cacheType: "Unsafe",
    isReadOnly: false,
    pathOnHost: `/${id}`,
    ioEngine: "Sync",
    format: "raw",
  };
}

function file(changes: Record<string, unknown>): string {
  return JSON.stringify({ ...FIRECRACKER, ...changes });
}

Deno.test("parseConfigFile takes what Firecracker's tools write, and it is written back the same", () => {
  const { configuration, ignored } = parseConfigFile(JSON.stringify(FIRECRACKER));
  assert.deepEqual(configuration, {
    machine: { vcpuCount: 2, memSizeMib: 1024, smt: false, trackDirtyPages: false, hugePages: "None" },
    bootSource: { kernelImagePath: "vmlinux", bootArgs: "console=ttyS0 reboot=k panic=1 pci=off" },
    drives: [{ ...drive("rootfs", true), pathOnHost: "root.ext4" }],
    networkInterfaces: [],
    hypertopia: { forwards: [], restartOnReset: false },
  });
  assert.deepEqual(ignored, []);
  assert.deepEqual(configurationJson.print(configuration), FIRECRACKER);
});

Deno.test("parseConfigFile reads back everything that is written", () => {
  const { configuration, ignored } = parseConfigFile(JSON.stringify(configurationJson.print(FULL)));
  assert.deepEqual(configuration, FULL);
  assert.deepEqual(ignored, []);
});

Deno.test("parseConfigFile fills in what is not said", () => {
  const { configuration } = parseConfigFile('{"boot-source": {"kernel_image_path": "k"}}');
  assert.deepEqual(configuration, { ...DEFAULT_CONFIGURATION, bootSource: { kernelImagePath: "k" } });
});

Deno.test("parseConfigFile names the unknown fields that Firecracker ignores, and refuses the others", () => {
  const bucket = { size: 1, refill_time: 1, color: "red" };
  const { ignored } = parseConfigFile(file({
    network_interfaces: [],
    metrics: { metrics_path: "m", extra: 1 },
    entropy: { rate_limiter: { ops: bucket } },
  }));
  assert.deepEqual(ignored, ["network_interfaces", "entropy.rate_limiter.ops.color", "metrics.extra"]);
  for (
    const changes of [
      { drives: [{ ...FIRECRACKER.drives[0], color: 1 }] },
      { "machine-config": { ...FIRECRACKER["machine-config"], color: 1 } },
      { "boot-source": { ...FIRECRACKER["boot-source"], color: 1 } },
      { "network-interfaces": [{ iface_id: "a", host_dev_name: "tap0", color: 1 }] },
      { vsock: { guest_cid: 3, uds_path: "v", color: 1 } },
      { entropy: { color: 1 } },
      { entropy: { rate_limiter: { color: 1 } } },
      { balloon: { amount_mib: 1, deflate_on_oom: true, color: 1 } },
      { logger: { color: 1 } },
      { "serial-config": { color: 1 } },
      { hypertopia: { color: 1 } },
      { hypertopia: JSON.parse('{"__proto__": 1}') },
    ]
  ) {
    assert.throws(() => parseConfigFile(file(changes)), /unknown field `[\w.\-[\]]+`, expected /);
  }
});

Deno.test("parseConfigFile refuses what is wrong, and says where", () => {
  const machine = FIRECRACKER["machine-config"];
  const root = FIRECRACKER.drives[0];
  const nic = { iface_id: "a", host_dev_name: "tap0", guest_mac: "06:00:AC:10:00:02" };
  const cases: [string, RegExp][] = [
    ["", /as it is not JSON: /],
    ["{", /as it is not JSON: /],
    ["[]", /as it has an invalid type: array, expected an object$/],
    ["null", /as it has an invalid type: null, expected an object$/],
    ["{}", /missing field `boot-source`/],
    [file({ "boot-source": {} }), /missing field `boot-source.kernel_image_path`/],
    [
      file({ "boot-source": { kernel_image_path: "" } }),
      /`boot-source.kernel_image_path` has an invalid value: "", expected a path of 1 to 4095 bytes/,
    ],
    [file({ "boot-source": { kernel_image_path: "a\0b" } }), /kernel_image_path` has an invalid value/],
    [
      file({ "boot-source": { kernel_image_path: "k", boot_args: "a\nb" } }),
      /boot_args` has an invalid value/,
    ],
    [
      file({ "boot-source": { kernel_image_path: "k", boot_args: "a".repeat(2048) } }),
      /boot_args` has an invalid value: "a{99}…, expected at most 2047/,
    ],
    [
      file({ "boot-source": { kernel_image_path: "k", boot_args: "a".repeat(2040) } }),
      /command line has 2057 characters/,
    ],
    [
      file({ "machine-config": { ...machine, vcpu_count: 33 } }),
      /`machine-config.vcpu_count` has an invalid value: 33, expected an integer from 1 to 32$/,
    ],
    [file({ "machine-config": { ...machine, vcpu_count: 1.5 } }), /vcpu_count` has an invalid value: 1.5/],
    [file({ "machine-config": { ...machine, vcpu_count: "2" } }), /vcpu_count` has an invalid type: string/],
    [file({ "machine-config": { mem_size_mib: 1 } }), /missing field `machine-config.vcpu_count`/],
    [
      file({ "machine-config": { ...machine, vcpu_count: 3, smt: true } }),
      /`machine-config.vcpu_count` is 3: with `smt`/,
    ],
    [file({ "machine-config": { ...machine, mem_size_mib: 0 } }), /mem_size_mib` has an invalid value: 0/],
    [file({ "machine-config": { ...machine, mem_size_mib: 2 ** 40 } }), /mem_size_mib` has an invalid value/],
    [
      file({ "machine-config": { ...machine, max_mem_size_mib: 1023 } }),
      /`machine-config.max_mem_size_mib` is 1023: it must be at least `mem_size_mib`, 1024/,
    ],
    [file({ "machine-config": { ...machine, huge_pages: "2M" } }), /huge_pages` asks for .* lacks: huge/],
    [
      file({ "machine-config": { ...machine, huge_pages: "1G" } }),
      /unknown variant `1G`, expected one of `None`/,
    ],
    [file({ "machine-config": { ...machine, cpu_template: "T2" } }), /cpu_template` asks for .* lacks: CPU/],
    [file({ "cpu-config": {} }), /`cpu-config` asks for what this machine monitor lacks: CPU templates/],
    [file({ "mmds-config": {} }), /`mmds-config` asks for what this machine monitor lacks: .*MMDS/],
    [file({ "memory-hotplug": {} }), /`memory-hotplug` asks for/],
    [file({ pmem: [{}] }), /`pmem` asks for/],
    [file({ drives: {} }), /`drives` has an invalid type: object, expected an array/],
    [
      file({ drives: [root, { drive_id: "b", is_root_device: "no" }] }),
      /`drives\[1\].is_root_device` has an invalid type: string, expected a boolean/,
    ],
    [
      file({ drives: [root, { ...root, drive_id: "b" }] }),
      /`drives\[1\].is_root_device` is true, and a root device already exists, "rootfs"/,
    ],
    [
      file({ drives: [{ drive_id: "b", is_root_device: false, socket: "s" }] }),
      /`drives\[0\].socket` asks for what this machine monitor lacks: vhost-user/,
    ],
    [
      file({ drives: [{ drive_id: "b", is_root_device: false }] }),
      /missing field `drives\[0\].path_on_host`/,
    ],
    [
      file({ drives: [{ ...root, cache_type: "Safe" }] }),
      /unknown variant `Safe`, expected `Unsafe` or `Writeback`/,
    ],
    [file({ drives: [{ ...root, partuuid: "1 init=/bin/sh" }] }), /partuuid` has an invalid value/],
    [file({ drives: [{ ...root, serial: "a".repeat(21) }] }), /serial` has an invalid value/],
    [
      file({ drives: [{ ...root, rate_limiter: { ops: { size: 1 } } }] }),
      /missing field `drives\[0\].rate_limiter.ops.refill_time`/,
    ],
    [
      file({ drives: [{ ...root, rate_limiter: { ops: { size: -1, refill_time: 1 } } }] }),
      /size` has an invalid value: -1/,
    ],
    [
      file({ "network-interfaces": [nic, { ...nic, iface_id: "b", host_dev_name: "tap1" }] }),
      /`network-interfaces\[1\].guest_mac` 06:00:ac:10:00:02 is in use by "a"/,
    ],
    [
      file({ "network-interfaces": [nic, { iface_id: "b", host_dev_name: "tap0" }] }),
      /`network-interfaces\[1\].host_dev_name` "tap0" is in use by "a"/,
    ],
    [
      file({ "network-interfaces": [{ ...nic, guest_mac: "06:00:AC:10:00" }] }),
      /guest_mac` has an invalid value/,
    ],
    [
      file({ "network-interfaces": [{ ...nic, host_dev_name: "sixteen-bytes-xx" }] }),
      /host_dev_name` has an inv/,
    ],
    [file({ "network-interfaces": [{ ...nic, host_dev_name: "../x" }] }), /host_dev_name` has an invalid/],
    [file({ "network-interfaces": [{ ...nic, mtu: 67 }] }), /mtu` has an invalid value: 67/],
    [file({ vsock: { guest_cid: 2, uds_path: "v" } }), /`vsock.guest_cid` has an invalid value: 2/],
    [file({ vsock: { guest_cid: 2 ** 32 - 1, uds_path: "v" } }), /guest_cid` has an invalid value/],
    [
      file({ vsock: { guest_cid: 3, uds_path: "é".repeat(54) } }),
      /uds_path` .* expected a path of a Unix socket/,
    ],
    [
      file({ balloon: { amount_mib: 1025, deflate_on_oom: true } }),
      /`balloon.amount_mib` is 1025: it can be at most the memory of the guest, 1024/,
    ],
    [
      file({ balloon: { amount_mib: 1, deflate_on_oom: true, free_page_hinting: true } }),
      /free_page_hinting` asks/,
    ],
    [
      file({ balloon: { amount_mib: 1, deflate_on_oom: true, stats_polling_interval_s: 65536 } }),
      /interval_s` has/,
    ],
    [file({ logger: { level: "Loud" } }), /unknown variant `Loud`, expected one of `Off`/],
    [file({ metrics: {} }), /missing field `metrics.metrics_path`/],
    [file({ metrics: { metrics_path: "m", properties: { a: 1 } } }), /`metrics.properties.a` has an invalid/],
    [file({ "serial-config": { rate_limiter: { size: 1, refill_time: 1 } } }), /rate_limiter` asks for/],
    [
      file({ hypertopia: { channels: { control: "c", data: ["d"], errors: [] } } }),
      /1 data sockets and 0 error/,
    ],
    [
      file({
        hypertopia: {
          forwards: [1, 2].map((guest) => ({
            protocol: "tcp",
            address: "0.0.0.0",
            host: 80,
            guest_ip: "10.0.0.2",
            guest,
          })),
        },
      }),
      /`hypertopia.forwards\[1\]` forwards tcp 0.0.0.0:80 a second time/,
    ],
  ];
  for (const [content, expected] of cases) {
    assert.throws(() => parseConfigFile(content), (error: Error) => {
      assert.ok(error instanceof MachineError, `${error.stack}`);
      assert.match(error.message, expected);
      assert.match(error.message, /^Cannot (use the configuration file|start the machine) as .*[^.]$/);
      return true;
    });
  }
});

Deno.test("a codec takes null for what is absent, and names in any case where Firecracker does", () => {
  assert.deepEqual(
    machineJson.parse({ vcpu_count: 1, mem_size_mib: 1, smt: null, cpu_template: "None" }, PLACE),
    { ...DEFAULT_CONFIGURATION.machine, memSizeMib: 1 },
  );
  assert.deepEqual(loggerJson.parse({ level: "WARNING", log_path: null }, PLACE), { level: "Warn" });
  assert.deepEqual(loggerJson.parse({ level: "oFF" }, PLACE), { level: "Off" });
  assert.deepEqual(vsockJson.parse({ vsock_id: "old", guest_cid: 3, uds_path: "v" }, PLACE), {
    guestCid: 3,
    udsPath: "v",
  });
  const nic = networkInterfaceJson.parse({
    iface_id: "a",
    host_dev_name: "tap0",
    guest_mac: "06:00:AC:10:00:02",
  }, PLACE);
  assert.equal(nic.guestMac, "06:00:ac:10:00:02");
});

Deno.test("a codec cuts numbers of 64 bits to what a double holds", () => {
  const bucket = JSON.parse('{"size": 18446744073709551615, "refill_time": 1}');
  const entropy = entropyJson.parse({ rate_limiter: { ops: bucket } }, PLACE);
  assert.equal(entropy.rateLimiter?.ops?.size, Number.MAX_SAFE_INTEGER);
  assert.throws(() => entropyJson.parse({ rate_limiter: { ops: { ...bucket, size: 2 ** 65 } } }, PLACE));
  const printed = statisticsJson.print({ targetPages: 512, actualPages: 255, swapIn: 2 ** 64 });
  assert.deepEqual(printed, {
    target_pages: 512,
    actual_pages: 255,
    target_mib: 2,
    actual_mib: 0,
    swap_in: Number.MAX_SAFE_INTEGER,
  });
  assert.deepEqual(statisticsJson.parse(printed, PLACE), {
    targetPages: 512,
    actualPages: 255,
    swapIn: Number.MAX_SAFE_INTEGER,
  });
});

Deno.test("withDrive keeps the root device first, and replaces a drive of the same name in its place", () => {
  let configuration: MachineConfiguration = DEFAULT_CONFIGURATION;
  const add = (id: string, isRootDevice: boolean) => {
    configuration = withDrive(configuration, drive(id, isRootDevice), PLACE);
    return configuration.drives.map((each) => `${each.id}${each.isRootDevice ? "*" : ""}`).join(" ");
  };
  assert.equal(add("a", false), "a");
  assert.equal(add("b", true), "b* a");
  assert.equal(add("c", false), "b* a c");
  assert.throws(() => add("a", true), /a root device already exists, "b"/);
  assert.equal(add("b", true), "b* a c");
  assert.equal(add("a", false), "b* a c");
  assert.equal(add("b", false), "b a c");
  assert.equal(add("c", true), "c* a b");
  assert.deepEqual(DEFAULT_CONFIGURATION.drives, []);
});

Deno.test("kernelCommandLine says where the root file system is, before what init is told", () => {
  const line = (bootArgs: string | undefined, drives: DriveConfiguration[] = []) =>
    kernelCommandLine({
      ...DEFAULT_CONFIGURATION,
      bootSource: { kernelImagePath: "k", ...(bootArgs === undefined ? {} : { bootArgs }) },
      drives,
    });
  assert.equal(line(undefined), DEFAULT_BOOT_ARGS);
  assert.equal(line(""), "");
  assert.equal(line("", [drive("a", true)]), "root=/dev/vda rw");
  assert.equal(line("quiet", [drive("a", false)]), "quiet");
  assert.equal(line("quiet", [{ ...drive("a", true), isReadOnly: true }]), "quiet root=/dev/vda ro");
  assert.equal(line("quiet", [{ ...drive("a", true), partuuid: "x-1" }]), "quiet root=PARTUUID=x-1 rw");
  assert.equal(line("quiet -- -s pci=off", [drive("a", true)]), "quiet root=/dev/vda rw -- -s pci=off");
  assert.equal(line("ro noapic pci=off nomodules"), "ro noapic nomodules");
  assert.equal(line('dyndbg="file a  +p"'), 'dyndbg="file a  +p"');
});

Deno.test("bootable gives a machine that can grow its balloon, and wants a kernel", () => {
  assert.throws(() => bootable(DEFAULT_CONFIGURATION), /as it has no kernel: PUT \/boot-source first/);
  const machine = { ...DEFAULT_CONFIGURATION.machine, maxMemSizeMib: 512 };
  const configuration = { ...DEFAULT_CONFIGURATION, machine, bootSource: { kernelImagePath: "k" } };
  const balloon = { amountMib: 384, deflateOnOom: false, statsPollingInterval: 0, freePageReporting: true };
  assert.deepEqual(bootable(configuration), { ...configuration, balloon });
  const own = { ...configuration, balloon: { ...balloon, amountMib: 7 } };
  assert.deepEqual(bootable(own), own);
});

Deno.test("updateRateLimiter keeps what is not named and lifts what has no size or no refill time", () => {
  const limiter = { bandwidth: { size: 1, refillTime: 1 }, ops: { size: 2, refillTime: 2 } };
  assert.deepEqual(updateRateLimiter(limiter, {}), limiter);
  assert.deepEqual(updateRateLimiter(limiter, { ops: { size: 0, refillTime: 1 } }), {
    bandwidth: limiter.bandwidth,
  });
  assert.deepEqual(updateRateLimiter({ ops: limiter.ops }, { ops: { size: 1, refillTime: 0 } }), {});
  assert.deepEqual(updateRateLimiter({}, { ops: limiter.ops }), { ops: limiter.ops });
  const lifted = { ops: { size: 0, refill_time: 1 }, bandwidth: { size: 1, refill_time: 1 } };
  assert.deepEqual(entropyJson.parse({ rate_limiter: lifted }, PLACE), {
    rateLimiter: { bandwidth: { size: 1, refillTime: 1 } },
  });
});

Deno.test("checkFiles opens what is read, and looks for folders of what is made", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const path = `${folder}/file`;
    await Deno.writeTextFile(path, "content");
    await new Deno.Command("mkfifo", { args: [`${folder}/fifo`] }).output();
    const all: MachineConfiguration = {
      ...FULL,
      bootSource: { kernelImagePath: path, initrdPath: path },
      drives: [{ ...drive("a", true), pathOnHost: path }],
      vsock: { guestCid: 3, udsPath: `${folder}/v.sock` },
      serial: { outPath: `${folder}/serial` },
      logger: { path: `${folder}/fifo` },
      metrics: { path: "/dev/null", emitId: false },
      hypertopia: {
        console: { socket: `${folder}/c`, log: path },
        channels: { control: `${folder}/c`, data: [`${folder}/d`], errors: [`${folder}/e`] },
        forwards: [],
        restartOnReset: false,
      },
    };
    await checkFiles(all, "it");
    assert.equal(await Deno.readTextFile(path), "content");
    await checkFiles(
      { drives: [{ ...drive("a", true), pathOnHost: Deno.execPath(), isReadOnly: true }] },
      "it",
    );
    const none = `${folder}/none`;
    const cases: [Partial<MachineConfiguration>, RegExp][] = [
      [{ bootSource: { kernelImagePath: none } }, /the kernel "[^"]+" cannot be opened for reading: No such/],
      [{ bootSource: { kernelImagePath: folder } }, /the kernel .*: it is neither a file nor a block device/],
      [{ bootSource: { kernelImagePath: path, initrdPath: none } }, /the initramfs .*: No such file/],
      [{ drives: [drive("a", true)] }, /the file of drive "a" "\/a" .* reading and writing: No such file/],
      [{ drives: [{ ...drive("a", true), pathOnHost: `${folder}/fifo` }] }, /it is neither a file nor/],
      // A program that runs can be read only, even by root.
      [
        { drives: [{ ...drive("a", true), pathOnHost: Deno.execPath() }] },
        /reading and writing: Text file busy/,
      ],
      [{ vsock: { guestCid: 3, udsPath: `${none}/v` } }, /the socket .* cannot be made: No such file/],
      [{ serial: { outPath: folder } }, /the file .* cannot be made: it is neither a file nor/],
      [{ logger: { path: `${none}/log` } }, /the file .* cannot be made: No such file/],
      [{ metrics: { path: `${path}/m`, emitId: false } }, /the file .* cannot be made: Not a directory/],
      [
        { hypertopia: { console: { socket: `${path}/s`, log: path }, forwards: [], restartOnReset: false } },
        /its folder is none/,
      ],
    ];
    for (const [part, expected] of cases) {
      await assert.rejects(checkFiles(part, "it"), (error: Error) => {
        assert.ok(error instanceof MachineError);
        assert.match(error.message, /^Cannot use it as /);
        assert.match(error.message, expected);
        return true;
      });
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("readBounded stops at its limit and takes UTF-8 only", async () => {
  const stream = (...chunks: number[][]) => ReadableStream.from(chunks.map((chunk) => new Uint8Array(chunk)));
  assert.equal(await readBounded(null, 4, "it"), "");
  assert.equal(await readBounded(stream([0x61, 0xc3], [0xa9, 0x62]), 4, "it"), "aéb");
  await assert.rejects(readBounded(stream([1, 2], [3, 4, 5]), 4, "it"), /as it has more than 4 bytes/);
  await assert.rejects(readBounded(stream([0xff]), 4, "it"), MachineError);
  await assert.rejects(readBounded(stream([0xc3]), 4, "it"), MachineError);
});

const PIECES: readonly unknown[] = [
  null,
  true,
  false,
  0,
  1,
  -1,
  1.5,
  300,
  2 ** 53,
  1e300,
  "",
  "None",
  "/tmp",
  "a\0b",
  "\ud800",
  "06:00:AC:10:00:02",
  [],
  {},
  [[]],
  { size: 1 },
  JSON.parse('{"__proto__": {"a": 1}}'),
];

function pick<T>(items: readonly T[]): T {
  return items[Math.floor(Math.random() * items.length)]!;
}

/** Changes some values of a JSON value at random. */
function damage(value: unknown): unknown {
  if (Math.random() < 0.008) return pick(PIECES);
  if (Array.isArray(value)) {
    return value.flatMap((each) => Math.random() < 0.02 ? [each, damage(each)] : [damage(each)]);
  }
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).flatMap(([key, each]) => {
      const chance = Math.random();
      return chance < 0.002 ? [] : [[chance < 0.004 ? `${key}x` : key, damage(each)]];
    }),
  );
}

Deno.test("parseConfigFile refuses damaged files in words, or reads them as they are written back", () => {
  const whole = configurationJson.print(FULL);
  let accepted = 0;
  for (let round = 0; round < 2000; round++) {
    const content = JSON.stringify(damage(whole)) ?? "";
    let parsed;
    try {
      parsed = parseConfigFile(content);
    } catch (error) {
      assert.ok(error instanceof MachineError, `${content}: ${(error as Error).stack}`);
      continue;
    }
    accepted++;
    const again = parseConfigFile(JSON.stringify(configurationJson.print(parsed.configuration)));
    assert.deepEqual(again.configuration, parsed.configuration, content);
  }
  assert.ok(accepted > 100, `only ${accepted} of 2000 were accepted`);
});

Deno.test("no codec breaks on any JSON", () => {
  const codecs: Codec<unknown>[] = [
    balloonJson,
    bootSourceJson,
    driveJson,
    driveUpdateJson,
    entropyJson,
    forwardsJson,
    machineJson,
    metricsJson,
    networkInterfaceJson,
    serialJson,
    statisticsJson,
    vsockJson,
  ] as Codec<unknown>[];
  const random = (depth: number): unknown =>
    depth > 0 && Math.random() < 0.6
      ? Object.fromEntries(
        Array.from({ length: 3 }, () => [
          pick(["drive_id", "size", "rate_limiter", "ops", "path_on_host", "is_root_device", "x"]),
          random(depth - 1),
        ]),
      )
      : pick(PIECES);
  for (let round = 0; round < 3000; round++) {
    const value = random(3);
    try {
      pick(codecs).parse(value, PLACE);
    } catch (error) {
      assert.ok(error instanceof MachineError, `${JSON.stringify(value)}: ${(error as Error).stack}`);
    }
  }
});
