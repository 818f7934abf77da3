"""The runtime of one device: runs the steps that the plan in force says, over subgroups and their memory."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offload.accelerators import accelerator_for
from offload.adam import AdamSubgroup, SliceUpdate
from offload.beliefs import Measurement
from offload.conductor import Conductor, let_land
from offload.early import EarlyTransfers, watch_gradients
from offload.executor import run_update
from offload.homes import Homes
from offload.kernels import default_implementation
from offload.lanes import Lanes
from offload.lanes.accelerator import accelerator_lanes, unfinished
from offload.lanes.inline import inline_lanes
from offload.layout import Packed
from offload.memory import SubgroupMemory
from offload.monitor import Phase
from offload.options import Options
from offload.passing_slots import PassingSlots
from offload.perf_model import Prediction, Rates, predict
from offload.plan import OpKind, Plan
from offload.plan_in_force import PlanInForce
from offload.policy import Overlap
from offload.pool import MemoryBill, Pool
from offload.snapshot import CopiesBesideSteps
from offload.state_layout import ADAM_FP32, StateKind
from offload.subgroup import Subgroup
from offload.timeline import Span, elapsed_s
from offload.timing import StepTimer, work_of
from offload.watchdog import watched

logger = logging.getLogger("offload")


def lanes_for(device: torch.device) -> Lanes:
    """Streams and a worker on an accelerator; for parameters on the CPU, everything at once and in order."""
    return inline_lanes() if device.type == "cpu" else accelerator_lanes(device)


def _tensors_of(updates: Iterable[SliceUpdate]) -> Iterator[Tensor]:
    """What an update reads and writes of the user's."""
    for update in updates:
        assert update.slice.param.grad is not None
        yield from (update.slice.param, update.slice.param.grad)


def _settle(actions: Sequence[AdamSubgroup], settled: Callable[[int], None], index: int) -> None:
    """Knows no runtime: an update in flight must not keep the runtime that nobody else holds."""
    actions[index].end_step()
    settled(index)


class Runtime:
    """Owns lanes, memory and plan of one device, and runs steps.

    Not thread-safe. After an error inside a step the state may be half updated: every later step raises.
    """

    def __init__(self, device: torch.device, options: Options) -> None:
        self.device = device
        self.options = options
        self.accelerator = None if device.type == "cpu" else accelerator_for(device)
        self.lanes = lanes_for(device)
        default_implementation(device)  # finds, compiles and tests the kernel now, not in the middle of a step
        self.memory = SubgroupMemory(device, self.accelerator, self.lanes, options)
        self.in_force = PlanInForce(options, self.memory, is_offloaded=self.accelerator is not None)
        self.spans: list[Span] = []
        self.time_next_step = False
        self._idle_since_s: float | None = None  # by the host's clock, after a step that was measured
        self._broken: BaseException | None = None
        self._process = os.getpid()
        self.copies = CopiesBesideSteps(self.actions, options.budgets, self.accelerator)
        self._early = EarlyTransfers(self.lanes, self.pool, self.actions, with_gradients=options.brings_gradients_early)
        self._passing = PassingSlots(options, self.memory, self.lanes.compute)
        if options.memory_monitor is not None:
            options.memory_monitor.tell(self._phase_begins)
        self._arrived_in_open_step: Callable[[int, int], None] | None = None
        self._hooks: list[RemovableHandle] = []
        self._conductor = Conductor(self.lanes.compute, self.accelerator, weakref.WeakMethod(self.mark_broken))
        # Pinned memory and slots may go back only when no copy uses them; at exit the device's own teardown waits.
        # Not the host lane: the traceback of a failed update, which it keeps, would keep this runtime.
        copies = (self.lanes.h2d, self.lanes.d2h)
        landing = weakref.finalize(self, let_land, self._process, self._conductor, self._hooks, *copies)
        landing.atexit = False

    # ---- memory and plan

    def add(self, packed: Sequence[Packed], kind: StateKind = ADAM_FP32) -> list[AdamSubgroup]:
        """Append subgroups, allocate what they need, and plan anew.

        Raises:
            BudgetError, PlanError: before anything is allocated or changed.
        """
        wanted = self.memory.claim(packed, kind)
        first = self.in_force.first(wanted.subgroups, wanted.claim.homes)
        if not self.options.allocates:
            self.memory.bill_only(wanted)
            return []

        def plan_anew(homes: Homes) -> None:
            nonlocal first
            first = self.in_force.first(wanted.subgroups, homes)

        self.synchronize()
        if self._passing.forget():
            self.in_force.go_on_with_other_slots()
        added = self.memory.allocate(wanted, given_less=plan_anew)
        self.in_force.begin(first)
        if self.options.overlap != "none":
            arrived = weakref.WeakMethod(self._accumulated)
            for subgroup, actions in zip(wanted.added, added, strict=True):
                self._hooks += watch_gradients(subgroup.index, [item.param for item in actions.slices], arrived)
        return added

    @property
    def pool(self) -> Pool:
        """Buffers."""
        return self.memory.pool

    @property
    def subgroups(self) -> Sequence[Subgroup]:
        """In the order in which they joined."""
        return self.memory.subgroups

    @property
    def actions(self) -> Sequence[AdamSubgroup]:
        """Of the subgroups; empty where nothing is allocated."""
        return self.memory.actions

    @property
    def homes(self) -> Homes:
        """Where states live."""
        return self.memory.homes

    @property
    def bill(self) -> MemoryBill:
        """What was taken."""
        return self.memory.bill

    @property
    def plan(self) -> Plan:
        """The plan of the next step."""
        return self.in_force.plan

    def set_plan(self, plan: Plan) -> None:
        """Run ``plan`` from the next step on, in the memory there is, and stop choosing plans.

        Raises:
            PlanError: if it does not fit the subgroups, the slots or the staging buffers.
            BudgetError: if a subgroup is to visit the device whose state is not pinned.
        """
        self.in_force.set(plan)

    @property
    def overlap(self) -> Overlap:
        """How the next step's update hides."""
        return self.in_force.overlap

    def simulate(self, rates: Rates, plan: Plan | None = None) -> Prediction:
        """Predict one step of ``plan`` (default: the one in force) on a machine of ``rates``."""
        return predict(self.plan if plan is None else plan, self.subgroups, rates)

    # ---- steps

    def step(
        self,
        updates: Mapping[int, Sequence[SliceUpdate]],
        settled: Callable[[int], None] = lambda index: None,
        pending: Mapping[int, Iterable[Tensor]] | None = None,
    ) -> None:
        """Run one step over the parameters in ``updates`` (by subgroup; a subgroup that is missing is left alone).

        In order, returns when every CPU update is done and all else is enqueued: the next forward on the current stream
        sees the new parameters; states may still be on their way to the host. With overlap "next_forward", returns when
        the update has begun, and parameters and gradients are pending. A step that is measured runs in order; one after
        ``time_next_step`` was set leaves what ran when in ``spans``.

        Args:
            settled: called with the index of each subgroup once its parameters and gradients may be used.
            pending: by subgroup, what is pending in the place of its parameters and gradients: for a caller whose
                tensors share memory with them. One may wait for several subgroups.

        Raises:
            RuntimeError: if an earlier step failed half way.
            Exception: whatever failed in a lane, with its traceback.
        """
        self.finish()
        self._go_on_without_lost_slots()
        if self._passing.end_backward(self.plan):
            self.in_force.go_on_with_other_slots()
        idle = frozenset(range(len(self.subgroups))) - updates.keys()
        # A step that leaves subgroups out says little about one that does not.
        observed = self.in_force.chooses and self.in_force.wants_measurement and not idle
        plan = self.plan.without(idle)
        self.copies.begin_step(updates, waits=observed or self.time_next_step)
        try:
            timed = (observed or self.time_next_step) and self.accelerator is not None
            timer = StepTimer(self.lanes, self.device) if timed else None
            passes_s = self._passes_s(timer)
            self.time_next_step = False
            for index, subgroup_updates in updates.items():
                self.actions[index].begin_step(subgroup_updates)
            begun = self._early.take(plan)
            self._passing.end_step()
            if self.overlap == "next_forward" and timer is None:
                if pending is None:
                    pending = {index: list(_tensors_of(group)) for index, group in updates.items()}
                self._conductor.start(
                    plan,
                    self.subgroups,
                    self.pool.slots,
                    self.pool.stagings,
                    self.lanes,
                    pending,
                    partial(_settle, self.actions, settled),
                    begun=begun,
                )
            else:
                run_update(plan, self.subgroups, self.pool.slots, self.pool.stagings, self.lanes, begun=begun)
                for index in updates:
                    _settle(self.actions, settled, index)
            if timer is not None:
                timer.stop()
                self.lanes.synchronize()
                self.spans = timer.spans()
                assert self.accelerator is not None
                self._idle_since_s = self.accelerator.host_time_s()
        except BaseException as error:
            self.mark_broken(error)
            for index in updates:
                self.actions[index].end_step()
            raise
        if observed and not any(slot.is_lost for slot in self.pool.slots):
            work = work_of(self.spans, self.subgroups)
            self.in_force.observe(Measurement(self.in_force.num_steps, work, elapsed_s(self.spans), passes_s), plan)
        self.in_force.num_steps += 1

    def _passes_s(self, timer: StepTimer | None) -> float | None:
        """What forward and backward took since the last step, if nothing of an update ran beside them: both timed."""
        since_s, self._idle_since_s = self._idle_since_s, None
        return None if timer is None or since_s is None else timer.origin_s - since_s

    def _go_on_without_lost_slots(self) -> None:
        """After [Note: a slot less] in :mod:`offload.executor`."""
        if self.memory.drop_lost_slots():
            self.in_force.go_on_with_other_slots()

    # ---- a step that begins in backward

    def open_step(
        self, order: Sequence[int], arrived: Callable[[int, int], None], settled: Callable[[int], None]
    ) -> bool:
        """Begin a step before its gradients are there, to be followed by :meth:`begin_subgroup` for each subgroup.

        Args:
            order: in which gradients are expected to become final.
            arrived: called in backward, after each accumulation, with the indices of the subgroup and of the parameter
                in it.
            settled: as in :meth:`step`.

        Returns:
            Whether it did: not if nothing is to run beside backward, or the next step is to be measured.
        """
        self.finish()
        self._go_on_without_lost_slots()
        if self.options.overlap == "none" or self._will_be_timed:
            return False
        self.copies.begin_step({}, waits=True)
        plan = self.in_force.in_order_of(order)
        begun = [op for op in self._early.take(plan) if op.kind is OpKind.PREFETCH]
        self._arrived_in_open_step = arrived
        self._conductor.open(
            plan,
            self.subgroups,
            self.pool.slots,
            self.pool.stagings,
            self.lanes,
            partial(_settle, self.actions, settled),
            begun=begun,
        )
        return True

    def begin_subgroup(self, index: int, updates: Sequence[SliceUpdate]) -> None:
        """Let the update of one subgroup follow what the compute lane was given so far; ``updates`` may be empty."""
        self.actions[index].begin_step(updates)
        self._conductor.begin(index, _tensors_of(updates))

    def close_step(self) -> None:
        """Every subgroup was begun. Parameters and gradients are pending from here on, as after :meth:`step`."""
        self._arrived_in_open_step = None
        self._idle_since_s = None
        self._conductor.close()
        self.in_force.num_steps += 1

    def cancel_step(self, error: BaseException | None) -> None:
        """Give up an open step; ``error`` is what broke it if some of it was begun, None if nothing was."""
        self._arrived_in_open_step = None
        self._conductor.cancel()
        for actions in self.actions:
            actions.end_step()
        if error is not None:
            self.mark_broken(error)
        else:
            self.lanes.synchronize()  # of states that came up for nothing

    # ---- gradients

    def _accumulated(self, index: int, position: int) -> None:
        """By autograd, in one of its threads."""
        if self._arrived_in_open_step is not None:
            self._arrived_in_open_step(index, position)
        else:
            self.gradient_arrived(index, in_autograd=True)

    def gradient_arrived(self, index: int, *, in_autograd: bool = False) -> None:
        """A gradient of subgroup ``index`` was accumulated: begin what of the next update may begin during backward.

        For parameters that autograd accumulates into this is called by itself. Others call it on the stream that wrote
        the gradient, and :meth:`before_gradient` before they write to it.
        """
        if self._broken is None and not self._will_be_timed:
            self._conductor.finish()
            self._go_on_without_lost_slots()
            if self._passing.arrived(under_next_forward=self.overlap == "next_forward"):
                self.in_force.go_on_with_other_slots()
            if self._passing.open_due():
                self._early.prefetch(self.plan, self.subgroups)
            self._early.arrived(self.subgroups[index], self.plan, self.subgroups, in_autograd=in_autograd)

    def _phase_begins(self, phase: Phase) -> None:
        """Passing slots are closed where the model takes their memory again, see [Note: room in backward]."""
        if self._broken is not None or self._arrived_in_open_step is not None:
            return
        if phase is Phase.BACKWARD:
            self._conductor.finish()
        elif phase is Phase.FORWARD and not self._conductor.in_flight:
            self._early.leave(self._passing.give_back())

    def before_dropping_gradients(self) -> None:
        """Let what comes next in the memory of gradients come after early copies of them."""
        self._early.gradients_may_change()

    def before_gradient(self, index: int) -> None:
        """Let what the current stream writes to the gradient of subgroup ``index`` come after an early copy of it."""
        self._early.await_copy(self.subgroups[index])

    @property
    def in_flight(self) -> bool:
        """Whether an overlapped step was begun and not finished."""
        return self._conductor.in_flight

    @property
    def _will_be_timed(self) -> bool:
        return self.time_next_step or self.in_force.wants_measurement

    # ---- order and errors

    def finish(self) -> None:
        """Settle what an overlapped step left pending, on the current stream, and return when it is all enqueued."""
        self.check_usable()
        self._conductor.finish()

    def mark_broken(self, error: BaseException) -> None:
        """Refuse every later step: ``error`` left state half written."""
        self._broken = error

    def synchronize(self) -> None:
        """Wait until nothing is in flight: parameters and states may be read and written by anyone afterwards."""
        self.finish()
        self._early.forget()  # states may be written now
        self.copies.wait()
        try:
            with self.watched("optimizer.synchronize()"):
                self.lanes.synchronize()
        except Exception as error:  # an error of the device surfaces wherever it is waited for
            self.mark_broken(error)
            raise

    def watched(self, what: str) -> AbstractContextManager[None]:
        """Within this context, a wait for the device that does not end is logged, with what each lane has yet to do."""
        if self.accelerator is None:
            return nullcontext()
        return watched(lambda: f"{what} waits: {unfinished(self.lanes)}")

    def check_usable(self) -> None:
        """Raise RuntimeError if a step failed half way, or in a fork of the process that streams and workers are in."""
        if self.accelerator is not None and self._process != os.getpid():
            raise RuntimeError(
                f"this optimizer was constructed in process {self._process}, and this is a fork of it "
                f"({os.getpid()}): the accelerator's streams and the worker threads stayed there. Construct it after "
                f"the fork, or start this process with the method 'spawn'"
            )
        if self._broken is not None:
            raise RuntimeError(
                "this optimizer is broken: an earlier step failed half way, so parameters and optimizer state may "
                "disagree; construct a new optimizer and load the last checkpoint of the model and the optimizer"
            ) from self._broken
