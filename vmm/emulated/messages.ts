/**
 * What a supervisor and the worker that runs an emulated machine tell each other.
 *
 * @module
 */

import type { InstanceState, LoggerConfiguration, MachineEnd, RunReport } from "../supervisor/config.ts";
import type { SandboxFiles } from "../supervisor/controller.ts";

/** What is asked of the worker: operations of a controller. */
export type WorkerMethod =
  | "start"
  | "pause"
  | "resume"
  | "sendCtrlAltDel"
  | "stop"
  | "kill"
  | "reboot"
  | "setBalloon"
  | "balloonStatistics"
  | "setStatisticsInterval"
  | "updateDrive"
  | "updateNic"
  | "setForwards"
  | "flushMetrics"
  | "metrics";

/** To the worker. */
export type ToWorker =
  | { readonly type: "begin"; readonly id: string }
  | {
    readonly type: "call";
    readonly number: number;
    readonly method: WorkerMethod;
    readonly args: readonly unknown[];
  }
  | { readonly type: "confined"; readonly isConfined: boolean; readonly failure?: Failure };

/** What failed, for the other thread. */
export interface Failure {
  /** Words. */
  readonly message: string;
  /** Whether a user can do something about it. */
  readonly isMachineError: boolean;
}

/** From the worker. */
export type FromWorker =
  | {
    readonly type: "answer";
    readonly number: number;
    readonly value?: unknown;
    readonly failure?: Failure;
    readonly state: InstanceState;
    readonly report: RunReport;
  }
  | { readonly type: "log"; readonly level: "info" | "warn" | "error"; readonly message: string }
  | { readonly type: "configureLog"; readonly options: LoggerConfiguration }
  | { readonly type: "confine"; readonly files: SandboxFiles; readonly memory: number }
  | { readonly type: "end"; readonly end: MachineEnd; readonly report: RunReport };
