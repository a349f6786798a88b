/**
 * The folder of saved states of a host. Machines leave theirs in their own folders: what a guest could break into must not
 * write what others go on from.
 *
 * @module
 */

import { basename, join } from "node:path";
import { exists, removeIfThere, writeWhole } from "../files.ts";

/** How many states are kept: those that were of use last. */
const MOST = 24;
/** When half a file is nobody's any more, in milliseconds. */
const ABANDONED = 3_600_000;

/** Saved states in a folder. */
export class SavedStates {
  readonly #folder: string;

  /**
   * Looks at nothing yet.
   *
   * @param folder The folder
   */
  constructor(folder: string) {
    this.#folder = folder;
  }

  /**
   * Makes the folder, and remembers that a state is of use.
   *
   * @param path Path of the state, which may not be there
   */
  async use(path: string): Promise<void> {
    await Deno.mkdir(this.#folder, { recursive: true, mode: 0o700 });
    const now = new Date();
    try {
      await Deno.utime(path, now, now);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  }

  /**
   * Takes over what a machine has left, if it has, and removes what was of use longest ago.
   *
   * @param from Path of the file, which is gone afterwards
   * @param path Path of the state
   */
  async adopt(from: string, path: string): Promise<void> {
    if (!(await exists(from))) return;
    try {
      // Copied: whoever wrote it may still have it open.
      await writeWhole(path, await Deno.readFile(from));
      await this.#removeOld(path);
    } finally {
      await removeIfThere(from);
    }
  }

  async #removeOld(kept: string): Promise<void> {
    const states: { readonly path: string; readonly time: number }[] = [];
    for await (const { name } of Deno.readDir(this.#folder)) {
      const path = join(this.#folder, name);
      const time = (await Deno.stat(path).catch(() => undefined))?.mtime?.getTime() ?? Date.now();
      if (name.endsWith(".state")) states.push({ path, time });
      else if (name.endsWith(".part") && Date.now() - time > ABANDONED) await removeIfThere(path);
    }
    states.sort((a, b) => b.time - a.time);
    for (const { path } of states.slice(MOST)) {
      if (basename(path) !== basename(kept)) await removeIfThere(path);
    }
  }
}
