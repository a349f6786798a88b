/**
 * The console device with many ports (virtio 1.2, section 5.3), each of which a Unix socket leads to.
 *
 * What goes through sockets goes between them and the guest's memory without a copy in between: no call on them blocks.
 *
 * @module
 */

import { check, cString, errno, Fd, libc, sysError } from "../../ffi/mod.ts";
import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice, type Watcher } from "./virtio_device.ts";
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
  /** Path of the socket that leads to it, which serves one client at a time. */
  readonly socket?: string;
  /** Takes a copy of all that the guest writes. */
  readonly onOutput?: (bytes: Uint8Array<ArrayBuffer>) => void;
}

/** What a {@linkcode ConsoleDevice} is given. */
export interface ConsoleOptions {
  /** Watches the sockets. */
  readonly watcher: Watcher;
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
  readonly listener: UnixListener | undefined;
  client: UnixSocket | undefined;
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
  readonly #sockets: SocketSet;
  readonly #ports: Port[] = [];
  #context: DeviceContext | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a device, and begins to listen.
   *
   * @param options Its ports
   * @throws {Error} If something else listens on a port's socket
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
    this.#sockets = new SocketSet(options.watcher);
    try {
      options.ports.forEach((options, id) => {
        const listener = options.socket === undefined ? undefined : this.#sockets.listen(options.socket);
        const port: Port = {
          id,
          options,
          listener,
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
        if (listener) {
          listener.onChange = () =>
            this.#guard(() => {
              this.#accept(port);
              this.#serve(port);
            });
        }
      });
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
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

  /** Ends it, and removes its sockets. */
  [Symbol.dispose](): void {
    this.#context = undefined;
    clearTimeout(this.#timer);
    this.#sockets[Symbol.dispose]();
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
    port.client = port.listener?.accept();
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

/**
 * Takes buffers from a queue, at most as many as it holds, and gives them back used.
 *
 * @param context Interrupts the guest afterwards
 * @param queue The queue
 * @param step Uses a buffer and returns how many bytes it wrote, or undefined to leave the buffer for later
 * @returns Whether it came to the end; otherwise there may be more
 */
export function drainQueue(
  context: DeviceContext,
  queue: Virtqueue,
  step: (chain: DescriptorChain) => number | undefined,
): boolean {
  let count = 0;
  while (count < queue.size) {
    const chain = queue.pop();
    if (!chain) {
      queue.setNotification(true);
      if (queue.hasPending) continue;
      break;
    }
    const written = step(chain);
    if (written === undefined) {
      queue.unpop();
      break;
    }
    queue.push(chain.head, written);
    count++;
  }
  if (count > 0) context.interrupt(queue);
  return count < queue.size;
}

/**
 * Picks a range of a buffer.
 *
 * @param segments Parts of the buffer
 * @param skip Where the range begins
 * @param limit How long it is at most
 * @returns Its parts, none of them empty
 */
export function sliceSegments(segments: readonly Segment[], skip: number, limit = Infinity): Segment[] {
  const range: Segment[] = [];
  for (const { offset, length } of segments) {
    const taken = Math.min(length - skip, limit);
    if (taken > 0) {
      range.push({ offset: offset + skip, length: taken });
      limit -= taken;
    }
    skip = Math.max(0, skip - length);
  }
  return range;
}

/**
 * Copies what the guest wrote, so that it can be checked.
 *
 * @param memory Memory of the guest
 * @param segments What to copy
 * @returns The copy
 */
export function copySegments(memory: Uint8Array, segments: readonly Segment[]): DataView<ArrayBuffer> {
  const bytes = new Uint8Array(totalLength(segments));
  let at = 0;
  for (const { offset, length } of segments) {
    bytes.set(memory.subarray(offset, offset + length), at);
    at += length;
  }
  return new DataView(bytes.buffer);
}

/**
 * Writes to the beginning of a buffer.
 *
 * @param memory Memory of the guest
 * @param segments The buffer, which has room
 * @param bytes What to write
 */
export function fillSegments(memory: Uint8Array, segments: readonly Segment[], bytes: Uint8Array): void {
  let at = 0;
  for (const { offset, length } of sliceSegments(segments, 0, bytes.length)) {
    memory.set(bytes.subarray(at, at + length), offset);
    at += length;
  }
}

// Linux 6.1 `include/linux/socket.h`, `include/linux/net.h`, `include/uapi/linux/eventpoll.h`.
const AF_UNIX = 1;
/** `SOCK_NONBLOCK | SOCK_CLOEXEC`, and with `SOCK_STREAM`. */
const SOCKET_FLAGS = 0o2004000;
const SOCKET_TYPE = 1 | SOCKET_FLAGS;
const MSG_PEEK = 0x2;
const MSG_NOSIGNAL = 0x4000;
const EPOLL_CTL_ADD = 1;
const EPOLLIN = 0x1;
const EPOLLOUT = 0x4;
const EPOLLHUP = 0x10;
const EPOLLRDHUP = 0x2000;
const EPOLLET = 0x8000_0000;
const EPOLL_EVENT_SIZE = 12;
const EVENTS_AT_ONCE = 64;
/** Most bytes of a socket's path. */
export const MAX_SOCKET_PATH = 107;
const BACKLOG = 128;
const EAGAIN = 11;

/** What a {@linkcode SocketSet} watches. */
abstract class Watched implements Disposable {
  /** The descriptor. */
  readonly fd: Fd;
  readonly #forget: () => void;
  /** Called once for all that has changed: there is more to receive, there is room to send, or the peer has left. */
  onChange: (hasLeft: boolean) => void = () => {};

  constructor(fd: Fd, watch: (watched: Watched) => () => void) {
    this.fd = fd;
    this.#forget = watch(this);
  }

  /** Closes it. */
  [Symbol.dispose](): void {
    this.#forget();
    this.fd[Symbol.dispose]();
  }
}

/** A connected Unix socket. One that was closed is as one whose peer has left. */
export class UnixSocket extends Watched {
  /**
   * Takes what has arrived.
   *
   * @param target Where to, not empty
   * @returns How many bytes; 0 where nothing has arrived, -1 where nothing more will
   */
  receive(target: Uint8Array<ArrayBuffer>): number {
    return this.#receive(target, 0);
  }

  /**
   * Looks at what has arrived without taking it.
   *
   * @param target Where to, not empty
   * @returns The same as of {@linkcode UnixSocket.receive}
   */
  peek(target: Uint8Array<ArrayBuffer>): number {
    return this.#receive(target, MSG_PEEK);
  }

  /**
   * Sends what there is room for.
   *
   * @param bytes What to send, not empty
   * @returns How many bytes went; -1 where the peer takes none any more
   */
  send(bytes: Uint8Array<ArrayBuffer>): number {
    if (this.fd.isClosed) return -1;
    const length = libc().send(this.fd.number, bytes, BigInt(bytes.length), MSG_NOSIGNAL);
    return length >= 0 ? length : errno() === EAGAIN ? 0 : -1;
  }

  /**
   * Ends one direction.
   *
   * @param direction What is not to be done any more
   */
  shutdown(direction: "receive" | "send"): void {
    // It fails only if the peer has left, which does as well.
    if (!this.fd.isClosed) libc().shutdown(this.fd.number, direction === "receive" ? 0 : 1);
  }

  #receive(target: Uint8Array<ArrayBuffer>, flags: number): number {
    if (this.fd.isClosed) return -1;
    const length = libc().recv(this.fd.number, target, BigInt(target.length), flags);
    return length > 0 ? length : length < 0 && errno() === EAGAIN ? 0 : -1;
  }
}

/** A Unix socket that clients connect to. Its file goes when it is disposed. */
export class UnixListener extends Watched {
  readonly #path: string;
  readonly #watch: (watched: Watched) => () => void;

  /**
   * Takes over a descriptor; {@linkcode SocketSet.listen} makes one.
   *
   * @param fd The descriptor
   * @param path Its file
   * @param watch Begins to watch, and returns what ends that
   */
  constructor(fd: Fd, path: string, watch: (watched: Watched) => () => void) {
    super(fd, watch);
    this.#path = path;
    this.#watch = watch;
  }

  /**
   * Takes the next client.
   *
   * @returns Its socket, or undefined where there is none
   */
  accept(): UnixSocket | undefined {
    const number = libc().accept4(this.fd.number, null, null, SOCKET_FLAGS);
    return number < 0 ? undefined : new UnixSocket(new Fd(number, this.#path), this.#watch);
  }

  /** Closes it, and removes its file. */
  override [Symbol.dispose](): void {
    if (!this.fd.isClosed) removeFile(this.#path);
    super[Symbol.dispose]();
  }
}

/** Unix sockets that are watched for every change. */
export class SocketSet implements Disposable {
  readonly #watcher: Watcher;
  readonly #epoll = Fd.epoll();
  readonly #events = new DataView(new ArrayBuffer(EVENTS_AT_ONCE * EPOLL_EVENT_SIZE));
  readonly #pointer = Deno.UnsafePointer.of(this.#events)!;
  readonly #watched = new Map<number, Watched>();
  #nextKey = 0;

  /**
   * Begins without sockets.
   *
   * @param watcher Watches them all together
   */
  constructor(watcher: Watcher) {
    this.#watcher = watcher;
    watcher.watch(this.#epoll, () => this.#dispatch());
  }

  /**
   * Listens for clients, who must be of the same user. Replaces a socket on which nobody listens any more.
   *
   * @param path Path of the socket
   * @returns The listener
   * @throws {Error} If somebody listens there, or another kind of file is there
   */
  listen(path: string): UnixListener {
    const fd = openSocket();
    try {
      const address = socketAddress(path);
      if (libc().bind(fd.number, address, address.length) < 0) {
        const error = sysError(`bind("${path}")`, errno());
        if (error.code !== "EADDRINUSE") throw error;
        if (!isStale(path)) {
          throw new Error(
            `Cannot listen on "${path}" as another process does, or another kind of file is there: ` +
              `end that process, or remove the file`,
            { cause: error },
          );
        }
        removeFile(path);
        check(libc().bind(fd.number, address, address.length), `bind("${path}")`);
      }
      Deno.chmodSync(path, 0o600);
      check(libc().listen(fd.number, BACKLOG), `listen("${path}")`);
      return new UnixListener(fd, path, this.#watch);
    } catch (error) {
      fd[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * Connects to a socket.
   *
   * @param path Path of the socket
   * @returns Undefined where nobody listens, or too many wait, or this process has no descriptors left
   */
  connect(path: string): UnixSocket | undefined {
    const number = libc().socket(AF_UNIX, SOCKET_TYPE, 0);
    if (number < 0) return undefined;
    const fd = new Fd(number, path);
    const address = socketAddress(path);
    if (libc().connect(fd.number, address, address.length) === 0) return new UnixSocket(fd, this.#watch);
    fd[Symbol.dispose]();
    return undefined;
  }

  /** Closes all sockets. */
  [Symbol.dispose](): void {
    if (this.#epoll.isClosed) return;
    for (const each of this.#watched.values()) each[Symbol.dispose]();
    this.#watcher.unwatch(this.#epoll);
    this.#epoll[Symbol.dispose]();
  }

  readonly #watch = (watched: Watched): () => void => {
    // Not the descriptor's number: an event of one that was closed must not be taken for the next one's.
    const key = this.#nextKey = (this.#nextKey + 1) >>> 0;
    const event = new Uint8Array(EPOLL_EVENT_SIZE);
    const view = new DataView(event.buffer);
    // Each change is told once, so that nothing has to be said of what is not wanted right now.
    view.setUint32(0, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, true);
    view.setUint32(4, key, true);
    check(
      libc().epoll_ctl(this.#epoll.number, EPOLL_CTL_ADD, watched.fd.number, event),
      "epoll_ctl(EPOLL_CTL_ADD)",
    );
    this.#watched.set(key, watched);
    return () => this.#watched.delete(key);
  };

  #dispatch(): void {
    const count = this.#epoll.poll(this.#pointer, 0, EVENTS_AT_ONCE);
    for (let index = 0; index < count; index++) {
      const at = index * EPOLL_EVENT_SIZE;
      const hasLeft = (this.#events.getUint32(at, true) & EPOLLHUP) !== 0;
      this.#watched.get(this.#events.getUint32(at + 4, true))?.onChange(hasLeft);
    }
  }
}

function openSocket(): Fd {
  return new Fd(check(libc().socket(AF_UNIX, SOCKET_TYPE, 0), "socket(AF_UNIX)"), "socket");
}

/** `struct sockaddr_un` (Linux 6.1 `include/uapi/linux/un.h`). */
function socketAddress(path: string): Uint8Array<ArrayBuffer> {
  const name = cString(path);
  if (name.length - 1 > MAX_SOCKET_PATH) {
    throw new Error(
      `Cannot use the socket "${path}" as its path has more than ${MAX_SOCKET_PATH} bytes: use a directory with a shorter path`,
    );
  }
  const address = new Uint8Array(2 + name.length);
  new DataView(address.buffer).setUint16(0, AF_UNIX, true);
  address.set(name, 2);
  return address;
}

/** Whether a file is a socket on which nobody listens. */
function isStale(path: string): boolean {
  if (!Deno.lstatSync(path).isSocket) return false;
  using fd = openSocket();
  const address = socketAddress(path);
  return libc().connect(fd.number, address, address.length) < 0 &&
    sysError("connect()", errno()).code === "ECONNREFUSED";
}

function removeFile(path: string): void {
  try {
    Deno.removeSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}
