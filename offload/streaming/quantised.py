"""Weights that are made of several tensors: quantised ones, as libraries keep them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from offload.shards import is_sharded


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold the bytes of a parameter or buffer, with names: itself, if it is one.

    Of tensor subclasses that can be taken apart (torchao's), those inside, however deep. They are the subclass's own
    objects: pointed to other memory, they take the parameter there, although it goes on saying the device that it was
    made on. Of bitsandbytes' 4-bit weights, the packed bytes and what its ``quant_state`` holds.
    """
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(f"{name}.{attribute}", getattr(tensor, attribute))
        return
    yield name, tensor
    state, path = getattr(tensor, "quant_state", None), f"{name}.quant_state"
    while state is not None:  # the scales may be quantised in their turn
        for attribute in ("absmax", "code", "offset"):
            part = getattr(state, attribute, None)
            if isinstance(part, Tensor):
                yield f"{path}.{attribute}", part
        state, path = getattr(state, "state2", None), f"{path}.state2"


def is_composite(tensor: Tensor) -> bool:
    """Whether it takes more than the tensor itself to hold its bytes."""
    return any(part is not tensor for _, part in plain_parts("", tensor))
