"""The accelerator that every ``torch.accelerator`` backend can be."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_BYTES = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Device memory at one moment, in bytes.

    ``allocated_bytes`` is held by tensors, ``reserved_bytes`` by torch's allocator (tensors and cache),
    ``peak_allocated_bytes`` is the most held since :meth:`Accelerator.reset_peak_memory`. ``free_bytes`` of
    ``total_bytes`` are free as the device itself counts, other processes included.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    free_bytes: int
    total_bytes: int


def round_up_to_page(num_bytes: int) -> int:
    """``num_bytes`` rounded up to whole pages. Raises ValueError unless it is positive."""
    if num_bytes <= 0:
        raise ValueError(f"cannot pin {num_bytes} bytes: the size must be at least 1")
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


class Accelerator:
    """One device of a ``torch.accelerator`` backend.

    The ``*_host_*`` methods tell an emulated device what the host does beside it, for its race detector and its clock.
    They do nothing on a real one, which sees for itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned_empty(self, num_bytes: int) -> Tensor:
        """Page-locked host memory, uninitialised: a 1-D uint8 CPU tensor of ``num_bytes`` rounded up to a page.

        The memory is page-aligned. It takes :meth:`pinned_size` bytes.

        Raises:
            RuntimeError: the system refuses.
        """
        return torch.empty(round_up_to_page(num_bytes), dtype=torch.uint8, pin_memory=True)

    def pinned_size(self, num_bytes: int) -> int:
        """What :meth:`pinned_empty` takes for ``num_bytes``: torch's allocator goes up to the next power of two."""
        return 1 << (round_up_to_page(num_bytes) - 1).bit_length() if num_bytes else 0

    def pinnable_bytes(self) -> int | None:
        """What may still be pinned, where a limit is known beforehand; None: none is. Pinning may be refused then too.

        The locked-memory limit (ulimit -l) does not bind CUDA's driver, for one.
        """
        return None

    def name(self) -> str:
        """What the device is called, for a reader."""
        return str(self.device)

    def numa_node(self) -> int | None:
        """The NUMA node of the host that the device is attached to; None where that is unknown."""
        return None

    def memory(self) -> DeviceMemory:
        """Memory use of the device now. Does not wait for it."""
        free_bytes, total_bytes = torch.accelerator.get_memory_info(self.device)
        return DeviceMemory(
            allocated_bytes=torch.accelerator.memory_allocated(self.device),
            reserved_bytes=torch.accelerator.memory_reserved(self.device),
            peak_allocated_bytes=torch.accelerator.max_memory_allocated(self.device),
            free_bytes=free_bytes,
            total_bytes=total_bytes,
        )

    def reset_peak_memory(self) -> None:
        """Count ``peak_allocated_bytes`` anew from what is allocated now."""
        torch.accelerator.reset_peak_memory_stats(self.device)

    @contextmanager
    def annotate(self, name: str) -> Iterator[None]:
        """Let profilers call what happens inside ``name``: torch's own, and the device's where it has one.

        Costs nothing worth saving while none is running. torch.profiler sees other threads than the one that started
        it (CPU updates run on a worker) only with ``_ExperimentalConfig(profile_all_threads=True)``.
        """
        if torch.autograd.profiler._is_profiler_enabled:  # of any thread; cheaper than a range that nobody sees
            with torch.profiler.record_function(name):
                yield
        else:
            yield

    def declare_host_work(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Tell that the calling thread now reads and writes these CPU tensors.

        To be called by the thread that does the work, after it has waited for the events the work depends on.
        """

    def begin_host_task(self) -> None:
        """Tell that the calling thread, a worker, begins an update; an emulated device may let it fail here."""

    def charge_host_time(self, seconds: float, name: str = "host work", *, numel: int = 0, num_bytes: int = 0) -> None:
        """Advance the virtual clock of the calling thread: work called ``name`` took ``seconds``.

        It updated ``numel`` parameters and read and wrote ``num_bytes`` of host memory, from which an emulated machine
        may find the time that it would take there.
        """

    def host_stamp(self) -> object:
        """Now, on the clock that work of the host is timed with."""
        return time.perf_counter()

    def stamp_s(self, stamp: object) -> float:
        """When ``stamp`` was taken, in seconds from an arbitrary start.

        To be asked when no thread works any more: in virtual time, what is enqueued later may still slow what ran.
        """
        assert isinstance(stamp, float)
        return stamp

    def host_time_s(self) -> float:
        """Now, in seconds; see :meth:`stamp_s`."""
        return self.stamp_s(self.host_stamp())

    def own_host_clock(self) -> None:
        """Give the calling thread, a worker, a clock apart from the process's: what it does overlaps with the rest.

        From then on the order between it and other threads is what :meth:`host_mark` and :meth:`host_join` say.
        """

    def host_mark(self) -> object:
        """A point in the calling thread's work, for another thread to :meth:`host_join` after it was handed over."""
        return None

    def host_join(self, mark: object) -> None:
        """Tell that what the calling thread does next comes after ``mark`` (a queue, a future or a lock saw to it)."""
