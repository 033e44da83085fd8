"""Dotted paths of classes, as YAMLs name them."""

from __future__ import annotations

from importlib import import_module


def imported_class(class_path: object) -> type | None:
    """The class at a dotted path, or None."""
    found = imported(class_path) if isinstance(class_path, str) else None
    return found if isinstance(found, type) else None


def imported(class_path: str) -> object:
    """The class, function or value at a dotted path, or None."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except (ImportError, ValueError):  # a file name, or a text with dots
        return None
