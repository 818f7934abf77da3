"""The update on accelerators that triton compiles for. Imported only when it is chosen.

Every operation is one that rounds once and to nearest; contraction is off, so that no product and sum are fused that
csrc/cpu_adam/lane.inl doesn't fuse.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.scalars import AdamScalars

BLOCK_NUMEL = 1024


# bfloat16 is converted in integers, as in every implementation: triton's interpreter truncates, and loses denormals.
@triton.jit
def _to_float32(x):  # type: ignore[no-untyped-def]
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  triton compiles both ends of a function that returns early
        return x.to(tl.float32)


@triton.jit
def _to_bfloat16(x):  # type: ignore[no-untyped-def]
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


# Not specialised on numel: every new residue would compile anew, in the middle of training.
@triton.jit(do_not_specialize=["numel"])  # type: ignore[untyped-decorator]
def _adam_kernel(  # type: ignore[no-untyped-def]
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, grad_ptr, param_out_ptr, numel,
    grad_multiplier, l2_decay, param_decay, lerp_weight, beta2, one_minus_beta2, sqrt_bias_correction2, eps,
    neg_step_size,
    has_l2: tl.constexpr, lerp_from_grad: tl.constexpr, amsgrad: tl.constexpr, has_out: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < numel
    param = tl.load(master_ptr + at, inside)
    m = tl.load(exp_avg_ptr + at, inside)
    v = tl.load(exp_avg_sq_ptr + at, inside)
    g = _to_float32(tl.load(grad_ptr + at, inside)) * grad_multiplier
    if has_l2:
        g = tl.fma(param, tl.full(param.shape, l2_decay, tl.float32), g)
    m = tl.fma(tl.full(m.shape, lerp_weight, tl.float32), g - m, g if lerp_from_grad else m)
    v = tl.fma(one_minus_beta2 * g, g, v * beta2)
    tl.store(exp_avg_ptr + at, m, inside)
    tl.store(exp_avg_sq_ptr + at, v, inside)
    if amsgrad:
        previous = tl.load(max_exp_avg_sq_ptr + at, inside)
        unordered = (previous != previous) | (v != v)
        v = tl.where(unordered, previous + v, tl.where(previous > v, previous, v))
        tl.store(max_exp_avg_sq_ptr + at, v, inside)
    root = tl.div_rn(tl.sqrt_rn(v), tl.full(v.shape, sqrt_bias_correction2, tl.float32))
    param = param * param_decay + tl.div_rn(neg_step_size * m, root + eps)
    tl.store(master_ptr + at, param, inside)
    if has_out:
        if param_out_ptr.dtype.element_ty == tl.bfloat16:
            tl.store(param_out_ptr + at, _to_bfloat16(param), inside)
        else:
            tl.store(param_out_ptr + at, param.to(param_out_ptr.dtype.element_ty), inside)


def step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    scalars: AdamScalars,
) -> None:
    """One step over checked tensors of one device, enqueued on its current stream."""
    *fp32_scalars, _ = scalars.to_list()
    # Where an optional tensor is absent its pointer is never followed; master stands in.
    optional = [master if max_exp_avg_sq is None else max_exp_avg_sq, master if param_out is None else param_out]
    flags: dict[str, Any] = {
        "has_l2": scalars.l2_decay != 0,
        "lerp_from_grad": scalars.lerp_from_grad,
        "amsgrad": max_exp_avg_sq is not None,
        "has_out": param_out is not None,
        "block": BLOCK_NUMEL,
        "enable_fp_fusion": False,
    }
    grid = (triton.cdiv(master.numel(), BLOCK_NUMEL),)
    buffers = (master, exp_avg, exp_avg_sq, optional[0], grad, optional[1])
    with torch.accelerator.device_index(master.device.index):
        _adam_kernel[grid](*(buffer.detach() for buffer in buffers), master.numel(), *fp32_scalars, **flags)
