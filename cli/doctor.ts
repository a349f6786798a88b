/**
 * What works on this host, and what is missing.
 *
 * @module
 */

import { formatSize } from "../dsl/mod.ts";
import { hostPaths } from "../vmm/mod.ts";
import { builtInEngines } from "./built_in.ts";
import type { RunContext } from "./run.ts";
import type { Style } from "./style.ts";

/** Programs of the host, what each is for, and the Debian package that brings it. */
const TOOLS: readonly (readonly [program: string, purpose: string, name: string])[] = [
  ["apt-get", "debian() images", "apt"],
  ["dpkg-deb", "debian() images", "dpkg"],
  ["mmdebstrap", "debian() images with packages", "mmdebstrap"],
  ["mke2fs", "file systems on disks and images", "e2fsprogs"],
  ["nft", "networks with NAT of kvm() and xen()", "nftables"],
  ["passt", "faster NAT of emulated()", "passt"],
];

/**
 * Prints findings.
 *
 * @param isJson Whether to print JSON
 * @param context Streams and engines
 * @param style Colours
 * @returns 0 where at least one engine works, else 1
 */
export async function doctor(isJson: boolean, context: RunContext, style: Style): Promise<number> {
  const { io, signal } = context;
  const paths = hostPaths();
  const engines = context.options.engines ?? builtInEngines(paths);
  const capabilities = [];
  for (const engine of engines) capabilities.push(await engine.probe({ signal }));
  const tools = await Promise.all(TOOLS.map(async ([program, purpose, name]) => ({
    program,
    purpose,
    package: name,
    isThere: await isInstalled(program),
  })));
  const chosen = capabilities.find((each) => each.isUsable)?.engine;
  const memory = Deno.systemMemoryInfo();
  if (isJson) {
    io.out(`${JSON.stringify({ engines: capabilities, auto: chosen ?? null, tools, paths, memory })}\n`);
    return chosen ? 0 : 1;
  }
  const mark = (isGood: boolean) => isGood ? style.green("works   ") : style.red("missing ");
  io.out("Engines:\n");
  for (const { engine, isUsable, detail, findings } of capabilities) {
    io.out(`  ${mark(isUsable)} ${engine.padEnd(8)} ${detail}\n`);
    for (const each of findings) {
      io.out(
        `           ${style.dim("·")} ${each.name.padEnd(6)} ${
          each.isUsable ? "usable" : "not usable"
        }: ${each.detail}\n`,
      );
    }
  }
  io.out(
    chosen
      ? `  auto() takes ${style.bold(chosen)}, the first of these that works and can run the machine.\n`
      : "  auto() finds no engine: install QEMU with: apt-get install qemu-system-x86\n",
  );
  if (chosen === "emulated") {
    io.out(
      "  It needs nothing of this host, and is slow. Faster ones: install QEMU with: apt-get install " +
        "qemu-system-x86;\n  or give this host a /dev/kvm that runs code (virtualization in the firmware's setup, " +
        "or nested in a cloud).\n",
    );
  }
  io.out("Programs:\n");
  for (const { program, purpose, package: name, isThere } of tools) {
    io.out(
      `  ${mark(isThere)} ${program.padEnd(11)} for ${purpose}${
        isThere ? "" : `: apt-get install ${name}`
      }\n`,
    );
  }
  io.out("Folders:\n");
  io.out(`  machines and disks  ${paths.data}\n  images and packages ${paths.cache}\n`);
  io.out(
    `Memory${chosen === "xen" ? " of this control domain" : ""}: ${
      formatSize(memory.total - memory.total % 2 ** 20)
    }, ${formatSize(memory.available - memory.available % 2 ** 20)} available.\n`,
  );
  return chosen ? 0 : 1;
}

async function isInstalled(program: string): Promise<boolean> {
  for (const folder of [...(Deno.env.get("PATH") ?? "").split(":"), "/usr/sbin", "/sbin"]) {
    if (await Deno.stat(`${folder}/${program}`).then((info) => info.isFile, () => false)) return true;
  }
  return false;
}
