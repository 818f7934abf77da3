"""The virtual clock is one of discrete events: what runs at the same time shares links and host memory, whoever was
first, and the core's schedule takes what the performance model says. Times by hand."""

from __future__ import annotations

import gc
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import offload
from offload import HardwareProfile, Rates, Static, Stride
from offload.accelerators.sim import SimAccelerator
from offload.testing import spans
from offload.timeline import elapsed_s

NUM_BYTES = 4 << 20
COPY_S = NUM_BYTES / 1e9  # at the rates below
RATES = {
    "h2d_bytes_per_s": 1e9,
    "d2h_bytes_per_s": 1e9,
    "memory_bytes_per_s": 1e12,
    "flops": 1e12,
    "latency_s": 0.0,
    "launch_s": 0.0,
}


class Link:
    """Copies in both directions, each on a stream of its own."""

    def __init__(self) -> None:
        self.devices = [torch.zeros(NUM_BYTES, dtype=torch.uint8, device="sim") for _ in range(2)]
        self.hosts = [torch.zeros(NUM_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.streams = [torch.Stream("sim"), torch.Stream("sim")]

    def up(self) -> None:
        with self.streams[0]:
            self.devices[0].copy_(self.hosts[0], non_blocking=True)

    def down(self) -> None:
        with self.streams[1]:
            self.hosts[1].copy_(self.devices[1], non_blocking=True)


@pytest.fixture
def link(sim: ModuleType) -> Link:
    link = Link()
    sim.set_profile(**RATES)
    sim.configure("lazy")
    return link


def times(sim: ModuleType) -> list[tuple[float, float]]:
    """Start and end of each operation, in copies of NUM_BYTES at the rates above."""
    return [(span.start_s / COPY_S, span.end_s / COPY_S) for span in sim.trace()]


def near(*expected: tuple[float, float]) -> list[Any]:
    return [pytest.approx(pair) for pair in expected]


def test_both_directions_slow_each_other_while_both_are_busy(sim: ModuleType, link: Link) -> None:
    sim.set_profile(both_bytes_per_s=0.5e9, d2h_bytes_per_s=2e9)
    link.up()
    link.down()
    # Down keeps a quarter of its rate, up a half of its own: both do half a gigabyte a second, to the end.
    assert times(sim) == near((0, 2), (0, 2))


def test_work_that_comes_later_slows_what_is_running(sim: ModuleType, link: Link) -> None:
    sim.set_profile(both_bytes_per_s=0.5e9)
    link.up()
    sim.host_charge(COPY_S / 2)
    link.down()
    assert times(sim) == near((0, 1.5), (0, 0.5), (0.5, 2.0))


def test_copies_and_host_work_share_host_memory(sim: ModuleType, link: Link) -> None:
    """Together they ask for 11 GB/s where there are 5.5: all of it runs at half speed."""
    sim.set_profile(host_dram_bytes_per_s=5.5e9)
    link.up()
    sim.host_charge(COPY_S, "host update", num_bytes=10 * NUM_BYTES)
    assert times(sim) == near((0, 2), (0, 2))
    assert sim.host_time_s() == pytest.approx(2 * COPY_S)


def test_host_bytes_of_copies(sim: ModuleType, link: Link) -> None:
    sim.set_profile(host_dram_bytes_per_s=1e9, host_bytes_per_h2d_byte=3, host_bytes_per_d2h_byte=0)
    link.up()
    link.down()
    assert times(sim) == near((0, 3), (0, 1))


def test_ready_first_is_served_first(sim: ModuleType, link: Link) -> None:
    """Not what was enqueued first: two streams want the link, and the second is ready before the first."""
    sim.set_profile(memory_bytes_per_s=2 * NUM_BYTES / COPY_S)
    with torch.Stream("sim"):
        link.devices[1].add_(1)
        link.devices[1].copy_(link.hosts[1], non_blocking=True)
    link.up()
    assert times(sim) == near((0, 1), (1, 2), (0, 1))


def test_work_that_is_told_of_late_takes_its_place_in_the_past(sim: ModuleType, link: Link) -> None:
    """A worker's clock is behind the one that was asked for first; the link was busy half of the time since."""
    with ThreadPoolExecutor(1, initializer=sim.own_host_clock) as worker:
        worker.submit(int).result()  # the worker's clock starts now
        sim.host_charge(0.5 * COPY_S)
        link.down()
        link.streams[1].synchronize()
        sim.host_charge(2 * COPY_S)
        assert sim.host_time_s() == pytest.approx(3.5 * COPY_S)
        worker.submit(link.up).result()
        worker.submit(lambda: link.devices[1].copy_(link.hosts[0], non_blocking=True)).result()
    assert sorted(times(sim)[-2:]) == near((0, 1), (1, 2))


def test_time_is_zero_again(sim: ModuleType, link: Link) -> None:
    """What was recorded before the clock was set back holds nothing up after it."""
    link.up()
    copied = link.streams[0].record_event()
    torch.accelerator.synchronize()
    assert sim.host_time_s() > 0
    sim.configure("lazy")
    link.streams[1].wait_event(copied)
    link.down()
    assert times(sim) == near((0, 1))


@pytest.mark.parametrize("executor", ["sync", "threads", "lazy", "eager", "random"])
def test_workers_make_no_difference_to_time(sim: ModuleType, link: Link, executor: str) -> None:
    """Whenever the worker's thread really ran: time follows from what waits for what."""
    sim.set_profile(host_dram_bytes_per_s=2e9)
    sim.configure(executor)

    def update(mark: object) -> object:
        sim.own_host_clock()
        sim.host_join(mark)
        sim.host_charge(COPY_S, "host update", num_bytes=2 * NUM_BYTES)
        return sim.host_mark()

    with ThreadPoolExecutor(1) as worker:
        future = worker.submit(update, sim.host_mark())
        link.up()
        link.streams[0].synchronize()
        sim.host_join(future.result())
    link.down()
    torch.accelerator.synchronize()
    # Together they want 3 GB/s of 2: at two thirds until both are done, then down alone.
    assert sim.host_time_s() == pytest.approx(2.5 * COPY_S)


# ---- the same on every run, whichever thread is first


def test_what_is_told_of_late_slows_what_ran_long_ago(sim: ModuleType, link: Link) -> None:
    """A worker's copy takes half of host memory beside work whose time was known; so does what came after that work."""
    sim.set_profile(host_dram_bytes_per_s=1e9)
    with ThreadPoolExecutor(1, initializer=sim.own_host_clock) as worker:
        sim.host_charge(COPY_S, "host update", num_bytes=NUM_BYTES)
        first = sim.host_mark()
        sim.host_charge(COPY_S, "another", num_bytes=NUM_BYTES)
        assert sim.host_time_s(first) == pytest.approx(COPY_S)
        assert sim.host_time_s() == pytest.approx(2 * COPY_S)
        worker.submit(link.up).result()
    assert sim.host_time_s(first) == pytest.approx(2 * COPY_S)
    assert times(sim) == near((0, 2), (2, 3), (0, 2))


@pytest.mark.slow
def test_the_oldest_work_is_forgotten_and_stays_as_it_was(sim: ModuleType, link: Link) -> None:
    """Half a million pieces are remembered. What is told of later than that waits until the forgotten ones are over."""
    sim.set_profile(host_dram_bytes_per_s=1e9)
    with ThreadPoolExecutor(1, initializer=sim.own_host_clock) as worker:
        sim.host_charge(1.0, num_bytes=1e9)
        first = sim.host_mark()
        for _ in range(1 << 19):
            sim.host_charge(1e-6)
        worker.submit(link.up).result()
    assert sim.host_time_s() == pytest.approx(1 + (1 << 19) * 1e-6)
    assert sim.host_time_s(first) == pytest.approx(1)
    spans = sim.trace()
    assert len(spans) == (1 << 19) * 3 // 4 + 2
    assert spans[-1].start_s == pytest.approx(1 + ((1 << 17) - 1) * 1e-6)


# Three threads, in the order of each. What others wait for is a mark, by its name; "look" asks for the time.
PROGRAM = {
    "main": (
        "charge 3",
        "mark a",
        "up",
        "look",
        "up",
        "charge 2",
        "mark b",
        "look",
        "join c",
        "down",
        "join d",
        "look",
    ),
    "first": ("join a", "charge 5", "look", "down", "charge 1", "mark c"),
    "second": ("join a", "up", "charge 2", "look", "join b", "down", "charge 4", "mark d"),
}


def run_in_turns(sim: ModuleType, links: dict[str, Link], seed: int) -> tuple[float, list[tuple[Any, ...]]]:
    """The program, its threads taking turns as ``seed`` says; what the clock says in the end, and all that ran."""
    sim.configure("sync")
    marks: dict[str, object] = {}
    actions = {
        "charge": lambda amount: sim.host_charge(int(amount) * COPY_S / 3, amount, num_bytes=int(amount) * NUM_BYTES),
        "mark": lambda name: marks.update({name: sim.host_mark()}),
        "join": lambda name: sim.host_join(marks[name]),
        "up": lambda thread: links[thread].up(),
        "down": lambda thread: links[thread].down(),
        "look": sim.host_time_s,
    }
    chance, left = random.Random(seed), {thread: list(program) for thread, program in PROGRAM.items()}
    with ExitStack() as stack:
        threads = {name: stack.enter_context(ThreadPoolExecutor(1, initializer=sim.own_host_clock)) for name in PROGRAM}
        while left:
            thread = chance.choice(sorted(left))
            action, *argument = left[thread][0].split()
            if action == "join" and argument[0] not in marks:
                continue
            if action in ("up", "down"):  # each thread on streams of its own: their order is the program's to say
                argument = [thread]
            threads[thread].submit(actions[action], *argument).result()
            del left[thread][0]
            if not left[thread]:
                del left[thread]
        end_s = threads["main"].submit(sim.host_time_s).result()
    return end_s, sorted(sim.trace())


def test_time_is_the_same_in_whatever_turns_threads_reach_their_work(sim: ModuleType) -> None:
    links = {thread: Link() for thread in PROGRAM}
    sim.set_profile(**RATES)
    sim.set_profile(both_bytes_per_s=0.75e9, host_dram_bytes_per_s=3e9, launch_s=1e-5)
    expected = run_in_turns(sim, links, 0)
    assert len({span.start_s for span in expected[1]}) > 5
    for seed in range(1, 30):
        assert run_in_turns(sim, links, seed) == expected, f"turns of seed {seed}"


def held_training(sim: ModuleType, monkeypatch: pytest.MonkeyPatch, held: str) -> tuple[float, list[tuple[Any, ...]]]:
    """Three steps whose updates run beside the next forward, one of the threads being held back in each of them."""
    began, may_go = threading.Event(), threading.Event()
    charge = SimAccelerator.charge_host_time

    def charge_later(self: SimAccelerator, seconds: float, name: str = "", **amounts: int) -> None:
        is_update = name.startswith("C")
        if is_update and held == "worker":
            assert may_go.wait(60)
        charge(self, seconds, name, **amounts)
        if is_update:
            began.set()

    monkeypatch.setattr(SimAccelerator, "charge_host_time", charge_later)
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128, bias=False) for _ in range(6)]
    model = nn.Sequential(*layers).to("sim", torch.bfloat16)
    optimizer = offload.AdamW(model.parameters(), plan=Stride(2), overlap="next_forward", subgroup_numel=128 * 128)
    x = torch.ones(4, 128, dtype=torch.bfloat16, device="sim")
    torch.accelerator.synchronize()
    sim.configure("sync", races=False, poison=False)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.clip_grad_norm_(1.0)
        began.clear()
        may_go.clear()
        optimizer.step()
        if held == "caller":
            assert began.wait(60)
        sim.host_time_s()
        may_go.set()
        model.zero_grad()
    optimizer.synchronize()
    torch.accelerator.synchronize()
    monkeypatch.undo()
    spans = sorted((span.name, span.engine, span.start_s, span.end_s) for span in sim.trace())
    return sim.host_time_s(), spans


def test_training_takes_the_same_time_whichever_thread_is_held_back(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim.emulate(HardwareProfile.load("rtx4090-desktop"))
    expected = held_training(sim, monkeypatch, "none")
    assert held_training(sim, monkeypatch, "worker") == expected
    assert held_training(sim, monkeypatch, "caller") == expected
    gc.collect()


# ---- machines


@pytest.mark.parametrize("name", ["h100-sxm-node", "rtx4090-desktop"])
def test_links_of_a_machine(sim: ModuleType, name: str) -> None:
    profile = HardwareProfile.load(name)
    sim.emulate(profile)
    assert torch.accelerator.get_memory_info(0)[1] == pytest.approx(profile.device_memory_bytes, rel=1e-3)
    link = Link()
    alone = {}
    for direction in ("up", "down"):
        sim.configure("lazy")
        getattr(link, direction)()
        (span,) = sim.trace()
        alone[direction] = span.end_s - span.start_s
        rate = profile.h2d_bytes_per_s if direction == "up" else profile.d2h_bytes_per_s
        assert alone[direction] == pytest.approx(profile.copy_latency_s + NUM_BYTES / rate, rel=0.01)
    sim.set_profile(host_dram_bytes_per_s=math.inf)  # which both directions together may ask too much of
    sim.configure("lazy")
    link.up()
    link.down()
    (up, down) = sim.trace()
    overlap_s = up.end_s - down.start_s
    assert up.start_s == pytest.approx(profile.launch_latency_s)
    assert down.start_s == pytest.approx(2 * profile.launch_latency_s)
    lost = (up.end_s - up.start_s - alone["up"]) / overlap_s
    assert lost == pytest.approx(1 - profile.both_bytes_per_s / profile.h2d_bytes_per_s, abs=0.01)


def test_flops_are_those_of_torchs_counter(sim: ModuleType) -> None:
    """Memory costs nothing here and an operation per second is done, so the clock counts operations."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True),
        nn.Linear(64, 5),
    ).to("sim")
    x = torch.randn(2, 3, 8, 8, device="sim", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    sim.set_profile(memory_bytes_per_s=1e30, flops=1.0, launch_s=0.0)
    sim.configure()
    model(x).sum().backward()
    torch.accelerator.synchronize()
    assert sim.host_time_s() == pytest.approx(counter.get_total_flops())


PLANS = ["host", Stride(2), Static(0.25), "device"]
# dos-h100: its update on the device is slower than its bytes, being that of the optimizer it was measured with.
IN_DEFAULT = [
    ("dos-h100", Stride(2)),
    ("dos-h100", "device"),
    ("rtx4090-desktop", Stride(2)),
    ("h100-sxm-node", "host"),
]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(name, plan, marks=[] if (name, plan) in IN_DEFAULT else pytest.mark.slow)
        for name in HardwareProfile.names()
        for plan in PLANS
    ],
    ids=str,
)
def test_step_takes_what_the_performance_model_says(sim: ModuleType, name: str, plan: Any) -> None:
    """One definition of the schedule, run on streams in virtual time and on virtual lanes."""
    profile = HardwareProfile.load(name)
    sim.emulate(profile)
    numel = 2_000_000 if name == "gh200" else 500_000  # whose copies would take no longer than their latency
    params = [nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="sim")) for _ in range(8)]
    optimizer = offload.AdamW(params, plan=plan, subgroup_numel=numel)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.synchronize()
    sim.configure("sync")
    optimizer.step()
    optimizer.synchronize()
    work = {"h2d", "d2h", "offload::update_"}  # not the look for gradients that are not finite
    ran = [span for span in spans() if span.name in work or span.lane == "host"]
    predicted = optimizer.runtime.simulate(Rates.from_profile(profile))
    assert elapsed_s(ran) == pytest.approx(predicted.update_s, rel=0.02)
    assert sim.races() == []
    del optimizer, params, param
    gc.collect()
