/**
 * Imports point one way: each layer may use those that its entry names, and nothing else.
 *
 * @module
 */

import { sourceFiles } from "./task.ts";

/** What each top-level folder may import from, beside itself. */
export const LAYERS: Readonly<Record<string, readonly string[]>> = {
  dsl: [],
  ffi: [],
  planner: ["dsl"],
  vmm: ["planner", "dsl", "ffi"],
  stdlib: ["dsl", "vmm"],
  cli: ["dsl", "planner", "vmm", "stdlib", "ffi"],
};

/**
 * Finds imports against the direction.
 *
 * @returns One line a problem
 */
export async function checkImports(): Promise<string[]> {
  const problems: string[] = [];
  for (const path of await sourceFiles()) {
    const text = await Deno.readTextFile(path);
    problems.push(...findProblems(path, text));
  }
  return problems;
}

/**
 * Finds the imports of one file that go against the direction.
 *
 * @param path Path of the file, from the root of the repository
 * @param text Its content
 * @returns One line a problem
 */
export function findProblems(path: string, text: string): string[] {
  const layer = path.split("/")[0]!;
  const allowed = LAYERS[layer];
  if (!allowed || path.split("/").length === 1) return [];
  const problems: string[] = [];
  // Examples in comments import as users do.
  const code = text.replaceAll(/\/\*[\s\S]*?\*\//g, "");
  for (const match of code.matchAll(/\b(?:from|import)\s*\(?\s*"([^"]+)"/g)) {
    const target = match[1]!;
    if (target.startsWith("node:") || target.includes("${")) continue;
    if (!target.startsWith(".")) {
      problems.push(
        `${path} imports "${target}": runtime code has no dependencies, and own modules are imported by path`,
      );
      continue;
    }
    const resolved = new URL(target, `file:///${path}`).pathname.slice(1);
    const other = resolved.split("/")[0]!;
    if (resolved === "deno.json") continue;
    if (other === layer || allowed.includes(other)) continue;
    problems.push(
      `${path} imports "${target}": ${layer} may import from ${[layer, ...allowed].join(", ")} only`,
    );
  }
  return problems;
}
