/**
 * Colours and shapes of what the CLI prints.
 *
 * @module
 */

import { isSecret, isUnknown } from "../dsl/mod.ts";

/** Paints text, or leaves it plain. */
export interface Style {
  /** Whether colour is used. */
  readonly isColoured: boolean;
  /** What is added. */
  green(text: string): string;
  /** What changes. */
  yellow(text: string): string;
  /** What goes away, and errors. */
  red(text: string): string;
  /** What matters less. */
  dim(text: string): string;
  /** What matters more. */
  bold(text: string): string;
}

/**
 * Makes a style.
 *
 * @param isColoured Whether to use colour
 * @returns The style
 */
export function makeStyle(isColoured: boolean): Style {
  const paint = (code: number, end: number) => (text: string) =>
    isColoured ? `\x1b[${code}m${text}\x1b[${end}m` : text;
  return {
    isColoured,
    green: paint(32, 39),
    yellow: paint(33, 39),
    red: paint(31, 39),
    dim: paint(2, 22),
    bold: paint(1, 22),
  };
}

/**
 * Writes a value in few characters: secrets and unknowns by their names.
 *
 * @param value Any resolved value
 * @param limit Most characters
 * @returns One line
 */
export function shortValue(value: unknown, limit = 60): string {
  if (value === undefined) return "(none)";
  if (isUnknown(value)) return "(known after apply)";
  if (isSecret(value)) return "(sensitive)";
  if (typeof value === "object" && value !== null && "$resource" in value) return String(value.$resource);
  const isPlain = typeof value === "string" && /^[\w.:/@%+-]+$/.test(value);
  const text = isPlain ? value : JSON.stringify(value) ?? String(value);
  return text.length > limit ? `${text.slice(0, limit - 1)}…` : text;
}

/**
 * Writes a length of time for people.
 *
 * @param milliseconds The time
 * @returns Such as `12.3s` or `2m05s`
 */
export function shortTime(milliseconds: number): string {
  const seconds = milliseconds / 1000;
  if (seconds < 60) return `${seconds.toFixed(1)}s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}m${String(whole % 60).padStart(2, "0")}s`;
}
