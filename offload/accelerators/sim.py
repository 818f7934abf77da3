"""The emulated accelerator: a PyTorch device "sim" that runs on the CPU and behaves as an accelerator does.

Public as ``offload.testing.sim``. Nothing is built or registered before :func:`load`: a registered device wins over
CUDA in ``torch.accelerator``.

Times are seconds of a virtual clock that operations advance by what the profile says they cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from offload.accelerators.base import Accelerator, round_up_to_page
from offload.accelerators.sim_device import load, loaded, set_capacity
from offload.accelerators.sim_rates import emulate, reset_rates, set_profile, update_seconds
from offload.limits import lockable_bytes

__all__ = [
    "Executor",
    "TraceSpan",
    "choices",
    "clear_races",
    "configure",
    "counts",
    "emulate",
    "forbid_sync",
    "host_access",
    "host_charge",
    "host_join",
    "host_mark",
    "host_time_s",
    "last_write",
    "load",
    "lock_pages",
    "own_host_clock",
    "races",
    "report",
    "reset",
    "seed_of",
    "set_profile",
    "trace",
    "warnings",
]

Executor = Literal["sync", "threads", "lazy", "eager", "random", "systematic"]

_EXECUTORS: tuple[Executor, ...] = get_args(Executor)
_ENGINES = ("compute", "h2d", "d2h", "host", "peer")

_DEFAULT_CAPACITY = "1GiB"
_CHOICE_BITS = 6  # of a seed of "systematic": the host and 33 streams at most are what a choice is among


class TraceSpan(NamedTuple):
    """One operation in virtual time: its name, stream (-1 for the host's work), engine ("compute", "h2d", "d2h", "peer"
    for a copy to another device, or "host"), start and end, the device's index, and the bytes that it moved: those of a
    copy, or what work read and wrote of the device's memory or, the host's, of host memory.
    """

    name: str
    stream: int
    engine: str
    start_s: float
    end_s: float
    device: int = 0
    num_bytes: float = 0


def configure(
    executor: Executor = "sync",
    seed: int = 0,
    capacity: int | str | None = None,
    races: bool = True,
    poison: bool = True,
) -> None:
    """Finish all work, then start anew: races, counts and trace are empty, virtual time is 0.

    Args:
        executor: the order in which enqueued work really runs. "sync": at once. "threads": a thread per stream, links
            as slow as the profile says. "lazy": as late as the host's waits allow. "eager": other streams first.
            "random": any order that events allow, drawn from ``seed``. "systematic": the one order that ``seed`` names,
            as :func:`offload.testing.explore` found it.
        seed: of "random" and "systematic".
        capacity: device memory, in bytes or as "1GiB"; None leaves it as it is (1 GiB at first).
        races: look for accesses that nothing orders.
        poison: fill memory with NaN when it is freed, in stream order.

    Raises:
        ValueError: an unknown executor, or a capacity that is not a positive size.
        RuntimeError: ``capacity`` changes while device memory is in use, or :func:`load` was not called.
    """
    if executor not in _EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(_EXECUTORS)}, not {executor!r}")
    extension = loaded()
    if capacity is not None:
        set_capacity(capacity)
    is_scripted = executor == "systematic"
    script = _choices_of(seed) if is_scripted else []
    extension.configure(_EXECUTORS.index(executor), 0 if is_scripted else seed, script, races, poison)


def choices() -> list[tuple[int, int | None]]:
    """What "systematic" chose so far, and for each choice the next that makes a difference; see ``explore``."""
    return [tuple(choice) for choice in loaded().choices()]


def seed_of(chosen: Sequence[int]) -> int:
    """The seed of "systematic" that makes these choices."""
    return sum(choice << _CHOICE_BITS * i for i, choice in enumerate(chosen))


def _choices_of(seed: int) -> list[int]:
    if seed < 0:
        raise ValueError(f"seed of 'systematic' must not be negative, got {seed}: use one that explore() printed")
    digits = range(-(-seed.bit_length() // _CHOICE_BITS))
    return [seed >> _CHOICE_BITS * i & (1 << _CHOICE_BITS) - 1 for i in digits]


def reset() -> None:
    """What :func:`configure` starts from, for the next test: 1 GiB, rates as at first, nothing cached."""
    torch.accelerator.set_device_index(0)
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    reset_rates()
    lock_pages(False)
    loaded().clear_faults()
    configure(capacity=_DEFAULT_CAPACITY)


def races() -> list[str]:
    """What is wrong with the program, a sentence each: accesses that nothing orders, with both operations, their
    streams, the Python lines they came from and the bytes they share; memory freed while another stream may use it;
    reads of device memory that nothing has written.
    """
    return list(loaded().races())


def clear_races() -> None:
    """Forget the races found so far."""
    loaded().clear_races()


def warnings() -> list[str]:
    """What is right, but hardly meant, since :func:`configure`: copies asked not to block that do, because their host
    memory is not pinned; more streams than the device has, so that two are one.
    """
    return list(loaded().warnings())


@contextmanager
def forbid_sync() -> Iterator[None]:
    """Inside it, whatever makes the host wait for the device raises RuntimeError where it stands: synchronizing,
    blocking copies, ``.item()``, operators whose shapes depend on data. Threads with a host clock of their own
    (:func:`own_host_clock`) may wait all the same: that is their work.
    """
    extension = loaded()
    extension.forbid_sync(True)
    try:
        yield
    finally:
        extension.forbid_sync(False)


def last_write(tensor: Tensor) -> int:
    """A number that grows with every write to the bytes of ``tensor``, whichever tensor it went through; 0 for none."""
    return int(loaded().last_write(tensor))


def report(text: str) -> None:
    """Add to :func:`races`, with the Python line that this is called from, for a check of one's own."""
    loaded().report(text)


def counts() -> tuple[int, int]:
    """How many operations were enqueued, and how many of them made the host wait, since :func:`configure`."""
    num_ops, num_host_waiting_ops = loaded().counts()
    return num_ops, num_host_waiting_ops


def trace() -> list[TraceSpan]:
    """All operations since :func:`configure`, in the order of enqueueing (the last few hundred thousand)."""
    return [TraceSpan(name, stream, _ENGINES[engine], *span) for name, stream, engine, *span in loaded().trace()]


def lock_pages(locks: bool) -> None:
    """Whether pinned memory is really locked from now on, as a driver's is: the system then counts it (VmLck in
    /proc/self/status) and its limit holds (ulimit -l). Not at first, and not after :func:`reset`.
    """
    loaded().lock_pages(locks)


def host_time_s(mark: object = None) -> float:
    """Virtual time of the calling thread's host clock, or of ``mark``, which :func:`host_mark` gave.

    What other threads enqueue later may still have run earlier, beside it, and so change it: while they work, take a
    mark, and ask for its time when they have done. That one is the same on every run.
    """
    return float(loaded().host_time_s() if mark is None else loaded().time_s(mark))


def host_charge(seconds: float, name: str = "host work", num_bytes: float = 0) -> None:
    """Advance the calling thread's host clock by work called ``name``.

    The work takes ``seconds`` while nothing else runs, and reads and writes ``num_bytes`` of host memory meanwhile: it
    takes longer where copies and other threads want more of that than there is.
    """
    if seconds < 0:
        raise ValueError(f"cannot charge {seconds} s of host time: it must not be negative")
    loaded().host_charge(seconds, num_bytes, name)


def host_access(tensor: Tensor, write: bool, name: str) -> None:
    """Tell the race detector that the calling thread now reads (or writes) ``tensor`` from the host."""
    if tensor.numel():
        loaded().host_access(tensor, write, name)


def own_host_clock() -> None:
    """See :meth:`offload.accelerators.Accelerator.own_host_clock`."""
    loaded().own_host_clock()


def host_mark() -> object:
    """See :meth:`offload.accelerators.Accelerator.host_mark`."""
    return loaded().host_mark()


def host_join(mark: object) -> None:
    """See :meth:`offload.accelerators.Accelerator.host_join`."""
    loaded().host_join(mark)


class SimAccelerator(Accelerator):
    """The emulated device. It is told what the host does, since it cannot see it."""

    def name(self) -> str:
        return "emulated accelerator"

    def pinned_size(self, num_bytes: int) -> int:
        return round_up_to_page(num_bytes) if num_bytes else 0

    def pinnable_bytes(self) -> int | None:
        return lockable_bytes() if loaded().locks_pages() else None

    def declare_host_work(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        for tensor in reads:
            host_access(tensor, write=False, name=name)
        for tensor in writes:
            host_access(tensor, write=True, name=name)

    def begin_host_task(self) -> None:
        loaded().begin_host_task()

    def charge_host_time(self, seconds: float, name: str = "host work", *, numel: int = 0, num_bytes: int = 0) -> None:
        host_charge(update_seconds(numel, measured_s=seconds), name, num_bytes)

    def host_stamp(self) -> object:
        return loaded().host_stamp()

    def stamp_s(self, stamp: object) -> float:
        return host_time_s(stamp)

    def own_host_clock(self) -> None:
        own_host_clock()

    def host_mark(self) -> object:
        return host_mark()

    def host_join(self, mark: object) -> None:
        host_join(mark)
