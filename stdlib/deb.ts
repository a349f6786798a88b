/**
 * Unpacks Debian packages: an `ar` archive with a compressed tar archive in it, as deb(5) describes.
 *
 * @module
 */

import { basename, join } from "node:path";
import { MachineError, writeError } from "../vmm/errors.ts";
import { type Compression, decompress, readPart } from "../vmm/images/compression.ts";

/** Most bytes that a package may unpack to. */
const MAX_BYTES = 4 * 2 ** 30;
/** Most files, folders and links in a package. */
const MAX_ENTRIES = 500_000;
/** Longest name, as Linux has it. */
const MAX_NAME = 4096;
const BLOCK = 512;

/** What {@linkcode unpackDeb} can be given. */
export interface UnpackOptions {
  /** Ends the work. */
  readonly signal?: AbortSignal;
  /** Most bytes that the content may have unpacked; 4 GiB unless told. */
  readonly maxBytes?: number;
}

/**
 * Unpacks the files of a package. Owners, special permission bits and times are not kept. Nothing is written outside
 * of the folder, whatever names and links the package has.
 *
 * @param path Path of the `.deb` file
 * @param folder Folder to unpack into; it is made where it is absent
 * @param options Signal and limit
 * @throws {MachineError} If it is damaged, or has what a package must not have
 */
export async function unpackDeb(path: string, folder: string, options: UnpackOptions = {}): Promise<void> {
  try {
    using file = await Deno.open(path);
    const { compression, size } = await findData(file);
    await new TarReader(decompress(readPart(file, size), compression), folder, options).unpack();
  } catch (error) {
    options.signal?.throwIfAborted();
    if (error instanceof MachineError) throw error;
    throw writeError(`unpack "${basename(path)}"`, error);
  }
}

/** Moves a file to the content of a package's `data.tar`. */
async function findData(file: Deno.FsFile): Promise<{ compression: Compression; size: number }> {
  const decoder = new TextDecoder("latin1");
  const read = async (count: number): Promise<string | undefined> => {
    const buffer = new Uint8Array(count);
    for (let at = 0; at < count;) {
      const got = await file.read(buffer.subarray(at));
      if (got === null) return undefined;
      at += got;
    }
    return decoder.decode(buffer);
  };
  if (await read(8) !== "!<arch>\n") throw new Error("it is not a Debian package");
  for (let header = await read(60); header !== undefined; header = await read(60)) {
    // Each header has the name at 0, the size in decimal digits at 48, and ends with a mark.
    const name = header.slice(0, 16).trimEnd().replace(/\/$/, "");
    const digits = header.slice(48, 58).trimEnd();
    if (!/^\d{1,10}$/.test(digits) || header.slice(58) !== "`\n") throw new Error("it is damaged");
    const size = Number(digits);
    const found = /^data\.tar(?:\.(xz|gz|zst))?$/.exec(name);
    if (found) return { compression: (found[1] ?? "") as Compression, size };
    if (name.startsWith("data.tar")) throw new Error(`it is compressed in an unknown way ("${name}")`);
    await file.seek(size + size % 2, Deno.SeekMode.Current);
  }
  throw new Error("it has no data.tar");
}

/** One entry of a tar archive. */
interface TarEntry {
  readonly name: string;
  readonly link: string;
  readonly type: string;
  readonly mode: number;
  readonly size: number;
}

/** Unpacks a tar archive in the formats that deb(5) allows: v7, ustar, and GNU's long names and large sizes. */
class TarReader {
  readonly #content: AsyncGenerator<Uint8Array>;
  readonly #folder: string;
  readonly #options: UnpackOptions;
  /** Folders, by path in the archive, that are known to be real ones. */
  readonly #folders = new Set<string>();
  #chunk: Uint8Array = new Uint8Array();
  #bytes = 0;

  constructor(content: AsyncGenerator<Uint8Array>, folder: string, options: UnpackOptions) {
    this.#content = content;
    this.#folder = folder;
    this.#options = options;
  }

  async unpack(): Promise<void> {
    try {
      await Deno.mkdir(this.#folder, { recursive: true });
      let long: { name?: string; link?: string } = {};
      for (let count = 0;; count++) {
        this.#options.signal?.throwIfAborted();
        const header = parseHeader(await this.#exactly(BLOCK));
        if (!header) break;
        if (count >= MAX_ENTRIES) throw new Error(`it has more than ${MAX_ENTRIES} entries`);
        const entry = { ...header, ...long };
        if (header.type === "L" || header.type === "K") {
          if (header.size > MAX_NAME) throw new Error("it has a name that is too long");
          const text = untilNul(await this.#exactly(header.size));
          await this.#exactly(padding(header.size));
          long = { ...long, [header.type === "L" ? "name" : "link"]: text };
          continue;
        }
        long = {};
        await this.#place(entry);
      }
      // The checksums of the compressed content are behind its last byte.
      while (await this.#more());
    } finally {
      // The decoder must let go of its memory also where this stops early. It may complain that it has done so before.
      await this.#content.return(undefined).catch(() => {});
    }
  }

  async #place(entry: TarEntry): Promise<void> {
    const parts = safeParts(entry.name);
    const isFile = ["0", "\0", "7"].includes(entry.type);
    if (!isFile && entry.size !== 0) {
      throw new Error(`the entry "${entry.name}" has content that it must not have`);
    }
    if (parts.length === 0 && entry.type !== "5") throw new Error("it has an entry without a name");
    if (entry.type === "5") return await this.#ensureFolder(parts);
    const path = await this.#freePath(parts);
    if (isFile) await this.#writeFile(path, entry);
    else if (entry.type === "1") {
      const target = safeParts(entry.link);
      await this.#ensureFolder(target.slice(0, -1));
      const source = join(this.#folder, ...target);
      if (!(await kind(source))?.isFile) throw new Error(`the hard link "${entry.name}" leads to no file`);
      await Deno.link(source, path);
    } else if (entry.type === "2") await Deno.symlink(entry.link, path);
    else throw new Error(`the entry "${entry.name}" is of a kind that packages must not have`);
  }

  /** Makes a folder and those above it. A link in their place is refused, as it may lead out. */
  async #ensureFolder(parts: readonly string[]): Promise<void> {
    for (let count = 1; count <= parts.length; count++) {
      const name = parts.slice(0, count).join("/");
      if (this.#folders.has(name)) continue;
      const path = join(this.#folder, name);
      const info = await kind(path);
      if (!info) await Deno.mkdir(path);
      else if (!info.isDirectory) throw new Error(`"${name}" is both a folder and something else in it`);
      this.#folders.add(name);
    }
  }

  /** Makes room for something that is no folder. */
  async #freePath(parts: readonly string[]): Promise<string> {
    await this.#ensureFolder(parts.slice(0, -1));
    const path = join(this.#folder, ...parts);
    const info = await kind(path);
    if (info?.isDirectory) throw new Error(`"${parts.join("/")}" is both a folder and something else in it`);
    if (info) await Deno.remove(path);
    return path;
  }

  async #writeFile(path: string, { mode, size }: TarEntry): Promise<void> {
    using file = await Deno.open(path, { write: true, createNew: true, mode: (mode & 0o755) | 0o600 });
    for (let left = size; left > 0;) {
      const chunk = await this.#next(left);
      for (let at = 0; at < chunk.length;) at += await file.write(chunk.subarray(at));
      left -= chunk.length;
    }
    await this.#exactly(padding(size));
  }

  /** Takes the next bytes, at least one and at most `limit`. */
  async #next(limit: number): Promise<Uint8Array> {
    while (this.#chunk.length === 0) {
      if (!(await this.#more())) throw new Error("it ends too early");
    }
    const taken = this.#chunk.subarray(0, limit);
    this.#chunk = this.#chunk.subarray(taken.length);
    return taken;
  }

  /** Reads the next piece of the content; false at its end. */
  async #more(): Promise<boolean> {
    const { done, value } = await this.#content.next();
    if (done) return false;
    const { maxBytes = MAX_BYTES } = this.#options;
    this.#bytes += value.length;
    if (this.#bytes > maxBytes) throw new Error(`it unpacks to more than ${maxBytes} bytes`);
    this.#chunk = value;
    return true;
  }

  async #exactly(count: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(count);
    for (let at = 0; at < count;) {
      const chunk = await this.#next(count - at);
      bytes.set(chunk, at);
      at += chunk.length;
    }
    return bytes;
  }
}

function padding(size: number): number {
  return (BLOCK - size % BLOCK) % BLOCK;
}

/** Reads a header: name at 0, mode at 100, size at 124, sum at 148, type at 156, link at 157, prefix at 345. */
function parseHeader(block: Uint8Array): TarEntry | undefined {
  if (block.every((byte) => byte === 0)) return undefined;
  let sum = 0;
  for (const [at, byte] of block.entries()) sum += at >= 148 && at < 156 ? 32 : byte;
  if (number(block.subarray(148, 156)) !== sum) throw new Error("it is damaged");
  // GNU's format has times where ustar has the prefix.
  const isUstar = untilNul(block.subarray(257, 265)) === "ustar" && block[263] === 48;
  const prefix = isUstar ? untilNul(block.subarray(345, 500)) : "";
  const name = untilNul(block.subarray(0, 100));
  return {
    name: prefix === "" ? name : `${prefix}/${name}`,
    link: untilNul(block.subarray(157, 257)),
    type: String.fromCharCode(block[156]!),
    mode: number(block.subarray(100, 108)),
    size: number(block.subarray(124, 136)),
  };
}

/** Reads a number: octal digits, or GNU's big-endian bytes after one with its highest bit set. */
function number(field: Uint8Array): number {
  if (field[0] === 0x80) {
    const value = field.subarray(1).reduce((sum, byte) => sum * 256 + byte, 0);
    if (Number.isSafeInteger(value)) return value;
  } else {
    const digits = untilNul(field).trim();
    if (/^[0-7]*$/.test(digits)) return parseInt(digits || "0", 8);
  }
  throw new Error("it is damaged");
}

function untilNul(bytes: Uint8Array): string {
  const end = bytes.indexOf(0);
  return new TextDecoder().decode(end < 0 ? bytes : bytes.subarray(0, end));
}

/** Splits a name, and refuses one that leads out of the folder. */
function safeParts(name: string): string[] {
  const parts = name.split("/").filter((part) => part !== "" && part !== ".");
  if (name.startsWith("/") || parts.includes("..") || name.length > MAX_NAME) {
    throw new Error(`the name "${name.slice(0, 200)}" leads out of the package`);
  }
  return parts;
}

async function kind(path: string): Promise<Deno.FileInfo | undefined> {
  try {
    return await Deno.lstat(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}
