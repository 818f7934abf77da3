"""CUDA: the one file of the runtime that knows it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

from offload.accelerators.base import Accelerator, round_up_to_page

logger = logging.getLogger(__name__)

_CUDA_SUCCESS = 0


class CudaAccelerator(Accelerator):
    """A CUDA device. Pins exactly what was asked for; torch's allocator rounds up to a power of two."""

    _has_warned = False

    def pinned_empty(self, num_bytes: int) -> Tensor:
        """Page-locked host memory, uninitialised: a 1-D uint8 CPU tensor of ``num_bytes`` rounded up to a page.

        Where CUDA refuses to register it (memlock limit, container), torch's own pinned allocator is asked instead.
        """
        num_bytes = round_up_to_page(num_bytes)
        pages = mmap.mmap(-1, num_bytes)  # anonymous, page-aligned
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        with torch.cuda.device(self.device):
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            error = int(cudart.cudaHostRegister(address, num_bytes, 0))
        if error == _CUDA_SUCCESS:
            return _tensor_over(pages, cudart, address)
        if not CudaAccelerator._has_warned:
            CudaAccelerator._has_warned = True
            logger.warning(
                "cudaHostRegister refused %d bytes (error %d); using torch's pinned allocator, which may hold up to "
                "twice as much",
                num_bytes,
                error,
            )
        return super().pinned_empty(num_bytes)


def _tensor_over(pages: mmap.mmap, cudart: Any, address: int) -> Tensor:
    """A tensor that keeps ``pages`` alive, and unregisters them when its storage dies.

    The storage holds the ctypes buffer, the buffer holds the mapping; every view of the tensor holds the storage. The
    finalizer runs before the mapping goes, and not at exit, when CUDA may be gone already.
    """
    buffer = (ctypes.c_uint8 * len(pages)).from_buffer(pages)
    weakref.finalize(buffer, _unregister, cudart, address).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _unregister(cudart: Any, address: int) -> None:
    error = int(cudart.cudaHostUnregister(address))
    if error != _CUDA_SUCCESS:
        logger.warning("cudaHostUnregister failed (error %d)", error)
