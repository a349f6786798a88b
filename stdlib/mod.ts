/**
 * What users would otherwise write themselves: images and kernels.
 *
 * @module
 */

export * from "./apt.ts";
export * from "./debian.ts";
export * from "./debian_archive.ts";
export * from "./directory.ts";
export * from "./download.ts";
export * from "./host_kernel.ts";
export * from "./image.ts";
export * from "./package_archive.ts";
