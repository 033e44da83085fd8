"""docs/rewards.md does what it says: its classes score, its run trains, its server answers; and code of one's own is found."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from callbacks.reward_scoring import RewardScoring
from lit_rl.miniatures.images import build_sd3
from lit_rl.rewards.client import HTTPReward

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


IMAGES, TEXTS, RUN, SERVER = blocks("python")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder, with names of ours in it that are something else."""
    (tmp_path / "my_rewards.py").write_text(IMAGES + TEXTS)
    for name in ("callbacks", "datamodules", "lit_rl", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the package of the working folder was imported')")
    return tmp_path


def python(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_classes_score(folder: Path) -> None:
    names: dict = {}
    exec(compile(IMAGES + TEXTS, "docs/rewards.md", "exec"), names)
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    torch.testing.assert_close(names["Brightness"]().score(images, [{"prompt": "p"}] * 3)["brightness"], torch.tensor([0, 0.2, 1]))
    torch.testing.assert_close(names["Brevity"]().score(["a b", ""], [{"prompt": "p"}] * 2)["brevity"], torch.tensor([0.5, 1]))


WORKING_FOLDER = """
import sys
sys.path.insert(0, "")
from lit_rl.own_code import use_working_folder
use_working_folder(); use_working_folder()
import callbacks, my_rewards
assert sys.path[-1] == {here!r} and sys.path.count({here!r}) == 1, sys.path
assert callbacks.__file__.startswith({ours!r}) and my_rewards.__file__.startswith({here!r})
"""


def test_the_working_folder_is_the_last_place_of_imports(folder: Path) -> None:
    here = str(folder.resolve())
    (folder / "main").mkdir()
    (folder / "main/look.py").write_text(WORKING_FOLDER.format(here=here, ours=str(ROOT)).replace('sys.path.insert(0, "")', ""))
    python(folder, "main/look.py")
    (folder / "lit_rl/__init__.py").unlink()
    (folder / "lit_rl").rmdir()
    python(folder, "-c", WORKING_FOLDER.format(here=here, ours=str(ROOT)))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_server_of_ones_own_and_curl(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "my_server.py").write_text(SERVER.replace("8000", str(port)))
    Image.fromarray(np.full((8, 8, 3), 51, np.uint8)).save(tmp_path / "picture.png")
    process = subprocess.Popen([sys.executable, "my_server.py"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        options = yaml.safe_load(blocks("yaml")[-1])["rewards"]["bright"]["init_args"]
        reward = HTTPReward(**options | {"urls": options["urls"].replace("8000", str(port))})
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        reward.setup(rank=0, world_size=1, device="cpu")
        images = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
        torch.testing.assert_close(reward.score(images, [{"prompt": "p"}] * 2)["brightness"], torch.full((2,), 0.2).double())
        if shutil.which("curl"):
            said = subprocess.run(blocks("sh")[0].replace("8000", str(port)), shell=True, cwd=tmp_path, capture_output=True, text=True)
            assert yaml.safe_load(said.stdout) == {"brightness": 0.2}, said
    finally:
        process.kill()
        process.wait()


def test_texts_over_http(tmp_path: Path) -> None:
    """The page's server, the page's curl and the page's YAML give the same scores."""
    _, serve, curl = blocks("sh")
    port = free_port()
    serve, curl = (text.replace("8000", str(port)) for text in (serve, curl))
    assert serve.startswith("python ")
    process = subprocess.Popen([sys.executable, *shlex.split(serve)[1:]], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        page = yaml.safe_load(blocks("yaml")[1])
        options = page["rewards"]["rules"]["init_args"]
        reward = HTTPReward(**options | {"urls": options["urls"].replace("8000", str(port)), "samples_per_request": 1})
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        reward.setup(rank=0, world_size=1, device="cpu")
        sent = json.loads(re.findall(r"-d '(.*)'", curl)[0])
        scoring = RewardScoring({"rules": reward}, page["weights"])
        scoring.submit([sent["text"], "\\boxed{5}"], [{**sent["row"], "prompt": sent["prompt"]}] * 2)
        scores = scoring.gather()
        scoring.close()
        assert {name: values.tolist() for name, values in scores.items()} == {"score": [1, 0], "acc": [1, 0], "format": [0, 0]}
        if shutil.which("curl"):
            said = subprocess.run(curl, shell=True, capture_output=True, text=True)
            assert yaml.safe_load(said.stdout) == {"score": 1.0, "acc": 1.0, "parsed": 1.0, "format": 0.0}, said
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_python_and_one_from_the_command_line(folder: Path) -> None:
    build_sd3(folder / "models/stable-diffusion-3.5-medium", height=16, width=16)
    (folder / "prompts.txt").write_text("a\nb\nc\nd\n")
    for name in ("callbacks", "datamodules", "lit_rl"):  # a script's own folder comes first in Python
        shutil.rmtree(folder / name)
    run = RUN.replace("resolution=512", "resolution=16, max_sequence_length=8").replace("max_epochs=100", 'max_epochs=1, accelerator="cpu"')
    (folder / "run.py").write_text(run)
    python(folder, "run.py")
    (folder / "callbacks").mkdir()
    (folder / "callbacks/__init__.py").write_text("raise RuntimeError('the package of the working folder was imported')")
    (page,) = [yaml.safe_load(block) for block in blocks("yaml")[:1]]
    policy = {"pretrained": "models/stable-diffusion-3.5-medium", "resolution": 16, "max_sequence_length": 8, "lora": {"rank": 2}}
    policy = {"class_path": "lit_rl.policies.sd3.SD3Policy", "init_args": policy}
    page["model"] = {
        "class_path": "lit_rl.methods.flow_grpo.FlowGRPO",
        "init_args": {"policy": policy, "prompts_per_iteration": 2, "group_size": 2, "num_steps": 2},
    }
    page["data"] = {"class_path": "datamodules.prompts.PromptFiles", "init_args": {"train": "prompts.txt"}}
    page["trainer"] |= {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(page))
    python(folder, str(ROOT / "cli.py"), "fit", "--config", "run.yaml")


@pytest.mark.slow
def test_a_reward_of_ones_own_in_a_server(folder: Path) -> None:
    shutil.rmtree(folder / "lit_rl")  # `python -m` itself would take it for ours
    ready = folder / "ready"
    command = [
        sys.executable,
        "-m",
        "lit_rl.rewards.server",
        "--port",
        "0",
        "--scorers",
        "my_rewards.Brightness",
        "--ready-file",
        str(ready),
    ]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not ready.exists():
            assert time.monotonic() < end and process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        reward = HTTPReward(ready.read_text(), ["brightness"])
        reward.setup(rank=0, world_size=1, device="cpu")
        assert reward.score(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), [{"prompt": "p"}])["brightness"].tolist() == [1.0]
    finally:
        process.kill()
        process.wait()
