/** A new job: the form is what the service's schema and the method's own constructor ask for; checking it shows problems before anything starts. */

import { useEffect, useState } from "preact/hooks";
import { ApiError, call, get, post } from "../lib/api";
import { useLoad } from "../lib/load";
import { t } from "../lib/prefs";
import { go, jobLink } from "../lib/router";
import { body, fields, optionFields, type Field, type Option, type Schema } from "../lib/schema";
import type { Job } from "../lib/types";
import { Empty, Failure } from "../parts/common";
import { Input, MapInput } from "../parts/inputs";

interface OpenApi extends Schema {
  paths: Record<string, { post?: { requestBody?: { content: Record<string, { schema: Schema }> } } }>;
}

interface Method {
  algorithm: string;
  templates: string[];
}

interface Form {
  list: Field[];
  values: Values;
  methods: Method[];
}

type Values = Record<string, unknown>;

const BASIC = ["name", "algorithm", "template", "model_path", "train_data_path", "eval_data_path", "num_gpus", "description"];

/** The fields, filled with their defaults or with those of another job. */
async function read(from: string | null, signal: AbortSignal): Promise<Form> {
  const [root, methods] = await Promise.all([get<OpenApi>("api/openapi.json", {}, signal), get<Method[]>("api/algorithms", {}, signal)]);
  const schema = root.paths["/api/jobs"]?.post?.requestBody?.content["application/json"]?.schema ?? {};
  const list = fields(schema, root);
  const values: Values = Object.fromEntries(list.map(({ name, initial }) => [name, initial]));
  const job = from ? await get<Job>(`api/jobs/${encodeURIComponent(from)}`, {}, signal) : null;
  for (const { name } of job ? list : []) if (job![name] !== undefined) values[name] = job![name];
  return { list, values, methods };
}

/** The field with the choices that the methods leave it. */
function chosen(field: Field, values: Values, methods: Method[]): Field {
  if (field.name === "algorithm") return { ...field, kind: "choice", choices: methods.map(({ algorithm }) => algorithm) };
  if (field.name !== "template") return field;
  return { ...field, kind: "choice", choices: methods.find(({ algorithm }) => algorithm === values.algorithm)?.templates ?? [] };
}

export function NewJob({ from }: { from: string | null }) {
  const { data, error } = useLoad<Form>(from ?? "", (signal) => read(from, signal));
  const [values, setValues] = useState<Values>({});
  const [failure, setFailure] = useState<ApiError | null>(null);
  useEffect(() => {
    if (data) setValues(data.values);
  }, [data]);
  if (!data) return error ? <Failure error={error} /> : <Empty>{t("loading")}</Empty>;
  const set = (name: string) => (value: unknown) => setValues((old) => ({ ...old, [name]: value, ...(name === "algorithm" ? { template: null } : {}) }));
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
  const wrong = new Map(failure?.details.map(({ field, problem }) => [field, problem]));
  const place = ({ name }: Field) => (BASIC.indexOf(name) + 1 || BASIC.length + 1);
  const basic = data.list.filter(({ name, required }) => required || BASIC.includes(name)).sort((a, b) => place(a) - place(b));
  const more = data.list.filter((field) => !basic.includes(field) && field.kind !== "map");
  const input = (field: Field) => (
    <Input key={field.name} field={chosen(field, values, data.methods)} value={values[field.name]} set={set(field.name)} problem={wrong.get(field.name)} />
  );
  return (
    <form class="form card" onSubmit={(event) => void submit(event)} data-form>
      <h1>{t(from ? "edit_job" : "new_job")}</h1>
      <fieldset>
        <legend>{t("form.basic")}</legend>
        {basic.map(input)}
      </fieldset>
      <details open={more.some(({ name }) => wrong.has(name))} data-more>
        <summary>{t("form.more")}</summary>
        {more.map(input)}
      </details>
      {data.list
        .filter(({ kind }) => kind === "map")
        .map((field) => (
          <Settings key={`${field.name}|${values.algorithm}|${values.template}`} field={field} values={values} set={set(field.name)} />
        ))}
      <Failure error={failure} />
      <p class="dim">{t("form.note")}</p>
      <button class="primary">{t("form.create")}</button>
    </form>
  );
}

interface MethodForm {
  template: string;
  parts: Record<string, { class_path: string; help: string; options: Option[] }>;
}

/** Keys of the run's YAML: those of the method's constructor as inputs, any others as rows of key and value. */
function Settings({ field, values, set }: { field: Field; values: Values; set: (value: unknown) => void }) {
  const algorithm = String(values.algorithm ?? "");
  const { data } = useLoad<MethodForm | null>(algorithm, async (signal) =>
    algorithm ? get<MethodForm>(`api/algorithms/${encodeURIComponent(algorithm)}/form`, { template: values.template as string | null }, signal) : null,
  );
  const parts = Object.values(data?.parts ?? {}).map(({ class_path, options }) => ({ title: class_path.split(".").at(-1)!, own: optionFields(options) }));
  const names = new Set(parts.flatMap(({ own }) => own.map(({ name }) => name)));
  const value = (values[field.name] ?? {}) as Values;
  const change = (one: Field) => (given: unknown) => {
    const { [one.name]: _, ...others } = value;
    const [[, read] = []] = Object.entries(body([one], { [one.name]: given }));
    set(read === undefined || read === one.initial ? others : { ...others, [one.name]: read });
  };
  const part = (mine: boolean) => Object.fromEntries(Object.entries(value).filter(([key]) => names.has(key) === mine));
  return (
    <details data-settings>
      <summary>{data ? t("form.settings_of", { name: parts.map(({ title }) => title).join(", ") }) : t("form.overrides")}</summary>
      {parts.map(({ title, own }) => (
        <fieldset key={title}>
          <legend>{title}</legend>
          {own.map((one) => (
            <Input key={one.name} field={one} label={one.name.split(".").at(-1)} value={value[one.name] ?? one.initial} set={change(one)} />
          ))}
        </fieldset>
      ))}
      {(data || !algorithm) && <MapInput field={field} value={part(false)} set={(rows) => set({ ...part(true), ...rows })} />}
    </details>
  );
}
