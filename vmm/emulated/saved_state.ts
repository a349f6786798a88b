/**
 * Saved states of emulated machines in files: what a machine has booted to, for the next of its kind to go on from.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { promisify } from "node:util";
import { constants, zstdCompress, zstdDecompress } from "node:zlib";
import type { VirtioPciState } from "../devices/virtio_pci.ts";
import { MachineError } from "../errors.ts";
import { writeWhole } from "../files.ts";
import { EMULATOR_VERSION } from "./emulator.ts";
import type { MachineState } from "./vmm.ts";

/** Of our own layout. */
const FORMAT = "hypertopia-state-1";
/** Longest first line of a file. */
const MAX_HEADER = 4096;
/** Largest state: memory and what else there is of a PC. */
const MAX_STATE = 2 ** 31;

/** The first line of a file, as JSON. */
interface Header {
  readonly format: string;
  /** Version of the emulator. */
  readonly emulator: string;
  /** Digest of all that the machine was made of. */
  readonly key: string;
  /** Size of the rest of the file. */
  readonly length: number;
  /** Digest of the rest of the file. */
  readonly sha256: string;
}

/**
 * Writes a state, whole or not at all.
 *
 * @param path Path of the file
 * @param key Digest of all that the machine is made of
 * @param state The state
 */
export async function writeState(path: string, key: string, state: MachineState): Promise<void> {
  const functions = new TextEncoder().encode(JSON.stringify(state.functions));
  const content = new Uint8Array(4 + functions.length + state.emulator.length);
  new DataView(content.buffer).setUint32(0, functions.length, true);
  content.set(functions, 4);
  content.set(state.emulator, 4 + functions.length);
  const body = await promisify(zstdCompress)(content, {
    params: { [constants.ZSTD_c_compressionLevel]: 1 },
  });
  const header: Header = {
    format: FORMAT,
    emulator: EMULATOR_VERSION,
    key,
    length: body.length,
    sha256: digest(body),
  };
  const first = new TextEncoder().encode(`${JSON.stringify(header)}\n`);
  const whole = new Uint8Array(first.length + body.length);
  whole.set(first);
  whole.set(body, first.length);
  await writeWhole(path, whole);
}

/**
 * Reads a state.
 *
 * @param path Path of the file
 * @param key Digest of all that the machine is made of
 * @returns The state; undefined where there is no such file
 * @throws {MachineError} If it is damaged, or of another emulator or machine
 */
export async function readState(path: string, key: string): Promise<MachineState | undefined> {
  let whole: Uint8Array<ArrayBuffer>;
  try {
    whole = await Deno.readFile(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
  const refuse = (reason: string, cause?: unknown): never => {
    throw new MachineError(`Cannot go on from the saved state "${path}" as ${reason}`, { cause });
  };
  const end = whole.subarray(0, MAX_HEADER).indexOf(10);
  const header = parse(end < 0 ? "" : new TextDecoder().decode(whole.subarray(0, end)));
  if (header?.format !== FORMAT) return refuse("it is no saved state, or one of another version");
  if (header.emulator !== EMULATOR_VERSION) {
    return refuse(`it is of version ${header.emulator} of the emulator, and this is ${EMULATOR_VERSION}`);
  }
  if (header.key !== key) return refuse("it is of a machine that is made of something else");
  const body = whole.subarray(end + 1);
  if (body.length !== header.length) {
    return refuse(`it is cut: ${body.length} of ${header.length} bytes are there`);
  }
  if (digest(body) !== header.sha256) return refuse("it is damaged: its checksum is another");
  try {
    const content = await promisify(zstdDecompress)(body, { maxOutputLength: MAX_STATE });
    const length = content.readUInt32LE(0);
    const functions = JSON.parse(content.toString("utf8", 4, 4 + length)) as VirtioPciState[];
    return { emulator: new Uint8Array(content.subarray(4 + length)), functions };
  } catch (cause) {
    return refuse("it cannot be unpacked", cause);
  }
}

function parse(line: string): Partial<Header> | undefined {
  try {
    return JSON.parse(line) as Partial<Header>;
  } catch {
    return undefined;
  }
}

function digest(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}
