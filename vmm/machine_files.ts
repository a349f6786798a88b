/**
 * What engines have in common in how they keep machines in files and compare them.
 *
 * @module
 */

import { equal } from "../planner/mod.ts";
import { BALLOON_RATIO, type EngineName, type MachineSpec } from "./engine.ts";
import { writeWhole } from "./files.ts";

/** How long a guest may take to shut down before a restart, in milliseconds. */
export const RESTART_GRACE = 60_000;
/** Options of engines that change while a machine runs. */
const LIVE_OPTIONS: Readonly<Partial<Record<EngineName, readonly string[]>>> = {
  xen: ["weight", "cap", "pin", "crash"],
};

/**
 * Tells whether a running machine must be restarted to be as a spec says. Disks and NICs that come or go are not looked at.
 *
 * @param current What it was started from
 * @param spec What it should be made of
 * @returns Whether it must
 */
export function needsRestart(current: MachineSpec, spec: MachineSpec): boolean {
  const fixed = (
    each: MachineSpec,
  ) => [each.kernel, each.cmdline, each.hasAgent, each.bootKey, fixedOptions(each)];
  const { maxCpus } = current.engine;
  const sameCpus = current.cpus === spec.cpus || typeof maxCpus === "number" && spec.cpus <= maxCpus;
  const sameDisks = spec.disks.every((disk) => {
    const before = current.disks.find((each) => each.name === disk.name);
    return !before || equal({ ...before, size: 0 }, { ...disk, size: 0 });
  });
  const sameNics = spec.nics.every((nic) => {
    const before = current.nics.find((each) => each.name === nic.name);
    return !before || equal({ ...before, forwards: [] }, { ...nic, forwards: [] });
  });
  // Memory that is far below the maximum leaves the guest no room for what it keeps for the maximum.
  const isBallooned = spec.memory <= current.maxMemory && spec.memory * BALLOON_RATIO >= current.maxMemory;
  return !equal(fixed(current), fixed(spec)) || !isBallooned || !sameCpus || !sameDisks || !sameNics;
}

function fixedOptions({ engine }: MachineSpec): MachineSpec["engine"] {
  const live = LIVE_OPTIONS[engine.type as EngineName] ?? [];
  return Object.fromEntries(Object.entries(engine).filter(([name]) => !live.includes(name)));
}

/**
 * Finds the last line of a kernel panic, which a halted kernel leaves at the end of its console.
 *
 * @param consoleLog Path of what the console printed
 * @returns The kernel's words; undefined where it did not panic
 */
export async function findPanic(consoleLog: string): Promise<string | undefined> {
  const tail = await tailOf(consoleLog, 4096);
  return /---\[ end (Kernel panic - not syncing[^\r\n\]]*)\]---\s*$/.exec(tail)?.[1]?.trim();
}

/**
 * Joins files into one; each part begins at a multiple of four, as the kernel wants it.
 *
 * @param parts Paths of the parts; without any nothing is written
 * @param path Path of the whole
 */
export async function joinFiles(parts: readonly string[], path: string): Promise<void> {
  if (parts.length === 0) return;
  const chunks: Uint8Array[] = [];
  for (const part of parts) {
    const bytes = await Deno.readFile(part);
    chunks.push(bytes, new Uint8Array((4 - bytes.length % 4) % 4));
  }
  const whole = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  let offset = 0;
  for (const chunk of chunks) {
    whole.set(chunk, offset);
    offset += chunk.length;
  }
  await writeWhole(path, whole);
}

/**
 * Reads the end of a file.
 *
 * @param path Path of the file
 * @param bytes How much to read at most
 * @returns The text; empty where there is no file
 */
export async function tailOf(path: string, bytes: number): Promise<string> {
  try {
    using file = await Deno.open(path);
    const { size } = await file.stat();
    await file.seek(Math.max(0, size - bytes), Deno.SeekMode.Start);
    const buffer = new Uint8Array(bytes);
    let length = 0;
    for (
      let count = await file.read(buffer);
      count !== null && length < bytes;
      count = await file.read(buffer.subarray(length))
    ) {
      length += count;
      if (length === bytes) break;
    }
    return new TextDecoder().decode(buffer.subarray(0, length));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "";
    throw error;
  }
}
