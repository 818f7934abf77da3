"""Follow memory through the phases of training: forward, backward, update and what lies between.

The peak of each phase says how much of a budget is left for optimizer state while that phase runs (its *headroom*).
Phases follow one another without a gap; when one ends, one :class:`MemorySample` is taken.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from offload._table import format_table
from offload.accelerators import Accelerator, accelerator_for
from offload.accounting import pinned_bytes
from offload.meters import HostMeter, NvmlMeter
from offload.phase_hooks import PhaseHooks


class Phase(Enum):
    """What a training loop is doing."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory at the end of one phase.

    ``None`` where there is no such figure: the device's on a machine without one, and those of NVML and of the host
    when they were read too recently (``min_interval_s`` of :class:`MemoryMonitor`) or their library is missing.
    """

    t_s: float  # end of the phase, on the monitor's clock
    duration_s: float  # host time in the phase; device work may still be running when it ends
    step: int  # optimizer steps finished before
    phase: Phase
    allocated_bytes: int | None  # by torch's allocator, at the end
    peak_allocated_bytes: int | None  # by torch's allocator, highest within the phase
    reserved_bytes: int | None  # held by torch's allocator, at the end
    device_used_bytes: int | None  # of the whole device, all processes, by NVML
    rss_bytes: int | None  # resident memory of this process
    pinned_bytes: int  # page-locked by this package
    is_end: bool = True  # of its phase; False: taken within, by :meth:`MemoryMonitor.split`


@dataclass(frozen=True, slots=True)
class PhaseProfile:
    """The highest of each figure of :class:`MemorySample` in one phase over some steps, and its mean duration.

    ``num_samples`` counts phases that ended.
    """

    num_samples: int
    mean_duration_s: float
    allocated_bytes: int | None
    peak_allocated_bytes: int | None
    reserved_bytes: int | None
    device_used_bytes: int | None
    rss_bytes: int | None
    pinned_bytes: int


class MemoryMonitor:
    """Samples memory each time the phase of training changes. Cheap enough to leave on: it never waits for the device.

    Say what the phases are, ::

        with monitor.phase("update"):
            optimizer.step()

    or let hooks of a model and an optimizer say it (:meth:`attach`).

    The allocator's peak is reset at every change of phase, so ``torch.accelerator.max_memory_allocated()`` starts
    anew there for everybody in the process.

    Args:
        device: what to follow; None takes the current accelerator if there is one. On ``"cpu"``, or without an
            accelerator, the device figures are None.
        max_samples: how many samples to keep; the oldest are dropped.
        min_interval_s: NVML and the operating system are asked at most once per phase in this time.
        clock: seconds as a float; give the executor's clock to draw samples beside its spans.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        max_samples: int = 4096,
        min_interval_s: float = 0.1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        if not min_interval_s >= 0:
            raise ValueError(f"min_interval_s must be 0 (read at every change of phase) or more, got {min_interval_s}")
        self._accelerator = _find_accelerator(device)
        self._nvml = NvmlMeter(self._accelerator.device) if self._accelerator is not None else None
        self._host = HostMeter()
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._samples: deque[MemorySample] = deque(maxlen=max_samples)
        self._lock = threading.Lock()  # hooks run on autograd's device threads
        self._phase = Phase.IDLE
        self._phase_start_s = clock()
        self._last_read_s: dict[Phase, float] = {}
        self._step = 0
        self._hooks: PhaseHooks | None = None
        self._listeners: list[weakref.WeakMethod[Callable[[Phase], None]]] = []
        if self._accelerator is not None:
            self._accelerator.reset_peak_memory()

    @property
    def device(self) -> torch.device | None:
        """What is followed; None: no accelerator."""
        return None if self._accelerator is None else self._accelerator.device

    @property
    def current_phase(self) -> Phase:
        return self._phase

    @property
    def samples(self) -> list[MemorySample]:
        """The samples kept, oldest first. The phase now running has none yet."""
        with self._lock:
            return list(self._samples)

    @contextmanager
    def phase(self, phase: Phase | str) -> Iterator[None]:
        """Be in ``phase`` inside the ``with`` block, and in the phase of before after it."""
        inner, outer = _as_phase(phase), self._phase
        self.enter(inner)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, phase: Phase | str) -> None:
        """End the current phase, take its sample and begin ``phase``. Does nothing if it is the current one."""
        phase = _as_phase(phase)
        with self._lock:
            if phase is self._phase:
                return
            self._take_sample()
            if self._phase is Phase.UPDATE:
                self._step += 1
            self._phase = phase
        for listener in self._listeners:
            if (call := listener()) is not None:
                call(phase)

    def split(self) -> MemorySample:
        """Take a sample within the current phase, which goes on. The allocator's peak starts anew."""
        with self._lock:
            return self._take_sample(is_end=False)

    def tell(self, listener: Callable[[Phase], None]) -> None:
        """Call ``listener``, a bound method, as each phase begins, as long as its object is there."""
        self._listeners.append(weakref.WeakMethod(listener))

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Let ``model`` and ``optimizer`` set the phases by hooks, until :meth:`detach`.

        FORWARD begins when ``model`` is called and BACKWARD when the gradient of one of its outputs is known, so the
        loss counts as forward. A forward pass whose outputs need no gradient ends itself. UPDATE is
        ``optimizer.step``. Everything else is IDLE. With ``torch.compile``, attach to the compiled module.
        """
        if self._hooks is not None:
            raise ValueError("this MemoryMonitor already follows a model; call detach() first, or use another monitor")
        self._hooks = PhaseHooks(self.enter)
        self._hooks.install(model, optimizer)

    def detach(self) -> None:
        """Remove the hooks of :meth:`attach`, if any, and be IDLE."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self.enter(Phase.IDLE)

    def profile(self, num_steps: int = 8) -> dict[Phase, PhaseProfile]:
        """The highest figures of each phase seen in the last ``num_steps`` optimizer steps, the current one included.

        The steps before the first UPDATE count as one, so that without updates (inference) this is all samples kept.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        samples = self.samples
        first_step = samples[-1].step - num_steps + 1 if samples else 0
        by_phase: dict[Phase, list[MemorySample]] = {}
        for sample in samples:
            if sample.step >= first_step:
                by_phase.setdefault(sample.phase, []).append(sample)
        return {phase: _summarize(by_phase[phase]) for phase in Phase if phase in by_phase}

    def headroom(self, phase: Phase | str, budget_bytes: int) -> int:
        """``budget_bytes`` minus the allocator's peak in ``phase`` over the last steps; negative when over budget.

        Raises ValueError when there is nothing to answer from: no sample of that phase, or no accelerator.
        """
        phase = _as_phase(phase)
        seen = self.profile().get(phase)
        if seen is None:
            raise ValueError(f"no sample of phase {phase.value!r} yet: run one training step under the monitor first")
        if seen.peak_allocated_bytes is None:
            raise ValueError("this MemoryMonitor follows no accelerator, so headroom is unknown; give it a device")
        return budget_bytes - seen.peak_allocated_bytes

    def report(self, num_steps: int = 8) -> str:
        """A table of :meth:`profile`: one row per phase, memory in MiB (2**20 bytes), host time in ms."""
        rows: list[tuple[str, ...]] = [
            ("phase", "mean ms", "peak", "at end", "reserved", "device", "host RSS", "pinned"),
        ]
        for phase, seen in self.profile(num_steps).items():
            figures = (
                seen.peak_allocated_bytes,
                seen.allocated_bytes,
                seen.reserved_bytes,
                seen.device_used_bytes,
                seen.rss_bytes,
                seen.pinned_bytes,
            )
            rows.append((phase.value, f"{seen.mean_duration_s * 1e3:.1f}", *map(_in_mib, figures)))
        if len(rows) == 1:
            return "no samples yet: run one training step under the monitor"
        return format_table(rows) + "\nmemory in MiB, the highest of the last steps; '-': no such figure"

    def _take_sample(self, *, is_end: bool = True) -> MemorySample:
        """Record the phase that ends now. The lock is held."""
        now_s = self._clock()
        last_read_s = self._last_read_s.get(self._phase)
        read = last_read_s is None or now_s - last_read_s >= self._min_interval_s
        if read:
            self._last_read_s[self._phase] = now_s
        memory = None
        if self._accelerator is not None:
            memory = self._accelerator.memory()
            self._accelerator.reset_peak_memory()
        sample = MemorySample(
            t_s=now_s,
            duration_s=now_s - self._phase_start_s,
            step=self._step,
            phase=self._phase,
            allocated_bytes=None if memory is None else memory.allocated_bytes,
            peak_allocated_bytes=None if memory is None else memory.peak_allocated_bytes,
            reserved_bytes=None if memory is None else memory.reserved_bytes,
            device_used_bytes=self._nvml.used_bytes() if read and self._nvml is not None else None,
            rss_bytes=self._host.rss_bytes() if read else None,
            pinned_bytes=pinned_bytes(),
            is_end=is_end,
        )
        self._samples.append(sample)
        self._phase_start_s = now_s
        return sample


def _find_accelerator(device: torch.device | str | None) -> Accelerator | None:
    found = torch.accelerator.current_accelerator(check_available=True) if device is None else torch.device(device)
    return None if found is None or found.type == "cpu" else accelerator_for(found)


def _as_phase(phase: Phase | str) -> Phase:
    try:
        return Phase(phase)
    except ValueError:
        accepted = ", ".join(repr(known.value) for known in Phase)
        raise ValueError(f"unknown phase {phase!r}; give a Phase or one of {accepted}") from None


def _summarize(samples: list[MemorySample]) -> PhaseProfile:
    num_samples = max(1, sum(sample.is_end for sample in samples))
    return PhaseProfile(
        num_samples=num_samples,
        mean_duration_s=sum(sample.duration_s for sample in samples) / num_samples,
        allocated_bytes=_highest(sample.allocated_bytes for sample in samples),
        peak_allocated_bytes=_highest(sample.peak_allocated_bytes for sample in samples),
        reserved_bytes=_highest(sample.reserved_bytes for sample in samples),
        device_used_bytes=_highest(sample.device_used_bytes for sample in samples),
        rss_bytes=_highest(sample.rss_bytes for sample in samples),
        pinned_bytes=max(sample.pinned_bytes for sample in samples),
    )


def _highest(figures: Iterable[int | None]) -> int | None:
    return max((figure for figure in figures if figure is not None), default=None)


def _in_mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:,.1f}"
