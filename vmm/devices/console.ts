/**
 * The console device with many ports (virtio 1.2, section 5.3), each of which a Unix socket leads to.
 *
 * What goes through sockets of Linux goes between them and the guest's memory without a copy in between: no call on them
 * blocks.
 *
 * @module
 */

import { copySegments, drainQueue, fillSegments, sliceSegments } from "./segments.ts";
import type { StreamListener, StreamSocket } from "./stream_sockets.ts";
import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice } from "./virtio_device.ts";
import {
  type DescriptorChain,
  type Segment,
  totalLength,
  type Virtqueue,
  VirtqueueError,
} from "./virtqueue.ts";

const F_SIZE = 1n << 0n;
const F_MULTIPORT = 1n << 1n;

const CONTROL_INPUT = 2;
const CONTROL_OUTPUT = 3;
/** The driver fills the input queue of each port with pages. */
const PORT_QUEUE_SIZE = 64;
const CONTROL_QUEUE_SIZE = 32;
const CONTROL_SIZE = 8;
/** Most bytes of one buffer of output. Linux writes 32 KiB at once, and splices no more than a pipe holds. */
const MAX_OUTPUT = 1 << 20;

/** Events of control messages (virtio 1.2, section 5.3.6.2). `RESIZE` is left out: kernels differ in its layout. */
const EVENT = {
  deviceReady: 0,
  portAdd: 1,
  portReady: 3,
  consolePort: 4,
  portOpen: 6,
  portName: 7,
} as const;

/** A port of a {@linkcode ConsoleDevice}. */
export interface ConsolePortOptions {
  /** Name by which the guest finds it. */
  readonly name?: string;
  /**
   * Whether it is a console (hvc): its output never waits for a client, who loses what it is too slow for. The output of
   * other ports waits for their client, and is lost only while there is none.
   */
  readonly isConsole: boolean;
  /** The socket that leads to it, which serves one client at a time; the device closes it. */
  readonly listener?: StreamListener;
  /** Takes a copy of all that the guest writes. */
  readonly onOutput?: (bytes: Uint8Array<ArrayBuffer>) => void;
}

/** What a {@linkcode ConsoleDevice} is given. */
export interface ConsoleOptions {
  /** The ports by number. The first is the console of drivers that know only one. */
  readonly ports: readonly ConsolePortOptions[];
  /** Size of the console, for drivers that know only one port; 80 by 25 unless told. */
  readonly size?: { readonly columns: number; readonly rows: number };
}

interface Message {
  readonly event: number;
  readonly value: number;
}

interface Port {
  readonly id: number;
  readonly options: ConsolePortOptions;
  client: StreamSocket | undefined;
  /** Whether there may be input of the client. */
  canReceive: boolean;
  /** Whether the client sends no more, and all that it sent is with the guest. */
  hasEnded: boolean;
  /** Whether the client takes no more; it may have sent something before. */
  hasLeft: boolean;
  /** Whether the guest knows the port. */
  isReady: boolean;
  /** Whether the guest has opened the port. */
  isOpen: boolean;
  /** What the guest is to be told. */
  messages: Message[];
  /** How much of the next buffer of output the client has. */
  sent: number;
}

/** Many byte streams between guest and host. Sockets and their clients outlast a reset of the device. */
export class ConsoleDevice implements VirtioDevice {
  /** See {@linkcode VirtioDevice.type}. */
  readonly type: number = VIRTIO_DEVICE.console;
  /** See {@linkcode VirtioDevice.features}. */
  readonly features: bigint = F_SIZE | F_MULTIPORT;
  /** See {@linkcode VirtioDevice.queueSizes}. */
  readonly queueSizes: readonly number[];
  /** See {@linkcode VirtioDevice.config}: columns, rows, number of ports, and a register that is not offered. */
  readonly config: Uint8Array<ArrayBuffer> = new Uint8Array(12);
  readonly #ports: Port[] = [];
  #context: DeviceContext | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a device, and begins to take clients.
   *
   * @param options Its ports
   */
  constructor(options: ConsoleOptions) {
    const { columns, rows } = options.size ?? { columns: 80, rows: 25 };
    const count = options.ports.length;
    const view = new DataView(this.config.buffer);
    view.setUint16(0, columns, true);
    view.setUint16(2, rows, true);
    view.setUint32(4, count, true);
    this.queueSizes = Array.from(
      { length: 2 * (count + 1) },
      (_, index) => index >> 1 === CONTROL_INPUT >> 1 ? CONTROL_QUEUE_SIZE : PORT_QUEUE_SIZE,
    );
    options.ports.forEach((options, id) => {
      const port: Port = {
        id,
        options,
        client: undefined,
        canReceive: false,
        hasEnded: false,
        hasLeft: false,
        isReady: false,
        isOpen: false,
        messages: [],
        sent: 0,
      };
      this.#ports.push(port);
      const { listener } = options;
      if (!listener) return;
      const take = () =>
        this.#guard(() => {
          this.#accept(port);
          this.#serve(port);
        });
      listener.onChange = take;
      // Some may have come already.
      take();
    });
  }

  /**
   * See {@linkcode VirtioDevice.activate}.
   *
   * @param context What to work with
   */
  activate(context: DeviceContext): void {
    this.#context = context;
    const [console] = this.#ports;
    if ((context.features & F_MULTIPORT) === 0n && console) console.isReady = console.isOpen = true;
    this.#serveAll();
  }

  /**
   * See {@linkcode VirtioDevice.notify}.
   *
   * @param queue The queue
   */
  notify({ index }: Virtqueue): void {
    this.#guard(() => {
      const port = this.#ports[index < CONTROL_INPUT ? 0 : (index >> 1) - 1];
      if (index >> 1 === CONTROL_INPUT >> 1) this.#control();
      else if (port) this.#serve(port);
    });
  }

  /** See {@linkcode VirtioDevice.reset}. */
  reset(): void {
    this.#context = undefined;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    for (const port of this.#ports) {
      port.isReady = port.isOpen = false;
      port.messages = [];
      port.sent = 0;
      this.#serve(port);
    }
  }

  /**
   * See {@linkcode VirtioDevice.save}. Ports that are no consoles have no client then, as far as the guest knows.
   *
   * @returns Which ports the guest knows, and has open
   */
  save(): unknown {
    return this.#ports.map(({ isReady, isOpen }) => ({ isReady, isOpen }));
  }

  /**
   * See {@linkcode VirtioDevice.restore}.
   *
   * @param state What was saved
   */
  restore(state: unknown): void {
    (state as { isReady: boolean; isOpen: boolean }[]).forEach(({ isReady, isOpen }, index) => {
      const port = this.#ports[index]!;
      port.isReady = isReady;
      port.isOpen = isOpen;
      if (port.client) this.#announce(port, 1);
    });
    this.#serveAll();
  }

  /** Ends it, and removes its sockets. */
  [Symbol.dispose](): void {
    this.#context = undefined;
    clearTimeout(this.#timer);
    for (const { client, options } of this.#ports) {
      client?.[Symbol.dispose]();
      options.listener?.[Symbol.dispose]();
    }
  }

  /** Does something that a guest can let fail. */
  #guard(task: () => void): void {
    const context = this.#context;
    try {
      task();
    } catch (error) {
      if (!context) throw error;
      this.#context = undefined;
      context.fail(error);
    }
  }

  #serveAll(): void {
    this.#guard(() => {
      this.#control();
      for (const port of this.#ports) this.#serve(port);
    });
  }

  /** Serves a queue for a while, and comes back later if that was not enough. */
  #drain(index: number, step: (chain: DescriptorChain) => number | undefined): void {
    const queue = this.#context?.queues[index];
    if (!this.#context || !queue?.isReady || drainQueue(this.#context, queue, step)) return;
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#serveAll();
    }, 0);
  }

  /** Moves what can be moved between a port and its client. */
  #serve(port: Port): void {
    this.#takeOutput(port);
    this.#giveInput(port);
    // What a client that has left sent to a port that nobody has opened is lost with it.
    if (port.client && (port.hasEnded || port.hasLeft && !(this.#context && port.isOpen))) {
      port.client[Symbol.dispose]();
      port.client = undefined;
      this.#announce(port, 0);
      // Nor is what was written to it for the next client.
      this.#takeOutput(port);
      this.#accept(port);
    }
    this.#tell();
  }

  #accept(port: Port): void {
    if (port.client) return;
    port.client = port.options.listener?.accept();
    if (!port.client) return;
    port.hasEnded = port.hasLeft = false;
    port.canReceive = true;
    port.client.onChange = (hasLeft) => {
      port.canReceive = true;
      port.hasLeft ||= hasLeft;
      this.#guard(() => this.#serve(port));
    };
    this.#announce(port, 1);
  }

  #takeOutput(port: Port): void {
    this.#drain(queueOf(port) + 1, (chain) => {
      const length = totalLength(chain.readable);
      if (chain.writable.length > 0 || length > MAX_OUTPUT) {
        throw new VirtqueueError(`port ${port.id} is given ${length} bytes of output`);
      }
      return this.#output(port, chain.readable) ? 0 : undefined;
    });
  }

  /** Moves a buffer of output; false if the client has to take the rest later. */
  #output(port: Port, segments: readonly Segment[]): boolean {
    const { client, options } = port;
    const { bytes } = this.#context!.memory;
    for (const { offset, length } of sliceSegments(segments, port.sent)) {
      let taken = length;
      if (client && !port.hasLeft) {
        const sent = client.send(bytes.subarray(offset, offset + length));
        if (sent < 0) port.hasLeft = true;
        else if (!options.isConsole) taken = sent;
      }
      options.onOutput?.(bytes.slice(offset, offset + taken));
      port.sent += taken;
      if (taken < length) return false;
    }
    port.sent = 0;
    return true;
  }

  #giveInput(port: Port): void {
    const { client } = port;
    if (!client || !port.isOpen || !port.canReceive) return;
    this.#drain(queueOf(port), ({ readable, writable }) => {
      if (readable.length > 0 || totalLength(writable) === 0) {
        throw new VirtqueueError(`port ${port.id} is given a buffer that is not for input`);
      }
      const { bytes } = this.#context!.memory;
      let length = 0;
      for (const segment of sliceSegments(writable, 0)) {
        if (!port.canReceive) break;
        const received = client.receive(bytes.subarray(segment.offset, segment.offset + segment.length));
        if (received > 0) length += received;
        else {
          port.canReceive = false;
          port.hasEnded = received < 0;
        }
      }
      return length > 0 ? length : undefined;
    });
  }

  /** Takes control messages, and answers. */
  #control(): void {
    this.#drain(CONTROL_OUTPUT, ({ readable, writable }) => {
      if (writable.length > 0 || totalLength(readable) < CONTROL_SIZE) {
        throw new VirtqueueError("a control message of a console is too short");
      }
      const view = copySegments(this.#context!.memory.bytes, sliceSegments(readable, 0, CONTROL_SIZE));
      const [event, value] = [view.getUint16(4, true), view.getUint16(6, true)];
      if (event === EVENT.deviceReady) {
        if (value !== 1) return 0;
        for (const port of this.#ports) {
          port.isReady = false;
          port.messages = [{ event: EVENT.portAdd, value: 1 }];
        }
        return 0;
      }
      const port = this.#ports[view.getUint32(0, true)];
      if (port && event === EVENT.portReady && value === 1) this.#introduce(port);
      if (port && event === EVENT.portOpen) {
        port.isOpen = value === 1;
        this.#serve(port);
      }
      return 0;
    });
    this.#tell();
  }

  /** Tells a guest that has made a port what it is. */
  #introduce(port: Port): void {
    const { isConsole, name } = port.options;
    port.isReady = true;
    port.messages = [];
    if (isConsole) port.messages.push({ event: EVENT.consolePort, value: 1 });
    if (name !== undefined) port.messages.push({ event: EVENT.portName, value: 1 });
    // A console is always there, whether somebody looks at it or not.
    if (isConsole || port.client) port.messages.push({ event: EVENT.portOpen, value: 1 });
  }

  #announce(port: Port, value: number): void {
    if (!port.isReady || port.options.isConsole) return;
    const { messages } = port;
    // It goes up and down by turns: two untold changes that end where this one does are the same to the guest.
    if (messages.at(-1)?.event === EVENT.portOpen && messages.at(-2)?.event === EVENT.portOpen) {
      messages.pop();
    } else messages.push({ event: EVENT.portOpen, value });
  }

  /** Sends control messages, as far as the guest has room for them. */
  #tell(): void {
    for (const port of this.#ports) {
      if (port.messages.length === 0) continue;
      this.#drain(CONTROL_INPUT, ({ readable, writable }) => {
        const message = port.messages[0];
        if (!message) return undefined;
        const bytes = encodeMessage(port, message);
        if (readable.length > 0 || totalLength(writable) < bytes.length) {
          throw new VirtqueueError("a buffer for control messages of a console is too small");
        }
        fillSegments(this.#context!.memory.bytes, writable, bytes);
        port.messages.shift();
        return bytes.length;
      });
    }
  }
}

/** The queue of a port's input; the one of its output is the next. */
function queueOf({ id }: Port): number {
  return id === 0 ? 0 : 2 * (id + 1);
}

function encodeMessage(port: Port, { event, value }: Message): Uint8Array {
  const name = event === EVENT.portName ? new TextEncoder().encode(port.options.name) : [];
  const bytes = new Uint8Array(CONTROL_SIZE + name.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, port.id, true);
  view.setUint16(4, event, true);
  view.setUint16(6, value, true);
  bytes.set(name, CONTROL_SIZE);
  return bytes;
}
