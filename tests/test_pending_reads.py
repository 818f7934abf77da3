"""The debug mode names every read of what an update in flight will write, and who did not wait."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.pending_reads import PendingRead

Read = Callable[[nn.Module, nn.Module], object]  # of the model and a copy of it from before


def build() -> tuple[nn.Sequential, offload.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to("sim")
    # One subgroup for each weight with the bias before it.
    optimizer = offload.AdamW(model.named_parameters(), plan="host", overlap="next_forward", subgroup_numel=72)
    return model, optimizer


def step(model: nn.Module, optimizer: offload.AdamW) -> None:
    model(torch.ones(2, 8, device="sim")).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def average(model: nn.Module, ema: nn.Module) -> None:
    for mean, param in zip(ema.parameters(), model.parameters(), strict=True):
        mean.lerp_(param, 0.1)


@torch.no_grad()
def evaluate(model: nn.Module, _: nn.Module) -> Tensor:
    return model.eval()(torch.ones(1, 8, device="sim"))


PARAMS = ["0.weight", "0.bias", "1.weight", "1.bias"]
READS: dict[str, tuple[Read, list[str]]] = {
    "state_dict": (lambda model, _: model.state_dict(), PARAMS),
    "torch.save": (lambda model, _: torch.save(model.state_dict(), io.BytesIO()), PARAMS),
    "torch.save of the module": (lambda model, _: torch.save(model, io.BytesIO()), PARAMS),
    "moving average": (average, PARAMS),
    "evaluation": (evaluate, PARAMS),
    "deepcopy": (lambda model, _: copy.deepcopy(model), PARAMS),
    ".data": (lambda model, _: next(model.parameters()).data, ["0.weight"]),
    "edit in place": (lambda model, _: nn.init.zeros_(model[1].bias), ["1.bias"]),  # type: ignore[index]
    "gradient": (lambda model, _: model[0].bias.grad.norm(), ["gradient of 0.bias"]),  # type: ignore[index]
    "zero_grad": (lambda model, _: model[0].zero_grad(set_to_none=False), ["gradient of 0.weight"]),  # type: ignore[index]
    "nothing": (lambda model, _: [param.shape for param in model.parameters()], []),
}


@pytest.mark.parametrize("name", READS)
def test_reads_that_wait(sim: ModuleType, name: str) -> None:
    read, expected = READS[name]
    model, optimizer = build()
    ema = copy.deepcopy(model)
    step(model, optimizer)
    with optimizer.pending_reads() as reads:
        read(model, ema)
    firsts = {seen.subgroup: seen for seen in reversed(reads)}  # one read settles its whole subgroup
    assert {seen.subgroup for seen in reads} == {subgroup_of(optimizer, name) for name in expected}
    for seen in firsts.values():
        assert seen.waited
        assert seen.name in expected
        assert __file__ in {frame.filename for frame in seen.stack}
        assert "and waited" in str(seen)
    optimizer.synchronize()


def subgroup_of(optimizer: offload.AdamW, name: str) -> int:
    names = optimizer.param_groups[0]["param_names"]
    param = optimizer.param_groups[0]["params"][names.index(name.removeprefix("gradient of "))]
    actions = optimizer.runtime.actions
    return next(i for i, each in enumerate(actions) if any(item.param is param for item in each.slices))


@pytest.mark.parametrize("kind", ["parameter", "gradient"])
def test_alias_from_before_the_step(sim: ModuleType, kind: str) -> None:
    """No torch function is given the parameter. What is read may be old, so here it is a race as well."""
    sim.configure("sync", races=False)
    model, optimizer = build()
    model(torch.ones(2, 8, device="sim")).square().sum().backward()
    param = model[1].weight
    alias = param.data if kind == "parameter" else param.grad.data  # type: ignore[union-attr]
    optimizer.step()
    with optimizer.pending_reads() as reads:
        alias.view(-1)  # reads nothing
        alias[1:].sum()
    (seen,) = reads
    assert (seen.name, seen.waited) == ("1.weight" if kind == "parameter" else "gradient of 1.weight", False)
    assert seen.reader == "aten.sum.default"
    assert seen.stack[-1].line == "alias[1:].sum()"
    assert "did NOT wait: call optimizer.synchronize() before it" in str(seen)
    optimizer.synchronize()
    with optimizer.pending_reads() as reads:
        alias.sum()
    assert reads == []


def test_training_in_the_debug_mode_is_the_same(sim: ModuleType) -> None:
    """Each layer's wait is on the list, and nothing else; backward and the optimizer read nothing that is pending."""
    results = []
    for debug in (False, True):
        model, optimizer = build()
        reads: list[PendingRead] = []
        for _ in range(3):
            if debug:
                with optimizer.pending_reads() as seen:
                    step(model, optimizer)
                reads += seen
            else:
                step(model, optimizer)
        optimizer.synchronize()
        results.append([param.cpu() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(read.waited for read in reads)
    assert {read.reader for read in reads} == {"linear"}
    assert len(reads) == 2 * len(optimizer.runtime.subgroups)


def test_reads_of_another_optimizer_are_not_on_the_list(sim: ModuleType) -> None:
    (one, its), (other, others) = build(), build()
    step(one, its)
    step(other, others)
    with its.pending_reads() as reads:
        other.state_dict()
    assert reads == []
    its.synchronize()
    others.synchronize()
