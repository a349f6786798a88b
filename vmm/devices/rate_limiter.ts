/**
 * Limits of bandwidth and operations, as token buckets that refill all the time.
 *
 * @module
 */

/** A token bucket. */
export interface TokenBucketOptions {
  /** How many tokens it holds: bytes, or operations. */
  readonly size: number;
  /** Tokens beside those, to be used once and first. */
  readonly oneTimeBurst?: number;
  /** How long it takes to refill from empty, in milliseconds. */
  readonly refillTime: number;
}

/** Limits; what is left out has none. */
export interface RateLimiterOptions {
  /** Bytes. */
  readonly bandwidth?: TokenBucketOptions;
  /** Operations. */
  readonly ops?: TokenBucketOptions;
}

class TokenBucket {
  readonly #size: number;
  readonly #rate: number;
  #tokens: number;
  #burst: number;
  #time: number;

  constructor(name: string, { size, oneTimeBurst = 0, refillTime }: TokenBucketOptions, now: number) {
    for (const [key, value] of Object.entries({ size, refillTime })) {
      if (!Number.isSafeInteger(value) || value <= 0) {
        throw new RangeError(
          `Cannot limit ${name} as ${key} must be a positive integer: current value is ${value}`,
        );
      }
    }
    if (!Number.isSafeInteger(oneTimeBurst) || oneTimeBurst < 0) {
      throw new RangeError(
        `Cannot limit ${name} as oneTimeBurst must be an integer of at least 0: current value is ${oneTimeBurst}`,
      );
    }
    this.#size = size;
    this.#rate = size / refillTime;
    this.#tokens = size;
    this.#burst = oneTimeBurst;
    this.#time = now;
  }

  /** Milliseconds until so many tokens may be taken. */
  wait(count: number, now: number): number {
    this.#tokens = Math.min(this.#size, this.#tokens + Math.max(0, now - this.#time) * this.#rate);
    this.#time = now;
    // More than the bucket holds is taken from a full one, which then owes it.
    const missing = Math.min(count - this.#burst, this.#size) - this.#tokens;
    return missing > 0 ? missing / this.#rate : 0;
  }

  take(count: number): void {
    const burst = Math.min(this.#burst, count);
    this.#burst -= burst;
    this.#tokens -= count - burst;
  }
}

/** A limiter of bandwidth and operations. */
export class RateLimiter {
  readonly #bandwidth: TokenBucket | undefined;
  readonly #ops: TokenBucket | undefined;
  readonly #now: () => number;

  /**
   * Makes a limiter with full buckets.
   *
   * @param options Limits
   * @param now The clock, in milliseconds
   * @throws {RangeError} If a limit is not a positive integer
   */
  constructor(options: RateLimiterOptions, now: () => number = () => performance.now()) {
    this.#now = now;
    this.#bandwidth = options.bandwidth && new TokenBucket("bandwidth", options.bandwidth, now());
    this.#ops = options.ops && new TokenBucket("operations", options.ops, now());
  }

  /**
   * Takes tokens for one operation, or none at all if it must wait. An operation of more bytes than the bucket holds
   * passes when the bucket is full, and those after it wait for longer.
   *
   * @param bytes How many bytes it moves
   * @returns 0 if it may go on, or the milliseconds to wait before asking again
   */
  consume(bytes: number): number {
    const now = this.#now();
    const wait = Math.max(this.#bandwidth?.wait(bytes, now) ?? 0, this.#ops?.wait(1, now) ?? 0);
    if (wait > 0) return wait;
    this.#bandwidth?.take(bytes);
    this.#ops?.take(1);
    return 0;
  }
}
