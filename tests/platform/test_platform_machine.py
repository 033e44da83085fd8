"""The machine's figures, with GPUs that do not tell everything, GPUs that are lost, and limits of a container."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi.testclient import TestClient
from served_platform import GUIDE_JOB, asked

from lit_rl.platform.compare import difference
from lit_rl.platform.gpu_reader import Figures
from lit_rl.platform.machine import cpus, host
from lit_rl.platform.plan import weights


class TwoGpus:
    """Two GPUs: one does not tell its temperature, the other one is lost at the second look."""

    reason = ""

    def __init__(self) -> None:
        self.looks = 0

    def read(self) -> list[Figures]:
        self.looks += 1
        first: Figures = {"gpu_index": 0, "utilization": 50.0, "memory_used": 10.0, "memory_total": 80.0, "temperature": None}
        return [first, {"gpu_index": 1, "utilization": 90.0} if self.looks < 2 else {"gpu_index": 1, "error": "GPU is lost"}]


def test_gpus_are_measured_and_a_lost_one_is_told(tmp_path: Path) -> None:
    with asked(tmp_path, reader=TwoGpus(), gpu_ids=(0, 1)) as client:
        monitor = client.app.state.service.monitor  # type: ignore[attr-defined]
        monitor.look()
        monitor.look()
        shown = client.get("/api/gpus").json()
        assert shown["available"] and shown["gpus"][0]["temperature"] is None and shown["host"]["disk"]["total"] > 0
        assert "GPU 1: GPU is lost" in [alert["message"] for alert in client.get("/api/alerts").json()]
        uuid = client.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
        client.app.state.service.records.change(uuid, gpu_ids=[0])  # type: ignore[attr-defined]
        figures = client.get(f"/api/jobs/{uuid}/gpu").json()
        assert figures and {sample["gpu_index"] for sample in figures} == {0} and figures[0]["utilization"] == 50.0


def test_a_machine_without_gpus_says_why(platform: TestClient) -> None:
    shown = platform.get("/api/gpus").json()
    assert shown["available"] or shown["reason"]


def test_limits_of_a_container_are_the_machines(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("250000\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert host(tmp_path, tmp_path)["mem"] == {"used": 250_000, "total": 1_000_000, "percent": 25.0} and cpus(tmp_path) == 0.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host(tmp_path, tmp_path)["mem"]["total"] > 1_000_000 and cpus(tmp_path) == os.cpu_count()  # type: ignore[index]


def test_runs_are_compared_by_what_differs(platform: TestClient) -> None:
    a, b = (platform.post("/api/jobs", json=GUIDE_JOB | {"learning_rate": rate}).json()["uuid"] for rate in (1e-6, 2e-6))
    platform.post(f"/api/jobs/{a}/metrics", json={"points": [{"step": 1, "metrics": {"reward": 0.5}}]})
    found = platform.get("/api/compare", params={"jobs": f"{a},{b}"}).json()
    assert found["config_diff"].pop("model.init_args.optimizer.init_args.lr") == {a: 1e-6, b: 2e-6}
    assert found["config_diff"] == {}  # although every job has a folder of its own
    assert found["summary"][a]["reward_mean"] == 0.5 and found["summary"][b] == {}
    assert difference({"x": {"a": {"b": 1}}, "y": {"a": 1}}) == {"a.b": {"x": 1, "y": None}, "a": {"x": None, "y": 1}}


def test_the_form_is_the_methods_own_signature(platform: TestClient) -> None:
    known = {entry["algorithm"]: entry["templates"] for entry in platform.get("/api/algorithms").json()}
    assert {"sft", "dpo", "ppo", "grpo", "gspo", "dapo", "flow_grpo", "diffusion_nft", "deepgen"} <= known.keys()
    assert known["grpo"][0] == "configs/grpo/qwen25_7b_gsm8k.yaml" and "configs/demo/grpo_sort.yaml" in known["grpo"]
    for algorithm in known:
        parts = platform.get(f"/api/algorithms/{algorithm}/form").json()["parts"]
        options = {option["name"]: option for option in parts["model"]["options"]}
        assert options["prompts_per_iteration"]["value"] and options["prompts_per_iteration"]["help"], algorithm


def test_the_size_of_a_model_is_in_its_label_or_its_name() -> None:
    assert weights("7B", "") == weights("", "Qwen/Qwen2.5-7B-Instruct") == 7e9
    assert weights("", "Qwen/Qwen3-0.6B") == 0.6e9 and weights("", "org/model") == 0.0 and weights("350M", "x-7B") == 350e6


def test_a_backup_is_a_database_of_its_own(platform: TestClient, tmp_path: Path) -> None:
    import sqlite3

    uuid = platform.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
    copy = tmp_path / "copy.db"
    copy.write_bytes(platform.get("/api/backup").content)
    assert sqlite3.connect(copy).execute("SELECT uuid FROM jobs").fetchall() == [(uuid,)]
