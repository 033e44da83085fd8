"""Reading the authors' numbers and holding ours against them; tensors of numbers written by hand."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LOGPROB_F32 = 2e-4
"""A log-probability divides by the noise twice; float32 leaves four digits."""


def f64(*values: float | list[float]) -> Tensor:
    """A tensor of these numbers, or rows of numbers, in float64."""
    return torch.tensor(values, dtype=torch.float64)


def load(folder: Path, name: str) -> dict[str, Tensor | str]:
    """One .npz: arrays as tensors, strings as strings."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as data:
        return {k: str(data[k]) if data[k].dtype.kind == "U" and data[k].ndim == 0 else _value(data[k]) for k in data.files}


def load_llm(folder: Path, name: str) -> tuple[dict, dict]:
    """One .npz of language-model numbers: its arrays, and `meta`, the hyper-parameters of its cases."""
    data = load(folder / "llm", name)
    return data, json.loads(data.pop("meta"))


def load_pack(folder: Path, name: str) -> tuple[dict, dict]:
    """One .npz of `pack`: its arrays, and `meta`, the settings of its cases."""
    data = load(folder / "pack", name)
    return data, json.loads(data.pop("meta"))


def cases(data: dict, pattern: str) -> Iterator[tuple[re.Match, dict]]:
    """Arrays `<case>__<name>` gathered per case, for the cases that `pattern` matches entirely. Never none."""
    found: dict[str, dict] = {}
    for key, value in data.items():
        case, _, name = key.rpartition("__")
        if re.fullmatch(pattern, case):
            found.setdefault(case, {})[name] = value
    assert found, f"no case {pattern!r} among {sorted(data)[:20]}"
    yield from ((re.fullmatch(pattern, case), arrays) for case, arrays in found.items())


def assert_close(actual: Tensor, expected: Tensor, *, f32: float = 2e-5, f64: float = 1e-12, what: str = "") -> None:
    """Relative to the largest number of `expected`: 1e-12 if both are float64, else `f32`."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, the authors' {tuple(expected.shape)}"
    tolerance = f64 if actual.dtype == expected.dtype == torch.float64 else f32
    error = (actual.double() - expected.double()).abs().max().item() / max(expected.double().abs().max().item(), 1e-3)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.0e}"


def _value(array: np.ndarray) -> Tensor | list[str]:
    return array.tolist() if array.dtype.kind == "U" else torch.from_numpy(array)
