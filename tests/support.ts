/**
 * What the tests of real machines share.
 *
 * @module
 */

import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Lab, type LabOptions } from "../tools/lab.ts";

/** Root of the repository. */
export const ROOT: string = dirname(dirname(fileURLToPath(import.meta.url)));

/** How a CLI run ended. */
export interface Result {
  /** Exit status. */
  readonly code: number;
  /** Standard output. */
  readonly stdout: string;
  /** Standard error. */
  readonly stderr: string;
}

/** Options of a CLI run. */
export interface RunOptions {
  /** The exit status that is expected; 0 unless told, any with `null`. */
  readonly code?: number | null;
  /** Environment to add. */
  readonly env?: Readonly<Record<string, string>>;
  /** Standard input. */
  readonly stdin?: Uint8Array;
  /** The infra file; `infra.ts` unless told. */
  readonly file?: string;
}

/** A folder with an infra file, and machines of its own. Disposing it ends them all. */
export class Place implements AsyncDisposable {
  /** The folder. */
  readonly folder: string;
  /** Folder of machines and disks. */
  readonly home: string;

  /** Makes the folder. */
  constructor() {
    this.folder = Deno.makeTempDirSync({ prefix: "ht-" });
    this.home = join(this.folder, "home");
  }

  /**
   * Writes an infra file.
   *
   * @param body What the stack's function returns, as source text; `{ ... }` or a block
   * @param file Its name
   */
  async declare(body: string, file = "infra.ts"): Promise<void> {
    await Deno.writeTextFile(
      join(this.folder, file),
      `import * as ht from "hypertopia";
import { cli, console as onConsole, disk, exec, http, kvm, network, qemu, range, secret, stack, tcp, text, vm } from "hypertopia";
import { debian, debianKernel, directory, hostKernel, image } from "hypertopia/stdlib";
void [ht, cli, onConsole, disk, exec, http, kvm, network, qemu, range, secret, stack, tcp, text, vm, debian, debianKernel, directory, hostKernel, image];
const infra = stack("test", () => ${
        body.trim().startsWith("return") || body.includes("return ") ? `{ ${body} }` : `(${body})`
      });
export default infra;
if (import.meta.main) await cli(infra);
`,
    );
  }

  /** Starts the CLI without waiting for its end. */
  spawn(args: readonly string[], options: RunOptions = {}): Deno.ChildProcess {
    return new Deno.Command(Deno.execPath(), {
      args: [
        "run",
        "-A",
        "--no-check",
        `--config=${ROOT}/deno.json`,
        join(this.folder, options.file ?? "infra.ts"),
        ...args,
      ],
      cwd: this.folder,
      stdin: options.stdin ? "piped" : "null",
      stdout: "piped",
      stderr: "piped",
      env: { HYPERTOPIA_HOME: this.home, NO_COLOR: "1", ...options.env },
    }).spawn();
  }

  /** Runs the CLI to its end and checks its exit status. */
  async run(args: readonly string[], options: RunOptions = {}): Promise<Result> {
    const child = this.spawn(args, options);
    if (options.stdin) {
      const writer = child.stdin.getWriter();
      await writer.write(options.stdin as Uint8Array<ArrayBuffer>).catch(() => {});
      await writer.close().catch(() => {});
    }
    return await finish(child, args, options.code === undefined ? 0 : options.code);
  }

  /** Process numbers of the machines of this place, or of those whose command lines are of another kind. */
  async processes(kind = /\0-pidfile\0|\0--run-file\0|keeper_main/): Promise<number[]> {
    const found: number[] = [];
    for await (const { name } of Deno.readDir("/proc")) {
      if (!/^\d+$/.test(name)) continue;
      const line = await Deno.readTextFile(`/proc/${name}/cmdline`).catch(() => "");
      if (line.includes(this.home) && kind.test(line)) found.push(Number(name));
    }
    return found;
  }

  /** All files below the folder of machines and disks. */
  async leftovers(): Promise<string[]> {
    const found: string[] = [];
    const walk = async (folder: string): Promise<void> => {
      for await (const entry of Deno.readDir(folder)) {
        const path = join(folder, entry.name);
        if (entry.isDirectory) await walk(path);
        else found.push(path.slice(this.home.length + 1));
      }
    };
    await walk(this.home).catch(() => {});
    return found.sort();
  }

  /** Ends all machines and removes the folder. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const pid of await this.processes(/./)) {
      try {
        Deno.kill(pid, "SIGKILL");
      } catch (error) {
        // It may have ended by itself meanwhile.
        if (!(error instanceof Deno.errors.NotFound)) throw error;
      }
    }
    await Deno.remove(this.folder, { recursive: true });
  }
}

/** Waits for a CLI run and checks its exit status. */
export async function finish(
  child: Deno.ChildProcess,
  args: readonly string[],
  code: number | null,
): Promise<Result> {
  const output = await child.output();
  const decoder = new TextDecoder();
  const result = {
    code: output.code,
    stdout: decoder.decode(output.stdout),
    stderr: decoder.decode(output.stderr),
  };
  if (code !== null) {
    assert.equal(
      result.code,
      code,
      `"${args.join(" ")}" ended with ${result.code}\n${result.stdout}\n${result.stderr}`,
    );
  }
  return result;
}

/** Tells whether a program is installed. */
export function isInstalled(program: string): boolean {
  const folders = [...(Deno.env.get("PATH") ?? "").split(":"), "/usr/sbin", "/sbin"];
  return (program.startsWith("/") ? [""] : folders).some((folder) => {
    try {
      return Deno.statSync(folder === "" ? program : `${folder}/${program}`).isFile;
    } catch {
      return false;
    }
  });
}

/** Declares a test that needs programs; where one is missing it is skipped, and its name says why. */
export function realTest(
  name: string,
  programs: readonly string[],
  run: (context: Deno.TestContext) => Promise<void>,
): void {
  const missing = programs.filter((program) => !isInstalled(program));
  Deno.test({
    name: missing.length === 0 ? name : `${name} (skipped: ${missing.join(", ")} is not installed)`,
    ignore: missing.length > 0,
    fn: run,
  });
}

/** What a lab with Xen runs from this machine. */
const XEN_PROGRAMS: readonly string[] = ["/usr/lib/xen-4.17/bin/xenstored", "xenstore-read"];

/** Declares a test that runs in a lab of its own: a machine with a `/dev/kvm` or Xen and with the files of this one. */
export function labTest(
  name: string,
  run: (lab: Lab, context: Deno.TestContext) => Promise<void>,
  options: LabOptions = {},
): void {
  const programs = ["qemu-system-x86_64", "apt-get", ...(options.xen ? XEN_PROGRAMS : [])];
  realTest(name, programs, async (context) => {
    await using lab = await Lab.start(options);
    await run(lab, context);
  });
}
