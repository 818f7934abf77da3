"""Lion, Adagrad and SGD against torch's fused kernels and against their definitions; Adam is in tests/test_bits.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import Stride
from tests.training import ODD_WIDTHS, assert_same_bits, mlp, replan_every_step, state_snapshot, train

SUBGROUP_NUMEL = 200
pytestmark = pytest.mark.usefixtures("one_torch_thread")

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (offload.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd_decay": (offload.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "momentum": (offload.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (offload.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (offload.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.01}),
    "adagrad": (offload.Adagrad, torch.optim.Adagrad, {}),
    "adagrad_decay": (offload.Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1}),
    "adagrad_maximize": (offload.Adagrad, torch.optim.Adagrad, {"eps": 1e-3, "maximize": True}),
}


def torch_state(optimizer: torch.optim.Optimizer) -> dict[tuple[object, str], Tensor]:
    """Without the steps that torch doesn't count for SGD and the momentum that it doesn't keep at 0."""
    entries = state_snapshot(optimizer).items()
    return {key: value for key, value in entries if key[1] != "step" and isinstance(value, Tensor)}


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str) -> None:
    our_class, torch_class, kwargs = CASES[case]
    ours, theirs = mlp(), mlp()
    optimizer = our_class(ours.parameters(), plan=Stride(2), subgroup_numel=SUBGROUP_NUMEL, **kwargs)
    torch_optimizer = torch_class(theirs.parameters(), fused=True, **kwargs)
    assert_same_bits(train(ours, optimizer), train(theirs, torch_optimizer))
    if case not in ("sgd", "sgd_decay"):
        assert_same_bits(torch_state(optimizer), torch_state(torch_optimizer))


@pytest.mark.parametrize("case", ["momentum", "adagrad_decay"])
def test_training_goes_on_from_torchs_state(case: str) -> None:
    our_class, torch_class, kwargs = CASES[case]
    model, resumed = mlp(), mlp(seed=7)
    theirs = torch_class(model.parameters(), fused=True, **kwargs)
    train(model, theirs, steps=range(5))
    ours = our_class(resumed.parameters(), **kwargs)
    resumed.load_state_dict(model.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_same_bits(train(resumed, ours, steps=range(5, 10)), train(model, theirs, steps=range(5, 10)))


def lion_in_float64(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Tensor], **hyper: Any) -> None:
    """Algorithm 2 of the paper."""
    (beta1, beta2), lr, decay = hyper["betas"], hyper["lr"], hyper["weight_decay"]
    for p, g, m in zip(params, grads, moments, strict=True):
        p -= lr * (torch.sign(beta1 * m + (1 - beta1) * g) + decay * p)
        m.copy_(beta2 * m + (1 - beta2) * g)


def test_lion_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(1000, generator=generator))
    hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = offload.Lion([param], **hyper)
    exact, moment = param.detach().double(), torch.zeros(1000, dtype=torch.float64)
    for _ in range(30):
        param.grad = torch.randn(1000, generator=generator)
        lion_in_float64([exact], [param.grad.double()], [moment], **hyper)
        optimizer.step()
    torch.testing.assert_close(param.detach().double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"].double(), moment, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("our_class", [offload.Lion, offload.Adagrad, offload.SGD])
def test_placement_does_not_matter(sim: ModuleType, our_class: Any) -> None:
    models = [mlp(ODD_WIDTHS, device="sim") for _ in range(2)]
    momentum = {"momentum": 0.9} if our_class is offload.SGD else {}
    optimizers = [
        our_class(model.parameters(), lr=1e-2, plan=plan, subgroup_numel=SUBGROUP_NUMEL, **momentum)
        for model, plan in zip(models, ("host", Stride(1)), strict=True)
    ]
    expected = train(models[0], optimizers[0], steps=range(6))
    replanned = train(models[1], optimizers[1], steps=range(6), before_step=replan_every_step(optimizers[1], 0))
    assert_same_bits(replanned, expected)
    assert sim.races() == []


@pytest.mark.parametrize(("our_class", "num_rows"), [(offload.Lion, 2), (offload.Adagrad, 2), (offload.SGD, 1)])
def test_nothing_is_kept_that_the_rule_does_not_need(our_class: Any, num_rows: int) -> None:
    optimizer = our_class([nn.Parameter(torch.ones(1000))])
    assert optimizer.bill.host_state_bytes == num_rows * 4000


def test_momentum_cannot_be_switched_on_later() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = offload.SGD([param], lr=0.1)
    optimizer.param_groups[0]["momentum"] = 0.9
    param.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"momentum=0\.9 in a group that was constructed with momentum=0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: offload.SGD(p, nesterov=True), "nesterov needs momentum > 0 and dampening 0"),
        (lambda p: offload.SGD(p, momentum=-1.0), "momentum must be finite and at least 0"),
        (lambda p: offload.Adagrad(p, lr_decay=-1.0), "lr_decay must be finite and at least 0"),
        (lambda p: offload.Lion(p, betas=(0.9, 1.0)), r"betas\[1\] must be at least 0 and less than 1"),
        (lambda p: offload.SGD(p, foreach=True), "foreach=True is not available"),
    ],
)
def test_bad_hyper_parameters_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build([nn.Parameter(torch.ones(4))])
