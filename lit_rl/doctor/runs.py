"""The parts that a run's YAML files name, each parsed by the project's own command line, so that one mistake hides no other."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import EMA
from callbacks.export import Export
from callbacks.old_policy import OldPolicySync
from callbacks.reward_scoring import RewardScoring
from callbacks.weight_folders import WeightFolders
from lit_rl.checkpoints.files import check_unused
from lit_rl.command_line.errors import explain
from lit_rl.command_line.run import CLI
from lit_rl.command_line.usual import filled_in
from lit_rl.doctor import memory, models, servers
from lit_rl.doctor.machine import room
from lit_rl.doctor.placement import Placement
from lit_rl.doctor.report import Finding, ok, problem, warning
from lit_rl.errors import ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.net.gpus import Gpu
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.pretrained import component_config, whole_numbers
from lit_rl.policies.style import count_new_adapter
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.pseudo import DEBUG_VARIABLE
from lit_rl.types import Rollout

T = TypeVar("T")

PATH_KEYS = ("pretrained", "encoder", "initial", "model_path")
"""Arguments of policies and rewards that name a folder, a file or a hub id."""
COUNTED = {"train_prompts": "prompts to train on", "held_out": "held out"}
SHOWN = 10
"""Names that a message lists of things that are wrong in the same way."""
BYTES = 4
"""Bytes of a number in a checkpoint."""


class Inspector(CLI):
    """Parses as `python cli.py fit` does, and stops there."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """`Run.build` does it, part by part."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def parse(options: Sequence[str]) -> Namespace:
    """The run that `python cli.py fit OPTIONS` would start. Raises ConfigError with the sentence that the command line would say."""
    argv, said = sys.argv, io.StringIO()
    sys.argv = ["cli.py", "fit", *options]
    try:
        with contextlib.redirect_stderr(said):
            return filled_in(Inspector().config.fit)
    except SystemExit as error:
        raise ConfigError(said.getvalue().rpartition("error: ")[2].strip()) from error
    finally:
        sys.argv = argv


@dataclass
class Run:
    """One run, what it is made of as far as that can be built, and on what."""

    config: Namespace
    options: Sequence[str]
    gpus: Sequence[Gpu]
    train_ids: Sequence[str]
    gpu_memory: float | None = None

    @property
    def wants_gpu(self) -> bool:
        """True when the run trains on a GPU."""
        return str(self.config.trainer.accelerator) in ("gpu", "cuda")

    @property
    def wants_bfloat16(self) -> bool:
        """True when the run computes in bfloat16."""
        dtype = (self.config.model.init_args.get("policy") or {}).get("init_args", {}).get("dtype")
        return "bf16" in str(self.config.trainer.precision) or dtype == "bfloat16"

    def devices(self) -> int:
        """Processes on a node."""
        devices = self.config.trainer.devices
        if self.train_ids:
            return len(self.train_ids)
        if devices in ("auto", -1, "-1"):
            on_gpus = self.wants_gpu or str(self.config.trainer.accelerator) == "auto"
            return max(1, len(self.gpus)) if on_gpus else 1
        if isinstance(devices, str):
            return len([d for d in devices.split(",") if d]) if "," in devices else int(devices) if devices.isdecimal() else 1
        return len(devices) if isinstance(devices, Sequence) else int(devices)

    def processes(self) -> int:
        """Number of processes of the run on this machine."""
        return self.devices() * int(self.config.trainer.num_nodes)

    def gpu_ids(self) -> list[str]:
        """Ids of the GPUs that the run trains on; none when it uses no GPU."""
        if self.train_ids or not (self.wants_gpu or self.gpus):
            return list(self.train_ids)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = visible.split(",") if visible else [str(gpu.index) for gpu in self.gpus]
        return ids[: self.devices()]

    def build(self, kind: Callable[..., T], value: Namespace) -> T:
        """One part of it. Raises ConfigError with what the command line would say."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--part", type=kind)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return parser.instantiate_classes(parser.parse_object({"part": value.as_dict()})).part
        except (ArgumentError, ValueError, TypeError, ImportError) as error:
            raise ConfigError(explain(str(error), ["fit", *self.options])) from error

    # ------------------------------------------------------------------ checks
    def findings(self) -> Iterator[Finding]:
        """Findings about every part of the run."""
        method: LitRL[Rollout] | None
        method, problems = self._try("model", LitRL, self.config.model)
        yield from problems
        told = " ".join(problem.text for problem in problems)
        for key, path in self._paths().items():
            if path not in told:
                yield from models.check_path(key, path)
        data, problems = self._try("data", L.LightningDataModule, self.config.data)
        yield from problems
        yield from _data(data)
        callbacks: list[L.Callback] = []
        for number, value in enumerate(self.config.trainer.callbacks or []):
            callback, problems = self._try(f"trainer.callbacks[{number}]", L.Callback, value)
            callbacks += [callback] if callback is not None else []
            yield from problems
        yield from self._rewards(callbacks, data)
        yield from self._outputs(method, callbacks)
        if method is not None:
            yield from self._memory(method, callbacks)

    def _memory(self, method: LitRL[Rollout], callbacks: Sequence[L.Callback]) -> Iterator[Finding]:
        placement = Placement.of(self.config.trainer, processes=self.processes(), gpu=str(self.config.trainer.accelerator) != "cpu")
        found = [gpu.memory / 1024 for gpu in self.gpus if gpu.memory]
        cards = [self.gpu_memory] if self.gpu_memory else [min(found)] if found else memory.CARDS
        there = bool(found) or self.gpu_memory is not None
        yield from memory.findings(method, placement, data=self.config.data, callbacks=callbacks, cards=cards, there=there)

    def _try(self, about: str, kind: Callable[..., T], value: Namespace) -> tuple[T | None, list[Finding]]:
        try:
            return self.build(kind, value), []
        except ConfigError as error:
            return None, [problem(about, str(error))]

    def _paths(self) -> dict[str, str]:
        callbacks = [value.as_dict() for value in self.config.trainer.callbacks or []]
        return dict(paths(self.config.model.as_dict(), "model")) | dict(paths(callbacks, "trainer.callbacks"))

    def _rewards(self, callbacks: Sequence[L.Callback], data: L.LightningDataModule | None) -> Iterator[Finding]:
        scoring = [callback for callback in callbacks if isinstance(callback, RewardScoring)]
        over_http = {label: r for callback in scoring for label, r in callback.rewards.items() if isinstance(r, HTTPReward)}
        if os.environ.get(DEBUG_VARIABLE, "").lower() in ("1", "true", "yes", "on"):
            yield warning("rewards", f"{DEBUG_VARIABLE} is set: no reward is asked, scores are pseudo-random; unset it for a real run")
            return
        for callback in scoring:
            try:
                callback.check(data, "fit")
            except ConfigError as error:
                yield problem("rewards", str(error))
        for label, reward in over_http.items():
            yield from servers.of_reward(reward, label, processes=self.processes())

    def _outputs(self, method: LitRL[Rollout] | None, callbacks: Sequence[L.Callback]) -> Iterator[Finding]:
        keepers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        chosen = list(dict.fromkeys(Path(keeper.dirpath) for keeper in keepers if keeper.dirpath))
        folders = chosen or [Path(self.config.trainer.default_root_dir or ".")]
        copies = sum(self._kept(keeper) for keeper in keepers)
        numbers, least = trainable(getattr(method, "policy", None))
        averages = sum(isinstance(callback, EMA | OldPolicySync) for callback in callbacks)
        yield from room(folders, checkpoint=numbers * BYTES * (3 + averages), copies=copies, least=least)  # weights and Adam's moments
        for writer in (callback for callback in callbacks if isinstance(callback, WeightFolders)):
            kept = self._exports(writer, keepers) if isinstance(writer, Export) else 1
            yield from room([writer.dirpath], checkpoint=numbers * BYTES, copies=kept, least=least, what="export")
        try:
            check_unused(chosen)
        except ConfigError as error:
            yield warning("checkpoints", str(error))

    def _kept(self, keeper: ModelCheckpoint) -> int:
        """Files that it keeps in the end, `last.ckpt` included."""
        times = self._times(keeper)
        return (times if keeper.save_top_k < 0 else min(keeper.save_top_k, times)) + bool(keeper.save_last)

    def _exports(self, export: Export, keepers: Sequence[ModelCheckpoint]) -> int:
        """Folders that it keeps in the end."""
        times = max(map(self._times, keepers)) if export.at == "checkpoint" and keepers else self._times(export)
        return times if export.keep is None else min(export.keep, times)

    def _times(self, writer: ModelCheckpoint | Export) -> int:
        """Number of times that it writes."""
        return max(1, (self.config.trainer.max_epochs or 0) // max(1, writer.every_n_epochs or 1))


def _data(data: L.LightningDataModule | None) -> Iterator[Finding]:
    if data is not None:
        counts = [f"{len(getattr(data, name))} {what}" for name, what in COUNTED.items() if hasattr(data, name)]
        yield ok("data", f"{type(data).__name__}: {', '.join(counts) or 'can be built'}")
    if callable(look := getattr(data, "unreadable", None)):  # images, of which training reads each when it needs it
        broken = look()
        yield from (problem("data", text) for text in broken[:SHOWN])
        if len(broken) > SHOWN:
            yield problem("data", f"{len(broken) - SHOWN} more images cannot be read")


def paths(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Key and value of whatever names a file to read; `init_args` and `class_path` are left out of the keys."""
    if isinstance(value, Mapping | Namespace):
        for name, inner in value.items():
            if name in PATH_KEYS and isinstance(inner, str):
                yield f"{key}.{name}", inner
            else:
                yield from paths(inner, key if name == "init_args" else f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from paths(inner, f"{key}[{number}]")


def trainable(policy: object) -> tuple[int, bool]:
    """Numbers that training changes, as far as files on the disk tell them, and whether that is only a lower bound."""
    if not isinstance(policy, DiffusersFlowPolicy) or policy.folder is None:
        return 0, True
    try:
        shapes = models.folder(policy.folder)[1]
    except models.Broken:  # told by `check_path`
        return 0, True
    style = getattr(policy, "style", None)
    if policy.lora is not None:
        ends = tuple(policy.lora.named or policy.lora_targets)
        targets = rf"(?:^|\.)(?:{'|'.join(map(re.escape, ends))})\.weight$"
        adapted = [shape for name, shape in shapes.items() if len(shape) == 2 and re.search(targets, name)]
        return (policy.lora.rank or 0) * sum(map(sum, adapted)), style is not None
    if style is None or getattr(policy, "full", False):
        return sum(math.prod(shape) for shape in shapes.values()), style is not None
    if style.initial:
        return Path(style.initial).expanduser().stat().st_size // BYTES, False
    if not Path(style.encoder).expanduser().is_dir():
        return 0, True
    from transformers import SiglipVisionConfig

    features = SiglipVisionConfig.from_pretrained(Path(style.encoder).expanduser()).hidden_size
    return count_new_adapter(style, features=features, transformer=whole_numbers(component_config(policy.folder, "transformer"))), False
