import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { join } from "node:path";
import { parseIpv4 } from "../../dsl/mod.ts";
import { isRunning } from "../../planner/mod.ts";
import { MachineError } from "../errors.ts";
import { exists } from "../files.ts";
import type { RunFile } from "../supervisor/supervisor.ts";
import {
  ARP_OPERATION,
  BROADCAST_MAC,
  buildArp,
  buildTcp,
  buildUdp,
  type Ipv4Packet,
  parseEthernet,
  parseIpv4Packet,
  parseMac,
  parseTcp,
  parseUdp,
  TCP_FLAG,
} from "./frame.ts";
import { ensureUserNetwork, releaseUserNetwork, UserNetworkPort } from "./user_network_client.ts";
import { JsonLines, type NicAttachment, userNetworkFiles } from "./user_network_protocol.ts";

const SPEC = { cidr: "10.20.0.0/24", gateway: "10.20.0.1", dns: "10.20.0.2", nat: false };
const MAIN = new URL("./user_network_main.ts", import.meta.url).href;

function nic(number: number): NicAttachment {
  return {
    machine: `machine-${number}`,
    nic: "eth0",
    mac: `02:00:00:00:00:${number}`,
    ip: `10.20.0.${number}`,
    hostname: "",
    forwards: [],
  };
}

function hello(from: number, to: number, payload: Uint8Array = Uint8Array.of(1)): Uint8Array {
  return buildUdp({
    sourceMac: parseMac(`02:00:00:00:00:${from}`),
    destinationMac: parseMac(`02:00:00:00:00:${to}`),
    source: parseIpv4(`10.20.0.${from}`),
    destination: parseIpv4(`10.20.0.${to}`),
  }, { sourcePort: 7, destinationPort: 7, payload });
}

function runFile(folder: string): RunFile {
  return JSON.parse(Deno.readTextFileSync(userNetworkFiles(folder).run));
}

function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

async function until(test: () => boolean): Promise<void> {
  while (!test()) await new Promise((resolve) => setTimeout(resolve, 10));
}

/** Sends until the other port hears: links come up one after the other. */
async function reach(one: UserNetworkPort, two: UserNetworkPort, frame: Uint8Array): Promise<void> {
  let isHeard = false;
  two.onFrame = (heard) => {
    assert.deepEqual(heard.slice(), frame);
    isHeard = true;
  };
  await until(() => {
    one.send(frame);
    return isHeard;
  });
}

class Folder implements AsyncDisposable {
  readonly path: string = join(Deno.makeTempDirSync(), "network");

  async [Symbol.asyncDispose](): Promise<void> {
    // A client of a test that failed may be connected still.
    const { process } = await exists(userNetworkFiles(this.path).run) ? runFile(this.path) : {};
    if (process && isRunning(process)) Deno.kill(process.pid, "SIGKILL");
    await Deno.remove(join(this.path, ".."), { recursive: true });
  }
}

Deno.test("the process of a network serves its machines, and they come again after it was killed", async () => {
  await using folder = new Folder();
  const files = userNetworkFiles(folder.path);
  (await ensureUserNetwork(folder.path, SPEC))[Symbol.dispose]();
  const warnings: string[] = [];
  const log = { info: () => {}, warn: (message: string) => void warnings.push(message) };
  using one = await UserNetworkPort.connect(folder.path, nic(10), { log });
  using two = await UserNetworkPort.connect(folder.path, nic(11));
  await reach(one, two, hello(10, 11));
  await reach(two, one, hello(11, 10));
  // Its owner only.
  for (const path of [files.control, files.log, files.run, join(folder.path, "0.sock")]) {
    assert.equal(Deno.statSync(path).mode! & 0o77, 0, path);
  }
  const first = runFile(folder.path).process!;
  // Whoever asks for it again gets the same one.
  (await ensureUserNetwork(folder.path, SPEC))[Symbol.dispose]();
  assert.deepEqual(runFile(folder.path).process, first);
  Deno.kill(first.pid, "SIGKILL");
  await until(() => !one.isUp && !two.isUp);
  assert.equal(one.send(hello(10, 11)), false);
  await assert.rejects(one.setForwards([]), MachineError);
  assert.match(warnings.join("\n"), /its link is down until it runs again/);
  using _hold = await ensureUserNetwork(folder.path, SPEC);
  assert.notDeepEqual(runFile(folder.path).process, first);
  await until(() => one.isUp && two.isUp);
  await reach(one, two, hello(10, 11));
  await one.setForwards([]);
});

Deno.test({
  name: "the process has given up what it does not need",
  ignore: Deno.build.os !== "linux" || Deno.build.arch !== "x86_64",
  async fn() {
    await using folder = new Folder();
    using _hold = await ensureUserNetwork(folder.path, SPEC);
    const { pid } = runFile(folder.path).process!;
    const threads = [...Deno.readDirSync(`/proc/${pid}/task`)];
    assert.ok(threads.length > 1);
    for (const { name } of threads) {
      const status = Deno.readTextFileSync(`/proc/${pid}/task/${name}/status`);
      assert.match(status, /^NoNewPrivs:\t1$/m);
      assert.match(status, /^Seccomp:\t2$/m);
      // None but to listen on low ports, where it had that one.
      assert.match(status, /^CapEff:\t0{13}[04]00$/m);
    }
  },
});

const outside =
  Deno.networkInterfaces().find(({ family, address }) =>
    family === "IPv4" && !/^(127|10\.20|169\.254)\./.test(address)
  )?.address ?? "";

Deno.test({
  name: "guests speak to the outside, and are spoken to, through the process in its sandbox",
  // Guests do not reach the host's loopback.
  ignore: outside === "",
  async fn() {
    await using folder = new Folder();
    using _hold = await ensureUserNetwork(folder.path, { ...SPEC, nat: true });
    using server = Deno.listen({ hostname: outside, port: 0 });
    const echo = createSocket("udp4");
    echo.on("message", (data, peer) => echo.send(data, peer.port, peer.address));
    echo.bind(0, outside);
    await once(echo, "listening");
    const free = freePort();
    const forwards = (["tcp", "udp"] as const).map((protocol) => ({
      protocol,
      address: "127.0.0.1",
      host: free,
      guest: 80,
    }));
    using port = await UserNetworkPort.connect(folder.path, { ...nic(10), forwards });
    const mac = parseMac("02:00:00:00:00:10");
    const ip = parseIpv4("10.20.0.10");
    const heard: Uint8Array[] = [];
    port.onFrame = (frame) => void heard.push(frame.slice());
    const hear = async <T>(pick: (packet: Ipv4Packet) => T | undefined): Promise<T> => {
      let found: T | undefined;
      await until(() => {
        const frame = heard.shift();
        const packet = frame && parseIpv4Packet(parseEthernet(frame)!.payload);
        found = packet && pick(packet);
        return found !== undefined;
      });
      return found!;
    };
    // The gateway learns where the guest is, and the guest where the gateway is.
    port.send(buildArp(BROADCAST_MAC, {
      operation: ARP_OPERATION.REQUEST,
      senderMac: mac,
      senderIp: ip,
      targetMac: 0,
      targetIp: parseIpv4(SPEC.gateway),
    }));
    await until(() => heard.length > 0);
    const gateway = parseEthernet(heard.shift()!)!.source;
    const addresses = {
      sourceMac: mac,
      destinationMac: gateway,
      source: ip,
      destination: parseIpv4(outside),
    };
    const segment = { sequence: 1, acknowledgment: 0, window: 1000, payload: new Uint8Array(0) };
    port.send(buildTcp(addresses, {
      ...segment,
      sourcePort: 1000,
      destinationPort: server.addr.port,
      flags: TCP_FLAG.SYN,
    }));
    (await server.accept()).close();
    assert.equal((await hear(parseTcp)).sourcePort, server.addr.port);
    const payload = new TextEncoder().encode("hello");
    port.send(buildUdp(addresses, { sourcePort: 1000, destinationPort: echo.address().port, payload }));
    assert.deepEqual((await hear(parseUdp)).payload, payload);
    using _client = await Deno.connect({ hostname: "127.0.0.1", port: free });
    assert.equal(await hear((packet) => parseTcp(packet)?.destinationPort === 80 || undefined), true);
    echo.close();
    const sender = createSocket("udp4");
    sender.send(payload, free, "127.0.0.1");
    const forwarded = await hear(parseUdp);
    assert.deepEqual([forwarded.destinationPort, forwarded.payload], [80, payload]);
    sender.close();
  },
});

Deno.test("many who ask at once get one process, which goes when it is released", async () => {
  await using folder = new Folder();
  const holds = await Promise.all([1, 2, 3].map(() => ensureUserNetwork(folder.path, SPEC)));
  const { process } = runFile(folder.path);
  assert.ok(process && isRunning(process));
  assert.equal(
    (await Deno.readTextFile(userNetworkFiles(folder.path).log)).match(/is served in/g)?.length,
    1,
  );
  const port = await UserNetworkPort.connect(folder.path, nic(10));
  for (const hold of holds) hold[Symbol.dispose]();
  assert.equal(await releaseUserNetwork(folder.path), false);
  port[Symbol.dispose]();
  while (!(await releaseUserNetwork(folder.path)));
  assert.ok(!isRunning(process));
  assert.ok(!(await exists(folder.path)));
  assert.equal(await releaseUserNetwork(folder.path), true);
});

Deno.test("a network that was changed is started anew", async () => {
  await using folder = new Folder();
  (await ensureUserNetwork(folder.path, SPEC))[Symbol.dispose]();
  const { process } = runFile(folder.path);
  using port = await UserNetworkPort.connect(folder.path, nic(10));
  const reports: string[] = [];
  using _hold = await ensureUserNetwork(folder.path, { ...SPEC, nat: true }, {
    report: (each) => reports.push(each),
  });
  assert.match(reports.join("\n"), /anew, as it was changed/);
  assert.ok(!isRunning(process!));
  await until(() => port.isUp);
});

Deno.test("a second process for the same folder refuses to start, and the first one goes on", async () => {
  await using folder = new Folder();
  using _hold = await ensureUserNetwork(folder.path, SPEC);
  const { process } = runFile(folder.path);
  const { code, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      ...["run", "-A", MAIN, "--folder", folder.path, "--cidr", SPEC.cidr],
      ...["--gateway", SPEC.gateway, "--dns", SPEC.dns],
    ],
    stderr: "piped",
    stdout: "null",
  }).output();
  assert.equal(code, 1);
  assert.match(new TextDecoder().decode(stderr), /^Error: Cannot serve .* as another process does: end it/);
  assert.deepEqual(runFile(folder.path).process, process);
  using port = await UserNetworkPort.connect(folder.path, nic(10));
  assert.ok(port.isUp);
});

Deno.test("why a process cannot start is told in its own words", async () => {
  await using folder = new Folder();
  await assert.rejects(ensureUserNetwork(folder.path, { ...SPEC, cidr: "10.20.0.5/24" }), (error) => {
    assert.ok(error instanceof MachineError);
    assert.match(
      error.message,
      /^Cannot start the network 10\.20\.0\.5\/24 as its process ended: Error: Cannot read/,
    );
    return true;
  });
  await assert.rejects(ensureUserNetwork(join(folder.path, "x".repeat(90)), SPEC), /longer than 103 bytes/);
  await assert.rejects(UserNetworkPort.connect(folder.path, nic(10)), (error) => {
    assert.ok(error instanceof MachineError);
    assert.match(error.message, /^Cannot attach machine-10\/eth0 .* process does not run: run apply again$/);
    return true;
  });
  const signal = AbortSignal.abort(new Error("enough"));
  await assert.rejects(ensureUserNetwork(folder.path, SPEC, { signal }), /enough/);
});

Deno.test("a process that nobody is connected to ends by itself, and one that is told to ends at once", async () => {
  await using folder = new Folder();
  (await ensureUserNetwork(folder.path, SPEC))[Symbol.dispose]();
  const idle = runFile(folder.path).process!;
  await until(() => !isRunning(idle));
  assert.deepEqual(runFile(folder.path), {
    end: { reason: "stopped", detail: "no machine has been attached for a while" },
  });
  using _hold = await ensureUserNetwork(folder.path, SPEC);
  const told = runFile(folder.path).process!;
  Deno.kill(told.pid, "SIGTERM");
  await until(() => !isRunning(told));
  assert.equal(runFile(folder.path).end?.detail, "it was told to end");
});

Deno.test("a guest that does not read loses frames, and costs the process no more than its queue", async () => {
  await using folder = new Folder();
  (await ensureUserNetwork(folder.path, SPEC))[Symbol.dispose]();
  const files = userNetworkFiles(folder.path);
  using one = await UserNetworkPort.connect(folder.path, nic(10));
  using two = await UserNetworkPort.connect(folder.path, nic(11));
  using slow = new JsonLines(await Deno.connect({ transport: "unix", path: files.control }));
  await slow.write({ attach: nic(12) });
  const { frames } = await slow.read() as { frames: string };
  using _deaf = await Deno.connect({ transport: "unix", path: frames });
  await reach(one, two, hello(10, 11));
  const { pid } = runFile(folder.path).process!;
  const resident = () => {
    const status = Deno.build.os === "linux" ? Deno.readTextFileSync(`/proc/${pid}/status`) : "";
    return Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1] ?? 0) * 1024;
  };
  const before = resident();
  const big = hello(10, 12, new Uint8Array(1400));
  const total = 200 * 2 ** 20;
  for (let sent = 0; sent < total;) {
    if (one.send(big)) sent += big.length;
    else await new Promise((resolve) => setTimeout(resolve));
  }
  await reach(one, two, hello(10, 11));
  const grown = resident() - before;
  assert.ok(grown < total / 2, `the process grew by ${grown} bytes for ${total} that nobody took`);
});
