/**
 * Hypertopia: virtual machines and topologies, declared in TypeScript.
 *
 * @module
 */

export * from "./dsl/mod.ts";
export * from "./planner/mod.ts";
