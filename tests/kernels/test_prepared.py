"""Prepared steps: the results of adam_step, and next to nothing done in Python at each call."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import offload
from offload.kernels import (
    PreparedStep,
    available_implementations,
    dispatch,
    native,
    set_num_threads,
    threads,
    use_implementation,
)


@pytest.mark.parametrize("implementation", [None, *available_implementations()])
@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_same_bits_as_unprepared(buffers: Any, make_scalars: Any, implementation: str | None, numel: int) -> None:
    start = buffers.adversarial(numel, torch.bfloat16, torch.bfloat16, amsgrad=True)
    expected = start.clone().step(*make_scalars(), implementation=implementation)
    step = PreparedStep(*start.tensors(), implementation=implementation)
    for scalars in make_scalars():
        step(scalars)
    start.assert_same_bits(expected)


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
    step = PreparedStep(*state.tensors())
    step(scalars)  # these scalars are packed now
    prepared = calls_made_by(lambda: step(scalars))
    unprepared = calls_made_by(lambda: state.step(scalars))
    assert not [name for name in prepared if name.startswith(("Tensor", "TensorBase", "_TensorBase"))], prepared
    assert prepared["increment_version"] == 1
    assert sum(prepared.values()) <= 22, prepared
    assert sum(unprepared.values()) > 4 * sum(prepared.values()), "then there is no need to prepare anything"


def test_one_call_of_the_library(buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = native.load()
    called = []
    monkeypatch.setattr(kernel, "_step", lambda *arguments: called.append(arguments) or 0)
    step = PreparedStep(*buffers.ordinary(1000).tensors(), implementation="scalar")
    for scalars in make_scalars():
        step(scalars)
    assert len(called) == 3
    packed = {tuple(map(id, arguments[:-3])) for arguments in called}
    assert len(packed) == 1, "the very same objects each time"
    assert len({id(arguments[-3]) for arguments in called}) == 3, "and scalars of its own for each step"


def test_settings_are_followed_after_preparation(
    buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def bind(_kernel: object, isa: str, *_tensors: object) -> Callable[..., None]:
        return lambda _scalars, num_threads: used.append((isa, num_threads))

    monkeypatch.setattr(native.NativeKernel, "bind", bind)
    monkeypatch.setattr(threads, "MIN_PARALLEL_NUMEL", 8)
    monkeypatch.delenv("OFFLOAD_KERNEL", raising=False)
    [scalars] = make_scalars([1])
    with use_implementation("scalar"):
        step, fixed = (PreparedStep(*buffers.ordinary(8).tensors(), num_threads=each) for each in (None, 2))
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
    state = buffers.ordinary(8)
    with pytest.raises(TypeError, match=r"exp_avg must be of torch\.float32"):
        PreparedStep(state.master, state.exp_avg.double(), state.exp_avg_sq, state.grad)
    with pytest.raises(ValueError, match=r"(grad and master|master and grad) overlap"):
        PreparedStep(state.master, state.exp_avg, state.exp_avg_sq, state.master)
    with pytest.raises(ValueError, match="'sse' is not available"):
        PreparedStep(*state.tensors(), implementation="sse")
    with pytest.raises(ValueError, match="num_threads must be at least 1, not 0"):
        PreparedStep(*state.tensors(), num_threads=0)


def test_autograd_sees_the_writes(buffers: Any, make_scalars: Any) -> None:
    state = buffers.ordinary(8, out_dtype=torch.float32)
    parameter = torch.nn.Parameter(torch.ones(8))
    step = PreparedStep(state.master, state.exp_avg, state.exp_avg_sq, state.grad, parameter)
    loss = (parameter * torch.ones(8, requires_grad=True)).sum()
    step(*make_scalars([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_without_memory_are_never_handed_to_the_library(buffers: Any, make_scalars: Any) -> None:
    [scalars] = make_scalars([1])
    PreparedStep(*buffers.ordinary(10).map(lambda tensor: tensor.to("meta")).tensors())(scalars)
    with FakeTensorMode():
        PreparedStep(*(torch.empty(10) for _ in range(4)))(scalars)


def test_the_optimizer_checks_its_buffers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In three steps over two subgroups; and again for a run of parameters that is new, for want of a gradient."""
    checked = []
    honest = dispatch.check_arguments
    monkeypatch.setattr(dispatch, "check_arguments", lambda *tensors: (checked.append(1), honest(*tensors))[1])
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
