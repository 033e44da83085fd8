"""A checkpoint that is whole and harmless may still lack what a run needs: an error says so before anything is restored from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_rl.checkpoints.contents import check_contents, check_kinds, with_nan
from lit_rl.checkpoints.manifest import entries, write_manifest
from lit_rl.checkpoints.weights import read_tensors
from lit_rl.errors import ConfigError

NAN = torch.tensor([1.0, float("nan")])


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ([1, 2], "it holds a list"),
        (torch.ones(3), "it holds a Tensor"),
        ({}, "not a dict with state_dict"),
        ({"model": {"w": torch.ones(3)}}, "the keys model, not"),
        ({"state_dict": [1]}, "not a dict with state_dict"),
        ({"state_dict": {"w": "x"}}, "w of its state_dict must be tensors"),
        ({"state_dict": {"a": torch.ones(2), "w": NAN}}, r"holds NaN in state_dict\.w"),
        (
            {"state_dict": {}, "optimizer_states": [{"state": {0: {"exp_avg": NAN.bfloat16()}}}]},
            r"NaN in optimizer_states\.0\.state\.0\.exp_avg",
        ),
    ],
)
def test_what_no_run_has_written(found: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint last\.ckpt .*{complaint}"):
        check_contents(found, "last.ckpt")


def test_what_a_run_has_written() -> None:
    """Masks have infinities; a checkpoint of weights alone has no optimizer."""
    found = {"state_dict": {"mask": torch.tensor([0.0, -torch.inf]), "count": torch.tensor(3), "empty": torch.zeros(0)}}
    assert check_contents(found, "a") is found and with_nan(found["state_dict"].items()) == []


def test_rounded_weights() -> None:
    stored, wanted = {"a": torch.ones(2, dtype=torch.long), "more": torch.ones(1)}, {"a": torch.ones(2), "n": torch.tensor(1)}
    with pytest.raises(ConfigError, match=r"a is torch\.int64 there, torch\.float32 here"):
        check_kinds(stored, wanted)
    check_kinds({"a": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(1)}, wanted)


# ---------------------------------------------------------------------- files of adapters
def header(length: int, text: bytes = b"", data: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text + data


LIES = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 8]}}).encode()
OVERLAP = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}).encode()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0", os.urandom(200), header(1 << 62), header(1 << 20, b"{}"), header(2, b"{}"), header(3, b"abc"),
        header(len(LIES), LIES, bytes(8)), header(len(OVERLAP), OVERLAP, bytes(8)), b"cos\nmkdir\n(V/nowhere\ntR.", b"PK\3\4" + bytes(100),
    ],
)  # fmt: skip
def test_damaged_and_hostile_files_of_adapters(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"adapter_model.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^lora\.initial: 'x' is not a file of tensors"):
        read_tensors(file, what="lora.initial: 'x'")


@pytest.mark.parametrize("value", [[1], {"a": 1}, {"a": [torch.ones(1)]}, torch.ones(2), {}])
def test_files_of_other_things(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="x is not a file of tensors by name"):
        read_tensors(tmp_path / "a.bin", what="x")


def test_exported_folders_carry_checksums(tmp_path: Path) -> None:
    """A file of tensors has none of its own: a flipped bit is another weight."""
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(50)}, file)
    assert torch.equal(read_tensors(file, what="x")["w"], torch.ones(50))
    write_manifest(tmp_path, [entries(tmp_path, 0, 1)])
    assert torch.equal(read_tensors(file, what="x")["w"], torch.ones(50))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="x is damaged"):
        read_tensors(file, what="x")
    (tmp_path / "manifest.json").unlink()
    save_file({"w": torch.ones(50), "v": NAN}, file)
    with pytest.raises(ConfigError, match="x holds NaN in v"):
        read_tensors(file, what="x")
