/**
 * Machines of a stock kernel, for benchmarks and tests: ours, and QEMU's microvm with the same kernel and initramfs.
 *
 * @module
 */

import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { debianBuilder } from "../stdlib/mod.ts";
import { joinFiles } from "../vmm/machine_files.ts";
import { probeKvm } from "../vmm/kvm/probe.ts";
import { buildInitramfs, cpioArchive, guestConfigFiles, hostPaths } from "../vmm/mod.ts";
import {
  configurationJson,
  DEFAULT_CONFIGURATION,
  type MachineConfiguration,
} from "../vmm/supervisor/config.ts";

/** How often a console is looked at, in milliseconds. */
const TICK = 20;
/** How long a guest may take, in milliseconds: benchmarks run in emulated machines too. */
const TIMEOUT = 300_000;
/** What a guest's command prints first, with the seconds since its kernel began. */
export const MARK: RegExp = /user space runs after ([\d.]+) s/;
/** Words for both kernels: no messages, and a control line that is not there, so that the shell gets the console. */
const COMMON_WORDS = "quiet panic=-1 hypertopia.control=hvc1";

/** What a machine is made of. */
export interface LabMachineOptions {
  /** vCPUs. */
  readonly cpus: number;
  /** Memory in MiB. */
  readonly memory: number;
  /** Path of a raw disk. */
  readonly disk?: string;
  /** Path of a kernel; the kit's unless told. */
  readonly kernel?: string;
}

/** Kernel, initramfs, and a folder for everything else. */
export class LabKit implements AsyncDisposable {
  /** The folder. */
  readonly folder: string;
  /** Path of the kernel. */
  readonly kernel: string;
  /** Path of the initramfs. */
  readonly initramfs: string;
  #count = 0;

  private constructor(folder: string, kernel: string) {
    this.folder = folder;
    this.kernel = kernel;
    this.initramfs = join(folder, "initramfs");
  }

  /**
   * Prepares the files of machines, unless none can run here, which it says on standard error.
   *
   * @param bench Name of the benchmark
   * @param command What the guest runs after it has printed {@linkcode MARK}
   * @param flavour Which of Debian's kernels
   * @param programs Programs for the guest, by path
   * @returns The files; undefined where no stock kernel runs
   */
  static async prepare(
    bench: string,
    command = "",
    flavour: "cloud" | "generic" = "cloud",
    programs: Readonly<Record<string, Uint8Array>> = {},
  ): Promise<LabKit | undefined> {
    const { isUsable, detail } = probeKvm();
    if (!isUsable) {
      const text = `Cannot measure "${bench}" as no stock kernel runs here: ${detail}\n`;
      Deno.stderr.writeSync(new TextEncoder().encode(text));
      return undefined;
    }
    const context = { cache: hostPaths().cache, signal: new AbortController().signal, report() {} };
    const image = await debianBuilder.build(
      { type: "debian", suite: "bookworm", flavour },
      context,
    );
    const kit = new LabKit(await Deno.makeTempDir({ prefix: "ht-" }), image.kernel!.kernel);
    const common = await buildInitramfs(image.kernel!, image.busybox!, image.modules, context);
    const own = join(kit.folder, "config.cpio");
    const files = Object.entries(programs).map(([path, content]) => ({ path, content, mode: 0o755 }));
    const guest = { hostname: "bench", environment: {}, nics: [], mounts: [], files };
    const script = `exec >/dev/console 2>&1
read -r uptime rest </proc/uptime
echo "user space runs after $uptime s"
${command}`;
    await Deno.writeFile(own, cpioArchive(guestConfigFiles({ ...guest, command: script })));
    await joinFiles([common, own], kit.initramfs);
    return kit;
  }

  /** Removes the folder. */
  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }

  /**
   * Gives a machine a folder.
   *
   * @returns Its path
   */
  makeFolder(): string {
    const folder = join(this.folder, String(this.#count++));
    Deno.mkdirSync(folder);
    return folder;
  }

  /**
   * Writes the configuration file of a machine of ours.
   *
   * @param folder The machine's folder, which gets its console
   * @param options What it is made of
   * @returns Path of the file
   */
  writeConfiguration(folder: string, { cpus, memory, disk, kernel }: LabMachineOptions): string {
    const configuration: MachineConfiguration = {
      ...DEFAULT_CONFIGURATION,
      machine: { ...DEFAULT_CONFIGURATION.machine, vcpuCount: cpus, memSizeMib: memory },
      bootSource: {
        kernelImagePath: kernel ?? this.kernel,
        initrdPath: this.initramfs,
        bootArgs: `console=hvc0 8250.nr_uarts=0 pci=noearly ${COMMON_WORDS}`,
      },
      drives: disk === undefined ? [] : [{
        id: "disk",
        pathOnHost: disk,
        isRootDevice: false,
        isReadOnly: false,
        cacheType: "Writeback",
        ioEngine: "Sync",
        format: "raw",
      }],
      hypertopia: {
        ...DEFAULT_CONFIGURATION.hypertopia,
        console: { socket: join(folder, "console.sock"), log: join(folder, "console.log") },
      },
    };
    const path = join(folder, "config.json");
    Deno.writeTextFileSync(path, JSON.stringify(configurationJson.print(configuration)));
    return path;
  }

  /**
   * Starts a machine of ours in a supervisor of its own.
   *
   * @param options What it is made of; without them the supervisor waits for its client
   * @returns The machine
   */
  startOurs(options?: LabMachineOptions): LabMachine {
    const folder = this.makeFolder();
    const file = options ? ["--config-file", this.writeConfiguration(folder, options)] : [];
    return this.startSupervisor(folder, ["--api-sock", join(folder, "api.sock"), ...file]);
  }

  /**
   * Starts a supervisor as the engine does.
   *
   * @param folder Its folder
   * @param args Its arguments
   * @returns The machine, where it has one
   */
  startSupervisor(folder: string, args: readonly string[]): LabMachine {
    const program = fileURLToPath(new URL("../vmm/supervisor/main.ts", import.meta.url));
    const log = ["--log-path", join(folder, "log")];
    return new LabMachine(folder, Deno.execPath(), [
      ...["run", "-A", "--no-config", "--no-lock", program, ...args, ...log],
    ]);
  }

  /**
   * Starts a microvm of QEMU's with what makes it fast (QEMU 7.2, `docs/system/i386/microvm.rst`): neither PIC, PIT nor
   * option ROMs, and a serial console, which boots no slower than a virtio console and needs no driver.
   *
   * @param options What it is made of; without them it stops before it runs
   * @returns The machine
   */
  startQemu(options?: LabMachineOptions): LabMachine {
    const folder = this.makeFolder();
    const { cpus, memory, disk } = options ?? { cpus: 1, memory: 128 };
    const hasPci = disk !== undefined;
    const machine = `microvm,acpi=on,rtc=on,pic=off,pit=off,x-option-roms=off,memory-backend=ram,pcie=${
      hasPci ? "on" : "off"
    }`;
    const words = `console=ttyS0 8250.nr_uarts=1 ${hasPci ? "pci=noearly" : "pci=off"} ${COMMON_WORDS}`;
    return new LabMachine(folder, "qemu-system-x86_64", [
      ...["-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", String(cpus), "-m", String(memory)],
      // Guest memory of both is shared memory, and so not part of the anonymous memory of either.
      ...["-object", `memory-backend-memfd,id=ram,size=${memory}M,share=on`],
      ...["-nodefaults", "-no-user-config", "-display", "none"],
      ...["-serial", `file:${join(folder, "console.log")}`],
      ...["-kernel", this.kernel, "-initrd", this.initramfs, "-append", words],
      ...(disk === undefined ? [] : [
        ...["-drive", `if=none,id=disk,file=${disk},format=raw,cache=writeback`],
        ...["-device", "virtio-blk-pci,drive=disk"],
      ]),
      ...(options ? [] : ["-S", "-qmp", `unix:${join(folder, "api.sock")},server=on,wait=off`]),
    ]);
  }
}

/** A process that runs a machine. Disposing it kills it. */
export class LabMachine implements AsyncDisposable {
  /** Its folder, with `api.sock` and `console.log`. */
  readonly folder: string;
  readonly #child: Deno.ChildProcess;
  readonly #started: number;
  #hasEnded = false;

  /**
   * Starts a process.
   *
   * @param folder Its folder
   * @param program The program
   * @param args Its arguments
   */
  constructor(folder: string, program: string, args: string[]) {
    this.folder = folder;
    this.#started = performance.now();
    this.#child = new Deno.Command(program, { args, stdin: "null", stdout: "null", stderr: "inherit" })
      .spawn();
    void this.#child.status.then(() => this.#hasEnded = true);
  }

  /** Number of the process. */
  get pid(): number {
    return this.#child.pid;
  }

  /** Path of the socket of its API. */
  get api(): string {
    return join(this.folder, "api.sock");
  }

  /**
   * Waits until a look succeeds.
   *
   * @param look Gives undefined while it does not
   * @returns What the look gave, and when that was, in milliseconds since the process was started
   * @throws {Error} If the process ends first, or it takes too long
   */
  async until<T>(look: () => T | undefined | Promise<T | undefined>): Promise<{ value: T; time: number }> {
    for (;;) {
      const value = await look();
      const time = performance.now() - this.#started;
      if (value !== undefined) return { value, time };
      if (this.#hasEnded || time > TIMEOUT) {
        throw new Error(
          `Cannot measure process ${this.pid} as it ${this.#hasEnded ? "ended" : "takes too long"}`,
        );
      }
      await new Promise((resolve) => setTimeout(resolve, TICK));
    }
  }

  /**
   * Waits until the guest has printed something.
   *
   * @param pattern What
   * @param folder Folder of the machine, where the process has several
   * @returns What matched, and when, in milliseconds since the process was started
   */
  async printed(
    pattern: RegExp,
    folder: string = this.folder,
  ): Promise<{ value: RegExpMatchArray; time: number }> {
    const path = join(folder, "console.log");
    return await this.until(() => {
      try {
        return Deno.readTextFileSync(path).match(pattern) ?? undefined;
      } catch (error) {
        if (error instanceof Deno.errors.NotFound) return undefined;
        throw error;
      }
    });
  }

  /**
   * Reads how much of its memory is resident.
   *
   * @returns Anonymous memory, and pages of files, in MiB; guest memory is neither
   */
  resident(): { anonymous: number; files: number } {
    const text = Deno.readTextFileSync(`/proc/${this.pid}/status`);
    const read = (name: string) => Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(text)![1]) / 1024;
    return { anonymous: read("RssAnon"), files: read("RssFile") };
  }

  /** Kills the process. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#hasEnded) this.#child.kill("SIGKILL");
    await this.#child.status;
  }
}
