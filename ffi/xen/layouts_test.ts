import assert from "node:assert/strict";
import { type Claim, findWrongClaims, hasHeader, layoutClaims } from "../c_compiler.ts";
import { EVTCHN, VIRQ } from "./evtchn.ts";
import { GNTDEV } from "./gntdev.ts";
import {
  CDF,
  DOMCTL,
  DOMINF,
  EMULATION,
  EVTCHNOP,
  HVM_PARAM,
  HVMOP,
  HYPERCALL,
  MMUEXT,
  pagingPool,
  PHYSCAP,
  SCHEDOP,
  SCHEDULER,
  SCHEDULER_OP,
  SHADOW_OP_SET_ALLOCATION,
  SHUTDOWN,
  SYSCTL,
  VCPUAFFINITY_HARD,
  XEN_INTERFACES,
  XEN_LAYOUTS,
  XENMEM,
  XENMEM_RESOURCE,
  XENVER,
} from "./layouts.ts";
import { PRIVCMD, privcmdHypercall, privcmdMapBatch, privcmdMapResource } from "./privcmd.ts";

function named(prefix: string, values: Readonly<Record<string, number>>): Claim[] {
  return Object.entries(values).map(([name, value]) => [`${prefix}${name}`, value]);
}

/** Finds the interface that the installed headers are of. */
function installed(): typeof XEN_INTERFACES[number] | undefined {
  const version = (header: string): number =>
    Number(
      /_INTERFACE_VERSION (0x[0-9a-f]+)/i.exec(Deno.readTextFileSync(`/usr/include/xen/${header}`))?.[1],
    );
  return XEN_INTERFACES.find(({ domctl, sysctl }) =>
    domctl === version("domctl.h") && sysctl === version("sysctl.h")
  );
}

const hasXen = await hasHeader("xen/domctl.h") && await hasHeader("xenctrl.h");
const xen = hasXen ? installed() : undefined;

Deno.test({
  name: `Xen's tables are those of the C headers${
    xen ? ` (${xen.version})` : " (skipped: no C compiler with xen/domctl.h)"
  }`,
  ignore: !xen,
  async fn() {
    assert.ok(xen);
    const claims: Claim[] = [
      ...[...XEN_LAYOUTS, xen.createDomain, xen.domainInfo, xen.physicalInfo].flatMap(layoutClaims),
      ...(xen.hasPagingPool ? layoutClaims(pagingPool) : []),
      ["XEN_DOMCTL_INTERFACE_VERSION", xen.domctl],
      ["XEN_SYSCTL_INTERFACE_VERSION", xen.sysctl],
      ["XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION", SHADOW_OP_SET_ALLOCATION],
      ["XEN_VCPUAFFINITY_HARD", VCPUAFFINITY_HARD],
      ["XEN_X86_EMU_LAPIC", EMULATION.pvh],
      ["XEN_X86_EMU_ALL & ~XEN_X86_EMU_VPCI", EMULATION.hvm],
      ["sizeof(struct vcpu_guest_context)", 5168],
      ...named("__HYPERVISOR_", HYPERCALL),
      ...named("XEN_DOMCTL_", DOMCTL).filter(([name]) =>
        xen.hasPagingPool || !name.endsWith("paging_mempool_size")
      ),
      ...named("XEN_SYSCTL_", SYSCTL),
      ...named("XENVER_", XENVER),
      ...named("XENMEM_", XENMEM),
      ...named("XENMEM_resource_", XENMEM_RESOURCE),
      ...named("HVMOP_", HVMOP),
      ...named("EVTCHNOP_", EVTCHNOP),
      ...named("SCHEDOP_", SCHEDOP),
      ...named("MMUEXT_", MMUEXT),
      ...named("SHUTDOWN_", SHUTDOWN),
      ...named("HVM_PARAM_", HVM_PARAM),
      ...named("XEN_DOMCTL_CDF_", CDF),
      ...named("XEN_DOMINF_", DOMINF),
      ...named("XEN_SYSCTL_PHYSCAP_", PHYSCAP),
      ...named("XEN_SCHEDULER_", SCHEDULER),
      ...named("XEN_DOMCTL_SCHEDOP_", SCHEDULER_OP),
      ...named("VIRQ_", VIRQ),
    ];
    const headers = ["xenctrl.h", "xen/hvm/hvm_op.h", "xen/hvm/save.h", "xen/arch-x86/hvm/start_info.h"];
    assert.deepEqual(await findWrongClaims(headers, claims), []);
  },
});

const hasDevices = await hasHeader("xen/sys/privcmd.h");

Deno.test({
  name: `The tables of Xen's devices are those of the C headers${
    hasDevices ? "" : " (skipped: no C compiler with xen/sys/privcmd.h)"
  }`,
  ignore: !hasDevices,
  async fn() {
    const claims: Claim[] = [
      // Xen's copies of the kernel's headers have names of their own for the structures.
      ...[
        { ...privcmdHypercall, name: "privcmd_hypercall_t" },
        { ...privcmdMapBatch, name: "privcmd_mmapbatch_v2_t" },
        { ...privcmdMapResource, name: "privcmd_mmap_resource_t" },
      ].flatMap(layoutClaims),
      ...named("IOCTL_PRIVCMD_", PRIVCMD),
      ...named("IOCTL_EVTCHN_", EVTCHN),
      ...named("IOCTL_GNTDEV_", GNTDEV),
      ["offsetof(struct ioctl_gntdev_map_grant_ref, index)", 8],
      ["offsetof(struct ioctl_gntdev_map_grant_ref, refs)", 16],
      ["sizeof(struct ioctl_gntdev_grant_ref)", 8],
      ["offsetof(struct ioctl_gntdev_grant_ref, ref)", 4],
      ["sizeof(struct ioctl_gntdev_unmap_grant_ref)", 16],
      ["offsetof(struct ioctl_gntdev_unmap_grant_ref, count)", 8],
    ];
    const headers = [
      "stdint.h",
      "sys/ioctl.h",
      "xenctrl.h",
      "xen/sys/privcmd.h",
      "xen/sys/evtchn.h",
      "xen/sys/gntdev.h",
    ];
    assert.deepEqual(await findWrongClaims(headers, claims), []);
  },
});

Deno.test("Structures have the sizes that each version of Xen gives them", () => {
  const sizes = XEN_INTERFACES.map((xen) => [
    xen.version,
    xen.createDomain.size,
    xen.createDomain.fields["arch.emulation_flags"]?.[0],
    xen.domainInfo.size,
    xen.physicalInfo.size,
  ]);
  assert.deepEqual(sizes, [
    ["4.14", 48, 44, 104, 104],
    ["4.15", 56, 48, 104, 104],
    ["4.16", 60, 52, 112, 104],
    ["4.17", 64, 56, 112, 112],
    ["4.18", 64, 56, 112, 112],
    ["4.19", 68, 60, 112, 112],
    ["4.20", 68, 60, 112, 112],
    ["4.21", 68, 60, 112, 112],
    ["4.22", 68, 60, 112, 112],
  ]);
});
