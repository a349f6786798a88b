/**
 * What users would otherwise write themselves: images and kernels.
 *
 * @module
 */

export * from "./apt.ts";
export * from "./debian.ts";
export * from "./directory.ts";
export * from "./host_kernel.ts";
export * from "./image.ts";
