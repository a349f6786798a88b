/**
 * A network of guests in user space: a switch, DHCP, and the gateway with NAT, in one process for all machines of the
 * network. It takes no right beyond an ordinary user's.
 *
 * @module
 */

import { join } from "node:path";
import {
  array,
  ipv4,
  number,
  object,
  oneOf,
  parseCidr,
  parseIpv4,
  type Schema,
  string,
} from "../../dsl/mod.ts";
import { equal } from "../../planner/mod.ts";
import { MachineError } from "../errors.ts";
import type { Log } from "../supervisor/log.ts";
import { DhcpServer } from "./dhcp.ts";
import { FrameStream } from "./frame_stream.ts";
import { endPasst, Uplink } from "./passt.ts";
import { Switch, type SwitchPort } from "./switch.ts";
import { UserNat } from "./user_nat.ts";
import {
  JsonLines,
  type NicAttachment,
  type NicForward,
  userNetworkFiles,
  type UserNetworkSpec,
  type UserNetworkStatus,
} from "./user_network_protocol.ts";

/** How long a network stays that nobody is connected to, in milliseconds. */
const IDLE_TIME = 10_000;
/** How long the end of a NIC is waited for that is in the way of a new one, in milliseconds. */
const PREDECESSOR_TIME = 5000;
/** Most connections for requests. */
const MAX_CLIENTS = 2048;
/** Most forwards of a NIC. */
const MAX_FORWARDS = 1024;
/** How long nothing is accepted after that failed, as for lack of descriptors, in milliseconds. */
const ACCEPT_PAUSE = 100;

const forwardsSchema: Schema<readonly NicForward[]> = array(object({
  protocol: oneOf("tcp", "udp"),
  address: ipv4(),
  host: number({ min: 1, max: 65_535, integer: true }),
  guest: number({ min: 1, max: 65_535, integer: true }),
}));

const attachmentSchema: Schema<NicAttachment> = object({
  machine: string({ pattern: /^[\w.-]{1,64}$/, description: "at most 64 letters, digits, `_`, `.` and `-`" }),
  nic: string({ pattern: /^[\w.-]{1,64}$/, description: "at most 64 letters, digits, `_`, `.` and `-`" }),
  mac: string({
    pattern: /^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$/,
    description: "a unicast Ethernet address",
  }),
  ip: ipv4(),
  hostname: string({ pattern: /^[A-Za-z0-9.-]{0,253}$/, description: "a host name" }),
  forwards: forwardsSchema,
});

/** What a {@linkcode UserNetwork} is made of. */
export interface UserNetworkOptions {
  /** The network. */
  readonly spec: UserNetworkSpec;
  /** Folder for its sockets. Nobody else may serve a network there. */
  readonly folder: string;
  /** Takes what happens. */
  readonly log: Pick<Log, "info" | "warn">;
}

/** A NIC that is attached. */
interface AttachedNic {
  readonly name: string;
  readonly attachment: NicAttachment;
  readonly gone: Promise<void>;
  readonly port: SwitchPort;
  /** Ports of the host that lead to it. */
  forwards: readonly NicForward[];
  /** Its own way to the outside, which has the forwards of TCP then. */
  uplink: Uplink | undefined;
  stream: FrameStream | undefined;
  isDetached: boolean;
  detach(): Promise<void>;
}

/** A network that serves its clients from when it is made until it is disposed. */
export class UserNetwork implements Disposable {
  /** Tells when it has come to its end, and why, in words. */
  readonly ended: Promise<string>;
  readonly #options: UserNetworkOptions;
  readonly #switch = new Switch();
  readonly #nat: UserNat;
  readonly #dhcp: DhcpServer;
  readonly #listener: Deno.UnixListener;
  readonly #clients = new Set<JsonLines>();
  readonly #nics = new Set<AttachedNic>();
  readonly #end: (reason: string) => void;
  #nextSocket = 0;
  #idleTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Begins to listen. Sockets that a process left which was killed are removed.
   *
   * @param options What it is made of
   */
  constructor(options: UserNetworkOptions) {
    const { folder, spec } = options;
    const { promise, resolve } = Promise.withResolvers<string>();
    this.ended = promise;
    this.#end = resolve;
    this.#options = options;
    for (const { name } of Deno.readDirSync(folder)) {
      if (name.endsWith(".sock")) Deno.removeSync(join(folder, name));
    }
    this.#nat = new UserNat({
      gateway: spec.gateway,
      dns: spec.dns,
      cidr: spec.cidr,
      isNatOpen: spec.nat,
      send: (frame) => port.receive(frame),
    });
    this.#dhcp = new DhcpServer({ mac: this.#nat.mac, ...spec });
    const port: SwitchPort = this.#switch.connect({
      lock: { macs: [this.#nat.mac] },
      send: (frame) => {
        const answer = this.#dhcp.answer(frame);
        if (answer) port.receive(answer);
        else this.#nat.receive(frame);
        return true;
      },
    });
    this.#listener = Deno.listen({ transport: "unix", path: userNetworkFiles(folder).control });
    void accept(this.#listener, (connection) => void this.#serve(connection));
    this.#watchIdle();
  }

  /**
   * Tells that it is to end.
   *
   * @param reason Why, in words
   */
  stop(reason: string): void {
    this.#end(reason);
  }

  /** Ends all that belongs to it. */
  [Symbol.dispose](): void {
    clearTimeout(this.#idleTimer);
    this.#listener.close();
    for (const client of this.#clients) client[Symbol.dispose]();
    for (const nic of this.#nics) void nic.detach();
    this.#nat[Symbol.dispose]();
    this.#end("it was disposed");
  }

  /** Without clients it ends after a while. */
  #watchIdle(): void {
    clearTimeout(this.#idleTimer);
    this.#idleTimer = this.#clients.size > 0
      ? undefined
      : setTimeout(() => this.#end("no machine has been attached for a while"), IDLE_TIME);
  }

  async #serve(connection: Deno.Conn): Promise<void> {
    using client = new JsonLines(connection);
    if (this.#clients.size >= MAX_CLIENTS) return;
    this.#clients.add(client);
    this.#watchIdle();
    const state: { nic?: AttachedNic } = {};
    try {
      for (let request; (request = await client.read()) !== undefined;) {
        await client.write(
          await this.#answer(request, state).catch((error: Error) => ({ error: error.message })),
        );
      }
    } catch (error) {
      // It says what nobody understands, or has left before it was answered.
      this.#options.log.warn(`a client is disconnected: ${(error as Error).message}`);
    } finally {
      await state.nic?.detach();
      this.#clients.delete(client);
      this.#watchIdle();
    }
  }

  async #answer(request: unknown, state: { nic?: AttachedNic }): Promise<unknown> {
    const [name, value, ...more] = Object.entries(request ?? {}).flat();
    if (more.length > 0) {
      throw new MachineError("Cannot do more than one thing at once: send one request a line");
    }
    switch (name) {
      case "attach": {
        if (state.nic) {
          throw new MachineError(
            `Cannot attach another NIC to the connection of ${state.nic.name}: open one for each`,
          );
        }
        const { nic, frames } = await this.#attach(check(attachmentSchema, value));
        state.nic = nic;
        return { frames };
      }
      case "forwards": {
        if (!state.nic) throw new MachineError("Cannot set forwards without a NIC: attach it first");
        await this.#changeForwards(state.nic, check(forwardsSchema, value));
        return {};
      }
      case "status":
        return { ...this.#options.spec, clients: this.#clients.size } satisfies UserNetworkStatus;
      default:
        throw new MachineError(`Cannot do "${name}": only attach, forwards and status are known here`);
    }
  }

  async #changeForwards(nic: AttachedNic, forwards: readonly NicForward[]): Promise<void> {
    refuseTooMany(forwards);
    if (nic.uplink && !equal(forwards.filter(isTcp), nic.forwards.filter(isTcp))) {
      this.#options.log.info(
        `${nic.name} leaves passt, which cannot change its forwards: the built-in NAT goes on`,
      );
      await this.#leaveUplink(nic);
    }
    nic.forwards = forwards;
    await this.#forward(nic);
  }

  /** Makes the NAT have those forwards that the uplink has not, and none of a NIC that has left. */
  async #forward({ attachment, forwards, uplink, isDetached }: AttachedNic): Promise<void> {
    const guestIp = attachment.ip;
    const ours = isDetached ? [] : uplink ? forwards.filter((each) => !isTcp(each)) : forwards;
    await this.#nat.setForwards(nameOf(attachment), ours.map((each) => ({ ...each, guestIp })));
  }

  /** Connects a NIC to the passt that waits for it, if one does. */
  async #findUplink(nic: AttachedNic): Promise<void> {
    const { folder, spec, log } = this.#options;
    if (!spec.nat) return;
    const { mac, ip } = nic.attachment;
    const uplink = await Uplink.connect(folder, {
      ...{ mac, ip, gateway: spec.gateway, nat: this.#nat },
      send: (frame) => void nic.stream?.send(frame),
    });
    if (!uplink) return;
    if (nic.isDetached) return uplink[Symbol.dispose]();
    nic.uplink = uplink;
    log.info(`${nic.name} reaches the outside through passt`);
    void uplink.ended.then(async () => {
      if (nic.uplink !== uplink) return;
      log.warn(`the passt of ${nic.name} is lost: the built-in NAT goes on`);
      await this.#leaveUplink(nic);
      await this.#forward(nic);
    }).catch((error: Error) => log.warn(error.message));
  }

  /** From now on the NAT does it; ports that passt had are free when this is done. */
  async #leaveUplink(nic: AttachedNic): Promise<void> {
    nic.uplink?.[Symbol.dispose]();
    nic.uplink = undefined;
    await endPasst(this.#options.folder, nic.attachment.ip);
  }

  async #attach(attachment: NicAttachment): Promise<{ nic: AttachedNic; frames: string }> {
    const { folder, spec, log } = this.#options;
    const { mac, ip, hostname, forwards } = attachment;
    const name = nameOf(attachment);
    refuseForeignAddress(spec, name, ip);
    refuseTooMany(forwards);
    await this.#waitForPredecessor(attachment);
    const gone = Promise.withResolvers<void>();
    const frames = join(folder, `${this.#nextSocket++}.sock`);
    let listener: Deno.UnixListener | undefined;
    const nic: AttachedNic = {
      name,
      attachment,
      gone: gone.promise,
      forwards,
      uplink: undefined,
      stream: undefined,
      isDetached: false,
      port: this.#switch.connect({
        lock: { macs: [mac], addresses: [ip] },
        send: (frame) => nic.stream?.send(frame) ?? false,
      }),
      detach: async () => {
        if (nic.isDetached) return;
        nic.isDetached = true;
        nic.port[Symbol.dispose]();
        nic.stream?.[Symbol.dispose]();
        // Whoever starts the next one waits until it is gone.
        nic.uplink?.[Symbol.dispose]();
        nic.uplink = undefined;
        this.#dhcp.delete(mac);
        this.#nat.release(ip);
        listener?.close();
        if (listener) await Deno.remove(frames).catch(() => {});
        await this.#forward(nic).catch((error: Error) => log.warn(error.message));
        this.#nics.delete(nic);
        gone.resolve();
        log.info(`${name} has left`);
      },
    };
    this.#nics.add(nic);
    try {
      this.#dhcp.set(mac, { ip, hostname });
      await this.#findUplink(nic);
      await this.#forward(nic);
      listener = Deno.listen({ transport: "unix", path: frames });
    } catch (error) {
      await nic.detach();
      throw error;
    }
    void accept(listener, (connection) => void this.#carry(nic, connection));
    log.info(`${name} is attached as ${ip}`);
    return { nic, frames };
  }

  /** A process that was killed leaves a connection whose end may be heard after its successor. */
  async #waitForPredecessor(attachment: NicAttachment): Promise<void> {
    const { mac, ip } = attachment;
    const name = nameOf(attachment);
    const limit = performance.now() + PREDECESSOR_TIME;
    while (true) {
      const other = [...this.#nics].find((each) =>
        each.name === name || each.attachment.mac === mac || each.attachment.ip === ip
      );
      if (!other) return;
      const left = limit - performance.now();
      if (left <= 0) {
        throw new MachineError(
          `Cannot attach ${name} as ${other.name} is attached as ${other.attachment.ip} with ${other.attachment.mac}: ` +
            (other.name === name ? "end the process that runs it" : "give each NIC addresses of its own"),
        );
      }
      let timer: ReturnType<typeof setTimeout> | undefined;
      await Promise.race([other.gone, new Promise((resolve) => timer = setTimeout(resolve, left))]);
      clearTimeout(timer);
    }
  }

  /** Who comes last is served: whoever connects again does so because the connection before is lost. */
  async #carry(nic: AttachedNic, connection: Deno.Conn): Promise<void> {
    nic.stream?.[Symbol.dispose]();
    using stream = nic.stream = new FrameStream(connection);
    try {
      await stream.receive((frame) => void (nic.uplink?.take(frame) || nic.port.receive(frame)));
    } catch (error) {
      this.#options.log.warn(`${nic.name} is cut off: ${(error as Error).message}`);
    }
    if (nic.stream === stream) nic.stream = undefined;
  }
}

/** Takes connections until the listener is closed. */
async function accept(
  listener: Deno.UnixListener,
  onConnection: (connection: Deno.Conn) => void,
): Promise<void> {
  while (true) {
    try {
      onConnection(await listener.accept());
    } catch (error) {
      if (error instanceof Deno.errors.BadResource || error instanceof Deno.errors.Interrupted) return;
      await new Promise((resolve) => setTimeout(resolve, ACCEPT_PAUSE));
    }
  }
}

function nameOf({ machine, nic }: NicAttachment): string {
  return `${machine}/${nic}`;
}

function check<T>(schema: Schema<T>, value: unknown): T {
  const result = schema.check(value, "", (field, reason) => {
    throw new MachineError(`Cannot use the request as ${field === "" ? "it is wrong" : field}: ${reason}`);
  });
  return result as T;
}

function isTcp({ protocol }: NicForward): boolean {
  return protocol === "tcp";
}

function refuseTooMany({ length }: readonly NicForward[]): void {
  if (length <= MAX_FORWARDS) return;
  throw new MachineError(`Cannot forward ${length} ports to one NIC: forward at most ${MAX_FORWARDS}`);
}

function refuseForeignAddress(spec: UserNetworkSpec, name: string, ip: string): void {
  const { base, size } = parseCidr(spec.cidr);
  const at = parseIpv4(ip) - base;
  if (at > 0 && at < size - 1 && ip !== spec.gateway && ip !== spec.dns) return;
  throw new MachineError(
    `Cannot attach ${name} as ${ip} in the network ${spec.cidr}: give it an address of a host, ` +
      `other than ${spec.gateway} and ${spec.dns}`,
  );
}
