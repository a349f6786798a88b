import assert from "node:assert/strict";
import type { BuildContext } from "../vmm/images/builder.ts";
import { DebianArchive } from "./debian_archive.ts";
import type { ArchiveOptions } from "./package_archive.ts";
import { deb, join, makeKey, type TestKey, TestMirror } from "./test_archive.ts";

const key = await makeKey();
const otherKey = await makeKey();

/** A mirror, a cache and a keyring for one test. */
class Place implements AsyncDisposable {
  readonly mirror = new TestMirror();
  readonly controller = new AbortController();
  readonly progress: string[] = [];
  readonly folder: string = Deno.makeTempDirSync();

  constructor(trusted: readonly TestKey[] = [key]) {
    Deno.writeFileSync(`${this.folder}/keyring`, join(...trusted.map((each) => each.publicKey.write())));
  }

  get context(): BuildContext {
    return {
      cache: `${this.folder}/cache`,
      signal: this.controller.signal,
      report: (text) => this.progress.push(text),
    };
  }

  open(options: Partial<ArchiveOptions> = {}): Promise<DebianArchive> {
    return DebianArchive.open(this.context, {
      suite: "test",
      arch: "i386",
      mirror: `${this.mirror.url}/`,
      keyring: `${this.folder}/keyring`,
      ...options,
    });
  }

  /** Names of the files in the cache, but for those of locks. */
  cached(): string[] {
    const found: string[] = [];
    const walk = (folder: string): void => {
      for (const each of Deno.readDirSync(folder)) {
        if (each.name === "lock" || each.name === "locks") continue;
        if (each.isDirectory) walk(`${folder}/${each.name}`);
        else found.push(each.name);
      }
    };
    walk(`${this.folder}/cache`);
    return found.sort();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.mirror[Symbol.asyncDispose]();
    await Deno.remove(this.folder, { recursive: true });
  }
}

const tool = deb([{ name: "./usr/bin/tool", content: "tool".repeat(20_000), mode: 0o755 }]);
const packages = [
  { name: "meta", depends: "libc6 (>= 2) | other:any, linux-image-6.1.0-9-686 (= 6.1), initramfs-tools" },
  { name: "tool", version: "1:1.9", file: deb([]) },
  { name: "tool", version: "1:1.10", file: tool },
  { name: "tool", version: "9.0~rc1", file: deb([]) },
];

Deno.test("DebianArchive reads a mirror: versions, dependencies, files", async () => {
  for (const [compression, byHash] of [["xz", true], ["gz", false]] as const) {
    await using place = new Place();
    await place.mirror.publish(packages, key, { compression, byHash });
    const archive = await place.open();
    assert.deepEqual([...await archive.versions(["meta", "tool"])], [["meta", "1"], ["tool", "1:1.10"]]);
    assert.equal(await archive.dependency("meta", /^linux-image-\d/), "linux-image-6.1.0-9-686");
    assert.equal(await archive.dependency("meta", /^other/), "other");
    await archive.unpack("tool", `${place.folder}/tree`);
    assert.equal(await Deno.readTextFile(`${place.folder}/tree/usr/bin/tool`), "tool".repeat(20_000));
    assert.deepEqual(place.cached(), ["InRelease", "Packages"]);
    await assert.rejects(archive.versions(["tool", "no"]), /Cannot find the package "no" in "test": check/);
    await assert.rejects(archive.unpack("too", "/none"), /Cannot find the package "too" in "test"/);
    await assert.rejects(archive.dependency("meta", /^x/), /what the package "meta" stands for in "test"/);
    await assert.rejects(archive.dependency("tool", /^x/), /what the package "tool" stands for/);

    // Fresh lists are not read again, but damaged ones are.
    place.mirror.requests.length = 0;
    await place.open();
    assert.deepEqual(place.mirror.requests, []);
    const [folder] = Deno.readDirSync(`${place.folder}/cache/archives`);
    await Deno.writeTextFile(`${place.folder}/cache/archives/${folder!.name}/Packages`, "changed");
    await Deno.writeTextFile(`${place.folder}/cache/archives/${folder!.name}/InRelease`, "changed");
    assert.deepEqual([...await (await place.open()).versions(["tool"])], [["tool", "1:1.10"]]);
    assert.equal(place.mirror.requests[0], "dists/test/InRelease");
  }
});

Deno.test("DebianArchive reads keyrings that are armored or have several keys", async () => {
  await using place = new Place([otherKey, key]);
  await place.mirror.publish(packages, key);
  await place.open();
  await Deno.writeTextFile(
    `${place.folder}/armored`,
    `Keys:\n${otherKey.publicKey.armor()}\n${key.publicKey.armor()}`,
  );
  await Deno.remove(place.context.cache, { recursive: true });
  await place.open({ keyring: `${place.folder}/armored` });
  await Deno.writeTextFile(`${place.folder}/armored`, "no key");
  await assert.rejects(
    place.open({ keyring: `${place.folder}/armored` }),
    /Cannot read the keyring "\S+armored" as/,
  );
  await assert.rejects(place.open({ keyring: "/none" }), /Cannot read the keyring "\/none" as No such file/);
});

Deno.test("DebianArchive refuses releases that it cannot trust, and keeps nothing of them", async () => {
  const edit = (place: Place, change: (text: string) => string): void => {
    const path = "dists/test/InRelease";
    const text = new TextDecoder().decode(place.mirror.files.get(path));
    assert.notEqual(change(text), text);
    place.mirror.files.set(path, join(change(text)));
  };
  const past = new Date(Date.now() - 60_000).toUTCString();
  const future = new Date(Date.now() + 3_600_000).toUTCString();
  const cases: [(place: Place) => Promise<void> | void, RegExp][] = [
    [
      (place) => edit(place, (text) => text.replace("Suite: stable", "Suite: stabel")),
      /Signed digest did not match/,
    ],
    [
      (place) => edit(place, (text) => text.replace(/-----BEGIN PGP SIGNATURE[\s\S]*/, "")),
      /no OpenPGP clearsigned message/,
    ],
    [(place) => edit(place, (text) => text.slice(0, 300)), /no OpenPGP clearsigned message/],
    [(place) => edit(place, () => "<html>welcome</html>"), /no OpenPGP clearsigned message/],
    [
      (place) => place.mirror.publish(packages, otherKey),
      /no key of "\S+keyring" has signed it as it is \(key [0-9A-F]{16}/,
    ],
    [
      (place) => place.mirror.publish(packages, key, { fields: { "Valid-Until": past } }),
      /it was valid until .* only/,
    ],
    [
      (place) => place.mirror.publish(packages, key, { fields: { "Valid-Until": "?" } }),
      /it was valid until \? only/,
    ],
    [
      (place) => place.mirror.publish(packages, key, { fields: { Date: future } }),
      /date ".*" is in the future/,
    ],
    [(place) => place.mirror.publish(packages, key, { fields: { Date: "" } }), /is in the future or no date/],
    [
      (place) => place.mirror.publish(packages, key, { fields: { Codename: "tset" } }),
      /it is the release of "stable" alias "tset"/,
    ],
    [
      (place) => place.mirror.publish(packages, key, { fields: { Architectures: "amd64" } }),
      /no packages for i386/,
    ],
    [
      (place) => place.mirror.publish(packages, key, { fields: { SHA256: "" } }),
      /has no "main\/binary-i386\/Packages\.xz"/,
    ],
    [(place) => void place.mirror.files.delete("dists/test/InRelease"), /the server answered 404/],
  ];
  for (const [change, expected] of cases) {
    await using place = new Place();
    await place.mirror.publish(packages, key);
    await change(place);
    await assert.rejects(place.open(), expected);
    assert.deepEqual(place.cached(), []);
  }
});

Deno.test("DebianArchive trusts only what is signed, not what stands around it", async () => {
  await using place = new Place();
  await place.mirror.publish(packages, key);
  const path = "dists/test/InRelease";
  const signed = new TextDecoder().decode(place.mirror.files.get(path));
  place.mirror.files.set(path, join(`Codename: other\n\n${signed}\nCodename: other\n`));
  await assert.rejects(place.open({ suite: "other" }), /404/);
  place.mirror.files.set("dists/other/InRelease", place.mirror.files.get(path)!);
  await assert.rejects(place.open({ suite: "other" }), /Cannot (use|trust) "\S+dists\/other\/InRelease" as/);
  assert.deepEqual(place.cached(), []);
});

Deno.test("DebianArchive refuses lists and packages other than the signed ones, and keeps nothing of them", async () => {
  const find = (place: Place, pattern: RegExp): string =>
    [...place.mirror.files.keys()].find((each) => pattern.test(each))!;
  const change = (place: Place, pattern: RegExp, edit: (content: Uint8Array) => Uint8Array): void => {
    const path = find(place, pattern);
    place.mirror.files.set(path, join(edit(place.mirror.files.get(path)!)));
  };
  const flip = (content: Uint8Array) => content.map((byte, at) => at === 40 ? byte ^ 1 : byte);
  const edits: [(content: Uint8Array) => Uint8Array, RegExp][] = [
    [flip, /Cannot use "http\S+" as its checksum is wrong: [0-9a-f]{64} is wanted and/],
    [(content) => content.subarray(0, 100), /Cannot use "http\S+" as it has 100 bytes of \d+: try again/],
    [(content) => join(content, "x"), /Cannot use "http\S+" as it has more bytes of \d+/],
    [() => new Uint8Array(), /Cannot use "http\S+" as it has 0 bytes of \d+/],
  ];
  for (const [edit, expected] of edits) {
    await using place = new Place();
    await place.mirror.publish(packages, key, { byHash: false });
    change(place, /Packages\.xz$/, edit);
    await assert.rejects(place.open(), expected);
    assert.deepEqual(place.cached(), []);
  }
  for (const [edit, expected] of edits) {
    await using place = new Place();
    await place.mirror.publish(packages, key);
    change(place, /1\.10_i386\.deb$/, edit);
    const archive = await place.open();
    await assert.rejects(archive.unpack("tool", `${place.folder}/tree`), expected);
    assert.deepEqual(place.cached(), ["Packages"]);
    await assert.rejects(Deno.stat(`${place.folder}/tree`), Deno.errors.NotFound);
    // A mirror that has been repaired is read again at once.
    await place.mirror.publish(packages, key);
    await (await place.open()).unpack("tool", `${place.folder}/tree`);
  }
  // Signed, but not what a package may have.
  await using place = new Place();
  await place.mirror.publish([{ name: "tool", file: deb([{ name: "../evil" }]) }], key);
  const archive = await place.open();
  await assert.rejects(archive.unpack("tool", `${place.folder}/tree`), /leads out of the package/);
  assert.deepEqual(place.cached(), ["InRelease", "Packages"]);
  await assert.rejects(Deno.stat(`${place.folder}/evil`), Deno.errors.NotFound);
});

Deno.test("DebianArchive continues a download that was cut", async () => {
  await using place = new Place();
  await place.mirror.publish(packages, key);
  const path = [...place.mirror.files.keys()].find((each) => each.endsWith("1.10_i386.deb"))!;
  // The server promises all that is left, and closes the connection after a piece.
  const cut = (start: number): Response =>
    new Response(new Blob([tool.subarray(start, start + 20_000)]).stream(), {
      status: start > 0 ? 206 : 200,
      headers: {
        "content-length": String(tool.length - start),
        "content-range": `bytes ${start}-${tool.length - 1}/${tool.length}`,
      },
    });
  const archive = await place.open();
  place.mirror.requests.length = 0;
  place.mirror.intercept = (asked, range) =>
    asked === path ? cut(Number(/\d+/.exec(range ?? "")?.[0] ?? 0)) : undefined;
  await assert.rejects(
    archive.unpack("tool", `${place.folder}/tree`),
    /Cannot download "http\S+" as .*: what has arrived is kept, run the command again to continue/,
  );
  place.mirror.intercept = () => undefined;
  await (await place.open()).unpack("tool", `${place.folder}/tree`);
  assert.equal((await Deno.stat(`${place.folder}/tree/usr/bin/tool`)).size, 80_000);
  const asked = place.mirror.requests.filter((each) => each.startsWith(path)).map((each) =>
    each.slice(path.length)
  );
  assert.deepEqual(asked, ["", " bytes=20000-", " bytes=40000-", " bytes=60000-"]);
  assert.deepEqual(place.cached(), ["InRelease", "Packages"]);

  // A server that continues elsewhere is asked for the whole file.
  await Deno.remove(`${place.folder}/tree`, { recursive: true });
  let count = 0;
  place.mirror.intercept = (asked, range) => {
    if (asked !== path) return undefined;
    if (count++ === 0) return cut(0);
    return range === null ? undefined : new Response(tool, {
      status: 206,
      headers: { "content-range": `bytes 0-${tool.length - 1}/${tool.length}` },
    });
  };
  await (await place.open()).unpack("tool", `${place.folder}/tree`);
  assert.equal(count, 3);
});

Deno.test("DebianArchive stops when told", async () => {
  await using place = new Place();
  await place.mirror.publish(packages, key);
  const archive = await place.open();
  place.mirror.intercept = () => {
    place.controller.abort(new Error("stopped"));
    return undefined;
  };
  await assert.rejects(archive.unpack("tool", `${place.folder}/tree`), /^Error: stopped/);
  await assert.rejects(place.open({ suite: "another" }), /^Error: stopped/);
});

Deno.test("DebianArchive says what it lacks", async () => {
  await using place = new Place();
  await assert.rejects(
    place.open({ mirror: undefined }),
    /^MachineError: Cannot get Debian packages as this host has no apt-get: give debian\(\{ mirror: "http:\/\/\.\.\." \}\)$/,
  );
  await assert.rejects(
    place.open({ mirror: "file:/srv/mirror" }),
    /give one that begins with http:\/\/ or https:\/\//,
  );
  await assert.rejects(
    place.open({ mirror: "http://127.0.0.1:1" }),
    /Cannot read "http:\/\/127\.0\.0\.1:1\/dists\/test\/InRelease" as .*: check the mirror's address/s,
  );
});
