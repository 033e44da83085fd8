"""The platform under load, and under random kills: its memory, how quickly it answers, and what it loses.

    python -m benchmarks.platform_load [--jobs 1000 --points 1000000 --clients 50 --seconds 20] [--kills 20]

A server in a process of its own takes in a million numbers of a thousand jobs; then WebSocket clients follow one job that reports ten times
a second, and one of them never reads. Prints the server's resident memory after each part, and the time of GET /healthz when nothing else
happens, with its CPU time, and while clients follow. With `--kills` the server, the shim or the job itself is killed (SIGKILL) at random
moments of so many jobs in place of the load, while another run reports every 20 ms; prints jobs that were lost or started twice, and lost
reports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import requests
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

REPOSITORY = Path(__file__).parents[1]
JSON = {"content-type": "application/json"}
METRICS = ("policy_loss", "reward_mean", "kl_divergence", "entropy", "clip_fraction", *(f"extra/{n}" for n in range(15)))
SERVER = """
import sys
from pathlib import Path
from lit_rl.net.sockets import bind, url_of
from lit_rl.platform.__main__ import serve
from lit_rl.platform.settings import Settings
data, root, ready = map(Path, sys.argv[1:])
sockets = [bind("127.0.0.1", 0), bind("127.0.0.1", 0)]
serve(Settings(data=data, url=url_of(sockets[0]), run_root=root, gpu_ids=(), cpu_jobs=4), sockets, ready)
"""
RUN = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--config", sys.argv.index("--config") + 1) + 1]).parent
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()}\\n")
while not (folder / "finish").exists():
    time.sleep(0.02)
Path(os.environ["PLATFORM_DONE_FILE"]).write_text("{}")
"""


class Server:
    """A server in a process of its own. root: the folder that has `cli.py` of its jobs."""

    def __init__(self, folder: Path, root: Path) -> None:
        ready = folder / "ready"
        ready.unlink(missing_ok=True)
        words = [sys.executable, "-c", SERVER, str(folder / "data"), str(root), str(ready)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
        until(lambda: ready.exists() and ready.read_text() != "", 120)
        self.url = ready.read_text()
        until(self.answers, 120)

    def answers(self) -> bool:
        """True once it serves."""
        try:
            return requests.get(f"{self.url}/healthz", timeout=60).ok
        except requests.ConnectionError:
            return False

    def mib(self) -> float:
        """Its resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def cpu_seconds(self) -> float:
        """CPU time that it has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal."""
        self.process.send_signal(number)
        self.process.wait(120)


def until(true: Callable[[], object], seconds: float) -> None:
    """Wait for something. Raises SystemExit where it does not come."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise SystemExit("the platform did not do in time what was waited for")
        time.sleep(0.02)


def milliseconds(url: str, count: int) -> list[float]:
    """The time of GET /healthz, so many times, over one connection."""
    times = []
    with requests.Session() as session:
        for _ in range(count):
            began = time.perf_counter()
            session.get(f"{url}/healthz", timeout=60).raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
            time.sleep(0.02)
    return sorted(times)


def filled(url: str, jobs: int, points: int) -> float:
    """Report `points` numbers, spread over the jobs; the seconds that it takes."""
    steps, began = max(points // jobs // len(METRICS), 1), time.perf_counter()
    numbers = dict.fromkeys(METRICS, 0.5)
    body = json.dumps({"points": [{"step": step, "metrics": numbers} for step in range(steps)]})
    with requests.Session() as session:
        for job in range(jobs):
            answer = session.post(
                f"{url}/api/jobs/load-{job}/metrics", data=body, headers={"content-type": "application/json"}, timeout=600
            )
            answer.raise_for_status()
    return time.perf_counter() - began


def followed(url: str, clients: int, seconds: float) -> tuple[list[float], int]:
    """Report to one job while clients follow it, the first without reading: times of /healthz, and clients that saw the last step."""
    address, last, saw = f"{url.replace('http', 'ws')}/ws/jobs/load-0", 10_000 + int(10 * seconds), set[int]()
    sockets = [connect(address, open_timeout=60, max_queue=1, legacy=True) for _ in range(clients)]

    def read(number: int) -> None:
        with suppress(WebSocketException, TimeoutError):
            while number not in saw:
                if f'"step":{last},' in str(sockets[number].recv(60)):
                    saw.add(number)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(1, clients)]
    times: list[float] = []
    watch = threading.Thread(target=lambda: times.extend(milliseconds(url, int(20 * seconds))))
    for thread in (*readers, watch):
        thread.start()
    for step in range(10_000, last + 1):
        point = {"step": step, "metrics": dict.fromkeys((*METRICS, *(f"more/{n}" for n in range(180))), 0.25)}
        requests.post(f"{url}/api/jobs/load-0/metrics", json={"points": [point]}, timeout=600).raise_for_status()
        time.sleep(0.1)
    for thread in (*readers, watch):
        thread.join(120)
    for connection in sockets:
        connection.close_socket() if connection is sockets[0] else connection.close()
    return sorted(times), len(saw)


def load(folder: Path, args: argparse.Namespace) -> str:
    """The table of the load."""
    server = Server(folder, REPOSITORY)
    try:
        lines = [f"{'':40}{'RSS':>9}", f"{'after the start':40}{server.mib():5.0f} MiB"]
        took = filled(server.url, args.jobs, args.points)
        lines.append(f"{f'{args.points:,} numbers of {args.jobs:,} jobs':40}{server.mib():5.0f} MiB, taken in {took:.1f} s")
        before = server.cpu_seconds()
        quiet = milliseconds(server.url, 200)
        lines.append(f"{'CPU time of one GET /healthz':40}{1000 * (server.cpu_seconds() - before) / len(quiet):9.1f} ms")
        busy, saw = followed(server.url, args.clients, args.seconds)
        told = f", {saw} of the {args.clients - 1} that read saw the last step"
        lines.append(f"{f'{args.clients} clients, one frozen':40}{server.mib():5.0f} MiB{told}")
        began = time.perf_counter()
        pages = requests.get(f"{server.url}/api/jobs", params={"limit": 500}, timeout=600).json()["items"]
        lines.append(f"{f'a list of {len(pages)} jobs':40}{server.mib():5.0f} MiB, {1000 * (time.perf_counter() - began):.0f} ms")
        for name, times in (("quiet", quiet), ("with clients", busy)):
            lines.append(f"/healthz {name}: median {statistics.median(times):.1f} ms, p95 {times[int(0.95 * (len(times) - 1))]:.1f} ms")
    finally:
        server.end()
    return "\n".join(lines)


class Reporter(threading.Thread):
    """Another run, which reports a step every 20 ms. taken: the steps that the server has accepted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.url, self.taken, self.over = "", list[int](), threading.Event()

    def run(self) -> None:
        """Report until the end; what meets no server is not counted."""
        step = 0
        while not self.over.wait(0.02):
            step += 1
            with suppress(requests.RequestException):
                body = {"points": [{"step": step, "metrics": {"x": float(step)}}]}
                if requests.post(f"{self.url}/api/jobs/other/metrics", json=body, timeout=60).status_code == 202:
                    self.taken.append(step)


def killed(folder: Path, kills: int, seed: int = 0) -> str:
    """The table of the kills."""
    root, draw = folder / "repository", random.Random(seed)
    (root / "model").mkdir(parents=True)
    (root / "cli.py").write_text(RUN)
    (root / "configs").symlink_to(REPOSITORY / "configs")
    (root / "rows.jsonl").write_text('{"prompt": "a"}\n' * 64)
    server, reporter = Server(folder, root), Reporter()
    reporter.url = server.url
    reporter.start()
    lost, twice, wrong = 0, 0, 0
    victims = [draw.choice(("server", "shim", "child")) for _ in range(kills)]
    for victim in victims:
        place = begun(server)
        time.sleep(draw.uniform(0.0, 1.0))
        if victim == "server":
            server.end(signal.SIGKILL)
            server = Server(folder, root)
            reporter.url = server.url
        else:
            os.kill(pid_of(place, victim), signal.SIGKILL)
        pid_of(place, "child")
        (place / "finish").touch()
        found = ended(server, place.name)
        lost += found == "missing"
        wrong += found != ("failed" if victim == "child" else "succeeded")
        twice += len((place / "starts").read_text().split()) != 1
    reporter.over.set()
    reporter.join()
    kept = {row["step"] for row in requests.get(f"{server.url}/api/jobs/other/metrics", timeout=600).json()}
    server.end()
    counts = ", ".join(f"{name} {victims.count(name)}" for name in ("server", "shim", "child"))
    return (
        f"{kills} kills ({counts}): {lost} jobs lost, {twice} started twice, {wrong} with another end than expected, "
        f"{len(set(reporter.taken) - kept)} of {len(reporter.taken)} accepted reports lost"
    )


def begun(server: Server) -> Path:
    """The folder of a job that was told to start."""
    body = {"name": "n", "algorithm": "grpo", "template": "configs/demo/grpo_sort.yaml", "model_path": "./model", "num_gpus": 0}
    body |= {"train_data_path": "rows.jsonl", "eval_data_path": "rows.jsonl"}
    job = requests.post(f"{server.url}/api/jobs", json=body, timeout=60).json()
    requests.post(f"{server.url}/api/jobs/{job['uuid']}/start", timeout=60).raise_for_status()
    return Path(job["run_dir"])


def pid_of(folder: Path, who: str) -> int:
    """The process of the shim or the job, once the job works."""

    def known() -> bool:
        runner = folder / "runner.json"
        return (folder / "starts").exists() and "child" in runner.read_text() and json.loads(runner.read_text())["child"] is not None

    until(known, 120)
    return int(json.loads((folder / "runner.json").read_text())[who]["pid"])


def ended(server: Server, uuid: str) -> str:
    """The state in which a job ends; "missing" where nobody knows it."""
    states = ["running"]

    def over() -> bool:
        found = requests.get(f"{server.url}/api/jobs/{uuid}", timeout=60).json()
        states.append(str(found.get("state", "missing")))
        return states[-1] in ("missing", "succeeded", "failed", "stopped")

    until(over, 120)
    return states[-1]


def main(argv: list[str] | None = None) -> str:
    """Run one of the two and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--kills", type=int, default=0, help="kill so many times at random instead")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        table = killed(Path(folder), args.kills) if args.kills else load(Path(folder), args)
    print(table)
    return table


if __name__ == "__main__":
    main()
