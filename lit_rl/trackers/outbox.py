"""Reports on their way to the platform: a queue that never blocks, one thread that sends, a file for what could not be sent."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_rl.trackers.samples import Sample, multipart

log = logging.getLogger(__name__)
WAITING = 50_000
"""Points of metrics that wait at most; of more, the oldest are dropped."""

SETS = 8
"""Sets of samples that wait at most; of more, the oldest are dropped. Their pictures are in memory."""

BATCH = 500
PERIOD, TIMEOUT, LONGEST_PAUSE = 0.5, 10.0, 10.0
Payload = Mapping[str, object]


class Outbox:
    """Sends reports of one job, in order, in batches. Nothing of it raises or blocks in the thread that reports.

    spool: a file that takes what could not be sent until the end, and whose content is sent first by the next outbox of the job.
    """

    def __init__(self, url: str, job: str, *, token: str | None, spool: Path | None) -> None:
        self.url, self.job, self.token, self.spool = url.rstrip("/"), job, token, spool
        self.dropped = 0
        self._points: deque[Payload] = deque()
        self._others: deque[tuple[str, Payload]] = deque()
        self._samples: deque[Sequence[Sample]] = deque()
        self._lock, self._some, self._closing = threading.Lock(), threading.Event(), False
        self._reached: bool | None = None
        self._give_up = float("inf")
        self._recover()
        self._thread = threading.Thread(target=self._work, name="platform", daemon=True)
        self._thread.start()

    def point(self, point: Payload) -> None:
        """Puts metrics of a step in the queue."""
        with self._lock:
            self._points.append(point)
            if len(self._points) > WAITING:
                self._points.popleft()
                self.dropped += 1
        if len(self._points) >= BATCH:
            self._some.set()

    def other(self, route: str, body: Payload) -> None:
        """Puts a checkpoint, a state or a GPU in the queue; none of these is dropped."""
        with self._lock:
            self._others.append((route, body))

    def samples(self, samples: Sequence[Sample]) -> None:
        """Puts samples of a step, all of one report, in the queue. The sending thread encodes their pictures; none is kept in the spool."""
        with self._lock:
            self._samples.append(samples)
            if len(self._samples) > SETS:
                self._samples.popleft()
                self.dropped += 1

    def close(self, seconds: float) -> None:
        """Send what waits, for so long at most; the rest is spooled."""
        self._give_up, self._closing = time.monotonic() + seconds, True
        self._some.set()
        self._thread.join(seconds + TIMEOUT)
        self._keep()

    def _work(self) -> None:
        pause = PERIOD
        while True:
            self._some.wait(pause)
            self._some.clear()
            sent = self._send_waiting()
            if self._closing and (not (self._points or self._others or self._samples) or time.monotonic() >= self._give_up):
                return
            pause = PERIOD if sent else min(2 * pause, 1.0 if self._closing else LONGEST_PAUSE)

    def _send_waiting(self) -> bool:
        """Send batch after batch; False once one could not be sent."""
        while self._points or self._others or self._samples:
            with self._lock:
                batch, others = list(self._points)[:BATCH], list(self._others)[:1]
            if batch and not self._post("metrics", {"points": batch}):
                return False
            self._taken(len(batch), 0)
            if others and not self._post(*others[0]):
                return False
            self._taken(0, len(others))
            if not self._send_samples():
                return False
        return True

    def _send_samples(self) -> bool:
        """Send the oldest set; False where it could not be sent, and waits on unless enough newer ones do."""
        with self._lock:
            samples = self._samples.popleft() if self._samples else None
        if samples is None:
            return True
        body, kind = multipart(samples)
        sent = self._send("samples", body, kind)
        with self._lock:
            if not sent and len(self._samples) < SETS:
                self._samples.appendleft(samples)
            else:
                self.dropped += not sent
        return sent

    def _taken(self, points: int, others: int) -> None:
        with self._lock:
            for _ in range(min(points, len(self._points))):
                self._points.popleft()
            for _ in range(others):
                self._others.popleft()

    def _post(self, route: str, body: Payload) -> bool:
        return self._send(route, json.dumps(body).encode(), "application/json")

    def _send(self, route: str, body: bytes, kind: str) -> bool:
        """True once the platform has taken a report, or refused it for good; False where it is worth another try."""
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        request = urllib.request.Request(f"{self.url}/api/jobs/{self.job}/{route}", body, headers)
        try:
            with http_alone().open(request, timeout=TIMEOUT) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            if error.code in (408, 429, 500, 502, 503, 504):
                return self._told(False, f"it answers {error.code}")
            log.warning(
                "the platform at %s refuses %s of job %s: %s", self.url, route, self.job, error.read(500).decode("utf-8", "replace")
            )
        except (OSError, ValueError, http.client.HTTPException) as error:  # the last: what answers there is no HTTP
            return self._told(False, str(error))
        return self._told(True, "")

    def _told(self, reached: bool, reason: str) -> bool:
        """Say once when the platform is away, and once when it is back."""
        if reached != self._reached and not (reached and self._reached is None):
            text = "is there again" if reached else f"is away ({reason}); the run goes on, and reports wait"
            log.warning("the platform at %s %s", self.url, text)
        self._reached = reached
        return reached

    def _keep(self) -> None:
        with self._lock:
            lines = [json.dumps(["metrics", {"points": [point]}]) for point in self._points] + [json.dumps(pair) for pair in self._others]
        kept, dropped = "lost", self.dropped + len(self._samples)
        if lines and self.spool is not None:
            try:
                self.spool.parent.mkdir(parents=True, exist_ok=True)
                with self.spool.open("a") as file:
                    file.writelines(f"{line}\n" for line in lines)
                kept = f"kept in {self.spool}"
            except OSError as error:
                kept = f"lost ({error})"
        if lines or dropped:
            log.warning("%d reports could not be sent to %s: %s; %d others were dropped", len(lines), self.url, kept, dropped)

    def _recover(self) -> None:
        """Take in what the logger before could not send; a line that a full disk or a kill has cut off is left out."""
        if self.spool is None:
            return
        try:
            lines = self.spool.read_text(errors="replace").splitlines()
            self.spool.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            log.warning("what waits in %s is not sent: %s", self.spool, error)
            return
        for line in lines:
            try:
                route, body = json.loads(line)
            except ValueError:
                log.warning("%s has a line that is no report; it is left out: %s", self.spool, line[:80])
                continue
            if route == "metrics":
                self._points.extend(body["points"])
            else:
                self._others.append((route, body))


def http_alone() -> urllib.request.OpenerDirector:
    """Returns an opener for http and https that goes through no proxy and follows no redirect, which would carry the token along."""
    opener = urllib.request.OpenerDirector()
    handlers = (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), urllib.request.HTTPErrorProcessor())
    for handler in (*handlers, urllib.request.HTTPDefaultErrorHandler(), urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    return opener
