"""Waits end, and say what they waited for. Nothing here waits for a clock: what is late is late for ever."""

from __future__ import annotations

import ctypes
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import offload
from offload import watchdog
from offload.accelerators import accelerator_for
from offload.lanes import Work
from offload.lanes.accelerator import HostLane, StreamEvent
from offload.tensor_file import TensorFileWriter
from offload.watchdog import StuckStepError, Watchdog, timeout_s, wait_for
from tests.training import loss_of, mlp


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_TIMEOUT_S", "0.05")
    monkeypatch.setattr(watchdog, "_LOOK_S", 0.02)


def test_timeout_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFLOAD_TIMEOUT_S", raising=False)
    assert timeout_s() == 600
    monkeypatch.setenv("OFFLOAD_TIMEOUT_S", "2.5")
    assert timeout_s() == 2.5
    for value in ("0", "-1", "soon", "nan"):
        monkeypatch.setenv("OFFLOAD_TIMEOUT_S", value)
        with pytest.raises(ValueError, match="OFFLOAD_TIMEOUT_S must be a positive number of seconds"):
            timeout_s()


def test_what_is_done_costs_no_look_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_TIMEOUT_S", "nonsense")
    future: Future[int] = Future()
    future.set_result(3)
    assert wait_for(future, lambda: "", []) == 3


@pytest.mark.usefixtures("impatient")
def test_a_wait_that_does_not_end_says_for_what() -> None:
    with pytest.raises(StuckStepError, match=r"^the step waits for C3@0: not done after 0.05 s.*OFFLOAD_TIMEOUT_S"):
        wait_for(Future(), lambda: "the step waits for C3@0", [threading.current_thread()])


def test_an_error_that_is_a_timeout_is_not_taken_for_one() -> None:
    future: Future[int] = Future()
    future.set_exception(TimeoutError("of the work itself"))
    with pytest.raises(TimeoutError, match="of the work itself"):
        wait_for(future, lambda: "", [])


@pytest.mark.usefixtures("impatient")
def test_stuck_worker_is_named_with_what_it_does(sim: ModuleType) -> None:
    lane, release = HostLane(accelerator_for(torch.device("sim", 0))), threading.Event()
    blocked = lane.submit(Work("C3@0", run=lambda: (release.wait(), None)[1]))
    behind = lane.submit(Work("C5@1"), after=(blocked,))
    try:
        with pytest.raises(StuckStepError, match="waits for C5@1 of lane host, whose worker runs C3@0: not done"):
            behind.synchronize()
    finally:
        release.set()
    blocked.synchronize()
    behind.synchronize()


@pytest.mark.usefixtures("impatient")
def test_worker_that_waits_is_named_with_the_event(sim: ModuleType) -> None:
    lane, release = HostLane(accelerator_for(torch.device("sim", 0))), threading.Event()

    class NeverYet:
        def synchronize(self) -> None:
            assert release.wait(100)

        def __str__(self) -> str:
            return "D3@0 of lane d2h"

    event = lane.submit(Work("C3@0"), after=(NeverYet(),))
    try:
        with pytest.raises(StuckStepError, match=r"C3@0 of .*, whose worker waits for D3@0 of lane d2h before C3@0"):
            event.synchronize()
    finally:
        release.set()
    event.synchronize()


def test_dead_worker_is_found(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two pieces of work: the next is lost, and nobody would ever answer."""
    monkeypatch.setattr(watchdog, "_LOOK_S", 0.02)
    lane = HostLane(accelerator_for(torch.device("sim", 0)))
    lane.submit(Work("C0@0")).synchronize()
    (thread,) = lane._worker.started
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    event = lane.submit(Work("C1@0"))
    with pytest.raises((StuckStepError, SystemExit)) as raised:
        event.synchronize()
    if raised.type is StuckStepError:  # else it died within the work, and the work says so
        assert f"its thread {thread.name!r} has died" in str(raised.value)


def step_whole(optimizer: offload.AdamW) -> None:
    optimizer.step()
    optimizer.synchronize()


@pytest.mark.usefixtures("impatient", "one_torch_thread")
@pytest.mark.parametrize("overlap", ["none", "next_forward"])
def test_stuck_step_of_an_optimizer(sim: ModuleType, monkeypatch: pytest.MonkeyPatch, overlap: str) -> None:
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan="host", subgroup_numel=600, overlap=overlap)
    release = threading.Event()
    monkeypatch.setattr(optimizer.runtime.accelerator, "begin_host_task", release.wait)
    monkeypatch.setattr(optimizer.runtime.lanes.host._accelerator, "begin_host_task", release.wait)
    loss_of(model, 0).backward()
    try:
        with pytest.raises(StuckStepError, match="waits for C0@0 of lane host, whose worker runs C0@0"):
            step_whole(optimizer)
    finally:
        release.set()
    with pytest.raises(RuntimeError, match="this optimizer is broken"):
        optimizer.step()


# ---- waits that cannot be given up


class Heard(logging.Handler):
    """Waits until something is logged, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._any = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self._any.set()

    def wait(self) -> None:
        assert self._any.wait(100)


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    watchdog.logger.addHandler(handler)
    yield handler
    watchdog.logger.removeHandler(handler)


def lose_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, with a watchdog that is not asleep until the end of an earlier wait's patience."""
    monkeypatch.setenv("OFFLOAD_TIMEOUT_S", "0.05")
    monkeypatch.setattr(watchdog, "_watchdog", Watchdog())


@pytest.mark.usefixtures("impatient")
def test_a_long_wait_is_said_once(heard: Heard) -> None:
    dog = Watchdog()
    with dog.watch(lambda: "the disk"), dog.watch(lambda: "the device"):
        thread = dog._thread
        assert thread is not None
        heard.wait()
        thread.join(100)  # as nobody waits who was not said
        assert not thread.is_alive()
    begins = [message.split(":")[0] for message in heard.messages]
    assert sorted(begins) == ["the device", "the disk"]
    assert "not done after 0.05 s, and it cannot be given up" in heard.messages[0]
    assert "OFFLOAD_TIMEOUT_S" in heard.messages[0]


def test_what_ends_in_time_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog()
    monkeypatch.setattr(dog, "_run", lambda limit_s: None)
    with dog.watch(lambda: "short"):
        assert dog._next_deadline_s() is not None
        assert dog._take_late() == []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: float("inf"))
    assert dog._take_late() == []


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize(
    ("hangs", "said"),
    [
        ("U", r"optimizer\.synchronize\(\) waits: h2d has not done U0@0: not done after 0\.05 s"),
        ("F", r"optimizer\.synchronize\(\) waits: d2h has not done F1@0: "),
        ("", r"optimizer\.synchronize\(\) waits: .* none of its own work, but the model's, or another rank's: "),
    ],
)
def test_a_device_that_hangs_is_named(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, heard: Heard, hangs: str, said: str
) -> None:
    """By the first operation of each lane that is not done."""

    class Hanging(StreamEvent):
        def query(self) -> bool:
            return not hangs or not self.name.startswith(hangs)

        def synchronize(self) -> None:
            heard.wait()
            super().synchronize()

    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan=offload.Stride(2), subgroup_numel=600, overlap="none")
    loss_of(model, 0).backward()
    monkeypatch.setattr("offload.lanes.accelerator.StreamEvent", Hanging)
    with monkeypatch.context() as patch:
        patch.setattr(Hanging, "synchronize", StreamEvent.synchronize)  # the step does not hang
        optimizer.step()
    lose_patience(monkeypatch)
    optimizer.synchronize()
    assert re.match(said, heard.messages[0])


@pytest.mark.usefixtures("one_torch_thread")
def test_a_step_that_waits_for_backward_is_named(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan="host", subgroup_numel=600)
    loss_of(model, 0).backward()
    lose_patience(monkeypatch)
    monkeypatch.setattr("offload.optimizer.all_finite", lambda grads: heard.wait() is None)
    optimizer.step()
    assert heard.messages[0].startswith("optimizer.step() waits: what it waits for is none of its own work")


def test_an_update_that_waits_for_a_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    model = mlp()
    optimizer = offload.AdamW(model.parameters(), plan="host", subgroup_numel=200)
    loss_of(model, 0).backward()
    write = TensorFileWriter.write

    def hanging(writer: TensorFileWriter, *args: Any) -> None:
        heard.wait()
        write(writer, *args)

    monkeypatch.setattr(TensorFileWriter, "write", hanging)
    lose_patience(monkeypatch)
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    optimizer.step()
    saving.result(100)
    assert heard.messages[0].startswith("an update waits until its subgroup is copied for the checkpoint")
