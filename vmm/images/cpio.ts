/**
 * Writes cpio archives in the "newc" format, which the kernel unpacks as an initramfs.
 *
 * @module
 */

/** What an archive holds at one path: a file, a symbolic link, a device or, when it is none, a directory. */
export interface CpioEntry {
  /** Its path; a leading slash means nothing. */
  path: string;
  /** Its permission bits. */
  mode: number;
  /** What it holds, if it is a file. */
  content?: Uint8Array;
  /** Where it points, if it is a symbolic link. */
  link?: string;
  /** What it stands for, if it is a device. */
  device?: CpioDevice;
}

/** A device node of an archive. */
export interface CpioDevice {
  /** Whether it moves characters or blocks. */
  type: "character" | "block";
  /** The number of its driver. */
  major: number;
  /** The number the driver knows it by. */
  minor: number;
}

const HEADER_LENGTH = 110;
const TRAILER = "TRAILER!!!";
const DIRECTORY = 0o040000;
const FILE = 0o100000;
const LINK = 0o120000;
const CHARACTER_DEVICE = 0o020000;
const BLOCK_DEVICE = 0o060000;

const encoder = new TextEncoder();

interface Item {
  name: Uint8Array;
  inode: number;
  mode: number;
  links: number;
  body: Uint8Array;
  major: number;
  minor: number;
}

function normalize(path: string): string {
  const parts = path.split("/").filter((part) => part !== "" && part !== ".");
  if (parts.length === 0 || parts.includes("..") || path.includes("\0") || parts.join("/") === TRAILER) {
    throw new TypeError(
      `Could not add ${
        JSON.stringify(path)
      } to the cpio archive: it names no place within one, use another path`,
    );
  }
  return parts.join("/");
}

function itemOf(entry: CpioEntry, path: string, inode: number): Item {
  function fail(why: string): never {
    throw new TypeError(`Could not add ${JSON.stringify(entry.path)} to the cpio archive: ${why}`);
  }
  const { content, link, device, mode } = entry;
  if ([content, link, device].filter((kind) => kind !== undefined).length > 1) {
    fail("it is more than one of a file, a link and a device, choose one");
  }
  if (!Number.isInteger(mode) || mode < 0 || mode > 0o7777) {
    fail(`its mode ${mode} is more than permission bits, use one such as 0o644`);
  }
  const item = { name: encoder.encode(path), inode, links: 1, body: new Uint8Array(), major: 0, minor: 0 };
  if (content !== undefined) {
    if (content.length > 0xffffffff) {
      fail("the format has no room for 4 GiB or more in a file, use a disk image");
    }
    return { ...item, mode: FILE | mode, body: content };
  }
  if (link !== undefined) {
    if (link === "" || link.includes("\0")) fail(`it points to ${JSON.stringify(link)}, use a path`);
    return { ...item, mode: LINK | mode, body: encoder.encode(link) };
  }
  if (device !== undefined) {
    const { type, major, minor } = device;
    return { ...item, mode: (type === "block" ? BLOCK_DEVICE : CHARACTER_DEVICE) | mode, major, minor };
  }
  return { ...item, mode: DIRECTORY | mode, links: 2 };
}

function aligned(length: number): number {
  return (length + 3) & ~3;
}

/**
 * Makes a cpio archive.
 *
 * The same entries make the same bytes. Directories on the way to an entry are made when no entry before it
 * has, and the length is a multiple of four, so that archives can follow each other in one initramfs.
 *
 * @param entries What the archive is to hold, in order
 * @returns The uncompressed archive
 */
export function cpioArchive(entries: Iterable<CpioEntry>): Uint8Array {
  const items: Item[] = [];
  const directories = new Set<string>();
  function add(entry: CpioEntry, path: string): void {
    items.push(itemOf(entry, path, items.length + 1));
  }
  for (const entry of entries) {
    const path = normalize(entry.path);
    for (let end = path.indexOf("/"); end !== -1; end = path.indexOf("/", end + 1)) {
      const parent = path.slice(0, end);
      if (directories.has(parent)) continue;
      directories.add(parent);
      add({ path: parent, mode: 0o755 }, parent);
    }
    if (entry.content === undefined && entry.link === undefined && entry.device === undefined) {
      directories.add(path);
    }
    add(entry, path);
  }
  items.push({
    name: encoder.encode(TRAILER),
    inode: 0,
    mode: 0,
    links: 1,
    body: new Uint8Array(),
    major: 0,
    minor: 0,
  });

  let length = 0;
  for (const item of items) {
    length += aligned(HEADER_LENGTH + item.name.length + 1) + (Math.ceil(item.body.length / 4) * 4);
  }
  const archive = new Uint8Array(length);
  let offset = 0;
  for (const item of items) {
    // Magic; inode, mode, owner, group, links, time, size, device, represented device, name's size, checksum.
    const fields = [
      item.inode,
      item.mode,
      0,
      0,
      item.links,
      0,
      item.body.length,
      0,
      0,
      item.major,
      item.minor,
      item.name.length + 1,
      0,
    ];
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}`;
    encoder.encodeInto(header, archive.subarray(offset));
    archive.set(item.name, offset + HEADER_LENGTH);
    offset += aligned(HEADER_LENGTH + item.name.length + 1);
    archive.set(item.body, offset);
    offset += Math.ceil(item.body.length / 4) * 4;
  }
  return archive;
}
