/**
 * The kernel's interfaces through FFI: the C library, owned descriptors and mappings, layouts of structures, KVM.
 *
 * @module
 */

export * from "./all_threads.ts";
export * from "./capabilities.ts";
export * from "./errno.ts";
export * from "./fd.ts";
export * from "./kvm.ts";
export * from "./landlock.ts";
export * from "./layout.ts";
export * from "./libc.ts";
export * from "./loop.ts";
export * from "./seccomp.ts";
export * from "./tap.ts";
export * from "./vhost.ts";
