"""One rank's share of the model as a few flat tensors, and its update by the core's runtime. Knows no DeepSpeed."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from offload.adam import ParamSlice, SliceUpdate, flat
from offload.explain import explain
from offload.kernels import AdamScalars
from offload.layout import Packed
from offload.options import Options
from offload.plan import Plan
from offload.policy import Static
from offload.pool import MemoryBill
from offload.runtime import Runtime
from offload.subgroup import FLOAT32_BYTES

STATE_ROWS = ("master", "exp_avg", "exp_avg_sq")
ALIGNMENT_NUMEL = 64  # subgroups begin at multiples of it, so that no two share a line of the CPU's cache
NUM_SUBGROUPS = 24  # for partitions that we cut: enough to overlap transfers with updates


class Alias(NamedTuple):
    """A tensor that shares memory with elements ``begin`` to ``end`` of a flat parameter, or of its gradient."""

    tensor: Tensor
    begin: int
    end: int


class FlatPartition:
    """Optimizer state of flat parameters, and their update on the CPU and the accelerator as a plan says.

    Args:
        flats: one-dimensional, on one device, of float32, bfloat16 or float16. They are written in place, so the model
            has to see these very tensors.
        options: plan and budgets.
        max_subgroup_numel: None makes each flat tensor one subgroup, whose state may live on the device. A number cuts
            them into subgroups of at most so many elements, over state in one piece per flat tensor in host memory.

    Attributes:
        states: per flat tensor, (3, numel) float32: master, exp_avg, exp_avg_sq. Read or write them only after
            :meth:`synchronize`.

    Raises:
        BudgetError, PlanError: if plan or budgets do not fit, before anything is allocated.
    """

    def __init__(self, flats: Sequence[Tensor], options: Options, *, max_subgroup_numel: int | None = None) -> None:
        device = flats[0].device
        if device.type == "cpu" and options.policy == "auto":
            options = replace(options, policy="host", num_slots=None)
        if options.overlap == "auto":
            options = replace(options, overlap="none" if device.type == "cpu" else "next_forward")
        if max_subgroup_numel is not None:
            options = self._host_only(options, sum(flat.numel() for flat in flats), max_subgroup_numel)
        self.runtime = Runtime(device, options)
        self._slices: list[list[tuple[int, ParamSlice]]] = []  # per flat tensor: subgroup, and what it is there
        self.states: list[Tensor] = []
        if max_subgroup_numel is None:
            self._add_whole(flats)
        else:
            self._add_cut(flats, max_subgroup_numel, pinned=options.policy != "host")
        with torch.no_grad():
            for flat, state in zip(flats, self.states, strict=True):
                state[0].copy_(flat)

    @staticmethod
    def _host_only(options: Options, numel: int, max_subgroup_numel: int) -> Options:
        """Options for state in one piece in host memory: all of it is pinned, or none of it visits the device."""
        if isinstance(options.policy, Static):
            raise ValueError(f"plan={options.policy} keeps state on the device; here all of it is in host memory")
        budgets = options.budgets
        if options.policy != "auto":
            return options
        needed = len(STATE_ROWS) * FLOAT32_BYTES * numel
        if budgets.pinned_bytes is not None and budgets.pinned_bytes < needed:
            return replace(options, policy="host", num_slots=None)
        if budgets.device_bytes is not None:  # for slots alone: none of it may become resident
            slot_bytes = len(STATE_ROWS) * FLOAT32_BYTES * min(numel, max_subgroup_numel)
            num_slots = min(options.num_slots or 2, budgets.device_bytes // slot_bytes)
            budgets = replace(budgets, device_bytes=None)
            if not num_slots:
                return replace(options, policy="host", num_slots=None, budgets=budgets)
            return replace(options, num_slots=num_slots, budgets=budgets)
        return options

    def _add_whole(self, flats: Sequence[Tensor]) -> None:
        packed = [Packed(0, flat.dtype, (ParamSlice(flat, 0, flat.numel()),)) for flat in flats]
        for index, actions in enumerate(self.runtime.add(packed)):
            self._slices.append([(index, actions.slices[0])])
            self.states.append(actions.state)

    def _add_cut(self, flats: Sequence[Tensor], max_subgroup_numel: int, *, pinned: bool) -> None:
        packed: list[Packed] = []
        for whole in flats:
            state = self.runtime.pool.host_state(len(STATE_ROWS), whole.numel(), pinned=pinned)
            self.states.append(state)
            self._slices.append([])
            for begin, numel in cuts(whole.numel(), max_subgroup_numel):
                piece = ParamSlice(whole.narrow(0, begin, numel), 0, numel)
                self._slices[-1].append((len(packed), piece))
                packed.append(Packed(0, whole.dtype, (piece,), state.narrow(1, begin, numel)))
        self.runtime.add(packed)

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor], scalars: Sequence[AdamScalars], aliases: Sequence[Iterable[Alias]] = ()
    ) -> None:
        """Update every flat tensor from its gradient, with its group's scalars.

        Args:
            grads: per flat tensor, of its shape, dtype and device.
            aliases: per flat tensor, the tensors that it and its gradient are read and written through. With overlap
                "next_forward" this returns when the update has begun, and they are pending (:mod:`offload.pending`):
                what is read through others has to wait for ``runtime.finish()``.

        Otherwise returns when the parameters may be read on the current stream; states may still be on their way.
        """
        updates = {}
        for slices, grad, group_scalars in zip(self._slices, grads, scalars, strict=True):
            begin = 0
            for index, piece in slices:
                updates[index] = [
                    SliceUpdate(piece, grad.narrow(0, begin, piece.numel), flat(piece.param), group_scalars)
                ]
                begin += piece.numel
        self.runtime.step(updates, pending=self._by_subgroup(aliases))

    def _by_subgroup(self, aliases: Sequence[Iterable[Alias]]) -> dict[int, list[Tensor]]:
        found: dict[int, list[Tensor]] = {}
        for slices, group in zip(self._slices, aliases, strict=False):
            ends = list(itertools.accumulate(piece.numel for _, piece in slices))
            for alias in group:
                if alias.begin == alias.end:
                    continue
                # From the piece that holds its first element to the one that holds its last.
                for i in range(bisect_right(ends, alias.begin), bisect_left(ends, alias.end) + 1):
                    found.setdefault(slices[i][0], []).append(alias.tensor)
        return found

    def synchronize(self) -> None:
        """Wait until nothing is in flight: ``states`` and parameters may be read and written afterwards."""
        self.runtime.synchronize()

    def release_params(self) -> None:
        """Let go of the flat tensors' memory, until :meth:`move_params`. Nothing may be in flight."""
        for _, piece in itertools.chain.from_iterable(self._slices):
            piece.param.data = piece.param.new_empty(0)

    def move_params(self, flats: Sequence[Tensor]) -> None:
        """From now on update ``flats``, alike in shape, dtype and device, in the place of those before."""
        for slices, whole in zip(self._slices, flats, strict=True):
            parts = torch.split(whole, [piece.numel for _, piece in slices])
            for (_, piece), part in zip(slices, parts, strict=True):
                piece.param.data = part

    @property
    def plan(self) -> Plan:
        """The plan of the next step on this rank."""
        return self.runtime.plan

    def set_plan(self, plan: Plan | str) -> None:
        """Run ``plan`` from the next step on. Ranks may follow different plans: bits do not depend on them."""
        self.runtime.set_plan(Plan.parse(plan) if isinstance(plan, str) else plan)

    @property
    def bill(self) -> MemoryBill:
        """Bytes taken beyond parameters and gradients."""
        return self.runtime.bill

    def explain(self) -> str:
        """Which subgroup is updated where, what it costs in memory, and what the rates measured so far predict."""
        return explain(self.runtime)


def cuts(numel: int, max_numel: int) -> list[tuple[int, int]]:
    """``numel`` elements as (begin, length) of nearly equal, aligned pieces of at most ``max_numel``, about."""
    num = -(-numel // max(max_numel, ALIGNMENT_NUMEL))
    step = -(-numel // num)
    step = -(-step // ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL
    return [(begin, min(step, numel - begin)) for begin in range(0, numel, step)]


def default_subgroup_numel(numel: int, sub_group_size: int) -> int:
    """The size to cut a partition of ``numel`` elements to, under DeepSpeed's ``sub_group_size``."""
    return max(ALIGNMENT_NUMEL, min(sub_group_size, max(-(-numel // NUM_SUBGROUPS), 2**20)))
