"""The converter of DeepGen's guide: the authors' own result, every kind of checkpoint, and what its users load it with."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from deepgen import build, deepgen_policy
from safetensors.torch import save_file
from torch import Tensor

from lit_rl.checkpoints.deepgen_tensors import rl_tensors
from lit_rl.checkpoints.rl_to_sft import main
from lit_rl.errors import ConfigError
from lit_rl.policies.deepgen import DeepGenPolicy

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent.parent / "golden")) / "deepgen"
CONVERT = json.loads((GOLDEN / "checkpoint.json").read_text())["convert"]


def guess_load_checkpoint(path: Path) -> dict[str, Tensor]:
    """The part of xtuner's function that files go through."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    found: dict[str, Tensor] = state.get("state_dict", state)
    return found


def convert(source: Path, output: Path, *options: object) -> dict[str, Tensor]:
    main(["--rl_checkpoint", str(source), "--output", str(output), "-q", *map(str, options)])
    return guess_load_checkpoint(output.with_suffix(".pth"))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["checkpoint-7", CONVERT["input"]])
def test_the_result_is_the_authors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys, precisions and values; `.pth` is added, the folder is made, `-q` prints nothing."""
    theirs = guess_load_checkpoint(GOLDEN / CONVERT["output"])
    ours = convert(GOLDEN / name, tmp_path / "new" / "out")
    assert isinstance(ours, OrderedDict) and list(ours) == list(theirs) == CONVERT["keys"]
    assert [str(tensor.dtype) for tensor in ours.values()] == CONVERT["dtypes"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert capsys.readouterr().out == ""
    main(["-i", str(GOLDEN / name), "-o", str(tmp_path / "again.pth")])
    assert re.search(r"again.pth: 1 of connector, .*\nit has no adapter of the language model", capsys.readouterr().out)


# ---------------------------------------------------------------------- kinds of checkpoints
def state() -> dict[str, Tensor]:
    return {f"transformer.{i}.weight": torch.full((4, 4), float(i), dtype=torch.bfloat16) for i in range(3)} | {
        "meta_queries": torch.ones(2, 4)
    }


def shards(folder: Path, count: int = 4) -> Path:
    for i, (name, tensor) in enumerate(list(state().items())[:count], 1):
        save_file({name: tensor}, folder / f"model-{i:05}-of-00004.safetensors")
    return folder


def flat(folder: Path) -> Path:
    torch.save({"state_dict": state()}, folder / "flat.pth")
    return folder / "flat.pth"


def fsdp2(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    ours = {name.replace("transformer.", "policy.network."): tensor for name, tensor in state().items()}
    ours["policy.conditioner.bridge.queries.weight"] = ours.pop("meta_queries")
    dcp.save({"state_dict": ours}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("made", [shards, flat, fsdp2])
def test_every_kind_of_checkpoint_is_read_whole(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = convert(made(tmp_path), tmp_path / "out.pth")
    assert found.keys() == state().keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state().items())


def bad_index(folder: Path) -> Path:
    names = {name: f"part-{i}.safetensors" for i, name in enumerate(state())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file(state(), folder / "part-0.safetensors")
    return folder


def beside_each_other(folder: Path) -> Path:
    for name in ("adapter", "weights"):
        save_file(state(), folder / f"{name}.safetensors")
    return folder


def twice(folder: Path) -> Path:
    for i in (1, 2):
        save_file(state(), folder / f"model-0000{i}-of-00002.safetensors")
    return folder


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "it.ckpt")
    return folder / "it.ckpt"


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda folder: shards(folder, 3), "lacks shard 4 of 4: its weights would be lost"),
        (bad_index, r"lacks part-1.safetensors, part-2.*, which model.safetensors.index.json names"),
        (beside_each_other, "which are not shards of one model: name the file"),
        (twice, "which an earlier shard holds too"),
        (lambda folder: folder, r"has neither \*.safetensors nor FSDP2's .metadata nor DeepSpeed's"),
        (lambda folder: folder / "gone", "no such checkpoint"),
        (lambda folder: saved(folder, {**state(), "epoch": 3}), "epoch would be lost"),
        (lambda folder: saved(folder, {"a": torch.tensor([float("nan")])}), "holds NaN in a: training had failed"),
        (lambda folder: saved(folder, {"policy.network.a.lora_A.default.weight": torch.ones(1)}), "convert an export of the run"),
        (lambda folder: saved(folder, {"policy.critic.weight": torch.ones(1)}), "has no place for: it would be lost"),
        (lambda folder: saved(folder, [1]), "holds a list, not tensors by name"),
        (lambda folder: saved(folder, {"a": Path("x")}), "names .*Path, which would be executed .*: use another checkpoint$"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(made, told: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=told):
        rl_tensors(made(tmp_path))


def test_what_is_read_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = flat(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["-i", str(source), "-o", str(source)])
    assert stop.value.code == 2 and "is what is read: name another file" in capsys.readouterr().err
    assert guess_load_checkpoint(source).keys() == state().keys()


def test_tensors_stay_on_the_disk(tmp_path: Path) -> None:
    """The memory of each tensor is a part of its file that the system maps there, not a copy: a model of any size fits."""
    save_file({f"{i}": torch.zeros(1 << 16) for i in range(4)}, tmp_path / "model-00001-of-00001.safetensors")
    torch.save({"state_dict": {f"{i}": torch.zeros(1 << 16) for i in range(4)}}, tmp_path / "it.ckpt")
    for source in (tmp_path, tmp_path / "it.ckpt"):
        held = rl_tensors(source)
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        mapped = [[int(end, 16) for end in line[0].split("-")] for line in lines]
        assert len(held) == 4
        for tensor in held.values():
            first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            assert any(begin <= first and last <= end for begin, end in mapped)


# ---------------------------------------------------------------------- over the file from before RL
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeepGenPolicy]:
    """A miniature with transformer and bridge changed, and its checkpoint as a run writes it."""
    folder = build(tmp_path_factory.mktemp("deepgen"))
    policy = deepgen_policy(folder, train=["transformer", "bridge"], keep_reference=True)
    policy.load()
    with torch.no_grad():
        for _, weight in policy.trainable():
            weight += 0.05
    kept = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items() if name in policy.checkpoint_keys()}
    assert any("frozen" in name or "reference" in name for name in kept), "references are in the file and not in the result"
    torch.save({"state_dict": kept, "epoch": 1}, folder / "last.ckpt")
    return folder, policy


@torch.no_grad()
def velocity(policy: DeepGenPolicy) -> Tensor:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(2))
    return policy.velocity(x, torch.tensor([0.9, 0.4]), policy.encode(["a shop", "another"]))


def test_over_the_file_from_before_rl_it_stands_alone(trained: tuple[Path, DeepGenPolicy], tmp_path: Path) -> None:
    """The guide's own way, and --base: both hold the trained weights, and what RL has not saved is the old file's."""
    folder, policy = trained
    before, alone = guess_load_checkpoint(folder / "checkpoint.pth"), convert(folder / "last.ckpt", tmp_path / "rl")
    whole = convert(folder / "last.ckpt", tmp_path / "whole", "--base", folder / "checkpoint.pth")
    assert whole.keys() == before.keys() | alone.keys() and list(whole)[: len(before)] == list(before)
    assert any("lora_A" in name for name in whole) and not any("lmm." in name for name in alone)
    for name, tensor in whole.items():
        assert torch.equal(tensor, alone.get(name, before.get(name, tensor))), name
    assert torch.equal(whole["meta_queries"], policy.conditioner.bridge.queries.weight)

    read = deepgen_policy(folder, checkpoint=str(tmp_path / "whole.pth"))
    read.load()
    torch.testing.assert_close(velocity(read), velocity(policy))


def test_a_folder_for_diffusers_and_for_predict(trained: tuple[Path, DeepGenPolicy], tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    folder, policy = trained
    convert(
        folder / "last.ckpt", tmp_path / "o", "--base", folder / "checkpoint.pth", "--folder", tmp_path / "whole", "--sd3", folder / "sd3"
    )
    stock = SD3Transformer2DModel.from_pretrained(tmp_path / "whole", subfolder="transformer").state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in policy.network.state_dict().items() if name in stock)
    assert AutoencoderKL.load_config(tmp_path / "whole", subfolder="vae")
    read = deepgen_policy(folder, pretrained=str(tmp_path / "whole"), checkpoint=str(tmp_path / "whole"))
    read.load()
    torch.testing.assert_close(velocity(read), velocity(policy))


def test_another_models_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module.meta_queries": torch.ones(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        main(["-i", str(flat(tmp_path)), "-o", str(tmp_path / "out"), "--base", str(tmp_path / "other.pth")])
    assert re.search(
        r"--base .*: module.meta_queries is \[3, 3\] there and \[2, 4\] after RL: it is of another model", capsys.readouterr().err
    )
