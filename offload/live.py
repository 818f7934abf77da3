"""A running optimizer's state in a small file, rewritten now and then: what ``offload watch`` shows.

Nobody has to read it, and a reader never disturbs the writer: each version replaces the one before it at once.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from offload.monitor import MemoryMonitor, Phase
from offload.plan import Plan
from offload.runtime import Runtime
from offload.timeline import busy_fraction, elapsed_s

logger = logging.getLogger("offload")

SCHEMA = 1
WRITE_INTERVAL_S = 0.5
MEASURE_INTERVAL_S = 10.0  # between steps measured for the lanes' use, where nothing else measures any
VARIABLE = "OFFLOAD_STATUS"
MAX_CHANGES = 8  # of the plan that are kept, the last ones


class LiveStatus:
    """Writes the status of ``optimizer`` to ``path`` after a step, at most every half second.

    Memory by phase comes from ``monitor``, or from one of its own that knows update from the rest only; attach one to
    the model to tell forward from backward. :meth:`close` ends it; so does the end of the optimizer.

    Raises:
        ValueError: if the file cannot be written.
    """

    def __init__(
        self,
        optimizer: Any,
        path: str | PathLike[str],
        monitor: MemoryMonitor | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = Path(path)
        self._clock = clock
        self._written_s = self._measured_s = -float("inf")
        self._num_steps = 0
        self._changes: list[dict[str, Any]] = []
        self._plan: Plan | None = None
        runtime: Runtime = optimizer.runtime
        self._owns_monitor = monitor is None
        self._monitor = monitor or MemoryMonitor(runtime.device)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        try:
            self._write(runtime)
        except OSError as error:
            self.close()
            raise ValueError(f"cannot write the status to {self._path}: {error}") from error

    def close(self) -> None:
        """Write no more. The file stays as it is."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._owns_monitor:
            self._monitor.enter(Phase.UPDATE)
        if self._clock() - self._measured_s >= MEASURE_INTERVAL_S:
            self._measured_s = self._clock()
            optimizer.runtime.time_next_step = True

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._num_steps += 1
        if self._owns_monitor:
            self._monitor.enter(Phase.IDLE)
        self._note_plan(optimizer.runtime.plan)
        if self._clock() - self._written_s < WRITE_INTERVAL_S:
            return
        try:
            self._write(optimizer.runtime)
        except OSError as error:  # a full disk is no reason to end a training
            self.close()
            logger.warning("the status is no longer written to %s: %s", self._path, error)

    def _note_plan(self, plan: Plan) -> None:
        if plan is not self._plan:  # a plan is never changed, so nothing of it need be compared in most steps
            self._plan = plan
            self._changes = [*self._changes, {"step": self._num_steps, "plan": str(plan)}][-MAX_CHANGES:]

    def _write(self, runtime: Runtime) -> None:
        """Replace the file as a whole, so that a reader sees one version or the next."""
        self._written_s = self._clock()
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        part.write_text(json.dumps(self._content(runtime)), encoding="utf-8")
        part.replace(self._path)

    def _content(self, runtime: Runtime) -> dict[str, Any]:
        phases = {
            phase.value: {
                "peak_allocated_bytes": seen.peak_allocated_bytes, "pinned_bytes": seen.pinned_bytes,
                "rss_bytes": seen.rss_bytes, "mean_duration_s": seen.mean_duration_s,
            }
            for phase, seen in self._monitor.profile().items()
        }  # fmt: skip
        budgets, bill = runtime.options.budgets, runtime.bill
        return {
            "schema": SCHEMA, "pid": os.getpid(), "written_unix_s": time.time(), "num_steps": self._num_steps,
            "device": str(runtime.device), "device_bytes": _device_bytes(runtime), "phases": phases,
            "bill": {"device": bill.device_bytes, "host": bill.host_bytes, "pinned": bill.pinned_bytes},
            "budgets": {
                "device": budgets.device_bytes, "host": budgets.host_bytes, "pinned": budgets.pinned_bytes,
            },
            "lanes": busy_fraction(runtime.spans), "update_s": elapsed_s(runtime.spans),
            "changes": self._changes,
            "decisions": [_decision(each) for each in list(runtime.in_force.decisions)[-MAX_CHANGES:]],
        }  # fmt: skip


def _device_bytes(runtime: Runtime) -> int | None:
    return None if runtime.accelerator is None else runtime.accelerator.memory().total_bytes


def _decision(decision: Any) -> dict[str, Any]:
    return {
        "step": decision.measurement.step, "action": decision.action, "update_s": decision.measurement.update_s,
        "predicted_s": decision.predicted_s,
    }  # fmt: skip


def publish_if_asked(optimizer: Any) -> None:
    """Start a :class:`LiveStatus` where OFFLOAD_STATUS names a file; ranks but the first add their number to it."""
    path = os.environ.get(VARIABLE)
    if path:
        rank = os.environ.get("RANK", "0")
        LiveStatus(optimizer, path if rank == "0" else f"{path}.rank{rank}")


def read_status(path: str | PathLike[str]) -> dict[str, Any]:
    """What :class:`LiveStatus` wrote last.

    Raises:
        ValueError: if there is no such file, or it is another one.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, and this version reads {SCHEMA}")
        return content
    except OSError as error:
        raise ValueError(f"no status in {path} ({error.strerror}): is {VARIABLE} set to it in the run?") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no status that a running optimizer wrote: {error}") from error
