"""Optimizers whose state lives in host memory: torch's optimizers in use, interleaved offloading inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from offload.adam import SliceUpdate
from offload.arguments import check_update_in_backward, param_name
from offload.final_gradients import FinalGradients
from offload.gradients import NonFiniteGradientError, PendingScale, all_finite
from offload.kernels import Scalars
from offload.layout import check_grad
from offload.offloaded_state import OffloadedState
from offload.optimizer_state import adopt_entries
from offload.shards import true_on_all_ranks
from offload.signals import deferred_signals
from offload.update_in_backward import UpdateInBackward
from offload.updates import GroupedParam, updates_by_subgroup


class OffloadedOptimizer(OffloadedState):
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
        num_passing_slots: so many more, in memory that backward gives back, from there until the update is enqueued and
            beyond ``device_budget``; where ``plan`` is an :class:`offload.Plan`, the last of its slots. They never
            raise the step's peak: there are as many as ``memory_monitor`` found room for in one of the first steps.
        memory_monitor: attached to the model; see :class:`offload.MemoryMonitor`.
        profile: what ``plan="auto"`` believes of the machine until it has measured: a :class:`HardwareProfile`, its
            name or file, or :class:`Rates`; None starts with a plan that measures both sides. Of a profile's cores and
            host memory a rank gets the share that LOCAL_WORLD_SIZE ranks leave it, if a launcher has set that.
        overlap: ``"next_forward"`` returns from :meth:`step` when the update has begun; whoever reads a parameter first
            waits for it (:mod:`offload.pending`). ``"none"`` returns when the next forward may be enqueued, and so does
            ``"backward"``, which brings gradients down while backward runs (:mod:`offload.early`).
            ``"auto"`` is ``"none"`` for DTensors, and on the CPU, where nothing would be hidden. On an accelerator it
            starts as ``"next_forward"`` and, with ``plan="auto"``, follows what a whole step is predicted to take.
        early_gradients: gradients of CPU updates come down while backward runs whatever ``overlap`` is, through as many
            staging buffers as there are such updates, or as ``host_budget`` and ``pinned_budget`` hold; a plan that is
            given has its own. Where gradients change after backward, autograd's version counter has to see it, as
            with ``overlap="backward"`` (:mod:`offload.early`). Where ``overlap="auto"`` is ``"none"`` from the start,
            nothing comes early.
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

    def _forget_runtime(self) -> None:
        super()._forget_runtime()
        self._grad_scale = PendingScale()
        self._in_backward: UpdateInBackward | None = None
        self._final_gradients = FinalGradients()

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
        if self._in_backward is not None and self._end_update_in_backward(closure):
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self.runtime.watched("optimizer.step()"):
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
        updates = self._updates(params, grad_scale)
        self._grad_scale.forget()
        params_of = {index: [update.slice.param for update in group] for index, group in updates.items()}
        masters = self._masters  # not self: an update in flight must not keep the optimizer
        self.runtime.step(updates, lambda index: masters.note_in_step(params_of[index]))

    def _updates(self, params: Sequence[GroupedParam], grad_scale: float) -> dict[int, list[SliceUpdate]]:
        """What this step does to ``params``, by subgroup. Counts the step."""
        updates = updates_by_subgroup(
            params,
            self._masters,
            self.state,
            rule=self.rule,
            grad_scale=grad_scale,
            rounding_seed=self.rounding_seed,
        )
        for _, param in params:
            self._count_step(param)
        return updates

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

    # ---- the step that begins in backward

    @contextmanager
    def update_in_backward(self) -> Iterator[None]:
        """Let the update begin in the backward pass within: its gradients are final, and nothing will clip them.

        ::

            with optimizer.update_in_backward():
                loss.backward()
            optimizer.step()

        Each subgroup is updated once backward has made its gradients, with the hyper-parameters of that moment;
        :meth:`step` ends the step. For accumulation, only the last micro-batch's backward belongs in here. Not together
        with ``GradScaler``, or with gradients that are reduced over ranks afterwards. The first such step, and steps
        that are measured, update after backward; so does every step with ``overlap="none"``.

        Raises:
            RuntimeError: here, if the last such step was not ended by :meth:`step`; within, where a parameter is read
                after its update has begun, or a gradient is added to one that was used; later, in
                :meth:`clip_grad_norm_`; and in :meth:`step`, if gradients or hyper-parameters were changed after the
                update had read them. That step is done then, without the change.
            NonFiniteGradientError: in :meth:`step`. As the update has begun by then, this one breaks the optimizer; so
                does an error in backward after the first update began.
            ValueError: with ``on_nonfinite="skip"``, and in a program of several ranks.
        """
        check_update_in_backward(self.on_nonfinite, pending=self._in_backward is not None)
        self.runtime.finish()
        self._grad_scale.forget()
        params = [param for group in self.param_groups for param in group["params"]]
        if any(p.requires_grad and p.numel() and p not in self._masters for p in params):  # frozen at construction
            self._follow_params()
        adopt_entries(params, self.state, self._masters, self.synchronize, self.rule.name)
        self._refresh_masters()
        named = {
            param: (group, param_name(group, index, i))
            for index, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
        }
        params_of = [[item.param for item in actions.slices] for actions in self.runtime.actions]
        masters = self._masters

        def updates_of(index: int) -> Sequence[SliceUpdate]:
            params = [param for param in params_of[index] if param in named and param.grad is not None]
            for param in params:
                assert param.grad is not None
                check_grad(param.grad, param, named[param][1])
            if any(masters[param].changed for param in params):
                raise RuntimeError("a parameter was edited within update_in_backward(): edit it before")
            return self._updates([(named[param][0], param) for param in params], 1.0).get(index, [])

        settled: Callable[[int], None] = lambda index: masters.note_in_step(params_of[index])  # noqa: E731
        self._in_backward = update = UpdateInBackward(self.runtime, updates_of, settled, self._final_gradients)
        try:
            yield
            update.close()
        except BaseException as error:
            self._in_backward = None
            update.cancel(error)
            raise

    def _end_update_in_backward(self, closure: object) -> bool:
        """Whether the step is done: not if it was not to begin in backward."""
        update, self._in_backward = self._in_backward, None
        assert update is not None
        if closure is not None:
            raise ValueError("step(closure) after update_in_backward(): the closure would run another backward pass")
        if update.runs_in_backward:
            update.end(self._params_with_grad(), self._scalars_now, self._name_of)
        return update.runs_in_backward

    def _scalars_now(self, grouped: GroupedParam) -> Scalars:
        """Of the step that was counted last."""
        group, param = grouped
        return self.rule.scalars(group, step=int(self.state[param]["step"]))

    # ---- gradients

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        """Clip the total norm of all gradients to ``max_norm`` in the next :meth:`step`.

        Returns torch's total norm, bit for bit, wherever subgroups are updated. The coefficient is multiplied in
        float32 inside the update instead of in a pass of its own, so ``param.grad`` keeps its values.
        """
        if self._in_backward is not None:
            raise RuntimeError(
                "clip_grad_norm_ after update_in_backward(): the update has begun without the coefficient, which needs "
                "every gradient first; call step() to end this step, and leave the context out where you clip"
            )
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        return self._grad_scale.clip(grads, max_norm, norm_type, error_if_nonfinite, foreach)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also forgets a clip coefficient that no step has used."""
        self._grad_scale.forget()
        if self._runtime is not None:
            self._runtime.before_dropping_gradients()
        super().zero_grad(set_to_none)
