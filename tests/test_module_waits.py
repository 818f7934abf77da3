"""Modules that wait at their door: compiled ones stay compiled, and what no torch function announces is late enough."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import offload
from offload.pending import make_pending, make_plain


class Scaled(nn.Module):
    """Not one of torch's own modules: those are not compiled alone in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.first = Scaled()
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale


def make_all_pending(model: nn.Module) -> list[str]:
    """Names of parameters as they are waited for."""
    waited: list[str] = []
    for name, param in model.named_parameters():
        make_pending(param, lambda name=name, param=param: (waited.append(name), make_plain(param)))  # type: ignore[misc]
    return waited


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_modules_wait_outside_their_graph(in_place: bool, whole: bool) -> None:
    counter = CompileCounter()
    model: nn.Module = Model()
    if in_place:
        (model if whole else model.first).compile(backend=counter)  # type: ignore[operator]
    elif whole:
        model = torch.compile(model, backend=counter)
    else:
        model.first = torch.compile(model.first, backend=counter)
    waits = offload.wait_in_modules(model)
    x = torch.randn(2, 4)
    expected = model(x)
    num_frames, num_ops = counter.frame_count, counter.op_count
    assert num_frames == 1
    for _ in range(3):
        waited = make_all_pending(model)
        assert torch.equal(model(x), expected)
        assert len(waited) == len(list(model.parameters()))
        assert (counter.frame_count, counter.op_count) == (num_frames, num_ops)
    waits.remove()
    assert torch.equal(model(x), expected)
    assert (counter.frame_count, counter.op_count) == (num_frames, num_ops)


def test_a_module_waits_for_what_its_forward_hides() -> None:
    """As a C++ extension does, this forward reads its weight past every torch function."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.alias = self.weight.detach()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.alias

    model = nn.Sequential(Hidden(), Hidden())
    waits = offload.wait_in_modules(model)
    waited = make_all_pending(model)
    model[0](torch.ones(4))
    assert waited == ["0.weight"]
    waits.remove()
    model[1](torch.ones(4))
    assert waited == ["0.weight"]
    make_plain(model[1].weight)


def test_hooks_can_be_copied_and_pickled() -> None:
    model = nn.Linear(2, 2)
    offload.wait_in_modules(model)
    copy.deepcopy(model)(torch.ones(2))
    pickle.loads(pickle.dumps(model))(torch.ones(2))
