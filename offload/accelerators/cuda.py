"""CUDA: the one file of the runtime that knows it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.accelerators.base import Accelerator, round_up_to_page

logger = logging.getLogger(__name__)

_CUDA_SUCCESS = 0
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context of the process


class CudaAccelerator(Accelerator):
    """A CUDA device. Pins exactly what was asked for; torch's allocator rounds up to a power of two."""

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def numa_node(self) -> int | None:
        properties: Any = torch.cuda.get_device_properties(self.device)
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        try:
            node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None  # -1: the machine has one node, or does not say

    @contextlib.contextmanager
    def annotate(self, name: str) -> Iterator[None]:
        with torch.cuda.nvtx.range(name), super().annotate(name):
            yield

    def pinned_empty(self, num_bytes: int) -> Tensor:
        """Page-locked host memory, uninitialised: a 1-D uint8 CPU tensor of ``num_bytes`` rounded up to a page.

        Where CUDA refuses to register it (a container, a limit), torch's own pinned allocator is asked instead, but
        only for powers of two: it would take up to twice of anything else.
        """
        num_bytes = round_up_to_page(num_bytes)
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # page-aligned
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)  # before the pages are touched, which registering does
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        with torch.cuda.device(self.device):
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            error = int(cudart.cudaHostRegister(address, num_bytes, _PORTABLE))
        if error == _CUDA_SUCCESS:
            return _tensor_over(pages, cudart, address, self.device)
        _clear_last_error(self.device)
        if num_bytes & (num_bytes - 1):
            raise RuntimeError(f"cudaHostRegister refused to pin {num_bytes} bytes of host memory (error {error})")
        return super().pinned_empty(num_bytes)

    def pinned_size(self, num_bytes: int) -> int:
        return round_up_to_page(num_bytes) if num_bytes else 0


def _tensor_over(pages: mmap.mmap, cudart: Any, address: int, device: torch.device) -> Tensor:
    """A tensor that keeps ``pages`` alive, and unregisters them when its storage dies.

    The storage holds the ctypes buffer, the buffer holds the mapping; every view of the tensor holds the storage. The
    finalizer runs before the mapping goes, and not at exit, when CUDA may be gone already.
    """
    buffer = (ctypes.c_uint8 * len(pages)).from_buffer(pages)
    weakref.finalize(buffer, _unregister, cudart, address, device).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _unregister(cudart: Any, address: int, device: torch.device) -> None:
    with torch.cuda.device(device):  # the collector may call this on a thread that has used no device yet
        error = int(cudart.cudaHostUnregister(address))
    if error != _CUDA_SUCCESS:
        logger.warning("cudaHostUnregister failed (error %d)", error)
        _clear_last_error(device)


def _clear_last_error(device: torch.device) -> None:
    """A refused call leaves its error to the check after the next kernel launch: let an idle launch take it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
