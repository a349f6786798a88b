/**
 * Files that are written whole or not at all, and locks between processes.
 *
 * @module
 */

import { dirname } from "node:path";

/**
 * Writes a file whole or not at all, durably.
 *
 * @param path Path of the file
 * @param content The content
 * @param mode Permission bits; 0o600 unless told
 */
export async function writeWhole(path: string, content: Uint8Array | string, mode = 0o600): Promise<void> {
  const part = `${path}.${crypto.randomUUID().slice(0, 8)}.part`;
  try {
    {
      using file = await Deno.open(part, { write: true, createNew: true, mode });
      const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
      for (let offset = 0; offset < bytes.length;) offset += await file.write(bytes.subarray(offset));
      await file.sync();
    }
    await Deno.rename(part, path);
  } catch (error) {
    await removeIfThere(part);
    throw error;
  }
}

/**
 * Removes a file or folder that may be absent.
 *
 * @param path Path
 */
export async function removeIfThere(path: string): Promise<void> {
  try {
    await Deno.remove(path, { recursive: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/**
 * Tells whether a path exists.
 *
 * @param path Path
 * @returns Whether it does
 */
export async function exists(path: string): Promise<boolean> {
  try {
    await Deno.lstat(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/**
 * Tells whether something is in use, for which Deno has no class of errors that it throws.
 *
 * @param error What was thrown
 * @returns Whether it was `EBUSY`
 */
export function isBusy(error: unknown): boolean {
  return error instanceof Error && (error as { readonly code?: string }).code === "EBUSY";
}

/** What {@linkcode lockFile} can be given. */
export interface LockFileOptions {
  /** Ends the wait. */
  readonly signal?: AbortSignal;
  /** Called once if somebody else holds the lock. */
  readonly onWait?: () => void;
}

/**
 * Takes an exclusive lock, held until disposed and no longer than this process lives.
 *
 * @param path Path of the lock file; it is made and stays
 * @param options Signal and notice
 * @returns Releases the lock when disposed
 */
export async function lockFile(path: string, options: LockFileOptions = {}): Promise<Disposable> {
  await Deno.mkdir(dirname(path), { recursive: true, mode: 0o700 });
  const file = await Deno.open(path, { create: true, write: true, mode: 0o600 });
  try {
    let isFirst = true;
    while (!(await file.tryLock(true))) {
      if (isFirst) options.onWait?.();
      isFirst = false;
      options.signal?.throwIfAborted();
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    options.signal?.throwIfAborted();
  } catch (error) {
    file.close();
    throw error;
  }
  return { [Symbol.dispose]: () => file.close() };
}
