import { INIT_SCRIPT } from "./init.ts";

Deno.test("INIT_SCRIPT is a shell script of the initramfs's busybox", async () => {
  if (!INIT_SCRIPT.startsWith("#!/hypertopia/busybox sh\n")) throw new Error("it starts with another line");
  const process = new Deno.Command("sh", { args: ["-n"], stdin: "piped", stdout: "null", stderr: "piped" })
    .spawn();
  const writer = process.stdin.getWriter();
  await writer.write(new TextEncoder().encode(INIT_SCRIPT));
  await writer.close();
  const { success, stderr } = await process.output();
  if (!success) throw new Error(new TextDecoder().decode(stderr));
});
