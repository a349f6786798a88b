/**
 * Waiting until a machine is ready.
 *
 * @module
 */

import { request } from "node:http";
import { parseDuration, type Probe } from "../dsl/mod.ts";
import type { Machine, MachineSpec, OperationOptions } from "./engine.ts";
import { MachineError } from "./errors.ts";
import { GuestError } from "./guest/channel.ts";

/** How long a probe is left between tries, in milliseconds. */
const INTERVAL = 100;
/** How long one try may take, in milliseconds. */
const TRY_LIMIT = 10_000;
const CONSOLE_LINES = 15;

/**
 * Waits until every probe succeeds.
 *
 * @param machine The machine
 * @param probes The probes, in order
 * @param options Signal and progress
 * @throws {MachineError} If the machine ends or panics meanwhile, or a probe's time runs out; the end of the console is
 * part of the message
 */
export async function waitUntilReady(
  machine: Machine,
  probes: readonly Probe[],
  options: OperationOptions = {},
): Promise<void> {
  const spec = await machine.spec();
  if (!spec) throw new MachineError("the machine was never started");
  for (const probe of probes) await waitForProbe(machine, spec, probe, options);
}

async function waitForProbe(
  machine: Machine,
  spec: MachineSpec,
  probe: Probe,
  options: OperationOptions,
): Promise<void> {
  const limit = probe.timeout ?? "5m";
  const deadline = Date.now() + parseDuration(limit);
  if (
    !spec.hasAgent && probe.type !== "console" && !(probe.port !== undefined && findForward(spec, probe.port))
  ) {
    throw new MachineError(
      `it cannot be probed for ${
        describe(probe)
      }: its image has no agent of ours and no NIC forwards that port: ` +
        `add a forward, or use a console probe`,
    );
  }
  let last = "it was not tried";
  options.report?.(`waiting for ${describe(probe)}`);
  for (let round = 0;; round++) {
    options.signal?.throwIfAborted();
    const left = deadline - Date.now();
    if (left <= 0) {
      throw new MachineError(
        `it is not ready after ${limit}: ${describe(probe)} failed last as ${last}${await consoleTail(
          machine,
        )}`,
      );
    }
    if (round % 5 === 0) await requireRunning(machine);
    const signal = AbortSignal.any([
      AbortSignal.timeout(Math.max(1, Math.min(left, TRY_LIMIT))),
      ...(options.signal ? [options.signal] : []),
    ]);
    try {
      const failure = await tryProbe(machine, spec, probe, signal);
      if (failure === undefined) return;
      last = failure;
    } catch (error) {
      options.signal?.throwIfAborted();
      // A try that was cut short by the end of the wait says less than the one before it.
      if (!signal.aborted) last = error instanceof Error ? error.message : String(error);
      else if (left >= TRY_LIMIT || round === 0) last = "it took too long";
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(INTERVAL, left)));
  }
}

async function requireRunning(machine: Machine): Promise<void> {
  const { state, detail } = await machine.status();
  if (state === "running" || state === "paused") return;
  const log = (await Deno.readTextFile(machine.engineLog).catch(() => "")).trim().split("\n").slice(-3).join(
    "; ",
  );
  throw new MachineError(
    `the machine ${state === "crashed" ? "crashed" : "ended"}${
      detail ? ` (${detail})` : ""
    } before it was ready` +
      `${log === "" ? "" : `; the engine said: ${log}`}${await consoleTail(machine)}`,
  );
}

/**
 * Shows what a console ends with, for a message.
 *
 * @param machine The machine
 * @returns Words that follow others
 */
export async function consoleTail(machine: Pick<Machine, "consoleLog">): Promise<string> {
  const text = await Deno.readTextFile(machine.consoleLog).catch(() => "");
  // deno-lint-ignore no-control-regex
  const lines = text.replaceAll(/\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f]/g, "").trimEnd().split("\n")
    .slice(-CONSOLE_LINES);
  return lines.join("").trim() === ""
    ? "; its console is empty"
    : `; its console ends with:\n${lines.map((line) => `    | ${line}`).join("\n")}`;
}

function describe(probe: Probe): string {
  switch (probe.type) {
    case "tcp":
      return `TCP port ${probe.port}`;
    case "http":
      return `HTTP ${probe.status ?? 200} from port ${probe.port} ${probe.path ?? "/"}`;
    case "console":
      return `/${probe.pattern}/ on the console`;
    case "exec":
      return `"${probe.command?.join(" ")}" in the guest`;
    case "agent":
      return "the guest to answer";
  }
}

/** Tries a probe once. Gives the reason where it fails. */
async function tryProbe(
  machine: Machine,
  spec: MachineSpec,
  probe: Probe,
  signal: AbortSignal,
): Promise<string | undefined> {
  switch (probe.type) {
    case "agent":
      try {
        await machine.guest.ping({ signal, timeout: 2000 });
        return undefined;
      } catch (error) {
        if (error instanceof GuestError) return error.message;
        throw error;
      }
    case "exec": {
      const { status, stderr } = await machine.guest.output(probe.command ?? ["true"], { signal });
      return status === 0
        ? undefined
        : `its exit status is ${status}${stderr.trim() === "" ? "" : ` (${stderr.trim()})`}`;
    }
    case "console": {
      const text = await Deno.readTextFile(machine.consoleLog).catch(() => "");
      const pattern = new RegExp(probe.pattern ?? "", probe.flags);
      return text.split(/\r?\n/).some((line) => pattern.test(line)) ? undefined : "no line matches";
    }
    case "tcp": {
      const forward = findForward(spec, probe.port!);
      if (!forward) return await listens(machine, probe.port!, signal);
      // A port forward accepts before the guest does: only a connection that stays open, or answers, counts.
      const listening = spec.hasAgent ? await listens(machine, probe.port!, signal) : undefined;
      if (listening !== undefined) return listening;
      using connection = await Deno.connect({ hostname: forward.address, port: forward.host });
      return await staysOpen(connection) ? undefined : "the connection is closed at once";
    }
    case "http": {
      const forward = findForward(spec, probe.port!);
      if (!forward) {
        const url = `http://127.0.0.1:${probe.port}${probe.path ?? "/"}`;
        const { stderr } = await machine.guest.output(["wget", "-S", "-O", "/dev/null", url], { signal });
        const found = [...stderr.matchAll(/HTTP\/[\d.]+ (\d{3})/g)].at(-1)?.[1];
        if (found === undefined) return `wget in the guest says: ${stderr.trim().split("\n").at(-1)}`;
        return judge(Number(found), probe);
      }
      return judge(await requestStatus(forward.address, forward.host, probe.path ?? "/", signal), probe);
    }
  }
}

function judge(status: number, probe: Probe): string | undefined {
  const wanted = probe.status ?? 200;
  return status === wanted ? undefined : `its status is ${status} and ${wanted} is wanted`;
}

/** Asks for a page without any proxy that the environment names: the guest is on this host. */
function requestStatus(hostname: string, port: number, path: string, signal: AbortSignal): Promise<number> {
  return new Promise((resolve, reject) => {
    const call = request({ hostname, port, path, signal, agent: false }, (response) => {
      response.resume();
      resolve(response.statusCode ?? 0);
    });
    call.on("error", reject);
    call.end();
  });
}

function findForward(spec: MachineSpec, port: number): { address: string; host: number } | undefined {
  for (const nic of spec.nics) {
    const forward = nic.forwards.find((each) => each.guest === port && each.protocol === "tcp");
    if (forward) {
      return { address: forward.address === "0.0.0.0" ? "127.0.0.1" : forward.address, host: forward.host };
    }
  }
  return undefined;
}

/** Looks in the guest's own table whether something listens (state 0A of `/proc/net/tcp`). */
async function listens(machine: Machine, port: number, signal: AbortSignal): Promise<string | undefined> {
  const { stdout } = await machine.guest.output(
    ["sh", "-c", "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null"],
    { signal },
  );
  const wanted = port.toString(16).toUpperCase().padStart(4, "0");
  return new RegExp(`:${wanted} [0-9A-F]+:0000 0A `).test(stdout) ? undefined : "nothing listens on it";
}

async function staysOpen(connection: Deno.TcpConn): Promise<boolean> {
  const read = connection.read(new Uint8Array(1)).catch(() => null);
  const timeout = new Promise<"open">((resolve) => setTimeout(() => resolve("open"), 300));
  return await Promise.race([read, timeout]) !== null;
}
