"""How the state of one subgroup lies in a slab of memory, for each state format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.kernels.state import BLOCK_NUMEL, State, num_blocks, row_dtypes

_ALIGNMENT_BYTES = 64  # each field starts on a cache line


@dataclass(frozen=True, slots=True)
class StateKind:
    """What is kept for each parameter.

    Attributes:
        format: one of :data:`offload.kernels.STATE_FORMATS`.
        moments: fields of :class:`offload.kernels.State` that the update rule keeps besides the master.
    """

    format: str = "fp32"
    moments: tuple[str, ...] = ("first", "second")

    @property
    def master_in_param(self) -> bool:
        """Whether half of the master is the parameter itself, which then comes down for an update on the host."""
        return self.format != "fp32"

    @property
    def rounds(self) -> bool:
        """Whether moments are rounded stochastically."""
        return self.format in ("bf16", "int8")

    @property
    def alignment(self) -> int:
        """Elements that a parameter's state begins at a multiple of, so that no block of codes has two parameters."""
        return BLOCK_NUMEL if self.format == "int8" else 1


ADAM_FP32 = StateKind()


@dataclass(frozen=True, slots=True)
class StateLayout:
    """A slab for the state of ``numel`` parameters.

    In fp32 a slab is a float32 tensor of shape (1 + number of moments, numel), master first. In the other formats it is
    bytes, of shape (1, num_bytes): one field of :class:`offload.kernels.State` after the other.
    """

    kind: StateKind
    numel: int

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.kind.master_in_param else torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        if not self.kind.master_in_param:
            return 1 + len(self.kind.moments), self.numel
        *_, (_, _, begin, num_bytes) = self._fields()
        return 1, _aligned(begin + num_bytes)

    def state(self, slab: Tensor) -> State:
        """The fields of a slab, as views."""
        if not self.kind.master_in_param:
            return State("fp32", **dict(zip(("master", *self.kind.moments), slab.unbind(), strict=True)))
        flat = slab.view(-1)
        fields = {name: flat[begin : begin + size].view(dtype) for name, dtype, begin, size in self._fields()}
        return State(self.kind.format, **fields)

    def _fields(self) -> Iterator[tuple[str, torch.dtype, int, int]]:
        """Name, dtype, first byte and bytes of each field."""
        dtypes, begin = row_dtypes(self.kind.format), 0
        names = ["master", *self.kind.moments]
        names += [f"{name}_scale" for name in self.kind.moments if self.kind.format == "int8"]
        for name in names:
            numel = num_blocks(self.numel) if name.endswith("_scale") else self.numel
            num_bytes = numel * dtypes[name].itemsize
            yield name, dtypes[name], begin, num_bytes
            begin = _aligned(begin + num_bytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
