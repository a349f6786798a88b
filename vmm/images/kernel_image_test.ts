import assert from "node:assert/strict";
import { join } from "node:path";
import { gzipSync, zstdCompressSync } from "node:zlib";
import { MachineError } from "../errors.ts";
import type { BuildContext } from "./builder.ts";
import { unpackKernel } from "./kernel_image.ts";

/** Packs as LZ4's legacy format does, with literals only. */
function lz4(content: Uint8Array): Uint8Array<ArrayBuffer> {
  const extra = content.length - 15;
  const block = [0xf0, ...Array<number>(Math.floor(extra / 255)).fill(255), extra % 255, ...content];
  const size = new Uint8Array(Uint32Array.of(block.length).buffer);
  return Uint8Array.of(0x02, 0x21, 0x4c, 0x18, ...size, ...block);
}

/** Makes an ELF file of one segment. */
function elf(isWide = true, change?: (view: DataView) => void): Uint8Array<ArrayBuffer> {
  const view = new DataView(new ArrayBuffer(512));
  view.setUint32(0, 0x7f45_4c46);
  view.setUint8(4, isWide ? 2 : 1);
  view.setUint8(5, 1);
  view.setUint16(16, 2, true);
  view.setUint16(18, isWide ? 62 : 3, true);
  view.setUint32(isWide ? 32 : 28, 64, true);
  view.setUint16(isWide ? 54 : 42, isWide ? 56 : 32, true);
  view.setUint16(isWide ? 56 : 44, 1, true);
  view.setUint32(64, 1, true);
  view.setUint32(64 + (isWide ? 8 : 4), 128, true);
  view.setUint32(64 + (isWide ? 32 : 16), 384, true);
  for (let at = 128; at < 512; at++) view.setUint8(at, at * 7);
  change?.(view);
  return new Uint8Array(view.buffer);
}

interface ImageOptions {
  readonly size?: number;
  readonly version?: number;
  readonly payloadLength?: number;
}

/** Makes a bzImage. */
function bzImage(packed: Uint8Array, size: number, options: ImageOptions = {}): Uint8Array<ArrayBuffer> {
  const isGzip = packed[0] === 0x1f;
  const payload = Uint8Array.of(...packed, ...(isGzip ? [] : new Uint8Array(Uint32Array.of(size).buffer)));
  const image = new Uint8Array(512 * 3 + 100 + payload.length + 50);
  const view = new DataView(image.buffer);
  view.setUint8(0x1f1, 2);
  view.setUint16(0x1fe, 0xaa55, true);
  view.setUint32(0x202, 0x5372_6448, true);
  view.setUint16(0x206, options.version ?? 0x20f, true);
  view.setUint32(0x248, 100, true);
  view.setUint32(0x24c, options.payloadLength ?? payload.length, true);
  image.set(payload, 512 * 3 + 100);
  return image;
}

/** A cache, and a kernel to unpack. */
class Place implements AsyncDisposable {
  readonly reports: string[] = [];
  readonly context: BuildContext;

  private constructor(readonly folder: string) {
    this.context = {
      cache: join(folder, "cache"),
      signal: new AbortController().signal,
      report: (progress) => void this.reports.push(progress),
    };
  }

  static async make(): Promise<Place> {
    return new Place(await Deno.makeTempDir());
  }

  get kernel(): string {
    return join(this.folder, "vmlinuz");
  }

  async unpack(image: Uint8Array): Promise<string> {
    await Deno.writeFile(this.kernel, image);
    return await unpackKernel(this.kernel, this.context);
  }

  async refuses(image: Uint8Array, message: RegExp): Promise<void> {
    await assert.rejects(this.unpack(image), (error: Error) => {
      assert.ok(error instanceof MachineError);
      assert.match(error.message, message);
      return true;
    });
    // Nothing of it stays.
    for await (const entry of Deno.readDir(join(this.context.cache, "vmlinux"))) assert.fail(entry.name);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

Deno.test("unpackKernel() unpacks each method once, for 64 bits and for 32", async () => {
  await using place = await Place.make();
  for (const isWide of [true, false]) {
    const content = elf(isWide);
    for (const pack of [gzipSync, zstdCompressSync, lz4]) {
      const image = bzImage(pack(content), content.length);
      const path = await place.unpack(image);
      assert.deepEqual(await Deno.readFile(path), content);
      assert.equal(place.reports.splice(0).length, 1);
      assert.equal(await unpackKernel(place.kernel, place.context), path);
      assert.equal(place.reports.length, 0);
    }
  }
});

Deno.test("unpackKernel() gives an ELF file back as it is", async () => {
  await using place = await Place.make();
  assert.equal(await place.unpack(elf()), place.kernel);
});

Deno.test("unpackKernel() refuses what is no kernel or not whole, and leaves nothing", async () => {
  await using place = await Place.make();
  await Deno.mkdir(join(place.context.cache, "vmlinux"), { recursive: true });
  const content = elf();
  const packed = gzipSync(content);
  const image = bzImage(packed, 512);
  await place.refuses(new Uint8Array(0), /neither a bzImage nor an ELF file/);
  await place.refuses(new Uint8Array(4096), /neither a bzImage nor an ELF file/);
  await place.refuses(bzImage(packed, 512, { version: 0x207 }), /does not tell where/);
  await place.refuses(image.subarray(0, image.length - 60), /cut short/);
  await place.refuses(bzImage(packed, 512, { payloadLength: 0xffff_ffff }), /cut short/);
  await place.refuses(bzImage(packed, 512, { payloadLength: 0 }), /cut short/);
  await place.refuses(bzImage(Uint8Array.of(0x42, 0x5a, 1, 2, 3), 512), /begins with 425a0102, is packed by/);
  for (const pack of [zstdCompressSync, lz4]) {
    await place.refuses(bzImage(pack(content), 511), /another size/);
    await place.refuses(bzImage(pack(content), 513), /another size/);
    await place.refuses(bzImage(pack(content), 2 ** 29 + 1), /larger than 512 MiB unpacked/);
    await place.refuses(bzImage(pack(content).subarray(0, -20), 512), /damaged or cut|another size/);
  }
  const damaged = packed.slice();
  damaged[30]! ^= 0xff;
  await place.refuses(bzImage(damaged, 512), /damaged or cut/);
  await Deno.remove(place.kernel);
  await assert.rejects(
    unpackKernel(place.kernel, place.context),
    /Cannot unpack the kernel .* as No such file/,
  );
});

Deno.test("unpackKernel() refuses ELF files that cannot be a kernel, packed or not", async () => {
  await using place = await Place.make();
  await Deno.mkdir(join(place.context.cache, "vmlinux"), { recursive: true });
  const changes: ((view: DataView) => void)[] = [
    (view) => view.setUint8(4, 3),
    (view) => view.setUint8(5, 2),
    (view) => view.setUint16(18, 40, true),
    (view) => view.setUint32(32, 500, true),
    (view) => view.setBigUint64(32, 2n ** 64n - 1n, true),
    (view) => view.setUint16(54, 0, true),
    (view) => view.setUint16(56, 0, true),
    (view) => view.setUint16(56, 0xffff, true),
    (view) => view.setUint32(64, 2, true),
    (view) => view.setUint32(72, 129, true),
    (view) => view.setBigUint64(96, 2n ** 63n, true),
  ];
  for (const change of changes) {
    const bad = elf(true, change);
    await place.refuses(bad, /not that of a kernel for x86/);
    await place.refuses(bzImage(gzipSync(bad), 512), /not that of a kernel for x86/);
  }
  await place.refuses(elf().subarray(0, 40), /not that of a kernel for x86/);
  const text = new TextEncoder().encode("no program at all, but long enough to be one ".repeat(3));
  await place.refuses(bzImage(gzipSync(text), text.length), /not that of a kernel for x86/);
});
