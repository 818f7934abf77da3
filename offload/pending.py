"""Tensors that wait at their first read: parameters and gradients of an update that is still in flight.

A pending parameter is the very object that the model holds, under another class until somebody reads it: any torch
function that is given it (a layer's forward, ``state_dict``, an average of weights, ``torch.save``, a collective) first
settles it, which makes it what it was, and then runs. So whoever comes first waits, for this tensor only; who comes
later finds an ordinary tensor and pays nothing. torch itself changes a tensor's class this way where lazy modules get
their parameters (``torch.nn.parameter.UninitializedTensorMixin.materialize``).

What sees a tensor without a torch function does not wait: an alias made earlier (``param.data`` kept from before), a
C++ extension that is handed the tensor itself, code that ``torch.compile`` made. :meth:`offload.AdamW.synchronize` and
:func:`wait_in_modules` are for these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offload.torch_functions import tensors_in

Settle = Callable[[], None]
Observer = Callable[[Tensor, str], None]  # of a tensor that is about to be settled, and of what reads it

# By the tensor's id. Whoever made it pending keeps it alive until it is settled.
_pending: dict[int, tuple[Tensor, Settle]] = {}
_observers: list[Observer] = []


def _getters(*names: str) -> set[object]:
    return {getattr(Tensor, name).__get__ for name in names}


# What tells nothing of a tensor's values. All that is missing here waits, needlessly but rightly.
_READS_NO_VALUES = {
    *_getters("grad", "requires_grad", "is_leaf", "grad_fn", "shape", "dtype", "device", "layout", "itemsize", "nbytes",
              "ndim", "_version", "is_cuda", "is_meta", "is_sparse", "is_quantized"),
    *(getattr(Tensor.grad, "__set__"), getattr(Tensor.grad, "__delete__"), getattr(Tensor.requires_grad, "__set__")),  # noqa: B009 - annotated as values
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.stride, Tensor.storage_offset),
    *(Tensor.element_size, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device),
    *(Tensor.requires_grad_, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.__len__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}  # fmt: skip


class _Pending:
    """What makes a tensor wait before a torch function sees it."""

    __slots__ = ()  # a tensor changes its class to one of these and back: both are laid out alike

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS_NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        for tensor in tensors_in((args, kwargs), _CLASS_OF):
            settle(tensor, getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        assert isinstance(self, Tensor)
        settle(self, "deepcopy")
        return copy.deepcopy(self, memo)


class PendingTensor(_Pending, Tensor):
    """A gradient that an update in flight has yet to read."""


class PendingParameter(_Pending, nn.Parameter):
    """A parameter that an update in flight has yet to write."""

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Parameter:  # type: ignore[misc]
        return nn.Parameter(*args, **kwargs)  # what ``type(param)(data)`` is meant to make


_PENDING_CLASS_OF: dict[type, type] = {Tensor: PendingTensor, nn.Parameter: PendingParameter}
_CLASS_OF = {pending: plain for plain, pending in _PENDING_CLASS_OF.items()}


def make_pending(tensor: Tensor, wait: Settle) -> None:
    """Call ``wait`` before the next read of ``tensor``, which the caller keeps alive until :func:`make_plain`.

    ``tensor`` is a Tensor or a Parameter: other classes have a ``__torch_function__`` of their own.

    ``wait`` runs in the thread that reads and calls :func:`make_plain`. It takes the place of another that is pending.
    """
    _pending[id(tensor)] = tensor, wait
    if type(tensor) not in _CLASS_OF:
        tensor.__class__ = _PENDING_CLASS_OF[type(tensor)]


def make_plain(tensor: Tensor) -> None:
    """Make ``tensor`` what it was; nothing if it is not pending."""
    _pending.pop(id(tensor), None)
    tensor.__class__ = _CLASS_OF.get(type(tensor), type(tensor))


def settle(tensor: Tensor, reader: str) -> None:
    """Wait for what ``tensor`` is pending on, if it is; ``reader`` says who reads it."""
    _, wait = _pending.get(id(tensor), (None, None))
    if wait is not None:
        for observe in _observers:
            observe(tensor, reader)
        wait()
    make_plain(tensor)


def all_pending() -> list[Tensor]:
    """What nobody has read yet."""
    return [tensor for tensor, _ in list(_pending.values())]


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call ``observer`` before each wait, in the thread that reads."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
