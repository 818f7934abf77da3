"""The floating-point mode of the current thread."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def denormals_kept() -> Iterator[None]:
    """Undoes torch.set_flush_denormal(True) on this thread for the duration.

    The mode has no getter, but a product in Python shows it. Threads inherit it from the one that starts them.
    """
    flushes = sys.float_info.min * 0.5 == 0.0
    if not flushes:
        yield
        return
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
