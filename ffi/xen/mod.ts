/**
 * Xen's interfaces: the hypervisor, event channels, granted memory, xenstore, and the console's ring.
 *
 * @module
 */

export * from "./console_ring.ts";
export * from "./evtchn.ts";
export * from "./gntdev.ts";
export * from "./layouts.ts";
export * from "./privcmd.ts";
export * from "./xen.ts";
export * from "./xenstore.ts";
