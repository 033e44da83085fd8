"""Runs of several processes that lose some of them, are stopped, or stand on two nodes."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from forked import ROOT, end_group, ended, forked_script
from toy import toy_config

EPOCHS = 8
STEPS = 2 * EPOCHS


class Accident(L.Callback):
    """The process of rank r kills or freezes itself before optimizer step s, once, where the run's folder has a file `s.r.SIGNAL`."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for file in Path(trainer.default_root_dir).glob(f"{trainer.global_step}.{trainer.global_rank}.SIG*"):
            file.unlink()
            os.kill(os.getpid(), signal.Signals[file.suffix[1:]])


def config(folder: Path, **heartbeat: float) -> Path:
    """Four minibatches an iteration, two optimizer steps, statistics of prompts; a checkpoint after each step."""
    run = toy_config(folder, updates_per_iteration=2, advantage={"kind": "history"}, kl={"coef": 0.1})
    run["trainer"] |= {"max_epochs": EPOCHS, "limit_val_batches": 0}
    keeper = {"dirpath": str(folder / "checkpoints"), "filename": "{step}", "save_last": True, "every_n_train_steps": 1}
    run["trainer"]["callbacks"][1:] = [
        {"class_path": "test_launched_runs.Accident"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper},
    ]
    run["run"] = {"callbacks": {"heartbeat": heartbeat}}
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def launched(folder: Path, *words: str, log: str = ".", **heartbeat: float) -> BaseProcess:
    """The launcher, with the processes forked from it."""
    file = config(folder, **heartbeat)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))}
    (folder / log).mkdir(exist_ok=True)
    script = str(Path(__file__).with_name("forking_launch.py"))
    return forked_script(script, *words, "--", "fit", "--config", str(file), folder=folder / log, environment=environment)


def said(folder: Path) -> str:
    return (folder / "log").read_text()


def finish(process: BaseProcess, folder: Path, log: str = ".") -> dict[str, Any]:
    try:
        assert ended(process, timeout=500) == 0, said(folder / log)[-5000:]
    finally:
        end_group(process)
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of two processes to which nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken")
    return finish(launched(folder / "run", "--nproc-per-node", "2"), folder / "run")


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Weights, moments and statistics of two runs are equal, bit for bit."""
    from test_kill_and_resume import differences

    parts = ("state_dict", "optimizer_states", "prompt_history", "rng", "global_step", "epoch")
    return not [d for part in parts for d in differences(a.get(part), b.get(part), part)]


@pytest.mark.slow
def test_killed_processes_do_not_change_the_run(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    moment, folder = random.Random(time.time_ns()), tmp_path / "run"
    folder.mkdir()
    kills = [(step, moment.randrange(2)) for step in sorted(moment.sample(range(1, STEPS), 3))]
    for step, rank in kills:
        (folder / f"{step}.{rank}.SIGKILL").touch()
    killed = finish(launched(folder, "--nproc-per-node", "2", "--restarts", "3"), folder)
    told = re.findall(r"launcher: process (\d) \(pid \d+ on .*\) was ended by SIGKILL, so all do; .* \(restart (\d) of 3\)", said(folder))
    assert told == [(str(rank), str(i + 1)) for i, (_, rank) in enumerate(kills)], said(folder)[-5000:]
    assert unbroken["epoch"] == EPOCHS - 1 and same(unbroken, killed), kills


@pytest.mark.slow
def test_a_frozen_process_is_named_and_the_run_goes_on(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    """The first process has the store in which the others count; nobody is waited for longer than the heartbeat says."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "5.0.SIGSTOP").touch()
    frozen = finish(launched(folder, "--nproc-per-node", "2", "--restarts", "1", seconds=12.0), folder)
    assert re.search(r"error: process 0 \(pid \d+ on .*\) has not answered for 12 s .*continue with --ckpt_path .*ckpt", said(folder))
    assert same(unbroken, frozen)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_the_same_command_continues(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    """No restart is made of a stop that was asked for."""
    folder = tmp_path / "run"
    process = launched(folder, "--nproc-per-node", "2", "--restarts", "2")
    try:
        until(lambda: (folder / "checkpoints" / "last.ckpt").exists())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process, timeout=200) == 143, said(folder)[-5000:]
    finally:
        end_group(process)
    assert "stopped by SIGTERM" in said(folder) and "restart" not in said(folder)
    assert same(unbroken, finish(launched(folder, "--nproc-per-node", "2"), folder))


@pytest.mark.slow
def test_two_nodes_and_a_lost_process_of_one(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    """The other node starts its own process again; which of them is started first does not matter."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "3.1.SIGKILL").touch()
    words = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--nproc-per-node", "1", "--restarts", "2")
    started = [launched(folder, *words, "--node-rank", "1", log="node1")]
    try:
        until(lambda: (folder / "node1" / "log").exists() and "node 1 waits for node 0" in said(folder / "node1"))
        started.append(launched(folder, *words, "--node-rank", "0", log="node0"))
        assert ended(started[0], timeout=500) == 0, said(folder / "node1")[-5000:]
        assert same(unbroken, finish(started[1], folder, "node0"))
    finally:
        for process in started:
            end_group(process)
    assert "was ended by SIGKILL" in said(folder / "node0") + said(folder / "node1")


@pytest.mark.slow
def test_a_mistake_is_told_once_and_not_tried_again(tmp_path: Path) -> None:
    """By processes of their own interpreter, which the launcher of every user starts."""
    file = config(tmp_path / "run")
    words = ["--nproc-per-node", "2", "--restarts", "2", "--", "fit", "--config", str(file), "--model.init_args.sibling", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))}
    done = subprocess.run([sys.executable, "-m", "lit_rl.launch", *words], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "no option 'sibling'" in done.stderr and "restart 1" not in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(true: Callable[[], object], timeout: float = 200) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
