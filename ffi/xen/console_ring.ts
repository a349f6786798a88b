/**
 * The page by which a domain's console and its backend exchange bytes (Xen 4.17 `xen/include/public/io/console.h`).
 *
 * @module
 */

/** Bytes of the page that are used; the rest of its 4096 is not. */
export const CONSOLE_RING_SIZE = 3088;
/** Most bytes on their way to the guest. */
export const CONSOLE_INPUT_SIZE = 1024;
/** Most bytes on their way from the guest. */
export const CONSOLE_OUTPUT_SIZE = 2048;

/** Where the rings' bytes begin. */
const INPUT = 0;
const OUTPUT = 1024;
/** The indices, as numbers of 32-bit words. They only grow, modulo 2^32, and are taken modulo the ring's size. */
const IN_CONS = 3072 / 4;
const IN_PROD = 3076 / 4;
const OUT_CONS = 3080 / 4;
const OUT_PROD = 3084 / 4;

/**
 * The backend's side of a console's page.
 *
 * The guest can write all of the page at any time. The indices that are the backend's own are read only once, when it
 * begins, and each one of the guest's is checked whenever it is read: where it cannot be right, that direction goes on
 * from there, and what was on its way is lost.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 *
 * const page = new ArrayBuffer(4096);
 * const ring = new ConsoleRing(page, () => {});
 * assert.equal(ring.write(new TextEncoder().encode("ls\n")), 3);
 * assert.equal(ring.unread, 3);
 * ```
 */
export class ConsoleRing {
  readonly #words: Int32Array<ArrayBufferLike>;
  readonly #input: Uint8Array<ArrayBufferLike>;
  readonly #output: Uint8Array<ArrayBufferLike>;
  readonly #report: (message: string) => void;
  #hasReported = false;
  #inProd: number;
  #outCons: number;

  /**
   * Goes on where an earlier backend of the same page ended.
   *
   * @param page The memory that is shared with the guest
   * @param report Told at most once, of what the guest did wrong
   * @param offset Where in the memory the page begins, in bytes; a multiple of 4
   * @throws {RangeError} If the memory is too small
   */
  constructor(page: ArrayBufferLike, report: (message: string) => void, offset = 0) {
    this.#words = new Int32Array(page, offset, CONSOLE_RING_SIZE / 4);
    this.#input = new Uint8Array(page, offset + INPUT, CONSOLE_INPUT_SIZE);
    this.#output = new Uint8Array(page, offset + OUTPUT, CONSOLE_OUTPUT_SIZE);
    this.#report = report;
    this.#inProd = this.#load(IN_PROD);
    this.#outCons = this.#load(OUT_CONS);
  }

  /** How many bytes the guest has not yet taken. */
  get unread(): number {
    const cons = this.#load(IN_CONS);
    const unread = (this.#inProd - cons) >>> 0;
    if (unread <= CONSOLE_INPUT_SIZE) return unread;
    this.#blame(`it has taken ${cons} bytes of the ${this.#inProd} that it was sent`);
    this.#inProd = cons;
    this.#store(IN_PROD, cons);
    return 0;
  }

  /** How many bytes there is room for. */
  get room(): number {
    return CONSOLE_INPUT_SIZE - this.unread;
  }

  /**
   * Sends the guest what there is room for. It is to be notified then.
   *
   * @param bytes What to send
   * @returns How many bytes went
   */
  write(bytes: Uint8Array): number {
    const length = Math.min(bytes.length, this.room);
    if (length === 0) return 0;
    const at = this.#inProd % CONSOLE_INPUT_SIZE;
    const first = Math.min(length, CONSOLE_INPUT_SIZE - at);
    this.#input.set(bytes.subarray(0, first), at);
    this.#input.set(bytes.subarray(first, length));
    this.#inProd = (this.#inProd + length) >>> 0;
    // The guest must see the bytes no later than it sees that they are there.
    this.#store(IN_PROD, this.#inProd);
    return length;
  }

  /**
   * Copies what the guest has written, and leaves it there.
   *
   * @param target Where to
   * @returns How many bytes: all that there are, or as many as fit
   */
  peek(target: Uint8Array): number {
    const prod = this.#load(OUT_PROD);
    const pending = (prod - this.#outCons) >>> 0;
    if (pending > CONSOLE_OUTPUT_SIZE) {
      this.#blame(`it has written ${prod} bytes where ${this.#outCons} were taken`);
      this.#outCons = prod;
      this.#store(OUT_CONS, prod);
      return 0;
    }
    const length = Math.min(pending, target.length);
    const at = this.#outCons % CONSOLE_OUTPUT_SIZE;
    const first = Math.min(length, CONSOLE_OUTPUT_SIZE - at);
    target.set(this.#output.subarray(at, at + first));
    target.set(this.#output.subarray(0, length - first), first);
    return length;
  }

  /**
   * Gives back room that bytes took which the guest wrote. It is to be notified then.
   *
   * @param length How many bytes, at most as many as {@linkcode ConsoleRing.peek} last found
   */
  consume(length: number): void {
    this.#outCons = (this.#outCons + length) >>> 0;
    // The guest may write there as soon as it sees this.
    this.#store(OUT_CONS, this.#outCons);
  }

  #load(index: number): number {
    return Atomics.load(this.#words, index) >>> 0;
  }

  #store(index: number, value: number): void {
    Atomics.store(this.#words, index, value | 0);
  }

  #blame(what: string): void {
    if (this.#hasReported) return;
    this.#hasReported = true;
    this.#report(
      `Cannot follow the indices of the guest's console ring as ${what}: what was on its way is lost`,
    );
  }
}
