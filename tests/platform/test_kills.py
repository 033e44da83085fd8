"""`kill -9` of the server, the shim or the job at any moment: no job is lost or started twice, and no metric that was taken in is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from test_life_cycle import starts, until

from lit_rl.platform.settings import REPOSITORY

SCRIPT = """
import sys
from pathlib import Path
from lit_rl.net.sockets import bind
from lit_rl.platform.__main__ import serve
from lit_rl.platform.settings import Settings
from lit_rl.net.sockets import url_of
data, root, ready = map(Path, sys.argv[1:])
sockets = [bind("127.0.0.1", 0), bind("127.0.0.1", 0)]
serve(Settings(data=data, url=url_of(sockets[0]), run_root=root, gpu_ids=(), cpu_jobs=2), sockets, ready)
"""


class Server:
    """A server in a process of its own, which can be killed."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.ready = folder / "ready"
        self.ready.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", SCRIPT, str(folder / "data"), str(root), str(self.ready)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        until(lambda: self.ready.exists() and self.ready.read_text())
        self.url = self.ready.read_text()
        until(self._answers)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/healthz", timeout=60).ok
        except requests.ConnectionError:
            return False

    def job(self, uuid: str) -> dict[str, object]:
        found = requests.get(f"{self.url}/api/jobs/{uuid}", timeout=60).json()
        assert isinstance(found, dict)
        return found

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(120)


def killed(folder: Path, who: str) -> None:
    """Kill a process of the job's folder, if it has begun."""
    runner = folder / "runner.json"
    process = json.loads(runner.read_text())[who] if runner.exists() else None
    if process is not None:
        os.kill(process["pid"], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["server", "shim", "child"])
def test_whoever_is_killed(tmp_path: Path, root: Path, victim: str) -> None:
    server = Server(tmp_path, root)
    body = {"name": "n", "algorithm": "grpo", "template": "configs/demo/grpo_sort.yaml", "model_path": "./model", "num_gpus": 0}
    body |= {"train_data_path": "rows.jsonl", "eval_data_path": "rows.jsonl"}
    uuid = requests.post(f"{server.url}/api/jobs", json=body, timeout=60).json()["uuid"]
    folder = Path(str(server.job(uuid)["run_dir"]))
    assert requests.post(f"{server.url}/api/jobs/{uuid}/start", timeout=60).status_code == 202
    sent = {"points": [{"step": 1, "metrics": {"x": 1.0}}]}
    assert requests.post(f"{server.url}/api/jobs/other/metrics", json=sent, timeout=60).status_code == 202
    time.sleep(random.Random(victim).uniform(0.0, 1.5))
    if victim == "server":
        server.end(signal.SIGKILL)
        server = Server(tmp_path, root)
        assert requests.get(f"{server.url}/api/jobs/other/metrics", timeout=60).json()[0]["x"] == 1.0
    else:
        until(lambda: (folder / "starts").exists())
        killed(folder, victim)
    until(lambda: starts(folder))
    if victim == "child":
        until(lambda: server.job(uuid)["state"] == "failed")
    else:
        assert server.job(uuid)["state"] in ("starting", "running")
        (folder / "finish").write_text("0")
        until(lambda: server.job(uuid)["state"] == "succeeded")
    assert len(starts(folder)) == 1
    server.end(signal.SIGTERM)
    assert server.process.returncode in (0, -signal.SIGTERM)
