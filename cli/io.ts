/**
 * What the CLI reads from and writes to.
 *
 * @module
 */

/** Streams and terminal of a CLI run; tests put their own in its place. */
export interface Io {
  /** Writes to standard output. */
  out(text: string): void;
  /** Writes to standard error. */
  err(text: string): void;
  /** Whether output goes to a terminal. */
  readonly isTerminal: boolean;
  /** Whether colour is wanted. */
  readonly isColoured: boolean;
  /** Width of the terminal. */
  columns(): number;
  /** Asks a question; undefined where nobody can answer. */
  ask(question: string, signal: AbortSignal): Promise<string | undefined>;
}

/**
 * The process's own streams.
 *
 * @returns The streams
 */
export function processIo(): Io {
  const encoder = new TextEncoder();
  const write = (stream: { writeSync(data: Uint8Array): number }, text: string) => {
    const bytes = encoder.encode(text);
    try {
      for (let offset = 0; offset < bytes.length;) offset += stream.writeSync(bytes.subarray(offset));
    } catch (error) {
      // The reader left, as `head` does: nothing is left to say.
      if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
    }
  };
  const isTerminal = Deno.stdout.isTerminal() && Deno.env.get("TERM") !== "dumb";
  return {
    out: (text) => write(Deno.stdout, text),
    err: (text) => write(Deno.stderr, text),
    isTerminal,
    isColoured: isTerminal && !Deno.env.get("NO_COLOR"),
    columns() {
      try {
        return Deno.consoleSize().columns;
      } catch {
        return 80;
      }
    },
    async ask(question, signal) {
      if (!Deno.stdin.isTerminal()) return undefined;
      write(Deno.stdout, question);
      const buffer = new Uint8Array(1024);
      const aborted = new Promise<null>((resolve) =>
        signal.addEventListener("abort", () => resolve(null), { once: true })
      );
      const count = await Promise.race([Deno.stdin.read(buffer), aborted]);
      return count === null ? "" : new TextDecoder().decode(buffer.subarray(0, count)).trim();
    },
  };
}
