/**
 * Unix sockets that devices lead to, without waiting: many are watched as one.
 *
 * @module
 */

import { check, cString, errno, Fd, libc, sysError } from "../../ffi/mod.ts";
import type { Watcher } from "./virtio_device.ts";

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
export abstract class WatchedSocket implements Disposable {
  /** The descriptor. */
  readonly fd: Fd;
  /** Called once for all that has changed: there is more to receive, there is room to send, or the peer has left. */
  onChange: (hasLeft: boolean) => void = () => {};
  readonly #forget: () => void;

  /**
   * Takes over a descriptor; a {@linkcode SocketSet} makes one.
   *
   * @param fd The descriptor
   * @param watch Begins to watch, and returns what ends that
   */
  constructor(fd: Fd, watch: (watched: WatchedSocket) => () => void) {
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
export class UnixSocket extends WatchedSocket {
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
export class UnixListener extends WatchedSocket {
  readonly #path: string;
  readonly #watch: (watched: WatchedSocket) => () => void;

  /**
   * Takes over a descriptor; {@linkcode SocketSet.listen} makes one.
   *
   * @param fd The descriptor
   * @param path Its file
   * @param watch Begins to watch, and returns what ends that
   */
  constructor(fd: Fd, path: string, watch: (watched: WatchedSocket) => () => void) {
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
  readonly #watched = new Map<number, WatchedSocket>();
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

  readonly #watch = (watched: WatchedSocket): () => void => {
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
