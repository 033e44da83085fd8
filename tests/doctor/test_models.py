"""Damage that a download, a copy or a git checkout leaves is found without loading anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from fill import build_fill, fill_policy

from lit_rl.doctor.models import check_path
from lit_rl.doctor.report import Finding
from lit_rl.doctor.runs import trainable


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fill(tmp_path_factory.mktemp("fill"))


def found(path: Path | str) -> Finding:
    (finding,) = check_path("key", str(path))
    return finding


def test_what_is_whole_is_named(whole: Path) -> None:
    pipeline, siglip = found(whole / "pipeline"), found(whole / "siglip")
    assert pipeline.status == siglip.status == "ok"
    assert "FluxFillPipeline of scheduler, text_encoder, text_encoder_2" in pipeline.text and "SiglipVisionModel" in siglip.text


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")


def index(file: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": file.name}
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("file", "damage", "text"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", cut, "diffusion_pytorch_model.safetensors has "),
        ("vae/diffusion_pytorch_model.safetensors", pointer, "run `git lfs pull`"),
        ("text_encoder/model.safetensors", Path.unlink, "text_encoder has no weights"),
        ("text_encoder_2/model.safetensors", index, "names model-00001-of-00002.safetensors, which is not there"),
        ("text_encoder_2/config.json", Path.unlink, "text_encoder_2 has no config.json"),
        ("transformer/config.json", lambda file: file.write_text("{"), "transformer/config.json cannot be read"),
        ("scheduler/scheduler_config.json", Path.unlink, "scheduler is empty"),
    ],
)
def test_what_is_broken_is_named(whole: Path, tmp_path: Path, file: str, damage: Callable[[Path], None], text: str) -> None:
    copytree(whole / "pipeline", tmp_path / "pipeline")
    damage(tmp_path / "pipeline" / file)
    finding = found(tmp_path / "pipeline")
    assert finding.status == "problem" and text in finding.text


def test_adapters_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"image_proj": {}, "attn_adapter": {}}, tmp_path / "mixed.bin")
    assert found(tmp_path / "mixed.bin").status == "problem" and "ip_adapter" in found(tmp_path / "mixed.bin").text
    assert found(tmp_path / "nothing").text == f"no such file or folder: {tmp_path / 'nothing'}"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found("owner/name").status == "problem"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert found("owner/name").status == "warning"
    (tmp_path / "hub/models--owner--name/snapshots/1").mkdir(parents=True)
    assert found("owner/name").status == "ok"


@pytest.mark.parametrize("lora", [{"rank": 2}, {"rank": 3, "targets": ["attn.to_q"]}])
def test_the_size_of_a_lora_is_known_from_the_headers(whole: Path, lora: dict[str, object]) -> None:
    policy = fill_policy(whole, lora=lora)
    policy.style = None
    numbers, least = trainable(policy)
    policy.load()
    assert not least and numbers == sum(p.numel() for _, p in policy.trainable())
