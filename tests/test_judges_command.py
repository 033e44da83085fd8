"""`python -m lit_rl.judges`: the line that is run, whoever has the port, signals and exit codes."""

import os
import shlex
import signal
import socket
import stat
import time
from pathlib import Path

import pytest
from forked import ended, forked_script

from lit_rl import judges

ROOT = Path(__file__).parent.parent
VARIABLES = (
    "VLLM_PARALLEL_MODE",
    "VLLM_DATA_PARALLEL_SIZE",
    "UNIFIEDREWARD_MODEL",
    "UNIGENBENCH_MODEL_NAME",
    "DP_SIZE",
    "UNIGENBENCH_PORT",
)


def line(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert judges.main([*words[:1], "--dry-run", *words[1:]]) == 0
    return shlex.split(capsys.readouterr().out)


def test_the_line_is_that_of_the_guides_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert line(capsys, "unifiedreward") == shlex.split(
        "VLLM_SERVER_DEV_MODE=1 PYTHONNOUSERSITE=1 vllm serve CodeGoat24/UnifiedReward-Think-qwen3vl-8b --host 127.0.0.1 --port 18087 "
        "--served-model-name UnifiedReward --gpu-memory-utilization 0.9 --data-parallel-size 8 --pipeline-parallel-size 1 "
        "--limit-mm-per-prompt.image 16 --enable-prefix-caching --enable-sleep-mode"
    )
    assert line(capsys, "unigenbench", "--port", "8001", "--", "--max-model-len", "8192") == shlex.split(
        "VLLM_SERVER_DEV_MODE=1 PYTHONNOUSERSITE=1 vllm serve CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1 --host 127.0.0.1 --port 8001 "
        "--served-model-name UniGenBench-EvalModel-qwen3vl-32b-v1 --gpu-memory-utilization 0.8 --data-parallel-size 8 --enable-sleep-mode "
        "--max-model-len 8192"
    )


def test_variables_of_the_guide_take_effect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"UNIFIEDREWARD_MODEL": "/models/a b", "VLLM_PARALLEL_MODE": "tp", "VLLM_DATA_PARALLEL_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    found = line(capsys, "unifiedreward")
    assert found[4] == "/models/a b" and found[found.index("--tensor-parallel-size") + 1] == "4" and "--data-parallel-size" not in found
    monkeypatch.setenv("UNIFIEDREWARD_VLLM_TENSOR_PARALLEL_SIZE", "2")
    monkeypatch.setenv("UNIGENBENCH_MODEL_NAME", "mine")
    monkeypatch.setenv("UNIGENBENCH_PORT", "9000")
    assert "2" in line(capsys, "unifiedreward") and {"mine", "9000"} <= set(line(capsys, "unigenbench"))
    monkeypatch.setenv("VLLM_PARALLEL_MODE", "dp")
    monkeypatch.delenv("VLLM_DATA_PARALLEL_SIZE")
    monkeypatch.setenv("DP_SIZE", "3")
    assert "3" in line(capsys, "unigenbench") and "3" not in line(capsys, "unifiedreward")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("VLLM_PARALLEL_MODE", "pp", "VLLM_PARALLEL_MODE=pp in the environment must be dp"),
        ("VLLM_DATA_PARALLEL_SIZE", "0", "VLLM_DATA_PARALLEL_SIZE=0 in the environment must be a whole number above 0"),
        ("VLLM_GPU_MEMORY_UTILIZATION", "9", "VLLM_GPU_MEMORY_UTILIZATION=9 in the environment must be a share"),
        ("UNIGENBENCH_PORT", "http", "UNIGENBENCH_PORT in the environment is http; ports are"),
    ],
)
def test_a_variable_that_cannot_be_meant_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    assert judges.main(["unigenbench", "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err


def program(folder: Path, body: str) -> str:
    """A `vllm` of a few lines of shell."""
    (file := folder / "vllm").write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_who_has_the_port_is_named_and_a_missing_program_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert judges.main(["unigenbench", "--port", port, "--vllm", program(tmp_path, "exit 0")]) == 2
    told = capsys.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use" in told and f"(pid {os.getpid()})" in told and "choose another with --port" in told
    assert judges.main(["unigenbench", "--vllm", str(tmp_path / "none")]) == 2
    assert "there is no program" in capsys.readouterr().err


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(("body", "sent", "code"), [
    ("exit 7", None, 7),
    ("kill -9 $$", None, 137),
    ("trap 'exit 3' TERM\ntouch started\nwhile true; do sleep 0.1; done", signal.SIGTERM, 3),
    ("trap 'exit 4' INT\ntouch started\nwhile true; do sleep 0.1; done", signal.SIGINT, 4),
])  # fmt: skip
def test_signals_go_on_and_the_exit_code_comes_back(tmp_path: Path, body: str, sent: int | None, code: int) -> None:
    checked = 'test "$VLLM_SERVER_DEV_MODE$PYTHONPATH" = 1 || exit 99\n' + body
    words = (str(ROOT / "lit_rl/judges.py"), "unigenbench", "--port", free_port(), "--vllm", program(tmp_path, checked))
    process = forked_script(*words, folder=tmp_path)
    if sent is not None:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.pid is not None
        os.kill(process.pid, sent)
    assert ended(process, 120) == code, (tmp_path / "log").read_text()
