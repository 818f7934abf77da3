"""What the operations of a plan do to the tensors of one subgroup, for any update rule and state format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.accelerators import Accelerator
from offload.kernels import PreparedUpdate, Rounding, Scalars, State, update
from offload.lanes import Event
from offload.ring import PinnedRing
from offload.shards import local
from offload.state_layout import ADAM_FP32, StateKind, StateLayout
from offload.subgroup import Slot, Staging

_AMSGRAD_FP32 = StateKind(moments=("first", "second", "max_second"))

_NO_ROUNDING = Rounding()


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """One whole parameter (or this rank's shard of it) within a subgroup: ``numel`` elements from ``offset`` of the
    flat state.

    ``number`` is that of its first element among all parameters of the optimizer, however they are cut.
    """

    param: Tensor
    offset: int
    numel: int
    number: int = 0

    def within(self, flat: Tensor) -> Tensor:
        return flat.narrow(-1, self.offset, self.numel)


# A parameter's place in the subgroup, its flat gradient and the flat parameter, both on the device.
Source = tuple[ParamSlice, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class SliceUpdate:
    """What one step does to one parameter: its flat gradient on the device, the step's scalars and random bits.

    ``param`` is flat too and shares the parameter's storage and version counter. It is taken before the step: what the
    step does must not touch the parameter itself, which may be pending (:mod:`offload.pending`) by then.
    """

    slice: ParamSlice
    grad: Tensor
    param: Tensor
    scalars: Scalars
    rounding: Rounding = _NO_ROUNDING


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring parameters that are updated with the same scalars, so by one call of the kernel."""

    begin: int
    end: int
    scalars: Scalars
    rounding: Rounding

    def goes_on_with(self, update: SliceUpdate, *, rounds: bool) -> bool:
        """Whether one call may serve both: with random bits, the numbers of elements must go on too."""
        if (self.end, self.scalars) != (update.slice.offset, update.scalars):
            return False
        size = self.end - self.begin
        return not rounds or update.rounding == Rounding(self.rounding.key, (self.rounding.first_index + size) % 2**32)


class AdamSubgroup:
    """State of one subgroup and the operations on it (:class:`offload.subgroup.Actions`).

    Args:
        slices: the parameters, in order, packed without gaps.
        dtype: of the parameters and their gradients.
        state: a slab, on the host or (resident) on the device.
        accelerator: told what the host update touches; None for parameters on the CPU.
        layout: of the slab; None: (rows, numel) float32 of Adam: master, exp_avg, exp_avg_sq and, with a fourth row,
            max_exp_avg_sq.
        ring: what the state goes through on its way to a slot and back, where it is not pinned.
    """

    def __init__(
        self,
        slices: Sequence[ParamSlice],
        dtype: torch.dtype,
        state: Tensor,
        accelerator: Accelerator | None,
        layout: StateLayout | None = None,
        ring: PinnedRing | None = None,
    ) -> None:
        if layout is None:
            layout = StateLayout(ADAM_FP32 if state.shape[0] == 3 else _AMSGRAD_FP32, state.shape[1])
        self.layout = layout
        self.slices = tuple(slices)
        self.dtype = dtype
        self.state = state
        self._accelerator = accelerator
        self._ring = ring
        self._updates: tuple[SliceUpdate, ...] = ()
        self._sources: tuple[Source, ...] = ()
        self._runs: tuple[_Run, ...] = ()
        self.copied: Event | None = None  # of a snapshot, see [Note: copied before it is overwritten]

    def begin_step(self, updates: Sequence[SliceUpdate]) -> None:
        """Set what this step updates: the parameters that have a gradient, in order."""
        self._updates = tuple(updates)
        self.begin_gradients([(each.slice, each.grad, each.param) for each in updates])
        runs: list[_Run] = []
        for each in updates:
            begin, rounding = each.slice.offset, each.rounding
            if runs and runs[-1].goes_on_with(each, rounds=self.layout.kind.rounds):
                begin, rounding = runs[-1].begin, runs[-1].rounding
                runs.pop()
            runs.append(_Run(begin, each.slice.offset + each.slice.numel, each.scalars, rounding))
        self._runs = tuple(runs)

    def begin_gradients(self, sources: Sequence[Source]) -> None:
        """Set what goes down, in order: the gradients of the step, also before it."""
        self._sources = tuple(sources)

    def end_step(self) -> None:
        """Let go of the gradients. Every use of them is ordered before the next forward on the compute lane."""
        self._updates = self._sources = ()

    # Order and lifetime: see [Note: who waits for what] in offload/executor.py.
    def grad_down(self, staging: Staging) -> None:
        grad = self._typed(staging.grad)
        for item, from_device, _ in self._sources:
            item.within(grad).copy_(from_device, non_blocking=True)
        if self.layout.kind.master_in_param:
            param = self._typed(staging.param)
            for item, _, from_device in self._sources:
                item.within(param).copy_(from_device, non_blocking=True)

    def await_copy(self) -> None:
        """Wait until a snapshot has copied state and parameters, which are overwritten next."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None

    def update_cpu(self, staging: Staging) -> None:
        self.await_copy()
        grad, param = self._typed(staging.grad), self._typed(staging.param)
        if self._accelerator is not None:
            self._accelerator.declare_host_work("cpu update", reads=(grad,), writes=(*self.state, param))
        for run in self._runs:
            # One prepared update for each begin, so that their number is bounded however the gaps between runs move.
            end, prepared = staging.prepared.get((self, run.begin), (None, None))
            if end != run.end:
                part, numel = slice(run.begin, run.end), run.end - run.begin
                rows = self.layout.state(self.state).narrow(run.begin, numel)
                prepared = PreparedUpdate(rows, grad[part], param[part], rule=run.scalars.rule)
                staging.prepared[self, run.begin] = run.end, prepared
            prepared(run.scalars, run.rounding)

    def upload(self, staging: Staging) -> None:
        param = self._typed(staging.param)
        for each in self._updates:
            each.param.copy_(each.slice.within(param), non_blocking=True)

    def prefetch(self, slot: Slot) -> None:
        for row, slot_row in self._copies(slot):
            if self._ring is None:
                slot_row.copy_(row, non_blocking=True)
            else:
                self._ring.up(row, slot_row)

    def update_gpu(self, slot: Slot) -> None:
        self.await_copy()
        self._update_on_device(self._in_slot(slot))

    def flush(self, slot: Slot) -> None:
        for row, slot_row in self._copies(slot):
            if self._ring is None:
                row.copy_(slot_row, non_blocking=True)
            else:
                self._ring.down(slot_row, row)

    def update_resident(self) -> None:
        self.await_copy()
        self._update_on_device(self.state)

    def _update_on_device(self, slab: Tensor) -> None:
        state = self.layout.state(slab)
        for each in self._updates:
            part = state.narrow(each.slice.offset, each.slice.numel)
            update(part, each.grad, each.param, scalars=each.scalars, rounding=each.rounding)

    def state_of(self, item: ParamSlice) -> State:
        """The state of one parameter, as views."""
        return self.layout.state(self.state).narrow(item.offset, item.numel)

    def _copies(self, slot: Slot) -> Iterator[tuple[Tensor, Tensor]]:
        """State and slot in pieces that one copy each moves: a copy of rows that lie apart would block the host."""
        in_slot = self._in_slot(slot)
        return iter([(self.state, in_slot)]) if self.state.is_contiguous() else zip(self.state, in_slot, strict=True)

    def _in_slot(self, slot: Slot) -> Tensor:
        assert slot.buffer is not None
        return slot.buffer.view(torch.uint8)[: self.state.nbytes].view(self.state.dtype).view_as(self.state)

    def _typed(self, staging: Tensor | None) -> Tensor:
        assert staging is not None
        return staging[: self.layout.numel * self.dtype.itemsize].view(self.dtype)


def flat(param: Tensor) -> Tensor:
    """A flat view that shares the parameter's (its shard's) storage and version counter, outside autograd."""
    return local(param).detach().view(-1)


def drop_remainder(state: State, where: Tensor | None = None) -> None:
    """Make the masters of a compact state what the parameters are; ``where`` (bool) None: everywhere."""
    zero = torch.zeros_like(state.master)
    state.master.copy_(zero if where is None else torch.where(where, zero, state.master))
    signed = _signed(state)
    if signed is not None:
        magnitude = signed.abs()
        state.second.copy_(magnitude if where is None else torch.where(where, magnitude, signed))  # type: ignore[union-attr]


def _signed(state: State) -> Tensor | None:
    """The second moment whose sign belongs to the remainder, as float32."""
    return None if state.second is None or state.format == "int8" else state.second.float()
