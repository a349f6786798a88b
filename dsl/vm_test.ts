import assert from "node:assert/strict";
import { Choice } from "./image.ts";
import { vmDefinition, xen, type XenOptions } from "./vm.ts";

/** Brings the options of an engine into their normal form, and tells what is wrong with them. */
function check(engine: Choice<"engine">): { problems: string[]; engine: unknown } {
  const problems: string[] = [];
  const props = { memory: "64MiB", image: new Choice("image", "debian", vmDefinition.schema, {}), engine };
  const normal = vmDefinition.schema.check(props, "", (field, reason, value) => {
    if (field.startsWith("engine")) problems.push(`${field}: ${reason} (${JSON.stringify(value)})`);
  });
  return { problems, engine: (normal as { engine: unknown }).engine };
}

Deno.test("the normal form of xen() says what was left out, and its processors in order", () => {
  const defaults = { type: "xen", domain: "pvh", weight: 256, cap: 0, crash: "destroy" };
  assert.deepEqual(check(xen()), { problems: [], engine: defaults });
  assert.deepEqual(check(xen({ type: "pvh", pin: [3, 1, 3], crash: "restart" })), {
    problems: [],
    engine: { ...defaults, pin: [1, 3], crash: "restart" },
  });
  assert.deepEqual(check(xen({ pin: [[0], [2, 1]], weight: 65535, cap: 150 })).engine, {
    ...{ ...defaults, pin: [[0], [1, 2]], weight: 65535, cap: 150 },
  });
});

Deno.test("what xen() cannot do is refused where it is written, all of it at once", () => {
  const wrong = (options: Record<string, unknown>) => check(xen(options as XenOptions)).problems;
  assert.deepEqual(wrong({ type: "hvm", weight: 0, cap: 1.5, crash: "reboot", vhost: true }), [
    "engine.vhost: Unknown field: known fields are type, maxCpus, weight, cap, pin, crash (undefined)",
    'engine.type: Domains of this type cannot be made yet: use "pvh", or choose qemu() ("hvm")',
    "engine.weight: Value must be a whole number from 1 to 65535 (0)",
    "engine.cap: Value must be a whole number from 0 to 65535 (1.5)",
    'engine.crash: Value must be one of "destroy", "restart", "preserve" ("reboot")',
  ]);
  assert.deepEqual(wrong({ type: "uml" }), ['engine.type: Value must be "pvh" ("uml")']);
  assert.deepEqual(wrong({ pin: [] }), [
    "engine.pin: Value must be a list of processors such as [2, 3] ([])",
  ]);
  assert.deepEqual(wrong({ pin: "0-3" }), [
    'engine.pin: Value must be a list of processors such as [2, 3] ("0-3")',
  ]);
  assert.deepEqual(wrong({ pin: [[0], 1, [-1]] }), [
    "engine.pin[1]: Value must be a list of processors such as [2, 3] (1)",
    "engine.pin[2][0]: Value must be a whole number from 0 to 4095 (-1)",
  ]);
  assert.deepEqual(check(xen(null as unknown as XenOptions)).problems.map((each) => each.split(":")[0]), [
    "engine",
  ]);
});
