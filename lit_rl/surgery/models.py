"""Whole models: of models, or of a base and adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.checkpoints.manifest import MANIFEST
from lit_rl.checkpoints.tensors import Facts, Tensors, shard_files
from lit_rl.errors import ConfigError, listed
from lit_rl.surgery.formulas import linear, of_differences, slerp
from lit_rl.surgery.inputs import GROUPS, Adapter, Model
from lit_rl.surgery.settings import Settings
from lit_rl.surgery.writing import write_shards

TIED = "lm_head.weight"


class ModelMerge:
    """A model that is about to be written in the form of the folder `frame`.

    facts: shape and precision by name of what is written. tensor: computes one of them.
    """

    def __init__(self, frame: Path, facts: Mapping[str, Facts], tensor: Callable[[str], Tensor]) -> None:
        self.frame, self.facts, self.tensor = frame, facts, tensor

    @classmethod
    def of_models(cls, models: Sequence[Model], base: Model | None, settings: Settings) -> ModelMerge:
        """A merge of whole models. Raises ConfigError where names or shapes differ, or nothing has a configuration."""
        frame = base if base is not None else models[0]
        if frame.folder is None:
            raise ConfigError(
                f"{frame.tensors.place} is a checkpoint, which has no configuration and no tokenizer: give base, the model it started from"
            )
        whole = [_completed(model, frame) for model in models]
        facts = {name: settings.precise(whole[0].facts[name]) for name in frame.tensors.facts}

        def tensor(name: str) -> Tensor:
            found = [tensors.number(name) for tensors in whole]
            if not found[0].is_floating_point():
                return found[0]
            if settings.method == "linear":
                return linear(found, settings.weights)
            if settings.method == "slerp":
                return slerp(found, settings.weights)
            start = frame.tensors.number(name)
            return of_differences(settings.method, start, found, settings.weights, density=settings.density, seed=settings.seed, name=name)

        return cls(frame.folder, facts, tensor)

    @classmethod
    def of_adapters(cls, adapters: Sequence[Adapter], base: Model, settings: Settings) -> ModelMerge:
        """base + sum_i w_i s_i B_i A_i. Raises ConfigError for a layer that the base does not have, or has in another shape."""
        group = "" if adapters[0].kind == "language" else "transformer/"
        for adapter in adapters:
            for layer in adapter.scales:
                factors = [adapter.tensors.facts[f"{layer}.lora_{factor}.weight"].shape for factor in "BA"]
                there = base.tensors.facts.get(f"{group}{layer}.weight")
                if there is None or list(there.shape) != [factors[0][0], *factors[1][1:]]:
                    shape = "no such weight" if there is None else f"a weight of {list(there.shape)}"
                    raise ConfigError(
                        f"{adapter.tensors.place} adapts {layer} by {list(factors[0])} x {list(factors[1])}, and {base.tensors.place} has "
                        f"{shape} of this name: give the base that it was trained on; for tied and fused layers there is "
                        "`python -m lit_rl.merge ADAPTER`"
                    )
        facts = {name: settings.precise(about) for name, about in base.tensors.facts.items()}

        def tensor(name: str) -> Tensor:
            found, layer = base.tensors.number(name), name.removeprefix(group).removesuffix(".weight")
            pairs = [(adapter, weight) for adapter, weight in zip(adapters, settings.weights) if layer in adapter.scales]
            if not pairs or not name.startswith(group):
                return found
            total = found.float()
            for adapter, weight in pairs:
                down, up = (adapter.tensors.number(f"{layer}.lora_{factor}.weight").float() for factor in "AB")
                total = total + weight * adapter.scales[layer] * (up @ down)
            return total

        assert base.folder is not None
        return cls(base.folder, facts, tensor)

    def files(self) -> dict[str, dict[str, Facts]]:
        """The names, shapes and precisions of the files, by their folder in the model's."""
        inner = {name: "transformer/" if name.startswith("transformer/") else "" for name in self.facts}
        return {group: found for group in GROUPS if (found := {n: self.facts[n] for n, place in inner.items() if place == group})}

    def copied(self) -> int:
        """Bytes of the frame's files that are taken as they are."""
        return sum(file.stat().st_size for file in self.frame.rglob("*") if file.is_file() and not self._left_out(file))

    def write(self, folder: Path, done: Callable[[str], None]) -> None:
        """Write everything into an empty folder, and tell the name of each tensor that is done."""
        for file in sorted(self.frame.rglob("*")):
            if file.is_file() and not self._left_out(file):
                (target := folder / file.relative_to(self.frame)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)

        def tensor(name: str) -> Tensor:
            found = self.tensor(name)
            done(name)
            return found

        for group, facts in self.files().items():
            stem = re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", shard_files(self.frame / group)[0].name)
            (folder / group).mkdir(exist_ok=True)
            named = {name.removeprefix(group): about for name, about in facts.items()}
            write_shards(folder / group, stem, named, lambda name, group=group: tensor(group + name))  # type: ignore[misc]
            _note_precision(folder / group / "config.json", facts)

    def _left_out(self, file: Path) -> bool:
        """Weights, which come anew, and checksums of other files."""
        inner = file.relative_to(self.frame).as_posix()
        weights = any(inner.startswith(group) and "/" not in inner.removeprefix(group) for group in self.files())
        return inner == MANIFEST or inner.startswith(".") or (weights and ".safetensors" in file.name)


def _completed(model: Model, frame: Model) -> Tensors:
    """The tensors of a model under the names of the frame; a checkpoint takes what was not trained from the frame.

    Raises ConfigError for names or shapes that differ.
    """
    mine, wanted = model.tensors.facts, frame.tensors.facts
    tied = {TIED} if TIED not in wanted else set()  # a copy of the embedding, which files of tied models leave out
    odd = [name for name in mine if name not in wanted and name not in tied]
    lacking = [name for name in wanted if name not in mine] if model.folder is not None else []
    other = [f"{n} is {list(mine[n].shape)}, not {list(wanted[n].shape)}" for n in wanted if n in mine and mine[n].shape != wanted[n].shape]
    for names, problem in ((odd, "has more"), (lacking, "lacks"), (other, "differs")):
        if names:
            hint = "" if model.folder is not None else "; merge exports of the run (callbacks.export.Export) where names differ"
            raise ConfigError(
                f"{model.tensors.place} is not of the same architecture as {frame.tensors.place}: it {problem}: "
                f"{listed(names, shown=10)}{hint}"
            )
    facts = {name: mine.get(name, about) for name, about in wanted.items()}
    return Tensors(model.tensors.place, facts, lambda name: (model if name in mine else frame).tensors.read(name))


def _note_precision(config: Path, facts: Mapping[str, Facts]) -> None:
    """Have a configuration that names a precision name the one of most weights, in which they are then read."""
    if not config.is_file():
        return
    fields = json.loads(config.read_text(encoding="utf-8"))
    sizes: dict[torch.dtype, int] = {}
    for about in facts.values():
        sizes[about.dtype] = sizes.get(about.dtype, 0) + about.size
    name = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    if changed := {key: name for key in ("dtype", "torch_dtype") if fields.get(key) not in (None, name)}:
        config.write_text(json.dumps(fields | changed, indent=2) + "\n", encoding="utf-8")
