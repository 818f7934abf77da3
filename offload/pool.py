"""Buffers and what they cost: state slabs, slots and staging buffers, exact in size and counted before allocation."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload import host_memory
from offload.accelerators import Accelerator
from offload.accounting import note_pinned
from offload.kernels.first_touch import zero_rows_
from offload.subgroup import Slot, Staging

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class BudgetError(ValueError):
    """A memory budget that does not hold what is asked for: what is needed, what is there, what to do."""


def parse_bytes(value: int | str | None, name: str) -> int | None:
    """Bytes of a budget: an int, a text such as "4GiB" (2**30) or "10GB" (1e9), or None for no limit.

    Raises:
        ValueError: for anything else, naming the argument ``name``.
    """
    if value is None:
        return None
    if isinstance(value, str):
        number = value.strip().rstrip("BKMGIbkmgi ")
        unit = value.strip()[len(number) :].strip().upper() or "B"
        try:
            num_bytes = int(float(number) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise ValueError(f'{name}={value!r} is no size; write bytes as an int, or a text such as "4GiB"') from None
    elif isinstance(value, int) and not isinstance(value, bool):
        num_bytes = value
    else:
        raise TypeError(f'{name} must be an int, a text such as "4GiB", or None, not {type(value).__name__}')
    if num_bytes < 0:
        raise ValueError(f"{name}={value!r} is negative; give 0 or more bytes, or None for no limit")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Bytes for a reader, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


@dataclass(frozen=True, slots=True)
class Budgets:
    """Upper bounds in bytes on what the runtime takes beyond the user's parameters and gradients; None: no limit."""

    device_bytes: int | None = None
    host_bytes: int | None = None
    pinned_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryBill:
    """Everything that the runtime allocates, in bytes."""

    host_state_bytes: int = 0
    pinned_state_bytes: int = 0  # the part of host_state_bytes that is pinned
    staging_bytes: int = 0  # pinned
    slot_bytes: int = 0  # on the device
    resident_bytes: int = 0  # on the device
    snapshot_bytes: int = 0  # pageable, while a checkpoint is written beside training

    @property
    def host_bytes(self) -> int:
        return self.host_state_bytes + self.staging_bytes + self.snapshot_bytes

    @property
    def pinned_bytes(self) -> int:
        return self.pinned_state_bytes + self.staging_bytes

    @property
    def device_bytes(self) -> int:
        return self.slot_bytes + self.resident_bytes

    def check(self, budgets: Budgets) -> None:
        """Raise :class:`BudgetError` if a budget does not hold the bill."""
        for name, needed, budget, parts, remedy in (
            (
                "device_budget", self.device_bytes, budgets.device_bytes,
                f"slots {format_bytes(self.slot_bytes)}, resident state {format_bytes(self.resident_bytes)}",
                "raise it, lower num_slots, subgroup_numel or the resident fraction, or use plan='host'",
            ),
            (
                "host_budget", self.host_bytes, budgets.host_bytes,
                f"state {format_bytes(self.host_state_bytes)}, staging {format_bytes(self.staging_bytes)}, "
                f"snapshot {format_bytes(self.snapshot_bytes)}",
                "raise it, lower subgroup_numel, or keep a larger resident fraction on the device",
            ),
            (
                "pinned_budget", self.pinned_bytes, budgets.pinned_bytes,
                f"state {format_bytes(self.pinned_state_bytes)}, staging {format_bytes(self.staging_bytes)}",
                "raise it, lower subgroup_numel, or place fewer subgroups on the device",
            ),
        ):  # fmt: skip
            if budget is not None and needed > budget:
                raise BudgetError(f"{name} is {format_bytes(budget)} ({budget} bytes) but {format_bytes(needed)} "
                                  f"({needed} bytes) are needed: {parts}; {remedy}")  # fmt: skip

    def __str__(self) -> str:
        return (
            f"host state {format_bytes(self.host_state_bytes)} ({format_bytes(self.pinned_state_bytes)} pinned), "
            f"staging {format_bytes(self.staging_bytes)} pinned, "
            f"device slots {format_bytes(self.slot_bytes)}, resident state {format_bytes(self.resident_bytes)}"
        )


class _PinnedTally:
    """What one pool has pinned, reported to :mod:`offload.accounting` as it changes."""

    def __init__(self) -> None:
        self._num_bytes = 0

    def add(self, delta_bytes: int) -> None:
        note_pinned(delta_bytes)
        self._num_bytes += delta_bytes

    def release(self) -> None:
        self.add(-self._num_bytes)


class Pool:
    """Allocates on one device and its host, once; nothing is allocated while steps run.

    Args:
        device: of the parameters.
        accelerator: None when the device is the CPU: then nothing is pinned.
    """

    def __init__(self, device: torch.device, accelerator: Accelerator | None) -> None:
        self.slots: list[Slot] = []
        self.stagings: list[Staging] = []
        self._device = device
        self._accelerator = accelerator
        self._tally = _PinnedTally()
        weakref.finalize(self, self._tally.release)

    def host_state(self, num_rows: int, numel: int, *, pinned: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of shape (num_rows, numel) in host memory; pinned exactly, page by page.

        Each row is contiguous; all of it is if it is pinned, as it crosses the link in one copy. Each page is written
        first by the thread that will update it; pinning comes before that where it touches pages.
        """
        if not pinned or self._accelerator is None:
            return zero_rows_(host_memory.empty_rows(num_rows, numel * dtype.itemsize).view(dtype))
        num_bytes = num_rows * numel * dtype.itemsize
        return zero_rows_(self._pinned(num_bytes)[:num_bytes].view(dtype).view(num_rows, numel))

    def device_state(self, num_rows: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of shape (num_rows, numel) on the device."""
        return torch.zeros(num_rows, numel, dtype=dtype, device=self._device)

    def set_slots(self, num_slots: int, state_bytes: int, streams: Sequence[torch.Stream]) -> None:
        """Make the slots: ``num_slots`` device buffers of ``state_bytes`` each, used on ``streams`` too."""
        self.slots = []  # the old ones go first, so that the device never holds both
        self.slots = [
            Slot(i, torch.empty(state_bytes, dtype=torch.uint8, device=self._device)) for i in range(num_slots)
        ]
        for slot in self.slots:
            for stream in streams:  # the allocator may hand the memory on only when these streams are done with it
                assert slot.buffer is not None
                slot.buffer.record_stream(stream)

    def set_stagings(self, num_stagings: int, param_bytes: int) -> None:
        """Make the staging buffers: gradients and new parameters, ``param_bytes`` each, pinned."""
        for old in (buffer for staging in self.stagings for buffer in (staging.grad, staging.param)):
            if old is not None and self._accelerator is not None:
                self._tally.add(-old.nbytes)
        self.stagings = []
        self.stagings = [Staging(i, self._bytes(param_bytes), self._bytes(param_bytes)) for i in range(num_stagings)]

    def _bytes(self, num_bytes: int) -> Tensor:
        if self._accelerator is None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        return self._pinned(num_bytes)

    def _pinned(self, num_bytes: int) -> Tensor:
        assert self._accelerator is not None
        pinned = self._accelerator.pinned_empty(num_bytes)
        self._tally.add(pinned.nbytes)
        return pinned
