"""What stays on the device and what is streamed, from a budget in bytes.

A pass takes at least ``max(compute, streamed bytes / link rate)``. Two places reach that for equal blocks if the
streamed ones are spread evenly among the resident ones, so that the link has all of the compute to hide behind;
unequal ones need three or four. Further places are wasted memory, residency is not: whatever the budget
leaves keeps blocks on the device. How many places pay is found by predicting a pass with each number of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offload._table import format_table
from offload.pool import BudgetError, format_bytes
from offload.streaming.arena import round_up
from offload.streaming.prediction import Machine, PassPrediction, predict_pass

_MOST_PLACES = 4  # tried where the user leaves the window open
_GAIN = 1.02  # by which one more place must shorten the pass


@dataclass(frozen=True, slots=True)
class StreamBill:
    """What streaming takes, in bytes.

    Attributes:
        base_bytes: device; weights outside blocks, buffers, weights shared between blocks, adapters.
        resident_bytes: device; blocks that stay there.
        arena_bytes: device; the buffer that streamed blocks pass through.
        experts_bytes: device; the cache of experts.
        reserve_bytes: device; left free for activations, caches and gradients.
        host_bytes: weights at rest in host memory. pinned_bytes: what is page-locked, staging included.
    """

    base_bytes: int
    resident_bytes: int
    arena_bytes: int
    reserve_bytes: int
    experts_bytes: int = 0
    host_bytes: int = 0
    pinned_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """On the device all the time."""
        return self.base_bytes + self.resident_bytes + self.arena_bytes + self.experts_bytes

    @property
    def device_bytes(self) -> int:
        return self.weight_bytes + self.reserve_bytes

    def __str__(self) -> str:
        experts = f"cache of experts {format_bytes(self.experts_bytes)}, " if self.experts_bytes else ""
        return (
            f"device {format_bytes(self.device_bytes)}: outside blocks {format_bytes(self.base_bytes)}, "
            f"resident blocks {format_bytes(self.resident_bytes)}, streaming buffer {format_bytes(self.arena_bytes)}, "
            f"{experts}reserve {format_bytes(self.reserve_bytes)}; host {format_bytes(self.host_bytes)}, "
            f"{format_bytes(self.pinned_bytes)} pinned"
        )


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """Where each block of a model lives.

    Attributes:
        names, block_bytes: of every block, in the order of the model; bytes as on the device.
        streamed: indices of the blocks that are streamed.
        window: most of them on the device at a time (the paper's k).
        evict_batch: how many finished ones give up their places together (the paper's k').
        arena_bytes: of the buffer they pass through.
    """

    names: tuple[str, ...]
    block_bytes: tuple[int, ...]
    streamed: tuple[int, ...]
    window: int
    evict_batch: int
    arena_bytes: int

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.names)) if i not in set(self.streamed))

    @property
    def streamed_bytes(self) -> int:
        """That cross the link in one pass."""
        return sum(self.block_bytes[i] for i in self.streamed)

    @property
    def resident_bytes(self) -> int:
        return sum(self.block_bytes[i] for i in self.resident)

    def __str__(self) -> str:
        """One letter a block: R stays on the device, s is streamed; then the buffer."""
        streamed = set(self.streamed)
        letters = "".join("s" if i in streamed else "R" for i in range(len(self.names)))
        return f"{letters} window={self.window} evict_batch={self.evict_batch} buffer={format_bytes(self.arena_bytes)}"

    def predict(self, machine: Machine) -> PassPrediction:
        """One forward pass in the steady state."""
        return predict_pass(
            machine,
            self.block_bytes,
            self.streamed,
            self.arena_bytes,
            window=self.window,
            evict_batch=self.evict_batch,
        )

    def table(self) -> str:
        """Runs of neighbouring blocks that live alike, with their bytes."""
        rows = [("blocks", "where", "number", "bytes")]
        streamed = set(self.streamed)
        first = 0
        for i in range(1, len(self.names) + 1):
            if i == len(self.names) or (i in streamed) != (first in streamed):
                name = self.names[first] if i == first + 1 else f"{self.names[first]} … {self.names[i - 1]}"
                where = "streamed" if first in streamed else "device"
                rows.append((name, where, str(i - first), format_bytes(sum(self.block_bytes[first:i]))))
                first = i
        return format_table(rows)


def spread_evenly(num_blocks: int, num_streamed: int) -> tuple[int, ...]:
    """Indices of ``num_streamed`` blocks as far from each other as they can be."""
    return tuple((2 * i + 1) * num_blocks // (2 * num_streamed) for i in range(num_streamed))


def arena_bytes_for(block_bytes: Sequence[int], streamed: Sequence[int], window: int) -> int:
    """Bytes of ``window`` places (or as many as there are streamed blocks), each for the largest of them."""
    return min(window, len(streamed)) * max((round_up(block_bytes[i]) for i in streamed), default=0)


@dataclass(frozen=True, slots=True)
class Room:
    """What the user allows.

    Attributes:
        budget_bytes: of device memory, of which ``base_bytes`` are taken by weights outside blocks,
            ``experts_bytes`` at least by the cache of experts, and ``reserve_bytes`` left free.
        gradient_share: of the bytes of blocks, those whose gradients stay on the device if the block does. They come as
            activations go, of which ``freed_bytes`` make room for them.
        window: places for streamed blocks; None leaves it to the prediction.
        resident: "auto" fills the budget; bytes are an upper bound on resident blocks; names are exactly those that
            stay.
    """

    budget_bytes: int
    base_bytes: int = 0
    experts_bytes: int = 0
    reserve_bytes: int = 0
    gradient_share: float = 0.0
    freed_bytes: int = 0
    window: int | None = None
    evict_batch: int = 1
    resident: str | int | tuple[str, ...] = "auto"

    @property
    def blocks_bytes(self) -> int:
        """For resident blocks and places."""
        return self.budget_bytes - self.base_bytes - self.experts_bytes - self.reserve_bytes

    def gradient_bytes(self, resident_bytes: int) -> int:
        """Beyond the reserve, of resident blocks of so many bytes."""
        return max(0, math.ceil(self.gradient_share * resident_bytes) - self.freed_bytes)


def place(names: Sequence[str], block_bytes: Sequence[int], room: Room, machine: Machine | None = None) -> StreamPlan:
    """The plan whose predicted pass is shortest within the budget.

    Args:
        names, block_bytes: of the blocks, in the order of the model.
        machine: to predict passes for; None assumes that computing takes about as long as the link, each block in
            proportion to its bytes, which is where the number of places matters most.

    Raises:
        BudgetError: if the budget does not hold the least that would do, with that least.
    """
    if room.window is not None:
        windows = [room.window]
    else:
        windows = [*range(room.evict_batch + 1, max(_MOST_PLACES, room.evict_batch + 1) + 1)]
    plans = [plan for window in windows if (plan := _fill(names, block_bytes, room, window))]
    if not plans and room.window is None:
        plans = [plan for plan in [_fill(names, block_bytes, room, room.evict_batch)] if plan]
    if not plans:
        raise BudgetError(_too_small(names, block_bytes, room))
    if len(plans) == 1 or not plans[0].streamed:
        return plans[0]
    machine = machine or _balanced(block_bytes, plans[0])
    best, best_s = plans[0], plans[0].predict(machine).pass_s
    for plan in plans[1:]:
        if plan.predict(machine).pass_s * _GAIN < best_s:
            best, best_s = plan, plan.predict(machine).pass_s
    return best


def _balanced(block_bytes: Sequence[int], plan: StreamPlan) -> Machine:
    """A machine that computes ``plan`` in the time that the link needs for it; its unit of time is arbitrary."""
    share = plan.streamed_bytes / sum(block_bytes)
    return Machine(1.0, tuple(num_bytes * share for num_bytes in block_bytes))


def _fill(names: Sequence[str], block_bytes: Sequence[int], room: Room, window: int) -> StreamPlan | None:
    """The plan with ``window`` places that streams least, None if the budget holds none."""
    for streamed in _candidates(names, block_bytes, room.resident):
        arena_bytes = arena_bytes_for(block_bytes, streamed, window)
        resident_bytes = sum(block_bytes) - sum(block_bytes[i] for i in streamed)
        if resident_bytes + room.gradient_bytes(resident_bytes) + arena_bytes <= room.blocks_bytes:
            return StreamPlan(tuple(names), tuple(block_bytes), streamed, window, room.evict_batch, arena_bytes)
    return None


def _candidates(
    names: Sequence[str], block_bytes: Sequence[int], resident: str | int | tuple[str, ...]
) -> list[tuple[int, ...]]:
    """Sets of streamed blocks to try, those that stream least first."""
    if isinstance(resident, tuple):
        if unknown := [name for name in resident if name not in names]:
            raise ValueError(f"resident names {unknown}, which are no blocks; blocks are {names[0]} … {names[-1]}")
        return [tuple(i for i, name in enumerate(names) if name not in resident)]
    found = []
    for num_streamed in range(len(names) + 1):
        streamed = spread_evenly(len(names), num_streamed)
        resident_bytes = sum(block_bytes) - sum(block_bytes[i] for i in streamed)
        if resident == "auto" or resident_bytes <= int(resident):
            found.append(streamed)
    return found


def _too_small(names: Sequence[str], block_bytes: Sequence[int], room: Room) -> str:
    window = room.window or room.evict_batch
    streamed = _candidates(names, block_bytes, room.resident)[-1]
    arena_bytes = arena_bytes_for(block_bytes, streamed, window)
    resident_bytes = sum(block_bytes) - sum(block_bytes[i] for i in streamed)
    needed = room.base_bytes + room.experts_bytes + room.reserve_bytes + resident_bytes + arena_bytes
    experts = f", two experts {format_bytes(room.experts_bytes)}" if room.experts_bytes else ""
    return (
        f"device_budget is {format_bytes(room.budget_bytes)} ({room.budget_bytes} bytes) but {format_bytes(needed)} "
        f"({needed} bytes) are needed at least: outside blocks {format_bytes(room.base_bytes)}, blocks that stay "
        f"{format_bytes(resident_bytes)}, {window} place(s) for streamed blocks {format_bytes(arena_bytes)}"
        f"{experts}, reserve {format_bytes(room.reserve_bytes)}; raise device_budget, lower reserve or window, stream "
        f"large weights outside the blocks too by naming them in blocks=[...], or keep fewer blocks with "
        f"resident={room.resident!r}"
    )
