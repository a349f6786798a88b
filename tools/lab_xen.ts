/**
 * What makes a lab one with Xen: Debian's hypervisor under its machine, which becomes the privileged domain, and the
 * parts of Xen's user space that every toolstack needs.
 *
 * @module
 */

import { type EngineChoice, parseSize, qemu, type Size } from "../dsl/mod.ts";
import { debianXen } from "../stdlib/debian.ts";
import type { BuildContext } from "../vmm/images/builder.ts";

/** Modules that `/dev/xen/*`, `/proc/xen` and the devices of guests need. */
export const XEN_MODULES: readonly string[] = [
  "xenfs",
  "xen_privcmd",
  "xen_evtchn",
  "xen_gntdev",
  "xen_gntalloc",
  "xen_blkback",
  "xen_netback",
  "loop",
  "bridge",
];

/**
 * The emulated processor. Xen does not run its first domain with five levels of page tables, SMAP, SMEP and protection
 * keys, and QEMU 7.2 reports RDTSCP of a guest of Xen as another instruction, which ends the guest.
 */
const PROCESSOR = "max,-la57,-smap,-smep,-pku,-rdtscp";

/**
 * Xen's command line. On such a processor it would load a domain's floating-point registers only when they are used, which
 * goes wrong under emulation now and then: programs of the first domain find those of a guest.
 */
const COMMAND_LINE = "console=com1 noreboot spec-ctrl=eager-fpu";

/**
 * Makes the engine of a lab with Xen, whose hypervisor comes from the cache or from Debian.
 *
 * @param memory Memory of the whole machine, of which the first domain gets one half
 * @param extraArguments More arguments for QEMU
 * @param context Cache, signal and progress
 * @returns The engine
 */
export async function xenEngine(
  memory: Size,
  extraArguments: readonly string[],
  context: BuildContext,
): Promise<EngineChoice> {
  const share = `${Math.floor(parseSize(memory) / 2 ** 21)}M`;
  return qemu({
    // Xen runs guests by AMD's kind of virtualization, which is emulated whatever this machine has.
    accelerator: "tcg",
    hypervisor: {
      path: await debianXen(context),
      commandLine: `${COMMAND_LINE} dom0_mem=${share},max:${share}`,
    },
    extraArguments: [...extraArguments, "-cpu", PROCESSOR],
  });
}

/** Run in this machine's root file system within the guest. */
export const XEN_SETUP_SCRIPT = `
set -e
store=
fail() { echo "$*" >&2; exit 1; }
mount -t xenfs xenfs /proc/xen
version=$(cat /sys/hypervisor/version/major).$(cat /sys/hypervisor/version/minor)
bin=/usr/lib/xen-$version/bin
# The one that Debian's own start-up takes.
for name in oxenstored xenstored; do
  [ -x "$bin/$name" ] && store="$bin/$name" && break
done
[ "$store" ] || fail "there is no xenstored in $bin: apt-get install xen-utils-$version"
mkdir -p /run/xen /run/xenstored /var/lib/xenstored /var/lib/xen /var/log/xen
"$store" --pid-file /run/xen/xenstored.pid
tries=100
until [ -S /run/xenstored/socket ]; do
  [ "$tries" -gt 0 ] || fail "xenstored did not make its socket"
  tries=$((tries - 1))
  sleep 0.1
done
"$bin/xen-init-dom0" >/dev/null
`;
