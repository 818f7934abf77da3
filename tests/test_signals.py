"""A signal in the middle of a step is heard after it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

import offload
from offload.adam import AdamSubgroup
from offload.signals import DEFERRED, deferred_signals
from tests.training import assert_same_bits, loss_of, mlp, snapshot, state_snapshot


class HeardError(Exception):
    """What the handler of a program raises."""


@pytest.fixture(params=["SIGINT", "SIGTERM"])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal whose handler raises, as KeyboardInterrupt would be."""

    def raise_heard(*_: object) -> None:
        raise HeardError

    number = getattr(signal, request.param)
    before = signal.signal(number, raise_heard)
    yield number
    signal.signal(number, before)


def test_handler_runs_at_the_end(number: int) -> None:
    done = []

    def critical() -> None:
        with deferred_signals():
            signal.raise_signal(number)
            with deferred_signals():
                done.append("inner")
            done.append("all of it")

    with pytest.raises(HeardError):
        critical()
    assert done == ["inner", "all of it"]
    with pytest.raises(HeardError):
        signal.raise_signal(number)  # as before


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """Python's own handler, which a job that a shell runs in the background does not begin with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_second_interrupt_is_heard_at_once() -> None:
    went_on = False

    def stuck() -> None:
        nonlocal went_on
        with deferred_signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            went_on = True

    with pytest.raises(KeyboardInterrupt):
        stuck()
    assert not went_on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("number")
def test_handlers_are_what_they_were_after_an_error() -> None:
    before = [signal.getsignal(each) for each in DEFERRED]
    with pytest.raises(ValueError), deferred_signals():
        raise ValueError
    assert [signal.getsignal(each) for each in DEFERRED] == before


def step_whole(optimizer: offload.AdamW) -> None:
    optimizer.step()
    optimizer.synchronize()


def signal_in(monkeypatch: pytest.MonkeyPatch, method: str, number: int) -> None:
    """Raise a signal in the main thread in the middle of a step, once."""
    original: Callable[..., None] = getattr(AdamSubgroup, method)
    left = [number]

    def interrupted(*arguments: object) -> None:
        if left:
            signal.raise_signal(left.pop())
        original(*arguments)

    monkeypatch.setattr(AdamSubgroup, method, interrupted)


@pytest.mark.parametrize("method", ["begin_step", "grad_down", "upload"])
@pytest.mark.parametrize("overlap", ["none", "next_forward"])
@pytest.mark.usefixtures("one_torch_thread")
def test_step_is_whole(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int, method: str, overlap: str
) -> None:
    """Parameters, state and step counts are those of the whole step, and training goes on."""

    def run(interrupts: bool) -> object:
        model = mlp(device="sim")
        optimizer = offload.AdamW(model.parameters(), plan=offload.Stride(2), subgroup_numel=600, overlap=overlap)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if interrupts and step == 1:
                with monkeypatch.context() as patch:
                    signal_in(patch, method, number)
                    with pytest.raises(HeardError):
                        step_whole(optimizer)
            else:
                optimizer.step()
        return snapshot(model), state_snapshot(optimizer)

    assert_same_bits(run(interrupts=True), run(interrupts=False))


@pytest.mark.usefixtures("one_torch_thread")
def test_interrupt_while_a_reader_waits(sim: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """In the forward pass, with the update in flight: what was pending is settled, not given up."""
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan="host", subgroup_numel=600, overlap="next_forward")
    loss_of(model, 0).backward()
    optimizer.step()
    conductor = optimizer.runtime._conductor
    wait = conductor._wait

    def interrupted(*arguments: object) -> object:
        signal.raise_signal(number)
        return wait(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(conductor, "_wait", interrupted)
        with pytest.raises(HeardError):
            model[0].weight.sum()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    optimizer.synchronize()
    reference = mlp(device="sim")
    plain = offload.AdamW(reference.parameters(), plan="host", subgroup_numel=600, overlap="none")
    for step in range(2):
        plain.zero_grad()
        loss_of(reference, step).backward()
        plain.step()
    assert_same_bits(snapshot(model), snapshot(reference))
    assert all(type(param) is torch.nn.Parameter for param in model.parameters())
