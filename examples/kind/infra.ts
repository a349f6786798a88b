import { cli, kind, number, stack, string, text } from "hypertopia";

/** A kind of our own: text files. Twenty lines make it a resource with a plan, drift and repair. */
export const textFile = kind({
  name: "text_file",
  props: { path: string(), content: string() },
  outputs: { bytes: number() },
  disruption: { content: "live" },
  async observe(files) {
    const found = new Map();
    for (const { address, props } of files) {
      const content = await Deno.readTextFile(props.path).catch(() => undefined);
      if (content !== undefined) found.set(address, { props: { content } });
    }
    return found;
  },
  async ensure({ props }) {
    await Deno.writeTextFile(props.path, props.content);
    return { bytes: new TextEncoder().encode(props.content).length };
  },
  async remove({ props }) {
    await Deno.remove(props.path).catch(() => {});
  },
});

const notes = stack("notes", { folder: "/tmp" }, ({ folder }) => {
  const greeting = textFile({ path: `${folder}/greeting.txt`, content: "Hello\n" });
  const about = textFile({
    path: `${folder}/about.txt`,
    content: text`The greeting has ${greeting.bytes} bytes\n`,
  });
  return { greeting, about };
});

export default notes;
if (import.meta.main) await cli(notes, { kinds: [textFile.kind] });
