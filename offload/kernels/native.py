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
from offload.kernels.scalars import Scalars
from offload.kernels.self_test import agree
from offload.kernels.state import BLOCK_NUMEL, STATE_FORMATS, Rounding, State

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).resolve().parent.parent / "_cpu_adam.so"
ABI_VERSION = 3  # offload_adam_abi_version() of csrc/cpu_adam/adam.cpp
ISA_CODES = {"avx512": 2, "avx2": 1, "scalar": 0}  # best first
RULE_CODES = {"adam": 0, "lion": 1, "adagrad": 2, "sgd": 3}
STATE_CODES = {name: code for code, name in enumerate(STATE_FORMATS)}
FORMAT_CODES = {None: -1, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Elements handed to a thread at a time. A multiple of the kernel's blocks, so that no chunk but the last has a scalar
# tail and streaming stores stay aligned; small enough to share out evenly.
CHUNK_NUMEL = 1 << 16


_POINTERS = (*State.__slots__[1:], "grad", "param")


class _Work(ctypes.Structure):
    """struct OffloadWork of csrc/cpu_adam/adam.cpp: what of an update is the same at every step."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("isa", "rule", "state_format", "grad_format", "param_format")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_size_t) for name in ("numel", "chunk_numel")),
    ]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# Called with the scalars, the rounding and the number of threads of one step.
BoundUpdate = Callable[[Scalars, Rounding, int], None]


class NativeKernel:
    """A loaded library and the instruction sets it may use on this processor, best first."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, c_int, c_size_t = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._update = library.offload_update
        # Work, scalars, key and first index of Rounding, threads: few and of plain types, for calls over few elements.
        self._update.argtypes = [pointer, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32, c_int]
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
        state: State,
        grad: Tensor,
        param: Tensor | None,
        scalars: Scalars,
        rounding: Rounding,
        num_threads: int,
    ) -> None:
        """One step over checked CPU tensors."""
        self.bind(isa, scalars.rule, state, grad, param)(scalars, rounding, num_threads)

    def bind(self, isa: str, rule: str, state: State, grad: Tensor, param: Tensor | None) -> BoundUpdate:
        """An update by a rule over checked CPU tensors that are packed already.

        It knows addresses only: the caller keeps the tensors alive.
        """
        call, kinds = self._update, (isa, rule, state.format, grad.dtype)
        addresses = dict(zip(_POINTERS, map(_address, (*state.tensors(), grad, param)), strict=True))
        work = _Work(
            isa=ISA_CODES[isa],
            rule=RULE_CODES[rule],
            state_format=STATE_CODES[state.format],
            grad_format=FORMAT_CODES[grad.dtype],
            param_format=FORMAT_CODES[None if param is None else param.dtype],
            numel=state.numel,
            chunk_numel=_chunk_numel(state),
            **addresses,
        )
        reference = ctypes.byref(work)  # keeps it alive

        def update(scalars: Scalars, rounding: Rounding, num_threads: int) -> None:
            if num_threads != 1:  # a thread that works alone isn't bound
                self._follow_affinity()
            status = call(reference, scalars.packed, rounding.key, rounding.first_index, num_threads)
            assert status == 0, f"the compiled kernel refused {kinds}"

        return update

    def stream(
        self, isa: str, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, num_threads: int
    ) -> None:
        """Reads and writes what a step over checked fp32 CPU tensors does, 28 bytes per element, and computes nothing.

        The limit that a step is measured against (bench/cpu_adam.py). Changes all but ``grad`` a little.
        """
        self._follow_affinity()
        addresses = map(_address, (master, exp_avg, exp_avg_sq, grad))
        status = self._stream(ISA_CODES[isa], *addresses, master.numel(), num_threads, CHUNK_NUMEL)
        assert status == 0, f"the compiled kernel refused isa {isa}"

    def zero_(self, row: Tensor, num_threads: int) -> None:
        """Zeros a contiguous CPU tensor, each page by the thread whose share of an update it is in."""
        self._follow_affinity()
        self._zero(_address(row), row.nbytes, num_threads, CHUNK_NUMEL * row.itemsize)

    def _follow_affinity(self) -> None:
        """Binds the threads of the following calls as the user chose since."""
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


def _chunk_numel(state: State) -> int:
    """CHUNK_NUMEL, as blocks that share a scale are not cut."""
    return CHUNK_NUMEL if state.format != "int8" else -(-CHUNK_NUMEL // BLOCK_NUMEL) * BLOCK_NUMEL


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

    def step(isa: str, *trial: Any) -> None:
        state, grad, param, scalars, rounding = trial
        kernel.step(isa, state, grad, param, scalars, rounding, 1)

    return agree(partial(step, isa), partial(step, "scalar"), "cpu")
