/**
 * A supervisor's log: a line for each thing that happened.
 *
 * @module
 */

/** Levels of a log, from the least. */
export const LOG_LEVELS = ["Off", "Error", "Warn", "Info", "Debug", "Trace"] as const;

/** How much is logged; each level has those before it. */
export type LogLevel = typeof LOG_LEVELS[number];

/** Most warnings in a minute: guests cause them, and must not fill the host's disk. */
const WARNINGS = 60;
const MINUTE = 60_000;

/** Writes lines to standard output or a file. */
export class Log implements Disposable {
  #file: Deno.FsFile | undefined;
  #level: number;
  #hasLevel: boolean;
  readonly #name: string;
  #minute = -Infinity;
  #warnings = 0;

  /**
   * Makes a log that goes to standard output.
   *
   * @param name What stands at the beginning of each line
   * @param options How much is logged, `Info` unless told; whether lines name their level; and the file
   */
  constructor(
    name: string,
    options: { readonly level?: LogLevel; readonly showLevel?: boolean; readonly path?: string } = {},
  ) {
    this.#name = name;
    this.#level = LOG_LEVELS.indexOf(options.level ?? "Info");
    this.#hasLevel = options.showLevel ?? true;
    this.configure(options);
  }

  /**
   * Changes what is logged, and where.
   *
   * @param options Level, whether lines name it, and the file
   */
  configure(
    options: { readonly level?: LogLevel; readonly showLevel?: boolean; readonly path?: string },
  ): void {
    if (options.level !== undefined) this.#level = LOG_LEVELS.indexOf(options.level);
    if (options.showLevel !== undefined) this.#hasLevel = options.showLevel;
    if (options.path === undefined) return;
    const file = Deno.openSync(options.path, { append: true, create: true, mode: 0o600 });
    this.#file?.close();
    this.#file = file;
  }

  /**
   * Logs a failure.
   *
   * @param error What was thrown, or words
   */
  error(error: unknown): void {
    this.#write("Error", error instanceof Error ? error.message : String(error));
  }

  /**
   * Logs what should not happen; what comes too often in a minute is only counted.
   *
   * @param message Words
   */
  warn(message: string): void {
    const now = performance.now();
    if (now - this.#minute >= MINUTE) {
      const left = this.#warnings - WARNINGS;
      this.#minute = now;
      this.#warnings = 0;
      if (left > 0) this.#write("Warn", `${left} more warnings were left out`);
    }
    if (this.#warnings++ < WARNINGS) this.#write("Warn", message);
  }

  /**
   * Logs what happens.
   *
   * @param message Words
   */
  info(message: string): void {
    this.#write("Info", message);
  }

  /** Closes the file. */
  [Symbol.dispose](): void {
    this.#file?.close();
    this.#file = undefined;
  }

  #write(level: LogLevel, message: string): void {
    if (LOG_LEVELS.indexOf(level) > this.#level) return;
    const line = `${new Date().toISOString()} [${this.#name}]${
      this.#hasLevel ? ` ${level}:` : ""
    } ${message}\n`;
    const bytes = new TextEncoder().encode(line);
    try {
      (this.#file ?? Deno.stdout).writeSync(bytes);
    } catch {
      // A log that cannot be written must not end the machine.
    }
  }
}
