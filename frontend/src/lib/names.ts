/** What the metrics of a run are called, and which values are normal: the user's guide, section 5.4. */

export interface Normal {
  low?: number;
  high?: number;
  trend?: "down" | "up";
}

export const CANONICAL = ["policy_loss", "value_loss", "reward_mean", "kl_divergence", "entropy", "clip_fraction"] as const;

export const NORMAL: Record<string, Normal> = {
  policy_loss: { trend: "down" },
  value_loss: { trend: "down" },
  reward_mean: { trend: "up" },
  kl_divergence: { high: 0.1 },
  entropy: { trend: "down" },
  clip_fraction: { low: 0.1, high: 0.3 },
  zero_std_ratio: { high: 0.8 },
};

/**
 * Says on which side of its normal range a value is; null inside, or where there is no range. A clip fraction of exactly 0 is no warning:
 * a method that updates once for each rollout never clips.
 */
export function outside(name: string, value: number | null | undefined): "low" | "high" | null {
  const normal = NORMAL[name];
  if (!normal || value === null || value === undefined || (name === "clip_fraction" && value === 0)) return null;
  if (normal.high !== undefined && value > normal.high) return "high";
  return normal.low !== undefined && value < normal.low ? "low" : null;
}

export interface Source {
  name: string;
  mean: string;
  failed: string | null;
  disagrees: string[];
}

const REWARD = /^reward\/([^/]+)(?:\/(mean))?$/;
const FAILED = ["failed_fraction", "failed_frac"];
const COUNTERS = new Set(["wait_seconds"]);

/** The sources of reward among the names of metrics: reward/<source> or reward/<source>/mean. */
export function sources(names: Iterable<string>): Source[] {
  const all = new Set(names);
  const found = new Map<string, Source>();
  for (const key of all) {
    const name = REWARD.exec(key)?.[1];
    if (!name || COUNTERS.has(name) || found.has(name)) continue;
    const failed = FAILED.map((word) => `reward/${name}/${word}`).find((one) => all.has(one)) ?? null;
    const disagrees = [...all].filter((one) => one.startsWith("reward/") && one.includes("/disagrees_with/") && one.split("/").includes(name));
    found.set(name, { name, mean: key, failed, disagrees });
  }
  return [...found.values()].sort((a, b) => a.name.localeCompare(b.name));
}

/** True for metrics that the overview has a panel for. */
export const hasPanel = (name: string): boolean =>
  /^(reward|time|throughput)\/|^(policy_loss|value_loss|loss|reward_mean|kl_divergence|ppo_kl|kl|entropy|clip_fraction|lr|grad_norm)$|zero_std_ratio$/.test(name);

const PHASES = ["rollout", "score", "reward", "train", "sync", "validation", "other"];

/** The phases of an iteration among the names of metrics, in the order in which they run: [phase, key]. */
export function phases(names: Iterable<string>): [string, string][] {
  const found: [string, string][] = [];
  for (const key of names) {
    const phase = /^time\/(.+)_s$/.exec(key)?.[1];
    if (phase) found.push([phase, key]);
  }
  const rank = (phase: string) => (PHASES.indexOf(phase) + 1 || PHASES.length) - (phase === "other" ? 0 : 0.5);
  return found.sort((a, b) => rank(a[0]) - rank(b[0]) || a[0].localeCompare(b[0]));
}

/** Names of evaluations: those of validation and of evaluation sets. */
export const isEvaluation = (name: string): boolean => /^(val|eval)\//.test(name);

export const ACTIVE = new Set(["queued", "starting", "running", "stopping"]);
