/**
 * What a domain needs of a process that stays: somebody who serves its consoles, the agent's channels and its port forwards,
 * and starts it anew when it restarts. A domain goes on without it, but nobody hears what it says.
 *
 * @module
 */

import { ConsoleRing, EventChannels, Grants, Xen, Xenstore } from "../../ffi/xen/mod.ts";
import { equal, identifyProcess, isRunning, type ProcessIdentity } from "../../planner/mod.ts";
import { SocketSet } from "../devices/unix_socket.ts";
import type { MachineSpec } from "../engine.ts";
import { MachineError } from "../errors.ts";
import { EventLoop } from "../event_loop.ts";
import { delay, readJson } from "../file_machine.ts";
import { removeIfThere, writeWhole } from "../files.ts";
import { guestEndpoints } from "../guest/channel.ts";
import { dnsForwards, PortForwards } from "../net/forward.ts";
import type { Paths } from "../paths.ts";
import type { Log } from "../supervisor/log.ts";
import { DomainConsoles, KERNEL_CONSOLE, serveConsoles } from "./console.ts";
import { backendPath, frontendPath, XENBUS_STATE } from "./devices.ts";
import {
  FURTHER_CONSOLES,
  type KeeperFile,
  launchDomain,
  lockDisk,
  sweepDomains,
  XEN_CHANNELS,
  type XenEnd,
  type XenFiles,
  type XenMachineOptions,
  type XenRunFile,
} from "./launch.ts";
import { SPECIAL_FRAMES } from "./pvh.ts";

/** How long the domain may take to be there, in milliseconds: it is built while this process starts. */
const BUILD_TIMEOUT = 300_000;
/** How long whoever starts this process may take to put it on record, in milliseconds. */
const RECORD_TIMEOUT = 10_000;
/** How often it is looked whether it is, in milliseconds. */
const BUILD_INTERVAL = 20;
/** How often it is looked whether the domain has ended, beside what xenstored tells, in milliseconds. */
const END_INTERVAL = 5000;

/** What a keeper is made of. */
export interface KeeperOptions {
  /** Reads what the machine is made of, which changes while it runs. */
  readonly readSpec: () => Promise<MachineSpec>;
  /** Its files. */
  readonly files: XenFiles;
  /** Folders of this host. */
  readonly paths: Paths;
  /** Takes what happens. */
  readonly log: Log;
  /** Ends it; the domain goes on. */
  readonly signal: AbortSignal;
}

/**
 * Keeps a machine's domain until it has ended, and those that follow when it restarts.
 *
 * @param options The machine
 * @throws {Error} If it cannot
 */
export async function keepDomain(options: KeeperOptions): Promise<void> {
  const { readSpec, files, paths, log, signal } = options;
  const identity = identifyProcess()!;
  await waitForRecord(files, identity);
  let spec = await readSpec();
  await using resources = new AsyncDisposableStack();
  const xen = resources.use(Xen.open());
  const xenstore = resources.use(await Xenstore.connect());
  const eventChannels = resources.use(EventChannels.open());
  const grants = resources.use(Grants.open());
  const loop = resources.use(new EventLoop());
  const done = new AbortController();
  const consoles = resources.use(
    await DomainConsoles.open({
      sockets: resources.use(new SocketSet(loop)),
      eventChannels,
      console: { socket: files.console, log: files.consoleLog },
      ...(spec.hasAgent ? { channels: guestEndpoints(files.folder, XEN_CHANNELS) } : {}),
      warn: (message) => log.warn(message),
    }),
  );
  const forwards = resources.use(new PortForwards());
  await forwards.set([
    ...spec.nics.flatMap((nic) => nic.forwards.map((each) => ({ ...each, guestIp: nic.ip }))),
    ...[...new Set(spec.nics.map(({ dns }) => dns))].flatMap((address) => dnsForwards(address)),
  ]);
  resources.defer(() => removeIfThere(files.keeper));
  const serving = serveConsoles(eventChannels, consoles, loop, done.signal);
  resources.defer(async () => {
    done.abort();
    await serving;
  });
  const host = { xen, xenstore, paths };
  let run = await waitForDomain(files, signal);
  while (run) {
    const { domid } = run;
    let end: XenEnd | "restart" | undefined;
    {
      await using attached = await attach(
        { ...options, spec, xen, xenstore, eventChannels, grants, consoles },
        run,
      );
      await writeWhole(files.keeper, JSON.stringify({ process: identity, domid }));
      end = await waitForEnd(xen, xenstore, domid!, spec, signal);
      // What it wrote last is taken before its memory is gone.
      attached.flush();
    }
    if (!end) return;
    if (end !== "restart") {
      log.info(end.detail);
      const isKept = end.reason === "crash" && (spec.engine as XenMachineOptions).crash === "preserve";
      if (!isKept) await sweepDomains(host, spec.id);
      await writeWhole(files.run, JSON.stringify(isKept ? { ...run, end } : { end }));
      return;
    }
    log.info("the guest restarts: its domain is built anew");
    try {
      await sweepDomains(host, spec.id);
      spec = await readSpec();
      run = await launchDomain(host, spec, files, { signal });
    } catch (error) {
      const detail = `it could not restart: ${error instanceof Error ? error.message : error}`;
      await writeWhole(files.run, JSON.stringify({ end: { reason: "failure", detail } }));
      throw error;
    }
  }
}

/** Whoever starts a keeper puts it on record at once. Nobody would end one that is not, as where that one was killed. */
async function waitForRecord({ keeper }: XenFiles, self: ProcessIdentity): Promise<void> {
  const deadline = Date.now() + RECORD_TIMEOUT;
  while (true) {
    const found = (await readJson<KeeperFile>(keeper))?.process;
    if (equal(found, self)) return;
    if (found && isRunning(found) || Date.now() > deadline) {
      throw new MachineError("Cannot keep the domain as this process is not on record: run apply again");
    }
    await delay(BUILD_INTERVAL);
  }
}

/** The command that started this process builds the domain. */
async function waitForDomain(files: XenFiles, signal: AbortSignal): Promise<XenRunFile | undefined> {
  const deadline = Date.now() + BUILD_TIMEOUT;
  while (!signal.aborted && Date.now() < deadline) {
    const run = await readJson<XenRunFile>(files.run);
    if (run?.end) return undefined;
    if (run?.domid !== undefined) return run;
    await delay(BUILD_INTERVAL);
  }
  return undefined;
}

interface Parts extends KeeperOptions {
  readonly spec: MachineSpec;
  readonly xen: Xen;
  readonly xenstore: Xenstore;
  readonly eventChannels: EventChannels;
  readonly grants: Grants;
  readonly consoles: DomainConsoles;
}

/** Serves the consoles of a domain until it is disposed. */
async function attach(
  parts: Parts,
  run: XenRunFile,
): Promise<AsyncDisposable & { readonly flush: () => void }> {
  const { xen, xenstore, eventChannels, consoles, log, spec } = parts;
  const domid = run.domid!;
  if (xen.domain(domid)?.isDying === false && !(await xenstore.isIntroduced(domid))) {
    throw new MachineError(
      "xenstored was started anew and does not know the domain: shut the guest down, restart the host, then run apply",
    );
  }
  await using resources = new AsyncDisposableStack();
  for (const disk of spec.disks) {
    try {
      resources.use(lockDisk(disk));
    } catch (error) {
      // It was free a moment ago, and the guest has it.
      log.warn(error instanceof Error ? error.message : String(error));
    }
  }
  const page = resources.use(xen.mapGuest(domid, SPECIAL_FRAMES.console, 1));
  const port = eventChannels.bindInterdomain(domid, run.consolePort!);
  resources.defer(() => eventChannels.unbind(port));
  resources.defer(() => consoles.remove(KERNEL_CONSOLE));
  const ring = new ConsoleRing(page.bytes.buffer, (message) => log.warn(message), page.bytes.byteOffset);
  consoles.add(KERNEL_CONSOLE, { ring, port });
  eventChannels.notify(port);
  const further = Array.from({ length: spec.hasAgent ? FURTHER_CONSOLES : 0 }, (_, index) => index + 1);
  for (const number of further) resources.use(await FurtherConsole.watch(parts, domid, number));
  const kept = resources.move();
  return {
    flush: () => further.concat(KERNEL_CONSOLE).forEach((number) => consoles.remove(number)),
    [Symbol.asyncDispose]: () => kept.disposeAsync(),
  };
}

/** A console that the guest connects when its driver is there, and anew when that starts again. */
class FurtherConsole implements AsyncDisposable {
  readonly #parts: Parts;
  readonly #domid: number;
  readonly #number: number;
  #watch: AsyncDisposable | undefined;
  #connection: Disposable | undefined;
  #last: Promise<void> = Promise.resolve();
  #isLookDue = false;
  #isOver = false;

  private constructor(parts: Parts, domid: number, number: number) {
    this.#parts = parts;
    this.#domid = domid;
    this.#number = number;
  }

  static async watch(parts: Parts, domid: number, number: number): Promise<FurtherConsole> {
    const console = new FurtherConsole(parts, domid, number);
    const path = `${frontendPath(domid, "console", number)}/state`;
    console.#watch = await parts.xenstore.watch(path, () => console.#look());
    return console;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#isOver = true;
    try {
      await this.#watch?.[Symbol.asyncDispose]();
    } catch {
      // The connection is lost, and with it all watches.
    }
    await this.#last;
    this.#disconnect();
  }

  /** One look after the other, and one for all that happens before it: a guest can change its mind quickly. */
  #look(): void {
    if (this.#isLookDue) return;
    this.#isLookDue = true;
    this.#last = this.#last.then(async () => {
      this.#isLookDue = false;
      if (this.#isOver) return;
      try {
        await this.#follow();
      } catch (error) {
        const reason = error instanceof Error ? error.message : String(error);
        this.#parts.log.warn(`Cannot connect the console ${this.#number} of the guest as ${reason}`);
      }
    });
  }

  async #follow(): Promise<void> {
    const { xenstore, eventChannels, grants, consoles, log } = this.#parts;
    const front = frontendPath(this.#domid, "console", this.#number);
    const state = Number(await xenstore.read(`${front}/state`));
    const back = `${backendPath(this.#domid, "console", this.#number)}/state`;
    if (state === XENBUS_STATE.Closing || state === XENBUS_STATE.Closed) {
      this.#disconnect();
      // A guest that shuts down waits for each step, and 5 seconds where it is left out.
      return await xenstore.write(back, `${state}`);
    }
    const isConnected = state === XENBUS_STATE.Connected && this.#connection !== undefined;
    if (state !== XENBUS_STATE.Initialised && state !== XENBUS_STATE.Connected || isConnected) return;
    this.#disconnect();
    const [reference, port] = await Promise.all(
      ["ring-ref", "port"].map(async (name) => Number(await xenstore.read(`${front}/${name}`))),
    );
    if (!Number.isInteger(reference) || !Number.isInteger(port)) {
      throw new Error("it names no ring and event channel");
    }
    using connection = new DisposableStack();
    const page = connection.use(grants.map(this.#domid, [reference!]));
    const local = eventChannels.bindInterdomain(this.#domid, port!);
    connection.defer(() => eventChannels.unbind(local));
    connection.defer(() => consoles.remove(this.#number));
    const ring = new ConsoleRing(page.bytes.buffer, (message) => log.warn(message), page.bytes.byteOffset);
    consoles.add(this.#number, { ring, port: local });
    eventChannels.notify(local);
    this.#connection = connection.move();
    await xenstore.write(back, `${XENBUS_STATE.Connected}`);
  }

  #disconnect(): void {
    this.#connection?.[Symbol.dispose]();
    this.#connection = undefined;
  }
}

/** Waits until a domain is over. Gives nothing where this process is to end before it. */
async function waitForEnd(
  xen: Xen,
  xenstore: Xenstore,
  domid: number,
  spec: MachineSpec,
  signal: AbortSignal,
): Promise<XenEnd | "restart" | undefined> {
  let changed = Promise.withResolvers<void>();
  const wake = () => changed.resolve();
  signal.addEventListener("abort", wake);
  let isLost = false;
  void xenstore.closed.then(() => {
    isLost = true;
    wake();
  });
  const watch = await xenstore.watch("@releaseDomain", wake);
  // A xenstored that did not see the domain begin does not see its end.
  const timer = setInterval(wake, END_INTERVAL);
  try {
    while (!signal.aborted) {
      if (isLost) {
        throw new MachineError(
          "Cannot keep the domain as the connection to xenstored is lost: see that it runs, then run apply",
        );
      }
      const domain = xen.domain(domid);
      if (!domain || domain.isDying) return { reason: "stopped", detail: "its domain was destroyed" };
      const { shutdownReason } = domain;
      if (shutdownReason !== undefined) {
        if (shutdownReason === "reboot") return "restart";
        if (shutdownReason === "poweroff") {
          return { reason: "poweroff", detail: "the guest powered off" };
        }
        const { crash = "destroy" } = spec.engine as XenMachineOptions;
        if (crash === "restart") return "restart";
        return { reason: "crash", detail: `the guest crashed (${shutdownReason})` };
      }
      await changed.promise;
      changed = Promise.withResolvers();
    }
    return undefined;
  } finally {
    clearInterval(timer);
    signal.removeEventListener("abort", wake);
    // With the connection all watches are lost.
    if (!isLost) await watch[Symbol.asyncDispose]();
  }
}
