import assert from "node:assert/strict";
import { MachineError } from "../errors.ts";
import { Api, type Controller } from "./api.ts";
import { SupervisorClient, SupervisorConnectionError } from "./client.ts";
import { DEFAULT_CONFIGURATION, type MachineConfiguration, type RunReport } from "./config.ts";

const BUCKET = { size: 10, refillTime: 1 };
const CONFIGURATION: MachineConfiguration = {
  ...DEFAULT_CONFIGURATION,
  bootSource: { kernelImagePath: "/vmlinux" },
  drives: [{
    id: "root",
    isRootDevice: true,
    cacheType: "Writeback",
    isReadOnly: false,
    pathOnHost: "/root.qcow2",
    ioEngine: "Sync",
    format: "qcow2",
    serial: "abc",
  }],
  networkInterfaces: [{ id: "eth0", hostDevName: "tap0" }],
  balloon: { amountMib: 1, deflateOnOom: false, statsPollingInterval: 1, freePageReporting: false },
  hypertopia: { name: "one", forwards: [], restartOnReset: true },
};
const END = { reason: "poweroff", detail: "the guest powered off" } as const;

/** A machine of paper that notes what it is told. */
function fakeController(calls: unknown[][]): Controller & { run: RunReport } {
  const fake = {
    id: "one",
    state: "Not started",
    run: { uptime: 0, exits: { io: 1 } } as RunReport,
    report: () => fake.run,
    metrics: () => ({ disks: 1 }),
    balloonStatistics: () => Promise.resolve({ targetPages: 2, actualPages: 1, freeMemory: 3 }),
  };
  return new Proxy(fake, {
    get: (target, key) =>
      Reflect.get(target, key) ?? ((...values: unknown[]) => {
        calls.push([key, ...values]);
        if (key === "start") target.state = "Running";
        if (key === "flushMetrics") throw new MachineError("Cannot write the metrics as the disk is full");
        return Promise.resolve();
      }),
  }) as unknown as Controller & { run: RunReport };
}

async function withFolder(use: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await use(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("SupervisorClient asks for everything that the API has", async () => {
  await withFolder(async (folder) => {
    const path = `${folder}/control.sock`;
    const calls: unknown[][] = [];
    const controller = fakeController(calls);
    const api = new Api(controller, CONFIGURATION);
    await using _server = Deno.serve({ path, onListen() {} }, (request) => api.handle(request));
    using client = new SupervisorClient(path);
    assert.deepEqual(await client.configuration(), CONFIGURATION);
    assert.equal((await client.info()).state, "Not started");
    await client.start();
    await client.pause();
    await client.sendCtrlAltDel();
    await client.setBalloon(100);
    await client.setStatisticsInterval(2);
    await client.updateDrive("root", { pathOnHost: "/new", rateLimiter: { ops: BUCKET } });
    await client.updateNic("eth0", { rxRateLimiter: { bandwidth: BUCKET } });
    const forwards = [{
      protocol: "tcp",
      address: "127.0.0.1",
      host: 8080,
      guestIp: "10.0.0.2",
      guest: 80,
    }] as const;
    await client.setForwards(forwards);
    await client.act("Reboot");
    await client.act("Stop");
    await client.act("Kill");
    await assert.rejects(
      client.flushMetrics(),
      (error) =>
        error instanceof MachineError && !(error instanceof SupervisorConnectionError) &&
        error.message === "Cannot write the metrics as the disk is full",
    );
    assert.deepEqual(calls.map(([name, ...values]) => name === "start" ? [name] : [name, ...values]), [
      ["start"],
      ["pause"],
      ["sendCtrlAltDel"],
      ["setBalloon", 100 * 2 ** 20],
      ["setStatisticsInterval", 2],
      ["updateDrive", "root", { pathOnHost: "/new", rateLimiter: { ops: BUCKET } }],
      ["updateNic", "eth0", { rxRateLimiter: { bandwidth: BUCKET } }],
      ["setForwards", [...forwards]],
      ["reboot"],
      ["stop"],
      ["kill"],
      ["flushMetrics"],
    ]);
    assert.deepEqual(await client.balloonStatistics(), { targetPages: 2, actualPages: 1, freeMemory: 3 });
    assert.deepEqual(await client.metrics(), { disks: 1 });
    const status = { id: "one", state: "Running", pid: Deno.pid, uptime: 0, exits: { io: 1 } };
    assert.deepEqual(await client.status(), status);
    controller.run = { uptime: 5, exits: {}, end: END };
    assert.deepEqual(await client.status(), { ...status, uptime: 5, exits: {}, end: END });
    await assert.rejects(client.resume(), /as the machine has ended: the guest powered off/);
    await assert.rejects(client.updateDrive("other/../x", {}), MachineError);
  });
});

Deno.test("SupervisorClient tells a supervisor that is not there from one that does not answer", async () => {
  await withFolder(async (folder) => {
    const path = `${folder}/control.sock`;
    using client = new SupervisorClient(path);
    const isAbsent = (expected: boolean) => (error: unknown) =>
      error instanceof SupervisorConnectionError && error.isAbsent === expected;
    // No socket, and a socket that a dead supervisor left behind.
    assert.equal(await client.status(), undefined);
    {
      using _listener = Deno.listen({ transport: "unix", path });
      await Deno.rename(path, `${path}.dead`);
    }
    using dead = new SupervisorClient(`${path}.dead`);
    assert.equal(await dead.status(), undefined);
    await assert.rejects(dead.start(), isAbsent(true));
    await assert.rejects(client.act("Kill"), /nobody listens there: start the machine first/);
    // One that ends before it answers.
    using listener = Deno.listen({ transport: "unix", path });
    const serving = (async () => {
      for await (const connection of listener) {
        await connection.read(new Uint8Array(1000)).catch(() => {});
        connection.close();
      }
    })();
    await assert.rejects(client.status(), isAbsent(false));
    await assert.rejects(client.start(), isAbsent(false));
    await assert.rejects(client.act("Reboot"), isAbsent(false));
    await client.act("Kill");
    await client.act("Stop");
    listener.close();
    await serving.catch(() => {});
  });
});

Deno.test("SupervisorClient refuses answers that are none, and ends its wait when told", async () => {
  await withFolder(async (folder) => {
    const path = `${folder}/control.sock`;
    let answer: () => Response | Promise<Response> = () => new Response("");
    await using server = Deno.serve({ path, onListen() {} }, () => answer());
    using client = new SupervisorClient(path);
    for (
      const [response, reason] of [
        [new Response("{", { status: 200 }), /the answer of GET \/hypertopia\/status as it is not JSON/],
        [Response.json({ id: "one" }), /the answer of GET \/hypertopia\/status as it is incomplete/],
        [new Response(null, { status: 204 }), /invalid type: undefined, expected an object/],
        [new Response(null, { status: 404 }), /as it has status 404 and no explanation/],
        [Response.json(null, { status: 500 }), /as it has status 500 and no explanation/],
        [new Response("x".repeat(2 ** 22 + 1)), /has more than 4194304 bytes/],
      ] as const
    ) {
      answer = () => response;
      await assert.rejects(client.status(), (error: Error) => {
        assert.ok(error instanceof MachineError);
        assert.match(error.message, reason);
        return true;
      });
    }
    const never = Promise.withResolvers<Response>();
    const asked = Promise.withResolvers<void>();
    answer = () => {
      asked.resolve();
      return never.promise;
    };
    const controller = new AbortController();
    const waiting = client.status({ signal: controller.signal });
    await asked.promise;
    controller.abort(new Error("enough"));
    await assert.rejects(waiting, /^Error: enough$/);
    never.resolve(new Response(""));
    await server.shutdown();
  });
});
