/**
 * The CLI's commands.
 *
 * @module
 */

import { join } from "node:path";
import {
  formatDiagnostic,
  type Graph,
  parseDuration,
  type Stack,
  userSite,
  ValidationError,
} from "../dsl/mod.ts";
import {
  type AnyKind,
  apply,
  DISRUPTION_CLASSES,
  type DisruptionClass,
  hasChanges,
  jsonPlan,
  jsonState,
  type Kinds,
  knownKinds,
  makePlan,
  openPlan,
  type Plan,
  PlannerError,
  planVariables,
  preflight,
  readPlanFile,
  redact,
  renameIn,
  type ResourceRecord,
  reveal,
  State,
  writePlanFile,
} from "../planner/mod.ts";
import type { Engine, ImageBuilder, KernelBuilder } from "../vmm/mod.ts";
import type { Io } from "./io.ts";
import { JsonUi } from "./json_ui.ts";
import { helpText, type Invocation, parseInvocation, PLAN_FLAGS, UsageError } from "./options.ts";
import { liveProgress, plainProgress } from "./progress.ts";
import { renderPlan, renderRecord } from "./render.ts";
import { makeStyle, shortTime, shortValue, type Style } from "./style.ts";
import { VERSION } from "./version.ts";

/** What a stack's CLI may be given. */
export interface CliOptions {
  /** Kinds of the user's own that are not in use by a declared resource any more. */
  readonly kinds?: readonly AnyKind[];
  /** Builders of image types of the user's own. */
  readonly images?: readonly ImageBuilder[];
  /** Builders of kernel types of the user's own. */
  readonly kernels?: readonly KernelBuilder[];
  /** Engines in place of the built-in ones, most preferred first. */
  readonly engines?: readonly Engine[];
}

/** Where a CLI run takes place. */
export interface RunContext {
  /** The stack; undefined for commands that need none. */
  readonly stack: Stack | undefined;
  /** How the program is called, for help. */
  readonly program: string;
  /** Folder of the infra file. */
  readonly folder: string;
  /** Streams. */
  readonly io: Io;
  /** Aborted by Ctrl-C. */
  readonly signal: AbortSignal;
  /** More kinds and builders. */
  readonly options: CliOptions;
}

/**
 * Runs one command.
 *
 * @param args The words of the command line
 * @param context Stack, streams and folder
 * @returns The exit status
 */
export async function run(args: readonly string[], context: RunContext): Promise<number> {
  const end = args.indexOf("--");
  const isJson = (end < 0 ? args : args.slice(0, end)).some((word) => /^--?json$/.test(word));
  try {
    const invocation = parseInvocation(args);
    if (invocation.flags.version) {
      context.io.out(`hypertopia ${VERSION}\n`);
      return 0;
    }
    if (invocation.command === undefined || invocation.flags.help) {
      context.io.out(`${helpText(context.program, invocation.command)}\n`);
      return invocation.command === undefined && !invocation.flags.help ? 1 : 0;
    }
    return await new Session(invocation, context).run();
  } catch (error) {
    if (context.signal.aborted && !(error instanceof PlannerError)) return 130;
    report(error, isJson, context);
    return context.signal.aborted ? 130 : 1;
  }
}

/** Prints an error without a stack trace. */
function report(thrown: unknown, isJson: boolean, { io, signal }: RunContext): void {
  // What went wrong first says more than what then failed while cleaning up.
  let error = thrown;
  while (error instanceof SuppressedError) error = error.suppressed;
  const style = makeStyle(io.isColoured);
  if (error instanceof ValidationError) {
    const ui = new JsonUi(io.out);
    for (const each of error.diagnostics) {
      if (isJson) ui.diagnostic("error", each.reason, each);
      else io.err(`${style.red("Error:")} ${formatDiagnostic(each)}\n`);
    }
    return;
  }
  const isOurs = error instanceof PlannerError || error instanceof UsageError || signal.aborted ||
    ["MachineError", "GuestError", "QemuMissingError", "QmpError"].includes(
      error instanceof Error ? error.name : "",
    );
  const site = !isOurs && error instanceof Error ? userSite(error) : undefined;
  const text = error instanceof Error ? error.message : String(error);
  const place = site ? ` (${site.file}:${site.line})` : "";
  const kind = !isOurs && error instanceof Error && error.name !== "Error" ? `${error.name}: ` : "";
  if (isJson) new JsonUi(io.out).diagnostic("error", `${kind}${text}${place}`);
  else io.err(`${style.red("Error:")} ${kind}${text}${place}\n`);
  if (!isOurs && Deno.env.get("HYPERTOPIA_DEBUG") && error instanceof Error) io.err(`${error.stack}\n`);
}

class Session {
  readonly #invocation: Invocation;
  readonly #context: RunContext;
  readonly #io: Io;
  readonly #style: Style;

  constructor(invocation: Invocation, context: RunContext) {
    this.#invocation = invocation;
    this.#context = context;
    this.#io = context.io;
    this.#style = makeStyle(context.io.isColoured);
  }

  async run(): Promise<number> {
    switch (this.#invocation.command) {
      case "plan":
        return await this.#plan();
      case "apply":
      case "destroy":
        return await this.#apply();
      case "show":
        return await this.#show();
      case "state":
        return await this.#editState();
      case "output":
        return await this.#output();
      case "validate":
        return await this.#validate();
      case "graph":
        return this.#graph();
      case "console":
      case "exec":
      case "logs":
      case "cp": {
        const { runMachineCommand } = await import("./machine_commands.ts");
        using state = await this.#openState(false);
        return await runMachineCommand(this.#invocation, this.#context, state.records());
      }
      case "doctor": {
        const { doctor } = await import("./doctor.ts");
        return await doctor(this.#invocation.flags.json === true, this.#context, this.#style);
      }
      case "force-unlock": {
        using state = await this.#openState(false);
        state.forceUnlock(this.#invocation.words[0]!);
        this.#io.out("The lock is removed.\n");
        return 0;
      }
      default:
        throw new UsageError(`Unknown command "${this.#invocation.command}"`);
    }
  }

  get #stack(): Stack {
    if (this.#context.stack) return this.#context.stack;
    throw new UsageError(
      `"${this.#invocation.command}" needs a stack: run it in a folder with an infra.ts, or name one with --file=FILE`,
    );
  }

  #flag(name: string): string | undefined {
    const value = this.#invocation.flags[name];
    return typeof value === "string" ? value : undefined;
  }

  #list(name: string): readonly string[] {
    const value = this.#invocation.flags[name];
    return Array.isArray(value) ? value : [];
  }

  #isOff(name: string): boolean {
    const value = this.#flag(name);
    if (value !== undefined && value !== "false" && value !== "true") {
      throw new UsageError(`Flag "--${name}" must be true or false: current value is "${value}"`);
    }
    return value === "false";
  }

  #variables(): Record<string, string> {
    const result: Record<string, string> = {};
    for (const name of Object.keys(this.#stack.variables)) {
      const value = Deno.env.get(`HYPERTOPIA_VAR_${name}`);
      if (value !== undefined) result[name] = value;
    }
    for (const each of this.#list("var")) {
      const [, name, value] = /^([^=]+)=(.*)$/s.exec(each) ?? [];
      if (name === undefined) {
        throw new UsageError(`Flag "--var" must be NAME=VALUE: current value is "${each}"`);
      }
      result[name] = value!;
    }
    return result;
  }

  #evaluate(variables: Readonly<Record<string, string | number | boolean>> = this.#variables()): Graph {
    return this.#stack.evaluate(variables);
  }

  #statePath(): string {
    return this.#flag("state") ?? join(this.#context.folder, ".hypertopia", `${this.#stack.name}.db`);
  }

  async #openState(create: boolean, lineage?: string): Promise<State> {
    return await State.open(this.#statePath(), {
      stack: this.#stack.name,
      create,
      lineage,
      passphrase: Deno.env.get("HYPERTOPIA_PASSPHRASE"),
    });
  }

  async #lock(state: State, operation: string): Promise<Disposable> {
    if (this.#isOff("lock")) {
      if (operation === "plan") return { [Symbol.dispose]() {} };
      throw new UsageError(
        `"--lock=false" does not go with "${operation}": it would let two commands change the same things`,
      );
    }
    const timeout = this.#flag("lock-timeout");
    let milliseconds: number | undefined;
    try {
      milliseconds = timeout === undefined ? undefined : parseDuration(timeout);
    } catch (error) {
      throw new UsageError(`Flag "--lock-timeout": ${error instanceof Error ? error.message : error}`);
    }
    return await state.lock(operation, {
      ...(milliseconds === undefined ? {} : { timeout: milliseconds }),
      signal: this.#context.signal,
    });
  }

  async #kinds(graph?: Graph): Promise<Kinds> {
    const own = new Map((this.#context.options.kinds ?? []).map((kind) => [kind.name, kind]));
    const { builtInKinds } = await import("./built_in.ts");
    const emulated = { isCold: this.#invocation.flags.cold === true };
    const kinds = new Map([...builtInKinds(this.#context.options, undefined, emulated), ...own]);
    return graph ? knownKinds(graph, kinds) : kinds;
  }

  async #makePlan(graph: Graph, state: State, kinds: Kinds): Promise<Plan> {
    const { flags, command } = this.#invocation;
    const isDestroy = command === "destroy" || flags.destroy === true;
    if (isDestroy && flags["refresh-only"]) {
      throw new UsageError('"--refresh-only" does not go with destroying');
    }
    if (this.#list("target").length > 0 && this.#list("exclude").length > 0) {
      throw new UsageError('"--target" and "--exclude" exclude each other');
    }
    const maxDisruption = this.#flag("max-disruption") as DisruptionClass | undefined;
    if (maxDisruption !== undefined && !DISRUPTION_CLASSES.includes(maxDisruption)) {
      throw new UsageError(
        `Flag "--max-disruption" must be one of ${
          DISRUPTION_CLASSES.join(", ")
        }: current value is "${maxDisruption}"`,
      );
    }
    return await makePlan({
      graph,
      state,
      kinds,
      mode: isDestroy ? "destroy" : flags["refresh-only"] ? "refresh-only" : "normal",
      refresh: !this.#isOff("refresh"),
      targets: this.#list("target"),
      exclude: this.#list("exclude"),
      replace: this.#list("replace"),
      ...(maxDisruption === undefined ? {} : { maxDisruption }),
      signal: this.#context.signal,
    });
  }

  /** Refuses what this host cannot do before anybody is asked, or told to come back for it. */
  async #preflight(plan: Plan, graph: Graph, state: State, kinds: Kinds): Promise<void> {
    await preflight(plan, { graph, state, kinds, signal: this.#context.signal });
  }

  async #plan(): Promise<number> {
    const graph = this.#evaluate();
    using state = await this.#openState(false);
    using _lock = await this.#lock(state, "plan");
    const kinds = await this.#kinds(graph);
    const plan = await this.#makePlan(graph, state, kinds);
    await this.#preflight(plan, graph, state, kinds);
    const out = this.#flag("out");
    if (out !== undefined) writePlanFile(out, plan, state.secrets);
    if (this.#invocation.flags.json) new JsonUi(this.#io.out).plan(plan);
    else {
      this.#io.out(`${renderPlan(plan, this.#style)}\n`);
      if (out !== undefined) this.#io.out(`Saved to ${out}: do exactly this with: apply ${out}\n`);
    }
    return this.#invocation.flags["detailed-exitcode"] && hasChanges(plan) ? 2 : 0;
  }

  async #apply(): Promise<number> {
    const { flags, command, words } = this.#invocation;
    const file = words[0];
    const saved = file === undefined ? undefined : readPlanFile(file);
    if (saved) {
      const extra = [...PLAN_FLAGS, "destroy", "var"].filter((name) => flags[name] !== undefined);
      if (extra.length > 0) {
        throw new UsageError(`A saved plan is applied as it is: "--${extra[0]}" goes with making a plan`);
      }
    }
    if (saved && saved.stack !== this.#stack.name) {
      throw new PlannerError(
        `Cannot apply "${file}" as it is a plan for stack "${saved.stack}": current stack is "${this.#stack.name}"`,
      );
    }
    const parallelism = Number(this.#flag("parallelism") ?? 10);
    if (!Number.isInteger(parallelism) || parallelism < 1) {
      throw new UsageError(
        `Flag "--parallelism" must be a whole number of at least 1: current value is "${
          this.#flag("parallelism")
        }"`,
      );
    }
    let variables: Plan["variables"] | undefined;
    if (saved) {
      using state = await this.#openState(false);
      variables = planVariables(saved, state.secrets);
    }
    const graph = this.#evaluate(variables);
    const kinds = await this.#kinds(graph);
    const isDestroy = command === "destroy" || flags.destroy === true;
    const ui = flags.json ? new JsonUi(this.#io.out) : undefined;

    // A first plan that is refused, or not approved, must leave no state behind.
    let lineage: string | undefined;
    let approved: string | undefined;
    {
      using state = await this.#openState(false);
      if (!state.isStored) {
        const plan = saved
          ? openPlan(saved, graph, state.secrets)
          : await this.#makePlan(graph, state, kinds);
        lineage = plan.lineage;
        await this.#preflight(plan, graph, state, kinds);
        if (!(await this.#approve(plan, saved !== undefined, isDestroy, ui))) return 1;
        if (!hasChanges(plan)) return 0;
        approved = planDigest(plan);
      }
    }
    using state = await this.#openState(true, lineage);
    using _lock = await this.#lock(state, isDestroy ? "destroy" : "apply");
    const plan = saved ? openPlan(saved, graph, state.secrets) : await this.#makePlan(graph, state, kinds);
    if (approved !== planDigest(plan)) {
      await this.#preflight(plan, graph, state, kinds);
      if (!(await this.#approve(plan, saved !== undefined, isDestroy, ui))) return 1;
    }
    const start = performance.now();
    using progress = ui
      ? { handle: (event: Parameters<JsonUi["handle"]>[0]) => ui.handle(event), [Symbol.dispose]() {} }
      : this.#io.isTerminal
      ? liveProgress(this.#io.out, this.#style, this.#io.columns)
      : plainProgress(this.#io.out, this.#style);
    const result = await apply(plan, {
      graph,
      state,
      kinds,
      parallelism,
      signal: this.#context.signal,
      onEvent: (event) => progress.handle(event),
    });
    progress[Symbol.dispose]();
    for (const [name, message] of result.failedChecks) {
      if (ui) ui.diagnostic("warning", `Check "${name}" does not hold: ${message}`);
      else this.#io.err(`${this.#style.yellow("Warning:")} Check "${name}" does not hold: ${message}\n`);
    }
    if (ui) {
      ui.say("change_summary", "Apply is complete", {
        changes: { operation: isDestroy ? "destroy" : "apply", done: result.completed.length },
      });
      ui.outputs(result.outputs);
    } else if (plan.operations.length > 0) {
      this.#io.out(
        this.#style.green(`${isDestroy ? "Destroy" : "Apply"} is complete`) +
          ` after ${shortTime(performance.now() - start)}: ${countOf(result.completed)}.\n`,
      );
      for (const [name, value] of result.outputs) this.#io.out(`${name} = ${shortValue(value, 1000)}\n`);
    }
    if (isDestroy && state.records().length === 0 && this.#flag("state") === undefined) state.delete();
    return 0;
  }

  /** Shows a plan and asks where something may be lost. */
  async #approve(plan: Plan, isSaved: boolean, isDestroy: boolean, ui: JsonUi | undefined): Promise<boolean> {
    if (ui) ui.plan(plan);
    else this.#io.out(`${renderPlan(plan, this.#style)}\n`);
    const { flags } = this.#invocation;
    if (isSaved || flags["auto-approve"] || flags.yes || !hasChanges(plan)) return true;
    if (ui) throw new UsageError('Cannot ask for approval with "--json": add --auto-approve');
    const answer = await this.#io.ask(
      `\n${isDestroy ? "Destroy all of this?" : "Do this?"} Only "yes" is taken as approval: `,
      this.#context.signal,
    );
    if (answer === undefined) {
      throw new UsageError("Cannot ask for approval as standard input is not a terminal: add --auto-approve");
    }
    this.#context.signal.throwIfAborted();
    if (answer === "yes") return true;
    this.#io.out("Nothing was changed.\n");
    return false;
  }

  async #show(): Promise<number> {
    const [word] = this.#invocation.words;
    const { flags } = this.#invocation;
    using state = await this.#openState(false);
    const records = state.records();
    const record = records.find((each) => each.address === word);
    if (word !== undefined && !record) {
      const isFile = await Deno.stat(word).then((info) => info.isFile, () => false);
      if (!isFile) {
        throw new PlannerError(
          `Cannot show "${word}" as it is neither on record nor a plan file: see state list`,
        );
      }
      const plan = state.secrets.open(readPlanFile(word)) as Plan;
      this.#io.out(
        flags.json ? `${JSON.stringify(jsonPlan(plan, records))}\n` : `${renderPlan(plan, this.#style)}\n`,
      );
      return 0;
    }
    const shown = record ? [record] : records;
    this.#print(shown);
    return 0;
  }

  #print(records: readonly ResourceRecord[]): void {
    const { flags } = this.#invocation;
    if (flags.json) this.#io.out(`${JSON.stringify(jsonState(records))}\n`);
    else if (records.length === 0) this.#io.out("Nothing is on record.\n");
    else {this.#io.out(`${
        records.map((each) => renderRecord(each, flags["show-sensitive"] === true)).join("\n\n")
      }\n`);}
  }

  async #editState(): Promise<number> {
    const [action, ...words] = this.#invocation.words;
    using state = await this.#openState(false);
    const records = state.records();
    const find = (address: string) => {
      const found = records.filter((each) => each.address === address);
      if (found.length === 0) throw new PlannerError(`Cannot find "${address}" on record: see state list`);
      return found;
    };
    if (action === "list" && words.length === 0) {
      for (const { address, deposed } of records) {
        this.#io.out(`${address}${deposed === "" ? "" : ` (deposed ${deposed})`}\n`);
      }
      return 0;
    }
    if (action === "show" && words.length === 1) {
      this.#print(find(words[0]!));
      return 0;
    }
    if (action === "rm" && words.length > 0) {
      for (const word of words) find(word);
      using _lock = await this.#lock(state, "state rm");
      state.backup();
      state.transaction((writer) => {
        for (const word of words) for (const each of find(word)) writer.remove(each.address, each.deposed);
      });
      this.#io.out(`Forgotten: ${words.join(", ")}. What they stand for was not touched.\n`);
      return 0;
    }
    if (action === "mv" && words.length === 2) {
      const [from, to] = words as [string, string];
      find(from);
      if (records.some((each) => each.address === to)) {
        throw new PlannerError(`Cannot move "${from}" to "${to}" as that address is taken`);
      }
      using _lock = await this.#lock(state, "state mv");
      state.backup();
      state.transaction((writer) => {
        const renamed = new Map([[from, to]]);
        for (const each of records) {
          const next = renameIn(each, renamed);
          if (next === each) continue;
          if (each.address === from) writer.remove(from, each.deposed);
          writer.put(next);
        }
      });
      this.#io.out(`Moved ${from} to ${to}.\n`);
      return 0;
    }
    throw new UsageError("Usage: state list | show ADDRESS | rm ADDRESS... | mv FROM TO");
  }

  async #output(): Promise<number> {
    using state = await this.#openState(false);
    const outputs = state.outputs();
    const { flags, words: [name] } = this.#invocation;
    const clear = (value: unknown) =>
      flags["show-sensitive"] || name !== undefined ? reveal(value) : redact(value);
    if (name === undefined) {
      if (flags.json) {
        const all = Object.fromEntries([...outputs].map(([key, value]) => [key, { value: clear(value) }]));
        this.#io.out(`${JSON.stringify(all)}\n`);
      } else for (const [key, value] of outputs) this.#io.out(`${key} = ${JSON.stringify(clear(value))}\n`);
      return 0;
    }
    if (!outputs.has(name)) {
      throw new PlannerError(
        `Cannot print output "${name}" as the stack has none of that name: it has ${
          [...outputs.keys()].join(", ") || "no outputs"
        }`,
      );
    }
    const value = clear(outputs.get(name));
    const isBare = flags.raw || (!flags.json && typeof value === "string");
    this.#io.out(`${isBare && typeof value !== "object" ? value : JSON.stringify(value)}\n`);
    return 0;
  }

  async #validate(): Promise<number> {
    let graph: Graph;
    try {
      graph = this.#evaluate();
      // Kinds check more than shapes, as they do before each plan: here as if nothing were there yet.
      const options = { stack: graph.stack, create: false };
      using state = await State.open(`${this.#statePath()}.none`, options);
      await makePlan({ graph, state, kinds: await this.#kinds(graph), refresh: false });
    } catch (error) {
      if (!(error instanceof ValidationError) || !this.#invocation.flags.json) throw error;
      const diagnostics = error.diagnostics.map((each) => ({
        severity: each.severity,
        summary: each.reason,
        address: each.address,
        detail: formatDiagnostic(each),
        ...(each.site
          ? { range: { filename: each.site.file, start: { line: each.site.line, column: each.site.column } } }
          : {}),
      }));
      this.#io.out(
        `${
          JSON.stringify({
            format_version: "1.0",
            valid: false,
            error_count: diagnostics.length,
            warning_count: 0,
            diagnostics,
          })
        }\n`,
      );
      return 1;
    }
    if (this.#invocation.flags.json) {
      this.#io.out(
        `${
          JSON.stringify({
            format_version: "1.0",
            valid: true,
            error_count: 0,
            warning_count: 0,
            diagnostics: [],
          })
        }\n`,
      );
    } else this.#io.out(`Stack "${graph.stack}" is valid: ${graph.resources.length} resources.\n`);
    return 0;
  }

  #graph(): number {
    const graph = this.#evaluate();
    const format = this.#flag("format") ?? "dot";
    const edges = graph.resources.flatMap((each) =>
      each.dependencies.map((target) => [each.address, target] as const)
    );
    if (format === "json") {
      this.#io.out(`${
        JSON.stringify({
          nodes: graph.resources.map(({ address, kind }) => ({ address, kind: kind.name })),
          edges: edges.map(([from, to]) => ({ from, to })),
        })
      }\n`);
    } else if (format === "mermaid") {
      const ids = new Map(graph.resources.map((each, index) => [each.address, `n${index}`]));
      const nodes = graph.resources.map((each) => `  ${ids.get(each.address)}["${each.address}"]`);
      const lines = edges.map(([from, to]) => `  ${ids.get(from)} --> ${ids.get(to)}`);
      this.#io.out(["graph LR", ...nodes, ...lines].join("\n") + "\n");
    } else if (format === "dot") {
      const nodes = graph.resources.map(({ address, kind }) =>
        `  ${JSON.stringify(address)} [label=${JSON.stringify(`${address}\n${kind.name}`)}]`
      );
      const lines = edges.map(([from, to]) => `  ${JSON.stringify(from)} -> ${JSON.stringify(to)}`);
      this.#io.out([`digraph ${JSON.stringify(graph.stack)} {`, ...nodes, ...lines, "}"].join("\n") + "\n");
    } else throw new UsageError(`Flag "--format" must be dot, mermaid or json: current value is "${format}"`);
    return 0;
  }
}

function countOf(operations: readonly { readonly type: string }[]): string {
  const count = (type: string) => operations.filter((each) => each.type === type).length;
  const parts = [
    [count("create"), "created"],
    [count("update"), "updated"],
    [count("delete"), "destroyed"],
    [count("forget"), "forgotten"],
    [count("refresh"), "refreshed"],
  ] as const;
  return parts.filter(([number]) => number > 0).map(([number, word]) => `${number} ${word}`).join(", ");
}

/** Tells whether two plans would do the same. */
function planDigest(plan: Plan): string {
  return JSON.stringify([plan.operations, plan.changes, plan.outputs, plan.mode]);
}
