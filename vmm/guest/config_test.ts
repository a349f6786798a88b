import { type GuestConfig, guestConfigFiles, shellQuote } from "./config.ts";

function assertEquals(actual: unknown, expected: unknown): void {
  const [a, b] = [Deno.inspect(actual, { depth: 9 }), Deno.inspect(expected, { depth: 9 })];
  if (a !== b) throw new Error(`${a} is not ${b}`);
}

const MACHINE: GuestConfig = { hostname: "one", environment: {}, nics: [], mounts: [], files: [] };

function texts(config: Partial<GuestConfig>): Record<string, string> {
  return Object.fromEntries(
    guestConfigFiles({ ...MACHINE, ...config }).map((
      file,
    ) => [file.path, new TextDecoder().decode(file.content)]),
  );
}

const PIECES = [
  "'",
  '"',
  "\\",
  "$",
  "`",
  "\n",
  " ",
  "*",
  "a",
  "é",
  "\x01",
  "\x88",
  "!",
  "-",
  "=",
  "%",
  "#",
  "\r",
];

function randomText(): string {
  const length = Math.floor(Math.random() * 20);
  return Array.from({ length }, () => PIECES[Math.floor(Math.random() * PIECES.length)]).join("");
}

async function shell(script: string): Promise<string> {
  const { stdout } = await new Deno.Command("sh", { args: ["-c", script], stderr: "inherit" }).output();
  return new TextDecoder().decode(stdout);
}

Deno.test("shellQuote gives the shell exactly the text", async () => {
  const words = Array.from({ length: 200 }, randomText);
  assertEquals(await shell(`printf '%s\\0' ${words.map(shellQuote).join(" ")}`), `${words.join("\0")}\0`);
});

Deno.test("guestConfigFiles writes an environment that is safe to source", async () => {
  const values = Array.from({ length: 50 }, randomText);
  const environment = Object.fromEntries(values.map((value, number) => [`V${number}`, value]));
  const lines = texts({ environment })["/hypertopia/config/environment"] ?? "";
  const names = values.map((_, number) => `"$V${number}"`).join(" ");
  assertEquals(await shell(`${lines}\nprintf '%s\\0' ${names}`), `${values.join("\0")}\0`);
});

Deno.test("guestConfigFiles writes only what the machine has", () => {
  assertEquals(texts({}), {
    "/hypertopia/config/hostname": "one\n",
    "/hypertopia/config/environment": "",
    "/hypertopia/config/environment.systemd": "",
  });
});

Deno.test("guestConfigFiles writes all parts of a machine", () => {
  assertEquals(
    texts({
      hostname: "a.example",
      environment: { A: "it's", B: `"$x"` },
      nics: [
        {
          mac: "52:54:00:AA:00:01",
          name: "eth0",
          address: "10.0.0.2/24",
          gateway: "10.0.0.1",
          dns: "9.9.9.9",
        },
        { mac: "52:54:00:aa:00:02", name: "lan", address: "fd00::2/64", dns: "9.9.9.9" },
        { mac: "52:54:00:aa:00:03", name: "idle" },
      ],
      root: { device: "serial=root", fstype: "ext4", init: "/sbin/init" },
      mounts: [{ serial: "data", mountpoint: "/srv", fstype: "ext4" }],
      files: [{ path: "/etc/a b", mode: 0o4755, content: new Uint8Array([65]) }],
      command: "echo hello",
    }),
    {
      "/hypertopia/config/hostname": "a.example\n",
      "/hypertopia/config/environment": "A='it'\\''s'\nB='\"$x\"'\n",
      "/hypertopia/config/environment.systemd": 'A="it\'s"\nB="\\"\\$x\\""\n',
      "/hypertopia/config/network": "52:54:00:aa:00:01 eth0 10.0.0.2/24 10.0.0.1 9.9.9.9\n" +
        "52:54:00:aa:00:02 lan fd00::2/64 - 9.9.9.9\n52:54:00:aa:00:03 idle - - -\n",
      "/hypertopia/config/resolv.conf": "nameserver 9.9.9.9\n",
      "/hypertopia/config/root": "serial=root ext4 /sbin/init\n",
      "/hypertopia/config/mounts": "data /srv ext4\n",
      "/hypertopia/config/files/0": "A",
      "/hypertopia/config/files/list": "0 4755 /etc/a b\n",
      "/hypertopia/config/command": "echo hello\n",
    },
  );
});

Deno.test("guestConfigFiles refuses what the guest would read as something else", () => {
  const mac = "52:54:00:00:00:01";
  const content = new Uint8Array();
  const wrong: Partial<GuestConfig>[] = [
    { hostname: "" },
    { hostname: "a b" },
    { hostname: "a\nb" },
    { hostname: "-a" },
    { environment: { "A B": "" } },
    { environment: { "1A": "" } },
    { environment: { A: "\0" } },
    { nics: [{ mac: "52:54", name: "a" }] },
    { nics: [{ mac, name: "a b" }] },
    { nics: [{ mac, name: "../a" }] },
    { nics: [{ mac, name: "averylongname0" }] },
    { nics: [{ mac, name: "a", address: "10.0.0.1" }] },
    { nics: [{ mac, name: "a", address: "10.0.0.1/33" }] },
    { nics: [{ mac, name: "a", address: "10.0.0.256/8" }] },
    { nics: [{ mac, name: "a", gateway: "10.0.0.1 x" }] },
    { nics: [{ mac, name: "a", dns: "" }] },
    { root: { device: "vda", fstype: "ext4", init: "/i" } },
    { root: { device: "/dev/v da", fstype: "ext4", init: "/i" } },
    { root: { device: "/dev/vda", fstype: "ext4", init: "init" } },
    { root: { device: "/dev/vda", fstype: "-o x", init: "/i" } },
    { mounts: [{ serial: "a b", mountpoint: "/a", fstype: "ext4" }] },
    { mounts: [{ serial: "a".repeat(21), mountpoint: "/a", fstype: "ext4" }] },
    { mounts: [{ serial: "a", mountpoint: "/a b", fstype: "ext4" }] },
    { mounts: [{ serial: "a", mountpoint: "a", fstype: "ext4" }] },
    { files: [{ path: "a", mode: 0o644, content }] },
    { files: [{ path: "/a/../b", mode: 0o644, content }] },
    { files: [{ path: "/a\nb", mode: 0o644, content }] },
    { files: [{ path: "/a/", mode: 0o644, content }] },
    { files: [{ path: "/a ", mode: 0o644, content }] },
    { files: [{ path: "/a", mode: 0o100644, content }] },
    { command: "a\0" },
  ];
  for (const part of wrong) {
    let error: unknown;
    try {
      guestConfigFiles({ ...MACHINE, ...part });
    } catch (caught) {
      error = caught;
    }
    if (!(error instanceof TypeError)) throw new Error(`${Deno.inspect(part, { depth: 9 })} was not refused`);
  }
});
