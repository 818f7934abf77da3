"""A whole training step on virtual lanes: forward and backward as timed work per layer, then the plan of the update.

The last of a few steps is reported: what the ones before leave in flight (flushes, with overlap the update) runs beside
the next forward, as it does on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from offload.executor import await_params, early_operations, enqueue_early, enqueue_update, run_update
from offload.hardware import HardwareProfile
from offload.lanes import Event, Lanes
from offload.lanes.virtual import TimedWork, VirtualEvent, VirtualLane, VirtualMachine
from offload.perf_model import Rates, spans_of
from offload.plan import OpKind, Placement, Plan
from offload.policy import Overlap
from offload.subgroup import Slot, Staging, Subgroup
from offload.timeline import Span

NUM_STEPS = 3  # the first fills the lanes, the second is filled by it
FORWARD_OPERATIONS = 2  # floating-point operations per parameter and token
BACKWARD_OPERATIONS = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer of the model costs in one step of one rank.

    Attributes:
        forward_s, backward_s: seconds on the compute lane, recomputation included.
        grad_bytes: gradients that its backward leaves on the device until the step is over.
        saved_bytes: activations kept on the device from its forward until its backward is done.
        working_bytes: what its backward takes beyond that while it runs (recomputed activations, temporaries).
    """

    forward_s: float
    backward_s: float
    grad_bytes: int = 0
    saved_bytes: int = 0
    working_bytes: int = 0


def uniform_layers(
    profile: HardwareProfile,
    *,
    num_layers: int,
    numel: int,
    num_tokens: int,
    recompute: bool = True,
    grad_bytes: int = 0,
    saved_bytes: int = 0,
    working_bytes: int = 0,
) -> list[Layer]:
    """Equal layers of a transformer on one device of ``profile``.

    Args:
        numel: parameters of all layers together, of which each token costs 2 operations in forward, 4 in backward.
        num_tokens: of this rank in one step (micro-batch times sequence).
        recompute: forward is done again in backward (activation checkpointing).
        grad_bytes, saved_bytes, working_bytes: of one layer, see :class:`Layer`.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers} is no number of layers; give 1 or more")
    forward_s = FORWARD_OPERATIONS * numel / num_layers * num_tokens / profile.device_flops
    backward_s = forward_s * BACKWARD_OPERATIONS / FORWARD_OPERATIONS + (forward_s if recompute else 0.0)
    layer = Layer(
        forward_s + profile.forward_layer_latency_s,
        backward_s + profile.backward_layer_latency_s,
        grad_bytes,
        saved_bytes,
        working_bytes,
    )
    return [layer] * num_layers


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


def predict_step(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    rates: Rates | HardwareProfile,
    layers: Sequence[Layer],
    *,
    overlap: Overlap = "none",
) -> StepPrediction:
    """Time a training step: forward through ``layers``, backward through them in reverse, then ``plan``.

    Args:
        plan: of these subgroups; a subgroup's parameters and gradients are on the device all the time.
        rates: measured rates, or a machine's profile for state in fp32 and all its ranks at work.
        overlap: as in :class:`offload.AdamW`. With "next_forward" a layer waits for the subgroups that its share of the
            parameters lies in, and ``update_s`` is what that adds to forward and backward.
    """
    if isinstance(rates, HardwareProfile):
        rates = Rates.from_profile(rates)
    machine = VirtualMachine(rates.host_dram_bytes_per_s)
    training = _Training(plan, subgroups, layers, rates.lanes(machine, overlapped=overlap == "next_forward"), overlap)
    for _ in range(NUM_STEPS):
        training.submit_step()
    machine.run()
    start_s, end_s = (_virtual(event).end_s for event in training.ends[-2:])
    forward, backward = training.passes[-1]
    if overlap == "next_forward":
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
        memory=_memory(_resting_bytes(plan, subgroups), layers, forward, backward, start_s),
        origin_s=start_s,
        events=tuple(event for event in machine.events if event.end_s > start_s),
    )


class _Training:
    """Submits training steps to virtual lanes.

    Attributes:
        ends: of each step: where the next forward may start or, overlapped, where the update starts.
        passes: of each step, the events of forward and backward, a layer each.
    """

    def __init__(
        self, plan: Plan, subgroups: Sequence[Subgroup], layers: Sequence[Layer], lanes: Lanes, overlap: Overlap
    ) -> None:
        self.ends: list[Event] = []
        self.passes: list[tuple[list[VirtualEvent], list[VirtualEvent]]] = []
        self._plan, self._layers, self._lanes, self._overlap = plan, layers, lanes, overlap
        self._subgroups = [subgroup.sizes_only() for subgroup in subgroups]
        self._of_layer = _subgroups_of_layers(self._subgroups, len(layers))
        self._slots = [Slot(i) for i in range(plan.num_buffers(Placement.DEVICE))]
        self._stagings = [Staging(i) for i in range(plan.num_buffers(Placement.HOST))]

    def submit_step(self) -> None:
        lanes, buffers = self._lanes, (self._subgroups, self._slots, self._stagings)
        forward = [self._forward(layer, needed) for layer, needed in zip(self._layers, self._of_layer, strict=True)]
        early = [] if self._overlap == "none" else early_operations(self._plan)
        if self._overlap == "next_forward":
            early = [op for op in early if op.kind is OpKind.PREFETCH]
        for op in early:
            if op.kind is OpKind.PREFETCH:
                enqueue_early(op, *buffers, lanes, grads_ready=lanes.compute.mark())
        down = {op.subgroup: op for op in early if op.kind is OpKind.GRAD_DOWN}
        backward = []
        for layer, made in zip(reversed(self._layers), reversed(self._of_layer), strict=True):
            backward.append(_submit(lanes, "backward", layer.backward_s))
            for subgroup in reversed(made):
                if subgroup.index in down:
                    enqueue_early(down[subgroup.index], *buffers, lanes, grads_ready=lanes.compute.mark())
        self.passes.append((forward, backward))
        end = lanes.compute.mark()
        end.synchronize()  # step() asks whether all gradients are finite before it submits anything
        if self._overlap == "next_forward":
            assert isinstance(lanes.host, VirtualLane)
            lanes.host.thread.wait(_virtual(end))  # and so the conductor begins no earlier
            enqueue_update(self._plan, *buffers, lanes, backward=end, begun=early)
            self.ends.append(end)
        else:
            run_update(self._plan, *buffers, lanes, begun=early)
            self.ends.append(lanes.compute.mark())

    def _forward(self, layer: Layer, needed: Sequence[Subgroup]) -> VirtualEvent:
        for subgroup in needed:
            if self._overlap == "next_forward" and subgroup.params_ready is not None:
                await_params(subgroup, self._lanes.compute)
        return _submit(self._lanes, "forward", layer.forward_s)


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


def _resting_bytes(plan: Plan, subgroups: Sequence[Subgroup]) -> int:
    """Device memory that is there all the time: parameters, slots and resident states."""
    placements = plan.placements
    visitors = [subgroups[i].state_bytes for i, where in placements.items() if where is Placement.DEVICE]
    residents = [subgroups[i].state_bytes for i, where in placements.items() if where is Placement.RESIDENT]
    slots_bytes = plan.num_buffers(Placement.DEVICE) * max(visitors, default=0)
    return sum(subgroup.param_bytes for subgroup in subgroups) + slots_bytes + sum(residents)


def _memory(
    num_bytes: int,
    layers: Sequence[Layer],
    forward: Sequence[VirtualEvent],
    backward: Sequence[VirtualEvent],
    origin_s: float,
) -> tuple[MemoryPoint, ...]:
    """Device memory as activations come and go and gradients come. Starts from ``num_bytes``."""
    points = [MemoryPoint(0.0, "forward", num_bytes)]
    for layer, event in zip(layers, forward, strict=True):
        num_bytes += layer.saved_bytes
        points.append(MemoryPoint(event.end_s - origin_s, "forward", num_bytes))
    for layer, event in zip(reversed(layers), backward, strict=True):
        during = num_bytes + layer.working_bytes + layer.grad_bytes
        points.append(MemoryPoint(event.start_s - origin_s, "backward", during))
        num_bytes += layer.grad_bytes - layer.saved_bytes
        points.append(MemoryPoint(event.end_s - origin_s, "backward", num_bytes))
    points.append(MemoryPoint(points[-1].time_s, "update", num_bytes))
    return tuple(points)
