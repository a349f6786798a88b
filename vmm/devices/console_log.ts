/**
 * The file that gets all that a guest's console says.
 *
 * @module
 */

/** Writes a console's log. A host without room for it loses the guest's words, never the guest. */
export class ConsoleLog implements Disposable {
  readonly #path: string;
  readonly #file: Deno.FsFile;
  readonly #warn: (message: string) => void;

  /**
   * Opens the file, and goes on after what is in it.
   *
   * @param path The file; only its owner may read it where it is made
   * @param warn Takes words on what cannot be written
   * @throws {Error} If it cannot be opened
   */
  constructor(path: string, warn: (message: string) => void) {
    this.#path = path;
    this.#file = Deno.openSync(path, { append: true, create: true, mode: 0o600 });
    this.#warn = warn;
  }

  /**
   * Writes what the guest has said, as far as that can be.
   *
   * @param bytes The bytes
   */
  write(bytes: Uint8Array): void {
    try {
      for (let at = 0; at < bytes.length;) at += this.#file.writeSync(bytes.subarray(at));
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      this.#warn(
        `Cannot write the console's log "${this.#path}" as ${reason}: what the guest says is lost until that is mended`,
      );
    }
  }

  /** Closes the file. */
  [Symbol.dispose](): void {
    this.#file.close();
  }
}
