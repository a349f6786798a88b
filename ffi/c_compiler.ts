/**
 * The C compiler as a witness: tests compare tables of numbers with what the kernel's headers say.
 *
 * @module
 */

import type { Layout } from "./layout.ts";

/** Something that a table says, and the C expression that must agree. */
export type Claim = readonly [expression: string, value: number];

/**
 * Finds out whether a C compiler and a header are there.
 *
 * @param header Such as `linux/kvm.h`
 * @returns Whether they are
 */
export async function hasHeader(header: string): Promise<boolean> {
  try {
    const { success } = await new Deno.Command("cc", { args: ["--version"], stdout: "null", stderr: "null" })
      .output();
    await Deno.stat(`/usr/include/${header}`);
    return success;
  } catch {
    return false;
  }
}

/**
 * Says what a layout claims.
 *
 * @param layout The layout
 * @returns Its size and the offsets of its fields
 */
export function layoutClaims({ name, size, fields }: Layout): Claim[] {
  return [
    [`sizeof(${name})`, size],
    ...Object.entries(fields).map(([field, [offset]]): Claim => [`offsetof(${name}, ${field})`, offset]),
  ];
}

/**
 * Compares claims with what the C compiler says.
 *
 * @param headers Headers to include
 * @param claims The claims
 * @returns One line for each claim that is wrong
 * @throws {Error} If the compiler does not take an expression
 */
export async function findWrongClaims(
  headers: readonly string[],
  claims: readonly Claim[],
): Promise<string[]> {
  const folder = await Deno.makeTempDir();
  try {
    const source = ["stddef.h", "stdio.h", ...headers].map((header) => `#include <${header}>\n`).join("") +
      `int main(void) {\n${
        claims.map(([expression]) => `  printf("%lld\\n", (long long)(${expression}));\n`).join("")
      }  return 0;\n}\n`;
    await Deno.writeTextFile(`${folder}/a.c`, source);
    const compiled = await new Deno.Command("cc", {
      args: ["-o", `${folder}/a`, `${folder}/a.c`],
      stderr: "piped",
    }).output();
    if (!compiled.success) throw new Error(new TextDecoder().decode(compiled.stderr));
    const { stdout } = await new Deno.Command(`${folder}/a`).output();
    const found = new TextDecoder().decode(stdout).trim().split("\n").map(Number);
    return claims.flatMap(([expression, value], index) =>
      found[index] === value ? [] : [`${expression}: ${value}, the compiler says ${found[index]}`]
    );
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
