"""Runs on a real Ray cluster of two nodes on this machine: `make test-ray`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray_runs
import yaml
from ray_runs import PATH, SERVERS, alone, checkpoint, distance, weights
from test_launched_runs import same

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": PATH,
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
OURS = re.compile(r"lit_rl\.(launch|rewards)|cli\.py fit|ray::|raylet|gcs_server")


@dataclass
class Cluster:
    """Two nodes of four CPUs. address: of the cluster, page: of the dashboard, which takes jobs."""

    address: str
    page: str

    def start(self, folder: Path, *words: str) -> subprocess.Popen[str]:
        """The launcher in a folder; its output goes to `folder`/said."""
        with (folder / "said").open("a") as said:
            command = [sys.executable, "-m", "lit_rl.launch", "--ray", self.address, "--nodes", "2", *words]
            environment = {**os.environ, **QUIET, "LIT_RL_SEEN": str(folder / "seen")}
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, text=True)

    def run(self, folder: Path, *words: str) -> int:
        return self.start(folder, *words).wait(timeout=500)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Starts the nodes; after the tests neither a process nor a port of them is left."""
    from ray.cluster_utils import Cluster as Nodes

    before = set(psutil.pids())
    with pytest.MonkeyPatch.context() as patched:
        for name, value in QUIET.items():
            patched.setenv(name, value)
        port = free_port()
        node = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": 80 << 20}
        nodes = Nodes(initialize_head=True, head_node_args={**node, "include_dashboard": True, "dashboard_port": port})
        try:
            nodes.add_node(**node)
            address = str(nodes.address)
            yield Cluster(address, f"http://127.0.0.1:{port}")
            until(lambda: not [one for one in left(before) if "lit_rl" in one], "processes of a run are left")
        finally:
            nodes.shutdown()
    until(lambda: not left(before), "processes of the cluster are left")
    for place in (("127.0.0.1", port), (address.split(":")[0], int(address.split(":")[1]))):
        with socket.socket() as probe:
            assert probe.connect_ex(place) != 0, f"{place} still listens"


def left(before: set[int]) -> list[str]:
    """Command lines of processes of a cluster or a run that were not there before."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.pid not in before and OURS.search(line) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def written(folder: Path, run: dict[str, Any]) -> Sequence[str]:
    """The words of a run from its options."""
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return ("--", "fit", "--config", "run.yaml")


def said(folder: Path) -> str:
    return (folder / "said").read_text()


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of Flow-GRPO on two nodes, with a reward server."""
    folder = tmp_path_factory.mktemp("flow")
    (folder / "servers.yaml").write_text(SERVERS)
    words = written(folder, ray_runs.flow(folder))
    assert cluster.run(folder, "--with-servers", "servers.yaml", *words) == 0, said(folder)
    return folder


def test_two_nodes_with_a_reward_server_equal_one_process(unbroken: Path, tmp_path: Path) -> None:
    """The server has ended with the run; lines of the log name their nodes."""
    run = ray_runs.flow(tmp_path)
    run["trainer"]["callbacks"][0]["init_args"]["rewards"]["b"] = {"class_path": "toy.Brightness"}
    assert distance(weights(unbroken / "outputs"), alone(tmp_path, run, {})) < 1e-6
    assert {"reward 0", "node 0", "node 1"} <= set(re.findall(r"^\[(\w+ \d) ", said(unbroken), re.MULTILINE))
    url = re.findall(r"Reward server ready at http://([\d.]+):(\d+)", said(unbroken))[0]
    with socket.socket() as probe:
        assert probe.connect_ex((url[0], int(url[1]))) != 0


def test_shards_over_two_nodes_and_what_is_shipped_to_them(cluster: Cluster, tmp_path: Path) -> None:
    """The virtual environment, the outputs and Git's folder stay where they are; the run writes where it was started."""
    for name in ("env", ".git", "outputs/old", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "env/pyvenv.cfg").touch()
    (tmp_path / "data/prompts.txt").write_text("a cat")
    run = ray_runs.sharded(tmp_path)
    assert cluster.run(tmp_path, *written(tmp_path, run)) == 0, said(tmp_path)
    seen = set((tmp_path / "seen").read_text().splitlines())
    assert {"run.yaml", "data"} <= seen and not seen & {"env", ".git", "outputs"}
    assert distance(weights(tmp_path / "outputs"), alone(tmp_path, run, {"LIT_RL_SEEN": str(tmp_path / "seen")})) < 1e-6


@pytest.mark.parametrize("kind", ["grpo", "agent"])
def test_language_models_and_agents_on_two_nodes_equal_one_process(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    run = getattr(ray_runs, kind)(tmp_path)
    assert cluster.run(tmp_path, *written(tmp_path, run)) == 0, said(tmp_path)
    assert distance(weights(tmp_path / "outputs"), alone(tmp_path, run, {})) < 1e-6


def test_a_killed_actor_does_not_change_the_run(cluster: Cluster, unbroken: Path, tmp_path: Path) -> None:
    """That of the first node, whose store all others use. All start again, the server too, from the newest checkpoint."""
    (tmp_path / "servers.yaml").write_text(SERVERS)
    words, folder = written(tmp_path, ray_runs.flow(tmp_path)), tmp_path / "outputs/run"
    folder.mkdir(parents=True)
    (folder / "6.1.SIGSTOP").touch()  # the run stands still before its seventh step
    before = actors()
    launcher = cluster.start(tmp_path, "--with-servers", "servers.yaml", "--restarts", "1", *words)
    until(lambda: (folder / "checkpoints").is_dir() and not (folder / "6.1.SIGSTOP").exists(), "no step", lambda: said(tmp_path))
    below = {pid: psutil.Process(pid).children(recursive=True) for pid in actors() - before}
    os.kill(next(pid for pid, found in below.items() if "0" in {word_after(one, "--node-rank") for one in found}), signal.SIGKILL)
    assert launcher.wait(timeout=500) == 0, said(tmp_path)
    assert re.search(r"launcher: node 0 .* is lost .*so all end; .*\(restart 1 of 1\)", said(tmp_path))
    assert same(checkpoint(unbroken / "outputs"), checkpoint(tmp_path / "outputs"))


def test_sigterm_writes_a_checkpoint_on_all_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run = ray_runs.sharded(tmp_path)
    run["trainer"]["max_epochs"] = 1000
    launcher = cluster.start(tmp_path, "--restarts", "1", *written(tmp_path, run))
    until(lambda: list((tmp_path / "outputs/run/checkpoints").glob("*.ckpt")), "no checkpoint", lambda: said(tmp_path))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=200) == 143, said(tmp_path)
    assert "stopped by SIGTERM" in said(tmp_path) and "restart" not in said(tmp_path)


def test_the_exit_code_is_that_of_the_run(cluster: Cluster, tmp_path: Path) -> None:
    """A mistake that the processes find is 2, and starts nothing again; a lost process is told by the signal."""
    words = written(tmp_path, ray_runs.sharded(tmp_path))
    assert cluster.run(tmp_path, "--restarts", "2", *words, "--model.init_args.sibling", "1") == 2
    assert "no option 'sibling'" in said(tmp_path) and "restart 1" not in said(tmp_path)
    (tmp_path / "outputs/run").mkdir(parents=True)
    (tmp_path / "outputs/run/1.1.SIGKILL").touch()
    assert cluster.run(tmp_path, *words) == 137 and "was ended by SIGKILL" in said(tmp_path)


def test_a_server_that_does_not_start_ends_the_run_before_it_begins(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "servers.yaml").write_text("judge: {command: '{python} -c exit(3) {port}', variable: JUDGE_URL}")
    words = written(tmp_path, ray_runs.sharded(tmp_path))
    assert cluster.run(tmp_path, "--with-servers", "servers.yaml", *words) == 2
    assert re.search(r"error: server judge 0 .* has ended with code 3 before it was ready", said(tmp_path))


def test_a_job_as_the_guide_types_it(cluster: Cluster, tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- python -m lit_rl.launch --ray ...`; a relative folder of outputs is refused, as Ray removes it."""
    run = ray_runs.sharded(tmp_path)
    run["trainer"]["max_epochs"] = 1
    words = written(tmp_path, run)

    def submit(*more: str) -> subprocess.CompletedProcess[str]:
        submitted = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster.page, "--working-dir", "."]
        env = f'{{"env_vars": {{"LIT_RL_SEEN": "{tmp_path}/seen"}}}}'
        command = [
            *submitted,
            "--runtime-env-json",
            env,
            "--",
            sys.executable,
            "-m",
            "lit_rl.launch",
            "--ray",
            "--nodes",
            "2",
            *words,
            *more,
        ]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=500)

    done = submit()
    assert done.returncode == 1 and "add --run.dir with the whole path" in done.stdout, done.stdout + done.stderr
    done = submit("--run.dir", str(tmp_path / "shared"))
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout + done.stderr
    assert checkpoint(tmp_path / "shared")["epoch"] == 0 and "run.yaml" in (tmp_path / "seen").read_text()


def actors() -> set[int]:
    """Processes of Ray that have placed a program."""
    return {
        process.pid for process in psutil.process_iter(["cmdline"]) if " ".join(process.info["cmdline"] or ()).startswith("ray::Placed")
    }


def word_after(process: psutil.Process, option: str) -> str:
    words = [*process.cmdline(), ""]
    return words[words.index(option) + 1] if option in words else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(true: Callable[[], object], complaint: str, more: Callable[[], str] = str, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"{complaint}: {more()}"
        time.sleep(0.1)
