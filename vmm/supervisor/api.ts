/**
 * The supervisor's HTTP API: Firecracker's paths, JSON and status codes (Firecracker 1.16.1, `firecracker.yaml` and
 * `src/vmm/src/rpc_interface.rs`), so that its clients drive our machines, and our own paths under `/hypertopia`.
 *
 * What is asked wrongly is answered with status 400 and `{"fault_message": …}`, unknown paths and methods too; a change
 * that succeeds is answered with 204. What Firecracker has and we lack is refused in words.
 *
 * @module
 */

import { MachineError } from "../errors.ts";
import {
  type BalloonConfiguration,
  balloonJson,
  type BalloonStatistics,
  balloonUpdateJson,
  bootable,
  type BootableConfiguration,
  bootSourceJson,
  checkFiles,
  type Codec,
  configurationJson,
  DEFAULT_CONFIGURATION,
  driveJson,
  type DriveUpdate,
  driveUpdateJson,
  entropyJson,
  forwardsJson,
  instanceActionJson,
  instanceInfoJson,
  type InstanceState,
  loggerJson,
  type MachineConfiguration,
  machineJson,
  machineUpdateJson,
  metricsJson,
  networkInterfaceJson,
  type NicUpdate,
  nicUpdateJson,
  parseJson,
  type Place,
  placeOf,
  type PortForward,
  readBounded,
  type RunReport,
  serialJson,
  statisticsJson,
  statisticsUpdateJson,
  statusJson,
  supervisorActionJson,
  updateRateLimiter,
  vmStateJson,
  vsockJson,
  withBalloon,
  withDrive,
  withForwards,
  withMachine,
  withNetworkInterface,
} from "./config.ts";

/** The Firecracker whose API this is: clients that look at the version expect one of Firecracker's. */
export const FIRECRACKER_VERSION = "1.16.1";
/** Largest body of a request, in bytes: Firecracker's (`HTTP_MAX_PAYLOAD_SIZE`). */
export const MAX_PAYLOAD = 51200;

/**
 * What runs the machine. It is called for one change at a time, {@linkcode Controller.kill} excepted, and never for
 * what does not fit its state. What it throws is the answer to the client: a {@linkcode MachineError} with status 400,
 * anything else with 500.
 */
export interface Controller {
  /** Identity of the machine. */
  readonly id: string;
  /** How it is. After its end it stays what it was. */
  readonly state: InstanceState;
  /** How its run goes. */
  report(): RunReport;
  /**
   * Builds the machine and runs it. After a failure it is `Not started` and may be started again.
   *
   * @param configuration What it is made of
   */
  start(configuration: BootableConfiguration): Promise<void>;
  /** Stops the vCPUs. */
  pause(): Promise<void>;
  /** Lets the vCPUs go on. */
  resume(): Promise<void>;
  /** Asks the guest to power off, and does not wait for it. */
  sendCtrlAltDel(): Promise<void>;
  /** Powers off at once; what the guest wrote to its disks is on them. Called in any state. */
  stop(): Promise<void>;
  /** Ends everything at once, whatever else goes on. The process may end before this returns. Called in any state. */
  kill(): Promise<void>;
  /** Restarts the guest at once. */
  reboot(): Promise<void>;
  /**
   * Changes the balloon, and does not wait for the guest to follow.
   *
   * @param target Memory that it is to hold, in bytes
   */
  setBalloon(target: number): Promise<void>;
  /** What is known of the balloon. */
  balloonStatistics(): Promise<BalloonStatistics>;
  /**
   * Changes how often the guest's statistics are asked for.
   *
   * @param seconds How often, at least 1
   */
  setStatisticsInterval(seconds: number): Promise<void>;
  /**
   * Changes a disk.
   *
   * @param id Its name, that of a disk of the configuration
   * @param update What changes; limits are all that it has from now on
   */
  updateDrive(id: string, update: DriveUpdate): Promise<void>;
  /**
   * Changes a NIC.
   *
   * @param id Its name, that of a NIC of the configuration
   * @param update What changes; limits are all that it has from now on
   */
  updateNic(id: string, update: NicUpdate): Promise<void>;
  /**
   * Makes these the port forwards.
   *
   * @param forwards All of them
   */
  setForwards(forwards: readonly PortForward[]): Promise<void>;
  /** Writes the metrics where the configuration says, if it does. */
  flushMetrics(): Promise<void>;
  /** All metrics, ready for JSON. */
  metrics(): Readonly<Record<string, unknown>> | Promise<Readonly<Record<string, unknown>>>;
}

/** A request that has been read. */
interface Call {
  /** Method and path, such as `PUT /vsock`. */
  readonly name: string;
  /** The id in the path, where it has one. */
  readonly id: string;
  /** The body, parsed. */
  readonly body: unknown;
  /** Where it stands. */
  readonly at: Place;
}

/** Answers a request: undefined is success without a body. */
type Route = (call: Call) => unknown;

/** Paths whose second part is an id. */
const COLLECTIONS: ReadonlySet<string> = new Set(["drives", "network-interfaces"]);

/** What Firecracker has and we lack, by the start of the path. */
const LACKS: readonly (readonly [RegExp, string])[] = [
  [/^\w+ \/mmds(\/|$)/, "no metadata service (MMDS): pass data to the guest on a drive or by vsock"],
  [/^\w+ \/snapshot(\/|$)/, "no snapshots: pause the machine by PATCH /vm, or start it anew"],
  [/^\w+ \/cpu-config(\/|$)/, "no CPU templates: the guest sees the CPU that KVM offers"],
  [/^\w+ \/hotplug(\/|$)/, "no memory hotplug: give the machine a balloon, and change it by PATCH /balloon"],
  [/^\w+ \/pmem(\/|$)/, "no pmem devices: use a drive"],
  [/^\w+ \/balloon\/hinting(\/|$)/, "no free page hinting: change the balloon by PATCH /balloon"],
  [
    /^DELETE \/(drives|network-interfaces)(\/|$)/,
    "no hot-unplugging: stop the machine, and start it without",
  ],
];

/** Changes that do not wait for others, as killing must work whatever else goes on. */
const IMMEDIATE: ReadonlySet<string> = new Set(["PUT /hypertopia/actions"]);

const NO_STATISTICS =
  "statistics are off: give `stats_polling_interval_s` in PUT /balloon before starting the machine";

/** Answers the requests of one supervisor. */
export class Api {
  readonly #controller: Controller;
  readonly #routes: ReadonlyMap<string, Route>;
  #configuration: MachineConfiguration;
  /** Ends when the last change that was asked for has ended: changes are made one at a time. */
  #turn: Promise<unknown> = Promise.resolve();

  /**
   * Starts nothing yet.
   *
   * @param controller What runs the machine
   * @param configuration What the machine is made of, unless clients say otherwise
   */
  constructor(controller: Controller, configuration: MachineConfiguration = DEFAULT_CONFIGURATION) {
    this.#controller = controller;
    this.#configuration = configuration;
    this.#routes = new Map(Object.entries(this.#makeRoutes()));
  }

  /** What the machine is made of by now. */
  get configuration(): MachineConfiguration {
    return this.#configuration;
  }

  /**
   * Starts the machine, as `InstanceStart` does.
   *
   * @throws {MachineError} If it has been started, or cannot be
   */
  async start(): Promise<void> {
    await this.#inTurn(() => this.#start("InstanceStart"));
  }

  /**
   * Answers a request. It never throws.
   *
   * @param request The request
   * @returns The answer
   */
  async handle(request: Request): Promise<Response> {
    const path = pathOf(request.url);
    const name = `${request.method} ${path}`.slice(0, 200);
    try {
      const at = placeOf(`the body of ${name}`);
      const content = await readBounded(request.body, MAX_PAYLOAD, at.subject);
      const answer = await this.#answer(request, path, content, name, at);
      return answer === undefined ? new Response(null, { status: 204 }) : Response.json(answer);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      return error instanceof MachineError
        ? Response.json({ fault_message: reason }, { status: 400 })
        : Response.json({ fault_message: `Cannot serve ${name} as ${reason}` }, { status: 500 });
    }
  }

  async #answer(request: Request, path: string, content: string, name: string, at: Place): Promise<unknown> {
    const [first = "", id = "", ...more] = path.slice(1).split("/");
    const hasId = COLLECTIONS.has(first) && more.length === 0;
    const key = `${request.method} ${hasId ? `/${first}/{id}` : path}`;
    const route = this.#routes.get(key);
    if (!route) {
      const lack = LACKS.find(([pattern]) => pattern.test(key));
      refuse(name, lack ? `this machine monitor has ${lack[1]}` : "no such method and path are in this API");
    }
    if (hasId && !/^\w+$/.test(id)) {
      refuse(name, "the id in the path is wrong: it must not be empty, and has letters, digits and _ only");
    }
    const isGet = request.method === "GET";
    if (isGet && Number(request.headers.get("content-length") ?? 0) > 0) {
      refuse(name, "a GET request cannot have a body");
    }
    if (!isGet && content === "") refuse(name, "its body is empty: give a JSON object");
    const call = { name, id, at, body: isGet ? undefined : parseJson(content, at) };
    return IMMEDIATE.has(key) || isGet ? await route(call) : await this.#inTurn(() => route(call));
  }

  /** Does something when all changes that were asked for before are done. */
  async #inTurn<T>(change: () => T | Promise<T>): Promise<T> {
    const result = this.#turn.then(change);
    this.#turn = result.catch(() => {});
    return await result;
  }

  #makeRoutes(): Record<string, Route> {
    const controller = this.#controller;
    return {
      "GET /": () =>
        instanceInfoJson.print({
          id: controller.id,
          state: controller.state,
          vmmVersion: FIRECRACKER_VERSION,
          appName: "Hypertopia",
        }),
      "GET /version": () => ({ firecracker_version: FIRECRACKER_VERSION }),
      "GET /machine-config": () => machineJson.print(this.#configuration.machine),
      "PUT /machine-config": ({ name, body, at }) => {
        const machine = machineJson.parse(body, at);
        this.#before(name);
        this.#configuration = withMachine(this.#configuration, machine, at);
      },
      "PATCH /machine-config": ({ name, body, at }) => {
        const update = machineUpdateJson.parse(body, at);
        this.#before(name);
        if (Object.keys(update).length === 0) {
          refuse(name, "its body changes nothing: give at least one field");
        }
        const machine = { ...this.#configuration.machine, ...update };
        this.#configuration = withMachine(this.#configuration, machine, at);
      },
      "PUT /boot-source": this.#part("bootSource", bootSourceJson),
      "PUT /drives/{id}": async ({ name, id, body, at }) => {
        const drive = sameId(driveJson.parse(body, at), id, name);
        this.#before(name);
        const changed = withDrive(this.#configuration, drive, at);
        await checkFiles({ drives: [drive] }, at.subject);
        this.#configuration = changed;
      },
      "PATCH /drives/{id}": ({ name, id, body, at }) => this.#patchDrive(name, id, body, at),
      "PUT /network-interfaces/{id}": ({ name, id, body, at }) => {
        const nic = sameId(networkInterfaceJson.parse(body, at), id, name);
        this.#before(name);
        this.#configuration = withNetworkInterface(this.#configuration, nic, at);
      },
      "PATCH /network-interfaces/{id}": ({ name, id, body, at }) => this.#patchNic(name, id, body, at),
      "PUT /vsock": this.#part("vsock", vsockJson),
      "PUT /entropy": this.#part("entropy", entropyJson),
      "PUT /serial": this.#part("serial", serialJson),
      "PUT /logger": this.#part("logger", loggerJson),
      "PUT /metrics": (call) => {
        if (this.#configuration.metrics) refuse(call.name, "the metrics have been set up already");
        return this.#part("metrics", metricsJson)(call);
      },
      "GET /balloon": ({ name }) => balloonJson.print(this.#balloon(name)),
      "PUT /balloon": ({ name, body, at }) => {
        const balloon = balloonJson.parse(body, at);
        this.#before(name);
        this.#configuration = withBalloon(this.#configuration, balloon, at);
      },
      "PATCH /balloon": async ({ name, body, at }) => {
        const update = balloonUpdateJson.parse(body, at);
        this.#after(name);
        const changed = withBalloon(this.#configuration, { ...this.#balloon(name), ...update }, at);
        await controller.setBalloon(update.amountMib * 2 ** 20);
        this.#configuration = changed;
      },
      "GET /balloon/statistics": async ({ name }) => {
        this.#after(name);
        if (this.#balloon(name).statsPollingInterval === 0) refuse(name, NO_STATISTICS);
        return statisticsJson.print(await controller.balloonStatistics());
      },
      "PATCH /balloon/statistics": async ({ name, body, at }) => {
        const { statsPollingInterval } = statisticsUpdateJson.parse(body, at);
        this.#after(name);
        const balloon = this.#balloon(name);
        if (statsPollingInterval === balloon.statsPollingInterval) return;
        if (balloon.statsPollingInterval === 0) refuse(name, NO_STATISTICS);
        if (statsPollingInterval === 0) {
          refuse(name, "statistics cannot be turned off while the machine runs: ask for them more rarely");
        }
        await controller.setStatisticsInterval(statsPollingInterval);
        this.#configuration = { ...this.#configuration, balloon: { ...balloon, statsPollingInterval } };
      },
      "PUT /actions": async ({ name, body, at }) => {
        const { actionType } = instanceActionJson.parse(body, at);
        if (actionType === "InstanceStart") return await this.#start(name);
        this.#after(name);
        if (actionType === "FlushMetrics") await controller.flushMetrics();
        else await controller.sendCtrlAltDel();
      },
      "PATCH /vm": async ({ name, body, at }) => {
        const { state } = vmStateJson.parse(body, at);
        this.#after(name);
        if (state === "Paused" && controller.state !== "Paused") await controller.pause();
        if (state === "Resumed" && controller.state !== "Running") await controller.resume();
      },
      "GET /vm/config": () => configurationJson.print(this.#configuration),
      "GET /hypertopia/status": () =>
        statusJson.print({
          ...controller.report(),
          id: controller.id,
          state: controller.state,
          pid: Deno.pid,
        }),
      "GET /hypertopia/metrics": () => controller.metrics(),
      "PUT /hypertopia/actions": async ({ name, body, at }) => {
        const { action } = supervisorActionJson.parse(body, at);
        if (action === "Kill") return await controller.kill();
        await this.#inTurn(async () => {
          if (action === "Stop") return await controller.stop();
          this.#after(name);
          await controller.reboot();
        });
      },
      "PUT /hypertopia/forwards": async ({ name, body, at }) => {
        const forwards = forwardsJson.parse(body, at);
        const changed = withForwards(this.#configuration, forwards, at);
        if (controller.state !== "Not started") {
          this.#after(name);
          await controller.setForwards(forwards);
        }
        this.#configuration = changed;
      },
    };
  }

  /** A part of the machine that is set as a whole, before the start. */
  #part<K extends keyof MachineConfiguration>(
    key: K,
    codec: Codec<NonNullable<MachineConfiguration[K]>>,
  ): Route {
    return async ({ name, body, at }) => {
      const part = { [key]: codec.parse(body, at) } as Partial<MachineConfiguration>;
      this.#before(name);
      await checkFiles(part, at.subject);
      this.#configuration = { ...this.#configuration, ...part };
    };
  }

  async #start(name: string): Promise<void> {
    this.#before(name);
    const configuration = bootable(this.#configuration);
    await this.#controller.start(configuration);
    this.#configuration = configuration;
  }

  async #patchDrive(name: string, id: string, body: unknown, at: Place): Promise<void> {
    const { id: _, ...update } = sameId(driveUpdateJson.parse(body, at), id, name);
    this.#after(name);
    const drives = [...this.#configuration.drives];
    const index = drives.findIndex((each) => each.id === id);
    if (index < 0) refuse(name, `the drive was not found: the machine has ${namesOf(drives)}`);
    if (Object.keys(update).length === 0) {
      refuse(name, "its body changes nothing: give `path_on_host`, `rate_limiter` or `size`");
    }
    const drive = drives[index]!;
    const limits = update.rateLimiter
      ? { rateLimiter: updateRateLimiter(drive.rateLimiter ?? {}, update.rateLimiter) }
      : {};
    await this.#controller.updateDrive(id, { ...update, ...limits });
    drives[index] = { ...drive, pathOnHost: update.pathOnHost ?? drive.pathOnHost, ...limits };
    this.#configuration = { ...this.#configuration, drives };
  }

  async #patchNic(name: string, id: string, body: unknown, at: Place): Promise<void> {
    const { id: _, ...update } = sameId(nicUpdateJson.parse(body, at), id, name);
    this.#after(name);
    const nics = [...this.#configuration.networkInterfaces];
    const index = nics.findIndex((each) => each.id === id);
    if (index < 0) refuse(name, `the network interface was not found: the machine has ${namesOf(nics)}`);
    const nic = nics[index]!;
    const { rxRateLimiter: rx, txRateLimiter: tx } = update;
    const limits = {
      ...(rx ? { rxRateLimiter: updateRateLimiter(nic.rxRateLimiter ?? {}, rx) } : {}),
      ...(tx ? { txRateLimiter: updateRateLimiter(nic.txRateLimiter ?? {}, tx) } : {}),
    };
    await this.#controller.updateNic(id, limits);
    nics[index] = { ...nic, ...limits };
    this.#configuration = { ...this.#configuration, networkInterfaces: nics };
  }

  #balloon(name: string): BalloonConfiguration {
    return this.#configuration.balloon ??
      refuse(name, "the machine has no balloon: PUT /balloon before starting it");
  }

  #before(name: string): void {
    if (this.#controller.state !== "Not started") {
      refuse(name, "it is not supported after starting the machine: do it before InstanceStart");
    }
  }

  #after(name: string): void {
    if (this.#controller.state === "Not started") {
      refuse(name, "it is not supported before starting the machine: do it after InstanceStart");
    }
    const { end } = this.#controller.report();
    if (end) refuse(name, `the machine has ended: ${end.detail}`);
  }
}

/** The path of a request as Firecracker reads it. The authority is the client's, and need not be one that `URL` takes. */
function pathOf(url: string): string {
  const [, path = ""] = /^[^:]*:\/\/[^/?#]*([^?#]*)/.exec(url) ?? [];
  return `/${path.replace(/^\/+|\/$/g, "")}`;
}

function refuse(name: string, reason: string): never {
  throw new MachineError(`Cannot serve ${name} as ${reason}`);
}

function sameId<T extends { readonly id: string }>(value: T, id: string, name: string): T {
  if (value.id !== id) {
    refuse(name, `the id in the path, "${id}", does not match the one in the body, "${value.id}"`);
  }
  return value;
}

function namesOf(devices: readonly { readonly id: string }[]): string {
  return devices.map(({ id }) => `"${id}"`).join(", ") || "none";
}
