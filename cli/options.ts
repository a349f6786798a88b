/**
 * The CLI's commands and flags.
 *
 * @module
 */

import { parseArgs } from "node:util";

/** A mistake on the command line. */
export class UsageError extends Error {
  /**
   * Explains a mistake.
   *
   * @param message What is wrong and what to write instead
   */
  constructor(message: string) {
    super(message);
    this.name = "UsageError";
  }
}

/** One flag. */
export interface Flag {
  /** Whether it takes a value. */
  readonly type: "boolean" | "string";
  /** Whether it may be given more than once. */
  readonly multiple?: boolean;
  /** One letter for it. */
  readonly short?: string;
  /** Name of the value, for help. */
  readonly value?: string;
  /** What it does. */
  readonly help: string;
}

/** One command. */
export interface Command {
  /** What follows its name, for help. */
  readonly usage: string;
  /** What it does. */
  readonly help: string;
  /** Names of its flags. */
  readonly flags: readonly string[];
  /** How many words it takes. */
  readonly words: readonly [least: number, most: number];
}

/** All flags by name. */
export const FLAGS: Readonly<Record<string, Flag>> = {
  "auto-approve": { type: "boolean", help: "apply without asking" },
  yes: { type: "boolean", short: "y", help: "the same as --auto-approve" },
  out: { type: "string", value: "FILE", help: "save the plan, for: apply FILE" },
  "detailed-exitcode": { type: "boolean", help: "exit with 0 for no changes, 1 for an error, 2 for changes" },
  json: { type: "boolean", help: "print JSON; while planning and applying, one object a line" },
  target: { type: "string", multiple: true, value: "ADDRESS", help: "only this and what it depends on" },
  exclude: { type: "string", multiple: true, value: "ADDRESS", help: "all but this and what depends on it" },
  replace: { type: "string", multiple: true, value: "ADDRESS", help: "replace this in any case" },
  "refresh-only": { type: "boolean", help: "only write down what is seen" },
  refresh: { type: "string", value: "false", help: "with false: do not look at the world" },
  parallelism: { type: "string", value: "N", help: "at most N operations at once (10)" },
  cold: {
    type: "boolean",
    help: "let emulated machines boot from the beginning, and leave no saved state for others",
  },
  lock: { type: "string", value: "false", help: "with false: do not lock state" },
  "lock-timeout": { type: "string", value: "DURATION", help: 'wait so long for the lock, such as "30s"' },
  "max-disruption": {
    type: "string",
    value: "CLASS",
    help: "refuse worse than none, live, hotplug, reboot or recreate",
  },
  var: { type: "string", multiple: true, value: "NAME=VALUE", help: "set a variable of the stack" },
  state: { type: "string", value: "FILE", help: "state file (.hypertopia/STACK.db beside the infra file)" },
  destroy: { type: "boolean", help: "plan to destroy everything" },
  "show-sensitive": { type: "boolean", help: "show secrets" },
  raw: { type: "boolean", help: "print the bare value" },
  format: { type: "string", value: "FORMAT", help: "dot, mermaid or json" },
  follow: { type: "boolean", short: "f", help: "go on printing as the log grows" },
  engine: { type: "boolean", help: "the hypervisor's own log" },
  env: { type: "string", multiple: true, value: "NAME=VALUE", help: "set a variable of the command" },
  cwd: { type: "string", value: "FOLDER", help: "folder of the guest to run in" },
  help: { type: "boolean", short: "h", help: "print help" },
  version: { type: "boolean", help: "print the version" },
};

const COMMON = ["state", "var", "help"];
const LOCKING = ["lock", "lock-timeout"];
/** Flags that say how a plan is made; a saved plan is applied without them. */
export const PLAN_FLAGS: readonly string[] = [
  "target",
  "exclude",
  "replace",
  "refresh",
  "refresh-only",
  "max-disruption",
];
const PLANNING = [
  ...PLAN_FLAGS,
  "json",
  ...LOCKING,
  ...COMMON,
];

/** All commands by name. */
export const COMMANDS: Readonly<Record<string, Command>> = {
  plan: {
    usage: "",
    help: "show what apply would do",
    flags: ["out", "detailed-exitcode", "destroy", ...PLANNING],
    words: [0, 0],
  },
  apply: {
    usage: "[PLAN-FILE]",
    help: "make the world be as declared, or do exactly what a saved plan says",
    flags: ["auto-approve", "yes", "parallelism", "cold", "destroy", ...PLANNING],
    words: [0, 1],
  },
  destroy: {
    usage: "",
    help: "remove everything",
    flags: ["auto-approve", "yes", "parallelism", ...PLANNING],
    words: [0, 0],
  },
  show: {
    usage: "[ADDRESS | PLAN-FILE]",
    help: "show state, one resource, or a saved plan",
    flags: ["json", "show-sensitive", ...COMMON],
    words: [0, 1],
  },
  state: {
    usage: "list | show ADDRESS | rm ADDRESS... | mv FROM TO",
    help: "read and edit what is on record",
    flags: ["json", "show-sensitive", ...LOCKING, ...COMMON],
    words: [1, Infinity],
  },
  output: {
    usage: "[NAME]",
    help: "print the stack's outputs",
    flags: ["json", "raw", "show-sensitive", ...COMMON],
    words: [0, 1],
  },
  validate: { usage: "", help: "check the declarations", flags: ["json", ...COMMON], words: [0, 0] },
  graph: { usage: "", help: "print the dependency graph", flags: ["format", ...COMMON], words: [0, 0] },
  console: {
    usage: "ADDRESS",
    help: "connect to a machine's serial console; Ctrl-] leaves",
    flags: COMMON,
    words: [1, 1],
  },
  exec: {
    usage: "ADDRESS -- COMMAND...",
    help: "run a command in a machine; its streams and exit status are passed through",
    flags: ["env", "cwd", ...COMMON],
    words: [1, Infinity],
  },
  logs: {
    usage: "ADDRESS",
    help: "print what a machine's console has printed",
    flags: ["follow", "engine", ...COMMON],
    words: [1, 1],
  },
  cp: { usage: "FROM TO", help: "copy a file; ADDRESS:PATH is in a machine", flags: COMMON, words: [2, 2] },
  doctor: {
    usage: "",
    help: "tell what works on this host, and what is missing",
    flags: ["json", "help"],
    words: [0, 0],
  },
  "force-unlock": {
    usage: "LOCK-ID",
    help: "remove a lock that its owner left behind",
    flags: COMMON,
    words: [1, 1],
  },
};

/** A parsed command line. */
export interface Invocation {
  /** The command; undefined for help alone. */
  readonly command: string | undefined;
  /** The words after it. */
  readonly words: readonly string[];
  /** What follows `--`. */
  readonly rest: readonly string[];
  /** Values of the flags that were given. */
  readonly flags: Readonly<Record<string, string | boolean | readonly string[] | undefined>>;
}

/**
 * Parses a command line. Long flags may have one dash or two.
 *
 * @param args The words
 * @returns The command and its flags
 * @throws {UsageError} If a command or flag is not known, or a value is missing
 */
export function parseInvocation(args: readonly string[]): Invocation {
  const end = args.indexOf("--");
  const own = (end < 0 ? args : args.slice(0, end)).map((word) =>
    /^-[a-z][a-z-]+(=.*)?$/s.test(word) ? `-${word}` : word
  );
  const rest = end < 0 ? [] : args.slice(end + 1);
  const options = Object.fromEntries(
    Object.entries(FLAGS).map(([name, { type, multiple, short }]) => [
      name,
      { type, ...(multiple ? { multiple } : {}), ...(short ? { short } : {}) },
    ]),
  );
  let parsed;
  try {
    parsed = parseArgs({ args: own, options, allowPositionals: true, strict: true });
  } catch (error) {
    const text = error instanceof Error ? error.message : String(error);
    const unknown = /Unknown option '([^']+)'/.exec(text)?.[1];
    throw new UsageError(
      unknown
        ? `Unknown flag "${unknown}": list the flags with COMMAND --help`
        : text.split(". ")[0]!.replace(/\.$/, ""),
    );
  }
  const [command, ...words] = parsed.positionals;
  const flags = parsed.values as Invocation["flags"];
  if (command === undefined) return { command, words, rest, flags };
  const known = Object.hasOwn(COMMANDS, command) ? COMMANDS[command] : undefined;
  if (!known) {
    throw new UsageError(`Unknown command "${command}": commands are ${Object.keys(COMMANDS).join(", ")}`);
  }
  for (const name of Object.keys(flags)) {
    if (!known.flags.includes(name)) {
      throw new UsageError(`Flag "--${name}" does not go with "${command}": see ${command} --help`);
    }
  }
  const [least, most] = known.words;
  if (!flags.help && (words.length < least || words.length > most)) {
    throw new UsageError(`Usage: ${command} ${known.usage}`.trimEnd());
  }
  if (rest.length > 0 && command !== "exec") throw new UsageError(`"${command}" takes nothing after "--"`);
  return { command, words, rest, flags };
}

/**
 * Writes the help text.
 *
 * @param program How the program is called
 * @param command One command, or undefined for all
 * @returns Lines of text
 */
export function helpText(program: string, command?: string): string {
  const known = command === undefined ? undefined : COMMANDS[command];
  if (known) {
    const rows = known.flags.map((name) => {
      const { short, value, help } = FLAGS[name]!;
      return [`--${name}${value ? `=${value}` : ""}${short ? `, -${short}` : ""}`, help] as const;
    });
    const width = Math.max(...rows.map(([flag]) => flag.length));
    return `Usage: ${program} ${command} ${known.usage}`.trimEnd() + `\n\n${known.help}\n\n` +
      rows.map(([flag, help]) => `  ${flag.padEnd(width)}  ${help}`).join("\n");
  }
  const width = Math.max(...Object.keys(COMMANDS).map((name) => name.length));
  return `Usage: ${program} COMMAND\n\n` +
    Object.entries(COMMANDS).map(([name, { help }]) => `  ${name.padEnd(width)}  ${help}`).join("\n") +
    `\n\nCOMMAND --help tells its flags.`;
}
