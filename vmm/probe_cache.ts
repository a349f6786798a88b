/**
 * Probes that run code take a while, and what they find stays so until the host is restarted or changed.
 *
 * @module
 */

import { dirname } from "node:path";
import { identifyProcess } from "../planner/mod.ts";
import { writeWhole } from "./files.ts";

/**
 * Says in one word what a probe of `/dev/kvm` depends on: boot of the host, rights to the device, and who asks.
 *
 * @returns The word
 */
export async function kvmKey(): Promise<string> {
  const device = await Deno.stat("/dev/kvm").then(
    (info) => `${info.mode} ${info.uid} ${info.gid}`,
    () => "none",
  );
  return [identifyProcess()?.boot, device, Deno.uid()].join(" ");
}

/**
 * Probes, unless that was done already for a key.
 *
 * @param file Path of the file that keeps what was found
 * @param key What the finding depends on
 * @param probe Finds out; what it gives must be ready for JSON
 * @returns What was found
 */
export async function probeOncePerKey<T>(file: string, key: string, probe: () => T | Promise<T>): Promise<T> {
  try {
    const cached = JSON.parse(await Deno.readTextFile(file)) as { key: string; reports: T };
    if (cached.key === key) return cached.reports;
  } catch {
    // Never probed, or damaged: it is made again.
  }
  const reports = await probe();
  await Deno.mkdir(dirname(file), { recursive: true });
  await writeWhole(file, JSON.stringify({ key, reports }));
  return reports;
}
