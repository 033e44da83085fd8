"""Series of jobs by hand, rules by promtool, dashboards as generated, and every panel's query over a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import sqlalchemy as sa
import yaml
from fastapi.testclient import TestClient
from served_platform import listening

from deploy import dashboards
from lit_rl.net.metrics import Metrics
from lit_rl.net.sockets import bind
from lit_rl.platform.prometheus import GPUS, KEPT_SECONDS, MOST_JOBS, NUMBERS, text
from lit_rl.platform.records import CANONICAL, Records
from lit_rl.platform.schema import gpu_samples, jobs, metric_keys, points
from lit_rl.platform.store import Store

DEPLOY = Path(dashboards.__file__).parent
BOARDS = {name: json.loads((dashboards.FOLDER / f"{name}.json").read_text()) for name in dashboards.DASHBOARDS}
EXPRESSIONS = [target["expr"] for board in BOARDS.values() for panel in board["panels"] for target in panel["targets"]]
LOGGED = [*CANONICAL, "reward/ocr", "reward/ocr/std", "reward/ocr/failed_frac", "zero_std_ratio", "nan_ratio", "time/rollout_s", "lr"]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus")


def report(store: Store, job: str, values: dict[str, list[float | None]]) -> None:
    """Numbers of a job, at the steps 0, 1, ..."""
    with store.write() as connection:
        for name, series in values.items():
            key = connection.execute(sa.insert(metric_keys).values(job=job, name=name)).inserted_primary_key
            assert key is not None
            connection.execute(sa.insert(points), [{"key": key[0], "step": step, "value": value} for step, value in enumerate(series)])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def lines(store: Store) -> list[str]:
    return [line for line in text(store).decode().splitlines() if not line.startswith("#")]


# ---------------------------------------------------------------------- series
def test_the_newest_finite_numbers_are_shown(store: Store, tmp_path: Path) -> None:
    """Held-out metrics and others have no series; a NaN does not hide the number before it."""
    Records(store, tmp_path).register("run-1")
    report(store, "run-1", {
        "policy_loss": [3.0, 2.0, None], "reward/ocr/mean": [0.5], "reward/ocr/failed_frac": [0.25], "time/train_s": [7.5], "lr": [1.0],
        "zero_std_ratio": [0.125], "val/reward": [1.0], "reward/clip": [4.0]})  # fmt: skip
    assert sorted(line for line in lines(store) if "run-1" in line) == [
        'rl_group_zero_std_ratio{job_id="run-1"} 0.125',
        'rl_job_state{job_id="run-1",name="run-1",state="running"} 1.0',
        'rl_metric{job_id="run-1",metric="policy_loss"} 2.0',
        'rl_reward_failed_fraction{job_id="run-1",source="ocr"} 0.25',
        'rl_reward_mean{job_id="run-1",source="clip"} 4.0',
        'rl_reward_mean{job_id="run-1",source="ocr"} 0.5',
        'rl_step_seconds{job_id="run-1",phase="train"} 7.5',
    ]
    assert 'rl_jobs{state="running"} 1.0' in lines(store)


def test_series_of_ended_jobs_go_and_the_newest_jobs_stay(store: Store, tmp_path: Path) -> None:
    """100 jobs at most; five minutes after its end a job has no series."""
    records = Records(store, tmp_path)
    for i in range(MOST_JOBS + 5):
        records.register(f"job-{i}")
    names = {line.split('"')[1] for line in lines(store) if line.startswith("rl_job_state")}
    assert names == {f"job-{i}" for i in range(5, MOST_JOBS + 5)}
    records.change("job-50", state="succeeded", ended_at=time.time() - KEPT_SECONDS + 60)
    records.change("job-60", state="failed", ended_at=time.time() - KEPT_SECONDS - 1)
    found = [line for line in lines(store) if line.startswith("rl_job_state")]
    assert 'rl_job_state{job_id="job-50",name="job-50",state="succeeded"} 1.0' in found
    assert not any('"job-60"' in line for line in found) and any('"job-4"' in line for line in found)


def test_gpus_are_shown_as_they_were_measured_last(store: Store) -> None:
    now, whole = time.time(), {"job": "", "utilization": 90.0, "memory_used": 65.0, "memory_total": 80.0, "temperature": None}
    rows = [whole | {"gpu_index": 0, "ts": now - 9, "power_w": 300.0}, whole | {"gpu_index": 0, "ts": now - 2, "power_w": 410.0}]
    rows += [whole | {"gpu_index": 1, "ts": now - 600, "power_w": 1.0}, whole | {"gpu_index": 2, "ts": now, "job": "other", "power_w": 2.0}]
    with store.write() as connection:
        connection.execute(sa.insert(gpu_samples), rows)
    assert [line for line in lines(store) if line.startswith("rl_gpu")] == [
        'rl_gpu_utilization_percent{gpu="0"} 90.0', 'rl_gpu_memory_used_gigabytes{gpu="0"} 65.0',
        'rl_gpu_memory_total_gigabytes{gpu="0"} 80.0', 'rl_gpu_power_watts{gpu="0"} 410.0',
    ]  # fmt: skip


def test_the_server_answers_prometheus(platform: TestClient) -> None:
    """Without a token to this user, as every other page."""
    job = {"name": "a", "algorithm": "grpo", "model_path": "m", "train_data_path": "d"}
    assert platform.post("/api/jobs", json=job).status_code == 201
    answer = platform.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    assert 'rl_jobs{state="created"} 1.0' in answer.text


# ---------------------------------------------------------------------- files
@needs_promtool
@pytest.mark.parametrize("words", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"])
def test_promtool_takes_the_files(words: str) -> None:
    done = subprocess.run(["promtool", *words.split()], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    rules = yaml.safe_load((DEPLOY / "rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    cases = [case for test in yaml.safe_load((DEPLOY / "rules_test.yml").read_text())["tests"] for case in test["alert_rule_test"]]
    assert alerts == {case["alertname"] for case in cases if case.get("exp_alerts")}


def test_dashboards_are_as_generated_and_whole() -> None:
    """Panels lie beside each other in 24 columns, have ids of their own and the data source of the variable."""
    for name, board in BOARDS.items():
        assert (dashboards.FOLDER / f"{name}.json").read_text() == dashboards.made(name), "run python -m deploy.dashboards"
        assert board["schemaVersion"] >= 39 and [v["name"] for v in board["templating"]["list"]] == ["ds"]
        cells: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            mine = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
            assert not mine & cells and max(x for x, _ in mine) < 24, panel["title"]
            cells |= mine
            assert {str(target["datasource"]["uid"]) for target in panel["targets"]} | {panel["datasource"]["uid"]} == {"${ds}"}
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_page_names_every_series_and_every_alert() -> None:
    page = (DEPLOY.parent / "docs/monitoring.md").read_text()
    names = {name for _, name, _ in NUMBERS} | {name for name, _ in GPUS.values()} | {"rl_jobs", "rl_job_state", "rl_train_step"}
    assert set(re.findall(r"`(rl_\w+)`", page)) == names
    rules = yaml.safe_load((DEPLOY / "rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert {name for row in re.findall(r"^\| ([A-Z]\w+(?:, [A-Z]\w+)*) \|", page, re.MULTILINE) for name in row.split(", ")} == alerts


# ---------------------------------------------------------------------- a real Prometheus
MODEL_SERVER = """vllm:num_requests_running{{model_name="m"}} 3
vllm:num_requests_waiting{{model_name="m"}} 1
vllm:kv_cache_usage_perc{{model_name="m"}} 0.5
vllm:generation_tokens_total{{model_name="m"}} {tokens}
sglang:num_running_reqs{{model_name="m"}} 3
sglang:num_queue_reqs{{model_name="m"}} 1
sglang:token_usage{{model_name="m"}} 0.5
sglang:gen_throughput{{model_name="m"}} 100
"""


@contextlib.contextmanager
def exporter() -> Iterator[int]:
    """A port that answers as a busy reward server and as two model servers do."""
    rewards, asked = Metrics(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[0] += 1
            rewards.requests.labels("/score", "200").inc()
            rewards.request_seconds.labels("/score").observe(0.2)
            rewards.shed.labels("queue").inc()
            rewards.batch_size.observe(8)
            rewards.observe_row({"ocr": 0.5})
            body = rewards.text() + MODEL_SERVER.format(tokens=1000 * asked[0]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextlib.contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[str]:
    """The address of a Prometheus with the shipped files, these targets, and a reading each second."""
    files = folder / "deploy"
    shutil.copytree(DEPLOY, files)
    config = yaml.safe_load((files / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (files / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name, target in targets.items():
        (files / f"targets/{name}.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    with bind("127.0.0.1", 0) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [f"--config.file={files / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"]
    with open(folder / "log", "wb") as log, subprocess.Popen(["prometheus", *words], stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


def found(url: str, query: str) -> list[Any]:
    try:
        with urlopen(f"{url}/api/v1/query?{urlencode({'query': query})}", timeout=10) as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
            return result
    except OSError:
        return []  # it has not begun to listen


@pytest.mark.slow
@needs_promtool
def test_every_panel_of_every_dashboard_has_a_series(tmp_path: Path) -> None:
    """The platform's own page, a reward server's own metrics, and names of vLLM and SGLang; an alert of the shipped rules is there."""
    with listening(tmp_path) as url, exporter() as port:
        store = Store(tmp_path / "data")
        Records(store, tmp_path).register("run-1")
        report(store, "run-1", {name: [0.5, 0.5] for name in LOGGED})
        gpu = {"job": "", "gpu_index": 0, "ts": time.time() + 3600}
        with store.write() as connection:
            connection.execute(
                sa.insert(gpu_samples).values(**gpu, utilization=9.0, memory_used=1.0, memory_total=2.0, temperature=3.0, power_w=4.0)
            )
            connection.execute(sa.update(jobs).values(step=2))
        store.close()
        targets = {"platform": url.removeprefix("http://"), "rewards": f"127.0.0.1:{port}", "inference": f"127.0.0.1:{port}"}
        with prometheus(tmp_path, targets) as server:
            left, end = set(EXPRESSIONS), time.monotonic() + 150
            while left and time.monotonic() < end:
                left = {query for query in left if not found(server, query)}
                time.sleep(0.5)
            assert not left, (tmp_path / "log").read_text()[-2000:]
            assert len(found(server, "up == 1")) == 3
            assert found(server, 'ALERTS{alertname="DivergenceTooLarge"}')
