/** Stock kernels by their other entries. Run where `/dev/kvm` runs them: in the lab, or on such a host. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { LabKit, MARK } from "../../bench/lab_machine.ts";

const PT_NOTE = 4;
const XEN_ELFNOTE_PHYS32_ENTRY = 18;

/** Takes the ELF file out of a bzImage (Linux 6.1 `Documentation/x86/boot.rst`, `payload_offset`). */
async function unpackKernel(path: string): Promise<Uint8Array<ArrayBuffer>> {
  const image = await Deno.readFile(path);
  const view = new DataView(image.buffer);
  const start = ((image[0x1f1] || 4) + 1) * 512 + view.getUint32(0x248, true);
  const child = new Deno.Command("xz", { args: ["-dc"], stdin: "piped", stdout: "piped" }).spawn();
  const writer = child.stdin.getWriter();
  // After the stream is the size of what it holds.
  const payload = image.subarray(start, start + view.getUint32(0x24c, true) - 4);
  const [{ success, stdout }] = await Promise.all([
    child.output(),
    writer.write(payload).then(() => writer.close()),
  ]);
  assert(success, "the kernel is not packed by xz");
  return stdout;
}

/** Blots out the note that tells of the PVH entry. */
function hidePvh(kernel: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  const copy = kernel.slice();
  const view = new DataView(copy.buffer);
  const headers = Number(view.getBigUint64(32, true));
  let hidden = 0;
  for (let index = 0; index < view.getUint16(56, true); index++) {
    const header = headers + 56 * index;
    if (view.getUint32(header, true) !== PT_NOTE) continue;
    let at = Number(view.getBigUint64(header + 8, true));
    const end = at + Number(view.getBigUint64(header + 32, true));
    while (at < end) {
      const [name, size] = [view.getUint32(at, true) + 3 & ~3, view.getUint32(at + 4, true) + 3 & ~3];
      if (view.getUint32(at + 8, true) === XEN_ELFNOTE_PHYS32_ENTRY) {
        view.setUint32(at + 8, 0x7fff_ffff, true);
        hidden++;
      }
      at += 12 + name + size;
    }
  }
  assert.equal(hidden, 1);
  return copy;
}

Deno.test("an ELF kernel of Debian's boots by PVH, and by its 64-bit entry without the note of that", async () => {
  await using kit = await LabKit.prepare(
    "kernels",
    "echo loader $(cat /proc/sys/kernel/bootloader_type) of $(nproc)",
    "generic",
  );
  assert(kit, "/dev/kvm runs no kernels here");
  const kernel = await unpackKernel(kit.kernel);
  const loader = async (name: string, bytes: Uint8Array<ArrayBuffer>): Promise<string> => {
    const path = join(kit.folder, name);
    await Deno.writeFile(path, bytes);
    await using machine = kit.startOurs({ cpus: 2, memory: 256, kernel: path });
    await machine.printed(MARK);
    return (await machine.printed(/^loader (.*?)\r?$/m)).value[1]!;
  };
  // What PVH's entry says is its loader (Linux 6.1 `arch/x86/platform/pvh/enlighten.c`), and one without a number.
  assert.equal(await loader("pvh", kernel), "176 of 2");
  assert.equal(await loader("elf", hidePvh(kernel)), "255 of 2");
});
