/**
 * Errors that a user can do something about.
 *
 * @module
 */

/** A failure that is explained in full by its message; no stack trace is of use. */
export class PlannerError extends Error {
  /**
   * Explains a failure.
   *
   * @param message What was attempted, on what, why it failed, what to do next
   * @param options The cause
   */
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "PlannerError";
  }
}

/** State is held by somebody else. */
export class LockedError extends PlannerError {
  /** Identity of the lock, for `force-unlock`. */
  readonly lockId: string;

  /**
   * Names the holder of a lock.
   *
   * @param message Who holds it, since when
   * @param lockId Identity of the lock
   */
  constructor(message: string, lockId: string) {
    super(message);
    this.name = "LockedError";
    this.lockId = lockId;
  }
}

/** Some operations of an apply failed; the others were carried out and are on record. */
export class ApplyError extends PlannerError {
  /** The failures, by address. */
  readonly failures: ReadonlyMap<string, Error>;

  /**
   * Collects the failures of an apply.
   *
   * @param message A summary
   * @param failures The failures, by address
   */
  constructor(message: string, failures: ReadonlyMap<string, Error>) {
    super(message);
    this.name = "ApplyError";
    this.failures = failures;
  }
}

/**
 * Makes an error of whatever was thrown.
 *
 * @param thrown The thrown value
 * @returns An error
 */
export function asError(thrown: unknown): Error {
  return thrown instanceof Error ? thrown : new Error(String(thrown));
}
