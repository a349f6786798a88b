/**
 * What the tasks share.
 *
 * @module
 */

/**
 * Prints a line.
 *
 * @param text The line
 */
export function say(text: string): void {
  Deno.stdout.writeSync(new TextEncoder().encode(`${text}\n`));
}

/**
 * Prints a reason and ends with status 1.
 *
 * @param reason The reason
 */
export function fail(reason: string): never {
  Deno.stderr.writeSync(new TextEncoder().encode(`${reason}\n`));
  Deno.exit(1);
}

/**
 * Runs Deno, and ends with its status if it fails.
 *
 * @param args Its arguments
 */
export async function deno(args: readonly string[]): Promise<void> {
  const { code } = await new Deno.Command(Deno.execPath(), { args: [...args], stdin: "null" }).spawn().status;
  if (code !== 0) fail(`"deno ${args.slice(0, 3).join(" ")}" failed with status ${code}`);
}

/** Folders of published code and its unit tests. */
const FOLDERS = ["cli", "dsl", "ffi", "planner", "stdlib", "tools", "vmm"];

/**
 * Lists TypeScript files.
 *
 * @param folders Where to look
 * @returns Paths, sorted
 */
export async function sourceFiles(folders: readonly string[] = FOLDERS): Promise<string[]> {
  const files: string[] = [];
  const walk = async (folder: string): Promise<void> => {
    for await (const entry of Deno.readDir(folder)) {
      const path = `${folder}/${entry.name}`;
      if (entry.isDirectory) await walk(path);
      else if (path.endsWith(".ts")) files.push(path);
    }
  };
  for (const folder of folders) {
    if (await Deno.stat(folder).then(() => true, () => false)) await walk(folder);
  }
  return files.sort();
}

/**
 * Lists test files: unit tests and files whose documentation has examples, or the tests of real machines.
 *
 * @param which Which ones
 * @returns Paths, sorted
 */
export async function testFiles(which: "unit" | "real"): Promise<string[]> {
  const files = await sourceFiles(which === "unit" ? FOLDERS : ["tests"]);
  const wanted = await Promise.all(
    files.map(async (path) =>
      path.endsWith("_test.ts") ||
      (which === "unit" && (await Deno.readTextFile(path)).includes(" * ```ts\n"))
    ),
  );
  return files.filter((_, index) => wanted[index]);
}
