/**
 * Loop devices: files of the host as block devices (Linux 6.1 `include/uapi/linux/loop.h`, `drivers/block/loop.c`).
 *
 * @module
 */

import { SysError } from "./errno.ts";
import { Fd, O_RDWR } from "./fd.ts";
import { type Layout, Struct } from "./layout.ts";

/** Requests to a loop device, and of those `CTL` to `/dev/loop-control`. */
export const LOOP = {
  CLR_FD: 0x4c01,
  GET_STATUS64: 0x4c05,
  SET_CAPACITY: 0x4c07,
  CONFIGURE: 0x4c0a,
  CTL_GET_FREE: 0x4c82,
} as const;
/** Flags of a loop device. */
export const LO_FLAGS = { READ_ONLY: 1, AUTOCLEAR: 4, DIRECT_IO: 16 } as const;

/** `struct loop_info64`. */
export const loopInfo = {
  name: "struct loop_info64",
  size: 232,
  fields: {
    lo_device: [0, "u64"],
    lo_inode: [8, "u64"],
    lo_rdevice: [16, "u64"],
    lo_offset: [24, "u64"],
    lo_sizelimit: [32, "u64"],
    lo_number: [40, "u32"],
    lo_flags: [52, "u32"],
    lo_file_name: [56, "u8", 64],
  },
} as const satisfies Layout;

/** `struct loop_config`. */
export const loopConfig = {
  name: "struct loop_config",
  size: 304,
  fields: {
    fd: [0, "u32"],
    block_size: [4, "u32"],
    "info.lo_flags": [60, "u32"],
    "info.lo_file_name": [64, "u8", 64],
  },
} as const satisfies Layout;

const CONTROL = "/dev/loop-control";
const O_RDONLY = 0;
/** Others may take a free device before we do; so often that happens only where something is wrong. */
const MAX_TRIES = 64;

/** A file as a block device. */
export interface LoopDevice {
  /** Path of the device, such as `/dev/loop0`. */
  readonly path: string;
  /** Major number of the device. */
  readonly major: number;
  /** Minor number of the device. */
  readonly minor: number;
}

/** How a file becomes a block device. */
export interface LoopOptions {
  /** Whether writes are refused. */
  readonly readOnly: boolean;
  /** Whether the host's page cache is passed by; the kernel falls back to the cache where the file system cannot. */
  readonly directIo?: boolean;
  /** What the kernel keeps with the device for {@linkcode loopLabel}: at most 63 bytes; nothing unless told. */
  readonly label?: string;
}

/**
 * Makes a file a block device. The device stays until it is detached, even when this process ends: a guest's disk must not
 * go away with the command that started the guest. {@linkcode listLoops} finds those that were left behind.
 *
 * @param file Path of the file
 * @param options How
 * @returns The device
 * @throws {Error} If that is not possible, and why in words; the cause is the {@linkcode SysError}
 */
export function attachLoop(file: string, options: LoopOptions): LoopDevice {
  const action = `attach "${file}" to a loop device`;
  try {
    using control = Fd.open(CONTROL);
    using backing = Fd.open(file, options.readOnly ? O_RDONLY : O_RDWR);
    const config = new Struct(loopConfig).assign({
      fd: backing.number,
      "info.lo_flags": (options.readOnly ? LO_FLAGS.READ_ONLY : 0) |
        (options.directIo ? LO_FLAGS.DIRECT_IO : 0),
    });
    new TextEncoder().encode(options.label ?? "").subarray(0, 63).forEach((byte, index) =>
      config.set("info.lo_file_name", byte, index)
    );
    for (let attempt = 1;; attempt++) {
      const path = `/dev/loop${control.ioctl(LOOP.CTL_GET_FREE, 0, "LOOP_CTL_GET_FREE")}`;
      try {
        using device = Fd.open(path);
        device.ioctlBuffer(LOOP.CONFIGURE, config.bytes, "LOOP_CONFIGURE");
      } catch (error) {
        if (error instanceof SysError && error.code === "EBUSY" && attempt < MAX_TRIES) continue;
        throw error;
      }
      return { path, ...deviceNumber(path) };
    }
  } catch (error) {
    throw explain(action, error);
  }
}

/**
 * Detaches a loop device from its file, if it is attached. Where something still uses it, it is detached as soon as
 * nothing does.
 *
 * @param path Path of the device
 * @throws {Error} If that is not possible, and why in words
 */
export function detachLoop(path: string): void {
  try {
    using device = Fd.open(path, O_RDONLY);
    device.ioctl(LOOP.CLR_FD, 0, "LOOP_CLR_FD");
  } catch (error) {
    // No file is attached, or even the device is gone.
    if (error instanceof SysError && ["ENXIO", "ENOENT"].includes(error.code)) return;
    throw explain(`detach the loop device "${path}"`, error);
  }
}

/**
 * Lets a loop device be as large as its file has become.
 *
 * @param path Path of the device
 * @throws {Error} If that is not possible, and why in words
 */
export function resizeLoop(path: string): void {
  try {
    using device = Fd.open(path, O_RDONLY);
    device.ioctl(LOOP.SET_CAPACITY, 0, "LOOP_SET_CAPACITY");
  } catch (error) {
    throw explain(`resize the loop device "${path}"`, error);
  }
}

/**
 * Lists loop devices that are attached.
 *
 * @returns Path of the file by path of the device, such as `/dev/loop0`; ` (deleted)` follows where the file was removed
 */
export function listLoops(): Map<string, string> {
  const loops = new Map<string, string>();
  for (const { name } of Deno.readDirSync("/sys/block")) {
    if (!/^loop\d+$/.test(name)) continue;
    try {
      const file = Deno.readTextFileSync(`/sys/block/${name}/loop/backing_file`);
      loops.set(`/dev/${name}`, file.replace(/\n$/, ""));
    } catch (error) {
      // Not attached, or detached or removed meanwhile.
      if (!(error instanceof Deno.errors.NotFound) && !/os error (6|19)\b/.test(String(error))) throw error;
    }
  }
  return loops;
}

/**
 * Tells what a loop device was given with its file.
 *
 * @param path Path of the device
 * @returns The label; empty where there is none, or no file is attached
 */
export function loopLabel(path: string): string {
  try {
    using device = Fd.open(path, O_RDONLY);
    const info = new Struct(loopInfo);
    device.ioctlBuffer(LOOP.GET_STATUS64, info.bytes, "LOOP_GET_STATUS64");
    const bytes = Array.from({ length: 64 }, (_, index) => Number(info.get("lo_file_name", index)));
    return new TextDecoder().decode(new Uint8Array(bytes.slice(0, bytes.indexOf(0))));
  } catch (error) {
    if (error instanceof SysError && ["ENXIO", "ENOENT"].includes(error.code)) return "";
    throw explain(`look at the loop device "${path}"`, error);
  }
}

/**
 * Reads the number of a device.
 *
 * @param path Path of its file
 * @returns Major and minor number
 */
export function deviceNumber(path: string): { readonly major: number; readonly minor: number } {
  const { rdev, isBlockDevice } = Deno.statSync(path);
  if (!isBlockDevice || rdev === null) {
    throw new Error(`Cannot use "${path}" as a disk as it is no block device: name a block device or a file`);
  }
  // `gnu_dev_major()` and `gnu_dev_minor()` of glibc 2.36 <sys/sysmacros.h>, for numbers that Linux uses: 12 and 20 bits.
  return { major: rdev >>> 8 & 0xfff, minor: (rdev & 0xff) | (rdev >>> 12 & 0xfff00) };
}

function explain(action: string, error: unknown): Error {
  if (!(error instanceof SysError)) return error as Error;
  const { code, call, message } = error;
  return new Error(`Cannot ${action} as ${reason()}`, { cause: error });

  function reason(): string {
    const isOpen = call.startsWith("open(");
    if (isOpen && call.includes(CONTROL) && ["ENOENT", "ENODEV", "ENXIO"].includes(code)) {
      return `${CONTROL} is absent: load the kernel's module with "modprobe loop"`;
    }
    if (isOpen && call.includes("/dev/loop") && ["ENOENT", "ENXIO"].includes(code)) {
      return "the kernel made a device that /dev does not show: mount devtmpfs at /dev";
    }
    switch (code) {
      case "ENOENT":
        return "there is no such file";
      case "EACCES":
      case "EPERM":
        return `this user may not (${call}): run as root`;
      case "EROFS":
        return "it is on a file system that is read-only: attach it read-only";
      case "EBUSY":
        return "other programs take each free device first: run the command again";
      case "ENXIO":
        return "no file is attached to it";
      default:
        return message;
    }
  }
}
