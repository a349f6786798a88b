/**
 * Saved plans: a JSON file that is applied exactly as it was shown, or refused.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { chmodSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import type { Graph } from "../dsl/mod.ts";
import { asError, PlannerError } from "./errors.ts";
import { configurationDigest } from "./make_plan.ts";
import type { Plan } from "./plan.ts";
import type { SecretBox } from "./secrets.ts";
import { canonical, reveal } from "./values.ts";

/** Version of the file; another one is refused. */
export const PLAN_FILE_VERSION = "1.0";

interface PlanFile {
  readonly format: "hypertopia-plan";
  readonly format_version: string;
  readonly digest: string;
  readonly plan: Plan;
}

/**
 * Saves a plan. Secrets inside are encrypted with the state's key.
 *
 * @param path Path of the file
 * @param plan The plan
 * @param secrets Encrypts
 */
export function writePlanFile(path: string, plan: Plan, secrets: SecretBox): void {
  // A variable may be what a secret is made of: all are sealed.
  const variables = Object.fromEntries(
    Object.entries(plan.variables).map(([name, value]) => [name, { $secret: value }]),
  );
  const sealed = secrets.seal({ ...plan, variables }) as Plan;
  const file: PlanFile = {
    format: "hypertopia-plan",
    format_version: PLAN_FILE_VERSION,
    digest: digest(sealed),
    plan: sealed,
  };
  const part = `${path}.part`;
  try {
    writeFileSync(part, JSON.stringify(file) + "\n");
    chmodSync(part, 0o600);
    renameSync(part, path);
  } catch (cause) {
    rmSync(part, { force: true });
    throw new PlannerError(`Cannot write the plan to "${path}" as ${asError(cause).message}`, { cause });
  }
}

/**
 * Reads a saved plan.
 *
 * @param path Path of the file
 * @returns The plan, with secrets still encrypted
 * @throws {PlannerError} If it is not a plan, or truncated, edited, or of another version
 */
export function readPlanFile(path: string): Plan {
  const refuse = (why: string, cause?: unknown) =>
    new PlannerError(`Cannot use the plan file "${path}" as ${why}: make a new one with: plan --out=FILE`, {
      cause,
    });
  let body: string;
  try {
    body = readFileSync(path, "utf8");
  } catch (cause) {
    throw refuse(`it cannot be read (${asError(cause).message})`, cause);
  }
  let file: PlanFile;
  try {
    file = JSON.parse(body) as PlanFile;
  } catch (cause) {
    throw refuse("it is truncated or is not a plan", cause);
  }
  if (file?.format !== "hypertopia-plan") throw refuse("it is not a plan");
  if (file.format_version !== PLAN_FILE_VERSION) {
    throw refuse(`its version is "${file.format_version}" and this release reads "${PLAN_FILE_VERSION}"`);
  }
  if (typeof file.plan !== "object" || file.plan === null || digest(file.plan) !== file.digest) {
    throw refuse("it was edited after it was made");
  }
  return file.plan;
}

/**
 * Decrypts the variables of a saved plan, to evaluate the declarations with.
 *
 * @param plan The plan as read
 * @param secrets Decrypts
 * @returns The variables in clear
 */
export function planVariables(plan: Plan, secrets: SecretBox): Plan["variables"] {
  return reveal(secrets.open(plan.variables)) as Plan["variables"];
}

/**
 * Refuses a plan whose declarations have changed since, and decrypts it.
 *
 * @param plan The plan as read
 * @param graph The declarations now, evaluated with the plan's variables
 * @param secrets Decrypts
 * @returns The plan with secrets in clear, marked
 */
export function openPlan(plan: Plan, graph: Graph, secrets: SecretBox): Plan {
  if (plan.stack !== graph.stack) {
    throw new PlannerError(
      `Cannot apply the plan as it is for stack "${plan.stack}": current stack is "${graph.stack}"`,
    );
  }
  if (plan.configuration !== configurationDigest(graph)) {
    throw new PlannerError(
      `Cannot apply the plan for stack "${plan.stack}" as it is stale: the declarations were changed since: make a new plan`,
    );
  }
  return { ...secrets.open(plan) as Plan, variables: planVariables(plan, secrets) };
}

function digest(plan: Plan): string {
  return createHash("sha256").update(canonical(plan)).digest("hex");
}
