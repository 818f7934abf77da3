"""Memory that the microbenchmarks copy, filled with a pattern so that what arrives can be checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offload.accelerators import Accelerator
from offload.interconnect.harness import Activity

Place = Literal["pinned", "pageable", "device"]
_PERIOD = 251  # prime, so that bytes that land at a wrong offset show


def host_buffer(accelerator: Accelerator, num_bytes: int, *, pinned: bool) -> Tensor:
    """A 1-D uint8 CPU tensor of ``num_bytes``, touched."""
    buffer = accelerator.pinned_empty(num_bytes)[:num_bytes] if pinned else torch.empty(num_bytes, dtype=torch.uint8)
    return buffer.zero_()


def pattern(num_bytes: int) -> Tensor:
    """Bytes on the host that no shift of them equals."""
    return torch.arange(_PERIOD, dtype=torch.uint8).repeat(-(-num_bytes // _PERIOD))[:num_bytes]


@dataclass(frozen=True, slots=True)
class Pair:
    """A source that holds the pattern and a target, one on the host and one on the device."""

    source: Tensor
    target: Tensor

    @classmethod
    def up(cls, accelerator: Accelerator, num_bytes: int, *, pinned: bool = True) -> Pair:
        """Host to device."""
        source = host_buffer(accelerator, num_bytes, pinned=pinned)
        source.copy_(pattern(num_bytes))
        return cls(source, torch.zeros(num_bytes, dtype=torch.uint8, device=accelerator.device))

    @classmethod
    def down(cls, accelerator: Accelerator, num_bytes: int, *, pinned: bool = True) -> Pair:
        """Device to host."""
        return cls(pattern(num_bytes).to(accelerator.device), host_buffer(accelerator, num_bytes, pinned=pinned))

    def part(self, num_bytes: int, offset: int = 0) -> Pair:
        return Pair(self.source[offset : offset + num_bytes], self.target[offset : offset + num_bytes])

    def copy(self, name: str) -> Activity:
        """Copying all of it, as work that does not make the host wait where the memory is pinned."""
        return Activity(name, lambda: self.target.copy_(self.source, non_blocking=True), self.source.numel(), "bytes/s")

    def clear(self) -> None:
        self.target.zero_()

    def arrived(self) -> bool:
        """Whether the target holds what the source does. Waits for the device."""
        torch.accelerator.synchronize()
        return torch.equal(self.target.cpu(), self.source.cpu())
