/**
 * Networks and the NICs that join machines to them.
 *
 * @module
 */

import type { Input, Inputs } from "./output.ts";
import { type KindDefinition, type LifecycleOptions, Resource } from "./resource.ts";
import {
  boolean,
  cidr,
  custom,
  ipv4,
  isPlainObject,
  number,
  object,
  oneOf,
  optional,
  record,
  resource,
  type Schema,
  string,
} from "./schema.ts";
import type { Cidr, Ipv4 } from "./units.ts";

/** Props of a {@linkcode network}. */
export interface NetworkProps {
  /** Addresses of the network. The first host address is the gateway, the next one the name server. */
  readonly cidr: Cidr;
  /** Whether guests reach the outside through the host. */
  readonly nat?: boolean;
}

/** A port of the host that leads to a port of the guest. */
export interface Forward {
  /** Port in the guest. */
  readonly guest: number;
  /** Port on the host; a free one is chosen and kept unless told. */
  readonly host?: number;
  /** Address of the host to listen on; `"127.0.0.1"` unless told. */
  readonly address?: Ipv4;
  /** Protocol; `"tcp"` unless told. */
  readonly protocol?: "tcp" | "udp";
}

/** Props of a NIC. */
export interface NicProps {
  /** Address in the network; one is derived from the machine's address unless told. */
  readonly ip?: Ipv4;
  /** Ethernet address; one is derived from the machine's address unless told. */
  readonly mac?: string;
  /** Ports of the host that lead to this NIC, by a name of your choice. */
  readonly forwards?: Readonly<Record<string, Forward>>;
}

/** A NIC: a network with the machine's place in it. Made by {@linkcode Network.nic}. */
export interface Nic<F extends string = string> {
  /** The network. */
  readonly network: Network;
  /** Names of the forwards; carries the type only. */
  readonly forwardNames: readonly F[];
  /** Its props. */
  readonly props: Inputs<NicProps>;
}

const forwardSchema = object({
  guest: number({ min: 1, max: 65535, integer: true }),
  host: optional(number({ min: 1, max: 65535, integer: true })),
  address: optional(ipv4(), "127.0.0.1"),
  protocol: optional(oneOf("tcp", "udp"), "tcp"),
});

const nicPropsSchema = object({
  network: resource("network"),
  ip: optional(ipv4()),
  mac: optional(string({
    pattern: /^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$/,
    description: 'a unicast MAC address in lower case, such as "02:00:00:00:00:01"',
  })),
  forwards: optional(record(forwardSchema)),
});

/** Shape of a NIC in a machine's props. */
export const nicSchema: Schema<Nic> = custom("a NIC from network().nic()", (value, field, report) => {
  if (!isPlainObject(value)) {
    report(field, "Value must be a NIC from network().nic()", value);
    return value;
  }
  const flat = "props" in value && isPlainObject(value.props)
    ? { ...value.props, network: value.network }
    : value;
  return nicPropsSchema.check(flat, field, report);
});

/** Kind of {@linkcode network}. */
export const networkDefinition: KindDefinition<NetworkProps> = {
  name: "network",
  schema: object({
    cidr: cidr(),
    nat: optional(boolean(), true),
  }),
};

/** A declared network. */
export class Network extends Resource {
  /**
   * Declares a network; {@linkcode network} does the same.
   *
   * @param props Props as the user wrote them
   * @param options Lifecycle options
   */
  constructor(props: Inputs<NetworkProps>, options?: LifecycleOptions) {
    super(networkDefinition, props, options);
    Object.freeze(this);
  }

  /**
   * Makes a NIC in this network, for the `nics` of a machine.
   *
   * @param props Address and port forwards
   * @returns The NIC
   *
   * @example
   * ```ts
   * import { network } from "hypertopia";
   *
   * const lan = network({ cidr: "10.20.0.0/24" });
   * const nic = lan.nic({ ip: "10.20.0.10", forwards: { http: { guest: 80, host: 8080 } } });
   * ```
   */
  nic<const F extends string = never>(
    props: {
      readonly ip?: Input<Ipv4>;
      readonly mac?: Input<string>;
      readonly forwards?: { readonly [K in F]: Inputs<Forward> };
    } = {},
  ): Nic<F> {
    return {
      network: this,
      forwardNames: Object.keys(props.forwards ?? {}) as F[],
      props: props as Inputs<NicProps>,
    };
  }
}

/**
 * Declares a network. Machines on it reach the outside through user-mode NAT, which needs no rights on the host; ports
 * of the host lead to a machine through the `forwards` of its NIC. The machines of a network do not reach one another
 * yet: each has a NAT of its own.
 *
 * @param props Addresses and services
 * @param options Lifecycle options
 * @returns The network
 *
 * @example
 * ```ts
 * import { network } from "hypertopia";
 *
 * const lan = network({ cidr: "10.20.0.0/24" });
 * ```
 */
export function network(props: Inputs<NetworkProps>, options?: LifecycleOptions): Network {
  return new Network(props, options);
}
