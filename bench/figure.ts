/**
 * Figures and how they are compared.
 *
 * @module
 */

/** One figure. */
export interface Figure {
  /** What was measured. */
  readonly name: string;
  /** Ours. */
  readonly value: number;
  /** Its unit. */
  readonly unit: string;
  /** What it is compared with. */
  readonly peer?: string;
  /** The peer's figure. */
  readonly peer_value?: number;
  /** Ours over the peer's. */
  readonly ratio?: number;
}

/**
 * Finds the median.
 *
 * @param values Some numbers
 * @returns The one in the middle
 */
export function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1]!;
}

/**
 * Rounds to three significant digits.
 *
 * @param value A number
 * @returns The rounded number
 */
export function rounded(value: number): number {
  return Number(value.toPrecision(3));
}

/**
 * Makes a figure of two series that were measured in turn.
 *
 * @param name What was measured
 * @param unit Its unit
 * @param ours Our series
 * @param peer What it is compared with
 * @param theirs The peer's series
 * @returns The figure
 */
export function compared(
  name: string,
  unit: string,
  ours: readonly number[],
  peer: string,
  theirs: readonly number[],
): Figure {
  return {
    name,
    value: rounded(median(ours)),
    unit,
    peer,
    peer_value: rounded(median(theirs)),
    ratio: rounded(median(ours) / median(theirs)),
  };
}
