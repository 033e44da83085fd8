/** Every metric of a job, by the first part of its name, with a filter. */

import { useState } from "preact/hooks";
import { url } from "../lib/api";
import type { Feed } from "../lib/feed";
import { NORMAL } from "../lib/names";
import { t } from "../lib/prefs";
import { Empty } from "../parts/common";
import { Plot } from "../parts/plot";

const AT_ONCE = 24;

export function AllCharts({ feed, smoothing }: { feed: Feed; smoothing: number }) {
  const [filter, setFilter] = useState("");
  const [shown, setShown] = useState(AT_ONCE);
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const names = [...feed.series.keys()].filter((name) => words.every((word) => name.toLowerCase().includes(word))).sort();
  const groups = new Map<string, string[]>();
  for (const name of names.slice(0, shown)) {
    const group = name.includes("/") ? name.split("/")[0]! : "";
    groups.set(group, [...(groups.get(group) ?? []), name]);
  }
  return (
    <>
      <div class="row controls">
        <label>
          {t("filter")}
          <input type="search" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
        </label>
        <span class="dim">{t("metrics_n", { n: names.length })}</span>
        <a class="button" href={url(`api/jobs/${encodeURIComponent(feed.id)}/metrics.csv`)} download data-csv>
          {t("csv")}
        </a>
      </div>
      {!names.length && <Empty>{t("no_metrics")}</Empty>}
      {[...groups].map(([group, members]) => (
        <section key={group}>
          {group && <h2>{group}</h2>}
          <div class="grid">
            {members.map((name) => (
              <Plot key={name} title={name} lines={[{ name, series: feed.series.get(name)!, color: 1 }]} normal={NORMAL[name]} smoothing={smoothing} low sync="job" />
            ))}
          </div>
        </section>
      ))}
      {names.length > shown && (
        <button type="button" onClick={() => setShown(shown + AT_ONCE)}>
          {t("more")}
        </button>
      )}
    </>
  );
}
