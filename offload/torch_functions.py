"""What ``__torch_function__`` is given."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(arguments: Any, classes: Container[type]) -> Iterator[Tensor]:
    """Tensors in (nested) arguments whose class is one of ``classes``; subclasses are others."""
    if type(arguments) in classes:
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for item in arguments:
            yield from tensors_in(item, classes)
    elif isinstance(arguments, Mapping):
        for item in arguments.values():
            yield from tensors_in(item, classes)
