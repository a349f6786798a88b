/**
 * What the compiler refuses. `deno check` fails where one of these lines becomes valid.
 */

import { debian } from "../stdlib/debian.ts";
import {
  disk,
  emulated,
  type EngineChoice,
  kvm,
  network,
  qemu,
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
}
