/**
 * What the compiler refuses. `deno check` fails where one of these lines becomes valid.
 */

import { debian, debianKernel } from "../stdlib/debian.ts";
import { hostKernel } from "../stdlib/host_kernel.ts";
import {
  type Disk,
  disk,
  type DiskAttachment,
  type DiskProps,
  emulated,
  type EngineChoice,
  type ImageSource,
  type Inputs,
  type KernelSource,
  kvm,
  network,
  qemu,
  secret,
  text,
  vm,
  type VmProps,
  xen,
} from "../dsl/mod.ts";

const lan = network({ cidr: "10.0.0.0/24" });
const image = debian();
const good = vm({ memory: "1GiB", image, nics: { eth0: lan.nic({ forwards: { web: { guest: 80 } } }) } });

/** Never run: it only has to be checked. */
export function refused(): void {
  // @ts-expect-error a wrong unit
  disk({ size: "1GB" });
  // @ts-expect-error a network without prefix
  network({ cidr: "10.0.0.0" });
  // @ts-expect-error a misspelt field
  vm({ memory: "1GiB", image, memroy: "1GiB" });
  // @ts-expect-error a missing field
  vm({ memory: "1GiB" });
  // @ts-expect-error a NIC that is not declared
  good.nics.eth1;
  // @ts-expect-error a forward that is not declared
  good.nics.eth0.forwards.ssh;
  // @ts-expect-error an option that the engine does not have
  qemu({ acceleration: "kvm" });
  // @ts-expect-error an image where a disk is wanted
  vm({ memory: "1GiB", image, disks: { data: image } });
  // @ts-expect-error more vCPUs than an emulated machine has
  vm({ memory: "64MiB", image, engine: emulated(), cpus: 2 });
  // @ts-expect-error an option of another engine
  emulated({ isolation: "shared" });
  // @ts-expect-error an option of another engine
  emulated({ accelerator: "tcg" });
  // @ts-expect-error an option of another engine
  kvm({ accelerator: "kvm" });
  // @ts-expect-error an option that no domain has
  xen({ vhost: true });
  // @ts-expect-error a type of domain that is not there yet
  xen({ type: "hvm" });
  // @ts-expect-error processors are numbers
  xen({ pin: "0-3" });
  // @ts-expect-error an option of another engine
  xen({ isolation: "shared" });
  // @ts-expect-error an option of another engine
  kvm({ weight: 512 });
  // @ts-expect-error a misspelt field beside an engine
  vm({ memory: "64MiB", image, engine: xen(), memroy: "64MiB" });
  // @ts-expect-error a misspelt field beside an engine
  vm({ memory: "64MiB", image, engine: emulated(), memroy: "64MiB" });
  // @ts-expect-error a misspelt option
  debian({ arch: "i386", sweet: "bookworm" });
  // @ts-expect-error a misspelt field
  disk({ size: "1GiB", fromat: "qcow2" });
  const qcow2 = disk({ size: "1GiB", format: "qcow2" });
  vm({
    memory: "64MiB",
    // @ts-expect-error a 64-bit image on a 32-bit processor
    image: debian({ packages: ["nginx-light"], arch: "amd64" }),
    // @ts-expect-error a 64-bit kernel on a 32-bit processor
    kernel: debianKernel({ arch: "amd64" }),
    engine: emulated(),
  });
  vm({
    memory: "64MiB",
    image,
    // @ts-expect-error the host's kernel on a 32-bit processor
    kernel: hostKernel(),
    nics: { eth0: lan.nic() },
    engine: emulated(),
  });
  vm({
    memory: "64MiB",
    // @ts-expect-error a domain boots no 32-bit kernel
    image: debian({ arch: "i386" }),
    // @ts-expect-error a domain boots no 32-bit kernel
    kernel: debianKernel({ arch: "i386", flavour: "generic" }),
    engine: xen(),
  });
  vm({
    memory: "64MiB",
    image,
    engine: xen(),
    disks: {
      raw: disk({ size: "1GiB", format: "raw" }),
      // @ts-expect-error a format that a domain cannot have
      bare: qcow2,
      mounted: {
        // @ts-expect-error a format that a domain cannot have
        disk: qcow2,
        mount: "/srv",
      },
    },
  });
  vm({
    memory: "64MiB",
    image,
    engine: xen(),
    // @ts-expect-error a misspelt field of an attachment beside an engine
    disks: { data: { disk: disk({ size: "1GiB" }), monut: "/srv" } },
  });
  // These are fine.
  vm({ memory: "64MiB", image, engine: emulated(), cpus: 1 });
  vm({ memory: "64MiB", image, engine: emulated({ sandbox: false }) });
  vm({ memory: "64MiB", image, engine: kvm(), cpus: 2 });
  vm({
    memory: "64MiB",
    image,
    engine: xen({ pin: [[0], [1, 2]], weight: 512, crash: "preserve" }),
    cpus: 2,
  });
  const engine: EngineChoice = good ? emulated() : kvm();
  vm({ memory: "64MiB", image, engine, cpus: 2 });
  const small = vm({
    memory: "64MiB",
    image,
    engine: emulated(),
    nics: { eth0: lan.nic({ forwards: { web: { guest: 80 } } }) },
  });
  text`${small.nics.eth0.forwards.web}`;
  // @ts-expect-error a forward that is not declared
  small.nics.eth0.forwards.ssh;
  const props: VmProps = { memory: "64MiB", image, cpus: 2 };
  vm(props);
  vm({ ...props, engine });
  vm({
    memory: "1GiB",
    image,
    env: { A: text`${good.nics.eth0.ip}:${good.nics.eth0.forwards.web}` },
    engine: qemu(),
  });
  vm({
    memory: "64MiB",
    image: debian({ arch: "i386" }),
    kernel: debianKernel({ arch: "i386" }),
    disks: { qcow2 },
    engine: emulated(),
  });
  vm({
    memory: "64MiB",
    image: debian({ arch: "amd64" }),
    kernel: hostKernel(),
    disks: {
      data: { disk: disk({ size: "1GiB", filesystem: "ext4" }), mount: text`/srv`, readOnly: secret(true) },
    },
    engine: xen(),
  });
  vm({ memory: "64MiB", image: debian({ arch: "i386" }), engine: kvm(), disks: { qcow2 } });
  vm({ memory: "64MiB", image: debian({ arch: "amd64" }), disks: { data: { disk: qcow2 } } });
}

/** Never run either: what is known at run time only is left to the planner. */
export function unknown(
  isLarge: boolean,
  image: ImageSource,
  kernel: KernelSource,
  disks: Readonly<Record<string, Disk | DiskAttachment>>,
  engine: EngineChoice,
  props: VmProps,
  diskProps: Inputs<DiskProps>,
): void {
  vm({ memory: "64MiB", image, kernel, disks, engine: emulated() });
  vm({ memory: "64MiB", image, kernel, disks, engine: xen() });
  const withEngine = { memory: "64MiB", image, kernel, disks, engine: xen() } as const;
  vm(withEngine);
  vm({ ...props, engine: xen() });
  const arch = isLarge ? "amd64" : "i386";
  vm({ memory: "64MiB", image: debian({ arch }), kernel: debianKernel({ arch }), engine: emulated() });
  vm({
    memory: "64MiB",
    image: debian({ arch }),
    kernel: debianKernel({ arch }),
    disks: {
      a: disk({ size: "1GiB", format: isLarge ? "qcow2" : "raw" }),
      b: disk({ size: "1GiB", format: secret("qcow2") }),
      c: { disk: disk(diskProps) },
    },
    engine: xen(),
  });
  // Engines of different limits, too.
  const machine = {
    memory: "64MiB",
    cpus: 2,
    image: debian({ arch: "amd64" }),
    disks: { data: disk({ size: "1GiB", format: "qcow2" }) },
  } as const;
  vm({ ...machine, engine });
  vm({ ...machine, engine: isLarge ? kvm() : emulated() });
  vm({ ...machine, engine: isLarge ? xen() : emulated() });
}
