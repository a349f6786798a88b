/**
 * The contract of images and kernels: recipes go in, files in the cache come out.
 *
 * @module
 */

import type { Chosen } from "../../dsl/mod.ts";

/** Architecture of a guest, as Debian names it. */
export type GuestArchitecture = "amd64" | "i386";

/** What a builder may use. */
export interface BuildContext {
  /** Folder of the cache. */
  readonly cache: string;
  /** Aborted by Ctrl-C and time limits. */
  readonly signal: AbortSignal;
  /** Architecture to build for where the recipe names none, as the machine's engine wants it; `amd64` unless told. */
  readonly arch?: GuestArchitecture | undefined;
  /** Shows progress. */
  report(progress: string): void;
}

/** A kernel in the cache. */
export interface BuiltKernel {
  /** Identity of its content. */
  readonly key: string;
  /** Path of the bzImage. */
  readonly kernel: string;
  /** Folder of its modules, as under `/lib/modules/RELEASE`; undefined where it has none. */
  readonly modules: string | undefined;
}

/** A root disk in the cache. It is never written to: machines use copy-on-write children. */
export interface BuiltRoot {
  /** Path of the file. */
  readonly path: string;
  /** Its format. */
  readonly format: "raw" | "qcow2";
  /** Capacity in bytes. */
  readonly size: number;
  /** File system on the whole disk; undefined where it has partitions and boots by itself. */
  readonly filesystem?: string;
  /** Program that the kernel's init hands over to, where it has a file system. */
  readonly init?: string;
}

/** An image in the cache. */
export interface BuiltImage {
  /** Identity of its content. */
  readonly key: string;
  /** Kernel to boot where the machine names none; undefined where firmware boots the root disk. */
  readonly kernel: BuiltKernel | undefined;
  /** The image's own initramfs, in place of ours. Guests with one have no agent. */
  readonly initramfs?: string;
  /** Path of a static busybox for our initramfs. */
  readonly busybox?: string;
  /** Modules to load at boot beside those that every guest loads. */
  readonly modules: readonly string[];
  /** Root disk; a guest without one lives in memory. */
  readonly root: BuiltRoot | undefined;
  /** More words for the kernel's command line. */
  readonly cmdline: string;
}

/** Builds images of one type. */
export interface ImageBuilder {
  /** The type, as in the recipe. */
  readonly type: string;
  /** Whether its guests have no agent of ours. */
  readonly isForeign?: boolean;
  /**
   * Tells whether firmware must boot the image's disk, since it brings no kernel; it never does unless told.
   *
   * @param recipe What to build
   */
  needsFirmware?(recipe: Chosen): boolean;
  /**
   * Looks cheaply whether it is plain already that the image cannot be built. It runs before a machine is made of it.
   *
   * @param recipe What to build
   * @throws {MachineError} If it cannot be built, and why
   */
  check?(recipe: Chosen): Promise<void>;
  /**
   * Tells cheaply what the image would be made of now, for sources that change by themselves. Another answer recreates
   * the machine. It runs whenever a stack is validated or planned, so it reads no whole files and downloads nothing.
   *
   * @param recipe What to build
   * @param context Cache, signal and progress
   * @returns The answer; undefined where the recipe tells all of it
   * @throws {MachineError} If that cannot be told
   */
  fingerprint?(recipe: Chosen, context: BuildContext): Promise<string | undefined>;
  /**
   * Tells cheaply whether programs of the image take a 64-bit processor, whatever its kernel is; they never do unless
   * told.
   *
   * @param recipe What to build
   * @throws {MachineError} If it is plain already that the image cannot be built
   */
  is64Bit?(recipe: Chosen): Promise<boolean>;
  /**
   * Builds an image, or finds it in the cache.
   *
   * @param recipe What to build
   * @param context Cache, signal and progress
   */
  build(recipe: Chosen, context: BuildContext): Promise<BuiltImage>;
}

/** Builds kernels of one type. */
export interface KernelBuilder {
  /** The type, as in the recipe. */
  readonly type: string;
  /**
   * Builds a kernel, or finds it in the cache.
   *
   * @param recipe What to build
   * @param context Cache, signal and progress
   */
  build(recipe: Chosen, context: BuildContext): Promise<BuiltKernel>;
}
