"""A pending tensor waits at its first read, whoever reads it, and is what it was from then on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.pending import PendingParameter, make_pending, make_plain


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)  # its forward reads a parameter of a module it never calls
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x + self.attention(x, x, x)[0])


class Pending:
    """A model whose parameters, and gradients, are pending; ``waited`` names those that were read."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Block()
        self.waited: list[str] = []
        self.x = torch.randn(3, 2, 4)
        self.model(self.x).sum().backward()
        self.names = [name for name, _ in self.model.named_parameters()]
        for name, param in self.model.named_parameters():
            assert param.grad is not None
            self.make_pending(name, param)
            self.make_pending(f"grad of {name}", param.grad)

    def make_pending(self, name: str, tensor: Tensor) -> None:
        def wait() -> None:
            self.waited.append(name)

        make_pending(tensor, wait)

    def close(self) -> None:
        for param in self.model.parameters():
            make_plain(param)
            if param.grad is not None:
                make_plain(param.grad)


@pytest.fixture
def pending() -> Iterator[Pending]:
    made = Pending()
    yield made
    made.close()


def test_forward_waits_for_each_parameter_once(pending: Pending) -> None:
    expected = Block()
    expected.load_state_dict(copy.deepcopy(pending.model.state_dict()))
    assert sorted(pending.waited) == sorted(pending.names)
    assert torch.equal(pending.model(pending.x), expected(pending.x))
    assert sorted(pending.waited) == sorted(pending.names)
    assert all(type(param) is nn.Parameter for param in pending.model.parameters())


def test_a_layer_waits_for_its_own(pending: Pending) -> None:
    pending.model.linear(pending.x)
    assert pending.waited == ["linear.weight", "linear.bias"]
    pending.model.attention(pending.x, pending.x, pending.x)
    assert set(pending.waited[2:]) == {name for name in pending.names if name.startswith("attention")}


READS: dict[str, Callable[[Pending], Any]] = {
    "state_dict": lambda p: p.model.linear.state_dict(),
    "torch.save of the module": lambda p: torch.save(p.model.linear, io.BytesIO()),
    "torch.save of a kept variable": lambda p: torch.save(p.model.linear.state_dict(keep_vars=True), io.BytesIO()),
    "deepcopy": lambda p: copy.deepcopy(p.model.linear),
    "data": lambda p: [p.model.linear.weight.data, p.model.linear.bias.data],
    "item": lambda p: [p.model.linear.weight[0, 0].item(), p.model.linear.bias[0].item()],
    "numpy": lambda p: [p.model.linear.weight.detach().numpy(), p.model.linear.bias.detach().numpy()],
    "address": lambda p: [p.model.linear.weight.data_ptr(), p.model.linear.bias.data_ptr()],
    "norm of a list": lambda p: torch.nn.utils.get_total_norm(list(p.model.linear.parameters())),
    "moving average": lambda p: torch._foreach_lerp_(
        [torch.zeros(4, 4), torch.zeros(4)], [p.model.linear.weight.data, p.model.linear.bias.data], 0.5
    ),
    "change in place": lambda p: [param.detach().mul_(2) for param in p.model.linear.parameters()],
    "another dtype": lambda p: p.model.linear.to(torch.float64),
    "keyword": lambda p: [torch.mul(input=param, other=1) for param in p.model.linear.parameters()],
    "operator": lambda p: [torch.ops.aten.add(param, 1) for param in p.model.linear.parameters()],
    "print": lambda p: [repr(param) for param in p.model.linear.parameters()],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_read_waits(read: Callable[[Pending], Any], pending: Pending) -> None:
    read(pending)
    assert {name for name in pending.waited if not name.startswith("grad")} == {"linear.weight", "linear.bias"}


def test_a_copy_is_an_ordinary_parameter(pending: Pending) -> None:
    for param in copy.deepcopy(pending.model).parameters():
        assert type(param) is nn.Parameter
    assert type(PendingParameter(torch.zeros(2))) is nn.Parameter


NO_READS: dict[str, Callable[[nn.Parameter], Any]] = {
    "grad": lambda p: p.grad,
    "grad set": lambda p: setattr(p, "grad", None),
    "grad deleted": lambda p: delattr(p, "grad"),
    "requires_grad": lambda p: p.requires_grad,
    "frozen": lambda p: p.requires_grad_(False),
    "shape": lambda p: (p.shape, p.size(), p.size(0), p.dim(), p.ndim, p.numel(), len(p), p.stride(), p.nbytes),
    "kind": lambda p: (p.dtype, p.device, p.layout, p.is_leaf, p.grad_fn, p.is_contiguous(), p.is_floating_point()),
    "identity": lambda p: (hash(p), p in {p: 1}, isinstance(p, nn.Parameter), p._version),
}


@pytest.mark.parametrize("look", NO_READS.values(), ids=NO_READS)
def test_what_tells_no_values_waits_for_nothing(look: Callable[[nn.Parameter], Any], pending: Pending) -> None:
    look(pending.model.linear.weight)
    assert pending.waited == []


def test_zero_grad_waits_only_where_it_writes(pending: Pending) -> None:
    pending.model.norm.zero_grad()
    assert pending.waited == []
    pending.model.linear.zero_grad(set_to_none=False)
    assert pending.waited == ["grad of linear.weight", "grad of linear.bias"]


def test_backward_waits_before_it_adds_to_a_gradient(pending: Pending) -> None:
    """By way of the forward, which reads the parameter; the engine itself asks nobody."""
    order: list[str] = []
    weight = nn.Parameter(torch.ones(2))
    weight.sum().backward()
    assert weight.grad is not None

    def wait() -> None:
        order.append("settled")
        assert weight.grad is not None
        make_plain(weight)
        make_plain(weight.grad)

    make_pending(weight, wait)
    make_pending(weight.grad, wait)
    weight.sum().backward()
    assert order == ["settled"]
    assert type(weight.grad) is Tensor


def test_an_error_of_the_wait_reaches_the_reader() -> None:
    weight = nn.Parameter(torch.ones(2))

    def wait() -> None:
        make_plain(weight)
        raise RuntimeError("the update failed")

    make_pending(weight, wait)
    with pytest.raises(RuntimeError, match="the update failed"):
        weight.sum()
    assert weight.sum() == 2
