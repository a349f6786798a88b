/**
 * `/dev/xen/gntdev`: memory that other domains have granted to this one (Linux 6.1 `include/uapi/xen/gntdev.h`,
 * `drivers/xen/gntdev.c`).
 *
 * @module
 */

import { SysError } from "../errno.ts";
import { Fd, MAP_SHARED, Mapping } from "../fd.ts";
import { explainOpen, type ForeignMapping, PAGE_SIZE } from "./privcmd.ts";

/** Requests to the device. */
export const GNTDEV = { MAP_GRANT_REF: 0x184700, UNMAP_GRANT_REF: 0x104701 } as const;

/** The device, as far as it is used. Calls throw a {@linkcode SysError} where they fail. */
export interface GrantDevice extends Disposable {
  /**
   * Makes a request.
   *
   * @param request Its number
   * @param argument Its argument
   * @param name Its name, for messages
   */
  request(request: number, argument: Uint8Array<ArrayBuffer>, name: string): void;
  /**
   * Maps what a request has prepared.
   *
   * @param index Where it is, in bytes
   * @param length Its size in bytes
   * @returns The memory
   */
  map(index: number, length: number): Pick<Mapping, "buffer"> & Disposable;
}

const PATH = "/dev/xen/gntdev";

/** Memory that domains have granted. It is given back with the descriptor, also when the process dies. */
export class Grants implements Disposable {
  readonly #device: GrantDevice;
  #isOpen = true;

  /**
   * Takes over a device.
   *
   * @param device The device
   */
  constructor(device: GrantDevice) {
    this.#device = device;
  }

  /**
   * Opens the device.
   *
   * @returns No grants yet
   * @throws {Error} If this is not a domain of Xen, or this user may not
   */
  static open(): Grants {
    try {
      return new Grants(new Device());
    } catch (error) {
      throw explainOpen(PATH, "xen-gntdev", error);
    }
  }

  /**
   * Maps pages that a domain has granted, to be read and written.
   *
   * @param domid The domain
   * @param refs Numbers of the grants
   * @returns The pages, one behind another; the domain cannot take them back until this is disposed
   * @throws {Error} If the domain has not granted one of them
   */
  map(domid: number, refs: readonly number[]): ForeignMapping {
    // struct ioctl_gntdev_map_grant_ref: count, padding, index, and {domid, ref} for each.
    const request = new Uint8Array(16 + 8 * refs.length);
    const view = new DataView(request.buffer);
    view.setUint32(0, refs.length, true);
    for (const [index, ref] of refs.entries()) {
      view.setUint32(16 + 8 * index, domid, true);
      view.setUint32(20 + 8 * index, ref, true);
    }
    this.#device.request(GNTDEV.MAP_GRANT_REF, request, "GNTDEV_MAP_GRANT_REF");
    const index = Number(view.getBigUint64(8, true));
    const unmap = (): void => {
      // struct ioctl_gntdev_unmap_grant_ref: index, count, padding.
      const release = new Uint8Array(16);
      release.set(request.subarray(8, 16));
      new DataView(release.buffer).setUint32(8, refs.length, true);
      this.#device.request(GNTDEV.UNMAP_GRANT_REF, release, "GNTDEV_UNMAP_GRANT_REF");
    };
    let mapping: Pick<Mapping, "buffer"> & Disposable;
    try {
      mapping = this.#device.map(index, refs.length * PAGE_SIZE);
    } catch (error) {
      unmap();
      if (!(error instanceof SysError)) throw error;
      throw new Error(
        `Cannot map ${refs.length} pages of domain ${domid} (grants ${
          refs.join(", ")
        }) as Xen refuses (${error.code}): ` +
          `the domain has to grant them first`,
        { cause: error },
      );
    }
    let isMapped = true;
    return {
      bytes: new Uint8Array(mapping.buffer),
      [Symbol.dispose]: () => {
        if (!isMapped) return;
        isMapped = false;
        mapping[Symbol.dispose]();
        if (this.#isOpen) unmap();
      },
    };
  }

  /** Gives all back that is not mapped any more; what still is, goes with its mapping. */
  [Symbol.dispose](): void {
    this.#isOpen = false;
    this.#device[Symbol.dispose]();
  }
}

class Device implements GrantDevice {
  readonly #fd = Fd.open(PATH);

  request(request: number, argument: Uint8Array<ArrayBuffer>, name: string): void {
    this.#fd.ioctlBuffer(request, argument, name);
  }

  map(index: number, length: number): Mapping {
    return new Mapping(length, { fd: this.#fd, flags: MAP_SHARED, offset: index });
  }

  [Symbol.dispose](): void {
    this.#fd[Symbol.dispose]();
  }
}
