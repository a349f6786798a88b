/**
 * What a machine of ours is to whoever controls it, whatever executes its guest's code.
 *
 * @module
 */

import type { GuestMemory } from "./devices/guest_memory.ts";
import type { VirtioDevice } from "./devices/virtio_device.ts";

/** Why a machine ended. */
export type EndReason =
  | { readonly kind: "off" }
  | { readonly kind: "reset" }
  | { readonly kind: "killed" }
  | { readonly kind: "crashed"; readonly detail: string };

/** A virtio device with its place on the bus. */
export interface VmmDevice {
  /** Name for messages. */
  readonly name: string;
  /** The device. */
  readonly device: VirtioDevice;
  /** Vectors of MSI-X; one for each queue and one for the configuration unless told. */
  readonly vectors?: number;
}

/** What a machine is made of. */
export interface MachineParts {
  /** Number of vCPUs. */
  readonly cpus: number;
  /** Its memory. */
  readonly memory: GuestMemory;
  /** Path of the kernel. */
  readonly kernel: string;
  /** Paths of the parts of the initramfs. */
  readonly initramfs: readonly string[];
  /** Command line. */
  readonly commandLine: string;
  /** Devices, in the order of their places on the bus. */
  readonly devices: readonly VmmDevice[];
  /** Takes what the guest writes to its serial port; no port without it. */
  readonly onSerial?: (byte: number) => void;
  /** What a reset by the guest does. */
  readonly onReset: "restart" | "end";
  /** Called once when the machine has ended. */
  readonly onEnd: (reason: EndReason) => void;
  /** Is told of what a guest did that devices do not allow. */
  readonly onFault?: (message: string) => void;
}

/** A machine that is built and may run. */
export interface MachineVmm extends Disposable {
  /** How many exits to user space there were so far, by kind. */
  readonly exits: Readonly<Record<string, number>>;
  /** Lets all vCPUs go on. */
  resume(): void;
  /** Stops all vCPUs; settles when they have stopped. */
  pause(): Promise<void>;
  /** Presses the power button: a guest that listens shuts down. */
  pressPowerButton(): void;
  /** Restarts the guest at once, as its reset button does. */
  restart(): void;
  /** Ends the machine at once. */
  kill(): void;
}
