"""The folder of a run, and the callbacks that every run has: written into the options before anything is built from them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import lightning as L
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar

from callbacks.agent_logs import AgentLogs
from callbacks.best_model import BestModel
from callbacks.episode_records import EpisodeRecords
from callbacks.evaluation_sets import EvaluationSets
from callbacks.export import FOLDERS, Export
from callbacks.graceful_stop import GracefulStop
from callbacks.heartbeat import Heartbeat
from callbacks.platform_logger import PlatformLogger
from callbacks.rng_state import RngState
from callbacks.sample_gallery import SampleGallery
from callbacks.sample_texts import SampleTexts
from callbacks.throughput import Throughput
from callbacks.trackers import SwanLab, Trackio, WandB
from lit_rl.checkpoints.choosing import is_count
from lit_rl.command_line.dotted import imported, imported_class
from lit_rl.command_line.torchrun import as_started
from lit_rl.command_line.usual_classes import USUAL_CLASSES
from lit_rl.errors import ConfigError
from lit_rl.policies.by_device import has_tensor_cores

Options = dict[str, object]


@dataclass
class UsualCallbacks:
    """Callbacks that every run has. A mapping sets options of one, null leaves it out; one of its kind in trainer.callbacks replaces it.

    Args:
        progress: A bar, or lines in a log file: callbacks.progress.Progress.
        learning_rate: The learning rate of each optimizer step: callbacks.learning_rate.LearningRate.
        throughput: Where the time of an iteration goes: callbacks.throughput.Throughput.
        samples: Pictures or answers: callbacks.sample_gallery.SampleGallery or callbacks.sample_texts.SampleTexts.
        newest: The newest checkpoint, for --ckpt_path last: ModelCheckpoint. A ModelCheckpoint without monitor replaces it.
        graceful_stop: A checkpoint on SIGTERM and on a STOP file: callbacks.graceful_stop.GracefulStop.
        rng_state: Global random streams in checkpoints: callbacks.rng_state.RngState.
        heartbeat: An end within a minute when another process freezes or is lost: callbacks.heartbeat.Heartbeat.
    """

    progress: Options | None = field(default_factory=dict)
    learning_rate: Options | None = field(default_factory=dict)
    throughput: Options | None = field(default_factory=dict)
    samples: Options | None = field(default_factory=dict)
    newest: Options | None = field(default_factory=dict)
    graceful_stop: Options | None = field(default_factory=dict)
    rng_state: Options | None = field(default_factory=dict)
    heartbeat: Options | None = field(default_factory=dict)


@dataclass
class RunFolder:
    """The folder that a run writes into: logs, checkpoints, best, export, samples and predictions in one folder, `dir`/`name`.

    Args:
        dir: The folder of all runs. The launcher says by LIT_RL_FOLDER where a relative one starts, else it is in the working folder.
        name: The run's folder in it; trainer.default_root_dir, or "run", if left out.
        callbacks: Callbacks that every run has; {NAME: null} leaves one out.
        float32_matmul: How products of float32 matrices are computed: highest (float32), high (TF32 on a GPU) or medium (bfloat16), see
            `torch.set_float32_matmul_precision`. None = high on an NVIDIA GPU of compute capability 8.0 or later, else highest.
    """

    dir: str = "outputs"
    name: str | None = None
    callbacks: UsualCallbacks = field(default_factory=UsualCallbacks)
    float32_matmul: Literal["highest", "high", "medium"] | None = None


def set_float32_matmul(asked: str | None, device: torch.device) -> str:
    """Set how this process multiplies float32 matrices, by `run.float32_matmul` or by the device. Returns what was set."""
    chosen = asked or ("high" if has_tensor_cores(device) else "highest")
    torch.set_float32_matmul_precision(chosen)
    return chosen


class Usual(NamedTuple):
    """One of `UsualCallbacks`: the classes that take its place, and its options where the run sets none."""

    kind: type | tuple[type, ...]
    options: Mapping[str, object] = MappingProxyType({})
    before: bool = False
    """Its hooks run before those of trainer.callbacks."""


NEWEST: Options = {"every_n_epochs": 1, "save_on_train_epoch_end": True, "save_top_k": 1, "save_last": True}
USUAL = {
    "progress": Usual(ProgressBar, before=True),
    "learning_rate": Usual(LearningRateMonitor, before=True),
    "throughput": Usual(Throughput, before=True),
    "samples": Usual((SampleGallery, SampleTexts), before=True),
    "newest": Usual(ModelCheckpoint, NEWEST),
    "rng_state": Usual(RngState),
    "heartbeat": Usual(Heartbeat),
    "graceful_stop": Usual(GracefulStop),
}


def filled_in(options: Namespace) -> Namespace:
    """A copy of a subcommand's options with the usual callbacks in it, and with a folder wherever it leaves one open."""
    run, folder = options.clone(), run_folder(options)
    trainer = run.trainer
    as_started(trainer)
    trainer.default_root_dir = trainer.default_root_dir or str(folder)
    if trainer.logger in (None, True):
        logger = {"save_dir": str(folder), "name": "logs", "version": ""}
        trainer.logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=Namespace(**logger))
    _report_to_platform(trainer)
    for spec in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        _place_logger(spec, folder, run.run.name)
    own = trainer.callbacks or []
    own = list(own) if isinstance(own, list) else [own]
    usual = dict(_usual(run, own))
    before = [spec for name, spec in usual.items() if USUAL[name].before]
    trainer.callbacks = [*before, *own, *(spec for name, spec in usual.items() if not USUAL[name].before)]
    for spec in trainer.callbacks:
        _place(spec, folder, trainer.callbacks)
    if "images" in run and run.images.output_dir is None:
        run.images.output_dir = str(folder / "predictions")
    if "texts" in run and run.texts.output_file is None:
        run.texts.output_file = str(folder / "predictions/answers.jsonl")
    return run


def run_folder(options: Namespace) -> Path:
    """`run.dir`/`run.name`. Raises ConfigError for a name that leads out of `run.dir`."""
    name, root = options.run.name, options.trainer.default_root_dir
    start = Path(os.environ.get("LIT_RL_FOLDER", ""))
    if name is None:
        return start / root if root else start / options.run.dir / "run"
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"run.name={name!r} must be a folder in run.dir={options.run.dir}: set run.dir to another place")
    return start / options.run.dir / name


def _usual(run: Namespace, own: list[Namespace]) -> Iterator[tuple[str, Namespace]]:
    """Name and options of each usual callback that the run has not replaced, left out or made impossible."""
    impossible = {
        "progress": run.trainer.enable_progress_bar is False,
        "learning_rate": run.trainer.logger is False,  # it only logs
        "newest": run.trainer.enable_checkpointing is False,
    }
    for name, usual in USUAL.items():
        said = run.run.callbacks[name]
        if said is None or impossible.get(name):
            continue
        if any(_replaces(spec, usual.kind) for spec in own):
            if said:
                raise ConfigError(f"run.callbacks.{name}={said} has no part in a run whose trainer.callbacks names its own: set them there")
            continue
        of_images = getattr(imported(run.model.class_path), "samples", "") == "images"
        yield name, _checked(name, USUAL_CLASSES[name][-1 if of_images else 0], {**usual.options, **said})


def _replaces(spec: Namespace, kind: type | tuple[type, ...]) -> bool:
    cls = imported_class(spec.class_path)
    best = cls is not None and issubclass(cls, ModelCheckpoint) and not is_count(spec.get("init_args", Namespace()).get("monitor"))
    return cls is not None and issubclass(cls, kind) and not best


def _checked(name: str, class_path: str, options: Options) -> Namespace:
    """The callback's options with its defaults. Raises ConfigError for those that it does not have."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    try:
        return parser.parse_object({"callback": {"class_path": class_path, "init_args": options}}).callback
    except ArgumentError as error:
        given = ", ".join(f"{key}: {value}" for key, value in options.items())
        raise ConfigError(f"run.callbacks.{name} are options of {class_path}, which does not take {{{given}}}: {error}") from error


def _of_export(options: Namespace, every: list[Namespace]) -> str:
    """The folder of exports: `export`; with checkpoints the run's own, or `checkpoints` where those have the same names, plus .ckpt."""
    if options.get("at") != "checkpoint":
        return "export"
    keepers = [other for other in every if issubclass(imported_class(other.class_path) or object, ModelCheckpoint)]
    name = options.get("folder") or FOLDERS["checkpoint"]
    return "checkpoints" if any(other.get("init_args", Namespace()).get("filename") == name for other in keepers) else ""


def _report_to_platform(trainer: Namespace) -> None:
    """Add the platform's logger where JOB_UUID and PLATFORM_URL are set, and W&B where WANDB_PROJECT is. Changes `trainer.logger`."""
    if not (os.environ.get("JOB_UUID") and os.environ.get("PLATFORM_URL")):
        return
    own = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger] if trainer.logger else []
    classes = [imported_class(spec.class_path) or object for spec in own]
    if any(issubclass(cls, PlatformLogger) for cls in classes):
        return
    wandb = bool(os.environ.get("WANDB_PROJECT")) and not any(issubclass(cls, WandB) for cls in classes)
    trainer.logger = [*own, Namespace(class_path="callbacks.platform_logger.PlatformLogger", init_args=Namespace(wandb=wandb))]


def _place_logger(spec: object, folder: Path, name: str | None) -> None:
    """Fill in where a logger of this project writes, and its run's name. Changes `spec`."""
    cls = imported_class(spec.class_path) if isinstance(spec, Namespace) else None
    if isinstance(spec, Namespace) and cls is not None and issubclass(cls, WandB | SwanLab | Trackio):
        spec.init_args.name = spec.init_args.name or name
        if not issubclass(cls, Trackio):
            spec.init_args.save_dir = spec.init_args.save_dir or str(folder)


def _place(spec: Namespace, folder: Path, every: list[Namespace]) -> None:
    """Fill in where a callback writes. Changes `spec`."""
    cls, options = imported_class(spec.class_path), spec.get("init_args", Namespace())
    if cls is None:
        return
    if issubclass(cls, ModelCheckpoint):
        if options.get("dirpath") is None:
            options.dirpath = str(folder / ("checkpoints" if is_count(options.get("monitor")) else "best"))
        if options.get("filename") is None:
            options.filename, options.auto_insert_metric_name = "iteration-{iteration:.0f}", False
    elif issubclass(cls, BestModel) and options.get("dirpath") is None:
        options.dirpath = str(folder / "best_model")
    elif issubclass(cls, AgentLogs) and options.get("folder") is None:
        options.folder = str(folder / "logs")
    elif issubclass(cls, Export) and options.get("dirpath") is None:
        exported = [other.init_args.get("weights") for other in every if issubclass(imported_class(other.class_path) or object, Export)]
        beside = options.get("weights") == "ema" and any(weights != "ema" for weights in exported)
        options.dirpath = str(folder / _of_export(options, every) / ("ema" if beside else ""))
    elif issubclass(cls, SampleGallery) and options.get("folder") is None:
        options.folder = str(folder / "samples")
    elif issubclass(cls, EvaluationSets) and options.get("folder") is None:
        options.folder = str(folder / "eval")
    elif issubclass(cls, EpisodeRecords) and options.get("folder") is None:
        options.folder = str(folder / "episodes")
    spec.init_args = options
