import assert from "node:assert/strict";
import { unpackDeb, type UnpackOptions } from "./deb.ts";
import { ar, compress, deb, storedXz, tar, type TestEntry } from "./test_archive.ts";

async function withFolder(work: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await work(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function unpack(folder: string, file: Uint8Array, options?: UnpackOptions): Promise<string> {
  await Deno.writeFile(`${folder}/x.deb`, file);
  await unpackDeb(`${folder}/x.deb`, `${folder}/tree`, options);
  return `${folder}/tree`;
}

Deno.test("unpackDeb() writes files, folders and links, however they are compressed", async () => {
  const long = `./usr/share/${"long/".repeat(40)}name`;
  const big = "0123456789".repeat(20_000);
  const entries: TestEntry[] = [
    { name: "./", type: "5", mode: 0o755 },
    { name: "./usr/", type: "5", mode: 0o755 },
    { name: "./usr/tool", content: "#!", mode: 0o4755 },
    { name: "./usr/empty" },
    { name: "./usr/big", content: big },
    { name: "./usr/again", type: "1", link: "./usr/big" },
    { name: "./usr/link", type: "2", link: "../../else/where" },
    { name: long, content: "long" },
    { name: "./usr/far", type: "2", link: "x".repeat(150) },
    { name: "./usr/empty", content: "second" },
  ];
  for (const compression of ["xz", "gz", "zst", ""] as const) {
    await withFolder(async (folder) => {
      const tree = await unpack(folder, deb(entries, compression));
      assert.equal(await Deno.readTextFile(`${tree}/usr/big`), big);
      assert.equal(await Deno.readTextFile(`${tree}/usr/empty`), "second");
      assert.equal(await Deno.readTextFile(`${tree}/${long}`), "long");
      assert.equal(await Deno.readLink(`${tree}/usr/link`), "../../else/where");
      assert.equal(await Deno.readLink(`${tree}/usr/far`), "x".repeat(150));
      assert.equal((await Deno.stat(`${tree}/usr/tool`)).mode! & 0o7700, 0o700);
      const [one, other] = await Promise.all(
        ["big", "again"].map((name) => Deno.stat(`${tree}/usr/${name}`)),
      );
      assert.equal(one!.ino, other!.ino);
    });
  }
});

Deno.test("unpackDeb() writes nothing outside of its folder", async () => {
  const cases: [TestEntry[], RegExp][] = [
    [[{ name: "../evil" }], /the name "\.\.\/evil" leads out of the package/],
    [[{ name: "./a/../../evil" }], /leads out/],
    [[{ name: "/tmp/evil" }], /leads out/],
    [[{ name: `./${"a/".repeat(80)}../../evil` }], /leads out/],
    [
      [{ name: "out", type: "2", link: ".." }, { name: "out/evil" }],
      /"out" is both a folder and something else/,
    ],
    [[{ name: "out", type: "2", link: ".." }, { name: "out/", type: "5" }], /"out" is both/],
    [[{ name: "out", type: "2", link: ".." }, { name: "out/evil", type: "2", link: "x" }], /"out" is both/],
    [[{ name: "a", type: "1", link: "../x.deb" }], /leads out/],
    [[{ name: "a", type: "1", link: "/etc/passwd" }], /leads out/],
    [
      [{ name: "out", type: "2", link: ".." }, { name: "a", type: "1", link: "out/x.deb" }],
      /"out" is both a folder/,
    ],
    [
      [{ name: "out", type: "2", link: "../x.deb" }, { name: "a", type: "1", link: "out" }],
      /the hard link "a" leads to no file/,
    ],
    [[{ name: "a", type: "1", link: "none" }], /leads to no file/],
    [[{ name: "a", type: "3" }], /of a kind that packages must not have/],
    [[{ name: "a", type: "x", content: "12 path=b\n" }], /content that it must not have/],
    [[{ name: "a/", type: "5" }, { name: "a" }], /"a" is both/],
    [[{ name: "." }], /without a name/],
  ];
  for (const [entries, expected] of cases) {
    await withFolder(async (folder) => {
      await assert.rejects(unpack(folder, deb(entries, "gz")), expected);
      const left = [...Deno.readDirSync(folder)].map((each) => each.name).sort();
      assert.deepEqual(left, ["tree", "x.deb"]);
    });
  }
  // A link in the place of a file is replaced, not followed.
  await withFolder(async (folder) => {
    await Deno.writeTextFile(`${folder}/victim`, "safe");
    const tree = await unpack(
      folder,
      deb([{ name: "a", type: "2", link: "../victim" }, { name: "a", content: "b" }]),
    );
    assert.equal(await Deno.readTextFile(`${tree}/a`), "b");
    assert.equal(await Deno.readTextFile(`${folder}/victim`), "safe");
  });
});

Deno.test("unpackDeb() refuses what is damaged, cut, too large or no package", async () => {
  const data = (content: Uint8Array, name = "data.tar") => ar({ [name]: content });
  const file = tar([{ name: "a", content: "b".repeat(3000) }]);
  const wrongSum = tar([{ name: "a" }]);
  wrongSum[0]!++;
  const xz = storedXz(file);
  const wrongCheck = xz.slice();
  wrongCheck[600]! ^= 1;
  const cases: [Uint8Array, RegExp][] = [
    [
      new TextEncoder().encode("<html>"),
      /^MachineError: Cannot unpack "x\.deb" as it is not a Debian package$/,
    ],
    [ar({ "debian-binary": new Uint8Array(3) }), /it has no data\.tar/],
    [data(file, "data.tar.bz2"), /compressed in an unknown way \("data\.tar\.bz2"\)/],
    [data(file.subarray(0, 1024)), /it ends too early/],
    [data(file).subarray(0, 700), /damaged or cut/],
    [data(wrongSum), /it is damaged/],
    [data(xz.subarray(0, 900), "data.tar.xz"), /damaged or cut/],
    [data(new Uint8Array(), "data.tar.xz"), /damaged or cut/],
    [data(wrongCheck, "data.tar.xz"), /damaged or cut/],
    [data(compress(file, "gz").subarray(0, 50), "data.tar.gz"), /damaged or cut/],
    [data(compress(file, "zst").subarray(0, 30), "data.tar.zst"), /damaged or cut|ends too early/],
  ];
  for (const [content, expected] of cases) {
    await withFolder((folder) => assert.rejects(unpack(folder, content), expected));
  }
  await withFolder((folder) =>
    assert.rejects(
      unpack(folder, data(compress(file, "xz"), "data.tar.xz"), { maxBytes: 2000 }),
      /more than 2000/,
    )
  );
  // A decoder that was left in the middle does not hold up the next one.
  await withFolder(async (folder) => assert.ok(await unpack(folder, data(xz, "data.tar.xz"))));
  const controller = new AbortController();
  controller.abort(new Error("stopped"));
  await withFolder((folder) =>
    assert.rejects(unpack(folder, data(file), { signal: controller.signal }), /^Error: stopped/)
  );
});
