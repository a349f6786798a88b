/**
 * The `hypertopia` program: it runs the CLI of any file that exports a stack.
 *
 * ```sh
 * deno install -g -A -n hypertopia cli/main.ts
 * hypertopia --file=infra.ts plan
 * ```
 *
 * @module
 */

import { dirname, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { Stack } from "../dsl/mod.ts";
import { runProcess } from "./cli.ts";

async function load(file: string): Promise<Stack> {
  const url = /^(https?|file):/.test(file) ? file : pathToFileURL(resolve(file)).href;
  let found: unknown;
  try {
    found = (await import(url) as { default?: unknown }).default;
  } catch (error) {
    fail(`Cannot load "${file}" as ${error instanceof Error ? error.message : error}`);
  }
  if (!(found instanceof Stack)) {
    fail(`Cannot use "${file}" as its default export is not a stack: add "export default stack(...)"`);
  }
  return found;
}

function fail(message: string): never {
  Deno.stderr.writeSync(new TextEncoder().encode(`Error: ${message}\n`));
  Deno.exit(1);
}

async function main(): Promise<never> {
  const args = [...Deno.args];
  let file: string | undefined;
  for (let index = 0; index < args.length && args[index] !== "--"; index++) {
    const match = /^--file(?:=(.*))?$/s.exec(args[index]!);
    if (!match) continue;
    file = match[1] ?? args[index + 1];
    args.splice(index, match[1] === undefined ? 2 : 1);
    break;
  }
  const isThere = await Deno.stat("infra.ts").then((info) => info.isFile, () => false);
  const needsStack = args[0] !== undefined && !args[0].startsWith("-") && args[0] !== "doctor";
  const path = file ?? (isThere ? "infra.ts" : undefined);
  const stack = path !== undefined && (needsStack || file !== undefined) ? await load(path) : undefined;
  const isLocal = path !== undefined && !/^https?:/.test(path);
  return await runProcess(args, {
    stack,
    program: "hypertopia",
    folder: isLocal ? dirname(resolve(path.replace(/^file:\/\//, ""))) : Deno.cwd(),
    options: {},
  });
}

if (import.meta.main) await main();
