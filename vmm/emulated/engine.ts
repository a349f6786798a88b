/**
 * The engine for hosts with nothing installed: machines in an emulator of 32-bit PCs that runs within Deno.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { join } from "node:path";
import { isRunning } from "../../planner/mod.ts";
import type {
  Capabilities,
  Engine,
  MachineNeeds,
  MachineNic,
  MachineSpec,
  MachineStatus,
  OperationOptions,
  UpdateResult,
} from "../engine.ts";
import { DATA_CHANNELS, delay, listMachines, machineIds, readJson } from "../file_machine.ts";
import { removeIfThere } from "../files.ts";
import { endPasst, startPasst } from "../net/passt.ts";
import { ensureUserNetwork, releaseUserNetwork } from "../net/user_network_client.ts";
import { userNetworkFiles } from "../net/user_network_protocol.ts";
import { hostPaths, type Paths } from "../paths.ts";
import { COMMAND_LINE, machineConfiguration, SupervisedMachine } from "../supervised_machine.ts";
import type { WarmStart } from "../supervisor/config.ts";
import type { RunFile } from "../supervisor/supervisor.ts";
import { EMULATOR_VERSION, fetchEmulator, KERNEL_WORDS } from "./emulator.ts";
import { SavedStates } from "./saved_states.ts";

/** Most memory of a machine, in bytes: the emulator addresses no more. */
const MAX_MEMORY = 2 ** 31 - 2 ** 20;
/** How often it is tried to end a network that no machine uses, every 20 milliseconds. */
const RELEASE_TRIES = 100;
/** Of our own part of a saved state: changes with what is in it, and with what a guest does before it is saved. */
const STATE_VERSION = 2;
/** Name of the file in a machine's folder that gets what it has booted to. */
const SAVED = "saved.state";

/** What an {@linkcode EmulatedEngine} is given. */
export interface EmulatedEngineOptions {
  /** Whether machines boot from the beginning, and leave nothing for others of their kind to go on from. */
  readonly isCold?: boolean;
}

/** Runs machines in an emulator. */
export class EmulatedEngine implements Engine {
  /** The engine's name. */
  readonly name = "emulated";
  readonly #paths: Paths;
  readonly #options: EmulatedEngineOptions;

  /**
   * Looks at nothing yet.
   *
   * @param paths Folders of this host
   * @param options Whether saved states are used
   */
  constructor(paths: Paths = hostPaths(), options: EmulatedEngineOptions = {}) {
    this.#paths = paths;
    this.#options = options;
  }

  /**
   * Tells whether it can run what is asked for. It needs nothing of the host but Unix sockets.
   *
   * @param options What the machine needs
   * @returns What was found
   */
  probe(options: OperationOptions & { needs?: MachineNeeds } = {}): Promise<Capabilities> {
    const { needs } = options;
    const detail =
      `an emulated 32-bit PC (v86 ${EMULATOR_VERSION}) with one vCPU: slow, and needs nothing installed`;
    const reason = Deno.build.os === "windows"
      ? "its devices lead to Unix sockets, which Deno does not have on Windows"
      : (needs?.cpus ?? 1) > 1
      ? "an emulated machine has one vCPU: set cpus to 1"
      : (needs?.memory ?? 0) > MAX_MEMORY
      ? "an emulated machine has less than 2 GiB of memory: set memory and maxMemory lower"
      : needs?.hasFirmware
      ? "it has no firmware to boot a disk by: give the machine a kernel"
      : needs?.is64Bit
      ? 'an emulated machine has a 32-bit processor: take debian(), and no arch but "i386"'
      : undefined;
    return Promise.resolve({
      engine: "emulated",
      isUsable: reason === undefined,
      detail: reason ?? detail,
      findings: [],
    });
  }

  /**
   * Gives the machine of an identity.
   *
   * @param id Identity
   * @returns The machine, which may not exist yet
   */
  attach(id: string): EmulatedMachine {
    return new EmulatedMachine(id, this.#paths, this.#options);
  }

  /**
   * Lists the machines of this host.
   *
   * @param wanted Only these; all unless told
   * @returns How each one is
   */
  async list(wanted?: ReadonlySet<string>): Promise<MachineStatus[]> {
    return await listMachines(this.#paths, (id) => this.attach(id), wanted);
  }
}

/** A machine in an emulator. */
export class EmulatedMachine extends SupervisedMachine {
  readonly #options: EmulatedEngineOptions;

  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param paths Folders of this host
   * @param options Whether saved states are used
   */
  constructor(id: string, paths: Paths, options: EmulatedEngineOptions = {}) {
    super(id, "emulated", paths);
    this.#options = options;
  }

  /**
   * Looks how it is. One that has lost a network's process is no better than one that has crashed.
   *
   * @returns Its status
   */
  override async status(): Promise<MachineStatus> {
    const status = await super.status();
    if (status.state !== "running") return status;
    const spec = await this.spec();
    for (const nic of spec?.nics ?? []) {
      const { run } = userNetworkFiles(networkFolder(this.paths, spec!, nic));
      const file = await readJson<RunFile>(run);
      if (file?.process && isRunning(file.process)) continue;
      return { ...status, state: "crashed", detail: `the process of its network "${nic.network}" is gone` };
    }
    return status;
  }

  /**
   * Makes it be as a spec says. Networks that are gone come back without a restart.
   *
   * @param spec What it should be made of
   * @param options Signal and progress, and how long a shutdown may take, in milliseconds, where it takes a restart
   * @returns Whether it was restarted
   */
  override async update(
    spec: MachineSpec,
    options: OperationOptions & { shutdownTimeout?: number } = {},
  ): Promise<UpdateResult> {
    const current = await this.spec();
    if (!current || !(await this.isAlive())) return await super.update(spec, options);
    await using _networks = await this.#openNetworks(current, options);
    return await super.update(spec, options);
  }

  /** What the supervisor starts it from: NICs are ports of networks in user space. */
  protected configure(spec: MachineSpec): unknown {
    const warmStart = this.#warmStart(spec);
    return machineConfiguration(spec, this.files, {
      nic: (nic) => ({
        userNetwork: {
          folder: networkFolder(this.paths, spec, nic),
          ip: nic.ip,
          hostname: spec.hostname ?? spec.id,
        },
      }),
      ...(warmStart ? { hypertopia: { warmStart } } : {}),
    });
  }

  /** Starts it in a process of its own, and its networks where they are not there. */
  protected async launch(spec: MachineSpec, options: OperationOptions): Promise<void> {
    // Its supervisor has not what this process knows of registries.
    await fetchEmulator();
    // Of a machine that does not start, nothing stays.
    await using started = new AsyncDisposableStack();
    started.defer(() => this.release(spec));
    const warmStart = this.#warmStart(spec);
    const states = new SavedStates(statesFolder(this.paths));
    if (warmStart?.state !== undefined) {
      await states.use(warmStart.state);
      // Of a start that was cut off.
      await removeIfThere(warmStart.save!);
    }
    options.report?.("booting in the emulator");
    // Its supervisor waits for the networks, which start meanwhile.
    const failed = new AbortController();
    const signal = AbortSignal.any([failed.signal, ...(options.signal ? [options.signal] : [])]);
    const networks = this.#connect(spec, options, started).catch((error) => {
      failed.abort(error);
      throw error;
    });
    // The better code of the slower compiler comes too late for most of what a guest runs, and takes twice the memory.
    const launched = this.launchAlone(spec, { ...options, signal }, ["--v8-flags=--liftoff-only"]);
    const [connected, launch] = await Promise.allSettled([networks, launched]);
    await using _networks = connected.status === "fulfilled" ? connected.value : undefined;
    if (launch.status === "rejected" && !signal.aborted && warmStart?.state !== undefined) {
      // It may be what it went on from.
      await removeIfThere(warmStart.state);
    }
    for (const each of [connected, launch]) if (each.status === "rejected") throw each.reason;
    started.move();
    if (warmStart?.state === undefined) return;
    await states.adopt(warmStart.save!, warmStart.state).catch((error) => {
      options.report?.(`others of its kind boot cold: ${error instanceof Error ? error.message : error}`);
    });
  }

  /** Starts its networks, and what leads out of them. */
  async #connect(
    spec: MachineSpec,
    options: OperationOptions,
    started: AsyncDisposableStack,
  ): Promise<AsyncDisposable> {
    await using networks = new AsyncDisposableStack();
    networks.use(await this.#openNetworks(spec, options));
    for (const nic of spec.nics) {
      const folder = networkFolder(this.paths, spec, nic);
      started.defer(() => endPasst(folder, nic.ip));
      if (nic.nat) await startPasst(folder, nic, options);
    }
    return networks.move();
  }

  /** Starts the processes of its networks that are not there, and keeps them while nobody is connected. */
  async #openNetworks(spec: MachineSpec, options: OperationOptions): Promise<AsyncDisposable> {
    await using networks = new AsyncDisposableStack();
    const sandbox = (spec.engine as { readonly sandbox?: boolean }).sandbox ?? true;
    for (const nic of new Map(spec.nics.map((each) => [each.network, each])).values()) {
      const { cidr, gateway, dns, nat } = nic;
      const folder = networkFolder(this.paths, spec, nic);
      networks.use(await ensureUserNetwork(folder, { cidr, gateway, dns, nat }, { ...options, sandbox }));
    }
    return networks.move();
  }

  /** A network that no machine uses any more leaves nothing on the host. */
  protected override async release(spec: MachineSpec | undefined): Promise<void> {
    if (!spec || spec.nics.length === 0) return;
    const used = new Set<string>();
    for (const id of await machineIds(this.paths)) {
      const machine = new EmulatedMachine(id, this.paths);
      const other = await machine.spec();
      if (!other || !(await machine.isAlive())) continue;
      for (const nic of other.nics) used.add(networkFolder(this.paths, other, nic));
    }
    for (const folder of new Set(spec.nics.map((nic) => networkFolder(this.paths, spec, nic)))) {
      if (used.has(folder)) continue;
      // Its process takes a moment to see that the machine is gone.
      for (let tries = 0; !(await releaseUserNetwork(folder)) && tries < RELEASE_TRIES; tries++) {
        await delay(20);
      }
    }
  }

  #warmStart(spec: MachineSpec): WarmStart | undefined {
    const [initramfs, config] = spec.initramfs;
    if (!spec.hasAgent || initramfs === undefined || config === undefined) return undefined;
    // All that the guest has seen of its machine until it learns who it is.
    const kind = [
      ...[STATE_VERSION, EMULATOR_VERSION, KERNEL_WORDS, COMMAND_LINE, spec.kernel, initramfs, spec.cmdline],
      ...[spec.memory, spec.maxMemory, spec.nics.length, DATA_CHANNELS],
      spec.disks.map(({ size, readOnly }) => [size, readOnly]),
    ];
    const key = createHash("sha256").update(JSON.stringify(kind)).digest("hex").slice(0, 32);
    // What moves to another root gets names and addresses there.
    const isSimple = spec.disks[0]?.name !== "root" &&
      spec.nics.every(({ name }, index) => name === `eth${index}`);
    return {
      key,
      initramfs,
      config,
      nics: isSimple
        ? spec.nics.map(({ ip, cidr, gateway }) => ({ ip, prefix: Number(cidr.split("/")[1]), gateway }))
        : [],
      ...(this.#options.isCold
        ? {}
        : { state: join(statesFolder(this.paths), `${key}.state`), save: join(this.files.folder, SAVED) }),
    };
  }
}

function statesFolder(paths: Paths): string {
  return join(paths.cache, "states");
}

function networkFolder(paths: Paths, spec: MachineSpec, nic: MachineNic): string {
  const name = createHash("sha256").update(`${spec.stack}\n${nic.network}`).digest("hex").slice(0, 16);
  return join(paths.data, "networks", name);
}
