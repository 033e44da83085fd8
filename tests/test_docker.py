"""docker/ and scripts/run_vllm_base.sh without a daemon: docker-compose and hadolint read them, a stand-in runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rl.doctor.runs import parse

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docker"
KEY = "GBOX_API_KEY=of-mine\n"
STAND_IN = """#!/bin/sh
echo "$* | options: $TRAINER_OPTIONS | token: ${HF_TOKEN:-none}" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 3;; esac
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the files, where .env may stand."""
    shutil.copytree(FOLDER, tmp_path / "docker")
    shutil.copy(ROOT / "env.example", tmp_path)
    return tmp_path


@pytest.fixture
def services(home: Path) -> Any:
    """The services as docker-compose reads them."""
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed: apt-get install docker-compose")
    (home / ".env").write_text(KEY)
    command = ["docker-compose", "-f", "docker/docker-compose.areal.yml", "config"]
    return yaml.safe_load(subprocess.check_output(command, cwd=home, text=True))["services"]


def test_the_services_are_the_guides(services: Any) -> None:
    vllm, trainer = services["vllm"], services["trainer"]
    assert (vllm["container_name"], vllm["init"], trainer["init"]) == ("vllm-cua-areal", True, True)
    assert vllm["healthcheck"]["test"][-1] == "http://localhost:8000/health" and "curl" in vllm["healthcheck"]["test"]
    assert trainer["depends_on"] == {"vllm": {"condition": "service_healthy"}}
    assert trainer["environment"]["VLLM_API_BASE"] == "http://vllm:8000/v1" and trainer["environment"]["GBOX_API_KEY"] == "of-mine"
    assert "GBOX_API_KEY" not in vllm["environment"]  # which is the trainer's alone
    gpus = [set(service["environment"]["CUDA_VISIBLE_DEVICES"].split(",")) for service in (vllm, trainer)]
    assert len(gpus[0]) == len(gpus[1]) == 4 and not gpus[0] & gpus[1]
    words = shlex.split(vllm["command"])
    for option, value in {
        "--tensor-parallel-size": "4",
        "--max-model-len": "16384",
        "--gpu-memory-utilization": "0.85",
        "--max-lora-rank": "32",
    }.items():
        assert words[words.index(option) + 1] == value


def test_the_trainers_command_is_a_run_that_shares_a_folder_with_vllm(services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(services["trainer"]["command"])
    run = parse(words[1:])
    folder = run.model.init_args.answers.engine.init_args.sync_dir
    mounted = [{volume.split(":")[1] for volume in services[name]["volumes"]} for name in ("vllm", "trainer")]
    assert words[0] == "fit" and folder in mounted[0] & mounted[1]
    assert f"/app/{run.run.dir}" in mounted[1]


def test_the_dockerfile_has_no_faults() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(ROOT / ".venv/bin"))
    assert linter is not None, "hadolint is not installed: make setup"
    done = subprocess.run([linter, str(FOLDER / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_into_the_image_is_there_and_let_through() -> None:
    text, kept = (FOLDER / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert len(copied) >= 8 and all((ROOT / path).exists() and f"!{path}\n" in kept for path in copied)
    pinned = re.search(r"torch==[\d.]+", text)
    assert pinned and f"\n{pinned[0]}\n" in (ROOT / "constraints.txt").read_text()


def launched(home: Path, *options: str, fails: str = "nothing", seconds: str = "100") -> tuple[int, str, list[str]]:
    """Exit status, errors, and what was asked of docker-compose."""
    calls, programs = home / "calls", home / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "docker-compose").write_text(STAND_IN)
    (programs / "docker-compose").chmod(0o755)
    (programs / "sleep").write_text("#!/bin/sh\nexit 0\n")
    (programs / "sleep").chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails, "VLLM_READY_SECONDS": seconds}
    done = subprocess.run(
        [str(home / "docker/docker_train_areal.sh"), *options], env=environment, capture_output=True, text=True, timeout=200
    )
    found = calls.read_text().replace("-f docker/docker-compose.areal.yml ", "").splitlines() if calls.exists() else []
    return done.returncode, done.stderr, found


def test_the_script_builds_waits_trains_and_takes_down(home: Path) -> None:
    (home / ".env").write_text((home / "env.example").read_text().replace("your_gbox_api_key_here", "'of mine' # a comment"))
    status, _, calls = launched(home, "--trainer.max_epochs", "2")
    asked = [call.partition(" | ")[0] for call in calls]
    health = "exec -T vllm curl --fail --silent http://localhost:8000/health"
    assert (status, asked) == (0, ["build", "up -d vllm", health, "up --exit-code-from trainer trainer", "down"])
    assert calls[3].endswith("options: --trainer.max_epochs 2 | token: none")  # the placeholder is nobody's token


def test_the_script_takes_down_what_failed(home: Path) -> None:
    (home / ".env").write_text(KEY)
    status, _, calls = launched(home, fails="up --exit")
    assert status == 3 and calls[-1].startswith("down")
    (home / "calls").unlink()
    status, said, calls = launched(home, fails="curl", seconds="-1")
    assert status == 1 and "docker logs vllm-cua-areal" in said and calls[-1].startswith("down") and "up --exit" not in "".join(calls)


@pytest.mark.parametrize(
    ("text", "told"), [(None, "cp env.example .env"), ("", "GBOX_API_KEY is not set"), ("GBOX_API_KEY=your_key", "GBOX_API_KEY is not set")]
)
def test_the_script_starts_nothing_without_a_key(home: Path, text: str | None, told: str) -> None:
    if text is not None:
        (home / ".env").write_text(text)
    status, said, calls = launched(home)
    assert status == 2 and told in said and calls == []


def test_the_local_vllm_has_the_guides_options() -> None:
    def words(**given: str) -> list[str]:
        environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1"} | given
        return shlex.split(subprocess.check_output([str(ROOT / "scripts/run_vllm_base.sh"), "--seed", "1"], env=environment, text=True))

    plain, shared = words(), words(TENSOR_PARALLEL_SIZE="8", GPU_MEMORY_UTILIZATION="0.3")
    assert plain[:3] == ["vllm", "serve", "Qwen/Qwen3-VL-32B-Instruct"] and plain[-2:] == ["--seed", "1"]
    for found, value in ((plain, "4"), (shared, "8")):
        assert found[found.index("--tensor-parallel-size") + 1] == value
    assert shared[shared.index("--gpu-memory-utilization") + 1] == "0.3" and "processed_logprobs" in plain
