/**
 * Machines that boot in two steps: first to where all of a kind are the same, which is saved for the next of them, then to
 * what the one machine is.
 *
 * @module
 */

import { MachineError } from "../errors.ts";
import { cpioArchive } from "../images/cpio.ts";
import type { BootableConfiguration, WarmNic, WarmStart } from "../supervisor/config.ts";

/** What a guest says on its control line when it knows nothing of itself yet (see `vmm/guest/init.ts`). */
export const TEMPLATE_MARK = "hypertopia: template";
/** Word for the kernel of a guest that is to say so. */
export const TEMPLATE_WORD = "hypertopia.template";
/** What a guest says, with the reason, that could not become what it is to be. */
const REFUSAL = /hypertopia: refused ([ -~]*)\n/;
/** How long a guest may take to boot so far, in milliseconds. */
const BOOT_TIMEOUT = 300_000;
/** How long a guest that was there already may take to say that it has understood, in milliseconds. */
const ANSWER_TIMEOUT = 60_000;
const SEED_SIZE = 64;
/** Size of the header before each name in an archive. */
const CPIO_HEADER = 110;
const [EAX, ECX, EDX, EBX] = [0, 1, 2, 3];
const SYSCALL = { exit: 1, write: 4, open: 5, ioctl: 54, socket: 359, clockSettime64: 404 } as const;
const [AF_INET, SOCK_DGRAM, ARPHRD_ETHER] = [2, 2, 1];
const SIOCADDRT = 0x890b;
const SIOCSIFFLAGS = 0x8914;
const SIOCSIFADDR = 0x8916;
const SIOCSIFNETMASK = 0x891c;
const SIOCSIFHWADDR = 0x8924;
const [IFF_UP, IFF_BROADCAST, IFF_MULTICAST] = [1, 2, 0x1000];
const [RTF_UP, RTF_GATEWAY] = [1, 2];
const RNDRESEEDCRNG = 0x5207;
const BLKRRPART = 0x125f;
const BLKFLSBUF = 0x1261;
/** Size of the headers of a program, in bytes. */
const HEADER_SIZE = 84;

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
    const macs = configuration.networkInterfaces.map(({ guestMac }) => guestMac);
    const archive = joinArchives(
      await Deno.readFile(warmStart.config),
      cpioArchive([{
        path: "/hypertopia/personal/wake",
        mode: 0o700,
        content: wakeProgram(macs, warmStart.nics, configuration.drives.length),
      }]),
    );
    // A guest that refuses need not have read all of it; why it cannot be sent is no better a reason.
    send(this.#connection, archive).catch(() => {});
    await this.#waitFor("hypertopia: personal", ANSWER_TIMEOUT, "take what tells it from others");
  }

  /** Leaves the line to others. */
  [Symbol.dispose](): void {
    if (!this.#isClosed) this.#connection.close();
    this.#isClosed = true;
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
        const refusal = REFUSAL.exec(this.#text)?.[1];
        if (refusal !== undefined) throw new Error(refusal);
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

async function send(connection: Deno.UnixConn, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) at += await connection.write(bytes.subarray(at));
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
 * A program for the guest, which wakes up as another machine, or as none: it configures the NICs, forgets what was read
 * of other disks and reads the partition tables of its own, sets the clock, adds a seed to the kernel's pool, and lets its
 * random numbers begin anew from there (Linux 6.1 `arch/x86/entry/syscalls/syscall_32.tbl`,
 * `include/uapi/linux/{sockios,if,route,fs,random}.h`). As a NIC's permanent
 * hardware address, a guest that stays in its initramfs goes on to show that of the machine that had booted so far: only a
 * driver that starts reads it.
 */
function wakeProgram(
  macs: readonly (string | undefined)[],
  nics: readonly WarmNic[],
  diskCount: number,
): Uint8Array<ArrayBuffer> {
  const base = 0x1_0000;
  const milliseconds = Date.now();
  const data: number[] = [];
  /** Lays something into the program, and gives its address. */
  const lay = (bytes: Iterable<number>): number => {
    const address = base + HEADER_SIZE + data.length;
    data.push(...bytes);
    return address;
  };
  const time = lay(words(Math.floor(milliseconds / 1000), 0, milliseconds % 1000 * 1_000_000, 0));
  const layPath = (path: string) => lay(new TextEncoder().encode(`${path}\0`));
  const seed = lay(crypto.getRandomValues(new Uint8Array(SEED_SIZE)));
  const path = layPath("/dev/urandom");
  const disks = Array.from({ length: diskCount }, (_, index) => layPath(`/dev/${diskName(index)}`));
  // struct ifreq: name and value.
  const requests: [request: number, address: number][] = [];
  const configure = (request: number, index: number, value: readonly number[]) => {
    const name = new TextEncoder().encode(`eth${index}`.padEnd(16, "\0"));
    requests.push([request, lay([...name, ...value, ...Array(16 - value.length).fill(0)])]);
  };
  for (const [index, mac] of macs.entries()) {
    if (mac === undefined) continue;
    configure(SIOCSIFHWADDR, index, [ARPHRD_ETHER, 0, ...mac.split(":").map((each) => parseInt(each, 16))]);
  }
  for (const [index, { ip, prefix, gateway }] of nics.entries()) {
    const mask = [0, 8, 16, 24].map((at) => 256 - 2 ** Math.min(8, Math.max(0, 8 - prefix + at)));
    configure(SIOCSIFADDR, index, socketAddress(ip.split(".").map(Number)));
    configure(SIOCSIFNETMASK, index, socketAddress(mask));
    configure(SIOCSIFFLAGS, index, words(IFF_UP | IFF_BROADCAST | IFF_MULTICAST));
    // struct rtentry: padding, destination, gateway, mask, flags, and what is of no use here.
    const [any, via] = [socketAddress([0, 0, 0, 0]), socketAddress(gateway.split(".").map(Number))];
    const route = [...words(0), ...any, ...via, ...any, RTF_UP | RTF_GATEWAY, ...Array(31).fill(0)];
    if (index === 0) requests.push([SIOCADDRT, lay(route)]);
  }
  const code: number[] = [];
  const call = (number: number, ...moves: readonly (readonly [register: number, value: number])[]) => {
    // mov REGISTER, VALUE for each, mov eax, NUMBER; int 0x80
    for (const [register, value] of [...moves, [EAX, number] as const]) {
      code.push(0xb8 + register, ...words(value));
    }
    code.push(0xcd, 0x80);
  };
  const MOVE_RESULT_TO_EBX = [0x89, 0xc3];
  const OR_RESULT_TO_ESI = [0x09, 0xc6];
  call(SYSCALL.socket, [EBX, AF_INET], [ECX, SOCK_DGRAM], [EDX, 0]);
  code.push(...MOVE_RESULT_TO_EBX);
  for (const [request, address] of requests) {
    call(SYSCALL.ioctl, [ECX, request], [EDX, address]);
    code.push(...OR_RESULT_TO_ESI);
  }
  for (const disk of disks) {
    call(SYSCALL.open, [EBX, disk], [ECX, 0]);
    code.push(...MOVE_RESULT_TO_EBX);
    call(SYSCALL.ioctl, [ECX, BLKFLSBUF], [EDX, 0]);
    code.push(...OR_RESULT_TO_ESI);
    // The old table is forgotten even where this fails, as it does on a disk that is too small for a table.
    call(SYSCALL.ioctl, [ECX, BLKRRPART], [EDX, 0]);
  }
  call(SYSCALL.clockSettime64, [EBX, 0], [ECX, time]);
  code.push(...OR_RESULT_TO_ESI);
  call(SYSCALL.open, [EBX, path], [ECX, 1]);
  code.push(...MOVE_RESULT_TO_EBX);
  call(SYSCALL.write, [ECX, seed], [EDX, SEED_SIZE]);
  call(SYSCALL.ioctl, [ECX, RNDRESEEDCRNG], [EDX, 0]);
  // or esi, eax; neg esi; sbb ebx, ebx; neg ebx: 1 where anything failed.
  code.push(...OR_RESULT_TO_ESI, 0xf7, 0xde, 0x19, 0xdb, 0xf7, 0xdb);
  call(SYSCALL.exit);
  const size = HEADER_SIZE + data.length + code.length;
  // ELF header for i386, and one program header: the whole file, to read and execute.
  const entry = base + HEADER_SIZE + data.length;
  return new Uint8Array([
    ...[0x7f, 0x45, 0x4c, 0x46, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ...words(0x0003_0002, 1, entry, 52, 0, 0, 0x0020_0034, 1, 0),
    ...words(1, 0, base, base, size, size, 5, 0x1000),
    ...data,
    ...code,
  ]);
}

/** Name of a virtio disk in the guest (Linux 6.1 `virtblk_name_format()`). */
function diskName(index: number): string {
  const letters = "abcdefghijklmnopqrstuvwxyz";
  return index < 26 ? `vd${letters[index]}` : diskName(Math.floor(index / 26) - 1) + letters[index % 26];
}

/** A struct sockaddr_in without port. */
function socketAddress(address: readonly number[]): number[] {
  return [AF_INET, 0, 0, 0, ...address, ...Array(8).fill(0)];
}

/** 32-bit words in the processor's order. */
function words(...values: readonly number[]): number[] {
  return values.flatMap((value) => [value & 0xff, value >> 8 & 0xff, value >> 16 & 0xff, value >>> 24]);
}
