"""Whole steps: what a signal asks for in the middle of one happens after it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Those that Python programs end, or save, by. A handler that runs in the middle of a step would see (or leave) some
# parameters of the step before and some of this one.
DEFERRED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)

_depth = 0  # of the main thread alone, the only one that runs handlers


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Run the handlers of signals that arrive inside it at its end, each once; a second SIGINT at once.

    Signals without a handler written in Python do what they always do: SIGTERM ends the process then and there, and
    what is on disk is the last checkpoint. Outside the main thread nothing need be done: handlers run there.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread() or _depth:
        yield
        return
    arrived: list[int] = []
    previous = {number: handler for number in DEFERRED if callable(handler := signal.getsignal(number))}

    def note(number: int, _: FrameType | None) -> None:
        if is_over or (number == signal.SIGINT and number in arrived):
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        elif number not in arrived:
            arrived.append(number)

    is_over = False
    _depth += 1
    try:
        for number in previous:
            signal.signal(number, note)
        yield
    finally:
        is_over = True  # should a handler raise below, those that are left here find back by themselves
        _depth -= 1
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)
