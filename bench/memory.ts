/**
 * Memory: what a machine takes beyond the guest's own, against QEMU's microvm with the same kernel and initramfs.
 *
 * @module
 */

import { join } from "node:path";
import { requestMachine } from "../vmm/supervisor/client.ts";
import { compared, type Figure, rounded } from "./figure.ts";
import { LabKit, type LabMachine, MARK } from "./lab_machine.ts";

const ROUNDS = 3;
/** Machines of the shared process. */
const MACHINES = 8;
/** How long a guest is left alone before its process is looked at, in milliseconds. */
const IDLE = 5000;
const PEER = "qemu-system-x86_64 -M microvm";

type Resident = ReturnType<LabMachine["resident"]>;

async function idle(machine: LabMachine, folder?: string): Promise<Resident> {
  await machine.printed(MARK, folder);
  await new Promise((resolve) => setTimeout(resolve, IDLE));
  return machine.resident();
}

/** What a process takes with one guest, and with more. */
async function grow(kit: LabKit): Promise<{ first: Resident; last: Resident }> {
  const folder = kit.makeFolder();
  const socket = join(folder, "host.sock");
  await using host = kit.startSupervisor(folder, [
    ...[
      "--host-sock",
      socket,
      "--readable",
      kit.kernel,
      "--readable",
      kit.initramfs,
      "--writable",
      kit.folder,
    ],
  ]);
  await host.until(() => Deno.stat(socket).then(() => true, () => undefined));
  const looks: Resident[] = [];
  for (let count = 0; count < MACHINES; count++) {
    const own = kit.makeFolder();
    await requestMachine(socket, `bench-${count}`, {
      api_sock: join(own, "api.sock"),
      config_file: kit.writeConfiguration(own, { cpus: 1, memory: 96 }),
      run_file: join(own, "run.json"),
      log_path: join(own, "log"),
    });
    looks.push(await idle(host, own));
  }
  return { first: looks[0]!, last: looks.at(-1)! };
}

/** The figures. */
export default async function* memory(): AsyncIterable<Figure> {
  await using kit = await LabKit.prepare("memory");
  if (!kit) return;
  for (const cpus of [1, 4]) {
    const ours: Resident[] = [];
    const theirs: Resident[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      const options = { cpus, memory: 256 };
      for (
        const [machine, looks] of [[kit.startOurs(options), ours], [kit.startQemu(options), theirs]] as const
      ) {
        await using running = machine;
        looks.push(await idle(running));
      }
    }
    const label = `an idle machine of ${cpus} vCPU${cpus > 1 ? "s" : ""} beyond its guest's memory`;
    const anonymous = (looks: readonly Resident[]) => looks.map((look) => look.anonymous);
    const all = (looks: readonly Resident[]) => looks.map((look) => look.anonymous + look.files);
    yield compared(`resident memory of ${label}`, "MiB", all(ours), PEER, all(theirs));
    yield compared(
      `the same without pages of files, which machines share: ${label}`,
      "MiB",
      anonymous(ours),
      PEER,
      anonymous(theirs),
    );
  }
  const { first, last } = await grow(kit);
  const sum = ({ anonymous, files }: Resident) => anonymous + files;
  yield {
    name: `resident memory of one more machine in a shared process, over ${MACHINES - 1} after the first`,
    value: rounded((sum(last) - sum(first)) / (MACHINES - 1)),
    unit: "MiB",
  };
  yield {
    name: `resident memory of a shared process with ${MACHINES} machines beyond their guests' memory`,
    value: rounded(sum(last)),
    unit: "MiB",
  };
}
