import { probeKvm } from "../vmm/kvm/probe.ts";
import { contractTests } from "./contract.ts";
import { isInstalled } from "./support.ts";

const kvm = probeKvm();
contractTests("kvm", kvm.isUsable ? {} : { skipped: kvm.detail });
contractTests("qemu", {
  ...(isInstalled("qemu-system-x86_64") ? {} : { skipped: "qemu-system-x86_64 is not installed" }),
  noNeighbours: "QEMU gives each machine a network of its own",
});
contractTests("emulated");
