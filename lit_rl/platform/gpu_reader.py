"""Figures of GPUs, from NVIDIA's driver or from whatever stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Figures = dict[str, object]


class GpuReader(Protocol):
    """The GPUs of the machine. reason: why there are none; "" where there are some."""

    reason: str

    def read(self) -> list[Figures]:
        """The figures of each GPU; None for what a GPU does not tell."""
        ...


class Nvml:
    """GPUs as NVIDIA's driver counts them, whatever CUDA_VISIBLE_DEVICES hides. Units: %, GB, degrees Celsius, W."""

    def __init__(self) -> None:
        import pynvml

        self._nvml, self.reason = pynvml, ""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.reason = str(error)

    def read(self) -> list[Figures]:
        """The figures of each GPU."""
        return [] if self.reason else [self._one(index) for index in range(self._nvml.nvmlDeviceGetCount())]

    def _one(self, index: int) -> Figures:
        """Each figure by itself: a GPU that is cut into parts, or a virtual one, does not tell all of them."""
        n = self._nvml
        try:
            handle = n.nvmlDeviceGetHandleByIndex(index)
        except n.NVMLError as error:
            return {"gpu_index": index, "error": str(error)}
        memory = self._told(lambda: n.nvmlDeviceGetMemoryInfo(handle))
        return {
            "gpu_index": index,
            "name": self._told(lambda: n.nvmlDeviceGetName(handle)),
            "utilization": self._told(lambda: float(n.nvmlDeviceGetUtilizationRates(handle).gpu)),
            "memory_used": None if memory is None else memory.used / 1e9,
            "memory_total": None if memory is None else memory.total / 1e9,
            "temperature": self._told(lambda: float(n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU))),
            "power_w": self._told(lambda: n.nvmlDeviceGetPowerUsage(handle) / 1000),
        }

    def _told(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._nvml.NVMLError:
            return None
