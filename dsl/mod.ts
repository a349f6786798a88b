/**
 * The language of an `infra.ts`: pure values that describe a stack. Declaring has no effect on the world.
 *
 * @example
 * ```ts
 * import { disk, stack } from "hypertopia/dsl";
 *
 * const storage = stack("storage", () => ({ data: disk({ size: "1GiB" }) }));
 * const graph = storage.evaluate();
 * ```
 *
 * @module
 */

export * from "./diagnostic.ts";
export * from "./disk.ts";
export * from "./image.ts";
export * from "./network.ts";
export * from "./output.ts";
export * from "./probe.ts";
export * from "./resource.ts";
export * from "./schema.ts";
export * from "./site.ts";
export * from "./stack.ts";
export * from "./units.ts";
export * from "./vm.ts";
