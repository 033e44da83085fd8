/** A new job: the form is what the service's own schema asks for; checking it shows problems, command and YAML before anything starts. */

import { useEffect, useState } from "preact/hooks";
import { ApiError, call, get, post } from "../lib/api";
import { plain } from "../lib/format";
import { useLoad } from "../lib/load";
import { t } from "../lib/prefs";
import { go, jobLink } from "../lib/router";
import { body, fields, typed, type Field, type Schema } from "../lib/schema";
import type { Job } from "../lib/types";
import { Empty, Failure } from "../parts/common";

interface OpenApi extends Schema {
  paths: Record<string, { post?: { requestBody?: { content: Record<string, { schema: Schema }> } } }>;
}

interface Form {
  list: Field[];
  values: Record<string, unknown>;
}

const BASIC = ["name", "description", "template", "algorithm", "model_path", "model_size", "train_data_path", "eval_data_path", "num_gpus"];

/** The fields, filled with their defaults or with those of another job. */
async function read(from: string | null, signal: AbortSignal): Promise<Form> {
  const root = await get<OpenApi>("api/openapi.json", {}, signal);
  const schema = root.paths["/api/jobs"]?.post?.requestBody?.content["application/json"]?.schema ?? {};
  const list = fields(schema, root);
  const values: Record<string, unknown> = Object.fromEntries(list.map(({ name, initial }) => [name, initial]));
  const job = from ? await get<Job>(`api/jobs/${encodeURIComponent(from)}`, {}, signal) : null;
  for (const { name } of job ? list : []) if (job![name] !== undefined) values[name] = job![name];
  return { list, values };
}

export function NewJob({ from }: { from: string | null }) {
  const { data, error } = useLoad<Form>(from ?? "", (signal) => read(from, signal));
  const [values, setValues] = useState<Record<string, unknown>>({});
  const [failure, setFailure] = useState<ApiError | null>(null);
  useEffect(() => {
    if (data) setValues(data.values);
  }, [data]);
  if (!data) return error ? <Failure error={error} /> : <Empty>{t("loading")}</Empty>;
  const set = (name: string) => (value: unknown) => setValues((old) => ({ ...old, [name]: value }));
  const submit = async (event: Event) => {
    event.preventDefault();
    setFailure(null);
    try {
      const job = await post<Job>("api/jobs", body(data.list, values));
      if (from) await call("DELETE", `api/jobs/${encodeURIComponent(from)}`);
      go(jobLink(job.uuid));
    } catch (refused) {
      setFailure(refused as ApiError);
    }
  };
  const basic = data.list.filter(({ name, required }) => required || BASIC.includes(name));
  const more = data.list.filter((field) => !basic.includes(field));
  const wrong = new Map(failure?.details.map(({ field, problem }) => [field, problem]));
  const input = (field: Field) => <Input key={field.name} field={field} value={values[field.name]} set={set(field.name)} problem={wrong.get(field.name)} />;
  return (
    <form class="form card" onSubmit={(event) => void submit(event)} data-form>
      <h1>{t(from ? "edit_job" : "new_job")}</h1>
      <fieldset>
        <legend>{t("form.basic")}</legend>
        {basic.map(input)}
      </fieldset>
      <details open={more.some(({ name }) => wrong.has(name))}>
        <summary>{t("form.more")}</summary>
        {more.map(input)}
      </details>
      <Failure error={failure} />
      <p class="dim">{t("form.note")}</p>
      <button class="primary">{t("form.create")}</button>
    </form>
  );
}

interface InputProps {
  field: Field;
  value: unknown;
  set: (value: unknown) => void;
  problem?: string;
}

function Input({ field, value, set, problem }: InputProps) {
  const { name, kind, help, required, choices } = field;
  const id = `field-${name}`;
  const shared = { id, name, required, "aria-describedby": `${id}-help`, "aria-invalid": problem ? true : undefined };
  const hint = [help, field.initial === null || kind === "map" || kind === "switch" ? "" : t("form.default", { value: plain(field.initial) })].filter(Boolean).join(" · ");
  if (kind === "map") return <MapInput field={field} value={(value ?? {}) as Record<string, unknown>} set={set} />;
  return (
    <label class={kind === "switch" ? "check" : ""}>
      <span>
        <code>{name}</code>
        {required ? " *" : ""}
      </span>
      {kind === "choice" ? (
        <select {...shared} value={String(value ?? "")} onChange={(event) => set(event.currentTarget.value)}>
          {!required && <option value="" />}
          {choices.map((one) => (
            <option key={one}>{one}</option>
          ))}
        </select>
      ) : kind === "switch" ? (
        <input {...shared} required={false} type="checkbox" checked={Boolean(value)} onChange={(event) => set(event.currentTarget.checked)} />
      ) : kind === "number" || kind === "integer" ? (
        <input {...shared} type="number" step={kind === "integer" ? 1 : "any"} min={field.minimum} max={field.maximum} value={value === null || value === undefined ? "" : String(value)} onInput={(event) => set(event.currentTarget.value)} />
      ) : (
        <input {...shared} type="text" value={Array.isArray(value) ? value.join(", ") : String(value ?? "")} onInput={(event) => set(event.currentTarget.value)} />
      )}
      <small class={problem ? "warn" : "dim"} id={`${id}-help`}>
        {problem ?? hint}
      </small>
    </label>
  );
}

/** Settings by dotted keys: rows of key and value. */
function MapInput({ field, value, set }: Pick<InputProps, "field" | "set"> & { value: Record<string, unknown> }) {
  const [rows, setRows] = useState<[string, string][]>(() => Object.entries(value).map(([key, one]) => [key, typeof one === "string" ? one : JSON.stringify(one)]));
  const keep = (next: [string, string][]) => {
    setRows(next);
    set(Object.fromEntries(next.filter(([key]) => key.trim()).map(([key, text]) => [key.trim(), typed(text)])));
  };
  const change = (at: number, part: 0 | 1, text: string) => keep(rows.map((row, i) => (i === at ? ((part ? [row[0], text] : [text, row[1]]) as [string, string]) : row)));
  return (
    <fieldset class="map" data-map={field.name}>
      <legend>
        <code>{field.name}</code> <small class="dim">{field.help || t("form.overrides")}</small>
      </legend>
      {rows.map(([key, text], i) => (
        <div class="row" key={i}>
          <input aria-label={t("form.key")} placeholder="model.init_args.optimizer.init_args.lr" value={key} onInput={(event) => change(i, 0, event.currentTarget.value)} />
          <input aria-label={t("form.value")} value={text} onInput={(event) => change(i, 1, event.currentTarget.value)} />
          <button type="button" class="small" aria-label={t("delete")} onClick={() => keep(rows.filter((_, at) => at !== i))}>
            ✕
          </button>
        </div>
      ))}
      <button type="button" class="small" onClick={() => setRows([...rows, ["", ""]])}>
        {t("form.add")}
      </button>
    </fieldset>
  );
}
