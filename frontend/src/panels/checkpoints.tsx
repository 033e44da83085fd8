/** Checkpoints with their evaluations: continue from one, fetch one, export the best. */

import { useState } from "preact/hooks";
import { post, url } from "../lib/api";
import { bytes, plain, when } from "../lib/format";
import { prefs, t } from "../lib/prefs";
import { go, jobLink } from "../lib/router";
import type { Feed } from "../lib/feed";
import type { Checkpoint, Job, Task } from "../lib/types";
import { Action, Empty } from "../parts/common";
import { TaskCard } from "../parts/task";

export function Checkpoints({ feed }: { feed: Feed }) {
  const path = `api/jobs/${encodeURIComponent(feed.id)}`;
  const resume = (checkpoint: string | number) => async () => go(jobLink((await post<Job>(`${path}/resume`, { checkpoint })).uuid));
  const ours = feed.job?.source === "platform";
  if (!feed.checkpoints.length) return <Empty>{t("no_checkpoints")}</Empty>;
  return (
    <>
      <Best feed={feed} />
      <table class="list card" aria-label={t("tab.checkpoints")}>
        <thead>
          <tr>
            <th class="num">{t("step_label")}</th>
            <th>{t("path")}</th>
            <th>{t("evaluation")}</th>
            <th class="num">{t("size")}</th>
            <th>{t("created")}</th>
            <th aria-label={t("actions")} />
          </tr>
        </thead>
        <tbody>
          {[...feed.checkpoints].reverse().map((one) => (
            <tr key={one.id} data-checkpoint={one.step}>
              <td class="num" data-label={t("step_label")}>
                {one.step}
              </td>
              <td class="name">
                <span>
                  {one.path.split("/").at(-1)} {one.is_best && <span class="chip s-succeeded">★ {t("best")}</span>}
                  {!one.exists && <span class="chip s-failed">{t("gone")}</span>}
                </span>
                <small class="dim">
                  {one.kind} {one.path}
                </small>
              </td>
              <td>
                {results(one).map(([name, value]) => (
                  <span key={name} class="score">
                    <span class="dim">{name}</span> <b>{plain(value)}</b>
                  </span>
                ))}
              </td>
              <td class="num">{bytes(one.size_bytes)}</td>
              <td class="dim">{when(one.created_at, prefs.language)}</td>
              <td class="row">
                {ours && one.exists && <Action run={resume(one.id)}>{t("resume_here")}</Action>}
                {one.exists && (
                  <a class="button" href={url(`${path}/checkpoints/${encodeURIComponent(one.id)}/download`)} download>
                    {t("download")}
                  </a>
                )}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </>
  );
}

/** At most four results, those that say the same left out: an average over one data set is that of the set. */
function results({ eval_results }: Checkpoint): [string, unknown][] {
  const found = Object.entries(eval_results ?? {});
  return found.filter(([, value], i) => found.findIndex(([, other]) => other === value) === i).slice(0, 4);
}

/** Choose the best checkpoint by one of its evaluations, and export its weights. */
function Best({ feed }: { feed: Feed }) {
  const names = [...new Set(feed.checkpoints.flatMap((one) => Object.keys(one.eval_results ?? {})))].sort();
  const [metric, setMetric] = useState(names[0] ?? "");
  const [chosen, setMode] = useState<string | null>(null);
  const mode = chosen ?? (/loss|perplexity|error/.test(metric || names[0] || "") ? "min" : "max");
  const [task, setTask] = useState<string | null>(null);
  if (!names.length) return null;
  const select = async () => setTask((await post<Task>("api/models/select", { job: feed.id, metric: metric || names[0], mode, top_k: 1, export: "full" })).id);
  return (
    <>
      <div class="row controls">
        <label>
          {t("evaluation")}
          <select value={metric || names[0]} onChange={(event) => setMetric(event.currentTarget.value)}>
            {names.map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </label>
        <select aria-label={t("sort")} value={mode} onChange={(event) => setMode(event.currentTarget.value)}>
          <option value="max">{t("highest")}</option>
          <option value="min">{t("lowest")}</option>
        </select>
        <Action run={select}>{t("export_best")}</Action>
      </div>
      {task && <TaskCard id={task} over={() => void feed.read()} />}
    </>
  );
}
