/**
 * Finds out which QEMU accelerators are usable on this machine, by running guest code under each.
 *
 * That `/dev/kvm` opens says little: some hosts offer one that emulates the guest instruction by
 * instruction, and no stock kernel boots there. So a tiny firmware image takes a virtual processor from
 * reset to 64-bit mode, executes instructions every stock kernel relies on, works through a loop that is
 * short work for anything but an instruction emulator, and reports through QEMU's debug devices.
 *
 * @module
 */

/** An accelerator of QEMU that the toolkit knows how to use. */
export type AcceleratorName = "kvm" | "tcg";

/** What probing one accelerator found. */
export interface AcceleratorReport {
  /** The accelerator probed. */
  name: AcceleratorName;
  /** Whether guest code ran to its end, correctly and in time. */
  usable: boolean;
  /** The figure measured, e.g. "long mode loop of 50,000,000 rounds in 61 ms", or why not. */
  detail: string;
  /** How long the guest's loop took, present when it ran to its end. */
  milliseconds?: number;
}

/** Settings of a probe; each has a default. */
export interface ProbeOptions {
  /** The QEMU program, a name to look up on `PATH` or a path (default `qemu-system-x86_64`). */
  binary?: string;
  /** Ends the probe early: QEMU is killed and the probe rejects with the signal's reason. */
  signal?: AbortSignal;
  /** Milliseconds each accelerator gets, QEMU's own start included (default 5000). */
  deadline?: number;
  /** The device node looked at before KVM is tried (default `/dev/kvm`); QEMU picks its own. */
  kvmDevice?: string;
}

/** Thrown when the QEMU program to probe with is not found. */
export class QemuMissingError extends Error {
  /** The program that was looked for. */
  readonly binary: string;

  /** Names the program that was looked for, and the package that brings it. */
  constructor(binary: string, options?: ErrorOptions) {
    const where = binary.includes("/") ? "there is no such file" : "no directory of PATH holds it";
    super(`Cannot run "${binary}": ${where}. Install it: apt-get install qemu-system-x86`, options);
    this.name = "QemuMissingError";
    this.binary = binary;
  }
}

const DEFAULT_BINARY = "qemu-system-x86_64";
const DEFAULT_DEADLINE = 5000;
const LONGEST_TIMER = 0x7fffffff;
const KVM_DEVICE = "/dev/kvm";

/** How long the output pipes may stay open once QEMU has ended. */
const DRAIN_GRACE = 500;
/** How much of QEMU's standard error is kept, in characters. */
const STDERR_KEPT = 65536;

const ROM_SIZE = 0x10000;
const REAL_MODE_OFFSET = 0xf000;
const PROTECTED_MODE_OFFSET = 0xf020;
const GDT_POINTER_OFFSET = 0xf0f8;
const GDT_OFFSET = 0xf100;
const LONG_MODE_OFFSET = 0xf200;
const RESET_OFFSET = 0xfff0;
/** The image is one long run of breakpoints where it holds no code, so that a stray jump ends at once. */
const FILLER = 0xcc;

/** The guest prints one mark per slice of the loop, which gives the speed even of a run cut short. */
const LOOP_SLICES = 100;
const ROUNDS_PER_SLICE = 500_000;
const LOOP_ROUNDS = LOOP_SLICES * ROUNDS_PER_SLICE;

const SUCCESS_VALUE = 0x2a;
const NO_LONG_MODE_VALUE = 0x11;
const WRONG_SUM_VALUE = 0x12;

const LOOP_MARK = ".";
const END_MARK = "E";

/** The marks the guest prints on its way; each says what it is about to do. */
const STAGES: Readonly<Record<string, string>> = {
  P: "the switch to long mode",
  L: "cpuid and rdtsc in long mode",
  X: "xgetbv and xsetbv",
  C: "cmpxchg16b",
  R: "rdrand",
  S: "rdseed",
  A: "stac and clac",
  [LOOP_MARK]: "the long mode loop",
  [END_MARK]: "the check of the sums",
};

/** Where the processor starts: sixteen bytes below 4 GiB, the last ones of the image. */
const RESET_VECTOR = `
  e9 0d f0                    ; jmp f000
`;

/** Real mode, at offset f000: the shortest way out of it. */
const REAL_MODE = `
  fa                          ; cli                      no interrupts: there is no handler for any
  fc                          ; cld                      string instructions count upwards
  2e 66 0f 01 16 f8 f0        ; lgdt cs:[f0f8]
  66 b8 11 00 00 00           ; mov eax, 11              PE and ET, and caches on (CD and NW clear)
  0f 22 c0                    ; mov cr0, eax
  66 ea 20 f0 0f 00 08 00     ; jmp far 0008:000ff020    on in the image's copy below 1 MiB
`;

/** Protected mode, at offset f020 (linear ff020): page tables, and the switch to long mode. */
const PROTECTED_MODE = `
  b8 10 00 00 00              ; mov eax, 10              flat data segments
  8e d8                       ; mov ds, eax
  8e c0                       ; mov es, eax
  8e d0                       ; mov ss, eax
  ${mark("P")}
  b8 00 00 00 80              ; mov eax, 80000000        does CPUID know the extended leaf?
  0f a2                       ; cpuid
  3d 01 00 00 80              ; cmp eax, 80000001
  0f 82 88 00 00 00           ; jb f0c9
  b8 01 00 00 80              ; mov eax, 80000001        and does that leaf announce long mode?
  0f a2                       ; cpuid
  0f ba e2 1d                 ; bt edx, 29
  73 7b                       ; jnc f0c9
  31 c0                       ; xor eax, eax             clear three pages of tables at 1000
  bf 00 10 00 00              ; mov edi, 1000
  b9 00 0c 00 00              ; mov ecx, c00
  f3 ab                       ; rep stosd
  c7 05 00 10 00 00 03 20 00 00  ; mov dword [1000], 2003   level 4: the table at 2000
  c7 05 00 20 00 00 03 30 00 00  ; mov dword [2000], 3003   level 3: the table at 3000
  b8 83 00 00 00              ; mov eax, 83              level 2: eight pages of 2 MiB, identity
  bf 00 30 00 00              ; mov edi, 3000
  89 07                       ; f07a: mov [edi], eax
  83 c7 08                    ; add edi, 8
  05 00 00 20 00              ; add eax, 200000
  3d 83 00 00 01              ; cmp eax, 1000083
  75 ef                       ; jne f07a
  be 00 f2 0f 00              ; mov esi, ff200           the 64-bit code runs from RAM, like a kernel
  bf 00 00 01 00              ; mov edi, 10000
  b9 80 00 00 00              ; mov ecx, 80
  f3 a5                       ; rep movsd
  b8 20 06 00 00              ; mov eax, 620             PAE, OSFXSR and OSXMMEXCPT
  0f 22 e0                    ; mov cr4, eax
  b8 00 10 00 00              ; mov eax, 1000
  0f 22 d8                    ; mov cr3, eax
  b9 80 00 00 c0              ; mov ecx, c0000080        EFER: set LME
  0f 32                       ; rdmsr
  0d 00 01 00 00              ; or eax, 100
  0f 30                       ; wrmsr
  b8 33 00 01 80              ; mov eax, 80010033        PG, WP, NE, ET, MP and PE
  0f 22 c0                    ; mov cr0, eax
  ea 00 00 01 00 18 00        ; jmp far 0018:00010000    into the copied code
  b8 ${littleEndian(NO_LONG_MODE_VALUE)}              ; f0c9: mov eax, value
  e7 f4                       ; out f4, eax              QEMU ends here
  f4                          ; hlt
`;

/** What `lgdt` loads: the limit and the linear address of the table. */
const GDT_POINTER = `
  1f 00  00 f1 0f 00          ; four entries at ff100
`;

/** The segments, with their accessed bits set because the table is in ROM. */
const GDT = `
  00 00 00 00 00 00 00 00     ; 00: none
  ff ff 00 00 00 9b cf 00     ; 08: 32-bit code, 4 GiB from 0
  ff ff 00 00 00 93 cf 00     ; 10: data, 4 GiB from 0
  ff ff 00 00 00 9b af 00     ; 18: 64-bit code
`;

/** Long mode, at offset f200 and copied to 10000; it does not depend on where it is. */
const LONG_MODE = `
  ${mark("L")}
  b8 01 00 00 00              ; mov eax, 1               the features stay in ebp
  0f a2                       ; cpuid
  89 cd                       ; mov ebp, ecx
  0f 31                       ; rdtsc
  0f ba e5 1a                 ; bt ebp, 26               XSAVE?
  73 17                       ; jnc f22c
  ${mark("X")}
  b8 20 06 04 00              ; mov eax, 40620           CR4 once more, with OSXSAVE
  0f 22 e0                    ; mov cr4, rax
  31 c9                       ; xor ecx, ecx
  0f 01 d0                    ; xgetbv
  83 c8 03                    ; or eax, 3                x87 and SSE state
  0f 01 d1                    ; xsetbv
  0f ba e5 0d                 ; f22c: bt ebp, 13         CMPXCHG16B?
  73 0e                       ; jnc f240
  ${mark("C")}
  bf 00 00 02 00              ; mov edi, 20000
  f0 48 0f c7 0f              ; lock cmpxchg16b [rdi]
  0f ba e5 1e                 ; f240: bt ebp, 30         RDRAND?
  73 13                       ; jnc f259
  ${mark("R")}
  b9 10 00 00 00              ; mov ecx, 10              it may run dry: sixteen attempts will do
  48 0f c7 f0                 ; f24f: rdrand rax
  72 04                       ; jc f259
  ff c9                       ; dec ecx
  75 f6                       ; jnz f24f
  31 c0                       ; f259: xor eax, eax       does CPUID know leaf 7?
  0f a2                       ; cpuid
  83 f8 07                    ; cmp eax, 7
  72 29                       ; jb f28b
  b8 07 00 00 00              ; mov eax, 7
  31 c9                       ; xor ecx, ecx
  0f a2                       ; cpuid
  89 dd                       ; mov ebp, ebx
  0f ba e5 12                 ; bt ebp, 18               RDSEED?
  73 08                       ; jnc f27b
  ${mark("S")}
  48 0f c7 f8                 ; rdseed rax
  0f ba e5 14                 ; f27b: bt ebp, 20         SMAP?
  73 0a                       ; jnc f28b
  ${mark("A")}
  0f 01 cb                    ; stac
  0f 01 ca                    ; clac
  31 c0                       ; f28b: xor eax, eax       clear 512 sums in memory at 20000
  bf 00 00 02 00              ; mov edi, 20000
  b9 00 02 00 00              ; mov ecx, 200
  f3 48 ab                    ; rep stosq
  41 b8 00 00 02 00           ; mov r8d, 20000
  45 31 d2                    ; xor r10d, r10d           the sum in an integer register
  ba 01 00 00 00              ; mov edx, 1               the number added, new in every round
  66 0f ef c0                 ; pxor xmm0, xmm0          the sum in an SSE register
  41 b9 ${littleEndian(LOOP_SLICES)}           ; mov r9d, slices
  ${mark(LOOP_MARK)}
  b9 ${littleEndian(ROUNDS_PER_SLICE)}              ; mov ecx, rounds per slice
  48 69 d2 0d 66 19 00        ; f2bb: imul rdx, 19660d
  48 81 c2 5f f3 6e 3c        ; add rdx, 3c6ef35f
  89 d6                       ; mov esi, edx             some of its bits choose a sum in memory
  c1 ee 14                    ; shr esi, 20
  81 e6 ff 01 00 00           ; and esi, 1ff
  49 01 14 f0                 ; add [r8+rsi*8], rdx
  49 8b 04 f0                 ; mov rax, [r8+rsi*8]
  49 01 d2                    ; add r10, rdx
  66 48 0f 6e ca              ; movq xmm1, rdx
  66 0f d4 c1                 ; paddq xmm0, xmm1
  ff c9                       ; dec ecx
  75 cf                       ; jnz f2bb
  41 ff c9                    ; dec r9d
  75 c1                       ; jnz f2b2                 back to the mark
  ${mark(END_MARK)}
  b8 ${littleEndian(WRONG_SUM_VALUE)}              ; mov eax, value
  66 48 0f 7e c2              ; movq rdx, xmm0           the SSE sum agrees with the integer sum?
  49 39 d2                    ; cmp r10, rdx
  75 1a                       ; jne f31e
  31 d2                       ; xor edx, edx             and so do the sums in memory, added up?
  b9 00 02 00 00              ; mov ecx, 200
  49 03 54 c8 f8              ; f30b: add rdx, [r8+rcx*8-8]
  ff c9                       ; dec ecx
  75 f7                       ; jnz f30b
  49 39 d2                    ; cmp r10, rdx
  75 05                       ; jne f31e
  b8 ${littleEndian(SUCCESS_VALUE)}              ; mov eax, value
  e7 f4                       ; f31e: out f4, eax        QEMU ends here
  f4                          ; hlt
`;

/**
 * Builds the firmware image the probe runs: 64 KiB, for `-bios`. The guest prints its marks on port e9 and
 * ends by writing a value to port f4, from which QEMU makes its exit status (twice the value, plus one).
 */
export function probePayload(): Uint8Array {
  const image = new Uint8Array(ROM_SIZE).fill(FILLER);
  image.set(machineCode(REAL_MODE), REAL_MODE_OFFSET);
  image.set(machineCode(PROTECTED_MODE), PROTECTED_MODE_OFFSET);
  image.set(machineCode(GDT_POINTER), GDT_POINTER_OFFSET);
  image.set(machineCode(GDT), GDT_OFFSET);
  image.set(machineCode(LONG_MODE), LONG_MODE_OFFSET);
  image.set(machineCode(RESET_VECTOR), RESET_OFFSET);
  return image;
}

/**
 * Probes every accelerator the toolkit knows, kvm first, then tcg, one after the other.
 *
 * @throws {QemuMissingError} When the QEMU program is not found.
 */
export async function probeAccelerators(options: ProbeOptions = {}): Promise<AcceleratorReport[]> {
  return [await probeAccelerator("kvm", options), await probeAccelerator("tcg", options)];
}

/**
 * Probes one accelerator: runs {@linkcode probePayload} under it and says in words what came of it. Neither
 * a QEMU process nor a file stays behind, whether the probe ends, is aborted, or the program exits meanwhile;
 * a program that wants to be as tidy when a signal ends it has to listen for that and abort.
 *
 * @throws {QemuMissingError} When the QEMU program is needed and not found. It is not needed for kvm where
 * the device is absent or cannot be opened.
 */
export async function probeAccelerator(
  name: AcceleratorName,
  options: ProbeOptions = {},
): Promise<AcceleratorReport> {
  const { binary = DEFAULT_BINARY, deadline = DEFAULT_DEADLINE, kvmDevice = KVM_DEVICE, signal } = options;
  if (!(deadline > 0)) {
    throw new RangeError(`Cannot probe with a deadline of ${deadline} ms: it must be above 0`);
  }
  signal?.throwIfAborted();
  let prefix = "";
  if (name === "kvm") {
    const device = await inspectDevice(kvmDevice);
    if (device.fault !== undefined) return { name, usable: false, detail: device.fault };
    prefix = device.opened ? `${kvmDevice} opens, but ` : "KVM was tried, but ";
    signal?.throwIfAborted();
  }
  const run = await runPayload(name, binary, Math.min(deadline, LONGEST_TIMER), signal);
  const fault = explain(run, name);
  if (fault !== undefined) return { name, usable: false, detail: prefix + fault };
  const milliseconds = Math.max(1, Math.round(run.loopMilliseconds));
  const detail = `long mode loop of ${count(LOOP_ROUNDS)} rounds in ${count(milliseconds)} ms`;
  return { name, usable: true, detail, milliseconds };
}

/** Turns a listing, hexadecimal bytes with comments after semicolons, into the bytes. */
function machineCode(listing: string): Uint8Array {
  const digits = listing.replaceAll(/;.*/g, "").replaceAll(/\s+/g, "");
  return Uint8Array.from(digits.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/** The listing of an instruction pair that prints one character on the debug port. */
function mark(character: string): string {
  return `b0 ${character.charCodeAt(0).toString(16)} e6 e9  ; mov al, "${character}" and out e9, al`;
}

/** A 32-bit number in a listing. */
function littleEndian(value: number): string {
  return [0, 8, 16, 24].map((shift) => (value >>> shift & 0xff).toString(16).padStart(2, "0")).join(" ");
}

/** What there is to know about the device before QEMU is asked. */
interface DeviceState {
  /** Why KVM cannot be used, when that is certain. */
  fault?: string;
  /** Whether this program could open the device itself. */
  opened: boolean;
}

/** Opens the device as QEMU will, for a clearer reason than QEMU gives when that fails. */
async function inspectDevice(path: string): Promise<DeviceState> {
  try {
    (await Deno.open(path, { read: true, write: true })).close();
    return { opened: true };
  } catch (error) {
    // This program is not allowed to look, but QEMU may be: let it try.
    if (error instanceof Deno.errors.NotCapable) return { opened: false };
    if (error instanceof Deno.errors.NotFound) {
      return {
        opened: false,
        fault: `${path} is absent: the kvm module is not loaded, or this machine does not offer it`,
      };
    }
    const message = error instanceof Error ? error.message : String(error);
    const denied = error instanceof Deno.errors.PermissionDenied;
    const reason = denied ? await describeRefusal(path, message) : message;
    return { opened: false, fault: `${path} cannot be opened: ${reason}` };
  }
}

/** Says why opening a device was refused, with its owner, and what would help. */
async function describeRefusal(path: string, message: string): Promise<string> {
  // EPERM, where EACCES would blame the mode.
  if (message.includes("os error 1)")) return "the container or sandbox around this program forbids it";
  try {
    const { gid, mode } = await Deno.stat(path);
    if (gid === null || mode === null) return "permission denied";
    const group = await groupName(gid);
    const permissions = (mode & 0o777).toString(8).padStart(4, "0");
    const cure = (mode & 0o060) === 0o060
      ? "this user has to be a member of it"
      : "that mode lets no member of it in either";
    return `permission denied; its group is ${group} and its mode ${permissions}: ${cure}`;
  } catch {
    return "permission denied";
  }
}

/** The name of a group, or its number where no name can be found. */
async function groupName(gid: number): Promise<string> {
  try {
    for (const line of (await Deno.readTextFile("/etc/group")).split("\n")) {
      const [name, , id] = line.split(":");
      if (name && id === String(gid)) return name;
    }
  } catch {
    // The number has to do.
  }
  return String(gid);
}

/** How a run of the payload went. */
interface PayloadRun {
  /** QEMU's exit status; meaningless when it was killed. */
  status: Deno.CommandStatus;
  /** The marks the guest printed. */
  marks: string;
  /** The end of QEMU's standard error. */
  stderr: string;
  /** The line by which QEMU said that the virtual processor is broken and stopped. */
  processorFault?: string;
  /** Whether QEMU was killed because its time was up. */
  late: boolean;
  /** From the loop's first mark to the mark after it, or to the end of the run. */
  loopMilliseconds: number;
  /** The whole run. */
  totalMilliseconds: number;
}

/** Runs the payload, and removes its file whatever happens. */
async function runPayload(
  name: AcceleratorName,
  binary: string,
  deadline: number,
  signal: AbortSignal | undefined,
): Promise<PayloadRun> {
  const image = await Deno.makeTempFile({ prefix: "hypertopia-probe-", suffix: ".rom" });
  const removeAtExit = (): void => Deno.removeSync(image);
  globalThis.addEventListener("unload", removeAtExit);
  try {
    // A temporary file is made with mode 0600, which writing to it keeps.
    await Deno.writeFile(image, probePayload());
    signal?.throwIfAborted();
    return await runImage(name, binary, image, deadline, signal);
  } finally {
    globalThis.removeEventListener("unload", removeAtExit);
    await Deno.remove(image);
  }
}

/** Runs QEMU on an image until it ends, fails, is late or is aborted; it is gone on return. */
async function runImage(
  name: AcceleratorName,
  binary: string,
  image: string,
  deadline: number,
  signal: AbortSignal | undefined,
): Promise<PayloadRun> {
  const started = performance.now();
  const child = spawn(binary, qemuArguments(name, image));
  const kill = (): void => {
    try {
      child.kill("SIGKILL");
    } catch {
      // It has ended already.
    }
  };
  globalThis.addEventListener("unload", kill);
  signal?.addEventListener("abort", kill);
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    kill();
  }, deadline);

  let marks = "";
  let stderr = "";
  let processorFault: string | undefined;
  let loopStart: number | undefined;
  let loopEnd: number | undefined;
  const output = child.stdout.getReader();
  const errors = child.stderr.getReader();
  let grace: ReturnType<typeof setTimeout> | undefined;
  try {
    const [status] = await Promise.all([
      child.status.finally(() => {
        clearTimeout(timer);
        // Only a wrapper's leftover child could hold the pipes open now.
        grace = setTimeout(() => {
          output.cancel();
          errors.cancel();
        }, DRAIN_GRACE);
      }),
      readText(output, (text) => {
        marks += text;
        if (marks.includes(LOOP_MARK)) loopStart ??= performance.now();
        if (marks.includes(END_MARK)) loopEnd ??= performance.now();
      }),
      readText(errors, (text) => {
        stderr = (stderr + text).slice(-STDERR_KEPT);
        processorFault ??= findProcessorFault(stderr);
        // QEMU stops the guest then, and would wait for somebody to look at it.
        if (processorFault !== undefined) kill();
      }),
    ]);
    signal?.throwIfAborted();
    const ended = performance.now();
    return {
      status,
      marks,
      stderr,
      ...(processorFault !== undefined && { processorFault }),
      late,
      loopMilliseconds: (loopEnd ?? ended) - (loopStart ?? ended),
      totalMilliseconds: ended - started,
    };
  } finally {
    clearTimeout(timer);
    kill();
    await child.status;
    clearTimeout(grace);
    signal?.removeEventListener("abort", kill);
    globalThis.removeEventListener("unload", kill);
  }
}

/** Starts QEMU, telling a missing program from other failures. */
function spawn(binary: string, args: string[]): Deno.ChildProcess {
  try {
    return new Deno.Command(binary, { args, stdin: "null", stdout: "piped", stderr: "piped" }).spawn();
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) throw new QemuMissingError(binary, { cause: error });
    throw error;
  }
}

function qemuArguments(name: AcceleratorName, image: string): string[] {
  return [
    ...["-M", "q35", "-accel", name, "-cpu", name === "kvm" ? "host" : "max", "-m", "16"],
    ...["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"],
    ...["-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"],
    ...["-bios", image],
  ];
}

/** Hands over what a stream brings, piece by piece, until it ends. */
async function readText(
  reader: ReadableStreamDefaultReader<Uint8Array>,
  use: (text: string) => void,
): Promise<void> {
  const decoder = new TextDecoder();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    use(decoder.decode(value, { stream: true }));
  }
}

/** The complete line with which QEMU reports that KVM gave up on the virtual processor. */
function findProcessorFault(stderr: string): string | undefined {
  return /^(KVM internal error.*|error: kvm run failed.*|KVM: entry failed.*)\n/m.exec(stderr)?.[1];
}

/** Says why a run does not make the accelerator usable; nothing when it does. */
function explain(run: PayloadRun, name: AcceleratorName): string | undefined {
  const { status, marks } = run;
  const lastMark = marks.at(-1);
  const stage = lastMark === undefined ? "the first instructions" : STAGES[lastMark] ?? "an unknown stage";
  if (run.processorFault !== undefined) {
    // Suberror 1: the emulator met an instruction it has no code for.
    const cause = /Suberror: 1$/.test(run.processorFault)
      ? `it emulates guest code instruction by instruction and failed at ${stage}`
      : `it failed at ${stage}`;
    return `${cause}, so a stock kernel would not boot (QEMU said "${run.processorFault}")`;
  }
  if (run.late && status.code !== exitStatus(SUCCESS_VALUE)) {
    const total = count(run.totalMilliseconds);
    if (lastMark === undefined) return `QEMU had run no guest code after ${total} ms`;
    const slices = marks.split(LOOP_MARK).length - 1;
    if (slices === 0) return `guest code had got no further than ${stage} after ${total} ms`;
    const rounds = count((slices - 1) * ROUNDS_PER_SLICE);
    const pace = `${rounds} of ${count(LOOP_ROUNDS)} loop rounds in ${count(run.loopMilliseconds)} ms`;
    const meaning = name === "kvm"
      ? "it is emulated instruction by instruction, and a stock kernel would not boot"
      : "this machine is too slow or too busy for it";
    return `guest code ran too slowly (${pace}): ${meaning}`;
  }
  if (status.signal !== null) return `QEMU was ended by ${status.signal} at ${stage}`;
  switch (status.code) {
    case exitStatus(SUCCESS_VALUE):
      return lastMark === END_MARK ? undefined : `QEMU ended with status ${status.code} before the guest did`;
    case exitStatus(NO_LONG_MODE_VALUE):
      return "the virtual processor has no long mode";
    case exitStatus(WRONG_SUM_VALUE):
      return "guest code computed wrong sums";
    case 0:
      return `guest code crashed at ${stage}`;
  }
  const line = run.stderr.trim().split("\n").at(-1);
  return `QEMU failed with status ${status.code}${line ? `: ${line}` : " and no message"}`;
}

/** The exit status QEMU makes from a value written to its debug exit port. */
function exitStatus(value: number): number {
  return value << 1 | 1;
}

/** A number as the reports print it. */
function count(value: number): string {
  return Math.round(value).toLocaleString("en-US");
}
