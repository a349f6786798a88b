/**
 * Identity of processes across time: process numbers are reused, and a reboot ends them all.
 *
 * @module
 */

import { readFileSync } from "node:fs";
import process from "node:process";

/** One process of one boot of this host. */
export interface ProcessIdentity {
  /** Process number. */
  readonly pid: number;
  /** When it started, in clock ticks after boot (field 22 of `/proc/PID/stat`); 0 where unknown. */
  readonly started: number;
  /** `/proc/sys/kernel/random/boot_id`; empty where unknown. */
  readonly boot: string;
}

/**
 * Identifies a process that runs now.
 *
 * @param pid Process number; this process unless told
 * @returns Its identity, or undefined where it does not run
 */
export function identifyProcess(pid: number = process.pid): ProcessIdentity | undefined {
  const boot = read("/proc/sys/kernel/random/boot_id")?.trim() ?? "";
  const stat = read(`/proc/${pid}/stat`);
  if (stat !== undefined) {
    // The name in parentheses may hold blanks: fields are counted from its end.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    if (fields[0] === "Z" || fields[0] === "X") return undefined;
    return { pid, started: Number(fields[19] ?? 0), boot };
  }
  if (boot !== "") return undefined;
  try {
    process.kill(pid, 0);
    return { pid, started: 0, boot };
  } catch {
    return undefined;
  }
}

/**
 * Tells whether an identified process still runs.
 *
 * @param identity The process
 * @returns Whether it runs
 */
export function isRunning(identity: ProcessIdentity): boolean {
  const now = identifyProcess(identity.pid);
  return now !== undefined && now.started === identity.started && now.boot === identity.boot;
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined;
  }
}
