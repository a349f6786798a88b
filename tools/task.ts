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

/**
 * Lists source files: those with unit tests or documentation examples, or the tests of real machines.
 *
 * @param which Which ones
 * @returns Paths
 */
export async function testFiles(which: "unit" | "real"): Promise<string[]> {
  const folders = which === "unit" ? ["cli", "dsl", "ffi", "planner", "stdlib", "tools", "vmm"] : ["tests"];
  const files: string[] = which === "unit" ? ["mod.ts"] : [];
  const walk = async (folder: string): Promise<void> => {
    for await (const entry of Deno.readDir(folder)) {
      const path = `${folder}/${entry.name}`;
      if (entry.isDirectory) await walk(path);
      else if (which === "unit" ? path.endsWith(".ts") : path.endsWith("_test.ts")) files.push(path);
    }
  };
  for (const folder of folders) {
    if (await Deno.stat(folder).then(() => true, () => false)) await walk(folder);
  }
  return files.sort();
}
