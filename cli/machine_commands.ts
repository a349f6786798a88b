/**
 * Commands that talk to a running machine: console, exec, logs and cp.
 *
 * @module
 */

import type { ResourceRecord } from "../planner/mod.ts";
import { type Machine, MachineError } from "../vmm/mod.ts";
import { builtInEngines } from "./built_in.ts";
import type { Invocation } from "./options.ts";
import { UsageError } from "./options.ts";
import type { RunContext } from "./run.ts";

/**
 * Runs one of the commands.
 *
 * @param invocation The command
 * @param context Streams and engines
 * @param records What is on record
 * @returns The exit status; that of the guest's command for `exec`
 */
export async function runMachineCommand(
  invocation: Invocation,
  context: RunContext,
  records: readonly ResourceRecord[],
): Promise<number> {
  const { words, rest, flags } = invocation;
  switch (invocation.command) {
    case "console":
      return await attachConsole(await findMachine(words[0]!, context, records), context);
    case "exec": {
      const command = [...words.slice(1), ...rest];
      if (command.length === 0) throw new UsageError("Usage: exec ADDRESS -- COMMAND...");
      return await exec(await findMachine(words[0]!, context, records), command, flags, context);
    }
    case "logs":
      return await logs(await findMachine(words[0]!, context, records, false), flags, context);
    default:
      return await copy(words[0]!, words[1]!, context, records);
  }
}

async function findMachine(
  address: string,
  context: RunContext,
  records: readonly ResourceRecord[],
  mustRun = true,
): Promise<Machine> {
  const record = records.find((each) => each.address === address && each.deposed === "");
  if (!record || record.kind !== "vm") {
    const known = records.filter((each) => each.kind === "vm").map((each) => each.address);
    throw new MachineError(
      record
        ? `Cannot use "${address}" as it is a ${record.kind} and not a machine`
        : `Cannot find the machine "${address}" on record: ${
          known.length === 0 ? "there are none, run apply first" : `machines are ${known.join(", ")}`
        }`,
    );
  }
  const engines = context.options.engines ?? builtInEngines();
  for (const engine of engines) {
    const machine = engine.attach(record.id);
    const { state, detail } = await machine.status();
    if (state === "absent") continue;
    if (mustRun && state !== "running" && state !== "paused") {
      throw new MachineError(
        `Cannot reach "${address}" as the machine is ${state}${
          detail ? ` (${detail})` : ""
        }: start it with apply`,
      );
    }
    return machine;
  }
  throw new MachineError(`Cannot find the machine of "${address}" on this host: run apply to make it again`);
}

async function exec(
  machine: Machine,
  command: readonly string[],
  flags: Invocation["flags"],
  { signal }: RunContext,
): Promise<number> {
  await requireAgent(machine);
  const env: Record<string, string> = {};
  for (const each of (flags.env as readonly string[] | undefined) ?? []) {
    const [, name, value] = /^([A-Za-z_]\w*)=(.*)$/s.exec(each) ?? [];
    if (name === undefined) {
      throw new UsageError(`Flag "--env" must be NAME=VALUE: current value is "${each}"`);
    }
    env[name] = value!;
  }
  const { status } = await machine.guest.exec(command, {
    signal,
    env,
    ...(typeof flags.cwd === "string" ? { cwd: flags.cwd } : {}),
    stdin: Deno.stdin.readable,
    stdout: (chunk) => writeAll(Deno.stdout, chunk),
    stderr: (chunk) => writeAll(Deno.stderr, chunk),
  });
  return status;
}

async function requireAgent(machine: Machine): Promise<void> {
  const spec = await machine.spec();
  if (spec && !spec.hasAgent) {
    throw new MachineError(
      `Cannot run commands in "${spec.address}" as its image has no agent of ours: use its console`,
    );
  }
}

async function writeAll(
  stream: { write(data: Uint8Array): Promise<number> },
  chunk: Uint8Array,
): Promise<void> {
  try {
    for (let offset = 0; offset < chunk.length;) offset += await stream.write(chunk.subarray(offset));
  } catch (error) {
    // The reader left, as `head` does: the shell's status for that.
    if (error instanceof Deno.errors.BrokenPipe) Deno.exit(141);
    throw error;
  }
}

/** Ctrl-], as telnet and virsh have it. */
const ESCAPE = 0x1d;

async function attachConsole(machine: Machine, { io, signal }: RunContext): Promise<number> {
  using connection = await machine.console();
  const isTerminal = Deno.stdin.isTerminal();
  if (isTerminal) {
    io.err("Connected: Ctrl-] leaves, Enter shows the prompt.\r\n");
    Deno.stdin.setRaw(true);
  }
  try {
    const fromGuest = (async () => {
      const buffer = new Uint8Array(16384);
      for (let count = await connection.read(buffer); count !== null; count = await connection.read(buffer)) {
        await writeAll(Deno.stdout, buffer.subarray(0, count));
      }
      return "guest" as const;
    })();
    const toGuest = (async () => {
      const buffer = new Uint8Array(4096);
      for (let count = await Deno.stdin.read(buffer); count !== null; count = await Deno.stdin.read(buffer)) {
        const chunk = buffer.subarray(0, count);
        const end = isTerminal ? chunk.indexOf(ESCAPE) : -1;
        await writeAll(connection, end < 0 ? chunk : chunk.subarray(0, end));
        if (end >= 0) return "left" as const;
      }
      // A script's input has ended: what the guest still answers within a moment is shown.
      await new Promise((resolve) => setTimeout(resolve, 2000));
      return "left" as const;
    })();
    const aborted = new Promise<"left">((resolve) =>
      signal.addEventListener("abort", () => resolve("left"), { once: true })
    );
    const ended = await Promise.race([fromGuest, toGuest, aborted]);
    if (ended === "guest") io.err("\r\nThe machine closed its console.\r\n");
    else if (isTerminal) io.err("\r\n");
    return 0;
  } finally {
    if (isTerminal) Deno.stdin.setRaw(false);
  }
}

async function logs(
  machine: Machine,
  flags: Invocation["flags"],
  { io, signal }: RunContext,
): Promise<number> {
  const path = flags.engine ? machine.engineLog : machine.consoleLog;
  let offset = 0;
  const buffer = new Uint8Array(65536);
  while (!signal.aborted) {
    try {
      using file = await Deno.open(path);
      const { size } = await file.stat();
      // A restart begins a new log.
      if (size < offset) offset = 0;
      await file.seek(offset, Deno.SeekMode.Start);
      for (let count = await file.read(buffer); count !== null; count = await file.read(buffer)) {
        await writeAll(Deno.stdout, buffer.subarray(0, count));
        offset += count;
      }
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      if (!flags.follow) io.err("There is no log yet.\n");
    }
    if (!flags.follow) break;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  return 0;
}

async function copy(
  from: string,
  to: string,
  context: RunContext,
  records: readonly ResourceRecord[],
): Promise<number> {
  const parse = (text: string) => {
    // A local path with a colon is written with ./ in front.
    const match = /^([^/.][^:/]*):(.+)$/s.exec(text);
    return match ? { address: match[1]!, path: match[2]! } : undefined;
  };
  const source = parse(from);
  const target = parse(to);
  if (source && target) throw new UsageError("Cannot copy from machine to machine: copy to this host first");
  if (!source && !target) {
    throw new UsageError("Cannot copy as neither side is in a machine: write ADDRESS:PATH for that side");
  }
  const { signal } = context;
  const fail = (error: unknown) => {
    throw new MachineError(
      `Cannot copy "${from}" to "${to}" as ${error instanceof Error ? error.message : error}`,
      { cause: error },
    );
  };
  if (target) {
    const machine = await findMachine(target.address, context, records);
    await requireAgent(machine);
    try {
      const info = await Deno.stat(from);
      if (info.isDirectory) {
        await machine.guest.putDirectory(from, target.path, { signal });
        return 0;
      }
      const path = target.path.endsWith("/") ? `${target.path}${from.split("/").pop()}` : target.path;
      const file = await Deno.open(from);
      await machine.guest.writeFile(path, file.readable, {
        signal,
        ...(info.mode === null ? {} : { mode: info.mode & 0o7777 }),
      });
    } catch (error) {
      fail(error);
    }
    return 0;
  }
  const machine = await findMachine(source!.address, context, records);
  await requireAgent(machine);
  const isFolder = await Deno.stat(to).then((info) => info.isDirectory, () => false);
  const path = isFolder || to.endsWith("/")
    ? `${to.replace(/\/$/, "")}/${source!.path.split("/").pop()}`
    : to;
  const part = `${path}.${crypto.randomUUID().slice(0, 8)}.part`;
  try {
    const { status } = await machine.guest.output(["test", "-d", source!.path], { signal });
    if (status === 0) {
      await machine.guest.getDirectory(source!.path, to, { signal });
      return 0;
    }
    const { stdout } = await machine.guest.output(["stat", "-L", "-c", "%a", source!.path], { signal });
    const mode = /^[0-7]{3,4}$/.test(stdout.trim()) ? parseInt(stdout.trim(), 8) & 0o777 : 0o600;
    const file = await Deno.open(part, { write: true, createNew: true, mode });
    await machine.guest.readFileStream(source!.path, { signal }).pipeTo(file.writable);
    await Deno.rename(part, path);
  } catch (error) {
    await Deno.remove(part).catch(() => {});
    fail(error);
  }
  return 0;
}
