"""A run whose processes torchrun has started: `python -m lit_rl.launch`, or torchrun itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from jsonargparse import Namespace
from lightning.fabric.plugins.environments import TorchElasticEnvironment

PR_SET_PDEATHSIG = 1


def as_started(trainer: Namespace) -> None:
    """Set the numbers of devices and nodes to those that torchrun has started, which no other could fit. Changes `trainer`."""
    if TorchElasticEnvironment.detect():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        trainer.num_nodes = int(os.environ["WORLD_SIZE"]) // here
        if not (isinstance(trainer.devices, list) and len(trainer.devices) == here):
            trainer.devices = here


def end_with_parent() -> None:
    """Have this process asked to stop (SIGTERM) when the torchrun that started it is gone, whatever ended that (Linux)."""
    if TorchElasticEnvironment.detect() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
