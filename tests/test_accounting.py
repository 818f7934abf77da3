"""Pinned bytes are counted once for the process, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from offload.accounting import note_pinned, pinned_bytes


def test_counts_what_is_pinned_and_released() -> None:
    before = pinned_bytes()
    note_pinned(4096)
    note_pinned(8192)
    assert pinned_bytes() == before + 12288
    note_pinned(-12288)
    assert pinned_bytes() == before


def test_threads_lose_no_update() -> None:
    before = pinned_bytes()

    def pin_and_release(_: int) -> None:
        for _ in range(500):
            note_pinned(3)
            note_pinned(-3)
        note_pinned(1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pin_and_release, range(8)))
    assert pinned_bytes() == before + 8
    note_pinned(-8)


def test_releasing_more_than_is_pinned_is_our_own_bug() -> None:
    before = pinned_bytes()
    with pytest.raises(AssertionError, match="released"):
        note_pinned(-before - 1)
    assert pinned_bytes() == before
