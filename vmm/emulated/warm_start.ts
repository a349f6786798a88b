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

/**
 * A program for the guest, which lets the random numbers of its kernel begin anew from its pool: `ioctl(0, RNDRESEEDCRNG)`
 * (Linux 6.1 `include/uapi/linux/random.h`). Two machines that go on from the same state would draw the same otherwise.
 */
const RESEED: Uint8Array<ArrayBuffer> = fromHex(
  // ELF header for i386: entry 0x10054, one program header at 52.
  "7f454c46 01010100 00000000 00000000 02000300 01000000 54000100 34000000",
  "00000000 00000000 34002000 01000000 00000000",
  // Load the whole file at 0x10000, to read and execute.
  "01000000 00000000 00000100 00000100 70000000 70000000 05000000 00100000",
  // mov eax, 54; xor ebx, ebx; mov ecx, 0x5207; int 0x80
  "b836000000 31db b907520000 cd80",
  // mov ebx, eax; neg ebx; mov eax, 1; int 0x80; up to the size that the header says
  "89c3 f7db b801000000 cd80 909090",
);

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
    const encoder = new TextEncoder();
    const macs = configuration.networkInterfaces.map(({ guestMac }) => guestMac ?? "").join("\n");
    const seed = crypto.getRandomValues(new Uint8Array(SEED_SIZE));
    const personal = cpioArchive([
      { path: "/hypertopia/personal/clock", mode: 0o600, content: encoder.encode(`@${now()}`) },
      { path: "/hypertopia/personal/macs", mode: 0o600, content: encoder.encode(`${macs}\n`) },
      { path: "/hypertopia/personal/reseed", mode: 0o700, content: RESEED },
      { path: "/hypertopia/personal/seed", mode: 0o600, content: seed },
    ]);
    for (const archive of [await Deno.readFile(warmStart.config), personal]) {
      await this.#send(encoder.encode(`${archive.length}\n`));
      await this.#send(archive);
    }
    await this.#send(encoder.encode("0\n"));
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

function fromHex(...lines: readonly string[]): Uint8Array<ArrayBuffer> {
  const digits = lines.join("").replaceAll(" ", "");
  return Uint8Array.from(
    { length: digits.length / 2 },
    (_, at) => parseInt(digits.slice(2 * at, 2 * at + 2), 16),
  );
}

/** Seconds since 1970. */
function now(): number {
  return Math.round(Date.now() / 1000);
}
