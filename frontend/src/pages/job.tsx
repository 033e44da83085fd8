/** One job: what it is doing, in tabs, and what can be done with it. */

import { useEffect, useRef, useState } from "preact/hooks";
import { call, post } from "../lib/api";
import { between, duration, when } from "../lib/format";
import { useFeed, type Feed } from "../lib/feed";
import { ACTIVE, hasPanel } from "../lib/names";
import { prefs, t, type Word } from "../lib/prefs";
import { go, jobLink } from "../lib/router";
import type { Job } from "../lib/types";
import { AllCharts } from "../panels/charts";
import { Checkpoints } from "../panels/checkpoints";
import { Config } from "../panels/config";
import { GroupPanel, LossPanel, RewardPanel, Tiles, TimePanel, TrustPanel } from "../panels/curves";
import { JobGpus } from "../panels/gpus";
import { Log } from "../panels/log";
import { Samples } from "../panels/samples";
import { Action, AlertLine, Bar, Empty, Failure, Problems, StateChip } from "../parts/common";
import { share } from "./jobs";

const TABS = ["overview", "charts", "samples", "log", "checkpoints", "config"] as const;
type Tab = (typeof TABS)[number];

export function JobPage({ id, tab }: { id: string; tab: string }) {
  const feed = useFeed(id);
  const [smoothing, setSmoothing] = useState(0);
  useEffect(() => {
    document.title = feed.job ? `${feed.job.name || id} · lit-rl` : "lit-rl";
    return () => void (document.title = "lit-rl");
  }, [feed.job?.name]);
  const shown: Tab = TABS.find((one) => one === tab) ?? "overview";
  if (!feed.job) return feed.error ? <Failure error={feed.error} /> : <Empty>{t("loading")}</Empty>;
  return (
    <>
      <Head job={feed.job} again={() => void feed.read()} />
      {feed.connection === "waiting" && (
        <div class="banner" role="status">
          {t("reconnecting")}
        </div>
      )}
      <Failure error={feed.error} />
      {(feed.job.problems?.length ?? 0) > 0 && !ACTIVE.has(feed.job.state) && (
        <div class="banner warn" data-problems>
          <strong>{t("problems_before_start")}</strong>
          <Problems list={feed.job.problems!} />
        </div>
      )}
      <Alerts feed={feed} />
      <Tabs id={id} shown={shown} />
      <div role="tabpanel" aria-label={t(`tab.${shown}` as Word)}>
        {(shown === "overview" || shown === "charts") && feed.series.size > 0 && (
          <label class="smoothing">
            {t("smoothing")}
            <input type="range" min={0} max={0.98} step={0.02} value={smoothing} onInput={(event) => setSmoothing(event.currentTarget.valueAsNumber)} />
            <output>{smoothing.toFixed(2)}</output>
          </label>
        )}
        {shown === "overview" && <Overview feed={feed} smoothing={smoothing} />}
        {shown === "charts" && <AllCharts feed={feed} smoothing={smoothing} />}
        {shown === "samples" && <Samples feed={feed} />}
        {shown === "log" && <Log feed={feed} />}
        {shown === "checkpoints" && <Checkpoints feed={feed} />}
        {shown === "config" && (feed.job.source === "external" ? <Empty>{t("no_config")}</Empty> : <Config feed={feed} />)}
      </div>
    </>
  );
}

function Head({ job, again }: { job: Job; again: () => void }) {
  const path = `api/jobs/${encodeURIComponent(job.uuid)}`;
  const active = ACTIVE.has(job.state);
  const ours = job.source === "platform"; // who else started a run stops it
  const act = (what: string, body: unknown = {}) => async () => {
    await post(`${path}/${what}`, body);
    again();
  };
  const follow = (what: string, body: unknown = {}) => async () => go(jobLink((await post<Job>(`${path}/${what}`, body)).uuid));
  const remove = async () => {
    await call("DELETE", path, { query: { files: false } });
    go("#/");
  };
  const { step, max_steps, eta_s } = job.progress ?? { step: null, max_steps: null, eta_s: null };
  return (
    <header class="jobhead">
      <div class="head">
        <h1>
          {job.name || job.uuid} <StateChip job={job} />
        </h1>
        <div class="row">
          {job.state === "created" && (
            <Action kind="primary" run={act("start")}>
              {t("start")}
            </Action>
          )}
          {job.state === "created" && !job.parent_uuid && (
            <a class="button" href={`#/new?from=${encodeURIComponent(job.uuid)}`}>
              {t("edit")}
            </a>
          )}
          {ours && active && job.state !== "stopping" && (
            <Action kind="primary" run={act("stop", { mode: "graceful" })}>
              {t("stop")}
            </Action>
          )}
          {ours && active && job.state !== "queued" && (
            <Action kind="danger" confirm={t("kill_sure")} run={act("stop", { mode: "now" })}>
              {t("kill")}
            </Action>
          )}
          {ours && !active && job.state !== "created" && (
            <Action kind="primary" run={follow("resume", { checkpoint: "last" })}>
              {t("resume")}
            </Action>
          )}
          {ours && <Action run={follow("clone")}>{t("clone")}</Action>}
          {job.parent_uuid && (
            <a class="button" href={`#/compare?jobs=${encodeURIComponent(job.parent_uuid)},${encodeURIComponent(job.uuid)}`}>
              {t("compare_parent")}
            </a>
          )}
          {(!active || !ours) && (
            <Action kind="danger" confirm={t("delete_sure", { name: job.name })} run={remove}>
              {t("delete")}
            </Action>
          )}
        </div>
      </div>
      {job.description && <p>{job.description}</p>}
      <dl class="facts">
        <Fact name="algorithm" value={job.algorithm} />
        <Fact name="model" value={job.model_path} />
        <Fact name="duration" value={job.started_at ? duration(between(job.started_at, job.ended_at)) : null} />
        <Fact name="remaining" value={active && eta_s != null ? duration(eta_s) : null} />
        <Fact name="created" value={when(job.created_at, prefs.language)} />
        <Fact name="gpus" value={job.gpu_ids?.length ? job.gpu_ids.join(", ") : null} />
        <Fact name="reason" value={job.exit?.reason ?? null} />
      </dl>
      {step != null && (
        <div class="row progress">
          {max_steps ? <Bar value={share(job)} label={t("progress")} /> : null}
          <span data-step>{t("step", { n: max_steps ? `${step} / ${max_steps}` : step })}</span>
        </div>
      )}
    </header>
  );
}

function Fact({ name, value }: { name: string; value: string | null | undefined }) {
  if (!value) return null;
  return (
    <div>
      <dt>{t(`fact.${name}` as Word)}</dt>
      <dd>{value}</dd>
    </div>
  );
}

function Alerts({ feed }: { feed: Feed }) {
  if (!feed.alerts.length) return null;
  const newest = [...feed.alerts].reverse().sort((a, b) => Number(Boolean(a.ended_at)) - Number(Boolean(b.ended_at)));
  const open = newest.filter((alert) => !alert.ended_at).length;
  return (
    <details class={`banner${open ? " warn" : ""}`} data-alerts open={open > 0}>
      <summary>{open ? t("alerts_n", { n: open }) : t("alerts_past", { n: newest.length })}</summary>
      <ul>
        {newest.slice(0, 20).map((alert, i) => (
          <li key={alert.id ?? i}>
            <AlertLine alert={alert} />
          </li>
        ))}
      </ul>
    </details>
  );
}

/** Tabs are links; the arrow keys move between them. */
function Tabs({ id, shown }: { id: string; shown: Tab }) {
  const bar = useRef<HTMLElement>(null);
  const move = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const from = TABS.findIndex((tab) => tab === (event.target as HTMLElement).dataset.tab); // two quick presses are two tabs
    const next = TABS[(from + by + TABS.length) % TABS.length]!;
    go(jobLink(id, next));
    bar.current!.querySelector<HTMLElement>(`[data-tab=${next}]`)!.focus();
  };
  return (
    <nav class="tabs" role="tablist" ref={bar} onKeyDown={move}>
      {TABS.map((tab) => (
        <a key={tab} role="tab" data-tab={tab} aria-selected={tab === shown} tabIndex={tab === shown ? 0 : -1} href={jobLink(id, tab)}>
          {t(`tab.${tab}` as Word)}
        </a>
      ))}
    </nav>
  );
}

/** What will run, before it does. */
function Plan({ feed }: { feed: Feed }) {
  const nothing = feed.job!.problems?.some(({ field }) => field === "algorithm" || field === "template");
  return (
    <>
      {!nothing && <p data-plan>{t(feed.job!.problems?.length ? "not_ready" : "ready")}</p>}
      <Config feed={feed} />
    </>
  );
}

function Overview({ feed, smoothing }: { feed: Feed; smoothing: number }) {
  if (feed.job!.state === "created") return <Plan feed={feed} />;
  if (!feed.series.size) return <Empty>{t("no_metrics")}</Empty>;
  return (
    <>
      {![...feed.series.keys()].some(hasPanel) && <AllCharts feed={feed} smoothing={smoothing} />}
      <Tiles feed={feed} />
      <RewardPanel feed={feed} smoothing={smoothing} />
      <GroupPanel feed={feed} smoothing={smoothing} />
      <TrustPanel feed={feed} smoothing={smoothing} />
      <LossPanel feed={feed} smoothing={smoothing} />
      <TimePanel feed={feed} smoothing={smoothing} />
      <JobGpus feed={feed} />
    </>
  );
}
