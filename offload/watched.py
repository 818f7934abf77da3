"""Gradients of which every write counts, also those that autograd's version counter does not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.torch_functions import tensors_in

# Writes its first argument and leaves the version counters alone: what GradScaler unscales gradients with.
_UNCOUNTED_WRITES = {torch._amp_foreach_non_finite_check_and_unscale_}


class WatchedTensor(Tensor):
    """A gradient whose version counter is raised by :data:`_UNCOUNTED_WRITES` too. Everything else is as it was."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        watched = list(tensors_in((args, kwargs), {WatchedTensor}))
        for tensor in watched:
            unwatch(tensor)  # func must not see the class: it may copy or pickle the tensor
        try:
            return func(*args, **(kwargs or {}))
        finally:
            for tensor in watched:
                watch(tensor)
                if func in _UNCOUNTED_WRITES:
                    torch.autograd.graph.increment_version(tensor)


def watch(tensor: Tensor) -> None:
    """Count every write of ``tensor``, if it is a plain one, until :func:`unwatch`."""
    if type(tensor) is Tensor:
        tensor.__class__ = WatchedTensor


def unwatch(tensor: Tensor) -> None:
    """Make ``tensor`` what it was; nothing if it is not watched."""
    if type(tensor) is WatchedTensor:
        tensor.__class__ = Tensor  # type: ignore[assignment]
