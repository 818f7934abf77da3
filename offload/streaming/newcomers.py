"""Weights that join a model while it streams: adapters, replaced parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from offload.streaming.quantised import plain_parts


class Newcomers:
    """Notices that something was registered on any module, and then finds what is new in ours.

    Looking through the whole model before every pass would cost more than the rest of the bookkeeping.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = {id(tensor): tensor for tensor in all_tensors(model)}  # which keeps the ids from being reused
        self._changed = [False]
        note = _Note(self._changed)
        handles = [
            register_module_parameter_registration_hook(note),
            register_module_buffer_registration_hook(note),
            register_module_module_registration_hook(note),
        ]
        self.remove = weakref.finalize(self, _remove, handles)

    def find(self) -> list[Tensor]:
        """Parameters and buffers that were not there at the last look."""
        if not self._changed[0]:
            return []
        self._changed[0] = False
        found = [tensor for tensor in all_tensors(self._model) if id(tensor) not in self._known]
        self._known.update((id(tensor), tensor) for tensor in found)
        return found


class _Note:
    """A registration hook: it replaces nothing."""

    def __init__(self, changed: list[bool]) -> None:
        self._changed = changed

    def __call__(self, module: nn.Module, name: str, value: Any) -> None:
        self._changed[0] = True


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The plain tensors that all parameters and buffers are, or are made of, each once."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        for _, part in plain_parts("", tensor):
            if id(part) not in seen:
                seen.add(id(part))
                yield part
