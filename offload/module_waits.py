"""Waits at the door of a module, for reads that no torch function announces (see :mod:`offload.pending`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.utils.hooks import RemovableHandle

from offload.pending import settle


class ModuleWaits:
    """What :func:`wait_in_modules` installed."""

    def __init__(self, handles: list[RemovableHandle], compiled: list[tuple[nn.Module, Callable[..., Any]]]) -> None:
        self._handles = handles
        self._compiled = compiled

    def remove(self) -> None:
        """Make the modules what they were."""
        for handle in self._handles:
            handle.remove()
        for module, call in self._compiled:
            module._compiled_call_impl = call
        self._handles, self._compiled = [], []


def wait_in_modules(model: nn.Module) -> ModuleWaits:
    """Let every module of ``model`` wait for its own parameters before its forward, whatever that does with them.

    For modules that ``torch.compile`` made (as one, or in place by ``module.compile()``), which would run their graphs
    in pieces otherwise, and for modules that hand parameters to C++ extensions. A compiled module waits for all the
    parameters in it. To be called once, after compiling.
    """
    handles, compiled = [], []
    for module in _callable_modules(model):
        if isinstance(module, OptimizedModule):
            handles.append(module.register_forward_pre_hook(_settle_all))
        elif (call := module._compiled_call_impl) is not None:
            compiled.append((module, call))
            module._compiled_call_impl = _WaitsFirst(module, call)
        elif any(param is not None for param in module._parameters.values()):
            handles.append(module.register_forward_pre_hook(_settle_own))
    return ModuleWaits(handles, compiled)


def _callable_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that Python calls: not those within a compiled one, whose hooks would become part of its graph."""
    yield module
    if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
        return
    for child in module.children():
        yield from _callable_modules(child)


def _settle_own(module: nn.Module, *_: Any) -> None:
    for param in module._parameters.values():
        if param is not None:
            settle(param, "wait_in_modules")


def _settle_all(module: nn.Module, *_: Any) -> None:
    for param in module.parameters():
        settle(param, "wait_in_modules")


class _WaitsFirst:
    """A compiled call that comes after the update of the module's parameters."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module = module
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _settle_all(self._module)
        return self._call(*args, **kwargs)
