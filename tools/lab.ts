/**
 * The lab: a machine with hardware virtualization where this one has none. It is a Debian guest whose root file system
 * is this machine's own, read over 9p and written in memory, so that the checkout and Deno are there as they are here.
 *
 * @module
 */

import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { type EngineChoice, qemu, type Size, type Stack, stack, vm } from "../dsl/mod.ts";
import { apply, makePlan, preflight, State } from "../planner/mod.ts";
import { debian, debianBuilder, debianBusybox, debianKernelBuilder } from "../stdlib/debian.ts";
import { MachineError } from "../vmm/errors.ts";
import { removeIfThere } from "../vmm/files.ts";
import type { GuestExecOptions, GuestOutput, GuestOutputOptions, GuestStatus } from "../vmm/guest/channel.ts";
import { isEnvironmentName } from "../vmm/guest/config.ts";
import type { BuildContext } from "../vmm/images/builder.ts";
import { unpackKernel } from "../vmm/images/kernel_image.ts";
import { runTool, storeEntry, storeKey } from "../vmm/images/store.ts";
import { machineKinds } from "../vmm/kinds/mod.ts";
import { hostPaths } from "../vmm/paths.ts";
import { QemuEngine, type QemuMachine } from "../vmm/qemu/engine.ts";
import { XEN_MODULES, XEN_SETUP_SCRIPT, xenEngine } from "./lab_xen.ts";

/** Options of {@linkcode Lab.start}. */
export interface LabOptions {
  /** vCPUs; 1 unless told: with more, multi-threaded emulation before QEMU 8.1 now and then hangs the guest. */
  readonly cpus?: number;
  /** Memory, which holds what is written there too; `"4GiB"` unless told. */
  readonly memory?: Size;
  /** Whether it has a `/dev/kvm`; yes unless told, or with Xen. */
  readonly kvm?: boolean;
  /** Whether it is Xen's privileged domain, which has half of the memory, with a running xenstored; no unless told. */
  readonly xen?: boolean;
  /** Folder of its files, which is removed at its end; a temporary one unless told. */
  readonly folder?: string;
  /** Gives up. */
  readonly signal?: AbortSignal;
  /** Shows progress. */
  readonly report?: (progress: string) => void;
}

/** Where the guest has the root file system of this machine. */
const ROOT = "/lab/root";

/**
 * Modules that nothing asks the kernel for. `crc32c_generic` is one that `nf_tables` needs without saying so among its
 * dependencies.
 */
const MODULES: readonly string[] = [
  "9p",
  "9pnet_virtio",
  "crc32c_generic",
  "overlay",
  "tun",
  "vhost_net",
  "vhost_vsock",
];

/** Run in the guest with a folder of kernel modules and one with what depmod tells of them. */
const SETUP_SCRIPT = `
set -e
release=$(uname -r)
mkdir -p /lab/host /lab/memory /lab/modules /lab/depmod ${ROOT} "/lib/modules/$release"
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /lab/host
mount -t tmpfs -o size=75% tmpfs /lab/memory
mkdir /lab/memory/upper /lab/memory/work
mount -t overlay -o lowerdir=/lab/host,upperdir=/lab/memory/upper,workdir=/lab/memory/work overlay ${ROOT}
mount --bind "/lab/host$1" /lab/modules
mount --bind "/lab/host$2" /lab/depmod
mount -t overlay -o lowerdir=/lab/depmod:/lab/modules overlay "/lib/modules/$release"
echo /bin/modprobe >/proc/sys/kernel/modprobe
cd ${ROOT}
mkdir -p dev proc run sys tmp "lib/modules/$release"
mount --bind "/lib/modules/$release" "lib/modules/$release"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
ln -sfn /proc/self/fd dev/fd
ln -sfn fd/0 dev/stdin
ln -sfn fd/1 dev/stdout
ln -sfn fd/2 dev/stderr
mount -t tmpfs -o mode=755 tmpfs run
mkdir run/lock
`;

interface Nesting {
  /** Accelerator to insist on; undefined where the best one is right. */
  readonly accelerator?: "tcg";
  /** The module that makes `/dev/kvm`. */
  readonly module: string;
}

/** Finds out how the guest can have virtualization itself. */
async function findNesting(engine: QemuEngine, signal: AbortSignal): Promise<Nesting> {
  const { findings } = await engine.probe({ signal });
  if (findings.find((each) => each.isUsable)?.name === "kvm") {
    for (const module of ["kvm_amd", "kvm_intel"]) {
      const nested = await Deno.readTextFile(`/sys/module/${module}/parameters/nested`).catch(() => "");
      if (/^[1Y]/.test(nested)) return { module };
    }
  }
  // An emulated processor has AMD's kind of virtualization, whatever this machine's own has.
  return { accelerator: "tcg", module: "kvm_amd" };
}

async function declareLab(
  { cpus = 1, memory = "4GiB", kvm = true, xen = false }: LabOptions,
  engine: QemuEngine,
  context: BuildContext,
): Promise<Stack> {
  const extraArguments = [
    "-virtfs",
    "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
  ];
  const machine = (modules: readonly string[], engine: EngineChoice, cmdline = "") =>
    stack("lab", () => ({
      lab: vm({
        cpus,
        memory,
        maxMemory: memory,
        image: debian({ flavour: "generic", modules: [...MODULES, ...modules] }),
        engine,
        cmdline,
      }),
    }));
  if (xen) return machine(XEN_MODULES, await xenEngine(memory, extraArguments, context), "loglevel=7");
  if (!kvm) return machine([], qemu({ extraArguments }));
  const { accelerator, module } = await findNesting(engine, context.signal);
  return machine([module], qemu({ extraArguments, ...(accelerator ? { accelerator } : {}) }));
}

/** A machine with virtualization, and this machine's root file system. Disposing it leaves nothing of it. */
export class Lab implements AsyncDisposable {
  /** Folder of its files. */
  readonly folder: string;
  readonly #machine: QemuMachine;
  readonly #guard: Deno.ChildProcess | undefined;

  private constructor(folder: string, machine: QemuMachine, guard?: Deno.ChildProcess) {
    this.folder = folder;
    this.#machine = machine;
    this.#guard = guard;
  }

  /**
   * Boots a lab. What it boots is built into the cache first, where it is not there yet.
   *
   * @param options Size and devices
   * @returns The lab, which ends with this process at the latest, however that ends
   * @throws {MachineError} If it cannot be booted
   */
  static async start(options: LabOptions = {}): Promise<Lab> {
    const { signal = new AbortController().signal, report = () => {} } = options;
    const folder = await makeFolder(options.folder);
    const guard = startGuard(folder);
    try {
      const paths = labPaths(folder);
      const context = { cache: paths.cache, signal, report };
      // It has no network: what machines in it boot is fetched here.
      const { kernel } = await debianBuilder.build({ type: "debian", suite: "bookworm" }, context);
      // To unpack one in an emulated machine takes minutes.
      if (options.xen) await unpackKernel(kernel!.kernel, context);
      const engine = new QemuEngine(paths);
      const graph = (await declareLab(options, engine, context)).evaluate();
      const kinds = machineKinds({
        paths,
        engines: [engine],
        images: [debianBuilder],
        kernels: [debianKernelBuilder],
      });
      using state = await State.open(join(folder, "lab.db"), { stack: graph.stack, create: true });
      using _lock = await state.lock("apply", { signal });
      const plan = await makePlan({ graph, state, kinds, signal });
      await preflight(plan, { graph, state, kinds, signal });
      await apply(plan, {
        graph,
        state,
        kinds,
        signal,
        onEvent: (event) => event.type === "progress" && report(event.text),
      });
      const lab = new Lab(folder, await findMachine(folder), guard);
      await lab.#setUp(context);
      if (options.xen) await lab.#setUpXen(context);
      return lab;
    } catch (error) {
      await endLab(folder, guard);
      throw error;
    }
  }

  /**
   * Finds a lab that another process has started.
   *
   * @param folder Folder of its files
   * @returns The lab, which goes on when this object is disposed
   * @throws {MachineError} If none runs there
   */
  static async attach(folder: string): Promise<Lab> {
    const lab = new Lab(folder, await findMachine(resolve(folder)));
    // It keeps what it has read of files that have changed here since.
    await lab.#machine.guest.output(["sh", "-c", "echo 3 >/proc/sys/vm/drop_caches"]);
    return lab;
  }

  async #setUp(context: BuildContext): Promise<void> {
    const { kernel = "" } = (await this.#machine.spec()) ?? {};
    const modules = await findModules(kernel);
    const dependencies = await buildDependencies(modules, context);
    context.report("mounting this machine's root file system in it");
    const { status, stderr } = await this.#machine.guest.output(
      ["sh", "-c", SETUP_SCRIPT, "sh", modules, dependencies],
      { signal: context.signal },
    );
    if (status !== 0) throw new MachineError(`Cannot set the lab up as its guest failed: ${stderr.trim()}`);
  }

  async #setUpXen(context: BuildContext): Promise<void> {
    context.report("starting xenstored in it");
    const { status, stderr } = await this.output(["sh", "-c", XEN_SETUP_SCRIPT], {
      cwd: "/",
      signal: context.signal,
    });
    if (status !== 0) {
      throw new MachineError(`Cannot set Xen up in the lab as its guest failed: ${stderr.trim()}`);
    }
  }

  /**
   * Runs a command in the lab.
   *
   * @param argv The command and its arguments
   * @param options Streams, the directory to start in, this process's unless told, and variables to add to this
   * process's environment
   * @returns Its status
   */
  async exec(argv: readonly string[], options: GuestExecOptions = {}): Promise<GuestStatus> {
    return await this.#machine.guest.exec(inRoot(argv, options), {
      ...options,
      env: { ...environment(), ...options.env },
      cwd: "/",
    });
  }

  /**
   * Runs a command in the lab and gathers what it writes.
   *
   * @param argv The command and its arguments
   * @param options Input, directory and variables, as for {@linkcode Lab.exec}
   * @returns Its status and what it wrote, as UTF-8 text
   */
  async output(argv: readonly string[], options: GuestOutputOptions = {}): Promise<GuestOutput> {
    return await this.#machine.guest.output(inRoot(argv, options), {
      ...options,
      env: { ...environment(), ...options.env },
      cwd: "/",
    });
  }

  /** Ends the lab, where this process has started it, and removes its folder. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#guard) await endLab(this.folder, this.#guard);
  }
}

async function makeFolder(path: string | undefined): Promise<string> {
  if (path === undefined) return await Deno.makeTempDir({ prefix: "ht-lab-" });
  try {
    await Deno.mkdir(path, { mode: 0o700 });
    return resolve(path);
  } catch (cause) {
    const reason = cause instanceof Deno.errors.AlreadyExists
      ? "it exists: name a new folder"
      : (cause as Error).message;
    throw new MachineError(`Cannot start a lab in "${path}" as ${reason}`, { cause });
  }
}

function labPaths(folder: string): { data: string; cache: string } {
  return { data: folder, cache: hostPaths().cache };
}

const ENTER_SCRIPT = 'cd -- "$1" || exit 126; shift; exec "$@"';

function inRoot(argv: readonly string[], options: GuestOutputOptions): string[] {
  const cwd = options.cwd ?? Deno.cwd();
  return ["/bin/chroot", ROOT, "/bin/sh", "-c", ENTER_SCRIPT, "sh", cwd, ...argv];
}

function environment(): Record<string, string> {
  const variables = Object.entries(Deno.env.toObject()).filter(([name]) => isEnvironmentName(name));
  return { ...Object.fromEntries(variables), DENO_NO_UPDATE_CHECK: "1" };
}

async function findMachine(folder: string): Promise<QemuMachine> {
  const engine = new QemuEngine(labPaths(folder));
  const found = (await engine.list()).find((each) => each.state === "running");
  if (!found) {
    throw new MachineError(`Cannot find a running lab in "${folder}": start one with --keep=${folder}`);
  }
  return engine.attach(found.id);
}

/** The modules of a kernel in the cache. */
async function findModules(kernel: string): Promise<string> {
  const folder = join(dirname(kernel), "modules");
  for await (const { name } of Deno.readDir(folder)) return join(folder, name);
  throw new MachineError(`Cannot find the modules of the kernel "${kernel}": remove it from the cache`);
}

/** Lets busybox find out which module needs which and serves what, for modprobe. */
async function buildDependencies(modules: string, context: BuildContext): Promise<string> {
  const busybox = await debianBusybox({ type: "debian", suite: "bookworm" }, context);
  const name = `depmod/${storeKey("depmod", modules)}`;
  const { folder } = await storeEntry(context, name, "the dependencies of modules", async (part) => {
    context.report("finding out the dependencies of kernel modules");
    const release = modules.slice(modules.lastIndexOf("/") + 1);
    const tree = join(part, "tree");
    await Deno.mkdir(join(tree, "lib/modules"), { recursive: true });
    await Deno.symlink(modules, join(tree, "lib/modules", release));
    const output = await runTool(busybox, ["depmod", "-n", "-b", tree, release], context, {
      package: "busybox-static",
    });
    await Deno.remove(tree, { recursive: true });
    const lines = output.trimEnd().split("\n").filter((line) => !line.startsWith("alias symbol:"));
    const [aliases, needs] = [true, false].map((wanted) =>
      lines.filter((line) => line.startsWith("alias ") === wanted).map((line) => `${line}\n`).join("")
    );
    await Deno.writeTextFile(join(part, "modules.alias"), aliases!);
    await Deno.writeTextFile(join(part, "modules.dep"), needs!);
    return { release };
  });
  return folder;
}

/** Starts a process that ends a lab when this one ends: a pipe to it is then closed, whatever the reason. */
function startGuard(folder: string): Deno.ChildProcess {
  return new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", fileURLToPath(import.meta.url), `--guard=${folder}`],
    stdin: "piped",
    stdout: "null",
    // Away from the terminal's signals.
    detached: true,
  }).spawn();
}

async function endLab(folder: string, guard: Deno.ChildProcess): Promise<void> {
  await guard.stdin.close().catch(() => {});
  const { success } = await guard.status;
  if (!success) await removeLab(folder);
}

async function guardLab(folder: string): Promise<void> {
  for await (const _ of Deno.stdin.readable);
  await removeLab(folder);
}

async function removeLab(folder: string): Promise<void> {
  const engine = new QemuEngine(labPaths(folder));
  for (const { id } of await engine.list()) await engine.attach(id).destroy();
  await removeIfThere(folder);
}

const USAGE = `Usage: deno task lab:kvm [FLAGS] [-- COMMAND...]
       deno task lab:xen [FLAGS] [-- COMMAND...]

Runs a command, or else a shell, in a machine with a /dev/kvm, or in the privileged domain of Xen, and with the files of
this one. What it writes is lost at its end.

  --cpus=N       vCPUs (1; more may hang under emulation before QEMU 8.1)
  --memory=SIZE  memory (4GiB), of which the privileged domain has half
  --no-kvm       without a /dev/kvm
  --xen          with Xen, as lab:xen is
  --cwd=FOLDER   folder to start in (the current one)
  --keep=FOLDER  boot it and let it run until Ctrl-C, its files in a new folder
  --in=FOLDER    run the command in one that --keep lets run`;

/** Exit statuses of a shell for signals. */
const SIGNALS = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const;
/** How long a boot may take until its steps are shown, in milliseconds. */
const QUIET = 5000;

function say(text: string): void {
  Deno.stderr.writeSync(new TextEncoder().encode(`${text}\n`));
}

/** Shows steps, but those of a boot that is soon done. */
function progress(): { report(text: string): void } & Disposable {
  let step = "";
  let isLong = false;
  const timer = setTimeout(() => {
    isLong = true;
    if (step !== "") say(`lab: ${step}`);
  }, QUIET);
  return {
    report(text) {
      // Counting up is not a new step.
      const isNew = text.replaceAll(/[\d.]+/g, "") !== step.replaceAll(/[\d.]+/g, "");
      step = text;
      if (isLong && isNew) say(`lab: ${step}`);
    },
    [Symbol.dispose]: () => clearTimeout(timer),
  };
}

/** Ends the run with a status, as a signal does. */
class Interruption extends Error {
  constructor(readonly status: number) {
    super("Interrupted");
  }
}

async function writeAll(
  stream: { write(data: Uint8Array): Promise<number> },
  data: Uint8Array,
): Promise<void> {
  try {
    for (let offset = 0; offset < data.length;) offset += await stream.write(data.subarray(offset));
  } catch (error) {
    // The reader left, as `head` does: the shell's status for that.
    if (error instanceof Deno.errors.BrokenPipe) throw new Interruption(141);
    throw error;
  }
}

/** Runs a command with this process's streams. */
async function runIn(
  lab: Lab,
  command: readonly string[],
  cwd: string,
  signal: AbortSignal,
): Promise<number> {
  const isShell = command.length === 0;
  const isTerminal = Deno.stdin.isTerminal();
  let argv = command;
  if (isShell && isTerminal) {
    const { columns, rows } = Deno.consoleSize();
    const shell = `stty rows ${rows} cols ${columns}; exec "\${SHELL:-/bin/bash}"`;
    argv = ["script", "-qec", shell, "/dev/null"];
    Deno.stdin.setRaw(true);
  } else if (isShell) argv = ["/bin/sh"];
  try {
    const { status } = await lab.exec(argv, {
      cwd,
      signal,
      // A command that is typed has its input from here only where it is a shell.
      ...(isTerminal && !isShell ? {} : { stdin: Deno.stdin.readable }),
      stdout: (chunk) => writeAll(Deno.stdout, chunk),
      stderr: (chunk) => writeAll(Deno.stderr, chunk),
    });
    return status;
  } finally {
    if (isShell && isTerminal) Deno.stdin.setRaw(false);
  }
}

async function main(): Promise<number> {
  const { values, positionals: command } = parseArgs({
    allowPositionals: true,
    options: {
      cpus: { type: "string" },
      cwd: { type: "string", default: Deno.cwd() },
      guard: { type: "string" },
      help: { type: "boolean", short: "h" },
      in: { type: "string" },
      keep: { type: "string" },
      memory: { type: "string" },
      "no-kvm": { type: "boolean" },
      xen: { type: "boolean", default: false },
    },
  });
  if (values.guard !== undefined) {
    await guardLab(values.guard);
    return 0;
  }
  if (values.help) {
    say(USAGE);
    return 0;
  }
  const controller = new AbortController();
  const { signal } = controller;
  const end = (status: number) => controller.abort(new Interruption(status));
  for (const [name, status] of Object.entries(SIGNALS)) {
    Deno.addSignalListener(name as keyof typeof SIGNALS, () => end(status));
  }
  try {
    if (values.in !== undefined) return await runIn(await Lab.attach(values.in), command, values.cwd, signal);
    const parent = Deno.ppid;
    // A task that is killed cannot pass that on.
    if (values.keep === undefined) setInterval(() => Deno.ppid !== parent && end(SIGNALS.SIGHUP), 500);
    using shown = progress();
    await using lab = await Lab.start({
      kvm: !values["no-kvm"],
      xen: values.xen,
      signal,
      report: shown.report,
      ...(values.cpus === undefined ? {} : { cpus: Number(values.cpus) }),
      ...(values.memory === undefined ? {} : { memory: values.memory as Size }),
      ...(values.keep === undefined ? {} : { folder: values.keep }),
    });
    shown[Symbol.dispose]();
    if (values.keep === undefined) return await runIn(lab, command, values.cwd, signal);
    say(
      `The lab runs until Ctrl-C; use it with: deno task lab:${
        values.xen ? "xen" : "kvm"
      } --in=${lab.folder} -- COMMAND...`,
    );
    await new Promise((resolve) => signal.addEventListener("abort", resolve));
    return 0;
  } catch (error) {
    const reason: unknown = signal.aborted ? signal.reason : error;
    if (reason instanceof Interruption) return reason.status;
    throw error;
  }
}

if (import.meta.main) {
  try {
    Deno.exit(await main());
  } catch (error) {
    say(`Error: ${error instanceof Error ? error.message : error}`);
    Deno.exit(1);
  }
}
