/**
 * What Debian's control files say: fields, digests and versions.
 *
 * @module
 */

/**
 * Reads the fields of one paragraph. Names are in lower case; lines that continue a field keep their breaks.
 *
 * @param text The paragraph
 * @returns Values by name
 */
export function parseFields(text: string): Map<string, string> {
  const fields = new Map<string, string>();
  let name: string | undefined;
  for (const line of text.split("\n")) {
    if (/^[ \t]/.test(line)) {
      if (name !== undefined) fields.set(name, `${fields.get(name)}\n${line.trim()}`);
      continue;
    }
    const colon = line.indexOf(":");
    name = colon > 0 ? line.slice(0, colon).toLowerCase() : undefined;
    // The first one counts: a second one in the same paragraph is not allowed.
    if (name !== undefined && fields.has(name)) name = undefined;
    if (name !== undefined) fields.set(name, line.slice(colon + 1).trim());
  }
  return fields;
}

/** A file that an archive's release vouches for. */
export interface ReleaseFile {
  /** Hexadecimal SHA-256. */
  readonly sha256: string;
  /** Size in bytes. */
  readonly size: number;
}

/**
 * Reads the list of files of a release.
 *
 * @param field Its `SHA256` field
 * @returns Files by path
 */
export function parseFiles(field: string): Map<string, ReleaseFile> {
  const files = new Map<string, ReleaseFile>();
  for (const [, sha256, size, path] of field.matchAll(/^([0-9a-f]{64})\s+(\d{1,15})\s+(\S+)$/gm)) {
    files.set(path!, { sha256: sha256!, size: Number(size) });
  }
  return files;
}

/**
 * Compares two versions of a package, as deb-version(7) orders them.
 *
 * @param a One version
 * @param b Another
 * @returns Negative where `a` is older, positive where it is newer, 0 where they are equal
 */
export function compareVersions(a: string, b: string): number {
  const [epochA, upstreamA, revisionA] = splitVersion(a);
  const [epochB, upstreamB, revisionB] = splitVersion(b);
  return epochA - epochB || comparePart(upstreamA, upstreamB) || comparePart(revisionA, revisionB);
}

function splitVersion(version: string): [epoch: number, upstream: string, revision: string] {
  const [, epoch = "0", upstream = "", revision = ""] = /^(?:(\d+):)?(.*?)(?:-([^-]*))?$/.exec(version) ?? [];
  return [Number(epoch), upstream, revision];
}

/** Compares runs of other characters and runs of digits in turn. */
function comparePart(a: string, b: string): number {
  const runs = (text: string): string[] => {
    const found = text.match(/\D+|\d+/g) ?? [];
    // The empty run in front of digits keeps the turns.
    return /^\d/.test(text) ? ["", ...found] : found;
  };
  const [partsA, partsB] = [runs(a), runs(b)];
  for (let index = 0; index < Math.max(partsA.length, partsB.length); index++) {
    const [x, y] = [partsA[index] ?? "", partsB[index] ?? ""];
    const order = index % 2 === 1 ? Number(x) - Number(y) : compareText(x, y);
    if (order !== 0) return order;
  }
  return 0;
}

/** Compares text without digits: a tilde comes before the end, letters come before other characters. */
function compareText(a: string, b: string): number {
  const rank = (character: string | undefined) =>
    character === undefined
      ? 0
      : character === "~"
      ? -1
      : character.charCodeAt(0) + (/[A-Za-z]/.test(character) ? 0 : 256);
  for (let at = 0; at < Math.max(a.length, b.length); at++) {
    const order = rank(a[at]) - rank(b[at]);
    if (order !== 0) return order;
  }
  return 0;
}
