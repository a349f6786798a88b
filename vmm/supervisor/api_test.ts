import assert from "node:assert/strict";
import { MachineError } from "../errors.ts";
import { Api, type Controller, FIRECRACKER_VERSION, MAX_PAYLOAD } from "./api.ts";
import {
  type BootableConfiguration,
  DEFAULT_CONFIGURATION,
  type InstanceState,
  kernelCommandLine,
  parseConfigFile,
  type RunReport,
} from "./config.ts";

/** A machine of paper: it notes what it is told. */
class FakeController implements Controller {
  readonly id = "shop-web";
  state: InstanceState = "Not started";
  readonly calls: unknown[][] = [];
  configuration: BootableConfiguration | undefined;
  run: RunReport = { uptime: 0, exits: {} };
  /** Thrown by the next call. */
  failure: unknown;
  /** The next calls wait for it. */
  gate: Promise<void> = Promise.resolve();

  async #note(...call: unknown[]): Promise<void> {
    this.calls.push(call);
    await this.gate;
    const failure = this.failure;
    this.failure = undefined;
    if (failure !== undefined) throw failure;
  }
  report(): RunReport {
    return this.run;
  }
  async start(configuration: BootableConfiguration): Promise<void> {
    await this.#note("start");
    this.configuration = configuration;
    this.state = "Running";
    this.run = { uptime: 12.4, exits: { io: 3, mmio: 4 } };
  }
  async pause(): Promise<void> {
    await this.#note("pause");
    this.state = "Paused";
  }
  async resume(): Promise<void> {
    await this.#note("resume");
    this.state = "Running";
  }
  sendCtrlAltDel = () => this.#note("sendCtrlAltDel");
  stop = () => this.#note("stop");
  kill(): Promise<void> {
    this.calls.push(["kill"]);
    return Promise.resolve();
  }
  reboot = () => this.#note("reboot");
  setBalloon = (target: number) => this.#note("setBalloon", target);
  balloonStatistics = () => Promise.resolve({ targetPages: 25600, actualPages: 512, freeMemory: 4096 });
  setStatisticsInterval = (seconds: number) => this.#note("setStatisticsInterval", seconds);
  updateDrive = (...call: unknown[]) => this.#note("updateDrive", ...call);
  updateNic = (...call: unknown[]) => this.#note("updateNic", ...call);
  setForwards = (forwards: unknown) => this.#note("setForwards", forwards);
  flushMetrics = () => this.#note("flushMetrics");
  metrics = () => ({ block: { reads: 7 } });
}

interface Answer {
  readonly status: number;
  readonly json: unknown;
}

class Machine implements AsyncDisposable {
  readonly controller = new FakeController();
  readonly api = new Api(this.controller);
  readonly folder = Deno.makeTempDirSync();
  readonly kernel = `${this.folder}/vmlinux`;
  readonly disk = `${this.folder}/root.ext4`;

  constructor() {
    Deno.writeTextFileSync(this.kernel, "kernel");
    Deno.writeTextFileSync(this.disk, "disk");
  }
  async ask(name: string, body?: unknown): Promise<Answer> {
    const [method = "", path = ""] = name.split(" ");
    const text = body === undefined || typeof body === "string" ? body : JSON.stringify(body);
    const response = await this.api.handle(
      new Request(`http://localhost${path}`, { method, ...(text === undefined ? {} : { body: text }) }),
    );
    const content = await response.text();
    if (response.status === 204) assert.equal(content, "");
    else assert.equal(response.headers.get("content-type"), "application/json");
    return { status: response.status, json: content === "" ? undefined : JSON.parse(content) };
  }
  async get(path: string): Promise<unknown> {
    const { status, json } = await this.ask(`GET ${path}`);
    assert.equal(status, 200, JSON.stringify(json));
    return json;
  }
  async change(name: string, body: unknown): Promise<void> {
    assert.deepEqual(await this.ask(name, body), { status: 204, json: undefined });
  }
  async refuses(name: string, body: unknown, reason: RegExp): Promise<void> {
    const { status, json } = await this.ask(name, body);
    assert.deepEqual([status, Object.keys(json as object)], [400, ["fault_message"]], JSON.stringify(json));
    const message = (json as { fault_message: string }).fault_message;
    assert.match(message, reason);
    assert.match(message, /^Cannot \w+ .+ as .*[^.]$/);
  }
  async started(): Promise<this> {
    await this.change("PUT /boot-source", { kernel_image_path: this.kernel });
    await this.change("PUT /drives/rootfs", this.drive("rootfs", true));
    await this.change("PUT /network-interfaces/eth0", { iface_id: "eth0", host_dev_name: "tap0" });
    await this.change("PUT /balloon", {
      amount_mib: 10,
      deflate_on_oom: true,
      stats_polling_interval_s: 1,
    });
    await this.change("PUT /actions", { action_type: "InstanceStart" });
    this.controller.calls.length = 0;
    return this;
  }
  drive(id: string, isRoot: boolean): Record<string, unknown> {
    return { drive_id: id, path_on_host: this.disk, is_root_device: isRoot, is_read_only: false };
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

Deno.test("Api takes Firecracker's getting-started sequence", async () => {
  await using machine = new Machine();
  assert.deepEqual(await machine.get("/"), {
    id: "shop-web",
    state: "Not started",
    vmm_version: FIRECRACKER_VERSION,
    app_name: "Hypertopia",
  });
  await machine.change("PUT /logger", {
    log_path: `${machine.folder}/log`,
    level: "Debug",
    show_level: true,
    show_log_origin: true,
  });
  await machine.change("PUT /boot-source", {
    kernel_image_path: machine.kernel,
    boot_args: "console=ttyS0 reboot=k panic=1",
  });
  await machine.change("PUT /drives/rootfs", machine.drive("rootfs", true));
  await machine.change("PUT /network-interfaces/net1", {
    iface_id: "net1",
    guest_mac: "06:00:AC:10:00:02",
    host_dev_name: "tap0",
  });
  await machine.change("PUT /actions", { action_type: "InstanceStart" });
  const { configuration } = machine.controller;
  assert.ok(configuration);
  assert.deepEqual(configuration, {
    ...DEFAULT_CONFIGURATION,
    logger: { path: `${machine.folder}/log`, level: "Debug", showLevel: true, showLogOrigin: true },
    bootSource: { kernelImagePath: machine.kernel, bootArgs: "console=ttyS0 reboot=k panic=1" },
    drives: [{
      id: "rootfs",
      isRootDevice: true,
      cacheType: "Unsafe",
      isReadOnly: false,
      pathOnHost: machine.disk,
      ioEngine: "Sync",
      format: "raw",
    }],
    networkInterfaces: [{ id: "net1", guestMac: "06:00:ac:10:00:02", hostDevName: "tap0" }],
  });
  assert.equal(
    kernelCommandLine(configuration),
    "console=ttyS0 reboot=k panic=1 root=/dev/vda rw",
  );
  assert.deepEqual((await machine.get("/") as { state: string }).state, "Running");
  await machine.change("PUT /actions", { action_type: "SendCtrlAltDel" });
  assert.deepEqual(machine.controller.calls, [["start"], ["sendCtrlAltDel"]]);
});

Deno.test("Api shows and changes the machine before it starts", async () => {
  await using machine = new Machine();
  assert.deepEqual(await machine.get("/version"), { firecracker_version: FIRECRACKER_VERSION });
  assert.deepEqual(await machine.get("/machine-config"), {
    vcpu_count: 1,
    mem_size_mib: 128,
    smt: false,
    track_dirty_pages: false,
    huge_pages: "None",
  });
  await machine.change("PUT /machine-config", { vcpu_count: 2, mem_size_mib: 256, smt: true });
  await machine.change("PATCH /machine-config", { mem_size_mib: 512, max_mem_size_mib: 1024 });
  await machine.refuses("PATCH /machine-config", {}, /changes nothing/);
  await machine.refuses("PATCH /machine-config", { vcpu_count: 3 }, /`vcpu_count` is 3: with `smt`/);
  const config = {
    vcpu_count: 2,
    mem_size_mib: 512,
    max_mem_size_mib: 1024,
    smt: true,
    track_dirty_pages: false,
    huge_pages: "None",
  };
  assert.deepEqual(await machine.get("/machine-config"), config);

  await machine.refuses("GET /balloon", undefined, /the machine has no balloon/);
  const balloon = { amount_mib: 1000, deflate_on_oom: false };
  await machine.refuses("PUT /balloon", { ...balloon, amount_mib: 1025 }, /`amount_mib` is 1025/);
  await machine.change("PUT /balloon", balloon);
  assert.deepEqual(await machine.get("/balloon"), {
    ...balloon,
    stats_polling_interval_s: 0,
    free_page_hinting: false,
    free_page_reporting: false,
  });
  await machine.refuses(
    "PUT /machine-config",
    { vcpu_count: 1, mem_size_mib: 999 },
    /smaller than the balloon/,
  );

  await machine.change("PUT /vsock", { guest_cid: 3, uds_path: `${machine.folder}/v.sock` });
  await machine.change("PUT /entropy", {});
  await machine.change("PUT /serial", { serial_out_path: `${machine.folder}/serial` });
  await machine.change("PUT /metrics", { metrics_path: `${machine.folder}/metrics` });
  await machine.refuses("PUT /metrics", { metrics_path: `${machine.folder}/m` }, /set up already/);
  await machine.change("PUT /hypertopia/forwards", [
    { protocol: "udp", address: "127.0.0.1", host: 5353, guest_ip: "10.0.0.2", guest: 53 },
  ]);
  await machine.change("PUT /boot-source", { kernel_image_path: machine.kernel });
  await machine.change("PUT /drives/a", machine.drive("a", false));
  await machine.change("PUT /drives/b", machine.drive("b", true));
  await machine.refuses("PUT /drives/c", machine.drive("c", true), /a root device already exists, "b"/);
  await machine.change("PUT /drives/a", { ...machine.drive("a", false), is_read_only: true });

  const shown = await machine.get("/vm/config") as Record<string, unknown>;
  assert.deepEqual(shown["machine-config"], config);
  assert.deepEqual(shown["vsock"], { guest_cid: 3, uds_path: `${machine.folder}/v.sock` });
  assert.deepEqual(shown["entropy"], { rate_limiter: null });
  assert.deepEqual(shown["serial-config"], { serial_out_path: `${machine.folder}/serial` });
  assert.deepEqual(shown["cpu-config"], null);
  assert.deepEqual(
    (shown["drives"] as Record<string, unknown>[]).map((each) => [
      each["drive_id"],
      each["is_read_only"],
      each["socket"],
    ]),
    [["b", false, null], ["a", true, null]],
  );
  // What is shown is a configuration file of the same machine.
  assert.deepEqual(parseConfigFile(JSON.stringify(shown)).configuration, machine.api.configuration);
  assert.deepEqual(machine.controller.calls, []);
});

Deno.test("Api checks files when it is told of them, and refuses ids that do not fit", async () => {
  await using machine = new Machine();
  const drive = machine.drive("rootfs", true);
  await machine.refuses("PUT /boot-source", { kernel_image_path: "/none" }, /the kernel .* No such file/);
  await machine.refuses("PUT /drives/rootfs", { ...drive, path_on_host: "/none" }, /No such file/);
  await machine.refuses("PUT /vsock", { guest_cid: 3, uds_path: "/none/v" }, /No such file/);
  await machine.refuses("PUT /logger", { log_path: "/none/log" }, /No such file/);
  await machine.refuses("PUT /drives/other", drive, /"other", does not match the one in the body, "rootfs"/);
  await machine.refuses("PUT /drives/root-fs", drive, /letters, digits and _/);
  await machine.refuses("PUT /drives/", drive, /must not be empty/);
  await machine.refuses("PUT /drives", drive, /must not be empty/);
  await machine.refuses("PUT /drives/rootfs/more", drive, /no such method and path/);
  await machine.refuses("PUT /network-interfaces/%2e", {}, /letters, digits and _/);
  await machine.refuses(
    "PUT /network-interfaces/b",
    { iface_id: "a", host_dev_name: "t" },
    /does not match/,
  );
  assert.deepEqual(machine.api.configuration, DEFAULT_CONFIGURATION);
  const nic = { iface_id: "a", host_dev_name: "tap0", guest_mac: "06:00:ac:10:00:02" };
  await machine.change("PUT /network-interfaces/a", nic);
  await machine.change("PUT /network-interfaces/a", { ...nic, mtu: 1400 });
  assert.deepEqual(machine.api.configuration.networkInterfaces.map(({ id, mtu }) => [id, mtu]), [[
    "a",
    1400,
  ]]);
});

Deno.test("Api refuses what is not for the state of the machine", async () => {
  await using machine = new Machine();
  const post: [string, unknown][] = [
    ["PATCH /drives/rootfs", { drive_id: "rootfs", path_on_host: machine.disk }],
    ["PATCH /network-interfaces/eth0", { iface_id: "eth0" }],
    ["PATCH /balloon", { amount_mib: 1 }],
    ["GET /balloon/statistics", undefined],
    ["PATCH /balloon/statistics", { stats_polling_interval_s: 1 }],
    ["PUT /actions", { action_type: "FlushMetrics" }],
    ["PUT /actions", { action_type: "SendCtrlAltDel" }],
    ["PATCH /vm", { state: "Paused" }],
    ["PATCH /vm", { state: "Resumed" }],
    ["PUT /hypertopia/actions", { action: "Reboot" }],
  ];
  for (const [name, body] of post) {
    await machine.refuses(name, body, /is not supported before starting the machine/);
  }
  await machine.refuses("PUT /actions", { action_type: "InstanceStart" }, /no kernel: PUT \/boot-source/);
  await machine.started();
  const before = machine.api.configuration;
  const pre: [string, unknown][] = [
    ["PUT /machine-config", { vcpu_count: 1, mem_size_mib: 1 }],
    ["PATCH /machine-config", { vcpu_count: 1 }],
    ["PUT /boot-source", { kernel_image_path: machine.kernel }],
    ["PUT /drives/b", machine.drive("b", false)],
    ["PUT /network-interfaces/eth1", { iface_id: "eth1", host_dev_name: "tap1" }],
    ["PUT /vsock", { guest_cid: 3, uds_path: "/tmp/v" }],
    ["PUT /entropy", {}],
    ["PUT /serial", {}],
    ["PUT /logger", {}],
    ["PUT /metrics", { metrics_path: "/dev/null" }],
    ["PUT /balloon", { amount_mib: 1, deflate_on_oom: true }],
    ["PUT /actions", { action_type: "InstanceStart" }],
  ];
  for (const [name, body] of pre) {
    await machine.refuses(name, body, /is not supported after starting the machine/);
  }
  assert.equal(machine.api.configuration, before);

  machine.controller.run = {
    uptime: 1,
    exits: {},
    end: { reason: "crash", detail: "the guest's kernel panicked" },
  };
  for (const [name, body] of post) {
    await machine.refuses(name, body, /as the machine has ended: the guest's kernel panicked$/);
  }
  await machine.refuses("PUT /hypertopia/forwards", [], /the machine has ended/);
  assert.deepEqual(machine.controller.calls, []);
  await machine.change("PUT /hypertopia/actions", { action: "Stop" });
  assert.deepEqual(machine.controller.calls, [["stop"]]);
});

Deno.test("Api changes a machine that runs, and shows what it has become", async () => {
  await using machine = await new Machine().started();
  const { controller } = machine;
  const shown = async (key: string) =>
    (await machine.get("/vm/config") as Record<string, Record<string, unknown>[]>)[key]![0]!;
  const bucket = { size: 100, one_time_burst: null, refill_time: 10 };

  await machine.change("PATCH /drives/rootfs", { drive_id: "rootfs", path_on_host: "/new" });
  const limiter = { bandwidth: bucket, ops: bucket };
  await machine.change("PATCH /drives/rootfs", { drive_id: "rootfs", rate_limiter: limiter });
  await machine.change("PATCH /drives/rootfs", {
    drive_id: "rootfs",
    rate_limiter: { ops: { size: 0, refill_time: 0 } },
  });
  assert.deepEqual(await shown("drives"), {
    drive_id: "rootfs",
    partuuid: null,
    is_root_device: true,
    cache_type: "Unsafe",
    is_read_only: false,
    path_on_host: "/new",
    rate_limiter: { bandwidth: bucket, ops: null },
    io_engine: "Sync",
    socket: null,
  });
  await machine.refuses("PATCH /drives/b", { drive_id: "b", path_on_host: "/x" }, /not found: .* "rootfs"/);
  await machine.refuses("PATCH /drives/rootfs", { drive_id: "rootfs" }, /changes nothing/);
  await machine.refuses(
    "PATCH /drives/rootfs",
    { drive_id: "rootfs", io_engine: "Sync" },
    /unknown field `io_engine`/,
  );

  await machine.change("PATCH /network-interfaces/eth0", {
    iface_id: "eth0",
    tx_rate_limiter: { ops: bucket },
  });
  assert.deepEqual(await shown("network-interfaces"), {
    iface_id: "eth0",
    host_dev_name: "tap0",
    guest_mac: null,
    mtu: null,
    rx_rate_limiter: null,
    tx_rate_limiter: { bandwidth: null, ops: bucket },
  });
  await machine.refuses("PATCH /network-interfaces/x", { iface_id: "x" }, /was not found/);

  await machine.change("PATCH /balloon", { amount_mib: 100 });
  await machine.refuses("PATCH /balloon", { amount_mib: 129 }, /at most the memory of the guest, 128/);
  await machine.change("PATCH /balloon/statistics", { stats_polling_interval_s: 5 });
  await machine.change("PATCH /balloon/statistics", { stats_polling_interval_s: 5 });
  await machine.refuses("PATCH /balloon/statistics", { stats_polling_interval_s: 0 }, /cannot be turned off/);
  assert.deepEqual(await machine.get("/balloon"), {
    amount_mib: 100,
    deflate_on_oom: true,
    stats_polling_interval_s: 5,
    free_page_hinting: false,
    free_page_reporting: false,
  });
  assert.deepEqual(await machine.get("/balloon/statistics"), {
    target_pages: 25600,
    actual_pages: 512,
    target_mib: 100,
    actual_mib: 2,
    free_memory: 4096,
  });

  await machine.change("PATCH /vm", { state: "Resumed" });
  await machine.change("PATCH /vm", { state: "Paused" });
  await machine.change("PATCH /vm", { state: "Paused" });
  assert.equal((await machine.get("/") as { state: string }).state, "Paused");
  await machine.change("PATCH /vm", { state: "Resumed" });
  await machine.change("PUT /actions", { action_type: "FlushMetrics" });
  const forward = { protocol: "tcp", address: "127.0.0.1", host: 80, guest_ip: "10.0.0.2", guest: 80 };
  await machine.change("PUT /hypertopia/forwards", [forward]);
  await machine.refuses("PUT /hypertopia/forwards", [forward, forward], /a second time/);
  await machine.change("PUT /hypertopia/actions", { action: "Reboot" });
  assert.deepEqual(controller.calls, [
    ["updateDrive", "rootfs", { pathOnHost: "/new" }],
    ["updateDrive", "rootfs", {
      rateLimiter: { bandwidth: { size: 100, refillTime: 10 }, ops: { size: 100, refillTime: 10 } },
    }],
    ["updateDrive", "rootfs", { rateLimiter: { bandwidth: { size: 100, refillTime: 10 } } }],
    ["updateNic", "eth0", { txRateLimiter: { ops: { size: 100, refillTime: 10 } } }],
    ["setBalloon", 100 * 2 ** 20],
    ["setStatisticsInterval", 5],
    ["pause"],
    ["resume"],
    ["flushMetrics"],
    ["setForwards", [{ protocol: "tcp", address: "127.0.0.1", host: 80, guestIp: "10.0.0.2", guest: 80 }]],
    ["reboot"],
  ]);
  assert.deepEqual(await machine.get("/hypertopia/status"), {
    id: "shop-web",
    state: "Running",
    pid: Deno.pid,
    uptime_ms: 12,
    exits: { io: 3, mmio: 4 },
    end: null,
  });
  assert.deepEqual(await machine.get("/hypertopia/metrics"), { block: { reads: 7 } });
});

Deno.test("Api gives a machine that can grow its balloon, and shows it once it runs", async () => {
  await using machine = new Machine();
  await machine.change("PUT /boot-source", { kernel_image_path: machine.kernel });
  await machine.change("PUT /machine-config", { vcpu_count: 1, mem_size_mib: 128, max_mem_size_mib: 512 });
  await machine.refuses("GET /balloon", undefined, /no balloon/);
  await machine.change("PUT /actions", { action_type: "InstanceStart" });
  assert.equal((await machine.get("/balloon") as { amount_mib: number }).amount_mib, 384);
  await machine.change("PATCH /balloon", { amount_mib: 512 });
});

Deno.test("Api has no statistics where they were not asked for", async () => {
  await using machine = new Machine();
  await machine.change("PUT /boot-source", { kernel_image_path: machine.kernel });
  await machine.change("PUT /balloon", { amount_mib: 0, deflate_on_oom: true });
  await machine.change("PUT /actions", { action_type: "InstanceStart" });
  await machine.refuses("GET /balloon/statistics", undefined, /statistics are off/);
  await machine.refuses("PATCH /balloon/statistics", { stats_polling_interval_s: 1 }, /statistics are off/);
  await machine.change("PATCH /balloon/statistics", { stats_polling_interval_s: 0 });
});

Deno.test("Api refuses what this machine monitor lacks, in words", async () => {
  await using machine = new Machine();
  const lacks: [string, RegExp][] = [
    ["GET /mmds", /has no metadata service \(MMDS\)/],
    ["PUT /mmds", /MMDS/],
    ["PATCH /mmds", /MMDS/],
    ["PUT /mmds/config", /MMDS/],
    ["PUT /snapshot/create", /has no snapshots/],
    ["PUT /snapshot/load", /has no snapshots/],
    ["PUT /cpu-config", /has no CPU templates/],
    ["GET /hotplug/memory", /has no memory hotplug/],
    ["PUT /hotplug/memory", /has no memory hotplug/],
    ["PATCH /hotplug/memory", /has no memory hotplug/],
    ["PUT /pmem/a", /has no pmem devices/],
    ["PATCH /pmem/a", /has no pmem devices/],
    ["DELETE /pmem/a", /has no pmem devices/],
    ["PATCH /balloon/hinting/start", /has no free page hinting/],
    ["GET /balloon/hinting/status", /has no free page hinting/],
    ["DELETE /drives/a", /has no hot-unplugging/],
    ["DELETE /network-interfaces/a", /has no hot-unplugging/],
  ];
  for (const [name, reason] of lacks) {
    await machine.refuses(name, /^(PUT|PATCH)/.test(name) ? {} : undefined, reason);
  }
  await machine.refuses(
    "PUT /machine-config",
    { vcpu_count: 1, mem_size_mib: 2, huge_pages: "2M" },
    /huge pages/,
  );
});

Deno.test("Api answers wrong paths, methods and bodies with status 400", async () => {
  await using machine = new Machine();
  const wrong: [string, unknown, RegExp][] = [
    ["GET /none", undefined, /^Cannot serve GET \/none as no such method and path are in this API$/],
    ["POST /actions", { action_type: "InstanceStart" }, /no such method and path/],
    ["DELETE /", undefined, /no such method and path/],
    ["OPTIONS /", undefined, /no such method and path/],
    ["GET /actions", undefined, /no such method and path/],
    ["PUT /", {}, /no such method and path/],
    ["PUT /version", {}, /no such method and path/],
    ["GET /vm", undefined, /no such method and path/],
    ["GET /mmdsx", undefined, /no such method and path/],
    ["GET /__proto__", undefined, /no such method and path/],
    [`GET /${"a".repeat(5000)}`, undefined, /^Cannot serve GET \/a{195} as no such/],
    ["PUT /machine-config", undefined, /body is empty/],
    ["PUT /machine-config", "", /body is empty/],
    ["PATCH /vm", undefined, /body is empty/],
    ["PUT /actions", "{", /the body of PUT \/actions as it is not JSON/],
    ["PUT /actions", "[".repeat(MAX_PAYLOAD), /as it is not JSON/],
    ["PUT /actions", " ".repeat(MAX_PAYLOAD + 1), /as it has more than 51200 bytes/],
    ["PUT /actions", "[]", /it has an invalid type: array, expected an object/],
    ["PUT /actions", {}, /missing field `action_type`/],
    ["PUT /actions", { action_type: "Explode" }, /unknown variant `Explode`, expected one of `FlushMetrics`/],
    ["PUT /actions", { action_type: "InstanceStart", now: 1 }, /unknown field `now`, expected `action_type`/],
    ["PATCH /vm", { state: "Stopped" }, /unknown variant `Stopped`, expected `Paused` or `Resumed`/],
    ["PUT /hypertopia/actions", { action: "Explode" }, /unknown variant `Explode`/],
    ["PUT /hypertopia/forwards", {}, /invalid type: object, expected an array/],
  ];
  for (const [name, body, reason] of wrong) await machine.refuses(name, body, reason);
  // As large as it may be, and right.
  const body = JSON.stringify({ action_type: "Explode" });
  await machine.refuses("PUT /actions", body + " ".repeat(MAX_PAYLOAD - body.length), /unknown variant/);
  await machine.get("//version");
  await machine.get("/version/");
  await machine.get("/version?x=1");
  const odd = await machine.api.handle(
    { url: "http+unix://a b:c/version", method: "GET", body: null, headers: new Headers() } as Request,
  );
  assert.equal(odd.status, 200);
});

Deno.test("Api answers a failure of the machine with its words, and stays as it was", async () => {
  await using machine = new Machine();
  await machine.change("PUT /boot-source", { kernel_image_path: machine.kernel });
  machine.controller.failure = new MachineError('Cannot open the tap device "tap0" as it is busy: free it');
  await machine.refuses("PUT /actions", { action_type: "InstanceStart" }, /"tap0" as it is busy/);
  await machine.change("PUT /drives/rootfs", machine.drive("rootfs", true));
  await machine.change("PUT /balloon", { amount_mib: 1, deflate_on_oom: true });
  await machine.change("PUT /actions", { action_type: "InstanceStart" });

  machine.controller.failure = new MachineError("Cannot open /new as it is locked");
  await machine.refuses(
    "PATCH /drives/rootfs",
    { drive_id: "rootfs", path_on_host: "/new" },
    /it is locked/,
  );
  assert.equal(machine.api.configuration.drives[0]?.pathOnHost, machine.disk);
  machine.controller.failure = new TypeError("undefined is not a machine");
  assert.deepEqual(await machine.ask("PATCH /balloon", { amount_mib: 2 }), {
    status: 500,
    json: { fault_message: "Cannot serve PATCH /balloon as undefined is not a machine" },
  });
  assert.equal(machine.api.configuration.balloon?.amountMib, 1);
  machine.controller.failure = "text";
  assert.equal((await machine.ask("PATCH /balloon", { amount_mib: 2 })).status, 500);
});

Deno.test("Api makes one change at a time, and answers and kills meanwhile", async () => {
  await using machine = new Machine();
  const { controller } = machine;
  await machine.change("PUT /boot-source", { kernel_image_path: machine.kernel });
  const gate = Promise.withResolvers<void>();
  controller.gate = gate.promise;
  const starts = [1, 2].map(() => machine.ask("PUT /actions", { action_type: "InstanceStart" }));
  const drive = machine.ask("PUT /drives/late", machine.drive("late", false));
  const stop = machine.ask("PUT /hypertopia/actions", { action: "Stop" });
  assert.equal((await machine.get("/") as { state: string }).state, "Not started");
  await machine.get("/vm/config");
  await machine.change("PUT /hypertopia/actions", { action: "Kill" });
  assert.deepEqual(controller.calls, [["start"], ["kill"]]);
  gate.resolve();
  assert.deepEqual((await Promise.all(starts)).map(({ status }) => status), [204, 400]);
  assert.equal((await drive).status, 400);
  assert.equal((await stop).status, 204);
  assert.deepEqual(controller.calls, [["start"], ["kill"], ["stop"]]);
});

Deno.test("Api starts from a configuration", async () => {
  const controller = new FakeController();
  const { configuration } = parseConfigFile(
    '{"boot-source": {"kernel_image_path": "k"}, "hypertopia": {"name": "one"}}',
  );
  const api = new Api(controller, configuration);
  await api.start();
  assert.deepEqual(controller.configuration, configuration);
  await assert.rejects(api.start(), MachineError);
  const empty = new Api(new FakeController());
  await assert.rejects(empty.start(), /Cannot start the machine as it has no kernel/);
});

const PATHS =
  ("/ /version /machine-config /boot-source /drives/a /drives /network-interfaces/a /vsock /entropy /balloon " +
    "/balloon/statistics /serial /actions /vm /vm/config /metrics /logger /mmds /hotplug/memory //x /%00 /a/b/c " +
    "/hypertopia/status /hypertopia/metrics /hypertopia/actions /hypertopia/forwards").split(" ");
const KEYS =
  ("drive_id iface_id path_on_host is_root_device vcpu_count mem_size_mib smt guest_cid uds_path amount_mib " +
    "deflate_on_oom action_type action state rate_limiter ops size refill_time __proto__").split(" ");
const LEAVES = [
  null,
  true,
  0,
  1,
  -1,
  2.5,
  2 ** 31,
  1e308,
  "",
  "a",
  "/",
  "/dev/null",
  "\0",
  "\ud800",
  "Paused",
];

function pick<T>(items: readonly T[]): T {
  return items[Math.floor(Math.random() * items.length)]!;
}

function randomJson(depth: number): string {
  const chance = depth === 0 ? 1 : Math.random();
  if (chance > 0.7) return JSON.stringify(pick(LEAVES));
  const items = Array.from({ length: Math.floor(Math.random() * 5) }, () => randomJson(depth - 1));
  return chance < 0.1
    ? `[${items.join(", ")}]`
    : `{${items.map((item) => `"${pick(KEYS)}": ${item}`).join(", ")}}`;
}

Deno.test("Api answers any JSON on any path with 200, 204 or 400", async () => {
  for (const isStarted of [false, true]) {
    await using machine = new Machine();
    if (isStarted) await machine.started();
    const seen = new Set<number>();
    for (let round = 0; round < 1500; round++) {
      const method = pick(["GET", "PUT", "PUT", "PATCH", "DELETE", "POST"]);
      const name = `${method} ${pick(PATHS)}`;
      const text = randomJson(3);
      const body = Math.random() < 0.1 ? text.slice(0, Math.random() * text.length) : text;
      const { status } = await machine.ask(name, method === "GET" ? undefined : body);
      assert.ok([200, 204, 400].includes(status), `${name} ${body} gave ${status}`);
      seen.add(status);
    }
    assert.ok(seen.has(200) && seen.has(400));
  }
});

/** Serves a machine on a Unix socket while something is done. */
async function served(machine: Machine, use: (path: string) => Promise<void>): Promise<void> {
  const path = `${machine.folder}/api.sock`;
  await using _server = Deno.serve({ path, onListen() {} }, (request) => machine.api.handle(request));
  await use(path);
}

async function raw(path: string, request: string): Promise<string> {
  using connection = await Deno.connect({ transport: "unix", path });
  const bytes = new TextEncoder().encode(request);
  for (let offset = 0; offset < bytes.length;) offset += await connection.write(bytes.subarray(offset));
  return await new Response(connection.readable).text();
}

Deno.test("Api is served on a Unix socket to whoever speaks HTTP", async () => {
  await using machine = new Machine();
  await served(machine, async (path) => {
    const put = (target: string, body: string, more = "") =>
      raw(
        path,
        `PUT ${target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: ${body.length}\r\n` +
          `${more}\r\n${body}`,
      );
    assert.match(
      await raw(path, "GET / HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n"),
      /^HTTP\/1\.1 200 OK\r\n[^]*content-type: application\/json\r\n[^]*"state":"Not started"/,
    );
    const machineConfig = '{"vcpu_count": 2, "mem_size_mib": 256}';
    assert.match(await put("/machine-config", machineConfig), /^HTTP\/1\.1 204 No Content\r\n/);
    // A URI in full, and an unusual authority.
    assert.match(await put("http://localhost/machine-config", machineConfig), /^HTTP\/1\.1 204/);
    assert.match(await put("/machine-config", machineConfig, "Host: [::\r\n"), /^HTTP\/1\.1 (204|400)/);
    assert.match(
      await put("/machine-config", '{"vcpu_count": 0, "mem_size_mib": 256}'),
      /^HTTP\/1\.1 400 Bad Request\r\n[^]*\{"fault_message":"Cannot use the body of PUT \/machine-config as `vcpu_count`/,
    );
    assert.match(
      await raw(
        path,
        "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
      ),
      /^HTTP\/1\.1 400[^]*a GET request cannot have a body/,
    );
    assert.match(
      await put("/actions", " ".repeat(MAX_PAYLOAD + 1)),
      /^HTTP\/1\.1 400[^]*more than 51200 bytes/,
    );
    assert.match(
      await raw(
        path,
        "PUT /actions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" +
          `c001\r\n${"a".repeat(0xc001)}\r\nc001\r\n${"a".repeat(0xc001)}\r\n0\r\n\r\n`,
      ),
      /^HTTP\/1\.1 400[^]*more than 51200 bytes/,
    );
  });
});

async function canRunCurl(): Promise<boolean> {
  try {
    return (await new Deno.Command("curl", { args: ["--version"], stdout: "null" }).output()).success;
  } catch {
    return false;
  }
}

const hasCurl = await canRunCurl();

Deno.test({
  name: `Api is driven by curl as Firecracker's guide does${
    hasCurl ? "" : " (skipped: curl is not installed)"
  }`,
  ignore: !hasCurl,
  async fn() {
    await using machine = new Machine();
    await served(machine, async (path) => {
      const curl = async (...args: string[]) => {
        const { stdout, success } = await new Deno.Command("curl", {
          args: ["-s", "-w", "%{http_code}", "--unix-socket", path, ...args],
        }).output();
        assert.ok(success);
        return new TextDecoder().decode(stdout);
      };
      const put = (target: string, body: unknown) =>
        curl("-X", "PUT", "--data", JSON.stringify(body), `http://localhost${target}`);
      assert.equal(await put("/boot-source", { kernel_image_path: machine.kernel }), "204");
      assert.equal(await put("/drives/rootfs", machine.drive("rootfs", true)), "204");
      assert.match(await put("/drives/rootfs", { drive_id: "rootfs" }), /missing field .*400$/);
      assert.equal(await put("/actions", { action_type: "InstanceStart" }), "204");
      assert.match(await curl("http://localhost/"), /"state":"Running".*200$/);
      assert.deepEqual(machine.controller.calls, [["start"]]);
    });
  },
});
