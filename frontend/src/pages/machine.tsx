/** The machine: its GPUs and what the host has left. */

import { get, url } from "../lib/api";
import { plain } from "../lib/format";
import { useLoad } from "../lib/load";
import { t, told } from "../lib/prefs";
import type { Machine } from "../lib/types";
import { Empty, Failure } from "../parts/common";
import { GpuCard, Meter } from "../panels/gpus";

const READ_EVERY = 2000;
const GB = 1e9;

type Share = { used?: number; total?: number; percent?: number };

/** A figure of the host: of used bytes and all of them, a percentage, or a plain value. */
function HostFigure({ name, value }: { name: string; value: unknown }) {
  const label = told("host", name);
  if (typeof value === "object" && value !== null) {
    const { used, total, percent } = value as Share;
    if (typeof used === "number" && typeof total === "number") return <Meter label={label} value={used > 1e6 ? used / GB : used} of={total > 1e6 ? total / GB : total} unit="GB" />;
    if (typeof percent === "number") return <Meter label={label} value={percent} of={100} unit="%" />;
    return (
      <>
        {Object.entries(value).map(([key, inner]) => (
          <HostFigure key={key} name={`${name}.${key}`} value={inner} />
        ))}
      </>
    );
  }
  if (typeof value === "number" && /percent$/.test(name)) return <Meter label={label} value={value} of={100} unit="%" />;
  return (
    <div class="meter">
      <span>{label}</span>
      <b>{plain(value)}</b>
    </div>
  );
}

export function MachinePage() {
  const { data, error } = useLoad<Machine>("machine", (signal) => get("api/gpus", {}, signal), READ_EVERY);
  if (!data) return error ? <Failure error={error} /> : <Empty>{t("loading")}</Empty>;
  return (
    <>
      <header class="head">
        <h1>{t("machine")}</h1>
        <a class="button" href={url("api/backup")} download data-backup>
          {t("backup")}
        </a>
      </header>
      <Failure error={error} />
      {!data.available && <Empty>{t("no_gpus", { reason: data.reason ?? "" })}</Empty>}
      <ul class="cards gpus">
        {(data.gpus ?? []).map((sample) => (
          <GpuCard key={sample.gpu_index} sample={sample} />
        ))}
        <li class="card gpu" data-host>
          <h3>{t("host")}</h3>
          {Object.entries(data.host ?? {}).map(([name, value]) => (
            <HostFigure key={name} name={name} value={value} />
          ))}
        </li>
      </ul>
    </>
  );
}
