"""Dotted paths of classes, as YAMLs name them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def imported(class_path: str) -> Any:
    """The class, function or value at a dotted path, or None."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except (ImportError, ValueError):  # a file name, or a text with dots
        return None
