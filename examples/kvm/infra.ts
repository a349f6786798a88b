import { cli, disk, http, kvm, network, stack, vm } from "hypertopia";
import { debian } from "hypertopia/stdlib";

const example = stack("kvm", () => {
  const lan = network({ cidr: "10.30.0.0/24", nat: false });
  const data = disk({ size: "64MiB", filesystem: "ext4" });
  const web = vm({
    cpus: 1,
    memory: "256MiB",
    image: debian(),
    engine: kvm(),
    disks: { data: { disk: data, mount: "/srv" } },
    nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
    command: "echo 'Hello from a machine of our own' >/srv/index.html; httpd -f -h /srv",
    ready: http(80),
  });
  return { lan, data, web, port: web.nics.eth0.forwards.http };
});

export default example;
if (import.meta.main) await cli(example);
