/** Fields of a form out of a JSON schema, as pydantic writes it. */

export interface Schema {
  $ref?: string;
  type?: string | string[];
  title?: string;
  description?: string;
  default?: unknown;
  enum?: unknown[];
  const?: unknown;
  examples?: unknown[];
  anyOf?: Schema[];
  allOf?: Schema[];
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  minimum?: number;
  maximum?: number;
  exclusiveMinimum?: number;
  maxLength?: number;
  additionalProperties?: unknown;
  $defs?: Record<string, Schema>;
  components?: { schemas?: Record<string, Schema> };
}

export type Kind = "text" | "number" | "integer" | "switch" | "choice" | "list" | "map";

export interface Field {
  name: string;
  kind: Kind;
  help: string;
  required: boolean;
  initial: unknown;
  choices: string[];
  minimum?: number;
  maximum?: number;
}

/** Follow a reference within the document. */
export function resolve(schema: Schema, root: unknown): Schema {
  if (schema.allOf?.length === 1) return { ...resolve(schema.allOf[0]!, root), ...schema, allOf: undefined };
  if (!schema.$ref) return schema;
  const found = schema.$ref
    .replace(/^#\//, "")
    .split("/")
    .reduce<unknown>((value, key) => (value as Record<string, unknown> | undefined)?.[key], root);
  return resolve({ ...(found as Schema), ...schema, $ref: undefined }, root);
}

function choices(schema: Schema): unknown[] {
  return schema.enum ?? (schema.const === undefined ? [] : [schema.const]);
}

function kind(schema: Schema): Kind {
  const types = [schema.type ?? []].flat();
  if (choices(schema).length) return "choice";
  if (types.includes("boolean")) return "switch";
  if (types.includes("integer") && !types.includes("number")) return "integer";
  if (types.includes("number")) return "number";
  if (types.includes("array")) return "list";
  return types.includes("object") ? "map" : "text";
}

export function fields(schema: Schema, root: unknown = schema): Field[] {
  const whole = resolve(schema, root);
  const required = new Set(whole.required ?? []);
  return Object.entries(whole.properties ?? {}).map(([name, property]) => {
    const own = resolve(property, root);
    const options = (own.anyOf ?? []).map((one) => resolve(one, root)).filter((one) => one.type !== "null");
    const inner = options.length ? { ...options[0]!, description: own.description ?? options[0]!.description } : own;
    return {
      name,
      kind: options.length > 1 && options.some((one) => one.type === "number") ? "number" : kind(inner),
      help: inner.description ?? "",
      required: required.has(name),
      initial: own.default ?? null,
      choices: choices(inner).map(String),
      minimum: inner.minimum ?? inner.exclusiveMinimum,
      maximum: inner.maximum,
    };
  });
}

/** An option of a class of a run, as the service reads it off the signature: type and default are as Python writes them. */
export interface Option {
  key: string;
  name: string;
  type: string;
  default: string | null;
  required: boolean;
  value: unknown;
  help: string;
}

const PYTHON: Record<string, Kind> = { int: "integer", float: "number", bool: "switch", str: "text" };
const LITERALS: Record<string, unknown> = { None: null, True: true, False: false };

function literal(source: string | null): unknown {
  if (source === null || source in LITERALS) return source === null ? null : LITERALS[source];
  return /^'.*'$/.test(source) ? source.slice(1, -1) : typed(source.replaceAll("_", ""));
}

/** The options that are numbers, texts, switches or choices, as fields by key of the run's YAML; what the run file says is their default. */
export function optionFields(options: Option[]): Field[] {
  return options.flatMap(({ key, type, default: otherwise, value, help }) => {
    const plain = type.replace(/ \| None$/, "");
    const choices = [...(/^Literal\[(.*)\]$/.exec(plain)?.[1] ?? "").matchAll(/'([^']*)'/g)].map((found) => found[1]!);
    const kind = choices.length ? "choice" : PYTHON[plain];
    return kind ? [{ name: key, kind, help, required: false, initial: value ?? literal(otherwise), choices }] : [];
  });
}

/** What was typed as JSON, where it is JSON, else as a text: values of settings by dotted keys. */
export function typed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** The body of the request: values that were left empty are left out; numbers are numbers. */
export function body(list: Field[], values: Record<string, unknown>): Record<string, unknown> {
  const result: Record<string, unknown> = {};
  for (const { name, kind: what } of list) {
    const value = values[name];
    if (value === undefined || value === null || value === "") continue;
    if (what === "number" || what === "integer") result[name] = Number(value);
    else if (what === "list") result[name] = Array.isArray(value) ? value : String(value).split(",").map((one) => one.trim()).filter(Boolean);
    else result[name] = value;
  }
  return result;
}
