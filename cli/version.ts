import configuration from "../deno.json" with { type: "json" };

/** Version of this release. */
export const VERSION: string = configuration.version;
