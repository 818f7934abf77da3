"""Slots in memory that backward gives back: the same bits, no higher peak, and what becomes of them when plans fail."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload import MemoryMonitor, Placement, Plan, PlanError, Stride
from offload.executor import lend
from offload.lanes import Lane
from offload.monitor import MemorySample, Phase
from offload.passing_slots import room_after
from offload.plan import lower
from offload.subgroup import Slot
from offload.testing import faults
from tests.training import assert_same_bits, snapshot, state_snapshot

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_LAYERS, WIDTH = 6, 32
ROWS = 3 * WIDTH  # so that an activation is as large as a state, and a slot takes its very memory
STATE_BYTES = 12 * WIDTH**2
NUM_STEPS = 5
PLAN = "P1@0 P3@1 D0@0 C0@0 U0@0 P5@2 G1@0 F1@0 D2@0 C2@0 U2@0 G3@1 F3@1 D4@0 C4@0 U4@0 G5@2 F5@2"  # of three slots


class Layer(nn.Module):
    """One matrix, and activations that its backward computes again: they are what a passing slot takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for _ in range(16):
            y = torch.tanh(y)
        return x + y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Training:
    """A model, its optimizer with passing slots, and the monitor that it follows."""

    def __init__(self, num_passing: int = 2, plan: Any = "device", overlap: str = "next_forward") -> None:
        torch.manual_seed(0)
        self._before_bytes = torch.accelerator.memory_allocated()
        self.model = Model().to("sim")
        self.monitor = MemoryMonitor("sim")
        passing: dict[str, Any] = {"num_passing_slots": num_passing, "memory_monitor": self.monitor}
        self.optimizer = offload.AdamW(
            self.model.parameters(),
            lr=1e-2,
            plan=plan,
            overlap=overlap,  # type: ignore[arg-type]
            subgroup_numel=WIDTH**2,
            **(passing if num_passing else {}),
        )
        self.monitor.attach(self.model, self.optimizer)
        self.losses: list[Tensor] = []

    @property
    def slots(self) -> list[bool]:
        """Whether each passing slot has memory."""
        return [slot.buffer is not None for slot in self.optimizer.runtime.pool.slots if slot.passes]

    def backward(self, seed: int) -> None:
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to("sim")
        loss = self.model(x).square().mean()
        loss.backward()
        self.losses.append(loss.detach())

    def step(self, step: int, num_micro_batches: int = 1) -> None:
        for micro_batch in range(num_micro_batches):
            self.backward(10 * step + micro_batch)
        self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps: range = range(NUM_STEPS), num_micro_batches: int = 1) -> tuple[Any, ...]:
        for step in steps:
            self.step(step, num_micro_batches)
        return self.end()

    def end(self) -> tuple[Any, ...]:
        self.optimizer.synchronize()
        return [loss.cpu() for loss in self.losses], snapshot(self.model), state_snapshot(self.optimizer)

    @property
    def peak_bytes(self) -> int:
        """Most memory that was allocated."""
        return max(sample.peak_allocated_bytes or 0 for sample in self.monitor.samples) - self._before_bytes


@cache
def in_order(num_micro_batches: int = 1) -> tuple[Any, ...]:
    return Training(0, "host", "none").run(num_micro_batches=num_micro_batches)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In which thread each slot was opened: by autograd in backward, or by the step."""
    threads: list[str] = []

    def note(*arguments: Any) -> None:
        threads.append("step" if threading.current_thread() is threading.main_thread() else "backward")
        lend(*arguments)

    monkeypatch.setattr("offload.passing_slots.lend", note)
    return threads


@pytest.mark.parametrize(
    ("overlap", "num_micro_batches", "executor"),
    [
        pytest.param("next_forward", 1, "lazy", marks=pytest.mark.slow),
        ("next_forward", 1, "threads"),
        ("next_forward", 3, "random"),
        ("backward", 1, "lazy"),
    ],
)
def test_bits_and_peak_are_those_without(
    overlap: str, num_micro_batches: int, executor: str, opened: list[str], sim: ModuleType
) -> None:
    expected = in_order(num_micro_batches)
    sim.configure(executor, seed=1)
    without = Training(0, overlap=overlap)
    assert_same_bits(without.run(num_micro_batches=num_micro_batches), expected)
    training = Training(2, overlap=overlap)
    assert_same_bits(training.run(num_micro_batches=num_micro_batches), expected)
    assert opened == ["backward"] * 2 * (NUM_STEPS - 2), "one step is run, one is watched"
    assert training.peak_bytes <= without.peak_bytes
    assert sim.races() == []
    bill = training.optimizer.bill
    assert (bill.slot_bytes, bill.passing_bytes) == (2 * STATE_BYTES, 2 * STATE_BYTES)
    assert "slots in freed memory 24.0 KiB" in str(bill)
    assert training.slots == [False, False]


def test_runs_the_plan_that_was_asked_for(sim: ModuleType) -> None:
    """Until its slots are there, its placements through those that last."""
    training = Training(1, PLAN)
    assert training.optimizer.plan.num_buffers(Placement.DEVICE) == 2
    ran = []
    for step in range(NUM_STEPS):
        training.step(step)
        ran.append(str(training.optimizer.plan) == PLAN)
    assert ran == [False, False, True, True, True]
    assert_same_bits(training.end(), in_order())


def test_a_plan_may_be_set_before_its_slots_are_there(sim: ModuleType) -> None:
    training = Training(1, Stride(2))
    training.optimizer.set_plan(Plan.parse(PLAN))
    assert_same_bits(training.run(), in_order())
    assert str(training.optimizer.plan) == PLAN
    with pytest.raises(PlanError, match="there is no slot 3; there are 3"):
        training.optimizer.set_plan(Plan.parse(PLAN.replace("@2", "@3")))


def test_what_comes_up_waits_for_who_had_the_memory(monkeypatch: pytest.MonkeyPatch, sim: ModuleType) -> None:
    """Without the wait, the copy races with what backward still does there."""

    def without_wait(slot: Slot, buffer: Tensor, compute: Lane) -> None:
        slot.buffer = buffer

    monkeypatch.setattr("offload.passing_slots.lend", without_wait)
    sim.configure("lazy")
    Training(2).run()
    assert any("h2d" in race for race in sim.races()), sim.races()


# ---- the device has no memory for a slot


@pytest.mark.parametrize("refused", [1, 2, 4], ids="allocation {}".format)
@pytest.mark.parametrize(
    "plan", [PLAN.replace("P3@1", "P3@1 P2@3").replace("D2@0 C2@0 U2@0", "G2@3 F2@3"), "device"], ids=("plan", "device")
)
def test_goes_on_with_the_slots_there_are(
    plan: Any, refused: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sim: ModuleType
) -> None:
    training = Training(2, plan)
    memory, num_asked = training.optimizer.runtime.pool.slot_memory, 0

    def slot_memory() -> Tensor | None:
        nonlocal num_asked
        num_asked += 1
        return None if num_asked == refused else memory()

    monkeypatch.setattr(training.optimizer.runtime.pool, "slot_memory", slot_memory)
    with caplog.at_level(logging.WARNING, "offload"):
        assert_same_bits(training.run(), in_order())
    num_left = 0 if refused == 1 else 1
    assert f"no memory for more than {num_left} of 2 passing slots" in caplog.text
    assert training.optimizer.runtime.homes.num_passing_slots == len(training.slots) == num_left
    assert training.optimizer.bill.passing_bytes == num_left * STATE_BYTES
    assert sim.races() == []


def test_device_full_in_backward(caplog: pytest.LogCaptureFixture, sim: ModuleType) -> None:
    """As the device itself says it."""
    training = Training(2)
    training.run(range(2))
    with caplog.at_level(logging.WARNING, "offload"):
        real = training.optimizer.runtime._passing.open_due  # type: ignore[union-attr]

        def open_due() -> bool:
            with faults.fail("allocation"):
                return real()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.optimizer.runtime._passing, "open_due", open_due)
            assert_same_bits(training.run(range(2, NUM_STEPS)), in_order())
    assert "no memory for more than 0 of 2 passing slots" in caplog.text


def test_no_slot_that_lasts_is_left(monkeypatch: pytest.MonkeyPatch, sim: ModuleType) -> None:
    """The step goes on through the passing slot, those after it on the CPU."""
    training = Training(1, "device")
    training.run(range(3))
    for actions in training.optimizer.runtime.actions:

        def prefetch(slot: Slot, real: Callable[[Slot], None] = actions.prefetch) -> None:
            if not slot.passes:
                raise torch.OutOfMemoryError("no memory left")
            real(slot)

        monkeypatch.setattr(actions, "prefetch", prefetch)
    assert_same_bits(training.run(range(3, NUM_STEPS)), in_order())
    assert training.optimizer.runtime.homes.num_slots == training.optimizer.plan.num_visits == 0
    assert sim.races() == []


def test_no_room_is_told(caplog: pytest.LogCaptureFixture, sim: ModuleType) -> None:
    with caplog.at_level(logging.WARNING, "offload"):
        training = Training(1000)
        assert_same_bits(training.run(), in_order())
    num_slots = len(training.slots)
    assert 2 <= num_slots < 20
    assert f"for {num_slots} of 1000 passing slots of 12.0 KiB" in caplog.text


# ---- the model takes its memory back


def test_closed_before_backward_takes_the_memory(sim: ModuleType) -> None:
    """Even if nothing of the model was read, so that nobody waited for the update yet."""
    training = Training(2)
    for step in range(3):
        training.step(step)
    training.monitor.enter("forward")
    assert training.optimizer.runtime.in_flight
    training.monitor.enter("backward")
    assert not training.optimizer.runtime.in_flight
    assert training.slots == [False, False]


def skip_step(training: Training) -> None:
    """As GradScaler does at an overflow: the optimizer hears nothing of it."""
    training.backward(99)
    training.optimizer.zero_grad()


def evaluate(training: Training) -> None:
    """Between backward and the step."""
    training.backward(99)
    with torch.no_grad():
        training.losses.append(training.model(torch.ones(ROWS, WIDTH, device="sim")).mean())
    training.optimizer.step()
    training.optimizer.zero_grad()


def edit_state(training: Training) -> None:
    training.backward(99)
    training.optimizer.zero_grad()
    training.optimizer.load_state_dict(training.optimizer.state_dict())


@pytest.mark.parametrize("between", [skip_step, evaluate, edit_state])
@pytest.mark.parametrize("plan", [Stride(2)], ids=str)
def test_forward_before_the_update(between: Callable[[Training], None], plan: Any, sim: ModuleType) -> None:
    """The memory of slots that wait for a step goes back before the forward; the states come up again."""

    def run(training: Training) -> tuple[Any, ...]:
        training.run(range(3))
        for step in range(3, 6):
            between(training)
            training.step(step)
        return training.end()

    expected = run(Training(0, "host", "none"))
    sim.configure("lazy")
    without = Training(0, plan)
    assert_same_bits(run(without), expected)
    training = Training(2, plan)
    assert_same_bits(run(training), expected)
    assert training.peak_bytes <= without.peak_bytes
    assert sim.races() == []


def test_the_cpu_waits_for_copies_that_do_not_count(sim: ModuleType) -> None:
    """A state came up into a slot that was closed again, and its update moved: it must not overtake the copy."""
    training = Training(1, PLAN)
    sim.configure("lazy")
    training.run(range(3))
    evaluate(training)
    training.backward(99)
    assert training.slots == [True]
    training.monitor.enter("forward")
    assert training.slots == [False]
    last_first = range(NUM_LAYERS - 1, -1, -1)
    host = lower([Placement.HOST] * NUM_LAYERS, num_slots=0, num_staging=1, order=last_first)
    training.optimizer.runtime.in_force.plan = host
    training.optimizer.step()
    training.optimizer.synchronize()
    assert sim.races() == []


def test_other_micro_batches_than_were_watched(opened: list[str], sim: ModuleType) -> None:
    """The peak is that of the most. Once steps are alike again, slots open in backward again."""

    def run(training: Training) -> tuple[Any, ...]:
        for step, num_micro_batches in enumerate((2, 2, 2, 1, 3, 1, 1, 1, 1)):
            training.step(step, num_micro_batches)
        return training.end()

    without, training = Training(0), Training(2)
    assert_same_bits(run(training), run(without))
    assert training.peak_bytes <= without.peak_bytes
    assert opened[-2:] == ["backward", "backward"]
    assert sim.races() == []


# ---- beside the rest of the optimizer


def test_update_in_backward_goes_without(sim: ModuleType) -> None:
    def run(training: Training) -> tuple[Any, ...]:
        training.run(range(3))
        for step in range(3, 6):
            with training.optimizer.update_in_backward():
                training.backward(step)
            training.optimizer.step()
            training.optimizer.zero_grad()
        return training.end()

    assert_same_bits(run(Training(2)), run(Training(0, "host", "none")))
    assert sim.races() == []


def test_a_measured_step_opens_them_after_backward(opened: list[str], sim: ModuleType) -> None:
    training = Training(2)
    training.run(range(3))
    training.optimizer.time_next_step()
    assert_same_bits(training.run(range(3, NUM_STEPS)), in_order())
    assert opened == ["backward"] * 2 + ["step"] * 2 + ["backward"] * 2


def test_plans_that_are_chosen(sim: ModuleType) -> None:
    training = Training(2, "auto")
    trained = training.run(range(12))
    assert_same_bits(trained, Training(0, "host", "none").run(range(12)))
    assert sim.races() == []


def test_parameters_that_join_are_watched_anew(opened: list[str], sim: ModuleType) -> None:
    def run(training: Training) -> tuple[Any, ...]:
        training.run(range(3))
        torch.manual_seed(1)
        training.model.layers.append(Layer().to("sim"))
        training.optimizer.add_param_group({"params": training.model.layers[-1].parameters()})
        return training.run(range(3, 6))

    assert_same_bits(run(Training(2)), run(Training(0, "host", "none")))
    assert len(opened) == 2 + 2 * 2, "in one step before and, as one step is watched, two after"
    assert sim.races() == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_none(duplicate: Callable[[Any], Any], sim: ModuleType) -> None:
    """The monitor follows the original's model."""
    training = Training(1, PLAN)
    training.run(range(3))
    other = duplicate(training.optimizer)
    assert other.plan.num_buffers(Placement.DEVICE) == 2
    assert_same_bits(state_snapshot(other), state_snapshot(training.optimizer))


# ---- what is said of mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_passing_slots": -1}, ValueError, "num_passing_slots=-1 is negative"),
        ({"num_passing_slots": 1.0}, TypeError, "num_passing_slots must be an int, not 1.0"),
        ({"num_passing_slots": 1}, ValueError, "num_passing_slots=1 and memory_monitor=None go together"),
        ({"memory_monitor": "sim"}, TypeError, "memory_monitor must be a MemoryMonitor or None, not 'sim'"),
        ({"monitor": "sim"}, ValueError, "num_passing_slots=0 and memory_monitor=.* go together"),
        ({"monitor": "cpu", "num_passing_slots": 1}, ValueError, "on sim:0, but memory_monitor follows no accelerator"),
        (
            {"monitor": "sim", "num_passing_slots": 1, "overlap": "none"},
            ValueError,
            "num_passing_slots=1 have no use with overlap='none'",
        ),
        (
            {"monitor": "sim", "num_passing_slots": 1, "plan": "host"},
            ValueError,
            "num_passing_slots=1 have no use with plan='host', where no state visits the device",
        ),
        (
            {"monitor": "sim", "num_passing_slots": 3, "plan": PLAN},
            ValueError,
            "num_passing_slots=3 are too many for a plan that goes through 3 slots: .* give 2 or fewer",
        ),
    ],
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], message: str, sim: ModuleType) -> None:
    if "monitor" in arguments:
        arguments = {**arguments, "memory_monitor": MemoryMonitor(arguments["monitor"])}
        del arguments["monitor"]
    with pytest.raises(error, match=message):
        offload.AdamW(Model().to("sim").parameters(), **arguments)


def test_a_monitor_that_is_not_attached(sim: ModuleType) -> None:
    training = Training(1)
    training.monitor.detach()
    with pytest.raises(ValueError, match=r"outside of what memory_monitor takes for backward.*monitor\.attach"):
        training.backward(0)


# ---- what the samples say


def sample(phase: str, peak_bytes: int) -> MemorySample:
    return MemorySample(0.0, 0.0, 0, Phase(phase), 0, peak_bytes, 0, None, None, 0)


def test_room_by_hand() -> None:
    arrivals = [sample("backward", peak) for peak in (100, 80, 50, 40)]
    samples = [*arrivals, sample("backward", 45), sample("update", 30), sample("forward", 60), sample("backward", 999)]
    assert room_after(arrivals, samples, under_next_forward=True) == [20, 40, 40, 40]
    assert room_after(arrivals, samples, under_next_forward=False) == [20, 50, 55, 55]


def test_room_of_two_micro_batches() -> None:
    """What the first gives back is the second's."""
    first, second = sample("backward", 90), sample("backward", 100)
    samples = [first, sample("forward", 70), second, sample("idle", 40), sample("forward", 70), sample("backward", 999)]
    assert room_after([first, second], samples, under_next_forward=False) == [0, 60]
    assert room_after([first, second], samples, under_next_forward=True) == [0, 30]
