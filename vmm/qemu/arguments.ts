/**
 * QEMU's command line for a machine: q35 with virtio-pci devices (QEMU 7.2, `qemu-options.hx`).
 *
 * @module
 */

import { join } from "node:path";
import type { Hypervisor } from "../../dsl/mod.ts";
import type { MachineDisk, MachineForward, MachineNic, MachineSpec } from "../engine.ts";
import { MachineError } from "../errors.ts";
import { DATA_CHANNELS, type MachineFiles, machineFiles } from "../file_machine.ts";
import { guestDeviceArguments, guestEndpoints } from "../guest/channel.ts";
import type { AcceleratorName } from "./accelerator.ts";

/** Paths of a machine's files. */
export interface QemuFiles extends MachineFiles {
  /** QEMU's process number. */
  readonly pid: string;
  /** QEMU's monitor. */
  readonly monitor: string;
}

/** Empty PCIe ports for devices that are plugged while the machine runs. */
export const SPARE_PORTS = 4;

/**
 * Names the files of a machine.
 *
 * @param folder The machine's folder
 * @returns The paths
 */
export function qemuFiles(folder: string): QemuFiles {
  return {
    ...machineFiles(folder),
    pid: join(folder, "qemu.pid"),
    monitor: join(folder, "qmp.sock"),
  };
}

/**
 * Doubles commas, which separate the options of an argument.
 *
 * @param text A path or other value
 * @returns The value as QEMU's option parser wants it
 */
export function escapeOption(text: string): string {
  return text.replaceAll(",", ",,");
}

/**
 * Makes the arguments that run a machine.
 *
 * @param spec The machine
 * @param files Its files
 * @param accelerator How its code is run
 * @returns The arguments, without the program itself
 */
export function qemuArguments(
  spec: MachineSpec,
  files: QemuFiles,
  accelerator: AcceleratorName,
): string[] {
  const devices = spec.disks.length + spec.nics.length;
  const ports = Array.from({ length: devices + SPARE_PORTS }, (_, index) => [
    "-device",
    `pcie-root-port,id=port${index},chassis=${index + 1},bus=pcie.0,addr=${hex(PORT_BASE + (index >> 3))}.${
      index & 7
    }` +
    ((index & 7) === 0 ? ",multifunction=on" : ""),
  ]).flat();
  const hypervisor = spec.engine.hypervisor as Required<Hypervisor> | undefined;
  // Xen has the first serial port and shows the first domain's console there: that is hvc0, before any of virtio's.
  const consoles = hypervisor
    ? "console=hvc0 hypertopia.control=hvc1"
    : "console=ttyS0 hypertopia.control=hvc0";
  const cmdline = [consoles, spec.cmdline].filter((each) => each !== "").join(" ");
  return [
    "-name",
    escapeOption(`${spec.stack}/${spec.address}`),
    "-machine",
    "q35,usb=off,smbus=off,sata=off,vmport=off,hpet=off",
    "-accel",
    // On a thread for each vCPU, QEMU 7.2 goes on running code that the guest has patched, and the guest hangs.
    accelerator === "tcg" ? `tcg,thread=${spec.cpus > 1 ? "single" : "multi"}` : accelerator,
    "-cpu",
    accelerator === "kvm" ? "host" : "max",
    "-smp",
    String(spec.cpus),
    "-m",
    `size=${spec.maxMemory / 1024}k`,
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    // To become a daemon takes setsid and fork, so these cannot be denied.
    "-sandbox",
    "on,obsolete=deny,resourcecontrol=deny",
    "-daemonize",
    "-pidfile",
    files.pid,
    "-D",
    files.engineLog,
    "-chardev",
    `socket,id=monitor,path=${escapeOption(files.monitor)},server=on,wait=off`,
    "-mon",
    "chardev=monitor,mode=control",
    "-chardev",
    `socket,id=console,path=${escapeOption(files.console)},server=on,wait=off,` +
    `logfile=${escapeOption(files.consoleLog)},logappend=on`,
    "-serial",
    "chardev:console",
    ...(spec.hasAgent ? guestDeviceArguments(guestEndpoints(files.folder, DATA_CHANNELS)) : []),
    // What the first domain takes for memory of the machine is another part of it: QEMU would drop what others use.
    ...(hypervisor ? [] : ["-device", "virtio-balloon-pci,id=balloon"]),
    "-object",
    "rng-random,id=entropy,filename=/dev/urandom",
    "-device",
    "virtio-rng-pci,rng=entropy",
    ...ports,
    ...spec.disks.flatMap((disk, index) => [
      "-blockdev",
      JSON.stringify(blockNode(disk)),
      "-device",
      JSON.stringify(diskDevice(disk, `port${index}`, spec.kernel === undefined && disk.name === "root")),
    ]),
    ...spec.nics.flatMap((nic, index) => [
      "-netdev",
      networkBackend(nic),
      "-device",
      JSON.stringify(nicDevice(nic, `port${spec.disks.length + index}`)),
    ]),
    ...(hypervisor ? multibootArguments(hypervisor, spec, files, cmdline) : [
      ...(spec.kernel === undefined ? [] : ["-kernel", spec.kernel, "-append", cmdline]),
      ...(spec.initramfs.length === 0 ? [] : ["-initrd", files.initramfs]),
    ]),
    ...((spec.engine.extraArguments as readonly string[] | undefined) ?? []),
  ];
}

/** QEMU's list of Multiboot modules is separated by commas; what follows a module's first space is its command line. */
function multibootArguments(
  hypervisor: Required<Hypervisor>,
  spec: MachineSpec,
  files: QemuFiles,
  cmdline: string,
): string[] {
  if (spec.kernel === undefined) {
    throw new MachineError(
      `Cannot start "${spec.address}" under a hypervisor as its image has no kernel: give it one`,
    );
  }
  const paths = [spec.kernel, ...(spec.initramfs.length === 0 ? [] : [files.initramfs])];
  const odd = paths.find((path) => path.includes(" "));
  if (odd !== undefined) {
    throw new MachineError(
      `Cannot start "${spec.address}" under a hypervisor as QEMU takes no spaces in the path "${odd}": ` +
        `set HYPERTOPIA_HOME and HYPERTOPIA_CACHE to other paths`,
    );
  }
  const modules = paths.map(escapeOption);
  modules[0] += ` ${escapeOption(cmdline)}`;
  return [
    "-kernel",
    hypervisor.path,
    "-append",
    hypervisor.commandLine,
    "-initrd",
    modules.join(","),
  ];
}

/** First PCI slot of the root ports; those below are for the machine's own devices. */
const PORT_BASE = 0x10;

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}

/**
 * A block node, for `-blockdev` and `blockdev-add`.
 *
 * @param disk The disk
 * @returns The options
 */
export function blockNode(disk: MachineDisk): Record<string, unknown> {
  return {
    driver: disk.format,
    "node-name": `disk-${disk.name}`,
    "read-only": disk.readOnly,
    discard: "unmap",
    file: {
      driver: "file",
      filename: disk.path,
      discard: "unmap",
      "read-only": disk.readOnly,
      // Locks keep a second machine from writing to the same file.
      locking: "on",
    },
  };
}

/**
 * A virtio-blk device, for `-device` and `device_add`.
 *
 * @param disk The disk
 * @param bus The PCIe port
 * @param isBoot Whether firmware boots from it
 * @returns The options
 */
export function diskDevice(disk: MachineDisk, bus: string, isBoot = false): Record<string, unknown> {
  return {
    driver: "virtio-blk-pci",
    id: `dev-disk-${disk.name}`,
    drive: `disk-${disk.name}`,
    serial: disk.serial,
    bus,
    ...(isBoot ? { bootindex: 0 } : {}),
  };
}

/**
 * A user-mode network, for `-netdev`.
 *
 * @param nic The NIC
 * @returns The option string
 */
export function networkBackend(nic: MachineNic): string {
  return [
    `user,id=net-${nic.name}`,
    `net=${nic.cidr}`,
    `host=${nic.gateway}`,
    `dns=${nic.dns}`,
    `dhcpstart=${nic.ip}`,
    `restrict=${nic.nat ? "off" : "on"}`,
    "ipv6=off",
    ...nic.forwards.map((forward) => `hostfwd=${forwardRule(nic, forward)}`),
  ].join(",");
}

/**
 * A port forward in QEMU's words.
 *
 * @param nic The NIC
 * @param forward The forward
 * @returns `PROTOCOL:ADDRESS:PORT-ADDRESS:PORT`
 */
export function forwardRule(nic: MachineNic, forward: MachineForward): string {
  return `${forward.protocol}:${forward.address}:${forward.host}-${nic.ip}:${forward.guest}`;
}

/**
 * A virtio-net device, for `-device` and `device_add`.
 *
 * @param nic The NIC
 * @param bus The PCIe port
 * @returns The options
 */
export function nicDevice(nic: MachineNic, bus: string): Record<string, unknown> {
  return {
    driver: "virtio-net-pci",
    id: `dev-nic-${nic.name}`,
    netdev: `net-${nic.name}`,
    mac: nic.mac,
    bus,
    romfile: "",
  };
}
