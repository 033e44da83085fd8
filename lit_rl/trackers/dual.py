"""One logger for the platform and Weights & Biases, as the platform's guide (5.2.3) describes it. It never stops a run."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat, SupportsInt

from lit_rl.trackers.outbox import Outbox
from lit_rl.trackers.samples import Sample
from lit_rl.trackers.values import as_json, flat_numbers, line, plain
from lit_rl.trackers.weights_and_biases import WandBRun

log = logging.getLogger(__name__)
FINISH_SECONDS = 10.0
"""The longest time that `finish` sends what waits."""


def init_logging(
    job_uuid: str | None = None, platform_url: str | None = None, wandb_project: str | None = None, **options: object
) -> DualLogger:
    """A logger; what is left out comes from JOB_UUID, PLATFORM_URL and WANDB_PROJECT of the environment. Without a project, no W&B."""
    project = wandb_project or os.environ.get("WANDB_PROJECT")
    return DualLogger(
        job_uuid or os.environ.get("JOB_UUID") or f"job-{int(time.time())}",
        platform_url or os.environ.get("PLATFORM_URL") or "http://localhost:8000",
        wandb_project=project,
        **{"wandb_enabled": project is not None, **options},  # type: ignore[arg-type]
    )


class DualLogger:
    """Reports to the platform and to Weights & Biases. A call takes microseconds, a thread sends; on ranks above 0 nothing is done.

    Args:
        job_uuid: The job's id; an unknown one becomes a job that somebody else started.
        platform_url: Address of the platform.
        platform_enabled: Report to the platform.
        wandb_project: Project of Weights & Biases.
        wandb_run_name: Name of the run there; by default the job's id.
        wandb_entity: Team or user whose project it is.
        wandb_config: Options of the run.
        wandb_tags: Tags of the run.
        wandb_enabled: Report to Weights & Biases; offline where there is no key.
    """

    def __init__(
        self,
        job_uuid: str,
        platform_url: str = "http://localhost:8000",
        platform_enabled: bool = True,
        wandb_project: str | None = None,
        wandb_run_name: str | None = None,
        wandb_entity: str | None = None,
        wandb_config: Mapping[str, object] | None = None,
        wandb_tags: Sequence[str] | None = None,
        wandb_enabled: bool = True,
    ) -> None:
        self.job_uuid, self._finished = job_uuid, False
        first = os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"
        self._outbox = Outbox(platform_url, job_uuid, token=token(), spool=_spool(job_uuid)) if platform_enabled and first else None
        self._wandb: WandBRun | None = None
        if wandb_enabled and first:
            options = {"project": wandb_project, "name": wandb_run_name or job_uuid, "entity": wandb_entity}
            self._wandb = WandBRun.begun(**options, config=dict(wandb_config or {}), tags=list(wandb_tags or []))
        atexit.register(self._unfinished)

    def log_metrics(self, step: int, metrics: Mapping[str, object], epoch: SupportsInt | None = None) -> None:
        """Reports numbers of a step. Nested mappings are flattened; what is not finite is reported as such."""
        numbers = flat_numbers(metrics)
        if self._outbox is not None and numbers:
            point = {"step": int(step), "metrics": as_json(numbers), "epoch": None if epoch is None else int(epoch), "ts": time.time()}
            self._outbox.point(point)
        self._also(lambda run: run.log(numbers, step))

    def log_gpu_usage(
        self,
        gpu_index: int,
        utilization: SupportsFloat,
        memory_used: SupportsFloat,
        memory_total: SupportsFloat,
        temperature: SupportsFloat,
    ) -> None:
        """Reports a GPU: utilization in percent, memory in GB, temperature in degrees Celsius."""
        figures = flat_numbers(
            {"utilization": utilization, "memory_used": memory_used, "memory_total": memory_total, "temperature": temperature}
        )
        if self._outbox is not None:
            self._outbox.other("gpu", {"samples": [{"gpu_index": int(gpu_index), "ts": time.time(), **as_json(figures)}]})
        self._also(lambda run: run.log({f"gpu/{gpu_index}/{name}": value for name, value in figures.items()}, None))

    def log_checkpoint(self, step: int, checkpoint_path: str, eval_results: Mapping[str, object] | None = None) -> None:
        """Reports a checkpoint that was written, and what its evaluation gave."""
        results = None if eval_results is None else as_json(flat_numbers(eval_results))
        if self._outbox is not None:
            self._outbox.other("checkpoints", {"step": int(step), "path": str(checkpoint_path), "eval_results": results})
        found = flat_numbers(eval_results or {}).items()
        named = {key if key.startswith(("val/", "eval/")) else f"eval/{key}": value for key, value in found}
        self._also(lambda run: run.log(named, step))

    def log_status(self, status: str, message: str = "") -> None:
        """Reports a state of the run; it is an alert in Weights & Biases."""
        if self._outbox is not None:
            self._outbox.other("status", {"status": line(status), "message": plain(message)})
        self._also(lambda run: run.alert(status, message))

    def log_samples(self, samples: Sequence[Sample]) -> None:
        """Reports samples of a step for the platform's gallery; of many that wait, the oldest are dropped."""
        if self._outbox is not None and samples:
            self._outbox.samples(samples)

    def log_last_step(self, step: int) -> None:
        """Tells the platform's progress at which step the run makes its last report."""
        if self._outbox is not None:
            self._outbox.other("status", {"status": "running", "max_steps": step})

    def log_config(self, config: Mapping[str, object]) -> None:
        """Reports options of the run to Weights & Biases."""
        self._also(lambda run: run.config(config))

    def log_summary(self, summary: Mapping[str, object]) -> None:
        """Reports the result of the run to Weights & Biases."""
        self._also(lambda run: run.summary(summary))

    def finish(self, exit_code: int = 0) -> None:
        """Send what waits, and end. A run that somebody else started has then succeeded, or with another exit code failed."""
        self._end("succeeded" if exit_code == 0 else "failed", "" if exit_code == 0 else f"exit code {exit_code}", exit_code)

    def _unfinished(self) -> None:
        self._end("failed", "unfinished: the program ended without finish()", 1)

    def _end(self, status: str, message: str, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._unfinished)
        if self._outbox is not None:
            self._outbox.other("status", {"status": status, "message": message})
            self._outbox.close(FINISH_SECONDS)
        self._also(lambda run: run.finish(exit_code))

    def _also(self, act: Callable[[WandBRun], None]) -> None:
        """Tell Weights & Biases; what goes wrong there is said once, and the run goes on without it."""
        if self._wandb is None:
            return
        try:
            act(self._wandb)
        except Exception:
            log.warning("Weights & Biases failed; the run goes on without it", exc_info=True)
            self._wandb = None


def token() -> str | None:
    """Returns the platform's token: PLATFORM_TOKEN, or what stands in the file PLATFORM_TOKEN_FILE, if it can be read."""
    path = os.environ.get("PLATFORM_TOKEN_FILE")
    readable = path is not None and Path(path).is_file() and os.access(path, os.R_OK)
    given = Path(str(path)).read_text().strip() if readable else ""
    return os.environ.get("PLATFORM_TOKEN") or given or None


def _spool(job: str) -> Path:
    done = os.environ.get("PLATFORM_DONE_FILE")
    return Path(done).parent / "spool.jsonl" if done else Path("outputs/unsent") / f"{job}.jsonl"
