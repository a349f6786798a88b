import assert from "node:assert/strict";
import { KVM, KVM_CAP, KVM_EXIT, KVM_LAYOUTS } from "./kvm.ts";

/** Prints with the C compiler what the tables claim. */
async function compile(lines: readonly string[]): Promise<string[] | undefined> {
  const folder = await Deno.makeTempDir();
  try {
    const source = `#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n${
      lines.map((line) => `  printf("%lld\\n", (long long)(${line}));`).join("\n")
    }\n  return 0;\n}\n`;
    await Deno.writeTextFile(`${folder}/a.c`, source);
    const compiled = await new Deno.Command("cc", {
      args: ["-o", `${folder}/a`, `${folder}/a.c`],
      stderr: "piped",
    }).output();
    assert.ok(compiled.success, new TextDecoder().decode(compiled.stderr));
    const { stdout } = await new Deno.Command(`${folder}/a`).output();
    return new TextDecoder().decode(stdout).trim().split("\n");
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function hasCompiler(): Promise<boolean> {
  try {
    const { success } = await new Deno.Command("cc", { args: ["--version"], stdout: "null", stderr: "null" })
      .output();
    await Deno.stat("/usr/include/linux/kvm.h");
    return success;
  } catch {
    return false;
  }
}

const isThere = await hasCompiler();

Deno.test({
  name: `KVM's tables are those of the C headers${
    isThere ? "" : " (skipped: no C compiler with linux/kvm.h)"
  }`,
  ignore: !isThere,
  async fn() {
    const claims: [text: string, value: number][] = [];
    for (const { name, size, fields } of KVM_LAYOUTS) {
      // The end of kvm_run grows from version to version; only its beginning is used.
      if (name !== "struct kvm_run") claims.push([`sizeof(${name})`, size]);
      for (const [field, [offset]] of Object.entries(fields)) {
        claims.push([`offsetof(${name}, ${field})`, offset]);
      }
    }
    for (const [name, value] of Object.entries(KVM)) claims.push([`(unsigned)KVM_${name}`, value]);
    for (const [name, value] of Object.entries(KVM_CAP)) claims.push([`KVM_CAP_${name}`, value]);
    for (const [name, value] of Object.entries(KVM_EXIT)) claims.push([`KVM_EXIT_${name}`, value]);
    const found = await compile(claims.map(([text]) => text));
    const wrong = claims.filter(([, value], index) => Number(found![index]) !== value)
      .map(([text, value]) =>
        `${text}: ${value}, the compiler says ${found![claims.findIndex((each) => each[0] === text)]}`
      );
    assert.deepEqual(wrong, []);
  },
});
