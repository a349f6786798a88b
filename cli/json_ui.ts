/**
 * What happens, as JSON objects a line, in the shapes of OpenTofu's machine-readable UI.
 *
 * @module
 */

import {
  type Action,
  type ApplyEvent,
  type Change,
  jsonChange,
  type Operation,
  type Plan,
  redact,
  summarise,
} from "../planner/mod.ts";
import type { Diagnostic } from "../dsl/mod.ts";

/** Version of the shapes. */
export const JSON_UI_VERSION = "1.2";

const ACTIONS: Record<Action, string> = {
  "no-op": "noop",
  create: "create",
  update: "update",
  replace: "replace",
  delete: "delete",
  forget: "remove",
};

/** Prints JSON objects, one a line. */
export class JsonUi {
  readonly #write: (text: string) => void;

  /**
   * Prints nothing yet.
   *
   * @param write Takes text
   */
  constructor(write: (text: string) => void) {
    this.#write = write;
  }

  /**
   * Prints one object.
   *
   * @param type Its type
   * @param message The same for people
   * @param fields More fields
   * @param level `info` or `error`
   */
  say(type: string, message: string, fields: Readonly<Record<string, unknown>> = {}, level = "info"): void {
    this.#write(
      JSON.stringify({
        "@level": level,
        "@message": message,
        "@module": "hypertopia.ui",
        "@timestamp": new Date().toISOString(),
        type,
        ...fields,
      }) + "\n",
    );
  }

  /**
   * Prints drift, changes and their summary.
   *
   * @param plan The plan
   */
  plan(plan: Plan): void {
    this.say("version", "Hypertopia", { hypertopia: JSON_UI_VERSION, ui: JSON_UI_VERSION });
    for (const { address, kind, isGone } of plan.drift) {
      this.say("resource_drift", `${address}: Drift detected (${isGone ? "delete" : "update"})`, {
        change: { resource: resource(address, kind), action: isGone ? "delete" : "update" },
      });
    }
    for (const change of plan.changes) {
      if (change.action === "no-op") continue;
      this.say("planned_change", `${change.address}: Plan to ${change.action}`, { change: changeOf(change) });
    }
    const { add, change, destroy, forget, disruption } = summarise(plan);
    this.say("change_summary", `Plan: ${add} to add, ${change} to change, ${destroy} to destroy.`, {
      changes: { add, change, import: 0, remove: destroy, forget, operation: "plan", disruption },
    });
  }

  /**
   * Prints what happens during an apply.
   *
   * @param event The event
   */
  handle(event: ApplyEvent): void {
    if (event.type === "progress") {
      this.say("apply_progress", `${event.address}: ${event.text}`, {
        hook: { resource: { addr: event.address }, text: event.text },
      });
      return;
    }
    const action = verb(event.operation);
    const hook = { resource: resource(event.address, event.kind), action };
    if (event.type === "start") {
      this.say("apply_start", `${event.address}: ${action} starts`, { hook });
    } else if (event.type === "complete") {
      const elapsed_seconds = event.milliseconds / 1000;
      this.say("apply_complete", `${event.address}: ${action} is complete`, {
        hook: { ...hook, id_key: "id", id_value: event.id, elapsed_seconds },
      });
    } else {
      const elapsed_seconds = event.milliseconds / 1000;
      this.say(
        "apply_errored",
        `${event.address}: ${action} failed`,
        { hook: { ...hook, elapsed_seconds } },
        "error",
      );
    }
  }

  /**
   * Prints outputs.
   *
   * @param outputs Values by name
   */
  outputs(outputs: ReadonlyMap<string, unknown>): void {
    this.say("outputs", `Outputs: ${outputs.size}`, {
      outputs: Object.fromEntries([...outputs].map(([name, value]) => [name, { value: redact(value) }])),
    });
  }

  /**
   * Prints a problem.
   *
   * @param severity `error` or `warning`
   * @param summary What is wrong
   * @param diagnostic Its place
   */
  diagnostic(severity: "error" | "warning", summary: string, diagnostic?: Diagnostic): void {
    this.say("diagnostic", `${severity === "error" ? "Error" : "Warning"}: ${summary}`, {
      diagnostic: {
        severity,
        summary,
        detail: "",
        ...(diagnostic?.address ? { address: diagnostic.address } : {}),
        ...(diagnostic?.site
          ? {
            range: {
              filename: diagnostic.site.file,
              start: { line: diagnostic.site.line, column: diagnostic.site.column },
            },
          }
          : {}),
      },
    }, severity === "error" ? "error" : "warn");
  }
}

function resource(addr: string, resource_type: string): Readonly<Record<string, string>> {
  return { addr, resource: addr, resource_type, resource_name: addr };
}

function changeOf(change: Change): Readonly<Record<string, unknown>> {
  const { disruption } = jsonChange(change);
  return {
    resource: resource(change.address, change.kind),
    action: ACTIONS[change.action],
    ...(change.reason ? { reason: change.reason } : {}),
    ...(change.movedFrom ? { previous_resource: resource(change.movedFrom, change.kind) } : {}),
    disruption,
  };
}

function verb(operation: Operation["type"]): string {
  return operation === "forget" ? "remove" : operation;
}
