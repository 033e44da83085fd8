/** Checkpoints with their evaluations: continue from one, fetch one. */

import { post, url } from "../lib/api";
import { bytes, plain, when } from "../lib/format";
import { prefs, t } from "../lib/prefs";
import { go, jobLink } from "../lib/router";
import type { Feed } from "../lib/feed";
import type { Job } from "../lib/types";
import { Action, Empty } from "../parts/common";

export function Checkpoints({ feed }: { feed: Feed }) {
  const path = `api/jobs/${encodeURIComponent(feed.id)}`;
  const resume = (checkpoint: string | number) => async () => go(jobLink((await post<Job>(`${path}/resume`, { checkpoint: String(checkpoint) })).uuid));
  const ours = feed.job?.source === "platform";
  if (!feed.checkpoints.length) return <Empty>{t("no_checkpoints")}</Empty>;
  return (
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
              {Object.entries(one.eval_results ?? {}).map(([name, value]) => (
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
  );
}
