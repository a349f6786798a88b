/**
 * The consoles of a domain, each of which a Unix socket leads to: what the virtio console is to other machines.
 *
 * The first console is the kernel's. The guest's agent speaks by others: one is its control line, and two are each of the
 * data channels.
 *
 * @module
 */

import { Fd } from "../../ffi/mod.ts";
import { CONSOLE_INPUT_SIZE, CONSOLE_OUTPUT_SIZE, type ConsoleRing } from "../../ffi/xen/console_ring.ts";
import { ConsoleLog } from "../devices/console_log.ts";
import type { StreamListener, StreamSocket, StreamSockets } from "../devices/stream_sockets.ts";
import type { EventLoop } from "../event_loop.ts";
import type { GuestEndpoints } from "../guest/channel.ts";

/** Number of the kernel's console. */
export const KERNEL_CONSOLE = 0;
/** Number of the console that is the agent's control line. */
export const CONTROL_CONSOLE = 1;

/**
 * Finds the consoles of a data channel.
 *
 * @param channel The channel, from 0
 * @returns Number of the console that carries a command's input and output, and of the one for its error output
 */
export function channelConsoles(channel: number): { readonly data: number; readonly errors: number } {
  return { data: 2 + 2 * channel, errors: 3 + 2 * channel };
}

/**
 * What the guest reads on the console for error output when the client of the channel has left: a tty knows no end. The line
 * before may be half.
 */
const LEAVE = new TextEncoder().encode("\nleave\n");

/** The event channels of a process, as far as consoles need them. */
export interface EventChannels {
  /** Number of the descriptor; it has input where there are events. */
  readonly fd: number;
  /**
   * Takes the events.
   *
   * @returns The local ports that have one; they are told of again
   */
  take(): readonly number[];
  /**
   * Sends the guest an event.
   *
   * @param port The local port
   */
  notify(port: number): void;
}

/** What {@linkcode DomainConsoles} are given. */
export interface DomainConsolesOptions {
  /** Makes the sockets; its owner disposes it. */
  readonly sockets: StreamSockets;
  /** Sends events to the guest. */
  readonly eventChannels: Pick<EventChannels, "notify">;
  /** Socket of the kernel's console, and the file that gets all that is written there. */
  readonly console: { readonly socket: string; readonly log: string };
  /** Sockets of the agent; left out where there is none. */
  readonly channels?: GuestEndpoints;
  /** Takes words on what should not happen. */
  readonly warn: (message: string) => void;
}

/** How the guest's side of a console is reached. */
export interface ConsoleConnection {
  /** Its ring. */
  readonly ring: ConsoleRing;
  /** Local port of its event channel. */
  readonly port: number;
}

/** A client's use of a channel, by both of its sockets. It ends with the first that the client leaves. */
interface Visit {
  isOver: boolean;
  /** Whether the guest has written since it began: only then something there is to learn of its end. */
  hasSession: boolean;
}

interface Channel {
  visit: Visit;
  /** Whether the guest has yet to be told that the visit is over. */
  owesLeave: boolean;
  /** The console that the guest is told by. */
  errors: Console | undefined;
}

interface Console {
  readonly number: number;
  readonly listener: StreamListener;
  /** The channel that it is one half of. Its output waits for the client then, who else loses what it is too slow for. */
  readonly channel?: Channel;
  readonly log?: ConsoleLog;
  connection: ConsoleConnection | undefined;
  client: StreamSocket | undefined;
  /** The visit that the client is of. */
  visit?: Visit;
  /** Whether there may be input of the client. */
  canReceive: boolean;
  /** Whether the client sends no more, and all that it sent is with the guest. */
  hasEnded: boolean;
  /** Whether the client takes no more; it may have sent something before. */
  hasLeft: boolean;
  /** When it is served without anything having happened. */
  timer: ReturnType<typeof setTimeout> | undefined;
}

/**
 * Moves bytes between the consoles of a domain and the clients of their sockets. Sockets and clients outlast the rings.
 *
 * Nothing is kept in between: a guest waits that writes to a channel whose client does not read, and a client waits whose
 * guest does not read. What is written to a channel without a client is lost.
 */
export class DomainConsoles implements Disposable {
  readonly #options: DomainConsolesOptions;
  readonly #consoles: Console[] = [];
  readonly #byPort = new Map<number, Console>();
  readonly #buffer = new Uint8Array(CONSOLE_OUTPUT_SIZE);
  readonly #resources = new DisposableStack();

  private constructor(options: DomainConsolesOptions) {
    this.#options = options;
  }

  /**
   * Begins to take clients; the guest's side of each console is to be added.
   *
   * @param options Sockets, events and files
   * @returns The consoles
   * @throws {Error} If a socket or the log cannot be made
   */
  static async open(options: DomainConsolesOptions): Promise<DomainConsoles> {
    const consoles = new DomainConsoles(options);
    try {
      await consoles.#open();
    } catch (error) {
      consoles[Symbol.dispose]();
      throw error;
    }
    return consoles;
  }

  /**
   * Adds the guest's side of a console, or replaces it where the guest has connected anew: the page before is not used any
   * more then.
   *
   * @param number Number of the console
   * @param connection Its ring and event channel
   * @throws {RangeError} If no socket leads to a console of that number
   */
  add(number: number, connection: ConsoleConnection): void {
    const console = this.#consoles[number];
    if (!console) throw new RangeError(`Cannot connect the console ${number} as no socket leads to it`);
    this.#disconnect(console);
    console.connection = connection;
    // Whatever spoke by the ring before is gone.
    if (console.channel) console.channel.visit.hasSession = false;
    this.#byPort.set(connection.port, console);
    this.#serve(console);
  }

  /**
   * Takes what is left in a console's ring, and gives up the guest's side: its page is not used any more then.
   *
   * @param number Number of the console
   */
  remove(number: number): void {
    const console = this.#consoles[number];
    if (!console) return;
    this.#serve(console);
    this.#disconnect(console);
  }

  /**
   * Serves a console of which the guest has sent an event.
   *
   * @param port Local port of the event channel; one that is not known is let be
   */
  onEvent(port: number): void {
    const console = this.#byPort.get(port);
    if (console) this.#serve(console);
  }

  /** Ends all clients, and removes the sockets. */
  [Symbol.dispose](): void {
    for (const console of this.#consoles) {
      this.#disconnect(console);
      console.client?.[Symbol.dispose]();
      console.client = undefined;
    }
    this.#resources[Symbol.dispose]();
  }

  async #open(): Promise<void> {
    const { console, channels, warn } = this.#options;
    const log = this.#resources.use(new ConsoleLog(console.log, warn));
    await this.#listen(console.socket, { log });
    if (!channels) return;
    await this.#listen(channels.control, {});
    for (const [index, path] of channels.data.entries()) {
      const channel: Channel = {
        visit: { isOver: true, hasSession: false },
        // A process that served this guest before may have died with its clients.
        owesLeave: true,
        errors: undefined,
      };
      await this.#listen(path, { channel });
      channel.errors = await this.#listen(channels.errors[index]!, { channel });
    }
  }

  async #listen(path: string, parts: Pick<Console, "log" | "channel">): Promise<Console> {
    const listener = this.#resources.use(await this.#options.sockets.listen(path));
    const console: Console = {
      ...parts,
      number: this.#consoles.length,
      listener,
      connection: undefined,
      client: undefined,
      canReceive: false,
      hasEnded: false,
      hasLeft: false,
      timer: undefined,
    };
    this.#consoles.push(console);
    listener.onChange = () => this.#serve(console);
    // Some may have come already.
    this.#serve(console);
    return console;
  }

  #disconnect(console: Console): void {
    clearTimeout(console.timer);
    console.timer = undefined;
    if (!console.connection) return;
    this.#byPort.delete(console.connection.port);
    console.connection = undefined;
  }

  /** Moves what can be moved between a console and its client, and changes clients. */
  #serve(console: Console): void {
    if (!console.client) this.#adopt(console, console.listener.accept());
    this.#move(console);
    const { client, hasEnded, hasLeft, channel, connection } = console;
    if (!client || !(hasEnded || hasLeft)) return;
    const next = console.listener.accept();
    // What one sent before it left still goes to the guest for as long as nobody else waits. But of a channel's client, the
    // command is to end at once.
    if (!hasEnded && !channel && connection && !next) return;
    this.#dismiss(console);
    // Nor is what was written to it for the next client.
    this.#move(console);
    this.#adopt(console, next);
  }

  #adopt(console: Console, client: StreamSocket | undefined): void {
    if (!client) return;
    console.client = client;
    console.canReceive = true;
    console.hasEnded = console.hasLeft = false;
    client.onChange = (hasLeft) => {
      console.canReceive = true;
      console.hasLeft ||= hasLeft;
      this.#serve(console);
    };
    const { channel } = console;
    if (!channel) return;
    if (channel.visit.isOver) {
      channel.visit = { isOver: false, hasSession: false };
      // The next session ends the one before.
      channel.owesLeave = false;
    }
    console.visit = channel.visit;
  }

  #dismiss(console: Console): void {
    console.client?.[Symbol.dispose]();
    console.client = undefined;
    const { channel, visit } = console;
    if (!channel || !visit || visit.isOver) return;
    visit.isOver = channel.owesLeave = true;
    this.#payLeave(channel);
  }

  /**
   * Tells the guest that the client of a channel has left, once there is room, and something that it can concern. A session
   * that begins later skips it.
   */
  #payLeave(channel: Channel): void {
    const { errors } = channel;
    if (!errors?.connection || !channel.owesLeave || !channel.visit.hasSession) return;
    if (errors.connection.ring.room < LEAVE.length) return;
    channel.owesLeave = false;
    errors.connection.ring.write(LEAVE);
    this.#notify(errors);
  }

  #move(console: Console): void {
    const { connection, channel } = console;
    const taken = connection ? this.#takeOutput(console, connection.ring) : 0;
    const given = this.#giveInput(console, connection?.ring);
    if (taken + given > 0) this.#notify(console);
    if (!channel) return;
    if (taken > 0) channel.visit.hasSession = true;
    this.#payLeave(channel);
  }

  /** Takes what is in the ring: when the guest writes more, it sends another event. */
  #takeOutput(console: Console, ring: ConsoleRing): number {
    const bytes = this.#buffer.subarray(0, ring.peek(this.#buffer));
    console.log?.write(bytes);
    let taken = bytes.length;
    if (taken > 0 && console.client && !console.hasLeft) {
      const sent = console.client.send(bytes);
      if (sent < 0) console.hasLeft = true;
      else if (console.channel) taken = sent;
    }
    if (taken > 0) ring.consume(taken);
    return taken;
  }

  /** Gives the guest what there is room for: when it has taken some, it sends an event. */
  #giveInput(console: Console, ring: ConsoleRing | undefined): number {
    const { client } = console;
    let given = 0;
    while (client && console.canReceive) {
      if (given >= CONSOLE_INPUT_SIZE) {
        this.#serveLater(console);
        break;
      }
      const room = ring?.room ?? 0;
      if (room === 0) break;
      const bytes = this.#buffer.subarray(0, room);
      const received = client.receive(bytes);
      if (received > 0) {
        ring?.write(bytes.subarray(0, received));
        given += received;
      } else {
        console.canReceive = false;
        console.hasEnded = received < 0;
      }
    }
    return given;
  }

  #notify(console: Console): void {
    if (!console.connection) return;
    try {
      this.#options.eventChannels.notify(console.connection.port);
    } catch (error) {
      this.#disconnect(console);
      const reason = error instanceof Error ? error.message : String(error);
      this.#options.warn(
        `Cannot notify the guest of its console ${console.number} as ${reason}: it is served again when it connects anew`,
      );
    }
  }

  #serveLater(console: Console): void {
    console.timer ??= setTimeout(() => {
      console.timer = undefined;
      this.#serve(console);
    }, 0);
  }
}

/**
 * Serves consoles whenever the guest has sent events, and all else that a loop watches.
 *
 * @param eventChannels Where the events come from
 * @param consoles The consoles
 * @param loop Watches for events; best the one that watches the sockets, too
 * @param signal Ends it
 */
export async function serveConsoles(
  eventChannels: EventChannels,
  consoles: DomainConsoles,
  loop: EventLoop,
  signal: AbortSignal,
): Promise<void> {
  // Only borrowed: it is closed by its owner.
  const fd = new Fd(eventChannels.fd, "event channels");
  const wake = () => loop.wake();
  signal.addEventListener("abort", wake);
  loop.watch(fd, () => {
    for (const port of eventChannels.take()) consoles.onEvent(port);
  });
  try {
    await loop.run(() => signal.aborted);
  } finally {
    loop.unwatch(fd);
    signal.removeEventListener("abort", wake);
  }
}
