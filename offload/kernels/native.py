"""The compiled kernel, csrc/cpu_adam, through its C ABI. ctypes releases the GIL for the length of each call."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from offload.kernels.arithmetic import denormals_kept
from offload.kernels.scalars import AdamScalars

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).resolve().parent.parent / "_cpu_adam.so"
ABI_VERSION = 1  # offload_adam_abi_version() of csrc/cpu_adam/adam.cpp
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


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
        status = self._step(
            ISA_CODES[isa],
            master.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            _address(max_exp_avg_sq),
            grad.data_ptr(),
            FORMAT_CODES[grad.dtype],
            _address(param_out),
            FORMAT_CODES[None if param_out is None else param_out.dtype],
            master.numel(),
            _pack(scalars),
            num_threads,
            CHUNK_NUMEL,
        )
        assert status == 0, f"the compiled kernel refused isa {isa}, grad {grad.dtype}"


@functools.cache
def load() -> NativeKernel | None:
    """The compiled kernel after its self-test, or None, with one log line that says why and how to get it."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
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
    """The self-test: the same bits as the scalar path on values chosen to differ if anything can."""
    scalars = AdamScalars.at_step(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=3, decoupled=True, grad_scale=0.37
    )
    return all(
        _same_bits(_trial(kernel, isa, dtype, scalars), _trial(kernel, "scalar", dtype, scalars))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def _trial(kernel: NativeKernel, isa: str, dtype: torch.dtype, scalars: AdamScalars) -> list[Tensor]:
    """One amsgrad step over every pairing of special values, gradient and copy in ``dtype``."""
    special = [0.0, -0.0, 1e-45, -1e-42, 1.17e-38, 3e-23, 1 / 3, -1.0, 65519.0, 3.3e38, float("inf"), float("nan")]
    values = torch.tensor(special, dtype=torch.float32)
    count = len(special)
    master = values.repeat(count * count)
    exp_avg = values.repeat_interleave(count).repeat(count)
    grad = values.repeat_interleave(count * count)
    exp_avg_sq, max_exp_avg_sq = exp_avg.roll(7).abs(), master.roll(5).abs()
    param_out = torch.empty_like(master, dtype=dtype)
    kernel.step(isa, master, exp_avg, exp_avg_sq, grad.to(dtype), param_out, max_exp_avg_sq, scalars, 1)
    return [master, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out]


def _same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """NaN equals NaN: which NaN an operation makes isn't part of IEEE-754."""
    integer = {4: torch.int32, 2: torch.int16}
    return all(
        bool(((a.view(integer[a.itemsize]) == b.view(integer[b.itemsize])) | (a.isnan() & b.isnan())).all())
        for a, b in zip(ours, theirs, strict=True)
    )
