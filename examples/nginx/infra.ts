import { cli, http, network, stack, vm } from "hypertopia";
import { debian } from "hypertopia/stdlib";

/** A full Debian with systemd and nginx, reached through a port of the host. */
const nginx = stack("nginx", () => {
  const lan = network({ cidr: "10.20.0.0/24" });
  const web = vm({
    cpus: 2,
    memory: "512MiB",
    image: debian({ packages: ["nginx-light"] }),
    nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
    ready: http(80, { timeout: "10m" }),
  });
  return { lan, web, port: web.nics.eth0.forwards.http };
});

export default nginx;
if (import.meta.main) await cli(nginx);
