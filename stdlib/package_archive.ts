/**
 * What builders need of a Debian archive, whoever reads it.
 *
 * @module
 */

import { exists } from "../vmm/files.ts";

/** Which archive to use. */
export interface ArchiveOptions {
  /** Suite, such as `bookworm`. */
  readonly suite: string;
  /** Architecture, such as `amd64`. */
  readonly arch: string;
  /** Address of a mirror; that of the system's own apt configuration unless told. */
  readonly mirror?: string | undefined;
  /** Path of a keyring that the mirror is checked against; Debian's own unless told. */
  readonly keyring?: string | undefined;
}

/** Packages of one suite and architecture. All that comes out of it has been checked against signatures. */
export interface PackageArchive {
  /**
   * Finds the newest versions of packages.
   *
   * @param names Names of packages
   * @returns Versions by name
   * @throws {MachineError} If the archive lacks one
   */
  versions(names: readonly string[]): Promise<Map<string, string>>;
  /**
   * Finds the package that a meta package stands for.
   *
   * @param name The meta package, such as `linux-image-amd64`
   * @param pattern What the wanted dependency looks like
   * @returns Name of the dependency
   * @throws {MachineError} If there is none
   */
  dependency(name: string, pattern: RegExp): Promise<string>;
  /**
   * Downloads and unpacks a package.
   *
   * @param name Name of the package
   * @param folder Folder to unpack into
   */
  unpack(name: string, folder: string): Promise<void>;
}

/** Where Debian's own keys are on hosts that have them. */
const KEYRINGS: readonly string[] = [
  "/usr/share/keyrings/debian-archive-keyring.gpg",
  "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/**
 * Finds the keyring that this host has for Debian's archive.
 *
 * @returns Its path; undefined where there is none
 */
export async function debianKeyring(): Promise<string | undefined> {
  for (const path of KEYRINGS) if (await exists(path)) return path;
  return undefined;
}

/**
 * Makes the error for packages that an archive lacks.
 *
 * @param names Names of the packages
 * @param suite The suite
 * @returns Text that says what to do
 */
export function missingPackages(names: readonly string[], suite: string): string {
  const quoted = names.map((name) => `"${name}"`).join(", ");
  return `Cannot find the package${names.length === 1 ? "" : "s"} ${quoted} in "${suite}": ` +
    `check the spelling and the suite`;
}

/**
 * Makes the error for a meta package that stands for nothing.
 *
 * @param name Name of the meta package
 * @param suite The suite
 * @returns Text that says what to do
 */
export function missingDependency(name: string, suite: string): string {
  return `Cannot find what the package "${name}" stands for in "${suite}": check the suite`;
}
