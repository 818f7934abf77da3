"""Waits of the host that last too long: given up with an error where they can be, else named in the log.

A worker that died, or a device that hangs, would otherwise leave a training run silent until somebody looks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager, contextmanager
from threading import Thread
from typing import TypeVar

logger = logging.getLogger("offload")

Result = TypeVar("Result")

DEFAULT_TIMEOUT_S = 600.0
_LOOK_S = 1.0  # how often a long wait looks whether the worker is still there


class StuckStepError(RuntimeError):
    """A step waits for work that does not end, or whose worker is gone; the message names both."""


def timeout_s() -> float:
    """How long the host waits for one piece of work: the environment's OFFLOAD_TIMEOUT_S in seconds, else 600.

    Raises ValueError for another text than a positive number.
    """
    value = os.environ.get("OFFLOAD_TIMEOUT_S", str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"OFFLOAD_TIMEOUT_S must be a positive number of seconds, not {value!r}")
    return seconds


def wait_for(
    future: Future[Result], what: Callable[[], str], started: Sequence[Thread], *, patience: float = 1.0
) -> Result:
    """The result of ``future``, or what it raises.

    Args:
        what: says what is waited for, and what that waits for in turn.
        started: the thread that does it, once there is one.
        patience: of the time-out; more than 1 for who waits for somebody that waits, so that the cause is heard first.

    Raises:
        StuckStepError: after :func:`timeout_s`, or when the worker has ended without doing it.
    """
    if future.done():  # nearly always: then none of what follows is paid for
        return future.result()
    limit_s = timeout_s() * patience
    waited_s = 0.0  # counted in waits, so that no clock that jumps can end it
    while True:
        step_s = min(_LOOK_S, limit_s - waited_s)
        try:
            return future.result(step_s)
        except FutureTimeoutError:
            if future.done():
                return future.result()
        waited_s += step_s
        if started and not started[-1].is_alive() and not future.done():
            raise StuckStepError(
                f"{what()}: its thread {started[-1].name!r} has died; construct a new optimizer and load the last "
                f"checkpoint"
            )
        if waited_s >= limit_s:
            raise StuckStepError(
                f"{what()}: not done after {limit_s:g} s. A device that hangs and a machine that swaps look like this; "
                f"OFFLOAD_TIMEOUT_S sets how long is waited"
            )


class Watchdog:
    """Logs waits that last longer than :func:`timeout_s`. One thread for all of them, which goes when nobody waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[object, tuple[float, Callable[[], str]]] = {}  # by a key of its own: until when, and for what
        self._thread: Thread | None = None

    @contextmanager
    def watch(self, what: Callable[[], str]) -> Iterator[None]:
        """Log an error if what runs inside does not end in time. ``what``, called in another thread, says what it is.

        For waits that nobody can give up: those for a device are its driver's, those for a disk the kernel's.
        """
        key, limit_s = object(), timeout_s()
        with self._lock:
            self._waits[key] = time.monotonic() + limit_s, what
            if self._thread is None or not self._thread.is_alive():  # dead: in a fork
                self._thread = Thread(target=self._run, args=(limit_s,), name="offload-watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(key, None)

    def _run(self, limit_s: float) -> None:
        while (next_s := self._next_deadline_s()) is not None:
            time.sleep(max(0.0, next_s - time.monotonic()))
            for what in self._take_late():
                logger.error(
                    "%s: not done after %g s, and it cannot be given up. A device or a disk that hangs, another rank "
                    "that is gone and a machine that swaps look like this; OFFLOAD_TIMEOUT_S sets when this is said",
                    what(), limit_s,
                )  # fmt: skip

    def _next_deadline_s(self) -> float | None:
        """None if nobody waits: the thread ends then."""
        with self._lock:
            if not self._waits:
                self._thread = None
            return min((deadline_s for deadline_s, _ in self._waits.values()), default=None)

    def _take_late(self) -> list[Callable[[], str]]:
        """Forget the waits that last too long, so that each is said once."""
        now_s = time.monotonic()
        with self._lock:
            late = [key for key, (deadline_s, _) in self._waits.items() if deadline_s <= now_s]
            return [self._waits.pop(key)[1] for key in late]


_watchdog = Watchdog()  # of this process


def watched(what: Callable[[], str]) -> AbstractContextManager[None]:
    """As :meth:`Watchdog.watch`, by the one watchdog of this process."""
    return _watchdog.watch(what)
