"""The emulated device as torch knows it: registering it, its module ``torch.sim``, and how much memory it has."""

from __future__ import annotations

import gc
import re
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from offload.accelerators import sim_inductor, sim_process_group
from offload.accelerators.sim_build import load_extension

RELEASE_TIMEOUT_S = 2.0
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

_extension: Any = None


class DeviceModule:
    """``torch.sim``: what torch asks a device module for; the rest is ``torch.accelerator``."""

    Stream = torch.Stream
    Event = torch.Event
    _initialized = True  # torch.utils.checkpoint then keeps the device's random state
    Scheduling = sim_inductor.Scheduling
    PythonWrapperCodegen = CppWrapperCodegen = WrapperFxCodegen = property(sim_inductor.wrapper_codegen)

    class device:  # noqa: N801 - torch's name
        """Context in which a device is the current one; None and negative indices change nothing."""

        def __init__(self, index: torch.device | int | None) -> None:
            self.idx = _index_of(index)
            self.prev_idx = -1

        def __enter__(self) -> DeviceModule.device:
            self.prev_idx = torch.accelerator.current_device_index()
            if self.idx >= 0:
                torch.accelerator.set_device_index(self.idx)
            return self

        def __exit__(self, *exc_info: object) -> None:
            torch.accelerator.set_device_index(self.prev_idx)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _lazy_init(self) -> None:
        """Nothing is left to do; without it, torch 2.10 takes the device for unused and synchronize() does nothing."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(_extension.num_devices)

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def set_device(self, device: torch.device | int) -> None:
        torch.accelerator.set_device_index(_index_of(device))

    def stream(self, stream: torch.Stream | None) -> AbstractContextManager[object]:
        return stream if stream is not None else nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self) -> bool:
        return True

    def manual_seed(self, seed: int) -> None:
        _extension.manual_seed(self.current_device(), seed)

    def manual_seed_all(self, seed: int) -> None:
        for device in range(self.device_count()):
            _extension.manual_seed(device, seed)

    def get_rng_state(self, device: torch.device | int | str = "sim") -> Tensor:
        return torch.frombuffer(bytearray(_extension.get_rng_state(_some_index(device))), dtype=torch.uint8)

    def set_rng_state(self, new_state: Tensor, device: torch.device | int | str = "sim") -> None:
        _extension.set_rng_state(_some_index(device), bytes(new_state.tolist()))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.accelerator, name)


def load() -> None:
    """Build the device if need be (about a minute, then cached) and register it as "sim". Calling it again is free.

    Raises:
        RuntimeError: the build failed, or another device is registered already; the message says what to do.
    """
    global _extension  # one device per process, as torch has it
    if _extension is not None:
        return
    name = torch._C._get_privateuse1_backend_name()
    if name not in ("privateuseone", "sim"):
        raise RuntimeError(f"torch already has device {name!r} in the one place for such devices: use another process")
    _extension = load_extension()
    backend_registration.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", DeviceModule())  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
    sim_process_group.register()


def loaded() -> Any:
    """The compiled device. Raises RuntimeError before :func:`load`."""
    if _extension is None:
        raise RuntimeError("the emulated device is not loaded: call offload.testing.sim.load() first")
    return _extension


def devices(device: int | None) -> range:
    """``device``, or all for None. Raises ValueError if there is no such device."""
    num_devices = int(loaded().num_devices)
    if device is None:
        return range(num_devices)
    if not 0 <= device < num_devices:
        raise ValueError(f"device must be from 0 to {num_devices - 1}, not {device!r}")
    return range(device, device + 1)


def set_capacity(capacity: int | str, device: int | None = None) -> None:
    """See :func:`offload.testing.sim.configure`; of one device, or of each."""
    extension, capacity_bytes = loaded(), _parse_bytes(capacity)
    for index in devices(device):
        if capacity_bytes == extension.capacity(index):
            continue
        if not _is_empty(index):
            raise RuntimeError(
                f"capacity cannot change while {extension.live_bytes(index)} bytes of device memory are in use on "
                f"sim:{index}: delete those tensors first"
            )
        extension.set_capacity(index, capacity_bytes)


def _is_empty(index: int) -> bool:
    """Whether no tensor is on the device. One that is only just being let go of is waited for.

    Tensors in reference cycles would count as live; and autograd's threads, as other workers, drop what they had
    of a backward a moment after whoever waited for it has gone on.
    """
    gc.collect()
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while loaded().live_bytes(index) and time.monotonic() < deadline:
        time.sleep(0.001)
    return not loaded().live_bytes(index)


def _index_of(device: torch.device | int | None) -> int:
    """The index, or -1 for the current device."""
    if isinstance(device, torch.device):
        device = device.index
    return -1 if device is None else device


def _some_index(device: torch.device | int | str) -> int:
    index = _index_of(torch.device(device) if isinstance(device, str) else device)
    return torch.accelerator.current_device_index() if index < 0 else index


def _parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text as "1.5GiB"; device memory comes in whole 2 MiB."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"capacity must be a positive number of bytes or a text as '1GiB', not {size!r}")
    return -(-int(float(match[1]) * _UNITS[match[2]]) // 2**21) * 2**21
