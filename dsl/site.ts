/**
 * Where in the user's file something was declared.
 *
 * @module
 */

/** A place in a source file. */
export interface Site {
  /** Path or URL of the file. */
  readonly file: string;
  /** Line, from 1. */
  readonly line: number;
  /** Column, from 1. */
  readonly column: number;
}

const OWN = new URL("../", import.meta.url).href;
const OWN_PARTS = ["dsl/", "planner/", "vmm/", "stdlib/", "cli/", "mod.ts", "mod.js"].map((part) =>
  OWN + part
);

/**
 * Remembers the call stack of a declaration. The stack is read only if a message needs it, as formatting costs far
 * more than capturing.
 *
 * @returns A function that finds the first place outside of this package, or undefined where there is none
 */
export function captureSite(): () => Site | undefined {
  const error = new Error();
  return () => userSite(error);
}

/**
 * Finds the user's own place in an error's stack.
 *
 * @param error The error
 * @returns The first place outside of this package, or undefined where there is none
 */
export function userSite(error: Error): Site | undefined {
  for (const line of (error.stack ?? "").split("\n")) {
    const match = /((?:file|https?|data):[^\s)]*?):(\d+):(\d+)\)?$/.exec(line);
    const file = match?.[1];
    if (!match || !file || (OWN_PARTS.some((part) => file.startsWith(part)) && !/_test\.\w+$/.test(file))) {
      continue;
    }
    return {
      file: file.startsWith("file://") ? decodeURIComponent(new URL(file).pathname) : file,
      line: Number(match[2]),
      column: Number(match[3]),
    };
  }
  return undefined;
}
