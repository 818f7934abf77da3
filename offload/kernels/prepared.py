"""A step over the same tensors again and again: their arguments are checked and packed once."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels import dispatch, native, selection
from offload.kernels.scalars import AdamScalars


class PreparedStep:
    """:func:`offload.kernels.adam_step` over fixed tensors; a call takes the scalars of one step.

    For subgroups so small that checking the arguments costs more than the update. Everything about the tensors is
    checked here, and nothing about them at a call, so each must keep its memory: no ``resize_`` or ``set_``, no
    assignment to ``.data``. What :func:`adam_step` would look up is looked up at each call: the default implementation
    (unless one is named here) and the number of threads.

    Arguments, dtypes and errors are those of :func:`adam_step`. Only the compiled kernel over CPU tensors gains; other
    implementations and devices are called through :func:`adam_step`.
    """

    __slots__ = ("_bound", "_choice", "_implementation", "_num_threads", "_numel", "_tensors", "_written")

    def __init__(
        self,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        param_out: Tensor | None = None,
        max_exp_avg_sq: Tensor | None = None,
        *,
        implementation: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._tensors = (master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq)
        dispatch.check_arguments(*self._tensors)
        written = (master, exp_avg, exp_avg_sq, param_out, max_exp_avg_sq)
        self._written = [tensor for tensor in written if tensor is not None]
        self._numel = master.numel()
        self._implementation = implementation
        self._num_threads = num_threads
        dispatch.resolve_threads(num_threads, self._numel)
        self._bind()

    def __call__(self, scalars: AdamScalars) -> None:
        """One step, in place. The compiled kernel runs without the GIL."""
        if self._implementation is None and self._choice != selection.choice():
            self._bind()
        if self._bound is None:
            dispatch.adam_step(
                *self._tensors, scalars=scalars, implementation=self._implementation, num_threads=self._num_threads
            )
            return
        self._bound(scalars, dispatch.resolve_threads(self._num_threads, self._numel))
        torch.autograd.graph.increment_version(self._written)  # as adam_step does, and for its reason

    def _bind(self) -> None:
        self._choice = selection.choice()
        master = self._tensors[0]
        name = dispatch.resolve_implementation(self._implementation, master.device.type)
        self._bound: native.BoundStep | None = None
        if name in native.ISA_CODES and self._numel > 0 and dispatch.is_plain_cpu(master):
            kernel = native.load()
            assert kernel is not None, name
            self._bound = kernel.bind(name, *self._tensors)
