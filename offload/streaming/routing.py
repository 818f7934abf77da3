"""How many tokens each expert is given, where no token has values: as many as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_MOST_NUMEL = 2**26  # of a tensor whose values are kept; masks of long sequences are larger, and nothing asks for them

aten = torch.ops.aten


class WorstRouting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside a FakeTensorMode, lets a mixture run as if its routers sent all tokens to the same experts, the first.

    No routing gives an expert more, so this is what a call takes at most. What routers choose (``topk``, ``argmax``)
    has values here, on the CPU beside the fake tensors, and so has all that is computed from such choices alone. So
    loops over the experts that are hit run as they are written, and each is given as many tokens as are sent to it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (aten.topk, aten.argmax):
            return self._choose(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.overloadpacket is not aten.arange and not (tensors and all(t in self._values for t in tensors)):
            if func._schema.is_mutable and tensors and tensors[0] in self._values:
                del self._values[tensors[0]]  # what is written to comes first
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            values = func(*tree_map(self._value_of, args), **tree_map(self._value_of, kwargs))
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:  # .item()
            return values
        except DynamicOutputShapeException:  # nonzero() and the like
            device = tensors[0].device
            out = tree_map(lambda value: torch.empty(value.shape, dtype=value.dtype, device=device), values)
        for fake, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
            if isinstance(fake, Tensor) and value.numel() <= _MOST_NUMEL:
                self._values[fake] = value
        return out

    def _choose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The first of the possible choices, everywhere."""
        out = func(*args, **kwargs)
        index = out if func.overloadpacket is aten.argmax else out[1]
        with unset_fake_temporarily():
            values = torch.zeros(index.shape, dtype=index.dtype)
            if func.overloadpacket is aten.topk:
                dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
                values.movedim(dim, -1).copy_(torch.arange(index.shape[dim]))
        self._values[index] = values
        return out

    def _value_of(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return self._values[leaf] if isinstance(leaf, Tensor) else leaf
