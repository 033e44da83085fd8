/** The JSON of the service, as /api/openapi.json describes it. */

export type State = "created" | "queued" | "starting" | "running" | "stopping" | "stopped" | "succeeded" | "failed" | "stale" | "lost";

export interface Progress {
  step: number | null;
  max_steps: number | null;
  epoch: number | null;
  eta_s: number | null;
}

export interface Problem {
  field: string;
  problem: string;
}

export interface Job {
  uuid: string;
  name: string;
  description: string;
  state: State;
  source: string;
  algorithm: string;
  model_path: string;
  model_size?: string | null;
  progress: Progress | null;
  created_at: string;
  started_at: string | null;
  ended_at: string | null;
  stop_requested_at: string | null;
  exit: { returncode: number | null; signal: string | null; reason: string | null } | null;
  gpu_ids: number[] | null;
  run_dir: string | null;
  parent_uuid: string | null;
  last_metrics: Record<string, number | null>;
  stalled: boolean;
  tags: string[];
  notes?: string;
  problems?: Problem[];
  [field: string]: unknown;
}

export interface SeriesAnswer {
  step: number[];
  min: (number | null)[];
  max: (number | null)[];
  mean: (number | null)[];
  raw: boolean;
}

export interface Checkpoint {
  id: string | number;
  step: number;
  path: string;
  eval_results: Record<string, unknown> | null;
  size_bytes: number | null;
  created_at: string;
  kind: string | null;
  exists: boolean;
  is_best: boolean;
}

export interface Sample {
  id: string | number;
  step: number;
  group: string | number | null;
  prompt: string;
  text?: string | null;
  kind?: string | null;
  rewards: Record<string, number | null>;
  advantage: number | null;
  image_urls: string[];
  reward?: number | null;
}

export interface Alert {
  id?: string | number;
  level?: string;
  rule?: string;
  message: string;
  step?: number | null;
  created_at?: string;
  ended_at?: string | null;
  ts?: number;
  /** In the list of all: the job's id and name; null of the machine. */
  job?: string | null;
  name?: string | null;
}

export interface GpuSample {
  gpu_index: number;
  name?: string;
  utilization: number | null;
  memory_used: number | null;
  memory_total: number | null;
  temperature: number | null;
  power_w?: number | null;
  jobs?: string[];
  ts?: number;
}

export interface Machine {
  available: boolean;
  reason?: string | null;
  gpus?: GpuSample[];
  host: Record<string, unknown>;
}

export interface Task {
  id: string;
  kind: string;
  state: string;
  progress: number | null;
  message?: string | null;
  output?: string | null;
}

export interface Model {
  path: string;
  name?: string;
  kind?: string;
  job?: string | null;
  job_name?: string | null;
  step?: number | null;
  size_bytes?: number | null;
  [field: string]: unknown;
}

export interface Point {
  step: number;
  metrics: Record<string, number | null>;
}

/** A frame of the WebSocket. */
export interface Frame {
  type: string;
  seq?: number;
  epoch?: string;
  job?: string | Job;
  state?: State;
  message?: string;
  points?: Point[];
  samples?: GpuSample[];
  stream?: string;
  offset?: number;
  text?: string;
  reason?: string;
  [field: string]: unknown;
}
