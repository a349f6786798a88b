/**
 * Unix sockets that devices lead to, without waiting: what devices see of them, and the ones that need nothing but Deno, so
 * that they work wherever it has Unix sockets. (`unix_socket.ts` has those of Linux, which need no memory of their own.)
 *
 * @module
 */

/** A connected socket. One that was closed is as one whose peer has left. */
export interface StreamSocket extends Disposable {
  /** Called once for all that has changed: there is more to receive, there is room to send, or the peer has left. */
  onChange: (hasLeft: boolean) => void;
  /**
   * Takes what has arrived.
   *
   * @param target Where to, not empty
   * @returns How many bytes; 0 where nothing has arrived, -1 where nothing more will
   */
  receive(target: Uint8Array<ArrayBuffer>): number;
  /**
   * Sends what there is room for.
   *
   * @param bytes What to send, not empty; it is lent until this returns
   * @returns How many bytes went; -1 where the peer takes none any more
   */
  send(bytes: Uint8Array<ArrayBuffer>): number;
}

/** A socket that clients connect to. Its file goes when it is disposed. */
export interface StreamListener extends Disposable {
  /** Called when there may be a client. */
  onChange: (hasLeft: boolean) => void;
  /**
   * Takes the next client.
   *
   * @returns Its socket, or undefined where there is none
   */
  accept(): StreamSocket | undefined;
}

/** Makes sockets, and closes them all in the end. */
export interface StreamSockets extends Disposable {
  /**
   * Listens for clients, who must be of the same user. Replaces a socket on which nobody listens any more.
   *
   * @param path Path of the socket
   * @returns The listener
   * @throws {Error} If somebody listens there, or another kind of file is there
   */
  listen(path: string): StreamListener | Promise<StreamListener>;
}

/** Most bytes of each buffer: one for what has arrived, two by turns for what is to go. */
const BUFFER_SIZE = 65_536;
/** Most bytes of a socket's path: `sockaddr_un` of Linux has room for 107, and that of BSD systems for 103. */
const MAX_PATH = Deno.build.os === "linux" ? 107 : 103;
/** How often it is looked whether the peer is still there, where nothing is read that would tell, in milliseconds. */
const LOOK_INTERVAL = 100;
/** How long no client is taken after one could not be, in milliseconds. */
const RETRY_TIME = 100;
const NOTHING = new Uint8Array();

/** Unix sockets of Deno. The memory of each is bounded, whatever its peer and the guest do. */
export class PortableSockets implements StreamSockets {
  readonly #open = new Set<Disposable>();
  #closed: Promise<unknown> = Promise.resolve();

  /** See {@linkcode StreamSockets.listen}. */
  async listen(path: string): Promise<StreamListener> {
    if (new TextEncoder().encode(path).length > MAX_PATH) {
      throw new Error(
        `Cannot use the socket "${path}" as its path has more than ${MAX_PATH} bytes: use a directory with a shorter path`,
      );
    }
    await this.#closed;
    const listener: Listener = new Listener(await bind(path), path, this.#open, () => {
      this.#closed = Promise.all([this.#closed, listener.closed]);
    });
    return listener;
  }

  /** Closes all sockets; what was to be sent is still sent. */
  [Symbol.dispose](): void {
    for (const each of [...this.#open]) each[Symbol.dispose]();
  }
}

async function bind(path: string): Promise<Deno.UnixListener> {
  try {
    return listenPrivately(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.AddrInUse)) throw listenError(path, error);
    if (!(await isStale(path))) {
      throw new Error(
        `Cannot listen on "${path}" as another process does, or another kind of file is there: ` +
          `end that process, or remove the file`,
        { cause: error },
      );
    }
    removeFile(path);
    try {
      return listenPrivately(path);
    } catch (error) {
      throw listenError(path, error);
    }
  }
}

/** Nobody else can connect: meanwhile the supervisor's umask sees to that, which is no thread's own to change. */
function listenPrivately(path: string): Deno.UnixListener {
  const listener = Deno.listen({ transport: "unix", path });
  try {
    Deno.chmodSync(path, 0o600);
    return listener;
  } catch (error) {
    listener.close();
    throw error;
  }
}

function listenError(path: string, cause: unknown): Error {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new Error(`Cannot listen on "${path}" as ${reason}: give a path in a folder that can be written`, {
    cause,
  });
}

/** Whether a file is a socket on which nobody listens. */
async function isStale(path: string): Promise<boolean> {
  try {
    if (!(await Deno.lstat(path)).isSocket) return false;
    (await Deno.connect({ transport: "unix", path })).close();
    return false;
  } catch (error) {
    return error instanceof Deno.errors.ConnectionRefused;
  }
}

function removeFile(path: string): void {
  try {
    Deno.removeSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

class Listener implements StreamListener {
  onChange: (hasLeft: boolean) => void = () => {};
  /** Settles when nobody can connect any more, where it was disposed: Deno removes the file only then. */
  closed: Promise<void>;
  readonly #listener: Deno.UnixListener;
  readonly #path: string;
  readonly #open: Set<Disposable>;
  readonly #onClose: () => void;
  #next: Deno.UnixConn | undefined;
  #lingering: Socket | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #isClosed = false;

  constructor(listener: Deno.UnixListener, path: string, open: Set<Disposable>, onClose: () => void) {
    this.#listener = listener;
    this.#path = path;
    this.#open = open;
    this.#onClose = onClose;
    open.add(this);
    this.closed = this.#take();
  }

  accept(): StreamSocket | undefined {
    const connection = this.#next;
    if (!connection) return undefined;
    this.#next = undefined;
    this.closed = this.#take();
    const socket: Socket = new Socket(connection, () => {
      this.#open.delete(socket);
      if (!socket.isSending) return;
      // One at most, or peers that take nothing could make it any number.
      this.#lingering?.cut();
      this.#lingering = socket;
    });
    this.#open.add(socket);
    return socket;
  }

  [Symbol.dispose](): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#open.delete(this);
    clearTimeout(this.#timer);
    this.#next?.close();
    this.#listener.close();
    removeFile(this.#path);
    this.#onClose();
  }

  /** Takes one client ahead; all others wait in the kernel. */
  async #take(): Promise<void> {
    if (this.#isClosed) return;
    try {
      this.#next = await this.#listener.accept();
    } catch {
      // There may be no descriptors left for now.
      if (!this.#isClosed) this.#timer = setTimeout(() => this.closed = this.#take(), RETRY_TIME);
      return;
    }
    if (this.#isClosed) this.#next.close();
    else this.onChange(false);
  }
}

class Socket implements StreamSocket {
  onChange: (hasLeft: boolean) => void = () => {};
  readonly #connection: Deno.UnixConn;
  readonly #onClose: () => void;
  #isClosed = false;
  #hasLeft = false;

  /** What has arrived is from start to end; reads go behind it. */
  readonly #input = new Uint8Array(BUFFER_SIZE);
  #start = 0;
  #end = 0;
  #isReading = false;
  #hasEnded = false;

  /** Takes bytes while the other one is written. */
  #output = new Uint8Array(BUFFER_SIZE);
  #spare = new Uint8Array(BUFFER_SIZE);
  #queued = 0;
  #isWriting = false;
  #isFull = false;

  #isLooking = false;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(connection: Deno.UnixConn, onClose: () => void) {
    this.#connection = connection;
    this.#onClose = onClose;
    void this.#read();
  }

  /** Whether something waits to be taken by the peer. */
  get isSending(): boolean {
    return this.#isWriting;
  }

  receive(target: Uint8Array<ArrayBuffer>): number {
    if (this.#isClosed) return -1;
    const length = Math.min(target.length, this.#end - this.#start);
    if (length === 0) return this.#hasEnded ? -1 : 0;
    target.set(this.#input.subarray(this.#start, this.#start + length));
    this.#start += length;
    if (this.#start === this.#end) void this.#read();
    return length;
  }

  send(bytes: Uint8Array<ArrayBuffer>): number {
    if (this.#isClosed || this.#hasLeft) return -1;
    const length = Math.min(bytes.length, BUFFER_SIZE - this.#queued);
    this.#output.set(bytes.subarray(0, length), this.#queued);
    this.#queued += length;
    this.#isFull = length < bytes.length;
    if (!this.#isWriting) void this.#write();
    return length;
  }

  [Symbol.dispose](): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearTimeout(this.#timer);
    this.#onClose();
    // What was sent is the peer's, as it is where the kernel has it.
    if (!this.#isWriting) this.#connection.close();
  }

  /** Gives up what the peer has not taken, once it is disposed. */
  cut(): void {
    if (!this.#isWriting) return;
    this.#isWriting = false;
    this.#connection.close();
  }

  /** Reads as long as there is room. */
  async #read(): Promise<void> {
    if (this.#isReading) return;
    this.#isReading = true;
    while (!this.#isClosed && !this.#hasEnded) {
      if (this.#start === this.#end) this.#start = this.#end = 0;
      if (this.#end === BUFFER_SIZE) break;
      const count = await this.#connection.read(this.#input.subarray(this.#end)).catch(() => null);
      if (count === null) this.#hasEnded = true;
      else this.#end += count;
      if (!this.#isClosed) this.onChange(this.#hasLeft);
    }
    this.#isReading = false;
    void this.#look();
  }

  /** Writes all that there is, and closes what was disposed meanwhile. */
  async #write(): Promise<void> {
    this.#isWriting = true;
    while (this.#queued > 0 && !this.#hasLeft) {
      const bytes = this.#output.subarray(0, this.#queued);
      [this.#output, this.#spare] = [this.#spare, this.#output];
      this.#queued = 0;
      // Not from within the call that found no room.
      if (this.#isFull) queueMicrotask(() => this.#isClosed || this.onChange(false));
      this.#isFull = false;
      try {
        for (let at = 0; at < bytes.length;) at += await this.#connection.write(bytes.subarray(at));
      } catch {
        this.#leave();
      }
    }
    // It was cut otherwise.
    if (this.#isClosed && this.#isWriting) this.#connection.close();
    this.#isWriting = false;
  }

  /**
   * Looks whether the peer is still there where reads do not tell, as it sends no more or more than there is room for: a
   * peer that has left cannot be written to, not even nothing.
   */
  async #look(): Promise<void> {
    if (this.#isLooking) return;
    this.#isLooking = true;
    while (!this.#isClosed && !this.#hasLeft && !this.#isReading) {
      try {
        // What is written will tell.
        if (!this.#isWriting) await this.#connection.write(NOTHING);
      } catch {
        this.#leave();
        break;
      }
      if (this.#isClosed) break;
      await new Promise<void>((resolve) => this.#timer = setTimeout(resolve, LOOK_INTERVAL));
    }
    this.#isLooking = false;
  }

  #leave(): void {
    if (this.#hasLeft) return;
    this.#hasLeft = true;
    this.#queued = 0;
    if (!this.#isClosed) this.onChange(true);
  }
}
