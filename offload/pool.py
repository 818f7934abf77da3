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
from offload.limits import MemoryLimit
from offload.ring import PIECE_BYTES, RING_LENGTH, PinnedRing
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


def _part(name: str, num_bytes: int) -> str:
    return f", {name} {format_bytes(num_bytes)}" if num_bytes else ""


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
    ring_bytes: int = 0  # pinned
    slot_bytes: int = 0  # on the device
    resident_bytes: int = 0  # on the device
    passing_bytes: int = 0  # on the device, within each step: memory that backward gives back, no part of device_bytes
    snapshot_bytes: int = 0  # pageable, while a checkpoint is written beside training
    is_pinned: bool = True  # False where the parameters are in host memory: then nothing has to be

    @property
    def host_bytes(self) -> int:
        return self.host_state_bytes + self.staging_bytes + self.ring_bytes + self.snapshot_bytes

    @property
    def pinned_bytes(self) -> int:
        return self.pinned_state_bytes + self.staging_bytes + self.ring_bytes if self.is_pinned else 0

    @property
    def device_bytes(self) -> int:
        return self.slot_bytes + self.resident_bytes

    @property
    def bytes_of_host_memory(self) -> int:
        """What comes out of host memory: for parameters on the CPU, that is where their device memory is too."""
        return self.host_bytes + (0 if self.is_pinned else self.device_bytes)

    def check_limits(self, taken: MemoryBill, limits: Sequence[MemoryLimit], num_ranks: int) -> None:
        """Raise :class:`BudgetError` if the system does not let this process take what this is beyond ``taken``.

        Args:
            taken: what of it is allocated already.
            limits: of this process, as they are now.
            num_ranks: processes of this node that will take as much. Some may have done so: what is free now need hold
                one bill, but the whole of a shared limit must hold all.
        """
        needed = self.bytes_of_host_memory - taken.bytes_of_host_memory
        for limit in limits:
            of_all = self.bytes_of_host_memory * (num_ranks if limit.shared else 1)
            if needed <= limit.free_bytes and of_all <= limit.total_bytes:
                continue
            ranks = f", {num_ranks} ranks of this node {format_bytes(of_all)}" if limit.shared and num_ranks > 1 else ""
            raise BudgetError(
                f"{limit.name} leaves {format_bytes(limit.free_bytes)} ({limit.free_bytes} bytes) of "
                f"{format_bytes(limit.total_bytes)}, but the optimizer needs {format_bytes(needed)} ({needed} bytes)"
                f"{ranks}: {self}. Nothing was allocated. At least that much must be free: {limit.remedy}; or need "
                f"less: keep state on the device (device_budget), take another state_format, or more ranks"
            )

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
                f"state {format_bytes(self.host_state_bytes)}, staging {format_bytes(self.staging_bytes)}"
                f"{_part('ring', self.ring_bytes)}{_part('snapshot', self.snapshot_bytes)}",
                "raise it, lower subgroup_numel, or keep a larger resident fraction on the device",
            ),
            (
                "pinned_budget", self.pinned_bytes, budgets.pinned_bytes,
                f"state {format_bytes(self.pinned_state_bytes)}, staging {format_bytes(self.staging_bytes)}"
                f"{_part('ring', self.ring_bytes)}",
                "raise it, lower subgroup_numel, or place fewer subgroups on the device",
            ),
        ):  # fmt: skip
            if budget is not None and needed > budget:
                raise BudgetError(f"{name} is {format_bytes(budget)} ({budget} bytes) but {format_bytes(needed)} "
                                  f"({needed} bytes) are needed: {parts}; {remedy}")  # fmt: skip

    def __str__(self) -> str:
        pinned_state_bytes, pinned = (self.pinned_state_bytes, " pinned") if self.is_pinned else (0, "")
        ring = f"ring {format_bytes(self.ring_bytes)} pinned, " if self.ring_bytes else ""
        return (
            f"host state {format_bytes(self.host_state_bytes)} ({format_bytes(pinned_state_bytes)} pinned), "
            f"staging {format_bytes(self.staging_bytes)}{pinned}, {ring}"
            f"device slots {format_bytes(self.slot_bytes)}, resident state {format_bytes(self.resident_bytes)}"
            f"{_part('slots in freed memory', self.passing_bytes)}"
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
        self.refused: RuntimeError | None = None  # why the system would not pin; it is not asked again
        self.ring: PinnedRing | None = None
        self.slots: list[Slot] = []
        self.stagings: list[Staging] = []
        self._device = device
        self._accelerator = accelerator
        self._slot_bytes = 0
        self._slot_streams: Sequence[torch.Stream] = ()
        self._tally = _PinnedTally()
        weakref.finalize(self, self._tally.release)

    def host_state(self, num_rows: int, numel: int, *, pinned: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of shape (num_rows, numel) in host memory; pinned exactly, page by page, unless that was ``refused``.

        Each row is contiguous; all of it is if it is pinned, as it crosses the link in one copy. Each page is written
        first by the thread that will update it; pinning comes before that where it touches pages.
        """
        num_bytes = num_rows * numel * dtype.itemsize
        slab = self._pinned(num_bytes) if pinned else None
        if slab is None:
            return zero_rows_(host_memory.empty_rows(num_rows, numel * dtype.itemsize).view(dtype))
        return zero_rows_(slab[:num_bytes].view(dtype).view(num_rows, numel))

    def device_state(self, num_rows: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of shape (num_rows, numel) on the device."""
        return torch.zeros(num_rows, numel, dtype=dtype, device=self._device)

    def set_slots(self, num_slots: int, state_bytes: int, streams: Sequence[torch.Stream]) -> None:
        """Make the slots: ``num_slots`` device buffers of ``state_bytes`` each, used on ``streams`` too.

        Fewer where the device has no more memory. Raises torch.OutOfMemoryError if it has not enough for one.
        """
        self.slots = []  # the old ones go first, so that the device never holds both
        self._slot_bytes, self._slot_streams = state_bytes, streams
        for i in range(num_slots):
            buffer = self.slot_memory(needed=i == 0)
            if buffer is None:
                break
            self.slots.append(Slot(i, buffer))

    def slot_memory(self, *, needed: bool = False) -> Tensor | None:
        """Memory for one slot, on the current stream; where the device has none, None or, if ``needed``, an error."""
        try:
            buffer = torch.empty(self._slot_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            if needed:
                raise
            return None
        for stream in self._slot_streams:  # the allocator may hand it on only when these streams are done with it
            buffer.record_stream(stream)
        return buffer

    def set_passing_slots(self, num_slots: int) -> None:
        """Have so many slots behind those that last: the first of those there are, and new ones without memory yet."""
        num_lasting = sum(not slot.passes for slot in self.slots)
        passing = self.slots[num_lasting:][:num_slots]
        new = range(num_lasting + len(passing), num_lasting + num_slots)
        self.slots[num_lasting:] = [*passing, *(Slot(i, passes=True) for i in new)]

    def drop_lost_slots(self) -> int:
        """Forget the slots whose memory was given back, number the others anew, and say how many last."""
        if any(slot.is_lost for slot in self.slots):
            self.slots = [slot for slot in self.slots if not slot.is_lost]
            if all(slot.passes for slot in self.slots):
                self.slots = []
            for i, slot in enumerate(self.slots):
                slot.index = i
        return sum(not slot.passes for slot in self.slots)

    def set_ring(self) -> PinnedRing:
        """The ring that states pass through whose pinning was refused. Pageable itself if it cannot be pinned."""
        if self.ring is None:
            assert self._accelerator is not None
            refused, self.refused = self.refused, None  # a few small buffers may still be granted
            self.ring = PinnedRing([self._bytes(PIECE_BYTES) for _ in range(RING_LENGTH)], self._accelerator)
            self.refused = refused
        return self.ring

    def set_stagings(self, num_stagings: int, param_bytes: int) -> None:
        """Make the staging buffers: gradients and new parameters, ``param_bytes`` each, pinned."""
        for old in (buffer for staging in self.stagings for buffer in (staging.grad, staging.param)):
            if old is not None and self._accelerator is not None and old.is_pinned():
                self._tally.add(-old.nbytes)
        self.stagings = []
        self.stagings = [Staging(i, self._bytes(param_bytes), self._bytes(param_bytes)) for i in range(num_stagings)]

    def _bytes(self, num_bytes: int) -> Tensor:
        pinned = self._pinned(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8) if pinned is None else pinned

    def _pinned(self, num_bytes: int) -> Tensor | None:
        """None where there is no need to pin, or pinning was refused."""
        if self._accelerator is None or self.refused is not None:
            return None
        try:
            pinned = self._accelerator.pinned_empty(num_bytes)
        except RuntimeError as error:
            self.refused = error
            return None
        self._tally.add(pinned.nbytes)
        return pinned
