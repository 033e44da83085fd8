"""IP-Adapter files of every format in, the same weights out; files of anything else refused by the names of their keys."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_numbers import load
from torch import Tensor

from lit_rl.checkpoints.ip_adapter import (
    LAYOUTS,
    MLP_KEYS,
    QFORMER_KEYS,
    from_standard,
    read_ip_adapter,
    silent_qformer,
    to_sections,
    to_standard,
    write_ip_adapter,
)
from lit_rl.errors import ConfigError
from lit_rl.policies.ip_adapter import MLPProjection, QFormerProjection

FEATURES, TOKENS, WIDTH = 3, 2, 8


def weights(*, qformer: bool) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    found = {
        "image_proj": dict(MLPProjection(FEATURES, tokens=TOKENS, width=WIDTH).state_dict()),
        "ip_adapter": {f"{i}.to_{letter}_ip.weight": torch.randn(4, WIDTH) for i in range(12) for letter in "kv"},
    }
    if qformer:
        found["image_proj_qformer"] = dict(QFormerProjection(FEATURES, tokens=TOKENS, width=WIDTH, key_tokens=5).state_dict())
    return found


def assert_same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for section in one:
        assert one[section].keys() == other[section].keys()
        assert all(torch.equal(tensor, other[section][key]) for key, tensor in one[section].items())


@pytest.mark.parametrize(
    ("format", "qformer", "keys"),
    [
        ("standard", False, {"image_proj", "ip_adapter"}),
        ("standard", True, {"image_proj", "ip_adapter", "image_proj_qformer"}),
        ("legacy", False, {"image_proj_mlp", "attn_adapter"}),
        ("released", True, {"image_proj_mlp", "image_proj_qformer", "attn_adapter"}),
    ],
)
def test_every_format_comes_back_as_it_went(format: Any, qformer: bool, keys: set[str], tmp_path: Path) -> None:
    file, held = tmp_path / "new" / "ip-adapter.bin", weights(qformer=qformer)
    write_ip_adapter(file, held, format=format)
    assert torch.load(file, weights_only=True).keys() == keys
    assert_same(read_ip_adapter(file), held)
    assert os.listdir(file.parent) == [file.name]


def test_the_keys_are_those_of_the_modules() -> None:
    held = weights(qformer=True)
    assert held["image_proj"].keys() == MLP_KEYS
    assert held["image_proj_qformer"].keys() == QFORMER_KEYS


@pytest.mark.golden
def test_the_published_classes_fill_a_released_file(golden_dir: Path) -> None:
    data = load(golden_dir / "calligrapher", "tiny_calligrapher")
    published = to_sections({k.removeprefix("w/"): v for k, v in data.items() if k.startswith("w/") and not k.startswith("w/transformer.")})
    assert published.keys() == set(LAYOUTS["released"].values())
    standard = to_standard(published)
    assert_same(from_standard(standard, format="released"), published)
    assert_same(standard, {section: published[name] for section, name in LAYOUTS["released"].items()})


def test_a_released_file_without_qformer_gets_one_that_says_nothing() -> None:
    held = weights(qformer=False)
    released = from_standard(held, format="released")
    assert set(released) == set(LAYOUTS["released"].values())
    published = QFormerProjection(FEATURES, tokens=TOKENS, width=WIDTH)
    published.load_state_dict(released["image_proj_qformer"])
    assert torch.equal(published(torch.randn(4, FEATURES)), torch.zeros(4, TOKENS, WIDTH))
    assert_same(to_standard(released), held | {"image_proj_qformer": silent_qformer(held["image_proj"])})


def test_a_legacy_file_would_lose_the_qformer() -> None:
    with pytest.raises(ConfigError, match="no place for the Q-Former .* set it to released or standard"):
        from_standard(weights(qformer=True), format="legacy")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"image_proj", "attn_adapter"},
            "no IP-Adapter; a standard file holds image_proj, ip_adapter: missing: ip_adapter; unknown: attn_adapter",
        ),
        ({"image_proj_mlp", "image_proj_qformer"}, "a released file holds .*: missing: attn_adapter$"),
        ({"image_proj_mlp", "attn_adapter", "step"}, "a legacy file holds .*: unknown: step$"),
        ({"state_dict"}, "unknown: state_dict"),
    ],
)
def test_mixed_sections_are_listed(keys: set[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_standard({key: {} for key in sorted(keys)})


def test_wrong_keys_inside_are_listed_with_their_section() -> None:
    held = weights(qformer=True)
    broken: dict[str, Any] = copy.deepcopy(held)
    del broken["ip_adapter"]["3.to_v_ip.weight"]
    broken["ip_adapter"]["0.to_q_ip.weight"] = torch.zeros(1)
    broken["image_proj_qformer"]["latents"] = broken["image_proj_qformer"].pop("query_embeds")
    with pytest.raises(ConfigError) as caught:
        to_standard(broken)
    assert "missing: image_proj_qformer.query_embeds, ip_adapter.3.to_v_ip.weight;" in str(caught.value)
    assert str(caught.value).endswith("unknown: image_proj_qformer.latents, ip_adapter.0.to_q_ip.weight")


def test_a_file_without_attentions_is_not_whole() -> None:
    with pytest.raises(ConfigError, match="missing: ip_adapter.0.to_k_ip.weight, ip_adapter.0.to_v_ip.weight"):
        to_standard(weights(qformer=False) | {"ip_adapter": {}})


def test_sections_must_hold_tensors() -> None:
    with pytest.raises(ConfigError, match="ip_adapter must be a dict of tensors"):
        to_standard(weights(qformer=False) | {"ip_adapter": {"0.to_k_ip.weight": 1.0}})
    with pytest.raises(ConfigError, match="format: 'diffusers' is none of standard, legacy, released"):
        from_standard(weights(qformer=False), format="diffusers")  # type: ignore[arg-type]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    file, sprung = tmp_path / "trap.bin", tmp_path / "sprung"
    torch.save({"image_proj": Trap(sprung), "ip_adapter": {}}, file)
    with pytest.raises(ConfigError, match="not a file of tensors"):
        read_ip_adapter(file)
    assert not sprung.exists()


def test_files_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_ip_adapter(tmp_path / "absent.bin")
    (tmp_path / "text.bin").write_text("hello")
    write_ip_adapter(tmp_path / "whole.bin", weights(qformer=False))
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:-100])
    (tmp_path / "empty.bin").touch()
    for name in ("text.bin", "cut.bin", "empty.bin"):
        with pytest.raises(ConfigError, match=f"{name}' is not a file of tensors, or not a whole one"):
            read_ip_adapter(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    with pytest.raises(ConfigError, match="holds a list, not a dict"):
        read_ip_adapter(tmp_path / "list.bin")


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file, held = tmp_path / "ip-adapter.bin", weights(qformer=True)
    write_ip_adapter(file, held)
    with pytest.raises(ConfigError):
        write_ip_adapter(file, held, format="legacy")
    with pytest.raises(ConfigError, match="not a whole IP-Adapter"):
        write_ip_adapter(file, held | {"image_proj": {}})
    assert_same(read_ip_adapter(file), held)


def test_the_command_converts(tmp_path: Path) -> None:
    held = weights(qformer=False)
    write_ip_adapter(tmp_path / "ip-adapter.bin", held)
    command = [sys.executable, "-m", "lit_rl.checkpoints.ip_adapter", "ip-adapter.bin", "old.bin", "--format", "legacy"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert torch.load(tmp_path / "old.bin", weights_only=True).keys() == {"image_proj_mlp", "attn_adapter"}
    assert_same(read_ip_adapter(tmp_path / "old.bin"), held)


def test_the_command_says_in_one_sentence_what_is_wrong(tmp_path: Path) -> None:
    torch.save({"image_proj": {}, "attn_adapter": {}}, tmp_path / "mixed.bin")
    command = [sys.executable, "-m", "lit_rl.checkpoints.ip_adapter", str(tmp_path / "mixed.bin"), str(tmp_path / "out.bin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not (tmp_path / "out.bin").exists()
    assert (
        done.stderr.strip().startswith("error: IP-Adapter: ") and "Traceback" not in done.stderr and "unknown: attn_adapter" in done.stderr
    )
