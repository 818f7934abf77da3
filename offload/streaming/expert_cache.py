"""Which experts of a mixture are on the device: those that are routed to most often, within a number of bytes.

An expert is loaded when a token is routed to it and it is not there, never ahead of that: what the router will choose
is not known before. It stays until its place is needed, and the place that is given away is that of the expert used
least. So hot experts end up resident, and the others pass through what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.lanes import Lanes
from offload.pool import format_bytes
from offload.streaming.arena import Arena
from offload.streaming.engine import Engine, Held
from offload.streaming.sources import Source

HALF_LIFE_PASSES = 32  # after which a use counts half: long against noise, short against a change of subject
_LARGEST_WEIGHT = 1e100


class Frequencies:
    """How often each expert was used, later uses counting more.

    Uses are counted at the end of a pass and once a pass: a pass loads an expert once, for however many tokens, and
    within a pass those of early layers must not look hotter than those whose turn is still to come.
    """

    def __init__(self) -> None:
        self._scores: dict[int, float] = {}
        self._used: dict[int, None] = {}  # in this pass, in order
        self._weight = 1.0  # of a use in this pass; it grows, so that earlier ones need not be made smaller

    def note(self, expert: int) -> None:
        self._used.pop(expert, None)
        self._used[expert] = None

    def end_pass(self) -> None:
        for expert in self._used:
            self._scores[expert] = self._scores.get(expert, 0.0) + self._weight
        self._used.clear()
        self._weight *= 2 ** (1 / HALF_LIFE_PASSES)
        if self._weight > _LARGEST_WEIGHT:
            self._scores = {expert: score / self._weight for expert, score in self._scores.items()}
            self._weight = 1.0

    def of(self, expert: int) -> float:
        return self._scores.get(expert, 0.0)


@dataclass(slots=True)
class CacheCounts:
    """Of visits of experts: how many there were, and how many of them had to be loaded for it."""

    num_visits: int = 0
    num_loads: int = 0


class ExpertCache:
    """Brings experts to the device when they are routed to, and gives the places of the least used ones to others.

    The same waits as in the engine (see [Note: who waits for what, streaming]); the same kind of layers, numbers.

    Args:
        expert_bytes: of each expert's copy, by its number.
        begin: first byte of the device buffer that is the cache's. num_bytes: of it; room for two experts at least, so
            that one is loaded while another is used.
    """

    def __init__(
        self, expert_bytes: dict[int, int], source: Source, lanes: Lanes, *, begin: int, num_bytes: int
    ) -> None:
        self.counts = CacheCounts()
        self._expert_bytes = expert_bytes
        self._source = source
        self._lanes = lanes
        self._begin = begin
        self._arena = Arena(num_bytes)
        self._frequencies = Frequencies()
        self._held: dict[int, Held] = {}  # the one used last comes last
        self._active: list[int] = []
        self._routed: list[int] = []  # and not used yet

    def __str__(self) -> str:
        total, cache = format_bytes(sum(self._expert_bytes.values())), format_bytes(self._arena.num_bytes)
        loads = f"{self.counts.num_loads} of {self.counts.num_visits} visits had to load theirs"
        return f"{len(self._expert_bytes)} experts of {total} share {cache} of the device; {loads}"

    def begin_pass(self) -> None:
        self._frequencies.end_pass()
        self._routed = []

    def route(self, experts: Sequence[int]) -> None:
        """These are used next, in this order: load those that are missing, as far as others can spare their places."""
        self._routed = list(experts)
        self._load_routed()

    def enter(self, expert: int) -> int:
        """``expert`` is used by what compute is given from now on; the offset of its copy in the device buffer."""
        self._frequencies.note(expert)
        self.counts.num_visits += 1
        if expert in self._routed:
            self._routed.remove(expert)
        if not self._is_current(expert):
            self._bring(expert)
        held = self._held[expert] = self._held.pop(expert)
        self._active.append(expert)
        self._lanes.compute.wait(held.filled)
        return held.offset

    def leave(self, expert: int) -> None:
        """All use of ``expert`` was submitted: its place may be given away behind that."""
        self._active.remove(expert)
        self._load_routed()

    def drop_all(self) -> None:
        """Forget every copy: all are loaded again when needed."""
        for expert in [*self._held]:
            if expert not in self._active:
                self._drop(expert)

    def held(self) -> list[int]:
        """The experts on the device now."""
        return sorted(self._held)

    def _is_current(self, expert: int) -> bool:
        """Whether the device has ``expert`` as it is on the host now; a copy of what it was before is dropped."""
        held = self._held.get(expert)
        if held is None:
            return False
        if expert in self._active or held.version == self._source.version(expert):
            return True
        self._drop(expert)
        return False

    def _load_routed(self) -> None:
        for expert in self._routed:
            if not self._is_current(expert) and not self._load(expert, spared={*self._active, *self._routed}):
                return  # the next ones wait too, so that none comes before one that is needed earlier

    def _bring(self, expert: int) -> None:
        """Load an expert that is needed at once, if need be at the cost of others that are routed to."""
        if self._load(expert, spared={*self._active, *self._routed}) or self._load(expert, spared={*self._active}):
            return
        raise RuntimeError(
            f"experts of {sum(self._expert_bytes[e] for e in self._active)} bytes are in use at the same time and the "
            f"cache of {self._arena.num_bytes} bytes does not hold expert {expert} beside them; raise device_budget, "
            f"or stream experts with their block: experts=None"
        )

    def _load(self, expert: int, spared: set[int]) -> bool:
        """Submit the copy of ``expert``, if the places of those not to be ``spared`` are enough for it."""
        victims = iter(self._coldest_first(spared))
        while (place := self._arena.place(expert, self._expert_bytes[expert])) is None:
            victim = next(victims, None)
            if victim is None:
                return False
            self._drop(victim)
        offset = self._begin + place
        version = self._source.version(expert)
        filled = self._source.fetch(expert, offset, after=self._lanes.compute.mark())
        self._held[expert] = Held(offset, filled, version)
        self.counts.num_loads += 1
        return True

    def _coldest_first(self, spared: set[int]) -> list[int]:
        """The experts whose places may be given away. Of equally cold ones the one used last comes first: passes go
        through layers in a cycle, so it will be needed latest."""
        return sorted((e for e in reversed(self._held) if e not in spared), key=self._frequencies.of)

    def _drop(self, expert: int) -> None:
        del self._held[expert]
        self._arena.free(expert)


class BlocksAndExperts:
    """The engine of blocks and the cache of experts, in one numbering: experts come behind blocks."""

    def __init__(self, engine: Engine, cache: ExpertCache, num_blocks: int) -> None:
        self.cache = cache
        self._engine = engine
        self._num_blocks = num_blocks

    def begin_pass(self, *, training: bool, wraps: bool = True) -> None:
        self.cache.begin_pass()
        self._engine.begin_pass(training=training, wraps=wraps)

    def abandon_pass(self) -> None:
        self._engine.abandon_pass()

    def enter(self, layer: int) -> int:
        return self._engine.enter(layer) if layer < self._num_blocks else self.cache.enter(layer)

    def leave(self, layer: int) -> None:
        if layer < self._num_blocks:
            self._engine.leave(layer)
        else:
            self.cache.leave(layer)

    def drop_all(self) -> None:
        self._engine.drop_all()
        self.cache.drop_all()
