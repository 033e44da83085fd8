"""The output of jobs, read by byte offset: without escape codes, and of a progress bar its last state."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lit_rl.platform.hub import Hub
from lit_rl.platform.places import size_of
from lit_rl.platform.records import Records

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
FOLLOWED = 256 << 10
LONGEST = 8192
"""Characters of a line that are shown."""


class Logs:
    """The output of a store's jobs."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self._told: dict[str, int] = {}

    def follow(self, job: str, hub: Hub) -> None:
        """Tell what a job has printed since the last look, as far as anybody listens."""
        path = self.path(job)
        size = size_of(path) or 0
        if hub.heard and (job in self._told) and size != self._told[job]:
            part = self.read(job, offset=self._told[job], limit=FOLLOWED)
            if part["text"]:
                hub.publish("log", job, stream="stdout", offset=self._told[job], text=part["text"])
            size = int(str(part["next_offset"]))
        if size != self._told.get(job):
            self._told[job] = size

    def path(self, job: str) -> Path:
        """The file that a job prints into."""
        return self.records.folder(job) / "stdout.log"

    def read(self, job: str, *, offset: int, limit: int) -> dict[str, object]:
        """Lines from a byte offset on, where the next reading begins, and the size. An offset behind the end begins anew: another file."""
        try:
            with self.path(job).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                begin = max(size + offset, 0) if offset < 0 else offset if offset <= size else 0
                file.seek(begin)
                data = file.read(limit)
        except FileNotFoundError:
            return {"text": "", "next_offset": 0, "size": 0, "eof": True}
        if offset < 0 and begin:  # the middle of a line
            skipped = data.find(b"\n") + 1
            begin, data = begin + skipped, data[skipped:]
        end = data.rfind(b"\n") + 1
        if not end and len(data) == limit:
            end = limit  # a line without an end
        return {"text": readable(data[:end]), "next_offset": begin + end, "size": size, "eof": begin + len(data) >= size}


def readable(data: bytes) -> str:
    """Text of a terminal's output."""
    lines = ESCAPES.sub("", data.decode("utf-8", "replace")).replace("\r\n", "\n").split("\n")
    last = (line.rstrip("\r").rpartition("\r")[2] for line in lines)
    return "\n".join(CONTROL.sub("", line)[:LONGEST] for line in last)
