/**
 * The engine contract: what every hypervisor back end offers.
 *
 * @module
 */

import type { GuestChannel } from "./guest/channel.ts";

/** Names of engines. */
export type EngineName = "kvm" | "xen" | "qemu" | "emulated";

/** What an engine can do on this host. */
export interface Capabilities {
  /** The engine. */
  readonly engine: EngineName;
  /** Whether it can run machines here. */
  readonly isUsable: boolean;
  /** What was found, in words: why not, or with what. */
  readonly detail: string;
  /** Single findings, such as each accelerator's. */
  readonly findings: readonly {
    readonly name: string;
    readonly isUsable: boolean;
    readonly detail: string;
  }[];
}

/** A disk as the machine sees it. */
export interface MachineDisk {
  /** Name that the user gave; `root` is the root disk. */
  readonly name: string;
  /** Path of the file on the host. */
  readonly path: string;
  /** Format of the file. */
  readonly format: "raw" | "qcow2";
  /** Serial number, at most 20 characters. */
  readonly serial: string;
  /** Whether the guest may not write. */
  readonly readOnly: boolean;
  /** Capacity in bytes. */
  readonly size: number;
}

/** A port of the host that leads to the guest. */
export interface MachineForward {
  /** Name that the user gave. */
  readonly name: string;
  /** Protocol. */
  readonly protocol: "tcp" | "udp";
  /** Address of the host. */
  readonly address: string;
  /** Port on the host. */
  readonly host: number;
  /** Port in the guest. */
  readonly guest: number;
}

/** A NIC as the machine sees it. */
export interface MachineNic {
  /** Name of the interface in the guest. */
  readonly name: string;
  /** Ethernet address. */
  readonly mac: string;
  /** IPv4 address. */
  readonly ip: string;
  /** Address of the network in the stack: NICs of one network reach each other. */
  readonly network: string;
  /** Network with prefix length. */
  readonly cidr: string;
  /** Address of the gateway. */
  readonly gateway: string;
  /** Address of the name server. */
  readonly dns: string;
  /** Whether the guest reaches the outside. */
  readonly nat: boolean;
  /** Port forwards. */
  readonly forwards: readonly MachineForward[];
}

/** Everything that an engine needs to run a machine. */
export interface MachineSpec {
  /** Identity: 16 hexadecimal digits. */
  readonly id: string;
  /** Name of the stack. */
  readonly stack: string;
  /** Address in the stack. */
  readonly address: string;
  /** Host name of the guest. */
  readonly hostname?: string;
  /** vCPUs. */
  readonly cpus: number;
  /** Memory of the guest, in bytes. */
  readonly memory: number;
  /** Memory that it can grow to, in bytes. */
  readonly maxMemory: number;
  /** Path of the kernel; absent where firmware boots the root disk. */
  readonly kernel?: string;
  /** Paths of the parts of the initramfs, in order. */
  readonly initramfs: readonly string[];
  /** Kernel command line, without what the engine itself adds. */
  readonly cmdline: string;
  /** Disks; the root disk is first. */
  readonly disks: readonly MachineDisk[];
  /** NICs. */
  readonly nics: readonly MachineNic[];
  /** Whether the guest has our agent. */
  readonly hasAgent: boolean;
  /** Digest of what the guest reads at boot only: another one takes a restart. */
  readonly bootKey: string;
  /** Options of the engine. */
  readonly engine: Readonly<Record<string, unknown>>;
}

/** How a machine is. */
export type MachineState =
  | "absent"
  | "stopped"
  | "running"
  | "paused"
  | "crashed";

/** A machine as seen by {@linkcode Engine.list}. */
export interface MachineStatus {
  /** Identity. */
  readonly id: string;
  /** How it is. */
  readonly state: MachineState;
  /** Name of the stack that made it. */
  readonly stack: string;
  /** Its address in that stack. */
  readonly address: string;
  /** Process that runs it, where one does. */
  readonly pid?: number;
  /** Why it crashed or ended, where that is known. */
  readonly detail?: string;
}

/** How many times its memory a machine's maximum may be: a guest keeps some memory for all that it could have. */
export const BALLOON_RATIO = 4;

/** What long operations take. */
export interface OperationOptions {
  /** Aborted by Ctrl-C and time limits. */
  readonly signal?: AbortSignal;
  /** Shows progress. */
  readonly report?: (progress: string) => void;
}

/** What {@linkcode Machine.update} did. */
export interface UpdateResult {
  /** Whether the machine was restarted. */
  readonly isRestarted: boolean;
}

/** A machine. It outlives the process that made it. */
export interface Machine {
  /** Identity. */
  readonly id: string;
  /** The engine that runs it. */
  readonly engine: EngineName;
  /** What it was started from last; undefined where it never was. */
  spec(): Promise<MachineSpec | undefined>;
  /** Looks how it is. */
  status(): Promise<MachineStatus>;
  /**
   * Puts it on record without starting it.
   *
   * @param spec What it is made of
   */
  define(spec: MachineSpec): Promise<void>;
  /**
   * Starts it, if it does not run.
   *
   * @param spec What it is made of
   * @param options Signal and progress
   */
  start(spec: MachineSpec, options?: OperationOptions): Promise<void>;
  /**
   * Makes a running machine be as a spec says: live where that is possible, by a restart otherwise.
   *
   * @param spec What it should be made of
   * @param options Signal and progress, and how long a shutdown may take, in milliseconds, where it takes a
   * restart
   */
  update(
    spec: MachineSpec,
    options?: OperationOptions & { readonly shutdownTimeout?: number },
  ): Promise<UpdateResult>;
  /**
   * Shuts it down in an orderly way, and powers it off if it takes longer than allowed.
   *
   * @param timeout Milliseconds that the guest may take
   * @param options Signal and progress
   */
  shutdown(timeout: number, options?: OperationOptions): Promise<void>;
  /** Powers it off at once. */
  kill(): Promise<void>;
  /** Stops its vCPUs. */
  pause(): Promise<void>;
  /** Lets its vCPUs go on. */
  resume(): Promise<void>;
  /** Powers it off and removes everything that belongs to it. */
  destroy(): Promise<void>;
  /** Connects to the serial console; one client at a time. */
  console(): Promise<Deno.UnixConn>;
  /** Path of the file that holds what the console printed since the last start. */
  readonly consoleLog: string;
  /** Path of the file that holds what the hypervisor itself printed. */
  readonly engineLog: string;
  /** The guest's agent. */
  readonly guest: GuestChannel;
}

/** What a machine asks of its engine, as far as engines differ in it. */
export interface MachineNeeds {
  /** vCPUs. */
  readonly cpus: number;
  /** Whether it has NICs. */
  readonly hasNics: boolean;
  /** Whether one of them leads outside, by translating its addresses. */
  readonly hasNat: boolean;
  /** Whether firmware boots its disk, since it has no kernel of its own. */
  readonly hasFirmware: boolean;
  /** Most memory that it can have, in bytes. */
  readonly memory: number;
  /** Whether it takes a 64-bit processor, whatever the engine could do with. */
  readonly is64Bit: boolean;
  /** Whether one of its disks is of the format qcow2. */
  readonly hasQcow2: boolean;
}

/** A hypervisor back end. */
export interface Engine {
  /** Its name. */
  readonly name: EngineName;
  /**
   * Finds out by running code what works here.
   *
   * @param options Signal and progress, options of the engine as a machine has them, and what the machine needs
   */
  probe(
    options?: OperationOptions & { readonly engine?: MachineSpec["engine"]; readonly needs?: MachineNeeds },
  ): Promise<Capabilities>;
  /**
   * Gives the machine of an identity, whether it exists yet or not.
   *
   * @param id Identity
   */
  attach(id: string): Machine;
  /**
   * Lists the machines of this engine on this host, in one pass.
   *
   * @param ids Only these; all unless told
   */
  list(ids?: ReadonlySet<string>): Promise<readonly MachineStatus[]>;
}
