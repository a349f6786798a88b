import { cli, disk, http, network, stack, vm, xen } from "hypertopia";
import { debian } from "hypertopia/stdlib";

const example = stack("xen", () => {
  const lan = network({ cidr: "10.31.0.0/24", nat: false });
  const data = disk({ size: "64MiB", filesystem: "ext4" });
  const web = vm({
    cpus: 1,
    memory: "128MiB",
    image: debian(),
    engine: xen(),
    disks: { data: { disk: data, mount: "/srv" } },
    nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
    command: "echo 'Hello from a domain of our own' >/srv/index.html; httpd -f -h /srv",
    ready: http(80),
  });
  return { lan, data, web, port: web.nics.eth0.forwards.http };
});

export default example;
if (import.meta.main) await cli(example);
