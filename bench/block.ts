/**
 * Block: reads and writes of a guest on a raw disk whose file is in the host's page cache, past the guest's own cache,
 * against QEMU's microvm with virtio-blk on PCI.
 *
 * @module
 */

import { join } from "node:path";
import { compared, type Figure } from "./figure.ts";
import { LabKit, type LabMachine } from "./lab_machine.ts";
import { randomReader } from "./random_reader.ts";

const ROUNDS = 3;
const DISK = 64 * 2 ** 20;
const RANDOM_READS = 2048;
const PEER = "qemu-system-x86_64 -M microvm, virtio-blk-pci, cache=writeback";
const MACHINE = { cpus: 1, memory: 256 };

interface Work {
  readonly name: string;
  /** Bytes of one transfer, and how many there are. */
  readonly size: number;
  readonly count: number;
  readonly script: string;
}

const READ = "dd if=/dev/vda of=/dev/null iflag=direct status=none";
const WRITE = "dd if=/dev/zero of=/dev/vda oflag=direct conv=notrunc status=none";
const WORKS: readonly Work[] = [
  { name: "reads of 256 KiB in order", size: 2 ** 18, count: 192, script: `${READ} bs=256k count=192` },
  { name: "writes of 256 KiB in order", size: 2 ** 18, count: 192, script: `${WRITE} bs=256k count=192` },
  { name: "reads of 4 KiB, one at a time", size: 4096, count: 1024, script: `${READ} bs=4k count=1024` },
  { name: "writes of 4 KiB, one at a time", size: 4096, count: 1024, script: `${WRITE} bs=4k count=1024` },
  {
    name: "reads of 4 KiB at random places, one at a time",
    size: 4096,
    count: RANDOM_READS,
    script: "/random || exit",
  },
  {
    name: "reads of 4 KiB, four at a time at distant places",
    size: 4096,
    count: 2048,
    script: `for at in 1 5 9 13; do ${READ} bs=4k count=512 skip=$((at * 1024)) & done; wait`,
  },
];

/** Prints seconds since boot before and after each piece of work. */
const COMMAND = `
until [ -b /dev/vda ]; do sleep 0.1; done
${
  WORKS.map(({ script }, index) =>
    `sleep 1
read -r before rest </proc/uptime
${script}
read -r after rest </proc/uptime
echo "work ${index}: $before $after."`
  ).join("\n")
}
`;

/** Seconds of each piece of work. */
async function work(machine: LabMachine): Promise<number[]> {
  await using running = machine;
  const times: number[] = [];
  for (const index of WORKS.keys()) {
    const { value } = await running.printed(new RegExp(`work ${index}: ([\\d.]+) ([\\d.]+)\\.\\s`));
    times.push(Number(value[2]) - Number(value[1]));
  }
  return times;
}

/** The figures. */
export default async function* block(): AsyncIterable<Figure> {
  await using kit = await LabKit.prepare("block", COMMAND, "cloud", {
    "/random": randomReader("/dev/vda", DISK / 4096, RANDOM_READS),
  });
  if (!kit) return;
  const disk = join(kit.folder, "disk");
  await Deno.writeFile(disk, new Uint8Array(DISK).fill(0x5a));
  const ours: number[][] = [];
  const theirs: number[][] = [];
  for (let round = 0; round < ROUNDS; round++) {
    ours.push(await work(kit.startOurs({ ...MACHINE, disk })));
    theirs.push(await work(kit.startQemu({ ...MACHINE, disk })));
  }
  for (const [index, { name, size, count }] of WORKS.entries()) {
    const isSmall = size === 4096;
    const rate = (each: readonly number[]) => (isSmall ? count : size * count / 2 ** 20) / each[index]!;
    yield compared(name, isSmall ? "IOPS" : "MiB/s", ours.map(rate), PEER, theirs.map(rate));
  }
}
