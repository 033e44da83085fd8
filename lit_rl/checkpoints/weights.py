"""Files of tensors that others may have written (adapters): read without executing anything, whole, with numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.checkpoints.contents import named, with_nan
from lit_rl.checkpoints.manifest import file_damage
from lit_rl.errors import ConfigError, listed


def read_tensors(file: Path, *, what: str) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors file, or one that torch has saved, on the CPU.

    what: how an error begins, e.g. "lora.initial: 'folder/file'". Raises ConfigError when the file is not one of tensors alone, is not
    whole, is not as the `manifest.json` beside it says, or holds a NaN.
    """
    found = read_plain(file, what=what)
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{what} is not a file of tensors by name")
    check_numbers(found, what=what)
    return dict(found)


def read_plain(file: Path, *, what: str) -> object:
    """The content of a file, unchecked. Raises ConfigError as `read_tensors` does."""
    from safetensors.torch import load_file

    try:
        if damage := file_damage(file):
            raise ConfigError(f"{what} {damage}")
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # torch and safetensors have an error of their own for each way in which a file is not one of tensors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{what} is not a file of tensors, or not a whole one ({reason})") from error


def check_numbers(tensors: Mapping[str, object], *, what: str) -> None:
    """Raises ConfigError for a tensor that holds NaN."""
    if bad := with_nan(pair for name, value in tensors.items() for pair in named(name, value)):
        raise ConfigError(f"{what} holds NaN in {listed(bad)}: training had failed when it was written, use an earlier one")
