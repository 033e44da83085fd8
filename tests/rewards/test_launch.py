"""The launcher: the documented lines, one server per id, restarts, and nothing left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from lit_rl.net.gpus import Gpu, chosen_ids, parse
from lit_rl.rewards import launch
from lit_rl.rewards.launch import LaunchError, hold_logs, keep_alive, parser, plan, wait_ready
from lit_rl.rewards.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
"""Without a path there is no nvidia-smi: on any machine the ids are only labels."""


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "installed_gpus", list)


def until(condition: Callable[[], bool], *, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            first = probe.getsockname()[1]
        try:
            for i in range(count):
                socket.create_server(("127.0.0.1", first + i)).close()
            return first
        except (OSError, OverflowError):
            continue


def command(port: int, gpus: str, folder: Path, *extra: str) -> list[str]:
    options = ["--port", str(port), "--gpu-ids", gpus, "--log-dir", str(folder / "logs"), "--", "--scorers", "pseudo", *extra]
    return [sys.executable, "-m", "lit_rl.rewards.launch", *options]


@contextmanager
def launched(port: int, gpus: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], list[str]]]]:
    """A launcher and a function that tells what it has printed; it and its servers are gone afterwards."""
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(command(port, gpus, folder), env=ENV, cwd=ROOT, stdout=file, stderr=file)
    try:
        yield process, lambda: output.read_text().splitlines()
    finally:
        process.kill()  # the kernel takes the servers along
        process.wait()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
def test_from_start_to_ctrl_c(tmp_path: Path) -> None:
    port = free_ports(2)
    lines = [f"Launching server on GPU {gpu} at 127.0.0.1:{port + i} ✓" for i, gpu in enumerate([4, 5])]
    lines[:0] = ["This machine has no NVIDIA GPU: the servers compute on the CPU, --gpu-ids 4,5 only names their logs."]
    with launched(port, "4,5", tmp_path) as (process, printed):
        until(lambda: bool(printed()) and "Ctrl+C" in printed()[-1])
        assert printed() == [*lines, "Press Ctrl+C to stop all servers."]
        servers = children(process)
        assert sorted(s.environ()["CUDA_VISIBLE_DEVICES"] for s in servers) == ["4", "5"]
        assert all(f":{port + i} " in (tmp_path / f"logs/reward_server_gpu_{gpu}.log").read_text() for i, gpu in enumerate([4, 5]))

        clash = subprocess.run(command(port + 1, "6", tmp_path / "b"), env=ENV, cwd=ROOT, capture_output=True, text=True)
        assert clash.returncode == 2 and re.search(rf"{port + 1}: Address already in use by .*\(pid \d+\)", clash.stderr)
        assert not (tmp_path / "b").exists()

        victim = next(s for s in servers if s.environ()["CUDA_VISIBLE_DEVICES"] == "5")
        victim.kill()
        until(lambda: printed()[-1] == f"The server on GPU 5 at 127.0.0.1:{port + 1} is back.")
        assert "ended with code -9; restarting it (1 of 3" in printed()[-2]

        servers = children(process)
        assert len(servers) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert printed()[-1] == "All servers are stopped."
        assert not any(s.is_running() for s in servers)


def alive(processes: list[psutil.Process]) -> bool:
    return any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Even while the servers are still loading, and even when the launcher has no chance to act."""
    with launched(free_ports(2), "0,1", tmp_path) as (process, _):
        until(lambda: len(children(process)) == 2)
        servers = children(process)
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(60) == (-9 if number == signal.SIGKILL else 0)
        until(lambda: not alive(servers), seconds=10)


@pytest.mark.parametrize("extra", [["--por", "9000"], ["--tok", "secret"], ["--ready", "file"]])
def test_an_abbreviated_option_is_refused(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It would reach every server past the looks for --port, --token and --ready-file."""
    with pytest.raises(SystemExit):
        plan(parser().parse_args(["--gpu-ids", "0", "--port", str(free_ports(1))]), extra)
    assert f"unrecognized arguments: {extra[0]}" in capsys.readouterr().err


def test_a_host_in_brackets() -> None:
    [server] = plan(parser().parse_args(["--gpu-ids", "0", "--host", "[::1]", "--port", str(free_ports(1))]), [])
    assert server.host == "::1"


def test_one_taken_port_starts_nothing(tmp_path: Path) -> None:
    port = free_ports(3)
    with socket.create_server(("127.0.0.1", port + 2)), pytest.raises(ValueError, match=f"{port + 2}: Address already in use"):
        plan(parser().parse_args(["--port", str(port), "--gpu-ids", "0,1,2"]), [])
    assert len(plan(parser().parse_args(["--port", str(port), "--gpu-ids", "0,1,2"]), [])) == 3


@pytest.mark.parametrize(
    ("options", "extra", "text"),
    [
        (["--gpu-ids", "4,,5"], [], "--gpu-ids is '4,,5'"),
        (["--gpu-ids", "4,4"], [], "different ids"),
        (["--port", "65535", "--gpu-ids", "0,1"], [], "--port is 65535"),
        (["--vlm-model-path", "/nowhere/qwen"], [], "does not exist: /nowhere/qwen"),
        (["--host", "0.0.0.0"], [], "REWARD_TOKEN"),
        ([], ["--scorers", "orc"], "no scorer 'orc'"),
        (["--gpu-ids", "abc"], [], "--gpu-ids is 'abc'; expected different ids"),
        (["--gpu-ids", "all"], [], "no NVIDIA GPU"),
        ([], ["--port", "9000"], "--port stands after `--`"),
        ([], ["--port=9000"], "--port stands after `--`"),
        ([], ["--host", "::1"], "--host stands after `--`"),
        (["--gpu-ids", "0,00"], [], "different ids"),
        (["--ready-timeout", "nan"], [], "--ready-timeout is nan"),
        (["--host", " "], [], "--host is empty"),
        ([], ["--body-seconds", "nan"], "--body-seconds is nan"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_anything_starts(
    options: list[str], extra: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(ValueError, match=text):
        plan(parser().parse_args(options), extra)


def test_gpus_that_are_not_there_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would show the servers no GPU at all, and they would compute on the CPU."""
    table = "0, NVIDIA H200, 143771, 12, 9.0\n1, NVIDIA H200, 143771, 0, 9.0\n2, Old, [N/A], [N/A], 7.5\n"
    assert parse(table)[::2] == [Gpu(0, "NVIDIA H200", 143771, 12, 9.0), Gpu(2, "Old", 0, 0, 7.5)]
    monkeypatch.setattr(launch, "installed_gpus", lambda: parse(table))
    with pytest.raises(ValueError, match="--gpu-ids 1,4,5: this machine has no GPU 4, 5, it has 0, 1, 2; give --gpu-ids 0,1,2"):
        plan(parser().parse_args(["--gpu-ids", "1,4,5"]), [])
    assert len(plan(parser().parse_args(["--port", str(free_ports(2)), "--gpu-ids", "1,2"]), [])) == 2


def test_gpus_are_named_by_number_by_uuid_or_all_together() -> None:
    found = [Gpu(0, "a", 1, 0, 9.0), Gpu(1, "b", 1, 0, 9.0)]
    assert chosen_ids("all", found, option="--gpu-ids") == ["0", "1"]
    uuids = "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77,MIG-GPU-5d5ba0d6/1/0"
    assert chosen_ids(uuids, found, option="--gpu-ids") == uuids.split(",")
    assert chosen_ids("1, 0,", found, option="--gpu-ids") == ["1", "0"]


@pytest.mark.parametrize("options", [["--token", "secret"], ["--token=secret"]])
def test_a_token_reaches_the_servers_unseen(options: list[str]) -> None:
    args = parser().parse_args(["--port", str(free_ports(1)), "--gpu-ids", "0", "--host", "0.0.0.0"])
    server = plan(args, ["--scorers", "jpeg", *options])[0]
    assert server.options == ["--scorers", "jpeg"] and server.environment()["REWARD_TOKEN"] == "secret"


def test_a_log_that_is_a_folder_or_another_launchers_is_refused(tmp_path: Path) -> None:
    args = parser().parse_args(["--port", str(free_ports(1)), "--gpu-ids", "0", "--log-dir", str(tmp_path)])
    servers = plan(args, [])
    with ExitStack() as first, ExitStack() as second:
        hold_logs(servers, first)
        with pytest.raises(ValueError, match="another --log-dir"):
            hold_logs(servers, second)
    with ExitStack() as third:
        hold_logs(servers, third)
    (tmp_path / "reward_server_gpu_0.log").unlink()
    (tmp_path / "reward_server_gpu_0.log").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        plan(args, [])


def test_the_documented_line_on_all_interfaces() -> None:
    server = ServerProcess("4", "0.0.0.0", 8000, [], Path("x"))
    assert f"Launching {server.name} ✓" == "Launching server on GPU 4 at 0.0.0.0:8000 ✓"


class Mayfly(ServerProcess):
    """A server that ends at once."""

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"], stdout=self.log.open("wb"))
        self.process.wait()


def test_a_server_that_ends_while_starting_is_not_restarted(tmp_path: Path) -> None:
    server = Mayfly("4", "127.0.0.1", free_ports(1), [], tmp_path / "log")
    server.start()
    with pytest.raises(LaunchError, match=r"ended with code 3 while starting: nothing was logged \(log: .*log\)"):
        wait_ready([server], timeout=5, stopped=lambda: False)


def test_restarts_back_off_and_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Dead at 100: again at 101, then 2 and 4 seconds later, then never."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    server = Mayfly("4", "127.0.0.1", 8000, [], tmp_path / "log")
    server.start()
    for wait in (1, 2, 4):
        keep_alive(server)  # notices the death
        assert server.process is None and server.start_at == clock[0] + wait
        keep_alive(server)
        assert server.process is None  # not yet
        clock[0] += wait
        keep_alive(server)
        assert server.process is not None
    with pytest.raises(LaunchError, match="after 3 restarts"):
        keep_alive(server)
    assert capsys.readouterr().out.count("restarting it") == 3
