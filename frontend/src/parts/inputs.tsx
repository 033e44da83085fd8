/** Inputs of a form, by the kind of a field. */

import { useState } from "preact/hooks";
import { plain } from "../lib/format";
import { t } from "../lib/prefs";
import { typed, type Field } from "../lib/schema";

export interface InputProps {
  field: Field;
  value: unknown;
  set: (value: unknown) => void;
  problem?: string;
  /** Shown in the place of the name. */
  label?: string;
}

export function Input({ field, value, set, problem, label }: InputProps) {
  const { name, kind, help, required, choices } = field;
  const id = `field-${name}`;
  const shared = { id, name, required, "aria-describedby": `${id}-help`, "aria-invalid": problem ? true : undefined };
  const hint = [help, field.initial === null || field.initial === "" || (Array.isArray(field.initial) && !field.initial.length) || kind === "map" || kind === "switch" ? "" : t("form.default", { value: plain(field.initial) })].filter(Boolean).join(" · ");
  return (
    <label class={kind === "switch" ? "check" : ""}>
      <span>
        <code>{label ?? name}</code>
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
export function MapInput({ field, value, set }: { field: Field; value: Record<string, unknown>; set: (value: Record<string, unknown>) => void }) {
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
