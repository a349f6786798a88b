/**
 * The two sides that use a network's process: the engine, which makes it run, and the process of a machine, which joins
 * its NICs.
 *
 * @module
 */

import { equal, isRunning } from "../../planner/mod.ts";
import { moduleBeside, spawnDetached } from "../detached.ts";
import type { OperationOptions } from "../engine.ts";
import { MachineError } from "../errors.ts";
import { exists, lockFile, removeIfThere } from "../files.ts";
import { tailOf } from "../machine_files.ts";
import type { Log } from "../supervisor/log.ts";
import type { RunFile } from "../supervisor/supervisor.ts";
import { FrameStream } from "./frame_stream.ts";
import { endAllPasst } from "./passt.ts";
import {
  JsonLines,
  type NicAttachment,
  type NicForward,
  type UserNetworkFiles,
  userNetworkFiles,
  type UserNetworkSpec,
  type UserNetworkStatus,
} from "./user_network_protocol.ts";

/** How long a process may take until it answers, in milliseconds. */
const START_TIMEOUT = 120_000;
/** How long it may take to answer a request, in milliseconds. */
const ANSWER_TIMEOUT = 30_000;
/** How long it may take to say how it is, in milliseconds: longer, and it is of no use. */
const STATUS_TIMEOUT = 5000;
/** How long it may take to end, in milliseconds. */
const END_TIMEOUT = 5000;
/** How long a lost connection is left before it is made again, in milliseconds. */
const RECONNECT_TIME = 1000;
/** Longest path of a Unix socket, in bytes: 107 on Linux, 103 on macOS. */
const MAX_SOCKET_PATH = 103;

/** What {@linkcode ensureUserNetwork} can be given. */
export interface EnsureUserNetworkOptions extends OperationOptions {
  /** Whether the process gives up what it does not need; it does unless told. */
  readonly sandbox?: boolean;
}

/**
 * Makes the process of a network run and be as it should. It ends by itself a while after its last client has left.
 *
 * @param folder Folder of the network
 * @param spec The network
 * @param options Signal and progress
 * @returns Keeps the process from ending for want of clients, until it is disposed
 * @throws {MachineError} If the process cannot be started, with its own words
 */
export async function ensureUserNetwork(
  folder: string,
  spec: UserNetworkSpec,
  options: EnsureUserNetworkOptions = {},
): Promise<Disposable> {
  const files = userNetworkFiles(folder);
  if (new TextEncoder().encode(files.control).length > MAX_SOCKET_PATH) {
    throw new MachineError(
      `Cannot start the network ${spec.cidr} as the folder "${folder}" makes socket paths longer than ` +
        `${MAX_SOCKET_PATH} bytes: set HYPERTOPIA_HOME to a shorter path`,
    );
  }
  using _lock = await lock(files, options);
  const found = await askStatus(files);
  if (found && equal(specOf(found.status), spec)) return found.client;
  found?.client[Symbol.dispose]();
  if (found) options.report?.(`starting the network ${spec.cidr} anew, as it was changed`);
  await endProcess(files);
  options.signal?.throwIfAborted();
  const child = spawnDetached(moduleBeside("./user_network_main", import.meta.url), files.log, [
    ...["--folder", folder, "--log-path", files.log],
    ...["--cidr", spec.cidr, "--gateway", spec.gateway, "--dns", spec.dns, spec.nat ? "--nat" : "--no-nat"],
    ...(options.sandbox ?? true ? [] : ["--no-sandbox"]),
  ]);
  let isGone = false;
  void child.status.then(() => isGone = true);
  const deadline = Date.now() + START_TIMEOUT;
  try {
    while (true) {
      const hasEnded = isGone;
      const started = await askStatus(files);
      if (started) return started.client;
      if (hasEnded || Date.now() > deadline) {
        const words = (await tailOf(files.log, 2000)).trim().split("\n").at(-1) ?? "";
        throw new MachineError(
          `Cannot start the network ${spec.cidr} as its process ${
            hasEnded ? "ended" : "does not answer"
          }: ${words}`,
        );
      }
      options.signal?.throwIfAborted();
      await delay(20);
    }
  } catch (error) {
    if (!isGone) child.kill("SIGKILL");
    throw error;
  }
}

/**
 * Ends the process of a network and removes its folder, unless somebody is connected.
 *
 * @param folder Folder of the network
 * @returns Whether it is gone
 */
export async function releaseUserNetwork(folder: string): Promise<boolean> {
  if (!(await exists(folder))) return true;
  const files = userNetworkFiles(folder);
  using _lock = await lock(files, {});
  const found = await askStatus(files);
  found?.client[Symbol.dispose]();
  if (found && found.status.clients > 1) return false;
  await endProcess(files);
  await endAllPasst(folder);
  await removeIfThere(folder);
  return true;
}

function lock(files: UserNetworkFiles, { signal, report }: OperationOptions): Promise<Disposable> {
  return lockFile(files.lock, {
    ...(signal ? { signal } : {}),
    onWait: () => report?.("waiting for another command to finish with this network"),
  });
}

function specOf({ cidr, gateway, dns, nat }: UserNetworkSpec): UserNetworkSpec {
  return { cidr, gateway, dns, nat };
}

/** Asks the process how it is; undefined where it does not answer. */
async function askStatus(
  files: UserNetworkFiles,
): Promise<{ client: JsonLines; status: UserNetworkStatus } | undefined> {
  let client: JsonLines | undefined;
  try {
    client = new JsonLines(await Deno.connect({ transport: "unix", path: files.control }));
    return { client, status: await request<UserNetworkStatus>(client, { status: {} }, STATUS_TIMEOUT) };
  } catch {
    client?.[Symbol.dispose]();
    return undefined;
  }
}

/** Ends the process that the folder tells of, if it runs. */
async function endProcess(files: UserNetworkFiles): Promise<void> {
  const run = await readRun(files.run);
  if (!run?.process) return;
  const deadline = Date.now() + END_TIMEOUT;
  for (let signal: Deno.Signal = "SIGTERM"; isRunning(run.process); signal = "SIGKILL") {
    try {
      Deno.kill(run.process.pid, signal);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
    while (isRunning(run.process) && (signal === "SIGKILL" || Date.now() < deadline)) await delay(10);
  }
}

async function readRun(path: string): Promise<RunFile | undefined> {
  try {
    return JSON.parse(await Deno.readTextFile(path)) as RunFile;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** One request, one answer. Where that fails, the connection is of no use any more, unless the request was refused. */
async function request<T>(client: JsonLines, value: unknown, timeout = ANSWER_TIMEOUT): Promise<T> {
  const timer = setTimeout(() => client[Symbol.dispose](), timeout);
  try {
    await client.write(value);
    const answer = await client.read() as (T & { readonly error?: string }) | undefined;
    if (answer === undefined) throw new LinkLostError("the network's process does not answer");
    if (answer.error !== undefined) throw new MachineError(answer.error);
    return answer;
  } catch (cause) {
    if (cause instanceof MachineError) throw cause;
    throw new LinkLostError("the network's process has ended", { cause });
  } finally {
    clearTimeout(timer);
  }
}

/** The process cannot be talked to. */
class LinkLostError extends MachineError {}

interface Link {
  readonly client: JsonLines;
  readonly stream: FrameStream;
}

/** What a {@linkcode UserNetworkPort} can be given. */
export interface UserNetworkPortOptions {
  /** Takes what happens to the connection. */
  readonly log?: Pick<Log, "info" | "warn">;
  /** How long to wait for the network's process where it does not run yet, in milliseconds; no time unless told. */
  readonly patience?: number;
}

/**
 * A NIC's place in a network. Where the network's process is lost, the link is down until the process runs again, and then
 * comes up by itself.
 */
export class UserNetworkPort implements Disposable {
  /** Takes a frame for the NIC, which is lent until it returns. */
  onFrame: (frame: Uint8Array) => void = () => {};
  readonly #files: UserNetworkFiles;
  readonly #log: UserNetworkPortOptions["log"];
  #nic: NicAttachment;
  #link: Link | undefined;
  #last: Promise<void> = Promise.resolve();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #isDisposed = false;
  /** Why it could not be attached again, to say so once. */
  #trouble = "";

  private constructor(folder: string, nic: NicAttachment, options: UserNetworkPortOptions) {
    this.#files = userNetworkFiles(folder);
    this.#nic = nic;
    this.#log = options.log;
  }

  /**
   * Attaches a NIC to a network.
   *
   * @param folder Folder of the network
   * @param nic The NIC
   * @param options Log, and how long to wait for the network's process
   * @returns Its port
   * @throws {MachineError} If it cannot be attached, and why
   */
  static async connect(
    folder: string,
    nic: NicAttachment,
    options: UserNetworkPortOptions = {},
  ): Promise<UserNetworkPort> {
    const port = new UserNetworkPort(folder, nic, options);
    const deadline = Date.now() + (options.patience ?? 0);
    while (true) {
      try {
        await port.#attach(nic);
        return port;
      } catch (error) {
        const { cause } = error as Error;
        const isAbsent = cause instanceof Deno.errors.NotFound ||
          cause instanceof Deno.errors.ConnectionRefused;
        if (!isAbsent || Date.now() > deadline) throw error;
      }
      await delay(10);
    }
  }

  /** Whether frames go through. */
  get isUp(): boolean {
    return this.#link !== undefined;
  }

  /**
   * Sends a copy of a frame from the NIC.
   *
   * @param frame The frame
   * @returns Whether it was taken; false where too many wait, or the link is down
   */
  send(frame: Uint8Array): boolean {
    return this.#link?.stream.send(frame) ?? false;
  }

  /**
   * Changes the ports of the host that lead to the NIC.
   *
   * @param forwards All of them
   * @throws {MachineError} If a port cannot be had, or the network's process is lost; the forwards before count then when
   * the link comes up again
   */
  setForwards(forwards: readonly NicForward[]): Promise<void> {
    return this.#inTurn(async () => {
      const nic = { ...this.#nic, forwards };
      if (this.#link) await this.#ask(this.#link, { forwards: forwards.map(printForward) });
      else await this.#attach(nic);
      this.#nic = nic;
    });
  }

  /** Leaves the network; its forwards end. */
  [Symbol.dispose](): void {
    this.#isDisposed = true;
    clearTimeout(this.#timer);
    this.#lose(this.#link);
  }

  /** One thing after the other: answers have no number. */
  #inTurn(run: () => Promise<void>): Promise<void> {
    const done = this.#last.then(run);
    this.#last = done.catch(() => {});
    return done;
  }

  async #ask(link: Link, value: unknown): Promise<void> {
    try {
      await request(link.client, value);
    } catch (error) {
      if (error instanceof LinkLostError) this.#lose(link);
      throw error;
    }
  }

  async #attach(nic: NicAttachment): Promise<void> {
    const { control } = this.#files;
    const connections: Disposable[] = [];
    try {
      const client = new JsonLines(await Deno.connect({ transport: "unix", path: control }));
      connections.push(client);
      const attach = { ...nic, forwards: nic.forwards.map(printForward) };
      const { frames } = await request<{ readonly frames: string }>(client, { attach });
      const stream = new FrameStream(await Deno.connect({ transport: "unix", path: frames }));
      connections.push(stream);
      if (this.#isDisposed) throw new MachineError("the NIC is gone");
      this.#hear(this.#link = { client, stream });
    } catch (cause) {
      for (const connection of connections) connection[Symbol.dispose]();
      const reason = cause instanceof MachineError ? cause.message : "the network's process does not run";
      throw new MachineError(
        /^Cannot /.test(reason)
          ? reason
          : `Cannot attach ${nic.machine}/${nic.nic} to its network as ${reason}: run apply again`,
        { cause },
      );
    }
  }

  #hear(link: Link): void {
    void link.stream.receive((frame) => this.onFrame(frame)).catch((error) => {
      this.#log?.warn(`the link to the network is broken: ${(error as Error).message}`);
    }).then(() => this.#lose(link));
  }

  #lose(link: Link | undefined): void {
    if (!link || this.#link !== link) return;
    this.#link = undefined;
    link.client[Symbol.dispose]();
    link.stream[Symbol.dispose]();
    if (this.#isDisposed) return;
    this.#log?.warn("the network's process is lost: its link is down until it runs again");
    this.#reconnect();
  }

  #reconnect(): void {
    this.#timer = setTimeout(() => {
      void this.#inTurn(async () => {
        if (this.#link || this.#isDisposed) return;
        try {
          await this.#attach(this.#nic);
          this.#trouble = "";
          this.#log?.info("the link to the network is up again");
        } catch (error) {
          if (this.#isDisposed) return;
          const { message } = error as Error;
          if (message !== this.#trouble) this.#log?.warn(message);
          this.#trouble = message;
          this.#reconnect();
        }
      });
    }, RECONNECT_TIME);
  }
}

/** Forwards may have more fields, which are not for the network. */
function printForward({ protocol, address, host, guest }: NicForward): NicForward {
  return { protocol, address, host, guest };
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
