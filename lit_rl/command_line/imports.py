"""Imports of the command line without what takes seconds and no run needs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

PLOTS = "torchmetrics.utilities.plot"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without collecting garbage, of which modules make none, and without matplotlib, which torchmetrics imports for plots.

    Afterwards modules are left out of collections, which would otherwise walk through all of them, and a plot imports matplotlib.
    """
    if "torchmetrics" not in sys.modules:
        sys.modules[PLOTS] = Plots(PLOTS)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class Plots(ModuleType):
    """torchmetrics' functions that plot, each of which imports the module itself when it is called, and its types, as `object`."""

    def __getattr__(self, name: str) -> Callable[..., object] | type[object]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("_"):
            return object

        def plot(*args: object, **kwargs: object) -> object:
            if sys.modules.get(PLOTS) is self:
                del sys.modules[PLOTS]
            return getattr(import_module(PLOTS), name)(*args, **kwargs)

        return plot
