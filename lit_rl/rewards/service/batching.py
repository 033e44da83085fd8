"""One model thread that takes whatever is queued: no timer, so a lone request does not wait and a crowd is batched."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from lit_rl.net.guards import ApiError
from lit_rl.net.metrics import Metrics
from lit_rl.rewards.service.samples import Row, Sample, SampleError
from lit_rl.types import Info

Model = Callable[[Sequence[Sample], Sequence[Info]], Sequence[Row | SampleError]]
"""Images of any sizes or texts, and their infos -> a row or a reason for each. Runs in the model thread."""


@dataclass
class _Item:
    sample: Sample
    info: Info
    answer: asyncio.Future[Row | SampleError]


class Batcher:
    """Admission, queue and model thread.

    Args:
        max_batch: Samples per call of the model.
        max_queue_images: Samples, images or texts, received and not yet answered; more are refused with 429.
        max_bytes: Bodies and decoded samples held in memory at one time; more are refused with 429.
    """

    def __init__(self, metrics: Metrics, *, max_batch: int, max_queue_images: int, max_bytes: int) -> None:
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.images = 0
        self.rate: float | None = None  # samples per second of model time, smoothed
        self.max_queue_images = max_queue_images
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_bytes = max_bytes
        self._bytes = 0
        self._requests = 0  # admitted and not yet answered, those still uploading included
        self._queue: deque[_Item] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None
        metrics.watch_queue(lambda: self.images)

    def start(self, model: Model) -> None:
        """The model is loaded: take requests from now on (unless a signal came first)."""
        if self.state == "loading":
            self.state = "ready"
        self._task = asyncio.create_task(self._run(model))

    @contextmanager
    def admit(self, images: int, size: int) -> Iterator[Callable[[int, int], None]]:
        """Let a request in that announces `images` and `size` bytes, and give back what it held when the block ends.

        What is announced must fit now, but only what has arrived is held: the block calls the yielded function with images and bytes as
        they come. An upload that sends nothing so keeps no other out. Raises ApiError 429 (full), 503 (loading, draining) or 413 (would
        never fit), as the yielded function does.
        """
        if self.state != "ready":
            self._metrics.shed.labels(self.state).inc()
            raise ApiError(503, self.state, f"the server is {self.state}", retry_after=5)
        held_images = held_bytes = 0

        def hold(images: int, size: int) -> None:
            nonlocal held_images, held_bytes
            self._check_room(held_images + images, images, size)
            held_images, held_bytes = held_images + images, held_bytes + size
            self.images, self._bytes = self.images + images, self._bytes + size

        self._check_room(images, images, size)
        self._requests += 1
        try:
            yield hold
        finally:
            self._requests -= 1
            self.images, self._bytes = self.images - held_images, self._bytes - held_bytes

    def _check_room(self, in_request: int, images: int, size: int) -> None:
        """Raise unless `images` and `size` bytes more fit; the request has `in_request` images with them."""
        if in_request > self.max_queue_images:
            raise ApiError(
                413, "too_large", f"{in_request} images in one request; the queue holds {self.max_queue_images} (--max-queue-images)"
            )
        if self.images + images > self.max_queue_images or self._bytes + size > self._max_bytes:
            self._metrics.shed.labels("full").inc()
            text = f"{self.images} of {self.max_queue_images} places are taken; {images} more do not fit now"
            raise ApiError(429, "queue_full", text, retry_after=self.retry_after())

    def retry_after(self) -> int:
        """Seconds until what is queued now is done, from the measured rate; 1 to 60."""
        return min(60, max(1, math.ceil(self.images / self.rate))) if self.rate else 1

    async def submit(self, samples: Sequence[Sample], infos: Sequence[Info], *, deadline: float | None = None) -> list[Row | SampleError]:
        """Queue admitted samples and await their rows.

        What is still queued at `deadline` (loop time; ApiError 504), or when the caller goes away, is dropped before the model.
        """
        new = asyncio.get_running_loop().create_future
        items = [_Item(sample, info, new()) for sample, info in zip(samples, infos, strict=True)]
        self._queue.extend(items)
        self._wake.set()
        try:
            async with asyncio.timeout_at(deadline):
                return list(await asyncio.gather(*(item.answer for item in items)))
        except TimeoutError as error:
            self._metrics.shed.labels("deadline").inc()
            raise ApiError(504, "deadline", "not scored before X-Deadline-Ms ran out") from error

    async def drain(self, seconds: float) -> bool:
        """Refuse what is new, finish what was admitted. False when that took longer than `seconds`."""
        self.state = "draining"
        end = time.monotonic() + seconds
        while self._requests and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._requests

    def close(self) -> None:
        """Stop the model thread; what is queued is dropped."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, model: Model) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            batch = self._take()
            if not batch:
                self._wake.clear()
                continue
            start = time.perf_counter()
            try:
                rows = await loop.run_in_executor(self._thread, model, [i.sample for i in batch], [i.info for i in batch])
            except Exception as error:  # to the requests of this batch; the next batch may fare better
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            seconds = time.perf_counter() - start
            self._measure(len(batch), seconds)
            for item, row in zip(batch, rows, strict=True):
                if not item.answer.done():
                    item.answer.set_result(row)
                if not isinstance(row, SampleError):
                    self._metrics.observe_row(row)

    def _take(self) -> list[_Item]:
        """Up to `max_batch` items whose callers are still there."""
        batch: list[_Item] = []
        while self._queue and len(batch) < self._max_batch:
            item = self._queue.popleft()
            if not item.answer.done():
                batch.append(item)
        return batch

    def _measure(self, count: int, seconds: float) -> None:
        self._metrics.batch_size.observe(count)
        self._metrics.model_seconds.observe(seconds)
        now = count / max(seconds, 1e-6)
        self.rate = now if self.rate is None else 0.8 * self.rate + 0.2 * now
