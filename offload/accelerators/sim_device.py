"""The emulated device as torch knows it: registering it, its module ``torch.sim``, and how much memory it has."""

from __future__ import annotations

import gc
import re
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from offload.accelerators.sim_build import load_extension

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

_extension: Any = None


class DeviceModule:
    """``torch.sim``: what torch asks a device module for; the rest is ``torch.accelerator``."""

    Stream = torch.Stream
    Event = torch.Event
    _initialized = True  # torch.utils.checkpoint then keeps the device's random state

    class device:  # noqa: N801 - torch's name
        """Context of the one device there is."""

        def __init__(self, index: object) -> None:
            pass

        def __enter__(self) -> DeviceModule.device:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self) -> bool:
        return True

    def manual_seed(self, seed: int) -> None:
        _extension.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        _extension.manual_seed(seed)

    def get_rng_state(self, device: object = 0) -> Tensor:
        return torch.frombuffer(bytearray(_extension.get_rng_state()), dtype=torch.uint8)

    def set_rng_state(self, new_state: Tensor, device: object = 0) -> None:
        _extension.set_rng_state(bytes(new_state.tolist()))

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


def loaded() -> Any:
    """The compiled device. Raises RuntimeError before :func:`load`."""
    if _extension is None:
        raise RuntimeError("the emulated device is not loaded: call offload.testing.sim.load() first")
    return _extension


def set_capacity(capacity: int | str) -> None:
    """See :func:`offload.testing.sim.configure`."""
    extension, capacity_bytes = loaded(), _parse_bytes(capacity)
    if capacity_bytes == extension.capacity():
        return
    gc.collect()  # tensors in reference cycles would count as live
    if extension.live_bytes():
        raise RuntimeError(
            f"capacity cannot change while {extension.live_bytes()} bytes of device memory are in use: delete those "
            "tensors first"
        )
    extension.set_capacity(capacity_bytes)


def _parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text as "1.5GiB"; device memory comes in whole 2 MiB."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"capacity must be a positive number of bytes or a text as '1GiB', not {size!r}")
    return -(-int(float(match[1]) * _UNITS[match[2]]) // 2**21) * 2**21
