"""The emulated accelerator: a PyTorch device "sim" that runs on the CPU and behaves as an accelerator does.

Public as ``offload.testing.sim``. Nothing is built or registered before :func:`load`: a registered device wins over
CUDA in ``torch.accelerator``.

Times are seconds of a virtual clock that operations advance by what the profile says they cost.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils import backend_registration

from offload.accelerators.base import Accelerator
from offload.accelerators.sim_build import load_extension

__all__ = [
    "Executor",
    "TraceSpan",
    "clear_races",
    "configure",
    "counts",
    "host_access",
    "host_charge",
    "host_join",
    "host_mark",
    "host_time_s",
    "load",
    "own_host_clock",
    "races",
    "reset",
    "set_profile",
    "trace",
]

Executor = Literal["sync", "threads", "lazy", "eager", "random"]

_EXECUTORS: tuple[Executor, ...] = get_args(Executor)
_ENGINES = ("compute", "h2d", "d2h", "host")
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

_DEFAULT_CAPACITY = "1GiB"
# Round figures of the order of a PCIe 4 desktop accelerator; a test that cares sets its own.
_DEFAULT_PROFILE = {
    "h2d_bytes_per_s": 12e9,
    "d2h_bytes_per_s": 12e9,
    "pageable_bytes_per_s": 4e9,
    "memory_bytes_per_s": 2e12,
    "flops": 50e12,
    "latency_s": 5e-6,
    "launch_s": 4e-6,
}

_extension: Any = None


class TraceSpan(NamedTuple):
    """One operation in virtual time: its name, stream, engine ("compute", "h2d", "d2h" or "host"), start and end."""

    name: str
    stream: int
    engine: str
    start_s: float
    end_s: float


class _DeviceModule:
    """``torch.sim``: what torch asks a device module for; the rest is ``torch.accelerator``."""

    Stream = torch.Stream
    Event = torch.Event
    _initialized = True  # torch.utils.checkpoint then keeps the device's random state

    class device:  # noqa: N801 - torch's name
        """Context of the one device there is."""

        def __init__(self, index: object) -> None:
            pass

        def __enter__(self) -> _DeviceModule.device:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self) -> bool:
        return True

    def manual_seed(self, seed: int) -> None:
        _extension.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        _extension.manual_seed(seed)

    def get_rng_state(self, device: object = 0) -> Tensor:
        return torch.frombuffer(bytearray(_extension.get_rng_state()), dtype=torch.uint8)

    def set_rng_state(self, new_state: Tensor, device: object = 0) -> None:
        _extension.set_rng_state(bytes(new_state.tolist()))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.accelerator, name)


def load() -> None:
    """Build the device if need be (about a minute, then cached) and register it as "sim". Calling it again is free.

    Raises:
        RuntimeError: the build failed, or another device is registered already; the message says what to do.
    """
    global _extension  # one device per process, as torch has it
    if _extension is not None:
        return
    name = torch._C._get_privateuse1_backend_name()
    if name not in ("privateuseone", "sim"):
        raise RuntimeError(f"torch already has device {name!r} in the one place for such devices: use another process")
    _extension = load_extension()
    backend_registration.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _DeviceModule())  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)


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
            "random": any order that events allow, drawn from ``seed``.
        seed: of "random".
        capacity: device memory, in bytes or as "1GiB"; None leaves it as it is (1 GiB at first).
        races: look for accesses that nothing orders.
        poison: fill memory with NaN when it is freed, in stream order.

    Raises:
        ValueError: an unknown executor, or a capacity that is not a positive size.
        RuntimeError: ``capacity`` changes while device memory is in use, or :func:`load` was not called.
    """
    if executor not in _EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(_EXECUTORS)}, not {executor!r}")
    extension = _loaded()
    if capacity is not None:
        _set_capacity(extension, _parse_bytes(capacity))
    extension.configure(_EXECUTORS.index(executor), seed, races, poison)


def reset() -> None:
    """What :func:`configure` starts from, for the next test: 1 GiB, rates as at first, nothing cached."""
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    set_profile(**_DEFAULT_PROFILE)
    configure(capacity=_DEFAULT_CAPACITY)


def set_profile(
    *,
    h2d_bytes_per_s: float | None = None,
    d2h_bytes_per_s: float | None = None,
    pageable_bytes_per_s: float | None = None,
    memory_bytes_per_s: float | None = None,
    flops: float | None = None,
    latency_s: float | None = None,
    launch_s: float | None = None,
) -> None:
    """Set what operations cost in virtual time (and what links cost in "threads"); None leaves a rate as it is.

    Args:
        h2d_bytes_per_s, d2h_bytes_per_s: link rates, each direction on its own.
        pageable_bytes_per_s: link rate from or to host memory that is not pinned.
        memory_bytes_per_s, flops: of the device; an operation takes the longer of the two.
        latency_s: of a copy. launch_s: of the host, for each operation enqueued.
    """
    rates = {name: value for name, value in locals().items() if value is not None}
    for name, value in rates.items():
        if value < 0 or (value == 0 and name not in ("latency_s", "launch_s")):
            raise ValueError(f"{name} must be positive, not {value}")
    _loaded().set_profile(rates)


def races() -> list[str]:
    """What the race detector found, a sentence each: both operations, their streams and their Python call sites."""
    return list(_loaded().races())


def clear_races() -> None:
    """Forget the races found so far."""
    _loaded().clear_races()


def counts() -> tuple[int, int]:
    """How many operations were enqueued, and how many of them made the host wait, since :func:`configure`."""
    num_ops, num_host_waiting_ops = _loaded().counts()
    return num_ops, num_host_waiting_ops


def trace() -> list[TraceSpan]:
    """All operations since :func:`configure`, in the order of enqueueing (the last million)."""
    return [TraceSpan(name, stream, _ENGINES[engine], *span) for name, stream, engine, *span in _loaded().trace()]


def host_time_s() -> float:
    """Virtual time of the calling thread's host clock."""
    return float(_loaded().host_time_s())


def host_charge(seconds: float, name: str = "host work") -> None:
    """Advance the calling thread's host clock by work called ``name``."""
    if seconds < 0:
        raise ValueError(f"cannot charge {seconds} s of host time: it must not be negative")
    _loaded().host_charge(seconds, name)


def host_access(tensor: Tensor, write: bool, name: str) -> None:
    """Tell the race detector that the calling thread now reads (or writes) ``tensor`` from the host."""
    if tensor.numel() == 0:
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    _loaded().host_access(tensor.data_ptr(), span * tensor.element_size(), write, name)


def own_host_clock() -> None:
    """See :meth:`offload.accelerators.Accelerator.own_host_clock`."""
    _loaded().own_host_clock()


def host_mark() -> object:
    """See :meth:`offload.accelerators.Accelerator.host_mark`."""
    return _loaded().host_mark()


def host_join(mark: object) -> None:
    """See :meth:`offload.accelerators.Accelerator.host_join`."""
    _loaded().host_join(mark)


class SimAccelerator(Accelerator):
    """The emulated device. It is told what the host does, since it cannot see it."""

    def name(self) -> str:
        return "emulated accelerator"

    def declare_host_work(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        for tensor in reads:
            host_access(tensor, write=False, name=name)
        for tensor in writes:
            host_access(tensor, write=True, name=name)

    def charge_host_time(self, seconds: float, name: str = "host work") -> None:
        host_charge(seconds, name)

    def host_time_s(self) -> float:
        return host_time_s()

    def own_host_clock(self) -> None:
        own_host_clock()

    def host_mark(self) -> object:
        return host_mark()

    def host_join(self, mark: object) -> None:
        host_join(mark)


def _loaded() -> Any:
    if _extension is None:
        raise RuntimeError("the emulated device is not loaded: call offload.testing.sim.load() first")
    return _extension


def _set_capacity(extension: Any, capacity_bytes: int) -> None:
    if capacity_bytes == extension.capacity():
        return
    gc.collect()  # tensors in reference cycles would count as live
    if extension.live_bytes():
        raise RuntimeError(
            f"capacity cannot change while {extension.live_bytes()} bytes of device memory are in use: delete those "
            "tensors first"
        )
    extension.set_capacity(capacity_bytes)


def _parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text as "1.5GiB"; device memory comes in whole 2 MiB."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"capacity must be a positive number of bytes or a text as '1GiB', not {size!r}")
    return -(-int(float(match[1]) * _UNITS[match[2]]) // 2**21) * 2**21
