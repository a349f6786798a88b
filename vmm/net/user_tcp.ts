/**
 * The end of a TCP connection that a guest talks to, in user space (RFC 9293; timers of RFC 6298; congestion control of
 * RFC 5681 and 6582). It has no window scaling: its buffers are as large as the largest window without.
 *
 * @module
 */

import { clearTimeout, setTimeout } from "node:timers";
import { IPV4_SIZE, MTU, TCP_FLAG, TCP_SIZE, type TcpSegment } from "./frame.ts";

/** Bytes that are kept in each direction. A power of two, and no less than the largest window. */
const BUFFER_SIZE = 65_536;
const MAX_WINDOW = 65_535;
/** Largest payload of a segment, in bytes. */
const MAX_SEGMENT = MTU - IPV4_SIZE - TCP_SIZE;
/** What a peer takes that does not say (RFC 9293), and the least that counts: less would be mostly headers. */
const DEFAULT_SEGMENT = 536;
const LEAST_SEGMENT = 64;
/** Most pieces beyond a gap that are kept track of. */
const MAX_PIECES = 16;
const FIRST_TIMEOUT = 1000;
const LEAST_TIMEOUT = 200;
const LONGEST_TIMEOUT = 60_000;
/** Most segments without any answer before a connection counts as lost. */
const MAX_UNANSWERED = 15;
/** How long a handshake may take, in milliseconds. */
const HANDSHAKE_TIMEOUT = 30_000;
/** After how much silence the peer is asked whether it is still there, in milliseconds. */
const KEEP_ALIVE = 300_000;
/** How long the end of a connection is remembered, in milliseconds. */
const TIME_WAIT = 10_000;
/** How soon to try again when the link took no frame, in milliseconds. */
const LINK_RETRY = 5;
const LONGEST_LINK_RETRY = 500;
const EMPTY = new Uint8Array(0);

/** Tells the time, and calls back. */
export interface Clock {
  /**
   * Tells the time.
   *
   * @returns Milliseconds since any moment
   */
  now(): number;
  /**
   * Calls back once.
   *
   * @param delay Milliseconds from now
   * @param call What to call
   * @returns Makes it not happen
   */
  after(delay: number, call: () => void): () => void;
}

/** The clock of this process. */
export const systemClock: Clock = {
  now: () => performance.now(),
  after(delay, call) {
    const timer = setTimeout(call, delay);
    return () => clearTimeout(timer);
  },
};

/** What a {@linkcode TcpEndpoint} is made of. */
export interface TcpEndpointOptions {
  /** Port of this end. */
  readonly localPort: number;
  /** Port of the peer. */
  readonly remotePort: number;
  /** Takes a segment to the peer; false if it cannot now. Its payload counts only until this returns. */
  readonly send: (segment: TcpSegment) => boolean;
  /** Called when the handshake is done. */
  readonly onOpen?: () => void;
  /** Called at the end, however it came. */
  readonly onClose?: () => void;
  /** The clock; that of the process unless told. */
  readonly clock?: Clock;
  /** First sequence number; a random one unless told. */
  readonly initialSequence?: number;
}

type State = "idle" | "syn-sent" | "syn-received" | "open" | "time-wait" | "closed";
type TimerKind = "none" | "link" | "answer" | "keep-alive" | "time-wait";

/** A sequence of bytes that nobody has acknowledged, or that nobody has read. */
interface Piece {
  start: number;
  end: number;
}

/** One end of a TCP connection. Segments come by {@linkcode TcpEndpoint.receive}; bytes go through two buffers. */
export class TcpEndpoint {
  readonly #options: TcpEndpointOptions;
  readonly #clock: Clock;
  #state: State = "idle";
  #isAborted = false;

  // What is sent: the buffer begins with the byte that is not acknowledged.
  readonly #output = new RingBuffer(BUFFER_SIZE);
  readonly #initialSequence: number;
  #unacknowledged: number;
  #next: number;
  /** Behind the last byte that was ever sent; `#next` goes back when bytes are sent again. */
  #highest: number;
  #mss = DEFAULT_SEGMENT;
  #window = 0;
  #windowSequence = 0;
  #windowAcknowledgment = 0;
  #isEnding = false;
  #isEndAcknowledged = false;
  #congestionWindow = 0;
  #slowStartThreshold = Infinity;
  #duplicates = 0;
  /** Where recovery from a loss ends. */
  #recovery: number | undefined;

  // What is received: the buffer ends with the byte before the next one, pieces beyond a gap lie behind it.
  readonly #input = new RingBuffer(BUFFER_SIZE);
  #expected = 0;
  #pieces: Piece[] = [];
  /** Sequence number of the peer's FIN. */
  #peerEnd: number | undefined;
  #isPeerEnded = false;
  /** Behind the last byte that the peer was told that it may send. */
  #offered = 0;
  #isAcknowledgmentDue = false;

  #roundTrip: number | undefined;
  #variation = 0;
  #timeout = FIRST_TIMEOUT;
  /** A byte whose acknowledgment tells the round trip time. */
  #timed: { readonly sequence: number; readonly since: number } | undefined;
  #unanswered = 0;
  #giveUpAt = 0;
  #isLinkFull = false;
  #linkRetry = LINK_RETRY;
  #timerKind: TimerKind = "none";
  #deadline = Infinity;
  #firesAt = Infinity;
  #cancelTimer: (() => void) | undefined;

  #readable: PromiseWithResolvers<void> | undefined;
  #writable: PromiseWithResolvers<void> | undefined;

  /**
   * Makes an end that does nothing yet.
   *
   * @param options Ports, and where segments go
   */
  constructor(options: TcpEndpointOptions) {
    this.#options = options;
    this.#clock = options.clock ?? systemClock;
    this.#initialSequence = options.initialSequence ?? crypto.getRandomValues(new Uint32Array(1))[0]!;
    this.#unacknowledged = this.#next = this.#highest = this.#initialSequence;
  }

  /** Whether the handshake is not done yet. */
  get isOpening(): boolean {
    return this.#state === "idle" || this.#state === "syn-sent" || this.#state === "syn-received";
  }

  /** Whether both directions have ended, and all bytes of the peer were taken. */
  get isOver(): boolean {
    return this.#state === "time-wait" || this.#state === "closed";
  }

  /** Whether it ended before its time. */
  get isAborted(): boolean {
    return this.#isAborted;
  }

  /** Begins a connection. */
  connect(): void {
    this.#begin("syn-sent");
  }

  /**
   * Accepts a connection.
   *
   * @param syn The peer's first segment
   */
  accept(syn: TcpSegment): void {
    if (this.#state !== "idle") return;
    this.#synchronize(syn);
    this.#begin("syn-received");
  }

  /**
   * Takes a segment of the peer.
   *
   * @param segment The segment; nothing of it is kept
   */
  receive(segment: TcpSegment): void {
    if (this.#state === "closed") return;
    const { flags, sequence } = segment;
    if (this.#state === "idle") {
      if (flags & TCP_FLAG.RST) this.#close(true);
      return;
    }
    if (this.#state === "syn-sent") return this.#receiveAnswer(segment);
    const offset = sequence - this.#expected | 0;
    if (flags & TCP_FLAG.RST) {
      // One that is not exact may be forged: the peer is asked (RFC 5961).
      if (offset === 0) this.#close(true);
      else if (offset > 0 && offset < this.#input.free) this.#acknowledge();
      return;
    }
    if (flags & TCP_FLAG.SYN) {
      if (this.#state === "syn-received" && offset === -1) this.#sendSyn();
      else this.#acknowledge();
      return;
    }
    if (!(flags & TCP_FLAG.ACK)) return;
    const before = this.#unacknowledged;
    if (!this.#takeAcknowledgment(segment)) return;
    this.#takeData(segment);
    this.#sendData();
    this.#arm(this.#unacknowledged !== before || this.#timerKind === "keep-alive");
  }

  /**
   * Waits for bytes of the peer.
   *
   * @returns Bytes that stay until {@linkcode consume} gives them back; nothing when no more will come
   */
  async read(): Promise<Uint8Array<ArrayBuffer> | undefined> {
    while (this.#input.length === 0) {
      if (this.#isPeerEnded || this.#state === "closed") return undefined;
      this.#readable ??= Promise.withResolvers();
      await this.#readable.promise;
    }
    return this.#input.readable();
  }

  /**
   * Gives bytes back, so that the peer may send more.
   *
   * @param count How many of the first ones of {@linkcode read}
   */
  consume(count: number): void {
    if (this.#isAborted) return;
    this.#input.consume(count);
    if (this.#isPeerEnded) {
      if (this.#input.length === 0) {
        this.#input.release();
        this.#endIfOver();
      }
      return;
    }
    // A window that opens a little at a time would make the peer send small segments.
    const opened = this.#expected + this.#offerable() - this.#offered | 0;
    if (opened >= Math.min(2 * this.#mss, BUFFER_SIZE / 2)) this.#acknowledge();
  }

  /**
   * Waits for room for bytes to the peer.
   *
   * @returns Where they can be written, before {@linkcode commit}; nothing when no more can be sent
   */
  async room(): Promise<Uint8Array<ArrayBuffer> | undefined> {
    while (this.#state !== "closed" && !this.#isEnding) {
      const room = this.#output.writable();
      if (room.length > 0) return room;
      this.#writable ??= Promise.withResolvers();
      await this.#writable.promise;
    }
    return undefined;
  }

  /**
   * Sends bytes.
   *
   * @param count How many were written to the {@linkcode room}
   */
  commit(count: number): void {
    if (this.#state === "closed" || this.#isEnding) return;
    this.#output.commit(count);
    this.#sendData();
    this.#arm();
  }

  /** Tells the peer that nothing comes behind what was committed. */
  end(): void {
    if (this.#isEnding || this.#state === "closed") return;
    this.#isEnding = true;
    this.#sendData();
    this.#arm();
  }

  /** Ends the connection at once, in both directions. */
  abort(): void {
    if (this.#state === "closed") return;
    if (this.#state === "open" || this.#state === "syn-received") {
      this.#send(TCP_FLAG.RST | TCP_FLAG.ACK, this.#acceptable);
    }
    this.#close(this.#state !== "time-wait");
  }

  #begin(state: "syn-sent" | "syn-received"): void {
    if (this.#state !== "idle") return;
    this.#state = state;
    this.#next = this.#highest = this.#initialSequence + 1 >>> 0;
    this.#giveUpAt = this.#clock.now() + HANDSHAKE_TIMEOUT;
    this.#sendSyn();
    this.#arm();
  }

  #synchronize({ sequence, window, mss = DEFAULT_SEGMENT }: TcpSegment): void {
    this.#expected = sequence + 1 >>> 0;
    this.#mss = Math.min(Math.max(mss, LEAST_SEGMENT), MAX_SEGMENT);
    this.#congestionWindow = 10 * this.#mss;
    this.#window = window;
    this.#windowSequence = sequence;
    this.#windowAcknowledgment = this.#initialSequence;
  }

  #sendSyn(): void {
    const isAnswer = this.#state === "syn-received";
    const flags = isAnswer ? TCP_FLAG.SYN | TCP_FLAG.ACK : TCP_FLAG.SYN;
    this.#isLinkFull = !this.#send(flags, this.#initialSequence, EMPTY, MAX_SEGMENT);
  }

  #receiveAnswer(segment: TcpSegment): void {
    const { flags, acknowledgment } = segment;
    if (!(flags & TCP_FLAG.ACK)) return;
    if (acknowledgment !== this.#next) {
      // An answer to another connection, of before this one.
      if (!(flags & TCP_FLAG.RST)) this.#send(TCP_FLAG.RST, acknowledgment);
      return;
    }
    if (flags & TCP_FLAG.RST) return this.#close(true);
    if (!(flags & TCP_FLAG.SYN)) return;
    this.#synchronize(segment);
    this.#open();
    this.#acknowledge();
  }

  #open(): void {
    this.#state = "open";
    this.#unacknowledged = this.#next;
    this.#unanswered = 0;
    this.#timeout = FIRST_TIMEOUT;
    this.#options.onOpen?.();
    this.#sendData();
    this.#arm(true);
  }

  /** Takes what a segment acknowledges, and its window; tells whether the rest of the segment counts. */
  #takeAcknowledgment({ sequence, acknowledgment, window, flags, payload }: TcpSegment): boolean {
    const acknowledged = acknowledgment - this.#unacknowledged | 0;
    const inFlight = this.#highest - this.#unacknowledged | 0;
    if (this.#state === "syn-received") {
      if (acknowledged !== 1) {
        if (acknowledged > 1) this.#send(TCP_FLAG.RST, acknowledgment);
        return false;
      }
      this.#window = window;
      this.#open();
    } else if (acknowledged > inFlight) {
      this.#acknowledge();
      return false;
    } else if (acknowledged > 0) {
      this.#advance(acknowledged);
    } else if (
      acknowledged === 0 && inFlight > 0 && payload.length === 0 && !(flags & TCP_FLAG.FIN) &&
      window === this.#window
    ) {
      this.#duplicates++;
      if (this.#duplicates === 3 && this.#recovery === undefined) {
        this.#slowStartThreshold = this.#congestionWindow = Math.max(inFlight / 2, 2 * this.#mss);
        this.#recovery = this.#highest;
        this.#sendFirst();
      }
    }
    this.#unanswered = 0;
    // Older segments have older windows.
    const age = sequence - this.#windowSequence | 0;
    if (age > 0 || age === 0 && (acknowledgment - this.#windowAcknowledgment | 0) >= 0) {
      this.#window = window;
      this.#windowSequence = sequence;
      this.#windowAcknowledgment = acknowledgment;
    }
    return true;
  }

  #advance(count: number): void {
    // Behind all bytes there is the FIN.
    const isEnd = count > this.#output.length;
    this.#output.consume(isEnd ? count - 1 : count);
    this.#unacknowledged = this.#unacknowledged + count >>> 0;
    if ((this.#next - this.#unacknowledged | 0) < 0) this.#next = this.#unacknowledged;
    this.#duplicates = 0;
    this.#timeout = this.#measure();
    if (this.#recovery !== undefined) {
      // Less than all means that another segment was lost (RFC 6582).
      if ((this.#unacknowledged - this.#recovery | 0) < 0) this.#sendFirst();
      else this.#recovery = undefined;
    } else {
      this.#congestionWindow += this.#congestionWindow < this.#slowStartThreshold
        ? Math.min(count, 2 * this.#mss)
        : this.#mss * this.#mss / this.#congestionWindow;
      this.#congestionWindow = Math.min(this.#congestionWindow, BUFFER_SIZE);
    }
    if (isEnd) {
      this.#isEndAcknowledged = true;
      this.#output.release();
      this.#endIfOver();
    }
    this.#wakeWriter();
  }

  /** Takes the measure of the round trip time, and tells how long to wait for an answer. */
  #measure(): number {
    if (this.#timed && (this.#unacknowledged - this.#timed.sequence | 0) > 0) {
      const taken = this.#clock.now() - this.#timed.since;
      this.#timed = undefined;
      if (this.#roundTrip === undefined) {
        this.#roundTrip = taken;
        this.#variation = taken / 2;
      } else {
        this.#variation += (Math.abs(this.#roundTrip - taken) - this.#variation) / 4;
        this.#roundTrip += (taken - this.#roundTrip) / 8;
      }
    }
    if (this.#roundTrip === undefined) return FIRST_TIMEOUT;
    return Math.min(Math.max(this.#roundTrip + 4 * this.#variation, LEAST_TIMEOUT), LONGEST_TIMEOUT);
  }

  #takeData({ sequence, payload, flags }: TcpSegment): void {
    const isEnd = (flags & TCP_FLAG.FIN) !== 0;
    const start = sequence - this.#expected | 0;
    const end = start + payload.length;
    const free = this.#input.free;
    if (payload.length === 0 && !isEnd) {
      // A question whether this end is still there.
      if (start < 0) this.#acknowledge();
      return;
    }
    if (this.#isPeerEnded || end < 0 || end === 0 && !isEnd || start > 0 && start >= free) {
      return this.#acknowledge();
    }
    if (isEnd && end <= free) this.#peerEnd ??= this.#expected + end >>> 0;
    const limit = this.#peerEnd === undefined ? free : Math.min(free, this.#peerEnd - this.#expected | 0);
    const from = Math.max(start, 0);
    const data = payload.subarray(from - start, Math.max(limit, from) - start);
    if (from > 0) {
      if (data.length > 0 && this.#remember(from, data.length)) this.#input.writeAt(from, data);
      // The peer learns of the gap by the repeated acknowledgment.
      return this.#acknowledge();
    }
    this.#input.writeAt(0, data);
    this.#expect(data.length);
    for (let index = 0; index < this.#pieces.length;) {
      const piece = this.#pieces[index]!;
      if ((piece.start - this.#expected | 0) > 0) {
        index++;
        continue;
      }
      this.#pieces.splice(index, 1);
      this.#expect(Math.max(piece.end - this.#expected | 0, 0));
      index = 0;
    }
    if (this.#peerEnd === this.#expected) {
      this.#expected = this.#expected + 1 >>> 0;
      this.#isPeerEnded = true;
      this.#acknowledge();
      this.#endIfOver();
    } else if (data.length < payload.length) {
      this.#acknowledge();
    } else {
      this.#acknowledgeSoon();
    }
    this.#readable?.resolve();
    this.#readable = undefined;
  }

  #expect(count: number): void {
    this.#input.commit(count);
    this.#expected = this.#expected + count >>> 0;
  }

  /** Keeps track of a piece beyond a gap; tells whether there was room for that. */
  #remember(offset: number, size: number): boolean {
    const start = this.#expected + offset >>> 0;
    const end = start + size >>> 0;
    for (const piece of this.#pieces) {
      if ((start - piece.end | 0) > 0 || (piece.start - end | 0) > 0) continue;
      if ((start - piece.start | 0) < 0) piece.start = start;
      if ((end - piece.end | 0) > 0) piece.end = end;
      return true;
    }
    if (this.#pieces.length >= MAX_PIECES) return false;
    this.#pieces.push({ start, end });
    return true;
  }

  /** Sends what the windows allow. */
  #sendData(): void {
    if (this.#state !== "open") return;
    this.#isLinkFull = false;
    for (;;) {
      const sent = this.#next - this.#unacknowledged | 0;
      const waiting = this.#output.length - sent;
      if (waiting > 0) {
        const allowed = Math.min(this.#window, Math.floor(this.#congestionWindow)) - sent;
        const size = Math.min(waiting, allowed, this.#mss);
        // What the window would cut into small segments waits for it to open.
        if (size <= 0 || sent > 0 && size < Math.min(waiting, this.#mss)) return;
        if (!this.#sendBytes(sent, size)) return;
      } else if (this.#isEnding && waiting === 0 && !this.#isEndAcknowledged) {
        if (!this.#sent(this.#send(TCP_FLAG.FIN | TCP_FLAG.ACK, this.#next), 1)) return;
      } else {
        return;
      }
    }
  }

  #sendBytes(offset: number, size: number): boolean {
    const payload = this.#output.peek(offset, size);
    const isLast = offset + payload.length === this.#output.length;
    const flags = isLast ? TCP_FLAG.ACK | TCP_FLAG.PSH : TCP_FLAG.ACK;
    return this.#sent(this.#send(flags, this.#next, payload), payload.length);
  }

  /** Counts what was sent, or waits for the link. */
  #sent(isSent: boolean, count: number): boolean {
    this.#isLinkFull = !isSent;
    if (!isSent) return false;
    this.#linkRetry = LINK_RETRY;
    const isNew = this.#next === this.#highest;
    if (isNew) this.#timed ??= { sequence: this.#next, since: this.#clock.now() };
    this.#next = this.#next + count >>> 0;
    if ((this.#next - this.#highest | 0) > 0) this.#highest = this.#next;
    return true;
  }

  /** Sends the first segment again that is not acknowledged. */
  #sendFirst(): void {
    this.#timed = undefined;
    const payload = this.#output.peek(0, Math.min(this.#highest - this.#unacknowledged | 0, this.#mss));
    if (payload.length > 0) this.#send(TCP_FLAG.ACK, this.#unacknowledged, payload);
    else if (this.#isEnding) this.#send(TCP_FLAG.FIN | TCP_FLAG.ACK, this.#unacknowledged);
  }

  /** The last sequence number that the peer takes: the byte that asks a closed window lies beyond it. */
  get #acceptable(): number {
    // The handshake is no part of any window.
    if (this.isOpening) return this.#highest;
    const inFlight = this.#highest - this.#unacknowledged | 0;
    return this.#unacknowledged + Math.min(inFlight, this.#window) >>> 0;
  }

  #acknowledge(): void {
    this.#send(TCP_FLAG.ACK, this.#acceptable);
  }

  /** Segments that come at once get one acknowledgment. */
  #acknowledgeSoon(): void {
    if (this.#isAcknowledgmentDue) return;
    this.#isAcknowledgmentDue = true;
    queueMicrotask(() => {
      if (this.#isAcknowledgmentDue && this.#state !== "closed") this.#acknowledge();
    });
  }

  #offerable(): number {
    return Math.min(this.#input.free, MAX_WINDOW);
  }

  #send(flags: number, sequence: number, payload: Uint8Array = EMPTY, mss?: number): boolean {
    const isAcknowledging = (flags & TCP_FLAG.ACK) !== 0;
    const window = this.#offerable();
    if (isAcknowledging) {
      this.#isAcknowledgmentDue = false;
      this.#offered = this.#expected + window >>> 0;
    }
    const { localPort: sourcePort, remotePort: destinationPort } = this.#options;
    const acknowledgment = isAcknowledging ? this.#expected : 0;
    return this.#options.send({
      sourcePort,
      destinationPort,
      sequence,
      acknowledgment,
      flags,
      window,
      mss,
      payload,
    });
  }

  #endIfOver(): void {
    if (!this.#isPeerEnded || !this.#isEndAcknowledged || this.#state !== "open") return;
    // As long as somebody has to take bytes, it counts as a connection.
    if (this.#input.length > 0) return;
    this.#state = "time-wait";
    this.#arm();
  }

  #arm(isRestart = false): void {
    if (this.#state === "closed" || this.#state === "idle") return;
    const kind = this.#state === "time-wait"
      ? "time-wait"
      : this.#isLinkFull
      ? "link"
      : this.#highest !== this.#unacknowledged || this.#output.length > 0
      ? "answer"
      : "keep-alive";
    if (kind === this.#timerKind && !isRestart) return;
    this.#timerKind = kind;
    const delay = {
      "time-wait": TIME_WAIT,
      link: this.#linkRetry,
      answer: this.#timeout,
      "keep-alive": this.#unanswered === 0 ? KEEP_ALIVE : LONGEST_TIMEOUT,
    }[kind];
    this.#deadline = this.#clock.now() + delay;
    // A timer that fires too early is cheaper than a new one for each segment.
    if (this.#firesAt <= this.#deadline) return;
    this.#setTimer(delay);
  }

  #setTimer(delay: number): void {
    this.#cancelTimer?.();
    this.#firesAt = this.#clock.now() + delay;
    this.#cancelTimer = this.#clock.after(delay, () => {
      this.#cancelTimer = undefined;
      this.#firesAt = Infinity;
      const rest = this.#deadline - this.#clock.now();
      if (rest > 0) return this.#setTimer(rest);
      this.#expire();
      this.#arm(true);
    });
  }

  #expire(): void {
    if (this.#state === "time-wait") return this.#close(false);
    if (this.#state !== "open") {
      if (this.#clock.now() >= this.#giveUpAt) return this.abort();
      if (this.#timerKind === "link") this.#waitForLink();
      else this.#timeout *= 2;
      return this.#sendSyn();
    }
    if (this.#timerKind === "link") {
      this.#waitForLink();
      return this.#sendData();
    }
    this.#unanswered++;
    if (this.#unanswered > MAX_UNANSWERED) return this.abort();
    if (this.#timerKind === "keep-alive") {
      // An old sequence number makes the peer answer.
      this.#send(TCP_FLAG.ACK, this.#unacknowledged - 1 >>> 0);
      return;
    }
    this.#timeout = Math.min(this.#timeout * 2, LONGEST_TIMEOUT);
    this.#timed = undefined;
    this.#recovery = undefined;
    const inFlight = this.#highest - this.#unacknowledged | 0;
    this.#slowStartThreshold = Math.max(inFlight / 2, 2 * this.#mss);
    this.#congestionWindow = this.#mss;
    this.#next = this.#unacknowledged;
    // A closed window is asked by one byte whether it has opened.
    if (this.#window === 0 && this.#output.length > 0) {
      this.#send(TCP_FLAG.ACK, this.#next, this.#output.peek(0, 1));
      if (inFlight === 0) this.#highest = this.#next + 1 >>> 0;
    } else {
      this.#sendData();
    }
  }

  #waitForLink(): void {
    this.#linkRetry = Math.min(this.#linkRetry * 2, LONGEST_LINK_RETRY);
  }

  #wakeWriter(): void {
    this.#writable?.resolve();
    this.#writable = undefined;
  }

  #close(isAborted: boolean): void {
    this.#state = "closed";
    this.#isAborted = isAborted;
    this.#cancelTimer?.();
    this.#cancelTimer = undefined;
    if (isAborted) this.#input.release();
    this.#output.release();
    this.#pieces = [];
    this.#readable?.resolve();
    this.#readable = undefined;
    this.#wakeWriter();
    this.#options.onClose?.();
  }
}

/** Bytes in a circle. It takes no memory before its first use. */
class RingBuffer {
  readonly #size: number;
  #bytes: Uint8Array<ArrayBuffer> = EMPTY;
  #start = 0;
  #length = 0;

  constructor(size: number) {
    this.#size = size;
  }

  get length(): number {
    return this.#length;
  }

  get free(): number {
    return this.#size - this.#length;
  }

  /** Gives its first bytes: all up to where the circle closes. */
  readable(): Uint8Array<ArrayBuffer> {
    return this.peek(0, this.#length);
  }

  /** Gives bytes in it; fewer where the circle closes. */
  peek(offset: number, size: number): Uint8Array<ArrayBuffer> {
    const from = (this.#start + offset) % this.#size;
    return this.#bytes.subarray(from, from + Math.min(size, this.#length - offset));
  }

  /** Gives room behind its bytes, up to where the circle closes. */
  writable(): Uint8Array<ArrayBuffer> {
    this.#allocate();
    const from = (this.#start + this.#length) % this.#size;
    return this.#bytes.subarray(from, from + this.free);
  }

  /** Writes bytes beyond those in it, which {@linkcode commit} makes part of it. */
  writeAt(offset: number, data: Uint8Array): void {
    if (data.length === 0) return;
    this.#allocate();
    const from = (this.#start + this.#length + offset) % this.#size;
    const first = Math.min(data.length, this.#size - from);
    this.#bytes.set(data.subarray(0, first), from);
    this.#bytes.set(data.subarray(first), 0);
  }

  commit(count: number): void {
    this.#length += count;
  }

  consume(count: number): void {
    this.#start = (this.#start + count) % this.#size;
    this.#length -= count;
  }

  /** Gives the memory back, with all that is in it. */
  release(): void {
    this.#bytes = EMPTY;
    this.#start = this.#length = 0;
  }

  #allocate(): void {
    if (this.#bytes.length === 0) this.#bytes = new Uint8Array(this.#size);
  }
}
