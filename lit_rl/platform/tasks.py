"""Work on models that takes minutes: one process after the other, with progress; the server itself loads no tensors."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from lit_rl.platform.answers import conflict, not_found, text_of
from lit_rl.platform.schema import tasks
from lit_rl.platform.store import Store

KEPT = 200
"""Tasks that are remembered, the newest ones."""

WAITING = 20
LOST = "lost: the server ended before this was done; begin it again"
PROGRESS = re.compile(r"progress (\d+)/(\d+) (.*)")


@dataclass
class Task:
    """One merge. details: facts about it for the reader. progress: in [0, 1]."""

    kind: str
    output: Path
    words: Sequence[str] = field(repr=False)
    details: Mapping[str, object]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "queued"
    progress: float = 0.0
    message: str = ""
    created_at: float = field(default_factory=time.time)
    ended_at: float | None = None

    def shown(self) -> dict[str, object]:
        """The task as the service answers it."""
        told = {name: getattr(self, name) for name in ("id", "kind", "state", "progress", "message", "details")}
        output = str(self.output) if self.state == "succeeded" else None
        return told | {"output": output, "created_at": text_of(self.created_at), "ended_at": text_of(self.ended_at)}


class Tasks:
    """The merges of a server: `python -m lit_rl.merge` with other words each time, one at a time.

    A server that begins knows those of the one before it: what that one had not finished has failed as lost.
    root: The folder in which they run, which has the package. done: told of each task that has succeeded.
    """

    def __init__(self, root: Path, store: Store, done: Callable[[Task], None]) -> None:
        self.root, self.store, self._done = root, store, done
        self._found: dict[str, Task] = {task.id: task for task in _left(store)}
        for task in self._unended():
            made = task.output.exists()  # it is there whole or not at all
            task.state, task.message, task.ended_at = "succeeded" if made else "failed", "" if made else LOST, time.time()
            self._keep(task)
        self._changed = threading.Condition()
        self._queue: list[Task] = []
        self._process: subprocess.Popen[str] | None = None
        self._worker: threading.Thread | None = None
        self._closed = False

    def start(self, task: Task) -> Task:
        """Put a task at the end of the queue. Raises ApiError 409 where its output is there or is being made, or too many wait."""
        with self._changed:
            if task.output.exists() or any(other.output == task.output for other in self._unended()):
                raise conflict(f"{task.output.name} is there already: choose another output_name", "output_exists")
            if len(self._queue) >= WAITING:
                raise conflict(f"{WAITING} tasks wait already: come back later", "too_many_tasks")
            self._keep(task)
            self._found[task.id] = task
            self._queue.append(task)
            ended = [other.id for other in self._found.values() if other.ended_at is not None]
            for name in ended[: max(0, len(self._found) - KEPT)]:
                del self._found[name]
                with self.store.write() as connection:
                    connection.execute(sa.delete(tasks).where(tasks.c.id == name))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="tasks", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return task

    def find(self, name: str) -> Task:
        """The task of an id. Raises ApiError 404."""
        with self._changed:
            if name not in self._found:
                raise not_found("task", name)
            return self._found[name]

    def close(self) -> None:
        """End the process that runs; what it had begun to write is removed by it."""
        with self._changed:
            self._closed = True
            if self._process is not None:
                self._process.terminate()
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(30)

    def _keep(self, task: Task) -> None:
        """Write a task down, in the place of what is known of it."""
        values = {column.name: getattr(task, column.name) for column in tasks.c} | {"output": str(task.output)}
        with self.store.write() as connection:
            connection.execute(sa.delete(tasks).where(tasks.c.id == task.id))
            connection.execute(sa.insert(tasks).values(values))

    def _unended(self) -> list[Task]:
        return [task for task in self._found.values() if task.ended_at is None]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                task = self._queue.pop(0)
                task.state = "running"
                words = [sys.executable, "-m", "lit_rl.merge", *task.words]
                pipe = subprocess.PIPE
                process = subprocess.Popen(words, cwd=self.root, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True)
                self._process = process
            last = ""
            assert process.stdout is not None
            for line in process.stdout:
                if match := PROGRESS.match(line):
                    task.progress, task.message = int(match[1]) / int(match[2]), match[3].strip()
                elif line.strip():
                    last = line.strip()
            code = process.wait()
            with self._changed:
                self._process = None
                said = LOST if self._closed else last.removeprefix("error: ")[:2000] or f"the process ended with {code}"
                task.message = "" if code == 0 else said
                task.ended_at, task.state = time.time(), "succeeded" if code == 0 else "failed"
                task.progress = 1.0 if code == 0 else task.progress
                self._keep(task)
            if code == 0:
                self._done(task)


def _left(store: Store) -> list[Task]:
    """The tasks that are written down, the oldest first."""
    with store.read() as connection:
        rows = connection.execute(sa.select(tasks).order_by(tasks.c.created_at)).mappings().all()
    return [Task(**{**row, "output": Path(row["output"])}, words=()) for row in rows]
