import assert from "node:assert/strict";
import { FakeXenstore } from "./fake_xenstore.ts";
import { Xenstore, XenstoreError, XenstoreReader, type XenstoreView, XS } from "./xenstore.ts";

Deno.test("entries are written, read, listed and removed", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  await xenstore.write("/a/b/c", "größer=1\0 2");
  await xenstore.make("/a/d");
  await xenstore.make("/a/b/c");
  assert.deepEqual(fake.tree, { "/a": "", "/a/b": "", "/a/b/c": "größer=1\0 2", "/a/d": "" });
  assert.equal(await xenstore.read("/a/b/c"), "größer=1\0 2");
  assert.equal(await xenstore.read("/a"), "");
  assert.equal(await xenstore.read("/absent"), undefined);
  assert.deepEqual(await xenstore.list("/a"), ["b", "d"]);
  assert.deepEqual(await xenstore.list("/a/d"), []);
  assert.deepEqual(await xenstore.list("/absent"), []);
  await xenstore.remove("/a/b");
  await xenstore.remove("/a/b");
  await xenstore.remove("/absent/below");
  assert.deepEqual(fake.tree, { "/a": "", "/a/d": "" });
  assert.equal(xenstore.requests, 12);
  assert.equal(fake.requests, 12);
});

Deno.test("permissions are set, and passed on to what is made below", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  await xenstore.make("/a");
  await xenstore.setPermissions("/a", ["n0", "r5"]);
  await xenstore.write("/a/b", "");
  assert.deepEqual(await xenstore.permissions("/a/b"), ["n0", "r5"]);
  await assert.rejects(xenstore.setPermissions("/a", ["x5"]), TypeError);
  await assert.rejects(xenstore.permissions("/absent"), {
    name: "XenstoreError",
    request: "GET_PERMS",
    path: "/absent",
    code: "ENOENT",
    message: 'Cannot read the permissions of "/absent" in xenstore as there is no such entry (ENOENT)',
  });
});

Deno.test("directories of any size are listed", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const names = Array.from({ length: 1500 }, (_, index) => `entry-${index}`);
  for (const name of names) fake.write(`/big/${name}`, "");
  assert.deepEqual(await xenstore.list("/big"), names);
  assert.equal(fake.log.filter((line) => line === "DIRECTORY_PART /big").length, 4);
});

Deno.test("requests of one caller are sent in order and not one by one", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const paths = Array.from({ length: 300 }, (_, index) => `/entry/${index}`);
  await xenstore.transaction(async (view) => {
    await Promise.all(paths.flatMap((path) => [view.write(path, "1"), view.setPermissions(path, ["n5"])]));
  });
  assert.deepEqual(fake.log, [
    "TRANSACTION_START",
    ...paths.flatMap((path) => [`WRITE ${path}`, `SET_PERMS ${path}`]),
    "TRANSACTION_END T",
  ]);
});

Deno.test("a transaction is seen whole or not at all", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const result = await xenstore.transaction(async (view) => {
    await view.write("/a", "1");
    assert.equal(await view.read("/a"), "1");
    assert.equal(await xenstore.read("/a"), undefined);
    return 7;
  });
  assert.equal(result, 7);
  assert.deepEqual(fake.tree, { "/a": "1" });

  let kept: XenstoreView | undefined;
  await assert.rejects(
    xenstore.transaction(async (view) => {
      kept = view;
      await view.write("/b", "1");
      throw new Error("no");
    }),
    /^Error: no$/,
  );
  assert.deepEqual(fake.tree, { "/a": "1" });
  assert.equal(fake.log.at(-1), "TRANSACTION_END F");
  await assert.rejects(kept!.read("/a"), ReferenceError);
});

Deno.test("a transaction that conflicts is done again, from what is there then", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  fake.write("/counter", "1");
  let tries = 0;
  await xenstore.transaction(async (view) => {
    const value = Number(await view.read("/counter"));
    if (++tries === 1) fake.write("/counter", "10");
    await view.write("/counter", String(value + 1));
  });
  assert.equal(tries, 2);
  assert.deepEqual(fake.tree, { "/counter": "11" });

  // What others do elsewhere is no conflict.
  await xenstore.transaction(async (view) => {
    tries++;
    fake.write("/other/entry", "");
    await view.write("/counter", "0");
  });
  assert.equal(tries, 3);

  await assert.rejects(
    xenstore.transaction(async (view) => {
      await view.read("/counter");
      fake.write("/counter", "2");
    }),
    {
      name: "XenstoreError",
      code: "EAGAIN",
      message: /others changed the same entries in each of 50 tries/,
    },
  );
});

Deno.test("a watch tells what changed until it ends", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  const events: string[] = [];
  const releases: string[] = [];
  {
    await using _watch = await xenstore.watch("/a/b", (path) => events.push(path));
    await using _releases = await xenstore.watch("@releaseDomain", (path) => releases.push(path));
    await xenstore.write("/a/b/c", "1");
    await xenstore.write("/a/bc", "1");
    await xenstore.transaction(async (view) => {
      await view.write("/a/b", "2");
      assert.deepEqual(events, ["/a/b", "/a/b/c"]);
    });
    await xenstore.remove("/a");
    fake.releaseDomain();
    await xenstore.read("/a");
    assert.deepEqual(events, ["/a/b", "/a/b/c", "/a/b", "/a/b"]);
    assert.deepEqual(releases, ["@releaseDomain", "@releaseDomain"]);
  }
  await xenstore.write("/a/b", "3");
  assert.equal(events.length, 4);
  await assert.rejects(xenstore.watch("@other", () => {}), TypeError);
});

Deno.test("domains are introduced and released", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  await xenstore.introduce(5, 0xfeffcn, 3);
  assert.deepEqual([...fake.introduced], [[5, { gfn: 0xfeffcn, port: 3 }]]);
  assert.ok(await xenstore.isIntroduced(5));
  await xenstore.release(5);
  for (const code of ["ENOENT", "EINVAL"] as const) {
    fake.unknownDomain = code;
    await xenstore.release(5);
  }
  assert.ok(!await xenstore.isIntroduced(5));
  await assert.rejects(xenstore.introduce(0, 1n, 1), {
    request: "INTRODUCE",
    message: "Cannot introduce the domain 0 to xenstored as xenstored answered EINVAL",
  });
});

Deno.test("refused requests say what is wrong, and are undone with their transaction", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  fake.failAt(1, "EACCES");
  await assert.rejects(xenstore.write("/a", "1"), {
    request: "WRITE",
    path: "/a",
    code: "EACCES",
    message: 'Cannot write "/a" in xenstore as xenstored does not permit it (EACCES): run as root in ' +
      "Xen's control domain",
  });
  for (let request = 1; request <= 5; request++) {
    fake.failAt(request);
    const changing = xenstore.transaction(async (view) => {
      await Promise.all(["/a", "/b", "/c"].map((path) => view.write(path, "")));
    });
    await assert.rejects(changing, { code: "ENOSPC" });
    assert.deepEqual(fake.tree, {});
  }
});

Deno.test("what xenstored would end the connection for is not sent", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  for (const path of ["", "a", "/a/", "//a", "/a b", "/a\0b", "/ä", `/${"a".repeat(3072)}`]) {
    await assert.rejects(xenstore.read(path), TypeError, path);
  }
  await assert.rejects(xenstore.write("/a", "ä".repeat(2047)), {
    code: "E2BIG",
    message: 'Cannot write "/a" in xenstore as it takes 4097 of at most 4096 bytes: write less',
  });
  assert.equal(fake.requests, 0);
  await xenstore.write("/a", "x".repeat(4093));
  assert.equal(await xenstore.read("/a"), "x".repeat(4093));
});

Deno.test("where xenstored does not run, the message says what to start", async () => {
  await using fake = await FakeXenstore.listen();
  await assert.rejects(Xenstore.connect(`${fake.path}-absent`), /as it does not run: start it/);
  fake.die();
  await assert.rejects(Xenstore.connect(fake.path), /as it does not run: start it/);
});

Deno.test("when the connection is lost, all requests fail, now and later", async () => {
  await using fake = await FakeXenstore.listen();
  using xenstore = await Xenstore.connect(fake.path);
  await using _watch = await xenstore.watch("/a", () => {});
  fake.dieAt(3);
  const results = await Promise.allSettled(["/a", "/b", "/c", "/d"].map((path) => xenstore.write(path, "")));
  assert.deepEqual(results.slice(0, 2).map(({ status }) => status), ["fulfilled", "fulfilled"]);
  await xenstore.closed;
  for (const result of results.slice(2)) {
    assert.ok(result.status === "rejected" && result.reason instanceof XenstoreError);
    assert.equal(result.reason.code, "ECONNRESET");
    assert.match(result.reason.message, /as the connection to xenstored is lost.*: see whether xenstored/);
  }
  await assert.rejects(xenstore.read("/e"), {
    code: "ECONNRESET",
    path: "/e",
    message: /^Cannot read "\/e" in/,
  });
  await assert.rejects(xenstore.transaction(() => Promise.resolve()), { code: "ECONNRESET" });
});

Deno.test("a closed connection fails what is under way", async () => {
  await using fake = await FakeXenstore.listen();
  const xenstore = await Xenstore.connect(fake.path);
  const reading = xenstore.read("/a");
  xenstore[Symbol.dispose]();
  xenstore[Symbol.dispose]();
  await assert.rejects(reading, /as the connection to xenstored is closed/);
});

Deno.test("answers that break the protocol end the connection", async () => {
  const answers: [string, number[], string][] = [
    ["unknown type", [99, 1, 0, 0], ""],
    ["too long", [XS.READ, 1, 0, 4097], ""],
    ["no such request", [XS.READ, 77, 0, 1], "x"],
    ["another request's type", [XS.WRITE, 1, 0, 3], "OK\0"],
    ["error without name", [XS.ERROR, 1, 0, 5], "bad!\0"],
    ["event without token", [XS.WATCH_EVENT, 0, 0, 3], "/a\0"],
  ];
  for (const [name, header, payload] of answers) {
    await using fake = await FakeXenstore.listen();
    using xenstore = await Xenstore.connect(fake.path);
    fake.answerNext(Uint8Array.from([
      ...new Uint8Array(Uint32Array.from(header).buffer),
      ...new TextEncoder().encode(payload),
    ]));
    await assert.rejects(xenstore.read("/a"), /as xenstored broke its protocol/, name);
    await xenstore.closed;
  }
});

Deno.test("messages are found however their bytes are cut, and hostile bytes only ever throw", () => {
  let seed = 0x1234_5678;
  const random = (below: number) => {
    seed ^= seed << 13;
    seed ^= seed >>> 17;
    seed ^= seed << 5;
    return (seed >>> 0) % below;
  };
  const types = Object.values(XS);
  for (let run = 0; run < 300; run++) {
    const messages = Array.from({ length: random(6) }, () => ({
      type: types[random(types.length)]!,
      id: random(2 ** 32),
      payload: Uint8Array.from({ length: random(8) === 0 ? 4096 : random(40) }, () => random(256)),
    }));
    const bytes = Uint8Array.from(messages.flatMap(({ type, id, payload }) => [
      ...new Uint8Array(Uint32Array.of(type, id, random(9), payload.length).buffer),
      ...payload,
    ]));
    const reader = new XenstoreReader();
    const found = [];
    for (let at = 0; at < bytes.length;) {
      const count = 1 + random(random(3) === 0 ? 5000 : 20);
      found.push(...reader.push(bytes.subarray(at, at + count)));
      at += count;
    }
    assert.deepEqual(
      found.map(({ type, requestId, payload }) => [XS[type], requestId, [...payload]]),
      messages.map(({ type, id, payload }) => [type, id, [...payload]]),
    );

    // One damaged byte, and noise after it.
    const damaged = Uint8Array.from([...bytes, ...Array.from({ length: 64 }, () => random(256))]);
    if (damaged.length > 0) damaged[random(damaged.length)] = random(256);
    const hostile = new XenstoreReader();
    let taken = 0;
    try {
      for (const message of hostile.push(damaged)) {
        assert.ok(message.payload.length <= 4096 && message.type in XS);
        taken += 16 + message.payload.length;
      }
      // Whatever is kept is less than one message.
      assert.ok(damaged.length - taken < 16 + 4096);
    } catch (error) {
      assert.match((error as Error).message, /^a message has the type \d+ and \d+ bytes$/);
    }
  }
});
