"""The NVIDIA GPUs of this machine as its driver counts them, whatever CUDA_VISIBLE_DEVICES hides; known without importing torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

QUERY = ("index", "name", "memory.total", "memory.used", "compute_cap")


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in MiB, capability as 9.0."""

    index: int
    name: str
    memory: int
    used: int
    capability: float


def gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse(done.stdout) if done.returncode == 0 else []


def parse(table: str) -> list[Gpu]:
    """Rows of `nvidia-smi --query-gpu`; figures that a GPU does not tell (`[N/A]`) are 0."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.count(",") == len(QUERY) - 1]
    return [
        Gpu(int(index), name, int(_figure(memory)), int(_figure(used)), _figure(capability))
        for index, name, memory, used, capability in rows
        if index.isdecimal()
    ]


def _figure(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return 0.0


def chosen_ids(text: str, found: Sequence[Gpu], *, option: str) -> list[str]:
    """The ids that a comma list names: numbers, `GPU-...` or `MIG-...` UUIDs, or `all` of `found`. Raises ValueError."""
    if text.strip() == "all":
        if not found:
            raise ValueError(f"{option} all: this machine has no NVIDIA GPU; give numbers, which then only name the logs")
        return [str(gpu.index) for gpu in found]
    ids = [str(int(i)) if re.fullmatch(r"[0-9]{1,4}", i) else i for i in map(str.strip, text.removesuffix(",").split(","))]
    if not all(re.fullmatch(r"[0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z/-]+", i) for i in ids) or len(set(ids)) != len(ids):
        raise ValueError(f"{option} is {text!r}; expected different ids with commas between them, e.g. 4,5,6,7, or UUIDs, or all")
    check_ids(ids, found, option=option)
    return ids


def check_ids(ids: Sequence[str], found: Sequence[Gpu], *, option: str) -> None:
    """Raises ValueError when numbers among `ids` are no GPUs of this machine, which has some: CUDA would silently show none."""
    there = [str(gpu.index) for gpu in found]
    missing = [i for i in ids if i.isdecimal() and i not in there]
    if there and missing:
        raise ValueError(
            f"{option} {','.join(ids)}: this machine has no GPU {', '.join(missing)}, it has {', '.join(there)}; "
            f"give {option} {','.join(there[-len(ids) :])}"
        )
