import { AGENT_SCRIPT, AGENT_VERSION, END_MARK, GUEST_BUSYBOX, READY_MARK } from "./agent.ts";

async function checkSyntax(script: string): Promise<void> {
  const process = new Deno.Command("sh", { args: ["-n"], stdin: "piped", stdout: "null", stderr: "piped" })
    .spawn();
  const writer = process.stdin.getWriter();
  await writer.write(new TextEncoder().encode(script));
  await writer.close();
  const { success, stderr } = await process.output();
  if (!success) throw new Error(new TextDecoder().decode(stderr));
}

Deno.test("AGENT_SCRIPT is a shell script of the guest's busybox", async () => {
  if (!AGENT_SCRIPT.startsWith(`#!${GUEST_BUSYBOX} sh\n`)) throw new Error("it starts with another line");
  await checkSyntax(AGENT_SCRIPT);
});

Deno.test("AGENT_SCRIPT speaks the version and writes the marks the host looks for", () => {
  for (const mark of [READY_MARK, END_MARK]) {
    const written = `printf '${mark.replace("\x1e", "\\036")}%s`;
    if (!AGENT_SCRIPT.includes(written)) throw new Error(`it does not have ${written}`);
  }
  if (!AGENT_SCRIPT.includes(`ok ${AGENT_VERSION} `)) throw new Error("it answers another version");
});
