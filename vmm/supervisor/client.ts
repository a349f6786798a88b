/**
 * A client of a supervisor's API, for our own engine.
 *
 * @module
 */

import type { MachineRequest } from "./main.ts";
import { MachineError } from "../errors.ts";
import {
  type BalloonStatistics,
  balloonUpdateJson,
  type Codec,
  configurationJson,
  type DriveUpdate,
  driveUpdateJson,
  forwardsJson,
  instanceActionJson,
  type InstanceInfo,
  instanceInfoJson,
  type MachineConfiguration,
  type NicUpdate,
  nicUpdateJson,
  parseJson,
  placeOf,
  type PortForward,
  readBounded,
  statisticsJson,
  statisticsUpdateJson,
  statusJson,
  type SupervisorAction,
  supervisorActionJson,
  type SupervisorStatus,
  vmStateJson,
} from "./config.ts";

/** Largest answer that is read, in bytes. */
const MAX_ANSWER = 2 ** 22;

/** A supervisor could not be talked to. */
export class SupervisorConnectionError extends MachineError {
  /** Whether nobody listens: the supervisor has ended, or not begun. */
  readonly isAbsent: boolean;

  /**
   * Explains a failure.
   *
   * @param message What was attempted, why it failed, what to do next
   * @param isAbsent Whether nobody listens
   * @param options The cause
   */
  constructor(message: string, isAbsent: boolean, options?: ErrorOptions) {
    super(message, options);
    this.name = "SupervisorConnectionError";
    this.isAbsent = isAbsent;
  }
}

/** What each call takes. */
export interface CallOptions {
  /** Ends the wait; what was asked for may happen all the same. */
  readonly signal?: AbortSignal;
}

/**
 * Asks one supervisor for things. All calls throw {@linkcode SupervisorConnectionError} where it cannot be talked to,
 * and {@linkcode MachineError} with its words where it refuses.
 */
export class SupervisorClient implements Disposable {
  readonly #path: string;
  readonly #client: Deno.HttpClient;

  /**
   * Connects to nothing yet.
   *
   * @param path Path of the supervisor's socket
   */
  constructor(path: string) {
    this.#path = path;
    this.#client = Deno.createHttpClient({ proxy: { transport: "unix", path } });
  }

  /** Disconnects. */
  [Symbol.dispose](): void {
    this.#client.close();
  }

  /**
   * Asks how the machine is.
   *
   * @param options Signal
   * @returns Its status; undefined where nobody listens
   */
  async status(options: CallOptions = {}): Promise<SupervisorStatus | undefined> {
    try {
      return await this.#get("/hypertopia/status", statusJson, options);
    } catch (error) {
      if (error instanceof SupervisorConnectionError && error.isAbsent) return undefined;
      throw error;
    }
  }

  /**
   * Asks who answers.
   *
   * @param options Signal
   * @returns Identity, state and version
   */
  async info(options: CallOptions = {}): Promise<InstanceInfo> {
    return await this.#get("/", instanceInfoJson, options);
  }

  /**
   * Asks what the machine is made of.
   *
   * @param options Signal
   * @returns The configuration
   */
  async configuration(options: CallOptions = {}): Promise<MachineConfiguration> {
    return await this.#get("/vm/config", configurationJson, options);
  }

  /**
   * Asks for all metrics.
   *
   * @param options Signal
   * @returns The metrics
   */
  async metrics(options: CallOptions = {}): Promise<Readonly<Record<string, unknown>>> {
    const answer = await this.#call("GET", "/hypertopia/metrics", undefined, options);
    if (typeof answer === "object" && answer !== null) return answer as Readonly<Record<string, unknown>>;
    throw new MachineError(`Cannot use the answer of GET /hypertopia/metrics as it is no object`);
  }

  /**
   * Starts the machine.
   *
   * @param options Signal
   */
  async start(options: CallOptions = {}): Promise<void> {
    await this.#send("PUT", "/actions", instanceActionJson, { actionType: "InstanceStart" }, options);
  }

  /**
   * Asks the guest to power off, and does not wait for it.
   *
   * @param options Signal
   */
  async sendCtrlAltDel(options: CallOptions = {}): Promise<void> {
    await this.#send("PUT", "/actions", instanceActionJson, { actionType: "SendCtrlAltDel" }, options);
  }

  /**
   * Writes the metrics where the configuration says.
   *
   * @param options Signal
   */
  async flushMetrics(options: CallOptions = {}): Promise<void> {
    await this.#send("PUT", "/actions", instanceActionJson, { actionType: "FlushMetrics" }, options);
  }

  /**
   * Stops the vCPUs.
   *
   * @param options Signal
   */
  async pause(options: CallOptions = {}): Promise<void> {
    await this.#send("PATCH", "/vm", vmStateJson, { state: "Paused" }, options);
  }

  /**
   * Lets the vCPUs go on.
   *
   * @param options Signal
   */
  async resume(options: CallOptions = {}): Promise<void> {
    await this.#send("PATCH", "/vm", vmStateJson, { state: "Resumed" }, options);
  }

  /**
   * Stops, kills or restarts the machine at once. A supervisor that ends before it answers has done what it was asked.
   *
   * @param action What to do
   * @param options Signal
   */
  async act(action: SupervisorAction, options: CallOptions = {}): Promise<void> {
    try {
      await this.#send("PUT", "/hypertopia/actions", supervisorActionJson, { action }, options);
    } catch (error) {
      const hasEnded = error instanceof SupervisorConnectionError && !error.isAbsent && action !== "Reboot";
      if (!hasEnded) throw error;
    }
  }

  /**
   * Changes the balloon, and does not wait for the guest to follow.
   *
   * @param amountMib Memory that it is to hold, in MiB
   * @param options Signal
   */
  async setBalloon(amountMib: number, options: CallOptions = {}): Promise<void> {
    await this.#send("PATCH", "/balloon", balloonUpdateJson, { amountMib }, options);
  }

  /**
   * Asks what is known of the balloon.
   *
   * @param options Signal
   * @returns The statistics
   */
  async balloonStatistics(options: CallOptions = {}): Promise<BalloonStatistics> {
    return await this.#get("/balloon/statistics", statisticsJson, options);
  }

  /**
   * Changes how often the guest's statistics are asked for.
   *
   * @param seconds How often, at least 1
   * @param options Signal
   */
  async setStatisticsInterval(seconds: number, options: CallOptions = {}): Promise<void> {
    const update = { statsPollingInterval: seconds };
    await this.#send("PATCH", "/balloon/statistics", statisticsUpdateJson, update, options);
  }

  /**
   * Changes a disk.
   *
   * @param id Its name: letters, digits and `_`
   * @param update What changes
   * @param options Signal
   */
  async updateDrive(id: string, update: DriveUpdate, options: CallOptions = {}): Promise<void> {
    await this.#send("PATCH", `/drives/${id}`, driveUpdateJson, { ...update, id }, options);
  }

  /**
   * Changes a NIC.
   *
   * @param id Its name: letters, digits and `_`
   * @param update What changes
   * @param options Signal
   */
  async updateNic(id: string, update: NicUpdate, options: CallOptions = {}): Promise<void> {
    await this.#send("PATCH", `/network-interfaces/${id}`, nicUpdateJson, { ...update, id }, options);
  }

  /**
   * Makes these the port forwards.
   *
   * @param forwards All of them
   * @param options Signal
   */
  async setForwards(forwards: readonly PortForward[], options: CallOptions = {}): Promise<void> {
    await this.#send("PUT", "/hypertopia/forwards", forwardsJson, forwards, options);
  }

  async #get<T>(path: string, codec: Codec<T>, options: CallOptions): Promise<T> {
    const answer = await this.#call("GET", path, undefined, options);
    return codec.parse(answer, placeOf(`the answer of GET ${path}`));
  }

  async #send<T>(
    method: string,
    path: string,
    codec: Codec<T>,
    value: T,
    options: CallOptions,
  ): Promise<void> {
    await this.#call(method, path, JSON.stringify(codec.print(value)), options);
  }

  /** Sends a request. Gives what the answer's body says, undefined where it has none. */
  async #call(
    method: string,
    path: string,
    body: string | undefined,
    options: CallOptions,
  ): Promise<unknown> {
    const at = placeOf(`the answer of ${method} ${path}`);
    const { isOk, status, content } = await this.#exchange(method, path, body, options);
    const answer = content === "" ? undefined : parseJson(content, at);
    if (isOk) return answer;
    const fault = (answer as { fault_message?: unknown } | undefined)?.fault_message;
    throw new MachineError(
      typeof fault === "string"
        ? fault
        : `Cannot use ${at.subject} of the supervisor at "${this.#path}" as it has status ${status} and no explanation`,
    );
  }

  async #exchange(
    method: string,
    path: string,
    body: string | undefined,
    { signal }: CallOptions,
  ): Promise<{ isOk: boolean; status: number; content: string }> {
    try {
      const response = await fetch(`http://localhost${path}`, {
        client: this.#client,
        method,
        ...(body === undefined ? {} : { body, headers: { "content-type": "application/json" } }),
        ...(signal ? { signal } : {}),
      });
      const content = await readBounded(response.body, MAX_ANSWER, `the answer of ${method} ${path}`);
      return { isOk: response.ok, status: response.status, content };
    } catch (thrown) {
      signal?.throwIfAborted();
      if (thrown instanceof MachineError) throw thrown;
      // Deno says what failed in the cause, in words only (Deno 2.9).
      const { cause } = thrown as Error;
      const reason = cause instanceof Error ? cause.message : (thrown as Error).message;
      const isAbsent = /\(Connect\).*os error (2|111)\)/.test(reason);
      throw new SupervisorConnectionError(
        isAbsent
          ? `Cannot reach the supervisor at "${this.#path}" as nobody listens there: start the machine first`
          : `Cannot finish ${method} ${path} with the supervisor at "${this.#path}" as ${reason}: look into its log`,
        isAbsent,
        { cause: thrown },
      );
    }
  }
}

/**
 * Asks a process for several machines to run one more.
 *
 * @param host Path of that process's socket
 * @param id Identity of the machine
 * @param request Its files
 * @param options Signal
 * @returns Whether it runs; false where nobody listens
 * @throws {MachineError} If it cannot be run
 */
export async function requestMachine(
  host: string,
  id: string,
  request: MachineRequest,
  options: CallOptions = {},
): Promise<boolean> {
  using client = Deno.createHttpClient({ proxy: { transport: "unix", path: host } });
  let response: Response;
  try {
    response = await fetch(`http://localhost/machines/${id}`, {
      client,
      method: "PUT",
      body: JSON.stringify(request),
      ...options,
    });
  } catch (error) {
    options.signal?.throwIfAborted();
    if (await Deno.connect({ transport: "unix", path: host }).then((each) => each.close(), () => true)) {
      return false;
    }
    throw error;
  }
  if (response.ok) return true;
  throw new MachineError((await response.json() as { fault_message: string }).fault_message);
}
