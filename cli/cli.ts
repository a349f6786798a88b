/**
 * The entry point of an `infra.ts`.
 *
 * @module
 */

import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import type { Stack } from "../dsl/mod.ts";
import { processIo } from "./io.ts";
import { type CliOptions, run, type RunContext } from "./run.ts";

/**
 * Makes a CLI of a stack: `plan`, `apply`, `destroy`, `exec` and the others. Call it at the end of an `infra.ts`; it
 * ends the process.
 *
 * @param stack The stack
 * @param options Kinds, engines and builders of your own
 *
 * @example
 * ```ts ignore
 * import { cli, stack } from "hypertopia";
 *
 * const infra = stack("infra", () => ({}));
 * export default infra;
 * if (import.meta.main) await cli(infra);
 * ```
 */
export async function cli(stack: Stack, options: CliOptions = {}): Promise<never> {
  const main = Deno.mainModule;
  return await runProcess(Deno.args, {
    stack,
    program: `deno run -A ${main.startsWith("file:") ? main.split("/").pop() : main}`,
    folder: main.startsWith("file:") ? dirname(fileURLToPath(main)) : Deno.cwd(),
    options,
  });
}

/** How soon after a signal another one counts as the same, in milliseconds. */
const REPEAT_MILLISECONDS = 500;

/**
 * Runs one command with this process's streams and signals, and ends the process.
 *
 * @param args The words of the command line
 * @param context Stack and folder
 */
export async function runProcess(
  args: readonly string[],
  context: Pick<RunContext, "stack" | "program" | "folder" | "options">,
): Promise<never> {
  const io = processIo();
  const controller = new AbortController();
  let since = 0;
  const interrupt = () => {
    // A wrapper such as npx passes on what the terminal has sent to the whole group already.
    if (controller.signal.aborted && performance.now() - since < REPEAT_MILLISECONDS) return;
    if (controller.signal.aborted) Deno.exit(130);
    since = performance.now();
    io.err("\nInterrupted: stopping at the next safe point; press Ctrl-C again to stop at once\n");
    controller.abort(new Error("Interrupted"));
  };
  Deno.addSignalListener("SIGINT", interrupt);
  Deno.addSignalListener("SIGTERM", interrupt);
  // A terminal that goes away must not stop an apply halfway.
  Deno.addSignalListener("SIGHUP", interrupt);
  const status = await run(args, { ...context, io, signal: controller.signal });
  Deno.exit(status);
}
