"""Meters read what their library says, and None without it; CUDA's and NVML's numbering of devices are kept apart."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.meters import HostMeter, NvmlMeter


class FakeNvml:
    """NVML of a machine with the given devices; ``used`` is 100 plus the index."""

    class NVMLError(Exception):
        pass

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if not self.names:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index >= len(self.names):
            raise self.NVMLError("invalid argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=100 + handle)


@pytest.fixture(autouse=True)
def no_cuda_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


def used_bytes(monkeypatch: pytest.MonkeyPatch, names: list[str], device: str, **environment: str) -> int | None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(names))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return NvmlMeter(torch.device(device)).used_bytes()


def test_nvml_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert used_bytes(monkeypatch, ["H100", "H100"], "cuda:1") == 101


@pytest.mark.parametrize(
    ("visible", "used"), [("3,1", 101), ("GPU-2,GPU-1", 101), ("0,2", 102)], ids=["indices", "uuids", "gap"]
)
def test_nvml_follows_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str, used: int) -> None:
    assert used_bytes(monkeypatch, ["A100"] * 4, "cuda:1", CUDA_VISIBLE_DEVICES=visible) == used


def test_nvml_of_unlike_devices_is_read_only_when_cuda_counts_as_nvml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["T4", "A100"]
    assert used_bytes(monkeypatch, names, "cuda:0") is None  # CUDA's device 0 would be the A100
    assert used_bytes(monkeypatch, names, "cuda:0", CUDA_DEVICE_ORDER="PCI_BUS_ID") == 100


@pytest.mark.parametrize(
    ("names", "device", "environment"),
    [
        ([], "cuda:0", {}),
        (["H100"], "cuda:1", {}),
        (["H100"], "xpu:0", {}),
        (["H100"], "cuda:1", {"CUDA_VISIBLE_DEVICES": "0"}),
    ],
    ids=["no driver", "no such device", "not NVIDIA", "hidden device"],
)
def test_nvml_without_the_device_reads_none(
    monkeypatch: pytest.MonkeyPatch, names: list[str], device: str, environment: dict[str, str]
) -> None:
    assert used_bytes(monkeypatch, names, device, **environment) is None


def test_nvml_without_its_library_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes the import fail
    assert NvmlMeter(torch.device("cuda:0")).used_bytes() is None


def test_nvml_that_refuses_a_reading_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(["H100"])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = NvmlMeter(torch.device("cuda:0"))

    def refuse(handle: int) -> Any:
        raise nvml.NVMLError("not supported")

    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", refuse)
    assert meter.used_bytes() is None


def test_rss_is_that_of_this_process() -> None:
    psutil = pytest.importorskip("psutil")
    rss_bytes = HostMeter().rss_bytes()
    assert rss_bytes is not None
    assert rss_bytes == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.2)


def test_rss_without_psutil_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert HostMeter().rss_bytes() is None
