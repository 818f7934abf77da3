"""A whole training step on virtual lanes: forward and backward as timed work per layer, then the plan of the update.

The last of a few steps is reported: what the ones before leave in flight (flushes, with overlap the update) runs beside
the next forward, as it does on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

from offload.executor import await_params, early_operations, enqueue_early, enqueue_update, run_update
from offload.hardware import HardwareProfile
from offload.lanes import Event, Lanes
from offload.lanes.virtual import TimedWork, VirtualEvent, VirtualLane, VirtualMachine
from offload.layer_costs import Layer, room_in_backward
from offload.perf_model import Rates, spans_of
from offload.plan import Op, OpKind, Placement, Plan
from offload.policy import Overlap
from offload.subgroup import Slot, Staging, Subgroup
from offload.timeline import Span

NUM_STEPS = 3  # the first fills the lanes, the second is filled by it


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """Device memory in bytes from ``time_s`` on, in seconds since the step began."""

    time_s: float
    phase: str  # "forward", "backward" or "update"
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """One training step once steps follow each other.

    Attributes:
        forward_s: until the last layer's forward is done.
        backward_s: from there until the last gradient is there.
        update_s: from there until the next forward may start: the part of the update that nothing hides.
        memory: of parameters, gradients, activations, slots and resident states, in order of time.
    """

    plan: Plan
    forward_s: float
    backward_s: float
    update_s: float
    memory: tuple[MemoryPoint, ...]
    origin_s: float = 0.0
    events: tuple[VirtualEvent, ...] = field(default=(), repr=False, compare=False)

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s

    @property
    def spans(self) -> tuple[Span, ...]:
        """What ran when, in seconds since the step began; what the step before left in flight began earlier."""
        shifted = spans_of(self.events)
        return tuple(Span(s.lane, s.name, s.start_s - self.origin_s, s.end_s - self.origin_s) for s in shifted)

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Most device memory in each phase."""
        peaks: dict[str, int] = {}
        for point in self.memory:
            peaks[point.phase] = max(peaks.get(point.phase, 0), point.num_bytes)
        return peaks


@dataclass(frozen=True, slots=True)
class Hiding:
    """What of the update runs beside the model's own work. None of it changes a bit of the result.

    Attributes:
        overlap: as in :class:`offload.AdamW`, "auto" aside.
        in_backward: a subgroup's update begins once its gradient is final; exact only without gradient clipping.
        num_passing_slots: slots, the last of a plan's, that exist from when backward gave their memory back until the
            update is over. Not where the update begins in backward.
        early_gradients: gradients come down while backward runs, as with "backward" they do in any case.
    """

    overlap: Overlap = "none"
    in_backward: bool = False
    num_passing_slots: int = 0
    early_gradients: bool = False

    def __post_init__(self) -> None:
        if self.overlap == "auto":
            raise ValueError("overlap='auto' is no schedule to predict; give 'none', 'backward' or 'next_forward'")
        if self.overlap == "none" and (self.in_backward or self.num_passing_slots or self.early_gradients):
            raise ValueError("with overlap='none' nothing of the update runs in backward; give another overlap")
        if self.in_backward and self.num_passing_slots:
            raise ValueError(
                f"num_passing_slots={self.num_passing_slots}: an update that begins in backward goes through lasting "
                f"slots only; leave one of the two out"
            )
        if self.in_backward and self.early_gradients:
            raise ValueError("in_backward=True brings gradients down where it updates; leave early_gradients out")

    @property
    def has_conductor(self) -> bool:
        """Whether a thread of its own enqueues the update."""
        return self.in_backward or self.overlap == "next_forward"


IN_ORDER = Hiding()


def predict_step(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    rates: Rates | HardwareProfile,
    layers: Sequence[Layer],
    hiding: Hiding = IN_ORDER,
) -> StepPrediction:
    """Time a training step: forward through ``layers``, backward through them in reverse, then ``plan``.

    Args:
        plan: of these subgroups; a subgroup's parameters are on the device all the time.
        rates: measured rates, or a machine's profile for state in fp32 and all its ranks at work.
        layers: in order of forward; may be empty where nothing of the update runs in backward.
        hiding: what runs beside forward and backward. Where that is more than transfers, ``update_s`` is what the
            update adds to forward and backward alone.

    Raises:
        ValueError: if backward does not give back memory for so many passing slots.
    """
    if isinstance(rates, HardwareProfile):
        rates = Rates.from_profile(rates)
    machine = VirtualMachine(rates.host_dram_bytes_per_s)
    training = _Training(plan, subgroups, layers, rates.lanes(machine, overlapped=hiding.has_conductor), hiding)
    for _ in range(NUM_STEPS):
        training.submit_step()
    machine.run()
    start_s, end_s = (_virtual(event).end_s for event in training.ends[-2:])
    forward, backward = training.passes[-1]
    if hiding.has_conductor:
        forward_s, backward_s = (sum(event.seconds for event in events) for events in (forward, backward))
    else:
        forward_end_s = forward[-1].end_s if forward else start_s
        forward_s = forward_end_s - start_s
        backward_s = backward[-1].end_s - forward_end_s if backward else 0.0
    return StepPrediction(
        plan,
        forward_s=forward_s,
        backward_s=backward_s,
        update_s=end_s - start_s - forward_s - backward_s,
        memory=training.memory(forward, backward, start_s),
        origin_s=start_s,
        events=tuple(event for event in machine.events if event.end_s > start_s),
    )


class _Training:
    """Submits training steps to virtual lanes.

    Attributes:
        ends: of each step: where the next forward may start or, under the next forward, where the update starts.
        passes: of each step, the events of forward and backward, a layer each.
    """

    def __init__(
        self, plan: Plan, subgroups: Sequence[Subgroup], layers: Sequence[Layer], lanes: Lanes, hiding: Hiding
    ) -> None:
        self.ends: list[Event] = []
        self.passes: list[tuple[list[VirtualEvent], list[VirtualEvent]]] = []
        self._plan, self._layers, self._lanes, self._hiding = plan, layers, lanes, hiding
        self._subgroups = [subgroup.sizes_only() for subgroup in subgroups]
        self._of_layer = _subgroups_of_layers(self._subgroups, len(layers))
        self._slots = [Slot(i) for i in range(plan.num_buffers(Placement.DEVICE))]
        self._stagings = [Staging(i) for i in range(plan.num_buffers(Placement.HOST))]
        self._buffers = (self._subgroups, self._slots, self._stagings)
        self._num_lasting = max(0, len(self._slots) - hiding.num_passing_slots)
        self._passing_after = _passing_slots_after(layers, _slot_bytes(plan, subgroups), hiding)

    def submit_step(self) -> None:
        lanes, overlap = self._lanes, self._hiding.overlap
        forward = [self._forward(layer, needed) for layer, needed in zip(self._layers, self._of_layer, strict=True)]
        if self._hiding.in_backward:
            backward = self._backward_with_update()
            for subgroup in self._subgroups if overlap == "backward" else ():
                await_params(subgroup, lanes.compute)
            end = lanes.compute.mark()
        else:
            backward, begun = self._backward()
            end = lanes.compute.mark()
            end.synchronize()  # step() asks whether all gradients are finite before it submits anything
            if overlap == "next_forward":
                assert isinstance(lanes.host, VirtualLane)
                lanes.host.thread.wait(_virtual(end))  # and so the conductor begins no earlier
                enqueue_update(self._plan, *self._buffers, lanes, backward=end, begun=begun)
            else:
                run_update(self._plan, *self._buffers, lanes, begun=begun)
                end = lanes.compute.mark()
        self.passes.append((forward, backward))
        self.ends.append(end)

    def _forward(self, layer: Layer, needed: Sequence[Subgroup]) -> VirtualEvent:
        for subgroup in needed:
            if self._hiding.overlap == "next_forward" and subgroup.params_ready is not None:
                await_params(subgroup, self._lanes.compute)
        return _submit(self._lanes, "forward", layer.forward_s)

    def _backward(self) -> tuple[list[VirtualEvent], Set[Op]]:
        """Backward with the transfers that begin in it, which it returns too."""
        hiding = self._hiding
        early = [] if hiding.overlap == "none" else early_operations(self._plan)
        if hiding.overlap == "next_forward" and not hiding.early_gradients:
            early = [op for op in early if op.kind is OpKind.PREFETCH]
        up = {op.buffer: op for op in early if op.kind is OpKind.PREFETCH}
        down = {op.subgroup: op for op in early if op.kind is OpKind.GRAD_DOWN}
        backward = []
        for slot in range(self._num_lasting):
            if slot in up:
                self._begin(up[slot])
        for i, (layer, made) in enumerate(zip(reversed(self._layers), reversed(self._of_layer), strict=True)):
            backward.append(_submit(self._lanes, "backward", layer.backward_s))
            for slot in self._slots_given_back(i):
                if slot in up:
                    self._lanes.h2d.wait(backward[-1])
                    self._begin(up[slot])
            for subgroup in reversed(made):
                if subgroup.index in down:
                    self._begin(down[subgroup.index])
        for index in down:  # whose gradients may change once backward is over
            copied = self._subgroups[index].grad_on_host
            assert copied is not None
            self._lanes.compute.wait(copied)
        return backward, set(early)

    def _begin(self, op: Op) -> None:
        enqueue_early(op, *self._buffers, self._lanes, grads_ready=self._lanes.compute.mark())

    def _slots_given_back(self, num_layers_done: int) -> Iterator[int]:
        """Passing slots whose memory is there once so many layers' backward, and one more, are done."""
        return (self._num_lasting + j for j, after in enumerate(self._passing_after) if after == num_layers_done)

    def _backward_with_update(self) -> list[VirtualEvent]:
        """Backward, and each subgroup's update once its gradient is final."""
        lanes, backward = self._lanes, []
        final: dict[int, VirtualEvent] = {}
        for layer, made in zip(reversed(self._layers), reversed(self._of_layer), strict=True):
            backward.append(_submit(lanes, "backward", layer.backward_s))
            final |= {subgroup.index: backward[-1] for subgroup in made}
        lanes.h2d.wait(backward[0])  # with the first gradient the update begins
        for op in self._plan.ops:
            if op.kind in (OpKind.UPDATE_GPU, OpKind.UPDATE_RESIDENT):
                lanes.update.wait(final[op.subgroup])
            enqueue_early(op, *self._buffers, lanes, grads_ready=final[op.subgroup])
        return backward

    def memory(
        self, forward: Sequence[VirtualEvent], backward: Sequence[VirtualEvent], origin_s: float
    ) -> tuple[MemoryPoint, ...]:
        """Device memory as activations, gradients and passing slots come and go, in the step of these events.

        Under the next forward each layer's gradients stay until its update is done.
        """
        layers, slot_bytes = self._layers, _slot_bytes(self._plan, self._subgroups)
        stays = self._hiding.overlap == "next_forward"
        num_bytes = _resting_bytes(self._plan, self._subgroups) - self._hiding.num_passing_slots * slot_bytes
        num_bytes += sum(layer.grad_bytes for layer in layers) if stays else 0
        points = [MemoryPoint(0.0, "forward", num_bytes)]
        for layer, event in zip(layers, forward, strict=True):
            num_bytes += layer.saved_bytes - (layer.grad_bytes if stays else 0)
            points.append(MemoryPoint(event.end_s - origin_s, "forward", num_bytes))
        for i, (layer, event) in enumerate(zip(reversed(layers), backward, strict=True)):
            during = num_bytes + layer.working_bytes + layer.grad_bytes
            points.append(MemoryPoint(event.start_s - origin_s, "backward", during))
            num_bytes += layer.grad_bytes - layer.saved_bytes + slot_bytes * len(list(self._slots_given_back(i)))
            points.append(MemoryPoint(event.end_s - origin_s, "backward", num_bytes))
        points.append(MemoryPoint(points[-1].time_s, "update", num_bytes))
        return tuple(points)


def _passing_slots_after(layers: Sequence[Layer], slot_bytes: int, hiding: Hiding) -> list[int]:
    """After which layer of backward (0 is the model's last) a first, second, ... passing slot may exist."""
    room = room_in_backward(layers, until_next_forward=hiding.overlap == "next_forward")
    after: list[int] = []
    for i, num_bytes in enumerate(room):
        num = min(num_bytes // slot_bytes if slot_bytes else 0, hiding.num_passing_slots)
        after += [i] * (num - len(after))
    if len(after) < hiding.num_passing_slots:
        raise ValueError(
            f"num_passing_slots={hiding.num_passing_slots} are too many: backward gives back {max(room, default=0)} "
            f"bytes, for {len(after)} slots of {slot_bytes} bytes"
        )
    return after


def _subgroups_of_layers(subgroups: Sequence[Subgroup], num_layers: int) -> list[list[Subgroup]]:
    """The subgroups that begin in each layer's share of the parameters, which are spread evenly over the layers."""
    of_layer: list[list[Subgroup]] = [[] for _ in range(num_layers)]
    total, before = sum(subgroup.numel for subgroup in subgroups), 0
    for subgroup in subgroups:
        if num_layers:
            of_layer[min(num_layers - 1, before * num_layers // max(1, total))].append(subgroup)
        before += subgroup.numel
    return of_layer


def _submit(lanes: Lanes, name: str, seconds: float) -> VirtualEvent:
    return _virtual(lanes.compute.submit(TimedWork(name, seconds=seconds)))


def _virtual(event: object) -> VirtualEvent:
    assert isinstance(event, VirtualEvent)
    return event


def _slot_bytes(plan: Plan, subgroups: Sequence[Subgroup]) -> int:
    return max(
        (subgroups[i].state_bytes for i, where in plan.placements.items() if where is Placement.DEVICE), default=0
    )


def _resting_bytes(plan: Plan, subgroups: Sequence[Subgroup]) -> int:
    """Device memory that is there all the time: parameters, slots and resident states."""
    residents = [subgroups[i].state_bytes for i, where in plan.placements.items() if where is Placement.RESIDENT]
    slots_bytes = plan.num_buffers(Placement.DEVICE) * _slot_bytes(plan, subgroups)
    return sum(subgroup.param_bytes for subgroup in subgroups) + slots_bytes + sum(residents)
