"""The update on accelerators that triton compiles for. Imported only when it is chosen.

Every operation is one that rounds once and to nearest; contraction is off, so that no product and sum are fused that
csrc/cpu_adam/rules.inl doesn't fuse. A program works on some blocks of the state, one a row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.scalars import Scalars
from offload.kernels.state import BLOCK_NUMEL, Rounding, State, num_blocks

NUM_ROWS = 8  # blocks of BLOCK_NUMEL elements a program


# bfloat16 is converted in integers, as in every implementation: triton's interpreter truncates, and loses denormals.
@triton.jit
def _to_float32(x):
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  triton compiles both ends of a function that returns early
        return x.to(tl.float32)


@triton.jit
def _is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _bfloat16_bits(bits, threshold):
    rounded = tl.where(_is_nan(bits), 0x7FC0, (bits + threshold) >> 16)
    return rounded.to(tl.uint16)


@triton.jit
def _to_bfloat16(x):
    bits = x.to(tl.uint32, bitcast=True)
    return _bfloat16_bits(bits, 0x7FFF + ((bits >> 16) & 1)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full(x.shape, 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full(x.shape, 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _random_bits(at, key0, key1, first_index):
    index = at.to(tl.uint32) + (first_index + key0).to(tl.uint32)
    return _mix(index) ^ key1.to(tl.uint32)


@triton.jit
def _join_master(param, remainder, second):
    low = remainder.to(tl.int32).to(tl.uint32, bitcast=True) + (second.to(tl.uint32, bitcast=True) >> 31)
    high = param.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return (high + low).to(tl.float32, bitcast=True)


@triton.jit
def _split_master(master):
    """(bfloat16, int16 remainder, 1 where that is one too small)"""
    bits = master.to(tl.uint32, bitcast=True)
    high = _bfloat16_bits(bits, 0x7FFF + ((bits >> 16) & 1))
    dropped = (bits - (high.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
    dropped = tl.where(_is_nan(bits), 0, dropped)
    is_tie = dropped > 0x7FFF
    return high.to(tl.bfloat16, bitcast=True), tl.where(is_tie, 0x7FFF, dropped).to(tl.int16), is_tie.to(tl.uint32)


@triton.jit
def _load_moment(ptr, scale_ptr, at, inside, rows, rows_inside, is_int8: tl.constexpr):
    if is_int8:
        code = tl.load(ptr + at, inside, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + rows, rows_inside, other=0.0)
        return (code * tl.abs(code)).to(tl.float32) * scale
    else:  # noqa: RET505
        return _to_float32(tl.load(ptr + at, inside, other=0.0))


@triton.jit
def _store_moment(
    ptr, scale_ptr, at, inside, rows, rows_inside, x, random, is_int8: tl.constexpr, largest_code: tl.constexpr
):
    bits = x.to(tl.uint32, bitcast=True)
    if is_int8:
        magnitude_bits = tl.where(inside, bits & 0x7FFFFFFF, 0).to(tl.int32, bitcast=True)
        largest_bits = tl.max(magnitude_bits, axis=1, keep_dims=True)
        largest = largest_bits.to(tl.float32, bitcast=True)
        is_finite = largest_bits < 0x7F800000
        is_coded = is_finite & (largest >= 1.262177448353619e-29)  # 2**-96
        top = tl.full(largest.shape, largest_code * largest_code, tl.float32)
        scale = tl.div_rn(tl.where(is_coded, largest, 1.0), top)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        square = tl.where(is_coded, magnitude_bits.to(tl.float32, bitcast=True), 0.0) * inverse
        below = tl.sqrt_rn(square).to(tl.int32)
        threshold = (random & 0xFFFF).to(tl.int32).to(tl.float32) * 1.52587890625e-05  # 2**-16
        excess = square - (below * below).to(tl.float32)
        code = below + (excess > threshold * (2 * below + 1).to(tl.float32)).to(tl.int32)
        code = tl.minimum(code, largest_code)
        if largest_code == 127:
            code = tl.where((bits >> 31) != 0, -code, code)
        else:  # of a second moment only zero is stored as zero: it divides
            code = tl.where((code == 0) & is_coded & (magnitude_bits != 0), 1, code)
        tl.store(ptr + at, code.to(ptr.dtype.element_ty), inside)
        scale = tl.where(is_coded, scale, tl.where(is_finite, 0.0, float("nan")))
        tl.store(scale_ptr + rows, scale, rows_inside)
    elif ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr + at, _bfloat16_bits(bits, random & 0xFFFF).to(tl.bfloat16, bitcast=True), inside)
    else:
        tl.store(ptr + at, x, inside)


@triton.jit
def _adam(param, m, v, max_v, g, s2, s3, s4, s5, s6, s7, s8, from_grad: tl.constexpr, amsgrad: tl.constexpr):
    """param_decay, lerp_weight, beta2, one_minus_beta2, sqrt_bias_correction2, eps, neg_step_size"""
    m = tl.fma(tl.full(m.shape, s3, tl.float32), g - m, g if from_grad else m)
    v = tl.fma(s5 * g, g, v * s4)
    if amsgrad:
        unordered = (max_v != max_v) | (v != v)
        max_v = tl.where(unordered, max_v + v, tl.where(max_v > v, max_v, v))
    else:
        max_v = v
    root = tl.div_rn(tl.sqrt_rn(max_v), tl.full(v.shape, s6, tl.float32))
    return param * s2 + tl.div_rn(s8 * m, root + s7), m, v, max_v


@triton.jit
def _lion(param, m, g, s1, s2, s3, s4):
    """param_decay, one_minus_beta1, one_minus_beta2, neg_lr"""
    towards_grad = g - m
    direction = tl.fma(tl.full(m.shape, s2, tl.float32), towards_grad, m)
    direction = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction))
    return param * s1 + s4 * direction, tl.fma(tl.full(m.shape, s3, tl.float32), towards_grad, m)


@triton.jit
def _sgd(param, m, g, s2, s3, s4, is_first: tl.constexpr, nesterov: tl.constexpr, has_momentum: tl.constexpr):
    """momentum, one_minus_dampening, neg_lr"""
    if has_momentum:
        m = g if is_first else tl.fma(tl.full(m.shape, s3, tl.float32), g, m * s2)
        g = tl.fma(m, tl.full(m.shape, s2, tl.float32), g) if nesterov else m
    return tl.fma(g, tl.full(g.shape, s4, tl.float32), param), m


# Not specialised on numel and what changes with every step: each new residue would compile anew, in training.
@triton.jit(do_not_specialize=["numel", "key0", "key1", "first_index"])
def _update_kernel(
    master_ptr, first_ptr, second_ptr, max_second_ptr, first_scale_ptr, second_scale_ptr, grad_ptr, param_ptr,
    numel, num_scales, key0, key1, first_index, s0, s1, s2, s3, s4, s5, s6, s7, s8,
    rule: tl.constexpr, flag0: tl.constexpr, flag1: tl.constexpr, has_l2: tl.constexpr, has_first: tl.constexpr,
    has_second: tl.constexpr, has_max: tl.constexpr, has_param: tl.constexpr, is_compact: tl.constexpr,
    is_int8: tl.constexpr, num_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * num_rows + tl.arange(0, num_rows)[:, None]
    at = rows * block + tl.arange(0, block)[None, :]
    inside, rows_inside = at < numel, rows < num_scales
    g = _to_float32(tl.load(grad_ptr + at, inside, other=0.0)) * s0
    m, v, max_v = g, g, g
    if has_first:
        m = _load_moment(first_ptr, first_scale_ptr, at, inside, rows, rows_inside, is_int8)
    if has_second:
        v = _load_moment(second_ptr, second_scale_ptr, at, inside, rows, rows_inside, is_int8)
    if has_max:
        max_v = tl.load(max_second_ptr + at, inside, other=0.0)
    if is_compact:
        high, remainder = tl.load(param_ptr + at, inside, other=0.0), tl.load(master_ptr + at, inside, other=0)
        signs = v if has_second else tl.full(g.shape, 0.0, tl.float32)
        param = _join_master(high, remainder, signs)
        v = (v.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    else:
        param = tl.load(master_ptr + at, inside, other=0.0)

    if has_l2:
        g = tl.fma(param, tl.full(param.shape, s1, tl.float32), g)
    if rule == "adam":
        param, m, v, max_v = _adam(param, m, v, max_v, g, s2, s3, s4, s5, s6, s7, s8, flag0, has_max)
    elif rule == "lion":
        param, m = _lion(param, m, g, s1, s2, s3, s4)
    elif rule == "adagrad":
        v = tl.fma(g, g, v)
        param = param + tl.div_rn(s3 * g, tl.sqrt_rn(v) + s2)
    else:
        param, m = _sgd(param, m, g, s2, s3, s4, flag0, flag1, has_first)

    random = tl.zeros(g.shape, tl.uint32)
    if is_int8 or (is_compact and first_ptr.dtype.element_ty == tl.bfloat16):
        random = _random_bits(at, key0, key1, first_index)
    if is_compact:
        high, remainder, tie = _split_master(param)
        tl.store(param_ptr + at, high, inside)
        tl.store(master_ptr + at, remainder, inside)
        if not is_int8:
            v = (v.to(tl.uint32, bitcast=True) | (tie << 31)).to(tl.float32, bitcast=True)
    else:
        tl.store(master_ptr + at, param, inside)
        if has_param:
            if param_ptr.dtype.element_ty == tl.bfloat16:
                tl.store(param_ptr + at, _to_bfloat16(param), inside)
            else:
                tl.store(param_ptr + at, param.to(param_ptr.dtype.element_ty), inside)
    if has_first:
        _store_moment(first_ptr, first_scale_ptr, at, inside, rows, rows_inside, m, random, is_int8, 127)
    if has_second:
        _store_moment(second_ptr, second_scale_ptr, at, inside, rows, rows_inside, v, random >> 16, is_int8, 255)
    if has_max:
        tl.store(max_second_ptr + at, max_v, inside)


def step(state: State, grad: Tensor, param: Tensor | None, scalars: Scalars, rounding: Rounding) -> None:
    """One step over checked tensors of one device, enqueued on its current stream."""
    values = scalars.to_list()
    num_floats = {"adam": 9, "lion": 5, "adagrad": 4, "sgd": 5}[scalars.rule]
    floats, flags = values[:num_floats], [bool(flag) for flag in values[num_floats:]]
    floats += [0.0] * (9 - num_floats)
    flags += [False] * (2 - len(flags))
    how: dict[str, Any] = {
        "rule": scalars.rule,
        "flag0": flags[0],
        "flag1": flags[1],
        "has_l2": scalars.rule != "lion" and floats[1] != 0,
        "has_first": state.first is not None,
        "has_second": state.second is not None,
        "has_max": state.max_second is not None,
        "has_param": param is not None,
        "is_compact": state.is_compact,
        "is_int8": state.format == "int8",
        "num_rows": NUM_ROWS,
        "block": BLOCK_NUMEL,
        "enable_fp_fusion": False,
    }
    # Where an optional tensor is absent its pointer is never followed; of moments only the dtype is looked at, and
    # the one that is present stands in.
    moment = next((t for t in (state.first, state.second) if t is not None), state.master)
    stands_in = (state.master, moment, moment, moment, moment, moment)
    tensors = [t if t is not None else other for t, other in zip(state.tensors(), stands_in, strict=True)]
    buffers = (*tensors, grad, state.master if param is None else param)
    grid = (triton.cdiv(state.numel, NUM_ROWS * BLOCK_NUMEL),)
    sizes = (state.numel, num_blocks(state.numel), *rounding.words)
    with torch.accelerator.device_index(grad.device.index):
        _update_kernel[grid](*(buffer.detach() for buffer in buffers), *sizes, *floats, **how)
