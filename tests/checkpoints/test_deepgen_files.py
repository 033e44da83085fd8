"""DeepGen's checkpoints: names in both directions, and every kind of file and folder that its users have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rl.checkpoints.deepgen import check_checkpoint, new_name, old_name, read_deepgen, split_parts
from lit_rl.errors import ConfigError

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent.parent / "golden")) / "deepgen"
NAMES = json.loads((GOLDEN / "checkpoint.json").read_text())


@pytest.mark.golden
@pytest.mark.parametrize("case", NAMES["remap"], ids=lambda case: case["inputs"])
def test_names_are_those_that_the_authors_loader_makes(case: dict[str, str]) -> None:
    assert old_name(case["inputs"]) == case["outputs"]
    assert old_name(new_name(case["outputs"])) == case["outputs"]


def test_new_names_are_those_of_the_class_of_today() -> None:
    assert new_name("lmm.model.layers.0.mlp.up_proj.weight") == "lmm.model.language_model.layers.0.mlp.up_proj.weight"
    assert new_name("lmm.visual.merger.ln_q.weight") == "lmm.model.visual.merger.ln_q.weight"
    same = ["lmm.lm_head.weight", "lmm.model.language_model.norm.weight", "transformer.proj_out.bias", "meta_queries"]
    assert [new_name(name) for name in same] == same


@pytest.mark.golden
@pytest.mark.parametrize("file", ["checkpoint-7", "checkpoint-7/model.safetensors", "converted.pth"])
def test_what_rl_writes_and_what_becomes_of_it_hold_the_same(file: str) -> None:
    found, stored = read_deepgen(GOLDEN / file), load_file(GOLDEN / "checkpoint-7" / "model.safetensors")
    assert sorted(found) == NAMES["convert"]["keys"]
    assert all(found[name].dtype == stored[name].dtype and torch.equal(found[name], stored[name]) for name in stored)


def state() -> dict[str, Tensor]:
    names = ["transformer.a.weight", "connector.layers.0.b.bias", "meta_queries", "lmm.model.language_model.layers.0.c.weight"]
    return {name: torch.arange(4.0) + i for i, name in enumerate(names)}


def flat(path: Path) -> Path:
    torch.save(state(), path / "flat.pth")
    return path / "flat.pth"


def nested(path: Path) -> Path:
    torch.save({"state_dict": {f"module.model.{name}": tensor for name, tensor in state().items()}, "epoch": 3}, path / "nested.pth")
    return path / "nested.pth"


def of_old_torch(path: Path) -> Path:
    torch.save(state(), path / "old.pth", _use_new_zipfile_serialization=False)
    return path / "old.pth"


def sharded(path: Path) -> Path:
    for i, (name, tensor) in enumerate(state().items(), 1):
        save_file({name: tensor}, path / f"model-{i:05}-of-00004.safetensors")
    return path


def deepspeed(path: Path) -> Path:
    """As DeepSpeed's ZeRO-2 writes it on two processes: half of the weights of every one in bfloat16 and, flat, in float32."""
    whole = torch.cat([*state().values()])
    shapes = {name: tensor.shape for name, tensor in state().items()}
    model = {"module": {n: t.bfloat16() for n, t in state().items()}, "buffer_names": [], "param_shapes": [shapes], "shared_params": {}}
    folder = path / "iter_9.pth"
    folder.mkdir()
    torch.save(model | {"ds_version": "0.15.4"}, folder / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(whole.chunk(2)):
        groups = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [part + 0.25]}
        torch.save({"optimizer_state_dict": groups}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def deepspeed_above(path: Path) -> Path:
    deepspeed(path)
    (path / "latest").write_text("iter_9.pth")
    return path


@pytest.mark.parametrize("kind", [flat, nested, of_old_torch, sharded, deepspeed, deepspeed_above])
def test_every_kind_of_file_is_read(kind: object, tmp_path: Path) -> None:
    place = kind(tmp_path)  # type: ignore[operator]
    found, more = read_deepgen(check_checkpoint(place)), 0.25 * ("deepspeed" in kind.__name__)  # type: ignore[attr-defined]
    wanted = {old_name(name): tensor + more for name, tensor in state().items()}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    parts = split_parts(found)
    assert list(parts.transformer) == ["a.weight"] and list(parts.language) == ["layers.0.c.weight"]
    assert sorted(parts.bridge) == ["connector.layers.0.b.bias", "meta_queries"]


def test_what_has_no_place_is_told_apart_from_what_no_prompt_meets() -> None:
    more = [
        "lmm.lm_head.lora_A.default.weight",
        "vae.decoder.conv_in.weight",
        "lmm.model.visual.blocks.0.norm1.weight",
        "reward_head.weight",
    ]
    parts = split_parts(dict.fromkeys(more, torch.zeros(1)))
    assert parts.unknown == ["reward_head.weight"] and len(parts.aside) == 3


def test_files_that_would_be_executed_hold_something_else_or_lack_a_shard_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"meta_queries": torch.zeros(1)}, "made_by": Path}, tmp_path / "code.pth")
    torch.save({"meta_queries": [1.0]}, tmp_path / "list.pth")
    for file, message in {"code.pth": "names .*Path, which would be executed", "list.pth": "not a file of tensors by name"}.items():
        with pytest.raises(ConfigError, match=message):
            read_deepgen(tmp_path / file)
    (sharded(tmp_path) / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(ConfigError, match="checkpoint: .* lacks shard 3 of 4: its weights would be lost"):
        read_deepgen(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="found nothing"):
        check_checkpoint(tmp_path / "empty")
