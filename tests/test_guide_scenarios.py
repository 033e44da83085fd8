"""The three ways in which users start the FLUX-Fill trainer, with its launcher, its servers and one run YAML that nobody edits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from fill import HEIGHT, WIDTH, build_fill, settings
from forked import ended, forked_script
from PIL import Image
from rewards.test_launch import free_ports

from datamodules.inpainting import Inpainting

ROOT = Path(__file__).parent.parent
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("REWARD_", "DISABLE_RL"))} | {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": "",  # no nvidia-smi: on any machine the ids of GPUs are only labels
}
PROCESSES, GROUP, ITERATIONS = 4, 2, 2
GPUS = ["4", "5", "6", "7"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


def write_home(folder: Path) -> Path:
    """A miniature model, inpainting items with their images, and `run.yaml`, whose outputs go to where it is started."""
    build_fill(folder / "model")
    draw = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(draw.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / f"source{i}.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:12, 4:20] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    items = [{"source": f"source{i}.png", "mask": "mask.png", "text": f"TEXT {i}"} for i in range(6)]
    (folder / "data.json").write_text(json.dumps(items))
    (folder / "run.yaml").write_text(yaml.safe_dump(run_yaml(folder)))
    return folder


def run_yaml(folder: Path) -> dict[str, Any]:
    reward = {"class_path": "lit_rl.rewards.client.HTTPReward", "init_args": {"outputs": ["jpeg_size"]}}
    checkpoint = {"dirpath": "out/checkpoints", "save_last": True, "save_on_train_epoch_end": True}
    return {
        "seed_everything": 1,
        "model": {
            "class_path": "lit_rl.methods.flow_grpo.FlowGRPO",
            "init_args": {
                "policy": {"class_path": "lit_rl.policies.flux_fill.FluxFillPolicy", "init_args": settings(folder / "model")},
                "prompts_per_iteration": PROCESSES,
                "group_size": GROUP,
                "num_steps": 2,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
            },
        },
        "data": {
            "class_path": "datamodules.inpainting.Inpainting",
            "init_args": {"train": str(folder / "data.json"), "resolution": [HEIGHT, WIDTH]},
        },
        "trainer": {
            "max_epochs": ITERATIONS,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "out", "name": "logs", "version": ""},
            },
            "callbacks": [
                {"class_path": "callbacks.reward_scoring.RewardScoring", "init_args": {"rewards": {"server": reward}}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
            ],
        },
    }


@contextmanager
def launched(folder: Path, gpus: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The launcher, once it says that Ctrl+C stops the servers, and the first port. It and they are gone afterwards."""
    port, said = free_ports(len(gpus)), folder / "launcher.out"
    command = [sys.executable, "-m", "lit_rl.rewards.launch", "--port", str(port), "--gpu-ids", ",".join(gpus)]
    with said.open("wb") as output:
        process = subprocess.Popen([*command, "--", "--scorers", "witness.Witness"], cwd=folder, env=ENV, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 90
        while "Press Ctrl+C to stop all servers." not in said.read_text():
            assert process.poll() is None and time.monotonic() < end, said.read_text()
            time.sleep(0.1)
        assert [line for line in said.read_text().splitlines() if line.startswith("Launching")] == [
            f"Launching server on GPU {gpu} at 127.0.0.1:{port + i} ✓" for i, gpu in enumerate(gpus)
        ]
        yield process, port
    finally:
        process.kill()
        process.wait()


def train(home: Path, folder: Path, base: str, *options: str, **environment: str) -> tuple[str, list[dict[str, str]]]:
    """Run the same `run.yaml` over a base; what was printed, and the logged rows."""
    words = [str(ROOT / "cli.py"), "fit", "--config", str(ROOT / f"configs/base/{base}.yaml")]
    words += ["--config", str(home / "run.yaml"), "--trainer.accelerator", "cpu", *options]
    code, said = ended(forked_script(*words, folder=folder, environment=ENV | environment), timeout=200), (folder / "log").read_text()
    assert code == 0, said[-3000:]
    last = torch.load(folder / "out/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == ITERATIONS - 1
    head, *lines = [line.split(",") for line in (folder / "out/logs/metrics.csv").read_text().splitlines()]
    return said, [dict(zip(head, line)) for line in lines]


def asked(folder: Path, gpu: str) -> list[str]:
    """Every prompt that the server of a GPU was asked for, from its log."""
    lines = (folder / f"logs/reward_server_gpu_{gpu}.log").read_text().splitlines()
    return [prompt for line in lines if line.startswith("asked ") for prompt in json.loads(line.removeprefix("asked "))]


def prompts(home: Path, iteration: int) -> list[str]:
    data = Inpainting(str(home / "data.json"), resolution=(HEIGHT, WIDTH), seed=1)
    return [row["prompt"] for row in data.prompts(iteration, PROCESSES)]


@pytest.mark.slow
def test_four_processes_and_four_servers(home: Path, tmp_path: Path) -> None:
    """Rank i trains on the i-th prompt of every iteration, so server i must have been asked for those and no others; Ctrl+C stops all."""
    with launched(tmp_path, GPUS) as (launcher, port):
        train(home, tmp_path, "ddp", "--trainer.devices", str(PROCESSES), REWARD_SERVER_PORT=str(port))
        servers = psutil.Process(launcher.pid).children()
        assert len(servers) == len(GPUS)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(90) == 0
        assert not any(server.is_running() for server in servers)
    for rank, gpu in enumerate(GPUS):
        assert asked(tmp_path, gpu) == [prompts(home, i)[rank] for i in range(ITERATIONS) for _ in range(GROUP)]


@pytest.mark.slow
def test_one_process_and_one_server(home: Path, tmp_path: Path) -> None:
    with launched(tmp_path, GPUS[:1]) as (_, port):
        _, rows = train(home, tmp_path, "one_gpu", REWARD_SERVER_PORT=str(port))
    assert asked(tmp_path, GPUS[0]) == [p for i in range(ITERATIONS) for p in prompts(home, i) for _ in range(GROUP)]
    assert all(float(row["reward/server/failures"]) == 0 for row in rows if row.get("reward/server/failures"))


@pytest.mark.slow
def test_no_server_at_all(home: Path, tmp_path: Path) -> None:
    """Pseudo scores lie in [0, 1), the server's are negative."""
    printed, rows = train(home, tmp_path, "one_gpu", DISABLE_RL_REWARD_MODEL="true", REWARD_SERVER_PORT="9")
    assert "NO REWARD MODEL IS ASKED" in printed
    means = [float(row["reward_mean"]) for row in rows if row.get("reward_mean")]
    assert len(means) == ITERATIONS and all(0 < mean < 1 for mean in means)
