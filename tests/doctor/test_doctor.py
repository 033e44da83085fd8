"""`python -m lit_rl.doctor` as it is typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fill import fill_policy
from rewards.fault_proxy import RedServer
from test_guide_scenarios import ENV, ROOT, write_home

from lit_rl.doctor.__main__ import main
from lit_rl.doctor.report import gigabytes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


def diagnose(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, str], str]:
    """Exit code, status by subject, and all texts."""
    code = main([*options, "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return code, {f["about"]: f["status"] for f in findings}, "\n".join(f["text"] for f in findings)


def test_a_healthy_run_is_told_so(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--config", str(ROOT / "configs/base/cpu.yaml"), "--config", str(home / "run.yaml")]
    with RedServer() as red:
        monkeypatch.setenv("REWARD_SERVER_URLS", red.url)
        code, by, texts = diagnose(capsys, *base)
        assert code == 1 and "['blue', 'red'], not ['jpeg_size']" in texts and by[f"reward server {red.url}"] == "problem"
        outputs = {"rewards": {"server": {"class_path": "lit_rl.rewards.client.HTTPReward", "init_args": {"outputs": ["red"]}}}}
        other = [{"class_path": "callbacks.reward_scoring.RewardScoring", "init_args": outputs}]
        code, by, texts = diagnose(capsys, *base, "--trainer.callbacks", json.dumps(other), "--trainer.devices", "2")
    assert code == 0, texts
    reads = ["model.policy.pretrained", "model.policy.style.encoder"]
    assert {by[key] for key in [*reads, "data", "disk"]} == {"ok"}
    assert "6 prompts to train on" in texts and "2 processes ask 1 server" in texts


def test_one_mistake_hides_no_other(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run: dict[str, Any] = yaml.safe_load((home / "run.yaml").read_text())
    run["model"]["init_args"]["policy"]["init_args"]["style"]["encoder"] = str(tmp_path / "nowhere")
    run["model"]["init_args"]["timestep_fraction"] = 2.0
    run["data"]["init_args"]["train"] = str(tmp_path / "missing.json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, by, texts = diagnose(capsys, "--config", str(tmp_path / "run.yaml"), "--urls", "127.0.0.1:9", "--trainer.accelerator", "cpu")
    assert code == 1
    problems = ("model", "data", "model.policy.style.encoder", "reward server http://127.0.0.1:9")
    assert {by[key] for key in problems} == {"problem"}
    assert f"no such file or folder: {tmp_path / 'nowhere'}" in texts and "timestep_fraction=2.0" in texts and "missing.json" in texts


def test_pictures_are_looked_at_whole(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run: dict[str, Any] = yaml.safe_load((home / "run.yaml").read_text())
    items = Path(run["data"]["init_args"]["train"])
    shutil.copytree(items.parent, tmp_path / "data")
    picture = max((tmp_path / "data").rglob("*.png"), key=lambda file: file.stat().st_size)
    picture.write_bytes(picture.read_bytes()[:-40])
    run["data"]["init_args"]["train"] = str(tmp_path / "data" / items.name)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, by, texts = diagnose(capsys, "--config", str(tmp_path / "run.yaml"), "--trainer.accelerator", "cpu")
    assert code == 1 and by["data"] == "problem" and f"{picture} cannot be read" in texts


def test_room_is_wanted_for_exports_too(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second of 6 iterations is written: 3 exports, of which all, or the newest, or the best, are kept. No adapter is drawn."""
    monkeypatch.chdir(tmp_path)
    run: dict[str, Any] = yaml.safe_load((home / "run.yaml").read_text())
    keeper = run["trainer"]["callbacks"][-1]
    keeper["init_args"]["every_n_epochs"] = 2
    for name, keep in (("all", None), ("newest", 1)):
        given = {"dirpath": name, "at": "checkpoint", "keep": keep}
        run["trainer"]["callbacks"].append({"class_path": "callbacks.export.Export", "init_args": given})
    run["trainer"]["callbacks"].append("callbacks.best_model.BestModel")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    main(["--config", str(tmp_path / "run.yaml"), "--trainer.accelerator", "cpu", "--trainer.max_epochs", "6"])
    said = capsys.readouterr().out
    sizes = re.findall(r"an? (?:export|checkpoint) takes about (\S+ \S+), up to (\d)", said)
    assert [count for _, count in sizes] == ["2", "3", "1", "1"]
    policy = fill_policy(home / "model")
    policy.load()
    weights = sum(weight.numel() for _, weight in policy.trainable())
    assert [size for size, _ in sizes] == [gigabytes(4 * weights * 3), *[gigabytes(4 * weights)] * 3]


def test_a_wrong_key_is_told_as_the_command_line_tells_it(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run: dict[str, Any] = yaml.safe_load((home / "run.yaml").read_text())
    run["model"]["init_args"]["grup_size"] = 8
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, by, texts = diagnose(capsys, "--config", str(tmp_path / "run.yaml"))
    assert code == 1 and by["run"] == "problem" and "run.yaml:" in texts and "did you mean 'group_size'?" in texts


def test_without_a_run_it_needs_no_torch() -> None:
    """And says what to do in lines; nobody listens on port 9."""
    code = "import sys; from lit_rl.doctor.__main__ import main; code = main(['--urls', '127.0.0.1:9']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit(code)"], env=ENV, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("1 problem, ") and any(
        line.startswith("problem reward server http://127.0.0.1:9: no reward") for line in lines
    )


def test_memory_is_compared_with_the_card_that_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--config", str(home / "run.yaml"), "--trainer.accelerator", "gpu", "--trainer.devices", "2"]
    _, by, texts = diagnose(capsys, *run, "--gpu-memory", "24")
    assert (by["memory"], by["memory on 24 GiB"]) == ("ok", "ok")
    assert "GiB on each of 2 GPUs" in texts and "moments of " in texts and "keys" not in texts
    _, by, texts = diagnose(capsys, *run, "--gpu-memory", "0.5")
    assert by["memory on 0.5 GiB"] == "problem" and "does not fit" in texts


def test_without_the_model_s_config_memory_is_not_guessed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run: dict[str, Any] = yaml.safe_load((home / "run.yaml").read_text())
    run["model"]["init_args"]["policy"]["init_args"]["pretrained"] = "owner/no-such-model"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    _, by, texts = diagnose(capsys, "--config", str(tmp_path / "run.yaml"), "--trainer.accelerator", "cpu")
    assert (
        by["memory"] == "warning"
        and "cannot be estimated" in texts
        and "with the config.json files of the model; weights are not needed" in texts
    )
