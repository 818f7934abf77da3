"""The update in plain torch operations, for any device: slow, and the definition that the others are held against.

The one operation torch doesn't have is the fused multiply-add. It is built here from float64 with one correct rounding,
after S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
odd", IEEE Transactions on Computers 57(4), 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offload.kernels.arithmetic import denormals_kept
from offload.kernels.codec import Rows, read_state, write_state
from offload.kernels.rules import AdagradScalars, LionScalars, SGDScalars
from offload.kernels.scalars import AdamScalars, Scalars
from offload.kernels.state import Rounding, State

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


def _root(x: Tensor) -> Tensor:
    """By way of float64: torch may take the root from a vector library that isn't correctly rounded in fp32. The root
    of a 24-bit number is too far from any rounding boundary for a last-bit error in float64 to matter."""
    return x.double().sqrt().float()


def _adam(rows: Rows, grad: Tensor, s: AdamScalars) -> None:
    exp_avg, exp_avg_sq, g = rows.first, rows.second, grad
    assert exp_avg is not None and exp_avg_sq is not None  # noqa: PT018  as its rule has it
    if s.l2_decay != 0:
        g = fma(rows.master, s.l2_decay, g)
    param = rows.master * s.param_decay
    exp_avg.copy_(fma(g - exp_avg, s.lerp_weight, g if s.lerp_from_grad else exp_avg))
    exp_avg_sq.copy_(fma(g * s.one_minus_beta2, g, exp_avg_sq * s.beta2))
    second_moment = exp_avg_sq
    if rows.max_second is not None:
        second_moment = rows.max_second.copy_(_maximum(rows.max_second, exp_avg_sq))
    # A tensor, because torch's accelerator kernels divide by a host scalar as a product with its reciprocal.
    bias_correction = torch.full((), s.sqrt_bias_correction2, dtype=torch.float32, device=grad.device)
    denominator = _root(second_moment) / bias_correction + s.eps
    rows.master.copy_(param + exp_avg * s.neg_step_size / denominator)


def _lion(rows: Rows, grad: Tensor, s: LionScalars) -> None:
    assert rows.first is not None
    towards_grad = grad - rows.first
    direction = fma(towards_grad, s.one_minus_beta1, rows.first)
    one = torch.ones_like(direction).copysign(direction)
    direction = torch.where(direction.isnan() | (direction == 0), direction, one)
    rows.master.copy_(rows.master * s.param_decay + direction * s.neg_lr)
    rows.first.copy_(fma(towards_grad, s.one_minus_beta2, rows.first))


def _adagrad(rows: Rows, grad: Tensor, s: AdagradScalars) -> None:
    assert rows.second is not None
    g = fma(rows.master, s.l2_decay, grad) if s.l2_decay != 0 else grad
    rows.second.copy_(fma(g, g, rows.second))
    rows.master.copy_(rows.master + g * s.neg_step_size / (_root(rows.second) + s.eps))


def _sgd(rows: Rows, grad: Tensor, s: SGDScalars) -> None:
    g = fma(rows.master, s.l2_decay, grad) if s.l2_decay != 0 else grad
    if rows.first is not None:
        rows.first.copy_(g if s.is_first else fma(g, s.one_minus_dampening, rows.first * s.momentum))
        g = fma(rows.first, s.momentum, g) if s.nesterov else rows.first
    rows.master.copy_(fma(g, s.neg_lr, rows.master))


_RULES: dict[str, Callable[[Rows, Tensor, Any], None]] = {
    "adam": _adam,
    "lion": _lion,
    "adagrad": _adagrad,
    "sgd": _sgd,
}


@torch.no_grad()
def step(state: State, grad: Tensor, param: Tensor | None, scalars: Scalars, rounding: Rounding) -> None:
    """One step over checked tensors of one device."""
    chunk_numel = CPU_CHUNK_NUMEL if grad.device.type == "cpu" else DEVICE_CHUNK_NUMEL
    with denormals_kept():
        for begin in range(0, state.numel, chunk_numel):
            numel = min(chunk_numel, state.numel - begin)
            chunk, chunk_param = state.narrow(begin, numel), None if param is None else param.narrow(0, begin, numel)
            rows = read_state(chunk, chunk_param)
            _RULES[scalars.rule](rows, grad.narrow(0, begin, numel).float() * scalars.grad_multiplier, scalars)
            write_state(chunk, chunk_param, rows, replace(rounding, first_index=rounding.first_index + begin))
