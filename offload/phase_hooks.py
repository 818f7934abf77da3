"""Hooks through which a model and an optimizer say which phase of training they are in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle


class PhaseHooks:
    """Calls ``enter`` with "forward", "backward", "update" or "idle" as a model and an optimizer go through them.

    A copied or unpickled module carries copies of its hooks; theirs have no ``enter`` and do nothing.
    """

    def __init__(self, enter: Callable[[str], None] | None) -> None:
        self._enter = enter
        self._handles: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[type[PhaseHooks], tuple[None]]:
        return PhaseHooks, (None,)

    def install(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._handles += [
            model.register_forward_pre_hook(self._forward_begins),
            model.register_forward_hook(self._forward_ends, always_call=True),
        ]
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(self._update_begins),
                optimizer.register_step_post_hook(self._update_ends),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._enter = None  # hooks on tensors of a forward pass whose backward is yet to come

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._enter is not None and not _inside_backward():
            self._enter("forward")

    def _forward_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """``output`` is None when the forward pass raised."""
        if self._enter is None or _inside_backward():
            return
        differentiable = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if not differentiable:
            self._enter("idle")
            return
        # Not the module's own backward hooks: they miss outputs that are dicts (transformers), and fire at once, not
        # at the end, when no input needs a gradient (token ids).
        register_multi_grad_hook(differentiable, self._backward_begins, mode="any")

    def _backward_begins(self, grad: Tensor) -> None:
        if self._enter is None:
            return
        self._enter("backward")
        # Runs when all of this backward() is done. Private to autograd, but what FSDP and DDP are built on.
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        if self._enter is not None:
            self._enter("idle")

    def _update_begins(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._enter is not None:
            self._enter("update")

    def _update_ends(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._enter is not None:
            self._enter("idle")


def _inside_backward() -> bool:
    """Whether autograd runs on this thread: a forward pass here is a recomputation, and part of backward."""
    return torch._C._current_graph_task_id() != -1


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: a tensor, or mappings, sequences and dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
