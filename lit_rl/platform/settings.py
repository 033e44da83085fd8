"""Options of a server of the platform."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lit_rl.net.guards import socket_owner
from lit_rl.platform.gpu_reader import GpuReader

SHORTEST = 16
"""Letters of a token; with an empty one everybody could enter."""

Owner = Callable[[tuple[str, int], tuple[str, int]], int | None]
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """Options of a server.

    data: its folder: database, token, folders of runs. url: where jobs report to. allowed_hosts: names in the Host header beside those of
    loopback. owner: the user id of a caller on this machine, whose own user needs no token. run_root: folder that has `cli.py`, `configs`
    and the data that relative paths mean. body_seconds: time in which the body of a request must arrive. cpu_jobs: how many jobs without
    GPUs run at the same time. gpu_ids: those that jobs may have; None: all of the machine.
    reader: what measures GPUs; None: NVIDIA's driver.
    """

    data: Path
    url: str = "http://127.0.0.1:8000"
    allowed_hosts: tuple[str, ...] = ()
    owner: Owner = socket_owner
    run_root: Path = REPOSITORY
    body_seconds: float = 10.0
    cpu_jobs: int = field(default_factory=lambda: max((os.cpu_count() or 1) // 2, 1))
    gpu_ids: tuple[int, ...] | None = None
    reader: GpuReader | None = None
    token: str = field(default="", repr=False)

    @property
    def token_file(self) -> Path:
        """The file that holds the token, readable by its owner alone."""
        return self.data / "token"


def token_of(folder: Path) -> str:
    """The token of a data folder; made, and readable by this user alone, where there is none. Raises ValueError for one that is none."""
    path, whole = folder / "token", folder / f"token.{secrets.token_hex(4)}"
    if not path.exists():
        with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
        whole.rename(path)
    token = path.read_text().strip()
    if len(token) < SHORTEST or path.stat().st_mode & 0o077:
        raise ValueError(f"{path} is shorter than {SHORTEST} letters, or others may read it: remove it, and a new one is made")
    return token
