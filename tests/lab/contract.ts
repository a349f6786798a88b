/** The contract of engines on our own VMM. Run where `/dev/kvm` runs stock kernels: in the lab, or on such a host. */

import { contractTests } from "../contract.ts";

contractTests("kvm");
