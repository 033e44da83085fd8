"""The guide's snippets (5.2) against a fresh platform, with only their undefined names defined; what is reported is not lost."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from served_platform import GUIDE_JOB, listening

from lit_rl.trackers.outbox import Outbox
from lit_rl.trackers.values import flat_numbers
from training_platform.core.wandb_callback import DualLogger, init_logging


class Run:
    """Stands in for a run of Weights & Biases, which tests must not reach."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.alerts: list[str] = []
        self.config: dict[str, Any] = {}
        self.ended: int | None = None
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, step_metric: str) -> None:
        self.rows.append({name: step_metric})

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def alert(self, *, title: str, text: str) -> None:
        self.alerts.append(f"{title}: {text}")

    def finish(self, *, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    import wandb

    found = Run()
    monkeypatch.setattr(wandb, "init", lambda **_: found)
    monkeypatch.chdir(tmp_path)
    for name in ("JOB_UUID", "PLATFORM_URL", "WANDB_PROJECT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_the_signature_is_the_guides() -> None:
    found = list(inspect.signature(DualLogger).parameters.values())
    assert [(p.name, p.default) for p in found] == [
        ("job_uuid", inspect.Parameter.empty), ("platform_url", "http://localhost:8000"), ("platform_enabled", True),
        ("wandb_project", None),
        ("wandb_run_name", None), ("wandb_entity", None), ("wandb_config", None), ("wandb_tags", None), ("wandb_enabled", True),
    ]  # fmt: skip
    methods = {"log_metrics", "log_gpu_usage", "log_checkpoint", "log_status", "log_config", "log_summary", "finish"}
    assert methods <= set(dir(DualLogger))
    assert list(inspect.signature(DualLogger.log_gpu_usage).parameters)[1:] == [
        "gpu_index", "utilization", "memory_used", "memory_total", "temperature",
    ]  # fmt: skip


def test_the_quick_start(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guide 5.2.1."""
    with listening(tmp_path) as url:
        monkeypatch.setenv("PLATFORM_URL", url)
        logger = init_logging(job_uuid="my-job-001", wandb_project="llm-training")
        logger.log_metrics(step=100, metrics={"loss": 0.5, "reward": 0.8})
        logger.finish()
        (row,) = requests.get(f"{url}/api/jobs/my-job-001/metrics", timeout=60).json()
        assert (row["step"], row["policy_loss"], row["reward_mean"]) == (100, 0.5, 0.8)
        assert requests.get(f"{url}/api/jobs/my-job-001", timeout=60).json()["state"] == "succeeded"
    assert run.rows[1:] == [{"loss": 0.5, "reward": 0.8, "trainer/global_step": 100}] and run.ended == 0


@pytest.mark.slow
def test_the_grpo_script_loses_nothing(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guide 5.2.2, scenario 1: ten thousand steps in a tight loop, then the end."""
    monkeypatch.setattr("lit_rl.trackers.dual.FINISH_SECONDS", 300.0)  # a busy machine takes more than ten
    with listening(tmp_path) as url:
        logger = DualLogger(
            job_uuid="local-grpo-test", platform_url=url, platform_enabled=True, wandb_project="grpo-math", wandb_entity=None,
            wandb_run_name="qwen7b-grpo-local-gr", wandb_config={"model": "m"}, wandb_tags=["grpo"], wandb_enabled=True,
        )  # fmt: skip
        for step in range(10_000):
            metrics = {"policy_loss": 0.5 - step * 0.00003, "reward_mean": 0.3 + step * 0.00005, "reward_std": 0.2}
            logger.log_metrics(step=step, metrics=metrics | {"kl_divergence": 0.01, "entropy": 1.5}, epoch=step // 1000)
            if step % 100 == 0:
                logger.log_gpu_usage(gpu_index=0, utilization=92.5, memory_used=65.0, memory_total=80.0, temperature=72.0)
            if step > 0 and step % 500 == 0:
                path, score = f"checkpoints/step-{step}", 0.35 + step * 0.00003
                logger.log_checkpoint(step=step, checkpoint_path=path, eval_results={"gsm8k": score})
        logger.log_summary({"best_gsm8k": 0.65})
        logger.finish()
        rows = requests.get(f"{url}/api/jobs/local-grpo-test/metrics", timeout=300).json()
        assert [row["step"] for row in rows] == list(range(10_000)) and rows[-1]["epoch"] == 9
        assert rows[-1]["policy_loss"] == 0.5 - 9999 * 0.00003
        found = requests.get(f"{url}/api/jobs/local-grpo-test/checkpoints", timeout=60).json()
        assert [c["step"] for c in found] == list(range(500, 10_000, 500)) and found[-1]["is_best"]
        assert len(requests.get(f"{url}/api/jobs/local-grpo-test/gpu", timeout=60).json()) == 100
    assert run.summary == {"best_gsm8k": 0.65} and sum("policy_loss" in row for row in run.rows) == 10_000


def test_the_platform_alone_and_weights_and_biases_alone(tmp_path: Path, run: Run) -> None:
    """Guide 5.2.2, scenarios 3 and 4."""
    step, metrics = 1, {"loss": 0.1}
    with listening(tmp_path) as url:
        logger = DualLogger(job_uuid="my-job", platform_url=url, wandb_enabled=False)
        logger.log_metrics(step, metrics)
        logger.finish()
        assert len(requests.get(f"{url}/api/jobs/my-job/metrics", timeout=60).json()) == 1 and run.rows == []
    logger = DualLogger(job_uuid="my-job", platform_enabled=False, wandb_project="my-project")
    logger.log_metrics(step, metrics)
    logger.log_status("failed", "why")
    logger.finish()
    assert run.rows[1:] == [{"loss": 0.1, "trainer/global_step": 1}] and run.alerts == ["failed: why"]


def test_what_cannot_be_sent_is_kept_and_sent_by_the_next(tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    spool = tmp_path / "unsent.jsonl"
    away = Outbox("http://127.0.0.1:9", "j", token=None, spool=spool)
    for step in range(3):
        away.point({"step": step, "metrics": {"x": 1.0}})
    away.other("status", {"status": "failed", "message": ""})
    away.close(0.1)
    assert len(spool.read_text().splitlines()) == 4 and caplog.text.count("is away") == 1
    with listening(tmp_path) as url:
        again = Outbox(url, "j", token=None, spool=spool)
        again.close(120.0)
        assert [row["step"] for row in requests.get(f"{url}/api/jobs/j/metrics", timeout=60).json()] == [0, 1, 2]
        assert requests.get(f"{url}/api/jobs/j", timeout=60).json()["state"] == "failed" and not spool.exists()


def test_no_file_stops_a_run(tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool that a full disk has cut off, one that is a folder, one that cannot be written."""
    spool, whole = tmp_path / "unsent.jsonl", json.dumps(["metrics", {"points": [{"step": 7, "metrics": {"x": 1.0}}]}])
    spool.write_text(f"{whole}\n{whole[:-9]}")
    (tmp_path / "file").touch()
    for number, place in enumerate((spool, tmp_path, tmp_path / "file/spool.jsonl")):
        again = Outbox("http://127.0.0.1:9", "j", token=None, spool=place)
        again.point({"step": 8, "metrics": {"x": 1.0}})
        again.close(0.1)
        assert caplog.text.count("lost (") == number and caplog.text.count("is not sent") == bool(number)
    assert [json.loads(line)[1]["points"][0]["step"] for line in spool.read_text().splitlines()] == [7, 8]
    assert "a line that is no report" in caplog.text


def test_any_name_number_and_text_is_taken(tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Each of them, refused alone, would take with it the other reports of its batch, or end the thread that sends."""
    with listening(tmp_path) as url:
        logger = DualLogger("j", url, wandb_enabled=False)
        logger.log_metrics(1, {"a\nb": 1.0, "": 2.0, "x" * 300: 3.0, "\ud800": 4.0, "one/½": 5.0}, epoch=np.int64(3))
        logger.log_gpu_usage(0, np.float32(50.0), torch.tensor(1.5), math.nan, 60)
        logger.log_checkpoint(1, "a.ckpt", {"acc\t": 0.5})
        logger.log_status("failed\n", "x" * 30_000 + "\0")
        logger.finish(1)
        (row,) = requests.get(f"{url}/api/jobs/j/metrics?split=all", timeout=60).json()
        (gpu,) = requests.get(f"{url}/api/jobs/j/gpu", timeout=60).json()
        (saved,) = requests.get(f"{url}/api/jobs/j/checkpoints", timeout=60).json()
    names = {"a b": 1.0, "_": 2.0, "x" * 200: 3.0, "?": 4.0, "one/½": 5.0}
    assert {name: row[name] for name in names} == names and row["epoch"] == 3 and "refuses" not in caplog.text
    assert (gpu["utilization"], gpu["memory_used"], gpu["memory_total"], gpu["temperature"]) == (50.0, 1.5, None, 60.0)
    assert saved["eval_results"] == {"acc ": 0.5}


def test_a_program_that_ends_without_finish_has_failed(tmp_path: Path) -> None:
    with listening(tmp_path) as url:
        script = f"""
            import sys
            from training_platform.core.wandb_callback import DualLogger
            logger = DualLogger(job_uuid="gone", platform_url={url!r}, wandb_enabled=False)
            logger.log_metrics(1, {{"loss": float("nan")}})
            assert not {{"torch", "lightning", "numpy"}} & set(sys.modules), "a light import"
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=240, cwd=tmp_path)
        job = requests.get(f"{url}/api/jobs/gone", timeout=60).json()
        assert job["state"] == "failed" and job["exit"]["reason"].startswith("unfinished")
        assert "nan" in [alert["rule"] for alert in requests.get(f"{url}/api/jobs/gone/alerts", timeout=60).json()]


def test_other_ranks_say_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logger = DualLogger("j", "http://127.0.0.1:9")
    began = time.monotonic()
    logger.log_metrics(1, {"x": 1.0})
    logger.finish()
    assert run.rows == [] and time.monotonic() - began < 60


def test_numbers_of_any_kind_by_flat_names() -> None:
    given = {
        "a": 1,
        "b": {"c": torch.tensor(2.5), "d": {"e": np.float32(0.5)}},
        "text": "x",
        "many": torch.ones(3),
        "yes": True,
        "nan": math.nan,
    }
    found = flat_numbers(given)
    assert math.isnan(found.pop("nan")) and found == {"a": 1.0, "b/c": 2.5, "b/d/e": 0.5, "yes": 1.0}


def test_the_guides_job_over_the_api(tmp_path: Path) -> None:
    """Guide 4.5, on a machine without its GPUs and files: made, with problems; started, refused with them."""
    with listening(tmp_path, gpu_ids=()) as url:
        response = requests.post(f"{url}/api/jobs", json=GUIDE_JOB, timeout=60)
        job = response.json()
        assert response.status_code == 201 and f"Job created: {job['uuid']}"
        assert {problem["field"] for problem in job["problems"]} == {"num_gpus", "train_data_path", "eval_data_path"}
        refused = requests.post(f"{url}/api/jobs/{job['uuid']}/start", timeout=60)
        assert refused.status_code == 422 and refused.json()["error"]["details"] == job["problems"]
        shown = json.loads(requests.get(f"{url}/api/jobs/{job['uuid']}/config", timeout=60).text)["config"]
        model = shown["model"]["init_args"]
        assert (model["group_size"], model["prompts_per_iteration"], model["kl"]["coef"]) == (5, 1024, 0.001)
        assert model["answers"]["sampling"]["max_new_tokens"] == 1024 and shown["trainer"]["devices"] == 8
        assert model["policy"]["init_args"]["pretrained"] == GUIDE_JOB["model_path"]


def test_reports_stay_with_the_address_that_they_were_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A redirect would carry the token along; a file is no service, and what speaks no HTTP ends no thread."""
    seen = list[str]()

    class Redirects(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            if "strange" in self.path:
                self.wfile.write(b"220 smtp ready\r\n")
                return
            self.send_response(302)
            self.send_header("Location", "/stolen")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirects)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for job, address in (("j", f"http://127.0.0.1:{server.server_port}"), ("strange", f"http://127.0.0.1:{server.server_port}"),
                         ("k", f"file://{tmp_path}")):  # fmt: skip
        box = Outbox(address, job, token="secret", spool=tmp_path / f"{job}.jsonl")
        box.point({"step": 1, "metrics": {"x": 1.0}})
        box.close(5.0 if job == "j" else 1.0)
    server.shutdown()
    server.server_close()
    thread.join()
    assert set(seen) == {"/api/jobs/j/metrics", "/api/jobs/strange/metrics"} and "refuses metrics of job j" in caplog.text
    assert all((tmp_path / f"{job}.jsonl").exists() for job in ("strange", "k"))
