"""Waits of the host that end: with what was waited for, with an error of the one who does it, or by a time-out.

A worker that died, or a device that hangs, would otherwise leave a training run silent until somebody looks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Thread
from typing import TypeVar

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
