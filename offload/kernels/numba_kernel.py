"""The update compiled by numba, for machines without a C++ compiler. Imported only when it is chosen.

Each thread works through its chunk in blocks that stay in its first-level cache: gradients of the block widened to
fp32, the update, the copy narrowed; so the update itself is compiled once. Threads are ours, not numba's (whose
default scheduler ends the process when two Python threads call it at once).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, int64, types, uint16, void
from numba.extending import intrinsic
from torch import Tensor

from offload.kernels.arithmetic import denormals_kept
from offload.kernels.scalars import AdamScalars

BLOCK_NUMEL = 1024
CHUNK_NUMEL = 1 << 16

_NONE, _FLOAT32, _BFLOAT16, _FLOAT16 = range(4)
_FORMATS = {None: _NONE, torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}

# error_model: division by zero gives infinity. No fastmath: LLVM then contracts and reorders nothing.
_jit: Callable[..., Any] = functools.partial(numba.njit, nogil=True, error_model="numpy", cache=True)


def _type_fma(_typing_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return float32(float32, float32, float32), generate


_fma: Any = intrinsic(_type_fma)


@_jit(inline="always")
def _maximum(a, b):  # type: ignore[no-untyped-def]
    if a != a or b != b:
        return a + b
    return a if a > b else b


@_jit()
def _widen(source, is_bfloat16, target):  # type: ignore[no-untyped-def]
    bits = target.view(np.uint32)
    if is_bfloat16:
        for i in range(source.size):
            bits[i] = np.uint32(source[i]) << np.uint32(16)
        return
    for i in range(source.size):
        half = np.uint32(source[i])
        bits[i] = (half & np.uint32(0x7FFF)) << np.uint32(13)
        target[i] *= np.float32(2.0**112)  # rebias the exponent; exact for denormals too
        if half & np.uint32(0x7C00) == np.uint32(0x7C00):
            bits[i] |= np.uint32(0x7F800000)  # infinity or NaN
        bits[i] |= (half & np.uint32(0x8000)) << np.uint32(16)


@_jit()
def _narrow_bfloat16(source, target):  # type: ignore[no-untyped-def]
    bits = source.view(np.uint32)
    for i in range(source.size):
        word = bits[i]
        rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        target[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@_jit()
def _narrow_float16(source, target):  # type: ignore[no-untyped-def]
    bits = source.view(np.uint32)
    scratch = np.empty(1, np.float32)
    scratch_bits = scratch.view(np.uint32)
    for i in range(source.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude > np.uint32(0x7F800000):
            half = np.uint32(0x7E00)
        elif magnitude >= np.uint32(0x477FF000):  # 65520 and more round to infinity
            half = np.uint32(0x7C00)
        elif magnitude < np.uint32(0x38800000):  # denormal in half precision: adding 0.5 rounds to multiples of 2**-24
            scratch_bits[0] = magnitude
            scratch[0] += np.float32(0.5)
            half = scratch_bits[0] - np.uint32(0x3F000000)
        else:  # rebias the exponent by -112, round to nearest even
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            half = (magnitude - np.uint32(0x37FFF001) + odd) >> np.uint32(13)
        target[i] = np.uint16(half | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))


@_jit()
def _update(master, exp_avg, exp_avg_sq, max_exp_avg_sq, grad, s, lerp_from_grad):  # type: ignore[no-untyped-def]
    multiplier, l2_decay, param_decay, lerp_weight, beta2 = s[0], s[1], s[2], s[3], s[4]
    one_minus_beta2, sqrt_bias_correction2, eps, neg_step_size = s[5], s[6], s[7], s[8]
    amsgrad = max_exp_avg_sq.size > 0
    for i in range(master.size):
        param = master[i]
        g = grad[i] * multiplier
        if l2_decay != np.float32(0):
            g = _fma(param, l2_decay, g)
        m = exp_avg[i]
        m = _fma(lerp_weight, g - m, g if lerp_from_grad else m)
        v = _fma(one_minus_beta2 * g, g, exp_avg_sq[i] * beta2)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        if amsgrad:
            v = _maximum(max_exp_avg_sq[i], v)
            max_exp_avg_sq[i] = v
        denominator = np.sqrt(v) / sqrt_bias_correction2 + eps
        master[i] = param * param_decay + neg_step_size * m / denominator


_F32, _U16 = types.Array(float32, 1, "C"), types.Array(uint16, 1, "C")


@_jit([void(_F32, _F32, _F32, _F32, _F32, _U16, int64, _F32, _U16, int64, _F32, types.boolean, int64, int64)])
def _update_range(  # type: ignore[no-untyped-def]
    master, exp_avg, exp_avg_sq, max_exp_avg_sq, grad32, grad16, grad_format, out32, out16, out_format,
    scalars, lerp_from_grad, begin, end,
):  # fmt: skip
    """Arrays that a format or amsgrad doesn't need are empty."""
    widened = np.empty(BLOCK_NUMEL, np.float32)
    for start in range(begin, end, BLOCK_NUMEL):
        stop = min(start + BLOCK_NUMEL, end)
        if grad_format == _FLOAT32:
            grad = grad32[start:stop]
        else:
            grad = widened[: stop - start]
            _widen(grad16[start:stop], grad_format == _BFLOAT16, grad)
        block = master[start:stop]
        _update(
            block, exp_avg[start:stop], exp_avg_sq[start:stop], max_exp_avg_sq[start:stop], grad, scalars,
            lerp_from_grad,
        )  # fmt: skip
        if out_format == _FLOAT32:
            out32[start:stop] = block
        elif out_format == _BFLOAT16:
            _narrow_bfloat16(block, out16[start:stop])
        elif out_format == _FLOAT16:
            _narrow_float16(block, out16[start:stop])


def _arrays(tensor: Tensor | None) -> tuple[Any, Any]:
    """The tensor's memory as (fp32, bits of 16-bit floats), one of the two empty."""
    empty32, empty16 = np.empty(0, np.float32), np.empty(0, np.uint16)
    if tensor is None:
        return empty32, empty16
    if tensor.dtype == torch.float32:
        return tensor.detach().numpy(), empty16
    return empty32, tensor.detach().view(torch.int16).numpy().view(np.uint16)


@functools.lru_cache(maxsize=8)
def _helpers(_process_id: int, num_helpers: int) -> ThreadPoolExecutor:
    """Per process: threads don't survive a fork."""
    return ThreadPoolExecutor(num_helpers, thread_name_prefix="offload-adam")


def step(
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
    *fp32_scalars, lerp_from_grad = scalars.to_list()
    with denormals_kept():
        packed = np.array(fp32_scalars, np.float32)
    buffers = [_arrays(tensor)[0] for tensor in (master, exp_avg, exp_avg_sq, max_exp_avg_sq)]
    formats = _FORMATS[grad.dtype], _FORMATS[None if param_out is None else param_out.dtype]
    work = functools.partial(
        _update_range,
        *buffers,
        *(*_arrays(grad), formats[0], *_arrays(param_out), formats[1]),
        *(packed, bool(lerp_from_grad)),
    )
    numel = master.numel()

    def run(share: range) -> None:
        with denormals_kept():
            for begin in share:
                work(begin, min(begin + CHUNK_NUMEL, numel))

    begins = range(0, numel, CHUNK_NUMEL)
    num_helpers = min(num_threads, len(begins)) - 1
    if num_helpers < 1:
        run(begins)
        return
    shares = [begins[first :: num_helpers + 1] for first in range(num_helpers + 1)]
    helping = [_helpers(os.getpid(), num_helpers).submit(run, share) for share in shares[1:]]
    run(shares[0])
    for future in helping:
        future.result()
