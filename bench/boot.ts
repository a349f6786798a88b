/**
 * Boot: from the start of a process until the guest's user space prints, and the exits on the way, against QEMU's microvm
 * with the same kernel and initramfs.
 *
 * @module
 */

import { KVM_EXIT } from "../ffi/mod.ts";
import { SupervisorClient } from "../vmm/supervisor/client.ts";
import { compared, type Figure, median, rounded } from "./figure.ts";
import { LabKit, type LabMachine, MARK } from "./lab_machine.ts";

const ROUNDS = 3;
const PEER = "qemu-system-x86_64 -M microvm";
const MACHINE = { cpus: 1, memory: 256 };
const TRACING = "/sys/kernel/tracing";
const EVENT = `${TRACING}/events/kvm/kvm_userspace_exit`;

type Exits = Record<"all" | "ports" | "MMIO", number>;

interface Boot {
  readonly time: number;
  /** Milliseconds by the guest's clock since its kernel began. */
  readonly kernel: number;
  /** As the kernel counts them. */
  readonly traced: Exits | undefined;
  /** As our supervisor does. */
  readonly reported: number;
}

/** The kernel's count of exits to user space, of all machines of the host. */
class ExitTrace implements Disposable {
  /** Starts to count, where the kernel can. */
  static async start(): Promise<ExitTrace | undefined> {
    try {
      await new Deno.Command("mount", { args: ["-t", "tracefs", "tracefs", TRACING], stderr: "null" })
        .output();
      const trace = new ExitTrace();
      trace.clear();
      return trace;
    } catch {
      return undefined;
    }
  }

  /** Counts from zero. */
  clear(): void {
    // Opening the file to write it anew removes the trigger that is there.
    Deno.writeTextFileSync(`${EVENT}/trigger`, "hist:keys=reason");
  }

  read(): Exits {
    const counts = new Map<number, number>();
    for (
      const [, reason, count] of Deno.readTextFileSync(`${EVENT}/hist`).matchAll(
        /\{ reason:\s*(\d+).*?\} hitcount:\s*(\d+)/g,
      )
    ) counts.set(Number(reason), Number(count));
    return {
      all: [...counts.values()].reduce((sum, count) => sum + count, 0),
      ports: counts.get(KVM_EXIT.IO) ?? 0,
      MMIO: counts.get(KVM_EXIT.MMIO) ?? 0,
    };
  }

  [Symbol.dispose](): void {
    Deno.openSync(`${EVENT}/trigger`, { write: true, truncate: true }).close();
  }
}

async function boot(machine: LabMachine, trace: ExitTrace | undefined): Promise<Boot> {
  const { time, value } = await machine.printed(MARK);
  const traced = trace?.read();
  using client = new SupervisorClient(machine.api);
  const { exits = {} } = await client.status() ?? {};
  return {
    time,
    kernel: Number(value[1]) * 1000,
    traced,
    reported: Object.values(exits).reduce((sum, count) => sum + count, 0),
  };
}

/** Milliseconds until the API answers. */
async function answer({ api }: LabMachine): Promise<true | undefined> {
  using client = new SupervisorClient(api);
  return await client.info().then(() => true as const, () => undefined);
}

/** QEMU greets whoever connects. */
async function greet({ api }: LabMachine): Promise<true | undefined> {
  try {
    using connection = await Deno.connect({ transport: "unix", path: api });
    return await connection.read(new Uint8Array(1024)) ? true : undefined;
  } catch {
    return undefined;
  }
}

/** The figures. */
export default async function* bootBench(): AsyncIterable<Figure> {
  await using kit = await LabKit.prepare("boot");
  if (!kit) return;
  using trace = await ExitTrace.start();
  const ours: Boot[] = [];
  const theirs: Boot[] = [];
  const answers: Record<"ours" | "theirs", number[]> = { ours: [], theirs: [] };
  for (let round = 0; round <= ROUNDS; round++) {
    const measure = async (machine: LabMachine): Promise<Boot> => {
      await using running = machine;
      return await boot(running, trace);
    };
    trace?.clear();
    const a = await measure(kit.startOurs(MACHINE));
    trace?.clear();
    const b = await measure(kit.startQemu(MACHINE));
    await using supervisor = kit.startOurs();
    const c = (await supervisor.until(() => answer(supervisor))).time;
    await using qemu = kit.startQemu();
    const d = (await qemu.until(() => greet(qemu))).time;
    // The first round reads all files for the first time.
    if (round > 0) [ours.push(a), theirs.push(b), answers.ours.push(c), answers.theirs.push(d)];
  }
  const times = (boots: readonly Boot[], key: "time" | "kernel") => boots.map((boot) => boot[key]);
  yield compared(
    "process until its API answers",
    "ms",
    answers.ours,
    `${PEER} until QMP greets`,
    answers.theirs,
  );
  yield compared(
    "process until the first output of user space",
    "ms",
    times(ours, "time"),
    PEER,
    times(theirs, "time"),
  );
  yield compared(
    "the guest's kernel until the first output of user space, by the guest's clock",
    "ms",
    times(ours, "kernel"),
    PEER,
    times(theirs, "kernel"),
  );
  for (const kind of ["all", "ports", "MMIO"] as const) {
    const counts = (boots: readonly Boot[]) => boots.flatMap(({ traced }) => traced ? [traced[kind]] : []);
    if (!trace) break;
    const name = `exits to user space until the first output of user space, ${kind}`;
    yield compared(name, "exits", counts(ours), PEER, counts(theirs));
  }
  yield {
    name: "exits to user space until the first output of user space, as GET /hypertopia/status counts them",
    value: rounded(median(ours.map(({ reported }) => reported))),
    unit: "exits",
  };
}
