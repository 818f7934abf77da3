"""Running something around a module's forward, however it is called.

Not module hooks: those are skipped by code that calls ``module.forward`` directly, as adapters do, and hooks that run
after a failure miss a KeyboardInterrupt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn
from torch.compiler import disable

F = TypeVar("F", bound=Callable[..., Any])
Around = Callable[[], "Untraced"]


class ReplacedForward:
    """Another ``module.forward``, until :meth:`remove`. ``original`` is the one before."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        self.original = module.forward
        self.had_own = "forward" in module.__dict__
        # libraries read the signature, to know which arguments a model takes
        self._forward = module.forward = functools.update_wrapper(forward, self.original)

    def remove(self) -> None:
        """Forward is as before. If another wrapper was put around this one since, this one stays in its place."""
        if self._module.__dict__.get("forward") is not self._forward:
            return
        if self.had_own:
            self._module.forward = self.original
        else:
            del self._module.__dict__["forward"]


class WrappedForward:
    """``module.forward`` inside a context, until :meth:`remove`; wherever it stays after that, it does nothing."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        self._around: Around | None = around
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._around is None:
                return original(*args, **kwargs)
            with self._around() as call:
                return call.returned(original(*args, **kwargs))

        self._replaced = ReplacedForward(module, forward)

    def remove(self) -> None:
        self._around = None
        self._replaced.remove()


def untraced(function: F) -> F:
    """``torch.compiler.disable``, which has no types."""
    result: F = disable(function)  # type: ignore[no-untyped-call]
    return result


class Untraced(AbstractContextManager["Untraced"]):
    """What runs around a call: ``enter()``, ``returned(output)`` and ``leave(error)``; ``torch.compile`` skips them."""

    def __init__(
        self,
        enter: Callable[[], None],
        leave: Callable[[BaseException | None], None],
        returned: Callable[[Any], Any] | None = None,
    ) -> None:
        self._enter = enter
        self._leave = leave
        self._returned = returned

    @untraced
    def __enter__(self) -> Untraced:
        self._enter()
        return self

    @untraced
    def returned(self, output: Any) -> Any:
        return output if self._returned is None else self._returned(output)

    @untraced
    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._leave(error)
