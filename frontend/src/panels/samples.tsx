/** The gallery: pictures, answers and film strips, by prompt and step, with rewards and advantage. */

import { useEffect, useMemo, useState } from "preact/hooks";
import { get, ownAddress } from "../lib/api";
import { number } from "../lib/format";
import { useLoad } from "../lib/load";
import { t } from "../lib/prefs";
import type { Feed } from "../lib/feed";
import type { Sample } from "../lib/types";
import { Dialog, Empty, Failure } from "../parts/common";

type Answer = { items: Sample[]; steps: number[] };

/** Steps that a prompt is followed over, the newest ones. */
const FOLLOWED = 20;

export function reward(sample: Sample): number {
  if (typeof sample.reward === "number") return sample.reward;
  const values = Object.values(sample.rewards).filter((value): value is number => value !== null);
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : Number.NaN;
}

/** Samples in groups, those of one prompt and step; within a group as asked. */
export function grouped(samples: Sample[], sort: string): Sample[][] {
  const groups = new Map<string, Sample[]>();
  for (const sample of samples) {
    const key = `${sample.step}|${sample.group ?? ""}|${sample.prompt}`;
    groups.set(key, [...(groups.get(key) ?? []), sample]);
  }
  const sign = sort === "worst" ? 1 : -1;
  const last = (value: number) => (Number.isNaN(value) ? Number.NEGATIVE_INFINITY : value);
  return [...groups.values()].map((group) => [...group].sort((a, b) => sign * (last(reward(a)) - last(reward(b)))));
}

export function Samples({ feed }: { feed: Feed }) {
  const [step, setStep] = useState<number | null>(null);
  const [prompt, setPrompt] = useState("");
  const [sort, setSort] = useState("best");
  const [open, setOpen] = useState<number | null>(null);
  const path = `api/jobs/${encodeURIComponent(feed.id)}/samples`;
  const read = (at: number | null, signal: AbortSignal) => get<Answer>(path, { step: at, limit: 1000 }, signal);
  const one = useLoad<Answer>(`${feed.id}|${feed.sampleCount}|${step}`, (signal) => read(step, signal));
  const steps = one.data?.steps ?? [];
  const at = step ?? steps.at(-1) ?? null;
  const over = useLoad<Sample[]>(`${feed.id}|${prompt}|${prompt && steps.length}`, async (signal) => {
    const answers = await Promise.all((prompt ? steps.slice(-FOLLOWED) : []).map((one) => read(one, signal)));
    return answers.flatMap(({ items }) => items.filter((sample) => sample.prompt === prompt)).sort((a, b) => b.step - a.step);
  });
  const all = one.data?.items ?? [];
  const prompts = useMemo(() => [...new Set([...all.map((sample) => sample.prompt), ...(prompt ? [prompt] : [])])].sort(), [one.data, prompt]);
  const shown = prompt ? (over.data ?? []) : all;
  const groups = grouped(shown, sort);
  const flat = groups.flat();
  if (one.error) return <Failure error={one.error} />;
  if (!steps.length) return <Empty>{t(one.data ? "no_samples" : "loading")}</Empty>;
  return (
    <section aria-label={t("tab.samples")}>
      <div class="row controls">
        <label>
          {t("step_label")}
          <input type="range" min={0} max={Math.max(0, steps.length - 1)} value={at === null ? 0 : steps.indexOf(at)} disabled={!!prompt}
            aria-valuetext={String(at)} onInput={(event) => setStep(steps[event.currentTarget.valueAsNumber] ?? null)} />
          <output>{prompt ? t("all") : at}</output>
        </label>
        <label>
          {t("prompt")}
          <select value={prompt} onChange={(event) => setPrompt(event.currentTarget.value)}>
            <option value="">{t("all_prompts")}</option>
            {prompts.map((text) => (
              <option key={text} value={text}>
                {text.slice(0, 80)}
              </option>
            ))}
          </select>
        </label>
        <label>
          {t("sort")}
          <select value={sort} onChange={(event) => setSort(event.currentTarget.value)}>
            <option value="best">{t("best_first")}</option>
            <option value="worst">{t("worst_first")}</option>
          </select>
        </label>
      </div>
      <div class={groups.every((group) => group.length === 1) ? "singles" : ""}>
      {groups.map((group) => (
        <section class="group" key={`${group[0]!.step}|${group[0]!.group}|${group[0]!.prompt}`}>
          <h3>
            <span class="prompt">{group[0]!.prompt}</span> <small class="dim">{t("step", { n: group[0]!.step })}</small>
          </h3>
          <div class={group.some((sample) => sample.image_urls.length > 1) ? "cards films" : "cards"}>
            {group.map((sample) => (
              <Card key={sample.id} sample={sample} open={() => setOpen(flat.indexOf(sample))} />
            ))}
          </div>
        </section>
      ))}
      </div>
      {open !== null && flat[open] && <Viewer list={flat} at={open} move={setOpen} close={() => setOpen(null)} />}
    </section>
  );
}

function Scores({ sample }: { sample: Sample }) {
  return (
    <ul class="scores">
      {Object.entries(sample.rewards).map(([name, value]) => (
        <li key={name}>
          <span class="dim">{name}</span> <b>{number(value)}</b>
        </li>
      ))}
      {sample.advantage !== null && (
        <li class={sample.advantage > 0 ? "up" : sample.advantage < 0 ? "down" : ""}>
          <span class="dim">{t("advantage")}</span>{" "}
          <b>
            {sample.advantage > 0 ? "+" : ""}
            {number(sample.advantage)}
          </b>
        </li>
      )}
    </ul>
  );
}

/** The picture of a sample; several are the frames of a film strip, from left to right. */
function Pictures({ sample, loaded }: { sample: Sample; loaded?: (picture: HTMLImageElement) => void }) {
  const addresses = sample.image_urls.map(ownAddress).filter((address) => address !== null);
  if (!addresses.length) return null;
  return (
    <span class="pictures">
      {addresses.map((address, i) => (
        <img key={address} src={address} alt={`${sample.prompt} ${i + 1}/${addresses.length}`} loading="lazy" onLoad={(event) => loaded?.(event.currentTarget)} />
      ))}
    </span>
  );
}

function Card({ sample, open }: { sample: Sample; open: () => void }) {
  const [wide, setWide] = useState(false);
  return (
    <button type="button" class={`sample card${wide ? " wide" : ""}`} onClick={open} data-sample={sample.id}>
      <Pictures sample={sample} loaded={(picture) => setWide(picture.naturalWidth > 2 * picture.naturalHeight)} />
      {sample.text && <span class="answer">{sample.text}</span>}
      <Scores sample={sample} />
    </button>
  );
}

function Viewer({ list, at, move, close }: { list: Sample[]; at: number; move: (at: number) => void; close: () => void }) {
  const sample = list[at]!;
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by && list[at + by]) move(at + by);
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, [at, list]);
  return (
    <Dialog title={`${t("step", { n: sample.step })} · ${at + 1}/${list.length}`} close={close} wide>
      <p class="prompt">{sample.prompt}</p>
      <Pictures sample={sample} />
      {sample.text && <pre class="text">{sample.text}</pre>}
      <Scores sample={sample} />
      <div class="row">
        <button type="button" disabled={at === 0} onClick={() => move(at - 1)}>
          ← {t("previous")}
        </button>
        <button type="button" disabled={at === list.length - 1} onClick={() => move(at + 1)}>
          {t("next")} →
        </button>
      </div>
    </Dialog>
  );
}
