/**
 * What a user-space network's process and its clients tell each other: lines of JSON on a Unix socket. Each request gets
 * one answer; one that was refused is `{"error": WHY}`.
 *
 * ```text
 * {"attach": {"machine", "nic", "mac", "ip", "hostname", "forwards"}}   {"frames": PATH}
 * {"forwards": [...]}                                                   {}
 * {"status": {}}                                                        {"cidr", "gateway", "dns", "nat", "clients"}
 * ```
 *
 * A NIC is attached as long as its connection lives. Its frames go through the socket of that path, as
 * {@linkcode FrameStream} has them.
 *
 * @module
 */

import { join } from "node:path";
import { MachineError } from "../errors.ts";

/** Most bytes of a line. */
const MAX_LINE = 2 ** 20;
const READ_SIZE = 16_384;

/** A network as its process serves it. */
export interface UserNetworkSpec {
  /** Network with prefix length, such as `10.20.0.0/24`. */
  readonly cidr: string;
  /** Address of the gateway, which the process is itself. */
  readonly gateway: string;
  /** Address where guests ask for names. */
  readonly dns: string;
  /** Whether guests reach the outside, as the user whom the process belongs to. */
  readonly nat: boolean;
}

/** A port of the host that leads to a NIC. */
export interface NicForward {
  /** Protocol. */
  readonly protocol: "tcp" | "udp";
  /** IPv4 address of the host to listen on. */
  readonly address: string;
  /** Port on the host. */
  readonly host: number;
  /** Port in the guest. */
  readonly guest: number;
}

/** A NIC that joins a network. */
export interface NicAttachment {
  /** Identity of its machine. */
  readonly machine: string;
  /** Name of the NIC. */
  readonly nic: string;
  /** Ethernet address, such as `02:00:00:00:00:01`. */
  readonly mac: string;
  /** IPv4 address in the network. */
  readonly ip: string;
  /** Name of the guest. */
  readonly hostname: string;
  /** Ports of the host that lead to it. */
  readonly forwards: readonly NicForward[];
}

/** How a network's process is. */
export interface UserNetworkStatus extends UserNetworkSpec {
  /** How many connections it has, with the one that asks. */
  readonly clients: number;
}

/** Paths of a network's files, all in its folder. */
export interface UserNetworkFiles {
  /** The folder. */
  readonly folder: string;
  /** Lock of those who start the process. */
  readonly lock: string;
  /** Lock that the process holds while it lives. */
  readonly processLock: string;
  /** Tells who the process is. */
  readonly run: string;
  /** Socket for requests. */
  readonly control: string;
  /** What the process prints. */
  readonly log: string;
}

/**
 * Names the files of a network.
 *
 * @param folder Its folder
 * @returns The paths
 */
export function userNetworkFiles(folder: string): UserNetworkFiles {
  return {
    folder,
    lock: join(folder, "lock"),
    processLock: join(folder, "process.lock"),
    run: join(folder, "run.json"),
    control: join(folder, "control.sock"),
    log: join(folder, "network.log"),
  };
}

/** A connection that carries lines of JSON. */
export class JsonLines implements Disposable {
  readonly #connection: Deno.Conn;
  readonly #decoder = new TextDecoder();
  readonly #buffer = new Uint8Array(READ_SIZE);
  #text = "";
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
   * Reads the next line.
   *
   * @returns Its value; undefined where the connection has ended
   * @throws {MachineError} If it is no JSON, or too long
   */
  async read(): Promise<unknown> {
    let searched = 0;
    while (true) {
      const end = this.#text.indexOf("\n", searched);
      if (end >= 0) {
        const line = this.#text.slice(0, end);
        this.#text = this.#text.slice(end + 1);
        return parse(line);
      }
      searched = this.#text.length;
      if (searched > MAX_LINE) {
        throw new MachineError(`Cannot take a line of more than ${MAX_LINE} characters`);
      }
      const count = await this.#connection.read(this.#buffer).catch(() => null);
      if (count === null) return undefined;
      this.#text += this.#decoder.decode(this.#buffer.subarray(0, count), { stream: true });
    }
  }

  /**
   * Writes a line.
   *
   * @param value Its value
   * @throws {Error} If the peer has left
   */
  async write(value: unknown): Promise<void> {
    const bytes = new TextEncoder().encode(`${JSON.stringify(value)}\n`);
    for (let at = 0; at < bytes.length;) at += await this.#connection.write(bytes.subarray(at));
  }

  /** Closes the connection. */
  [Symbol.dispose](): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#connection.close();
  }
}

function parse(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch (cause) {
    throw new MachineError(`Cannot take a line that is not JSON: ${(cause as Error).message}`, { cause });
  }
}
