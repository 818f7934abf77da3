"""What the kernels update: the state of a range of parameters, in one of four formats, and how it is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STATE_FORMATS = ("fp32", "split16", "bf16", "int8")
BLOCK_NUMEL = 128  # elements that share a scale in "int8"; kStateBlock of csrc/cpu_adam/state.h

_MOMENT_DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "split16": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}


def check_state_format(state_format: object) -> str:
    """``state_format``, or ValueError if it is none."""
    if state_format not in STATE_FORMATS:
        raise ValueError(f"state_format={state_format!r} is unknown; known are {', '.join(STATE_FORMATS)}")
    assert isinstance(state_format, str)
    return state_format


def num_blocks(numel: int) -> int:
    """Scales of ``numel`` elements in "int8"."""
    return -(-numel // BLOCK_NUMEL)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Where the random bits of stochastic rounding come from: element i's are a function of key and first_index + i.

    Attributes:
        key: made of the run's seed and the step, see :meth:`at_step`.
        first_index: the number of the first element, modulo 2**32. Numbering all parameters of an optimizer through
            makes the bits independent of how they are cut into subgroups.
    """

    key: int = 0
    first_index: int = 0

    @classmethod
    def at_step(cls, seed: int, step: int, first_index: int = 0) -> Rounding:
        """Of one step (from 1) of a run; ``seed`` is any int."""
        key = (seed * 0x9E3779B97F4A7C15 + step) % 2**64
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64  # splitmix64 (Steele, Lea, Flood, OOPSLA 2014)
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
        return cls(key ^ (key >> 31), first_index % 2**32)

    @property
    def words(self) -> tuple[int, int, int]:
        """Two 32-bit halves of the key, and first_index."""
        return self.key & 0xFFFFFFFF, self.key >> 32, self.first_index


@dataclass(frozen=True, slots=True)
class State:
    """State of n parameters as flat, contiguous tensors on one device. All are updated in place.

    ===========  ===========================  ============================  ==================
    format       master                       first moment, second moment   scales
    ===========  ===========================  ============================  ==================
    ``fp32``     float32                      float32, float32
    ``split16``  int16: master - parameter    float32, float32
    ``bf16``     int16: master - parameter    bfloat16, bfloat16
    ``int8``     int16: master - parameter    int8, uint8                   float32, one a block
    ===========  ===========================  ============================  ==================

    In all formats but fp32 the master is the bfloat16 parameter with a remainder (docs/numerics.md), and the sign of a
    floating-point second moment belongs to that remainder.

    Attributes:
        first: exp_avg of Adam and Lion, the momentum of SGD; None for rules without.
        second: exp_avg_sq of Adam, the sum of Adagrad; None for rules without.
        max_second: float32, with amsgrad only; formats fp32 and split16.
    """

    format: str
    master: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    max_second: Tensor | None = None
    first_scale: Tensor | None = None
    second_scale: Tensor | None = None

    @property
    def numel(self) -> int:
        return self.master.numel()

    @property
    def is_compact(self) -> bool:
        """Whether the master lies in the parameter and a remainder."""
        return self.format != "fp32"

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is present."""
        for name in self.__slots__[1:]:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields but the format, in order."""
        return (self.master, self.first, self.second, self.max_second, self.first_scale, self.second_scale)

    def narrow(self, begin: int, numel: int) -> State:
        """A range of it, sharing memory; in "int8" ``begin`` is a multiple of the block."""
        assert begin % BLOCK_NUMEL == 0 or self.format != "int8", begin
        first_block, count = begin // BLOCK_NUMEL, num_blocks(numel)

        def part(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.narrow(0, first_block, count) if name.endswith("scale") else tensor.narrow(0, begin, numel)

        master, *rest = (part(name, getattr(self, name)) for name in self.__slots__[1:])
        assert master is not None
        return State(self.format, master, *rest)


def row_dtypes(state_format: str) -> dict[str, torch.dtype]:
    """The dtype of each field of :class:`State` in a format."""
    first, second = _MOMENT_DTYPES[state_format]
    return {
        "master": torch.float32 if state_format == "fp32" else torch.int16,
        "first": first,
        "second": second,
        "max_second": torch.float32,
        "first_scale": torch.float32,
        "second_scale": torch.float32,
    }
