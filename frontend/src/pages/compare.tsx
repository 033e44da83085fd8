/** Several jobs side by side: where their settings differ, and their curves over each other. */

import { useState } from "preact/hooks";
import { get } from "../lib/api";
import { plain } from "../lib/format";
import { useLoad } from "../lib/load";
import { CANONICAL, NORMAL, isEvaluation } from "../lib/names";
import { t, told } from "../lib/prefs";
import { jobLink } from "../lib/router";
import { distinct, fromAnswer, type Series } from "../lib/series";
import type { Job, SeriesAnswer } from "../lib/types";
import { Empty, Failure, StateChip } from "../parts/common";
import { Plot } from "../parts/plot";

interface Compared {
  config_diff: Record<string, Record<string, unknown>>;
  summary: Record<string, Record<string, unknown>>;
}

interface Side {
  job: Job;
  series: Map<string, Series>;
}

async function read(ids: string[], signal: AbortSignal): Promise<[Compared, Side[]]> {
  const sides = ids.map(async (id) => {
    const path = `api/jobs/${encodeURIComponent(id)}`;
    const [job, series] = await Promise.all([get<Job>(path, {}, signal), get<Record<string, SeriesAnswer>>(`${path}/series`, { points: 500 }, signal)]);
    return { job, series: new Map(Object.entries(series).map(([name, answer]) => [name, fromAnswer(answer)])) };
  });
  return [await get<Compared>("api/compare", { jobs: ids.join(",") }, signal), await Promise.all(sides)];
}

export function Compare({ ids }: { ids: string[] }) {
  const { data, error } = useLoad(ids.join(","), (signal) => read(ids, signal));
  const [all, setAll] = useState(false);
  const [smoothing, setSmoothing] = useState(0);
  if (error) return <Failure error={error} />;
  if (!data) return <Empty>{t("loading")}</Empty>;
  const [{ config_diff, summary }, sides] = data;
  const names = [...new Set(sides.flatMap(({ series }) => [...series.keys()]))].sort();
  const canonical = names.filter((name) => (CANONICAL as readonly string[]).includes(name) || name === "zero_std_ratio");
  const evaluations = distinct(names.filter(isEvaluation), (name) => sides.map(({ series }) => series.get(name)));
  const first = [...canonical, ...evaluations];
  const label = (side: Side) => (sides.filter(({ job }) => job.name === side.job.name).length > 1 ? `${side.job.name} (${side.job.uuid.slice(0, 8)})` : side.job.name);
  return (
    <>
      <h1>{t("compare")}</h1>
      <ul class="tiles">
        {sides.map((side, i) => (
          <li key={side.job.uuid} class="card tile">
            <a href={jobLink(side.job.uuid)}>
              <i class={`swatch c${(i % 8) + 1}`} /> {label(side)}
            </a>
            <StateChip job={side.job} />
          </li>
        ))}
      </ul>
      <h2>{t("config_diff")}</h2>
      <Table rows={config_diff} sides={sides} label={label} none={t("no_difference")} id="diff" />
      <div class="row controls">
        <label class="smoothing">
          {t("smoothing")}
          <input type="range" min={0} max={0.98} step={0.02} value={smoothing} onInput={(event) => setSmoothing(event.currentTarget.valueAsNumber)} />
        </label>
        <label class="check">
          <input type="checkbox" checked={all} onChange={(event) => setAll(event.currentTarget.checked)} />
          {t("all_metrics")}
        </label>
      </div>
      <div class="grid">
        {(all ? names : first).map((name) => (
          <Plot
            key={name}
            title={told("metric", name)}
            lines={sides.flatMap((side, i) => (side.series.has(name) ? [{ name: label(side), series: side.series.get(name)!, color: i + 1 }] : []))}
            normal={NORMAL[name]}
            smoothing={smoothing}
            sync="compare"
          />
        ))}
      </div>
      <h2>{t("summary")}</h2>
      <Table rows={turned(summary)} sides={sides} label={label} none={t("no_metrics")} id="summary" />
    </>
  );
}

/** {job: {metric: value}} -> {metric: {job: value}}. */
function turned(summary: Compared["summary"]): Record<string, Record<string, unknown>> {
  const rows: Record<string, Record<string, unknown>> = {};
  for (const [job, values] of Object.entries(summary ?? {}))
    for (const [name, value] of Object.entries(values ?? {})) (rows[name] ??= {})[job] = value;
  return rows;
}

function Table(props: { rows: Record<string, Record<string, unknown>>; sides: Side[]; label: (side: Side) => string; none: string; id: string }) {
  const rows = Object.entries(props.rows ?? {});
  if (!rows.length) return <Empty>{props.none}</Empty>;
  return (
    <div class="scroll card">
      <table class="diff" data-table={props.id}>
        <thead>
          <tr>
            <th>{t("key")}</th>
            {props.sides.map((side) => (
              <th key={side.job.uuid}>{props.label(side)}</th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(([key, values]) => (
            <tr key={key}>
              <th scope="row">
                <code>{key}</code>
              </th>
              {props.sides.map(({ job }) => (
                <td key={job.uuid}>{plain(values[job.uuid])}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
