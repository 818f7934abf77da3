"""Zeros that are laid out in memory for the threads that will work on them."""

from __future__ import annotations

from torch import Tensor

from offload.kernels import dispatch, native


def zero_rows_(rows: Tensor) -> Tensor:
    """Zeros a CPU tensor of shape (num_rows, numel), each row contiguous, in place, and returns it.

    Rows are shared among threads as an update of numel elements is. Where that is the first write, the system puts
    each page near the thread that updates it from then on, provided that threads are bound
    (:func:`offload.kernels.set_cpu_affinity`).
    """
    num_threads = dispatch.resolve_threads(None, rows.shape[-1])
    kernel = native.load() if num_threads > 1 and dispatch.is_plain_cpu(rows) else None
    if kernel is None:
        return rows.zero_()
    for row in rows.unbind():
        kernel.zero_(row, num_threads)
    return rows
