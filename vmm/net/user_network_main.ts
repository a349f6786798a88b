/**
 * The program of a network in user space: a process that serves the network for all its machines. It ends by itself when
 * nobody has been connected for a while.
 *
 * ```text
 * deno run -A vmm/net/user_network_main.ts --folder DIR --cidr CIDR --gateway IP --dns IP [--no-nat]
 * ```
 *
 * @module
 */

import { dirname } from "node:path";
import { parseArgs } from "node:util";
import { parseCidr, parseIpv4 } from "../../dsl/mod.ts";
import { identifyProcess } from "../../planner/mod.ts";
import { leaveTerminal } from "../detached.ts";
import { MachineError } from "../errors.ts";
import { lockFile, writeWhole } from "../files.ts";
import { Log } from "../supervisor/log.ts";
import { enterSandboxIfKnown } from "../supervisor/sandbox.ts";
import type { RunFile } from "../supervisor/supervisor.ts";
import { UserNetwork } from "./user_network.ts";
import { userNetworkFiles, type UserNetworkSpec } from "./user_network_protocol.ts";

const USAGE = `Serves a network of machines in user space.

Usage: deno run -A user_network_main.ts --folder DIR --cidr CIDR --gateway IP --dns IP [OPTION...]

  --folder DIR     Folder of its sockets, for its owner only
  --cidr CIDR      Network with prefix length
  --gateway IP     Address of the gateway
  --dns IP         Address where guests ask for names
  --nat            Lets guests reach the outside (the default)
  --no-nat         Keeps them inside
  --log-path FILE  Log (standard output)
  --detach         Leaves the terminal and its signals
  --no-sandbox     Keeps all rights, for debugging
  --help           Prints this
`;

const FLAGS = {
  folder: { type: "string" },
  cidr: { type: "string" },
  gateway: { type: "string" },
  dns: { type: "string" },
  nat: { type: "boolean", default: false },
  "no-nat": { type: "boolean", default: false },
  "log-path": { type: "string" },
  detach: { type: "boolean", default: false },
  "no-sandbox": { type: "boolean", default: false },
  help: { type: "boolean", default: false },
} as const;

/** How long the end of a process before is waited for, in milliseconds. */
const LOCK_TIMEOUT = 2000;

/**
 * Serves a network until nobody needs it any more, or it is told to end.
 *
 * @param args Arguments of the command line
 * @returns The exit status
 * @throws {MachineError} If it cannot be served
 */
export async function main(args: readonly string[]): Promise<number> {
  const { values } = parseArgs({ args: [...args], options: FLAGS, strict: true });
  if (values.help) {
    Deno.stdout.writeSync(new TextEncoder().encode(USAGE));
    return 0;
  }
  const { folder, cidr, gateway, dns } = values;
  if (folder === undefined || cidr === undefined || gateway === undefined || dns === undefined) {
    throw new MachineError(
      "Cannot serve a network that is not told: give --folder, --cidr, --gateway and --dns",
    );
  }
  if (values.nat && values["no-nat"]) {
    throw new MachineError("Cannot serve the network with and without NAT: give --nat or --no-nat");
  }
  const spec: UserNetworkSpec = { cidr, gateway, dns, nat: !values["no-nat"] };
  parseCidr(cidr);
  for (const address of [gateway, dns]) parseIpv4(address);
  if (values.detach) leaveTerminal();
  // Sockets and logs are their owner's only.
  Deno.umask(0o077);
  const path = values["log-path"];
  using log = new Log(cidr, path === undefined ? {} : { path });
  const files = userNetworkFiles(folder);
  using _lock = await lockProcess(files.processLock, spec);
  const note = (run: RunFile) => writeWhole(files.run, JSON.stringify(run));
  await note({ process: identifyProcess()! });
  const detail = await serve(folder, spec, log, !values["no-sandbox"]);
  log.info(`the network ends: ${detail}`);
  await note({ end: { reason: "stopped", detail } });
  return 0;
}

/** Serves the network to its end, and says why it ended. Nobody is listened to any more then. */
async function serve(
  folder: string,
  spec: UserNetworkSpec,
  log: Log,
  isSandboxed: boolean,
): Promise<string> {
  using network = new UserNetwork({ spec, folder, log });
  log.info(`the network is served in ${folder}`);
  const stop = () => network.stop("it was told to end");
  for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.addSignalListener(signal, stop);
  try {
    if (isSandboxed) confine(folder, log);
    else log.warn("there is no sandbox: what takes over the process has all its rights");
    return await network.ended;
  } finally {
    for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.removeSignalListener(signal, stop);
  }
}

/** A process that is about to end is waited for; another one keeps the lock. */
async function lockProcess(path: string, { cidr }: UserNetworkSpec): Promise<Disposable> {
  const signal = AbortSignal.timeout(LOCK_TIMEOUT);
  try {
    return await lockFile(path, { signal });
  } catch (cause) {
    if (!signal.aborted) throw cause;
    throw new MachineError(
      `Cannot serve the network ${cidr} in "${dirname(path)}" as another process does: ` +
        `end it, or choose another folder`,
      { cause },
    );
  }
}

/** Gives up what is not needed: guests speak to this process, and it speaks to the Internet for them. */
function confine(folder: string, log: Log): void {
  try {
    // Forwards may be to low ports, where the user has that right.
    enterSandboxIfKnown({
      folder,
      readOnly: resolverFolder(),
      keepCapabilities: ["NET_BIND_SERVICE"],
    }, log);
  } catch (error) {
    log.warn(`the sandbox is not complete: ${(error as Error).message}`);
  }
}

/** Where `resolv.conf` is a link, its target is replaced when the host joins another network: its folder must be seen. */
function resolverFolder(): string[] {
  try {
    const folder = dirname(Deno.realPathSync("/etc/resolv.conf"));
    return folder === "/etc" ? [] : [folder];
  } catch {
    return [];
  }
}

if (import.meta.main) {
  try {
    Deno.exit(await main(Deno.args));
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    Deno.stderr.writeSync(new TextEncoder().encode(`Error: ${message}\n`));
    Deno.exit(1);
  }
}
