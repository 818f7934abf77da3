"""The weights of a block as one run of bytes: in host memory where they live, on the device where they visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.streaming.arena import round_up
from offload.streaming.blocks import NamedTensor

WEIGHT_ALIGN_BYTES = 256  # as torch's own allocators align at least: kernels choose faster paths for it


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight lies in its block's bytes, and how it is read."""

    offset_bytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, flat: Tensor) -> Tensor:
        """The weight in ``flat``, the block's bytes as a uint8 tensor that starts at an aligned address."""
        num_bytes = self.shape.numel() * self.dtype.itemsize
        elements = flat[self.offset_bytes : self.offset_bytes + num_bytes].view(self.dtype)
        return elements.as_strided(self.shape, self.stride)


class Packing:
    """The layout of one block: weights in the order of the module, each aligned.

    Attributes:
        num_bytes: of the whole, rounded up as the device buffer hands out places.
    """

    def __init__(self, weights: Sequence[NamedTensor]) -> None:
        self.places: list[Place] = []
        end = 0
        for weight in weights:
            tensor = weight.tensor
            begin = -(-end // WEIGHT_ALIGN_BYTES) * WEIGHT_ALIGN_BYTES
            self.places.append(Place(begin, tensor.shape, _dense_stride(tensor), tensor.dtype))
            end = begin + tensor.numel() * tensor.itemsize
        self.num_bytes = round_up(end)

    def views(self, flat: Tensor) -> list[Tensor]:
        """One tensor a weight, over the bytes of ``flat``."""
        return [place.view(flat) for place in self.places]


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides if its elements fill one run of memory, else those of a contiguous copy.

    Kept because kernels may round differently for another layout.
    """
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if reach == tensor.numel():
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()


class PackedLayer:
    """One block's weights where they are at rest, in host memory or a mapped file: between passes, the model's tensors
    point here.

    Args:
        at_rest: a tensor for each weight.
        slab: the memory that all of ``at_rest`` lie in as packed; None where each lies somewhere in a file.
    """

    def __init__(
        self,
        weights: Sequence[NamedTensor],
        packing: Packing,
        at_rest: Sequence[Tensor],
        slab: Tensor | None,
        is_pinned: bool,
    ) -> None:
        self.packing = packing
        self.num_bytes = packing.num_bytes
        self.tensors = [weight.tensor for weight in weights]
        self.at_rest = list(at_rest)
        self._slab = slab
        self._is_pinned = is_pinned
        self._versions: list[int] = []  # when the tensors last went to the device
        self._visiting: tuple[int, list[Tensor]] | None = None

    @property
    def num_views(self) -> int:
        """Tensors over the device buffer that are kept from visit to visit."""
        return 0 if self._visiting is None else len(self._visiting[1])

    @classmethod
    def in_memory(cls, weights: Sequence[NamedTensor], packing: Packing, slab: Tensor, is_pinned: bool) -> PackedLayer:
        """Move weights into ``slab``, uint8, of at least the packing's bytes.

        One by one, so that no second copy of the block is ever held.
        """
        slab = slab[: packing.num_bytes]
        layer = cls(weights, packing, packing.views(slab), slab, is_pinned)
        for tensor, view in zip(layer.tensors, layer.at_rest, strict=True):
            view.copy_(tensor.data)
            tensor.data = view
        return layer

    @classmethod
    def mapped(cls, weights: Sequence[NamedTensor], packing: Packing) -> PackedLayer:
        """Leave weights in the mapped file that they are in."""
        return cls(weights, packing, [weight.tensor.data for weight in weights], None, False)

    def version(self) -> int:
        """Autograd's count of in-place changes, over all weights."""
        return sum(tensor._version for tensor in self.tensors)

    def pinned(self) -> list[tuple[int, Tensor]] | None:
        return [(0, self._slab)] if self._is_pinned and self._slab is not None else None

    def read_into(self, stage: Tensor) -> None:
        if self._slab is not None:
            stage.copy_(self._slab)
            return
        with torch.no_grad():
            for view, tensor in zip(self.packing.views(stage), self.at_rest, strict=True):
                view.copy_(tensor)

    def show_device(self, arena: Tensor, offset: int) -> None:
        """Let the model's tensors point to the block's copy at ``offset`` of the arena."""
        for tensor, view in zip(self.tensors, self._views_at(arena, offset), strict=True):
            tensor.data = view
        self._versions = [tensor._version for tensor in self.tensors]

    def _views_at(self, arena: Tensor, offset: int) -> list[Tensor]:
        if self._visiting is None or self._visiting[0] != offset:
            views = self.packing.views(arena[offset : offset + self.num_bytes])
            self._visiting = offset, [view.data for view in views]  # which hold on to none of the views between
        return self._visiting[1]

    def show_host(self) -> int | None:
        """Let the model's tensors point to host memory again; the index of one that was changed on the device."""
        changed = None
        for i, (tensor, view) in enumerate(zip(self.tensors, self.at_rest, strict=True)):
            if tensor._version != self._versions[i]:
                changed = i
            tensor.data = view
        return changed

    def forget_device(self) -> None:
        """Hold on to the device buffer no longer."""
        self._visiting = None
