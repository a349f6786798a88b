/**
 * Image, kernel and engine choices: plain options with the shape that checks them. What they do lives elsewhere.
 *
 * @module
 */

import { custom, isPlainObject, type Schema } from "./schema.ts";

/** A choice of one variant with its options, such as an image source or an engine. */
export class Choice<Category extends string> {
  /** Keeps {@linkcode Inputs} from taking it apart. */
  readonly isDeclaration = true;
  /** What is chosen: `image`, `kernel` or `engine`. */
  readonly category: Category;
  /** The variant, such as `debian` or `qemu`. */
  readonly type: string;
  /** Options as the user wrote them. */
  readonly options: unknown;
  /** Shape of the options. */
  readonly schema: Schema<unknown>;

  /**
   * Chooses a variant.
   *
   * @param category What is chosen
   * @param type The variant
   * @param schema Shape of the options
   * @param options Options as the user wrote them
   */
  constructor(category: Category, type: string, schema: Schema<unknown>, options: unknown) {
    this.category = category;
    this.type = type;
    this.schema = schema;
    this.options = options;
    Object.freeze(this);
  }
}

/** Where a machine's root file system and kernel come from. */
export type ImageSource = Choice<"image">;

/** Where a machine's kernel comes from, when not from its image. */
export type KernelSource = Choice<"kernel">;

/** Marks images and kernels of one architecture. The mark is for the compiler only: at run time nothing has it. */
export interface ArchitectureMark<A extends string> {
  /** The architecture, for the compiler only: never there at run time. */
  readonly arch?: A;
}

/**
 * The mark of an image or a kernel whose option `arch` has the type `A`. There is none where the value is known at run
 * time only, and none where the engine decides: the planner checks those.
 */
export type OfArchitecture<A extends string> = [A] extends ["amd64"] ? ArchitectureMark<"amd64">
  : [A] extends ["i386"] ? ArchitectureMark<"i386">
  : unknown;

/** Which hypervisor runs a machine. */
export type EngineChoice = Choice<"engine">;

/** Normal form of a {@linkcode Choice}: its type beside its options. */
export interface Chosen {
  /** The variant. */
  readonly type: string;
  /** Its options. */
  readonly [option: string]: unknown;
}

/**
 * A field that takes a {@linkcode Choice} of some category.
 *
 * @param category What is chosen
 * @param example A call that makes one, for messages
 * @returns The schema; its normal form is {@linkcode Chosen}
 */
export function choice<Category extends string>(
  category: Category,
  example: string,
): Schema<Choice<Category>> {
  return custom(`an ${category} such as ${example}`, (value, field, report) => {
    if (value instanceof Choice && value.category === category) {
      const options = value.schema.check(value.options, field, report);
      return { type: value.type, ...(isPlainObject(options) ? options : {}) };
    }
    // Resolved props are checked once more when they come from references: they are in normal form already.
    if (isPlainObject(value) && typeof value.type === "string") return value;
    report(field, `Value must come from a function such as ${example}`, value);
    return value;
  });
}
