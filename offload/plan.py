"""A plan: the operations of one optimizer step as a short, printable, checkable list.

A plan says, for every subgroup, where its update runs and which buffers it passes through. It holds no tensors and
no times: the executor runs it, the performance model times it, the timeline draws it and the tests perturb it.

Text form, one word an operation, in the order in which they are enqueued::

    D0@0 P1@0 P3@1 C0@0 G1@0 F1@0 D2@1 C2@1 U0@0 G3@1 F3@1 U2@1 R4

``P1@0`` prefetches subgroup 1 into slot 0, ``D0@0`` brings the gradient of subgroup 0 down to staging buffer 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Placement(Enum):
    """Where the update of a subgroup runs, and where its optimizer state lives between steps."""

    HOST = "host"  # state in host memory, updated by the CPU
    DEVICE = "device"  # state in host memory, visits the accelerator for its update
    RESIDENT = "resident"  # state stays on the accelerator


class OpKind(Enum):
    """The kinds of operation; the value is the letter of the text form."""

    GRAD_DOWN = "D"  # gradient, device -> staging buffer
    UPDATE_CPU = "C"  # host state updated in place; new parameters into the staging buffer
    UPLOAD = "U"  # new parameters, staging buffer -> device
    PREFETCH = "P"  # state, host -> slot
    UPDATE_GPU = "G"  # state in the slot and parameters on the device updated in place
    FLUSH = "F"  # state, slot -> host
    UPDATE_RESIDENT = "R"  # state that lives on the device updated in place


# The operations that update a subgroup, in the order in which each subgroup must pass through them.
CHAINS = {
    Placement.HOST: (OpKind.GRAD_DOWN, OpKind.UPDATE_CPU, OpKind.UPLOAD),
    Placement.DEVICE: (OpKind.PREFETCH, OpKind.UPDATE_GPU, OpKind.FLUSH),
    Placement.RESIDENT: (OpKind.UPDATE_RESIDENT,),
}
PLACEMENT_OF = {kind: placement for placement, chain in CHAINS.items() for kind in chain}
_WORD = re.compile(r"([DCUPGF])(\d{1,9})@(\d{1,9})|(R)(\d{1,9})")


class PlanError(ValueError):
    """A plan that cannot be run, with the reason and the offending operation marked."""


class Op(NamedTuple):
    """One operation. ``buffer`` is a slot (P, G, F) or a staging buffer (D, C, U); R needs none."""

    kind: OpKind
    subgroup: int
    buffer: int | None = None

    def __str__(self) -> str:
        return f"{self.kind.value}{self.subgroup}" + ("" if self.buffer is None else f"@{self.buffer}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The operations of one optimizer step, in the order in which they are enqueued on their lanes."""

    ops: tuple[Op, ...]

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the text form. Raises :class:`PlanError` at the first word that is no operation."""
        ops = []
        for position, word in enumerate(text.split()):
            match = _WORD.fullmatch(word)
            if match is None:
                raise PlanError(
                    f"word {position} of the plan, {word!r}, is no operation; "
                    f"write D, C, U, P, G or F with subgroup@buffer (P3@1), or R with a subgroup (R4)"
                )
            letter, subgroup, buffer, resident, resident_subgroup = match.groups()
            if resident:
                ops.append(Op(OpKind.UPDATE_RESIDENT, int(resident_subgroup)))
            else:
                ops.append(Op(OpKind(letter), int(subgroup), int(buffer)))
        return cls(tuple(ops))

    def __str__(self) -> str:
        return " ".join(map(str, self.ops))

    @property
    def placements(self) -> dict[int, Placement]:
        """Placement of every subgroup that the plan updates."""
        return {op.subgroup: PLACEMENT_OF[op.kind] for op in self.ops}

    @property
    def num_visits(self) -> int:
        """Subgroups whose state visits the device."""
        return sum(where is Placement.DEVICE for where in self.placements.values())

    def num_buffers(self, placement: Placement) -> int:
        """How many slots (DEVICE) or staging buffers (HOST) the plan passes through."""
        chain = CHAINS[placement]
        return max((op.buffer + 1 for op in self.ops if op.kind in chain and op.buffer is not None), default=0)

    def without(self, subgroups: Collection[int]) -> Plan:
        """The plan less every operation of ``subgroups`` (those that have no gradient in this step)."""
        return Plan(tuple(op for op in self.ops if op.subgroup not in subgroups)) if subgroups else self

    def validate(
        self,
        num_subgroups: int,
        *,
        num_slots: int | None = None,
        num_staging: int | None = None,
        resident: Collection[int] = (),
    ) -> None:
        """Prove that the plan updates each of ``num_subgroups`` subgroups exactly once and reuses no buffer too early.

        ``num_slots`` and ``num_staging`` bound the buffers where given; ``resident`` names the subgroups whose
        state lives on the device. That the executor's waits order every conflicting access of the plan is a proof of
        its own: :func:`offload.ordering.check_ordering`.

        Raises:
            PlanError: with the plan printed and the bad operation marked.
        """
        limits = {Placement.HOST: ("staging buffer", num_staging), Placement.DEVICE: ("slot", num_slots)}
        held: dict[tuple[Placement, int], int] = {}  # buffer -> subgroup in it
        passed: dict[int, list[Op]] = {}  # operations of each subgroup so far

        for position, op in enumerate(self.ops):
            placement, done = PLACEMENT_OF[op.kind], passed.setdefault(op.subgroup, [])
            if not 0 <= op.subgroup < num_subgroups:
                self._fail(position, f"there is no subgroup {op.subgroup}; the layout has {num_subgroups}")
            if (op.subgroup in resident) != (placement is Placement.RESIDENT):
                where = "on the device" if op.subgroup in resident else "in host memory"
                self._fail(position, f"the state of subgroup {op.subgroup} lives {where}")
            chain = CHAINS[PLACEMENT_OF[done[0].kind] if done else placement]  # of the operation it began with
            if len(done) == len(chain):
                self._fail(position, f"subgroup {op.subgroup} was already updated by {done[0]}")
            if op.kind is not (due := chain[len(done)]):
                self._fail(position, f"the next operation of subgroup {op.subgroup} must be {due.value} ({due.name})")
            if (op.buffer is None) != (placement is Placement.RESIDENT):
                needs = "no buffer" if placement is Placement.RESIDENT else f"a {limits[placement][0]}"
                self._fail(position, f"{op.kind.value} ({op.kind.name}) needs {needs}")
            if op.buffer is not None:
                self._check_buffer(position, op, placement, held, *limits[placement])
            done.append(op)

        if held:
            (placement, buffer), subgroup = next(iter(held.items()))
            last = CHAINS[placement][-1]
            raise PlanError(f"subgroup {subgroup} never leaves {limits[placement][0]} {buffer}: "
                            f"{last.value}{subgroup}@{buffer} ({last.name}) is missing; plan: {self}")  # fmt: skip
        if missing := sorted(set(range(num_subgroups)) - passed.keys()):
            raise PlanError(f"subgroups {missing} are never updated; plan: {self}")

    def _check_buffer(
        self,
        position: int,
        op: Op,
        placement: Placement,
        held: dict[tuple[Placement, int], int],
        name: str,
        limit: int | None,
    ) -> None:
        assert op.buffer is not None
        chain, key = CHAINS[placement], (placement, op.buffer)
        if op.buffer < 0 or (limit is not None and op.buffer >= limit):
            have = "they count from 0" if limit is None else f"there are {limit}"
            self._fail(position, f"there is no {name} {op.buffer}; {have}")
        if op.kind is chain[0]:
            if key in held:
                self._fail(position, f"{name} {op.buffer} still holds subgroup {held[key]}")
            held[key] = op.subgroup
        elif held.get(key) != op.subgroup:
            self._fail(position, f"{name} {op.buffer} does not hold subgroup {op.subgroup}")
        if op.kind is chain[-1]:
            del held[key]

    def _fail(self, position: int, reason: str) -> None:
        words = [f">>{op}<<" if i == position else str(op) for i, op in enumerate(self.ops)]
        raise PlanError(f"operation {position} ({self.ops[position]}): {reason}; plan: {' '.join(words)}")


def lower(
    placements: Sequence[Placement], *, num_slots: int, num_staging: int, order: Iterable[int] | None = None
) -> Plan:
    """Turn placements into a plan that keeps all lanes busy.

    Subgroups are taken in ``order`` (default: by index). States are prefetched as soon as a slot is free and
    gradients brought down as soon as a staging buffer is free; each upload is enqueued one CPU update late, so that
    the thread that enqueues waits for one update while the next is already running.

    Args:
        placements: one per subgroup.
        num_slots: device buffers; at least 1 if any subgroup is DEVICE.
        num_staging: host staging buffers; at least 1 if any subgroup is HOST.
        order: a permutation of the subgroups.
    """
    order = list(range(len(placements)) if order is None else order)
    if sorted(order) != list(range(len(placements))):
        raise PlanError(f"order must be a permutation of the {len(placements)} subgroups, got {order}")
    first = {Placement.HOST: OpKind.GRAD_DOWN, Placement.DEVICE: OpKind.PREFETCH}
    free = {Placement.HOST: list(range(num_staging)), Placement.DEVICE: list(range(num_slots))}
    waiting = {where: [i for i in order if placements[i] is where] for where in first}
    for where, name in ((Placement.HOST, "num_staging"), (Placement.DEVICE, "num_slots")):
        if waiting[where] and not free[where]:
            raise PlanError(f"{name} must be at least 1: {len(waiting[where])} subgroups are placed on {where.name}")
    ops: list[Op] = []
    buffer_of: dict[int, int] = {}
    updated_on_cpu: list[int] = []  # not uploaded yet

    def fill_buffers() -> None:
        for where, kind in first.items():
            while waiting[where] and free[where]:
                subgroup = waiting[where].pop(0)
                buffer_of[subgroup] = free[where].pop(0)
                ops.append(Op(kind, subgroup, buffer_of[subgroup]))

    def upload() -> None:
        subgroup = updated_on_cpu.pop(0)
        ops.append(Op(OpKind.UPLOAD, subgroup, buffer_of[subgroup]))
        free[Placement.HOST].append(buffer_of[subgroup])

    for i in order:
        fill_buffers()
        if placements[i] is Placement.RESIDENT:
            ops.append(Op(OpKind.UPDATE_RESIDENT, i))
        elif placements[i] is Placement.DEVICE:
            slot = buffer_of[i]
            ops += [Op(OpKind.UPDATE_GPU, i, slot), Op(OpKind.FLUSH, i, slot)]
            free[Placement.DEVICE].append(slot)
        else:
            if i not in buffer_of:  # every staging buffer holds an update that is not uploaded yet
                upload()
                fill_buffers()
            ops.append(Op(OpKind.UPDATE_CPU, i, buffer_of[i]))
            updated_on_cpu.append(i)
            if len(updated_on_cpu) > 1:
                upload()
    while updated_on_cpu:
        upload()
    return Plan(tuple(ops))
