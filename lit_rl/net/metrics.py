"""Metrics of a reward server for Prometheus."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_TENTHS = tuple(i / 10 for i in range(11))


class Metrics:
    """Counters of one server in a registry of their own, so that several servers fit into one process."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("reward_requests", "Requests answered", ["route", "status"], registry=r)
        self.request_seconds = Histogram("reward_request_seconds", "Time to the answer", ["route"], buckets=_SECONDS, registry=r)
        self.queue_images = Gauge("reward_queue_images", "Images received and not yet answered", registry=r)
        self.batch_size = Histogram(
            "reward_batch_size", "Images per call of the scorers", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=r
        )
        self.model_seconds = Histogram("reward_model_seconds", "Time of one call of the scorers", buckets=_SECONDS, registry=r)
        self.decode_seconds = Histogram("reward_decode_seconds", "Time to decode one body", buckets=_SECONDS, registry=r)
        self.shed = Counter("reward_shed", "Requests turned away before the model", ["reason"], registry=r)
        self.scores = Histogram("reward_score", "Scores by output", ["output"], buckets=_TENTHS, registry=r)
        self.unscored = Counter("reward_unscored", "Scores that could not be computed, by output", ["output"], registry=r)
        self.gpu_bytes = Gauge("reward_gpu_memory_bytes", "GPU memory held by this server", registry=r)
        self.gpu_bytes.set_function(_gpu_memory)

    def watch_queue(self, images: Callable[[], float]) -> None:
        """Report the number that a function returns as the length of the queue."""
        self.queue_images.set_function(images)

    def observe_row(self, row: Mapping[str, object]) -> None:
        """Count the numbers of one image's scores."""
        for name, value in row.items():
            if isinstance(value, float) and math.isnan(value):
                self.unscored.labels(name).inc()
            elif isinstance(value, float):
                self.scores.labels(name).observe(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _gpu_memory() -> float:
    torch = sys.modules.get("torch")  # importing it for a number would take seconds
    return float(torch.cuda.memory_allocated()) if torch is not None and torch.cuda.is_initialized() else 0.0
