/**
 * The network device (virtio 1.2, section 5.1). The kernel serves it by vhost-net where that is there; otherwise packets
 * go straight between the tap and the guest's memory.
 *
 * @module
 */

import {
  errno,
  Fd,
  type InterfaceCounters,
  libc,
  NET_HEADER_SIZE,
  SysError,
  TUN_F,
  Vhost,
} from "../../ffi/mod.ts";
import { MachineError } from "../errors.ts";
import type { GuestMemory } from "./guest_memory.ts";
import type { RateLimiter } from "./rate_limiter.ts";
import { type DeviceContext, VIRTIO_DEVICE, type VirtioDevice, type Watcher } from "./virtio_device.ts";
import {
  type DescriptorChain,
  type Segment,
  totalLength,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  type Virtqueue,
  VirtqueueError,
} from "./virtqueue.ts";

/** Features of the network device (virtio 1.2, section 5.1.3). */
export const NET_FEATURE = {
  CSUM: 1n << 0n,
  GUEST_CSUM: 1n << 1n,
  MTU: 1n << 3n,
  MAC: 1n << 5n,
  GUEST_TSO4: 1n << 7n,
  GUEST_TSO6: 1n << 8n,
  GUEST_ECN: 1n << 9n,
  HOST_TSO4: 1n << 11n,
  HOST_TSO6: 1n << 12n,
  HOST_ECN: 1n << 13n,
  MRG_RXBUF: 1n << 15n,
  STATUS: 1n << 16n,
} as const;

/** The queue that the guest receives from, and the one that it sends by. */
export const NET_QUEUE = { receive: 0, transmit: 1 } as const;

const VHOST_PATH = "/dev/vhost-net";
const RING_FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX;
/** Where the header says how many buffers a packet takes. */
const NUM_BUFFERS = 10;
/** Size of the header of a frame. */
export const ETHERNET_HEADER_SIZE = 14;
/** Largest packet with its headers: the largest IP packet behind an Ethernet header with two VLAN tags. */
const MAX_PACKET = NET_HEADER_SIZE + ETHERNET_HEADER_SIZE + 8 + 65_535;
/** `UIO_MAXIOV` (Linux 6.1 `include/uapi/linux/uio.h`). */
const MAX_VECTORS = 1024;
/** Packets of one turn: other devices want theirs too. */
const BATCH = 64;
const EINTR = 4;
const EAGAIN = 11;
/** Offsets in the configuration, and its size (virtio 1.2, section 5.1.4). */
const CONFIG = { mac: 0, status: 6, mtu: 10, size: 12 } as const;
const STATUS_LINK_UP = 1;

/** The host's end of the cable. Each frame follows a header of 12 bytes, as {@linkcode Tap} has it. */
export interface NetBackend extends Disposable {
  /** Packets are read and written here; calls do not wait. */
  readonly fd: Fd;
  /**
   * Says what may be left to the guest.
   *
   * @param flags {@linkcode TUN_F}
   */
  setOffload(flags: number): void;
  /** Reads the counters of the interface, as the host sees it. */
  readCounters(): InterfaceCounters;
}

/** Limits bytes and packets. */
export type Limiter = Pick<RateLimiter, "consume">;

/** How a network device is made. */
export interface NetDeviceOptions {
  /** Where packets go; the device closes it in the end. */
  readonly backend: NetBackend;
  /** Ethernet address of the guest's NIC, such as `02:00:00:00:00:01`. */
  readonly mac: string;
  /** Watches the backend for packets. */
  readonly watcher: Watcher;
  /** Largest frame without its Ethernet header, for the guest to know; 1500 for the guest if not told. */
  readonly mtu?: number;
  /** Whether the kernel serves the queues; `auto`, the default, takes it where it is there and no limit is set. */
  readonly vhost?: "auto" | boolean;
  /** Limits what the guest receives. */
  readonly receiveLimiter?: Limiter;
  /** Limits what the guest sends. */
  readonly transmitLimiter?: Limiter;
}

/** A network device. */
export class NetDevice implements VirtioDevice {
  /** Its type. */
  readonly type: number = VIRTIO_DEVICE.net;
  /** Features that it offers. */
  readonly features: bigint;
  /** Sizes of its queues. */
  readonly queueSizes: readonly number[] = [256, 256];
  /** Ethernet address, state of the link, MTU. */
  readonly config: Uint8Array<ArrayBuffer>;
  readonly #options: NetDeviceOptions;
  readonly #limiters: { receive?: Limiter; transmit?: Limiter };
  readonly #vhost: Vhost | undefined;
  /** Signalled by vhost where the guest broke the rules, and by this device where it has more to send. */
  readonly #event = Fd.event();
  readonly #vectors = new Uint32Array(4 * MAX_VECTORS);
  readonly #vectorBytes = new Uint8Array(this.#vectors.buffer);
  /** Takes what does not fit in a buffer of the guest. */
  readonly #overflow = new Uint8Array(MAX_PACKET);
  readonly #overflowAddress = addressOf(this.#overflow);
  readonly #counters = { rxPackets: 0, rxBytes: 0, rxDropped: 0, txPackets: 0, txBytes: 0, txDropped: 0 };
  #context: DeviceContext | undefined;
  #memoryAddress = 0;
  /** Queues that vhost serves. */
  #vhostQueues: Virtqueue[] = [];
  #isWatching = false;
  /** Size of a whole packet in the overflow that waits for more buffers. */
  #held = 0;
  /** Bytes of the last received packet that the limiter did not allow yet. */
  #owed = 0;
  #receiveTimer: ReturnType<typeof setTimeout> | undefined;
  #transmitTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a device whose link is up.
   *
   * @param options What it is made of
   * @throws {Error} If vhost-net is a must and cannot be used
   */
  constructor(options: NetDeviceOptions) {
    this.#options = options;
    this.#limiters = {
      ...(options.receiveLimiter ? { receive: options.receiveLimiter } : {}),
      ...(options.transmitLimiter ? { transmit: options.transmitLimiter } : {}),
    };
    this.#vhost = openVhost(options);
    let features = 0n;
    for (const feature of Object.values(NET_FEATURE)) features |= feature;
    if (options.mtu === undefined) features &= ~NET_FEATURE.MTU;
    // Offloads are the tap's; only how buffers are used is vhost's.
    if (this.#vhost) features &= this.#vhost.features | ~NET_FEATURE.MRG_RXBUF;
    this.features = features;
    this.config = netConfiguration(options);
  }

  /**
   * Changes limits, which hold from the next packet on.
   *
   * @param limiters The limits that change
   * @throws {MachineError} If the kernel serves the queues, which knows no limits
   */
  updateLimiters(limiters: { readonly receive?: Limiter; readonly transmit?: Limiter }): void {
    if (this.#vhost) {
      throw new MachineError(
        "Cannot limit the NIC as the kernel carries its packets: configure a limit before the machine starts",
      );
    }
    Object.assign(this.#limiters, limiters);
  }

  /** Whether the kernel serves the queues. */
  get isVhost(): boolean {
    return this.#vhost !== undefined;
  }

  /** What was received and sent so far, as the guest sees it; bytes without headers of virtio. */
  get counters(): InterfaceCounters {
    if (!this.#vhost) return { ...this.#counters };
    const host = this.#options.backend.readCounters();
    return {
      rxPackets: host.txPackets,
      rxBytes: host.txBytes,
      rxDropped: host.txDropped,
      txPackets: host.rxPackets,
      txBytes: host.rxBytes,
      txDropped: host.rxDropped,
    };
  }

  /**
   * Begins to carry packets.
   *
   * @param context What to work with
   */
  activate(context: DeviceContext): void {
    const { backend, watcher } = this.#options;
    this.#context = context;
    this.#memoryAddress = context.memory.address;
    try {
      backend.setOffload(offloadOf(context.features));
      watcher.watch(this.#event, () => this.#onEvent());
      if (this.#vhost) return this.#startVhost(this.#vhost, context);
      this.#setLink(true);
      for (const queue of context.queues) if (queue.isReady) this.notify(queue);
    } catch (error) {
      context.fail(error);
    }
  }

  /**
   * Looks at a queue.
   *
   * @param queue The queue
   */
  notify(queue: Virtqueue): void {
    if (queue.index === NET_QUEUE.receive) this.#receiveAll();
    else this.#transmitAll();
  }

  /** Forgets the guest. */
  reset(): void {
    if (!this.#context) return;
    this.#context = undefined;
    clearTimeout(this.#receiveTimer);
    clearTimeout(this.#transmitTimer);
    this.#receiveTimer = this.#transmitTimer = undefined;
    this.#held = this.#owed = 0;
    this.#watchBackend(false);
    this.#options.watcher.unwatch(this.#event);
    for (const { index } of this.#vhostQueues.splice(0)) {
      this.#vhost?.setNetBackend(index, undefined);
      this.#vhost?.clearQueue(index);
    }
  }

  /** Ends it and closes the backend. */
  [Symbol.dispose](): void {
    this.reset();
    this.#vhost?.[Symbol.dispose]();
    this.#event[Symbol.dispose]();
    this.#options.backend[Symbol.dispose]();
  }

  #startVhost(vhost: Vhost, context: DeviceContext): void {
    vhost.setFeatures(context.features & (RING_FEATURES | NET_FEATURE.MRG_RXBUF));
    vhost.setMemory(context.memory);
    for (const queue of context.queues) {
      if (!queue.isReady) continue;
      this.#vhostQueues.push(queue);
      vhost.setQueue(context.memory, queue, {
        kick: context.takeNotifyEvent(queue),
        call: context.interruptEvent(queue),
        error: this.#event,
      });
    }
    for (const { index } of this.#vhostQueues) vhost.setNetBackend(index, this.#options.backend.fd);
  }

  #onEvent(): void {
    this.#event.drain();
    if (this.#vhost) this.#context?.fail(new VirtqueueError("vhost-net met a buffer that breaks the rules"));
    else this.#transmitAll();
  }

  /** Sends what the guest offers, up to a batch. */
  #transmitAll(): void {
    const context = this.#context;
    const queue = context?.queues[NET_QUEUE.transmit];
    if (!context || !queue?.isReady || this.#transmitTimer !== undefined) return;
    let count = 0;
    try {
      queue.setNotification(false);
      for (;; count++) {
        if (count === BATCH) {
          this.#event.signal();
          break;
        }
        const chain = popOrWait(queue);
        if (!chain) break;
        const wait = this.#limiters.transmit?.consume(totalLength(chain.readable)) ?? 0;
        if (wait > 0) {
          queue.unpop();
          this.#transmitTimer = setTimeout(() => {
            this.#transmitTimer = undefined;
            this.#transmitAll();
          }, wait);
          break;
        }
        this.#transmit(chain);
        queue.push(chain.head, 0);
      }
      if (count > 0) context.interrupt(queue);
    } catch (error) {
      context.fail(error);
    }
  }

  #transmit({ readable }: DescriptorChain): void {
    const length = totalLength(readable);
    // The host checks the header. What it refuses, and what it cannot take now, is lost as on any cable.
    const isSent = length >= NET_HEADER_SIZE + ETHERNET_HEADER_SIZE && length <= MAX_PACKET &&
      libc().writev(this.#options.backend.fd.number, this.#vectorBytes, this.#setVectors(readable)) ===
        length;
    if (isSent) {
      this.#counters.txPackets++;
      this.#counters.txBytes += length - NET_HEADER_SIZE;
    } else this.#counters.txDropped++;
  }

  /** Receives what there is, up to a batch: the backend is watched for the rest as long as there are buffers. */
  #receiveAll(): void {
    const context = this.#context;
    const queue = context?.queues[NET_QUEUE.receive];
    if (!context || !queue?.isReady || this.#receiveTimer !== undefined || !this.#isLinkUp) return;
    try {
      queue.setNotification(false);
      this.#watchBackend(true);
      const before = this.#counters.rxPackets;
      for (let count = 0; count < BATCH; count++) {
        if (!this.#payReceive() || !this.#receive(context, queue)) break;
      }
      if (this.#counters.rxPackets !== before) context.interrupt(queue);
    } catch (error) {
      this.#watchBackend(false);
      context.fail(error);
    }
  }

  /** Waits if the limiter does not allow yet what was received last. */
  #payReceive(): boolean {
    const wait = this.#owed === 0 ? 0 : this.#limiters.receive?.consume(this.#owed) ?? 0;
    if (wait > 0) {
      this.#watchBackend(false);
      this.#receiveTimer = setTimeout(() => {
        this.#receiveTimer = undefined;
        this.#receiveAll();
      }, wait);
      return false;
    }
    this.#owed = 0;
    return true;
  }

  /** Receives one packet; tells whether to look for another one now. */
  #receive(context: DeviceContext, queue: Virtqueue): boolean {
    const first = popOrWait(queue);
    if (!first) {
      this.#watchBackend(false);
      return false;
    }
    const room = roomOf(queue, first);
    if (this.#held > 0) return this.#deliverHeld(context, queue, first, room);
    const { fd } = this.#options.backend;
    const vectors = this.#setVectors(first.writable, room);
    const length = libc().readv(fd.number, this.#vectorBytes, vectors);
    if (length <= NET_HEADER_SIZE) {
      const number = length < 0 ? errno() : 0;
      queue.unpop();
      if (number === EAGAIN || number === EINTR) return false;
      // The interface is gone: it would report that for ever.
      if (length <= 0) this.#setLink(false);
      return length > 0;
    }
    if (length <= room) {
      this.#giveBack(context, queue, [first], length);
      return true;
    }
    // It goes on behind the buffer: the overflow begins there, so that the packet can be made whole in it.
    copySegments(context.memory, first.writable, this.#overflow.subarray(0, room), false);
    this.#held = length;
    return this.#deliverHeld(context, queue, first, room);
  }

  /** Spreads the packet that is held over as many buffers as it takes, if the guest has so many. */
  #deliverHeld(context: DeviceContext, queue: Virtqueue, first: DescriptorChain, room: number): boolean {
    const chains = [first];
    const isMergeable = (context.features & NET_FEATURE.MRG_RXBUF) !== 0n;
    while (room < this.#held) {
      const canGrow = isMergeable && chains.length < queue.size;
      // Asked for before buffers are put back, the next notification is for one that is new.
      const next = canGrow ? popOrWait(queue) : undefined;
      if (next) {
        chains.push(next);
        room += roomOf(queue, next);
        continue;
      }
      chains.forEach(() => queue.unpop());
      if (canGrow) this.#watchBackend(false);
      else {
        this.#held = 0;
        this.#counters.rxDropped++;
      }
      return !canGrow;
    }
    let at = 0;
    for (const { writable } of chains) {
      const part = this.#overflow.subarray(at, Math.min(at + totalLength(writable), this.#held));
      copySegments(context.memory, writable, part, true);
      at += part.length;
    }
    const length = this.#held;
    this.#held = 0;
    this.#giveBack(context, queue, chains, length);
    return true;
  }

  #giveBack(
    context: DeviceContext,
    queue: Virtqueue,
    chains: readonly DescriptorChain[],
    length: number,
  ): void {
    writeUint16(context.memory, chains[0]!.writable, NUM_BUFFERS, chains.length);
    let rest = length;
    const used = chains.map(({ head, writable }) => {
      const written = Math.min(rest, totalLength(writable));
      rest -= written;
      return { head, written };
    });
    if (used.length === 1) queue.push(used[0]!.head, length);
    else queue.pushAll(used);
    this.#counters.rxPackets++;
    this.#counters.rxBytes += length - NET_HEADER_SIZE;
    this.#owed = length;
  }

  /**
   * Lays out `struct iovec` for parts of the guest's memory.
   *
   * @param segments The parts
   * @param overflowFrom Where in the overflow to go on behind them
   * @returns How many there are
   */
  #setVectors(segments: readonly Segment[], overflowFrom?: number): number {
    let count = 0;
    for (const { offset, length } of segments) this.#setVector(count++, this.#memoryAddress + offset, length);
    if (overflowFrom !== undefined && overflowFrom < MAX_PACKET) {
      this.#setVector(count++, this.#overflowAddress + overflowFrom, MAX_PACKET - overflowFrom);
    }
    return count;
  }

  #setVector(index: number, address: number, length: number): void {
    this.#vectors[4 * index] = address;
    this.#vectors[4 * index + 1] = address / 0x1_0000_0000;
    this.#vectors[4 * index + 2] = length;
    this.#vectors[4 * index + 3] = 0;
  }

  #watchBackend(isWanted: boolean): void {
    if (isWanted === this.#isWatching) return;
    this.#isWatching = isWanted;
    const { backend, watcher } = this.#options;
    if (isWanted) watcher.watch(backend.fd, () => this.#receiveAll());
    else watcher.unwatch(backend.fd);
  }

  get #isLinkUp(): boolean {
    return (this.config[CONFIG.status]! & STATUS_LINK_UP) !== 0;
  }

  #setLink(isUp: boolean): void {
    if (isUp === this.#isLinkUp) return;
    this.config[CONFIG.status] = isUp ? STATUS_LINK_UP : 0;
    if (!isUp) this.#watchBackend(false);
    this.#context?.configChanged();
  }
}

/**
 * Lays out the configuration of a device whose link is up.
 *
 * @param options Ethernet address of the guest's NIC, and MTU if the guest is to know one
 * @returns Ethernet address, state of the link, MTU
 */
export function netConfiguration(
  { mac, mtu = 0 }: Pick<NetDeviceOptions, "mac" | "mtu">,
): Uint8Array<ArrayBuffer> {
  const config = new Uint8Array(CONFIG.size);
  config.set(mac.split(":").map((byte) => parseInt(byte, 16)), CONFIG.mac);
  const view = new DataView(config.buffer);
  view.setUint16(CONFIG.status, STATUS_LINK_UP, true);
  view.setUint16(CONFIG.mtu, mtu, true);
  return config;
}

/**
 * Takes the next buffer; where there is none, asks to be notified of one.
 *
 * @param queue The queue
 * @returns The buffer, or undefined where there is none
 */
export function popOrWait(queue: Virtqueue): DescriptorChain | undefined {
  const chain = queue.pop();
  if (chain) return chain;
  queue.setNotification(true);
  return queue.pop();
}

/**
 * Tells how many bytes a buffer for packets takes.
 *
 * @param queue Its queue
 * @param chain The buffer
 * @returns Room for header and frame, in bytes
 * @throws {VirtqueueError} If it has no room for a header: it would never take a packet
 */
export function roomOf(queue: Virtqueue, { writable }: DescriptorChain): number {
  const room = totalLength(writable);
  if (room < NET_HEADER_SIZE || writable.length >= MAX_VECTORS) {
    throw new VirtqueueError(
      `queue ${queue.index} offers a buffer of ${room} bytes in ${writable.length} parts for packets`,
    );
  }
  return room;
}

/** Copies bytes to parts of the guest's memory, or from there. */
function copySegments(
  memory: GuestMemory,
  segments: readonly Segment[],
  bytes: Uint8Array,
  isToGuest: boolean,
): void {
  let at = 0;
  for (const { offset, length } of segments) {
    if (at >= bytes.length) return;
    const part = bytes.subarray(at, at + length);
    if (isToGuest) memory.bytes.set(part, offset);
    else part.set(memory.bytes.subarray(offset, offset + part.length));
    at += part.length;
  }
}

function writeUint16(memory: GuestMemory, segments: readonly Segment[], at: number, value: number): void {
  for (const { offset, length } of segments) {
    for (let byte = 0; byte < 2; byte++) {
      const index = at + byte;
      if (index >= 0 && index < length) memory.bytes[offset + index] = value >> (8 * byte);
    }
    at -= length;
  }
}

/** What the tap may leave to a guest of those features. */
function offloadOf(features: bigint): number {
  const has = (feature: bigint, flag: number) => (features & feature) === 0n ? 0 : flag;
  // The other offloads build upon this one, whatever the guest says.
  if (has(NET_FEATURE.GUEST_CSUM, TUN_F.CSUM) === 0) return 0;
  const segmentation = has(NET_FEATURE.GUEST_TSO4, TUN_F.TSO4) | has(NET_FEATURE.GUEST_TSO6, TUN_F.TSO6);
  return TUN_F.CSUM | segmentation | (segmentation ? has(NET_FEATURE.GUEST_ECN, TUN_F.TSO_ECN) : 0);
}

function openVhost(
  { vhost: wish = "auto", receiveLimiter, transmitLimiter }: NetDeviceOptions,
): Vhost | undefined {
  const isLimited = receiveLimiter !== undefined || transmitLimiter !== undefined;
  if (wish === false || (wish === "auto" && isLimited)) return undefined;
  if (isLimited) {
    throw new TypeError(
      "Cannot use vhost for a NIC with rate limits as the kernel knows none: drop one of both",
    );
  }
  try {
    const vhost = new Vhost(VHOST_PATH);
    if ((vhost.features & RING_FEATURES) === RING_FEATURES) return vhost;
    vhost[Symbol.dispose]();
  } catch (cause) {
    if (!(cause instanceof SysError)) throw cause;
    if (wish === true) {
      throw new Error(
        `Cannot use vhost as ${cause.message}: load the kernel's module with "modprobe vhost_net", ` +
          `run as a user that may open ${VHOST_PATH}, or drop the option "vhost"`,
        { cause },
      );
    }
  }
  if (wish === true) {
    throw new Error("Cannot use vhost as this kernel's lacks features of virtio 1: drop the option");
  }
  return undefined;
}

function addressOf(bytes: Uint8Array<ArrayBuffer>): number {
  return Number(Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes)));
}
