/**
 * `/dev/xen/evtchn`: event channels, by which domains wake each other (Linux 6.1 `include/uapi/xen/evtchn.h`,
 * `drivers/xen/evtchn.c`).
 *
 * @module
 */

import { SysError } from "../errno.ts";
import { Fd, O_RDWR } from "../fd.ts";
import { check, libc } from "../libc.ts";
import { explainOpen } from "./privcmd.ts";

/** Requests to the device. */
export const EVTCHN = {
  BIND_VIRQ: 0x44500,
  BIND_INTERDOMAIN: 0x84501,
  BIND_UNBOUND_PORT: 0x44502,
  UNBIND: 0x44503,
  NOTIFY: 0x44504,
  RESET: 0x4505,
} as const;

/** Interrupts that Xen raises itself (Xen 4.17 `xen/include/public/xen.h`): one is that a domain has ended. */
export const VIRQ = { DOM_EXC: 3 } as const;

/** The device, as far as it is used. Calls throw a {@linkcode SysError} where they fail. */
export interface EventChannelDevice extends Disposable {
  /** Its descriptor. */
  readonly fd: number;
  /**
   * Makes a request.
   *
   * @param request Its number
   * @param words Its argument
   * @param name Its name, for messages
   * @returns What the device returns
   */
  request(request: number, words: readonly number[], name: string): number;
  /**
   * Reads ports.
   *
   * @param ports Takes them
   * @returns How many there were
   */
  read(ports: Uint32Array<ArrayBuffer>): number;
  /**
   * Writes ports.
   *
   * @param ports The ports
   */
  write(ports: Uint32Array<ArrayBuffer>): void;
}

const PATH = "/dev/xen/evtchn";
const O_NONBLOCK = 0o4000;
/** As many as fit into the page that the kernel reads and writes at once. */
const MAX_PORTS = 1024;

/** The event channels of this process. All are unbound with the descriptor, also when the process dies. */
export class EventChannels implements Disposable {
  readonly #device: EventChannelDevice;
  readonly #bound = new Set<number>();
  readonly #ports = new Uint32Array(MAX_PORTS);

  /**
   * Takes over a device.
   *
   * @param device The device
   */
  constructor(device: EventChannelDevice) {
    this.#device = device;
  }

  /**
   * Opens the device.
   *
   * @returns No event channels yet
   * @throws {Error} If this is not a domain of Xen, or this user may not
   */
  static open(): EventChannels {
    try {
      return new EventChannels(new Device());
    } catch (error) {
      throw explainOpen(PATH, "xen-evtchn", error);
    }
  }

  /** The descriptor: it has input for as long as there are events that {@linkcode EventChannels.take} has not taken. */
  get fd(): number {
    return this.#device.fd;
  }

  /** The local ports that are bound. */
  get bound(): ReadonlySet<number> {
    return this.#bound;
  }

  /**
   * Connects to a port that another domain, or whoever made it, has left open for this one.
   *
   * @param domid The other domain
   * @param port Its port
   * @returns The local port
   */
  bindInterdomain(domid: number, port: number): number {
    return this.#bind(EVTCHN.BIND_INTERDOMAIN, [domid, port], "BIND_INTERDOMAIN");
  }

  /**
   * Makes a port that another domain may connect to.
   *
   * @param domid The other domain
   * @returns The local port
   */
  bindUnbound(domid: number): number {
    return this.#bind(EVTCHN.BIND_UNBOUND_PORT, [domid], "BIND_UNBOUND_PORT");
  }

  /**
   * Takes an interrupt that Xen raises itself. Only one taker is possible in all of the system.
   *
   * @param virq The interrupt
   * @returns The local port
   */
  bindVirq(virq: number): number {
    return this.#bind(EVTCHN.BIND_VIRQ, [virq], "BIND_VIRQ");
  }

  /**
   * Gives up a port.
   *
   * @param port The local port
   */
  unbind(port: number): void {
    this.#device.request(EVTCHN.UNBIND, [port], "EVTCHN_UNBIND");
    this.#bound.delete(port);
  }

  /**
   * Sends an event.
   *
   * @param port The local port
   */
  notify(port: number): void {
    this.#device.request(EVTCHN.NOTIFY, [port], "EVTCHN_NOTIFY");
  }

  /**
   * Takes the events that are there, without waiting. Their ports are open again when this returns: so look at the shared
   * memory after it, and an event that comes while you look is told of once more, but never lost.
   *
   * @returns The local ports, each once; all that are bound where the kernel has lost count
   */
  take(): number[] {
    const count = this.#read();
    if (count === undefined) return this.#reset();
    const taken = this.#ports.subarray(0, count);
    if (count > 0) this.#device.write(taken);
    // What was unbound meanwhile may still be told of.
    return [...new Set(taken)].filter((port) => this.#bound.has(port));
  }

  /** Unbinds all. */
  [Symbol.dispose](): void {
    this.#bound.clear();
    this.#device[Symbol.dispose]();
  }

  #bind(request: number, words: readonly number[], name: string): number {
    const port = this.#device.request(request, words, `EVTCHN_${name}`);
    this.#bound.add(port);
    return port;
  }

  #read(): number | undefined {
    try {
      return this.#device.read(this.#ports);
    } catch (error) {
      if (error instanceof SysError && error.code === "EAGAIN") return 0;
      if (error instanceof SysError && error.code === "EFBIG") return undefined;
      throw error;
    }
  }

  /** Begins anew after more events than the kernel keeps. Which ones were among them is not known. */
  #reset(): number[] {
    this.#device.request(EVTCHN.RESET, [], "EVTCHN_RESET");
    const bound = [...this.#bound];
    for (let start = 0; start < bound.length; start += MAX_PORTS) {
      this.#device.write(Uint32Array.from(bound.slice(start, start + MAX_PORTS)));
    }
    return bound;
  }
}

class Device implements EventChannelDevice {
  readonly #fd = Fd.open(PATH, O_RDWR | O_NONBLOCK);

  get fd(): number {
    return this.#fd.number;
  }

  request(request: number, words: readonly number[], name: string): number {
    return this.#fd.ioctlBuffer(request, new Uint8Array(Uint32Array.from(words).buffer), name);
  }

  read(ports: Uint32Array<ArrayBuffer>): number {
    const bytes = libc().read(this.fd, Deno.UnsafePointer.of(ports), BigInt(ports.byteLength));
    return check(bytes, `read("${PATH}")`) / 4;
  }

  write(ports: Uint32Array<ArrayBuffer>): void {
    const bytes = libc().write(this.fd, Deno.UnsafePointer.of(ports), BigInt(ports.byteLength));
    check(bytes, `write("${PATH}")`);
  }

  [Symbol.dispose](): void {
    this.#fd[Symbol.dispose]();
  }
}
