/**
 * Network interfaces of the host: taps, bridges and their addresses (Linux 6.1 `include/uapi/linux/if_tun.h`, `if.h`,
 * `sockios.h`; `Documentation/networking/tuntap.rst` tells how taps work).
 *
 * @module
 */

import { SysError } from "./errno.ts";
import { Fd, O_RDWR } from "./fd.ts";
import { type Layout, Struct } from "./layout.ts";
import { check, cString, libc } from "./libc.ts";

/** Requests to a tap. */
export const TUN = {
  SETIFF: 0x400454ca,
  SETPERSIST: 0x400454cb,
  SETOFFLOAD: 0x400454d0,
  SETVNETHDRSZ: 0x400454d8,
} as const;
/** What the reader of a tap takes beside plain frames, for `TUNSETOFFLOAD`. */
export const TUN_F = { CSUM: 1, TSO4: 2, TSO6: 4, TSO_ECN: 8 } as const;
/** Flags of interfaces, and of `TUNSETIFF`. */
export const IFF = { UP: 1, TAP: 2, NO_PI: 0x1000, VNET_HDR: 0x4000 } as const;
/** Requests to a socket that concern interfaces. */
export const SIOC = {
  GIFFLAGS: 0x8913,
  SIFFLAGS: 0x8914,
  GIFADDR: 0x8915,
  SIFADDR: 0x8916,
  GIFNETMASK: 0x891b,
  SIFNETMASK: 0x891c,
  SIFMTU: 0x8922,
  SIFHWADDR: 0x8924,
  GIFINDEX: 0x8933,
  BRADDBR: 0x89a0,
  BRDELBR: 0x89a1,
  BRADDIF: 0x89a2,
} as const;

/** `struct ifreq`, whose second half is a union. */
export const ifreq = {
  name: "struct ifreq",
  size: 40,
  fields: {
    ifr_name: [0, "u8", 16],
    ifr_flags: [16, "u16"],
    ifr_ifindex: [16, "i32"],
    ifr_mtu: [16, "i32"],
    "ifr_addr.sa_family": [16, "u16"],
    "ifr_addr.sa_data": [18, "u8", 14],
  },
} as const satisfies Layout;

/** Longest name of an interface, in bytes: `IFNAMSIZ` less the NUL at its end. */
export const MAX_INTERFACE_NAME = 15;
/** Size of the header before each frame: `struct virtio_net_hdr_v1` (Linux 6.1 `include/uapi/linux/virtio_net.h`). */
export const NET_HEADER_SIZE = 12;

const TUN_PATH = "/dev/net/tun";
const O_NONBLOCK = 0o4000;
const AF_INET = 2;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const ARPHRD_ETHER = 1;

/** Counters of an interface, as the host sees it. */
export interface InterfaceCounters {
  /** Frames that the host received: those that the other end sent. */
  readonly rxPackets: number;
  /** Bytes of them. */
  readonly rxBytes: number;
  /** Received frames that were dropped. */
  readonly rxDropped: number;
  /** Frames that the host sent. */
  readonly txPackets: number;
  /** Bytes of them. */
  readonly txBytes: number;
  /** Frames that were dropped instead of sent. */
  readonly txDropped: number;
}

/** An interface whose cable ends here: what the host sends is read, what is written the host receives. */
export class Tap implements Disposable {
  /** Reads and writes frames, each after a header of {@linkcode NET_HEADER_SIZE} bytes. Calls on it do not wait. */
  readonly fd: Fd;
  /** Its name. */
  readonly name: string;

  private constructor(fd: Fd, name: string) {
    this.fd = fd;
    this.name = name;
  }

  /**
   * Makes a tap, or takes over one of that name.
   *
   * @param name Its name, at most {@linkcode MAX_INTERFACE_NAME} bytes
   * @param options Whether it stays when it is closed; if not told, it is as it was, and a new one does not
   * @returns The tap
   * @throws {Error} If that is not possible, and why in words; the cause is the {@linkcode SysError}
   */
  static open(name: string, options: { readonly isPersistent?: boolean } = {}): Tap {
    let fd: Fd | undefined;
    try {
      fd = Fd.open(TUN_PATH, O_RDWR | O_NONBLOCK);
      const request = interfaceRequest(name).assign({ ifr_flags: IFF.TAP | IFF.NO_PI | IFF.VNET_HDR });
      fd.ioctlBuffer(TUN.SETIFF, request.bytes, "TUNSETIFF");
      const size = new Uint8Array(Uint32Array.of(NET_HEADER_SIZE).buffer);
      fd.ioctlBuffer(TUN.SETVNETHDRSZ, size, "TUNSETVNETHDRSZ");
      if (options.isPersistent !== undefined) {
        fd.ioctl(TUN.SETPERSIST, options.isPersistent ? 1 : 0, "TUNSETPERSIST");
      }
      return new Tap(fd, name);
    } catch (error) {
      fd?.[Symbol.dispose]();
      throw explain(`open the tap "${name}"`, error);
    }
  }

  /**
   * Tells the host what it may leave to the reader.
   *
   * @param flags {@linkcode TUN_F}
   * @throws {SysError} If the kernel does not know them
   */
  setOffload(flags: number): void {
    this.fd.ioctl(TUN.SETOFFLOAD, flags, "TUNSETOFFLOAD");
  }

  /**
   * Reads its counters.
   *
   * @returns The counters
   */
  readCounters(): InterfaceCounters {
    const read = (counter: string) =>
      Number(Deno.readTextFileSync(`/sys/class/net/${this.name}/statistics/${counter}`));
    return {
      rxPackets: read("rx_packets"),
      rxBytes: read("rx_bytes"),
      rxDropped: read("rx_dropped"),
      txPackets: read("tx_packets"),
      txBytes: read("tx_bytes"),
      txDropped: read("tx_dropped"),
    };
  }

  /** Closes it. Unless it is persistent, it is gone then. */
  [Symbol.dispose](): void {
    this.fd[Symbol.dispose]();
  }
}

/** Changes the interfaces of the host, which takes the right `CAP_NET_ADMIN`. Errors say in words what is wrong. */
export class NetworkInterfaces implements Disposable {
  readonly #socket: Fd;

  /** Opens the socket that requests go to. */
  constructor() {
    this.#socket = new Fd(check(libc().socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket()"), "socket");
  }

  /**
   * Looks for an interface.
   *
   * @param name Its name
   * @returns Whether it exists
   */
  has(name: string): boolean {
    return this.#get("GIFINDEX", interfaceRequest(name), "ENODEV");
  }

  /**
   * Tells whether an interface is up.
   *
   * @param name Its name
   * @returns Whether it is
   */
  isUp(name: string): boolean {
    return (this.#flags(name) & IFF.UP) !== 0;
  }

  /**
   * Sets an interface up or down.
   *
   * @param name Its name
   * @param isUp Whether it should be up
   */
  setUp(name: string, isUp: boolean): void {
    const flags = this.#flags(name);
    const wanted = isUp ? flags | IFF.UP : flags & ~IFF.UP;
    if (wanted === flags) return;
    this.#set(
      `set "${name}" ${isUp ? "up" : "down"}`,
      "SIFFLAGS",
      interfaceRequest(name).assign({ ifr_flags: wanted }),
    );
  }

  /**
   * Sets the size of the largest frame.
   *
   * @param name Name of the interface
   * @param mtu Bytes without the Ethernet header
   */
  setMtu(name: string, mtu: number): void {
    this.#set(
      `set the MTU of "${name}" to ${mtu}`,
      "SIFMTU",
      interfaceRequest(name).assign({ ifr_mtu: mtu }),
    );
  }

  /**
   * Sets the Ethernet address.
   *
   * @param name Name of the interface
   * @param mac Such as `02:00:00:00:00:01`
   */
  setMac(name: string, mac: string): void {
    const request = interfaceRequest(name).assign({ "ifr_addr.sa_family": ARPHRD_ETHER });
    mac.split(":").forEach((byte, index) => request.set("ifr_addr.sa_data", parseInt(byte, 16), index));
    this.#set(`give "${name}" the Ethernet address ${mac}`, "SIFHWADDR", request);
  }

  /**
   * Reads an IPv4 address.
   *
   * @param label Name of the interface, or with `:` and more the label of a further address
   * @returns Address and mask; undefined where it has none
   */
  address(label: string): { readonly address: string; readonly mask: string } | undefined {
    const request = interfaceRequest(label).assign({ "ifr_addr.sa_family": AF_INET });
    if (!this.#get("GIFADDR", request, "EADDRNOTAVAIL", "ENODEV")) return undefined;
    const address = readIpv4(request);
    this.#get("GIFNETMASK", request);
    return { address, mask: readIpv4(request) };
  }

  /**
   * Sets an IPv4 address. While it is being set the mask is another one: do it before the interface is up, which adds the
   * route.
   *
   * @param label Name of the interface, or with `:` and more the label of a further address
   * @param address Such as `10.0.0.1`
   * @param mask Such as `255.255.255.0`
   */
  setAddress(label: string, address: string, mask: string): void {
    for (const [request, value] of [["SIFADDR", address], ["SIFNETMASK", mask]] as const) {
      const argument = interfaceRequest(label).assign({ "ifr_addr.sa_family": AF_INET });
      value.split(".").forEach((byte, index) => argument.set("ifr_addr.sa_data", Number(byte), 2 + index));
      this.#set(`give "${label}" the address ${address}`, request, argument);
    }
  }

  /**
   * Makes a bridge, unless it is there.
   *
   * @param name Its name
   */
  addBridge(name: string): void {
    this.#set(`make the bridge "${name}"`, "BRADDBR", { bytes: interfaceName(name) }, "EEXIST");
  }

  /**
   * Removes a bridge, if it is there. It must be down.
   *
   * @param name Its name
   */
  removeBridge(name: string): void {
    this.#set(`remove the bridge "${name}"`, "BRDELBR", { bytes: interfaceName(name) }, "ENXIO");
  }

  /**
   * Plugs an interface into a bridge, unless it is in one.
   *
   * @param bridge Name of the bridge
   * @param name Name of the interface
   */
  addToBridge(bridge: string, name: string): void {
    const port = interfaceRequest(name);
    this.#set(`find "${name}"`, "GIFINDEX", port);
    this.#set(
      `plug "${name}" into the bridge "${bridge}"`,
      "BRADDIF",
      interfaceRequest(bridge).assign({ ifr_ifindex: port.get("ifr_ifindex") }),
      "EBUSY",
    );
  }

  /** Closes the socket. */
  [Symbol.dispose](): void {
    this.#socket[Symbol.dispose]();
  }

  #flags(name: string): number {
    const request = interfaceRequest(name);
    this.#set(`look at "${name}"`, "GIFFLAGS", request);
    return Number(request.get("ifr_flags"));
  }

  /** Tells whether a request found something; those codes mean that it did not. */
  #get(request: keyof typeof SIOC, argument: Struct<typeof ifreq.fields>, ...absent: string[]): boolean {
    try {
      this.#socket.ioctlBuffer(SIOC[request], argument.bytes, `SIOC${request}`);
      return true;
    } catch (error) {
      if (error instanceof SysError && absent.includes(error.code)) return false;
      throw error;
    }
  }

  #set(
    action: string,
    request: keyof typeof SIOC,
    argument: { readonly bytes: Uint8Array<ArrayBuffer> },
    isFine?: string,
  ): void {
    try {
      this.#socket.ioctlBuffer(SIOC[request], argument.bytes, `SIOC${request}`);
    } catch (error) {
      if (error instanceof SysError && error.code === isFine) return;
      throw explain(action, error);
    }
  }
}

function interfaceName(name: string): Uint8Array<ArrayBuffer> {
  const bytes = cString(name);
  if (bytes.length < 2 || bytes.length > MAX_INTERFACE_NAME + 1 || /[/\s]/.test(name)) {
    throw new TypeError(
      `Cannot name an interface "${name}" as names have 1 to ${MAX_INTERFACE_NAME} bytes without slash and space`,
    );
  }
  return bytes;
}

function interfaceRequest(name: string): Struct<typeof ifreq.fields> {
  const request = new Struct(ifreq);
  request.bytes.set(interfaceName(name));
  return request;
}

function readIpv4(request: Struct<typeof ifreq.fields>): string {
  return [2, 3, 4, 5].map((index) => request.get("ifr_addr.sa_data", index)).join(".");
}

/** Says what a failed call means for whoever wanted something of an interface. */
function explain(action: string, error: unknown): Error {
  if (!(error instanceof SysError)) return error as Error;
  const isOpen = error.call.startsWith("open(");
  return new Error(`Cannot ${action} as ${reason()}`, { cause: error });

  function reason(): string {
    switch ((error as SysError).code) {
      case "ENOENT":
      case "ENODEV":
        return isOpen
          ? `${TUN_PATH} is absent: load the kernel's module with "modprobe tun"`
          : "there is no such interface";
      case "EACCES":
      case "EPERM":
        return isOpen
          ? `this user may not open ${TUN_PATH}: run as root, or ask for access to it`
          : "the right to change networks (CAP_NET_ADMIN) is missing: run as root";
      case "EBUSY":
        return "another process uses it: end that process first";
      case "EINVAL":
        return "the kernel refuses it: another interface of this name is there, or a value is out of range";
      default:
        return (error as SysError).message;
    }
  }
}
