"""Meters of memory that torch's allocator does not know: of the whole device, by NVML, and of this process, by psutil.

Both libraries are imported on first use. A meter without its library, or without a device it knows, reads None.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch


class NvmlMeter:
    """Memory in use on one NVIDIA device, by all processes together."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            return
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        try:
            nvml.nvmlInit()
            self._handle = _find_handle(nvml, index)
        except nvml.NVMLError:  # no driver, or a device NVML does not show
            return
        self._nvml = nvml

    def used_bytes(self) -> int | None:
        if self._handle is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError:  # not every device or permission allows it
            return None


class HostMeter:
    """Resident memory of this process."""

    def __init__(self) -> None:
        try:
            self._process: Any = importlib.import_module("psutil").Process()
        except ImportError:
            self._process = None

    def rss_bytes(self) -> int | None:
        return None if self._process is None else int(self._process.memory_info().rss)


def _find_handle(nvml: Any, index: int) -> Any:
    """NVML's handle of the device that CUDA calls ``index``; None where the two numberings cannot be matched."""
    name = str(index)
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        names = visible.split(",")
        if index >= len(names):
            return None
        name = names[index].strip()
    if not name.isdigit():
        return nvml.nvmlDeviceGetHandleByUUID(name)
    # NVML counts by PCI bus. CUDA does so only if told to; otherwise fastest first, which is the same among equals.
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        if len({nvml.nvmlDeviceGetName(handle) for handle in handles}) > 1:
            return None
    return nvml.nvmlDeviceGetHandleByIndex(int(name))
