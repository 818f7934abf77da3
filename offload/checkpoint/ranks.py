"""The processes that save or load together: each does its part, and an error of one is an error of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


class Ranks:
    """The ranks of ``group``; this process alone where torch.distributed is not in use.

    Args:
        group: None for all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._in_use = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self._in_use else 0
        self.size = dist.get_world_size(group) if self._in_use else 1

    def all(self, work: Callable[[], _T]) -> list[_T]:
        """Run ``work`` on every rank. Returns what each made of it, by rank.

        Raises:
            Exception: what ``work`` raised here.
            RuntimeError: naming the rank, where it failed in another only.
        """
        result: _T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:  # noqa: BLE001 - raised below, when the other ranks know
            error = raised
        if self.size == 1:
            outcomes = [(result, None)]
        else:
            outcomes = [(None, None)] * self.size
            own = (result, None if error is None else f"{type(error).__name__}: {error}")
            dist.all_gather_object(outcomes, own, group=self._group)
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise RuntimeError(f"rank {rank} failed: {failed}")
        return [each for each, _ in outcomes]  # type: ignore[misc]
