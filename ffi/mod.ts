/**
 * The kernel's interfaces through FFI: the C library, owned descriptors and mappings, layouts of structures, KVM.
 *
 * @module
 */

export * from "./errno.ts";
export * from "./fd.ts";
export * from "./kvm.ts";
export * from "./layout.ts";
export * from "./libc.ts";
