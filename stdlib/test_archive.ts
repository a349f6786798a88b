/**
 * Makes Debian packages, and a mirror of them on this host, for tests.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { crc32, gzipSync, zstdCompressSync } from "node:zlib";
import type { Compression } from "../vmm/images/compression.ts";
import { importNpm } from "../vmm/images/npm_library.ts";

/** One entry of a tar archive. */
export interface TestEntry {
  /** Name, such as `./usr/bin/tool`. */
  readonly name: string;
  /** Type flag; `"0"`, a file, unless told. */
  readonly type?: string;
  /** Content of a file. */
  readonly content?: string;
  /** Where a link leads. */
  readonly link?: string;
  /** Permission bits; 0o644 unless told. */
  readonly mode?: number;
}

const encoder = new TextEncoder();

/** Joins pieces. */
export function join(...parts: readonly (Uint8Array | string)[]): Uint8Array<ArrayBuffer> {
  const bytes = parts.map((each) => typeof each === "string" ? encoder.encode(each) : each);
  const result = new Uint8Array(bytes.reduce((sum, each) => sum + each.length, 0));
  let at = 0;
  for (const each of bytes) {
    result.set(each, at);
    at += each.length;
  }
  return result;
}

/** Makes a tar archive in GNU's format. */
export function tar(entries: readonly TestEntry[]): Uint8Array<ArrayBuffer> {
  const record = (name: string, type: string, content: Uint8Array, link = "", mode = 0o644) => {
    const header = new Uint8Array(512);
    const put = (at: number, text: string) => header.set(encoder.encode(text), at);
    put(0, name);
    put(100, mode.toString(8).padStart(7, "0"));
    put(124, content.length.toString(8).padStart(11, "0"));
    put(148, " ".repeat(8));
    put(156, type);
    put(157, link);
    put(257, "ustar  ");
    put(148, `${header.reduce((sum, byte) => sum + byte, 0).toString(8).padStart(6, "0")}\0 `);
    return join(header, content, new Uint8Array((512 - content.length % 512) % 512));
  };
  return join(
    ...entries.flatMap(({ name, type = "0", content = "", link = "", mode = 0o644 }) => [
      ...(name.length > 100 ? [record("././@LongLink", "L", encoder.encode(`${name}\0`))] : []),
      ...(link.length > 100 ? [record("././@LongLink", "K", encoder.encode(`${link}\0`))] : []),
      record(name.slice(0, 100), type, encoder.encode(content), link.slice(0, 100), mode),
    ]),
    new Uint8Array(1024),
  );
}

/** Makes an xz file whose content is stored as it is. */
export function storedXz(content: Uint8Array): Uint8Array<ArrayBuffer> {
  const u32 = (value: number) => new Uint8Array(new Uint32Array([value]).buffer);
  const withCrc = (bytes: Uint8Array) => join(bytes, u32(crc32(bytes)));
  const varint = (value: number): number[] =>
    value < 128 ? [value] : [value % 128 | 128, ...varint(Math.floor(value / 128))];
  const aligned = (bytes: Uint8Array) => join(bytes, new Uint8Array((4 - bytes.length % 4) % 4));
  // CRC32 as the check; one block with LZMA2 and a dictionary of 1 MiB.
  const flags = Uint8Array.of(0, 1);
  const blockHeader = withCrc(Uint8Array.of(2, 0, 0x21, 1, 16, 0, 0, 0));
  const chunks: Uint8Array[] = [];
  for (let at = 0; at < content.length; at += 1 << 16) {
    const piece = content.subarray(at, at + (1 << 16));
    chunks.push(Uint8Array.of(at === 0 ? 1 : 2, (piece.length - 1) >> 8, (piece.length - 1) & 255), piece);
  }
  const data = join(...chunks, Uint8Array.of(0));
  const index = withCrc(
    aligned(Uint8Array.of(0, 1, ...varint(blockHeader.length + data.length + 4), ...varint(content.length))),
  );
  return join(
    Uint8Array.of(0xfd, 0x37, 0x7a, 0x58, 0x5a, 0),
    withCrc(flags),
    blockHeader,
    aligned(data),
    u32(crc32(content)),
    index,
    u32(crc32(join(u32(index.length / 4 - 1), flags))),
    u32(index.length / 4 - 1),
    flags,
    "YZ",
  );
}

/** Compresses. */
export function compress(content: Uint8Array, compression: Compression): Uint8Array<ArrayBuffer> {
  switch (compression) {
    case "":
      return join(content);
    case "gz":
      return join(gzipSync(content));
    case "zst":
      return join(zstdCompressSync(content));
    case "xz":
      return storedXz(content);
  }
}

/** Makes an `ar` archive. */
export function ar(members: Readonly<Record<string, Uint8Array>>): Uint8Array<ArrayBuffer> {
  return join(
    "!<arch>\n",
    ...Object.entries(members).flatMap(([name, content]) => [
      `${name.padEnd(16)}${"0".padEnd(12)}${"0".padEnd(6)}${"0".padEnd(6)}${"100644".padEnd(8)}`,
      `${String(content.length).padEnd(10)}\`\n`,
      content,
      "\n".repeat(content.length % 2),
    ]),
  );
}

/** Makes a package. */
export function deb(entries: readonly TestEntry[], compression: Compression = "xz"): Uint8Array<ArrayBuffer> {
  return ar({
    "debian-binary": encoder.encode("2.0\n"),
    "control.tar": tar([{ name: "./control", content: "Package: test\n" }]),
    [`data.tar${compression && `.${compression}`}`]: compress(tar(entries), compression),
  });
}

/** A pair of OpenPGP keys. */
export interface TestKey {
  /** Signs. */
  readonly privateKey: object;
  /** Checks. */
  readonly publicKey: { write(): Uint8Array; armor(): string };
}

/** What is used of the library to sign. */
interface Signer {
  generateKey(options: { userIDs: readonly { name: string }[]; format: "object" }): Promise<TestKey>;
  createCleartextMessage(options: { text: string }): Promise<object>;
  sign(options: { message: object; signingKeys: object }): Promise<string>;
}

/** Makes a pair of keys. */
export async function makeKey(): Promise<TestKey> {
  const { generateKey } = await importNpm<Signer>("openpgp", "6.3.2");
  return await generateKey({ userIDs: [{ name: "Test" }], format: "object" });
}

/** A package of a mirror. */
export interface TestPackage {
  /** Name. */
  readonly name: string;
  /** Version; `"1"` unless told. */
  readonly version?: string;
  /** The `Depends` field. */
  readonly depends?: string;
  /** The `.deb` file; an empty package unless told. */
  readonly file?: Uint8Array<ArrayBuffer>;
}

/** A mirror on this host, with the suite `test` for i386. */
export class TestMirror implements AsyncDisposable {
  /** What it serves, by path. */
  readonly files: Map<string, Uint8Array<ArrayBuffer>> = new Map();
  /** What was asked of it: path, and the range where there was one. */
  readonly requests: string[] = [];
  /** Answers in place of the files where it returns something. */
  intercept: (path: string, range: string | null) => Response | undefined = () => undefined;
  readonly #server: Deno.HttpServer<Deno.NetAddr>;

  constructor() {
    this.#server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, (request) => {
      const path = new URL(request.url).pathname.slice(1);
      const range = request.headers.get("range");
      this.requests.push(range === null ? path : `${path} ${range}`);
      const answer = this.intercept(path, range);
      if (answer) return answer;
      const content = this.files.get(path);
      if (!content) return new Response("", { status: 404 });
      const start = Number(/^bytes=(\d+)-$/.exec(range ?? "")?.[1] ?? 0);
      return new Response(content.subarray(start), {
        status: range === null ? 200 : 206,
        headers: range === null
          ? {}
          : { "content-range": `bytes ${start}-${content.length - 1}/${content.length}` },
      });
    });
  }

  /** Its address. */
  get url(): string {
    return `http://127.0.0.1:${this.#server.addr.port}`;
  }

  /**
   * Publishes packages.
   *
   * @param packages The packages
   * @param key Signs the release
   * @param options Fields of the release in place of the usual, and how the list is compressed
   */
  async publish(
    packages: readonly TestPackage[],
    key: TestKey,
    options: {
      readonly fields?: Readonly<Record<string, string>>;
      readonly compression?: "xz" | "gz";
      readonly byHash?: boolean;
    } = {},
  ): Promise<void> {
    const { compression = "xz", byHash = true } = options;
    const stanzas = packages.map(({ name, version = "1", depends, file = deb([]) }) => {
      const path = `pool/${name}_${version}_i386.deb`;
      this.files.set(path, file);
      return `Package: ${name}\nVersion: ${version}\n${
        depends === undefined ? "" : `Depends: ${depends}\n`
      }` +
        `Description: a package\n for tests\nFilename: ${path}\nSize: ${file.length}\nSHA256: ${
          digest(file)
        }\n`;
    });
    const list = encoder.encode(stanzas.join("\n"));
    const packed = compress(list, compression);
    const folder = "main/binary-i386";
    this.files.set(
      `dists/test/${folder}/${byHash ? `by-hash/SHA256/${digest(packed)}` : `Packages.${compression}`}`,
      packed,
    );
    const fields = {
      Suite: "stable",
      Codename: "test",
      Date: new Date().toUTCString(),
      "Valid-Until": new Date(Date.now() + 86_400_000).toUTCString(),
      "Acquire-By-Hash": "yes",
      Architectures: "all i386",
      SHA256: `\n ${digest(list)} ${list.length} ${folder}/Packages` +
        `\n ${digest(packed)} ${packed.length} ${folder}/Packages.${compression}`,
      ...options.fields,
    };
    const { createCleartextMessage, sign } = await importNpm<Signer>("openpgp", "6.3.2");
    const text = Object.entries(fields).map(([name, value]) => `${name}: ${value}\n`).join("");
    const message = await createCleartextMessage({ text });
    this.files.set(
      "dists/test/InRelease",
      join(await sign({ message, signingKeys: key.privateKey })),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server.shutdown();
  }
}

/** Digests. */
export function digest(content: Uint8Array): string {
  return createHash("sha256").update(content).digest("hex");
}
