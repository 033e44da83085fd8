/** Alerts of all jobs and of the machine, the newest first. */

import { useState } from "preact/hooks";
import { get } from "../lib/api";
import { useLoad } from "../lib/load";
import { t } from "../lib/prefs";
import { jobLink } from "../lib/router";
import type { Alert } from "../lib/types";
import { AlertLine, Empty, Failure } from "../parts/common";

const READ_EVERY = 5000;

export function AlertsPage() {
  const [open, setOpen] = useState(true);
  const { data, error } = useLoad<Alert[]>(String(open), (signal) => get("api/alerts", { open }, signal), READ_EVERY);
  return (
    <>
      <h1>{t("alerts")}</h1>
      <div class="row controls">
        <label>
          <input type="checkbox" checked={open} onChange={(event) => setOpen(event.currentTarget.checked)} />
          {t("alerts_open")}
        </label>
      </div>
      <Failure error={error} />
      {data && !data.length && <Empty>{t("no_alerts")}</Empty>}
      <ul>
        {(data ?? []).map((alert) => (
          <li key={alert.id} class={`banner${alert.ended_at ? "" : " warn"}`} data-alert={alert.rule}>
            {alert.job ? <a href={jobLink(alert.job)}>{alert.name || alert.job}</a> : <a href="#/machine">{t("machine")}</a>} <AlertLine alert={alert} />
          </li>
        ))}
      </ul>
    </>
  );
}
