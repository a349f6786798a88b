/**
 * OpenPGP signatures, checked by the library `openpgp`.
 *
 * @module
 */

import { MachineError } from "../vmm/errors.ts";
import { importNpm } from "../vmm/images/npm_library.ts";

/** A key of a keyring. */
type Key = object;

/** What is used of the library. */
interface OpenPgp {
  readKeys(options: { binaryKeys: Uint8Array } | { armoredKeys: string }): Promise<Key[]>;
  readCleartextMessage(options: { cleartextMessage: string }): Promise<object>;
  verify(options: { message: object; verificationKeys: Key[]; date: Date }): Promise<{
    readonly data: string;
    readonly signatures: readonly {
      readonly keyID: { toHex(): string };
      readonly verified: Promise<true>;
    }[];
  }>;
}

/** What {@linkcode verifyClearsigned} checks. */
export interface ClearsignedOptions {
  /** What the message is, for errors, such as its address. */
  readonly name: string;
  /** Path of a keyring, binary or armored. */
  readonly keyring: string;
  /** The time to check at; now unless told. */
  readonly date?: Date;
}

/**
 * Checks a clearsigned message: at least one signature must be a good one by a key of the keyring.
 *
 * @param message The message
 * @param options Its name and the keyring
 * @returns The text that was signed, without anything around it
 * @throws {MachineError} If no signature is good
 */
export async function verifyClearsigned(message: string, options: ClearsignedOptions): Promise<string> {
  const { name, keyring, date = new Date() } = options;
  const library = await importNpm<OpenPgp>("openpgp", "6.3.2");
  const keys = await readKeyring(library, keyring);
  let result: Awaited<ReturnType<OpenPgp["verify"]>>;
  try {
    const parsed = await library.readCleartextMessage({ cleartextMessage: message });
    result = await library.verify({ message: parsed, verificationKeys: keys, date });
  } catch (cause) {
    throw new MachineError(
      `Cannot trust "${name}" as it is no OpenPGP clearsigned message (${
        text(cause)
      }): check the mirror's address`,
      { cause },
    );
  }
  const reasons: string[] = [];
  // Each is awaited, also after a good one: none may be rejected unheard.
  const verdicts = await Promise.allSettled(result.signatures.map((each) => each.verified));
  for (const [index, verdict] of verdicts.entries()) {
    if (verdict.status === "fulfilled") return result.data;
    reasons.push(`key ${result.signatures[index]!.keyID.toHex().toUpperCase()}: ${text(verdict.reason)}`);
  }
  throw new MachineError(
    `Cannot trust "${name}" as no key of "${keyring}" has signed it as it is (${
      reasons.join("; ") || "it has no signature"
    }): use another mirror, or the keyring that belongs to it`,
  );
}

async function readKeyring(library: OpenPgp, path: string): Promise<Key[]> {
  try {
    const bytes = await Deno.readFile(path);
    // An armored keyring may have several blocks, one after the other.
    const blocks = new TextDecoder("latin1").decode(bytes)
      .match(/-----BEGIN PGP PUBLIC KEY BLOCK-----[\s\S]*?-----END PGP PUBLIC KEY BLOCK-----/g);
    if (!blocks) return await library.readKeys({ binaryKeys: bytes });
    return (await Promise.all(blocks.map((armoredKeys) => library.readKeys({ armoredKeys })))).flat();
  } catch (cause) {
    throw new MachineError(
      `Cannot read the keyring "${path}" as ${text(cause)}: give a file of OpenPGP public keys`,
      { cause },
    );
  }
}

function text(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown);
}
