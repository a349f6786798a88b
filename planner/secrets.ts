/**
 * Encryption of secrets at rest: AES-256-GCM, with a key that is derived from a passphrase or kept in a file.
 *
 * @module
 */

import { createCipheriv, createDecipheriv, pbkdf2Sync, randomBytes } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { PlannerError } from "./errors.ts";
import { isSecret } from "../dsl/mod.ts";
import { transform } from "./values.ts";

/** Where the key comes from. */
export interface SecretBoxOptions {
  /** Path of the key file; made with mode 0600 when a first secret is stored. */
  readonly keyFile: string;
  /** Derive the key from this instead; the file then holds only the salt. */
  readonly passphrase?: string | undefined;
}

const ITERATIONS = 600_000;

/** Encrypts and decrypts the secrets inside resolved values. */
export class SecretBox {
  readonly #options: SecretBoxOptions;
  #key: Uint8Array | undefined;

  /**
   * Reads nothing yet: the key is loaded when it is first needed.
   *
   * @param options Where the key comes from
   */
  constructor(options: SecretBoxOptions) {
    this.#options = options;
  }

  /**
   * Encrypts every secret.
   *
   * @param value Resolved value with secrets in clear
   * @returns A copy that may be stored
   */
  seal(value: unknown): unknown {
    return transform(value, (object) => {
      if ("$encrypted" in object) {
        throw new PlannerError(
          'Cannot store a value with the field "$encrypted" as that name is reserved: use another one',
        );
      }
      if (!isSecret(object)) return undefined;
      const iv = randomBytes(12);
      const cipher = createCipheriv("aes-256-gcm", this.#loadKey(true), iv);
      const body = Buffer.concat([cipher.update(JSON.stringify(object.$secret), "utf8"), cipher.final()]);
      return { value: { $encrypted: Buffer.concat([iv, cipher.getAuthTag(), body]).toString("base64") } };
    });
  }

  /**
   * Decrypts every secret.
   *
   * @param value A value that {@linkcode SecretBox.seal} made
   * @returns The value with secrets in clear, each marked
   * @throws {PlannerError} If the key is missing or not the one that encrypted it
   */
  open(value: unknown): unknown {
    return transform(value, (object) => {
      if (typeof object.$encrypted !== "string") return undefined;
      const data = Buffer.from(object.$encrypted, "base64");
      try {
        const decipher = createDecipheriv("aes-256-gcm", this.#loadKey(false), data.subarray(0, 12));
        decipher.setAuthTag(data.subarray(12, 28));
        const clear = Buffer.concat([decipher.update(data.subarray(28)), decipher.final()]).toString("utf8");
        return { value: { $secret: JSON.parse(clear) as unknown } };
      } catch (cause) {
        if (cause instanceof PlannerError) throw cause;
        throw new PlannerError(
          `Cannot decrypt a secret with the key of "${this.#options.keyFile}" as it is not the key that encrypted it: ` +
            `restore that file, or give the passphrase in HYPERTOPIA_PASSPHRASE`,
          { cause },
        );
      }
    });
  }

  #loadKey(create: boolean): Uint8Array {
    if (this.#key) return this.#key;
    const { keyFile, passphrase } = this.#options;
    let stored: Uint8Array;
    try {
      stored = Buffer.from(readFileSync(keyFile, "utf8").trim(), "base64");
    } catch (cause) {
      if (!create) {
        throw new PlannerError(
          `Cannot decrypt a secret as its key file "${keyFile}" cannot be read: restore it`,
          { cause },
        );
      }
      stored = randomBytes(32);
      mkdirSync(dirname(keyFile), { recursive: true, mode: 0o700 });
      writeFileSync(keyFile, Buffer.from(stored).toString("base64") + "\n", { mode: 0o600, flag: "wx" });
    }
    this.#key = passphrase === undefined ? stored : pbkdf2Sync(passphrase, stored, ITERATIONS, 32, "sha512");
    return this.#key;
  }
}
