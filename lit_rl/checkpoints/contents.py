"""Checks the content of a checkpoint file before anything is restored from it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_rl.errors import ConfigError, listed

Checkpoint: TypeAlias = dict[str, Any]
"""The content of a checkpoint: Lightning's keys, and those of methods and callbacks."""


def check_contents(found: object, file: str | os.PathLike) -> Checkpoint:
    """`found` itself. Raises ConfigError unless it is a dict whose `state_dict` holds tensors, none of them with a NaN in it."""
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), Mapping):
        there = f"the keys {listed(sorted(map(str, found)))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ConfigError(f"checkpoint {file} is not one of a run: it holds {there}, not a dict with state_dict in it")
    if odd := [str(name) for name, value in found["state_dict"].items() if not isinstance(value, Tensor)]:
        raise ConfigError(f"checkpoint {file} is damaged: {listed(odd)} of its state_dict must be tensors")
    if bad := with_nan([*named("state_dict", found["state_dict"]), *named("optimizer_states", found.get("optimizer_states"))]):
        raise ConfigError(f"checkpoint {file} holds NaN in {listed(bad)}: training had failed when it was written, use an earlier one")
    return found


def check_kinds(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises ConfigError where whole numbers are stored for a weight: they were rounded."""
    odd = [n for n, tensor in wanted.items() if n in stored and tensor.is_floating_point() != stored[n].is_floating_point()]
    if odd:
        raise ConfigError(f"the checkpoint is damaged: {listed([f'{n} is {stored[n].dtype} there, {wanted[n].dtype} here' for n in odd])}")


def with_nan(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors with a NaN in them. Infinities may be meant, in masks."""
    return [name for name, tensor in tensors if tensor.is_floating_point() and bool(torch.isnan(tensor).any())]


def named(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, lists and tuples, by the path that leads to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from named(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from named(f"{name}.{i}", inner)
