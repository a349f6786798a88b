import assert from "node:assert/strict";
import { type Claim, findWrongClaims, hasHeader, layoutClaims } from "./c_compiler.ts";
import { KVM, KVM_CAP, KVM_EXIT, KVM_LAYOUTS } from "./kvm.ts";

const isThere = await hasHeader("linux/kvm.h");

Deno.test({
  name: `KVM's tables are those of the C headers${
    isThere ? "" : " (skipped: no C compiler with linux/kvm.h)"
  }`,
  ignore: !isThere,
  async fn() {
    const named = (prefix: string, values: Readonly<Record<string, number>>): Claim[] =>
      Object.entries(values).map(([name, value]) => [`${prefix}${name}`, value]);
    const claims = [
      // The end of kvm_run grows from version to version; only its beginning is used.
      ...KVM_LAYOUTS.flatMap(layoutClaims).filter(([expression]) => expression !== "sizeof(struct kvm_run)"),
      ...named("(unsigned)KVM_", KVM),
      ...named("KVM_CAP_", KVM_CAP),
      ...named("KVM_EXIT_", KVM_EXIT),
    ];
    assert.deepEqual(await findWrongClaims(["linux/kvm.h"], claims), []);
  },
});
