"""An update of the same tensors again and again: their arguments are checked and packed once."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels import dispatch, native, selection
from offload.kernels.scalars import Scalars
from offload.kernels.state import Rounding, State


class PreparedUpdate:
    """:func:`offload.kernels.update` of fixed tensors; a call takes what changes from step to step.

    For subgroups so small that checking the arguments costs more than the update. Everything about the tensors is
    checked here, and nothing about them at a call, so each must keep its memory: no ``resize_`` or ``set_``, no
    assignment to ``.data``. What :func:`update` would look up is looked up at each call: the default implementation
    (unless one is named here) and the number of threads.

    ``rule`` is that of the scalars which the calls will be given. Other arguments, dtypes and errors are those of
    :func:`update`. Only the compiled kernel over CPU tensors gains; other implementations and devices are called
    through :func:`update`.
    """

    __slots__ = ("_arguments", "_bound", "_choice", "_implementation", "_num_threads", "_numel", "_rule", "_written")

    def __init__(
        self,
        state: State,
        grad: Tensor,
        param: Tensor | None = None,
        *,
        rule: str = "adam",
        implementation: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        dispatch.check_arguments(state, grad, param, rule)
        dispatch.resolve_threads(num_threads, state.numel)
        self._arguments = (state, grad, param)
        self._written = dispatch.written_by(state, param)
        self._numel = state.numel
        self._rule = rule
        self._implementation = implementation
        self._num_threads = num_threads
        self._bind()

    def __call__(self, scalars: Scalars, rounding: Rounding = dispatch.NO_ROUNDING) -> None:
        """One step, in place. The compiled kernel runs without the GIL.

        Raises ValueError for scalars of another rule.
        """
        if scalars.rule != self._rule:
            raise ValueError(
                f"scalars are of rule {scalars.rule!r}, but rule={self._rule!r} was prepared; prepare one for each rule"
            )
        if self._implementation is None and self._choice != selection.choice():
            self._bind()
        if self._bound is None:
            dispatch.update(
                *self._arguments,
                scalars=scalars,
                rounding=rounding,
                implementation=self._implementation,
                num_threads=self._num_threads,
            )
            return
        num_threads = dispatch.resolve_threads(self._num_threads, self._numel)
        self._bound(scalars, rounding, num_threads)
        torch.autograd.graph.increment_version(self._written)  # as update does, and for its reason

    def _bind(self) -> None:
        self._choice = selection.choice()
        state = self._arguments[0]
        name = dispatch.resolve_implementation(self._implementation, state.master.device.type)
        self._bound: native.BoundUpdate | None = None
        if name in native.ISA_CODES and self._numel > 0 and dispatch.is_plain_cpu(state.master):
            kernel = native.load()
            assert kernel is not None, name
            self._bound = kernel.bind(name, self._rule, *self._arguments)
