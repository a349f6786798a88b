/**
 * Overhead: a whole `apply` until its guest answers, against the same QEMU started by hand until its guest answers.
 *
 * @module
 */

import { dirname } from "node:path";
import { GuestChannel, guestEndpoints, type MachineSpec, QemuEngine } from "../vmm/mod.ts";
import { DATA_CHANNELS } from "../vmm/file_machine.ts";
import { qemuArguments, qemuFiles } from "../vmm/qemu/arguments.ts";
import type { AcceleratorName } from "../vmm/qemu/accelerator.ts";
import { compared, type Figure } from "./figure.ts";

const ROUNDS = 7;
const INFRA = `
import { cli, network, stack, vm } from "hypertopia";
import { debian } from "hypertopia/stdlib";
const infra = stack("bench", () => {
  const lan = network({ cidr: "10.20.0.0/24" });
  return { lan, guest: vm({ memory: "128MiB", image: debian(), nics: { eth0: lan.nic() } }) };
});
if (import.meta.main) await cli(infra);
`;

async function infra(folder: string, args: readonly string[]): Promise<number> {
  const start = performance.now();
  const { success, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "-A",
      "--no-check",
      `--config=${new URL("../deno.json", import.meta.url).pathname}`,
      `${folder}/infra.ts`,
      ...args,
    ],
    stdin: "null",
    stdout: "null",
    stderr: "piped",
    env: { HYPERTOPIA_HOME: `${folder}/home` },
  }).output();
  if (!success) throw new Error(new TextDecoder().decode(stderr));
  return performance.now() - start;
}

/** Starts QEMU with the same arguments and files, and waits until the guest answers. */
async function bare(spec: MachineSpec, from: string, accelerator: AcceleratorName): Promise<number> {
  const folder = await Deno.makeTempDir();
  const files = qemuFiles(folder);
  await Deno.copyFile(qemuFiles(from).initramfs, files.initramfs);
  const args = qemuArguments(spec, files, accelerator).filter((word) => word !== "-daemonize");
  const start = performance.now();
  const child = new Deno.Command("qemu-system-x86_64", {
    args,
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
  try {
    await new GuestChannel(guestEndpoints(folder, DATA_CHANNELS)).ping({ timeout: 60_000 });
    return performance.now() - start;
  } finally {
    child.kill("SIGKILL");
    await child.status;
    await Deno.remove(folder, { recursive: true });
  }
}

/** The figures. */
export default async function* overhead(): AsyncIterable<Figure> {
  const folder = await Deno.makeTempDir();
  try {
    await Deno.writeTextFile(`${folder}/infra.ts`, INFRA);
    const capabilities = await new QemuEngine().probe();
    const accelerator = capabilities.findings.find((each) => each.isUsable)?.name as
      | AcceleratorName
      | undefined;
    if (!accelerator) throw new Error(`Cannot measure without QEMU: ${capabilities.detail}`);
    const ours: number[] = [];
    const theirs: number[] = [];
    for (let round = 0; round <= ROUNDS; round++) {
      const a = await infra(folder, ["apply", "--yes"]);
      const [machine] = [...Deno.readDirSync(`${folder}/home/machines`)].map((entry) =>
        `${folder}/home/machines/${entry.name}`
      );
      const { spec } = JSON.parse(await Deno.readTextFile(qemuFiles(machine!).record)) as {
        spec: MachineSpec;
      };
      const kept = `${folder}/kept`;
      await Deno.mkdir(kept, { recursive: true });
      await Deno.copyFile(qemuFiles(machine!).initramfs, qemuFiles(kept).initramfs);
      await infra(folder, ["destroy", "--yes"]);
      const b = await bare(spec, kept, accelerator);
      // The first round builds the image.
      if (round > 0) [ours.push(a), theirs.push(b)];
    }
    yield compared(
      `apply until the guest answers (${accelerator})`,
      "ms",
      ours,
      "qemu-system-x86_64 until the guest answers",
      theirs,
    );
  } finally {
    await Deno.remove(dirname(`${folder}/infra.ts`), { recursive: true });
  }
}
