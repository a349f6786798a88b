/**
 * The thread that an emulated machine runs on: emulator, devices and all that they lead to. The supervisor's own thread
 * stays free for its API.
 *
 * @module
 */

import { MachineError } from "../errors.ts";
import type { BootableConfiguration, LoggerConfiguration } from "../supervisor/config.ts";
import { MachineController } from "../supervisor/controller.ts";
import { reserveControlLine } from "../guest/channel.ts";
import type { Failure, FromWorker, ToWorker } from "./messages.ts";
import { EmulatedPlatform } from "./platform.ts";
import { writeState } from "./saved_state.ts";
import type { EmulatedVmm } from "./vmm.ts";
import { TemplateLine } from "./warm_start.ts";

/** The side of a worker that Deno's types leave out of modules for the main thread. */
const scope = globalThis as unknown as {
  onmessage: ((event: MessageEvent<ToWorker>) => void) | null;
  postMessage(message: FromWorker): void;
};

const log = {
  info: (message: string) => scope.postMessage({ type: "log", level: "info", message }),
  warn: (message: string) => scope.postMessage({ type: "log", level: "warn", message }),
  error: (error: unknown) =>
    scope.postMessage({ type: "log", level: "error", message: failureOf(error).message }),
  configure: (options: LoggerConfiguration) => scope.postMessage({ type: "configureLog", options }),
};

/** The machine of this thread. */
class Machine {
  readonly controller: MachineController<EmulatedVmm>;
  readonly #platform: EmulatedPlatform;
  #confined = Promise.withResolvers<boolean>();
  #isBooting = true;

  constructor(id: string) {
    this.#platform = new EmulatedPlatform({ id, log });
    this.controller = new MachineController({
      id,
      log,
      platform: this.#platform,
      enterSandbox: (files, memory) => {
        this.#confined = Promise.withResolvers();
        scope.postMessage({ type: "confine", files, memory });
        return this.#confined.promise;
      },
      onEnd: (end) => scope.postMessage({ type: "end", end, report: this.controller.report() }),
    });
  }

  /** Is told what became of the sandbox. */
  confined({ isConfined, failure }: ToWorker & { readonly type: "confined" }): void {
    if (failure) this.#confined.reject(new MachineError(failure.message));
    else this.#confined.resolve(isConfined);
  }

  /** Does what was asked for, and answers. */
  async call({ number, method, args }: ToWorker & { readonly type: "call" }): Promise<void> {
    const { controller } = this;
    let value: unknown;
    let failure: Failure | undefined;
    try {
      if (method === "start") {
        await this.#start(args[0] as BootableConfiguration);
        this.#isBooting = false;
      } else {value = await (controller[method] as (...args: readonly unknown[]) => unknown).apply(
          controller,
          [...args],
        );}
    } catch (error) {
      failure = failureOf(error);
    }
    // Until it is told who it is, it is nobody.
    const state = this.#isBooting ? "Not started" : controller.state;
    const report = controller.report();
    scope.postMessage({ type: "answer", number, state, report, ...(failure ? { failure } : { value }) });
  }

  async #start(configuration: BootableConfiguration): Promise<void> {
    const { controller } = this;
    const { warmStart, channels } = configuration.hypertopia;
    this.#platform.prepare(warmStart);
    // What others would ask a guest that does not know itself yet, it would take for what it is to be.
    using _reserved = warmStart && channels ? await reserveControlLine(channels.control) : undefined;
    await controller.start(configuration);
    if (!warmStart || !channels) return;
    try {
      using line = await TemplateLine.connect(channels.control);
      if (!this.#platform.isWarm) {
        await line.waitForMark();
        if (warmStart.save !== undefined) await this.#save(warmStart.save, warmStart.key);
      }
      await line.personalize(configuration, warmStart);
      if (controller.vmm) controller.vmm.isTemplate = false;
      log.info("the guest was told who it is");
    } catch (error) {
      await controller.kill();
      throw error;
    }
  }

  /** Leaves for the next of its kind what this one has booted to. */
  async #save(path: string, key: string): Promise<void> {
    const { vmm } = this.controller;
    if (!vmm) return;
    try {
      await vmm.pause();
      const state = await vmm.save();
      vmm.resume();
      await writeState(path, key, state);
      log.info("the state of machines of this kind was saved");
    } catch (error) {
      log.warn(`the state of machines of this kind was not saved: ${failureOf(error).message}`);
    } finally {
      vmm.resume();
    }
  }
}

function failureOf(error: unknown): Failure {
  return {
    message: error instanceof Error ? error.message : String(error),
    isMachineError: error instanceof MachineError,
  };
}

let machine: Machine | undefined;
scope.onmessage = ({ data }) => {
  if (data.type === "begin") machine = new Machine(data.id);
  else if (data.type === "call") void machine?.call(data);
  else machine?.confined(data);
};
