import { cpioArchive, type CpioEntry } from "./cpio.ts";

function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

function assertEquals(actual: unknown, expected: unknown): void {
  const [a, b] = [Deno.inspect(actual, { depth: 9 }), Deno.inspect(expected, { depth: 9 })];
  if (a !== b) throw new Error(`${a} is not ${b}`);
}

interface Read {
  name: string;
  mode: number;
  links: number;
  inode: number;
  body: Uint8Array;
  device: [number, number];
}

/** Reads all archives that follow each other in the bytes, as the kernel does. */
function readArchives(bytes: Uint8Array): Read[] {
  const decoder = new TextDecoder();
  const entries: Read[] = [];
  let offset = 0;
  while (offset < bytes.length) {
    assertEquals(decoder.decode(bytes.subarray(offset, offset + 6)), "070701");
    const field = (number: number): number =>
      parseInt(decoder.decode(bytes.subarray(offset + 6 + number * 8, offset + 14 + number * 8)), 16);
    const nameLength = field(11);
    const size = field(6);
    assertEquals(bytes[offset + 110 + nameLength - 1], 0);
    const name = decoder.decode(bytes.subarray(offset + 110, offset + 110 + nameLength - 1));
    const start = (offset + 110 + nameLength + 3) & ~3;
    if (name !== "TRAILER!!!") {
      entries.push({
        name,
        inode: field(0),
        mode: field(1),
        links: field(4),
        body: bytes.slice(start, start + size),
        device: [field(9), field(10)],
      });
    }
    offset = (start + size + 3) & ~3;
  }
  assertEquals(offset, bytes.length);
  return entries;
}

Deno.test("cpioArchive makes the directories on the way once", () => {
  const content = new Uint8Array([1, 2, 3]);
  const entries = readArchives(cpioArchive([
    { path: "/a/b/c", mode: 0o644, content },
    { path: "a/b/d", mode: 0o777, link: "c" },
    { path: "e", mode: 0o700 },
    { path: "e/f", mode: 0o600, device: { type: "character", major: 5, minor: 1 } },
    { path: "./g", mode: 0o660, device: { type: "block", major: 254, minor: 0 } },
  ]));
  assertEquals(entries.map(({ name, mode }) => [name, mode.toString(8)]), [
    ["a", "40755"],
    ["a/b", "40755"],
    ["a/b/c", "100644"],
    ["a/b/d", "120777"],
    ["e", "40700"],
    ["e/f", "20600"],
    ["g", "60660"],
  ]);
  assertEquals(entries[2]?.body, content);
  assertEquals(new TextDecoder().decode(entries[3]?.body), "c");
  assertEquals(entries[5]?.device, [5, 1]);
  assertEquals(entries[6]?.device, [254, 0]);
});

Deno.test("cpioArchive keeps any name and content, also when archives follow each other", () => {
  for (let round = 0; round < 50; round++) {
    const entries: CpioEntry[] = Array.from({ length: round % 7 }, (_, number) => ({
      path: `${"ä b\n".repeat(Math.floor(Math.random() * 9))}${number}`,
      mode: Math.floor(Math.random() * 0o10000),
      content: crypto.getRandomValues(new Uint8Array(Math.floor(Math.random() * 100))),
    }));
    const half = Math.floor(entries.length / 2);
    const first = cpioArchive(entries.slice(0, half));
    const second = cpioArchive(entries.slice(half));
    assertEquals(first.length % 4, 0);
    const both = new Uint8Array([...first, ...second]);
    assertEquals(
      readArchives(both).map(({ name, mode, body }) => ({ path: name, mode: mode & 0o7777, content: body })),
      entries,
    );
  }
});

Deno.test("cpioArchive gives the same bytes for the same entries and no two the same inode", () => {
  const entries = [{ path: "a/b", mode: 0o644, content: new Uint8Array(5) }, { path: "c", mode: 0o755 }];
  assertEquals(cpioArchive(entries), cpioArchive(entries));
  const inodes = readArchives(cpioArchive(entries)).map(({ inode }) => inode);
  assertEquals(new Set(inodes).size, inodes.length);
});

Deno.test("cpioArchive refuses what it cannot write", () => {
  const content = new Uint8Array();
  const wrong: CpioEntry[] = [
    { path: "", mode: 0 },
    { path: "/", mode: 0 },
    { path: "a/../b", mode: 0 },
    { path: "a\0", mode: 0 },
    { path: "TRAILER!!!", mode: 0 },
    { path: "a", mode: 0o100644, content },
    { path: "a", mode: 0o644, content, link: "b" },
    { path: "a", mode: 0o644, link: "" },
  ];
  for (const entry of wrong) {
    let error: unknown;
    try {
      cpioArchive([entry]);
    } catch (caught) {
      error = caught;
    }
    assert(error instanceof TypeError, `${Deno.inspect(entry)} was not refused`);
  }
});

Deno.test("cpioArchive is read by cpio where that is installed", async () => {
  let process: Deno.ChildProcess;
  try {
    process = new Deno.Command("cpio", { args: ["-t", "--quiet"], stdin: "piped", stdout: "piped" }).spawn();
  } catch {
    return;
  }
  const writer = process.stdin.getWriter();
  await writer.write(cpioArchive([{ path: "a/b", mode: 0o644, content: new Uint8Array(10) }]));
  await writer.close();
  const { stdout, success } = await process.output();
  assert(success, "cpio failed");
  assertEquals(new TextDecoder().decode(stdout), "a\na/b\n");
});
