"""The operations on one subgroup's tensors: what autograd learns of them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import offload


@pytest.mark.parametrize("plan", ["host", "device", offload.Static(1.0)], ids=str)
def test_a_step_is_seen_by_autograd_wherever_it_runs(sim: ModuleType, plan: str | offload.Static) -> None:
    """A backward through weights that a step has overwritten must raise, as after a step of torch's optimizers."""
    weight = torch.nn.Parameter(torch.randn(64, device="sim"))
    optimizer = offload.AdamW([weight], plan=plan)
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
