"""Plain-text tables for reports."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """``rows``, the header first, as lines of text: the first column aligned left, the others right."""
    first_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for first, *others in rows:
        cells = [first.ljust(first_width)]
        cells += [cell.rjust(width) for cell, width in zip(others, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)
