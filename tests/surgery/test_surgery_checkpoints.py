"""Checkpoints as inputs of merges, chosen by what their runs had logged, and the command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import toy_text
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_text import Digits, model_folder, policy

from callbacks.export import Export
from callbacks.reward_scoring import RewardScoring
from lit_rl.errors import ConfigError
from lit_rl.merge import main
from lit_rl.methods.sft import SFT
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.surgery.choosing import best, best_checkpoints, logged_metrics
from lit_rl.surgery.merging import merge

METRIC = "val/exact"


def trained(base: Path, folder: Path, iterations: int = 2, **settings: Any) -> Path:
    """Iterations of SFT with a checkpoint and an export of each, and an evaluation before either."""
    saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
    callbacks = [RewardScoring({"sorted": toy_text.Sorted()}), saver, Export(str(folder / "export"), at="iteration", keep=None)]
    run = toy_text.trainer(max_epochs=iterations, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=1)
    run.fit(SFT(policy(base, **settings), prompts_per_iteration=8), datamodule=Digits())
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(base, tmp_path_factory.mktemp("run"))


def state(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


def as_fsdp2(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint as FSDP2 writes it."""
    import torch.distributed.checkpoint as dcp

    found = torch.load(checkpoint, weights_only=True)
    dcp.save({"state_dict": found.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(found, folder / "meta.pt")
    return folder


def test_a_checkpoint_becomes_what_the_run_exported(base: Path, run: Path, tmp_path: Path) -> None:
    """As a file and as FSDP2's folder; two of them are averaged."""
    files = [run / f"epoch={epoch}.ckpt" for epoch in (0, 1)]
    exports = [state(run / "export" / f"iteration-{i}") for i in (1, 2)]
    folder = as_fsdp2(files[1], tmp_path / "shards.ckpt")
    for number, place in enumerate((files[1], folder)):
        found = state(merge([place], tmp_path / str(number), base=str(base)))
        assert all(torch.equal(found[name], exports[1][name]) for name in found)
    found = state(merge([files[0], folder], tmp_path / "mean", base=str(base)))
    assert all(torch.allclose(found[name], (exports[0][name] + exports[1][name]) / 2, atol=1e-6) for name in found)
    assert not all(torch.equal(exports[0][name], exports[1][name]) for name in found)
    with pytest.raises(ConfigError, match="has no configuration and no tokenizer: give base"):
        merge([files[0]], tmp_path / "out")


def test_the_adapter_of_a_checkpoint_keeps_its_strength(base: Path, tmp_path: Path) -> None:
    run = trained(base, tmp_path / "run", 1, lora=LoraSettings(rank=2, alpha=6.0, init="default"), keep_reference=True)
    bare = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(2, 10)[None]
    expected = peft.PeftModel.from_pretrained(bare, run / "export" / "iteration-1").eval()(input_ids=tokens).logits
    out = merge([run / "epoch=0.ckpt"], tmp_path / "adapter", base=str(base))
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), out).eval()
    torch.testing.assert_close(again(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    whole = merge([run / "epoch=0.ckpt"], tmp_path / "whole", method="lora", base=str(base))
    found = transformers.AutoModelForCausalLM.from_pretrained(whole).eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- choosing
def test_the_best_is_found_by_hand() -> None:
    results = {"a": {"x": 1.0, "y": 5.0}, "b": {"x": 3.0}, "c": {"x": float("nan"), "y": 2.0}, "d": {"x": 3.0}}
    assert best(results, "x") == ["b"] and best(results, "x", top=3) == ["b", "d", "a"]
    assert best(results, "x", mode="min") == ["a"] and best(results, "y", mode="min") == ["c"]
    for metric, top, said in (("xx", 1, "did you mean x?"), ("reward", 1, "there are x, y"), ("y", 3, "a value in 2 of 4")):
        with pytest.raises(ConfigError, match=said):
            best(results, metric, top=top)


def test_checkpoints_are_chosen_by_what_was_logged(run: Path) -> None:
    values = {file: logged_metrics(file) for file in run.glob("*.ckpt")}
    losses = {file: found["sft_loss"] for file, found in values.items()}
    assert len(losses) == 2 and all(METRIC in found for found in values.values())
    assert best_checkpoints([run], "sft_loss", mode="min") == dict([min(losses.items(), key=lambda item: item[1])])
    with pytest.raises(ConfigError, match=r"no checkpoint \(\*.ckpt\) is in"):
        best_checkpoints([run / "export"], METRIC)


def test_the_command_chooses_and_merges(base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The average of the two best, and one sentence where something is amiss."""
    main([str(run), "--best", "sft_loss", "--mode", "min", "--top", "2", "--base", str(base), "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(tmp_path / "out") and "sft_loss=" in told.out
    assert state(tmp_path / "out").keys() == state(run / "export" / "iteration-1").keys()
    main([str(tmp_path / "out"), str(base), "--method", "linear", "--weights", "3", "1", "--out", str(tmp_path / "mean")])
    shutil.rmtree(tmp_path / "out")
    for words, said in (
        ([str(base), str(base)], "--method"),
        ([str(base), "--method", "ties"], "give base"),
        ([str(run), "--best", "sft_los", "--base", str(base)], "metric 'sft_los' has a value in none of the 2 checkpoints: did you mean"),
        ([str(base), "--method", "linear", "--weights", "1", "2"], "1 inputs and 2 weights"),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--out", str(tmp_path / "new")])
        assert said in capsys.readouterr().err
