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


def test_a_group_that_does_not_fit_leaves_the_optimizer_as_it_was(sim: ModuleType) -> None:
    sim.configure(capacity="2MiB")  # less than the new parameters and one slot for their state
    weight = torch.nn.Parameter(torch.ones(1024, device="sim"))
    optimizer = offload.AdamW([weight], plan="device")
    big = torch.nn.Parameter(torch.ones(150_000, device="sim"))
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.add_param_group({"params": [big]})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert not torch.equal(weight.detach().cpu(), torch.ones(1024))


class _Subclass(torch.Tensor):
    pass


def test_tensor_subclasses_are_refused_by_name() -> None:
    weight = torch.nn.Parameter(torch.ones(64).as_subclass(_Subclass))
    with pytest.raises(ValueError, match="_Subclass; only plain tensors"):
        offload.AdamW([weight])


def test_a_parameter_of_a_removed_group_may_be_edited() -> None:
    kept, removed = (torch.nn.Parameter(torch.ones(64)) for _ in range(2))
    optimizer = offload.AdamW([{"params": [kept]}, {"params": [removed]}])
    optimizer.param_groups.pop()
    with torch.no_grad():
        removed.mul_(2)
    kept.grad = torch.ones_like(kept)
    optimizer.step()


def test_a_group_without_parameters_is_accepted() -> None:
    optimizer = offload.AdamW([{"params": []}])
    weight = torch.nn.Parameter(torch.ones(64))
    optimizer.add_param_group({"params": [weight]})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
