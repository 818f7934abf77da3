"""One step whose update begins in backward: what was begun, and that nothing it was made of changes afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from offload.adam import SliceUpdate
from offload.final_gradients import FinalGradients
from offload.gradients import NonFiniteGradientError, all_finite
from offload.kernels import Scalars
from offload.runtime import Runtime
from offload.updates import GroupedParam
from offload.watched import unwatch, watch

UpdatesOf = Callable[[int], Sequence[SliceUpdate]]


@unserializable_hook  # type: ignore[untyped-decorator]
def _refuse_more(_: Tensor) -> None:
    """Before autograd adds to a gradient: knows nothing of its parameter, which it must not keep alive."""
    raise RuntimeError(
        "a gradient would be added to one whose update has begun in update_in_backward(), so this backward pass was "
        "stopped: accumulate before it, and let one backward pass within it be the last before step()"
    )


@dataclass(frozen=True, slots=True)
class _Begun:
    """One parameter's update, and its gradient as it was read."""

    update: SliceUpdate
    grad: Tensor
    grad_version: int
    guard: RemovableHandle

    @property
    def has_changed(self) -> bool:
        grad = self.update.slice.param.grad
        return grad is not self.grad or grad._version != self.grad_version


class UpdateInBackward:
    """Lives from the begin of ``update_in_backward()`` until ``step()``.

    Args:
        updates_of: what this step does to the parameters of a subgroup that have a gradient; called once for each.
        settled: called with a subgroup's index once its parameters and gradients may be used.
        final: says which gradients are, from one step to the next.
    """

    def __init__(
        self, runtime: Runtime, updates_of: UpdatesOf, settled: Callable[[int], None], final: FinalGradients
    ) -> None:
        self._runtime = runtime
        self._updates_of = updates_of
        self._final = final
        self._begun: dict[Tensor, _Begun] = {}
        self._to_begin = set(range(len(runtime.subgroups)))
        grads: dict[int, list[Tensor]] = {}

        def settle_and_watch(index: int) -> None:  # knows no runtime: an update in flight must not keep it
            settled(index)
            for grad in grads.get(index, ()):
                watch(grad)

        self._grads = grads  # by subgroup: used, and not to change before step()
        order = final.order(len(runtime.subgroups))
        self.runs_in_backward = runtime.open_step(order, self._arrived, settle_and_watch)

    def _arrived(self, index: int, position: int) -> None:
        """In backward, in a thread of autograd's."""
        params = [item.param for item in self._runtime.actions[index].slices]
        positions = [i for i, param in enumerate(params) if param.requires_grad]
        if self._final.arrived(index, position, positions):
            self._begin(index)

    def _begin(self, index: int) -> None:
        self._to_begin.remove(index)
        updates = self._updates_of(index)
        params = [update.slice.param for update in updates]
        grads = [param.grad for param in params if param.grad is not None]
        guards = [param.register_hook(_refuse_more) for param in params]  # type: ignore[no-untyped-call]
        self._runtime.begin_subgroup(index, updates)
        self._grads[index] = grads
        for param, grad, update, guard in zip(params, grads, updates, guards, strict=True):
            self._begun[param] = _Begun(update, grad, grad._version, guard)

    def close(self) -> None:
        """Backward is over: begin the rest."""
        if self.runs_in_backward:
            for index in sorted(self._to_begin):
                self._begin(index)
            self._runtime.close_step()
            self._final.end()

    def cancel(self, error: BaseException) -> None:
        """Backward failed. If an update had begun by then, parameters and state are of different steps."""
        if self.runs_in_backward:
            self._final.forget()
            self._runtime.cancel_step(error if self._begun else None)
        self._stop_watching()

    def end(
        self,
        params: Sequence[GroupedParam],
        scalars_now: Callable[[GroupedParam], Scalars],
        name_of: Callable[[Tensor], str],
    ) -> None:
        """The user calls ``step()``: see that it would have done the same.

        Args:
            params: those that have a gradient now.
            scalars_now: what the step would use for one of them.

        Raises:
            NonFiniteGradientError: the optimizer is broken then.
            RuntimeError: for gradients or hyper-parameters that changed after they were used.
        """
        self._stop_watching()
        if self._runtime.overlap != "next_forward":
            self._runtime.finish()
        if not all_finite([begun.update.grad for begun in self._begun.values()]):
            error = NonFiniteGradientError(
                "a gradient holds NaN or infinity, and its update began in backward, so parameters and state hold them "
                "too: load the last checkpoint, and use update_in_backward() where gradients are known to be finite"
            )
            self._runtime.mark_broken(error)
            raise error
        grouped = {param: (group, param) for group, param in params}
        late = [p for p in self._begun.keys() | grouped.keys() if p not in self._begun or self._begun[p].has_changed]
        if late:
            names = sorted(map(name_of, late))
            raise RuntimeError(
                f"{len(late)} gradients changed after update_in_backward() had used them, among them: "
                f"{', '.join(names[:3])}. The step was done with the gradients as backward had made them; leave the "
                f"context out where gradients are clipped, unscaled, reduced or accumulated after backward"
            )
        if any(scalars_now(grouped[param]) != begun.update.scalars for param, begun in self._begun.items()):
            raise RuntimeError(
                "hyper-parameters changed after update_in_backward() had used them; the step was done with the former "
                "ones: change param_groups after step(), or before backward"
            )

    def _stop_watching(self) -> None:
        for begun in self._begun.values():
            begun.guard.remove()
            unwatch(begun.grad)
        self._grads.clear()
