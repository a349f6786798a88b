/**
 * Libraries from the npm registry that few users need.
 *
 * @module
 */

import { MachineError } from "../errors.ts";

/**
 * Loads a library from the npm registry when it is first needed. Its address is put together here, since Deno
 * downloads at start what an import names literally, whether that import is reached or not.
 *
 * @typeParam T What it exports, as far as the caller uses it
 * @param name Name in the registry
 * @param version Exact version
 * @returns Its exports
 * @throws {MachineError} If it is neither in Deno's cache nor can be downloaded
 */
export async function importNpm<T>(name: string, version: string): Promise<T> {
  const address = `npm:${name}@${version}`;
  try {
    return await import(address) as T;
  } catch (cause) {
    // Modules that are part of an npm package themselves import by name only.
    const isPackaged = String(cause).includes("ERR_UNSUPPORTED_ESM_URL_SCHEME");
    const found: T | undefined = isPackaged ? await import(name).catch(() => undefined) : undefined;
    if (found !== undefined) return found;
    throw new MachineError(
      `Cannot load the library "${name}" as ${
        cause instanceof Error ? cause.message.split("\n")[0] : cause
      }: ` +
        (isPackaged
          ? `run "deno add ${address}"`
          : `run "deno cache ${address}" where the npm registry can be reached`),
      { cause },
    );
  }
}
