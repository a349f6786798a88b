/**
 * The whole test suite: the checks of `deno task ok`, unit tests, and real machines. Its last line counts the tests.
 *
 * @module
 */

import { checkAll } from "./ok.ts";
import { fail, say, testFiles } from "./task.ts";

/** Debian packages that the tests of real machines need, with a program of each. */
const PACKAGES: readonly (readonly [name: string, program: string])[] = [
  ["qemu-system-x86", "qemu-system-x86_64"],
  ["mmdebstrap", "mmdebstrap"],
  ["e2fsprogs", "mke2fs"],
  ["mount", "mount"],
  ["iproute2", "ip"],
  ["nftables", "nft"],
  ["qemu-utils", "qemu-img"],
  ["xz-utils", "xz"],
  ["passt", "passt"],
  ["xen-utils-4.17", "/usr/lib/xen-4.17/bin/xenstored"],
  ["xenstore-utils", "xenstore-read"],
];

interface Count {
  passed: number;
  failed: number;
  skipped: number;
}

/** Installs what is missing where that is possible, and says so. */
async function installPackages(): Promise<void> {
  const missing: string[] = [];
  const folders = [...(Deno.env.get("PATH") ?? "").split(":"), "/usr/sbin", "/sbin"];
  for (const [name, program] of PACKAGES) {
    const places = program.startsWith("/") ? [program] : folders.map((folder) => `${folder}/${program}`);
    const found = await Promise.all(places.map((path) => Deno.stat(path).then(() => true, () => false)));
    if (!found.includes(true)) missing.push(name);
  }
  if (missing.length === 0) return;
  const isDebian = await Deno.stat("/etc/debian_version").then(() => true, () => false);
  if (!isDebian || Deno.uid() !== 0) {
    say(
      `Not installed: ${
        missing.join(", ")
      }. Tests that need them are skipped; install them with: apt-get install ${missing.join(" ")}`,
    );
    return;
  }
  say(`Installing Debian packages that the tests need: ${missing.join(", ")}`);
  await output("apt-get", ["update", "-qq"]);
  // The name of some has a version, which another release of Debian has not.
  const known = new Set((await output("apt-cache", ["pkgnames"])).split("\n"));
  const available = missing.filter((name) => known.has(name));
  if (available.length < missing.length) {
    const others = missing.filter((name) => !known.has(name)).join(", ");
    say(`Not in this release of Debian: ${others}. Tests that need them are skipped`);
  }
  if (available.length === 0) return;
  await output("apt-get", ["install", "-y", "-qq", "--no-install-recommends", ...available]);
}

/** Runs a program to its end, which must be a good one, and gives what it printed. */
async function output(program: string, args: readonly string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(program, {
    args: [...args],
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
    env: { DEBIAN_FRONTEND: "noninteractive" },
  }).output();
  const decoder = new TextDecoder();
  if (!success) fail(`"${program} ${args.join(" ")}" failed: ${decoder.decode(stderr).trim()}`);
  return decoder.decode(stdout);
}

/** Runs `deno test`, shows its output as it comes or in the end, and counts. */
async function runTests(args: readonly string[], isShownLater = false): Promise<Count> {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["test", "-A", ...args],
    stdin: "null",
    stdout: "piped",
    stderr: "inherit",
    env: { NO_COLOR: "1" },
  }).spawn();
  let tail = "";
  const later: Uint8Array[] = [];
  for await (const chunk of child.stdout) {
    if (isShownLater) later.push(chunk);
    else Deno.stdout.writeSync(chunk);
    tail = (tail + new TextDecoder().decode(chunk)).slice(-4000);
  }
  const { code } = await child.status;
  for (const chunk of later) Deno.stdout.writeSync(chunk);
  const match =
    /(\d+) passed(?: \([^)]*\))? \| (\d+) failed(?: \([^)]*\))?(?: \| (\d+) ignored)?(?! .*passed)/.exec(
      tail.slice(tail.lastIndexOf(" passed") - 40),
    );
  if (!match) fail(`"deno test" ended with status ${code} and without a summary`);
  const count = { passed: Number(match[1]), failed: Number(match[2]), skipped: Number(match[3] ?? 0) };
  // A module that cannot be loaded fails outside of any test.
  if (code !== 0 && count.failed === 0) count.failed = 1;
  return count;
}

if (import.meta.main) {
  await installPackages();
  await checkAll();
  const total: Count = { passed: 0, failed: 0, skipped: 0 };
  const add = (count: Count) => {
    total.passed += count.passed;
    total.failed += count.failed;
    total.skipped += count.skipped;
  };
  const real = await testFiles("real");
  const [kvm, xen] = [/_kvm_test\.ts$/, /_xen_test\.ts$/].map((name) =>
    real.filter((file) => name.test(file))
  );
  const others = real.filter((file) => ![...kvm!, ...xen!].includes(file));
  say("running unit tests and the examples of the documentation");
  add(await runTests(["--doc", ...await testFiles("unit")]));
  say("running real machines, and the lab of Xen beside them");
  for (const count of await Promise.all([runTests(others), runTests(xen!, true)])) add(count);
  // A guest in a guest, both emulated, does little but take timer interrupts where it has no processor for itself.
  say("running the lab of KVM");
  add(await runTests(kvm!));
  say(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
  Deno.exit(total.failed > 0 ? 1 : 0);
}
