"""What autograd saves of a streamed layer: weights by name, everything else as it is.

[Note: saved weights]
A linear layer saves its weight for backward. By then the bytes it pointed to hold another layer, and autograd cannot
know: copies into the device buffer are no in-place changes of the weight. So weights are packed as "these bytes of that
layer", and unpacking brings the layer back first. Backward visits layers in the reverse order of forward, one at a
time: unpacking a weight of another layer says that all of this layer's backward was submitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


@dataclass(frozen=True, slots=True)
class SavedWeight:
    """A tensor over a streamed layer's bytes, wherever the layer is."""

    layer: int
    offset_bytes: int  # within the layer
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, layer_bytes: Tensor) -> Tensor:
        num_elements = (layer_bytes.numel() - self.offset_bytes) // self.dtype.itemsize
        end = self.offset_bytes + num_elements * self.dtype.itemsize
        elements = layer_bytes[self.offset_bytes : end].view(self.dtype)
        return elements.as_strided(self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class _Activation:
    """A saved tensor that is no weight, and its version: hooks replace autograd's own check of in-place changes.

    It is detached, since what is packed must not refer to the node that holds it, and shares the counter of versions.
    """

    tensor: Tensor
    version: int


class SavedTensorHooks:
    """Packs what one call of a streamed layer saves.

    Hooks that were in force around the call (checkpointing, ``save_on_cpu``) still get every tensor but the weights.

    Args:
        locate: the streamed layer, and the offset in it, that a byte of the device buffer belongs to now.
        bring: the bytes of a layer on the device, until another layer is asked for.
    """

    def __init__(self, arena: Tensor, locate: Callable[[int], tuple[int, int]], bring: Callable[[int], Tensor]) -> None:
        self._arena_address = arena.untyped_storage().data_ptr()
        self._device = arena.device
        self._locate = locate
        self._bring = bring

    def context(self) -> torch.autograd.graph.saved_tensors_hooks:
        outer: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def pack(tensor: Tensor) -> Any:
            if self._is_weight(tensor):
                layer, offset_bytes = self._locate(int(tensor.storage_offset()) * tensor.itemsize)
                return SavedWeight(layer, offset_bytes, tensor.shape, tensor.stride(), tensor.dtype)
            return outer[0](tensor) if outer else _Activation(tensor.detach(), tensor._version)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, SavedWeight):
                return packed.view(self._bring(packed.layer))
            return outer[1](packed) if outer else _checked(packed)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _is_weight(self, tensor: Tensor) -> bool:
        return (
            tensor.device == self._device
            and type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
            and tensor.untyped_storage().data_ptr() == self._arena_address
        )


def _checked(saved: _Activation) -> Tensor:
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            f"a tensor of shape {tuple(saved.tensor.shape)} needed for gradient computation was changed in place since "
            f"forward: it is at version {saved.tensor._version}, expected {saved.version}"
        )
    return saved.tensor


def inside_backward() -> bool:
    """Whether autograd runs on this thread: a forward here is a recomputation."""
    return torch._C._current_graph_task_id() != -1
