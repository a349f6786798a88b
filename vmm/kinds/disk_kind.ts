/**
 * Driver of disks: files of this host.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { dirname } from "node:path";
import { diskDefinition, type DiskOutputs, type DiskProps, formatSize, parseSize } from "../../dsl/mod.ts";
import type { Kind } from "../../planner/mod.ts";
import { MachineError, writeError } from "../errors.ts";
import { exists, removeIfThere } from "../files.ts";
import { runTool } from "../images/store.ts";
import { emptyQcow2 } from "../images/qcow2.ts";
import { diskFile, type Paths } from "../paths.ts";

/**
 * Derives a disk's serial number: it follows the address, so that it survives a replacement.
 *
 * @param stack Name of the stack
 * @param address Address of the disk
 * @returns 20 characters
 */
export function diskSerial(stack: string, address: string): string {
  return createHash("sha256").update(`disk\n${stack}\n${address}`).digest("hex").slice(0, 20);
}

/**
 * Makes the kind of disks.
 *
 * @param paths Folders of this host
 * @returns The kind
 */
export function diskKind(paths: Paths): Kind<DiskProps, DiskOutputs> {
  const formatOf = (props: DiskProps) => props.format ?? "raw";
  return {
    ...diskDefinition,
    replace: "create-first",
    disruption({ field, before, after }, recorded) {
      if (field === "size" && formatOf(recorded.props) === "qcow2") {
        return { class: "recreate", mechanism: "a qcow2 disk keeps its size: the format raw can grow" };
      }
      if (field === "size" && typeof before === "string" && typeof after === "string") {
        return parseSize(after) > parseSize(before)
          ? { class: "live", mechanism: "grow" }
          : { class: "recreate", mechanism: "a disk cannot shrink" };
      }
      return { class: "recreate", mechanism: "new disk" };
    },
    prepare(drafts) {
      for (const { props, report } of drafts) {
        if (props.filesystem !== undefined && formatOf(props) !== "raw") {
          report(
            "filesystem",
            'A file system can be made on a disk of format "raw" only: leave format out',
            props.format,
          );
        }
      }
    },
    predict: ({ stack, address }) => ({ serial: diskSerial(stack, address) }),
    async observe(instances) {
      const found = new Map();
      await Promise.all(instances.map(async ({ address, id, props }) => {
        const path = diskFile(paths, id, formatOf(props));
        const size = await readCapacity(path, formatOf(props));
        if (size !== undefined) found.set(address, { props: { size: formatSize(size) }, outputs: { path } });
      }));
      return found;
    },
    async ensure(request) {
      const { stack, address, id, props } = request;
      const format = formatOf(props);
      const path = diskFile(paths, id, format);
      const bytes = parseSize(props.size);
      const current = await readCapacity(path, format);
      try {
        if (current === undefined) await makeDisk(path, format, bytes, props, request);
        else if (current < bytes) await growDisk(path, format, bytes);
      } catch (error) {
        if (request.signal.aborted) throw request.signal.reason;
        throw writeError(`make the disk "${path}"`, error);
      }
      return { path, serial: diskSerial(stack, address) };
    },
    async remove({ id, props }) {
      const path = diskFile(paths, id, formatOf(props));
      await removeIfThere(path);
      await removeIfThere(`${path}.part`);
    },
  };
}

async function makeDisk(
  path: string,
  format: "raw" | "qcow2",
  bytes: number,
  props: DiskProps,
  request: { readonly signal: AbortSignal; report(text: string): void },
): Promise<void> {
  await Deno.mkdir(dirname(path), { recursive: true, mode: 0o700 });
  const part = `${path}.part`;
  await removeIfThere(part);
  try {
    if (format === "qcow2") {
      await Deno.writeFile(part, emptyQcow2(bytes), { mode: 0o600, createNew: true });
    } else {
      using file = await Deno.open(part, { write: true, createNew: true, mode: 0o600 });
      await file.truncate(bytes);
    }
    if (props.filesystem !== undefined) {
      request.report(`making an ${props.filesystem} file system`);
      await runTool(
        "mke2fs",
        ["-q", "-F", "-t", props.filesystem, "-m", "0", part],
        { cache: "", signal: request.signal, report: request.report },
        { package: "e2fsprogs", env: { PATH: `${Deno.env.get("PATH") ?? ""}:/usr/sbin:/sbin` } },
      );
    }
    await Deno.rename(part, path);
  } catch (error) {
    await removeIfThere(part);
    throw error;
  }
}

/** Grows the file of a disk. A machine that uses it is told by its own driver. */
async function growDisk(path: string, format: "raw" | "qcow2", bytes: number): Promise<void> {
  if (format === "raw") {
    using file = await Deno.open(path, { write: true });
    await file.truncate(bytes);
    return;
  }
  throw new MachineError("a qcow2 disk cannot grow yet: use the format raw");
}

async function readCapacity(path: string, format: "raw" | "qcow2"): Promise<number | undefined> {
  if (!(await exists(path))) return undefined;
  if (format === "raw") return (await Deno.stat(path)).size;
  using file = await Deno.open(path);
  const header = new Uint8Array(32);
  await file.read(header);
  return Number(new DataView(header.buffer).getBigUint64(24));
}
