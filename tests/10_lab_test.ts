import assert from "node:assert/strict";
import { finish, isInstalled, labTest, realTest, ROOT } from "./support.ts";

labTest("a lab has a /dev/kvm and this machine's files", async (lab, { step }) => {
  await step("machines run on its /dev/kvm", async () => {
    const { status, stdout, stderr } = await lab.output(
      [Deno.execPath(), "test", "-A", "--no-check", "vmm/kvm/vm_test.ts"],
      { cwd: ROOT, env: { NO_COLOR: "1" } },
    );
    assert.equal(status, 0, `${stdout}\n${stderr}`);
    assert.match(stdout, /^ok \| \d+ passed \| 0 failed \(/m);
  });

  await step({
    name: "its kernel loads what networks need when it is asked for",
    ignore: !isInstalled("tc"),
    async fn() {
      const { status, stdout, stderr } = await lab.output(["sh", "-ec", NETWORK_SCRIPT]);
      assert.equal(status, 0, stderr);
      assert.match(stdout, /^br0 .*\nqdisc netem .* delay 10ms/);
    },
  });

  await step("what is written there stays there", async () => {
    const file = await Deno.makeTempFile();
    await Deno.writeTextFile(file, "here");
    const { stdout } = await lab.output(["sh", "-c", 'cat "$0"; echo there >"$0"; cat "$0"', file]);
    assert.equal(stdout, "herethere\n");
    assert.equal(await Deno.readTextFile(file), "here");
    await Deno.remove(file);
  });
});

labTest("a lab with Xen is its privileged domain", async (lab, { step }) => {
  const inLab = async (script: string): Promise<string> => {
    const { status, stdout, stderr } = await lab.output(["sh", "-ec", script], { cwd: ROOT });
    assert.equal(status, 0, stderr);
    return stdout;
  };

  await step("the hypervisor runs guests of every kind, and has memory for them", async () => {
    assert.equal(await inLab("cat /proc/xen/capabilities"), "control_d\n");
    const facts = await inLab("xl info");
    assert.match(facts, /^virt_caps +: pv hvm hap/m);
    assert.match(facts, /^xen_version +: 4\.17\./m);
    assert.ok(Number(/^free_memory +: (\d+)$/m.exec(facts)?.[1]) > 1800, facts);
  });

  await step("what a toolstack opens is there, and xenstored knows the domain", async () => {
    await inLab("cd /dev/xen; test -c privcmd -a -c hypercall -a -c evtchn -a -c gntdev -a -c gntalloc");
    await inLab(
      "test -S /run/xenstored/socket; test -d /sys/bus/xen-backend/drivers/vbd -a -d /sys/bus/xen-backend/drivers/vif",
    );
    assert.equal(await inLab("xenstore-read domid name"), "0\nDomain-0\n");
  });
}, { xen: true });

const NETWORK_SCRIPT = `
ip link add br0 type bridge
ip -br link show br0
tc qdisc add dev br0 root netem delay 10ms
tc qdisc show dev br0
`;

const QEMU = ["qemu-system-x86_64", "apt-get"];

/** A folder in which a lab makes its own. */
class Folder implements AsyncDisposable {
  readonly path = Deno.makeTempDirSync({ prefix: "ht-" });

  spawn(...args: string[]): Deno.ChildProcess {
    return new Deno.Command(Deno.execPath(), {
      args,
      cwd: ROOT,
      env: { TMPDIR: this.path },
      stdin: "piped",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
  }

  /** Processes that name it. */
  async processes(): Promise<string[]> {
    const found: string[] = [];
    for await (const { name } of Deno.readDir("/proc")) {
      if (!/^\d+$/.test(name)) continue;
      const line = await Deno.readTextFile(`/proc/${name}/cmdline`).catch(() => "");
      if (line.includes(this.path)) found.push(line);
    }
    return found;
  }

  leftovers(): string[] {
    return [...Deno.readDirSync(this.path)].map(({ name }) => name);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.path, { recursive: true });
  }
}

realTest("deno task lab:kvm passes streams and status through, and leaves nothing", QEMU, async () => {
  await using folder = new Folder();
  const child = folder.spawn("task", "lab:kvm", "--", "sh", "-c", "pwd; cat; echo problem >&2; exit 7");
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode("given\n"));
  await writer.close();
  const { stdout, stderr } = await finish(child, ["lab:kvm"], 7);
  assert.equal(stdout, `${ROOT}\ngiven\n`);
  assert.match(stderr, /problem\n$/);
  assert.deepEqual(await folder.processes(), []);
  assert.deepEqual(folder.leftovers(), []);
});

for (
  const [what, args] of [
    ["a lab", ["run", "-A", "--no-check", "tools/lab.ts"]],
    ["the task of a lab", ["task", "lab:kvm"]],
  ] as const
) {
  realTest(`${what} that is killed leaves no QEMU and no file behind`, QEMU, async () => {
    await using folder = new Folder();
    const child = folder.spawn(...args, "--", "sh", "-c", "echo started; sleep 1000");
    const reader = child.stdout.getReader();
    assert.equal(new TextDecoder().decode((await reader.read()).value), "started\n");
    assert.ok((await folder.processes()).some((line) => line.includes("-pidfile")));
    child.kill("SIGKILL");
    await child.status;
    // The streams end when the last process that has them does.
    while (!(await reader.read()).done);
    await child.stderr.cancel();
    await child.stdin.abort().catch(() => {});
    while ((await folder.processes()).length > 0 || folder.leftovers().length > 0) {
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  });
}
