/** Curves: what the service sends in buckets, and live points after it. */

import type { SeriesAnswer } from "./types";

export type Value = number | null;

/** One curve: steps ascending; min and max of a bucket where it stands for several points. */
export interface Series {
  step: number[];
  mean: Value[];
  min: Value[];
  max: Value[];
  raw: boolean;
}

export const empty = (): Series => ({ step: [], mean: [], min: [], max: [], raw: true });

export function fromAnswer(answer: SeriesAnswer): Series {
  return { step: [...answer.step], mean: [...answer.mean], min: [...answer.min], max: [...answer.max], raw: answer.raw };
}

/** Put a live point where its step belongs; the same step again replaces it, as the service does. */
export function put(series: Series, step: number, value: Value): void {
  let at = series.step.length;
  while (at > 0 && series.step[at - 1]! > step) at--;
  const replaced = at > 0 && series.step[at - 1] === step;
  const where = replaced ? at - 1 : at;
  const count = replaced ? 1 : 0;
  series.step.splice(where, count, step);
  for (const values of [series.mean, series.min, series.max]) values.splice(where, count, value);
}

export function last(series: Series | undefined): Value {
  for (let i = (series?.mean.length ?? 0) - 1; i >= 0; i--) if (series!.mean[i] != null) return series!.mean[i]!;
  return null;
}

/** Entries of which no earlier one has the same curve or curves: an average over one data set is that of the set. */
export function distinct<T>(entries: T[], curves: (entry: T) => (Series | undefined)[]): T[] {
  const seen = new Set<string>();
  return entries.filter((entry) => {
    const key = JSON.stringify(curves(entry).map((series) => series && [series.step, series.mean]));
    return !seen.has(key) && seen.add(key);
  });
}

/** Exponential moving average with the bias of the start taken out; weight 0 leaves the values as they are. */
export function smooth(values: Value[], weight: number): Value[] {
  if (weight <= 0) return values;
  let sum = 0;
  let norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

/** Columns on the union of all steps, null where a curve has no point: [steps, ...values]. */
export function align(columns: { step: number[]; values: Value[] }[]): [number[], ...Value[][]] {
  const [first] = columns;
  if (!first) return [[]];
  if (columns.every((column) => column.step.length === first.step.length && column.step.every((step, i) => step === first.step[i])))
    return [first.step, ...columns.map((column) => column.values)];
  const steps = [...new Set(columns.flatMap((column) => column.step))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const values = columns.map((column) => {
    const row: Value[] = new Array(steps.length).fill(null);
    column.step.forEach((step, i) => (row[place.get(step)!] = column.values[i] ?? null));
    return row;
  });
  return [steps, ...values];
}

/** Running sums over the columns, for stacked bars; null counts as nothing. */
export function cumulate(columns: Value[][]): number[][] {
  const sums: number[][] = [];
  columns.forEach((column, i) => sums.push(column.map((value, j) => (value ?? 0) + (sums[i - 1]?.[j] ?? 0))));
  return sums;
}
