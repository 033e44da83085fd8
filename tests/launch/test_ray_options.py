"""--ray and --with-servers without a cluster: what is refused, in one sentence, and what would be run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lit_rl.errors import ConfigError
from lit_rl.launch.__main__ import main
from lit_rl.launch.on_ray import filled_in, wanted
from lit_rl.launch.options import parser
from lit_rl.launch.placed import Place
from lit_rl.launch.servers import Served, addressed, read_servers
from lit_rl.launch.shipping import JOB, carried, excluded

RUN = ["fit", "--config", "configs/base/cpu.yaml"]
REWARD = "r: {command: x {port}, variable: REWARD_SERVER_URLS}\n"
PLACES = [Place("a", "10.0.0.1", 81, "/py", "/"), Place("b", "fe80::1", 82, "/py", "/")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--nodes", "2"), "--nodes is for a Ray cluster: add --ray"),
        (("--with-servers", "s.yaml"), "--with-servers is for a Ray cluster"),
        (("--ray", "--nodes", "two"), "--nodes is 'two'"),
        (("--ray", "--gpus-per-node", "-1"), "--gpus-per-node is '-1'"),
        (("--ray", "--nnodes", "2"), "--nnodes does not go with --ray, which finds the nodes itself: say --nodes N"),
        (("--ray", "ray://head:10001"), "from outside of it use `ray job submit`"),
        (("--ray", "--with-servers", "none.yaml"), "--with-servers none.yaml: there is no such file"),
    ],
)
def test_a_wrong_option_is_one_sentence(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str) -> None:
    assert main([*words, "--dry-run", "--", *RUN]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and sentence in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a", "servers by their names, each with its command; this file holds a list"),
        (REWARD + "r: {}", "s.yaml:2: `r` stands a second time"),
        ("r: x", "s.yaml:1: r: it is a mapping with a command"),
        ("r:\n  command: x {port}\n  gpu: 1\n  variable: V", "s.yaml:3: r: a server has no option 'gpu'; did you mean 'gpus'?"),
        ("r:\n  gpus: 1", "s.yaml:1: r: it has no command"),
        ("r:\n  variable: V\n  command: x --port 8000", "s.yaml:3: r.command: it does not say {port}"),
        ("r: {command: x {port}}", "s.yaml:1: r: nothing gets its address"),
        ('r: {command: "x \'{port}", variable: V}', "s.yaml:1: r.command: its quotes do not close"),
        (REWARD.replace("}\n", ", gpus: two}"), "s.yaml:1: r.gpus: 'two' is no number of at least 0"),
        (REWARD.replace("}\n", ", count: 0.5}"), "r.count: '0.5' is no whole number of at least 1"),
        (REWARD.replace("REWARD_SERVER_URLS", "my-servers"), "r.variable: 'my-servers' is no name of a variable"),
        (REWARD.replace("}\n", ", health: health}"), "r.health: 'health' is no path"),
    ],
)
def test_a_mistake_in_the_file_of_servers_is_told_by_line_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "s.yaml").write_text(text.replace("x {port}", '"x {port}"'))
    with pytest.raises(ConfigError) as refused:
        read_servers(tmp_path / "s.yaml")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_addresses_reach_the_run_by_variables_and_options(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "reward: {command: '{python} -m s --port {port}', count: 2, gpus: 0.5, variable: URLS}\n"
        "more: {command: ['s', '{host}:{port}', '{\"a\": 1}'], variable: URLS, option: --model.engine.urls, ready_s: 5}\n"
    )
    reward, more = read_servers(tmp_path / "s.yaml")
    assert reward == Served("reward", ("{python}", "-m", "s", "--port", "{port}"), gpus=0.5, count=2, variable="URLS")
    assert reward.words(PLACES[0]) == ["/py", "-m", "s", "--port", "81"] and more.words(PLACES[1]) == ["s", "fe80::1:82", '{"a": 1}']
    variables, words = addressed([reward, more], [PLACES, PLACES[:1]])
    assert variables == {"URLS": "http://10.0.0.1:81,http://[fe80::1]:82,http://10.0.0.1:81"}
    assert words == ["--model.engine.urls", "http://10.0.0.1:81"]


def test_nodes_get_what_the_options_the_guides_variables_or_the_cluster_say() -> None:
    def found(*words: str, run: list[str] = RUN, gpus: tuple[int, ...] = (), **environment: str) -> tuple[int, int | None, int | None]:
        asked = wanted(parser().parse_args(["--ray", *words]), run, environment, restarts=0, grace=1)
        full = filled_in(asked, [{"GPU": count, "CPU": 8} for count in gpus])
        return full.nodes, full.gpus, full.processes

    assert found() == (1, 0, 1) and found(run=[*RUN, "--trainer.devices", "3"]) == (1, 0, 3)
    assert found("--nodes", "2", "--gpus-per-node", "8") == found(NNODES="2", NGPUS="8") == (2, 8, 8)
    assert found("--nodes", "2", gpus=(0, 8, 4)) == (2, 4, 4) and found("--nproc-per-node", "2", gpus=(8,)) == (1, 8, 2)


def test_each_node_runs_the_launchers_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ray", "--nodes", "2", "--gpus-per-node", "4", "--restarts", "3", "--dry-run", "--", *RUN]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(
        "python -m lit_rl.launch --nnodes 2 --node-rank 1 --master-addr NODE_0 --master-port 29700 --nproc-per-node 4 --restarts 3 "
    )


def test_what_is_taken_along(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/pyvenv.cfg").touch()
    assert {"/mine", "outputs"} <= set(excluded(tmp_path)) and "/data" not in excluded(tmp_path)
    kept = {"REWARD_TOKEN": "t", "NCCL_DEBUG": "INFO", "PLATFORM_URL": "u", "VLLM_API_BASE": "b", "OMP_NUM_THREADS": "1"}
    assert carried({**kept, "PATH": "/bin", "HOME": "/root", "LD_LIBRARY_PATH": "/lib", "CUDA_VISIBLE_DEVICES": "0"}) == kept


def test_a_job_that_would_write_into_its_copy_of_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {JOB: json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}})}
    asked = parser().parse_args(["--ray"])
    with pytest.raises(ConfigError, match=r"add --run\.dir with the whole path"):
        wanted(asked, RUN, job, restarts=0, grace=1)
    wanted(asked, [*RUN, "--run.dir", "/shared"], job, restarts=0, grace=1)


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_held_ends_with_its_holder_unless_it_has_been_asked_to_stop(tmp_path: Path, asked: bool) -> None:
    """A program and what that has started: the holder closes the pipe, as the kernel does when it is killed."""
    child = "import signal, time; signal.signal(15, lambda *_: None); print('there', flush=True); time.sleep(2); open('done', 'w')"
    program = f"import signal, subprocess, sys; signal.signal(15, lambda *_: None); subprocess.run([sys.executable, '-c', {child!r}])"
    words = [sys.executable, "-m", "lit_rl.launch.held", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    held = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    assert held.stdin is not None and held.stdout is not None and held.stdout.readline() == b"there\n"
    below = psutil.Process(held.pid).children(recursive=True)
    if asked:
        held.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    held.stdin.close()
    assert held.wait(timeout=30) == (0 if asked else 137)
    assert len(below) == 2 and not psutil.wait_procs(below, timeout=10)[1] and (tmp_path / "done").exists() == asked
    held.stdout.close()
