/**
 * The command line of stacks.
 *
 * @module
 */

export { cli, runProcess } from "./cli.ts";
export { type Io, processIo } from "./io.ts";
export { type CliOptions, run, type RunContext } from "./run.ts";
