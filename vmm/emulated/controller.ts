/**
 * What a supervisor's API drives where the machine is emulated: a controller on a thread of its own.
 *
 * @module
 */

import { MachineError } from "../errors.ts";
import { moduleBeside } from "../detached.ts";
import type { Controller } from "../supervisor/api.ts";
import type {
  BalloonStatistics,
  BootableConfiguration,
  DriveUpdate,
  InstanceState,
  MachineEnd,
  NicUpdate,
  PortForward,
  RunReport,
} from "../supervisor/config.ts";
import type { ControllerHost, HostedMachine } from "../supervisor/supervisor.ts";
import type { FromWorker, ToWorker, WorkerMethod } from "./messages.ts";

/** How long the thread may take to end its machine before it is ended itself, in milliseconds. */
const KILL_TIMEOUT = 2000;

/** Runs emulated machines, each on a thread of its own. */
export class EmulatedHost implements ControllerHost {
  /**
   * See {@linkcode ControllerHost.create}.
   *
   * @param machine The machine
   * @returns What controls it
   */
  create(machine: HostedMachine): EmulatedController {
    return new EmulatedController(machine);
  }

  /** Nothing is shared. */
  [Symbol.dispose](): void {}
}

/** Runs one emulated machine. */
export class EmulatedController implements Controller {
  /** Identity of the machine. */
  readonly id: string;
  readonly #options: HostedMachine;
  readonly #worker: Worker;
  readonly #calls = new Map<number, PromiseWithResolvers<unknown>>();
  #number = 0;
  #state: InstanceState = "Not started";
  #report: RunReport = { uptime: 0, exits: {} };
  #started: number | undefined;

  /**
   * Starts the thread, and no machine yet.
   *
   * @param options Identity, log and sandbox
   */
  constructor(options: HostedMachine) {
    this.id = options.id;
    this.#options = options;
    this.#worker = new Worker(moduleBeside("./worker", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data }: MessageEvent<FromWorker>) => void this.#take(data);
    this.#worker.onerror = (event) => {
      event.preventDefault();
      this.#finish({ reason: "failure", detail: `its thread ended: ${event.message}` });
    };
    this.#post({ type: "begin", id: options.id });
  }

  /** How it is. */
  get state(): InstanceState {
    return this.#state;
  }

  /**
   * Tells how its run goes.
   *
   * @returns Uptime in milliseconds, and how it ended
   */
  report(): RunReport {
    const { end } = this.#report;
    if (end || this.#started === undefined) return this.#report;
    return { ...this.#report, uptime: performance.now() - this.#started };
  }

  /**
   * See {@linkcode Controller.start}.
   *
   * @param configuration What it is made of
   */
  async start(configuration: BootableConfiguration): Promise<void> {
    const started = performance.now();
    await this.#call("start", configuration);
    this.#started = started;
  }

  /** See {@linkcode Controller.pause}. */
  async pause(): Promise<void> {
    await this.#call("pause");
  }

  /** See {@linkcode Controller.resume}. */
  async resume(): Promise<void> {
    await this.#call("resume");
  }

  /** See {@linkcode Controller.sendCtrlAltDel}. */
  async sendCtrlAltDel(): Promise<void> {
    await this.#call("sendCtrlAltDel");
  }

  /** See {@linkcode Controller.stop}. */
  async stop(): Promise<void> {
    await this.#call("stop");
  }

  /** See {@linkcode Controller.kill}. */
  async kill(): Promise<void> {
    if (this.#report.end) return;
    const timer = setTimeout(
      () => this.#finish({ reason: "stopped", detail: "it was powered off" }),
      KILL_TIMEOUT,
    );
    try {
      await this.#call("kill");
    } finally {
      clearTimeout(timer);
    }
  }

  /** See {@linkcode Controller.reboot}. */
  async reboot(): Promise<void> {
    await this.#call("reboot");
  }

  /**
   * See {@linkcode Controller.setBalloon}.
   *
   * @param target Memory that it is to hold, in bytes
   */
  async setBalloon(target: number): Promise<void> {
    await this.#call("setBalloon", target);
  }

  /**
   * See {@linkcode Controller.balloonStatistics}.
   *
   * @returns Its size, and the guest's figures
   */
  async balloonStatistics(): Promise<BalloonStatistics> {
    return await this.#call("balloonStatistics") as BalloonStatistics;
  }

  /**
   * See {@linkcode Controller.setStatisticsInterval}.
   *
   * @param seconds How often
   */
  async setStatisticsInterval(seconds: number): Promise<void> {
    await this.#call("setStatisticsInterval", seconds);
  }

  /**
   * See {@linkcode Controller.updateDrive}.
   *
   * @param id Its name
   * @param update What changes
   */
  async updateDrive(id: string, update: DriveUpdate): Promise<void> {
    await this.#call("updateDrive", id, update);
  }

  /**
   * See {@linkcode Controller.updateNic}.
   *
   * @param id Its name
   * @param update What changes
   */
  async updateNic(id: string, update: NicUpdate): Promise<void> {
    await this.#call("updateNic", id, update);
  }

  /**
   * See {@linkcode Controller.setForwards}.
   *
   * @param forwards All of them
   */
  async setForwards(forwards: readonly PortForward[]): Promise<void> {
    await this.#call("setForwards", forwards);
  }

  /** See {@linkcode Controller.flushMetrics}. */
  async flushMetrics(): Promise<void> {
    await this.#call("flushMetrics");
  }

  /**
   * See {@linkcode Controller.metrics}.
   *
   * @returns What each device did
   */
  async metrics(): Promise<Readonly<Record<string, unknown>>> {
    return await this.#call("metrics") as Readonly<Record<string, unknown>>;
  }

  #post(message: ToWorker): void {
    this.#worker.postMessage(message);
  }

  #call(method: WorkerMethod, ...args: readonly unknown[]): Promise<unknown> {
    if (this.#report.end) {
      return Promise.reject(new MachineError("Cannot do this as the machine has ended: start it anew"));
    }
    const number = this.#number++;
    const call = Promise.withResolvers<unknown>();
    this.#calls.set(number, call);
    this.#post({ type: "call", number, method, args });
    return call.promise;
  }

  async #take(message: FromWorker): Promise<void> {
    const { log } = this.#options;
    switch (message.type) {
      case "answer": {
        const call = this.#calls.get(message.number);
        this.#calls.delete(message.number);
        this.#state = message.state;
        // Its end is told by a message of its own, which may come later.
        if (!this.#report.end) {
          const { uptime, exits } = message.report;
          this.#report = { uptime, exits };
        }
        if (!message.failure) return call?.resolve(message.value);
        const { message: words, isMachineError } = message.failure;
        return call?.reject(isMachineError ? new MachineError(words) : new Error(words));
      }
      case "log":
        return log[message.level](message.message);
      case "configureLog":
        return log.configure(message.options);
      case "confine":
        try {
          const isConfined = await this.#options.enterSandbox(message.files, message.memory);
          return this.#post({ type: "confined", isConfined });
        } catch (error) {
          const words = error instanceof Error ? error.message : String(error);
          const failure = { message: words, isMachineError: true };
          return this.#post({ type: "confined", isConfined: false, failure });
        }
      case "end":
        return this.#finish(message.end, message.report);
    }
  }

  #finish(end: MachineEnd, report: RunReport = { ...this.report(), end }): void {
    if (this.#report.end) return;
    this.#report = report;
    // What it was asked before it ended is still answered.
    setTimeout(() => {
      this.#worker.terminate();
      for (const call of this.#calls.values()) {
        call.reject(new MachineError("Cannot do this as the machine has ended: start it anew"));
      }
      this.#calls.clear();
    }, 0);
    this.#options.onEnd(end);
  }
}
