/**
 * What machines of KVM are made of: shared memory, taps, and vCPUs on threads.
 *
 * @module
 */

import {
  compileFilter,
  filterSize,
  Mapping,
  PROT_READ,
  Tap,
  VCPU_THREAD_POLICY,
  writeFilter,
} from "../../ffi/mod.ts";
import type { BlockFile } from "../devices/block_file.ts";
import type { GuestMemory } from "../devices/guest_memory.ts";
import { NetDevice } from "../devices/net.ts";
import { openBlockFile } from "../devices/qcow2_file.ts";
import { RateLimiter } from "../devices/rate_limiter.ts";
import { SharedMemory } from "../devices/shared_memory.ts";
import { SocketSet } from "../devices/unix_socket.ts";
import { VsockDevice } from "../devices/vsock.ts";
import { EventLoop } from "../event_loop.ts";
import { Kvm } from "../kvm/vm.ts";
import { Vmm } from "../kvm/vmm.ts";
import type { MachineParts } from "../machine_host.ts";
import { dnsForwards, PortForwards } from "../net/forward.ts";
import { type BridgeSpec, HostNetwork } from "../net/host_network.ts";
import type { BootableConfiguration } from "./config.ts";
import {
  type DriveOptions,
  MachineController,
  type MachineNics,
  type NicDevice,
  type Platform,
} from "./controller.ts";
import type { ControllerHost, HostedMachine } from "./supervisor.ts";

const PAGE = 4096;

/** What a {@linkcode KvmPlatform} is made of. */
export interface KvmPlatformOptions {
  /** The device. */
  readonly kvm: Kvm;
  /** Serves exits. */
  readonly loop: EventLoop;
  /**
   * Makes the tap of a NIC and plugs it into its network.
   *
   * @param network The network
   * @param name Name of the tap
   */
  readonly attachTap: (network: BridgeSpec, name: string) => Promise<Tap>;
}

/** What all machines of a process on `/dev/kvm` share: the device, and the loop that serves all exits. */
export class KvmHost implements ControllerHost {
  readonly #kvm = new Kvm();
  readonly #loop = new EventLoop();
  #isEnding = false;
  #running: Promise<void> | undefined;

  /**
   * See {@linkcode ControllerHost.create}.
   *
   * @param machine The machine
   * @returns What controls it
   */
  create({ isShared, ...machine }: HostedMachine): MachineController {
    const network = new HostNetwork();
    this.#running ??= this.#loop.run(() => this.#isEnding);
    return new MachineController({
      ...machine,
      platform: new KvmPlatform({
        kvm: this.#kvm,
        loop: this.#loop,
        attachTap: (spec, name) => isShared ? network.plugTap(spec, name) : network.attachTap(spec, name),
      }),
    });
  }

  /** Ends the loop. */
  [Symbol.dispose](): void {
    this.#isEnding = true;
    this.#loop.wake();
    void (this.#running ?? Promise.resolve()).then(() => {
      this.#loop[Symbol.dispose]();
      this.#kvm[Symbol.dispose]();
    });
  }
}

/** Runs machines on `/dev/kvm`. */
export class KvmPlatform implements Platform<Vmm> {
  readonly #options: KvmPlatformOptions;

  /**
   * Makes nothing yet.
   *
   * @param options Device, loop and networks
   */
  constructor(options: KvmPlatformOptions) {
    this.#options = options;
  }

  /**
   * See {@linkcode Platform.openSockets}.
   *
   * @returns Makes sockets
   */
  openSockets(): SocketSet {
    return new SocketSet(this.#options.loop);
  }

  /**
   * See {@linkcode Platform.openDrive}.
   *
   * @param path Path of the file
   * @param options How
   * @returns The file
   */
  openDrive(path: string, options: DriveOptions): BlockFile {
    return openBlockFile(path, options);
  }

  /**
   * See {@linkcode Platform.openVsock}.
   *
   * @param guestCid Address of the guest
   * @param path Path of the socket that leads to it
   * @returns The device
   */
  openVsock(guestCid: number, path: string): VsockDevice {
    return new VsockDevice({ guestCid, path, watcher: this.#options.loop });
  }

  /**
   * See {@linkcode Platform.createMemory}.
   *
   * @param length Size in bytes
   * @param resources Disposes it
   * @returns The memory
   */
  createMemory(length: number, resources: DisposableStack): Promise<GuestMemory> {
    return Promise.resolve(resources.use(new SharedMemory(length)));
  }

  /**
   * See {@linkcode Platform.openNics}: each has a tap that is there, or one that lives as long as the machine does.
   *
   * @param configuration The machine
   * @param resources Disposes taps and forwards
   * @returns The NICs
   */
  async openNics(configuration: BootableConfiguration, resources: DisposableStack): Promise<MachineNics> {
    const { loop, attachTap } = this.#options;
    const nics = configuration.networkInterfaces;
    const devices = new Map<string, NicDevice>();
    for (const nic of nics) {
      const { id, network, hostDevName } = nic;
      const backend = resources.use(
        network ? await attachTap(network, hostDevName) : Tap.open(hostDevName),
      );
      devices.set(
        id,
        new NetDevice({
          backend,
          mac: nic.guestMac ?? randomMac(),
          watcher: loop,
          ...(nic.mtu === undefined ? {} : { mtu: nic.mtu }),
          ...(nic.rxRateLimiter ? { receiveLimiter: new RateLimiter(nic.rxRateLimiter) } : {}),
          ...(nic.txRateLimiter ? { transmitLimiter: new RateLimiter(nic.txRateLimiter) } : {}),
        }),
      );
    }
    const forwards = resources.use(new PortForwards());
    // Guests ask the host for names at an address of their network; all machines of it offer that.
    const names = new Set(nics.flatMap(({ network }) => network?.dns ?? []));
    const nameForwards = [...names].flatMap((address) => dnsForwards(address));
    await forwards.set([...configuration.hypertopia.forwards, ...nameForwards]);
    return {
      devices,
      // Where the kernel carries packets, it counts them too.
      files: nics.map(({ hostDevName }) => `/sys/class/net/${hostDevName}/statistics`),
      setForwards: (wanted) => forwards.set([...wanted, ...nameForwards]),
    };
  }

  /**
   * See {@linkcode Platform.build}.
   *
   * @param parts What it is made of
   * @param isConfined Whether its threads are to lay a filter on themselves
   * @param resources Disposes the filter
   * @returns The machine
   */
  build(parts: MachineParts, isConfined: boolean, resources: DisposableStack): Vmm {
    const { kvm, loop } = this.#options;
    const filter = isConfined ? resources.use(threadFilter()) : undefined;
    return new Vmm({ ...parts, kvm, loop, ...(filter ? { threadFilter: filter.address } : {}) });
  }
}

/** The filter of vCPUs' threads, in memory that they can read and nobody can change. */
function threadFilter(): Disposable & { readonly address: bigint } {
  const program = compileFilter(VCPU_THREAD_POLICY);
  const memory = new Mapping(Math.ceil(filterSize(program) / PAGE) * PAGE);
  const address = writeFilter(memory, 0, program);
  memory.protect(PROT_READ);
  return { address, [Symbol.dispose]: () => memory[Symbol.dispose]() };
}

/**
 * Makes up an Ethernet address.
 *
 * @returns A locally administered unicast address
 */
export function randomMac(): string {
  return [2, ...crypto.getRandomValues(new Uint8Array(5))]
    .map((byte) => byte.toString(16).padStart(2, "0")).join(":");
}
