/** Models: merge several into one, or choose the best checkpoint of a job; both are tasks with progress. */

import { useState } from "preact/hooks";
import { ApiError, get, post } from "../lib/api";
import { bytes } from "../lib/format";
import { useLoad } from "../lib/load";
import { t } from "../lib/prefs";
import { jobLink } from "../lib/router";
import type { Model, Task } from "../lib/types";
import { Empty, Failure } from "../parts/common";
import { TaskCard } from "../parts/task";

const METHODS = ["linear", "ties", "dare_linear", "dare_ties", "task_arithmetic", "lora"];
const NEEDS_BASE = new Set(["ties", "dare_linear", "dare_ties", "task_arithmetic"]);

export function Models() {
  const { data, error, again } = useLoad<Model[] | { items: Model[] }>("models", (signal) => get("api/models", {}, signal));
  const [chosen, setChosen] = useState<string[]>([]);
  const [task, setTask] = useState<string | null>(null);
  const list = Array.isArray(data) ? data : (data?.items ?? []);
  const toggle = (path: string) => setChosen((old) => (old.includes(path) ? old.filter((one) => one !== path) : [...old, path]));
  return (
    <>
      <h1>{t("models")}</h1>
      <Failure error={error} />
      {data && !list.length && <Empty>{t("no_models")}</Empty>}
      {list.length > 0 && <p class="dim">{t("merge_how")}</p>}
      {list.length > 0 && (
        <table class="list card">
          <tbody>
            {list.map((model) => (
              <tr key={model.path} data-model={model.path}>
                <td>
                  <input type="checkbox" checked={chosen.includes(model.path)} onChange={() => toggle(model.path)} aria-label={t("choose", { name: model.path })} />
                </td>
                <td class="name">
                  <span>{model.name ?? model.path.split("/").at(-1)}</span>
                  <small class="dim">{model.path}</small>
                </td>
                <td>{model.job && <a href={jobLink(model.job)}>{model.job_name || model.job}</a>}</td>
                <td>{[model.kind, model.step != null ? t("step", { n: model.step }) : ""].filter(Boolean).join(" · ")}</td>
                <td class="num">{bytes(model.size_bytes)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {task && <TaskCard id={task} over={again} />}
      {chosen.length > 0 && <Merge chosen={chosen} started={setTask} />}
    </>
  );
}

function Merge({ chosen, started }: { chosen: string[]; started: (task: string) => void }) {
  const [method, setMethod] = useState("linear");
  const [weights, setWeights] = useState<Record<string, number>>({});
  const [base, setBase] = useState("");
  const [density, setDensity] = useState(0.5);
  const [name, setName] = useState("merged");
  const [error, setError] = useState<ApiError | null>(null);
  const equal = 1 / chosen.length;
  const submit = async (event: Event) => {
    event.preventDefault();
    setError(null);
    const inputs = chosen.map((path) => ({ path, weight: weights[path] ?? equal }));
    try {
      started((await post<Task>("api/models/merge", { inputs, method, base: base || null, density, output_name: name })).id);
    } catch (failure) {
      setError(failure as ApiError);
    }
  };
  return (
    <form class="card form" onSubmit={(event) => void submit(event)}>
      <h2>{t("merge")}</h2>
      {chosen.map((path) => (
        <label key={path}>
          <span>{t("weight_of", { name: path.split("/").slice(-2).join("/") })}</span>
          <input type="number" step="any" value={weights[path] ?? Number(equal.toFixed(4))} onInput={(event) => setWeights({ ...weights, [path]: event.currentTarget.valueAsNumber })} />
        </label>
      ))}
      <label>
        <span>{t("method")}</span>
        <select value={method} onChange={(event) => setMethod(event.currentTarget.value)}>
          {METHODS.map((one) => (
            <option key={one}>{one}</option>
          ))}
        </select>
      </label>
      {(NEEDS_BASE.has(method) || chosen.some((path) => path.endsWith(".ckpt"))) && (
        <label>
          <span>{t("base_model")}</span>
          <input value={base} onInput={(event) => setBase(event.currentTarget.value)} />
        </label>
      )}
      {NEEDS_BASE.has(method) && method !== "task_arithmetic" && (
        <label>
          <span>{t("density")}</span>
          <input type="number" min={0.01} max={1} step="any" value={density} onInput={(event) => setDensity(event.currentTarget.valueAsNumber)} />
        </label>
      )}
      <label>
        <span>{t("output_name")}</span>
        <input required value={name} onInput={(event) => setName(event.currentTarget.value)} />
      </label>
      <Failure error={error} />
      <button class="primary">{t("merge")}</button>
    </form>
  );
}
