/**
 * Layouts of C structures, as data: each is compared with the C compiler's where one is installed.
 *
 * @module
 */

/** Types of fields, by their width in bits. */
export type FieldType = "u8" | "u16" | "u32" | "u64" | "i32" | "i64";

/** One field: where it begins, and what it is; an array has a count. */
export type Field = readonly [offset: number, type: FieldType, count?: number];

/** A structure. */
export interface Layout<F extends Readonly<Record<string, Field>> = Readonly<Record<string, Field>>> {
  /** Its name in C, such as `struct kvm_regs`. */
  readonly name: string;
  /** Its size in bytes. */
  readonly size: number;
  /** Its fields by the C expression that names them. */
  readonly fields: F;
}

const WIDTHS: Readonly<Record<FieldType, number>> = { u8: 1, u16: 2, u32: 4, u64: 8, i32: 4, i64: 8 };

/** A structure in memory: fields are read and written by name. 64-bit fields are bigints, all others numbers. */
export class Struct<F extends Readonly<Record<string, Field>>> {
  /** Its bytes, for system calls. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #layout: Layout<F>;
  readonly #view: DataView<ArrayBuffer>;

  /**
   * Makes a structure of zeros, or lays one over memory that is there.
   *
   * @param layout The layout
   * @param buffer The memory
   * @param offset Where in the memory it begins
   */
  constructor(layout: Layout<F>, buffer: ArrayBuffer = new ArrayBuffer(layout.size), offset = 0) {
    this.#layout = layout;
    this.bytes = new Uint8Array(buffer, offset, layout.size);
    this.#view = new DataView(buffer, offset, layout.size);
  }

  /**
   * Reads a field.
   *
   * @param name The field
   * @param index Which one of an array
   * @returns Its value
   */
  get(name: keyof F & string, index = 0): bigint {
    const [at, type] = this.#locate(name, index);
    switch (type) {
      case "u8":
        return BigInt(this.#view.getUint8(at));
      case "u16":
        return BigInt(this.#view.getUint16(at, true));
      case "u32":
        return BigInt(this.#view.getUint32(at, true));
      case "i32":
        return BigInt(this.#view.getInt32(at, true));
      case "u64":
        return this.#view.getBigUint64(at, true);
      case "i64":
        return this.#view.getBigInt64(at, true);
    }
  }

  /**
   * Writes a field.
   *
   * @param name The field
   * @param value Its value, which must fit
   * @param index Which one of an array
   */
  set(name: keyof F & string, value: number | bigint, index = 0): void {
    const [at, type] = this.#locate(name, index);
    const bits = WIDTHS[type] * 8;
    const number = BigInt(value);
    const isSigned = type.startsWith("i");
    if (number !== (isSigned ? BigInt.asIntN(bits, number) : BigInt.asUintN(bits, number))) {
      throw new RangeError(
        `Cannot write ${number} to ${this.#layout.name}.${name} as it does not fit in ${bits} bits`,
      );
    }
    switch (type) {
      case "u8":
        return this.#view.setUint8(at, Number(number));
      case "u16":
        return this.#view.setUint16(at, Number(number), true);
      case "u32":
        return this.#view.setUint32(at, Number(number), true);
      case "i32":
        return this.#view.setInt32(at, Number(number), true);
      case "u64":
        return this.#view.setBigUint64(at, number, true);
      case "i64":
        return this.#view.setBigInt64(at, number, true);
    }
  }

  /**
   * Writes several fields.
   *
   * @param values Values by field
   * @returns This structure
   */
  assign(values: { readonly [K in keyof F & string]?: number | bigint }): this {
    for (const [name, value] of Object.entries(values)) {
      if (value !== undefined) this.set(name, value as number | bigint);
    }
    return this;
  }

  #locate(name: string, index: number): readonly [number, FieldType] {
    const field = this.#layout.fields[name];
    const count = field?.[2] ?? 1;
    if (!field || index < 0 || index >= count) {
      throw new RangeError(`Cannot find ${this.#layout.name}.${name}[${index}]`);
    }
    return [field[0] + index * WIDTHS[field[1]], field[1]];
  }
}
