"""Strategies are refused by name where a run would go wrong later, and folders of shards appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from toy import ToyData, toy_method, toy_trainer

from lit_rl.checkpoints.files import AtomicCheckpointIO
from lit_rl.checkpoints.layout import checkpoint_keys
from lit_rl.errors import ConfigError
from lit_rl.strategies.checks import check_strategy, check_swaps_reach
from lit_rl.strategies.folders import replaced
from lit_rl.strategies.fsdp2 import FSDP2Strategy
from lit_rl.strategies.zero import ZeroStrategy


class OneProcess(SingleDeviceStrategy):
    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))


class ModelParallelOnCPU(ModelParallelStrategy):
    """Without its process group, which would outlive the test."""

    def setup_environment(self) -> None:
        pass


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        *((supported, None) for supported in (OneProcess, DDPStrategy, FSDP2Strategy, ZeroStrategy)),
        (FSDPStrategy, "fsdp2.FSDP2Strategy"),
        (ModelParallelStrategy, "fsdp2.FSDP2Strategy"),
        (DeepSpeedStrategy, "zero.ZeroStrategy"),
    ],
)
def test_strategies_without_support_are_refused_with_the_one_to_use(strategy: Any, instead: str | None) -> None:
    try:
        check_strategy(strategy())
        said = None
    except ConfigError as error:
        said = str(error)
    assert (said is None) == (instead is None)
    assert instead is None or f"{strategy.__name__} is not supported here: use lit_rl.strategies.{instead}" in str(said)


def test_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    method = toy_method()
    trainer = toy_trainer(tmp_path, strategy=ModelParallelOnCPU())
    with pytest.raises(ConfigError, match="fsdp2.FSDP2Strategy"):
        trainer.fit(method, ToyData())
    assert not hasattr(method.policy, "network")


def test_deepspeed_json_of_ones_own_keeps_what_it_says() -> None:
    """Only what it leaves open is filled in."""
    built = ZeroStrategy(config={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7}})
    assert isinstance(built.config, dict)
    assert built.config["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert built.config["zero_force_ds_cpu_optimizer"] is False


ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
SIZES: dict[str, Any] = {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9, "sub_group_size": 1e9}
AUTO = dict.fromkeys(("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
DEEPGEN: dict[str, dict[str, Any]] = {
    "zero2": {
        **AUTO, "fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}, "optimizer": ADAMW, "steps_per_print": 100,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True}, "reduce_bucket_size": 2e8},
    },
    "zero3": {
        "fp16": {"enabled": False}, "bf16": {"enabled": True}, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1, "load_module_strict": False, "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", **SIZES,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
    "zero3_offload": {
        **AUTO, "optimizer": ADAMW,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True},
            **SIZES, "gather_16bit_weights_on_model_save": True,
        },
    },
}  # fmt: skip
"""JSONs in the form of DeepGen-RL's."""


@pytest.mark.parametrize("name", DEEPGEN)
def test_deepgens_json_fits_any_number_of_processes(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sizes of batches that fit 32 GPUs alone, "auto", and what the run decides are left out; DeepSpeed reads the rest."""
    from deepspeed.runtime.config import DeepSpeedConfig

    (tmp_path / "own.json").write_text(json.dumps(DEEPGEN[name]))
    with caplog.at_level("INFO"):
        built = ZeroStrategy(config=str(tmp_path / "own.json"))
    assert isinstance(built.config, dict) and "auto" not in json.dumps(built.config)
    assert not built.config.keys() & {*AUTO, "fp16", "bf16", "optimizer"}
    assert ("train_batch_size (the method's options)" in caplog.text) == (name == "zero3")
    asked = DEEPGEN[name]["zero_optimization"]
    read = DeepSpeedConfig({**built.config, "train_micro_batch_size_per_gpu": 4}).zero_config
    assert (read.stage, bool(read.overlap_comm)) == (asked["stage"], asked.get("overlap_comm", asked["stage"] == 3))
    assert read.gather_16bit_weights_on_model_save == (asked["stage"] == 3)
    assert (read.offload_param is not None) == (name == "zero3_offload")
    assert asked["stage"] == 2 or (read.param_persistence_threshold == 0 and read.max_live_parameters == 1e9)


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "is not JSON"), ("[1]", "holds no mapping"), (None, "cannot be read: No such file")],
    ids=["broken", "list", "gone"],
)
def test_a_json_that_cannot_be_read_is_told(text: str | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "own.json").write_text(text)
    with pytest.raises(ConfigError, match=f"trainer.strategy.init_args.config: .*own.json {told}"):
        ZeroStrategy(config=str(tmp_path / "own.json"))


def write(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "shard").write_text(text)


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    for text in ("first", "second"):
        with replaced(OneProcess(), target) as folder:
            assert folder != target
            write(folder, text)
        assert (target / "shard").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    write(target, "good")
    with pytest.raises(OSError, match="disk full"), replaced(OneProcess(), target) as folder:
        write(folder, "half")
        raise OSError("disk full")
    assert (target / "shard").read_text() == "good"
    with replaced(OneProcess(), target) as folder:  # what was left over is in nobody's way
        write(folder, "new")
    assert (target / "shard").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_text("a file")
    with replaced(OneProcess(), tmp_path / "last.ckpt") as folder:
        write(folder, "shards")
    assert (tmp_path / "last.ckpt" / "shard").read_text() == "shards"


def test_shards_are_no_checkpoint_for_one_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder of shards"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_checkpoint_of_a_full_fine_tune_holds_its_reference(tmp_path: Path) -> None:
    """It is what the warm-up left, which no pretrained folder has."""
    method = toy_method()
    toy_trainer(tmp_path, max_epochs=1).fit(method, ToyData())
    assert {"policy.network.0.0.weight", "policy.frozen.0.0.weight"} <= checkpoint_keys(method) == set(method.state_dict())


@pytest.mark.parametrize(("given", "said"), [({}, "it is not set"), ({"stage3_param_persistence_threshold": 7}, "it is 7")])
def test_swaps_need_small_weights_cut_under_stage_3(given: dict[str, int], said: str) -> None:
    """`ZeroStrategy` sees to it; DeepSpeed's own default, or a user's JSON, may not."""
    check_swaps_reach(ZeroStrategy(stage=3), who="EMA")
    check_swaps_reach(ZeroStrategy(stage=2), who="EMA")
    other = ZeroStrategy(stage=3)
    other.config["zero_optimization"] = {"stage": 3, **given}  # type: ignore[index]
    with pytest.raises(ConfigError, match=f"OldPolicySync under ZeRO-3 needs .*threshold: 0 .*{said}"):
        check_swaps_reach(other, who="OldPolicySync")
