/**
 * The PCI transport of virtio devices, with MSI-X (virtio 1.2, section 4.1; PCI Local Bus 3.0, section 6.8.2).
 *
 * @module
 */

import { Fd, libc } from "../../ffi/mod.ts";
import type { GuestMemory } from "./guest_memory.ts";
import type { PciFunction, PciSlot } from "./pci_bus.ts";
import { VIRTIO_DEVICE, type VirtioDevice, type Watcher } from "./virtio_device.ts";
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, Virtqueue } from "./virtqueue.ts";

/** Where the parts of a function's memory are. The first three pages are read without an exit. */
export const PART = {
  common: 0x0000,
  device: 0x1000,
  msixTable: 0x2000,
  isr: 0x3000,
  pendingBits: 0x3400,
  notify: 0x3800,
} as const;
/** Where they are among the ports of a function that has an interrupt line. */
export const PORT_PART = { common: 0x00, isr: 0x40, device: 0x80, notify: 0x200, size: 0x400 } as const;
const PAGE = 0x1000;
const NOTIFY_MULTIPLIER = 4;
/** As many as fit between {@linkcode PART}'s notify and the end. */
const MAX_QUEUES = 512;

/** Registers of the common configuration (virtio 1.2, section 4.1.4.3). */
const COMMON = {
  deviceFeatureSelect: 0,
  deviceFeature: 4,
  driverFeatureSelect: 8,
  driverFeature: 12,
  configVector: 16,
  queueCount: 18,
  status: 20,
  generation: 21,
  queueSelect: 22,
  queueSize: 24,
  queueVector: 26,
  queueEnable: 28,
  queueNotifyOffset: 30,
  descriptorTable: 32,
  availableRing: 40,
  usedRing: 48,
  size: 56,
} as const;

/** Bits of the device's status (virtio 1.2, section 2.1). */
export const STATUS = {
  acknowledge: 1,
  driver: 2,
  driverOk: 4,
  featuresOk: 8,
  needsReset: 64,
  failed: 128,
} as const;

const NO_VECTOR = 0xffff;
const CAPABILITY_MSIX = 0x11;
const CAPABILITY_VENDOR = 0x09;
const MSIX_ENABLE = 0x8000;
const MSIX_MASK_ALL = 0x4000;
const MSIX_ENTRY = 16;
const ENTRY_MASKED = 1;
/** Offset of the control word in the capability of MSI-X. */
const MSIX_CONTROL = 2;
/** Offsets in virtio's capability for access by configuration space. */
const WINDOW = { bar: 4, offset: 8, length: 12, data: 16 } as const;
/** Which of a function's capabilities it is. */
const WINDOW_CAPABILITY = 4;
const RING_FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX;
/** How often a device that must finish its work before a reset is looked at, in milliseconds. */
const RESET_INTERVAL = 1;

/** Class codes by device type; anything else is "other". */
const CLASS_CODES: Readonly<Record<number, number>> = {
  [VIRTIO_DEVICE.net]: 0x02_0000,
  [VIRTIO_DEVICE.block]: 0x01_8000,
  [VIRTIO_DEVICE.console]: 0x07_8000,
};

/** What the transport needs of the machine. */
export interface VirtioPciHost {
  /** Memory of the guest. */
  readonly memory: GuestMemory;
  /** How the guest is interrupted, and how its notifications come. */
  readonly signals: MessageSignals | LineSignals;
  /** Is told of what a guest did that devices do not allow. */
  onFault?(message: string): void;
}

/** An interrupt line instead of messages: notifications are plain writes, and the function's parts are ports. */
export interface LineSignals {
  /**
   * Sets the function's interrupt line.
   *
   * @param isHigh Whether it asks for service
   */
  setLine(isHigh: boolean): void;
}

/** Interrupts by messages (MSI-X), and notifications by eventfds. */
export interface MessageSignals {
  /** Watches the notifications of queues. */
  readonly watcher: Watcher;
  /**
   * Gives numbers of interrupts for messages.
   *
   * @param count How many
   * @returns The first of them
   */
  allocateInterrupts(count: number): number;
  /**
   * Says where the message of an interrupt goes, and lets an eventfd send it; or ends that.
   *
   * @param gsi Number of the interrupt
   * @param event The eventfd
   * @param message Its address and data; undefined ends it
   */
  setMessage(
    gsi: number,
    event: Fd,
    message: { readonly address: number; readonly addressHigh: number; readonly data: number } | undefined,
  ): void;
  /**
   * Lets writes to an address signal an eventfd, or ends that.
   *
   * @param event The eventfd
   * @param target Where
   */
  setIoEvent(
    event: Fd,
    target: { readonly address: number; readonly length: number; readonly isRemoved?: boolean },
  ): void;
}

/** What a guest has made of a function, as JSON. */
export interface VirtioPciState {
  /** Its status. */
  readonly status: number;
  /** Negotiated features, as decimal digits. */
  readonly accepted: string;
  /** What its interrupt was for. */
  readonly isr: number;
  /** The device's configuration. */
  readonly configuration: readonly number[];
  /** The common configuration. */
  readonly common: readonly number[];
  /** Its queues. */
  readonly queues: readonly {
    readonly isReady: boolean;
    readonly size: number;
    readonly descriptorTable: number;
    readonly availableRing: number;
    readonly usedRing: number;
  }[];
  /** What the device says. */
  readonly device: unknown;
}

interface Vector {
  readonly gsi: number;
  readonly event: Fd;
  isLive: boolean;
  /** What the live message is, to tell whether the guest has changed it. */
  message: string;
}

/** A virtio device as a function of the PCI bus. */
export class VirtioPciFunction implements PciFunction, Disposable {
  /** Numbers of the function. */
  readonly identity: PciFunction["identity"];
  /** MSI-X, and where virtio's parts are. */
  readonly capabilities: readonly Uint8Array[];
  /** What the guest may write of them. */
  readonly capabilityMasks: readonly (Uint8Array | undefined)[];
  /** It has memory. */
  readonly hasMemory = true;
  /** The device. */
  readonly device: VirtioDevice;
  readonly #host: VirtioPciHost;
  readonly #messages: MessageSignals | undefined;
  readonly #line: LineSignals | undefined;
  readonly #name: string;
  readonly #offered: bigint;
  readonly #queues: Virtqueue[];
  readonly #notifyEvents: (Fd | undefined)[];
  readonly #taken = new Set<number>();
  readonly #vectors: Vector[] = [];
  readonly #queueVectors: Uint16Array;
  #configVector = NO_VECTOR;
  #slot!: PciSlot;
  #address: number | undefined;
  #status = 0;
  #accepted = 0n;
  #isr = 0;
  #isActive = false;
  #isResetting = false;
  #isDisposed = false;

  /**
   * Puts a device on the bus.
   *
   * @param device The device
   * @param host What it needs of the machine
   * @param options Its name for messages, and how many vectors the guest gets: one for each queue and one for the
   * configuration unless told
   */
  constructor(
    device: VirtioDevice,
    host: VirtioPciHost,
    options: { readonly name: string; readonly vectors?: number },
  ) {
    this.device = device;
    this.#host = host;
    if ("setLine" in host.signals) this.#line = host.signals;
    else this.#messages = host.signals;
    this.#name = options.name;
    const count = device.queueSizes.length;
    if (count > MAX_QUEUES) throw new RangeError(`Cannot give "${options.name}" ${count} queues`);
    this.identity = {
      vendor: 0x1af4,
      device: 0x1040 + device.type,
      classCode: CLASS_CODES[device.type] ?? 0xff_0000,
      subsystem: 0x1040 + device.type,
    };
    this.#offered = device.features | RING_FEATURES;
    this.#queues = device.queueSizes.map((size, index) => new Virtqueue(host.memory, index, size));
    this.#notifyEvents = this.#queues.map(() => undefined);
    this.#queueVectors = new Uint16Array(count).fill(NO_VECTOR);
    const vectors = this.#messages ? options.vectors ?? count + 1 : 0;
    const first = this.#messages?.allocateInterrupts(vectors) ?? 0;
    for (let index = 0; index < vectors; index++) {
      this.#vectors.push({ gsi: first + index, event: Fd.event(), isLive: false, message: "" });
    }
    const msixMask = new Uint8Array(12);
    msixMask[MSIX_CONTROL + 1] = (MSIX_ENABLE | MSIX_MASK_ALL) >> 8;
    const window = new Uint8Array(20);
    window[WINDOW.bar] = 0xff;
    window.fill(0xff, WINDOW.offset);
    const part = this.#line ? PORT_PART : PART;
    const parts: [capability: Uint8Array, mask?: Uint8Array][] = [
      [virtioCapability(1, part.common, COMMON.size)],
      [virtioCapability(2, part.notify, Math.max(1, count) * NOTIFY_MULTIPLIER, NOTIFY_MULTIPLIER)],
      [virtioCapability(3, part.isr, 1)],
    ];
    if (this.#messages) {
      parts.unshift([msixCapability(vectors), msixMask]);
      parts.push([virtioCapability(5, 0, 0, 0), window]);
    }
    // Drivers refuse a configuration of no bytes.
    if (device.config.length > 0) parts.push([virtioCapability(4, part.device, device.config.length)]);
    this.capabilities = parts.map(([capability]) => capability);
    this.capabilityMasks = parts.map(([, mask]) => mask);
  }

  /** The device's status, as the guest sees it. */
  get status(): number {
    return this.#status;
  }

  /** Whether the driver has set it up. */
  get isActive(): boolean {
    return this.#isActive;
  }

  /**
   * Is told where its parts are.
   *
   * @param slot Its configuration space and memory
   */
  attach(slot: PciSlot): void {
    this.#slot = slot;
    for (let index = 0; index < this.#vectors.length; index++) {
      slot.memory.setUint32(PART.msixTable + MSIX_ENTRY * index + 12, ENTRY_MASKED, true);
    }
    this.#writeCommon();
    this.#showConfig();
  }

  /**
   * Takes a write.
   *
   * @param offset Offset in its memory
   * @param data What was written
   */
  writeMemory(offset: number, data: Uint8Array): void {
    const view = new DataView(data.buffer, data.byteOffset, data.length);
    if (offset < PART.device) {
      // The driver may write a 64-bit register whole or in halves.
      if (data.length === 8) {
        this.#writeRegister(offset, view.getUint32(0, true), 4);
        this.#writeRegister(offset + 4, view.getUint32(4, true), 4);
      } else if (data.length === 4) this.#writeRegister(offset, view.getUint32(0, true), 4);
      else if (data.length === 2) this.#writeRegister(offset, view.getUint16(0, true), 2);
      else if (data.length === 1) this.#writeRegister(offset, data[0]!, 1);
    } else if (offset < PART.msixTable) {
      const at = offset - PART.device;
      if (at + data.length > this.device.config.length || (this.#status & STATUS.driver) === 0) return;
      this.device.writeConfig?.(at, data);
      this.#showConfig();
    } else if (offset < PART.isr) {
      const at = offset - PART.msixTable;
      if (at + data.length > this.#vectors.length * MSIX_ENTRY) return;
      data.forEach((byte, index) => this.#slot.memory.setUint8(offset + index, byte));
      this.#updateVector(Math.floor(at / MSIX_ENTRY));
      if (data.length > 4) this.#updateVector(Math.floor((at + data.length - 1) / MSIX_ENTRY));
    } else if (offset >= PART.notify) {
      const queue = this.#queues[Math.floor((offset - PART.notify) / NOTIFY_MULTIPLIER)];
      if (queue && this.#isActive && queue.isReady) this.#notify(queue);
    }
  }

  /**
   * Answers a read of what is not plain memory.
   *
   * @param offset Offset in its memory
   * @param data To be filled
   */
  readMemory(offset: number, data: Uint8Array): void {
    data.fill(0);
    if (offset === PART.isr) {
      data[0] = this.#isr;
      this.#isr = 0;
      this.#line?.setLine(false);
    } else if (offset >= PART.pendingBits && offset < PART.notify) {
      for (let index = 0; index < data.length * 8; index++) {
        const vector = this.#vectors[(offset - PART.pendingBits) * 8 + index];
        if (vector && !vector.isLive && hasInput(vector.event)) data[index >> 3]! |= 1 << (index & 7);
      }
    }
  }

  /**
   * Is told of a write to a capability.
   *
   * @param index Which one
   * @param offset Where in it the write began
   */
  capabilityWritten(index: number, offset: number): void {
    if (index === 0) {
      for (let vector = 0; vector < this.#vectors.length; vector++) this.#updateVector(vector);
    } else if (index === WINDOW_CAPABILITY) this.#useWindow(offset >= WINDOW.data);
  }

  /**
   * Is told that its memory moved, came or went.
   *
   * @param address Where it is now
   */
  moved(address: number | undefined): void {
    if (this.#address !== undefined) this.#setIoEvents(this.#address, true);
    this.#address = address;
    if (address !== undefined) this.#setIoEvents(address, false);
  }

  /**
   * Saves what the guest has made of it. Nothing may be under way.
   *
   * @returns What {@linkcode VirtioPciFunction.restore} takes
   */
  save(): VirtioPciState {
    const { memory } = this.#slot;
    return {
      status: this.#status,
      accepted: String(this.#accepted),
      isr: this.#isr,
      configuration: [...this.device.config],
      common: [...new Uint8Array(memory.buffer, memory.byteOffset, COMMON.size)],
      queues: this.#queues.map((queue) => ({
        isReady: queue.isReady,
        size: queue.size,
        descriptorTable: queue.descriptorTable,
        availableRing: queue.availableRing,
        usedRing: queue.usedRing,
      })),
      device: this.device.save?.(),
    };
  }

  /**
   * Tells whether what was saved is of a function with such a device: as many queues, no further features.
   *
   * @param state What was saved
   * @returns Whether it is
   */
  fits(state: VirtioPciState): boolean {
    return state.queues.length === this.#queues.length &&
      state.configuration.length === this.device.config.length &&
      (BigInt(state.accepted) & ~this.#offered) === 0n;
  }

  /**
   * Makes it be what it was for a guest whose memory has been restored. It must have an interrupt line.
   *
   * @param state What was saved of a function with the same device
   */
  restore(state: VirtioPciState): void {
    this.#deactivate();
    const { memory } = this.#slot;
    new Uint8Array(memory.buffer, memory.byteOffset, COMMON.size).set(state.common);
    this.#status = state.status;
    this.#accepted = BigInt(state.accepted);
    this.#isr = state.isr;
    state.queues.forEach(({ isReady, ...registers }, index) => {
      const queue = this.#queues[index]!;
      Object.assign(queue, registers);
      queue.isReady = isReady;
      if (isReady) queue.resume(this.#accepted);
    });
    if (this.#isr !== 0) this.#line?.setLine(true);
    this.#showConfig();
    if ((this.#status & STATUS.driverOk) === 0) return;
    this.#activate();
    this.device.restore?.(state.device);
    for (const queue of this.#queues) if (queue.isReady) this.#notify(queue);
  }

  /** Resets it, as its driver does. */
  reset(): void {
    this.#reset();
  }

  /** Takes the device off the bus; the device itself stays, reset. The machine must be gone. */
  [Symbol.dispose](): void {
    if (this.#isDisposed) return;
    this.#isDisposed = true;
    this.#address = undefined;
    this.#deactivate();
    for (const { event } of this.#vectors) event[Symbol.dispose]();
  }

  #writeRegister(offset: number, value: number, length: number): void {
    const { memory } = this.#slot;
    const queue = this.#queues[memory.getUint16(COMMON.queueSelect, true)];
    const isConfigurable = queue && !queue.isReady && !this.#isActive &&
      (this.#status & STATUS.featuresOk) !== 0;
    if (length === 4) {
      switch (offset) {
        case COMMON.deviceFeatureSelect:
          memory.setUint32(offset, value, true);
          return memory.setUint32(COMMON.deviceFeature, word(this.#offered, value), true);
        case COMMON.driverFeatureSelect:
          memory.setUint32(offset, value, true);
          return memory.setUint32(COMMON.driverFeature, word(this.#accepted, value), true);
        case COMMON.driverFeature: {
          const select = memory.getUint32(COMMON.driverFeatureSelect, true);
          if (select > 1 || (this.#status & STATUS.featuresOk) !== 0) return;
          const shift = BigInt(32 * select);
          this.#accepted = this.#accepted & ~(0xffff_ffffn << shift) | BigInt(value) << shift;
          return memory.setUint32(offset, value, true);
        }
      }
      for (const ring of ["descriptorTable", "availableRing", "usedRing"] as const) {
        const at = COMMON[ring];
        if (!isConfigurable || (offset !== at && offset !== at + 4)) continue;
        memory.setUint32(offset, value, true);
        queue[ring] = memory.getUint32(at + 4, true) * 0x1_0000_0000 + memory.getUint32(at, true);
      }
      return;
    }
    if (length === 1) {
      if (offset === COMMON.status) this.#writeStatus(value);
      return;
    }
    switch (offset) {
      case COMMON.configVector:
        this.#configVector = this.#vectors[value] ? value : NO_VECTOR;
        return memory.setUint16(offset, this.#configVector, true);
      case COMMON.queueSelect:
        memory.setUint16(offset, value, true);
        return this.#showQueue();
      case COMMON.queueSize:
        if (isConfigurable) queue.size = value;
        break;
      case COMMON.queueVector:
        if (queue) this.#queueVectors[queue.index] = this.#vectors[value] ? value : NO_VECTOR;
        break;
      case COMMON.queueEnable:
        if (isConfigurable && value === 1) {
          try {
            queue.start(this.#accepted);
            queue.isReady = true;
          } catch (error) {
            this.#fail(error);
          }
        }
        break;
    }
    this.#showQueue();
  }

  #writeStatus(value: number): void {
    if (value === 0) return this.#reset();
    if (this.#isResetting) return;
    // Bits are only ever added: the driver resets to take them back.
    const added = value & ~this.#status;
    const needs = (bit: number, before: number) => (added & bit) !== 0 && (this.#status & before) === before;
    let status = this.#status | added & (STATUS.acknowledge | STATUS.failed);
    if (needs(STATUS.driver, 0) && (status & STATUS.acknowledge) !== 0) status |= STATUS.driver;
    if (
      needs(STATUS.featuresOk, STATUS.driver) && (this.#accepted & ~this.#offered) === 0n &&
      (this.#accepted & VIRTIO_F_VERSION_1) !== 0n
    ) status |= STATUS.featuresOk;
    const isStarting = needs(STATUS.driverOk, STATUS.featuresOk) && (status & STATUS.failed) === 0;
    if (isStarting) status |= STATUS.driverOk;
    this.#setStatus(status);
    if (isStarting) this.#activate();
  }

  #setStatus(status: number): void {
    this.#status = status;
    this.#slot.memory.setUint8(COMMON.status, status);
  }

  #activate(): void {
    this.#isActive = true;
    this.#watchQueues();
    if (this.#address !== undefined) this.#setIoEvents(this.#address, false);
    try {
      this.device.activate({
        memory: this.#host.memory,
        features: this.#accepted,
        queues: this.#queues,
        interrupt: (queue) => {
          if (!this.#isActive || !queue.needsInterrupt()) return;
          this.#isr |= 1;
          if (this.#line) this.#line.setLine(true);
          else this.interruptEvent(queue)?.signal();
        },
        configChanged: () => {
          this.#showConfig();
          if (this.#isActive) this.#interruptConfig();
        },
        fail: (error) => this.#fail(error),
        takeNotifyEvent: (queue) => {
          const event = this.#notifyEvents[queue.index];
          if (!event) throw new Error(`Cannot serve queue ${queue.index} elsewhere as it has no eventfd`);
          this.#messages?.watcher.unwatch(event);
          this.#taken.add(queue.index);
          return event;
        },
        interruptEvent: (queue) => this.interruptEvent(queue),
      });
    } catch (error) {
      this.#fail(error);
    }
  }

  /**
   * The eventfd that interrupts the guest for a queue.
   *
   * @param queue The queue
   * @returns Undefined where the driver wants no interrupt
   */
  interruptEvent(queue: Virtqueue): Fd | undefined {
    return this.#vectors[this.#queueVectors[queue.index]!]?.event;
  }

  #watchQueues(): void {
    if (!this.#messages) return;
    for (const queue of this.#queues) {
      if (!queue.isReady) continue;
      const event = Fd.event();
      this.#notifyEvents[queue.index] = event;
      this.#messages.watcher.watch(event, () => {
        event.drain();
        this.#notify(queue);
      });
    }
  }

  #notify(queue: Virtqueue): void {
    if (!this.#isActive || this.#taken.has(queue.index) || (this.#status & STATUS.needsReset) !== 0) return;
    try {
      this.device.notify(queue);
    } catch (error) {
      this.#fail(error);
    }
  }

  #fail(error: unknown): void {
    this.#host.onFault?.(`${this.#name}: ${error instanceof Error ? error.message : error}`);
    if ((this.#status & STATUS.needsReset) !== 0) return;
    this.#setStatus(this.#status | STATUS.needsReset);
    if (this.#isActive) this.#interruptConfig();
  }

  #interruptConfig(): void {
    const { memory } = this.#slot;
    memory.setUint8(COMMON.generation, memory.getUint8(COMMON.generation) + 1 & 0xff);
    this.#isr |= 2;
    if (this.#line) this.#line.setLine(true);
    else this.#vectors[this.#configVector]?.event.signal();
  }

  #deactivate(): void {
    if (!this.#isActive) return;
    this.#isActive = false;
    this.device.reset();
    if (this.#address !== undefined) this.#setIoEvents(this.#address, true);
    this.#notifyEvents.forEach((event, index) => {
      if (!event) return;
      if (!this.#taken.has(index)) this.#messages?.watcher.unwatch(event);
      event[Symbol.dispose]();
      this.#notifyEvents[index] = undefined;
    });
    this.#taken.clear();
  }

  #reset(): void {
    // Only one may wait: a second one would end after the driver has begun anew.
    if (this.#isResetting) return;
    // A device that did not work for the guest is at most busy for the host, and the driver does not wait for that.
    this.#isResetting = this.#isActive;
    this.#deactivate();
    const finish = () => {
      if (this.#isDisposed) return;
      // The status stays until nothing writes to the guest's memory any more: the driver waits for that.
      if (this.#isResetting && this.device.isBusy) return void setTimeout(finish, RESET_INTERVAL);
      this.#isResetting = false;
      for (const queue of this.#queues) queue.reset();
      this.#queueVectors.fill(NO_VECTOR);
      this.#configVector = NO_VECTOR;
      this.#accepted = 0n;
      this.#isr = 0;
      this.#line?.setLine(false);
      this.#writeCommon();
      this.#showConfig();
      this.#setStatus(0);
    };
    finish();
  }

  #setIoEvents(address: number, isRemoved: boolean): void {
    this.#notifyEvents.forEach((event, index) => {
      if (!event) return;
      const target = { address: address + PART.notify + NOTIFY_MULTIPLIER * index, length: 0, isRemoved };
      this.#messages?.setIoEvent(event, target);
    });
  }

  #writeCommon(): void {
    const { memory } = this.#slot;
    for (let at = 0; at < COMMON.size; at += 4) {
      if (at !== COMMON.status) memory.setUint32(at, 0, true);
    }
    memory.setUint32(COMMON.deviceFeature, word(this.#offered, 0), true);
    memory.setUint16(COMMON.configVector, this.#configVector, true);
    memory.setUint16(COMMON.queueCount, this.#queues.length, true);
    memory.setUint16(COMMON.queueSelect, 0, true);
    this.#showQueue();
  }

  /** Shows the registers of the selected queue. */
  #showQueue(): void {
    const { memory } = this.#slot;
    const queue = this.#queues[memory.getUint16(COMMON.queueSelect, true)];
    memory.setUint16(COMMON.queueSize, queue?.size ?? 0, true);
    memory.setUint16(COMMON.queueVector, queue ? this.#queueVectors[queue.index]! : NO_VECTOR, true);
    memory.setUint16(COMMON.queueEnable, queue?.isReady ? 1 : 0, true);
    memory.setUint16(COMMON.queueNotifyOffset, queue?.index ?? 0, true);
    for (const ring of ["descriptorTable", "availableRing", "usedRing"] as const) {
      const address = queue?.[ring] ?? 0;
      memory.setUint32(COMMON[ring], address % 0x1_0000_0000, true);
      memory.setUint32(COMMON[ring] + 4, Math.floor(address / 0x1_0000_0000), true);
    }
  }

  #showConfig(): void {
    new Uint8Array(this.#slot.memory.buffer, this.#slot.memory.byteOffset + PART.device, PAGE)
      .set(this.device.config);
  }

  /** Lets a vector's eventfd interrupt the guest while the vector is not masked. */
  #updateVector(index: number): void {
    const vector = this.#vectors[index];
    if (!vector) return;
    const { memory, config, capabilities } = this.#slot;
    const control = config.getUint16(capabilities[0]! + MSIX_CONTROL, true);
    const at = PART.msixTable + MSIX_ENTRY * index;
    const isMasked = (control & MSIX_ENABLE) === 0 || (control & MSIX_MASK_ALL) !== 0 ||
      (memory.getUint32(at + 12, true) & ENTRY_MASKED) !== 0;
    const message = {
      address: memory.getUint32(at, true),
      addressHigh: memory.getUint32(at + 4, true),
      data: memory.getUint32(at + 8, true),
    };
    const text = Object.values(message).join();
    if (isMasked ? !vector.isLive : vector.isLive && vector.message === text) return;
    // While nothing takes it, the eventfd keeps what it counts: that is the pending bit.
    if (vector.isLive) this.#messages?.setMessage(vector.gsi, vector.event, undefined);
    vector.isLive = !isMasked;
    vector.message = text;
    if (!isMasked) this.#messages?.setMessage(vector.gsi, vector.event, message);
  }

  /**
   * Access to memory by way of configuration space, which the guest does not use where it can do without: a write to the
   * data goes there, and what is there is shown ahead of a read.
   */
  #useWindow(isWrite: boolean): void {
    const { config, capabilities, memory } = this.#slot;
    const at = capabilities[WINDOW_CAPABILITY]!;
    const offset = config.getUint32(at + WINDOW.offset, true);
    const length = config.getUint32(at + WINDOW.length, true);
    const isValid = config.getUint8(at + WINDOW.bar) === 0 &&
      (length === 1 || length === 2 || length === 4) &&
      offset % length === 0 && offset + length <= PART.notify + MAX_QUEUES * NOTIFY_MULTIPLIER;
    if (!isValid) return;
    const data = new Uint8Array(config.buffer, config.byteOffset + at + WINDOW.data, length);
    if (isWrite) this.writeMemory(offset, data.slice());
    if (offset < PART.isr) data.set(new Uint8Array(memory.buffer, memory.byteOffset + offset, length));
    else this.readMemory(offset, data);
  }
}

/** One 32-bit word of feature bits. */
function word(features: bigint, select: number): number {
  return select > 1 ? 0 : Number(features >> BigInt(32 * select) & 0xffff_ffffn);
}

function hasInput(event: Fd): boolean {
  // struct pollfd: descriptor, wanted events (POLLIN), found events.
  const entry = new Uint8Array(8);
  const view = new DataView(entry.buffer);
  view.setInt32(0, event.number, true);
  view.setInt16(4, 1, true);
  return libc().poll(entry, 1n, 0) > 0;
}

function msixCapability(vectors: number): Uint8Array {
  const bytes = new Uint8Array(12);
  const view = new DataView(bytes.buffer);
  bytes[0] = CAPABILITY_MSIX;
  view.setUint16(MSIX_CONTROL, vectors - 1, true);
  view.setUint32(4, PART.msixTable, true);
  view.setUint32(8, PART.pendingBits, true);
  return bytes;
}

function virtioCapability(type: number, offset: number, length: number, extra?: number): Uint8Array {
  const bytes = new Uint8Array(extra === undefined ? 16 : 20);
  const view = new DataView(bytes.buffer);
  bytes[0] = CAPABILITY_VENDOR;
  bytes[2] = bytes.length;
  bytes[3] = type;
  view.setUint32(8, offset, true);
  view.setUint32(12, length, true);
  if (extra !== undefined) view.setUint32(16, extra, true);
  return bytes;
}
