"""The self-test of an implementation: one step over values chosen to differ if anything can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offload.kernels.scalars import AdamScalars

_SPECIAL = [0.0, -0.0, 1e-45, -1e-42, 1.17e-38, 3e-23, 1 / 3, -1.0, 65519.0, 3.3e38, float("inf"), float("nan")]


def agree(step: Callable[..., None], trusted: Callable[..., None], device: torch.device | str) -> bool:
    """Whether ``step`` gives the bits of ``trusted`` on ``device``, for every dtype of gradient and parameter.

    Both take master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq and the scalars.
    """
    return all(
        _same_bits(_trial(step, dtype, device), _trial(trusted, dtype, device))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def _trial(step: Callable[..., None], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """One amsgrad step over every pairing of special values, gradient and copy in ``dtype``."""
    values = torch.tensor(_SPECIAL, dtype=torch.float32)
    count = len(_SPECIAL)
    master = values.repeat(count * count)
    exp_avg = values.repeat_interleave(count).repeat(count)
    grad = values.repeat_interleave(count * count).to(dtype)
    max_exp_avg_sq, param_out = master.roll(5).abs(), torch.empty_like(master, dtype=dtype)
    tensors = (master, exp_avg, exp_avg.roll(7).abs(), grad, param_out, max_exp_avg_sq)
    scalars = AdamScalars.at_step(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=3, decoupled=True, grad_scale=0.37
    )
    on_device = [tensor.to(device) for tensor in tensors]
    step(*on_device, scalars)
    return [tensor.cpu() for tensor in on_device]


def _same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """NaN equals NaN: which NaN an operation makes isn't part of IEEE-754."""
    integer = {4: torch.int32, 2: torch.int16}
    return all(
        bool(((a.view(integer[a.itemsize]) == b.view(integer[b.itemsize])) | (a.isnan() & b.isnan())).all())
        for a, b in zip(ours, theirs, strict=True)
    )
