"""Writes between forward and backward are seen, whichever way they went."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from offload.testing import watch_saved_tensors


def through_data(slot: Tensor) -> None:
    slot.data.copy_(torch.zeros(10, device="sim"))


def through_storage(slot: Tensor) -> None:
    torch.empty(0, device="sim").set_(slot.untyped_storage()).zero_()


def through_no_grad(slot: Tensor) -> None:
    with torch.no_grad():
        slot.zero_()


@pytest.mark.parametrize("refill", [through_data, through_storage, through_no_grad, None])
def test_refill(sim: ModuleType, refill: Callable[[Tensor], None] | None) -> None:
    x, slot = torch.ones(10, device="sim", requires_grad=True), torch.ones(10, device="sim")
    with watch_saved_tensors():
        loss = (x * slot).sum()
    if refill is not None:
        refill(slot)
    loss.backward()
    reports = sim.races()
    if refill is None:
        assert reports == []
    else:
        assert len(reports) == 1
        assert "backward reads a tensor of shape (10,) that was written after forward had saved it" in reports[0]


def test_neighbours_and_the_host_are_no_concern(sim: ModuleType) -> None:
    flat = torch.ones(20, device="sim")
    x = torch.ones(10, device="sim", requires_grad=True)
    on_host = torch.ones(10, requires_grad=True)
    with watch_saved_tensors():
        loss = (x * flat[:10]).sum()
        host_loss = (on_host * on_host).sum()
    flat[10:].zero_()
    loss.backward()
    host_loss.backward()
    assert sim.races() == []
