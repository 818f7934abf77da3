"""The clip coefficient: it belongs to the gradients it was computed for, and to no others."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import offload
from tests.training import assert_same_bits


def pair() -> tuple[nn.Parameter, offload.AdamW]:
    weight = nn.Parameter(torch.linspace(-1, 1, 64))
    return weight, offload.AdamW([weight], lr=0.1)


def stepped(grad: Tensor) -> Tensor:
    """The weight after one step with ``grad``, clipped to norm 1 if that was asked for by nobody."""
    weight, optimizer = pair()
    weight.grad = grad
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("first", [float("nan"), float("inf"), 100.0])
def test_a_skipped_step_leaves_no_coefficient_behind(first: float) -> None:
    """GradScaler skips a step, the script clears gradients through the model: the next step must be its own."""
    weight, optimizer = pair()
    weight.grad = torch.full((64,), first)
    optimizer.clip_grad_norm_(1.0)
    weight.grad = None  # what model.zero_grad() does
    weight.grad = torch.full((64,), 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_same_bits(weight.detach(), stepped(torch.full((64,), 3.0)))


def test_clipping_other_gradients_starts_anew() -> None:
    weight, optimizer = pair()
    for _ in range(2):
        weight.grad = torch.full((64,), 2.0)
        assert optimizer.clip_grad_norm_(1.0) == 16.0
        weight.grad = None


def test_gradients_changed_after_clipping_are_reported() -> None:
    weight, optimizer = pair()
    weight.grad = torch.full((64,), 2.0)
    optimizer.clip_grad_norm_(1.0)
    weight.grad.mul_(2)
    with pytest.warns(UserWarning, match="gradients were changed after clip_grad_norm_"):
        optimizer.step()


def test_a_refused_step_keeps_the_coefficient() -> None:
    moments = []
    for refuse in (False, True):
        weight, optimizer = pair()
        weight.grad = torch.full((64,), 2.0)
        optimizer.clip_grad_norm_(1.0)
        if refuse:
            optimizer.param_groups[0]["eps"] = -1.0
            with pytest.raises(ValueError, match="eps"):
                optimizer.step()
            optimizer.param_groups[0]["eps"] = 1e-8
        optimizer.step()
        moments.append(optimizer.state[weight]["exp_avg"])
    assert_same_bits(*moments)
