/**
 * What emulated machines are made of: an emulator's memory, and NICs on networks in user space.
 *
 * @module
 */

import { isKnownSystem } from "../../ffi/mod.ts";
import type { BlockFile } from "../devices/block_file.ts";
import { FrameNetDevice } from "../devices/frame_net.ts";
import type { GuestMemory } from "../devices/guest_memory.ts";
import { PlainFile } from "../devices/plain_file.ts";
import { RateLimiter } from "../devices/rate_limiter.ts";
import { PortableSockets } from "../devices/stream_sockets.ts";
import type { VirtioDevice } from "../devices/virtio_device.ts";
import { MachineError } from "../errors.ts";
import type { MachineParts } from "../machine_host.ts";
import { UserNetworkPort } from "../net/user_network_client.ts";
import type { BootableConfiguration, PortForward, WarmStart } from "../supervisor/config.ts";
import type { DriveOptions, MachineNics, NicDevice, Platform } from "../supervisor/controller.ts";
import type { Log } from "../supervisor/log.ts";
import { readState } from "./saved_state.ts";
import { EmulatedPc, EmulatedVmm, type MachineState } from "./vmm.ts";
import { TEMPLATE_WORD } from "./warm_start.ts";

/** How long the process of a network, which starts beside the machine, may take to be there, in milliseconds. */
const NETWORK_PATIENCE = 60_000;

/** What an {@linkcode EmulatedPlatform} is made of. */
export interface EmulatedPlatformOptions {
  /** Identity of the machine. */
  readonly id: string;
  /** Takes what happens to networks. */
  readonly log: Pick<Log, "info" | "warn">;
}

/** Runs one machine in an emulator. */
export class EmulatedPlatform implements Platform<EmulatedVmm> {
  readonly #options: EmulatedPlatformOptions;
  #pc: EmulatedPc | undefined;
  #warmStart: WarmStart | undefined;
  #saved: Promise<MachineState | undefined> | undefined;
  #isWarm = false;

  /**
   * Makes nothing yet.
   *
   * @param options Identity and log
   */
  constructor(options: EmulatedPlatformOptions) {
    this.#options = options;
  }

  /** Whether the machine went on from what another one had booted to. */
  get isWarm(): boolean {
    return this.#isWarm;
  }

  /**
   * Says what the next machine to be built goes on from. It is read while the rest is made.
   *
   * @param warmStart The saved state; undefined where it boots from the beginning
   */
  prepare(warmStart: WarmStart | undefined): void {
    this.#warmStart = warmStart;
    this.#saved = warmStart?.state === undefined ? undefined : readState(warmStart.state, warmStart.key);
    // A failure is found where the state is needed.
    this.#saved?.catch(() => {});
  }

  /**
   * See {@linkcode Platform.createMemory}.
   *
   * @param length Size in bytes
   * @param resources Ends the emulator
   * @returns The memory
   */
  async createMemory(length: number, resources: DisposableStack): Promise<GuestMemory> {
    const pc = await EmulatedPc.create(length);
    resources.defer(() => void pc[Symbol.asyncDispose]());
    this.#pc = pc;
    return pc.emulator.memory;
  }

  /**
   * See {@linkcode Platform.openSockets}.
   *
   * @returns Makes sockets
   */
  openSockets(): PortableSockets {
    return new PortableSockets();
  }

  /**
   * See {@linkcode Platform.openDrive}. Disks of images are of a format that takes more than Deno has.
   *
   * @param path Path of the file
   * @param options How
   * @returns The file
   */
  async openDrive(path: string, options: DriveOptions): Promise<BlockFile> {
    if (options.format === "raw" && !options.isDirect) return new PlainFile(path, options);
    const what = options.format === "raw" ? "past the page cache" : `in the format ${options.format}`;
    refuseUnknownSystem(`use the disk "${path}" ${what}`);
    const { openBlockFile } = await import("../devices/qcow2_file.ts");
    return openBlockFile(path, options);
  }

  /**
   * See {@linkcode Platform.openVsock}.
   *
   * @param guestCid Address of the guest
   * @param path Path of the socket that leads to it
   * @param resources Ends the loop that watches its sockets
   * @returns The device
   */
  async openVsock(guestCid: number, path: string, resources: DisposableStack): Promise<VirtioDevice> {
    refuseUnknownSystem("make a vsock");
    const [{ EventLoop }, { VsockDevice }] = await Promise.all([
      import("../event_loop.ts"),
      import("../devices/vsock.ts"),
    ]);
    const loop = new EventLoop();
    let hasEnded = false;
    void loop.run(() => hasEnded).then(() => loop[Symbol.dispose]());
    resources.defer(() => {
      hasEnded = true;
      loop.wake();
    });
    return new VsockDevice({ guestCid, path, watcher: loop });
  }

  /**
   * See {@linkcode Platform.openNics}.
   *
   * @param configuration The machine
   * @param resources Detaches it from its networks
   * @returns The NICs
   */
  async openNics(configuration: BootableConfiguration, resources: DisposableStack): Promise<MachineNics> {
    const devices = new Map<string, NicDevice>();
    const ports: { readonly ip: string; readonly port: UserNetworkPort }[] = [];
    for (const nic of configuration.networkInterfaces) {
      const { id, userNetwork, guestMac } = nic;
      if (!userNetwork || guestMac === undefined) {
        throw new MachineError(
          `Cannot make NIC "${id}" of an emulated machine without \`user_network\` and \`guest_mac\`: give both`,
        );
      }
      const { folder, ip, hostname } = userNetwork;
      const port = resources.use(
        await UserNetworkPort.connect(folder, {
          machine: this.#options.id,
          nic: id,
          mac: guestMac,
          ip,
          hostname,
          forwards: forwardsTo(configuration.hypertopia.forwards, ip),
        }, { log: this.#options.log, patience: NETWORK_PATIENCE }),
      );
      ports.push({ ip, port });
      devices.set(
        id,
        new FrameNetDevice({
          backend: port,
          mac: guestMac,
          ...(nic.mtu === undefined ? {} : { mtu: nic.mtu }),
          ...(nic.rxRateLimiter ? { receiveLimiter: new RateLimiter(nic.rxRateLimiter) } : {}),
          ...(nic.txRateLimiter ? { transmitLimiter: new RateLimiter(nic.txRateLimiter) } : {}),
        }),
      );
    }
    return {
      devices,
      files: [],
      async setForwards(forwards) {
        for (const { ip, port } of ports) await port.setForwards(forwardsTo(forwards, ip));
      },
    };
  }

  /**
   * See {@linkcode Platform.build}.
   *
   * @param parts What it is made of
   * @returns The machine
   */
  async build(parts: MachineParts): Promise<EmulatedVmm> {
    if (!this.#pc) throw new Error("Cannot build a machine without memory");
    const vmm = new EmulatedVmm(this.#pc, parts);
    const warmStart = this.#warmStart;
    if (!warmStart) return vmm.load(), vmm;
    const state = await this.#takeState(vmm);
    if (!state) {
      vmm.load({
        initramfs: [warmStart.initramfs],
        commandLine: `${parts.commandLine} ${TEMPLATE_WORD}`,
      });
      vmm.isTemplate = true;
      return vmm;
    }
    try {
      await vmm.restore(state);
    } catch (cause) {
      // The emulator is of no use any more.
      throw new MachineError(
        `Cannot go on from the saved state "${warmStart.state}" as ${
          cause instanceof Error ? cause.message : cause
        }: run apply again, which boots cold`,
        { cause },
      );
    }
    this.#isWarm = true;
    this.#options.log.info(`it goes on from the saved state ${warmStart.state}`);
    return vmm;
  }

  /** Gives the state that was read; undefined where there is none that is of use. */
  async #takeState(vmm: EmulatedVmm): Promise<MachineState | undefined> {
    const saved = this.#saved;
    this.#saved = undefined;
    try {
      const state = await saved;
      const reason = state && vmm.lacks(state);
      if (reason === undefined) return state;
      throw new MachineError(`Cannot go on from the saved state "${this.#warmStart!.state}" as ${reason}`);
    } catch (error) {
      this.#options.log.warn(`${error instanceof Error ? error.message : error}: it boots cold`);
      return undefined;
    }
  }
}

function forwardsTo(forwards: readonly PortForward[], ip: string): PortForward[] {
  return forwards.filter(({ guestIp }) => guestIp === ip);
}

/** Some of what devices can do takes calls of the kernel. */
function refuseUnknownSystem(action: string): void {
  if (isKnownSystem()) return;
  throw new MachineError(
    `Cannot ${action} for an emulated machine on ${Deno.build.os} on ${Deno.build.arch} as it takes Linux on x86_64: ` +
      `do without, or choose another engine`,
  );
}
