"""Prepared steps: the results of adam_step, and next to nothing done in Python at each call."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import offload
from offload.kernels import (
    LionScalars,
    PreparedUpdate,
    State,
    available_implementations,
    dispatch,
    native,
    set_num_threads,
    threads,
    use_implementation,
)
from tests.kernels.states import assert_same_bits, clone, every_case, make_case, run


def prepare(buffers: Any, **options: Any) -> PreparedUpdate:
    """Of the tensor arguments of adam_step."""
    master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq = buffers.tensors()
    return PreparedUpdate(State("fp32", master, exp_avg, exp_avg_sq, max_exp_avg_sq), grad, param_out, **options)


@pytest.mark.parametrize("implementation", [None, "scalar", "numba"])
def test_same_bits_as_unprepared(implementation: str | None) -> None:
    for case in (*every_case(333), make_case("adamw", "fp32", 0)):
        expected = run(clone(case), implementation)
        step = PreparedUpdate(
            case.state, case.grad, case.param, rule=case.scalars[0].rule, implementation=implementation
        )
        for scalars, rounding in zip(case.scalars, case.roundings, strict=True):
            step(scalars, rounding)
        assert_same_bits(case, expected)


def calls_made_by(function: Callable[[], None]) -> Counter[str]:
    """Names of the Python and C functions that are called, and how often."""
    names: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            names[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1
        elif event == "c_call":
            names[argument.__qualname__] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    names.subtract(["calls_made_by.<locals>.note", "setprofile"])
    return names


def test_a_call_packs_and_checks_nothing(buffers: Any, make_scalars: Any) -> None:
    """Counted rather than timed. What is left: the environment's choice of a kernel, the library, autograd's note."""
    state = buffers.ordinary(1000, torch.bfloat16, torch.bfloat16)
    [scalars] = make_scalars([1])
    step = prepare(state)
    step(scalars)
    prepared = calls_made_by(lambda: step(scalars))
    unprepared = calls_made_by(lambda: state.step(scalars))
    assert not [name for name in prepared if name.startswith(("Tensor", "TensorBase", "_TensorBase"))], prepared
    assert prepared["increment_version"] == 1
    assert sum(prepared.values()) <= 20, sorted(prepared.items())
    print(sorted(prepared.items()), sum(prepared.values()))
    assert sum(unprepared.values()) > 4 * sum(prepared.values()), "then there is no need to prepare anything"


def test_one_call_of_the_library(buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = native.load()
    called = []
    monkeypatch.setattr(kernel, "_update", lambda *arguments: called.append(arguments) or 0)
    step = prepare(buffers.ordinary(1000), implementation="scalar")
    for scalars in make_scalars():
        step(scalars)
    assert len(called) == 3
    work = {id(arguments[0]) for arguments in called}
    assert len(work) == 1, "isa, rule, formats, addresses and numel: the very same struct each time"
    assert len({arguments[1] for arguments in called}) == 3, "and scalars of its own for each step"


def test_settings_are_followed_after_preparation(
    buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def bind(_kernel: object, isa: str, *_tensors: object) -> Callable[..., None]:
        return lambda _scalars, _rounding, num_threads: used.append((isa, num_threads))

    monkeypatch.setattr(native.NativeKernel, "bind", bind)
    monkeypatch.setattr(threads, "MIN_PARALLEL_NUMEL", 8)
    monkeypatch.delenv("OFFLOAD_KERNEL", raising=False)
    [scalars] = make_scalars([1])
    with use_implementation("scalar"):
        step, fixed = (prepare(buffers.ordinary(8), num_threads=each) for each in (None, 2))
        for count in (1, 3):
            set_num_threads(count)
            step(scalars)
            fixed(scalars)
    set_num_threads(1)
    step(scalars)
    monkeypatch.setenv("OFFLOAD_KERNEL", "scalar")
    step(scalars)
    set_num_threads(None)
    best = available_implementations()[0]
    assert used == [("scalar", 1), ("scalar", 2), ("scalar", 3), ("scalar", 2), (best, 1), ("scalar", 1)]


def test_wrong_arguments_are_refused_at_preparation(buffers: Any) -> None:
    start = buffers.ordinary(8)
    state = State("fp32", start.master, start.exp_avg, start.exp_avg_sq)
    with pytest.raises(TypeError, match=r"exp_avg must be of torch\.float32"):
        PreparedUpdate(replace(state, first=start.exp_avg.double()), start.grad)
    with pytest.raises(ValueError, match=r"(grad and master|master and grad) overlap"):
        PreparedUpdate(state, start.master)
    with pytest.raises(ValueError, match="'sse' is not available"):
        PreparedUpdate(state, start.grad, implementation="sse")
    with pytest.raises(ValueError, match="num_threads must be at least 1, not 0"):
        PreparedUpdate(state, start.grad, num_threads=0)
    with pytest.raises(ValueError, match=r"rule 'lion' .* keeps"):
        PreparedUpdate(state, start.grad, rule="lion")


def test_scalars_of_another_rule_are_refused_before_anything_is_written(buffers: Any) -> None:
    start = buffers.ordinary(8)
    step = prepare(start.clone())
    with pytest.raises(
        ValueError, match="scalars are of rule 'lion', but rule='adam' was prepared; prepare one for each"
    ):
        step(LionScalars.at_step(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1))


def test_autograd_sees_the_writes(buffers: Any, make_scalars: Any) -> None:
    state = buffers.ordinary(8, out_dtype=torch.float32)
    parameter = torch.nn.Parameter(torch.ones(8))
    state.param_out = parameter
    step = prepare(state)
    loss = (parameter * torch.ones(8, requires_grad=True)).sum()
    step(*make_scalars([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_without_memory_are_never_handed_to_the_library(buffers: Any, make_scalars: Any) -> None:
    [scalars] = make_scalars([1])
    prepare(buffers.ordinary(10).map(lambda tensor: tensor.to("meta")))(scalars)
    with FakeTensorMode():
        grad, *rows = (torch.empty(10) for _ in range(4))
        PreparedUpdate(State("fp32", *rows), grad)(scalars)


def test_the_optimizer_checks_its_buffers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In three steps over two subgroups; and again for a run of parameters that is new, for want of a gradient."""
    checked = []
    honest = dispatch.check_arguments
    monkeypatch.setattr(dispatch, "check_arguments", lambda *each: (checked.append(1), honest(*each))[1])
    parameters = [torch.nn.Parameter(torch.ones(100)) for _ in range(3)]
    optimizer = offload.AdamW(parameters, plan="host", subgroup_numel=200)
    for expected in (2, 2, 2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert len(checked) == expected
    parameters[1].grad = None
    before = parameters[1].clone()
    optimizer.step()
    assert len(checked) == 3
    assert torch.equal(parameters[1], before)
    assert not torch.equal(parameters[0], before)
