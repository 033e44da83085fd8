"""Versions, GPUs and disks as they might be."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_rl.doctor import machine
from lit_rl.doctor.machine import accelerators, packages, room
from lit_rl.doctor.report import Finding
from lit_rl.net.gpus import Gpu

H200, T4 = Gpu(0, "NVIDIA H200", 143771, 12, 9.0), Gpu(1, "Tesla T4", 15360, 9000, 7.5)


def said(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.status, finding.about) for finding in findings]


def project(folder: Path, *dependencies: str, python: str = ">=3.11", pins: str = "") -> Path:
    (folder / "pyproject.toml").write_text(f'[project]\nrequires-python = "{python}"\ndependencies = {list(dependencies)}\n')
    (folder / "constraints.txt").write_text(pins)
    return folder


def test_this_checkout_has_what_it_asks_for() -> None:
    assert {finding.status for finding in packages()} <= {"ok", "warning"}


@pytest.mark.parametrize(
    ("dependencies", "pins", "status", "text"),
    [
        (["torch>=2"], "torch==0.1", "warning", "(tested: 0.1)"),
        (["torch>=99"], "", "problem", "needed: >=99"),
        (["no-such-package"], "", "problem", "no-such-package is not installed"),
        (["torch[extra]>=2"], "", "ok", "all 1 there"),
        (["torch>=2"], "opencv-python-nowhere==5.0", "ok", "all 1 there"),
    ],
)
def test_versions_are_compared(tmp_path: Path, dependencies: list[str], pins: str, status: str, text: str) -> None:
    """Packages that are only pinned need not be there; a local version, as 2.13.0+cpu, is the version."""
    python, found = packages(project(tmp_path, *dependencies, pins=pins))
    assert python.status == "ok" and found.status == status and text in found.text


def test_an_old_python_is_a_problem(tmp_path: Path) -> None:
    assert next(packages(project(tmp_path, python=">=4"))).status == "problem"


@pytest.mark.parametrize(
    ("gpus", "cuda", "wants", "expected"),
    [
        ([], None, {}, [("ok", "GPUs")]),
        ([], "13.0", {"wants_gpu": True}, [("problem", "GPUs")]),
        ([H200], None, {"wants_gpu": True}, [("ok", "GPU 0"), ("problem", "torch")]),
        ([T4], None, {}, [("warning", "GPU 1"), ("problem", "torch")]),
        ([T4], None, {"wants_bfloat16": True}, [("problem", "GPU 1"), ("problem", "torch")]),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], cuda: str | None, wants: dict[str, bool], expected: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.13.0", cuda))
    assert said(list(accelerators(gpus, **{"wants_gpu": False, "wants_bfloat16": False} | wants))) == expected


@pytest.mark.parametrize(("checkpoint", "status"), [(10, "ok"), (45, "warning"), (60, "problem")])
def test_checkpoints_must_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: float, status: str) -> None:
    """100 bytes free, 3 copies kept, and the next one is written before the oldest goes: 40, 180 and 240 bytes; one at a time needs two."""
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    (finding,) = room([tmp_path / "not" / "there" / "yet"], checkpoint=checkpoint, copies=3, least=False)
    assert finding.status == status


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = room([tmp_path / "file" / "out"], checkpoint=0, copies=1, least=True)
    assert finding.status == "problem" and "cannot be written to" in finding.text
