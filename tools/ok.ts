/**
 * The quick half of the gate: format, lint, types, documentation, import direction, unit tests.
 *
 * @module
 */

import { checkImports } from "./imports.ts";
import { deno, fail, say, testFiles } from "./task.ts";

/** Everything that is published must be documented. */
const ENTRY_POINTS = [
  "mod.ts",
  "dsl/mod.ts",
  "planner/mod.ts",
  "vmm/mod.ts",
  "stdlib/mod.ts",
  "cli/mod.ts",
  "ffi/mod.ts",
];

/** Runs all checks but the tests. */
export async function checkAll(): Promise<void> {
  for (
    const [what, args] of [
      ["format", ["fmt", "--check", "-q"]],
      ["lint", ["lint", "-q"]],
      ["types", ["check", "-q", "."]],
      ["documentation", ["doc", "--lint", ...ENTRY_POINTS]],
    ] as const
  ) {
    say(`checking ${what}`);
    await deno(args);
  }
  say("checking import direction");
  const problems = await checkImports();
  if (problems.length > 0) fail(problems.join("\n"));
}

if (import.meta.main) {
  await checkAll();
  say("running unit tests and the examples of the documentation");
  await deno(["test", "-A", "-q", "--doc", ...await testFiles("unit")]);
}
