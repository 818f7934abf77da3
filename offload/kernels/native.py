"""The compiled kernel, csrc/cpu_adam, through its C ABI. ctypes releases the GIL for the length of each call."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.kernels import affinity
from offload.kernels.arithmetic import denormals_kept
from offload.kernels.scalars import AdamScalars
from offload.kernels.self_test import agree

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).resolve().parent.parent / "_cpu_adam.so"
ABI_VERSION = 2  # offload_adam_abi_version() of csrc/cpu_adam/adam.cpp
ISA_CODES = {"avx512": 2, "avx2": 1, "scalar": 0}  # best first
FORMAT_CODES = {None: -1, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Elements handed to a thread at a time. A multiple of the kernel's block of 64, so that no chunk but the last has a
# scalar tail and streaming stores stay aligned; small enough to share out evenly.
CHUNK_NUMEL = 1 << 16


class _Scalars(ctypes.Structure):
    """csrc/cpu_adam/scalars.h, whose fields are those of :class:`AdamScalars`, in order."""

    _fields_ = [
        *((name, ctypes.c_float) for name in AdamScalars.__slots__[:-1]),
        ("lerp_from_grad", ctypes.c_int32),
    ]


@functools.lru_cache(maxsize=256)
def _pack(scalars: AdamScalars) -> _Scalars:
    with denormals_kept():  # a conversion from double, even of a value that fits, is arithmetic too
        return _Scalars(*(getattr(scalars, name) for name in AdamScalars.__slots__))


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


BoundStep = Callable[[AdamScalars, int], None]


class NativeKernel:
    """A loaded library and the instruction sets it may use on this processor, best first."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, c_int, c_size_t = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._step = library.offload_adam_step
        self._step.argtypes = [
            *(c_int, pointer, pointer, pointer, pointer),  # isa, master, exp_avg, exp_avg_sq, max_exp_avg_sq
            *(pointer, c_int, pointer, c_int),  # grad and its format, param_out and its format
            *(c_size_t, ctypes.POINTER(_Scalars), c_int, c_size_t),  # numel, scalars, num_threads, chunk_numel
        ]
        self._stream = library.offload_adam_stream
        self._stream.argtypes = [c_int, *[pointer] * 4, c_size_t, c_int, c_size_t]
        self._zero = library.offload_zero
        self._zero.argtypes = [pointer, c_size_t, c_int, c_size_t]
        self._zero.restype = None
        self._bind_threads = library.offload_bind_threads
        self._bind_threads.argtypes = [ctypes.POINTER(c_int), c_int]
        self._bound_cpus: tuple[int, ...] | None = None
        self.isas: tuple[str, ...] = tuple(
            isa for isa, code in ISA_CODES.items() if library.offload_adam_supports(code)
        )

    def step(
        self,
        isa: str,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        param_out: Tensor | None,
        max_exp_avg_sq: Tensor | None,
        scalars: AdamScalars,
        num_threads: int,
    ) -> None:
        """One step over checked CPU tensors."""
        self.bind(isa, master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq)(scalars, num_threads)

    def bind(
        self,
        isa: str,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        param_out: Tensor | None,
        max_exp_avg_sq: Tensor | None,
    ) -> BoundStep:
        """A step over checked CPU tensors that are packed already: called with scalars and a number of threads.

        It knows addresses only: the caller keeps the tensors alive.
        """
        call, grad_dtype = self._step, grad.dtype
        arguments = (
            ctypes.c_int(ISA_CODES[isa]),
            *(_address(tensor) for tensor in (master, exp_avg, exp_avg_sq, max_exp_avg_sq, grad)),
            ctypes.c_int(FORMAT_CODES[grad_dtype]),
            _address(param_out),
            ctypes.c_int(FORMAT_CODES[None if param_out is None else param_out.dtype]),
            ctypes.c_size_t(master.numel()),
        )

        def step(scalars: AdamScalars, num_threads: int) -> None:
            self._follow_affinity(num_threads)
            status = call(*arguments, _pack(scalars), num_threads, CHUNK_NUMEL)
            assert status == 0, f"the compiled kernel refused isa {isa}, grad {grad_dtype}"

        return step

    def stream(
        self, isa: str, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, num_threads: int
    ) -> None:
        """Reads and writes what a step over checked fp32 CPU tensors does, 28 bytes per element, and computes nothing.

        The limit that a step is measured against (bench/cpu_adam.py). Changes all but ``grad`` a little.
        """
        self._follow_affinity(num_threads)
        addresses = map(_address, (master, exp_avg, exp_avg_sq, grad))
        status = self._stream(ISA_CODES[isa], *addresses, master.numel(), num_threads, CHUNK_NUMEL)
        assert status == 0, f"the compiled kernel refused isa {isa}"

    def zero_(self, row: Tensor, num_threads: int) -> None:
        """Zeros a contiguous CPU tensor, each page by the thread whose share of an update it is in."""
        self._follow_affinity(num_threads)
        self._zero(_address(row), row.nbytes, num_threads, CHUNK_NUMEL * row.itemsize)

    def _follow_affinity(self, num_threads: int) -> None:
        """Binds the threads as the user chose since; a thread that works alone isn't bound."""
        if num_threads == 1:
            return
        cpus = affinity.cpu_affinity()
        if cpus != self._bound_cpus:
            status = self._bind_threads((ctypes.c_int * len(cpus or ()))(*(cpus or ())), len(cpus or ()))
            if status != 0:
                raise ValueError(
                    f"the processors {cpus} can't be bound to: their numbers are beyond the system's range"
                )
            self._bound_cpus = cpus


def _open(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


@functools.cache
def load() -> NativeKernel | None:
    """The compiled kernel after its self-test, or None, with one log line that says why and how to get it."""
    try:
        library = _open(str(LIBRARY))
        version = library.offload_adam_abi_version()
    except (OSError, AttributeError) as error:
        _say_missing(f"not loaded ({error})")
        return None
    if version != ABI_VERSION:
        _say_missing(f"of another version (ABI {version}, this package needs {ABI_VERSION})")
        return None
    kernel = NativeKernel(library)
    trusted = tuple(isa for isa in kernel.isas if isa == "scalar" or agrees_with_scalar(kernel, isa))
    for isa in set(kernel.isas) - set(trusted):
        logger.warning("The %s kernel gives other bits than the scalar one on this machine and is not used.", isa)
    kernel.isas = trusted
    return kernel


def _say_missing(why: str) -> None:
    logger.warning(
        "The compiled CPU kernel %s is %s; numba or torch serve instead, with the same results. To build it, install a "
        "C++ compiler and run: pip install --no-cache-dir --force-reinstall --no-deps <this package>",
        LIBRARY.name,
        why,
    )


def agrees_with_scalar(kernel: NativeKernel, isa: str) -> bool:
    """Whether an instruction set's path gives the bits of the scalar one."""

    def step(isa: str, *arguments: Any) -> None:
        master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq, scalars = arguments
        kernel.step(isa, master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq, scalars, 1)

    return agree(partial(step, isa), partial(step, "scalar"), "cpu")
