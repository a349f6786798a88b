/**
 * Where things are kept on the host.
 *
 * @module
 */

import { join, resolve } from "node:path";

/** Folders of this host. */
export interface Paths {
  /** Machines and disks: lost data is lost for good. */
  readonly data: string;
  /** Images, kernels and packages: everything in it can be made again. */
  readonly cache: string;
}

/**
 * Finds the folders of this host: `HYPERTOPIA_HOME` and `HYPERTOPIA_CACHE`, or the places of the XDG base directories.
 *
 * @returns The folders
 */
export function hostPaths(): Paths {
  // An empty variable counts as none, as the XDG base directories want it.
  const home = Deno.env.get("HOME") || "/root";
  return {
    data: resolve(
      Deno.env.get("HYPERTOPIA_HOME") ||
        join(Deno.env.get("XDG_DATA_HOME") || join(home, ".local/share"), "hypertopia"),
    ),
    cache: resolve(
      Deno.env.get("HYPERTOPIA_CACHE") ||
        join(Deno.env.get("XDG_CACHE_HOME") || join(home, ".cache"), "hypertopia"),
    ),
  };
}

/**
 * The folder of a machine.
 *
 * @param paths Folders of this host
 * @param id Identity of the machine
 * @returns The folder
 */
export function machineFolder(paths: Paths, id: string): string {
  return join(paths.data, "machines", id);
}

/**
 * The file of a disk.
 *
 * @param paths Folders of this host
 * @param id Identity of the disk
 * @param format How it is stored
 * @returns The file
 */
export function diskFile(paths: Paths, id: string, format: string): string {
  return join(paths.data, "disks", `${id}.${format}`);
}
