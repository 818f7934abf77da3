"""How much host memory this process has page-locked through this package.

No operating system counter tells our pinned buffers from anybody else's, so whoever pins reports it here.
"""

from __future__ import annotations

import threading

_lock = threading.Lock()
_pinned_bytes = 0


def note_pinned(delta_bytes: int) -> None:
    """Record that ``delta_bytes`` were page-locked, or released if negative. Safe from any thread.

    Finalizers may call this while the interpreter collects garbage, so it allocates nothing the collector tracks: it
    cannot be re-entered on the thread that holds the lock.
    """
    global _pinned_bytes
    with _lock:
        total_bytes = _pinned_bytes + delta_bytes
        assert total_bytes >= 0, f"released {-delta_bytes} pinned bytes of only {_pinned_bytes}"
        _pinned_bytes = total_bytes


def pinned_bytes() -> int:
    """Bytes of host memory this package holds page-locked now."""
    return _pinned_bytes
