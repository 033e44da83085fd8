"""One model or adapter of several, written tensor by tensor: what is in memory are the tensors of one name, from every input."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from lit_rl.checkpoints.manifest import entries, write_manifest
from lit_rl.checkpoints.replacing import beside, put_in_place, remove
from lit_rl.errors import ConfigError
from lit_rl.surgery.adapters import AdapterMerge, check_adapters
from lit_rl.surgery.formulas import METHODS, OF_DIFFERENCES, Method
from lit_rl.surgery.inputs import Adapter, Model, open_base, open_input
from lit_rl.surgery.models import ModelMerge
from lit_rl.surgery.settings import Settings

Progress = Callable[[int, int, str], None]
"""Called with the number of tensors that are written, that of all, and the name of the one that was written last."""


def merge(
    inputs: Sequence[Path],
    out: Path,
    *,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    base: str | None = None,
    density: float = 0.5,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write `out`, a new folder that appears whole or not at all, and return it.

    inputs: Checkpoints of runs (.ckpt, folders of FSDP2's or DeepSpeed's), folders of transformers, diffusers or PEFT: models or adapters,
    not both. Models become a model, adapters an adapter, and by "lora" a model. method: See `METHODS`. weights: One for each input; by
    default each has 1. base: The folder of the model that differences are taken from, whose configuration and tokenizer a checkpoint gets.
    density: Of ties and DARE, in (0, 1]. dtype: Precision of what is written (float32, bfloat16, float16), by default that of the first
    input. seed: Of DARE's draws. progress: An exception of it ends the merge and leaves nothing behind. Raises ConfigError before
    anything is written for inputs that do not fit together, and for NaN.
    """
    settings = Settings(method, [1.0] * len(inputs) if weights is None else list(weights), density, dtype, seed)
    settings.check(len(inputs))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: name a new folder")
    job = _job([open_input(place) for place in inputs], base, settings)
    facts = {name: about for part in job.files().values() for name, about in part.items()}
    needed, free = sum(about.size for about in facts.values()) + job.copied(), shutil.disk_usage(_existing(out)).free
    if needed > free:
        raise ConfigError(f"{out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free there: name a folder on another disk")
    written: list[str] = []

    def count(name: str) -> None:
        written.append(name)
        if progress is not None:
            progress(len(written), len(facts), name)

    temporary = beside(out)
    try:
        temporary.mkdir(parents=True)
        job.write(temporary, count)
        write_manifest(temporary, [entries(temporary, 0, 1)])
        put_in_place(temporary, out)
    finally:
        remove(temporary)
    return out


def _job(found: Sequence[Model | Adapter], base: str | None, settings: Settings) -> ModelMerge | AdapterMerge:
    models = [one for one in found if isinstance(one, Model)]
    adapters = [one for one in found if isinstance(one, Adapter)]
    if models and adapters:
        raise ConfigError(
            f"{adapters[0].tensors.place} is an adapter and {models[0].tensors.place} a whole model: merge adapters with adapters, or make "
            "a model of the adapter first (method lora)"
        )
    if adapters:
        check_adapters(adapters)
        if settings.method == "slerp":
            raise ConfigError(f"method slerp is of whole models, and {adapters[0].tensors.place} is an adapter: use linear")
        if settings.method != "lora":
            return AdapterMerge(adapters, settings, base or adapters[0].base)
        if (named := base or adapters[0].base) is None:
            raise ConfigError(f"{adapters[0].tensors.place} names no base: give base")
        return ModelMerge.of_adapters(adapters, open_base(named), settings)
    if settings.method == "lora":
        raise ConfigError(f"method lora adds adapters to a model, and {models[0].tensors.place} is a whole model: {_others('lora')}")
    if settings.method in OF_DIFFERENCES and base is None:
        raise ConfigError(f"method {settings.method} takes differences from a base: give base, the model that all inputs were trained from")
    return ModelMerge.of_models(models, None if base is None else open_base(base), settings)


def _others(method: str) -> str:
    return "choose " + ", ".join(other for other in METHODS if other != method)


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())
