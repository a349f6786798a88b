import assert from "node:assert/strict";
import { checkImports, findProblems } from "./imports.ts";

Deno.test("checkImports() finds nothing in this repository", async () => {
  assert.deepEqual(await checkImports(), []);
});

Deno.test("findProblems() finds an import against the direction, and a foreign one", () => {
  assert.equal(findProblems("dsl/x.ts", 'import { a } from "../planner/mod.ts";').length, 1);
  assert.equal(findProblems("planner/x.ts", 'import { a } from "../dsl/mod.ts";').length, 0);
  assert.equal(findProblems("planner/x.ts", 'import { a } from "npm:left-pad";').length, 1);
  assert.equal(findProblems("vmm/qemu/x.ts", 'await import("../../cli/mod.ts");').length, 1);
  assert.equal(
    findProblems("cli/x.ts", '/** import "../../x" */ import a from "../deno.json" with {};').length,
    0,
  );
});
