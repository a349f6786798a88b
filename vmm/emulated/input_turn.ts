/**
 * Turns of the isolate in which it looks for input. While there is something else to do Deno looks only once in 61 turns, so
 * that a guest that is busy would get nothing from sockets for as many of its own.
 *
 * @module
 */

import { join } from "node:path";
import { setImmediate } from "node:timers";

const BYTE = new Uint8Array(1);

/** A pair of sockets: a byte that goes through it is found with all other input, and there is nothing else to do. */
export class InputTurn implements Disposable {
  readonly #near: Deno.UnixConn;
  readonly #far: Deno.UnixConn;
  readonly #received = new Uint8Array(1);

  private constructor(near: Deno.UnixConn, far: Deno.UnixConn) {
    this.#near = near;
    this.#far = far;
  }

  /**
   * Makes one.
   *
   * @returns It
   */
  static async create(): Promise<InputTurn> {
    // Only its owner gets in there.
    const folder = await Deno.makeTempDir();
    try {
      const path = join(folder, "s");
      using listener = Deno.listen({ transport: "unix", path });
      const [near, far] = await Promise.all([Deno.connect({ transport: "unix", path }), listener.accept()]);
      return new InputTurn(near, far);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  }

  /** Lets everybody whose input is there have it. Take no two at once. */
  async take(): Promise<void> {
    try {
      // The read waits already when the byte comes: it would take no look otherwise.
      await Promise.all([this.#far.read(this.#received), this.#near.write(BYTE)]);
    } catch {
      // It was disposed: a turn there must be.
      await new Promise<void>((resolve) => setImmediate(resolve));
    }
  }

  /** Closes its sockets. Turns are as any other then. */
  [Symbol.dispose](): void {
    this.#near.close();
    this.#far.close();
  }
}
