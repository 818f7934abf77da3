"""The self-test of an implementation: one step over values chosen to differ if anything can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offload.kernels.scalars import AdamScalars
from offload.kernels.state import BLOCK_NUMEL, Rounding, State

_SPECIAL = [0.0, -0.0, 1e-45, -1e-42, 1.17e-38, 3e-23, 1 / 3, -1.0, 65519.0, 3.3e38, float("inf"), float("nan")]
_ROUNDING = Rounding.at_step(seed=0, step=3, first_index=2**32 - 100)


def agree(step: Callable[..., None], trusted: Callable[..., None], device: torch.device | str) -> bool:
    """Whether ``step`` gives the bits of ``trusted`` on ``device``, for every dtype of gradient and parameter, and for
    every state format.

    Both take state, grad, param, scalars and rounding, and are tried with Adam, the rule with the most to go wrong.
    """
    fp32_trials = [_fp32_trial(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return all(
        _same_bits(_run(step, trial, device), _run(trusted, trial, device))
        for trial in (*fp32_trials, _compact_trial("bf16"), _compact_trial("int8"))
    )


_Trial = tuple[State, Tensor, Tensor]


def _fp32_trial(dtype: torch.dtype) -> _Trial:
    """An amsgrad state of every pairing of special values, gradient and copy in ``dtype``."""
    values = torch.tensor(_SPECIAL, dtype=torch.float32)
    count = len(_SPECIAL)
    master = values.repeat(count * count)
    exp_avg = values.repeat_interleave(count).repeat(count)
    grad = values.repeat_interleave(count * count).to(dtype)
    max_exp_avg_sq, param = master.roll(5).abs(), torch.empty_like(master, dtype=dtype)
    return State("fp32", master, exp_avg, exp_avg.roll(7).abs(), max_exp_avg_sq), grad, param


def _compact_trial(state_format: str) -> _Trial:
    """Every 16-bit parameter and every remainder once, with moments of all sizes; and an incomplete block."""
    numel = 2**16 + 77
    index = torch.arange(numel)
    param, remainder = ((index * factor + 12345).to(torch.int16) for factor in (1, 40503))
    grad = ((index % 2003 - 1001).float() * 1e-3).bfloat16()
    if state_format == "bf16":
        first, second = grad.roll(7), (grad * grad).roll(3) * torch.where(index % 5 == 0, -1, 1)  # some of them ties
        return State("bf16", remainder, first, second), grad, param.view(torch.bfloat16)
    first, second = (index * 31).to(torch.int8).clamp(min=-127), (index * 57).to(torch.uint8)
    scale = 10.0 ** (torch.arange(-(-numel // BLOCK_NUMEL)).float() % 60 - 30)
    state = State("int8", remainder, first, second, None, scale.clone(), scale.clone())
    return state, grad, param.view(torch.bfloat16)


def _run(step: Callable[..., None], trial: _Trial, device: torch.device | str) -> list[Tensor]:
    state, grad, param = trial
    scalars = AdamScalars.at_step(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=3, decoupled=True, grad_scale=0.37
    )
    on_device = State(state.format, *(None if t is None else t.to(device, copy=True) for t in state.tensors()))  # type: ignore[arg-type]
    param = param.to(device, copy=True)
    step(on_device, grad.to(device), param, scalars, _ROUNDING)
    return [tensor.cpu() for tensor in (*(tensor for _, tensor in on_device.items()), param)]


def _same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """NaN equals NaN: which NaN an operation makes isn't part of IEEE-754."""
    integer = {4: torch.int32, 2: torch.int16, 1: torch.int8}
    return all(
        bool(((a.view(integer[a.itemsize]) == b.view(integer[b.itemsize])) | (a.isnan() & b.isnan())).all())
        for a, b in zip(ours, theirs, strict=True)
    )
