/** The contract of engines on Xen. Run in its control domain: in the lab, or on such a host. */

import { contractTests } from "../contract.ts";

contractTests("xen", { goesOn: true });
