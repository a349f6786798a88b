/**
 * A virtio device on the bus of an emulated PC: the transport of PCI, reached by ports.
 *
 * @module
 */

import type { GuestMemory } from "../devices/guest_memory.ts";
import { PART, PORT_PART, VirtioPciFunction, type VirtioPciState } from "../devices/virtio_pci.ts";
import type { VirtioDevice } from "../devices/virtio_device.ts";
import { CONFIG_SIZE, READABLE_MEMORY, writeConfigSpace } from "../devices/pci_bus.ts";
import type { EmulatedFunction } from "./emulator.ts";

/** Register of configuration space (PCI Local Bus 3.0, section 6.1). */
const COMMAND_REGISTER = 0x04;
/** Ports and bus master. */
const COMMAND = 0x05;

/** What a function works with. */
export interface VirtioFunctionHost {
  /** Memory of the guest. */
  readonly memory: GuestMemory;
  /** Sets its interrupt line. */
  setLine(isHigh: boolean): void;
  /** Is told of what a guest did that devices do not allow. */
  onFault?(message: string): void;
}

/** A virtio device as a function of an emulated PC's bus. */
export class VirtioPortFunction implements EmulatedFunction, Disposable {
  /** See {@linkcode EmulatedFunction.space}. */
  readonly space: Uint8Array<ArrayBuffer> = new Uint8Array(CONFIG_SIZE);
  /** See {@linkcode EmulatedFunction.name}. */
  readonly name: string;
  readonly #function: VirtioPciFunction;
  readonly #memory = new DataView(new ArrayBuffer(READABLE_MEMORY));

  /**
   * Puts a device on the bus.
   *
   * @param device The device
   * @param name Name for messages
   * @param host What it works with
   */
  constructor(device: VirtioDevice, name: string, host: VirtioFunctionHost) {
    this.name = name;
    this.#function = new VirtioPciFunction(device, {
      memory: host.memory,
      signals: { setLine: (isHigh) => host.setLine(isHigh) },
      ...(host.onFault ? { onFault: (message: string) => host.onFault?.(message) } : {}),
    }, { name });
    const view = new DataView(this.space.buffer);
    writeConfigSpace(view, this.#function);
    view.setUint16(COMMAND_REGISTER, COMMAND, true);
    this.#function.attach({ config: view, capabilities: [], memory: this.#memory });
  }

  /**
   * See {@linkcode EmulatedFunction.readPort}.
   *
   * @param offset Which port
   * @param length How many bytes
   * @returns The value
   */
  readPort(offset: number, length: number): number {
    const at = placeOf(offset);
    const data = new Uint8Array(4);
    if (at + length <= READABLE_MEMORY) {
      data.set(new Uint8Array(this.#memory.buffer, at, length));
    } else this.#function.readMemory(at, data.subarray(0, length));
    return new DataView(data.buffer).getInt32(0, true);
  }

  /**
   * See {@linkcode EmulatedFunction.writePort}.
   *
   * @param offset Which port
   * @param value What was written
   * @param length How many bytes
   */
  writePort(offset: number, value: number, length: number): void {
    const data = new DataView(new ArrayBuffer(4));
    data.setUint32(0, value, true);
    this.#function.writeMemory(placeOf(offset), new Uint8Array(data.buffer, 0, length));
  }

  /** Resets it, as its driver does. */
  reset(): void {
    this.#function.reset();
  }

  /** Whether work is under way, or a reset. */
  get isBusy(): boolean {
    return this.#function.device.isBusy ?? false;
  }

  /**
   * Saves what the guest has made of it.
   *
   * @returns What {@linkcode VirtioPortFunction.restore} takes
   */
  save(): VirtioPciState {
    return this.#function.save();
  }

  /**
   * Tells whether what was saved is of such a function.
   *
   * @param state What was saved
   * @returns Whether it is
   */
  fits(state: VirtioPciState): boolean {
    return this.#function.fits(state);
  }

  /**
   * Makes it be what it was.
   *
   * @param state What was saved of a function with the same device
   */
  restore(state: VirtioPciState): void {
    this.#function.restore(state);
  }

  /** Takes the device off the bus; the device itself stays, reset. */
  [Symbol.dispose](): void {
    this.#function[Symbol.dispose]();
  }
}

/** Where a port is in the function's memory. */
function placeOf(offset: number): number {
  if (offset >= PORT_PART.notify) return PART.notify + offset - PORT_PART.notify;
  if (offset >= PORT_PART.device) return PART.device + offset - PORT_PART.device;
  if (offset >= PORT_PART.isr) return PART.isr + offset - PORT_PART.isr;
  return PART.common + offset;
}
