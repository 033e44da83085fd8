"""A platform in this process, asked without a network, or on a free port by a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi.testclient import TestClient

from lit_rl.net.sockets import bind, url_of
from lit_rl.platform.app import create_app
from lit_rl.platform.patience import PatientProtocol
from lit_rl.platform.settings import Settings

GUIDE_JOB: dict[str, Any] = {
    "name": "qwen7b-grpo-math", "description": "Qwen2.5-7B GRPO training on GSM8K", "model_path": "Qwen/Qwen2.5-7B-Instruct",
    "model_size": "7B", "algorithm": "grpo", "train_data_path": "/data/gsm8k/train.parquet", "eval_data_path": "/data/gsm8k/test.parquet",
    "num_gpus": 8, "learning_rate": 1e-6, "batch_size": 1024, "num_epochs": 15, "context_length": 1536, "rollout_n": 5, "kl_coef": 0.001,
}  # fmt: skip
"""The body of the platform guide's 4.5."""


@contextmanager
def asked(folder: Path, *, user: int | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client of a platform on a folder, whose connections belong to `user` (default: this one)."""
    owner = os.getuid() if user is None else user
    app = create_app(Settings(data=folder / "data", owner=lambda *_: owner, **settings))
    with TestClient(app, base_url="http://localhost:8000", client=("127.0.0.1", 50000), raise_server_exceptions=False) as client:
        yield client


@contextmanager
def listening(folder: Path, **settings: Any) -> Iterator[str]:
    """The URL of a platform on a free port."""
    sock = bind("127.0.0.1", 0)
    app = create_app(Settings(data=folder / "data", url=url_of(sock), **settings))
    config = uvicorn.Config(
        app, log_level="error", timeout_graceful_shutdown=2, ws_max_size=1 << 16, lifespan="on", http=PatientProtocol, loop="asyncio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        yield url_of(sock)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
