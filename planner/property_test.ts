/**
 * Random stacks, random edits and random kill points, compared with a fresh apply of the same declarations.
 *
 * Reproduce a failure with `HYPERTOPIA_SEED=<seed> deno test -A planner/property_test.ts`.
 */

import assert from "node:assert/strict";
import {
  array,
  boolean,
  optional,
  reference,
  Resource,
  resource,
  type Stack,
  stack,
  string,
  text,
} from "../dsl/mod.ts";
import { object } from "../dsl/mod.ts";
import { type AnyKind, apply, type Kind, makePlan, type PlanOptions, State } from "./mod.ts";

/** What exists, by identity. */
interface Thing {
  address: string;
  value: string;
  base: string;
  /** Identities of the things that it uses. */
  uses: string[];
  said: string;
}

type World = Map<string, Thing>;

/** One declared node of a random stack. */
interface Node {
  value: string;
  base: string;
  isCreateFirst: boolean | undefined;
  /** Nodes that it refers to as resources. */
  refers: string[];
  /** A node whose output it carries. */
  says: string | undefined;
  /** Nodes that it only follows. */
  follows: string[];
  replaceOn: string[];
  movedFrom: string | undefined;
}

type Model = Map<string, Node>;

/** Mulberry32. */
function generator(seed: number) {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return {
    next,
    below: (count: number) => Math.floor(next() * count),
    chance: (probability: number) => next() < probability,
    pick: <T>(list: readonly T[]): T => list[Math.floor(next() * list.length)]!,
  };
}

type Random = ReturnType<typeof generator>;

class Simulation {
  world: World = new Map();
  /** Things that the driver did to something that was still in use. */
  readonly violations: string[] = [];
  /** Addresses whose next driver call fails. */
  readonly broken = new Set<string>();
  declared: ReadonlySet<string> = new Set();
  readonly kind: AnyKind;

  constructor() {
    const kind: Kind = {
      name: "node",
      schema: object({
        value: string(),
        base: string(),
        uses: optional(array(resource("node"))),
        says: optional(string()),
        extra: optional(boolean()),
      }),
      disruption: ({ field }) => ({ class: field === "base" ? "recreate" : "live" }),
      observe: (instances) =>
        Promise.resolve(
          new Map(instances.flatMap(({ address, id }) => {
            const found = this.world.get(id);
            return found ? [[address, { props: { value: found.value } }] as const] : [];
          })),
        ),
      predict: ({ props }) => ({ upper: String(props.value).toUpperCase() }),
      ensure: async ({ address, id, props, dependencies }) => {
        await Promise.resolve();
        if (this.broken.delete(address)) throw new Error(`${address} is broken`);
        const found = this.world.get(id);
        if (found && found.base !== props.base) {
          this.violations.push(`ensure ${address} changes the base in place`);
        }
        const uses = (props.uses as { $resource: string }[] | undefined ?? []).map(({ $resource }) => {
          const target = dependencies.get($resource);
          if (!target) this.violations.push(`ensure ${address} does not get its dependency ${$resource}`);
          else if (!this.world.has(target.id)) {
            this.violations.push(`ensure ${address} uses ${$resource}, which does not exist`);
          }
          return target?.id ?? "";
        });
        this.world.set(id, {
          address,
          value: String(props.value),
          base: String(props.base),
          uses,
          said: String(props.says ?? ""),
        });
        return { id, upper: String(props.value).toUpperCase() };
      },
      remove: async ({ address, id, props, dependencies }) => {
        await Promise.resolve();
        if (this.broken.delete(address)) throw new Error(`${address} is broken`);
        const isSuperseded = [...this.world].some(([other, thing]) =>
          other !== id && thing.address === address
        );
        for (const thing of this.world.values()) {
          // What is replaced in place is cut from its users; anything else must be let go of first.
          if (thing.uses.includes(id) && (isSuperseded || !this.declared.has(address))) {
            this.violations.push(`remove ${address} (${id}) while ${thing.address} uses it`);
          }
        }
        for (const { $resource } of props.uses as { $resource: string }[] | undefined ?? []) {
          if (this.world.has(id) && !dependencies.has($resource)) {
            this.violations.push(`remove ${address} does not get its dependency ${$resource}`);
          }
        }
        this.world.delete(id);
      },
    };
    this.kind = kind as AnyKind;
  }

  stack(model: Model): Stack {
    return stack("test", () => {
      const made = new Map<string, Resource>();
      const make = (name: string): Resource => {
        const known = made.get(name);
        if (known) return known;
        const node = model.get(name)!;
        const result = new Resource(this.kind, {
          value: node.value,
          base: node.base,
          ...(node.refers.length > 0 ? { uses: node.refers.map(make) } : {}),
          ...(node.says === undefined
            ? {}
            : { says: text`${reference<string>(make(node.says), ["upper"])}!` }),
        }, {
          dependsOn: node.follows.map(make),
          replaceOn: node.replaceOn.map(make),
          ...(node.isCreateFirst === undefined ? {} : { createBeforeDestroy: node.isCreateFirst }),
          ...(node.movedFrom === undefined ? {} : { movedFrom: node.movedFrom }),
        });
        made.set(name, result);
        return result;
      };
      return Object.fromEntries([...model].flatMap(([name, { value }], index) => [
        [name, make(name)],
        // Outputs in between, some of them known only after apply.
        ...(index % 3 === 0
          ? [[`out ${value}`, reference<string>(make(name), [index % 2 === 0 ? "id" : "upper"])]]
          : []),
      ]));
    });
  }
}

/** A random model; nodes refer only to those before them in a random order, so that there is no cycle. */
function link(random: Random, model: Model, probability: number): void {
  const names = [...model.keys()].map((name) => [random.next(), name] as const).sort((a, b) => a[0] - b[0])
    .map(([, name]) => name);
  const rank = new Map(names.map((name, index) => [name, index]));
  for (const [name, node] of model) {
    const before = names.slice(0, rank.get(name));
    const isEarlier = (other: string) => model.has(other) && rank.get(other)! < rank.get(name)!;
    const some = (old: string[], count: number) =>
      random.chance(probability)
        ? [...new Set(Array.from({ length: random.below(count + 1) }, () => random.pick(before)))]
          .filter((each) => each !== undefined)
        : old.filter(isEarlier);
    node.refers = some(node.refers, 2);
    node.follows = some(node.follows, 1);
    node.replaceOn = random.chance(0.1) ? some(node.replaceOn, 1) : node.replaceOn.filter(isEarlier);
    if (random.chance(probability)) node.says = random.chance(0.5) ? random.pick(before) : undefined;
    else if (node.says !== undefined && !isEarlier(node.says)) node.says = undefined;
  }
}

let counter = 0;

function newNode(random: Random): Node {
  return {
    value: `v${counter++}`,
    base: random.pick(["debian", "alpine"]),
    isCreateFirst: random.pick([undefined, undefined, true, false]),
    refers: [],
    says: undefined,
    follows: [],
    replaceOn: [],
    movedFrom: undefined,
  };
}

function edit(random: Random, model: Model): Model {
  const next: Model = structuredClone(model);
  for (const node of next.values()) node.movedFrom = undefined;
  for (const [name, node] of [...next]) {
    const choice = random.next();
    if (choice < 0.15) node.value = `v${counter++}`;
    else if (choice < 0.3) node.base = random.pick(["debian", "alpine", "arch"]);
    else if (choice < 0.42) next.delete(name);
    else if (choice < 0.47) node.isCreateFirst = random.pick([undefined, true, false]);
    else if (choice < 0.57) {
      // The new name may have been in use before, so that identities could meet again.
      const to = random.pick(NAMES);
      if (next.has(to) || model.has(to)) continue;
      next.delete(name);
      next.set(to, { ...node, movedFrom: name });
      for (const other of next.values()) {
        for (const list of [other.refers, other.follows, other.replaceOn]) {
          const index = list.indexOf(name);
          if (index >= 0) list[index] = to;
        }
        if (other.says === name) other.says = to;
      }
    }
  }
  for (const name of NAMES) {
    if (
      !next.has(name) && random.chance(0.1) && ![...next.values()].some((each) => each.movedFrom === name)
    ) {
      next.set(name, newNode(random));
    }
  }
  link(random, next, 0.2);
  return next;
}

const NAMES = ["a", "b", "c", "d", "e", "odd key", "f.g"];
const address = (name: string) => /^[a-z]$/.test(name) ? name : `[${JSON.stringify(name)}]`;

class Killed extends Error {}

async function once(
  simulation: Simulation,
  path: string,
  declared: Stack,
  options: Partial<PlanOptions> & { parallelism?: number; onBoundary?: (name: string) => void } = {},
) {
  using state = await State.open(path, { stack: "test", create: true, lineage: "lineage" });
  using _lock = await state.lock("apply");
  const graph = declared.evaluate();
  simulation.declared = new Set(options.mode === "destroy" ? [] : graph.byAddress.keys());
  const kinds = new Map([["node", simulation.kind]]);
  const plan = await makePlan({ graph, state, kinds, ...options });
  await apply(plan, { graph, state, kinds, ...options });
  return plan;
}

/** Applies and goes on from what a kill at the given boundary would have left: files and world of that instant. */
async function killed(
  simulation: Simulation,
  path: string,
  copy: string,
  declared: Stack,
  boundary: number,
  options: Partial<PlanOptions> & { parallelism?: number },
): Promise<string> {
  let count = 0;
  let world: World | undefined;
  let violations = 0;
  let at = "";
  const onBoundary = (name: string) => {
    if (count++ !== boundary) return;
    at = name;
    world = structuredClone(simulation.world);
    violations = simulation.violations.length;
    for (const end of ["", "-wal"]) {
      try {
        Deno.copyFileSync(`${path}${end}`, `${copy}${end}`);
      } catch (error) {
        if (!(error instanceof Deno.errors.NotFound)) throw error;
      }
    }
    throw new Killed();
  };
  try {
    await once(simulation, path, declared, { ...options, onBoundary });
  } catch (error) {
    if (!world) throw error;
  }
  if (!world) {
    Deno.copyFileSync(path, copy);
    return "";
  }
  simulation.world = world;
  simulation.violations.length = violations;
  using state = await State.open(copy, { stack: "test", create: false });
  const holder = state.lockHolder();
  if (holder) state.forceUnlock(holder.id);
  return at;
}

/** What a world is, whatever the identities in it. */
async function shape(world: World, path: string): Promise<unknown> {
  using state = await State.open(path, { stack: "test", create: false });
  // A thing that was moved does not know its new name: the record does.
  const names = new Map(state.records().map((each) => [each.id, each.address]));
  return [...world].map(([id, { value, base, uses, said }]) => ({
    address: names.get(id) ?? `orphan ${id}`,
    value,
    base,
    said,
    uses: uses.map((each) => world.has(each) ? names.get(each) : `dangling ${each}`),
  })).sort((a, b) => a.address < b.address ? -1 : 1);
}

async function scenario(seed: number, folder: string): Promise<void> {
  const random = generator(seed);
  const history: string[] = [];
  counter = 0;
  const simulation = new Simulation();
  let files = 0;
  let path = `${folder}/${seed}-${files++}.db`;
  let model: Model = new Map();
  for (const name of NAMES) if (random.chance(0.6)) model.set(name, newNode(random));
  link(random, model, 1);
  try {
    for (let round = 0; round < 4; round++) {
      const before = new Set(model.keys());
      if (round > 0) model = edit(random, model);
      const declared = simulation.stack(model);
      history.push(`round ${round}: ${[...before]} -> ${JSON.stringify([...model])}`);
      if (round > 0 && random.chance(0.3)) {
        // The world changes behind our back: only what nothing uses, as a user of it could not go on either.
        const ids = [...simulation.world.keys()].filter((id) =>
          ![...simulation.world.values()].some((each) => each.uses.includes(id))
        );
        if (ids.length > 0) {
          const id = random.pick(ids);
          history.push(`drift of ${simulation.world.get(id)!.address}`);
          if (random.chance(0.5)) simulation.world.delete(id);
          else simulation.world.get(id)!.value = "drifted";
        }
      }
      for (let cut = random.below(4); cut > 0; cut--) {
        const options = { parallelism: random.pick([1, 2, 10]) };
        if (random.chance(0.25) && model.size > 0) {
          const name = address(random.pick([...model.keys()]));
          simulation.broken.add(name);
          history.push(`${name} is broken`);
          await once(simulation, path, declared, options).catch((error: Error) => {
            if (!/is broken/.test(error.message)) throw error;
          });
          simulation.broken.clear();
        } else {
          const copy = `${folder}/${seed}-${files++}.db`;
          history.push(
            `cut at "${await killed(simulation, path, copy, declared, random.below(30), options)}"`,
          );
          path = copy;
        }
      }
      const plan = await once(simulation, path, declared, { parallelism: random.pick([1, 10]) });
      history.push(`finished with ${plan.operations.map(({ type, address }) => `${type} ${address}`)}`);

      const fresh = new Simulation();
      const other = `${folder}/${seed}-${files++}.db`;
      await once(fresh, other, fresh.stack(model));
      assert.deepEqual(
        await shape(simulation.world, path),
        await shape(fresh.world, other),
        "the world is not that of a fresh apply",
      );
      assert.deepEqual(simulation.violations, [], "a driver was called at a wrong time");
      const again = await once(simulation, path, declared);
      assert.deepEqual(
        again.changes.filter((each) => each.action !== "no-op").map((each) => [
          each.address,
          each.action,
          each.fields,
        ]),
        [],
        "a second plan is not empty",
      );
      assert.deepEqual(again.outputs, {}, "outputs change in a second plan");
      using state = await State.open(path, { stack: "test", create: false });
      const records = state.records();
      assert.equal(new Set(records.map((each) => each.id)).size, records.length, "an identity is used twice");
      assert.deepEqual(
        records.map((each) => [each.address, each.status, each.deposed, simulation.world.has(each.id)]),
        [...model.keys()].map((name) => [address(name), "ok", "", true]).sort((a, b) =>
          a[0]! < b[0]! ? -1 : 1
        ),
        "records are not those of the declarations",
      );
    }
    if (random.chance(0.5)) {
      const copy = `${folder}/${seed}-${files++}.db`;
      const at = await killed(
        simulation,
        path,
        copy,
        simulation.stack(model),
        random.below(20),
        { mode: "destroy" },
      );
      history.push(`destroy, cut at "${at}"`);
      path = copy;
    }
    await once(simulation, path, simulation.stack(model), { mode: "destroy" });
    assert.deepEqual(simulation.world, new Map(), "destroy leaves things behind");
    assert.deepEqual(simulation.violations, [], "a driver was called at a wrong time in destroy");
  } catch (error) {
    throw new Error(`Seed ${seed} fails: ${(error as Error).message}\n${history.join("\n")}`, {
      cause: error,
    });
  }
}

/** Memory where there is some: the state is synced at each step. */
function scratch(): string {
  try {
    return Deno.makeTempDirSync({ dir: "/dev/shm" });
  } catch {
    return Deno.makeTempDirSync();
  }
}

Deno.test("apply() that is cut anywhere ends where a fresh one does", async () => {
  const folder = scratch();
  try {
    const given = Deno.env.get("HYPERTOPIA_SEED");
    const seeds = given === undefined
      ? Array.from({ length: Number(Deno.env.get("HYPERTOPIA_RUNS") ?? 150) }, (_, index) => index + 1)
      : [Number(given)];
    const end = performance.now() + Number(Deno.env.get("HYPERTOPIA_MS") ?? 8000);
    for (const seed of seeds) {
      if (performance.now() > end) break;
      await scenario(seed, folder);
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
