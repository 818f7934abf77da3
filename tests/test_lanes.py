"""Lanes: order, errors and time, on each kind."""

from __future__ import annotations

import threading
import traceback
from functools import partial
from types import ModuleType

import pytest
import torch

from offload.accelerators import Accelerator
from offload.lanes import Lane, Lanes, Work
from offload.lanes.accelerator import HostLane, StreamLane, accelerator_lanes
from offload.lanes.inline import inline_lanes
from offload.lanes.lazy import LazyWorld, lazy_lanes
from offload.lanes.virtual import Cost, VirtualMachine


def explode() -> None:
    raise ArithmeticError("the update failed")


def note(log: list[str], name: str) -> Work:
    return Work(name, partial(log.append, name))


# ---- the host lane


def host_lane() -> HostLane:
    return HostLane(Accelerator(torch.device("cpu")))  # the base class: a real device, whose host hooks do nothing


def test_host_lane_runs_off_the_calling_thread_in_order() -> None:
    lane, log, threads = host_lane(), [], set()
    for i in range(20):
        event = lane.submit(note(log, str(i)))
        lane.submit(Work("thread", lambda: threads.add(threading.get_ident())))
    lane.mark().synchronize()
    event.synchronize()
    assert log == [str(i) for i in range(20)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_host_lane_waits_for_its_events() -> None:
    first, second = host_lane(), host_lane()
    gate, log = threading.Event(), []
    opened = first.submit(Work("gate", lambda: log.append("gate" if gate.wait(60) else "timeout")))
    done = second.submit(note(log, "after"), after=(None, opened))
    second.wait(opened)
    last = second.submit(note(log, "last"))
    gate.set()
    last.synchronize()
    done.synchronize()
    assert log == ["gate", "after", "last"]


def test_error_surfaces_at_the_wait_with_its_traceback() -> None:
    lane = host_lane()
    event = lane.submit(Work("C0@0", explode))
    with pytest.raises(ArithmeticError, match="the update failed") as raised:
        event.synchronize()
    assert "explode" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


def test_nothing_runs_after_an_error() -> None:
    lane, log = host_lane(), []
    lane.submit(note(log, "before"))
    failed = lane.submit(Work("C0@0", explode))
    later = [lane.submit(note(log, "later")), lane.mark()]
    lane.wait(failed)
    later.append(lane.submit(note(log, "later still")))
    errors = []
    for event in (failed, *later):
        with pytest.raises(ArithmeticError) as raised:
            event.synchronize()
        errors.append(raised.value)
    assert log == ["before"]
    assert len(set(map(id, errors))) == 1, "every later wait raises the first error itself"
    assert "explode" in [frame.name for frame in traceback.extract_tb(errors[0].__traceback__)]


def test_error_crosses_to_a_lane_that_waits() -> None:
    first, second, log = host_lane(), host_lane(), []
    failed = first.submit(Work("C0@0", explode))
    second.submit(note(log, "needs it"), after=(failed,))
    with pytest.raises(ArithmeticError):
        second.mark().synchronize()
    assert log == []


def test_synchronizing_all_lanes_raises_a_workers_error() -> None:
    idle = inline_lanes().compute
    lanes = Lanes(compute=idle, h2d=idle, d2h=idle, host=host_lane(), update=idle)
    lanes.synchronize()
    lanes.host.submit(Work("C0@0", explode))
    with pytest.raises(ArithmeticError):
        lanes.synchronize()


# ---- stream lanes, on the emulated device


@pytest.fixture
def device(sim: ModuleType) -> torch.device:
    return torch.device("sim", 0)


@pytest.mark.parametrize("executor", ["sync", "lazy", "eager", "random"])
def test_accelerator_lanes_order_by_events_alone(sim: ModuleType, device: torch.device, executor: str) -> None:
    """device -> host -> update by the worker -> device -> device, through all four lanes and every kind of wait."""
    sim.configure(executor=executor, seed=1)
    lanes = accelerator_lanes(device)
    on_device = torch.zeros(1000, device=device)
    result = torch.zeros(1000, device=device)
    on_host = torch.zeros(1000).pin_memory()
    accelerator_work = partial(Work, "work")

    lanes.compute.submit(accelerator_work(lambda: on_device.fill_(3.0)))
    down = lanes.d2h.submit(
        accelerator_work(lambda: on_host.copy_(on_device, non_blocking=True)), after=(lanes.compute.mark(), None)
    )

    def double() -> None:
        sim.host_access(on_host, write=True, name="double")
        on_host.mul_(2)

    doubled = lanes.host.submit(accelerator_work(double), after=(down,))
    lanes.h2d.submit(accelerator_work(lambda: on_device.copy_(on_host, non_blocking=True)), after=(doubled,))
    lanes.compute.wait(lanes.h2d.mark())
    lanes.compute.submit(accelerator_work(lambda: result.add_(on_device)))
    lanes.synchronize()
    assert torch.equal(result.cpu(), torch.full((1000,), 6.0))
    assert sim.races() == []


def test_missing_wait_on_stream_lanes_is_a_race(sim: ModuleType, device: torch.device) -> None:
    lanes = accelerator_lanes(device)
    on_device, on_host = torch.zeros(1000, device=device), torch.zeros(1000).pin_memory()
    lanes.compute.submit(Work("fill", lambda: on_device.fill_(3.0)))
    lanes.d2h.submit(Work("copy", lambda: on_host.copy_(on_device, non_blocking=True)))
    lanes.synchronize()
    assert len(sim.races()) == 1


def test_compute_lane_is_the_current_stream(device: torch.device) -> None:
    lanes = accelerator_lanes(device)
    assert isinstance(lanes.compute, StreamLane)
    assert isinstance(lanes.h2d, StreamLane)
    assert isinstance(lanes.d2h, StreamLane)
    other = torch.Stream(device)
    with other:
        assert lanes.compute.stream == other
        seen = []
        lanes.h2d.submit(Work("look", lambda: seen.append(torch.accelerator.current_stream(device))))
        assert seen == [lanes.h2d.stream]
        assert torch.accelerator.current_stream(device) == other
    assert len({lane.stream.stream_id for lane in (lanes.compute, lanes.h2d, lanes.d2h)}) == 3


def test_error_on_a_stream_lane_is_raised_at_once(device: torch.device) -> None:
    lanes = accelerator_lanes(device)
    before = torch.accelerator.current_stream(device)
    with pytest.raises(ArithmeticError):
        lanes.h2d.submit(Work("P0@0", explode))
    assert torch.accelerator.current_stream(device) == before


def test_host_error_is_raised_by_the_stream_that_waits(device: torch.device) -> None:
    lanes, log = accelerator_lanes(device), []
    failed = lanes.host.submit(Work("C0@0", explode))
    with pytest.raises(ArithmeticError):
        lanes.h2d.submit(note(log, "U0@0"), after=(failed,))
    assert log == []


# ---- inline lanes


def test_inline_lanes_run_at_once() -> None:
    lanes, log = inline_lanes(), []
    event = lanes.host.submit(note(log, "a"))
    lanes.h2d.submit(note(log, "b"), after=(event, None))
    assert log == ["a", "b"]
    lanes.compute.wait(lanes.d2h.mark())
    lanes.synchronize()
    with pytest.raises(ArithmeticError):
        lanes.d2h.submit(Work("F0@0", explode))


# ---- lazy lanes


def submit_two(lanes: Lanes, log: list[str]) -> None:
    lanes.h2d.submit(note(log, "h2d"))
    lanes.d2h.submit(note(log, "d2h"))


def test_lazy_lanes_run_nothing_before_a_wait() -> None:
    lanes, log = lazy_lanes(0), []
    event = lanes.h2d.submit(note(log, "first"))
    lanes.h2d.submit(note(log, "second"))
    assert log == []
    event.synchronize()
    assert log == ["first"]
    lanes.synchronize()
    assert log == ["first", "second"]


def test_lazy_lanes_try_both_orders_and_repeat_each() -> None:
    def order(seed: int) -> tuple[str, ...]:
        lanes, log = lazy_lanes(seed), []
        submit_two(lanes, log)
        lanes.synchronize()
        return tuple(log)

    assert {order(seed) for seed in range(20)} == {("h2d", "d2h"), ("d2h", "h2d")}
    assert all(order(seed) == order(seed) for seed in range(20))


@pytest.mark.parametrize("favour", LazyWorld.LANES)
def test_favoured_lane_runs_whenever_it_can(favour: str) -> None:
    world, log = LazyWorld(0, favour=favour), []
    lanes = world.lanes()
    others = [name for name in LazyWorld.LANES if name != favour]
    for name in others:
        getattr(lanes, name).submit(note(log, name))
    favoured: Lane = getattr(lanes, favour)
    favoured.submit(note(log, "early"))
    favoured.submit(note(log, "late"), after=(getattr(lanes, others[0]).mark(),))
    lanes.synchronize()
    assert log[0] == "early"
    assert log.index("late") > log.index(others[0])


def test_lazy_waits_are_kept_and_lanes_are_in_order() -> None:
    for seed in range(30):
        lanes, log = lazy_lanes(seed, eagerness=0.4), []
        produced = lanes.d2h.submit(note(log, "produce"))
        lanes.host.wait(produced)
        lanes.host.submit(note(log, "consume"))
        lanes.host.submit(note(log, "then"))
        lanes.synchronize()
        assert log == ["produce", "consume", "then"]


def test_eager_lazy_lanes_run_at_submission() -> None:
    lanes, log = lazy_lanes(0, eagerness=1.0), []
    submit_two(lanes, log)
    assert log == ["h2d", "d2h"]


def test_lazy_deadlock_is_an_error() -> None:
    elsewhere = lazy_lanes(0).h2d.submit(Work("never run"))
    lanes = lazy_lanes(0)
    event = lanes.compute.submit(Work("stuck"), after=(elsewhere,))
    with pytest.raises(RuntimeError, match="deadlock: no lane can go on"):
        event.synchronize()


def test_lazy_error_surfaces_at_the_wait() -> None:
    lanes = lazy_lanes(0)
    event = lanes.host.submit(Work("C0@0", explode))
    with pytest.raises(ArithmeticError):
        event.synchronize()


# ---- virtual lanes


@pytest.fixture
def machine() -> VirtualMachine:
    return VirtualMachine()


@pytest.fixture
def timed(machine: VirtualMachine) -> Lanes:
    cost = Cost(lambda work: float(work.num_bytes))
    return machine.lanes(dict.fromkeys(LazyWorld.LANES, cost))


def seconds(name: str, duration: int) -> Work:
    return Work(name, num_bytes=duration)


def times(machine: VirtualMachine) -> dict[str, tuple[str, float, float]]:
    machine.run()
    return {event.name: (event.lane.name, event.start_s, event.end_s) for event in machine.events}


def test_virtual_lanes_overlap_and_wait(machine: VirtualMachine, timed: Lanes) -> None:
    up = timed.h2d.submit(seconds("up", 3))
    timed.h2d.submit(seconds("up again", 2))
    timed.d2h.submit(seconds("down", 4))
    timed.compute.submit(seconds("update", 1), after=(up, None))
    timed.compute.wait(timed.d2h.mark())
    timed.compute.submit(seconds("forward", 1))
    assert times(machine) == {
        "up": ("h2d", 0, 3),
        "up again": ("h2d", 3, 5),
        "down": ("d2h", 0, 4),
        "update": ("compute", 3, 4),
        "forward": ("compute", 4, 5),
    }


def test_only_the_submitting_thread_can_wait_for_the_worker(machine: VirtualMachine, timed: Lanes) -> None:
    """So all that is submitted after such a wait starts no earlier, on whatever lane."""
    timed.d2h.submit(seconds("D0@0", 1))
    updated = timed.host.submit(seconds("C0@0", 5))
    timed.h2d.submit(seconds("U0@0", 1), after=(updated,))
    timed.d2h.submit(seconds("D1@0", 1))
    ran = times(machine)
    assert ran["D0@0"] == ("d2h", 0, 1)
    assert ran["U0@0"] == ("h2d", 5, 6)
    assert ran["D1@0"] == ("d2h", 5, 6)


def test_worker_waits_for_itself_and_for_streams_without_holding_the_submitter(
    machine: VirtualMachine, timed: Lanes
) -> None:
    down = timed.d2h.submit(seconds("D0@0", 2))
    first = timed.host.submit(seconds("C0@0", 5), after=(down,))
    timed.host.submit(seconds("C1@1", 5), after=(first,))
    timed.h2d.submit(seconds("P2@0", 1))
    assert times(machine) == {
        "D0@0": ("d2h", 0, 2),
        "C0@0": ("host", 2, 7),
        "C1@1": ("host", 7, 12),
        "P2@0": ("h2d", 0, 1),
    }
