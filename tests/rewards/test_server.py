"""The server as a process: arguments, start, drain on a signal, exit codes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from lit_rl.errors import ConfigError
from lit_rl.net.sockets import bind
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.server import check_arguments, parser
from lit_rl.rewards.service.wire import encode_batch

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@contextmanager
def running(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A server process that is gone afterwards."""
    command = [sys.executable, "-m", "lit_rl.rewards.server", "--port", "0", *options]
    process = subprocess.Popen(command, env=ENV, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def scored(url: str, count: int) -> list[int]:
    """Statuses of `count` single-image requests sent at once."""
    body = encode_batch(np.zeros((1, 8, 8, 3), np.uint8), ["a"], request_id="")
    async with aiohttp.ClientSession() as session:

        async def one() -> int:
            async with session.post(f"{url}/v1/score_batch", data=body, headers={"Content-Type": "application/octet-stream"}) as r:
                return r.status

        return list(await asyncio.gather(*(one() for _ in range(count))))


def test_sigterm_drains_and_ends_with_code_0(tmp_path: Path) -> None:
    """40 images are in flight when the signal comes: all are answered, a new one gets 503."""
    ready, slow = tmp_path / "ready", '{"slow_reward.SlowReward": {"seconds": 0.5}}'
    with running("--scorers", "slow_reward.SlowReward", "--scorer-args", slow, "--max-batch", "10", "--ready-file", str(ready)) as process:
        until(ready.exists)
        url = ready.read_text()

        async def scenario() -> tuple[list[int], int, str]:
            held = asyncio.create_task(scored(url, 40))
            async with aiohttp.ClientSession() as session:
                while (await (await session.get(f"{url}/health")).json())["queue_images"] < 40:
                    await asyncio.sleep(0.01)
                process.terminate()
                while (await session.get(f"{url}/health")).status == 200:
                    await asyncio.sleep(0.01)
                async with session.post(f"{url}/score", json={}) as r:
                    late, after = r.status, r.headers["Retry-After"]
            return await held, late, after

        statuses, late, after = asyncio.run(scenario())
        assert statuses == [200] * 40
        assert (late, after) == (503, "5")
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read().startswith(f"Reward server ready at {url} (scorers: slow_reward.SlowReward")
        assert not ready.exists()


def test_a_score_that_the_server_does_not_give_is_found_at_the_start_of_the_run(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with running("--scorers", "pseudo,jpeg", "--ready-file", str(ready)):
        until(ready.exists)
        HTTPReward(ready.read_text(), outputs={"size": "jpeg_size"}).setup(rank=0, world_size=1, device="cpu")
        with pytest.raises(
            ConfigError, match=r"gives the scores pseudo, jpeg_size, not jpg_size; did you mean 'jpeg_size'\? Set HTTPReward's"
        ):
            HTTPReward(ready.read_text(), outputs=["pseudo", "jpg_size"]).setup(rank=0, world_size=1, device="cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_health_answers_and_signals_work_while_the_scorers_load(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def status() -> int | None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None
        return 200

    with running("--port", str(port), "--scorers", "endless_import.Reward") as process:
        until(lambda: status() == 503)
        process.send_signal(number)
        assert process.wait(60) == 0


def test_a_scorer_that_cannot_load_ends_with_code_1_and_a_sentence() -> None:
    with running("--scorers", "no_such_module.Reward") as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert errors.splitlines()[-1] == "The scorers no_such_module.Reward could not be loaded: No module named 'no_such_module'"


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import lit_rl.rewards.server, lit_rl.rewards.launch; sys.exit(bool({'torch', 'numpy', 'aiohttp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENV, cwd=ROOT).returncode == 0
    assert (
        "--vlm-model-path"
        in subprocess.run([sys.executable, "-m", "lit_rl.rewards.server", "--help"], env=ENV, capture_output=True, text=True).stdout
    )


def test_a_taken_port_is_one_sentence_naming_the_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"127.0.0.1:{port}: Address already in use by .*\(pid {os.getpid()}\); choose another with --port"
        ):
            bind("127.0.0.1", port)
        command = [sys.executable, "-m", "lit_rl.rewards.server", "--port", str(port)]
        done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_named(port: int) -> None:
    with pytest.raises(ValueError, match=rf"127.0.0.1:{port}: ports are 0 to 65535; choose another with --page-port"):
        bind("127.0.0.1", port, option="--page-port")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--scorers", "orc"], "no scorer 'orc'; choose from ocr, quoted, vlm"),
        (["--scorers", ","], "no scorer was named"),
        (["--scorers", "vlm"], "needs a model; give --vlm-model-path"),
        (["--scorers", "clip"], "--scorer-args"),
        (["--vlm-model-path", "/nowhere/qwen"], "does not exist: /nowhere/qwen"),
        (["--scorer-args", '{"clip": {}}'], "options were given for clip"),
        (["--scorer-args", "[1]"], "must map scorers to options"),
        (["--host", "0.0.0.0"], "--token or set REWARD_TOKEN, or say --no-auth"),
        (["--max-batch", "0"], "--max-batch is 0; it must be positive"),
        (["--port", "70000"], "--port is 70000"),
    ],
)
def test_wrong_arguments_are_one_sentence(options: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(ValueError, match=text):
        check_arguments(parser().parse_args(options))


@pytest.mark.parametrize(
    ("options", "scorers"),
    [
        ([], ["ocr"]),
        (["--vlm-model-path", "Qwen/Qwen2.5-VL-7B-Instruct"], ["ocr", "vlm"]),
        (["--scorers", "pseudo,jpeg"], ["pseudo", "jpeg"]),
    ],
)
def test_default_scorers(options: list[str], scorers: list[str]) -> None:
    args = parser().parse_args(options)
    check_arguments(args)
    assert args.scorers == scorers


def test_beyond_loopback_with_a_token_or_on_purpose() -> None:
    for options in (["--token", "x"], ["--no-auth"]):
        args = parser().parse_args(["--host", "0.0.0.0", *options])
        check_arguments(args)
        assert (args.token, args.no_auth) == (("x", False) if "--token" in options else (None, True))
