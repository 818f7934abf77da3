"""Which layer occupies which bytes of the device buffer that streamed layers pass through."""

from __future__ import annotations

ALIGN_BYTES = 512  # of every layer's copy: whatever the dtype, and what torch's allocators give a tensor of its own


def round_up(num_bytes: int) -> int:
    """``num_bytes`` rounded up to whole units of alignment."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


class Arena:
    """Places layers of unequal size in one buffer, each in one piece.

    Next fit: a layer goes into the first gap behind the one placed last. Layers that come and go in a cycle then walk
    round the buffer as in a ring, and those that go in another order leave gaps that are found again.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._spans: dict[int, tuple[int, int]] = {}  # layer -> first byte, end
        self._cursor = 0

    def place(self, layer: int, num_bytes: int) -> int | None:
        """The first byte of the place that ``layer`` has now; None if no gap is large enough."""
        assert layer not in self._spans
        num_bytes = round_up(num_bytes)
        gaps = self._gaps()
        behind = [(max(begin, self._cursor), end) for begin, end in gaps]
        for begin, end in (*behind, *gaps):
            if end - begin >= num_bytes:
                self._spans[layer] = begin, begin + num_bytes
                self._cursor = begin + num_bytes
                return begin
        return None

    def free(self, layer: int) -> None:
        """Give ``layer``'s place back."""
        del self._spans[layer]

    def _gaps(self) -> list[tuple[int, int]]:
        gaps, begin = [], 0
        for first, end in sorted(self._spans.values()):
            gaps.append((begin, first))
            begin = end
        gaps.append((begin, self.num_bytes))
        return gaps
