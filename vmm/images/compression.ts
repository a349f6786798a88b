/**
 * Decompression without a program of the host.
 *
 * @module
 */

import { Duplex } from "node:stream";
import { createZstdDecompress } from "node:zlib";
import { importNpm } from "./npm_library.ts";

/** How something is compressed, as the name of a file ends; empty where it is not. */
export type Compression = "xz" | "gz" | "zst" | "";

/** What is used of the library `xz-decompress`, which is written in JavaScript and WebAssembly. */
interface XzLibrary {
  readonly default: {
    readonly XzReadableStream: new (input: ReadableStream<Uint8Array>) => ReadableStream<Uint8Array>;
  };
}

/**
 * Reads a part of an open file, from where it stands.
 *
 * @param file The file; it stays open
 * @param bytes How much
 * @returns Its content; an error where the file ends before
 */
export function readPart(file: Deno.FsFile, bytes: number): ReadableStream<Uint8Array<ArrayBuffer>> {
  let left = bytes;
  return new ReadableStream({
    async pull(controller) {
      if (left === 0) return controller.close();
      const buffer = new Uint8Array(Math.min(left, 1 << 16));
      const count = await file.read(buffer);
      if (count === null) throw new Error("it ends too early");
      left -= count;
      controller.enqueue(buffer.subarray(0, count));
    },
  }, { highWaterMark: 0 });
}

/**
 * Decompresses a stream.
 *
 * @param input What is compressed
 * @param compression How
 * @returns The content, in pieces; an error where it is damaged or cut
 */
export async function* decompress(
  input: ReadableStream<Uint8Array<ArrayBuffer>>,
  compression: Compression,
): AsyncGenerator<Uint8Array> {
  const content = await decoder(input, compression);
  try {
    yield* content;
  } catch (cause) {
    throw new Error("its content is damaged or cut", { cause });
  }
}

async function decoder(
  input: ReadableStream<Uint8Array<ArrayBuffer>>,
  compression: Compression,
): Promise<ReadableStream<Uint8Array>> {
  switch (compression) {
    case "":
      return input;
    case "gz":
      return input.pipeThrough(new DecompressionStream("gzip"));
    case "zst":
      return input.pipeThrough(
        Duplex.toWeb(createZstdDecompress()) as unknown as TransformStream<Uint8Array, Uint8Array>,
      );
    case "xz": {
      const { default: { XzReadableStream } } = await importNpm<XzLibrary>("xz-decompress", "0.2.3");
      return new XzReadableStream(input);
    }
  }
}
