/**
 * A serial port: the 16550A at its usual ports (National Semiconductor PC16550D data sheet).
 *
 * @module
 */

import type { Fd } from "../../ffi/mod.ts";

/** First of its eight ports, and its interrupt. */
export const SERIAL = { port: 0x3f8, length: 8, gsi: 4 } as const;

const REGISTER = {
  data: 0,
  interruptEnable: 1,
  interruptIdentity: 2,
  lineControl: 3,
  modemControl: 4,
  lineStatus: 5,
  modemStatus: 6,
  scratch: 7,
} as const;

const ENABLE_RECEIVED = 1;
const ENABLE_EMPTY = 2;
const IDENTITY_NONE = 1;
const IDENTITY_EMPTY = 2;
const IDENTITY_RECEIVED = 4;
const FIFO_ENABLED = 0xc0;
const FIFO_ENABLE = 1;
const FIFO_CLEAR_RECEIVED = 2;
const LINE_DIVISOR = 0x80;
const MODEM_LOOPBACK = 0x10;
const STATUS_RECEIVED = 1;
/** The transmitter is empty at all times: what is written is taken at once. */
const STATUS_EMPTY = 0x60;
/** Clear to send, data set ready, carrier detect. */
const MODEM_READY = 0xb0;
/** Most input that waits for the guest, in bytes; more is dropped, as a line without flow control does. */
const INPUT_ROOM = 64 * 1024;

/** A serial port. */
export class SerialPort {
  readonly #interrupt: Fd;
  readonly #onOutput: (byte: number) => void;
  readonly #input: number[] = [];
  #enabled = 0;
  #lineControl = 3;
  #modemControl = 8;
  #scratch = 0;
  #divisor = 12;
  #hasFifo = false;
  #isEmptyPending = false;

  /**
   * Makes a port.
   *
   * @param interrupt Eventfd of its interrupt
   * @param onOutput Takes each byte that the guest writes
   */
  constructor(interrupt: Fd, onOutput: (byte: number) => void) {
    this.#interrupt = interrupt;
    this.#onOutput = onOutput;
  }

  /**
   * Sends to the guest.
   *
   * @param bytes What to send
   */
  send(bytes: Uint8Array): void {
    for (const byte of bytes) {
      if (this.#input.length >= INPUT_ROOM) break;
      this.#input.push(byte);
    }
    this.#update();
  }

  /**
   * Answers a read.
   *
   * @param offset Which register
   * @returns Its value
   */
  read(offset: number): number {
    const isDivisor = (this.#lineControl & LINE_DIVISOR) !== 0;
    switch (offset) {
      case REGISTER.data: {
        if (isDivisor) return this.#divisor & 0xff;
        const byte = this.#input.shift() ?? 0;
        this.#update();
        return byte;
      }
      case REGISTER.interruptEnable:
        return isDivisor ? this.#divisor >> 8 : this.#enabled;
      case REGISTER.interruptIdentity: {
        const identity = this.#identity();
        // To be told of it ends it.
        if (identity === IDENTITY_EMPTY) this.#isEmptyPending = false;
        return identity | (this.#hasFifo ? FIFO_ENABLED : 0);
      }
      case REGISTER.lineControl:
        return this.#lineControl;
      case REGISTER.modemControl:
        return this.#modemControl;
      case REGISTER.lineStatus:
        return STATUS_EMPTY | (this.#input.length > 0 ? STATUS_RECEIVED : 0);
      case REGISTER.modemStatus: {
        if ((this.#modemControl & MODEM_LOOPBACK) === 0) return MODEM_READY;
        // Outputs come back as inputs: DTR as DSR, RTS as CTS, OUT1 as RI, OUT2 as DCD.
        const out = this.#modemControl;
        return (out & 1) << 5 | (out & 2) << 3 | (out & 4) << 4 | (out & 8) << 4;
      }
      default:
        return this.#scratch;
    }
  }

  /**
   * Takes a write.
   *
   * @param offset Which register
   * @param value What is written, 8 bits
   */
  write(offset: number, value: number): void {
    const isDivisor = (this.#lineControl & LINE_DIVISOR) !== 0;
    switch (offset) {
      case REGISTER.data:
        if (isDivisor) this.#divisor = this.#divisor & 0xff00 | value;
        else {
          if ((this.#modemControl & MODEM_LOOPBACK) === 0) this.#onOutput(value);
          else if (this.#input.length < INPUT_ROOM) this.#input.push(value);
          this.#isEmptyPending = true;
          this.#update();
        }
        break;
      case REGISTER.interruptEnable:
        if (isDivisor) this.#divisor = this.#divisor & 0xff | value << 8;
        else {
          if ((value & ~this.#enabled & ENABLE_EMPTY) !== 0) this.#isEmptyPending = true;
          this.#enabled = value & 0xf;
          this.#update();
        }
        break;
      case REGISTER.interruptIdentity:
        this.#hasFifo = (value & FIFO_ENABLE) !== 0;
        if ((value & FIFO_CLEAR_RECEIVED) !== 0) this.#input.length = 0;
        break;
      case REGISTER.lineControl:
        this.#lineControl = value;
        break;
      case REGISTER.modemControl:
        this.#modemControl = value & 0x1f;
        break;
      case REGISTER.scratch:
        this.#scratch = value;
        break;
    }
  }

  #identity(): number {
    if ((this.#enabled & ENABLE_RECEIVED) !== 0 && this.#input.length > 0) return IDENTITY_RECEIVED;
    if ((this.#enabled & ENABLE_EMPTY) !== 0 && this.#isEmptyPending) return IDENTITY_EMPTY;
    return IDENTITY_NONE;
  }

  #update(): void {
    if (this.#identity() !== IDENTITY_NONE) this.#interrupt.signal();
  }
}
