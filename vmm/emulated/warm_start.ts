/**
 * Machines that boot in two steps: first to where all of a kind are the same, which is saved for the next of them, then to
 * what the one machine is.
 *
 * @module
 */

import { MachineError } from "../errors.ts";
import { cpioArchive } from "../images/cpio.ts";
import type { BootableConfiguration, WarmStart } from "../supervisor/config.ts";

/** What a guest says on its control line when it knows nothing of itself yet (see `vmm/guest/init.ts`). */
export const TEMPLATE_MARK = "hypertopia: template";
/** Word for the kernel of a guest that is to say so. */
export const TEMPLATE_WORD = "hypertopia.template";
/** How long a guest may take to boot so far, in milliseconds. */
const BOOT_TIMEOUT = 300_000;
/** How long a guest that was there already may take to say that it has understood, in milliseconds. */
const ANSWER_TIMEOUT = 60_000;
const SEED_SIZE = 64;
/** Size of the header before each name in an archive. */
const CPIO_HEADER = 110;
const [EAX, ECX, EDX, EBX] = [0, 1, 2, 3];
const SYSCALL = { exit: 1, write: 4, open: 5, ioctl: 54, clockSettime64: 404 } as const;
const RNDRESEEDCRNG = 0x5207;
const CODE_SIZE = 76;

/** The control line of a guest that knows nothing of itself yet. */
export class TemplateLine implements Disposable {
  readonly #connection: Deno.UnixConn;
  readonly #decoder = new TextDecoder();
  #text = "";
  #isClosed = false;

  private constructor(connection: Deno.UnixConn) {
    this.#connection = connection;
  }

  /**
   * Connects to a guest.
   *
   * @param socket Path of its control line's socket
   * @returns The line
   */
  static async connect(socket: string): Promise<TemplateLine> {
    return new TemplateLine(await Deno.connect({ transport: "unix", path: socket }));
  }

  /** Waits until the guest has booted so far. */
  async waitForMark(): Promise<void> {
    await this.#waitFor(TEMPLATE_MARK, BOOT_TIMEOUT, "boot");
  }

  /**
   * Makes a guest what it is to be.
   *
   * @param configuration The machine
   * @param warmStart Where the guest's own part of its initramfs is
   */
  async personalize(configuration: BootableConfiguration, warmStart: WarmStart): Promise<void> {
    const macs = configuration.networkInterfaces.map(({ guestMac }) => guestMac ?? "").join("\n");
    const archive = joinArchives(
      await Deno.readFile(warmStart.config),
      cpioArchive([
        { path: "/hypertopia/personal/macs", mode: 0o600, content: new TextEncoder().encode(`${macs}\n`) },
        { path: "/hypertopia/personal/wake", mode: 0o700, content: wakeProgram() },
      ]),
    );
    await this.#send(new TextEncoder().encode("personal\n"));
    await this.#send(archive);
    await this.#waitFor("hypertopia: personal", ANSWER_TIMEOUT, "take what tells it from others");
  }

  /** Leaves the line to others. */
  [Symbol.dispose](): void {
    if (!this.#isClosed) this.#connection.close();
    this.#isClosed = true;
  }

  async #send(bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length;) at += await this.#connection.write(bytes.subarray(at));
  }

  async #waitFor(mark: string, timeout: number, action: string): Promise<void> {
    let isLate = false;
    const timer = setTimeout(() => {
      isLate = true;
      this[Symbol.dispose]();
    }, timeout);
    const buffer = new Uint8Array(4096);
    try {
      while (!this.#text.includes(`${mark}\n`)) {
        const count = await this.#connection.read(buffer);
        if (count === null) throw new Error("its control line was closed");
        this.#text = (this.#text + this.#decoder.decode(buffer.subarray(0, count), { stream: true })).slice(
          -4096,
        );
      }
      this.#text = "";
    } catch (cause) {
      const reason = isLate
        ? `it did not in ${timeout / 1000} s`
        : cause instanceof Error
        ? cause.message
        : String(cause);
      throw new MachineError(`The guest could not ${action}: ${reason}`, { cause });
    } finally {
      clearTimeout(timer);
    }
  }
}

/** Makes one archive of two: the first one's end is left out. */
function joinArchives(first: Uint8Array, second: Uint8Array): Uint8Array<ArrayBuffer> {
  const text = new TextDecoder("latin1").decode(first);
  const end = text.lastIndexOf("TRAILER!!!") - CPIO_HEADER;
  const whole = new Uint8Array(end + second.length);
  whole.set(first.subarray(0, end));
  whole.set(second, end);
  return whole;
}

/**
 * A program for the guest, which wakes up with the clock and the random numbers of another machine, or of none: it sets the
 * clock, adds a seed to the kernel's pool, and lets its random numbers begin anew from there (Linux 6.1
 * `arch/x86/entry/syscalls/syscall_32.tbl`, `include/uapi/linux/random.h`).
 */
function wakeProgram(): Uint8Array<ArrayBuffer> {
  const base = 0x1_0000;
  const header = 84;
  const milliseconds = Date.now();
  const seed = crypto.getRandomValues(new Uint8Array(SEED_SIZE));
  const path = new TextEncoder().encode("/dev/urandom\0");
  const time = header + CODE_SIZE;
  const seedAt = time + 16;
  const pathAt = seedAt + SEED_SIZE;
  const size = pathAt + path.length;
  const bytes = new Uint8Array(size);
  const view = new DataView(bytes.buffer);
  // ELF header for i386, and one program header: the whole file, to read and execute.
  bytes.set([0x7f, 0x45, 0x4c, 0x46, 1, 1, 1]);
  const put = (at: number, ...words: readonly number[]) =>
    words.forEach((word, index) => view.setUint32(at + 4 * index, word, true));
  put(16, 0x0003_0002, 1, base + header, 52, 0, 0, 0x0020_0034, 1, 0);
  put(52, 1, 0, base, base, size, size, 5, 0x1000);
  put(time, Math.floor(milliseconds / 1000), 0, milliseconds % 1000 * 1_000_000);
  bytes.set(seed, seedAt);
  bytes.set(path, pathAt);
  const code: number[] = [];
  const call = (number: number, ...moves: readonly (readonly [register: number, value: number])[]) => {
    // mov REGISTER, VALUE for each, mov eax, NUMBER; int 0x80
    for (const [register, value] of [...moves, [EAX, number] as const]) {
      code.push(0xb8 + register, value & 0xff, value >> 8 & 0xff, value >> 16 & 0xff, value >> 24 & 0xff);
    }
    code.push(0xcd, 0x80);
  };
  call(SYSCALL.clockSettime64, [EBX, 0], [ECX, base + time]);
  call(SYSCALL.open, [EBX, base + pathAt], [ECX, 1]);
  // mov ebx, eax: the descriptor.
  code.push(0x89, 0xc3);
  call(SYSCALL.write, [ECX, base + seedAt], [EDX, SEED_SIZE]);
  call(SYSCALL.ioctl, [ECX, RNDRESEEDCRNG]);
  // mov ebx, eax; neg ebx: the status.
  code.push(0x89, 0xc3, 0xf7, 0xdb);
  call(SYSCALL.exit);
  if (code.length !== CODE_SIZE) throw new Error(`The program has ${code.length} bytes`);
  bytes.set(code, header);
  return bytes;
}
