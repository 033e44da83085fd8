/** All jobs: search, choose some to compare, follow their states live. */

import { useEffect, useRef, useState } from "preact/hooks";
import { get } from "../lib/api";
import { number, when } from "../lib/format";
import { Live } from "../lib/live";
import { useLoad } from "../lib/load";
import { ACTIVE } from "../lib/names";
import { prefs, t, told } from "../lib/prefs";
import { go, jobLink } from "../lib/router";
import type { Job } from "../lib/types";
import { Bar, Empty, Failure, StateChip } from "../parts/common";

const STATES = ["created", "queued", "starting", "running", "stopping", "stopped", "succeeded", "failed"];

interface Page {
  items: Job[];
  next_cursor: string | null;
}

export function share(job: Job): number | null {
  const { step, max_steps } = job.progress ?? { step: null, max_steps: null };
  return step === null || !max_steps ? null : step / max_steps;
}

export function Jobs() {
  const [search, setSearch] = useState("");
  const [state, setState] = useState("");
  const [limit, setLimit] = useState(50);
  const [chosen, setChosen] = useState<string[]>([]);
  const { data, error, again } = useLoad<Page>(`${search}|${state}|${limit}`, (signal) => get("api/jobs", { q: search, state, limit }, signal));
  const read = useRef(again);
  read.current = again;
  useEffect(() => {
    let timer = 0;
    const soon = () => {
      timer ||= window.setTimeout(() => {
        timer = 0;
        read.current();
      }, 300);
    };
    let first = true; // the list is being read already
    const resync = () => {
      if (!first) soon();
      first = false;
    };
    const live = new Live("ws", { frame: (frame) => frame.type === "state" && soon(), resync, connection: () => {} });
    return () => {
      clearTimeout(timer);
      live.close();
    };
  }, []);
  const active = data?.items.some((job) => ACTIVE.has(job.state)) ?? false;
  useEffect(() => {
    const timer = active ? window.setInterval(() => read.current(), 5000) : 0;
    return () => clearInterval(timer);
  }, [active]);
  const toggle = (id: string) => setChosen((old) => (old.includes(id) ? old.filter((one) => one !== id) : [...old, id]));
  return (
    <>
      <header class="head">
        <h1>{t("jobs")}</h1>
        <a class="button primary" href="#/new">
          {t("new_job")}
        </a>
      </header>
      <div class="row controls">
        <label>
          {t("search")}
          <input type="search" value={search} onInput={(event) => setSearch(event.currentTarget.value)} />
        </label>
        <label>
          {t("state_label")}
          <select value={state} onChange={(event) => setState(event.currentTarget.value)}>
            <option value="">{t("all")}</option>
            {STATES.map((one) => (
              <option key={one} value={one}>
                {told("state", one)}
              </option>
            ))}
          </select>
        </label>
        <button type="button" disabled={chosen.length < 2} onClick={() => go(`#/compare?jobs=${chosen.map(encodeURIComponent).join(",")}`)}>
          {t("compare_n", { n: chosen.length })}
        </button>
      </div>
      <Failure error={error} />
      {data && !data.items.length && <Empty>{t(search || state ? "nothing_found" : "no_jobs")}</Empty>}
      {data && data.items.length > 0 && (
        <table class="list card">
          <thead>
            <tr>
              <th aria-label={t("compare")} />
              <th>{t("name")}</th>
              <th>{t("state_label")}</th>
              <th>{t("progress")}</th>
              <th class="num">{told("metric", "reward_mean")}</th>
              <th>{t("created")}</th>
            </tr>
          </thead>
          <tbody>
            {data.items.map((job) => (
              <Row key={job.uuid} job={job} chosen={chosen.includes(job.uuid)} toggle={() => toggle(job.uuid)} />
            ))}
          </tbody>
        </table>
      )}
      {data?.next_cursor && (
        <button type="button" onClick={() => setLimit(limit + 50)}>
          {t("more")}
        </button>
      )}
    </>
  );
}

function Row({ job, chosen, toggle }: { job: Job; chosen: boolean; toggle: () => void }) {
  const step = job.progress?.step;
  return (
    <tr data-job={job.uuid}>
      <td>
        <input type="checkbox" checked={chosen} onChange={toggle} aria-label={t("choose", { name: job.name })} />
      </td>
      <td class="name">
        <a href={jobLink(job.uuid)}>{job.name || job.uuid}</a>
        <small class="dim">
          {[job.algorithm, job.model_path, ...job.tags].filter(Boolean).join(" · ")}
        </small>
      </td>
      <td>
        <StateChip job={job} />
      </td>
      <td class="progress">
        {share(job) !== null && <Bar value={share(job)} label={t("progress")} />}
        <small class="dim">{step === null || step === undefined ? "" : `${step}${job.progress?.max_steps ? ` / ${job.progress.max_steps}` : ""}`}</small>
      </td>
      <td class="num" data-label={told("metric", "reward_mean")}>
        {number(job.last_metrics?.reward_mean)}
      </td>
      <td class="dim">{when(job.created_at, prefs.language)}</td>
    </tr>
  );
}
