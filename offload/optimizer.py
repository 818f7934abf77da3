"""Optimizers whose state lives in host memory: torch's optimizers in use, interleaved offloading inside."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from offload.adam import AdamSubgroup, flat
from offload.arguments import check_rounding_seed, param_name, parse_options
from offload.explain import explain
from offload.gradients import NonFiniteGradientError, PendingScale, all_finite
from offload.hardware import HardwareProfile
from offload.kernels.state import check_state_format
from offload.layout import (
    Packed,
    check_grad,
    check_overlap,
    check_param,
    check_state_kind,
    pack,
    resolve_subgroup_numel,
)
from offload.live import publish_if_asked
from offload.masters import MasterTable
from offload.optimizer_state import (
    adopt_entries,
    check_state,
    copy_entries,
    fill_entry,
    load_state,
    shared_entries,
)
from offload.perf_model import Prediction, Rates
from offload.plan import Plan
from offload.policy import Overlap, Policy
from offload.pool import MemoryBill
from offload.record import StepWatch
from offload.rules import Rule
from offload.runtime import Runtime
from offload.shards import is_sharded, local, shard_offset, true_on_all_ranks
from offload.signals import deferred_signals
from offload.snapshot import Snapshot, Source
from offload.state_layout import StateKind
from offload.timeline import Span
from offload.updates import GroupedParam, updates_by_subgroup
from offload.verdict import diagnose, report

OnNonFinite = Literal["error", "skip"]


class OffloadedOptimizer(torch.optim.Optimizer):
    """A torch optimizer with its state in host memory, updated on the CPU and on the accelerator as a plan says.

    Every placement gives the same bits. The method is that of *Deep Optimizer States* (arXiv 2410.21316). Subclasses in
    :mod:`offload.optimizers` add the hyper-parameters of their rule and pass these arguments on, keyword-only:

    Args:
        params: parameters, named parameters or groups, all on one device: float32, bfloat16 or float16, contiguous;
            or DTensors of such (FSDP2), whose shards each rank updates. The device may be the CPU: then every update is
            the CPU's.
        plan: ``"auto"`` measures some steps and follows the fastest split as rates change, ``"host"`` updates all on
            the CPU, ``"device"`` streams all through the accelerator; or :class:`offload.Static`,
            :class:`offload.Stride`, an :class:`offload.Plan` or its text.
        device_budget, host_budget, pinned_budget: upper bounds on what the optimizer takes beyond parameters and
            gradients, in bytes or as text ("4GiB"); None for no limit. Exceeding one is an error at construction.
        subgroup_numel: parameters in a subgroup, about: whole parameters are packed. None takes a 24th of the
            model, within 2**20 and 1e8.
        num_slots: device buffers, each for one subgroup's state.
        profile: what ``plan="auto"`` believes of the machine until it has measured: a :class:`HardwareProfile`, its
            name or file, or :class:`Rates`; None starts with a plan that measures both sides. Of a profile's cores and
            host memory a rank gets the share that LOCAL_WORLD_SIZE ranks leave it, if a launcher has set that.
        overlap: ``"next_forward"`` returns from :meth:`step` when the update has begun; whoever reads a parameter first
            waits for it (:mod:`offload.pending`). ``"none"`` returns when the next forward may be enqueued, and so does
            ``"backward"``, which brings gradients down while backward runs (:mod:`offload.early`).
            ``"auto"`` is ``"none"`` for DTensors, and on the CPU, where nothing would be hidden. On an accelerator it
            starts as ``"next_forward"`` and, with ``plan="auto"``, follows what a whole step is predicted to take.
        on_nonfinite: what :meth:`step` does about NaN or infinity in a gradient: raise
            :class:`NonFiniteGradientError`, or skip the step and count it in ``num_skipped_steps``. State and
            parameters are untouched either way.
        state_format: ``"fp32"``; ``"split16"``, the float32 master as bfloat16 parameter and 16-bit remainder, which
            gives the same bits in two bytes less a parameter; ``"bf16"``, with moments in bfloat16 besides; ``"int8"``,
            with moments in 8 bits, a scale for each 128. All but fp32 need bfloat16 parameters (docs/numerics.md).
        rounding_seed: of the random bits that moments are rounded with in bf16 and int8. They depend on it, on the step
            and on the element, not on where or by how many threads the update runs.

    Raises:
        ValueError, TypeError: for parameters or arguments that cannot be taken, naming value, limit and remedy.
        offload.BudgetError: if a budget does not hold what is asked for.
    """

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
        profile: HardwareProfile | Rates | str | None = None,
        overlap: Overlap = "auto",
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
            profile=profile,
            overlap=overlap,
        )
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
        self._grad_scale = PendingScale()

    def _build(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        trainable = [p for p in params if p.requires_grad] or params
        device, options = trainable[0].device if trainable else torch.device("cpu"), self._options
        if device.type == "cpu" and options.policy == "auto":
            options = replace(options, policy="host", rates=None)
        if options.overlap == "auto":
            hides = device.type != "cpu" and not any(map(is_sharded, params))
            options = replace(options, overlap="next_forward" if hides else "none", chooses_overlap=hides)
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

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient. As torch's, with these differences:

        - a coefficient from :meth:`clip_grad_norm_` is applied inside the update; ``param.grad`` keeps its values;
        - NaN or infinity in a gradient is an error or skips the step, see ``on_nonfinite``.

        Returns when the next forward may be enqueued on the current stream, not when states are back in host memory:
        :meth:`synchronize`, :meth:`state_dict` and the next step wait for that.
        """
        self.runtime.check_usable()
        if self._snapshot is not None:
            self._snapshot.raise_unheard()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.runtime.finish()
        params = self._params_with_grad()
        if not params:
            warnings.warn("step() found no gradients, so it changed nothing: was backward() called?", stacklevel=4)
            return loss
        grads = [param.grad for _, param in params if param.grad is not None]
        if not true_on_all_ranks(all_finite(grads), grads):
            self._refuse_nonfinite(params)
            return loss
        adopt_entries((param for _, param in params), self.state, self._masters, self.synchronize, self.rule.name)
        self._refresh_masters()
        with deferred_signals():  # a step is taken whole, or not at all
            self._run(params, self._grad_scale.value(grads))
        return loss

    def _run(self, params: Sequence[GroupedParam], grad_scale: float) -> None:
        updates = updates_by_subgroup(
            params,
            self._masters,
            self.state,
            rule=self.rule,
            grad_scale=grad_scale,
            rounding_seed=self.rounding_seed,
        )
        self._grad_scale.forget()
        for _, param in params:
            self._count_step(param)
        masters = self._masters  # not self: an update in flight must not keep the optimizer
        params_of = {index: [update.slice.param for update in group] for index, group in updates.items()}
        self.runtime.step(updates, lambda index: masters.note_in_step(params_of[index]))

    def _count_step(self, param: Tensor) -> None:
        """Count one more step of ``param`` in its entry of ``self.state``, which is made at its first step."""
        entry, home = self.state[param], self._masters[param]
        if not entry:
            if not home.fresh:  # a user cleared the state: start again from zero, as torch does
                self.synchronize()
                home.restart()
            entry.update(step=torch.tensor(0.0), **home.views())
            home.entry, home.fresh = entry, False
        entry["step"] += 1

    def _params_with_grad(self) -> list[GroupedParam]:
        found = []
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and param.numel():
                    check_grad(param.grad, param, param_name(group, index, i))
                    found.append((group, param))
        if any(param not in self._masters for _, param in found):
            self._follow_params()
        return found

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

    def _refuse_nonfinite(self, params: Sequence[GroupedParam]) -> None:
        if self.on_nonfinite == "skip":
            self.num_skipped_steps += 1
            return
        bad = [self._name_of(p) for _, p in params if p.grad is not None and not all_finite([p.grad])]
        first = ", ".join(bad[:3]) or "in another rank's shards"
        raise NonFiniteGradientError(
            f"{len(bad)} of {len(params)} gradients hold NaN or infinity, first: {first}; nothing was changed. "
            f"Lower the learning rate or the loss scale, or construct with on_nonfinite='skip'"
        )

    # ---- gradients

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        """Clip the total norm of all gradients to ``max_norm`` in the next :meth:`step`.

        Returns torch's total norm, bit for bit, wherever subgroups are updated. The coefficient is multiplied in
        float32 inside the update instead of in a pass of its own, so ``param.grad`` keeps its values.
        """
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        return self._grad_scale.clip(grads, max_norm, norm_type, error_if_nonfinite, foreach)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also forgets a clip coefficient that no step has used."""
        self._grad_scale.forget()
        super().zero_grad(set_to_none)

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
        self._snapshot = Snapshot(path, self.runtime.begin_copies(sources, copy_bytes))
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
            "_options": self._options,
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

    # ---- insight

    @property
    def plan(self) -> Plan:
        """The plan of the next step."""
        return self.runtime.plan

    def set_plan(self, plan: Plan | str) -> None:
        """Run ``plan`` (a :class:`offload.Plan` or its text) from the next step on. Bits do not depend on it.

        Raises:
            PlanError, BudgetError: if it does not fit the subgroups, or the memory taken at construction.
        """
        self.runtime.set_plan(Plan.parse(plan) if isinstance(plan, str) else plan)

    @property
    def bill(self) -> MemoryBill:
        """Bytes taken beyond parameters and gradients."""
        return replace(self.runtime.bill, snapshot_bytes=self.runtime.snapshot_bytes)

    @classmethod
    def bill_of(cls, params: ParamsT, **arguments: Any) -> MemoryBill:
        """What an optimizer constructed with these arguments would take. Nothing is taken.

        Raises what the constructor raises, :class:`offload.BudgetError` where the system or a budget does not hold it.
        """
        unallocated = type(cls.__name__, (cls,), {"_allocates": False})
        bill: MemoryBill = unallocated(params, **arguments).bill
        return bill

    def explain(self) -> str:
        """Which subgroup is updated where, what it costs in memory, and what the rates measured so far predict.

        After a step that :meth:`time_next_step` asked for, also where its time went, what bound it and what was wrong.
        """
        text = explain(self.runtime)
        if self._step_watch is None or not self._step_watch.has_run or not self.runtime.spans:
            return text
        return f"{text}\n{report(diagnose(self._step_watch.record(self.runtime)))}"

    def save_decisions(self, path: str | PathLike[str]) -> None:
        """Write what ``plan="auto"`` measured and decided as JSON lines, for ``offload explain``.

        Raises:
            ValueError: if nothing is decided while training: another plan, a model on the CPU, one subgroup alone
                without ``profile``, or a budget that lets no state visit the device.
        """
        controller = self.runtime.controller
        if controller is None:
            raise ValueError("no decisions: only plan='auto' with states that may visit an accelerator takes any")
        controller.save(path)

    def simulate(self, machine: HardwareProfile | Rates, plan: Plan | None = None) -> Prediction:
        """Predict one update of these subgroups on a named or measured machine, without running it."""
        rates = machine if isinstance(machine, Rates) else Rates.from_profile(machine)
        return self.runtime.simulate(rates, plan)

    def time_next_step(self) -> None:
        """Measure the next step for :meth:`timeline`. That step waits for every transfer before it returns."""
        self.runtime.time_next_step = True
        self._step_watch = StepWatch(self, self.runtime.accelerator)

    def timeline(self) -> list[Span]:
        """What ran when in the last measured step, in seconds since it began; empty if none was measured."""
        return list(self.runtime.spans)

    def save_trace(self, path: str | PathLike[str]) -> None:
        """Write the last step that :meth:`time_next_step` asked for, for ``offload explain`` and for Perfetto.

        Raises:
            ValueError: if no step was measured so.
        """
        if self._step_watch is None:
            raise ValueError("no step was measured: call time_next_step() before the forward of one")
        self._step_watch.record(self.runtime).save(path)

    def synchronize(self) -> None:
        """Wait for everything in flight. Reading states or editing parameters behind autograd's back needs it."""
        self.runtime.synchronize()

    def _name_of(self, param: Tensor) -> str:
        names = (
            param_name(group, index, i)
            for index, group in enumerate(self.param_groups)
            for i, other in enumerate(group["params"])
            if other is param
        )
        return next(names, "(in no group now)")
