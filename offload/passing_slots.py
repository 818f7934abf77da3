"""Slots in memory that backward gives back: when there is room for them without raising the peak of the step.

[Note: room in backward]
One step is watched without passing slots: the memory monitor takes a sample at each arrival of a gradient. The room
after an arrival is the step's peak less the most that is allocated from there on: in the rest of backward, in the
update and, where that runs under the next forward, in that one. From then on a slot opens at the first arrival that
left room for it. It is given back when the update is enqueued, which is waited for where the next backward begins; and
where a forward begins before the update did (another micro-batch than were watched, a step that was skipped). Two steps
in a row with another number of arrivals, and another one is watched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from offload.executor import lend
from offload.lanes import Lane
from offload.memory import SubgroupMemory
from offload.monitor import MemorySample, Phase
from offload.options import Options
from offload.plan import Placement, Plan
from offload.pool import format_bytes
from offload.subgroup import Slot

logger = logging.getLogger("offload")


class PassingSlots:
    """Gives passing slots their memory and takes it back; see [Note: room in backward].

    Args:
        options: how many there may be, and the monitor, which is to be attached to the model.
        compute: the lane of the model, whose memory it is.

    Raises:
        ValueError: if the monitor follows another device than that of ``memory``.
    """

    def __init__(self, options: Options, memory: SubgroupMemory, compute: Lane) -> None:
        self._most, self._monitor = options.num_passing_slots, options.memory_monitor
        self._memory, self._compute = memory, compute
        if self._monitor is not None and self._monitor.device != memory.accelerator_device:
            raise ValueError(
                f"num_passing_slots={self._most}: the parameters are on {memory.accelerator_device or 'the CPU'}, but "
                f"memory_monitor follows {self._monitor.device or 'no accelerator'}; construct it with their device"
            )
        self._after: list[int] | None = None  # arrivals before the first, second, ... slot opens; None: not known yet
        self._is_warm = False  # a step is over: what is allocated once is there
        self._watched: list[MemorySample] = []  # that ended at the arrivals of one step
        self._num_arrived = 0  # in this step
        self._num_watched = 0  # in the one that was watched
        self._num_unlike = 0  # steps in a row that had another number
        self._is_refused = False  # the device did not have the memory

    def arrived(self, *, under_next_forward: bool) -> bool:
        """A gradient arrived; nothing is in flight. Returns whether there are other slots from now on.

        Args:
            under_next_forward: the update runs there, and the slots are used until it is over.

        Raises:
            ValueError: if the monitor does not know that this is backward.
        """
        if self._monitor is None:
            return False
        if self._monitor.current_phase is not Phase.BACKWARD:
            raise ValueError(
                "a gradient arrived outside of what memory_monitor takes for backward, so nobody knows what memory "
                "backward gives back: call monitor.attach(model, optimizer), or say monitor.phase('backward')"
            )
        self._num_arrived += 1
        if self._num_arrived == 1 and self._num_unlike > 1:
            had_some = self.forget()
            self._watched.append(self._monitor.split())
            return had_some
        if self._after is not None or not self._is_warm:
            return False
        if self._num_arrived == 1 and self._watched:
            self._learn(self._monitor.samples, under_next_forward=under_next_forward)
            return bool(self._after)
        self._watched.append(self._monitor.split())
        return False

    def _learn(self, samples: Sequence[MemorySample], *, under_next_forward: bool) -> None:
        samples = [sample for sample in samples if sample.t_s >= self._watched[0].t_s]
        room = room_after(self._watched, samples, under_next_forward=under_next_forward)
        slot_bytes = self._memory.homes.slot_bytes(self._memory.subgroups)
        self._after, self._watched, self._num_watched = [], [], len(room)
        for num_arrived, num_bytes in enumerate(room, 1):
            num_slots = min(num_bytes // slot_bytes, self._most)
            self._after += [num_arrived] * (num_slots - len(self._after))
        if len(self._after) < self._most:
            logger.warning(
                "backward gives back %s, for %d of %d passing slots of %s: transfers overlap less. Ask for fewer, or "
                "lower subgroup_numel",
                format_bytes(max(room)), len(self._after), self._most, format_bytes(slot_bytes),
            )  # fmt: skip
        self._memory.set_passing_slots(len(self._after))

    def open_due(self) -> bool:
        """Open the slots that there is room for by now. Returns whether any was."""
        return self._open(sum(after <= self._num_arrived for after in self._after or ()))

    def end_backward(self, plan: Plan) -> bool:
        """Open what is closed and ``plan`` goes through. Returns whether there are other slots from now on."""
        self._open(max(0, plan.num_buffers(Placement.DEVICE) - self._memory.num_lasting_slots))
        if not self._is_refused:
            return False
        self._is_refused, num_open = False, len(self._opened())
        logger.warning(
            "the device has no memory for more than %d of %d passing slots. Training goes on with those, the same bit "
            "for bit", num_open, self._most,
        )  # fmt: skip
        self._after = (self._after or [])[:num_open]
        self._memory.set_passing_slots(num_open)
        return True

    def end_step(self) -> None:
        """The update was begun, and gives back what is open."""
        self._is_warm = True
        if self._after is not None and self._num_arrived:
            self._num_unlike = 0 if self._num_arrived == self._num_watched else self._num_unlike + 1
        self._num_arrived = 0

    def give_back(self) -> Sequence[Slot]:
        """Close all slots, and return those that were open, though no update used them: another backward will come."""
        opened = self._opened()
        for slot in opened:
            slot.buffer = None
        self._num_arrived = 0 if opened else self._num_arrived
        return opened

    def forget(self) -> bool:
        """Have no slots until another step was watched. Nothing is in flight. Returns whether there were any."""
        had = bool(self._after)
        self._after, self._watched, self._num_unlike = None, [], 0
        self._memory.set_passing_slots(0)
        return had

    def _opened(self) -> list[Slot]:
        return [slot for slot in self._memory.pool.slots if slot.passes and slot.buffer is not None]

    def _open(self, num_slots: int) -> bool:
        opened = False
        for slot in [slot for slot in self._memory.pool.slots if slot.passes][:num_slots]:
            if slot.buffer is None and not self._is_refused:
                buffer = self._memory.pool.slot_memory()
                self._is_refused = buffer is None
                if buffer is not None:
                    lend(slot, buffer, self._compute)
                    opened = True
        return opened


def room_after(
    arrivals: Sequence[MemorySample], samples: Sequence[MemorySample], *, under_next_forward: bool
) -> list[int]:
    """Bytes below the peak that are free from each of ``arrivals`` on until the update is over.

    Args:
        arrivals: samples that ended at the arrivals of one step's gradients.
        samples: all from the first of them on, and until the backward of the next step.
        under_next_forward: the update runs there.
    """
    are_arrivals = {id(sample) for sample in arrivals}
    later, after = 0, []
    for sample in reversed([*_until_update_is_over(samples, arrivals[-1], under_next_forward)]):
        if id(sample) in are_arrivals:
            after.append(later)
        assert sample.peak_allocated_bytes is not None
        later = max(later, sample.peak_allocated_bytes)
    return [later - num_bytes for num_bytes in reversed(after)]


def _until_update_is_over(
    samples: Sequence[MemorySample], last_arrival: MemorySample, under_next_forward: bool
) -> Iterator[MemorySample]:
    backward_is_over = forward_began = False
    for sample in samples:
        forward_began |= backward_is_over and sample.phase is Phase.FORWARD
        if forward_began and (sample.phase is Phase.BACKWARD or not under_next_forward):
            return
        yield sample
        backward_is_over |= sample is last_arrival
