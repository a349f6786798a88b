/**
 * What xenstore says about a domain and its devices, for Linux 6.1 on both sides: drivers/xen/xenbus, xen-blkback and
 * xen-netback (`xenbus.c` of each), hvc_xen.c; `docs/misc/xenstore-paths.pandoc` of Xen 4.17.
 *
 * @module
 */

import type { Xenstore, XenstoreView } from "../../ffi/xen/xenstore.ts";

/** States of either end of a device: `enum xenbus_state` (Xen 4.17 `xen/include/public/io/xenbus.h`). */
export const XENBUS_STATE = {
  Unknown: 0,
  Initialising: 1,
  InitWait: 2,
  Initialised: 3,
  Connected: 4,
  Closing: 5,
  Closed: 6,
} as const;

/** A value of {@linkcode XENBUS_STATE}. */
export type XenbusState = typeof XENBUS_STATE[keyof typeof XENBUS_STATE];

/** Kinds of devices: disk, network interface, console. */
export type XenDeviceKind = "vbd" | "vif" | "console";

/**
 * How many consoles a domain can have beside the first: Linux has `/dev/hvc0` to `/dev/hvc7` (`HVC_ALLOC_TTY_ADAPTERS`,
 * drivers/tty/hvc/hvc_console.h), and takes the number of a console from the last digit of its path.
 */
export const MAX_FURTHER_CONSOLES = 7;

/** An entry of xenstore. */
export interface XenstoreEntry {
  /** Its path. */
  readonly path: string;
  /** Its value. */
  readonly value: string;
  /** Who may do what; if not told, the same as with the entry above it. */
  readonly permissions?: readonly string[];
}

/** A disk, served by blkback. */
export interface XenDisk {
  /** Its place: 0 is `xvda`. */
  readonly index: number;
  /** Major number of the host's block device. */
  readonly major: number;
  /** Minor number of the host's block device. */
  readonly minor: number;
  /** Whether writes are refused. */
  readonly readOnly: boolean;
  /** Whether the guest may give back space, where the host's device can. */
  readonly discard: boolean;
  /** The file behind the host's block device, for whoever looks. */
  readonly file?: string;
}

/** A network interface, served by netback, which makes `vifDOMID.INDEX` on the host. */
export interface XenNetwork {
  /** Its place: 0 is the first. */
  readonly index: number;
  /** Ethernet address in the guest. */
  readonly mac: string;
  /** Bytes of the largest frame, without its header. */
  readonly mtu: number;
}

/** A page that a domain shares with the host, and the event channel in the domain that belongs to it. */
export interface XenSharedPage {
  /** Frame of the page; of the machine where the domain is a PV one. */
  readonly gfn: bigint;
  /** The event channel. */
  readonly port: number;
}

/** What a domain's entries are made of. */
export interface XenDomain {
  /** Number of the domain. */
  readonly domid: number;
  /** Its identity, as `/vm` names it. */
  readonly uuid: string;
  /** Its name. */
  readonly name: string;
  /** Memory that it has, in KiB. */
  readonly memory: number;
  /** Memory that it can have, in KiB. */
  readonly maxMemory: number;
  /** vCPUs that are on. */
  readonly cpus: number;
  /** vCPUs that can be on. */
  readonly maxCpus: number;
  /** The page for xenstored. */
  readonly store: XenSharedPage;
  /** The page of the first console. */
  readonly console: XenSharedPage;
  /** Disks. */
  readonly disks: readonly XenDisk[];
  /** Network interfaces. */
  readonly networks: readonly XenNetwork[];
  /** How many consoles it has beside the first. */
  readonly furtherConsoles: number;
}

/** What must be there for any domain to be served: the control domain itself. */
export const HOST_ENTRIES: readonly XenstoreEntry[] = [
  { path: "/local/domain/0", value: "", permissions: ["n0"] },
  { path: "/local/domain/0/name", value: "Domain-0" },
  { path: "/local/domain/0/domid", value: "0" },
];

/**
 * Finds a domain's entries.
 *
 * @param domid Number of the domain
 * @returns Their path
 */
export function domainPath(domid: number): string {
  return `/local/domain/${domid}`;
}

/**
 * Finds the guest's end of a device.
 *
 * @param domid Number of the domain
 * @param kind Kind of the device
 * @param index Its place among those
 * @returns Path of its entries
 */
export function frontendPath(domid: number, kind: XenDeviceKind, index: number): string {
  // The first console is there before there are drivers for devices.
  if (kind === "console" && index === 0) return `${domainPath(domid)}/console`;
  return `${domainPath(domid)}/device/${kind}/${deviceKey(kind, index)}`;
}

/**
 * Finds the host's end of a device.
 *
 * @param domid Number of the domain
 * @param kind Kind of the device
 * @param index Its place among those
 * @returns Path of its entries
 */
export function backendPath(domid: number, kind: XenDeviceKind, index: number): string {
  return `${domainPath(0)}/backend/${kind}/${domid}/${deviceKey(kind, index)}`;
}

/**
 * Names a disk as the guest does.
 *
 * @param index Its place
 * @returns Such as `xvda`
 */
export function diskName(index: number): string {
  const letters = (index: number): string =>
    (index < 26 ? "" : letters(Math.floor(index / 26) - 1)) + String.fromCharCode(97 + index % 26);
  return `xvd${letters(index)}`;
}

/**
 * Lists the entries of a domain, with all devices. They belong in one transaction, in this order.
 *
 * @param domain The domain
 * @returns The entries
 */
export function domainEntries(domain: XenDomain): XenstoreEntry[] {
  const { domid, uuid, store } = domain;
  if (domain.furtherConsoles > MAX_FURTHER_CONSOLES) {
    throw new RangeError(
      `Cannot give a domain ${domain.furtherConsoles} further consoles as Linux has at most ${MAX_FURTHER_CONSOLES}`,
    );
  }
  const root = domainPath(domid);
  const readable = ["n0", `r${domid}`];
  return [
    { path: `/vm/${uuid}`, value: "", permissions: readable },
    { path: `/vm/${uuid}/uuid`, value: uuid },
    { path: `/vm/${uuid}/name`, value: domain.name },
    { path: `/vm/${uuid}/domid`, value: `${domid}` },
    // By this one xl knows how to look at the domain.
    { path: `/libxl/${domid}/type`, value: "pvh" },
    { path: root, value: "", permissions: readable },
    ...Object.entries({
      vm: `/vm/${uuid}`,
      name: domain.name,
      domid: `${domid}`,
      "memory/static-max": `${domain.maxMemory}`,
      "memory/target": `${domain.memory}`,
      "store/port": `${store.port}`,
      "store/ring-ref": `${store.gfn}`,
      "control/platform-feature-multiprocessor-suspend": "1",
      "control/platform-feature-xs_reset_watches": "1",
    }).map(([name, value]) => ({ path: `${root}/${name}`, value })),
    ...Array.from({ length: domain.maxCpus }, (_, cpu) => ({
      path: `${root}/cpu/${cpu}/availability`,
      value: cpu < domain.cpus ? "online" : "offline",
    })),
    // What the guest writes: answers to requests, what it can do, and errors of its drivers.
    ...[
      "control/shutdown",
      "control/feature-poweroff",
      "control/feature-reboot",
      "control/feature-suspend",
      "control/sysrq",
      "device/suspend/event-channel",
      "data",
      "drivers",
      "feature",
      "attr",
      "error",
    ].map((name) => ({ path: `${root}/${name}`, value: "", permissions: [`n${domid}`] })),
    ...firstConsoleEntries(domid, domain.console),
    ...Array.from({ length: domain.furtherConsoles }, (_, index) => consoleEntries(domid, index + 1)).flat(),
    ...domain.disks.flatMap((disk) => diskEntries(domid, disk)),
    ...domain.networks.flatMap((network) => networkEntries(domid, network)),
  ];
}

/**
 * Lists the entries of a disk. The host's driver serves it as soon as they are written.
 *
 * @param domid Number of the domain
 * @param disk The disk
 * @returns The entries
 */
export function diskEntries(domid: number, disk: XenDisk): XenstoreEntry[] {
  return deviceEntries(domid, "vbd", disk.index, {
    "virtual-device": `${deviceKey("vbd", disk.index)}`,
    "device-type": "disk",
  }, {
    dev: diskName(disk.index),
    ...(disk.file === undefined ? {} : { params: disk.file }),
    mode: disk.readOnly ? "r" : "w",
    "discard-enable": disk.discard ? "1" : "0",
    // The driver waits for this one.
    "physical-device": `${disk.major.toString(16)}:${disk.minor.toString(16)}`,
  });
}

/**
 * Lists the entries of a network interface. The host's driver makes its end as soon as they are written.
 *
 * @param domid Number of the domain
 * @param network The interface
 * @returns The entries
 */
export function networkEntries(domid: number, network: XenNetwork): XenstoreEntry[] {
  const both = { handle: `${network.index}`, mac: network.mac, mtu: `${network.mtu}` };
  return deviceEntries(domid, "vif", network.index, both, {
    ...both,
    // The driver will not do without, and without a script nobody else would say that the cable is plugged in.
    script: "",
    "hotplug-status": "connected",
  });
}

/**
 * Lists the entries of a domain's first console. A guest finds it without them; they tell other programs of the host that
 * it is served.
 *
 * @param domid Number of the domain
 * @param page The page of the console
 * @returns The entries
 */
export function firstConsoleEntries(domid: number, page: XenSharedPage): XenstoreEntry[] {
  const front = frontendPath(domid, "console", 0);
  const back = backendPath(domid, "console", 0);
  // No entry of the guest's end belongs to the guest: programs of the host trust them.
  return [
    ...Object.entries({
      backend: back,
      "backend-id": "0",
      "ring-ref": `${page.gfn}`,
      port: `${page.port}`,
      // Anything but "xenconsoled" keeps that daemon away.
      type: "ioemu",
      limit: "1048576",
      output: "pty",
      tty: "",
    }).map(([name, value]) => ({ path: `${front}/${name}`, value })),
    ...backendEntries(domid, front, back, { protocol: "vt100" }),
  ];
}

/**
 * Lists the entries of a further console. The guest adds `ring-ref`, a grant of its page, and `port`, and enters the state
 * `Initialised`; once the host's end is `Connected`, so is the guest's. Of the other entries that programs of Xen write,
 * such as `tty`, Linux reads none, and the guest could change them.
 *
 * @param domid Number of the domain
 * @param index Its place, from 1 to {@linkcode MAX_FURTHER_CONSOLES}. It is `/dev/hvcINDEX` where all before it are there
 * @returns The entries
 */
export function consoleEntries(domid: number, index: number): XenstoreEntry[] {
  return deviceEntries(domid, "console", index, {}, { protocol: "vt100" });
}

/**
 * Writes entries.
 *
 * @param view Where to, best a transaction
 * @param entries The entries
 */
export async function writeEntries(view: XenstoreView, entries: readonly XenstoreEntry[]): Promise<void> {
  await Promise.all(entries.flatMap(({ path, value, permissions }) => [
    view.write(path, value),
    ...(permissions ? [view.setPermissions(path, permissions)] : []),
  ]));
}

/**
 * Waits until one end of a device is in a state.
 *
 * @param xenstore The connection
 * @param path {@linkcode frontendPath} or {@linkcode backendPath} of the device
 * @param states The states
 * @param signal Ends the wait
 * @returns The state; `Unknown` is that of a device that is not there
 * @throws {XenstoreError} If the connection is lost
 */
export async function waitForState(
  xenstore: Xenstore,
  path: string,
  states: readonly XenbusState[],
  signal: AbortSignal,
): Promise<XenbusState> {
  let changed = Promise.withResolvers<void>();
  const wake = () => changed.resolve();
  signal.throwIfAborted();
  signal.addEventListener("abort", wake);
  // Where the connection is lost, the read throws.
  xenstore.closed.then(wake);
  try {
    // The first event comes at once.
    await using _watch = await xenstore.watch(`${path}/state`, wake);
    for (;;) {
      await changed.promise;
      changed = Promise.withResolvers();
      signal.throwIfAborted();
      const state = parseState(await xenstore.read(`${path}/state`));
      if (states.includes(state)) return state;
    }
  } finally {
    signal.removeEventListener("abort", wake);
  }
}

/**
 * Takes a device from a running domain: asks both ends to close it, then removes its entries. Nothing happens where it is
 * not there.
 *
 * @param xenstore The connection
 * @param domid Number of the domain
 * @param kind Kind of the device
 * @param index Its place among those
 * @param options How long the ends may take, in milliseconds (default 10 s), after which the entries are removed all the
 * same and the host's driver lets go of it by itself; and what ends the wait with an error, the entries still there
 * @returns Whether both ends closed it in time
 */
export async function unplug(
  xenstore: Xenstore,
  domid: number,
  kind: XenDeviceKind,
  index: number,
  options: { readonly timeout?: number; readonly signal?: AbortSignal } = {},
): Promise<boolean> {
  const { timeout = 10_000, signal } = options;
  const back = backendPath(domid, kind, index);
  const isOpen = await xenstore.transaction(async (view) => {
    const state = await view.read(`${back}/state`);
    if (state === undefined) return false;
    const isClosed = parseState(state) === XENBUS_STATE.Closed;
    await Promise.all([
      view.write(`${back}/online`, "0"),
      ...(isClosed ? [] : [view.write(`${back}/state`, `${XENBUS_STATE.Closing}`)]),
    ]);
    return !isClosed;
  });
  const hasClosed = !isOpen || await waitForClosed();
  await xenstore.transaction(async (view) => {
    await Promise.all([view.remove(frontendPath(domid, kind, index)), view.remove(back)]);
  });
  return hasClosed;

  async function waitForClosed(): Promise<boolean> {
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(), timeout);
    try {
      const either = signal ? AbortSignal.any([signal, late.signal]) : late.signal;
      await waitForState(xenstore, back, [XENBUS_STATE.Closed, XENBUS_STATE.Unknown], either);
      return true;
    } catch (error) {
      if (late.signal.aborted && error === late.signal.reason) return false;
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }
}

/**
 * Removes all entries of a domain that is gone, or never began; the host's drivers let go of its devices then.
 *
 * @param xenstore The connection
 * @param domid Number of the domain
 * @param uuid Its identity. Where a later domain has the same by now, that one's entries below `/vm` stay
 */
export async function removeDomainTree(xenstore: Xenstore, domid: number, uuid: string): Promise<void> {
  const backends = `${domainPath(0)}/backend`;
  await xenstore.transaction(async (view) => {
    const [kinds, owner] = await Promise.all([view.list(backends), view.read(`/vm/${uuid}/domid`)]);
    await Promise.all([
      view.remove(domainPath(domid)),
      view.remove(`/libxl/${domid}`),
      ...kinds.map((kind) => view.remove(`${backends}/${kind}/${domid}`)),
      ...(owner === `${domid}` ? [view.remove(`/vm/${uuid}`)] : []),
    ]);
  });
}

/** The guest's end, which belongs to the guest, and the host's, which the guest may read. */
function deviceEntries(
  domid: number,
  kind: XenDeviceKind,
  index: number,
  guest: Readonly<Record<string, string>>,
  host: Readonly<Record<string, string>>,
): XenstoreEntry[] {
  const front = frontendPath(domid, kind, index);
  const back = backendPath(domid, kind, index);
  return [
    { path: front, value: "", permissions: [`n${domid}`, "r0"] },
    ...Object.entries({
      backend: back,
      "backend-id": "0",
      state: `${XENBUS_STATE.Initialising}`,
      ...guest,
    }).map(([name, value]) => ({ path: `${front}/${name}`, value })),
    ...backendEntries(domid, front, back, host),
  ];
}

function backendEntries(
  domid: number,
  front: string,
  back: string,
  more: Readonly<Record<string, string>>,
): XenstoreEntry[] {
  return [
    { path: back, value: "", permissions: ["n0", `r${domid}`] },
    ...Object.entries({
      frontend: front,
      "frontend-id": `${domid}`,
      online: "1",
      state: `${XENBUS_STATE.Initialising}`,
      ...more,
    }).map(([name, value]) => ({ path: `${back}/${name}`, value })),
  ];
}

/** The number by which both ends name a device. */
function deviceKey(kind: XenDeviceKind, index: number): number {
  if (kind !== "vbd") return index;
  // Xen 4.17 `docs/man/xen-vbd-interface.7.pandoc`: the major number 202 has 16 disks of 16 partitions; the rest follow in
  // the extended scheme of 256 partitions.
  return index < 16 ? 202 << 8 | index << 4 : 1 << 28 | index << 8;
}

function parseState(value: string | undefined): XenbusState {
  return /^[1-6]$/.test(value ?? "") ? Number(value) as XenbusState : XENBUS_STATE.Unknown;
}
