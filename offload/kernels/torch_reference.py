"""The update in plain torch operations, for any device: slow, and the definition that the others are held against.

The one operation torch doesn't have is the fused multiply-add. It is built here from float64 with one correct rounding,
after S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
odd", IEEE Transactions on Computers 57(4), 2008.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels.arithmetic import denormals_kept
from offload.kernels.scalars import AdamScalars

# Temporaries are some twenty times a chunk. On the CPU a chunk also stays below the size from which torch splits an
# operation over threads whose floating-point mode we don't know.
CPU_CHUNK_NUMEL = 1 << 14
DEVICE_CHUNK_NUMEL = 1 << 20


def fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """``a * b + c`` of fp32 values, rounded once. A float ``b`` must be representable in fp32.

    The product is exact in float64. The sum is rounded to odd: where it is inexact and its last bit is even, it moves
    one unit towards the exact value. 53 bits rounded to odd, then to the nearest fp32, round as the exact value does,
    denormals and overflow included.
    """
    product = a.double() * (b.double() if isinstance(b, Tensor) else b)
    addend = c.double()
    total = product + addend
    addend_part = total - product  # Knuth's TwoSum: total + error is the exact sum
    error = (product - (total - addend_part)) + (addend - addend_part)
    bits = total.view(torch.int64)
    must_move = (error != 0) & error.isfinite() & (bits & 1 == 0)
    direction = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(must_move, bits + direction, bits).view(torch.float64).float()


def _maximum(a: Tensor, b: Tensor) -> Tensor:
    """b where equal (zeros of either sign), NaN where either is."""
    return torch.where(a.isnan() | b.isnan(), a + b, torch.where(a > b, a, b))


def _step_chunk(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    scalars: AdamScalars,
    sqrt_bias_correction2: Tensor,
) -> None:
    s = scalars
    g = grad.float() * s.grad_multiplier
    if s.l2_decay != 0:
        g = fma(master, s.l2_decay, g)
    param = master * s.param_decay
    exp_avg.copy_(fma(g - exp_avg, s.lerp_weight, g if s.lerp_from_grad else exp_avg))
    exp_avg_sq.copy_(fma(g * s.one_minus_beta2, g, exp_avg_sq * s.beta2))
    second_moment = exp_avg_sq
    if max_exp_avg_sq is not None:
        second_moment = max_exp_avg_sq.copy_(_maximum(max_exp_avg_sq, exp_avg_sq))
    # By way of float64: torch may take the root from a vector library that isn't correctly rounded in fp32. The root
    # of a 24-bit number is too far from any rounding boundary for a last-bit error in float64 to matter.
    root = second_moment.double().sqrt().float()
    denominator = root / sqrt_bias_correction2 + s.eps
    master.copy_(param + exp_avg * s.neg_step_size / denominator)
    if param_out is not None:
        param_out.copy_(master)


@torch.no_grad()
def step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    scalars: AdamScalars,
) -> None:
    """One step over checked tensors of one device."""
    chunk_numel = CPU_CHUNK_NUMEL if master.device.type == "cpu" else DEVICE_CHUNK_NUMEL
    # On the device, because torch's accelerator kernels divide by a host scalar as a product with its reciprocal.
    sqrt_bias_correction2 = torch.full((), scalars.sqrt_bias_correction2, dtype=torch.float32, device=master.device)
    with denormals_kept():
        for begin in range(0, master.numel(), chunk_numel):
            chunk = slice(begin, begin + chunk_numel)
            _step_chunk(
                master[chunk],
                exp_avg[chunk],
                exp_avg_sq[chunk],
                grad[chunk],
                None if param_out is None else param_out[chunk],
                None if max_exp_avg_sq is None else max_exp_avg_sq[chunk],
                scalars,
                sqrt_bias_correction2,
            )
