/**
 * A planner on a temporary state, with objects in memory, for tests.
 *
 * @module
 */

import assert from "node:assert/strict";
import type { Stack } from "../dsl/mod.ts";
import {
  type AnyKind,
  apply,
  type ApplyOptions,
  makePlan,
  memoryKind,
  type MemoryWorld,
  type Plan,
  type PlanOptions,
  type ResourceRecord,
  State,
} from "./mod.ts";

/** A planner on a temporary state, with objects in memory. */
export class Bench implements AsyncDisposable {
  readonly world: MemoryWorld = new Map();
  readonly calls: string[] = [];
  readonly made = new Set<string>();
  readonly thing = memoryKind(this.world, (name) => name !== "observe" && this.calls.push(name));
  readonly folder = Deno.makeTempDirSync();
  path = `${this.folder}/s/test.db`;
  kinds: Map<string, AnyKind> = new Map<string, AnyKind>([["memory", this.thing.kind]]);
  async plan(declared: Stack, options: Partial<PlanOptions> = {}): Promise<Plan> {
    using state = await State.open(this.path, { stack: declared.name, create: false });
    return await makePlan({ graph: declared.evaluate(), state, kinds: this.kinds, ...options });
  }
  async apply(declared: Stack, options: Partial<PlanOptions & ApplyOptions> = {}): Promise<Plan> {
    using state = await State.open(this.path, { stack: declared.name, create: true });
    using _lock = await state.lock("apply");
    const graph = declared.evaluate();
    const plan = await makePlan({ graph, state, kinds: this.kinds, ...options });
    await apply(plan, { graph, state, kinds: this.kinds, ...options });
    return plan;
  }
  /** Apply that is cut at the named boundary: snapshot of disk + world is what the next run finds. */
  async killed(
    declared: Stack,
    at: string,
    options: Partial<PlanOptions & ApplyOptions> = {},
  ): Promise<void> {
    const copy = `${this.folder}/k${crypto.randomUUID()}`;
    let world: MemoryWorld | undefined, made: Set<string> | undefined;
    const seen: string[] = [];
    await this.apply(declared, {
      ...options,
      onBoundary: (name) => {
        seen.push(name);
        if (name !== at || world) return;
        Deno.mkdirSync(copy);
        for (const { name } of Deno.readDirSync(`${this.folder}/s`)) {
          if (!name.endsWith("-shm")) Deno.copyFileSync(`${this.folder}/s/${name}`, `${copy}/${name}`);
        }
        world = structuredClone(this.world);
        made = new Set(this.made);
      },
    });
    assert.ok(world, `no boundary ${at}: ${seen.join(", ")}`);
    this.path = `${copy}/test.db`;
    this.world.clear();
    for (const [k, v] of world) this.world.set(k, v);
    // the copied lock row belongs to this live process: drop it as a dead one
    using state = await State.open(this.path, { stack: declared.name, create: false });
    state.forceUnlock(state.lockHolder()!.id);
    this.made.clear();
    for (const m of made!) this.made.add(m);
    this.calls.length = 0;
  }
  async records(): Promise<ResourceRecord[]> {
    using s = await State.open(this.path, { stack: "test", create: false });
    return s.records();
  }
  async outputs(): Promise<Map<string, unknown>> {
    using s = await State.open(this.path, { stack: "test", create: false });
    return s.outputs();
  }
  async serial(): Promise<number> {
    using s = await State.open(this.path, { stack: "test", create: false });
    return s.serial;
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

/** What happens to each address that something happens to. */
export function actions(plan: Plan): Record<string, string> {
  return Object.fromEntries(
    plan.changes.filter((e) => e.action !== "no-op").map((
      e,
    ) => [e.address + (e.deposed && " " + e.deposed), e.action]),
  );
}
