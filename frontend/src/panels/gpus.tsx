/** GPUs: those of a job as curves, those of the machine as cards. */

import type { Feed } from "../lib/feed";
import { duration, number } from "../lib/format";
import { t } from "../lib/prefs";
import type { Series, Value } from "../lib/series";
import type { GpuSample } from "../lib/types";
import { Bar } from "../parts/common";
import { Plot, type Line } from "../parts/plot";

/** Samples as a curve over seconds before the newest one. */
function curve(samples: GpuSample[], read: (sample: GpuSample) => Value): Series {
  const newest = samples.at(-1)?.ts ?? 0;
  const values = samples.map(read);
  return { step: samples.map((sample) => Math.round((sample.ts ?? 0) - newest)), mean: values, min: values, max: values, raw: true };
}

const ago = (seconds: number): string => duration(-seconds);

export function JobGpus({ feed }: { feed: Feed }) {
  const found = [...feed.gpu].filter(([, samples]) => samples.length).sort(([a], [b]) => a - b);
  if (!found.length) return null;
  const lines = (read: (sample: GpuSample) => Value): Line[] =>
    found.map(([index, samples]) => ({ name: `GPU ${index}`, series: curve(samples, read), color: index + 1 }));
  const memory = Math.max(...found.flatMap(([, samples]) => samples.map((sample) => sample.memory_total ?? 0)));
  return (
    <section>
      <h2>{t("panel.gpus")}</h2>
      <div class="grid">
        <Plot title={t("gpu.utilization")} lines={lines((sample) => sample.utilization)} top={100} at={ago} />
        <Plot title={t("gpu.memory")} lines={lines((sample) => sample.memory_used)} top={memory} at={ago} />
      </div>
    </section>
  );
}

export function GpuCard({ sample }: { sample: GpuSample }) {
  const { utilization, memory_used, memory_total, temperature, power_w } = sample;
  return (
    <li class="card gpu" data-gpu={sample.gpu_index}>
      <h3>
        GPU {sample.gpu_index} <small class="dim">{sample.name}</small>
      </h3>
      <Meter label={t("gpu.utilization")} value={utilization} of={100} unit="%" />
      <Meter label={t("gpu.memory")} value={memory_used} of={memory_total} unit="GB" />
      <p class="dim">
        {temperature === null || temperature === undefined ? "" : `${number(temperature)} °C`} {power_w ? `· ${number(power_w)} W` : ""}
      </p>
    </li>
  );
}

export function Meter({ label, value, of, unit }: { label: string; value: number | null | undefined; of: number | null | undefined; unit: string }) {
  if (value === null || value === undefined) return null;
  return (
    <div class="meter">
      <span>{label}</span>
      <b>
        {number(value)}
        {of && unit !== "%" ? ` / ${number(of)}` : ""} {unit}
      </b>
      {of ? <Bar value={value / of} label={label} /> : null}
    </div>
  );
}
