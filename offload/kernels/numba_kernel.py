"""The update compiled by numba, for machines without a C++ compiler. Imported only when it is chosen.

Each thread works through its chunk in blocks that stay in its first-level cache: state and gradient of the block
widened to fp32, the update, all narrowed again; so each rule is compiled once. Threads are ours, not numba's (whose
default scheduler ends the process when two Python threads call it at once).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import float32, int64, types, uint8, void
from numba.extending import intrinsic
from torch import Tensor

from offload.kernels import numba_codec as codec
from offload.kernels.arithmetic import denormals_kept
from offload.kernels.numba_codec import jit
from offload.kernels.scalars import Scalars
from offload.kernels.state import BLOCK_NUMEL, STATE_FORMATS, Rounding, State

STAGED_NUMEL = 8 * BLOCK_NUMEL
CHUNK_NUMEL = 1 << 16

_NONE, _FLOAT32, _BFLOAT16, _FLOAT16 = range(4)
_FORMATS = {None: _NONE, torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}
_FP32, _SPLIT16, _BF16, _INT8 = range(4)
_ADAM, _LION, _ADAGRAD, _SGD = range(4)
_RULES = {"adam": _ADAM, "lion": _LION, "adagrad": _ADAGRAD, "sgd": _SGD}


def _type_fma(_typing_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return float32(float32, float32, float32), generate


_fma: Any = intrinsic(_type_fma)


@jit(inline="always")
def _maximum(a, b):
    if a != a or b != b:
        return a + b
    return a if a > b else b


@jit()
def _adam(master, exp_avg, exp_avg_sq, max_exp_avg_sq, grad, s):
    multiplier, l2_decay, param_decay, lerp_weight, beta2 = s[0], s[1], s[2], s[3], s[4]
    one_minus_beta2, sqrt_bias_correction2, eps, neg_step_size = s[5], s[6], s[7], s[8]
    lerp_from_grad = s[9] != np.float32(0)
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


@jit()
def _lion(master, exp_avg, grad, s):
    multiplier, param_decay, one_minus_beta1, one_minus_beta2, neg_lr = s[0], s[1], s[2], s[3], s[4]
    for i in range(master.size):
        m = exp_avg[i]
        towards_grad = grad[i] * multiplier - m
        direction = _fma(one_minus_beta1, towards_grad, m)
        if direction > np.float32(0):
            direction = np.float32(1)
        elif direction < np.float32(0):
            direction = np.float32(-1)
        master[i] = master[i] * param_decay + neg_lr * direction
        exp_avg[i] = _fma(one_minus_beta2, towards_grad, m)


@jit()
def _adagrad(master, total, grad, s):
    multiplier, l2_decay, eps, neg_step_size = s[0], s[1], s[2], s[3]
    for i in range(master.size):
        g = grad[i] * multiplier
        if l2_decay != np.float32(0):
            g = _fma(master[i], l2_decay, g)
        total[i] = _fma(g, g, total[i])
        master[i] = master[i] + neg_step_size * g / (np.sqrt(total[i]) + eps)


@jit()
def _sgd(master, momentum_buffer, has_momentum, grad, s):
    multiplier, l2_decay, momentum, one_minus_dampening, neg_lr = s[0], s[1], s[2], s[3], s[4]
    is_first, nesterov = s[5] != np.float32(0), s[6] != np.float32(0)
    for i in range(master.size):
        g = grad[i] * multiplier
        if l2_decay != np.float32(0):
            g = _fma(master[i], l2_decay, g)
        if has_momentum:
            b = g if is_first else _fma(one_minus_dampening, g, momentum_buffer[i] * momentum)
            momentum_buffer[i] = b
            g = _fma(b, momentum, g) if nesterov else b
        master[i] = _fma(g, neg_lr, master[i])


@jit()
def _part(memory, itemsize, begin, end):
    """Elements begin to end of a buffer of bytes; nothing of an empty one."""
    return memory[begin * itemsize : end * itemsize] if memory.size else memory[:0]


@jit()
def _read_moment(memory, scales, state_format, is_signed, begin, end, row):
    if state_format == _BF16:
        codec.widen(_part(memory, 2, begin, end).view(np.uint16), True, row)
    elif state_format == _INT8:
        block_scales = _part(scales, 4, begin // BLOCK_NUMEL, -(-end // BLOCK_NUMEL)).view(np.float32)
        codes = _part(memory, 1, begin, end)
        if is_signed:
            codec.widen_codes(codes.view(np.int8), block_scales, row)
        else:
            codec.widen_codes(codes, block_scales, row)
    else:
        row[:] = _part(memory, 4, begin, end).view(np.float32)


@jit()
def _write_moment(memory, scales, state_format, is_signed, begin, end, row, random):
    shift = 0 if is_signed else 16
    if state_format == _BF16:
        codec.round_to_bfloat16(row, random, shift, _part(memory, 2, begin, end).view(np.uint16))
    elif state_format == _INT8:
        block_scales = _part(scales, 4, begin // BLOCK_NUMEL, -(-end // BLOCK_NUMEL)).view(np.float32)
        codec.narrow_to_codes(row, random, shift, is_signed, _part(memory, 1, begin, end), block_scales)
    else:
        _part(memory, 4, begin, end).view(np.float32)[:] = row


_BYTES, _F32 = types.Array(uint8, 1, "C"), types.Array(float32, 1, "C")


@jit([void(int64, int64, *[_BYTES] * 7, int64, _BYTES, int64, _F32, int64, int64, int64, int64, int64)], cache=True)
def _update_range(
    rule, state_format, master, first, second, max_second, first_scale, second_scale, grad, grad_format, param,
    param_format, scalars, key0, key1, first_index, begin, end,
):  # fmt: skip
    """Buffers are bytes; those that a rule or format doesn't have are empty. begin is a multiple of the block."""
    rows = np.empty((3, STAGED_NUMEL), np.float32)
    random = np.zeros(STAGED_NUMEL, np.uint32)
    has_first, has_second = first.size > 0, second.size > 0
    for start in range(begin, end, STAGED_NUMEL):
        stop = min(start + STAGED_NUMEL, end)
        size = stop - start
        g, m, v = rows[0, :size], rows[1, :size], rows[2, :size]
        if grad_format == _FLOAT32:
            g[:] = _part(grad, 4, start, stop).view(np.float32)
        else:
            codec.widen(_part(grad, 2, start, stop).view(np.uint16), grad_format == _BFLOAT16, g)
        if has_first:
            _read_moment(first, first_scale, state_format, True, start, stop, m)
        if has_second:
            _read_moment(second, second_scale, state_format, False, start, stop, v)
        if state_format == _FP32:
            p = _part(master, 4, start, stop).view(np.float32)
        else:
            p = np.empty(size, np.float32)
            halves, remainder = _part(param, 2, start, stop).view(np.uint16), _part(master, 2, start, stop)
            codec.join_master(halves, remainder.view(np.int16), v, has_second, p)
        if rule == _ADAM:
            _adam(p, m, v, _part(max_second, 4, start, stop).view(np.float32), g, scalars)
        elif rule == _LION:
            _lion(p, m, g, scalars)
        elif rule == _ADAGRAD:
            _adagrad(p, v, g, scalars)
        else:
            _sgd(p, m, has_first, g, scalars)
        if state_format >= _BF16:
            codec.fill_random(first_index + start, key0, key1, random[:size])
        if state_format != _FP32:
            # Codes have no sign to spare for ties.
            ties = has_second and state_format != _INT8
            codec.split_master(p, halves, remainder.view(np.int16), v, ties)
        elif param_format == _FLOAT32:
            _part(param, 4, start, stop).view(np.float32)[:] = p
        elif param_format == _BFLOAT16:
            codec.narrow_bfloat16(p, _part(param, 2, start, stop).view(np.uint16))
        elif param_format == _FLOAT16:
            codec.narrow_float16(p, _part(param, 2, start, stop).view(np.uint16))
        if has_first:
            _write_moment(first, first_scale, state_format, True, start, stop, m, random)
        if has_second:
            _write_moment(second, second_scale, state_format, False, start, stop, v, random)


_EMPTY = np.empty(0, np.uint8)


def _memory(tensor: Tensor | None) -> Any:
    """The tensor's bytes."""
    return _EMPTY if tensor is None else tensor.detach().view(torch.uint8).numpy()


@functools.lru_cache(maxsize=8)
def _helpers(_process_id: int, num_helpers: int) -> ThreadPoolExecutor:
    """Per process: threads don't survive a fork."""
    return ThreadPoolExecutor(num_helpers, thread_name_prefix="offload-update")


def step(
    state: State, grad: Tensor, param: Tensor | None, scalars: Scalars, rounding: Rounding, num_threads: int
) -> None:
    """One step over checked CPU tensors."""
    with denormals_kept():
        packed = np.array(scalars.to_list(), np.float32)
    work = functools.partial(
        _update_range,
        *(_RULES[scalars.rule], STATE_FORMATS.index(state.format), *map(_memory, state.tensors())),
        *(_memory(grad), _FORMATS[grad.dtype], _memory(param), _FORMATS[None if param is None else param.dtype]),
        *(packed, *rounding.words),
    )
    numel = state.numel
    chunk_numel = CHUNK_NUMEL if state.format != "int8" else -(-CHUNK_NUMEL // BLOCK_NUMEL) * BLOCK_NUMEL

    def run(share: range) -> None:
        with denormals_kept():
            for begin in share:
                work(begin, min(begin + chunk_numel, numel))

    begins = range(0, numel, chunk_numel)
    num_helpers = min(num_threads, len(begins)) - 1
    if num_helpers < 1:
        run(begins)
        return
    shares = [begins[first :: num_helpers + 1] for first in range(num_helpers + 1)]
    helping = [_helpers(os.getpid(), num_helpers).submit(run, share) for share in shares[1:]]
    run(shares[0])
    for future in helping:
        future.result()
