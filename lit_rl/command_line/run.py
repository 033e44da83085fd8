"""LightningCLI for this project: one-sentence errors, one seed, checkpoints that are checked before anything is loaded."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed import is_torchelastic_launched

from callbacks.base import is_trial
from callbacks.image_writer import ImageWriter
from callbacks.text_writer import TextWriter
from lit_rl.checkpoints.choosing import choose_checkpoint, go_on
from lit_rl.checkpoints.claims import claim, release
from lit_rl.checkpoints.files import AtomicCheckpointIO, check_unused
from lit_rl.checkpoints.version import check_file
from lit_rl.command_line.class_change import install, replaced_components
from lit_rl.command_line.dotted import imported_class
from lit_rl.command_line.environment import expand_home, fill_in, sources
from lit_rl.command_line.errors import explain
from lit_rl.command_line.failures import what_ended
from lit_rl.command_line.out_of_memory import out_of_memory
from lit_rl.command_line.renamed import CONFIG_VERSION, other_version
from lit_rl.command_line.saved_config import SavedConfig
from lit_rl.command_line.torchrun import end_with_parent
from lit_rl.command_line.usual import RunFolder, filled_in, set_float32_matmul
from lit_rl.command_line.yaml_files import broken_yaml, missing_file
from lit_rl.errors import LEFT_BY_ANOTHER, ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.net.environment import redacted
from lit_rl.ranks import lost_contact
from lit_rl.rewards.base import RewardError
from lit_rl.rollouts.base import RolloutError

# A notice of Lightning's own use of torch, and an advertisement, in every run.
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
# Frozen parts are in evaluation mode on purpose.
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
ADVERTISED = ("litlogger", "litmodels")
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: not any(word in r.getMessage() for word in ADVERTISED))
# The image processors without torchvision are those that are meant.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())

SECONDS_TO_BE_ENDED = 3.0
SECONDS_FOR_AGENT = 1.0  # in which torchrun's agent sees which process was the first to end


class Parser(LightningArgumentParser):
    parsed = False  # --print_config asks before; after it a further check of all would take as long as parsing did

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))  # --trainer.max_epoch would be taken for max_epochs

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """The sentence that says what is wrong, without pages of usage around it; of the processes of a node the first says it."""
        if is_torchelastic_launched() and os.environ["LOCAL_RANK"] != "0":
            time.sleep(SECONDS_TO_BE_ENDED)
        sys.stderr.write(f"error: {explain(message, sys.argv)}\n")
        raise SystemExit(2)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """The options with those of the environment, without secrets, and comments that say which come from there."""
        options = fill_in(namespace.clone())
        comments = "".join(f"# {line}\n" for line in sources(options))
        kwargs |= {"skip_validation": True} if self.parsed else {}
        return f"{redacted(super().dump(options, *args, **kwargs))}{comments}"


class CLI(LightningCLI):
    """`fit | validate | test | predict` over any `LitRL` method and any datamodule, named by dotted path in the YAML."""

    parser: Parser

    def __init__(self) -> None:
        install()
        end_with_parent()
        super().__init__(
            LitRL,
            L.LightningDataModule,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SavedConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"enable_model_summary": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one that is asked for, as the options of each take a tenth of a second; all where none is."""
        every = LightningCLI.subcommands()
        return {name: skipped for name, skipped in every.items() if name in sys.argv[1:2]} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--config_version", type=int, default=CONFIG_VERSION, help="Version of the keys of the run's YAML.")
        parser.add_class_arguments(RunFolder, "run")
        parser.add_lightning_class_args(ImageWriter, "images")
        parser.add_lightning_class_args(TextWriter, "texts")
        for target in ("model.init_args.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Lightning would replace the hyper-parameters of the YAML and the command line by the checkpoint's; a run means what it says."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if broken := missing_file(sys.argv) or broken_yaml(sys.argv) or other_version(sys.argv):
            self.parser.error(broken)
        super().parse_arguments(parser, args)
        try:
            fill_in(self.config[self.config.subcommand])
        except ConfigError as error:
            self.parser.error(str(error))
        expand_home(self.config)
        self.parser.parsed = True

    def instantiate_classes(self) -> None:
        """From the options with the run's folder and usual callbacks in them; `config.yaml` holds them as they were asked for."""
        self.given = self.config
        model = self.given[self.subcommand].model
        for sentence in replaced_components(imported_class(model.class_path) or LitRL, model.init_args):
            rank_zero_warn(sentence)
        try:
            self.config = Namespace({**vars(self.given), self.subcommand: filled_in(self.given[self.subcommand])})
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            self.parser.error(str(error))

    def after_fit(self) -> None:
        """Leave the mark by which the job service tells a run that is over from one that was ended: an exit code of 0 may be either."""
        if self.trainer.is_global_zero and (mark := os.environ.get("PLATFORM_DONE_FILE")):
            Path(mark).write_text("{}")

    def instantiate_trainer(self, **kwargs: object) -> L.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # how Lightning refuses `devices: many`
            raise ConfigError(str(error)) from error
        except RuntimeError as error:
            twin = re.match(r"Found more than one stateful callback of type `(\w+)`", str(error))
            if twin is None:
                raise
            raise ConfigError(
                f"trainer.callbacks has two {twin[1]} whose states would be one in a checkpoint: leave one out, or let them differ in what "
                "they watch (of ModelCheckpoint monitor, mode, every_n_train_steps, every_n_epochs, train_time_interval)"
            ) from error
        if is_trial(trainer):  # Lightning's own would still write last.ckpt at the end
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
        AtomicCheckpointIO.install(trainer)
        set_float32_matmul(self.given[self.subcommand].run.float32_matmul, trainer.strategy.root_device)
        return trainer

    def _instantiate_trainer(self, config: dict[str, object], callbacks: list[L.Callback]) -> L.Trainer:
        self.config = self.given
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, object]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # the writers have them
        folders = self._checkpoint_folders()
        try:
            if subcommand == "fit" and self.trainer.is_global_zero and not is_trial(self.trainer):
                claim(folders)
            if subcommand == "fit" and not kwargs.get("ckpt_path"):
                check_unused(folders)
            elif not kwargs.get("ckpt_path"):
                doing = {"predict": "what follows is made by", "validate": "what follows scores", "test": "what follows scores"}
                rank_zero_warn(f"without --ckpt_path {doing[subcommand]} the model as `pretrained` has it, not as this run trained it")
            elif kwargs.get("ckpt_path"):
                keepers = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
                found = choose_checkpoint(kwargs["ckpt_path"], keepers, self.trainer.default_root_dir)
                if found is None and subcommand != "fit":
                    raise ConfigError(f"--ckpt_path last: there is no checkpoint yet in {', '.join(map(str, folders))}; run fit first")
                if found is not None and Path(found).exists():
                    check_file(Path(found), self.trainer.world_size if subcommand == "fit" else None)
                kwargs["ckpt_path"] = found
        except ConfigError as error:
            self.parser.error(str(error))
        return kwargs

    def _checkpoint_folders(self) -> list[str]:
        return [str(folder) for c in self.trainer.checkpoint_callbacks if (folder := getattr(c, "dirpath", None))]

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with patch.object(_ChildProcessObserver, "_terminate_all", self._child_ended(subcommand)):
                super()._run_subcommand(subcommand)
        except (ConfigError, MisconfigurationException) as error:
            self._stop(explain(str(error), sys.argv), code=2)
        except (RewardError, RolloutError) as error:
            self._stop(f"{error}{self._go_on(subcommand)}", code=1)
        except BaseException as error:
            sentence = None if isinstance(error, KeyboardInterrupt | SystemExit) else what_ended(error) or self._memory(error)
            if sentence is None:
                if note := self._go_on(subcommand).removeprefix("; "):
                    error.add_note(note)
                raise
            self._stop(f"{sentence}{self._go_on(subcommand)}", code=LEFT_BY_ANOTHER if lost_contact(error) else 1)
        finally:
            release()

    def _memory(self, error: BaseException) -> str | None:
        trainer = getattr(self, "trainer", None)
        return out_of_memory(error, getattr(self, "model", None), getattr(trainer, "accumulate_grad_batches", 1))

    def _go_on(self, subcommand: str) -> str:
        folders = self._checkpoint_folders()
        return f"; {go_on(folders)}" if subcommand == "fit" and folders else ""

    def _child_ended(self, subcommand: str) -> Callable[[_ChildProcessObserver], None]:
        """Lightning ends all processes in silence, this one too, seconds after one of those that it started has failed."""
        end = _ChildProcessObserver._terminate_all

        def say_and_end(observer: _ChildProcessObserver) -> None:
            codes = {rank: process.returncode for rank, process in enumerate(observer._child_processes, start=1) if process.returncode}
            ended = ", ".join(f"{rank} with {code if code > 0 else signal.Signals(-code).name}" for rank, code in codes.items())
            sys.stderr.write(f"error: a process of this run has ended (process {ended}), so all do{self._go_on(subcommand)}\n")
            sys.stderr.flush()
            end(observer)

        return say_and_end

    def _stop(self, message: str, *, code: int) -> None:
        """End this process with a sentence. The first ends those it started; the others wait for that, as the cause is mostly one."""
        if code == LEFT_BY_ANOTHER and is_torchelastic_launched():
            time.sleep(SECONDS_FOR_AGENT)
        elif self.trainer.global_rank:
            time.sleep(SECONDS_TO_BE_ENDED)
        elif launcher := self.trainer.strategy.launcher:
            launcher.kill(signal.SIGKILL)
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(code)
