"""Lightning's private names that this project uses: all of them are here, and each is still what the code takes it for."""

from __future__ import annotations

import inspect
import re

import lightning as L
import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities import load
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from benchmarks.house import private_names, sources
from lit_rl.strategies.fsdp2 import META

READ = {"_batches_that_stepped", "_callback_metrics", "_child_processes", "_ChildProcessObserver", "_data_fetcher"} | {
    "_first_loop_iter", "_last_global_step_saved", "_logger_connector", "_restart_stage", "_results", "_should_check_val_fx",
    "_terminate_all",
}  # fmt: skip
"""Names of Lightning's objects."""
INHERITED = {"_data_parallel_size", "_init_config_if_needed", "_instantiate_trainer", "_parse_ckpt_path", "_prepare_subcommand_kwargs"} | {
    "_run_subcommand", "_set_seed", "_setup_distributed", "_tensor_parallel_size",
}  # fmt: skip
"""Names of Lightning's classes that ours override or set."""


def test_no_other_private_name_of_lightning_is_read() -> None:
    assert private_names(sources()) == READ


def test_no_other_private_name_of_lightning_is_inherited() -> None:
    from callbacks.reward_scoring import RewardScoring
    from datamodules.base import PromptDataModule
    from lit_rl.command_line.run import CLI
    from lit_rl.doctor.runs import Inspector
    from lit_rl.modules.base import LitRL
    from lit_rl.strategies.fsdp2 import FSDP2Strategy
    from lit_rl.strategies.zero import ZeroStrategy

    found = set()
    for cls in (CLI, Inspector, LitRL, FSDP2Strategy, ZeroStrategy, PromptDataModule, RewardScoring):
        bases = [base for base in cls.__mro__ if base.__module__.startswith("lightning")]
        theirs = {n for base in bases for n in re.findall(r"(?:self\.|def )(_[a-z]\w*)", inspect.getsource(base))}
        found |= {name for name in re.findall(r"(?:self\.|def |super\(\)\.)(_[a-z]\w*)", inspect.getsource(cls)) if name in theirs}
    assert {name for name in found if not name.startswith("__")} == INHERITED


class Logging(BoringModel):
    """Logs a mean, and takes down what a callback could see of the run at its third minibatch."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> object:
        self.log("x", float(batch_idx), on_step=False, on_epoch=True)
        if batch_idx == 2:
            loop, connector = self.trainer.fit_loop.epoch_loop, self.trainer._logger_connector
            self.seen = loop._results["training_step.x"].value.clone(), connector._first_loop_iter
            self.due = [loop._should_check_val_fx(self.trainer.fit_loop._data_fetcher)]
        return super().training_step(batch, batch_idx)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> L.Trainer:
    """Three minibatches in two optimizer steps (the second is a rest), a validation and a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_train_batches=3, limit_val_batches=1, max_epochs=1, accumulate_grad_batches=2, callbacks=[ModelCheckpoint(folder)],
    )  # fmt: skip
    trainer.fit(Logging())
    return trainer


def test_loops_count_optimizer_steps_and_keep_sums(run: L.Trainer) -> None:
    loop, model = run.fit_loop.epoch_loop, run.lightning_module
    assert loop._batches_that_stepped == run.global_step == 2
    assert loop.val_loop._restart_stage == RestartStage.NONE
    assert isinstance(model, Logging) and model.seen[0] == 0.0 + 1.0 + 2.0  # the sum that a checkpoint inside of the epoch stores
    assert model.seen[1] is False and model.due == [True]


def test_metrics_of_callbacks_stay_with_the_connector(run: L.Trainer) -> None:
    assert run._logger_connector._callback_metrics["x"] == run.callback_metrics["x"] == 1.0


def test_a_checkpoint_callback_knows_the_step_of_its_last_file(run: L.Trainer) -> None:
    (keeper,) = [callback for callback in run.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    assert keeper._last_global_step_saved == 2


def test_the_observer_of_processes_ends_what_it_started() -> None:
    observer = _ChildProcessObserver(main_pid=1, child_processes=[])
    assert observer._child_processes == [] and callable(observer._terminate_all)
    assert "self._terminate_all()" in inspect.getsource(_ChildProcessObserver)


def test_strategies_size_their_mesh_after_processes_are_set_up() -> None:
    strategy = ModelParallelStrategy()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == ("auto", "auto")
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert source.index("self._setup_distributed()") < source.index("self._data_parallel_size")
    assert callable(DeepSpeedStrategy._init_config_if_needed)
    assert META == load._METADATA_FILENAME


def test_the_command_line_goes_through_the_methods_that_are_overridden() -> None:
    init = inspect.getsource(LightningCLI)
    for name in ("_parse_ckpt_path", "_set_seed"):
        assert f"self.{name}()" in init
    assert list(inspect.signature(LightningCLI._instantiate_trainer).parameters) == ["self", "config", "callbacks"]
    for name in ("_run_subcommand", "_prepare_subcommand_kwargs"):
        assert list(inspect.signature(getattr(LightningCLI, name)).parameters) == ["self", "subcommand"]
