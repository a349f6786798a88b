/**
 * Saved states of emulated machines in files: what a machine has booted to, for the next of its kind to go on from.
 *
 * @module
 */

import { promisify } from "node:util";
import { constants, zstdCompress, zstdDecompress } from "node:zlib";
import type { VirtioPciState } from "../devices/virtio_pci.ts";
import { MachineError } from "../errors.ts";
import { writeWhole } from "../files.ts";
import { EMULATOR_VERSION } from "./emulator.ts";
import type { MachineState } from "./vmm.ts";

/** Of our own layout. */
const FORMAT = "hypertopia-state-2";
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
  /** Size of what is first in it: the devices, as JSON. */
  readonly functions: number;
  /** Size of the PC, which is packed after that. */
  readonly emulatorSize: number;
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
  const packed = await promisify(zstdCompress)(state.emulator, {
    params: { [constants.ZSTD_c_compressionLevel]: 1 },
  });
  const body = new Uint8Array(functions.length + packed.length);
  body.set(functions);
  body.set(packed, functions.length);
  const header: Header = {
    format: FORMAT,
    emulator: EMULATOR_VERSION,
    key,
    length: body.length,
    functions: functions.length,
    emulatorSize: state.emulator.length,
    sha256: await digest(body),
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
    // At once: later, a sandbox may be in the way.
    using file = Deno.openSync(path);
    whole = new Uint8Array(file.statSync().size);
    for (let at = 0; at < whole.length;) {
      const count = await file.read(whole.subarray(at));
      if (count === null) break;
      at += count;
    }
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
  if (await digest(body) !== header.sha256) return refuse("it is damaged: its checksum is another");
  try {
    const { functions = 0, emulatorSize = 0 } = header;
    const size = Math.min(emulatorSize, MAX_STATE);
    // In one piece, which is not copied then.
    const { buffer, byteOffset, byteLength } = await promisify(zstdDecompress)(body.subarray(functions), {
      maxOutputLength: size,
      chunkSize: Math.max(size, 64),
    });
    if (byteLength !== size) throw new Error(`it has ${byteLength} bytes`);
    return {
      emulator: new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength),
      functions: JSON.parse(new TextDecoder().decode(body.subarray(0, functions))) as VirtioPciState[],
    };
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

async function digest(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex();
}
