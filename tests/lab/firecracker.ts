/** A client of Firecracker's drives our supervisor, as its guide and API description tell it, without a word of ours. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { debianBuilder } from "../../stdlib/mod.ts";
import { buildInitramfs, cpioArchive, guestConfigFiles, hostPaths } from "../../vmm/mod.ts";
import { ROOT } from "../support.ts";

Deno.test("a client of Firecracker's configures, starts, watches, pauses and ends a machine", async () => {
  const folder = await Deno.makeTempDir({ prefix: "ht-" });
  const api = join(folder, "firecracker.socket");
  const serial = join(folder, "serial");
  const context = { cache: hostPaths().cache, signal: new AbortController().signal, report() {} };
  const image = await debianBuilder.build({ type: "debian", suite: "bookworm", flavour: "cloud" }, context);
  const initramfs = await Deno.readFile(
    await buildInitramfs(image.kernel!, image.busybox!, image.modules, context),
  );
  const command = `
    echo "disk: $(head -c 16 /dev/vda)" >/dev/console
    echo written | dd of=/dev/vda bs=512 seek=1 conv=fsync 2>/dev/null
    ip link show eth0 >/dev/console
    echo up >/dev/console
    # Until it is told to end by a word on its disk.
    until dd if=/dev/vda bs=512 skip=2 count=1 iflag=direct 2>/dev/null | grep -q end; do sleep 1; done
    poweroff
  `;
  const config = cpioArchive(
    guestConfigFiles({ hostname: "fc", environment: {}, nics: [], mounts: [], files: [], command }),
  );
  const initrd = new Uint8Array((initramfs.length + 3 & ~3) + config.length);
  initrd.set(initramfs);
  initrd.set(config, initramfs.length + 3 & ~3);
  await Deno.writeFile(join(folder, "initrd"), initrd);
  const disk = new Uint8Array(2 ** 20);
  new TextEncoder().encodeInto("sixteen letters!", disk);
  await Deno.writeFile(join(folder, "disk"), disk);
  await sh("ip tuntap add dev tap0 mode tap");
  await using stack = new AsyncDisposableStack();
  stack.defer(() => sh("ip link del tap0"));
  await sh("ip link set tap0 up");

  const supervisor = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", join(ROOT, "vmm/supervisor/main.ts"), "--api-sock", api, "--id", "fc-1"],
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  let isRunning = true;
  void supervisor.status.then(() => isRunning = false);
  stack.defer(() => {
    if (isRunning) supervisor.kill("SIGKILL");
  });
  const client = stack.adopt(
    Deno.createHttpClient({ proxy: { transport: "unix", path: api } }),
    (each) => each.close(),
  );
  const call = async (method: string, path: string, body?: unknown) => {
    const response = await fetch(`http://localhost${path}`, {
      client,
      method,
      headers: { Accept: "application/json", "Content-Type": "application/json" },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
    const text = await response.text();
    return { status: response.status, body: text === "" ? undefined : JSON.parse(text) };
  };
  const change = async (method: string, path: string, body: unknown) => {
    const { status, body: answer } = await call(method, path, body);
    assert.equal(status, 204, `${method} ${path}: ${JSON.stringify(answer)}`);
  };
  while (!(await Deno.stat(api).then(() => true, () => false))) await delay(50);

  assert.deepEqual((await call("GET", "/")).body, {
    id: "fc-1",
    state: "Not started",
    vmm_version: "1.16.1",
    app_name: "Hypertopia",
  });
  await change("PUT", "/logger", { log_path: join(folder, "log"), level: "Debug", show_level: true });
  await change("PUT", "/metrics", { metrics_path: join(folder, "metrics") });
  await change("PUT", "/machine-config", { vcpu_count: 1, mem_size_mib: 256 });
  await change("PUT", "/boot-source", {
    kernel_image_path: image.kernel!.kernel,
    initrd_path: join(folder, "initrd"),
    boot_args: "console=ttyS0 reboot=k panic=1 quiet net.ifnames=0",
  });
  await change("PUT", "/drives/data", {
    drive_id: "data",
    path_on_host: join(folder, "disk"),
    is_root_device: false,
    is_read_only: false,
    rate_limiter: { ops: { size: 1000, refill_time: 100 } },
  });
  await change("PUT", "/network-interfaces/net1", {
    iface_id: "net1",
    guest_mac: "06:00:AC:10:00:02",
    host_dev_name: "tap0",
  });
  await change("PUT", "/vsock", { guest_cid: 3, uds_path: join(folder, "v.sock") });
  await change("PUT", "/entropy", {});
  await change("PUT", "/balloon", { amount_mib: 0, deflate_on_oom: true, stats_polling_interval_s: 1 });
  await change("PUT", "/serial", { serial_out_path: serial });
  await change("PUT", "/actions", { action_type: "InstanceStart" });
  assert.equal((await call("GET", "/")).body.state, "Running");
  assert.equal((await call("PUT", "/actions", { action_type: "InstanceStart" })).status, 400);

  const printed = () => Deno.readTextFile(serial).catch(() => "");
  while (!(await printed()).includes("up\r\n")) await delay(200);
  assert.match(await printed(), /disk: sixteen letters!/);
  assert.match(await printed(), /eth0: /);
  assert.match(new TextDecoder().decode(await Deno.readFile(join(folder, "disk"))), /written/);

  await change("PATCH", "/vm", { state: "Paused" });
  assert.equal((await call("GET", "/")).body.state, "Paused");
  await change("PATCH", "/vm", { state: "Resumed" });
  await change("PATCH", "/balloon", { amount_mib: 32 });
  while ((await call("GET", "/balloon/statistics")).body.actual_mib !== 32) await delay(200);
  await change("PATCH", "/drives/data", {
    drive_id: "data",
    rate_limiter: { ops: { size: 0, refill_time: 0 } },
  });
  await change("PUT", "/actions", { action_type: "FlushMetrics" });
  const metrics = JSON.parse((await Deno.readTextFile(join(folder, "metrics"))).trim().split("\n").at(-1)!);
  assert.ok(metrics.drives.data.reads > 0);
  assert.equal((await call("GET", "/vm/config")).body["machine-config"].mem_size_mib, 256);

  using file = await Deno.open(join(folder, "disk"), { write: true });
  await file.seek(1024, Deno.SeekMode.Start);
  await file.write(new TextEncoder().encode("end\n"));
  const { code, stderr } = await supervisor.output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  assert.match(await Deno.readTextFile(join(folder, "log")), /the guest powered off/);
  assert.deepEqual(
    [...Deno.readDirSync(folder)].map(({ name }) => name).filter((name) => /sock/.test(name)),
    [],
  );
  await Deno.remove(folder, { recursive: true });
});

async function sh(script: string): Promise<void> {
  const { success, stderr } = await new Deno.Command("sh", { args: ["-c", script] }).output();
  assert.ok(success, `${script}: ${new TextDecoder().decode(stderr)}`);
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
