"""What runs report comes back as rows, curves, checkpoints, alerts and text."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from served_platform import GUIDE_JOB

from lit_rl.platform import curves, metrics
from lit_rl.platform.gpu_history import GpuHistory
from lit_rl.platform.logs import readable
from lit_rl.platform.metrics import with_canonical
from lit_rl.platform.service import Service


def report(client: TestClient, job: str, *points: dict[str, object]) -> None:
    answer = client.post(f"/api/jobs/{job}/metrics", json={"points": points})
    assert answer.status_code == 202 and answer.json() == {"accepted": len(points)}, answer.text


def service(client: TestClient) -> Service:
    found = client.app.state.service  # type: ignore[attr-defined]
    assert isinstance(found, Service)
    return found


def test_rows_have_the_two_numbers_that_the_guide_prints(platform: TestClient) -> None:
    """Guide 5.5; a row of an evaluation alone, and one whose loss is NaN, are in no default answer."""
    train = [{"step": s, "epoch": 0, "metrics": {"loss": 0.5 - s / 100, "reward": s / 10}} for s in (3, 1, 2)]
    report(
        platform, "my-job", *train, {"step": 4, "metrics": {"val/accuracy": 0.5}}, {"step": 5, "metrics": {"loss": "NaN", "reward": 1.0}}
    )
    rows = platform.get("/api/jobs/my-job/metrics").json()
    said = [f"Step {m['step']}: loss={m['policy_loss']:.4f}, reward={m['reward_mean']:.3f}" for m in rows[-10:]]
    assert said == ["Step 1: loss=0.4900, reward=0.100", "Step 2: loss=0.4800, reward=0.200", "Step 3: loss=0.4700, reward=0.300"]
    assert [row["step"] for row in platform.get("/api/jobs/my-job/metrics?split=eval").json()] == [4]
    every = platform.get("/api/jobs/my-job/metrics?split=all&since_step=2&keys=loss").json()
    assert [row["step"] for row in every] == [3, 4, 5] and every[-1]["loss"] is None
    job = platform.get("/api/jobs/my-job").json()
    assert job["source"] == "external" and job["state"] == "running" and job["progress"]["step"] == 5
    assert job["last_metrics"]["reward_mean"] == 1.0
    newest = platform.get("/api/jobs/my-job/metrics?limit=2")
    assert [row["step"] for row in newest.json()] == [2, 3] and newest.headers["x-truncated"] == "true"


def test_each_job_of_a_list_is_as_it_is_alone(platform: TestClient) -> None:
    """Its newest metrics, its pace and its silence are looked up for all jobs at once."""
    for n, job in enumerate("abc"):
        report(platform, job, *({"step": step, "metrics": {"policy_loss": n + step}, "ts": 1e9 + step * n} for step in range(n + 1)))
        platform.post(f"/api/jobs/{job}/status", json={"status": "running", "max_steps": 9})
    platform.post("/api/jobs", json=GUIDE_JOB)
    service(platform).alerts.note("b", "stalled", "no step")
    listed = platform.get("/api/jobs").json()["items"]
    assert listed == [platform.get(f"/api/jobs/{job['uuid']}").json() for job in listed]
    assert [(job["last_metrics"], job["stalled"], job["progress"]["eta_s"]) for job in listed] == [
        ({}, False, None), ({"policy_loss": 4.0}, False, 14.0), ({"policy_loss": 2.0}, True, 8.0), ({"policy_loss": 0.0}, False, None),
    ]  # fmt: skip


def test_a_report_sent_twice_is_one_and_replaces(platform: TestClient) -> None:
    for value in (1.0, 2.0, 2.0):
        report(platform, "j", {"step": 1, "metrics": {"x": value}})
    assert platform.get("/api/jobs/j/metrics").json()[0]["x"] == 2.0 and len(platform.get("/api/jobs/j/metrics").json()) == 1


def test_other_names_are_copied_and_kept() -> None:
    assert with_canonical({"actor/ppo_kl": 1.0, "kl": 2.0}) == {"actor/ppo_kl": 1.0, "kl": 2.0, "kl_divergence": 1.0}
    assert with_canonical({"policy_loss": math.inf, "loss": 3.0}) == {"policy_loss": None, "loss": 3.0}


def test_curves_are_cut_into_buckets_by_least_largest_and_mean(platform: TestClient) -> None:
    report(platform, "j", *({"step": s, "metrics": {"x": float(s % 10), "y": None}} for s in range(1000)))
    curve = platform.get("/api/jobs/j/series?keys=x&points=100").json()["x"]
    assert curve == {"step": list(range(0, 1000, 10)), "min": [0.0] * 100, "max": [9.0] * 100, "mean": [4.5] * 100, "raw": False}
    part = platform.get("/api/jobs/j/series?from=10&to=12").json()
    assert part["x"]["mean"] == [0.0, 1.0, 2.0] and part["x"]["raw"] and part["y"]["mean"] == [None] * 3


def test_curves_are_remembered_until_their_job_reports(platform: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job sees no report of another job, nor of a removed job of the same name."""
    monkeypatch.setattr(curves, "REMEMBERED", 30)
    made, read = list[object](), curves.made
    monkeypatch.setattr(curves, "made", lambda *asked: made.append(asked) or read(*asked))

    def means(job: str, points: int = 100) -> list[float]:
        found: list[float] = platform.get(f"/api/jobs/{job}/series", params={"points": points}).json()["x"]["mean"]
        return found

    for job in "ab":
        report(platform, job, {"step": 0, "metrics": {"x": 1.0}}, {"step": 1, "metrics": {"x": 2.0}})
    assert [means(job) for job in "abaabb"] == [[1.0, 2.0]] * 6 and len(made) == 2
    report(platform, "a", {"step": 1, "metrics": {"x": 5.0}})
    assert (means("a"), means("b"), len(made)) == ([1.0, 5.0], [1.0, 2.0], 3)
    assert [means("b", points) for points in (50, 60, 70)] == [[1.0, 2.0]] * 3
    assert service(platform).metrics.curves._numbers <= 30 and means("a") == [1.0, 5.0] and len(made) == 7
    assert platform.delete("/api/jobs/a").status_code == 204
    report(platform, "a", {"step": 0, "metrics": {"x": 9.0}})
    assert means("a") == [9.0]


def test_few_rows_are_found_without_reading_all(platform: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where most steps have no row of the split."""
    monkeypatch.setattr(metrics, "FEWEST_ROWS", 4)
    report(platform, "j", *({"step": s, "metrics": {"policy_loss": 1.0} if s % 9 else {"val/x": float(s)}} for s in range(100)))
    found = platform.get("/api/jobs/j/metrics?split=eval&limit=3").json()
    assert [(row["step"], row["val/x"]) for row in found] == [(81, 81.0), (90, 90.0), (99, 99.0)]
    assert [row["step"] for row in platform.get("/api/jobs/j/metrics?split=eval&limit=2&since_step=9").json()] == [18, 27]
    assert len(platform.get("/api/jobs/j/metrics").json()) == 88


@pytest.mark.parametrize(
    "body",
    [
        {"points": []},
        {"points": [{"step": 1, "metrics": {}}] * 1001},
        {"points": [{"step": 1, "metrics": {f"k{i}": 0.0 for i in range(513)}}]},
        {"points": [{"step": 1, "metrics": {"x" * 1_000_000: 0.0}}]},
        {"points": [{"step": -1, "metrics": {"x": 0.0}}]},
        {"points": [{"step": 2**63, "metrics": {"x": 0.0}}]},
        {"points": [{"step": 1, "metrics": {"x": "1"}}]},
        {"points": [{"step": 1, "metrics": {"x": 10**400}}]},
    ],
)
def test_reports_beyond_the_bounds_are_refused(platform: TestClient, body: dict[str, object]) -> None:
    assert platform.post("/api/jobs/j/metrics", json=body).status_code in (400, 422)
    assert platform.get("/api/jobs/j").status_code == 404


def test_a_job_has_a_bounded_number_of_metrics(platform: TestClient) -> None:
    report(platform, "j", {"step": 1, "metrics": {f"k{i}": 0.0 for i in range(512)}})
    report(platform, "j", {"step": 2, "metrics": {"k0": 1.0}})
    assert platform.post("/api/jobs/j/metrics", json={"points": [{"step": 3, "metrics": {"one more": 0.0}}]}).status_code == 422


def test_checkpoints_come_back_as_the_guide_prints_them(platform: TestClient) -> None:
    """Guide 5.6."""
    for step, result in ((500, 0.4), (1000, 0.5)):
        body = {"step": step, "path": f"checkpoints/step-{step}", "eval_results": {"gsm8k": result}}
        assert platform.post("/api/jobs/j/checkpoints", json=body).status_code == 201
    platform.post("/api/jobs/j/checkpoints", json={"step": 1500, "path": "c"})
    found = platform.get("/api/jobs/j/checkpoints").json()
    assert [(c["step"], c["path"], c.get("eval_results")) for c in found][1:] == [
        (1000, "checkpoints/step-1000", {"gsm8k": 0.5}), (1500, "c", None),
    ]  # fmt: skip
    assert [c["is_best"] for c in found] == [False, True, False] and not any(c["exists"] for c in found)


def test_the_checkpoint_of_the_lowest_loss_is_the_best(platform: TestClient) -> None:
    for step, loss in ((1, 0.7), (2, 0.4), (3, 0.4), (4, 0.6)):
        body = {"step": step, "path": f"runs/best/{step}.ckpt", "eval_results": {"val/loss": loss, "val/accuracy": step}}
        platform.post("/api/jobs/j/checkpoints", json=body)
    platform.post("/api/jobs/j/checkpoints", json={"step": 0, "path": "runs/checkpoints/0.ckpt", "eval_results": {"val/accuracy": 9.0}})
    assert [c["step"] for c in platform.get("/api/jobs/j/checkpoints").json() if c["is_best"]] == [2]


def test_only_files_of_the_jobs_folder_are_handed_out(platform: TestClient, tmp_path: Path) -> None:
    uuid = platform.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
    folder = Path(platform.get(f"/api/jobs/{uuid}").json()["run_dir"])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/iteration-7.ckpt").write_bytes(b"0123456789")
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    ids = []
    for path in ("../../token", "/etc/passwd", "link", "%2e%2e/token", "."):
        ids.append(platform.post(f"/api/jobs/{uuid}/checkpoints", json={"step": 1, "path": path}).json()["id"])
    assert [platform.get(f"/api/jobs/{uuid}/checkpoints/{i}/download").status_code for i in ids] == [404] * 5
    own = platform.get(f"/api/jobs/{uuid}/checkpoints/checkpoints.iteration-7/download", headers={"Range": "bytes=2-4"})
    assert own.status_code == 206 and own.content == b"234" and "attachment" in own.headers["content-disposition"]
    assert [c["step"] for c in platform.get(f"/api/jobs/{uuid}/checkpoints").json() if c["kind"] == "checkpoints"] == [7]


def test_rules_open_and_close_alerts(platform: TestClient) -> None:
    bad = {"kl_divergence": 0.3, "loss": None, "group/zero_std_ratio": 0.9, "reward/ocr/failed_frac": 0.02}
    bad["reward/ocr/disagrees_with/clip"] = 0.75
    report(platform, "j", {"step": 1, "metrics": bad}, {"step": 2, "metrics": bad})
    found = platform.get("/api/jobs/j/alerts").json()
    assert {alert["rule"] for alert in found} == {"nan", "kl", "zero_std", "failed_rewards", "disagreement"} and len(found) == 5
    assert all(alert["ended_at"] is None and alert["step"] == 1 for alert in found)
    report(platform, "j", {"step": 3, "metrics": {"kl_divergence": 0.05}})
    closed = [alert["rule"] for alert in platform.get("/api/jobs/j/alerts").json() if alert["ended_at"]]
    assert closed == ["nan", "kl"]  # what is not reported is as it was
    platform.app.state.service.alerts.note("", "disk", "the disk is full")  # type: ignore[attr-defined]
    every, still = (platform.get("/api/alerts", params=query).json() for query in ({}, {"open": True, "limit": 2}))
    assert [(alert["job"], alert["name"]) for alert in every] == [(None, None)] + [("j", "j")] * 5
    assert [alert["rule"] for alert in still] == ["disk", "disagreement"]
    platform.post("/api/jobs/j/status", json={"status": "failed"})
    now = platform.get("/api/alerts", params={"open": True}).json()
    assert [alert["rule"] for alert in now] == ["disk"]  # nobody can mend a job that is over; its own page still tells


def test_the_rest_takes_as_long_as_the_steps_of_this_run_took(platform: TestClient) -> None:
    """A run that continues at step 1000 makes ten steps in 20 s: the 90 that are left take 180 s. One step alone has no pace."""

    def left() -> object:
        return platform.get("/api/jobs/j").json()["progress"]["eta_s"]

    platform.post("/api/jobs/j/status", json={"status": "running", "max_steps": 1100})
    assert left() is None
    report(platform, "j", {"step": 1000, "ts": 5000.0, "metrics": {"x": 1.0}})
    assert left() is None
    report(platform, "j", {"step": 1010, "ts": 5020.0, "metrics": {"x": 1.0}})
    assert left() == 180.0
    report(platform, "j", {"step": 1020, "ts": 4000.0, "metrics": {"x": 1.0}})  # a clock that was set back
    assert left() == 0.0


def test_states_of_other_peoples_runs_are_theirs(platform: TestClient) -> None:
    report(platform, "theirs", {"step": 1, "metrics": {"x": 1.0}})
    assert platform.post("/api/jobs/theirs/status", json={"status": "failed", "message": "why"}).json()["exit"]["reason"] == "why"
    ours = platform.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
    assert platform.post(f"/api/jobs/{ours}/status", json={"status": "succeeded"}).json()["state"] == "created"
    report(platform, "silent", {"step": 1, "metrics": {"x": 1.0}})
    service(platform).records.change("silent", reported_at=time.time() - 601)
    service(platform).reports.silence()
    assert platform.get("/api/jobs/silent").json()["state"] == "stale"
    report(platform, "silent", {"step": 2, "metrics": {"x": 1.0}})
    assert platform.get("/api/jobs/silent").json()["state"] == "running"


@pytest.mark.parametrize(
    ("method", "route"), [("GET", "config"), ("POST", "start"), ("POST", "stop"), ("POST", "resume"), ("POST", "clone")]
)
def test_runs_of_others_are_neither_configured_nor_moved_here(platform: TestClient, method: str, route: str) -> None:
    report(platform, "theirs", {"step": 1, "metrics": {"x": 1.0}})
    platform.post("/api/jobs/theirs/status", json={"status": "failed"})
    answer = platform.request(method, f"/api/jobs/theirs/{route}")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "external_job"
    assert [job["uuid"] for job in platform.get("/api/jobs").json()["items"]] == ["theirs"]


def test_gpu_figures_come_back_and_grow_thin(platform: TestClient) -> None:
    now = time.time()
    sample = {"gpu_index": 0, "utilization": 92.5, "memory_used": 65.0, "memory_total": 80.0, "temperature": 72.0}
    assert platform.post("/api/jobs/j/gpu", json={"samples": [sample, sample | {"ts": now - 7200}]}).status_code == 202
    (found,) = platform.get("/api/jobs/j/gpu?minutes=60").json()
    assert {key: found[key] for key in sample} == sample
    history = GpuHistory(service(platform).store)
    minute = (now - 90_000) // 60 * 60
    history.add("j", [{"gpu_index": 1, "ts": minute + s, "utilization": float(s)} for s in (0, 10, 20)])
    history.add("j", [{"gpu_index": 1, "ts": now - 15 * 86400, "utilization": 1.0}])
    history.thin(now)
    (mean,) = history.of("j", [], since=now - 100_000)[:1]
    assert (mean["ts"], mean["utilization"]) == (minute, 10.0) and len(history.of("j", [], since=0.0)) == 3


def test_the_log_is_read_by_bytes_and_lines(platform: TestClient) -> None:
    uuid = platform.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
    folder, url = Path(platform.get(f"/api/jobs/{uuid}").json()["run_dir"]), f"/api/jobs/{uuid}/logs"
    assert platform.get(url).json() == {"text": "", "next_offset": 0, "size": 0, "eof": True}
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_bytes("一 line\nhalf".encode())
    first = platform.get(url).json()
    assert first == {"text": "一 line\n", "next_offset": 9, "size": 13, "eof": True}
    with (folder / "stdout.log").open("a") as file:
        file.write(" done\n")
    assert platform.get(url, params={"offset": 9}).json()["text"] == "half done\n"
    assert platform.get(url, params={"offset": -8}).json()["text"] == ""
    assert platform.get(url, params={"offset": -12}).json()["text"] == "half done\n"
    assert platform.get(url, params={"offset": 99}).json()["text"].startswith("一")  # another, shorter file


def test_logs_show_no_escape_codes_and_the_last_state_of_a_bar() -> None:
    assert readable(b"\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07end\n10%\r20%\r30%\r\n<b>") == "red end\n30%\n<b>"
    assert len(readable(b"x" * 20_000)) == 8192
