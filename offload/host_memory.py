"""Pageable host memory for what an update reads and writes every step."""

from __future__ import annotations

import functools
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_SMALL_BYTES = 1 << 21  # less than a huge page of any size in use on x86-64

# [Note: rows that collide] AMD's cores since Zen guess the way of the first-level cache from a hash of the address. It
# is the same for addresses a multiple of 2**28 bytes apart, so only one of them can be in that cache at a time, and an
# update that reads and writes three such rows takes several times as long (docs/cpu_kernel.md has the figures). Rows of
# state whose size would put any two of them that far apart are moved apart by 64 KiB more.
_COLLIDING_BYTES = 1 << 27  # of two rows in a row; of two neighbours 2**28
_SKEW_BYTES = 1 << 16


def uses_huge_pages() -> bool:
    """Whether :func:`empty` asks for huge pages.

    The environment's OFFLOAD_HUGE_PAGES, "0" or "1", else whether Linux offers them to those who ask (transparent huge
    pages in mode "madvise" or "always"). Fewer, larger pages cost fewer look-ups of addresses; docs/cpu_kernel.md has
    what that gains.

    Raises ValueError for another value of the variable.
    """
    value = os.environ.get("OFFLOAD_HUGE_PAGES")
    if value is None:
        return _are_offered()
    if value not in ("0", "1"):
        raise ValueError(
            f'OFFLOAD_HUGE_PAGES must be "0" or "1", not {value!r}; leave it unset for what the system offers'
        )
    return value == "1"


@functools.cache
def _are_offered() -> bool:
    try:
        modes = (_SETTINGS / "enabled").read_text()
    except OSError:
        return False
    return "[never]" not in modes and hasattr(mmap, "MADV_HUGEPAGE")


def empty(num_bytes: int) -> Tensor:
    """``num_bytes`` of memory of which no page has been touched, unless it is small: a 1-D uint8 CPU tensor.

    In huge pages where :func:`uses_huge_pages` says so. Its size is exact to one ordinary page: only huge pages that
    lie within it whole are used.
    """
    if num_bytes < _SMALL_BYTES or not uses_huge_pages():
        return torch.empty(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)  # which keeps the mapping


def empty_rows(num_rows: int, row_bytes: int) -> Tensor:
    """Memory like :func:`empty` for rows that are read together: a uint8 CPU tensor of shape (num_rows, row_bytes).

    Rows are contiguous; the tensor isn't where they would collide in a cache, see [Note: rows that collide].
    """
    stride_bytes = row_bytes + (_SKEW_BYTES if row_bytes > 0 and row_bytes % _COLLIDING_BYTES == 0 else 0)
    return empty(num_rows * stride_bytes).view(num_rows, stride_bytes)[:, :row_bytes]
