/**
 * Ethernet frames on a byte stream: each one behind its length as 32 bits, big-endian, as `-netdev stream` of QEMU and
 * passt have it.
 *
 * @module
 */

import { MachineError } from "../errors.ts";
import { MAX_FRAME } from "./switch.ts";

const LENGTH_SIZE = 4;
/** Room for the longest frame and some more, so that one read can bring many. */
const READ_SIZE = 131_072;
/** Most bytes that wait to be written. */
const QUEUE_SIZE = 524_288;

/** A connection that carries frames. Memory is bounded both ways. */
export class FrameStream implements Disposable {
  readonly #connection: Deno.Conn;
  /** Takes frames while the other one is written: all that come meanwhile go in one write. */
  #queue: Uint8Array<ArrayBuffer> = new Uint8Array(QUEUE_SIZE);
  #spare: Uint8Array<ArrayBuffer> = new Uint8Array(QUEUE_SIZE);
  #queued = 0;
  #isWriting = false;
  #isClosed = false;

  /**
   * Takes over a connection.
   *
   * @param connection The connection
   */
  constructor(connection: Deno.Conn) {
    this.#connection = connection;
  }

  /**
   * Sends a copy of a frame.
   *
   * @param frame The frame, of at most {@linkcode MAX_FRAME} bytes
   * @returns Whether there was room; otherwise it is lost
   */
  send(frame: Uint8Array): boolean {
    const at = this.#queued;
    const end = at + LENGTH_SIZE + frame.length;
    if (this.#isClosed || frame.length > MAX_FRAME || end > QUEUE_SIZE) return false;
    new DataView(this.#queue.buffer).setUint32(at, frame.length);
    this.#queue.set(frame, at + LENGTH_SIZE);
    this.#queued = end;
    if (!this.#isWriting) void this.#write();
    return true;
  }

  /**
   * Takes all frames that arrive, until the stream ends or is closed.
   *
   * @param onFrame Takes a frame, which is lent until it returns
   * @throws {MachineError} If a frame is longer than the longest one
   */
  async receive(onFrame: (frame: Uint8Array) => void): Promise<void> {
    const buffer = new Uint8Array(READ_SIZE);
    const view = new DataView(buffer.buffer);
    let end = 0;
    while (true) {
      const count = await this.#read(buffer.subarray(end));
      if (count === null) return;
      end += count;
      let at = 0;
      while (end - at >= LENGTH_SIZE) {
        const length = view.getUint32(at);
        if (length > MAX_FRAME) {
          throw new MachineError(
            `Cannot take a frame of ${length} bytes: a frame has at most ${MAX_FRAME}, behind its length`,
          );
        }
        const next = at + LENGTH_SIZE + length;
        if (next > end) break;
        onFrame(buffer.subarray(at + LENGTH_SIZE, next));
        at = next;
      }
      buffer.copyWithin(0, at, end);
      end -= at;
    }
  }

  /** Closes the connection; what was not written yet is lost. */
  [Symbol.dispose](): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#connection.close();
  }

  /** A connection that breaks has ended. */
  async #read(target: Uint8Array<ArrayBuffer>): Promise<number | null> {
    try {
      return this.#isClosed ? null : await this.#connection.read(target);
    } catch {
      return null;
    }
  }

  async #write(): Promise<void> {
    this.#isWriting = true;
    try {
      while (this.#queued > 0) {
        const bytes = this.#queue.subarray(0, this.#queued);
        [this.#queue, this.#spare] = [this.#spare, this.#queue];
        this.#queued = 0;
        for (let at = 0; at < bytes.length;) at += await this.#connection.write(bytes.subarray(at));
      }
      this.#isWriting = false;
    } catch {
      // The peer has left: no frame gets anywhere any more.
      this[Symbol.dispose]();
    }
  }
}
