"""How long a pass takes: the very engine, on virtual lanes; and what no schedule can beat."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from offload.lanes import Event, Lanes, Work
from offload.lanes.virtual import Cost, TimedWork, VirtualEvent, VirtualMachine
from offload.perf_model import spans_of
from offload.streaming.arena import Arena
from offload.streaming.engine import Engine
from offload.streaming.order import CallOrder
from offload.timeline import Span

_NUM_PASSES = 4  # predicted; by the last two the cycle has settled
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """What a pass takes of the machine, apart from each other.

    Attributes:
        link_bytes_per_s: of copies from host memory to the device.
        copy_latency_s: added to every copy.
        compute_s: of each block of the model, in order, resident ones included.
        read_bytes_per_s: at which staged layers come from pageable memory or files; None where all are pinned.
    """

    link_bytes_per_s: float
    compute_s: tuple[float, ...]
    copy_latency_s: float = 0.0
    read_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class PassPrediction:
    """One forward pass in the steady state.

    Attributes:
        pass_s: as predicted.
        bound_s: what each resource needs at least, by name.
    """

    pass_s: float
    bound_s: dict[str, float]
    spans: tuple[Span, ...] = ()

    @property
    def binds(self) -> str:
        """The resource that needs longest."""
        return max(self.bound_s, key=lambda name: self.bound_s[name])

    @property
    def bound_fraction(self) -> float:
        """The lower bound over the prediction: 1 is as fast as physics allows."""
        return self.bound_s[self.binds] / self.pass_s if self.pass_s else 1.0


class SizesOnly:
    """A source without bytes, for lanes that run nothing."""

    def __init__(self, layer_bytes: Sequence[int], lanes: Lanes, cell_bytes: int) -> None:
        self._layer_bytes = layer_bytes
        self._lanes = lanes
        self._cell_bytes = cell_bytes

    def version(self, layer: int) -> int:
        return 0

    def read_ahead(self, upcoming: Iterable[int], held: Container[int]) -> None:
        return

    def fetch(self, layer: int, offset: int, after: Event) -> Event:
        cells = arena_cells(offset, self._layer_bytes[layer], self._cell_bytes)
        work = Work(f"L{layer}", num_bytes=self._layer_bytes[layer], writes=cells)
        return self._lanes.h2d.submit(work, after=(after,))


def arena_cells(offset: int, num_bytes: int, cell_bytes: int = _MIB) -> tuple[tuple[str, int], ...]:
    """Names of the pieces of the arena that a layer covers, for lanes that compare accesses."""
    return tuple(("arena", cell) for cell in range(offset // cell_bytes, -(-(offset + num_bytes) // cell_bytes)))


def sizes_engine(
    layer_bytes: Sequence[int], arena_bytes: int, lanes: Lanes, *, window: int, evict_batch: int, cell_bytes: int = _MIB
) -> Engine:
    """The engine without bytes, for lanes that predict or prove."""
    return Engine(
        layer_bytes,
        SizesOnly(layer_bytes, lanes, cell_bytes),
        Arena(arena_bytes),
        CallOrder(len(layer_bytes)),
        lanes,
        window=window,
        evict_batch=evict_batch,
    )


def predict_pass(
    machine: Machine,
    block_bytes: Sequence[int],
    streamed: Sequence[int],
    arena_bytes: int,
    *,
    window: int,
    evict_batch: int = 1,
) -> PassPrediction:
    """Time one forward pass of many.

    Args:
        block_bytes: of every block of the model, in order.
        streamed: indices of those that are streamed; the others are resident.
    """
    layer_bytes = [block_bytes[i] for i in streamed]
    layer_of = {block: layer for layer, block in enumerate(streamed)}
    bytes_per_s = min(machine.link_bytes_per_s, machine.read_bytes_per_s or machine.link_bytes_per_s)
    nothing = Cost(lambda work: 0.0)
    costs = {
        "compute": nothing,
        "update": nothing,
        "host": nothing,
        "d2h": nothing,
        "h2d": Cost(lambda work: machine.copy_latency_s + work.num_bytes / bytes_per_s),
    }
    virtual = VirtualMachine()
    lanes = virtual.lanes(costs)
    engine = sizes_engine(layer_bytes, arena_bytes, lanes, window=window, evict_batch=evict_batch)
    ends = []
    for _ in range(_NUM_PASSES):
        engine.begin_pass(training=False)
        for block, seconds in enumerate(machine.compute_s):
            if block in layer_of:
                engine.enter(layer_of[block])
            ends_here = lanes.compute.submit(TimedWork("forward", seconds=seconds))
            if block in layer_of:
                engine.leave(layer_of[block])
        ends.append(ends_here)
    virtual.run()
    before, last = (event for event in ends[-2:] if isinstance(event, VirtualEvent))
    bound_s = {
        "compute": sum(machine.compute_s),
        "link": sum(layer_bytes) / machine.link_bytes_per_s,
    }
    if machine.read_bytes_per_s is not None:
        bound_s["host reads"] = sum(layer_bytes) / machine.read_bytes_per_s
    return PassPrediction(last.end_s - before.end_s, bound_s, spans_of(virtual.events))
