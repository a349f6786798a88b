/**
 * Readiness probes: what must be true before a machine counts as ready.
 *
 * @module
 */

import { array, duration, number, object, oneOf, optional, type Schema, string } from "./schema.ts";
import type { Duration } from "./units.ts";

/** Limits common to all probes. */
export interface ProbeOptions {
  /** How long it may take until the probe succeeds; `"5m"` unless told. */
  readonly timeout?: Duration;
}

/** A probe. Made by {@linkcode tcp}, {@linkcode http}, {@linkcode console} and {@linkcode exec}. */
export interface Probe {
  /** What is probed. */
  readonly type: "tcp" | "http" | "console" | "exec" | "agent";
  /** TCP port inside the guest. */
  readonly port?: number;
  /** Path of an HTTP request. */
  readonly path?: string;
  /** HTTP status that counts as success. */
  readonly status?: number;
  /** Regular expression that a console line must match. */
  readonly pattern?: string;
  /** Flags of that expression. */
  readonly flags?: string;
  /** Command whose exit status must be zero. */
  readonly command?: readonly string[];
  /** Limit. */
  readonly timeout?: Duration;
}

/** Shape of a {@linkcode Probe}. */
export const probeSchema: Schema<Probe> = object({
  type: oneOf("tcp", "http", "console", "exec", "agent"),
  port: optional(number({ min: 1, max: 65535, integer: true })),
  path: optional(string({ pattern: /^\//, description: 'a path that begins with "/"' })),
  status: optional(number({ min: 100, max: 599, integer: true })),
  pattern: optional(string()),
  flags: optional(
    string({ pattern: /^[dimsuv]*$/, description: "flags of a regular expression, without g and y" }),
  ),
  command: optional(array(string())),
  timeout: optional(duration(), "5m"),
}) as Schema<Probe>;

/**
 * Ready when a TCP port of the guest accepts a connection. The host connects through a port forward of one of the
 * machine's NICs where there is one, and asks the guest itself otherwise.
 *
 * @param port TCP port in the guest
 * @param options Limits
 * @returns The probe
 */
export function tcp(port: number, options: ProbeOptions = {}): Probe {
  return { type: "tcp", port, ...options };
}

/**
 * Ready when an HTTP request to the guest has the wanted status.
 *
 * @param port TCP port in the guest
 * @param options Path (`"/"` unless told), status (200 unless told) and limits
 * @returns The probe
 */
export function http(
  port: number,
  options: ProbeOptions & { readonly path?: string; readonly status?: number } = {},
): Probe {
  return { type: "http", port, path: "/", status: 200, ...options };
}

/**
 * Ready when a line of the console matches.
 *
 * @param pattern A text to find, or a regular expression
 * @param options Limits
 * @returns The probe
 */
export function console(pattern: string | RegExp, options: ProbeOptions = {}): Probe {
  const source = typeof pattern === "string"
    ? pattern.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")
    : pattern.source;
  const flags = typeof pattern === "string" ? "" : pattern.flags.replaceAll(/[gy]/g, "");
  return { type: "console", pattern: source, ...(flags === "" ? {} : { flags }), ...options };
}

/**
 * Ready when a command in the guest ends with status zero.
 *
 * @param command The program and its arguments
 * @param options Limits
 * @returns The probe
 *
 * @example
 * ```ts
 * import { exec } from "hypertopia";
 *
 * const ready = exec(["test", "-e", "/run/nginx.pid"], { timeout: "1m" });
 * ```
 */
export function exec(command: readonly string[], options: ProbeOptions = {}): Probe {
  return { type: "exec", command, ...options };
}
