"""Strategies are refused by name where a run would go wrong later, and folders of shards appear whole or not at all."""

from __future__ import annotations

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
