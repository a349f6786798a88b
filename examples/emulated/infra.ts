import { cli, emulated, exec, http, network, stack, text, vm } from "hypertopia";
import { debian } from "hypertopia/stdlib";

const example = stack("emulated", () => {
  const lan = network({ cidr: "10.40.0.0/24" });
  const web = vm({
    memory: "64MiB",
    image: debian(),
    engine: emulated(),
    nics: { eth0: lan.nic({ forwards: { http: { guest: 80 } } }) },
    files: { "/srv/index.html": "Hello from a machine that needs nothing of its host\n" },
    command: "httpd -f -h /srv",
    ready: http(80),
  });
  // The second of its kind goes on from where the first had booted to.
  const reader = vm({
    memory: "64MiB",
    image: debian(),
    engine: emulated(),
    nics: { eth0: lan.nic() },
    command: text`wget -q -O /page http://${web.nics.eth0.ip}/`,
    ready: exec(["test", "-s", "/page"]),
  });
  return { lan, web, reader, port: web.nics.eth0.forwards.http };
});

export default example;
if (import.meta.main) await cli(example);
