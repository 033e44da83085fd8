/** A chart: lines or stacked bars over steps, the normal range as a band, a legend with the values under the cursor. */

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { number, tick } from "../lib/format";
import { prefs, t } from "../lib/prefs";
import { align, cumulate, last, smooth, type Series, type Value } from "../lib/series";
import type { Normal } from "../lib/names";

export interface Line {
  name: string;
  series: Series;
  /** 1..8, a colour of the palette. */
  color: number;
  dash?: boolean;
  format?: (value: number | null) => string;
}

export interface PlotProps {
  title: string;
  lines: Line[];
  normal?: Normal;
  stacked?: boolean;
  smoothing?: number;
  /** The highest value that there can be. */
  top?: number;
  /** 150 pixels instead of 200. */
  low?: boolean;
  note?: preact.ComponentChildren;
  /** Charts of one name share their cursor. */
  sync?: string;
  /** What the place under the cursor is called; a step where it is left out. */
  at?: (x: number) => string;
}

interface Drawn {
  data: [number[], ...Value[][]];
  /** What the legend says, by line, before stacking and smoothing. */
  raw: Value[][];
}

function css(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function drawn(lines: Line[], stacked: boolean, smoothing: number): Drawn {
  const [steps, ...raw] = align(lines.map(({ series }) => ({ step: series.step, values: series.mean })));
  if (stacked) return { data: [steps, ...cumulate(raw).reverse()], raw };
  const shown = raw.map((values) => smooth(values, smoothing));
  const envelopes = lines.flatMap(({ series }) => {
    if (series.raw || smoothing > 0) return [];
    const [, ...columns] = align([{ step: steps, values: [] }, ...[series.max, series.min].map((values) => ({ step: series.step, values }))]);
    return columns.slice(1);
  });
  return { data: [steps, ...shown, ...envelopes], raw };
}

/** The band of normal values, beneath the curves. */
function band(normal: Normal): (plot: uPlot) => void {
  return (plot) => {
    const { left, top, width, height } = plot.bbox;
    const y = (value: number | undefined, otherwise: number) => (value === undefined ? otherwise : plot.valToPos(value, "y", true));
    const clip = (value: number) => Math.min(top + height, Math.max(top, value));
    const [from, to] = [clip(y(normal.high, top)), clip(y(normal.low, top + height))];
    if (normal.low === undefined && normal.high === undefined) return;
    plot.ctx.save();
    plot.ctx.fillStyle = css("--band");
    plot.ctx.fillRect(left, from, width, to - from);
    plot.ctx.restore();
  };
}

interface Events {
  move: (index: number | null) => void;
  zoom: (on: boolean) => void;
}

/** The range of a curve, which is 0 to 1 for one that is always 0. */
function around(_plot: uPlot, low: number, high: number): uPlot.Range.MinMax {
  if (low === null) return [null, null];
  return low === 0 && high === 0 ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true);
}

function options(props: PlotProps, { clientWidth, clientHeight }: HTMLElement, events: Events): uPlot.Options {
  const { lines, stacked, normal } = props;
  const axis = { stroke: css("--dim"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1 }, font: "11px system-ui" };
  const palette = lines.map((line) => css(`--c${((line.color - 1) % 8) + 1}`));
  const bars = stacked ? uPlot.paths.bars!({ size: [1, 60], gap: 0 }) : undefined;
  const order = lines.map((_, i) => (stacked ? lines.length - 1 - i : i));
  const shown: uPlot.Series[] = order.map((i) => ({
    label: lines[i]!.name,
    stroke: palette[i],
    width: stacked ? 0 : 1.5,
    fill: stacked ? palette[i] : undefined,
    dash: lines[i]!.dash ? [5, 4] : undefined,
    paths: bars,
    points: { show: stacked ? false : (_plot, _i, first, end) => end - first < 3 },
    spanGaps: true,
  }));
  const bands: uPlot.Band[] = [];
  const buckets = stacked || props.smoothing ? [] : lines.flatMap((line, i) => (line.series.raw ? [] : [i]));
  for (const i of buckets) {
    const at = 1 + lines.length + bands.length * 2;
    shown.push({ stroke: "transparent", points: { show: false }, spanGaps: true }, { stroke: "transparent", points: { show: false }, spanGaps: true });
    bands.push({ series: [at, at + 1], fill: `${palette[i]}2e` });
  }
  return {
    width: clientWidth || 300,
    height: clientHeight || 200,
    series: [{ label: "step" }, ...shown],
    bands,
    legend: { show: false },
    scales: { x: { time: false, range: (_plot, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) }, y: { range: stacked ? (_p, _l, high) => [0, high || 1] : props.top ? [0, props.top] : around } },
    axes: [{ ...axis, size: 28 }, { ...axis, size: 58, values: (_plot, values) => values.map((value) => (value === null ? "" : tick(value))) }],
    cursor: { sync: props.sync ? { key: props.sync, setSeries: false } : undefined, points: { show: !stacked }, drag: { x: true, y: false }, bind: { dblclick: (_plot, _target, handler) => (event) => (events.zoom(false), handler(event)) } },
    hooks: { drawClear: normal ? [band(normal)] : [], setCursor: [(plot) => events.move(plot.cursor.idx ?? null)], setSelect: [(plot) => plot.select.width > 0 && events.zoom(true)] },
  };
}

export function range(normal: Normal): string {
  const { low, high, trend } = normal;
  if (low !== undefined && high !== undefined) return t("range.between", { low, high });
  if (high !== undefined) return t("range.below", { high });
  return trend ? t(trend === "up" ? "range.up" : "range.down") : "";
}

/** What the chart is made of; when it changes the chart is made anew, else only its data are set. */
function shape(props: PlotProps): string {
  const { lines, stacked, smoothing } = props;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return JSON.stringify([lines.map(({ name, color, series }) => [name, color, series.raw]), stacked, smoothing, prefs, dark]);
}

export function Plot(props: PlotProps) {
  const { title, lines, normal, stacked = false, smoothing = 0, note } = props;
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const zoomed = useRef(false);
  const [index, setIndex] = useState<number | null>(null);
  const { data, raw } = drawn(lines, stacked, smoothing);
  const key = shape(props);
  useEffect(() => {
    zoomed.current = false;
    const made = new uPlot(options(props, place.current!, { move: setIndex, zoom: (on) => (zoomed.current = on) }), data as uPlot.AlignedData, place.current!);
    plot.current = made;
    const watch = new ResizeObserver(([entry]) => {
      const { width, height } = entry!.contentRect;
      made.setSize({ width: Math.floor(width) || 300, height: Math.floor(height) || 200 });
    });
    watch.observe(place.current!);
    return () => {
      watch.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [key]);
  useLayoutEffect(() => {
    plot.current?.setData(data as uPlot.AlignedData, !zoomed.current);
    if (zoomed.current) plot.current?.redraw();
  }, [data[0].length, ...lines.map(({ series }) => last(series)), lines[0]?.series]);
  const value = (i: number) => (index === null ? last(lines[i]!.series) : (raw[i]?.[index] ?? null));
  const step = index === null ? data[0].at(-1) : data[0][index];
  const says = lines.map((line, i) => `${line.name} ${(line.format ?? number)(value(i))}`).join(", ");
  return (
    <figure class="plot card" data-plot={title}>
      <figcaption>
        <strong>{title}</strong>
        {normal && <span class="dim">{range(normal)}</span>}
      </figcaption>
      <div ref={place} class={props.low ? "canvas low" : "canvas"} role="img" aria-label={`${title}: ${says}`} />
      <ul class="legend">
        {lines.map((line, i) => (
          <li key={line.name}>
            <i class={`swatch c${((line.color - 1) % 8) + 1}${line.dash ? " dash" : ""}`} />
            {lines.length > 1 || line.name !== title ? <span>{line.name}</span> : null}
            <b>{(line.format ?? number)(value(i))}</b>
          </li>
        ))}
        {step !== undefined && <li class="dim">{props.at ? props.at(step) : t("step", { n: step })}</li>}
      </ul>
      {note && <div class="note">{note}</div>}
    </figure>
  );
}
