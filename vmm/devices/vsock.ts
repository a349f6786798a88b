/**
 * The socket device (virtio 1.2, section 5.10): streams between guest and host.
 *
 * On the host they are Unix sockets, as Firecracker has them: a client of the device's own socket sends `CONNECT PORT` and a
 * newline to reach a port of the guest, and reads `OK HOSTPORT` and a newline once it has; where the guest connects to a port
 * of the host, the device connects to the socket whose path has `_PORT` behind that of its own. Or the host's kernel serves
 * the guest by vhost-vsock, and the streams are sockets of the family AF_VSOCK.
 *
 * @module
 */

import { Fd, Vhost } from "../../ffi/mod.ts";
import { copySegments, drainQueue, fillSegments, sliceSegments } from "./segments.ts";
import { MAX_SOCKET_PATH, SocketSet, type UnixListener, type UnixSocket } from "./unix_socket.ts";
import type { GuestMemory } from "./guest_memory.ts";
import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice, type Watcher } from "./virtio_device.ts";
import {
  type DescriptorChain,
  type Segment,
  totalLength,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  type Virtqueue,
  VirtqueueError,
} from "./virtqueue.ts";

const RX_QUEUE = 0;
const TX_QUEUE = 1;
const EVENT_QUEUE = 2;
const QUEUE_SIZES = [256, 256, 16] as const;

const HOST_CID = 2;
const HEADER_SIZE = 44;
const TYPE_STREAM = 1;
const SHUTDOWN_RECEIVE = 1;
const SHUTDOWN_SEND = 2;
const SHUTDOWN_BOTH = 3;
/** Operations (Linux 6.1 `include/uapi/linux/virtio_vsock.h`, as all numbers here). */
const OP = {
  request: 1,
  response: 2,
  reset: 3,
  shutdown: 4,
  data: 5,
  creditUpdate: 6,
  creditRequest: 7,
} as const;
const EVENT_TRANSPORT_RESET = 0;

/** Most streams, together with clients that have not said yet where they want to. */
const MAX_CONNECTIONS = 1023;
/** Bytes of a stream that wait here until its host takes them. */
const BUFFER_SIZE = 128 << 10;
/** Bytes to the guest in one packet: Linux takes more, but has buffers of 4 KiB. */
const MAX_PACKET = 64 << 10;
/** Answers that wait for the guest's buffers before no more of its packets are taken. */
const MAX_REPLIES = 1024;
const MAX_GREETING = 32;
const FIRST_HOST_PORT = 0x4000_0000;
const LAST_HOST_PORT = 0x7fff_ffff;

interface Header {
  readonly sourceCid: bigint;
  readonly destinationCid: bigint;
  readonly guestPort: number;
  readonly hostPort: number;
  readonly length: number;
  readonly type: number;
  readonly op: number;
  readonly flags: number;
  readonly bufferSize: number;
  readonly forwarded: number;
}

/** A packet without data that waits for the guest. */
interface Reply {
  readonly op: number;
  readonly guestPort: number;
  readonly hostPort: number;
  readonly type: number;
  readonly flags: number;
  /** The stream whose credit it tells. */
  readonly connection: Connection | undefined;
}

/** What a {@linkcode VsockDevice} is given. */
export interface VsockOptions {
  /** The guest's address, at least 3. */
  readonly guestCid: number;
  /** Path of the device's socket; those that the guest connects to have `_PORT` behind it. */
  readonly path: string;
  /** Watches the sockets. */
  readonly watcher: Watcher;
}

/** Streams by way of Unix sockets. */
export class VsockDevice implements VirtioDevice {
  /** See {@linkcode VirtioDevice.type}. */
  readonly type: number = VIRTIO_DEVICE.vsock;
  /** See {@linkcode VirtioDevice.features}. */
  readonly features = 0n;
  /** See {@linkcode VirtioDevice.queueSizes}. */
  readonly queueSizes: readonly number[] = QUEUE_SIZES;
  /** See {@linkcode VirtioDevice.config}: the guest's address. */
  readonly config: Uint8Array<ArrayBuffer>;
  readonly #guestCid: bigint;
  readonly #path: string;
  readonly #sockets: SocketSet;
  readonly #listener: UnixListener;
  readonly #connections = new Map<string, Connection>();
  /** Clients that have not said yet where they want to. */
  readonly #greeting = new Set<UnixSocket>();
  /** Streams that are over, but for what waits for their hosts. */
  readonly #closing = new Set<Connection>();
  /** Streams whose hosts may have sent something, those that wait longest first. */
  readonly #receivable = new Set<Connection>();
  #replies: Reply[] = [];
  /** The header of the packet that the guest is given; its addresses never change. */
  readonly #header = new DataView(new ArrayBuffer(HEADER_SIZE));
  #nextHostPort = FIRST_HOST_PORT;
  #isResetDue = false;
  #context: DeviceContext | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a device, and begins to listen.
   *
   * @param options Address and socket
   * @throws {Error} If something else listens on the socket
   */
  constructor(options: VsockOptions) {
    this.config = configOf(options.guestCid);
    this.#guestCid = BigInt(options.guestCid);
    this.#path = options.path;
    this.#header.setBigUint64(0, BigInt(HOST_CID), true);
    this.#header.setBigUint64(8, this.#guestCid, true);
    const longest = `${options.path}_${0xffff_ffff}`;
    if (new TextEncoder().encode(longest).length > MAX_SOCKET_PATH) {
      throw new Error(
        `Cannot use the socket "${options.path}" as "${longest}" has more than ${MAX_SOCKET_PATH} bytes: ` +
          `use a directory with a shorter path`,
      );
    }
    this.#sockets = new SocketSet(options.watcher);
    try {
      this.#listener = this.#sockets.listen(options.path);
    } catch (error) {
      this.#sockets[Symbol.dispose]();
      throw error;
    }
    this.#listener.onChange = () => this.#work(() => this.#acceptAll());
  }

  /** How many streams there are. */
  get connectionCount(): number {
    return this.#connections.size;
  }

  /** Tells the guest that its streams are gone, which it must be told where it was not booted but restored. */
  resetTransport(): void {
    this.#isResetDue = true;
    this.#work();
  }

  /**
   * See {@linkcode VirtioDevice.activate}.
   *
   * @param context What to work with
   */
  activate(context: DeviceContext): void {
    this.#context = context;
    this.#work(() => this.#acceptAll());
  }

  /** See {@linkcode VirtioDevice.notify}. */
  notify(): void {
    this.#work();
  }

  /** See {@linkcode VirtioDevice.reset}: the guest's streams end with it. */
  reset(): void {
    this.#context = undefined;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    for (const socket of this.#greeting) socket[Symbol.dispose]();
    for (const { socket } of this.#connections.values()) socket[Symbol.dispose]();
    this.#greeting.clear();
    this.#connections.clear();
    this.#receivable.clear();
    this.#replies = [];
    this.#isResetDue = false;
  }

  /** Ends it, and removes its socket. */
  [Symbol.dispose](): void {
    this.reset();
    this.#sockets[Symbol.dispose]();
  }

  /** Does something, and then all that there is to do for the guest. */
  #work(task?: () => void): void {
    const context = this.#context;
    // Clients wait to be accepted until there is a guest.
    if (!context) return;
    try {
      task?.();
      const isDone = [
        this.#drain(context, TX_QUEUE, (chain) => this.#takePacket(context.memory, chain)),
        this.#replies.length + this.#receivable.size === 0 ||
        this.#drain(context, RX_QUEUE, (chain) => this.#givePacket(context.memory, chain)),
      ];
      if (this.#isResetDue) this.#isResetDue = !tellTransportReset(context);
      // Too many replies hold packets up; now there may be room.
      const isHeldUp = this.#replies.length < MAX_REPLIES && context.queues[TX_QUEUE]!.isReady &&
        context.queues[TX_QUEUE]!.hasPending;
      if (isDone.includes(false) || isHeldUp) {
        this.#timer ??= setTimeout(() => {
          this.#timer = undefined;
          this.#work();
        }, 0);
      }
    } catch (error) {
      this.#context = undefined;
      context.fail(error);
    }
  }

  #drain(
    context: DeviceContext,
    index: number,
    step: (chain: DescriptorChain) => number | undefined,
  ): boolean {
    const queue = context.queues[index];
    return !queue?.isReady || drainQueue(context, queue, step);
  }

  // From the guest.

  #takePacket(memory: GuestMemory, { readable, writable }: DescriptorChain): number | undefined {
    if (this.#replies.length >= MAX_REPLIES) return undefined;
    const room = totalLength(readable) - HEADER_SIZE;
    if (writable.length > 0 || room < 0) {
      throw new VirtqueueError("a packet of a socket has no room for its header");
    }
    const header = readHeader(copySegments(memory.bytes, sliceSegments(readable, 0, HEADER_SIZE)));
    if (header.length > room) {
      throw new VirtqueueError(`a packet of a socket says to have ${header.length} bytes, and has ${room}`);
    }
    // What comes from others, or is for others, is lost.
    if (header.sourceCid !== this.#guestCid || header.destinationCid !== BigInt(HOST_CID)) return 0;
    const connection = this.#connections.get(keyOf(header));
    if (header.type !== TYPE_STREAM) this.#reply(OP.reset, header);
    else if (connection) {
      connection.bufferSize = header.bufferSize;
      connection.taken = header.forwarded;
      if (connection.isCreditAsked && connection.credit > 0) {
        connection.isCreditAsked = false;
        this.#receivable.add(connection);
      }
      this.#handle(connection, header, sliceSegments(readable, HEADER_SIZE, header.length), memory);
    } else if (header.op === OP.request) this.#connect(header);
    else if (header.op !== OP.reset) this.#reply(OP.reset, header);
    return 0;
  }

  #connect(header: Header): void {
    const isFull = this.#count >= MAX_CONNECTIONS;
    const socket = isFull ? undefined : this.#sockets.connect(`${this.#path}_${header.hostPort}`);
    if (!socket) return this.#reply(OP.reset, header);
    const connection = this.#add(socket, header, true);
    connection.bufferSize = header.bufferSize;
    connection.taken = header.forwarded;
    this.#reply(OP.response, connection);
    this.#receivable.add(connection);
  }

  #handle(connection: Connection, header: Header, data: readonly Segment[], memory: GuestMemory): void {
    const { isEstablished } = connection;
    switch (header.op) {
      case OP.response: {
        if (isEstablished) return this.#abort(connection);
        connection.isEstablished = true;
        const text = new TextEncoder().encode(`OK ${connection.hostPort}\n`);
        // It is the first that is sent, and has room.
        if (connection.socket.send(text) !== text.length) return this.#abort(connection);
        this.#receivable.add(connection);
        return;
      }
      case OP.reset:
        return this.#remove(connection);
      case OP.shutdown:
        if (!isEstablished) return this.#abort(connection);
        return this.#shutDown(connection, header.flags & SHUTDOWN_BOTH);
      case OP.data: {
        const canSend = isEstablished && (connection.guestShutdown & SHUTDOWN_SEND) === 0;
        // More than it has credit for.
        if (!canSend || header.length > BUFFER_SIZE - connection.output.length) {
          return this.#abort(connection);
        }
        for (const { offset, length } of data) {
          connection.write(memory.bytes.subarray(offset, offset + length));
        }
        return this.#afterOutput(connection);
      }
      case OP.creditUpdate:
        return;
      case OP.creditRequest:
        if (!isEstablished) return this.#abort(connection);
        return this.#updateCredit(connection);
      default:
        return this.#abort(connection);
    }
  }

  #shutDown(connection: Connection, flags: number): void {
    connection.guestShutdown |= flags;
    if ((connection.guestShutdown & SHUTDOWN_RECEIVE) !== 0) {
      this.#receivable.delete(connection);
      connection.socket.shutdown("receive");
    }
    if (connection.guestShutdown !== SHUTDOWN_BOTH) return this.#afterOutput(connection);
    // The guest waits for this before it forgets the stream; the host may take its time for the rest.
    this.#forget(connection);
    this.#reply(OP.reset, connection);
    if (connection.output.length === 0) return connection.socket[Symbol.dispose]();
    this.#closing.add(connection);
    connection.socket.onChange = () => {
      connection.flush();
      if (connection.output.length > 0) return;
      this.#closing.delete(connection);
      connection.socket[Symbol.dispose]();
    };
  }

  /** Tells the guest, and the host, what follows from the host's having taken output. */
  #afterOutput(connection: Connection): void {
    if (connection.hasLeft && !connection.isReadable) this.#tellShutdown(connection, SHUTDOWN_BOTH);
    else if (connection.isDeaf) this.#tellShutdown(connection, SHUTDOWN_RECEIVE);
    else if (connection.output.length === 0 && (connection.guestShutdown & SHUTDOWN_SEND) !== 0) {
      connection.end();
    }
    if ((connection.forwarded - connection.toldForwarded) >>> 0 >= BUFFER_SIZE / 2) {
      this.#updateCredit(connection);
    }
  }

  // To the guest.

  #reply(op: number, to: Header | Connection, flags = 0): void {
    const { guestPort, hostPort } = to;
    const connection = to instanceof Connection ? to : undefined;
    const type = to instanceof Connection ? TYPE_STREAM : to.type;
    this.#replies.push({ op, guestPort, hostPort, type, flags, connection });
  }

  #updateCredit(connection: Connection): void {
    if (connection.isUpdateDue) return;
    connection.isUpdateDue = true;
    this.#reply(OP.creditUpdate, connection);
  }

  #tellShutdown(connection: Connection, flags: number): void {
    if ((connection.hostShutdown | flags) === connection.hostShutdown) return;
    connection.hostShutdown |= flags;
    this.#reply(OP.shutdown, connection, connection.hostShutdown);
    if (connection.hostShutdown !== SHUTDOWN_BOTH) return;
    // The stream stays until the guest has taken notice. Nobody takes what waits for the host.
    connection.socket[Symbol.dispose]();
    connection.flush();
  }

  /** Fills a buffer of the guest, if there is something to fill it with. */
  #givePacket(memory: GuestMemory, { readable, writable }: DescriptorChain): number | undefined {
    const room = totalLength(writable) - HEADER_SIZE;
    if (readable.length > 0 || room < 0) {
      throw new VirtqueueError("a buffer for packets of a socket is too small");
    }
    while (true) {
      const reply = this.#replies.shift();
      if (reply) {
        if (reply.op === OP.creditUpdate && reply.connection) reply.connection.isUpdateDue = false;
        this.#writeHeader(memory, writable, reply, 0);
        return HEADER_SIZE;
      }
      const [connection] = this.#receivable;
      if (!connection) return undefined;
      this.#receivable.delete(connection);
      const { hostPort, guestPort } = connection;
      const length = this.#receive(connection, memory, sliceSegments(writable, HEADER_SIZE, MAX_PACKET));
      if (length === 0) continue;
      // The others have their turn first.
      this.#receivable.add(connection);
      this.#writeHeader(
        memory,
        writable,
        { op: OP.data, guestPort, hostPort, type: TYPE_STREAM, flags: 0, connection },
        length,
      );
      return HEADER_SIZE + length;
    }
  }

  /** Receives data of a host. */
  #receive(connection: Connection, memory: GuestMemory, room: readonly Segment[]): number {
    if (!connection.isReadable) return 0;
    const { credit } = connection;
    if (credit <= 0) {
      // Asked again and again, a guest whose program does not read would answer for ever.
      if (!connection.isCreditAsked) this.#reply(OP.creditRequest, connection);
      connection.isCreditAsked = true;
      return 0;
    }
    if (room.length === 0) throw new VirtqueueError("a buffer for packets of a socket has no room for data");
    let length = 0;
    for (const { offset, length: size } of sliceSegments(room, 0, credit)) {
      const received = connection.socket.receive(memory.bytes.subarray(offset, offset + size));
      if (received < 0 && length === 0) {
        this.#tellShutdown(connection, connection.hasLeft ? SHUTDOWN_BOTH : SHUTDOWN_SEND);
      }
      if (received <= 0) break;
      length += received;
    }
    connection.given = (connection.given + length) >>> 0;
    return length;
  }

  #writeHeader(memory: GuestMemory, writable: readonly Segment[], packet: Reply, length: number): void {
    const { connection } = packet;
    const view = this.#header;
    view.setUint32(16, packet.hostPort, true);
    view.setUint32(20, packet.guestPort, true);
    view.setUint32(24, length, true);
    view.setUint16(28, packet.type, true);
    view.setUint16(30, packet.op, true);
    view.setUint32(32, packet.flags, true);
    view.setUint32(36, connection ? BUFFER_SIZE : 0, true);
    view.setUint32(40, connection ? connection.forwarded : 0, true);
    if (connection) connection.toldForwarded = connection.forwarded;
    fillSegments(memory.bytes, writable, new Uint8Array(view.buffer));
  }

  // From the host.

  get #count(): number {
    return this.#connections.size + this.#closing.size + this.#greeting.size;
  }

  #acceptAll(): void {
    for (let socket = this.#listener.accept(); socket; socket = this.#listener.accept()) {
      if (this.#count >= MAX_CONNECTIONS) {
        socket[Symbol.dispose]();
        continue;
      }
      const client = socket;
      this.#greeting.add(client);
      client.onChange = (hasLeft) => this.#work(() => this.#greet(client, hasLeft));
    }
  }

  /** Reads where a client wants to, and not a byte more: the rest is for the guest. */
  #greet(socket: UnixSocket, hasLeft: boolean): void {
    const bytes = new Uint8Array(MAX_GREETING);
    const length = socket.peek(bytes);
    const end = bytes.indexOf(0x0a) + 1;
    // There may be more to come.
    if (!hasLeft && end === 0 && length >= 0 && length < MAX_GREETING) return;
    this.#greeting.delete(socket);
    const words = /^CONNECT +(\d{1,10}) *\r?\n$/i.exec(new TextDecoder().decode(bytes.subarray(0, end)));
    const guestPort = Number(words?.[1] ?? Infinity);
    if (hasLeft || guestPort > 0xffff_ffff) return socket[Symbol.dispose]();
    socket.receive(bytes.subarray(0, end));
    const connection = this.#add(socket, { guestPort, hostPort: this.#takeHostPort(guestPort) }, false);
    this.#reply(OP.request, connection);
  }

  #takeHostPort(guestPort: number): number {
    while (true) {
      const hostPort = this.#nextHostPort;
      this.#nextHostPort = hostPort === LAST_HOST_PORT ? FIRST_HOST_PORT : hostPort + 1;
      if (!this.#connections.has(keyOf({ guestPort, hostPort }))) return hostPort;
    }
  }

  #add(
    socket: UnixSocket,
    ports: { readonly guestPort: number; readonly hostPort: number },
    isEstablished: boolean,
  ): Connection {
    const connection = new Connection(socket, ports.guestPort, ports.hostPort, isEstablished);
    this.#connections.set(keyOf(ports), connection);
    socket.onChange = (hasLeft) =>
      this.#work(() => {
        connection.hasLeft ||= hasLeft;
        // Nobody waits any more for the guest's answer.
        if (hasLeft && !connection.isEstablished) return this.#abort(connection);
        connection.flush();
        this.#afterOutput(connection);
        if (connection.isReadable) this.#receivable.add(connection);
      });
    return connection;
  }

  #abort(connection: Connection): void {
    // A request that waits for a guest that hangs is taken back.
    const isKnown = !this.#replies.some((reply) =>
      reply.connection === connection && reply.op === OP.request
    );
    this.#remove(connection);
    if (isKnown) this.#reply(OP.reset, connection);
  }

  #remove(connection: Connection): void {
    this.#forget(connection);
    connection.socket[Symbol.dispose]();
  }

  #forget(connection: Connection): void {
    this.#connections.delete(keyOf(connection));
    this.#receivable.delete(connection);
    this.#replies = this.#replies.filter((reply) => reply.connection !== connection);
  }
}

/** A stream. Counts are modulo 2^32, as in packets. */
class Connection {
  /** The host's end; closed when neither direction is of use. */
  readonly socket: UnixSocket;
  readonly guestPort: number;
  readonly hostPort: number;
  /** Whether both ends agree that there is a stream. */
  isEstablished: boolean;
  /** Whether the host has closed its end; what it sent before may still have to be read. */
  hasLeft = false;
  /** Whether the host takes no more. */
  isDeaf = false;
  /** What the guest has said that it will not do any more. */
  guestShutdown = 0;
  /** What the guest was told that the host will not do any more. */
  hostShutdown = 0;
  /** Bytes that the host has taken from the guest, and how many of them the guest was told of. */
  forwarded = 0;
  toldForwarded = 0;
  isUpdateDue = false;
  /** Bytes given to the guest, how many of them it has taken, and how many it has room for. */
  given = 0;
  taken = 0;
  bufferSize = 0;
  isCreditAsked = false;
  /** What waits until the host takes it. */
  output: Uint8Array<ArrayBuffer> = new Uint8Array(0);
  #buffer: Uint8Array<ArrayBuffer> | undefined;
  #hasEnded = false;

  constructor(socket: UnixSocket, guestPort: number, hostPort: number, isEstablished: boolean) {
    this.socket = socket;
    this.guestPort = guestPort;
    this.hostPort = hostPort;
    this.isEstablished = isEstablished;
  }

  /** Whether the host may send something that the guest wants. */
  get isReadable(): boolean {
    return this.isEstablished && (this.guestShutdown & SHUTDOWN_RECEIVE) === 0 &&
      (this.hostShutdown & SHUTDOWN_SEND) === 0;
  }

  /** How many bytes may be given to the guest. Counts wrap; a guest that lies has no credit. */
  get credit(): number {
    return this.bufferSize - ((this.given - this.taken) >>> 0);
  }

  /** Sends bytes to the host, and keeps those that it does not take yet: there must be room. */
  write(bytes: Uint8Array<ArrayBuffer>): void {
    const sent = this.output.length === 0 ? this.#send(bytes) : 0;
    if (sent === bytes.length) return;
    this.#buffer ??= new Uint8Array(BUFFER_SIZE);
    let end = this.output.byteOffset + this.output.length;
    if (this.output.length === 0 || end + bytes.length - sent > BUFFER_SIZE) {
      this.#buffer.set(this.output);
      end = this.output.length;
    }
    this.#buffer.set(bytes.subarray(sent), end);
    this.output = this.#buffer.subarray(end - this.output.length, end + bytes.length - sent);
  }

  /** Tells the host that no more comes, once: each call is a change that the socket tells. */
  end(): void {
    if (!this.#hasEnded) this.socket.shutdown("send");
    this.#hasEnded = true;
  }

  /** Sends what waits, as far as the host takes it. */
  flush(): void {
    if (this.output.length === 0) return;
    this.output = this.output.subarray(this.#send(this.output));
    if (this.output.length > 0) return;
    this.output = new Uint8Array(0);
    this.#buffer = undefined;
  }

  #send(bytes: Uint8Array<ArrayBuffer>): number {
    const sent = this.isDeaf ? -1 : this.socket.send(bytes);
    if (sent < 0) this.isDeaf = true;
    // What nobody takes is gone.
    const length = sent < 0 ? bytes.length : sent;
    this.forwarded = (this.forwarded + length) >>> 0;
    return length;
  }
}

/** What a {@linkcode VhostVsockDevice} is given. */
export interface VhostVsockOptions {
  /** The guest's address, at least 3, which no other guest of the host has. */
  readonly guestCid: number;
  /** Watches for the guest's faults. */
  readonly watcher: Watcher;
}

/** Streams by way of the host's kernel, whose sockets of the family AF_VSOCK reach the guest. */
export class VhostVsockDevice implements VirtioDevice {
  /** See {@linkcode VirtioDevice.type}. */
  readonly type: number = VIRTIO_DEVICE.vsock;
  /** See {@linkcode VirtioDevice.features}. */
  readonly features = 0n;
  /** See {@linkcode VirtioDevice.queueSizes}. */
  readonly queueSizes: readonly number[] = QUEUE_SIZES;
  /** See {@linkcode VirtioDevice.config}: the guest's address. */
  readonly config: Uint8Array<ArrayBuffer>;
  readonly #vhost: Vhost;
  readonly #watcher: Watcher;
  readonly #fault: Fd;
  #context: DeviceContext | undefined;
  #isResetDue = false;
  #started: Virtqueue[] = [];

  /**
   * Opens `/dev/vhost-vsock`.
   *
   * @param options Address
   * @throws {SysError} If it is absent, or this process may not use it, or another guest has the address
   */
  constructor(options: VhostVsockOptions) {
    this.config = configOf(options.guestCid);
    this.#watcher = options.watcher;
    this.#vhost = new Vhost("/dev/vhost-vsock");
    try {
      this.#vhost.setVsockCid(options.guestCid);
      this.#fault = Fd.event();
    } catch (error) {
      this.#vhost[Symbol.dispose]();
      throw error;
    }
    this.#watcher.watch(this.#fault, () => {
      this.#fault.drain();
      this.#context?.fail(new VirtqueueError("vhost-vsock met a buffer that it cannot use"));
    });
  }

  /**
   * See {@linkcode VirtioDevice.activate}.
   *
   * @param context What to work with
   */
  activate(context: DeviceContext): void {
    this.#context = context;
    const rings = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX;
    const queues = [context.queues[RX_QUEUE], context.queues[TX_QUEUE]];
    try {
      this.#vhost.setFeatures(context.features & rings);
      this.#vhost.setMemory(context.memory);
      for (const queue of queues) {
        if (!queue?.isReady) throw new VirtqueueError("a driver of a socket does without a queue");
        this.#vhost.setQueue(context.memory, queue, {
          kick: context.takeNotifyEvent(queue),
          call: context.interruptEvent(queue),
          error: this.#fault,
        });
        this.#started.push(queue);
      }
      this.#vhost.setVsockRunning(true);
    } catch (error) {
      context.fail(error);
    }
  }

  /** Tells the guest that its streams are gone, as {@linkcode VsockDevice.resetTransport} does. */
  resetTransport(): void {
    this.#isResetDue = true;
    this.notify();
  }

  /** See {@linkcode VirtioDevice.notify}: the queue of events is the one that the kernel does not serve. */
  notify(): void {
    const context = this.#context;
    if (!context || !this.#isResetDue) return;
    try {
      this.#isResetDue = !tellTransportReset(context);
    } catch (error) {
      context.fail(error);
    }
  }

  /** See {@linkcode VirtioDevice.reset}. */
  reset(): void {
    if (!this.#context) return;
    this.#context = undefined;
    this.#isResetDue = false;
    this.#vhost.setVsockRunning(false);
    for (const { index } of this.#started) this.#vhost.clearQueue(index);
    this.#started = [];
  }

  /** Ends it. */
  [Symbol.dispose](): void {
    if (this.#fault.isClosed) return;
    this.reset();
    this.#vhost[Symbol.dispose]();
    this.#watcher.unwatch(this.#fault);
    this.#fault[Symbol.dispose]();
  }
}

/** Tells the guest that its streams are gone; false if it has no buffer for that. */
function tellTransportReset(context: DeviceContext): boolean {
  const queue = context.queues[EVENT_QUEUE];
  let isTold = false;
  if (!queue?.isReady) return false;
  drainQueue(context, queue, ({ readable, writable }) => {
    if (isTold) return undefined;
    const bytes = new Uint8Array(Uint32Array.of(EVENT_TRANSPORT_RESET).buffer);
    if (readable.length > 0 || totalLength(writable) < bytes.length) {
      throw new VirtqueueError("a buffer for events of a socket is too small");
    }
    fillSegments(context.memory.bytes, writable, bytes);
    isTold = true;
    return bytes.length;
  });
  return isTold;
}

function configOf(guestCid: number): Uint8Array<ArrayBuffer> {
  // 0 to 2 and the last one have meanings of their own.
  if (!Number.isInteger(guestCid) || guestCid < 3 || guestCid >= 0xffff_ffff) {
    throw new RangeError(`Cannot give a guest the socket address ${guestCid}: use one from 3 to 4294967294`);
  }
  return new Uint8Array(BigUint64Array.of(BigInt(guestCid)).buffer);
}

function keyOf({ guestPort, hostPort }: { readonly guestPort: number; readonly hostPort: number }): string {
  return `${guestPort} ${hostPort}`;
}

function readHeader(view: DataView): Header {
  return {
    sourceCid: view.getBigUint64(0, true),
    destinationCid: view.getBigUint64(8, true),
    guestPort: view.getUint32(16, true),
    hostPort: view.getUint32(20, true),
    length: view.getUint32(24, true),
    type: view.getUint16(28, true),
    op: view.getUint16(30, true),
    flags: view.getUint32(32, true),
    bufferSize: view.getUint32(36, true),
    forwarded: view.getUint32(40, true),
  };
}
