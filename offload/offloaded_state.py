"""Construction, checkpoints and pickling of an optimizer whose state lives in host memory."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from offload.adam import AdamSubgroup, flat
from offload.arguments import check_ranks, check_rounding_seed, param_name, parse_options
from offload.hardware import HardwareProfile
from offload.insight import Insight
from offload.kernels.state import check_state_format
from offload.layout import (
    Packed,
    check_overlap,
    check_param,
    check_state_kind,
    pack,
    resolve_subgroup_numel,
)
from offload.live import publish_if_asked
from offload.masters import MasterTable
from offload.monitor import MemoryMonitor
from offload.optimizer_state import (
    check_state,
    copy_entries,
    fill_entry,
    load_state,
    shared_entries,
)
from offload.pending_reads import PendingRead, pending_reads
from offload.perf_model import Rates
from offload.policy import Overlap, Policy
from offload.record import StepWatch
from offload.rules import Rule
from offload.runtime import Runtime
from offload.shards import is_sharded, local, shard_offset
from offload.snapshot import Snapshot, Source
from offload.state_layout import StateKind

OnNonFinite = Literal["error", "skip"]


class OffloadedState(Insight):
    """Parameters and their state, laid out in subgroups. How they are updated is for :class:`OffloadedOptimizer`."""

    rule: Rule
    _allocates = True

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        plan: Policy | str = "auto",
        device_budget: int | str | None = None,
        host_budget: int | str | None = None,
        pinned_budget: int | str | None = None,
        subgroup_numel: int | None = None,
        num_slots: int | None = None,
        num_passing_slots: int = 0,
        memory_monitor: MemoryMonitor | None = None,
        profile: HardwareProfile | Rates | str | None = None,
        overlap: Overlap = "auto",
        early_gradients: bool = False,
        on_nonfinite: OnNonFinite = "error",
        state_format: str = "fp32",
        rounding_seed: int = 0,
    ) -> None:
        if on_nonfinite not in ("error", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} is neither 'error' nor 'skip'")
        self._options = parse_options(
            plan=plan,
            device_budget=device_budget,
            host_budget=host_budget,
            pinned_budget=pinned_budget,
            subgroup_numel=subgroup_numel,
            num_slots=num_slots,
            num_passing_slots=num_passing_slots,
            memory_monitor=memory_monitor,
            profile=profile,
            overlap=overlap,
            early_gradients=early_gradients,
        )
        check_ranks(self._options)
        self.state_format = check_state_format(state_format)
        self.rounding_seed = check_rounding_seed(rounding_seed)
        self.on_nonfinite = on_nonfinite
        self.num_skipped_steps = 0
        self._forget_runtime()
        super().__init__(params, defaults)
        self._build()
        if self._allocates:
            publish_if_asked(self)

    # ---- construction

    def _forget_runtime(self) -> None:
        self._runtime: Runtime | None = None
        self._step_watch: StepWatch | None = None
        self._snapshot: Snapshot | None = None
        self._masters = MasterTable()

    def _build(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        trainable = [p for p in params if p.requires_grad] or params
        device, options = trainable[0].device if trainable else torch.device("cpu"), self._options
        if device.type == "cpu" and options.policy == "auto":
            options = replace(options, policy="host", rates=None)
        if options.overlap == "auto":
            hides = device.type != "cpu" and not any(map(is_sharded, params))
            early = options.early_gradients and hides
            how: Overlap = "next_forward" if hides else "none"
            options = replace(options, overlap=how, chooses_overlap=hides, early_gradients=early)
        total_numel = sum(local(p).numel() for p in params if p.requires_grad)
        options = replace(options, allocates=self._allocates)
        self._subgroup_numel = resolve_subgroup_numel(options.subgroup_numel, total_numel)
        self._runtime = Runtime(device, options)
        self._add_to_runtime(range(len(self.param_groups)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch; its state is allocated at once, within the budgets."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.rule.scalars(group, step=1)  # refuses hyper-parameters out of range
            if self._runtime is not None:
                self._add_to_runtime([len(self.param_groups) - 1])
        except BaseException:
            self.param_groups.pop()
            raise

    def _add_to_runtime(self, group_indices: Iterable[int]) -> None:
        """Allocate state for the trainable parameters of these groups that have none yet, after checking them all."""
        packed: dict[StateKind, list[Packed]] = {}
        empty: list[tuple[Tensor, StateKind]] = []
        numbers = self._numbers()
        for index in group_indices:
            group, params = self.param_groups[index], []
            kind = StateKind(self.state_format, self.rule.moments(group))
            for i, param in enumerate(group["params"]):
                if (param.requires_grad or param.grad is not None) and param not in self._masters:
                    check_param(param, param_name(group, index, i), self.runtime.device)
                    check_state_kind(kind, param, param_name(group, index, i))
                    check_overlap(self.runtime.options.overlap, param, param_name(group, index, i))
                    params.append(param)
            empty += [(param, kind) for param in params if is_sharded(param) and not local(param).numel()]
            packed.setdefault(kind, []).extend(
                pack(index, params, self._subgroup_numel, alignment=kind.alignment, numbers=numbers)
            )
        for kind, subgroups in packed.items():
            first = len(self.runtime.subgroups)
            for i, actions in enumerate(self.runtime.add(subgroups, kind)):
                self._masters.add(first + i, actions, self.rule.torch_names)
        for param, kind in empty:
            self._masters.add_empty(param, kind, self.rule.torch_names)
        self._refresh_masters()

    def _numbers(self) -> dict[Tensor, int]:
        """Of each parameter's first element, numbering all groups through: what its random bits are drawn by."""
        params = [param for group in self.param_groups for param in group["params"]]
        ends = itertools.accumulate(param.numel() for param in params)
        return {param: end - param.numel() + shard_offset(param) for param, end in zip(params, ends, strict=True)}

    @property
    def runtime(self) -> Runtime:
        """The runtime underneath: subgroups, plan, bill and lanes."""
        assert self._runtime is not None
        return self._runtime

    # ---- parameters that were edited or replaced

    def _follow_params(self) -> None:
        """Make state for parameters that were frozen when this was constructed and are trained now.

        If all are others than before (Accelerate puts sharded ones in their place), state is made anew for them, and
        what was there is freed first.
        """
        if self._masters and not any(p in self._masters for group in self.param_groups for p in group["params"]):
            self.synchronize()
            self.state.clear()
            self._forget_runtime()
            self._build()
        else:
            self._add_to_runtime(range(len(self.param_groups)))

    def refresh_masters(self) -> None:
        """Take over every parameter's present value.

        Needed only after edits through ``param.data``, which autograd's version counter does not see; all others
        (``param.copy_``, ``model.load_state_dict``, ...) are taken over by the next step.
        """
        self._refresh_masters(all_=True)

    def _refresh_masters(self, *, all_: bool = False) -> None:
        self._masters.refresh(self.synchronize, self._check_param, all_=all_)

    def _check_param(self, param: Tensor) -> None:
        name, home = self._name_of(param), self._masters[param]
        check_param(param, name, self.runtime.device)
        numel = local(param).numel()
        if (param.dtype, numel) != (home.actions.dtype, home.item.numel):
            raise ValueError(
                f"parameter {name} had {home.item.numel} elements of {home.actions.dtype} and now has {numel} "
                f"of {param.dtype}; construct the optimizer after such a change of the model"
            )

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """State in the schema of torch's optimizer, as tensors that share memory with this one: nothing is copied.

        Parameters that are not float32 have one entry more, ``master``: their float32 values. State in another format
        than fp32 has names of its own, see :mod:`offload.state_entries`. Its masters are whole only together with the
        parameters, so save the model with it.
        """
        self.synchronize()
        state_dict = super().state_dict()
        state_dict["state"] = shared_entries(state_dict["state"])
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state saved by this class under any plan, budgets and format, or by torch's class of that name.

        From the same format every bit is taken. Into another, load the model first: half of each master may be there.

        Raises:
            ValueError: if the state is another model's; nothing is loaded then.
        """
        self.synchronize()
        state_dict = state_dict.copy()  # as torch does: hooks may set keys without changing the caller's
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        params = [param for group in self.param_groups for param in group["params"]]
        if any(param.requires_grad and param.numel() and param not in self._masters for param in params):
            self._follow_params()
        fitting = self.check_state_dict(state_dict)
        self._refresh_masters()
        try:
            load_state(self.param_groups, self.state, self._masters, state_dict, fitting)
        except BaseException as error:
            self.runtime.mark_broken(error)
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def check_state_dict(self, state_dict: dict[str, Any]) -> dict[int, Tensor]:
        """Raise ValueError where :meth:`load_state_dict` would. Returns the parameters by the state's indices."""
        return check_state(self.param_groups, self._masters, state_dict, self.rule.name)

    def begin_snapshot(self, path: str, copy_bytes: int | None) -> Snapshot:
        """Start to copy state and parameters as they are now, for ``offload.save`` to write them to ``path``.

        Raises:
            BudgetError: if the host budget does not hold the copies.
        """
        self.finish_snapshot()
        self.synchronize()
        self._refresh_masters()
        sources = {
            index: Source(actions.state, [flat(item.param) for item in actions.slices], partial(self._changed, actions))
            for index, actions in enumerate(self.runtime.actions)
        }
        runtime = self.runtime
        copier = runtime.copies.begin(sources, copy_bytes, runtime.plan, runtime.bill)
        self._snapshot = Snapshot(path, copier)
        return self._snapshot

    def finish_snapshot(self) -> None:
        """Return when no checkpoint is being written any more. Raises what failed in it, unless that was heard of."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None and not snapshot.is_heard:
            snapshot.result()

    def _changed(self, actions: AdamSubgroup) -> str | None:
        params = [item.param for item in actions.slices]
        return next((self._name_of(param) for param in params if self._masters[param].changed), None)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: options, groups and state; memory, streams and the worker are made anew."""
        self.synchronize()
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": copy_entries(self.state),
            "_options": replace(self._options, num_passing_slots=0, memory_monitor=None),
            "on_nonfinite": self.on_nonfinite,
            "state_format": self.state_format,
            "rounding_seed": self.rounding_seed,
            "num_skipped_steps": self.num_skipped_steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_options" not in state:  # torch's own load_state_dict path passes groups only
            return
        entries, self.state = self.state, defaultdict(dict)
        self._forget_runtime()
        self._build()
        with torch.no_grad():
            for param, saved in entries.items():
                self.state[param] = fill_entry(self._masters[param], saved)

    def synchronize(self) -> None:
        """Wait for everything in flight. Reading states or editing parameters behind autograd's back needs it."""
        self.runtime.synchronize()

    def pending_reads(self) -> AbstractContextManager[list[PendingRead]]:
        """Within this context, every read of a parameter or gradient whose update is in flight is put on a list.

        A debug mode: it makes every operator slower. Most reads wait, and are right; those with ``waited`` False went
        through an alias from before the step, and need a :meth:`synchronize` before them.
        """

        def place_of(tensor: Tensor) -> tuple[str, int]:
            for index, actions in enumerate(self.runtime.actions):
                for item in actions.slices:
                    if item.param is tensor:
                        return self._name_of(tensor), index
                    if item.param.grad is tensor:
                        return f"gradient of {self._name_of(item.param)}", index
            raise KeyError

        return pending_reads(place_of)

    def _name_of(self, param: Tensor) -> str:
        names = (
            param_name(group, index, i)
            for index, group in enumerate(self.param_groups)
            for i, other in enumerate(group["params"])
            if other is param
        )
        return next(names, "(in no group now)")
