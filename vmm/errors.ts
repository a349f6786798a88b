/**
 * Errors of machines that a user can do something about.
 *
 * @module
 */

/** A failure that is explained in full by its message. */
export class MachineError extends Error {
  /**
   * Explains a failure.
   *
   * @param message What was attempted, on what, why it failed, what to do next
   * @param options The cause
   */
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "MachineError";
  }
}

/**
 * Says in words why a file could not be written, a full disk above all.
 *
 * @param action What was attempted, such as `build the image "debian"`
 * @param thrown What was thrown
 * @returns The error to throw
 */
export function writeError(action: string, thrown: unknown): Error {
  const text = thrown instanceof Error ? thrown.message : String(thrown);
  if (/ENOSPC|No space left|os error 28/i.test(text)) {
    return new MachineError(
      `Cannot ${action} as the disk is full: free some space and run the command again; unfinished files were removed`,
      { cause: thrown },
    );
  }
  if (thrown instanceof MachineError) return thrown;
  return new MachineError(`Cannot ${action} as ${text}`, { cause: thrown });
}
