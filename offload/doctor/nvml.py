"""NVIDIA devices, their driver and their links, as NVML tells. Never raises: what fails becomes a line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from offload.doctor.findings import RATE, RUNS, Finding

_TOPIC = "NVML"

# NVML's own codes, in its header, with what they mean here and what helps.
_FAULTS = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": ("note", "no NVIDIA driver is installed (its library was not found)", ""),
    "NVML_ERROR_DRIVER_NOT_LOADED": (
        "bad", "the NVIDIA driver is installed and not loaded",
        "load the NVIDIA driver (modprobe nvidia), or start the container with access to it",
    ),
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        "bad", "the NVIDIA driver in the kernel and its library are of different versions",
        "reboot, or reload the NVIDIA kernel module: the driver was updated while it was loaded",
    ),
    "NVML_ERROR_NO_PERMISSION": (
        "bad", "no permission to ask the NVIDIA driver",
        "give this user access to /dev/nvidia*, or start the container with access to the devices",
    ),
}  # fmt: skip


def examine_nvml() -> list[Finding]:
    """A line for the driver and one for each device, or one that says why there is none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return [Finding(_TOPIC, "note", "pynvml is not installed", "pip install nvidia-ml-py", RATE)]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [_fault(nvml, error, "starting")]
    try:
        findings = [Finding(_TOPIC, "good", f"driver {_text(nvml.nvmlSystemGetDriverVersion())}")]
        for index in range(nvml.nvmlDeviceGetCount()):
            findings += _examine_device(nvml, index)
        return findings
    except nvml.NVMLError as error:
        return [_fault(nvml, error, "asking the driver")]
    finally:
        nvml.nvmlShutdown()


def _examine_device(nvml: Any, index: int) -> list[Finding]:
    """Name and link. A virtual machine or an unprivileged user may be told of one and not of the other."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = _text(nvml.nvmlDeviceGetName(handle))
    except nvml.NVMLError as error:
        return [_fault(nvml, error, f"asking for device {index}")]
    findings = [Finding(_TOPIC, "good", f"device {index}: {name}")]
    asked = (
        nvml.nvmlDeviceGetCurrPcieLinkGeneration, nvml.nvmlDeviceGetMaxPcieLinkGeneration,
        nvml.nvmlDeviceGetCurrPcieLinkWidth, nvml.nvmlDeviceGetMaxPcieLinkWidth,
    )  # fmt: skip
    try:
        findings.append(_link(index, *(_number(ask, handle) for ask in asked)))
    except nvml.NVMLError as error:
        findings.append(_fault(nvml, error, f"asking for the link of device {index}"))
    return findings


def _link(index: int, generation: int, max_generation: int, width: int, max_width: int) -> Finding:
    """Width counts always; the generation falls on an idle device to save power, so it is told and not blamed."""
    text = f"device {index}: PCIe generation {generation} of {max_generation}, {width} of {max_width} lanes"
    if width < max_width:
        remedy = (
            f"move device {index} to a slot with {max_width} lanes, or reseat it: its link has {width}, so copies run "
            f"at {width}/{max_width} of what they could"
        )
        return Finding("link", "bad", text, remedy, RATE)
    if generation < max_generation:
        return Finding("link", "note", f"{text} (idle devices lower the generation; look again under load)")
    return Finding("link", "good", text)


def _fault(nvml: Any, error: Any, doing: str) -> Finding:
    for name, (status, text, remedy) in _FAULTS.items():
        if error.value == getattr(nvml, name):
            return Finding(_TOPIC, "bad" if status == "bad" else "note", text, remedy, RUNS if remedy else 0)
    return Finding(_TOPIC, "bad", f"{doing} failed: {error}", "see the NVIDIA driver's log (dmesg)", RATE)


def _number(ask: Callable[[Any], Any], handle: Any) -> int:
    return int(ask(handle))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
