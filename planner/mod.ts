/**
 * The planner: observe, diff, plan, apply. It knows resources and their kinds, and nothing of machines.
 *
 * @module
 */

export * from "./apply.ts";
export { findDrift, worst } from "./diff.ts";
export * from "./errors.ts";
export * from "./json.ts";
export * from "./kind.ts";
export * from "./make_plan.ts";
export * from "./memory.ts";
export * from "./observe.ts";
export * from "./plan.ts";
export * from "./plan_file.ts";
export * from "./process.ts";
export * from "./secrets.ts";
export * from "./state.ts";
export { canonical, equal, redact, reveal } from "./values.ts";
