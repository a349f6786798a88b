/**
 * Machines: engines, images, and the kinds that bind them to the planner.
 *
 * @module
 */

export * from "./engine.ts";
export * from "./errors.ts";
export * from "./guest/agent.ts";
export * from "./guest/channel.ts";
export * from "./guest/config.ts";
export * from "./images/builder.ts";
export * from "./images/cpio.ts";
export * from "./images/initramfs.ts";
export * from "./images/qcow2.ts";
export * from "./images/store.ts";
export * from "./kinds/mod.ts";
export { FileMachine, type MachineFiles } from "./file_machine.ts";
export { KvmEngine, KvmMachine } from "./kvm/engine.ts";
export { type SupervisedFiles, SupervisedMachine } from "./supervised_machine.ts";
export { EmulatedEngine, type EmulatedEngineOptions, EmulatedMachine } from "./emulated/engine.ts";
export * from "./paths.ts";
export * from "./qemu/accelerator.ts";
export type { QemuFiles } from "./qemu/arguments.ts";
export * from "./qemu/engine.ts";
export * from "./qemu/qmp.ts";
export * from "./readiness.ts";
export { XenEngine, XenMachine } from "./xen/engine.ts";
export type { KeeperFile, XenEnd, XenFiles, XenRunFile } from "./xen/launch.ts";
