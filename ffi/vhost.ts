/**
 * Devices whose queues the kernel serves: vhost-net and vhost-vsock (Linux 6.1 `include/uapi/linux/vhost.h` and
 * `vhost_types.h`).
 *
 * @module
 */

import { Fd } from "./fd.ts";
import { type Layout, Struct } from "./layout.ts";

/** Requests. */
export const VHOST = {
  GET_FEATURES: 0x8008af00,
  SET_FEATURES: 0x4008af00,
  SET_OWNER: 0xaf01,
  SET_MEM_TABLE: 0x4008af03,
  SET_VRING_NUM: 0x4008af10,
  SET_VRING_ADDR: 0x4028af11,
  SET_VRING_BASE: 0x4008af12,
  GET_VRING_BASE: 0xc008af12,
  SET_VRING_KICK: 0x4008af20,
  SET_VRING_CALL: 0x4008af21,
  SET_VRING_ERR: 0x4008af22,
  NET_SET_BACKEND: 0x4008af30,
  VSOCK_SET_GUEST_CID: 0x4008af60,
  VSOCK_SET_RUNNING: 0x4004af61,
} as const;

/** `struct vhost_vring_state`. */
export const vhostVringState = {
  name: "struct vhost_vring_state",
  size: 8,
  fields: { index: [0, "u32"], num: [4, "u32"] },
} as const satisfies Layout;

/** `struct vhost_vring_file`. */
export const vhostVringFile = {
  name: "struct vhost_vring_file",
  size: 8,
  fields: { index: [0, "u32"], fd: [4, "i32"] },
} as const satisfies Layout;

/** `struct vhost_vring_addr`. */
export const vhostVringAddr = {
  name: "struct vhost_vring_addr",
  size: 40,
  fields: {
    index: [0, "u32"],
    flags: [4, "u32"],
    desc_user_addr: [8, "u64"],
    used_user_addr: [16, "u64"],
    avail_user_addr: [24, "u64"],
    log_guest_addr: [32, "u64"],
  },
} as const satisfies Layout;

/** `struct vhost_memory`, which regions follow. */
export const vhostMemory = {
  name: "struct vhost_memory",
  size: 8,
  fields: { nregions: [0, "u32"] },
} as const satisfies Layout;

/** `struct vhost_memory_region`. */
export const vhostMemoryRegion = {
  name: "struct vhost_memory_region",
  size: 32,
  fields: {
    guest_phys_addr: [0, "u64"],
    memory_size: [8, "u64"],
    userspace_addr: [16, "u64"],
  },
} as const satisfies Layout;

/** All layouts, for the comparison with the C compiler. */
export const VHOST_LAYOUTS: readonly Layout[] = [
  vhostVringState,
  vhostVringFile,
  vhostVringAddr,
  vhostMemory,
  vhostMemoryRegion,
];

/** Memory of a guest, as far as vhost must know it. */
export interface VhostMemory {
  /** Its parts. */
  readonly regions: readonly { readonly address: number; readonly offset: number; readonly length: number }[];
  /**
   * Finds where a range of the guest's addresses is.
   *
   * @param address The guest's address
   * @param length How many bytes
   * @returns The offset; throws where not all of it is memory
   */
  offset(address: number, length: number): number;
  /** Where offset 0 is in this process. */
  readonly address: number;
}

/** A virtqueue, as far as vhost must know it. Addresses are the guest's. */
export interface VhostQueue {
  /** Its number for vhost. */
  readonly index: number;
  /** Number of descriptors. */
  readonly size: number;
  /** Descriptor table. */
  readonly descriptorTable: number;
  /** Available ring. */
  readonly availableRing: number;
  /** Used ring. */
  readonly usedRing: number;
  /** Where to begin in the available ring. */
  readonly nextAvailable: number;
}

/** Events of a queue that vhost serves. */
export interface VhostQueueEvents {
  /** Signalled when there are new buffers. */
  readonly kick: Fd;
  /** To be signalled when buffers were given back; undefined where nobody wants to know. */
  readonly call?: Fd | undefined;
  /** To be signalled when the guest has broken the rules. */
  readonly error?: Fd | undefined;
}

/** A vhost device, owned by this process. */
export class Vhost implements Disposable {
  /** Features that the kernel serves. */
  readonly features: bigint;
  readonly #fd: Fd;

  /**
   * Opens one.
   *
   * @param path `/dev/vhost-net` or `/dev/vhost-vsock`
   * @throws {SysError} If it is absent, or this process may not use it
   */
  constructor(path: string) {
    this.#fd = Fd.open(path);
    try {
      this.#fd.ioctl(VHOST.SET_OWNER, 0, "VHOST_SET_OWNER");
      const features = new BigUint64Array(1);
      this.#fd.ioctlBuffer(VHOST.GET_FEATURES, new Uint8Array(features.buffer), "VHOST_GET_FEATURES");
      this.features = features[0]!;
    } catch (error) {
      this.#fd[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * Says which features were negotiated.
   *
   * @param features Some of {@linkcode Vhost.features}
   */
  setFeatures(features: bigint): void {
    this.#set64("SET_FEATURES", features);
  }

  /**
   * Says where the guest's memory is.
   *
   * @param memory The memory
   */
  setMemory(memory: VhostMemory): void {
    const bytes = new Uint8Array(vhostMemory.size + vhostMemoryRegion.size * memory.regions.length);
    new Struct(vhostMemory, bytes.buffer).set("nregions", memory.regions.length);
    memory.regions.forEach(({ address, offset, length }, index) => {
      const at = vhostMemory.size + vhostMemoryRegion.size * index;
      new Struct(vhostMemoryRegion, bytes.buffer, at).assign({
        guest_phys_addr: address,
        memory_size: length,
        userspace_addr: BigInt(memory.address + offset),
      });
    });
    this.#ioctl("SET_MEM_TABLE", bytes);
  }

  /**
   * Sets up a queue. What begins to serve it depends on the device.
   *
   * @param memory Memory of the guest
   * @param queue The queue
   * @param events Its events
   */
  setQueue(memory: VhostMemory, queue: VhostQueue, events: VhostQueueEvents): void {
    const { index, size } = queue;
    const locate = (address: number, length: number) =>
      BigInt(memory.address + memory.offset(address, length));
    this.#setState("SET_VRING_NUM", index, size);
    this.#setState("SET_VRING_BASE", index, queue.nextAvailable);
    this.#ioctl(
      "SET_VRING_ADDR",
      new Struct(vhostVringAddr).assign({
        index,
        desc_user_addr: locate(queue.descriptorTable, 16 * size),
        avail_user_addr: locate(queue.availableRing, 6 + 2 * size),
        used_user_addr: locate(queue.usedRing, 6 + 8 * size),
      }).bytes,
    );
    this.#setFile("SET_VRING_ERR", index, events.error);
    this.#setFile("SET_VRING_CALL", index, events.call);
    this.#setFile("SET_VRING_KICK", index, events.kick);
  }

  /**
   * Takes a queue back. What serves it must have been stopped.
   *
   * @param index Its number
   * @returns Where to go on in the available ring
   */
  clearQueue(index: number): number {
    this.#setFile("SET_VRING_KICK", index, undefined);
    this.#setFile("SET_VRING_CALL", index, undefined);
    const state = new Struct(vhostVringState).assign({ index });
    this.#ioctl("GET_VRING_BASE", state.bytes);
    return Number(state.get("num"));
  }

  /**
   * Lets vhost-net serve a queue from a tap. When this was ended, nothing touches the queue.
   *
   * @param index Number of the queue
   * @param tap The tap; undefined ends it
   */
  setNetBackend(index: number, tap: Fd | undefined): void {
    this.#setFile("NET_SET_BACKEND", index, tap);
  }

  /**
   * Gives the guest of vhost-vsock its address.
   *
   * @param cid The address, at least 3
   */
  setVsockCid(cid: number): void {
    this.#set64("VSOCK_SET_GUEST_CID", BigInt(cid));
  }

  /**
   * Lets vhost-vsock serve its queues. When this was ended, nothing touches them.
   *
   * @param isRunning Whether it should
   */
  setVsockRunning(isRunning: boolean): void {
    this.#ioctl("VSOCK_SET_RUNNING", new Uint8Array(Int32Array.of(isRunning ? 1 : 0).buffer));
  }

  /** Closes it: nothing touches the queues any more. */
  [Symbol.dispose](): void {
    this.#fd[Symbol.dispose]();
  }

  #ioctl(request: keyof typeof VHOST, argument: Uint8Array<ArrayBuffer>): void {
    this.#fd.ioctlBuffer(VHOST[request], argument, `VHOST_${request}`);
  }

  #set64(request: keyof typeof VHOST, value: bigint): void {
    this.#ioctl(request, new Uint8Array(BigUint64Array.of(value).buffer));
  }

  #setState(request: keyof typeof VHOST, index: number, num: number): void {
    this.#ioctl(request, new Struct(vhostVringState).assign({ index, num }).bytes);
  }

  #setFile(request: keyof typeof VHOST, index: number, file: Fd | undefined): void {
    this.#ioctl(request, new Struct(vhostVringFile).assign({ index, fd: file?.number ?? -1 }).bytes);
  }
}
