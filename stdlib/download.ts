/**
 * Downloads of files whose content is known beforehand.
 *
 * @module
 */

import { join } from "node:path";
import { MachineError } from "../vmm/errors.ts";
import { exists, lockFile, removeIfThere } from "../vmm/files.ts";
import type { BuildContext } from "../vmm/images/builder.ts";
import { sha256 } from "../vmm/images/store.ts";

/** The content that {@linkcode download} must find. */
export interface ExpectedContent {
  /** Hexadecimal SHA-256. */
  readonly sha256: string;
  /** Size in bytes. No more than that is read, whatever the server sends. */
  readonly size?: number;
  /** What it is, for progress; its address unless told. */
  readonly name?: string;
}

/**
 * Downloads a file whose digest is known. An interrupted download is continued; a finished one is never made again.
 *
 * @param url Address
 * @param expected The content that it must have
 * @param context Cache, signal and progress
 * @returns Path of the checked file
 * @throws {MachineError} If the server fails or the content is not the wanted one
 */
export async function download(
  url: string,
  expected: ExpectedContent,
  context: BuildContext,
): Promise<string> {
  const { sha256: wanted, size } = expected;
  const path = join(context.cache, "downloads", wanted);
  if (await exists(path)) return path;
  using _lock = await lockFile(join(context.cache, "locks", `download-${wanted}`), {
    signal: context.signal,
    onWait: () => context.report(`waiting for another process that downloads "${url}"`),
  });
  if (await exists(path)) return path;
  await Deno.mkdir(join(context.cache, "downloads"), { recursive: true });
  const part = `${path}.part`;
  for (let attempt = 1;; attempt++) {
    try {
      await continueDownload(url, part, expected, context);
      break;
    } catch (cause) {
      context.signal.throwIfAborted();
      const text = cause instanceof Error ? cause.message : String(cause);
      if (cause instanceof MachineError || attempt >= 3) {
        throw cause instanceof MachineError ? cause : new MachineError(
          `Cannot download "${url}" as ${text}: what has arrived is kept, run the command again to continue`,
          { cause },
        );
      }
      context.report(`continuing the download after: ${text}`);
    }
  }
  const bytes = (await Deno.stat(part)).size;
  if (size !== undefined && bytes !== size) {
    await removeIfThere(part);
    throw new MachineError(
      `Cannot use "${url}" as it has ${
        bytes < size ? bytes : "more"
      } bytes of ${size}: try again, or use another mirror`,
    );
  }
  const found = await sha256(part);
  if (found !== wanted) {
    await removeIfThere(part);
    throw wrongChecksum(url, wanted, found);
  }
  await Deno.rename(part, path);
  return path;
}

/**
 * Makes the error for a file that has other content than the wanted.
 *
 * @param what Its path or address
 * @param wanted The wanted hexadecimal SHA-256
 * @param found The one that was found
 * @returns The error to throw
 */
export function wrongChecksum(what: string, wanted: string, found: string): MachineError {
  return new MachineError(
    `Cannot use "${what}" as its checksum is wrong: ${wanted} is wanted and ${found} was found: ` +
      `correct the checksum, or get the file from a better place`,
  );
}

async function continueDownload(
  url: string,
  part: string,
  { size, name = url }: ExpectedContent,
  context: BuildContext,
): Promise<void> {
  let offset = await Deno.stat(part).then((info) => info.size, () => 0);
  if (size !== undefined && offset >= size) return;
  const response = await fetch(url, {
    signal: context.signal,
    headers: { "accept-encoding": "identity", ...(offset > 0 ? { range: `bytes=${offset}-` } : {}) },
  });
  if (response.status === 416) {
    // All of it is here already.
    await response.body?.cancel();
    return;
  }
  if (!response.ok || !response.body) {
    await response.body?.cancel();
    throw new MachineError(
      `Cannot download "${url}" as the server answered ${response.status} ${response.statusText}`,
    );
  }
  const range = response.headers.get("content-range");
  if (response.status !== 206) offset = 0;
  else if (range !== null && !range.startsWith(`bytes ${offset}-`)) {
    await response.body.cancel();
    await removeIfThere(part);
    throw new Error("the server continued it at another place");
  }
  using file = await Deno.open(part, { create: true, write: true });
  await file.truncate(offset);
  await file.seek(offset, Deno.SeekMode.Start);
  const length = response.headers.get("content-length");
  const total = length === null ? size : offset + Number(length);
  const megabytes = (bytes: number) => Math.round(bytes / 1e6);
  let shown = 0;
  for await (const chunk of response.body) {
    for (let at = 0; at < chunk.length;) at += await file.write(chunk.subarray(at));
    offset += chunk.length;
    if (size !== undefined && offset > size) return;
    if (Date.now() - shown > 300) {
      shown = Date.now();
      context.report(
        `downloading ${name}: ${megabytes(offset)} of ${total === undefined ? "?" : megabytes(total)} MB`,
      );
    }
  }
  if (total !== undefined && offset < total) throw new Error("the connection was cut");
}
