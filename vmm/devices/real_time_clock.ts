/**
 * The real-time clock of a PC, for guests that ask it: time of the host in UTC (Motorola MC146818A data sheet).
 *
 * @module
 */

/** Its two ports: which register, and its value. */
export const REAL_TIME_CLOCK = { port: 0x70, length: 2 } as const;

const STATUS_A = 0x0a;
const STATUS_B = 0x0b;
const STATUS_D = 0x0d;
/** Dividers as a PC sets them; no update is ever under way. */
const STATUS_A_VALUE = 0x26;
/** 24 hours, in BCD. */
const STATUS_B_VALUE = 0x02;
const BATTERY_GOOD = 0x80;
const CENTURY = 0x32;
/** Registers of memory start here. */
const FIRST_BYTE = 0x0e;

/** A real-time clock. It cannot be set: the guest's own notion of time is the guest's. */
export class RealTimeClock {
  readonly #memory = new Uint8Array(128);
  readonly #now: () => Date;
  #index = 0;

  /**
   * Makes a clock.
   *
   * @param now Tells the time
   */
  constructor(now: () => Date = () => new Date()) {
    this.#now = now;
  }

  /**
   * Answers a read.
   *
   * @param offset Which port
   * @returns Its value
   */
  read(offset: number): number {
    if (offset === 0) return 0xff;
    const time = this.#now();
    switch (this.#index) {
      case 0:
        return bcd(time.getUTCSeconds());
      case 2:
        return bcd(time.getUTCMinutes());
      case 4:
        return bcd(time.getUTCHours());
      case 6:
        return bcd(time.getUTCDay() + 1);
      case 7:
        return bcd(time.getUTCDate());
      case 8:
        return bcd(time.getUTCMonth() + 1);
      case 9:
        return bcd(time.getUTCFullYear() % 100);
      case CENTURY:
        return bcd(Math.floor(time.getUTCFullYear() / 100));
      case STATUS_A:
        return STATUS_A_VALUE;
      case STATUS_B:
        return STATUS_B_VALUE;
      case STATUS_D:
        return BATTERY_GOOD;
      default:
        return this.#memory[this.#index]!;
    }
  }

  /**
   * Takes a write.
   *
   * @param offset Which port
   * @param value What is written, 8 bits
   */
  write(offset: number, value: number): void {
    if (offset === 0) this.#index = value & 0x7f;
    else if (this.#index >= FIRST_BYTE) this.#memory[this.#index] = value;
  }
}

function bcd(value: number): number {
  return Math.floor(value / 10) << 4 | value % 10;
}
