/** Panels of curves: what a run learns, from whom the reward comes, whether groups still teach, how far the policy moves, where time goes. */

import { Plot, range, type Line } from "../parts/plot";
import { number, percent } from "../lib/format";
import type { Feed } from "../lib/feed";
import { CANONICAL, NORMAL, isEvaluation, outside, phases, sources } from "../lib/names";
import { t, told } from "../lib/prefs";
import { distinct } from "../lib/series";

const SYNC = "job";
/** Share of pairs that two rewards order in opposite ways, above which the service has an alert. */
const CONTRARY = 0.6;

interface Props {
  feed: Feed;
  smoothing: number;
}

/** The curves of these names that the run has, in this order. */
function lines(feed: Feed, names: string[], extra: Partial<Line> = {}, first = 1): Line[] {
  return names.filter((name) => feed.series.has(name)).map((name, i) => ({ name, series: feed.series.get(name)!, color: first + i, ...extra }));
}

/** The six canonical metrics as numbers, each with a lamp where the guide gives a normal range. */
export function Tiles({ feed }: { feed: Feed }) {
  const names = CANONICAL.filter((name) => feed.latest(name) !== null);
  if (!names.length) return null;
  return (
    <ul class="tiles">
      {names.map((name) => {
        const value = feed.latest(name);
        const side = outside(name, value);
        const normal = NORMAL[name]!;
        return (
          <li key={name} class={`card tile${side ? " warn" : ""}`} data-tile={name}>
            <span class="dim">{told("metric", name)}</span>
            <b>{number(value)}</b>
            <small class="dim">{side ? t(side === "high" ? "above" : "beneath", { range: range(normal) }) : range(normal)}</small>
          </li>
        );
      })}
    </ul>
  );
}

export function RewardPanel({ feed, smoothing }: Props) {
  const found = sources(feed.series.keys());
  const total = lines(feed, ["reward_mean"]);
  const named = [...feed.series.keys()].filter((name) => isEvaluation(name) && /reward|accuracy|score/.test(name));
  const evaluations = distinct(named, (name) => [feed.series.get(name)]).slice(0, 5);
  const shown = [...total, ...lines(feed, evaluations, { dash: true }, 2)];
  if (!shown.length && !found.length) return null;
  return (
    <section>
      <h2>{t("panel.reward")}</h2>
      <div class="grid">
        {shown.length > 0 && <Plot title={told("metric", "reward_mean")} lines={shown} normal={NORMAL.reward_mean} smoothing={smoothing} sync={SYNC} />}
        {found.length > 0 && (
          <Plot
            title={t("panel.by_source")}
            lines={found.map(({ name, mean }, i) => ({ name, series: feed.series.get(mean)!, color: i + 1 }))}
            smoothing={smoothing}
            sync={SYNC}
            note={<SourceTable feed={feed} />}
          />
        )}
      </div>
    </section>
  );
}

function SourceTable({ feed }: { feed: Feed }) {
  return (
    <table class="mini">
      <thead>
        <tr>
          <th>{t("source")}</th>
          <th>{t("mean")}</th>
          <th>{t("failed_share")}</th>
          <th>{t("disagrees")}</th>
        </tr>
      </thead>
      <tbody>
        {sources(feed.series.keys()).map(({ name, mean, failed, disagrees }) => {
          const share = failed ? feed.latest(failed) : null;
          const worst = disagrees.length ? Math.max(...disagrees.map((key) => feed.latest(key) ?? 0)) : null;
          return (
            <tr key={name}>
              <th scope="row">{name}</th>
              <td>{number(feed.latest(mean))}</td>
              <td class={share !== null && share > 0.01 ? "warn" : ""}>{percent(share)}</td>
              <td class={worst !== null && worst > CONTRARY ? "warn" : ""}>{percent(worst)}</td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

export function LossPanel({ feed, smoothing }: Props) {
  const names = ["policy_loss", "value_loss", "loss", "entropy", "lr", "grad_norm"].filter((name) => feed.series.has(name));
  const shown = names.filter((name) => name !== "loss" || !feed.series.has("policy_loss"));
  if (!shown.length) return null;
  return (
    <section>
      <h2>{t("panel.loss")}</h2>
      <div class="grid">
        {shown.map((name) => (
          <Plot key={name} title={told("metric", name)} lines={lines(feed, [name])} normal={NORMAL[name]} smoothing={smoothing} sync={SYNC} />
        ))}
      </div>
    </section>
  );
}

export function GroupPanel({ feed, smoothing }: Props) {
  const zero = ["zero_std_ratio", "group/zero_std_ratio"].find((name) => feed.series.has(name));
  const spread = ["group_std_mean", "group/std_mean", "reward_std"].filter((name) => feed.series.has(name));
  if (!zero) return null;
  const flat = feed.latest(zero);
  return (
    <section>
      <h2>{t("panel.groups")}</h2>
      <div class="grid">
        <Plot
          title={t("panel.zero_std")}
          lines={[{ name: t("panel.zero_std"), series: feed.series.get(zero)!, color: 5, format: percent }]}
          normal={NORMAL.zero_std_ratio}
          smoothing={smoothing}
          sync={SYNC}
          note={flat === null ? null : <span class={flat > 0.8 ? "warn" : ""}>{t("signal_left", { share: percent(1 - flat) })}</span>}
        />
        {spread.length > 0 && <Plot title={t("panel.spread")} lines={lines(feed, spread)} smoothing={smoothing} sync={SYNC} />}
      </div>
    </section>
  );
}

export function TrustPanel({ feed, smoothing }: Props) {
  const kl = ["kl_divergence", "ppo_kl", "kl"].filter((name) => feed.series.has(name));
  const clip = ["clip_fraction", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual"].filter((name) => feed.series.has(name));
  const ratio = [...feed.series.keys()].filter((name) => /ratio/.test(name) && !/zero_std|nan_ratio/.test(name)).slice(0, 5);
  if (!kl.length && !clip.length) return null;
  const says = ["kl_divergence", "clip_fraction"].map((name) => [name, outside(name, feed.latest(name))] as const).filter(([, side]) => side);
  return (
    <section>
      <h2>{t("panel.trust")}</h2>
      {says.map(([name, side]) => (
        <p key={name} class="note warn" data-says={name}>
          {t(`says.${name}.${side}` as Parameters<typeof t>[0], { value: number(feed.latest(name)) })}
        </p>
      ))}
      <div class="grid">
        {kl.length > 0 && <Plot title={told("metric", "kl_divergence")} lines={lines(feed, kl)} normal={NORMAL.kl_divergence} smoothing={smoothing} sync={SYNC} />}
        {clip.length > 0 && <Plot title={told("metric", "clip_fraction")} lines={lines(feed, clip)} normal={NORMAL.clip_fraction} smoothing={smoothing} sync={SYNC} />}
        {ratio.length > 0 && <Plot title={t("panel.ratio")} lines={lines(feed, ratio)} smoothing={smoothing} sync={SYNC} />}
      </div>
    </section>
  );
}

export function TimePanel({ feed, smoothing }: Props) {
  const found = phases(feed.series.keys());
  if (!found.length) return null;
  const seconds = (value: number | null) => `${number(value)} s`;
  const shown = found.map(([phase, key], i) => ({ name: told("phase", phase), series: feed.series.get(key)!, color: i + 1, format: seconds }));
  const speed = [...feed.series.keys()].filter((name) => name.startsWith("throughput/"));
  return (
    <section>
      <h2>{t("panel.time")}</h2>
      <div class="grid">
        <Plot title={t("panel.phases")} lines={shown} stacked sync={SYNC} />
        {feed.series.has("reward/wait_seconds") && (
          <Plot title={t("panel.wait")} lines={lines(feed, ["reward/wait_seconds"], { format: seconds })} smoothing={smoothing} sync={SYNC} />
        )}
        {speed.length > 0 && <Plot title={t("panel.speed")} lines={lines(feed, speed)} smoothing={smoothing} sync={SYNC} />}
      </div>
    </section>
  );
}
