"""Says in a sentence why a job failed, from the end of what it printed."""

from __future__ import annotations

import os
import re
from pathlib import Path

LAST_BYTES = 1 << 14
KNOWN = (
    (re.compile(r"CUDA out of memory|OutOfMemoryError"), "the GPU has no memory left: smaller micro-batches or LoRA"),
    (re.compile(r"No space left on device"), "the disk is full"),
    (re.compile(r"Address already in use"), "a port is taken by another program"),
)  # fmt: skip


def explained(reason: str | None, log: Path) -> str:
    """The reason, with what the log's last lines say of it."""
    text = last_text(log)
    known = next((sentence for pattern, sentence in KNOWN if pattern.search(text)), None)
    errors = re.findall(r"^(?:error: .*|\w*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
    more = known or (errors[-1][:500] if errors else "")
    return f"{reason}: {more}" if more else str(reason)


def last_text(log: Path) -> str:
    """The end of a log, as text."""
    try:
        with log.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - LAST_BYTES, 0))
            return file.read(LAST_BYTES).decode("utf-8", "replace")
    except OSError:  # never written, or gone
        return ""
