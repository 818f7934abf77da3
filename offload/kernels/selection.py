"""Which implementation of the update serves a device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

from offload.kernels import native

logger = logging.getLogger(__name__)

_HOST_IMPLEMENTATIONS = ("avx512", "avx2", "scalar", "numba", "torch")  # best first
_GPU_IMPLEMENTATIONS = ("triton", "torch")

_override: str | None = None


def runs_host_kernels(device_type: str) -> bool:
    """Whether the update of a device runs in the CPU's kernels: the CPU, and devices emulated on it."""
    return device_type in ("cpu", "meta", torch._C._get_privateuse1_backend_name())


def _candidates(device_type: str) -> tuple[str, ...]:
    if runs_host_kernels(device_type):
        return _HOST_IMPLEMENTATIONS
    return _GPU_IMPLEMENTATIONS if device_type in ("cuda", "xpu") else ("torch",)


@functools.cache
def _works(name: str) -> bool:
    if name == "torch":
        return True
    if name == "triton":
        return importlib.util.find_spec("triton") is not None and _triton_agrees()
    if name != "numba":
        kernel = native.load()
        return kernel is not None and name in kernel.isas
    try:
        from offload.kernels import numba_kernel  # noqa: F401
    except Exception as error:  # noqa: BLE001  numba refuses a Python or NumPy with errors of several types
        logger.warning("The numba kernel can't be used: %s", error)
        return False
    return True


def _triton_agrees() -> bool:
    """Whether triton compiles here and gives the reference's bits; without a device there is nothing to try it on."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type not in ("cuda", "xpu"):
        return True
    from offload.kernels import self_test, torch_reference, triton_kernel

    try:
        agrees = self_test.agree(triton_kernel.step, torch_reference.step, device)
    except Exception as error:  # noqa: BLE001  triton compiles its launcher with a C compiler, which may be missing
        logger.warning("The triton kernel can't be used, torch serves instead, slower: %s", error)
        return False
    if not agrees:
        logger.warning("The triton kernel gives other bits than the reference on %s and is not used.", device)
    return agrees


def is_available(name: str, device_type: str) -> bool:
    """Whether an implementation serves tensors of a device type, on this machine."""
    return name in _candidates(device_type) and _works(name)


def available_implementations(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that :func:`offload.kernels.adam_step` takes for tensors on a device, best first.

    Tries each of them: the compiled library and numba are loaded.
    """
    return tuple(name for name in _candidates(torch.device(device).type) if _works(name))


def choice() -> str | None:
    """What :func:`default_implementation` goes by: the same choice, the same implementation."""
    return _override or os.environ.get("OFFLOAD_KERNEL")


def default_implementation(device: torch.device | str = "cpu") -> str:
    """The implementation used when none is named.

    That is the one of :func:`use_implementation`, else of the environment's OFFLOAD_KERNEL, else the best available.
    A choice that a device has no use for (a CPU kernel for CUDA tensors) leaves it with its best.

    Raises ValueError if the chosen one is unknown, or not available on this machine.
    """
    device_type = torch.device(device).type
    name = choice()
    if name:
        _check(name, "use_implementation" if _override else "OFFLOAD_KERNEL")
        if name in _candidates(device_type):
            return name
    return next(name for name in _candidates(device_type) if _works(name))


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Makes ``name`` the default within the block, for every thread of the process; see default_implementation.

    Raises ValueError if it is unknown, or not available on this machine.
    """
    global _override
    _check(name, "use_implementation")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def _check(name: str, source: str) -> None:
    known = dict.fromkeys((*_HOST_IMPLEMENTATIONS, *_GPU_IMPLEMENTATIONS))
    if name not in known or not _works(name):
        usable = ", ".join(name for name in known if _works(name))
        raise ValueError(f"{source}: implementation {name!r} is not available here; choose one of {usable}")
