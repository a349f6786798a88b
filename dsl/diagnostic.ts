/**
 * Problems found before anything is changed: all of them at once, each with its place.
 *
 * @module
 */

import type { Site } from "./site.ts";

/** One problem in a declaration. */
export interface Diagnostic {
  /** `error` stops the command; `warning` is shown and does not. */
  readonly severity: "error" | "warning";
  /** Address of the resource, such as `web[0]`; empty for the stack itself. */
  readonly address: string;
  /** Field inside the resource, such as `nics.eth0.ip`; empty for the resource as a whole. */
  readonly field: string;
  /** What is wrong and what to write instead, in one line. */
  readonly reason: string;
  /** The value that is wrong, where there is one. */
  readonly value?: unknown;
  /** The line in the user's file. */
  readonly site?: Site | undefined;
}

/**
 * Makes a diagnostic that stops the command.
 *
 * @param address Address of the resource; empty for the stack itself
 * @param field Field inside the resource; empty for the resource as a whole
 * @param reason What is wrong and what to write instead
 * @param site The line in the user's file
 * @param value The value that is wrong; not shown where it is undefined
 * @returns The diagnostic
 */
export function problem(
  address: string,
  field: string,
  reason: string,
  site: Site | undefined,
  value?: unknown,
): Diagnostic {
  return { severity: "error", address, field, reason, site, ...(value === undefined ? {} : { value }) };
}

/** Thrown when a stack cannot be planned; it carries every problem that was found. */
export class ValidationError extends Error {
  /** All problems, in the order of their addresses. */
  readonly diagnostics: readonly Diagnostic[];

  /**
   * Collects the problems of a stack.
   *
   * @param stack The name of the stack
   * @param diagnostics All problems
   */
  constructor(stack: string, diagnostics: readonly Diagnostic[]) {
    const count = diagnostics.length;
    super(
      `Cannot plan stack "${stack}": ${count} problem${count === 1 ? "" : "s"}\n` +
        diagnostics.map((each) => `  ${formatDiagnostic(each)}`).join("\n"),
    );
    this.name = "ValidationError";
    this.diagnostics = diagnostics;
  }
}

/**
 * Writes a diagnostic in one line.
 *
 * @param diagnostic The problem
 * @returns `ADDRESS.FIELD: REASON: VALUE (FILE:LINE)`
 */
export function formatDiagnostic(diagnostic: Diagnostic): string {
  const { address, field, reason, site } = diagnostic;
  const place = [address, field].filter((part) => part !== "").join(".");
  const value = "value" in diagnostic ? `: current value is ${shorten(diagnostic.value)}` : "";
  const where = site ? ` (${site.file}:${site.line})` : "";
  return `${place === "" ? "" : `${place}: `}${reason}${value}${where}`;
}

function shorten(value: unknown): string {
  let shown: string;
  try {
    shown = JSON.stringify(value) ?? String(value);
  } catch {
    shown = `a value of type ${typeof value}`;
  }
  return shown.length > 80 ? `${shown.slice(0, 77)}...` : shown;
}
