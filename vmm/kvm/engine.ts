/**
 * The KVM engine: one detached supervisor per machine, driven through its API.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { dirname, join } from "node:path";
import { isRunning } from "../../planner/mod.ts";
import type {
  Capabilities,
  Engine,
  MachineNeeds,
  MachineSpec,
  MachineStatus,
  OperationOptions,
} from "../engine.ts";
import { MachineError } from "../errors.ts";
import { delay, killProcess, listMachines, machineIds, readJson } from "../file_machine.ts";
import { lockFile, removeIfThere } from "../files.ts";
import { tailOf } from "../machine_files.ts";
import { canUseTap, lackOfNft, tapName } from "../net/host_network.ts";
import { bridgeOf, hostNetwork, releaseBridges } from "../net/machine_bridges.ts";
import { hostPaths, type Paths } from "../paths.ts";
import { kvmKey, probeOncePerKey } from "../probe_cache.ts";
import {
  machineConfiguration,
  spawnSupervisor,
  START_TIMEOUT,
  startError,
  SupervisedMachine,
} from "../supervised_machine.ts";
import { requestMachine } from "../supervisor/client.ts";
import type { RunFile } from "../supervisor/supervisor.ts";
import { probeKvm } from "./probe.ts";

/** Most vCPUs of a machine. */
const MAX_VCPUS = 32;
/** Options of the engine as a machine has them. */
interface KvmMachineOptions {
  readonly isolation?: "own" | "shared";
}

/** Paths of the process that runs the machines of a stack together. */
interface SharedFiles {
  readonly socket: string;
  readonly run: string;
  readonly lock: string;
  readonly log: string;
}

function sharedFiles(paths: Paths, stack: string): SharedFiles {
  const base = join(paths.data, "supervisors", createHash("sha256").update(stack).digest("hex").slice(0, 16));
  return { socket: `${base}.sock`, run: `${base}.json`, lock: `${base}.lock`, log: `${base}.log` };
}

/** Runs machines on `/dev/kvm`. */
export class KvmEngine implements Engine {
  /** The engine's name. */
  readonly name = "kvm";
  readonly #paths: Paths;

  /**
   * Looks at nothing yet.
   *
   * @param paths Folders of this host
   */
  constructor(paths: Paths = hostPaths()) {
    this.#paths = paths;
  }

  /**
   * Finds out by running code whether KVM works here, and whether it can run what is asked for.
   *
   * @param options What the machine needs
   * @returns What was found
   */
  async probe(
    options: OperationOptions & { engine?: MachineSpec["engine"]; needs?: MachineNeeds } = {},
  ): Promise<Capabilities> {
    const device = await probeOncePerKey(join(this.#paths.cache, "kvm.json"), await kvmKey(), probeKvm);
    const network = device.isUsable ? canUseTap() : { isUsable: false, detail: "not looked at" };
    const findings = [
      { name: "device", isUsable: device.isUsable, detail: device.detail },
      { name: "network", isUsable: network.isUsable, detail: network.detail },
    ];
    const { needs } = options;
    const reason = !device.isUsable
      ? device.detail
      : needs?.hasNics && !network.isUsable
      ? `its NICs need taps: ${network.detail}`
      : needs?.hasFirmware
      ? "it has no firmware to boot a disk by: give the machine a kernel"
      : (needs?.cpus ?? 1) > MAX_VCPUS
      ? `it runs at most ${MAX_VCPUS} vCPUs`
      : needs?.hasNics
      ? await lackOfNft(needs.hasNat)
      : undefined;
    return { engine: "kvm", isUsable: reason === undefined, detail: reason ?? device.detail, findings };
  }

  /**
   * Gives the machine of an identity.
   *
   * @param id Identity
   * @returns The machine, which may not exist yet
   */
  attach(id: string): KvmMachine {
    return new KvmMachine(id, this.#paths);
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

/** A machine on `/dev/kvm`. */
export class KvmMachine extends SupervisedMachine {
  /**
   * Looks at nothing yet.
   *
   * @param id Identity
   * @param paths Folders of this host
   */
  constructor(id: string, paths: Paths) {
    super(id, "kvm", paths);
  }

  /** What the supervisor starts it from: NICs are taps in bridges. */
  protected configure(spec: MachineSpec): unknown {
    return machineConfiguration(spec, this.files, {
      // Each look into configuration space below 1 MiB costs exits.
      words: "pci=noearly",
      nic: (nic) => ({ hostDevName: tapName(spec.id, nic.name), network: bridgeOf(spec, nic) }),
    });
  }

  /** Starts it in a process of its own, or in that of its stack. */
  protected async launch(spec: MachineSpec, options: OperationOptions): Promise<void> {
    if (isShared(spec)) await this.#startShared(spec, options);
    else await this.launchAlone(spec, options);
  }

  /** Ends what its network and its process were for. */
  protected override async release(spec: MachineSpec | undefined): Promise<void> {
    await releaseBridges(this.paths, spec);
    if (spec && isShared(spec)) await this.#releaseShared(spec.stack);
  }

  /** The process for all machines of a stack ends with the last of them. */
  async #releaseShared(stack: string): Promise<void> {
    const shared = sharedFiles(this.paths, stack);
    using _lock = await lockFile(shared.lock);
    for (const id of await machineIds(this.paths)) {
      const spec = await new KvmMachine(id, this.paths).spec();
      if (spec?.stack === stack && isShared(spec)) return;
    }
    const run = await readJson<RunFile>(shared.run);
    if (run?.process && isRunning(run.process)) {
      killProcess(run.process.pid);
      while (isRunning(run.process)) await delay(10);
    }
    for (const path of Object.values(shared)) await removeIfThere(path);
  }

  /** Starts it in the process that runs all machines of its stack, and that process where there is none. */
  async #startShared(spec: MachineSpec, options: OperationOptions): Promise<void> {
    const { api, configuration, run, engineLog } = this.files;
    const shared = sharedFiles(this.paths, spec.stack);
    const request = { api_sock: api, config_file: configuration, run_file: run, log_path: engineLog };
    const call = options.signal ? { signal: options.signal } : {};
    using _lock = await lockFile(shared.lock, call);
    const network = hostNetwork(this.paths);
    for (const nic of spec.nics) await network.ensureBridge(bridgeOf(spec, nic));
    try {
      if (await requestMachine(shared.socket, this.id, request, call)) return;
      let isGone = false;
      void spawnSupervisor(shared.log, spec, [
        ...["--host-sock", shared.socket, "--run-file", shared.run, "--log-path", shared.log],
        ...[
          "--writable",
          this.paths.data,
          "--readable",
          this.paths.cache,
          "--readable",
          dirname(spec.kernel!),
        ],
      ]).status.then(() => isGone = true);
      const deadline = Date.now() + START_TIMEOUT;
      while (!(await requestMachine(shared.socket, this.id, request, call))) {
        if (isGone || Date.now() > deadline) {
          const words = (await tailOf(shared.log, 2000)).trim().split("\n").at(-1) ?? "";
          throw new MachineError(`its supervisor does not answer: ${words}`);
        }
        await delay(20);
      }
    } catch (error) {
      options.signal?.throwIfAborted();
      if (!(error instanceof MachineError)) throw error;
      throw startError(spec, error.message);
    }
  }
}

function isShared(spec: MachineSpec): boolean {
  return (spec.engine as KvmMachineOptions).isolation === "shared";
}
