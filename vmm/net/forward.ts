/**
 * Ports of the host that lead to guests.
 *
 * @module
 */

import { createSocket, type Socket as Datagrams } from "node:dgram";
import { once } from "node:events";
import { connect, createServer, isIPv6, type Socket } from "node:net";
import { clearTimeout, setTimeout } from "node:timers";
import { MachineError } from "../errors.ts";

/** Most connections of one port at once; more are turned away. */
const MAX_CONNECTIONS = 1024;
/** Most UDP peers of one port at once; the one that was silent longest makes way for a new one. */
const MAX_FLOWS = 512;
/** Most datagrams of one port on their way out; more are lost, as in any full queue. */
const MAX_SENDING = 256;
/** How long a UDP peer may be silent, in milliseconds. */
const FLOW_TIMEOUT = 60_000;
/** How long what was read of `resolv.conf` counts, in milliseconds. */
const RESOLVER_LIFETIME = 5000;
const DNS_PORT = 53;

/** A port of the host that leads to a guest. */
export interface PortForward {
  /** Protocol. */
  readonly protocol: "tcp" | "udp";
  /** Address of the host to listen on. */
  readonly address: string;
  /** Port on the host. */
  readonly host: number;
  /** Port in the guest. */
  readonly guest: number;
  /** Address of the guest; looked at anew for each connection. */
  readonly guestIp: string;
  /** Whether other processes may serve the same port, and take over when this one ends. */
  readonly isShared?: boolean;
}

/** A port that is listened on. */
export interface Listener {
  /** Where it leads; may change, which moves UDP peers there, and leaves TCP connections where they are. */
  forward: PortForward;
  /** Ends it with its connections; the port is free when this is done. */
  close(): void | Promise<void>;
}

/** How datagrams of one peer reach a guest. */
export interface GuestDatagrams {
  /**
   * Sends one.
   *
   * @param data What it carries
   */
  send(data: Uint8Array): void;
  /** Ends it. */
  close(): void;
}

/**
 * Opens the way of one peer's datagrams to a guest.
 *
 * @param forward The guest's address and port
 * @param onAnswer Takes what the guest answers
 * @param onEnd Called if it can be used no more
 * @returns The way; nothing if there are too many
 */
export type OpenDatagrams = (
  forward: PortForward,
  onAnswer: (data: Uint8Array) => void,
  onEnd: () => void,
) => GuestDatagrams | undefined;

/** Sends a datagram to a port of an address. The data are the socket's from then on. */
export type SendDatagram = (socket: Datagrams, data: Uint8Array, port: number, address: string) => void;

/** Port forwards that can be changed while they work. */
export class PortForwards implements Disposable {
  readonly #listeners = new Map<string, Listener>();
  readonly #listen: (forward: PortForward) => Promise<Listener>;
  #last: Promise<void> = Promise.resolve();

  /**
   * Forwards nothing yet.
   *
   * @param listen Listens on a port; leads to guests that the host reaches by their address unless told
   */
  constructor(listen: (forward: PortForward) => Promise<Listener> = listenForHost) {
    this.#listen = listen;
  }

  /**
   * Makes the forwards be these: what is no more in the list ends with its connections, what is new begins, and what has
   * another guest leads new connections and all UDP peers there.
   *
   * @param forwards All forwards
   * @throws {MachineError} If a port cannot be had; those before it in the list work then
   */
  set(forwards: readonly PortForward[]): Promise<void> {
    const done = this.#last.then(() => this.#set(forwards));
    this.#last = done.catch(() => {});
    return done;
  }

  /** Ends them all. */
  [Symbol.dispose](): void {
    for (const listener of this.#listeners.values()) void listener.close();
    this.#listeners.clear();
  }

  async #set(forwards: readonly PortForward[]): Promise<void> {
    const wanted = new Map(forwards.map((each) => [`${each.protocol} ${each.address} ${each.host}`, each]));
    for (const [key, listener] of this.#listeners) {
      if (wanted.has(key)) continue;
      this.#listeners.delete(key);
      await listener.close();
    }
    for (const [key, forward] of wanted) {
      const listener = this.#listeners.get(key);
      if (listener) listener.forward = forward;
      else this.#listeners.set(key, await this.#begin(forward));
    }
  }

  async #begin(forward: PortForward): Promise<Listener> {
    try {
      return await this.#listen(forward);
    } catch (cause) {
      const { address, host, guest } = forward;
      throw new MachineError(
        `Cannot forward port ${host} of ${address} to port ${guest} of the guest as ` +
          explain(cause, forward),
        { cause },
      );
    }
  }
}

/**
 * Makes the forwards that let guests ask the host's name server: the first one of `resolv.conf`, which may change.
 *
 * @param address Address that guests ask
 * @param path Path of `resolv.conf`
 * @returns One forward for each protocol
 */
export function dnsForwards(address: string, path?: string): PortForward[] {
  const resolver = hostResolver(path);
  return (["udp", "tcp"] as const).map((protocol) => ({
    protocol,
    address,
    host: DNS_PORT,
    guest: DNS_PORT,
    get guestIp() {
      return resolver();
    },
    isShared: true,
  }));
}

/**
 * Finds the host's name server: the first one of `resolv.conf`, which may change.
 *
 * @param path Path of `resolv.conf`
 * @returns Tells its address
 */
export function hostResolver(path = "/etc/resolv.conf"): () => string {
  // Without a file, or where it names none, it is this one (resolv.conf(5)).
  let server = "127.0.0.1";
  let end = -Infinity;
  const resolver = () => {
    if (performance.now() < end) return server;
    end = performance.now() + RESOLVER_LIFETIME;
    try {
      server = /^\s*nameserver\s+(\S+)/m.exec(Deno.readTextFileSync(path))?.[1] ?? server;
    } catch {
      // It may be replaced just now, or closed to a process that was locked in since: the last one counts.
    }
    return server;
  };
  resolver();
  return resolver;
}

function listenForHost(forward: PortForward): Promise<Listener> {
  if (forward.protocol === "tcp") return listenTcp(forward);
  const send = limitedSender();
  return listenUdp(forward, ({ guest, guestIp }, onAnswer, onEnd) => {
    // The guest sees each peer as a port of the host of its own.
    const socket = openUdp(guestIp);
    const guestAddress = canonicalAddress(guestIp);
    socket.on("error", onEnd);
    socket.on("message", (data, { address, port }) => {
      // Anybody may send to this port of the host; only the guest may answer.
      if (canonicalAddress(address) === guestAddress && port === guest) onAnswer(data);
    });
    return { send: (data) => send(socket, data, guest, guestIp), close: () => void socket.close() };
  });
}

function explain(error: unknown, { address, host }: PortForward): string {
  switch ((error as { code?: string }).code) {
    case "EADDRINUSE":
      return `port ${host} of ${address} is in use: choose another host port, or end what uses it`;
    case "EADDRNOTAVAIL":
    case "EINVAL":
      return `the host has no address ${address}: choose one that it has`;
    case "EACCES":
      return `this user may not listen on port ${host}: choose a host port from 1024`;
    default:
      return error instanceof Error ? error.message : String(error);
  }
}

async function listenTcp(forward: PortForward): Promise<Listener> {
  const sockets = new Set<Socket>();
  const server = createServer({ allowHalfOpen: true, keepAlive: true, noDelay: true }, (client) => {
    const { guest, guestIp } = listener.forward;
    const target = connect({
      host: guestIp,
      port: guest,
      allowHalfOpen: true,
      keepAlive: true,
      noDelay: true,
    });
    for (const [one, other] of [[client, target], [target, client]] as const) {
      sockets.add(one);
      one.on("error", () => other.destroy());
      one.on("close", () => sockets.delete(one));
      // Waits for the slower end, and passes on that one end has no more to say.
      one.pipe(other);
    }
  });
  server.maxConnections = MAX_CONNECTIONS;
  const listener: Listener = {
    forward,
    close() {
      server.close();
      for (const socket of sockets) socket.destroy();
    },
  };
  server.listen({ host: forward.address, port: forward.host, reusePort: forward.isShared ?? false });
  await once(server, "listening");
  server.on("error", () => {});
  return listener;
}

interface Flow extends GuestDatagrams {
  readonly timer: NodeJS.Timeout;
}

/**
 * Listens on a UDP port of the host.
 *
 * @param forward The port
 * @param open Opens the way of each peer to the guest
 * @returns The listener
 */
export async function listenUdp(forward: PortForward, open: OpenDatagrams): Promise<Listener> {
  const socket = openUdp(forward.address, forward.isShared);
  const flows = new Map<string, Flow>();
  const answer = limitedSender();
  const end = (key: string) => {
    const flow = flows.get(key);
    if (!flow) return;
    flows.delete(key);
    clearTimeout(flow.timer);
    flow.close();
  };
  const begin = (
    key: string,
    client: { readonly address: string; readonly port: number },
  ): Flow | undefined => {
    for (const oldest of flows.keys()) {
      if (flows.size < MAX_FLOWS) break;
      end(oldest);
    }
    const onAnswer = (data: Uint8Array) => {
      if (flows.get(key) !== flow) return;
      flow?.timer.refresh();
      answer(socket, data, client.port, client.address);
    };
    const datagrams = open(listener.forward, onAnswer, () => end(key));
    const flow = datagrams && { ...datagrams, timer: setTimeout(() => end(key), FLOW_TIMEOUT) };
    return flow;
  };
  let current = forward;
  const listener: Listener = {
    get forward() {
      return current;
    },
    set forward(next) {
      const isMoved = next.guest !== current.guest || next.guestIp !== current.guestIp;
      current = next;
      // A peer that never falls silent would reach the former guest for ever.
      for (const key of isMoved ? [...flows.keys()] : []) end(key);
    },
    close() {
      socket.close();
      for (const key of [...flows.keys()]) end(key);
    },
  };
  socket.on("message", (data, client) => {
    const key = `${client.address} ${client.port}`;
    const flow = flows.get(key) ?? begin(key, client);
    if (!flow) return;
    // Behind all others, it is the last one to make way.
    flows.delete(key);
    flows.set(key, flow);
    flow.timer.refresh();
    flow.send(data);
  });
  try {
    socket.bind(forward.host, forward.address);
    await once(socket, "listening");
  } catch (error) {
    socket.close();
    throw error;
  }
  socket.on("error", () => {});
  return listener;
}

/**
 * Makes a function that sends datagrams, and loses those that slow sockets would let pile up.
 *
 * @returns The function; all that it sends counts together
 */
export function limitedSender(): SendDatagram {
  let sending = 0;
  const counts = new WeakMap<Datagrams, number>();
  const count = (socket: Datagrams, change: number) => {
    sending += change;
    counts.set(socket, (counts.get(socket) ?? 0) + change);
  };
  return (socket, data, port, address) => {
    if (sending >= MAX_SENDING) return;
    // A socket that closes never tells what became of the datagrams that it still had.
    if (!counts.has(socket)) {
      socket.once("close", () => {
        sending -= counts.get(socket) ?? 0;
        counts.delete(socket);
      });
    }
    count(socket, 1);
    socket.send(data, port, address, () => {
      if (counts.has(socket)) count(socket, -1);
    });
  };
}

/**
 * Writes an address as it is compared: IPv6 has many ways to write one, and answers come without a zone.
 *
 * @param address The address
 * @returns The same text for the same address, to compare only
 */
export function canonicalAddress(address: string): string {
  return isIPv6(address) ? new URL(`http://[${address.replace(/%.*/, "")}]/`).hostname : address;
}

/**
 * Makes a UDP socket for an address of either family.
 *
 * @param address The address
 * @param reuseAddr Whether other processes may have the same port
 * @returns The socket, which is not bound yet
 */
export function openUdp(address: string, reuseAddr = false): Datagrams {
  return createSocket({ type: isIPv6(address) ? "udp6" : "udp4", reuseAddr });
}
