import { cli, http, network, stack, vm } from "hypertopia";
import { debian } from "hypertopia/stdlib";

const quickstart = stack("quickstart", () => {
  const lan = network({ cidr: "10.20.0.0/24" });
  const web = vm({
    cpus: 1,
    memory: "128MiB",
    image: debian(),
    nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
    files: { "/srv/index.html": "Hello from a machine of your own\n" },
    command: "httpd -f -h /srv",
    ready: http(80),
  });
  return { lan, web, port: web.nics.eth0.forwards.http };
});

export default quickstart;
if (import.meta.main) await cli(quickstart);
