/** Everything that the page of one job shows, read once and then kept up to date by the WebSocket. */

import { useEffect, useState } from "preact/hooks";
import { ApiError, get } from "./api";
import { Live, type Connection } from "./live";
import { empty, fromAnswer, last, put, type Series } from "./series";
import type { Alert, Checkpoint, Frame, GpuSample, Job, SeriesAnswer } from "./types";

const POINTS = 1000;
const GPU_KEPT = 600;

export class Feed {
  job: Job | null = null;
  series = new Map<string, Series>();
  checkpoints: Checkpoint[] = [];
  alerts: Alert[] = [];
  gpu = new Map<number, GpuSample[]>();
  /** Grows with each new sample; the gallery reads again. */
  sampleCount = 0;
  connection: Connection = "connecting";
  error: ApiError | null = null;
  private live: Live | null = null;
  private drawing = 0;
  private listeners = new Set<() => void>();
  private logListeners = new Set<(frame: Frame) => void>();
  private reading = new AbortController();

  constructor(readonly id: string) {}

  start(): void {
    this.live = new Live(`ws/jobs/${encodeURIComponent(this.id)}`, {
      frame: (frame) => this.take(frame),
      resync: () => void this.read(),
      connection: (state) => {
        this.connection = state;
        if (state === "waiting" && !this.job) void this.read(); // events do not come; what there is can be shown
        this.changed();
      },
    });
  }

  stop(): void {
    this.live?.close();
    this.reading.abort();
    cancelAnimationFrame(this.drawing);
  }

  listen(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => void this.listeners.delete(listener);
  }

  onLog(listener: (frame: Frame) => void): () => void {
    this.logListeners.add(listener);
    return () => void this.logListeners.delete(listener);
  }

  /** The newest value of a metric: of its curve, or what the job says of itself. */
  latest(name: string): number | null {
    return last(this.series.get(name)) ?? this.job?.last_metrics?.[name] ?? null;
  }

  async read(): Promise<void> {
    this.reading.abort();
    const { signal } = (this.reading = new AbortController());
    const path = `api/jobs/${encodeURIComponent(this.id)}`;
    try {
      const job = await get<Job>(path, {}, signal);
      const [series, checkpoints, alerts, gpu] = await Promise.all([
        get<Record<string, SeriesAnswer>>(`${path}/series`, { points: POINTS }, signal),
        get<Checkpoint[]>(`${path}/checkpoints`, {}, signal),
        get<Alert[]>(`${path}/alerts`, {}, signal),
        get<GpuSample[]>(`${path}/gpu`, { minutes: 60 }, signal),
      ]);
      this.job = job;
      this.series = new Map(Object.entries(series).map(([name, answer]) => [name, fromAnswer(answer)]));
      for (const [name, value] of Object.entries(job.last_metrics ?? {})) {
        const curve = this.series.get(name); // one of buckets ends with a mean
        if (curve && !curve.raw && curve.step.at(-1)! < (job.progress?.step ?? 0)) put(curve, job.progress!.step!, value);
      }
      this.checkpoints = checkpoints;
      this.alerts = alerts;
      this.gpu.clear();
      this.takeGpu(gpu);
      this.error = null;
      this.sampleCount++;
    } catch (error) {
      if (!(error instanceof ApiError)) return; // left: another reading began, or the page was closed
      this.error = error;
    }
    this.changed();
  }

  private async again<T>(what: string, keep: (answer: T) => void): Promise<void> {
    try {
      keep(await get<T>(`api/jobs/${encodeURIComponent(this.id)}${what}`, {}, this.reading.signal));
      this.changed();
    } catch (error) {
      if (error instanceof ApiError) this.error = error;
    }
  }

  private take(frame: Frame): void {
    switch (frame.type) {
      case "hello":
        if (typeof frame.job === "object") this.job = frame.job;
        break;
      case "metrics":
        for (const { step, metrics } of frame.points ?? [])
          for (const [name, value] of Object.entries(metrics)) {
            if (!this.series.has(name)) this.series.set(name, empty());
            put(this.series.get(name)!, step, value);
          }
        this.moveOn(frame);
        break;
      case "state":
        void this.again<Job>("", (job) => (this.job = job));
        break;
      case "gpu":
        this.takeGpu(frame.samples ?? []);
        break;
      case "log":
        for (const listener of this.logListeners) listener(frame);
        return;
      case "checkpoint":
        void this.again<Checkpoint[]>("/checkpoints", (list) => (this.checkpoints = list));
        break;
      case "alert":
        void this.again<Alert[]>("/alerts", (list) => (this.alerts = list));
        break;
      case "sample":
        this.sampleCount++;
        break;
    }
    this.changed();
  }

  /** Progress between two readings of the job. */
  private moveOn(frame: Frame): void {
    const step = Math.max(...(frame.points ?? []).map((point) => point.step));
    const progress = this.job?.progress;
    if (progress && Number.isFinite(step) && step > (progress.step ?? -1)) this.job = { ...this.job!, progress: { ...progress, step } };
  }

  private takeGpu(samples: GpuSample[]): void {
    for (const sample of samples) {
      const kept = this.gpu.get(sample.gpu_index) ?? [];
      kept.push(sample);
      this.gpu.set(sample.gpu_index, kept.slice(-GPU_KEPT));
    }
  }

  /** Draw at most once per frame of the screen. */
  private changed(): void {
    cancelAnimationFrame(this.drawing);
    this.drawing = requestAnimationFrame(() => this.listeners.forEach((listener) => listener()));
  }
}

/** The feed of a job while the component lives; renders again when it changed. */
export function useFeed(id: string): Feed {
  const [feed, setFeed] = useState(() => new Feed(id));
  const [, setCount] = useState(0);
  if (feed.id !== id) setFeed(new Feed(id));
  useEffect(() => {
    const leave = feed.listen(() => setCount((n) => n + 1));
    feed.start();
    return () => {
      leave();
      feed.stop();
    };
  }, [feed]);
  return feed;
}
