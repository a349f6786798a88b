/**
 * Units as they are written in an `infra.ts`: sizes, durations and IPv4 networks.
 *
 * @module
 */

/** A unit of {@linkcode Size}: binary multiples of a byte. */
export type SizeUnit = "B" | "KiB" | "MiB" | "GiB" | "TiB";

/** An amount of memory or storage, such as `"512MiB"` or `"1.5GiB"`. */
export type Size = `${number}${SizeUnit}`;

/** A unit of {@linkcode Duration}: milliseconds, seconds, minutes or hours. */
export type DurationUnit = "ms" | "s" | "m" | "h";

/** A length of time, such as `"500ms"` or `"2m"`. */
export type Duration = `${number}${DurationUnit}`;

/** An IPv4 network with its prefix length, such as `"10.20.0.0/24"`. */
export type Cidr = `${number}.${number}.${number}.${number}/${number}`;

/** An IPv4 address, such as `"10.20.0.10"`. */
export type Ipv4 = `${number}.${number}.${number}.${number}`;

const SIZE_UNITS: readonly SizeUnit[] = ["B", "KiB", "MiB", "GiB", "TiB"];
const DURATION_UNITS: Record<DurationUnit, number> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 };

/**
 * Parses a size into bytes.
 *
 * @param text The size, such as `"512MiB"`
 * @returns The number of bytes, a whole number
 * @throws {RangeError} If the unit is not one of {@linkcode SizeUnit} or the result is not a whole number of bytes
 *
 * @example
 * ```ts
 * import { parseSize } from "hypertopia/dsl";
 * import assert from "node:assert/strict";
 *
 * assert.equal(parseSize("1.5KiB"), 1536);
 * ```
 */
export function parseSize(text: string): number {
  const match = /^(\d+(?:\.\d+)?)([A-Za-z]+)$/.exec(text.trim());
  const exponent = match ? SIZE_UNITS.indexOf(match[2] as SizeUnit) : -1;
  if (!match || exponent < 0) {
    throw new RangeError(
      `Cannot read "${text}" as a size: write a number and one of ${SIZE_UNITS.join(", ")}`,
    );
  }
  const bytes = Number(match[1]) * 1024 ** exponent;
  if (!Number.isSafeInteger(bytes)) {
    throw new RangeError(`Cannot read "${text}" as a size: it is not a whole number of bytes below 2^53`);
  }
  return bytes;
}

/**
 * Writes a number of bytes in the largest unit that shows it exactly.
 *
 * @param bytes A whole number of bytes
 * @returns The size, such as `"512MiB"`
 *
 * @example
 * ```ts
 * import { formatSize } from "hypertopia/dsl";
 * import assert from "node:assert/strict";
 *
 * assert.equal(formatSize(1024 ** 3), "1GiB");
 * ```
 */
export function formatSize(bytes: number): Size {
  let exponent = 0;
  let value = bytes;
  while (value !== 0 && value % 1024 === 0 && exponent < SIZE_UNITS.length - 1) {
    value /= 1024;
    exponent++;
  }
  return `${value}${SIZE_UNITS[exponent]!}`;
}

/**
 * Parses a duration into milliseconds.
 *
 * @param text The duration, such as `"30s"`
 * @returns Milliseconds
 * @throws {RangeError} If the text is not a number followed by `ms`, `s`, `m` or `h`
 *
 * @example
 * ```ts
 * import { parseDuration } from "hypertopia/dsl";
 * import assert from "node:assert/strict";
 *
 * assert.equal(parseDuration("2m"), 120_000);
 * ```
 */
export function parseDuration(text: string): number {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h)$/.exec(text.trim());
  if (!match) {
    throw new RangeError(`Cannot read "${text}" as a duration: write a number and one of ms, s, m, h`);
  }
  return Number(match[1]) * DURATION_UNITS[match[2] as DurationUnit];
}

/**
 * Writes milliseconds in the largest unit that shows them exactly.
 *
 * @param milliseconds A whole number of milliseconds
 * @returns The duration, such as `"2m"`
 */
export function formatDuration(milliseconds: number): Duration {
  for (const unit of ["h", "m", "s"] as const) {
    if (milliseconds !== 0 && milliseconds % DURATION_UNITS[unit] === 0) {
      return `${milliseconds / DURATION_UNITS[unit]}${unit}`;
    }
  }
  return `${milliseconds}ms`;
}

/**
 * Parses a dotted IPv4 address.
 *
 * @param text The address, such as `"10.0.0.1"`
 * @returns The address as an unsigned 32-bit number
 * @throws {RangeError} If the text is not four numbers from 0 to 255
 */
export function parseIpv4(text: string): number {
  const parts = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(text)?.slice(1).map(Number);
  if (!parts || parts.some((part) => part > 255)) {
    throw new RangeError(`Cannot read "${text}" as an IPv4 address: write four numbers from 0 to 255`);
  }
  return parts.reduce((sum, part) => sum * 256 + part, 0);
}

/**
 * Writes an unsigned 32-bit number as a dotted IPv4 address.
 *
 * @param address The address as a number
 * @returns The dotted form
 */
export function formatIpv4(address: number): Ipv4 {
  return `${address >>> 24}.${(address >>> 16) & 255}.${(address >>> 8) & 255}.${address & 255}`;
}

/** An IPv4 network, taken apart by {@linkcode parseCidr}. */
export interface Ipv4Network {
  /** The first address, as an unsigned 32-bit number. */
  readonly base: number;
  /** Prefix length in bits, 8 to 30. */
  readonly prefix: number;
  /** How many addresses the network has, its base and broadcast address included. */
  readonly size: number;
}

/**
 * Parses an IPv4 network.
 *
 * @param text The network, such as `"10.20.0.0/24"`
 * @returns Base address, prefix length and size
 * @throws {RangeError} If the prefix is missing or outside 8 to 30, or if the address has bits below the prefix
 *
 * @example
 * ```ts
 * import { parseCidr } from "hypertopia/dsl";
 * import assert from "node:assert/strict";
 *
 * assert.equal(parseCidr("10.20.0.0/24").size, 256);
 * ```
 */
export function parseCidr(text: string): Ipv4Network {
  const [address = "", prefixText = ""] = text.split("/");
  const prefix = /^\d{1,2}$/.test(prefixText) ? Number(prefixText) : -1;
  if (prefix < 8 || prefix > 30) {
    throw new RangeError(
      `Cannot read "${text}" as a network: write ADDRESS/PREFIX with a prefix from 8 to 30`,
    );
  }
  const base = parseIpv4(address);
  const size = 2 ** (32 - prefix);
  if (base % size !== 0) {
    const wanted = formatIpv4(base - base % size);
    throw new RangeError(`Cannot read "${text}" as a network: its first address is "${wanted}/${prefix}"`);
  }
  return { base, prefix, size };
}
