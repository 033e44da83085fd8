"""Loggers that report a run to the platform and to Weights & Biases."""

from lit_rl.trackers.dual import DualLogger, init_logging

__all__ = ["DualLogger", "init_logging"]
